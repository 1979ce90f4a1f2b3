"""Splits by patient: reading, checking, making and applying them."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cldf_fast.data.base import SliceDataset, Study, StudyRef
from cldf_fast.data.geometry import Geometry
from cldf_fast.data.splits import check_split, find_split, make_split, read_split, split_dataset, write_split
from cldf_fast.errors import SplitError


def read_study(name: str, subject: str) -> Study:
    return Study(name, subject, torch.rand(2, 1, 4, 4), Geometry(), ("0", "1"), Path(name))


def make_dataset(num_patients: int) -> SliceDataset:
    """Two studies a patient."""
    pairs = [(f"p{i}-{j}", f"p{i}") for j in range(2) for i in range(num_patients)]
    refs = [StudyRef(name, subject, 2, partial(read_study, name, subject)) for name, subject in pairs]
    return SliceDataset(refs, ("lesion",), ("x",))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    split = {"train": ("p10", "p2"), "val": ("p3",), "test": ("Müller, A.",)}
    write_split(split, tmp_path / "split.csv")
    assert read_split(tmp_path / "split.csv") == split
    assert list(read_split(tmp_path / "split.csv")) == ["train", "val", "test"]


def test_further_columns_spaces_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "split.csv"
    path.write_text("\ufeffslices,split,patient\n3, test ,b\n4,train, a \n2,extra,c\n", encoding="utf-8")
    assert read_split(path) == {"train": ("a",), "test": ("b",), "extra": ("c",)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patient,part\na,train\n", "'split' is missing"),
        ("", "'patient' is missing"),
        ("patient,split\n", "at least one part"),
        ("patient,split\na,train\nb,\n", "line 3.*empty cell"),
        ("patient,split\na\n", "line 2.*empty cell"),
        ("patient,split\na,train\na,test\n", "'a' is in 'train' and in 'test'"),
        ("patient,split\na,train\na,train\n", "'a' is in 'train' and in 'train'"),
    ],
)
def test_a_bad_table_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "split.csv"
    path.write_text(text)
    with pytest.raises(SplitError, match=message) as error:
        read_split(path)
    assert str(path) in str(error.value)


def test_a_table_that_is_no_text_or_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "split.csv"
    with pytest.raises(SplitError, match=r"split\.csv: can't be read"):
        read_split(path)
    path.write_bytes(b"patient,split\n\xff\xfe,train\n")
    with pytest.raises(SplitError, match=r"split\.csv: can't be read"):
        read_split(path)


def test_check_split_finds_leaks_strangers_and_empty_parts() -> None:
    subjects = ["a", "b", "c"]
    check_split({"train": ["a"], "test": ["b"]}, subjects)
    with pytest.raises(SplitError, match="'b' is in 'train' and in 'test'"):
        check_split({"train": ["a", "b"], "test": ["b"]}, subjects)
    with pytest.raises(SplitError, match="'z' of part 'test' is not in the data set"):
        check_split({"train": ["a"], "test": ["z"]}, subjects)
    with pytest.raises(SplitError, match="'val' is empty"):
        check_split({"train": ["a"], "val": []}, subjects)
    with pytest.raises(SplitError, match="at least one part"):
        check_split({}, subjects)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(3, 60), seed=st.integers(0, 2**31), shuffle=st.randoms(use_true_random=False))
def test_made_splits_hold_every_patient_once_in_any_order_of_listing(
    count: int, seed: int, shuffle: random.Random
) -> None:
    subjects = [f"patient-{i}" for i in range(count)]
    split = make_split(subjects, seed=seed)
    assert sorted(patient for part in split.values() for patient in part) == sorted(subjects)
    check_split(split, subjects)
    shuffle.shuffle(subjects)
    assert make_split(subjects + subjects[:2], seed=seed) == split


def test_made_splits_have_the_sizes_asked_for_and_follow_the_seed() -> None:
    subjects = [f"patient-{i}" for i in range(100)]
    split = make_split(subjects, (0.6, 0.15, 0.25), seed=3)
    assert {part: len(patients) for part, patients in split.items()} == {"train": 60, "val": 15, "test": 25}
    assert make_split(subjects, (0.6, 0.15, 0.25), seed=4) != split


@pytest.mark.parametrize("fractions", [(0.01, 0.01, 0.98), (0.01, 0.98, 0.01), (0.98, 0.01, 0.01)])
def test_every_part_of_a_made_split_has_a_patient(fractions: tuple[float, float, float]) -> None:
    for count in (3, 4, 7):
        check_split(make_split([str(i) for i in range(count)], fractions, seed=0))


@pytest.mark.parametrize("fractions", [(0.5, 0.5, 0.0), (0.7, 0.2, 0.2), (0.5, 0.5), (1.2, -0.4, 0.2)])
def test_fractions_must_be_shares(fractions: tuple[float, ...]) -> None:
    with pytest.raises(SplitError, match="fractions"):
        make_split(["a", "b", "c", "d"], fractions)  # type: ignore[arg-type]


def test_two_patients_are_too_few() -> None:
    with pytest.raises(SplitError, match="at least 3 patients, got 2"):
        make_split(["a", "b", "a"])


def test_find_split_looks_in_the_folder_and_beside_it(tmp_path: Path) -> None:
    data = tmp_path / "download" / "kaggle_3m"
    data.mkdir(parents=True)
    assert find_split(data) is None
    beside = data.parent / "split.csv"
    beside.write_text("patient,split\na,train\n")
    assert find_split(data) == beside
    assert find_split(data.parent) == beside
    inside = data / "split.csv"
    inside.write_text("patient,split\na,train\n")
    assert find_split(data) == inside


def test_split_dataset_parts_share_no_patient_and_lose_none() -> None:
    dataset = make_dataset(10)
    parts = split_dataset(dataset, make_split(dataset.subjects, seed=1))
    assert list(parts) == ["train", "val", "test"]
    assert sum(len(part) for part in parts.values()) == len(dataset)
    seen = [subject for part in parts.values() for subject in part.subjects]
    assert len(seen) == len(set(seen)) == 10


def test_split_dataset_refuses_what_does_not_fit() -> None:
    dataset = make_dataset(3)
    with pytest.raises(SplitError, match="'p7'"):
        split_dataset(dataset, {"train": ["p0"], "test": ["p7"]})
    with pytest.raises(SplitError, match="'p0'"):
        split_dataset(dataset, {"train": ["p0", "p1"], "test": ["p0"]})


def test_fewer_patients_than_the_data_set_has_are_allowed() -> None:
    parts = split_dataset(make_dataset(3), {"train": ["p0"], "test": ["p2"]})
    assert {part: dataset.subjects for part, dataset in parts.items()} == {"train": ("p0",), "test": ("p2",)}
