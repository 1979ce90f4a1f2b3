"""LGG brain MRI (Buda et al. 2019) in the `kaggle_3m` layout: `TCGA_<site>_<id>_<date>/TCGA_..._<n>[_mask].tif`.

Images are 8-bit RGB whose channels are three MR sequences; masks hold 0 and 255. TIFF carries no position, so the
geometry is not physical and millimetre figures are in pixels.
"""

from __future__ import annotations

import re
import warnings
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from cldf_fast.data.base import SliceDataset, Study, StudyRef
from cldf_fast.data.volumes import read_mask, read_volume
from cldf_fast.errors import DataError

CLASS_NAMES = ("tumour",)
CHANNEL_NAMES = ("pre-contrast", "flair", "post-contrast")

_LAYOUT = "kaggle_3m"
_STUDY_FOLDER = re.compile(r"TCGA_[^_]+_[^_]+_\d+")


def lgg(root: str | Path) -> SliceDataset:
    """Slices of an LGG folder: 3 channels (pre-contrast, FLAIR, post-contrast), one class, "tumour".

    root: the folder `kaggle_3m`, or the folder that holds it. The subject is the study folder's name; further studies
    of the same patient go under the name of the earliest, so that no split can part them.
    Raises DataError, naming the file, for a missing mask or slice when called, and for unreadable or unfit files when
    the study is read. A study in which two channels are equal (a sequence was missing and was filled in) is a warning.
    """
    root = Path(root)
    folder = root / _LAYOUT if (root / _LAYOUT).is_dir() else root
    if not folder.is_dir():
        raise DataError(f"{root}: expected the folder {_LAYOUT} or the folder that holds it, found no such folder")
    studies = sorted(path for path in folder.iterdir() if path.is_dir() and _STUDY_FOLDER.fullmatch(path.name))
    if not studies:
        raise DataError(f"{folder}: expected study folders named TCGA_<site>_<id>_<date>, found none")
    first_study: dict[str, str] = {}
    refs = []
    for study in studies:
        images, masks = _list_slices(study)
        patient = study.name.rpartition("_")[0]
        subject = first_study.setdefault(patient, study.name)
        refs.append(StudyRef(study.name, subject, len(images), partial(_read_study, study, subject, images, masks)))
    return SliceDataset(refs, CLASS_NAMES, CHANNEL_NAMES, modality="MR")


def _list_slices(study: Path) -> tuple[list[Path], list[Path]]:
    """Images and masks of a study in order of slice number (as text, 10 would come before 2)."""
    pattern = re.compile(re.escape(study.name) + r"_(\d+)(_mask)?\.tif")
    images: dict[int, Path] = {}
    masks: dict[int, Path] = {}
    for path in study.iterdir():
        match = pattern.fullmatch(path.name)
        if match:
            (masks if match[2] else images)[int(match[1])] = path
    for number in range(1, max([0, *images, *masks]) + 1):
        for found, suffix in ((images, ""), (masks, "_mask")):
            if number not in found:
                raise DataError(
                    f"{study / f'{study.name}_{number}{suffix}.tif'}: this file of the study is missing; "
                    "copy the study again, or remove its folder"
                )
    if not images:
        raise DataError(f"{study}: expected slices named {study.name}_<number>.tif, found none")
    order = sorted(images)
    return [images[n] for n in order], [masks[n] for n in order]


def _read_study(study: Path, subject: str, images: list[Path], masks: list[Path]) -> Study:
    volume = read_volume(images)
    mask = read_mask(masks, like=volume)
    strange = (mask != 0) & (mask != 255)
    if bool(strange.any()):
        at = int(strange.flatten(1).any(1).nonzero()[0])
        raise DataError(f"{masks[at]}: a mask holds 0 and 255 only, found {int(mask[at][strange[at]][0])}")
    _warn_of_equal_channels(volume.image, study)
    return Study(
        name=study.name,
        subject=subject,
        image=volume.image,
        geometry=volume.geometry,
        slice_names=volume.slice_names,
        source=study,
        mask=mask.clamp(max=1),
    )


def _warn_of_equal_channels(image: Tensor, study: Path) -> None:
    equal = [
        f"{CHANNEL_NAMES[a]} and {CHANNEL_NAMES[b]}"
        for a, b in combinations(range(image.shape[1]), 2)
        if torch.equal(image[:, a], image[:, b])
    ]
    if equal:
        warnings.warn(f"{study}: a sequence is missing, equal channels: {', '.join(equal)}", stacklevel=2)
