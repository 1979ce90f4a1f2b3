"""The Triton kernels of sample_anchors compiled ahead of time, for every architecture and without spills."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.ops.ahead_of_time import SHARED, Job, check_resources

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter")

TYPES = {
    "label_ptr": "*i64", "weight_ptr": "*fp32", "seed_ptr": "*i64", "image_ptr": "*i64", "time_ptr": "*u32",
    "count_ptr": "*i32", "candidate_ptr": "*i64", "start_ptr": "*i32", "total_ptr": "*i32", "index_ptr": "*i64",
    "drawn_ptr": "*i64", "P": "i32", "K": "i32", "S": "i32", "STEPS": "i32",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kernel", ["times_kernel", "collect_kernel"])
def test_passes_over_pixels_do_not_spill(kernel: str, weighted: bool) -> None:
    from cldf_fast.kernels import anchors

    check_resources(*(_job(kernel, anchors.pass_options(classes, weighted)) for classes in (2, 5, 31)))


@pytest.mark.slow
def test_sorting_does_not_spill() -> None:
    from cldf_fast.kernels import anchors

    check_resources(*(_job("order_kernel", anchors.order_options(5, per_class)) for per_class in (1, 512, 2048)))


def _job(kernel: str, options: dict[str, Any]) -> Job:
    return f"anchors.{kernel}", TYPES, {architecture: dict(options) for architecture in SHARED}
