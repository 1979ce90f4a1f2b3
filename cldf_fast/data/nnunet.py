"""nnU-Net raw data, version 2: `DatasetXXX_Name/{dataset.json, imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz}`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from cldf_fast.data.base import SliceDataset, Study, StudyRef
from cldf_fast.data.volumes import count_slices, read_channels, read_mask
from cldf_fast.errors import DataError

FILE_ENDINGS = (".nii.gz", ".png", ".tif")


def nnunet(root: str | Path, *, window: tuple[float, float] | None = None, min_area: float = 0.0) -> SliceDataset:
    """Slices of the training cases of an nnU-Net raw data set, its channels and classes as `dataset.json` names them.

    root: the folder with `dataset.json`. window: (low, high) in stored units where these are absolute (CT); None:
    robust per case. min_area: a slice is labelled with a class where more than this fraction of its pixels is of it.

    The subject is the case, because the format knows no patients: give a `split.csv` where a patient has two cases.
    Accepted endings are .nii.gz, .png and .tif; a 2D colour file may hold all channels at once. Raises DataError for a
    `dataset.json` or files that do not fit when called, for unfit contents when the case is read.
    """
    root = Path(root)
    channels, classes, ending, num_cases = _read_description(root / "dataset.json")
    labels = {path.name.removesuffix(ending): path for path in sorted((root / "labelsTr").glob(f"*{ending}"))}
    if len(labels) != num_cases:
        raise DataError(
            f"{root / 'labelsTr'}: dataset.json says {num_cases} training cases, found {len(labels)} *{ending} files"
        )
    refs = []
    for case, label in labels.items():
        images = _case_images(root / "imagesTr", case, ending, len(channels))
        read = partial(_read_study, case, images, label, len(classes))
        refs.append(StudyRef(case, case, count_slices(images[0]), read))
    # The one channel name that nnU-Net itself gives a meaning.
    modality = "CT" if {channel.upper() for channel in channels} == {"CT"} else None
    return SliceDataset(refs, classes, channels, window=window, min_area=min_area, modality=modality)


def _read_description(path: Path) -> tuple[tuple[str, ...], tuple[str, ...], str, int]:
    """Channel names, class names, file ending and number of cases of a `dataset.json`."""
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: can't be read as the JSON description of an nnU-Net data set ({error})") from error
    if not isinstance(description, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(description).__name__}")
    if "modality" in description and "channel_names" not in description:
        raise DataError(
            f"{path}: this is nnU-Net version 1; convert it to version 2 (nnUNetv2_convert_old_nnUNet_dataset)"
        )
    ending, num_cases = description.get("file_ending"), description.get("numTraining")
    if ending not in FILE_ENDINGS:
        raise DataError(f"{path}: file_ending: expected one of {', '.join(FILE_ENDINGS)}, got {ending!r}")
    if not isinstance(num_cases, int) or num_cases < 1:
        raise DataError(f"{path}: numTraining: expected the number of training cases, got {num_cases!r}")
    channels = _names_by_number(path, "channel_names", description.get("channel_names"))
    classes = _class_names(path, description.get("labels"))
    return channels, classes, ending, num_cases


def _names_by_number(path: Path, key: str, names: Any) -> tuple[str, ...]:
    """Values of {"0": name, "1": name, ...} in order of number."""
    if not isinstance(names, dict) or not names or set(names) != {str(i) for i in range(len(names))}:
        raise DataError(f'{path}: {key}: expected names numbered from "0" without a gap, got {names!r}')
    return tuple(str(names[str(i)]) for i in range(len(names)))


def _class_names(path: Path, labels: Any) -> tuple[str, ...]:
    if not isinstance(labels, dict) or len(labels) < 2:
        raise DataError(f"{path}: labels: expected background and at least one class, got {labels!r}")
    regions = [name for name, value in labels.items() if isinstance(value, list)]
    if regions:
        raise DataError(
            f"{path}: labels: {regions[0]!r} is a region made of several labels, which is not supported here; "
            "give every label a class of its own"
        )
    if "ignore" in labels:
        raise DataError(f"{path}: labels: an ignore label is not supported here; remove it from labels and masks")
    names = {str(value): name for name, value in labels.items()}
    if names.get("0") != "background" or len(names) != len(labels):
        raise DataError(f"{path}: labels: expected background as 0 and each class its own number, got {labels!r}")
    return _names_by_number(path, "labels", names)[1:]


def _case_images(folder: Path, case: str, ending: str, num_channels: int) -> list[Path]:
    """The files of a case: one a channel, or in 2D one for all channels."""
    files = [folder / f"{case}_{i:04d}{ending}" for i in range(num_channels)]
    if ending != ".nii.gz" and files[0].is_file() and not any(path.exists() for path in files[1:]):
        return files[:1]
    missing = next((path for path in files if not path.is_file()), None)
    if missing is not None:
        raise DataError(f"{missing}: this image of case {case!r} is missing; copy it again, or remove the case")
    return files


def _read_study(case: str, images: list[Path], label: Path, num_classes: int) -> Study:
    volume = read_channels(images)
    mask = read_mask(label, like=volume)
    if int(mask.max()) > num_classes:
        raise DataError(f"{label}: expected labels from 0 to {num_classes}, found {int(mask.max())}")
    slices = volume.image.shape[0]
    return Study(
        name=case,
        subject=case,
        image=volume.image,
        geometry=volume.geometry,
        slice_names=tuple(f"{case}_{i:03d}" for i in range(slices)) if slices > 1 else (case,),
        source=label,
        mask=mask,
    )
