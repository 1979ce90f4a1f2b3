"""One self-contained HTML file, a contact sheet and a terminal table out of a metrics document."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from cldf_fast.errors import DataError
from cldf_fast.evaluation import AGGREGATION_POLICY, EMPTY_POLICY
from cldf_fast.files import atomic_write_bytes, atomic_write_text

DISCLAIMER = "Research use only; not to be used for diagnostic purposes."

RGB = tuple[int, int, int]
Pixels = npt.NDArray[np.uint8]

# Distinguishable with every common form of colour blindness (Okabe and Ito); repeated when there are more classes.
_CLASS_COLOURS: tuple[RGB, ...] = (
    (230, 115, 20),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
)
_BACKGROUND_COLOUR: RGB = (20, 100, 190)
_OUTLINE_COLOUR: RGB = (255, 255, 255)
# Black to pale yellow over purple and orange: brightness rises evenly, so that the map also reads in greyscale.
_HEAT_COLOURS: tuple[RGB, ...] = (
    (0, 0, 0),
    (36, 12, 84),
    (112, 24, 110),
    (188, 55, 84),
    (238, 105, 37),
    (251, 178, 40),
    (252, 252, 180),
)
_OVERLAY = 0.6
# Panels are drawn with their longer side between these lengths, in pixels: small images grow by a whole factor.
_PANEL_GROWS_TO, _PANEL_SHRINKS_TO = 256, 384

# Keys of the document whose names are not their words.
_NAMES = {
    "cldf": "CLDF",
    "gradcam": "GradCAM",
    "layercam": "LayerCAM",
    "cg_diff": "CG-Diff",
    "cg_cdm": "CG-CDM",
    "auc": "AUC",
    "auc_within": "AUC within the positive range",
    "auc_position_matched": "AUC, position matched",
}
_MISSING = "–"


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


@dataclass(frozen=True, eq=False)
class CasePanels:
    """The pictures of one slice.

    title: what is shown and why ("Median: patient a, slice 12"). dice: of mask against truth, None where the structure
    is absent. image: float [H, W], finite, shown between its own 0.5th and 99.5th percentile. gradient_map, cam:
    float [H, W], finite, shown from 0 to their own maximum; pixel_labels: int8 [H, W], -1 ignore, 0 background,
    1..K classes; None for what the method did not make. mask, truth: uint8 [H, W], 0 background, 1..K classes.
    """

    title: str
    dice: float | None
    image: npt.NDArray[Any]
    gradient_map: npt.NDArray[Any] | None
    cam: npt.NDArray[Any] | None
    pixel_labels: npt.NDArray[Any] | None
    mask: npt.NDArray[Any]
    truth: npt.NDArray[Any]

    def __post_init__(self) -> None:
        shape = np.shape(self.image)
        if len(shape) != 2 or 0 in shape:
            raise DataError(f"image of case {self.title!r}: expected [H, W], got {list(shape)}")
        for name in ("image", "gradient_map", "cam", "pixel_labels", "mask", "truth"):
            array = getattr(self, name)
            if array is None:
                continue
            if np.shape(array) != shape:
                raise DataError(
                    f"{name} of case {self.title!r}: expected the image's shape {list(shape)}, "
                    f"got {list(np.shape(array))}"
                )
            if not np.isfinite(array).all():
                raise DataError(f"{name} of case {self.title!r}: expected finite values, got NaN or infinity")


@dataclass(frozen=True, eq=False)
class _Panel:
    name: str
    description: str
    pixels: Pixels


def write_panels_png(path: str | Path, cases: Sequence[CasePanels]) -> None:
    """Write a contact sheet as PNG: one row per case, the panels of the report side by side."""
    if not cases:
        raise DataError("cases: expected at least one, got none")
    rows = [_panels(case) for case in cases]
    font = ImageFont.load_default(size=15)
    gap, line = 8, 26
    heights = [max(panel.pixels.shape[0] for panel in row) for row in rows]
    widths = [sum(panel.pixels.shape[1] + gap for panel in row) for row in rows]
    sheet = Image.new("RGB", (max(widths) + gap, sum(heights) + len(rows) * (2 * line + gap) + line), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    top = gap
    for case, row, height in zip(cases, rows, heights, strict=True):
        draw.text((gap, top), f"{case.title}   {_dice_text(case)}", fill=(20, 20, 20), font=font)
        left = gap
        for panel in row:
            sheet.paste(Image.fromarray(panel.pixels).convert("RGB"), (left, top + line))
            draw.text((left, top + line + height + 3), panel.name, fill=(90, 90, 90), font=font)
            left += panel.pixels.shape[1] + gap
        top += height + 2 * line + gap
    draw.text((gap, top), DISCLAIMER, fill=(90, 90, 90), font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    atomic_write_bytes(path, buffer.getvalue())


def _panels(case: CasePanels) -> list[_Panel]:
    height, width = case.image.shape
    longest = max(height, width)
    scale = max(1, _PANEL_GROWS_TO // longest) if longest <= _PANEL_SHRINKS_TO else _PANEL_SHRINKS_TO / longest
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    low, high = np.percentile(case.image, [0.5, 99.5])
    grey = _resize_smooth(_unit(case.image, float(low), float(high)), size)
    truth = _resize_labels(case.truth, size)
    panels = [_Panel("Image", "the slice", grey)]
    for name, values, what in (
        ("Gradient map", case.gradient_map, "where the classifier's score is sensitive; brighter is stronger"),
        ("CAM", case.cam, "where the classifier's features are active; brighter is stronger"),
    ):
        if values is not None:
            panels.append(_Panel(name, what, _heat(_resize_smooth(_unit(values, 0.0, float(values.max())), size))))
    if case.pixel_labels is not None:
        labels = case.pixel_labels
        share = f"{(labels > 0).mean():.1%} foreground, {(labels == 0).mean():.1%} background, the rest ignored"
        panels.append(_Panel("Pixel labels", share, _overlay(grey, _resize_labels(labels, size), background=True)))
    mask = _outline(_overlay(grey, _resize_labels(case.mask, size)), truth)
    panels.append(_Panel("Mask", f"segmented, {int((case.mask > 0).sum())} pixels, {_dice_text(case)}", mask))
    panels.append(_Panel("Truth", f"true mask, {int((case.truth > 0).sum())} pixels", _overlay(grey, truth)))
    return panels


def _dice_text(case: CasePanels) -> str:
    return "structure absent" if case.dice is None else f"Dice {case.dice:.3f}"


def _unit(values: npt.NDArray[Any], low: float, high: float) -> npt.NDArray[np.float32]:
    return np.clip((values - low) / max(high - low, 1e-12), 0.0, 1.0).astype(np.float32)


def _resize_smooth(values: npt.NDArray[np.float32], size: tuple[int, int]) -> Pixels:
    resized = Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)
    return (np.clip(np.asarray(resized), 0.0, 1.0) * 255).round().astype(np.uint8)


def _resize_labels(labels: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[np.int32]:
    return np.asarray(Image.fromarray(labels.astype(np.int32)).resize(size, Image.Resampling.NEAREST))


def _heat(values: Pixels) -> Pixels:
    stops = np.linspace(0, 255, len(_HEAT_COLOURS))
    ramp = np.array(_HEAT_COLOURS, np.float64).T
    table = np.stack([np.interp(np.arange(256), stops, channel) for channel in ramp], axis=1)
    coloured: Pixels = table.round().astype(np.uint8)[values]
    return coloured


def _class_colour(value: int) -> RGB:
    return _CLASS_COLOURS[(value - 1) % len(_CLASS_COLOURS)]


def _overlay(grey: Pixels, labels: npt.NDArray[np.int32], *, background: bool = False) -> Pixels:
    """Classes 1..K as tints over the grey image; background: label 0 is tinted too, so that -1 stands out untinted."""
    colours = [_BACKGROUND_COLOUR, *(_class_colour(k) for k in range(1, max(int(labels.max()), 0) + 1))]
    tint = np.array(colours, np.float32)[np.maximum(labels, 0)]
    tinted = (labels >= (0 if background else 1))[..., None]
    base = np.repeat(grey[..., None], 3, axis=2).astype(np.float32)
    return np.where(tinted, base + _OVERLAY * (tint - base), base).round().astype(np.uint8)


def _outline(picture: Pixels, labels: npt.NDArray[np.int32]) -> Pixels:
    """The inner edge of every labelled region in white."""
    padded = np.pad(labels, 1, mode="edge")
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    edge = (labels > 0) & np.any([neighbour != labels for neighbour in neighbours], axis=0)
    return np.where(edge[..., None], np.array(_OUTLINE_COLOUR, np.uint8), picture)


# ----------------------------------------------------------------------------------------------------------------------
# The table of methods, for HTML and terminal alike


@dataclass(frozen=True)
class _Column:
    """One column: heading, text of a summary's cell, and the metric that decides which cell is the best, if any."""

    heading: str
    cell: Callable[[Mapping[str, Any]], str]
    metric: str | None = None
    best: Literal["high", "low"] = "high"


@dataclass(frozen=True)
class _Row:
    name: str
    summary: Mapping[str, Any]
    kind: Literal["cldf", "baseline", "upper_bound"]


def terminal_table(document: Mapping[str, Any]) -> Table:
    """The table of methods for the command line: CLDF first, baselines by Dice, upper bounds set apart."""
    columns = _columns(document, compact=True)
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=f"{_data_line(document)}: means over positive slices",
        caption=DISCLAIMER,
        title_justify="left",
        caption_justify="left",
    )
    rows = _rows(document)
    table.add_column("Method", min_width=max(len(word) for row in rows for word in row.name.split()))
    for column in columns:
        # Headings wrap between words, figures never: a figure cut short would be another figure.
        words = [*column.heading.split(), *(column.cell(row.summary) for row in rows)]
        table.add_column(column.heading, justify="right", width=max(map(len, words)))
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        style = "bold" if row.kind == "cldf" else "dim" if row.kind == "upper_bound" else None
        # Text, not markup: names come from the user.
        cells = [Text(text) for text in (row.name, *(column.cell(row.summary) for column in columns))]
        table.add_row(*cells, style=style, end_section=following is not None and following.kind != row.kind)
    return table


def _rows(document: Mapping[str, Any]) -> list[_Row]:
    methods: Mapping[str, Mapping[str, Any]] = document["methods"]

    def order(key: str) -> tuple[bool, bool, float]:
        score = _mean_of(methods[key], "dice_positive")
        return key != "cldf", not _is_cldf(key), -1.0 if score is None else -score

    rows = [
        _Row(_name(key), methods[key], "cldf" if _is_cldf(key) else "baseline") for key in sorted(methods, key=order)
    ]
    bounds = [
        _Row(_name(key), bound, "upper_bound") for key, bound in document["upper_bounds"].items() if _is_summary(bound)
    ]
    return rows + bounds


def _columns(document: Mapping[str, Any], *, compact: bool = False) -> list[_Column]:
    """compact: means without their deviations, and fewer columns, for a terminal 80 characters wide."""
    unit = _distance_unit(document)
    cell = _mean_cell if compact else _spread_cell
    columns = [
        _Column("Dice", cell("dice_positive", 3), "dice_positive"),
        _Column("95% CI", lambda summary: _interval_text(summary.get("dice_positive"))),
    ]
    if "seeds" in document:
        columns.append(_Column("SD of seeds", lambda summary: _number(summary["dice_positive"].get("seed_std"), 3)))
    if not compact:
        columns.append(_Column("IoU", cell("iou_positive", 3), "iou_positive"))
    columns.append(_Column(f"HD95, {unit}", cell("hd95_positive", 1), "hd95_positive", "low"))
    if not compact:
        columns.append(_Column(f"ASSD, {unit}", cell("assd_positive", 1), "assd_positive", "low"))
    return [
        *columns,
        _Column("Dice, patient", cell("dice_patient", 3), "dice_patient"),
        _Column("Missed", lambda summary: _fraction(summary, "missed_slices", "positive_slices")),
        _Column("False pos.", lambda summary: _fraction(summary, "false_positive_slices", "negative_slices")),
    ]


def _mean_cell(metric: str, digits: int) -> Callable[[Mapping[str, Any]], str]:
    return lambda summary: _number(_mean_of(summary, metric), digits)


def _spread_cell(metric: str, digits: int) -> Callable[[Mapping[str, Any]], str]:
    def cell(summary: Mapping[str, Any]) -> str:
        mean = _mean_of(summary, metric)
        return _MISSING if mean is None else f"{_number(mean, digits)} ± {_number(summary[metric].get('std'), digits)}"

    return cell


def _best(column: _Column, rows: Sequence[_Row]) -> float | None:
    """The best mean of a column among the rows that compete, upper bounds aside; None where there is nothing to win."""
    if column.metric is None:
        return None
    means = [_mean_of(row.summary, column.metric) for row in rows if row.kind != "upper_bound"]
    known = [mean for mean in means if mean is not None]
    if len(known) < 2:
        return None
    return max(known) if column.best == "high" else min(known)


def _is_cldf(key: str) -> bool:
    return key == "cldf" or key.startswith("cldf_")


def _is_summary(value: Any) -> bool:
    return isinstance(value, Mapping) and "dice_positive" in value


def _name(key: str) -> str:
    if key in _NAMES:
        return _NAMES[key]
    words = key.replace("_", " ")
    return f"CLDF, {words.removeprefix('cldf ')}" if _is_cldf(key) else words[:1].upper() + words[1:]


def _mean_of(summary: Mapping[str, Any], metric: str) -> float | None:
    figure = summary.get(metric) or {}
    mean: float | None = figure.get("mean")
    return mean


def _interval(figure: Mapping[str, Any] | None) -> tuple[float, float] | None:
    low, high = (figure or {}).get("ci95") or (None, None)
    return None if low is None or high is None else (low, high)


def _interval_text(figure: Mapping[str, Any] | None) -> str:
    interval = _interval(figure)
    return _MISSING if interval is None else f"{_number(interval[0], 3)}–{_number(interval[1], 3)}"


def _fraction(summary: Mapping[str, Any], part: str, whole: str) -> str:
    if not summary.get(whole):
        return _MISSING
    return f"{_count(summary.get(part))}/{_count(summary[whole])}"


def _number(value: float | None, digits: int) -> str:
    return _MISSING if value is None else f"{value:.{digits}f}"


def _count(value: float | None) -> str:
    """A count; means over seeds may have a fraction."""
    if value is None:
        return _MISSING
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def _distance_unit(document: Mapping[str, Any]) -> str:
    return str(document["data"].get("distance_unit", "mm"))


def _data_line(document: Mapping[str, Any]) -> str:
    data = document["data"]
    parts = [str(data[key]) for key in ("dataset", "split") if data.get(key)]
    return ", ".join(parts) if parts else "Data set"


# ----------------------------------------------------------------------------------------------------------------------
# HTML

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1d2023; --quiet: #5a6067; --rule: #d8d6d0; --tint: #f5f3ee;
  --accent: #0b5d80; --band: #a9cddd; }
@media (prefers-color-scheme: dark) { :root { --page: #15181b; --ink: #e7e5e0; --quiet: #a5abb1; --rule: #363b40;
  --tint: #1e2226; --accent: #7cc3e0; --band: #2b5a70; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 1rem/1.55 Charter, "Bitstream Charter", Georgia,
  "Liberation Serif", serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 3rem; }
h1, h2, h3, table, dl, .quiet, .strip, .case > figcaption, .panel figcaption, .legend, .notice, svg text {
  font-family: "Helvetica Neue", Helvetica, "Liberation Sans", Arial, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; font-weight: 600; letter-spacing: -.01em; }
h2 { font-size: 1.1rem; margin: 2.75rem 0 .75rem; padding-top: .8rem; border-top: 1px solid var(--rule);
  font-weight: 600; }
h3 { font-size: .95rem; margin: 1.5rem 0 .4rem; font-weight: 600; }
p, ul { max-width: 44rem; margin: 0 0 .8rem; }
p { overflow-wrap: anywhere; }
figure { margin: 0; }
.quiet { color: var(--quiet); font-size: .85rem; line-height: 1.5; }
.notice { border-left: 3px solid var(--accent); padding: .1rem 0 .1rem .75rem; margin: 1.1rem 0 1.6rem;
  font-size: .9rem; }
.lead { font-size: 1.1rem; line-height: 1.55; }
.scroll { overflow-x: auto; margin: 0 0 .5rem; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
.quiet b { color: var(--ink); }
.caption { margin: 1.6rem 0 .6rem; max-width: none; }
th, td { padding: .38rem .55rem; text-align: right; white-space: nowrap; font-weight: 400; }
thead th { border-top: 1.5px solid var(--ink); border-bottom: 1px solid var(--ink); font-weight: 600;
  vertical-align: bottom; white-space: normal; line-height: 1.3; }
tbody th { text-align: left; position: sticky; left: 0; background: var(--page); }
thead th:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
tbody:last-child tr:last-child > * { border-bottom: 1.5px solid var(--ink); }
tbody + tbody tr:first-child > * { border-top: 1px solid var(--rule); }
tbody.cldf th { font-weight: 600; }
tbody.upper_bound { color: var(--quiet); font-style: italic; }
td b { font-weight: 700; }
.strip { font-size: .85rem; margin: 0 0 .5rem; max-width: 52rem; }
.strip div { display: grid; grid-template-columns: 12rem 1fr 3.2rem; gap: .75rem; align-items: center; }
.strip .upper_bound { color: var(--quiet); font-style: italic; }
.strip .cldf { font-weight: 600; }
.track { position: relative; height: 1.5rem; border-left: 1px solid var(--rule); border-right: 1px solid var(--rule);
  background: repeating-linear-gradient(to right, var(--rule) 0 1px, transparent 1px 25%); }
.track i { position: absolute; top: .55rem; height: .4rem; background: var(--band); border-radius: .2rem; }
.track b { position: absolute; top: .45rem; width: .6rem; height: .6rem; margin-left: -.3rem; border-radius: 50%;
  background: var(--accent); }
.upper_bound .track b { background: var(--page); border: 2px solid var(--accent); }
.strip .value { text-align: right; font-variant-numeric: tabular-nums; }
.scale { display: flex; justify-content: space-between; color: var(--quiet); font-size: .75rem; }
.legend { display: flex; flex-wrap: wrap; gap: .35rem 1.1rem; list-style: none; padding: 0; margin: 0 0 1.2rem;
  font-size: .85rem; max-width: none; }
.legend span { display: inline-block; width: .9rem; height: .9rem; margin-right: .4rem; vertical-align: -.1rem;
  border: 1px solid var(--quiet); }
.legend .ramp { width: 4rem; }
.case { margin: 0 0 1.6rem; break-inside: avoid; }
.case > figcaption { font-size: .9rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }
.case > figcaption span { color: var(--quiet); font-variant-numeric: tabular-nums; margin-left: .5rem; }
.panels { display: grid; grid-template-columns: repeat(6, 1fr); gap: .5rem; }
.panel img { display: block; width: 100%; height: auto; background: #000; }
.panel figcaption { font-size: .75rem; color: var(--quiet); padding-top: .2rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: 1rem;
  max-width: 44rem; }
.charts svg { display: block; width: 100%; height: auto; }
dl { display: grid; grid-template-columns: minmax(8rem, 13rem) 1fr; gap: .25rem 1rem; font-size: .85rem;
  margin: 0 0 1rem; max-width: 44rem; font-variant-numeric: tabular-nums; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
dd dl { margin: 0; grid-template-columns: minmax(5rem, 12rem) 1fr; }
footer { border-top: 1px solid var(--rule); margin-top: 3rem; padding-top: .8rem; }
@media (max-width: 46rem) { .panels { grid-template-columns: repeat(3, 1fr); } }
@media (max-width: 30rem) { main { padding: 1.4rem .9rem 2rem; } h1 { font-size: 1.4rem; } .lead { font-size: 1rem; }
  .panels { grid-template-columns: repeat(2, 1fr); } dl, dd dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin: 0 0 .4rem; } dd dl { border-left: 1px solid var(--rule); padding-left: .7rem; }
  .strip div { grid-template-columns: 7.2rem 1fr 2.8rem; gap: .5rem; } }
@media print { main { max-width: none; padding: 0; } .scroll { overflow: visible; } }
"""


def write_report(
    path: str | Path,
    document: Mapping[str, Any],
    cases: Sequence[CasePanels],
    *,
    title: str,
    notes: Sequence[str] = (),
    curves: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> None:
    """Write the report of an evaluation as one HTML file that loads nothing from elsewhere.

    document: of `evaluation.metrics_document` or `evaluation.seeds_summary`. Of its "data", every entry is printed;
    "dataset" and "split" also name the table, and "distance_unit" (default "mm") is the unit of HD95 and ASSD.
    cases: pictures in the order to show them. title: of the page. notes: paragraphs about this run.
    curves: training curves by name, points (step, loss).
    """
    sections = [
        _method_section(document),
        _case_section(document, cases),
        _curve_section(curves or {}),
        _provenance_section(document, notes),
    ]
    atomic_write_text(
        path,
        f"""<!DOCTYPE html>
<html lang="en-GB">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{escape(title)}</h1>
<p class="quiet">{escape(_scope_line(document))}</p>
<p class="notice">{escape(DISCLAIMER)}</p>
<p class="lead">{escape(_summary_text(document))}</p>
</header>
{"".join(sections)}
<footer><p class="quiet">{escape(DISCLAIMER)}</p></footer>
</main>
</body>
</html>
""",
    )


def _scope_line(document: Mapping[str, Any]) -> str:
    cldf = document["methods"]["cldf"]
    counted = [
        f"{_count(cldf[key])} {label}"
        for key, label in (
            ("patients", "patients"),
            ("positive_slices", "positive slices"),
            ("negative_slices", "negative slices"),
        )
        if cldf.get(key) is not None
    ]
    classes = len(_classes(document))
    summed = [f"summed over {classes} classes"] if classes > 1 else []
    seeds = [f"{document['seeds']} seeds of the decoder"] if "seeds" in document else []
    return " · ".join([_data_line(document), *counted, *summed, *seeds])


def _summary_text(document: Mapping[str, Any]) -> str:
    """What a reader should take home, in one paragraph of plain sentences."""
    rows = _rows(document)
    cldf = rows[0].summary
    score = _mean_of(cldf, "dice_positive")
    if score is None:
        return "No slice of this set shows the structure, so there is no Dice to report."
    interval = _interval(cldf["dice_positive"])
    between = "" if interval is None else f" (95% interval over patients {interval[0]:.3f} to {interval[1]:.3f})"
    sentences = [
        f"CLDF, trained from image-level labels alone, reached a mean Dice of {score:.3f}{between} on positive slices."
    ]
    baselines = [row for row in rows if row.kind == "baseline" and _mean_of(row.summary, "dice_positive") is not None]
    if baselines:
        best = _mean_of(baselines[0].summary, "dice_positive") or 0.0
        relation = f"{score - best:.3f} below CLDF" if score >= best else f"{best - score:.3f} above CLDF"
        sentences.append(f"The best baseline, {baselines[0].name}, reached {best:.3f}: {relation}.")
    bounds = [
        f"{row.name} {_mean_of(row.summary, 'dice_positive'):.3f}"
        for row in rows
        if row.kind == "upper_bound" and _mean_of(row.summary, "dice_positive") is not None
    ]
    if bounds:
        sentences.append(f"Upper bounds that saw true masks: {', '.join(bounds)}.")
    missed = _fraction(cldf, "missed_slices", "positive_slices").replace("/", " of ")
    stray = _fraction(cldf, "false_positive_slices", "negative_slices").replace("/", " of ")
    if missed != _MISSING:
        sentences.append(f"It left {missed} positive slices unmarked.")
    if stray != _MISSING:
        sentences.append(f"It marked something on {stray} negative slices.")
    return " ".join(sentences)


def _method_section(document: Mapping[str, Any]) -> str:
    rows, columns = _rows(document), _columns(document)
    best = [_best(column, rows) for column in columns]
    head = "".join(f'<th scope="col">{escape(column.heading)}</th>' for column in columns)
    bodies = []
    for kind in ("cldf", "baseline", "upper_bound"):
        lines = []
        for row in (row for row in rows if row.kind == kind):
            cells = []
            for column, winner in zip(columns, best, strict=True):
                text = escape(column.cell(row.summary))
                won = winner is not None and kind != "upper_bound" and column.metric is not None
                leads = won and _mean_of(row.summary, str(column.metric)) == winner
                cells.append(f"<td><b>{text}</b></td>" if leads else f"<td>{text}</td>")
            lines.append(f'<tr><th scope="row">{escape(row.name)}</th>{"".join(cells)}</tr>')
        if lines:
            bodies.append(f'<tbody class="{kind}">{"".join(lines)}</tbody>')
    caption = (
        "<b>Table 1.</b> Means ± standard deviations over positive slices; Dice, patient: over stacked volumes. "
        "Missed: positive slices left empty. False pos.: negative slices with any pixel marked. "
        "Bold: best, upper bounds aside. Italic: upper bounds, which saw true masks and do not compete."
    )
    return f"""<section aria-labelledby="methods">
<h2 id="methods">Methods compared</h2>
{_interval_figure(rows)}
<p class="quiet caption" id="table-methods">{caption}</p>
<div class="scroll" role="region" aria-label="Table of methods" tabindex="0">
<table aria-describedby="table-methods">
<thead><tr><th scope="col">Method</th>{head}</tr></thead>{"".join(bodies)}
</table>
</div>
{_class_table(document, rows)}
</section>
"""


def _interval_figure(rows: Sequence[_Row]) -> str:
    """Mean Dice and its interval of every method on a common axis from 0 to 1."""
    lines, spoken = [], []
    for row in rows:
        mean, interval = _mean_of(row.summary, "dice_positive"), _interval(row.summary.get("dice_positive"))
        if mean is None:
            continue
        band = ""
        if interval is not None:
            band = f'<i style="left:{interval[0]:.2%};width:{interval[1] - interval[0]:.2%}"></i>'
        lines.append(
            f'<div class="{row.kind}"><span>{escape(row.name)}</span>'
            f'<span class="track">{band}<b style="left:{mean:.2%}"></b></span>'
            f'<span class="value">{mean:.3f}</span></div>'
        )
        spoken.append(f"{row.name} {mean:.3f}")
    if not lines:
        return ""
    scale = "".join(f"<span>{tick}</span>" for tick in ("0", "0.25", "0.5", "0.75", "1"))
    return (
        f'<figure><div class="strip" role="img" aria-label="{escape("Mean Dice: " + "; ".join(spoken))}">'
        f'{"".join(lines)}<div><span></span><span class="scale">{scale}</span><span></span></div></div>'
        '<figcaption class="quiet"><b>Figure 1.</b> Mean Dice on positive slices; bars are 95% bootstrap intervals '
        "over patients. Open circles: upper bounds.</figcaption></figure>"
    )


def _class_table(document: Mapping[str, Any], rows: Sequence[_Row]) -> str:
    names = _classes(document)
    if len(names) < 2:
        return ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    lines = []
    for row in rows:
        of_class = [row.summary.get("per_class", {}).get(name, {}) for name in names]
        cells = "".join(f"<td>{escape(_spread_cell('dice_positive', 3)(summary))}</td>" for summary in of_class)
        lines.append(f'<tr><th scope="row">{escape(row.name)}</th>{cells}</tr>')
    return f"""<p class="quiet caption" id="table-classes"><b>Table 2.</b> Dice on positive slices of each class.</p>
<div class="scroll" role="region" aria-label="Table of classes" tabindex="0">
<table aria-describedby="table-classes">
<thead><tr><th scope="col">Method</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody>
</table>
</div>
"""


def _classes(document: Mapping[str, Any]) -> list[str]:
    return [str(name) for name in document["methods"]["cldf"].get("per_class", {})]


def _case_section(document: Mapping[str, Any], cases: Sequence[CasePanels]) -> str:
    if not cases:
        return ""
    figures = []
    for case in cases:
        panels = "".join(
            f'<figure class="panel">{_image_tag(panel, case)}<figcaption>{escape(panel.name)}</figcaption></figure>'
            for panel in _panels(case)
        )
        figures.append(
            f'<figure class="case"><figcaption><b>{escape(case.title)}</b><span>{escape(_dice_text(case))}</span>'
            f'</figcaption><div class="panels">{panels}</div></figure>'
        )
    largest = max(int(array.max()) for case in cases for array in (case.mask, case.truth))
    return f"""<section aria-labelledby="cases">
<h2 id="cases">Cases</h2>
<p class="quiet">The gradient map and the class activation map (CAM) of the classifier are fused into pixel labels,
from which the decoder learns; the mask is its answer. True masks serve for comparison only.</p>
{_legend(_classes(document), largest)}
{"".join(figures)}
</section>
"""


def _legend(names: Sequence[str], largest: int) -> str:
    named = [(_class_colour(k), names[k - 1] if k <= len(names) else f"class {k}") for k in range(1, largest + 1)]
    swatches = [
        *named,
        (_BACKGROUND_COLOUR, "background, among pixel labels"),
        (_OUTLINE_COLOUR, "outline of the truth, on the mask"),
    ]
    items = "".join(
        f'<li><span style="background:rgb{colour}"></span>{escape(label)}</li>' for colour, label in swatches
    )
    ramp = ", ".join(f"rgb{colour}" for colour in _HEAT_COLOURS)
    return (
        f'<ul class="legend" aria-label="Colours">{items}<li><span class="ramp" style="background:linear-gradient('
        f'to right, {ramp})"></span>maps, from 0 to the maximum of each</li></ul>'
    )


def _image_tag(panel: _Panel, case: CasePanels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(panel.pixels).save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    height, width = panel.pixels.shape[:2]
    alt = escape(f"{panel.name} of {case.title}: {panel.description}")
    return f'<img src="data:image/png;base64,{data}" alt="{alt}" width="{width}" height="{height}">'


def _curve_section(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    charts = "".join(f"<figure>{loss_curve_svg(points, name)}</figure>" for name, points in curves.items())
    if not charts:
        return ""
    return f"""<section aria-labelledby="training">
<h2 id="training">Training</h2>
<div class="charts">{charts}</div>
</section>
"""


def loss_curve_svg(points: Sequence[tuple[float, float]], name: str) -> str:
    """An inline SVG line chart, coloured by the page's style; points: (step, loss), finite, steps rising."""
    steps, losses = (np.array([point[axis] for point in points], np.float64) for axis in (0, 1))
    if not points or not (np.isfinite(steps).all() and np.isfinite(losses).all()):
        raise DataError(f"curve {name!r}: expected one or more finite (step, loss) points, got others")
    left, top, width, height = 44.0, 26.0, 246.0, 104.0
    low, high = min(float(losses.min()), 0.0), float(losses.max())
    span = max(high - low, 1e-12)
    # More points than pixels would only make the file larger.
    kept = np.unique(np.linspace(0, len(points) - 1, min(len(points), int(width))).round().astype(int))
    x = left + width * (steps[kept] - steps[0]) / max(float(steps[-1] - steps[0]), 1e-12)
    y = top + height * (1 - (losses[kept] - low) / span)
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    spoken = f"{name}: from {losses[0]:.3g} to {losses[-1]:.3g} in {_count(float(steps[-1]))} steps"
    bottom, right = top + height, left + width
    return (
        f'<svg viewBox="0 0 300 156" role="img" aria-label="{escape(spoken)}" font-size="11" fill="var(--quiet)">'
        f'<text x="{left:g}" y="14" fill="var(--ink)" font-weight="600">{escape(name)}</text>'
        f'<path d="M{left:g} {top:g}V{bottom:g}H{right:g}" fill="none" stroke="var(--rule)"/>'
        f'<polyline points="{path}" fill="none" stroke="var(--accent)" stroke-width="1.5" stroke-linejoin="round"/>'
        f'<text x="{left - 5:g}" y="{top + 8:g}" text-anchor="end">{high:.3g}</text>'
        f'<text x="{left - 5:g}" y="{bottom:g}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{left:g}" y="{bottom + 15:g}">{_count(float(steps[0]))}</text>'
        f'<text x="{right:g}" y="{bottom + 15:g}" text-anchor="end">{_count(float(steps[-1]))} steps</text></svg>'
    )


def _provenance_section(document: Mapping[str, Any], notes: Sequence[str]) -> str:
    cldf = document["methods"]["cldf"]
    positive, missed, negative, stray, empty, patients, showing, incomplete = (
        _count(cldf.get(key))
        for key in (
            "positive_slices",
            "missed_slices",
            "negative_slices",
            "false_positive_slices",
            "excluded_empty",
            "patients",
            "positive_patients",
            "incomplete_volumes",
        )
    )
    pixels = _number(cldf.get("false_positive_pixels_mean"), 1)
    counts = {
        "Positive slices": f"{positive}, of which {missed} missed",
        "Negative slices": (
            f"{negative}, of which {stray} false positive and {empty} empty in truth and prediction, excluded; "
            f"on average {pixels} pixels marked per negative slice"
        ),
        "Patients": f"{patients}, of whom {showing} show the structure",
        "Volumes with missing slices": f"{incomplete}, left out of the patients' distances",
    }
    bounds = {_name(str(key)): value for key, value in document["upper_bounds"].items() if not _is_summary(value)}
    seeds = ""
    if "seeds" in document:
        seeds = (
            f"<p>Figures are means over {escape(str(document['seeds']))} seeds of the decoder; intervals are over "
            "patients, of one typical seed, and the spread over seeds has its own column.</p>"
        )
    paragraphs = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"""<section aria-labelledby="made">
<h2 id="made">How the numbers were made</h2>
{paragraphs}
<h3>Empty masks</h3>
<p>{escape(EMPTY_POLICY)}</p>
<h3>Means and intervals</h3>
<p>{escape(AGGREGATION_POLICY)}</p>
{seeds}
<h3>Counts for CLDF</h3>
{_description_list(counts)}
<h3>Data and settings</h3>
{_description_list(document["data"])}
{f"<h3>Further upper bounds</h3>{_description_list(bounds)}" if bounds else ""}
</section>
"""


def _description_list(entries: Mapping[str, Any]) -> str:
    items = "".join(
        f"<dt>{escape(_name(str(key)))}</dt><dd>{_description(value)}</dd>" for key, value in entries.items()
    )
    return f"<dl>{items}</dl>"


def _description(value: Any) -> str:
    if isinstance(value, Mapping):
        return _description_list(value)
    if isinstance(value, list | tuple):
        return ", ".join(_description(item) for item in value)
    if value is None:
        return _MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return escape(f"{value:.4g}" if isinstance(value, float) else str(value))
