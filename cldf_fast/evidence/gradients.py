"""Saliency of a noise-aware classifier: gradient maps and activation maps from the same forward and backward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cldf_fast.errors import ConfigError, DataError
from cldf_fast.evidence import cam as cam_methods
from cldf_fast.evidence.graphs import CudaGraphs
from cldf_fast.ops import gradient_saliency, noised_batch, pixel_seed
from cldf_fast.ops._arguments import check_choice, check_count, check_tensor, describe
from cldf_fast.passes import check_max_batch, split_rows

Classifier = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, H, W], timesteps [B]) -> logits [B, K]."""


@dataclass(frozen=True)
class Evidence:
    """What a classifier says about a batch.

    gradient_map, cam: float32 [B, K, H, W] in [0, 1], one map a class; NaN over the whole image where the gradient is
    not finite. probability: float32 [B, K], mean over the noise levels.
    """

    gradient_map: Tensor
    cam: Tensor
    probability: Tensor


class ClassifierSaliency:
    """|d log p(class | x_t) / d x_t| over several noise levels, and a CAM of the same passes.

    Images at all noise levels are stacked as rows. A pass is one forward over some of the rows and one backward a
    class: a class stacked in the batch as well would repeat the forward.

    classifier: in evaluation mode; any callable of (x_t, timesteps) that gives logits [B, K]. No gradient of its
        parameters is computed, whatever their requires_grad, which is off during a call and back after it.
    alpha_bar, timesteps: [T], the noise levels, each in (0, 1], and what the classifier is told for each.
    cam_layer: the module whose output [B, C, h, w] the CAM reads; None: all maps of `cam` are zero.
    cam: "layercam" or "gradcam". target: the gradient of log p or of the logit.
    multi_label: classes are independent (sigmoid); otherwise the logits compete (softmax).
    reduce, percentile, sigma: see `ops.gradient_saliency`. draws: noise draws for each level.
    max_batch: bound on the rows of one pass, which bounds memory; results do not depend on it. None: 128 rows on a
        GPU; on a CPU as many as hold 2^18 pixels.
    dtype: torch.bfloat16 computes under autocast; float32 in the precision of the images and of the classifier.
    cuda_graph: capture a pass for each shape at its first use, and replay it. Needs a CUDA device and a classifier
        without host synchronisation, whose parameters stay where they are (their values may change in place).
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
        max_batch: int | None = None,
        dtype: torch.dtype = torch.float32,
        cuda_graph: bool = False,
    ) -> None:
        if alpha_bar.ndim != 1 or alpha_bar.shape != timesteps.shape or not len(alpha_bar):
            raise ConfigError(
                f"alpha_bar, timesteps: expected two equal lengths >= 1, "
                f"got {list(alpha_bar.shape)} and {list(timesteps.shape)}"
            )
        if not ((alpha_bar > 0) & (alpha_bar <= 1)).all():
            raise ConfigError(f"alpha_bar: expected values in (0, 1], got {alpha_bar.tolist()}")
        if cam_layer is not None and not isinstance(cam_layer, nn.Module):
            raise ConfigError(f"cam_layer: expected a module of the classifier or None, got {type(cam_layer).__name__}")
        check_choice("cam", cam, tuple(cam_methods.METHODS))
        check_choice("target", target, ("log_probability", "logit"))
        check_count(draws=draws)
        if dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype}")
        self.classifier = classifier
        self.num_levels = draws * len(alpha_bar)
        # One copy a device: making it synchronises with the host.
        self._levels = {alpha_bar.device: (alpha_bar.repeat(draws), timesteps.to(alpha_bar.device).repeat(draws))}
        self.cam_layer = cam_layer
        self.cam = cam_methods.METHODS[cam]
        self.target = target
        self.multi_label = multi_label
        self.saliency = partial(gradient_saliency, reduce=reduce, percentile=percentile, sigma=sigma)
        self.max_batch = check_max_batch(max_batch)
        self.dtype = dtype
        self.cuda_graph = cuda_graph
        self._pass = CudaGraphs(self._differentiate) if cuda_graph else self._differentiate

    @property
    def levels(self) -> tuple[Tensor, Tensor]:
        """alpha_bar and timesteps of every draw of every level, each [num_levels]."""
        return next(iter(self._levels.values()))

    def __call__(self, x: Tensor) -> Evidence:
        """Evidence for images x, floating [B, C, H, W] in [-1, 1]. An image's result never depends on its batch."""
        check_tensor("x", x, "floating", ("B", "C", "H", "W"))
        if self.cuda_graph and not x.is_cuda:
            raise ConfigError(f"cuda_graph: expected images on a CUDA device, got {describe(x)}; set cuda_graph=False")
        # Autograd must work although the caller may be in inference mode, where all else of a prediction belongs.
        with torch.inference_mode(False), _frozen(self.classifier):
            parts = [self._evidence(images) for images in self._split(x)]
        return Evidence(
            torch.cat([part.gradient_map for part in parts]),
            torch.cat([part.cam for part in parts]),
            torch.cat([part.probability for part in parts]),
        )

    @torch.no_grad()
    def probability(self, x: Tensor) -> Tensor:
        """The `Evidence.probability` of images x, without the backward passes."""
        check_tensor("x", x, "floating", ("B", "C", "H", "W"))
        parts = []
        for images in self._split(x):
            logits = [self._classify(*rows) for rows in self._passes(images)]
            parts.append(self._mean_probability(torch.cat(logits)))
        return torch.cat(parts)

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return split_rows(rows, self.max_batch, width=32)

    def _passes(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(x_t, timesteps) of every pass over images x; the rows are level after level."""
        if x.device not in self._levels:
            alpha_bar, timesteps = self.levels
            self._levels[x.device] = alpha_bar.to(x.device), timesteps.to(x.device)
        alpha_bar, timesteps = self._levels[x.device]
        noised = self._split(noised_batch(x, alpha_bar, pixel_seed(x)))
        times = timesteps.repeat_interleave(len(x))
        return zip(noised, times.split([len(rows) for rows in noised]), strict=True)

    def _evidence(self, x: Tensor) -> Evidence:
        passes = [self._pass(*rows) for rows in self._passes(x)]
        logits, gradients, cams = (torch.cat(column) for column in zip(*passes, strict=True))
        # Rows [T * B, K, ...] as [T, B * K, ...]: to what follows, every class of every image is one image.
        by_level = (self.num_levels, -1)
        gradient_maps = self.saliency(gradients.flatten(0, 1).unflatten(0, by_level))
        if self.cam_layer is None:
            maps = torch.zeros_like(gradient_maps)
        else:
            maps = cam_methods.average_levels(cams.flatten(0, 1).unflatten(0, by_level), (x.shape[2], x.shape[3]))
        by_image = (len(x), logits.shape[1])
        return Evidence(
            gradient_maps.unflatten(0, by_image), maps.unflatten(0, by_image), self._mean_probability(logits)
        )

    def _differentiate(self, noised: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows x_t [R, C, H, W]: logits [R, K], gradients [R, K, C, H, W], CAMs [R, K, h, w] (no layer: [R, 0])."""
        activations: list[Tensor] = []
        with torch.enable_grad(), _outputs_of(self.cam_layer, activations):
            noised = noised.detach().requires_grad_()
            logits = self._classify(noised, times)
            scores = self._log_probability(logits) if self.target == "log_probability" else logits
        self._check_pass(scores, len(noised), activations)
        classes = scores.shape[1]
        # Rows do not mix, so the gradient of a sum over rows is every row's own.
        selectors = torch.eye(classes, dtype=scores.dtype, device=scores.device).unsqueeze(1).expand(-1, *scores.shape)
        gradients, cams = [], []
        for k in range(classes):
            gradient, *inner = torch.autograd.grad(
                scores, [noised, *activations], selectors[k], retain_graph=k + 1 < classes, allow_unused=True
            )
            if gradient is None:
                raise DataError("classifier: expected logits that depend on x_t, got some that do not")
            if any(each is None for each in inner):
                raise ConfigError("cam_layer: expected a module whose output the logits depend on, got one without use")
            gradients.append(gradient)
            cams += [self.cam(*pair) for pair in zip((each.detach() for each in activations), inner, strict=True)]
        maps = torch.stack(cams, dim=1) if cams else noised.new_empty(len(noised), 0)
        return logits.detach(), torch.stack(gradients, dim=1), maps

    def _classify(self, noised: Tensor, times: Tensor) -> Tensor:
        with torch.autocast(noised.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.classifier(noised, times)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _check_pass(self, scores: Tensor, rows: int, activations: list[Tensor]) -> None:
        if scores.ndim != 2 or len(scores) != rows:
            raise DataError(f"classifier: expected logits [{rows}, K], got {describe(scores)}")
        if not scores.requires_grad:
            raise DataError("classifier: expected logits that autograd can differentiate by x_t, got a constant")
        if self.cam_layer is not None and len(activations) != 1:
            raise ConfigError(
                f"cam_layer: expected a module that the classifier calls once in its forward pass, "
                f"got a {type(self.cam_layer).__name__} that it calls {len(activations)} times"
            )
        for activation in activations:
            check_tensor("cam_layer's output", activation, "floating", (rows, "C", "h", "w"))
            if not activation.requires_grad:
                raise ConfigError("cam_layer: expected a module whose output depends on x_t, got one with a constant")

    def _log_probability(self, logits: Tensor) -> Tensor:
        return F.logsigmoid(logits) if self.multi_label else F.log_softmax(logits, dim=1)

    def _mean_probability(self, logits: Tensor) -> Tensor:
        return self._log_probability(logits).exp().float().unflatten(0, (self.num_levels, -1)).mean(dim=0)


@contextmanager
def _frozen(classifier: Classifier) -> Iterator[None]:
    """No parameter of the classifier requires a gradient; those that did do so again afterwards."""
    parameters = classifier.parameters() if isinstance(classifier, nn.Module) else ()
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _outputs_of(layer: nn.Module | None, outputs: list[Tensor]) -> Iterator[None]:
    """Every output of the layer is appended to the list."""
    if layer is None:
        yield
        return
    hook = layer.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        yield
    finally:
        hook.remove()
