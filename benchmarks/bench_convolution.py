"""conv3x3 against PyTorch's convolutions, at the layers of a UNet and of a classifier.

    python -m benchmarks convolution

"forward" is a frozen layer's result; "gradient" is that and the gradient of its input, as saliency needs it. Weights
are in the layout that suits a rival before it is timed, and so are images.

    conv2d         torch.nn.functional.conv2d, a plane for each channel
    channels_last  the same, channels side by side
    compile        that by torch.compile
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.suite import SEED, Benchmark, Problem, Work
from cldf_fast.ops import conv3x3

PROBLEMS: tuple[Problem, ...] = tuple(
    {"part": part, "batch": batch, "channels": channels, "size": size}
    for part, shapes in (
        ("forward", ((3, 64, 128), (3, 128, 64), (3, 256, 32), (3, 512, 16))),
        ("gradient", ((40, 32, 64), (40, 64, 32), (40, 128, 16))),
    )
    for batch, channels, size in shapes
)
# Relative to the norm of the float64 result.
EXACT = 5e-6

Convolve = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [B, C, H, W], weight [C, C, 3, 3], bias [C]) -> [B, C, H, W]"""


def conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


@cache
def compiled() -> Convolve:
    """By torch.compile."""
    return torch.compile(conv2d, dynamic=False)


def drawn(batch: int, channels: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, and a gradient of the result."""
    torch.manual_seed(SEED)
    x, grad = torch.randn(2, batch, channels, size, size)
    return x, torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5, torch.randn(channels), grad


def call(convolve: Convolve, part: str, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The result and, of "gradient", the gradient of x."""
    if part == "forward":
        with torch.no_grad():
            return (convolve(x, weight, bias),)
    x = x.detach().requires_grad_()
    result = convolve(x, weight, bias)
    return result.detach(), *torch.autograd.grad(result, x, grad)


def case(rival: str, part: str, batch: int, channels: int, size: int) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed."""
    layout = torch.contiguous_format if rival == "conv2d" else torch.channels_last
    x, weight, bias, grad = drawn(batch, channels, size)
    x, grad = (each.contiguous(memory_format=layout) for each in (x, grad))
    match rival:
        case "cpu":
            return partial(call, partial(conv3x3, impl="cpu"), part, x, weight, bias, grad)
        case "conv2d" | "channels_last":
            return partial(call, conv2d, part, x, weight.contiguous(memory_format=layout), bias, grad)
        case "compile":
            return partial(call, compiled(), part, x, weight.contiguous(memory_format=layout), bias, grad)
    raise ValueError(f"rival: expected cpu, conv2d, channels_last or compile, got {rival!r}")


@cache
def expected(part: str, batch: int, channels: int, size: int) -> tuple[Tensor, ...]:
    """In float64."""
    x, weight, bias, grad = (each.double() for each in drawn(batch, channels, size))
    return call(conv2d, part, x, weight, bias, grad)


def check(_rival: str, problem: Problem, result: tuple[Tensor, ...]) -> None:
    """What float64 gives, but for rounding."""
    for found, exact in zip(result, expected(**problem), strict=True):
        assert (found - exact).norm() < EXACT * exact.norm()


def work(problem: Problem) -> Work:
    """The products of the usual method, of which ours needs a quarter; images are read and written once."""
    part, batch, channels, size = problem.values()
    passes = 2 if part == "gradient" else 1
    image, weight = batch * channels * size**2, 9 * channels**2
    return Work(passes * 2 * image * 9 * channels, passes * 4 * (2 * image + weight))


BENCHMARK = Benchmark(
    ours="cpu",
    rivals=lambda _problem: ("cpu", "conv2d", "channels_last", "compile"),
    case=case,
    check=check,
    problems=PROBLEMS,
    quick=({"part": "gradient", "batch": 2, "channels": 32, "size": 32},),
    small=lambda problem: {"part": problem["part"], "batch": 1, "channels": 16, "size": 8},
    headlines=(PROBLEMS[0], PROBLEMS[2], PROBLEMS[4]),
    operations={"cpu": "conv3x3"},
    slow=frozenset({"compile"}),
    work=work,
)


def test_convolution(timed: Callable[[int], Any], rival: str, problem: Problem) -> None:
    check(rival, problem, timed(15))
