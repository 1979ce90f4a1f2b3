"""The pixel decoder: diffusion features of a pixel -> an embedding of unit length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cldf_fast.errors import DataError
from cldf_fast.ops._arguments import check_tensor


class Projecting(Protocol):
    """Features that can be projected as they are read: `features.FeatureReader`."""

    def project(self, x: Tensor, condition: Tensor | None, weights: Sequence[Tensor]) -> list[Tensor]:
        """As `DiffusionFeatures.project`."""


class PixelDecoder(nn.Module):
    """A multilayer perceptron on every pixel's features from several blocks.

    The first layer is applied to each block at its native size and the results are resized and summed, which equals
    resizing and concatenating the features first, because a 1x1 convolution commutes with bilinear resizing.

    channels: of each feature map. hidden: width. embedding: D. dropout: between the layers, in training.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, channels: Sequence[int], *, hidden: int = 128, embedding: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.channels = list(channels)
        self.first = nn.Linear(sum(channels), hidden)
        self.rest = nn.Sequential(
            nn.LayerNorm(hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.LayerNorm(hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, embedding),
        )
        # Features of different blocks and levels differ in scale by orders of magnitude.
        self.register_buffer("mean", torch.zeros(sum(channels)))
        self.register_buffer("deviation", torch.ones(sum(channels)))

    def standardise(self, features: Tensor) -> None:
        """Set the input's mean and standard deviation from features [N, sum(channels)] of training pixels."""
        self.mean.copy_(features.mean(dim=0))
        self.deviation.copy_(features.std(dim=0).clamp_min(1e-4))

    def points(self, features: Tensor) -> Tensor:
        """Embeddings [..., D] of unit length of features [..., sum(channels)] that were read at single pixels."""
        hidden = self.first((features - self.mean) / self.deviation)
        return F.normalize(self.rest(hidden), dim=-1)

    def forward(self, features: Tensor) -> Tensor:
        """The same as `points`; what data-parallel wrappers call."""
        return self.points(features)

    def at(self, features: Sequence[Tensor], pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """Embeddings [B, A, D] at pixels int64 [B, A] (flat, row * W + column) of an image of this size (H, W)."""
        return self.points(read_at(features, pixels, size))

    def dense(self, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Embeddings [B, D, H, W] of every pixel; features: one [B, channels[i], h_i, w_i] a block."""
        weights, bias = self._first_layer()
        native = [F.conv2d(block, each[:, :, None, None]) for block, each in zip(features, weights, strict=True)]
        return self._from_native(native, bias, size)

    def embed(self, features: Projecting, x: Tensor, condition: Tensor | None) -> Tensor:
        """What `dense` makes of features(x, condition), without gradient: embeddings [B, D, H, W] of every pixel.

        The first layer is applied to every map as soon as it is there, so that no two are held: less memory.
        features: `DiffusionFeatures`, or a store of them. x: [B, C, H, W]. condition: as features take it.
        """
        with torch.no_grad():
            weights, bias = self._first_layer()
            return self._from_native(features.project(x, condition, weights), bias, (x.shape[2], x.shape[3]))

    def _first_layer(self) -> tuple[list[Tensor], Tensor]:
        """The first layer, with standardising in it: weights [hidden, channels[i]] for each map, and the bias."""
        weight = self.first.weight / self.deviation
        return list(weight.split(self.channels, dim=1)), self.first.bias - weight @ self.mean

    def _from_native(self, native: Sequence[Tensor], bias: Tensor, size: tuple[int, int]) -> Tensor:
        """Embeddings [B, D, H, W] from what the first layer made of each map, [B, hidden, h_i, w_i]."""
        by_size: dict[torch.Size, Tensor] = {}
        for each in native:
            found = by_size.get(each.shape)
            by_size[each.shape] = each if found is None else found + each
        hidden = bias.view(1, -1, 1, 1)
        for each in by_size.values():
            hidden = hidden + F.interpolate(each, size, mode="bilinear", align_corners=False)
        return F.normalize(self.rest(hidden.permute(0, 2, 3, 1)), dim=-1).permute(0, 3, 1, 2)


def read_at(features: Sequence[Tensor], pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear reading of feature maps at pixels: equal to resizing every map to `size` and indexing.

    features: one [B, C_i, h_i, w_i] a block. pixels: int64 [B, A], flat; negative ones (padding) read pixel 0.
    Returns [B, A, sum C_i]. Raises DataError for pixels of another shape or dtype and, on the CPU, beyond the image.
    """
    height, width = size
    check_tensor("pixels", pixels, "integer", (len(features[0]), "A"), features[0])
    # To look would synchronise elsewhere.
    if pixels.device.type == "cpu" and pixels.numel() and int(pixels.max()) >= height * width:
        raise DataError(f"pixels: expected numbers below {height} * {width}, got {int(pixels.max())}")
    pixels = pixels.clamp_min(0)
    row = (pixels // width + 0.5) * (2 / height) - 1
    column = (pixels % width + 0.5) * (2 / width) - 1
    grid = torch.stack([column, row], dim=-1).unsqueeze(2)
    read = []
    for block in features:
        # Half precision can't tell the pixels of a row apart, and grid_sample wants positions in the dtype of the map.
        dtype = torch.promote_types(block.dtype, torch.float32)
        sampled = F.grid_sample(
            block.to(dtype), grid.to(dtype), mode="bilinear", padding_mode="border", align_corners=False
        )
        read.append(sampled.to(block.dtype))
    return torch.cat(read, dim=1).squeeze(3).transpose(1, 2)
