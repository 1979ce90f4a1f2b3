"""Losses of the pixel decoder."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from cldf_fast.ops.infonce import pixel_infonce_with_valid


class _GatherRows(torch.autograd.Function):
    """Rows of all processes, in the order of their ranks; the gradient of own rows is summed over the processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(grad)
        return grad.chunk(distributed.get_world_size())[distributed.get_rank()]


class PixelInfoNCE(nn.Module):
    """Contrastive loss of labelled pixel embeddings against each other: every embedding is anchor and candidate.

    temperature, variant: see `ops.pixel_infonce`. impl: the backend.

    Under torch.distributed the candidates are those of all processes, gathered with their gradients; shapes must be
    equal on all of them, so pad with label -1. The loss is scaled so that the mean over processes, which is what data
    parallel training takes of gradients, is the mean over all anchors of all processes that count. A process without
    any anchor contributes a zero that is connected to the graph.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        variant: Literal["per_positive", "supcon"] = "supcon",
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.variant: Literal["per_positive", "supcon"] = variant
        self.impl = impl

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss of embeddings [M, D] (usually of unit length) with labels [M]; labels below 0 are ignored."""
        candidates, candidate_labels, first = embeddings, labels, 0
        world = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
        if world > 1:
            candidates, candidate_labels = _GatherRows.apply(embeddings), _GatherRows.apply(labels)
            first = distributed.get_rank() * embeddings.shape[0]
        own = torch.arange(first, first + embeddings.shape[0], device=embeddings.device)
        loss, valid = pixel_infonce_with_valid(
            embeddings,
            candidates,
            labels,
            candidate_labels,
            temperature=self.temperature,
            variant=self.variant,
            self_index=own,
            impl=self.impl,
        )
        counted = valid.sum().to(loss.dtype)
        if world > 1:
            distributed.all_reduce(counted)
        return loss.sum() * world / counted.clamp_min(1)
