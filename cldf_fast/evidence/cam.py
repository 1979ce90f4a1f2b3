"""Class activation maps from activations and their gradients, batched, on the device where they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """GradCAM (Selvaraju et al. 2017): channels weighted by their mean gradient. Two [B, C, h, w] -> [B, h, w] >= 0."""
    weight = gradient.mean(dim=(2, 3), keepdim=True)
    return (weight * activation).sum(dim=1).relu()


def layer_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """LayerCAM (Jiang et al. 2021): each place weighted by its own positive gradient. Shapes as in grad_cam."""
    return (gradient.relu() * activation).sum(dim=1).relu()


METHODS = {"gradcam": grad_cam, "layercam": layer_cam}


def average_levels(cams: Tensor, size: tuple[int, int]) -> Tensor:
    """One map an image from maps at several noise levels.

    cams: [T, B, h, w] >= 0. Each level is divided by its own maximum, so that none dominates; the mean over levels is
    resized (bilinear) and brought to [0, 1] by its maximum. Returns float32 [B, H, W]; an all-zero map stays zero.
    """
    tiny = torch.finfo(torch.float32).tiny
    cams = cams.float()
    mean = (cams / cams.amax(dim=(2, 3), keepdim=True).clamp_min(tiny)).mean(dim=0)
    resized = F.interpolate(mean.unsqueeze(1), size, mode="bilinear", align_corners=False).squeeze(1)
    return resized / resized.amax(dim=(1, 2), keepdim=True).clamp_min(tiny)
