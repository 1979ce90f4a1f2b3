"""What every benchmark is made of: `Benchmark`, and the measures that all share.

A module `bench_<stem>.py` holds one `BENCHMARK` and one test, which takes `timed`, `rival` and `problem`: `timed` calls
`BENCHMARK.case(rival, **problem)` and gives its result. `conftest.py` calls the test for every rival of every problem,
all in one process. The time of a rival counts only if its result passes the test's comparison.

Nothing is computed twice: a rival's first call on a problem is made once, whether it is asked for as what another is
compared with, or to be timed, and it is that which a slow rival is timed by.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula

from cldf_fast.ops import backend_report

ROOT = Path(__file__).resolve().parents[1]
SEED = 0  # of every drawn input and weight

Problem = dict[str, Any]
"""Names and values by which `case` makes its inputs."""


@dataclass(frozen=True)
class Work:
    """What a problem asks of any method: floating-point operations, and bytes read and written at least once."""

    operations: float
    bytes: float


@dataclass(frozen=True)
class Benchmark:
    """An operation or a workload, its rivals and its problems.

    ours: the rival that is this package.
    rivals: names of the rivals of a problem, ours among them.
    case: `case(rival, **problem)` prepares, and returns the call that is timed. What only a first call does, compiling
        and importing, belongs to the preparation.
    check: `check(rival, problem, result)` compares a rival's result with another's; AssertionError if it is wrong.
    problems: what a full run measures.
    quick: what `--quick` measures instead, in seconds.
    small: of a problem a like one that is over in a moment; it warms a process up before memory is measured.
    headlines: the problems that the README shows.
    variants: rivals that are this package too, in another precision or use: shown, but no rivals.
    libraries: rival -> the module that it needs; where that is absent the rival is a gap.
    operations: rival -> the operation that it needs the compiled extension for.
    slow: rivals that `--quick` leaves out.
    work: what a problem asks at least, for its share of the machine's ceilings; None where that says nothing.
    """

    ours: str
    rivals: Callable[[Problem], tuple[str, ...]]
    case: Callable[..., Callable[[], Any]]
    check: Callable[[str, Problem, Any], None]
    problems: tuple[Problem, ...]
    quick: tuple[Problem, ...]
    small: Callable[[Problem], Problem]
    headlines: tuple[Problem, ...] = ()
    variants: tuple[str, ...] = ()
    libraries: Mapping[str, str] = field(default_factory=dict)
    operations: Mapping[str, str] = field(default_factory=dict)
    slow: frozenset[str] = frozenset()
    work: Callable[[Problem], Work | None] = lambda _problem: None

    def gap(self, rival: str, *, quick: bool = False) -> str | None:
        """Why a rival isn't measured here, or None."""
        library, operation = self.libraries.get(rival), self.operations.get(rival)
        if library is not None and find_spec(library) is None:
            return f"{library} is absent; it comes with the extra [bench]"
        if operation is not None and (state := backend_report()[operation]["cpu"]) != "serving":
            return state
        if quick and rival in self.slow:
            return "left out of --quick: it takes longer to prepare than all else together"
        return None


def load(stem: str) -> Benchmark:
    """The benchmark of `bench_<stem>.py`."""
    benchmark: Benchmark = importlib.import_module(f"benchmarks.bench_{stem}").BENCHMARK
    return benchmark


_TWICE = 2.5
"""Seconds up to which a first call is made twice."""


@dataclass
class FirstCall:
    """A rival's first call on a problem, or the second, where the first took no more than `_TWICE`.

    result, seconds: of the call. others_share: see `OtherLoad.share`. run: the call, None once it has been timed.
    """

    result: Any
    seconds: float
    others_share: float | None
    run: Callable[[], Any] | None


_first_calls: dict[str, tuple[str, dict[str, FirstCall]]] = {}
"""stem -> its last problem, and the first calls of rivals on that."""


def first_call(stem: str, rival: str, problem: Problem) -> FirstCall:
    """A rival's first call, made only if it has not been since the benchmark's last problem."""
    if not _first_calls:
        # What only a process's very first call does, such as imports, is no part of any method.
        benchmark = load(stem)
        benchmark.case(benchmark.ours, **benchmark.small(problem))()
    name = json.dumps(problem)
    if stem not in _first_calls or _first_calls[stem][0] != name:
        _first_calls[stem] = name, {}
    calls = _first_calls[stem][1]
    if rival not in calls:
        run = load(stem).case(rival, **problem)
        others, start = OtherLoad(), time.perf_counter()
        result = run()
        if (seconds := time.perf_counter() - start) <= _TWICE:
            # What only a first call does could take longer than the call, and be all that a row's few rounds show.
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
        calls[rival] = FirstCall(result, seconds, others.share(), run)
    return calls[rival]


def result_of(stem: str, rival: str, problem: Problem) -> Any:
    """What a rival's case gives, to compare others with."""
    return first_call(stem, rival, problem).result


def rounds_of(seconds: float, most: int, budget: float) -> tuple[int, bool]:
    """How many calls a rival is timed by, and whether the first one, of so many seconds, counts among them.

    As many as fit the budget in seconds, at least one and at most `most`. The first one warms up, unless fewer than
    three fit.
    """
    return max(1, min(most, int(budget / seconds))), most == 1 or 3 * seconds > budget


@register_flop_formula([torch.ops.cldf_fast.conv3x3, torch.ops.cldf_fast.conv3x3_backward])
def _direct_operations(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **_results: Any) -> int:
    """Of the usual method: every weight meets every pixel. Winograd's products are a quarter of them."""
    return 2 * x_shape[0] * x_shape[2:].numel() * weight_shape.numel()


class _OperationCounter(TorchDispatchMode):
    """Adds up what torch knows of its operators; FlopCounterMode, its own, does not bear `autograd.grad`."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def counted_operations(run: Callable[[], Any]) -> int:
    """Floating-point operations of the convolutions and matrix products of a call in PyTorch."""
    with _OperationCounter() as counter:
        run()
    return counter.total


# --- The machine ------------------------------------------------------------------------------------------------------


def device(cpu: Mapping[str, Any]) -> dict[str, Any]:
    """The doctor's report on the CPU, and "extension" where CLDF_FAST_CPU_CAPABILITY holds ours to less than that."""
    asked = os.environ.get("CLDF_FAST_CPU_CAPABILITY", "")
    lesser = cpu["features"] in {"avx2": ("AVX512",), "baseline": ("AVX512", "AVX2")}.get(asked, ())
    return dict(cpu) | ({"extension": asked} if lesser else {})


@cache
def gemm_rate() -> float:
    """Operations a second of the best square float32 product that fits into cache, on this machine's CPU."""
    best = 0.0
    for size in (512, 1024, 2048):
        a, b = torch.randn(size, size), torch.randn(size, size)
        for _ in range(10):
            start = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


@cache
def copy_rate() -> float:
    """Bytes a second, read and written, of the best copy of 64 MiB, which no cache holds, on this machine's CPU."""
    source = torch.ones(2**24)
    target, best = torch.empty_like(source), 0.0
    for _ in range(10):
        start = time.perf_counter()
        target.copy_(source)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    return best


class OtherLoad:
    """How much of the machine's processors others take, between its making and `share`.

    What a virtual machine's host takes counts as others'. The processes that this one has started are its own.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter(), _busy_seconds(), _own_seconds()

    def share(self) -> float | None:
        """In [0, 1]; None where the system doesn't tell, or too little time has passed for its clock ticks."""
        start, busy, own = self._start
        wall, now_busy = time.perf_counter() - start, _busy_seconds()
        if busy is None or now_busy is None or wall < 0.2:
            return None
        others = (now_busy - busy) - (_own_seconds() - own)
        return min(max(others / (wall * (os.cpu_count() or 1)), 0.0), 1.0)


def _busy_seconds() -> float | None:
    """Seconds that all processors have worked for anyone, since the machine started."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _waiting, *interrupts_and_stolen = map(int, fields[:8])
    ticks: int = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + sum(interrupts_and_stolen)) / ticks


def _own_seconds() -> float:
    """Of this process, those it has waited for, and workers that it still has."""
    workers = sum(_seconds_of(worker.pid) for worker in multiprocessing.active_children())
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return workers + sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _seconds_of(process: int | None) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return 0.0
    ticks: int = os.sysconf("SC_CLK_TCK")
    return (int(fields[11]) + int(fields[12])) / ticks
