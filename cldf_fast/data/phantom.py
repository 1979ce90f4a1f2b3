"""Generated MR-like studies with known truth: nothing to download, no licence to accept, reproducible from a seed.

Two kinds. "lesion": brain-like slices with one class. Lesions are FLAIR-bright, T1-dark and mottled; every property
taken alone also occurs in structures that are not lesions, so no intensity threshold finds them, but a network that is
told only which slices hold one can. "organs": abdomen-like slices with four classes, each present independently.

Anatomy is drawn in units of half the field of view (x to the patient's left, y to posterior, z to superior, each in
[-1, 1]) from a random stream of its own, and only then sampled. Hence a patient keeps its anatomy at any image size and
number of slices, and no patient depends on how many others were asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from cldf_fast.data.base import SliceDataset, Study, StudyRef
from cldf_fast.data.geometry import Geometry
from cldf_fast.errors import DataError

# float32 throughout; numpy's stubs widen every mix with a Python float, so the alias can't say so.
Array = npt.NDArray[np.floating[Any]]

PHANTOM_SPLIT: Mapping[str, int] = MappingProxyType({"train": 200, "val": 15, "test": 40})
"""Patients in each part of `phantom_split`, numbered consecutively in this order."""

# The stack covers the same slab whatever the number of slices: 5 mm a slice for the default 8.
_SLAB_MM = 40.0
_MIN_SIZE = 32
# A lesion or organ ends where it has shrunk to this share of its width: sections through its very tip would be a few
# pixels, too few to see, and make the image-level label a coin toss.
_BLUNT_END = 0.65
# Standard deviation of the point spread: the scanner's own resolution, finer than a pixel up to size 128.
_BLUR = 0.0125
# Root mean square of a cubic B-spline lattice of unit normal coefficients, along one axis.
_SPLINE_RMS = 0.692


def phantom(kind: str = "lesion", *, patients: int, slices: int = 8, size: int = 64, seed: int = 0) -> SliceDataset:
    """Patients 0..patients-1 of a generated population, one study each, subjects "phantom-0000" and on.

    kind: "lesion" (1 class "lesion"; channels "flair", "t1") or "organs" (4 classes "liver", "right kidney",
    "left kidney", "spleen"; channels "in phase", "out of phase"). slices: per study, at least 1. size: rows and columns
    of the square images, at least 32. seed: of the population, not negative.
    Slices have shape [2, size, size] and true axial geometry (axis codes "SPL"); masks come with them for evaluation.
    Studies are generated when they are read, a few milliseconds each at 64 pixels. Bad arguments are a DataError.
    """
    return _population(kind, range(_at_least("patients", patients, 1)), slices, size, seed)


def phantom_split(kind: str = "lesion", size: int = 64, seed: int = 0) -> dict[str, SliceDataset]:
    """The standard benchmark: disjoint patients in "train", "val" and "test" (`PHANTOM_SPLIT` of each), 8 slices each.

    kind, size, seed: as for `phantom`, whose patients these are: train holds the first 200, and so on.
    """
    parts, start = {}, 0
    for part, patients in PHANTOM_SPLIT.items():
        parts[part] = _population(kind, range(start, start + patients), 8, size, seed)
        start += patients
    return parts


def _population(kind: str, patients: range, slices: int, size: int, seed: int) -> SliceDataset:
    if kind not in tuple(_KINDS):
        raise DataError(f"kind: expected one of {', '.join(map(repr, _KINDS))}, got {kind!r}")
    _at_least("slices", slices, 1)
    _at_least("size", size, _MIN_SIZE)
    _at_least("seed", seed, 0)
    names = [f"phantom-{patient:04d}" for patient in patients]
    refs = [
        StudyRef(name, name, slices, partial(_read_study, kind, patient, name, slices, size, seed))
        for patient, name in zip(patients, names, strict=True)
    ]
    return SliceDataset(refs, _KINDS[kind].class_names, _KINDS[kind].channel_names)


def _at_least(argument: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise DataError(f"{argument}: expected a whole number of at least {least}, got {value!r}")
    return int(value)


def _read_study(kind: str, patient: int, name: str, slices: int, size: int, seed: int) -> Study:
    spec = _KINDS[kind]
    # Two streams: how many noise values are drawn depends on the image size, and anatomy must not.
    anatomy, acquisition = (
        np.random.Generator(np.random.Philox(child))
        for child in np.random.SeedSequence([seed, list(_KINDS).index(kind), patient]).spawn(2)
    )
    canvas = _Canvas(slices, size, anatomy)
    channels, mask = spec.draw(canvas)
    image = _acquire(canvas, channels, acquisition)
    return Study(
        name=name,
        subject=name,
        image=torch.from_numpy(image),
        geometry=_axial_geometry(slices, size, spec.field_of_view_mm),
        slice_names=tuple(f"{name}-{i:02d}" for i in range(slices)),
        source=Path(name),
        mask=torch.from_numpy(mask),
    )


def _axial_geometry(slices: int, size: int, field_of_view_mm: float) -> Geometry:
    """Slices to superior, rows to posterior, columns to left; the centre of the stack is the origin."""
    slice_mm, pixel_mm = _SLAB_MM / slices, field_of_view_mm / size
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = slice_mm, -pixel_mm, -pixel_mm, 1.0
    centre = np.array([(slices - 1) / 2, (size - 1) / 2, (size - 1) / 2])
    affine[:3, 3] = -affine[:3, :3] @ centre
    return Geometry(affine, physical=True)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


class _Canvas:
    """The sampling grid of one study, its random stream, and shapes on it; arrays broadcast to [S, H, W]."""

    def __init__(self, slices: int, size: int, rng: np.random.Generator) -> None:
        z, xy = _cell_centres(slices), _cell_centres(size)
        self.z, self.y, self.x = z[:, None, None], xy[None, :, None], xy[None, None, :]
        self.shape = (slices, size, size)
        self.pixel = 2.0 / size
        self.rng = rng

    def uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def somewhere(self, axes: tuple[float, float], nearest: float, furthest: float) -> tuple[float, float]:
        """A point of an ellipse, evenly over the area between two squared elliptic radii."""
        angle, away = self.uniform(0.0, 2.0 * math.pi), math.sqrt(self.uniform(nearest, furthest))
        return away * axes[0] * math.cos(angle), away * axes[1] * math.sin(angle)

    def field(self, step: float, step_z: float = 0.6) -> Array:
        """Smooth random field, mean 0 and variance 1 over many draws, with features about `step` wide."""
        z, y, x = self.z.ravel(), self.y.ravel(), self.x.ravel()
        weights_z, weights_y, weights_x = _spline_weights(z, step_z), _spline_weights(y, step), _spline_weights(x, step)
        lattice = self.rng.standard_normal((weights_z.shape[1], weights_y.shape[1], weights_x.shape[1]))
        planes = np.tensordot(weights_z, lattice.astype(np.float32), axes=1)
        return np.asarray(weights_y @ planes @ weights_x.T / _SPLINE_RMS**3, dtype=np.float32)

    def coverage(self, distance: Array) -> Array:
        """Share of each pixel inside a shape, from the signed distance to its border (negative inside)."""
        inside: Array = np.clip(0.5 - distance / self.pixel, 0.0, 1.0)
        return inside

    def blob(
        self, radius: Array, width: float, middle: float = 0.0, half_height: float = 10.0, lumps: Array | float = 0.0
    ) -> Array:
        """Coverage of a blunt-ended solid.

        radius: elliptic radius of each pixel, 1 on the widest border. width: typical semi-axis, to turn radii into
        distances. middle, half_height: vertical extent. lumps: relative displacement of the border.
        """
        profile = np.maximum(1.0 - np.abs((self.z - middle) / half_height) ** 4, 0.0) ** 0.25
        return np.where(profile > _BLUNT_END, self.coverage((radius - profile * (1.0 + lumps)) * width), 0.0)


@dataclass(frozen=True)
class _Frame:
    """Coordinates of a body in its own pose: u to the patient's left, v to posterior."""

    u: Array
    v: Array

    @classmethod
    def posed(cls, canvas: _Canvas, shift: float, degrees: float) -> _Frame:
        angle = math.radians(canvas.rng.normal(0.0, degrees))
        # Patients are seldom straight in the scanner: the axis of the body drifts from slice to slice.
        dx, dy, tilt_x, tilt_y = canvas.rng.normal(0.0, shift, 4).tolist()
        x, y = canvas.x - dx - tilt_x * canvas.z, canvas.y - dy - tilt_y * canvas.z
        cos, sin = math.cos(angle), math.sin(angle)
        return cls(cos * x + sin * y, cos * y - sin * x)

    def radius(self, centre: tuple[float, float], axes: tuple[float, float], degrees: float = 0.0) -> Array:
        """Elliptic radius about a centre, 1 on the ellipse with these semi-axes."""
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        u, v = self.u - centre[0], self.v - centre[1]
        along, across = (cos * u + sin * v) / axes[0], (cos * v - sin * u) / axes[1]
        return np.sqrt(along * along + across * across)


def _cell_centres(count: int) -> Array:
    return ((2.0 * np.arange(count) + 1.0) / count - 1.0).astype(np.float32)


def _spline_weights(positions: Array, step: float) -> Array:
    """Cubic B-spline weights [positions, knots]; the knots depend on the step alone, never on the sampling."""
    knots = np.arange(-2, int(np.ceil(2.0 / step)) + 3)
    t = np.abs((positions[:, None] + 1.0) / step - knots)
    near, far = 2.0 / 3.0 - t**2 + t**3 / 2.0, np.maximum(2.0 - t, 0.0) ** 3 / 6.0
    weights: Array = np.where(t < 1.0, near, far).astype(np.float32)
    return weights


def _paint(channels: Array, alpha: Array, values: tuple[Array | float, ...]) -> None:
    """Blend values into channels [C, S, H, W], in place, where alpha [S, H, W] says."""
    for channel, value in zip(channels, values, strict=True):
        channel += alpha * (value - channel)


def _acquire(canvas: _Canvas, channels: Array, rng: np.random.Generator) -> Array:
    """What the scanner does to an image [C, S, H, W]: bias field, blur, Rician noise, arbitrary units."""
    acquired = np.empty_like(channels)
    for i, channel in enumerate(channels):
        bias = canvas.field(1.1, 1.5)
        biased = channel * (1.0 + 0.15 * np.tanh(bias))
        blurred = ndimage.gaussian_filter(biased, (0.0, _BLUR / canvas.pixel, _BLUR / canvas.pixel))
        sigma = canvas.uniform(0.02, 0.04)
        real, imaginary = rng.standard_normal((2, *blurred.shape), dtype=np.float32) * np.float32(sigma)
        acquired[i] = canvas.uniform(200.0, 2000.0) * np.hypot(blurred + real, imaginary) + canvas.uniform(0.0, 50.0)
    return np.ascontiguousarray(acquired.swapaxes(0, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Brain with lesions


def _draw_brain(canvas: _Canvas) -> tuple[Array, npt.NDArray[np.uint8]]:
    """Channels (FLAIR, T1) float32 [2, S, H, W] and the lesion mask uint8 [S, H, W]."""
    uniform = canvas.uniform
    head = _Frame.posed(canvas, shift=0.025, degrees=7.0)
    width, length = uniform(0.66, 0.76), uniform(0.80, 0.92)
    crown = 1.0 - uniform(0.02, 0.12) * (0.5 + 0.5 * canvas.z) ** 2
    radius = head.radius((0.0, 0.0), (width, length)) / crown + 0.015 * canvas.field(0.5)
    folds = canvas.field(0.13)
    depth = 0.82 - radius + 0.01 * folds

    def within(border: float) -> Array:
        return canvas.coverage((radius - border) * width)

    channels = np.zeros((2, *canvas.shape), dtype=np.float32)
    # Fat and muscle alternate in the scalp, so it holds every combination of FLAIR and T1 intensity.
    _paint(channels, within(1.0), (0.85 + 0.15 * canvas.field(0.25), 0.75 + 0.2 * canvas.field(0.25)))
    _paint(channels, within(0.91), (0.10, 0.12))
    _paint(channels, within(0.86), (0.15, 0.22))
    grey, white = (uniform(0.57, 0.65), uniform(0.48, 0.56)), (uniform(0.46, 0.54), uniform(0.66, 0.76))
    brain = canvas.coverage(-depth * width)
    _paint(channels, brain, grey)
    sulci = canvas.coverage((np.abs(folds) - 0.22) * 0.1) * canvas.coverage((depth - 0.16) * width)
    _paint(channels, 0.8 * brain * sulci, (0.2, 0.25))
    _paint(channels, canvas.coverage((0.15 + 0.07 * folds - depth) * width), white)
    for side in (-1, 1):
        nuclei = head.radius((side * uniform(0.2, 0.26), uniform(-0.08, 0.04)), (0.09, 0.15), side * 12.0)
        _paint(channels, canvas.blob(nuclei, 0.11, uniform(-1.0, 0.0), uniform(0.8, 1.2)), grey)
    channels *= 1.0 + 0.04 * canvas.field(0.12)

    ventricles, caps = _ventricles(canvas, head)
    _paint(channels, ventricles, (0.14, 0.22))
    _paint(channels, caps * brain, (uniform(0.75, 1.0), uniform(0.5, 0.6)))

    tissue = brain * (1.0 - ventricles)
    _draw_mimics(canvas, head, (width, length), tissue, channels)
    lesions = _draw_lesions(canvas, head, (width, length), tissue, channels)
    vessels = brain * _vessels(canvas, head, (width, length))
    _paint(channels, vessels, (uniform(0.85, 1.05), uniform(0.85, 1.05)))
    return channels, (lesions > 0.5).astype(np.uint8)


def _ventricles(canvas: _Canvas, head: _Frame) -> tuple[Array, Array]:
    """Coverage of the lateral ventricles and of the bright caps around their horns."""
    ventricles = np.zeros(canvas.shape, dtype=np.float32)
    caps = np.zeros(canvas.shape, dtype=np.float32)
    height, swelling = canvas.uniform(-0.5, 0.5), canvas.uniform(0.8, 1.25)
    shrink = swelling * (1.0 - 0.35 * (canvas.z - height) ** 2)
    thickness = canvas.uniform(0.03, 0.06)
    for side in (-1, 1):
        axes = (canvas.uniform(0.05, 0.08), canvas.uniform(0.2, 0.28))
        radius = head.radius((side * canvas.uniform(0.09, 0.12), canvas.uniform(-0.04, 0.06)), axes, side * 9.0)
        distance = (radius - shrink) * axes[0]
        ventricle = canvas.coverage(distance)
        horns = np.clip(np.abs(head.v) / (0.5 * axes[1]) - 1.0, 0.0, 1.0)
        ventricles = np.maximum(ventricles, ventricle)
        caps = np.maximum(caps, horns * canvas.coverage(distance - thickness))
    return ventricles, caps * (1.0 - ventricles)


def _vessels(canvas: _Canvas, head: _Frame, axes: tuple[float, float]) -> Array:
    """Small discs that wander from slice to slice, bright in both channels."""
    squared, calibre = np.ones(canvas.shape, dtype=np.float32), canvas.uniform(0.03, 0.045)
    for _ in range(int(canvas.rng.integers(5, 11))):
        centre_u, centre_v = canvas.somewhere(axes, 0.04, 0.64)
        drift_u, drift_v = canvas.rng.normal(0.0, 0.08, 2).tolist()
        u, v = head.u - centre_u - drift_u * canvas.z, head.v - centre_v - drift_v * canvas.z
        squared = np.minimum(squared, u * u + v * v)
    return canvas.coverage(np.sqrt(squared) - calibre)


def _lump(canvas: _Canvas, head: _Frame, axes: tuple[float, float], sizes: tuple[float, float], reach: float) -> Array:
    """Coverage of an irregular solid somewhere in the brain. Lesions and mimics share it: outlines tell nothing."""
    uniform = canvas.uniform
    centre = canvas.somewhere(axes, 0.04, 0.36)
    semi = (uniform(*sizes), uniform(*sizes))
    radius = head.radius(centre, semi, uniform(0.0, 180.0))
    lumps = np.clip(0.16 * canvas.field(0.22), -0.35, 0.35)
    return canvas.blob(radius, math.sqrt(semi[0] * semi[1]), uniform(-reach, reach), uniform(0.6, 1.15), lumps)


def _shaded(canvas: _Canvas, intensities: tuple[float, float]) -> tuple[float, float]:
    """Intensities (FLAIR, T1) of one patch: no two patients' are the same."""
    flair, t1 = intensities
    return flair + canvas.uniform(-0.07, 0.07), t1 + canvas.uniform(-0.05, 0.05)


def _draw_mimics(canvas: _Canvas, head: _Frame, axes: tuple[float, float], tissue: Array, channels: Array) -> None:
    """Patches with one property of a lesion each: FLAIR-bright but not T1-dark, or T1-dark but not FLAIR-bright.

    Their difference of FLAIR and T1 is that of a lesion, which lies between the two: no weighting of the channels sets
    lesions apart from both.
    """
    for _ in range(int(canvas.rng.integers(3, 7))):
        alpha = tissue * _lump(canvas, head, axes, (0.14, 0.3), reach=1.2)
        _paint(channels, alpha, _shaded(canvas, (0.98, 0.62)))
    for _ in range(int(canvas.rng.integers(1, 4))):
        alpha = tissue * _lump(canvas, head, axes, (0.14, 0.3), reach=1.2)
        _paint(channels, alpha, _shaded(canvas, (0.55, 0.2)))


def _draw_lesions(canvas: _Canvas, head: _Frame, axes: tuple[float, float], tissue: Array, channels: Array) -> Array:
    """Draw 0 to 2 lesions; returns their coverage [S, H, W]."""
    mottle = canvas.field(0.085, 0.4)
    lesions = np.zeros(canvas.shape, dtype=np.float32)
    for _ in range(int(canvas.rng.choice(3, p=(0.2, 0.5, 0.3)))):
        alpha = tissue * _lump(canvas, head, axes, (0.24, 0.4), reach=1.3)
        flair, t1 = _shaded(canvas, (0.76, 0.38))
        _paint(channels, alpha, (flair + 0.08 * mottle, t1 - 0.04 * mottle))
        lesions = np.maximum(lesions, alpha)
    return lesions


# ---------------------------------------------------------------------------------------------------------------------
# Abdomen with organs


def _draw_abdomen(canvas: _Canvas) -> tuple[Array, npt.NDArray[np.uint8]]:
    """Channels (in phase, out of phase) float32 [2, S, H, W] and the organ mask uint8 [S, H, W].

    Tissue is painted as (water, fat) signal: in phase they add, out of phase they cancel, which draws the dark line
    around every organ that borders on fat, as in real dual-echo images.
    """
    uniform = canvas.uniform
    body = _Frame.posed(canvas, shift=0.025, degrees=3.0)
    width, depth = uniform(0.84, 0.93), uniform(0.62, 0.72)
    radius = body.radius((0.0, 0.0), (width, depth)) + 0.012 * canvas.field(0.5)
    rim = uniform(0.06, 0.14)

    def within(border: float) -> Array:
        return canvas.coverage((radius - border) * depth)

    water_fat = np.zeros((2, *canvas.shape), dtype=np.float32)
    fat, muscle = (0.08, uniform(0.75, 0.95)), (uniform(0.3, 0.4), 0.03)
    _paint(water_fat, within(1.0), fat)
    _paint(water_fat, within(1.0 - rim), muscle)
    cavity = within(0.92 - rim)
    _paint(water_fat, cavity, (0.12, 0.6 * fat[1]))
    _draw_bowel(canvas, body, (width, depth), cavity, water_fat)
    _draw_spine(canvas, body, depth, muscle, water_fat)
    mask = _draw_organs(canvas, body, (width, depth), cavity, water_fat)
    water_fat *= 1.0 + 0.03 * canvas.field(0.1)
    water, lipid = water_fat
    return np.stack([water + lipid, np.abs(water - lipid)]), mask


def _draw_bowel(canvas: _Canvas, body: _Frame, axes: tuple[float, float], cavity: Array, water_fat: Array) -> None:
    """Loops and stomach everywhere in the cavity, where organs may be too, with the organs' range of intensities."""
    uniform = canvas.uniform
    for _ in range(int(canvas.rng.integers(14, 20))):
        centre = canvas.somewhere(axes, 0.0, 0.56)
        semi = (uniform(0.08, 0.2), uniform(0.08, 0.2))
        calibre = math.sqrt(semi[0] * semi[1])
        loop = body.radius(centre, semi, uniform(0.0, 180.0))
        middle, half_height = uniform(-1.2, 1.2), uniform(0.5, 1.2)
        _paint(water_fat, cavity * canvas.blob(loop, calibre, middle, half_height), (uniform(0.35, 0.6), 0.03))
        content = canvas.blob(loop / 0.6, 0.6 * calibre, middle, half_height)
        _paint(water_fat, cavity * content, (uniform(0.1, 0.75), 0.03))


def _draw_spine(canvas: _Canvas, body: _Frame, depth: float, muscle: tuple[float, float], water_fat: Array) -> None:
    uniform = canvas.uniform
    back = 0.58 * depth
    for side in (-1, 1):
        erector = body.radius((side * 0.17, back + 0.12), (0.14, 0.1))
        _paint(water_fat, canvas.blob(erector, 0.12), muscle)
        psoas = body.radius((side * 0.16, back - 0.06), (0.06, 0.08))
        _paint(water_fat, canvas.blob(psoas, 0.07), muscle)
    _paint(water_fat, canvas.blob(body.radius((0.0, back - 0.04), (0.12, 0.1)), 0.11), (uniform(0.25, 0.35), 0.2))
    _paint(water_fat, canvas.blob(body.radius((0.0, back + 0.1), (0.05, 0.04)), 0.045), (0.15, 0.03))
    for side in (-1, 1):
        vessel = body.radius((side * uniform(0.05, 0.09), back - 0.2), (0.05, 0.05))
        _paint(water_fat, canvas.blob(vessel, 0.05), (uniform(0.1, 0.7), 0.02))


def _draw_organs(
    canvas: _Canvas, body: _Frame, axes: tuple[float, float], cavity: Array, water_fat: Array
) -> npt.NDArray[np.uint8]:
    """Liver, spleen and kidneys; each has its own vertical extent, so that they come in all combinations."""
    uniform = canvas.uniform
    width, depth = axes
    mask = np.zeros(canvas.shape, dtype=np.uint8)
    lumps = np.clip(0.08 * canvas.field(0.3), -0.2, 0.2)
    speckle, portal = canvas.field(0.085, 0.4), canvas.field(0.16)

    def extent() -> tuple[float, float]:
        return uniform(-1.1, 1.1), uniform(0.6, 1.1) if uniform(0.0, 1.0) < 0.92 else 1e-3

    def draw(value: int, solid: Array, water: Array | float, lipid: float) -> Array:
        alpha = cavity * solid
        _paint(water_fat, alpha, (water, lipid))
        mask[alpha > 0.5] = value
        return alpha

    semi = (uniform(0.42, 0.5) * width, uniform(0.5, 0.62) * depth)
    shape = body.radius((-uniform(0.42, 0.5) * width, -uniform(0.05, 0.2) * depth), semi, uniform(-20.0, 20.0))
    liver = canvas.blob(shape, semi[1], *extent(), lumps)
    tract = canvas.coverage((np.abs(portal) - 0.12) * 0.1) * canvas.coverage((shape - 0.8) * semi[1])
    level = uniform(0.44, 0.58)
    draw(1, liver, level + (0.14 if uniform(0.0, 1.0) < 0.5 else -0.14) * tract, uniform(0.02, 0.1))

    semi = (uniform(0.14, 0.19), uniform(0.22, 0.3))
    shape = body.radius((uniform(0.62, 0.72) * width, uniform(0.05, 0.25) * depth), semi, uniform(-5.0, 25.0))
    draw(4, canvas.blob(shape, semi[0], *extent(), lumps), uniform(0.38, 0.54) + 0.07 * speckle, 0.03)

    # One cortex and medulla for both: a kidney's side shows in its place only.
    cortex, medulla, sinus = uniform(0.48, 0.6), uniform(0.28, 0.36), uniform(0.5, 0.8)
    for value, side in ((2, -1), (3, 1)):
        semi = (uniform(0.15, 0.18), uniform(0.19, 0.23))
        centre = (side * uniform(0.36, 0.42) * width, uniform(0.38, 0.48) * depth)
        shape = body.radius(centre, semi, side * uniform(-25.0, -5.0))
        middle, half_height = extent()
        kidney = draw(value, canvas.blob(shape, semi[0], middle, half_height, 0.5 * lumps), cortex, 0.03)
        _paint(water_fat, kidney * canvas.coverage((shape - 0.6 + 0.1 * speckle) * semi[0]), (medulla, 0.03))
        _paint(water_fat, kidney * canvas.coverage((shape - 0.22) * semi[0]), (0.1, sinus))
    return mask


@dataclass(frozen=True)
class _Kind:
    class_names: tuple[str, ...]
    channel_names: tuple[str, ...]
    field_of_view_mm: float
    draw: Callable[[_Canvas], tuple[Array, npt.NDArray[np.uint8]]]


# The order is part of the seed: append, never insert.
_KINDS: Mapping[str, _Kind] = MappingProxyType(
    {
        "lesion": _Kind(("lesion",), ("flair", "t1"), 192.0, _draw_brain),
        "organs": _Kind(
            ("liver", "right kidney", "left kidney", "spleen"), ("in phase", "out of phase"), 384.0, _draw_abdomen
        ),
    }
)
