"""Group norm in compiled code: memory for the results of csrc/cpu/norm.cpp. Contracts: `ops.reference`."""

from __future__ import annotations

import torch
from torch import Tensor


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.group_norm`."""
    x = x.contiguous(memory_format=_layout(x))
    out, mean, rstd = torch.empty_like(x), x.new_empty(x.shape[0], groups), x.new_empty(x.shape[0], groups)
    affine = _contiguous(weight, bias, scale, shift)
    torch.ops.cldf_fast.group_norm_out(x, *affine, groups, eps, silu, out, mean, rstd)
    return out, mean, rstd


def group_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.group_norm_backward`."""
    layout = _layout(x)
    grad, x = grad.contiguous(memory_format=layout), x.contiguous(memory_format=layout)
    grad_x, grad_slope, grad_offset = torch.empty_like(x), x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])
    affine = _contiguous(weight, bias, scale, shift)
    torch.ops.cldf_fast.group_norm_backward_out(grad, x, *affine, mean, rstd, silu, grad_x, grad_slope, grad_offset)
    return grad_x, grad_slope, grad_offset


def _layout(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)
