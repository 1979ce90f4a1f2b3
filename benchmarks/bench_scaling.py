"""How time and memory grow: each operation along one axis at a time, all else as in its own benchmark.

    python -m benchmarks scaling

Problems are rows of the other benchmarks with one of their sizes changed, so that cases and checks are theirs;
"threads" changes how many of them torch may use. `docs/performance.md` fits an exponent to every curve. A rival that
holds all pairs of embeddings stops where that would take several GiB.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import bench_anchors, bench_features, bench_infonce, bench_saliency
from benchmarks.suite import Benchmark, Problem

OURS = "ours"

PARTS: dict[str, tuple[Benchmark, Problem, tuple[str, ...]]] = {
    "infonce": (
        bench_infonce.BENCHMARK,
        {"sets": 1, "size": 4096, "dim": 64, "classes": 2},
        ("eager", "chunked", "metric_learning"),
    ),
    "anchors": (
        bench_anchors.BENCHMARK,
        {"batch": 8, "size": 256, "classes": 5, "per_class": 128},
        ("contrastive_seg", "multinomial"),
    ),
    "saliency": (
        bench_saliency.BENCHMARK,
        {"part": "whole", "batch": 4, "size": 64, "levels": 5, "classes": 1},
        ("autograd_and_hooks",),
    ),
    "features": (
        bench_features.BENCHMARK,
        {"part": "inference", "batch": 1, "size": 64, "width": 64},
        ("public",),
    ),
}
"""Of each part its benchmark, the problem that an axis starts from, and the rivals beside ours."""
AXES: dict[tuple[str, str], tuple[int, ...]] = {
    ("infonce", "size"): (512, 1024, 2048, 4096, 8192, 16384),
    ("infonce", "dim"): (16, 32, 64, 128, 256, 512),
    ("infonce", "threads"): (1, 2),
    ("anchors", "size"): (64, 128, 256, 512, 1024),
    ("anchors", "batch"): (1, 2, 4, 8, 16, 32),
    ("anchors", "threads"): (1, 2),
    ("saliency", "size"): (32, 64, 128),
    ("saliency", "batch"): (1, 2, 4, 8, 16),
    ("saliency", "threads"): (1, 2),
    ("features", "size"): (32, 64, 128, 256),
    ("features", "batch"): (1, 2, 4, 8),
    ("features", "threads"): (1, 2),
}
LARGEST = {"eager": 8192, "metric_learning": 8192}  # embeddings


def problem_of(part: str, axis: str, value: int) -> Problem:
    """The problem in the part's own benchmark."""
    base = PARTS[part][1]
    return base if axis == "threads" else base | {axis: value}


def name_of(rival: str, part: str) -> str:
    """The rival's name there."""
    return PARTS[part][0].ours if rival == OURS else rival


def rivals(problem: Problem) -> tuple[str, ...]:
    """All that bear the size."""
    part = problem["part"]
    size = problem_of(**problem)["size"]
    bearing = [rival for rival in PARTS[part][2] if part != "infonce" or size <= LARGEST.get(rival, size)]
    return (OURS, *bearing)


def with_threads(threads: int, run: Callable[[], Any]) -> Any:
    """A call with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return run()
    finally:
        torch.set_num_threads(before)


def case(rival: str, part: str, axis: str, value: int) -> Callable[[], Any]:
    """What is timed: the case of the part's benchmark."""
    run = PARTS[part][0].case(name_of(rival, part), **problem_of(part, axis, value))
    return partial(with_threads, value, run) if axis == "threads" else run


def check(rival: str, problem: Problem, result: Any) -> None:
    """The check of the part's benchmark."""
    PARTS[problem["part"]][0].check(name_of(rival, problem["part"]), problem_of(**problem), result)


BENCHMARK = Benchmark(
    ours=OURS,
    rivals=rivals,
    case=case,
    check=check,
    problems=tuple(
        {"part": part, "axis": axis, "value": value} for (part, axis), values in AXES.items() for value in values
    ),
    quick=tuple({"part": "infonce", "axis": "size", "value": value} for value in (256, 512)),
    small=lambda problem: {"part": problem["part"], "axis": "size", "value": 32},
    libraries=bench_infonce.BENCHMARK.libraries,
    operations={OURS: "pixel_infonce"},
)


def test_growth(benchmark: Any, memory: Callable[[], None], rival: str, problem: Problem) -> None:
    rounds = {"infonce": 5, "anchors": 15}.get(problem["part"], 3)
    check(rival, problem, benchmark.pedantic(case(rival, **problem), warmup_rounds=1, rounds=rounds))
    # Pixels that are drawn are few, whoever draws them.
    if problem["axis"] != "threads" and problem["part"] != "anchors":
        memory()
