"""What `predict` writes for a DICOM series is, pixel by pixel, what it writes for the same series as NIfTI."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from cldf_fast.deploy.prediction import predict
from cldf_fast.deploy.predictor import Predictor
from tests.data.test_volumes import AXIAL, OBLIQUE, SAGITTAL, save_series, seg_frames
from tests.deploy.bright import CLASSES, write_bright_engine


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def to_nifti(files: Sequence[Path], path: Path) -> None:
    """Write a series as one NIfTI file in Hounsfield units: the standard's formula, and no code of the package."""
    slices = [pydicom.dcmread(file) for file in files]
    row, column = np.array(slices[0].ImageOrientationPatient, dtype=float).reshape(2, 3)
    slices.sort(key=lambda each: float(np.cross(row, column) @ np.array(each.ImagePositionPatient, dtype=float)))
    first, last = (np.array(slices[i].ImagePositionPatient, dtype=float) for i in (0, -1))
    down, across = map(float, slices[0].PixelSpacing)
    lps = np.eye(4)
    lps[:3] = np.column_stack([row * across, column * down, (last - first) / (len(slices) - 1), first])
    voxels = np.stack([s.pixel_array * float(s.RescaleSlope) + float(s.RescaleIntercept) for s in slices])
    image = nibabel.Nifti1Image(voxels.transpose(2, 1, 0).astype(np.int16), np.diag([-1, -1, 1, 1]) @ lps)
    nibabel.save(image, path)


def check_series(engine: Path, files: Sequence[Path], tmp_path: Path, rng: np.random.Generator) -> None:
    """Predict a series, a copy of it in which names say nothing of the order, and its NIfTI form; compare the masks."""
    highdicom = pytest.importorskip("highdicom")
    to_nifti(files, tmp_path / "whole.nii.gz")
    (tmp_path / "shuffled").mkdir()
    for number, file in zip(rng.permutation(len(files)), files, strict=True):
        shutil.copy(file, tmp_path / "shuffled" / f"{number}.dcm")
    sources = [str(files[0].parent), str(tmp_path / "shuffled"), str(tmp_path / "whole.nii.gz")]
    outcomes = list(predict(Predictor(engine), sources, tmp_path / "out"))
    assert [outcome.reason for outcome in outcomes] == [""] * 3
    *segmentations, mask = (tmp_path / "out" / outcome.files[0] for outcome in outcomes)
    image = nibabel.load(mask)
    voxels, from_world = np.asarray(image.dataobj), np.linalg.inv(image.affine)
    assert set(np.unique(voxels)) == {0, 1, 2}

    headers = {str(h.SOPInstanceUID): h for h in (pydicom.dcmread(file, stop_before_pixels=True) for file in files)}
    one = headers[next(iter(headers))]
    row, column = np.array(one.ImageOrientationPatient, dtype=float).reshape(2, 3)
    down, across = map(float, one.PixelSpacing)
    steps = np.stack([column * down, row * across], axis=1) @ np.indices((one.Rows, one.Columns)).reshape(2, -1)
    expected = {}
    for uid, header in headers.items():
        world = np.diag([-1, -1, 1]) @ (np.array(header.ImagePositionPatient, dtype=float)[:, None] + steps)
        exact = from_world[:3, :3] @ world + from_world[:3, 3:]
        index = np.rint(exact).astype(int)
        assert np.abs(exact - index).max() < 0.05
        expected[uid] = voxels[tuple(index)].reshape(one.Rows, one.Columns)
    for path in segmentations:
        frames = seg_frames(path)
        assert sorted((segment, uid) for segment, _, uid, _ in frames) == sorted(
            (k, u) for k in (1, 2) for u in headers
        )
        for segment, position, uid, frame in frames:
            assert position == tuple(map(float, headers[uid].ImagePositionPatient))
            np.testing.assert_array_equal(frame == 1, expected[uid] == segment)
        read = highdicom.seg.segread(path)
        found = read.get_pixels_by_source_instance(list(headers), combine_segments=True)
        np.testing.assert_array_equal(found, np.stack(list(expected.values())))
        assert [read.get_segment_description(k).segment_label for k in (1, 2)] == list(CLASSES)


@pytest.mark.parametrize("distance", [2.5, -2.5])
@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE, SAGITTAL])
def test_a_series_and_its_nifti_form_have_one_mask(
    tmp_path: Path, rng: np.random.Generator, orientation: Sequence[float], distance: float
) -> None:
    pixels = rng.gamma(2.0, 400.0, (7, 21, 19)).astype(np.uint16) % 4096
    folder = save_series(tmp_path / "series", pixels, orientation=orientation, distance=distance)
    engine = write_bright_engine(tmp_path / "engine", size=16)
    check_series(engine, sorted(folder.iterdir()), tmp_path, rng)


def test_chaos_series_and_its_nifti_form_have_one_mask(
    real_data: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    files = sorted((real_data / "chaos_ct_set3" / "DICOM_anon").iterdir())
    engine = write_bright_engine(tmp_path / "engine", size=128, window=(-110.0, 190.0))
    check_series(engine, files, tmp_path, rng)
