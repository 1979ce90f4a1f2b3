"""Classifier saliency against one image, one level, one class at a time, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from cldf_fast import passes
from cldf_fast.diffusion import Diffusion
from cldf_fast.errors import ConfigError, DataError
from cldf_fast.evidence import ClassifierSaliency, Evidence, pixel_labels
from cldf_fast.models.classifier import NoiseAwareClassifier
from cldf_fast.ops import noised_batch, pixel_seed

Randomise = Callable[[nn.Module], nn.Module]

STEPS = torch.tensor([0, 100, 300])
SIGMA, PERCENTILE = 1.0, 0.9


@pytest.fixture
def classifier(randomised: Randomise) -> NoiseAwareClassifier:
    # Wide enough for several channels in a normalised group: GradCAM's mean gradient vanishes where each has its own.
    network = NoiseAwareClassifier(
        2, 16, num_classes=3, channel_mult=(1, 4), attention_downsample=(2,), num_head_channels=16
    )
    randomised(network)
    return network.double().eval().requires_grad_(False)


def saliency(classifier: NoiseAwareClassifier, **options: Any) -> ClassifierSaliency:
    diffusion = Diffusion()
    arguments: dict[str, Any] = {
        "alpha_bar": diffusion.alpha_bar[STEPS],
        "timesteps": diffusion.network_time(STEPS),
        "cam_layer": classifier.block_at(2),
        "sigma": SIGMA,
        "percentile": PERCENTILE,
        **options,
    }
    return ClassifierSaliency(classifier, **arguments)


def images(count: int) -> Tensor:
    return (torch.rand(count, 2, 12, 8) * 2 - 1).double()


def naive(
    classifier: NoiseAwareClassifier, x: Tensor, *, multi_label: bool, target: str, reduce: str, cam: str, draws: int
) -> Evidence:
    """The definition, written out for one image x [1, C, H, W]."""
    steps = STEPS.repeat(draws)
    noised = noised_batch(x, Diffusion().alpha_bar.to(x)[steps], pixel_seed(x))
    grads, cams, probabilities = ([[] for _ in range(3)] for _ in range(3))
    kept: list[Tensor] = []
    hook = classifier.block_at(2).register_forward_hook(lambda _m, _a, out: kept.append(out))
    for level, step in enumerate(steps):
        for k in range(3):
            x_t = noised[level : level + 1].clone().requires_grad_()
            kept.clear()
            logits = classifier(x_t, step.float().view(1))
            probability = torch.sigmoid(logits) if multi_label else torch.exp(logits) / torch.exp(logits).sum()
            score = logits[0, k] if target == "logit" else torch.log(probability[0, k])
            gradient, inner = torch.autograd.grad(score, [x_t, kept[0]])
            magnitude = gradient[0].abs().numpy()
            reduced = {
                "sum_abs": magnitude.sum(axis=0),
                "max_abs": magnitude.max(axis=0),
                "l2": np.sqrt((magnitude**2).sum(axis=0)),
            }[reduce]
            grads[k].append(reduced / reduced.mean())
            activation, inner = kept[0].detach()[0].numpy(), inner[0].numpy()
            weight = inner.mean(axis=(1, 2), keepdims=True) if cam == "gradcam" else np.maximum(inner, 0)
            heat = np.maximum((weight * activation).sum(axis=0), 0)
            cams[k].append(heat / heat.max() if heat.max() > 0 else heat)
            probabilities[k].append(float(probability[0, k].detach()))
    hook.remove()
    gradient_maps, cam_maps = [], []
    for k in range(3):
        blurred = ndimage.gaussian_filter(np.mean(grads[k], axis=0), SIGMA, mode="mirror", truncate=4.0)
        upper = np.sort(blurred.ravel())[int(np.ceil(PERCENTILE * blurred.size)) - 1]
        gradient_maps.append(torch.from_numpy(np.clip(blurred / upper, 0, 1)))
        mean = torch.from_numpy(np.mean(cams[k], axis=0))
        wide = F.interpolate(mean[None, None], x.shape[2:], mode="bilinear")[0, 0]
        cam_maps.append(wide / wide.max() if wide.max() > 0 else wide)
    return Evidence(torch.stack(gradient_maps), torch.stack(cam_maps), torch.tensor(probabilities).mean(dim=1))


@pytest.mark.parametrize(
    ("multi_label", "target", "reduce", "cam", "draws"),
    [
        (True, "log_probability", "sum_abs", "layercam", 1),
        (False, "log_probability", "max_abs", "gradcam", 2),
        (True, "logit", "l2", "gradcam", 1),
    ],
)
def test_it_equals_the_definition(
    classifier: NoiseAwareClassifier, multi_label: bool, target: Any, reduce: Any, cam: Any, draws: int
) -> None:
    options = {"multi_label": multi_label, "target": target, "reduce": reduce, "cam": cam, "draws": draws}
    x = images(3)
    got = saliency(classifier, **options)(x)
    assert got.gradient_map.shape == got.cam.shape == (3, 3, 12, 8)
    assert got.gradient_map.dtype == got.cam.dtype == got.probability.dtype == torch.float32
    for i in range(3):
        expected = naive(classifier, x[i : i + 1], **options)
        torch.testing.assert_close(got.gradient_map[i].double(), expected.gradient_map, rtol=0, atol=1e-6)
        torch.testing.assert_close(got.cam[i].double(), expected.cam, rtol=0, atol=1e-5)
        torch.testing.assert_close(got.probability[i], expected.probability, rtol=0, atol=1e-6)


def test_an_image_depends_neither_on_its_batch_nor_on_max_batch(classifier: NoiseAwareClassifier) -> None:
    x = images(5)
    together = saliency(classifier)(x)
    order = torch.randperm(5)
    for max_batch in (1, 2, 7):  # below the number of levels, too
        shuffled = saliency(classifier, max_batch=max_batch)(x[order])
        torch.testing.assert_close(shuffled.gradient_map, together.gradient_map[order], rtol=0, atol=1e-6)
        torch.testing.assert_close(shuffled.cam, together.cam[order], rtol=0, atol=1e-5)
        torch.testing.assert_close(shuffled.probability, together.probability[order], rtol=0, atol=1e-6)


def test_max_batch_bounds_every_pass(classifier: NoiseAwareClassifier) -> None:
    rows: list[int] = []

    def counting(x: Tensor, timesteps: Tensor) -> Tensor:
        rows.append(len(x))
        return classifier(x, timesteps)

    bounded = ClassifierSaliency(counting, alpha_bar=Diffusion().alpha_bar[STEPS], timesteps=STEPS.float(), max_batch=7)
    bounded(images(5))
    bounded.probability(images(5))
    assert max(rows) <= 7
    assert sum(rows) == 2 * 5 * 3


def test_the_probability_alone_is_that_of_the_evidence(classifier: NoiseAwareClassifier) -> None:
    x, both = images(4), saliency(classifier, draws=2)
    torch.testing.assert_close(both.probability(x), both(x).probability, rtol=0, atol=1e-6)


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_frozen_classifier_stays_untouched(classifier: NoiseAwareClassifier, context: Any) -> None:
    layer = classifier.block_at(2)
    with context():
        evidence = saliency(classifier)(images(2))
    assert not evidence.gradient_map.requires_grad
    assert not evidence.probability.requires_grad
    assert all(parameter.grad is None for parameter in classifier.parameters())
    assert not layer._forward_hooks


def test_the_hook_is_removed_when_the_classifier_fails(classifier: NoiseAwareClassifier) -> None:
    with pytest.raises(ConfigError, match="multiples of 2"):
        saliency(classifier)(torch.zeros(1, 2, 7, 7).double())
    assert not classifier.block_at(2)._forward_hooks


def test_without_a_layer_there_is_no_cam(classifier: NoiseAwareClassifier) -> None:
    x = images(2)
    evidence = saliency(classifier, cam_layer=None)(x)
    assert not evidence.cam.any()
    assert evidence.cam.shape == evidence.gradient_map.shape
    torch.testing.assert_close(evidence.gradient_map, saliency(classifier)(x).gradient_map)


def test_any_callable_serves() -> None:
    """A linear model's gradient is its weight, whatever the image."""
    weight = torch.rand(2, 1, 6, 6)
    model = ClassifierSaliency(
        lambda x, _t: torch.einsum("bchw,kchw->bk", x, weight),
        alpha_bar=torch.tensor([0.9, 0.5]),
        timesteps=torch.tensor([10.0, 50.0]),
        target="logit",
        sigma=0.0,
        percentile=1.0,
    )
    maps = model(torch.randn(3, 1, 6, 6)).gradient_map
    expected = weight[:, 0] / weight[:, 0].amax(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(maps, expected.expand(3, -1, -1, -1))


def test_no_gradient_of_a_parameter_is_computed_and_flags_come_back(classifier: NoiseAwareClassifier) -> None:
    parameters = list(classifier.parameters())
    for parameter in parameters[::2]:
        parameter.requires_grad_(True)
    expected = [parameter.requires_grad for parameter in parameters]
    seen: list[bool] = []
    hook = classifier.register_forward_pre_hook(lambda *_: seen.extend(p.requires_grad for p in parameters))
    evidence = saliency(classifier)(images(2))
    assert seen
    assert not any(seen)
    assert [parameter.requires_grad for parameter in parameters] == expected
    with pytest.raises(ConfigError, match="multiples of 2"):
        saliency(classifier)(torch.zeros(1, 2, 7, 7).double())
    assert [parameter.requires_grad for parameter in parameters] == expected
    assert all(parameter.grad is None for parameter in parameters)
    assert not evidence.gradient_map.requires_grad
    hook.remove()


def test_an_unbounded_batch_stays_in_the_cache_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_CPU_VALUES", 32 * 4 * 12 * 8)
    rows: list[int] = []

    def counting(x: Tensor, _timesteps: Tensor) -> Tensor:
        rows.append(len(x))
        return x.sum(dim=(2, 3))

    ClassifierSaliency(counting, alpha_bar=torch.rand(3), timesteps=torch.rand(3))(images(3).float())
    assert rows == [3, 3, 3]


def test_bfloat16_is_close_and_used(classifier: NoiseAwareClassifier) -> None:
    classifier.float()
    x, seen = images(2).float(), []
    hook = classifier.block_at(2).register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
    full, half = (saliency(classifier, dtype=dtype)(x) for dtype in (torch.float32, torch.bfloat16))
    hook.remove()
    assert seen == [torch.float32, torch.bfloat16]
    for field in ("gradient_map", "cam", "probability"):
        wide, narrow = getattr(full, field), getattr(half, field)
        assert narrow.dtype == torch.float32
        assert 0 < float((wide - narrow).abs().mean()) < 0.02


def test_noise_levels_keep_their_precision_for_half_precision_images() -> None:
    """Rounded to bfloat16, 0.9999 is 1 and there is no noise."""
    seen: list[Tensor] = []

    def keeping(x: Tensor, _timesteps: Tensor) -> Tensor:
        seen.append(x.detach())
        return x.sum(dim=(2, 3))

    x = torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16)
    ClassifierSaliency(keeping, alpha_bar=torch.tensor([0.9999]), timesteps=torch.ones(1))(x)
    assert 0.002 < float(seen[0].float().std()) < 0.05


def test_a_gradient_that_is_not_finite_marks_its_image_alone(classifier: NoiseAwareClassifier) -> None:
    x = images(3)
    x[1, 0, 2, 3] = torch.nan
    maps = saliency(classifier)(x).gradient_map
    assert maps[1].isnan().all()
    assert maps[[0, 2]].isfinite().all()


LEVELS = {"alpha_bar": torch.tensor([0.9, 0.5]), "timesteps": torch.tensor([10.0, 50.0])}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha_bar": torch.ones(3)}, r"alpha_bar, timesteps: expected two equal lengths >= 1, got \[3\] and \[2\]"),
        ({"alpha_bar": torch.ones(0), "timesteps": torch.ones(0)}, "alpha_bar, timesteps: expected two equal lengths"),
        ({"alpha_bar": torch.tensor([0.5, 0.0])}, r"alpha_bar: expected values in \(0, 1\], got \[0.5, 0.0\]"),
        ({"alpha_bar": torch.tensor([1.5, 0.5])}, r"alpha_bar: expected values in \(0, 1\], got \[1.5, 0.5\]"),
        ({"alpha_bar": torch.tensor([0.5, torch.nan])}, r"alpha_bar: expected values in \(0, 1\], got \[0.5, nan\]"),
        ({"cam_layer": "middle_block"}, "cam_layer: expected a module of the classifier or None, got str"),
        ({"cam": "gradcam++"}, r"cam: expected one of gradcam, layercam, got 'gradcam\+\+'"),
        ({"target": "probability"}, "target: expected one of log_probability, logit, got 'probability'"),
        ({"draws": 0}, "draws: expected an integer, 1 or more, got 0"),
        ({"max_batch": 0}, "max_batch: expected an integer, 1 or more, got 0"),
        ({"dtype": torch.float16}, "dtype: expected torch.float32 or torch.bfloat16, got torch.float16"),
    ],
)
def test_arguments_are_refused_in_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        ClassifierSaliency(lambda x, _t: x, **{**LEVELS, **options})


@pytest.mark.parametrize(("calls", "times"), [(0, "0 times"), (2, "2 times")])
def test_a_layer_that_is_not_called_once_is_refused(calls: int, times: str) -> None:
    layer = nn.Conv2d(1, 1, 3, padding=1)

    def classifier(x: Tensor, _timesteps: Tensor) -> Tensor:
        for _ in range(calls):
            x = layer(x)
        return x.mean(dim=(2, 3))

    with pytest.raises(ConfigError, match=f"cam_layer: expected a module .* got a Conv2d that it calls {times}"):
        ClassifierSaliency(classifier, cam_layer=layer, **LEVELS)(torch.rand(2, 1, 6, 6))


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (lambda x: x, "cam_layer: expected a module whose output the logits depend on"),
        (lambda x: x.detach(), "cam_layer: expected a module whose output depends on x_t"),
    ],
)
def test_a_layer_beside_the_way_from_image_to_logits_is_refused(seen: Any, message: str) -> None:
    layer = nn.Conv2d(1, 1, 3, padding=1).requires_grad_(False)

    def classifier(x: Tensor, _timesteps: Tensor) -> Tensor:
        layer(seen(x))
        return x.mean(dim=(2, 3))

    with pytest.raises(ConfigError, match=message):
        ClassifierSaliency(classifier, cam_layer=layer, **LEVELS)(torch.rand(2, 1, 6, 6))


@pytest.mark.parametrize(
    ("classifier", "message"),
    [
        (lambda x, _t: x.mean(dim=(1, 2, 3)), r"classifier: expected logits \[4, K\], got float32 \[4\] on cpu"),
        (lambda x, _t: x.detach().mean(dim=(2, 3)), "classifier: expected logits that autograd can differentiate"),
        (lambda x, _t: x.new_ones(len(x), 2).requires_grad_(), "classifier: expected logits that depend on x_t"),
    ],
)
def test_a_classifier_that_cannot_be_read_is_refused(classifier: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ClassifierSaliency(classifier, **LEVELS)(torch.rand(2, 1, 6, 6))


def test_images_must_have_four_axes(classifier: NoiseAwareClassifier) -> None:
    for call in (saliency(classifier), saliency(classifier).probability):
        with pytest.raises(DataError, match=r"x: expected floating \[B, C, H, W\], got float64 \[2, 12, 8\]"):
            call(images(1)[0])


def test_a_cuda_graph_is_refused_on_a_cpu(classifier: NoiseAwareClassifier) -> None:
    with pytest.raises(ConfigError, match=r"cuda_graph: expected images on a CUDA device, got float64 \[2, 2, 12, 8\]"):
        saliency(classifier, cuda_graph=True)(images(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_the_device(classifier: NoiseAwareClassifier) -> None:
    on_device, x = saliency(classifier.float().cuda()), images(3).float().cuda()
    on_device(x)  # libraries may synchronise once, when they load; and the levels are copied
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_device(x)
        on_device.probability(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cuda_graph_replays_the_same_evidence(classifier: NoiseAwareClassifier, dtype: torch.dtype) -> None:
    classifier.float().cuda()
    eager, graph = (saliency(classifier, dtype=dtype, cuda_graph=captured) for captured in (False, True))
    first = graph(images(3).float().cuda())
    kept = first.gradient_map.clone()
    # Fresh images, another shape, and weights that changed in place; what was handed out earlier must not change.
    for count in (3, 2, 3):
        x = images(count).float().cuda()
        expected, got = eager(x), graph(x)
        for field in ("gradient_map", "cam", "probability"):
            torch.testing.assert_close(getattr(got, field), getattr(expected, field), rtol=0, atol=1e-4)
        with torch.no_grad():
            for parameter in classifier.parameters():
                parameter.mul_(1.01)
    assert first.gradient_map.equal(kept)


def test_pixel_labels_are_counted() -> None:
    evidence = Evidence(torch.rand(4, 2, 9, 7), torch.rand(4, 2, 9, 7), torch.rand(4, 2))
    present = torch.tensor([[True, True], [False, True], [True, False], [False, False]])
    labels = pixel_labels(evidence, present, (0.6, 0.5, 0.4, 0.5))
    assert labels.labels.dtype == torch.int8
    for i in range(4):
        expected = [int((labels.labels[i] == value).sum()) for value in (-1, 0, 1, 2)]
        assert labels.counts[i].tolist() == expected
        assert sum(expected) == 63
    assert labels.counts[0, 2:].all()
    assert labels.counts[3].tolist() == [0, 63, 0, 0]
