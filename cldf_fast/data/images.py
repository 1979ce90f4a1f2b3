"""PNG and TIFF slices: read as stored or refused, never converted by guess; masks written in the input's format."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cldf_fast.data.geometry import Geometry
from cldf_fast.data.grid import Array
from cldf_fast.errors import DataError, InputWarning
from cldf_fast.files import atomic_write

MASK_ENDING, PROBABILITY_ENDING = "_mask", "_probability"

_GREY = ("1", "L", "I;16", "I;16L", "I;16B", "I", "F")
_IMAGE_MODES = (*_GREY, "RGB")
# A palette's colours are for the eye; its indices are the classes.
_MASK_MODES = (*_GREY, "P")
_EXIF_ORIENTATION = 274
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
# More than any detector has; memory is taken by what headers say.
_MAX_SIDE = 2**14
_BITS_PER_SAMPLE, _PLANAR_CONFIGURATION = 258, 284
_SAMPLES_PER_PIXEL = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by PNG's colour type
# Where the passes of an interlaced PNG begin, (across, down), and their steps; of one that isn't, the only pass.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_ONE_PASS = ((0, 0, 1, 1),)
_CHUNK = 1 << 20
# Colours of classes 1, 2, ... in masks, repeated when they run out: red, green, blue, yellow, magenta, cyan.
_COLOURS = ((230, 60, 50), (60, 180, 75), (65, 105, 225), (255, 210, 40), (200, 60, 200), (70, 220, 220))


@dataclass(frozen=True)
class ImageFiles:
    """PNG or TIFF files, one a slice, in natural name order; they carry no geometry.

    format: "PNG" or "TIFF". mask: whether they hold classes, in which case lossy and colour files are refused.
    """

    format: str
    files: tuple[Path, ...] = field(repr=False)
    slice_names: tuple[str, ...]
    mask: bool = False
    warnings: tuple[InputWarning, ...] = ()

    @property
    def geometry(self) -> Geometry:
        """Not physical."""
        return Geometry()

    @property
    def modality(self) -> None:
        """Not known."""
        return None

    @property
    def slice_ranks(self) -> tuple[int, ...]:
        """Slices are in the order of the files."""
        return tuple(range(len(self.files)))

    def load(self) -> Array:
        """The pixels [S, C, H, W] as stored, C = 1 (grey, or palette indices of a mask) or 3 (RGB)."""
        slices = []
        for path in self.files:
            slices.append(_read(path, self.format, self.mask))
            if slices[-1].shape != slices[0].shape:
                raise DataError(
                    f"{path}: {_describe(slices[-1])}, but {self.files[0].name} has {_describe(slices[0])}; "
                    f"give the slices of one study",
                    code="mixed_grids",
                )
        return np.stack(slices)

    def write(
        self,
        mask: Array,
        probability: Array | None,
        class_names: Sequence[str],
        out: Path,
        *,
        unlike_training: bool = False,
    ) -> list[Path]:
        """Write `<slice>_mask.<ext>` (8 bits, class indices with a palette) for every slice.

        A probability goes to `<slice>_probability.<ext>`, of several classes to `<slice>_<class>_probability.<ext>`:
        16-bit grey PNG with 65535 for 1, or float32 TIFF. unlike_training: not said in images.
        """
        from PIL import Image

        written = []
        for index, (name, path) in enumerate(zip(self.slice_names, self.files, strict=True)):
            classes = Image.fromarray(np.ascontiguousarray(mask[index]))
            classes.putpalette(_palette())
            written.append(self._save(classes, out / f"{name}{MASK_ENDING}{path.suffix}"))
            if probability is not None:
                for class_name, values in zip(class_names, probability[index], strict=True):
                    part = "" if len(class_names) == 1 else "_" + re.sub(r"[^\w-]+", "_", class_name)
                    target = out / f"{name}{part}{PROBABILITY_ENDING}{path.suffix}"
                    written.append(self._save(Image.fromarray(self._levels(values)), target))
        return written

    def _levels(self, probability: Array) -> Array:
        """Probabilities in the finest type that the format holds."""
        if self.format == "PNG":
            return np.rint(probability.astype(np.float64) * 65535).astype(np.uint16)
        return np.ascontiguousarray(probability)

    def _save(self, image: Any, path: Path) -> Path:
        with atomic_write(path) as temporary:
            image.save(temporary, format=self.format)
        return path


def _palette() -> list[int]:
    colours = [(0, 0, 0), *(_COLOURS[index % len(_COLOURS)] for index in range(255))]
    return [level for colour in colours for level in colour]


def _describe(pixels: Array) -> str:
    channels, rows, columns = pixels.shape
    return f"{channels} channel{'s' if channels > 1 else ''} of {rows} x {columns} pixels"


def _read(path: Path, expected: str, mask: bool) -> Array:
    """One file as [C, H, W]."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            _check_file(image, path, expected, mask)
            image.load()
            pixels = np.asarray(image)
        if expected == "PNG":
            _check_png_size(path)
    except DataError:
        raise
    except Exception as error:  # decoders raise errors of a dozen unrelated types on damaged bytes
        raise DataError(
            f"{path}: truncated or corrupt {expected} file; copy or export it again", code="corrupt_file"
        ) from error
    return np.moveaxis(pixels, 2, 0) if pixels.ndim == 3 else pixels[None]


def _check_file(image: Any, path: Path, expected: str, mask: bool) -> None:
    lossy = "jpeg" in str(image.info.get("compression", "")).lower()
    if mask and (image.format == "JPEG" or lossy):
        raise DataError(
            f"{path}: JPEG compression is lossy and changes class values; save the mask as PNG or TIFF",
            code="lossy_mask",
        )
    if image.format != expected:
        raise DataError(
            f"{path}: named as {expected} but holds {image.format}; save it as {expected}", code="wrong_format"
        )
    if max(image.size) > _MAX_SIDE:
        raise DataError(
            f"{path}: expected at most {_MAX_SIDE} pixels a side, the header claims {image.height} x {image.width}; "
            f"cut the image up, or export it again",
            code="too_large",
        )
    if getattr(image, "n_frames", 1) > 1:
        raise DataError(f"{path}: {image.n_frames} pages in one file; save one slice a file", code="several_volumes")
    if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        raise DataError(
            f"{path}: carries an EXIF rotation, which viewers treat differently; save it upright", code="exif_rotation"
        )
    if expected == "TIFF" and image.mode.startswith(("I", "F")) and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise DataError(
            f"{path}: zero is white in it (PhotometricInterpretation), which readers of more than 8 bits pass over; "
            f"save it with black as zero",
            code="white_is_zero",
        )
    if image.mode not in (_MASK_MODES if mask else _IMAGE_MODES):
        wanted = "grey levels or a palette of class indices" if mask else "grey levels or RGB without palette and alpha"
        raise DataError(f"{path}: expected {wanted}, found Pillow mode {image.mode}; convert the file", code="colour")
    bits = _bits_per_sample(image, path)
    if (image.mode == "RGB" and bits != 8) or (image.mode == "L" and bits < 8):
        raise DataError(
            f"{path}: {bits} bits a sample in {image.mode} would be rescaled on reading; "
            f"save it with 8 bits, or as 16-bit grey",
            code="bit_depth",
        )
    if expected == "TIFF":
        _check_tiles(image, path)


def _check_tiles(image: Any, path: Path) -> None:
    """Pillow leaves what no strip or tile of a TIFF covers at 0 without a word; libtiff, of those compressed, doesn't.

    image: not loaded yet.
    """
    separate = image.tile[0][0] != "libtiff" and image.tag_v2.get(_PLANAR_CONFIGURATION) == 2
    planes = len(image.getbands()) if separate else 1
    covered = sum((right - left) * (bottom - top) for _, (left, top, right, bottom), *_ in image.tile)
    if covered < planes * image.width * image.height:
        raise _lacking(path, "TIFF", covered, planes * image.width * image.height, "pixels")


def _check_png_size(path: Path) -> None:
    """Pillow leaves rows at 0 without a word where the compressed data, whole in itself, ends before they do."""
    data = path.read_bytes()
    width, height, bits, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    expected = 0
    for left, top, across, down in _ADAM7 if interlaced else _ONE_PASS:
        columns, rows = -((left - width) // across), -((top - height) // down)
        if columns > 0 and rows > 0:
            # One byte of each row tells its filter.
            expected += rows * (1 + -(-columns * bits * _SAMPLES_PER_PIXEL[colour] // 8))
    found = _unpacked_size(_compressed(data), expected)
    if found != expected:
        raise _lacking(path, "PNG", found, expected, "bytes")


def _compressed(png: bytes) -> bytes:
    """The content of a PNG's IDAT chunks, which is one stream."""
    parts, place = [], 8
    while place < len(png):
        (size,) = struct.unpack_from(">I", png, place)
        if png[place + 4 : place + 8] == b"IDAT":
            parts.append(png[place + 8 : place + 8 + size])
        place += size + 12
    return b"".join(parts)


def _unpacked_size(stream: bytes, most: int) -> int:
    """How many bytes a zlib stream unpacks to; counted to little more than `most`, since a few can hold very many."""
    unpacker, size = zlib.decompressobj(), 0
    while stream and size <= most and not unpacker.eof:
        size += len(unpacker.decompress(stream, _CHUNK))
        stream = unpacker.unconsumed_tail
    return size


def _lacking(path: Path, form: str, found: int, expected: int, unit: str) -> DataError:
    return DataError(
        f"{path}: corrupt {form} file: the header calls for {expected} {unit}, the file holds {found}"
        f"{' or more' if found > expected else ''}; copy or export it again",
        code="corrupt_file",
    )


def _bits_per_sample(image: Any, path: Path) -> int:
    """As stored in the file: Pillow scales other depths to 8 bits without a word."""
    if image.format == "TIFF":
        return int(max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,))))
    with path.open("rb") as file:
        # The bit depth is byte 24 of every PNG: the header chunk must be the first.
        return file.read(25)[24]
