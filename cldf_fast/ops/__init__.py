"""The accelerated operations. Each stands alone, needs torch and numpy only, and chooses among backends by `impl`."""

from cldf_fast.ops._dispatch import BACKENDS, backend_report
from cldf_fast.ops.anchors import sample_anchors
from cldf_fast.ops.convolution import conv3x3
from cldf_fast.ops.infonce import pixel_infonce, pixel_infonce_sum, pixel_infonce_with_valid
from cldf_fast.ops.norm import group_norm
from cldf_fast.ops.saliency import fuse_evidence, gradient_saliency, noised_batch, pixel_seed

__all__ = [
    "BACKENDS",
    "backend_report",
    "conv3x3",
    "fuse_evidence",
    "gradient_saliency",
    "group_norm",
    "noised_batch",
    "pixel_infonce",
    "pixel_infonce_sum",
    "pixel_infonce_with_valid",
    "pixel_seed",
    "sample_anchors",
]
