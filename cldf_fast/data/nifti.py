"""NIfTI volumes (.nii, .nii.gz): read to a canonical axial stack, written back to the input's own grid."""

from __future__ import annotations

import gzip
import io
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cldf_fast.data.geometry import Geometry
from cldf_fast.data.grid import Affine, Array, Reorientation, check_affine, check_size, to_canonical
from cldf_fast.errors import DataError, InputWarning
from cldf_fast.files import atomic_write

# What places voxels in the world. Nothing else of the header is carried over: its free text may name the patient.
_GEOMETRY_FIELDS = (
    "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip
_GZIP = b"\x1f\x8b"
_MM_PER_UNIT = {"meter": 1000.0, "micron": 0.001}
# qform and sform are float32 from different formulas: rounding alone moves a far corner by a few percent of a voxel.
_MAX_DISAGREEMENT = 0.1
_CHUNK = 2**24


@dataclass(frozen=True)
class NiftiFile:
    """A NIfTI file whose header was read and checked.

    header: nibabel's. reorientation: from the stored grid to the canonical one. geometry, slice_names: of the latter.
    warnings: what is doubtful about the header.
    """

    path: Path
    case: str
    geometry: Geometry
    slice_names: tuple[str, ...]
    reorientation: Reorientation
    header: Any = field(repr=False)
    warnings: tuple[InputWarning, ...] = ()
    slice_ranks: None = None
    modality: None = None

    def load(self) -> Array:
        """The voxels [S, C, H, W] in canonical orientation, scl_slope and scl_inter applied."""
        try:
            with _opened(self.path) as file:
                stored = self.header.data_from_fileobj(self._data(file))
        except (OSError, EOFError, ValueError, OverflowError, zlib.error) as error:
            raise DataError(
                f"{self.path}: truncated or corrupt NIfTI data; copy or export the file again", code="corrupt_file"
            ) from error
        stored = stored.reshape(*self.reorientation.shape, -1)
        return np.moveaxis(self.reorientation.apply(stored), 3, 1)

    def _data(self, file: io.BufferedIOBase) -> io.BytesIO:
        """As many bytes of the file as the header claims, or as there are."""
        voxels = math.prod(self.header.get_data_shape())
        wanted = self.header.get_data_offset() + voxels * self.header.get_data_dtype().itemsize
        data = io.BytesIO()
        # Not at once, which would take the memory that the header claims. The rest is read too, for the checksum that
        # is at the end of .gz, and not kept: a few bytes can unpack to more than memory holds.
        while chunk := file.read(_CHUNK):
            data.write(memoryview(chunk)[: max(0, wanted - data.tell())])
        if data.tell() < wanted:
            raise EOFError
        data.seek(0)
        return data

    def write(
        self,
        mask: Array,
        probability: Array | None,
        class_names: Sequence[str],
        out: Path,
        *,
        unlike_training: bool = False,
    ) -> list[Path]:
        """Write `<case>_mask.nii.gz` (uint8) and `<case>_probability.nii.gz` (float32, classes along the 4th axis).

        unlike_training: not said in NIfTI.
        """
        outputs = [(out / f"{self.case}_mask.nii.gz", self.reorientation.undo(mask))]
        if probability is not None:
            stored = self.reorientation.undo(np.moveaxis(probability, 1, 3))
            stored = stored[..., 0] if len(class_names) == 1 else stored
            outputs.append((out / f"{self.case}_probability.nii.gz", stored))
        for path, array in outputs:
            self._save(array, path)
        return [path for path, _ in outputs]

    def _save(self, stored: Array, path: Path) -> None:
        import nibabel as nib

        header = type(self.header)()
        for name in _GEOMETRY_FIELDS:
            header[name] = self.header[name]
        header["pixdim"][4:] = 1
        header.set_data_shape(stored.shape)
        image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
        # With the header's own best affine nibabel leaves qform, sform and their codes as they are.
        image = image_class(stored, header.get_best_affine(), header)
        image.set_data_dtype(stored.dtype)
        with atomic_write(path) as temporary:
            nib.save(image, temporary)


def open_nifti(path: Path, case: str, *, channels_last: bool = False) -> NiftiFile:
    """Read and check the header of a NIfTI file.

    A 5-D file is read with its 5th axis as channels, as the standard declares it; channels_last: so is the 4th of a
    4-D file. Raises DataError, naming the file, for whatever is not one volume with a sound geometry.
    """
    header = _read_header(path)
    shape = _grid_shape(header, path, channels_last)
    affine, warnings = _affine(header, shape, path)
    check_affine(affine, path)
    reorientation = to_canonical(affine, shape)
    return NiftiFile(
        path=path,
        case=case,
        geometry=Geometry(reorientation.turn_affine(affine), physical=True),
        slice_names=tuple(f"{case}_{index:03d}" for index in range(shape[reorientation.order[0]])),
        reorientation=reorientation,
        header=header,
        warnings=warnings,
    )


def _opened(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def _read_header(path: Path) -> Any:
    import nibabel as nib
    from nibabel.spatialimages import HeaderDataError

    try:
        with _opened(path) as file:
            head = file.read(nib.Nifti2Header.sizeof_hdr)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: can't be opened as NIfTI ({error}); copy or export the file again",
            code="wrong_format" if isinstance(error, gzip.BadGzipFile) else "corrupt_file",
        ) from error
    header = _parse_header(head)
    if header is None:
        likely = "compressed: name it .nii.gz" if head[:2] == _GZIP else "truncated, or another format"
        raise DataError(
            f"{path}: not a single-file NIfTI image ({likely}); export it again as .nii.gz",
            code="wrong_format" if len(head) >= nib.Nifti1Header.sizeof_hdr else "corrupt_file",
        )
    # nibabel's own check replaces bad voxel sizes by 1 mm, so they must be looked at before it.
    pixdim = header["pixdim"][1:4]
    if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        raise DataError(
            f"{path}: zero spacing or no valid one (pixdim {pixdim.tolist()}); export the image again with its "
            f"geometry",
            code="zero_spacing",
        )
    try:
        header.check_fix()
        header.get_data_dtype()
        header.get_slope_inter()
        header.get_xyzt_units()
    except (HeaderDataError, KeyError) as error:
        raise DataError(
            f"{path}: broken NIfTI header ({error}); export the image again", code="broken_header"
        ) from error
    return header


def _parse_header(head: bytes) -> Any:
    """The unchecked header of a file that starts so; None if it is not NIfTI with header and data in one file."""
    import nibabel as nib

    for header_class, magic in ((nib.Nifti1Header, b"n+1"), (nib.Nifti2Header, b"n+2")):
        size = header_class.sizeof_hdr
        if len(head) >= size and head[:4] in (size.to_bytes(4, "little"), size.to_bytes(4, "big")):
            header = header_class(head[:size], check=False)
            return header if header["magic"].item()[:3] == magic else None
    return None


def _grid_shape(header: Any, path: Path, channels_last: bool) -> tuple[int, int, int]:
    shape = header.get_data_shape()
    dtype = header.get_data_dtype()
    if dtype.names is not None or dtype.kind == "c":
        raise DataError(
            f"{path}: expected one real number a voxel, found {dtype}; save colour or complex parts apart",
            code="colour",
        )
    if len(shape) < 3 or min(shape) < 1:
        raise DataError(
            f"{path}: expected a volume of 3 dimensions, found shape {list(shape)}; export it as 3-D",
            code="broken_header",
        )
    if len(shape) > 5 or (len(shape) > 3 and shape[3] > 1 and (len(shape) == 5 or not channels_last)):
        raise DataError(
            f"{path}: expected one volume, found shape {list(shape)} with {shape[3]} time points; "
            f"split it into 3-D files, of which several, separated by commas, are channels",
            code="several_volumes",
        )
    check_size(shape, path)
    return shape[0], shape[1], shape[2]


def _affine(header: Any, shape: tuple[int, int, int], path: Path) -> tuple[Affine, tuple[InputWarning, ...]]:
    """Stored indices to RAS+ mm, and doubts: by the sform, else the qform, else what the voxel size alone tells."""
    warnings = []
    has_qform, has_sform = int(header["qform_code"]) > 0, int(header["sform_code"]) > 0
    try:
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
        qform = np.asarray(header.get_qform(), dtype=np.float64) if has_qform else affine
    except ValueError as error:
        raise DataError(
            f"{path}: broken qform ({error}); export the image again with its geometry", code="broken_orientation"
        ) from error
    if has_qform and has_sform:
        corners = np.array(np.meshgrid(*((0, size - 1) for size in shape), [1])).reshape(4, -1)
        distance = float(np.linalg.norm((qform - affine) @ corners, axis=0).max())
        if distance > _MAX_DISAGREEMENT * float(header["pixdim"][1:4].min()):
            sentence = f"{path}: qform and sform disagree by {distance:.3g} mm; the sform is used"
            warnings.append(InputWarning(sentence, code="qform_sform_disagree"))
    elif not has_qform and not has_sform:
        sentence = f"{path}: the header gives no orientation (qform and sform codes 0); axes are taken as left, "
        warnings.append(InputWarning(f"{sentence}anterior, superior", code="no_orientation"))
    scale = _MM_PER_UNIT.get(header.get_xyzt_units()[0], 1.0)
    return np.diag([scale, scale, scale, 1.0]) @ affine, tuple(warnings)
