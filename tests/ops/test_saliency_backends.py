"""Every backend of the saliency operations against the reference in float64; seeds and labels bit by bit."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from cldf_fast.errors import BackendError
from cldf_fast.ops import (
    _dispatch,
    fuse_evidence,
    gradient_saliency,
    noised_batch,
    pixel_seed,
    reference,
)
from tests.ops.again import run_again
from tests.ops.backends import check_threads_change_no_bit, needs

BACKENDS = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
REDUCTIONS = ("max_abs", "sum_abs", "l2")
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
OPERATIONS = ("pixel_seed", "noised_batch", "gradient_saliency", "fuse_evidence")


@pytest.fixture(params=BACKENDS)
def impl(request: pytest.FixtureRequest) -> str:
    """A backend that this machine has."""
    needs(request.param, *OPERATIONS)
    return str(request.param)


def run(impl: str, operation: Any, *tensors: Tensor, **options: Any) -> Tensor:
    """The operation's result, on the CPU, from tensors on the CPU."""
    device = "cuda" if impl == "cuda" else "cpu"
    result: Tensor = operation(*(tensor.to(device) for tensor in tensors), impl=impl, **options)
    return result.cpu()


# --- pixel_seed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 1, 15, 17), (2, 3, 252, 3), (2, 4, 507, 2), (5, 0, 3, 3), (0, 2, 3, 3), (2, 1, 64, 70)]
)
def test_seeds_are_those_of_the_reference(impl: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    assert torch.equal(run(impl, pixel_seed, x), reference.pixel_seed(x))
    channels_last = x.to(memory_format=torch.channels_last)
    assert torch.equal(run(impl, pixel_seed, channels_last), reference.pixel_seed(x))
    assert torch.equal(run(impl, pixel_seed, x.transpose(2, 3)), reference.pixel_seed(x.transpose(2, 3)))


def test_seeds_know_every_bit(impl: str) -> None:
    """Zeros of both signs, infinities, subnormal numbers and NaN with a payload."""
    x = torch.tensor([0, -(2**31), 0x7F800000, -0x800000, 1, 0x7FC12345], dtype=torch.int32).view(torch.float32)
    x = x.view(1, 1, 2, 3).repeat(7, 1, 1, 1)
    x[1:].view(torch.int32).flatten(1).bitwise_xor_(torch.eye(6, dtype=torch.int32))
    seeds = run(impl, pixel_seed, x)
    assert torch.equal(seeds, reference.pixel_seed(x))
    assert len(set(seeds.tolist())) == 7


@pytest.mark.slow
def test_the_seed_of_a_large_image_keeps_all_bits_of_the_position(impl: str) -> None:
    """The definition once more in numpy, whose integers have no sign, part by part."""
    x = torch.randn(1, 2, 2**12, 2**12)

    def mix(word: np.ndarray) -> np.ndarray:
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(word ^ (word >> np.uint64(31)))

    total, bits = np.zeros(1, np.uint64), x.numpy().ravel().view(np.uint32)
    for first in range(0, 2**25, 2**20):
        position = np.arange(first, first + 2**20, dtype=np.uint64)
        total += mix(position << np.uint64(32) | bits[first : first + 2**20]).sum(dtype=np.uint64)
    assert run(impl, pixel_seed, x).item() == mix(total).astype(np.int64).item()


# --- noised_batch

ALPHA_BAR = torch.tensor([0.97, 0.5, 0.0, 1.0, 0.123])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 1, 15, 17), (2, 3, 252, 3), (2, 2, 507, 3), (1, 1, 64, 1025)])
def test_noise_is_that_of_the_reference(impl: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    seeds = torch.randint(-(2**62), 2**62, shape[:1])
    noised, expected = run(impl, noised_batch, x, ALPHA_BAR, seeds), reference.noised_batch(x, ALPHA_BAR, seeds)
    assert noised.dtype == dtype
    assert noised.shape == expected.shape
    # The formulas agree in float64; of their roundings to float32 one in some 2^28 differs, and a sine or cosine that
    # is zero, one in 2^22, which the reference misses by 1e-16.
    differing = (noised != expected).sum()
    assert differing <= 2 + noised.numel() / 2**20
    torch.testing.assert_close(noised.float(), expected.float(), rtol=2**-7 if dtype in HALF else 1e-6, atol=1e-15)


@pytest.mark.parametrize("alpha_dtype", [torch.float64, torch.float16])
def test_noise_of_any_layout_and_any_seed(impl: str, alpha_dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, 9, 3).transpose(1, 2)[:, ::2]
    alpha_bar = ALPHA_BAR.to(alpha_dtype)
    seeds = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    noised = run(impl, noised_batch, x, alpha_bar, seeds)
    torch.testing.assert_close(noised, reference.noised_batch(x, alpha_bar, seeds), rtol=1e-6, atol=1e-7)
    assert run(impl, noised_batch, x, alpha_bar[:0], seeds).shape == (0, *x.shape[1:])
    assert run(impl, noised_batch, x[:0], alpha_bar, seeds[:0]).shape == (0, *x.shape[1:])
    strided = alpha_bar.repeat_interleave(2)[::2], seeds.repeat_interleave(2)[::2]
    assert torch.equal(run(impl, noised_batch, x, *strided), noised)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_read_and_rounded_rightly(impl: str, dtype: torch.dtype) -> None:
    """All 65536 numbers, which pass where there is no noise, and the rounding of some thousand others."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, 256, 256)
    (passed,) = run(impl, noised_batch, every, torch.ones(1), seed=3)
    torch.testing.assert_close(passed, every[0], rtol=0, atol=0, equal_nan=True)
    # Of any size, infinity too, with noise of any size: sums are normal, subnormal and zero.
    x = torch.randn(1, 1, 30, 40).mul(torch.logspace(-9, 6, 40)).to(dtype)
    inputs = x, 1 - torch.logspace(0, -15, 16).double(), torch.tensor([5])
    expected = reference.noised_batch(*inputs)
    torch.testing.assert_close(run(impl, noised_batch, *inputs), expected, rtol=0, atol=0, equal_nan=True)


# --- gradient_saliency


def compare(impl: str, grad: Tensor, **options: Any) -> Tensor:
    """The maps, once they agree with the reference in float64."""
    options = {"reduce": "max_abs", "percentile": 0.99, "sigma": 1.0, "level_norm": True} | options
    maps, expected = (
        run(impl, gradient_saliency, grad, **options),
        reference.gradient_saliency(grad.double(), **options),
    )
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps, expected, rtol=1e-6, atol=1e-7, equal_nan=True)
    return maps


@pytest.mark.parametrize("level_norm", [True, False])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.5, 3.0, 40.0])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1), (3, 2, 1, 15, 17), (2, 3, 3, 252, 3), (1, 2, 4, 507, 2), (2, 1, 5, 33, 40), (19, 2, 2, 9, 8),
        (1, 3, 2, 1, 30), (2, 1, 3, 30, 1), (2, 2, 4, 35, 64), (2, 0, 3, 4, 5), (2, 2, 1, 97, 101),
    ],
)  # fmt: skip
def test_maps_of_awkward_shapes(impl: str, shape: tuple[int, ...], sigma: float, reduce: str, level_norm: bool) -> None:
    grad = torch.randn(shape) * torch.logspace(-12, 2, shape[0]).view(-1, 1, 1, 1, 1)
    for percentile in (1.0, 0.5):
        compare(impl, grad, sigma=sigma, reduce=reduce, level_norm=level_norm, percentile=percentile)


@pytest.mark.parametrize("sigma", [0.0, 1.5, 16.1, 16.2])
@pytest.mark.parametrize(
    "shape", [(2, 2, 1, 97, 101), (3, 1, 4, 64, 260), (1, 2, 2, 181, 200), (2, 1, 3, 1, 9001), (1, 1, 1, 9001, 1)]
)
def test_wide_maps(impl: str, shape: tuple[int, ...], sigma: float) -> None:
    """Larger than what threads, or the blocks of a GPU, take at a time."""
    compare(impl, torch.randn(shape) * torch.rand(shape[-2:]).round(), sigma=sigma, reduce="sum_abs")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_maps_of_any_layout(impl: str, channels: int, reduce: str, dtype: torch.dtype) -> None:
    grad = torch.randn(2, 3, channels, 37, 34).to(dtype)
    plain = compare(impl, grad, reduce=reduce)
    channels_last = grad.movedim(2, -1).contiguous().movedim(-1, 2)
    padded = torch.full((2, 4, channels + 1, 40, 39), math.nan, dtype=dtype)
    cropped = padded[:, 1:, 1:, 3:, 2:36]
    strided = torch.full((2, 3, channels, 37, 68), math.nan, dtype=dtype)[..., ::2]
    transposed = torch.empty(2, 3, channels, 34, 37, dtype=dtype).transpose(3, 4)
    batch_first = torch.empty(3, 2, channels, 37, 34, dtype=dtype).transpose(0, 1)
    for view in (channels_last, cropped, strided, transposed, batch_first):
        maps = run(impl, gradient_saliency, view.copy_(grad), reduce=reduce)
        torch.testing.assert_close(maps, plain, rtol=1e-6, atol=1e-7)
    repeated = grad[:1].expand(5, -1, -1, -1, -1)
    torch.testing.assert_close(
        run(impl, gradient_saliency, repeated, reduce=reduce), compare(impl, grad[:1], reduce=reduce)
    )


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("level_norm", [True, False])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_broken_gradient_stays_in_its_image(impl: str, reduce: str, level_norm: bool, broken: float) -> None:
    options = {"reduce": reduce, "level_norm": level_norm}
    grad = torch.randn(3, 6, 3, 40, 41)
    clean = compare(impl, grad, **options)
    places = {0: (0, 0, 0, 0), 2: (2, 2, 39, 40), 5: (1, 0, 20, 7)}
    for image, (level, channel, y, x) in places.items():
        grad[level, image, channel, y, x] = broken
    maps = compare(impl, grad, **options)
    assert maps[list(places)].isnan().all()
    assert torch.equal(maps[[1, 3, 4]], clean[[1, 3, 4]])


@pytest.mark.parametrize("level_norm", [True, False])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_zeros_stay_zero(impl: str, reduce: str, level_norm: bool) -> None:
    grad = torch.randn(10, 4, 2, 21, 20)
    grad[:, 1] = 0
    grad[3, 2], grad[9, 2] = 0, -0.0
    maps = compare(impl, grad, reduce=reduce, level_norm=level_norm)
    assert not maps[1].any()
    assert maps[[0, 2, 3]].amax(dim=(1, 2)).tolist() == [1.0] * 3


@pytest.mark.parametrize("level_norm", [True, False])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 3e38])
def test_gradients_of_any_size(impl: str, scale: float, reduce: str, level_norm: bool) -> None:
    grad = torch.rand(2, 2, 4, 12, 13).mul(2).sub(1).mul(scale)
    maps = compare(impl, grad, reduce=reduce, level_norm=level_norm)
    assert maps.amax(dim=(1, 2)).tolist() == [1.0, 1.0]


def images_with_ties(pixels: int) -> dict[str, Tensor]:
    """Magnitudes whose order statistics are hard to find by halving."""
    noise = torch.rand(pixels)
    return {
        "constant": torch.full((pixels,), 0.3),
        "few values": noise.mul(3).floor(),
        "mostly zero": torch.where(noise < 0.995, 0, noise),
        "half zero": torch.where(torch.randperm(pixels) < pixels // 2, 0, noise),
        "one value and more": torch.where(noise < 0.7, 0.5, noise),
        "every magnitude": torch.logspace(-44, 38, pixels)[torch.randperm(pixels)],
        "one far outlier": torch.cat([noise[1:].mul(1e-3).add(1), torch.tensor([1e30])]),
        "neighbours": torch.randint(0, 9, (pixels,)).add(0x3F800000).int().view(torch.float32),
        "ascending": noise.sort().values,
    }


@pytest.mark.parametrize("percentile", [1e-9, 0.07, 0.5, 0.7, 0.99, 0.9999, 1.0])
@pytest.mark.parametrize("name", images_with_ties(1))
def test_the_percentile_is_exact(impl: str, name: str, percentile: float) -> None:
    """Without smoothing the scale is one of the values, so that every quotient can be told."""
    for height, width in ((1, 1), (15, 17), (64, 100), (160, 205)):
        values = images_with_ties(height * width)[name]
        grad = values.view(1, 1, 1, height, width)
        maps = run(impl, gradient_saliency, grad, percentile=percentile, sigma=0.0, level_norm=False)
        rank = max(1, math.ceil(percentile * values.numel() - 1e-9))
        scale = values.sort().values[rank - 1].double()
        scale = torch.where(scale > 0, scale, values.max())
        expected = torch.where(scale > 0, values / scale, 0).clamp_max(1).float()
        torch.testing.assert_close(maps.flatten(), expected, rtol=2e-7, atol=0)


def test_maps_on_the_cpu_are_rounded_once() -> None:
    needs("cpu", "gradient_saliency")
    grad = torch.randn(5, 8, 4, 61, 67)
    for reduce in REDUCTIONS:
        options = {"reduce": reduce, "percentile": 0.99, "sigma": 1.5, "level_norm": True}
        maps = gradient_saliency(grad, impl="cpu", **options)
        differing = (maps != reference.gradient_saliency(grad.double(), **options)).sum()
        assert differing <= 2


# --- fuse_evidence


def evidence(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> list[Tensor]:
    """Two maps of this kind and a label."""
    maps = torch.rand(2, *shape) if kind == "any" else torch.randint(0, 5, (2, *shape)) / 4
    if kind == "broken":
        values = torch.tensor([math.nan, math.inf, 0.0, 1.0, 0.5])
        maps = values[torch.randint(0, 5, maps.shape)]
    return [*maps.to(dtype), torch.rand(shape[:2]) < 0.6]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["any", "ties", "broken"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 1, 15, 17), (5, 3, 252, 3), (2, 5, 507, 4), (2, 126, 5, 7), (0, 2, 3, 3), (2, 2, 0, 3)]
)
def test_labels_are_those_of_the_reference(impl: str, shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    *maps, image_label = evidence(shape, dtype, kind)
    every_threshold = ((0.5, 0.5, 0.25, 0.5), (0.75, 0.25, 0.75, 0.5), (0.0, 0.0, 0.0, 0.0), (2.0, 2.0, 1.0, 1.0))
    for thresholds in (*every_threshold, (0.1, 0.3, 0.1, 0.3), (0.7, -1.0, -0.2, 0.9)):
        labels = run(impl, fuse_evidence, *maps, image_label, thresholds=thresholds)
        assert labels.dtype == torch.int8
        expected = reference.fuse_evidence(*(x.double() for x in maps), image_label, rounded(thresholds))
        assert torch.equal(labels, expected)


def rounded(thresholds: tuple[float, ...]) -> list[float]:
    """As they are compared with maps of float32 and less."""
    return torch.tensor(thresholds).tolist()


def test_labels_from_maps_of_any_layout(impl: str) -> None:
    *maps, image_label = evidence((3, 4, 33, 36), torch.float32, "ties")
    thresholds = (0.5, 0.5, 0.25, 0.5)
    expected = run(impl, fuse_evidence, *maps, image_label, thresholds=thresholds)
    views = [
        [x.to(memory_format=torch.channels_last) for x in maps],
        [
            torch.empty(3, 4, 36, 33).transpose(2, 3).copy_(maps[0]),
            torch.zeros(4, 5, 40, 76)[1:, 1:, 7:, 4::2].copy_(maps[1]),
        ],
    ]
    for view in views:
        assert torch.equal(run(impl, fuse_evidence, *view, image_label, thresholds=thresholds), expected)
    one = maps[0][:, :1].expand(-1, 4, -1, -1)
    found = run(impl, fuse_evidence, one, maps[1], image_label.T.contiguous().T, thresholds=thresholds)
    assert torch.equal(found, reference.fuse_evidence(one, maps[1], image_label, list(thresholds)))


def test_an_image_without_a_label_is_background(impl: str) -> None:
    gradient_map, cam, image_label = evidence((4, 3, 20, 21), torch.float32, "broken")
    image_label[1] = False
    labels = run(impl, fuse_evidence, gradient_map, cam, image_label, thresholds=(0.5, 0.5, 0.2, 0.2))
    assert not labels[1].any()
    assert (run(impl, fuse_evidence, gradient_map, cam, image_label | True, thresholds=(0.5, 0.5, 0.2, 0.2)) != 0).any()


# --- all of them


def chain(impl: str, x: Tensor, alpha_bar: Tensor, image_label: Tensor) -> list[Tensor]:
    """What all four return for images x; of each the first axis is the image."""
    seeds = run(impl, pixel_seed, x)
    noised = run(impl, noised_batch, x, alpha_bar, seeds).unflatten(0, (len(alpha_bar), len(x)))
    maps = torch.stack([run(impl, gradient_saliency, noised, reduce=reduce) for reduce in REDUCTIONS], dim=1)
    labels = run(impl, fuse_evidence, maps, maps.flip(1), image_label, thresholds=(0.5, 0.4, 0.3, 0.35))
    return [seeds, noised.transpose(0, 1), maps, labels]


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_never_depends_on_its_batch(impl: str, dtype: torch.dtype) -> None:
    x, alpha_bar, image_label = torch.randn(5, 3, 45, 47).to(dtype), ALPHA_BAR, torch.rand(5, 3) < 0.7
    whole = chain(impl, x, alpha_bar, image_label)
    order = torch.randperm(5)
    for one, other in zip(whole, chain(impl, x[order], alpha_bar, image_label[order]), strict=True):
        assert torch.equal(one[order], other)
    for b in range(5):
        for one, other in zip(whole, chain(impl, x[b : b + 1], alpha_bar, image_label[b : b + 1]), strict=True):
            assert torch.equal(one[b : b + 1], other)


def test_the_same_call_gives_the_same_bits(impl: str) -> None:
    inputs = torch.randn(3, 2, 60, 61), ALPHA_BAR, torch.rand(3, 3) < 0.7
    assert all(torch.equal(a, b) for a, b in zip(chain(impl, *inputs), chain(impl, *inputs), strict=True))


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_number_of_threads_does_not_matter(batch: int) -> None:
    needs("cpu", "gradient_saliency")
    inputs = torch.randn(batch, 4, 150, 133), ALPHA_BAR, torch.rand(batch, 3) < 0.7
    check_threads_change_no_bit(lambda: chain("cpu", *inputs), (1, 2, 3, 8))


def test_operators_are_registered_rightly(impl: str) -> None:
    ops = torch.ops.cldf_fast
    device = "cuda" if impl == "cuda" else "cpu"
    x, maps, grad = (torch.randn(shape, device=device) for shape in ((2, 3, 4, 5), (2, 2, 3, 4, 5), (3, 2, 2, 6, 7)))
    alpha_bar, seeds = ALPHA_BAR.to(device), torch.tensor([1, -2], device=device)
    present = torch.ones(2, 3, dtype=torch.bool, device=device)
    opcheck(ops.pixel_seed.default, (x, impl))
    opcheck(ops.noised_batch.default, (x.clone().requires_grad_(), alpha_bar, seeds, impl))
    opcheck(ops.gradient_saliency.default, (grad, "l2", 0.9, 0.7, True, impl))
    opcheck(ops.fuse_evidence.default, (maps[0], maps[1], present, [0.5, 0.5, 0.2, 0.2], impl))


def test_backends_say_what_they_can_not_serve(impl: str) -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    with pytest.raises(BackendError, match="needs float32, float16 or bfloat16, got float64"):
        run(impl, pixel_seed, x)
    for op in OPERATIONS:
        with pytest.raises(BackendError, match=f"needs tensors on {impl}, got them on meta"):
            _dispatch.select(op, impl, x.float().to("meta"))


@pytest.mark.slow
@pytest.mark.skipif("CLDF_FAST_CPU_CAPABILITY" in os.environ, reason="this is one of the lesser instruction sets")
@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_lesser_instruction_sets(capability: str) -> None:
    """The tests of `cpu` once more, as on a machine that has no more than these instructions."""
    run_again(__file__, {"CLDF_FAST_CPU_CAPABILITY": capability}, "not lesser and not cuda")
