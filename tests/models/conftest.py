"""What the tests of the networks share."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import pytest
from torch import nn


@pytest.fixture
def layout() -> Callable[[nn.Module], tuple[int, int, str]]:
    """layout(module): tensors, parameters, and the digest of the sorted lines "name [shape]" of its state dict."""

    def describe(module: nn.Module) -> tuple[int, int, str]:
        shapes = {name: list(value.shape) for name, value in module.state_dict().items()}
        lines = "\n".join(sorted(f"{name} {shape}" for name, shape in shapes.items()))
        return len(shapes), sum(map(math.prod, shapes.values())), hashlib.sha256(lines.encode()).hexdigest()[:16]

    return describe
