"""The baselines: what their maps show, that maps never depend on the batch, and how thresholds are chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cldf_fast.baselines import (
    BASELINES,
    CGCDM,
    BaselineContext,
    CGDiff,
    choose_threshold,
    masks_from_maps,
    position_label_auc,
    run_baseline,
    score_maps,
)
from cldf_fast.baselines.context import location_prior
from cldf_fast.baselines.intensity import IntensityRule, head_masks, intensity_scores
from cldf_fast.baselines.threshold import best_threshold
from cldf_fast.config import Config
from cldf_fast.data.geometry import Geometry
from cldf_fast.data.packing import PackedSlices
from cldf_fast.diffusion import Diffusion
from cldf_fast.errors import ConfigError, DataError
from cldf_fast.models.classifier import NoiseAwareClassifier
from cldf_fast.pipeline import CLDF

# As in the fixture tiny_cldf.
SIZE, CHANNELS, CLASSES = 16, 2, 3


def packed(
    images: Tensor, masks: Tensor | None, studies: list[str], *, given: Tensor | None = None, classes: int = CLASSES
) -> PackedSlices:
    """Slices with masks at the working size; labels from the masks unless given."""
    count = len(images)
    if given is None and masks is not None:
        given = torch.stack([(masks == k + 1).flatten(1).any(dim=1) for k in range(classes)], dim=1)
    return PackedSlices(
        images=images,
        labels=given,
        masks=None if masks is None else list(masks),
        subjects=studies,
        studies=studies,
        names=[str(i) for i in range(count)],
        geometries=[Geometry()] * count,
        indices=[studies[:i].count(study) for i, study in enumerate(studies)],
        sizes=[(images.shape[2], images.shape[3])] * count,
        class_names=tuple("abcdef"[:classes]),
    )


def labels(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def random_slices(count: int) -> PackedSlices:
    """Heads of noise with a 3 x 3 square of each class somewhere, in studies of two slices."""
    images = -torch.ones(count, CHANNELS, SIZE, SIZE)
    images[:, :, 1:-1, 1:-1] = torch.rand(count, CHANNELS, SIZE - 2, SIZE - 2) - 0.3
    masks = torch.zeros(count, SIZE, SIZE, dtype=torch.uint8)
    masks[:, 12:14, 12:14] = 3
    for i in range(count):
        masks[i, 3 + i % 4 : 6 + i % 4, 3:6] = 1
        masks[i, 4:7, 9 + i % 3 : 12 + i % 3] = 2
    return packed(images, masks, [f"study {i // 2}" for i in range(count)])


@pytest.fixture
def context() -> BaselineContext:
    fitted = BaselineContext.fit(random_slices(6), random_slices(4))
    return replace(fitted, cg_diff=CGDiff(moves=3, scale=30.0), cg_cdm=CGCDM(moves=2))


# --- Every method -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
def test_maps_are_finite_and_absent_classes_are_zero(name: str, tiny_cldf: CLDF, context: BaselineContext) -> None:
    data = random_slices(4)
    present = labels([1, 1, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0])
    maps = score_maps(name, tiny_cldf, data.images, present, context, data.studies)
    assert maps.shape == (4, CLASSES, SIZE, SIZE) and maps.dtype == torch.float32
    assert maps.isfinite().all() and not maps.requires_grad
    assert not maps[~present].any()
    spread = maps[present].flatten(1).amax(dim=1) - maps[present].flatten(1).amin(dim=1)
    assert (spread > 0).all()


@pytest.mark.parametrize("name", BASELINES)
def test_maps_depend_neither_on_the_batch_nor_on_the_order(
    name: str, tiny_cldf: CLDF, context: BaselineContext
) -> None:
    data = random_slices(5)
    studies = [f"study {i}" for i in range(5)]
    present = labels([1, 1, 0], [0, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 1])
    together = score_maps(name, tiny_cldf, data.images, present, context, studies)
    alone = [
        score_maps(name, tiny_cldf, data.images[i : i + 1], present[i : i + 1], context, studies[i : i + 1])
        for i in range(5)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-4)
    backwards = score_maps(name, tiny_cldf, data.images.flip(0), present.flip(0), context, studies[::-1])
    torch.testing.assert_close(together, backwards.flip(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["gradcam", "layercam", "gradient", "cg_diff", "cg_cdm"])
def test_no_image_with_a_class_gives_zero_maps(name: str, tiny_cldf: CLDF, context: BaselineContext) -> None:
    data = random_slices(2)
    present = torch.zeros(2, CLASSES, dtype=torch.bool)
    assert not score_maps(name, tiny_cldf, data.images, present, context, data.studies).any()


@pytest.mark.parametrize("name", ["gradient", "layercam", "gradcam"])
def test_maps_see_the_views_that_evidence_sees(name: str, tiny_cldf: CLDF, context: BaselineContext) -> None:
    data = random_slices(3)
    present = torch.ones(3, CLASSES, dtype=torch.bool)
    one = score_maps(name, tiny_cldf, data.images, present, context)
    section = tiny_cldf.config.evidence.model_copy(update={"average_views": True})
    tiny_cldf.config = tiny_cldf.config.model_copy(update={"evidence": section})
    both = score_maps(name, tiny_cldf, data.images, present, context)
    assert not torch.allclose(both, one, atol=1e-3)
    evidence = tiny_cldf.evidence(data.images)
    torch.testing.assert_close(score_maps(name, tiny_cldf, data.images, present, context, evidence=evidence), both)


def test_more_images_than_a_batch_are_all_served(tiny_cldf: CLDF, context: BaselineContext) -> None:
    data = random_slices(18)
    present = torch.ones(18, CLASSES, dtype=torch.bool)
    maps = score_maps("layercam", tiny_cldf, data.images, present, context)
    torch.testing.assert_close(maps[16:], score_maps("layercam", tiny_cldf, data.images[16:], present[16:], context))


def test_cams_and_gradient_are_those_of_the_evidence(tiny_cldf: CLDF, context: BaselineContext) -> None:
    data = random_slices(2)
    present = torch.ones(2, CLASSES, dtype=torch.bool)
    evidence = tiny_cldf.evidence(data.images)
    assert tiny_cldf.config.evidence.cam == "layercam"
    torch.testing.assert_close(score_maps("layercam", tiny_cldf, data.images, present, context), evidence.cam)
    torch.testing.assert_close(score_maps("gradient", tiny_cldf, data.images, present, context), evidence.gradient_map)


@pytest.mark.parametrize("cam", ["layercam", "gradcam"])
@pytest.mark.parametrize("name", ["layercam", "gradient", "gradcam"])
def test_evidence_that_is_at_hand_changes_nothing(
    name: str, cam: str, tiny_cldf: CLDF, context: BaselineContext
) -> None:
    data = random_slices(5)
    present = labels([1, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 1], [0, 0, 1])
    own = tiny_cldf.config.evidence.model_copy(update={"cam": cam})
    cldf = CLDF(tiny_cldf.config.model_copy(update={"evidence": own}), tiny_cldf.unet, tiny_cldf.classifier)
    evidence = cldf.evidence(data.images, present.any(dim=1))
    torch.testing.assert_close(
        score_maps(name, cldf, data.images, present, context, data.studies, evidence),
        score_maps(name, cldf, data.images, present, context, data.studies),
        rtol=1e-4,
        atol=1e-5,
    )


def test_gradcam_weighs_the_last_maps_by_the_classifiers_own_weights(
    tiny_cldf: CLDF, context: BaselineContext, randomised: Callable[[nn.Module], nn.Module]
) -> None:
    data = random_slices(1)
    present = torch.ones(1, CLASSES, dtype=torch.bool)
    config = tiny_cldf.config.model_copy(
        update={"evidence": tiny_cldf.config.evidence.model_copy(update={"noise_levels": (0.0,)})}
    )
    network = config.classifier.network.model_dump() | {"pool": "adaptive"}
    classifier = NoiseAwareClassifier(CHANNELS, num_classes=CLASSES, **network)
    cldf = CLDF(config, tiny_cldf.unet, randomised(classifier))
    maps: list[Tensor] = []
    with torch.no_grad():
        hook = classifier.out[1].register_forward_hook(lambda module, inputs, output: maps.append(output))
        classifier(data.images, torch.zeros(1))
        hook.remove()
    # Behind the pooling there is one linear layer, so that GradCAM is the classic class activation map.
    expected = torch.einsum("kc,chw->khw", classifier.out[3].weight[:, :, 0, 0], maps[0][0]).relu()
    expected = F.interpolate(expected.unsqueeze(0), (SIZE, SIZE), mode="bilinear", align_corners=False)
    expected = expected / expected.amax(dim=(2, 3), keepdim=True)
    found = score_maps("gradcam", cldf, data.images, present, context)
    # The lowest noise level is not quite free of noise.
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_run_baseline_marks_what_exceeds_the_threshold(tiny_cldf: CLDF, context: BaselineContext) -> None:
    data = random_slices(4)
    present = labels([1, 1, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0])
    threshold = torch.tensor([0.4, 0.7, 0.6])
    maps = score_maps("gradient", tiny_cldf, data.images, present, context)
    masks = run_baseline("gradient", tiny_cldf, data, present, context, threshold)
    assert masks.shape == (4, SIZE, SIZE) and masks.dtype == torch.uint8
    margins = torch.where(present[:, :, None, None], maps - threshold.view(1, -1, 1, 1), -1.0)
    assert torch.equal(masks > 0, (margins > 0).any(dim=1))
    assert torch.equal(masks[3] > 0, maps[3, 0] > 0.4)
    assert not masks[1].any()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"name": "cam"}, "name: expected one of gradcam, .*got 'cam'"),
        ({"present": torch.ones(2, 2, dtype=torch.bool)}, r"present: expected .*bool \[N, 3\].*got .*\[2, 2\]"),
        ({"present": torch.ones(2, CLASSES)}, "float32"),
        ({"images": torch.zeros(CHANNELS, SIZE, SIZE)}, r"images, present: expected \[N, C, h, w\]"),
        ({"name": "location_prior", "images": torch.zeros(2, CHANNELS, 8, 8)}, "expected .16, 16. pixels"),
        ({"name": "intensity", "studies": None}, "studies: expected the study of each image"),
        ({"name": "intensity", "studies": ["a"]}, "studies: expected one for each of the 2 images, got 1"),
    ],
)
def test_bad_arguments(change: dict[str, Any], match: str, tiny_cldf: CLDF, context: BaselineContext) -> None:
    arguments = {
        "name": "gradient",
        "images": torch.zeros(2, CHANNELS, SIZE, SIZE),
        "present": torch.ones(2, CLASSES, dtype=torch.bool),
        "studies": ["a", "b"],
    }
    with pytest.raises((ConfigError, DataError), match=match):
        score_maps(cldf=tiny_cldf, context=context, **(arguments | change))


def test_context_needs_masks() -> None:
    data = random_slices(2)
    for train, val in ((replace(data, masks=None), data), (data, replace(data, masks=None))):
        with pytest.raises(DataError, match="masks: expected masks"):
            BaselineContext.fit(train, val)


# --- Counterfactuals --------------------------------------------------------------------------------------------------

# Class k lives in region k; the stand-ins for the networks know that and nothing else.
REGIONS = torch.zeros(2, 1, 32, 32)
REGIONS[0, :, 4:10, 4:10] = 1
REGIONS[1, :, 20:28, 18:26] = 1
FAR = F.max_pool2d(REGIONS[:, 0], 9, 1, 4) == 0  # beyond the reach of the smoothing


def stand_ins(classifier: Any, unet: Any) -> Any:
    return SimpleNamespace(
        config=Config(),
        diffusion=Diffusion(),
        classifier=classifier,
        classifier_time=lambda step: torch.tensor([float(step)]),
        unet=unet,
        num_classes=2,
    )


def conditioned_noise(x: Tensor, times: Tensor, condition: Tensor) -> Tensor:
    return torch.einsum("bk,kchw->bchw", condition[:, 2:], REGIONS).expand_as(x)


def test_cg_diff_takes_the_class_away_and_nothing_else() -> None:
    said: list[Tensor] = []

    def classifier(x: Tensor, times: Tensor) -> Tensor:
        logits = 4 * torch.einsum("bchw,kchw->bk", x, REGIONS) / REGIONS.flatten(1).sum(dim=1)
        said.append(logits.detach())
        return logits

    cldf = stand_ins(classifier, lambda x, times, condition: torch.zeros_like(x))
    images = torch.rand(2, 3, 32, 32) * 0.2
    present = labels([1, 1], [0, 1])
    maps = CGDiff(moves=4, scale=20.0, sigma=1.0)(cldf, images, present)
    # Three reconstructions: class 0 of image 0, class 1 of both; each loses its own class's evidence.
    target = torch.tensor([0, 1, 1])
    first, last = (logits[torch.arange(3), target] for logits in (said[0], said[-1]))
    assert (last < first).all()
    for k in range(2):
        shown = maps[present[:, k], k]
        assert shown[:, REGIONS[k, 0] == 1].amin() > 0.3
        assert shown[:, FAR[k]].amax() < 1e-3
    assert not maps[1, 0].any()


def test_cg_diff_stays_within_the_noise_that_the_classifier_knows() -> None:
    times: list[float] = []

    def unet(x: Tensor, at: Tensor, condition: Tensor) -> Tensor:
        times.append(float(at[0]))
        assert condition.tolist() == [[1, 0, 0, 0]]  # the null condition
        return torch.zeros_like(x)

    cldf = stand_ins(lambda x, at: x.mean(dim=(1, 2, 3)).unsqueeze(1).expand(-1, 2), unet)
    highest = round(cldf.config.classifier.max_noise * cldf.diffusion.timesteps)
    for level, top in ((1.0, highest), (0.1, 100)):
        times.clear()
        CGDiff(level=level, moves=3)(cldf, torch.rand(1, 1, 32, 32), labels([1, 0]))
        # Up from the clean image, which the network is told is step 0, and down from the top.
        assert times[:3] == sorted(times[:3]) and times[0] == 0
        assert times[3] == max(times) == top and times[3:] == sorted(times[3:], reverse=True)
        assert len(times) == 6


def test_cg_diff_of_a_class_ignores_the_other_labels(tiny_cldf: CLDF) -> None:
    images = random_slices(2).images
    method = CGDiff(moves=3, scale=30.0)
    both = method(tiny_cldf, images, labels([1, 1, 0], [1, 1, 1]))
    one = method(tiny_cldf, images, labels([1, 0, 0], [1, 0, 0]))
    torch.testing.assert_close(both[:, 0], one[:, 0], rtol=1e-3, atol=1e-4)
    unguided = replace(method, scale=0.0)(tiny_cldf, images, labels([1, 0, 0], [1, 0, 0]))
    assert not torch.allclose(one, unguided, atol=1e-3)


def test_cg_cdm_shows_what_a_class_changes_in_the_noise() -> None:
    cldf = stand_ins(None, conditioned_noise)
    present = labels([1, 1], [0, 1], [1, 0])
    maps = CGCDM(moves=3, sigma=1.0)(cldf, torch.rand(3, 2, 32, 32) - 0.5, present)
    # With both labels present, leaving one out makes the other weigh more: both regions change, the class's own too.
    for i, k in ((2, 0), (1, 1)):
        assert maps[i, k, REGIONS[k, 0] == 1].amin() > 0.3
        assert maps[i, k, FAR[k]].amax() < 1e-3
    for k in range(2):
        assert maps[0, k, REGIONS[k, 0] == 1].amin() > 0.3
    assert not maps[~present].any()


def test_cg_cdm_sums_the_derivatives_of_its_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(
        "cldf_fast.baselines.counterfactual.difference_maps",
        lambda difference, present, sigma: seen.append(difference),
    )
    images, present = torch.rand(1, 1, 32, 32), labels([1, 0])
    cldf = stand_ins(None, conditioned_noise)
    for method in (CGCDM(level=0.1, moves=3, tau=0.95), CGCDM(level=0.1, moves=3, tau=0.5)):
        method(cldf, images, present)
    # Noise that is linear in the condition has one derivative: minus the region's share of each move.
    ab = cldf.diffusion.alpha_bar
    share = sum((1 - ab[t - 1]).sqrt() - (ab[t - 1] / ab[t]).sqrt() * (1 - ab[t]).sqrt() for t in (100, 99, 98))
    for derivative in seen:
        torch.testing.assert_close(derivative, share * REGIONS[:1], rtol=1e-3, atol=1e-4)


def test_cg_cdm_ends_at_the_clean_image() -> None:
    times: list[float] = []

    def unet(x: Tensor, at: Tensor, condition: Tensor) -> Tensor:
        times.append(float(at[0]))
        return conditioned_noise(x, at, condition)

    cldf = stand_ins(None, unet)
    maps = CGCDM(level=0.004, moves=5, stride=3)(cldf, torch.rand(1, 1, 32, 32), labels([1, 0]))
    assert times == [4.0, 4.0, 1.0, 1.0]
    assert maps.isfinite().all() and maps[0, 0].amax() > 0


# --- Thresholds -------------------------------------------------------------------------------------------------------


def mean_dice(maps: Tensor, truth: Tensor, threshold: float) -> float:
    marked = maps > threshold
    hit = (marked & truth).flatten(1).sum(dim=1)
    return float((2 * hit / (marked.flatten(1).sum(dim=1) + truth.flatten(1).sum(dim=1))).mean())


@pytest.mark.parametrize("size", [(9, 13), (16, 16), (1, 7)])
def test_threshold_is_as_good_as_trying_every_score(size: tuple[int, int]) -> None:
    truth = torch.rand(5, *size) < 0.2
    truth[:, 0, 0] = True
    maps = torch.randn(5, *size) + truth
    threshold, dice = best_threshold(maps, truth)
    exhaustive = max(mean_dice(maps, truth, float(value)) for value in maps.flatten().unique())
    assert float(dice) == pytest.approx(mean_dice(maps, truth, float(threshold)), abs=1e-6)
    assert exhaustive - 0.03 < float(dice) <= exhaustive + 1e-6


def test_threshold_finds_small_structures_and_saturated_maps() -> None:
    truth = torch.zeros(2, 64, 64, dtype=torch.bool)
    truth[:, 10:12, 10:12] = True
    for maps in (truth.float(), truth.float() * 1e-6 - 5, torch.where(truth, 1.0, torch.rand(2, 64, 64) * 0.999)):
        threshold, dice = best_threshold(maps, truth)
        assert float(dice) == 1.0
        assert torch.equal(maps > threshold, truth)


def test_threshold_of_a_constant_map_is_its_value() -> None:
    truth = torch.zeros(1, 4, 4, dtype=torch.bool)
    truth[0, 0, 0] = True
    threshold, dice = best_threshold(torch.full((1, 4, 4), 0.3), truth)
    assert float(threshold) == pytest.approx(0.3) and float(dice) == 0.0


def test_thresholds_are_chosen_per_class_on_slices_that_show_it() -> None:
    masks = torch.zeros(3, 8, 8, dtype=torch.uint8)
    masks[0, :2, :2], masks[1, 5:, 5:], masks[2, :4] = 1, 2, 1
    present = labels([1, 1], [0, 1], [0, 1])
    maps = torch.rand(3, 2, 8, 8) * 0.5
    maps[0, 0][masks[0] == 1] += 2.0
    maps[1, 1][masks[1] == 2] += 7.0
    maps[2, 0] = -100.0  # class 0 is there but ruled out by its label, so this map does not count
    threshold = choose_threshold(maps, masks, present)
    assert threshold.dtype == torch.float32 and 0.5 < threshold[0] < 2.5 and 0.5 < threshold[1] < 7.5
    assert torch.equal(masks_from_maps(maps, threshold, present)[:2], masks[:2])


def test_threshold_needs_every_class() -> None:
    masks = torch.zeros(2, 4, 4, dtype=torch.uint8)
    masks[0, 0] = 1
    with pytest.raises(DataError, match="at least one slice that shows class 2, found none among 2"):
        choose_threshold(torch.rand(2, 2, 4, 4), masks, torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(DataError, match=r"expected \[N, K, h, w\], \[N, h, w\] and \[N, K\], got"):
        choose_threshold(torch.rand(2, 2, 5, 4), masks, torch.ones(2, 2, dtype=torch.bool))


def test_the_class_that_exceeds_its_threshold_by_most_wins() -> None:
    maps = torch.tensor([[0.9, 0.9, 0.1], [0.95, 0.5, 0.1]]).view(1, 2, 1, 3)
    threshold = torch.tensor([0.5, 0.45])
    assert masks_from_maps(maps, threshold, labels([1, 1])).flatten().tolist() == [2, 1, 0]
    assert masks_from_maps(maps, threshold, labels([1, 0])).flatten().tolist() == [1, 1, 0]


# --- Floors -----------------------------------------------------------------------------------------------------------


def heads(count: int, size: int = 48) -> tuple[Tensor, Tensor]:
    """Noisy discs with a bright rim on air, and the discs: float32 [N, 1, size, size], bool [size, size]."""
    axis = torch.arange(size) - (size - 1) / 2
    radius = (axis[:, None] ** 2 + axis[None, :] ** 2).sqrt()
    disc = radius < 0.4 * size
    images = torch.where(disc, -0.2 + 0.02 * torch.randn(count, 1, size, size), -1.0)
    images[:, :, disc & (radius > 0.37 * size)] = 0.9
    return images, disc


def test_intensity_finds_the_channel_and_the_sign() -> None:
    noise, disc = heads(4)
    masks = torch.zeros(4, 48, 48, dtype=torch.uint8)
    masks[:, 15:20, 15:20], masks[:, 30:34, 20:28] = 1, 2
    images = noise.repeat(1, 3, 1, 1)
    images[:, 2] -= 0.3 * (masks == 1)
    images[:, 0] += 0.3 * (masks == 2)
    data = packed(images, masks, ["a", "a", "b", "b"], classes=2)
    rule = IntensityRule.fit(data)
    assert rule.channel.tolist() == [2, 0] and rule.sign.tolist() == [-1.0, 1.0]
    maps = rule(images, data.studies)
    assert maps[:, :, ~disc].eq(-10).all()
    assert torch.equal(masks_from_maps(maps, choose_threshold(maps, masks, data.labels), data.labels), masks)


def test_intensity_is_scored_per_study() -> None:
    images, _ = heads(4)
    images[:2] = (images[:2] + 1) * 0.8 - 1 + 0.1 * (images[:2] > -1)
    studies = ["a", "a", "b", "b"]
    alone = torch.cat([intensity_scores(part, ["x", "x"]) for part in images.split(2)])
    torch.testing.assert_close(intensity_scores(images, studies), alone, equal_nan=True)
    # Slices of one study share a scale: a brighter slice stays brighter.
    pair = torch.cat([images[2:3], images[2:3] + 0.1 * (images[2:3] > -1)])
    scores = intensity_scores(pair, ["c", "c"])
    inside = ~scores[0, 0].isnan()
    assert (scores[1, 0] > scores[0, 0])[inside].all()


def test_head_is_one_filled_component_without_its_rim() -> None:
    images, disc = heads(3)
    images[0, :, 20:28, 20:28] = -1.0  # fluid as dark as air
    images[0, :, :3, :3] = 0.5  # something beside the head
    images[1] = -1.0  # a slice of air
    images[2] = 0.2  # a slice without air
    head, core = head_masks(images)
    assert torch.equal(head[0], disc)
    assert not head[1].any() and not core[1].any()
    assert head[2].all() and core[2].all()
    assert core[0, 20:28, 20:28].all() and core[0].sum() < disc.sum()
    assert (images[0, 0][core[0]] < 0.5).all()  # the bright rim is gone


def test_intensity_of_a_class_that_nobody_shows_is_still_defined() -> None:
    images, _ = heads(2)
    data = packed(images, torch.zeros(2, 48, 48, dtype=torch.uint8), ["a", "b"], classes=2)
    assert IntensityRule.fit(data).channel.tolist() == [0, 0]


def test_location_prior_is_the_share_of_labelled_slices() -> None:
    masks = torch.zeros(4, 4, 4, dtype=torch.uint8)
    masks[0, 0, 0], masks[1, 0, :2], masks[2, 3] = 1, 1, 2
    prior = location_prior(packed(torch.zeros(4, 1, 4, 4), masks, list("abcd"), classes=3))
    expected = torch.zeros(3, 4, 4)
    expected[0, 0, 0], expected[0, 0, 1], expected[1, 3] = 1.0, 0.5, 1.0
    assert torch.equal(prior, expected)


def stack(given: Tensor, studies: list[str]) -> PackedSlices:
    return packed(torch.zeros(len(studies), 1, 4, 4), None, studies, given=given, classes=given.shape[1])


def test_position_predicts_labels_that_follow_the_height() -> None:
    studies = ["a"] * 40 + ["b"] * 20
    height = torch.cat([torch.arange(40) / 39, torch.arange(20) / 19])
    middle = ((height > 0.3) & (height < 0.7)).unsqueeze(1)
    train = stack(middle, studies)
    assert position_label_auc(train, train) == pytest.approx(1.0, abs=0.05)
    against = stack(~middle, studies)
    assert position_label_auc(train, against) == pytest.approx(0.0, abs=0.05)
    # A second class, the same everywhere, leaves the mean as it is.
    both = stack(torch.cat([middle, torch.ones_like(middle)], dim=1), studies)
    assert position_label_auc(both, both) == position_label_auc(train, train)


def test_position_goes_by_the_index_and_not_by_the_order() -> None:
    given = torch.rand(30, 1) < torch.linspace(0, 1, 30).unsqueeze(1)
    given[0], given[-1] = False, True
    train = stack(given, ["a"] * 30)
    order = torch.randperm(30)
    shuffled = replace(train, labels=given[order], indices=order.tolist())
    assert position_label_auc(train, shuffled) == position_label_auc(train, train)


def test_position_without_both_labels_has_no_auc() -> None:
    train = stack(labels([1], [0]), ["a", "a"])
    assert position_label_auc(train, stack(labels([1], [1]), ["a", "b"])) is None
