"""Many studies through a predictor: what becomes of each, what is kept of earlier runs, and that nothing is lost."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cldf_fast import cases
from cldf_fast.cases import OutputFolder
from cldf_fast.deploy.audit import verify_audit
from cldf_fast.deploy.manifest import open_sealed
from cldf_fast.deploy.monai_bundle import write_monai_bundle
from cldf_fast.deploy.prediction import Part, predict
from cldf_fast.deploy.predictor import Predictor
from cldf_fast.deploy.triton_server import write_triton_repository
from cldf_fast.deploy.verification import verify
from cldf_fast.errors import CLDFError, ConfigError, DataError
from tests.deploy.conftest import write_study
from tests.test_run import RECORD


def test_predict_keeps_going_and_says_what_was_refused(engine: Path, study: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    broken = tmp_path / "Jane Doe.nii.gz"
    broken.write_bytes(b"no NIfTI")
    outcomes = list(predict(Predictor(engine), [study, str(broken), study.replace("t1", "none")], out, labels="all"))
    assert [outcome.status for outcome in outcomes] == ["done", "refused", "refused"]
    assert outcomes[0].files == ["t1_mask.nii.gz"]
    assert outcomes[0].slices == outcomes[0].slices_labelled == 7
    assert "Jane Doe.nii.gz" in outcomes[1].reason
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert [case["status"] for case in summary["cases"]] == ["done", "refused", "refused"]
    assert verify_audit(out / "audit.jsonl").entries == 3
    log = (out / "audit.jsonl").read_text(encoding="utf-8")
    assert "Jane" not in log
    assert "t1" not in log
    assert open_sealed(engine).manifest.sha256 in log
    assert {file.name for file in out.iterdir()} == {"t1_mask.nii.gz", "summary.json", "audit.jsonl", "audit.key"}


def test_a_study_is_written_while_the_next_is_segmented(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng()
    sources = [write_study(rng.gamma(2.0, 100.0, (3, 2, 16, 16)), tmp_path, name) for name in ("a", "b", "c")]
    writing, segmenting, met = threading.Event(), threading.Event(), []
    write, segment_study, count = Predictor.write, Predictor.segment_study, itertools.count()

    def slow_write(self: Predictor, *arguments: Any, **options: Any) -> Any:
        writing.set()
        met.append(segmenting.wait(60))
        return write(self, *arguments, **options)

    def waiting_segment_study(self: Predictor, *arguments: Any, **options: Any) -> Any:
        if next(count) == 1:
            segmenting.set()
            met.append(writing.wait(60))
        return segment_study(self, *arguments, **options)

    monkeypatch.setattr(Predictor, "write", slow_write)
    monkeypatch.setattr(Predictor, "segment_study", waiting_segment_study)
    outcomes = list(predict(Predictor(engine), sources, tmp_path / "out"))
    assert met == [True] * 4
    assert [outcome.source for outcome in outcomes] == sources
    assert {outcome.status for outcome in outcomes} == {"done"}
    assert not list((tmp_path / "out").glob(".partial-*"))


def test_no_study_overwrites_another_s_mask(engine: Path, study: str, tmp_path: Path) -> None:
    first = study.split(",")[0]
    (tmp_path / "other").mkdir()
    second = shutil.copyfile(study.split(",")[1], tmp_path / "other" / Path(first).name)
    out = tmp_path / "out"
    outcomes = list(predict(Predictor(engine), [first, str(second)], out, labels="all", replicate=True))
    assert [outcome.status for outcome in outcomes] == ["done", "refused"]
    assert first in outcomes[1].reason
    (alone,) = predict(Predictor(engine), [first], tmp_path / "alone", labels="all", replicate=True)
    written, expected = ((folder / alone.files[0]).read_bytes() for folder in (out, tmp_path / "alone"))
    assert written == expected
    for source in (str(second), f"{first},{second}"):
        with pytest.raises(DataError, match="is the input's own folder") as error:
            list(predict(Predictor(engine), [source], tmp_path / "other", labels="all", replicate=True))
        assert error.value.code == "input_folder"
    assert [file.name for file in (tmp_path / "other").iterdir()] == [second.name]
    assert not list(out.glob(".partial*"))


def namesakes(study: str, folder: Path) -> list[str]:
    """Two patients whose files have one name, and a third one."""
    sources = []
    for number, place in enumerate(("a/scan.nii.gz", "b/scan.nii.gz", "c/other.nii.gz")):
        (folder / place).parent.mkdir(exist_ok=True)
        sources.append(str(shutil.copyfile(study.split(",")[number % 2], folder / place)))
    return sources


def masks(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.nii.gz")}


def recorded(summary: Path) -> dict[str, str]:
    return {each["source"]: each["status"] for each in json.loads(summary.read_text(encoding="utf-8"))["cases"]}


def test_no_study_of_another_call_or_part_is_overwritten(
    engine: Path, study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = namesakes(study, tmp_path)
    out, options = tmp_path / "out", {"labels": "all", "replicate": True}
    for part in (Part(0, 2), Part(1, 2)):
        (outcome,) = predict(Predictor(engine), [first, second], out, part=part, **options)
        assert outcome.code == ("", "output_name_taken")[part.number]
    kept = masks(out)
    for sources, codes in (([second], ["output_name_taken"]), ([third, second], ["", "output_name_taken"])):
        assert [each.code for each in predict(Predictor(engine), sources, out, **options)] == codes
        assert kept.items() <= masks(out).items()
    # Records stay, and a study's own mask gives way to a newer one.
    (again,) = predict(Predictor(engine), [first], out, labels="none", replicate=True)
    assert again.status == "done"
    assert recorded(out / "summary.json") == {second: "refused", third: "done", first: "done"}
    assert recorded(out / "summary-1.json") == {second: "refused"}
    assert masks(out)["scan_mask.nii.gz"] != kept["scan_mask.nii.gz"]
    # The same words in another place are another study.
    for place, code in (("a", ""), ("b", "output_name_taken")):
        with monkeypatch.context() as patched:
            patched.chdir(tmp_path / place)
            (outcome,) = predict(Predictor(engine), ["scan.nii.gz"], out, go_on=True, **options)
        assert outcome.code == code
    # Nor is a file overwritten that nobody recorded.
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "other_mask.nii.gz").write_bytes(b"by hand")
    (refused,) = predict(Predictor(engine), [third], strange, **options)
    assert "other_mask.nii.gz is there already, and not from this study" in refused.reason
    assert masks(strange) == {"other_mask.nii.gz": b"by hand"}


def test_a_process_that_writes_at_the_same_time_is_not_overwritten(
    engine: Path, study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, out = OutputFolder.check, tmp_path / "out"

    def check_then_write(self: OutputFolder, *arguments: Any) -> None:
        check(self, *arguments)
        (out / "t1_mask.nii.gz").write_bytes(b"of another process")

    monkeypatch.setattr(OutputFolder, "check", check_then_write)
    (refused,) = predict(Predictor(engine), [study], out, labels="all")
    assert refused.code == "output_name_taken"
    assert masks(out) == {"t1_mask.nii.gz": b"of another process"}


def test_a_run_that_was_stopped_while_it_wrote_goes_on(
    engine: Path, study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, out = OutputFolder.take, tmp_path / "out"

    def take_and_stop(self: OutputFolder, *arguments: Any) -> None:
        take(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(OutputFolder, "take", take_and_stop)
        list(predict(Predictor(engine), [study], out, labels="all"))
    assert recorded(out / "summary.json") == {study: "writing"}
    assert len(masks(out)) == 1
    (outcome,) = predict(Predictor(engine), [study], out, go_on=True, labels="all")
    assert (outcome.status, outcome.left_out) == ("done", False)


def test_what_is_left_out_was_done_in_the_same_way(engine: Path, study: str, tmp_path: Path) -> None:
    first, _, third = namesakes(study, tmp_path)
    out, options = tmp_path / "out", {"labels": "all", "replicate": True}
    list(predict(Predictor(engine), [first], out, **options))
    # Other numbers of parts, and other lists, know of it.
    outcomes = list(predict(Predictor(engine), [first], out, part=Part(0, 3), go_on=True, **options))
    assert [each.left_out for each in outcomes] == [True]
    assert [each.left_out for each in predict(Predictor(engine), [third, first], out, go_on=True, **options)] == [
        False,
        True,
    ]
    before = masks(out)
    for change in ({"labels": "none"}, {"probability": True}, {"ood": "accept"}):
        (outcome,) = predict(Predictor(engine), [first], out, go_on=True, **(options | change))
        assert not outcome.left_out
        assert (masks(out) == before) == ("ood" in change)
        assert (out / "scan_probability.nii.gz").exists() == ("probability" in change)
    # What is refused leaves what was there, and whose it is.
    (outcome,) = predict(Predictor(engine), [first], out, labels="all")
    assert (outcome.code, outcome.files) == ("wrong_channels", ["scan_mask.nii.gz"])
    (outcome,) = predict(Predictor(engine, precision="float16"), [first], out, go_on=True, **options)
    assert (outcome.status, outcome.left_out) == ("done", False)
    assert recorded(out / "summary.json") == {first: "done", third: "done"}


def test_one_bad_input_does_not_stop_the_others(
    engine: Path, study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, locked, long = cases.read_stack, tmp_path / "locked", tmp_path / f"{'x' * 245}.nii.gz"

    def read_unless_locked(path: Path) -> Any:
        if path == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(cases, "read_stack", read_unless_locked)
    shutil.copyfile(study.split(",")[0], long)
    # Together longer than a path may be.
    channels = f"{'y' * 150}_a.nii.gz,{'y' * 150}_b.nii.gz"
    sources = [channels, str(locked), str(long), study]
    outcomes = list(predict(Predictor(engine), sources, tmp_path / "out", labels="all", replicate=True))
    assert [each.code for each in outcomes] == ["missing_file", "unreadable", "name_too_long", ""]
    assert outcomes[1].reason == f"{locked}: can't be read (Permission denied)"
    for source in ("", "a.nii, ", []):
        with pytest.raises(DataError, match="source: expected a path, or one for each channel, got"):
            cases.read_case(source, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "lesions"}, "labels: expected 'all', 'none' or names of liver, kidneys, spleen, got 'lesions'"),
        ({"labels": ""}, "labels: expected 'all', 'none' or names of"),
        ({"window": (5, 1)}, r"window: expected two finite numbers, low < high, got \(5, 1\)"),
        ({"window": (0, float("inf"))}, "window: expected two finite numbers"),
    ],
)
def test_arguments_are_checked_before_any_study(
    engine: Path, study: str, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CLDFError, match=message):
        next(predict(Predictor(engine), [study], tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_into_a_sealed_directory(copied: Path, study: str) -> None:
    for out in (copied, copied / "masks"):
        for write in (
            lambda out: list(predict(Predictor(copied), [study], out)),
            lambda out: Predictor(copied).predict(study, out),
            lambda out: write_triton_repository(copied, out),
            lambda out: write_monai_bundle(copied, out),
        ):
            with pytest.raises(ConfigError, match="out: expected a folder outside of the engine directory"):
                write(out)
    assert verify(copied).passed


def test_a_part_without_studies_says_so(engine: Path, study: str, tmp_path: Path) -> None:
    assert list(predict(Predictor(engine), [study], tmp_path, part=Part(4, 5))) == []
    assert recorded(tmp_path / "summary-4.json") == {}


def test_a_study_comes_as_people_hold_it(engine: Path, study: str, tmp_path: Path) -> None:
    predictor, paths = Predictor(engine), [Path(path) for path in study.split(",")]
    expected = predictor.predict(study, tmp_path / "text", labels="all").files[0].read_bytes()
    for source in (paths, tuple(map(str, paths)), ", ".join(map(str, paths)), predictor.read(paths)):
        case = predictor.predict(source, tmp_path / "out", labels=list(RECORD.class_names))
        assert case.files[0].read_bytes() == expected
    assert predictor.read(paths[0], replicate=True).image.shape[1] == 2
    for source in (7, [1, 2], np.zeros(3)):
        with pytest.raises(DataError, match="source: expected a path, or a list of one for each channel, got"):
            predictor.predict(source, tmp_path / "out")


def test_parts_share_the_studies_and_an_interrupted_run_goes_on(engine: Path, study: str, tmp_path: Path) -> None:
    out, sources = tmp_path / "out", []
    for name in "abc":
        shutil.copyfile(study.split(",")[0], tmp_path / f"{name}.nii.gz")
        sources.append(str(tmp_path / f"{name}.nii.gz"))
    for part in (Part(0, 2), Part(1, 2)):
        list(predict(Predictor(engine), sources, out, part=part, labels="all", replicate=True))
    masks = sorted(file.name for file in out.glob("*.nii.gz"))
    assert masks == ["a_mask.nii.gz", "b_mask.nii.gz", "c_mask.nii.gz"]
    (out / "c_mask.nii.gz").unlink()
    kept = (out / "a_mask.nii.gz").stat().st_mtime_ns
    outcomes = list(predict(Predictor(engine), sources, out, part=Part(0, 2), go_on=True, labels="all", replicate=True))
    assert [outcome.status for outcome in outcomes] == ["done", "done"]
    assert (out / "a_mask.nii.gz").stat().st_mtime_ns == kept
    assert (out / "c_mask.nii.gz").exists()
    assert verify_audit(out / "audit.jsonl").entries == 4
    with pytest.raises(ConfigError, match="part: expected a number from 0 to 1, got 2"):
        Part(2, 2)
