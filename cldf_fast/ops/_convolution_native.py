"""3 x 3 convolutions in compiled code: memory for what csrc/cpu/convolution.cpp gives. Contracts: `ops.reference`."""

from __future__ import annotations

import torch
from torch import Tensor


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """As `reference.conv3x3`."""
    x, out = _side_by_side(x), _empty(x, weight.shape[0])
    residual = None if residual is None else _side_by_side(residual)
    bias = None if bias is None else bias.contiguous()
    torch.ops.cldf_fast.conv3x3_out(x, weight.contiguous(), bias, residual, False, out)
    return out.permute(0, 3, 1, 2)


def conv3x3_backward(grad: Tensor, weight: Tensor) -> Tensor:
    """As `reference.conv3x3_backward`."""
    out = _empty(grad, weight.shape[1])
    torch.ops.cldf_fast.conv3x3_out(_side_by_side(grad), weight.contiguous(), None, None, True, out)
    return out.permute(0, 3, 1, 2)


def _side_by_side(x: Tensor) -> Tensor:
    """[B, C, H, W] as contiguous [B, H, W, C]."""
    return x.permute(0, 2, 3, 1).contiguous()


def _empty(x: Tensor, channels: int) -> Tensor:
    return x.new_empty(x.shape[0], *x.shape[2:], channels)
