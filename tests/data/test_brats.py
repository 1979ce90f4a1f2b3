"""BraTS in both namings: channels, whole tumour, area rule, blank ends, patients; refusal of what does not fit."""

from __future__ import annotations

import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from cldf_fast.data import open_dataset
from cldf_fast.data.brats import MODALITIES, brats
from cldf_fast.errors import DataError

OLD = {name: f"_{name}" for name in (*MODALITIES, "seg")}
NEW = {"flair": "-t2f", "t1": "-t1n", "t1ce": "-t1c", "t2": "-t2w", "seg": "-seg"}
# The released files are LPS with the origin at the posterior side.
LPS = np.array([[-1.0, 0, 0, 0], [0, -1.0, 0, 239], [0, 0, 1.5, -7], [0, 0, 0, 1]])
CASE = "BraTS20_Training_001"


def make_case(seed: int = 0, slices: int = 6, blank: tuple[int, int] = (1, 2)) -> tuple[np.ndarray, np.ndarray]:
    """float32 image [S, 4, 16, 20], 0 outside a box and in the blank slices at both ends, and labels uint8 [S, 16, 20].

    A large tumour of labels 1, 2 and 4 in the third slice, one voxel in the fourth.
    """
    rng = np.random.default_rng(seed)
    image = np.zeros((slices, 4, 16, 20), dtype=np.float32)
    inside = slice(blank[0], slices - blank[1])
    image[inside, :, 3:13, 4:17] = rng.uniform(1, 1000, (slices - sum(blank), 4, 10, 13)).round()
    labels = np.zeros((slices, 16, 20), dtype=np.uint8)
    labels[2, 5:9, 6:12] = rng.choice([1, 2, 4], (4, 6))
    labels[3, 7, 7] = 2
    return image, labels


def save(path: Path, stack: np.ndarray, affine: np.ndarray = LPS) -> None:
    """Write [S, H, W] (slices to superior, rows to posterior, columns to the left) as the released files hold it."""
    nib.save(nib.Nifti1Image(np.ascontiguousarray(stack.transpose(2, 1, 0)), affine), path)


def write_case(
    folder: Path, name: str, suffixes: dict[str, str], image: np.ndarray, labels: np.ndarray, ending: str = ".nii.gz"
) -> Path:
    case = folder / name
    case.mkdir(parents=True)
    for channel, modality in enumerate(MODALITIES):
        save(case / f"{name}{suffixes[modality]}{ending}", image[:, channel])
    save(case / f"{name}{suffixes['seg']}{ending}", labels)
    return case


@pytest.mark.parametrize(
    ("name", "suffixes", "subject"),
    [
        (CASE, OLD, CASE),
        ("BraTS2021_00495", OLD, "BraTS2021_00495"),
        ("BraTS-GLI-00007-001", NEW, "BraTS-GLI-00007"),
        ("BraTS-MET-00142-000", NEW, "BraTS-MET-00142"),
    ],
)
@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_every_naming_gives_the_same_slices(
    tmp_path: Path, name: str, suffixes: dict[str, str], subject: str, ending: str
) -> None:
    image, labels = make_case()
    write_case(tmp_path, name, suffixes, image, labels, ending)
    dataset = brats(tmp_path, skip_blank=False)
    assert dataset.subjects == (subject,)
    assert dataset.channel_names == MODALITIES
    assert dataset.class_names == ("whole tumour",)
    assert dataset.modality == "MR"
    study = dataset.refs[0].read()
    np.testing.assert_array_equal(study.image.numpy(), image)
    np.testing.assert_array_equal(study.mask.numpy(), labels > 0)
    assert study.geometry.axcodes == "SPL"
    assert study.geometry.spacing == pytest.approx((1.5, 1, 1))


def test_channels_come_in_the_order_asked_for(tmp_path: Path) -> None:
    image, labels = make_case()
    write_case(tmp_path, CASE, OLD, image, labels)
    dataset = open_dataset("brats", tmp_path, modalities=("t2", "flair"), skip_blank=False)
    assert dataset.channel_names == ("t2", "flair")
    np.testing.assert_array_equal(dataset.refs[0].read().image.numpy(), image[:, [3, 0]])


def test_only_the_files_asked_for_are_needed(tmp_path: Path) -> None:
    case = write_case(tmp_path, CASE, OLD, *make_case())
    (case / f"{CASE}_t1.nii.gz").unlink()
    assert len(brats(tmp_path, modalities=("flair",))) == 3


def test_a_small_tumour_counts_in_the_mask_but_not_in_the_label(tmp_path: Path) -> None:
    write_case(tmp_path, CASE, OLD, *make_case())
    assert [item.label.item() for item in brats(tmp_path)] == [False, True, False]
    assert [item.label.item() for item in brats(tmp_path, min_area=0)] == [False, True, True]
    assert [int(item.mask.sum()) for item in brats(tmp_path)] == [0, 24, 1]


@pytest.mark.parametrize("blank", [(0, 0), (1, 2), (2, 0), (0, 1)])
def test_blank_ends_are_left_out_and_the_rest_stays_where_it_was(tmp_path: Path, blank: tuple[int, int]) -> None:
    image, labels = make_case(blank=blank)
    write_case(tmp_path, CASE, OLD, image, labels)
    whole, trimmed = brats(tmp_path, skip_blank=False).refs[0].read(), brats(tmp_path).refs[0].read()
    kept = slice(blank[0], 6 - blank[1])
    assert trimmed.slice_names == whole.slice_names[kept]
    np.testing.assert_array_equal(trimmed.image.numpy(), whole.image[kept].numpy())
    np.testing.assert_array_equal(trimmed.mask.numpy(), whole.mask[kept].numpy())
    voxel, in_whole = np.array([0, 5, 6, 1]), np.array([blank[0], 5, 6, 1])
    np.testing.assert_allclose(trimmed.geometry.affine @ voxel, whole.geometry.affine @ in_whole)
    assert trimmed.geometry.physical


def test_blank_slices_between_tissue_and_tumour_outside_tissue_are_kept(tmp_path: Path) -> None:
    image, labels = make_case(slices=9, blank=(3, 3))
    image[4] = 0
    labels[7, 0, 0] = 4
    write_case(tmp_path, CASE, OLD, image, labels)
    assert [item.name[-3:] for item in brats(tmp_path)] == ["002", "003", "004", "005", "006", "007"]


def test_two_timepoints_are_one_patient(tmp_path: Path) -> None:
    for name in ("BraTS-GLI-00000-000", "BraTS-GLI-00000-001", "BraTS-GLI-00010-000"):
        write_case(tmp_path, name, NEW, *make_case())
    dataset = brats(tmp_path)
    assert dataset.subjects == ("BraTS-GLI-00000", "BraTS-GLI-00010")
    assert len(dataset.select(["BraTS-GLI-00000"]).refs) == 2


def test_cases_in_grade_folders_are_found(tmp_path: Path) -> None:
    top = tmp_path / "MICCAI_BraTS_2018_Data_Training"
    write_case(top / "HGG", "Brats18_2013_10_1", OLD, *make_case(1))
    write_case(top / "LGG", "Brats18_2013_0_1", OLD, *make_case(2))
    (top / "survival_data.csv").write_text("BraTS18ID,Age,Survival\n")
    for root in (tmp_path, top):
        assert [ref.name for ref in brats(root).refs] == ["Brats18_2013_0_1", "Brats18_2013_10_1"]
    assert len(brats(top / "HGG").refs) == len(brats(top / "HGG" / "Brats18_2013_10_1").refs) == 1


def test_one_case_in_two_folders_is_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_case(tmp_path / folder, CASE, OLD, *make_case())
    with pytest.raises(DataError, match=f"two named '{CASE}'"):
        brats(tmp_path)


def test_the_dataset_travels_to_worker_processes(tmp_path: Path) -> None:
    write_case(tmp_path, CASE, OLD, *make_case())
    dataset = brats(tmp_path)
    assert pickle.loads(pickle.dumps(dataset))[1].image.equal(dataset[1].image)


@pytest.mark.parametrize("modalities", [(), ("flair", "flair"), ("flair", "adc")])
def test_modalities_must_be_known_and_differ(tmp_path: Path, modalities: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="modalities: expected one or more of flair, t1, t1ce, t2"):
        brats(tmp_path, modalities=modalities)


def test_a_folder_without_cases_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="expected case folders such as BraTS20_Training_001"):
            brats(folder)


@pytest.mark.parametrize(("suffixes", "kind"), [(OLD, "t1ce"), (OLD, "seg"), (NEW, "flair"), (NEW, "seg")])
def test_a_missing_file_is_named(tmp_path: Path, suffixes: dict[str, str], kind: str) -> None:
    name = "BraTS-GLI-00000-000" if suffixes is NEW else CASE
    case = write_case(tmp_path, name, suffixes, *make_case())
    path = case / f"{name}{suffixes[kind]}.nii.gz"
    path.unlink()
    with pytest.raises(DataError, match="this file of the case is missing") as error:
        brats(tmp_path)
    assert str(path) in str(error.value)


def with_value(stack: np.ndarray, value: float) -> np.ndarray:
    changed = stack.copy()
    changed[3, 8, 8] = value
    return changed


@pytest.mark.parametrize("skip_blank", [True, False])
@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        ("flair", lambda p, s: p.write_bytes(b"no NIfTI at all"), "NIfTI"),
        ("flair", lambda p, s: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "truncated|before the end"),
        ("t2", lambda p, s: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "truncated|before the end"),
        ("seg", lambda p, s: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "truncated|before the end"),
        ("t1", lambda p, s: save(p, with_value(s, float("nan"))), "NaN"),
        ("t1", lambda p, s: save(p, s[:-1]), "5 slices.*6 slices"),
        ("t1", lambda p, s: save(p, s, LPS + np.diag([0, 0, 1, 0])), "affine differs"),
        ("seg", lambda p, s: save(p, s[:-1]), r"\[5, 16, 20\].*\[6, 16, 20\]"),
        ("seg", lambda p, s: save(p, s[:, 1:]), r"\[6, 15, 20\].*\[6, 16, 20\]"),
        ("seg", lambda p, s: save(p, with_value(s, 5).astype(np.uint8)), "labels from 0 to 4, found 5"),
    ],
    ids=["corrupt", "half", "half-t2", "half-seg", "nan", "short", "moved", "short-seg", "narrow-seg", "label"],
)
def test_a_bad_file_is_refused_by_name(
    tmp_path: Path, kind: str, spoil: object, message: str, skip_blank: bool
) -> None:
    image, labels = make_case()
    case = write_case(tmp_path, CASE, OLD, image, labels)
    path = case / f"{CASE}_{kind}.nii.gz"
    spoil(path, labels if kind == "seg" else image[:, MODALITIES.index(kind)])  # type: ignore[operator]
    with pytest.raises(DataError, match=message) as error:
        list(brats(tmp_path, skip_blank=skip_blank))
    assert path.name in str(error.value)


@pytest.mark.parametrize("skip_blank", [True, False])
def test_a_constant_case_is_refused(tmp_path: Path, skip_blank: bool) -> None:
    image, labels = make_case()
    write_case(tmp_path, CASE, OLD, np.zeros_like(image), labels)
    with pytest.raises(DataError, match=f"{CASE}.*the image is constant"):
        list(brats(tmp_path, skip_blank=skip_blank))
