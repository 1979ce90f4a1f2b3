"""The CUDA kernels where there is no GPU: compiled for the CPU with tests/cuda_emulator, in place of the C++ ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TORCH = Path(torch.__file__).parent

# In a process of its own, where the operators for tensors on the CPU are replaced.
_RUN = """
import sys
import pytest, torch, cldf_fast.ops
torch.ops.load_library(sys.argv[1])
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(
    ("capability", "order", "selection"),
    [(9, "forward", "cpu"), (8, "backward", "cpu and (maps or percentile or level or labels)")],
)
def test_emulated_kernels_pass_the_tests_of_the_backends(
    capability: int, order: str, selection: str, tmp_path: Path
) -> None:
    """Capability 9 has clusters of blocks. The order is that of threads between two barriers."""
    library = tmp_path / "emulated.so"
    subprocess.run(
        [
            "g++", "-std=c++20", "-O2", "-g0", "-shared", "-fPIC", "-Wno-attributes",
            # The emulator jumps between stacks, which the checked longjmp takes for an error.
            "-U_FORTIFY_SOURCE",
            f"-DEMULATED_CAPABILITY={capability}", "-DTORCH_TARGET_VERSION=0x020a000000000000",
            "-Icsrc/include", "-Itests/cuda_emulator", "-isystem", f"{TORCH}/include",
            "tests/cuda_emulator/saliency.cpp", f"-L{TORCH}/lib", "-ltorch_cpu", "-lc10", "-o", str(library),
        ],
        cwd=ROOT,
        check=True,
    )  # fmt: skip
    tests = ["tests/ops/test_saliency_backends.py", "-k", f"{selection} and not thread", "-m", "not slow"]
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(library), *tests],
        cwd=ROOT,
        env=os.environ | {"CLDF_EMULATOR_ORDER": order},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "Overriding a previously registered kernel" in done.stderr  # the C++ operators were there and are not now
    assert " passed" in done.stdout
