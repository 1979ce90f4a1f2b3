"""The methods that CLDF is compared with, on the same networks, and two floors that need none.

Every method gives score maps; `choose_threshold` finds the threshold that serves a method best on the validation part's
masks. Passes of a network for each image that carries a class, with L noise levels (times draws) of the evidence, K
classes and P of them present:

    gradcam, layercam, gradient   classifier: L forward, L * K backward
    cg_diff                       CDM: 12 + 12 * P forward; classifier: 12 * P forward and backward
    cg_cdm                        CDM: 8 * P forward
    location_prior, intensity     none

With evidence.average_views the first three see both views, as CLDF does, which is twice as much; the counterfactuals
see one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from cldf_fast.baselines.context import BaselineContext
from cldf_fast.baselines.counterfactual import CGCDM, CGDiff
from cldf_fast.baselines.position import position_label_auc
from cldf_fast.baselines.threshold import choose_threshold, masks_from_maps, with_background
from cldf_fast.data.packing import PackedSlices
from cldf_fast.errors import ConfigError, DataError
from cldf_fast.evidence import Evidence
from cldf_fast.pipeline import CLDF, build_saliency

__all__ = [
    "BASELINES",
    "CGCDM",
    "BaselineContext",
    "CGDiff",
    "choose_threshold",
    "masks_from_maps",
    "position_label_auc",
    "run_baseline",
    "score_maps",
    "with_background",
]

_BATCH = 16  # images in one pass; results do not depend on it


@dataclass(frozen=True)
class _Slices:
    """images: float32 [N, C, h, w]. present: bool [N, K]. studies: N names, or None. evidence: CLDF's own for these
    images, where it is at hand."""

    images: Tensor
    present: Tensor
    studies: Sequence[str] | None
    evidence: Evidence | None


def _cam(method: str, cldf: CLDF, slices: _Slices, context: BaselineContext) -> Tensor:
    # CLDF's own GradCAM, where it is configured, is read at another layer than this baseline's.
    if slices.evidence is not None and method == "layercam" == cldf.config.evidence.cam:
        return slices.evidence.cam
    evidence = cldf.config.evidence.model_copy(update={"cam": method})
    config = cldf.config.model_copy(update={"evidence": evidence})
    saliency = build_saliency(config, cldf.classifier)
    if method == "gradcam":
        # Its usual place, before the pooling. Earlier maps go through group norms, which take the mean out of their
        # gradients (all of it where a group is one channel), and the mean is what GradCAM weighs the maps by.
        saliency.cam_layer = cldf.classifier.pooled
    return _where_present(cldf, slices, lambda images, present: cldf.averaged(saliency, images).cam)


def _gradient(cldf: CLDF, slices: _Slices, context: BaselineContext) -> Tensor:
    if slices.evidence is not None:
        return slices.evidence.gradient_map
    return _where_present(cldf, slices, lambda images, present: cldf.averaged(cldf.saliency, images).gradient_map)


def _cg_diff(cldf: CLDF, slices: _Slices, context: BaselineContext) -> Tensor:
    return _where_present(cldf, slices, lambda images, present: context.cg_diff(cldf, images, present))


def _cg_cdm(cldf: CLDF, slices: _Slices, context: BaselineContext) -> Tensor:
    return _where_present(cldf, slices, lambda images, present: context.cg_cdm(cldf, images, present))


def _location_prior(cldf: CLDF, slices: _Slices, context: BaselineContext) -> Tensor:
    prior, size = context.location_prior.to(slices.images.device), slices.images.shape[-2:]
    if prior.shape[-2:] != size:
        raise DataError(
            f"images: expected {list(prior.shape[-2:])} pixels, the size that the location prior was fitted at, "
            f"got {list(size)}"
        )
    return prior.expand(len(slices.images), -1, -1, -1)


def _intensity(cldf: CLDF, slices: _Slices, context: BaselineContext) -> Tensor:
    if slices.studies is None:
        raise DataError("studies: expected the study of each image, because intensities are scored per study, got none")
    return context.intensity(slices.images, slices.studies)


def _where_present(cldf: CLDF, slices: _Slices, maps_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Maps [N, K, h, w] of `maps_of(images, present)`, batch by batch, for the slices that carry any class."""
    maps = slices.images.new_zeros(*slices.present.shape, *slices.images.shape[-2:], dtype=torch.float32)
    some = slices.present.any(dim=1).nonzero().flatten()
    for rows in some.split(_BATCH) if len(some) else ():
        maps[rows] = maps_of(slices.images[rows].to(cldf.device), slices.present[rows].to(cldf.device)).to(maps)
    return maps


BASELINES: Mapping[str, Callable[[CLDF, _Slices, BaselineContext], Tensor]] = MappingProxyType(
    {
        "gradcam": partial(_cam, "gradcam"),
        "layercam": partial(_cam, "layercam"),
        "gradient": _gradient,
        "cg_diff": _cg_diff,
        "cg_cdm": _cg_cdm,
        "location_prior": _location_prior,
        "intensity": _intensity,
    }
)
"""Every method by name, in the order of a table; `score_maps` runs them."""


def score_maps(
    name: str,
    cldf: CLDF,
    images: Tensor,
    present: Tensor,
    context: BaselineContext,
    studies: Sequence[str] | None = None,
    evidence: Evidence | None = None,
) -> Tensor:
    """Score maps of a baseline, higher where a class is more likely.

    name: one of BASELINES. images: float32 [N, C, h, w] in [-1, 1]. present: bool [N, K], the image-level labels to go
    by. studies: the study of each image; "intensity" needs them, since it scores a study's slices together. evidence:
    what `cldf.evidence` says about the images, if it is at hand, so that no method computes it again.
    Returns float32 [N, K, h, w], finite; maps of absent classes are 0 and mean nothing. An image's maps depend neither
    on the batch nor on the order ("intensity": on the study's slices, in any order).
    Raises ConfigError for an unknown name, DataError where shapes do not fit or studies are missing.
    """
    if name not in BASELINES:
        raise ConfigError(f"name: expected one of {', '.join(BASELINES)}, got {name!r}")
    if images.ndim != 4 or present.dtype != torch.bool or present.shape != (len(images), cldf.num_classes):
        raise DataError(
            f"images, present: expected [N, C, h, w] and bool [N, {cldf.num_classes}], got {list(images.shape)} "
            f"and {str(present.dtype).removeprefix('torch.')} {list(present.shape)}"
        )
    maps = BASELINES[name](cldf, _Slices(images, present, studies, evidence), context)
    return torch.where(present[:, :, None, None], maps, 0.0)


def run_baseline(
    name: str, cldf: CLDF, data: PackedSlices, present: Tensor, context: BaselineContext, threshold: Tensor
) -> Tensor:
    """Masks uint8 [N, h, w] of a baseline at the working size, 0 background, 1..K.

    threshold: [K], see `choose_threshold`. Other arguments as in `score_maps`.
    """
    return masks_from_maps(score_maps(name, cldf, data.images, present, context, data.studies), threshold, present)
