"""The benchmark suite's command line: `python -m benchmarks`, or `cldf-fast bench` in a checkout.

    python -m benchmarks [NAME ...] [--quick] [--out FOLDER] [--keep]
    python -m benchmarks --compare A B [--factor F]       results files or folders; exit code 1 if B is slower
    python -m benchmarks docs [--check]                   README and docs/performance.md from benchmarks/results
    python -m benchmarks study NAME [--data DIR] ...      lgg, phantom or organs: train, evaluate, report
    python -m benchmarks gpu [NAME ...] [--rehearse]      on a CUDA device: see benchmarks/gpu.py

Exit codes: 1 for a regression, a failed comparison of results or docs out of date, 2 for what can't be used.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from benchmarks import documents, runner
from benchmarks.results import RESULTS, compare, disturbed, put_aside, read
from cldf_fast.errors import CLDFError, ConfigError

STEMS = tuple(sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py")))


def main(arguments: list[str]) -> int:
    """The exit code."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    try:
        if command == "docs":
            return docs(rest)
        if command == "study":
            return study(rest)
        if command == "gpu":
            from benchmarks import gpu

            return gpu.main(rest)
        return bench(arguments)
    except CLDFError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def bench(arguments: list[str]) -> int:
    """Measure, or compare what was measured."""
    parser = argparse.ArgumentParser(
        prog="cldf-fast bench",
        description="Measure this machine: every operation side by side with its rivals. "
        "Also: `docs` writes README and docs from kept results, `study` runs a whole study.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(STEMS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="a small problem of each; under a minute on two cores")
    parser.add_argument(
        "--out", type=Path, default=Path("build/benchmarks"), help="folder for results [build/benchmarks]"
    )
    parser.add_argument(
        "--keep", action="store_true", help="copy to benchmarks/results and bring README and docs up to date"
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="results files or folders")
    parser.add_argument("--factor", type=float, default=1.25, help="what --compare calls slower [1.25]")
    given = parser.parse_args(arguments)
    if given.compare is not None:
        return compared(given.compare[0], given.compare[1], given.factor)
    if given.keep and given.quick:
        raise ConfigError("--keep: expected a full run, got --quick; its problems are too small to tell anything")
    names = runner.chosen(given.names, STEMS)
    threads = runner.thread_settings()["OMP_NUM_THREADS"]
    print(f"{threads} threads for every rival (OMP_NUM_THREADS={threads})", file=sys.stderr)
    start = time.perf_counter()
    results = runner.measure(names, given.out, quick=given.quick)
    print(documents.terminal(results))
    print(f"{time.perf_counter() - start:.0f} s in all; results in {given.out}")
    if given.keep:
        keep(given.out, list(results))
    complete = len(results) == len(names) and not any(document["failed"] for document in results.values())
    return 0 if complete else 1


def keep(folder: Path, names: list[str]) -> None:
    """Copy results to the tracked ones, unless the machine was busy, and write what is generated from them.

    What was kept there of another machine goes into a folder of that one.
    """
    for name, document in read(folder).items():
        if name not in names:
            continue
        busy = sum(disturbed(row) for row in document["rows"])
        if 2 * busy > len(document["rows"]):
            raise ConfigError(f"--keep: {name} was measured on a busy machine, {busy} rows of it; measure it again")
        put_aside(RESULTS / f"{name}.json", document)
        shutil.copyfile(folder / f"{name}.json", RESULTS / f"{name}.json")
    for path in documents.write():
        print(f"written: {path.relative_to(documents.ROOT)}")


def compared(before: Path, after: Path, factor: float) -> int:
    """Print how the rows of two results changed; 1 if any is slower."""
    first, second = read(before), read(after)
    if before.is_file() and after.is_file():  # two files of whatever names
        first, second = ({each["benchmark"]: each for each in results.values()} for results in (first, second))
    changes, notes = compare(first, second)
    print(documents.changes_table(changes, notes, factor))
    if not changes:
        raise ConfigError(f"--compare: expected rows in common, found none in {before} and {after}")
    slower = sum(change.regression(factor) for change in changes)
    print(f"{len(changes)} rows compared, {slower} slower by more than {factor:g}x and the spread")
    return 1 if slower else 0


def docs(arguments: list[str]) -> int:
    """Write README and docs from kept results, or check them."""
    parser = argparse.ArgumentParser(
        prog="cldf-fast bench docs", description="Write README and docs/performance.md from benchmarks/results."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if they are out of date")
    if parser.parse_args(arguments).check:
        stale = documents.stale()
        print("\n".join(f"out of date: {path.relative_to(documents.ROOT)}" for path in stale) or "up to date")
        return 1 if stale else 0
    for path in documents.write():
        print(f"written: {path.relative_to(documents.ROOT)}")
    return 0


def study(arguments: list[str]) -> int:
    """Train and evaluate a study of the README's table."""
    from benchmarks import studies

    parser = argparse.ArgumentParser(
        prog="cldf-fast bench study",
        description="Train all networks of a configuration, evaluate CLDF and all baselines over three decoder seeds, "
        "and write report.html, metrics.json and NAME.json, which holds no image and no weight.",
    )
    parser.add_argument("name", choices=list(documents.STUDIES))
    parser.add_argument("--data", type=Path, help="folder of the data set (lgg)")
    parser.add_argument("--out", type=Path, help="run directory [runs/NAME]")
    parser.add_argument("--networks", type=Path, help="run directory whose networks are taken instead of training")
    parser.add_argument("--seeds", type=int, default=3, help="decoders [3]")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that everything runs")
    parser.add_argument("--keep", action="store_true", help="copy NAME.json to benchmarks/results")
    given = parser.parse_args(arguments)
    if given.keep and given.quick:
        raise ConfigError("--keep: expected a full study, got --quick; a few steps tell nothing")
    out = given.out or Path("runs") / given.name
    written = studies.run(
        given.name, data=given.data, out=out, networks=given.networks, seeds=given.seeds, quick=given.quick
    )
    print(f"{written}\n{out / 'report.html'}")
    if given.keep:
        shutil.copyfile(written, RESULTS / written.name)
        for path in documents.write():
            print(f"written: {path.relative_to(documents.ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
