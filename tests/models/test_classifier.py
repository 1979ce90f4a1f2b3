"""The noise-aware classifier: published key layout, the attention pool's arithmetic, gradients, named blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cldf_fast.errors import ConfigError
from cldf_fast.models.classifier import NoiseAwareClassifier
from cldf_fast.models.layers import AttentionPool

Randomise = Callable[[nn.Module], nn.Module]
Layout = Callable[[nn.Module], tuple[int, int, str]]

SIX_LEVELS, FIVE_LEVELS = (1, 1, 2, 2, 4, 4), (1, 1, 2, 3, 4)
COMMON = {"resblock_updown": True, "pool": "attention"}

# Arguments, then what the fixture `layout` says of the published state dict.
PUBLISHED: dict[str, tuple[dict[str, Any], int, int, str]] = {
    "ADM-256": (
        {
            "in_channels": 3,
            "model_channels": 128,
            "num_classes": 1000,
            "channel_mult": SIX_LEVELS,
            "num_res_blocks": 2,
            "attention_downsample": (8, 16, 32),
            "num_head_channels": 64,
            "image_size": 256,
        },
        249,
        54_096_360,
        "bc098f973cf9f8b9",
    ),
    "cond_ddpm_wsss CHAOS-128": (
        {
            "in_channels": 1,
            "model_channels": 128,
            "num_classes": 5,
            "channel_mult": FIVE_LEVELS,
            "num_res_blocks": 2,
            "attention_downsample": (4, 8, 16),
            "num_head_channels": 64,
            "image_size": 128,
        },
        221,
        42_055_301,
        "1782642fdc5142a1",
    ),
    "diffusion-anomaly BraTS-256": (
        {
            "in_channels": 4,
            "model_channels": 32,
            "num_classes": 2,
            "channel_mult": SIX_LEVELS,
            "num_res_blocks": 4,
            "attention_downsample": (8, 16, 32),
            "num_head_channels": 64,
            "image_size": 256,
        },
        405,
        5_452_962,
        "82342710abe61f20",
    ),
}


def small(**changes: Any) -> NoiseAwareClassifier:
    arguments = {"channel_mult": (1, 2), "attention_downsample": (2,), "num_head_channels": 4, **changes}
    return NoiseAwareClassifier(2, 8, num_classes=3, **arguments)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_state_dict_is_that_of_the_published_checkpoint(name: str, layout: Layout) -> None:
    arguments, *expected = PUBLISHED[name]
    with torch.device("meta"):
        classifier = NoiseAwareClassifier(**arguments, **COMMON)
    assert layout(classifier) == tuple(expected)


def test_the_adaptive_head_has_its_published_keys() -> None:
    head = {key: list(value.shape) for key, value in small().state_dict().items() if key.startswith("out.")}
    assert head == {"out.0.weight": [16], "out.0.bias": [16], "out.3.weight": [3, 16, 1, 1], "out.3.bias": [3]}


@torch.no_grad()
def test_heads_on_averages_read_the_blocks_they_are_named_for(randomised: Randomise) -> None:
    hidden = {"spatial": nn.Sequential(nn.ReLU()), "spatial_v2": nn.Sequential(nn.GroupNorm(32, 2048), nn.SiLU())}
    for pool, shape in (("spatial", [2048, 8 + 8 + 8 + 16 + 16]), ("spatial_v2", [2048, 56]), ("mean", [3, 16])):
        classifier = randomised(small(pool=pool)).eval()
        read: list[Tensor] = []
        for block in [*classifier.input_blocks, classifier.middle_block]:
            block.register_forward_hook(lambda _m, _a, out, read=read: read.append(out.mean(dim=(2, 3))))
        logits = classifier(torch.randn(2, 2, 8, 16), torch.tensor([3.0, 90.0]))
        state = {key.removeprefix("out."): value for key, value in classifier.state_dict().items() if "out." in key[:4]}
        if pool == "mean":
            assert list(state["weight"].shape) == shape
            expected = read[-1] @ state["weight"].T + state["bias"]
        else:
            assert list(state["0.weight"].shape) == shape
            last = "2" if pool == "spatial" else "3"
            if pool == "spatial_v2":
                hidden[pool][0].load_state_dict({"weight": state["1.weight"], "bias": state["1.bias"]})
            inner = hidden[pool](torch.cat(read, dim=1) @ state["0.weight"].T + state["0.bias"])
            expected = inner @ state[f"{last}.weight"].T + state[f"{last}.bias"]
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_attention_pool_lets_the_mean_token_attend_to_all(randomised: Randomise) -> None:
    channels, heads, size = 6, 2, 3
    pool = randomised(AttentionPool(size, channels, channels // heads, 4)).double()
    x = torch.randn(2, channels, size, size).double()
    tokens = x.flatten(2)
    tokens = torch.cat([tokens.mean(dim=2, keepdim=True), tokens], dim=2) + pool.positional_embedding
    projected = torch.einsum("oc,bcl->bol", pool.qkv_proj.weight[:, :, 0], tokens) + pool.qkv_proj.bias[:, None]
    q, k, v = projected.split(channels, dim=1)
    pooled = []
    for head in range(heads):
        part = slice(3 * head, 3 * head + 3)
        logits = torch.einsum("bc,bcl->bl", q[:, part, 0], k[:, part]) / math.sqrt(3)
        pooled.append(torch.einsum("bl,bcl->bc", logits.softmax(dim=1), v[:, part]))
    expected = torch.cat(pooled, dim=1) @ pool.c_proj.weight[:, :, 0].T + pool.c_proj.bias
    torch.testing.assert_close(pool(x), expected, rtol=1e-10, atol=1e-10)


def test_an_untrained_classifier_is_undecided() -> None:
    assert not small()(torch.randn(2, 2, 8, 8), torch.tensor([0.0, 9.0])).any()


@pytest.mark.parametrize(
    "changes",
    [{}, {"resblock_updown": True}, {"pool": "attention", "image_size": 8}],
    ids=["adaptive", "average pooling", "attention pool"],
)
def test_input_gradients_pass_through_a_frozen_classifier(randomised: Randomise, changes: dict[str, Any]) -> None:
    classifier = randomised(small(**changes)).eval().requires_grad_(False)
    x = torch.randn(2, 2, 8, 8, requires_grad=True)
    logits = classifier(x, torch.tensor([0.0, 100.0]))
    assert logits.shape == (2, 3)
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), x)
    assert (gradient != 0).all()
    assert all(parameter.grad is None for parameter in classifier.parameters())


@torch.no_grad()
def test_logits_depend_on_the_time_and_not_on_the_batch(randomised: Randomise) -> None:
    classifier = randomised(small()).eval()
    x, t = torch.randn(4, 2, 8, 16), torch.tensor([0.0, 10.0, 200.0, 900.0])
    together = classifier(x, t)
    for i in range(4):
        torch.testing.assert_close(classifier(x[i : i + 1], t[i : i + 1])[0], together[i], rtol=1e-5, atol=1e-5)
    assert not together[0].allclose(classifier(x[:1], torch.tensor([500.0]))[0], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("resblock_updown", [False, True])
def test_block_at_is_the_last_block_of_that_size(resblock_updown: bool) -> None:
    classifier = small(channel_mult=(1, 2, 2), num_res_blocks=2, resblock_updown=resblock_updown).eval()
    for factor, index in ((1, 2), (2, 5), (4, 8)):
        shapes: list[torch.Size] = []

        def note(_module: nn.Module, _args: Any, output: Tensor, shapes: list[torch.Size] = shapes) -> None:
            shapes.append(output.shape)

        block = classifier.block_at(factor)
        assert block is classifier.input_blocks[index]
        hook = block.register_forward_hook(note)
        classifier(torch.randn(1, 2, 16, 8), torch.zeros(1))
        hook.remove()
        assert [list(shape[2:]) for shape in shapes] == [[16 // factor, 8 // factor]]


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match=r"downsample: the classifier has blocks at \[1, 2\], got 8"):
        small().block_at(8)
    with pytest.raises(ConfigError, match="multiples of 2, got 7 x 8"):
        small()(torch.zeros(1, 2, 7, 8), torch.zeros(1))
    with pytest.raises(ConfigError, match="pool: expected one of adaptive, attention, spatial, spatial_v2, mean, got 'max'"):
        small(pool="max")
    with pytest.raises(ConfigError, match="image_size: expected the size"):
        small(pool="attention")
    with pytest.raises(ConfigError, match="num_head_channels: 5 does not divide 16"):
        small(num_head_channels=5)
