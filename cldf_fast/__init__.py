"""Segmentation masks of medical images from image-level labels: CLDF (arXiv 2506.23460), accelerated.

The public names are imported when they are first used, so that `import cldf_fast` costs nothing and needs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cldf_fast.evidence import ClassifierSaliency as ClassifierSaliency
    from cldf_fast.features import DiffusionFeatures as DiffusionFeatures
    from cldf_fast.losses import PixelBank as PixelBank
    from cldf_fast.losses import PixelContrastLoss as PixelContrastLoss
    from cldf_fast.losses import PixelInfoNCE as PixelInfoNCE
    from cldf_fast.losses import SupConLoss as SupConLoss
    from cldf_fast.models.decoder import PixelDecoder as PixelDecoder
    from cldf_fast.ops import fuse_evidence as fuse_evidence
    from cldf_fast.ops import gradient_saliency as gradient_saliency
    from cldf_fast.ops import noised_batch as noised_batch
    from cldf_fast.ops import pixel_infonce as pixel_infonce
    from cldf_fast.ops import sample_anchors as sample_anchors
    from cldf_fast.pipeline import CLDF as CLDF
    from cldf_fast.store import FeatureStore as FeatureStore

__version__ = "0.1.0.dev0"

_HOMES = {
    "CLDF": "cldf_fast.pipeline",
    "ClassifierSaliency": "cldf_fast.evidence",
    "DiffusionFeatures": "cldf_fast.features",
    "FeatureStore": "cldf_fast.store",
    "PixelBank": "cldf_fast.losses",
    "PixelContrastLoss": "cldf_fast.losses",
    "PixelDecoder": "cldf_fast.models.decoder",
    "PixelInfoNCE": "cldf_fast.losses",
    "SupConLoss": "cldf_fast.losses",
    "fuse_evidence": "cldf_fast.ops",
    "gradient_saliency": "cldf_fast.ops",
    "noised_batch": "cldf_fast.ops",
    "pixel_infonce": "cldf_fast.ops",
    "sample_anchors": "cldf_fast.ops",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
