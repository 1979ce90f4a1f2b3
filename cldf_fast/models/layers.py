"""Blocks of the UNet and the classifier, in guided-diffusion's key layout.

Attribute names and their order inside `nn.Sequential` decide the keys of a state dict, so that published checkpoints of
guided-diffusion and improved-diffusion load as they are. Do not rename them.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cldf_fast import ops

Convolution = TypeVar("Convolution", nn.Conv1d, nn.Conv2d)
Network = TypeVar("Network", bound=nn.Module)


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


def _ours(x: Tensor, weight: Tensor) -> bool:
    """Whether the operations for the CPU serve; compilers and exporters get PyTorch's, and fuse in their own way."""
    return x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and not torch.compiler.is_compiling()


class Conv3x3(nn.Conv2d):
    """A 3 x 3 convolution that keeps the image's size; on the CPU by `ops.conv3x3`.

    Narrow layers and small images are left to PyTorch: there, transforming tiles and weights takes longer than the
    products that it saves. How many images there are does not matter, so that an image's result never depends on its
    batch.
    """

    _LEAST_CHANNELS = 16
    _LEAST_PIXELS = 64

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The convolution of x [B, C, H, W], plus residual [B, C', H, W]."""
        if (
            x.ndim == 4
            and min(self.in_channels, self.out_channels) >= self._LEAST_CHANNELS
            and x.shape[2] * x.shape[3] >= self._LEAST_PIXELS
            and not torch.is_autocast_enabled("cpu")
            and _ours(x, self.weight)
        ):
            return ops.conv3x3(x, self.weight, self.bias, residual=residual)
        out = super().forward(x)
        return out if residual is None else residual + out


class GroupNorm2d(nn.GroupNorm):
    """A group norm; of images on the CPU by `ops.group_norm`, in whatever layout they come."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4 and x.numel() and _ours(x, self.weight):
            return ops.group_norm(x, self.num_groups, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


def accelerate(network: Network) -> Network:
    """Let 3 x 3 convolutions and group norms of any network run by this package's operations on a CPU; returns it.

    In place, and only what is exactly an `nn.Conv2d` or an `nn.GroupNorm`: parameters, keys and hooks stay, results
    differ by rounding. For float32 networks of other libraries, such as MONAI's and diffusers' UNets; this package's
    own have such layers.
    """
    for module in network.modules():
        if (
            type(module) is nn.Conv2d
            and module.kernel_size == (3, 3)
            and module.stride == module.dilation == (1, 1)
            and module.padding in ((1, 1), "same")
            and module.padding_mode == "zeros"
            and module.groups == 1
        ):
            module.__class__ = Conv3x3
        elif type(module) is nn.GroupNorm and module.affine:
            module.__class__ = GroupNorm2d
    return network


def normed(
    norm: nn.Module, x: Tensor, *, scale: Tensor | None = None, shift: Tensor | None = None, silu: bool = True
) -> Tensor:
    """What `norm` makes of x [B, C, H, W], scaled by 1 + scale and shifted ([B, C] each), through SiLU.

    On the CPU in one operation.
    """
    if type(norm) is nn.GroupNorm and _ours(x, norm.weight):
        return ops.group_norm(
            x, norm.num_groups, norm.weight, norm.bias, scale=scale, shift=shift, silu=silu, eps=norm.eps
        )
    x = norm(x)
    if scale is not None:
        x = x * (1 + scale[:, :, None, None])
    if shift is not None:
        x = x + shift[:, :, None, None]
    return F.silu(x) if silu else x


def channels_side_by_side(x: Tensor) -> Tensor:
    """x [B, C, H, W] in the layout that convolutions are fastest in, which they hand on to what they return."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return x
    if x.shape[1] == 1:  # Both layouts are the same in memory, and only the strides tell which is meant.
        return x.flatten(1).view(len(x), *x.shape[2:], 1).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


def zero_init(module: Convolution) -> Convolution:
    """Start a residual branch (or the output) at exactly zero, so that an untrained block is the identity."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


class EmbedSequential(nn.Sequential):
    """A sequence whose residual blocks also receive the embedding of time (and class)."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # type: ignore[override]
        x = channels_side_by_side(x)
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

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
        self.in_layers = nn.Sequential(group_norm(channels), nn.SiLU(), Conv3x3(channels, out_channels))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, (2 if scale_shift else 1) * out_channels))
        self.out_layers = nn.Sequential(
            group_norm(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_init(Conv3x3(out_channels, out_channels)),
        )
        self.skip_connection: nn.Module = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def _resized(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        norm, _, conv = self.in_layers
        h = conv(self._resized(normed(norm, x)))
        added = self.emb_layers(embedding).to(h.dtype)
        norm, _, dropout, conv = self.out_layers
        if self.scale_shift:
            scale, shift = added.chunk(2, dim=1)
            h = normed(norm, h, scale=scale, shift=shift)
        else:
            h = normed(norm, h + added[:, :, None, None])
        return conv(dropout(h), self.skip_connection(self._resized(x)))


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
        tokens = normed(self.norm, x, silu=False).flatten(2).mT
        h = multi_head_attention(projected(self.qkv, tokens), self.num_heads, new_order=self.new_order)
        return x + projected(self.proj_out, h).mT.unflatten(2, x.shape[2:])


def projected(layer: nn.Conv1d, tokens: Tensor) -> Tensor:
    """A convolution of length 1 on tokens [B, L, C] -> [B, L, C']."""
    return F.linear(tokens, layer.weight.squeeze(2), layer.bias)


def multi_head_attention(qkv: Tensor, num_heads: int, *, new_order: bool) -> Tensor:
    """Attention of packed projections [B, L, 3C] -> [B, L, C]; new_order: how heads and q, k, v are interleaved."""
    if new_order:
        q, k, v = qkv.unflatten(2, (3, num_heads, -1)).unbind(2)
    else:
        q, k, v = qkv.unflatten(2, (num_heads, 3, -1)).unbind(3)
    h = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v)))
    return h.transpose(1, 2).flatten(2)


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
        # One token asks, so no token need be projected to its key and its value: the query goes through the key's
        # weights instead, and the tokens' average through the value's. The key's bias shifts all logits alike.
        query_weight, key_weight, value_weight = self.qkv_proj.weight.squeeze(2).chunk(3)
        query_bias, _, value_bias = self.qkv_proj.bias.chunk(3)  # type: ignore[union-attr]
        heads = (self.num_heads, -1)
        query = F.linear(tokens[:, :, 0], query_weight, query_bias).unflatten(1, heads)
        asked = torch.einsum("bhd,hdc->bhc", query * query.shape[2] ** -0.5, key_weight.unflatten(0, heads))
        average = (asked @ tokens).softmax(dim=2) @ tokens.mT
        value = torch.einsum("bhc,hdc->bhd", average, value_weight.unflatten(0, heads))
        return F.linear(value.flatten(1) + value_bias, self.c_proj.weight.squeeze(2), self.c_proj.bias)
