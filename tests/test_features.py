"""Features of the frozen UNet: every noise level's block outputs, whatever the batch, and no block too many."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cldf_fast.diffusion import Diffusion
from cldf_fast.errors import ConfigError, DataError
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
    read = [i for i, factor in enumerate(unet.output_downsample) if factor in (8, 4)]
    later = [*unet.output_blocks[max(read) + 1 :], unet.out]
    assert len(later) > 1
    for module in later:
        module.register_forward_hook(lambda *_: pytest.fail("computed for nothing"))
    assert len(features(torch.zeros(1, 2, 16, 16), torch.tensor([0]))) == len(read)


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


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (torch.tensor([0]), "condition: expected a row for each of 2 images, got int64"),
        (torch.tensor(0), "condition: expected a row for each of 2 images, got int64"),
        (torch.tensor([0.7, 0.2]), "condition: expected rows of the class table, integers"),
        (torch.zeros(2, 4, dtype=torch.int64), "condition: expected rows of the class table, integers"),
    ],
)
def test_a_condition_that_does_not_fit_is_named(unet: UNet, condition: Tensor, message: str) -> None:
    features = DiffusionFeatures(unet, Diffusion(), noise_levels=LEVELS, downsample=(2,))
    with pytest.raises(DataError, match=message):
        features(torch.zeros(2, 2, 16, 16), condition)


def test_a_factor_that_the_network_lacks_is_named(unet: UNet) -> None:
    with pytest.raises(ConfigError, match=r"downsample: the network has blocks at factors \[2, 4, 8\], got 1"):
        DiffusionFeatures(unet, Diffusion(), noise_levels=LEVELS, downsample=(2, 1))
    with pytest.raises(ConfigError, match="noise level"):
        DiffusionFeatures(unet, Diffusion(), noise_levels=(1.5,), downsample=(2,))


class Doubling(nn.Module):
    """A decoder block: a convolution, then twice the size."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(self.inner(x).tanh(), scale_factor=2.0)


class Foreign(nn.Module):
    """A network as MONAI and diffusers build theirs; the answer in `sample`, as diffusers gives it."""

    def __init__(self, in_channels: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 6)
        self.down = nn.Conv2d(in_channels, 6, 8, stride=8)
        self.up_blocks = nn.ModuleList([Doubling(6, 5), Doubling(5, 4), Doubling(4, 3)])
        self.out = nn.Conv2d(3, in_channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Any:
        h = self.down(sample) + timestep.to(sample.dtype).view(-1, 1, 1, 1) / 100
        if class_labels is not None:
            h = h + self.embedding(class_labels)[:, :, None, None]
        for block in self.up_blocks:
            h = block(h)
        return SimpleNamespace(sample=self.out(h))

    def maps(self, x: Tensor, timestep: Tensor, labels: Tensor) -> list[Tensor]:
        """Outputs of the three blocks, and the prediction, computed apart from any hook."""
        h = self.down(x) + timestep.view(-1, 1, 1, 1) / 100 + self.embedding(labels)[:, :, None, None]
        found = []
        for block in self.up_blocks:
            assert isinstance(block, Doubling)
            h = nn.functional.interpolate(block.inner(h).tanh(), scale_factor=2.0)
            found.append(h)
        return [*found, self.out(h)]


EXAMPLE = torch.zeros(2, 1, 16, 16), torch.tensor([0, 1])
NAMED = [
    ({"downsample": (4, 2)}, [0, 1]),
    ({"downsample": (2,)}, [1]),
    ({"blocks": ["up_blocks.2", "up_blocks.0"]}, [2, 0]),
]


@pytest.mark.parametrize("prediction", [True, False])
@pytest.mark.parametrize(("chosen", "places"), NAMED)
def test_blocks_of_any_network_are_read_by_factor_or_by_name(
    chosen: dict[str, Any], places: list[int], prediction: bool
) -> None:
    network, diffusion = Foreign().eval(), Diffusion()
    features = DiffusionFeatures(
        network, diffusion, noise_levels=LEVELS, prediction=prediction, example=EXAMPLE, **chosen
    )
    x, labels = torch.rand(3, 1, 24, 16) * 2 - 1, torch.tensor([2, 0, 1])
    steps = torch.tensor([20, 100, 300])
    noised = noised_batch(x, diffusion.alpha_bar[steps], pixel_seed(x)).unflatten(0, (3, 3))
    found: list[list[Tensor]] = []
    for x_t, step in zip(noised, steps, strict=True):
        *maps, noise = network.maps(x_t, step.expand(3), labels)
        level = diffusion.alpha_bar[step]
        clean = (x_t - (1 - level).sqrt() * noise) / level.sqrt()
        found.append([*(maps[place] for place in places), *[clean] * prediction])
    got = features(x, labels)
    expected = [torch.cat(levels, dim=1) for levels in zip(*found, strict=True)]
    assert [block.shape[1] for block in got] == features.channels
    for block, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(block, reference, rtol=1e-5, atol=1e-5)
        assert not block.requires_grad


def test_the_project_s_network_is_read_alike_by_name_and_inside_another_module(unet: UNet) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = unet

        def forward(self, x: Tensor, times: Tensor, condition: Tensor) -> Tensor:
            predicted: Tensor = self.inner(x, times, condition)
            return predicted

    x, condition = torch.rand(2, 2, 16, 24) * 2 - 1, torch.tensor([1, 3])
    choices: dict[str, Any] = {"noise_levels": LEVELS, "prediction": True}
    names = [f"output_blocks.{i}" for i, factor in enumerate(unet.output_downsample) if factor == 4]
    expected = DiffusionFeatures(unet, Diffusion(), downsample=(4,), **choices)(x, condition)
    by_name = DiffusionFeatures(unet, Diffusion(), blocks=names, **choices)(x, condition)
    wrapped = DiffusionFeatures(
        Wrapper(), Diffusion(), blocks=[f"inner.{name}" for name in names], example=(x, condition), **choices
    )(x, condition)
    for reference, named, inside in zip(expected, by_name, wrapped, strict=True):
        assert named.equal(reference)
        torch.testing.assert_close(inside, reference, rtol=1e-6, atol=1e-6)


def test_a_foreign_network_stops_after_the_last_block_and_is_left_as_it_was() -> None:
    network = Foreign()
    hooks = {name: len(module._forward_hooks) for name, module in network.named_modules()}
    for module in (network.up_blocks[2], network.out):
        module.register_forward_hook(lambda *_: pytest.fail("computed for nothing"))
    blocks = ["up_blocks.1", "up_blocks.0.inner"]
    features = DiffusionFeatures(
        network, Diffusion(), noise_levels=LEVELS, blocks=blocks, prediction=False, example=EXAMPLE
    )
    assert [block.shape for block in features(*EXAMPLE)] == [(2, 12, 8, 8), (2, 15, 2, 2)]
    added = {"up_blocks.2": 1, "out": 1}
    assert {name: len(module._forward_hooks) for name, module in network.named_modules()} == {
        name: count + added.get(name, 0) for name, count in hooks.items()
    }
    with pytest.raises(RuntimeError, match="channels"):
        features.reader(torch.zeros(1, 4, 16, 16), torch.zeros(1), None, lambda *_: None)
    assert len(network.up_blocks[1]._forward_hooks) == hooks["up_blocks.1"]


@pytest.mark.parametrize("max_batch", [1, 4, 100])
def test_passes_are_bounded_and_change_nothing(unet: UNet, max_batch: int) -> None:
    choices: dict[str, Any] = {"noise_levels": LEVELS, "downsample": (8, 2)}
    x, condition = torch.rand(3, 2, 16, 16).double() * 2 - 1, torch.rand(3, 4).double()
    expected = DiffusionFeatures(unet.double(), Diffusion(), **choices)(x, condition)
    rows: list[int] = []
    unet.middle_block.register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    got = DiffusionFeatures(unet, Diffusion(), max_batch=max_batch, **choices)(x, condition)
    for block, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(block, reference, rtol=1e-9, atol=1e-9)
    assert sum(rows) == 9
    assert max(rows) <= max_batch


@pytest.mark.parametrize("max_batch", [1, 4, 5, 100])
@pytest.mark.parametrize("prediction", [True, False])
def test_projecting_maps_as_they_come_equals_projecting_them_after(
    unet: UNet, prediction: bool, max_batch: int
) -> None:
    features = DiffusionFeatures(
        unet.double(), Diffusion(), noise_levels=LEVELS, downsample=(8, 2), prediction=prediction, max_batch=max_batch
    )
    x, condition = torch.rand(3, 2, 16, 24).double() * 2 - 1, torch.rand(3, 4).double()
    weights = [torch.randn(5, channels).double() for channels in features.channels]
    for count in (3, 1, 0):
        maps = features(x[:count], condition[:count])
        got = features.project(x[:count], condition[:count], weights)
        for projected, block, weight in zip(got, maps, weights, strict=True):
            torch.testing.assert_close(projected, torch.einsum("bchw,dc->bdhw", block, weight), rtol=1e-9, atol=1e-9)
    with pytest.raises(ConfigError, match=r"weights: expected one \[D, C\] a map, of \["):
        features.project(x, condition, weights[1:])


def test_no_map_is_held_while_the_next_is_computed(unet: UNet) -> None:
    features = DiffusionFeatures(unet, Diffusion(), noise_levels=LEVELS, downsample=(8, 4, 2), prediction=False)
    seen: list[weakref.ref[Tensor]] = []

    def none_is_held(*_: Any) -> None:
        assert all(each() is None for each in seen)

    for block in unet.output_blocks:
        block.register_forward_pre_hook(none_is_held)
    features._read(
        torch.rand(1, 2, 16, 16), torch.tensor([0]), lambda _i, block, _start: seen.append(weakref.ref(block))
    )
    assert len(seen) == len(features.channels)


def test_half_precision_is_float32_outside_and_near_the_exact_features(randomised: Randomise) -> None:
    # Wide enough that a normalised group holds several channels: the deviation of a few pixels magnifies rounding.
    unet = UNet(2, 64, channel_mult=(1, 2), attention_downsample=(2,), num_classes=4)
    randomised(unet)
    choices: dict[str, Any] = {"noise_levels": LEVELS, "downsample": (2,)}
    arguments = torch.rand(3, 2, 16, 16) * 2 - 1, torch.tensor([0, 1, 2])
    expected = DiffusionFeatures(unet.eval(), Diffusion(), **choices)(*arguments)
    got = DiffusionFeatures(unet, Diffusion(), dtype=torch.bfloat16, **choices)(*arguments)
    for block, reference in zip(got, expected, strict=True):
        error = (block - reference).norm() / reference.norm()
        assert block.dtype == torch.float32
        assert 1e-5 < error < 0.05


def foreign(**choices: Any) -> DiffusionFeatures:
    defaults: dict[str, Any] = {"noise_levels": LEVELS, "prediction": False, "example": EXAMPLE}
    return DiffusionFeatures(choices.pop("network", Foreign()), Diffusion(), **(defaults | choices))


def test_what_cannot_be_read_is_named(unet: UNet) -> None:
    with pytest.raises(ConfigError, match="downsample, blocks: expected one of them, got neither"):
        foreign()
    with pytest.raises(ConfigError, match="downsample, blocks: expected one of them, got both"):
        foreign(downsample=(2,), blocks=["up_blocks.0"])
    with pytest.raises(ConfigError, match="expected at least one noise level and one block, got none"):
        foreign(blocks=[])
    with pytest.raises(ConfigError, match="expected at least one noise level"):
        foreign(downsample=(2,), noise_levels=())
    with pytest.raises(ConfigError, match=r"downsample: the network has blocks at factors \[1, 2, 4\], got 8"):
        foreign(downsample=(2, 8))
    with pytest.raises(ConfigError, match="expected names of the network's modules, such as 'out', got 'nowhere'"):
        foreign(blocks=["up_blocks.1", "nowhere"])
    with pytest.raises(ConfigError, match=r"such as 'output_blocks\.5', got 'middle'"):
        foreign(network=unet, blocks=["middle"])
    with pytest.raises(ConfigError, match="blocks: expected every name once"):
        foreign(blocks=["out", "out"])
    with pytest.raises(ConfigError, match=r"example: expected .* because Foreign is not the project's UNet"):
        foreign(downsample=(2,), example=None)
    with pytest.raises(ConfigError, match="because Conv2d has no list up_blocks"):
        foreign(network=nn.Conv2d(1, 1, 1), downsample=(2,))
    with pytest.raises(DataError, match=r"return \[1, C, h, w\], got \[1, 6\] from embedding"):
        foreign(blocks=["embedding"])
    with pytest.raises(ConfigError, match=r"dtype: expected torch\.float32, torch\.bfloat16 or torch\.float16"):
        foreign(downsample=(2,), dtype=torch.float64)
    with pytest.raises(ConfigError, match="max_batch: expected an integer, 1 or more, got 0"):
        foreign(downsample=(2,), max_batch=0)
    with pytest.raises(DataError, match=r"x: expected floating \[B, 1, H, W\], got float32 \[1, 2, 16, 16\]"):
        foreign(downsample=(2,))(torch.zeros(1, 2, 16, 16), torch.tensor([0]))


def test_modules_that_run_twice_or_never_are_named() -> None:
    class Odd(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Identity()
            self.twice = nn.Identity()

        def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
            return self.twice(self.twice(x)) + t.view(-1, 1, 1, 1)

    with pytest.raises(ConfigError, match="modules that the network calls, got unused"):
        foreign(network=Odd(), blocks=["unused"])
    with pytest.raises(ConfigError, match="modules that the network calls once, got twice"):
        foreign(network=Odd(), blocks=["twice", "unused"])


def test_another_way_to_call_a_network_is_taken() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Conv2d(1, 2, 1)

        def forward(self, *, image: Tensor, context: Tensor) -> Tensor:
            return self.block(image) * context.view(-1, 1, 1, 1)

    network = Named()
    features = foreign(
        network=network,
        blocks=["block"],
        call=lambda x, _t, condition: network(image=x, context=condition),
        example=(torch.zeros(1, 1, 4, 4), torch.ones(1)),
    )
    assert [block.shape for block in features(torch.zeros(2, 1, 8, 8), torch.ones(2))] == [(2, 6, 8, 8)]


def test_networks_of_monai_and_diffusers_are_read() -> None:
    x, labels = torch.rand(2, 1, 32, 32) * 2 - 1, torch.tensor([0, 2])
    monai = pytest.importorskip("monai.networks.nets")
    diffusers = pytest.importorskip("diffusers")
    networks = [
        monai.DiffusionModelUNet(
            2, 1, 1, num_res_blocks=1, channels=(8, 16), attention_levels=(False, False), norm_num_groups=4,
            num_class_embeds=3,
        ),
        diffusers.UNet2DModel(
            32, 1, 1, block_out_channels=(8, 16), down_block_types=("DownBlock2D",) * 2, layers_per_block=1,
            up_block_types=("UpBlock2D",) * 2, norm_num_groups=4, num_class_embeds=3,
        ),
    ]  # fmt: skip
    for network in networks:
        got = foreign(network=network.eval(), downsample=(1,), example=(x, labels), prediction=True)(x, labels)
        assert [block.shape for block in got] == [(2, 3 * 16, 32, 32), (2, 3 * 8, 32, 32), (2, 3, 32, 32)]
        assert not got[0][0].allclose(got[0][1])
