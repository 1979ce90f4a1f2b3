"""Studies of another modality, or of pixels of another size, than the training images: warned of, or refused."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from typer.testing import CliRunner

from cldf_fast import cases
from cldf_fast.cli import app
from cldf_fast.data.acquisition import Acquisition
from cldf_fast.data.base import SliceDataset, Study, StudyRef
from cldf_fast.data.geometry import Geometry
from cldf_fast.data.stacks import read_stack
from cldf_fast.deploy import export as exporting
from cldf_fast.deploy.manifest import seal
from cldf_fast.deploy.ood import Judgement
from cldf_fast.deploy.prediction import Outcome, predict
from cldf_fast.deploy.predictor import Predictor
from cldf_fast.errors import DataError, IntegrityError
from cldf_fast.run import Run
from tests.data.test_volumes import SAGITTAL, at, save_image, save_nifti, save_series
from tests.deploy.bright import write_bright_engine
from tests.deploy.conftest import a_study
from tests.test_run import RECORD


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def series(tmp_path: Path, rng: np.random.Generator) -> Callable[..., str]:
    """Writes a CT series of 20 x 24 pixels of 0.8 x 0.7 mm: 1 mm and 1.05 mm at 16 pixels."""
    pytest.importorskip("highdicom")
    number = itertools.count()

    def save(orientation: Sequence[float] = (1, 0, 0, 0, 1, 0), **edits: Any) -> str:
        folder = tmp_path / f"series{next(number)}"
        pixels = rng.integers(0, 4000, (5, 20, 24), dtype=np.uint16)
        return str(save_series(folder, pixels, orientation=orientation, edit=at(-1, **edits) if edits else None))

    return save


def outcome(tmp_path: Path, source: str, acquisition: dict[str, Any] | None, ood: str = "warn") -> Outcome:
    for number in itertools.count():
        folder = tmp_path / f"engine{number}"
        if not folder.exists():
            break
    predictor = Predictor(write_bright_engine(folder, acquisition=acquisition), threads=1)
    (found,) = predict(predictor, [source], folder.with_name(f"{folder.name}-out"), ood=ood)
    return found


def codes(found: Outcome) -> list[str]:
    return [warning["code"] for warning in found.warnings]


MR: dict[str, Any] = {"modality": "MR", "pixel_mm": None}


# Modality


def test_another_modality_is_warned_of_or_refused(tmp_path: Path, series: Callable[..., str]) -> None:
    ct, mr = series(), series(Modality="MR")
    for ood in ("accept", "warn"):
        found = outcome(tmp_path, ct, MR, ood)
        assert (found.status, codes(found)) == ("done", ["other_modality"])
        assert found.warnings[0]["reason"] == (
            f"{ct}: modality CT by its headers, but the networks were trained on MR; give a study of that modality"
        )
    found = outcome(tmp_path, ct, MR, "refuse")
    assert (found.status, found.code, found.files) == ("refused", "wrong_modality", [])
    assert found.reason.startswith(f"{ct}: modality CT by its headers")
    assert found.reason.endswith("or use --ood warn")
    for ood in ("accept", "warn", "refuse"):
        found = outcome(tmp_path, mr, MR, ood)
        assert (found.status, codes(found)) == ("done", [])


def test_what_is_not_known_is_not_checked(tmp_path: Path, rng: np.random.Generator, series: Callable[..., str]) -> None:
    ct, untold = series(), series(Modality=None)
    for acquisition in (None, {"modality": None, "pixel_mm": None}):
        assert codes(outcome(tmp_path, ct, acquisition, "refuse")) == []
    (tmp_path / "others").mkdir()
    nifti = save_nifti(tmp_path / "others/a.nii", rng.normal(size=(5, 6, 4)), np.diag([-1.0, -1, 1, 1]))
    save_image(tmp_path / "others/a.png", "L")
    for source in (untold, str(nifti), str(tmp_path / "others/a.png")):
        assert codes(outcome(tmp_path, source, MR, "refuse")) == []


def test_no_text_of_a_header_gets_out(tmp_path: Path, series: Callable[..., str]) -> None:
    for stated in ("JANE DOE", ["CT", "JANE DOE"]):
        found = outcome(tmp_path, series(Modality=stated), MR)
        assert codes(found) == ["other_modality"]
        assert "JANE" not in found.warnings[0]["reason"]
        assert "modality OT by its headers" in found.warnings[0]["reason"]


def test_each_channel_counts(series: Callable[..., str]) -> None:
    stack = cases.read_case(f"{series(Modality='MR')},{series()}", 2)
    assert stack.modalities == ("MR", "CT")
    for modality, other in (("MR", "CT"), ("CT", "MR")):
        (doubt,) = Acquisition(modality).doubts(stack, 16)
        assert f"modality {other} by its headers" in str(doubt)


# What a SEG says of it


def descriptions(folder: Path, found: Sequence[str | Path]) -> set[str]:
    """Of content and series, in all the files."""
    headers = [pydicom.dcmread(folder / file) for file in found]
    assert len(headers) == 2
    assert {header.ContentQualification for header in headers} == {"RESEARCH"}
    return {text for header in headers for text in (header.ContentDescription, header.SeriesDescription)}


@pytest.mark.parametrize(
    ("status", "modality", "ood", "warned"),
    [
        ("accept", "CT", "warn", False),
        ("warn", "CT", "warn", True),
        ("warn", "CT", "refuse", True),
        ("refuse", "CT", "warn", True),
        ("refuse", "CT", "accept", False),
        (None, "CT", "warn", False),
        (None, "MR", "warn", True),
        ("accept", "MR", "warn", True),
    ],
)
def test_a_seg_says_that_it_was_warned_of(
    tmp_path: Path,
    series: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    status: str | None,
    modality: str,
    ood: str,
    warned: bool,
) -> None:
    judgement = None if status is None else Judgement(status, {"intensity": 3.0}, {"intensity": 1.0}, {})
    monkeypatch.setattr(Predictor, "judge", lambda *_: judgement)
    engine = write_bright_engine(tmp_path / "engine", acquisition={"modality": modality, "pixel_mm": None})
    (found,) = predict(Predictor(engine, threads=1), [series()], tmp_path / "out", ood=ood, probability=True)
    assert found.reason == ""
    (text,) = descriptions(tmp_path / "out", found.files)
    assert ("unlike training images" in text) == warned
    assert text.startswith("Research only, not")
    assert "diagnostic" in text
    assert len(text) <= 64  # the standard's most
    case = Predictor(engine, threads=1).predict(series(), tmp_path / "alone", ood=ood, probability=True)
    assert descriptions(tmp_path, case.files) == {text}


# Pixel size


@pytest.mark.parametrize(
    ("pixel_mm", "fits"),
    [
        ((1.0, 1.05), True),
        ((0.6, 0.6), True),
        ((0.525, 0.525), False),  # exactly half of the longer side
        ((0.1, 0.5), False),
        ((0.1, 0.6), True),
        ((1.9, 5.0), True),
        ((2.0, 2.0), False),  # exactly twice the shorter side
        ((2.5, 5.0), False),
        ((0.1, 9.0), True),
    ],
)
def test_pixels_twice_as_large_or_half_as_large_are_warned_of(
    tmp_path: Path, series: Callable[..., str], pixel_mm: tuple[float, float], fits: bool
) -> None:
    source = series()
    found = outcome(tmp_path, source, {"modality": "CT", "pixel_mm": list(pixel_mm)}, "refuse")
    assert (found.status, codes(found)) == ("done", [] if fits else ["other_pixel_size"])
    if not fits:
        assert found.warnings[0]["reason"].startswith(
            f"{source}: pixels of 1 x 1.05 mm at the working size, but the networks were trained on {pixel_mm[0]:.3g} "
            f"to {pixel_mm[1]:.3g} mm; check the spacing"
        )


def test_it_is_the_size_that_networks_see(tmp_path: Path, rng: np.random.Generator) -> None:
    """An image of twice the pixels in the same field of view is nothing new; a quarter of the field of view is."""
    acquisition = Acquisition(None, (1.0, 1.0))
    finer = save_nifti(tmp_path / "finer.nii", rng.normal(size=(32, 32, 3)), np.diag([-0.5, -0.5, 2, 1]))
    assert list(acquisition.doubts(read_stack(finer), 16)) == []
    part = save_nifti(tmp_path / "part.nii", rng.normal(size=(8, 8, 3)), np.diag([-1.0, -1, 2, 1]))
    assert [doubt.code for doubt in acquisition.doubts(read_stack(part), 16)] == ["other_pixel_size"]
    # Along slices it does not count: networks see one at a time.
    thick = save_nifti(tmp_path / "thick.nii", rng.normal(size=(16, 16, 3)), np.diag([-1.0, -1, 20, 1]))
    assert list(acquisition.doubts(read_stack(thick), 16)) == []


def test_a_turned_series_is_measured_as_it_is_seen(tmp_path: Path, series: Callable[..., str]) -> None:
    """Of 5 sagittal slices, 2 mm apart, networks see 20 axial ones of 24 x 5 pixels."""
    found = outcome(tmp_path, series(SAGITTAL), {"modality": "CT", "pixel_mm": [0.6, 1.0]})
    assert codes(found) == []
    found = outcome(tmp_path, series(SAGITTAL), {"modality": "CT", "pixel_mm": [1.3, 2.0]})
    assert "pixels of 1.05 x 0.625 mm" in found.warnings[0]["reason"]


# Where it comes from


def test_the_range_is_that_of_all_studies_that_tell() -> None:
    def grid(*spacing: float) -> Geometry:
        return Geometry(np.diag([*spacing, 1.0]), physical=True)

    grids = [(grid(5, 1, 2), (32, 16)), (grid(1, 0.5, 0.5), (16, 48)), (Geometry(), (999, 999))]
    assert Acquisition.of("CT", grids, 16) == Acquisition("CT", (0.5, 2.0))
    assert Acquisition.of(None, grids[2:], 16) == Acquisition()


@pytest.mark.parametrize("acquisition", [Acquisition(), Acquisition("MR", (0.5, 2.0)), Acquisition(None, (1.0, 1.0))])
def test_what_is_read_is_what_was_written(acquisition: Acquisition) -> None:
    assert Acquisition.from_json(json.loads(json.dumps(acquisition.to_json()))) == acquisition


@pytest.mark.parametrize(
    "content",
    [
        {"modality": "MR"},
        {"modality": 3, "pixel_mm": None},
        {"modality": None, "pixel_mm": [1.0]},
        {"modality": None, "pixel_mm": [2.0, 1.0]},
        {"modality": None, "pixel_mm": [0.0, 1.0]},
        {"modality": None, "pixel_mm": ["a", "b"]},
        [],
        "MR",
    ],
)
def test_what_no_export_writes_is_refused(tmp_path: Path, content: Any) -> None:
    engine = write_bright_engine(tmp_path / "engine", acquisition=content)
    with pytest.raises(IntegrityError, match="are not what `cldf-fast export` writes"):
        Predictor(engine).load()


@pytest.mark.parametrize(("modality", "patients"), [("MR", 2), (None, 1)])
def test_an_export_knows_what_its_data_set_tells(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modality: str | None, patients: int
) -> None:
    """Of the training part alone; also where there are too few validation studies for a score."""

    def part(name: str, count: int, spacing: float) -> SliceDataset:
        def read(number: int) -> Study:
            study = a_study(f"{name}{number}")
            affine = np.diag([5.0, spacing, spacing * (1 + number), 1.0])
            return Study(**{**vars(study), "geometry": Geometry(affine, physical=modality is not None)})

        refs = [StudyRef(f"{name}{i}", f"{name}{i}", 6, lambda i=i: read(i)) for i in range(count)]  # type: ignore[misc]
        return SliceDataset(refs, RECORD.class_names, RECORD.channel_names, modality=modality)

    parts = {"train": part("t", 3, 0.5), "val": part("v", patients, 100.0)}
    monkeypatch.setattr(exporting, "open_parts", lambda config, data, run: parts)
    exporting.export(run, tmp_path / "engine", precisions=("float32",), data=tmp_path)
    expected = Acquisition() if modality is None else Acquisition("MR", (0.5, 1.5))
    assert Predictor(tmp_path / "engine").load().acquisition == expected
    card = (tmp_path / "engine/MODEL_CARD.md").read_text(encoding="utf-8")
    if modality is None:
        assert card.count("not known: the data set does not tell, or the run is older than such records.") == 2
    else:
        assert "- Modality: MR. DICOM of another is warned of" in card
        assert "- Pixel size: 0.5 to 1.5 mm at 16 x 16 pixels." in card


def test_without_its_data_set_an_export_knows_what_the_run_does(run: Run, tmp_path: Path) -> None:
    copied = Run(Path(shutil.copytree(run.path, tmp_path / "run")))
    record = json.loads((copied.path / "dataset.json").read_text(encoding="utf-8"))
    record["acquisition"] = {"modality": "CT", "pixel_mm": [0.7, 1.3]}
    (copied.path / "dataset.json").write_text(json.dumps(record), encoding="utf-8")
    exporting.export(copied, tmp_path / "engine", precisions=("float32",))
    assert Predictor(tmp_path / "engine").load().acquisition == Acquisition("CT", (0.7, 1.3))


def test_a_directory_of_before_loads(engine: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(engine, tmp_path / "engine"))
    content = json.loads((copied / "preprocessing.json").read_text(encoding="utf-8"))
    assert Acquisition.from_json(content.pop("acquisition")) == Acquisition(None, (1.0, 1.0))
    (copied / "preprocessing.json").write_text(json.dumps(content), encoding="utf-8")
    seal(copied, engines={})
    found, now = Predictor(copied).load(), Predictor(engine).load()
    assert (found.acquisition, now.acquisition) == (Acquisition(), Acquisition(None, (1.0, 1.0)))
    x = (torch.rand(2, 2, 16, 16) * 2 - 1).numpy()
    assert (Predictor(copied).segment(x).mask == Predictor(engine).segment(x).mask).all()


def test_predict_prints_it(tmp_path: Path, series: Callable[..., str]) -> None:
    engine, ct = write_bright_engine(tmp_path / "engine", acquisition=MR), series()
    result = CliRunner().invoke(app, ["predict", str(engine), ct, "--out", str(tmp_path / "o")])
    assert result.exit_code == 0, result.output
    assert f"warning (other_modality): {ct}: modality CT by its headers" in result.output
    result = CliRunner().invoke(app, ["predict", str(engine), ct, "--out", str(tmp_path / "p"), "--ood", "refuse"])
    assert result.exit_code == 3, result.output
    assert f"refused (wrong_modality): {ct}:" in result.output
    with pytest.raises(DataError, match="modality CT by its headers") as error:
        Predictor(engine).predict(ct, tmp_path / "alone", ood="refuse")
    assert error.value.code == "wrong_modality"
    assert not (tmp_path / "alone").exists()
