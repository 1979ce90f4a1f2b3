"""A table of image-level labels beside images: what it says reaches the slices that it names; unfit lines are named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cldf_fast.data import open_dataset, open_split
from cldf_fast.errors import ConfigError, DataError, SplitError
from tests.data.test_volumes import dicom_pixels, save_nifti, save_series

HEADER = "image,slice,patient,tumour,oedema"


def write(root: Path, lines: Sequence[str], header: str = HEADER) -> Path:
    (root / "labels.csv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A NIfTI volume of four slices, a DICOM series of five and a PNG file."""
    rng = np.random.default_rng()
    save_nifti(tmp_path / "a.nii.gz", rng.random((8, 9, 4), dtype=np.float32))
    names = [f"IM{number}.dcm" for number in (3, 1, 4, 0, 2)]
    save_series(tmp_path / "b", dicom_pixels(rng), names=names)
    Image.fromarray(rng.integers(0, 255, (6, 7), dtype=np.uint8)).save(tmp_path / "c.png")
    return tmp_path


ROWS = ["a.nii.gz,,anna,0,0", "a.nii.gz,2,anna,1,0", "b,IM4,ben,1,1", "b,,ben,0,0", "c.png,,,0,1"]


def test_every_slice_has_what_the_table_says(root: Path) -> None:
    dataset = open_dataset("labelled", write(root, ROWS), modality="CT")
    assert (dataset.class_names, dataset.channel_names, dataset.modality) == (("tumour", "oedema"), ("image",), "CT")
    assert dataset.subjects == ("anna", "ben", "c.png")
    slices = list(dataset)
    found = {(each.study, each.index): each.label.int().tolist() for each in slices if each.label is not None}
    marked = {("a.nii.gz", 2): [1, 0], ("b", 2): [1, 1], ("c.png", 0): [0, 1]}
    assert len(found) == len(slices) == 10
    assert {key: label for key, label in found.items() if any(label)} == marked
    assert next(each.name for each in slices if each.study == "b" and each.index == 2) == "IM4"
    assert all(each.mask is None for each in slices)


def test_columns_can_be_channels(root: Path) -> None:
    save_nifti(root / "t1.nii.gz", np.random.default_rng().random((8, 9, 4), dtype=np.float32))
    lines = [f"a.nii.gz,t1.nii.gz,{number},{int(number == 3)}" for number in range(4)]
    dataset = open_dataset("labelled", write(root, lines, "image:flair,image:t1,slice,tumour"))
    assert dataset.channel_names == ("flair", "t1")
    assert torch.stack([each.label for each in dataset if each.label is not None])[:, 0].tolist() == [0, 0, 0, 1]
    assert dataset[0].image.shape == (2, 9, 8)


def test_a_colour_image_has_several_channels(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng().integers(0, 255, (6, 7, 3), dtype=np.uint8)).save(tmp_path / "c.png")
    assert open_dataset("labelled", write(tmp_path, ["c.png,1"], "image,x")).channel_names == (
        "image 1",
        "image 2",
        "image 3",
    )


@pytest.mark.parametrize(
    ("lines", "header", "message"),
    [
        ([], HEADER, "expected a row an image, or a row a slice, found none"),
        (ROWS, "file,slice,patient,tumour,oedema", "expected a column image, or columns image:NAME"),
        (["c.png"], "image", "expected a column for each class, got none beside image"),
        (["c.png,1,0"], "image,x,x", "expected columns of different names"),
        (["c.png,1,0"], "image, x,y", "without spaces around"),
        (["c.png,1,"], "image,x,", "expected columns of different names"),
        (["c.png,1"], "image,x,y", "line 2: expected as many cells as columns"),
        (["c.png,1,0,0"], "image,x,y", "line 2: expected as many cells as columns"),
        (["c.png,yes"], "image,x", "line 2: x: expected 0 or 1, got 'yes'"),
        (["c.png,"], "image,x", "line 2: x: expected 0 or 1, got ''"),
        (["c.png,01"], "image,x", "line 2: x: expected 0 or 1, got '01'"),
        ([",1"], "image,x", "line 2: image: expected a file or folder, got an empty cell"),
        (["d.png,1"], "image,x", r"line 2: .*d\.png does not exist"),
        (["c.png,1", "c.png,0"], "image,x", "lines 2 and 3 are about the same slice"),
        (["c.png,,ann,1,0", "c.png,0,ben,1,0"], HEADER, "line 3: c.png has other channels or another patient"),
        (["b,1"], "image,x", "line 2: says that all of 5 slices show a class"),
        (["a.nii.gz,1,0", "a.nii.gz,2,1"], "image,slice,x", "has 4 slices, and rows for 2; give each slice one"),
    ],
)
def test_a_table_that_does_not_fit_is_named(root: Path, lines: list[str], header: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset("labelled", write(root, lines, header))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a.nii.gz,,0", "a.nii.gz,4,1"], "line 3: slice: expected a number from 0 to 3 or a name such as 'a_000'"),
        (["a.nii.gz,,0", "a.nii.gz,-1,1"], "got '-1'"),
        (["a.nii.gz,,0", "a.nii.gz,1,1", "a.nii.gz,a_001,1"], "lines 3 and 4 are about the same slice"),
    ],
)
def test_a_slice_that_is_not_there_is_named(root: Path, lines: list[str], message: str) -> None:
    dataset = open_dataset("labelled", write(root, lines, "image,slice,x"))
    with pytest.raises(DataError, match=message):
        dataset[0]


def test_a_folder_without_a_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"labels\.csv: can't be read as a table of labels"):
        open_dataset("labelled", tmp_path)


def test_options_and_splits_that_do_not_fit_are_named(root: Path) -> None:
    write(root, ROWS)
    for window in (5, "1,2", [3, 1], [1, 2, 3]):
        with pytest.raises(DataError, match="window: expected two finite numbers, low < high, got"):
            open_dataset("labelled", root, window=window)
    with pytest.raises(ConfigError, match="unknown option 'size', expected one of window, modality"):
        open_dataset("labelled", root, size=3)
    (root / "split.csv").write_text("patient,split\nanna,training\nben,val\n", encoding="utf-8")
    with pytest.raises(SplitError, match=r"split\.csv: expected the parts train, val and usually test, found val, tr"):
        open_split("labelled", root)
    (root / "split.csv").write_text("patient,split\nanna,train\nbert,val\n", encoding="utf-8")
    with pytest.raises(SplitError, match=r"split\.csv: patient 'bert' of part 'val' is not in the data set"):
        open_split("labelled", root)
