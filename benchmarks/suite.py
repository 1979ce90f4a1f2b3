"""What all benchmarks share: measuring memory and ceilings, results as data, and their table.

    OMP_NUM_THREADS=2 python -m pytest benchmarks/bench_anchors.py --benchmark-json=raw.json    # 1 minute
    OMP_NUM_THREADS=2 python -m pytest benchmarks/bench_deploy.py --benchmark-json=raw.json     # 13 minutes
    OMP_NUM_THREADS=2 python -m pytest benchmarks/bench_saliency.py --benchmark-json=raw.json   # 2 minutes
    OMP_NUM_THREADS=2 python -m pytest benchmarks/bench_features.py --benchmark-json=raw.json   # 10 minutes
    OMP_NUM_THREADS=2 python -m pytest benchmarks/bench_infonce.py --benchmark-json=raw.json    # 11 minutes
    OMP_NUM_THREADS=2 python -m pytest benchmarks/bench_pipeline.py --benchmark-json=raw.json   # 11 minutes
    python -m benchmarks.suite keep raw.json      # writes benchmarks/results/<stem>-cpu.json, which is tracked
    python -m benchmarks.suite table benchmarks/results/anchors-cpu.json
    python -m benchmarks.suite readme             # brings the README's table of speed up to date with the results

A module `bench_<stem>.py` measures all rivals of a problem in one process, one test each, with the parameter `rival`
and those of the problem. Its `OURS` names the rival that is this package, `case(rival, **problem)` returns what is
timed, `SMALL` is a problem that is over in a moment (its sizes: words of a problem are kept), and `HEADLINES` are those
that the README shows. The time of a rival counts only after its result was compared.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cldf_fast
from cldf_fast.doctor import collect

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKS = "<!-- from benchmarks/results -->", "<!-- end -->"


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


def peak_memory(stem: str, rival: str, problem: dict[str, Any]) -> int:
    """Bytes that a call takes beyond its inputs and results at its peak, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.suite", "memory", stem, rival, json.dumps(problem)]
    # Every large array a mapping of its own: glibc otherwise keeps what is freed, and more or less of it each time.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(subprocess.check_output(command, env=environment, cwd=ROOT, text=True).split()[-1])


def _measure_memory(stem: str, rival: str, problem: dict[str, Any]) -> int:
    module = importlib.import_module(f"benchmarks.bench_{stem}")
    # A small call first: code, thread pools and the allocator's own reserves are no memory of the method.
    module.case(rival, **module.SMALL | {name: value for name, value in problem.items() if isinstance(value, str)})()
    run: Callable[[], tuple[Tensor, ...]] = module.case(rival, **problem)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is what is in use now
    before = _peak_resident()
    results = run()
    return _peak_resident() - before - sum(result.nbytes for result in results)


def _peak_resident() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def attempt(row: dict[str, Any], measure: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """A rival's row on a GPU, filled by `measure`, or with the reason why that failed.

    One rival that fails, for want of memory or of a compiler, leaves the others' figures standing.
    """
    try:
        measure(row)
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {error}"[:200]
    return row


def condensed(raw: dict[str, Any], stem: str) -> dict[str, Any]:
    """What is worth keeping of pytest-benchmark's JSON: figures, device, versions and commit; no name of a machine."""
    report = collect()
    rows = []
    for run in raw["benchmarks"]:
        problem = dict(run["params"])
        stats = {f"{name}_ms": round(1000 * run["stats"][name], 4) for name in ("median", "min", "iqr")}
        rows.append({"rival": problem.pop("rival"), "problem": problem, **stats, **run["extra_info"]})
    return {
        "benchmark": stem,
        "ours": importlib.import_module(f"benchmarks.bench_{stem}").OURS,
        "device": report["cpu"],
        "versions": report["versions"] | {"cldf_fast": cldf_fast.__version__},
        "commit": raw["commit_info"]["id"] + (" and uncommitted changes" if raw["commit_info"]["dirty"] else ""),
        "rows": rows,
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: for every problem our median time, our share of a ceiling, and the rivals' times as multiples."""
    ours: str = results["ours"]
    problems: dict[str, dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        problems.setdefault(json.dumps(row["problem"]), {})[row["rival"]] = row
    rivals = list(dict.fromkeys(row["rival"] for row in results["rows"] if row["rival"] != ours))
    names = list(results["rows"][0]["problem"])
    shares = list(dict.fromkeys(key for row in results["rows"] for key in row if key.endswith("_share")))
    lines = [
        f"| {' | '.join([*names, f'{ours}, ms', *shares, *rivals])} |",
        "|---" * (len(names + shares + rivals) + 1) + "|",
    ]
    for problem, runs in problems.items():
        cells = [str(value) for value in json.loads(problem).values()]
        cells.append(f"{runs[ours]['median_ms']:.2f}")
        cells += [f"{runs[ours][share]:.2f}" if share in runs[ours] else "" for share in shares]
        for rival in rivals:
            times = f"{runs[rival]['median_ms'] / runs[ours]['median_ms']:.1f}x" if rival in runs else ""
            cells.append(times)
        lines.append(f"| {' | '.join(cells)} |")
    memory = [
        f"{row['rival']} {row['extra_bytes'] / 2**20:,.1f} MiB ({' '.join(map(str, row['problem'].values()))})"
        for row in results["rows"]
        if "extra_bytes" in row
    ]
    return "\n".join([*lines, "", *(["Extra memory: " + "; ".join(memory)] if memory else []), _where(results)])


def summary() -> str:
    """Markdown: the headline problems of all results."""
    lines = ["| | problem | ours, ms | others, as multiples |", "|---|---|---|---|"]
    for file in sorted(RESULTS.glob("*-cpu.json")):
        results = json.loads(file.read_text(encoding="utf-8"))
        for problem in importlib.import_module(f"benchmarks.bench_{results['benchmark']}").HEADLINES:
            runs = {row["rival"]: row["median_ms"] for row in results["rows"] if row["problem"] == problem}
            ours = runs.pop(results["ours"])
            others = ", ".join(f"{rival} {time / ours:.1f}" for rival, time in runs.items() if "cpu" not in rival)
            sizes = ", ".join(f"{name} {value}" for name, value in problem.items())
            lines.append(f"| {results['benchmark']} | {sizes} | {ours:.2f} | {others} |")
    return "\n".join([*lines, "", f"({_where(results)})"])


def _where(results: dict[str, Any]) -> str:
    device = results["device"]
    return f"{device['model']}, {device['threads']} threads, torch {results['versions']['torch']}"


def update(text: str) -> str:
    """A text with the table between its marks brought up to date."""
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n{summary()}\n{MARKS[1]}{after}"


def main(arguments: list[str]) -> None:
    """The command line above."""
    match arguments:
        case ["keep", file]:
            raw = json.loads(Path(file).read_text(encoding="utf-8"))
            stem = Path(raw["benchmarks"][0]["fullname"].split("::")[0]).stem.removeprefix("bench_")
            RESULTS.mkdir(exist_ok=True)
            kept = RESULTS / f"{stem}-cpu.json"
            kept.write_text(json.dumps(condensed(raw, stem), indent=1) + "\n", encoding="utf-8")
            print(f"{kept.relative_to(ROOT)}\n\n{table(condensed(raw, stem))}")
        case ["table", file]:
            print(table(json.loads(Path(file).read_text(encoding="utf-8"))))
        case ["readme"]:
            readme = ROOT / "README.md"
            readme.write_text(update(readme.read_text(encoding="utf-8")), encoding="utf-8")
        case ["memory", stem, rival, problem]:
            print(_measure_memory(stem, rival, json.loads(problem)))
        case _:
            sys.exit(
                "usage: python -m benchmarks.suite keep RAW, or table FILE, or readme, or memory STEM RIVAL PROBLEM"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
