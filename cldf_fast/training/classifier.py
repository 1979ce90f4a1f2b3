"""Training of the noise-aware multi-label classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cldf_fast.config import ClassifierConfig
from cldf_fast.data.packing import PackedSlices
from cldf_fast.diffusion import Diffusion
from cldf_fast.training.augment import Augmenter
from cldf_fast.training.engine import LossFunction, StepDraws


def classifier_loss(
    data: PackedSlices, diffusion: Diffusion, config: ClassifierConfig, *, augmenter: Augmenter | None
) -> LossFunction:
    """Binary cross-entropy of every class on noised random slices."""
    labels = data.require_labels().float()

    def loss(classifier: nn.Module, draws: StepDraws) -> Tensor:
        generator, batch = draws.generator, draws.batch_size
        device = generator.device
        rows = torch.randint(len(data), (batch,), generator=generator, device=device)
        x, target = data.images[rows.cpu()].to(device), labels[rows.cpu()].to(device)
        if augmenter is not None:
            x = augmenter(batch, x.shape[1], (x.shape[2], x.shape[3]), generator).images(x)
        noisy = torch.rand(batch, generator=generator, device=device) >= config.clean_share
        level = torch.rand(batch, generator=generator, device=device) * config.max_noise * noisy
        steps = (level * (diffusion.timesteps - 1)).long()
        noise = torch.randn(x.shape, generator=generator, device=device)
        x, target, steps, noise = (draws.mine(value) for value in (x, target, steps, noise))
        logits = classifier(diffusion.q_sample(x, steps, noise), diffusion.network_time(steps))
        return F.binary_cross_entropy_with_logits(logits, target)

    return loss
