"""The audit log: who ran which model on what, a line an event, each line holding the hash of the line before it.

    {"event":{...},"previous":"<sha256 of the line before>","sha256":"<of this line without it>","time":"<UTC>"}

A line that is changed, removed, inserted or moved breaks the chain, and `verify_audit` names it. The chain alone can't
show that lines are missing at the end, or that somebody wrote all of it anew: keep the hash that `append` returns
somewhere else now and then, and give it to `verify_audit` as the anchor.

A process that dies while it writes leaves a line without an end. Nothing is ever rewritten: the next writer closes that
line off with an entry that says how many bytes of it are no entry, and their hash.

A log is read by more people than an image: it holds no names of patients, numbers or dates. Callers name the fields
that they may write, and put identifiers through `pseudonym`. POSIX: the file is locked by fcntl.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import secrets
import stat
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cldf_fast.deploy.manifest import parse_json
from cldf_fast.errors import ConfigError, IntegrityError
from cldf_fast.files import flush

_START = "0" * 64  # what the first line has for the hash of the line before
_MAX_LINE = 1 << 16  # bytes, of one entry
_KEY_BYTES = 32
_MAX_TAIL = 1 << 20  # bytes, of one entry and interrupted lines before it

Value = str | int | float | bool | None


class AuditLog:
    """An audit log to append to, from any number of threads and processes.

    path: of the log, e.g. audit.jsonl; made at the first entry, readable for its owner alone.
    fields: names that entries may have. There is no other way to write a field, so that no identifier slips in.
    """

    def __init__(self, path: str | Path, *, fields: Collection[str]) -> None:
        self.path = Path(path)
        self.fields = frozenset(fields)

    def append(self, /, **event: Value | list[Value]) -> str:
        """Write one entry, to disk when this returns. Returns its SHA-256, the newest link of the chain.

        event: text, finite numbers, true, false, null, or lists of them, by field.
        Raises ConfigError for a field that is not allowed or a value of another kind, IntegrityError where the log
        can't be written or its last line is not an entry. No entry counts then.
        """
        for name, value in event.items():
            if name not in self.fields:
                raise ConfigError(
                    f"{name}: is not among the fields of this audit log, {', '.join(sorted(self.fields))}"
                )
            if not all(map(_is_value, value if isinstance(value, list) else [value])):
                raise ConfigError(f"{name}: expected text, a finite number, true, false, null or a list of them")
        try:
            with _locked(self.path) as descriptor:
                link, unfinished = _end(descriptor, self.path)
                data = b""
                if unfinished:
                    link, data = _entry(link, unfinished=_closing(unfinished))
                link, line = _entry(link, event=event)
                if len(line) > _MAX_LINE:
                    raise ConfigError(f"event: expected an entry of at most {_MAX_LINE} bytes, got {len(line)}")
                data += line
                while data:
                    data = data[os.write(descriptor, data) :]
                os.fsync(descriptor)
            flush(self.path.parent)
        except OSError as error:
            raise IntegrityError(f"{self.path}: the entry could not be written ({error.strerror})") from error
        return link


@dataclass(frozen=True)
class AuditSummary:
    """What `verify_audit` found. entries: events; unfinished: interrupted lines; last: hash of the last entry."""

    entries: int
    unfinished: int
    last: str


def verify_audit(path: str | Path, *, anchor: str | None = None) -> AuditSummary:
    """Check every line of an audit log and that they form one chain.

    anchor: a hash that `append` returned, kept elsewhere: all lines up to that entry must be there as they were.
    Raises IntegrityError naming the first line that is wrong.
    """
    path = Path(path)
    previous, entries, unfinished, anchored = _START, 0, 0, anchor is None
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # a writer is not met halfway
            # An interrupted line and the entry that closes it off share one.
            for number, line in enumerate(iter(lambda: file.readline(_MAX_TAIL), b""), start=1):
                source = f"{path}, line {number}"
                if not line.endswith(b"\n"):
                    raise IntegrityError(f"{source}: was interrupted and is not closed off, as the next entry will do")
                entry, rest = _parse(line, source)
                if entry["previous"] != previous:
                    raise IntegrityError(f"{source}: does not follow the line before it: lines are missing or changed")
                previous = entry["sha256"]
                entries, unfinished = entries + ("event" in entry), unfinished + bool(rest)
                anchored = anchored or previous == anchor
    except OSError as error:
        raise IntegrityError(f"{path}: can't be read as an audit log ({error.strerror})") from error
    if not anchored:
        raise IntegrityError(
            f"{path}: has no entry with the anchor {anchor}: lines are missing at the end, or all changed"
        )
    return AuditSummary(entries, unfinished, previous)


def pseudonym(text: str, key: bytes) -> str:
    """HMAC-SHA256 of an identifier, 64 hexadecimal digits: the same for the same text and key, and of no other use.

    key: at least 16 bytes, see `pseudonym_key`. Without it, numbers of patients could be tried out one after another.
    """
    if len(key) < 16:
        raise ConfigError(f"key: expected at least 16 bytes, got {len(key)}")
    return hmac.new(key, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def pseudonym_key(log: str | Path) -> bytes:
    """The 32 random bytes in the file beside a log (audit.jsonl: audit.key), made at the first call.

    Raises IntegrityError where others than its owner may read or write it, or it is not such a file.
    """
    path = Path(log).with_suffix(".key")
    if not os.path.lexists(path):
        _make_key(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            mode, key = os.fstat(descriptor).st_mode, file.read(_KEY_BYTES + 1)
    except OSError as error:
        raise IntegrityError(f"{path}: can't be read as a key ({error.strerror})") from error
    if not stat.S_ISREG(mode) or mode & 0o077:
        raise IntegrityError(f"{path}: expected a file for its owner alone (mode 0600), got {stat.filemode(mode)}")
    if len(key) != _KEY_BYTES:
        raise IntegrityError(
            f"{path}: expected {_KEY_BYTES} bytes, got {'more' if len(key) > _KEY_BYTES else len(key)}"
        )
    return key


def _make_key(path: Path) -> None:
    temporary = path.with_name(f".partial-{secrets.token_hex(4)}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
                file.flush()
                os.fsync(descriptor)
            # Unlike a rename, a link never replaces the key that another process made meanwhile.
            with suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            temporary.unlink()
        flush(path.parent)
    except OSError as error:
        raise IntegrityError(f"{path}: can't be made ({error.strerror})") from error


def _is_value(value: object) -> bool:
    return (
        value is None
        or isinstance(value, str)
        or (isinstance(value, (int, float)) and abs(value) <= sys.float_info.max)
    )


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The log open for reading and appending, by this writer alone; made if it isn't there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _end(descriptor: int, path: Path) -> tuple[str, bytes]:
    """Hash of the last entry, and the bytes of an interrupted line behind it."""
    size = os.fstat(descriptor).st_size
    tail = os.pread(descriptor, _MAX_TAIL, max(0, size - _MAX_TAIL))
    lines, end, unfinished = tail.rpartition(b"\n")
    if not end and len(tail) == size:
        return _START, unfinished
    last = lines.rpartition(b"\n")[2] + end
    return _parse(last, f"{path}, last line")[0]["sha256"], unfinished


def _entry(previous: str, **content: Any) -> tuple[str, bytes]:
    """Hash and line of an entry with this content and the present time."""
    time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    body = {**content, "previous": previous, "time": time}
    digest = hashlib.sha256(_canonical(body)).hexdigest()
    return digest, _canonical({**body, "sha256": digest}) + b"\n"


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()


def _parse(line: bytes, source: str) -> tuple[dict[str, Any], bytes]:
    """The entry of a whole line, valid in itself, and the interrupted bytes before it that it closes off."""
    try:
        return _valid(line, "event", source), b""
    except IntegrityError:
        # What closes a line off begins like this, and holds this nowhere else: quotes within text are escaped.
        at = line.rfind(b'{"previous":')
        if at < 0:
            raise
    entry, unfinished = _valid(line[at:], "unfinished", source), line[:at]
    if not unfinished or entry["unfinished"] != _closing(unfinished):
        raise IntegrityError(f"{source}: closes off other bytes than those before it: it was changed")
    return entry, unfinished


def _closing(unfinished: bytes) -> dict[str, Any]:
    return {"bytes": len(unfinished), "sha256": hashlib.sha256(unfinished).hexdigest()}


def _valid(data: bytes, kind: str, source: str) -> dict[str, Any]:
    entry = parse_json(data, source)
    if not isinstance(entry, dict) or set(entry) != {kind, "previous", "sha256", "time"}:
        raise IntegrityError(f"{source}: is no entry of an audit log")
    body = {key: value for key, value in entry.items() if key != "sha256"}
    try:
        sound = hashlib.sha256(_canonical(body)).hexdigest() == entry["sha256"] and _canonical(entry) + b"\n" == data
    except RecursionError:  # what can be read may still be nested too deep to be written
        sound = False
    if not sound:
        raise IntegrityError(f"{source}: was changed: its SHA-256 or its form is not that of what it says")
    return entry
