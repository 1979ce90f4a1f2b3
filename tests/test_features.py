"""Features of the frozen UNet: every noise level's block outputs, whatever the batch, and no block too many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cldf_fast.diffusion import Diffusion
from cldf_fast.errors import ConfigError
from cldf_fast.features import DiffusionFeatures
from cldf_fast.models.unet import UNet
from cldf_fast.ops import noised_batch, pixel_seed

Randomise = Callable[[nn.Module], nn.Module]

LEVELS = (0.02, 0.1, 0.3)


def small(randomised: Randomise, **changes: Any) -> UNet:
    arguments = {"channel_mult": (1, 2, 2), "attention_downsample": (4,), "num_heads": 2, "num_classes": 4, **changes}
    unet = UNet(2, 8, patch_size=2, **arguments)
    randomised(unet)
    return unet.eval().requires_grad_(False)


@pytest.fixture
def unet(randomised: Randomise) -> UNet:
    return small(randomised)


@pytest.mark.parametrize("out_channels", [2, 4], ids=["noise", "noise and sigma"])
@pytest.mark.parametrize("prediction", [True, False])
def test_features_are_block_outputs_and_predictions_at_every_noise_level(
    randomised: Randomise, prediction: bool, out_channels: int
) -> None:
    diffusion, unet = Diffusion(4000, rescale_timesteps=True), small(randomised, out_channels=out_channels)
    features = DiffusionFeatures(unet, diffusion, noise_levels=LEVELS, downsample=(8, 2), prediction=prediction)
    x, condition = torch.rand(2, 2, 16, 24) * 2 - 1, torch.tensor([1, 3])
    got = features(x, condition)
    wanted = [i for i, factor in enumerate(unet.output_downsample) if factor in (8, 2)]
    seen: list[list[Tensor]] = [[] for _ in wanted]
    for position, block in enumerate(wanted):
        unet.output_blocks[block].register_forward_hook(lambda _m, _a, out, kept=seen[position]: kept.append(out))
    steps = torch.tensor([80, 400, 1200])
    noised = noised_batch(x, diffusion.alpha_bar[steps], pixel_seed(x)).unflatten(0, (3, 2))
    clean = []
    for x_t, step in zip(noised, steps, strict=True):
        noise = unet(x_t, (step / 4.0).expand(2), condition)[:, :2]
        level = diffusion.alpha_bar[step]
        clean.append((x_t - (1 - level).sqrt() * noise) / level.sqrt())
    expected = [torch.cat(kept, dim=1) for kept in [*seen, *[clean] * prediction]]
    assert [block.shape[1] for block in got] == features.channels
    for block, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(block, reference, rtol=1e-4, atol=1e-4)
        assert not block.requires_grad


def test_features_do_not_depend_on_the_batch_or_its_order(unet: UNet) -> None:
    # In float64, so that what is left of a dependence can't hide behind rounding, which convolutions order by batch.
    features = DiffusionFeatures(unet.double(), Diffusion(), noise_levels=LEVELS, downsample=(8, 2))
    x, condition = torch.rand(5, 2, 16, 16).double() * 2 - 1, torch.rand(5, 4).double()
    together = features(x, condition)
    order = torch.randperm(5)
    for block, shuffled in zip(together, features(x[order], condition[order]), strict=True):
        torch.testing.assert_close(shuffled, block[order], rtol=1e-9, atol=1e-9)
    for i in range(5):
        for block, alone in zip(together, features(x[i : i + 1], condition[i : i + 1]), strict=True):
            torch.testing.assert_close(alone[0], block[i], rtol=1e-9, atol=1e-9)


def test_nothing_after_the_last_block_that_is_read_is_computed(unet: UNet) -> None:
    features = DiffusionFeatures(unet, Diffusion(), noise_levels=LEVELS, downsample=(8, 4), prediction=False)
    later = [*unet.output_blocks[max(features.blocks) + 1 :], unet.out]
    assert len(later) > 1
    for module in later:
        module.register_forward_hook(lambda *_: pytest.fail("computed for nothing"))
    assert len(features(torch.zeros(1, 2, 16, 16), torch.tensor([0]))) == len(features.blocks)


def test_an_unconditional_network_takes_no_condition(randomised: Randomise) -> None:
    unet = UNet(1, 8, channel_mult=(1, 2), attention_downsample=())
    randomised(unet)
    features = DiffusionFeatures(unet, Diffusion(), noise_levels=(0.1,), downsample=(1,))
    assert {block.shape[2:] for block in features(torch.zeros(3, 1, 8, 8), None)} == {(8, 8)}


def test_the_condition_reaches_the_features(unet: UNet) -> None:
    features = DiffusionFeatures(unet, Diffusion(), noise_levels=LEVELS, downsample=(2,))
    x = torch.zeros(2, 2, 16, 16)
    for block in features(x, torch.tensor([0, 2])):
        assert not block[0].allclose(block[1], atol=1e-3)


def test_a_factor_that_the_network_lacks_is_named(unet: UNet) -> None:
    with pytest.raises(ConfigError, match=r"downsample: the network has blocks at factors \[2, 4, 8\], got 1"):
        DiffusionFeatures(unet, Diffusion(), noise_levels=LEVELS, downsample=(2, 1))
    with pytest.raises(ConfigError, match="noise level"):
        DiffusionFeatures(unet, Diffusion(), noise_levels=(1.5,), downsample=(2,))
