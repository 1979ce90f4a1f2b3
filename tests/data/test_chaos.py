"""CHAOS layouts: channels, organs, pairing of masks and slices, window; refusal of what does not fit; the real CT."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from cldf_fast.data import open_dataset
from cldf_fast.data.chaos import CT_WINDOW, chaos
from cldf_fast.errors import DataError

SIZE = (16, 20)
ORGANS = ("liver", "right kidney", "left kidney", "spleen")


def write_series(
    folder: Path, pixels: np.ndarray, heights: Sequence[float], *, names: Sequence[str] | None = None, slope: int = 1
) -> list[Path]:
    """Write int16 pixels [S, H, W] as axial DICOM files, slice i at heights[i] mm; SliceThickness is wrong by plan."""
    folder.mkdir(parents=True)
    series = generate_uid()
    files = []
    for i, height in enumerate(heights):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        path = folder / f"{names[i] if names else f'IMG-0001-{i + 1:05d}'}.dcm"
        dataset = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
        dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        dataset.SeriesInstanceUID, dataset.StudyInstanceUID, dataset.FrameOfReferenceUID = series, "1.2", "1.3"
        dataset.Modality, dataset.InstanceNumber = "CT", i + 1
        dataset.ImagePositionPatient = [-20, -30, height]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.PixelSpacing, dataset.SliceThickness = [0.8, 0.7], 9
        dataset.Rows, dataset.Columns = pixels.shape[1:]
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, -5
        dataset.PixelData = pixels[i].astype("<i2").tobytes()
        dataset.save_as(path, enforce_file_format=True)
        files.append(path)
    return files


def write_masks(folder: Path, greys: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for i, grey in enumerate(greys):
        Image.fromarray(grey).save(folder / f"mask_{i:03d}.png")


def make_pixels(seed: int, slices: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(-400, 700, (slices, *SIZE), dtype=np.int16)


def make_greys(slices: int = 3, bright: bool = False) -> np.ndarray:
    """Grey values of all organs in the middle slice, liver alone in the last; bright: the upper ends of the ranges."""
    greys = np.zeros((slices, *SIZE), dtype=np.uint8)
    for i, grey in enumerate((70, 135, 200, 255) if bright else (55, 110, 175, 240)):
        greys[slices // 2, 2 + 3 * i : 4 + 3 * i, 3:9] = grey
    greys[-1, 2:5, 3:9] = 63
    return greys


def write_ct(root: Path, patient: str = "1", seed: int = 0) -> Path:
    write_series(root / "CT" / patient / "DICOM_anon", make_pixels(seed), (0, 2, 4))
    write_masks(root / "CT" / patient / "Ground", np.where(make_greys() > 0, np.uint8(255), np.uint8(0)))
    return root / "CT" / patient


def write_mr(root: Path, patient: str = "1", seed: int = 0) -> Path:
    mr = root / "MR" / patient
    for i, phase in enumerate(("InPhase", "OutPhase")):
        write_series(mr / "T1DUAL" / "DICOM_anon" / phase, make_pixels(seed + i), (0, 5.5, 11))
    write_series(mr / "T2SPIR" / "DICOM_anon", make_pixels(seed + 2), (0, 8, 16))
    for sequence in ("T1DUAL", "T2SPIR"):
        write_masks(mr / sequence / "Ground", make_greys(bright=sequence == "T2SPIR"))
    return mr


def expected_classes() -> np.ndarray:
    classes = np.zeros((3, *SIZE), dtype=np.uint8)
    for i in range(4):
        classes[1, 2 + 3 * i : 4 + 3 * i, 3:9] = i + 1
    classes[2, 2:5, 3:9] = 1
    return classes


def test_ct_is_read_in_hounsfield_units_with_the_liver(tmp_path: Path) -> None:
    write_ct(tmp_path, "5")
    write_ct(tmp_path, "10", seed=4)
    dataset = open_dataset("chaos", tmp_path, modality="ct")
    assert (dataset.class_names, dataset.channel_names, dataset.window) == (("liver",), ("ct",), CT_WINDOW)
    assert dataset.modality == "CT"
    assert dataset.subjects == ("10", "5")
    study = dataset.refs[1].read()
    np.testing.assert_array_equal(study.image[:, 0].numpy(), make_pixels(0) - 5.0)
    np.testing.assert_array_equal(study.mask.numpy(), make_greys() > 0)
    assert study.geometry.spacing == pytest.approx((2.0, 0.8, 0.7))
    np.testing.assert_allclose(
        dataset[3].image[0].numpy(), ((make_pixels(0)[0] - 5.0 + 150) / 200 - 1).clip(-1, 1), atol=1e-5
    )


def test_another_window_is_an_option_of_ct_alone(tmp_path: Path) -> None:
    write_ct(tmp_path)
    write_mr(tmp_path)
    assert chaos(tmp_path, modality="ct", window=(-100, 100)).window == (-100, 100)
    with pytest.raises(DataError, match="only CT has an absolute unit"):
        chaos(tmp_path, modality="t2spir", window=(-100, 100))


def test_t1_dual_has_two_phases_and_four_organs(tmp_path: Path) -> None:
    write_mr(tmp_path)
    dataset = chaos(tmp_path, modality="t1dual")
    assert dataset.channel_names == ("in phase", "out of phase")
    assert dataset.class_names == ORGANS
    study = dataset.refs[0].read()
    np.testing.assert_array_equal(study.image.numpy(), np.stack([make_pixels(0), make_pixels(1)], axis=1) - 5.0)
    np.testing.assert_array_equal(study.mask.numpy(), expected_classes())
    assert [item.label.tolist() for item in dataset] == [[False] * 4, [True] * 4, [True, False, False, False]]
    assert study.geometry.spacing[0] == pytest.approx(5.5)


def test_t2_spir_has_one_channel_and_the_upper_grey_values_are_the_same_organs(tmp_path: Path) -> None:
    write_mr(tmp_path)
    dataset = chaos(tmp_path / "MR", modality="t2spir")
    assert (dataset.channel_names, dataset.class_names, dataset.modality) == (("t2",), ORGANS, "MR")
    study = dataset.refs[0].read()
    np.testing.assert_array_equal(study.image[:, 0].numpy(), make_pixels(2) - 5.0)
    np.testing.assert_array_equal(study.mask.numpy(), expected_classes())


@pytest.mark.parametrize("heights", [(0.0, 2.0, 4.0, 6.0), (6.0, 4.0, 2.0, 0.0), (4.0, 0.0, 6.0, 2.0)])
def test_masks_follow_their_files_when_slices_are_put_in_order_of_position(
    tmp_path: Path, heights: tuple[float, ...]
) -> None:
    pixels = make_pixels(9, slices=4)
    greys = np.zeros((4, *SIZE), dtype=np.uint8)
    for i in range(4):
        # Mask and image of a file can be told to belong together.
        greys[i, i, :] = 255
        pixels[i, i, :] = 30_000
    write_series(tmp_path / "DICOM_anon", pixels, heights)
    write_masks(tmp_path / "Ground", greys)
    study = chaos(tmp_path).refs[0].read()
    order = np.argsort(heights)
    np.testing.assert_array_equal(study.image[:, 0].numpy(), pixels[order] - 5.0)
    np.testing.assert_array_equal(study.mask.numpy(), greys[order] > 0)
    assert study.slice_names == tuple(f"IMG-0001-{i + 1:05d}" for i in order)
    assert study.geometry.axcodes == "SPL"


def test_phases_are_matched_by_position_not_by_file_order(tmp_path: Path) -> None:
    mr = write_mr(tmp_path)
    shutil.rmtree(mr / "T1DUAL" / "DICOM_anon" / "OutPhase")
    write_series(mr / "T1DUAL" / "DICOM_anon" / "OutPhase", make_pixels(1)[::-1], (11, 5.5, 0))
    study = chaos(tmp_path, modality="t1dual").refs[0].read()
    np.testing.assert_array_equal(study.image[:, 1].numpy(), make_pixels(1) - 5.0)


def test_a_bit_mask_is_read_like_a_grey_one(tmp_path: Path) -> None:
    patient = write_ct(tmp_path)
    for path in (patient / "Ground").iterdir():
        Image.open(path).convert("1").save(path)
    np.testing.assert_array_equal(chaos(tmp_path).refs[0].read().mask.numpy(), make_greys() > 0)


def test_the_only_modality_of_a_folder_needs_no_name(tmp_path: Path) -> None:
    patient = write_ct(tmp_path, "7")
    for root in (tmp_path, tmp_path / "CT", patient):
        assert chaos(root).subjects == ("7",)
    write_mr(tmp_path)
    with pytest.raises(DataError, match="several modalities, choose one with modality: ct, t1dual, t2spir"):
        chaos(tmp_path)


def test_the_dataset_travels_to_worker_processes(tmp_path: Path) -> None:
    write_ct(tmp_path)
    dataset = chaos(tmp_path)
    assert pickle.loads(pickle.dumps(dataset))[1].image.equal(dataset[1].image)


def test_what_is_not_there_or_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected CHAOS folders such as CT/<patient>/DICOM_anon"):
        chaos(tmp_path)
    with pytest.raises(DataError, match="expected CHAOS folders"):
        chaos(tmp_path / "nowhere")
    with pytest.raises(DataError, match="modality: expected one of ct, t1dual, t2spir, got 'pet'"):
        chaos(tmp_path, modality="pet")
    write_ct(tmp_path)
    with pytest.raises(DataError, match="for modality 't2spir', found none"):
        chaos(tmp_path, modality="t2spir")


@pytest.mark.parametrize(
    ("modality", "grey"),
    [("ct", 63), ("ct", 2), ("ct", 254), ("t2spir", 54), ("t2spir", 71), ("t2spir", 1), ("t1dual", 239)],
)
def test_a_grey_value_of_no_organ_is_refused_with_its_file(tmp_path: Path, modality: str, grey: int) -> None:
    ground = write_ct(tmp_path) / "Ground"
    if modality != "ct":
        ground = write_mr(tmp_path) / ("T1DUAL" if modality == "t1dual" else "T2SPIR") / "Ground"
    greys = np.array(Image.open(ground / "mask_001.png"))
    greys[15, 19] = grey
    Image.fromarray(greys).save(ground / "mask_001.png")
    with pytest.raises(DataError, match=rf"mask_001\.png: grey value {grey} is no organ; expected 0, .*\(liver\)"):
        list(chaos(tmp_path, modality=modality))


def test_mr_masks_are_not_taken_for_ct(tmp_path: Path) -> None:
    write_mr(tmp_path)
    with pytest.raises(DataError, match="is no organ"):
        list(chaos(tmp_path / "MR" / "1" / "T2SPIR"))


def test_slices_and_masks_must_be_as_many(tmp_path: Path) -> None:
    patient = write_ct(tmp_path)
    (patient / "Ground" / "mask_001.png").unlink()
    with pytest.raises(DataError, match=r"a mask for each of the 3 slices.*found 2"):
        chaos(tmp_path)
    shutil.rmtree(patient / "Ground")
    with pytest.raises(DataError, match=r"Ground: expected \*\.png files, found none"):
        chaos(tmp_path)


def test_phases_must_be_as_many_and_on_one_grid(tmp_path: Path) -> None:
    out_phase = write_mr(tmp_path) / "T1DUAL" / "DICOM_anon" / "OutPhase"
    shutil.rmtree(out_phase)
    write_series(out_phase, make_pixels(1), (1, 6.5, 12))
    with pytest.raises(DataError, match=r"OutPhase.*affine differs"):
        list(chaos(tmp_path, modality="t1dual"))
    next(out_phase.iterdir()).unlink()
    with pytest.raises(DataError, match=r"each of the 2 slices in .*OutPhase, found 3"):
        chaos(tmp_path, modality="t1dual")
    shutil.rmtree(out_phase)
    with pytest.raises(DataError, match=r"OutPhase: expected \*\.dcm files, found none"):
        chaos(tmp_path, modality="t1dual")


def retag(path: Path, **values: object) -> None:
    dataset = pydicom.dcmread(path)
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    dataset.save_as(path)


def write_pixels(path: Path, value: int) -> None:
    retag(path, PixelData=np.full(SIZE, value, dtype="<i2").tobytes())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda files, masks: files[1].write_bytes(b"not DICOM"), "00002.dcm"),
        (lambda files, masks: files[1].write_bytes(files[1].read_bytes()[:-100]), "00002.dcm"),
        (lambda files, masks: files[1].write_bytes(files[1].read_bytes()[:200]), "00002.dcm"),
        (lambda files, masks: retag(files[1], SeriesInstanceUID="1.2.3"), "mixed series"),
        (lambda files, masks: retag(files[1], ImagePositionPatient=[-20, -30, 2.7]), "a slice is missing"),
        (lambda files, masks: retag(files[1], ImagePositionPatient=[-20, -30, 0]), "same position"),
        (lambda files, masks: retag(files[1], Rows=20, Columns=16), "00002.dcm"),
        (lambda files, masks: [write_pixels(path, 3) for path in files], "constant"),
        (lambda files, masks: masks[1].write_bytes(masks[1].read_bytes()[:60]), "mask_001.png"),
        (lambda files, masks: masks[1].write_bytes(b""), "mask_001.png"),
        (lambda files, masks: Image.new("L", (16, 20)).save(masks[1]), "mask_001.png"),
        (lambda files, masks: Image.new("RGB", (20, 16)).save(masks[1]), "mask_001.png"),
        (lambda files, masks: [Image.new("L", (21, 16)).save(path) for path in masks], "Ground.*21"),
    ],
    ids=[
        "foreign", "truncated", "header-only", "mixed-series", "out-of-place", "twice", "turned", "constant",
        "truncated-mask", "empty-mask", "turned-mask", "colour-mask", "wide-masks",
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_by_name(tmp_path: Path, spoil: object, message: str) -> None:
    patient = write_ct(tmp_path)
    spoil(sorted((patient / "DICOM_anon").iterdir()), sorted((patient / "Ground").iterdir()))  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        list(chaos(tmp_path))


def test_a_missing_slice_is_refused_even_when_its_mask_is_missing_too(tmp_path: Path) -> None:
    write_series(tmp_path / "DICOM_anon", make_pixels(0, slices=5), (0, 2, 4, 6, 8))
    write_masks(tmp_path / "Ground", np.zeros((5, *SIZE), dtype=np.uint8))
    (tmp_path / "DICOM_anon" / "IMG-0001-00003.dcm").unlink()
    (tmp_path / "Ground" / "mask_002.png").unlink()
    with pytest.raises(DataError, match="a slice is missing"):
        list(chaos(tmp_path))


# -- the real data -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_ct(real_data: Path) -> None:
    dataset = chaos(real_data / "chaos_ct_set3")
    assert (len(dataset), dataset.subjects) == (78, ("chaos_ct_set3",))
    study = dataset.refs[0].read()
    assert study.geometry.spacing[0] == pytest.approx(2.0)
    assert study.geometry.axcodes[0] == "S"
    assert study.image.shape == (78, 1, 512, 512)
    # Air, soft tissue and bone in Hounsfield units.
    assert study.image.min() < -900
    assert study.image.max() > 500
    liver = study.image[:, 0][study.mask == 1]
    assert len(liver) > 100_000
    # The files run from head to feet and the stack to the head: with the masks turned round the share is 0.81, with
    # each mask one slice off it is 0.976.
    assert ((liver > 0) & (liver < 250)).float().mean() > 0.985
