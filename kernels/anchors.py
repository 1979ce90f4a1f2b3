"""Class-balanced anchor sampling in Triton: three launches, no host synchronisation.

Of every class of every image the S pixels that arrive first are wanted. Arrival times fall into bins, two to an octave,
and however pixels are weighted the bin in which the S-th arrives holds about half of what the earlier ones hold, or
less. So a first kernel computes times and counts them by class and bin, a second one collects what arrives in the last
bin that is needed or earlier, and a third one sorts that little. A program owns a part of an image, and its counts tell
where it may write: the order never varies.

What a time is stands in the package's reference of the operation.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BINS: tl.constexpr = tl.constexpr(256)
# The bin of float32 bits that have lost all but one bit of the mantissa: 64 octaves on either side of 1.
_FIRST_BIN: tl.constexpr = tl.constexpr((127 - 64) * 2)
_STREAM: tl.constexpr = tl.constexpr(1)
_NEVER: tl.constexpr = tl.constexpr(0xFFFFFFFF)
_BLOCK = 1024
_MOST_PARTS = 32


@triton.jit
def _bin_of(time, WEIGHTED: tl.constexpr):
    """Of times uint32: with weights the bits of a float32, without a whole number."""
    bits = time if WEIGHTED else time.to(tl.float32).to(tl.uint32, bitcast=True)
    return tl.minimum(tl.maximum((bits >> 22).to(tl.int32) - _FIRST_BIN, 0), _BINS - 1)


@triton.jit
def _row_of(label_ptr, at, inside, K):
    """The class of pixels, or K for none."""
    label = tl.load(label_ptr + at, mask=inside, other=0)
    return tl.where(inside & (label >= 0) & (label < K), label, K).to(tl.int32)


@triton.jit
def times_kernel(
    label_ptr,
    weight_ptr,
    seed_ptr,
    image_ptr,
    time_ptr,
    count_ptr,
    P,
    K,
    STEPS,
    ROWS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For a part of image b: times uint32 [B, P], and how many of each class are in each bin [B, parts, ROWS, BINS]."""
    part, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    seed, image = tl.load(seed_ptr + b), tl.load(image_ptr + b)
    low, high = (image & 0xFFFFFFFF).to(tl.uint32), ((image >> 32) & 0xFFFFFFFF).to(tl.uint32)
    # The part's own counts: nobody else adds to them, and whole numbers add up alike in any order.
    count_ptr += (b * tl.num_programs(0) + part) * ROWS * _BINS
    tl.store(count_ptr + tl.arange(0, ROWS * _BINS), 0)
    tl.debug_barrier()
    for step in range(STEPS):
        pixel = (part * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < P
        at = b * P + pixel
        block = ((part * STEPS + step) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
        first, second, third, fourth = tl.philox(seed, block, low, high, tl.zeros_like(block) + _STREAM)
        # Word after word of block after block.
        time = tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [BLOCK])
        row = _row_of(label_ptr, at, inside, K)
        if WEIGHTED:
            weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
            drawable = weight > 0
            exponential = -tl.log((4294967295.5 - time.to(tl.float64)) * 2.0**-32)
            ratio = tl.div_rn(exponential.to(tl.float32), tl.where(drawable, weight, 1.0))
            time = tl.where(drawable, ratio.to(tl.uint32, bitcast=True), _NEVER)
            row = tl.where(drawable, row, K)
        tl.store(time_ptr + at, time, mask=inside)
        tl.atomic_add(count_ptr + row * _BINS + _bin_of(time, WEIGHTED), 1, mask=row < K, sem="relaxed")


@triton.jit
def collect_kernel(
    label_ptr,
    time_ptr,
    count_ptr,
    candidate_ptr,
    start_ptr,
    total_ptr,
    P,
    K,
    S,
    STEPS,
    ROWS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What may be drawn, time and pixel in one int64 [B, P]: of each class `total` from `start` on, both [B, ROWS]."""
    part, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    entry = tl.arange(0, ROWS * _BINS)
    every, earlier = tl.zeros([ROWS * _BINS], dtype=tl.int32), tl.zeros([ROWS * _BINS], dtype=tl.int32)
    for other in range(tl.num_programs(0)):
        counts = tl.load(count_ptr + (b * tl.num_programs(0) + other) * ROWS * _BINS + entry)
        every += counts
        earlier += tl.where(other < part, counts, 0)
    every, earlier = tl.reshape(every, [ROWS, _BINS]), tl.reshape(earlier, [ROWS, _BINS])
    rows = tl.arange(0, ROWS)
    # The first bin up to which there are S, or one that does not exist.
    last = tl.sum((tl.cumsum(every, axis=1) < S).to(tl.int32), axis=1)
    needed = (tl.arange(0, _BINS)[None, :] <= last[:, None]) & (rows < K)[:, None]
    total = tl.sum(tl.where(needed, every, 0), axis=1)
    start = tl.cumsum(total, axis=0) - total
    if part == 0:
        tl.store(start_ptr + b * ROWS + rows, start)
        tl.store(total_ptr + b * ROWS + rows, total)
    place = start + tl.sum(tl.where(needed, earlier, 0), axis=1)
    for step in range(STEPS):
        pixel = (part * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < P
        row = _row_of(label_ptr, b * P + pixel, inside, K)
        time = tl.load(time_ptr + b * P + pixel, mask=inside, other=0)
        if WEIGHTED:
            row = tl.where(time == _NEVER, K, row)
        candidate = (time.to(tl.int64) << 31) | pixel.to(tl.int64)
        bin = _bin_of(time, WEIGHTED)
        for k in range(K):
            taken = (row == k) & (bin <= tl.sum(tl.where(rows == k, last, 0)))
            ahead = tl.cumsum(taken.to(tl.int32), axis=0) - 1
            tl.store(candidate_ptr + b * P + tl.sum(tl.where(rows == k, place, 0)) + ahead, candidate, mask=taken)
            place += tl.where(rows == k, tl.sum(taken.to(tl.int32)), 0)


@triton.jit
def _earlier_half(candidates, SIZE: tl.constexpr):
    """The first half of [2 * SIZE], sorted."""
    halves = tl.reshape(tl.sort(candidates), [2, SIZE])
    return tl.sum(tl.where(tl.arange(0, 2)[:, None] == 0, halves, 0), axis=0)


@triton.jit
def order_kernel(
    candidate_ptr,
    start_ptr,
    total_ptr,
    index_ptr,
    drawn_ptr,
    P,
    K,
    S,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Class k of image b: its pixels in their order, int64 [B, K, S], and their number [B, K]. SIZE: at least S."""
    k, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    candidate_ptr += b * P + tl.load(start_ptr + b * ROWS + k)
    total = tl.load(total_ptr + b * ROWS + k)
    none: tl.constexpr = 2**63 - 1
    place = tl.arange(0, 2 * SIZE)
    best = _earlier_half(tl.load(candidate_ptr + place, mask=place < total, other=none), SIZE)
    place = tl.arange(0, SIZE)
    # Seldom: very many pixels that arrive at nearly the same time.
    for first in range(2 * SIZE, total, SIZE):
        more = tl.load(candidate_ptr + first + place, mask=first + place < total, other=none)
        best = _earlier_half(tl.cat(best, more, can_reorder=True), SIZE)
    index = tl.where(best == none, -1, best & 0x7FFFFFFF)
    tl.store(index_ptr + (b * K + k) * S + place, index, mask=place < S)
    tl.store(drawn_ptr + b * K + k, tl.minimum(total, S).to(tl.int64))


def pass_options(num_classes: int, weighted: bool) -> dict[str, Any]:
    """Compile-time arguments and launch of the two passes over the pixels."""
    # With twice as many warps ptxas spills on sm_80.
    return {"ROWS": _rows(num_classes), "WEIGHTED": weighted, "BLOCK": _BLOCK, "num_warps": 4}


def order_options(num_classes: int, per_class: int) -> dict[str, Any]:
    """Compile-time arguments and launch of the sort."""
    return {"ROWS": _rows(num_classes), "SIZE": max(16, triton.next_power_of_2(per_class)), "num_warps": 8}


def _rows(num_classes: int) -> int:
    """One for each class and at least one for pixels of none."""
    return triton.next_power_of_2(num_classes + 1)


def sample_anchors(
    labels: Tensor, weight: Tensor | None, seed: Tensor, image_index: Tensor, num_classes: int, per_class: int
) -> tuple[Tensor, Tensor]:
    """indices int64 [B, K, S] and counts int64 [B, K]; B up to 65535, K up to 31, S up to 2048, pixels up to 2^30."""
    batch, pixels = labels.shape[0], labels[:1].numel()
    indices = seed.new_empty(batch, num_classes, per_class)
    counts = seed.new_empty(batch, num_classes)
    if not batch:
        return indices, counts
    labels, seed, image_index = labels.contiguous(), seed.contiguous(), image_index.contiguous()
    weight = None if weight is None else weight.float().contiguous()
    blocks = max(1, triton.cdiv(pixels, _BLOCK))
    parts = min(blocks, _MOST_PARTS)
    steps = triton.cdiv(blocks, parts)
    rows = _rows(num_classes)
    times = labels.new_empty(batch, pixels, dtype=torch.uint32)
    bins = labels.new_empty(batch, parts, rows, _BINS.value, dtype=torch.int32)
    start, total = (labels.new_empty(batch, rows, dtype=torch.int32) for _ in range(2))
    candidates = seed.new_empty(batch, pixels)
    sizes = (pixels, num_classes, per_class)
    options = pass_options(num_classes, weight is not None)
    times_kernel[parts, batch](labels, weight, seed, image_index, times, bins, pixels, num_classes, steps, **options)
    collect_kernel[parts, batch](labels, times, bins, candidates, start, total, *sizes, steps, **options)
    order_kernel[num_classes, batch](
        candidates, start, total, indices, counts, *sizes, **order_options(num_classes, per_class)
    )
    return indices, counts
