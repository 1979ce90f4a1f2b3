"""Pixel InfoNCE on the CPU: what the C++ sweep of csrc/cpu/infonce.cpp needs to know, and its results put in place.

No M x N matrix is ever held. Candidates and anchors are sorted by label, and rows that count for nothing are left out
before the first product. State and formulas: `ops.reference`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class _Plan:
    """Which rows take part, in which order.

    rows: int64 [m], the anchors that count, by label. row_class: int32 [m]. own: int64 [m], the sorted candidate that
    is the anchor itself, or -1. num_positives: int64 [m], without it. columns: int64 [n], the candidates that are not
    ignored, by label. column_class: int32 [n], the number of each one's label.
    """

    rows: Tensor
    row_class: Tensor
    own: Tensor
    num_positives: Tensor
    columns: Tensor
    column_class: Tensor

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
        column_class = labels.unique_consecutive(return_inverse=True)[1].int()
        # An anchor that counts has positives, whose class is its own.
        return cls(rows, column_class[begin[rows]], own[rows], num_positives[rows], columns, column_class)


def _sweep(
    plan: _Plan,
    anchors: Tensor,
    candidates: Tensor,
    temperature: float,
    variant: str,
    state: Tensor,
    *,
    forward: bool,
    grad: Tensor | None = None,
    need_anchors: bool = False,
    need_candidates: bool = False,
    num_differentiable: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients float32 [M, D] and [N, D], empty, [0], where not needed.

    state: loss, lse and weight of the anchors that count, float64 [3, m], written with `forward` and read without.
    grad: [m], the gradient of each loss. num_differentiable: the candidates beyond have a gradient of 0; None: none.
    """
    anchors = anchors.float().contiguous()
    dim = candidates.shape[1]
    gathered = _in_order_of_classes(candidates, plan.columns)
    grad_anchors = torch.zeros_like(anchors) if need_anchors else None
    sorted_gradient = torch.zeros_like(gathered) if need_candidates else None
    torch.ops.cldf_fast.infonce_sweep(
        anchors,
        plan.rows,
        plan.row_class,
        plan.own,
        plan.num_positives,
        gathered,
        plan.column_class,
        plan.columns < (len(candidates) if num_differentiable is None else num_differentiable),
        float(torch.linalg.vector_norm(gathered, dim=1).amax()) if len(gathered) else 0.0,
        temperature,
        variant == "supcon",
        forward,
        *state,
        grad.float() if grad is not None and (need_anchors or need_candidates) else None,
        grad_anchors,
        sorted_gradient,
    )
    # Before the gradient gets memory in the caller's order: the peak is what users pay.
    del gathered
    grad_candidates = None
    if sorted_gradient is not None:
        grad_candidates = anchors.new_zeros(candidates.shape).index_copy_(0, plan.columns, sorted_gradient[:, :dim])
    return (
        anchors.new_empty(0) if grad_anchors is None else grad_anchors,
        anchors.new_empty(0) if grad_candidates is None else grad_candidates,
    )


def _in_order_of_classes(features: Tensor, columns: Tensor) -> Tensor:
    """float32 [n, D'], these rows, filled up to whole vectors of any instruction set."""
    gathered, padding = features.float()[columns], -features.shape[1] % 16
    return F.pad(gathered, (0, padding)) if padding else gathered


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
    state = torch.zeros(3, len(plan.rows), dtype=torch.float64)
    _sweep(plan, anchors, candidates, temperature, variant, state, forward=True)

    def spread(values: Tensor, rest: float) -> Tensor:
        """float32 [M] from the anchors that count and the value of those that don't."""
        return torch.full(anchors.shape[:1], rest, dtype=torch.float32).index_copy_(0, plan.rows, values.float())

    loss, lse, weight = state
    num_positives = torch.zeros_like(anchor_labels).index_copy_(0, plan.rows, plan.num_positives)
    return spread(loss, 0), spread(lse, math.inf), spread(weight, 0), num_positives


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
    """As `reference.pixel_infonce_backward`, the logits computed again."""
    plan = _Plan.of(anchor_labels, candidate_labels, self_index)
    state = torch.stack([torch.zeros_like(lse), lse, weight])[:, plan.rows].double()
    grad_anchors, grad_candidates = _sweep(
        plan,
        anchors,
        candidates,
        temperature,
        variant,
        state,
        forward=False,
        grad=grad_loss[plan.rows],
        need_anchors=need_anchors,
        need_candidates=need_candidates,
    )
    return grad_anchors.to(anchors.dtype), grad_candidates.to(candidates.dtype)


def pixel_infonce_sum(
    anchors: Tensor,
    candidates: Tensor,
    anchor_labels: Tensor,
    candidate_labels: Tensor,
    self_index: Tensor | None,
    anchor_weight: Tensor | None,
    num_differentiable: int,
    temperature: float,
    variant: str,
    need_anchors: bool,
    need_candidates: bool,
    shared: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the operator of this name, the logits computed once for the loss and both gradients."""
    if shared and variant == "supcon" and _is_symmetric(anchor_labels, candidate_labels, self_index):
        without_self = self_index is not None
        found = _self_sweep(
            anchors, anchor_labels, temperature, anchor_weight, without_self=without_self, need_gradient=need_anchors
        )
        if found is not None:
            return *found, anchors.new_empty(0, dtype=torch.float32)
    plan = _Plan.of(anchor_labels, candidate_labels, self_index)
    grad = torch.ones(len(plan.rows)) if anchor_weight is None else anchor_weight[plan.rows].float()
    state = torch.zeros(3, len(plan.rows), dtype=torch.float64)
    grad_anchors, grad_candidates = _sweep(
        plan,
        anchors,
        candidates,
        temperature,
        variant,
        state,
        forward=True,
        grad=grad,
        need_anchors=need_anchors,
        need_candidates=need_candidates or (shared and need_anchors),
        num_differentiable=num_differentiable,
    )
    if shared and need_anchors:
        grad_anchors, grad_candidates = grad_anchors.add_(grad_candidates), anchors.new_empty(0, dtype=torch.float32)
    return (state[0] * grad).sum().float(), grad.double().sum().float(), grad_anchors, grad_candidates


def _is_symmetric(anchor_labels: Tensor, candidate_labels: Tensor, self_index: Tensor | None) -> bool:
    """Whether anchors and candidates, whose features are the same, play the same role too."""
    if not torch.equal(anchor_labels, candidate_labels):
        return False
    return self_index is None or torch.equal(self_index, torch.arange(len(self_index)))


def _self_sweep(
    features: Tensor,
    labels: Tensor,
    temperature: float,
    anchor_weight: Tensor | None,
    *,
    without_self: bool,
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """For features against themselves: weighted sum of the losses, sum of the weights, and gradient float32 [M, D].

    None where exponentials of their logits, and factors of the gradient, do not fit into float32 side by side.
    """
    labels, columns = labels.sort(stable=True)
    ignored = int(torch.searchsorted(labels, 0))
    labels, columns = labels[ignored:], columns[ignored:]
    values = _in_order_of_classes(features, columns)
    limit = float(values.square().sum(dim=1).amax()) / temperature if len(values) else 0.0
    if not limit <= 30:  # as kBounded of csrc/cpu/infonce.cpp
        return None
    _, column_class, sizes = labels.unique_consecutive(return_inverse=True, return_counts=True)
    size = sizes[column_class]
    counts = (size > int(without_self)) & (size < len(labels))
    weight = counts.float() if anchor_weight is None else torch.where(counts, anchor_weight[columns].float(), 0)
    loss = torch.zeros(len(values), dtype=torch.float64)
    gradient = torch.zeros_like(values) if need_gradient else None
    torch.ops.cldf_fast.infonce_self_sweep(
        values,
        column_class.int(),
        torch.where(counts, size - int(without_self), 0),
        weight,
        features.shape[1],
        temperature,
        limit,
        without_self,
        loss,
        gradient,
    )
    # Before the gradient gets memory in the caller's order: the peak is what users pay.
    del values
    total = (loss * weight).sum().float(), weight.double().sum().float()
    if gradient is None:
        return *total, features.new_empty(0, dtype=torch.float32)
    dim = features.shape[1]
    return *total, torch.zeros(features.shape).index_copy_(0, columns, gradient[:, :dim])
