"""The benchmark suite's own code, and that the README shows what it has measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import suite

FILES = sorted(suite.RESULTS.glob("*.json"))


def test_the_readme_shows_the_results() -> None:
    text = (suite.ROOT / "README.md").read_text(encoding="utf-8")
    assert all(text.count(mark) == 1 for mark in suite.MARKS)
    assert suite.update(text) == text


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kept_results_tell_where_they_come_from_and_hold_every_rival(file: Path) -> None:
    results = json.loads(file.read_text(encoding="utf-8"))
    assert len(results["commit"].split()[0]) == 40
    assert results["device"]["model"]
    assert results["versions"]["torch"]
    ours = [row for row in results["rows"] if row["rival"] == results["ours"]]
    assert ours
    for row in ours:
        rivals = {other["rival"] for other in results["rows"] if other["problem"] == row["problem"]}
        assert len(rivals) > 1, row["problem"]
    table = suite.table(results)
    assert all(f"{row['median_ms']:.2f}" in table for row in ours)
