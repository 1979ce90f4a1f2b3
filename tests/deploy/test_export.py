"""From a run to an engine directory, and from there to masks: the same as `CLDF` and `segment` give, or refused."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from cldf_fast.cli import app
from cldf_fast.deploy import export as exporting
from cldf_fast.deploy import parity
from cldf_fast.deploy.export import Target, export
from cldf_fast.deploy.manifest import EngineKey, open_sealed, seal
from cldf_fast.deploy.predictor import Predictor
from cldf_fast.deploy.tensorrt import Batches, capabilities
from cldf_fast.deploy.verification import verify
from cldf_fast.errors import BackendError, ConfigError, DataError, EngineMismatchError, IntegrityError, ParityError
from cldf_fast.inference import read_case, segment_case
from cldf_fast.pipeline import CLDF
from cldf_fast.run import Run
from tests.deploy.conftest import images
from tests.test_run import RECORD

runner = CliRunner()


# What comes out


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_predictor_gives_what_cldf_gives(engine: Path, module_cldf: CLDF, precision: str) -> None:
    x = images(19)  # more than a call takes
    present = np.random.default_rng().random((19, 3)) < 0.6
    expected = module_cldf.segment(torch.from_numpy(x), torch.from_numpy(present))
    predictor = Predictor(engine, precision=precision, max_batch=8)
    found = predictor.segment(x, present)
    tolerance = 2e-5 if precision == "float32" else 0.1  # the random networks amplify
    np.testing.assert_allclose(found.probability, expected.probability.numpy(), rtol=0, atol=tolerance)
    assert found.label_probability is None
    label_probability = module_cldf.label_probability(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(predictor.label_probability(x), label_probability, rtol=0, atol=tolerance / 5)
    assert (found.mask == expected.mask.numpy()).mean() > (0.999 if precision == "float32" else 0.95)
    assert len(np.unique(found.mask)) > 1


def test_labels_are_predicted_where_none_are_given(engine: Path, module_cldf: CLDF) -> None:
    x = images(6)
    expected = module_cldf.segment(torch.from_numpy(x))
    found = Predictor(engine).segment(x)
    assert (found.present == expected.present.numpy()).all()
    assert found.label_probability is not None
    np.testing.assert_allclose(found.label_probability, Predictor(engine).label_probability(x), rtol=0, atol=1e-6)
    some = Predictor(engine).segment(x, everywhere=False)
    assert (some.mask == found.mask).all()
    absent = ~found.present.any(axis=1)
    assert (some.probability[absent, 0] == 1).all()


def test_an_image_s_result_depends_neither_on_the_batch_nor_on_the_order(engine: Path) -> None:
    x, predictor = images(5), Predictor(engine)
    together = predictor.segment(x)
    order = np.random.default_rng().permutation(5)
    shuffled = predictor.segment(x[order])
    np.testing.assert_allclose(shuffled.probability, together.probability[order], rtol=0, atol=1e-5)
    np.testing.assert_allclose(predictor.segment(x[2:3]).probability[0], together.probability[2], rtol=0, atol=1e-5)


def test_predict_writes_the_mask_that_segment_writes(
    engine: Path, module_cldf: CLDF, study: str, tmp_path: Path
) -> None:
    found = Predictor(engine).predict(study, tmp_path / "predicted", labels=["liver", "spleen"], probability=True)
    given = torch.tensor([True, False, True])
    expected = segment_case(
        module_cldf, RECORD, read_case(study, 2), tmp_path / "segmented", labels=given, probability=True
    )
    assert [file.name for file in found.files] == [file.name for file in expected.files]
    ours, theirs = (nibabel.load(case.files[0]) for case in (found, expected))
    assert ours.shape == (21, 19, 7)
    assert (ours.affine == theirs.affine).all()
    assert (np.asarray(ours.dataobj) == np.asarray(theirs.dataobj)).mean() > 0.999
    assert found.foreground_pixels > 0


def test_a_predictor_is_sent_before_it_is_loaded(engine: Path) -> None:
    predictor = Predictor(engine)
    x = images(2)
    first = predictor.segment(x)
    sent = pickle.loads(pickle.dumps(predictor))
    assert (sent.segment(x).mask == first.mask).all()
    with predictor as again:
        assert again.load().class_names == RECORD.class_names


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda x: x.astype(np.float64), r"images: expected float32 \[N, 2, 16, 16\], got float64 \[3, 2, 16, 16\]"),
        (lambda x: x[:, :1], r"got float32 \[3, 1, 16, 16\]"),
        (lambda x: x[:0], r"got float32 \[0, 2, 16, 16\]"),
        (lambda x: x.tolist(), r"images: expected float32 \[N, 2, 16, 16\], got list"),
        (lambda x: np.where(np.arange(3)[:, None, None, None] == 1, np.nan, x).astype(np.float32), "in image 1"),
        (lambda x: x * np.float32(127.5), r"images: expected pixels in \[-1, 1\], got -1.* to 1.* in image 0"),
    ],
)
def test_images_that_do_not_fit_are_named(engine: Path, values: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Predictor(engine).segment(values(images(3)))


def test_labels_that_do_not_fit_are_named(engine: Path) -> None:
    with pytest.raises(DataError, match=r"labels: expected bool \[2, 3\], got bool \[2, 2\]"):
        Predictor(engine).segment(images(2), np.ones((2, 2), bool))
    with pytest.raises(DataError, match=r"labels: expected bool \[2, 3\], got str"):
        Predictor(engine).segment(images(2), "all")
    with pytest.raises(ConfigError, match=r"labels: expected 'all', 'none' or names of .*, got True"):
        Predictor(engine).segment_study("none.nii", labels=True)
    for option, value in (("threads", 9999), ("threads", -1), ("threads", "1"), ("max_batch", 0)):
        with pytest.raises(ConfigError, match=f"{option}: expected an integer"):
            Predictor(engine, **{option: value})
    with pytest.raises(ConfigError, match=r"precision: expected one of float32, float16, .* got 'bfloat16'"):
        Predictor(engine, precision="bfloat16").load()
    with pytest.raises(ConfigError, match="backend: expected onnx, tensorrt or tensorrt_rtx, got 'cuda'"):
        Predictor(engine, backend="cuda")


# The directory


def test_half_precision_is_where_it_should_be(engine: Path) -> None:
    """Products in float16, everything that sums or exponentiates in float32, and no weight twice."""
    half_type = onnx.TensorProto.FLOAT16
    for graph in ("segmentation", "labels"):
        model = onnx.load(engine / f"{graph}.float16.onnx")
        operators = {node.op_type for node in model.graph.node}
        assert {"Conv", "LayerNormalization", "Softmax"} <= operators
        assert "GroupNormalization" not in operators  # which ONNX Runtime takes apart
        half = {tensor.name for tensor in model.graph.initializer if tensor.data_type == half_type}
        for node in model.graph.node:
            if node.op_type in ("Conv", "MatMul", "Gemm"):
                assert half.issuperset(name for name in node.input if name), node.op_type
                half.update(node.output)
            elif node.op_type == "Cast" and node.attribute[0].i == half_type:
                assert node.input[0] not in half
                half.update(node.output)
            elif node.op_type != "Cast":
                assert half.isdisjoint(node.input), node.op_type
        assert half.isdisjoint(output.name for output in model.graph.output)
        sizes = [(engine / f"{graph}.{precision}.onnx").stat().st_size for precision in ("float16", "float32")]
        assert sizes[0] < 0.9 * sizes[1]


def test_no_file_tells_where_it_was_made(engine: Path) -> None:
    root = str(Path(exporting.__file__).parents[2]).encode()
    for file in engine.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            assert root not in data, file
            assert str(engine.parent).encode() not in data, file
    card = (engine / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "not to be used for diagnostic purposes" in card
    assert "| onnx | float16 |" in card
    assert "liver, kidneys, spleen" in card


def test_an_export_that_fails_leaves_nothing(
    run: Run, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(folder: Path, *_: Any) -> dict[str, bytes]:
        for file in engine.glob("*.float32.onnx"):
            shutil.copy(file, folder)
        return {}

    monkeypatch.setattr(exporting, "_write_onnx", written)
    monkeypatch.setitem(parity.LIMITS, "float32", {"probability_rel_l2": 0.0, "dice_min": 1.1})
    with pytest.raises(ParityError, match=r"float32: differs from PyTorch \(probability_rel_l2 is .*dice_min is"):
        export(run, tmp_path / "engine", precisions=("float32",))
    assert not list(tmp_path.glob("*engine*"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precisions": ("int8",)}, ConfigError, r"precisions: expected some of float32.*, got \['int8'\]"),
        ({"precisions": ()}, ConfigError, "precisions: expected some of"),
        ({"target": Target("tensorrt")}, BackendError, "tensorrt: is not installed"),
        ({"signing_key": Path(__file__)}, ConfigError, r"test_export\.py: expected an Ed25519 private key in PEM"),
    ],
)
def test_what_can_not_be_exported_is_said_at_once(
    run: Run, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        export(run, tmp_path / "engine", **options)
    assert not list(tmp_path.iterdir())


def test_an_engine_directory_is_never_overwritten(run: Run, copied: Path) -> None:
    before = {file: file.read_bytes() for file in copied.rglob("*") if file.is_file()}
    with pytest.raises(ConfigError, match="out: expected a folder that does not exist"):
        export(run, copied)
    assert {file: file.read_bytes() for file in copied.rglob("*") if file.is_file()} == before


# Verification


def test_verify_measures_both_precisions(engine: Path) -> None:
    found = verify(engine)
    assert found.passed
    assert [(each.backend, each.precision) for each in found.measured] == [("onnx", "float32"), ("onnx", "float16")]
    assert found.measured[0].probability_max < found.measured[1].probability_max
    assert not found.signed


def test_verify_sees_a_graph_of_other_weights(copied: Path) -> None:
    """Sealed anew by whoever changed it: only parity can tell."""
    model = onnx.load(copied / "segmentation.float32.onnx")
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = onnx.numpy_helper.to_array(largest)
    largest.CopyFrom(onnx.numpy_helper.from_array(np.roll(values, 1), largest.name))
    onnx.save(model, copied / "segmentation.float32.onnx")
    with pytest.raises(IntegrityError, match=r"segmentation\.float32\.onnx: expected content with SHA-256"):
        verify(copied)
    seal(copied, engines={})
    found = verify(copied)
    assert not found.passed
    assert found.measured[0].failures
    assert not found.measured[1].failures
    result = runner.invoke(app, ["verify", str(copied)])
    assert result.exit_code == 4
    assert "onnx float32" in result.output
    assert "FAILED" in result.output


@pytest.mark.parametrize("change", ["missing", "pickle", "text"])
def test_golden_cases_that_are_none_are_refused(copied: Path, change: str) -> None:
    with np.load(copied / parity.GOLDEN) as arrays:
        kept = dict(arrays)
    buffer = io.BytesIO()
    if change == "missing":
        del kept["mask"]
    if change == "pickle":
        kept["mask"] = np.array([Exploding()], dtype=object)
    np.savez(buffer, **kept)
    (copied / parity.GOLDEN).write_bytes(b"text" if change == "text" else buffer.getvalue())
    seal(copied, engines={})
    with pytest.raises(IntegrityError, match=r"golden/cases\.npz: is no file of golden cases"):
        verify(copied)


class Exploding:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle ran",))


@pytest.mark.parametrize("name", ["config", "preprocessing", "labels"])
def test_settings_that_lack_something_are_refused(copied: Path, name: str) -> None:
    (copied / f"{name}.json").write_text("{}", encoding="utf-8")
    seal(copied, engines={})
    with pytest.raises(IntegrityError, match="are not what `cldf-fast export` writes"):
        Predictor(copied).load()


# Commands, and what they need


def test_commands(engine: Path, run: Run, study: str, tmp_path: Path) -> None:
    result = runner.invoke(app, ["verify", str(engine), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["passed"] is True
    result = runner.invoke(
        app, ["predict", str(engine), study, str(tmp_path / "none.nii"), "--out", str(tmp_path / "o")]
    )
    assert result.exit_code == 3, result.output
    assert "7 slices" in result.output
    assert (tmp_path / "o" / "t1_mask.nii.gz").exists()


_WITHOUT_TORCH = """
import sys
import threading
# Importing them raises.
absent = "torch onnx onnxscript pydantic yaml scipy safetensors lightning_fabric matplotlib rich cryptography highdicom"
sys.modules.update(dict.fromkeys(absent.split()))
from cldf_fast.deploy.predictor import Predictor
from cldf_fast.deploy.prediction import predict
from cldf_fast.deploy.verification import verify
assert verify(sys.argv[1]).passed
(outcome,) = predict(Predictor(sys.argv[1]), [sys.argv[2]], __import__("pathlib").Path(sys.argv[3]), labels="all")
print(outcome.status, outcome.files)
"""


def test_deployment_needs_neither_torch_nor_what_trains(engine: Path, study: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _WITHOUT_TORCH, str(engine), study, str(tmp_path / "out")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "done ['t1_mask.nii.gz']"


# TensorRT for RTX, which builds without a GPU


def test_engines_are_built_without_a_gpu(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "engine"
    target = Target("tensorrt_rtx", ("8.6", "12.0"), Batches(1, 2, 4))
    export(run, out, precisions=("float32", "float16", "bfloat16"), target=target)
    sealed = open_sealed(out)
    sealed.verify_all()
    keys = sealed.manifest.engines
    assert sorted(key.precision for key in keys.values()) == sorted(("float32", "float16", "bfloat16") * 2)
    for name, key in keys.items():
        assert isinstance(key, EngineKey)
        assert key.compute_capability == "8.6,12.0"
        assert key.shapes["image"] == ((1, 2, 16, 16), (2, 2, 16, 16), (4, 2, 16, 16)), name
    found = verify(out)
    assert found.passed
    assert set(found.skipped) == {f"tensorrt_rtx {name}" for name in ("float32", "float16", "bfloat16")} | {
        "onnx bfloat16"
    }
    assert "expected a GPU and its driver" in found.skipped["tensorrt_rtx float16"]
    with pytest.raises((BackendError, EngineMismatchError), match="GPU"):
        verify(out, backends=("tensorrt_rtx",))


def test_a_capability_that_is_not_served_is_said_before_anything_is_built(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert "9.0" not in capabilities("tensorrt_rtx")
    with pytest.raises(BackendError, match=r"expected what tensorrt_rtx .* serves \(.*8\.6.*\), got 9\.0"):
        export(run, tmp_path / "engine", target=Target("tensorrt_rtx", ("9.0",)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("flavour", "got"), [("tensorrt_rtx", "tensorrt_rtx"), (None, "ONNX files alone")])
def test_a_timing_cache_is_for_builds_that_measure(flavour: str | None, got: str) -> None:
    with pytest.raises(ConfigError, match=f"timing_cache: only builds of tensorrt measure times, got one for {got}"):
        Target(flavour, timing_cache=Path("times"))


def test_batches_are_in_order() -> None:
    with pytest.raises(ConfigError, match="batches: expected 1 <= smallest <= best <= largest, got 4, 2, 8"):
        Batches(4, 2, 8)
