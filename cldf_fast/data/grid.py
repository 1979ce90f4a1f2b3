"""Voxel grids: checks of an affine, and the exact, invertible turn of a stack to canonical axial orientation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cldf_fast.errors import DataError

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.uint8]
Affine = npt.NDArray[np.float64]

# Cosine of the angle of axes that should be perpendicular: far above float32 rounding, far below a tilted gantry.
_MAX_SHEAR = 1e-3
# 8192 slices of 512 x 512; what is larger is a header that lies, and memory is taken by what headers say.
_MAX_VOXELS = 2**31
# World axis (0 left-right, 1 posterior-anterior, 2 inferior-superior) and direction of the slices, rows and columns.
_CANONICAL = ((2, 1), (1, -1), (0, -1))
_OF_A_SLICE = {0: ((0, -1), (2, -1), (1, -1)), 1: ((1, -1), (2, -1), (0, -1)), 2: _CANONICAL}
"""The same of a slice alone, by the world axis that it is perpendicular to: as it is looked at."""


@dataclass(frozen=True)
class Reorientation:
    """A turn of a 3-D grid by axis permutation and flips: no voxel is resampled, and `undo` is exact.

    order: axis i of the turned grid is axis order[i] of the stored one. flips: whether it runs against it.
    shape: of the stored grid.
    """

    order: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    shape: tuple[int, int, int]

    def apply(self, stored: Array) -> Array:
        """Turn a stored array whose first 3 axes are the grid; further axes stay as they are. Returns a view."""
        turned = stored.transpose(*self.order, *range(3, stored.ndim))
        return np.flip(turned, self._flipped_axes)

    def undo(self, turned: Array) -> Array:
        """The inverse of `apply`."""
        inverse = np.argsort(self.order).tolist()
        return np.flip(turned, self._flipped_axes).transpose(*inverse, *range(3, turned.ndim))

    def turn_affine(self, stored: Affine) -> Affine:
        """The affine of the turned grid, from that of the stored one: every voxel keeps its place in the world."""
        to_stored = np.zeros((4, 4))
        to_stored[3, 3] = 1
        for axis, (source, flip) in enumerate(zip(self.order, self.flips, strict=True)):
            to_stored[source, axis] = -1 if flip else 1
            to_stored[source, 3] = self.shape[source] - 1 if flip else 0
        return stored @ to_stored

    @property
    def _flipped_axes(self) -> tuple[int, ...]:
        # To turn an axis of one leaves nothing but a negative stride, which torch refuses.
        return tuple(axis for axis in range(3) if self.flips[axis] and self.shape[self.order[axis]] > 1)


def to_canonical(affine: Affine, shape: tuple[int, int, int]) -> Reorientation:
    """The turn to slices towards superior, rows towards posterior, columns towards the patient's left ("SPL").

    A slice alone stays one, whatever its plane: turned, a sagittal or coronal one would be a stack of single lines. Its
    rows go towards inferior then.
    affine: stored indices to RAS+ mm, checked. For an oblique grid each axis goes to the closest direction.
    """
    from nibabel.orientations import io_orientation

    world, direction = io_orientation(affine).astype(int).T.tolist()
    alone = shape.index(1) if shape.count(1) == 1 else None
    directions = _CANONICAL if alone is None else _OF_A_SLICE[world[alone]]
    order = [world.index(axis) for axis, _ in directions]
    flips = [direction[source] != wanted for source, (_, wanted) in zip(order, directions, strict=True)]
    return Reorientation((order[0], order[1], order[2]), (flips[0], flips[1], flips[2]), shape)


def check_size(shape: Sequence[int], source: Path) -> None:
    """Raise DataError, naming the source, where a header claims more voxels than any scanner makes."""
    if math.prod(shape) > _MAX_VOXELS:
        raise DataError(
            f"{source}: expected at most {_MAX_VOXELS} voxels, the header claims {list(shape)}; cut the volume up, or "
            f"export it again",
            code="too_large",
        )


def check_affine(affine: Affine, source: Path) -> None:
    """Raise DataError, naming the source, unless the affine is finite with three perpendicular axes of length > 0."""
    if not np.isfinite(affine).all():
        raise DataError(
            f"{source}: the affine holds NaN or infinite values; export the image again with its geometry",
            code="broken_affine",
        )
    axes = affine[:3, :3]
    steps = np.linalg.norm(axes, axis=0)
    if steps.min() <= 0:
        raise DataError(
            f"{source}: zero spacing along axis {int(steps.argmin())}; export the image again with its geometry",
            code="zero_spacing",
        )
    cosines = (axes / steps).T @ (axes / steps) - np.eye(3)
    if np.linalg.matrix_rank(axes / steps, tol=_MAX_SHEAR) < 3:
        raise DataError(
            f"{source}: the affine is singular; export the image again with its geometry", code="singular_affine"
        )
    if np.abs(cosines).max() > _MAX_SHEAR:
        raise DataError(
            f"{source}: the affine is sheared (axes not perpendicular, as from a tilted gantry); "
            f"resample the image to a rectangular grid first",
            code="sheared_affine",
        )
