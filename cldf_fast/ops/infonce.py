"""Pixel InfoNCE: contrastive loss between labelled embeddings, several positives an anchor."""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any, Literal

import torch
from torch import Tensor

from cldf_fast.errors import ConfigError
from cldf_fast.ops import _dispatch, _infonce_cpu, _native, reference
from cldf_fast.ops._arguments import check_choice, check_tensor

Variant = Literal["per_positive", "supcon"]


def pixel_infonce(
    anchors: Tensor,
    candidates: Tensor,
    anchor_labels: Tensor,
    candidate_labels: Tensor,
    *,
    temperature: float = 0.1,
    variant: Variant = "per_positive",
    self_index: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Contrastive loss of every anchor against labelled candidates, not reduced.

    With logits s_ij = anchors_i . candidates_j / temperature, the positives of an anchor are the candidates of its own
    label, the negatives are those of another label:

    - "per_positive": mean over positives p of softplus(logsumexp over negatives of s_in - s_ip)
    - "supcon": logsumexp over positives and negatives of s_ij - mean over positives of s_ip

    Args:
        anchors: [M, D], floating; usually of unit length, which is not required. Differentiable.
        candidates: [N, D], the dtype and device of `anchors`. Differentiable; a memory bank that does not require
            grad costs no backward pass.
        anchor_labels: [M], any integer dtype. A label below 0 is ignored, and that row's features are never read.
        candidate_labels: [N], as `anchor_labels`.
        temperature: finite, above 0.
        variant: which of the two losses.
        self_index: [M], integer: the candidate that is the anchor itself, which is left out for that anchor; -1 where
            there is none.
        impl: a backend's name, or "auto" for the fastest that serves the input.

    Returns:
        loss [M], float32 (float64 for float64 input), not negative. An anchor that is ignored, or has no positive or no
        negative, has loss 0 and zero gradient and should not be counted in a mean: see `pixel_infonce_with_valid`.
        The loss always stays connected to the graph.

    Raises:
        DataError: a tensor's shape, dtype or device does not fit.
        ConfigError: temperature or variant is out of range.
        BackendError: the backend that was asked for can't serve.
    """
    return pixel_infonce_with_valid(
        anchors,
        candidates,
        anchor_labels,
        candidate_labels,
        temperature=temperature,
        variant=variant,
        self_index=self_index,
        impl=impl,
    )[0]


def pixel_infonce_with_valid(
    anchors: Tensor,
    candidates: Tensor,
    anchor_labels: Tensor,
    candidate_labels: Tensor,
    *,
    temperature: float = 0.1,
    variant: Variant = "per_positive",
    self_index: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`pixel_infonce`, and which anchors count in its mean.

    Returns (loss [M], valid [M] bool), so that `loss.sum() / valid.sum().clamp_min(1)` is the mean with no host
    synchronisation.
    """
    check_tensor("anchors", anchors, "floating", ("M", "D"))
    check_tensor("candidates", candidates, anchors.dtype, ("N", anchors.shape[1]), anchors)
    check_tensor("anchor_labels", anchor_labels, "integer", (anchors.shape[0],), anchors)
    check_tensor("candidate_labels", candidate_labels, "integer", (candidates.shape[0],), anchors)
    if self_index is not None:
        check_tensor("self_index", self_index, "integer", (anchors.shape[0],), anchors)
        self_index = self_index.to(torch.int64)
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature: expected a finite number above 0, got {temperature}")
    check_choice("variant", variant, ("per_positive", "supcon"))
    loss, _, _, num_positives = _pixel_infonce(
        anchors,
        candidates,
        anchor_labels.to(torch.int64),
        candidate_labels.to(torch.int64),
        self_index,
        temperature,
        variant,
        impl,
    )
    return loss, num_positives > 0


# The operator returns, beside the loss, the state that the backward pass needs: reference.py defines it.
@torch.library.custom_op("cldf_fast::pixel_infonce", mutates_args=())
def _pixel_infonce(
    anchors: Tensor,
    candidates: Tensor,
    anchor_labels: Tensor,
    candidate_labels: Tensor,
    self_index: Tensor | None,
    temperature: float,
    variant: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (anchors, candidates, anchor_labels, candidate_labels, self_index, temperature, variant)
    return _dispatch.run("pixel_infonce", impl, *inputs)


@_pixel_infonce.register_fake
def _(anchors: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = anchors.shape[0]
    dtype = torch.promote_types(anchors.dtype, torch.float32)
    loss, lse, weight = (anchors.new_empty(rows, dtype=dtype) for _ in range(3))
    return loss, lse, weight, anchors.new_empty(rows, dtype=torch.int64)


@torch.library.custom_op("cldf_fast::pixel_infonce_backward", mutates_args=())
def _pixel_infonce_backward(
    grad_loss: Tensor,
    lse: Tensor,
    weight: Tensor,
    num_positives: Tensor,
    anchors: Tensor,
    candidates: Tensor,
    anchor_labels: Tensor,
    candidate_labels: Tensor,
    self_index: Tensor | None,
    temperature: float,
    variant: str,
    need_anchors: bool,
    need_candidates: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    state = (grad_loss, lse, weight, num_positives)
    inputs = (anchors, candidates, anchor_labels, candidate_labels, self_index, temperature, variant)
    return _dispatch.run("pixel_infonce_backward", impl, *state, *inputs, need_anchors, need_candidates)


@_pixel_infonce_backward.register_fake
def _(
    grad_loss: Tensor,
    lse: Tensor,
    weight: Tensor,
    num_positives: Tensor,
    anchors: Tensor,
    candidates: Tensor,
    anchor_labels: Tensor,
    candidate_labels: Tensor,
    self_index: Tensor | None,
    temperature: float,
    variant: str,
    need_anchors: bool,
    need_candidates: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return (
        anchors.new_empty(anchors.shape if need_anchors else 0),
        candidates.new_empty(candidates.shape if need_candidates else 0),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.temperature, ctx.variant, ctx.impl = inputs
    _, *state = output
    ctx.save_for_backward(*state, *tensors)
    ctx.mark_non_differentiable(*state)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    need_anchors, need_candidates, *rest = ctx.needs_input_grad
    grad_anchors = grad_candidates = None
    if grad_loss is not None:
        grad_anchors, grad_candidates = _pixel_infonce_backward(
            grad_loss,
            *ctx.saved_tensors,
            ctx.temperature,
            ctx.variant,
            need_anchors,
            need_candidates,
            ctx.impl,
        )
    return grad_anchors if need_anchors else None, grad_candidates if need_candidates else None, *(None for _ in rest)


_pixel_infonce.register_autograd(_differentiate, setup_context=_save_for_backward)


def _cpu_objection(anchors: Tensor) -> str | None:
    if anchors.device.type != "cpu":
        return f"needs tensors on cpu, got them on {anchors.device}"
    if anchors.dtype == torch.float64:
        return "needs float32, float16 or bfloat16, got float64"
    return None


def _triton_objection(anchors: Tensor) -> str | None:
    if anchors.device.type != "cuda" and not _interpreting():
        return f"needs tensors on cuda, got them on {anchors.device}"
    if anchors.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"needs float32, float16 or bfloat16, got {str(anchors.dtype).removeprefix('torch.')}"
    return None


def _no_triton() -> str | None:
    if not importlib.util.find_spec("triton"):
        return "not installed: triton, which CUDA builds of torch bring"
    if not torch.cuda.is_available() and not _interpreting():
        return "no CUDA device"
    return None


def _interpreting() -> bool:
    """Whether Triton runs its kernels as Python, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# Triton launches on the current device, which need not be the one that holds the tensors; a CPU tensor changes nothing.
def _triton_forward(anchors: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from cldf_fast.kernels import infonce

    with torch.cuda.device_of(anchors):
        return infonce.pixel_infonce(anchors, *arguments)


def _triton_backward(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    from cldf_fast.kernels import infonce

    with torch.cuda.device_of(grad_loss):
        return infonce.pixel_infonce_backward(grad_loss, *arguments)


_dispatch.register("pixel_infonce", "reference", reference.pixel_infonce)
_dispatch.register(
    "pixel_infonce",
    "triton",
    _triton_forward,
    serves=lambda anchors, *_: _triton_objection(anchors),
    available=_no_triton,
)
_dispatch.register(
    "pixel_infonce_backward",
    "triton",
    _triton_backward,
    serves=lambda _loss, _lse, _weight, _count, anchors, *_: _triton_objection(anchors),
    available=_no_triton,
)
_dispatch.register("pixel_infonce_backward", "reference", reference.pixel_infonce_backward)
_dispatch.register(
    "pixel_infonce",
    "cpu",
    _infonce_cpu.pixel_infonce,
    serves=lambda anchors, *_: _cpu_objection(anchors),
    available=_native.no_operators,
)
_dispatch.register(
    "pixel_infonce_backward",
    "cpu",
    _infonce_cpu.pixel_infonce_backward,
    serves=lambda _loss, _lse, _weight, _count, anchors, *_: _cpu_objection(anchors),
    available=_native.no_operators,
)
