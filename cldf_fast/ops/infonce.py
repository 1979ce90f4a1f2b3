"""Pixel InfoNCE: contrastive loss between labelled embeddings, several positives an anchor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from cldf_fast.errors import DataError
from cldf_fast.ops import _dispatch, _infonce_cpu, _native, _triton, reference
from cldf_fast.ops._arguments import check_choice, check_positive, check_tensor

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
    anchor_weight: Tensor | None = None,
    bank: Tensor | None = None,
    bank_labels: Tensor | None = None,
    reduction: Literal["none", "mean", "sum"] = "none",
    impl: str = "auto",
) -> Tensor:
    """Contrastive loss of every anchor against labelled candidates.

    With logits s_ij = anchors_i . candidates_j / temperature, the positives of an anchor are the candidates of its own
    label, the negatives are those of another label:

    - "per_positive": mean over positives p of softplus(logsumexp over negatives of s_in - s_ip)
    - "supcon": logsumexp over positives and negatives of s_ij - mean over positives of s_ip

    Args:
        anchors: [M, D], floating; usually of unit length, which is not required. Differentiable.
        candidates: [N, D], the dtype and device of `anchors`. Differentiable.
        anchor_labels: [M], any integer dtype. A label below 0 is ignored, and that row's features are never read.
        candidate_labels: [N], as `anchor_labels`.
        temperature: finite, above 0.
        variant: which of the two losses.
        self_index: [M], integer: the candidate that is the anchor itself, which is left out for that anchor; -1 where
            there is none. Features contrasted with themselves need arange(M): without it each is its own positive.
        anchor_weight: [M], floating: a factor of each anchor's loss, such as the weight of its class; without
            gradient. None: 1.
        bank: [B, D], the dtype and device of `anchors`: further candidates, such as a memory of earlier batches, that
            get no gradient and cost no backward pass. bank_labels: [B], as `anchor_labels`.
        reduction: "none" for every anchor's loss, "sum" for their sum, "mean" for the mean, weighted by
            `anchor_weight`, over the anchors that count. Both of these compute the gradients along with the loss, from
            one set of logits, and so are faster than reducing the losses afterwards.
        impl: a backend's name, or "auto" for the fastest that serves the input.

    Returns:
        loss, float32 (float64 for float64 input), not negative: [M], or [] when reduced. An anchor that is ignored, or
        has no positive or no negative, has loss 0 and zero gradient and is not counted in a mean; a mean over none is
        0. The loss always stays connected to the graph.

    Raises:
        DataError: a tensor's shape, dtype or device does not fit.
        ConfigError: temperature, variant or reduction is out of range.
        BackendError: the backend that was asked for can't serve.
    """
    check_choice("reduction", reduction, ("none", "mean", "sum"))
    inputs = (anchors, candidates, anchor_labels, candidate_labels)
    if reduction == "none":
        loss, _ = pixel_infonce_with_valid(
            *inputs,
            temperature=temperature,
            variant=variant,
            self_index=self_index,
            bank=bank,
            bank_labels=bank_labels,
            impl=impl,
        )
        if anchor_weight is None:
            return loss
        check_tensor("anchor_weight", anchor_weight, "floating", (anchors.shape[0],), anchors)
        return loss * anchor_weight.detach().to(loss.dtype)
    total, weight = pixel_infonce_sum(
        *inputs,
        temperature=temperature,
        variant=variant,
        self_index=self_index,
        anchor_weight=anchor_weight,
        bank=bank,
        bank_labels=bank_labels,
        impl=impl,
    )
    return total if reduction == "sum" else total / torch.where(weight > 0, weight, 1)


def pixel_infonce_with_valid(
    anchors: Tensor,
    candidates: Tensor,
    anchor_labels: Tensor,
    candidate_labels: Tensor,
    *,
    temperature: float = 0.1,
    variant: Variant = "per_positive",
    self_index: Tensor | None = None,
    bank: Tensor | None = None,
    bank_labels: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`pixel_infonce`, and which anchors count in its mean.

    Returns (loss [M], valid [M] bool), so that `loss.sum() / valid.sum().clamp_min(1)` is the mean with no host
    synchronisation.
    """
    features, labels = (anchors, candidates, bank), (anchor_labels, candidate_labels, bank_labels)
    arguments = _checked(*features, *labels, self_index, temperature, variant)
    loss, _, _, num_positives = _pixel_infonce(*arguments, temperature, variant, impl)
    return loss, num_positives > 0


def pixel_infonce_sum(
    anchors: Tensor,
    candidates: Tensor,
    anchor_labels: Tensor,
    candidate_labels: Tensor,
    *,
    temperature: float = 0.1,
    variant: Variant = "per_positive",
    self_index: Tensor | None = None,
    anchor_weight: Tensor | None = None,
    bank: Tensor | None = None,
    bank_labels: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The weighted sum of `pixel_infonce`, and the sum of the weights of the anchors that count, both [].

    What a mean over several processes is made of. The gradients are computed here already, from the same logits, and
    scaled in the backward pass.
    """
    features, labels = (anchors, candidates, bank), (anchor_labels, candidate_labels, bank_labels)
    arguments = _checked(*features, *labels, self_index, temperature, variant)
    if anchor_weight is not None:
        check_tensor("anchor_weight", anchor_weight, "floating", (anchors.shape[0],), anchors)
        anchor_weight = anchor_weight.detach()
    needed = [torch.is_grad_enabled() and x.requires_grad for x in (anchors, candidates)]
    shared = anchors is candidates and bank is None
    if shared:
        # Both roles' gradients come back as one, for the anchors.
        arguments, needed[1] = (arguments[0], arguments[1].detach(), *arguments[2:]), False
    options = (candidates.shape[0], temperature, variant, *needed, shared)
    total, weight, _, _ = _pixel_infonce_sum(*arguments, anchor_weight, *options, impl)
    return total, weight


def _checked(
    anchors: Tensor,
    candidates: Tensor,
    bank: Tensor | None,
    anchor_labels: Tensor,
    candidate_labels: Tensor,
    bank_labels: Tensor | None,
    self_index: Tensor | None,
    temperature: float,
    variant: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The tensors as the operators want them, the bank's rows after the candidates."""
    check_tensor("anchors", anchors, "floating", ("M", "D"))
    check_tensor("candidates", candidates, anchors.dtype, ("N", anchors.shape[1]), anchors)
    check_tensor("anchor_labels", anchor_labels, "integer", (anchors.shape[0],), anchors)
    check_tensor("candidate_labels", candidate_labels, "integer", (candidates.shape[0],), anchors)
    if self_index is not None:
        check_tensor("self_index", self_index, "integer", (anchors.shape[0],), anchors)
        self_index = self_index.to(torch.int64)
    check_positive(temperature=temperature)
    check_choice("variant", variant, ("per_positive", "supcon"))
    anchor_labels, candidate_labels = anchor_labels.to(torch.int64), candidate_labels.to(torch.int64)
    if bank is None and bank_labels is None:
        return anchors, candidates, anchor_labels, candidate_labels, self_index
    if bank is None or bank_labels is None:
        raise DataError("bank, bank_labels: expected both or neither, got one of them")
    check_tensor("bank", bank, anchors.dtype, ("B", anchors.shape[1]), anchors)
    check_tensor("bank_labels", bank_labels, "integer", (bank.shape[0],), anchors)
    candidates = torch.cat([candidates, bank.detach()])
    return anchors, candidates, anchor_labels, torch.cat([candidate_labels, bank_labels.to(torch.int64)]), self_index


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


# The gradients of the sum are outputs, in fp32 at least: their scale is not yet that of the loss. That of the
# candidates is 0 from row num_differentiable on. With `shared` anchors and candidates are the same features, and the
# gradient of the anchors is that of both roles.
@torch.library.custom_op("cldf_fast::pixel_infonce_sum", mutates_args=())
def _pixel_infonce_sum(
    anchors: Tensor,
    candidates: Tensor,
    anchor_labels: Tensor,
    candidate_labels: Tensor,
    self_index: Tensor | None,
    anchor_weight: Tensor | None,
    num_differentiable: int,
    temperature: float,
    variant: str,
    need_anchors: bool,
    need_candidates: bool,
    shared: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (anchors, candidates, anchor_labels, candidate_labels, self_index, anchor_weight)
    options = (num_differentiable, temperature, variant, need_anchors, need_candidates, shared)
    return _dispatch.run("pixel_infonce_sum", impl, *inputs, *options)


@_pixel_infonce_sum.register_fake
def _(
    anchors: Tensor,
    candidates: Tensor,
    anchor_labels: Tensor,
    candidate_labels: Tensor,
    self_index: Tensor | None,
    anchor_weight: Tensor | None,
    num_differentiable: int,
    temperature: float,
    variant: str,
    need_anchors: bool,
    need_candidates: bool,
    shared: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(anchors.dtype, torch.float32)
    return (
        anchors.new_empty((), dtype=dtype),
        anchors.new_empty((), dtype=dtype),
        anchors.new_empty(anchors.shape if need_anchors else 0, dtype=dtype),
        candidates.new_empty(candidates.shape if need_candidates else 0, dtype=dtype),
    )


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, *gradients = output
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(weight, *gradients)
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx: Any, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    scaled = (
        (grad_total * gradient).to(ctx.dtype) if grad_total is not None and needed else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
    )
    return *scaled, *(None for _ in ctx.needs_input_grad[2:])


_pixel_infonce_sum.register_autograd(_scale_gradients, setup_context=_save_gradients)


def _in_two_passes(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """`pixel_infonce_sum` of a backend that has the two passes only."""

    def run(
        anchors: Tensor,
        candidates: Tensor,
        anchor_labels: Tensor,
        candidate_labels: Tensor,
        self_index: Tensor | None,
        anchor_weight: Tensor | None,
        num_differentiable: int,
        temperature: float,
        variant: str,
        need_anchors: bool,
        need_candidates: bool,
        shared: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs = (anchors, candidates, anchor_labels, candidate_labels, self_index, temperature, variant)
        loss, lse, weight, num_positives = forward(*inputs)
        counted = (num_positives > 0).to(loss.dtype)
        if anchor_weight is not None:
            counted = counted * anchor_weight
        gradients = loss.new_empty(0), loss.new_empty(0)
        if need_anchors or need_candidates:
            state = (counted, lse, weight, num_positives)
            of_candidates = need_candidates or (shared and need_anchors)
            gradients = backward(*state, *inputs, need_anchors, of_candidates, dtype=loss.dtype)
            if need_candidates:
                gradients[1][num_differentiable:] = 0
            if shared and need_anchors:
                gradients = gradients[0] + gradients[1], loss.new_empty(0)
        return (loss * counted).sum(), counted.sum(), *gradients

    return run


def _triton_objection(anchors: Tensor) -> str | None:
    if anchors.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"needs float32, float16 or bfloat16, got {str(anchors.dtype).removeprefix('torch.')}"
    return _triton.objection(anchors)


# Triton launches on the current device, which need not be the one that holds the tensors; a CPU tensor changes nothing.
def _triton_forward(anchors: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from cldf_fast.kernels import infonce

    with torch.cuda.device_of(anchors):
        return infonce.pixel_infonce(anchors, *arguments)


def _triton_backward(grad_loss: Tensor, *arguments: Any, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    from cldf_fast.kernels import infonce

    with torch.cuda.device_of(grad_loss):
        return infonce.pixel_infonce_backward(grad_loss, *arguments, dtype=dtype)


def _register(
    backend: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    total: Callable[..., Any],
    objection: Callable[[Tensor], str | None] = lambda anchors: None,
    available: Callable[[], str | None] = lambda: None,
) -> None:
    """The three operations on one backend; of their input, what matters to `objection` is the anchors."""

    def of_first(anchors: Tensor, *_: Any) -> str | None:
        return objection(anchors)

    def of_fifth(grad: Tensor, lse: Tensor, weight: Tensor, count: Tensor, anchors: Tensor, *_: Any) -> str | None:
        return objection(anchors)

    _dispatch.register("pixel_infonce", backend, forward, serves=of_first, available=available)
    _dispatch.register("pixel_infonce_backward", backend, backward, serves=of_fifth, available=available)
    _dispatch.register("pixel_infonce_sum", backend, total, serves=of_first, available=available)


_register(
    "reference",
    reference.pixel_infonce,
    reference.pixel_infonce_backward,
    _in_two_passes(reference.pixel_infonce, reference.pixel_infonce_backward),
)
_register(
    "triton",
    _triton_forward,
    _triton_backward,
    _in_two_passes(_triton_forward, _triton_backward),
    _triton_objection,
    _triton.no_triton,
)
_register(
    "cpu",
    _infonce_cpu.pixel_infonce,
    _infonce_cpu.pixel_infonce_backward,
    _infonce_cpu.pixel_infonce_sum,
    partial(_native.objection_of_single_precision, "cpu"),
    _native.no_operators,
)
