"""Blocks of the UNet and the classifier, in guided-diffusion's key layout.

Attribute names and their order inside `nn.Sequential` decide the keys of a state dict, so that published checkpoints of
guided-diffusion and improved-diffusion load as they are. Do not rename them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding: [cos(t w_i), sin(t w_i)] with w_i falling geometrically from 1 to 1 / max_period.

    timesteps: [B], integer or fractional. Returns float32 [B, dim]; an odd dim ends with a zero.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps.float().unsqueeze(1) * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups as in the published networks; for widths that 32 does not divide, the largest group count that does."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def zero_init(module: nn.Conv1d | nn.Conv2d) -> nn.Conv1d | nn.Conv2d:
    """Start a residual branch (or the output) at exactly zero, so that an untrained block is the identity."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


class EmbedSequential(nn.Sequential):
    """A sequence whose residual blocks also receive the embedding of time (and class)."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """Two normalised convolutions around the embedding, added to the input.

    scale_shift: the embedding scales and shifts the second norm (ADM) instead of being added before it (DDPM).
    resample: "up" doubles, "down" halves both the branch and the input (resblock_updown checkpoints); None keeps both.
    """

    def __init__(
        self,
        channels: int,
        embedding: int,
        out_channels: int,
        *,
        dropout: float = 0.0,
        scale_shift: bool = True,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample
        self.in_layers = nn.Sequential(group_norm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, (2 if scale_shift else 1) * out_channels))
        self.out_layers = nn.Sequential(
            group_norm(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection: nn.Module = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def _resized(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = conv(self._resized(activation(norm(x))))
        shift = self.emb_layers(embedding)[:, :, None, None].to(h.dtype)
        if self.scale_shift:
            norm, *rest = self.out_layers
            scale, shift = shift.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
            for layer in rest:
                h = layer(h)
        else:
            h = self.out_layers(h + shift)
        return self.skip_connection(self._resized(x)) + h


class AttentionBlock(nn.Module):
    """Self-attention over pixels, added to the input.

    Unlike the published block it has no custom checkpoint function: input gradients pass through a frozen network, as
    saliency needs. new_order: heads are split after q, k, v ("use_new_attention_order"); by default before.
    """

    def __init__(self, channels: int, num_heads: int, *, new_order: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.new_order = new_order
        self.norm = group_norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_init(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        flat = x.reshape(batch, channels, height * width)
        h = multi_head_attention(self.qkv(self.norm(flat)), self.num_heads, new_order=self.new_order)
        return (flat + self.proj_out(h)).reshape(batch, channels, height, width)


def multi_head_attention(qkv: Tensor, num_heads: int, *, new_order: bool, queries: int | None = None) -> Tensor:
    """Attention of packed projections [B, 3C, L] -> [B, C, L]; new_order: how heads and q, k, v are interleaved.

    queries: only the first so many of the L tokens ask, and are returned.
    """
    batch, width, length = qkv.shape
    per_head = width // (3 * num_heads)
    if new_order:
        packed = qkv.reshape(batch, 3, num_heads, per_head, length).transpose(1, 2)
    else:
        packed = qkv.reshape(batch, num_heads, 3, per_head, length)
    # Attention that never holds an L x L matrix exists only for channels that lie side by side.
    q, k, v = packed.mT.contiguous().unbind(2)
    h = F.scaled_dot_product_attention(q[:, :, :queries], k, v)
    return h.mT.reshape(batch, width // 3, -1)


class AttentionPool(nn.Module):
    """CLIP's attention pooling: the mean token attends to all pixels. [B, C, S, S] -> [B, out]."""

    def __init__(self, size: int, channels: int, head_channels: int, out_features: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(channels, size * size + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_features, 1)
        self.num_heads = channels // head_channels

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        tokens = torch.cat([tokens.mean(dim=2, keepdim=True), tokens], dim=2)
        tokens = tokens + self.positional_embedding.to(tokens.dtype)
        pooled = multi_head_attention(self.qkv_proj(tokens), self.num_heads, new_order=True, queries=1)
        return self.c_proj(pooled)[:, :, 0]
