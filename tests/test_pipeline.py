"""The method end to end on random networks: three classes, several labels an image, whatever the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cldf_fast.config import make_config
from cldf_fast.errors import CheckpointError, DataError
from cldf_fast.evidence import pixel_labels
from cldf_fast.ops import sample_anchors
from cldf_fast.pipeline import CLDF


def images(count: int) -> Tensor:
    return torch.rand(count, 2, 16, 16) * 2 - 1


def test_masks_do_not_depend_on_the_batch_or_the_order(tiny_cldf: CLDF) -> None:
    x = images(19)  # more than one internal batch
    tiny_cldf.label_threshold = tiny_cldf.label_probability(x).mean(dim=0)
    together = tiny_cldf.segment(x)
    order = torch.randperm(19)
    shuffled = tiny_cldf.segment(x[order])
    assert shuffled.mask.equal(together.mask[order])
    assert shuffled.present.equal(together.present[order])
    torch.testing.assert_close(shuffled.probability, together.probability[order], rtol=0, atol=1e-4)
    for i in (0, 7, 18):
        alone = tiny_cldf.segment(x[i : i + 1])
        assert alone.mask[0].equal(together.mask[i])
        assert alone.label_probability is not None
        assert together.label_probability is not None
        torch.testing.assert_close(alone.label_probability[0], together.label_probability[i], rtol=0, atol=1e-5)
    assert len(together.mask.unique()) > 2


def test_results_have_their_announced_form(tiny_cldf: CLDF) -> None:
    result = tiny_cldf.segment(images(3))
    assert result.mask.shape == (3, 16, 16)
    assert result.mask.dtype == torch.uint8
    assert result.probability.shape == (3, 4, 16, 16)
    torch.testing.assert_close(result.probability.sum(dim=1), torch.ones(3, 16, 16))
    assert result.label_probability is not None
    assert result.label_probability.shape == result.present.shape == (3, 3)
    assert not result.probability.requires_grad


def test_given_labels_are_respected_and_absent_classes_never_drawn(
    tiny_cldf: CLDF, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_cldf.classifier, "forward", None)  # which it has no need of
    x = images(8)
    labels = torch.tensor([[k >> bit & 1 for bit in range(3)] for k in range(8)]).bool()
    result = tiny_cldf.segment(x, labels)
    assert result.present.equal(labels)
    assert result.label_probability is None
    for i in range(8):
        drawn = set(result.mask[i].unique().tolist()) - {0}
        assert drawn <= {k + 1 for k in range(3) if labels[i, k]}
    assert not result.mask[0].any()


def test_images_without_a_class_can_be_left_out(tiny_cldf: CLDF) -> None:
    x = images(40)
    labels = torch.rand(40, 3) < 0.2
    labels[7] = False
    labels[20:37] = False  # more than a batch
    shown = labels.any(dim=1)
    every, some = tiny_cldf.segment(x, labels), tiny_cldf.segment(x, labels, everywhere=False)
    assert some.mask.equal(every.mask)
    torch.testing.assert_close(some.probability[shown], every.probability[shown], rtol=0, atol=1e-4)
    assert (some.probability[~shown, 0] == 1).all()
    assert not some.probability[~shown, 1:].any()
    assert (every.probability[~shown, 0] < 1).any()
    assert not tiny_cldf.segment(x, torch.zeros_like(labels), everywhere=False).mask.any()


def test_predicted_labels_follow_each_class_s_threshold(tiny_cldf: CLDF) -> None:
    x = images(6)
    probability = tiny_cldf.label_probability(x)
    tiny_cldf.label_threshold = probability.median(dim=0).values
    result = tiny_cldf.segment(x)
    assert result.present.equal(probability >= tiny_cldf.label_threshold)
    assert result.present.any()
    assert not result.present.all()
    assert result.label_probability is not None
    torch.testing.assert_close(result.label_probability, probability, rtol=0, atol=1e-6)


def test_evidence_becomes_pixel_labels_of_the_present_classes(tiny_cldf: CLDF) -> None:
    x = images(18)
    evidence = tiny_cldf.evidence(x)
    assert evidence.gradient_map.shape == evidence.cam.shape == (18, 3, 16, 16)
    torch.testing.assert_close(evidence.probability, tiny_cldf.label_probability(x), rtol=0, atol=1e-5)
    present = torch.rand(18, 3) < 0.5
    present[0] = False
    labels = pixel_labels(evidence, present, tiny_cldf.thresholds()).labels
    assert not labels[0].any()
    for i in range(18):
        assert set(labels[i].unique().tolist()) <= {-1, 0, *(k + 1 for k in range(3) if present[i, k])}
    assert (labels > 0).any()


def test_evidence_of_chosen_images_only(tiny_cldf: CLDF) -> None:
    x, chosen = images(19), torch.arange(19) % 3 == 1
    every, some = tiny_cldf.evidence(x), tiny_cldf.evidence(x, chosen)
    for field in ("gradient_map", "cam", "probability"):
        expected, found = getattr(every, field), getattr(some, field)
        torch.testing.assert_close(found[chosen], expected[chosen], rtol=1e-4, atol=1e-5)
        assert not found[~chosen].any()
    assert not tiny_cldf.evidence(x, torch.zeros(19, dtype=torch.bool)).gradient_map.any()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "images: expected finite pixels, got NaN or infinity in image 17"),
        (-float("inf"), "images: expected finite pixels, got NaN or infinity in image 17"),
        (255.0, r"images: expected pixels in \[-1, 1\], got -0.99.* to 255 in image 17; scale them"),
        (-1.01, r"images: expected pixels in \[-1, 1\], got -1.01 to 0.99.* in image 17; scale them"),
    ],
)
def test_an_image_with_other_pixels_is_named(tiny_cldf: CLDF, value: float, message: str) -> None:
    x = images(19)
    x[:, 0, 0, :2] = torch.tensor([-0.9999, 0.9999])
    x[17, 1, 3, 4] = value
    none = torch.zeros(19, 3, dtype=torch.bool)
    for method in (
        tiny_cldf.evidence,
        tiny_cldf.label_probability,
        tiny_cldf.segment,
        lambda x: tiny_cldf.segment(x, none, everywhere=False),
    ):
        with pytest.raises(DataError, match=message):
            method(x)


def test_images_of_another_size_or_dtype_are_named(tiny_cldf: CLDF) -> None:
    for x, found in ((torch.zeros(2, 2, 32, 32), r"float32 \[2, 2, 32, 32\]"), (images(2).double(), "float64")):
        for method in (tiny_cldf.evidence, tiny_cldf.label_probability, tiny_cldf.segment):
            with pytest.raises(DataError, match=rf"images: expected float32 \[N, 2, 16, 16\], got {found}"):
                method(x)


def test_pixels_at_the_ends_of_the_range_are_taken(tiny_cldf: CLDF) -> None:
    x = images(2).sign() * 1.0001  # resized by others
    assert tiny_cldf.segment(x).probability.isfinite().all()


def test_a_gradient_that_is_not_finite_is_named(tiny_cldf: CLDF) -> None:
    """The classifier may be sure of an image, and its gradient overflow: the number is that of the whole stack."""
    values = tiny_cldf.config.model_dump()
    values["segmentation"]["evidence_weight"] = 0.5
    networks = (tiny_cldf.unet, tiny_cldf.classifier, tiny_cldf.decoder, tiny_cldf.prototypes)
    cldf = CLDF(make_config(values), *networks)
    x, labels = images(19), torch.ones(19, 3, dtype=torch.bool)
    x[18] = 1  # the mark of the image whose gradient is spoilt
    inputs: list[Tensor] = []

    def spoil(_module: Any, _args: Any, logits: Tensor) -> None:
        if logits.requires_grad:
            marked = inputs[-1].flatten(1).mean(dim=1, keepdim=True) > 0.5
            logits.register_hook(lambda gradient: torch.where(marked, torch.inf, gradient))

    cldf.classifier.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].detach()))
    cldf.classifier.register_forward_hook(spoil)
    assert cldf.label_probability(x).isfinite().all()
    for method in (cldf.evidence, lambda images: cldf.segment(images, labels)):
        with pytest.raises(DataError, match=r"finite evidence, got NaN or infinity for image 18;"):
            method(x)


@pytest.mark.parametrize("condition", ["label", "null"])
def test_the_condition_is_the_label_or_nothing(tiny_cldf: CLDF, condition: str) -> None:
    values = tiny_cldf.config.model_dump()
    values["features"]["condition"] = condition
    cldf = CLDF(make_config(values), tiny_cldf.unet, tiny_cldf.classifier, tiny_cldf.decoder, tiny_cldf.prototypes)
    x = images(2)
    none, every = torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
    same = cldf.segment(x, none).probability.allclose(cldf.segment(x, every).probability, atol=1e-4)
    assert same == (condition == "null")


def test_the_decision_waits_for_a_decoder(tiny_cldf: CLDF) -> None:
    cldf = CLDF(tiny_cldf.config, tiny_cldf.unet, tiny_cldf.classifier)
    assert cldf.label_threshold.tolist() == [0.5] * 3
    with pytest.raises(CheckpointError, match="segment: expected a trained decoder"):
        cldf.segment(images(1))


@pytest.mark.parametrize(
    "labels", [torch.ones(3, 2).bool(), torch.ones(2, 3).bool(), torch.ones(3, 3), torch.ones(3).bool()]
)
def test_labels_of_another_form_are_refused(tiny_cldf: CLDF, labels: Any) -> None:
    with pytest.raises(DataError, match=r"labels: expected bool \[3, 3\], got"):
        tiny_cldf.segment(images(3), labels)


@pytest.mark.parametrize("mirror", [True, False])
def test_results_are_means_over_two_views_of_an_image(tiny_cldf: CLDF, mirror: bool) -> None:
    def averaging(average_views: bool) -> CLDF:
        values = tiny_cldf.config.model_dump()
        values["data"]["mirror"] = mirror
        values["evidence"]["average_views"] = values["segmentation"]["average_views"] = average_views
        networks = (tiny_cldf.unet, tiny_cldf.classifier, tiny_cldf.decoder, tiny_cldf.prototypes)
        return CLDF(make_config(values), *networks)

    def moved_back(maps: Tensor) -> Tensor:
        maps = maps.roll((-1, -1), dims=(-2, -1))
        return maps.flip(-1) if mirror else maps

    one, two = averaging(False), averaging(True)
    x, labels = images(2), torch.ones(2, 3, dtype=torch.bool)
    moved = (x.flip(-1) if mirror else x).roll((1, 1), dims=(-2, -1))
    both = [one.segment(x, labels).probability, moved_back(one.segment(moved, labels).probability)]
    assert not torch.allclose(*both, atol=1e-3)
    torch.testing.assert_close(two.segment(x, labels).probability, sum(both) / 2, rtol=0, atol=1e-5)
    seen, other, mean = one.evidence(x), one.evidence(moved), two.evidence(x)
    for field in ("gradient_map", "cam"):
        both = [getattr(seen, field), moved_back(getattr(other, field))]
        assert not torch.allclose(*both, atol=1e-3)
        torch.testing.assert_close(getattr(mean, field), sum(both) / 2, rtol=0, atol=1e-5)
    torch.testing.assert_close(mean.probability, (seen.probability + other.probability) / 2)
    torch.testing.assert_close(two.label_probability(x), mean.probability, rtol=0, atol=1e-6)


def test_evidence_of_the_image_itself_shifts_the_decision(tiny_cldf: CLDF) -> None:
    def weighing(weight: float) -> CLDF:
        values = tiny_cldf.config.model_dump()
        values["segmentation"]["evidence_weight"] = weight
        values["evidence"]["foreground_gradient"] = 0.4
        return CLDF(make_config(values), *networks)

    networks = (tiny_cldf.unet, tiny_cldf.classifier, tiny_cldf.decoder, tiny_cldf.prototypes)
    x, labels = images(19), torch.rand(19, 3) < 0.6
    labels[0] = False
    labels[1] = True
    plain, weighed = weighing(0.0).segment(x, labels), weighing(0.7).segment(x, labels)
    evidence = tiny_cldf.evidence(x)
    odds = plain.probability[:, 1:] / plain.probability[:, :1]
    shown = labels.any(dim=1)
    gradient_map = evidence.gradient_map.clamp(0.01, 0.99)
    expected = odds * (gradient_map / (1 - gradient_map) / (0.4 / 0.6)) ** 0.7
    found = weighed.probability[:, 1:] / weighed.probability[:, :1]
    torch.testing.assert_close(found[shown], expected[shown], rtol=1e-3, atol=1e-5)
    assert not weighed.mask[~shown].any()
    torch.testing.assert_close(weighed.probability[~shown], plain.probability[~shown])
    assert not weighed.mask.equal(plain.mask)
    torch.testing.assert_close(
        weighing(0.7).segment(x, labels, evidence).probability[shown], weighed.probability[shown]
    )


def test_every_backend_gives_the_same_masks(tiny_cldf: CLDF, monkeypatch: pytest.MonkeyPatch) -> None:
    x, present = images(12), torch.rand(12, 3) < 0.6
    tiny_cldf.config = make_config({**tiny_cldf.config.model_dump(), "segmentation": {"evidence_weight": 0.5}})
    results = []
    for impl in ("reference", "auto"):
        monkeypatch.setenv("CLDF_FAST_IMPL", impl)
        evidence = tiny_cldf.evidence(x)
        labels = pixel_labels(evidence, present, (0.5, 0.1, 0.4, 0.5)).labels
        anchors, _ = sample_anchors(labels, num_classes=4, per_class=6, seed=1)
        results.append((evidence, labels, anchors, tiny_cldf.segment(x, present, evidence)))
    (evidence, labels, anchors, segmentation), (other, *rest, other_segmentation) = results
    torch.testing.assert_close(other.gradient_map, evidence.gradient_map, rtol=0, atol=1e-4)
    assert labels.unique().tolist() == [-1, 0, 1, 2, 3]
    assert torch.equal(rest[0], labels)
    assert torch.equal(rest[1], anchors)
    assert torch.equal(other_segmentation.mask, segmentation.mask)
