"""The conditional diffusion model's UNet (Dhariwal & Nichol 2021), in guided-diffusion's key layout, at any width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cldf_fast.errors import ConfigError, DataError
from cldf_fast.models.layers import (
    AttentionBlock,
    Conv3x3,
    Downsample,
    EmbedSequential,
    ResBlock,
    Upsample,
    group_norm,
    normed,
    timestep_embedding,
    zero_init,
)
from cldf_fast.ops._arguments import describe

Visit = Callable[[int, Tensor], None]
"""(i, what block i returned)"""


class UNet(nn.Module):
    """Predicts the noise in x_t, given the time and, where it has a class table, the condition.

    in_channels, out_channels: of the image and of the prediction (twice in_channels in checkpoints that learn sigma).
    model_channels: base width; level i has channel_mult[i] * model_channels channels at 1 / 2**i of the image size.
    attention_downsample: levels at which attention is used, named by 2**i; the middle block always has it.
    num_classes: rows of the class table, None: unconditional. What a row means is the caller's: see `conditions`.
    num_heads or num_head_channels: attention heads, or channels a head has (which wins where given).
    patch_size: side of the pixel blocks that are folded into channels before the first convolution and unfolded after
    the last; 1 in published checkpoints. 2 costs a quarter of the arithmetic at the same image size.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        *,
        out_channels: int | None = None,
        channel_mult: Sequence[float] = (1, 2, 3, 4),
        num_res_blocks: int = 1,
        attention_downsample: Sequence[int] = (8,),
        num_classes: int | None = None,
        num_heads: int = 4,
        num_head_channels: int | None = None,
        dropout: float = 0.0,
        scale_shift: bool = True,
        resblock_updown: bool = False,
        new_attention_order: bool = False,
        patch_size: int = 1,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = out_channels or in_channels
        self.model_channels = model_channels
        self.num_classes = num_classes
        self.downsample_factor = patch_size * 2 ** (len(channel_mult) - 1)
        embedding = 4 * model_channels
        widths = [int(m * model_channels) for m in channel_mult]
        res: dict[str, Any] = {"dropout": dropout, "scale_shift": scale_shift}

        def attention(channels: int) -> AttentionBlock:
            if num_head_channels and channels % num_head_channels:
                raise ConfigError(f"num_head_channels: {num_head_channels} does not divide {channels} channels")
            heads = channels // num_head_channels if num_head_channels else num_heads
            if channels % heads:
                raise ConfigError(f"num_heads: {heads} heads do not divide {channels} channels")
            return AttentionBlock(channels, heads, new_order=new_attention_order)

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, embedding)

        channels = widths[0]
        blocks: list[nn.Module] = [EmbedSequential(Conv3x3(in_channels * patch_size**2, channels))]
        skips = [channels]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [ResBlock(channels, embedding, width, **res)]
                channels = width
                if 2**level in attention_downsample:
                    layers.append(attention(channels))
                blocks.append(EmbedSequential(*layers))
                skips.append(channels)
            if level < len(widths) - 1:
                down = (
                    ResBlock(channels, embedding, channels, resample="down", **res)
                    if resblock_updown
                    else Downsample(channels)
                )
                blocks.append(EmbedSequential(down))
                skips.append(channels)
        self.input_blocks = nn.ModuleList(blocks)

        self.middle_block = EmbedSequential(
            ResBlock(channels, embedding, channels, **res),
            attention(channels),
            ResBlock(channels, embedding, channels, **res),
        )

        blocks = []
        self.output_widths: list[int] = []
        """Channels that each of output_blocks returns."""
        self.output_downsample: list[int] = []
        """Downsampling factor of what each of output_blocks returns; the last block of a level already doubles it."""
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                layers = [ResBlock(channels + skips.pop(), embedding, width, **res)]
                channels = width
                if 2**level in attention_downsample:
                    layers.append(attention(channels))
                doubles = level > 0 and i == num_res_blocks
                if doubles:
                    layers.append(
                        ResBlock(channels, embedding, channels, resample="up", **res)
                        if resblock_updown
                        else Upsample(channels)
                    )
                blocks.append(EmbedSequential(*layers))
                self.output_widths.append(channels)
                self.output_downsample.append(patch_size * 2 ** (level - doubles))
        self.output_blocks = nn.ModuleList(blocks)
        self.out = nn.Sequential(
            group_norm(channels),
            nn.SiLU(),
            zero_init(Conv3x3(channels, self.out_channels * patch_size**2)),
        )

    def embed(self, timesteps: Tensor, condition: Tensor | None) -> Tensor:
        """The embedding [B, 4 * model_channels] of time [B] and condition (see forward).

        Raises ConfigError where there is no class table or no condition, DataError for a condition of another form.
        """
        embedding = self.time_embed(
            timestep_embedding(timesteps, self.model_channels).to(next(self.parameters()).dtype)
        )
        if (condition is None) != (self.num_classes is None):
            raise ConfigError(
                "condition: expected one because the network has a class table, got none"
                if condition is None
                else "condition: the network is unconditional, but one was given"
            )
        if condition is None:
            return embedding
        if condition.ndim != 1 + condition.is_floating_point():
            raise DataError(
                f"condition: expected rows of the class table, integers [B], or their weights, floating "
                f"[B, {self.num_classes}], got {describe(condition)}"
            )
        if condition.is_floating_point():
            return embedding + condition.to(embedding.dtype) @ self.label_emb.weight.to(embedding.dtype)
        return embedding + self.label_emb(condition)

    def forward(self, x: Tensor, timesteps: Tensor, condition: Tensor | None = None) -> Tensor:
        """Predict the noise.

        x: [B, C, H, W], H and W multiples of `downsample_factor`. timesteps: [B], in the units that the network was
        trained on. condition: int64 [B], a row of the class table each, or float [B, num_classes], weights of the rows
        (a set of classes is the mean of their rows). Returns [B, out_channels, H, W].
        """
        features = self.decoder_features(x, timesteps, condition, range(len(self.output_blocks)))
        return self.read_out(features[len(self.output_blocks) - 1])

    def read_out(self, last: Tensor) -> Tensor:
        """The prediction [B, out_channels, H, W] from what the last of output_blocks returned."""
        norm, _, conv = self.out
        return F.pixel_shuffle(conv(normed(norm, last)), self.patch_size)

    def decoder_features(
        self,
        x: Tensor,
        timesteps: Tensor,
        condition: Tensor | None,
        blocks: Sequence[int],
        visit: Visit | None = None,
    ) -> dict[int, Tensor]:
        """Outputs of these `output_blocks`, each [B, output_widths[i], H / f, W / f] with f = output_downsample[i].

        Arguments as in forward. Nothing after the last block asked for is computed. visit: is given each output as soon
        as it is there, in place of keeping them all; nothing is returned then.
        """
        return self.blocks_of(x, self.embed(timesteps, condition), blocks, visit)

    def blocks_of(
        self, x: Tensor, embedding: Tensor, blocks: Sequence[int], visit: Visit | None = None
    ) -> dict[int, Tensor]:
        """As `decoder_features`, for an embedding [B, 4 * model_channels] in place of time and condition."""
        factor = self.downsample_factor
        if x.shape[-1] % factor or x.shape[-2] % factor:
            raise ConfigError(
                f"x: expected height and width to be multiples of {factor}, got {x.shape[-2]} x {x.shape[-1]}"
            )
        wanted, read = set(blocks), {}
        # The first input blocks go into the last output blocks: what is not computed holds no memory.
        unused = len(self.input_blocks) - 1 - max(wanted)
        skips = []
        h = F.pixel_unshuffle(x, self.patch_size)
        for i, block in enumerate(self.input_blocks):
            h = block(h, embedding)
            if i >= unused:
                skips.append(h)
        h = self.middle_block(h, embedding)
        for i in range(max(wanted) + 1):
            h = torch.cat([h, skips.pop()], dim=1)  # by name, so that the block before is no longer held
            h = self.output_blocks[i](h, embedding)
            if i in wanted:
                if visit is None:
                    read[i] = h
                else:
                    visit(i, h)
        return read
