"""Images of any kind with a table of image-level labels, `labels.csv`, and no masks.

    image,slice,patient,tumour,oedema
    scans/a.nii.gz,,anna,0,0
    scans/a.nii.gz,12,anna,1,0
    scans/b,IM0007,ben,1,1
    slices/c.png,,carl,0,0

image      a NIfTI, PNG or TIFF file, or a folder of a DICOM series or of PNG or TIFF slices, as seen from the table.
           Or a column `image:NAME` for each channel, whose files have one grid.
slice      a slice's number, from 0 for the lowest axial slice upwards (in natural order of the names where PNG and TIFF
           files are slices), or the name of its file without the ending, where these two don't contradict each other;
           empty: every slice that has no row of its own, of which none may be labelled with a class unless it is the
           only one. May be left out.
patient    whose the image is, for the split; by default every image is a patient of its own.
all others a class each, 1 where the slice shows it and 0 where it does not.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cldf_fast.data.base import SliceDataset, Study, StudyRef
from cldf_fast.data.volumes import Volume, count_slices, read_channels
from cldf_fast.errors import DataError

TABLE = "labels.csv"
_IMAGE, _CHANNEL, _SLICE, _PATIENT = "image", "image:", "slice", "patient"


def labelled(
    root: str | Path, *, window: tuple[float, float] | None = None, modality: str | None = None
) -> SliceDataset:
    """Slices of the images that `labels.csv` lists, with its labels.

    root: the folder with `labels.csv`. window: (low, high) in stored units where these are absolute (CT); None: robust
    per image. modality: DICOM's code of what all images are, e.g. "MR", for studies of another to be warned of.
    Raises DataError, naming the line, for a table that does not say what the module's documentation asks, or a file
    that is not there, when called; for unfit files when an image is read.
    """
    table = _Table(Path(root))
    refs = []
    for name, image in table.images.items():
        slices = count_slices(image.files[0])
        image.check(table.path, slices)
        refs.append(StudyRef(name, image.patient, slices, partial(_read_study, table.path, name, image)))
    channels = table.channels
    if not channels:  # one file may hold several
        found = read_channels(next(iter(table.images.values())).files).image.shape[1]
        channels = (_IMAGE,) if found == 1 else tuple(f"{_IMAGE} {number + 1}" for number in range(found))
    return SliceDataset(refs, table.classes, channels, window=window, modality=modality)


@dataclass
class _Image:
    """files: one a channel. labels: by the cell of the column `slice`, the line and the classes."""

    files: tuple[Path, ...]
    patient: str
    labels: dict[str, tuple[int, tuple[bool, ...]]] = field(default_factory=dict)

    def check(self, path: Path, slices: int) -> None:
        """Raise DataError unless every slice has a label, as far as numbers tell."""
        if "" in self.labels:
            line, classes = self.labels[""]
            if any(classes) and slices > 1:
                raise DataError(
                    f"{path}, line {line}: says that all of {slices} slices show a class; give the slices that do rows "
                    f"with their number or name in the column slice"
                )
        elif len(self.labels) < slices:
            raise DataError(
                f"{path}: {self.files[0]} has {slices} slices, and rows for {len(self.labels)}; give each slice one, "
                f"or the rest a row with an empty slice"
            )

    def of_slices(self, path: Path, volume: Volume) -> torch.Tensor:
        """Labels bool [S, K]."""
        names = {name: number for number, name in enumerate(volume.slice_names)}
        labels: list[tuple[bool, ...] | None] = [self.labels[""][1] if "" in self.labels else None] * len(names)
        seen: dict[int, int] = {}
        for cell, (line, classes) in self.labels.items():
            if not cell:
                continue
            counted = int(cell) if cell.isdecimal() else -1
            number = names.get(cell, counted)
            if number != counted and 0 <= counted < len(names):
                raise DataError(
                    f"{path}, line {line}: slice: {cell} is the name of slice {number}, counted from 0, and the number "
                    f"of slice {volume.slice_names[counted]}; name the files otherwise, such as {'slice-' + cell}"
                )
            if not 0 <= number < len(names):
                raise DataError(
                    f"{path}, line {line}: slice: expected a number from 0 to {len(names) - 1} or a name such as "
                    f"{volume.slice_names[0]!r}, got {cell!r}"
                )
            if number in seen:
                raise DataError(f"{path}: lines {seen[number]} and {line} are about the same slice; keep one")
            seen[number], labels[number] = line, classes
        return torch.tensor(labels, dtype=torch.bool)


class _Table:
    """channels: names, or none where the table has one column of images."""

    def __init__(self, root: Path) -> None:
        self.path = root / TABLE
        self.channels: tuple[str, ...] = ()
        self.classes: tuple[str, ...] = ()
        self.images: dict[str, _Image] = {}
        try:
            with self.path.open(newline="", encoding="utf-8-sig") as file:
                rows = csv.DictReader(file, strict=True)
                self._read_header(rows.fieldnames or ())
                for row in rows:
                    self._read_row(root, rows.line_num, row)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{self.path}: can't be read as a table of labels in CSV ({error})") from error
        if not self.images:
            raise DataError(f"{self.path}: expected a row an image, or a row a slice, found none")

    def _read_header(self, columns: Any) -> None:
        names = [name.strip() for name in columns]
        if len(set(names)) < len(names) or names != list(columns) or "" in names:
            raise DataError(f"{self.path}: expected columns of different names without spaces around, got {names}")
        self.channels = tuple(name.removeprefix(_CHANNEL) for name in names if name.startswith(_CHANNEL))
        if (_IMAGE in names) == bool(self.channels):
            raise DataError(f"{self.path}: expected a column {_IMAGE}, or columns {_CHANNEL}NAME, got {names}")
        images = (_IMAGE, _SLICE, _PATIENT)
        self.classes = tuple(name for name in names if name not in images and not name.startswith(_CHANNEL))
        if not self.classes:
            raise DataError(f"{self.path}: expected a column for each class, got none beside {', '.join(names)}")

    def _read_row(self, root: Path, line: int, row: Mapping[Any, Any]) -> None:
        where = f"{self.path}, line {line}"
        if None in row or None in row.values():
            raise DataError(f"{where}: expected as many cells as columns")
        cells = {name: value.strip() for name, value in row.items()}
        columns = [f"{_CHANNEL}{name}" for name in self.channels] or [_IMAGE]
        paths = [cells[column] for column in columns]
        if not all(paths):
            raise DataError(f"{where}: {columns[paths.index('')]}: expected a file or folder, got an empty cell")
        for path in paths:
            if not (root / path).exists():
                raise DataError(f"{where}: {root / path} does not exist")
        values = [cells[name] for name in self.classes]
        for name, value in zip(self.classes, values, strict=True):
            if value not in ("0", "1"):
                raise DataError(f"{where}: {name}: expected 0 or 1, got {value!r}")
        name, patient = paths[0], cells.get(_PATIENT) or paths[0]
        image = self.images.setdefault(name, _Image(tuple(root / path for path in paths), patient))
        if image.files != tuple(root / path for path in paths) or image.patient != patient:
            raise DataError(f"{where}: {name} has other channels or another patient than in the rows before")
        cell = cells.get(_SLICE, "")
        if cell in image.labels:
            raise DataError(f"{self.path}: lines {image.labels[cell][0]} and {line} are about the same slice; keep one")
        image.labels[cell] = line, tuple(value == "1" for value in values)


def _read_study(path: Path, name: str, image: _Image) -> Study:
    volume = read_channels(image.files)
    return Study(
        name=name,
        subject=image.patient,
        image=volume.image,
        geometry=volume.geometry,
        slice_names=volume.slice_names,
        source=image.files[0],
        labels=image.of_slices(path, volume),
    )
