"""Augmentation: images and pixel labels move together, intensities stay in range, a generator decides everything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cldf_fast.training.augment import Augmentation, Augmenter


def drawn(
    batch: int = 8, size: tuple[int, int] = (24, 20), seed: int = 0, mirror: bool = False, gamma: float = 0.0
) -> Augmentation:
    return Augmenter(mirror, gamma)(batch, 2, size, torch.Generator().manual_seed(seed))


def test_the_same_generator_draws_the_same_and_rows_can_be_picked() -> None:
    x = torch.rand(8, 2, 24, 20) * 2 - 1
    images = drawn().images(x)
    assert images.equal(drawn().images(x))
    assert not images.equal(drawn(seed=1).images(x))
    rows = torch.tensor([5, 2])
    torch.testing.assert_close(drawn()[rows].images(x[rows]), images[rows])
    curved = drawn(gamma=0.5)
    torch.testing.assert_close(curved[rows].images(x[rows]), curved.images(x)[rows])


def test_gamma_bends_each_channel_and_keeps_its_order() -> None:
    ramp = torch.linspace(-1, 1, 20).expand(16, 2, 24, 20)
    plain, curved = Augmenter(), Augmenter(gamma=0.5)
    straight, bent = (
        a(16, 2, (24, 20), torch.Generator().manual_seed(0)).images(ramp)[:, :, 12, 3:-3] for a in (plain, curved)
    )
    # The same geometry, and no power moves black, white or the order of what lies between.
    assert not torch.allclose(straight, bent, atol=0.05)
    lightness = bent.mean(dim=2) - straight.mean(dim=2)
    assert lightness.min() < -0.1 < 0.1 < lightness.max()
    assert not torch.allclose(lightness[:, 0], lightness[:, 1], atol=0.05)
    assert ((bent.diff(dim=2) >= -1e-6) == (straight.diff(dim=2) >= -1e-6)).all()


def test_images_stay_in_range_and_air_stays_air() -> None:
    augmentation = drawn(mirror=True, gamma=0.5)
    images = augmentation.images(torch.rand(8, 2, 24, 20) * 2 - 1)
    assert images.abs().max() <= 1
    assert augmentation.images(torch.full((8, 2, 24, 20), -1.0)).eq(-1).all()


def test_pixel_labels_move_with_the_images() -> None:
    labels = torch.zeros(8, 24, 20, dtype=torch.int8)
    labels[:, 6:16, 5:15] = 2
    labels[:, 10:12, 8:10] = -1
    augmentation = drawn(mirror=True, gamma=0.5)
    moved = augmentation.labels(labels)
    assert moved.dtype == torch.int8
    assert set(moved.unique().tolist()) == {-1, 0, 2}
    # The same block as a bright image: where its interior went, there the labels went.
    bright = augmentation.images((labels != 0).float().unsqueeze(1).expand(-1, 2, -1, -1) * 2 - 1)[:, 0]
    inside, outside = bright > 0.3, bright < -0.99
    assert ((moved != 0) & inside).sum() / inside.sum() > 0.99
    assert ((moved == 0) & outside).sum() > 0.5 * outside.sum()
    assert not (moved == 2)[outside].any()


def test_what_comes_in_from_outside_is_ignored() -> None:
    labels = torch.ones(64, 24, 20, dtype=torch.int8)
    moved = drawn(64).labels(labels)
    assert set(moved.unique().tolist()) == {-1, 1}
    assert (moved[:, 8:16, 7:13] == 1).all()


@pytest.mark.parametrize("mirror", [True, False])
def test_only_where_it_is_allowed_half_of_the_images_are_mirrored(mirror: bool) -> None:
    x = torch.full((200, 2, 24, 20), -1.0)
    x[..., :10] = 0.5

    def left(images: Tensor) -> Tensor:
        return images[..., :10].mean(dim=(1, 2, 3)) > images[..., 10:].mean(dim=(1, 2, 3))

    share = float(left(drawn(200, mirror=mirror).images(x)).float().mean())
    assert (0.35 < share < 0.65) if mirror else share == 1
