"""An engine directory of two tiny graphs made by hand, whose masks are where the image is bright: no run, no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cldf_fast.deploy.manifest import seal

CLASSES = ("liver", "spleen")


def write_bright_engine(
    folder: Path,
    *,
    size: int = 16,
    window: tuple[float, float] | None = None,
    acquisition: dict[str, Any] | None = None,
) -> Path:
    """Seal an engine directory for one channel, with masks of both classes in any image that isn't all dark."""
    folder.mkdir()
    for name, data in bright_models(size).items():
        (folder / f"{name}.float32.onnx").write_bytes(data)
    graph = {"views": 1, "levels": 1}
    files: dict[str, dict[str, Any]] = {
        "config": {
            "mirror": False,
            "graphs": {"segmentation": graph, "labels": graph},
            "precisions": ["float32"],
            "ood": None,
        },
        "preprocessing": {"size": size, "channel_names": ["grey"], "window": window},
        "labels": {"class_names": CLASSES, "label_threshold": [0.5, 0.5]},
    }
    if acquisition is not None:  # which older directories lack
        files["preprocessing"]["acquisition"] = acquisition
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "MODEL_CARD.md").write_text("# Made by hand\n", encoding="utf-8")
    seal(folder, engines={})
    return folder


def bright_models(size: int) -> dict[str, bytes]:
    """The graphs, serialised, with the inputs and outputs of exported ones."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, size, size])
    noise = helper.make_tensor_value_info("noise", TensorProto.FLOAT, ["batch", 1, 1, 1, size, size])
    present = helper.make_tensor_value_info("present", TensorProto.FLOAT, ["batch", 2])
    # Not symmetric, so that an image that is turned or mirrored has another mask than the mask turned or mirrored.
    kernel = np.zeros((3, 1, 3, 3), dtype=np.float32)
    kernel[1, 0] = [[0, 4, 8], [0, 12, 0], [0, 0, 0]]
    kernel[2, 0] = [[0, 0, 0], [0, 40, 0], [16, 0, 0]]
    segmentation = _model(
        "segmentation",
        [
            helper.make_node("Conv", ["image", "kernel", "bias"], ["logits"], pads=[1, 1, 1, 1]),
            helper.make_node("Softmax", ["logits"], ["probability"], axis=1),
            helper.make_node("ArgMax", ["probability"], ["chosen"], axis=1, keepdims=0),
            helper.make_node("Cast", ["chosen"], ["mask"], to=TensorProto.INT32),
        ],
        [image, noise, present],
        [
            helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["batch", 3, size, size]),
            helper.make_tensor_value_info("mask", TensorProto.INT32, ["batch", size, size]),
        ],
        {"kernel": kernel, "bias": np.array([0, 3, -8], dtype=np.float32)},
    )
    labels = _model(
        "labels",
        [
            helper.make_node("ReduceMax", ["image", "axes"], ["brightest"], keepdims=0),
            helper.make_node("Sigmoid", ["brightest"], ["one"]),
            helper.make_node("Concat", ["one", "one"], ["label_probability"], axis=1),
        ],
        [image, noise],
        [helper.make_tensor_value_info("label_probability", TensorProto.FLOAT, ["batch", 2])],
        {"axes": np.array([2, 3], dtype=np.int64)},
    )
    return {"segmentation": segmentation, "labels": labels}


def _model(
    name: str,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    constants: dict[str, np.ndarray],
) -> bytes:
    tensors = [numpy_helper.from_array(values, key) for key, values in constants.items()]
    graph = helper.make_graph(nodes, name, inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())
