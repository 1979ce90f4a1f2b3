"""Methods that ask the CDM what an image would look like without a class: CG-Diff and CG-CDM.

Both return what the image would lose, as a map in [0, 1]: magnitudes summed over the channels, smoothed, and divided by
a high percentile of the image. Defaults that differ from the published values gave better masks on the validation parts
of the phantom and of LGG, which have far smaller networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from cldf_fast.models.conditions import label_condition, null_condition
from cldf_fast.ops import gradient_saliency, noised_batch, pixel_seed
from cldf_fast.pipeline import CLDF


@dataclass(frozen=True)
class CGDiff:
    """CG-Diff (Wolleb et al. 2022): encode the image to noise by DDIM, decode it under a classifier's guidance towards
    "without this class", and take the difference.

    level: noise level of the encoding, as a fraction of T; cut at the highest that the classifier was trained on.
    moves: DDIM moves up, and as many down; few, because each costs a pass of the networks.
    scale: strength of the guidance (published: 100; between 30 and 100 little changes).
    sigma: smoothing of the map, working pixels.
    """

    level: float = 0.4
    moves: int = 12
    scale: float = 30.0
    sigma: float = 2.0

    @torch.no_grad()
    def __call__(self, cldf: CLDF, images: Tensor, present: Tensor) -> Tensor:
        """Maps float32 [B, K, h, w] of images [B, C, h, w] in [-1, 1]: one reconstruction for each present class.

        present: bool [B, K]; maps of absent classes are zero.
        """
        diffusion = cldf.diffusion
        # Beyond the noise that the classifier knows its gradient points nowhere.
        level = min(self.level, cldf.config.classifier.max_noise)
        ladder = diffusion.ddim_ladder(diffusion.step_of_fraction(level), self.moves)
        image, target = present.nonzero(as_tuple=True)
        null = null_condition(len(images), cldf.num_classes, images.device)
        encoded = diffusion.ddim(images, partial(cldf.unet, condition=null), ladder)
        x = encoded[image]
        for step, to_step in pairwise(reversed(ladder)):
            predict = partial(self._guided_noise, cldf, target=target, step=step)
            x = diffusion.ddim(x, predict, [step, to_step])
        return difference_maps(images[image] - x.clamp(-1, 1), present, self.sigma)

    def _guided_noise(self, cldf: CLDF, x_t: Tensor, times: Tensor, *, target: Tensor, step: int) -> Tensor:
        null = null_condition(len(x_t), cldf.num_classes, x_t.device)
        with torch.enable_grad():
            guided = x_t.detach().requires_grad_(True)
            told = cldf.classifier_time(max(step, 0)).to(times.device).expand(len(x_t))
            log_absent = F.logsigmoid(-cldf.classifier(guided, told)).gather(1, target.unsqueeze(1))
            (gradient,) = torch.autograd.grad(log_absent.sum(), guided)
        strength = self.scale * (1 - cldf.diffusion.alpha_bar[max(step, 0)]).sqrt()
        noise: Tensor = cldf.unet(x_t, times, null)
        return noise - strength.to(x_t) * gradient


@dataclass(frozen=True)
class CGCDM:
    """CG-CDM (Hu et al. 2023, Algorithm 1): the derivative of a few DDIM moves with respect to the CDM's condition.

    From the same x_t each move is made under condition y1, the image's labels, and under tau * y1 + (1 - tau) * y0,
    where y0 leaves the class out; the differences over (1 - tau) add up along the path under y1.
    level: noise level at which the path begins, as a fraction of T. moves, stride: its moves, and steps in each; it
    ends at the clean image at the latest. sigma: smoothing of the map, working pixels.
    tau: published 0.95; a small CDM answers mixtures, which it was not trained on, with changes all over the image, and
    only the whole difference, tau 0, shows the class.
    """

    level: float = 0.1
    moves: int = 4
    stride: int = 1
    tau: float = 0.0
    sigma: float = 2.0

    @torch.no_grad()
    def __call__(self, cldf: CLDF, images: Tensor, present: Tensor) -> Tensor:
        """Maps float32 [B, K, h, w]; arguments as in `CGDiff`."""
        diffusion = cldf.diffusion
        top = diffusion.step_of_fraction(self.level)
        image, target = present.nonzero(as_tuple=True)
        noised = noised_batch(images, diffusion.alpha_bar[[top]].to(images), pixel_seed(images))
        with_class = present[image]
        without = with_class & ~F.one_hot(target, cldf.num_classes).bool()
        y1 = label_condition(with_class)
        towards_y0 = self.tau * y1 + (1 - self.tau) * label_condition(without)
        x = noised[image]
        nothing = torch.zeros_like(x)
        derivative = torch.zeros_like(x)
        path = sorted({max(top - i * self.stride, -1) for i in range(self.moves + 1)}, reverse=True)
        for step, to_step in pairwise(path):
            times = diffusion.network_time(torch.full((len(x),), step, device=x.device))
            noise, changed = cldf.unet(x, times, y1), cldf.unet(x, times, towards_y0)
            # A move is linear in x_t and the noise. To subtract the noises, not where they lead, keeps the digits.
            derivative += diffusion.ddim_move(nothing, noise - changed, step, to_step) / (1 - self.tau)
            x = diffusion.ddim_move(x, noise, step, to_step)
        return difference_maps(derivative, present, self.sigma)


def difference_maps(difference: Tensor, present: Tensor, sigma: float) -> Tensor:
    """Maps float32 [B, K, h, w] of differences [M, C, h, w], one for each true entry of `present`, in its order."""
    maps = difference.new_zeros(*present.shape, *difference.shape[-2:], dtype=torch.float32)
    maps[present] = gradient_saliency(difference.unsqueeze(0), reduce="sum_abs", sigma=sigma)
    return maps
