"""Checkpoints in and out: architectures from tensors, arithmetic against the papers' equations, what is refused."""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cldf_fast.errors import CheckpointError, ConfigError
from cldf_fast.models import peers
from cldf_fast.models.architecture import first_difference, infer, multipliers
from cldf_fast.models.checkpoints import (
    Description,
    Loaded,
    from_diffusers,
    from_monai,
    load,
    save,
    to_diffusers,
    to_monai,
)
from cldf_fast.models.classifier import NoiseAwareClassifier
from cldf_fast.models.unet import UNet
from tests.models.published import CLASSIFIERS, UNETS

Randomise = Callable[[nn.Module], nn.Module]
Layout = Callable[[nn.Module], tuple[int, int, str]]
State = dict[str, Tensor]

PROCESS: dict[str, Any] = {
    "timesteps": 4000,
    "schedule": "linear",
    "rescale_timesteps": True,
    "pixel_range": (0, 1),
    "channel_names": ("t1", "flair"),
    "labels": {0: "healthy", 2: "kidneys"},
}
HEAD: dict[str, Any] = {"multi_label": False}
HEADS: dict[str, Any] = {"num_head_channels": 8, "new_attention_order": False}
SHAPE: dict[str, Any] = {"channel_mult": (1, 2), "num_res_blocks": 2, "attention_downsample": (2,), "num_classes": 3}


def small(kind: str = "unet", **changes: Any) -> UNet | NoiseAwareClassifier:
    network = UNet if kind == "unet" else NoiseAwareClassifier
    return network(2, 16, **{**SHAPE, "num_head_channels": 8, **changes})


def shapes_of(state: State) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in state.items()}


@pytest.fixture
def state(randomised: Randomise) -> State:
    """Of a UNet with `HEADS` and `SHAPE`, random weights."""
    return randomised(small()).state_dict()


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


# --- Published checkpoints --------------------------------------------------------------------------------------------


def spread(network: nn.Module) -> State:
    """A state dict of these shapes, each tensor one number in memory and on disk."""
    return {name: torch.randn(1).expand(value.shape) for name, value in network.state_dict().items()}


@pytest.mark.parametrize("name", UNETS)
def test_published_unets_load(name: str, layout: Layout, tmp_path: Path) -> None:
    arguments, *expected = UNETS[name]
    with torch.device("meta"):
        network = UNet(**arguments)
    heads = "num_head_channels" if "num_head_channels" in arguments else "num_heads"
    stated = {**PROCESS, "new_attention_order": False, heads: arguments.get(heads, 4)}
    stated["channel_names"] = tuple(f"channel {i}" for i in range(arguments["in_channels"]))
    stated["labels"] = {0: "healthy"}
    loaded, description = load(saved(tmp_path / "model.pt", spread(network)), kind="unet", **stated)
    assert layout(loaded) == tuple(expected)
    architecture = description.architecture
    for key, value in arguments.items():
        assert getattr(architecture, key) == value, key
    assert architecture.resblock_updown == arguments.get("resblock_updown", False)
    assert architecture.scale_shift == arguments.get("scale_shift", True)
    assert description.learns_sigma


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_published_classifiers_load(name: str, layout: Layout, tmp_path: Path) -> None:
    arguments, *expected = CLASSIFIERS[name]
    with torch.device("meta"):
        network = NoiseAwareClassifier(**arguments)
    stated = {**PROCESS, **HEAD, "num_head_channels": 64, "new_attention_order": False, "labels": {1: "tumour"}}
    stated["channel_names"] = tuple(f"channel {i}" for i in range(arguments["in_channels"]))
    loaded, description = load(saved(tmp_path / "model.pt", spread(network)), kind="classifier", **stated)
    assert layout(loaded) == tuple(expected)
    for key, value in arguments.items():
        assert getattr(description.architecture, key) == value, key


@given(
    kind=st.sampled_from(["unet", "classifier"]),
    widths=st.lists(st.sampled_from([16, 32, 48, 64, 80]), min_size=1, max_size=4),
    model_channels=st.sampled_from([16, 24, 32]),
    blocks=st.integers(1, 3),
    data=st.data(),
)
def test_an_architecture_is_found_again_or_asked_for(
    kind: Any, widths: list[int], model_channels: int, blocks: int, data: st.DataObject
) -> None:
    levels = len(widths)
    attention = data.draw(st.sets(st.sampled_from([2**level for level in range(levels)])))
    pool = data.draw(st.sampled_from(["adaptive", "attention", "spatial", "spatial_v2", "mean"]))
    out = {"out_channels": 4} if kind == "unet" else {"pool": pool, "image_size": 8 * 2 ** (levels - 1)}
    arguments = {
        "num_res_blocks": blocks,
        "attention_downsample": tuple(sorted(attention)),
        "num_classes": data.draw(st.integers(1, 5)),
        "scale_shift": data.draw(st.booleans()),
        "resblock_updown": levels > 1 and data.draw(st.booleans()),
        "channel_mult": multipliers(widths, model_channels),
        **out,
    }
    with torch.device("meta"):
        network = (UNet if kind == "unet" else NoiseAwareClassifier)(
            2, model_channels, num_head_channels=8, **arguments
        )
    shapes = shapes_of(network.state_dict())
    try:
        architecture = infer(shapes)
    except ConfigError as error:
        assert kind == "classifier"
        assert arguments["resblock_updown"] or levels == 1
        assert f"{blocks}" in str(error)
        architecture = infer(shapes, num_res_blocks=blocks)
    if pool != "attention":
        arguments |= {} if kind == "unet" else {"image_size": None}
    for key, value in arguments.items():
        assert getattr(architecture, key) == value, key
    assert architecture.widths == tuple(widths)
    built = replace(architecture, num_head_channels=8, new_attention_order=False).build()
    assert first_difference(built, shapes) is None


# --- Outputs against an independent forward pass in float64 -----------------------------------------------------------


class Equations:
    """The networks' equations (Ho et al. 2020, Dhariwal & Nichol 2021), in float64, on a state dict with `SHAPE`."""

    def __init__(self, state: State, *, scale_shift: bool, updown: bool, new_order: bool) -> None:
        self.state = {name: value.double() for name, value in state.items()}
        self.scale_shift, self.updown, self.new_order = scale_shift, updown, new_order

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].flatten(1).T + self.state[f"{name}.bias"]

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        columns = F.unfold(x, weight.shape[-1], padding=weight.shape[-1] // 2, stride=stride)
        out = weight.flatten(1) @ columns + self.state[f"{name}.bias"][:, None]
        return out.unflatten(2, (x.shape[2] // stride, x.shape[3] // stride))

    def norm(self, name: str, x: Tensor) -> Tensor:
        groups = x.unflatten(1, (math.gcd(32, x.shape[1]), -1)).flatten(2)
        deviation = (groups.var(dim=2, correction=0, keepdim=True) + 1e-5).sqrt()
        unit = ((groups - groups.mean(dim=2, keepdim=True)) / deviation).reshape(x.shape)
        across = (-1, *[1] * (x.ndim - 2))
        return unit * self.state[f"{name}.weight"].view(across) + self.state[f"{name}.bias"].view(across)

    def residual(self, name: str, x: Tensor, embedding: Tensor, resample: str = "") -> Tensor:
        def resized(x: Tensor) -> Tensor:
            if resample == "up":
                return x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            return x.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5)) if resample == "down" else x

        h = self.conv(f"{name}.in_layers.2", resized(silu(self.norm(f"{name}.in_layers.0", x))))
        shift = self.linear(f"{name}.emb_layers.1", silu(embedding))[:, :, None, None]
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + shift)
        x = resized(x)
        skip = self.conv(f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in self.state else x
        return skip + self.conv(f"{name}.out_layers.3", silu(h))

    def attention(self, name: str, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        packed = self.linear(f"{name}.qkv", self.norm(f"{name}.norm", x).flatten(2).mT)
        attended = self.attend(packed, self.new_order)
        return (tokens + self.linear(f"{name}.proj_out", attended)).mT.reshape(x.shape)

    def attend(self, packed: Tensor, new_order: bool) -> Tensor:
        channels, per_head = packed.shape[2] // 3, HEADS["num_head_channels"]
        heads = []
        for head in range(channels // per_head):
            starts = [channels * i + per_head * head if new_order else per_head * (3 * head + i) for i in range(3)]
            q, k, v = (packed[:, :, start : start + per_head] for start in starts)
            heads.append((q @ k.mT / math.sqrt(per_head)).softmax(dim=2) @ v)
        return torch.cat(heads, dim=2)

    def time(self, t: Tensor) -> Tensor:
        frequencies = 10_000 ** (-torch.arange(8, dtype=torch.float64) / 8)
        angles = t.double()[:, None] * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.linear("time_embed.2", silu(self.linear("time_embed.0", waves)))

    def encode(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """Outputs of the input blocks and of the middle block."""
        maps = [self.conv("input_blocks.0.0", x.double())]
        for i in (1, 2):
            maps.append(self.residual(f"input_blocks.{i}.0", maps[-1], embedding))
        halve = self.residual("input_blocks.3.0", maps[-1], embedding, "down") if self.updown else None
        maps.append(self.conv("input_blocks.3.0.op", maps[-1], stride=2) if halve is None else halve)
        for i in (4, 5):
            maps.append(
                self.attention(f"input_blocks.{i}.1", self.residual(f"input_blocks.{i}.0", maps[-1], embedding))
            )
        h = self.attention("middle_block.1", self.residual("middle_block.0", maps[-1], embedding))
        return [*maps, self.residual("middle_block.2", h, embedding)]

    def unet(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        embedding = self.time(t) + self.state["label_emb.weight"][labels]
        *skips, h = self.encode(x, embedding)
        for i in range(6):
            h = self.residual(f"output_blocks.{i}.0", torch.cat([h, skips.pop()], dim=1), embedding)
            if i < 3:
                h = self.attention(f"output_blocks.{i}.1", h)
            if i == 2 and self.updown:
                h = self.residual("output_blocks.2.2", h, embedding, "up")
            elif i == 2:
                h = self.conv("output_blocks.2.2.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
        return self.conv("out.2", silu(self.norm("out.0", h)))

    def classifier(self, x: Tensor, t: Tensor, pool: str) -> Tensor:
        maps = self.encode(x, self.time(t))
        averages = [part.mean(dim=(2, 3)) for part in maps]
        if pool == "mean":
            return self.linear("out", averages[-1])
        if pool == "spatial":
            return self.linear("out.2", self.linear("out.0", torch.cat(averages, dim=1)).relu())
        if pool == "spatial_v2":
            hidden = self.norm("out.1", self.linear("out.0", torch.cat(averages, dim=1)))
            return self.linear("out.3", silu(hidden))
        h = silu(self.norm("out.0", maps[-1]))
        if pool == "adaptive":
            return self.linear("out.3", h.mean(dim=(2, 3)))
        tokens = torch.cat([h.mean(dim=(2, 3)).unsqueeze(2), h.flatten(2)], dim=2)
        tokens = (tokens + self.state["out.2.positional_embedding"]).mT
        return self.linear("out.2.c_proj", self.attend(self.linear("out.2.qkv_proj", tokens), True)[:, 0])


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


@torch.no_grad()
@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("updown", [False, True])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_converted_unet_follows_the_equations(
    randomised: Randomise, tmp_path: Path, scale_shift: bool, updown: bool, new_order: bool
) -> None:
    source = randomised(small(scale_shift=scale_shift, resblock_updown=updown, out_channels=4)).state_dict()
    path = saved(tmp_path / "ema_0.9999_080000.pt", {f"module.{name}": value for name, value in source.items()})
    loaded = load(path, num_head_channels=8, new_attention_order=new_order, **PROCESS)
    save(tmp_path / "cdm.safetensors", loaded)
    network, description = load(tmp_path / "cdm.safetensors")
    x, t, labels = torch.randn(2, 2, 8, 12), torch.tensor([3.25, 870.0]), torch.tensor([2, 0])
    expected = Equations(source, scale_shift=scale_shift, updown=updown, new_order=new_order).unet(x, t, labels)
    assert expected.std() > 0.1
    torch.testing.assert_close(network(x, t, labels).double(), expected, rtol=1e-5, atol=1e-5)
    assert network(x, t, labels).equal(loaded.network(x, t, labels))
    assert description == loaded.description
    assert not network.training


@torch.no_grad()
@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2", "mean"])
@pytest.mark.parametrize("updown", [False, True])
def test_a_converted_classifier_follows_the_equations(
    randomised: Randomise, tmp_path: Path, pool: str, updown: bool
) -> None:
    source = randomised(small("classifier", pool=pool, image_size=8, resblock_updown=updown)).state_dict()
    loaded = load(saved(tmp_path / "classifier_model.pt", source), **HEADS, **HEAD, **PROCESS)
    save(tmp_path / "classifier.safetensors", loaded)
    network, description = load(tmp_path / "classifier.safetensors", kind="classifier")
    x, t = torch.randn(2, 2, 8, 8), torch.tensor([3.25, 870.0])
    expected = Equations(source, scale_shift=True, updown=updown, new_order=False).classifier(x, t, pool)
    torch.testing.assert_close(network(x, t).double(), expected, rtol=1e-5, atol=1e-5)
    assert description.multi_label is False
    assert description.architecture.pool == pool
    assert description.architecture.image_size == (8 if pool == "attention" else None)


# --- Files and wrappers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
def test_formats_and_half_precision(suffix: str, state: State, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    halves = {name: value.half() for name, value in state.items()}
    save_file(halves, path) if suffix == ".safetensors" else torch.save(halves, path)
    network, description = load(path, **HEADS, **PROCESS)
    assert description.source == f"model{suffix}"
    for name, value in network.state_dict().items():
        assert value.dtype == torch.float32
        assert value.equal(halves[name].float())


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "ema"])
def test_wrappers_and_prefixes(key: str, state: State, tmp_path: Path) -> None:
    wrapped = {key: {f"module._orig_mod.{name}": value for name, value in state.items()}, "epoch": 3, "optimizer": {}}
    network, _ = load(saved(tmp_path / "model.pt", wrapped), **HEADS, **PROCESS)
    assert all(value.equal(state[name]) for name, value in network.state_dict().items())


def test_of_several_networks_one_is_stated(state: State, tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pt", {"model": state, "ema": {name: value + 1 for name, value in state.items()}})
    with pytest.raises(ConfigError, match="weights: expected one of model, ema, which the file holds, got none"):
        load(path, **HEADS, **PROCESS)
    for weights, shift in (("model", 0), ("ema", 1)):
        network, _ = load(path, weights=weights, **HEADS, **PROCESS)
        torch.testing.assert_close(network.time_embed[0].weight.detach(), state["time_embed.0.weight"] + shift)


def test_weights_that_a_file_does_not_hold_are_refused(state: State, tmp_path: Path) -> None:
    for content in ({"model": state}, state):
        with pytest.raises(ConfigError, match="weights: the file has no 'ema'"):
            load(saved(tmp_path / "model.pt", content), weights="ema", **HEADS, **PROCESS)


class _Payload:
    """Runs a command where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("way", ["zip", "legacy", "pickle"])
def test_nothing_in_a_file_is_executed(way: str, state: State, tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "model.pt"
    content = {"payload": _Payload(marker), **state}
    if way == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "zip")
    with pytest.raises(CheckpointError, match=r"holds more than tensors \(\w+\.mkdir\), which could run code"):
        load(path, **HEADS, **PROCESS)
    assert not marker.exists()
    # The file is what it seems: a reader that trusts it runs the command.
    pickle.loads(path.read_bytes()) if way == "pickle" else torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_file_is_named(suffix: str, state: State, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    for damaged in (b"", b"no checkpoint at all", whole[:7], whole[: len(whole) // 2], whole[:-1000], b"\x89PNG" * 99):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"model{suffix}: can't be read; it is truncated or no checkpoint$"):
            load(path, **HEADS, **PROCESS)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"state": {0: {"step": 9}}, "param_groups": [{"lr": 1e-4}]}, "is an optimizer's state and no network"),
        ([torch.zeros(3)], "holds no state dict"),
        ({}, "holds no state dict"),
        ({"epoch": 3}, "holds no state dict"),
        (torch.zeros(3), "holds no state dict"),
        ({"layers.0.weight": torch.zeros(3)}, "expected input_blocks.0.0.weight, found layers.0.weight"),
        ({"conv1.weight": torch.zeros(3), "fc.weight": torch.zeros(3)}, "is a ResNet, which is not told"),
        ({"middle_block.resnet_1.norm1.weight": torch.zeros(3)}, "is a MONAI DiffusionModelUNet"),
        ({"mid_block.resnets.0.norm1.weight": torch.zeros(3)}, "is a diffusers network without its configuration"),
        ({"input_blocks.0.0.weight": torch.zeros(3)}, "expected a tensor time_embed.0.weight"),
    ],
)
def test_what_is_no_network_is_named(content: object, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=sentence) as raised:
        load(saved(tmp_path / "opt080000.pt", content), **HEADS, **PROCESS)
    assert "opt080000.pt: " in str(raised.value)
    assert "\n" not in str(raised.value)


def test_networks_of_a_run_are_left_to_the_run(state: State, tmp_path: Path) -> None:
    for name in ("config.yaml", "dataset.json"):
        (tmp_path / name).touch()
    save_file(state, tmp_path / "cdm.safetensors")
    with pytest.raises(CheckpointError, match=r"cdm.safetensors: is part of a run"):
        load(tmp_path / "cdm.safetensors", **HEADS, **PROCESS)


def test_missing_files_and_other_kinds_are_named(state: State, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model.pt: is missing"):
        load(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"with config.json"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="expected a classifier, found a unet"):
        load(saved(tmp_path / "model.pt", state), kind="classifier", **HEADS, **PROCESS)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("middle_block.1.qkv.bias", None, "middle_block.1.qkv.bias is missing"),
        ("middle_block.3.bias", torch.zeros(1), "middle_block.3.bias is one too many"),
        ("out.0.bias", torch.zeros(5), r"out.0.bias: expected shape \[16\], got \[5\]"),
        ("input_blocks.3.0.op.weight", None, "5 input blocks fit no number of levels|2 input blocks fit no"),
        ("out.2.weight", torch.full((2, 16, 3, 3), math.nan), "out.2.weight is not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name: str, value: Tensor | None, sentence: str, tmp_path: Path) -> None:
    broken = dict(small().state_dict())
    if value is None:
        del broken[name]
    else:
        broken[name] = value
    with pytest.raises(CheckpointError, match=sentence):
        load(saved(tmp_path / "model.pt", broken), **HEADS, **PROCESS)


# --- What is stated ---------------------------------------------------------------------------------------------------


def test_all_that_is_missing_is_listed_in_one_sentence(state: State, tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pt", state)
    with pytest.raises(ConfigError) as raised:
        load(path)
    message = str(raised.value)
    for key in ("num_heads or num_head_channels", "new_attention_order", *PROCESS):
        assert f"{key} (" in message
    assert "the 2 input channels" in message
    assert "the 3 rows of the class table" in message
    assert "\n" not in message
    stated = {**HEADS, **PROCESS}
    for key in stated:
        with pytest.raises(ConfigError, match=key) as one:
            load(path, **{other: value for other, value in stated.items() if other != key})
        assert len(re.findall(r" \([a-zT]", str(one.value))) == 1


def test_an_unconditional_network_needs_no_labels(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pt", small(num_classes=None).state_dict())
    stated = {key: value for key, value in PROCESS.items() if key != "labels"}
    assert load(path, **HEADS, **stated).description.labels == {}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pixel_range": (1, 0)}, r"pixel_range: expected \(lowest, highest\), got \(1, 0\)"),
        ({"timesteps": 0}, "timesteps: expected an integer, 1 or more, got 0"),
        ({"schedule": "quadratic"}, "schedule: expected 'linear' or 'cosine', got 'quadratic'"),
        ({"channel_names": ("t1",)}, "channel_names: expected 2 names"),
        ({"labels": {3: "spleen"}}, "labels: expected numbers below 3"),
        ({"num_head_channels": 12}, "num_head_channels: 12 does not divide 32 channels"),
        ({"num_heads": 4}, "num_heads, num_head_channels: expected one of the two, got both"),
        ({"multi_label": True}, "multi_label: expected none, for a UNet, got True"),
        ({"num_res_blocks": 4}, "fit no number of levels with num_res_blocks=4"),
    ],
)
def test_wrong_statements_are_refused(changes: dict[str, Any], sentence: str, state: State, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=sentence):
        load(saved(tmp_path / "model.pt", state), **{**HEADS, **PROCESS, **changes})


def test_an_unknown_keyword_and_what_a_classifier_is_asked(state: State, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword 'heads'"):
        load(saved(tmp_path / "model.pt", state), heads=4)
    path = saved(tmp_path / "model.pt", small("classifier").state_dict())
    with pytest.raises(ConfigError, match="num_heads: a classifier's heads are stated by num_head_channels"):
        load(path, num_heads=4)
    with pytest.raises(ConfigError, match=r"state multi_label \(whether its logits go through a sigmoid each"):
        load(path, **HEADS, **PROCESS)
    path = saved(tmp_path / "model.pt", small("classifier", num_classes=1).state_dict())
    with pytest.raises(ConfigError, match="multi_label: expected True for a single logit"):
        load(path, **HEADS, **HEAD, **{**PROCESS, "labels": {0: "tumour"}})


def test_a_file_of_save_needs_no_keyword_and_takes_none(state: State, tmp_path: Path) -> None:
    loaded = load(saved(tmp_path / "model.pt", state), **HEADS, **PROCESS)
    path = tmp_path / "cdm.safetensors"
    save(path, loaded)
    with pytest.raises(ConfigError, match="describes itself, expected no keyword, got timesteps"):
        load(path, timesteps=1000)
    for damage in ("{}", "no JSON", loaded.description.to_json().replace('"schedule"', '"plan"')):
        save_file(load_file(path), path, {"cldf_fast": damage})
        with pytest.raises(CheckpointError, match="its description can't be read"):
            load(path)


def test_images_are_brought_to_the_range_trained_on(state: State, tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pt", state)
    images = torch.tensor([-1.0, 0.0, 0.5, 1.0])
    for pixel_range, expected in (((0, 1), [0, 0.5, 0.75, 1]), ((-1, 1), images), ((0, 255), [0, 127.5, 191.25, 255])):
        description = load(path, **{**HEADS, **PROCESS, "pixel_range": pixel_range}).description
        torch.testing.assert_close(description.normalise(images), torch.as_tensor(expected))
    assert description.diffusion().network_time(torch.tensor([400])).item() == 100


# --- diffusers and MONAI ----------------------------------------------------------------------------------------------

TRANSLATED = {key: value for key, value in PROCESS.items() if key != "labels"} | {"labels": {0: "healthy"}}
PEER_INPUT = (torch.tensor([3.0, 870.0]), torch.tensor([2, 0]))
DIFFUSERS: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "num_class_embeds": 3,
}
RESNET = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}


def diffusers_network(randomise: Randomise, **changes: Any) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return randomise(diffusers.UNet2DModel(**{**DIFFUSERS, **changes})).eval()


def assert_equal_to(peer: nn.Module, network: nn.Module, x: Tensor) -> None:
    """Outputs of a peer's network and ours; an unconditional network is called without labels."""
    t, labels = PEER_INPUT
    conditional = getattr(network, "num_classes", None) is not None
    theirs = peer(x, t, class_labels=labels) if conditional else peer(x, t)
    theirs = getattr(theirs, "sample", theirs)
    assert theirs.std() > 0.1
    torch.testing.assert_close(network(x, t, *([labels] if conditional else [])), theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        RESNET,
        {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8, **RESNET},
        {"attention_head_dim": None, "norm_eps": 1e-4, "flip_sin_to_cos": False, "layers_per_block": 2},
        {"block_out_channels": (16, 24), "norm_num_groups": 4, "num_class_embeds": None, "out_channels": 2},
    ],
    ids=["convolutions", "residual blocks", "scale and shift", "one head", "unconditional"],
)
def test_networks_of_diffusers_and_back(randomised: Randomise, tmp_path: Path, changes: dict[str, Any]) -> None:
    peer = diffusers_network(randomised, **changes)
    stated = {key: value for key, value in TRANSLATED.items() if key != "labels" or peer.config.num_class_embeds}
    loaded = from_diffusers(peer, **stated)
    x = torch.randn(2, 2, 8, 8)
    assert_equal_to(peer, loaded.network, x)
    assert_equal_to(to_diffusers(loaded), loaded.network, x)
    save(tmp_path / "cdm.safetensors", loaded)  # norms other than ours are part of the description
    assert_equal_to(peer, load(tmp_path / "cdm.safetensors").network, x)
    peer.save_pretrained(tmp_path / "folder")
    assert_equal_to(peer, load(tmp_path / "folder", **stated).network, x)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"freq_shift": 1}, "freq_shift: expected 0, got 1"),
        ({"center_input_sample": True}, "center_input_sample: expected False, got True"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type: expected 'positional', got 'fourier'"),
        ({"time_embedding_dim": 32}, "time_embedding_dim: expected None or 64, got 32"),
        ({"downsample_padding": 0}, "downsample_padding: expected 1, got 0"),
        ({"add_attention": False}, "add_attention: expected True, got False"),
        ({"mid_block_type": None}, "mid_block_type: expected 'UNetMidBlock2D', got None"),
        ({"mid_block_scale_factor": 2}, "mid_block_scale_factor: expected 1, got 2"),
        ({"act_fn": "relu"}, "act_fn: expected 'silu' or 'swish', got 'relu'"),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups: expected 8, got None"),
        ({"class_embed_type": "timestep"}, "class_embed_type: expected None, got 'timestep'"),
        (
            {"down_block_types": ("SkipDownBlock2D", "AttnDownBlock2D")},
            "down_block_types: expected .*, got 'SkipDownBlock2D'",
        ),
        ({"up_block_types": ("UpBlock2D", "UpBlock2D")}, "attention at other levels"),
        ({"down_block_types": RESNET["down_block_types"]}, "some levels are resampled by convolutions, others by"),
    ],
)
def test_other_networks_of_diffusers_are_refused(randomised: Randomise, changes: dict[str, Any], sentence: str) -> None:
    pytest.importorskip("diffusers")
    # Only the configuration is looked at before it is refused, and some of these can't be built at this width.
    peer = diffusers_network(randomised)
    peer._internal_dict = {**peer.config, **changes}
    with pytest.raises(CheckpointError, match=f"architectures are not equivalent: .*{sentence}") as raised:
        from_diffusers(peer, **TRANSLATED)
    assert "\n" not in str(raised.value)


def monai_network(randomise: Randomise, **changes: Any) -> nn.Module:
    pytest.importorskip("einops", reason="MONAI's attention needs it")
    nets = pytest.importorskip("monai.networks.nets")
    arguments = {
        "spatial_dims": 2,
        "in_channels": 2,
        "out_channels": 2,
        "num_res_blocks": 1,
        "channels": (16, 32),
        "attention_levels": (False, True),
        "norm_num_groups": 8,
        "num_head_channels": 8,
        "num_class_embeds": 3,
        **changes,
    }
    return randomise(nets.DiffusionModelUNet(**arguments)).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"resblock_updown": True, "num_res_blocks": (2, 2), "norm_eps": 1e-5},
        {"attention_levels": (True, True), "num_head_channels": (8, 16)},
        {"use_combined_linear": True, "num_class_embeds": None, "channels": (16, 24, 24)}
        | {"attention_levels": (False, False, False), "num_head_channels": 12},
    ],
    ids=["convolutions", "residual blocks", "two heads", "combined, unconditional"],
)
def test_networks_of_monai_and_back(randomised: Randomise, tmp_path: Path, changes: dict[str, Any]) -> None:
    peer = monai_network(randomised, **changes)
    loaded = from_monai(peer, **{k: v for k, v in TRANSLATED.items() if k != "labels" or peer.num_class_embeds})
    x = torch.randn(2, 2, 8, 8)
    assert_equal_to(peer, loaded.network, x)
    assert_equal_to(to_monai(loaded), loaded.network, x)
    save(tmp_path / "cdm.safetensors", loaded)
    assert_equal_to(peer, load(tmp_path / "cdm.safetensors").network, x)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"spatial_dims": 3}, "spatial_dims: expected 2, got 3"),
        ({"with_conditioning": True, "cross_attention_dim": 4}, "with_conditioning: expected False, got True"),
        ({"num_res_blocks": (1, 2)}, r"num_res_blocks: expected \(1, 1\), got \(1, 2\)"),
        ({"include_fc": False}, "proj_out.weight is missing"),
        (
            {"attention_levels": (True, True, True), "channels": (16, 32, 32), "num_head_channels": (8, 8, 16)},
            r"num_head_channels \[8, 8, 16\] and the heads they make vary",
        ),
    ],
)
def test_other_networks_of_monai_are_refused(randomised: Randomise, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        from_monai(monai_network(randomised, **changes), **TRANSLATED)


def published_style(randomise: Randomise, **changes: Any) -> Loaded:
    """A network in the order of heads that published ones have, where to_* must rearrange."""
    arguments = {"num_head_channels": None, "num_heads": 2, "scale_shift": False, **changes}
    network = randomise(UNet(2, 32, **{**SHAPE, **arguments}))
    architecture = replace(
        infer(shapes_of(network.state_dict())),
        num_heads=arguments["num_heads"],
        num_head_channels=arguments["num_head_channels"],
        new_attention_order=False,
    )
    return Loaded(network.eval(), Description(architecture, source="test", **PROCESS))  # type: ignore[arg-type]


@torch.no_grad()
def test_networks_in_the_published_order_of_heads_go_out(randomised: Randomise) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("einops")
    pytest.importorskip("monai.networks.nets")
    x = torch.randn(2, 2, 8, 8)
    for heads in ({}, {"num_head_channels": 8, "num_heads": None, "attention_downsample": (1, 2)}):
        loaded = published_style(randomised, **heads)
        assert_equal_to(to_diffusers(loaded), loaded.network, x)
        assert_equal_to(to_monai(loaded), loaded.network, x)


@pytest.mark.parametrize(
    ("changes", "library", "sentence"),
    [
        ({"channel_mult": (1, 1.5)}, "monai", r"norms have \[16, 32\] groups, depending on the width"),
        ({"attention_downsample": (1, 2)}, "diffusers", r"heads have \[16, 32\] channels, depending on the level"),
        ({"channel_mult": (0.5, 1)}, "monai", r"channel_mult\[0\]: expected 1, got 0.5"),
        ({"channel_mult": (1, 1), "scale_shift": True}, "monai", "no scale and shift"),
    ],
)
def test_what_a_peer_can_not_hold_is_named(
    randomised: Randomise, changes: dict[str, Any], library: str, sentence: str
) -> None:
    network, description = published_style(randomised, **changes)
    translate = peers.to_diffusers if library == "diffusers" else peers.to_monai
    with pytest.raises(CheckpointError, match=f"architectures are not equivalent: .*{sentence}"):
        translate(description.architecture, network.state_dict())


def test_heads_of_a_peer_are_known_and_not_stated(randomised: Randomise) -> None:
    with pytest.raises(ConfigError, match="num_heads: is known from the network"):
        from_monai(monai_network(randomised), num_heads=2, **TRANSLATED)
