"""Whether Triton's kernels can run here, and on which tensors."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor


def interpreting() -> bool:
    """Whether Triton runs its kernels as Python, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def no_triton() -> str | None:
    """Why no kernel can run on this machine; None where one can."""
    if reason := _not_installed():
        return reason
    if not torch.cuda.is_available() and not interpreting():
        return "no CUDA device"
    return None


@cache
def _not_installed() -> str | None:
    if not importlib.util.find_spec("triton"):
        return "not installed: triton, which CUDA builds of torch bring"
    if not importlib.util.find_spec("cldf_fast.kernels"):
        return (
            "not installed: cldf_fast.kernels, which lies elsewhere in a checkout; install that with pip install -e ."
        )
    return None


def objection(tensor: Tensor) -> str | None:
    """Why kernels can't read a tensor, for where it is; None where they can."""
    if tensor.device.type != "cuda" and not interpreting():
        return f"needs tensors on cuda, got them on {tensor.device}"
    return None
