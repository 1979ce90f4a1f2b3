"""Evidence from the project's classifier against what people do: a loop over noise levels, and a pass more for the CAM.

    python -m benchmarks saliency
    python -m benchmarks gpu saliency    # on a CUDA device

All rivals read the same noised images of the same weights and compute the same maps and labels. "whole" goes from
noised images to pixel labels; "epilogue" is what follows the backward passes: from gradients and CAMs to pixel labels.
Rivals run the network as it is published (`public_layers`); captum_our_layers is Captum on our layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from benchmarks.gpu import Gpu
from benchmarks.public_layers import as_published
from benchmarks.suite import SEED, Benchmark, Problem, Work, counted_operations, result_of
from cldf_fast.config import Config
from cldf_fast.diffusion import Diffusion
from cldf_fast.evidence import ClassifierSaliency, pixel_labels
from cldf_fast.models.classifier import NoiseAwareClassifier
from cldf_fast.ops import fuse_evidence, gradient_saliency, noised_batch, pixel_seed
from cldf_fast.pipeline import build_classifier

OURS = "cpu"
PROBLEMS: tuple[Problem, ...] = tuple(
    {"part": part, "batch": 8, "size": size, "levels": 5, "classes": classes}
    for part in ("epilogue", "whole")
    for size, classes in ((64, 1), (128, 1), (64, 4))
)

PERCENTILE, SIGMA = 0.99, 1.5
THRESHOLDS = (0.8, 0.5, 0.7, 0.5)
CAM_DOWNSAMPLE = 4

Maps = NDArray[np.float32]
"""[B, H, W], or [B, K, H, W]."""


# --- Shared inputs ----------------------------------------------------------------------------------------------------


def network(size: int, classes: int) -> NoiseAwareClassifier:
    """The default classifier for one channel, with random weights: as initialised its gradient is 0."""
    torch.manual_seed(SEED)
    config = Config.model_validate({"data": {"size": size}})
    classifier = build_classifier(config, in_channels=1, num_classes=classes).eval()
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


def smoothed_and_scaled(magnitude: Maps, sigma: float = SIGMA, percentile: float = PERCENTILE) -> Maps:
    """What `ops.gradient_saliency` does after the mean over levels, an image at a time, as scripts do."""
    maps = []
    for image in magnitude:
        blurred = ndimage.gaussian_filter(image, sigma, mode="mirror", truncate=4.0)
        upper = np.percentile(blurred, 100 * percentile, method="inverted_cdf")
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


def fused(
    gradient_map: Maps, cam: Maps, present: NDArray[np.bool_], thresholds: tuple[float, float, float, float]
) -> NDArray[np.int8]:
    """Pixel labels where both maps are above or both below their thresholds. present: [B, K], image-level labels."""
    foreground_gradient, foreground_cam, background_gradient, background_cam = thresholds
    shown = present[:, :, None, None]
    claimed = shown & (gradient_map >= foreground_gradient) & (cam >= foreground_cam)
    clear = (gradient_map <= background_gradient) & (cam <= background_cam)
    labels = np.where((clear | ~shown).all(axis=1), 0, -1)
    winner = np.where(claimed, gradient_map * cam, -np.inf).argmax(axis=1) + 1
    return np.where(claimed.any(axis=1), winner, labels).astype(np.int8)


def results(gradient_map: Maps, cam: Maps) -> tuple[Tensor, ...]:
    """Maps of all classes and the labels from them, as tensors; every image has every class."""
    labels = fused(gradient_map, cam, np.ones(cam.shape[:2], dtype=np.bool_), THRESHOLDS)
    return torch.from_numpy(gradient_map), torch.from_numpy(cam), torch.from_numpy(labels)


def mean_gradient(gradient: Maps) -> Maps:
    """GradCAM's weights of activations, from gradients [B, C, h, w]."""
    return np.asarray(gradient.mean(axis=(2, 3), keepdims=True))


def positive_gradient(gradient: Maps) -> Maps:
    """LayerCAM's."""
    return np.maximum(gradient, 0)


def logit(logits: Tensor) -> Tensor:
    """The score that the CAM tools differentiate."""
    return logits


class HookedCAM:
    """As the public tools do: hooks keep activations and gradients in numpy, backward fills the parameters' .grad.

    weight: of activations, from their gradients. score: what is differentiated, of logits.
    """

    def __init__(
        self, classifier: nn.Module, layer: nn.Module, weight: Callable[[Maps], Maps], score: Callable[[Tensor], Tensor]
    ) -> None:
        self.classifier, self.weight, self.score = classifier, weight, score
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
        self.score(logits)[:, target].sum().backward(retain_graph=True)
        return np.asarray(np.maximum((self.weight(self.gradient) * self.activation).sum(axis=1), 0))


Attribute = Callable[[Tensor, Tensor, int], NDArray[np.float32]]
"""(x_t [B, C, H, W] of one level, times [B], class) -> gradients [B, C, H, W] or CAMs [B, h, w]."""


def maps_by_level(
    noised: Tensor,
    times: Tensor,
    batch: int,
    classes: int,
    gradient_of: Attribute,
    cam_of: Attribute,
    finish: Callable[[Maps], Maps] = smoothed_and_scaled,
) -> tuple[Maps, Maps]:
    """Maps [B, K, H, W]: a class and a level after the other, for gradients and for CAMs, in numpy from there on."""
    gradient_maps, cam_maps = [], []
    for k in range(classes):
        magnitudes, cams = [], []
        for x_t, time_of_level in zip(noised.split(batch), times, strict=True):
            level_times = time_of_level.expand(batch)
            magnitudes.append(level_magnitude(gradient_of(x_t, level_times, k)))
            cams.append(scaled(cam_of(x_t, level_times, k)))
        gradient_maps.append(finish(np.mean(magnitudes, axis=0)))
        cam_maps.append(scaled(resized(np.mean(cams, axis=0), noised.shape[-1])))
    return np.stack(gradient_maps, axis=1), np.stack(cam_maps, axis=1)


def by_level(
    noised: Tensor, times: Tensor, batch: int, classes: int, gradient_of: Attribute, cam_of: Attribute
) -> tuple[Tensor, ...]:
    """Maps and the labels from them."""
    return results(*maps_by_level(noised, times, batch, classes, gradient_of, cam_of))


def autograd_and_hooks(
    classifier: NoiseAwareClassifier,
    downsample: int = CAM_DOWNSAMPLE,
    weight: Callable[[Maps], Maps] = mean_gradient,
    score: Callable[[Tensor], Tensor] = logit,
) -> tuple[Attribute, Attribute]:
    """Guided-diffusion's way to a gradient, the CAM tools' way to a CAM."""

    def gradient_of(x_t: Tensor, times: Tensor, target: int) -> NDArray[np.float32]:
        x_t = x_t.detach().requires_grad_()
        scores = score(classifier(x_t, times))
        return torch.autograd.grad(scores[:, target].sum(), x_t)[0].cpu().numpy()

    return gradient_of, HookedCAM(classifier, classifier.block_at(downsample), weight, score)


def captum(classifier: NoiseAwareClassifier) -> tuple[Attribute, Attribute]:
    """Captum's Saliency and LayerGradCam, called as in its documentation."""
    from captum.attr import LayerGradCam, Saliency

    saliency, cam = Saliency(classifier), LayerGradCam(classifier, classifier.block_at(CAM_DOWNSAMPLE))

    def gradient_of(x_t: Tensor, times: Tensor, target: int) -> NDArray[np.float32]:
        x_t = x_t.detach().requires_grad_()
        return saliency.attribute(x_t, target=target, additional_forward_args=(times,)).numpy(force=True)

    def cam_of(x_t: Tensor, times: Tensor, target: int) -> NDArray[np.float32]:
        heat = cam.attribute(x_t, target=target, additional_forward_args=(times,), relu_attributions=True)
        return heat.squeeze(1).numpy(force=True)

    return gradient_of, cam_of


# --- What is timed ----------------------------------------------------------------------------------------------------


def ours_whole(saliency: ClassifierSaliency, x: Tensor, classes: int) -> tuple[Tensor, ...]:
    """Images to labels, the noise included."""
    evidence = saliency(x)
    present = torch.ones(len(x), classes, dtype=torch.bool, device=x.device)
    return evidence.gradient_map, evidence.cam, pixel_labels(evidence, present, THRESHOLDS).labels


def ours_epilogue(gradients: Tensor, cam: Tensor, impl: str) -> tuple[Tensor, ...]:
    """Gradients [T, B, K, C, H, W] and CAMs [B, K, H, W] to labels."""
    by_level = gradients.flatten(1, 2)
    maps = gradient_saliency(by_level, reduce="sum_abs", percentile=PERCENTILE, sigma=SIGMA, impl=impl)
    gradient_map = maps.view_as(cam)
    present = torch.ones(cam.shape[:2], dtype=torch.bool, device=cam.device)
    return gradient_map, cam, fuse_evidence(gradient_map, cam, present, thresholds=THRESHOLDS, impl=impl)


def numpy_epilogue(gradients: Tensor, cam: Tensor) -> tuple[Tensor, ...]:
    """The same in numpy and scipy."""
    magnitudes = [level_magnitude(level.numpy()) for level in gradients.flatten(1, 2)]
    maps = smoothed_and_scaled(np.mean(magnitudes, axis=0))
    return results(maps.reshape(cam.shape), cam.numpy())


EPILOGUES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "cpu": partial(ours_epilogue, impl="cpu"),
    "reference": partial(ours_epilogue, impl="reference"),
    "numpy": numpy_epilogue,
}
WHOLE = {"autograd_and_hooks": autograd_and_hooks, "captum": captum, "captum_our_layers": captum}
RIVALS = {"epilogue": tuple(EPILOGUES), "whole": (OURS, *WHOLE)}
INDEPENDENT = {"epilogue": "numpy", "whole": "autograd_and_hooks"}  # what ours is compared with


def gradients_and_cams(batch: int, size: int, levels: int, classes: int) -> tuple[Tensor, Tensor]:
    """What the epilogue starts from, [T, B, K, 1, H, W] and [B, K, H, W]."""
    generator = torch.Generator().manual_seed(2)
    gradients = torch.randn(levels, batch, classes, 1, size, size, generator=generator)
    return gradients, torch.rand(batch, classes, size, size, generator=generator)


def case(
    rival: str, part: str, batch: int, size: int, levels: int, classes: int, device: str = "cpu", graph: bool = False
) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed: a call that gives gradient maps and CAMs [B, K, H, W] and labels [B, H, W].

    graph: the passes of ours in a CUDA graph.
    """
    if part == "epilogue":
        return partial(EPILOGUES[rival], *gradients_and_cams(batch, size, levels, classes))
    classifier, x = network(size, classes).to(device), images(batch, size).to(device)
    alpha_bar, times = (each.to(device) for each in noise_levels(levels))
    if rival != OURS:
        noised = noised_batch(x, alpha_bar, pixel_seed(x))
        if rival != "captum_our_layers":
            classifier = as_published(classifier)
        return partial(by_level, noised, times, batch, classes, *WHOLE[rival](classifier))
    saliency = ClassifierSaliency(
        classifier,
        alpha_bar=alpha_bar,
        timesteps=times,
        cam_layer=classifier.block_at(CAM_DOWNSAMPLE),
        cam="gradcam",
        target="logit",
        percentile=PERCENTILE,
        sigma=SIGMA,
        cuda_graph=graph,
    )
    return partial(ours_whole, saliency, x, classes)


def check(rival: str, problem: Problem, result: tuple[Tensor, ...]) -> None:
    """As of another."""
    agree(result, result_of("saliency", INDEPENDENT[problem["part"]] if rival == OURS else OURS, problem))


def agree(result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Maps agree to 1e-4, and labels but for a few pixels whose map is at a threshold."""
    for found, theirs in zip(result[:2], expected[:2], strict=True):
        torch.testing.assert_close(found, theirs, rtol=0, atol=1e-4)
        assert found.std() > 0.01
    assert (result[2] != expected[2]).float().mean() < 1e-3
    assert len(result[2].unique()) > 1


def work(problem: Problem) -> Work:
    """Our own operations; gradients and CAMs, or weights and images, are read, and maps and labels written."""
    part, batch, size, levels, classes = problem.values()
    maps = 4 * batch * classes * size**2
    if part == "epilogue":
        return Work(0, (levels + 2) * maps + batch * size**2)
    weights = sum(each.nbytes for each in network(size, classes).parameters())
    return Work(counted_operations(case(OURS, **problem)), weights + 4 * batch * size**2 + 2 * maps + batch * size**2)


BENCHMARK = Benchmark(
    ours=OURS,
    rivals=lambda problem: RIVALS[problem["part"]],
    case=case,
    check=check,
    problems=PROBLEMS,
    quick=tuple(problem | {"batch": 2, "size": 32} for problem in PROBLEMS[::3]),
    small=lambda problem: {"part": problem["part"], "batch": 1, "size": 16, "levels": 2, "classes": 1},
    headlines=PROBLEMS,
    libraries={"captum": "captum", "captum_our_layers": "captum"},
    operations={OURS: "gradient_saliency"},
    work=work,
)


def test_evidence(
    benchmark: Any, timed: Callable[[int], Any], memory: Callable[[], None], rival: str, problem: Problem
) -> None:
    whole = problem["part"] == "whole"
    # What takes a millisecond is soon over: a neighbour on the machine would spoil a row of a few calls.
    check(rival, problem, timed(7 if whole else 300))
    if whole and rival == OURS:
        epilogue = seconds(case(OURS, **problem | {"part": "epilogue"}))
        benchmark.extra_info["epilogue_share"] = round(epilogue / benchmark.stats.stats.median, 5)
    if whole and rival != "captum_our_layers":
        memory()


def seconds(run: Callable[[], Any]) -> float:
    """The median of thirty calls."""
    times = []
    for _ in range(30):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)


def on_gpu(gpu: Gpu) -> str:
    """All rivals on a device, each compared with numpy, or with a loop of autograd on the CPU; returns ours."""
    problems: tuple[Problem, ...] = (
        {"part": "epilogue", "batch": 8, "size": 256, "levels": 5, "classes": 4},
        {"part": "whole", "batch": 8, "size": 64, "levels": 5, "classes": 1},
        {"part": "whole", "batch": 8, "size": 128, "levels": 5, "classes": 1},
    )
    for problem in problems:
        if gpu.rehearse:
            problem = BENCHMARK.small(problem)
        sizes = {key: problem[key] for key in ("batch", "size", "levels", "classes")}
        expected = case(INDEPENDENT[problem["part"]], **problem)()

        def compare(result: tuple[Tensor, ...], expected: tuple[Tensor, ...] = expected) -> None:
            agree(tuple(each.cpu() for each in result), expected)

        if problem["part"] == "epilogue":
            gradients, cams = (each.to(gpu.device) for each in gradients_and_cams(**sizes))
            read, written = gradients.nbytes + cams.nbytes, 5 * problem["batch"] * problem["size"] ** 2
            for rival, impl in (("ours", "auto"), ("reference", "reference")):
                prepare = partial(partial, ours_epilogue, gradients, cams, impl)
                gpu.row(rival, problem, prepare, check=compare, work=Work(0, read + written))
            continue
        calls = {
            "ours": (OURS, False),
            "autograd_and_hooks": ("autograd_and_hooks", False),
            "captum": ("captum", False),
        }
        if not gpu.rehearse:
            calls["ours_graph"] = (OURS, True)
        for rival, (name, graph) in calls.items():
            if (reason := BENCHMARK.gap(rival)) is not None:
                gpu.gaps[rival] = reason
                continue
            gpu.row(rival, problem, partial(case, name, **problem, device=gpu.device, graph=graph), check=compare)
    return "ours"
