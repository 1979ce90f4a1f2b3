"""The benchmark suite: what it measures, keeps, compares and writes, and that README and docs show kept results."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks import conftest, documents, plots, results, studies, suite
from benchmarks.__main__ import STEMS, main
from benchmarks.gpu import Gpu
from benchmarks.targets import TARGETS
from cldf_fast import cli

FILES = [file for file in sorted(results.RESULTS.glob("*.json")) if file.stem not in documents.STUDIES]


def document(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Results of two problems and two rivals with random times."""
    draw = random.Random(seed)
    rows = [
        {
            "rival": rival,
            "problem": {"part": part, "size": 64},
            "median_ms": draw.uniform(1, 500),
            "min_ms": 0.5,
            "iqr_ms": 0.01,
            "others_share": 0.02,
        }
        for part in ("inner", "outer")
        for rival in ("ours", "theirs")
    ]
    device = {"model": "a processor", "threads": 2}
    versions = {"torch": "2.10", "python": "3.11", "numpy": "2.0"}
    shown = {"benchmark": "things", "ours": "ours", "variants": [], "device": device, "versions": versions}
    return {**shown, "commit": "c" * 40, "gaps": {}, "failed": {}, "rows": rows} | changes


# --- What is written from results -------------------------------------------------------------------------------------


def test_readme_and_docs_are_what_results_say() -> None:
    assert documents.stale() == [], "run `python -m benchmarks docs`"


def test_every_figure_on_speed_in_the_readme_is_generated() -> None:
    text = documents.README.read_text(encoding="utf-8")
    assert documents.untraced_figures(text) == []
    assert documents.untraced_figures("## How fast\nIt is 3.5 times as fast.\n## Next\n") == ["3.5"]


def test_a_changed_result_changes_readme_and_page() -> None:
    kept = results.read(results.RESULTS)
    readme = documents.README.read_text(encoding="utf-8")
    row = next(row for row in kept["infonce-cpu"]["rows"] if row.get("headline") and row["rival"] == "cpu")
    row["median_ms"] = 76543.0
    assert "76543" in documents.readme(readme, kept, {})
    assert "76543 ±" in documents.page(kept)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kept_results_tell_where_they_come_from_and_hold_every_rival(file: Path) -> None:
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert len(kept["commit"].split()[0]) == 40
    assert kept["device"]["model"]
    assert kept["versions"]["torch"]
    for problem, runs in results.by_problem(kept):
        assert kept["ours"] in runs, problem
        assert len(runs) > 1, problem
    table = documents.times(kept)
    assert all(documents.number(row["median_ms"]) in table for row in kept["rows"] if row["rival"] == kept["ours"])


def test_where_rivals_win_names_them_and_no_other() -> None:
    mixed = document()
    for row, time in zip(mixed["rows"], (2.0, 1.0, 3.0, 30.0), strict=True):
        row |= {"median_ms": time, "extra_bytes": 2**20 * (7 if row["rival"] == "ours" else 14)}
    page = documents.page({"things-cpu": mixed}).partition("## Where rivals win")[2].partition("\n## ")[0]
    assert "| things | inner 64 | theirs | time | 0.50x |" in page
    assert page.count("theirs") == 1
    mixed["variants"] = ["theirs"]
    assert "Nowhere" in documents.page({"things-cpu": mixed}).partition("## Where rivals win")[2]


def test_a_disturbed_row_carries_an_asterisk_and_a_remark() -> None:
    busy = document()
    busy["rows"][0]["others_share"] = 0.4
    assert re.search(r"± 0.01\*", documents.times(busy))
    assert documents.times(document()).count("*") == 0
    assert any("1 of 4 rows" in remark for remark in documents.remarks({"things": busy}))
    assert "BUSY" in documents.terminal({"things": busy})


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.what)
def test_a_target_is_of_a_problem_that_is_measured(target: Any) -> None:
    stem, _, place = target.results.rpartition("-")
    assert stem in STEMS
    if place == "cpu":
        assert target.problem in suite.load(stem).problems
    kept = results.read(results.RESULTS)
    reached = target.reached(kept)
    if reached is not None:
        assert reached > 0
        assert target.asked.startswith((">=", "<=", "a figure"))


def test_targets_compare_rows_of_their_problem() -> None:
    target = next(
        target for target in TARGETS if target.what.startswith("sample_anchors, uniform: time of contrastive")
    )
    rows = [
        {"rival": rival, "problem": dict(target.problem), "median_ms": time, "iqr_ms": 0}
        for rival, time in (("cpu", 2.0), ("contrastive_seg", 39.0))
    ]
    found = target.reached({"anchors-cpu": {"ours": "cpu", "rows": rows}})
    assert found == 19.5
    assert not target.met(found)
    rows[0]["median_ms"] = 1.5
    assert target.met(target.reached({"anchors-cpu": {"ours": "cpu", "rows": rows}}) or 0)
    assert target.reached({}) is None
    assert target.reached({"anchors-cpu": {"ours": "cpu", "rows": rows[:1]}}) is None


def test_results_of_another_machine_are_put_aside_and_shown(tmp_path: Path) -> None:
    target = next(target for target in TARGETS if target.results == "anchors-cpu")
    kept, problem = tmp_path / "anchors-cpu.json", dict(target.problem)
    rows = [{"rival": "cpu", "problem": problem, "median_ms": 2.0, "iqr_ms": 0.1}]
    rows.append(rows[0] | {"rival": "contrastive_seg", "median_ms": 64.2})
    old = document(rows=rows, ours="cpu", benchmark="anchors")
    results.put_aside(kept, old)
    assert not any(tmp_path.iterdir())
    kept.write_text(json.dumps(old), encoding="utf-8")
    results.put_aside(kept, old)
    assert kept.exists()
    new = json.loads(json.dumps(old))
    new["device"]["model"], new["rows"][1]["median_ms"] = "Another", 22.2
    results.put_aside(kept, new)
    kept.write_text(json.dumps(new), encoding="utf-8")
    (elsewhere,) = results.read_elsewhere(tmp_path)
    assert elsewhere == {"anchors-cpu": old}
    page = documents.page({"anchors-cpu": new}, [elsewhere])
    lines = [line for line in page.splitlines() if f"| {target.what} |" in line]
    assert [("32.1x" in line, "11.1x" in line, "Another" in line) for line in lines] == [
        (False, True, True),
        (True, False, False),
    ]


# --- Growth and pictures ----------------------------------------------------------------------------------------------


def test_exponent_is_that_of_a_power_law() -> None:
    power = random.uniform(-1, 3)
    points = [(x, 7.5 * x**power) for x in (3, 50, 120, 4096)]
    assert results.exponent(points) == pytest.approx(power)
    x, y = np.random.rand(2, 9) + 0.1
    assert results.exponent(list(zip(x, y, strict=True))) == pytest.approx(np.polyfit(np.log(x), np.log(y), 1)[0])


def test_rows_along_an_axis_give_exponents_and_curves() -> None:
    rows = [
        {
            "rival": rival,
            "problem": {"part": "loss", "axis": "size", "value": size},
            "median_ms": 1e-5 * size**power,
            "iqr_ms": 0,
        }
        for rival, power in (("ours", 2), ("theirs", 1.5))
        for size in (512, 1024, 4096)
    ]
    page = documents.page({"scaling-cpu": document(rows=rows)})
    assert "| loss | size | ours | 512 to 4096 | 2.00 |" in page
    assert "| loss | size | theirs | 512 to 4096 | 1.50 |" in page
    assert "(plots/scaling-cpu-loss-size-time.svg)" in page


def test_a_chart_shows_every_point_within_its_frame() -> None:
    lines = {name: [(10 ** random.uniform(-4, 6), 10 ** random.uniform(-9, 3)) for _ in range(20)] for name in "ab"}
    dots = {"b": [(3.0, 1e-3)], "<c>": [(4e7, 2e5)]}
    svg = ET.fromstring(plots.chart("a & b", "x", "y", lines, dots))
    circles = [each for each in svg.iter("{http://www.w3.org/2000/svg}circle") if each.get("r") == "3"]
    assert len(circles) == 42
    for circle in circles:
        assert plots.LEFT <= float(circle.get("cx", 0)) <= plots.WIDTH - plots.RIGHT
        assert plots.TOP <= float(circle.get("cy", 0)) <= plots.HEIGHT - plots.BOTTOM
    assert {"a", "b", "<c>", "a & b"} <= {each.text for each in svg.iter("{http://www.w3.org/2000/svg}text")}
    single = ET.fromstring(plots.chart("one", "x", "y", {"a": [(512, 3.0)]}))
    assert len(list(single.iter("{http://www.w3.org/2000/svg}line"))) >= 2
    with pytest.raises(ValueError, match="expected points"):
        plots.chart("none", "x", "y", {})


# --- Comparing --------------------------------------------------------------------------------------------------------


def saved(folder: Path, name: str, content: dict[str, Any]) -> str:
    path = folder / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def changed(**figures: Any) -> dict[str, Any]:
    """The same results with a different last row."""
    other = document()
    row = other["rows"][-1]
    row |= {name: value(row[name]) if callable(value) else value for name, value in figures.items()}
    return other


@pytest.mark.parametrize(
    ("after", "code"),
    [
        (document(), 0),
        (changed(median_ms=lambda time: 1.5 * time), 1),
        (changed(median_ms=lambda time: time / 1.5), 0),
        (changed(median_ms=lambda time: 1.2 * time), 0),  # less than the factor
        (changed(median_ms=lambda time: 1.5 * time, iqr_ms=1e9), 0),  # within the spread
        (changed(median_ms=lambda time: 1.5 * time, others_share=0.5), 0),  # nobody can tell
        (document(versions={"torch": "2.11", "python": "3.11", "numpy": "2.0"}), 0),
        (document(device={"model": "another", "threads": 2}), 2),
        (document(benchmark="others"), 2),
    ],
)
def test_compare_exits_with_1_for_a_regression_alone(
    after: dict[str, Any], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = saved(tmp_path, "a.json", document()), saved(tmp_path, "b.json", after)
    assert main(["--compare", *paths]) == code
    shown = capsys.readouterr()
    assert ("SLOWER" in shown.out) == (code == 1)
    assert ("torch 2.10 before, 2.11 after" in shown.out) == (after["versions"]["torch"] == "2.11")
    assert shown.err.count("\n") == (code == 2)


def test_compare_takes_folders_and_a_factor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, content in (("a", document()), ("b", changed(median_ms=lambda time: 1.5 * time))):
        (tmp_path / folder).mkdir()
        saved(tmp_path / folder, "things-cpu.json", content)
    (tmp_path / "b" / "more-cpu.json").write_text(json.dumps(document()), encoding="utf-8")
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["--compare", *folders]) == 1
    assert main(["--compare", *folders, "--factor", "1.6"]) == 0
    assert "more-cpu: not compared" in capsys.readouterr().out


# --- Measuring --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Results of the smallest benchmark, and what was printed."""
    folder = tmp_path_factory.mktemp("quick")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "anchors", "--quick", "--out", str(folder)],
        cwd=suite.ROOT,
        # pytest-benchmark measures nothing in what it takes for one of several processes.
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "anchors-cpu.json").read_text(encoding="utf-8")), done.stdout + done.stderr


def test_quick_measures_all_rivals_and_tells_what_a_row_needs(quick: tuple[dict[str, Any], str]) -> None:
    measured, printed = quick
    benchmark = suite.load("anchors")
    ran = set(benchmark.rivals({})) - set(measured["gaps"])
    assert {row["rival"] for row in measured["rows"]} == ran
    assert measured["failed"] == {}
    assert measured["quick"] is True
    assert {"device", "versions", "commit", "date", "seed"} <= set(measured)
    assert measured["device"]["threads"] == measured["device"]["cores"]
    assert all(rate > 1e8 for rate in measured["ceilings"].values())
    for row in measured["rows"]:
        assert row["problem"] in benchmark.quick
        assert row["median_ms"] > 0
        assert 0 <= row["others_share"] <= 1
        assert row["bytes"] / measured["ceilings"]["bytes_per_second"] == pytest.approx(
            row["roofline_share"] * row["median_ms"] / 1000, rel=0.01
        )
    assert "OMP_NUM_THREADS=" in printed
    assert all(rival in printed for rival in ran)


@pytest.mark.parametrize(("part", "axis", "value"), [("anchors", "size", 64), ("infonce", "dim", 16)])
def test_scaling_measures_and_checks_the_cases_of_the_others(part: str, axis: str, value: int) -> None:
    benchmark = suite.load("scaling")
    for problem in ({"part": part, "axis": axis, "value": value}, {"part": part, "axis": "threads", "value": 1}):
        threads = torch.get_num_threads()
        assert problem in benchmark.problems
        for rival in benchmark.rivals(problem):
            if benchmark.gap(rival) is None:
                benchmark.check(rival, problem, benchmark.case(rival, **problem)())
        assert torch.get_num_threads() == threads


def test_a_row_whose_result_was_wrong_is_no_result() -> None:
    def measured(rival: str) -> dict[str, Any]:
        params = {"rival": rival, "problem": suite.load("anchors").quick[0]}
        stats = {"median": 0.001, "min": 0.001, "iqr": 0.0, "rounds": 3}
        name = f"benchmarks/bench_anchors.py::test_draw[{rival}, 2 128 2 64]"
        return {"params": params, "stats": stats, "extra_info": {}, "fullname": name}

    runs = [measured("cpu"), measured("multinomial")]
    failed = {runs[1]["fullname"]: "AssertionError: not the same", "benchmarks/bench_infonce.py::test[a]": "another"}
    found = conftest.results_document(suite.load("anchors"), "anchors", runs, failed, quick=True)
    assert [row["rival"] for row in found["rows"]] == ["cpu"]
    assert found["failed"] == {"multinomial, 2 128 2 64": "AssertionError: not the same"}


def test_a_rival_without_its_library_is_a_gap() -> None:
    benchmark = suite.Benchmark(
        ours="ours",
        rivals=lambda _problem: ("ours", "theirs", "slow"),
        case=lambda: None,
        check=lambda _rival, _problem, _result: None,
        problems=(),
        quick=(),
        small=lambda problem: problem,
        libraries={"theirs": "a_library_that_nobody_has"},
        slow=frozenset({"slow"}),
    )
    assert "a_library_that_nobody_has is absent" in (benchmark.gap("theirs") or "")
    assert benchmark.gap("slow") is None
    assert "--quick" in (benchmark.gap("slow", quick=True) or "")
    assert benchmark.gap("ours", quick=True) is None
    text = documents.remarks({"things": document(gaps={"theirs": "its library is absent"})})
    assert "things: no theirs: its library is absent" in text


def test_others_share_is_the_processors_time_that_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"wall": 100.0, "busy": 50.0, "own": 7.0}
    monkeypatch.setattr(suite.time, "perf_counter", lambda: clock["wall"])
    monkeypatch.setattr(suite, "_busy_seconds", lambda: clock["busy"])
    monkeypatch.setattr(suite, "_own_seconds", lambda: clock["own"])
    monkeypatch.setattr(suite.os, "cpu_count", lambda: 4)
    others = suite.OtherLoad()
    clock.update(wall=102.0, busy=56.0, own=9.0)
    assert others.share() == pytest.approx((6 - 2) / (2 * 4))
    clock.update(busy=51.0)
    assert others.share() == 0
    clock.update(wall=100.1)
    assert others.share() is None


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system doesn't tell what its processors do")
def test_a_busy_process_beside_us_is_noticed() -> None:
    others = suite.OtherLoad()
    beside = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        beside.wait(timeout=1)
    except subprocess.TimeoutExpired:
        share = others.share()
    finally:
        beside.kill()
        beside.wait()
    assert share is not None
    assert share > 0.5 / (suite.os.cpu_count() or 1)


def test_operations_of_products_and_convolutions_are_counted() -> None:
    m, n, k = (random.randrange(3, 30) for _ in range(3))
    a, b = torch.randn(m, k, requires_grad=True), torch.randn(k, n)
    run: Callable[[], Any] = lambda: torch.autograd.grad((a @ b).sum(), a)  # noqa: E731
    assert suite.counted_operations(run) == 4 * m * n * k
    image, weight = torch.randn(2, 3, 9, 9), torch.randn(5, 3, 3, 3)
    convolution: Callable[[], Any] = lambda: torch.nn.functional.conv2d(image, weight)  # noqa: E731
    assert suite.counted_operations(convolution) == 2 * 2 * 5 * 7 * 7 * 27


# --- Commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["infonse"], "benchmark: expected one of anchors"),
        (["--quick", "--keep"], "--keep: expected a full run"),
        (["--compare", "nowhere", "nowhere"], "nowhere: expected a results file"),
        (["study", "lgg", "--quick", "--keep"], "--keep: expected a full study"),
        (["study", "phantom", "--networks", "nowhere"], "--networks: expected a run directory"),
    ],
)
def test_what_can_not_work_is_said_in_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert shown.err.count("\n") == 1


def test_bench_is_this_suite_in_a_checkout_and_a_sentence_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = saved(tmp_path, "a.json", document()), saved(tmp_path, "b.json", changed(median_ms=lambda time: 9 * time))
    assert CliRunner().invoke(cli.app, ["bench", "--compare", *paths]).exit_code == 1
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "cldf_fast" / "cli.py"))
    refused = CliRunner().invoke(cli.app, ["bench", "--quick"])
    assert "expected a checkout of the repository" in str(refused.exception)


# --- Studies ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a study of few patients and steps."""
    from cldf_fast.data import phantom

    out = tmp_path_factory.mktemp("study") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom, "PHANTOM_SPLIT", {"train": 6, "val": 3, "test": 3})
        assert main(["study", "phantom", "--quick", "--out", str(out)]) == 0
    return out


def test_a_study_trains_evaluates_and_keeps_figures_alone(study: Path) -> None:
    text = (study / "phantom.json").read_text(encoding="utf-8")
    kept = json.loads(text)
    full = json.loads((study / "metrics.json").read_text(encoding="utf-8"))
    assert kept["trained"] == ["cdm", "classifier", "decoder"]
    assert kept["methods"]["cldf"]["dice_positive"]["mean"] == full["methods"]["cldf"]["dice_positive"]["mean"]
    assert {"cldf", "cldf_given_labels", "gradcam", "intensity"} <= set(kept["methods"])
    assert {"device", "versions", "commit", "date", "seconds", "data"} <= set(kept)
    assert len(text) < 20_000
    assert str(study) not in text
    assert (study / "report.html").exists()


def test_a_study_goes_on_from_given_networks(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, out, calls = tmp_path / "given", tmp_path / "run", []
    shutil.copytree(study, given)
    (given / "decoder.safetensors").unlink()
    evaluated = json.loads((study / "metrics.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(
        studies.workflow, "train", lambda config, networks, **_options: calls.append((config, networks))
    )
    monkeypatch.setattr(studies.workflow, "evaluate", lambda _run, **options: calls.append(options) or evaluated)
    written = studies.run("phantom", data=None, out=out, networks=given, seeds=5, quick=False)
    assert json.loads(written.read_text(encoding="utf-8"))["trained"] == ["decoder"]
    (config, networks), options = calls
    assert (config.data.size, networks) == (32, ["decoder"])  # the given networks' own configuration
    assert options["decoder_seeds"] == 5
    assert options["upper_bound"]
    assert "cg_diff" in options["baselines"]
    for network in ("cdm", "classifier"):
        assert (out / f"{network}.safetensors").read_bytes() == (study / f"{network}.safetensors").read_bytes()
    assert main(["study", "phantom", "--quick", "--networks", str(given), "--out", str(out)]) == 2


def test_the_table_of_dice_comes_from_studies(study: Path, tmp_path: Path) -> None:
    assert documents.read_studies(tmp_path) == {}
    kept = json.loads((study / "phantom.json").read_text(encoding="utf-8"))
    means = {}
    for number, name in enumerate(documents.STUDIES):
        figure = kept["methods"]["cldf"]["dice_positive"]
        means[name] = figure["mean"] = 0.1234 + 0.2 * number
        figure["seed_means"] = [figure["mean"]] * (3 if number else 1)
        saved(tmp_path, f"{name}.json", kept)
    found = documents.read_studies(tmp_path)
    first = next(iter(found))
    assert documents.STUDIES[first] in documents.dice_block({first: found[first]})
    assert len(documents.dice_block({first: found[first]}).splitlines()[0].split("|")) == 4
    block = documents.dice_block(found)
    row = next(line for line in block.splitlines() if line.startswith("| CLDF |"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["**0.123 (one seed)**", "**0.323**", "**0.523**"]
    readme = documents.README.read_text(encoding="utf-8")
    rewritten = documents.readme(readme, results.read(results.RESULTS), found)
    assert row in rewritten
    assert rewritten.partition("\nsets everything up")[0] == readme.partition("\nsets everything up")[0]


# --- On a GPU


def test_every_row_of_a_gpu_can_be_measured(tmp_path: Path) -> None:
    # Features train on the loss, which is interpreted: a minute.
    names = ["infonce", "anchors", "saliency"]
    command = [sys.executable, "-m", "benchmarks", "gpu", *names, "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=documents.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = results.read(tmp_path)
    assert set(found) == {f"{name}-gpu" for name in names}
    for document in found.values():
        assert not document["failed"]
        assert documents.times(document)
        for _, runs in results.by_problem(document):
            assert document["ours"] in runs


def test_a_row_that_fails_leaves_the_others() -> None:
    def is_one(result: int) -> None:
        assert result == 1, "not 1"

    gpu = Gpu(rehearse=True)
    for rival, prepare in (("fine", lambda: lambda: 1), ("wrong", lambda: lambda: 2), ("absent", lambda: {}["kernel"])):
        gpu.row(rival, {"size": 1}, prepare, check=is_one)
    document = gpu.document("some", "fine")
    assert [row["rival"] for row in document["rows"]] == ["fine"]
    assert set(document["failed"]) == {"wrong, 1", "absent, 1"}
    assert "not 1" in document["failed"]["wrong, 1"]
