"""Jobs on a run whose data or configuration has changed: patients stay in their part, nothing foreign is trained on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from cldf_fast import workflow
from cldf_fast.config import Config, load_config
from cldf_fast.data.splits import read_split, write_split
from cldf_fast.errors import CheckpointError, CLDFError, ConfigError, DataError, SplitError
from cldf_fast.inference import read_case, segment_case
from cldf_fast.run import DatasetRecord, Run
from tests.test_cli import _TINY

PATIENTS = [f"p{number:02d}" for number in range(20)]


def write_images(folder: Path, patients: list[str], *, classes: str = "bright") -> Path:
    """A `labelled` data set: every other patient has a bright square."""
    folder.mkdir(exist_ok=True)
    rng, rows = np.random.default_rng(3), [f"image,patient,{classes}"]
    for number, patient in enumerate(patients):
        pixels = rng.integers(20, 60, (32, 32), dtype=np.uint8)
        if number % 2:
            pixels[8:20, 10:22] += 150
        Image.fromarray(pixels).save(folder / f"{patient}.png")
        rows.append(f"{patient}.png,{patient}" + f",{number % 2}" * len(classes.split(",")))
    (folder / "labels.csv").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images and a run that was trained on them."""
    folder = tmp_path_factory.mktemp("workflow")
    data = {"dataset": "labelled", "size": 32, "options": {"window": [0, 200]}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(_TINY | {"data": data}), encoding="utf-8")
    write_images(folder / "images", PATIENTS)
    config = load_config(folder / "tiny.yaml")
    networks = ("cdm", "classifier", "decoder")
    workflow.train(config, networks, data=folder / "images", out=folder / "run", resume=False, quiet=True)
    return folder


@pytest.fixture
def trained(once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(once, tmp_path / "copy"))


def patients_of(parts: dict[str, Any]) -> dict[str, set[str]]:
    return {name: set(part.subjects) for name, part in parts.items()}


def test_patients_stay_in_their_part(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(trained / "run")
    before = patients_of(read_parts(run, trained / "images"))
    assert sorted(len(part) for part in before.values()) == [2, 4, 14]
    for changed in (PATIENTS[1:], ["a00", *PATIENTS], [*PATIENTS[3:], "z1", "z2"]):
        data = write_images(trained / "changed", changed)
        now = patients_of(read_parts(run, data))
        assert now == {name: part & set(changed) for name, part in before.items()}
    assert "split: 2 patients of" in capsys.readouterr().err
    drawn = patients_of(workflow.open_parts(run.config(), trained / "changed"))
    assert drawn["train"] & before["test"]  # which is why
    others = write_images(trained / "others", ["a", "b", "c", "d"])
    assert patients_of(read_parts(run, others)) == patients_of(workflow.open_parts(run.config(), others))


def read_parts(run: Run, data: Path) -> dict[str, Any]:
    return workflow.open_parts(run.config(), data, run, quiet=False)


def test_a_folder_whose_split_contradicts_the_run_s_is_refused(trained: Path) -> None:
    run, images = Run(trained / "run"), trained / "images"
    split = {name: list(part) for name, part in read_split(run.split_file).items()}
    write_split(split, images / "split.csv")
    assert patients_of(read_parts(run, images)) == {name: set(part) for name, part in split.items()}
    moved = split["test"].pop()
    write_split(split | {"train": [*split["train"], moved]}, images / "split.csv")
    with pytest.raises(SplitError, match=f"patient '{moved}' is in 'train', but in 'test' of .*split.csv"):
        read_parts(run, images)
    config = run.config()
    with pytest.raises(SplitError, match=moved):
        workflow.train(config, ("decoder",), data=images, out=run.path, resume=False, quiet=True)
    # All networks anew: the folder's split is as good as any.
    networks = ("cdm", "classifier", "decoder")
    workflow.train(config, networks, data=images, out=run.path, resume=False, quiet=True)
    assert moved in read_split(run.split_file)["train"]


def test_training_on_some_of_the_patients_leaves_the_others_where_they_were(trained: Path) -> None:
    run = Run(trained / "run")
    before = read_split(run.split_file)
    some = [*before["train"][:5], *before["val"], "new"]
    data = write_images(trained / "some", sorted(some))
    workflow.train(run.config(), ("decoder",), data=data, out=run.path, resume=False, quiet=True)
    assert read_split(run.split_file) == before
    shutil.rmtree(run.path / "decoder-seed-1", ignore_errors=True)
    # A network that was only begun counts as well.
    for name in ("cdm", "classifier", "decoder", "prototypes"):
        (run.path / f"{name}.safetensors").unlink()
    data = write_images(trained / "more", ["a00", *PATIENTS])
    workflow.train(run.config(), ("classifier",), data=data, out=run.path, resume=False, quiet=True)
    assert read_split(run.split_file) == before


def test_resuming_what_is_finished_changes_no_byte(trained: Path) -> None:
    run = Run(trained / "run")
    for name in ("cdm", "classifier"):  # as runs of before settings were recorded
        save_file(load_file(run.path / f"{name}.safetensors"), run.path / f"{name}.safetensors")
    cldf = run.load(decoder=False)
    digests = run.network_digests()
    workflow.train(run.config(), ("cdm", "classifier"), data=trained / "images", out=run.path, resume=True, quiet=True)
    assert run.network_digests() == digests
    assert cldf.decoder is None


def test_what_kept_networks_are_bound_to_is_checked_before_anything_is_written(trained: Path) -> None:
    run = Run(trained / "run")
    before = {path: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    config = load_config(run.path / "config.yaml", {"diffusion": {"schedule": "cosine"}})
    for networks in (("cdm",), ("decoder",)):
        with pytest.raises(CheckpointError, match=r"trained with diffusion.schedule linear, which is cosine now"):
            workflow.train(config, networks, data=trained / "images", out=run.path, resume=False, quiet=True)
    assert {path: path.read_bytes() for path in run.path.iterdir() if path.is_file()} == before


def test_all_of_a_data_set_is_scored_without_its_parts(tmp_path: Path, trained: Path) -> None:
    run = Run(trained / "run")
    two = write_images(tmp_path / "two", ["x", "y"])
    packed = workflow._packed(run.config(), run, two, "all", trains=False, quiet=True)
    assert (list(packed), packed["all"].subjects) == (["all"], ["x", "y"])
    phantom = Config.model_validate({"data": {"size": 32}})
    parts = workflow.open_parts(phantom, None)
    record = DatasetRecord(parts["train"].class_names, parts["train"].channel_names)
    other = Run(tmp_path / "phantom")
    other.create(phantom, record)
    whole = workflow._packed(phantom, other, None, "all", trains=False, quiet=True)["all"]
    assert set(whole.subjects) == {name for part in parts.values() for name in part.subjects}


def test_a_folder_without_a_part_that_is_needed_is_named(trained: Path) -> None:
    run = Run(trained / "run")
    data = write_images(trained / "test", sorted(read_split(run.split_file)["test"]))
    with pytest.raises(SplitError, match="test: holds no patient of the part train, only of test; give the folder"):
        workflow.train(run.config(), ("decoder",), data=data, out=run.path, resume=False, quiet=True)


def evaluated(run: Run, data: Path, **options: Any) -> None:
    workflow.evaluate(run, data=data, **({"split": "test", "quiet": True} | options))


@pytest.mark.parametrize(
    ("attempt", "error", "sentence"),
    [
        (
            lambda run, folder: evaluated(run, write_images(folder, PATIENTS, classes="dark")),
            DataError,
            "expected the classes that the run was trained on, bright, got dark",
        ),
        (
            lambda run, folder: evaluated(run, write_images(folder, PATIENTS, classes="bright,dark")),
            DataError,
            "expected the classes that the run was trained on, bright, got bright, dark",
        ),
        (
            lambda run, folder: evaluated(run, write_images(folder, list("abcdef")), decoder_seeds=2),
            ConfigError,
            "decoders of further seeds, baselines and the upper bound are trained on what the run was",
        ),
        (
            lambda run, folder: evaluated(run, write_images(folder, PATIENTS), split="nowhere"),
            ConfigError,
            "split: expected one of train, val, test or all, got 'nowhere'",
        ),
        (
            lambda run, folder: workflow.train(
                run.config(), ("decoder",), data=folder, out=folder / "new", resume=False, quiet=True
            ),
            CheckpointError,
            "the decoder needs a trained cdm",
        ),
    ],
)
def test_what_does_not_fit_the_run_is_refused_and_nothing_written(
    trained: Path, attempt: Callable[[Run, Path], None], error: type[CLDFError], sentence: str
) -> None:
    run = Run(trained / "run")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(error, match=sentence):
        attempt(run, trained / "other")
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    assert not (trained / "other" / "new").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"classifier": {"network": {"model_channels": 20}}}, "num_head_channels: 32 does not divide"),
        (
            {"evidence": {"noise_levels": [0.0, 0.4]}},
            "evidence.noise_levels: expected at most classifier.max_noise, 0.25",
        ),
    ],
)
def test_what_a_later_network_would_be_refused_for_is_said_first(
    once: Path, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    config = load_config(once / "tiny.yaml", change)
    with pytest.raises(ConfigError, match=sentence):
        workflow.train(config, ("cdm", "classifier"), data=once / "images", out=tmp_path, resume=False, quiet=True)
    assert not any(tmp_path.iterdir())


def test_classes_of_one_side_are_not_mirrored(tmp_path: Path) -> None:
    data = write_images(tmp_path / "images", PATIENTS, classes="left kidney")
    config = Config.model_validate({"data": {"dataset": "labelled", "size": 32}})
    with pytest.raises(ConfigError, match=r"data.mirror: expected false where classes are of one side \(left kidney\)"):
        workflow.train(config, ("cdm",), data=data, out=tmp_path / "run", resume=False, quiet=True)


def test_scoring_all_trains_on_the_run_s_own_part(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen = Run(trained / "run"), []

    def stop(cldf: Any, trainer: Any, *, masks: bool) -> None:
        seen.append((set(trainer.train.subjects), set(trainer.val.subjects), trainer.run.path.name))
        raise KeyboardInterrupt

    monkeypatch.setattr(workflow, "_train_decoder", stop)
    monkeypatch.setattr(workflow, "compare", lambda *_arguments, **_options: None)
    with pytest.raises(KeyboardInterrupt):
        evaluated(run, trained / "images", split="all", decoder_seeds=2)
    split = read_split(run.split_file)
    assert seen == [(set(split["train"]), set(split["val"]), "decoder-seed-1")]


def test_a_training_that_begins_again_leaves_no_checkpoint_to_be_taken_up(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(trained / "run")
    assert (run.path / "classifier.checkpoint").exists()
    config = Config.model_validate(run.config().model_dump() | {"seed": 1})

    def killed(*_arguments: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cldf_fast.training.fit.fit", killed)
    with pytest.raises(KeyboardInterrupt):
        networks = ("cdm", "classifier", "decoder")
        workflow.train(config, networks, data=trained / "images", out=run.path, resume=False, quiet=True)
    assert not list(run.path.glob("*.checkpoint"))


def test_the_window_of_training_is_that_of_segmenting(trained: Path, tmp_path: Path) -> None:
    run = Run(trained / "run")
    cldf, record = run.load(), run.record()
    assert record.window == (0.0, 200.0)
    volume, seen = read_case(str(trained / "images" / "p01.png"), 1), []

    def segment(images: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        seen.append(images)
        return type(cldf).segment(cldf, images, *arguments, **options)

    cldf.segment = segment  # type: ignore[method-assign]
    for number, window in enumerate((None, (0.0, 200.0), (0.0, 400.0))):
        segment_case(cldf, record, volume, tmp_path / str(number), window=window)
    assert seen[0].equal(seen[1])
    assert not seen[0].equal(seen[2])
    torch.testing.assert_close(seen[0][0, 0], volume.image[0, 0].clamp(0, 200) / 100 - 1)


def test_one_process_unless_torchrun_says_otherwise(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Recorder:
        def __init__(self, *, devices: Any, **_options: Any) -> None:
            asked.append(devices)

        def launch(self) -> None:
            pass

    monkeypatch.setattr(workflow, "Fabric", Recorder)
    config = Run(trained / "run").config()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    workflow.make_fabric(config)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    workflow.make_fabric(config)
    assert asked == [1, "auto"]
