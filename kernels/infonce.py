"""Pixel InfoNCE in Triton: forward, and backward for anchors and for candidates with the logits computed again.

No M x N matrix is held. A program owns a tile of rows (anchors forward and in their backward, candidates in theirs) and
walks over the other side, so that every sum has one owner and one order: no atomics, the same bits in every run. The
arguments are those of the registered operations, already checked; what the numbers mean stands in the package's
reference of the operation.

Large problems are PREPARED: both sides are sorted by label, so that a tile of rows meets its positives in one range
of columns, `first` to `last`, and nothing but negatives from `start` to `first` and from `last` on. There a logit costs
a product and an exponential: no labels, no masks, and no running maximum either where the features' lengths bound all
logits (`limit`), as unit length and a temperature above 0.024 do.

Logits are kept in base 2: exp2 is what the hardware has. Accumulation is fp32 for every input; fp32 inputs are
multiplied in three tf32 products or in one, as `dot_precision` says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN2: tl.constexpr = tl.constexpr(math.log(2))


@triton.jit
def _tile_features(ptr, rows, row_counts, d, D: tl.constexpr, WIDEN: tl.constexpr):
    """Features d of rows [*, D]; rows that don't count are never read and give 0, as features from D on do."""
    features = tl.load(
        ptr + rows.to(tl.int64)[:, None] * D + d[None, :], mask=row_counts[:, None] & (d < D)[None, :], other=0.0
    )
    return features.to(tl.float32) if WIDEN else features


@triton.jit
def _own_candidates(self_ptr, rows, in_rows, HAS_SELF: tl.constexpr):
    """The candidate that each anchor itself is, or -1."""
    if HAS_SELF:
        return tl.load(self_ptr + rows, mask=in_rows, other=-1).to(tl.int32)
    else:
        return tl.full([rows.shape[0]], -1, tl.int32)


@triton.jit
def _anchor_state(grad_loss_ptr, lse_ptr, weight_ptr, rows, row_counts):
    """lse in base 2, factor and push of anchors: see `_tile_gradient`."""
    lse = tl.load(lse_ptr + rows, mask=row_counts, other=0.0) * LOG2E
    factor = tl.load(grad_loss_ptr + rows, mask=row_counts, other=0.0).to(tl.float32)
    return lse, factor, tl.load(weight_ptr + rows, mask=row_counts, other=0.0)


@triton.jit
def _tile_logits(
    row_ptr,
    column_ptr,
    rows,
    columns,
    row_counts,
    column_counts,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
):
    """Products [R, C] of rows [*, D] and columns [*, D]; rows that don't count are never read and give 0."""
    product = tl.zeros([rows.shape[0], columns.shape[0]], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        left = _tile_features(row_ptr, rows, row_counts, d, D, WIDEN)
        right = _tile_features(column_ptr, columns, column_counts, d, D, WIDEN)
        product = tl.dot(left, tl.trans(right), product, input_precision=DOT_PRECISION)
    return product


@triton.jit
def _bounds(bounds_ptr, tile):
    """start, first and last of a tile of rows: see above."""
    return tl.load(bounds_ptr + 3 * tile), tl.load(bounds_ptr + 3 * tile + 1), tl.load(bounds_ptr + 3 * tile + 2)


@triton.jit
def _negative_steps(start, first, last, length, BLOCK: tl.constexpr):
    """How many tiles of columns hold nothing but negatives: before the positives, and in all."""
    ahead = tl.cdiv(first - start, BLOCK)
    return ahead, ahead + tl.cdiv(length - last, BLOCK)


@triton.jit
def _negative_tile(step, ahead, start, first, last, length, BLOCK: tl.constexpr):
    """The columns of such a tile, and which of them are no positives and not beyond the end."""
    left = tl.where(step < ahead, start + step * BLOCK, last + (step - ahead) * BLOCK)
    columns = left + tl.arange(0, BLOCK)
    return columns, columns < tl.where(step < ahead, first, length)


@triton.jit
def forward_kernel(
    anchor_ptr,
    candidate_ptr,
    anchor_label_ptr,
    candidate_label_ptr,
    self_ptr,
    loss_ptr,
    lse_ptr,
    weight_ptr,
    positives_ptr,
    bounds_ptr,
    limit_ptr,
    M,
    N,
    scale,
    D: tl.constexpr,
    SUPCON: tl.constexpr,
    HAS_SELF: tl.constexpr,
    PREPARED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
):
    """lse float32 [M] and num_positives int64 [M], with SUPCON loss and weight too. scale: log2(e) / temperature."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < M
    row_label = tl.load(anchor_label_ptr + rows, mask=in_rows, other=-1)
    row_counts = row_label >= 0
    own = _own_candidates(self_ptr, rows, in_rows, HAS_SELF)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    positive_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    num_positives = tl.zeros([BLOCK_M], dtype=tl.int32)
    num_negatives = tl.zeros([BLOCK_M], dtype=tl.int32)
    first, last = 0, N
    if PREPARED:
        start, first, last = _bounds(bounds_ptr, tl.program_id(0))
        num_negatives += first - start + N - last
        ahead, steps = _negative_steps(start, first, last, N, BLOCK_N)
        limit = tl.load(limit_ptr)
        # Twice the limit is what fp32 has room for below the largest logit.
        if limit <= 60.0:
            top = tl.full([BLOCK_M], 0.0, tl.float32) + limit
            for step in range(steps):
                columns, inside = _negative_tile(step, ahead, start, first, last, N, BLOCK_N)
                product = _tile_logits(
                    anchor_ptr, candidate_ptr, rows, columns, row_counts, inside, D, BLOCK_D, WIDEN, DOT_PRECISION
                )
                shift = tl.where(inside, -limit, float("-inf"))
                total += tl.sum(tl.exp2(product * scale + shift[None, :]), axis=1)
        else:
            for step in range(steps):
                columns, inside = _negative_tile(step, ahead, start, first, last, N, BLOCK_N)
                product = _tile_logits(
                    anchor_ptr, candidate_ptr, rows, columns, row_counts, inside, D, BLOCK_D, WIDEN, DOT_PRECISION
                )
                shown = product * scale + tl.where(inside, 0.0, float("-inf"))[None, :]
                new_top = tl.maximum(top, tl.max(shown, axis=1))
                total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(shown - new_top[:, None]), axis=1)
                top = new_top
    for left in range(first, last, BLOCK_N):
        columns = left + tl.arange(0, BLOCK_N)
        label = tl.load(candidate_label_ptr + columns, mask=columns < last, other=-1)
        logits = scale * _tile_logits(
            anchor_ptr, candidate_ptr, rows, columns, row_counts, label >= 0, D, BLOCK_D, WIDEN, DOT_PRECISION
        )
        counted = row_counts[:, None] & (label >= 0)[None, :] & (own[:, None] != columns[None, :])
        same = row_label[:, None] == label[None, :]
        num_positives += tl.sum((counted & same).to(tl.int32), axis=1)
        num_negatives += tl.sum((counted & ~same).to(tl.int32), axis=1)
        denominator = counted if SUPCON else counted & ~same
        if SUPCON:
            positive_sum += tl.sum(tl.where(counted & same, logits, 0.0), axis=1)
        shown = tl.where(denominator, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(shown, axis=1))
        # Until a row has seen something its maximum is minus infinity, and differences with it would be NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(shown - shift[:, None]), axis=1)
        top = new_top
    valid = (num_positives > 0) & (num_negatives > 0)
    lse = tl.where(valid, top + tl.log2(tl.where(valid, total, 1.0)), 0.0)
    if SUPCON:
        loss = (lse - positive_sum / tl.maximum(num_positives, 1).to(tl.float32)) * LN2
        tl.store(loss_ptr + rows, tl.where(valid, loss, 0.0), mask=in_rows)
        tl.store(weight_ptr + rows, valid.to(tl.float32), mask=in_rows)
    tl.store(lse_ptr + rows, tl.where(valid, lse * LN2, float("inf")), mask=in_rows)
    tl.store(positives_ptr + rows, tl.where(valid, num_positives, 0).to(tl.int64), mask=in_rows)


@triton.jit
def positives_kernel(
    anchor_ptr,
    candidate_ptr,
    anchor_label_ptr,
    candidate_label_ptr,
    self_ptr,
    loss_ptr,
    lse_ptr,
    weight_ptr,
    positives_ptr,
    bounds_ptr,
    limit_ptr,
    M,
    N,
    scale,
    D: tl.constexpr,
    SUPCON: tl.constexpr,
    HAS_SELF: tl.constexpr,
    PREPARED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
):
    """The rest of "per_positive": loss and weight, means over the positives that need the finished lse."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < M
    row_label = tl.load(anchor_label_ptr + rows, mask=in_rows, other=-1)
    own = _own_candidates(self_ptr, rows, in_rows, HAS_SELF)
    num_positives = tl.load(positives_ptr + rows, mask=in_rows, other=0)
    row_counts = num_positives > 0
    lse = tl.load(lse_ptr + rows, mask=row_counts, other=0.0) * LOG2E
    loss = tl.zeros([BLOCK_M], dtype=tl.float32)
    weight = tl.zeros([BLOCK_M], dtype=tl.float32)
    first, last = 0, N
    if PREPARED:
        _, first, last = _bounds(bounds_ptr, tl.program_id(0))
    for left in range(first, last, BLOCK_N):
        columns = left + tl.arange(0, BLOCK_N)
        label = tl.load(candidate_label_ptr + columns, mask=columns < last, other=-1)
        counted = row_counts[:, None] & (own[:, None] != columns[None, :])
        positive = counted & (row_label[:, None] == label[None, :])
        logits = scale * _tile_logits(
            anchor_ptr, candidate_ptr, rows, columns, row_counts, label >= 0, D, BLOCK_D, WIDEN, DOT_PRECISION
        )
        gap = lse[:, None] - logits
        e = tl.exp2(-tl.abs(gap))
        softplus = tl.maximum(gap, 0.0) * LN2 + _log1p(e)
        sigmoid = tl.where(gap < 0.0, e, 1.0) / (1.0 + e)
        loss += tl.sum(tl.where(positive, softplus, 0.0), axis=1)
        weight += tl.sum(tl.where(positive, sigmoid, 0.0), axis=1)
    count = tl.maximum(num_positives, 1).to(tl.float32)
    tl.store(loss_ptr + rows, loss / count, mask=in_rows)
    tl.store(weight_ptr + rows, weight / count, mask=in_rows)


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1], also where 1 + x rounds to 1: 2 artanh(x / (2 + x)) by its series."""
    r = x / (2.0 + x)
    s = r * r
    p = s / 17 + 1.0 / 15
    p = p * s + 1.0 / 13
    p = p * s + 1.0 / 11
    p = p * s + 1.0 / 9
    p = p * s + 1.0 / 7
    p = p * s + 1.0 / 5
    p = p * s + 1.0 / 3
    p = p * s + 1.0
    return 2.0 * r * p


@triton.jit
def _tile_gradient(logits, lse, factor, push, pull, positive, counted, SUPCON: tl.constexpr):
    """d(grad . loss) / d(logit), masked. lse in base 2; factor: gradient of the row's loss, 0 where it doesn't count.

    push: its weight; pull: 1 / |P|. All three vectors run along the tile's anchors and are broadcast by the caller.
    """
    gap = logits - lse
    if SUPCON:
        slope = tl.exp2(gap) - tl.where(positive, pull, 0.0)
    else:
        e = tl.exp2(-tl.abs(gap))
        sigmoid = tl.where(gap > 0.0, e, 1.0) / (1.0 + e)
        slope = tl.where(positive, -pull * sigmoid, push * tl.exp2(gap))
    return tl.where(counted, factor * slope, 0.0)


@triton.jit
def anchor_gradient_kernel(
    anchor_ptr,
    candidate_ptr,
    anchor_label_ptr,
    candidate_label_ptr,
    self_ptr,
    grad_loss_ptr,
    lse_ptr,
    weight_ptr,
    positives_ptr,
    grad_ptr,
    unit_ptr,
    bounds_ptr,
    M,
    N,
    scale,
    inverse_temperature,
    D: tl.constexpr,
    SUPCON: tl.constexpr,
    HAS_SELF: tl.constexpr,
    PREPARED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
):
    """Gradient of the anchors: program (i, j) owns rows of tile i and columns of slice j of D."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < M
    row_label = tl.load(anchor_label_ptr + rows, mask=in_rows, other=-1)
    own = _own_candidates(self_ptr, rows, in_rows, HAS_SELF)
    positives = tl.load(positives_ptr + rows, mask=in_rows, other=0)
    row_counts = positives > 0
    lse, factor, push = _anchor_state(grad_loss_ptr, lse_ptr, weight_ptr, rows, row_counts)
    pull = 1.0 / tl.maximum(positives, 1).to(tl.float32)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    gradient = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    first, last = 0, N
    if PREPARED:
        start, first, last = _bounds(bounds_ptr, tl.program_id(0))
        ahead, steps = _negative_steps(start, first, last, N, BLOCK_N)
        for step in range(steps):
            columns, inside = _negative_tile(step, ahead, start, first, last, N, BLOCK_N)
            product = _tile_logits(
                anchor_ptr, candidate_ptr, rows, columns, row_counts, inside, D, BLOCK_D, WIDEN, DOT_PRECISION
            )
            shift = tl.where(inside, 0.0, float("-inf"))
            slope = (factor * push)[:, None] * tl.exp2(product * scale + shift[None, :] - lse[:, None])
            values = _tile_features(candidate_ptr, columns, inside, d, D, WIDEN)
            gradient = tl.dot(slope.to(values.dtype), values, gradient, input_precision=DOT_PRECISION)
    for left in range(first, last, BLOCK_N):
        columns = left + tl.arange(0, BLOCK_N)
        label = tl.load(candidate_label_ptr + columns, mask=columns < last, other=-1)
        logits = scale * _tile_logits(
            anchor_ptr, candidate_ptr, rows, columns, row_counts, label >= 0, D, BLOCK_D, WIDEN, DOT_PRECISION
        )
        counted = row_counts[:, None] & (label >= 0)[None, :] & (own[:, None] != columns[None, :])
        positive = row_label[:, None] == label[None, :]
        slope = _tile_gradient(
            logits, lse[:, None], factor[:, None], push[:, None], pull[:, None], positive, counted, SUPCON
        )
        values = _tile_features(candidate_ptr, columns, label >= 0, d, D, WIDEN)
        gradient = tl.dot(slope.to(values.dtype), values, gradient, input_precision=DOT_PRECISION)
    gradient = gradient * inverse_temperature
    if unit_ptr is not None:
        gradient = gradient * tl.load(unit_ptr)
    tl.store(
        grad_ptr + rows.to(tl.int64)[:, None] * D + d[None, :],
        gradient.to(grad_ptr.dtype.element_ty),
        mask=in_rows[:, None] & (d < D)[None, :],
    )


@triton.jit
def candidate_gradient_kernel(
    anchor_ptr,
    candidate_ptr,
    anchor_label_ptr,
    candidate_label_ptr,
    self_ptr,
    grad_loss_ptr,
    lse_ptr,
    weight_ptr,
    positives_ptr,
    grad_ptr,
    unit_ptr,
    bounds_ptr,
    M,
    N,
    scale,
    inverse_temperature,
    D: tl.constexpr,
    SUPCON: tl.constexpr,
    HAS_SELF: tl.constexpr,
    PREPARED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
):
    """Gradient of the candidates: program (i, j) owns candidates of tile i and columns of slice j of D."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = columns < N
    label = tl.load(candidate_label_ptr + columns, mask=in_columns, other=-1)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    gradient = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    first, last = 0, M
    if PREPARED:
        start, first, last = _bounds(bounds_ptr, tl.program_id(0))
        ahead, steps = _negative_steps(start, first, last, M, BLOCK_M)
        for step in range(steps):
            rows, inside = _negative_tile(step, ahead, start, first, last, M, BLOCK_M)
            row_counts = tl.load(positives_ptr + rows, mask=inside, other=0) > 0
            lse, factor, push = _anchor_state(grad_loss_ptr, lse_ptr, weight_ptr, rows, row_counts)
            product = _tile_logits(
                candidate_ptr, anchor_ptr, columns, rows, label >= 0, row_counts, D, BLOCK_D, WIDEN, DOT_PRECISION
            )
            slope = (factor * push)[None, :] * tl.exp2(product * scale - lse[None, :])
            values = _tile_features(anchor_ptr, rows, row_counts, d, D, WIDEN)
            gradient = tl.dot(slope.to(values.dtype), values, gradient, input_precision=DOT_PRECISION)
    for top in range(first, last, BLOCK_M):
        rows = top + tl.arange(0, BLOCK_M)
        in_rows = rows < last
        row_label = tl.load(anchor_label_ptr + rows, mask=in_rows, other=-1)
        own = _own_candidates(self_ptr, rows, in_rows, HAS_SELF)
        positives = tl.load(positives_ptr + rows, mask=in_rows, other=0)
        row_counts = positives > 0
        lse, factor, push = _anchor_state(grad_loss_ptr, lse_ptr, weight_ptr, rows, row_counts)
        pull = 1.0 / tl.maximum(positives, 1).to(tl.float32)
        logits = scale * _tile_logits(
            candidate_ptr, anchor_ptr, columns, rows, label >= 0, row_counts, D, BLOCK_D, WIDEN, DOT_PRECISION
        )
        counted = (label >= 0)[:, None] & row_counts[None, :] & (columns[:, None] != own[None, :])
        positive = label[:, None] == row_label[None, :]
        slope = _tile_gradient(
            logits, lse[None, :], factor[None, :], push[None, :], pull[None, :], positive, counted, SUPCON
        )
        values = _tile_features(anchor_ptr, rows, row_counts, d, D, WIDEN)
        gradient = tl.dot(slope.to(values.dtype), values, gradient, input_precision=DOT_PRECISION)
    # Candidates that are ignored have met negatives too.
    gradient = tl.where((label >= 0)[:, None], gradient * inverse_temperature, 0.0)
    if unit_ptr is not None:
        gradient = gradient * tl.load(unit_ptr)
    tl.store(
        grad_ptr + columns.to(tl.int64)[:, None] * D + d[None, :],
        gradient.to(grad_ptr.dtype.element_ty),
        mask=in_columns[:, None] & (d < D)[None, :],
    )


def block_of(dim: int, dtype: torch.dtype) -> int:
    """How many of D features a program holds at once: a power of two, at least what a matrix unit takes."""
    # In several steps, smaller ones leave registers for what is carried from one to the next.
    most = 64 if dtype == torch.float32 else 128
    return 64 if dim > most else max(16, triton.next_power_of_2(dim))


def dot_precision(dtype: torch.dtype) -> str:
    """What torch's own products of fp32 are allowed: three tf32 products, which keep fp32's accuracy, or one."""
    if dtype != torch.float32:
        return "ieee"
    # torch.get_float32_matmul_precision raises where somebody has set this.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def options(kernel: str, features: Tensor, variant: str, has_self: bool, prepared: bool) -> dict[str, Any]:
    """The compile-time arguments of a kernel and its launch."""
    return {
        "D": features.shape[1],
        "SUPCON": variant == "supcon",
        "HAS_SELF": has_self,
        "PREPARED": prepared,
        "BLOCK_D": block_of(features.shape[1], features.dtype),
        # Under TRITON_INTERPRET=1 a product of bf16 would read their bits as integers.
        "WIDEN": not isinstance(forward_kernel, triton.JITFunction),
        "DOT_PRECISION": dot_precision(features.dtype),
        **tuning.tiles("infonce", kernel, features),
    }


# Slopes are a share, at most 1 in magnitude, of the factor of their anchor; float16 goes up to 65504.
_FLOAT16_UNIT = 2.0**-14

SORT_FROM = 2048 * 2048
"""Pairs from which on sorting is worth its dozen launches. Estimated; no GPU has measured it yet."""


@dataclass(frozen=True)
class _Problem:
    """What the kernels read, and the order of its rows if it is prepared.

    own: int64 [M], the candidate that is the anchor itself or -1; None if there is none. anchor_order, candidate_order:
    int64, which of the caller's rows stands where. limit: float32 [1], no logit in base 2 is larger.
    """

    anchors: Tensor
    candidates: Tensor
    anchor_labels: Tensor
    candidate_labels: Tensor
    own: Tensor | None
    temperature: float
    variant: str
    anchor_order: Tensor | None = None
    candidate_order: Tensor | None = None
    limit: Tensor | None = None

    @classmethod
    def of(
        cls,
        anchors: Tensor,
        candidates: Tensor,
        anchor_labels: Tensor,
        candidate_labels: Tensor,
        self_index: Tensor | None,
        temperature: float,
        variant: str,
    ) -> _Problem:
        """As it is where it is small, sorted by label where not. No host synchronisation."""
        if anchors.shape[0] * candidates.shape[0] < SORT_FROM:
            features = anchors.contiguous(), candidates.contiguous()
            labels = anchor_labels.contiguous(), candidate_labels.contiguous()
            own = None if self_index is None else self_index.contiguous()
            return cls(*features, *labels, own, temperature, variant)
        anchor_labels, anchor_order = anchor_labels.sort(stable=True)
        candidate_labels, candidate_order = candidate_labels.sort(stable=True)
        anchors, candidates = anchors[anchor_order], candidates[candidate_order]
        own = None
        if self_index is not None:
            place = torch.empty_like(candidate_order)
            place[candidate_order] = torch.arange(len(place), device=place.device)
            own = torch.where(self_index >= 0, place[self_index.clamp_min(0)], -1)[anchor_order]
        longest = [
            torch.where(labels >= 0, torch.linalg.vector_norm(features, dim=1, dtype=torch.float32), 0).amax()
            for features, labels in ((anchors, anchor_labels), (candidates, candidate_labels))
        ]
        limit = longest[0] * longest[1] * (LOG2E.value / temperature)
        labels = (anchor_labels, candidate_labels)
        return cls(anchors, candidates, *labels, own, temperature, variant, anchor_order, candidate_order, limit)

    @property
    def prepared(self) -> bool:
        return self.limit is not None

    def constants(self, kernel: str) -> dict[str, Any]:
        return options(kernel, self.anchors, self.variant, self.own is not None, self.prepared)

    def arguments(self) -> tuple[Tensor | None, ...]:
        """The first arguments of every kernel."""
        return self.anchors, self.candidates, self.anchor_labels, self.candidate_labels, self.own

    def sizes(self) -> tuple[int, int, float]:
        return self.anchors.shape[0], self.candidates.shape[0], LOG2E.value / self.temperature

    def sorted_like_anchors(self, values: Tensor) -> Tensor:
        return values.contiguous() if self.anchor_order is None else values[self.anchor_order]

    def bounds_of_anchors(self, block: int) -> Tensor | None:
        """For tiles of anchors, over candidates."""
        return self._bounds(self.anchor_labels, self.candidate_labels, block, of_anchors=True)

    def bounds_of_candidates(self, block: int) -> Tensor | None:
        """For tiles of candidates, over anchors."""
        return self._bounds(self.candidate_labels, self.anchor_labels, block, of_anchors=False)

    def _bounds(self, row_labels: Tensor, column_labels: Tensor, block: int, *, of_anchors: bool) -> Tensor | None:
        """start, first and last, int32 [tiles, 3], of tiles of `block` rows; see the head of this file."""
        if not self.prepared:
            return None
        length = len(column_labels)
        ends = torch.arange(block - 1, len(row_labels) + block - 1, block, device=row_labels.device)
        low = row_labels[::block].clamp_min(0)
        high = row_labels[ends.clamp_max(len(row_labels) - 1)]
        first = torch.searchsorted(column_labels, low)
        last = torch.searchsorted(column_labels, high, right=True)
        # Where all rows are ignored there is nothing to walk over.
        first, last = (torch.where(high < 0, length, bound) for bound in (first, last))
        if self.own is not None:
            # An anchor that is a candidate of another label is left out as well, where labels are compared.
            named = (self.own >= 0) & (self.anchor_labels >= 0)
            anchor, candidate = torch.arange(len(self.own), device=self.own.device), self.own.clamp_min(0)
            row, column = (anchor, candidate) if of_anchors else (candidate, anchor)
            first = first.scatter_reduce(0, row // block, torch.where(named, column, length), "amin")
            last = last.scatter_reduce(0, row // block, torch.where(named, column + 1, 0), "amax")
        start = torch.searchsorted(column_labels, torch.zeros_like(low))
        start = torch.minimum(torch.where(high < 0, length, start), first)
        return torch.stack([start, first, last], dim=1).int()


def _in_order(values: Tensor, order: Tensor | None) -> Tensor:
    """Rows back where the caller has them."""
    return values if order is None else torch.empty_like(values).index_copy_(0, order, values)


def pixel_infonce(
    anchors: Tensor,
    candidates: Tensor,
    anchor_labels: Tensor,
    candidate_labels: Tensor,
    self_index: Tensor | None,
    temperature: float,
    variant: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, lse and weight float32 [M] and num_positives int64 [M]."""
    problem = _Problem.of(anchors, candidates, anchor_labels, candidate_labels, self_index, temperature, variant)
    rows = anchors.shape[0]
    loss, lse, weight = (anchors.new_empty(rows, dtype=torch.float32) for _ in range(3))
    num_positives = torch.empty_like(anchor_labels)
    for kernel in (forward_kernel,) if variant == "supcon" else (forward_kernel, positives_kernel):
        constants = problem.constants(kernel.fn.__name__)
        if rows:
            kernel[(triton.cdiv(rows, constants["BLOCK_M"]),)](
                *problem.arguments(),
                loss,
                lse,
                weight,
                num_positives,
                problem.bounds_of_anchors(constants["BLOCK_M"]),
                problem.limit,
                *problem.sizes(),
                **constants,
            )
    loss, lse, weight, num_positives = (
        _in_order(values, problem.anchor_order) for values in (loss, lse, weight, num_positives)
    )
    return loss, lse, weight, num_positives


def _in_units(grad_loss: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """grad_loss and what its unit is, float32 [], by which the kernels multiply their results; None is 1.

    Slopes are rounded to the features' dtype, and float16 has no room for a caller's factor, such as one over the
    number of anchors: of a softmax with as many candidates there would be nothing left.
    """
    if dtype != torch.float16 or not grad_loss.numel():
        return grad_loss, None
    largest = grad_loss.abs().amax()
    unit = torch.where(largest > 0, largest, 1.0) * _FLOAT16_UNIT
    return grad_loss / unit, unit


def pixel_infonce_backward(
    grad_loss: Tensor,
    lse: Tensor,
    weight: Tensor,
    num_positives: Tensor,
    anchors: Tensor,
    candidates: Tensor,
    anchor_labels: Tensor,
    candidate_labels: Tensor,
    self_index: Tensor | None,
    temperature: float,
    variant: str,
    need_anchors: bool,
    need_candidates: bool,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the anchors and the candidates, in their dtype or in `dtype`; one not needed is empty, [0]."""
    problem = _Problem.of(anchors, candidates, anchor_labels, candidate_labels, self_index, temperature, variant)
    grad_loss, unit = _in_units(grad_loss, anchors.dtype)
    state = [problem.sorted_like_anchors(values) for values in (grad_loss, lse, weight, num_positives)]
    gradients = []
    for kernel, features, needed, tile, bounds, order in (
        (anchor_gradient_kernel, anchors, need_anchors, "BLOCK_M", problem.bounds_of_anchors, problem.anchor_order),
        (
            candidate_gradient_kernel,
            candidates,
            need_candidates,
            "BLOCK_N",
            problem.bounds_of_candidates,
            problem.candidate_order,
        ),
    ):
        gradient = features.new_empty(features.shape if needed else 0, dtype=dtype or features.dtype)
        constants = problem.constants(kernel.fn.__name__)
        if gradient.numel():
            grid = triton.cdiv(features.shape[0], constants[tile]), triton.cdiv(features.shape[1], constants["BLOCK_D"])
            kernel[grid](
                *problem.arguments(),
                *state,
                gradient,
                unit,
                bounds(constants[tile]),
                *problem.sizes(),
                1.0 / temperature,
                **constants,
            )
            gradient = _in_order(gradient, order)
        gradients.append(gradient)
    return gradients[0], gradients[1]
