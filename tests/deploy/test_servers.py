"""Repositories of Triton Inference Server and MONAI bundles give what the predictor gives, or refuse."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel
import numpy as np
import onnxruntime
import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory, text_format
from typer.testing import CliRunner

from cldf_fast.cli import app
from cldf_fast.deploy.manifest import EngineKey, open_sealed, operating_system, seal
from cldf_fast.deploy.monai_bundle import write_monai_bundle
from cldf_fast.deploy.network import EngineNetwork
from cldf_fast.deploy.predictor import Predictor
from cldf_fast.deploy.tensorrt import Batches
from cldf_fast.deploy.triton_server import write_triton_repository
from cldf_fast.deploy.verification import verify
from cldf_fast.errors import CLDFError, ConfigError, EngineMismatchError, IntegrityError
from tests.deploy.conftest import images

runner = CliRunner()
MODELS = ("cldf", "cldf_labels", "cldf_segmentation")


@pytest.fixture(scope="module")
def repository(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of float32 graphs, in batches of at most 5."""
    out = tmp_path_factory.mktemp("triton") / "repository"
    write_triton_repository(engine, out, batches=Batches(1, 2, 5))
    return out


@pytest.fixture
def damaged(repository: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(repository, tmp_path / "repository"))


# The part of the server's model_config.proto that is used: a field's type, "*" if repeated, or the message in it.
_FIELDS: dict[str, dict[str, str]] = {
    "Config": {
        "name": "string",
        "backend": "string",
        "max_batch_size": "int32",
        "input": "Input*",
        "output": "Output*",
        "default_model_filename": "string",
        "cc_model_filenames": "FileEntry*",
        "dynamic_batching": "Batching",
        "instance_group": "Group*",
        "parameters": "ParameterEntry*",
    },
    "Input": {"name": "string", "data_type": "string", "dims": "int64*", "optional": "bool"},
    "Output": {"name": "string", "data_type": "string", "dims": "int64*", "label_filename": "string"},
    "Batching": {"preferred_batch_size": "int32*", "max_queue_delay_microseconds": "uint64"},
    "Group": {"count": "int32", "kind": "string"},
    "FileEntry": {"key": "string", "value": "string"},
    "ParameterEntry": {"key": "string", "value": "Parameter"},
    "Parameter": {"string_value": "string"},
}
_ENUMS = ("TYPE_FP32", "TYPE_INT32", "TYPE_UINT8", "TYPE_BOOL", "KIND_CPU", "KIND_GPU")


def parsed(file: Path) -> dict[str, Any]:
    """A config.pbtxt, strictly read; maps as dictionaries."""
    schema = descriptor_pb2.FileDescriptorProto(name="config.proto", syntax="proto3")
    for name, members in _FIELDS.items():
        message = schema.message_type.add(name=name)
        for number, (field, kind) in enumerate(members.items(), 1):
            plain = kind.rstrip("*")
            message.field.add(
                name=field,
                number=number,
                label=3 if kind.endswith("*") else 1,
                type=11 if plain in _FIELDS else getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{plain.upper()}"),
                type_name=plain if plain in _FIELDS else None,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(schema)
    config = message_factory.GetMessageClass(pool.FindMessageTypeByName("Config"))()
    text = file.read_text(encoding="ascii")
    for word in _ENUMS:  # as strings, which keeps the schema short
        text = text.replace(f": {word}\n", f': "{word}"\n').replace(f": {word} ", f': "{word}" ')
    text_format.Parse(text, config)
    found = json_format.MessageToDict(config, preserving_proto_field_name=True)
    for name in ("parameters", "cc_model_filenames"):
        found[name] = {entry["key"]: entry["value"] for entry in found.get(name, [])}
    for tensor in (*found["input"], *found["output"]):
        tensor["dims"] = [int(size) for size in tensor["dims"]]  # int64 is text in JSON
    return found


class Server(ModuleType):
    """What the server's Python backend offers a model, with ONNX Runtime in place of its other backends."""

    TRITONSERVER_MEMORY_CPU = 0

    def __init__(self, repository: Path) -> None:
        super().__init__("triton_python_backend_utils")
        server = self
        self.broken = ""
        self.calls: list[tuple[str, int]] = []

        class Tensor:
            def __init__(self, name: str, values: np.ndarray) -> None:
                assert values.flags.c_contiguous
                self._name, self._values = name, values

            def name(self) -> str:
                return self._name

            def as_numpy(self) -> np.ndarray:
                return self._values

        class TritonError:
            INTERNAL, INVALID_ARG = 1, 3

            def __init__(self, message: str, code: int = 0) -> None:
                self._message, self._code = message, code

            def message(self) -> str:
                return self._message

            def code(self) -> int:
                return self._code

        class InferenceResponse:
            def __init__(self, output_tensors: list[Any] | None = None, error: Any = None) -> None:
                self._outputs, self._error = output_tensors or [], error

            def has_error(self) -> bool:
                return self._error is not None

            def error(self) -> Any:
                return self._error

            def output_tensors(self) -> list[Any]:
                return self._outputs

        class InferenceRequest:
            def __init__(
                self,
                model_name: str,
                requested_output_names: list[str],
                inputs: list[Any],
                preferred_memory: Any = None,
            ) -> None:
                self.model, self.wanted, self.inputs = model_name, requested_output_names, inputs

            def requested_output_names(self) -> list[str]:
                return self.wanted

            def exec(self) -> Any:
                config = parsed(repository / self.model / "config.pbtxt")
                given = {tensor.name(): tensor.as_numpy() for tensor in self.inputs}
                for tensor in config["input"]:
                    values = given[tensor["name"]]
                    assert tensor["data_type"] == {"float32": "TYPE_FP32"}[str(values.dtype)]
                    assert list(values.shape[1:]) == tensor["dims"]
                    assert 1 <= len(values) <= config["max_batch_size"]
                server.calls.append((self.model, len(values)))
                if self.model == server.broken:
                    return InferenceResponse(error=TritonError("out of memory"))
                (file,) = (repository / self.model / "1").iterdir()
                session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
                found = session.run(self.wanted, given)
                return InferenceResponse([Tensor(*pair) for pair in zip(self.wanted, found, strict=True)])

        self.Tensor, self.TritonError = Tensor, TritonError
        self.InferenceResponse, self.InferenceRequest = InferenceResponse, InferenceRequest

    @staticmethod
    def PreferredMemory(kind: int, device: int) -> None:  # noqa: N802
        assert (kind, device) == (Server.TRITONSERVER_MEMORY_CPU, 0)

    @staticmethod
    def get_input_tensor_by_name(request: Any, name: str) -> Any:
        return next((tensor for tensor in request.inputs if tensor.name() == name), None)

    @staticmethod
    def get_output_tensor_by_name(response: Any, name: str) -> Any:
        return next((tensor for tensor in response.output_tensors() if tensor.name() == name), None)

    def request(self, x: np.ndarray, labels: np.ndarray | None = None, wanted: tuple[str, ...] = ()) -> Any:
        inputs = [self.Tensor("image", x), *([] if labels is None else [self.Tensor("labels", labels)])]
        return self.InferenceRequest("cldf", list(wanted or OUTPUTS), inputs)


OUTPUTS = ("probability", "mask", "present", "label_probability")


def started(repository: Path, monkeypatch: pytest.MonkeyPatch, **parameters: str) -> tuple[Any, Server]:
    """The front model as the server starts it."""
    server = Server(repository)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", server)
    spec = importlib.util.spec_from_file_location("model", repository / "cldf/1/model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    config = parsed(repository / "cldf/config.pbtxt")
    config["parameters"] |= {name: {"string_value": value} for name, value in parameters.items()}
    model.initialize({"model_config": json.dumps(config)})
    return model, server


# Triton Inference Server


def test_configurations_say_what_the_graphs_take(repository: Path) -> None:
    kinds = {"tensor(float)": "TYPE_FP32", "tensor(int32)": "TYPE_INT32"}
    assert sorted(folder.name for folder in repository.iterdir()) == sorted(MODELS)
    for name in MODELS[1:]:
        config = parsed(repository / name / "config.pbtxt")
        (file,) = (repository / name / "1").iterdir()
        session = onnxruntime.InferenceSession(file)
        for tensors, said in ((session.get_inputs(), "input"), (session.get_outputs(), "output")):
            assert config[said] == [
                {"name": each.name, "data_type": kinds[each.type], "dims": each.shape[1:]} for each in tensors
            ]
        assert config["name"] == name
        assert config["backend"] == "onnxruntime"
        assert config["max_batch_size"] == 5
        assert config["dynamic_batching"]["preferred_batch_size"] == [2]
        assert config["default_model_filename"] == file.name
        assert config["instance_group"] == [{"count": 1, "kind": "KIND_CPU"}]
    front = parsed(repository / "cldf/config.pbtxt")
    assert {tensor["name"]: tensor["dims"] for tensor in front["input"]} == {"image": [2, 16, 16], "labels": [3]}
    assert {tensor["name"]: tensor["dims"] for tensor in front["output"]} == {
        "probability": [4, 16, 16],
        "mask": [16, 16],
        "present": [3],
        "label_probability": [3],
    }
    assert [tensor.get("optional", False) for tensor in front["input"]] == [False, True]
    assert front["parameters"]["intended_use"]["string_value"].endswith("not to be used for diagnostic purposes.")
    assert (repository / "cldf/labels.txt").read_text(encoding="utf-8").split() == ["liver", "kidneys", "spleen"]


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_server_gives_what_the_predictor_gives(
    engine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
) -> None:
    write_triton_repository(engine, tmp_path / "r", precision=precision, batches=Batches(1, 2, 5))
    model, server = started(tmp_path / "r", monkeypatch)
    predictor = Predictor(engine, precision=precision)
    given = np.random.default_rng().random((3, 3)) < 0.6
    cases = [(images(1), None), (images(3), given), (images(5), None)]
    responses = model.execute([server.request(*case) for case in cases])
    types = {tensor["name"]: tensor["data_type"] for tensor in parsed(tmp_path / "r/cldf/config.pbtxt")["output"]}
    for case, response in zip(cases, responses, strict=True):
        expected = predictor.segment(*case)
        assert not response.has_error()
        found = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        assert list(found) == list(OUTPUTS)
        for name, values in found.items():
            assert types[name] == {"f": "TYPE_FP32", "u": "TYPE_UINT8", "b": "TYPE_BOOL"}[values.dtype.kind]
            theirs = getattr(expected, name)
            theirs = predictor.label_probability(case[0]) if theirs is None else theirs
            np.testing.assert_allclose(values, theirs, rtol=0, atol=1e-6)
    model.finalize()


def test_only_what_is_asked_for_is_computed(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, server = started(repository, monkeypatch)
    labels = np.array([[False] * 3, [True] * 3, [False] * 3])
    (response,) = model.execute([server.request(images(3), labels, wanted=("mask",))])
    (mask,) = response.output_tensors()
    assert mask.as_numpy()[1].any()
    assert not mask.as_numpy()[[0, 2]].any()
    assert server.calls == [("cldf_segmentation", 1)]


def test_a_request_that_fails_leaves_the_others_alone(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, server = started(repository, monkeypatch)
    poisoned = images(2)
    poisoned[1, 0, 3, 4] = np.nan
    requests = [server.request(x) for x in (images(2)[:, :1].copy(), poisoned, images(2))]
    wrong, not_finite, good = model.execute(requests)
    assert wrong.error().message().startswith("images: expected float32 [N, 2, 16, 16], got float32 [2, 1, 16, 16]")
    assert "image 1" in not_finite.error().message()
    assert wrong.error().code() == not_finite.error().code() == server.TritonError.INVALID_ARG
    assert not good.has_error()
    server.broken = "cldf_segmentation"
    (failed,) = model.execute([server.request(images(1))])
    assert failed.error().message() == "cldf_segmentation: out of memory"
    assert failed.error().code() == server.TritonError.INTERNAL


def _flip(repository: Path) -> None:
    file = repository / "cldf_labels/1/labels.float32.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _other_precision(repository: Path) -> None:
    folder = repository / "cldf_labels/1"
    (folder / "labels.float32.onnx").unlink()
    shutil.copy(repository / "cldf/1/engine/labels.float16.onnx", folder)


def _sealed_anew(repository: Path) -> None:
    (repository / "cldf/1/engine/MODEL_CARD.md").write_text("Cures everything.", encoding="utf-8")
    seal(repository / "cldf/1/engine", engines={})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, r"labels\.float32\.onnx: is not the file of that name that was sealed"),
        (_other_precision, r"labels\.float16\.onnx: is not the file of that name that was sealed"),
        (lambda at: shutil.rmtree(at / "cldf_segmentation"), "cldf_segmentation/1: expected the files of a graph, got"),
        (lambda at: (at / "cldf_labels/1/extra").touch(), "extra: is not the file of that name that was sealed"),
        (lambda at: (at / "cldf/1/engine/labels.json").write_text("{}"), r"labels\.json: expected .* bytes"),
        (_sealed_anew, r"engine: is another engine directory than config\.pbtxt was written for"),
    ],
)
def test_a_repository_that_was_changed_is_not_served(
    damaged: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, message: str
) -> None:
    started(damaged, monkeypatch)
    damage(damaged)
    with pytest.raises(IntegrityError, match=message):
        started(damaged, monkeypatch)


def test_signatures_travel_and_are_checked(
    copied: Path,
    tmp_path: Path,
    keys: tuple[Path, Path],
    other_keys: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seal(copied, engines={}, signing_key=keys[0])
    with pytest.raises(IntegrityError, match="was signed with the key"):
        write_triton_repository(copied, tmp_path / "r", public_key=other_keys[1])
    write_triton_repository(copied, tmp_path / "r", public_key=keys[1])
    started(tmp_path / "r", monkeypatch, public_key=str(keys[1]))
    with pytest.raises(IntegrityError, match="was signed with the key"):
        started(tmp_path / "r", monkeypatch, public_key=str(other_keys[1]))


def _with_engines(folder: Path, smallest: int) -> dict[str, bytes]:
    """Adds random bytes as engines of the float16 graphs for two GPUs. Returns them by name."""
    engines, plans = {}, {}
    for graph in ("labels", "segmentation"):
        onnx = hashlib.sha256((folder / f"{graph}.float16.onnx").read_bytes()).hexdigest()
        for capability in ("8.6", "9.0,10.0"):
            name = f"{graph}.float16.{capability[0]}.plan"
            plans[name] = np.random.default_rng().bytes(100)
            (folder / "engines").mkdir(exist_ok=True)
            (folder / "engines" / name).write_bytes(plans[name])
            shapes = {"image": ((smallest, 2, 16, 16), (3, 2, 16, 16), (7, 2, 16, 16))}
            engines[f"engines/{name}"] = EngineKey(
                weights_sha256=onnx,
                onnx_sha256=onnx,
                precision="float16",
                opset=22,
                shapes=shapes,
                flavour="tensorrt",
                version="11.4.0.1",
                cuda="13.0",
                compute_capability=capability,
                gpu_name="GPU",
                os=operating_system(),
                builder_flags=(),
            )
    seal(folder, engines=engines)
    return plans


def test_engines_are_served_in_their_own_batches(copied: Path, tmp_path: Path, monkeypatch: Any) -> None:
    plans = _with_engines(copied, smallest=1)
    write_triton_repository(copied, tmp_path / "r", precision="float16", backend="tensorrt")
    for graph in ("labels", "segmentation"):
        config = parsed(tmp_path / f"r/cldf_{graph}/config.pbtxt")
        first, second = f"{graph}.float16.8.plan", f"{graph}.float16.9.plan"
        assert config["cc_model_filenames"] == {"8.6": first, "9.0": second, "10.0": second}
        assert config["backend"] == "tensorrt"
        assert config["max_batch_size"] == 7
        assert config["dynamic_batching"]["preferred_batch_size"] == [3]
        assert config["instance_group"] == [{"count": 1, "kind": "KIND_GPU"}]
        assert "default_model_filename" not in config
        found = {file.name: file.read_bytes() for file in (tmp_path / f"r/cldf_{graph}/1").iterdir()}
        assert found == {name: data for name, data in plans.items() if name.startswith(graph)}
    started(tmp_path / "r", monkeypatch)
    _with_engines(copied, smallest=2)
    with pytest.raises(ConfigError, match=r"batches: expected 1 as the smallest, .* got 2"):
        write_triton_repository(copied, tmp_path / "other", precision="float16", backend="tensorrt")
    assert {each.name for each in tmp_path.iterdir()} == {"engine", "r"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "int8"}, ConfigError, "precision: expected one of float32, float16, .* got 'int8'"),
        ({"backend": "openvino"}, ConfigError, "backend: expected onnx or tensorrt, got 'openvino'"),
        ({"backend": "tensorrt"}, EngineMismatchError, r"holds no engine of segmentation\.float32\.onnx for TensorRT"),
        ({"batches": Batches(2, 2, 4)}, ConfigError, "batches: expected 1 as the smallest, .* got 2"),
    ],
)
def test_what_can_not_be_served_is_said_and_nothing_is_left(
    engine: Path,
    tmp_path: Path,
    options: dict[str, Any],
    error: type[CLDFError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        write_triton_repository(engine, tmp_path / "r", **options)
    assert not list(tmp_path.iterdir())


def test_bfloat16_is_not_for_onnx_runtime(copied: Path, tmp_path: Path) -> None:
    config = json.loads((copied / "config.json").read_text(encoding="utf-8"))
    (copied / "config.json").write_text(json.dumps(config | {"precisions": ["bfloat16"]}), encoding="utf-8")
    for graph in ("labels", "segmentation"):
        (copied / f"{graph}.float16.onnx").rename(copied / f"{graph}.bfloat16.onnx")
    seal(copied, engines={})
    with pytest.raises(ConfigError, match=r"precision: expected float32 or float16 for ONNX Runtime .* got 'bfloat16'"):
        write_triton_repository(copied, tmp_path / "r")


@pytest.mark.parametrize("write", [write_triton_repository, write_monai_bundle])
def test_damage_that_is_met_on_the_way_leaves_nothing(copied: Path, tmp_path: Path, write: Any) -> None:
    (copied / "golden/cases.json").write_bytes(b"{")
    with pytest.raises(IntegrityError, match=r"golden/cases\.json: expected"):
        write(copied, tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["engine"]
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="out: expected a folder that does not exist"):
        write(copied, tmp_path / "out")


# MONAI


@pytest.fixture(scope="module")
def bundle(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("monai") / "bundle"
    write_monai_bundle(engine, out)
    return out


def test_the_network_gives_the_predictor_s_masks(engine: Path) -> None:
    x = images(4)
    found = EngineNetwork(Predictor(engine))(torch.from_numpy(x))
    expected = Predictor(engine).segment(x)
    assert (found.argmax(dim=1).numpy() == expected.mask).all()
    assert found.shape == (4, 4, 16, 16)
    present = torch.from_numpy(expected.present)
    np.testing.assert_array_equal(found[:, 1:][present].numpy(), expected.probability[:, 1:][expected.present])
    assert not found[:, 1:][~present].any()


def test_a_bundle_holds_what_monai_asks_for(bundle: Path, engine: Path) -> None:
    files = {str(file.relative_to(bundle)) for file in bundle.rglob("*") if file.is_file()}
    assert files - {f"models/engine/{file.relative_to(engine)}" for file in engine.rglob("*")} == {
        "LICENSE",
        "configs/metadata.json",
        "configs/inference.json",
        "docs/README.md",
    }
    assert open_sealed(bundle / "models/engine").manifest == open_sealed(engine).manifest
    assert verify(bundle / "models/engine").passed
    document = json.loads((bundle / "configs/metadata.json").read_text(encoding="utf-8"))
    texts = "schema version monai_version pytorch_version numpy_version task description authors copyright intended_use"
    assert all(document[name] and isinstance(document[name], str) for name in texts.split())
    assert document["intended_use"] == "Research use only; not to be used for diagnostic purposes."
    assert set(document["required_packages_version"]) == {"cldf_fast", "onnxruntime"}
    (given,) = document["network_data_format"]["inputs"].values()
    (result,) = document["network_data_format"]["outputs"].values()
    for tensor, channels, values in ((given, 2, [-1, 1]), (result, 4, [0, 1])):
        assert tensor["num_channels"] == len(tensor["channel_def"]) == channels
        assert tensor["spatial_shape"] == [16, 16]
        assert tensor["value_range"] == values
        assert tensor["dtype"] == "float32"
        assert {"type", "format", "is_patch_data"} <= set(tensor)
    assert result["channel_def"] == {"0": "background", "1": "liver", "2": "kidneys", "3": "spleen"}


def test_monai_runs_a_bundle(
    bundle: Path,
    engine: Path,
    study: str,
    tmp_path: Path,
) -> None:
    monai = pytest.importorskip("monai.bundle")
    parser = monai.ConfigParser()
    parser.read_config(str(bundle / "configs/inference.json"))
    parser.read_meta(str(bundle / "configs/metadata.json"))
    parser.update({"bundle_root": str(bundle), "image": study, "output_dir": str(tmp_path / "masks")})
    ((case,),) = [parser.get_parsed_content("run")]
    expected = Predictor(engine).predict(study, tmp_path / "expected")
    ours, theirs = (nibabel.load(each.files[0]) for each in (case, expected))
    assert (np.asarray(ours.dataobj) == np.asarray(theirs.dataobj)).all()
    assert (ours.affine == theirs.affine).all()
    monai.verify_net_in_out(
        net_id="network_def",
        meta_file=str(bundle / "configs/metadata.json"),
        config_file=str(bundle / "configs/inference.json"),
        device="cpu",
        bundle_root=str(bundle),
    )


# Commands


_WITHOUT_TORCH = """
import sys
# Importing them raises.
sys.modules.update(dict.fromkeys("torch onnxscript pydantic yaml scipy safetensors monai matplotlib rich".split()))
from pathlib import Path
from cldf_fast.deploy.monai_bundle import write_monai_bundle
from cldf_fast.deploy.triton_server import write_triton_repository
write_triton_repository(Path(sys.argv[1]), Path(sys.argv[2]) / "repository")
write_monai_bundle(Path(sys.argv[1]), Path(sys.argv[2]) / "bundle")
"""


def test_neither_needs_torch_to_be_written(engine: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _WITHOUT_TORCH, str(engine), str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert {each.name for each in tmp_path.iterdir()} == {"repository", "bundle"}


@pytest.mark.parametrize("name", ["triton-server", "monai-bundle"])
def test_the_command_checks_the_signature(
    copied: Path, tmp_path: Path, keys: tuple[Path, Path], other_keys: tuple[Path, Path], name: str
) -> None:
    out = tmp_path / name
    arguments = ["export", str(copied), "--format", name, "--out", str(out), "--public-key"]
    result = runner.invoke(app, [*arguments, str(keys[1])])
    assert isinstance(result.exception, IntegrityError)  # not signed at all
    seal(copied, engines={}, signing_key=keys[0])
    result = runner.invoke(app, [*arguments, str(other_keys[1])])
    assert isinstance(result.exception, IntegrityError)
    assert not out.exists()
    result = runner.invoke(app, [*arguments, str(keys[1])])
    assert result.exit_code == 0, result.output
    assert "signature checked" in result.output
    assert out.is_dir()


def test_the_command_takes_no_option_that_its_format_has_no_use_for(
    engine: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    result = runner.invoke(app, ["export", str(engine), "--out", str(tmp_path / "e"), "--public-key", str(keys[1])])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith("--public-key: not for --format onnx, which writes an engine directory")
    result = runner.invoke(app, ["export", str(engine), "--out", str(tmp_path / "e"), "--capability", "8.6"])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith("--capability: engines for several GPUs are those of --format tensorrt-rtx")
    result = runner.invoke(app, ["export", str(engine), "--out", str(tmp_path / "e"), "--timing-cache", "times"])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith("timing_cache: only builds of tensorrt measure times")
    result = runner.invoke(app, ["export", str(engine), "--out", str(tmp_path / "e"), "--backend", "tensorrt"])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith("--backend: of a server's graphs (--format triton-server)")


def test_commands(engine: Path, tmp_path: Path) -> None:
    for name in ("triton-server", "monai-bundle"):
        out = str(tmp_path / name)
        options = ["--format", name, "--out", out, "--precision", "float16"]
        result = runner.invoke(app, ["export", str(engine), *options])
        assert result.exit_code == 0, result.output
        assert "no public key given" in result.output
        result = runner.invoke(app, ["export", str(engine), *options, "--capability", "8.6"])
        assert isinstance(result.exception, ConfigError)
        assert str(result.exception).startswith(f"--capability: not for --format {name}")
        result = runner.invoke(app, ["export", str(tmp_path), *options])
        assert "expected an engine directory" in str(result.exception)
    assert (tmp_path / "triton-server/cldf_labels/1/labels.float16.onnx").is_file()
    inference = json.loads((tmp_path / "monai-bundle/configs/inference.json").read_text(encoding="utf-8"))
    assert inference["predictor"]["precision"] == "float16"
