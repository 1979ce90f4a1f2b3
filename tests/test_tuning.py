"""The table of tile shapes and the tuner that writes one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from cldf_fast.kernels import tuning

KERNELS = ("forward_kernel", "positives_kernel", "anchor_gradient_kernel", "candidate_gradient_kernel")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of one device, in a folder of its own."""
    (tmp_path / "default.json").write_text((tuning.FOLDER / "default.json").read_text(encoding="utf-8"))
    shapes = {"forward_kernel": {"half": {"64": [1, 2, 3, 4], "256": [5, 6, 7, 8]}}}
    (tmp_path / "sm77.json").write_text(json.dumps({"measured": None, "tiles": {"infonce": shapes}}))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm77")
    for function in (tuning._lookup, tuning._table):
        function.cache_clear()
        # Nobody else is to see these tables.
        monkeypatch.setattr(tuning, function.__name__, function.__wrapped__)
    return tmp_path


@pytest.mark.parametrize(
    ("dim", "shape"), [(8, (1, 2, 3, 4)), (64, (1, 2, 3, 4)), (65, (5, 6, 7, 8)), (999, (5, 6, 7, 8))]
)
def test_the_next_larger_number_of_features_counts(folder: Path, dim: int, shape: tuple[int, ...]) -> None:
    found = tuning.tiles("infonce", "forward_kernel", torch.empty(0, dim, dtype=torch.float16))
    assert tuple(found.values()) == shape
    assert tuple(found) == ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")


def test_what_a_device_s_table_lacks_is_the_default(folder: Path) -> None:
    default = json.loads((folder / "default.json").read_text())["tiles"]["infonce"]
    for kernel, dtype, kind in (("forward_kernel", torch.float32, "float32"), ("positives_kernel", torch.half, "half")):
        found = tuning.tiles("infonce", kernel, torch.empty(0, 16, dtype=dtype))
        assert list(found.values()) in default[kernel][kind].values()


@pytest.mark.parametrize("file", sorted(tuning.FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_shipped_tables_name_kernels_and_shapes_that_there_are(file: Path) -> None:
    for kernel, kinds in json.loads(file.read_text(encoding="utf-8"))["tiles"]["infonce"].items():
        assert kernel in KERNELS
        for kind, by_dim in kinds.items():
            assert kind in ("half", "float32")
            assert all(tuple(shape) in tuning.TRIED for shape in by_dim.values())


_TUNE = """
import sys
from pathlib import Path
import torch
from cldf_fast.kernels import tuning

SLOW, FAST = (64, 64, 4, 2), (32, 32, 4, 2)

def timer(run):
    run()
    return 1.0 if SLOW in tuning._forced.values() else 0.5

tuning.tune(Path(sys.argv[1]), torch.device("cpu"), timer, size=40, dims=(16,), tried=(SLOW, FAST))
assert not tuning._forced
"""


def test_the_tuner_writes_the_fastest(tmp_path: Path) -> None:
    file = tmp_path / "sm00.json"
    other = {"forward_kernel": {"half": {"64": [64, 32, 4, 2], "16": [1, 2, 3, 4]}}}
    file.write_text(json.dumps({"measured": None, "tiles": {"infonce": other}}))
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", _TUNE, str(file)], env=environment, check=True, stdout=subprocess.DEVNULL)
    record = json.loads(file.read_text())
    best = {"16": [32, 32, 4, 2]}
    expected = {kernel: {"half": dict(best), "float32": best} for kernel in KERNELS}
    expected["forward_kernel"]["half"]["64"] = [64, 32, 4, 2]  # what was there of others
    assert record["tiles"] == {"infonce": expected}
    assert record["measured"]["device"] == "cpu"
    assert len(record["measured"]["tiles"]) == 8
    assert "forward_kernel, half, 16" in record["measured"]["tiles"]
