"""An archive gives back the sealed directory that was packed, or an error and nothing at all."""

from __future__ import annotations

import contextlib
import random
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cldf_fast.deploy.archive import pack, unpack
from cldf_fast.deploy.manifest import MANIFEST, open_sealed
from cldf_fast.errors import CLDFError, ConfigError, IntegrityError


@pytest.fixture
def archive(directory: Any, keys: tuple[Path, Path], tmp_path: Path) -> Path:
    """The signed and packed directory, in a folder of its own."""
    directory.seal(keys[0])
    (tmp_path / "sent").mkdir()
    pack(directory.path, tmp_path / "sent" / "engines.zip")
    return tmp_path / "sent" / "engines.zip"


def _refused(archive: Path, message: str, **arguments: Any) -> None:
    """It is, in one sentence, and leaves neither the folder nor a temporary one."""
    before = sorted(archive.parent.iterdir())
    with pytest.raises(IntegrityError, match=message) as error:
        unpack(archive, archive.parent / "received", **arguments)
    assert str(error.value).isprintable() and ".partial" not in str(error.value)
    assert sorted(archive.parent.iterdir()) == before


def _rewrite(archive: Path, change: Callable[[dict[str, tuple[zipfile.ZipInfo, bytes]]], Any]) -> None:
    """Write the archive again with changed members, by name."""
    with zipfile.ZipFile(archive) as source:
        members = {info.filename: (zipfile.ZipInfo(info.filename), source.read(info)) for info in source.infolist()}
    change(members)
    with zipfile.ZipFile(archive, "w") as target:
        for info, data in members.values():
            target.writestr(info, data)


def test_round_trip(directory: Any, archive: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    sealed = unpack(archive, tmp_path / "new" / "received", public_key=keys[1])
    assert {name: sealed.read(name) for name in sealed.manifest.files} == directory.contents
    assert sealed.verified and sealed.manifest == open_sealed(directory.path).manifest
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["received"]
    pack(tmp_path / "new" / "received", tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == archive.read_bytes()


def test_nothing_is_overwritten(directory: Any, archive: Path, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"engines\.zip: is there already"):
        pack(directory.path, archive)
    with pytest.raises(IntegrityError, match="is there already"):
        unpack(archive, directory.path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(IntegrityError, match="is there already"):
        unpack(archive, tmp_path / "dangling")


def test_changed_directory_is_not_packed(directory: Any, tmp_path: Path) -> None:
    directory.seal()
    (directory.path / "model.onnx").write_bytes(directory.contents["model.onnx"][::-1] + b"0")
    with pytest.raises(IntegrityError, match=r"model\.onnx: expected"):
        pack(directory.path, tmp_path / "engines.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


@pytest.mark.parametrize(
    "name", ["../escaped.onnx", "/escaped.onnx", "engines/../../escaped.plan", "C:\\x.onnx", "a/b"]
)
def test_path_out_of_the_folder(archive: Path, name: str) -> None:
    _rewrite(archive, lambda members: members.update({name: (zipfile.ZipInfo(name), b"x")}))
    _refused(archive, "does not belong in an engine directory")
    assert not list(archive.parent.parent.rglob("escaped*"))


def _mode(mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("link.onnx")
    info.external_attr = mode << 16
    return info


@pytest.mark.parametrize("mode", [stat.S_IFLNK | 0o777, stat.S_IFIFO | 0o600, stat.S_IFDIR | 0o700])
def test_member_that_is_no_file(archive: Path, mode: int) -> None:
    _rewrite(archive, lambda members: members.update(link=(_mode(mode), b"/etc/passwd")))
    _refused(archive, r"link\.onnx: expected a plain file")


def test_compressed_member(archive: Path) -> None:
    info = zipfile.ZipInfo("bomb.onnx")
    info.compress_type = zipfile.ZIP_DEFLATED
    _rewrite(archive, lambda members: members.update(bomb=(info, b"\0" * 10_000_000)))
    assert archive.stat().st_size < 100_000
    _refused(archive, r"bomb\.onnx: expected a plain file, neither compressed nor encrypted")


def test_member_that_is_there_twice(archive: Path) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(archive, "a") as target:
        warnings.simplefilter("ignore")
        target.writestr("config.json", b"{}")
    _refused(archive, "each once")


def test_too_many_members(archive: Path) -> None:
    with zipfile.ZipFile(archive, "a") as target:
        for i in range(1000):
            target.writestr(f"{i}.onnx", b"")
    _refused(archive, "expected at most 1000 files")


def test_extra_and_missing_members(archive: Path) -> None:
    sound = archive.read_bytes()
    _rewrite(archive, lambda members: members.update(extra=(zipfile.ZipInfo("extra.onnx"), b"")))
    _refused(archive, r"'extra\.onnx' is there, MANIFEST\.json does not list it")
    for name in (MANIFEST, "config.json", "model.onnx"):
        archive.write_bytes(sound)
        _rewrite(archive, lambda members, name=name: members.pop(name))
        _refused(archive, f"{name}:? is missing")


def test_changed_member_with_a_new_checksum(archive: Path) -> None:
    _rewrite(archive, lambda members: members.update({"config.json": (zipfile.ZipInfo("config.json"), b"{}")}))
    _refused(archive, r"engines\.zip/config\.json: expected \d+ bytes")


def test_sizes_that_lie(archive: Path) -> None:
    """Sizes in the table and in front of the member, both or either."""
    sound = archive.read_bytes()
    with zipfile.ZipFile(archive) as source:
        info = source.getinfo("config.json")
    table = sound.index(b"PK\1\2")
    table = sound.rindex(b"PK\1\2", table, sound.rindex(b"config.json"))
    places = {"compressed": table + 20, "size": table + 24, "local": info.header_offset + 22}
    for names in (["size"], ["compressed"], ["size", "compressed"], ["size", "compressed", "local"]):
        for size in (info.file_size - 1, info.file_size + 1, 0x7FFFFFFF):
            lying = bytearray(sound)
            for name in names:
                lying[places[name] : places[name] + 4] = struct.pack("<I", size)
            archive.write_bytes(lying)
            with contextlib.suppress(IntegrityError):
                # What is read despite a lie is what was sealed.
                sealed = unpack(archive, archive.parent / f"{names}{size}")
                sealed.verify_all()
                assert sealed.read("config.json") == bytes(sound[info.header_offset + 41 :][: info.file_size])
            assert size != 0x7FFFFFFF or names == ["compressed"] or not (archive.parent / f"{names}{size}").exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"not an archive", b"PK\5\6" + b"\0" * 18])
def test_file_that_is_no_archive(archive: Path, content: bytes) -> None:
    archive.write_bytes(content)
    _refused(archive, r"engines\.zip: ")
    archive.unlink()
    _refused(archive, "can't be read as a zip archive")


def test_signature_is_checked(
    archive: Path, directory: Any, keys: tuple[Path, Path], other_keys: tuple[Path, Path]
) -> None:
    _refused(archive, "was signed with the key", public_key=other_keys[1])
    with pytest.raises(ConfigError, match="expected an Ed25519 public key"):
        unpack(archive, archive.parent / "received", public_key=keys[0])
    directory.seal()
    archive.unlink()
    pack(directory.path, archive)
    _refused(archive, "is not signed", public_key=keys[1])


def test_damaged_archives_give_back_what_was_packed_or_our_errors(directory: Any, archive: Path) -> None:
    sound = archive.read_bytes()
    table = sound.index(b"PK\1\2")
    refused = 0
    for turn in range(150):
        data = bytearray(sound)
        # The table is where zipfile can be led astray; elsewhere nearly everything is content.
        start = random.randrange(table if turn % 3 else 0, len(data))
        data[start : start + random.choice([0, 1, 1, 4])] = random.randbytes(random.choice([0, 1, 1, 4]))
        archive.write_bytes(data)
        target = archive.parent / f"received{turn}"
        try:
            sealed = unpack(archive, target)
        except CLDFError:
            refused += 1
            assert not target.exists()
        else:
            assert {name: sealed.read(name) for name in sealed.manifest.files} == directory.contents
    assert refused > 50
    assert not list(archive.parent.glob(".partial*"))
