"""Finds the compiled extension `cldf_fast._C`, or says in one sentence why there is none."""

from __future__ import annotations

import importlib
import re
from functools import cache
from types import ModuleType
from typing import Any

# The extension needs torch's libraries, which this loads.
import torch

EXTENSION = "cldf_fast._C"


def load(name: str) -> tuple[ModuleType | None, str | None]:
    """Import an extension module: (module, None), or (None, one sentence that says why not). Never raises."""
    try:
        return importlib.import_module(name), None
    except ModuleNotFoundError as error:
        if error.name == name:
            return None, f"not built: the extension {name} is absent; install again where a C++ compiler is found"
        return None, f"not loaded: {name} needs the module {error.name}"
    # A binary built for another torch or another machine fails with whatever its initialiser throws, not only with
    # ImportError, and must still leave the package usable through the other backends.
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        # The binary serves the torch that it was built for and later ones: torch's stable interface only grows.
        if symbol := re.search(r"undefined symbol: (\w*torch\w*)", first_line):
            wants = f"was built for a later torch than {torch.__version__}, which has no {symbol[1]}"
            return None, f"not loaded: {name} {wants}; build it again on this machine, or install a later torch"
        return None, f"not loaded: {name} raised {type(error).__name__}: {first_line}; build it again on this machine"


module, reason = load(EXTENSION)
"""The extension and None, or None and the reason for its absence."""


def no_operators() -> str | None:
    """Why the extension's operators can't be called; None where they can."""
    if reason is not None:
        return reason
    if not hasattr(torch.ops.cldf_fast, "infonce_sweep"):
        return "not built: torch was not installed where the extension was; install again with --no-build-isolation"
    return None


def no_cuda_operators() -> str | None:
    """Why the extension's operators can't be called for tensors on CUDA; None where they can."""
    return no_operators() or _cuda_obstacle()


@cache
def _cuda_obstacle() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    assert module is not None
    return module.cuda_obstacle() or None


def objection(device: str, tensor: torch.Tensor) -> str | None:
    """Why the operators on a device can't read a tensor, for where it is; None where they can."""
    return None if tensor.device.type == device else f"needs tensors on {device}, got them on {tensor.device}"


def objection_of_single_precision(device: str, tensor: torch.Tensor, *_: Any) -> str | None:
    """The same for operators that work on float32 and less."""
    double = "needs float32, float16 or bfloat16, got float64" if tensor.dtype == torch.float64 else None
    return objection(device, tensor) or double


def objection_of_float32(device: str, tensor: torch.Tensor, *_: Any) -> str | None:
    """The same for operators that work on float32 alone."""
    other = None if tensor.dtype == torch.float32 else f"needs float32, got {tensor.dtype}".replace("torch.", "")
    return objection(device, tensor) or other


def build_record() -> dict[str, Any]:
    """How the extension was built (compiler, stable ABI of torch, CUDA); empty where there is no extension."""
    return {} if module is None else dict(module.build_record())
