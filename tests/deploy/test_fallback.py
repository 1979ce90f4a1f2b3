"""Where no engine can be loaded: fail, build it again, or ONNX Runtime, as was asked and never in silence. No GPU."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cldf_fast.cli import app
from cldf_fast.deploy import tensorrt
from cldf_fast.deploy.manifest import EngineKey, open_sealed, operating_system, seal
from cldf_fast.deploy.prediction import predict
from cldf_fast.deploy.predictor import Predictor
from cldf_fast.deploy.runtime import OnnxSession
from cldf_fast.deploy.tensorrt import Batches, Engine, TensorRTSession
from cldf_fast.errors import BackendError, ConfigError, EngineMismatchError, IntegrityError, ParityError
from tests.deploy.conftest import a_study, write_study


class Gpu:
    """A machine whose GPU and TensorRT are none: what an engine computes, ONNX Runtime does."""

    def __init__(self) -> None:
        self.name, self.capability = "Fake GPU", "8.6"
        self.built: list[tuple[Batches, tuple[str, ...]]] = []
        self.live = 0
        self.wrong = False
        self.served = ["8.6", "12.0"]

    def build(self, onnx: bytes, *, flavour: str, batches: Batches, compute_capabilities: Any) -> Engine:
        self.built.append((batches, tuple(compute_capabilities)))
        return Engine(onnx, {}, ())

    def session(self, plan: bytes, *_: Any) -> Any:
        gpu, inner = self, OnnxSession(plan)

        class Session:
            max_batch, backend = 4, "tensorrt"

            def __call__(self, inputs: Any) -> Any:
                outputs = inner(inputs)
                return {name: 1 - values if gpu.wrong else values for name, values in outputs.items()}

            def close(self) -> None:
                gpu.live -= 1

        self.live += 1
        return Session()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    module = type("Module", (), {"__version__": "11.4", "__name__": "tensorrt"})
    monkeypatch.setattr(tensorrt, "library", lambda flavour: module)
    monkeypatch.setattr(tensorrt, "capabilities", lambda flavour: gpu.served)
    monkeypatch.setattr(tensorrt, "Cuda", lambda: gpu)
    monkeypatch.setattr(tensorrt, "build", gpu.build)

    class Session(TensorRTSession):
        def __new__(cls, *arguments: Any) -> Any:
            return gpu.session(*arguments)

    monkeypatch.setattr(tensorrt, "TensorRTSession", Session)
    return gpu


@pytest.fixture
def elsewhere(engine: Path, tmp_path: Path) -> Path:
    """A directory with engines for another GPU."""
    folder = Path(shutil.copytree(engine, tmp_path / "engine"))
    (folder / "engines").mkdir()
    files = open_sealed(engine).manifest.files
    keys = {}
    for name in ("segmentation", "labels", "bottleneck"):
        onnx = f"{name}.float32.onnx"
        (folder / f"engines/{name}.plan").write_bytes(np.random.default_rng().bytes(99))
        keys[f"engines/{name}.plan"] = EngineKey(
            weights_sha256="0" * 64,
            onnx_sha256=files[onnx].sha256,
            precision="float32",
            opset=22,
            shapes={"image": ((2, 2, 16, 16), (3, 2, 16, 16), (5, 2, 16, 16))},
            flavour="tensorrt",
            version="11.4",
            cuda="13.0",
            compute_capability="9.0",
            gpu_name="Another",
            os=operating_system(),
            builder_flags=(),
        )
    seal(folder, engines=keys)
    return folder


def images() -> np.ndarray:
    return (np.random.default_rng().random((3, 2, 16, 16)) * 2 - 1).astype(np.float32)


def files(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_by_default_it_fails(elsewhere: Path, gpu: Gpu) -> None:
    with pytest.raises(EngineMismatchError, match=r"was built for compute capability 9\.0, not '8\.6'"):
        Predictor(elsewhere, backend="tensorrt").load()
    assert gpu.live == 0
    with pytest.raises(ConfigError, match="on_engine_error: expected one of fail, rebuild, onnx, got 'ignore'"):
        Predictor(elsewhere, on_engine_error="ignore")


def test_onnx_runs_instead_and_everything_says_so(elsewhere: Path, gpu: Gpu, tmp_path: Path) -> None:
    predictor = Predictor(elsewhere, backend="tensorrt", on_engine_error="onnx")
    with pytest.warns(
        RuntimeWarning, match=r"ONNX Runtime on the CPU in place of tensorrt, because: .*capability 9\.0"
    ):
        predictor.load()
    assert predictor.execution.backend == "onnx"
    x = images()
    assert (predictor.segment(x).mask == Predictor(elsewhere).segment(x).mask).all()
    source = write_study(a_study("any").image.numpy(), tmp_path, "any")
    list(predict(predictor, [source], tmp_path / "out"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    event = json.loads((tmp_path / "out" / "audit.jsonl").read_text(encoding="utf-8"))["event"]
    for record in (summary, event):
        assert record["backend"] == "onnx"
        assert "in place of tensorrt, because" in record["fallback"]
    command = ["predict", str(elsewhere), source, "--backend", "tensorrt", "--out", str(tmp_path / "command")]
    result = CliRunner().invoke(app, [*command, "--on-engine-error", "onnx"])
    assert result.exit_code == 0, result.output
    assert "warning: ONNX Runtime on the CPU in place of tensorrt" in result.output
    assert not gpu.built


@pytest.mark.filterwarnings("error")
def test_what_runs_as_asked_says_nothing(engine: Path) -> None:
    predictor = Predictor(engine, on_engine_error="onnx")
    assert (predictor.execution.backend, predictor.execution.fallback) == ("onnx", "")


@pytest.mark.parametrize("served", [["8.6", "12.0"], []])
def test_an_engine_is_built_again_in_memory_alone(elsewhere: Path, gpu: Gpu, served: list[str]) -> None:
    before, gpu.served = files(elsewhere), served
    with (
        pytest.warns(RuntimeWarning, match="engines were built again for this GPU, because: "),
        Predictor(elsewhere, backend="tensorrt", on_engine_error="rebuild") as predictor,
    ):
        assert predictor.execution.backend == "tensorrt"
        assert gpu.live == 3
        x = images()
        assert (predictor.segment(x).mask == Predictor(elsewhere).segment(x).mask).all()
    assert gpu.live == 0
    assert gpu.built == [(Batches(2, 3, 5), ("8.6",) if served else ())] * 3
    assert files(elsewhere) == before


def test_an_engine_that_was_built_again_and_is_wrong_is_not_used(elsewhere: Path, gpu: Gpu) -> None:
    gpu.wrong = True
    predictor = Predictor(elsewhere, backend="tensorrt", on_engine_error="rebuild")
    with pytest.raises(ParityError, match="tensorrt: the engine built for this GPU differs from PyTorch"):
        predictor.load()
    assert gpu.live == 0
    with pytest.raises(ParityError):
        predictor.segment(images())


@pytest.mark.parametrize("policy", ["rebuild", "onnx"])
def test_a_file_that_was_changed_is_never_passed_over(
    elsewhere: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    gpu.capability = "9.0"
    plan = elsewhere / "engines/labels.plan"
    data = bytearray(plan.read_bytes())
    data[7] ^= 1
    plan.write_bytes(data)
    seen: list[bytes] = []
    monkeypatch.setattr(gpu, "session", lambda plan, *_: seen.append(plan) or Closed())
    with pytest.raises(IntegrityError, match=r"labels\.plan: expected content with SHA-256"):
        Predictor(elsewhere, backend="tensorrt", on_engine_error=policy).load()
    assert not gpu.built
    assert bytes(data) not in seen


class Closed:
    def close(self) -> None:
        pass


def test_without_a_gpu_building_again_fails_too(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "library", lambda flavour: replace)
    monkeypatch.setattr(tensorrt, "Cuda", lambda: absent())
    with pytest.raises(BackendError, match="expected a GPU and its driver"):
        Predictor(elsewhere, backend="tensorrt", on_engine_error="rebuild").load()


def absent() -> None:
    raise BackendError("CUDA: expected a GPU and its driver, found none")
