"""Runs benchmarks in processes of their own, and collects the results files that those write."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import Document, read
from cldf_fast.errors import BackendError, ConfigError

ROOT = Path(__file__).resolve().parents[1]


def chosen(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """The benchmarks of these names, all without a name; ConfigError for an unknown one."""
    for name in names:
        if name not in known:
            raise ConfigError(f"benchmark: expected one of {', '.join(known)}, got {name!r}")
    return list(dict.fromkeys(names)) or list(known)


def measure(stems: Sequence[str], folder: Path, *, quick: bool) -> dict[str, Document]:
    """Results by file name. Each benchmark has a process of its own, or with `quick` all share one, to save time."""
    folder.mkdir(parents=True, exist_ok=True)
    # What an earlier run left there is not what this one measured.
    for stem in stems:
        (folder / f"{stem}-cpu.json").unlink(missing_ok=True)
    for group in [list(stems)] if quick else [[stem] for stem in stems]:
        _run(group, folder, quick=quick)
    found = read(folder)
    return {name: found[name] for name in (f"{stem}-cpu" for stem in stems) if name in found}


def _run(stems: Sequence[str], folder: Path, *, quick: bool) -> None:
    """Measure some benchmarks in one process; what went wrong is told on stderr."""
    start = time.perf_counter()
    print(f"{', '.join(stems)} ...", end=" ", flush=True, file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"),
            *("--results", str(folder.absolute()), f"--benchmark-json={scratch}/raw.json"),
            *(["--quick"] if quick else []),
            *(f"benchmarks/bench_{stem}.py" for stem in stems),
        ]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | thread_settings(), capture_output=True, text=True, check=False
        )
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    missing = [stem for stem in stems if not (folder / f"{stem}-cpu.json").exists()]
    if "No module named pytest" in done.stderr or "--benchmark-json" in done.stderr:
        raise BackendError("benchmarks: need pytest and pytest-benchmark, which `pip install -e '.[bench]'` brings")
    if missing:
        reasons = [line[1:].strip() for line in done.stdout.splitlines() if line.startswith("E  ") and "Error" in line]
        because = f" ({reasons[0]})" if reasons else f":\n{(done.stdout + done.stderr)[-2000:]}"
        print(f"{', '.join(missing)}: nothing was measured{because}", file=sys.stderr)


def thread_settings() -> dict[str, str]:
    """Environment that gives every numerical library as many threads as this process has cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {f"{library}_NUM_THREADS": str(cores) for library in ("OMP", "OPENBLAS", "MKL")}
