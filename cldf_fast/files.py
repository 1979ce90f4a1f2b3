"""Writing files so that a kill at any moment leaves the old file or the new one, never half of one."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cldf_fast.errors import ConfigError


@contextmanager
def atomic_write(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Give a temporary path to write to; at the end of the block it is flushed to disk and takes the place of `path`.

    The temporary file lies in the same folder (a rename is atomic only within one file system), is hidden, and keeps
    the endings of `path`, because writers choose the format by them. Missing parent folders are made. If the block
    raises, the temporary file is removed and `path` is left as it was; only a kill leaves the hidden file behind.
    durable: False does not flush, for files that are checked when read and can be made again: a kill still leaves the
    old file or the new one, but a power cut may leave half of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".partial-{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        if durable:
            flush(temporary)
        os.replace(temporary, path)
        # The rename itself is lost in a power cut unless the folder is flushed too; Windows can't open folders.
        if durable and os.name == "posix":
            flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder to fill; at the end of the block it becomes `path`, which must not exist.

    If the block raises, nothing is left at `path`, nor beside it. Raises ConfigError, naming the argument `out`, where
    `path` exists.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise ConfigError(f"out: expected a folder that does not exist, got {path}, which does")
    temporary = path.with_name(f".partial-{secrets.token_hex(4)}-{path.name}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def atomic_write_bytes(path: str | Path, data: bytes, *, durable: bool = True) -> None:
    """Write data to path in one step: see `atomic_write`."""
    with atomic_write(path, durable=durable) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write text to path as UTF-8, newlines as they are, in one step: see `atomic_write`."""
    atomic_write_bytes(path, text.encode("utf-8"))


def flush(path: Path) -> None:
    """Return once a file's content, or the names in a folder (POSIX only), would survive a power cut."""
    # Windows flushes only what is open for writing, POSIX opens folders only for reading.
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
