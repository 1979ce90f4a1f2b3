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
from torch import Tensor, nn

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


@pytest.fixture(scope="session")
def randomised() -> Callable[[nn.Module], nn.Module]:
    """Gives every weight a random value: as initialised, residual branches and outputs are zero and hide all else."""

    def randomise(module: nn.Module) -> nn.Module:
        with torch.no_grad():
            for parameter in module.parameters():
                noise = torch.randn_like(parameter)
                if parameter.ndim > 1:
                    parameter.copy_(noise / parameter[0].numel() ** 0.5)
                else:
                    parameter.add_(0.2 * noise)
        return module

    return randomise


@pytest.fixture(scope="session")
def tiny_config() -> Any:
    """A `Config` whose networks take milliseconds: 16 pixels, a few channels, a few steps."""
    from cldf_fast.config import make_config

    steps = {"steps": 6, "batch_size": 4, "warmup_steps": 2, "save_every": 2, "log_every": 1}
    network = {"model_channels": 8, "channel_mult": [1, 2], "attention_downsample": [2]}
    return make_config(
        {
            "seed": 3,
            "data": {"size": 16},
            "cdm": {"network": network, "optimisation": steps},
            "classifier": {"network": {"channel_mult": [0.5, 1], "dropout": 0.1}, "optimisation": steps},
            "evidence": {"noise_levels": [0.0, 0.1], "cam_downsample": 2, "foreground_cam": 0.1},
            "features": {"noise_levels": [0.02, 0.1], "downsample": [4, 2], "condition": "label"},
            "decoder": {"hidden": 16, "embedding": 8, "anchors_per_class": 6, "optimisation": steps},
            "segmentation": {"prototypes_per_class": 2},
        }
    )


@pytest.fixture
def tiny_slices() -> Callable[..., Any]:
    """tiny_slices(n): random `PackedSlices` of two channels and three classes at 16 pixels, labelled at random."""
    from cldf_fast.data.geometry import Geometry
    from cldf_fast.data.packing import PackedSlices

    def make(count: int = 12) -> PackedSlices:
        labels = torch.rand(count, 3) < 0.4
        labels[0], labels[1:4] = False, torch.eye(3, dtype=torch.bool)
        return PackedSlices(
            images=torch.rand(count, 2, 16, 16) * 2 - 1,
            labels=labels,
            masks=[torch.randint(0, 4, (16, 16), dtype=torch.uint8) for _ in range(count)],
            subjects=[f"p{i // 3}" for i in range(count)],
            studies=[f"s{i // 3}" for i in range(count)],
            names=[f"{i}" for i in range(count)],
            geometries=[Geometry()] * count,
            indices=list(range(count)),
            sizes=[(16, 16)] * count,
            class_names=("liver", "kidneys", "spleen"),
        )

    return make


@pytest.fixture(scope="session")
def make_tiny_cldf(randomised: Callable[[nn.Module], nn.Module]) -> Callable[[Any], Any]:
    """A complete `CLDF` of a configuration for two channels and three classes, with random weights."""
    from cldf_fast.models.decoder import PixelDecoder
    from cldf_fast.pipeline import CLDF, build_classifier, build_unet
    from cldf_fast.segmentation import Prototypes

    def make(config: Any) -> CLDF:
        unet = randomised(build_unet(config.cdm.network, 2, 3))
        classifier = randomised(build_classifier(config, 2, 3))
        channels = CLDF(config, unet, classifier).features.channels
        decoder = randomised(PixelDecoder(channels, hidden=16, embedding=8))
        vectors = torch.nn.functional.normalize(torch.randn(4, 2, 8), dim=-1)
        prototypes = Prototypes(vectors, 0.1 * torch.randn(4), temperature=0.1)
        return CLDF(config, unet, classifier, decoder, prototypes, torch.tensor([0.4, 0.5, 0.6]))

    return make


@pytest.fixture
def tiny_cldf(tiny_config: Any, make_tiny_cldf: Callable[[Any], Any]) -> Any:
    """The `CLDF` of `tiny_config`."""
    return make_tiny_cldf(tiny_config)


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
