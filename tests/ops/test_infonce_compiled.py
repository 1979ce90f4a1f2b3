"""Triton's kernels compiled ahead of time, as a machine without a GPU can: for every architecture, without spills."""

from __future__ import annotations

import os

import pytest
import torch

from tests.ops.ahead_of_time import SHARED, Job, check_resources

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter")


DTYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
CASES = (
    (torch.bfloat16, 128),
    (torch.bfloat16, 256),
    (torch.float16, 128),
    (torch.float32, 64),
    (torch.float32, 128),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "variant"),
    [
        ("forward_kernel", "supcon"),
        ("forward_kernel", "per_positive"),
        ("positives_kernel", "per_positive"),
        ("anchor_gradient_kernel", "per_positive"),
        ("candidate_gradient_kernel", "per_positive"),
    ],
)
@pytest.mark.parametrize("prepared", [True, False])
def test_no_kernel_spills(kernel: str, variant: str, prepared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from cldf_fast.kernels import infonce, tuning

    jobs: list[Job] = []
    for dtype, dim in CASES:
        features = DTYPES[dtype]
        types = dict.fromkeys(getattr(infonce, kernel).arg_names, "*fp32") | {
            "anchor_ptr": features, "candidate_ptr": features, "grad_ptr": features, "anchor_label_ptr": "*i64",
            "candidate_label_ptr": "*i64", "self_ptr": "*i64", "positives_ptr": "*i64", "bounds_ptr": "*i32",
            "M": "i32", "N": "i32", "scale": "fp32", "inverse_temperature": "fp32",
        }  # fmt: skip
        options = {}
        for architecture in SHARED:
            monkeypatch.setattr(tuning, "architecture", lambda device, number=architecture: f"sm{number}")
            empty = torch.empty(0, dim, dtype=dtype)
            options[architecture] = infonce.options(kernel, empty, variant, True, prepared)
        jobs.append((f"infonce.{kernel}", types, options))
    check_resources(*jobs)
