"""sample_anchors against what people use: per image and class up to S pixels, without replacement.

    python -m benchmarks anchors
    python -m benchmarks gpu anchors    # on a CUDA device

All rivals draw the same numbers of pixels from the same label maps; none reads features. `contrastive_seg` prefers
hard pixels, half of what it draws; `cpu_hard` prefers them by weights, which are made in its time; the others draw
uniformly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import Gpu
from benchmarks.suite import SEED, Benchmark, Problem, Work
from cldf_fast.ops import sample_anchors

PROBLEMS = (
    {"batch": 8, "size": 256, "classes": 5, "per_class": 512},
    {"batch": 8, "size": 128, "classes": 2, "per_class": 512},
    {"batch": 1, "size": 2048, "classes": 5, "per_class": 512},
)

Draw = Callable[[Tensor, Tensor, int, int], tuple[Tensor, ...]]
"""(labels [B, H, W], predicted labels [B, H, W], K, S) -> drawn flat pixels, and what goes with them."""


def ours(labels: Tensor, predicted: Tensor, classes: int, per_class: int, *, impl: str) -> tuple[Tensor, ...]:
    """Uniform."""
    return sample_anchors(labels, num_classes=classes, per_class=per_class, seed=0, impl=impl)


def ours_hard(labels: Tensor, predicted: Tensor, classes: int, per_class: int, *, impl: str) -> tuple[Tensor, ...]:
    """By weights: a misclassified pixel is ten times as likely."""
    weight = (labels != predicted).float().clamp_(min=0.1)
    return sample_anchors(labels, weight, num_classes=classes, per_class=per_class, seed=0, impl=impl)


def contrastive_seg(labels: Tensor, predicted: Tensor, classes: int, per_class: int) -> tuple[Tensor, ...]:
    """The procedure of ContrastiveSeg's `_hard_anchor_sampling`: loops over images and classes, half hard, half easy.

    Written anew from its description; what follows there, reading the features, is left out.
    """
    labels, predicted = labels.flatten(1), predicted.flatten(1)
    present: list[list[int]] = []
    for image in labels:
        values = [value for value in torch.unique(image) if value != -1]
        present.append([int(value) for value in values if (image == value).nonzero().shape[0] > per_class])
    drawn = labels.new_full((len(labels), classes, per_class), -1)
    for b, values in enumerate(present):
        for k in values:
            hard = ((labels[b] == k) & (predicted[b] != k)).nonzero()
            easy = ((labels[b] == k) & (predicted[b] == k)).nonzero()
            num_hard, num_easy = hard.shape[0], easy.shape[0]
            if num_hard >= per_class / 2 and num_easy >= per_class / 2:
                keep_hard = per_class // 2
            elif num_hard >= per_class / 2:
                keep_hard = per_class - num_easy
            else:
                keep_hard = num_hard
            keep_easy = per_class - keep_hard
            hard = hard[torch.randperm(num_hard)[:keep_hard]]
            easy = easy[torch.randperm(num_easy)[:keep_easy]]
            drawn[b, k] = torch.cat([hard, easy]).flatten()
    return (drawn,)


def multinomial(labels: Tensor, predicted: Tensor, classes: int, per_class: int) -> tuple[Tensor, ...]:
    """torch.multinomial on the classes' masks, all images and classes in one call."""
    member = labels.flatten(1).unsqueeze(1) == torch.arange(classes, device=labels.device).unsqueeze(1)
    drawn = torch.multinomial(member.flatten(0, 1).float(), per_class)
    return (drawn.unflatten(0, (len(labels), classes)),)


RIVALS: dict[str, Draw] = {
    "cpu": partial(ours, impl="cpu"),
    "cpu_hard": partial(ours_hard, impl="cpu"),
    "reference": partial(ours, impl="reference"),
    "contrastive_seg": contrastive_seg,
    "multinomial": multinomial,
}


def drawn_labels(batch: int, size: int, classes: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Labels with about one pixel in six ignored, and a prediction that is right four times in five."""
    torch.manual_seed(SEED)
    labels = torch.randint(-1, classes, (batch, size, size))
    predicted = torch.where(torch.rand(labels.shape) < 0.8, labels, torch.randint(0, classes, labels.shape))
    return labels.to(device), predicted.to(device)


def case(rival: str, batch: int, size: int, classes: int, per_class: int) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed."""
    return partial(RIVALS[rival], *drawn_labels(batch, size, classes), classes, per_class)


def check_pixels(pixels: Tensor, labels: Tensor, classes: int, per_class: int) -> None:
    """As many different pixels of every class as were asked for."""
    found = labels.flatten(1).gather(1, pixels.flatten(1)).view_as(pixels)
    assert (found == torch.arange(classes, device=labels.device).unsqueeze(1)).all()
    assert (pixels.sort(dim=2).values.diff(dim=2) > 0).all()
    assert pixels.shape[2] == per_class


def check(_rival: str, problem: Problem, result: tuple[Tensor, ...]) -> None:
    """What is drawn differs from rival to rival; that it may be drawn does not."""
    batch, size, classes, per_class = problem.values()
    check_pixels(result[0], drawn_labels(batch, size, classes)[0], classes, per_class)


def work(problem: Problem) -> Work:
    """Labels are read once, and pixels written."""
    batch, size, classes, per_class = problem.values()
    return Work(0, 8 * batch * (size**2 + classes * per_class))


BENCHMARK = Benchmark(
    ours="cpu",
    rivals=lambda _problem: tuple(RIVALS),
    case=case,
    check=check,
    problems=PROBLEMS,
    quick=({"batch": 2, "size": 128, "classes": 2, "per_class": 64},),
    small=lambda _problem: {"batch": 2, "size": 16, "classes": 2, "per_class": 4},
    headlines=PROBLEMS[:1],
    variants=("cpu_hard",),
    operations={"cpu": "sample_anchors", "cpu_hard": "sample_anchors"},
    work=work,
)


def test_draw(timed: Callable[[int], Any], rival: str, problem: Problem) -> None:
    check(rival, problem, timed(15))


def on_gpu(gpu: Gpu) -> str:
    """All rivals on a device; returns ours."""
    rivals: dict[str, Draw] = {
        "triton": partial(ours, impl="triton"),
        "triton_hard": partial(ours_hard, impl="triton"),
        "reference": partial(ours, impl="reference"),
        "contrastive_seg": contrastive_seg,
        "multinomial": multinomial,
    }
    for problem in BENCHMARK.quick if gpu.rehearse else PROBLEMS:
        labels, predicted = drawn_labels(problem["batch"], problem["size"], problem["classes"], gpu.device)
        sizes = {"classes": problem["classes"], "per_class": problem["per_class"]}

        def check_drawn(result: tuple[Tensor, ...], labels: Tensor = labels, sizes: dict[str, int] = sizes) -> None:
            check_pixels(result[0], labels, **sizes)

        for rival, draw in rivals.items():
            prepare = partial(partial, draw, labels, predicted, *sizes.values())
            gpu.row(rival, problem, prepare, check=check_drawn, work=work(problem))
    return "triton"
