"""Images in the formats that users hold, read as one stack with its geometry, and masks written back the same way.

NIfTI is turned to a canonical axial stack (slices towards superior, rows to posterior, columns to the patient's left)
by axis permutation and flips only. A DICOM series is sorted by position; an axial one keeps its own in-plane
orientation, another is turned as NIfTI is. PNG and TIFF files are slices in natural name order. `write_mask` undoes all
this exactly. Arrays of numpy throughout: an exported engine reads with these functions where there is no torch, and
`cldf_fast.data.volumes` is their face for tensors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from cldf_fast.data.dicom import open_dicom
from cldf_fast.data.geometry import Geometry
from cldf_fast.data.grid import Array, Floats, Mask
from cldf_fast.data.images import MASK_ENDING, PROBABILITY_ENDING, ImageFiles
from cldf_fast.data.nifti import open_nifti
from cldf_fast.errors import DataError, InputWarning

# Two stacks are on one grid when their affines agree to this many mm.
_SAME_GRID_MM = 1e-3
_ENDINGS = {
    ".nii.gz": "NIfTI", ".nii": "NIfTI", ".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF",
    ".dcm": "DICOM", ".dicom": "DICOM", ".ima": "DICOM", ".jpg": "JPEG", ".jpeg": "JPEG",
}  # fmt: skip
_READ = "NIfTI, DICOM, PNG or TIFF"


class Origin(Protocol):
    """What is needed to read a stack's voxels, and to write a mask back to where they came from."""

    @property
    def geometry(self) -> Geometry:
        """Of the stack that `load` returns."""
        ...

    @property
    def slice_names(self) -> tuple[str, ...]:
        """One a slice, unique."""
        ...

    @property
    def slice_ranks(self) -> tuple[int, ...] | None:
        """Place of each slice's file among the files in natural name order; None where slices aren't files."""
        ...

    @property
    def warnings(self) -> tuple[InputWarning, ...]:
        """What is doubtful about the files, by their headers."""
        ...

    @property
    def modality(self) -> str | None:
        """DICOM's code, e.g. "CT"; None where the headers do not say."""
        ...

    def load(self) -> Array:
        """The voxels [S, C, H, W] in the stored units and a type that holds them exactly."""
        ...

    def write(
        self,
        mask: Array,
        probability: Array | None,
        class_names: Sequence[str],
        out: Path,
        *,
        unlike_training: bool = False,
    ) -> list[Path]:
        """Write uint8 [S, H, W] and float32 [S, K, H, W] or None to the folder `out`; the files written.

        unlike_training: whether the files should warn that the image is unlike those trained on, if they can.
        """
        ...


@dataclass(frozen=True, eq=False)
class Stack:
    """One image, slice upon slice.

    image: float32 [S, C, H, W], stored units after rescale slope and intercept, finite, not constant.
    geometry: (slice, row, column) to RAS+ mm; not physical for PNG and TIFF. slice_names: S names, unique.
    source: the file or folder to name in errors. origin: what `write_mask` needs to undo the reading.
    warnings: what is doubtful about the input, though it is used. modalities: DICOM's codes, e.g. "CT", that headers
    name.
    """

    image: Floats
    geometry: Geometry
    slice_names: tuple[str, ...]
    source: Path
    origin: Origin = field(repr=False)
    warnings: tuple[InputWarning, ...] = ()
    modalities: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Selection:
    """Files of one format, in natural name order, with the slices' names (no endings)."""

    format: str
    files: tuple[Path, ...]
    names: tuple[str, ...]
    case: str
    source: Path


def read_stack(path: str | Path | Sequence[str | Path], *, channels_last: bool = False) -> Stack:
    """Read one stack.

    path: a NIfTI file (.nii, .nii.gz), a PNG or TIFF file, a folder or list of DICOM files of one series, or a folder
    or list of PNG or TIFF slices of one study. In a folder, hidden files, files of unknown formats, and masks and
    probabilities as this package names them (`*_mask.png`) are passed over.
    channels_last: the 4th axis of a 4-D NIfTI holds channels, not time points.
    Raises DataError, naming the file, for anything missing, corrupt, inconsistent, not finite or constant.
    """
    selection = _select(path, mask=False)
    origin = _open(selection, mask=False, channels_last=channels_last)
    # A stored float64 beyond float32's range becomes infinite, and is reported as such.
    with np.errstate(over="ignore"):
        try:
            image = np.ascontiguousarray(origin.load(), dtype=np.float32)
        except MemoryError as error:  # of a header that lies about the size, more often than of a large image
            raise DataError(
                f"{selection.source}: more voxels than memory holds; check the header's sizes, or take another machine",
                code="too_large",
            ) from error
    finite = np.isfinite(image).reshape(len(image), -1).all(axis=1)
    if not finite.all():
        worst = origin.slice_names[int(finite.argmin())]
        raise DataError(
            f"{selection.source}: slice {worst} holds NaN or infinite values; repair or remove this study",
            code="non_finite",
        )
    if image.min() == image.max():
        raise DataError(
            f"{selection.source}: the image is constant; repair or remove this study", code="constant_image"
        )
    modalities = () if origin.modality is None else (origin.modality,)
    return Stack(image, origin.geometry, origin.slice_names, selection.source, origin, origin.warnings, modalities)


def read_channels(paths: Sequence[str | Path]) -> Stack:
    """Read several stacks of one grid (modalities, echoes) and stack them as channels, in the order given.

    paths: each as `read_stack` takes it. The names, source and output format are those of the first.
    Raises DataError, naming both, where shape or affine (beyond 0.001 mm) differ from the first's.
    """
    if not paths:
        raise DataError("paths: expected at least one volume, got none")
    stacks = [read_stack(path) for path in paths]
    first = stacks[0]
    for other in stacks[1:]:
        if len(other.image) != len(first.image) or other.image.shape[2:] != first.image.shape[2:]:
            raise DataError(
                f"{other.source}: {_grid_size(other.image)}, but {first.source} has {_grid_size(first.image)}; "
                f"resample them to one grid",
                code="mixed_grids",
            )
        _check_affine_like(other.geometry, other.source, first)
    image = np.concatenate([stack.image for stack in stacks], axis=1)
    warnings = tuple(warning for stack in stacks for warning in stack.warnings)
    modalities = tuple(dict.fromkeys(modality for stack in stacks for modality in stack.modalities))
    return replace(first, image=image, warnings=warnings, modalities=modalities)


def count_slices(path: str | Path | Sequence[str | Path]) -> int:
    """Number of slices that `read_stack` would return, from names and headers alone: no voxel is read."""
    return len(_open(_select(path, mask=False), mask=False, channels_last=True).slice_names)


def read_mask(path: str | Path | Sequence[str | Path], like: Stack | None = None) -> Mask:
    """Read a mask in the orientation of `read_stack`: uint8 [S, H, W], values as stored.

    path: a NIfTI file, or PNG or TIFF files as `read_stack` takes them; of a folder that holds files named `*_mask`
    only those are read. like: the stack that the mask belongs to: shape and affine are checked. PNG and TIFF carry no
    position: mask files are paired with the stack's slice files by natural name order on both sides, whatever order
    the slices have in the patient.
    Raises DataError for values that are not integers in 0..255, for lossy files, and where the grid differs.
    """
    selection = _select(path, mask=True)
    if selection.format == "DICOM":
        raise DataError(f"{selection.source}: masks are read from NIfTI, PNG or TIFF; convert the DICOM file first")
    origin = _open(selection, mask=True, channels_last=False)
    values = origin.load()
    if values.shape[1] != 1:
        raise DataError(f"{selection.source}: expected a mask of one channel, found {values.shape[1]}")
    values = values[:, 0]
    mask = np.ascontiguousarray(_to_uint8(values, selection.source))
    if like is None:
        return mask
    expected = (len(like.image), *like.image.shape[2:])
    if mask.shape != expected:
        raise DataError(f"{selection.source}: mask of shape {list(mask.shape)}, but {like.source} has {list(expected)}")
    if origin.geometry.physical:
        _check_affine_like(origin.geometry, selection.source, like)
        return mask
    if like.origin.slice_ranks is None:
        raise DataError(
            f"{selection.source}: {selection.format} masks carry no position and can't be paired with the slices of "
            f"{like.source}; give the mask as NIfTI"
        )
    return mask[list(like.origin.slice_ranks)]


def write_mask(
    mask: Mask,
    stack: Stack,
    out: str | Path,
    *,
    class_names: Sequence[str],
    probability: Floats | None = None,
    unlike_training: bool = False,
) -> list[Path]:
    """Write a mask in the format, orientation and geometry of the stack's own files.

    mask: uint8 [S, H, W], 0 background, k for class_names[k - 1]. out: folder, made if missing; never the input's
    own. probability: float [S, K, H, W] in [0, 1], optional. unlike_training: a DICOM SEG warns, in ContentDescription
    and SeriesDescription, that the image is unlike those that the networks were trained on.
    NIfTI: `<case>_mask.nii.gz`, same affine, qform, sform and codes; `<case>_probability.nii.gz`, float32, classes
    along the 4th axis. PNG, TIFF: `<slice>_mask.<ext>`, palette; `<slice>[_<class>]_probability.<ext>`, 16-bit PNG or
    float TIFF. DICOM: `<case>_mask.dcm`, BINARY SEG; `<case>_probability.dcm`, FRACTIONAL SEG.
    Each file appears whole or not at all. Returns the files written.
    Raises DataError for a mask that doesn't fit the stack, BackendError where DICOM is asked for without highdicom.
    """
    slices, _, rows, columns = stack.image.shape
    if mask.dtype != np.uint8 or mask.shape != (slices, rows, columns):
        raise DataError(f"mask: expected uint8 {[slices, rows, columns]}, got {mask.dtype} {list(mask.shape)}")
    if not class_names:
        raise DataError("class_names: expected at least one class, got none")
    if int(mask.max()) > len(class_names):
        raise DataError(f"mask: value {int(mask.max())}, but there are {len(class_names)} class names")
    if probability is not None:
        expected = (slices, len(class_names), rows, columns)
        if not np.issubdtype(probability.dtype, np.floating) or probability.shape != expected:
            raise DataError(
                f"probability: expected float {list(expected)}, got {probability.dtype} {list(probability.shape)}"
            )
        # Written so that NaN fails it too.
        if not (probability.min() >= 0 and probability.max() <= 1):
            raise DataError("probability: expected values in [0, 1], got others or NaN")
    out = Path(out)
    check_output_folder(stack.source, out)
    values = None if probability is None else probability.astype(np.float32, copy=False)
    return stack.origin.write(mask, values, tuple(class_names), out, unlike_training=unlike_training)


def check_output_folder(source: Path, out: Path) -> None:
    """Raises DataError where masks would be written beside a file, or into a folder, that a stack is read from."""
    own = source if os.path.isdir(source) else source.parent
    if out.resolve() == own.resolve():
        raise DataError(
            f"out: {out} is the input's own folder, whose files could be overwritten; give another folder",
            code="input_folder",
        )


def _open(selection: _Selection, *, mask: bool, channels_last: bool) -> Origin:
    files, names = selection.files, selection.names
    if selection.format == "NIfTI":
        if len(files) > 1:
            raise DataError(
                f"{selection.source}: {len(files)} NIfTI files; give one file, or all as channels of one study",
                code="several_volumes",
            )
        return open_nifti(files[0], names[0], channels_last=channels_last)
    if selection.format == "DICOM":
        return open_dicom(files, names, selection.case, selection.source)
    return ImageFiles(selection.format, files, names, mask)


def _select(path: str | Path | Sequence[str | Path], *, mask: bool) -> _Selection:
    """The files that a path stands for, all of one format."""
    if isinstance(path, (str, Path)):
        source = Path(path)
        files = _list_folder(source, mask) if source.is_dir() else [source]
    else:
        files = [Path(item) for item in path]
        if not files:
            raise DataError("path: expected at least one file, got an empty list", code="missing_file")
        source = files[0] if len(files) == 1 else files[0].parent
    files.sort(key=_natural_key)
    formats = [_format_of(file) for file in files]
    for file, form in zip(files, formats, strict=True):
        if form == "JPEG":
            raise DataError(
                f"{file}: JPEG is lossy and changes class values; save the mask as PNG or TIFF"
                if mask
                else f"{file}: JPEG is not read; expected {_READ}",
                code="lossy_mask" if mask else "unknown_format",
            )
        if form is None:
            raise DataError(f"{file}: format not known; expected {_READ}", code="unknown_format")
        if form != formats[0]:
            raise DataError(
                f"{source}: {files[0].name} is {formats[0]}, {file.name} is {form}; give one format",
                code="mixed_formats",
            )
    names = [_stem(file) for file in files]
    for name, following, file in zip(names, names[1:], files[1:], strict=False):
        if name == following:
            raise DataError(
                f"{file}: two slices of the same name, {name!r}, whose masks would overwrite each other",
                code="duplicate_name",
            )
    case = source.resolve().name if source.is_dir() else _stem(source)
    return _Selection(str(formats[0]), tuple(files), tuple(names), case, source)


def _list_folder(folder: Path, mask: bool) -> list[Path]:
    files = [file for file in folder.iterdir() if not file.name.startswith(".") and file.is_file()]
    files = [file for file in files if file.name.upper() != "DICOMDIR" and _format_of(file) is not None]
    masks = [file for file in files if _stem(file).endswith(MASK_ENDING)]
    outputs = {*masks, *(file for file in files if _stem(file).endswith(PROBABILITY_ENDING))}
    chosen = masks if mask and masks else [file for file in files if file not in outputs]
    if not chosen:
        raise DataError(
            f"{folder}: expected {_READ} files in the folder, found none (subfolders are not searched)",
            code="missing_file",
        )
    return chosen


def _format_of(file: Path) -> str | None:
    """By ending; DICOM files often have none, so also by DICOM's mark after the preamble."""
    if not file.is_file():
        raise DataError(f"{file}: no such file or folder", code="missing_file")
    for ending, form in _ENDINGS.items():
        if file.name.lower().endswith(ending):
            return form
    with file.open("rb") as opened:
        head = opened.read(132)
    # An empty file without an ending beside DICOM files is what a broken copy leaves: reported, not passed over.
    return "DICOM" if head[128:] == b"DICM" or (not file.suffix and not head) else None


def _stem(file: Path) -> str:
    """The name without a known ending; other dots belong to the name (DICOM files are often named by UID)."""
    for ending in _ENDINGS:
        if file.name.lower().endswith(ending):
            return file.name[: -len(ending)]
    return file.name


def _natural_key(file: Path) -> tuple[list[str | int], str]:
    """Sorts _2 before _10: runs of digits count as numbers."""
    parts = re.split(r"([0-9]+)", _stem(file).lower())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], file.name


def _to_uint8(values: Array, source: Path) -> Mask:
    lowest, highest = values.min(), values.max()
    # Written so that NaN fails it too.
    if not (lowest >= 0 and highest <= 255):
        raise DataError(f"{source}: mask values from {lowest} to {highest}; expected integers in 0..255")
    classes = values.astype(np.uint8)
    if not np.array_equal(classes, values):
        raise DataError(f"{source}: the mask holds values that are not integers; expected integers in 0..255")
    return classes


def _check_affine_like(geometry: Geometry, source: Path, like: Stack) -> None:
    distance = float(np.abs(geometry.affine - like.geometry.affine).max())
    if distance > _SAME_GRID_MM:
        raise DataError(
            f"{source}: its affine differs from that of {like.source} by {distance:.3g} mm; resample them to one grid",
            code="mixed_grids",
        )


def _grid_size(image: Floats) -> str:
    slices, _, rows, columns = image.shape
    return f"{slices} slices of {rows} x {columns}"
