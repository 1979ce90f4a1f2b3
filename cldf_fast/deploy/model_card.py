"""MODEL_CARD.md of an engine directory, from the run: what it is for, what it was trained on, what was measured."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cldf_fast import __version__
from cldf_fast.config import Config
from cldf_fast.data.acquisition import Acquisition
from cldf_fast.deploy.manifest import EngineKey
from cldf_fast.deploy.parity import Parity
from cldf_fast.deploy.predictor import RESEARCH_USE
from cldf_fast.run import DatasetRecord, Run

_MISSING = "not known: `cldf-fast evaluate` was not run before the export"


@dataclass(frozen=True)
class Told:
    """What the card is about: the run, its configuration as exported, and the engines by path.

    acquisition: of the training images. scored: whether there is a score of how unlike the training images a study is.
    """

    run: Run
    record: DatasetRecord
    config: Config
    weights_sha256: str
    engines: Mapping[str, EngineKey]
    acquisition: Acquisition
    scored: bool


def model_card(told: Told, measured: Sequence[Parity]) -> str:
    """Markdown. No path, name of a file or patient is in it."""
    run, record, config = told.run, told.record, told.config
    parts = _patients(run)
    size = config.data.size
    lines = [
        f"# Model card: {', '.join(record.class_names)}",
        "",
        f"**{RESEARCH_USE}**",
        "",
        "## What it does",
        "",
        f"Segments {', '.join(record.class_names)} in slices of {record.num_channels} channels "
        f"({', '.join(record.channel_names)}), seen at {size} x {size} pixels. Learnt from image-level labels alone by "
        f"CLDF (arXiv 2506.23460) with cldf_fast {__version__}; whether a class is present in a slice is predicted by "
        f"the classifier that is part of the model, or given.",
        "",
        "Not for: other modalities, channels or body regions than those trained on; measuring; any use without a "
        "reader who checks every mask. A slice whose label is missed gets an empty mask.",
        "",
        "A study that is unlike the training images is warned of, or refused, by a score of its intensities and of the "
        "diffusion model's features (`ood.json`). It does not see every difference."
        if told.scored
        else "Nothing tells a study that is unlike the training images: this was exported without them at hand.",
        "",
        "## Training data",
        "",
        f"Data set `{config.data.dataset}`: {parts['train']} patients to train, {parts['val']} to choose settings, "
        f"{parts['test']} to test, apart from each other. Its licence and terms bind users of the weights.",
        "",
        *_acquisition(told),
        "",
        "## Results on the test patients",
        "",
        *_results(run),
        "",
        "## Agreement with PyTorch in float32",
        "",
        "| runtime | precision | probability, largest difference | masks, mean and least Dice | label flips |",
        "|---|---|---|---|---|",
        *(
            f"| {each.backend} | {each.precision} | {each.probability_max:.2g} | {each.dice_mean:.4f}, "
            f"{each.dice_min:.4f} | {each.label_flips} |"
            for each in measured
        ),
        "",
        "Run `cldf-fast verify` where it is deployed: engines are compared there.",
        "",
        "## What it is made of",
        "",
        f"Weights: SHA-256 {told.weights_sha256}. Seed {config.seed}.",
        "",
        *(
            f"- `{name}`: {key.flavour} {key.version}, {key.precision}, compute capability {key.compute_capability}"
            for name, key in told.engines.items()
        ),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _acquisition(told: Told) -> list[str]:
    """A line a property that is checked, or why it is not."""
    size, modality, pixel_mm = told.config.data.size, told.acquisition.modality, told.acquisition.pixel_mm
    unknown = "not known: the data set does not tell, or the run is older than such records. Nothing checks it."
    return [
        f"- Modality: {unknown}"
        if modality is None
        else f"- Modality: {modality}. DICOM of another is warned of, or refused; other formats do not tell.",
        f"- Pixel size: {unknown}"
        if pixel_mm is None
        else f"- Pixel size: {pixel_mm[0]:.3g} to {pixel_mm[1]:.3g} mm at {size} x {size} pixels. Pixels twice as "
        f"large or half as large are warned of; PNG and TIFF do not tell.",
    ]


def _patients(run: Run) -> Mapping[str, Any]:
    if not run.split_file.exists():
        return dict.fromkeys(("train", "val", "test"), "an unknown number of")
    with run.split_file.open(encoding="utf-8", newline="") as file:
        return Counter(row["split"] for row in csv.DictReader(file))


def _results(run: Run) -> list[str]:
    """A line a method of ours and class, from the run's metrics.json."""
    try:
        document = json.loads((run.path / "metrics.json").read_text(encoding="utf-8"))
        methods = {name: method for name, method in document["methods"].items() if name.startswith("cldf")}
        lines = [
            f"- {name}, {class_name}: {_figures(scores)}"
            for name, method in methods.items()
            for class_name, scores in method["per_class"].items()
        ]
        return [f"Part: {document['data'].get('split', 'not stated')}.", "", *lines]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [_MISSING]


def _figures(scores: Mapping[str, Any]) -> str:
    dice = scores["dice_positive"]
    low, high = dice["ci95"] or (float("nan"), float("nan"))
    return (
        f"Dice {dice['mean']:.3f} (95% of patients' resamples {low:.3f} to {high:.3f}) over "
        f"{scores['positive_slices']} slices that show it, {scores['missed_slices']} of them missed; found also in "
        f"{scores['false_positive_slices']} of {scores['negative_slices']} slices that do not"
    )
