"""Prototypes, calibration and masks: found clusters, the best threshold there is, absent classes never drawn."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cldf_fast.segmentation import Prototypes, calibrate, fit_prototypes, masks_from_probability, spherical_kmeans


def around(centre: Tensor, count: int, spread: float = 0.1) -> Tensor:
    return F.normalize(centre + spread * torch.randn(count, centre.shape[-1]), dim=1)


def test_kmeans_finds_well_separated_directions() -> None:
    directions = torch.eye(5)[:3]
    points = torch.cat([around(direction, 40) for direction in directions])
    found = max(
        (spherical_kmeans(points, 3, seed) for seed in range(5)),
        key=lambda centres: float((points @ centres.T).amax(dim=1).sum()),
    )
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    assert (directions @ found.T).amax(dim=1).min() > 0.98


@pytest.mark.parametrize(("points", "clusters"), [(2, 5), (1, 3), (30, 1), (7, 7)])
def test_kmeans_serves_any_number_of_points(points: int, clusters: int) -> None:
    embeddings = F.normalize(torch.randn(points, 4), dim=1)
    centres = spherical_kmeans(embeddings, clusters, seed=4)
    assert centres.shape == (clusters, 4)
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(clusters))
    assert centres.equal(spherical_kmeans(embeddings, clusters, seed=4))


def test_scores_are_a_soft_maximum_over_prototypes() -> None:
    prototypes = Prototypes(F.normalize(torch.randn(3, 2, 4), dim=-1), torch.randn(3), temperature=0.3)
    embedding = F.normalize(torch.randn(5, 4), dim=1)
    scores = prototypes.scores(embedding.view(5, 1, 4))
    assert scores.shape == (5, 1, 3)
    for i in range(5):
        for k in range(3):
            terms = [math.exp(float(embedding[i] @ prototypes.vectors[k, p]) / 0.3) for p in range(2)]
            assert float(scores[i, 0, k]) == pytest.approx(math.log(sum(terms)) + float(prototypes.bias[k]), rel=1e-5)
    torch.testing.assert_close(prototypes.probability(embedding).sum(dim=-1), torch.ones(5))


def test_prototypes_come_from_their_own_class_and_ignored_pixels_from_none() -> None:
    directions = torch.eye(4)
    embeddings = torch.cat([around(direction, 20, 0.05) for direction in directions])
    labels = torch.arange(4).repeat_interleave(20)
    labels[labels == 3] = -1
    prototypes = fit_prototypes(embeddings, labels, num_classes=3, per_class=2, temperature=0.1)
    assert prototypes.vectors.shape == (3, 2, 4)
    for k in range(3):
        assert (prototypes.vectors[k] @ directions[k]).min() > 0.95
    assert prototypes.probability(embeddings[:60]).argmax(dim=1).equal(labels[:60])


def test_a_class_without_pixels_is_never_chosen() -> None:
    embeddings = F.normalize(torch.randn(30, 4), dim=1)
    labels = torch.arange(30) % 2 * 2  # background and class 2
    prototypes = fit_prototypes(embeddings, labels, num_classes=4, per_class=3, temperature=0.1)
    calibrated = calibrate(prototypes, embeddings, labels, torch.ones(30))
    probability = calibrated.probability(F.normalize(torch.randn(200, 4), dim=1))
    assert probability.isfinite().all()
    assert not probability[:, [1, 3]].any()


@pytest.mark.parametrize("scatter", [0.3, 1.0, 3.0])
def test_calibration_takes_the_middle_of_the_best_thresholds_by_weighted_f1(scatter: float) -> None:
    labels = torch.cat([torch.zeros(150), torch.ones(40), torch.full((30,), 2), torch.full((10,), -1)]).long()
    embeddings = F.normalize(F.one_hot(labels.clamp_min(0), 4) + scatter * torch.randn(230, 4), dim=1)
    weight = torch.rand(230) * 5
    raw = Prototypes(torch.eye(4)[:3].unsqueeze(1), torch.tensor([0.0, 3.0, -2.0]), temperature=0.1)
    calibrated = calibrate(raw, embeddings, labels, weight)
    assert float(calibrated.bias[0]) == 0
    for k in (1, 2):
        chosen = (labels == k) | (labels == 0)
        truth, mass = labels[chosen] == k, weight[chosen].double()

        def f1(called: Tensor, truth: Tensor = truth, mass: Tensor = mass) -> float:
            return float(2 * mass[called & truth].sum() / (mass[called].sum() + mass[truth].sum()))

        scores = raw.scores(embeddings[chosen])
        margin = scores[:, k] - scores[:, 0]
        reached = torch.tensor([f1(margin >= threshold) for threshold in margin])
        good = margin[reached >= 0.99 * reached.max()]
        threshold = float(raw.bias[k] - calibrated.bias[k])
        # Down to the next pixel's margin a lower threshold changes nothing, so the middle may lie below it by half.
        next_lower = margin[margin < good.min()]
        lowest = float(next_lower.max() if len(next_lower) else good.min() - 1)
        assert threshold == pytest.approx((float(good.max()) + lowest) / 2, abs=1e-4)
        decided = calibrated.scores(embeddings[chosen])
        assert f1(decided[:, k] > decided[:, 0]) >= 0.9 * float(reached.max())


def test_one_separable_pixel_is_kept() -> None:
    embeddings = torch.eye(2)[[0, 0, 1]]
    labels = torch.tensor([0, 0, 1])
    raw = Prototypes(torch.eye(2).unsqueeze(1), torch.tensor([0.0, -30.0]), temperature=0.1)
    calibrated = calibrate(raw, embeddings, labels, torch.ones(3))
    assert calibrated.probability(embeddings).argmax(dim=1).equal(labels)


@pytest.mark.parametrize("labels", [[1, 1, 1], [0, 0, 0], [-1, -1, -1]], ids=str)
def test_what_cannot_be_calibrated_keeps_its_bias(labels: list[int]) -> None:
    embeddings = F.normalize(torch.randn(3, 2), dim=1)
    prototypes = fit_prototypes(embeddings, torch.tensor(labels), num_classes=2, per_class=1, temperature=0.1)
    calibrated = calibrate(prototypes, embeddings, torch.tensor(labels), torch.ones(3))
    assert calibrated.bias.equal(prototypes.bias)


def test_masks_hold_present_classes_only() -> None:
    probability = torch.rand(8, 4, 6, 5).softmax(dim=1)
    present = torch.rand(8, 3) < 0.5
    present[0], present[1] = False, True
    masks = masks_from_probability(probability, present)
    assert masks.dtype == torch.uint8
    assert not masks[0].any()
    assert masks[1].long().equal(probability[1].argmax(dim=0))
    for b in range(8):
        allowed = [0, *(k + 1 for k in range(3) if present[b, k])]
        for row in range(6):
            for column in range(5):
                values = {k: float(probability[b, k, row, column]) for k in allowed}
                assert int(masks[b, row, column]) == max(values, key=values.__getitem__)
