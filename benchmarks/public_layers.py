"""Our networks, computed as guided-diffusion and its ports compute theirs.

A plane for each channel in memory, PyTorch's convolutions, and norm, scale, shift and SiLU one after the other: what
rivals run, so that they get none of what our own layers gain on a CPU.

They keep what is faster than in the published code all the same: attention that never holds its matrix, and attention
pooling that projects one token.
"""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

from cldf_fast.models.layers import Conv3x3, EmbedSequential, ResBlock

Network = TypeVar("Network", bound=nn.Module)


class StepwiseGroupNorm(nn.GroupNorm):
    """A group norm that nothing is fused with."""


class PlainConv3x3(Conv3x3):
    """PyTorch's convolution."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """As of `Conv3x3`."""
        out = nn.Conv2d.forward(self, x)
        return out if residual is None else residual + out


class PlanesSequential(EmbedSequential):
    """The same layers on channels as planes."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # type: ignore[override]
        """As of `EmbedSequential`."""
        x = x.contiguous()
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResBlock) else layer(x)
        return x


def as_published(network: Network) -> Network:
    """A copy of a UNet or classifier with the same weights and results."""
    copied = copy.deepcopy(network)
    for module in copied.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = StepwiseGroupNorm
        elif type(module) is Conv3x3:
            module.__class__ = PlainConv3x3
        elif type(module) is EmbedSequential:
            module.__class__ = PlanesSequential
    return copied
