"""What the networks are trained on, a whole training, and what it promises: killed and resumed, one process or two."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from safetensors.torch import load_file
from torch import Tensor, nn

from cldf_fast.config import CDMConfig, ClassifierConfig, Config, DecoderConfig, load_config, make_config, save_config
from cldf_fast.data.packing import PackedSlices
from cldf_fast.diffusion import Diffusion
from cldf_fast.errors import CheckpointError, DataError
from cldf_fast.evidence import pixel_labels
from cldf_fast.features import DiffusionFeatures
from cldf_fast.models.conditions import label_condition, null_condition
from cldf_fast.pipeline import CLDF
from cldf_fast.run import DatasetRecord, Run
from cldf_fast.store import FeatureStore
from cldf_fast.training import decoder as decoder_training
from cldf_fast.training import fit as fitting
from cldf_fast.training.augment import Augmenter
from cldf_fast.training.cdm import cdm_loss
from cldf_fast.training.classifier import classifier_loss
from cldf_fast.training.decoder import AnchorBank, decoder_loss, read_anchors
from cldf_fast.training.engine import StepDraws
from cldf_fast.training.fit import NETWORKS, Trainer, label_thresholds

Slices = Callable[..., PackedSlices]

RECORD = DatasetRecord(("liver", "kidneys", "spleen"), ("t1", "t2"))


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def draws(batch: int) -> StepDraws:
    return StepDraws(torch.Generator().manual_seed(7), batch, 0, 1)


# --- Losses -----------------------------------------------------------------------------------------------------------


class Watched(nn.Module):
    """Notes what it is asked and answers with a function of it."""

    def __init__(self, answer: Callable[..., Tensor]) -> None:
        super().__init__()
        self.answer = answer
        self.asked: list[tuple[Tensor, ...]] = []

    def forward(self, *arguments: Tensor) -> Tensor:
        self.asked.append(arguments)
        return self.answer(*arguments)


def test_the_cdm_learns_the_noise_at_the_time_it_is_told(tiny_slices: Slices) -> None:
    """On slices that are all alike the noise follows from x_t and the time; who answers it has no loss."""
    diffusion = Diffusion(500, rescale_timesteps=True)
    data = tiny_slices()
    data = replace(data, images=torch.full_like(data.images, 0.4))
    config = CDMConfig()

    def noise(x_t: Tensor, time: Tensor, _condition: Tensor) -> Tensor:
        level = diffusion.alpha_bar[(time / 2).round().long()].view(-1, 1, 1, 1)
        return (x_t - level.sqrt() * 0.4) / (1 - level).sqrt()

    loss = cdm_loss(data, diffusion, config, augmenter=None)
    assert float(loss(Watched(noise), draws(64))) < 1e-6
    nothing = Watched(lambda x_t, _time, _condition: torch.zeros_like(x_t))
    assert float(loss(nothing, draws(64))) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_cdm_is_conditioned_on_the_label_or_on_nothing(tiny_slices: Slices, share: float) -> None:
    data = tiny_slices()
    unet = Watched(lambda x_t, _time, _condition: torch.zeros_like(x_t))
    config = CDMConfig.model_validate({"null_probability": share, "low_noise_share": share})
    cdm_loss(data, Diffusion(), config, augmenter=Augmenter(mirror=True))(unet, draws(200))
    ((_, time, condition),) = unet.asked
    null = (condition == null_condition(1, 3)).all(dim=1)
    assert float(null.float().mean()) == pytest.approx(share, abs=0.1)
    known = {tuple(row) for row in label_condition(data.require_labels()).tolist()}
    assert {tuple(row) for row in condition[~null].tolist()} <= known
    low = float((time < 300).float().mean())
    assert low == pytest.approx(share + (1 - share) * 0.3, abs=0.1)
    assert 0 <= time.min() <= time.max() <= 999


def test_the_classifier_s_loss_is_cross_entropy_of_every_class(tiny_slices: Slices) -> None:
    data = tiny_slices(9)
    # Each slice carries its own number, so that the classifier can be asked which labels it should have seen.
    data = replace(data, images=(torch.arange(9) / 10 - 0.4).view(9, 1, 1, 1).expand(9, 2, 16, 16))
    logits = torch.randn(9, 3)
    config = ClassifierConfig.model_validate({"clean_share": 1.0})
    rows: list[int] = []

    def answer(x: Tensor, time: Tensor) -> Tensor:
        assert not time.any()
        rows.extend(((x.mean(dim=(1, 2, 3)) + 0.4) * 10).round().long().tolist())
        return logits[rows]

    loss = classifier_loss(data, Diffusion(), config, augmenter=None)(Watched(answer), draws(40))
    expected = [
        math.log1p(math.exp(-float(logits[row, k]) * (1 if data.require_labels()[row, k] else -1)))
        for row in rows
        for k in range(3)
    ]
    assert float(loss) == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert len(set(rows)) > 5


def test_the_classifier_sees_noise_up_to_its_limit(tiny_slices: Slices) -> None:
    classifier = Watched(lambda x, _time: torch.zeros(len(x), 3))
    config = ClassifierConfig.model_validate({"max_noise": 0.4, "clean_share": 0.25})
    classifier_loss(tiny_slices(), Diffusion(), config, augmenter=Augmenter(mirror=True))(classifier, draws(400))
    ((_, time),) = classifier.asked
    assert 350 < float(time.max()) < 400
    assert float((time == 0).float().mean()) == pytest.approx(0.25, abs=0.07)


def test_half_of_a_decoder_s_batch_holds_foreground() -> None:
    labels = torch.tensor([[0, 0, -1], [0, 1, 2], [0, 0, 0], [0, 2, 2]])
    bank = AnchorBank(
        torch.arange(4).view(4, 1, 1).expand(4, 3, 2).half(), labels, torch.ones(4, 3), (labels > 0).any(dim=1)
    )
    decoder = Watched(lambda features: F.normalize(features + torch.randn_like(features), dim=-1))
    loss = decoder_loss(bank, DecoderConfig())(decoder, draws(60))
    ((features,),) = decoder.asked
    assert features.dtype == torch.float32
    drawn = features[:, 0, 0].tolist()
    assert sum(row in (1, 3) for row in drawn) == 30
    assert set(drawn) == {0, 1, 2, 3}
    assert loss.isfinite()
    only_foreground = replace(bank, foreground=torch.ones(4, dtype=torch.bool))
    assert decoder_loss(only_foreground, DecoderConfig())(decoder, draws(6)).isfinite()


# --- Anchors ----------------------------------------------------------------------------------------------------------


def read(cldf: CLDF, data: PackedSlices, labels: Tensor, fabric: Fabric, **options: Any) -> AnchorBank:
    arguments: dict[str, Any] = {"passes": 1, "augmenter": None, "seed": 4, "quiet": True, **options}
    return read_anchors(
        data.images,
        labels,
        cldf.conditions(data.require_labels()),
        cldf.features,
        num_classes=4,
        per_class=5,
        fabric=fabric,
        **arguments,
    )


def pixels_at_random(count: int) -> Tensor:
    labels = torch.randint(-1, 4, (count, 16, 16)).to(torch.int8)
    labels[0] = 0
    labels[1, :, :] = -1
    labels[1, 3, 4:7] = 2
    return labels


def test_anchors_are_labelled_pixels_with_the_features_there(
    tiny_cldf: CLDF, tiny_slices: Slices, fabric: Fabric
) -> None:
    data, labels = tiny_slices(6), pixels_at_random(6)
    bank = read(tiny_cldf, data, labels, fabric)
    assert bank.features.shape == (6, 20, sum(tiny_cldf.features.channels))
    assert bank.foreground.tolist() == [False, *[True] * 5]
    conditions = tiny_cldf.conditions(data.require_labels())
    maps = tiny_cldf.features(data.images, conditions)
    everywhere = torch.cat([F.interpolate(block, (16, 16), mode="bilinear") for block in maps], dim=1)
    for i in range(6):
        for k in range(4):
            there = everywhere[i][:, labels[i] == k].T
            mine = bank.labels[i] == k
            assert int(mine.sum()) == min(5, len(there))
            # An anchor of a class is one of that class's pixels, and together they stand for all of them.
            distance = torch.cdist(bank.features[i][mine].float(), there) if len(there) else torch.zeros(0, 1)
            assert (distance.amin(dim=1) < 0.05).all()
            assert float(bank.weight[i][mine].sum()) == pytest.approx(len(there))
    features, flat_labels, weight = bank.flat()
    assert len(features) == len(flat_labels) == len(weight) == int((bank.labels >= 0).sum())
    assert flat_labels.min() == 0


def test_the_first_pass_depends_neither_on_its_batches_nor_on_further_passes(
    tiny_cldf: CLDF, tiny_slices: Slices, fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, labels = tiny_slices(7), pixels_at_random(7)
    once = read(tiny_cldf, data, labels, fabric)
    twice = read(tiny_cldf, data, labels, fabric, passes=2, augmenter=Augmenter())
    assert len(twice.features) == 14
    assert twice.labels[:7].equal(once.labels)
    assert twice.features[:7].equal(once.features)
    assert not twice.features[7:].equal(once.features)
    assert twice.features.equal(read(tiny_cldf, data, labels, fabric, passes=2, augmenter=Augmenter()).features)
    monkeypatch.setattr(decoder_training, "_READ_BATCH", 3)
    small = read(tiny_cldf, data, labels, fabric)
    assert small.labels.equal(once.labels)
    torch.testing.assert_close(small.features, once.features, rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("worth", "augmenter", "sentence"),
    [
        (
            -math.inf,
            Augmenter(),
            r"store=float16 would take 0\.0 GB and save .* with this seed, 1/2 of it with another",
        ),
        (-math.inf, None, r"store=float16 would take 0\.0 GB and save .* with this seed, as much with another"),
        (math.inf, None, None),
    ],
)
def test_what_a_store_would_save_is_said_where_it_is_worth_it(
    tiny_cldf: CLDF, tiny_slices: Slices, fabric: Fabric, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], worth: float, augmenter: Augmenter | None, sentence: str | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(decoder_training, "_WORTH_SAYING", worth)
    read(tiny_cldf, tiny_slices(6), pixels_at_random(6), fabric, passes=2, augmenter=augmenter, quiet=False)
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(sentence, said) if sentence else "store" not in said


def test_anchors_are_read_through_a_store_and_it_is_said_how_many(
    tiny_cldf: CLDF, tiny_slices: Slices, fabric: Fabric, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, labels = tiny_slices(6), pixels_at_random(6)
    exact = read(tiny_cldf, data, labels, fabric, passes=2)
    assert isinstance(tiny_cldf.features, DiffusionFeatures)
    tiny_cldf.features = FeatureStore(tiny_cldf.features, tmp_path)
    for found in (6, 12):
        bank = read(tiny_cldf, data, labels, fabric, passes=2, quiet=False)
        torch.testing.assert_close(bank.features, exact.features, rtol=2e-3, atol=2e-2)
        assert f"features: {found} of 12 were stored" in capsys.readouterr().err


def test_without_any_foreground_there_is_nothing_to_learn(tiny_cldf: CLDF, tiny_slices: Slices, fabric: Fabric) -> None:
    with pytest.raises(DataError, match="pixel labels: expected some foreground to learn from"):
        read(tiny_cldf, tiny_slices(4), torch.zeros(4, 16, 16, dtype=torch.int8), fabric)


def test_classes_without_pixels_are_told_of(recwarn: pytest.WarningsRecorder) -> None:
    def bank(*labels: int) -> AnchorBank:
        rows = torch.tensor([labels])
        return AnchorBank(torch.zeros(1, len(labels), 2), rows, torch.ones(rows.shape), (rows > 0).any(dim=1))

    fitting.check_classes(bank(0, 1, 2, -1), ("liver", "spleen"))
    assert not recwarn.list
    with pytest.warns(UserWarning, match="none of any training image is of spleen, which will be segmented nowhere"):
        fitting.check_classes(bank(0, 1, -1), ("liver", "spleen"))
    with pytest.raises(DataError, match="expected some background to learn from, found none"):
        fitting.check_classes(bank(1, 2, -1), ("liver", "spleen"))


# --- Thresholds -------------------------------------------------------------------------------------------------------


def thresholds_of(probability: Tensor, labels: Tensor, tiny_slices: Slices) -> Tensor:
    data = replace(tiny_slices(), labels=labels)
    stub = SimpleNamespace(label_probability=lambda _images: probability)
    return label_thresholds(stub, data)  # type: ignore[arg-type]


@pytest.mark.parametrize("places", [None, 4], ids=["distinct", "with ties"])
def test_label_thresholds_maximise_sensitivity_plus_specificity(tiny_slices: Slices, places: int | None) -> None:
    labels = tiny_slices(40).require_labels()
    labels[:, 2] = True
    probability = (0.4 * labels + 0.6 * torch.rand(40, 3)).clamp(0, 1)
    if places is not None:
        probability = (probability * places).round() / places
    thresholds = thresholds_of(probability, labels, tiny_slices)

    def youden(k: int, threshold: float) -> Fraction:
        called, truth = probability[:, k] >= threshold, labels[:, k]
        return Fraction(int(called[truth].sum()), int(truth.sum())) + Fraction(
            int((~called)[~truth].sum()), int((~truth).sum())
        )

    for k in (0, 1):
        assert youden(k, float(thresholds[k])) == max(youden(k, value) for value in [*probability[:, k].tolist(), 2.0])
    assert float(thresholds[2]) == 0.5


def test_of_equal_label_thresholds_the_one_nearest_to_a_half_is_taken(tiny_slices: Slices) -> None:
    # Three absent, three present; the thresholds below 0.2 and below 0.7 serve equally well.
    probability = torch.tensor([[0.1], [0.2], [0.65], [0.7], [0.8], [0.9]])
    labels = torch.tensor([[0], [1], [0], [1], [1], [0]], dtype=torch.bool)
    assert thresholds_of(probability, labels, tiny_slices).tolist() == pytest.approx([0.675])
    above = torch.nextafter(torch.tensor(0.7), torch.tensor(1.0))
    probability = torch.stack([torch.tensor(0.7), above])[:, None]
    assert thresholds_of(probability, labels[:2], tiny_slices).tolist() == [above]


# --- Whole trainings --------------------------------------------------------------------------------------------------


def trainer(config: Config, path: Path, data: PackedSlices, fabric: Fabric, *, resume: bool = False) -> Trainer:
    run = Run(path)
    if fabric.is_global_zero:
        run.create(config, RECORD)
    fabric.barrier()
    return Trainer(config, run, fabric, data, data, RECORD, resume, quiet=True)


def weights(path: Path) -> dict[str, Tensor]:
    return {
        f"{file.name} {key}": value
        for file in sorted(path.glob("*.safetensors"))
        for key, value in load_file(file).items()
    }


def rows(path: Path) -> list[tuple[str, int, float]]:
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["network"], row["step"], row["loss"]) for row in map(json.loads, lines)]


def interrupted(loss: Callable[..., Tensor], step: int) -> Callable[..., Tensor]:
    calls = iter(range(step))

    def stopped(*arguments: Any) -> Tensor:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return loss(*arguments)

    return stopped


def test_stopped_in_every_network_and_resumed_it_is_the_undisturbed_run(
    tiny_config: Config, tiny_slices: Slices, fabric: Fabric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    data = tiny_slices()
    trainer(tiny_config, tmp_path / "whole", data, fabric).fit(NETWORKS)
    for number, name in enumerate(NETWORKS):
        step = (seed >> number) % 6
        with monkeypatch.context() as patch:
            make = getattr(fitting, f"{name}_loss")
            patch.setattr(
                fitting, f"{name}_loss", lambda *a, make=make, step=step, **k: interrupted(make(*a, **k), step)
            )
            with pytest.raises(KeyboardInterrupt):
                trainer(tiny_config, tmp_path / "cut", data, fabric, resume=True).fit([name])
        assert not Run(tmp_path / "cut").has(name)
        trainer(tiny_config, tmp_path / "cut", data, fabric, resume=True).fit([name])
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    for key, value in whole.items():
        assert cut[key].equal(value), key
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert [(name, step) for name, step, _ in rows(tmp_path / "cut")] == [(n, s) for n in NETWORKS for s in range(1, 7)]


def test_a_trained_run_segments_and_its_pixel_labels_follow_the_image_labels(
    tiny_config: Config, tiny_slices: Slices, fabric: Fabric, tmp_path: Path
) -> None:
    data = tiny_slices()
    training = trainer(tiny_config, tmp_path, data, fabric)
    training.fit(NETWORKS)
    cldf = training.run.load()
    result = cldf.segment(data.images, data.labels)
    assert result.mask.shape == (12, 16, 16)
    labels, present = training.pixel_labels(cldf, data), data.require_labels()
    direct = pixel_labels(cldf.saliency(data.images), present, cldf.thresholds()).labels
    # Images without any class are not even looked at; rounding may move single pixels across a threshold.
    assert float((labels == direct).float().mean()) > 0.999
    assert not labels[~present.any(dim=1)].any()


def test_a_network_trained_anew_ends_a_decoder_that_was_begun(
    tiny_config: Config, tiny_slices: Slices, fabric: Fabric, tmp_path: Path
) -> None:
    data = tiny_slices()
    trainer(tiny_config, tmp_path / "run", data, fabric).fit(NETWORKS)
    state = tmp_path / "run" / "decoder.checkpoint"
    # What is complete stays as it is.
    trainer(tiny_config, tmp_path / "run", data, fabric, resume=True).fit(("cdm", "classifier"))
    assert state.exists()
    trainer(tiny_config.model_copy(update={"seed": 9}), tmp_path / "run", data, fabric).fit(("cdm",))
    assert not state.exists()


def test_a_decoder_trained_again_finds_its_features_in_the_store(
    tiny_config: Config, tiny_slices: Slices, fabric: Fabric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = tiny_config.features.model_copy(update={"store": "float16"})
    data, config = tiny_slices(), tiny_config.model_copy(update={"features": stored})
    training = trainer(config, tmp_path, data, fabric)
    training.fit(NETWORKS)
    first = weights(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionFeatures, "__call__", lambda *_: pytest.fail("computed again"))
        training.fit(["decoder"])
    assert all(value.equal(first[key]) for key, value in weights(tmp_path).items())
    # Of another seed, the images as they are: each is in the store, and its augmented readings are new.
    rows: list[int] = []
    read = DiffusionFeatures.__call__
    monkeypatch.setattr(DiffusionFeatures, "__call__", lambda self, x, c: rows.append(len(x)) or read(self, x, c))
    trainer(config.model_copy(update={"seed": 9}), tmp_path, data, fabric).fit(["decoder"])
    assert sum(rows) == (config.decoder.passes - 1) * len(data)
    assert training.run.feature_folder.exists()
    trainer(config.model_copy(update={"seed": 9}), tmp_path, data, fabric).fit(["cdm"])
    assert not training.run.feature_folder.exists()


def test_the_decoder_needs_the_other_two(
    tiny_config: Config, tiny_slices: Slices, fabric: Fabric, tmp_path: Path
) -> None:
    training = trainer(tiny_config, tmp_path, tiny_slices(), fabric)
    with pytest.raises(CheckpointError, match="the decoder needs a trained cdm"):
        training.fit(["decoder"])
    training.fit(["cdm"])
    with pytest.raises(CheckpointError, match="the decoder needs a trained classifier"):
        training.fit(["decoder"])


def test_a_data_set_without_labels_trains_nothing(
    tiny_config: Config, tiny_slices: Slices, fabric: Fabric, tmp_path: Path
) -> None:
    data = replace(tiny_slices(), labels=None)
    for name in ("cdm", "classifier"):
        with pytest.raises(DataError, match="labels: expected image-level labels for training"):
            trainer(tiny_config, tmp_path, data, fabric).fit([name])


# --- In processes of their own ----------------------------------------------------------------------------------------


def start(folder: Path, role: str, **environment: str) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[2])
    variables = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, __file__, role, str(folder)], env=variables)


def prepare(folder: Path, config: Config, data: PackedSlices) -> None:
    save_config(config, folder / "wanted.yaml")
    (folder / "slices.pickle").write_bytes(pickle.dumps(data))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as `start` gives its processes: sums of another number of threads round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.usefixtures("one_thread")
def test_killed_without_warning_and_resumed_it_is_the_undisturbed_run(
    tiny_config: Config, tiny_slices: Slices, fabric: Fabric, tmp_path: Path, seed: int
) -> None:
    data = tiny_slices()
    prepare(tmp_path, tiny_config, data)
    killed = start(tmp_path, "killed", CLDF_FAST_TEST_STEP=str(2 + seed % 4))
    assert killed.wait(timeout=600) == -signal.SIGKILL
    assert rows(tmp_path / "run")
    assert not Run(tmp_path / "run").has("cdm")
    trainer(tiny_config, tmp_path / "whole", data, fabric).fit(["cdm"])
    trainer(tiny_config, tmp_path / "run", data, fabric, resume=True).fit(["cdm"])
    for key, value in weights(tmp_path / "whole").items():
        assert weights(tmp_path / "run")[key].equal(value), key
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_two_processes_equal_one_with_the_joint_batch(
    tiny_config: Config, tiny_slices: Slices, fabric: Fabric, tmp_path: Path
) -> None:
    # Dropout draws anew in each process, so that only without it the two can agree.
    values = tiny_config.model_dump()
    values["classifier"]["network"]["dropout"] = values["decoder"]["dropout"] = 0.0
    config, data = make_config(values), tiny_slices(18)  # two batches of readings: one for each process
    prepare(tmp_path, config, data)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    workers = [
        start(tmp_path, "joint", RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", LOCAL_WORLD_SIZE="2", **common)
        for rank in range(2)
    ]
    assert [worker.wait(timeout=600) for worker in workers] == [0, 0]
    one, two = tmp_path / "one", tmp_path / "run"
    training = trainer(config, one, data, fabric)
    training.fit(["cdm", "classifier"])
    x = torch.rand(4, 2, 16, 16) * 2 - 1
    # Biases that a norm cancels have no gradient but rounding, which Adam blows up: the classifier is compared by what
    # it says, and the decoder is trained on the same two networks.
    probability = training.run.load().label_probability(x)
    first = weights(one)
    for name in ("cdm", "classifier"):
        shutil.copyfile(two / f"{name}.safetensors", one / f"{name}.safetensors")
    training.fit(["decoder"])
    torch.testing.assert_close(training.run.load().label_probability(x), probability, rtol=0, atol=1e-5)
    joint = weights(two)
    alone = {**weights(one), **{key: value for key, value in first.items() if key.startswith("cdm")}}
    assert joint.keys() == alone.keys()
    for key, value in alone.items():
        if key.startswith(("cdm", "decoder")):
            torch.testing.assert_close(joint[key], value, rtol=1e-5, atol=1e-5, msg=key)
    for (*row, loss), (*other, other_loss) in zip(rows(one), rows(two), strict=True):
        assert row == other
        assert other_loss == pytest.approx(loss, rel=1e-5)


def work(role: str, folder: Path) -> None:
    torch.set_num_threads(1)
    config = load_config(folder / "wanted.yaml")
    data = pickle.loads((folder / "slices.pickle").read_bytes())
    if role == "joint":
        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
        fabric.launch()
        trainer(config, folder / "run", data, fabric).fit(NETWORKS)
        return
    step = int(os.environ["CLDF_FAST_TEST_STEP"])
    make = fitting.cdm_loss

    def deadly(*arguments: Any, **options: Any) -> Callable[..., Tensor]:
        loss = make(*arguments, **options)
        calls = iter(range(step))

        def die(*places: Any) -> Tensor:
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return loss(*places)

        return die

    fitting.cdm_loss = deadly
    trainer(config, folder / "run", data, Fabric(accelerator="cpu", devices=1)).fit(["cdm"])


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
