"""Reading users' files and writing masks back: geometry exactly kept, every bad input refused by name."""

from __future__ import annotations

import ast
import gzip
import itertools
import shutil
import struct
import sys
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from nibabel.orientations import axcodes2ornt, inv_ornt_aff
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from cldf_fast.data import dicom, grid, images, nifti, stacks
from cldf_fast.data.volumes import count_slices, read_channels, read_mask, read_volume, write_mask
from cldf_fast.errors import BackendError, DataError

PATIENT = "SECRETNAME^PLANTED"
Array = np.ndarray


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def fresh_mask(volume: Any, classes: int, rng: np.random.Generator) -> torch.Tensor:
    shape = (len(volume.image), *volume.image.shape[2:])
    return torch.from_numpy(rng.integers(0, classes + 1, shape, dtype=np.uint8))


def world(affine: Array, index: Sequence[int]) -> Array:
    return (affine @ [*index, 1])[:3]


# NIfTI

ZOOMS = (0.9, 1.1, 5.5)
TURN = nib.affines.from_matvec(
    nib.quaternions.quat2mat(np.array([0.97, 0.12, -0.15, 0.1]) / np.linalg.norm([0.97, 0.12, -0.15, 0.1]))
)


def nifti_affine(axcodes: str, *, oblique: bool = False) -> Array:
    """An affine whose stored axes grow towards the codes, with unequal voxel sizes and an odd origin."""
    turned = inv_ornt_aff(axcodes2ornt(tuple(axcodes)), (1, 1, 1))
    affine = np.linalg.inv(turned) @ np.diag([*ZOOMS, 1.0])
    affine[:3, 3] = (-37.25, 12.5, 101.0)
    return TURN @ affine if oblique else affine


def save_nifti(
    path: Path, data: Array, affine: Array | None = None, *, qform: int = 1, sform: int = 2, kind: Any = nib.Nifti1Image
) -> Path:
    affine = nifti_affine("LAS") if affine is None else affine
    image = kind(data, affine)
    image.set_qform(affine, qform)
    image.set_sform(affine, sform)
    nib.save(image, path)
    return path


def patch_header(path: Path, **fields: Any) -> Path:
    """Overwrite fields of an uncompressed NIfTI-1 header on disk, where nibabel would refuse or repair them."""
    content = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.binaryblock
    path.write_bytes(bytes(content))
    return path


@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("axcodes", ["LAS", "RAS", "LPS", "PIR", "SAL", "RIA", "ARS"])
def test_nifti_is_canonical_and_every_voxel_keeps_its_place(
    tmp_path: Path, rng: np.random.Generator, axcodes: str, oblique: bool
) -> None:
    data = rng.normal(size=(5, 6, 7)).astype(np.float32)
    affine = nifti_affine(axcodes, oblique=oblique)
    volume = read_volume(save_nifti(tmp_path / "case.nii.gz", data, affine))
    assert volume.geometry.physical and volume.geometry.axcodes == "SPL"
    assert volume.image.dtype == torch.float32 and volume.image.shape[1] == 1
    stored = nib.load(tmp_path / "case.nii.gz").affine
    for index in itertools.product((0, 2, 4), (0, 3, 5), (0, 4, 6)):
        found = np.argwhere(volume.image[:, 0].numpy() == data[index])
        assert len(found) == 1
        np.testing.assert_allclose(world(volume.geometry.affine, found[0]), world(stored, index), atol=1e-9)
    assert sorted(np.round(volume.geometry.spacing, 5)) == sorted(ZOOMS)
    assert volume.slice_names == tuple(f"case_{index:03d}" for index in range(len(volume.image)))
    assert count_slices(tmp_path / "case.nii.gz") == len(volume.image)


@pytest.mark.parametrize(
    ("axcodes", "shape", "expected"),
    [
        ("PSR", (5, 6, 1), "LIP"), ("LPS", (1, 5, 6), "LIP"), ("RSA", (5, 6, 1), "PIL"), ("LAS", (5, 1, 6), "PIL"),
        ("LAS", (5, 6, 1), "SPL"), ("PSR", (5, 1, 1), "SPL"),
    ],
)  # fmt: skip
def test_one_slice_of_any_plane_stays_a_slice(
    tmp_path: Path, rng: np.random.Generator, axcodes: str, shape: tuple[int, ...], expected: str
) -> None:
    data = rng.normal(size=shape).astype(np.float32)
    path = save_nifti(tmp_path / "case.nii", data, nifti_affine(axcodes, oblique=True))
    volume = read_volume(path)
    assert volume.geometry.axcodes == expected
    if shape.count(1) == 1:
        assert len(volume.image) == 1
    stored = nib.load(path).affine
    for index in itertools.product(*(range(0, size, 2) for size in shape)):
        found = np.argwhere(volume.image[:, 0].numpy() == data[index])
        np.testing.assert_allclose(world(volume.geometry.affine, found[0]), world(stored, index), atol=1e-9)
    mask = (volume.image[:, 0] > 0).to(torch.uint8)
    (written,) = write_mask(mask, volume, tmp_path / "out", class_names=["a"])
    np.testing.assert_array_equal(np.asarray(nib.load(written).dataobj), data > 0)


@pytest.mark.parametrize("codes", [(1, 2), (1, 0), (0, 4), (0, 0)])
@pytest.mark.parametrize("axcodes", ["LAS", "RAS", "LPS", "PIR", "SRA", "RIA", "ARS"])
def test_nifti_mask_goes_back_to_the_input_grid(
    tmp_path: Path, rng: np.random.Generator, axcodes: str, codes: tuple[int, int]
) -> None:
    affine = nifti_affine(axcodes, oblique=True)
    path = save_nifti(tmp_path / "case.nii", rng.normal(size=(4, 5, 6)), affine, qform=codes[0], sform=codes[1])
    path = patch_header(path, descrip=PATIENT.encode(), scl_slope=2.0, scl_inter=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        volume = read_volume(path)
        mask = fresh_mask(volume, 3, rng)
        written = write_mask(mask, volume, tmp_path / "out", class_names=["a", "b", "c"])
        assert torch.equal(read_mask(written[0], like=volume), mask)
    assert [file.name for file in written] == ["case_mask.nii.gz"]
    raw = gzip.decompress(written[0].read_bytes())
    before = nib.Nifti1Header(path.read_bytes()[:348], check=False)
    after = nib.Nifti1Header(raw[:348], check=False)
    for name in ("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y",
                 "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units"):  # fmt: skip
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    assert after.get_data_dtype() == np.uint8 and after.get_data_shape() == (4, 5, 6)
    assert (after["scl_slope"], after["scl_inter"]) == (1, 0)
    assert PATIENT.encode() not in raw
    image = nib.load(written[0])
    np.testing.assert_array_equal(image.affine, nib.load(path).affine)
    point = (3, 1, 2)
    stored = np.asarray(image.dataobj)[point]
    place = np.linalg.inv(volume.geometry.affine) @ [*world(image.affine, point), 1]
    assert mask[tuple(np.rint(place[:3]).astype(int))] == stored


def test_nifti_probability_is_four_dimensional_for_several_classes(tmp_path: Path, rng: np.random.Generator) -> None:
    volume = read_volume(save_nifti(tmp_path / "case.nii.gz", rng.normal(size=(4, 5, 6)), nifti_affine("RPI")))
    mask = fresh_mask(volume, 2, rng)
    probability = torch.from_numpy(rng.random((6, 2, 5, 4)))
    written = write_mask(mask, volume, tmp_path / "out", class_names=["a", "b"], probability=probability)
    image = nib.load(written[1])
    assert image.shape == (4, 5, 6, 2) and image.get_data_dtype() == np.float32
    again = read_volume(written[1], channels_last=True)
    assert torch.equal(again.image, probability.float())
    np.testing.assert_array_equal(again.geometry.affine, volume.geometry.affine)
    written = write_mask(mask.clamp(max=1), volume, tmp_path / "one", class_names=["a"], probability=probability[:, :1])
    assert nib.load(written[1]).shape == (4, 5, 6)


def test_nifti_outputs_are_the_same_bytes_each_time(tmp_path: Path, rng: np.random.Generator) -> None:
    volume = read_volume(save_nifti(tmp_path / "case.nii.gz", rng.normal(size=(4, 5, 6))))
    mask = fresh_mask(volume, 1, rng)
    first, second = (write_mask(mask, volume, tmp_path / name, class_names=["a"])[0].read_bytes() for name in "xy")
    assert first == second


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<u1", ">f4", "<f8"])
def test_nifti_types_and_byte_orders(tmp_path: Path, rng: np.random.Generator, dtype: str, kind: Any) -> None:
    data = rng.integers(0, 120, (3, 4, 5)).astype(dtype)
    image = kind(data, np.diag([-1.0, 1, 1, 1]), kind.header_class(endianness=dtype[0]))
    image.set_data_dtype(dtype)
    nib.save(image, tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    np.testing.assert_array_equal(volume.image[:, 0].numpy(), data.transpose(2, 1, 0)[:, ::-1])
    mask = write_mask(fresh_mask(volume, 1, rng), volume, tmp_path / "out", class_names=["a"])[0]
    assert isinstance(nib.load(mask), kind)


def test_nifti_rescale_and_units(tmp_path: Path, rng: np.random.Generator) -> None:
    data = rng.integers(0, 100, (3, 4, 5)).astype(np.int16)
    path = patch_header(save_nifti(tmp_path / "a.nii", data, np.eye(4)), scl_slope=0.5, scl_inter=-7, xyzt_units=3)
    volume = read_volume(path)
    expected = data.transpose(2, 1, 0)[:, ::-1, ::-1] * 0.5 - 7
    np.testing.assert_array_equal(volume.image[:, 0].numpy(), expected.astype(np.float32))
    assert volume.geometry.spacing == (0.001, 0.001, 0.001)


def test_nifti_uses_the_sform_where_the_qform_disagrees(tmp_path: Path, rng: np.random.Generator) -> None:
    image = nib.Nifti1Image(rng.normal(size=(3, 4, 5)), np.eye(4))
    image.set_qform(np.diag([2.0, 2, 2, 1]), 1)
    image.set_sform(np.diag([3.0, 3, 3, 1]), 1)
    nib.save(image, tmp_path / "a.nii.gz")
    with pytest.warns(UserWarning, match=r"a\.nii\.gz: qform and sform disagree"):
        assert read_volume(tmp_path / "a.nii.gz").geometry.spacing == (3, 3, 3)


def test_nifti_without_orientation_is_a_warning(tmp_path: Path, rng: np.random.Generator) -> None:
    path = save_nifti(tmp_path / "a.nii", rng.normal(size=(3, 4, 5)), qform=0, sform=0)
    with pytest.warns(UserWarning, match=r"a\.nii: the header gives no orientation"):
        read_volume(path)


def test_four_and_five_dimensional_nifti(tmp_path: Path, rng: np.random.Generator) -> None:
    data = rng.normal(size=(3, 4, 5, 2)).astype(np.float32)
    path = save_nifti(tmp_path / "a.nii.gz", data, np.diag([-1.0, -1, 1, 1]))
    with pytest.raises(DataError, match=r"a\.nii\.gz: expected one volume, found shape \[3, 4, 5, 2\] with 2 time"):
        read_volume(path)
    expected = torch.from_numpy(data.transpose(2, 3, 1, 0).copy())
    assert torch.equal(read_volume(path, channels_last=True).image, expected)
    vector = save_nifti(tmp_path / "b.nii.gz", data[:, :, :, None], np.diag([-1.0, -1, 1, 1]))
    assert torch.equal(read_volume(vector).image, expected)
    single = save_nifti(tmp_path / "c.nii.gz", data[..., :1], np.diag([-1.0, -1, 1, 1]))
    assert torch.equal(read_volume(single).image, expected[:, :1])
    five = save_nifti(tmp_path / "d.nii.gz", rng.normal(size=(3, 4, 5, 2, 3)))
    with pytest.raises(DataError, match="time points"):
        read_volume(five, channels_last=True)


def nifti_not_finite(path: Path) -> None:
    data = np.ones((3, 4, 5), dtype=np.float32)
    data[0, 0, 0], data[1, 1, 2] = 2, np.nan
    save_nifti(path, data)


def nifti_overflow(path: Path) -> None:
    data = np.ones((3, 4, 5))
    data[0, 0, 0] = 1e300
    save_nifti(path, data)


def nifti_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def nifti_zero_dimension(path: Path) -> None:
    patch_header(path, dim=[3, 3, 0, 5, 1, 1, 1, 1])


def sheared(path: Path) -> None:
    affine = np.eye(4)
    affine[1, 2] = 0.2
    nib.save(nib.Nifti1Image(np.arange(60.0).reshape(3, 4, 5), affine), path)


def singular(path: Path) -> None:
    patch_header(path, srow_x=[1, 1, 0, 0], srow_y=[0, 0, 0, 0], srow_z=[0, 0, 1, 0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (nifti_not_finite, r"slice a_002 holds NaN or infinite"),
        (nifti_overflow, r"NaN or infinite"),
        (lambda p: save_nifti(p, np.full((3, 4, 5), 7.0)), "the image is constant"),
        (nifti_truncated, "truncated or corrupt NIfTI data"),
        (lambda p: p.write_bytes(p.read_bytes()[:100]), "not a single-file NIfTI"),
        (lambda p: p.write_bytes(b""), "not a single-file NIfTI"),
        (lambda p: p.write_bytes(gzip.compress(p.read_bytes())), "not a single-file NIfTI"),
        (lambda p: patch_header(p, magic=b"ni1"), "not a single-file NIfTI"),
        (lambda p: patch_header(p, datatype=1234), "broken NIfTI header"),
        (lambda p: patch_header(p, xyzt_units=4), "broken NIfTI header"),
        (lambda p: patch_header(p, scl_inter=np.inf), "broken NIfTI header"),
        (nifti_zero_dimension, "expected a volume of 3 dimensions"),
        (lambda p: save_nifti(p, np.arange(12.0).reshape(3, 4)), "expected a volume of 3 dimensions"),
        (lambda p: save_nifti(p, np.ones((3, 4, 5), dtype=np.complex64)), "expected one real number a voxel"),
        (lambda p: patch_header(p, pixdim=[1, 1, 0, 1, 1, 1, 1, 1]), "zero spacing"),
        (lambda p: patch_header(p, srow_y=[0, 1, 1, 0], srow_z=[0, 1, 1, 0]), "singular"),
        (lambda p: patch_header(p, srow_x=[0, 0, 0, 0], srow_y=[0, 0, 0, 0], srow_z=[0, 0, 1, 0]), "zero spacing"),
        (lambda p: patch_header(p, srow_x=[np.nan, 0, 0, 0]), "affine holds NaN"),
        (lambda p: patch_header(p, sform_code=0, quatern_b=0.9, quatern_c=0.9), "broken qform"),
        (sheared, "the affine is sheared"),
        (singular, "the affine is singular"),
    ],
)
def test_bad_nifti_is_refused_by_name(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    path = save_nifti(tmp_path / "a.nii", np.arange(60, dtype=np.float32).reshape(3, 4, 5), np.eye(4))
    damage(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=message) as error:
            read_volume(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("cut", [5, 200, -9, -4])
def test_truncated_gz_is_refused(tmp_path: Path, rng: np.random.Generator, cut: int) -> None:
    path = save_nifti(tmp_path / "a.nii.gz", rng.normal(size=(6, 7, 8)))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"a\.nii\.gz: .*(truncated|can't be opened)"):
        read_volume(path)


def test_flipped_bit_in_gz_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    path = save_nifti(tmp_path / "a.nii.gz", rng.normal(size=(6, 7, 8)))
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="truncated or corrupt"):
        read_volume(path)


# Channels


def test_channels_are_stacked_in_the_order_given(tmp_path: Path, rng: np.random.Generator) -> None:
    parts = [rng.normal(size=(4, 5, 6)).astype(np.float32) for _ in range(3)]
    affine = nifti_affine("LAS")
    paths = [save_nifti(tmp_path / f"m{i}.nii.gz", part, affine) for i, part in enumerate(parts)]
    volume = read_channels([paths[2], paths[0], paths[1]])
    assert volume.image.shape == (6, 3, 5, 4) and volume.source == paths[2]
    for channel, index in enumerate((2, 0, 1)):
        assert torch.equal(volume.image[:, channel : channel + 1], read_volume(paths[index]).image)
    write_mask(fresh_mask(volume, 1, rng), volume, tmp_path / "out", class_names=["a"])
    assert (tmp_path / "out" / "m2_mask.nii.gz").is_file()


def test_channels_stored_in_other_orientations_meet(tmp_path: Path, rng: np.random.Generator) -> None:
    data = rng.normal(size=(4, 5, 6)).astype(np.float32)
    first = save_nifti(tmp_path / "a.nii.gz", data, np.diag([1.0, 1, 2, 1]))
    flipped = np.diag([-1.0, 1, 2, 1])
    flipped[0, 3] = 3
    second = save_nifti(tmp_path / "b.nii.gz", data[::-1], flipped)
    volume = read_channels([first, second])
    assert torch.equal(volume.image[:, 0], volume.image[:, 1])


def test_channels_on_other_grids_are_refused_naming_both(tmp_path: Path, rng: np.random.Generator) -> None:
    first = save_nifti(tmp_path / "a.nii.gz", rng.normal(size=(4, 5, 6)), np.eye(4))
    larger = save_nifti(tmp_path / "b.nii.gz", rng.normal(size=(4, 5, 7)), np.eye(4))
    moved = np.eye(4)
    moved[0, 3] = 0.002
    shifted = save_nifti(tmp_path / "c.nii.gz", rng.normal(size=(4, 5, 6)), moved)
    moved[0, 3] = 0.0005
    near = save_nifti(tmp_path / "d.nii.gz", rng.normal(size=(4, 5, 6)), moved)
    with pytest.raises(DataError, match=r"b\.nii\.gz: 7 slices of 5 x 4, but .*a\.nii\.gz has 6 slices"):
        read_channels([first, larger])
    with pytest.raises(DataError, match=r"c\.nii\.gz: its affine differs from that of .*a\.nii\.gz by 0\.002 mm"):
        read_channels([first, shifted])
    assert read_channels([first, near]).image.shape[1] == 2
    with pytest.raises(DataError, match="expected at least one volume"):
        read_channels([])


# DICOM

AXIAL = (1, 0, 0, 0, 1, 0)
OBLIQUE = (1, 0, 0, 0, 0.98, 0.19899748742)
SAGITTAL = (0, 1, 0, 0, 0, -1)
CORONAL = (1, 0, 0, 0, 0, -1)
PRONE = (-1, 0, 0, 0, -1, 0)


def dicom_pixels(rng: np.random.Generator, slices: int = 5) -> Array:
    return rng.integers(0, 4000, (slices, 6, 7), dtype=np.uint16)


def save_series(
    folder: Path,
    pixels: Array,
    *,
    orientation: Sequence[float] = AXIAL,
    names: Sequence[str] | None = None,
    distance: float = 2.0,
    edit: Callable[[int, Dataset], None] | None = None,
) -> Path:
    """A CT series whose slice i lies i * distance along the normal; SliceThickness lies; file names as given."""
    folder.mkdir(parents=True, exist_ok=True)
    normal = np.cross(orientation[:3], orientation[3:])
    series, study, frame = "1.2.3.1", "1.2.3.2", "1.2.3.3"
    for index, plane in enumerate(pixels):
        header = Dataset()
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = CTImageStorage
        header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = f"1.2.3.4.{index + 1}"
        header.SeriesInstanceUID, header.StudyInstanceUID, header.FrameOfReferenceUID = series, study, frame
        header.PatientName, header.Modality, header.ImageType = PATIENT, "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
        header.ImageOrientationPatient = list(orientation)
        header.ImagePositionPatient = [round(float(x), 6) for x in (-30.5, -20.25, 100.0) + index * distance * normal]
        header.PixelSpacing, header.SliceThickness, header.InstanceNumber = [0.8, 0.7], 3.2, index + 1
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.Rows, header.Columns = plane.shape
        header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 12, 11, 0
        header.RescaleSlope, header.RescaleIntercept = 2, -1000
        header.PixelData = plane.tobytes()
        if edit is not None:
            edit(index, header)
        name = names[index] if names is not None else f"im_{index}.dcm"
        header.save_as(folder / name, enforce_file_format=True)
    return folder


def true_place(orientation: Sequence[float], index: Sequence[int], distance: float = 2.0) -> Array:
    """RAS+ mm of (slice, row, column) of `save_series`, by the formula of the standard."""
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    start = np.array((-30.5, -20.25, 100.0)) + index[0] * distance * np.cross(row, column)
    return (start + row * 0.7 * index[2] + column * 0.8 * index[1]) * (-1, -1, 1)


@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE, SAGITTAL, CORONAL, PRONE])
def test_dicom_voxels_keep_their_place(tmp_path: Path, rng: np.random.Generator, orientation: Sequence[float]) -> None:
    pixels = rng.permutation(5 * 6 * 7).reshape(5, 6, 7).astype(np.uint16)
    volume = read_volume(save_series(tmp_path / "s", pixels, orientation=orientation))
    assert volume.geometry.axcodes == ("SAR" if orientation == PRONE else "SPL")
    for index in itertools.product((0, 3, 4), (0, 2, 5), (0, 1, 6)):
        found = np.argwhere(volume.image[:, 0].numpy() == float(pixels[index]) * 2 - 1000)
        assert len(found) == 1
        np.testing.assert_allclose(world(volume.geometry.affine, found[0]), true_place(orientation, index), atol=1e-5)
    assert count_slices(tmp_path / "s") == len(volume.image)


def test_dicom_distance_is_from_positions(tmp_path: Path, rng: np.random.Generator) -> None:
    volume = read_volume(save_series(tmp_path / "s", dicom_pixels(rng), distance=2.5))
    np.testing.assert_allclose(volume.geometry.spacing, (2.5, 0.8, 0.7), atol=1e-9)
    assert volume.slice_names == ("im_0", "im_1", "im_2", "im_3", "im_4") == tuple(sorted(volume.slice_names))


def test_dicom_slices_run_towards_superior_whatever_the_files_do(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = dicom_pixels(rng)
    ordered = read_volume(save_series(tmp_path / "a", pixels))
    shuffled = [f"x{number}" for number in rng.permutation(5)]
    mixed = read_volume(save_series(tmp_path / "b", pixels, names=shuffled))
    assert torch.equal(mixed.image, ordered.image)
    np.testing.assert_array_equal(mixed.geometry.affine, ordered.geometry.affine)
    assert mixed.slice_names == tuple(shuffled)
    files = [tmp_path / "b" / name for name in reversed(shuffled)]
    assert torch.equal(read_volume(files).image, ordered.image)
    downwards = read_volume(save_series(tmp_path / "c", pixels, distance=-2.0))
    assert torch.equal(downwards.image, ordered.image.flip(0))
    assert downwards.geometry.axcodes == "SPL"


def test_dicom_named_by_uid_without_endings(tmp_path: Path, rng: np.random.Generator) -> None:
    names = [f"1.2.840.113.{number}" for number in (9, 10, 100, 2, 1)]
    volume = read_volume(save_series(tmp_path / "s", dicom_pixels(rng), names=names))
    assert volume.slice_names == tuple(names)
    (tmp_path / "s" / "notes.txt").write_text("passed over")
    (tmp_path / "s" / ".hidden").write_text("passed over")
    (tmp_path / "s" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    assert torch.equal(read_volume(tmp_path / "s").image, volume.image)
    (tmp_path / "s" / "IM12").write_bytes(b"")
    with pytest.raises(DataError, match="IM12: not a readable DICOM file"):
        read_volume(tmp_path / "s")


def test_monochrome1_is_inverted_but_for_units_and_rescale_is_by_slice(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    pixels = dicom_pixels(rng)

    def in_units(index: int, header: Dataset) -> None:
        header.PhotometricInterpretation, header.Modality = "MONOCHROME1", "CT"

    image = read_volume(save_series(tmp_path / "u", pixels, edit=in_units)).image[:, 0].numpy()
    np.testing.assert_array_equal(image, pixels.astype(np.float32) * 2 - 1000)

    def without_modality(index: int, header: Dataset) -> None:
        header.PhotometricInterpretation = "MONOCHROME1"
        del header.Modality

    image = read_volume(save_series(tmp_path / "w", pixels, edit=without_modality)).image[:, 0].numpy()
    np.testing.assert_array_equal(image, (4095 - pixels.astype(np.float32)) * 2 - 1000)

    def inverted(index: int, header: Dataset) -> None:
        header.PhotometricInterpretation, header.RescaleSlope, header.Modality = "MONOCHROME1", index + 1, "MR"

    image = read_volume(save_series(tmp_path / "s", pixels, edit=inverted)).image[:, 0].numpy()
    slope = np.arange(1, 6)[:, None, None]
    np.testing.assert_array_equal(image, (4095 - pixels.astype(np.float32)) * slope - 1000)

    def signed(index: int, header: Dataset) -> None:
        header.PhotometricInterpretation, header.PixelRepresentation, header.BitsStored = "MONOCHROME1", 1, 16
        header.Modality = "MR"
        header.HighBit, header.PixelData = 15, (pixels[index].astype(np.int16) - 2000).tobytes()

    image = read_volume(save_series(tmp_path / "t", pixels, edit=signed)).image[:, 0].numpy()
    np.testing.assert_array_equal(image, (-1 - (pixels.astype(np.float32) - 2000)) * 2 - 1000)


@pytest.mark.parametrize("orientation", [AXIAL, SAGITTAL])
def test_single_dicom_slice_is_a_warning(
    tmp_path: Path, rng: np.random.Generator, orientation: Sequence[float]
) -> None:
    folder = save_series(tmp_path / "s", dicom_pixels(rng, slices=1), orientation=orientation)
    with pytest.warns(UserWarning, match="1 mm is assumed"):
        volume = read_volume(folder / "im_0.dcm")
    assert volume.image.shape == (1, 1, 6, 7) and volume.slice_names == ("im_0",)
    assert volume.geometry.spacing == pytest.approx((1, 0.8, 0.7))


def test_patient_names_stay_out_of_logs_and_messages(
    tmp_path: Path, rng: np.random.Generator, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    pytest.importorskip("highdicom")
    # Beyond 64 letters pydicom finds fault with a name and quotes it.
    with pydicom.config.disable_value_validation():
        edit = at(-1, PatientName="SECRET" * 20, PatientID="SECRET" * 20, AccessionNumber="SECRET" * 20)
        folder = save_series(tmp_path / "s", dicom_pixels(rng), edit=edit)
    volume = read_volume(folder)
    (path,) = write_mask(fresh_mask(volume, 1, rng), volume, tmp_path / "out", class_names=["liver"])
    said = [caplog.text, repr(volume), *(str(warning.message) for warning in recwarn)]
    assert not [text for text in said if "SECRET" in text]
    with pydicom.config.disable_value_validation():
        assert "SECRET" in str(pydicom.dcmread(path).PatientName)


def test_lossy_dicom_is_a_warning(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = save_series(tmp_path / "s", dicom_pixels(rng), edit=lambda i, h: setattr(h, "LossyImageCompression", "01"))
    with pytest.warns(UserWarning, match="compressed with loss"):
        read_volume(folder)


def at(position: int, **fields: Any) -> Callable[[int, Dataset], None]:
    """Set fields (None: remove) of one file of the series; a negative position: of all."""

    def edit(index: int, header: Dataset) -> None:
        if position in (index, -1):
            for keyword, value in fields.items():
                if value is None:
                    delattr(header, keyword)
                else:
                    setattr(header, keyword, value)

    return edit


def height(position: int, z: float) -> Callable[[int, Dataset], None]:
    return at(position, ImagePositionPatient=[-30.5, -20.25, z])


def tilted(index: int, header: Dataset) -> None:
    header.ImagePositionPatient = [-30.5, -20.25 + 0.5 * index, 100.0 + 2 * index]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (at(3, SeriesInstanceUID="1.9"), "mixed series, im_0.dcm and im_3.dcm differ"),
        (at(-1, SeriesInstanceUID=None), "no SeriesInstanceUID"),
        (at(2, FrameOfReferenceUID="1.9"), "mixed frames of reference, im_0.dcm and im_2.dcm"),
        (at(2, ImageOrientationPatient=list(SAGITTAL)), "mixed orientations, im_0.dcm and im_2.dcm"),
        (at(4, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "im_4.dcm: a localiser"),
        (at(2, PixelSpacing=[0.9, 0.7]), "mixed pixel spacings, im_0.dcm and im_2.dcm"),
        (at(2, Rows=3, PixelData=bytes(42)), "mixed image sizes, im_0.dcm and im_2.dcm"),
        (at(1, PixelSpacing=None), "im_1.dcm: PixelSpacing is missing"),
        (at(1, ImagePositionPatient=None), "im_1.dcm: ImagePositionPatient is missing"),
        (at(1, ImageOrientationPatient=None), "im_1.dcm: ImageOrientationPatient is missing"),
        (at(1, ImagePositionPatient=[1, 2]), "im_1.dcm: ImagePositionPatient is missing or not 3 numbers"),
        (at(-1, PixelSpacing=[0, 0.7]), "zero spacing along axis 1"),
        (at(-1, ImageOrientationPatient=[1, 0, 0, 0.5, 1, 0]), "not two perpendicular unit vectors"),
        (height(4, 110.0), r"4 mm between im_3.dcm and im_4.dcm, but 2 mm between most"),
        (height(2, 104.03), "missing or out of place"),
        (height(3, 104.0), r"im_2.dcm and im_3.dcm have the same position"),
        (at(2, ImagePositionPatient=[-30.0, -20.25, 104.0]), "im_2.dcm lies 0.5 mm off the line"),
        (tilted, "the affine is sheared"),
        (at(0, NumberOfFrames=2), "im_0.dcm: multi-frame DICOM is not read"),
        (at(0, PhotometricInterpretation="RGB"), "im_0.dcm: colour DICOM"),
        (at(1, ImageType="LOCALIZER"), "im_1.dcm: a localiser"),
        (at(0, Rows=None), "im_0.dcm: a DICOM file without an image"),
        (at(2, PixelData=bytes(40)), "im_2.dcm: the pixel data can't be decoded"),
        (at(2, PixelData=None), "im_2.dcm: the pixel data can't be decoded"),
        (at(-1, PixelData=bytes(84)), "the image is constant"),
    ],
)
def test_bad_dicom_is_refused_by_name(
    tmp_path: Path, rng: np.random.Generator, edit: Callable[[int, Dataset], None], message: str
) -> None:
    folder = save_series(tmp_path / "s", dicom_pixels(rng), edit=edit)
    with pytest.raises(DataError, match=message) as error:
        read_volume(folder)
    assert str(folder) in str(error.value)
    assert "SECRET" not in str(error.value) and "1.2.3" not in str(error.value)


def test_rounded_dicom_positions_pass(tmp_path: Path, rng: np.random.Generator) -> None:
    heights = np.round(100 + 0.625 * np.arange(5), 2)
    folder = save_series(tmp_path / "s", dicom_pixels(rng), edit=lambda i, h: height(i, heights[i])(i, h))
    assert read_volume(folder).geometry.spacing[0] == pytest.approx(0.625)


@pytest.mark.parametrize("keep", [0, 100, 140, 400, -20])
def test_truncated_dicom_is_refused_by_name(tmp_path: Path, rng: np.random.Generator, keep: int) -> None:
    folder = save_series(tmp_path / "s", dicom_pixels(rng))
    path = folder / "im_1.dcm"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"im_1\.dcm") as error:
        read_volume(folder)
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize("case", ["nifti", "dicom", "png", "tiff"])
def test_damaged_bytes_are_read_or_refused_but_never_crash(tmp_path: Path, rng: np.random.Generator, case: str) -> None:
    pixels = dicom_pixels(rng, slices=1)
    path = tmp_path / {"nifti": "a.nii", "dicom": "s/im_0.dcm", "png": "a.png", "tiff": "a.tif"}[case]
    if case == "nifti":
        save_nifti(path, pixels[0][:, :, None])
    elif case == "dicom":
        save_series(path.parent, pixels)
    else:
        Image.fromarray(pixels[0]).save(path)
    content = path.read_bytes()
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content) - 84 if case in ("nifti", "dicom") else len(content), 4):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(bytes(damaged))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                outcomes.add(bool(torch.isfinite(read_volume(path).image).all()))
            except DataError as error:
                assert path.parent.name in str(error)
                outcomes.add("refused")
    assert "refused" in outcomes and False not in outcomes


def test_missing_slice_of_a_longer_series_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = save_series(tmp_path / "s", dicom_pixels(rng, slices=9))
    (folder / "im_4.dcm").unlink()
    with pytest.raises(DataError, match=r"4 mm between im_3\.dcm and im_5\.dcm"):
        read_volume(folder)


# DICOM SEG


def seg_frames(path: Path) -> list[tuple[int, tuple[float, ...], str, Array]]:
    """(segment, position, UID of the source image, pixels) of every frame, by pydicom alone."""
    segmentation = pydicom.dcmread(path)
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    frames = segmentation.pixel_array.reshape(-1, segmentation.Rows, segmentation.Columns)
    return [
        (
            int(
                (group if "SegmentIdentificationSequence" in group else shared)
                .SegmentIdentificationSequence[0]
                .ReferencedSegmentNumber
            ),
            tuple(float(x) for x in group.PlanePositionSequence[0].ImagePositionPatient),
            str(group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID),
            frame,
        )
        for group, frame in zip(segmentation.PerFrameFunctionalGroupsSequence, frames, strict=True)
    ]


@pytest.mark.parametrize("distance", [2.0, -2.0])
@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE, SAGITTAL])
def test_seg_frames_lie_on_their_source_images(
    tmp_path: Path, rng: np.random.Generator, orientation: Sequence[float], distance: float
) -> None:
    pytest.importorskip("highdicom")
    names = [f"x{number}" for number in rng.permutation(5)]
    pixels = rng.permutation(5 * 6 * 7).reshape(5, 6, 7).astype(np.uint16)
    folder = save_series(tmp_path / "s", pixels, orientation=orientation, names=names, distance=distance)
    volume = read_volume(folder)
    # The class is a function of the stored value, so that every frame can be checked against its own source image.
    mask = ((volume.image[:, 0] + 1000) / 2 % 3).to(torch.uint8)
    (path,) = write_mask(mask, volume, tmp_path / "out", class_names=["liver", "spleen"])
    assert path.name == "s_mask.dcm"
    sources = {str(h.SOPInstanceUID): h for h in (pydicom.dcmread(folder / name) for name in names)}
    frames = seg_frames(path)
    assert len(frames) == 2 * 5
    for segment, position, uid, frame in frames:
        assert position == tuple(float(x) for x in sources[uid].ImagePositionPatient)
        np.testing.assert_array_equal(frame, sources[uid].pixel_array % 3 == segment)


def test_seg_does_not_depend_on_file_order(tmp_path: Path, rng: np.random.Generator) -> None:
    pytest.importorskip("highdicom")
    pixels = dicom_pixels(rng)
    mask = torch.from_numpy(rng.integers(0, 2, (5, 6, 7), dtype=np.uint8))
    frames = []
    for name, order in (("a", range(5)), ("b", rng.permutation(5))):
        volume = read_volume(save_series(tmp_path / name, pixels, names=[f"x{i}" for i in order]))
        frames.append(seg_frames(write_mask(mask, volume, tmp_path / "out", class_names=["liver"])[0]))
    for one, other in zip(*frames, strict=True):
        assert one[:3] == other[:3]
        np.testing.assert_array_equal(one[3], other[3])


def test_seg_says_what_it_is(tmp_path: Path, rng: np.random.Generator) -> None:
    pytest.importorskip("highdicom")
    volume = read_volume(save_series(tmp_path / "s", dicom_pixels(rng)))
    names = ["liver", "Spleen", "right_kidney", "left kidney", "tumour", "lesion", "something else"]
    empty = torch.zeros(5, 6, 7, dtype=torch.uint8)
    probability = torch.from_numpy(rng.random((5, 7, 6, 7)))
    paths = write_mask(empty, volume, tmp_path / "out", class_names=names, probability=probability)
    binary, fractional = (pydicom.dcmread(path) for path in paths)
    assert (binary.SegmentationType, fractional.SegmentationType) == ("BINARY", "FRACTIONAL")
    codes = [s.SegmentedPropertyTypeCodeSequence[0].CodeValue for s in binary.SegmentSequence]
    assert codes == ["10200004", "78961009", "9846003", "18639004", "108369006", "52988006", "85756007"]
    assert [segment.SegmentLabel for segment in binary.SegmentSequence] == names
    segment = binary.SegmentSequence[0]
    assert segment.SegmentAlgorithmType == "AUTOMATIC"
    assert segment.SegmentationAlgorithmIdentificationSequence[0].AlgorithmName == "CLDF"
    assert binary.ContentQualification == "RESEARCH"
    assert "not to be used for diagnostic purposes" in binary.ContentDescription
    measures = binary.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert (float(measures.SliceThickness), float(measures.SpacingBetweenSlices)) == pytest.approx((2.0, 2.0))
    assert int(binary.NumberOfFrames) == 35
    assert binary.SeriesInstanceUID != fractional.SeriesInstanceUID
    for segment_number, position, _, frame in seg_frames(paths[1]):
        index = round((position[2] - 100) / 2)
        expected = probability[index, segment_number - 1].numpy()
        np.testing.assert_allclose(frame / 255, expected, atol=1 / 255)


def test_seg_omits_empty_frames_only_where_there_are_many(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("highdicom")
    monkeypatch.setattr(dicom, "_MAX_EMPTY_FRAMES", 10)
    volume = read_volume(save_series(tmp_path / "s", dicom_pixels(rng, slices=5)))
    mask = torch.zeros(5, 6, 7, dtype=torch.uint8)
    mask[2, 1:3, 1:3] = 1
    for classes, frames in ((2, 10), (3, 1)):
        names = [f"class {number}" for number in range(classes)]
        (path,) = write_mask(mask, volume, tmp_path / "out", class_names=names)
        assert int(pydicom.dcmread(path).NumberOfFrames) == frames


def test_seg_of_a_bare_source_can_be_written_twice(tmp_path: Path, rng: np.random.Generator) -> None:
    pytest.importorskip("highdicom")
    bare = at(-1, SliceThickness=None, PatientName=None, InstanceNumber=None)
    volume = read_volume(save_series(tmp_path / "s", dicom_pixels(rng), edit=bare))
    mask = fresh_mask(volume, 1, rng)
    for name in ("first", "second"):
        frames = seg_frames(write_mask(mask, volume, tmp_path / name, class_names=["liver"])[0])
        frames.sort(key=lambda frame: frame[1][2])
        np.testing.assert_array_equal(np.stack([frame for *_, frame in frames]), mask.numpy())
    with pytest.warns(UserWarning, match="1 mm is assumed"):
        single = read_volume([tmp_path / "s" / "im_2.dcm"])
    (path,) = write_mask(mask[2:3], single, tmp_path / "third", class_names=["liver"])
    np.testing.assert_array_equal(seg_frames(path)[0][3], mask[2].numpy())


def test_seg_needs_the_uids_of_its_source(tmp_path: Path, rng: np.random.Generator) -> None:
    pytest.importorskip("highdicom")
    folder = save_series(tmp_path / "s", dicom_pixels(rng), edit=at(-1, FrameOfReferenceUID=None))
    volume = read_volume(folder)
    with pytest.raises(DataError, match=r"im_0\.dcm: no FrameOfReferenceUID"):
        write_mask(fresh_mask(volume, 1, rng), volume, tmp_path / "out", class_names=["liver"])


def test_seg_without_highdicom_says_what_to_install(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = read_volume(save_series(tmp_path / "s", dicom_pixels(rng)))
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(BackendError, match=r"pip install cldf_fast\[dicom\]"):
        write_mask(fresh_mask(volume, 1, rng), volume, tmp_path / "out", class_names=["liver"])


# PNG and TIFF


@pytest.mark.parametrize("ending", [".png", ".tif", ".TIFF"])
@pytest.mark.parametrize("kind", ["grey", "rgb", "grey16"])
def test_slices_in_natural_order_and_back(tmp_path: Path, rng: np.random.Generator, ending: str, kind: str) -> None:
    shape = (3, 5, 6, 3) if kind == "rgb" else (3, 5, 6)
    pixels = rng.integers(0, 60000 if kind == "grey16" else 256, shape).astype(
        np.uint16 if kind == "grey16" else np.uint8
    )
    folder = tmp_path / "study"
    folder.mkdir()
    for index, number in enumerate((1, 2, 10)):
        Image.fromarray(pixels[index]).save(folder / f"case_{number}{ending}")
    (folder / "readme.md").write_text("passed over")
    volume = read_volume(folder)
    assert volume.slice_names == ("case_1", "case_2", "case_10") and not volume.geometry.physical
    expected = pixels.transpose(0, 3, 1, 2) if kind == "rgb" else pixels[:, None]
    np.testing.assert_array_equal(volume.image.numpy(), expected.astype(np.float32))
    assert torch.equal(read_volume(sorted(folder.glob(f"*{ending}"))).image, volume.image)
    assert count_slices(folder) == 3

    mask = fresh_mask(volume, 2, rng)
    probability = torch.from_numpy(rng.random((3, 2, 5, 6)))
    out = tmp_path / "out"
    written = write_mask(mask, volume, out, class_names=["a", "b/c"], probability=probability)
    assert {file.name for file in written} == {file.name for file in out.iterdir()}
    assert {f"case_10_mask{ending}", f"case_10_a_probability{ending}", f"case_10_b_c_probability{ending}"} <= {
        file.name for file in written
    }
    assert torch.equal(read_mask(out, like=volume), mask)
    with Image.open(out / f"case_2_mask{ending}") as image:
        assert image.size == (6, 5) and image.mode == "P"
    with Image.open(out / f"case_2_b_c_probability{ending}") as image:
        levels = np.asarray(image).astype(np.float64) / (65535 if ending == ".png" else 1)
    np.testing.assert_allclose(levels, probability[1, 1].numpy(), atol=1e-5)


def test_single_image_file(tmp_path: Path, rng: np.random.Generator) -> None:
    Image.fromarray(rng.integers(0, 256, (5, 6), dtype=np.uint8)).save(tmp_path / "one.png")
    volume = read_volume(str(tmp_path / "one.png"))
    assert volume.image.shape == (1, 1, 5, 6) and volume.slice_names == ("one",)
    probability = torch.ones(1, 1, 5, 6)
    mask = torch.ones(1, 5, 6, dtype=torch.uint8)
    written = write_mask(mask, volume, tmp_path / "out", class_names=["a"], probability=probability)
    assert [file.name for file in written] == ["one_mask.png", "one_probability.png"]


def test_masks_beside_images_are_told_apart(tmp_path: Path, rng: np.random.Generator) -> None:
    for number in (1, 2, 10):
        Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).save(tmp_path / f"c_{number}.tif")
        Image.fromarray(np.full((5, 6), number, dtype=np.uint8)).save(tmp_path / f"c_{number}_mask.tif")
    volume = read_volume(tmp_path)
    assert volume.image.shape == (3, 3, 5, 6)
    assert read_mask(tmp_path, like=volume)[:, 0, 0].tolist() == [1, 2, 10]


def save_image(path: Path, mode: str, **options: Any) -> None:
    Image.fromarray(np.arange(30, dtype=np.uint8).reshape(5, 6)).convert(mode).save(path, **options)


def exif_rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    save_image(path, "L", exif=exif)


def two_pages(path: Path) -> None:
    page = Image.fromarray(np.arange(30, dtype=np.uint8).reshape(5, 6))
    page.save(path, save_all=True, append_images=[page.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])


def corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[45] ^= 0xFF
    path.write_bytes(bytes(content))


def sixteen_bit_colour(path: Path) -> None:
    """Pillow can't write this PNG, and reads it as 8 bits: one row of one pixel."""
    save_png(path, bytes(7), 1, 1, bits=16, colour=2)


def save_png(
    path: Path, rows: bytes, height: int, width: int, *, bits: int = 8, colour: int = 0, interlaced: int = 0
) -> Path:
    """By hand: rows, each behind a byte of 0, in two IDAT chunks, under a header that need not fit."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packed = zlib.compress(rows)
    chunks = [
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)),
        chunk(b"IDAT", packed[:7]),
        chunk(b"IDAT", packed[7:]),
        chunk(b"IEND", b""),
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


def png_rows(pixels: Array) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in pixels)


def adam7(pixels: Array) -> bytes:
    """The rows of an interlaced PNG, by the figure in its specification."""
    figure = ["16462646", "77777777", "56565656", "77777777", "36463646", "77777777", "56565656", "77777777"]
    height, width = pixels.shape[:2]
    passes = np.tile([list(row) for row in figure], (5, 5))[:height, :width]
    return b"".join(
        png_rows([row[chosen] for row, chosen in zip(pixels, passes == number, strict=True) if chosen.any()])
        for number in "1234567"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:60]), "truncated or corrupt PNG"),
        (lambda p: p.write_bytes(b""), "truncated or corrupt PNG"),
        (corrupt, "truncated or corrupt PNG"),
        (lambda p: save_image(p, "P"), "found Pillow mode P"),
        (lambda p: save_image(p, "RGBA"), "found Pillow mode RGBA"),
        (lambda p: save_image(p, "LA"), "found Pillow mode LA"),
        (lambda p: save_image(p, "L", format="JPEG"), "named as PNG but holds JPEG"),
        (two_pages, "2 pages in one file"),
        (exif_rotated, "carries an EXIF rotation"),
        (sixteen_bit_colour, "16 bits a sample in RGB"),
        (lambda p: Image.fromarray(np.zeros((5, 7), dtype=np.uint8)).save(p), "1 channel of 5 x 7 pixels, but s_1.png"),
        (lambda p: save_image(p, "RGB"), "3 channels of 5 x 6 pixels, but s_1.png"),
    ],
)
def test_bad_image_is_refused_by_name(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    for number in (1, 2):
        save_image(tmp_path / f"s_{number}.png", "L")
    damage(tmp_path / "s_2.png")
    with pytest.raises(DataError, match=message) as error:
        read_volume(tmp_path)
    assert str(tmp_path / "s_2.png") in str(error.value)


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (6, 6, "the header calls for 42 bytes, the file holds 35; copy"),
        (9999, 6, "the header calls for 69993 bytes, the file holds 35; copy"),
        (4, 6, "the header calls for 28 bytes, the file holds 35 or more; copy"),
        # Rows of 6 pixels read as rows of 3 or 4.
        (5, 3, "the header calls for 20 bytes, the file holds 35 or more; copy"),
        (8, 4, "the header calls for 40 bytes, the file holds 35; copy"),
    ],
)
def test_a_png_whose_header_does_not_fit_its_rows_is_refused(
    tmp_path: Path, height: int, width: int, message: str
) -> None:
    """Pillow takes it, with black rows for those that are missing."""
    path = save_png(tmp_path / "a.png", png_rows(np.zeros((5, 6), np.uint8)), height, width)
    with pytest.raises(DataError, match=rf"a\.png: corrupt PNG file: {message}") as error:
        read_volume(path)
    assert error.value.code == "corrupt_file"
    with pytest.raises(DataError, match=message):
        read_mask(path)


def test_a_png_that_unpacks_to_more_than_it_should_takes_no_memory(tmp_path: Path) -> None:
    rows = png_rows(np.arange(30, dtype=np.uint8).reshape(5, 6))
    path = save_png(tmp_path / "a.png", rows + bytes(1 << 28), 5, 6)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"calls for 35 bytes, the file holds \d+ or more"):
        read_volume(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 24


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2), (5, 6), (3, 9), (8, 8), (17, 33), (33, 4)])
@pytest.mark.parametrize("kind", ["8", "16", "bit", "RGB"])
def test_sound_pngs_are_read_interlaced_or_not(
    tmp_path: Path, rng: np.random.Generator, height: int, width: int, kind: str
) -> None:
    if kind == "RGB":
        pixels, options = rng.integers(0, 256, (height, width, 3), np.uint8), {"colour": 2}
    elif kind == "16":
        pixels, options = rng.integers(0, 1 << 16, (height, width)).astype(">u2"), {"bits": 16}
    else:
        pixels, options = rng.integers(0, 256, (height, width), np.uint8), {}
    rows = png_rows(pixels)
    if kind == "bit":
        pixels = rng.integers(0, 2, (height, width), np.uint8)
        rows, options = png_rows(np.packbits(pixels, axis=1)), {"bits": 1}
    path = save_png(tmp_path / "a.png", rows, height, width, **options)
    np.testing.assert_array_equal(images._read(path, "PNG", False), np.moveaxis(np.atleast_3d(pixels), 2, 0))
    if kind != "bit":  # where rows of a pass do not fill their bytes
        path = save_png(tmp_path / "b.png", adam7(pixels), height, width, interlaced=1, **options)
        np.testing.assert_array_equal(images._read(path, "PNG", False), np.moveaxis(np.atleast_3d(pixels), 2, 0))
        save_png(path, adam7(pixels)[:-1], height, width, interlaced=1, **options)
        with pytest.raises(DataError, match="corrupt PNG file"):
            images._read(path, "PNG", False)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate"])
def test_a_tiff_whose_strips_do_not_cover_it_is_refused(tmp_path: Path, compression: str | None) -> None:
    """Uncompressed, Pillow takes it, with black rows for those that are missing."""
    path = tmp_path / "a.tif"
    Image.fromarray(np.full((5, 6), 200, np.uint8)).save(path, compression=compression)
    data = bytearray(path.read_bytes())
    directory = struct.unpack_from("<I", data, 4)[0]
    for entry in range(directory + 2, directory + 2 + 12 * struct.unpack_from("<H", data, directory)[0], 12):
        if struct.unpack_from("<H", data, entry)[0] == 257:  # ImageLength
            assert data[entry + 8] == 5
            data[entry + 8] = 7
    path.write_bytes(bytes(data))
    message = "the header calls for 42 pixels, the file holds 30; copy" if compression is None else "corrupt TIFF file"
    with pytest.raises(DataError, match=rf"a\.tif: .*{message}") as error:
        read_volume(path)
    assert error.value.code == "corrupt_file"


def test_float_tiff_and_its_bad_values(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.normal(size=(5, 6)).astype(np.float32)
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.tif").image[0, 0].numpy(), pixels)
    pixels[2, 3] = np.inf
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif: slice a holds NaN or infinite"):
        read_volume(tmp_path / "a.tif")


# What a path may stand for


def test_bad_selections_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    with pytest.raises(DataError, match=r"none\.nii\.gz: no such file or folder"):
        read_volume(tmp_path / "none.nii.gz")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("")
    (tmp_path / "empty" / "sub").mkdir()
    with pytest.raises(DataError, match="found none"):
        read_volume(tmp_path / "empty")
    with pytest.raises(DataError, match="empty list"):
        read_volume([])
    with pytest.raises(DataError, match=r"notes\.txt: format not known"):
        read_volume(tmp_path / "empty" / "notes.txt")
    save_image(tmp_path / "a.jpg", "L")
    with pytest.raises(DataError, match=r"a\.jpg: JPEG is not read"):
        read_volume(tmp_path / "a.jpg")
    save_image(tmp_path / "a.png", "L")
    save_image(tmp_path / "b.tif", "L")
    with pytest.raises(DataError, match=r"a\.png is PNG, b\.tif is TIFF"):
        read_volume([tmp_path / "b.tif", tmp_path / "a.png"])
    with pytest.raises(DataError, match="two slices of the same name"):
        read_volume([tmp_path / "a.png", tmp_path / "a.png"])
    first = save_nifti(tmp_path / "a.nii.gz", rng.normal(size=(3, 4, 5)))
    second = save_nifti(tmp_path / "b.nii.gz", rng.normal(size=(3, 4, 5)))
    with pytest.raises(DataError, match="2 NIfTI files"):
        read_volume([first, second])


# Masks


def test_mask_values_must_be_classes(tmp_path: Path) -> None:
    for name, data in {
        "fraction": np.full((3, 4, 5), 0.5),
        "negative": np.full((3, 4, 5), -1.0),
        "large": np.full((3, 4, 5), 256, dtype=np.int16),
        "nan": np.full((3, 4, 5), np.nan),
    }.items():
        with pytest.raises(DataError, match=rf"{name}\.nii\.gz: .*expected integers in 0\.\.255"):
            read_mask(save_nifti(tmp_path / f"{name}.nii.gz", data))
    assert not read_mask(save_nifti(tmp_path / "zero.nii.gz", np.zeros((3, 4, 5)))).any()


def test_mask_grid_is_checked(tmp_path: Path, rng: np.random.Generator) -> None:
    volume = read_volume(save_nifti(tmp_path / "a.nii.gz", rng.normal(size=(3, 4, 5)), np.eye(4)))
    zeros = np.zeros((3, 4, 5), dtype=np.uint8)
    with pytest.raises(DataError, match=r"m\.nii\.gz: its affine differs from that of .*a\.nii\.gz"):
        read_mask(save_nifti(tmp_path / "m.nii.gz", zeros, np.diag([1.0, 1, 1.5, 1])), like=volume)
    with pytest.raises(DataError, match=r"n\.nii\.gz: mask of shape \[4, 4, 3\]"):
        read_mask(save_nifti(tmp_path / "n.nii.gz", zeros[:, :, :4], np.eye(4)), like=volume)
    for index in range(5):
        Image.fromarray(zeros[:, :, 0].T).save(tmp_path / f"{index}.png")
    with pytest.raises(DataError, match="carry no position"):
        read_mask(sorted(tmp_path.glob("*.png")), like=volume)


def test_image_masks_pair_with_dicom_files_by_name(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = dicom_pixels(rng)
    names = [f"i{number:04d}" for number in (5, 4, 3, 2, 1)]
    volume = read_volume(save_series(tmp_path / "s", pixels, names=names))
    folder = tmp_path / "Ground"
    folder.mkdir()
    for number, plane in enumerate(reversed(pixels)):
        Image.fromarray(((plane > 2000) * 255).astype(np.uint8)).save(folder / f"gt_{number}.png")
    mask = read_mask(folder, like=volume)
    assert torch.equal(mask == 255, volume.image[:, 0] > 3000)


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16"])
def test_mask_modes(tmp_path: Path, rng: np.random.Generator, mode: str) -> None:
    values = rng.integers(0, 2, (5, 6), dtype=np.uint8)
    image = Image.fromarray(
        values.astype(bool) if mode == "1" else values.astype(np.uint16 if ";" in mode else np.uint8)
    )
    if mode == "P":
        image.putpalette([9, 9, 9, 250, 120, 30])
    assert image.mode == mode
    image.save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png")[0].numpy(), values)


def test_masks_that_lose_classes_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    save_image(tmp_path / "m.jpg", "L")
    with pytest.raises(DataError, match=r"m\.jpg: JPEG is lossy"):
        read_mask(tmp_path / "m.jpg")
    save_image(tmp_path / "m.png", "L", format="JPEG")
    with pytest.raises(DataError, match=r"m\.png: JPEG compression is lossy"):
        read_mask(tmp_path / "m.png")
    save_image(tmp_path / "m.tif", "L", compression="jpeg")
    with pytest.raises(DataError, match=r"m\.tif: JPEG compression is lossy"):
        read_mask(tmp_path / "m.tif")
    save_image(tmp_path / "rgb.png", "RGB")
    with pytest.raises(DataError, match="found Pillow mode RGB"):
        read_mask(tmp_path / "rgb.png")
    save_image(tmp_path / "four.png", "L", bits=4)
    with pytest.raises(DataError, match="4 bits a sample"):
        read_mask(tmp_path / "four.png")
    folder = save_series(tmp_path / "s", dicom_pixels(rng))
    with pytest.raises(DataError, match="masks are read from NIfTI, PNG or TIFF"):
        read_mask(folder)
    vector = save_nifti(tmp_path / "v.nii.gz", np.zeros((3, 4, 5, 1, 2)))
    with pytest.raises(DataError, match="expected a mask of one channel, found 2"):
        read_mask(vector)


def test_write_mask_refuses_what_does_not_fit(tmp_path: Path, rng: np.random.Generator) -> None:
    volume = read_volume(save_nifti(tmp_path / "a.nii.gz", rng.normal(size=(3, 4, 5))))
    mask = torch.zeros(5, 4, 3, dtype=torch.uint8)
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"mask: expected uint8 \[5, 4, 3\], got int64 \[5, 4, 3\]"):
        write_mask(mask.long(), volume, out, class_names=["a"])
    with pytest.raises(DataError, match=r"mask: expected uint8 \[5, 4, 3\], got uint8 \[3, 4, 5\]"):
        write_mask(mask.permute(2, 1, 0), volume, out, class_names=["a"])
    with pytest.raises(DataError, match="class_names: expected at least one class"):
        write_mask(mask, volume, out, class_names=[])
    with pytest.raises(DataError, match="mask: value 2, but there are 1 class names"):
        write_mask(mask + 2, volume, out, class_names=["a"])
    with pytest.raises(DataError, match=r"probability: expected float \[5, 1, 4, 3\]"):
        write_mask(mask, volume, out, class_names=["a"], probability=torch.zeros(5, 4, 3))
    for value in (1.5, -0.1, float("nan")):
        with pytest.raises(DataError, match=r"probability: expected values in \[0, 1\]"):
            write_mask(mask, volume, out, class_names=["a"], probability=torch.full((5, 1, 4, 3), value))
    with pytest.raises(DataError, match=r"out: .* is the input's own folder"):
        write_mask(mask, volume, tmp_path / "out" / "..", class_names=["a"])
    assert not out.exists() or not list(out.iterdir())


def test_failed_write_leaves_no_file(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = read_volume(save_nifti(tmp_path / "a.nii.gz", rng.normal(size=(3, 4, 5))))

    def full_disk(image: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(nib, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_mask(fresh_mask(volume, 1, rng), volume, tmp_path / "out", class_names=["a"])
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("module", [stacks, grid, nifti, dicom, images])
def test_image_libraries_are_imported_by_use_only(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text())
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert imports
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in imports if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & {"nibabel", "pydicom", "PIL", "highdicom"}


# Real images


def test_chaos_ct(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "chaos_ct_set3"
    volume = read_volume(folder / "DICOM_anon")
    assert volume.image.shape == (78, 1, 512, 512) and volume.geometry.axcodes == "SPL"
    assert volume.geometry.spacing == pytest.approx((2.0, 0.7265625, 0.7265625), abs=1e-6)
    assert volume.slice_names[0].startswith("i0077") and volume.slice_names[-1].startswith("i0000")
    truth = read_mask(folder / "Ground", like=volume)
    # Liver in the portal phase; masks on the wrong slices take in air and bone.
    inside = volume.image[:, 0][truth > 0]
    assert 100 < float(inside.mean()) < 180 and float(inside.std()) < 50
    pytest.importorskip("highdicom")
    (path,) = write_mask((truth > 0).to(torch.uint8), volume, tmp_path, class_names=["liver"])
    sources = {
        str(header.SOPInstanceUID): header
        for header in (pydicom.dcmread(file, stop_before_pixels=True) for file in (folder / "DICOM_anon").iterdir())
    }
    frames = seg_frames(path)
    assert len(frames) == 78
    heights = np.array([position[2] for _, position, _, _ in frames])
    order = np.argsort(heights)
    np.testing.assert_array_equal(np.stack([frames[i][3] for i in order]), truth.numpy() > 0)
    for _, position, uid, _ in frames:
        assert position == tuple(float(x) for x in sources[uid].ImagePositionPatient)


def test_shuffled_chaos_ct_is_the_same_volume(real_data: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    files = sorted((real_data / "chaos_ct_set3" / "DICOM_anon").iterdir())[:12]
    straight = read_volume(files)
    for number, file in zip(rng.permutation(12), files, strict=True):
        shutil.copy(file, tmp_path / f"{number}.dcm")
    shuffled = read_volume(tmp_path)
    assert torch.equal(shuffled.image, straight.image)
    np.testing.assert_array_equal(shuffled.geometry.affine, straight.geometry.affine)


def test_ms_lesions_round_trip(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "ms_lesions" / "patient19"
    (flair,) = folder.glob("FLAIR*.nii.gz")
    (gold,) = folder.glob("GOLD*.nii.gz")
    volume = read_volume(flair)
    assert "".join(nib.aff2axcodes(nib.load(flair).affine)) == "LAS"
    assert volume.image.shape == (182, 1, 218, 182) and volume.geometry.axcodes == "SPL"
    mask = read_mask(gold, like=volume)
    assert 0 < int(mask.sum()) < mask.numel() // 50
    # Lesions are bright on FLAIR.
    flair_values = volume.image[:, 0]
    assert float(flair_values[mask > 0].mean()) > 1.2 * float(flair_values[flair_values > 0].mean())
    (path,) = write_mask(mask, volume, tmp_path, class_names=["lesion"])
    again, before = nib.load(path), nib.load(gold)
    np.testing.assert_array_equal(again.affine, before.affine)
    np.testing.assert_array_equal(np.asarray(again.dataobj), np.asarray(before.dataobj))
    for name in ("qform_code", "sform_code"):
        assert again.header[name] == nib.load(flair).header[name]


def test_lgg_folder(real_data: Path) -> None:
    (folder,) = (real_data / "lgg_mri_256" / "kaggle_3m").iterdir()
    volume = read_volume(folder)
    assert volume.image.shape == (20, 3, 256, 256)
    assert [int(name.rsplit("_", 1)[1]) for name in volume.slice_names] == list(range(1, 21))
    assert set(read_mask(folder, like=volume).unique().tolist()) == {0, 255}
