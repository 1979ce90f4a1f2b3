"""How the training images were acquired, as far as headers tell, and which studies were not acquired so. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cldf_fast.data.geometry import Geometry
from cldf_fast.data.stacks import Stack
from cldf_fast.errors import InputWarning

# A pixel is doubtful that is so many times as large as the largest of the training images, or as small. Networks see a
# scale that they were not trained on; between patients and scanners of one study, fields of view differ by less.
_TIMES = 2.0
_DIGITS = 6


@dataclass(frozen=True)
class Acquisition:
    """Of the training images. modality: DICOM's code of it, e.g. "MR". pixel_mm: smallest and largest side of a pixel
    at the working size, which is what networks see: images of one field of view have one, whatever their own size.
    Each is None where it is not known, and nothing is doubtful then.
    """

    modality: str | None = None
    pixel_mm: tuple[float, float] | None = None

    @classmethod
    def of(
        cls, modality: str | None, grids: Sequence[tuple[Geometry, tuple[int, int]]], working_size: int
    ) -> Acquisition:
        """Of a data set's modality and the geometries of its studies with their rows and columns."""
        sides = [side for grid in grids if grid[0].physical for side in _pixel_mm(*grid, working_size)]
        return cls(modality, (round(min(sides), _DIGITS), round(max(sides), _DIGITS)) if sides else None)

    @classmethod
    def from_json(cls, content: dict[str, Any] | None) -> Acquisition:
        """What `to_json` made; None, in directories that were written before there was this: nothing is known.

        Raises KeyError, TypeError or ValueError for anything else.
        """
        if content is None:
            return cls()
        modality, pixel_mm = content["modality"], content["pixel_mm"]
        if modality is not None and not isinstance(modality, str):
            raise TypeError(f"modality: expected text, got {type(modality).__name__}")
        if pixel_mm is None:
            return cls(modality)
        low, high = map(float, pixel_mm)
        if not 0 < low <= high:
            raise ValueError(f"pixel_mm: expected 0 < smallest <= largest, got {low:g}, {high:g}")
        return cls(modality, (low, high))

    def to_json(self) -> dict[str, Any]:
        """For a run's dataset.json and an engine directory's preprocessing.json."""
        return asdict(self)

    def doubts(self, stack: Stack, working_size: int) -> Iterator[InputWarning]:
        """In what a study differs: another modality by its headers, pixels of another size."""
        others = [each for each in stack.modalities if each != self.modality]
        if self.modality is not None and others:
            yield InputWarning(
                f"{stack.source}: modality {others[0]} by its headers, but the networks were trained on "
                f"{self.modality}; give a study of that modality",
                code="other_modality",
            )
        if self.pixel_mm is None or not stack.geometry.physical:
            return
        rows, columns = stack.image.shape[2:]
        sides = _pixel_mm(stack.geometry, (rows, columns), working_size)
        times = max(max(sides) / self.pixel_mm[1], self.pixel_mm[0] / min(sides))
        # Headers round: exactly twice as large is meant to be met.
        if round(times, 2) >= _TIMES:
            yield InputWarning(
                f"{stack.source}: pixels of {sides[0]:.3g} x {sides[1]:.3g} mm at the working size, but the networks "
                f"were trained on {self.pixel_mm[0]:.3g} to {self.pixel_mm[1]:.3g} mm; check the spacing, or cut or "
                f"pad the images to the field of view of the training images",
                code="other_pixel_size",
            )


def _pixel_mm(geometry: Geometry, size: tuple[int, int], working_size: int) -> tuple[float, float]:
    """Sides in mm, down and across, of a pixel of slices of `size` rows and columns after resizing."""
    _, down, across = geometry.spacing
    return down * size[0] / working_size, across * size[1] / working_size
