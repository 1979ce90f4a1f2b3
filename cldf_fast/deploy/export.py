"""From a run to a sealed engine directory: ONNX and engines, golden cases, a model card, the manifest.

The directory is built beside its place and moved there once every graph has passed parity: a failed or killed export
leaves nothing that could be deployed. What is in it: `deploy.manifest`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cldf_fast import __version__
from cldf_fast.data.acquisition import Acquisition
from cldf_fast.data.base import SliceDataset
from cldf_fast.data.packing import PackedSlices, pack
from cldf_fast.deploy import ood, parity
from cldf_fast.deploy.graph import BottleneckGraph, LabelGraph, SegmentationGraph
from cldf_fast.deploy.manifest import EngineKey, operating_system, seal
from cldf_fast.deploy.model_card import Told, model_card
from cldf_fast.deploy.noise import pixel_seed, standard_normal
from cldf_fast.deploy.onnx import OPSET, PRECISIONS, to_onnx
from cldf_fast.deploy.predictor import BOTTLENECK, RESEARCH_USE, Predictor
from cldf_fast.deploy.signature import private_key
from cldf_fast.deploy.tensorrt import Batches, TimingCache, build, capabilities, check_capabilities, library
from cldf_fast.errors import BackendError, ConfigError, ParityError
from cldf_fast.files import atomic_write_bytes, atomic_write_text
from cldf_fast.pipeline import CLDF
from cldf_fast.run import DatasetRecord, Run
from cldf_fast.segmentation import second_view
from cldf_fast.workflow import check_parts, open_parts

Graphs = dict[str, SegmentationGraph | LabelGraph | BottleneckGraph]

_GOLDEN_IMAGES = 16  # of the validation part, half of them with a foreground class where there are as many
_SYNTHETIC_SEED = 20250623
_FIT_STUDIES = 64  # of the training part: a thousand slices place the hundred numbers of a score well enough


@dataclass(frozen=True)
class Target:
    """Which engines to build beside the ONNX files.

    flavour: "tensorrt" or "tensorrt_rtx"; None: none. compute_capabilities: e.g. ("8.6", "12.0"), which only TensorRT
    for RTX builds for without such a GPU, by default for all that it serves. timing_cache: of TensorRT, see
    `deploy.tensorrt.TimingCache`: a file that outlives the export; None: its engines share one in memory.
    """

    flavour: str | None = None
    compute_capabilities: tuple[str, ...] = ()
    batches: Batches = field(default_factory=Batches)
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if self.timing_cache is not None and self.flavour != "tensorrt":
            raise ConfigError(
                f"timing_cache: only builds of tensorrt measure times, got one for {self.flavour or 'ONNX files alone'}"
            )


def export(
    run: Run,
    out: Path,
    *,
    precisions: Sequence[str] = ("float32", "float16"),
    target: Target | None = None,
    data: Path | None = None,
    window: tuple[float, float] | None = None,
    evidence: bool = True,
    signing_key: Path | None = None,
) -> list[parity.Parity]:
    """Write the engine directory `out`, which must not exist, and return the parity of every graph that ran.

    precisions: the first one is what predictors take by default. data: folder of the run's data set, for golden images
    of its validation part, which travel with the directory, for the score that tells studies unlike the training
    images, and for their modality and pixel size. Without (the phantom needs none), golden images are synthetic, and
    there is none of these. window: of intensities, for modalities with an absolute unit; None: as in training.
    evidence: False exports a run whose decision weighs the image's gradient map, without that.
    Raises ConfigError for a run that can't be exported, ParityError where a graph differs from PyTorch, BackendError
    for a runtime that is absent. Nothing is left at `out` then.
    """
    unknown = [precision for precision in precisions if precision not in PRECISIONS]
    if unknown or not precisions or len(set(precisions)) < len(precisions):
        raise ConfigError(f"precisions: expected some of {', '.join(PRECISIONS)}, each once, got {list(precisions)}")
    if out.exists():
        raise ConfigError(f"out: expected a folder that does not exist, got {out}, which does")
    if signing_key is not None:
        private_key(signing_key)  # `seal` uses it, minutes later
    target = target or Target()
    _check(target)
    timing_cache = TimingCache(target.timing_cache) if target.flavour == "tensorrt" else None
    cldf, record = run.load(), run.record()
    if not evidence:
        config = cldf.config
        cldf.config = config.model_copy(
            update={"segmentation": config.segmentation.model_copy(update={"evidence_weight": 0.0})}
        )
    graphs: Graphs = {
        "segmentation": SegmentationGraph(cldf),
        "labels": LabelGraph(cldf),
    }
    at_hand = data is not None or run.config().data.dataset == "phantom"
    parts = open_parts(run.config(), data, run) if at_hand else None
    if parts is not None:
        check_parts(parts, ("train", "val"), data)
    window = window or record.window or (None if parts is None else parts["train"].window)
    if parts is not None and len(parts["val"].refs) > 1:
        graphs[BOTTLENECK] = BottleneckGraph(cldf)
    detector, acquisition = None, record.acquisition
    if parts is not None:
        detector, acquisition = _learn(parts, cldf.config.data.size, graphs.get(BOTTLENECK))
    images, names = golden_images(run, None if parts is None else parts["val"])
    partial = out.with_name(f".partial-{secrets.token_hex(4)}-{out.name}")
    partial.mkdir(parents=True)
    try:
        _write_settings(partial, cldf, record, graphs, precisions, window, acquisition)
        if detector is not None:
            atomic_write_text(partial / ood.FILE, detector.to_json())
        _write_golden(partial, cldf, graphs, images, names)
        onnx = _write_onnx(partial, graphs, images[:2], precisions)
        weights = _weights_digest(run)
        engines = _write_engines(partial, onnx, weights, target, timing_cache)
        card = partial / "MODEL_CARD.md"
        told = Told(run, record, cldf.config, weights, engines, acquisition, scored=detector is not None)
        atomic_write_text(card, model_card(told, []))
        seal(partial, engines=engines)
        measured = _check_parity(partial, precisions)
        atomic_write_text(card, model_card(told, measured))
        seal(partial, engines=engines, signing_key=signing_key)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return measured


def golden_images(run: Run, validation: SliceDataset | None) -> tuple[Tensor, list[str]]:
    """Images float32 [N, C, S, S] that every backend has to agree on, and what each is.

    Of the validation part, where the data set is at hand, and synthetic ones: empty, saturated, noise, smooth tissue
    without and with a lesion of a few pixels.
    """
    config, record = run.config(), run.record()
    synthetic = _synthetic(record.num_channels, config.data.size)
    images, names = list(synthetic.values()), list(synthetic)
    if validation is not None:
        packed = pack(validation, config.data.size)
        positive = packed.require_labels().any(dim=1)
        half = _GOLDEN_IMAGES // 2
        rows = [*positive.nonzero().flatten()[:half].tolist(), *(~positive).nonzero().flatten()[:half].tolist()]
        images += [packed.images[row] for row in rows]
        # Names of files can tell who a patient is.
        names += [f"validation image {number + 1}" for number in range(len(rows))]
    return torch.stack(images), names


def _synthetic(channels: int, size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(_SYNTHETIC_SEED)
    coarse = torch.rand(1, channels, max(2, size // 8), max(2, size // 8), generator=generator)
    tissue = F.interpolate(coarse, (size, size), mode="bicubic")[0].clamp(0, 1) - 0.7
    lesion = tissue.clone()
    middle, radius = size // 2, max(1, size // 32)
    lesion[:, middle - radius : middle + radius, middle - radius : middle + radius] += 0.8
    return {
        "empty": torch.full_like(tissue, -1.0),
        "saturated": torch.full_like(tissue, 1.0),
        "noise": torch.rand(tissue.shape, generator=generator) * 2 - 1,
        "tissue": tissue,
        "tiny lesion": lesion.clamp(-1, 1),
    }


def _write_settings(
    folder: Path,
    cldf: CLDF,
    record: DatasetRecord,
    graphs: Graphs,
    precisions: Sequence[str],
    window: tuple[float, float] | None,
    acquisition: Acquisition,
) -> None:
    config = {
        "version": __version__,
        "intended_use": RESEARCH_USE,
        "mirror": cldf.config.data.mirror,
        "precisions": list(precisions),
        "opset": OPSET,
        "ood": ood.FILE if BOTTLENECK in graphs else None,
        "graphs": {name: {"views": graph.num_views, "levels": graph.num_levels} for name, graph in graphs.items()},
    }
    preprocessing = {
        "size": cldf.config.data.size,
        "channel_names": list(record.channel_names),
        "window": window,
        "pixel_range": [-1.0, 1.0],
        "acquisition": acquisition.to_json(),
    }
    labels = {"class_names": list(record.class_names), "label_threshold": cldf.label_threshold.tolist()}
    for name, content in (("config", config), ("preprocessing", preprocessing), ("labels", labels)):
        atomic_write_text(folder / f"{name}.json", json.dumps(content, indent=2) + "\n")


def _learn(
    parts: Mapping[str, SliceDataset], size: int, graph: nn.Module | None
) -> tuple[ood.Detector | None, Acquisition]:
    """From studies of the training part, spread evenly; the score's thresholds from all of the validation part.

    graph: of the bottleneck; None: no score.
    """
    grids, train = [], []
    for study in _studies(parts["train"], size, _FIT_STUDIES):
        grids.append((study.geometries[0], study.sizes[0]))
        if graph is not None:
            train.append(_features(graph, study))
    acquisition = Acquisition.of(parts["train"].modality, grids, size)
    if graph is None:
        return None, acquisition
    val = [_features(graph, study) for study in _studies(parts["val"], size, len(parts["val"].refs))]
    return ood.Detector.fit(train, val), acquisition


def _studies(part: SliceDataset, size: int, most: int) -> Iterator[PackedSlices]:
    for index in ood.spread(len(part.refs), most):
        yield pack(part.subset([part.refs[index]]), size)


def _features(graph: nn.Module, study: PackedSlices) -> ood.Features:
    images = study.images[torch.from_numpy(ood.spread(len(study)))]
    return {"intensity": ood.intensity_features(images.numpy()), BOTTLENECK: _bottleneck(graph, images)}


def _bottleneck(graph: nn.Module, images: Tensor) -> np.ndarray:
    """What PyTorch says of images float32 [N, C, S, S]: [N, F]."""
    noise = torch.from_numpy(standard_normal(pixel_seed(images.numpy()), 1, images.shape[1:]))
    with torch.no_grad():
        parts = zip(images.split(16), noise[:, None].split(16), strict=True)
        return torch.cat([graph(*part) for part in parts]).numpy()


def _write_golden(folder: Path, cldf: CLDF, graphs: Graphs, images: Tensor, names: list[str]) -> None:
    """What PyTorch says. A case without any class by its label probability is given all: its pixels count too."""
    label_probability = cldf.label_probability(images)
    present = label_probability >= cldf.label_threshold
    present[~present.any(dim=1)] = True
    found = cldf.segment(images, present)
    arrays = {
        "images": images.numpy(),
        "present": present.numpy(),
        "probability": found.probability.numpy(),
        "mask": found.mask.numpy(),
        "label_probability": label_probability.numpy(),
        "bottleneck": (
            _bottleneck(graphs[BOTTLENECK], images)
            if BOTTLENECK in graphs
            else np.zeros((len(images), 0), dtype=np.float32)
        ),
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    atomic_write_bytes(folder / parity.GOLDEN, buffer.getvalue())
    description = {"cases": names, "limits": parity.LIMITS}
    atomic_write_text(folder / "golden/cases.json", json.dumps(description, indent=2) + "\n")


def _write_onnx(folder: Path, graphs: Graphs, example: Tensor, precisions: Sequence[str]) -> dict[str, bytes]:
    """The ONNX files by name."""
    files = {}
    for name, graph in graphs.items():
        mirror = graph.views.mirror
        views = [example, second_view(example, mirror=mirror)][: graph.num_views]
        noise = [standard_normal(pixel_seed(view.numpy()), graph.num_levels, example.shape[1:]) for view in views]
        inputs = {"image": example, "noise": torch.from_numpy(np.stack(noise, axis=1))}
        outputs = [BOTTLENECK if name == BOTTLENECK else "label_probability"]
        if isinstance(graph, SegmentationGraph):
            inputs["present"] = torch.ones(len(example), graph.num_classes)
            outputs = ["probability", "mask"]
        for precision, model in to_onnx(graph, inputs, outputs, precisions).items():
            files[f"{name}.{precision}.onnx"] = model
            atomic_write_bytes(folder / f"{name}.{precision}.onnx", model)
    return files


def _check(target: Target) -> None:
    """Say what can't be built before anything is computed."""
    if target.flavour is None:
        return
    served = check_capabilities(target.flavour, target.compute_capabilities)
    if not served and not torch.cuda.is_available():
        raise BackendError(f"{target.flavour}: builds for the GPU of this machine, and there is none")


def _write_engines(
    folder: Path, onnx: dict[str, bytes], weights: str, target: Target, timing_cache: TimingCache | None
) -> dict[str, EngineKey]:
    """Engines of all ONNX files, and what each was built for, by path."""
    if target.flavour is None:
        return {}
    module = library(target.flavour)
    gpu = torch.cuda.is_available()
    wanted = target.compute_capabilities or tuple(capabilities(target.flavour))
    here = ".".join(map(str, torch.cuda.get_device_capability())) if gpu else ""
    engines = {}
    for file, model in onnx.items():
        engine = build(
            model,
            flavour=target.flavour,
            batches=target.batches,
            compute_capabilities=wanted,
            timing_cache=timing_cache,
        )
        name = f"engines/{file.removesuffix('.onnx')}.{target.flavour}.plan"
        atomic_write_bytes(folder / name, engine.plan)
        engines[name] = EngineKey(
            weights_sha256=weights,
            onnx_sha256=hashlib.sha256(model).hexdigest(),
            precision=file.split(".")[1],
            opset=OPSET,
            shapes=engine.shapes,
            flavour=target.flavour,
            version=module.__version__,
            cuda=torch.version.cuda or "none",
            compute_capability=",".join(wanted) or here,
            gpu_name=torch.cuda.get_device_name() if gpu else "none",
            os=operating_system(),
            builder_flags=engine.flags,
        )
    return engines


def _check_parity(folder: Path, precisions: Sequence[str]) -> list[parity.Parity]:
    """Every graph that can run here. Engines are checked on the machine that runs them, by `verify`."""
    measured = []
    for precision in precisions:
        predictor = Predictor(folder, precision=precision)
        try:
            predictor.load()
        except BackendError:  # bfloat16 convolutions
            continue
        measured.append(parity.measure(predictor, parity.golden_cases(predictor.sealed)))
        if measured[-1].failures:
            raise ParityError(
                f"{precision}: differs from PyTorch ({'; '.join(measured[-1].failures)}); export with another precision"
            )
    return measured


def _weights_digest(run: Run) -> str:
    """SHA-256 over the files of the networks and prototypes."""
    digest = hashlib.sha256()
    for name in ("cdm", "classifier", "decoder", "prototypes"):
        digest.update(hashlib.sha256((run.path / f"{name}.safetensors").read_bytes()).digest())
    return digest.hexdigest()
