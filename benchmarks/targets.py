"""What was asked of every benchmark, as data: `docs/performance.md` sets it beside what was reached."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.results import Document, Runs, by_problem

Reached = Callable[[Runs, str], float]
"""(a problem's rows by rival, which of them is ours) -> the figure; KeyError where a row lacks what it needs."""


@dataclass(frozen=True)
class Target:
    """What a problem's rows in a results file have to reach.

    issue: where it was asked. what: in words. results: name of the file. problem: the rows' problem.
    figure: from rows to the number. at_least, at_most: the bound; without one the figure alone was asked for.
    unit: after the number.
    """

    issue: int
    what: str
    results: str
    problem: Mapping[str, Any]
    figure: Reached
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "x"

    @property
    def asked(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:g}{self.unit}"
        return "a figure" if self.at_most is None else f"<= {self.at_most:g}{self.unit}"

    def reached(self, results: Mapping[str, Document]) -> float | None:
        """The figure, or None where it was not measured."""
        if self.results not in results:
            return None
        document = results[self.results]
        for problem, runs in by_problem(document):
            if problem == self.problem:
                try:
                    return self.figure(runs, document["ours"])
                except KeyError:
                    return None
        return None

    def met(self, reached: float) -> bool:
        if self.at_least is not None:
            return reached >= self.at_least
        return self.at_most is None or reached <= self.at_most


def faster_than(rival: str, *, than: str | None = None) -> Reached:
    """A rival's time over ours, or over another row's."""
    return lambda runs, ours: runs[rival]["median_ms"] / runs[than or ours]["median_ms"]


def leaner_than(rival: str) -> Reached:
    """A rival's extra memory over ours."""
    return lambda runs, ours: runs[rival]["extra_bytes"] / runs[ours]["extra_bytes"]


def own(name: str, scale: float = 1) -> Reached:
    """One of our own row's figures."""
    return lambda runs, ours: scale * runs[ours][name]


def off(name: str, rival: str) -> Reached:
    """How far a rival's figure is from ours."""
    return lambda runs, ours: abs(runs[rival][name] - runs[ours][name])


def _infonce() -> list[Target]:
    targets = []
    for sets in (2, 1):
        problem = {"sets": sets, "size": 8192, "dim": 64, "classes": 2}
        what = f"pixel_infonce, M = N = 8192, D = 64, {'anchors and candidates' if sets == 2 else 'a set with itself'}"
        targets += [
            Target(3, f"{what}: time of {rival}", "infonce-cpu", problem, faster_than(rival), at_least=bound)
            for rival, bound in (("eager", 6), ("compile", 3), ("chunked", 1.5))
        ]
        share = own("extra_bytes", 100 / (4 * 8192**2))
        targets += [
            Target(3, f"{what}: memory of the M x N matrix", "infonce-cpu", problem, share, at_most=2, unit=" %"),
            Target(
                3,
                f"{what}: share of the products' rate, 8 M N D counted",
                "infonce-cpu",
                problem,
                own("roofline_share", 100),
                at_least=50,
                unit=" %",
            ),
        ]
    return targets


def _anchors() -> list[Target]:
    problem = {"batch": 8, "size": 256, "classes": 5, "per_class": 512}
    uniform = [
        Target(4, f"sample_anchors, uniform: time of {rival}", "anchors-cpu", problem, faster_than(rival), at_least=20)
        for rival in ("contrastive_seg", "multinomial")
    ]
    what = "sample_anchors, hard pixels preferred as there: time of contrastive_seg"
    alike = faster_than("contrastive_seg", than="cpu_hard")
    return [*uniform, Target(4, what, "anchors-cpu", problem, alike, at_least=20)]


def _saliency() -> list[Target]:
    return [
        Target(
            4,
            f"evidence, {part}, {size} px, {classes} classes: time of {rival}",
            "saliency-cpu",
            {"part": part, "batch": 8, "size": size, "levels": 5, "classes": classes},
            faster_than(rival),
            at_least=bound,
        )
        for part, rival, bound in (
            ("epilogue", "numpy", 10),
            ("whole", "autograd_and_hooks", 2.5),
            ("whole", "captum", 2.5),
        )
        for size, classes in ((64, 1), (128, 1), (64, 4))
    ]


def _features() -> list[Target]:
    targets = []
    bounds = (("inference", 1, 4, 10), ("training", 4, 10, 20))
    for (part, batch, speed, memory), width in itertools.product(bounds, (64, 128)):
        problem = {"part": part, "batch": batch, "size": 128, "width": width}
        for name, figure, bound in (("time", faster_than("public"), speed), ("memory", leaner_than("public"), memory)):
            what = f"features, {part}, width {width}: {name} of the public procedure"
            targets.append(Target(5, what, "features-cpu", problem, figure, at_least=bound))
    return targets


def _pipeline() -> list[Target]:
    problem = {"patients": 100, "steps": 400}
    what = "decoder training on the phantom, the public pipeline"
    return [
        Target(5, f"{what}: time", "pipeline-cpu", problem, faster_than("public"), at_least=10),
        Target(5, f"{what}: Dice off ours", "pipeline-cpu", problem, off("dice", "public"), at_most=0.01, unit=""),
    ]


def _deploy() -> list[Target]:
    return [
        Target(
            6,
            f"ONNX Runtime, file to mask, {slices} slices: time of {what}",
            "deploy-cpu",
            {"part": "end2end", "slices": slices},
            faster_than(rival),
            at_least=bound,
        )
        for rival, what, bound in (
            ("eager", "PyTorch", 1.5),
            ("segment", "cldf-fast segment, PyTorch with our layers", None),
        )
        for slices in (32, 155, 500)
    ]


def _gpu() -> list[Target]:
    """On one H100, in results of the same form."""
    large = {"sets": 2, "size": 16384, "dim": 128, "dtype": "bfloat16"}
    small = {"sets": 2, "size": 1024, "dim": 256, "dtype": "bfloat16"}
    pixels = {"batch": 8, "size": 256, "classes": 5, "per_class": 512}
    evidence = {"part": "whole", "batch": 8, "size": 128, "levels": 5, "classes": 1}
    epilogue = {"part": "epilogue", "batch": 8, "size": 256, "levels": 5, "classes": 4}
    what, name = "GPU, pixel_infonce, M = N = 16384, D = 128, bf16", "infonce-gpu"
    return [
        Target(3, f"{what}: TFLOP/s, 8 M N D counted", name, large, own("tflops"), at_least=400, unit=""),
        Target(3, f"{what}: time of eager float32", name, large, faster_than("eager, float32"), at_least=8),
        Target(3, f"{what}: time of chunked", name, large, faster_than("chunked"), at_least=1.2),
        Target(
            3,
            "GPU, pixel_infonce, M = N = 1024, D = 256, CUDA graph",
            name,
            small,
            own("median_ms", 1000),
            at_most=25,
            unit=" us",
        ),
        Target(4, "GPU, sample_anchors", "anchors-gpu", pixels, own("median_ms", 1000), at_most=30, unit=" us"),
        Target(
            4,
            "GPU, sample_anchors: time of contrastive_seg",
            "anchors-gpu",
            pixels,
            faster_than("contrastive_seg"),
            at_least=100,
        ),
        Target(4, "GPU, evidence, whole", "saliency-gpu", evidence, faster_than("autograd_and_hooks"), at_least=3),
        Target(
            4,
            "GPU, evidence, epilogue, 8 x 4 x 256 x 256",
            "saliency-gpu",
            epilogue,
            own("median_ms", 1000),
            at_most=15,
            unit=" us",
        ),
        Target(
            5,
            "GPU, features of a volume of 155 slices, 256 px, bf16",
            "features-gpu",
            {"part": "volume", "slices": 155, "size": 256, "width": 128},
            own("roofline_share", 100),
            unit=" % of the GPU's rate",
        ),
        Target(
            6,
            "GPU, engine against eager PyTorch, file to mask",
            "deploy-gpu",
            {"part": "end2end", "slices": 155},
            faster_than("eager"),
        ),
    ]


TARGETS: tuple[Target, ...] = (
    *_infonce(),
    *_anchors(),
    *_saliency(),
    *_features(),
    *_pipeline(),
    *_deploy(),
    *_gpu(),
)
