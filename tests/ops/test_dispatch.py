from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch

from cldf_fast.errors import BackendError
from cldf_fast.ops import BACKENDS, _dispatch, _native, backend_report, fuse_evidence, pixel_infonce, pixel_seed

X = torch.ones(2, 1, 3, 3)
PUBLIC = {"pixel_infonce", "sample_anchors", "pixel_seed", "noised_batch", "gradient_saliency", "fuse_evidence"}


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    """A test's backends and environment end with it."""
    monkeypatch.delenv("CLDF_FAST_IMPL", raising=False)
    monkeypatch.setattr(_dispatch, "_REGISTRY", {op: dict(served) for op, served in _dispatch._REGISTRY.items()})


def register_marked(backend, mark, **conditions):
    """A backend for pixel_seed whose result can be told from the others'."""
    _dispatch.register("pixel_seed", backend, lambda x: torch.full((len(x),), mark), **conditions)


def test_auto_takes_the_fastest_backend_that_serves():
    expected = pixel_seed(X)
    register_marked("cpu", 1)
    assert pixel_seed(X).tolist() == [1, 1]
    register_marked("triton", 2, available=lambda: "no GPU")
    assert pixel_seed(X).tolist() == [1, 1]
    register_marked("cuda", 3, serves=lambda x: None if len(x) > 1 else "one image")
    assert pixel_seed(X).tolist() == [3, 3]
    assert pixel_seed(X[:1]).tolist() == [1]
    assert torch.equal(pixel_seed(X, impl="reference"), expected)


def test_a_named_backend_serves_or_says_why_not():
    with pytest.raises(BackendError, match=r"impl: triton can't serve pixel_seed \(not built: .*; ask for auto"):
        pixel_seed(X, impl="triton")
    with pytest.raises(BackendError, match=r"cuda can't serve pixel_seed \(not "):
        pixel_seed(X, impl="cuda")
    register_marked("cuda", 3, serves=lambda x: f"needs a CUDA tensor, got one on {x.device}")
    with pytest.raises(BackendError, match="needs a CUDA tensor, got one on cpu"):
        pixel_seed(X, impl="cuda")
    register_marked("cuda", 3, available=lambda: "no driver", serves=lambda x: pytest.fail("asked without a driver"))
    with pytest.raises(BackendError, match=r"cuda can't serve pixel_seed \(no driver\)"):
        pixel_seed(X, impl="cuda")


@pytest.mark.parametrize("name", ["fast", "Reference", ""])
def test_an_unknown_backend_is_named(name):
    with pytest.raises(BackendError, match=f"impl: expected auto or one of cuda, triton, cpu, reference, got '{name}'"):
        pixel_seed(X, impl=name)


def test_the_environment_replaces_auto_and_binds(monkeypatch):
    register_marked("cpu", 1)
    monkeypatch.setenv("CLDF_FAST_IMPL", "reference")
    assert pixel_seed(X).tolist() != [1, 1]
    assert pixel_seed(X, impl="cpu").tolist() == [1, 1]
    monkeypatch.setenv("CLDF_FAST_IMPL", "triton")
    with pytest.raises(BackendError, match="CLDF_FAST_IMPL: triton can't serve pixel_seed"):
        pixel_seed(X)
    monkeypatch.setenv("CLDF_FAST_IMPL", "fast")
    with pytest.raises(BackendError, match=r"CLDF_FAST_IMPL: expected auto or one of .*, got 'fast'"):
        pixel_seed(X)
    for neutral in ("", "auto"):
        monkeypatch.setenv("CLDF_FAST_IMPL", neutral)
        assert pixel_seed(X).tolist() == [1, 1]


def test_compiled_code_follows_the_environment(monkeypatch):
    compiled = torch.compile(lambda x: pixel_seed(x), fullgraph=True, backend="eager")
    expected = compiled(X)
    register_marked("cpu", 1)
    assert compiled(X).tolist() == [1, 1]
    monkeypatch.setenv("CLDF_FAST_IMPL", "reference")
    assert torch.equal(compiled(X), expected)


def test_where_no_backend_serves_every_reason_is_given():
    for backend in ("cpu", "reference"):
        _dispatch.register("pixel_seed", backend, lambda x: x, available=lambda: "switched off")
    with pytest.raises(BackendError, match=r"cuda can't serve .* cpu can't serve .* reference .*\(switched off\)"):
        pixel_seed(X)


def test_a_backend_without_a_backward_pass_of_its_own_goes_on_with_another():
    forward = _dispatch._REGISTRY["pixel_infonce"]["reference"].run
    _dispatch._REGISTRY["pixel_infonce_backward"].pop("cpu", None)
    calls = []
    _dispatch.register("pixel_infonce", "cpu", lambda *inputs: calls.append("cpu") or forward(*inputs))
    features = torch.randn(4, 3, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1])

    def gradient(**options):
        return torch.autograd.grad(pixel_infonce(features, features, labels, labels, **options).sum(), features)[0]

    assert torch.equal(gradient(), gradient(impl="reference"))
    assert calls == ["cpu"]
    with pytest.raises(BackendError, match="cpu can't serve pixel_infonce_backward"):
        gradient(impl="cpu")


def test_only_known_backends_can_be_registered():
    with pytest.raises(ValueError, match="backend: expected one of"):
        _dispatch.register("pixel_seed", "tpu", lambda x: x)


def test_the_report_covers_every_operation_and_backend():
    report = backend_report()
    assert set(report) >= PUBLIC
    for reasons in report.values():
        assert set(reasons) == set(BACKENDS)
        assert reasons["reference"] == "serving"
        assert all(reasons.values())
    assert report["fuse_evidence"]["triton"].startswith("not built")
    register_marked("triton", 2, available=lambda: "no GPU")
    register_marked("cpu", 1)
    assert backend_report()["pixel_seed"]["triton"] == "no GPU"
    assert backend_report()["pixel_seed"]["cpu"] == "serving"


def test_the_reason_for_a_missing_extension_reaches_the_report(monkeypatch):
    monkeypatch.setattr(_native, "reason", "not loaded: built for another torch")
    assert backend_report()["fuse_evidence"]["cuda"] == "not loaded: built for another torch"
    maps, label = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(BackendError, match="built for another torch"):
        fuse_evidence(maps, maps, label, thresholds=(0, 0, 0, 0), impl="cpu")
    monkeypatch.setattr(_native, "reason", None)
    assert backend_report()["fuse_evidence"]["cuda"] == "not built: this version has no cuda kernel for it"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "not built: the extension extension_under_test is absent"),
        ("import surely_absent", "not loaded: extension_under_test needs the module surely_absent"),
        ("raise ImportError('undefined symbol: f\\nmore')", "raised ImportError: undefined symbol: f; build it again"),
        ("raise RuntimeError('')", "raised RuntimeError: ; build it again"),
    ],
)
def test_an_extension_that_does_not_load_gives_one_sentence(source, reason, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    if source is not None:
        (tmp_path / "extension_under_test.py").write_text(source)
    module, found = _native.load("extension_under_test")
    assert module is None
    assert reason in found
    assert "\n" not in found


def test_an_extension_that_loads_hands_out_its_record(monkeypatch):
    extension = types.ModuleType("extension_under_test")
    extension.build_record = lambda: {"compiler": "g++"}
    monkeypatch.setitem(sys.modules, "extension_under_test", extension)
    assert _native.load("extension_under_test") == (extension, None)
    monkeypatch.setattr(_native, "module", extension)
    assert _native.build_record() == {"compiler": "g++"}
    monkeypatch.setattr(_native, "module", None)
    assert _native.build_record() == {}


def test_importing_the_operations_stays_light():
    code = (
        "import sys, torch; before = set(sys.modules); import cldf_fast.ops;"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    allowed = {"cldf_fast", "torch", "numpy"} | set(sys.stdlib_module_names)
    assert set(done.stdout.split()) <= allowed


def test_memory_taken_by_the_package_is_poisoned():
    inside: dict[str, object] = {"__name__": "cldf_fast.somewhere", "torch": torch}
    exec("a = torch.empty(3); b = a.new_empty(2, dtype=torch.int8); c = torch.empty_like(b > 0)", inside)
    assert inside["a"].isnan().all()
    assert inside["b"].tolist() == [127, 127]
    assert inside["c"].all()
