"""The phantom: reproducible, well formed, and hard in the ways it promises to be."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from torch import Tensor

from cldf_fast.data.base import SliceDataset, labels_from_mask
from cldf_fast.data.phantom import PHANTOM_SPLIT, phantom, phantom_split
from cldf_fast.errors import DataError

KINDS = {"lesion": 1, "organs": 4}
Population = tuple[Tensor, Tensor, Tensor, Tensor]


def stacked(dataset: SliceDataset) -> Population:
    """Images [N, C, H, W], masks [N, H, W], labels [N, K], slice positions [N]."""
    slices = list(dataset)
    masks, labels = [s.mask for s in slices if s.mask is not None], [s.label for s in slices if s.label is not None]
    positions = torch.tensor([s.index for s in slices])
    return torch.stack([s.image for s in slices]), torch.stack(masks), torch.stack(labels), positions


@pytest.fixture(scope="module")
def populations() -> dict[str, Population]:
    return {kind: stacked(phantom(kind, patients=50)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_same_arguments_give_the_same_studies(kind: str) -> None:
    first, second = stacked(phantom(kind, patients=2, seed=5)), stacked(phantom(kind, patients=2, seed=5))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_patient_does_not_depend_on_how_many_there_are(kind: str) -> None:
    alone, among = phantom(kind, patients=3, slices=4), phantom(kind, patients=9, slices=4)
    assert alone.subjects == among.subjects[:3] == ("phantom-0000", "phantom-0001", "phantom-0002")
    for i in (0, 5, 11):
        assert torch.equal(alone[i].image, among[i].image)
        assert alone[i].name == among[i].name


def test_seed_kind_and_patient_each_change_the_image() -> None:
    images = [phantom(kind, patients=1, seed=seed)[0].image for kind in KINDS for seed in (0, 1)]
    images.append(phantom("lesion", patients=2)[8].image)
    for i, image in enumerate(images):
        assert not any(torch.allclose(image, other, atol=0.05) for other in images[:i])


def test_anatomy_does_not_depend_on_size_or_number_of_slices() -> None:
    for kind in KINDS:
        _, fine, _, _ = stacked(phantom(kind, patients=3, size=128))
        _, coarse, _, _ = stacked(phantom(kind, patients=3, size=64))
        pooled = torch.nn.functional.avg_pool2d((fine > 0).float()[:, None], 2)[:, 0] > 0.5
        overlap = 2 * (pooled & (coarse > 0)).sum() / (pooled.sum() + (coarse > 0).sum())
        assert overlap > 0.93
    # Of 8 and of 24 slices, slice i and slice 3 i + 1 lie at the same height.
    _, few, _, _ = stacked(phantom("organs", patients=2, slices=8))
    _, many, _, _ = stacked(phantom("organs", patients=2, slices=24))
    assert (few != many[1::3]).float().mean() < 0.002


def test_split_has_the_stated_sizes_and_no_patient_twice() -> None:
    parts = phantom_split("lesion", 48, seed=1)
    assert {part: len(dataset.subjects) for part, dataset in parts.items()} == dict(PHANTOM_SPLIT)
    assert all(len(dataset) == 8 * PHANTOM_SPLIT[part] for part, dataset in parts.items())
    subjects = [subject for dataset in parts.values() for subject in dataset.subjects]
    assert len(set(subjects)) == len(subjects)
    whole = phantom("lesion", patients=sum(PHANTOM_SPLIT.values()), size=48, seed=1)
    assert torch.equal(parts["test"][3].image, whole[(200 + 15) * 8 + 3].image)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "slices"), [(32, 1), (48, 3), (63, 8), (96, 5), (128, 2)])
def test_any_size_keeps_the_contract(kind: str, size: int, slices: int) -> None:
    dataset = phantom(kind, patients=2, slices=slices, size=size)
    assert len(dataset) == 2 * slices
    for s in dataset:
        assert s.image.shape == (2, size, size) and s.image.dtype == torch.float32
        assert s.image.is_contiguous() and torch.isfinite(s.image).all()
        assert s.mask is not None and s.mask.shape == (size, size) and s.mask.dtype == torch.uint8
        assert s.label is not None and s.label.shape == (KINDS[kind],)
        field_of_view = {"lesion": 192.0, "organs": 384.0}[kind]
        assert s.geometry.physical and s.geometry.axcodes == "SPL"
        assert s.geometry.spacing == pytest.approx((40.0 / slices, field_of_view / size, field_of_view / size))
        centre = s.geometry.affine @ [(slices - 1) / 2, (size - 1) / 2, (size - 1) / 2, 1.0]
        assert centre == pytest.approx([0.0, 0.0, 0.0, 1.0])


@pytest.mark.parametrize("kind", KINDS)
def test_labels_say_what_the_masks_show(kind: str, populations: dict[str, Population]) -> None:
    _, masks, labels, _ = populations[kind]
    assert torch.equal(labels, labels_from_mask(masks, KINDS[kind]))
    assert int(masks.max()) == KINDS[kind]
    # A labelled structure is large enough to be seen: hardly ever under 40 pixels at size 64.
    for k in range(KINDS[kind]):
        areas = (masks == k + 1).sum((1, 2))[labels[:, k]]
        assert areas.min() >= 20 and (areas < 40).float().mean() < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_intensities_fill_the_range_and_scanners_differ(kind: str, populations: dict[str, Population]) -> None:
    images = populations[kind][0]
    assert -1.0 <= images.min() < -0.9 and 0.6 < images.max() <= 1.0
    assert (images >= 1.0).float().mean() < 0.02
    raw = [ref.read().image for ref in phantom(kind, patients=8).refs]
    gains = torch.stack([image.quantile(0.95) for image in raw])
    assert gains.max() > 1.5 * gains.min()


@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_balanced_and_combinations_vary(kind: str, populations: dict[str, Population]) -> None:
    labels = populations[kind][2]
    share = labels.float().mean(dim=0)
    assert (share > 0.35).all() and (share < 0.65).all()
    # Healthy patients exist, and no organ tells of another.
    assert (~labels.view(50, 8, -1).any(dim=1)).any(dim=0).all()
    if kind == "organs":
        assert len({tuple(row.tolist()) for row in labels}) == 16
        correlation = np.corrcoef(labels.T.numpy().astype(float))
        assert np.abs(correlation - np.eye(4)).max() < 0.4


def area_under_curve(scores: Tensor, positive: Tensor) -> float:
    ranks, count = rankdata(scores.numpy()), int(positive.sum())
    above = ranks[positive.numpy()].sum() - count * (count + 1) / 2
    return float(above / (count * (len(positive) - count)))


@pytest.mark.parametrize("kind", KINDS)
def test_position_and_brightness_of_a_slice_do_not_give_the_label_away(
    kind: str, populations: dict[str, Population]
) -> None:
    images, _, labels, positions = populations[kind]
    for k in range(KINDS[kind]):
        rate = torch.stack([labels[positions == p, k].float().mean() for p in range(8)])
        assert area_under_curve(rate[positions], labels[:, k]) < 0.7
        for brightness in images.mean(dim=(2, 3)).T:
            auc = area_under_curve(brightness, labels[:, k])
            assert 0.25 < auc < 0.75


def best_threshold_dice(score: Tensor, truth: Tensor) -> float:
    """Mean Dice of `score > threshold` on the second half of the slices, threshold best on the first half."""
    thresholds = torch.linspace(float(score.min()), float(score.max()), 41)

    def dice(part: slice, threshold: Tensor) -> float:
        found = score[part] > threshold
        both, total = (found & truth[part]).sum((1, 2)), found.sum((1, 2)) + truth[part].sum((1, 2))
        return float((2 * both / total).mean())

    half = len(score) // 2
    chosen = max(thresholds, key=lambda threshold: dice(slice(half), threshold))
    return dice(slice(half, None), chosen)


@pytest.mark.parametrize(
    ("score", "bound"),
    [
        (lambda flair, t1: flair, 0.5),
        (lambda flair, t1: -t1, 0.3),
        (lambda flair, t1: flair - t1, 0.55),
        (lambda flair, t1: 2 * flair - t1, 0.55),
    ],
    ids=["flair", "dark t1", "difference", "weighted difference"],
)
def test_no_threshold_finds_lesions(
    score: Callable[[Tensor, Tensor], Tensor],
    bound: float,
    populations: dict[str, Population],
) -> None:
    images, masks, labels, _ = populations["lesion"]
    positive = labels[:, 0]
    flair, t1 = images[positive].unbind(1)
    assert best_threshold_dice(score(flair, t1), masks[positive] > 0) < bound


@pytest.mark.parametrize("organ", range(4))
def test_no_threshold_finds_organs(organ: int, populations: dict[str, Population]) -> None:
    images, masks, labels, _ = populations["organs"]
    present = labels[:, organ]
    truth = masks[present] == organ + 1
    for channel in images[present].unbind(1):
        assert max(best_threshold_dice(channel, truth), best_threshold_dice(-channel, truth)) < 0.55


def test_lesions_are_bright_on_flair_and_dark_on_t1(populations: dict[str, Population]) -> None:
    images, masks, _, _ = populations["lesion"]
    lesion, healthy = masks > 0, (masks == 0) & (images[:, 1] > -0.5)
    flair, t1 = images.unbind(1)
    assert flair[lesion].median() > flair[healthy].median() + 0.1
    assert t1[lesion].median() < t1[healthy].median() - 0.1


def test_kidneys_lie_on_their_own_side(populations: dict[str, Population]) -> None:
    masks = populations["organs"][1]
    columns = torch.arange(64).expand_as(masks)
    # Columns grow towards the patient's left: liver and right kidney are on the left of the image.
    for k in (1, 2):
        assert columns[masks == k].float().mean() < 31.5
    for k in (3, 4):
        assert columns[masks == k].float().mean() > 31.5
    assert columns[masks == 2].max() < 36 and columns[masks == 3].min() > 27


def test_readers_travel_to_worker_processes() -> None:
    ref = phantom("organs", patients=2).refs[1]
    copy = pickle.loads(pickle.dumps(ref))
    assert torch.equal(copy.read().image, ref.read().image)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "knee"}, "kind: expected one of 'lesion', 'organs', got 'knee'"),
        ({"kind": ["lesion"]}, "kind: expected one of"),
        ({"patients": 0}, "patients: expected a whole number of at least 1, got 0"),
        ({"patients": True}, "patients: expected a whole number"),
        ({"slices": 0}, "slices: expected a whole number of at least 1"),
        ({"slices": 2.5}, "slices: expected a whole number"),
        ({"size": 31}, "size: expected a whole number of at least 32, got 31"),
        ({"size": 64.0}, "size: expected a whole number"),
        ({"seed": -1}, "seed: expected a whole number of at least 0"),
        ({"seed": None}, "seed: expected a whole number"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        phantom(**{"patients": 2, **arguments})  # type: ignore[arg-type]


def test_split_names_bad_arguments_too() -> None:
    with pytest.raises(DataError, match="kind"):
        phantom_split("")
    with pytest.raises(DataError, match="size"):
        phantom_split("organs", 8)
