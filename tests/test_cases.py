"""Users' files on their way to a network and back: what an exported engine and `segment` share."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from cldf_fast import segmentation
from cldf_fast.cases import masks_from_probability, read_case, working_images, write_case
from cldf_fast.data.base import Geometry, SliceDataset, Study, StudyRef
from cldf_fast.data.packing import pack
from cldf_fast.errors import DataError


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def case(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A NIfTI volume of 5 slices of 22 x 17 pixels, air around tissue."""
    voxels = rng.random((17, 22, 5))
    voxels[4:-4, 4:-4] += rng.normal(100, 10, (9, 14, 5))
    nibabel.save(nibabel.Nifti1Image(voxels.astype(np.float32), np.diag([-1, -1, 3, 1])), tmp_path / "case.nii.gz")
    return tmp_path / "case.nii.gz"


@pytest.mark.parametrize("window", [None, (20.0, 120.0)])
def test_a_file_gives_the_pixels_that_training_sees(case: Path, window: tuple[float, float] | None) -> None:
    stack = read_case(str(case), 2, replicate=True)
    images = working_images(stack, 16, window=window)
    assert images.dtype == np.float32
    assert images.min() >= -1
    assert images.max() <= 1
    study = Study("case", "p", torch.from_numpy(stack.image), Geometry(), stack.slice_names, case)
    dataset = SliceDataset([StudyRef("case", "p", 5, lambda: study)], ("lesion",), ("a", "b"), window=window)
    np.testing.assert_array_equal(pack(dataset, 16).images.numpy(), images)


@pytest.mark.parametrize("values", [5, 2**20])
def test_masks_are_those_of_tensors(rng: np.random.Generator, values: int) -> None:
    # Of few values, many are equal: the first class wins on both sides.
    probability = rng.integers(0, values, (6, 4, 9, 7)).astype(np.float32) / values
    present = rng.random((6, 3)) < 0.5
    present[0], present[1] = False, True
    expected = segmentation.masks_from_probability(torch.from_numpy(probability), torch.from_numpy(present))
    masks = masks_from_probability(probability, present)
    assert masks.dtype == np.uint8
    np.testing.assert_array_equal(masks, expected.numpy())


def test_a_result_is_written_at_the_cases_own_size(case: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    stack = read_case(str(case), 1)
    logits = np.exp(rng.normal(size=(5, 3, 16, 16)).astype(np.float32))
    probability = logits / logits.sum(axis=1, keepdims=True)
    present = np.array([[True, True], [True, False], [False, True], [False, False], [True, True]])
    files, foreground = write_case(
        stack, probability, present, tmp_path / "out", class_names=("a", "b"), keep_probability=True
    )
    assert [file.name for file in files] == ["case_mask.nii.gz", "case_probability.nii.gz"]
    # The affine's axes are left, posterior, superior: the stack is the transpose of what is stored.
    mask, kept = (np.asarray(nibabel.load(file).dataobj) for file in files)
    assert mask.shape == (17, 22, 5)
    assert kept.shape == (17, 22, 5, 2)
    assert foreground == np.count_nonzero(mask) > 0
    for index, (first, second) in enumerate(present):
        assert set(np.unique(mask[..., index])) <= {0, int(first), 2 * int(second)}
    slices = torch.nn.functional.interpolate(torch.from_numpy(probability), (22, 17), mode="bilinear")
    np.testing.assert_allclose(kept, slices[:, 1:].permute(3, 2, 0, 1).numpy(), atol=1e-5)
    files, _ = write_case(stack, probability, present, tmp_path / "bare", class_names=("a", "b"))
    assert [file.name for file in files] == ["case_mask.nii.gz"]


def test_a_case_with_other_channels_is_refused(case: Path) -> None:
    with pytest.raises(DataError, match="expected 3 channels, found 1"):
        read_case(str(case), 3)
