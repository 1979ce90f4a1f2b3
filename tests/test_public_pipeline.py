"""The reference pipeline of the benchmarks computes what the project computes, and trains what it would train."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor

from benchmarks import public_pipeline
from benchmarks.bench_pipeline import RIVALS, SMALL, Stopwatch, case
from cldf_fast.config import Config, make_config
from cldf_fast.data.packing import PackedSlices
from cldf_fast.losses import PixelInfoNCE
from cldf_fast.models.decoder import read_at
from cldf_fast.pipeline import CLDF
from cldf_fast.run import DatasetRecord, Run
from cldf_fast.training.fit import Trainer

Slices = Callable[..., PackedSlices]


def with_changes(cldf: CLDF, **sections: dict[str, Any]) -> CLDF:
    values = cldf.config.model_dump()
    for name, section in sections.items():
        values[name] |= section
    return CLDF(make_config(values), cldf.unet, cldf.classifier)


def trainer_of(config: Config, data: PackedSlices, folder: Path) -> Trainer:
    record = DatasetRecord(data.class_names, ("t1", "t2"))
    return Trainer(config, Run(folder), Fabric(accelerator="cpu", devices=1), data, data, record, quiet=True)


def labels_at_random(data: PackedSlices) -> Tensor:
    """Pixel labels int8 of classes that the image has, with enough pixels for anchors, and some ignored."""
    labels = torch.randint(-1, 4, (len(data), 16, 16))
    shown = F.pad(data.require_labels(), (1, 0), value=True).gather(1, labels.clamp_min(0).flatten(1))
    return torch.where(shown.view_as(labels), labels, -1).to(torch.int8)


@pytest.mark.parametrize(("target", "sigma"), [("log_probability", 1.5), ("logit", 0.7)])
def test_evidence_is_the_project_s(tiny_cldf: CLDF, target: str, sigma: float) -> None:
    cldf = with_changes(tiny_cldf, evidence={"target": target, "sigma": sigma, "percentile": 0.9})
    x = torch.rand(5, 2, 16, 16) * 2 - 1
    gradient_map, class_map = public_pipeline.evidence_of(cldf)(x)
    expected = cldf.evidence(x)
    torch.testing.assert_close(gradient_map, expected.gradient_map, rtol=0, atol=1e-4)
    torch.testing.assert_close(class_map, expected.cam, rtol=0, atol=1e-4)
    assert gradient_map.std() > 0.1
    # The frozen networks that the rivals share are as they were.
    assert not any(parameter.requires_grad for parameter in cldf.classifier.parameters())


def test_pixel_labels_are_the_project_s(tiny_cldf: CLDF, tiny_slices: Slices, tmp_path: Path) -> None:
    data = tiny_slices(37)
    labels = public_pipeline.pixel_labels(tiny_cldf, data)
    expected = trainer_of(tiny_cldf.config, data, tmp_path).pixel_labels(tiny_cldf, data)
    assert labels.dtype == expected.dtype == torch.int8
    assert (labels != expected).float().mean() < 1e-3
    assert set(labels.unique().tolist()) == {-1, 0, 1, 2, 3}


@pytest.mark.parametrize("prediction", [True, False])
def test_features_are_the_project_s(tiny_cldf: CLDF, prediction: bool) -> None:
    cldf = with_changes(tiny_cldf, features={"prediction": prediction})
    x, condition = torch.rand(3, 2, 16, 16) * 2 - 1, cldf.conditions(torch.rand(3, 3) < 0.5)
    found = public_pipeline.full_size_features(cldf)(x, condition)
    every_pixel = torch.arange(256).expand(3, -1)
    expected = read_at(cldf.features(x, condition), every_pixel, (16, 16))
    assert found.shape == expected.shape == (3, 256, sum(cldf.features.channels))
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert expected.std(dim=(0, 1)).min() > 0


def test_the_loss_is_the_project_s() -> None:
    """Anchors of loops, of several images and not all classes, contrasted as `PixelInfoNCE` does."""
    maps = torch.randint(-1, 3, (3, 20, 20)).to(torch.int8)
    maps[1][maps[1] == 2] = -1
    maps[2, 0, :4], maps[2, 1:] = 1, 0
    image, pixel, label = public_pipeline.drawn_anchors(maps, 4, 30)
    assert maps.flatten(1)[image, pixel].equal(label.to(torch.int8))
    # Class 2 is absent in one image; four pixels of class 1 are too few in another.
    assert torch.bincount(3 * image + label, minlength=9).tolist() == [30, 30, 30, 30, 30, 0, 30, 0, 0]
    assert len(set(zip(image.tolist(), pixel.tolist(), strict=True))) == len(label)
    embeddings = F.normalize(torch.randn(len(label), 12), dim=1).requires_grad_()
    loss = public_pipeline.contrast(embeddings, label, 0.2)
    expected = PixelInfoNCE(0.2, "supcon")(embeddings, label)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    gradient, expected_gradient = (torch.autograd.grad(each, embeddings)[0] for each in (loss, expected))
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


def test_anchors_of_all_images_weigh_as_many_pixels_as_there_are(tiny_slices: Slices) -> None:
    labels = labels_at_random(tiny_slices(21))
    features = torch.randn(21, 256, 5)
    bank = public_pipeline.bank_of(labels, features.__getitem__, 4, 7)
    found, classes, weight = bank.flat()
    counts = (labels.flatten(1).unsqueeze(1) == torch.arange(4).view(1, -1, 1)).sum(dim=2)
    kept = torch.where(counts > 7, counts, 0).sum(dim=0)
    torch.testing.assert_close(torch.bincount(classes, weight, minlength=4), kept.float())
    rows = {
        tuple(row): int(label) for row, label in zip(features.flatten(0, 1).tolist(), labels.flatten(), strict=True)
    }
    assert [rows[tuple(row)] for row in found.tolist()] == classes.tolist()


def test_all_ways_train_the_same_decoder_where_nothing_is_drawn(
    tiny_cldf: CLDF, tiny_slices: Slices, tmp_path: Path
) -> None:
    """Without augmentation and dropout it does not matter when features are read, and which pixels are embedded."""
    decoder = tiny_cldf.config.decoder.model_dump()
    settings = decoder | {"dropout": 0.0, "optimisation": decoder["optimisation"] | {"augment": False}}
    cldf, data = with_changes(tiny_cldf, decoder=settings), tiny_slices(19)
    labels, features = labels_at_random(data), public_pipeline.full_size_features(cldf)
    trained = {
        way: public_pipeline.fit_decoder(cldf, trainer_of(cldf.config, data, tmp_path / way), labels, features, way)
        for way in ("per_step", "at_anchors", "held")
    }
    decoder_of_steps, prototypes, thresholds = trained.pop("per_step")
    for others, other_prototypes, other_thresholds in trained.values():
        for name, value in others.state_dict().items():
            torch.testing.assert_close(value, decoder_of_steps.state_dict()[name], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(other_prototypes.vectors, prototypes.vectors, rtol=0, atol=1e-2)
        assert other_thresholds.equal(thresholds)
    assert prototypes.bias.isfinite().all()


@pytest.mark.parametrize("rival", RIVALS)
def test_every_rival_trains_on_the_phantom(rival: str) -> None:
    trained = case(rival, **SMALL)()
    assert set(trained.seconds) == {"evidence", "reading", "steps", "rest"}
    assert all(seconds > 0 for seconds in trained.seconds.values())
    assert set(trained.labels.unique().tolist()) == {-1, 0, 1}
    assert trained.cldf.segment(torch.rand(1, 2, 64, 64) * 2 - 1).mask.shape == (1, 64, 64)


def test_a_stopwatch_counts_inner_parts_once() -> None:
    watch = Stopwatch()
    inner = watch("inner", time.sleep)

    def body(seconds: float) -> None:
        time.sleep(0.01)
        inner(seconds)
        inner(seconds)

    start = time.perf_counter()
    watch("outer", body)(0.05)
    took = time.perf_counter() - start
    assert watch.seconds["inner"] >= 0.1
    assert watch.seconds["outer"] >= 0.01
    assert watch.seconds["inner"] + watch.seconds["outer"] <= took
