"""What tests of differentiable operations share."""

from __future__ import annotations

import torch
from torch import Tensor


def with_gradients(result: Tensor, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """A result, and the gradients of the inputs for a gradient of the result."""
    return [result.detach(), *torch.autograd.grad(result, inputs, grad.to(result.dtype))]
