"""Checks of what users hand to the operations. Shapes, dtypes and devices only: reading a value would synchronise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from cldf_fast.errors import ConfigError, DataError


def describe(tensor: Tensor) -> str:
    """Dtype, shape and device for an error message, such as "float32 [2, 3] on cpu"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def check_tensor(
    name: str,
    tensor: Tensor,
    dtype: Literal["floating", "integer"] | torch.dtype,
    shape: tuple[str | int, ...],
    like: Tensor | None = None,
) -> None:
    """Raise DataError unless the tensor has this dtype or kind of dtype, this shape, and the device of `like`.

    shape: one entry an axis: a name for any size, a number for that size.
    """
    if not isinstance(tensor, Tensor):
        raise DataError(f"{name}: expected a tensor, {_wanted(dtype, shape)}, got {type(tensor).__name__}")
    # Some operations take but a few dozen microseconds: this is written to take two.
    found = tensor.shape
    fits = len(found) == len(shape) and _is_of(tensor.dtype, dtype)
    if fits and found != shape:
        for size, expected in zip(found, shape, strict=True):
            if size != expected and not isinstance(expected, str):
                fits = False
    if not fits or (like is not None and tensor.device != like.device):
        place = "" if like is None else f" on {like.device}"
        raise DataError(f"{name}: expected {_wanted(dtype, shape)}{place}, got {describe(tensor)}")


def _is_of(dtype: torch.dtype, wanted: str | torch.dtype) -> bool:
    if wanted == "floating":
        return dtype.is_floating_point
    if wanted == "integer":
        return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    return dtype == wanted


def _wanted(dtype: str | torch.dtype, shape: tuple[str | int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} [{', '.join(map(str, shape))}]"


def constant(tensor: Tensor) -> Tensor:
    """The tensor without gradient: itself where it has none, which is faster than `detach`."""
    return tensor.detach() if tensor.requires_grad else tensor


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless the value is one of the choices."""
    if value not in choices:
        raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_count(**values: int) -> None:
    """Raise ConfigError, naming the argument, unless each is an integer, 1 or more."""
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}: expected an integer, 1 or more, got {value!r}")


def check_number(name: str, value: float, expected: str, fits: Callable[[float], bool]) -> None:
    """Raise ConfigError unless the value is a number that fits, which is then said to be expected."""
    if not isinstance(value, (int, float)) or not fits(value):
        raise ConfigError(f"{name}: expected {expected}, got {value!r}")


def check_positive(**values: float) -> None:
    """Raise ConfigError, naming the argument, unless each is a finite number above 0."""
    for name, value in values.items():
        check_number(name, value, "a finite number above 0", lambda value: 0 < value < math.inf)


def seed_per_image(seed: int | Tensor, like: Tensor, batch: int) -> Tensor:
    """A seed as int64 [batch] on the device of `like`; an int or a single element is the same for every image."""
    if isinstance(seed, Tensor):
        check_tensor("seed", seed, torch.int64, () if seed.ndim == 0 else (batch,), like)
        return seed.expand(batch)
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ConfigError(f"seed: expected an integer of 64 bits with sign, or a tensor of them, got {seed!r}")
    return torch.full((batch,), seed, dtype=torch.int64, device=like.device)
