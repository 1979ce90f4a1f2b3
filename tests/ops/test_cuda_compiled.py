"""What ptxas says of the CUDA kernels, for architectures that this machine need not have: a gate on spills."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda path: path.stem)
@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_no_kernel_spills(source: Path, architecture: int, tmp_path: Path) -> None:
    torch_headers = Path(torch.__file__).parent / "include"
    report = subprocess.run(
        [
            NVCC, "-std=c++20", "-O3", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v", "-Icsrc/include",
            "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(torch_headers), str(source),
            "-o", str(tmp_path / "kernels.cubin"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stderr  # fmt: skip
    kernels = re.findall(r"Compiling entry function '(\w+)'", report)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    shared = re.findall(r"Used \d+ registers(?:, used \d+ barriers)?(?:, (\d+) bytes smem)?", report)
    assert kernels
    # Functions that are not entries have a frame of their own in the report, and may not have spilled either.
    assert len(frames) >= len(kernels)
    assert all(frame == ("0", "0", "0") for frame in frames), report
    assert all(int(used or 0) <= 48 * 1024 for used in shared), report
