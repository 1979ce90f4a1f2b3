"""A whole study as one command: all networks, all baselines, several decoder seeds, and a results file.

The file holds what the README's table shows and where it comes from: no image, no weight, no patient.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.suite import ROOT
from cldf_fast import workflow
from cldf_fast.baselines import BASELINES
from cldf_fast.config import Config, load_config
from cldf_fast.doctor import collect
from cldf_fast.errors import ConfigError
from cldf_fast.files import atomic_write_text
from cldf_fast.run import Run
from cldf_fast.training.fit import NETWORKS

_FEW: dict[str, Any] = {
    "optimisation": {"steps": 4, "batch_size": 4, "warmup_steps": 1, "save_every": 4, "log_every": 1}
}
QUICK = {
    "data": {"size": 32},
    "cdm": _FEW | {"network": {"model_channels": 8}},
    "classifier": _FEW | {"network": {"model_channels": 16}},
    "decoder": _FEW | {"passes": 1},
}
"""Overrides of a study's configuration with which all of it is over soon."""

FIGURES = ("mean", "std", "ci95", "n", "seed_means", "seed_std")


def run(name: str, *, data: Path | None, out: Path, networks: Path | None, seeds: int, quick: bool) -> Path:
    """Train and evaluate a study into the run directory `out`; returns its results file, <out>/<name>.json.

    name: of a configuration in benchmarks/configs. data: folder of its data set. networks: a run directory whose CDM
    and classifier, and decoders where it has them, are taken instead of training; its configuration then holds.
    seeds: decoders. quick: a few steps and one seed, to see that everything runs; the figures mean nothing.
    """
    start = time.perf_counter()
    trained = _take(networks, out) if networks is not None else []
    config = _configuration(name, out if networks is not None else None, quick=quick)
    missing = [network for network in NETWORKS if network not in trained]
    if missing:
        workflow.train(config, missing, data=data, out=out, resume=False)
    training = time.perf_counter() - start
    document = workflow.evaluate(
        Run(out),
        data=data,
        split="test",
        baselines=workflow.QUICK_BASELINES if quick else tuple(BASELINES),
        upper_bound=not quick,
        decoder_seeds=1 if quick else seeds,
        json_file=out / "metrics.json",
        report=out / "report.html",
    )
    seconds = {"training": round(training, 1), "evaluation": document["data"]["seconds"]}
    study = {"study": name, "trained": missing, **provenance(), "seconds": seconds, **trimmed(document)}
    atomic_write_text(out / f"{name}.json", json.dumps(study, indent=1) + "\n")
    return out / f"{name}.json"


def _configuration(name: str, run: Path | None, *, quick: bool) -> Config:
    if run is not None:  # whose networks are as they are
        return load_config(run / "config.yaml", {"decoder": _FEW} if quick else {})
    return load_config(ROOT / "benchmarks" / "configs" / f"{name}.yaml", QUICK if quick else {})


def _take(networks: Path, out: Path) -> list[str]:
    """Copy what another run has trained to a new one; returns the names of the networks."""
    if not Run(networks).has("cdm"):
        raise ConfigError(f"--networks: expected a run directory with a trained CDM, got {networks}")
    if networks.resolve() == out.resolve() or Run(out).has("cdm"):
        raise ConfigError(f"--out: expected a folder without networks to put those of {networks} in, got {out}")
    for source in (networks, *sorted(networks.glob("decoder-seed-*"))):
        folder = out / source.relative_to(networks)
        folder.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            if file.suffix in (".safetensors", ".yaml", ".json") and file.name != "metrics.json":
                shutil.copyfile(file, folder / file.name)
    return [network for network in NETWORKS if Run(out).has(network)]


def trimmed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Of a document of `workflow.evaluate`, the means, spreads and seeds of every method, and what was scored."""
    sections = {
        section: {
            method: {metric: _figure(value) for metric, value in summary.items() if _is_figure(value)}
            for method, summary in document[section].items()
            if any(_is_figure(value) for value in summary.values())
        }
        for section in ("methods", "upper_bounds")
    }
    described = {key: value for key, value in document["data"].items() if key not in ("image_labels", "seconds")}
    return {**sections, "data": described}


def _is_figure(value: Any) -> bool:
    return isinstance(value, Mapping) and {"mean", "ci95"} <= set(value)


def _figure(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value[key] for key in FIGURES if key in value}


def provenance() -> dict[str, Any]:
    """Device, versions, commit and date, as in the files of benchmarks."""
    report = collect()
    commit = _git("rev-parse", "HEAD")
    changed = " and uncommitted changes" if commit and _git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "device": report["cuda"]["devices"][0] if report["cuda"]["devices"] else report["cpu"],
        "versions": report["versions"],
        "commit": f"{commit or 'unversioned'}{changed}",
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()
