"""What the rows of the CDM's class table mean, and how image-level labels become conditions."""

from __future__ import annotations

import torch
from torch import Tensor

NULL, HEALTHY = 0, 1
"""Row 0: no condition (classifier-free training). Row 1: none of the classes. Row 2 + k: foreground class k + 1."""


def num_conditions(num_classes: int) -> int:
    """Rows of the class table for K foreground classes."""
    return num_classes + 2


def null_condition(batch: int, num_classes: int, device: torch.device | None = None) -> Tensor:
    """The null condition, float32 [B, K + 2]."""
    condition = torch.zeros(batch, num_conditions(num_classes), device=device)
    condition[:, NULL] = 1
    return condition


def label_condition(labels: Tensor) -> Tensor:
    """Condition on the set of present classes: the mean of their rows, the healthy row where there is none.

    labels: bool [B, K]. Returns float32 [B, K + 2], rows summing to 1.
    """
    present = labels.float()
    healthy = (~labels.any(dim=1, keepdim=True)).float()
    weights = torch.cat([torch.zeros_like(healthy), healthy, present], dim=1)
    return weights / weights.sum(dim=1, keepdim=True)
