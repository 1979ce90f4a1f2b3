"""The noise of `ops.noised_batch` in numpy: the same numbers, seeded by the pixels. Definition: `ops.reference`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_NOISE_STREAM = 2
_LOW, _WORD_BITS = np.uint64(0xFFFFFFFF), np.uint64(32)


def pixel_seed(images: NDArray[np.float32]) -> NDArray[np.uint64]:
    """The seed [B], 64 bits, of every image float32 [B, C, H, W]: `ops.pixel_seed` without sign."""
    bits = np.ascontiguousarray(images, dtype=np.float32).reshape(len(images), -1).view(np.uint32)
    position = np.arange(bits.shape[1], dtype=np.uint64) << _WORD_BITS
    return _mix64(_mix64(position | bits).sum(axis=1, dtype=np.uint64))


def standard_normal(seeds: NDArray[np.uint64], levels: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """float32 [B, levels, *shape]: the noise of images with these seeds [B] at each of the noise levels."""
    elements = int(np.prod(shape))
    blocks = np.arange(-(-elements // 4), dtype=np.uint64)
    noise = np.empty((len(seeds), levels, elements), dtype=np.float32)
    # One image and level at a time: the words of a whole batch would be eight times its size.
    for row, seed in zip(noise, seeds, strict=True):
        for level in range(levels):
            row[level] = _box_muller(_philox(seed, blocks, level))[:elements]
    return noise.reshape(len(seeds), levels, *shape)


def _mix64(word: NDArray[np.uint64]) -> NDArray[np.uint64]:
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = (word ^ (word >> np.uint64(shift))) * np.uint64(multiplier)
    return word ^ (word >> np.uint64(31))


def _philox(seed: np.uint64, blocks: NDArray[np.uint64], level: int) -> NDArray[np.uint64]:
    """Words [blocks, 4] of Philox-4x32-10."""
    key = [int(seed) & 0xFFFFFFFF, int(seed) >> 32]
    c0, c1 = blocks, np.full_like(blocks, level)
    c2, c3 = np.zeros_like(blocks), np.full_like(blocks, _NOISE_STREAM)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (p1 >> _WORD_BITS) ^ c1 ^ np.uint64(key[0]), p1 & _LOW
        c2, c3 = (p0 >> _WORD_BITS) ^ c3 ^ np.uint64(key[1]), p0 & _LOW
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack([c0, c1, c2, c3], axis=1)


def _box_muller(words: NDArray[np.uint64]) -> NDArray[np.float32]:
    uniform = (words >> np.uint64(8)).astype(np.float64)
    radius = np.sqrt(-2 * np.log((uniform[:, ::2] + 1) * 2.0**-24))
    angle = uniform[:, 1::2] * (2 * np.pi * 2.0**-24)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2).reshape(-1).astype(np.float32)
