"""The noise-aware classifier: the encoder half of the UNet with a pooling head, in guided-diffusion's key layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cldf_fast.errors import ConfigError
from cldf_fast.models.layers import (
    AttentionBlock,
    AttentionPool,
    Conv3x3,
    Downsample,
    EmbedSequential,
    ResBlock,
    group_norm,
    timestep_embedding,
    zero_init,
)

POOLS = ("adaptive", "attention", "spatial", "spatial_v2", "mean")
_ON_AVERAGES = POOLS[2:]  # heads that read averages over pixels, without a norm before
_HIDDEN = 2048  # width of the spatial heads' hidden layer in published checkpoints


class NoiseAwareClassifier(nn.Module):
    """Image-level logits of a noised image x_t.

    num_classes: K logits. The project's own classifiers are multi-label: logit k belongs to foreground class k + 1 and
    goes through a sigmoid. Published ones are softmax heads over classes that include "healthy".
    pool: "adaptive" (global average, then a linear layer), "attention" (needs image_size, fixed by its positions),
    "spatial" or "spatial_v2" (two linear layers on the averages of every block's output), or "mean" (a linear layer on
    the average, without a norm: what diffusion-anomaly calls "spatial").
    Other arguments as in `UNet`.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        *,
        num_classes: int,
        channel_mult: Sequence[float] = (1, 2, 3, 4),
        num_res_blocks: int = 1,
        attention_downsample: Sequence[int] = (8,),
        num_head_channels: int = 32,
        dropout: float = 0.0,
        scale_shift: bool = True,
        resblock_updown: bool = False,
        new_attention_order: bool = False,
        pool: str = "adaptive",
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.num_classes = num_classes
        embedding = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )

        def residual(channels: int, out: int, resample: str | None = None) -> ResBlock:
            return ResBlock(channels, embedding, out, dropout=dropout, scale_shift=scale_shift, resample=resample)

        def attention(channels: int) -> AttentionBlock:
            if channels % num_head_channels:
                raise ConfigError(f"num_head_channels: {num_head_channels} does not divide {channels} channels")
            return AttentionBlock(channels, channels // num_head_channels, new_order=new_attention_order)

        channels = int(channel_mult[0] * model_channels)
        widths = [channels]
        blocks: list[nn.Module] = [EmbedSequential(Conv3x3(in_channels, channels))]
        self.block_downsample = [1]
        """Downsampling factor of what each of input_blocks returns."""
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [residual(channels, int(mult * model_channels))]
                channels = int(mult * model_channels)
                if 2**level in attention_downsample:
                    layers.append(attention(channels))
                blocks.append(EmbedSequential(*layers))
                widths.append(channels)
                self.block_downsample.append(2**level)
            if level < len(channel_mult) - 1:
                blocks.append(
                    EmbedSequential(residual(channels, channels, "down") if resblock_updown else Downsample(channels))
                )
                widths.append(channels)
                self.block_downsample.append(2 ** (level + 1))
        self.input_blocks = nn.ModuleList(blocks)
        self.downsample_factor = 2 ** (len(channel_mult) - 1)
        self.middle_block = EmbedSequential(
            residual(channels, channels),
            attention(channels),
            residual(channels, channels),
        )
        self.pool = pool
        averages = sum(widths) + channels
        head: list[nn.Module] = [group_norm(channels), nn.SiLU()]
        if pool == "adaptive":
            head += [nn.AdaptiveAvgPool2d((1, 1)), zero_init(nn.Conv2d(channels, num_classes, 1)), nn.Flatten()]
        elif pool == "attention":
            if image_size is None:
                raise ConfigError("image_size: expected the size in pixels because pool='attention', got none")
            head.append(AttentionPool(image_size // self.downsample_factor, channels, num_head_channels, num_classes))
        elif pool == "spatial":
            head = [nn.Linear(averages, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, num_classes)]
        elif pool == "spatial_v2":
            head = [nn.Linear(averages, _HIDDEN), group_norm(_HIDDEN), nn.SiLU(), nn.Linear(_HIDDEN, num_classes)]
        elif pool != "mean":
            raise ConfigError(f"pool: expected one of {', '.join(POOLS)}, got {pool!r}")
        self.out: nn.Module = nn.Linear(channels, num_classes) if pool == "mean" else nn.Sequential(*head)

    @property
    def pooled(self) -> nn.Module:
        """The module whose output, [B, C, h, w], is the last before the pooling."""
        return self.middle_block if self.pool in _ON_AVERAGES else self.get_submodule("out.1")

    def block_at(self, downsample: int) -> nn.Module:
        """The last encoder block whose output is smaller than the image by this factor: where a CAM can be read."""
        if downsample not in self.block_downsample:
            raise ConfigError(
                f"downsample: the classifier has blocks at {sorted(set(self.block_downsample))}, got {downsample}"
            )
        last = len(self.block_downsample) - 1 - self.block_downsample[::-1].index(downsample)
        return self.input_blocks[last]

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Logits [B, num_classes] of x [B, C, H, W] at timesteps [B] (the units that the network was trained on)."""
        return self.logits(x, self.embed(timesteps))

    def embed(self, timesteps: Tensor) -> Tensor:
        """The embedding [B, 4 * model_channels] of time [B]."""
        return self.time_embed(timestep_embedding(timesteps, self.model_channels).to(next(self.parameters()).dtype))

    def logits(self, x: Tensor, embedding: Tensor) -> Tensor:
        """As `forward`, for an embedding in place of time."""
        if x.shape[-1] % self.downsample_factor or x.shape[-2] % self.downsample_factor:
            raise ConfigError(
                f"x: expected height and width to be multiples of {self.downsample_factor}, "
                f"got {x.shape[-2]} x {x.shape[-1]}"
            )
        averages = []
        for block in [*self.input_blocks, self.middle_block]:
            x = block(x, embedding)
            if self.pool in _ON_AVERAGES:
                averages.append(x.mean(dim=(2, 3)))
        if self.pool == "mean":
            return self.out(averages[-1])
        return self.out(torch.cat(averages, dim=1) if averages else x)
