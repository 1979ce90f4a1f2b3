"""Resizing without torch: torch's own resizing is the oracle, and the bits depend on the image alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cldf_fast.data import packing
from cldf_fast.data.resizing import to_native_size, to_working_size

# Shrinking, growing, both at once, one pixel, odd, next to equal, equal along one axis.
SIZES = [(240, 240), (40, 23), (7, 9), (9, 200), (1, 1), (1, 33), (181, 217), (31, 33), (32, 50), (32, 32)]


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def fresh(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.uniform(-1, 1, shape).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("working", [1, 2, 31, 32, 96])
def test_working_size_is_as_torch_makes_it(rng: np.random.Generator, size: tuple[int, int], working: int) -> None:
    images = fresh(rng, 2, 3, *size)
    expected = F.interpolate(torch.from_numpy(images), (working, working), mode="bilinear", antialias=True)
    found = to_working_size(images, working)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("working", [1, 2, 31, 32, 96])
def test_native_size_is_as_torch_makes_it(rng: np.random.Generator, size: tuple[int, int], working: int) -> None:
    maps = fresh(rng, 2, 3, working, working)
    expected = F.interpolate(torch.from_numpy(maps), size, mode="bilinear", align_corners=False)
    found = to_native_size(maps, size)
    assert found.dtype == np.float32
    # Places in the image are float32 on both sides and rounded in another order.
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=np.finfo(np.float32).eps * max(working, 8))


@pytest.mark.parametrize("size", [(57, 40), (32, 41), (9, 12)])
def test_bits_depend_on_the_image_alone(rng: np.random.Generator, size: tuple[int, int]) -> None:
    images = fresh(rng, 5, 3, *size)
    working, native = to_working_size(images, 32), to_native_size(images, (50, 19))
    for i in range(5):
        np.testing.assert_array_equal(to_working_size(images[i : i + 1], 32)[0], working[i])
        np.testing.assert_array_equal(to_native_size(images[i : i + 1, 1:2], (50, 19))[0], native[i, 1:2])
    turned = np.ascontiguousarray(images.transpose(3, 2, 1, 0)).transpose(3, 2, 1, 0)
    np.testing.assert_array_equal(to_working_size(turned, 32), working)
    np.testing.assert_array_equal(to_working_size(images[::-1], 32), working[::-1])
    np.testing.assert_array_equal(packing.to_working_size(torch.from_numpy(images), 32).numpy(), working)
    np.testing.assert_array_equal(packing.to_native_size(torch.from_numpy(images), (50, 19)).numpy(), native)


def test_what_fits_is_left_as_it_is(rng: np.random.Generator) -> None:
    images = fresh(rng, 2, 1, 32, 32)
    assert to_working_size(images, 32) is images
    assert to_native_size(images, (32, 32)) is images
    assert to_working_size(images[:0], 16).shape == (0, 1, 16, 16)


def test_range_and_constants_are_kept(rng: np.random.Generator) -> None:
    for size in rng.integers(1, 300, 20).tolist():
        for value in (-1, 1):
            images = np.full((1, 1, size, size + 3), value, dtype=np.float32)
            assert np.abs(to_working_size(images, 64)).max() <= 1
            assert np.abs(to_native_size(images, (91, 7))).max() <= 1
            np.testing.assert_allclose(to_working_size(images, 64), value, rtol=1e-6)
