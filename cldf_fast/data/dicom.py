"""DICOM series of single-frame images: read by position in the patient, masks written as DICOM SEG.

Headers name patients: no message of this module quotes a header's text, and no text of one goes to any output but the
SEG's patient and study modules, which the standard wants copied. pydicom's validation quotes values, and so it is off.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cldf_fast import __version__
from cldf_fast.data.geometry import Geometry
from cldf_fast.data.grid import Array, Reorientation, check_affine, check_size, to_canonical
from cldf_fast.errors import BackendError, DataError, InputWarning
from cldf_fast.files import atomic_write

# DICOM's patient axes are left, posterior, superior; ours are right, anterior, superior.
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Decimal strings are rounded by scanners: positions agree to this many mm, or to this share of the slice distance.
_POSITION_MM, _POSITION_SHARE = 0.01, 0.01
# Direction cosines carry 4 to 6 decimals.
_COSINE = 1e-3
# OHIF misplaces segments whose empty frames are omitted; beyond this many frames size matters more.
_MAX_EMPTY_FRAMES = 500
# At most 64 characters, as the standard has it.
_NOT_DIAGNOSTIC = "Research only, not to be used for diagnostic purposes"
_UNLIKE_TRAINING = "Research only, not diagnostic. Warning: unlike training images"
# The SEG needs these of its source; anonymised files often lack them, and the standard allows them to be empty.
_MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime",
)  # fmt: skip
_INTEGERS = ("NumberOfFrames", "Rows", "Columns")
_OTHERS_READ = (
    "ImageType", "PhotometricInterpretation", "Modality", "StudyInstanceUID", "SeriesInstanceUID",
    "FrameOfReferenceUID", "LossyImageCompression", "ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing",
)  # fmt: skip
# What the files of one series have in common: keyword, its name in errors, code of the refusal.
_SHARED = (
    ("StudyInstanceUID", "studies", "mixed_series"),
    ("SeriesInstanceUID", "series", "mixed_series"),
    ("Modality", "modalities", "mixed_series"),
    ("FrameOfReferenceUID", "frames of reference", "mixed_frames_of_reference"),
)
# Those of images. Any other is "OT", DICOM's own code for other: no text of a header gets out.
_MODALITIES = ("BI", "CR", "CT", "DX", "ES", "GM", "IO", "IVUS", "MG", "MR", "NM", "OCT", "OP", "OPT", "PT", "PX", "RF",
    "RG", "SM", "US", "XA", "XC")  # fmt: skip
# Whose stored values, rescaled, are a physical quantity.
_IN_UNITS = ("CT", "PT")
_MUST_BE_THERE = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID")

# SNOMED CT codes as (value, meaning).
_ANATOMY = ("91723000", "Anatomical Structure")
_ABNORMAL = ("49755003", "Morphologically Abnormal Structure")
_TISSUE = ("85756007", "Tissue")
_NEOPLASM = ("108369006", "Neoplasm")
# Category and type of the class names that are known, lower case, words parted by one space.
_TERMS = {
    "liver": (_ANATOMY, ("10200004", "Liver")),
    "spleen": (_ANATOMY, ("78961009", "Spleen")),
    "kidney": (_ANATOMY, ("64033007", "Kidney")),
    "kidneys": (_ANATOMY, ("64033007", "Kidney")),
    "right kidney": (_ANATOMY, ("9846003", "Right kidney")),
    "kidney right": (_ANATOMY, ("9846003", "Right kidney")),
    "left kidney": (_ANATOMY, ("18639004", "Left kidney")),
    "kidney left": (_ANATOMY, ("18639004", "Left kidney")),
    "lesion": (_ABNORMAL, ("52988006", "Lesion")),
    "neoplasm": (_ABNORMAL, _NEOPLASM),
    "tumour": (_ABNORMAL, _NEOPLASM),
    "tumor": (_ABNORMAL, _NEOPLASM),
    "whole tumour": (_ABNORMAL, _NEOPLASM),
    "whole tumor": (_ABNORMAL, _NEOPLASM),
}


@dataclass(frozen=True)
class DicomSeries:
    """A DICOM series whose headers were read, checked and sorted along the slice normal.

    files, headers: in that order, headers without pixels. reorientation: from that stack to the one handed out.
    slice_ranks: place of each slice's file among the series' files in natural name order; None where slices don't
    correspond to files (a stack that was acquired sagittal or coronal). warnings: what is doubtful about the headers.
    """

    case: str
    geometry: Geometry
    slice_names: tuple[str, ...]
    slice_ranks: tuple[int, ...] | None
    reorientation: Reorientation
    files: tuple[Path, ...] = field(repr=False)
    headers: tuple[Any, ...] = field(repr=False)
    warnings: tuple[InputWarning, ...] = ()

    @property
    def modality(self) -> str | None:
        """One of DICOM's codes for images, "OT" for others; None where the headers lack it."""
        stated = self.headers[0].get("Modality")
        return None if not stated else stated if stated in _MODALITIES else "OT"

    def load(self) -> Array:
        """The voxels float32 [S, 1, H, W], rescaled slice by slice, MONOCHROME1 inverted but for CT and PT."""
        stored = np.empty(self.reorientation.shape, dtype=np.float32)
        for index, path in enumerate(self.files):
            stored[index] = _pixels(path, stored.shape[1:])
        return self.reorientation.apply(stored)[:, None]

    def write(
        self,
        mask: Array,
        probability: Array | None,
        class_names: Sequence[str],
        out: Path,
        *,
        unlike_training: bool = False,
    ) -> list[Path]:
        """Write `<case>_mask.dcm` (BINARY DICOM SEG) and `<case>_probability.dcm` (FRACTIONAL DICOM SEG).

        unlike_training: whether their descriptions, which viewers show, warn of that.
        Raises BackendError where highdicom is not installed, DataError where the source lacks the UIDs to refer to.
        """
        from pydicom.config import disable_value_validation

        highdicom = _import_highdicom()
        outputs = [(out / f"{self.case}_mask.dcm", self.reorientation.undo(mask), "BINARY")]
        if probability is not None:
            stored = self.reorientation.undo(np.moveaxis(probability, 1, 3))
            outputs.append((out / f"{self.case}_probability.dcm", stored, "FRACTIONAL"))
        with disable_value_validation(), warnings.catch_warnings():
            # Among highdicom's warnings are some that quote the patient's name.
            warnings.simplefilter("ignore")
            try:
                sources = [self._source(index) for index in range(len(self.files))]
                description = _UNLIKE_TRAINING if unlike_training else _NOT_DIAGNOSTIC
                for number, (path, stored, kind) in enumerate(outputs):
                    segmentation = _segmentation(highdicom, sources, stored, kind, class_names, number, description)
                    with atomic_write(path) as temporary:
                        segmentation.save_as(temporary)
            except (DataError, OSError):
                raise
            except Exception as error:  # of a dozen unrelated types, quoting what stands in the headers
                raise DataError(
                    f"{self.files[0].parent}: the headers are damaged, so that a DICOM SEG can't refer to them "
                    f"({type(error).__name__}); convert the series to NIfTI first",
                    code="broken_header",
                ) from error
        return [path for path, _, _ in outputs]

    def _source(self, index: int) -> Any:
        from pydicom.valuerep import DS

        header = copy.deepcopy(self.headers[index])
        for keyword in _MUST_BE_THERE:
            if not header.get(keyword):
                raise DataError(
                    f"{self.files[index]}: no {keyword}, so that a DICOM SEG can't refer to it; "
                    f"convert the series to NIfTI first",
                    code="missing_uid",
                )
        for keyword in _MAY_BE_EMPTY:
            if keyword not in header:
                setattr(header, keyword, "")
        # Viewers take the SEG's voxel size from these, and highdicom takes them from its source.
        distance = self.geometry.spacing[self.reorientation.order.index(0)]
        header.SliceThickness = header.SpacingBetweenSlices = DS(distance, auto_format=True)
        return header


def open_dicom(files: Sequence[Path], names: Sequence[str], case: str, source: Path) -> DicomSeries:
    """Read, check and sort the headers of one series.

    files: in natural name order. names: of the slices, one a file. source: what to name in errors about the whole.
    An axial series keeps its own in-plane orientation with slices towards superior, and so does one slice alone; any
    other is turned to canonical orientation. Raises DataError, naming the file, for whatever is not one complete series
    on one rectangular grid.
    """
    headers = [_read_header(path) for path in files]
    for path, header in zip(files, headers, strict=True):
        _check_image(path, header)
    orientations = [_numbers(h, "ImageOrientationPatient", 6, p) for p, h in zip(files, headers, strict=True)]
    positions = np.stack([_numbers(h, "ImagePositionPatient", 3, p) for p, h in zip(files, headers, strict=True)])
    spacings = [_numbers(h, "PixelSpacing", 2, p) for p, h in zip(files, headers, strict=True)]
    for keyword, what, code in _SHARED:
        values = [header.get(keyword) for header in headers]
        _check_same(files, values, _equal, what, "give the files of one series", code)
    sizes = [(int(header.Rows), int(header.Columns)) for header in headers]
    check_size((len(files), *sizes[0]), source)
    _check_same(files, sizes, _equal, "image sizes", "give the files of one series", "mixed_grids")
    _check_same(files, spacings, _close, "pixel spacings", "give the files of one series", "mixed_grids")
    _check_same(files, orientations, _close, "orientations", "remove localisers and other planes", "mixed_grids")

    row, column = orientations[0].reshape(2, 3)
    if np.abs([row @ row - 1, column @ column - 1, row @ column]).max() > _COSINE:
        raise DataError(
            f"{files[0]}: ImageOrientationPatient is not two perpendicular unit vectors; export it again",
            code="broken_orientation",
        )
    normal = np.cross(row, column)
    heights = positions @ normal
    order = np.argsort(heights, kind="stable").tolist()
    step = _slice_step(positions[order], heights[order], normal, [files[i] for i in order], source)

    lps = np.eye(4)
    lps[:3, :] = np.column_stack([step, column * spacings[0][0], row * spacings[0][1], positions[order[0]]])
    affine = _LPS_TO_RAS @ lps
    check_affine(affine, source)
    shape = (len(files), *sizes[0])
    # One slice of any orientation is an image of its own; turned, it would be a stack of single lines.
    axial = int(np.argmax(np.abs(normal))) == 2
    as_acquired = len(files) == 1 or axial
    reorientation = Reorientation((0, 1, 2), (bool(normal[2] < 0), False, False), shape)
    if not as_acquired:
        reorientation = to_canonical(affine, shape)
    ranks = tuple(order[::-1] if reorientation.flips[0] else order)
    num_slices = shape[reorientation.order[0]]
    return DicomSeries(
        case=case,
        geometry=Geometry(reorientation.turn_affine(affine), physical=True),
        slice_names=tuple(names[i] for i in ranks)
        if as_acquired
        else tuple(f"{case}_{i:03d}" for i in range(num_slices)),
        slice_ranks=ranks if as_acquired else None,
        reorientation=reorientation,
        files=tuple(files[i] for i in order),
        headers=tuple(headers[i] for i in order),
        warnings=tuple(_doubts(headers, axial and not (row[0] > 0 and column[1] > 0), source)),
    )


def _read_header(path: Path) -> Any:
    import pydicom
    from pydicom.config import disable_value_validation

    try:
        with disable_value_validation():
            header = pydicom.dcmread(path, stop_before_pixels=True)
            # Values are parsed on first use: a broken one should be met here.
            for keyword in _INTEGERS:
                int(header.get(keyword) or 0)
            for keyword in _OTHERS_READ:
                header.get(keyword)
    except Exception as error:  # the parser raises errors of a dozen unrelated types on damaged bytes
        raise DataError(
            f"{path}: not a readable DICOM file (truncated?); copy it again, or remove it", code="corrupt_file"
        ) from error
    return header


def _check_image(path: Path, header: Any) -> None:
    if int(header.get("NumberOfFrames") or 1) > 1:
        raise DataError(
            f"{path}: multi-frame DICOM is not read; convert it to NIfTI or to single-frame files, one a slice",
            code="several_volumes",
        )
    if not header.get("Rows") or not header.get("Columns"):
        raise DataError(f"{path}: a DICOM file without an image; remove it from the series", code="no_image")
    if "LOCALIZER" in (header.get("ImageType") or ()):
        raise DataError(f"{path}: a localiser, not a slice of the series; remove it", code="localiser")
    if header.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
        raise DataError(f"{path}: colour DICOM is not read; expected MONOCHROME1 or MONOCHROME2", code="colour")
    if not header.get("SeriesInstanceUID"):
        raise DataError(
            f"{path}: no SeriesInstanceUID, so that the series can't be told; export the series again",
            code="missing_uid",
        )


def _doubts(headers: Sequence[Any], turned: bool, source: Path) -> Iterator[InputWarning]:
    if len(headers) == 1:
        yield InputWarning(f"{source}: one slice has no slice distance; 1 mm is assumed", code="single_slice")
    if any(header.get("LossyImageCompression") == "01" for header in headers):
        yield InputWarning(f"{source}: the images were compressed with loss", code="lossy_compression")
    if any("DERIVED" in (header.get("ImageType") or ()) for header in headers):
        yield InputWarning(
            f"{source}: the images were computed from others (ImageType DERIVED), not acquired", code="derived_image"
        )
    if turned:
        yield InputWarning(
            f"{source}: rows do not run to the patient's left, or columns not to the back, as is usual "
            f"(was the patient prone?); networks see the images as they are stored",
            code="turned_images",
        )


def _numbers(header: Any, keyword: str, count: int, path: Path) -> npt.NDArray[np.float64]:
    try:
        values = np.array([float(value) for value in header.get(keyword) or ()])
    except (ValueError, TypeError):
        values = np.empty(0)
    if values.size != count or not np.isfinite(values).all():
        raise DataError(
            f"{path}: {keyword} is missing or not {count} numbers, and geometry is never guessed; "
            f"export the series again from its archive",
            code="missing_geometry",
        )
    return values


def _equal(a: Any, b: Any) -> bool:
    return bool(a == b)


def _close(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> bool:
    return bool(np.abs(a - b).max() <= _COSINE)


def _check_same(
    files: Sequence[Path],
    values: Sequence[Any],
    same: Callable[[Any, Any], bool],
    what: str,
    advice: str,
    code: str,
) -> None:
    for path, value in zip(files, values, strict=True):
        if not same(values[0], value):
            raise DataError(
                f"{files[0].parent}: mixed {what}, {files[0].name} and {path.name} differ; {advice}", code=code
            )


def _slice_step(
    positions: npt.NDArray[np.float64],
    heights: npt.NDArray[np.float64],
    normal: npt.NDArray[np.float64],
    files: Sequence[Path],
    source: Path,
) -> npt.NDArray[np.float64]:
    """The vector in mm from one slice to the next; slices sorted along the normal, and checked to be evenly spaced.

    Of one slice alone the normal.
    """
    if len(files) == 1:
        return normal
    gaps = np.diff(heights)
    distance = float(np.median(gaps))
    tolerance = max(_POSITION_MM, _POSITION_SHARE * distance) + 1e-6
    closest = int(gaps.argmin())
    if gaps[closest] <= tolerance:
        raise DataError(
            f"{source}: {files[closest].name} and {files[closest + 1].name} have the same position; "
            f"give one copy, echo or time point at a time",
            code="duplicate_slice",
        )
    odd = int(np.abs(gaps - distance).argmax())
    if abs(gaps[odd] - distance) > tolerance:
        raise DataError(
            f"{source}: {gaps[odd]:.6g} mm between {files[odd].name} and {files[odd + 1].name}, but {distance:.6g} mm "
            f"between most slices: a slice is missing or out of place; export the whole series again",
            code="missing_slice",
        )
    step: npt.NDArray[np.float64] = (positions[-1] - positions[0]) / (len(files) - 1)
    even = positions[0] + np.arange(len(files))[:, None] * step
    away = np.linalg.norm(positions - even, axis=1)
    if away.max() > tolerance:
        raise DataError(
            f"{source}: {files[int(away.argmax())].name} lies {away.max():.3g} mm off the line of the other slices; "
            f"export the whole series again",
            code="misplaced_slice",
        )
    return step


def _pixels(path: Path, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    import pydicom
    from pydicom.config import disable_value_validation
    from pydicom.pixels.processing import apply_modality_lut

    try:
        with disable_value_validation():
            dataset = pydicom.dcmread(path)
            pixels = np.asarray(apply_modality_lut(dataset.pixel_array, dataset), dtype=np.float32)
            # MONOCHROME1 is about display: what has a unit keeps it, and of the rest, more is to be brighter.
            if dataset.PhotometricInterpretation == "MONOCHROME1" and dataset.get("Modality") not in _IN_UNITS:
                levels, signed = 1 << dataset.BitsStored, dataset.PixelRepresentation
                ends = np.array([-levels // 2, levels // 2 - 1] if signed else [0, levels - 1])
                pixels = np.asarray(apply_modality_lut(ends, dataset), dtype=np.float32).sum() - pixels
    except Exception as error:  # decoders raise errors of a dozen unrelated types on damaged bytes
        raise DataError(
            f"{path}: the pixel data can't be decoded (truncated, or compressed in a way that needs pylibjpeg); "
            f"copy the file again or decompress it",
            code="undecodable_pixels",
        ) from error
    if pixels.shape != shape:
        raise DataError(
            f"{path}: expected {list(shape)} pixels, found {list(pixels.shape)}; export it again",
            code="undecodable_pixels",
        )
    return pixels


def _import_highdicom() -> Any:
    try:
        import highdicom
    except ImportError as error:
        raise BackendError(
            "writing a DICOM SEG needs highdicom, which is not installed; pip install cldf_fast[dicom]"
        ) from error
    return highdicom


def _segmentation(
    highdicom: Any,
    sources: Sequence[Any],
    stored: Array,
    kind: str,
    class_names: Sequence[str],
    number: int,
    description: str,
) -> Any:
    """A DICOM SEG of one segment a class.

    stored: uint8 [S, H, W] class values, or float [S, H, W, K] probabilities.
    number: tells the series that are written of one source apart. description: of content and series.

    highdicom pairs frame i with source i without looking at positions: both must be in the order of the positions.
    """
    segments = [_segment(highdicom, index, name) for index, name in enumerate(class_names, start=1)]
    segmentation = highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=np.ascontiguousarray(stored),
        segmentation_type=kind,
        segment_descriptions=segments,
        series_instance_uid=highdicom.UID(),
        series_number=1000 + number,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="cldf_fast",
        manufacturer_model_name="cldf_fast",
        software_versions=__version__,
        device_serial_number="0",
        content_label="CLDF_FAST",
        content_description=description,
        series_description=description,
        omit_empty_frames=len(sources) * len(segments) > _MAX_EMPTY_FRAMES,
    )
    segmentation.ContentQualification = "RESEARCH"
    return segmentation


def _segment(highdicom: Any, number: int, name: str) -> Any:
    from pydicom.sr.codedict import codes

    category, kind = _TERMS.get(re.sub(r"[\s_-]+", " ", name).strip().lower(), (_TISSUE, _TISSUE))
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=highdicom.sr.CodedConcept(category[0], "SCT", category[1]),
        segmented_property_type=highdicom.sr.CodedConcept(kind[0], "SCT", kind[1]),
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="CLDF", family=codes.cid7162.ArtificialIntelligence, version=__version__
        ),
    )
