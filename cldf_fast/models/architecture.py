"""What a network looks like: read from the names and shapes of its tensors, and built again from that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from cldf_fast.errors import CheckpointError, ConfigError
from cldf_fast.models.classifier import NoiseAwareClassifier
from cldf_fast.models.unet import UNet

Kind = Literal["unet", "classifier"]
Network = UNet | NoiseAwareClassifier
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Architecture:
    """Arguments of a `UNet` or a `NoiseAwareClassifier`, and their group norms.

    What tensors can't tell is None until it is stated: num_heads, num_head_channels, new_attention_order. out_channels
    and patch_size are the UNet's, pool and image_size the classifier's; image_size: pixels, where an attention pool
    fixes it. norm_groups: groups of every norm, None: as `layers.group_norm` has them.
    """

    kind: Kind
    in_channels: int
    model_channels: int
    channel_mult: tuple[float, ...]
    num_res_blocks: int
    attention_downsample: tuple[int, ...]
    num_classes: int | None
    scale_shift: bool
    resblock_updown: bool
    num_heads: int | None = None
    num_head_channels: int | None = None
    new_attention_order: bool | None = None
    out_channels: int | None = None
    patch_size: int = 1
    pool: str | None = None
    image_size: int | None = None
    norm_groups: int | None = None
    norm_eps: float = 1e-5

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(int(mult * self.model_channels) for mult in self.channel_mult)

    @property
    def attention_levels(self) -> tuple[bool, ...]:
        """Whether each level has attention."""
        return tuple(2**level in self.attention_downsample for level in range(len(self.channel_mult)))

    def heads(self, channels: int) -> int:
        """Attention heads at this width."""
        return channels // self.num_head_channels if self.num_head_channels else self.num_heads or 1

    def build(self) -> Network:
        """The network on the meta device: no memory is taken and no weight is drawn."""
        arguments: dict[str, Any] = {
            "channel_mult": self.channel_mult,
            "num_res_blocks": self.num_res_blocks,
            "attention_downsample": self.attention_downsample,
            "num_classes": self.num_classes,
            "num_head_channels": self.num_head_channels,
            "scale_shift": self.scale_shift,
            "resblock_updown": self.resblock_updown,
            "new_attention_order": self.new_attention_order,
        }
        if self.kind == "unet":
            kind: type[Network] = UNet
            arguments |= {"out_channels": self.out_channels, "patch_size": self.patch_size}
            arguments |= {} if self.num_heads is None else {"num_heads": self.num_heads}
        else:
            kind = NoiseAwareClassifier
            arguments |= {"pool": self.pool, "image_size": self.image_size}
        with torch.device("meta"):
            network: Network = kind(self.in_channels, self.model_channels, **arguments)
        for norm in network.modules():
            if isinstance(norm, nn.GroupNorm):
                norm.eps = self.norm_eps
                norm.num_groups = self.norm_groups or norm.num_groups
        return network


def multipliers(widths: Sequence[int], model_channels: int) -> tuple[float, ...]:
    """channel_mult of these widths: whole numbers where they are, and never rounded down to a narrower level."""

    def multiplier(width: int) -> float:
        exact = width / model_channels
        if width % model_channels == 0:
            return width // model_channels
        return exact if int(exact * model_channels) == width else math.nextafter(exact, math.inf)

    return tuple(multiplier(width) for width in widths)


def infer(shapes: Shapes, num_res_blocks: int | None = None) -> Architecture:
    """The architecture that a state dict's names and shapes tell.

    num_res_blocks: decides where the keys of a classifier that halves by residual blocks allow several depths.
    Only the keys that are needed are read: compare the network that is built with all of them, by `first_difference`.
    Raises CheckpointError where a key is missing, ConfigError where num_res_blocks is needed.
    """
    kind: Kind = "unet" if any(name.startswith("output_blocks.") for name in shapes) else "classifier"
    try:
        model_channels = shapes["time_embed.0.weight"][1]
        encoder = _encoder(shapes)
        period = _period(encoder, _levels(shapes) if kind == "unet" else None, num_res_blocks)
        firsts = encoder[::period]
        levels = len(firsts)
        scale_shift = shapes["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * firsts[0].width
        if kind == "unet":
            pool, num_classes = None, shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None
        else:
            pool, num_classes = _head(shapes)
        return Architecture(
            kind=kind,
            in_channels=shapes["input_blocks.0.0.weight"][1],
            model_channels=model_channels,
            channel_mult=multipliers([block.width for block in firsts], model_channels),
            num_res_blocks=period - 1,
            attention_downsample=tuple(2**level for level, block in enumerate(firsts) if block.attention),
            num_classes=num_classes,
            scale_shift=scale_shift,
            resblock_updown=levels > 1 and all(block.width for block in encoder),
            out_channels=shapes["out.2.weight"][0] if kind == "unet" else None,
            pool=pool,
            image_size=_side(shapes["out.2.positional_embedding"]) * 2 ** (levels - 1) if pool == "attention" else None,
        )
    except KeyError as error:
        raise CheckpointError(f"expected a tensor {error.args[0]} as guided-diffusion's networks have it") from error


def first_difference(network: nn.Module, shapes: Shapes) -> str | None:
    """The first name or shape in which a state dict differs from a network's; None: it fits."""
    expected = {name: list(value.shape) for name, value in network.state_dict().items()}
    for name, shape in expected.items():
        if name not in shapes:
            return f"{name} is missing"
        if list(shapes[name]) != shape:
            return f"{name}: expected shape {shape}, got {list(shapes[name])}"
    surplus = [name for name in shapes if name not in expected]
    return f"{surplus[0]} is one too many" if surplus else None


class _Block(NamedTuple):
    """What the keys of one of input_blocks tell. width: output channels of a residual block, 0: a convolution."""

    width: int
    changes: bool
    attention: bool


def _encoder(shapes: Shapes) -> list[_Block]:
    """input_blocks after the first."""
    blocks: list[_Block] = []
    while True:
        prefix = f"input_blocks.{len(blocks) + 1}"
        if f"{prefix}.0.op.weight" in shapes:
            blocks.append(_Block(0, changes=False, attention=False))
        elif f"{prefix}.0.out_layers.3.weight" in shapes:
            width = shapes[f"{prefix}.0.out_layers.3.weight"][0]
            changes = f"{prefix}.0.skip_connection.weight" in shapes
            blocks.append(_Block(width, changes, attention=f"{prefix}.1.qkv.weight" in shapes))
        else:
            break
    if not blocks:
        raise KeyError("input_blocks.1.0.out_layers.3.weight")
    return blocks


def _levels(shapes: Shapes) -> int:
    """Levels of a UNet: one more than there are layers that double, which only the decoder marks in every variant."""
    blocks = {name.split(".")[1] for name in shapes if name.startswith("output_blocks.")}
    doubling = ("conv.weight", "in_layers.2.weight")
    return 1 + sum(
        any(f"output_blocks.{block}.{slot}.{layer}" in shapes for slot in (1, 2) for layer in doubling)
        for block in blocks
    )


def _period(encoder: Sequence[_Block], levels: int | None, num_res_blocks: int | None) -> int:
    """Blocks of a level with the one that halves."""
    total = len(encoder) + 1
    fitting = [period for period in range(2, total + 1) if total % period == 0 and _fits(encoder, period)]
    if levels is not None:
        fitting = [period for period in fitting if period * levels == total]
    if num_res_blocks is not None:
        fitting = [period for period in fitting if period == num_res_blocks + 1]
    if not fitting:
        raise CheckpointError(
            f"{len(encoder)} input blocks fit no number of levels"
            + (f" with num_res_blocks={num_res_blocks}" if num_res_blocks else "")
        )
    if len(fitting) > 1:
        raise ConfigError(
            f"num_res_blocks: expected one of {[period - 1 for period in fitting]}, which all fit the tensors, got none"
        )
    return fitting[0]


def _fits(encoder: Sequence[_Block], period: int) -> bool:
    """Whether every period-th block can be one that halves, and the blocks between are alike as those of a level."""
    by_convolution = not all(block.width for block in encoder)
    for i, block in enumerate(encoder, 1):
        if i % period == 0:
            fits = block.width == 0 if by_convolution else not (block.changes or block.attention)
        elif i % period == 1:
            fits = block.width > 0
        else:
            fits = block.width > 0 and not block.changes and block.attention == encoder[i - 2].attention
        if not fits:
            return False
    return True


def _head(shapes: Shapes) -> tuple[str, int]:
    """A classifier's pool, and the number of its classes."""
    if "out.2.positional_embedding" in shapes:
        return "attention", shapes["out.2.c_proj.weight"][0]
    if "out.weight" in shapes:
        return "mean", shapes["out.weight"][0]
    if len(shapes["out.0.weight"]) == 1:
        return "adaptive", shapes["out.3.weight"][0]
    if "out.1.weight" in shapes:
        return "spatial_v2", shapes["out.3.weight"][0]
    return "spatial", shapes["out.2.weight"][0]


def _side(positions: Sequence[int]) -> int:
    """Side of the map that an attention pool's positions [C, side ** 2 + 1] are for."""
    return math.isqrt(positions[1] - 1)
