"""From images and image-level labels to a trained decoder, against the same training by the public procedures.

    python -m benchmarks pipeline

All rivals train on the phantom with the bundled CDM and classifier and the bundled configuration; "patients" is how
many of the training part, "steps" how many the decoder is trained for. What is timed is `workflow.demo` without
reading and evaluation: pixel labels from evidence, features, steps, prototypes and their calibration. Each ends with
the mean Dice over the positive slices of the 40 test patients.

    ours         the project's
    public       `public_pipeline`, every step reads its images and embeds all their pixels
    at_anchors   the same, but only anchors are embedded
    held         the same, and full-size features are read once and held in memory

Seconds of each part are kept: "evidence", "reading" (what anchors read of the CDM), "steps" and "rest" (prototypes,
calibration and image-level thresholds, which all share).
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from unittest.mock import patch

from lightning_fabric import Fabric
from torch import Tensor

from benchmarks import public_pipeline
from benchmarks.public_layers import as_published
from benchmarks.suite import Benchmark, Problem, result_of
from cldf_fast.comparison import native_masks, score
from cldf_fast.data.packing import PackedSlices, pack
from cldf_fast.data.phantom import phantom_split
from cldf_fast.models.classifier import NoiseAwareClassifier
from cldf_fast.models.unet import UNet
from cldf_fast.pipeline import CLDF
from cldf_fast.run import Run
from cldf_fast.training import fit as fitting
from cldf_fast.training.decoder import read_anchors
from cldf_fast.training.engine import fit
from cldf_fast.training.fit import Trainer

OURS, INDEPENDENT = "ours", "held"
SMALL = {"patients": 1, "steps": 2}
PROBLEMS = ({"patients": 100, "steps": 400},)
PUBLIC = {"public": "per_step", "at_anchors": "at_anchors", "held": "held"}
RIVALS = (OURS, *PUBLIC)
SAME_DICE = 0.01

P = ParamSpec("P")
R = TypeVar("R")


class Stopwatch:
    """Seconds by part; what a part calls that is a part too counts there alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def __call__(self, part: str, function: Callable[P, R]) -> Callable[P, R]:
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            self._inner.append(0.0)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            took = time.perf_counter() - start
            self.seconds[part] += took - self._inner.pop()
            self._inner[-1] += took
            return result

        return timed


@dataclass(frozen=True)
class Trained:
    """cldf: with its decoder. labels: pixel labels int8 [N, H, W] of the training images. seconds: by part."""

    cldf: CLDF
    labels: Tensor
    seconds: dict[str, float]


def bundled() -> Run:
    """The run whose networks come with the package."""
    return Run(Path(str(resources.files("cldf_fast").joinpath("weights", "phantom"))))


@cache
def packed(part: str, patients: int | None = None) -> PackedSlices:
    """A part of the phantom's split, or its first patients."""
    size = bundled().config().data.size
    data = phantom_split(size=size)[part]
    return pack(data.select(data.subjects[:patients]), size)


def trainer_of(patients: int, steps: int, folder: Path) -> Trainer:
    """The bundled configuration's training, of so many steps."""
    config = bundled().config()
    optimisation = config.decoder.optimisation.model_copy(update={"steps": steps})
    config = config.model_copy(update={"decoder": config.decoder.model_copy(update={"optimisation": optimisation})})
    fabric = Fabric(accelerator="cpu", devices=1)
    train, val = packed("train", patients), packed("val", patients)
    return Trainer(config, Run(folder), fabric, train, val, bundled().record(), quiet=True)


def train(rival: str, cldf: CLDF, trainer: Trainer) -> Trained:
    """Everything that is timed."""
    watch = Stopwatch()
    with patch.multiple(fitting, read_anchors=watch("reading", read_anchors), fit=watch("steps", fit)):
        if rival == OURS:
            labels = watch("evidence", trainer.pixel_labels)(cldf, trainer.train)
            decided = watch("rest", fitting.fit_decoder)(cldf, trainer, labels)
        else:
            labels = watch("evidence", public_pipeline.pixel_labels)(cldf, trainer.train)
            features = watch("reading", public_pipeline.full_size_features(cldf))
            decided = watch("rest", public_pipeline.fit_decoder)(cldf, trainer, labels, features, PUBLIC[rival])
    return Trained(CLDF(trainer.config, cldf.unet, cldf.classifier, *decided), labels, dict(watch.seconds))


@cache
def mean_dice(cldf: CLDF) -> float:
    """Over the positive slices of the test patients, with image-level labels predicted."""
    data = packed("test")
    found = cldf.segment(data.images)
    scores = score(native_masks(found.probability, found.present, data), found.present, data)
    return float(scores.summary(bootstrap=1)["dice_positive"]["mean"])


def case(rival: str, patients: int, steps: int) -> Callable[[], Trained]:
    """What is timed; the first training of a process is a small one, for what only that does."""
    if {"patients": patients, "steps": steps} != SMALL:
        case(rival, **SMALL)()
    folder = tempfile.TemporaryDirectory()
    trainer, cldf = trainer_of(patients, steps, Path(folder.name)), bundled().load()
    if rival != OURS:
        assert isinstance(cldf.unet, UNet)
        assert isinstance(cldf.classifier, NoiseAwareClassifier)
        cldf = CLDF(cldf.config, as_published(cldf.unet), as_published(cldf.classifier))

    def run() -> Trained:
        with folder:
            return train(rival, cldf, trainer)

    return run


def check(rival: str, problem: Problem, trained: Trained) -> None:
    """As of another: pixel labels, but for those where a map is at a threshold, and Dice."""
    expected: Trained = result_of("pipeline", INDEPENDENT if rival == OURS else OURS, problem)
    assert (trained.labels != expected.labels).float().mean() < 1e-3
    if problem != SMALL:  # which is too little to learn anything from
        assert abs(mean_dice(trained.cldf) - mean_dice(expected.cldf)) < SAME_DICE


BENCHMARK = Benchmark(
    ours=OURS,
    rivals=lambda _problem: RIVALS,
    case=case,
    check=check,
    problems=PROBLEMS,
    quick=(SMALL,),
    small=lambda _problem: SMALL,
    headlines=PROBLEMS,
)


def test_training(benchmark: Any, timed: Callable[[int], Any], rival: str, problem: Problem) -> None:
    trained = timed(1)
    benchmark.extra_info["seconds"] = {part: round(seconds, 1) for part, seconds in trained.seconds.items()}
    if problem != SMALL:
        benchmark.extra_info["dice"] = round(mean_dice(trained.cldf), 4)
    check(rival, problem, trained)
