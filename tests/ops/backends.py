"""What tests of every backend share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from cldf_fast.ops import backend_report


def needs(backend: str, *ops: str) -> None:
    """Skip the test unless the backend can run these operations on this machine.

    Triton runs on a CPU where it is asked to interpret its kernels.
    """
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's kernels are interpreted where TRITON_INTERPRET=1")
    report = backend_report()
    for op in ops:
        if (state := report[op][backend]) != "serving":
            pytest.skip(f"{backend}: {state}")


def check_threads_change_no_bit(run: Callable[[], Sequence[Tensor]], counts: Sequence[int] = (1, 2, 3, 5)) -> None:
    """`run` gives the same bits on any number of threads."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)
