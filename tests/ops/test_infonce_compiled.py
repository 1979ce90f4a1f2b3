"""Triton's kernels compiled ahead of time, as a machine without a GPU can: for every architecture, without spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# What one block may take of shared memory on each; compute capability 8.6 and 8.9, where sm_80's code runs too, have
# 99 KB as well.
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

# In a process of its own: there TRITON_INTERPRET, which turns kernels into Python functions, is surely absent.
_COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cldf_fast.kernels import infonce, tuning

kernel_name, dtype, dim, variant, prepared, architectures = json.loads(sys.argv[1])
kernel = getattr(infonce, kernel_name)
features = "*" + {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]
types = {
    "anchor_ptr": features, "candidate_ptr": features, "grad_ptr": features, "anchor_label_ptr": "*i64",
    "candidate_label_ptr": "*i64", "self_ptr": "*i64", "positives_ptr": "*i64", "bounds_ptr": "*i32", "M": "i32",
    "N": "i32", "scale": "fp32", "inverse_temperature": "fp32",
}
aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr")}
cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
usage = {}
for architecture in architectures:
    tuning.architecture = lambda device: f"sm{architecture}"
    constants = infonce.options(kernel_name, torch.empty(0, dim, dtype=getattr(torch, dtype)), variant, True, prepared)
    launch = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text = subprocess.check_output([cuobjdump, "-res-usage", cubin.name], text=True, stderr=subprocess.STDOUT)
    usage[architecture] = {name: int(re.search(name + r":(\\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}
    usage[architecture]["SHARED"] = compiled.metadata.shared
print(json.dumps(usage))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "dim"), [("bfloat16", 128), ("bfloat16", 256), ("float32", 64)])
@pytest.mark.parametrize(
    ("kernel", "variant"),
    [
        ("forward_kernel", "supcon"),
        ("forward_kernel", "per_positive"),
        ("positives_kernel", "per_positive"),
        ("anchor_gradient_kernel", "per_positive"),
        ("candidate_gradient_kernel", "per_positive"),
    ],
)
@pytest.mark.parametrize("prepared", [True, False])
def test_no_kernel_spills(kernel: str, variant: str, dtype: str, dim: int, prepared: bool) -> None:
    arguments = json.dumps([kernel, dtype, dim, variant, prepared, list(SHARED)])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    output = subprocess.check_output([sys.executable, "-c", _COMPILE, arguments], env=environment, text=True)
    for architecture, usage in json.loads(output.splitlines()[-1]).items():
        assert usage["STACK"] == usage["LOCAL"] == 0, f"sm_{architecture} spills: {usage}"
        assert usage["SHARED"] <= SHARED[int(architecture)], f"sm_{architecture}: {usage}"
