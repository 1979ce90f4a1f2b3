"""The long-running jobs behind the commands: train, evaluate, demo. Each works on one RUN directory."""

from __future__ import annotations

import math
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from lightning_fabric import Fabric
from torch import Tensor

from cldf_fast.comparison import Comparison, compare
from cldf_fast.config import Config, save_config
from cldf_fast.data import open_dataset, open_split
from cldf_fast.data.acquisition import Acquisition
from cldf_fast.data.base import SliceDataset
from cldf_fast.data.packing import PackedSlices, pack
from cldf_fast.data.splits import Split, find_split, read_split, split_dataset, write_split
from cldf_fast.errors import CheckpointError, ConfigError, DataError, SplitError
from cldf_fast.evaluation import seeds_summary, write_metrics
from cldf_fast.models.adopted import AdoptedUNet
from cldf_fast.models.checkpoints import Loaded
from cldf_fast.models.decoder import PixelDecoder
from cldf_fast.pipeline import CLDF, adopt_classifier, adopt_unet, build_classifier, build_unet
from cldf_fast.report import write_report
from cldf_fast.run import DatasetRecord, Run
from cldf_fast.segmentation import Prototypes
from cldf_fast.training.engine import read_metrics
from cldf_fast.training.fit import NETWORKS, Trainer, fit_decoder

# Baselines that need one classifier pass or none: what the demo has time for.
QUICK_BASELINES = ("gradcam", "layercam", "gradient", "location_prior", "intensity")


def make_fabric(config: Config, devices: str = "auto") -> Fabric:
    """One process on the best device there is, or the processes that torchrun started."""
    # Left to itself on several GPUs, Fabric starts the command, or the user's own program, once for each of them.
    if devices == "auto" and not distributed.is_torchelastic_launched():
        devices = "1"
    fabric = Fabric(
        accelerator="auto", devices=devices if devices == "auto" else int(devices), precision=config.precision
    )
    fabric.launch()
    return fabric


def open_parts(
    config: Config, data: Path | None, run: Run | None = None, *, quiet: bool = True
) -> dict[str, SliceDataset]:
    """The data set of a configuration, by part of the split.

    run: whose split is binding where it knows any of the patients: the folder may have been added to, or be a part of
    what was trained on, and patients never change sides. Those that it doesn't know are left out, and parts without
    patients; quiet: without saying so. Raises SplitError where the folder has a split of its own that differs in a
    patient.
    """
    name, options = config.data.dataset, config.data.options
    if name == "phantom":  # whose patients follow from the configuration
        return open_split(name, data, **{"size": config.data.size} | options)
    if run is not None and run.split_file.exists():
        dataset, kept = open_dataset(name, data, **options), read_split(run.split_file)
        if split := _split_of(kept, dataset.subjects, run.split_file, data):
            given, found = (sum(map(len, each.values())) for each in (kept, split))
            for count, what in (
                (len(dataset.subjects) - found, f"patients of {data} are not in {run.split_file} and are left out"),
                (given - found, f"patients of {run.split_file} are not in {data}"),
            ):
                if count and not quiet:
                    print(f"split: {count} {what}", file=sys.stderr)
            return split_dataset(dataset, split, source=run.split_file)
    return open_split(name, data, **options)


def check_parts(parts: Mapping[str, SliceDataset], needed: Sequence[str], data: Path | None) -> None:
    """Raise SplitError where a part has no patients at hand."""
    for name in needed:
        if name not in parts:
            raise SplitError(
                f"{data or 'the data set'}: holds no patient of the part {name}, only of {', '.join(parts)}; give the "
                "folder that the run was trained on"
            )


def _split_of(kept: Split, patients: Sequence[str], source: Path, data: Path | None) -> Split:
    """A run's split of these patients, without those that it doesn't know; {} if it knows none: other data.

    source: where it was kept. Raises SplitError where the folder `data` has a split that differs in a patient.
    """
    known = set(patients)
    split = {name: tuple(patient for patient in part if patient in known) for name, part in kept.items()}
    part_of = {patient: name for name, part in split.items() for patient in part}
    own = None if data is None else find_split(data)
    if part_of and own is not None:
        for name, part in read_split(own).items():
            for patient in part:
                if part_of.get(patient, name) != name:
                    raise SplitError(
                        f"{own}: patient {patient!r} is in {name!r}, but in {part_of[patient]!r} of {source}, "
                        "with which networks of the run were trained; train all of them again, or undo this"
                    )
    return {name: part for name, part in split.items() if part}


def _joined_split(run: Run, parts: Mapping[str, SliceDataset]) -> dict[str, list[str]]:
    """The run's split with the patients that it didn't know."""
    kept = {name: list(part) for name, part in read_split(run.split_file).items()}
    known = {patient for part in kept.values() for patient in part}
    for name, part in parts.items():
        kept.setdefault(name, []).extend(patient for patient in part.subjects if patient not in known)
    return kept


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
    run, replaced = Run(out), {*networks, *(converted or {})}
    for needed in ("cdm", "classifier"):
        if "decoder" in networks and needed not in replaced and not run.has(needed):
            raise CheckpointError(f"{out}: the decoder needs a trained {needed}; run `train {needed}` first")
    kept = [name for name in NETWORKS if name not in replaced and (run.has(name) or run.has_begun(name))]
    continued = run.split_file.exists() and (resume or bool(kept))
    parts = open_parts(config, data, run if continued else None, quiet=quiet or not fabric.is_global_zero)
    check_parts(parts, ("train", "val"), data)
    record = DatasetRecord(parts["train"].class_names, parts["train"].channel_names, window=parts["train"].window)
    sided = [name for name in record.class_names if {"left", "right"} & set(re.split(r"[\W_]+", name.lower()))]
    if sided and config.data.mirror:
        raise ConfigError(
            f"data.mirror: expected false where classes are of one side ({', '.join(sided)}), which mirroring makes "
            "the other one; set data.mirror=false"
        )
    if (out / "config.yaml").exists() and run.record() != record:
        raise ConfigError(f"{out}: holds a run on other classes or channels; choose another --out")
    _check_networks(config, networks, record)
    for name in ("cdm", "classifier"):
        if name in kept and run.has(name):
            run.check_settings(name, config)
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
        split = {name: part.subjects for name, part in parts.items()}
        write_split(_joined_split(run, parts) if continued else split, run.split_file)
    fabric.barrier()
    Trainer(config, run, fabric, train_data, val_data, record, resume, quiet).fit(networks)
    if fabric.is_global_zero:
        draw_loss_curves(run)


def _check_networks(config: Config, networks: Sequence[str], record: DatasetRecord) -> None:
    """Raise ConfigError now for what a network would be refused for when its turn comes, hours later."""
    with torch.device("meta"):
        if "cdm" in networks:
            build_unet(config.cdm.network, record.num_channels, record.num_classes)
        if "classifier" in networks:
            build_classifier(config, record.num_channels, record.num_classes)
    noisiest = max(config.evidence.noise_levels)
    fractions = config.diffusion.level_unit == "fraction"
    if "classifier" in networks and fractions and noisiest > config.classifier.max_noise:
        raise ConfigError(
            f"evidence.noise_levels: expected at most classifier.max_noise, {config.classifier.max_noise}, which the "
            f"classifier is trained up to, got {noisiest}"
        )


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
    if fabric.world_size > 1:
        raise ConfigError(f"evaluate: works in one process, got {fabric.world_size}")
    if packed is None:
        packed = _packed(
            config, run, data, split, trains=bool(baselines) or upper_bound or decoder_seeds > 1, quiet=quiet
        )
    parts = packed

    def trainer(folder: str, further: int) -> Trainer:
        seeded = config.model_copy(update={"seed": config.seed + further})
        place = Run(run.path / f"{folder}-{further}")
        return Trainer(seeded, place, fabric, parts["train"], parts["val"], run.record(), quiet=quiet)

    comparisons = []
    for further in range(decoder_seeds):
        loaded = run.load(decoder=False, store=True).to(fabric.device)
        if further and not run.has_decoder(further):
            run.save_decoder(*_train_decoder(loaded, trainer("decoder-seed", further), masks=False), further)
        cldf = run.load(seed=further, store=True).to(fabric.device)
        supervised = None
        if upper_bound:
            trained = _train_decoder(loaded, trainer("upper-bound-seed", further), masks=True)
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
    for row in read_metrics(path) if path.exists() else ():
        if math.isfinite(row["loss"]):  # in 16 bits a step may overflow, which is then not taken
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


def _packed(
    config: Config, run: Run, data: Path | None, split: str, *, trains: bool, quiet: bool
) -> dict[str, PackedSlices]:
    """The part that is scored and, where something is trained or chosen for it, the run's own parts train and val."""
    wanted = {split} | ({"train", "val"} if trains else set())
    parts = open_parts(config, data, run, quiet=quiet) if wanted != {"all"} or config.data.dataset == "phantom" else {}
    if trains:
        check_parts(parts, ("train", "val"), data)
        if run.split_file.exists() and not set(parts["train"].subjects) <= set(read_split(run.split_file)["train"]):
            raise ConfigError(
                f"data: decoders of further seeds, baselines and the upper bound are trained on what the run was, and "
                f"{data} holds other patients; evaluate the run's decoder alone there"
            )
    if config.data.dataset == "phantom":
        whole = next(iter(parts.values()))
        parts["all"] = whole.subset([ref for part in parts.values() for ref in part.refs])
    elif split == "all":
        parts["all"] = open_dataset(config.data.dataset, data, **config.data.options)
    if split not in parts:
        named = ", ".join(name for name in parts if name != "all")
        raise ConfigError(f"split: expected one of {named} or all, got {split!r}")
    _check_record(parts[split], run.record(), data)
    return {name: pack(parts[name], config.data.size) for name in wanted}


def _check_record(found: SliceDataset, record: DatasetRecord, data: Path | None) -> None:
    for what, here, trained in (
        ("classes", found.class_names, record.class_names),
        ("channels", found.channel_names, record.channel_names),
    ):
        if tuple(here) != trained:
            raise DataError(
                f"{data or 'the data set'}: expected the {what} that the run was trained on, {', '.join(trained)}, got "
                f"{', '.join(here)}"
            )


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
