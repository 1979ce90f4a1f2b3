"""Parity: what an exported graph gives on golden cases, against the run in float32 PyTorch. No torch."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cldf_fast.deploy.manifest import SealedDirectory
from cldf_fast.deploy.predictor import Predictor
from cldf_fast.errors import DataError, IntegrityError

GOLDEN = "golden/cases.npz"
"""images [N, C, S, S], present bool [N, K], and what PyTorch gave: probability [N, K + 1, S, S], mask uint8 [N, S, S],
label_probability [N, K], bottleneck [N, F] (F is 0 where there is no such graph). golden/cases.json names the
images."""

# Proposed for clinical use in the project's design notes; measured values are kept in every report.
LIMITS: dict[str, dict[str, float]] = {
    "float32": {
        "probability_rel_l2": 1e-4,
        "label_probability_max": 1e-4,
        "bottleneck_rel_l2": 1e-4,
        "dice_mean": 0.9999,
        "dice_min": 0.999,
    },
    "float16": {
        "probability_max": 0.02,
        "label_probability_max": 0.02,
        "bottleneck_rel_l2": 0.01,
        "dice_mean": 0.995,
        "dice_min": 0.98,
    },
    "bfloat16": {
        "probability_max": 0.1,
        "label_probability_max": 0.05,
        "bottleneck_rel_l2": 0.05,
        "dice_mean": 0.98,
        "dice_min": 0.9,
    },
}
"""Most of an error, least of a Dice between both masks. bfloat16 keeps 8 bits, float16 11."""
_ARRAYS = ("images", "present", "probability", "mask", "label_probability", "bottleneck")
_LEAST = ("dice_mean", "dice_min")


@dataclass(frozen=True)
class Parity:
    """One backend and precision on the golden cases.

    probability_rel_l2, bottleneck_rel_l2: norm of the difference over the norm; the latter is 0 where there is no such
    graph. probability_max, label_probability_max: largest absolute differences. dice_mean, dice_min: between the masks,
    over cases where one has foreground. label_flips: image-level labels that differ. finite: whether all results are.
    failures: limits that are missed, in words; none is passed.
    """

    backend: str
    precision: str
    cases: int
    probability_rel_l2: float
    probability_max: float
    label_probability_max: float
    bottleneck_rel_l2: float
    dice_mean: float
    dice_min: float
    label_flips: int
    finite: bool
    failures: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For reports: figures to four digits."""
        return {
            name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in asdict(self).items()
        }


def golden_cases(sealed: SealedDirectory) -> dict[str, np.ndarray]:
    """The arrays of GOLDEN. Raises IntegrityError where the file is not one of them; pickles are never read."""
    try:
        with np.load(io.BytesIO(sealed.read(GOLDEN)), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in _ARRAYS}
    except (ValueError, KeyError, OSError, EOFError) as error:
        raise IntegrityError(f"{sealed.folder / GOLDEN}: is no file of golden cases ({error}); export again") from error


def measure(predictor: Predictor, golden: Mapping[str, np.ndarray]) -> Parity:
    """Run a predictor on golden cases, with the image-level labels that they have."""
    settings = predictor.load()
    precision = predictor.precision or settings.precisions[0]
    try:
        found = predictor.segment(golden["images"], golden["present"])
        label_probability = predictor.label_probability(golden["images"])
        bottleneck = predictor.bottleneck(golden["images"]) if settings.detector else golden["bottleneck"]
    except DataError as error:
        names = ("probability_rel_l2", "probability_max", "label_probability_max", "bottleneck_rel_l2")
        worst = dict.fromkeys(names, math.inf) | {"dice_mean": 0.0, "dice_min": 0.0}
        return Parity(
            predictor.execution.backend,
            precision,
            len(golden["images"]),
            **worst,
            label_flips=0,
            finite=False,
            failures=(str(error),),
        )
    difference = np.abs(found.probability.astype(np.float64) - golden["probability"])
    dice = [_dice(a, b) for a, b in zip(found.mask, golden["mask"], strict=True) if a.any() or b.any()] or [1.0]
    threshold = np.array(settings.label_threshold, np.float32)
    flips = int(((label_probability >= threshold) != (golden["label_probability"] >= threshold)).sum())
    values = {
        "probability_rel_l2": _relative(found.probability, golden["probability"]),
        "probability_max": float(difference.max()),
        "label_probability_max": float(np.abs(label_probability - golden["label_probability"]).max()),
        "bottleneck_rel_l2": _relative(bottleneck, golden["bottleneck"]),
        "dice_mean": float(np.mean(dice)),
        "dice_min": float(min(dice)),
    }
    failures = [
        f"{name} is {values[name]:.3g}, expected at {'least' if name in _LEAST else 'most'} {limit:g}"
        for name, limit in LIMITS[precision].items()
        if (values[name] < limit if name in _LEAST else values[name] > limit)
    ]
    if flips:
        failures.append(f"{flips} image-level labels differ, expected none")
    return Parity(
        predictor.execution.backend,
        precision,
        len(golden["images"]),
        **values,
        label_flips=flips,
        finite=True,
        failures=tuple(failures),
    )


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    """0 where both are empty."""
    difference = found.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / max(float(np.linalg.norm(expected)), 1e-30))


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    """Over pixels of the same foreground class."""
    return float(2 * np.count_nonzero((a == b) & (a > 0)) / (np.count_nonzero(a) + np.count_nonzero(b)))
