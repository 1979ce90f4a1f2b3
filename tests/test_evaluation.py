"""Scores against brute force, against the CHAOS challenge's own tool, and the policy for empty masks."""

from __future__ import annotations

import doctest
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cldf_fast import evaluation
from cldf_fast.errors import DataError
from cldf_fast.evaluation import (
    SegmentationScores,
    assd,
    auc,
    auc_position_matched,
    auc_within,
    dice,
    hd95,
    image_diagonal,
    image_label_scores,
    iou,
    metrics_document,
    mssd,
    pixel_label_scores,
    relative_absolute_volume_difference,
    seeds_summary,
    surface_distances,
    write_metrics,
)

SPACING = (5.0, 0.8, 1.3)


def blobs(rng: np.random.Generator, shape: Sequence[int], share: float = 0.3) -> npt.NDArray[np.bool_]:
    """A ragged mask with at least one foreground pixel, often touching the edge."""
    mask = rng.random(shape) < share
    mask[tuple(int(rng.integers(size)) for size in shape)] = True
    return mask


def surface_by_hand(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Foreground pixels with a background neighbour inside the image; of a full mask, those on the image's frame."""
    inner, frame = [], []
    for pixel in np.argwhere(mask):
        neighbours = [
            pixel + step * np.eye(mask.ndim, dtype=int)[axis] for axis in range(mask.ndim) for step in (-1, 1)
        ]
        inside = [n for n in neighbours if all(0 <= n[a] < mask.shape[a] for a in range(mask.ndim))]
        if not all(mask[tuple(n)] for n in inside):
            inner.append(pixel)
        if len(inside) < len(neighbours):
            frame.append(pixel)
    return np.array(inner or frame)


@given(
    shape=st.one_of(
        st.tuples(*[st.integers(1, 7)] * 2),
        st.tuples(*[st.integers(1, 5)] * 3),
    ),
    share=st.sampled_from([0.0, 0.2, 0.6, 0.95, 1.0]),
    number=st.integers(0, 2**32 - 1),
)
def test_surface_distances_match_brute_force(shape: tuple[int, ...], share: float, number: int) -> None:
    rng = np.random.default_rng(number)
    a, b = blobs(rng, shape, share), blobs(rng, shape, 0.4)
    spacing = np.array(SPACING[: len(shape)])
    surface_a, surface_b = surface_by_hand(a) * spacing, surface_by_hand(b) * spacing
    table = np.linalg.norm(surface_a[:, None] - surface_b[None], axis=2)
    to_b, to_a = surface_distances(a, b, spacing)
    np.testing.assert_allclose(to_b, table.min(axis=1), atol=1e-9)
    np.testing.assert_allclose(to_a, table.min(axis=0), atol=1e-9)
    assert hd95(a, b, spacing) == pytest.approx(max(np.percentile(to_b, 95), np.percentile(to_a, 95)))
    assert assd(a, b, spacing) == pytest.approx(np.concatenate([to_a, to_b]).mean())
    assert mssd(a, b, spacing) == pytest.approx(max(to_a.max(), to_b.max()))


def test_surface_does_not_depend_on_how_much_air_surrounds_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (np.pad(blobs(rng, (4, 6, 5)), 1) for _ in range(2))
    near = surface_distances(a, b, SPACING)
    far = surface_distances(np.pad(a, 9), np.pad(b, 9), SPACING)
    for narrow, wide in zip(near, far, strict=True):
        np.testing.assert_allclose(narrow, wide)


def test_overlap_by_hand() -> None:
    prediction, truth = np.zeros((4, 5), np.uint8), np.zeros((4, 5), np.uint8)
    prediction[1, :4] = 1
    truth[1, 2:] = 1
    assert dice(prediction, truth) == pytest.approx(4 / 7)
    assert iou(prediction, truth) == pytest.approx(2 / 5)
    assert relative_absolute_volume_difference(prediction, truth) == pytest.approx(100 / 3)


def test_empty_policy_of_one_pair() -> None:
    empty, full = np.zeros((3, 4), bool), np.ones((3, 4), bool)
    spacing = (2.0, 0.5)
    diagonal = math.hypot(6.0, 2.0)
    assert image_diagonal((3, 4), spacing) == pytest.approx(diagonal)
    assert dice(empty, empty) is None and iou(empty, empty) is None
    assert dice(full, empty) == dice(empty, full) == iou(full, empty) == 0.0
    assert relative_absolute_volume_difference(full, empty) is None
    assert relative_absolute_volume_difference(empty, full) == 100.0
    for distance in (hd95, assd, mssd):
        assert distance(empty, empty, spacing) is None
        assert distance(full, empty, spacing) == distance(empty, full, spacing) == pytest.approx(diagonal)
        assert distance(full, full, spacing) == 0.0


def test_chaos_oracle(real_data: Path) -> None:
    """The challenge's own tool prints DICE 0.978, RAVD 0.665, ASSD 0.734, MSSD 14 for these two."""
    folder = real_data / "chaos_ct_set3"
    prediction, truth = (
        np.stack([np.asarray(Image.open(file)) > 0 for file in sorted((folder / name).iterdir())])
        for name in ("SampleSegmentation", "Ground")
    )
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in sorted((folder / "DICOM_anon").iterdir())]
    positions = np.array([header.ImagePositionPatient for header in headers], float)
    steps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    assert np.ptp(steps) < 1e-6
    spacing = (float(steps[0]), *map(float, headers[0].PixelSpacing))
    assert len(headers) == len(truth) and spacing[0] == pytest.approx(2.0)

    assert f"{dice(prediction, truth):.3f}" == "0.978"
    assert f"{relative_absolute_volume_difference(prediction, truth):.3f}" == "0.665"
    assert f"{assd(prediction, truth, spacing):.3f}" == "0.734"
    assert mssd(prediction, truth, spacing) == pytest.approx(14.0, abs=0.005)


@pytest.mark.parametrize(
    ("prediction", "truth", "spacing", "message"),
    [
        (np.ones((2, 3)), np.ones((3, 2)), (1, 1), r"shape of the truth, \[3, 2\], got \[2, 3\]"),
        (np.ones(3), np.ones(3), (1,), "2D or 3D"),
        (np.ones((2, 2)), np.ones((2, 2)), (1, 1, 1), "spacing: expected 2 positive"),
        (np.ones((2, 2)), np.ones((2, 2)), (1, 0), "spacing: expected 2 positive"),
        (np.ones((2, 2)), np.ones((2, 2)), (1, math.nan), "spacing: expected 2 positive"),
        (np.zeros((2, 2)), np.ones((2, 2)), (1, 1), "prediction: expected at least one foreground"),
        (np.ones((2, 2)), np.zeros((2, 2)), (1, 1), "truth: expected at least one foreground"),
    ],
)
def test_surface_distances_refuse(prediction: Any, truth: Any, spacing: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        surface_distances(prediction, truth, spacing)


# One patient's volumes, class labels 0..K, and what to expect of them.


def add_volume(
    scores: SegmentationScores,
    subject: str,
    prediction: npt.NDArray[np.uint8],
    truth: npt.NDArray[np.uint8],
    *,
    study: str | None = None,
    order: Sequence[int] | None = None,
    predicted_label: Any = None,
) -> None:
    for index in range(len(truth)) if order is None else order:
        scores.add(
            subject=subject,
            study=study or subject,
            index=index,
            prediction=prediction[index],
            truth=truth[index],
            spacing=SPACING,
            predicted_label=predicted_label,
        )


def random_labels(rng: np.random.Generator, shape: tuple[int, int, int], classes: int = 1) -> npt.NDArray[np.uint8]:
    labels = rng.integers(0, classes + 1, shape).astype(np.uint8)
    labels[rng.random(shape) < 0.5] = 0
    labels[rng.random(shape[0]) < 0.4] = 0
    return labels


def random_scores(rng: np.random.Generator, classes: Sequence[str], patients: int = 4) -> SegmentationScores:
    scores = SegmentationScores(classes)
    for number in range(patients):
        shape = (int(rng.integers(4, 7)), 6, 9)
        truth, prediction = (random_labels(rng, shape, len(classes)) for _ in range(2))
        truth[1], prediction[1] = 1, 1
        add_volume(scores, f"patient {number}", prediction, truth)
    return scores


def test_positives_and_negatives_are_kept_apart() -> None:
    lesion = np.zeros((4, 6), np.uint8)
    lesion[1:3, 1:5] = 1
    nothing = np.zeros_like(lesion)
    scores = SegmentationScores(["lesion"])
    truth = np.stack([lesion, lesion, nothing, nothing, nothing])
    prediction = np.stack([lesion, nothing, lesion, nothing, nothing])
    add_volume(scores, "a", prediction, truth, predicted_label=np.array([False]))
    summary = scores.summary()
    diagonal = math.hypot(4 * SPACING[1], 6 * SPACING[2])
    assert [row.outcome for row in scores.rows] == ["segmented", "missed", "false_positive", "empty", "empty"]
    assert [row.dice for row in scores.rows] == [1.0, 0.0, 0.0, None, None]
    assert summary["dice_positive"] == {"mean": 0.5, "std": 0.5, "ci95": [None, None], "n": 2}
    assert summary["iou_positive"]["mean"] == 0.5
    assert summary["hd95_positive"]["mean"] == summary["assd_positive"]["mean"] == pytest.approx(diagonal / 2)
    assert (summary["slices"], summary["positive_slices"], summary["negative_slices"]) == (5, 2, 3)
    assert (summary["missed_slices"], summary["missed_by_label"]) == (1, 1)
    assert (summary["false_positive_slices"], summary["excluded_empty"]) == (1, 2)
    assert summary["false_positive_pixels_mean"] == pytest.approx(8 / 3)
    # The false positive has no place among positive slices, but costs the patient's volume its Dice.
    assert summary["dice_patient"]["mean"] == pytest.approx(2 * 8 / (16 + 16))
    assert "dice_all" not in summary


def test_a_method_that_marks_nothing_scores_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = SegmentationScores(["lesion"])
    truth = random_labels(rng, (6, 5, 8))
    truth[0], truth[1] = 1, 0
    add_volume(scores, "a", np.zeros_like(truth), truth)
    summary = scores.summary()
    assert summary["dice_positive"]["mean"] == summary["dice_patient"]["mean"] == 0.0
    assert summary["missed_slices"] == summary["positive_slices"] == summary["hd95_positive"]["n"] > 0
    assert summary["missed_by_label"] is None
    assert summary["hd95_patient"]["mean"] == pytest.approx(image_diagonal(truth.shape, SPACING))


def test_patients_without_the_structure_are_counted_and_not_averaged() -> None:
    marked, nothing = np.ones((2, 3, 3), np.uint8), np.zeros((2, 3, 3), np.uint8)
    scores = SegmentationScores(["lesion"])
    add_volume(scores, "healthy, marked", marked, nothing)
    add_volume(scores, "healthy, clean", nothing, nothing)
    add_volume(scores, "ill, missed", nothing, marked)
    summary = scores.summary()
    outcomes = {row.subject: (row.outcome, row.dice) for row in scores.patients()}
    assert outcomes == {
        "healthy, marked": ("false_positive", 0.0),
        "healthy, clean": ("empty", None),
        "ill, missed": ("missed", 0.0),
    }
    assert (summary["patients"], summary["positive_patients"], summary["dice_patient"]["n"]) == (3, 1, 1)
    assert (summary["missed_patients"], summary["false_positive_patients"]) == (1, 1)


def test_per_patient_scores_are_those_of_the_stacked_volume(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, prediction = (random_labels(rng, (7, 11, 8), classes=2) for _ in range(2))
    truth[2], prediction[3] = 1, 2
    truth[4, 2:5], prediction[1] = 2, 1
    scores = SegmentationScores(["liver", "spleen"])
    add_volume(scores, "a", prediction, truth, order=rng.permutation(7).tolist())
    for value, row in enumerate(scores.patients(), start=1):
        assert row.dice == pytest.approx(dice(prediction == value, truth == value))
        assert row.hd95 == pytest.approx(hd95(prediction == value, truth == value, SPACING))
        assert row.assd == pytest.approx(assd(prediction == value, truth == value, SPACING))
    for row in scores.rows:
        value = 1 + ("liver", "spleen").index(row.class_name)
        masks = prediction[row.index] == value, truth[row.index] == value
        assert row.dice == dice(*masks) and row.iou == iou(*masks)
        assert (row.predicted_pixels, row.truth_pixels) == (masks[0].sum(), masks[1].sum())
        if row.truth_pixels:
            assert row.hd95 == pytest.approx(hd95(*masks, SPACING[1:]))
            assert row.assd == pytest.approx(assd(*masks, SPACING[1:]))


def test_several_studies_of_a_patient_count_as_one_patient() -> None:
    whole, half = np.ones((2, 4, 4), np.uint8), np.ones((2, 4, 4), np.uint8)
    half[:, 2:] = 0
    scores = SegmentationScores(["lesion"])
    add_volume(scores, "a", whole, whole, study="first")
    add_volume(scores, "a", half, whole, study="second")
    summary = scores.summary()
    assert summary["dice_patient"] == {"mean": pytest.approx((1 + 2 / 3) / 2), "std": 0.0, "ci95": [None, None], "n": 1}


def test_a_volume_with_missing_slices_has_a_dice_and_no_distances(seed: int) -> None:
    truth = random_labels(np.random.default_rng(seed), (5, 6, 6))
    truth[[0, 4]] = 1
    scores = SegmentationScores(["lesion"])
    add_volume(scores, "a", truth, truth, order=[0, 1, 3, 4])
    summary = scores.summary()
    assert summary["dice_patient"]["mean"] == 1.0
    assert summary["hd95_patient"] == {"mean": None, "std": None, "ci95": [None, None], "n": 0}
    assert summary["incomplete_volumes"] == 1


def test_summary_does_not_depend_on_the_order_of_slices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    volumes = {f"p{i}": [random_labels(rng, (4, 7, 6), 2) for _ in range(2)] for i in range(3)}
    forward, backward = SegmentationScores(["a", "b"]), SegmentationScores(["a", "b"])
    for name, (prediction, truth) in volumes.items():
        add_volume(forward, name, prediction, truth)
    for name, (prediction, truth) in reversed(volumes.items()):
        add_volume(backward, name, prediction, truth, order=[2, 0, 3, 1])
    one, other = forward.summary(bootstrap=50), backward.summary(bootstrap=50)
    for key in ("dice_positive", "hd95_positive", "dice_patient"):
        assert one[key]["n"] == other[key]["n"]
        assert one[key]["mean"] == pytest.approx(other[key]["mean"])
        assert one[key]["ci95"] == pytest.approx(other[key]["ci95"])


def test_top_level_is_the_mean_over_classes_and_counts_are_sums(seed: int) -> None:
    scores = random_scores(np.random.default_rng(seed), ["liver", "kidney", "absent"])
    summary = scores.summary(bootstrap=20)
    classes = summary["per_class"]
    assert list(classes) == ["liver", "kidney", "absent"]
    for key in ("dice_positive", "hd95_patient"):
        for figure in ("mean", "std"):
            known = [entry[key][figure] for entry in classes.values() if entry[key][figure] is not None]
            assert summary[key][figure] == pytest.approx(np.mean(known))
        assert summary[key]["n"] == sum(entry[key]["n"] for entry in classes.values())
    for key in ("positive_slices", "negative_slices", "excluded_empty", "false_positive_slices"):
        assert summary[key] == sum(entry[key] for entry in classes.values())
    for key in ("slices", "patients"):
        assert {summary[key]} == {entry[key] for entry in classes.values()}


def test_a_class_that_never_occurs_takes_no_part_in_the_mean() -> None:
    square = np.ones((1, 3, 3), np.uint8)
    scores = SegmentationScores(["present", "absent"])
    add_volume(scores, "a", square, square)
    add_volume(scores, "b", square, square)
    summary = scores.summary()
    assert summary["dice_positive"] == {"mean": 1.0, "std": 0.0, "ci95": [1.0, 1.0], "n": 2}
    assert summary["per_class"]["absent"]["dice_positive"]["mean"] is None
    assert summary["per_class"]["absent"]["excluded_empty"] == 2


def dice_of_patients(values: Sequence[float], slices: int) -> SegmentationScores:
    """Patients whose every slice has the given Dice (a multiple of 1/10: 20 - 10 d pixels of truth, 10 d found)."""
    scores = SegmentationScores(["lesion"], surface=False)
    for number, value in enumerate(values):
        found = round(10 * value)
        truth, prediction = np.zeros((slices, 1, 20), np.uint8), np.zeros((slices, 1, 20), np.uint8)
        truth[:, 0, : 20 - found] = 1
        prediction[:, 0, :found] = 1
        add_volume(scores, f"{number}", prediction, truth)
    return scores


def test_bootstrap_resamples_patients_not_slices() -> None:
    values = [0.1, 0.3, 0.4, 0.6, 0.9]
    few, many = (dice_of_patients(values, slices).summary()["dice_positive"] for slices in (1, 12))
    assert few["mean"] == pytest.approx(np.mean(values)) and few["std"] == pytest.approx(np.std(values))
    assert many["n"] == 12 * few["n"]
    # More slices of the same patients tell nothing new about other patients.
    assert many["ci95"] == pytest.approx(few["ci95"])
    resampled = np.random.default_rng(1).choice(values, (20_000, 5)).mean(axis=1)
    assert few["ci95"] == pytest.approx(np.percentile(resampled, [2.5, 97.5]), abs=0.04)


def test_bootstrap_repeats_with_its_seed() -> None:
    scores = dice_of_patients([0.1, 0.2, 0.5, 0.7, 0.8, 0.9], 2)
    assert scores.summary(seed=3) == scores.summary(seed=3)
    assert (
        scores.summary(bootstrap=40, seed=3)["dice_positive"]["ci95"]
        != scores.summary(bootstrap=40, seed=4)["dice_positive"]["ci95"]
    )


def test_surface_metrics_can_be_switched_off(seed: int) -> None:
    truth = random_labels(np.random.default_rng(seed), (3, 5, 5))
    truth[0] = 1
    scores = SegmentationScores(["lesion"], surface=False)
    add_volume(scores, "a", truth, truth)
    summary = scores.summary()
    assert all(row.hd95 is None and row.assd is None for row in scores.rows)
    assert summary["hd95_positive"]["n"] == summary["assd_patient"]["n"] == 0
    assert summary["dice_positive"]["mean"] == 1.0


def test_worst_and_examples() -> None:
    scores = dice_of_patients([0.5, 0.1, 0.9, 0.3, 0.7, 0.2], 3)
    assert [row.subject for row in scores.worst(4)] == ["1", "1", "1", "5"]
    examples = scores.examples(2)
    assert list(examples) == ["good", "median", "worst"]
    assert {row.subject for row in examples["worst"]} == {"1", "5"}
    assert all(len({row.subject for row in rows}) == 2 for rows in examples.values())
    score = {name: np.mean([row.dice for row in rows if row.dice is not None]) for name, rows in examples.items()}
    assert score["good"] > score["median"] > score["worst"]
    rows = [row for group in scores.examples(6).values() for row in group]
    assert len(rows) == len(set(rows)) == 18
    assert len(scores.worst(100)) == 18


def test_examples_of_a_set_without_positives() -> None:
    scores = SegmentationScores(["lesion"])
    add_volume(scores, "a", np.ones((2, 3, 3), np.uint8), np.zeros((2, 3, 3), np.uint8))
    assert scores.worst(3) == []
    assert scores.examples(1) == {"good": [], "median": [], "worst": []}


def test_scores_refuse_bad_slices() -> None:
    scores = SegmentationScores(["a", "b"])
    good: dict[str, Any] = {
        "subject": "p",
        "study": "s",
        "index": 0,
        "prediction": np.zeros((3, 4), np.uint8),
        "truth": np.zeros((3, 4), np.uint8),
        "spacing": SPACING,
    }
    scores.add(**good)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "study 's', slice 0: added twice"),
        ({"index": 1, "truth": np.zeros((4, 3), np.uint8)}, r"truth's shape, \[4, 3\], got \[3, 4\]"),
        ({"index": 1, "prediction": np.zeros((3, 4), np.float32)}, "prediction as uint8"),
        ({"index": 1, "truth": np.zeros((1, 3, 4), np.uint8)}, "truth as uint8"),
        ({"index": 1, "truth": np.zeros((0, 4), np.uint8)}, "truth as uint8"),
        ({"index": 1, "prediction": np.full((3, 4), 3, np.uint8)}, r"prediction values up to 2 \(classes\), got 3"),
        ({"index": 1, "spacing": (1.0, 1.0)}, "spacing: expected 3 positive"),
        ({"index": 1, "spacing": (1.0, 1.0, 1.0)}, "geometry of the study's other slices"),
        ({"index": 1, "predicted_label": np.array([True])}, r"predicted_label as bool \[2\]"),
        ({"index": 1, "predicted_label": np.array([0.2, 0.9])}, r"predicted_label as bool \[2\], got float64"),
    ]
    for change, message in cases:
        with pytest.raises(DataError, match=message):
            scores.add(**{**good, **change})
    assert len(scores.rows) == 2
    scores.add(**{**good, "index": 1})


def test_scores_refuse_no_classes_and_no_rows() -> None:
    for names in ([], ["a", "a"]):
        with pytest.raises(DataError, match="class_names: expected one or more different"):
            SegmentationScores(names)
    with pytest.raises(DataError, match="call add first"):
        SegmentationScores(["a"]).summary()


# Image labels


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=20))
def test_auc_is_the_share_of_ordered_pairs(pairs: list[tuple[int, bool]]) -> None:
    positive = [score for score, label in pairs if label]
    negative = [score for score, label in pairs if not label]
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative]
    value = auc([score for score, _ in pairs], [label for _, label in pairs])
    assert value == (pytest.approx(np.mean(wins)) if wins else None)


def test_auc_refuses_what_has_no_order() -> None:
    with pytest.raises(DataError, match="score: expected finite"):
        auc([0.1, math.nan], [True, False])
    with pytest.raises(DataError, match="score: expected finite"):
        auc([0.1], [True, False])


def lgg_like(rng: np.random.Generator) -> tuple[list[str], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Patients whose tumour lies somewhere in the middle of the stack, without gaps: position predicts the label."""
    patients, indices, truth = [], [], []
    for number in range(60):
        slices = int(rng.integers(20, 60))
        start = int(slices * rng.uniform(0.25, 0.55))
        stop = start + max(2, int(slices * 0.25))
        patients += [f"patient {number}"] * slices
        indices += list(range(slices))
        truth += [start <= i < stop for i in range(slices)]
    return patients, np.array(indices), np.array(truth)


def test_position_control_exposes_a_classifier_that_learnt_position(seed: int) -> None:
    rng = np.random.default_rng(seed)
    patients, indices, truth = lgg_like(rng)
    last = {name: max(i for p, i in zip(patients, indices, strict=True) if p == name) for name in set(patients)}
    height = indices / np.array([last[name] for name in patients])
    position_only = 1 - np.abs(height - 0.53)
    honest = 0.3 * truth + rng.random(truth.size)
    plain, matched = auc(position_only, truth), auc_position_matched(position_only, truth, patients, indices)
    assert plain is not None and matched is not None
    assert plain > 0.8 and abs(matched - 0.5) < 0.1
    honest_matched = auc_position_matched(honest, truth, patients, indices)
    assert honest_matched == pytest.approx(auc(honest, truth), abs=0.06)
    assert auc_position_matched(truth, truth, patients, indices) == 1.0
    # Structures without gaps: nothing to compare with inside their range.
    assert auc_within(position_only, truth, patients, indices) == (None, int(truth.sum()), 0)


def test_auc_within_looks_between_the_first_and_last_positive_of_each_patient() -> None:
    patients = ["a"] * 5 + ["b"] * 3 + ["c"] * 2
    indices = [4, 0, 1, 2, 3, 0, 1, 2, 0, 1]
    truth = np.array([False, False, True, False, True, True, False, True, False, False])
    score = np.array([9.0, 9.0, 0.8, 0.5, 0.4, 0.9, 0.1, 0.7, 9.0, 9.0])
    inside = [2, 3, 4, 5, 6, 7]
    assert auc_within(score, truth, patients, indices) == (auc(score[inside], truth[inside]), 4, 2)


def test_image_label_scores_by_hand() -> None:
    probability = np.array([[0.9, 0.1], [0.5, 0.2], [0.4, 0.3], [0.2, 0.4]])
    truth = np.array([[True, False], [False, False], [True, False], [False, False]])
    scores = image_label_scores(probability, truth, class_names=["tumour", "oedema"])
    tumour, oedema = scores["per_class"]["tumour"], scores["per_class"]["oedema"]
    assert tumour == {
        "auc": 0.75,
        "accuracy": 0.5,
        "sensitivity": 0.5,
        "specificity": 0.5,
        "threshold": 0.5,
        "positive": 2,
        "negative": 2,
    }
    assert oedema["auc"] is None and oedema["sensitivity"] is None and oedema["specificity"] == 1.0
    assert (scores["auc"], scores["accuracy"], scores["sensitivity"], scores["n"]) == (0.75, 0.75, 0.5, 4)
    assert image_label_scores(probability, truth, threshold=[0.4, 0.5])["per_class"]["1"]["sensitivity"] == 1.0


def test_image_label_scores_with_position_control(seed: int) -> None:
    rng = np.random.default_rng(seed)
    patients, indices, truth = lgg_like(rng)
    probability = rng.random((truth.size, 1))
    scores = image_label_scores(probability, truth[:, None], studies=patients, indices=indices)
    row = scores["per_class"]["1"]
    assert row["negative_within"] == 0 and row["positive_within"] == truth.sum()
    assert scores["auc_within"] is None
    assert scores["auc_position_matched"] == auc_position_matched(probability[:, 0], truth, patients, indices)
    json.dumps(scores, allow_nan=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probability": np.zeros((3, 1))}, r"expected \[N, K\] like the truth, \[2, 1\]"),
        ({"probability": np.zeros((0, 1)), "truth": np.zeros((0, 1), bool)}, "not empty"),
        ({"probability": np.array([[0.2], [math.nan]])}, r"finite values in \[0, 1\]"),
        ({"probability": np.array([[0.2], [3.0]])}, "not logits"),
        ({"studies": ["a", "a"]}, "expected both or neither"),
        ({"studies": ["a"], "indices": [0, 1]}, "studies: expected one for each of the 2 slices, got 1"),
        ({"studies": ["a", "a"], "indices": [0]}, "indices: expected one for each of the 2 slices, got 1"),
        ({"class_names": ["a", "b"]}, "class_names: expected 1 different names"),
    ],
)
def test_image_label_scores_refuse(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"probability": np.array([[0.2], [0.8]]), "truth": np.array([[False], [True]])}
    with pytest.raises(DataError, match=message):
        image_label_scores(**{**good, **arguments})


# Pixel labels


def test_pixel_label_scores_match_counting(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, 3, (3, 7, 5)).astype(np.int8)
    truth = rng.integers(0, 3, (3, 7, 5)).astype(np.uint8)
    scores = pixel_label_scores(labels, truth, ["a", "b"])
    for value, name in enumerate(["a", "b"], start=1):
        row = scores["per_class"][name]
        right = ((labels == value) & (truth == value)).sum()
        assert row["precision"] == pytest.approx(right / (labels == value).sum())
        assert row["recall"] == pytest.approx(right / (truth == value).sum())
        assert (row["labelled"], row["true"]) == ((labels == value).sum(), (truth == value).sum())
    assert scores["precision"] == pytest.approx(np.mean([row["precision"] for row in scores["per_class"].values()]))
    assert scores["background_purity"] == pytest.approx((truth[labels == 0] == 0).mean())
    assert scores["coverage"] == pytest.approx((labels >= 0).mean())
    assert pixel_label_scores(labels, truth)["per_class"]["2"] == scores["per_class"]["b"]
    json.dumps(scores, allow_nan=False)


def test_pixel_label_scores_of_nothing_labelled() -> None:
    labels = np.full((1, 2, 3), -1, np.int8)
    scores = pixel_label_scores(labels, np.zeros((1, 2, 3), np.uint8))
    assert scores["precision"] is scores["recall"] is scores["background_purity"] is None
    assert scores["coverage"] == 0.0


@pytest.mark.parametrize(
    ("labels", "truth", "message"),
    [
        (np.zeros((2, 2), np.int8), np.zeros((2, 2), np.uint8), r"labels: expected \[N, H, W\]"),
        (np.zeros((1, 2, 2), np.int8), np.zeros((1, 2, 3), np.uint8), r"like the truth, \[1, 2, 3\]"),
        (np.zeros((1, 2, 2), np.int64), np.zeros((1, 2, 2), np.uint8), "expected int8 and uint8"),
        (np.full((1, 2, 2), -2, np.int8), np.zeros((1, 2, 2), np.uint8), "expected values from -1 to 1"),
        (np.zeros((1, 2, 2), np.int8), np.full((1, 2, 2), 2, np.uint8), "expected values from -1 to 1"),
    ],
)
def test_pixel_label_scores_refuse(labels: Any, truth: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        pixel_label_scores(labels, truth, ["a"])


# metrics.json


def document(seed: int, mean_dice: Sequence[float] = (0.2, 0.8), **data: Any) -> dict[str, Any]:
    summary = dice_of_patients(mean_dice, 2).summary(bootstrap=30)
    return metrics_document({"cldf": summary, "layercam": summary}, {"true_masks": summary}, {"seed": seed, **data})


def test_document_is_plain_and_strict_json(tmp_path: Path) -> None:
    summary = {"dice_positive": {"mean": np.float32(0.5), "std": math.nan, "ci95": np.array([0.25, np.inf]), "n": 3}}
    made = metrics_document({"cldf": summary}, {}, {"spacing": (1.0, 2.0), "physical": np.bool_(True), "note": None})
    expected = {
        "methods": {"cldf": {"dice_positive": {"mean": 0.5, "std": None, "ci95": [0.25, None], "n": 3}}},
        "upper_bounds": {},
        "data": {"spacing": [1.0, 2.0], "physical": True, "note": None},
    }
    assert made == expected
    file = tmp_path / "runs" / "metrics.json"
    write_metrics(file, made)
    assert json.loads(file.read_text(encoding="utf-8")) == expected
    write_metrics(file, {"methods": {"cldf": {"x": math.inf}}, "upper_bounds": {}, "data": {}})
    text = file.read_text(encoding="utf-8")
    assert "Infinity" not in text and json.loads(text)["methods"]["cldf"] == {"x": None}


def test_document_refuses_what_json_has_not(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"document\.data\.thing: expected a JSON value .* got set"):
        metrics_document({"cldf": {}}, {}, {"thing": {1}})
    with pytest.raises(DataError, match="methods: expected 'cldf' among them, got \\['layercam'\\]"):
        metrics_document({"layercam": {}}, {}, {})
    with pytest.raises(DataError, match="got object"):
        write_metrics(tmp_path / "metrics.json", {"data": object()})
    assert not list(tmp_path.iterdir())


def test_seeds_summary_gives_mean_and_spread_over_seeds(tmp_path: Path) -> None:
    documents = [
        document(0, (0.2, 0.8), dataset="phantom", thresholds={"cldf": 0.5}),
        document(1, (0.3, 0.9), dataset="phantom", thresholds={"cldf": 0.4}),
        document(2, (0.1, 0.4), dataset="phantom", thresholds={"cldf": 0.5}),
    ]
    combined = seeds_summary(documents)
    figure = combined["methods"]["cldf"]["dice_positive"]
    assert figure["seed_means"] == pytest.approx([0.5, 0.6, 0.25])
    assert figure["mean"] == pytest.approx(0.45)
    assert figure["seed_std"] == pytest.approx(np.std([0.5, 0.6, 0.25], ddof=1))
    parts = [one["methods"]["cldf"]["dice_positive"] for one in documents]
    assert figure["std"] == pytest.approx(np.mean([part["std"] for part in parts]))
    assert figure["ci95"] == pytest.approx(np.mean([part["ci95"] for part in parts], axis=0))
    assert combined["methods"]["layercam"]["positive_slices"] == 4
    assert combined["methods"]["cldf"]["hd95_positive"]["seed_std"] is None
    assert combined["data"]["dataset"] == "phantom" and combined["data"]["seed"] == [0, 1, 2]
    assert combined["data"]["thresholds"] == [{"cldf": 0.5}, {"cldf": 0.4}, {"cldf": 0.5}]
    assert combined["seeds"] == 3
    write_metrics(tmp_path / "metrics.json", combined)
    one = seeds_summary(documents[:1])["methods"]["cldf"]["dice_positive"]
    assert one["mean"] == pytest.approx(0.5) and one["seed_std"] is None


def test_seeds_summary_refuses_runs_that_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="expected one for each seed, got none"):
        seeds_summary([])
    with pytest.raises(DataError, match=r"expected one test set, got slices of \[4, 6\]"):
        seeds_summary([document(0), document(1, (0.1, 0.2, 0.3))])
    other = document(1)
    del other["methods"]["layercam"]
    with pytest.raises(DataError, match="same entries under methods for every seed"):
        seeds_summary([document(0), other])


def test_docstring_examples_run() -> None:
    result = doctest.testmod(evaluation)
    assert result.attempted > 0 and result.failed == 0
