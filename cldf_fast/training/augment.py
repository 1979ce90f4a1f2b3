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
    """One drawn transformation an image. grid: float32 [B, H, W, 2] for grid_sample; gamma, gain, offset:
    [B, C, 1, 1]; bias: [B, 1, H, W]. Intensities are counted from -1 (air) for all of them."""

    gamma: Tensor | None
    grid: Tensor
    gain: Tensor
    offset: Tensor
    bias: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Augmentation:
        return Augmentation(
            self.gamma if self.gamma is None else self.gamma[rows],
            self.grid[rows],
            self.gain[rows],
            self.offset[rows],
            self.bias[rows],
        )

    def images(self, x: Tensor) -> Tensor:
        """Transformed images [B, C, H, W], kept in [-1, 1]; what comes in from outside is air (-1)."""
        moved = F.grid_sample(x + 1, self.grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        if self.gamma is not None:
            moved = 2 * (moved / 2) ** self.gamma
        return (moved * self.bias * self.gain + self.offset * (moved > 0) - 1).clamp(-1, 1)

    def labels(self, labels: Tensor) -> Tensor:
        """Pixel labels int8 [B, H, W] moved with the images (nearest neighbour); what comes in is ignored (-1)."""
        shifted = (labels.unsqueeze(1) + 1).float()
        moved = F.grid_sample(shifted, self.grid, mode="nearest", padding_mode="zeros", align_corners=False)
        return (moved.squeeze(1) - 1).to(labels.dtype)


@dataclass(frozen=True)
class Augmenter:
    """Draws rotations, scalings, shifts, gains, offsets, bias fields and powers.

    mirror: left and right in half of the images; only where they mean the same (a head; not an abdomen). gamma: every
    channel's intensities are raised to a power between exp(-gamma) and exp(gamma); 0 for none.
    """

    mirror: bool = False
    gamma: float = 0.0

    def __call__(self, batch: int, channels: int, size: tuple[int, int], generator: torch.Generator) -> Augmentation:
        """One transformation for each of a batch of images [B, C, *size], on the generator's device."""
        device = generator.device

        def uniform(*shape: int) -> Tensor:
            return 2 * torch.rand(*shape, generator=generator, device=device) - 1

        angle = uniform(batch) * _MAX_ROTATION
        scale = torch.exp(uniform(batch) * _MAX_LOG_SCALE)
        mirror = torch.sign(uniform(batch)) if self.mirror else torch.ones(batch, device=device)
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
            # Nothing is drawn for a gamma of 0: what a seed stands for stays as it is.
            gamma=torch.exp(self.gamma * uniform(batch, channels, 1, 1)) if self.gamma else None,
            grid=F.affine_grid(theta, [batch, channels, *size], align_corners=False),
            gain=1 + _MAX_GAIN * uniform(batch, channels, 1, 1),
            offset=_MAX_OFFSET * uniform(batch, channels, 1, 1),
            bias=F.interpolate(bias, size, mode="bicubic", align_corners=True),
        )
