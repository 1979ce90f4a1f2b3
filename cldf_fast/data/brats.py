"""BraTS brain tumours in the naming of 2018-2021 (`<case>_flair.nii.gz`) and of 2023 on (`<case>-t2f.nii.gz`).

The class is the whole tumour: every label above 0 of the segmentation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cldf_fast.data.base import SliceDataset, Study, StudyRef
from cldf_fast.data.geometry import Geometry
from cldf_fast.data.volumes import count_slices, read_channels, read_mask, read_volume
from cldf_fast.errors import DataError

MODALITIES = ("flair", "t1", "t1ce", "t2")
CLASS_NAMES = ("whole tumour",)

# Labels are 0, 1, 2, 4 up to 2021 and 0 to 3 (4: resection cavity) from 2023 on.
_HIGHEST_LABEL = 4
# BraTS 2018 and 2019 lie three folders deep: <download>/MICCAI_.../HGG/<case>.
_MAX_DEPTH = 4


@dataclass(frozen=True)
class _Naming:
    """Files are called <case><separator><suffix>; timepoint matches the end of a case name that is not the patient."""

    separator: str
    suffixes: dict[str, str]
    timepoint: str = ""

    def find(self, case: Path, kind: str) -> Path:
        stem = f"{case.name}{self.separator}{self.suffixes[kind]}"
        for ending in (".nii.gz", ".nii"):
            if (case / (stem + ending)).is_file():
                return case / (stem + ending)
        raise DataError(
            f"{case / stem}.nii.gz: this file of the case is missing; copy the case again, or remove its folder"
        )

    def describes(self, case: Path) -> bool:
        names = (f"{case.name}{self.separator}{suffix}.nii" for suffix in self.suffixes.values())
        return any((case / name).is_file() or (case / f"{name}.gz").is_file() for name in names)


_NAMINGS = (
    _Naming("_", {**{name: name for name in MODALITIES}, "seg": "seg"}),
    _Naming("-", {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w", "seg": "seg"}, r"-\d{3}$"),
)


def brats(
    root: str | Path,
    *,
    modalities: Sequence[str] = MODALITIES,
    min_area: float = 0.01,
    skip_blank: bool = True,
) -> SliceDataset:
    """Axial slices of a BraTS training folder; one class, "whole tumour".

    root: any folder that holds case folders, itself or up to three folders deeper (`HGG`, `LGG` of 2018).
    modalities: channels in this order, out of ("flair", "t1", "t1ce", "t2").
    min_area: a slice is labelled with tumour where more than this fraction of its pixels is tumour. The default, 1%, is
    what the published weak-supervision splits use: smaller tumours count as healthy in the label, not in the mask.
    skip_blank: leave out the slices above and below the head, which hold neither tissue nor tumour: labels of empty
    images are no evidence, and they flatter every figure. The rest stays one unbroken stack, its geometry starts at
    the first slice kept, and slice names keep the number in the whole volume. Costs reading one channel per case when
    the data set is opened.

    The subject is the case, from 2023 on without its timepoint, so that two scans of a patient stay together.
    Raises DataError, naming the file, for missing files when called, for unfit ones when the study is read.
    """
    root = Path(root)
    if not modalities or len(set(modalities)) != len(modalities) or not set(modalities) <= set(MODALITIES):
        raise DataError(f"modalities: expected one or more of {', '.join(MODALITIES)}, once each, got {modalities}")
    cases = sorted(_find_cases(root, _MAX_DEPTH), key=lambda found: found[0].name)
    if not cases:
        raise DataError(
            f"{root}: expected case folders such as BraTS20_Training_001/BraTS20_Training_001_flair.nii.gz or "
            "BraTS-GLI-00000-000/BraTS-GLI-00000-000-t2f.nii.gz, found none"
        )
    files = [
        ([naming.find(case, modality) for modality in modalities], naming.find(case, "seg")) for case, naming in cases
    ]
    if skip_blank:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            extents = list(pool.map(lambda paths: _tissue_extent(paths[0][0], paths[1]), files))
    else:
        extents = [(0, count_slices(images[0])) for images, _ in files]
    refs = []
    for (case, naming), (images, seg), (start, stop) in zip(cases, files, extents, strict=True):
        subject = re.sub(naming.timepoint, "", case.name)
        read = partial(_read_study, case, subject, images, seg, start, stop)
        refs.append(StudyRef(case.name, subject, stop - start, read))
    return SliceDataset(refs, CLASS_NAMES, tuple(modalities), min_area=min_area, modality="MR")


def _find_cases(folder: Path, depth: int) -> Iterator[tuple[Path, _Naming]]:
    if not folder.is_dir():
        return
    naming = next((naming for naming in _NAMINGS if naming.describes(folder)), None)
    if naming is not None:
        yield folder, naming
    elif depth > 0:
        for child in folder.iterdir():
            yield from _find_cases(child, depth - 1)


def _tissue_extent(image: Path, seg: Path) -> tuple[int, int]:
    """First slice that holds tissue (BraTS: a value other than 0) or tumour, and the one after the last."""
    volume = read_volume(image)
    tissue = volume.image.ne(0).flatten(1).any(1)
    tumour = read_mask(seg, like=volume).ne(0).flatten(1).any(1)
    kept = (tissue | tumour).nonzero()
    return int(kept[0]), int(kept[-1]) + 1


def _read_study(case: Path, subject: str, images: list[Path], seg: Path, start: int, stop: int) -> Study:
    volume = read_channels(images)
    mask = read_mask(seg, like=volume)
    if int(mask.max()) > _HIGHEST_LABEL:
        raise DataError(f"{seg}: expected labels from 0 to {_HIGHEST_LABEL}, found {int(mask.max())}")
    return Study(
        name=case.name,
        subject=subject,
        image=volume.image[start:stop],
        geometry=_starting_at(volume.geometry, start),
        slice_names=tuple(f"{case.name}_{i:03d}" for i in range(start, stop)),
        source=case,
        mask=mask[start:stop].ne(0).to(mask.dtype),
    )


def _starting_at(geometry: Geometry, start: int) -> Geometry:
    """The geometry of the same stack without its first `start` slices."""
    affine = np.array(geometry.affine, dtype=np.float64)
    affine[:, 3] += start * affine[:, 0]
    return Geometry(affine, geometry.physical)
