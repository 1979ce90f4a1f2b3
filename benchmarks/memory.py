"""Bytes that a call takes beyond its inputs and results at its peak, from a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.suite import ROOT, Problem, load


def peak_memory(stem: str, rival: str, problem: Problem) -> int:
    """Measure one rival of a benchmark."""
    command = [sys.executable, "-m", "benchmarks.memory", stem, rival, json.dumps(problem)]
    # Every large array a mapping of its own: glibc otherwise keeps what is freed, and more or less of it each time.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(subprocess.check_output(command, env=environment, cwd=ROOT, text=True).split()[-1])


def _measure(stem: str, rival: str, problem: Problem) -> int:
    benchmark = load(stem)
    # A small call first: code, thread pools and the allocator's own reserves are no memory of the method.
    benchmark.case(rival, **benchmark.small(problem))()
    run = benchmark.case(rival, **problem)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is what is in use now
    before = _peak_resident()
    results = run()
    return _peak_resident() - before - sum(result.nbytes for result in results)


def _peak_resident() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    print(_measure(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
