"""LGG in the kaggle_3m layout: reading, order, names, refusal of what does not fit; the real data's known figures."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cldf_fast.data import open_dataset, open_split
from cldf_fast.data.lgg import lgg
from cldf_fast.data.splits import find_split, read_split, split_dataset
from cldf_fast.errors import DataError, SplitError

STUDY = "TCGA_CS_0001_19990101"


def write_study(
    folder: Path, name: str = STUDY, slices: int = 3, size: tuple[int, int] = (16, 20), seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Write a study; returns uint8 images [S, H, W, 3] and masks [S, H, W] of 0 and 255, the last with tumour."""
    rng = np.random.default_rng([seed, *name.encode()])
    images = rng.integers(0, 256, (slices, *size, 3), dtype=np.uint8)
    masks = np.zeros((slices, *size), dtype=np.uint8)
    masks[slices // 2 :, 2:5, 3:9] = 255
    study = folder / name
    study.mkdir(parents=True)
    for i in range(slices):
        Image.fromarray(images[i]).save(study / f"{name}_{i + 1}.tif")
        Image.fromarray(masks[i]).save(study / f"{name}_{i + 1}_mask.tif")
    return images, masks


def path_of(root: Path, number: int, suffix: str = "") -> Path:
    return root / "kaggle_3m" / STUDY / f"{STUDY}_{number}{suffix}.tif"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_study(tmp_path / "kaggle_3m")
    return tmp_path


def test_pixels_masks_and_labels_are_those_of_the_files_in_order_of_number(tmp_path: Path) -> None:
    images, masks = write_study(tmp_path / "kaggle_3m", slices=12)
    dataset = lgg(tmp_path)
    study = dataset.refs[0].read()
    assert study.slice_names == tuple(f"{STUDY}_{n}" for n in range(1, 13))
    np.testing.assert_array_equal(study.image.numpy(), images.transpose(0, 3, 1, 2).astype(np.float32))
    np.testing.assert_array_equal(study.mask.numpy(), masks // 255)
    assert [item.label.tolist() for item in dataset] == [[False]] * 6 + [[True]] * 6
    assert dataset[9].mask.max() == 1
    assert dataset.class_names == ("tumour",)
    assert dataset.channel_names == ("pre-contrast", "flair", "post-contrast")
    assert dataset.modality == "MR"
    assert not dataset[0].geometry.physical


def test_both_folders_are_taken_and_other_content_is_left_alone(root: Path) -> None:
    (root / "kaggle_3m" / "data.csv").write_text("Patient,age\n")
    (root / "kaggle_3m" / "notes").mkdir()
    (root / "kaggle_3m" / STUDY / "Thumbs.db").write_bytes(b"\0")
    assert len(lgg(root)) == len(lgg(root / "kaggle_3m")) == len(open_dataset("lgg", str(root))) == 3


def test_studies_of_one_patient_share_a_subject(tmp_path: Path) -> None:
    for name in ("TCGA_DU_7001_20000101", "TCGA_DU_7001_19980101", "TCGA_DU_7002_19980101"):
        write_study(tmp_path, name)
    dataset = lgg(tmp_path)
    assert dataset.subjects == ("TCGA_DU_7001_19980101", "TCGA_DU_7002_19980101")
    assert len(dataset.select(["TCGA_DU_7001_19980101"])) == 6


def test_the_folder_split_is_binding(tmp_path: Path) -> None:
    names = [f"TCGA_HT_{i:04d}_19990101" for i in range(4)]
    for name in names:
        write_study(tmp_path / "kaggle_3m", name)
    rows = [f"{name},{part}\n" for name, part in zip(names, ("test", "val", "train", "train"), strict=True)]
    (tmp_path / "split.csv").write_text("patient,split\n" + "".join(rows))
    for folder in (tmp_path, tmp_path / "kaggle_3m"):
        parts = open_split("lgg", folder, seed=5)
        found = [(part, dataset.subjects) for part, dataset in parts.items()]
        assert found == [("train", (names[2], names[3])), ("val", (names[1],)), ("test", (names[0],))]
    (tmp_path / "split.csv").write_text("patient,split\nTCGA_HT_9999_19990101,train\n")
    with pytest.raises(SplitError, match="TCGA_HT_9999_19990101"):
        open_split("lgg", tmp_path)


def test_without_a_folder_split_the_seed_decides(tmp_path: Path) -> None:
    for i in range(10):
        write_study(tmp_path / "kaggle_3m", f"TCGA_HT_{i:04d}_19990101")
    parts = open_split("lgg", tmp_path, seed=5)
    assert [len(part.subjects) for part in parts.values()] == [7, 1, 2]
    subjects = {seed: open_split("lgg", tmp_path, seed=seed)["test"].subjects for seed in range(6)}
    assert subjects[5] == parts["test"].subjects
    assert len(set(subjects.values())) > 1


def test_an_equal_channel_is_a_warning_once_a_study(root: Path) -> None:
    for number in (1, 2, 3):
        pixels = np.array(Image.open(path_of(root, number)))
        pixels[..., 2] = pixels[..., 1]
        Image.fromarray(pixels).save(path_of(root, number))
    with pytest.warns(UserWarning, match=f"{STUDY}.*equal channels: flair and post-contrast") as caught:
        list(lgg(root))
    assert len(caught) == 1


def test_differing_channels_are_no_warning(root: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(lgg(root))


def test_the_dataset_travels_to_worker_processes(root: Path) -> None:
    dataset = lgg(root)
    assert pickle.loads(pickle.dumps(dataset))[2].image.equal(dataset[2].image)


@pytest.mark.parametrize(("number", "suffix"), [(2, ""), (1, ""), (2, "_mask"), (3, "_mask"), (3, "")])
def test_a_missing_slice_or_mask_is_named(root: Path, number: int, suffix: str) -> None:
    path_of(root, number, suffix).unlink()
    with pytest.raises(DataError, match=rf"{STUDY}_{number}{suffix}\.tif: this file of the study is missing"):
        lgg(root)


def test_folders_that_are_not_lgg_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        lgg(tmp_path / "nowhere")
    with pytest.raises(DataError, match="TCGA_<site>_<id>_<date>, found none"):
        lgg(tmp_path)
    (tmp_path / STUDY).mkdir()
    with pytest.raises(DataError, match=f"expected slices named {STUDY}_<number>.tif, found none"):
        lgg(tmp_path)


def rewrite(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path)


def truncate(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


RNG = np.random.default_rng(7)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    ("suffix", "spoil", "message"),
    [
        ("", lambda p: p.write_bytes(b""), "truncated or corrupt TIFF"),
        ("", lambda p: p.write_bytes(b"\x93NUMPY" + bytes(range(200))), "truncated or corrupt TIFF"),
        ("", lambda p: p.write_bytes(b"II*\0" + bytes(60)), "truncated or corrupt TIFF"),
        ("", lambda p: truncate(p, 0.5), "truncated or corrupt TIFF"),
        ("", lambda p: truncate(p, 0.02), "truncated or corrupt TIFF"),
        ("_mask", lambda p: truncate(p, 0.5), "truncated or corrupt TIFF"),
        ("", lambda p: rewrite(p, RNG.integers(0, 255, (16, 20), dtype=np.uint8)), "1 channel of"),
        ("", lambda p: rewrite(p, RNG.integers(0, 255, (16, 20, 4), dtype=np.uint8)), "expected .*RGBA"),
        ("", lambda p: rewrite(p, RNG.integers(0, 255, (16, 21, 3), dtype=np.uint8)), "16 x 21"),
        ("_mask", lambda p: rewrite(p, RNG.integers(0, 255, (20, 16), dtype=np.uint8)), "20 x 16"),
        ("_mask", lambda p: rewrite(p, RNG.integers(1, 255, (16, 20), dtype=np.uint8)), "0 and 255 only"),
        ("_mask", lambda p: rewrite(p, RNG.integers(0, 255, (16, 20, 3), dtype=np.uint8)), "expected .*RGB"),
    ],
    ids=["empty", "foreign", "no-tags", "half", "header", "half-mask", "grey", "rgba", "wide", "turned", "soft", "rgb"],
)
def test_a_bad_file_is_refused_by_name(root: Path, suffix: str, spoil: object, message: str) -> None:
    path = path_of(root, 2, suffix)
    spoil(path)  # type: ignore[operator]
    with pytest.raises(DataError, match=message) as error:
        list(lgg(root))
    assert str(path) in str(error.value)


def test_masks_of_another_size_than_the_images_are_refused(root: Path) -> None:
    for number in (1, 2, 3):
        rewrite(path_of(root, number, "_mask"), np.zeros((20, 16), dtype=np.uint8))
    with pytest.raises(DataError, match=rf"{STUDY}: mask of shape \[3, 20, 16\].*\[3, 16, 20\]"):
        list(lgg(root))


def test_a_study_of_one_channel_is_refused(root: Path) -> None:
    for number in (1, 2, 3):
        rewrite(path_of(root, number), RNG.integers(0, 255, (16, 20), dtype=np.uint8))
    with pytest.raises(DataError, match=f"{STUDY}: expected 3 channels, found 1"):
        list(lgg(root))


def test_a_constant_study_is_refused(root: Path) -> None:
    for number in (1, 2, 3):
        rewrite(path_of(root, number), np.full((16, 20, 3), 7, dtype=np.uint8))
    with warnings.catch_warnings(), pytest.raises(DataError, match=f"{STUDY}: the image is constant"):
        warnings.simplefilter("ignore")
        list(lgg(root))


# -- the real data -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_counts_and_split(real_data: Path) -> None:
    root = real_data / "lgg_mri_128"
    dataset = lgg(root)
    assert (len(dataset.subjects), len(dataset)) == (81, 2714)
    path = find_split(root / "kaggle_3m")
    assert path is not None
    parts = split_dataset(dataset, read_split(path))
    assert {part: len(data.subjects) for part, data in parts.items()} == {"train": 58, "val": 7, "test": 16}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        positive = sum(int(ref.read().mask.flatten(1).any(1).sum()) for ref in dataset.refs)
    assert positive == 967


def test_real_slices_at_256_pixels(real_data: Path) -> None:
    dataset = lgg(real_data / "lgg_mri_256")
    assert dataset.subjects == ("TCGA_CS_4942_19970222",)
    item = dataset[len(dataset) // 2]
    assert item.image.shape == (3, 256, 256)
    assert item.name == f"TCGA_CS_4942_19970222_{len(dataset) // 2 + 1}"
