"""What is shipped: the sdist is made from the tree, and the wheels from the sdist, so that each must be complete."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import cldf_fast
from cldf_fast.doctor import OPTIONAL

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def _name(requirement: str) -> str:
    """The distribution of a requirement, normalised as the index does."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement).group()).lower()


def _build(kind: str, source: Path, out: Path, **environment: str) -> Path:
    """Call the build backend as an installer without build isolation does; returns the file that it made."""
    command = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", command, str(out)],
        cwd=source,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist of a copy of the tree, in which files lie that must and must not be shipped."""
    folder = tmp_path_factory.mktemp("packaging")
    tree = folder / "tree"
    tree.mkdir()
    left_behind = shutil.ignore_patterns("__pycache__", "*.so", "_C.txt", "*.egg-info", "weights")
    rooms = ("cldf_fast", "kernels", "csrc", "tests", "benchmarks")
    for name in filter(lambda name: (ROOT / name).is_dir(), rooms):
        shutil.copytree(ROOT / name, tree / name, ignore=left_behind)
    shutil.copytree(ROOT / ".ci", tree / ".ci")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
    for weights in ("cldf_fast/weights/bundled.safetensors", "benchmarks/weights/lgg/cdm.safetensors"):
        (tree / weights).parent.mkdir(parents=True)
        (tree / weights).write_bytes(b"weights")
    (tree / "kernels/tuned").mkdir(exist_ok=True)
    (tree / "kernels/tuned/device.json").write_text("{}", encoding="utf-8")
    (tree / "cldf_fast/_C.stale.so").write_bytes(b"built for another machine")
    archive = _build("sdist", tree, folder / "sdist")
    shutil.unpack_archive(archive, folder / "unpacked")
    with tarfile.open(archive) as members:
        assert f"cldf_fast-{cldf_fast.__version__}/PKG-INFO" in members.getnames()
    return folder / "unpacked" / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel as this machine makes it, for one GPU architecture."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(_build("wheel", sdist, folder / "built", CLDF_FAST_CUDA_ARCHITECTURES="90")) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_sdist_has_all_sources_and_no_weights_of_reported_runs(sdist: Path) -> None:
    files = _files(sdist)
    assert {"csrc/cuda/saliency.cu", "csrc/cuda/common.cuh", "tests/cuda_emulator/cuda_runtime.h"} <= files
    assert {"csrc/bindings.cpp", "kernels/__init__.py", "kernels/tuned/device.json", "tests/test_packaging.py"} <= files
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "constraints.txt"} <= files
    assert {
        ".ci/run",
        ".ci/sanitize",
        ".ci/venv",
        "cldf_fast/py.typed",
        "cldf_fast/weights/bundled.safetensors",
    } <= files
    assert not [name for name in files if name.startswith("benchmarks/weights") or name.endswith((".so", ".pyc"))]


def test_wheel_is_the_package_with_its_kernels_and_nothing_else(wheel: Path) -> None:
    files = _files(wheel)
    metadata = f"cldf_fast-{cldf_fast.__version__}.dist-info"
    assert {name.split("/")[0] for name in files} == {"cldf_fast", metadata}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cldf_fast").rglob("*.py")}
    modules |= {f"cldf_fast/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    assert {name for name in files if name.endswith(".py")} == modules
    assert {"cldf_fast/py.typed", "cldf_fast/kernels/tuned/device.json"} <= files
    assert [name for name in files if name.endswith(".safetensors")] == ["cldf_fast/weights/bundled.safetensors"]
    assert "Apache License" in (wheel / metadata / "licenses" / "LICENSE").read_text(encoding="utf-8")
    assert "cldf-fast = cldf_fast.cli:main" in (wheel / metadata / "entry_points.txt").read_text(encoding="utf-8")


def _build_record(wheel: Path) -> dict[str, str]:
    """The build record of an unpacked wheel's extension, whose operators are used once; skips where there is none."""
    left_out = wheel / "cldf_fast" / "_C.txt"
    if left_out.exists():
        reason = left_out.read_text(encoding="utf-8")
        assert not reason.startswith("compiling it failed"), reason
        pytest.skip(f"the extension can't be built here: {reason.strip()}")
    command = """
import json, torch, cldf_fast._C as native
torch.ops.cldf_fast.pixel_seed_out(torch.zeros(1, 1, 2, 3), torch.zeros(1, dtype=torch.int64))
print(json.dumps(native.build_record()))
"""
    environment = os.environ | {"PYTHONPATH": str(wheel)}
    output = subprocess.check_output([sys.executable, "-c", command], cwd=wheel, env=environment, text=True)
    record: dict[str, str] = json.loads(output)
    return record


def test_compiled_extension_says_how_it_was_built(wheel: Path, sdist: Path) -> None:
    record = _build_record(wheel)
    assert record["package_version"] == cldf_fast.__version__
    assert re.fullmatch(r"(GCC|Clang) \d+\..*", record["compiler"])
    assert record["cxx_standard"] == "C++20"
    assert record["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert record["torch_stable_abi"] == "2.10 and later"
    (binary,) = (wheel / "cldf_fast").glob("_C.*")
    assert str(sdist).encode() not in binary.read_bytes(), "the binary holds the path of the folder it was built in"


def test_cuda_code_is_in_wherever_nvcc_is_found(wheel: Path) -> None:
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not on the search path")
    assert re.fullmatch(r"nvcc \d+\.\d+ for sm_90 and PTX of the last", _build_record(wheel)["cuda"])
    (binary,) = (wheel / "cldf_fast").glob("_C.*")
    # Through it the loader finds torch's CUDA half, where there is one: see setup.py.
    assert b"\0libtorch.so\0" in binary.read_bytes()


FAILING_NVCC = """#!/bin/sh
case "$1" in
    --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
    --list-gpu-arch) echo compute_90 ;;
    --dryrun) echo '#$ TOP=/nowhere' ;;
    *) echo "nvcc fatal error: unsupported compiler"; exit 1 ;;
esac
"""


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CLDF_FAST_CUDA": "0"}, "CLDF_FAST_CUDA=0 was set where the package was built"),
        ({"CUDA_HOME": "{failing}"}, "compiling it failed: nvcc fatal error: unsupported compiler"),
        (
            {"CUDA_HOME": "{failing}", "CLDF_FAST_CUDA_ARCHITECTURES": "70 90"},
            "CLDF_FAST_CUDA_ARCHITECTURES: nvcc 13.0 does not know [70]",
        ),
        ({"CUDA_HOME": "", "CUDA_PATH": "", "PATH": "/usr/bin:/bin"}, "nvcc was not found"),
    ],
)
def test_without_cuda_the_rest_works_and_the_record_says_why(
    variables: dict[str, str], reason: str, wheel: Path, sdist: Path, tmp_path: Path
) -> None:
    if "PATH" in variables and any(map(os.path.exists, ("/usr/bin/nvcc", "/usr/local/cuda/bin/nvcc"))):
        pytest.skip("nvcc is in a usual place")
    failing = tmp_path / "bin" / "nvcc"
    failing.parent.mkdir()
    failing.write_text(FAILING_NVCC, encoding="utf-8")
    failing.chmod(0o755)
    environment = {name: value.format(failing=tmp_path) for name, value in variables.items()}
    with zipfile.ZipFile(_build("wheel", sdist, tmp_path / "built", **environment)) as archive:
        archive.extractall(tmp_path / "installed")
    record = _build_record(tmp_path / "installed")
    assert record["cuda"].startswith(f"left out: {reason}")
    assert record["torch_stable_abi"] == "2.10 and later"


def test_wheel_without_a_compiler_still_installs_and_says_why(sdist: Path, tmp_path: Path) -> None:
    missing = {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    with zipfile.ZipFile(_build("wheel", sdist, tmp_path / "built", **missing)) as archive:
        archive.extractall(tmp_path / "installed")
    package = tmp_path / "installed" / "cldf_fast"
    assert [path.name for path in package.glob("_C.*")] == ["_C.txt"]
    reason = (package / "_C.txt").read_text(encoding="utf-8")
    assert "no-such-compiler" in reason
    # The finder of an editable install would serve its own extension where the unpacked wheel has none.
    command = """
import runpy, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
runpy.run_module("cldf_fast.doctor", run_name="__main__")
"""
    output = subprocess.check_output(
        [sys.executable, "-c", command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        text=True,
    )
    assert reason.strip() in output


def test_version_is_written_once() -> None:
    assert PROJECT["dynamic"] == ["version"]
    sources = [path for room in ("cldf_fast", "kernels", "csrc", ".ci") for path in (ROOT / room).rglob("*")]
    sources += [path for path in ROOT.iterdir() if path.suffix in {".toml", ".py", ".txt", ".in"}]
    texts = {path: path.read_bytes() for path in sources if path.suffix not in {".pyc", ".so"} and path.is_file()}
    holders = [path for path, text in texts.items() if cldf_fast.__version__.encode() in text]
    assert holders == [ROOT / "cldf_fast" / "__init__.py"]


def test_core_needs_torch_and_numpy_alone() -> None:
    assert {_name(requirement) for requirement in PROJECT["dependencies"]} == {"torch", "numpy"}


def test_nothing_pulls_torchvision() -> None:
    # Their wheels force another torch.
    everything = {_name(requirement) for extra in EXTRAS.values() for requirement in extra}
    assert not everything & {"torchvision", "timm", "grad-cam", "lightning", "pytorch-lightning"}


def test_every_direct_dependency_is_pinned_for_set_up() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all("==" in pin for pin in pins)
    wanted = {_name(requirement) for extra in [PROJECT["dependencies"], *EXTRAS.values()] for requirement in extra}
    assert wanted == {_name(pin) for pin in pins}


def test_doctor_knows_the_extra_of_every_optional_package() -> None:
    for name, extra in OPTIONAL.items():
        homes = {title for title, requirements in EXTRAS.items() if _name(name) in map(_name, requirements)}
        assert extra in homes if extra else not homes, name
    listed = {_name(name) for name in OPTIONAL}
    for extra in ("train", "dicom", "deploy", "bench"):
        assert {_name(requirement) for requirement in EXTRAS[extra]} <= listed, extra
