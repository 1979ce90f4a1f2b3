"""Scores of masks, image labels and pixel labels, with one explicit policy for empty masks.

Positives are kept apart from negatives. There is deliberately no Dice over *all* slices: a method that never marks
anything scores 0.66 on the LGG test set by such a figure, because every healthy slice counts as a perfect one.

Distances are in millimetres, between the centres of surface pixels. A surface is mask XOR erosion (4 or 6 neighbours)
with the outside of the image counted as foreground, so that a structure cut by the image's edge has no surface there.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from cldf_fast.errors import DataError
from cldf_fast.files import atomic_write_text

EMPTY_POLICY = (
    "Structure and prediction both absent: excluded from every mean, and counted. "
    "Structure absent, prediction not: Dice 0, counted as a false positive; "
    "it enters the counts of the negatives and no mean over positives. "
    "Structure present, prediction absent: Dice 0, HD95 and ASSD equal to the diagonal of the image (or volume), "
    "counted as a miss."
)
"""What empty masks score; reports print this sentence beside every table."""

AGGREGATION_POLICY = (
    "Means and standard deviations are over positive slices, or over positive patients "
    "(a patient's slices stacked into a volume). "
    "With several classes they are made for each class and then averaged over the classes (macro); "
    "counts are summed over the classes, each slice and class counting once. "
    "Intervals are 95% percentile bootstrap intervals of the mean that resample patients, not slices."
)
"""How rows become the figures of `SegmentationScores.summary`; reports print this beside every table."""

SLICE_METRICS = ("dice", "iou", "hd95", "assd")
PATIENT_METRICS = ("dice", "hd95", "assd")

Outcome = Literal["segmented", "missed", "false_positive", "empty"]
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


# ----------------------------------------------------------------------------------------------------------------------
# One pair of masks


def dice(prediction: npt.ArrayLike, truth: npt.ArrayLike) -> float | None:
    """Dice coefficient in [0, 1] of two masks of one shape (non-zero is foreground); None if both are empty."""
    a, b = _mask_pair(prediction, truth)
    total = int(a.sum()) + int(b.sum())
    return 2.0 * int((a & b).sum()) / total if total else None


def iou(prediction: npt.ArrayLike, truth: npt.ArrayLike) -> float | None:
    """Intersection over union in [0, 1] of two masks of one shape; None if both are empty."""
    a, b = _mask_pair(prediction, truth)
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else None


def relative_absolute_volume_difference(prediction: npt.ArrayLike, truth: npt.ArrayLike) -> float | None:
    """|volume(prediction) - volume(truth)| / volume(truth), in percent; None if the truth is empty."""
    a, b = _mask_pair(prediction, truth)
    volume = int(b.sum())
    return 100.0 * abs(int(a.sum()) - volume) / volume if volume else None


def surface_distances(
    prediction: npt.ArrayLike, truth: npt.ArrayLike, spacing: Sequence[float]
) -> tuple[Floats, Floats]:
    """Distances between the surfaces of two masks.

    prediction, truth: masks of one shape, 2D or 3D, each with at least one foreground pixel. spacing: mm per axis.
    Returns (pred_to_truth, truth_to_pred): for every surface pixel of the one mask its distance in mm to the nearest
    surface pixel of the other, float64, in row-major order. A mask that fills the image has the image's frame as its
    surface. Raises DataError for an empty mask.
    """
    a, b = _mask_pair(prediction, truth)
    steps = _check_spacing(spacing, a.ndim)
    for name, mask in (("prediction", a), ("truth", b)):
        if not mask.any():
            raise DataError(f"{name}: expected at least one foreground pixel, got an empty mask, which has no surface")
    # Exact: every surface pixel lies in the box. One pixel of margin keeps the box's faces from passing for the
    # image's edge, where a mask has no surface.
    box = _bounding_box(a | b, margin=1)
    surface_a, surface_b = _surface(a[box]), _surface(b[box])
    to_a = ndimage.distance_transform_edt(~surface_a, sampling=steps)
    to_b = ndimage.distance_transform_edt(~surface_b, sampling=steps)
    return to_b[surface_a], to_a[surface_b]


def hd95(prediction: npt.ArrayLike, truth: npt.ArrayLike, spacing: Sequence[float]) -> float | None:
    """95% Hausdorff distance in mm: the larger of the two directed 95th percentiles of `surface_distances`.

    None if both masks are empty, the image diagonal in mm if one of them is.
    """
    return _surface_scores(prediction, truth, spacing, _hd95)[0]


def assd(prediction: npt.ArrayLike, truth: npt.ArrayLike, spacing: Sequence[float]) -> float | None:
    """Average symmetric surface distance in mm: the mean over both surfaces' pixels, pooled.

    None if both masks are empty, the image diagonal in mm if one of them is.
    """
    return _surface_scores(prediction, truth, spacing, _assd)[0]


def mssd(prediction: npt.ArrayLike, truth: npt.ArrayLike, spacing: Sequence[float]) -> float | None:
    """Maximum symmetric surface distance (Hausdorff distance) in mm.

    None if both masks are empty, the image diagonal in mm if one of them is.
    """
    return _surface_scores(prediction, truth, spacing, _mssd)[0]


def image_diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Length in mm of the diagonal of an image of this shape: what a missed structure scores as HD95 and ASSD."""
    return math.hypot(*(size * step for size, step in zip(shape, spacing, strict=True)))


def _hd95(to_truth: Floats, to_prediction: Floats) -> float:
    return float(max(np.percentile(to_truth, 95), np.percentile(to_prediction, 95)))


def _assd(to_truth: Floats, to_prediction: Floats) -> float:
    return float((to_truth.sum() + to_prediction.sum()) / (to_truth.size + to_prediction.size))


def _mssd(to_truth: Floats, to_prediction: Floats) -> float:
    return float(max(to_truth.max(), to_prediction.max()))


def _surface_scores(
    prediction: npt.ArrayLike,
    truth: npt.ArrayLike,
    spacing: Sequence[float],
    *statistics: Callable[[Floats, Floats], float],
) -> list[float | None]:
    a, b = _mask_pair(prediction, truth)
    present = int(a.any()) + int(b.any())
    if present == 0:
        return [None for _ in statistics]
    if present == 1:
        diagonal = image_diagonal(a.shape, _check_spacing(spacing, a.ndim))
        return [diagonal for _ in statistics]
    distances = surface_distances(a, b, spacing)
    return [statistic(*distances) for statistic in statistics]


def _mask_pair(prediction: npt.ArrayLike, truth: npt.ArrayLike) -> tuple[Mask, Mask]:
    a, b = np.asarray(prediction), np.asarray(truth)
    if a.shape != b.shape:
        raise DataError(f"prediction: expected the shape of the truth, {list(b.shape)}, got {list(a.shape)}")
    if a.ndim not in (2, 3):
        raise DataError(f"prediction: expected a 2D or 3D mask, got shape {list(a.shape)}")
    return a.astype(bool), b.astype(bool)


def _check_spacing(spacing: Sequence[float], ndim: int) -> tuple[float, ...]:
    steps = tuple(float(step) for step in spacing)
    if len(steps) != ndim or not all(math.isfinite(step) and step > 0 for step in steps):
        raise DataError(f"spacing: expected {ndim} positive distances in mm, got {steps}")
    return steps


def _bounding_box(mask: Mask, margin: int = 0) -> tuple[slice, ...]:
    """Slices that enclose the foreground of a non-empty mask, `margin` pixels wider where the image allows."""
    box = []
    for axis in range(mask.ndim):
        occupied = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(max(int(occupied[0]) - margin, 0), int(occupied[-1]) + 1 + margin))
    return tuple(box)


def _surface(mask: Mask) -> Mask:
    neighbours = ndimage.generate_binary_structure(mask.ndim, 1)
    surface = mask & ~ndimage.binary_erosion(mask, neighbours, border_value=1)
    # Only a mask that fills the whole image has no surface inside it.
    return surface if surface.any() else mask & ~ndimage.binary_erosion(mask, neighbours, border_value=0)


# ----------------------------------------------------------------------------------------------------------------------
# A data set


@dataclass(frozen=True)
class SliceScore:
    """Scores of one class in one slice.

    truth_pixels, predicted_pixels: areas. dice, iou: in [0, 1]. hd95, assd: mm.
    None stands for "no such figure": everything when outcome is "empty"; the distances also of a false positive, and
    when surface metrics are switched off. predicted_label: the image-level label that the method went by, None if it
    used none.
    """

    subject: str
    study: str
    index: int
    class_name: str
    outcome: Outcome
    truth_pixels: int
    predicted_pixels: int
    dice: float | None
    iou: float | None
    hd95: float | None
    assd: float | None
    predicted_label: bool | None


@dataclass(frozen=True)
class PatientScore:
    """Scores of one class in one patient: means over the patient's studies that show the class.

    outcome: of the patient as a whole. dice in [0, 1]; hd95, assd: mm, of the stacked volume; None when undefined,
    switched off, or when a study has missing slices (its surface would be made up).
    """

    subject: str
    class_name: str
    outcome: Outcome
    dice: float | None
    hd95: float | None
    assd: float | None


@dataclass(frozen=True)
class _Patch:
    """The part of a slice that holds foreground of the prediction or of the truth."""

    row: int
    column: int
    prediction: npt.NDArray[np.uint8]
    truth: npt.NDArray[np.uint8]


class _Stack:
    """The slices of one study, kept as patches: healthy slices cost nothing, and volumes are put together cropped."""

    def __init__(self, shape: tuple[int, int], spacing: tuple[float, ...]) -> None:
        self.shape = shape
        self.spacing = spacing
        self.patches: dict[int, _Patch | None] = {}

    @property
    def complete(self) -> bool:
        return max(self.patches) - min(self.patches) + 1 == len(self.patches)

    def volumes(self, value: int) -> tuple[Mask, Mask]:
        """(prediction, truth) of one class, [S, H, W] with S from the first to the last slice that was added."""
        first = min(self.patches)
        shape = (max(self.patches) - first + 1, *self.shape)
        prediction, truth = np.zeros(shape, bool), np.zeros(shape, bool)
        for index, patch in self.patches.items():
            if patch is not None:
                rows, columns = patch.truth.shape
                window = (
                    index - first,
                    slice(patch.row, patch.row + rows),
                    slice(patch.column, patch.column + columns),
                )
                prediction[window] = patch.prediction == value
                truth[window] = patch.truth == value
        return prediction, truth


class SegmentationScores:
    """Collects the scores of one method slice by slice, and sums them up per slice and per patient.

    class_names: names of the K foreground classes (mask value k is class_names[k - 1]).
    surface: False leaves out HD95 and ASSD, most of the time that scoring takes.

    >>> scores = SegmentationScores(["tumour"])
    >>> square = np.zeros((8, 8), np.uint8)
    >>> square[2:5, 2:5] = 1
    >>> scores.add(subject="a", study="a", index=0, prediction=square, truth=square, spacing=(5.0, 1.0, 1.0))
    >>> scores.summary()["dice_positive"]["mean"]
    1.0
    """

    def __init__(self, class_names: Sequence[str], *, surface: bool = True) -> None:
        if not class_names or len(set(class_names)) != len(class_names):
            raise DataError(f"class_names: expected one or more different names, got {list(class_names)}")
        self.class_names = tuple(class_names)
        self.surface = surface
        self._rows: list[SliceScore] = []
        self._stacks: dict[tuple[str, str], _Stack] = {}

    @property
    def rows(self) -> tuple[SliceScore, ...]:
        """One row per slice and class, in the order of the calls to `add`."""
        return tuple(self._rows)

    def add(
        self,
        *,
        subject: str,
        study: str,
        index: int,
        prediction: npt.ArrayLike,
        truth: npt.ArrayLike,
        spacing: Sequence[float],
        predicted_label: npt.ArrayLike | None = None,
    ) -> None:
        """Score one slice; slices may come in any order.

        subject, study: names of the patient and of the acquisition. index: the slice's place in the study's stack.
        prediction, truth: uint8 [H, W], 0 background and 1..K classes. spacing: mm along (slice, row, column).
        predicted_label: bool [K], the image-level label that the method went by, if it used one.
        Raises DataError for other types, shapes or values, a slice added twice, or a study that changes its geometry.
        """
        where = f"study {study!r}, slice {index}"
        predicted, true = (
            self._check_mask(name, array, where) for name, array in (("prediction", prediction), ("truth", truth))
        )
        if predicted.shape != true.shape:
            raise DataError(
                f"{where}: expected a prediction of the truth's shape, {list(true.shape)}, got {list(predicted.shape)}"
            )
        steps = _check_spacing(spacing, 3)
        labels = self._check_label(predicted_label, where)
        stack = self._stacks.setdefault((subject, study), _Stack((true.shape[0], true.shape[1]), steps))
        if stack.shape != true.shape or stack.spacing != steps:
            raise DataError(
                f"{where}: expected the geometry of the study's other slices, {list(stack.shape)} at "
                f"{stack.spacing} mm, got {list(true.shape)} at {steps} mm"
            )
        if index in stack.patches:
            raise DataError(f"{where}: added twice; every slice is scored once")
        stack.patches[index] = _patch(predicted, true)

        size = len(self.class_names) + 1
        # confusion[p, t]: pixels predicted as p that are t.
        joint = predicted.ravel().astype(np.intp) * size + true.ravel()
        confusion = np.bincount(joint, minlength=size * size).reshape(size, size)
        for value, name in enumerate(self.class_names, start=1):
            truth_pixels, predicted_pixels = int(confusion[:, value].sum()), int(confusion[value].sum())
            overlap, total = int(confusion[value, value]), truth_pixels + predicted_pixels
            distances: list[float | None] = [None, None]
            if self.surface and truth_pixels:
                distances = _surface_scores(predicted == value, true == value, steps[1:], _hd95, _assd)
            self._rows.append(
                SliceScore(
                    subject=subject,
                    study=study,
                    index=index,
                    class_name=name,
                    outcome=_outcome(truth_pixels > 0, predicted_pixels > 0),
                    truth_pixels=truth_pixels,
                    predicted_pixels=predicted_pixels,
                    dice=2.0 * overlap / total if total else None,
                    iou=overlap / (total - overlap) if total else None,
                    hd95=distances[0],
                    assd=distances[1],
                    predicted_label=None if labels is None else bool(labels[value - 1]),
                )
            )

    def patients(self) -> tuple[PatientScore, ...]:
        """One row per patient and class, patients sorted by name; volumes are scored by this call."""
        studies: dict[str, list[_Stack]] = defaultdict(list)
        for (subject, _), stack in sorted(self._stacks.items()):
            studies[subject].append(stack)
        return tuple(
            self._score_patient(subject, value, stacks)
            for subject, stacks in sorted(studies.items())
            for value in range(1, len(self.class_names) + 1)
        )

    def worst(self, n: int) -> list[SliceScore]:
        """The n rows with the lowest Dice among those that show the structure; of equals, larger structures first."""
        return self._ranked()[:n]

    def examples(self, n: int) -> dict[str, list[SliceScore]]:
        """Rows to look at: {"good", "median", "worst"}, n of each, from different patients as far as there are any.

        Ranked by Dice among the rows that show the structure: good is around the 90th percentile, median around the
        50th, worst from the bottom. No row is given twice.
        """
        ranked = self._ranked()
        taken: set[int] = set()
        chosen: dict[str, list[SliceScore]] = {}
        for name, share in (("worst", 0.0), ("good", 0.9), ("median", 0.5)):
            target = share * (len(ranked) - 1)
            nearest = sorted(range(len(ranked)), key=lambda i: abs(i - target))
            free = [i for i in nearest if i not in taken]
            first_of_patient = {ranked[i].subject: i for i in reversed(free)}
            one_each = set(first_of_patient.values())
            picked = sorted(free, key=lambda i: i not in one_each)[:n]
            taken.update(picked)
            chosen[name] = [ranked[i] for i in sorted(picked, key=lambda i: -i)]
        return {name: chosen[name] for name in ("good", "median", "worst")}

    def summary(self, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
        """The figures of a table, as plain JSON values.

        bootstrap: number of resamples of the patients. seed: of the resampling.

        Metrics, each {"mean", "std", "ci95": [low, high], "n"} (None where nothing was scored; no interval from a
        single patient): dice_positive, iou_positive, hd95_positive, assd_positive over slices that show the structure;
        dice_patient, hd95_patient, assd_patient over patients that show it. Dice and IoU in [0, 1], distances in mm.
        Counts: slices, positive_slices, missed_slices, missed_by_label (missed, and the predicted image-level label
        denied the structure; None without labels), negative_slices, false_positive_slices, excluded_empty, patients,
        positive_patients, missed_patients, false_positive_patients, incomplete_volumes (studies with missing slices,
        left out of the patients' distances); false_positive_pixels_mean is per negative slice.
        per_class: the same for every class. The top level is macro: means, deviations and, within every bootstrap
        resample, means again are averaged over the classes that occur; n and the counts are sums over classes, except
        slices, patients and incomplete_volumes, which count each once.
        `dice_all` is deliberately absent, see the module's docstring.
        """
        if not self._rows:
            raise DataError("summary: expected at least one scored slice, got none; call add first")
        patient_rows = self.patients()
        subjects = sorted({row.subject for row in self._rows})
        number = {subject: i for i, subject in enumerate(subjects)}
        draws = np.random.default_rng(seed).multinomial(
            len(subjects), np.full(len(subjects), 1 / len(subjects)), size=bootstrap
        )
        samples: dict[str, list[_Sample]] = defaultdict(list)
        per_class: dict[str, dict[str, Any]] = {}
        for name in self.class_names:
            slices = [row for row in self._rows if row.class_name == name]
            patients = [row for row in patient_rows if row.class_name == name]
            rows_of: dict[str, Sequence[SliceScore | PatientScore]] = {
                **{f"{metric}_positive": slices for metric in SLICE_METRICS},
                **{f"{metric}_patient": patients for metric in PATIENT_METRICS},
            }
            for key, rows in rows_of.items():
                samples[key].append(_sample(rows, key.rpartition("_")[0], number))
            per_class[name] = {
                **{key: _figure([sample[-1]], draws) for key, sample in samples.items()},
                **self._counts(slices, patients),
            }
        return {
            **{key: _figure(sample, draws) for key, sample in samples.items()},
            **self._counts(self._rows, patient_rows),
            "per_class": per_class,
        }

    def _ranked(self) -> list[SliceScore]:
        positive = [row for row in self._rows if row.truth_pixels]
        return sorted(positive, key=lambda row: (row.dice, -row.truth_pixels, row.study, row.index))

    def _score_patient(self, subject: str, value: int, stacks: Sequence[_Stack]) -> PatientScore:
        name = self.class_names[value - 1]
        volumes = [(stack, *stack.volumes(value)) for stack in stacks]
        shown = [(stack, predicted, true) for stack, predicted, true in volumes if true.any()]
        if not shown:
            outcome = _outcome(False, any(bool(predicted.any()) for _, predicted, _ in volumes))
            score = 0.0 if outcome == "false_positive" else None
            return PatientScore(subject, name, outcome, dice=score, hd95=None, assd=None)
        dices = [dice(predicted, true) for _, predicted, true in shown]
        # One study without distances leaves the patient without: the others' mean would pass for the patient's.
        distances = [
            _surface_scores(predicted, true, stack.spacing, _hd95, _assd)
            if self.surface and stack.complete
            else [None, None]
            for stack, predicted, true in shown
        ]
        hd95_mm, assd_mm = (None if None in column else _mean(column) for column in zip(*distances, strict=True))
        return PatientScore(
            subject=subject,
            class_name=name,
            outcome=_outcome(True, any(bool(predicted.any()) for _, predicted, _ in shown)),
            dice=_mean(dices),
            hd95=hd95_mm,
            assd=assd_mm,
        )

    def _counts(self, slices: Sequence[SliceScore], patients: Sequence[PatientScore]) -> dict[str, int | float | None]:
        outcomes = Counter(row.outcome for row in slices)
        patient_outcomes = Counter(row.outcome for row in patients)
        negative = outcomes["false_positive"] + outcomes["empty"]
        stray = sum(row.predicted_pixels for row in slices if row.outcome == "false_positive")
        labelled = any(row.predicted_label is not None for row in slices)
        denied = sum(row.outcome == "missed" and row.predicted_label is False for row in slices)
        return {
            "slices": len({(row.subject, row.study, row.index) for row in slices}),
            "positive_slices": outcomes["segmented"] + outcomes["missed"],
            "missed_slices": outcomes["missed"],
            "missed_by_label": denied if labelled else None,
            "negative_slices": negative,
            "false_positive_slices": outcomes["false_positive"],
            "false_positive_pixels_mean": stray / negative if negative else None,
            "excluded_empty": outcomes["empty"],
            "patients": len({row.subject for row in patients}),
            "positive_patients": patient_outcomes["segmented"] + patient_outcomes["missed"],
            "missed_patients": patient_outcomes["missed"],
            "false_positive_patients": patient_outcomes["false_positive"],
            "incomplete_volumes": sum(not stack.complete for stack in self._stacks.values()),
        }

    def _check_mask(self, name: str, array: npt.ArrayLike, where: str) -> npt.NDArray[np.uint8]:
        mask = np.asarray(array)
        if mask.ndim != 2 or mask.dtype != np.uint8 or mask.size == 0:
            raise DataError(f"{where}: expected {name} as uint8 [H, W], got {mask.dtype} {list(mask.shape)}")
        if int(mask.max()) > len(self.class_names):
            raise DataError(
                f"{where}: expected {name} values up to {len(self.class_names)} (classes), got {int(mask.max())}"
            )
        return mask

    def _check_label(self, label: npt.ArrayLike | None, where: str) -> Mask | None:
        if label is None:
            return None
        labels = np.asarray(label)
        if labels.shape != (len(self.class_names),) or labels.dtype != np.bool_:
            raise DataError(
                f"{where}: expected predicted_label as bool [{len(self.class_names)}], "
                f"got {labels.dtype} {list(labels.shape)}"
            )
        return labels


@dataclass(frozen=True)
class _Sample:
    """Scores of one metric and class: values [n] and the number of the patient that each belongs to, [n]."""

    values: Floats
    patients: npt.NDArray[np.intp]


def _sample(rows: Sequence[SliceScore | PatientScore], metric: str, number: Mapping[str, int]) -> _Sample:
    positive = [row for row in rows if row.outcome in ("segmented", "missed") and getattr(row, metric) is not None]
    return _Sample(
        values=np.array([getattr(row, metric) for row in positive], np.float64),
        patients=np.array([number[row.subject] for row in positive], np.intp),
    )


def _figure(samples: Sequence[_Sample], draws: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Mean, deviation and interval, averaged over the classes of `samples` that have values.

    draws: [B, P], how often each of P patients occurs in each of B resamples.
    """
    scored = [sample for sample in samples if sample.values.size]
    if not scored:
        return {"mean": None, "std": None, "ci95": [None, None], "n": 0}
    patients = draws.shape[1]
    resampled = np.zeros(len(draws))
    for sample in scored:
        sums = np.bincount(sample.patients, sample.values, minlength=patients)
        counts = draws @ np.bincount(sample.patients, minlength=patients)
        # A resample without any value of some class has no macro mean; it becomes NaN and is left out below.
        resampled += np.divide(draws @ sums, counts, out=np.full(len(draws), np.nan), where=counts > 0)
    resampled = resampled[np.isfinite(resampled)] / len(scored)
    contributing = np.unique(np.concatenate([sample.patients for sample in scored]))
    interval: list[float | None] = [None, None]
    if contributing.size > 1 and resampled.size:
        interval = [float(bound) for bound in np.percentile(resampled, [2.5, 97.5])]
    return {
        "mean": float(np.mean([sample.values.mean() for sample in scored])),
        "std": float(np.mean([sample.values.std() for sample in scored])),
        "ci95": interval,
        "n": sum(sample.values.size for sample in scored),
    }


def _patch(prediction: npt.NDArray[np.uint8], truth: npt.NDArray[np.uint8]) -> _Patch | None:
    foreground = (prediction > 0) | (truth > 0)
    if not foreground.any():
        return None
    box = _bounding_box(foreground)
    # Copies: a view would keep the caller's whole batch alive.
    return _Patch(box[0].start, box[1].start, prediction[box].copy(), truth[box].copy())


def _outcome(present: bool, marked: bool) -> Outcome:
    if present:
        return "segmented" if marked else "missed"
    return "false_positive" if marked else "empty"


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# ----------------------------------------------------------------------------------------------------------------------
# Image labels and pixel labels


def auc(score: npt.ArrayLike, truth: npt.ArrayLike) -> float | None:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, a tie counting half.

    score: [N], any finite values. truth: bool [N]. None if one of the two groups is empty.
    """
    scores, positive = np.asarray(score, np.float64), np.asarray(truth, bool)
    if scores.ndim != 1 or scores.shape != positive.shape or not np.isfinite(scores).all():
        raise DataError(
            f"score: expected finite values [N] like the truth, {list(positive.shape)}, got {list(scores.shape)}"
        )
    count = int(positive.sum())
    pairs = count * (positive.size - count)
    if not pairs:
        return None
    _, inverse, ties = np.unique(scores, return_inverse=True, return_counts=True)
    rank = np.cumsum(ties) - (ties - 1) / 2
    return float((rank[inverse][positive].sum() - count * (count + 1) / 2) / pairs)


def auc_within(
    score: npt.ArrayLike, truth: npt.ArrayLike, studies: Sequence[str], indices: npt.ArrayLike
) -> tuple[float | None, int, int]:
    """AUC among the slices between the first and the last positive one of each study, pooled over studies.

    Where the position of a slice predicts its label, a classifier may have learnt the position; here it can't help.
    score [N], truth bool [N], studies [N] names, indices [N] places in the study's stack.
    Returns (AUC, positive slices, negative slices). Structures without gaps leave no negatives, and so None (all of
    the LGG patients): `auc_position_matched` answers the question there.
    """
    positive, place = np.asarray(truth, bool), np.asarray(indices)
    inside = np.zeros(positive.size, bool)
    for members in _groups(studies):
        places = place[members][positive[members]]
        if places.size:
            inside[members] = (place[members] >= places.min()) & (place[members] <= places.max())
    kept = positive[inside]
    return auc(np.asarray(score)[inside], kept), int(kept.sum()), int((~kept).sum())


def auc_position_matched(
    score: npt.ArrayLike, truth: npt.ArrayLike, studies: Sequence[str], indices: npt.ArrayLike, bins: int = 20
) -> float | None:
    """AUC over pairs of slices at the same relative height (one of `bins` equal parts of each study's stack).

    A score that knows the position alone stays near 0.5 here, whatever its plain AUC (a location prior on the LGG test
    set: 0.80 plain, 0.59 here; finer bins go on towards 0.5 and have fewer pairs). Arguments as in `auc_within`.
    None if no bin holds both a positive and a negative slice.
    """
    scores, positive, place = np.asarray(score), np.asarray(truth, bool), np.asarray(indices)
    height = np.zeros(positive.size, np.intp)
    for members in _groups(studies):
        places = place[members]
        share = (places - places.min()) / max(int(places.max() - places.min()), 1)
        height[members] = np.minimum((share * bins).astype(np.intp), bins - 1)
    ordered, pairs = 0.0, 0
    for part in range(bins):
        kept = positive[height == part]
        value = auc(scores[height == part], kept)
        if value is not None:
            weight = int(kept.sum()) * int((~kept).sum())
            ordered, pairs = ordered + value * weight, pairs + weight
    return ordered / pairs if pairs else None


def image_label_scores(
    probability: npt.ArrayLike,
    truth: npt.ArrayLike,
    *,
    threshold: float | Sequence[float] = 0.5,
    class_names: Sequence[str] | None = None,
    studies: Sequence[str] | None = None,
    indices: npt.ArrayLike | None = None,
) -> dict[str, Any]:
    """How well image-level labels are predicted.

    probability: [N, K] in [0, 1], finite. truth: bool [N, K]. threshold: a label is given from this probability on,
    one for all classes or one each. class_names: K names, by default "1".."K". studies [N] and indices [N] (places in
    the study's stack), both or neither, add the figures that slice position can't explain.

    Returns {"auc", "accuracy", "sensitivity", "specificity"} in [0, 1], means over the classes that have the figure
    (None where none has), "n", and "per_class" with the same, "threshold", "positive" and "negative" counts. With
    studies and indices also "auc_within" and "auc_position_matched" (see the functions), and per class
    "positive_within" and "negative_within", the slices behind auc_within.
    """
    scores, labels = np.asarray(probability, np.float64), np.asarray(truth)
    if scores.ndim != 2 or scores.shape != labels.shape or 0 in scores.shape:
        raise DataError(
            f"probability: expected [N, K] like the truth, {list(labels.shape)}, not empty, got {list(scores.shape)}"
        )
    if not ((scores >= 0) & (scores <= 1)).all():
        raise DataError("probability: expected finite values in [0, 1], got others; pass sigmoid outputs, not logits")
    if (studies is None) != (indices is None):
        raise DataError("studies, indices: expected both or neither, got one; position control needs the two")
    n, num_classes = scores.shape
    names = _class_names(class_names, num_classes)
    thresholds = np.broadcast_to(np.asarray(threshold, np.float64), (num_classes,))
    positive = labels.astype(bool)
    per_class: dict[str, dict[str, Any]] = {}
    for k, name in enumerate(names):
        said, true = scores[:, k] >= thresholds[k], positive[:, k]
        count = int(true.sum())
        row: dict[str, Any] = {
            "auc": auc(scores[:, k], true),
            "accuracy": float((said == true).mean()),
            "sensitivity": float(said[true].mean()) if count else None,
            "specificity": float((~said[~true]).mean()) if count < n else None,
            "threshold": float(thresholds[k]),
            "positive": count,
            "negative": n - count,
        }
        if studies is not None and indices is not None:
            for argument, length in (("studies", len(studies)), ("indices", np.asarray(indices).size)):
                if length != n:
                    raise DataError(f"{argument}: expected one for each of the {n} slices, got {length}")
            row["auc_within"], row["positive_within"], row["negative_within"] = auc_within(
                scores[:, k], true, studies, indices
            )
            row["auc_position_matched"] = auc_position_matched(scores[:, k], true, studies, indices)
        per_class[name] = row
    figures = ["auc", "accuracy", "sensitivity", "specificity"]
    if studies is not None:
        figures += ["auc_within", "auc_position_matched"]
    means = {figure: _mean([row[figure] for row in per_class.values()]) for figure in figures}
    return {**means, "n": n, "per_class": per_class}


def pixel_label_scores(
    labels: npt.ArrayLike, truth: npt.ArrayLike, class_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """How right the pixel labels are that the decoder is trained on.

    labels: int8 [N, H, W], -1 ignore, 0 background, 1..K classes. truth: uint8 [N, H, W], 0..K.
    class_names: K names; by default "1".."K" with K the largest value found.

    Returns {"precision", "recall"} (means over classes that have the figure), "background_purity" (share of pixels
    labelled background that are background), "coverage" (share of pixels labelled at all), and "per_class" with
    precision, recall, and "labelled" and "true" pixel counts. All shares in [0, 1]; None where a denominator is 0.
    """
    given, true = np.asarray(labels), np.asarray(truth)
    if given.ndim != 3 or given.shape != true.shape or given.size == 0:
        raise DataError(f"labels: expected [N, H, W] like the truth, {list(true.shape)}, got {list(given.shape)}")
    if given.dtype != np.int8 or true.dtype != np.uint8:
        raise DataError(f"labels, truth: expected int8 and uint8, got {given.dtype} and {true.dtype}")
    largest = max(int(given.max()), int(true.max()), 0)
    names = _class_names(class_names, max(largest, 1) if class_names is None else len(class_names))
    if int(given.min()) < -1 or largest > len(names):
        raise DataError(
            f"labels, truth: expected values from -1 to {len(names)} (classes), got {int(given.min())} to {largest}"
        )
    size = len(names) + 1
    joint = (given.ravel().astype(np.intp) + 1) * size + true.ravel()
    # confusion[g, t]: pixels that were given label g - 1 and are t; row 0 is ignored pixels, row 1 background.
    confusion = np.bincount(joint, minlength=(size + 1) * size).reshape(size + 1, size)
    per_class = {
        name: {
            "precision": _share(confusion[k + 1, k], confusion[k + 1].sum()),
            "recall": _share(confusion[k + 1, k], confusion[:, k].sum()),
            "labelled": int(confusion[k + 1].sum()),
            "true": int(confusion[:, k].sum()),
        }
        for k, name in enumerate(names, start=1)
    }
    return {
        "precision": _mean([row["precision"] for row in per_class.values()]),
        "recall": _mean([row["recall"] for row in per_class.values()]),
        "background_purity": _share(confusion[1, 0], confusion[1].sum()),
        "coverage": _share(confusion[1:].sum(), confusion.sum()),
        "per_class": per_class,
    }


def _class_names(class_names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    names = tuple(str(k) for k in range(1, num_classes + 1)) if class_names is None else tuple(class_names)
    if len(names) != num_classes or len(set(names)) != num_classes:
        raise DataError(f"class_names: expected {num_classes} different names, got {list(names)}")
    return names


def _groups(names: Sequence[str]) -> list[npt.NDArray[np.intp]]:
    """Positions of each distinct name."""
    _, inverse, counts = np.unique(np.asarray(names), return_inverse=True, return_counts=True)
    return np.split(np.argsort(inverse, kind="stable"), np.cumsum(counts)[:-1])


def _share(part: np.int64, whole: np.int64) -> float | None:
    return float(part / whole) if whole else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# ----------------------------------------------------------------------------------------------------------------------
# metrics.json


def metrics_document(
    methods: Mapping[str, Mapping[str, Any]], upper_bounds: Mapping[str, Any], data: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of metrics.json, made of plain JSON values (arrays become lists, NaN and infinities None).

    methods: `SegmentationScores.summary` by method, "cldf" among them. upper_bounds: the same for what was trained
    with true masks, and scores of the pixel labels. data: what was scored (data set, split, patients, slices, ...).
    """
    if "cldf" not in methods:
        raise DataError(f"methods: expected 'cldf' among them, got {sorted(methods)}")
    document: dict[str, Any] = _plain({"methods": methods, "upper_bounds": upper_bounds, "data": data}, "document")
    return document


def write_metrics(path: str | Path, document: Mapping[str, Any]) -> None:
    """Write a document of `metrics_document` or `seeds_summary` as strict JSON; never leaves half a file."""
    text = json.dumps(_plain(document, "document"), indent=2, allow_nan=False, ensure_ascii=False)
    atomic_write_text(path, text + "\n")


def seeds_summary(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One document out of those of several seeds, scored on the same slices.

    A metric's mean, std and ci95 become means over the seeds (the interval stays that over patients, of one typical
    run), and it gains "seed_means" and their sample standard deviation "seed_std". Other numbers become means over
    the seeds, and stay as they are where all agree. "seeds" is how many there are. In "data", what differs is listed.
    Raises DataError if the documents differ in methods, classes, or the slices and patients scored.
    """
    if not documents:
        raise DataError("documents: expected one for each seed, got none")
    for key in ("slices", "patients", "positive_slices"):
        counts = {document["methods"]["cldf"].get(key) for document in documents}
        if len(counts) > 1:
            raise DataError(
                f"documents: expected one test set, got {key} of {sorted(counts, key=str)}; rerun the seeds"
            )
    sections = {
        section: _combine([document[section] for document in documents], section)
        for section in ("methods", "upper_bounds")
    }
    described = [document["data"] for document in documents]
    keys = list(dict.fromkeys(key for data in described for key in data))
    return {
        **sections,
        "data": {key: _agreed([data.get(key) for data in described]) for key in keys},
        "seeds": len(documents),
    }


def _combine(values: Sequence[Any], where: str) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        if any(not isinstance(value, Mapping) or set(value) != set(first) for value in values):
            raise DataError(f"documents: expected the same entries under {where} for every seed; rerun the seeds alike")
        combined = {key: _combine([value[key] for value in values], f"{where}.{key}") for key in first}
        if "mean" in first and "ci95" in first:
            means = [value["mean"] for value in values]
            known = [mean for mean in means if mean is not None]
            combined["seed_means"] = means
            combined["seed_std"] = float(np.std(known, ddof=1)) if len(known) > 1 else None
        return combined
    if isinstance(first, list) and all(isinstance(value, list) and len(value) == len(first) for value in values):
        return [_combine(items, where) for items in zip(*values, strict=True)]
    if all(value == first for value in values):
        return first
    if all(value is None or isinstance(value, (int, float)) for value in values):
        return _mean(values)
    return list(values)


def _agreed(values: Sequence[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else list(values)


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist(), where)
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    if isinstance(value, float):
        return _finite(value)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Path):
        return str(value)
    raise DataError(f"{where}: expected a JSON value (text, number, list, mapping), got {type(value).__name__}")
