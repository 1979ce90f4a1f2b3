"""3 x 3 convolutions: every backend against PyTorch's own in float64."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from cldf_fast.errors import BackendError, DataError
from cldf_fast.ops import conv3x3
from tests.ops.again import run_again
from tests.ops.backends import check_threads_change_no_bit, needs
from tests.ops.gradients import with_gradients

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPES = [  # B, C, C', H, W: more tiles than output channels, then fewer
    (1, 1, 1, 1, 1),
    (3, 17, 33, 15, 17),
    (2, 16, 31, 252, 3),
    (1, 5, 24, 2, 507),
    (9, 32, 16, 21, 22),
    (2, 3, 70, 7, 9),
    (1, 507, 130, 8, 5),
    (5, 64, 252, 4, 4),
    (0, 4, 3, 3, 3),
]
# Relative to the norm: PyTorch's own float32 is off by up to 5e-7 on these shapes.
TOLERANCE = 2e-6


@pytest.fixture(params=["reference", "cpu"])
def impl(request: pytest.FixtureRequest) -> str:
    needs(request.param, "conv3x3")
    return str(request.param)


def drawn(shape: tuple[int, ...], layout: torch.memory_format = torch.channels_last) -> list[Tensor]:
    """x, weight, bias and residual."""
    batch, channels, out_channels, height, width = shape
    x = torch.randn(batch, channels, height, width) + torch.randn(channels, 1, 1)
    residual = torch.randn(batch, out_channels, height, width)
    weight, bias = torch.randn(out_channels, channels, 3, 3), torch.randn(out_channels)
    return [
        each.requires_grad_()
        for each in (x.contiguous(memory_format=layout), weight, bias, residual.contiguous(memory_format=layout))
    ]


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """By PyTorch, whatever the dtype."""
    out = F.conv2d(x, weight, bias, padding=1)
    return out if residual is None else out + residual


@pytest.mark.parametrize("optional", [0, 1, 2], ids=["weight", "bias", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["planes", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_values_and_gradients(impl: str, shape: tuple[int, ...], layout: torch.memory_format, optional: int) -> None:
    inputs = drawn(shape, layout)[: 2 + optional]
    x, weight, *rest = inputs
    double = [each.detach().double().requires_grad_() for each in inputs]
    grad = torch.randn(x.shape[0], len(weight), *x.shape[2:])
    found = conv3x3(x, weight, *rest[:1], residual=rest[1] if optional == 2 else None, impl=impl)
    assert found.is_contiguous(memory_format=torch.channels_last)
    found, exact = with_gradients(found, inputs, grad), with_gradients(convolved(*double), double, grad)
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() <= TOLERANCE * theirs.norm()


def test_the_error_does_not_grow_where_values_are_alike(impl: str) -> None:
    """Sums of large values of one sign, as after a norm's shift, where a transform's differences cancel."""
    x, weight = 100 + torch.rand(2, 64, 32, 31), torch.rand(64, 64, 3, 3)
    exact = convolved(x.double(), weight.double())
    assert (conv3x3(x, weight, impl=impl) - exact).abs().max() <= 2e-6 * exact.abs().max()


def test_the_reference_passes_gradcheck() -> None:
    shapes = ((2, 3, 4, 5), (2, 3, 3, 3), (2,), (2, 2, 4, 5))
    assert torch.autograd.gradcheck(
        lambda x, weight, bias, residual: conv3x3(x, weight, bias, residual=residual, impl="reference"),
        [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes],
    )


def test_a_frozen_network_keeps_no_images(impl: str) -> None:
    x, weight, *_ = drawn((2, 8, 16, 9, 9))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        conv3x3(x, weight.detach(), impl=impl)
    assert [each.shape for each in kept] == [weight.shape]


@pytest.mark.parametrize("shape", [(11, 20, 16, 10, 9), (12, 20, 64, 8, 8)], ids=["many_tiles", "few_tiles"])
def test_images_do_not_know_of_each_other(impl: str, shape: tuple[int, ...]) -> None:
    x, weight, bias, _ = drawn(shape)
    together = conv3x3(x, weight, bias, impl=impl)
    for n in (0, 10):
        alone = conv3x3(x[n : n + 1], weight, bias, impl=impl)[0]
        if impl == "cpu":
            assert torch.equal(alone, together[n])
        else:
            torch.testing.assert_close(alone, together[n])


@pytest.mark.parametrize("shape", [(3, 16, 24, 67, 70), (2, 24, 130, 9, 15)], ids=["many_tiles", "few_tiles"])
def test_threads_change_no_bit(shape: tuple[int, ...]) -> None:
    needs("cpu", "conv3x3")
    x, weight, bias, residual = drawn(shape)
    grad = torch.randn(residual.shape)
    check_threads_change_no_bit(
        lambda: with_gradients(conv3x3(x, weight, bias, residual=residual, impl="cpu"), [x], grad)
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_tile_and_the_next(impl: str, value: float) -> None:
    x, weight, *_ = (each.detach() for each in drawn((2, 16, 8, 19, 16)))
    x[1, 3, 9, 8] = value
    found = conv3x3(x, weight, impl=impl)
    assert not found[1, :, 8:11, 7:10].isfinite().any()
    far = torch.ones(2, 19, 16, dtype=torch.bool)
    far[1, 8:12, 4:12] = False
    assert found.movedim(1, -1)[far].isfinite().all()


def test_views_are_read_right(impl: str) -> None:
    x, weight = torch.randn(2, 9, 12, 8), torch.randn(6, 12, 3, 3)
    turned = torch.randn(12, 6, 3, 3).transpose(0, 1)
    for view in (x.transpose(1, 2), torch.randn(1, 12, 5, 5).expand(3, -1, -1, -1), torch.randn(2, 24, 6, 6)[:, ::2]):
        for kernels in (weight, turned, weight.flip(2), weight.contiguous(memory_format=torch.channels_last)):
            torch.testing.assert_close(
                conv3x3(view, kernels, impl=impl), convolved(view, kernels), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("capability", ["avx2", "baseline"])
def test_lesser_instruction_sets(capability: str) -> None:
    needs("cpu", "conv3x3")
    if os.environ.get("CLDF_FAST_CPU_CAPABILITY") == capability:
        pytest.skip("this is the run with it")
    run_again(__file__, {"CLDF_FAST_CPU_CAPABILITY": capability}, "cpu and (values or alike or finite)")


def test_the_operator_is_one_of_torch(impl: str) -> None:
    inputs = drawn((2, 8, 5, 6, 7))
    x, weight, bias, residual = inputs
    opcheck(torch.ops.cldf_fast.conv3x3.default, (*inputs, impl))
    opcheck(torch.ops.cldf_fast.conv3x3.default, (x.detach(), weight, None, None, impl))

    def block(x: Tensor) -> Tensor:
        return conv3x3(x, weight, bias, residual=residual, impl=impl)

    compiled: Callable[[Tensor], Tensor] = torch.compile(block, fullgraph=True, backend="aot_eager")
    grad = torch.randn(residual.shape)
    for ours, theirs in zip(with_gradients(compiled(x), [x], grad), with_gradients(block(x), [x], grad), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 6, 3)}, "x: expected floating"),
        ({"weight": torch.ones(4, 5, 3, 3)}, r"weight: expected float32 \[C', 6, 3, 3\]"),
        ({"weight": torch.ones(4, 6, 5, 5)}, r"weight: expected float32 \[C', 6, 3, 3\]"),
        ({"weight": torch.ones(4, 6, 3, 3).double()}, r"weight: expected float32 \[C', 6, 3, 3\]"),
        ({"bias": torch.ones(6)}, r"bias: expected float32 \[4\]"),
        ({"residual": torch.ones(2, 4, 3, 3)}, r"residual: expected float32 \[2, 4, 5, 3\]"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.ones(2, 6, 5, 3), "weight": torch.ones(4, 6, 3, 3)} | change
    with pytest.raises(DataError, match=message):
        conv3x3(**arguments)


def test_other_precisions_are_for_the_reference() -> None:
    needs("cpu", "conv3x3")
    x, weight = torch.randn(1, 2, 3, 3).bfloat16(), torch.randn(2, 2, 3, 3).bfloat16()
    with pytest.raises(BackendError, match=r"cpu can't serve conv3x3 \(needs float32, got bfloat16\)"):
        conv3x3(x, weight, impl="cpu")
    assert conv3x3(x, weight).dtype == torch.bfloat16
