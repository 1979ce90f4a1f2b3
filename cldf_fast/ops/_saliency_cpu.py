"""Around the classifier on the CPU: memory for the results of csrc/cpu/saliency.cpp. Contracts: `ops.reference`.

Small inputs are made contiguous; gradients and maps are read as they lie.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pixel_seed(x: Tensor) -> Tensor:
    """As `reference.pixel_seed`."""
    seeds = x.new_empty(x.shape[0], dtype=torch.int64)
    torch.ops.cldf_fast.pixel_seed_out(x.contiguous(), seeds)
    return seeds


def noised_batch(x: Tensor, alpha_bar: Tensor, seed: Tensor) -> Tensor:
    """As `reference.noised_batch`."""
    noised = x.new_empty(alpha_bar.shape[0] * x.shape[0], *x.shape[1:])
    torch.ops.cldf_fast.noised_batch_out(x.contiguous(), alpha_bar.double().contiguous(), seed.contiguous(), noised)
    return noised


def gradient_saliency(grad: Tensor, reduce: str, percentile: float, sigma: float, level_norm: bool) -> Tensor:
    """As `reference.gradient_saliency`."""
    _, batch, _, height, width = grad.shape
    maps = grad.new_empty(batch, height, width, dtype=torch.float32)
    torch.ops.cldf_fast.gradient_saliency_out(grad, reduce, percentile, sigma, level_norm, maps)
    return maps


def fuse_evidence(gradient_map: Tensor, cam: Tensor, image_label: Tensor, thresholds: list[float]) -> Tensor:
    """As `reference.fuse_evidence`."""
    batch, _, height, width = gradient_map.shape
    labels = gradient_map.new_empty(batch, height, width, dtype=torch.int8)
    torch.ops.cldf_fast.fuse_evidence_out(gradient_map, cam, image_label.contiguous(), thresholds, labels)
    return labels
