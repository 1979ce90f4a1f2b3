"""Results files: reading, what their rows say of each other, and comparing two of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cldf_fast.errors import ConfigError

RESULTS = Path(__file__).resolve().parent / "results"
DISTURBED = 0.1  # share of the processors that others may take before a row is marked

Document = dict[str, Any]
"""A results file, as `conftest.py` describes it."""
Row = dict[str, Any]
Runs = dict[str, Row]
"""The rows of one problem by rival."""


def read(path: Path) -> dict[str, Document]:
    """Results files by name, without ".json": one, or those of a folder that hold a benchmark."""
    if not path.exists():
        raise ConfigError(f"{path}: expected a results file or a folder of them, found nothing")
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    try:
        documents = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    except ValueError as error:
        raise ConfigError(f"{path}: expected results as JSON, got {error}") from error
    return {name: document for name, document in documents.items() if "benchmark" in document}


def read_elsewhere(folder: Path) -> list[dict[str, Document]]:
    """What `put_aside` has kept: the results of every other machine."""
    return [read(path) for path in sorted(folder.iterdir()) if path.is_dir()]


def put_aside(kept: Path, document: Document) -> None:
    """Move a kept file into a folder of its machine's own, if a document that takes its place is of another machine."""
    if not kept.exists():
        return
    old = json.loads(kept.read_text(encoding="utf-8"))
    if old["device"] == document["device"]:
        return
    folder = kept.parent / re.sub(r"[^a-z0-9]+", "-", _machine(old).lower())
    folder.mkdir(exist_ok=True)
    kept.replace(folder / kept.name)


def by_problem(document: Document) -> list[tuple[dict[str, Any], Runs]]:
    """Every problem with its rows by rival, in the file's order."""
    problems: dict[str, Runs] = {}
    for row in document["rows"]:
        problems.setdefault(json.dumps(row["problem"]), {})[row["rival"]] = row
    return [(json.loads(problem), runs) for problem, runs in problems.items()]


def rivals_of(document: Document) -> list[str]:
    """All others than ours and its variants, in the file's order."""
    own = {document["ours"], *document.get("variants", ())}
    return list(dict.fromkeys(row["rival"] for row in document["rows"] if row["rival"] not in own))


def disturbed(row: Row) -> bool:
    """Whether others kept the machine busy while the row was measured."""
    return bool(row.get("others_share", 0) > DISTURBED)


def apart(one: Row, other: Row) -> bool:
    """Whether two medians differ by more than the rows' spreads, the interquartile ranges, together."""
    return bool(abs(one["median_ms"] - other["median_ms"]) > one["iqr_ms"] + other["iqr_ms"])


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The power of x that y grows with: the least squares' slope of its logarithm. points: at least two of (x, y)."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


@dataclass(frozen=True)
class Change:
    """One row, before and after. ratio: of the medians, after / before. beyond: the spread. disturbed: either was."""

    name: str
    before_ms: float
    after_ms: float
    beyond: bool
    disturbed: bool

    @property
    def ratio(self) -> float:
        return self.after_ms / self.before_ms

    def regression(self, factor: float) -> bool:
        """Slower by more than a factor and more than the spread, on a machine that was quiet both times."""
        return self.ratio > factor and self.beyond and not self.disturbed


def compare(before: dict[str, Document], after: dict[str, Document]) -> tuple[list[Change], list[str]]:
    """Changes of the rows that both have, and sentences on what was not compared, or differs else.

    Times of different devices say nothing about the code and are left out; those of different versions are compared.
    """
    changes: list[Change] = []
    notes: list[str] = []
    for name, old in before.items():
        new = after.get(name)
        if new is None:
            notes.append(f"{name}: not compared, the second has no such results")
            continue
        if old["device"] != new["device"]:
            notes.append(f"{name}: not compared, the devices differ: {where(old)} and {where(new)}")
            continue
        versions = [{key: each["versions"].get(key) for key in ("python", "torch", "numpy")} for each in (old, new)]
        notes += [
            f"{name}: {key} {theirs} before, {versions[1][key]} after"
            for key, theirs in versions[0].items()
            if theirs != versions[1][key]
        ]
        changes += _changes(name, old, new)
    notes += [f"{name}: not compared, the first has no such results" for name in after if name not in before]
    return changes, notes


def _changes(name: str, old: Document, new: Document) -> Iterator[Change]:
    found = {(row["rival"], json.dumps(row["problem"])): row for row in new["rows"]}
    for row in old["rows"]:
        if (other := found.get((row["rival"], json.dumps(row["problem"])))) is not None:
            label = " ".join([name, row["rival"], *map(str, row["problem"].values())])
            busy = disturbed(row) or disturbed(other)
            yield Change(label, row["median_ms"], other["median_ms"], apart(row, other), busy)


def where(document: Document) -> str:
    """Device and versions in a few words."""
    return f"{_machine(document)}, torch {document['versions']['torch']}"


def _machine(document: Document) -> str:
    device = document["device"]
    instructions = [device["features"]] if "features" in device else []
    instructions += [f"extension held to {device['extension']}"] if "extension" in device else []
    return ", ".join([device["model"], *instructions, f"{device['threads']} threads"])
