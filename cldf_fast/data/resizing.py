"""Resizing of images and maps, without torch: training and exported engines see the same pixels, bit for bit.

The method's noise is seeded by the bits of the pixels, so that results must not depend on the batch, on the number of
threads or on the machine. Sums are therefore taken tap by tap in a fixed order: a BLAS product, or torch's own loops,
choose their order by the processor.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cldf_fast.data.grid import Floats


def to_working_size(images: Floats, size: int) -> Floats:
    """Resize float32 [B, C, H, W] to [B, C, size, size]: an area mean when it shrinks, bilinear when it grows.

    Finite values, whose range is kept. Images that have the size are returned as they are.
    """
    return _resize(images, (size, size), antialias=True)


def to_native_size(maps: Floats, size: tuple[int, int]) -> Floats:
    """Resize score maps float32 [B, K, h, w] back to a slice's own size (H, W), bilinear.

    Finite values, whose range is kept. Maps that have the size are returned as they are.
    """
    return _resize(maps, size, antialias=False)


def _resize(images: Floats, size: tuple[int, int], *, antialias: bool) -> Floats:
    rows, columns = size
    if images.shape[2:] == size:
        return images
    resized = np.empty((*images.shape[:2], rows, columns), dtype=np.float32)
    along_rows = _taps(images.shape[2], rows, antialias)
    along_columns = _taps(images.shape[3], columns, antialias)
    # Image by image, which stays in the cache; whole rows are what can be gathered and added fast.
    for image, out in zip(images, resized, strict=True):
        turned = _combine_rows(image, *along_rows).swapaxes(1, 2)
        turned = _combine_rows(np.ascontiguousarray(turned), *along_columns)
        # Weights sum to 1 up to rounding, which must not carry air below -1.
        out[:] = np.clip(turned, image.min(), image.max(), out=turned).swapaxes(1, 2)
    return resized


def _combine_rows(image: Floats, places: npt.NDArray[np.intp], weights: Floats) -> Floats:
    """[C, H, W] to [C, new, W]: row i is the sum over taps t of weights[t, i] times row places[t, i]."""
    total: Floats = image[:, places[0]] * weights[0, :, None]
    term = np.empty_like(total)
    for place, weight in zip(places[1:], weights[1:], strict=True):
        np.take(image, place, axis=1, out=term, mode="clip")  # the default mode would gather into a buffer first
        term *= weight[:, None]
        total += term
    return total


def _taps(old: int, new: int, antialias: bool) -> tuple[npt.NDArray[np.intp], Floats]:
    """Which of `old` pixels make each of `new` ones, and by what weight: two arrays [taps, new].

    A triangle around the new pixel's centre, as wide as a new pixel where it shrinks with antialiasing, else as wide as
    an old one; over the edge of the image it is cut off. In float32, step by step as torch computes its weights, with
    whose pixels networks were trained.
    """
    if old == new:
        return np.arange(new)[None], np.ones((1, new), dtype=np.float32)
    half, one = np.float32(0.5), np.float32(1)
    scale = np.float32(old) / np.float32(new)
    reach = max(scale, one) if antialias else one
    centres = scale * (np.arange(new, dtype=np.float32) + half)
    first = np.maximum((centres - reach + half).astype(np.intp), 0)
    places = first + np.arange(int(np.ceil(2 * reach)))[:, None]
    distance = np.abs(places.astype(np.float32) - centres + half) * (one / reach)
    weights = np.where(places < old, np.maximum(one - distance, 0), 0).astype(np.float32)
    total = weights[0].copy()
    for weight in weights[1:]:
        total += weight
    return np.minimum(places, old - 1), weights / total
