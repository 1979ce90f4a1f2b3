"""The pixel decoder: applied at native size or at single pixels, it equals resize, concatenate, decode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cldf_fast.errors import DataError
from cldf_fast.models.decoder import PixelDecoder, read_at

Randomise = Callable[[nn.Module], nn.Module]

SIZES = [(16, 16), (10, 14), (7, 9)]
CHANNELS = [5, 3, 4]


@pytest.fixture
def decoder(randomised: Randomise) -> PixelDecoder:
    decoder = PixelDecoder(CHANNELS, hidden=12, embedding=6)
    randomised(decoder)
    decoder.standardise(3 + 2 * torch.randn(50, sum(CHANNELS)))
    return decoder.eval()


def maps(size: tuple[int, int]) -> list[Tensor]:
    """Features of a large, a middle and a small block, for an image of this size."""
    height, width = size
    shapes = [(height, width), (-(-height // 2), -(-width // 2)), (3, 2)]
    return [
        (3 + 2 * torch.randn(2, channels, *shape)).requires_grad_()
        for channels, shape in zip(CHANNELS, shapes, strict=True)
    ]


def naive(decoder: PixelDecoder, features: list[Tensor], size: tuple[int, int]) -> Tensor:
    stacked = torch.cat([F.interpolate(block, size, mode="bilinear") for block in features], dim=1)
    return decoder(stacked.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", SIZES)
def test_dense_equals_resize_concatenate_decode(decoder: PixelDecoder, size: tuple[int, int]) -> None:
    features = maps(size)
    expected, got = naive(decoder, features, size), decoder.dense(features, size)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.norm(dim=1), torch.ones(2, *size))
    weight = torch.randn_like(got)
    inputs = [*features, *decoder.parameters()]
    gradients = torch.autograd.grad((got * weight).sum(), inputs)
    for gradient, wanted in zip(gradients, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("size", SIZES)
def test_reading_at_pixels_equals_dense_there(decoder: PixelDecoder, size: tuple[int, int]) -> None:
    features, total = maps(size), size[0] * size[1]
    corners = torch.tensor([0, size[1] - 1, total - size[1], total - 1])
    pixels = torch.stack([torch.cat([corners, torch.randint(total, (9,))]) for _ in range(2)])
    dense, got = decoder.dense(features, size), decoder.at(features, pixels, size)
    expected = dense.flatten(2).transpose(1, 2).gather(1, pixels.unsqueeze(2).expand(-1, -1, 6))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    weight = torch.randn_like(got)
    gradients = torch.autograd.grad((got * weight).sum(), features)
    for gradient, wanted in zip(gradients, torch.autograd.grad((expected * weight).sum(), features), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_padding_reads_pixel_zero_and_half_precision_reads_the_right_pixel() -> None:
    features = [torch.randn(1, 4, 64, 96)]
    everywhere = torch.arange(64 * 96).unsqueeze(0)
    exact = features[0].flatten(2).transpose(1, 2)
    torch.testing.assert_close(read_at(features, everywhere, (64, 96)), exact, rtol=0, atol=1e-4)
    assert read_at(features, torch.tensor([[-1]]), (64, 96)).equal(read_at(features, torch.tensor([[0]]), (64, 96)))
    halves = [block.to(torch.bfloat16) for block in features]
    read = read_at(halves, everywhere, (64, 96))
    torch.testing.assert_close(read.float(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.tensor([[3, 64]]), r"pixels: expected numbers below 8 \* 8, got 64"),
        (torch.zeros(1, 2), r"pixels: expected integer \[1, A\]"),
        (torch.zeros(2, 2, dtype=torch.int64), r"pixels: expected integer \[1, A\]"),
    ],
)
def test_pixels_that_are_not_there_are_named(pixels: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_at([torch.randn(1, 4, 4, 4)], pixels, (8, 8))


def test_standardised_features_have_mean_zero_and_deviation_one(decoder: PixelDecoder) -> None:
    features = torch.randn(200, sum(CHANNELS)) * torch.logspace(-3, 3, sum(CHANNELS)) + 7
    features[:, 2] = 4.0  # a dead channel must not become infinite
    decoder.standardise(features)
    standard = (features - decoder.mean) / decoder.deviation
    alive = torch.arange(sum(CHANNELS)) != 2
    torch.testing.assert_close(standard.mean(dim=0), torch.zeros(sum(CHANNELS)), rtol=0, atol=2e-2)
    torch.testing.assert_close(standard.std(dim=0)[alive], torch.ones(int(alive.sum())), rtol=1e-2, atol=0)
    assert decoder.points(features).isfinite().all()


def test_dropout_acts_in_training_only(randomised: Randomise) -> None:
    decoder = randomised(PixelDecoder([4], hidden=32, embedding=3, dropout=0.5))
    features = torch.randn(8, 4)
    assert not decoder.train()(features).equal(decoder(features))
    assert decoder.eval()(features).equal(decoder(features))


def test_as_many_maps_as_blocks_are_expected(decoder: PixelDecoder) -> None:
    with pytest.raises(ValueError, match="zip"):
        decoder.dense(maps((8, 8))[:2], (8, 8))
