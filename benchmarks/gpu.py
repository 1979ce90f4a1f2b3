"""The benchmarks that a GPU can run: `python -m benchmarks gpu [NAME ...] [--out FOLDER] [--rehearse]`.

A module `bench_<stem>.py` that has a part for GPUs defines `on_gpu(gpu)`, which calls `gpu.row` for every rival of
every problem, and returns the name of ours. Files are those of the CPU's benchmarks, named `<stem>-gpu.json`. Times are
medians of launches between CUDA events, with what the second-level cache holds replaced before each; or, where a row
says so, of replays of a CUDA graph, so that Python's time is none of the method's.

A rehearsal runs the same rows on the CPU, small and timed once, with Triton's kernels interpreted: it shows that every
row can be measured, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.runner import chosen
from benchmarks.suite import ROOT, SEED, Problem, Work
from cldf_fast.doctor import collect
from cldf_fast.errors import BackendError
from cldf_fast.files import atomic_write_text

STEMS = ("infonce", "anchors", "saliency", "features")


class Gpu:
    """What measures the rows of one module.

    device: "cuda", or "cpu" in a rehearsal, which wants small problems. gaps: why a rival is not measured here.
    """

    def __init__(self, *, rehearse: bool = False) -> None:
        self.rehearse = rehearse
        self.device = "cpu" if rehearse else "cuda"
        self.rows: list[dict[str, Any]] = []
        self.failed: dict[str, str] = {}
        self.gaps: dict[str, str] = {}

    def row(
        self,
        rival: str,
        problem: Problem,
        prepare: Callable[[], Callable[[], Any]],
        *,
        check: Callable[[Any], None],
        graph: bool = False,
        work: Work | None = None,
    ) -> None:
        """Measure a rival: prepare() returns what is timed, check gets its result and raises where it is wrong.

        graph: time replays of a CUDA graph. One rival that fails, for want of memory or of a compiler, leaves the
        others' figures standing.
        """
        try:
            run = prepare()
            check(run())
            row: dict[str, Any] = {
                "rival": rival,
                "problem": problem,
                **self._memory(run),
                **self._times(run, graph=graph),
            }
            if work is not None:
                rates = self.ceilings
                least = max(work.operations / rates["operations_per_second"], work.bytes / rates["bytes_per_second"])
                row |= {"operations": work.operations, "bytes": work.bytes}
                row["roofline_share"] = float(f"{1000 * least / row['median_ms']:.3g}")
            self.rows.append(row)
        except Exception as error:
            self.failed[f"{rival}, {' '.join(map(str, problem.values()))}"] = f"{type(error).__name__}: {error}"[:200]

    def _memory(self, run: Callable[[], Any]) -> dict[str, int]:
        if self.device == "cpu":
            return {}
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return {"extra_bytes": torch.cuda.max_memory_allocated() - before}

    def _times(self, run: Callable[[], Any], *, graph: bool) -> dict[str, float]:
        quantiles: list[float]
        if self.device == "cpu":
            start = time.perf_counter()
            run()
            quantiles = [1000 * (time.perf_counter() - start)] * 4
        else:
            from triton.testing import do_bench, do_bench_cudagraph

            quantiles = (do_bench_cudagraph if graph else do_bench)(run, quantiles=[0.5, 0.0, 0.25, 0.75])
        middle, least, low, high = quantiles
        return {"median_ms": round(middle, 5), "min_ms": round(least, 5), "iqr_ms": round(high - low, 5)}

    @cached_property
    def ceilings(self) -> dict[str, float]:
        """Operations a second of a large bfloat16 product, and bytes a second of a large copy."""
        size = 256 if self.rehearse else 8192
        a, b = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        source = torch.ones(size**2, device=self.device)
        target = torch.empty_like(source)
        product = self._times(lambda: torch.mm(a, b), graph=False)["min_ms"] / 1000
        copy = self._times(lambda: target.copy_(source), graph=False)["min_ms"] / 1000
        return {"operations_per_second": round(2 * size**3 / product), "bytes_per_second": round(8 * size**2 / copy)}

    def document(self, stem: str, ours: str) -> dict[str, Any]:
        """The results file."""
        report = collect()
        device = report["cpu"]
        if self.device == "cuda":
            device = {"model": torch.cuda.get_device_name(), "threads": device["threads"]}
        return {
            "benchmark": stem,
            "ours": ours,
            "variants": [row["rival"] for row in self.rows if row["rival"].startswith(f"{ours}_")],
            "device": device,
            "versions": report["versions"],
            "commit": os.environ.get("CLDF_FAST_COMMIT", "unversioned"),
            "date": datetime.now(timezone.utc).date().isoformat(),
            "seed": SEED,
            "quick": self.rehearse,
            "ceilings": self.ceilings,
            "gaps": self.gaps,
            "failed": self.failed,
            "rows": self.rows,
        }


def main(arguments: list[str]) -> int:
    """Measure; the exit code is 1 where a row failed."""
    parser = argparse.ArgumentParser(prog="cldf-fast bench gpu", description="Measure what needs a CUDA device.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(STEMS)}; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "build/benchmarks", help="folder for results")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, small: shows that every row can run")
    given = parser.parse_args(arguments)
    if given.rehearse:
        if os.environ.get("TRITON_INTERPRET") != "1":  # which has to be set before Triton is imported, as it is by now
            command = [sys.executable, "-m", "benchmarks", "gpu", *arguments]
            return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False).returncode
    elif not torch.cuda.is_available():
        raise BackendError("gpu: needs a CUDA device, and there is none; --rehearse runs the same rows on the CPU")
    # Rivals are compared in single precision, which convolutions on a GPU else are not in.
    torch.backends.cudnn.allow_tf32 = False
    complete = True
    for stem in chosen(given.names, STEMS):
        try:
            module = importlib.import_module(f"benchmarks.bench_{stem}")
        except ImportError as error:  # the machine that has the GPU need not have all libraries
            print(f"{stem}: not measured, {error}", file=sys.stderr)
            complete = False
            continue
        gpu, start = Gpu(rehearse=given.rehearse), time.perf_counter()
        ours = module.on_gpu(gpu)
        given.out.mkdir(parents=True, exist_ok=True)
        document = gpu.document(stem, ours)
        atomic_write_text(given.out / f"{stem}-gpu.json", json.dumps(document, indent=1) + "\n")
        print(f"{stem}: {len(gpu.rows)} rows, {len(gpu.failed)} failed, {time.perf_counter() - start:.0f} s")
        for row, reason in gpu.failed.items():
            print(f"{stem}: FAILED: {row}: {reason}", file=sys.stderr)
        complete = complete and not gpu.failed
    return 0 if complete else 1
