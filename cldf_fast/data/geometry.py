"""Where the pixels of a stack lie in the patient."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the pixels of a stack lie in the patient.

    affine: float64 [4, 4], maps (slice, row, column, 1) indices to RAS+ millimetres.
    physical: False for formats that carry no geometry (PNG, plain TIFF); then the affine is the identity and
    millimetre figures are in pixels.
    """

    affine: np.ndarray = field(default_factory=lambda: np.eye(4))
    physical: bool = False

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance in mm between neighbours along (slice, row, column)."""
        steps = np.linalg.norm(np.asarray(self.affine)[:3, :3], axis=0)
        return float(steps[0]), float(steps[1]), float(steps[2])

    @property
    def axcodes(self) -> str:
        """Patient direction in which (slice, row, column) indices grow, e.g. "SPL" for a canonical axial stack."""
        directions = np.asarray(self.affine)[:3, :3]
        codes = []
        for axis in range(3):
            world = int(np.argmax(np.abs(directions[:, axis])))
            codes.append(("LR", "PA", "IS")[world][int(directions[world, axis] > 0)])
        return "".join(codes)
