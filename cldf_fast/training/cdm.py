"""Training of the conditional diffusion model: noise prediction with classifier-free dropping of the condition."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cldf_fast.config import CDMConfig
from cldf_fast.data.packing import PackedSlices
from cldf_fast.diffusion import Diffusion
from cldf_fast.models.conditions import label_condition, null_condition
from cldf_fast.models.unet import UNet
from cldf_fast.training.augment import Augmenter
from cldf_fast.training.engine import LossFunction, StepDraws

_LOW_NOISE = 0.3  # of T; see CDMConfig.low_noise_share


def cdm_loss(
    data: PackedSlices, diffusion: Diffusion, config: CDMConfig, *, augmenter: Augmenter | None
) -> LossFunction:
    """The CDM's loss on random slices: mean squared error of the predicted noise."""
    labels = data.require_labels()

    def loss(unet: UNet | nn.Module, draws: StepDraws) -> Tensor:
        generator, batch = draws.generator, draws.batch_size
        device = generator.device
        rows = torch.randint(len(data), (batch,), generator=generator, device=device)
        x = data.images[rows.cpu()].to(device)
        if augmenter is not None:
            x = augmenter(batch, x.shape[1], (x.shape[2], x.shape[3]), generator).images(x)
        condition = label_condition(labels[rows.cpu()].to(device))
        dropped = torch.rand(batch, 1, generator=generator, device=device) < config.null_probability
        condition = torch.where(dropped, null_condition(batch, labels.shape[1], device), condition)
        low = torch.rand(batch, generator=generator, device=device) < config.low_noise_share
        share = torch.rand(batch, generator=generator, device=device) * torch.where(low, _LOW_NOISE, 1.0)
        steps = (share * diffusion.timesteps).long()
        noise = torch.randn(x.shape, generator=generator, device=device)
        x, condition, steps, noise = (draws.mine(value) for value in (x, condition, steps, noise))
        predicted = unet(diffusion.q_sample(x, steps, noise), diffusion.network_time(steps), condition)
        return (predicted - noise).square().mean()

    return loss
