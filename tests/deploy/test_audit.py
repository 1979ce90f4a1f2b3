"""The audit log tells the first line that is wrong, survives interruptions, and takes no field that nobody allowed."""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
import random
import re
import stat
import subprocess
import sys
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from cldf_fast.deploy import audit as module
from cldf_fast.deploy.audit import AuditLog, pseudonym, pseudonym_key, verify_audit
from cldf_fast.errors import CLDFError, ConfigError, IntegrityError

ROOT = Path(__file__).resolve().parents[2]
FIELDS = ("model", "case", "seconds", "classes", "previous")

_WRITER = """
import sys
from cldf_fast.deploy.audit import AuditLog
log = AuditLog(sys.argv[1], fields=["writer", "number"])
for number in range(int(sys.argv[3])):
    log.append(writer=int(sys.argv[2]), number=number)
"""


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    """Six entries with awkward texts."""
    log = AuditLog(tmp_path / "logs" / "audit.jsonl", fields=FIELDS)
    for number in range(6):
        log.append(
            model='naïve \ud800 \n {"previous":', case=number, seconds=random.random(), classes=["a", None, True]
        )
    return log


def _lines(log: AuditLog) -> list[bytes]:
    return log.path.read_bytes().splitlines(keepends=True)


def test_entries_are_chained_as_an_independent_reader_finds(log: AuditLog) -> None:
    link = log.append(previous='{"previous":', case=1 << 70)  # a field with the name of a link is only a field
    previous = "0" * 64
    entries = [json.loads(line) for line in log.path.read_text(encoding="ascii").splitlines()]
    assert len(entries) == 7
    for entry in entries:
        assert set(entry) == {"event", "previous", "sha256", "time"}
        assert entry["previous"] == previous
        previous = entry.pop("sha256")
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"))
        assert hashlib.sha256(text.encode()).hexdigest() == previous
        age = datetime.now(timezone.utc) - datetime.fromisoformat(entry["time"])
        assert timedelta(0) <= age < timedelta(minutes=5)
    assert entries[3]["event"]["case"] == 3 and entries[6]["event"]["case"] == 1 << 70
    summary = verify_audit(log.path)
    assert (summary.entries, summary.unfinished, summary.last) == (7, 0, link) == (7, 0, previous)


def test_only_the_owner_reads_the_log(log: AuditLog) -> None:
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600


def test_another_log_object_goes_on(log: AuditLog) -> None:
    AuditLog(log.path, fields=["other"]).append(other="x")
    assert verify_audit(log.path).entries == 7


@pytest.mark.parametrize("number", range(6))
def test_changed_line_is_named(log: AuditLog, number: int) -> None:
    lines = _lines(log)
    lines[number] = re.sub(rb'"case":\d', b'"case":9', lines[number])
    log.path.write_bytes(b"".join(lines))
    with pytest.raises(IntegrityError, match=f"line {number + 1}: was changed"):
        verify_audit(log.path)


def test_changed_line_with_a_new_hash_breaks_the_next_link(log: AuditLog) -> None:
    lines = _lines(log)
    entry = json.loads(lines[2])
    _, lines[2] = module._entry(entry["previous"], event={"case": 9})
    log.path.write_bytes(b"".join(lines))
    with pytest.raises(IntegrityError, match="line 4: does not follow the line before it"):
        verify_audit(log.path)


@pytest.mark.parametrize("number", range(5))
def test_removed_swapped_and_repeated_lines_are_named(log: AuditLog, number: int) -> None:
    lines = _lines(log)
    for changed, wrong in (
        (lines[:number] + lines[number + 1 :], number + 1),
        ([*lines[:number], lines[number + 1], lines[number], *lines[number + 2 :]], number + 1),
        (lines[: number + 1] + lines[number:], number + 2),
        ([*lines[:number], b"\n", *lines[number:]], number + 1),
    ):
        log.path.write_bytes(b"".join(changed))
        with pytest.raises(IntegrityError, match=f"line {wrong}: "):
            verify_audit(log.path)


def test_same_content_in_another_form_is_a_change(log: AuditLog) -> None:
    lines = _lines(log)
    lines[1] = lines[1].replace(b'"case":', b'"case": ')
    log.path.write_bytes(b"".join(lines))
    with pytest.raises(IntegrityError, match="line 2: was changed"):
        verify_audit(log.path)


def test_nesting_of_any_depth_is_a_change(log: AuditLog) -> None:
    lines = _lines(log)
    sound = lines[1]
    for depth in [*range(100, 1100, 20), 100_000]:
        lines[1] = sound.replace(b'"case":1', b'"case":' + b"[" * depth + b"]" * depth)
        log.path.write_bytes(b"".join(lines))
        with pytest.raises(IntegrityError, match="line 2: "):
            verify_audit(log.path)


def test_anchor_shows_what_the_chain_alone_can_not(log: AuditLog) -> None:
    lines = _lines(log)
    anchor = json.loads(lines[4])["sha256"]
    verify_audit(log.path, anchor=anchor)
    log.path.write_bytes(b"".join(lines[:4]))
    assert verify_audit(log.path).entries == 4
    with pytest.raises(IntegrityError, match="has no entry with the anchor"):
        verify_audit(log.path, anchor=anchor)


@pytest.mark.parametrize("keep", [1, 7, -1, None])
def test_interrupted_line_is_closed_off_and_kept(log: AuditLog, keep: int | None) -> None:
    """None: all of the line but its end."""
    lines = _lines(log)
    fragment = lines[5].rstrip(b"\n")[:keep]
    before = b"".join(lines[:5]) + fragment
    log.path.write_bytes(before)
    with pytest.raises(IntegrityError, match="line 6: was interrupted"):
        verify_audit(log.path)
    log.append(case=7)
    log.append(case=8)
    content = log.path.read_bytes()
    assert content.startswith(before)
    summary = verify_audit(log.path)
    assert (summary.entries, summary.unfinished) == (7, 1)
    closing = json.loads(content[len(before) :].splitlines()[0])
    assert closing["unfinished"] == {"bytes": len(fragment), "sha256": hashlib.sha256(fragment).hexdigest()}
    # It stands for exactly those bytes.
    for changed in (b"X" + fragment[1:], fragment + b" ", fragment[:-1], b""):
        log.path.write_bytes(b"".join(lines[:5]) + changed + content[len(before) :])
        if changed != fragment:
            with pytest.raises(IntegrityError, match="line 6: "):
                verify_audit(log.path)


def test_interruptions_while_an_interruption_is_closed_off(log: AuditLog) -> None:
    """At the first entry too, and with bytes of any kind."""
    for start in (b"", log.path.read_bytes()):
        content = start + bytes([0, 255]) + b'{"event":{"previous":'
        for turn in range(4):
            log.path.write_bytes(content)
            log.append(case=turn)
            whole = log.path.read_bytes()
            content = whole[: random.randrange(len(content) + 1, whole.index(b"\n", len(content)))]
        summary = verify_audit(log.path)
        assert (summary.entries, summary.unfinished) == (len(start.splitlines()) + 1, 1)


def test_disk_that_is_full_halfway(log: AuditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) < 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(IntegrityError, match=r"could not be written \(No space left on device\)"):
        log.append(case=7)
    monkeypatch.undo()
    log.append(case=8)
    summary = verify_audit(log.path)
    assert (summary.entries, summary.unfinished) == (7, 1)


def test_killed_writer(log: AuditLog) -> None:
    """The kernel may leave any part of a write; the next process goes on."""
    code = _WRITER + 'import os, signal\nos.write(os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND), b\'{"event":{"n\')\n'
    code += "os.kill(os.getpid(), signal.SIGKILL)\n"
    done = subprocess.run(
        [sys.executable, "-c", code, str(log.path), "0", "2"], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == -9
    log.append(case=7)
    summary = verify_audit(log.path)
    assert (summary.entries, summary.unfinished) == (9, 1)


def test_log_with_a_wrong_end_is_not_appended_to(log: AuditLog) -> None:
    content = log.path.read_bytes()
    for end in (b"garbage\n", b"\n", b"{}\n", b"[1]\n", b'{"previous":1}\n', b"x" * (1 << 20)):
        log.path.write_bytes(content + end)
        with pytest.raises(IntegrityError, match="last line"):
            log.append(case=7)
        assert log.path.read_bytes() == content + end
    log.path.write_bytes(b"\n")
    with pytest.raises(IntegrityError, match="last line"):
        log.append(case=7)


def test_several_processes_and_threads(tmp_path: Path) -> None:
    path, each = tmp_path / "audit.jsonl", 25
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, "-c", _WRITER, str(path), str(writer), str(each)], env=environment)
        for writer in range(3)
    ]
    log = AuditLog(path, fields=["writer", "number"])

    def work(writer: int) -> None:
        for number in range(each):
            log.append(writer=writer, number=number)

    threads = [threading.Thread(target=work, args=(writer,)) for writer in (3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert verify_audit(path).entries == 5 * each
    events = [json.loads(line)["event"] for line in path.read_bytes().splitlines()]
    for writer in range(5):
        assert [event["number"] for event in events if event["writer"] == writer] == list(range(each))


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"patient_name": "Doe"}, "patient_name: is not among the fields of this audit log"),
        ({"case": 1, "PatientID": "1"}, "PatientID: is not among"),
        ({"case": {"patient_name": "Doe"}}, "case: expected text"),
        ({"case": [["nested"]]}, "case: expected text"),
        ({"case": float("nan")}, "case: expected text"),
        ({"case": [1.0, float("inf")]}, "case: expected text"),
        ({"case": 10**400}, "case: expected text"),
        ({"case": b"bytes"}, "case: expected text"),
        ({"case": "x" * 70_000}, "expected an entry of at most 65536 bytes"),
    ],
)
def test_fields_that_are_not_allowed_are_not_written(log: AuditLog, event: dict[str, Any], message: str) -> None:
    before = log.path.read_bytes()
    with pytest.raises(ConfigError, match=message):
        log.append(**event)
    assert log.path.read_bytes() == before


def test_log_that_can_not_be_opened(log: AuditLog, tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(log.path)
    with pytest.raises(IntegrityError, match="could not be written"):
        AuditLog(tmp_path / "link.jsonl", fields=FIELDS).append(case=1)
    with pytest.raises(IntegrityError, match="could not be written"):
        AuditLog(log.path / "below.jsonl", fields=FIELDS).append(case=1)
    with pytest.raises(IntegrityError, match="can't be read as an audit log"):
        verify_audit(tmp_path / "none.jsonl")


def test_mutated_logs_raise_our_errors(log: AuditLog) -> None:
    content = log.path.read_bytes()
    for _ in range(400):
        data = bytearray(content)
        start = random.randrange(len(data))
        data[start : start + random.choice([0, 1, 30])] = random.choice([b"", b"\n", b"\xff", b"[" * 3000, b"1e999"])
        if data == content or content.startswith(data):
            continue
        log.path.write_bytes(data)
        with pytest.raises(CLDFError, match=r"line [1-7]: "):
            verify_audit(log.path)


def test_pseudonym_is_hmac_sha256_of_rfc_4231() -> None:
    expected = "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"
    assert pseudonym("Hi There", b"\x0b" * 20) == expected
    key = random.randbytes(32)
    for text in ("Müller^Änne", "", "\udcff", "a\0b"):
        digest = hmac.new(key, text.encode("utf-8", "surrogatepass"), "sha256").hexdigest()
        assert pseudonym(text, key) == digest != pseudonym(text, key[::-1])
    with pytest.raises(ConfigError, match="key: expected at least 16 bytes, got 3"):
        pseudonym("x", b"abc")


def test_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        key = pseudonym_key(tmp_path / "logs" / "audit.jsonl")
    finally:
        os.umask(old)
    path = tmp_path / "logs" / "audit.key"
    assert len(key) == 32 and path.read_bytes() == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert pseudonym_key(tmp_path / "logs" / "audit.jsonl") == key
    assert pseudonym_key(tmp_path / "other.jsonl") != key
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["audit.key"]


def test_processes_that_make_a_key_at_once_get_the_same(tmp_path: Path) -> None:
    keys: list[bytes] = []
    barrier = threading.Barrier(8)

    def make() -> None:
        barrier.wait()
        keys.append(pseudonym_key(tmp_path / "audit.jsonl"))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8 and len(set(keys)) == 1


def test_key_file_that_is_not_safe(tmp_path: Path) -> None:
    path = tmp_path / "audit.key"
    key = pseudonym_key(tmp_path / "audit.jsonl")
    path.chmod(0o640)
    with pytest.raises(IntegrityError, match=r"for its owner alone \(mode 0600\), got -rw-r-----"):
        pseudonym_key(tmp_path / "audit.jsonl")
    path.chmod(0o600)
    for content, found in ((key[:-1], "31"), (key + b"\n", "more"), (b"", "0")):
        path.write_bytes(content)
        with pytest.raises(IntegrityError, match=f"expected 32 bytes, got {found}"):
            pseudonym_key(tmp_path / "audit.jsonl")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="can't be read as a key"):
        pseudonym_key(tmp_path / "audit.jsonl")
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(IntegrityError, match="for its owner alone"):
        pseudonym_key(tmp_path / "audit.jsonl")
    with pytest.raises(IntegrityError, match="can't be made"):
        pseudonym_key(tmp_path / "elsewhere" / "audit.jsonl")
