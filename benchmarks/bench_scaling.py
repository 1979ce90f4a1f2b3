"""How time and memory grow: each operation along one axis at a time, all else as in its own benchmark.

    python -m benchmarks scaling

Problems are rows of the other benchmarks with one of their sizes changed, so that cases and checks are theirs;
"threads" changes how many of them torch may use, "processes" into how many processes of one thread each the batch is
shared out, and the results gathered from. `docs/performance.md` fits an exponent to every curve. A rival that holds all
pairs of embeddings stops where that would take seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from typing import Any

import torch
from numpy.typing import NDArray

from benchmarks import bench_anchors, bench_features, bench_infonce, bench_saliency
from benchmarks.suite import Benchmark, Problem

OURS = "ours"

PARTS: dict[str, tuple[Benchmark, Problem, tuple[str, ...]]] = {
    "infonce": (
        bench_infonce.BENCHMARK,
        {"sets": 1, "size": 2048, "dim": 64, "classes": 2},
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
        {"part": "inference", "batch": 2, "size": 64, "width": 64},
        ("public",),
    ),
}
"""Of each part its benchmark, the problem that an axis starts from, and the rivals beside ours."""
AXES: dict[tuple[str, str], tuple[int, ...]] = {
    ("infonce", "size"): (512, 1024, 2048, 4096, 8192),
    ("infonce", "dim"): (16, 64, 256),
    ("infonce", "threads"): (1, 2),
    ("anchors", "size"): (64, 128, 256, 512),
    ("anchors", "batch"): (1, 4, 16),
    ("anchors", "threads"): (1, 2),
    ("saliency", "size"): (32, 64, 128),
    ("saliency", "batch"): (1, 2, 4, 8),
    ("saliency", "threads"): (1, 2),
    ("saliency", "processes"): (1, 2),
    ("features", "size"): (32, 64, 128),
    ("features", "batch"): (1, 2, 4),
    ("features", "threads"): (1, 2),
    ("features", "processes"): (1, 2),
}
LARGEST = {"eager": 4096, "metric_learning": 4096}  # embeddings
IN_MEMORY = {"infonce": (OURS, "eager"), "features": (OURS, "public")}
"""Whose memory is measured, against the size."""


def problem_of(part: str, axis: str, value: int) -> Problem:
    """The problem in the part's own benchmark, of one process if there are several."""
    base = PARTS[part][1]
    if axis == "processes":
        return base | {"batch": base["batch"] // value}
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


Share = tuple[NDArray[Any], ...]
"""A process's results; as arrays, since a tensor would stay in memory that is the process's."""


@cache
def _prepared(rival: str, part: str, problem: str) -> Callable[[], Any]:
    """In a process: its call."""
    torch.set_num_threads(1)
    return PARTS[part][0].case(rival, **json.loads(problem))


def _share(*of: str) -> Share:
    """In a process: a call."""
    return tuple(each.numpy() for each in _prepared(*of)())


def in_processes(count: int, *of: str) -> Callable[[], list[Share]]:
    """A call in each of so many processes at once, which end with it."""
    # A pool each: one pool might give two shares to one process.
    processes = [ProcessPoolExecutor(1, mp_context=get_context("spawn")) for _ in range(count)]

    def run() -> list[Share]:
        return [each.result() for each in [process.submit(_share, *of) for process in processes]]

    run()
    return run


def case(rival: str, part: str, axis: str, value: int) -> Callable[[], Any]:
    """What is timed: the case of the part's benchmark."""
    name, problem = name_of(rival, part), problem_of(part, axis, value)
    if axis == "processes":
        return in_processes(value, name, part, json.dumps(problem))
    run = PARTS[part][0].case(name, **problem)
    return partial(with_threads, value, run) if axis == "threads" else run


def check(rival: str, problem: Problem, result: Any) -> None:
    """The check of the part's benchmark, of every share if there are processes."""
    shares = [result]
    if problem["axis"] == "processes":
        assert len(result) == problem["value"]
        shares = [tuple(map(torch.from_numpy, share)) for share in result]
    for share in shares:
        PARTS[problem["part"]][0].check(name_of(rival, problem["part"]), problem_of(**problem), share)


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


def test_growth(timed: Callable[[int], Any], memory: Callable[[], None], rival: str, problem: Problem) -> None:
    check(rival, problem, timed(15 if problem["part"] == "anchors" else 5))
    if problem["axis"] == "size" and rival in IN_MEMORY.get(problem["part"], ()):
        memory()
