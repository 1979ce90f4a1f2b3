"""Studies unlike the training images: scores against plain Mahalanobis distances, thresholds, policies, the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cldf_fast.cli import app
from cldf_fast.deploy import ood
from cldf_fast.deploy.audit import verify_audit
from cldf_fast.deploy.manifest import open_sealed, seal
from cldf_fast.deploy.ood import Detector
from cldf_fast.deploy.prediction import predict
from cldf_fast.deploy.predictor import Predictor
from cldf_fast.errors import ConfigError, IntegrityError, UnlikeTrainingError
from tests.deploy.conftest import a_study, write_study


def studies(count: int, slices: int, widths: tuple[int, int], scale: float = 1.0) -> list[dict[str, np.ndarray]]:
    """Features of one population: correlated, a few directions far wider than the others."""
    rng = np.random.default_rng(np.random.randint(2**31))  # repeats with the seed of the test
    mixes = [
        np.random.default_rng(width).normal(size=(width, width)) * np.geomspace(1, 0.01, width) for width in widths
    ]
    return [
        {
            name: scale * (rng.normal(size=(slices, len(mix))) @ mix.T).astype(np.float32)
            for name, mix in zip(ood.SCORES, mixes, strict=True)
        }
        for _ in range(count)
    ]


# Scores


def test_a_score_is_the_mahalanobis_distance_of_the_covariance_it_describes() -> None:
    detector = Detector.fit(studies(9, 5, (7, 13)), studies(3, 5, (7, 13)))
    for name, features in studies(1, 4, (7, 13), scale=3)[0].items():
        directions = detector.components[name]
        assert len(directions) < len(directions.T)
        inside = directions.T @ np.diag(detector.variance[name]) @ directions
        covariance = inside + detector.outside[name] * (np.eye(len(directions.T)) - directions.T @ directions)
        centred = features - detector.mean[name]
        distances = [row @ np.linalg.solve(covariance, row) for row in centred]
        assert detector.score(name, features) == pytest.approx(np.log(np.mean(distances)), abs=1e-5)


def test_thresholds_hold_for_new_studies_however_few_they_came_from() -> None:
    train, widths = studies(60, 4, (3, 4)), (3, 4)
    found = []
    for _ in range(60):
        detector = Detector.fit(train, studies(4, 4, widths))
        found += [detector.judge(study).status for study in studies(20, 4, widths)]
    assert 0.01 < 1 - found.count("accept") / len(found) < 0.12
    assert found.count("refuse") / len(found) < 0.01
    enough = Detector.fit(train, studies(60, 4, widths))
    assert {enough.judge(study).status for study in studies(20, 4, widths, scale=50)} == {"refuse"}


@pytest.mark.parametrize("channels", [1, 3])
def test_intensities_are_roots_of_histograms(channels: int) -> None:
    images = (np.random.rand(2, channels, 9, 7) * 2 - 1).astype(np.float32)
    images[0, 0, :2] = np.array([[-1], [1]])
    expected = [
        np.concatenate([np.histogram(channel, 32, (-1, 1))[0] / channel.size for channel in image]) for image in images
    ]
    np.testing.assert_allclose(ood.intensity_features(images) ** 2, expected, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 31, 500])
def test_slices_are_spread_evenly(count: int) -> None:
    chosen = ood.spread(count)
    assert len(chosen) == min(count, 16)
    assert (chosen[0], chosen[-1]) == (0, count - 1)
    assert np.ptp(np.diff(chosen)) <= 1 if count > 1 else True


def test_features_that_never_vary_give_finite_scores() -> None:
    still = [{name: np.ones((3, 5), np.float32) for name in ood.SCORES} for _ in range(4)]
    detector = Detector.fit(still, still)
    assert detector.judge(still[0]).status == "accept"
    moved = {name: values + 1 for name, values in still[0].items()}
    assert detector.judge(moved).status == "refuse"


# The directory


def test_what_is_unlike_the_training_images_is_accepted_warned_of_or_refused(engine: Path, tmp_path: Path) -> None:
    images = [a_study("typical").image.numpy() for _ in range(3)]
    sources = [write_study(image, tmp_path, f"typical{i}") for i, image in enumerate(images)]
    noise = write_study(np.random.rand(6, 2, 16, 16).astype(np.float32), tmp_path, "noise")
    predictor = Predictor(engine)
    kept = list(predict(predictor, [*sources, noise], tmp_path / "out", ood="refuse"))
    assert [outcome.status for outcome in kept[:3]] == ["done"] * 3
    assert "accept" in [outcome.ood["status"] for outcome in kept[:3] if isinstance(outcome.ood, dict)]
    refused = kept[3]
    assert refused.status == "refused"
    assert "is unlike the images that the networks were trained on (its intensity score is" in refused.reason
    assert isinstance(refused.ood, dict)
    assert refused.ood["status"] == "refuse"
    assert not list((tmp_path / "out").glob("noise*"))
    assert verify_audit(tmp_path / "out" / "audit.jsonl").entries == 4
    log = [json.loads(line)["event"] for line in (tmp_path / "out" / "audit.jsonl").read_text().splitlines()]
    assert (log[3]["ood"], log[3]["reason"]) == ("refuse", "UnlikeTrainingError")
    assert log[3]["ood_scores"] == [refused.ood["scores"][name] for name in ood.SCORES]
    for policy in ("accept", "warn"):
        (outcome,) = predict(predictor, [noise], tmp_path / policy, ood=policy)
        assert isinstance(outcome.ood, dict)
        assert (outcome.status, outcome.ood["status"]) == ("done", policy)
        assert outcome.ood["scores"] == refused.ood["scores"]
    result = CliRunner().invoke(app, ["predict", str(engine), noise, "--out", str(tmp_path / "command")])
    assert result.exit_code == 0, result.output
    assert "is unlike the images trained on" in result.output
    with pytest.raises(UnlikeTrainingError, match="use --ood warn"):
        predictor.predict(noise, tmp_path / "alone", ood="refuse")
    with pytest.raises(ConfigError, match="ood: expected one of accept, warn, refuse, got 'never'"):
        predictor.predict(noise, tmp_path / "alone", ood="never")
    assert not (tmp_path / "alone").exists()


def test_a_score_depends_on_neither_the_labels_nor_the_rest_of_the_batch(engine: Path) -> None:
    predictor = Predictor(engine, max_batch=4)
    image = (torch.rand(9, 2, 16, 16) * 2 - 1).numpy()
    np.testing.assert_allclose(predictor.bottleneck(image)[3:4], predictor.bottleneck(image[3:4]), atol=1e-5)
    first, second = predictor.judge(image), Predictor(engine, max_batch=1).judge(image)
    assert first is not None
    assert second is not None
    assert first.scores == pytest.approx(second.scores, abs=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("warn"),
        lambda content: content["mean"].update(intensity=[1.0]),
        lambda content: content["components"].update(bottleneck="text"),
        lambda content: content["variance"].update(bottleneck=None),
        lambda content: content.update(refuse=[1, 2]),
    ],
)
def test_a_file_that_is_none_is_refused(engine: Path, tmp_path: Path, change: Any) -> None:
    copied = Path(shutil.copytree(engine, tmp_path / "engine"))
    content = json.loads((copied / ood.FILE).read_text())
    change(content)
    (copied / ood.FILE).write_text(json.dumps(content))
    with pytest.raises(IntegrityError):
        Predictor(copied).load()
    seal(copied, engines={})
    with pytest.raises(IntegrityError, match=r"ood\.json: is not what `cldf-fast export` writes"):
        Predictor(copied).load()


def test_without_images_at_hand_there_is_no_score(engine: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(engine, tmp_path / "engine"))
    for file in (copied / ood.FILE, *copied.glob("bottleneck.*")):
        file.unlink()
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"ood": None}))
    seal(copied, engines={})
    predictor, image = Predictor(copied), (torch.rand(2, 2, 16, 16) * 2 - 1).numpy()
    assert predictor.judge(image) is None
    with pytest.raises(ConfigError, match="has no graph bottleneck; export with the data set at hand"):
        predictor.bottleneck(image)
    source = write_study(a_study("any").image.numpy(), tmp_path, "any")
    (outcome,) = predict(predictor, [source], tmp_path / "out", ood="refuse")
    assert (outcome.status, outcome.ood) == ("done", "not available")


def test_what_is_read_is_what_was_written(engine: Path) -> None:
    sealed = open_sealed(engine)
    assert Detector.of(sealed).to_json().encode() == sealed.read(ood.FILE)
