"""The report of an install: complete, honest about what is absent, and possible where little is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import cldf_fast
from cldf_fast import doctor
from cldf_fast.ops import BACKENDS, _native


def _section(text: str, title: str) -> list[str]:
    """The lines below a title of the rendered report."""
    (block,) = [block for block in text.split("\n\n") if block.startswith(title)]
    return [line.strip() for line in block.splitlines()[1:]]


def test_report_is_json_and_names_what_runs() -> None:
    report = doctor.collect()
    assert json.loads(json.dumps(report)) == report
    assert report["versions"]["cldf_fast"] == cldf_fast.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["cpu"]["cores"] >= 1
    assert bool(report["cuda"]["devices"]) == torch.cuda.is_available() == (not report["cuda"]["reason"])


def test_every_operation_and_every_backend_is_accounted_for() -> None:
    report = doctor.collect()
    assert {"pixel_infonce", "sample_anchors", "noised_batch", "gradient_saliency", "fuse_evidence"} <= set(
        report["backends"]
    )
    for op, states in report["backends"].items():
        assert tuple(states) == BACKENDS
        assert states["reference"] == "serving", op
        assert all(states.values()), op


def test_extension_is_described_or_its_absence_explained() -> None:
    native = doctor.collect()["native"]
    assert bool(native["record"]) == (_native.module is not None) == (not native["reason"])


def test_reason_recorded_by_the_build_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "module", None)
    monkeypatch.setattr(_native, "reason", "not built")
    record = tmp_path / "_C.txt"
    monkeypatch.setattr(doctor, "_LEFT_OUT", record)
    assert doctor.collect()["native"] == {"record": {}, "reason": "not built"}
    record.write_text("no C++ compiler: 'g++' was not found\n", encoding="utf-8")
    report = doctor.collect()
    assert _section(doctor.render(report), "Compiled extension") == [
        "left out by the build: no C++ compiler: 'g++' was not found"
    ]


def test_absent_packages_are_listed_with_the_extra_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_installed(name: str) -> str:
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", nothing_installed)
    lines = _section(doctor.render(doctor.collect()), "Optional packages")
    assert len(lines) == len(doctor.OPTIONAL)
    for line, (name, extra) in zip(lines, doctor.OPTIONAL.items(), strict=True):
        assert line.split()[0] == name
        assert line.endswith(f"comes with the extra [{extra}]" if extra else "installs from its vendor's index")


def _report(**changes: Any) -> dict[str, Any]:
    return doctor.collect() | changes


def test_devices_are_rendered_one_a_line() -> None:
    devices = [{"name": f"GPU {i}", "capability": "9.0", "memory_gib": 79.6} for i in range(2)]
    text = doctor.render(_report(cuda={"version": "13.0", "reason": "", "devices": devices}))
    lines = _section(text, "Devices")
    assert len(lines) == 3
    assert lines[2].startswith("cuda:1")
    assert lines[2].endswith("GPU 1, compute capability 9.0, 80 GiB")


def test_choice_of_backends_and_their_objections_are_rendered() -> None:
    states = {
        "one": {"cuda": "no device", "triton": "serving", "cpu": "serving", "reference": "serving"},
        "two": {"cuda": "no device", "triton": "no kernel", "cpu": "no kernel", "reference": "serving"},
        "three": {"cuda": "no device", "triton": "no", "cpu": "no", "reference": "no"},
    }
    text = doctor.render(_report(backends=states))
    choices = dict(line.split() for line in _section(text, "Operations"))
    assert choices == {"one": "triton", "two": "reference", "three": "none"}
    objections = _section(text, "Why not the others")
    assert "cuda: no device" in objections
    assert "cpu: no kernel (two)" in objections


def test_nothing_to_object_to_is_said() -> None:
    text = doctor.render(_report(backends={"one": dict.fromkeys(BACKENDS, "serving")}))
    assert _section(text, "Why not the others") == ["every backend serves every operation"]
