"""Features of the frozen diffusion model: several noise levels in one pass, at the native size of the blocks read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cldf_fast.diffusion import Diffusion
from cldf_fast.errors import ConfigError
from cldf_fast.models.unet import UNet
from cldf_fast.ops import noised_batch, pixel_seed


class DiffusionFeatures:
    """Reads decoder blocks of a frozen UNet.

    noise_levels: in the unit of `diffusion`, by default fractions of T. downsample: downsampling factors; every block
    with one of them is read.
    prediction: also the clean image that the network predicts from each noise level, at full size: it sharpens borders.
    channels: channels of each map that a call returns; the noise levels are concatenated in each.
    """

    def __init__(
        self,
        unet: UNet,
        diffusion: Diffusion,
        *,
        noise_levels: Sequence[float],
        downsample: Sequence[int],
        prediction: bool = True,
    ) -> None:
        available = unet.output_downsample
        missing = [factor for factor in downsample if factor not in available]
        if missing:
            raise ConfigError(
                f"downsample: the network has blocks at factors {sorted(set(available))}, got {missing[0]}"
            )
        self.unet = unet
        self.steps = diffusion.steps_of(noise_levels)
        self.alpha_bar = diffusion.alpha_bar[self.steps]
        self.times = diffusion.network_time(self.steps)
        self.diffusion = diffusion
        self.prediction = prediction
        self.blocks = [block for block, factor in enumerate(available) if factor in downsample]
        widths = [unet.output_widths[block] for block in self.blocks] + [unet.in_channels] * prediction
        self.channels = [len(noise_levels) * width for width in widths]

    @torch.no_grad()
    def __call__(self, x: Tensor, condition: Tensor | None) -> list[Tensor]:
        """Features of images x [B, C, H, W] in [-1, 1] under a condition (see `UNet.forward`; [B, ...]).

        The noise is a function of an image's pixels, so that features never depend on the batch.
        Returns one [B, channels[i], H / f, W / f] a block, f its factor; the prediction last, [B, channels[-1], H, W].
        """
        levels, batch = len(self.steps), x.shape[0]
        noised = noised_batch(x, self.alpha_bar.to(x), pixel_seed(x))
        repeated = None if condition is None else condition.repeat(levels, *[1] * (condition.ndim - 1))
        times = self.times.to(x.device).repeat_interleave(batch)
        last = len(self.unet.output_blocks) - 1
        read = self.unet.decoder_features(noised, times, repeated, [*self.blocks, *[last] * self.prediction])
        maps = [read[block] for block in self.blocks]
        if self.prediction:
            noise = self.unet.read_out(read[last])[:, : self.unet.in_channels]
            maps.append(self.diffusion.predict_x0(noised, self.steps.to(x.device).repeat_interleave(batch), noise))
        return [part.unflatten(0, (levels, batch)).transpose(0, 1).flatten(1, 2) for part in maps]
