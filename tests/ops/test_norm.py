"""Group norm with its affine maps and SiLU: every backend against PyTorch's own operations in float64."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from cldf_fast.errors import BackendError, ConfigError, DataError
from cldf_fast.ops import group_norm
from tests.ops.again import run_again
from tests.ops.backends import check_threads_change_no_bit, needs
from tests.ops.gradients import with_gradients

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPES = [  # B, C, H, W, groups
    (1, 1, 2, 3, 1),
    (2, 16, 5, 7, 16),
    (3, 24, 4, 4, 8),
    (9, 32, 15, 17, 32),
    (2, 3, 252, 3, 3),
    (1, 64, 66, 67, 32),
    (8, 40, 2, 507, 5),
    (2, 18, 64, 65, 1),
    (0, 4, 3, 3, 2),
]


@pytest.fixture(params=["reference", "cpu"])
def impl(request: pytest.FixtureRequest) -> str:
    needs(request.param, "group_norm")
    return str(request.param)


def expected(x: Tensor, groups: int, affine: dict[str, Tensor], *, silu: bool, eps: float = 1e-5) -> Tensor:
    """From PyTorch's operations, whatever the dtype."""
    z = F.group_norm(x, groups, affine["weight"], affine["bias"], eps)
    if "scale" in affine:
        z = z * (1 + affine["scale"][:, :, None, None])
    if "shift" in affine:
        z = z + affine["shift"][:, :, None, None]
    return F.silu(z) if silu else z


def drawn(
    shape: tuple[int, ...], layout: torch.memory_format, names: tuple[str, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    batch, channels, height, width, _ = shape
    x = (3 * torch.randn(batch, channels, height, width) + 5 * torch.randn(channels, 1, 1)).contiguous(
        memory_format=layout
    )
    sizes = {"weight": (channels,), "bias": (channels,), "scale": (batch, channels), "shift": (batch, channels)}
    return x.requires_grad_(), {name: torch.randn(sizes[name]).requires_grad_() for name in names}


@pytest.mark.parametrize(
    ("names", "silu"),
    [(("weight", "bias"), False), (("weight", "bias", "scale", "shift"), True), (("weight", "bias", "shift"), True)],
    ids=["norm", "adaptive", "shifted"],
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["planes", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_values_and_gradients(
    impl: str, shape: tuple[int, ...], layout: torch.memory_format, names: tuple[str, ...], silu: bool
) -> None:
    x, affine = drawn(shape, layout, names)
    grad = torch.randn(x.shape)
    found = with_gradients(group_norm(x, shape[-1], **affine, silu=silu, impl=impl), [x, *affine.values()], grad)
    double = {name: each.detach().double().requires_grad_() for name, each in affine.items()}
    exact_x = x.detach().double().requires_grad_()
    exact = with_gradients(expected(exact_x, shape[-1], double, silu=silu), [exact_x, *double.values()], grad)
    assert not x.numel() or found[0].stride() == x.stride()
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm() + 1e-6


def test_a_mean_far_from_zero_costs_no_digits_of_the_deviation(impl: str) -> None:
    x = 300 + torch.randn(2, 16, 31, 33)
    weight, bias = torch.rand(16), torch.rand(16)
    for layout in LAYOUTS:
        found = group_norm(x.contiguous(memory_format=layout), 4, weight, bias, impl=impl)
        exact = F.group_norm(x.double(), 4, weight.double(), bias.double())
        # x itself has an absolute precision of 300 * 2^-24, about 2e-5.
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=5e-5)


def test_the_reference_passes_gradcheck() -> None:
    def run(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return group_norm(x, 3, weight, bias, scale=scale, shift=shift, silu=True, impl="reference")

    shapes = ((2, 6, 3, 2), (6,), (6,), (2, 6), (2, 6))
    assert torch.autograd.gradcheck(
        run, [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    )


def test_images_do_not_know_of_each_other(impl: str) -> None:
    x, affine = drawn((11, 12, 20, 19, 4), torch.channels_last, ("weight", "bias", "scale", "shift"))
    together = group_norm(x, 4, **affine, silu=True, impl=impl)
    for n in (0, 10):
        own = {name: each[n : n + 1] if each.ndim == 2 else each for name, each in affine.items()}
        alone = group_norm(x[n : n + 1], 4, **own, silu=True, impl=impl)
        assert torch.equal(alone[0], together[n])


@pytest.mark.parametrize("shape", [(3, 16, 67, 70, 8), (9, 16, 33, 70, 8)], ids=["few_images", "many_images"])
def test_threads_change_no_bit(shape: tuple[int, ...]) -> None:
    needs("cpu", "group_norm")
    x, affine = drawn(shape, torch.channels_last, ("weight", "bias", "scale"))
    grad = torch.randn(x.shape)
    inputs = [x, *affine.values()]
    check_threads_change_no_bit(lambda: with_gradients(group_norm(x, 8, **affine, silu=True, impl="cpu"), inputs, grad))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_group(impl: str, value: float) -> None:
    x = torch.randn(2, 6, 9, 5)
    x[1, 2, 3, 4] = value
    found = group_norm(x, 3, torch.ones(6), torch.zeros(6), silu=True, impl=impl)
    broken = torch.zeros(2, 6, dtype=torch.bool)
    broken[1, 2:4] = True
    assert torch.equal(found.isnan().all(dim=(2, 3)), broken)
    assert torch.equal(found.isfinite().all(dim=(2, 3)), ~broken)


def test_a_constant_group_is_its_offset(impl: str) -> None:
    x, bias = torch.full((2, 4, 6, 6), 7.0), torch.randn(4)
    found = group_norm(x, 2, torch.randn(4), bias, impl=impl)
    torch.testing.assert_close(found, bias.view(1, 4, 1, 1).expand_as(found), rtol=0, atol=1e-6)


def test_large_logits_of_silu_neither_overflow_nor_vanish(impl: str) -> None:
    x = torch.randn(2, 2, 8, 8)
    found = group_norm(x, 1, torch.full((2,), 1000.0), torch.zeros(2), silu=True, impl=impl)
    exact = expected(
        x.double(), 1, {"weight": torch.full((2,), 1000.0).double(), "bias": torch.zeros(2).double()}, silu=True
    )
    # The slope of 1000 is one of rounding errors too.
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-3)


def test_views_are_read_right(impl: str) -> None:
    x = torch.randn(2, 9, 12, 8)
    weight, bias = torch.randn(12), torch.randn(12)
    for view in (x.transpose(1, 2), x.permute(0, 2, 3, 1)[:, :12, ::2], torch.randn(1, 12, 5, 5).expand(3, -1, -1, -1)):
        width = view.shape[1]
        found = group_norm(view, 1, weight[:width], bias[:width], impl=impl)
        torch.testing.assert_close(found, F.group_norm(view, 1, weight[:width], bias[:width]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("capability", ["avx2", "baseline"])
def test_lesser_instruction_sets(capability: str) -> None:
    needs("cpu", "group_norm")
    if os.environ.get("CLDF_FAST_CPU_CAPABILITY") == capability:
        pytest.skip("this is the run with it")
    run_again(__file__, {"CLDF_FAST_CPU_CAPABILITY": capability}, "cpu and (252 or 16-5-7 or 64-66 or finite)")


def test_the_operator_is_one_of_torch(impl: str) -> None:
    x, affine = drawn((2, 8, 5, 6, 4), torch.channels_last, ("weight", "bias", "scale", "shift"))
    arguments = (x, *affine.values(), 4, 1e-5, True, impl)
    opcheck(torch.ops.cldf_fast.group_norm.default, arguments)

    def block(x: Tensor) -> Tensor:
        return group_norm(x, 4, **affine, silu=True, impl=impl)

    compiled: Callable[[Tensor], Tensor] = torch.compile(block, fullgraph=True, backend="aot_eager")
    grad = torch.randn(x.shape)
    for ours, theirs in zip(with_gradients(compiled(x), [x], grad), with_gradients(block(x), [x], grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 6, 3)}, "x: expected floating"),
        ({"num_groups": 4}, "num_groups: expected a divisor of 6 channels, got 4"),
        ({"num_groups": 0}, "num_groups: expected an integer, 1 or more, got 0"),
        ({"num_groups": None}, "num_groups: expected an integer, 1 or more, got None"),
        ({"eps": -1.0}, "eps: expected a finite number, 0 or more"),
        ({"weight": torch.ones(5)}, r"weight: expected float32 \[6\]"),
        ({"bias": torch.ones(6).double()}, r"bias: expected float32 \[6\]"),
        ({"scale": torch.ones(6)}, r"scale: expected float32 \[2, 6\]"),
        ({"shift": torch.ones(1, 6)}, r"shift: expected float32 \[2, 6\]"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.ones(2, 6, 3, 3), "num_groups": 3, "weight": torch.ones(6)}
    arguments |= {"bias": torch.zeros(6)} | change
    with pytest.raises((DataError, ConfigError), match=message):
        group_norm(**arguments)


def test_other_precisions_are_for_the_reference() -> None:
    needs("cpu", "group_norm")
    x, weight, bias = torch.randn(1, 2, 3, 3).bfloat16(), torch.ones(2).bfloat16(), torch.zeros(2).bfloat16()
    with pytest.raises(BackendError, match=r"cpu can't serve group_norm \(needs float32, got bfloat16\)"):
        group_norm(x, 2, weight, bias, impl="cpu")
    assert group_norm(x, 2, weight, bias).dtype == torch.bfloat16
