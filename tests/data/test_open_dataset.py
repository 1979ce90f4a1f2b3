"""The face of the data room: data sets by name, options refused in words, imports that stay light."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cldf_fast.data import DATASETS, open_dataset, open_split
from cldf_fast.errors import ConfigError, DataError


def test_the_phantom_is_opened_with_its_options() -> None:
    dataset = open_dataset("phantom", kind="organs", patients=2, slices=3, size=32)
    assert len(dataset) == 6
    assert len(dataset.class_names) == 4


def test_the_phantom_split_parts_share_no_patient() -> None:
    parts = open_split("phantom", seed=1, size=32)
    assert list(parts) == ["train", "val", "test"]
    subjects = [subject for part in parts.values() for subject in part.subjects]
    assert len(subjects) == len(set(subjects))
    image = open_split("phantom", seed=1, size=32)["test"][0].image
    assert image.equal(parts["test"][0].image)
    assert not image.equal(open_split("phantom", seed=2, size=32)["test"][0].image)


@pytest.mark.parametrize("name", ["mnist", "base", "splits", ""])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected one of phantom, labelled, lgg, brats, chaos, nnunet"):
        open_dataset(name, "folder")


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"phantom"}))
def test_a_folder_is_needed_and_must_hold_the_data_set(name: str, tmp_path: object) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected the folder"):
        open_dataset(name)
    with pytest.raises(DataError):
        open_dataset(name, tmp_path)  # type: ignore[arg-type]


def test_the_phantom_takes_no_folder_and_needs_its_patients() -> None:
    with pytest.raises(ConfigError, match="takes no folder"):
        open_dataset("phantom", "folder", patients=3)
    with pytest.raises(ConfigError, match="'patients' is needed"):
        open_dataset("phantom")


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"brats: unknown option 'channels', expected one of modalities, min_area"):
        open_dataset("brats", "folder", channels=("t1",))
    with pytest.raises(ConfigError, match=r"lgg: unknown option 'window', expected one of \(none\)"):
        open_dataset("lgg", "folder", window=(0, 1))


def test_importing_the_room_reads_no_image_library() -> None:
    code = "import sys, cldf_fast.data; print(*{'PIL', 'nibabel', 'pydicom', 'torch'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not loaded
