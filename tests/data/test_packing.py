"""Packing: one working size for networks, the slices' own size for masks, and what a data set lacks is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cldf_fast.data.base import SliceDataset, Study, StudyRef
from cldf_fast.data.geometry import Geometry
from cldf_fast.data.packing import pack, to_native_size, to_working_size
from cldf_fast.errors import DataError


def dataset(*sizes: tuple[int, int], masks: bool | list[bool] = True) -> SliceDataset:
    """One study of two slices a size, two channels, two classes."""

    def ref(number: int, size: tuple[int, int]) -> StudyRef:
        mask = torch.zeros(2, *size, dtype=torch.uint8)
        mask[0, : size[0] // 2, : size[1] // 2] = number % 2 + 1
        study = Study(
            name=f"study{number}",
            subject=f"patient{number // 2}",
            image=torch.rand(2, 2, *size),
            geometry=Geometry(),
            slice_names=("low", "high"),
            mask=mask if (masks if isinstance(masks, bool) else masks[number]) else None,
            source=Path(f"study{number}.nii"),
        )
        return StudyRef(study.name, study.subject, 2, lambda: study)

    refs = [ref(number, size) for number, size in enumerate(sizes)]
    return SliceDataset(refs, class_names=("cyst", "tumour"), channel_names=("t1", "t2"))


def test_slices_of_any_size_meet_at_the_working_size() -> None:
    packed = pack(dataset((20, 30), (16, 16), (9, 12)), 16)
    assert len(packed) == 6
    assert packed.images.shape == (6, 2, 16, 16)
    assert packed.images.dtype == torch.float32
    assert packed.images.abs().max() <= 1
    assert packed.sizes == [(20, 30)] * 2 + [(16, 16)] * 2 + [(9, 12)] * 2
    assert packed.subjects == ["patient0"] * 4 + ["patient1"] * 2
    assert packed.studies == ["study0"] * 2 + ["study1"] * 2 + ["study2"] * 2
    assert packed.names == ["low", "high"] * 3
    assert packed.indices == [0, 1] * 3
    assert packed.class_names == ("cyst", "tumour")
    expected = torch.tensor([[1, 0], [0, 0], [0, 1], [0, 0], [1, 0], [0, 0]]).bool()
    assert packed.require_labels().equal(expected)


def test_masks_keep_their_own_size_and_shrink_without_new_values() -> None:
    source = dataset((32, 48), (16, 16))
    packed = pack(source, 16)
    assert [tuple(mask.shape) for mask in packed.require_masks()] == packed.sizes
    assert all(mask.equal(item.mask) for mask, item in zip(packed.require_masks(), source, strict=True))
    working = packed.working_masks()
    assert working.dtype == torch.uint8
    expected = torch.zeros(4, 16, 16, dtype=torch.uint8)
    expected[0, :8, :8], expected[2, :8, :8] = 1, 2
    assert working.equal(expected)


def test_an_image_of_the_working_size_is_left_as_it_is() -> None:
    source = dataset((16, 16))
    assert pack(source, 16).images.equal(torch.stack([item.image for item in source]))


@pytest.mark.parametrize("size", [(64, 64), (40, 23), (7, 9), (16, 16)])
def test_resizing_keeps_the_range_the_mean_and_the_place(size: tuple[int, int]) -> None:
    rows = torch.linspace(-1, 1, size[0]).view(1, 1, -1, 1).expand(1, 1, *size)
    small = to_working_size(rows.contiguous(), 16)
    assert small.shape == (1, 1, 16, 16)
    assert small.abs().max() <= 1
    assert abs(float(small.mean())) < 1e-5
    assert (small.diff(dim=2) >= 0).all()
    assert small.diff(dim=3).abs().max() < 1e-5
    torch.testing.assert_close(to_working_size(torch.full((1, 2, *size), 0.3), 16), torch.full((1, 2, 16, 16), 0.3))


def test_shrinking_averages_and_does_not_skip_pixels() -> None:
    for place in range(24, 32):
        dot = torch.zeros(1, 1, 64, 64)
        dot[..., place, 40] = 1
        # A sixteenth of the pixels are left, and together they hold the same amount of light.
        assert float(to_working_size(dot, 16).sum()) == pytest.approx(1 / 16, rel=0.1)


@pytest.mark.parametrize("size", [(64, 64), (40, 23), (7, 9), (16, 16)])
def test_maps_go_back_to_the_slices_own_size(size: tuple[int, int]) -> None:
    maps = torch.rand(2, 3, 16, 16).softmax(dim=1)
    native = to_native_size(maps, size)
    assert native.shape == (2, 3, *size)
    torch.testing.assert_close(native.sum(dim=1), torch.ones(2, *size))
    disc = torch.zeros(1, 1, 16, 16)
    disc[..., 4:8, 8:12] = 1
    mass = to_native_size(disc, size)[0, 0]

    def centre(axis: int) -> float:
        share = mass.sum(dim=1 - axis) / mass.sum()
        return float((share * (torch.arange(size[axis]) + 0.5)).sum()) / size[axis]

    assert centre(0) == pytest.approx(6 / 16, abs=0.03)
    assert centre(1) == pytest.approx(10 / 16, abs=0.03)


def test_what_is_missing_is_said() -> None:
    packed = pack(dataset((8, 8), masks=False), 8)
    assert packed.labels is None
    assert packed.masks is None
    for ask in (packed.require_labels, packed.require_masks, packed.working_masks):
        with pytest.raises(DataError, match="but the data set has none"):
            ask()


def test_all_or_none_have_masks() -> None:
    with pytest.raises(DataError, match="expected all or none"):
        pack(dataset((8, 8), (8, 8), masks=[True, False]), 8)


def test_an_image_is_read_once_and_its_full_size_is_not_kept() -> None:
    source = dataset((64, 64))
    kept: list[Tensor] = []
    read = source.refs[0].read
    counting = StudyRef("study0", "patient0", 2, lambda: kept.append(torch.zeros(0)) or read())
    packed = pack(SliceDataset([counting], source.class_names, source.channel_names), 8)
    assert len(kept) == 1
    assert packed.images.untyped_storage().nbytes() == packed.images.numel() * 4
