"""Evidence from the project's classifier against what people do: a loop over noise levels, and a pass more for the CAM.

    OMP_NUM_THREADS=2 python -m pytest benchmarks/bench_saliency.py --benchmark-json=raw.json
    python -m benchmarks.suite keep raw.json

All rivals read the same noised images of the same network and compute the same maps and labels. "whole" goes from
noised images to pixel labels; "epilogue" is what follows the backward passes: from gradients and CAMs to pixel labels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam, Saliency
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from benchmarks.suite import peak_memory
from cldf_fast.config import Config
from cldf_fast.diffusion import Diffusion
from cldf_fast.evidence import ClassifierSaliency, pixel_labels
from cldf_fast.models.classifier import NoiseAwareClassifier
from cldf_fast.ops import backend_report, fuse_evidence, gradient_saliency, noised_batch, pixel_seed
from cldf_fast.pipeline import build_classifier

OURS = "cpu"
SMALL = {"part": "whole", "batch": 1, "size": 16, "levels": 2}
PROBLEMS = tuple(
    {"part": part, "batch": 8, "size": size, "levels": 5} for part in ("epilogue", "whole") for size in (64, 128)
)

PERCENTILE, SIGMA = 0.99, 1.5
THRESHOLDS = (0.8, 0.5, 0.7, 0.5)
CAM_DOWNSAMPLE = 4

Maps = NDArray[np.float32]
"""[B, H, W]."""


# --- Shared inputs ----------------------------------------------------------------------------------------------------


def network(size: int) -> NoiseAwareClassifier:
    """The default classifier for one channel and one class, with random weights: as initialised its gradient is 0."""
    torch.manual_seed(0)
    config = Config.model_validate({"data": {"size": size}})
    classifier = build_classifier(config, in_channels=1, num_classes=1).eval()
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.normal_(0, 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return classifier


def noise_levels(levels: int) -> tuple[Tensor, Tensor]:
    """alpha_bar and times [T] of steps 0, 50, 100, ..."""
    diffusion, steps = Diffusion(), 50 * torch.arange(levels)
    return diffusion.alpha_bar[steps], diffusion.network_time(steps)


def images(batch: int, size: int) -> Tensor:
    """Discs on noise, float32 [B, 1, H, W] in [-1, 1]."""
    generator = torch.Generator().manual_seed(1)
    axis = torch.linspace(-1, 1, size)
    disc = (axis.square() + axis.square().unsqueeze(1)).sqrt() < 0.4
    return (disc + 0.2 * torch.randn(batch, 1, size, size, generator=generator)).clamp(-1, 1)


# --- The public way ---------------------------------------------------------------------------------------------------


def smoothed_and_scaled(magnitude: Maps) -> Maps:
    """What `ops.gradient_saliency` does after the mean over levels, an image at a time, as scripts do."""
    maps = []
    for image in magnitude:
        blurred = ndimage.gaussian_filter(image, SIGMA, mode="mirror", truncate=4.0)
        upper = np.percentile(blurred, 100 * PERCENTILE, method="inverted_cdf")
        maps.append(np.clip(blurred / upper, 0, 1) if upper > 0 else blurred)
    return np.stack(maps)


def level_magnitude(gradient: NDArray[np.float32]) -> Maps:
    """Gradients [B, C, H, W] of one level: magnitudes summed over channels, every image divided by its mean."""
    magnitude = np.abs(gradient).sum(axis=1)
    return np.asarray(magnitude / magnitude.mean(axis=(1, 2), keepdims=True))


def scaled(maps: Maps) -> Maps:
    """Every map divided by its maximum."""
    return np.asarray(maps / np.maximum(maps.max(axis=(1, 2), keepdims=True), np.finfo(np.float32).tiny))


def resized(cams: Maps, size: int) -> Maps:
    """Bilinear, without aligned corners."""
    wide = F.interpolate(torch.from_numpy(cams).unsqueeze(1), (size, size), mode="bilinear", align_corners=False)
    return wide.squeeze(1).numpy()


def fused(gradient_map: Maps, cam: Maps) -> Tensor:
    """Pixel labels where both maps are above or both below their thresholds; every image has the class."""
    foreground_gradient, foreground_cam, background_gradient, background_cam = THRESHOLDS
    labels = np.full(gradient_map.shape, -1, dtype=np.int8)
    labels[(gradient_map <= background_gradient) & (cam <= background_cam)] = 0
    labels[(gradient_map >= foreground_gradient) & (cam >= foreground_cam)] = 1
    return torch.from_numpy(labels)


def results(gradient_map: Maps, cam: Maps) -> tuple[Tensor, ...]:
    return torch.from_numpy(gradient_map), torch.from_numpy(cam), fused(gradient_map, cam)


class GradCAM:
    """As the public tools do: hooks keep activations and gradients in numpy, backward fills the parameters' .grad."""

    def __init__(self, classifier: nn.Module, layer: nn.Module) -> None:
        self.classifier = classifier
        self.activation = self.gradient = np.empty(0, dtype=np.float32)
        layer.register_forward_hook(self.keep)

    def keep(self, _module: nn.Module, _arguments: Any, output: Tensor) -> None:
        self.activation = output.detach().cpu().numpy()
        output.register_hook(self.keep_gradient)

    def keep_gradient(self, gradient: Tensor) -> None:
        self.gradient = gradient.detach().cpu().numpy()

    def __call__(self, x_t: Tensor, times: Tensor, target: int) -> Maps:
        logits = self.classifier(x_t.clone().requires_grad_(), times)
        self.classifier.zero_grad()
        logits[:, target].sum().backward(retain_graph=True)
        weight = self.gradient.mean(axis=(2, 3), keepdims=True)
        return np.asarray(np.maximum((weight * self.activation).sum(axis=1), 0))


Attribute = Callable[[Tensor, Tensor], NDArray[np.float32]]
"""(x_t [B, C, H, W] of one level, times [B]) -> gradients [B, C, H, W] or CAMs [B, h, w]."""


def by_level(noised: Tensor, times: Tensor, batch: int, gradient_of: Attribute, cam_of: Attribute) -> tuple[Tensor, ...]:
    """One level after the other, for gradients and for CAMs, in numpy from there on."""
    magnitudes, cams = [], []
    for x_t, time_of_level in zip(noised.split(batch), times, strict=True):
        level_times = time_of_level.expand(batch)
        magnitudes.append(level_magnitude(gradient_of(x_t, level_times)))
        cams.append(scaled(cam_of(x_t, level_times)))
    gradient_map = smoothed_and_scaled(np.mean(magnitudes, axis=0))
    cam = scaled(resized(np.mean(cams, axis=0), noised.shape[-1]))
    return results(gradient_map, cam)


def autograd_and_hooks(classifier: NoiseAwareClassifier) -> tuple[Attribute, Attribute]:
    """Guided-diffusion's way to a gradient, the CAM tools' way to a CAM."""
    cam = GradCAM(classifier, classifier.block_at(CAM_DOWNSAMPLE))

    def gradient_of(x_t: Tensor, times: Tensor) -> NDArray[np.float32]:
        x_t = x_t.detach().requires_grad_()
        logits = classifier(x_t, times)
        return torch.autograd.grad(logits[:, 0].sum(), x_t)[0].cpu().numpy()

    return gradient_of, lambda x_t, times: cam(x_t, times, target=0)


def captum(classifier: NoiseAwareClassifier) -> tuple[Attribute, Attribute]:
    """Captum's Saliency and LayerGradCam, called as in its documentation."""
    saliency, cam = Saliency(classifier), LayerGradCam(classifier, classifier.block_at(CAM_DOWNSAMPLE))

    def gradient_of(x_t: Tensor, times: Tensor) -> NDArray[np.float32]:
        attribution = saliency.attribute(
            x_t.detach().requires_grad_(), target=0, additional_forward_args=(times,), abs=True
        )
        return attribution.detach().numpy()

    def cam_of(x_t: Tensor, times: Tensor) -> NDArray[np.float32]:
        attribution = cam.attribute(x_t, target=0, additional_forward_args=(times,), relu_attributions=True)
        return attribution.detach().squeeze(1).numpy()

    return gradient_of, cam_of


# --- What is timed ----------------------------------------------------------------------------------------------------


def ours_whole(saliency: ClassifierSaliency, x: Tensor) -> tuple[Tensor, ...]:
    """Images to labels, the noise included."""
    evidence = saliency(x)
    present = torch.ones(len(x), 1, dtype=torch.bool)
    labels = pixel_labels(evidence, present, THRESHOLDS).labels
    return evidence.gradient_map.squeeze(1), evidence.cam.squeeze(1), labels


def ours_epilogue(gradients: Tensor, cam: Tensor, impl: str) -> tuple[Tensor, ...]:
    """Gradients [T, B, C, H, W] and CAMs [B, H, W] to labels."""
    gradient_map = gradient_saliency(
        gradients, reduce="sum_abs", percentile=PERCENTILE, sigma=SIGMA, impl=impl
    )
    present = torch.ones(len(cam), 1, dtype=torch.bool)
    labels = fuse_evidence(gradient_map.unsqueeze(1), cam.unsqueeze(1), present, thresholds=THRESHOLDS, impl=impl)
    return gradient_map, cam, labels


def numpy_epilogue(gradients: Tensor, cam: Tensor) -> tuple[Tensor, ...]:
    """The same in numpy and scipy."""
    gradient_map = smoothed_and_scaled(np.mean([level_magnitude(level.numpy()) for level in gradients], axis=0))
    return results(gradient_map, cam.numpy())


EPILOGUES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "cpu": partial(ours_epilogue, impl="cpu"),
    "reference": partial(ours_epilogue, impl="reference"),
    "numpy": numpy_epilogue,
}
WHOLE = {"autograd_and_hooks": autograd_and_hooks, "captum": captum}
RIVALS = {"epilogue": tuple(EPILOGUES), "whole": (OURS, *WHOLE)}


def case(rival: str, part: str, batch: int, size: int, levels: int) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed: a call that gives gradient maps, CAMs and labels, each [B, H, W]."""
    if part == "epilogue":
        generator = torch.Generator().manual_seed(2)
        gradients = torch.randn(levels, batch, 1, size, size, generator=generator)
        return partial(EPILOGUES[rival], gradients, torch.rand(batch, size, size, generator=generator))
    classifier, x, (alpha_bar, times) = network(size), images(batch, size), noise_levels(levels)
    if rival != OURS:
        noised = noised_batch(x, alpha_bar, pixel_seed(x))
        return partial(by_level, noised, times, batch, *WHOLE[rival](classifier))
    saliency = ClassifierSaliency(
        classifier,
        alpha_bar=alpha_bar,
        timesteps=times,
        cam_layer=classifier.block_at(CAM_DOWNSAMPLE),
        cam="gradcam",
        target="logit",
        percentile=PERCENTILE,
        sigma=SIGMA,
    )
    return partial(ours_whole, saliency, x)


@pytest.mark.parametrize(
    ("rival", "part", "batch", "size", "levels"),
    [(rival, *problem.values()) for problem in PROBLEMS for rival in RIVALS[str(problem["part"])]],
)
def test_evidence(benchmark: Any, rival: str, part: str, batch: int, size: int, levels: int) -> None:
    if rival == OURS and backend_report()["gradient_saliency"]["cpu"] != "serving":
        pytest.skip("the compiled extension is absent")
    problem = {"part": part, "batch": batch, "size": size, "levels": levels}
    run = case(rival, **problem)
    if part == "epilogue":
        got = benchmark.pedantic(run, warmup_rounds=3, rounds=30)
    else:
        got = benchmark.pedantic(run, warmup_rounds=1, rounds=7)
        benchmark.extra_info["extra_bytes"] = peak_memory("saliency", rival, problem)
        if rival == OURS:
            epilogue = seconds(case(OURS, **problem | {"part": "epilogue"}))
            benchmark.extra_info["epilogue_share"] = round(epilogue / benchmark.stats.stats.median, 5)
    check(got, case(RIVALS[part][-1] if rival == OURS else OURS, **problem)())


def check(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Maps agree to 1e-4, and labels but for a few pixels whose map is at a threshold."""
    for ours, theirs in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        assert ours.std() > 0.01
    assert (got[2] != expected[2]).float().mean() < 1e-3
    assert len(got[2].unique()) > 1


def seconds(run: Callable[[], Any]) -> float:
    """The median of thirty calls."""
    times = []
    for _ in range(30):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)
