"""Shapes of tiles, from a table for each architecture, by operation, kernel, dtype and number of features.

`tuned/default.json` holds shapes that fit and do not spill on any architecture from sm_80 on. `tuned/sm90.json` and the
like are written on such a device and go first; they need not have every kernel. Nothing is tuned in a user's call.

    python -m cldf_fast.kernels.tuning [FILE [D ...]]    # measures here and writes FILE (tuned/sm90.json, say)
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "tuned"

Shape = tuple[int, int, int, int]
"""BLOCK_M, BLOCK_N, num_warps, num_stages."""

TRIED: tuple[Shape, ...] = tuple(
    (rows, columns, warps, stages)
    for (rows, columns), warps, stages in itertools.product(
        ((16, 32), (32, 16), (32, 32), (64, 32), (32, 64), (64, 64), (128, 32), (128, 64), (64, 128), (128, 128)),
        (4, 8),
        (2, 3),
    )
)

DIMS = (128, 64, 256, 32, 512)

_forced: dict[tuple[str, str], Shape] = {}


def architecture(device: torch.device) -> str:
    """Such as "sm90"; "default" for anything that is no CUDA device."""
    if device.type != "cuda":
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def tiles(operation: str, kernel: str, features: Tensor) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, num_warps and num_stages for features [*, D] of this dtype and device."""
    shape = _forced.get((operation, kernel))
    if shape is None:
        shape = _lookup(architecture(features.device), operation, kernel, _kind(features.dtype), features.shape[1])
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), shape, strict=True))


def _kind(dtype: torch.dtype) -> str:
    return "float32" if dtype == torch.float32 else "half"


@cache
def _lookup(name: str, operation: str, kernel: str, kind: str, dim: int) -> Shape:
    for table in (_table(name), _table("default")):
        by_dim = table.get(operation, {}).get(kernel, {}).get(kind, {})
        if by_dim:
            # The next larger number of features in the table, or its largest.
            known = sorted(map(int, by_dim))
            return tuple(by_dim[str(next((size for size in known if size >= dim), known[-1]))])
    raise KeyError(f"{operation}, {kernel}, {kind}: no shape of tiles in {FOLDER}")


@cache
def _table(name: str) -> dict[str, Any]:
    file = FOLDER / f"{name}.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))["tiles"]) if file.is_file() else {}


def tune(
    file: Path,
    device: torch.device,
    timer: Callable[[Callable[[], Any]], float],
    *,
    size: int = 8192,
    dims: Iterable[int] = DIMS,
    tried: Iterable[Shape] = TRIED,
) -> None:
    """Measure every kernel of `pixel_infonce` with every shape that compiles and write the best to a table.

    timer: milliseconds that a call takes. size: anchors, and as many candidates, of four classes. The table is written
    after every kernel: whoever has no more time keeps what there is. What a file holds of others stays in it.
    """
    from . import infonce

    before = json.loads(file.read_text(encoding="utf-8"))["tiles"] if file.is_file() else {}
    table: dict[str, Any] = before.get("infonce", {})
    done: list[str] = []
    for dtype, dim in itertools.product((torch.bfloat16, torch.float32), dims):
        features = [torch.nn.functional.normalize(torch.randn(size, dim, device=device)).to(dtype) for _ in range(2)]
        labels = [torch.randint(0, 4, (size,), device=device) for _ in range(2)]
        inputs: Any = (*features, *labels, None, 0.1, "per_positive")
        state: Any = infonce.pixel_infonce(*inputs)[1:]
        forward = partial(infonce.pixel_infonce, *inputs)
        grad = torch.rand(size, device=device)
        arguments: Any = (grad, *state, *inputs, True, True)
        backward = partial(infonce.pixel_infonce_backward, *arguments)
        for kernel, run in (
            ("forward_kernel", forward),
            ("positives_kernel", forward),
            ("anchor_gradient_kernel", backward),
            ("candidate_gradient_kernel", backward),
        ):
            times = {shape: _time(kernel, shape, run, timer) for shape in tried}
            best = min(times, key=lambda shape: times[shape])
            table.setdefault(kernel, {}).setdefault(_kind(dtype), {})[str(dim)] = best
            print(f"{kernel}, {dtype}, D={dim}: {best}, {times[best]:.3f} ms", flush=True)
            done.append(f"{kernel}, {_kind(dtype)}, {dim}")
            measured = {"device": _device_name(device), "torch": torch.__version__, "size": size, "tiles": done}
            record = {"measured": measured, "tiles": before | {"infonce": table}}
            file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _time(kernel: str, shape: Shape, run: Callable[[], Any], timer: Callable[[Callable[[], Any]], float]) -> float:
    """Milliseconds, or infinity for a shape that the device has no room for, or the assembler refuses."""
    from triton.runtime.errors import TritonError

    _forced["infonce", kernel] = shape
    try:
        return timer(run)
    except TritonError:
        return float("inf")
    finally:
        _forced.clear()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


if __name__ == "__main__":
    from triton.testing import do_bench

    gpu = torch.device("cuda", torch.cuda.current_device())
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER / f"{architecture(gpu)}.json"
    tune(path, gpu, do_bench, dims=tuple(map(int, sys.argv[2:])) or DIMS)
