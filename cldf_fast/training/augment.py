"""Augmentation of a whole batch at once, drawn from an explicit generator so that a step can be repeated exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_ROTATION = math.radians(12.0)
_MAX_LOG_SCALE = math.log(1.12)
_MAX_SHIFT = 0.06  # of the image's width
_MAX_GAIN = 0.12
_MAX_OFFSET = 0.08
_MAX_BIAS_FIELD = 0.12
_BIAS_GRID = 3  # control points a side: a bias field is smooth


@dataclass(frozen=True)
class Augmentation:
    """One drawn transformation an image. grid: float32 [B, H, W, 2] for grid_sample; gain, offset: [B, C, 1, 1];
    bias: [B, 1, H, W], multiplied on intensities counted from -1 (air)."""

    grid: Tensor
    gain: Tensor
    offset: Tensor
    bias: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Augmentation:
        return Augmentation(self.grid[rows], self.gain[rows], self.offset[rows], self.bias[rows])

    def images(self, x: Tensor) -> Tensor:
        """Transformed images [B, C, H, W], kept in [-1, 1]; what comes in from outside is air (-1)."""
        moved = F.grid_sample(x + 1, self.grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return (moved * self.bias * self.gain + self.offset * (moved > 0) - 1).clamp(-1, 1)

    def labels(self, labels: Tensor) -> Tensor:
        """Pixel labels int8 [B, H, W] moved with the images (nearest neighbour); what comes in is ignored (-1)."""
        shifted = (labels.unsqueeze(1) + 1).float()
        moved = F.grid_sample(shifted, self.grid, mode="nearest", padding_mode="zeros", align_corners=False)
        return (moved.squeeze(1) - 1).to(labels.dtype)


def draw_augmentation(
    batch: int, channels: int, size: tuple[int, int], generator: torch.Generator, *, flip: bool
) -> Augmentation:
    """Draw rotations, scalings, shifts, gains, offsets and bias fields.

    flip: mirror left and right in half of the images; only where left and right mean the same (a head; not an abdomen).
    """
    device = generator.device

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator, device=device) - 1

    angle = uniform(batch) * _MAX_ROTATION
    scale = torch.exp(uniform(batch) * _MAX_LOG_SCALE)
    mirror = torch.sign(uniform(batch)) if flip else torch.ones(batch, device=device)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift = 2 * _MAX_SHIFT * uniform(batch, 2)
    theta = torch.stack(
        [
            torch.stack([mirror * cos, -mirror * sin, shift[:, 0]], dim=1),
            torch.stack([sin, cos, shift[:, 1]], dim=1),
        ],
        dim=1,
    )
    bias = 1 + _MAX_BIAS_FIELD * uniform(batch, 1, _BIAS_GRID, _BIAS_GRID)
    return Augmentation(
        grid=F.affine_grid(theta, [batch, channels, *size], align_corners=False),
        gain=1 + _MAX_GAIN * uniform(batch, channels, 1, 1),
        offset=_MAX_OFFSET * uniform(batch, channels, 1, 1),
        bias=F.interpolate(bias, size, mode="bicubic", align_corners=True),
    )
