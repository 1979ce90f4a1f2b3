"""Class-balanced anchor sampling: a fixed number of pixels of every class of every image, drawn without replacement."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cldf_fast.errors import DataError
from cldf_fast.ops import _dispatch, _native, _triton, reference
from cldf_fast.ops._arguments import check_count, check_tensor, seed_per_image


def sample_anchors(
    labels: Tensor,
    weight: Tensor | None = None,
    *,
    num_classes: int,
    per_class: int,
    seed: int | Tensor,
    image_index: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Draw up to `per_class` pixels of every class from every image, without replacement, by an exponential race.

    A pixel's arrival time depends on (seed, image_index, pixel) alone, never on the batch, the backend or the device.
    The earliest `per_class` of a class are its anchors, in the order of arrival, so the first s of them are the draw
    for per_class=s. Without weights the times are 32-bit integers compared exactly (ties: the lower pixel), and every
    backend returns the same bits. With weights the times are exponential variates divided by the weight; they are drawn
    in float64 and rounded once to float32, so that backends agree but for about one rounding in 2^28.

    Args:
        labels: [B, H, W], any integer dtype, H * W below 2^31. Class k where the label is k, 0 <= k < num_classes (0 is
            background); any other label, such as -1 for ignore, is never drawn.
        weight: [B, H, W], floating, or None for uniform. The chance of being drawn next is proportional to it. A pixel
            whose weight is 0, negative or NaN is never drawn.
        num_classes: K, background included; at least 1.
        per_class: S, anchors for every image and class; at least 1.
        seed: an integer, or int64 of shape [] or [B] on the device of `labels`, so that a CUDA graph can advance it.
        image_index: int64 [B], the number that distinguishes an image from others of the same seed; arange(B) where
            None. Hand in the global index, or zeros with a seed for every image, and a draw no longer depends on how
            images were split into batches.
        impl: a backend's name, or "auto" for the fastest that serves the input.

    Returns:
        indices: int64 [B, K, S], flat pixels row * W + column; -1 after the last.
        counts: int64 [B, K], how many of the S were drawn: the smaller of S and the number of drawable pixels.

    Raises:
        DataError: a tensor's shape, dtype or device does not fit.
        ConfigError: num_classes, per_class or seed is out of range.
        BackendError: the backend that was asked for can't serve.
    """
    check_tensor("labels", labels, "integer", ("B", "H", "W"))
    batch, height, width = labels.shape
    if height * width >= 2**31:
        raise DataError(f"labels: expected fewer than 2^31 pixels an image, got {height} x {width}; sample from tiles")
    if weight is not None:
        check_tensor("weight", weight, "floating", (batch, height, width), labels)
        weight = weight.detach()
    check_count(num_classes=num_classes, per_class=per_class)
    if image_index is None:
        image_index = torch.arange(batch, device=labels.device)
    check_tensor("image_index", image_index, torch.int64, (batch,), labels)
    seed = seed_per_image(seed, labels, batch)
    return _sample_anchors(labels, weight, seed, image_index, num_classes, per_class, impl)


def _fake(
    labels: Tensor,
    weight: Tensor | None,
    seed: Tensor,
    image_index: Tensor,
    num_classes: int,
    per_class: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    batch = labels.shape[0]
    return seed.new_empty(batch, num_classes, per_class), seed.new_empty(batch, num_classes)


_sample_anchors = _dispatch.operator(
    "sample_anchors(Tensor labels, Tensor? weight, Tensor seed, Tensor image_index, int num_classes, int per_class, "
    "str impl) -> (Tensor, Tensor)",
    _fake,
)


def _on_cpu(
    labels: Tensor, weight: Tensor | None, seed: Tensor, image_index: Tensor, num_classes: int, per_class: int
) -> tuple[Tensor, Tensor]:
    if labels.dtype not in _CPU_DTYPES:
        labels = labels.to(torch.int64)
    indices = seed.new_empty(labels.shape[0], num_classes, per_class)
    counts = seed.new_empty(labels.shape[0], num_classes)
    torch.ops.cldf_fast.anchor_race(
        labels.flatten(1).contiguous(),
        None if weight is None else weight.flatten(1).float().contiguous(),
        seed.contiguous(),
        image_index.contiguous(),
        indices,
        counts,
    )
    return indices, counts


_CPU_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def _on_triton(labels: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    from cldf_fast.kernels import anchors

    # Triton launches on the current device, which need not be the one that holds the tensors.
    with torch.cuda.device_of(labels):
        return anchors.sample_anchors(labels, *arguments)


def _triton_objection(
    labels: Tensor, weight: Tensor | None, seed: Tensor, image_index: Tensor, num_classes: int, per_class: int
) -> str | None:
    limits = {
        "images": (labels.shape[0], 65_535),  # an axis of the grid
        "num_classes": (num_classes, 31),
        "per_class": (per_class, 2048),
        "pixels": (labels[:1].numel(), 2**30),
    }
    for name, (value, most) in limits.items():
        if value > most:
            return f"needs {name} up to {most}, got {value}"
    return _triton.objection(labels)


_dispatch.register("sample_anchors", "reference", reference.sample_anchors)
_dispatch.register("sample_anchors", "triton", _on_triton, serves=_triton_objection, available=_triton.no_triton)
_dispatch.register(
    "sample_anchors",
    "cpu",
    _on_cpu,
    serves=lambda labels, *_: _native.objection("cpu", labels),
    available=_native.no_operators,
)
