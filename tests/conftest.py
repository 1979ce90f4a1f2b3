"""Fixtures for every room's tests."""

from __future__ import annotations

import os
import random
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

# No test is timed, so a slow machine must not fail one.
settings.register_profile("cldf_fast", deadline=None, max_examples=25, print_blob=True)
settings.load_profile("cldf_fast")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images: CLDF_FAST_DATA, else ../shared/data beside the repository; skips without it."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CLDF_FAST_DATA") or beside)
    if not folder.is_dir():
        pytest.skip("real images are absent: name their folder by CLDF_FAST_DATA")
    return folder


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """A seed from the test's own name, set everywhere: inputs differ between tests and repeat between runs."""
    value = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)
    print(f"seed {value}")  # pytest shows it with a failure only
    return value


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the package takes without initialising holds NaN (integers: their largest): a read of it shows."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if not sys._getframe(1).f_globals.get("__name__", "").startswith("cldf_fast"):
                return tensor
            if tensor.dtype == torch.bool:
                return tensor.fill_(True)
            if tensor.is_floating_point() or tensor.is_complex():
                return tensor.fill_(float("nan"))
            return tensor.fill_(torch.iinfo(tensor.dtype).max)

        return allocate_poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
