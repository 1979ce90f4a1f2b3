from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage, stats
from torch.library import opcheck

from cldf_fast.errors import BackendError, ConfigError, DataError
from cldf_fast.ops import fuse_evidence, gradient_saliency, noised_batch, pixel_seed
from cldf_fast.ops.reference import NOISE_STREAM, philox4x32

# --- pixel_seed


def splitmix_finaliser(word: int) -> int:
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = (word ^ (word >> shift)) * multiplier % 2**64
    return word ^ (word >> 31)


def test_pixel_seed_is_its_definition_on_integers():
    x = torch.randn(2, 3, 2, 5)
    for image, found in zip(x.numpy(), pixel_seed(x).tolist(), strict=True):
        bits = image.ravel().view(np.uint32).tolist()
        total = sum(splitmix_finaliser((position << 32) | word) for position, word in enumerate(bits))
        assert found % 2**64 == splitmix_finaliser(total % 2**64)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_pixel_seed_knows_the_image_and_nothing_else(seed, batch):
    torch.manual_seed(seed)
    x = torch.randn(batch, 2, 5, 3)
    seeds, order = pixel_seed(x), torch.randperm(batch)
    assert torch.equal(pixel_seed(x[order]), seeds[order])
    assert torch.equal(pixel_seed(x.to(memory_format=torch.channels_last)), seeds)
    assert torch.equal(torch.cat([pixel_seed(image) for image in x.split(1)]), seeds)


def test_pixel_seed_differs_for_any_other_image():
    image = torch.randn(1, 1, 6, 7)
    images = image.repeat(43, 1, 1, 1)
    images[1:].flatten(1).fill_diagonal_(0.5)
    swapped = image.clone()
    swapped[..., 0, :2] = image[..., 0, :2].flip(-1)
    seeds = pixel_seed(torch.cat([images, swapped, image.flip(-1), image.flip(-2), torch.zeros_like(image)]))
    assert len(set(seeds.tolist())) == len(seeds)
    assert pixel_seed(torch.zeros(0, 1, 2, 2)).shape == (0,)


# --- noised_batch


def numpy_noise(seed: int, level: int, elements: int) -> np.ndarray:
    """The documented draw, element by element."""
    values = []
    for block in range(-(-elements // 4)):
        r = philox4x32((seed % 2**32, (seed >> 32) % 2**32), (block, level, 0, NOISE_STREAM))
        for first, second in (r[:2], r[2:]):
            radius = math.sqrt(-2 * math.log(((first >> 8) + 1) / 2**24))
            angle = 2 * math.pi * (second >> 8) / 2**24
            values += [radius * math.cos(angle), radius * math.sin(angle)]
    return np.array(values[:elements], dtype=np.float32)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 1, 5, 3), (2, 3, 15, 17)])
def test_noised_batch_is_its_definition(shape):
    x, alpha_bar = torch.randn(shape), torch.tensor([0.97, 0.5, 0.0, 1.0])
    seeds = torch.randint(-(2**62), 2**62, shape[:1])
    noised = noised_batch(x, alpha_bar, seeds)
    assert noised.shape == (4 * shape[0], *shape[1:])
    for t, b in itertools.product(range(4), range(shape[0])):
        noise = torch.from_numpy(numpy_noise(int(seeds[b]), t, x[b].numel())).view(shape[1:])
        expected = alpha_bar[t].sqrt() * x[b] + (1 - alpha_bar[t]).sqrt() * noise
        torch.testing.assert_close(noised[t * shape[0] + b], expected, rtol=0, atol=1e-6)
    assert torch.equal(noised[3 * shape[0] :], x)


def test_noise_is_standard_normal_and_independent(seed):
    x = torch.zeros(2, 1, 200, 200)
    noise = noised_batch(x, torch.zeros(2), torch.tensor([seed, seed + 1])).flatten(1).double()
    for row in noise:
        assert stats.kstest(row.numpy(), "norm").pvalue > 1e-4
    neighbours = torch.stack([noise[:, 1:].flatten(), noise[:, :-1].flatten()])
    assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 0.02
    assert (torch.corrcoef(noise) - torch.eye(4)).abs().max() < 0.03
    assert stats.kstest((noise.pow(2)[:, ::2] + noise.pow(2)[:, 1::2]).flatten().numpy(), "chi2", (2,)).pvalue > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_image_is_noised_alike_in_every_batch(dtype):
    x = torch.randn(5, 3, 7, 9).to(dtype)
    alpha_bar, seeds = torch.tensor([0.9, 0.3, 0.6]), pixel_seed(x)
    whole = noised_batch(x, alpha_bar, seeds).unflatten(0, (3, 5))
    assert whole.dtype == dtype
    order = torch.randperm(5)
    shuffled = noised_batch(x[order].contiguous(memory_format=torch.channels_last), alpha_bar, seeds[order])
    assert torch.equal(shuffled.unflatten(0, (3, 5)), whole[:, order])
    for b in range(5):
        assert torch.equal(noised_batch(x[b : b + 1], alpha_bar, seeds[b : b + 1]), whole[:, b])


def test_an_integer_seed_shares_the_noise(seed):
    x = torch.randn(1, 2, 4, 4).repeat(3, 1, 1, 1)
    shared = noised_batch(x, torch.tensor([0.5]), seed)
    assert torch.equal(shared[:1].expand_as(shared), shared)
    assert not torch.equal(noised_batch(x, torch.tensor([0.5]), seed + 1), shared)


def test_noised_batch_is_differentiable_in_the_image(seed):
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: noised_batch(x, torch.tensor([0.9, 0.2]), seed), (x,))
    empty = torch.zeros(0, 1, 3, 3, requires_grad=True)
    noised_batch(empty, torch.tensor([0.9, 0.2]), seed).sum().backward()
    assert empty.grad.shape == empty.shape


# --- gradient_saliency


def scipy_saliency(grad, reduce, percentile, sigma, level_norm):
    """The documented map, one image at a time, by scipy and numpy in float64."""
    maps = []
    for b in range(grad.shape[1]):
        levels = []
        for level in grad[:, b].astype(np.float64):
            ways = {
                "max_abs": lambda g: np.abs(g).max(0),
                "sum_abs": lambda g: np.abs(g).sum(0),
                "l2": lambda g: np.sqrt((g**2).sum(0)),
            }
            magnitude = ways[reduce](level)
            levels.append(magnitude / (magnitude.mean() or 1) if level_norm else magnitude)
        saliency = np.mean(levels, axis=0)
        if sigma:
            saliency = ndimage.gaussian_filter(saliency, sigma, mode="mirror", truncate=4.0)
        scale = np.quantile(saliency, percentile, method="inverted_cdf") or saliency.max() or 1
        maps.append(np.clip(saliency / scale, 0, 1))
    return torch.tensor(np.stack(maps), dtype=torch.float32)


@pytest.mark.parametrize("level_norm", [True, False])
@pytest.mark.parametrize(("reduce", "percentile"), [("max_abs", 0.99), ("sum_abs", 1.0), ("l2", 0.5)])
@pytest.mark.parametrize(
    ("shape", "sigma"),
    [((1, 1, 1, 1, 1), 1.0), ((2, 3, 1, 15, 17), 0.0), ((3, 2, 3, 2, 252), 1.5), ((1, 2, 4, 5, 3), 4.2)],
)
def test_saliency_is_its_definition(shape, sigma, reduce, percentile, level_norm):
    grad = torch.randn(shape) * torch.logspace(-12, 2, shape[0]).view(-1, 1, 1, 1, 1)
    options = {"reduce": reduce, "percentile": percentile, "sigma": sigma, "level_norm": level_norm}
    saliency = gradient_saliency(grad, **options)
    assert saliency.dtype == torch.float32
    torch.testing.assert_close(saliency, scipy_saliency(grad.numpy(), **options), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_saliency_takes_any_floating_dtype(dtype):
    grad = torch.randn(2, 2, 3, 9, 9).to(dtype)
    torch.testing.assert_close(gradient_saliency(grad), gradient_saliency(grad.float()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduce", ["max_abs", "sum_abs", "l2"])
def test_saliency_never_depends_on_the_batch_or_the_scale_of_the_gradient(reduce):
    grad = torch.randn(3, 6, 2, 19, 13)
    whole = gradient_saliency(grad, reduce=reduce)
    for b in range(6):
        assert torch.equal(gradient_saliency(grad[:, b : b + 1], reduce=reduce)[0], whole[b])
    assert torch.equal(gradient_saliency(grad.flip(1), reduce=reduce), whole.flip(0))
    torch.testing.assert_close(gradient_saliency(grad * 1e-25, reduce=reduce), whole)
    assert whole.amax(dim=(1, 2)).tolist() == [1.0] * 6


@pytest.mark.parametrize("level_norm", [True, False])
def test_zero_and_broken_gradients_stay_in_their_image(level_norm):
    grad = torch.randn(2, 5, 3, 8, 8)
    clean = gradient_saliency(grad, level_norm=level_norm)
    grad[:, 0] = 0
    grad[1, 2, 0, 3, 3], grad[0, 4, 1, 7, 0] = math.nan, -math.inf
    saliency = gradient_saliency(grad, level_norm=level_norm)
    assert (saliency[0] == 0).all()
    assert saliency[[2, 4]].isnan().all()
    assert torch.equal(saliency[[1, 3]], clean[[1, 3]])


def test_a_single_hot_pixel_is_scaled_by_the_maximum():
    grad = torch.zeros(1, 1, 1, 32, 32)
    grad[..., 9, 4] = -3
    saliency = gradient_saliency(grad, sigma=0.0)
    assert saliency[0, 9, 4] == 1
    assert saliency.sum() == 1


@pytest.mark.parametrize("percent", [1, 7, 14, 29, 57, 100])
def test_the_percentile_is_an_order_statistic(percent):
    grad = torch.randperm(100).add(1).float().view(1, 1, 1, 10, 10)
    saliency = gradient_saliency(grad, percentile=percent / 100, sigma=0.0, level_norm=False)
    torch.testing.assert_close(saliency, (grad[0, :, 0] / percent).clamp_max(1))


def test_maps_and_labels_are_constants_of_autograd():
    grad, maps = torch.randn(1, 2, 1, 4, 4, requires_grad=True), torch.rand(2, 1, 4, 4, requires_grad=True)
    present = torch.ones(2, 1, dtype=torch.bool)
    assert not gradient_saliency(grad).requires_grad
    assert not fuse_evidence(maps, maps, present, thresholds=(0.5, 0.5, 0.1, 0.1)).requires_grad
    assert not pixel_seed(maps).requires_grad


def test_saliency_accepts_no_image():
    assert gradient_saliency(torch.zeros(2, 0, 3, 4, 5)).shape == (0, 4, 5)


# --- fuse_evidence


def naive_fusion(gradient_map, cam, image_label, thresholds):
    foreground_gradient, foreground_cam, background_gradient, background_cam = thresholds
    batch, classes, height, width = gradient_map.shape
    labels = torch.full((batch, height, width), -1, dtype=torch.int8)
    for b, y, x in itertools.product(range(batch), range(height), range(width)):
        present = [k for k in range(classes) if image_label[b, k]]
        pairs = {k: (float(gradient_map[b, k, y, x]), float(cam[b, k, y, x])) for k in present}
        claims = [k for k, (g, c) in pairs.items() if g >= foreground_gradient and c >= foreground_cam]
        if claims:
            labels[b, y, x] = 1 + max(claims, key=lambda k: (pairs[k][0] * pairs[k][1], -k))
        elif all(g <= background_gradient and c <= background_cam for g, c in pairs.values()):
            labels[b, y, x] = 0
    return labels


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_fusion_is_its_definition(seed, classes, dtype):
    torch.manual_seed(seed)
    # Values on a coarse grid, so that thresholds are met exactly and products tie.
    gradient_map, cam = torch.randint(0, 5, (2, 3, classes, 4, 5)).div(4).to(dtype)
    image_label = torch.rand(3, classes) < 0.6
    for thresholds in ((0.5, 0.5, 0.25, 0.5), (0.75, 0.25, 0.75, 0.5), (0.0, 0.0, 0.0, 0.0), (2.0, 2.0, 1.0, 1.0)):
        labels = fuse_evidence(gradient_map, cam, image_label, thresholds=thresholds)
        assert labels.dtype == torch.int8
        assert torch.equal(labels, naive_fusion(gradient_map, cam, image_label, thresholds))


def test_fusion_goes_up_to_126_classes_and_ties_go_to_the_lower():
    maps = torch.zeros(1, 126, 1, 2)
    maps[:, 125, :, 0] = 1
    maps[:, 40:90, :, 1] = 1
    label = torch.ones(1, 126, dtype=torch.bool)
    assert fuse_evidence(maps, maps, label, thresholds=(0.5, 0.5, 0.1, 0.1)).tolist() == [[[126, 41]]]


def test_nan_is_ignored_where_a_label_is_present_and_background_elsewhere():
    maps = torch.full((2, 2, 3, 3), math.nan)
    image_label = torch.tensor([[True, False], [False, False]])
    labels = fuse_evidence(maps, maps, image_label, thresholds=(0.5, 0.5, 0.1, 0.1))
    assert labels.flatten(1).tolist() == [[-1] * 9, [0] * 9]


# --- all of them

X, MAPS, PRESENT = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pixel_seed(X[0]), DataError, r"x: expected floating \[B, C, H, W\], got float32 \[3, 4, 5\]"),
        (lambda: pixel_seed(X, impl="?"), BackendError, "impl: expected auto"),
        (lambda: noised_batch(X.long(), torch.ones(1), 0), DataError, "x: expected floating"),
        (lambda: noised_batch(X, torch.tensor(0.5), 0), DataError, r"alpha_bar: expected floating \[T\]"),
        (lambda: noised_batch(X, torch.ones(1), torch.zeros(2)), DataError, "seed: expected int64"),
        (lambda: noised_batch(X, torch.ones(1), -(2**64)), ConfigError, "seed: expected an integer of 64 bits"),
        (lambda: gradient_saliency(X), DataError, r"grad: expected floating \[T, B, C, H, W\]"),
        (lambda: gradient_saliency(X.new_zeros(0, 2, 3, 4, 5)), DataError, "grad: expected at least one level"),
        (lambda: gradient_saliency(X.new_zeros(1, 2, 3, 0, 5)), DataError, "grad: expected at least one level"),
        (lambda: gradient_saliency(X[None], reduce="mean"), ConfigError, "reduce: expected one of max_abs"),
        (lambda: gradient_saliency(X[None], percentile=0.0), ConfigError, r"percentile: expected a number in \(0, 1\]"),
        (lambda: gradient_saliency(X[None], percentile=99), ConfigError, "percentile"),
        (lambda: gradient_saliency(X[None], percentile="99"), ConfigError, r"a number in \(0, 1\], got '99'"),
        (lambda: gradient_saliency(X[None], sigma=-1.0), ConfigError, "sigma: expected a finite number"),
        (lambda: gradient_saliency(X[None], sigma=math.inf), ConfigError, "sigma"),
        (lambda: fuse_evidence(MAPS[0], MAPS, PRESENT, thresholds=(0, 0, 0, 0)), DataError, "gradient_map: expected"),
        (lambda: fuse_evidence(MAPS, MAPS[:, :2], PRESENT, thresholds=(0, 0, 0, 0)), DataError, "cam: expected"),
        (lambda: fuse_evidence(MAPS, MAPS, PRESENT.float(), thresholds=(0, 0, 0, 0)), DataError, "image_label: exp"),
        (lambda: fuse_evidence(MAPS, MAPS, PRESENT, thresholds=(0, 0, 0)), ConfigError, "thresholds: expected four"),
        (lambda: fuse_evidence(MAPS, MAPS, PRESENT, thresholds=(0, 0, 0, math.nan)), ConfigError, "thresholds"),
        (
            lambda: fuse_evidence(*[torch.zeros(1, 127, 1, 1)] * 2, torch.ones(1, 127) > 0, thresholds=(0, 0, 0, 0)),
            DataError,
            "gradient_map: expected 1 to 126 classes",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_operators_are_registered_rightly():
    ops = torch.ops.cldf_fast
    x, alpha_bar, seeds = torch.randn(2, 3, 4, 5), torch.tensor([0.9, 0.4]), torch.tensor([1, -2])
    opcheck(ops.pixel_seed.default, (x, "auto"))
    opcheck(ops.noised_batch.default, (x.clone().requires_grad_(), alpha_bar, seeds, "auto"))
    opcheck(ops.noised_batch.default, (x.bfloat16(), alpha_bar.double(), seeds, "reference"))
    opcheck(ops.gradient_saliency.default, (torch.randn(2, 2, 3, 4, 5), "l2", 0.9, 0.7, True, "auto"))
    maps = torch.rand(2, 2, 3, 4, 5)
    opcheck(ops.fuse_evidence.default, (maps[0], maps[1], PRESENT, [0.5, 0.5, 0.2, 0.2], "auto"))


def test_the_chain_compiles_into_one_graph():
    def chain(x, alpha_bar, image_label):
        noised = noised_batch(x, alpha_bar, pixel_seed(x))
        grad = (noised**2).unflatten(0, (alpha_bar.shape[0], x.shape[0]))
        saliency = gradient_saliency(grad, sigma=1.5)[:, None].expand(-1, image_label.shape[1], -1, -1)
        return fuse_evidence(saliency, saliency**2, image_label, thresholds=(0.5, 0.3, 0.2, 0.1))

    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, size in ((2, 9), (3, 12)):
        inputs = torch.randn(batch, 2, size, size), torch.tensor([0.9, 0.5, 0.2]), torch.rand(batch, 2) < 0.7
        assert torch.equal(compiled(*inputs), chain(*inputs))
