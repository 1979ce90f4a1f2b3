"""From stored intensities to the range that networks expect, without torch: training and engines share it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cldf_fast.data.grid import Floats
from cldf_fast.errors import DataError

INTENSITY_RANGE = (-1.0, 1.0)
"""Every image that leaves a dataset lies in this closed range; -1 is air or the window's lower end."""

_ROUNDING = 1e-3  # past the range, by which images that others prepared may miss it

# Tissue is what is brighter than this share of a robust maximum: air and most noise fall below it.
_TISSUE_FLOOR = 0.1
# Splines and padding leave a few values far below air, the lowest thing that a scanner measures: at most so many, by
# more than this share of the range, and by so many times what the next ten times as many differ by, as no tail does.
_STRAYS, _STRAY_DISTANCE, _STRAY_TIMES = 0.001, 0.02, 5
# Air of standardised images is one value with tissue on either side: so much of the study, so much of the rest.
_AIR_SHARE, _SIDE_SHARE = 0.4, 0.1
# Tissue's median is mapped here, and each robust standard deviation (1.4826 times the median absolute deviation) above
# it adds this much, so that "brighter than normal tissue" means the same in every study. An upper quantile as second
# anchor was tried and squeezed the brain of heads that are not skull-stripped: fat and scalp decide such a quantile.
_MEDIAN_TO, _DEVIATION_TO = -0.2, 0.35
_ROBUST_DEVIATION = 1.4826
# Quantiles are read from a fixed random subsample: sorting whole studies would take most of the reading time, and
# every k-th value could hit the same few columns of every row. 2^17 values place a quantile within 0.15% of its rank.
_MAX_SAMPLES = 2**17


def checked_window(window: Any) -> tuple[float, float]:
    """A window, (low, high). Raises DataError for anything else, such as an option of a configuration may hold."""
    pair = window if isinstance(window, Sequence) and len(window) == 2 else ()
    if not pair or not all(isinstance(end, int | float) and np.isfinite(end) for end in pair) or not pair[0] < pair[1]:
        raise DataError(f"window: expected two finite numbers, low < high, got {window!r}")
    return float(pair[0]), float(pair[1])


def check_pixels(lowest: Floats, highest: Floats) -> None:
    """Raise DataError, naming the first image, unless all pixels of N images are finite and in INTENSITY_RANGE.

    lowest, highest: floating [N], of each image's pixels; NaN where one of them is.
    """
    finite = np.isfinite(lowest) & np.isfinite(highest)
    if not finite.all():
        raise DataError(
            f"images: expected finite pixels, got NaN or infinity in image {int(finite.argmin())}", code="non_finite"
        )
    low, high = INTENSITY_RANGE
    outside = (lowest < low - _ROUNDING) | (highest > high + _ROUNDING)
    if outside.any():
        first = int(outside.argmax())
        raise DataError(
            f"images: expected pixels in [{low:g}, {high:g}], got {lowest[first]:g} to {highest[first]:g} in image "
            f"{first}; scale them as the training images were"
        )


def normalise_study(
    image: Floats, *, window: tuple[float, float] | None = None, source: Path | str = "image"
) -> Floats:
    """Bring a study to INTENSITY_RANGE.

    image: float32 [S, C, H, W], stored units. window: (low, high) for modalities with an absolute unit, mapped linearly
    and clipped. Without a window each channel is mapped piecewise linearly over the whole study: minimum to -1 (the
    0.1% quantile where the minimum is far below it), the tissue's median to -0.2, from there on 0.35 for each robust
    standard deviation, clipped at both ends.
    Returns float32 [S, C, H, W]. A channel that is constant over the study maps to -1 everywhere.
    """
    low, high = INTENSITY_RANGE
    if window is not None:
        bottom, top = checked_window(window)
        return np.clip((image - bottom) / (top - bottom) * (high - low) + low, low, high)
    if not np.isfinite(image).all():
        raise DataError(
            f"{source}: the image holds NaN or infinite values; repair or remove this study", code="non_finite"
        )
    return np.stack([_normalise_channel(image[:, c]) for c in range(image.shape[1])], axis=1)


def _normalise_channel(channel: Floats) -> Floats:
    low, high = INTENSITY_RANGE
    values = _subsample(channel.ravel())
    floor = channel.min()
    robust_top = _quantile(values, 0.999)
    robust_floor = _quantile(values, _STRAYS)
    tail = _quantile(values, 10 * _STRAYS) - robust_floor
    if robust_floor - floor > max(_STRAY_DISTANCE * (robust_top - robust_floor), _STRAY_TIMES * tail):
        floor = robust_floor
    tissue = values[values > floor + np.float32(_TISSUE_FLOOR) * (robust_top - floor)]
    if tissue.size < 2:
        return np.full_like(channel, low)
    median = _lower_median(tissue)
    below, above = (tissue < median).sum(), (tissue > median).sum()
    if tissue.size - below - above > _AIR_SHARE * values.size and min(below, above) > _SIDE_SHARE * (below + above):
        tissue = tissue[tissue != median]
        median = _lower_median(tissue)
    deviation = np.float32(_ROBUST_DEVIATION) * _lower_median(np.abs(tissue - median))
    deviation = max(deviation, np.float32(1e-6) * (median - floor))
    # A value far beyond the tissue's may overflow, and is clipped.
    with np.errstate(over="ignore"):
        below = (channel - floor) / (median - floor) * (_MEDIAN_TO - low) + low
        above = (channel - median) / deviation * _DEVIATION_TO + _MEDIAN_TO
    return np.clip(np.where(channel <= median, below, above), low, high)


def _quantile(values: Floats, share: float) -> np.float32:
    """Between the two values around the share's rank linearly."""
    rank = np.float32(share) * np.float32(values.size - 1)
    below, above = int(np.floor(rank)), int(np.ceil(rank))
    ordered = np.partition(values, (below, above))
    start, end = float(ordered[below]), float(ordered[above])
    return np.float32(start + (float(rank) - below) * (end - start))


def _lower_median(values: Floats) -> np.float32:
    """Of an even number the lower of the two in the middle: a value that occurs."""
    middle = (values.size - 1) // 2
    return np.float32(np.partition(values, middle)[middle])


def _subsample(values: Floats) -> Floats:
    if values.size <= _MAX_SAMPLES:
        return values
    # The draws of torch.randint below 2^28 values, with which existing weights were trained; numpy has frozen them.
    draws = np.random.RandomState(0).randint(0, 2**32, _MAX_SAMPLES, dtype=np.uint32)
    return values[draws.astype(np.int64) % values.size]
