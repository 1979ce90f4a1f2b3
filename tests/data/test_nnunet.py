"""nnU-Net raw data sets: names from dataset.json, 3-D and 2-D files, refusal of what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from cldf_fast.data import open_dataset
from cldf_fast.data.nnunet import nnunet
from cldf_fast.errors import DataError

RAS = np.diag([0.9, 0.8, 3.0, 1.0])
DESCRIPTION = {
    "channel_names": {"0": "FLAIR", "1": "T1"},
    "labels": {"background": 0, "oedema": 1, "core": 2},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}


def make_case(seed: int, channels: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """float32 image [3, channels, 16, 20] and labels uint8 [3, 16, 20]: class 1 in the second slice, 2 in the third."""
    image = np.random.default_rng(seed).integers(0, 200, (3, channels, 16, 20)).astype(np.float32)
    labels = np.zeros((3, 16, 20), dtype=np.uint8)
    labels[1, 2:6, 3:8] = 1
    labels[2, 4:9, 3:8] = 2
    return image, labels


def save(path: Path, stack: np.ndarray, affine: np.ndarray = RAS) -> None:
    """Write [S, H, W] (slices to superior, rows to posterior, columns to the left) as a RAS volume."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.ascontiguousarray(stack[:, ::-1, ::-1].transpose(2, 1, 0)), affine), path)


def describe(root: Path, **changes: object) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps({**DESCRIPTION, **changes}))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "Dataset042_Brain"
    describe(root)
    for seed, case in enumerate(("BRAIN_002", "BRAIN_001")):
        image, labels = make_case(seed)
        for channel in range(2):
            save(root / "imagesTr" / f"{case}_{channel:04d}.nii.gz", image[:, channel])
        save(root / "labelsTr" / f"{case}.nii.gz", labels)
    return root


def test_volumes_are_read_with_the_names_of_the_description(root: Path) -> None:
    dataset = open_dataset("nnunet", root)
    assert dataset.channel_names == ("FLAIR", "T1")
    assert dataset.class_names == ("oedema", "core")
    assert dataset.subjects == ("BRAIN_001", "BRAIN_002")
    image, labels = make_case(1)
    study = dataset.refs[0].read()
    np.testing.assert_array_equal(study.image.numpy(), image)
    np.testing.assert_array_equal(study.mask.numpy(), labels)
    assert study.geometry.axcodes == "SPL"
    assert study.geometry.spacing == pytest.approx((3.0, 0.8, 0.9))
    assert [item.label.tolist() for item in dataset][:3] == [[False, False], [True, False], [False, True]]
    assert len({item.name for item in dataset}) == 6


@pytest.mark.parametrize(("first", "modality"), [("CT", "CT"), ("ct", "CT"), ("MRI", None), ("CT w/ contrast", None)])
def test_ct_is_the_one_channel_name_that_tells_the_modality(root: Path, first: str, modality: str | None) -> None:
    describe(root, channel_names={"0": first, "1": first})
    assert nnunet(root).modality == modality
    describe(root, channel_names={"0": first, "1": "PET"})
    assert nnunet(root).modality is None


def test_window_and_area_rule_are_options(root: Path) -> None:
    dataset = nnunet(root, window=(0, 100), min_area=0.07)
    image, _ = make_case(1)
    np.testing.assert_allclose(dataset[0].image.numpy(), np.clip(image[0] / 50 - 1, -1, 1), atol=1e-5)
    assert [item.label.tolist() for item in dataset][:3] == [[False, False], [False, False], [False, True]]


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_flat_images_are_studies_of_one_slice(tmp_path: Path, ending: str) -> None:
    describe(tmp_path, numTraining=1, file_ending=ending)
    image, labels = make_case(3)
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    for channel in range(2):
        Image.fromarray(image[1, channel].astype(np.uint8)).save(tmp_path / "imagesTr" / f"a_{channel:04d}{ending}")
    Image.fromarray(labels[1]).save(tmp_path / "labelsTr" / f"a{ending}")
    dataset = nnunet(tmp_path)
    study = dataset.refs[0].read()
    assert (len(dataset), study.slice_names, study.geometry.physical) == (1, ("a",), False)
    np.testing.assert_array_equal(study.image.numpy(), image[1:2])
    np.testing.assert_array_equal(study.mask.numpy(), labels[1:2])


def test_a_colour_file_holds_all_channels(tmp_path: Path) -> None:
    describe(tmp_path, numTraining=1, file_ending=".png", channel_names={"0": "R", "1": "G", "2": "B"})
    image, labels = make_case(4, channels=3)
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    Image.fromarray(image[2].transpose(1, 2, 0).astype(np.uint8)).save(tmp_path / "imagesTr" / "a_0000.png")
    Image.fromarray(labels[2]).save(tmp_path / "labelsTr" / "a.png")
    study = nnunet(tmp_path).refs[0].read()
    np.testing.assert_array_equal(study.image.numpy(), image[2:3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, "'whole' is a region.*not supported"),
        ({"labels": {"background": 0, "tumour": 1, "ignore": 2}}, "ignore label is not supported"),
        ({"labels": {"background": 0, "tumour": 2}}, "labels: expected names numbered"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "each class its own number"),
        ({"labels": {"a": 0, "b": 1}}, "expected background as 0"),
        ({"labels": {"background": 0}}, "at least one class"),
        ({"labels": ["background", "a"]}, "at least one class"),
        ({"channel_names": {"1": "FLAIR", "2": "T1"}}, 'channel_names: expected names numbered from "0"'),
        ({"channel_names": None}, "channel_names"),
        ({"channel_names": {}}, "channel_names"),
        ({"file_ending": ".nrrd"}, r"file_ending: expected one of \.nii\.gz, \.png, \.tif, got '\.nrrd'"),
        ({"file_ending": None}, "file_ending"),
        ({"numTraining": "2"}, "numTraining"),
        ({"numTraining": 3}, "says 3 training cases, found 2"),
        ({"numTraining": 1}, "says 1 training cases, found 2"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(root: Path, changes: dict[str, object], message: str) -> None:
    describe(root, **changes)
    with pytest.raises(DataError, match=message):
        nnunet(root)


def test_version_1_is_told_how_to_be_converted(root: Path) -> None:
    old = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "tumour"}, "numTraining": 2}
    (root / "dataset.json").write_text(json.dumps(old))
    with pytest.raises(DataError, match=r"dataset\.json: this is nnU-Net version 1; convert"):
        nnunet(root)


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe", b"[1, 2]"])
def test_a_missing_or_broken_description_is_refused(root: Path, content: bytes | None) -> None:
    (root / "dataset.json").unlink()
    if content is not None:
        (root / "dataset.json").write_bytes(content)
    with pytest.raises(DataError, match=r"dataset\.json"):
        nnunet(root)


def test_a_missing_channel_is_named(root: Path) -> None:
    (root / "imagesTr" / "BRAIN_002_0001.nii.gz").unlink()
    with pytest.raises(DataError, match=r"BRAIN_002_0001\.nii\.gz: this image of case 'BRAIN_002' is missing"):
        nnunet(root)


def image_of(root: Path) -> Path:
    return root / "imagesTr" / "BRAIN_001_0001.nii.gz"


def label_of(root: Path) -> Path:
    return root / "labelsTr" / "BRAIN_001.nii.gz"


@pytest.mark.parametrize(
    ("path_in", "spoil", "message"),
    [
        (image_of, lambda p: p.write_bytes(b"not a volume"), "NIfTI"),
        (image_of, lambda p: p.write_bytes(p.read_bytes()[:-300]), "truncated|before the end"),
        (image_of, lambda p: save(p, np.full((3, 16, 20), np.nan, dtype=np.float32)), "NaN"),
        (image_of, lambda p: save(p, np.ones((3, 16, 20), dtype=np.float32)), "constant"),
        (image_of, lambda p: save(p, make_case(1)[0][:, 1, :, 1:]), "16 x 19.*16 x 20"),
        (image_of, lambda p: save(p, make_case(1)[0][:, 1], np.diag([0.9, 0.8, 4.0, 1.0])), "affine differs"),
        (label_of, lambda p: p.write_bytes(p.read_bytes()[:40]), "truncated|before the end"),
        (label_of, lambda p: save(p, np.full((3, 16, 20), 3, dtype=np.uint8)), "labels from 0 to 2, found 3"),
        (label_of, lambda p: save(p, np.zeros((3, 15, 20), dtype=np.uint8)), r"\[3, 15, 20\].*\[3, 16, 20\]"),
        (label_of, lambda p: save(p, np.full((3, 16, 20), 0.5, dtype=np.float32)), "integers"),
    ],
    ids=[
        "corrupt",
        "truncated",
        "nan",
        "constant",
        "narrow",
        "moved",
        "truncated-label",
        "class",
        "short-label",
        "soft-label",
    ],
)
def test_a_bad_file_is_refused_by_name(root: Path, path_in: object, spoil: object, message: str) -> None:
    path = path_in(root)  # type: ignore[operator]
    spoil(path)  # type: ignore[operator]
    with pytest.raises(DataError, match=message) as error:
        list(nnunet(root))
    assert path.name in str(error.value)


def test_a_constant_case_is_refused(root: Path) -> None:
    for channel in range(2):
        save(root / "imagesTr" / f"BRAIN_001_{channel:04d}.nii.gz", np.full((3, 16, 20), 5, dtype=np.float32))
    with pytest.raises(DataError, match=r"BRAIN_001.*constant"):
        list(nnunet(root))
