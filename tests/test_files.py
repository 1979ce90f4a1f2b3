"""A file is whole or absent, whatever happens while it is written."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cldf_fast.files import atomic_write, atomic_write_bytes, atomic_write_text

_KILLED = """
import os, signal, sys
from cldf_fast.files import atomic_write
with atomic_write(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_bytes_and_text_arrive_as_given(tmp_path: Path) -> None:
    atomic_write_bytes(tmp_path / "made" / "a.bin", b"\x00\r\n\xff")
    atomic_write_text(tmp_path / "b.txt", "naïve\nline")
    assert (tmp_path / "made" / "a.bin").read_bytes() == b"\x00\r\n\xff"
    assert (tmp_path / "b.txt").read_bytes() == "naïve\nline".encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.txt", "made"]


def test_temporary_keeps_endings_and_stays_in_the_folder(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "case.1.nii.gz") as temporary:
        assert temporary.name.endswith(".nii.gz") and temporary.name.startswith(".")
        assert temporary.parent == tmp_path
        temporary.write_bytes(b"x")
        assert not (tmp_path / "case.1.nii.gz").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["case.1.nii.gz"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_interrupted_write_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "old.txt"
    target.write_text("old")
    with pytest.raises(error), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["old.txt"]


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_killed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "old.txt"
    target.write_text("old")
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.run([sys.executable, "-c", _KILLED, str(target)], env=environment, check=False)
    assert process.returncode == -signal.SIGKILL
    assert target.read_text() == "old"
    atomic_write_text(target, "new")
    assert target.read_text() == "new"


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX")
def test_file_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_text("")
    atomic_write_text(tmp_path / "atomic", "")
    ordinary, atomic = ((tmp_path / name).stat().st_mode for name in ("ordinary", "atomic"))
    assert stat.S_IMODE(atomic) == stat.S_IMODE(ordinary)


@pytest.mark.parametrize("durable", [True, False])
def test_only_what_must_survive_a_power_cut_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    atomic_write_bytes(tmp_path / "file", b"new", durable=durable)
    assert (tmp_path / "file").read_bytes() == b"new"
    assert bool(flushed) == durable


def test_nothing_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "never"):
        pass
    assert list(tmp_path.iterdir()) == []
