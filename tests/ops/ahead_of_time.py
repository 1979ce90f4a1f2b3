"""Compiles Triton kernels for architectures that this machine need not have, and tells what it takes of each.

In a process of its own: there TRITON_INTERPRET, which turns kernels into Python functions, is surely absent.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# What one block may take of shared memory on each; compute capability 8.6 and 8.9, where sm_80's code runs too, have
# 99 KB as well.
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


Job = tuple[str, dict[str, str], dict[int, dict[str, Any]]]
"""A kernel, such as "infonce.forward_kernel"; types of the arguments that are no compile-time constants; for every
architecture the constants, num_warps and num_stages."""


def check_resources(*jobs: Job) -> None:
    """Assert that kernels spill nowhere and find enough shared memory."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, json.dumps(jobs)]
    output = subprocess.check_output(command, env=environment, text=True)
    for (kernel, types, _), used in zip(jobs, json.loads(output.splitlines()[-1]), strict=True):
        for architecture, usage in used.items():
            what = f"{kernel}, {types}, sm_{architecture}: {usage}"
            assert usage["STACK"] == usage["LOCAL"] == 0, f"spills: {what}"
            assert usage["SHARED"] <= SHARED[int(architecture)], what


def _usage(name: str, types: dict[str, str], options: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = name.split(".")
    kernel = getattr(importlib.import_module(f"cldf_fast.kernels.{module}"), function)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr")}
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = {}
    for architecture, constants in options.items():
        launch = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
        signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constants, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", int(architecture), 32), options=launch)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            text = subprocess.check_output([cuobjdump, "-res-usage", cubin.name], text=True, stderr=subprocess.STDOUT)
        found = (re.search(rf"{name}:(\d+)", text) for name in ("REG", "STACK", "LOCAL"))
        usage[architecture] = {match[0].split(":")[0]: int(match[1]) for match in found if match}
        usage[architecture]["SHARED"] = compiled.metadata.shared
    return usage


if __name__ == "__main__":
    print(json.dumps([_usage(*job) for job in json.loads(sys.argv[1])]))
