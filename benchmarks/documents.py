"""What is written from results files, never typed: the terminal's table, the README's blocks, docs/performance.md."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plots import Points, chart
from benchmarks.results import (
    RESULTS,
    Change,
    Document,
    Row,
    Runs,
    apart,
    by_problem,
    disturbed,
    exponent,
    read,
    read_elsewhere,
    rivals_of,
    where,
)
from benchmarks.targets import TARGETS
from cldf_fast.errors import ConfigError
from cldf_fast.files import atomic_write_text

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
END = "<!-- end -->"

STUDIES = {"phantom": "phantom, lesion", "organs": "phantom, four organs", "lgg": "LGG, 64 px"}
"""Studies that the README's table has once they are kept, with the heads of their columns."""
METHODS = {
    "cldf": "CLDF",
    "gradient": "gradient map",
    "cg_diff": "CG-Diff",
    "layercam": "LayerCAM",
    "intensity": "best intensity threshold",
    "gradcam": "GradCAM",
    "cg_cdm": "CG-CDM",
    "location_prior": "location prior",
    "decoder_trained_with_masks": "upper bound: decoder trained with true masks",
}


# --- Tables -----------------------------------------------------------------------------------------------------------


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def times(document: Document) -> str:
    """For every problem our median and spread, our share of the ceilings, and the others' times as multiples."""
    tables = []
    for problems in _parts(document):
        others = _others(document, problems)
        names = list(problems[0][0])
        shared = any("roofline_share" in runs.get(document["ours"], {}) for _, runs in problems)
        head = [*names, f"{document['ours']}, ms", *(["of the ceiling"] if shared else []), *others]
        lines = []
        for problem, runs in problems:
            ours = runs.get(document["ours"])
            cells = [str(value) for value in problem.values()]
            cells.append(_time(ours) if ours else "")
            if shared:
                cells.append(percent(ours["roofline_share"]) if ours and "roofline_share" in ours else "")
            cells += [_compared(runs, document["ours"], rival) for rival in others]
            lines.append(cells)
        tables.append(markdown(head, lines))
    return "\n\n".join(tables)


def memory(document: Document) -> str:
    """Extra memory of everyone, MiB, where it was measured; "" where it never was."""
    tables = []
    for problems in _parts(document):
        measured = [(problem, runs) for problem, runs in problems if any("extra_bytes" in row for row in runs.values())]
        if measured:
            columns = [document["ours"], *_others(document, measured)]
            head = [*measured[0][0], *columns]
            lines = [
                [*map(str, problem.values()), *(_mebibytes(runs.get(column, {})) for column in columns)]
                for problem, runs in measured
            ]
            tables.append(markdown(head, lines))
    return "\n\n".join(tables)


_COMMON = {
    *("rival", "problem", "headline", "median_ms", "min_ms", "iqr_ms", "rounds", "others_share"),
    *("extra_bytes", "operations", "bytes", "roofline_share"),
}


def details(document: Document) -> str:
    """What a benchmark's test has added to its rows; "" if nothing."""
    lines = []
    for row in document["rows"]:
        if added := {key: value for key, value in row.items() if key not in _COMMON}:
            texts = [
                f"{key} {', '.join(f'{part} {figure}' for part, figure in value.items())}"
                if isinstance(value, dict)
                else f"{key} {value}"
                for key, value in added.items()
            ]
            lines.append([" ".join(map(str, row["problem"].values())), row["rival"], "; ".join(texts)])
    return markdown(["problem", "who", "figures"], lines) if lines else ""


def _parts(document: Document) -> list[list[tuple[dict[str, Any], Runs]]]:
    """Problems by their "part", since parts have rivals of their own; the part stays the first column."""
    parts: dict[str, list[tuple[dict[str, Any], Runs]]] = {}
    for problem, runs in by_problem(document):
        parts.setdefault(problem.get("part", ""), []).append((problem, runs))
    return list(parts.values())


def _others(document: Document, problems: Sequence[tuple[dict[str, Any], Runs]]) -> list[str]:
    names = dict.fromkeys(rival for _, runs in problems for rival in runs)
    return [rival for rival in names if rival != document["ours"]]


def _time(row: Row) -> str:
    return f"{number(row['median_ms'])} ± {number(row['iqr_ms'])}{'*' if disturbed(row) else ''}"


def _compared(runs: Runs, ours: str, rival: str) -> str:
    if rival not in runs or ours not in runs:
        return ""
    return multiple(runs[rival]["median_ms"] / runs[ours]["median_ms"]) + ("*" if disturbed(runs[rival]) else "")


def _mebibytes(row: Row) -> str:
    return f"{row['extra_bytes'] / 2**20:,.1f}" if "extra_bytes" in row else ""


def number(value: float) -> str:
    """Three digits or all before the point: 0.0421, 4.20, 42.1, 42100."""
    for bound, digits in ((100, 0), (10, 1), (1, 2)):
        if value >= bound:
            return f"{value:.{digits}f}"
    return f"{value:.3g}"


def multiple(value: float) -> str:
    return f"{value:.0f}x" if value >= 100 else f"{value:.1f}x" if value >= 0.95 else f"{value:.2f}x"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


# --- Terminal ---------------------------------------------------------------------------------------------------------


def terminal(results: Mapping[str, Document]) -> str:
    """One table of everything that was measured, and what was not."""
    head = ("benchmark", "problem", "who", "median ms", "spread", "times ours", "MiB", "of ceiling", "others")
    lines = [head]
    for document in results.values():
        for problem, runs in by_problem(document):
            for rival, row in runs.items():
                ours = runs.get(document["ours"])
                lines.append(
                    (
                        document["benchmark"],
                        " ".join(f"{key}={value}" for key, value in problem.items()),
                        rival,
                        number(row["median_ms"]),
                        number(row["iqr_ms"]),
                        "" if ours is None else f"{row['median_ms'] / ours['median_ms']:.2f}",
                        _mebibytes(row),
                        percent(row["roofline_share"]) if "roofline_share" in row else "",
                        percent(row["others_share"]) + ("  BUSY" if disturbed(row) else "")
                        if "others_share" in row
                        else "",
                    )
                )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*table, "", *remarks(results)])


def remarks(results: Mapping[str, Document]) -> list[str]:
    """Sentences on where it was measured, on what is missing, and on rows whose machine was busy."""
    sentences = sorted({where(document) for document in results.values()})
    for document in results.values():
        name = document["benchmark"]
        sentences += [f"{name}: {gap}" for gap in gaps(document)]
        sentences += [f"{name}: FAILED: {row}: {reason}" for row, reason in document.get("failed", {}).items()]
        busy = sum(disturbed(row) for row in document["rows"])
        if busy:
            sentences.append(
                f"{name}: {busy} of {len(document['rows'])} rows while others kept the machine busy; measure again"
            )
    return sentences


def gaps(document: Document) -> list[str]:
    """What was not measured, and why."""
    by_reason: dict[str, list[str]] = {}
    for rival, reason in document.get("gaps", {}).items():
        by_reason.setdefault(reason, []).append(rival)
    return [f"no {', '.join(rivals)}: {reason}" for reason, rivals in by_reason.items()]


def changes_table(changes: Sequence[Change], notes: Sequence[str], factor: float) -> str:
    """What `--compare` prints."""
    lines = []
    for change in changes:
        verdict = "machine was busy" if change.disturbed else "" if change.beyond else "within the spread"
        if change.regression(factor):
            verdict = "SLOWER"
        lines.append(
            f"{change.ratio:6.2f}x  {number(change.before_ms):>9} -> {number(change.after_ms):>9} ms  {change.name}"
            + (f"  ({verdict})" if verdict else "")
        )
    return "\n".join([*lines, *notes])


# --- README -----------------------------------------------------------------------------------------------------------


def speed_block(results: Mapping[str, Document]) -> str:
    """The headline problems of all results."""
    head = ["", "problem", "ours, ms", "others' time", "ours, MiB", "others' memory"]
    lines, places = [], []
    for document in results.values():
        ours = document["ours"]
        for problem, runs in by_problem(document):
            if ours not in runs or not runs[ours].get("headline"):
                continue
            rivals = [rival for rival in rivals_of(document) if rival in runs]
            lines.append(
                [
                    document["benchmark"],
                    ", ".join(f"{name} {value}" for name, value in problem.items()),
                    number(runs[ours]["median_ms"]),
                    ", ".join(f"{rival} {_compared(runs, ours, rival)}" for rival in rivals),
                    _mebibytes(runs[ours]),
                    ", ".join(
                        f"{rival} {multiple(runs[rival]['extra_bytes'] / runs[ours]['extra_bytes'])}"
                        for rival in rivals
                        if "extra_bytes" in runs[rival] and "extra_bytes" in runs[ours]
                    ),
                ]
            )
            places.append(where(document))
    return "\n".join([markdown(head, lines), "", *(f"({place})" for place in dict.fromkeys(places))])


def dice_block(studies: Mapping[str, Document]) -> str:
    """Mean Dice of all methods in all studies."""
    heads = {name: STUDIES[name] for name in STUDIES if name in studies}
    lines = []
    for method, label in METHODS.items():
        cells = [_dice(studies[study], method) for study in heads]
        lines.append([label, *(f"**{cell}**" if cell and method == "cldf" else cell for cell in cells)])
    given = ", ".join(f"{_dice(studies[study], 'cldf_given_labels')} ({head})" for study, head in heads.items())
    return f"{markdown(['', *heads.values()], lines)}\n\nWith given labels CLDF reaches {given}."


def _dice(study: Document, method: str) -> str:
    rows = study["methods"] | study["upper_bounds"]
    if method not in rows:
        return ""
    figure = rows[method]["dice_positive"]
    seeds = len(figure.get("seed_means", [None]))
    # A baseline doesn't depend on the decoder, and has one seed by nature.
    return f"{figure['mean']:.3f}" + (
        " (one seed)" if seeds == 1 and method in ("cldf", "decoder_trained_with_masks") else ""
    )


def read_studies(folder: Path = RESULTS) -> dict[str, Document]:
    """The studies that are kept."""
    files = [folder / f"{name}.json" for name in STUDIES]
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()}


def with_block(text: str, name: str, block: str) -> str:
    """A text with what stands between `<!-- from benchmarks/results: NAME -->` and the next end brought up to date."""
    mark = f"<!-- from benchmarks/results: {name} -->"
    before, found, rest = text.partition(mark)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ConfigError(f"README.md: expected {mark} and {END} after it, found {'one' if found else 'none'}")
    return f"{before}{mark}\n{block}\n{END}{after}"


def readme(text: str, results: Mapping[str, Document], studies: Mapping[str, Document]) -> str:
    """The README with its blocks brought up to date."""
    return with_block(with_block(text, "speed", speed_block(results)), "studies", dice_block(studies))


# --- docs/performance.md ----------------------------------------------------------------------------------------------

_INTRODUCTION = """# How fast, how lean

Written by `python -m benchmarks docs` from the files in `benchmarks/results`; do not edit. What the benchmarks and
their rivals are is said at the head of `benchmarks/bench_<name>.py`.

## How it is measured

- All rivals of a problem run in one process, one after another, on the same inputs, with as many threads as the
  machine has cores. A rival's time counts only after its result was compared with another's.
- Times are medians of warm calls in milliseconds, ± the interquartile range: of as many calls as fit into 12 seconds of
  the problems that the README shows and into 5 of others, and never more than 30. What takes longer is called once, and
  that call counts, after everything that only a first call does. Others' times are multiples of ours, and those below 1
  are faster than we are. A row with an asterisk was measured while other processes took more than a
  tenth of the processors.
- Extra memory is what a call adds to its process's resident memory at its peak, beyond inputs and results, in a
  process of its own.
- "Of the ceiling" is the time that a problem takes at least, over ours. That least is the longer of two: its
  operations at the rate of this machine's best float32 product of up to 2048 x 2048, and its bytes, each read or
  written once, at the rate of its best copy of 64 MiB. `infonce` counts the 8 M N D operations of the usual method
  and 3 x 3 convolutions those of the direct one; ours need fewer, so that they can pass 100 %.
- Speed of one machine says little about another: `python -m benchmarks` measures yours, `--compare` sets two side by
  side. What was kept of an earlier machine is in a folder of its own, and shows in the table below.
"""


def page(results: Mapping[str, Document], elsewhere: Sequence[Mapping[str, Document]] = ()) -> str:
    """docs/performance.md. elsewhere: results of other machines, which show in what was asked and reached."""
    pictures = plots(results)
    sections = [_INTRODUCTION, "## Asked and reached\n", _targets([results, *elsewhere])]
    sections += ["## Where rivals win\n", _wins(results)]
    for name, document in results.items():
        sections += [f"## {document['benchmark']}\n", _provenance(document), times(document)]
        if in_memory := memory(document):
            sections += ["Extra memory, MiB:", in_memory]
        if added := details(document):
            sections += ["Further figures:", added]
        if growth := _growth(document):
            sections += ["How time grows: the power of the column that a least squares fit gives.", growth]
        sections += [_picture(file, title) for file, (title, _) in pictures.items() if file.startswith(f"{name}-")]
    if "roofline.svg" in pictures:
        sections += ["## Roofline\n", _picture("roofline.svg", pictures["roofline.svg"][0])]
    return "\n\n".join(section.rstrip("\n") if not section.endswith("\n\n") else section for section in sections) + "\n"


def _picture(file: str, title: str) -> str:
    return f"![{title}](plots/{file})"


def _provenance(document: Document) -> str:
    figures = [where(document), f"commit {document['commit'][:10]}{document['commit'][40:]}"]
    figures += [document["date"]] if "date" in document else []
    if "ceilings" in document:
        ceilings = document["ceilings"]
        figures.append(
            f"ceilings {ceilings['operations_per_second'] / 1e9:.0f} GFLOP/s and "
            f"{ceilings['bytes_per_second'] / 1e9:.1f} GB/s"
        )
    figures += gaps(document)
    return f"{'; '.join(figures)}."


def _targets(machines: Sequence[Mapping[str, Document]]) -> str:
    """A line for every target and each machine that has measured it."""
    lines = []
    for target in TARGETS:
        found = [
            (reached, where(results[target.results]))
            for results in machines
            if (reached := target.reached(results)) is not None
        ]
        asked = [str(target.issue), target.what, target.asked]
        for reached, place in found:
            figure = f"{number(reached) if reached >= 0.01 else f'{reached:.2g}'}{target.unit}"
            lines.append([*asked, figure, "yes" if target.met(reached) else "**no**", place])
        if not found:
            place = "no GPU at hand" if target.results.endswith("-gpu") else f"no such row in {target.results}"
            lines.append([*asked, "not measured", "", place])
    return markdown(["issue", "what", "asked", "reached", "met", "on"], lines)


def _wins(results: Mapping[str, Document]) -> str:
    """Every row whose rival is faster, or takes less memory, than ours."""
    lines = []
    for document in results.values():
        for problem, runs in by_problem(document):
            if (ours := runs.get(document["ours"])) is None:
                continue
            for rival in (name for name in rivals_of(document) if name in runs):
                row = runs[rival]
                cells = [document["benchmark"], " ".join(map(str, problem.values())), rival]
                if row["median_ms"] < ours["median_ms"]:
                    surely = "" if apart(row, ours) else " (within the spread)"
                    lines.append([*cells, "time", multiple(row["median_ms"] / ours["median_ms"]) + surely])
                if "extra_bytes" in row and "extra_bytes" in ours and row["extra_bytes"] < ours["extra_bytes"]:
                    lines.append([*cells, "memory", multiple(row["extra_bytes"] / ours["extra_bytes"])])
    if not lines:
        return "Nowhere in these results."
    return markdown(["benchmark", "problem", "rival", "in", "of ours"], lines)


# --- Growth and pictures ----------------------------------------------------------------------------------------------


def curves(document: Document, figure: str) -> dict[tuple[str, str], dict[str, Points]]:
    """Of rows along an axis (problems of part, axis and value): (part, axis) -> rival -> points (value, figure)."""
    found: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for row in document["rows"]:
        problem = row["problem"]
        if list(problem) == ["part", "axis", "value"] and row.get(figure, 0) > 0:
            axis = found.setdefault((problem["part"], problem["axis"]), {})
            axis.setdefault(row["rival"], []).append((problem["value"], row[figure]))
    return {key: dict(sorted(by_rival.items())) for key, by_rival in found.items()}


def _growth(document: Document) -> str:
    lines = [
        [part, axis, rival, f"{points[0][0]:g} to {points[-1][0]:g}", f"{exponent(points):.2f}"]
        for (part, axis), by_rival in curves(document, "median_ms").items()
        for rival, points in by_rival.items()
        if len(points) > 1
    ]
    return markdown(["part", "along", "who", "from", "exponent"], lines) if lines else ""


def plots(results: Mapping[str, Document]) -> dict[str, tuple[str, str]]:
    """File in docs/plots -> (title, SVG)."""
    pictures: dict[str, tuple[str, str]] = {}

    def add(file: str, title: str, x_label: str, y_label: str, lines: Mapping[str, Points]) -> None:
        lines = {name: points for name, points in lines.items() if len(points) > 1}
        if lines:
            pictures[file] = title, chart(title, x_label, y_label, lines)

    for name, document in results.items():
        for figure, label, scale in (("median_ms", "time, ms", 1.0), ("extra_bytes", "extra memory, MiB", 2.0**-20)):
            kind = label.split(",")[0].split(" ")[-1]
            for (part, axis), by_rival in curves(document, figure).items():
                scaled = {rival: [(x, scale * y) for x, y in points] for rival, points in by_rival.items()}
                add(f"{name}-{part}-{axis}-{kind}.svg", f"{part}: {kind} against {axis}", axis, label, scaled)
    if "infonce-cpu" in results:
        for sets in (1, 2):
            lines: dict[str, list[tuple[float, float]]] = {}
            for row in results["infonce-cpu"]["rows"]:
                if row["problem"] | {"sets": sets, "dim": 64, "classes": 2} == row["problem"]:
                    lines.setdefault(row["rival"], []).append((row["problem"]["size"], row["median_ms"]))
            title = f"pixel_infonce, D = 64, {'a set with itself' if sets == 1 else 'anchors and candidates'}"
            add(f"infonce-cpu-{sets}.svg", title, "M = N", "time, ms", lines)
    if roofline := _roofline(results):
        pictures["roofline.svg"] = "Ours and the machine's ceilings", roofline
    return pictures


def _roofline(results: Mapping[str, Document]) -> str | None:
    """Our rows by operations a byte and operations a second, under the ceilings; "" where none counts operations."""
    dots: dict[str, list[tuple[float, float]]] = {}
    ceilings = [document["ceilings"] for document in results.values() if "ceilings" in document]
    for document in results.values():
        for row in document["rows"]:
            if row["rival"] == document["ours"] and row.get("operations"):
                rate = 1000 * row["operations"] / row["median_ms"]
                dots.setdefault(document["benchmark"], []).append((row["operations"] / row["bytes"], rate))
    if not dots:
        return None
    product = max(each["operations_per_second"] for each in ceilings)
    copy = max(each["bytes_per_second"] for each in ceilings)
    widest = max(x for points in dots.values() for x, _ in points)
    roof = [(1.0, copy), (product / copy, product), (2 * widest, product)]
    return chart(
        "Ours and the machine's ceilings", "operations a byte", "operations a second", {"ceilings": roof}, dots
    )


# --- Writing ----------------------------------------------------------------------------------------------------------


def generated(folder: Path) -> dict[Path, str]:
    """Every file that kept results determine, with its text."""
    results = read(folder)
    return {
        README: readme(README.read_text(encoding="utf-8"), results, read_studies(folder)),
        DOCS / "performance.md": page(results, read_elsewhere(folder)),
        **{DOCS / "plots" / file: svg for file, (_, svg) in plots(results).items()},
    }


def stale(folder: Path = RESULTS) -> list[Path]:
    """Generated files that are not what kept results say, or should not be there."""
    wanted = generated(folder)
    differing = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    return [*differing, *(path for path in (DOCS / "plots").glob("*.svg") if path not in wanted)]


def write(folder: Path = RESULTS) -> list[Path]:
    """Bring README and docs up to date with kept results; returns the files that changed."""
    wanted, changed = generated(folder), stale(folder)
    for path in changed:
        if path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(path, wanted[path])
        else:
            path.unlink()
    return changed


def untraced_figures(text: str) -> list[str]:
    """Numbers in the README's section on speed that stand outside its generated block."""
    section = text.partition("## How fast")[2].partition("\n## ")[0]
    typed = re.sub(r"<!-- from benchmarks/results.*?<!-- end -->", "", section, flags=re.S)
    return re.findall(r"(?<![A-Za-z_\d-])\d[\d.,]*", typed)
