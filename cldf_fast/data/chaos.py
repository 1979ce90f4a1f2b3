"""CHAOS abdominal organs (Kavur et al. 2021): CT with the liver, MR T1-DUAL and T2-SPIR with four organs.

CT/<patient>/{DICOM_anon/*.dcm, Ground/*.png}
MR/<patient>/T1DUAL/{DICOM_anon/{InPhase,OutPhase}/*.dcm, Ground/*.png}
MR/<patient>/T2SPIR/{DICOM_anon/*.dcm, Ground/*.png}
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cldf_fast.data.base import SliceDataset, Study, StudyRef
from cldf_fast.data.volumes import read_channels, read_mask
from cldf_fast.errors import DataError

CT_WINDOW = (-150.0, 250.0)
"""Soft tissue, in Hounsfield units."""

_IMAGES, _MASKS = "DICOM_anon", "Ground"
_INVALID = 255


@dataclass(frozen=True)
class _Layout:
    """Where a modality lies and what its masks hold.

    top: folder and DICOM's code of the modality. folder: between the patient and DICOM_anon. phases: folders below
    DICOM_anon, one a channel.
    greys: (lowest, highest, class) of the PNG grey values; 0 is background and all else is an error.
    """

    top: str
    folder: str
    phases: tuple[str, ...]
    channel_names: tuple[str, ...]
    class_names: tuple[str, ...]
    greys: tuple[tuple[int, int, int], ...]
    window: tuple[float, float] | None = None


_ORGANS = ("liver", "right kidney", "left kidney", "spleen")
_ORGAN_GREYS = ((55, 70, 1), (110, 135, 2), (175, 200, 3), (240, 255, 4))
# One class is stored as a bit or as full white.
_LIVER_GREYS = ((1, 1, 1), (255, 255, 1))

_LAYOUTS = {
    "ct": _Layout("CT", "", ("",), ("ct",), _ORGANS[:1], _LIVER_GREYS, CT_WINDOW),
    "t1dual": _Layout("MR", "T1DUAL", ("InPhase", "OutPhase"), ("in phase", "out of phase"), _ORGANS, _ORGAN_GREYS),
    "t2spir": _Layout("MR", "T2SPIR", ("",), ("t2",), _ORGANS, _ORGAN_GREYS),
}
MODALITIES = tuple(_LAYOUTS)


def chaos(root: str | Path, *, modality: str | None = None, window: tuple[float, float] | None = None) -> SliceDataset:
    """Axial slices of a CHAOS training folder.

    root: the folder that holds `CT` or `MR`, one of these two, or for CT a single patient's folder (with `DICOM_anon`
    and `Ground` directly in it).
    modality: "ct" (1 channel; 1 class, "liver"), "t1dual" (2 channels, in phase and out of phase; 4 classes: liver,
    right kidney, left kidney, spleen) or "t2spir" (1 channel, the same 4 classes). None: the one that the folder holds.
    window: (low, high) in Hounsfield units, CT only; None: `CT_WINDOW`.

    Masks belong to DICOM files (in phase, for T1-DUAL) by order of file names; slices are in order of position. The
    subject is the patient's folder name. Raises DataError for files that are missing when called, for unfit ones when
    the study is read.
    """
    root = Path(root)
    if modality is not None and modality not in _LAYOUTS:
        raise DataError(f"modality: expected one of {', '.join(MODALITIES)}, got {modality!r}")
    found = {name: _find_patients(root, _LAYOUTS[name]) for name in ([modality] if modality else MODALITIES)}
    found = {name: patients for name, patients in found.items() if patients}
    if not found:
        raise DataError(
            f"{root}: expected CHAOS folders such as CT/<patient>/{_IMAGES} or MR/<patient>/T2SPIR/{_IMAGES}"
            f"{f' for modality {modality!r}' if modality else ''}, found none"
        )
    if len(found) > 1:
        raise DataError(f"{root}: it holds several modalities, choose one with modality: {', '.join(found)}")
    ((name, patients),) = found.items()
    layout = _LAYOUTS[name]
    if window is not None and layout.window is None:
        raise DataError(f"window: only CT has an absolute unit, got {window} for modality {name!r}")
    refs = []
    for patient in patients:
        series = [patient / layout.folder / _IMAGES / phase for phase in layout.phases]
        masks = _list_files(patient / layout.folder / _MASKS, ".png")
        for folder in series:
            num_slices = len(_list_files(folder, ".dcm"))
            if num_slices != len(masks):
                raise DataError(
                    f"{masks[0].parent}: expected a mask for each of the {num_slices} slices in {folder}, "
                    f"found {len(masks)}; copy the patient again"
                )
        read = partial(_read_study, patient, layout, series, masks)
        refs.append(StudyRef(patient.name, patient.name, len(masks), read))
    return SliceDataset(
        refs,
        layout.class_names,
        layout.channel_names,
        window=window or layout.window,
        modality=layout.top,
    )


def _find_patients(root: Path, layout: _Layout) -> list[Path]:
    def is_patient(folder: Path) -> bool:
        return (folder / layout.folder / _IMAGES).joinpath(layout.phases[0]).is_dir()

    if not layout.folder and is_patient(root):
        return [root]
    top = root / layout.top if (root / layout.top).is_dir() else root
    if not top.is_dir():
        return []
    return sorted((folder for folder in top.iterdir() if is_patient(folder)), key=lambda folder: folder.name)


def _list_files(folder: Path, ending: str) -> list[Path]:
    files = sorted(path for path in folder.glob(f"*{ending}") if path.is_file())
    if not files:
        raise DataError(f"{folder}: expected *{ending} files, found none")
    return files


def _read_study(patient: Path, layout: _Layout, series: list[Path], masks: list[Path]) -> Study:
    volume = read_channels(series)
    return Study(
        name=patient.name,
        subject=patient.name,
        image=volume.image,
        geometry=volume.geometry,
        slice_names=volume.slice_names,
        source=patient,
        mask=_to_classes(read_mask(masks, like=volume), masks, layout),
    )


def _to_classes(greys: Tensor, masks: list[Path], layout: _Layout) -> Tensor:
    """Grey values uint8 [S, H, W] of these mask files as class values of the same shape."""
    table = torch.full((256,), _INVALID, dtype=torch.uint8)
    table[0] = 0
    for lowest, highest, index in layout.greys:
        table[lowest : highest + 1] = index
    classes = table[greys.int()]
    invalid = greys[classes == _INVALID]
    if len(invalid):
        path = next(path for path in masks if bool((read_mask(path) == invalid[0]).any()))
        organs = [f"{low} to {high} ({layout.class_names[index - 1]})" for low, high, index in layout.greys]
        raise DataError(f"{path}: grey value {int(invalid[0])} is no organ; expected 0, {', '.join(organs)}")
    return classes
