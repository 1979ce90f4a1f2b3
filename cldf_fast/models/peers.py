"""The UNet in the names of diffusers' `UNet2DModel` and of MONAI's `DiffusionModelUNet`, and back.

Both are arrangements of the same residual and attention blocks. What they can do beyond that (or do otherwise) is
refused with one sentence that names the first difference. Neither library is imported here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cldf_fast.errors import CheckpointError
from cldf_fast.models.architecture import Architecture, multipliers

State = dict[str, Tensor]


@dataclass(frozen=True)
class _Layout:
    """A library's names, each after ours. A level's modules are down_blocks.<i>.resnets.<j> and so on in both."""

    outside: Mapping[str, str]
    residual: Mapping[str, str]
    norm: str
    projections: tuple[str, str, str]
    proj_out: str
    middle: tuple[str, str, str]
    down: str
    halving: str
    up: str
    doubling: str


_DIFFUSERS = _Layout(
    outside={
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb": "class_embedding",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    },
    residual={
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    },
    norm="group_norm",
    projections=("to_q", "to_k", "to_v"),
    proj_out="to_out.0",
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    down="downsamplers.0",
    halving="conv",
    up="upsamplers.0",
    doubling="conv",
)
_MONAI = _Layout(
    outside={
        "time_embed.0": "time_embed.0",
        "time_embed.2": "time_embed.2",
        "label_emb": "class_embedding",
        "input_blocks.0.0": "conv_in.conv",
        "out.0": "out.0",
        "out.2": "out.2.conv",
    },
    residual={
        "in_layers.0": "norm1",
        "in_layers.2": "conv1.conv",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2.conv",
        "skip_connection": "skip_connection.conv",
    },
    norm="norm",
    projections=("attn.to_q", "attn.to_k", "attn.to_v"),
    proj_out="attn.out_proj",
    middle=("middle_block.resnet_1", "middle_block.attention", "middle_block.resnet_2"),
    down="downsampler",
    halving="op.conv",
    up="upsampler",
    doubling="postconv.conv",
)

# What guided-diffusion's network is one case of: the values that are equal to it, the library's default first.
_FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (0,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
}
_DOWN = {"DownBlock2D": "conv", "ResnetDownsampleBlock2D": "resnet", "AttnDownBlock2D": None}
_UP = {"UpBlock2D": "conv", "ResnetUpsampleBlock2D": "resnet", "AttnUpBlock2D": None}


def from_diffusers(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[Architecture, State]:
    """Architecture and tensors of a `UNet2DModel`, from its configuration and state dict."""
    for key, equal in _FIXED.items():
        _expect("diffusers", key, equal, config.get(key, equal[0]))
    widths = tuple(config["block_out_channels"])
    levels, groups = len(widths), config.get("norm_num_groups", 32)
    scale_shift = config.get("resnet_time_scale_shift", "default") == "scale_shift"
    _expect("diffusers", "time_embedding_dim", (None, 4 * widths[0]), config.get("time_embedding_dim"))
    middle_groups = config.get("attn_norm_num_groups") or (None if scale_shift else groups)
    # Without this norm, which scale_shift networks lack by default, the middle attention is another function.
    _expect("diffusers", "attn_norm_num_groups", (groups,), middle_groups)
    down, up = config["down_block_types"], config["up_block_types"]
    for key, kinds, known in (("down_block_types", down, _DOWN), ("up_block_types", up, _UP)):
        for kind in kinds:
            _expect("diffusers", key, tuple(known), kind)
    attention = [kind == "AttnDownBlock2D" for kind in down]
    if [kind == "AttnUpBlock2D" for kind in reversed(up)] != attention:
        raise _differs("diffusers", f"up_block_types {list(up)} have attention at other levels than {list(down)}")
    resampling = {_DOWN[kind] or config.get("downsample_type") or "conv" for kind in down[: levels - 1]}
    resampling |= {_UP[kind] or config.get("upsample_type") or "conv" for kind in up[: levels - 1]}
    if len(resampling) > 1:
        raise _differs("diffusers", "some levels are resampled by convolutions, others by residual blocks")
    if levels > 1 and resampling == {"conv"}:
        _expect("diffusers", "downsample_padding", (1,), config.get("downsample_padding", 1))
    head_channels = config.get("attention_head_dim", 8)
    architecture = Architecture(
        kind="unet",
        in_channels=config["in_channels"],
        model_channels=widths[0],
        channel_mult=multipliers(widths, widths[0]),
        num_res_blocks=config.get("layers_per_block", 2),
        attention_downsample=_downsample(attention),
        num_classes=config.get("num_class_embeds"),
        scale_shift=scale_shift,
        resblock_updown=resampling == {"resnet"},
        num_heads=1 if head_channels is None else None,
        num_head_channels=head_channels,
        new_attention_order=True,
        out_channels=config["out_channels"],
        norm_groups=groups,
        norm_eps=config.get("norm_eps", 1e-5),
    )
    tensors = _ours(architecture, _DIFFUSERS, state, "diffusers")
    if not config.get("flip_sin_to_cos", True):
        tensors["time_embed.0.weight"] = _sine_first(tensors["time_embed.0.weight"])
    return architecture, tensors


def to_diffusers(architecture: Architecture, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], State]:
    """Arguments and state dict of the `UNet2DModel` that computes the same."""
    _expect_plain_unet("diffusers", architecture)
    levels = architecture.attention_levels
    resample = "resnet" if architecture.resblock_updown else "conv"
    plain = {"conv": ("DownBlock2D", "UpBlock2D"), "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")}
    per_head = {width // architecture.heads(width) for width in _attention_widths(architecture)}
    if len(per_head) > 1:
        raise _differs("diffusers", f"heads have {sorted(per_head)} channels, depending on the level")
    groups = _groups("diffusers", architecture)
    config = {
        "in_channels": architecture.in_channels,
        "out_channels": architecture.out_channels,
        "down_block_types": tuple("AttnDownBlock2D" if has else plain[resample][0] for has in levels),
        "up_block_types": tuple("AttnUpBlock2D" if has else plain[resample][1] for has in reversed(levels)),
        "block_out_channels": architecture.widths,
        "layers_per_block": architecture.num_res_blocks,
        "downsample_type": resample,
        "upsample_type": resample,
        "attention_head_dim": per_head.pop(),
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups,
        "norm_eps": architecture.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if architecture.scale_shift else "default",
        "num_class_embeds": architecture.num_classes,
    }
    return config, _theirs(architecture, _DIFFUSERS, state)


def from_monai(model: nn.Module) -> tuple[Architecture, State]:
    """Architecture and tensors of a `DiffusionModelUNet`."""
    network: Any = model
    state = dict(model.state_dict())
    _expect("MONAI", "with_conditioning", (False,), network.with_conditioning)
    _expect("MONAI", "spatial_dims", (2,), network.conv_in.conv.weight.ndim - 2)
    widths, per_level = tuple(network.block_out_channels), tuple(network.num_res_blocks)
    _expect("MONAI", "num_res_blocks", ((per_level[0],) * len(per_level),), per_level)
    attention = list(network.attention_levels)
    at_attention = [(w, h) for w, h, has in zip(widths, network.num_head_channels, attention, strict=True) if has]
    at_attention.append((widths[-1], network.num_head_channels[-1]))
    head_channels, heads = {per for _, per in at_attention}, {width // per for width, per in at_attention}
    if len(head_channels) > 1 and len(heads) > 1:
        raise _differs("MONAI", f"num_head_channels {list(network.num_head_channels)} and the heads they make vary")
    one_width = len(head_channels) == 1
    architecture = Architecture(
        kind="unet",
        in_channels=network.in_channels,
        model_channels=widths[0],
        channel_mult=multipliers(widths, widths[0]),
        num_res_blocks=per_level[0],
        attention_downsample=_downsample(attention),
        num_classes=network.num_class_embeds,
        scale_shift=False,
        resblock_updown="down_blocks.0.downsampler.norm1.weight" in state,
        num_heads=None if one_width else heads.pop(),
        num_head_channels=head_channels.pop() if one_width else None,
        new_attention_order=True,
        out_channels=network.out_channels,
        norm_groups=network.out[0].num_groups,
        norm_eps=network.out[0].eps,
    )
    for name in [name for name in state if ".attn.qkv." in name]:  # use_combined_linear
        for part, rows in zip(("to_q", "to_k", "to_v"), state.pop(name).chunk(3), strict=True):
            state[name.replace(".qkv.", f".{part}.")] = rows
    return architecture, _ours(architecture, _MONAI, state, "MONAI")


def to_monai(architecture: Architecture, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], State]:
    """Arguments and state dict of the `DiffusionModelUNet` that computes the same."""
    _expect_plain_unet("MONAI", architecture)
    if architecture.scale_shift:
        raise _differs("MONAI", "its residual blocks have no scale and shift after the norm (scale_shift)")
    config = {
        "spatial_dims": 2,
        "in_channels": architecture.in_channels,
        "out_channels": architecture.out_channels,
        "num_res_blocks": architecture.num_res_blocks,
        "channels": architecture.widths,
        "attention_levels": architecture.attention_levels,
        "norm_num_groups": _groups("MONAI", architecture),
        "norm_eps": architecture.norm_eps,
        "resblock_updown": architecture.resblock_updown,
        "num_head_channels": tuple(width // architecture.heads(width) for width in architecture.widths),
        "num_class_embeds": architecture.num_classes,
    }
    return config, _theirs(architecture, _MONAI, state)


def _differs(library: str, what: str) -> CheckpointError:
    return CheckpointError(f"{library}: the architectures are not equivalent: {what}")


def _expect(library: str, key: str, equal: tuple[Any, ...], got: Any) -> None:
    if got not in equal:
        expected = " or ".join(map(repr, equal))
        raise _differs(library, f"{key}: expected {expected}, got {got!r}")


def _expect_plain_unet(library: str, architecture: Architecture) -> None:
    _expect(library, "kind", ("unet",), architecture.kind)
    _expect(library, "patch_size", (1,), architecture.patch_size)
    # Both take the width of the time's embedding from the first level.
    _expect(library, "channel_mult[0]", (1,), architecture.channel_mult[0])


def _groups(library: str, architecture: Architecture) -> int:
    """Groups of the norms, which both libraries have one number for."""
    groups = {norm.num_groups for norm in architecture.build().modules() if isinstance(norm, nn.GroupNorm)}
    if len(groups) > 1:
        raise _differs(library, f"norms have {sorted(groups)} groups, depending on the width")
    return groups.pop()


def _attention_widths(architecture: Architecture) -> list[int]:
    levels = zip(architecture.widths, architecture.attention_levels, strict=True)
    return [width for width, has in levels if has] + [architecture.widths[-1]]


def _downsample(attention: Sequence[bool]) -> tuple[int, ...]:
    return tuple(2**level for level, has in enumerate(attention) if has)


def _sine_first(weight: Tensor) -> Tensor:
    """Weights [4C, C] that read [sin, cos], for an embedding [cos, sin]."""
    half = weight.shape[1] // 2
    return torch.cat([weight[:, half : 2 * half], weight[:, :half], weight[:, 2 * half :]], dim=1)


def _blocks(architecture: Architecture, layout: _Layout) -> Iterator[tuple[str, str, str]]:
    """(kind, our name, their name) of every block; kind: "residual", "attention", "halving" or "doubling"."""
    levels, blocks = len(architecture.channel_mult), architecture.num_res_blocks
    by_block = architecture.resblock_updown
    index = 1
    for level, attention in enumerate(architecture.attention_levels):
        theirs = f"down_blocks.{level}"
        for block in range(blocks):
            yield "residual", f"input_blocks.{index}.0", f"{theirs}.resnets.{block}"
            if attention:
                yield "attention", f"input_blocks.{index}.1", f"{theirs}.attentions.{block}"
            index += 1
        if level < levels - 1:
            yield "residual" if by_block else "halving", f"input_blocks.{index}.0", f"{theirs}.{layout.down}"
            index += 1
    for slot, kind in enumerate(("residual", "attention", "residual")):
        yield kind, f"middle_block.{slot}", layout.middle[slot]
    index = 0
    for level, attention in enumerate(reversed(architecture.attention_levels)):
        theirs = f"up_blocks.{level}"
        for block in range(blocks + 1):
            yield "residual", f"output_blocks.{index}.0", f"{theirs}.resnets.{block}"
            if attention:
                yield "attention", f"output_blocks.{index}.1", f"{theirs}.attentions.{block}"
            if level < levels - 1 and block == blocks:
                slot = 2 if attention else 1
                yield (
                    "residual" if by_block else "doubling",
                    f"output_blocks.{index}.{slot}",
                    f"{theirs}.{layout.up}",
                )
            index += 1


def _names(architecture: Architecture, layout: _Layout) -> dict[str, str]:
    """Their name of each of our modules that hold tensors, but for the qkv of attention."""
    inside = {
        "residual": layout.residual,
        "attention": {"norm": layout.norm, "proj_out": layout.proj_out},
        "halving": {"op": layout.halving},
        "doubling": {"conv": layout.doubling},
    }
    names = dict(layout.outside)
    for kind, ours, theirs in _blocks(architecture, layout):
        names |= {f"{ours}.{mine}": f"{theirs}.{other}" for mine, other in inside[kind].items()}
    return names


def _attentions(architecture: Architecture, layout: _Layout) -> Iterator[tuple[str, list[str]]]:
    """Our qkv, and their three projections, of every attention block."""
    for kind, ours, theirs in _blocks(architecture, layout):
        if kind == "attention":
            yield f"{ours}.qkv", [f"{theirs}.{projection}" for projection in layout.projections]


def _ours(architecture: Architecture, layout: _Layout, state: Mapping[str, Tensor], library: str) -> State:
    """A library's state dict in our names. Linear layers of attention become convolutions of one pixel."""
    left = dict(state)
    tensors: State = {}
    for mine, other in _names(architecture, layout).items():
        for leaf in ("weight", "bias"):
            if f"{other}.{leaf}" in left:
                value = left.pop(f"{other}.{leaf}")
                tensors[f"{mine}.{leaf}"] = (
                    value.unsqueeze(-1) if mine.endswith("proj_out") and leaf == "weight" else value
                )
    for mine, projections in _attentions(architecture, layout):
        for leaf in ("weight", "bias"):
            names = [f"{projection}.{leaf}" for projection in projections]
            if all(name in left for name in names):
                packed = torch.cat([left.pop(name) for name in names])
                tensors[f"{mine}.{leaf}"] = packed.unsqueeze(-1) if leaf == "weight" else packed
    if left:
        raise _differs(library, f"{next(iter(left))} has no counterpart")
    return tensors


def _theirs(architecture: Architecture, layout: _Layout, state: Mapping[str, Tensor]) -> State:
    """Our state dict in a library's names."""
    tensors: State = {}
    for mine, other in _names(architecture, layout).items():
        for leaf in ("weight", "bias"):
            if f"{mine}.{leaf}" in state:
                value = state[f"{mine}.{leaf}"]
                tensors[f"{other}.{leaf}"] = (
                    value.squeeze(-1) if mine.endswith("proj_out") and leaf == "weight" else value
                )
    for mine, projections in _attentions(architecture, layout):
        for leaf in ("weight", "bias"):
            packed = state[f"{mine}.{leaf}"]
            packed = packed.squeeze(-1) if leaf == "weight" else packed
            if not architecture.new_attention_order:  # from [head, qkv, channel] to [qkv, head, channel]
                by_head = packed.unflatten(0, (architecture.heads(len(packed) // 3), 3, -1))
                packed = by_head.transpose(0, 1).flatten(0, 2)
            for projection, rows in zip(projections, packed.chunk(3), strict=True):
                tensors[f"{projection}.{leaf}"] = rows
    return tensors
