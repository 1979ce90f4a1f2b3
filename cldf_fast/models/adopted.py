"""Converted networks in the places of a run's own, whatever they were trained on.

They take what the run's networks take, x_t of images in [-1, 1] and conditions of `conditions`, and give what those
give: noise, or one sigmoid logit a foreground class. What they were trained on is in their description.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cldf_fast.diffusion import Diffusion
from cldf_fast.errors import CheckpointError, ConfigError
from cldf_fast.models.architecture import Architecture
from cldf_fast.models.checkpoints import Description, Loaded
from cldf_fast.models.classifier import NoiseAwareClassifier
from cldf_fast.models.conditions import HEALTHY, NULL, num_conditions
from cldf_fast.models.unet import UNet, Visit

NULL_NAMES = ("null",)
"""What a description may call the row of the class table that stands for no condition."""
HEALTHY_NAMES = ("healthy", "none", "normal")
"""What a description may call the row for images without any of the classes."""


class AdoptedUNet(nn.Module):
    """A converted UNet as the CDM of a run on these classes and channels, at this working size in pixels.

    Rows of its class table are found by their meaning: one for each class name, and one of HEALTHY_NAMES. Without a row
    of NULL_NAMES the null condition is the healthy row: a condition that is the same for all images. A network without
    a class table ignores conditions.
    diffusion: its own process, in terms of images in [-1, 1]. conditional: whether it has a class table.
    """

    rows: Tensor | None

    def __init__(
        self,
        loaded: Loaded,
        *,
        class_names: Sequence[str],
        channel_names: Sequence[str],
        size: int,
        level_unit: str = "fraction",
    ) -> None:
        super().__init__()
        network, description = loaded
        if not isinstance(network, UNet):
            raise CheckpointError(f"{description.source}: expected a unet, got a classifier")
        _check_fit(loaded, channel_names, size)
        self.network = network
        self.diffusion = _process(description, level_unit)
        self.trained_input = _TrainedInput(description)
        self.conditional = network.num_classes is not None
        self.register_buffer("rows", _class_rows(description, class_names) if self.conditional else None)

    @property
    def null_row(self) -> int | None:
        """The row of the class table that the null condition is; None without a table."""
        return None if self.rows is None else int(self.rows[NULL].argmax())

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return self.network.in_channels

    @property
    def output_blocks(self) -> nn.ModuleList:
        """As of the network."""
        return self.network.output_blocks

    @property
    def output_widths(self) -> list[int]:
        """As of the network."""
        return self.network.output_widths

    @property
    def output_downsample(self) -> list[int]:
        """As of the network."""
        return self.network.output_downsample

    def forward(self, x: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """Predicted noise [B, C, H, W] of x_t [B, C, H, W] at timesteps [B] under a condition [B, K + 2]."""
        last = len(self.output_blocks) - 1
        return self.read_out(self.decoder_features(x, timesteps, condition, [last])[last])

    def read_out(self, last: Tensor) -> Tensor:
        """The predicted noise [B, C, H, W] from what the last of output_blocks returned."""
        return self.network.read_out(last)[:, : self.in_channels]

    def decoder_features(
        self,
        x: Tensor,
        timesteps: Tensor,
        condition: Tensor | None,
        blocks: Sequence[int],
        visit: Visit | None = None,
    ) -> dict[int, Tensor]:
        """As `UNet.decoder_features`, for arguments as in forward."""
        embedding = self.embed(timesteps, condition)
        return self.network.blocks_of(self.trained_input(x, timesteps), embedding, blocks, visit)

    def embed(self, timesteps: Tensor, condition: Tensor | None) -> Tensor:
        """As `UNet.embed`, for arguments as in forward."""
        own = None if condition is None or self.rows is None else condition.to(self.rows.dtype) @ self.rows
        return self.network.embed(timesteps, own)


class AdoptedClassifier(nn.Module):
    """A converted classifier as that of a run on these classes and channels, at this working size in pixels.

    Its logits are found by their meaning, one for each class name. Of a softmax head, logit k of a class becomes
    log p_k - log(1 - p_k): its sigmoid is the softmax's p_k, and gradients of their logarithms are the same.
    diffusion: its own process, in terms of images in [-1, 1]. numbers: int64 [K], the network's logit of each class.
    """

    numbers: Tensor

    def __init__(
        self,
        loaded: Loaded,
        *,
        class_names: Sequence[str],
        channel_names: Sequence[str],
        size: int,
        level_unit: str = "fraction",
    ) -> None:
        super().__init__()
        network, description = loaded
        if not isinstance(network, NoiseAwareClassifier):
            raise CheckpointError(f"{description.source}: expected a classifier, got a unet")
        _check_fit(loaded, channel_names, size)
        self.network = network
        self.num_classes = len(class_names)
        self.multi_label = bool(description.multi_label)
        self.diffusion = _process(description, level_unit)
        self.trained_input = _TrainedInput(description)
        self.register_buffer("numbers", torch.tensor(_meanings(description, [(name,) for name in class_names])))

    @property
    def pooled(self) -> nn.Module:
        """As of the network."""
        return self.network.pooled

    def block_at(self, downsample: int) -> nn.Module:
        """As of the network."""
        return self.network.block_at(downsample)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Logits [B, K] of x_t [B, C, H, W] at timesteps [B]."""
        logits = self.network(self.trained_input(x, timesteps), timesteps)
        own = logits[:, self.numbers]
        if self.multi_label:
            return own
        # Of the others' sum, and not of 1 - p_k, whose digits are gone where p_k is near 1.
        chosen = F.one_hot(self.numbers, logits.shape[1]).bool()
        return own - logits.unsqueeze(1).masked_fill(chosen, -torch.inf).logsumexp(dim=2)


def network_settings(architecture: Architecture) -> dict[str, Any]:
    """An architecture as a section `network` of the configuration, which then tells the truth about the run."""
    keys = ["model_channels", "channel_mult", "num_res_blocks", "attention_downsample"]
    keys += ["patch_size"] if architecture.kind == "unet" else ["resblock_updown", "pool"]
    return {key: getattr(architecture, key) for key in keys} | {"dropout": 0.0}


class _TrainedInput(nn.Module):
    """x_t as a network was trained on it, from x_t of the same image in [-1, 1] with the same noise.

    Images that were trained on are middle + half * x. With a process sqrt(ab) (middle + half * x) + sqrt(1 - ab) noise,
    division by the root of half^2 ab + 1 - ab, once the middle's share is taken off, gives x_t of `_process`.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, description: Description) -> None:
        super().__init__()
        low, high = description.pixel_range
        signal = description.diffusion().alpha_bar.double()
        half = (high - low) / 2
        same = (low, high) == (-1, 1)
        self.register_buffer("scale", None if same else (half**2 * signal + 1 - signal).sqrt().float())
        self.register_buffer("shift", None if same else ((low + high) / 2 * signal.sqrt()).float())
        self.steps_per_time = description.timesteps / 1000 if description.rescale_timesteps else 1.0

    def at(self, timesteps: Tensor) -> tuple[Tensor, Tensor] | None:
        """Scale and shift, each [B, 1, 1, 1], of timesteps [B] as the network is told them; None: nothing changes."""
        if self.scale is None or self.shift is None:
            return None
        steps = (timesteps * self.steps_per_time).round().long()
        return self.scale[steps].view(-1, 1, 1, 1), self.shift[steps].view(-1, 1, 1, 1)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """x: [B, C, H, W]. timesteps: [B], as the network is told them."""
        found = self.at(timesteps)
        return x if found is None else found[0].to(x.dtype) * x + found[1].to(x.dtype)


def _process(description: Description, level_unit: str) -> Diffusion:
    """The process that a network was trained on, in terms of images in [-1, 1]."""
    low, high = description.pixel_range
    return Diffusion(
        description.timesteps,
        description.schedule,
        description.rescale_timesteps,
        level_unit,
        input_scale=(high - low) / 2,
    )


def _check_fit(loaded: Loaded, channel_names: Sequence[str], size: int) -> None:
    network, description = loaded
    name, architecture = description.source, description.architecture
    if [_folded(channel) for channel in description.channel_names] != [_folded(channel) for channel in channel_names]:
        raise ConfigError(
            f"{name}: expected the data's channels in order, {', '.join(channel_names)}, got a network for "
            f"{', '.join(description.channel_names)}; choose channels by the data set's options, or convert it with "
            "other --channel-names if the names alone differ"
        )
    if architecture.image_size not in (None, size):
        raise ConfigError(
            f"data.size: expected {architecture.image_size}, which {name} was trained at, got {size}; add --set "
            f"data.size={architecture.image_size}"
        )
    if size % network.downsample_factor:
        raise ConfigError(f"data.size: expected a multiple of {network.downsample_factor} for {name}, got {size}")


def _class_rows(description: Description, class_names: Sequence[str]) -> Tensor:
    """Weights float32 [K + 2, R] of a class table's rows for each of this package's conditions."""
    table = description.architecture.num_classes
    assert table is not None
    healthy, *classes = _meanings(description, [HEALTHY_NAMES, *((name,) for name in class_names)])
    has_null = any(_folded(meaning) in NULL_NAMES for meaning in description.labels.values())
    rows = torch.zeros(num_conditions(len(class_names)), dtype=torch.long)
    rows[NULL] = _meanings(description, [NULL_NAMES])[0] if has_null else healthy
    rows[HEALTHY] = healthy
    rows[HEALTHY + 1 :] = torch.tensor(classes)
    return F.one_hot(rows, table).float()


def _meanings(description: Description, wanted: Iterable[Sequence[str]]) -> list[int]:
    """The number of the one label that is called by any of the names, for each group of names."""
    numbers = []
    for names in wanted:
        folded = [_folded(name) for name in names]
        found = [number for number, meaning in description.labels.items() if _folded(meaning) in folded]
        if len(found) != 1:
            known = ", ".join(f"{number}={meaning}" for number, meaning in description.labels.items()) or "none"
            raise ConfigError(
                f"{description.source}: labels: expected one that means {' or '.join(names)}, got {known}; convert it "
                "with --labels that use the data's class names"
            )
        numbers += found
    return numbers


def _folded(name: str) -> str:
    return name.strip().casefold()
