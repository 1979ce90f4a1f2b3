"""Segmentation of users' files: masks come back in the input's geometry, whatever the order of its files."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from cldf_fast.data.acquisition import Acquisition
from cldf_fast.data.volumes import read_volume
from cldf_fast.errors import ConfigError, DataError
from cldf_fast.inference import parse_labels, read_case, segment_case
from cldf_fast.pipeline import CLDF
from cldf_fast.run import DatasetRecord

RECORD = DatasetRecord(("liver", "kidneys", "spleen"), ("a", "b"))


def test_labels_are_names_all_or_none() -> None:
    names = RECORD.class_names
    assert parse_labels("all", names).tolist() == [True, True, True]
    assert parse_labels("none", names).tolist() == [False, False, False]
    assert parse_labels("spleen, liver", names).tolist() == [True, False, True]
    with pytest.raises(ConfigError, match="got 'heart'"):
        parse_labels("heart", names)


def test_a_path_with_a_comma_is_one_path(tmp_path: Path) -> None:
    folder = tmp_path / "a,b"
    folder.mkdir()
    image = nibabel.Nifti1Image(np.random.default_rng(0).random((8, 9, 2), dtype=np.float32), np.eye(4))
    nibabel.save(image, folder / "x.nii.gz")
    volume = read_case(str(folder / "x.nii.gz"), 1)
    assert volume.image.shape[:2] == (2, 1)
    assert read_case(str(folder / "x.nii.gz"), 3, replicate=True).image.shape[:2] == (2, 3)
    with pytest.raises(DataError, match="expected 3 channels, found 1"):
        read_case(str(folder / "x.nii.gz"), 3)


def test_a_nifti_case_keeps_its_geometry(tiny_cldf: CLDF, real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "ms_lesions" / "patient19"
    (flair,), (t1,) = folder.glob("FLAIR*"), folder.glob("T1_*")
    volume = read_case(f"{flair},{t1}", 2)
    case = segment_case(tiny_cldf, RECORD, volume, tmp_path, labels=parse_labels("all", RECORD.class_names))
    written, source = nibabel.load(case.files[0]), nibabel.load(flair)
    assert written.shape == source.shape
    assert nibabel.aff2axcodes(written.affine) == ("L", "A", "S")
    np.testing.assert_array_equal(written.affine, source.affine)
    assert int((np.asarray(written.dataobj) > 0).sum()) == case.foreground_pixels > 0


def test_what_differs_from_the_training_images_is_doubtful(tiny_cldf: CLDF, tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.random.default_rng().random((16, 16, 2), dtype=np.float32), np.diag([3, 3, 3, 1]))
    nibabel.save(image, tmp_path / "x.nii")
    volume = read_case(str(tmp_path / "x.nii"), 2, replicate=True)
    for pixel_mm, expected in ((None, []), ((1.0, 2.0), []), ((1.0, 1.4), ["other_pixel_size"])):
        record = DatasetRecord(RECORD.class_names, RECORD.channel_names, Acquisition("CT", pixel_mm))
        case = segment_case(tiny_cldf, record, volume, tmp_path / "out")
        assert [doubt.code for doubt in case.warnings if doubt.code.startswith("other")] == expected


def test_a_dicom_series_gives_the_same_frames_in_any_file_order(
    tiny_cldf: CLDF, real_data: Path, tmp_path: Path
) -> None:
    pydicom = pytest.importorskip("pydicom")
    pytest.importorskip("highdicom")
    files = sorted((real_data / "chaos_ct_set3" / "DICOM_anon").glob("*.dcm"))
    shuffled = random.Random(4).sample(files, len(files))
    masks = []
    for name, order in (("sorted", files), ("shuffled", shuffled)):
        volume = read_volume(order)
        pair = replace(volume, image=volume.image.expand(-1, 2, -1, -1))
        labels = torch.ones(3, dtype=torch.bool)
        record = replace(RECORD, acquisition=Acquisition("MR"), window=(-150.0, 250.0))
        case = segment_case(tiny_cldf, record, pair, tmp_path / name, labels=labels)
        assert [doubt.code for doubt in case.warnings] == ["other_modality"]
        masks.append(pydicom.dcmread(case.files[0]))
    first, second = masks
    assert (first.Rows, first.Columns) == (512, 512)
    assert first.PixelData == second.PixelData

    def positions(segmentation: object) -> list[list[float]]:
        frames = segmentation.PerFrameFunctionalGroupsSequence  # type: ignore[attr-defined]
        return [list(frame.PlanePositionSequence[0].ImagePositionPatient) for frame in frames]

    assert positions(first) == positions(second)
