"""Features of the frozen diffusion model: several noise levels in one pass, at the native size of the blocks read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cldf_fast.diffusion import Diffusion
from cldf_fast.errors import ConfigError, DataError
from cldf_fast.models.adopted import AdoptedUNet
from cldf_fast.models.reading import BlockReader, Call, ModuleReader, UNetReader
from cldf_fast.models.unet import UNet
from cldf_fast.ops import noised_batch, pixel_seed
from cldf_fast.ops._arguments import check_tensor, describe
from cldf_fast.passes import check_max_batch, split_rows

_Visit = Callable[[int, Tensor, int], None]
"""(i, map i of some rows [R, C_i, h_i, w_i], the number of the first of them among all T * B)"""


class FeatureReader(Protocol):
    """What decoders are trained on and read: `DiffusionFeatures`, or a `store.FeatureStore` in front of one.

    channels: of each map that a call returns.
    """

    channels: list[int]

    def __call__(self, x: Tensor, condition: Tensor | None) -> list[Tensor]:
        """Images [B, C, H, W] under conditions [B, ...] -> one [B, channels[i], h_i, w_i] a map."""

    def project(self, x: Tensor, condition: Tensor | None, weights: Sequence[Tensor]) -> list[Tensor]:
        """What 1 x 1 convolutions, weights [D, channels[i]], make of each map: one [B, D, h_i, w_i]; no gradient."""


class DiffusionFeatures:
    """Reads blocks of a frozen network that predicts noise, at several noise levels.

    Images at all noise levels are stacked as rows, and a pass ends with the last block that is read.

    network: in evaluation mode; the project's `UNet` (or `AdoptedUNet`), MONAI's DiffusionModelUNet, diffusers'
        UNet2DModel, or any module whose blocks can be named.
    noise_levels: in the unit of `diffusion`, by default fractions of T.
    downsample: downsampling factors; every block with one of them is read. In place of it,
    blocks: names of modules whose outputs [B, C, h, w] are read, e.g. "output_blocks.5" or "up_blocks.1.resnets.0".
    prediction: also the clean image that the network predicts from each noise level, at full size: it sharpens borders,
        and costs the blocks that would not be computed otherwise.
    max_batch: bound on the rows of one pass, which bounds memory. None: 128 rows on a GPU; on a CPU as many as hold
        2^17 pixels.
    dtype: torch.bfloat16 or torch.float16 computes convolutions and products under autocast; features are float32
        still. torch.float32: in the precision of the images and of the network.
    example: needed for a network that is not the project's: (x, condition) of a later call, from which the channels of
        its blocks are learnt in one pass.
    call: (x_t, timesteps, condition) -> prediction, where such a network wants other arguments than
        `models.reading.ModuleReader` gives it.
    channels: channels of each map that a call returns; the noise levels are concatenated in each.
    """

    def __init__(
        self,
        network: nn.Module,
        diffusion: Diffusion,
        *,
        noise_levels: Sequence[float],
        downsample: Sequence[int] | None = None,
        blocks: Sequence[str] | None = None,
        prediction: bool = True,
        max_batch: int | None = None,
        dtype: torch.dtype = torch.float32,
        example: tuple[Tensor, Tensor | None] | None = None,
        call: Call | None = None,
    ) -> None:
        if (downsample is None) == (blocks is None):
            raise ConfigError(
                f"downsample, blocks: expected one of them, got {'neither' if blocks is None else 'both'}"
            )
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(f"dtype: expected torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
        self.steps = diffusion.steps_of(noise_levels)
        if not len(self.steps) or not (downsample or blocks or prediction):
            raise ConfigError("noise_levels, blocks: expected at least one noise level and one block, got none")
        self.network = network
        self.reader: BlockReader
        if isinstance(network, UNet | AdoptedUNet):
            self.reader = UNetReader(network, downsample=downsample, blocks=blocks, prediction=prediction)
        elif example is None:
            raise ConfigError(
                f"example: expected (x, condition) as a later call takes them, because {type(network).__name__} is not "
                f"the project's UNet, got None"
            )
        else:
            self.reader = ModuleReader(
                network, downsample=downsample, blocks=blocks, prediction=prediction, example=example, call=call
            )
        self.alpha_bar = diffusion.alpha_bar[self.steps]
        self.times = diffusion.network_time(self.steps)
        # One copy a device: making it synchronises with the host.
        self._levels = {self.steps.device: (self.alpha_bar, self.steps, self.times)}
        self.diffusion = diffusion
        self.max_batch = check_max_batch(max_batch)
        self.dtype = dtype
        self.channels = [len(self.steps) * width for width in self.reader.widths]
        if prediction:
            self.channels.append(len(self.steps) * self.reader.channels)

    @torch.no_grad()
    def __call__(self, x: Tensor, condition: Tensor | None) -> list[Tensor]:
        """Features of images x, floating [B, C, H, W] in [-1, 1], under a condition [B, ...] (see `UNet.forward`).

        The noise is a function of an image's pixels, so that features never depend on the batch.
        Returns one [B, channels[i], H / f, W / f] a block, f its factor; the prediction last, [B, channels[-1], H, W].
        """
        if not len(x):
            return [part[:0] for part in self(*_blank(x, condition))]
        parts: list[list[Tensor]] = [[] for _ in self.channels]
        self._read(x, condition, lambda i, block, _start: parts[i].append(block))
        maps = (torch.cat(of_passes) if len(of_passes) > 1 else of_passes[0] for of_passes in parts)
        return [each.unflatten(0, (len(self.steps), len(x))).transpose(0, 1).flatten(1, 2) for each in maps]

    @torch.no_grad()
    def project(self, x: Tensor, condition: Tensor | None, weights: Sequence[Tensor]) -> list[Tensor]:
        """What 1 x 1 convolutions make of the maps, each as soon as it is there, so that they are never held together.

        weights: one [D, channels[i]] a map. Other arguments as those of a call, in whose place this comes with less
        memory: one [B, D, h_i, w_i] a map.
        """
        if [each.shape[1] for each in weights] != self.channels:
            raise ConfigError(
                f"weights: expected one [D, C] a map, of {self.channels} channels, got "
                f"{[list(each.shape) for each in weights]}"
            )
        if not len(x):
            return [part[:0] for part in self.project(*_blank(x, condition), weights)]
        levels, batch = len(self.steps), len(x)
        by_level = [each.detach()[:, :, None, None].unflatten(1, (levels, -1)).unbind(1) for each in weights]
        sums: dict[int, Tensor] = {}

        def add(i: int, block: Tensor, start: int) -> None:
            for level, weight in enumerate(by_level[i]):
                offset = level * batch - start
                first, last = max(-offset, 0), min(len(block) - offset, batch)
                if first >= last:
                    continue
                with torch.autocast(block.device.type, enabled=False):
                    projected = F.conv2d(block[offset + first : offset + last], weight)
                if i in sums:
                    sums[i][first:last] += projected
                else:
                    sums[i] = F.pad(projected, (0, 0, 0, 0, 0, 0, 0, batch - last))

        self._read(x, condition, add)
        return [sums[i] for i in range(len(weights))]

    def _read(self, x: Tensor, condition: Tensor | None, visit: _Visit) -> None:
        """Calls visit for every map and pass, as soon as it is there."""
        check_tensor("x", x, "floating", ("B", self.reader.channels, "H", "W"))
        levels, batch = len(self.steps), len(x)
        if condition is not None and condition.shape[:1] != (batch,):
            raise DataError(f"condition: expected a row for each of {batch} images, got {describe(condition)}")
        if x.device not in self._levels:
            device = x.device
            self._levels[device] = self.alpha_bar.to(device), self.steps.to(device), self.times.to(device)
        alpha_bar, level_steps, level_times = self._levels[x.device]
        rows = split_rows(noised_batch(x, alpha_bar.to(x.dtype), pixel_seed(x)), self.max_batch)
        sizes = [len(part) for part in rows]
        repeated = None if condition is None else condition.repeat(levels, *[1] * (condition.ndim - 1))
        conditions = [None] * len(rows) if repeated is None else repeated.split(sizes)
        steps = level_steps.repeat_interleave(batch).split(sizes)
        times = level_times.repeat_interleave(batch).split(sizes)
        start = 0
        for part in zip(rows, steps, times, conditions, strict=True):
            self._pass(visit, start, *part)
            start += len(part[0])

    def _pass(
        self, visit: _Visit, start: int, noised: Tensor, steps: Tensor, times: Tensor, condition: Tensor | None
    ) -> None:
        """Calls visit for the maps of rows x_t from number `start` on."""

        def read(i: int, block: Tensor) -> None:
            visit(i, block.to(torch.promote_types(block.dtype, torch.float32)), start)

        with torch.autocast(noised.device.type, self.dtype, enabled=self.dtype != torch.float32):
            prediction = self.reader(noised, times, condition, read)
        if prediction is not None:
            noise = prediction[:, : noised.shape[1]].to(noised.dtype)
            visit(len(self.reader.widths), self.diffusion.predict_x0(noised, steps, noise), start)


def _blank(x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One image in place of none, which torch's pixel_unshuffle, for one, leaves as they are."""
    return x.new_zeros(1, *x.shape[1:]), None if condition is None else condition.new_zeros(1, *condition.shape[1:])
