"""Saliency of a noise-aware classifier: gradient maps and activation maps from the same forward and backward passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cldf_fast.errors import ConfigError
from cldf_fast.evidence import cam as cam_methods
from cldf_fast.ops import gradient_saliency, noised_batch, pixel_seed

Classifier = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, H, W], timesteps [B]) -> logits [B, K]."""


@dataclass(frozen=True)
class Evidence:
    """What a classifier says about a batch.

    gradient_map, cam: float32 [B, K, H, W] in [0, 1], one map a class. probability: float32 [B, K], mean over the noise
    levels.
    """

    gradient_map: Tensor
    cam: Tensor
    probability: Tensor


class ClassifierSaliency:
    """|d log p(class | x_t) / d x_t| over several noise levels, and a CAM of the same passes.

    classifier: frozen; any callable of (x_t, timesteps). Its parameters need no gradient.
    alpha_bar, timesteps: float [T], the noise levels and what the classifier is told for each.
    cam_layer: the module whose output the CAM reads; None: all maps of `cam` are zero.
    cam: "layercam" or "gradcam". target: the gradient of log p or of the logit.
    multi_label: classes are independent (sigmoid); otherwise the logits compete (softmax).
    reduce, percentile, sigma: see `ops.gradient_saliency`. draws: noise draws for each level.
    max_batch: bound on images times levels in one pass, which bounds memory; results do not depend on it.
    """

    def __init__(
        self,
        classifier: Classifier,
        *,
        alpha_bar: Tensor,
        timesteps: Tensor,
        cam_layer: nn.Module | None = None,
        cam: Literal["layercam", "gradcam"] = "layercam",
        target: Literal["log_probability", "logit"] = "log_probability",
        multi_label: bool = True,
        reduce: Literal["max_abs", "sum_abs", "l2"] = "sum_abs",
        percentile: float = 0.99,
        sigma: float = 1.5,
        draws: int = 1,
        max_batch: int = 128,
    ) -> None:
        if alpha_bar.ndim != 1 or alpha_bar.shape != timesteps.shape or not len(alpha_bar):
            raise ConfigError(
                f"alpha_bar, timesteps: expected two equal lengths >= 1, "
                f"got {list(alpha_bar.shape)} and {list(timesteps.shape)}"
            )
        self.classifier = classifier
        self.alpha_bar = alpha_bar.repeat(draws)
        self.timesteps = timesteps.repeat(draws)
        self.cam_layer = cam_layer
        self.cam = cam_methods.METHODS[cam]
        self.target = target
        self.multi_label = multi_label
        self.saliency = partial(gradient_saliency, reduce=reduce, percentile=percentile, sigma=sigma)
        self.max_batch = max_batch

    def __call__(self, x: Tensor) -> Evidence:
        """Evidence for images x float32 [B, C, H, W] in [-1, 1]. An image's result never depends on its batch."""
        parts = [self._chunk(part) for part in self._split(x)]
        return Evidence(
            torch.cat([part.gradient_map for part in parts]),
            torch.cat([part.cam for part in parts]),
            torch.cat([part.probability for part in parts]),
        )

    @torch.no_grad()
    def probability(self, x: Tensor) -> Tensor:
        """The `Evidence.probability` of images x, without the backward passes."""
        return torch.cat([self._probability(self._classify(self._noised(part))) for part in self._split(x)])

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(max(1, self.max_batch // len(self.alpha_bar)))

    def _noised(self, x: Tensor) -> Tensor:
        return noised_batch(x, self.alpha_bar.to(x), pixel_seed(x))

    def _classify(self, noised: Tensor) -> Tensor:
        times = self.timesteps.to(noised.device)
        return self.classifier(noised, times.repeat_interleave(noised.shape[0] // len(times)))

    def _probability(self, logits: Tensor) -> Tensor:
        return self._log_probability(logits).exp().float().unflatten(0, (len(self.alpha_bar), -1)).mean(dim=0)

    def _log_probability(self, logits: Tensor) -> Tensor:
        return F.logsigmoid(logits) if self.multi_label else F.log_softmax(logits, dim=1)

    @torch.enable_grad()
    def _chunk(self, x: Tensor) -> Evidence:
        levels, batch = len(self.alpha_bar), x.shape[0]
        noised = self._noised(x).requires_grad_(True)
        activations: list[Tensor] = []
        hook = None
        if self.cam_layer is not None:
            hook = self.cam_layer.register_forward_hook(lambda _module, _args, output: activations.append(output))
        try:
            logits = self._classify(noised)
        finally:
            if hook is not None:
                hook.remove()
        scores = self._log_probability(logits) if self.target == "log_probability" else logits
        classes = scores.shape[1]
        gradient_maps, cams = [], []
        # One backward pass a class over one shared forward pass: stacking the classes in the batch would repeat the
        # forward pass for each of them.
        for k in range(classes):
            gradients = torch.autograd.grad(scores[:, k].sum(), [noised, *activations], retain_graph=k + 1 < classes)
            by_level = gradients[0].unflatten(0, (levels, batch))
            gradient_maps.append(self.saliency(by_level))
            if activations:
                maps = self.cam(activations[0].detach(), gradients[1]).unflatten(0, (levels, batch))
                cams.append(cam_methods.average_levels(maps, (x.shape[2], x.shape[3])))
            else:
                cams.append(torch.zeros_like(gradient_maps[-1]))
        return Evidence(torch.stack(gradient_maps, dim=1), torch.stack(cams, dim=1), self._probability(logits.detach()))
