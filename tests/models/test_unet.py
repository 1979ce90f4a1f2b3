"""The UNet and its blocks: published key layout, arithmetic against the equations, gradients, early exit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.public_layers import as_published
from cldf_fast.errors import ConfigError
from cldf_fast.models import layers
from cldf_fast.models.conditions import label_condition, null_condition, num_conditions
from cldf_fast.models.layers import AttentionBlock, ResBlock, timestep_embedding
from cldf_fast.models.unet import UNet
from tests.models.published import UNETS

Randomise = Callable[[nn.Module], nn.Module]
Layout = Callable[[nn.Module], tuple[int, int, str]]


def small_unet(**changes: Any) -> UNet:
    arguments = {"channel_mult": (1, 2), "attention_downsample": (2,), "num_heads": 2, "num_classes": 4, **changes}
    return UNet(2, 8, **arguments)


@pytest.mark.parametrize("name", UNETS)
def test_the_state_dict_is_that_of_the_published_checkpoint(name: str, layout: Layout) -> None:
    arguments, *expected = UNETS[name]
    with torch.device("meta"):
        unet = UNet(**arguments)
    assert layout(unet) == tuple(expected)


def test_on_a_cpu_norms_are_one_operation_and_channels_lie_side_by_side(
    randomised: Randomise, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, calls, fused = randomised(small_unet()).eval(), [], layers.ops.group_norm
    monkeypatch.setattr(layers.ops, "group_norm", lambda *given, **options: calls.append(1) or fused(*given, **options))
    x, times, condition = torch.randn(2, 2, 8, 8), torch.tensor([3.0, 500.0]), torch.tensor([0, 3])
    last = len(unet.output_blocks) - 1
    with torch.no_grad():
        read = unet.decoder_features(x, times, condition, [last])[last]
        assert read.is_contiguous(memory_format=torch.channels_last)
        assert not read.is_contiguous()
        found = unet.read_out(read)
        assert len(calls) == sum(isinstance(module, nn.GroupNorm) for module in unet.modules())
        # The same step by step, on planes.
        expected = as_published(unet)(x, times, condition)
        assert len(calls) == sum(isinstance(module, nn.GroupNorm) for module in unet.modules())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert found.std() > 0


def test_on_a_cpu_wide_convolutions_are_our_operation(randomised: Randomise, monkeypatch: pytest.MonkeyPatch) -> None:
    unet, calls, ours = randomised(UNet(2, 16, channel_mult=(1, 2), num_classes=4)).eval(), [], layers.ops.conv3x3
    monkeypatch.setattr(layers.ops, "conv3x3", lambda *given, **options: calls.append(1) or ours(*given, **options))
    x, times, condition = torch.randn(2, 2, 16, 16), torch.tensor([3.0, 500.0]), torch.tensor([0, 3])
    wide = [
        module
        for module in unet.modules()
        if isinstance(module, layers.Conv3x3) and min(module.in_channels, module.out_channels) >= 16
    ]
    with torch.no_grad():
        found = unet(x, times, condition)
        assert len(calls) == len(wide) > 10
        expected = as_published(unet)(x, times, condition)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        with torch.autocast("cpu", torch.bfloat16):
            unet(x, times, condition)
        torch.export.export(unet, (x, times, condition))
        unet(x[:, :, :8, :8], times, condition)  # whose last level has 4 x 4 pixels
    assert len(calls) == 2 * len(wide) - sum(min(m.in_channels, m.out_channels) >= 32 for m in wide)


def test_any_network_gets_our_layers() -> None:
    network = nn.Sequential(
        nn.Conv2d(2, 32, 3, padding=1),
        nn.GroupNorm(4, 32),
        nn.Conv2d(32, 24, 3, padding="same"),
        nn.Conv2d(24, 24, 3, padding=1, groups=2),
        nn.Conv2d(24, 24, 3, padding=1, stride=2),
        nn.Conv2d(24, 16, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(16, 16, 3, padding=2, dilation=2),
        nn.GroupNorm(4, 16, affine=False),
        nn.Conv2d(16, 16, 3),
        nn.Conv2d(16, 16, 1),
    ).requires_grad_(False)
    x, keys = torch.randn(3, 2, 20, 18, requires_grad=True), list(network.state_dict())
    expected = network(x)
    grad = torch.randn_like(expected)
    (expected_gradient,) = torch.autograd.grad(expected, x, grad)
    assert layers.accelerate(network) is network
    swapped = [i for i, module in enumerate(network) if isinstance(module, layers.Conv3x3 | layers.GroupNorm2d)]
    assert swapped == [0, 1, 2]
    assert list(network.state_dict()) == keys
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(network(x), x, grad)[0], expected_gradient, rtol=1e-4, atol=1e-4)
    vectors = layers.accelerate(nn.Sequential(nn.GroupNorm(4, 16)))
    assert vectors(torch.randn(5, 16)).shape == (5, 16)


# --- Blocks against their equations, in float64 -----------------------------------------------------------------------


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def normed(x: np.ndarray, norm: nn.GroupNorm) -> np.ndarray:
    grouped = x.reshape(x.shape[0], norm.num_groups, -1)
    centred = grouped - grouped.mean(axis=2, keepdims=True)
    unit = (centred / np.sqrt((centred**2).mean(axis=2, keepdims=True) + 1e-5)).reshape(x.shape)
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return unit * norm.weight.numpy().reshape(shape) + norm.bias.numpy().reshape(shape)


def convolved(x: np.ndarray, conv: nn.Conv2d) -> np.ndarray:
    kernel = conv.weight.numpy()
    margin = kernel.shape[-1] // 2
    padded = np.pad(x, ((0, 0), (0, 0), (margin, margin), (margin, margin)))
    out = np.zeros((x.shape[0], kernel.shape[0], *x.shape[2:])) + conv.bias.numpy()[:, None, None]
    for i in range(kernel.shape[2]):
        for j in range(kernel.shape[3]):
            shifted = padded[:, :, i : i + x.shape[2], j : j + x.shape[3]]
            out += np.einsum("oc,bchw->bohw", kernel[:, :, i, j], shifted)
    return out


def resized(x: np.ndarray, resample: str | None) -> np.ndarray:
    if resample == "up":
        return x.repeat(2, axis=2).repeat(2, axis=3)
    if resample == "down":
        return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
    return x


@torch.no_grad()
@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize(("out_channels", "resample"), [(6, None), (9, None), (6, "up"), (6, "down")])
def test_the_residual_block_follows_its_equations(
    randomised: Randomise, scale_shift: bool, out_channels: int, resample: str | None
) -> None:
    block = ResBlock(6, 5, out_channels, scale_shift=scale_shift, resample=resample).double()
    randomised(block)
    x, embedding = torch.randn(2, 6, 4, 6).double(), torch.randn(2, 5).double()

    linear = block.emb_layers[1]
    shift = silu(embedding.numpy()) @ linear.weight.numpy().T + linear.bias.numpy()
    h = convolved(resized(silu(normed(x.numpy(), block.in_layers[0])), resample), block.in_layers[2])
    if scale_shift:
        scale, shift = shift[:, :out_channels, None, None], shift[:, out_channels:, None, None]
        h = normed(h, block.out_layers[0]) * (1 + scale) + shift
    else:
        h = normed(h + shift[:, :, None, None], block.out_layers[0])
    h = convolved(silu(h), block.out_layers[3])
    skip = resized(x.numpy(), resample)
    if out_channels != 6:
        skip = convolved(skip, block.skip_connection)
    np.testing.assert_allclose(block(x, embedding).numpy(), skip + h, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_the_attention_block_follows_its_equations(randomised: Randomise, heads: int, new_order: bool) -> None:
    channels, batch, height, width = 6, 2, 3, 4
    block = AttentionBlock(channels, heads, new_order=new_order).double()
    randomised(block)
    x = torch.randn(batch, channels, height, width).double()

    flat = x.numpy().reshape(batch, channels, -1)
    weight, bias = block.qkv.weight.numpy()[:, :, 0], block.qkv.bias.numpy()
    packed = np.einsum("oc,bcl->bol", weight, normed(flat, block.norm)) + bias[:, None]
    per_head = channels // heads
    attended = np.zeros_like(flat)
    for b in range(batch):
        for head in range(heads):
            if new_order:
                starts = [part * channels + head * per_head for part in range(3)]
            else:
                starts = [(3 * head + part) * per_head for part in range(3)]
            q, k, v = (packed[b, start : start + per_head] for start in starts)
            logits = q.T @ k / math.sqrt(per_head)
            share = np.exp(logits - logits.max(axis=1, keepdims=True))
            share /= share.sum(axis=1, keepdims=True)
            attended[b, head * per_head : (head + 1) * per_head] = (share @ v.T).T
    projected = np.einsum("oc,bcl->bol", block.proj_out.weight.numpy()[:, :, 0], attended)
    expected = flat + projected + block.proj_out.bias.numpy()[:, None]
    np.testing.assert_allclose(block(x).numpy().reshape(flat.shape), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dim", [8, 7])
def test_the_timestep_embedding_is_sinusoidal(dim: int) -> None:
    timesteps = torch.tensor([0.0, 1.0, 12.25, 999.0])
    half = dim // 2
    expected = torch.zeros(4, dim)
    for row, t in enumerate(timesteps.tolist()):
        for i in range(half):
            angle = t * 10_000 ** (-i / half)
            expected[row, i], expected[row, half + i] = math.cos(angle), math.sin(angle)
    torch.testing.assert_close(timestep_embedding(timesteps, dim), expected, rtol=0, atol=1e-4)
    assert timestep_embedding(torch.tensor([3]), dim).dtype == torch.float32


# --- The network ------------------------------------------------------------------------------------------------------


def test_an_untrained_network_predicts_exactly_zero() -> None:
    x = torch.randn(1, 2, 8, 8)
    assert not small_unet()(x, torch.tensor([5.0]), torch.tensor([1])).any()


def test_input_gradients_pass_through_a_frozen_network_with_attention(randomised: Randomise) -> None:
    unet = randomised(small_unet()).eval().requires_grad_(False)
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    unet(x, torch.tensor([5.0]), torch.tensor([1])).square().sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).all()
    assert all(parameter.grad is None for parameter in unet.parameters())


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("resblock_updown", [False, True])
def test_blocks_have_the_announced_shapes_and_early_exit_changes_nothing(
    randomised: Randomise, patch_size: int, resblock_updown: bool
) -> None:
    unet = randomised(
        small_unet(channel_mult=(0.5, 1, 2), patch_size=patch_size, resblock_updown=resblock_updown, num_res_blocks=2)
    ).eval()
    arguments = torch.randn(2, 2, 16, 8), torch.tensor([3.0, 700.0]), torch.tensor([0, 2])
    full: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _a, out: full.append(out)) for block in unet.output_blocks]
    assert unet(*arguments).shape == (2, 2, 16, 8)
    for hook in hooks:
        hook.remove()
    for i, (width, factor) in enumerate(zip(unet.output_widths, unet.output_downsample, strict=True)):
        assert full[i].shape == (2, width, 16 // factor, 8 // factor)
    asked = [1, 4]
    for block in unet.output_blocks[5:]:
        block.register_forward_hook(lambda *_: pytest.fail("a block after the last one asked for was computed"))
    read = unet.decoder_features(*arguments, asked)
    assert sorted(read) == asked
    assert all(read[i].equal(full[i]) for i in asked)


@torch.no_grad()
def test_patches_equal_a_network_on_folded_pixels(randomised: Randomise) -> None:
    patched = randomised(small_unet(patch_size=2)).eval()
    folded = UNet(8, 8, channel_mult=(1, 2), attention_downsample=(2,), num_heads=2, num_classes=4).eval()
    folded.load_state_dict(patched.state_dict())
    x, t, condition = torch.randn(2, 2, 8, 12), torch.tensor([1.0, 400.0]), torch.tensor([3, 1])
    pixels = x.reshape(2, 2, 4, 2, 6, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 8, 4, 6)
    noise = folded(pixels, t, condition).reshape(2, 2, 2, 2, 4, 6).permute(0, 1, 4, 2, 5, 3).reshape(2, 2, 8, 12)
    torch.testing.assert_close(patched(x, t, condition), noise, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_prediction_does_not_depend_on_the_batch(randomised: Randomise) -> None:
    unet = randomised(small_unet()).eval()
    x, t, condition = torch.randn(5, 2, 8, 8), torch.rand(5) * 1000, torch.tensor([0, 1, 2, 3, 0])
    together = unet(x, t, condition)
    for i in torch.randperm(5).tolist():
        alone = unet(x[i : i + 1], t[i : i + 1], condition[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_conditions_are_rows_of_the_table_or_their_means(randomised: Randomise) -> None:
    unet = randomised(small_unet(num_classes=num_conditions(2))).eval()
    t = torch.zeros(4)
    labels = torch.tensor([[False, False], [True, False], [False, True], [True, True]])
    embedded = unet.embed(t, label_condition(labels)) - unet.time_embed(timestep_embedding(t, 8))
    table = unet.label_emb.weight
    expected = torch.stack([table[1], table[2], table[3], (table[2] + table[3]) / 2])
    torch.testing.assert_close(embedded, expected, rtol=1e-5, atol=1e-5)
    by_row = unet.embed(t, torch.tensor([1, 2, 3, 0]))
    by_weight = unet.embed(t, torch.cat([label_condition(labels[:3]), null_condition(1, 2)]))
    torch.testing.assert_close(by_row, by_weight, rtol=1e-5, atol=1e-5)


def test_what_the_network_cannot_read_is_refused() -> None:
    x, t = torch.zeros(1, 2, 8, 8), torch.zeros(1)
    with pytest.raises(ConfigError, match="condition: expected one"):
        small_unet()(x, t)
    with pytest.raises(ConfigError, match="condition: the network is unconditional"):
        small_unet(num_classes=None)(x, t, torch.tensor([0]))
    with pytest.raises(ConfigError, match="multiples of 4, got 8 x 10"):
        small_unet(patch_size=2)(torch.zeros(1, 2, 8, 10), t, torch.tensor([0]))
    with pytest.raises(ConfigError, match="num_heads: 3 heads do not divide 16 channels"):
        small_unet(num_heads=3)
    with pytest.raises(ConfigError, match="num_head_channels: 64 does not divide 16 channels"):
        small_unet(num_head_channels=64)
