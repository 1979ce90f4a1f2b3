"""Converted networks in a run: the same arithmetic as trained on, in this package's images, conditions and logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cldf_fast.errors import CheckpointError, ConfigError
from cldf_fast.features import DiffusionFeatures
from cldf_fast.models.adopted import AdoptedClassifier, AdoptedUNet, network_settings
from cldf_fast.models.checkpoints import Loaded, Stated, load
from cldf_fast.models.classifier import NoiseAwareClassifier
from cldf_fast.models.conditions import label_condition, null_condition
from cldf_fast.models.unet import UNet
from cldf_fast.ops import noised_batch, pixel_seed

Make = Callable[..., Loaded]

FIT: dict[str, Any] = {"class_names": ("liver", "spleen"), "channel_names": ("T1", "t2"), "size": 16}
SHAPE: dict[str, Any] = {"channel_mult": (1, 2), "attention_downsample": (2,), "num_head_channels": 8}
STATED: Stated = {
    "num_head_channels": 8,
    "new_attention_order": False,
    "timesteps": 4000,
    "schedule": "linear",
    "rescale_timesteps": True,
    "pixel_range": (0, 1),
    "channel_names": ("t1", "t2"),
    "labels": {0: "none", 4: "Liver", 2: "spleen"},
}
# Every kind of process that published networks were trained on, and one that none was.
PROCESSES: list[Stated] = [
    {"timesteps": 1000, "schedule": "linear", "rescale_timesteps": False, "pixel_range": (-1, 1)},
    {"timesteps": 4000, "schedule": "linear", "rescale_timesteps": True, "pixel_range": (0, 1)},
    {"timesteps": 1000, "schedule": "cosine", "rescale_timesteps": False, "pixel_range": (0, 1)},
    {"timesteps": 777, "schedule": "cosine", "rescale_timesteps": True, "pixel_range": (-0.3, 4.0)},
]


@pytest.fixture
def make(randomised: Callable[[nn.Module], nn.Module], tmp_path: Any) -> Make:
    """make("unet" or "classifier", stated, arguments of the network) -> a converted network at random weights."""

    def loaded(kind: str, stated: Stated | None = None, **arguments: Any) -> Loaded:
        network: nn.Module
        if kind == "unet":
            network = UNet(2, 16, **{"out_channels": 4, "num_classes": 6, **SHAPE, **arguments})
        else:
            network = NoiseAwareClassifier(2, 16, **{"num_classes": 6, **SHAPE, **arguments})
        torch.save(randomised(network).state_dict(), tmp_path / "model.pt")
        given: Any = STATED | ({} if kind == "unet" else {"multi_label": False}) | (stated or {})
        return load(tmp_path / "model.pt", **given)

    return loaded


@torch.no_grad()
@pytest.mark.parametrize("process", PROCESSES)
def test_the_network_sees_what_it_was_trained_on(make: Make, process: Stated) -> None:
    loaded = make("unet", process)
    adopted = AdoptedUNet(loaded, **FIT)
    own = loaded.description.diffusion()
    x, noise = torch.rand(5, 2, 16, 16) * 2 - 1, torch.randn(5, 2, 16, 16)
    steps = torch.tensor([0, 1, own.timesteps // 9, own.timesteps // 2, own.timesteps - 1])
    times = adopted.diffusion.network_time(steps)
    torch.testing.assert_close(times, own.network_time(steps))
    x_t = adopted.diffusion.q_sample(x, steps, noise)
    trained = own.q_sample(loaded.description.normalise(x), steps, noise)
    torch.testing.assert_close(adopted.trained_input(x_t, times), trained, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adopted.diffusion.predict_x0(x_t, steps, noise)[:4], x[:4], rtol=1e-3, atol=1e-3)


def test_the_deterministic_sampler_walks_the_same_path(make: Make) -> None:
    loaded = make("unet")
    adopted, own = AdoptedUNet(loaded, **FIT), loaded.description.diffusion()
    x_t, noise, step, to_step = torch.randn(2, 2, 16, 16), torch.randn(2, 2, 16, 16), 1700, 400

    def trained(x: Tensor, at: int) -> Tensor:
        return adopted.trained_input(x, adopted.diffusion.network_time(torch.tensor([at] * 2)))

    moved = adopted.diffusion.ddim_move(x_t, noise, step, to_step)
    expected = own.ddim_move(trained(x_t, step), noise, step, to_step)
    torch.testing.assert_close(trained(moved, to_step), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("process", PROCESSES)
def test_features_are_those_of_the_network_itself(make: Make, process: Stated) -> None:
    loaded = make("unet", process)
    network, own = loaded.network, loaded.description.diffusion()
    assert isinstance(network, UNet)
    levels = (0.01, 0.2)
    features = DiffusionFeatures(
        adopted := AdoptedUNet(loaded, **FIT), adopted.diffusion, noise_levels=levels, downsample=(2, 1)
    )
    x = torch.rand(3, 2, 16, 16) * 2 - 1
    labels = torch.tensor([[True, False], [False, False], [True, True]])
    got = features(x, label_condition(labels))
    noise = noised_batch(torch.zeros_like(x), torch.tensor([0.5, 0.5]), pixel_seed(x)) / 0.5**0.5
    weights = torch.zeros(3, 6)
    weights[0, 4], weights[1, 0], weights[2, [2, 4]] = 1, 1, 0.5
    blocks = [block for block, factor in enumerate(network.output_downsample) if factor in (2, 1)]
    by_level = []
    for i, step in enumerate(own.steps_of(levels)):
        steps, own_noise = step.expand(3), noise[3 * i : 3 * i + 3]
        x_t = own.q_sample(loaded.description.normalise(x), steps, own_noise)
        last = len(network.output_blocks) - 1
        read = network.decoder_features(x_t, own.network_time(steps), weights, [*blocks, last])
        low, high = loaded.description.pixel_range
        predicted = own.predict_x0(x_t, steps, network.read_out(read[last])[:, :2])
        clean = (predicted - (low + high) / 2) / ((high - low) / 2)
        by_level.append([*(read[block] for block in blocks), clean])
    for maps, expected in zip(got, zip(*by_level, strict=True), strict=True):
        torch.testing.assert_close(maps, torch.cat(expected, dim=1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_conditions_are_rows_by_their_meaning(make: Make) -> None:
    x, t = torch.randn(1, 2, 16, 16), torch.tensor([30.0])
    for labels, null in (
        ({0: "none", 4: "Liver", 2: "spleen"}, 0),
        ({5: "null", 1: "normal", 4: "liver", 2: "spleen"}, 5),
    ):
        loaded = make("unet", {"labels": labels, "pixel_range": (-1, 1)})
        adopted = AdoptedUNet(loaded, **FIT)
        assert adopted.conditional
        assert adopted.null_row == null
        for condition, row in (
            (null_condition(1, 2), null),
            (label_condition(torch.tensor([[False, False]])), 0 if null == 0 else 1),
            (label_condition(torch.tensor([[True, False]])), 4),
            (label_condition(torch.tensor([[False, True]])), 2),
        ):
            expected = loaded.network(x, t, torch.tensor([row]))[:, :2]
            torch.testing.assert_close(adopted(x, t, condition), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_network_without_a_class_table_ignores_conditions(make: Make) -> None:
    loaded = make("unet", {"labels": {}, "pixel_range": (-1, 1)}, num_classes=None)
    adopted = AdoptedUNet(loaded, **FIT)
    assert not adopted.conditional
    assert adopted.null_row is None
    x, t = torch.randn(2, 2, 16, 16), torch.tensor([30.0, 500.0])
    torch.testing.assert_close(adopted(x, t, null_condition(2, 2)), loaded.network(x, t)[:, :2])


def test_softmax_logits_become_a_class_s_own(make: Make) -> None:
    loaded = make("classifier", {"pixel_range": (-1, 1)})
    adopted = AdoptedClassifier(loaded, **FIT)
    x, t = torch.randn(3, 2, 16, 16, requires_grad=True), torch.tensor([0.0, 30.0, 900.0])
    probability = loaded.network(x, t).softmax(dim=1)[:, [4, 2]]
    logits = adopted(x, t)
    torch.testing.assert_close(logits.sigmoid(), probability, rtol=1e-5, atol=1e-6)
    for k in range(2):
        (expected,) = torch.autograd.grad(probability[:, k].log().sum(), x, retain_graph=True)
        (got,) = torch.autograd.grad(nn.functional.logsigmoid(logits[:, k]).sum(), x, retain_graph=True)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_extreme_softmax_logits_stay_finite(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = make("classifier")
    adopted = AdoptedClassifier(loaded, **FIT)
    extreme = torch.tensor([[0.0, 0, -300, 0, 300, 0], [300, 0, 0, 0, -300, 0]])
    monkeypatch.setattr(loaded.network, "forward", lambda x, t: extreme)
    own = adopted(torch.zeros(2, 2, 16, 16), torch.zeros(2))
    others = extreme[0, [0, 1, 2, 3, 5]].logsumexp(0)
    assert own[0, 0].item() == pytest.approx(300 - others.item())
    assert own.isfinite().all()


@torch.no_grad()
def test_sigmoid_logits_are_chosen_by_their_meaning(make: Make) -> None:
    loaded = make(
        "classifier", {"multi_label": True, "pixel_range": (0, 1), "labels": {1: "liver", 0: "spleen"}}, num_classes=2
    )
    adopted = AdoptedClassifier(loaded, **FIT)
    x, steps = torch.rand(2, 2, 16, 16) * 2 - 1, torch.tensor([10, 900])
    noise = torch.randn_like(x)
    own = loaded.description.diffusion()
    times = own.network_time(steps)
    expected = loaded.network(own.q_sample(loaded.description.normalise(x), steps, noise), times)[:, [1, 0]]
    got = adopted(adopted.diffusion.q_sample(x, steps, noise), times)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert adopted.pooled is loaded.network.pooled
    assert adopted.block_at(2) is loaded.network.block_at(2)


@pytest.mark.parametrize(
    ("kind", "stated", "fit", "sentence"),
    [
        (
            "unet",
            {"channel_names": ("t2", "t1")},
            {},
            "expected the data's channels in order, T1, t2, got a network for t2, t1",
        ),
        ("unet", {}, {"channel_names": ("t1",)}, "expected the data's channels in order, t1, got a network for t1, t2"),
        ("unet", {}, {"size": 17}, "data.size: expected a multiple of 2 for model.pt, got 17"),
        ("unet", {"labels": {4: "liver", 2: "spleen"}}, {}, "means healthy or none or normal, got 4=liver, 2=spleen"),
        ("unet", {"labels": {0: "healthy", 4: "liver"}}, {}, "expected one that means spleen, got 0=healthy, 4=liver"),
        ("unet", {"labels": {0: "none", 1: "normal", 4: "liver", 2: "spleen"}}, {}, "expected one that means healthy"),
        (
            "classifier",
            {"labels": {1: "liver", 3: "kidney"}},
            {},
            "expected one that means spleen, got 1=liver, 3=kidney",
        ),
        ("classifier", {}, {"size": 32}, "data.size: expected 16, which model.pt was trained at, got 32; add --set"),
        ("classifier", {"channel_names": ("a", "b")}, {}, "expected the data's channels in order"),
    ],
)
def test_what_does_not_fit_is_refused(make: Make, kind: str, stated: Any, fit: dict[str, Any], sentence: str) -> None:
    loaded = make(kind, stated, **({"pool": "attention", "image_size": 16} if kind == "classifier" else {}))
    adopt: Any = AdoptedUNet if kind == "unet" else AdoptedClassifier
    with pytest.raises(ConfigError, match=sentence) as raised:
        adopt(loaded, **{**FIT, **fit})
    assert "\n" not in str(raised.value)


def test_each_place_takes_its_own_kind(make: Make) -> None:
    with pytest.raises(CheckpointError, match=r"model\.pt: expected a classifier, got a unet"):
        AdoptedClassifier(make("unet"), **FIT)
    with pytest.raises(CheckpointError, match=r"model\.pt: expected a unet, got a classifier"):
        AdoptedUNet(make("classifier"), **FIT)


@pytest.mark.parametrize("kind", ["unet", "classifier"])
def test_the_configuration_tells_the_network_s_shape(make: Make, kind: str) -> None:
    from cldf_fast.config import make_config

    architecture = make(kind).description.architecture
    network: Any = make_config(
        {
            "data": {"size": 16},
            "features": {"downsample": [2, 1]},
            "evidence": {"cam_downsample": 2},
            "cdm": {"network": network_settings(make("unet").description.architecture)},
            "classifier": {"network": network_settings(make("classifier").description.architecture)},
        }
    )
    section = (network.cdm if kind == "unet" else network.classifier).network
    assert section.model_channels == architecture.model_channels == 16
    assert section.channel_mult == (1, 2)
    assert section.attention_downsample == (2,)
