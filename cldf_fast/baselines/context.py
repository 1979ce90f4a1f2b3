"""What the baselines are told besides the networks: what is fitted on training data, and their settings."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cldf_fast.baselines.counterfactual import CGCDM, CGDiff
from cldf_fast.baselines.intensity import IntensityRule
from cldf_fast.data.packing import PackedSlices


@dataclass(frozen=True)
class BaselineContext:
    """Fitted parts and settings.

    location_prior: float32 [K, h, w] in [0, 1]. intensity: channel and sign for every class. cg_diff, cg_cdm: settings.
    """

    location_prior: Tensor
    intensity: IntensityRule
    cg_diff: CGDiff = field(default_factory=CGDiff)
    cg_cdm: CGCDM = field(default_factory=CGCDM)

    @classmethod
    def fit(cls, train: PackedSlices, val: PackedSlices) -> BaselineContext:
        """Fit the location prior on the masks of `train`, the intensity rule on those of `val`.

        These two baselines see masks, which CLDF never does. Raises DataError where a part has none.
        """
        return cls(location_prior(train), IntensityRule.fit(val))


def location_prior(data: PackedSlices) -> Tensor:
    """Share of the slices labelled with a class in which a pixel is of it: float32 [K, h, w], from masks."""
    masks, labels = data.working_masks(), data.require_labels()
    counts = labels.sum(dim=0).clamp_min(1).view(-1, 1, 1)
    pixels = torch.stack([(masks == k + 1).sum(dim=0) for k in range(labels.shape[1])])
    return (pixels / counts).clamp(max=1)
