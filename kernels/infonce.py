"""Pixel InfoNCE in Triton: forward, and backward for anchors and for candidates with the logits computed again.

No M x N matrix is held. A program owns a tile of rows (anchors forward and in their backward, candidates in theirs) and
walks over the other side, so that every sum has one owner and one order: no atomics, the same bits in every run. The
arguments are those of the registered operations, already checked; what the numbers mean stands in the package's
reference of the operation.

Logits are kept in base 2: exp2 is what the hardware has. Accumulation is fp32 for every input; fp32 inputs are
multiplied in three tf32 products or in one, as `dot_precision` says.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN2: tl.constexpr = tl.constexpr(math.log(2))


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
    d = tl.arange(0, BLOCK_D)
    product = tl.zeros([rows.shape[0], columns.shape[0]], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = start + d < D
        left = tl.load(
            row_ptr + rows.to(tl.int64)[:, None] * D + (start + d)[None, :],
            mask=row_counts[:, None] & inside[None, :],
            other=0.0,
        )
        right = tl.load(
            column_ptr + columns.to(tl.int64)[:, None] * D + (start + d)[None, :],
            mask=column_counts[:, None] & inside[None, :],
            other=0.0,
        )
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        product = tl.dot(left, tl.trans(right), product, input_precision=DOT_PRECISION)
    return product


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
    M,
    N,
    scale,
    D: tl.constexpr,
    SUPCON: tl.constexpr,
    HAS_SELF: tl.constexpr,
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
    own = (
        tl.load(self_ptr + rows, mask=in_rows, other=-1).to(tl.int32) if HAS_SELF else tl.full([BLOCK_M], -1, tl.int32)
    )
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    positive_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    num_positives = tl.zeros([BLOCK_M], dtype=tl.int32)
    num_negatives = tl.zeros([BLOCK_M], dtype=tl.int32)
    for start in range(0, N, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        label = tl.load(candidate_label_ptr + columns, mask=columns < N, other=-1)
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
    M,
    N,
    scale,
    D: tl.constexpr,
    SUPCON: tl.constexpr,
    HAS_SELF: tl.constexpr,
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
    own = (
        tl.load(self_ptr + rows, mask=in_rows, other=-1).to(tl.int32) if HAS_SELF else tl.full([BLOCK_M], -1, tl.int32)
    )
    num_positives = tl.load(positives_ptr + rows, mask=in_rows, other=0)
    row_counts = num_positives > 0
    lse = tl.load(lse_ptr + rows, mask=row_counts, other=0.0) * LOG2E
    loss = tl.zeros([BLOCK_M], dtype=tl.float32)
    weight = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        label = tl.load(candidate_label_ptr + columns, mask=columns < N, other=-1)
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
    M,
    N,
    scale,
    inverse_temperature,
    D: tl.constexpr,
    SUPCON: tl.constexpr,
    HAS_SELF: tl.constexpr,
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
    own = (
        tl.load(self_ptr + rows, mask=in_rows, other=-1).to(tl.int32) if HAS_SELF else tl.full([BLOCK_M], -1, tl.int32)
    )
    positives = tl.load(positives_ptr + rows, mask=in_rows, other=0)
    row_counts = positives > 0
    lse = tl.load(lse_ptr + rows, mask=row_counts, other=0.0) * LOG2E
    factor = tl.load(grad_loss_ptr + rows, mask=row_counts, other=0.0).to(tl.float32)
    push = tl.load(weight_ptr + rows, mask=row_counts, other=0.0)
    pull = 1.0 / tl.maximum(positives, 1).to(tl.float32)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    gradient = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        label = tl.load(candidate_label_ptr + columns, mask=columns < N, other=-1)
        logits = scale * _tile_logits(
            anchor_ptr, candidate_ptr, rows, columns, row_counts, label >= 0, D, BLOCK_D, WIDEN, DOT_PRECISION
        )
        counted = row_counts[:, None] & (label >= 0)[None, :] & (own[:, None] != columns[None, :])
        positive = row_label[:, None] == label[None, :]
        slope = _tile_gradient(
            logits, lse[:, None], factor[:, None], push[:, None], pull[:, None], positive, counted, SUPCON
        )
        values = tl.load(
            candidate_ptr + columns.to(tl.int64)[:, None] * D + d[None, :],
            mask=(label >= 0)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        if WIDEN:
            values = values.to(tl.float32)
        gradient = tl.dot(slope.to(values.dtype), values, gradient, input_precision=DOT_PRECISION)
    gradient = gradient * inverse_temperature
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
    M,
    N,
    scale,
    inverse_temperature,
    D: tl.constexpr,
    SUPCON: tl.constexpr,
    HAS_SELF: tl.constexpr,
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
    for start in range(0, M, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        in_rows = rows < M
        row_label = tl.load(anchor_label_ptr + rows, mask=in_rows, other=-1)
        own = (
            tl.load(self_ptr + rows, mask=in_rows, other=-1).to(tl.int32)
            if HAS_SELF
            else tl.full([BLOCK_M], -1, tl.int32)
        )
        positives = tl.load(positives_ptr + rows, mask=in_rows, other=0)
        row_counts = positives > 0
        lse = tl.load(lse_ptr + rows, mask=row_counts, other=0.0) * LOG2E
        factor = tl.load(grad_loss_ptr + rows, mask=row_counts, other=0.0).to(tl.float32)
        push = tl.load(weight_ptr + rows, mask=row_counts, other=0.0)
        pull = 1.0 / tl.maximum(positives, 1).to(tl.float32)
        logits = scale * _tile_logits(
            candidate_ptr, anchor_ptr, columns, rows, label >= 0, row_counts, D, BLOCK_D, WIDEN, DOT_PRECISION
        )
        counted = (label >= 0)[:, None] & row_counts[None, :] & (columns[:, None] != own[None, :])
        positive = label[:, None] == row_label[None, :]
        slope = _tile_gradient(
            logits, lse[None, :], factor[None, :], push[None, :], pull[None, :], positive, counted, SUPCON
        )
        values = tl.load(
            anchor_ptr + rows.to(tl.int64)[:, None] * D + d[None, :],
            mask=row_counts[:, None] & (d < D)[None, :],
            other=0.0,
        )
        if WIDEN:
            values = values.to(tl.float32)
        gradient = tl.dot(slope.to(values.dtype), values, gradient, input_precision=DOT_PRECISION)
    gradient = gradient * inverse_temperature
    tl.store(
        grad_ptr + columns.to(tl.int64)[:, None] * D + d[None, :],
        gradient.to(grad_ptr.dtype.element_ty),
        mask=in_columns[:, None] & (d < D)[None, :],
    )


def block_of(dim: int) -> int:
    """How many of D features a program holds at once: a power of two, at least what a matrix unit takes."""
    return min(128, max(16, triton.next_power_of_2(dim)))


def dot_precision(dtype: torch.dtype) -> str:
    """What torch's own products of fp32 are allowed: three tf32 products, which keep fp32's accuracy, or one."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def options(features: Tensor, variant: str, self_index: Tensor | None) -> dict[str, Any]:
    """The compile-time arguments of all three kernels. Tiles for which no architecture spills; not yet tuned on any."""
    return {
        "D": features.shape[1],
        "SUPCON": variant == "supcon",
        "HAS_SELF": self_index is not None,
        # Three tf32 products of a fp32 one take registers for its parts.
        "BLOCK_M": 32 if features.dtype == torch.float32 else 64,
        "BLOCK_N": 32,
        "BLOCK_D": block_of(features.shape[1]),
        # Under TRITON_INTERPRET=1 a product of bf16 would read their bits as integers.
        "WIDEN": not isinstance(forward_kernel, triton.JITFunction),
        "DOT_PRECISION": dot_precision(features.dtype),
        "num_warps": 8,
        "num_stages": 2,
    }


def pixel_infonce(
    anchors: Tensor,
    candidates: Tensor,
    anchor_labels: Tensor,
    candidate_labels: Tensor,
    self_index: Tensor | None,
    temperature: float,
    variant: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, lse and weight float32 [M] and num_positives int64 [M] of contiguous features."""
    anchors, candidates = anchors.contiguous(), candidates.contiguous()
    rows, columns = anchors.shape[0], candidates.shape[0]
    loss, lse, weight = (anchors.new_empty(rows, dtype=torch.float32) for _ in range(3))
    num_positives = torch.empty_like(anchor_labels)
    constants = options(anchors, variant, self_index)
    for kernel in (forward_kernel,) if variant == "supcon" else (forward_kernel, positives_kernel):
        if rows:
            kernel[(triton.cdiv(rows, constants["BLOCK_M"]),)](
                anchors,
                candidates,
                anchor_labels,
                candidate_labels,
                self_index,
                loss,
                lse,
                weight,
                num_positives,
                rows,
                columns,
                LOG2E.value / temperature,
                **constants,
            )
    return loss, lse, weight, num_positives


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
    anchors, candidates, grad_loss = anchors.contiguous(), candidates.contiguous(), grad_loss.contiguous()
    (rows, dim), columns = anchors.shape, candidates.shape[0]
    grad_anchors, grad_candidates = (
        features.new_empty(features.shape if needed else 0, dtype=dtype or features.dtype)
        for features, needed in ((anchors, need_anchors), (candidates, need_candidates))
    )
    constants = options(anchors, variant, self_index)
    slices = triton.cdiv(dim, constants["BLOCK_D"])
    for kernel, gradient, length, block in (
        (anchor_gradient_kernel, grad_anchors, rows, constants["BLOCK_M"]),
        (candidate_gradient_kernel, grad_candidates, columns, constants["BLOCK_N"]),
    ):
        if gradient.numel():
            kernel[(triton.cdiv(length, block), slices)](
                anchors,
                candidates,
                anchor_labels,
                candidate_labels,
                self_index,
                grad_loss,
                lse,
                weight,
                num_positives,
                gradient,
                rows,
                columns,
                LOG2E.value / temperature,
                1.0 / temperature,
                **constants,
            )
    return grad_anchors, grad_candidates
