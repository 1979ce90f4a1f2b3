"""The data contract: slices of studies, image-level labels, geometry, refusal of studies that break it."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cldf_fast.data.base import SliceDataset, Study, StudyRef, check_study, labels_from_mask, normalise_study
from cldf_fast.data.geometry import Geometry
from cldf_fast.errors import DataError


def make_study(name: str = "a", subject: str = "p", slices: int = 3, **changes: object) -> Study:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    mask = torch.zeros(slices, 5, 7, dtype=torch.uint8)
    mask[slices // 2, 1:3, 2:4] = 1
    fields: dict[str, object] = {
        "name": name,
        "subject": subject,
        "image": torch.rand(slices, 2, 5, 7, generator=generator) * 100,
        "geometry": Geometry(np.diag([3.0, -1.0, -2.0, 1.0]), physical=True),
        "slice_names": tuple(f"{name}{i}" for i in range(slices)),
        "source": Path(f"{name}.nii.gz"),
        "mask": mask,
    }
    return Study(**{**fields, **changes})  # type: ignore[arg-type]


def make_ref(name: str, subject: str, slices: int = 3, **changes: object) -> StudyRef:
    return StudyRef(name, subject, slices, partial(make_study, name, subject, slices, **changes))


def make_dataset(**options: object) -> SliceDataset:
    refs = [make_ref("a", "p1", 3), make_ref("b", "p2", 1), make_ref("c", "p1", 4)]
    return SliceDataset(refs, ("lesion",), ("x", "y"), **options)  # type: ignore[arg-type]


def test_slices_come_in_study_order_with_everything_that_is_known_of_them() -> None:
    dataset = make_dataset()
    assert len(dataset) == 8
    assert [item.name for item in dataset] == ["a0", "a1", "a2", "b0", "c0", "c1", "c2", "c3"]
    item = dataset[5]
    study = make_study("c", "p1", 4)
    assert (item.subject, item.study, item.index) == ("p1", "c", 1)
    assert item.geometry.spacing == (3.0, 1.0, 2.0)
    assert torch.equal(item.image, normalise_study(study.image)[1])
    assert item.mask is not None
    assert torch.equal(item.mask, study.mask[1])  # type: ignore[index]
    assert item.label is not None
    assert item.label.tolist() == [False]
    assert dataset[6].label.tolist() == [True]  # type: ignore[union-attr]


def test_images_leave_in_the_stated_range() -> None:
    dataset = make_dataset()
    low, high = dataset.intensity_range
    images = torch.cat([item.image.flatten() for item in dataset])
    assert low <= images.min() < images.max() <= high


@pytest.mark.parametrize("index", [-1, 8, 100])
def test_an_index_outside_is_an_index_error(index: int) -> None:
    with pytest.raises(IndexError, match=str(index)):
        make_dataset()[index]


def test_random_access_equals_access_in_order() -> None:
    dataset = make_dataset()
    in_order = [item.image for item in dataset]
    for index in (7, 0, 3, 6, 1, 4, 2, 5, 0):
        assert torch.equal(dataset[index].image, in_order[index])


def test_a_study_is_read_once_while_its_slices_are_drawn_in_order() -> None:
    opened = []

    def read(name: str) -> Study:
        opened.append(name)
        return make_study(name)

    refs = [StudyRef(name, "p", 3, partial(read, name)) for name in "abc"]
    assert len(list(SliceDataset(refs, ("lesion",), ("x", "y")))) == 9
    assert opened == ["a", "b", "c"]


def test_select_keeps_whole_patients_and_all_settings() -> None:
    dataset = make_dataset(min_area=0.25, window=(0.0, 9.0), modality="CT")
    assert dataset.subjects == ("p1", "p2")
    part = dataset.select(["p1"])
    assert part.subjects == ("p1",)
    assert {item.study for item in part} == {"a", "c"}
    assert (part.min_area, part.window, part.modality) == (0.25, (0.0, 9.0), "CT")
    assert (part.class_names, part.channel_names) == (dataset.class_names, dataset.channel_names)


def test_select_refuses_unknown_patients_and_none() -> None:
    with pytest.raises(DataError, match="'nobody'"):
        make_dataset().select(["p1", "nobody"])
    with pytest.raises(DataError, match="at least one study"):
        make_dataset().select([])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset))])
def test_a_dataset_travels_to_worker_processes(clone: object) -> None:
    dataset = make_dataset()
    first = dataset[0]
    again = clone(dataset)  # type: ignore[operator]
    assert torch.equal(again[0].image, first.image)
    assert again[7].name == dataset[7].name


def test_own_image_level_labels_win_over_the_mask() -> None:
    labels = torch.tensor([[True], [False], [False]])
    dataset = SliceDataset([make_ref("a", "p", labels=labels)], ("lesion",), ("x", "y"))
    assert [item.label.item() for item in dataset] == [True, False, False]  # type: ignore[union-attr]


def test_without_mask_and_labels_both_are_none() -> None:
    item = SliceDataset([make_ref("a", "p", mask=None)], ("lesion",), ("x", "y"))[0]
    assert item.mask is None
    assert item.label is None


def test_a_window_maps_its_ends_to_the_range() -> None:
    image = torch.tensor([-500.0, -100.0, 50.0, 200.0, 900.0]).expand(2, 1, 3, 5).contiguous()
    study = make_study(image=image, mask=None, slice_names=("a", "b"))
    dataset = SliceDataset([StudyRef("a", "p", 2, lambda: study)], ("liver",), ("ct",), window=(-100.0, 200.0))
    assert dataset[1].image[0, 0].tolist() == pytest.approx([-1.0, -1.0, 0.0, 1.0, 1.0])


@pytest.mark.parametrize("min_area", [-0.1, 1.0])
def test_min_area_is_a_fraction(min_area: float) -> None:
    with pytest.raises(DataError, match="min_area"):
        make_dataset(min_area=min_area)


def test_min_area_is_exceeded_not_met() -> None:
    mask = torch.zeros(4, 10, 10, dtype=torch.uint8)
    mask[1, 0, :1] = 1
    mask[2, 0, :2] = 1
    mask[3, 0, :10] = 2
    assert labels_from_mask(mask, 2).tolist() == [[False, False], [True, False], [True, False], [False, True]]
    assert labels_from_mask(mask, 2, 0.01).tolist() == [[False, False], [False, False], [True, False], [False, True]]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), classes=st.integers(1, 5), rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_labels_name_the_classes_that_occur(seed: int, classes: int, rows: int, columns: int) -> None:
    mask = np.random.default_rng(seed).integers(0, classes + 1, (3, rows, columns), dtype=np.uint8)
    labels = labels_from_mask(torch.from_numpy(mask), classes)
    assert labels.dtype == torch.bool
    assert labels.tolist() == [[k in mask[s] for k in range(1, classes + 1)] for s in range(3)]


def test_an_empty_or_ambiguous_list_of_studies_is_refused() -> None:
    with pytest.raises(DataError, match="at least one study"):
        SliceDataset([], ("lesion",), ("x",))
    with pytest.raises(DataError, match="two named 'a'"):
        SliceDataset([make_ref("a", "p"), make_ref("a", "q")], ("lesion",), ("x", "y"))


def test_a_study_with_another_number_of_slices_than_listed_is_refused() -> None:
    ref = StudyRef("a", "p", 2, partial(make_study, "a", "p", 3))
    with pytest.raises(DataError, match=r"a\.nii\.gz.*expected 2 slices, found 3"):
        SliceDataset([ref], ("lesion",), ("x", "y"))[0]


def image_with(value: float) -> torch.Tensor:
    image = torch.rand(3, 2, 5, 7)
    image[2, 1, 4, 6] = value
    return image


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": torch.rand(3, 2, 5, 7, dtype=torch.float64)}, "expected float32 image"),
        ({"image": torch.rand(3, 2, 35)}, r"\[3, 2, 35\]"),
        ({"image": torch.rand(3, 1, 5, 7)}, "expected 2 channels, found 1"),
        ({"image": torch.rand(3, 3, 5, 7)}, "expected 2 channels, found 3"),
        ({"image": torch.rand(4, 2, 5, 7)}, "3 slice names for 4 slices"),
        ({"image": image_with(float("nan"))}, "NaN or infinite"),
        ({"image": image_with(float("-inf"))}, "NaN or infinite"),
        ({"image": torch.full((3, 2, 5, 7), 4.0)}, "constant"),
        ({"image": torch.rand(3, 2, 0, 7)}, "constant"),
        ({"slice_names": ("a", "b", "a")}, "must differ"),
        ({"mask": torch.zeros(3, 5, 7)}, "uint8 mask"),
        ({"mask": torch.zeros(3, 7, 5, dtype=torch.uint8)}, r"uint8 mask \[3, 5, 7\]"),
        ({"mask": torch.full((3, 5, 7), 2, dtype=torch.uint8)}, "mask value 2, but the dataset has 1"),
        ({"labels": torch.zeros(3, 2, dtype=torch.bool)}, r"bool labels \[3, 1\]"),
        ({"labels": torch.zeros(3, 1)}, "bool labels"),
    ],
)
def test_a_study_that_breaks_the_contract_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        check_study(make_study(**changes), num_channels=2, num_classes=1)  # type: ignore[arg-type]
    assert str(error.value).startswith("a.nii.gz: ")


def test_a_sound_study_passes() -> None:
    check_study(make_study(), num_channels=2, num_classes=1)
    check_study(make_study(mask=None, labels=torch.ones(3, 1, dtype=torch.bool)), num_channels=2, num_classes=1)


def test_geometry_without_a_file_behind_it_is_in_pixels() -> None:
    geometry = Geometry()
    assert geometry.spacing == (1.0, 1.0, 1.0)
    assert not geometry.physical


@pytest.mark.parametrize(
    ("columns", "axcodes"),
    [
        ([[0, 0, 5.5], [0, -0.9, 0], [-0.8, 0, 0]], "SPL"),
        ([[0, 0, -2], [0, 1, 0], [1, 0, 0]], "IAR"),
        ([[3, 0.2, 0.1], [-0.1, 0.3, 1], [0.1, -1, 0.2]], "RSP"),
    ],
)
def test_geometry_names_directions_and_distances(columns: list[list[float]], axcodes: str) -> None:
    affine = np.eye(4)
    affine[:3, :3] = np.array(columns).T
    affine[:3, 3] = 100, -20, 7
    geometry = Geometry(affine, physical=True)
    assert geometry.axcodes == axcodes
    assert geometry.spacing == pytest.approx([float(np.linalg.norm(column)) for column in columns])


# -- intensities -------------------------------------------------------------------------------------------------------


def head(generator: torch.Generator, slices: int = 4, size: int = 24, spread: float = 10) -> torch.Tensor:
    """Air of about 0 around normally distributed tissue of about 100, float32 [slices, 1, size, size]."""
    image = torch.rand(slices, 1, size, size, generator=generator) * 3
    image[:, :, 4:-4, 4:-4] += 100 + spread * torch.randn(slices, 1, size - 8, size - 8, generator=generator)
    return image


@pytest.mark.parametrize("seed", range(3))
def test_units_and_scanner_offset_do_not_matter(seed: int) -> None:
    image = head(torch.Generator().manual_seed(seed))
    expected = normalise_study(image)
    assert torch.allclose(normalise_study(image * 37.5), expected, atol=1e-4)
    assert torch.allclose(normalise_study(image - 400), expected, atol=1e-4)


@pytest.mark.parametrize("spread", [4, 12])
def test_tissue_lands_on_its_anchors_however_wide_it_spreads(spread: float) -> None:
    image = head(torch.Generator().manual_seed(0), slices=16, spread=spread)
    normalised = normalise_study(image)
    tissue = normalised[image > 40]
    assert normalised.min() == -1
    assert tissue.median() == pytest.approx(-0.2, abs=0.01)
    # Of normally distributed tissue 84.1% lie below one standard deviation, 97.7% below two.
    one, two = (float(tissue.quantile(share)) for share in (0.8413, 0.9772))
    assert two - one == pytest.approx(one + 0.2, rel=0.1)
    reference = normalise_study(head(torch.Generator().manual_seed(1), slices=16, spread=8))
    assert one == pytest.approx(float(reference[reference > -0.5].quantile(0.8413)), abs=0.03)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_order_of_intensities_is_kept(seed: int) -> None:
    image = head(torch.Generator().manual_seed(seed), slices=2)
    order = image.flatten().argsort()
    assert (normalise_study(image).flatten()[order].diff() >= 0).all()


def test_channels_are_normalised_apart_and_a_constant_one_becomes_air() -> None:
    first = head(torch.Generator().manual_seed(1))
    image = torch.cat([first, torch.full_like(first, 9.0), first * 50], dim=1)
    normalised = normalise_study(image)
    assert torch.allclose(normalised[:, 0], normalised[:, 2], atol=1e-4)
    assert (normalised[:, 1] == -1).all()


def test_one_hot_pixel_does_not_darken_the_study() -> None:
    image = head(torch.Generator().manual_seed(2), slices=8)
    spiked = image.clone()
    spiked[0, 0, 0, 0] = 1e6
    assert torch.allclose(normalise_study(spiked)[1:], normalise_study(image)[1:], atol=0.02)


def test_a_few_values_far_below_air_do_not_make_tissue_of_it() -> None:
    """As splines leave them, which register and resample studies."""
    image = head(torch.Generator().manual_seed(2), slices=8)
    strays = image.clone()
    strays[0, 0, 0, :3] = torch.tensor([-5.0, -60.0, -1e5])
    normalised = normalise_study(strays)
    assert torch.allclose(normalised[1:], normalise_study(image)[1:], atol=0.05)
    assert (normalised[0, 0, 0, :3] == -1).all()


def test_standardised_tissue_around_zero_air_keeps_its_range() -> None:
    """Skull-stripped and divided by the deviation, as preprocessing of challenges does: air is in the middle."""
    generator = torch.Generator().manual_seed(5)
    image = torch.zeros(4, 1, 40, 40)
    image[:, :, 10:30, 10:30] = torch.randn(4, 1, 20, 20, generator=generator)
    normalised = normalise_study(image)
    tissue = normalised[image != 0]
    assert float(tissue.quantile(0.5)) == pytest.approx(-0.2, abs=0.05)
    assert float(tissue.quantile(0.84)) == pytest.approx(0.15, abs=0.06)
    assert (tissue == 1).float().mean() < 0.01


@pytest.mark.parametrize("kind", ["no air", "one value", "few values"])
def test_images_that_only_look_like_it_are_scaled_as_ever(kind: str) -> None:
    """A tail towards the dark, a value that is much of the tissue, coarse integers."""
    generator = torch.Generator().manual_seed(6)
    if kind == "no air":
        image = 100 + 20 * torch.randn(1, 1, 200, 200, generator=generator)
    elif kind == "one value":
        image = torch.zeros(1, 1, 50, 50)
        image[..., 5:45, 5:45] = 100
        image[..., 20:25, 20:25] = 200
    else:
        image = torch.randint(11, 15, (1, 1, 60, 60), generator=generator).float()
        image[..., :10, :] = 0
    torch.testing.assert_close(normalise_study(image), normalised_by_torch(image), rtol=0, atol=1e-3)


def test_a_study_above_the_sampling_bound_is_normalised_alike() -> None:
    # Rows of 512 pixels with tissue in few columns: an even subsample would see air or tissue alone.
    generator = torch.Generator().manual_seed(3)
    small = torch.rand(2, 1, 64, 512, generator=generator)
    small[..., 128:256] += 10 + torch.randn(2, 1, 64, 128, generator=generator)
    large = small.repeat(8, 1, 1, 1)
    assert torch.allclose(normalise_study(large)[:2], normalise_study(small), atol=0.05)
    assert torch.equal(normalise_study(large), normalise_study(large))


def normalised_by_torch(image: torch.Tensor) -> torch.Tensor:
    """What `normalise_study` says of one channel, in torch's functions and its draws."""
    values = image.flatten()
    if len(values) > 2**17:
        values = values[torch.randint(len(values), (2**17,), generator=torch.Generator().manual_seed(0))]
    floor = image.amin()
    tissue = values[values > floor + 0.1 * (values.kthvalue(round(0.999 * len(values))).values - floor)]
    median = tissue.median()
    deviation = 1.4826 * (tissue - median).abs().median()
    below = (image - floor) / (median - floor) * 0.8 - 1
    above = (image - median) / deviation * 0.35 - 0.2
    return torch.where(image <= median, below, above).clamp(-1, 1)


@pytest.mark.parametrize("shape", [(3, 1, 40, 31), (9, 1, 160, 171)])
def test_existing_weights_see_the_pixels_they_were_trained_on(shape: tuple[int, ...]) -> None:
    image = torch.rand(shape) * 5
    image[..., 8:-8, 8:-8] += 100 + 20 * torch.randn(shape)[..., 8:-8, 8:-8]
    # Bit by bit: the method's noise is seeded by the pixels.
    assert torch.equal(normalise_study(image), normalised_by_torch(image))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(bad: float) -> None:
    image = head(torch.Generator().manual_seed(4))
    image[0, 0, 3, 3] = bad
    with pytest.raises(DataError, match=r"scan\.nii.*NaN or infinite"):
        normalise_study(image, source="scan.nii")


@pytest.mark.parametrize("window", [(1.0, 1.0), (5.0, -5.0)])
def test_a_window_needs_a_width(window: tuple[float, float]) -> None:
    with pytest.raises(DataError, match="low < high"):
        normalise_study(torch.rand(1, 1, 4, 4), window=window)
