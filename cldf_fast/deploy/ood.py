"""How unlike its training images a study is: what to accept, to warn of, to refuse. Numpy alone; no torch.

Two scores, because each sees what the other can't (a turned image has the histogram of the image):

intensity     histograms of the slices' channels (the features of Vasiliuk et al., arXiv 2306.13528)
bottleneck    the frozen CDM's deepest feature, averaged over a slice (`graph.BottleneckGraph`)

Each is a Mahalanobis distance to the training slices, in the space of their principal components; what lies outside of
that space counts by its mean variance. A study's score is the logarithm of the mean over up to `MAX_SLICES` of its
slices, spread evenly: single dark slices at the ends of a stack, which every study has, don't decide.

Thresholds come from scores of the validation part's studies. There are few of them, so that their quantiles would be
their largest: thresholds are instead one-sided prediction bounds of Student's t for the next study, wide where there
are few.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cldf_fast.data.grid import Floats
from cldf_fast.deploy.manifest import SealedDirectory
from cldf_fast.errors import ConfigError, IntegrityError

FILE = "ood.json"
MAX_SLICES = 16
LEVELS = ("accept", "warn", "refuse")
"""What a study is, by its score, and how far a policy goes at most."""
SCORES = ("intensity", "bottleneck")

# Of studies like the training ones this share is at most accepted; either score may err, so that each has half.
_ACCEPTED, _NOT_REFUSED = 0.95, 0.999
_KEPT_VARIANCE = 0.99
_MAX_COMPONENTS = 48  # so that the file of a network of 2,048 channels stays below the limit of JSON files
_BINS = 32
_DIGITS = 6

Array = npt.NDArray[np.float64]
Features = Mapping[str, Floats]
"""[N, F] of a study's N slices, by score."""


@dataclass(frozen=True)
class Judgement:
    """Of one study. status: of LEVELS. scores, warn, refuse: by score; from the latter two on it is warned of."""

    status: str
    scores: dict[str, float]
    warn: dict[str, float]
    refuse: dict[str, float]

    def capped(self, policy: str) -> Judgement:
        """The same under a policy of LEVELS, which is the most that may happen. Raises ConfigError for another."""
        if policy not in LEVELS:
            raise ConfigError(f"ood: expected one of {', '.join(LEVELS)}, got {policy!r}")
        return Judgement(min(self.status, policy, key=LEVELS.index), self.scores, self.warn, self.refuse)

    def sentence(self) -> str:
        """Which scores are too high, in words."""
        return " and ".join(
            f"its {name} score is {score:.2f}, above {self.warn[name]:.2f}"
            for name, score in self.scores.items()
            if score > self.warn[name]
        )

    def to_json(self) -> dict[str, Any]:
        """For reports."""
        return asdict(self)


@dataclass(frozen=True)
class Detector:
    """Scores and their thresholds. mean [F], components [D, F], variance [D], outside: by score."""

    mean: dict[str, Array]
    components: dict[str, Array]
    variance: dict[str, Array]
    outside: dict[str, float]
    warn: dict[str, float]
    refuse: dict[str, float]

    @classmethod
    def fit(cls, train: Sequence[Features], val: Sequence[Features]) -> Detector:
        """From the features of studies of the training part, and thresholds from those of two or more others."""
        from scipy.stats import t

        detector = cls({}, {}, {}, {}, {}, {})
        for name in SCORES:
            space = _space(np.concatenate([study[name] for study in train]).astype(np.float64))
            detector.mean[name], detector.components[name], detector.variance[name], detector.outside[name] = space
            scores = np.array([detector.score(name, study[name]) for study in val])
            for bounds, share in ((detector.warn, _ACCEPTED), (detector.refuse, _NOT_REFUSED)):
                times = t.ppf(1 - (1 - share) / len(SCORES), len(scores) - 1) * math.sqrt(1 + 1 / len(scores))
                bounds[name] = round(float(scores.mean() + times * scores.std(ddof=1)), _DIGITS)
        return detector

    @classmethod
    def of(cls, sealed: SealedDirectory) -> Detector:
        """Of an engine directory. Raises IntegrityError where the file is not one that `to_json` makes."""
        try:
            content = sealed.read_json(FILE)
            arrays = {
                field: {name: np.array(content[field][name], np.float64) for name in SCORES}
                for field in ("mean", "components", "variance")
            }
            numbers = {
                field: {name: float(content[field][name]) for name in SCORES} for field in ("outside", "warn", "refuse")
            }
            detector = cls(**arrays, **numbers)  # type: ignore[arg-type]
            for name in SCORES:
                detector._check(name)
            return detector
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(
                f"{sealed.folder / FILE}: is not what `cldf-fast export` writes ({type(error).__name__}: {error}); "
                f"export again"
            ) from error

    def to_json(self) -> str:
        """For FILE. Means and variances of many images' features; no image is in it."""
        content = {
            field: {name: _rounded(value) for name, value in values.items()} for field, values in vars(self).items()
        }
        return json.dumps(content, separators=(",", ":")) + "\n"

    def score(self, name: str, features: Floats | Array) -> float:
        """The study's score, of the features [N, F] of its slices."""
        centred = features.astype(np.float64) - self.mean[name]
        inside = centred @ self.components[name].T
        rest = np.maximum((centred**2).sum(axis=1) - (inside**2).sum(axis=1), 0)
        distance = (inside**2 / self.variance[name]).sum(axis=1) + rest / self.outside[name]
        return round(float(np.log(distance.mean() + 1e-9)), _DIGITS)

    def _check(self, name: str) -> None:
        (width,), (kept, _) = self.mean[name].shape, self.components[name].shape
        if self.components[name].shape != (kept, width) or self.variance[name].shape != (kept,):
            raise ValueError(f"arrays of {name} do not fit each other")
        # Written so that NaN fails it too.
        if not (self.variance[name].min(initial=1) > 0 and self.outside[name] > 0):
            raise ValueError(f"variances of {name} are not positive")

    def judge(self, features: Features) -> Judgement:
        """A study, by the features of its slices `spread(...)`."""
        scores = {name: self.score(name, features[name]) for name in SCORES}
        status = max(
            (
                "refuse" if score > self.refuse[name] else "warn" if score > self.warn[name] else "accept"
                for name, score in scores.items()
            ),
            key=LEVELS.index,
        )
        return Judgement(status, scores, self.warn, self.refuse)


def spread(count: int, most: int = MAX_SLICES) -> npt.NDArray[np.intp]:
    """At most so many of the indices below `count`, spread evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.intp))


def intensity_features(images: Floats) -> Floats:
    """Square roots of the channels' histograms, [N, C * 32], of images float32 [N, C, H, W] in [-1, 1].

    Of a root the variance does not depend on how full a bin is, as that of a count does.
    """
    rows = images.reshape(-1, images.shape[2] * images.shape[3])
    bins = np.clip(((rows + 1) * (_BINS / 2)).astype(np.intp), 0, _BINS - 1)
    counts = np.stack([np.bincount(row, minlength=_BINS) for row in bins])
    return np.sqrt(counts / rows.shape[1]).astype(np.float32).reshape(len(images), -1)


def _space(features: Array) -> tuple[Array, Array, Array, float]:
    """Mean, principal components, their variances, and the mean variance of a direction outside of them."""
    mean = features.mean(axis=0)
    _, singular, components = np.linalg.svd(features - mean, full_matrices=False)
    variance = singular**2 / max(1, len(features) - 1)
    share = np.cumsum(variance) / max(variance.sum(), 1e-12)
    kept = min(int(np.searchsorted(share, _KEPT_VARIANCE)) + 1, _MAX_COMPONENTS)
    least = max(1e-6 * float(variance[0]), 1e-12)
    outside = max(float(variance[kept:].sum()) / max(1, features.shape[1] - kept), least)
    return mean, components[:kept], np.maximum(variance[:kept], least), outside


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    return [_rounded(each) for each in (value.tolist() if isinstance(value, np.ndarray) else value)]
