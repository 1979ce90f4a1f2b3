"""Pixel InfoNCE on the CPU: tiles of logits that stay in cache, torch's matrix products, C++ for what is between them.

No M x N matrix is ever held. Candidates are sorted by label, so that an anchor's positives are one range of columns;
rows that count for nothing are left out before the first product. The positive part of "supcon" is linear in the
logits and needs no tile: the mean over positives of s_ip is one product with the sum of the class. State and formulas:
`ops.reference`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# A tile of 2 MB: 0.8% of the logits of 8192 anchors and candidates. Not tuned yet.
_TILE_ROWS = 512
_TILE_COLUMNS = 1024


@dataclass(frozen=True)
class _Plan:
    """Which rows take part, in which order, and where each anchor's positives are.

    rows: int64 [m], the anchors that count, by label. columns: int64 [n], the candidates that are not ignored, by
    label. column_class: int64 [n], the number of each one's label. begin, end: int64 [m], each anchor's positives among
    the sorted candidates, the anchor itself included. own: int64 [m], the sorted candidate that is the anchor itself,
    or -1. own_positive: bool [m], whether that is among the positives. num_positives: int64 [m], without it.
    """

    rows: Tensor
    columns: Tensor
    column_class: Tensor
    begin: Tensor
    end: Tensor
    own: Tensor
    own_positive: Tensor
    num_positives: Tensor

    @classmethod
    def of(cls, anchor_labels: Tensor, candidate_labels: Tensor, self_index: Tensor | None) -> _Plan:
        labels, columns = candidate_labels.sort(stable=True)
        ignored = int(torch.searchsorted(labels, 0))
        labels, columns = labels[ignored:].contiguous(), columns[ignored:]
        begin = torch.searchsorted(labels, anchor_labels)
        end = torch.searchsorted(labels, anchor_labels, right=True)
        own = torch.full_like(anchor_labels, -1)
        if self_index is not None:
            place = torch.full_like(candidate_labels, -1)
            place[columns] = torch.arange(len(columns))
            named = self_index >= 0
            own[named] = place[self_index[named]]
        own_positive = (own >= begin) & (own < end)
        num_positives = end - begin - own_positive.long()
        num_negatives = len(columns) - (end - begin) - ((own >= 0) & ~own_positive).long()
        rows = ((anchor_labels >= 0) & (num_positives > 0) & (num_negatives > 0)).nonzero().flatten()
        rows = rows[begin[rows].argsort(stable=True)]
        picked = (value[rows] for value in (begin, end, own, own_positive, num_positives))
        return cls(rows, columns, labels.unique_consecutive(return_inverse=True)[1], *picked)

    def bounds(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """begin, end, own of a tile's rows."""
        return self.begin[rows], self.end[rows], self.own[rows]

    def class_sums(self, values: Tensor, owner: Tensor) -> Tensor:
        """Sums float64 [K, D] of rows [*, D] by their class."""
        classes = int(self.column_class[-1]) + 1 if len(self.column_class) else 0
        return values.new_zeros(classes, values.shape[1], dtype=torch.float64).index_add_(0, owner, values.double())

    @property
    def row_class(self) -> Tensor:
        """The class of each anchor, int64 [m]: an anchor that counts has positives."""
        return self.column_class[self.begin]


def _tiles(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    for top in range(0, rows, _TILE_ROWS):
        for left in range(0, columns, _TILE_COLUMNS):
            yield slice(top, min(top + _TILE_ROWS, rows)), slice(left, min(left + _TILE_COLUMNS, columns))


class _Logits:
    """Tiles of logits of scaled anchors [m, D] against candidates [n, D], one after the other in the same memory."""

    def __init__(self, anchors: Tensor, candidates: Tensor) -> None:
        self.anchors, self.candidates = anchors, candidates
        self.memory = torch.empty(
            min(_TILE_ROWS, len(anchors)) * min(_TILE_COLUMNS, len(candidates)), dtype=torch.float32
        )

    def __call__(self, rows: slice, columns: slice) -> Tensor:
        anchors, candidates = self.anchors[rows], self.candidates[columns]
        shape = (len(anchors), len(candidates))
        return torch.mm(anchors, candidates.T, out=self.memory[: shape[0] * shape[1]].view(shape))


def pixel_infonce(
    anchors: Tensor,
    candidates: Tensor,
    anchor_labels: Tensor,
    candidate_labels: Tensor,
    self_index: Tensor | None,
    temperature: float,
    variant: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.pixel_infonce`, without M x N memory."""
    plan = _Plan.of(anchor_labels, candidate_labels, self_index)
    scaled, columns = anchors[plan.rows].float() / temperature, candidates[plan.columns].float()
    logits, count = _Logits(scaled, columns), len(plan.rows)
    supcon = variant == "supcon"
    top = torch.full((count,), -math.inf)
    total = torch.zeros(count, dtype=torch.float64)
    for rows, cols in _tiles(count, len(columns)):
        torch.ops.cldf_fast.infonce_denominator(
            logits(rows, cols), cols.start, *plan.bounds(rows), supcon, top[rows], total[rows]
        )
    lse = total.log() + top
    if supcon:
        class_sum = plan.class_sums(columns, plan.column_class)[plan.row_class]
        own = torch.where(plan.own_positive.unsqueeze(1), columns[plan.own], 0.0)
        positive_sum = (scaled.double() * (class_sum - own)).sum(dim=1)
        loss, weight = lse - positive_sum / plan.num_positives, torch.ones_like(lse)
    else:
        loss, weight = torch.zeros_like(lse), torch.zeros_like(lse)
        level = lse.float()
        for rows, cols in _positive_tiles(plan):
            torch.ops.cldf_fast.infonce_positives(
                logits(rows, cols), cols.start, *plan.bounds(rows), level[rows], loss[rows], weight[rows]
            )
        loss, weight = loss / plan.num_positives, weight / plan.num_positives
    return (
        _scatter(loss, plan, anchors, 0),
        _scatter(lse, plan, anchors, math.inf),
        _scatter(weight, plan, anchors, 0),
        torch.zeros_like(anchor_labels).index_copy_(0, plan.rows, plan.num_positives),
    )


def _positive_tiles(plan: _Plan) -> Iterator[tuple[slice, slice]]:
    """The tiles that hold positives: anchors are sorted by label too, so that few do."""
    for top in range(0, len(plan.rows), _TILE_ROWS):
        rows = slice(top, min(top + _TILE_ROWS, len(plan.rows)))
        first, last = int(plan.begin[rows].min()), int(plan.end[rows].max())
        for left in range(first, last, _TILE_COLUMNS):
            yield rows, slice(left, min(left + _TILE_COLUMNS, last))


def _scatter(values: Tensor, plan: _Plan, anchors: Tensor, rest: float) -> Tensor:
    """float32 [M] from the anchors that count and the value of those that don't."""
    return anchors.new_full(anchors.shape[:1], rest, dtype=torch.float32).index_copy_(0, plan.rows, values.float())


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
) -> tuple[Tensor, Tensor]:
    """As `reference.pixel_infonce_backward`, the logits computed again tile by tile."""
    plan = _Plan.of(anchor_labels, candidate_labels, self_index)
    scaled, columns = anchors[plan.rows].float() / temperature, candidates[plan.columns].float()
    logits, supcon = _Logits(scaled, columns), variant == "supcon"
    grad, level = grad_loss.float()[plan.rows], lse[plan.rows]
    per_negative, per_positive = grad * weight[plan.rows], -grad / plan.num_positives
    grad_anchors = torch.zeros_like(scaled) if need_anchors else None
    grad_candidates = torch.zeros_like(columns) if need_candidates else None
    for rows, cols in _tiles(len(scaled), len(columns)):
        tile = logits(rows, cols)
        torch.ops.cldf_fast.infonce_gradient(
            tile, cols.start, *plan.bounds(rows), supcon, level[rows], per_negative[rows], per_positive[rows]
        )
        if grad_anchors is not None:
            grad_anchors[rows].addmm_(tile, columns[cols])
        if grad_candidates is not None:
            grad_candidates[cols].addmm_(tile.T, scaled[rows])
    if supcon:
        coefficient = per_positive.double().unsqueeze(1)
        has_own = plan.own_positive.unsqueeze(1)
        if grad_anchors is not None:
            class_sum = plan.class_sums(columns, plan.column_class)[plan.row_class]
            grad_anchors += coefficient * (class_sum - torch.where(has_own, columns[plan.own], 0.0))
        if grad_candidates is not None:
            pull = coefficient * scaled
            grad_candidates += plan.class_sums(pull, plan.row_class)[plan.column_class]
            grad_candidates.index_add_(0, plan.own[plan.own_positive], -pull[plan.own_positive].float())
    empty = anchors.new_empty(0)
    return (
        empty if grad_anchors is None else _spread(grad_anchors / temperature, plan.rows, anchors),
        empty if grad_candidates is None else _spread(grad_candidates, plan.columns, candidates),
    )


def _spread(grad: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """The gradient of all rows: zero for those that took no part."""
    return torch.zeros_like(like).index_copy_(0, rows, grad.to(like.dtype))
