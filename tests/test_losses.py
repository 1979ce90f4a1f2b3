"""PixelInfoNCE: the mean over counted anchors, alone and over processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cldf_fast.errors import ConfigError
from cldf_fast.losses import PixelInfoNCE

VARIANTS = ("per_positive", "supcon")
TEMPERATURE = 0.2


def naive(embeddings: Tensor, labels: Tensor, variant: str) -> Tensor:
    """The mean written out: every anchor against every other, one pair at a time."""
    losses = []
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i and labels[j] >= 0]
        logit = {j: embeddings[i] @ embeddings[j] / TEMPERATURE for j in others}
        positive = [j for j in others if labels[j] == labels[i]]
        negative = [j for j in others if labels[j] != labels[i]]
        if labels[i] < 0 or not positive or not negative:
            continue
        terms = []
        for p in positive:
            rivals = [p, *negative] if variant == "per_positive" else others
            terms.append(torch.log(sum(torch.exp(logit[j] - logit[p]) for j in rivals)))
        losses.append(sum(terms) / len(terms))
    return sum(losses) / len(losses)


def anchors(count: int = 14) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % 5 - 1  # ignored, then four classes
    labels[labels == 3] = 2
    labels[3] = 7  # the only one of its class
    return F.normalize(torch.randn(count, 6).double(), dim=1).requires_grad_(), labels[torch.randperm(count)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_the_mean_over_the_anchors_that_count(variant: str) -> None:
    embeddings, labels = anchors()
    loss, expected = PixelInfoNCE(TEMPERATURE, variant)(embeddings, labels), naive(embeddings, labels, variant)
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    (gradient,), (wanted,) = torch.autograd.grad(loss, embeddings), torch.autograd.grad(expected, embeddings)
    torch.testing.assert_close(gradient, wanted, rtol=1e-7, atol=1e-9)
    assert not gradient[labels < 0].any()


@pytest.mark.parametrize("labels", [[-1, -1, -1], [1, 1, 1], [0, 1, 2], []], ids=str)
def test_without_a_pair_to_compare_it_is_a_connected_zero(labels: list[int]) -> None:
    embeddings = torch.randn(len(labels), 4, requires_grad=True)
    loss = PixelInfoNCE()(embeddings, torch.tensor(labels, dtype=torch.int64))
    loss.backward()
    assert float(loss.detach()) == 0
    assert embeddings.grad is not None
    assert not embeddings.grad.any()


def test_a_wrong_temperature_is_named() -> None:
    embeddings, labels = anchors()
    with pytest.raises(ConfigError, match="temperature"):
        PixelInfoNCE(temperature=0.0)(embeddings, labels)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_two_processes_equal_one_with_the_joint_batch(tmp_path: Path) -> None:
    cases = {}
    for variant in VARIANTS:
        embeddings, labels = anchors()
        cases[f"{variant}, mixed"] = (variant, embeddings.detach(), labels)
        lonely = labels.clone()
        lonely[len(labels) // 2 :] = -1  # the second process has no anchor at all
        cases[f"{variant}, one process empty"] = (variant, embeddings.detach(), lonely)
        cases[f"{variant}, nothing anywhere"] = (variant, embeddings.detach(), torch.full_like(labels, -1))
    torch.save(cases, tmp_path / "cases.pt")
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, __file__, str(tmp_path), str(rank)], env=environment) for rank in range(2)
    ]
    assert [worker.wait(timeout=600) for worker in workers] == [0, 0]
    results = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name, (variant, embeddings, labels) in cases.items():
        embeddings = embeddings.clone().requires_grad_()
        loss = PixelInfoNCE(TEMPERATURE, variant)(embeddings, labels)
        loss.backward()
        (first, first_gradient), (second, second_gradient) = (result[name] for result in results)
        assert math.isclose((first + second) / 2, float(loss.detach()), rel_tol=1e-9, abs_tol=1e-12), name
        # Data-parallel training averages the gradients of the processes.
        joint = torch.cat([first_gradient, second_gradient]) / 2
        torch.testing.assert_close(joint, embeddings.grad, rtol=1e-9, atol=1e-12, msg=name)


def worker(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    results = {}
    for name, (variant, embeddings, labels) in torch.load(folder / "cases.pt", weights_only=True).items():
        half = len(labels) // 2
        own = embeddings[half * rank : half * (rank + 1)].clone().requires_grad_()
        loss = PixelInfoNCE(TEMPERATURE, variant)(own, labels[half * rank : half * (rank + 1)])
        loss.backward()
        results[name] = (float(loss), own.grad)
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    worker(Path(sys.argv[1]), int(sys.argv[2]))
