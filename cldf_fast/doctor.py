"""What this install can do on this machine: versions, devices, the compiled extension, the backend of every operation.

`cldf-fast doctor` prints it. `python -m cldf_fast.doctor` does so where only torch and numpy are installed.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cldf_fast import __version__
from cldf_fast.ops import _native, backend_report

# Distributions that the package can do without, and the extra that installs each. TensorRT proper is in no extra: it
# is not on the public index.
OPTIONAL = {
    "lightning-fabric": "train",
    "matplotlib": "train",
    "nibabel": "train",
    "Pillow": "train",
    "pydantic": "train",
    "pydicom": "train",
    "pyyaml": "train",
    "rich": "train",
    "safetensors": "train",
    "scipy": "train",
    "typer": "train",
    "highdicom": "dicom",
    "cryptography": "deploy",
    "onnx": "deploy",
    "onnxruntime": "deploy",
    "onnxscript": "deploy",
    "tensorrt-rtx": "deploy",
    "tensorrt": "",
    "captum": "bench",
    "diffusers": "bench",
    "einops": "bench",
    "monai": "bench",
    "pytorch-metric-learning": "bench",
    "pytest-benchmark": "bench",
    "hypothesis": "test",
    "mypy": "test",
    "pytest": "test",
    "ruff": "test",
}

# Written by setup.py in the place of the extension that it could not build.
_LEFT_OUT = Path(__file__).with_name("_C.txt")


def collect() -> dict[str, Any]:
    """The whole report as JSON-ready data.

    versions: name -> version ("" where absent) of the package, python and the core. optional: distribution ->
    {"version": "" where absent, "extra": the extra that installs it, "" if none does}. cpu: model, features, cores and
    threads. cuda: {"version": of torch's build, "" without; "reason": why no device can be used, or ""; "devices"}.
    native: {"record": the build record, {} without an extension; "reason": why there is none, or ""}.
    backends: operation -> backend -> "serving" or the reason why it doesn't on this machine, the fastest first.
    """
    return {
        "versions": {
            "cldf_fast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": _version("numpy"),
            "triton": _version("triton"),
        },
        "platform": f"{platform.system()} {platform.machine()}",
        "optional": {name: {"version": _version(name), "extra": extra} for name, extra in OPTIONAL.items()},
        "cpu": _cpu(),
        "cuda": _cuda(),
        "native": _extension(),
        "backends": backend_report(),
    }


def render(report: dict[str, Any]) -> str:
    """The report of `collect` as plain text for a terminal, without a trailing newline."""
    versions = {name: version or "absent" for name, version in report["versions"].items()}
    optional = {name: entry["version"] or _advice(entry["extra"]) for name, entry in report["optional"].items()}
    native = report["native"]
    choices = {
        op: next((backend for backend, state in states.items() if state == "serving"), "none")
        for op, states in report["backends"].items()
    }
    sections = {
        f"Versions ({report['platform']})": _rows(versions),
        "Optional packages": _rows(optional),
        "Devices": _rows(_device_rows(report["cpu"], report["cuda"])),
        "Compiled extension": _rows(native["record"]) or [native["reason"]],
        "Operations, and the fastest backend that serves each here": _rows(choices),
        "Why not the others": _objections(report["backends"]) or ["every backend serves every operation"],
    }
    return "\n\n".join("\n  ".join([title, *lines]) for title, lines in sections.items())


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _cpu() -> dict[str, Any]:
    # The cores that this process may use, which in a container are fewer than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": _cpu_model(),
        "features": torch.backends.cpu.get_cpu_capability(),
        "cores": cores,
        "threads": torch.get_num_threads(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def _cuda() -> dict[str, Any]:
    version = torch.version.cuda or ""
    if not version:
        return {"version": "", "reason": f"torch {torch.__version__} is a build without CUDA", "devices": []}
    if not torch.cuda.is_available():
        return {"version": version, "reason": "no NVIDIA driver, or no device that it shows to us", "devices": []}
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    devices = [
        {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_gib": p.total_memory / 2**30} for p in properties
    ]
    return {"version": version, "reason": "", "devices": devices}


def _extension() -> dict[str, Any]:
    record = _native.build_record()
    if record:
        return {"record": record, "reason": ""}
    left_out = _LEFT_OUT.read_text(encoding="utf-8").strip() if _LEFT_OUT.is_file() else ""
    return {"record": {}, "reason": f"left out by the build: {left_out}" if left_out else _native.reason or ""}


def _device_rows(cpu: dict[str, Any], cuda: dict[str, Any]) -> dict[str, str]:
    rows = {"cpu": f"{cpu['model']}, {cpu['features']}, {cpu['cores']} cores, {cpu['threads']} threads used by torch"}
    for index, device in enumerate(cuda["devices"]):
        rows[f"cuda:{index}"] = (
            f"{device['name']}, compute capability {device['capability']}, {device['memory_gib']:.0f} GiB"
        )
    if cuda["reason"]:
        rows["cuda"] = cuda["reason"]
    return rows


def _rows(entries: dict[str, str]) -> list[str]:
    width = max(map(len, entries), default=0)
    return [f"{name:<{width}}  {value}" for name, value in entries.items()]


def _advice(extra: str) -> str:
    return f"absent; comes with the extra [{extra}]" if extra else "absent; installs from its vendor's index"


def _objections(backends: dict[str, dict[str, str]]) -> list[str]:
    """One line for each backend and reason, with the operations that it holds for unless it holds for all."""
    operations: dict[tuple[str, str], list[str]] = {}
    for op, states in backends.items():
        for backend, reason in states.items():
            if reason != "serving":
                operations.setdefault((backend, reason), []).append(op)
    return [
        f"{backend}: {reason}" + ("" if len(ops) == len(backends) else f" ({', '.join(ops)})")
        for (backend, reason), ops in operations.items()
    ]


if __name__ == "__main__":
    print(render(collect()))
