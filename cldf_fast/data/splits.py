"""Splits by patient: a table of which patient is in which part. Slices of one patient never meet across parts."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from cldf_fast.data.base import SliceDataset
from cldf_fast.errors import SplitError
from cldf_fast.files import atomic_write_text

PARTS = ("train", "val", "test")
SPLIT_FILE = "split.csv"

Split = dict[str, tuple[str, ...]]
"""Part name to its patients, sorted."""


def read_split(path: str | Path) -> Split:
    """Read a CSV with at least the columns `patient` and `split`, a patient a row; further columns are ignored."""
    path = Path(path)
    parts: dict[str, list[str]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            missing = {"patient", "split"} - set(rows.fieldnames or ())
            if missing:
                raise SplitError(f"{path}: expected the columns patient and split, {sorted(missing)[0]!r} is missing")
            for row in rows:
                patient, part = (row["patient"] or "").strip(), (row["split"] or "").strip()
                if not patient or not part:
                    raise SplitError(f"{path}, line {rows.line_num}: expected a patient and a split, got an empty cell")
                parts.setdefault(part, []).append(patient)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SplitError(f"{path}: can't be read as a split table in CSV ({error})") from error
    split = {part: tuple(sorted(parts[part])) for part in sorted(parts, key=_part_order)}
    check_split(split, source=path)
    return split


def _part_order(part: str) -> tuple[int, str]:
    return (PARTS.index(part) if part in PARTS else len(PARTS)), part


def write_split(split: Mapping[str, Sequence[str]], path: str | Path) -> None:
    """Write the table that `read_split` reads: parts in their order, patients sorted."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("patient", "split"))
    rows.writerows((patient, part) for part, patients in split.items() for patient in sorted(patients))
    atomic_write_text(Path(path), text.getvalue())


def check_split(
    split: Mapping[str, Sequence[str]], subjects: Collection[str] | None = None, *, source: Path | str = "split"
) -> None:
    """Raise SplitError if a part is empty, a patient appears twice, or one is not among `subjects` (None: not checked).

    Patients of the data set that the split leaves out are allowed: a split may use a part of the data.
    """
    if not split:
        raise SplitError(f"{source}: expected at least one part, found none")
    seen: dict[str, str] = {}
    known = None if subjects is None else set(subjects)
    for part, patients in split.items():
        if not patients:
            raise SplitError(f"{source}: part {part!r} is empty; give it a patient or leave it out")
        for patient in patients:
            if patient in seen:
                raise SplitError(f"{source}: patient {patient!r} is in {seen[patient]!r} and in {part!r}; keep one")
            if known is not None and patient not in known:
                raise SplitError(f"{source}: patient {patient!r} of part {part!r} is not in the data set")
            seen[patient] = part


def make_split(
    subjects: Collection[str], fractions: tuple[float, float, float] = (0.7, 0.1, 0.2), seed: int = 0
) -> Split:
    """Divide patients at random into train, val and test; the same patients and seed give the same split in any order.

    fractions: shares of train, val and test, each > 0, sum 1. Every part gets a patient at least, so 3 are needed.
    """
    if len(fractions) != len(PARTS) or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise SplitError(f"fractions: expected three positive shares that sum to 1, got {fractions}")
    patients = sorted(set(subjects))
    if len(patients) < len(PARTS):
        raise SplitError(f"subjects: a split needs at least {len(PARTS)} patients, got {len(patients)}")
    order = [patients[i] for i in np.random.default_rng(seed).permutation(len(patients))]
    num_test = max(1, round(fractions[2] * len(order)))
    num_val = max(1, round(fractions[1] * len(order)))
    num_train = max(1, len(order) - num_val - num_test)
    num_val = min(num_val, len(order) - num_train - 1)
    cuts = (0, num_train, num_train + num_val, len(order))
    return {part: tuple(sorted(order[cuts[i] : cuts[i + 1]])) for i, part in enumerate(PARTS)}


def find_split(root: str | Path) -> Path | None:
    """The `split.csv` that comes with a data folder: inside it, or beside it; None if there is none."""
    root = Path(root).absolute()
    candidates = (root / SPLIT_FILE, root.parent / SPLIT_FILE)
    return next((path for path in candidates if path.is_file()), None)


def split_dataset(
    dataset: SliceDataset, split: Mapping[str, Sequence[str]], *, source: Path | str = "split"
) -> dict[str, SliceDataset]:
    """One dataset a part. Raises SplitError as `check_split` does, naming the source."""
    check_split(split, dataset.subjects, source=source)
    return {part: dataset.select(patients) for part, patients in split.items()}
