"""The long-running jobs behind the commands: train, evaluate, demo. Each works on one RUN directory."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from cldf_fast.comparison import Comparison, compare
from cldf_fast.config import Config, save_config
from cldf_fast.data import open_split
from cldf_fast.data.acquisition import Acquisition
from cldf_fast.data.base import SliceDataset
from cldf_fast.data.packing import PackedSlices, pack
from cldf_fast.data.splits import write_split
from cldf_fast.errors import ConfigError
from cldf_fast.evaluation import seeds_summary, write_metrics
from cldf_fast.models.adopted import AdoptedUNet
from cldf_fast.models.checkpoints import Loaded
from cldf_fast.models.decoder import PixelDecoder
from cldf_fast.pipeline import CLDF, adopt_classifier, adopt_unet
from cldf_fast.report import write_report
from cldf_fast.run import DatasetRecord, Run
from cldf_fast.segmentation import Prototypes
from cldf_fast.training.fit import Trainer, fit_decoder

# Baselines that need one classifier pass or none: what the demo has time for.
QUICK_BASELINES = ("gradcam", "layercam", "gradient", "location_prior", "intensity")


def make_fabric(config: Config, devices: str = "auto") -> Fabric:
    """One process on the best device there is, or the processes that torchrun started."""
    fabric = Fabric(
        accelerator="auto", devices=devices if devices == "auto" else int(devices), precision=config.precision
    )
    fabric.launch()
    return fabric


def open_parts(config: Config, data: Path | None) -> dict[str, SliceDataset]:
    """The data set of a configuration, by part of the split."""
    return open_split(
        config.data.dataset,
        data,
        **({"size": config.data.size} if config.data.dataset == "phantom" else {}),
        **config.data.options,
    )


def train(
    config: Config,
    networks: Sequence[str],
    *,
    data: Path | None,
    out: Path,
    resume: bool,
    converted: Mapping[str, Loaded] | None = None,
    fabric: Fabric | None = None,
    quiet: bool = False,
) -> None:
    """Train networks into the run directory `out`, which is made, or continued where it exists.

    Without `resume` a network that is already trained or begun there is trained again from the start.
    converted: networks that take the place of a trained "cdm" or "classifier". Raises ConfigError where one does not
    fit the configuration and the data. Nothing is written before all images have been read.
    """
    fabric = fabric or make_fabric(config)
    parts = open_parts(config, data)
    record = DatasetRecord(parts["train"].class_names, parts["train"].channel_names)
    run = Run(out)
    if (out / "config.yaml").exists() and run.record() != record:
        raise ConfigError(f"{out}: holds a run on other classes or channels; choose another --out")
    notes = [_adoption(config, name, loaded, record) for name, loaded in (converted or {}).items()]
    if fabric.is_global_zero and not quiet:
        patients = len(parts["train"].subjects)
        print(f"{', '.join(networks)} on {patients} patients of {config.data.dataset} -> {out}", file=sys.stderr)
        for note in notes:
            print(note, file=sys.stderr)
    train_data, val_data = (pack(parts[name], config.data.size) for name in ("train", "val"))
    grids = list(zip(train_data.geometries, train_data.sizes, strict=True))
    record = replace(record, acquisition=Acquisition.of(parts["train"].modality, grids, config.data.size))
    if fabric.is_global_zero:
        run.create(config, record)
        for name, loaded in (converted or {}).items():
            run.adopt(name, loaded)
        write_split({name: part.subjects for name, part in parts.items()}, run.split_file)
    fabric.barrier()
    Trainer(config, run, fabric, train_data, val_data, record, resume, quiet).fit(networks)
    if fabric.is_global_zero:
        draw_loss_curves(run)


def evaluate(
    run: Run,
    *,
    data: Path | None,
    split: str,
    dataset: str | None = None,
    baselines: Sequence[str] = (),
    upper_bound: bool = False,
    decoder_seeds: int = 1,
    json_file: Path | None = None,
    report: Path | None = None,
    quiet: bool = False,
    packed: dict[str, PackedSlices] | None = None,
) -> dict[str, Any]:
    """Evaluate a run; returns the document that is written to `json_file`.

    split: a part, or "all". baselines: names. upper_bound: also train the decoder with the training part's true masks.
    decoder_seeds: with more than one, figures are means over decoders of further seeds, which are trained where the run
    doesn't hold them yet.
    """
    config = run.config()
    if dataset is not None and dataset != config.data.dataset:
        config = config.model_copy(update={"data": config.data.model_copy(update={"dataset": dataset})})
    started = time.perf_counter()
    fabric = make_fabric(config)
    if packed is None:
        needed = {split} | ({"train", "val"} if baselines or upper_bound or decoder_seeds > 1 else set())
        packed = {
            name: pack(part, config.data.size) for name, part in _parts(config, data, split).items() if name in needed
        }
    comparisons = []
    for further in range(decoder_seeds):
        seeded = config.model_copy(update={"seed": config.seed + further})
        trainer = Trainer(
            seeded,
            run if further == 0 else Run(run.path / f"decoder-seed-{further}"),
            fabric,
            packed.get("train", packed[split]),
            packed.get("val", packed[split]),
            run.record(),
            quiet=quiet,
        )
        loaded = run.load(decoder=False, store=True).to(fabric.device)
        if further and not run.has_decoder(further):
            run.save_decoder(*_train_decoder(loaded, trainer, masks=False), further)
        cldf = run.load(seed=further, store=True).to(fabric.device)
        supervised = None
        if upper_bound:
            bound = replace(trainer, run=Run(run.path / f"upper-bound-seed-{further}"))
            trained = _train_decoder(loaded, bound, masks=True)
            supervised = CLDF(config, loaded.unet, loaded.classifier, *trained, store=run.feature_folder)
            supervised = supervised.to(fabric.device)
        comparisons.append(
            compare(
                cldf,
                packed[split],
                train=packed.get("train"),
                val=packed.get("val"),
                # The baselines do not depend on the decoder: they are scored once, with the first.
                baselines=() if further else _applicable(baselines, cldf, quiet=quiet),
                supervised=supervised,
                description=_description(config, packed[split], split, cldf),
            )
        )
    document = _joined(comparisons)
    document["data"]["seconds"] = round(time.perf_counter() - started, 1)
    if json_file is not None:
        write_metrics(json_file, document)
    if report is not None:
        write_report(
            report,
            document,
            comparisons[0].cases,
            title=f"CLDF on {config.data.dataset}, {split} part",
            curves=loss_curves(run),
        )
    return document


def demo(out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """The whole method on the built-in phantom: bundled CDM and classifier, the decoder trained here, table, report."""
    run = Run(out)
    out.mkdir(parents=True, exist_ok=True)
    for source in resources.files("cldf_fast").joinpath("weights", "phantom").iterdir():
        if source.name.endswith((".safetensors", ".yaml", ".json")):
            with resources.as_file(source) as path:
                shutil.copyfile(path, out / source.name)
    config = run.config()
    save_config(config, out / "config.yaml")
    fabric = make_fabric(config)
    parts = open_parts(config, None)
    write_split({name: part.subjects for name, part in parts.items()}, run.split_file)
    packed = {name: pack(part, config.data.size) for name, part in parts.items()}
    trainer = Trainer(config, run, fabric, packed["train"], packed["val"], run.record(), quiet=quiet)
    trainer.fit(("decoder",))
    return evaluate(
        run,
        data=None,
        split="test",
        baselines=QUICK_BASELINES,
        json_file=out / "metrics.json",
        report=out / "report.html",
        quiet=quiet,
        packed=packed,
    )


def loss_curves(run: Run) -> dict[str, list[tuple[float, float]]]:
    """Points (step, loss) by network, from the run's metrics.jsonl."""
    path = run.path / "metrics.jsonl"
    curves: dict[str, list[tuple[float, float]]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            curves.setdefault(row["network"], []).append((float(row["step"]), float(row["loss"])))
    return curves


def draw_loss_curves(run: Run) -> None:
    """Write loss_<network>.png for every network that has a curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from cldf_fast.files import atomic_write

    for network, points in loss_curves(run).items():
        figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
        axes.plot(*zip(*points, strict=True), linewidth=1)
        axes.set(xlabel="step", ylabel="loss", title=network, yscale="log")
        with atomic_write(run.path / f"loss_{network}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=120)
        pyplot.close(figure)


def _adoption(config: Config, name: str, loaded: Loaded, record: DatasetRecord) -> str:
    """A line on what a converted network is taken for. Raises ConfigError where it does not fit."""
    adopt = {"cdm": adopt_unet, "classifier": adopt_classifier}[name]
    network, description = adopt(config, loaded, record.class_names, record.channel_names), loaded.description
    line = (
        f"{name}: {description.source}, {description.timesteps} {description.schedule} steps, pixels "
        f"{description.pixel_range[0]:g} to {description.pixel_range[1]:g}"
    )
    if isinstance(network, AdoptedUNet):
        row = network.null_row
        return f"{line}; no condition is " + (
            "what it knows" if row is None else f"row {row}, {description.labels[row]}"
        )
    return f"{line}; {'sigmoid' if description.multi_label else 'softmax'} over {loaded.network.num_classes} logits"


def _parts(config: Config, data: Path | None, split: str) -> dict[str, SliceDataset]:
    if split == "all":
        from cldf_fast.data import open_dataset

        return {"all": open_dataset(config.data.dataset, data, **config.data.options)}
    parts = open_parts(config, data)
    if split not in parts:
        raise ConfigError(f"split: expected one of {', '.join(parts)} or all, got {split!r}")
    return parts


def _train_decoder(cldf: CLDF, trainer: Trainer, *, masks: bool) -> tuple[PixelDecoder, Prototypes, Tensor]:
    trainer.run.path.mkdir(parents=True, exist_ok=True)
    labels = trainer.train.working_masks().to(torch.int8) if masks else trainer.pixel_labels(cldf, trainer.train)
    return fit_decoder(cldf, trainer, labels)


def _applicable(baselines: Sequence[str], cldf: CLDF, *, quiet: bool) -> list[str]:
    """The baselines that the run's networks can serve."""
    if "cg_cdm" in baselines and isinstance(cldf.unet, AdoptedUNet) and not cldf.unet.conditional:
        if not quiet:
            print("cg_cdm: left out, because the CDM has no class table", file=sys.stderr)
        return [name for name in baselines if name != "cg_cdm"]
    return list(baselines)


def _description(config: Config, data: PackedSlices, split: str, cldf: CLDF) -> dict[str, Any]:
    return {
        "dataset": config.data.dataset,
        "split": split,
        "slices": len(data),
        "patients": len(set(data.subjects)),
        "working_size": config.data.size,
        "classes": list(data.class_names),
        "seed": config.seed,
        "label_threshold": [round(float(value), 4) for value in cldf.label_threshold],
        "pixel_label_thresholds": list(cldf.thresholds()),
    }


def _joined(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    documents = [comparison.document for comparison in comparisons]
    if len(documents) == 1:
        return documents[0]
    first = documents[0]
    kept = set(documents[-1]["methods"])
    joined = seeds_summary(
        [
            {
                **document,
                "methods": {name: row for name, row in document["methods"].items() if name in kept},
                "data": {},
            }
            for document in documents
        ]
    )
    joined["methods"].update({name: row for name, row in first["methods"].items() if name not in kept})
    joined["data"] = {**first["data"], **joined["data"]}
    return joined
