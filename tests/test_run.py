"""The run directory: what is saved loads to the same masks; what is missing, damaged or of another run is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cldf_fast.config import make_config, save_config
from cldf_fast.data.acquisition import Acquisition
from cldf_fast.errors import CheckpointError
from cldf_fast.pipeline import CLDF
from cldf_fast.run import DatasetRecord, Run
from cldf_fast.segmentation import Prototypes

RECORD = DatasetRecord(("liver", "kidneys", "spleen"), ("t1", "t2"))
FILES = ("cdm.safetensors", "classifier.safetensors", "decoder.safetensors", "prototypes.safetensors")


def saved(cldf: CLDF, path: Path) -> Run:
    run = Run(path)
    run.create(cldf.config, RECORD)
    run.save_network("cdm", cldf.unet)
    run.save_network("classifier", cldf.classifier)
    assert cldf.decoder is not None
    assert cldf.prototypes is not None
    run.save_decoder(cldf.decoder, cldf.prototypes, cldf.label_threshold)
    return run


@pytest.fixture
def run(tiny_cldf: CLDF, tmp_path: Path) -> Run:
    return saved(tiny_cldf, tmp_path / "run")


def test_what_is_saved_loads_to_the_same_masks(tiny_cldf: CLDF, run: Run) -> None:
    loaded = Run(run.path).load()
    assert loaded.config == tiny_cldf.config
    assert Run(run.path).record() == RECORD
    x = torch.rand(3, 2, 16, 16) * 2 - 1
    expected, got = tiny_cldf.segment(x), loaded.segment(x)
    assert got.mask.equal(expected.mask)
    assert got.probability.equal(expected.probability)
    assert got.present.equal(expected.present)
    for module in (loaded.unet, loaded.classifier, loaded.decoder):
        assert module is not None
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_record_tells_how_the_training_images_were_acquired(tiny_cldf: CLDF, tmp_path: Path) -> None:
    run, file = Run(tmp_path / "run"), tmp_path / "run" / "dataset.json"
    known = DatasetRecord(RECORD.class_names, RECORD.channel_names, Acquisition("MR", (0.5, 2.0)))
    run.create(tiny_cldf.config, known)
    assert run.record().acquisition == known.acquisition
    assert run.record() == RECORD  # the same classes and channels
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | {"acquisition": {"modality": "MR", "pixel_mm": [2, 1]}}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"dataset\.json: can't be read \(pixel_mm: expected 0 < smallest"):
        run.record()
    del content["acquisition"]  # as runs of before
    file.write_text(json.dumps(content), encoding="utf-8")
    assert run.record().acquisition == Acquisition()


def test_a_run_without_a_decoder_loads_its_networks(tiny_cldf: CLDF, run: Run) -> None:
    (run.path / "decoder.safetensors").unlink()
    loaded = run.load()
    assert run.has("cdm")
    assert not run.has("decoder")
    assert loaded.decoder is None
    x = torch.rand(2, 2, 16, 16) * 2 - 1
    assert loaded.label_probability(x).equal(tiny_cldf.label_probability(x))
    with pytest.raises(CheckpointError, match="train the decoder first"):
        loaded.segment(x)


def test_weights_stored_in_half_precision_are_computed_in_float32(tiny_cldf: CLDF, run: Run) -> None:
    for name in FILES:
        path = run.path / name
        save_file({key: value.half() for key, value in load_file(path).items()}, path)
    loaded = run.load()
    assert {parameter.dtype for parameter in loaded.unet.parameters()} == {torch.float32}
    x = torch.rand(2, 2, 16, 16) * 2 - 1
    assert loaded.segment(x).probability.dtype == torch.float32
    torch.testing.assert_close(loaded.label_probability(x), tiny_cldf.label_probability(x), rtol=0, atol=0.02)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def scribble(path: Path) -> None:
    path.write_bytes(b"\x00not a file of weights" * 5)


# A decoder may be missing: it is trained last.
@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in FILES for damage in (truncate, scribble)]
    + [(name, Path.unlink) for name in FILES if name != "decoder.safetensors"],
)
def test_a_missing_or_damaged_file_is_named_in_one_sentence(run: Run, name: str, damage: Any) -> None:
    damage(run.path / name)
    with pytest.raises(CheckpointError, match=rf"{name}: (can't be read|is missing)") as caught:
        run.load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("cdm", {"cdm": {"network": {"model_channels": 16}}}),
        ("classifier", {"classifier": {"network": {"num_res_blocks": 2}}}),
        ("decoder", {"decoder": {"hidden": 24}}),
        ("prototypes", {"decoder": {"embedding": 8}}),
    ],
)
def test_weights_of_another_network_are_refused(tiny_cldf: CLDF, run: Run, name: str, change: dict[str, Any]) -> None:
    if name == "prototypes":
        assert tiny_cldf.decoder is not None
        run.save_decoder(tiny_cldf.decoder, Prototypes(torch.zeros(4, 2, 5), torch.zeros(4), 0.1), torch.zeros(3))
    else:
        values = tiny_cldf.config.model_dump()
        section = next(iter(change))
        inner = change[section]
        values[section] = {
            **values[section],
            **({"network": {**values[section]["network"], **inner["network"]}} if "network" in inner else inner),
        }
        run.create(make_config(values), RECORD)
    with pytest.raises(CheckpointError, match=rf"{name}\.safetensors: does not fit") as caught:
        run.load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cdm", "classifier"])
def test_a_decoder_of_other_networks_is_refused(tiny_cldf: CLDF, run: Run, name: str) -> None:
    network = tiny_cldf.unet if name == "cdm" else tiny_cldf.classifier
    with torch.no_grad():
        next(network.parameters()).add_(0.5)
    run.save_network(name, network)
    with pytest.raises(CheckpointError, match=rf"{name}.safetensors is not the one that the decoder was trained with"):
        run.load()
    assert run.load(decoder=False).decoder is None


def configured(run: Run, section: str, key: str, value: Any) -> Run:
    values = run.config().model_dump()
    values[section][key] = value
    run.create(make_config(values), RECORD)
    return run


@pytest.mark.parametrize(
    ("section", "key", "value", "network", "sentence"),
    [
        ("diffusion", "schedule", "cosine", "cdm", "diffusion.schedule linear, which is cosine now"),
        ("diffusion", "timesteps", 500, "cdm", "diffusion.timesteps 1000, which is 500 now"),
        ("features", "condition", "null", "decoder", "features.condition label, which is null now"),
        ("features", "noise_levels", [0.4], "decoder", r"features.noise_levels \[.+\], which is \[0.4\] now"),
    ],
)
def test_networks_do_not_serve_under_other_settings(
    run: Run, section: str, key: str, value: Any, network: str, sentence: str
) -> None:
    configured(run, section, key, value)
    sentence = rf"{network}\.safetensors: does not fit config.yaml: trained with {sentence}; set it back, or train the"
    with pytest.raises(CheckpointError, match=sentence):
        run.load()
    assert run.has_decoder(0) == (network == "cdm")  # which is seen first


def test_settings_that_change_nothing_learnt_are_free(tiny_cldf: CLDF, run: Run) -> None:
    for section, key, value in (("features", "store", "int8"), ("segmentation", "average_views", True)):
        configured(run, section, key, value)
    assert run.load().decoder is not None
    for name in ("cdm", "classifier", "decoder"):  # a run of before this was recorded
        weights = load_file(run.path / f"{name}.safetensors")
        save_file(weights, run.path / f"{name}.safetensors")
    save_file(load_file(run.path / "prototypes.safetensors"), run.path / "prototypes.safetensors")
    configured(run, "features", "noise_levels", [0.02, 0.4])
    assert run.load().decoder is not None


def test_a_decoder_that_was_replaced_alone_is_refused(tiny_cldf: CLDF, run: Run) -> None:
    """As a kill between its two files leaves it."""
    prototypes = (run.path / "prototypes.safetensors").read_bytes()
    assert tiny_cldf.decoder is not None
    assert tiny_cldf.prototypes is not None
    with torch.no_grad():
        next(tiny_cldf.decoder.parameters()).add_(1)
    run.save_decoder(tiny_cldf.decoder, tiny_cldf.prototypes, tiny_cldf.label_threshold)
    assert run.has_decoder(0)
    (run.path / "prototypes.safetensors").write_bytes(prototypes)
    assert not run.has_decoder(0)
    with pytest.raises(CheckpointError, match=r"decoder.safetensors is not the one that the prototypes were made with"):
        run.load()


def test_a_record_holds_the_window_of_training(tiny_cldf: CLDF, tmp_path: Path) -> None:
    run, file = Run(tmp_path / "run"), tmp_path / "run" / "dataset.json"
    run.create(tiny_cldf.config, DatasetRecord(RECORD.class_names, RECORD.channel_names, window=(-150.0, 250.0)))
    assert run.record().window == (-150.0, 250.0)
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | {"window": [3, 1]}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"dataset\.json: can't be read \(window: expected two finite numbers"):
        run.record()
    del content["window"]
    file.write_text(json.dumps(content), encoding="utf-8")
    assert run.record().window is None
    # As runs of before, which have what was asked for.
    for options, window in (({"window": [-20, 80]}, (-20.0, 80.0)), ({"modality": "ct"}, (-150.0, 250.0))):
        data = {"dataset": "chaos", "size": 16, "options": options}
        save_config(make_config(tiny_cldf.config.model_dump() | {"data": data}), run.path / "config.yaml")
        assert run.record().window == window


def test_decoders_of_further_seeds_are_kept_apart(tiny_cldf: CLDF, run: Run) -> None:
    assert tiny_cldf.decoder is not None
    assert tiny_cldf.prototypes is not None
    assert run.has_decoder(0)
    assert not run.has_decoder(2)
    moved = Prototypes(tiny_cldf.prototypes.vectors.flip(0), tiny_cldf.prototypes.bias, 0.2)
    run.save_decoder(tiny_cldf.decoder, moved, torch.full((3,), 0.7), seed=2)
    assert run.has_decoder(2)
    own, further = run.load(), run.load(seed=2)
    assert own.prototypes is not None
    assert further.prototypes is not None
    torch.testing.assert_close(own.prototypes.vectors, tiny_cldf.prototypes.vectors)
    torch.testing.assert_close(further.prototypes.vectors, moved.vectors)
    assert further.label_threshold.tolist() == pytest.approx([0.7] * 3)
    run.save_network("classifier", torch.nn.Linear(2, 2))
    assert not run.has_decoder(2)
    run.drop_further_decoders()
    assert not (run.path / "decoder-seed-2").exists()
    assert (run.path / "decoder.safetensors").exists()


def test_prototypes_without_their_parts_are_refused(run: Run) -> None:
    save_file({"vectors": torch.zeros(4, 2, 8)}, run.path / "prototypes.safetensors")
    with pytest.raises(CheckpointError, match=r"prototypes\.safetensors: does not fit"):
        run.load()


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no run directory \(config\.yaml is missing\)"):
        Run(tmp_path).load()


@pytest.mark.parametrize("content", [None, "{", "[]", json.dumps({"class_names": ["a"]}), "3"])
def test_a_damaged_record_is_named(run: Run, content: str | None) -> None:
    path = run.path / "dataset.json"
    path.unlink()
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"dataset\.json: can't be read"):
        run.load()


def test_writing_leaves_no_temporary_files(run: Run) -> None:
    assert sorted(path.name for path in run.path.iterdir()) == sorted(("config.yaml", "dataset.json", *FILES))
