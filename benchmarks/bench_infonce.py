"""pixel_infonce, forward and backward, against what people use: time, extra memory, share of the machine's GEMM rate.

    python -m benchmarks infonce
    python -m benchmarks gpu infonce    # on a CUDA device

One process measures all rivals, on the same inputs, so that their ratios hold whatever else the machine is doing.
Problems of one `set` are features against themselves, each without itself, as a decoder is trained; those of two sets
are anchors against other candidates.

The rate counts 8 M N D operations, the four products of a method that computes the logits once for the loss and once
more for the gradients. "cpu" needs three of them, since a mean's gradients can be had along with the loss, and two for
one set, where every pair is met once; "cpu_unreduced" is the same function where the losses are reduced by the caller.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu import Gpu
from benchmarks.suite import SEED, Benchmark, Problem, Work, result_of
from cldf_fast.ops import pixel_infonce

PROBLEMS: tuple[Problem, ...] = tuple(
    {"sets": sets, "size": size, "dim": dim, "classes": classes}
    for sets, kinds in ((2, (2, 5)), (1, (2,)))
    for size, dim, classes in itertools.product((1024, 4096, 8192), (64, 128, 256), kinds)
)
TEMPERATURE = 0.1
_CHUNK = 512  # anchors, for the rival that works in chunks

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""(anchors, candidates, their labels, the candidate that each anchor is or None) -> losses, or their mean."""


def ours(
    anchors: Tensor,
    candidates: Tensor,
    anchor_labels: Tensor,
    candidate_labels: Tensor,
    own: Tensor | None,
    **options: Any,
) -> Tensor:
    """The operation, with its options."""
    inputs = (anchors, candidates, anchor_labels, candidate_labels)
    return pixel_infonce(*inputs, self_index=own, temperature=TEMPERATURE, variant="supcon", **options)


def eager(
    anchors: Tensor,
    candidates: Tensor,
    anchor_labels: Tensor,
    candidate_labels: Tensor,
    own: Tensor | None,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """The "supcon" loss as one writes it in PyTorch: M x N logits, masks and log-probabilities."""
    logits = anchors @ candidates.T / temperature
    positive = anchor_labels.unsqueeze(1) == candidate_labels.unsqueeze(0)
    if own is not None:
        itself = own.unsqueeze(1) == torch.arange(candidates.shape[0], device=own.device)
        logits, positive = logits.masked_fill(itself, -1e9), positive & ~itself
    log_probability = logits - logits.logsumexp(dim=1, keepdim=True)
    return -(log_probability * positive).sum(dim=1) / positive.sum(dim=1)


def chunked(
    anchors: Tensor, candidates: Tensor, anchor_labels: Tensor, candidate_labels: Tensor, own: Tensor | None
) -> Tensor:
    """`eager` by chunks of anchors, each computed again in the backward pass."""
    owns = [None] * len(anchors.split(_CHUNK)) if own is None else own.split(_CHUNK)
    parts = [
        checkpoint(
            eager, rows, candidates, labels, candidate_labels, mine, use_reentrant=False, preserve_rng_state=False
        )
        for rows, labels, mine in zip(anchors.split(_CHUNK), anchor_labels.split(_CHUNK), owns, strict=True)
    ]
    return torch.cat(parts)


@cache
def _compiled(shape: torch.Size, sets: int) -> Loss:
    # Beyond a number of shapes torch.compile gives up and runs eagerly.
    torch.compiler.reset()
    return torch.compile(eager, dynamic=False)


def compiled(
    anchors: Tensor, candidates: Tensor, anchor_labels: Tensor, candidate_labels: Tensor, own: Tensor | None
) -> Tensor:
    """`eager` under torch.compile."""
    loss = _compiled(anchors.shape, 1 if anchors is candidates else 2)
    return loss(anchors, candidates, anchor_labels, candidate_labels, own)


@cache
def _sup_con_loss() -> Any:
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.losses import SupConLoss

    # The features are of unit length already.
    return SupConLoss(temperature=TEMPERATURE, distance=DotProductSimilarity(normalize_embeddings=False))


def metric_learning(
    anchors: Tensor, candidates: Tensor, anchor_labels: Tensor, candidate_labels: Tensor, own: Tensor | None
) -> Tensor:
    """SupConLoss of pytorch-metric-learning."""
    criterion = _sup_con_loss()
    if own is not None:  # without references it compares a set with itself, and leaves out each one itself
        return criterion(anchors, anchor_labels)
    return criterion(anchors, anchor_labels, ref_emb=candidates, ref_labels=candidate_labels)


RIVALS: dict[str, Loss] = {
    "cpu": partial(ours, reduction="mean", impl="cpu"),
    "cpu_unreduced": partial(ours, impl="cpu"),
    "eager": eager,
    "compile": compiled,
    "chunked": chunked,
    "metric_learning": metric_learning,
}

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, "Tensor | None"]


def drawn(
    sets: int, size: int, dim: int, classes: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Inputs:
    """Unit features of `size` anchors and as many candidates, with labels."""
    torch.manual_seed(SEED)
    features = [normalize(torch.randn(size, dim), dim=1).to(device, dtype).requires_grad_() for _ in range(sets)]
    labels = [torch.randint(0, classes, (size,)).to(device) for _ in range(sets)]
    own = torch.arange(size, device=device) if sets == 1 else None
    return features[0], features[-1], labels[0], labels[-1], own


def step(loss: Loss, inputs: Inputs) -> tuple[Tensor, ...]:
    """Mean loss and the gradients of the features."""
    mean = loss(*inputs).mean()
    features = inputs[:1] if inputs[0] is inputs[1] else inputs[:2]
    return mean.detach(), *torch.autograd.grad(mean, features)


def case(rival: str, sets: int, size: int, dim: int, classes: int) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed."""
    run = partial(step, RIVALS[rival], drawn(sets, size, dim, classes))
    if rival == "compile":
        run()
    elif rival == "metric_learning":
        _sup_con_loss()
    return run


def check(rival: str, problem: Problem, result: tuple[Tensor, ...]) -> None:
    """The loss and gradients of `chunked`, or its own of `eager`: a rival that computes another thing would be none."""
    expected = result_of("infonce", "eager" if rival == "chunked" else "chunked", problem)
    assert math.isclose(float(result[0]), float(expected[0]), rel_tol=1e-4)
    for found, theirs in zip(result[1:], expected[1:], strict=True):
        torch.testing.assert_close(found, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max()))


def work(problem: Problem) -> Work:
    """8 M N D operations, see above; features are read, and their gradients written."""
    sets, size, dim, _ = problem.values()
    return Work(8 * size**2 * dim, 2 * 4 * sets * size * dim)


BENCHMARK = Benchmark(
    ours="cpu",
    rivals=lambda _problem: tuple(RIVALS),
    case=case,
    check=check,
    problems=PROBLEMS,
    quick=({"sets": 2, "size": 1024, "dim": 64, "classes": 2},),
    small=lambda _problem: {"sets": 2, "size": 64, "dim": 64, "classes": 2},
    headlines=tuple({"sets": sets, "size": 8192, "dim": 64, "classes": 2} for sets in (1, 2)),
    variants=("cpu_unreduced",),
    libraries={"metric_learning": "pytorch_metric_learning"},
    operations={"cpu": "pixel_infonce", "cpu_unreduced": "pixel_infonce"},
    work=work,
)


def test_forward_and_backward(
    timed: Callable[[int], Any], memory: Callable[[], None], rival: str, problem: Problem
) -> None:
    check(rival, problem, timed(7))
    # What torch.compile takes for compiling would count as its memory.
    if problem in BENCHMARK.headlines and rival != "compile":
        memory()


GPU_PROBLEMS = ((16384, 128, "bfloat16"), (8192, 64, "bfloat16"), (8192, 64, "float32"), (1024, 256, "bfloat16"))


def in_float32(
    anchors: Tensor, candidates: Tensor, anchor_labels: Tensor, candidate_labels: Tensor, own: Tensor | None
) -> Tensor:
    """`eager` on features that are brought to float32 first."""
    return eager(anchors.float(), candidates.float(), anchor_labels, candidate_labels, own)


def on_gpu(gpu: Gpu) -> str:
    """All rivals on a device, each compared with `in_float32`; returns ours."""
    rivals: dict[str, Loss] = {
        "triton": partial(ours, reduction="mean", impl="triton"),
        "eager, float32": in_float32,
        "eager": eager,
        "compile": compiled,
        "chunked": chunked,
    }
    for size, dim, dtype in ((64, 16, "bfloat16"), (65, 24, "float32")) if gpu.rehearse else GPU_PROBLEMS:
        problem: Problem = {"sets": 2, "size": size, "dim": dim, "dtype": dtype}
        inputs = drawn(2, size, dim, 2, getattr(torch, dtype), gpu.device)
        expected = step(in_float32, inputs)

        def compare(result: tuple[Tensor, ...], expected: tuple[Tensor, ...] = expected) -> None:
            for found, theirs in zip(result, expected, strict=True):
                assert (found.float() - theirs.float()).norm() <= 2e-2 * theirs.float().norm()

        work = Work(8 * size**2 * dim, 4 * size * dim * inputs[0].element_size())
        for rival, loss in rivals.items():
            gpu.row(rival, problem, partial(partial, step, loss, inputs), check=compare, graph=True, work=work)
    for row in gpu.rows:
        row["tflops"] = round(1e-9 * row["operations"] / row["median_ms"], 2)
    return "triton"
