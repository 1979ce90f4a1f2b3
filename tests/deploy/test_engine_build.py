"""How engines are built, on a TensorRT that is none: precision, shapes, the timing cache. No GPU.

TensorRT for RTX itself builds in tests/deploy/test_export.py.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cldf_fast.deploy import tensorrt
from cldf_fast.deploy.tensorrt import Batches, TimingCache, build
from cldf_fast.errors import BackendError, ConfigError


class Times:
    """A timing cache that begins with who measured, as TensorRT's does."""

    owner = b"gpu A|"

    def __init__(self, data: bytes) -> None:
        self.data = data or self.owner

    def serialize(self) -> memoryview:
        return memoryview(self.data)


class BuilderConfig:
    def __init__(self) -> None:
        self.flags = {"TF32"}
        self.profiles: list[dict[str, Any]] = []
        self.times: Times | None = None

    def clear_flag(self, flag: str) -> None:
        self.flags.remove(flag)

    def add_optimization_profile(self, profile: Any) -> None:
        self.profiles.append(profile.shapes)

    def create_timing_cache(self, data: bytes) -> Times | None:
        return None if data.startswith(b"broken") else Times(data)

    def set_timing_cache(self, times: Times, ignore_mismatch: bool) -> bool:
        self.times = times
        return ignore_mismatch or times.data.startswith(Times.owner)

    def get_timing_cache(self) -> Times | None:
        return self.times


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        self.shapes[name] = shapes


class FakeTensorRT:
    """Of a version 10 or 11. `measured`: kernels that a build had to time. `configs`: of all builds."""

    def __init__(self, version: str) -> None:
        self.measured: list[str] = []
        self.configs: list[BuilderConfig] = []
        self.network_flags: list[int] = []
        self.fails = False
        flag = {"STRONGLY_TYPED": 1} if version.startswith("10") else {}
        severity = SimpleNamespace(ERROR="ERROR", INTERNAL_ERROR="INTERNAL")
        self.module = SimpleNamespace(
            __name__="tensorrt",
            __version__=version,
            ILogger=type("ILogger", (), {"Severity": severity}),
            NetworkDefinitionCreationFlag=SimpleNamespace(**flag),
            BuilderFlag=SimpleNamespace(TF32="TF32"),
            Builder=self._builder,
            OnnxParser=self._parser,
        )

    def _builder(self, logger: Any) -> Any:
        def create_network(flags: int) -> Any:
            self.network_flags.append(flags)
            image = SimpleNamespace(name="image", shape=(-1, 2, 16, 16))
            noise = SimpleNamespace(name="noise", shape=(-1, 1, 3, 2, 16, 16))
            return SimpleNamespace(num_inputs=2, get_input=[image, noise].__getitem__)

        def create_builder_config() -> BuilderConfig:
            self.configs.append(BuilderConfig())
            return self.configs[-1]

        def build_serialized_network(network: Any, config: BuilderConfig) -> bytes | None:
            if self.fails:
                logger.log("ERROR", "out of workspace")
                return None
            for kernel in network.onnx.decode().split():
                if config.times is None or kernel.encode() not in config.times.data:
                    self.measured.append(kernel)
                if config.times is not None:
                    config.times.data += b" " + kernel.encode()
            return b"plan of " + network.onnx

        return SimpleNamespace(
            create_network=create_network,
            create_builder_config=create_builder_config,
            create_optimization_profile=Profile,
            build_serialized_network=build_serialized_network,
        )

    def _parser(self, network: Any, logger: Any) -> Any:
        def parse(onnx: bytes) -> bool:
            network.onnx = onnx
            return onnx != b"no model"

        return SimpleNamespace(parse=parse, get_error=lambda _: "no graph in it")


@pytest.fixture(params=["10.16.1", "11.4.0"])
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    fake = FakeTensorRT(request.param)
    monkeypatch.setattr(tensorrt, "library", lambda _: fake.module)
    return fake


def test_networks_are_strongly_typed_and_shapes_are_those_of_the_batches(fake: FakeTensorRT) -> None:
    engine = build(b"conv", flavour="tensorrt", batches=Batches(1, 2, 4))
    assert engine.plan == b"plan of conv"
    assert engine.flags == ("TF32 off",)
    assert fake.network_flags == [2 if fake.module.__version__.startswith("10") else 0]
    (config,) = fake.configs
    assert config.flags == set()
    assert config.times is None
    image, noise = ((rows, 2, 16, 16) for rows in (1, 2, 4)), ((rows, 1, 3, 2, 16, 16) for rows in (1, 2, 4))
    assert engine.shapes == {"image": tuple(image), "noise": tuple(noise)}
    assert config.profiles == [engine.shapes]


def test_engines_share_what_was_measured(fake: FakeTensorRT, tmp_path: Path) -> None:
    memory = TimingCache()
    for graph in (b"conv norm", b"conv pool"):
        assert build(graph, flavour="tensorrt", timing_cache=memory).flags == ("TF32 off", "timing cache")
    assert fake.measured == ["conv", "norm", "pool"]
    assert not list(tmp_path.iterdir())

    fake.measured.clear()
    file = tmp_path / "new" / "times"
    build(b"conv norm", flavour="tensorrt", timing_cache=TimingCache(file))
    build(b"conv pool", flavour="tensorrt", timing_cache=TimingCache(file))
    assert fake.measured == ["conv", "norm", "pool"]
    assert [each.name for each in file.parent.iterdir()] == ["times"]


@pytest.mark.parametrize("content", [b"gpu B| conv", b"broken"])
def test_times_of_another_gpu_are_refused_and_kept(fake: FakeTensorRT, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "times"
    file.write_bytes(content)
    message = rf"timing_cache: expected what tensorrt {fake.module.__version__} wrote on a GPU of this kind, got {file}"
    with pytest.raises(BackendError, match=message):
        build(b"conv", flavour="tensorrt", timing_cache=TimingCache(file))
    assert file.read_bytes() == content
    assert fake.measured == []


def test_a_folder_is_no_timing_cache(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="timing_cache: expected a file, or a path to write one at, got"):
        TimingCache(tmp_path)


def test_what_fails_is_said(fake: FakeTensorRT, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"can't read the ONNX model \(no graph in it\)"):
        build(b"no model", flavour="tensorrt")
    fake.fails = True
    cache = TimingCache(tmp_path / "times")
    with pytest.raises(BackendError, match=r"can't build the engine \(out of workspace\)"):
        build(b"conv", flavour="tensorrt", timing_cache=cache)
    assert not list(tmp_path.iterdir())
