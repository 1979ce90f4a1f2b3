"""pixel_infonce, forward and backward, against what people use: time, extra memory, share of the machine's GEMM rate.

    OMP_NUM_THREADS=2 python -m pytest benchmarks/bench_infonce.py --benchmark-json=infonce.json
    python benchmarks/bench_infonce.py table infonce.json          # its figures as ratios
    python benchmarks/bench_infonce.py gpu                         # the same on a CUDA device, JSON
    MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/bench_infonce.py memory cpu 8192 64 2   # peak extra memory, bytes

One process measures all rivals, on the same inputs, so that their ratios hold whatever else the machine is doing. The
rate counts 8 M N D operations, the four products of a method that computes the logits once for the loss and once more
for the gradients. "cpu" needs three of them, since a mean's gradients can be had along with the loss; "cpu_unreduced"
is the same function where the losses are reduced by the caller.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from cldf_fast.ops import backend_report, pixel_infonce

TEMPERATURE = 0.1
_CHUNK = 512  # anchors, for the rival that works in chunks

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def eager(anchors: Tensor, candidates: Tensor, anchor_labels: Tensor, candidate_labels: Tensor) -> Tensor:
    """The "supcon" loss as one writes it in PyTorch: M x N logits, masks and log-probabilities."""
    logits = anchors @ candidates.T / TEMPERATURE
    positive = anchor_labels.unsqueeze(1) == candidate_labels.unsqueeze(0)
    log_probability = logits - logits.logsumexp(dim=1, keepdim=True)
    return -(log_probability * positive).sum(dim=1) / positive.sum(dim=1)


def chunked(anchors: Tensor, candidates: Tensor, anchor_labels: Tensor, candidate_labels: Tensor) -> Tensor:
    """`eager` by chunks of anchors, each computed again in the backward pass."""
    parts = [
        checkpoint(eager, rows, candidates, labels, candidate_labels, use_reentrant=False, preserve_rng_state=False)
        for rows, labels in zip(anchors.split(_CHUNK), anchor_labels.split(_CHUNK), strict=True)
    ]
    return torch.cat(parts)


@cache
def _compiled(shape: torch.Size) -> Loss:
    # Beyond a number of shapes torch.compile gives up and runs eagerly.
    torch.compiler.reset()
    return torch.compile(eager, dynamic=False)


def compiled(anchors: Tensor, candidates: Tensor, anchor_labels: Tensor, candidate_labels: Tensor) -> Tensor:
    """`eager` under torch.compile."""
    return _compiled(anchors.shape)(anchors, candidates, anchor_labels, candidate_labels)


def metric_learning(anchors: Tensor, candidates: Tensor, anchor_labels: Tensor, candidate_labels: Tensor) -> Tensor:
    """SupConLoss of pytorch-metric-learning."""
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.losses import SupConLoss

    # The features are of unit length already.
    criterion = SupConLoss(temperature=TEMPERATURE, distance=DotProductSimilarity(normalize_embeddings=False))
    return criterion(anchors, anchor_labels, ref_emb=candidates, ref_labels=candidate_labels)


RIVALS: dict[str, Loss] = {
    "cpu": partial(pixel_infonce, temperature=TEMPERATURE, variant="supcon", reduction="mean", impl="cpu"),
    "cpu_unreduced": partial(pixel_infonce, temperature=TEMPERATURE, variant="supcon", impl="cpu"),
    "eager": eager,
    "compile": compiled,
    "chunked": chunked,
    "metric_learning": metric_learning,
}


def drawn(
    size: int, dim: int, classes: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit features of `size` anchors and as many candidates, with labels."""
    torch.manual_seed(0)
    features = [normalize(torch.randn(size, dim), dim=1).to(device, dtype).requires_grad_() for _ in range(2)]
    labels = [torch.randint(0, classes, (size,)).to(device) for _ in range(2)]
    return features[0], features[1], labels[0], labels[1]


def step(rival: str, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Mean loss and both gradients."""
    loss = RIVALS[rival](*inputs).mean()
    return loss, *torch.autograd.grad(loss, inputs[:2])


@cache
def gemm_rate() -> float:
    """Operations a second of the best square product that fits into cache."""
    best = 0.0
    for size in (512, 1024, 2048):
        a, b = torch.randn(size, size), torch.randn(size, size)
        for _ in range(10):
            start = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def peak_memory(rival: str, size: int, dim: int, classes: int) -> int:
    """Bytes that one step takes beyond its inputs and results, from a process of its own."""
    command = [sys.executable, __file__, "memory", rival, *map(str, (size, dim, classes))]
    # Every large array a mapping of its own: glibc otherwise keeps what is freed, and more or less of it each time.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(subprocess.check_output(command, env=environment, text=True).split()[-1])


def _measure_memory(rival: str, size: int, dim: int, classes: int) -> int:
    # A small step first: code, thread pools and the allocator's own reserves are no memory of the method.
    step(rival, drawn(64, dim, classes))
    inputs = drawn(size, dim, classes)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is what is in use now
    before = _peak_resident()
    results = step(rival, inputs)
    return _peak_resident() - before - sum(result.nbytes for result in results)


def _peak_resident() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("size", [1024, 4096, 8192])
@pytest.mark.parametrize("rival", RIVALS)
def test_forward_and_backward(benchmark: Any, rival: str, size: int, dim: int, classes: int) -> None:
    if rival.startswith("cpu") and backend_report()["pixel_infonce"]["cpu"] != "serving":
        pytest.skip("the compiled extension is absent")
    if rival == "metric_learning":
        pytest.importorskip("pytorch_metric_learning")
    inputs = drawn(size, dim, classes)
    loss, *gradients = benchmark.pedantic(step, (rival, inputs), warmup_rounds=1, rounds=5)
    # A rival that computes something else would be no rival.
    expected = step("chunked", inputs)
    assert math.isclose(float(loss), float(expected[0]), rel_tol=1e-4)
    for ours, theirs in zip(gradients, expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max()))
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["gemm_share"] = 8 * size**2 * dim / seconds / gemm_rate()
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.extra_info["torch"] = torch.__version__
    if size == 8192 and dim == 64 and rival != "compile":
        benchmark.extra_info["matrix_share"] = peak_memory(rival, size, dim, classes) / (4 * size**2)


GPU_PROBLEMS = ((16384, 128, "bfloat16"), (8192, 64, "bfloat16"), (8192, 64, "float32"), (1024, 256, "bfloat16"))


def in_float32(anchors: Tensor, candidates: Tensor, anchor_labels: Tensor, candidate_labels: Tensor) -> Tensor:
    """`eager` on features that are brought to float32 first."""
    return eager(anchors.float(), candidates.float(), anchor_labels, candidate_labels)


def gpu_rows(
    timer: Callable[[Callable[[], Any]], float], device: str = "cuda", problems: Any = GPU_PROBLEMS
) -> list[dict[str, Any]]:
    """Milliseconds, TFLOP/s at 8 M N D and peak extra memory of every rival, each checked against `in_float32`.

    timer: milliseconds of a call, its launches in a CUDA graph so that Python's time is none of the method's.
    """
    rivals: dict[str, Loss] = {
        "triton": partial(pixel_infonce, temperature=TEMPERATURE, variant="supcon", reduction="mean", impl="triton"),
        "eager, float32": in_float32,
        "eager": eager,
        "compile": compiled,
        "chunked": chunked,
    }
    rows = []
    for size, dim, dtype in problems:
        inputs = drawn(size, dim, 2, getattr(torch, dtype), device)

        def run(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor, Tensor] = inputs) -> tuple[Tensor, ...]:
            mean = loss(*inputs).mean()
            return mean.detach(), *torch.autograd.grad(mean, inputs[:2])

        expected = run(in_float32)
        for name, loss in rivals.items():
            row: dict[str, Any] = {"rival": name, "size": size, "dim": dim, "dtype": dtype}
            try:
                found = run(loss)
                row["error"] = max(
                    float((ours.float() - theirs.float()).norm() / theirs.float().norm())
                    for ours, theirs in zip(found, expected, strict=True)
                )
                if device == "cuda":
                    del found
                    before = torch.cuda.memory_allocated()
                    torch.cuda.reset_peak_memory_stats()
                    run(loss)
                    row["extra_bytes"] = torch.cuda.max_memory_allocated() - before
                row["ms"] = timer(partial(run, loss))
                row["tflops"] = 8e-9 * size**2 * dim / row["ms"]
            # One rival that fails, for want of memory or of a compiler, leaves the others' figures standing.
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}"[:200]
            rows.append(row)
    return rows


def table(results: dict[str, Any]) -> str:
    """Markdown: for every problem the median time of "cpu", its share of the GEMM rate, and the rivals as multiples."""
    rows: dict[tuple[int, int, int], dict[str, dict[str, Any]]] = {}
    for run in results["benchmarks"]:
        problem = run["params"]["size"], run["params"]["dim"], run["params"]["classes"]
        rows.setdefault(problem, {})[run["params"]["rival"]] = run
    rivals = [rival for rival in RIVALS if rival != "cpu"]
    lines = [f"| M = N | D | classes | cpu, ms | share | {' | '.join(rivals)} |", "|---" * (5 + len(rivals)) + "|"]
    for problem, runs in sorted(rows.items()):
        ours = runs["cpu"]["stats"]["median"]
        times = (f"{runs[rival]['stats']['median'] / ours:.1f}" if rival in runs else "" for rival in rivals)
        share = runs["cpu"]["extra_info"]["gemm_share"]
        lines.append(f"| {' | '.join(map(str, problem))} | {1000 * ours:.1f} | {share:.2f} | {' | '.join(times)} |")
    shares = {
        rival: f"{run['extra_info']['matrix_share']:.1%}"
        for runs in rows.values()
        for rival, run in runs.items()
        if "matrix_share" in run["extra_info"]
    }
    return "\n".join([*lines, "", f"Extra memory at 8192 x 64, of the M x N matrix: {shares}"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["table"] and len(sys.argv) == 3:
        print(table(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))))
    elif sys.argv[1:] == ["gpu"]:
        from triton.testing import do_bench_cudagraph

        print(json.dumps(gpu_rows(partial(do_bench_cudagraph, return_mode="median")), indent=1))
    elif sys.argv[1:2] == ["memory"] and len(sys.argv) == 6 and sys.argv[2] in RIVALS:
        print(_measure_memory(sys.argv[2], *map(int, sys.argv[3:])))
    else:
        sys.exit(f"usage: bench_infonce.py gpu, or table FILE, or memory {'|'.join(RIVALS)} SIZE DIM CLASSES")
