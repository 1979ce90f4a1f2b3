"""Pixel labels from evidence: where the gradient map and the CAM agree, gated by the image-level label."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cldf_fast.evidence.gradients import Evidence
from cldf_fast.ops import fuse_evidence


@dataclass(frozen=True)
class PixelLabels:
    """labels: int8 [B, H, W] in {-1 ignored, 0 background, 1..K}. counts: int64 [B, K + 2], pixels ignored, of the
    background and of each class."""

    labels: Tensor
    counts: Tensor


def pixel_labels(evidence: Evidence, image_label: Tensor, thresholds: tuple[float, float, float, float]) -> PixelLabels:
    """Fuse a batch's evidence (see `ops.fuse_evidence`) and count what came out. image_label: bool [B, K]."""
    labels = fuse_evidence(evidence.gradient_map, evidence.cam, image_label, thresholds=thresholds)
    values = torch.arange(-1, image_label.shape[1] + 1, device=labels.device, dtype=labels.dtype)
    counts = (labels.flatten(1).unsqueeze(1) == values.view(1, -1, 1)).sum(dim=2)
    return PixelLabels(labels, counts)
