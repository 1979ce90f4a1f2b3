"""Group norm, affine map and SiLU in one pass over memory: what stands between a diffusion model's convolutions."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cldf_fast.errors import ConfigError
from cldf_fast.ops import _dispatch, _native, _norm_native, reference
from cldf_fast.ops._arguments import check_count, check_number, check_tensor


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = False,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """`torch.nn.functional.group_norm`, then the embedding's scale and shift, then SiLU (Dhariwal & Nichol 2021).

    z = (group_norm(x) * weight + bias) * (1 + scale) + shift; the result is z, or z * sigmoid(z). Differentiable once.

    Args:
        x: [B, C, H, W], floating, H * W at least 1, contiguous or channels-last; the result has its layout.
        num_groups: divides C.
        weight, bias: [C], in the dtype of x.
        scale, shift: [B, C], in the dtype of x; None: 0.
        silu: whether SiLU follows.
        eps: added to the variance, which is that of the population.
        impl: a backend's name, or "auto" for the fastest that serves the input.

    Returns:
        [B, C, H, W] in the dtype and layout of x. NaN over a whole group that holds NaN or infinity.

    Raises:
        DataError: a tensor's shape, dtype or device does not fit.
        ConfigError: num_groups does not divide C, or eps is negative or not finite.
        BackendError: the backend that was asked for can't serve.
    """
    check_tensor("x", x, "floating", ("B", "C", "H", "W"))
    batch, channels = x.shape[:2]
    check_count(num_groups=num_groups)
    if channels % num_groups:
        raise ConfigError(f"num_groups: expected a divisor of {channels} channels, got {num_groups}")
    check_number("eps", eps, "a finite number, 0 or more", lambda value: 0 <= value < math.inf)
    for name, each in (("weight", weight), ("bias", bias)):
        check_tensor(name, each, x.dtype, (channels,), x)
    for name, given in (("scale", scale), ("shift", shift)):
        if given is not None:
            check_tensor(name, given, x.dtype, (batch, channels), x)
    out, _, _ = _group_norm(x, weight, bias, scale, shift, num_groups, eps, silu, impl)
    return out


def _empty_results(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    groups = rest[4]
    return torch.empty_like(x), x.new_empty(x.shape[0], groups), x.new_empty(x.shape[0], groups)


def _empty_gradients(_grad: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])


_group_norm = _dispatch.operator(
    "group_norm(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, int groups, float eps, bool silu, "
    "str impl) -> (Tensor, Tensor, Tensor)",
    _empty_results,
)
_group_norm_backward = _dispatch.operator(
    "group_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, Tensor mean, "
    "Tensor rstd, bool silu, str impl) -> (Tensor, Tensor, Tensor)",
    _empty_gradients,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _groups, _eps, ctx.silu, ctx.impl = inputs
    _, mean, rstd = output
    ctx.save_for_backward(*tensors, mean, rstd)


def _differentiate(ctx: Any, grad: Tensor, _mean: Tensor, _rstd: Tensor) -> tuple[Tensor | None, ...]:
    _, weight, bias, scale, *_ = ctx.saved_tensors
    grad_x, by_slope, by_offset = _group_norm_backward(grad, *ctx.saved_tensors, ctx.silu, ctx.impl)
    of_weight, of_bias, of_scale, of_shift = ctx.needs_input_grad[1:5]
    # slope = weight * (1 + scale), offset = bias * (1 + scale) + shift
    grads = (
        (by_slope if scale is None else by_slope * (1 + scale)).sum(dim=0) if of_weight else None,
        (by_offset if scale is None else by_offset * (1 + scale)).sum(dim=0) if of_bias else None,
        by_slope * weight + by_offset * bias if of_scale else None,
        by_offset if of_shift else None,
    )
    return grad_x, *grads, None, None, None, None


_dispatch.differentiate("group_norm", _differentiate, _save)

for _op in ("group_norm", "group_norm_backward"):
    _dispatch.register(_op, "reference", getattr(reference, _op))
    _dispatch.register(
        _op,
        "cpu",
        getattr(_norm_native, _op),
        serves=partial(_native.objection_of_float32, "cpu"),
        available=_native.no_operators,
    )
