"""The report is one valid, self-contained, escaped HTML file whose pictures show what they claim."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from rich.console import Console

from cldf_fast.errors import DataError
from cldf_fast.evaluation import (
    AGGREGATION_POLICY,
    EMPTY_POLICY,
    SegmentationScores,
    metrics_document,
    pixel_label_scores,
    seeds_summary,
)
from cldf_fast.report import DISCLAIMER, CasePanels, loss_curve_svg, terminal_table, write_panels_png, write_report

VOID = {"meta", "img", "br", "hr", "link", "input"}
PANELS = ["Image", "Gradient map", "CAM", "Pixel labels", "Mask", "Truth"]
HOSTILE = '"><script>alert(1)</script>&[red]'


class Page(HTMLParser):
    """Parses strictly: every tag closed in order, ids unique."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(source)
        self.close()
        assert not self.open, f"left open: {self.open}"
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"an attribute twice: {tag} {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.pieces.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())

    @property
    def pictures(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def pixels(picture: dict[str, str | None]) -> npt.NDArray[np.uint8]:
    source = picture["src"] or ""
    assert source.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


def case(shape: tuple[int, int] = (16, 12), *, title: str = "Median: patient a", classes: int = 1) -> CasePanels:
    rng = np.random.default_rng(3)
    mask = rng.integers(0, classes + 1, shape).astype(np.uint8)
    return CasePanels(
        title=title,
        dice=0.5,
        image=rng.normal(size=shape).astype(np.float32),
        gradient_map=rng.random(shape),
        cam=rng.random(shape).astype(np.float32),
        pixel_labels=rng.integers(-1, classes + 1, shape).astype(np.int8),
        mask=mask,
        truth=np.roll(mask, 2),
    )


def summary(quality: float, classes: Sequence[str] = ("tumour",), *, positives: bool = True) -> dict[str, Any]:
    """Scores of a method that finds this share of every structure, and marks one negative slice of each patient."""
    scores = SegmentationScores(classes)
    for patient in ("a", "b"):
        for index in range(4):
            truth, prediction = np.zeros((10, 10), np.uint8), np.zeros((10, 10), np.uint8)
            for value in range(1, len(classes) + 1):
                if positives and index < 2:
                    truth[2 * value] = value
                    prediction[2 * value, : round(10 * quality) - index] = value
            prediction[0, :3] = index == 3
            scores.add(
                subject=patient, study=patient, index=index, prediction=prediction, truth=truth, spacing=(3.0, 1.0, 1.0)
            )
    return scores.summary(bootstrap=20)


def document(classes: Sequence[str] = ("tumour",), **methods: float) -> dict[str, Any]:
    qualities = {"layercam": 0.5, "cg_diff": 0.7, "cldf_given_labels": 1.0, "cldf": 0.9, **methods}
    labels = pixel_label_scores(np.zeros((1, 2, 2), np.int8), np.zeros((1, 2, 2), np.uint8))
    return metrics_document(
        {key: summary(quality, classes) for key, quality in qualities.items()},
        {"true_masks": summary(0.95, classes), "pixel_labels": labels},
        {"dataset": "phantom", "split": "test", "thresholds": {"cldf": 0.5, "layercam": 0.31}},
    )


def render(path: Path, *arguments: Any, **options: Any) -> Page:
    write_report(path, *arguments, **{"title": "CLDF on phantoms", **options})
    return Page(path.read_text(encoding="utf-8"))


def test_report_is_one_valid_file_with_everything_in_it(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    page = render(file, document(), [case(), case((7, 9), title="Worst")], notes=["Thresholds from train."])
    source = file.read_text(encoding="utf-8")
    assert source.startswith("<!DOCTYPE html>")
    assert list(tmp_path.iterdir()) == [file]
    # Nothing is loaded from elsewhere, and no script runs.
    assert not re.search(r"https?://|//cdn|@import|url\(", source)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert page.text.count(DISCLAIMER) == 2
    for sentence in (EMPTY_POLICY, AGGREGATION_POLICY, "Thresholds from train.", "CLDF on phantoms", "phantom, test"):
        assert sentence in page.text
    assert ("html", {"lang": "en-GB"}) in page.tags
    assert [(picture["alt"] or "").partition(" of ")[0] for picture in page.pictures] == PANELS * 2
    assert all(picture["alt"] and picture["width"] and picture["height"] for picture in page.pictures)


def test_the_same_input_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("one.html", "two.html"):
        render(tmp_path / name, document(), [case()], curves={"Decoder": [(0, 2.0), (1, 1.0)]})
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_summary_paragraph_says_how_cldf_stands(tmp_path: Path) -> None:
    made = document()
    score = made["methods"]["cldf"]["dice_positive"]["mean"]
    rival = made["methods"]["cg_diff"]["dice_positive"]["mean"]
    text = render(tmp_path / "r.html", made, []).text
    assert f"mean Dice of {score:.3f}" in text
    assert f"The best baseline, CG-Diff, reached {rival:.3f}: {score - rival:.3f} below CLDF." in text
    assert "Upper bounds that saw true masks: True masks" in text
    assert "It left 0 of 4 positive slices unmarked. It marked something on 2 of 4 negative slices." in text
    beaten = render(tmp_path / "r.html", document(cldf=0.4), []).text
    assert "above CLDF." in beaten


def test_table_puts_cldf_first_and_upper_bounds_last(tmp_path: Path) -> None:
    page = render(tmp_path / "r.html", document(), [])
    assert [row[0] for row in page.rows] == [
        "Method",
        "CLDF",
        "CLDF, given labels",
        "CG-Diff",
        "LayerCAM",
        "True masks",
    ]
    assert len({len(row) for row in page.rows}) == 1
    head, cldf = page.rows[0], page.rows[1]
    cells = dict(zip(head, cldf, strict=True))
    figure = document()["methods"]["cldf"]["dice_positive"]
    assert cells["Dice"] == f"{figure['mean']:.3f} ± {figure['std']:.3f}"
    assert cells["95% CI"] == "{:.3f}–{:.3f}".format(*figure["ci95"])
    assert (cells["Missed"], cells["False pos."]) == ("0/4", "2/4")
    assert "HD95, mm" in head


def test_best_figures_are_bold_upper_bounds_aside(tmp_path: Path) -> None:
    file = tmp_path / "r.html"
    made = document(cldf_given_labels=0.9, cldf=0.8)
    assert made["upper_bounds"]["true_masks"]["dice_positive"]["mean"] > 0.95
    render(file, made, [])
    bold = re.findall(r"<td><b>([^<]+)</b></td>", file.read_text(encoding="utf-8"))
    best = made["methods"]["cldf_given_labels"]
    expected = [
        (best[key]["mean"], best[key]["std"], digits)
        for key, digits in (
            ("dice_positive", 3),
            ("iou_positive", 3),
            ("hd95_positive", 1),
            ("assd_positive", 1),
            ("dice_patient", 3),
        )
    ]
    assert bold == [f"{mean:.{digits}f} ± {std:.{digits}f}" for mean, std, digits in expected]


def test_distance_unit_follows_the_data(tmp_path: Path) -> None:
    made = document()
    made["data"]["distance_unit"] = "pixels"
    assert {"HD95, pixels", "ASSD, pixels"} <= set(render(tmp_path / "r.html", made, []).rows[0])


def test_several_classes_and_seeds_have_their_own_figures(tmp_path: Path) -> None:
    classes = ("liver", "spleen")
    made = seeds_summary([document(classes), document(classes, cldf=0.8)])
    page = render(tmp_path / "r.html", made, [case(classes=2)])
    assert "4 negative slices" not in page.text and "summed over 2 classes · 2 seeds of the decoder" in page.text
    table = [row for row in page.rows if len(row) == 3]
    assert table[0] == ["Method", "liver", "spleen"] and table[1][0] == "CLDF" and len(table) == 6
    figure = made["methods"]["cldf"]["dice_positive"]
    assert figure["seed_std"] > 0
    cells = dict(zip(page.rows[0], page.rows[1], strict=True))
    assert cells["SD of seeds"] == f"{figure['seed_std']:.3f}"
    assert "liver spleen background, among pixel labels outline of the truth" in page.text


def test_user_strings_are_escaped_everywhere(tmp_path: Path) -> None:
    classes = (HOSTILE, "other")
    made = document(classes, **{HOSTILE: 0.3})
    made["data"] |= {"dataset": HOSTILE, HOSTILE: {HOSTILE: [HOSTILE]}, "distance_unit": HOSTILE}
    made["upper_bounds"][HOSTILE] = {HOSTILE: HOSTILE}
    page = render(
        tmp_path / "r.html",
        made,
        [case(title=HOSTILE, classes=2)],
        title=HOSTILE,
        notes=[HOSTILE],
        curves={HOSTILE: [(0, 1.0), (5, 0.5)]},
    )
    assert "script" not in {tag for tag, _ in page.tags}
    assert all(HOSTILE in (picture["alt"] or "") for picture in page.pictures)
    assert page.text.count(HOSTILE) > 10


def test_report_without_cases_baselines_or_positives(tmp_path: Path) -> None:
    empty = metrics_document({"cldf": summary(0.5, positives=False)}, {}, {})
    page = render(tmp_path / "r.html", empty, [])
    assert "No slice of this set shows the structure" in page.text
    assert not page.pictures and "Cases" not in page.text and "Training" not in page.text
    assert page.rows[1][:3] == ["CLDF", "–", "–"]


# Pictures


def pictures_of(one: CasePanels, tmp_path: Path) -> dict[str, npt.NDArray[np.uint8]]:
    page = render(tmp_path / "r.html", document(), [one])
    return {(picture["alt"] or "").partition(" of ")[0]: pixels(picture) for picture in page.pictures}


def test_panels_show_labels_where_they_are(tmp_path: Path) -> None:
    shape = (8, 8)
    labels, truth = np.full(shape, -1, np.int8), np.zeros(shape, np.uint8)
    labels[:4, :4], labels[4:, 4:], truth[2:6, 2:6] = 0, 1, 1
    peak = np.zeros(shape)
    peak[1, 6] = 7.0
    flat = np.full(shape, 0.5)
    one = dataclasses.replace(
        case(shape), image=flat, gradient_map=peak, cam=flat * 0, pixel_labels=labels, mask=truth * 0, truth=truth
    )
    shown = pictures_of(one, tmp_path)
    scale = 256 // 8

    def at(panel: str, row: int, column: int) -> npt.NDArray[np.int64]:
        return shown[panel][int((row + 0.5) * scale), int((column + 0.5) * scale)].astype(np.int64)

    ignored, background, lesion = at("Pixel labels", 1, 6), at("Pixel labels", 1, 1), at("Pixel labels", 6, 6)
    assert np.ptp(ignored) == 0, "ignored pixels stay grey"
    assert background.argmax() == 2 and lesion.argmax() == 0, "background is tinted blue, the lesion orange"
    assert np.array_equal(at("Truth", 4, 4), lesion)
    assert np.ptp(at("Truth", 0, 0)) == 0
    # An empty mask is the image with the truth's outline: its inner edge, and nothing inside.
    assert np.array_equal(shown["Mask"][2 * scale, 2 * scale], [255, 255, 255])
    assert np.ptp(at("Mask", 4, 4)) == 0 and at("Mask", 4, 4).max() < 255
    row, column = np.unravel_index(shown["Gradient map"].astype(int).sum(axis=2).argmax(), (256, 256))
    assert (row // scale, column // scale) == (1, 6)
    assert shown["CAM"].max() == 0, "a map of zeros stays black"


def test_maps_grow_brighter_with_their_values(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 1, 256), (256, 1))
    shown = pictures_of(dataclasses.replace(case((256, 256)), cam=ramp), tmp_path)["CAM"][128].astype(float)
    brightness = shown @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(brightness) > -1).all() and brightness[-1] - brightness[0] > 200


@pytest.mark.parametrize(
    ("shape", "size"),
    [((1, 1), (256, 256)), ((64, 48), (256, 192)), ((200, 384), (200, 384)), ((1024, 512), (384, 192))],
)
def test_panels_of_any_size(shape: tuple[int, int], size: tuple[int, int], tmp_path: Path) -> None:
    shown = pictures_of(case(shape), tmp_path)
    assert {picture.shape[:2] for picture in shown.values()} == {size}


def test_panels_that_a_method_did_not_make_are_left_out(tmp_path: Path) -> None:
    bare = dataclasses.replace(case(), gradient_map=None, cam=None, pixel_labels=None, dice=None)
    page = render(tmp_path / "r.html", document(), [bare])
    assert [(picture["alt"] or "").partition(" of ")[0] for picture in page.pictures] == ["Image", "Mask", "Truth"]
    assert "structure absent" in page.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((2, 3, 3))}, r"image of case 'x': expected \[H, W\], got \[2, 3, 3\]"),
        ({"image": np.zeros((0, 3))}, "image of case 'x'"),
        ({"cam": np.zeros((3, 3))}, r"cam of case 'x': expected the image's shape \[16, 12\], got \[3, 3\]"),
        ({"gradient_map": np.full((16, 12), np.nan)}, "gradient_map of case 'x': expected finite"),
    ],
)
def test_cases_refuse_what_cannot_be_drawn(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        dataclasses.replace(case(title="x"), **change)


def test_contact_sheet(tmp_path: Path) -> None:
    file = tmp_path / "pictures" / "panels.png"
    bare = dataclasses.replace(case((5, 40)), cam=None, pixel_labels=None)
    write_panels_png(file, [case(), bare])
    with Image.open(file) as sheet:
        sheet.load()
        assert sheet.format == "PNG" and sheet.mode == "RGB"
        # Widest row: six panels of 192 px.
        assert sheet.width > 6 * 192 and sheet.height > 256 + 30
    with pytest.raises(DataError, match="cases: expected at least one"):
        write_panels_png(tmp_path / "none.png", [])
    assert not (tmp_path / "none.png").exists()


# Curves and terminal


def test_loss_curve_is_well_formed_and_spans_its_axes() -> None:
    chart = ElementTree.fromstring(loss_curve_svg([(i, 3.0 * 0.99**i) for i in range(5000)], "a < b & c"))
    assert (chart.get("aria-label") or "").startswith("a < b & c: from 3 to")
    line = chart.find("polyline")
    assert line is not None
    points = np.array([[float(v) for v in pair.split(",")] for pair in (line.get("points") or "").split()])
    assert 50 < len(points) < 1000
    assert (np.diff(points[:, 0]) > 0).all() and (np.diff(points[:, 1]) >= 0).all()
    assert points[0].tolist() == [44.0, 26.0] and points[-1].tolist() == [290.0, 130.0]
    ElementTree.fromstring(loss_curve_svg([(3, 0.0)], "one point"))


@pytest.mark.parametrize("points", [[], [(0.0, float("nan"))], [(0.0, 1.0), (float("inf"), 1.0)]])
def test_loss_curve_refuses(points: list[tuple[float, float]]) -> None:
    with pytest.raises(DataError, match="curve 'loss': expected one or more finite"):
        loss_curve_svg(points, "loss")


def print_table(made: dict[str, Any], width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(terminal_table(made))
    return console.export_text()


@pytest.mark.parametrize("seeds", [1, 3])
def test_terminal_table_cuts_no_figure_at_80_characters(seeds: int) -> None:
    made = document() if seeds == 1 else seeds_summary([document()] * seeds)
    text = print_table(made, 80)
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    for key in ("cldf", "cg_diff"):
        figure = made["methods"][key]["dice_positive"]
        assert "{:.3f}–{:.3f}".format(*figure["ci95"]) in text and f"{figure['mean']:.3f}" in text
    positions = [text.index(name) for name in ("CLDF", "CG-Diff", "LayerCAM", "True masks")]
    assert positions == sorted(positions)
    assert DISCLAIMER in text


def test_terminal_table_prints_names_as_they_are() -> None:
    assert "[red]x[/red]" in print_table(document(**{"[red]x[/red]": 0.2}), 120)
