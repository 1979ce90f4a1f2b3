"""Calls every benchmark's test for its rivals and problems, and writes what they measured as results files.

`python -m benchmarks` runs pytest with `--results FOLDER`, where `<stem>-cpu.json` is written for every module:

    benchmark, ours, variants, device, versions, commit, date, seed, quick
    seconds      that the whole benchmark took, if it had the process for itself
    ceilings     operations and bytes a second that the machine's best product and copy reach, in the same process
    gaps         rival -> why it was not measured
    failed       "rival, problem" -> why its time does not count
    rows         rival, problem, headline, median_ms, min_ms, iqr_ms, rounds; where they were measured extra_bytes,
                 operations and bytes (what the problem asks at least) and roofline_share, and what the test adds;
                 others_share is what other processes took of the processors meanwhile, or, where a row was over
                 too soon to tell, during the whole run
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from benchmarks.memory import peak_memory
from benchmarks.suite import (
    SEED,
    Benchmark,
    OtherLoad,
    Problem,
    Work,
    copy_rate,
    device,
    first_call,
    gemm_rate,
    load,
    rounds_of,
)
from cldf_fast.doctor import collect
from cldf_fast.files import atomic_write_text

STEMS = pytest.StashKey[list[str]]()
FAILED = pytest.StashKey[dict[str, str]]()
OTHERS = pytest.StashKey[OtherLoad]()
START = pytest.StashKey[float]()

SECONDS = {True: 12.0, False: 5.0}
"""A row's calls, of headline problems and of others."""
QUICK_SECONDS = 0.5
"""The same with --quick."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="a small problem of each benchmark, and no memory")
    parser.addoption("--results", type=Path, help="folder for the results files")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STEMS] = []
    config.stash[FAILED] = {}
    config.stash[OTHERS] = OtherLoad()
    config.stash[START] = time.perf_counter()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    benchmark: Benchmark = metafunc.module.BENCHMARK
    quick = metafunc.config.getoption("quick")
    metafunc.config.stash[STEMS].append(stem_of(metafunc.module.__file__))
    # Problem by problem, so that what rivals are compared with is computed once.
    calls = [
        (rival, problem)
        for problem in (benchmark.quick if quick else benchmark.problems)
        for rival in benchmark.rivals(problem)
        if benchmark.gap(rival, quick=quick) is None
    ]
    metafunc.parametrize(("rival", "problem"), calls, ids=[named(*call) for call in calls])


def named(rival: str, problem: Problem) -> str:
    """A row's name."""
    return f"{rival}, {' '.join(map(str, problem.values()))}"


@pytest.fixture
def timed(request: pytest.FixtureRequest, benchmark: Any, rival: str, problem: Problem) -> Callable[[int], Any]:
    """`timed(most)` times the row's rival by up to so many calls and gives its result."""

    def measure(most: int) -> Any:
        stem = stem_of(str(request.node.fspath))
        first = first_call(stem, rival, problem)
        quick, headline = request.config.getoption("quick"), problem in load(stem).headlines
        budget = QUICK_SECONDS if quick else SECONDS[headline]
        rounds, counts = rounds_of(first.seconds, most, budget)
        more = rounds - counts
        benchmark.pedantic(first.run if more else int, rounds=max(more, 1))
        times = benchmark.stats.stats.data
        if not more:
            times.clear()
        if counts:
            times.append(first.seconds)
            benchmark.extra_info["others_share"] = first.others_share
        first.run = None  # the networks that it holds
        return first.result

    return measure


@pytest.fixture
def memory(request: pytest.FixtureRequest, benchmark: Any, rival: str, problem: Problem) -> Callable[[], None]:
    """Measures the row's extra memory, which takes a process of its own; not with --quick."""

    def measure() -> None:
        if not request.config.getoption("quick"):
            benchmark.extra_info["extra_bytes"] = peak_memory(stem_of(str(request.node.fspath)), rival, problem)

    return measure


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Function) -> Generator[None, None, None]:
    others = OtherLoad()
    yield
    benchmark: Any = item.funcargs["benchmark"]
    figures = benchmark.extra_info
    # A first call that counts may have been made for another row.
    shares = [share for share in (figures.pop("others_share", None), others.share()) if share is not None]
    if shares:
        figures["others_share"] = round(max(shares), 3)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
        item.config.stash[FAILED][item.nodeid] = f"{call.excinfo.typename}: {call.excinfo.value}".split("\n")[0][:200]
    report = yield
    return report


def stem_of(path: str) -> str:
    """infonce, of a path or test within bench_infonce.py."""
    return Path(path.split("::")[0]).stem.removeprefix("bench_")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    folder = config.getoption("results")
    if folder is None:
        return
    failed, quick = config.stash[FAILED], config.getoption("quick")
    others_share = config.stash[OTHERS].share()
    for stem in config.stash[STEMS]:
        runs = [run for run in output_json["benchmarks"] if stem_of(run["fullname"]) == stem]
        document = results_document(load(stem), stem, runs, failed, quick=quick)
        if others_share is not None:
            for row in document["rows"]:
                row.setdefault("others_share", round(others_share, 3))
        document["commit"] = output_json["commit_info"]["id"]
        if output_json["commit_info"]["dirty"]:
            document["commit"] += " and uncommitted changes"
        if len(config.stash[STEMS]) == 1:
            document["seconds"] = round(time.perf_counter() - config.stash[START])
        atomic_write_text(folder / f"{stem}-cpu.json", json.dumps(document, indent=1) + "\n")


def results_document(
    benchmark: Benchmark, stem: str, runs: list[dict[str, Any]], failed: dict[str, str], *, quick: bool
) -> dict[str, Any]:
    """What is worth keeping of pytest-benchmark's figures, without their commit; no name of a machine.

    runs: those of one module. failed: reasons by the test's id.
    """
    report = collect()
    problems = {json.dumps(run["params"]["problem"]): run["params"]["problem"] for run in runs}
    works = {key: benchmark.work(problem) for key, problem in problems.items()}
    rivals = dict.fromkeys(rival for problem in benchmark.problems for rival in benchmark.rivals(problem))
    gaps = {rival: reason for rival in rivals if (reason := benchmark.gap(rival, quick=quick))}
    return {
        "benchmark": stem,
        "ours": benchmark.ours,
        "variants": benchmark.variants,
        "device": device(report["cpu"]),
        "versions": report["versions"],
        "commit": "",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "seed": SEED,
        "quick": quick,
        "ceilings": {"operations_per_second": round(gemm_rate()), "bytes_per_second": round(copy_rate())},
        "gaps": gaps,
        "failed": {test.split("[")[-1].rstrip("]"): why for test, why in failed.items() if stem_of(test) == stem},
        "rows": [
            _row(
                run,
                works[json.dumps(run["params"]["problem"])],
                headline=run["params"]["problem"] in benchmark.headlines,
            )
            for run in runs
            if run["fullname"] not in failed
        ],
    }


def _row(run: dict[str, Any], work: Work | None, *, headline: bool) -> dict[str, Any]:
    rival, problem = run["params"]["rival"], run["params"]["problem"]
    figures = {f"{name}_ms": round(1000 * run["stats"][name], 4) for name in ("median", "min", "iqr")}
    row = {"rival": rival, "problem": problem, **figures, "rounds": run["stats"]["rounds"], **run["extra_info"]}
    if headline:
        row["headline"] = True
    if work is not None:
        least = max(work.operations / gemm_rate(), work.bytes / copy_rate())
        share = least / run["stats"]["median"]
        row |= {"operations": work.operations, "bytes": work.bytes, "roofline_share": float(f"{share:.3g}")}
    return row
