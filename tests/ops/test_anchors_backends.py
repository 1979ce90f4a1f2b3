"""Every backend of sample_anchors against the reference: without weights bit for bit, with weights but for rounding."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from cldf_fast.errors import BackendError
from cldf_fast.ops import sample_anchors
from tests.ops.again import run_again
from tests.ops.backends import check_threads_change_no_bit, needs


@pytest.fixture(params=["cpu", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    """A backend that this machine has."""
    backend = str(request.param)
    needs(backend, "sample_anchors")
    return backend


def drawn(batch: int, height: int, width: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, of which some are ignored and some beyond the classes, and a seed and an index of every image."""
    labels = torch.randint(-1, classes + 1, (batch, height, width))
    return labels, torch.randint(-(2**63), 2**63 - 1, (batch,)), torch.randint(-(2**63), 2**63 - 1, (batch,))


def sized(impl: str, per_class: int) -> int:
    """Anchors for a backend: an interpreter takes a second to sort a thousand, and thirty show what many do."""
    return min(per_class, 30) if impl == "triton" else per_class


SHAPES = [
    (1, 1, 1, 1, 1), (1, 1, 15, 2, 20), (3, 15, 17, 3, 6), (2, 252, 3, 1, 1), (1, 507, 5, 5, 700), (2, 40, 60, 7, 100),
    (2, 0, 4, 2, 3), (0, 4, 4, 2, 3),
]  # fmt: skip


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.int16, torch.int32])
def test_without_weights_all_backends_draw_the_same_pixels(
    impl: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    batch, height, width, classes, per_class = shape
    labels, seed, image_index = drawn(batch, height, width, classes)
    labels = labels.to(dtype)
    options = {"num_classes": classes, "per_class": sized(impl, per_class), "seed": seed, "image_index": image_index}
    for found, expected in zip(
        sample_anchors(labels, **options, impl=impl), sample_anchors(labels, **options, impl="reference"), strict=True
    ):
        assert torch.equal(found, expected)


WEIGHTS = {
    "even": lambda shape: torch.rand(shape) + 0.5,
    "some never": lambda shape: torch.rand(shape) - 0.3,
    "tiny": lambda shape: torch.full(shape, 1e-7),
    "of all sizes": lambda shape: torch.exp(20 * torch.randn(shape)),
    "infinite": lambda shape: torch.full(shape, torch.inf),
    "not a number": lambda shape: torch.where(torch.rand(shape) < 0.5, torch.nan, 1.0),
    "half precision": lambda shape: torch.rand(shape).half(),
}


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_with_weights_backends_agree_but_for_rounding(
    impl: str, shape: tuple[int, int, int, int, int], kind: str
) -> None:
    batch, height, width, classes, per_class = shape
    labels, seed, image_index = drawn(batch, height, width, classes)
    weight = WEIGHTS[kind](labels.shape)
    options = {"num_classes": classes, "per_class": sized(impl, per_class), "seed": seed, "image_index": image_index}
    indices, counts = sample_anchors(labels, weight, **options, impl=impl)
    expected, expected_counts = sample_anchors(labels, weight, **options, impl="reference")
    assert torch.equal(counts, expected_counts)
    # A time that is rounded differently changes places with its neighbour, which of these few thousand none should.
    assert torch.equal(indices, expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("classes", [7, 8, 12, 127, 128, 129, 255, 256, 300])
@pytest.mark.parametrize("weighted", [False, True])
def test_few_and_many_classes_on_cpu(dtype: torch.dtype, classes: int, weighted: bool) -> None:
    """As many rows as a vector has lanes and more, labels that their type's sign would mix up, more than a byte's."""
    needs("cpu", "sample_anchors")
    info = torch.iinfo(dtype)
    labels = torch.randint(max(info.min, -400), min(info.max, 400) + 1, (2, 130, 131)).to(dtype)
    labels[:, ::2] = torch.randint(0, min(classes, 4), labels[:, ::2].shape, dtype=dtype)
    weight = torch.where(torch.rand(labels.shape) < 0.3, 1.0, 0.1) if weighted else None
    options = {"num_classes": classes, "per_class": 40, "seed": 3}
    found = sample_anchors(labels, weight, **options, impl="cpu")
    expected = sample_anchors(labels, weight, **options, impl="reference")
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kind", [None, *WEIGHTS, "denormal", "striped"])
@pytest.mark.parametrize("per_class", [300, 1500, 2300])
def test_hardly_more_pixels_than_are_wanted_on_cpu(kind: str | None, per_class: int) -> None:
    """By when they arrive is estimated; what was estimated too early is made good."""
    needs("cpu", "sample_anchors")
    labels = torch.randint(3, (2, 120, 60))
    of_kind = WEIGHTS | {
        "denormal": lambda shape: torch.full(shape, 1e-40),
        "striped": lambda shape: torch.where(torch.arange(math.prod(shape)) % 11 == 0, 100.0, 0.01).view(shape),
    }
    weight = None if kind is None else of_kind[kind](labels.shape)
    options = {"num_classes": 3, "per_class": per_class, "seed": 4}
    found = sample_anchors(labels, weight, **options, impl="cpu")
    expected = sample_anchors(labels, weight, **options, impl="reference")
    assert all(map(torch.equal, found, expected))


def test_the_same_pixels_whatever_the_number_of_threads() -> None:
    needs("cpu", "sample_anchors")
    labels = torch.randint(-1, 3, (2, 300, 211))
    check_threads_change_no_bit(lambda: sample_anchors(labels, num_classes=3, per_class=50, seed=5, impl="cpu"))


def test_an_image_of_many_pixels() -> None:
    needs("cpu", "sample_anchors")
    labels = torch.zeros(1, 4096, 8192, dtype=torch.int8)
    labels[0, 100:105, 7] = 1
    labels[0, 4095, 8191] = 1
    indices, counts = sample_anchors(labels, num_classes=2, per_class=64, seed=9, impl="cpu")
    assert counts.tolist() == [[64, 6]]
    assert set(indices[0, 1, :6].tolist()) == {row * 8192 + 7 for row in range(100, 105)} | {2**25 - 1}
    assert len(set(indices[0, 0].tolist())) == 64
    # Where 64 of 2^25 fall: evenly over the image.
    assert chisquare(np.bincount(indices[0, 0].numpy() >> 22, minlength=8)).pvalue > 1e-4


def test_times_depend_on_weights_as_the_exponential_race_says(impl: str, seed: int) -> None:
    """Of two pixels the first is drawn with the probability w0 / (w0 + w1)."""
    images = 3000 if impl == "cpu" else 300
    weight = torch.tensor([3.0, 1.0]).expand(images, 1, 2)
    labels = torch.zeros(images, 1, 2, dtype=torch.int8)
    indices, _ = sample_anchors(labels, weight, num_classes=1, per_class=1, seed=seed, impl=impl)
    first = int((indices == 0).sum())
    assert chisquare([first, images - first], [0.75 * images, 0.25 * images]).pvalue > 1e-4


def test_triton_says_what_it_can_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    labels = torch.zeros(1, 2, 2, dtype=torch.int8)
    for options, message in (
        ({"num_classes": 32, "per_class": 1}, "needs num_classes up to 31, got 32"),
        ({"num_classes": 1, "per_class": 2049}, "needs per_class up to 2048, got 2049"),
    ):
        with pytest.raises(BackendError, match=message):
            sample_anchors(labels, **options, seed=0, impl="triton")


@pytest.mark.slow
@pytest.mark.skipif("CLDF_FAST_CPU_CAPABILITY" in os.environ, reason="this is one of the lesser instruction sets")
@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_lesser_instruction_sets(capability: str) -> None:
    """The tests of `cpu` once more, as on a machine that has no more than these instructions."""
    run_again(__file__, {"CLDF_FAST_CPU_CAPABILITY": capability}, "backends and cpu")


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter")
def test_triton_under_its_interpreter() -> None:
    """The tests above once more, in a process whose kernels are interpreted from the start."""
    pytest.importorskip("triton")
    run_again(__file__, {"TRITON_INTERPRET": "1"}, "triton")
