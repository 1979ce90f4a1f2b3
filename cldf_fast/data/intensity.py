"""From stored intensities to the range that networks expect."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cldf_fast.errors import DataError

INTENSITY_RANGE = (-1.0, 1.0)
"""Every image that leaves a dataset lies in this closed range; -1 is air or the window's lower end."""

# Tissue is what is brighter than this share of a robust maximum: air and most noise fall below it.
_TISSUE_FLOOR = 0.1
# Tissue's median is mapped here, and each robust standard deviation (1.4826 times the median absolute deviation) above
# it adds this much, so that "brighter than normal tissue" means the same in every study. An upper quantile as second
# anchor was tried and squeezed the brain of heads that are not skull-stripped: fat and scalp decide such a quantile.
_MEDIAN_TO, _DEVIATION_TO = -0.2, 0.35
_ROBUST_DEVIATION = 1.4826
# Quantiles are read from a fixed random subsample: sorting whole studies would take most of the reading time, and
# every k-th value could hit the same few columns of every row. 2^17 values place a quantile within 0.15% of its rank.
_MAX_SAMPLES = 2**17


def normalise_study(
    image: Tensor, *, window: tuple[float, float] | None = None, source: Path | str = "image"
) -> Tensor:
    """Bring a study to INTENSITY_RANGE.

    image: float32 [S, C, H, W], stored units. window: (low, high) for modalities with an absolute unit, mapped linearly
    and clipped. Without a window each channel is mapped piecewise linearly over the whole study: minimum to -1, the
    tissue's median to -0.2, from there on 0.35 for each robust standard deviation, clipped at 1.
    Returns float32 [S, C, H, W]. A channel that is constant over the study maps to -1 everywhere.
    """
    low, high = INTENSITY_RANGE
    if window is not None:
        bottom, top = window
        if not bottom < top:
            raise DataError(f"window: expected low < high, got {window}")
        return ((image - bottom) / (top - bottom) * (high - low) + low).clamp(low, high)
    if not torch.isfinite(image).all():
        raise DataError(f"{source}: the image holds NaN or infinite values; repair or remove this study")
    return torch.stack([_normalise_channel(image[:, c]) for c in range(image.shape[1])], dim=1)


def _normalise_channel(channel: Tensor) -> Tensor:
    low, high = INTENSITY_RANGE
    values = _subsample(channel.flatten())
    floor = channel.amin()
    robust_top = torch.quantile(values, 0.999)
    tissue = values[values > floor + _TISSUE_FLOOR * (robust_top - floor)]
    if tissue.numel() < 2:
        return torch.full_like(channel, low)
    median = tissue.median()
    deviation = (_ROBUST_DEVIATION * (tissue - median).abs().median()).clamp_min(1e-6 * (median - floor))
    below = (channel - floor) / (median - floor) * (_MEDIAN_TO - low) + low
    above = (channel - median) / deviation * _DEVIATION_TO + _MEDIAN_TO
    return torch.where(channel <= median, below, above).clamp(low, high)


def _subsample(values: Tensor) -> Tensor:
    if values.numel() <= _MAX_SAMPLES:
        return values
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(values.numel(), (_MAX_SAMPLES,), generator=generator)
    return values[chosen.to(values.device)]
