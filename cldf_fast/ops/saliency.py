"""Around the classifier's forward and backward: noised copies of the images in, gradient maps and pixel labels out."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from cldf_fast.errors import ConfigError, DataError
from cldf_fast.ops import _dispatch, _native, _saliency_native, reference
from cldf_fast.ops._arguments import check_choice, check_number, check_tensor, constant, describe, seed_per_image

Reduce = Literal["max_abs", "sum_abs", "l2"]

# Class k becomes label k + 1 in an int8.
_MOST_CLASSES = 126


def pixel_seed(x: Tensor, *, impl: str = "auto") -> Tensor:
    """A seed for every image, from its pixels alone: the same in every batch, order, process and device.

    Args:
        x: [B, C, H, W], floating; what is hashed are the bits of its values as float32. Half precision that was
            rounded from float32 therefore gives another seed.
        impl: a backend's name, or "auto" for the fastest that serves the input.

    Returns:
        int64 [B], any value of 64 bits with sign; bit-identical on every backend.

    Raises:
        DataError: x is not a floating tensor of four axes.
        BackendError: the backend that was asked for can't serve.
    """
    check_tensor("x", x, "floating", ("B", "C", "H", "W"))
    return _pixel_seed(constant(x), impl)


_pixel_seed = _dispatch.operator(
    "pixel_seed(Tensor x, str impl) -> Tensor", lambda x, *_: x.new_empty(x.shape[0], dtype=torch.int64)
)


def noised_batch(x: Tensor, alpha_bar: Tensor, seed: int | Tensor, *, impl: str = "auto") -> Tensor:
    """Every image at every noise level, stacked: sqrt(alpha_bar_t) x_b + sqrt(1 - alpha_bar_t) eps(seed_b, t).

    An image's noise depends on its seed and the level's place in `alpha_bar` alone, so its result never depends on the
    batch; with the seeds of `pixel_seed` it is a function of the image. `reference.standard_normal` defines the draw.

    Args:
        x: [B, C, H, W], floating. Differentiable.
        alpha_bar: [T], floating, each in [0, 1]: the share of the signal's variance that is left; constant in autograd.
        seed: an integer, which gives every image the same noise, or int64 of shape [] or [B] on the device of `x`.
        impl: a backend's name, or "auto" for the fastest that serves the input.

    Returns:
        [T * B, C, H, W] in the dtype of `x`, level after level: row t * B + b is image b at level t.

    Raises:
        DataError: a tensor's shape, dtype or device does not fit.
        ConfigError: seed is out of range.
        BackendError: the backend that was asked for can't serve.
    """
    check_tensor("x", x, "floating", ("B", "C", "H", "W"))
    check_tensor("alpha_bar", alpha_bar, "floating", ("T",), x)
    return _noised_batch(x, constant(alpha_bar), seed_per_image(seed, x, x.shape[0]), impl)


def _empty_noised(x: Tensor, alpha_bar: Tensor, *_: Any) -> Tensor:
    return x.new_empty(alpha_bar.shape[0] * x.shape[0], *x.shape[1:])


_noised_batch = _dispatch.operator(
    "noised_batch(Tensor x, Tensor alpha_bar, Tensor seed, str impl) -> Tensor", _empty_noised
)


def _save_alpha_bar(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, alpha_bar, *_ = inputs
    ctx.save_for_backward(alpha_bar)
    ctx.batch = x.shape[0]


def _differentiate_noised_batch(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (alpha_bar,) = ctx.saved_tensors
    signal_scale, _ = reference.noise_scales(alpha_bar)
    by_level = grad.unflatten(0, (alpha_bar.shape[0], ctx.batch))
    return (by_level * signal_scale.view(-1, 1, 1, 1, 1)).sum(dim=0).to(grad.dtype), None, None, None


_dispatch.differentiate("noised_batch", _differentiate_noised_batch, _save_alpha_bar)


def gradient_saliency(
    grad: Tensor,
    *,
    reduce: Reduce = "max_abs",
    percentile: float = 0.99,
    sigma: float = 1.0,
    level_norm: bool = True,
    impl: str = "auto",
) -> Tensor:
    """Gradients of a classifier at several noise levels -> one saliency map an image.

    Channels are reduced, levels averaged, the map is smoothed by a Gaussian (cut at 4 sigma, mirrored at the border),
    then divided by its own percentile and clamped to 1. The percentile is the smallest value that at least this share
    of the pixels does not exceed; where that is 0, the maximum takes its place. A map never depends on the batch.

    Args:
        grad: [T, B, C, H, W], floating, T, C, H and W at least 1: gradient with respect to image b at level t.
            Constant in autograd.
        reduce: over channels: "max_abs" largest magnitude, "sum_abs" sum of magnitudes, "l2" Euclidean norm.
        percentile: in (0, 1].
        sigma: standard deviation of the Gaussian in pixels; 0 for none.
        level_norm: divide each level's map by its mean over the image before averaging, so that no level dominates.
        impl: a backend's name, or "auto" for the fastest that serves the input.

    Returns:
        float32 [B, H, W] in [0, 1]. All zero where the gradient is. NaN over the whole image, and only that image,
        where its gradient holds NaN or infinity: to raise would need a host synchronisation.

    Raises:
        DataError: grad's shape or dtype does not fit.
        ConfigError: reduce, percentile or sigma is out of range.
        BackendError: the backend that was asked for can't serve.
    """
    check_tensor("grad", grad, "floating", ("T", "B", "C", "H", "W"))
    levels, _, channels, height, width = grad.shape
    if min(levels, channels, height, width) < 1:
        raise DataError(f"grad: expected at least one level, channel, row and column, got {describe(grad)}")
    check_choice("reduce", reduce, ("max_abs", "sum_abs", "l2"))
    check_number("percentile", percentile, "a number in (0, 1]", lambda value: 0 < value <= 1)
    check_number("sigma", sigma, "a finite number of pixels, 0 or more", lambda value: 0 <= value < math.inf)
    return _gradient_saliency(constant(grad), reduce, percentile, sigma, level_norm, impl)


def _empty_maps(grad: Tensor, *_: Any) -> Tensor:
    _levels, batch, _channels, height, width = grad.shape
    return grad.new_empty(batch, height, width, dtype=torch.float32)


_gradient_saliency = _dispatch.operator(
    "gradient_saliency(Tensor grad, str reduce, float percentile, float sigma, bool level_norm, str impl) -> Tensor",
    _empty_maps,
)


def fuse_evidence(
    gradient_map: Tensor,
    cam: Tensor,
    image_label: Tensor,
    *,
    thresholds: tuple[float, float, float, float],
    impl: str = "auto",
) -> Tensor:
    """Pixel labels where gradient maps and class activation maps agree, gated by the image label.

    A pixel is class k + 1 where label k is present and both maps of k reach their foreground thresholds; of several
    such classes the one with the largest gradient_map * cam wins, the lower class in a tie. Else it is background, 0,
    where for every present class both maps stay at or below their background thresholds: everywhere in an image with no
    label. Else it is ignored, -1. NaN is on neither side of a threshold, and so is ignored where its label is present.

    Args:
        gradient_map: [B, K, H, W], floating, usually in [0, 1], 1 <= K <= 126: one map for every label.
        cam: [B, K, H, W], the dtype and device of `gradient_map`.
        image_label: bool [B, K], which labels are present.
        thresholds: (foreground_gradient, foreground_cam, background_gradient, background_cam), finite; compared in
            float32 (float64 for float64 maps).
        impl: a backend's name, or "auto" for the fastest that serves the input.

    Returns:
        int8 [B, H, W] in {-1, 0, 1..K}.

    Raises:
        DataError: a tensor's shape, dtype or device does not fit.
        ConfigError: thresholds are not four finite numbers.
        BackendError: the backend that was asked for can't serve.
    """
    check_tensor("gradient_map", gradient_map, "floating", ("B", "K", "H", "W"))
    batch, classes, height, width = gradient_map.shape
    if not 1 <= classes <= _MOST_CLASSES:
        raise DataError(f"gradient_map: expected 1 to {_MOST_CLASSES} classes, got {describe(gradient_map)}")
    check_tensor("cam", cam, gradient_map.dtype, (batch, classes, height, width), gradient_map)
    check_tensor("image_label", image_label, torch.bool, (batch, classes), gradient_map)
    if len(thresholds) != 4 or not all(-math.inf < threshold < math.inf for threshold in thresholds):
        raise ConfigError(
            "thresholds: expected four finite numbers (foreground_gradient, foreground_cam, background_gradient, "
            f"background_cam), got {thresholds}"
        )
    return _fuse_evidence(constant(gradient_map), constant(cam), image_label, list(thresholds), impl)


def _empty_labels(gradient_map: Tensor, *_: Any) -> Tensor:
    batch, _classes, height, width = gradient_map.shape
    return gradient_map.new_empty(batch, height, width, dtype=torch.int8)


_fuse_evidence = _dispatch.operator(
    "fuse_evidence(Tensor gradient_map, Tensor cam, Tensor image_label, float[] thresholds, str impl) -> Tensor",
    _empty_labels,
)


def _register(
    backend: str,
    functions: Any,
    serves: Callable[..., str | None] = lambda *_: None,
    available: Callable[[], str | None] = lambda: None,
) -> None:
    """The four operations on one backend, from a module that has a function of each one's name."""
    for op in ("pixel_seed", "noised_batch", "gradient_saliency", "fuse_evidence"):
        _dispatch.register(op, backend, getattr(functions, op), serves=serves, available=available)


_register("reference", reference)
for _device, _available in (("cpu", _native.no_operators), ("cuda", _native.no_cuda_operators)):
    _register(_device, _saliency_native, partial(_native.objection_of_single_precision, _device), _available)
