"""Whatever is done to a sealed engine directory is refused with one sentence, and no byte of it is handed out."""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cldf_fast
from cldf_fast.deploy import manifest as module
from cldf_fast.deploy.manifest import (
    MANIFEST,
    SIGNATURE,
    EngineKey,
    Manifest,
    Runtime,
    open_sealed,
    operating_system,
    seal,
)
from cldf_fast.errors import BackendError, CLDFError, ConfigError, EngineMismatchError, IntegrityError

ROOT = Path(__file__).resolve().parents[2]
FP16, FP32 = "engines/0a1b2c3d_fp16_sm86.plan", "engines/0a1b2c3d_fp32_sm86.engine"
HALF, FULL = "half.onnx", "model.onnx"  # what FP16 and FP32 are built from
KINDS = ["config.json", "MODEL_CARD.md", "model.onnx", FP16, FP32, "golden/inputs.npz", "engines/parity.json"]


def _read_all(folder: Path, **arguments: Any) -> dict[str, bytes]:
    """Open and read everything, both ways."""
    sealed = open_sealed(folder, **arguments)
    contents = {name: sealed.read(name) for name in sealed.manifest.files}
    sealed.verify_all()
    return contents


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as somebody would who knows its form."""
    document = json.loads((path / MANIFEST).read_bytes())
    change(document)
    text = json.dumps(document, indent=2, separators=(",", ": "), sort_keys=True) + "\n"
    (path / MANIFEST).write_bytes(text.encode())


def _one_sentence(error: pytest.ExceptionInfo[CLDFError]) -> bool:
    return "\n" not in str(error.value) and str(error.value).isprintable()


# What is sound


def test_sealed_directory_gives_back_what_was_sealed(directory: Any) -> None:
    directory.seal()
    assert _read_all(directory.path) == directory.contents
    sealed = open_sealed(directory.path)
    assert sealed.read_json("config.json") == {"size": 64, "noise_levels": [0.02, 0.1]}
    assert sealed.manifest.engines == directory.engines
    assert sealed.manifest.package_version == cldf_fast.__version__
    assert sealed.manifest.sha256 == hashlib.sha256((directory.path / MANIFEST).read_bytes()).hexdigest()
    assert (sealed.signature, sealed.verified) == (None, False)


def test_manifest_is_what_sha256sum_and_stat_say(directory: Any) -> None:
    directory.seal()
    listed = json.loads((directory.path / MANIFEST).read_bytes())["files"]
    assert list(listed) == sorted(directory.contents)
    names = list(listed)
    output = subprocess.check_output(["sha256sum", *names], cwd=directory.path, text=True)
    assert [line.split()[0] for line in output.splitlines()] == [listed[name]["sha256"] for name in names]
    assert {name: entry["size"] for name, entry in listed.items()} == {
        name: (directory.path / name).stat().st_size for name in names
    }


def test_same_content_gives_the_same_manifest(directory: Any) -> None:
    directory.seal()
    first = (directory.path / MANIFEST).read_bytes()
    directory.seal()
    assert (directory.path / MANIFEST).read_bytes() == first


def test_files_larger_than_a_chunk_are_hashed_whole(directory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 7)
    directory.seal()
    assert _read_all(directory.path) == directory.contents
    found = json.loads((directory.path / MANIFEST).read_bytes())["files"][FP16]["sha256"]
    assert found == hashlib.sha256(directory.contents[FP16]).hexdigest()


def test_directory_without_engines_and_golden(directory: Any) -> None:
    shutil.rmtree(directory.path / "engines")
    shutil.rmtree(directory.path / "golden")
    seal(directory.path, engines={})
    assert sorted(_read_all(directory.path)) == sorted(name for name in directory.contents if "/" not in name)


def test_directory_reached_through_a_link(directory: Any, tmp_path: Path) -> None:
    directory.seal()
    (tmp_path / "current").symlink_to(directory.path)
    assert _read_all(tmp_path / "current") == directory.contents


def test_empty_file(directory: Any) -> None:
    (directory.path / "MODEL_CARD.md").write_bytes(b"")
    directory.seal()
    assert open_sealed(directory.path).read("MODEL_CARD.md") == b""


def test_no_third_party_module_is_needed(directory: Any) -> None:
    directory.seal()
    code = """
import sys
from cldf_fast.deploy import archive, audit, manifest
manifest.open_sealed(sys.argv[1]).verify_all()
print(*{name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names))
"""
    # -S: no site-packages, no editable installs.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(directory.path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {"cldf_fast", "__main__"}


# Contents that were changed


@pytest.mark.parametrize("name", KINDS)
def test_one_flipped_bit(directory: Any, name: str) -> None:
    directory.seal()
    sealed = open_sealed(directory.path)
    data = bytearray(directory.contents[name])
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    (directory.path / name).write_bytes(data)
    message = f"{name}: expected content with SHA-256 .*`cldf-fast export RUN --format"
    for check in (lambda: sealed.read(name), sealed.verify_all):
        with pytest.raises(IntegrityError, match=message) as error:
            check()
        assert _one_sentence(error)
    if name.endswith(".json"):
        with pytest.raises(IntegrityError, match=message):
            sealed.read_json(name)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""])
def test_truncated_or_appended(directory: Any, name: str, change: Callable[[bytes], bytes]) -> None:
    directory.seal()
    sealed = open_sealed(directory.path)
    (directory.path / name).write_bytes(change(directory.contents[name]))
    for check in (lambda: sealed.read(name), sealed.verify_all):
        with pytest.raises(IntegrityError, match=f"{name}: expected {len(directory.contents[name])} bytes") as error:
            check()
        assert _one_sentence(error)


def test_command_that_mends_an_engine_builds_one(directory: Any) -> None:
    directory.seal()
    (directory.path / FP16).write_bytes(b"")
    with pytest.raises(IntegrityError, match=rf"`cldf-fast export RUN --format tensorrt --out {directory.path}`"):
        open_sealed(directory.path).read(FP16)


def test_file_that_grows_while_it_is_read(directory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    directory.seal()
    sealed = open_sealed(directory.path)
    monkeypatch.setattr(module, "_CHUNK", 1)  # so that a chunk ends where the file did
    listed = os.stat(directory.path / "model.onnx")
    with (directory.path / "model.onnx").open("ab") as file:
        file.write(b"more")
    fstat = os.fstat  # as if the file had grown right after it was asked
    monkeypatch.setattr(os, "fstat", lambda file: listed if fstat(file).st_ino == listed.st_ino else fstat(file))
    for check in (lambda: sealed.read("model.onnx"), sealed.verify_all):
        with pytest.raises(IntegrityError, match=r"model\.onnx: expected .* bytes .*while it was read"):
            check()


@pytest.mark.parametrize(("one", "two"), [("model.onnx", "half.onnx"), (FP16, FP32), ("config.json", "labels.json")])
def test_swapped_files(directory: Any, one: str, two: str) -> None:
    directory.seal()
    (directory.path / one).write_bytes(directory.contents[two])
    (directory.path / two).write_bytes(directory.contents[one])
    sealed = open_sealed(directory.path)
    for name in (one, two):
        with pytest.raises(IntegrityError, match=re.escape(name)):
            sealed.read(name)


@pytest.mark.parametrize("name", ["model.onnx", "config.json", "golden/inputs.npz"])
def test_pickle_in_place_of_a_file_does_not_run(directory: Any, tmp_path: Path, name: str) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    directory.seal()
    sealed = open_sealed(directory.path)
    (directory.path / name).write_bytes(pickle.dumps(Payload()))
    with pytest.raises(IntegrityError):
        sealed.read(name)
    with pytest.raises(IntegrityError):
        sealed.read_json(name)
    # Sealed as it is, it passes as bytes; as JSON or an array it is refused all the same.
    engines = {}
    for engine in (FP16, FP32):
        (directory.path / engine).unlink()
    seal(directory.path, engines=engines)
    sealed = open_sealed(directory.path)
    with pytest.raises(IntegrityError, match="strict JSON"):
        sealed.read_json(name)
    with pytest.raises(ValueError):
        np.load(io.BytesIO(sealed.read(name)), allow_pickle=False)
    assert not (tmp_path / "ran").exists()


def test_replaced_while_it_is_read(directory: Any) -> None:
    """Old bytes or an error, whenever the file is replaced, or written to in place, by a writer who never stops."""
    size = 1 << 18
    old, new = random.randbytes(size), random.randbytes(size)
    target, spare = directory.path / "golden/inputs.npz", directory.path.parent / "spare"
    target.write_bytes(old)
    directory.seal()
    sealed = open_sealed(directory.path)
    stop = threading.Event()

    def attack() -> None:
        generator = random.Random(0)
        while not stop.is_set():
            data = generator.choice([old, new])
            if generator.random() < 0.5:
                spare.write_bytes(data)
                os.replace(spare, target)
            else:
                with target.open("r+b", buffering=0) as file:
                    for offset in range(0, size, size // 8):
                        file.write(data[offset : offset + size // 8])

    writer = threading.Thread(target=attack)
    writer.start()
    outcomes = {"old": 0, "refused": 0}
    deadline = time.monotonic() + 20
    try:
        # At least 50 reads, and both outcomes.
        while (sum(outcomes.values()) < 50 or 0 in outcomes.values()) and time.monotonic() < deadline:
            try:
                assert sealed.read("golden/inputs.npz") == old
                outcomes["old"] += 1
            except IntegrityError:
                outcomes["refused"] += 1
    finally:
        stop.set()
        writer.join()
    assert outcomes["old"] and outcomes["refused"], outcomes


# The folder


@pytest.mark.parametrize("name", ["config.json", "model.onnx", FP16])
def test_symbolic_link_to_the_same_content(directory: Any, tmp_path: Path, name: str) -> None:
    directory.seal()
    sealed = open_sealed(directory.path)
    (directory.path / name).rename(tmp_path / "elsewhere")
    (directory.path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="symbolic link") as error:
        sealed.read(name)
    assert _one_sentence(error)
    for check in (sealed.verify_all, lambda: open_sealed(directory.path)):
        with pytest.raises(IntegrityError, match="is a link"):
            check()


def test_parent_folder_that_is_a_symbolic_link(directory: Any, tmp_path: Path) -> None:
    directory.seal()
    sealed = open_sealed(directory.path)
    (directory.path / "engines").rename(tmp_path / "elsewhere")
    (directory.path / "engines").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="something behind one"):
        sealed.read(FP16)
    with pytest.raises(IntegrityError, match="'engines' is a link"):
        open_sealed(directory.path)


@pytest.mark.parametrize("name", [MANIFEST, SIGNATURE])
def test_manifest_and_signature_that_are_symbolic_links(
    directory: Any, keys: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    directory.seal(keys[0])
    (directory.path / name).rename(tmp_path / "elsewhere")
    (directory.path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match=f"{name}: expected a regular file, got a symbolic link"):
        open_sealed(directory.path, public_key=keys[1])


def _folder(path: Path) -> None:
    path.mkdir()


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


@pytest.mark.parametrize("make", [_folder, os.mkfifo, _socket])
@pytest.mark.parametrize("name", ["labels.json", FP16])
def test_something_else_in_place_of_a_file(
    directory: Any, name: str, make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.seal()
    sealed = open_sealed(directory.path)
    (directory.path / name).unlink()
    monkeypatch.chdir((directory.path / name).parent)  # the paths of sockets are short
    make(Path(Path(name).name))
    with pytest.raises(IntegrityError, match="expected a regular file"):
        sealed.read(name)
    with pytest.raises(IntegrityError, match="does not belong"):
        open_sealed(directory.path)
    with pytest.raises(IntegrityError, match="does not belong"):
        directory.seal()


@pytest.mark.parametrize("name", ["config.json", "golden/inputs.npz", FP32])
def test_missing_file(directory: Any, name: str) -> None:
    directory.seal()
    sealed = open_sealed(directory.path)
    (directory.path / name).unlink()
    for check in (lambda: sealed.read(name), sealed.verify_all, lambda: open_sealed(directory.path)):
        with pytest.raises(IntegrityError, match=f"{name}: is missing"):
            check()


@pytest.mark.parametrize("name", ["other.onnx", "engines/other.plan", ".hidden", "golden/x.npz", "notes.txt", "\udcff"])
def test_extra_file(directory: Any, name: str) -> None:
    directory.seal()
    sealed = open_sealed(directory.path)
    (directory.path / name).write_bytes(b"")
    for check in (sealed.verify_all, lambda: open_sealed(directory.path)):
        with pytest.raises(IntegrityError, match="does not list it") as error:
            check()
        assert _one_sentence(error)


def test_extra_folder(directory: Any) -> None:
    directory.seal()
    (directory.path / "engines" / "deeper").mkdir()
    with pytest.raises(IntegrityError, match="'engines/deeper' is a link, a folder"):
        open_sealed(directory.path)


def test_file_that_may_not_be_read(directory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    directory.seal()
    sealed = open_sealed(directory.path)

    def refuse(*arguments: Any, **options: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(IntegrityError, match="Permission denied"):
        sealed.read("config.json")


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", MANIFEST, "engines", "engines/../config.json", ""])
def test_name_that_is_not_listed_is_not_read(directory: Any, name: str) -> None:
    directory.seal()
    with pytest.raises(IntegrityError, match="lists no file"):
        open_sealed(directory.path).read(name)


def test_no_descriptor_is_left_open(directory: Any) -> None:
    directory.seal()
    sealed = open_sealed(directory.path)
    (directory.path / "labels.json").unlink()
    os.mkfifo(directory.path / "labels.json")
    (directory.path / FP16).unlink()
    before = len(os.listdir("/proc/self/fd"))
    for name in ("labels.json", FP16, "config.json"):
        with contextlib.suppress(IntegrityError):
            sealed.read(name)
    assert len(os.listdir("/proc/self/fd")) == before


def test_folder_without_a_manifest(directory: Any, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"MANIFEST\.json: is missing"):
        open_sealed(directory.path)
    with pytest.raises(IntegrityError, match="is no engine directory"):
        open_sealed(tmp_path / "nowhere")
    with pytest.raises(IntegrityError, match="is no engine directory"):
        open_sealed(directory.path / "config.json")


# What can't be sealed


@pytest.mark.parametrize(
    "name",
    [".partial-0a-model.onnx", "model.onnx.tmp", "model.onnx.data", "weights.pt", "weights.pkl", "engines/a.so",
     "modèle.onnx", "a b.onnx", "model.onnx\n", "-rf.onnx", "golden/a.npy", "config.yaml"],
)  # fmt: skip
def test_sealing_refuses_files_that_do_not_belong(directory: Any, name: str) -> None:
    (directory.path / name).write_bytes(b"")
    with pytest.raises(IntegrityError, match="does not belong in an engine directory; remove it") as error:
        directory.seal()
    assert _one_sentence(error)
    assert not (directory.path / MANIFEST).exists()


@pytest.mark.parametrize("name", ["config.json", "preprocessing.json", "labels.json", "MODEL_CARD.md"])
def test_sealing_refuses_an_incomplete_directory(directory: Any, name: str) -> None:
    (directory.path / name).unlink()
    with pytest.raises(IntegrityError, match=f"{name} is missing"):
        directory.seal()


def test_sealing_refuses_symbolic_links(directory: Any) -> None:
    (directory.path / "link.onnx").symlink_to("model.onnx")
    with pytest.raises(IntegrityError, match=r"'link\.onnx' is a link"):
        directory.seal()


def test_sealing_refuses_names_that_differ_by_case(directory: Any) -> None:
    (directory.path / "Model.onnx").write_bytes(b"")
    if len(list(directory.path.glob("[mM]odel.onnx"))) < 2:
        pytest.skip("this file system ignores case")
    with pytest.raises(IntegrityError, match=r"Model\.onnx and model\.onnx differ by upper and lower case"):
        directory.seal()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights_sha256", "A" * 64),
        ("weights_sha256", "0" * 63),
        ("precision", ""),
        ("opset", "18"),
        ("opset", True),
        ("opset", float("nan")),
        ("opset", 0),
        ("shapes", {}),
        ("shapes", {"image": ((1, 3), (4, 3))}),
        ("shapes", {"image": ((2, 3), (1, 3), (8, 3))}),
        ("shapes", {"image": ((1, 3), (4, 3), (8,))}),
        ("shapes", {"image": ((), (), ())}),
        ("shapes", {"image": ((-1, 3), (4, 3), (8, 3))}),
        ("compute_capability", "sm_86"),
        ("gpu_name", "RTX\x1b[2J"),
        ("gpu_name", "x" * 201),
        ("builder_flags", ("a", 1)),
    ],
)
def test_sealing_refuses_engine_keys_that_are_wrong(directory: Any, field: str, value: Any) -> None:
    directory.engines[FP16] = replace(directory.engines[FP16], **{field: value})
    with pytest.raises(IntegrityError) as error:
        directory.seal()
    assert _one_sentence(error)
    assert not (directory.path / MANIFEST).exists()


def test_sealing_wants_a_key_for_every_engine_and_nothing_else(directory: Any) -> None:
    for engines in ({}, {**directory.engines, "engines/none.plan": directory.engines[FP16]}):
        with pytest.raises(IntegrityError, match="a key for every listed engine"):
            seal(directory.path, engines=engines)


def test_engine_of_another_onnx_file_is_stale(directory: Any) -> None:
    (directory.path / "half.onnx").write_bytes(b"exported again")
    with pytest.raises(IntegrityError, match=f"{FP16}: was built from an ONNX file that is not listed"):
        directory.seal()


# The manifest


@pytest.mark.parametrize(
    "name",
    ["../config.json", "/etc/passwd", "engines/../../x.plan", "engines//x.plan", "./x.onnx", "C:\\x.onnx", "C:x.onnx",
     "engines\\x.plan", "x\0.onnx", "x.onnx\n", "", ".", "..", "engines/", "engines/x.plan/", "~/x.onnx", "é.onnx",
     "\ud800.onnx", MANIFEST, SIGNATURE, "a" * 300 + ".onnx"],
)  # fmt: skip
def test_path_in_the_manifest_that_is_not_plain(directory: Any, name: str) -> None:
    directory.seal()
    _edit(directory.path, lambda document: document["files"].update({name: document["files"]["model.onnx"]}))
    with pytest.raises(IntegrityError, match="does not belong in an engine directory") as error:
        open_sealed(directory.path)
    assert _one_sentence(error)


@pytest.mark.parametrize("name", ["Model.onnx", "GOLDEN/inputs.npz", "golden/Inputs.npz", "Config.json"])
def test_paths_in_the_manifest_that_differ_by_case(directory: Any, name: str) -> None:
    directory.seal()
    _edit(directory.path, lambda document: document["files"].update({name: document["files"]["model.onnx"]}))
    with pytest.raises(IntegrityError, match=r"differ by upper and lower case|does not belong"):
        open_sealed(directory.path)


@pytest.mark.parametrize("section", ["files", "engines", "format"])
def test_duplicate_key_in_the_manifest(directory: Any, section: str) -> None:
    directory.seal()
    text = (directory.path / MANIFEST).read_text()
    (directory.path / MANIFEST).write_text(text.replace(f'"{section}":', f'"{section}": {{}}, "{section}":', 1))
    with pytest.raises(IntegrityError, match=f"the key '{section}' appears twice"):
        open_sealed(directory.path)


def test_duplicate_key_and_numbers_that_are_none_in_other_files(directory: Any) -> None:
    bad = [b'{"a": 1, "a": 2}', b"NaN", b"-Infinity", b"1e999", b"\xff", b"\xef\xbb\xbf{}", b"{", b"[" * 100_000]
    for data in bad:
        (directory.path / "labels.json").write_bytes(data)
        directory.seal()
        with pytest.raises(IntegrityError, match=r"labels\.json: can't be read as strict JSON"):
            open_sealed(directory.path).read_json("labels.json")
    (directory.path / "labels.json").write_bytes(b" " * ((1 << 20) + 1))
    directory.seal()
    with pytest.raises(IntegrityError, match="at most 1048576 bytes"):
        open_sealed(directory.path).read_json("labels.json")


def _set(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format", value=2), "expected format 1, got 2; update cldf-fast"),
        (_set("format", value="1"), "expected format 1, got '1'"),
        (_set("format", value=True), "format: expected an integer"),
        (_set("format", value=1.0), "format: expected an integer"),
        (lambda document: document.pop("format"), "expected an object with the keys"),
        (lambda document: document.pop("engines"), "expected an object with the keys"),
        (_set("comment", value="x"), "expected an object with the keys"),
        (_set("files", value=[]), "files: expected an object"),
        (_set("package_version", value=1), "package_version: expected a printable"),
        (_set("signer", value="none"), "signer: expected null or"),
        (_set("files", "config.json", value=None), r"config\.json: expected an object with the keys"),
        (_set("files", "config.json", "mode", value=1), r"config\.json: expected an object with the keys"),
        (_set("files", "config.json", "size", value=-1), r"config\.json: size: expected an integer from 0"),
        (_set("files", "config.json", "size", value=1 << 35), r"config\.json: size: expected an integer from 0"),
        (_set("files", "config.json", "size", value=2.0), r"config\.json: size: expected an integer from 0"),
        (_set("files", "config.json", "size", value=True), r"config\.json: size: expected an integer from 0"),
        (_set("files", "config.json", "size", value="2"), r"config\.json: size: expected an integer from 0"),
        (_set("files", "config.json", "sha256", value="g" * 64), r"config\.json: sha256: expected 64"),
        (_set("files", "config.json", "sha256", value="F" * 64), r"config\.json: sha256: expected 64"),
        (_set("files", "config.json", "sha256", value="0" * 64 + "\n"), r"config\.json: sha256: expected 64"),
        (_set("engines", FP16, "opset", value=None), f"{FP16}: opset: expected an integer from 1"),
        (_set("engines", FP16, "extra", value=None), f"{FP16}: expected an object with the keys"),
        (_set("engines", "config.json", value={}), "a key for every listed engine"),
    ],
)
def test_manifest_of_another_form(directory: Any, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    directory.seal()
    _edit(directory.path, change)
    with pytest.raises(IntegrityError, match=message) as error:
        open_sealed(directory.path)
    assert _one_sentence(error)


def test_manifest_that_says_the_same_in_other_bytes(directory: Any) -> None:
    directory.seal()
    path = directory.path / MANIFEST
    document, text = json.loads(path.read_bytes()), path.read_text()
    backwards = dict(reversed(document.items()))
    for other in (
        json.dumps(document),
        json.dumps(backwards, indent=2) + "\n",
        text + "\n",
        text.replace("a", "\\u0061"),
    ):
        path.write_text(other)
        with pytest.raises(IntegrityError, match="is not in the form that cldf-fast writes"):
            open_sealed(directory.path)


def test_manifest_nested_to_any_depth(directory: Any) -> None:
    directory.seal()
    text = (directory.path / MANIFEST).read_text()
    for depth in [*range(100, 1100, 20), 100_000]:
        for key in ("format", "files", "signer"):
            (directory.path / MANIFEST).write_text(
                re.sub(f'"{key}": ', f'"{key}": {"[" * depth}{"]" * depth}, "x": ', text)
            )
            with pytest.raises(IntegrityError):
                open_sealed(directory.path)


def test_huge_manifest_is_not_read(directory: Any) -> None:
    directory.seal()
    with (directory.path / MANIFEST).open("r+b") as file:
        file.truncate(1 << 40)  # takes no space
    with pytest.raises(IntegrityError, match="expected at most 1048576 bytes"):
        open_sealed(directory.path)


def test_size_that_lies(directory: Any) -> None:
    directory.seal()
    _edit(directory.path, _set("files", "model.onnx", "size", value=1 << 34))
    with pytest.raises(IntegrityError, match=r"model\.onnx: expected 17179869184 bytes .*, got \d+;"):
        open_sealed(directory.path).read("model.onnx")


# Signatures


def test_signed_directory(directory: Any, keys: tuple[Path, Path]) -> None:
    directory.seal(keys[0])
    assert _read_all(directory.path, public_key=keys[1], require_signature=True) == directory.contents
    assert open_sealed(directory.path, public_key=keys[1]).verified
    unchecked = open_sealed(directory.path)
    assert unchecked.signature is not None and not unchecked.verified


def test_openssl_agrees(directory: Any, keys: tuple[Path, Path]) -> None:
    if not shutil.which("openssl"):
        pytest.skip("openssl is not on the search path")
    directory.seal(keys[0])
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(keys[1]), "-rawin"]
    done = subprocess.run(
        [*command, "-in", MANIFEST, "-sigfile", SIGNATURE], cwd=directory.path, check=False, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_manifest_that_was_edited_and_hashed_again_without_its_key(directory: Any, keys: tuple[Path, Path]) -> None:
    directory.seal(keys[0])
    old = (directory.path / SIGNATURE).read_bytes()
    signer = open_sealed(directory.path).manifest.signer
    (directory.path / FP16).write_bytes(b"other code")
    directory.seal()
    _edit(directory.path, _set("signer", value=signer))
    (directory.path / SIGNATURE).write_bytes(old)
    assert open_sealed(directory.path).read(FP16) == b"other code"  # without the public key nobody can tell
    with pytest.raises(IntegrityError, match=r"MANIFEST\.sig: does not fit MANIFEST\.json") as error:
        open_sealed(directory.path, public_key=keys[1])
    assert _one_sentence(error)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\n", lambda data: b"", bytes.hex])
def test_signature_of_another_form(directory: Any, keys: tuple[Path, Path], change: Callable[[bytes], Any]) -> None:
    directory.seal(keys[0])
    changed = change((directory.path / SIGNATURE).read_bytes())
    (directory.path / SIGNATURE).write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    with pytest.raises(IntegrityError, match="does not fit"):
        open_sealed(directory.path, public_key=keys[1])


def test_signature_of_another_key(directory: Any, keys: tuple[Path, Path], other_keys: tuple[Path, Path]) -> None:
    directory.seal(other_keys[0])
    with pytest.raises(IntegrityError, match=r"was signed with the key .*, expected .* of .*owner\.pub"):
        open_sealed(directory.path, public_key=keys[1])


def test_signature_that_was_removed(directory: Any, keys: tuple[Path, Path]) -> None:
    directory.seal(keys[0])
    (directory.path / SIGNATURE).unlink()
    for arguments in ({}, {"public_key": keys[1]}):
        with pytest.raises(IntegrityError, match=r"MANIFEST\.sig: is missing"):
            open_sealed(directory.path, **arguments)
    directory.seal()  # as somebody does who removes all traces of it
    with pytest.raises(IntegrityError, match="is not signed, expected a signature by the owner of"):
        open_sealed(directory.path, public_key=keys[1])


def test_signature_that_nobody_announced(directory: Any) -> None:
    directory.seal()
    (directory.path / SIGNATURE).write_bytes(b"\0" * 64)
    with pytest.raises(IntegrityError, match="says that it is not signed"):
        open_sealed(directory.path)


def test_required_signature_needs_a_key(directory: Any, keys: tuple[Path, Path]) -> None:
    directory.seal(keys[0])
    with pytest.raises(ConfigError, match="public_key: a signature is required"):
        open_sealed(directory.path, require_signature=True)


def test_sealing_again_without_a_key_leaves_no_signature(directory: Any, keys: tuple[Path, Path]) -> None:
    directory.seal(keys[0])
    directory.seal()
    assert not (directory.path / SIGNATURE).exists()
    assert _read_all(directory.path) == directory.contents


def test_sealing_that_is_killed_halfway_does_not_pass(
    directory: Any, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.seal(keys[0])
    (directory.path / "config.json").write_bytes(b"{}")
    write = module.atomic_write_bytes
    for stop_at in (MANIFEST, SIGNATURE):

        def killed(path: Path, data: bytes, stop_at: str = stop_at) -> None:
            if path.name == stop_at:
                raise KeyboardInterrupt
            write(path, data)

        monkeypatch.setattr(module, "atomic_write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            directory.seal(keys[0])
        with pytest.raises(IntegrityError):
            _read_all(directory.path, public_key=keys[1])


def test_key_files_that_hold_no_key(directory: Any, keys: tuple[Path, Path], tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    other_kind = tmp_path / "ec.pem"
    other_kind.write_bytes(
        ec.generate_private_key(ec.SECP256R1())
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    (tmp_path / "empty.pem").write_bytes(b"")
    directory.seal(keys[0])
    for path in (tmp_path / "none.pem", tmp_path / "empty.pem", other_kind, keys[0]):
        with pytest.raises(ConfigError, match="expected an Ed25519 public key in PEM"):
            open_sealed(directory.path, public_key=path)
    with pytest.raises(ConfigError, match="expected an Ed25519 private key in PEM without a password"):
        directory.seal(keys[1])


def test_without_cryptography_signatures_say_so(
    directory: Any, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.seal(keys[0])
    for name in [name for name in sys.modules if name.startswith("cryptography")]:
        monkeypatch.setitem(sys.modules, name, None)
    assert _read_all(directory.path) == directory.contents
    with pytest.raises(BackendError, match=r"pip install cldf_fast\[deploy\]"):
        open_sealed(directory.path, public_key=keys[1])


# Engines


def _runtime(key: EngineKey) -> Runtime:
    return Runtime(key.flavour, key.version, key.compute_capability, key.os, key.gpu_name)


def test_engine_that_fits_is_found(directory: Any) -> None:
    directory.seal()
    sealed = open_sealed(directory.path)
    runtime = _runtime(directory.engines[FP16])
    assert sealed.engine(runtime, onnx=HALF) == FP16
    assert sealed.engine(runtime, onnx=FULL) == FP32
    assert sealed.engine(replace(runtime, gpu_name="NVIDIA A10"), onnx=HALF) == FP16


def test_engine_of_the_same_gpu_goes_first(directory: Any) -> None:
    source = directory.engines[FP16].onnx_sha256
    directory.engines[FP32] = replace(directory.engines[FP32], gpu_name="NVIDIA A10", onnx_sha256=source)
    directory.seal()
    runtime = replace(_runtime(directory.engines[FP16]), gpu_name="NVIDIA A10")
    assert open_sealed(directory.path).engine(runtime, onnx=HALF) == FP32


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("compute_capability", "9.0", "compute capability 8.6, not '9.0'"),
        ("version", "10.9.0", "TensorRT version 11.4.0.1, not '10.9.0'"),
        ("flavour", "tensorrt_rtx", "TensorRT flavour tensorrt, not 'tensorrt_rtx'"),
        ("os", "windows-amd64", f"operating system {sys.platform}.*, not 'windows-amd64'"),
    ],
)
def test_engine_for_something_else_is_refused(directory: Any, field: str, value: str, words: str) -> None:
    directory.seal()
    runtime = replace(_runtime(directory.engines[FP16]), **{field: value})
    with pytest.raises(EngineMismatchError, match=f"{FP16}: was built for {words}; build it again") as error:
        open_sealed(directory.path).engine(runtime, onnx=HALF)
    assert f"`cldf-fast export RUN --format tensorrt --out {directory.path}`" in str(error.value)
    assert _one_sentence(error)


def test_mismatch_names_all_fields_of_the_nearest_engine(directory: Any) -> None:
    source = directory.engines[FP32].onnx_sha256
    directory.engines[FP16] = replace(
        directory.engines[FP16], version="10.9.0", compute_capability="7.5", onnx_sha256=source
    )
    directory.seal()
    runtime = replace(_runtime(directory.engines[FP32]), compute_capability="12.0")
    with pytest.raises(EngineMismatchError, match=f"{FP32}: was built for compute capability 8.6, not '12.0';"):
        open_sealed(directory.path).engine(runtime, onnx=FULL)
    directory.engines[FP32] = replace(directory.engines[FP32], flavour="tensorrt_rtx")
    directory.seal()
    both = f"{FP16}: was built for TensorRT version 10.9.0, not '11.0' and compute capability 7.5, not '12.0';"
    with pytest.raises(EngineMismatchError, match=both):
        open_sealed(directory.path).engine(replace(runtime, version="11.0"), onnx=FULL)


def test_one_engine_for_several_gpus(directory: Any) -> None:
    directory.engines = {name: replace(key, compute_capability="8.6,12.0") for name, key in directory.engines.items()}
    directory.seal()
    for here in ("8.6", "12.0"):
        assert open_sealed(directory.path).engine(Runtime("tensorrt", "11.4.0.1", here, operating_system()), onnx=HALF)
    with pytest.raises(EngineMismatchError, match=r"compute capability 8\.6,12\.0, not '8\.0'"):
        open_sealed(directory.path).engine(Runtime("tensorrt", "11.4.0.1", "8.0", operating_system()), onnx=HALF)


@pytest.mark.parametrize(("here", "fits"), [("8.0", True), ("8.6", True), ("12.0", True), ("7.5", False)])
def test_engine_for_later_gpus_too(directory: Any, here: str, fits: bool) -> None:
    directory.engines = {name: replace(key, compute_capability="8.0+") for name, key in directory.engines.items()}
    directory.seal()
    runtime = Runtime("tensorrt", "11.4.0.1", here, operating_system())
    if fits:
        assert open_sealed(directory.path).engine(runtime, onnx=HALF) == FP16
    else:
        with pytest.raises(EngineMismatchError, match=r"compute capability 8\.0\+, not '7\.5'"):
            open_sealed(directory.path).engine(runtime, onnx=HALF)


def test_directory_without_engines_has_none_that_fits(directory: Any) -> None:
    runtime = _runtime(directory.engines[FP16])
    for name in (FP16, FP32):
        (directory.path / name).unlink()
    seal(directory.path, engines={})
    with pytest.raises(EngineMismatchError, match=r"holds no engine of half\.onnx; build one"):
        open_sealed(directory.path).engine(runtime, onnx=HALF)


def test_runtime_with_a_capability_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"compute_capability: expected a number such as 9\.0, got 'sm_90'"):
        Runtime("tensorrt", "11.4.0", "sm_90", "linux-x86_64")


# Fuzz

WEIRD: list[Any] = [None, True, -1, 0, 1 << 70, 1.5, "", "x", "../x.onnx", "\0", "é", [], {}, [[]], {"a": {"b": []}}]


def _mutated_tree(document: Any) -> Any:
    """The document with one value, key or item replaced, removed, moved or added, somewhere."""
    document = copy.deepcopy(document)
    nodes, queue = [], [document]
    while queue:
        node = queue.pop()
        nodes.append(node)
        queue += [
            child for child in (node.values() if isinstance(node, dict) else node) if isinstance(child, (dict, list))
        ]
    node = random.choice(nodes)
    places = list(node) if isinstance(node, dict) else list(range(len(node)))
    place = random.choice(places) if places else None
    kind = random.randrange(4)
    if place is None or kind == 0:
        if isinstance(node, dict):
            node[str(random.choice(WEIRD))] = random.choice(WEIRD)
        else:
            node.append(random.choice(WEIRD))
    elif kind == 1:
        del node[place]
    elif kind == 2 and isinstance(node, dict):
        node[str(random.choice(WEIRD))] = node.pop(place)
    else:
        node[place] = random.choice(WEIRD)
    return document


def _mutated_bytes(data: bytes) -> bytes:
    mutated = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 8])):
        start = random.randrange(len(mutated))
        stop = min(len(mutated), start + random.choice([0, 1, 1, 9, 200]))
        middle = [b"", random.randbytes(1), b'"', b"\\ud800", b"9" * 5000, b"[" * 5000, bytes(mutated[start:stop]) * 2]
        mutated[start:stop] = random.choice(middle)
        mutated = mutated or bytearray(b" ")
    return bytes(mutated)


def test_mutated_manifests_raise_our_errors_or_pass_unchanged(directory: Any, keys: tuple[Path, Path]) -> None:
    directory.seal(keys[0])
    original = (directory.path / MANIFEST).read_bytes()
    document = json.loads(original)
    tried = 0
    for turn in range(4000):
        if turn % 2:
            data = _mutated_bytes(original)
        else:
            text = json.dumps(_mutated_tree(document), indent=2, separators=(",", ": "), sort_keys=True)
            data = text.encode() + b"\n"
        if data == original:
            continue
        tried += 1
        try:
            # Another text for a GPU's name is as good as any, unless somebody signs for it.
            manifest = Manifest.from_bytes(data)
        except CLDFError as error:
            assert str(error).isprintable()
            # Parsing is all that happened; the rest of the way costs a file each time.
            if turn % 20:
                continue
        else:
            assert manifest.to_bytes() == data
        (directory.path / MANIFEST).write_bytes(data)
        with pytest.raises(IntegrityError):
            open_sealed(directory.path, public_key=keys[1])
        with contextlib.suppress(IntegrityError):
            sealed = open_sealed(directory.path)
            for name in directory.contents:
                with contextlib.suppress(IntegrityError):
                    assert sealed.read(name) == directory.contents[name]
    assert tried > 3000
    (directory.path / MANIFEST).write_bytes(original)
    assert _read_all(directory.path, public_key=keys[1]) == directory.contents
