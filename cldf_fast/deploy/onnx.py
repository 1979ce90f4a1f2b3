"""Graphs as ONNX, in float32 or with convolutions and matrix products in half precision."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

OPSET = 22
"""The newest that TensorRT reads: from 22 on, convolutions may be bfloat16."""

PRECISIONS = ("float32", "float16", "bfloat16")

# What a matrix unit computes; all else (normalisation, softmax, sums) stays in float32. Resizing is products too, whose
# weights half precision holds exactly for factors that are powers of two.
_HALVED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_ONNX_TYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def to_onnx(
    graph: nn.Module, example: dict[str, Tensor], outputs: list[str], precisions: Sequence[str] = ("float32",)
) -> dict[str, bytes]:
    """Serialised ONNX models of a graph, by precision: the first axis is dynamic, all others are those of the example.

    example: an input of the graph by its name, each with at least two rows. outputs: names. precisions: some of
    PRECISIONS; inputs and outputs are float32 in any. The models have passed onnx.checker.
    """
    rows = torch.export.Dim("batch", min=1)
    with torch.no_grad(), _silent_exporter():
        program = torch.onnx.export(
            graph.eval(),
            tuple(example.values()),
            input_names=list(example),
            output_names=outputs,
            dynamic_shapes=tuple({0: rows} for _ in example),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    full = program.model_proto
    _forget_the_source(full)
    models = {}
    for precision in precisions:
        model = onnx.ModelProto()
        model.CopyFrom(full)
        if precision != "float32":
            _halve(model, precision)
        onnx.checker.check_model(model, full_check=True)
        models[precision] = model.SerializeToString()
    return models


@contextmanager
def _silent_exporter() -> Iterator[None]:
    """No word of deprecated calls of its own, of torchvision that is absent, of constants that are not folded."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _forget_the_source(model: Any) -> None:
    """Remove stack traces, which hold paths of this machine, and whatever else the exporter noted."""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    model.doc_string = model.graph.doc_string = ""
    for part in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info):
        part.doc_string = ""
        del part.metadata_props[:]
    for function in model.functions:
        function.doc_string = ""
        for node in function.node:
            node.doc_string = ""
            del node.metadata_props[:]


def _halve(model: Any, precision: str) -> None:
    """Products read and write half precision; casts around them go back to float32, and weights are stored as read.

    A typed graph: TensorRT's strongly typed networks take precision from the types in it and nowhere else.
    """
    half = _ONNX_TYPES[precision]
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    halved: dict[str, str] = {}  # float32 names to those in half precision
    nodes: list[Any] = []

    def in_half(name: str) -> str:
        if name not in halved:
            halved[name] = f"{name}_{precision}"
            if name in weights:
                model.graph.initializer.append(_rounded(weights[name], halved[name], half))
            else:
                nodes.append(onnx.helper.make_node("Cast", [name], [halved[name]], to=half))
        return halved[name]

    for node in model.graph.node:
        if node.op_type not in _HALVED:
            nodes.append(node)
            continue
        for i, name in enumerate(node.input):
            if name:
                node.input[i] = in_half(name)
        (full,) = node.output
        node.output[0] = f"{full}_{precision}"
        halved[full] = node.output[0]
        nodes += [node, onnx.helper.make_node("Cast", [node.output[0]], [full], to=TensorProto.FLOAT)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]  # their types are no longer true
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    # A cast that nobody reads is left over where a product feeds another.
    read = used | {output.name for output in model.graph.output}
    needed = [node for node in nodes if any(name in read for name in node.output)]
    del model.graph.node[:]
    model.graph.node.extend(needed)


def _rounded(tensor: Any, name: str, half: int) -> Any:
    values = torch.from_numpy(np.array(numpy_helper.to_array(tensor)))
    dtype, carrier = (torch.float16, torch.int16) if half == TensorProto.FLOAT16 else (torch.bfloat16, torch.int16)
    raw = values.to(dtype).contiguous().view(carrier).numpy().tobytes()
    return onnx.helper.make_tensor(name, half, list(values.shape), raw, raw=True)
