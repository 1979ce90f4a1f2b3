"""An exported engine directory against the run that it came from, on the CPU.

    python -m benchmarks deploy

The bundled LGG networks, without evidence in the decision. "model" goes from normalised images and their labels to
probabilities and masks at the working size, "labels" from images to labels, "end2end" from a NIfTI file and its labels
to the mask's file. Where labels are given nobody runs the classifier. Rivals:

    onnx       cldf-fast predict: ONNX Runtime, float32
    float16    the same, convolutions and products in float16
    segment    cldf-fast segment: PyTorch with our layers
    eager      the same with the layers as they are published (`public_layers`)
    compile    UNet or classifier under torch.compile (model, labels)
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import nibabel
import numpy as np
import torch
from torch import Tensor

from benchmarks.public_layers import as_published
from benchmarks.suite import ROOT, SEED, Benchmark, Problem, Work, counted_operations, result_of
from cldf_fast.deploy.export import export
from cldf_fast.deploy.predictor import Predictor
from cldf_fast.inference import read_case, segment_case
from cldf_fast.models.unet import UNet
from cldf_fast.pipeline import CLDF
from cldf_fast.run import Run

PROBLEMS: tuple[Problem, ...] = (
    {"part": "model", "slices": 1},
    {"part": "model", "slices": 32},
    {"part": "labels", "slices": 32},
    {"part": "end2end", "slices": 32},
    {"part": "end2end", "slices": 155},
    {"part": "end2end", "slices": 500},
)
IN_PYTORCH = ("segment", "eager", "compile")
RIVALS = {
    "model": ("onnx", "float16", *IN_PYTORCH),
    "labels": ("onnx", "float16", *IN_PYTORCH),
    "end2end": ("onnx", "float16", "segment", "eager"),
}
FEW = 32  # slices; of more there are no rows but ours and those that it is compared with
NATIVE = 128  # pixels of a slice in the file


@cache
def folder() -> Path:
    """Where this process keeps the engine directory and the files."""
    return Path(tempfile.mkdtemp(prefix="bench-deploy-"))


@cache
def engine() -> Path:
    """The engine directory, exported once for all processes that measure, and again when the package's code changes."""
    digest = hashlib.sha256()
    for source in sorted((ROOT / "cldf_fast").rglob("*.py")):
        digest.update(source.read_bytes())
    exported = ROOT / "build" / f"bench-deploy-engine-{digest.hexdigest()[:12]}"
    if not exported.exists():
        export(Run(ROOT / "benchmarks" / "weights" / "lgg"), exported, evidence=False)
    return exported


def networks(rival: str) -> CLDF:
    """What a rival in PyTorch runs."""
    cldf = Run(ROOT / "benchmarks" / "weights" / "lgg").load()
    segmentation = cldf.config.segmentation.model_copy(update={"evidence_weight": 0.0})
    config = cldf.config.model_copy(update={"segmentation": segmentation})
    unet, classifier = cldf.unet, cldf.classifier
    if rival == "eager":
        unet, classifier = as_published(unet), as_published(classifier)
    elif rival == "compile":
        assert isinstance(unet, UNet)
        unet.blocks_of = torch.compile(unet.blocks_of)  # type: ignore[method-assign]
        classifier.forward = torch.compile(classifier.forward)  # type: ignore[method-assign]
    return CLDF(config, unet, classifier, cldf.decoder, cldf.prototypes, cldf.label_threshold)


def tissue(slices: int, size: int) -> Tensor:
    """Smooth images [S, 3, size, size] with values of no unit."""
    coarse = torch.rand(slices, 3, 8, 8, generator=torch.Generator().manual_seed(SEED))
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)


def from_images(rival: str, slices: int) -> Callable[[], tuple[Tensor, ...]]:
    x, present = tissue(slices, 64) * 2 - 1, torch.ones(slices, 1, dtype=torch.bool)
    if rival in IN_PYTORCH:
        cldf = networks(rival)

        def in_pytorch() -> tuple[Tensor, ...]:
            found = cldf.segment(x, present)
            return found.probability, found.mask

        return in_pytorch
    predictor = Predictor(engine(), precision="float32" if rival == "onnx" else rival)
    predictor.load()

    def exported() -> tuple[Tensor, ...]:
        found = predictor.segment(x.numpy(), present.numpy())
        return torch.from_numpy(found.probability), torch.from_numpy(found.mask)

    return exported


def to_labels(rival: str, slices: int) -> Callable[[], tuple[Tensor, ...]]:
    x = tissue(slices, 64) * 2 - 1
    if rival in IN_PYTORCH:
        cldf = networks(rival)
        return lambda: (cldf.label_probability(x),)
    predictor = Predictor(engine(), precision="float32" if rival == "onnx" else rival)
    predictor.load()
    return lambda: (torch.from_numpy(predictor.label_probability(x.numpy())),)


def from_file(rival: str, slices: int) -> Callable[[], tuple[Tensor, ...]]:
    paths = [folder() / f"{slices}-{channel}.nii.gz" for channel in range(3)]
    for path, values in zip(paths, tissue(slices, NATIVE).unbind(1), strict=True):
        stored = (1000 * values).to(torch.int16).permute(2, 1, 0).numpy()
        nibabel.save(nibabel.Nifti1Image(stored, np.diag([1.0, 1.0, 4.0, 1.0])), path)
    source, out = ",".join(map(str, paths)), folder() / rival
    if rival in IN_PYTORCH:
        cldf, record = networks(rival), Run(ROOT / "benchmarks" / "weights" / "lgg").record()

        def run() -> list[Path]:
            given = torch.ones(1, dtype=torch.bool)
            return segment_case(cldf, record, read_case(source, 3), out, labels=given).files
    else:
        predictor = Predictor(engine(), precision="float32" if rival == "onnx" else rival)
        predictor.load()

        def run() -> list[Path]:
            return predictor.predict(source, out, labels="all").files

    def mask() -> tuple[Tensor, ...]:
        (file,) = run()
        return (torch.from_numpy(np.asarray(cast(Any, nibabel.load(file)).dataobj)),)

    return mask


def case(rival: str, part: str, slices: int) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed: probabilities and masks of images, label probabilities, or the mask of a file."""
    run = {"model": from_images, "labels": to_labels, "end2end": from_file}[part](rival, slices)
    if rival == "compile":
        run()
    return run


def check(rival: str, problem: Problem, result: tuple[Tensor, ...]) -> None:
    """Masks, and probabilities where they are given, agree with another rival's within the precision's rounding."""
    expected = result_of("deploy", "eager" if rival == "onnx" else "onnx", problem)
    assert expected[-1].any()
    if problem["part"] != "labels":
        assert (result[-1] == expected[-1]).float().mean() > (0.999 if rival != "float16" else 0.995)
    if problem["part"] != "end2end":
        torch.testing.assert_close(result[0], expected[0], rtol=0, atol=2e-5 if rival != "float16" else 2e-2)


def work(problem: Problem) -> Work | None:
    """The network's operations as PyTorch does them; its weights and images are read, and probabilities written."""
    part, cldf, images = problem["part"], networks("eager"), tissue(problem["slices"], 64)
    if part == "end2end":
        return None
    weights = sum(each.nbytes for each in (cldf.unet if part == "model" else cldf.classifier).parameters())
    operations = problem["slices"] * counted_operations(case("eager", part, 1))
    return Work(operations, weights + (2 if part == "model" else 1) * images.nbytes)


BENCHMARK = Benchmark(
    ours="onnx",
    rivals=lambda problem: RIVALS[problem["part"]] if problem["slices"] <= FEW else ("onnx", "segment", "eager"),
    case=case,
    check=check,
    problems=PROBLEMS,
    quick=(),
    small=lambda problem: {"part": problem["part"], "slices": 2},
    headlines=PROBLEMS[1:],
    variants=("float16",),
    slow=frozenset({"onnx", "float16", "eager", "compile"}),  # the export
    work=work,
)


def test_deploy(timed: Callable[[int], Any], memory: Callable[[], None], rival: str, problem: Problem) -> None:
    check(rival, problem, timed(15))
    if problem["slices"] == FEW and problem["part"] != "labels" and rival in ("onnx", "eager"):
        memory()
