"""PixelInfoNCE alone, with a memory bank and over processes; the losses whose call shapes it takes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cldf_fast.errors import ConfigError, DataError
from cldf_fast.losses import PixelBank, PixelContrastLoss, PixelInfoNCE, SupConLoss
from cldf_fast.ops import pixel_infonce_with_valid

VARIANTS = ("per_positive", "supcon")
TEMPERATURE = 0.2


def naive(embeddings: Tensor, labels: Tensor, variant: str) -> Tensor:
    """The mean written out: every anchor against every other, one pair at a time."""
    losses = [naive_anchor(embeddings, labels, i, variant) for i in range(len(labels))]
    counted = [loss for loss in losses if loss is not None]
    return torch.stack(counted).mean()


def naive_anchor(embeddings: Tensor, labels: Tensor, i: int, variant: str) -> Tensor | None:
    """Anchor i's loss; None where it doesn't count."""
    others = [j for j in range(len(labels)) if j != i and labels[j] >= 0]
    logit = {j: embeddings[i] @ embeddings[j] / TEMPERATURE for j in others}
    positive = [j for j in others if labels[j] == labels[i]]
    negative = [j for j in others if labels[j] != labels[i]]
    if labels[i] < 0 or not positive or not negative:
        return None
    terms = []
    for p in positive:
        rivals = [p, *negative] if variant == "per_positive" else others
        terms.append(torch.log(sum(torch.exp(logit[j] - logit[p]) for j in rivals)))
    return sum(terms) / len(terms)


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_classes_can_weigh_differently(variant: str) -> None:
    embeddings, labels = anchors()
    weight = torch.rand(int(labels.max()) + 1, dtype=torch.float64)
    own = torch.arange(len(labels))
    losses, valid = pixel_infonce_with_valid(
        embeddings, embeddings, labels, labels, temperature=TEMPERATURE, variant=variant, self_index=own
    )
    factor = weight[labels.clamp_min(0)] * valid
    found = PixelInfoNCE(TEMPERATURE, variant, class_weight=weight)(embeddings, labels)
    torch.testing.assert_close(found, (losses * factor).sum() / factor.sum())
    with pytest.raises(DataError, match=r"class_weight: expected floating \[K\], got int64 \[\]"):
        PixelInfoNCE(class_weight=torch.tensor(1))


def test_a_wrong_temperature_is_named() -> None:
    embeddings, labels = anchors()
    with pytest.raises(ConfigError, match="temperature"):
        PixelInfoNCE(temperature=0.0)(embeddings, labels)


# --- Memory bank ------------------------------------------------------------------------------------------------------


def test_a_bank_holds_the_newest_rows_of_every_class() -> None:
    bank = PixelBank(num_classes=3, size=4, dim=2)
    newest: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for _ in range(20):
        rows = int(torch.randint(0, 9, ()))
        embeddings, labels = torch.randn(rows, 2), torch.randint(-1, 4, (rows,))  # 3 is no class of this bank
        bank.enqueue(embeddings, labels)
        for value, label in zip(embeddings[:, 0].tolist(), labels.tolist(), strict=True):
            if label in newest:
                newest[label] = [*newest[label], value][-4:]
        vectors, found = bank.candidates()
        assert vectors.shape == (12, 2)
        for label, values in newest.items():
            assert sorted(vectors[found == label, 0].tolist()) == sorted(values)


def test_more_rows_than_a_bank_has_room_for_leave_the_last() -> None:
    bank = PixelBank(2, 3, 1)
    bank.enqueue(torch.arange(10.0).unsqueeze(1), torch.tensor([0, 1] * 5))
    vectors, labels = bank.candidates()
    assert sorted(vectors[labels == 0].flatten().tolist()) == [4, 6, 8]
    assert sorted(vectors[labels == 1].flatten().tolist()) == [5, 7, 9]
    bank.enqueue(torch.tensor([[20.0]]), torch.tensor([0]))
    vectors, labels = bank.candidates()
    assert sorted(vectors[labels == 0].flatten().tolist()) == [6, 8, 20]
    again = PixelBank(2, 3, 1)
    again.load_state_dict(bank.state_dict())
    assert all(map(torch.equal, again.candidates(), bank.candidates()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bank_s_rows_are_candidates_without_gradient(variant: str) -> None:
    embeddings, labels = anchors()
    criterion, bank = PixelInfoNCE(TEMPERATURE, variant), PixelBank(3, 5, 6).double()
    torch.testing.assert_close(criterion(embeddings, labels, bank), criterion(embeddings, labels))
    rows, row_labels = F.normalize(torch.randn(8, 6).double(), dim=1), torch.randint(0, 3, (8,))
    bank.enqueue(rows, row_labels)
    loss = criterion(embeddings, labels, bank)
    # The same as a joint batch of which only the first rows are anchors.
    joint = torch.cat([embeddings, rows])
    everyone = torch.cat([labels, row_labels])
    losses = [naive_anchor(joint, everyone, i, variant) for i in range(len(labels))]
    expected = torch.stack([value for value in losses if value is not None]).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert embeddings.grad is not None


def test_a_bank_names_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="size: expected an integer, 1 or more, got 0"):
        PixelBank(2, 0, 4)
    with pytest.raises(DataError, match=r"embeddings: expected floating \[M, 4\]"):
        PixelBank(2, 3, 4).enqueue(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64))


# --- Call shapes of other losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("labelled", [True, False])
def test_supcon_is_the_published_formula(mode: str, labelled: bool) -> None:
    features = F.normalize(torch.randn(7, 3, 5).double(), dim=2).requires_grad_()
    labels = torch.tensor([0, 1, 1, 2, 0, 5, 1]) if labelled else None
    loss = SupConLoss(0.2, mode, base_temperature=0.1)(features, labels)
    # Khosla et al. 2020, equation 2, over all pairs of views.
    rows = features.transpose(0, 1).reshape(21, 5)
    of_row = (torch.arange(7) if labels is None else labels).repeat(3)
    logits = (rows @ rows.T / 0.2).masked_fill(torch.eye(21, dtype=torch.bool), -torch.inf)
    positive = (of_row == of_row.unsqueeze(1)) & ~torch.eye(21, dtype=torch.bool)
    log_probability = (logits - logits.logsumexp(dim=1, keepdim=True)).masked_fill(~positive, 0)
    expected = -2 * (log_probability.sum(dim=1) / positive.sum(dim=1))[: 21 if mode == "all" else 7].mean()
    torch.testing.assert_close(loss, expected)
    (gradient,), (wanted,) = torch.autograd.grad(loss, features), torch.autograd.grad(expected, features)
    torch.testing.assert_close(gradient, wanted)


def test_supcon_counts_lonely_anchors_and_takes_other_shapes() -> None:
    features = F.normalize(torch.randn(9, 1, 2, 3).double(), dim=3)
    labels = torch.tensor([-4, -4, 3, 3, 8, -1, 5, 6, 7])
    rows = features.reshape(9, 6)
    logits = (rows @ rows.T / 0.2).masked_fill(torch.eye(9, dtype=torch.bool), -torch.inf)
    log_probability = logits - logits.logsumexp(dim=1, keepdim=True)
    # Four of nine have one positive each.
    expected = -sum(log_probability[i, j] for i, j in ((0, 1), (1, 0), (2, 3), (3, 2))) / 9
    criterion = SupConLoss(0.2, base_temperature=0.2)
    torch.testing.assert_close(criterion(features, labels), expected)
    torch.testing.assert_close(criterion(features, labels.unsqueeze(1)), expected)


def test_supcon_names_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="base_temperature: expected a finite number above 0, got 0"):
        SupConLoss(base_temperature=0)
    with pytest.raises(ConfigError, match="contrast_mode: expected one of all, one, got 'some'"):
        SupConLoss(contrast_mode="some")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"features: expected floating \[B, V, D\]"):
        SupConLoss()(torch.zeros(3, 4))


class Configer:
    """ContrastiveSeg's, of what the loss reads."""

    def __init__(self, **values: object) -> None:
        self.values = {"data": {"num_classes": 4}} | values

    def get(self, *keys: str) -> Any:
        value: Any = self.values
        for key in keys:
            value = value[key]
        return value

    def exists(self, *keys: str) -> bool:
        try:
            self.get(*keys)
        except KeyError:
            return False
        return True


def test_pixel_contrast_reads_a_configer() -> None:
    contrast = {"temperature": 0.3, "base_temperature": 0.2, "max_views": 7, "max_samples": 1024}
    found = PixelContrastLoss.from_configer(Configer(contrast=contrast), seed=5)
    assert (found.num_classes, found.temperature, found.base_temperature) == (4, 0.3, 0.2)
    assert (found.max_views, found.ignore_label, int(found.calls)) == (7, -1, 5)
    other = Configer(contrast=contrast, loss={"params": {"ce_ignore_index": 255}})
    assert PixelContrastLoss.from_configer(other).ignore_label == 255


def test_what_losses_are_made_of_is_checked() -> None:
    with pytest.raises(ConfigError, match="temperature: expected a finite number above 0, got -1"):
        PixelInfoNCE(temperature=-1)
    with pytest.raises(ConfigError, match="variant: expected one of per_positive, supcon, got 'sup'"):
        PixelInfoNCE(variant="sup")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="class_weight: expected finite weights, 0 or more"):
        PixelInfoNCE(class_weight=torch.tensor([1.0, -2.0]))
    with pytest.raises(ConfigError, match="max_views: expected an integer, 1 or more, got 0"):
        PixelContrastLoss(2, max_views=0)
    with pytest.raises(DataError, match=r"labels: expected classes below 2, .* got 2"):
        PixelInfoNCE(class_weight=torch.ones(2))(torch.randn(3, 4), torch.arange(3))


def test_pixel_contrast_of_all_pixels_is_pixel_infonce() -> None:
    feats = F.normalize(torch.randn(2, 6, 4, 5).double(), dim=1).requires_grad_()
    labels = torch.randint(-1, 3, (2, 8, 10))
    small = labels[:, ::2, ::2]
    criterion = PixelContrastLoss(3, temperature=TEMPERATURE, base_temperature=TEMPERATURE, max_views=40)
    loss = criterion(feats, labels, torch.randint(0, 3, (2, 4, 5)))
    expected = PixelInfoNCE(TEMPERATURE, "per_positive")(feats.permute(0, 2, 3, 1).flatten(0, 2), small.flatten())
    torch.testing.assert_close(loss, expected)
    (gradient,), (wanted,) = torch.autograd.grad(loss, feats), torch.autograd.grad(expected, feats)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize(("misclassified", "expected"), [(0, 0), (2, 2), (10, 4), (19, 7), (20, 8)])
def test_half_of_the_anchors_are_misclassified_pixels(
    misclassified: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one image with 20 pixels of a class, 8 are drawn: 4 of each kind, or more where the other has fewer."""
    seen = []

    def watch(embeddings: Tensor, _: Tensor, labels: Tensor, *__: Tensor, **___: object) -> Tensor:
        seen.append(embeddings[labels >= 0])
        return embeddings.sum()

    monkeypatch.setattr("cldf_fast.losses.pixel_infonce", watch)
    predict = torch.zeros(1, 4, 5, dtype=torch.int64)
    predict.view(-1)[torch.randperm(20)[:misclassified]] = 1
    feats = (1 + predict).unsqueeze(1).float()  # 2 where misclassified
    criterion = PixelContrastLoss(1, max_views=8)
    criterion(feats, torch.zeros(1, 4, 5, dtype=torch.int64), predict)
    assert int((seen[0] == 2).sum()) == expected
    assert len(seen[0]) == 8


def test_pixel_contrast_draws_anew_in_every_call_and_repeats_with_its_seed() -> None:
    feats = F.normalize(torch.randn(1, 6, 9, 9), dim=1)
    labels, predict = torch.randint(0, 2, (1, 9, 9)), torch.randint(0, 2, (1, 9, 9))
    one, other = (PixelContrastLoss(2, max_views=6, seed=3) for _ in range(2))
    losses = [float(one(feats, labels, predict)) for _ in range(3)]
    assert len(set(losses)) == 3
    assert [float(other(feats, labels, predict)) for _ in range(3)] == losses


@pytest.mark.parametrize("labels", [torch.full((1, 3, 3), -1), torch.zeros(1, 3, 3, dtype=torch.int64)])
def test_pixel_contrast_with_nothing_to_contrast_is_a_connected_zero(labels: Tensor) -> None:
    feats = torch.randn(1, 4, 3, 3, requires_grad=True)
    loss = PixelContrastLoss(2)(feats, labels, torch.zeros(1, 3, 3, dtype=torch.int64))
    loss.backward()
    assert float(loss.detach()) == 0
    assert feats.grad is not None
    assert not feats.grad.any()


# --- Several processes ------------------------------------------------------------------------------------------------


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
        results[name] = (float(loss.detach()), own.grad)
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.barrier()  # nobody leaves while another still talks to it
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    worker(Path(sys.argv[1]), int(sys.argv[2]))
