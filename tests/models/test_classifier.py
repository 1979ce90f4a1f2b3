"""The noise-aware classifier: published key layout, the attention pool's arithmetic, gradients, named blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cldf_fast.errors import ConfigError
from cldf_fast.models.classifier import POOLS, NoiseAwareClassifier
from cldf_fast.models.layers import AttentionPool
from tests.models.published import CLASSIFIERS

Randomise = Callable[[nn.Module], nn.Module]
Layout = Callable[[nn.Module], tuple[int, int, str]]


def small(**changes: Any) -> NoiseAwareClassifier:
    arguments = {"channel_mult": (1, 2), "attention_downsample": (2,), "num_head_channels": 4, **changes}
    return NoiseAwareClassifier(2, 8, num_classes=3, **arguments)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_state_dict_is_that_of_the_published_checkpoint(name: str, layout: Layout) -> None:
    arguments, *expected = CLASSIFIERS[name]
    with torch.device("meta"):
        classifier = NoiseAwareClassifier(**arguments)
    assert layout(classifier) == tuple(expected)


def test_the_adaptive_head_has_its_published_keys() -> None:
    head = {key: list(value.shape) for key, value in small().state_dict().items() if key.startswith("out.")}
    assert head == {"out.0.weight": [16], "out.0.bias": [16], "out.3.weight": [3, 16, 1, 1], "out.3.bias": [3]}


def test_heads_on_averages_have_their_published_keys() -> None:
    averages = 8 + 8 + 8 + 16 + 16  # channels of the four input blocks and of the middle block
    for pool, expected in (
        ("spatial", {"out.0.weight": [2048, averages], "out.2.weight": [3, 2048]}),
        ("spatial_v2", {"out.0.weight": [2048, averages], "out.1.weight": [2048], "out.3.weight": [3, 2048]}),
        ("mean", {"out.weight": [3, 16]}),
    ):
        state = small(pool=pool).state_dict()
        assert {key: list(state[key].shape) for key in state if key.startswith("out") and "weight" in key} == expected


@torch.no_grad()
@pytest.mark.parametrize("pool", POOLS)
def test_pooled_is_the_last_map(pool: str) -> None:
    classifier = small(pool=pool, image_size=8).eval()
    shapes: list[torch.Size] = []
    classifier.pooled.register_forward_hook(lambda _module, _args, output: shapes.append(output.shape))
    classifier(torch.randn(1, 2, 8, 8), torch.zeros(1))
    assert shapes == [(1, 16, 4, 4)]


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
    with pytest.raises(ConfigError, match="pool: expected one of adaptive, attention, spatial, spatial_v2, mean, got"):
        small(pool="max")
    with pytest.raises(ConfigError, match="image_size: expected the size"):
        small(pool="attention")
    with pytest.raises(ConfigError, match="num_head_channels: 5 does not divide 16"):
        small(num_head_channels=5)
