"""The commands. Heavy modules are imported by the command that needs them: `cldf-fast --help` must be instant."""

from __future__ import annotations

import math
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from cldf_fast.models.architecture import Kind

app = typer.Typer(
    name="cldf-fast",
    help="Segmentation masks of medical images from image-level labels. Research use only; not to be used for "
    "diagnostic purposes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        from cldf_fast import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass  # The options before a command; its help is that of `app`.


DataFolder = Annotated[Path | None, typer.Option("--data", help="Folder of the data set (the phantom has none).")]


class Networks(str, Enum):
    """What `train` can train."""

    cdm = "cdm"
    classifier = "classifier"
    decoder = "decoder"
    all = "all"


class NetworkKind(str, Enum):
    """What `convert` expects."""

    auto = "auto"
    unet = "unet"
    classifier = "classifier"


class ExportFormat(str, Enum):
    """What `export` writes."""

    onnx = "onnx"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"
    triton_server = "triton-server"
    monai_bundle = "monai-bundle"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run directory to write.")] = Path("runs/demo"),
) -> None:
    """The whole method on the built-in phantom: train the decoder, segment, report. Minutes on a CPU."""
    from rich.console import Console

    from cldf_fast import workflow
    from cldf_fast.report import terminal_table

    document = workflow.demo(out)
    console = Console()
    console.print(terminal_table(document))
    console.print(f"Figures: {out / 'metrics.json'}\nReport with pictures: {out / 'report.html'}", highlight=False)


@app.command()
def train(
    network: Annotated[Networks, typer.Argument(help="What to train.")],
    out: Annotated[
        Path,
        typer.Option(
            help="Run directory, made or continued; a network that it has already is trained again, unless --resume."
        ),
    ],
    dataset: Annotated[
        str | None,
        typer.Option(
            help="phantom, labelled, lgg, brats, chaos or nnunet; default: the configuration's, else phantom."
        ),
    ] = None,
    data: DataFolder = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML configuration; default: the run's own, else defaults.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A value of the configuration, e.g. cdm.optimisation.steps=500.")
    ] = None,
    cdm: Annotated[
        Path | None, typer.Option(help="Converted UNet (see `convert`) to use, in place of one that is trained here.")
    ] = None,
    classifier: Annotated[
        Path | None, typer.Option(help="Converted classifier to use, in place of one that is trained here.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress.")] = False,
) -> None:
    """Train the CDM, the classifier, the decoder, or all of them in this order."""
    from cldf_fast import workflow
    from cldf_fast.config import load_config, make_config
    from cldf_fast.errors import ConfigError
    from cldf_fast.models.adopted import network_settings
    from cldf_fast.models.checkpoints import load
    from cldf_fast.training.fit import NETWORKS

    overrides = parse_overrides(set_ or [])
    if dataset is not None:
        if not isinstance(overrides.setdefault("data", {}), dict):
            raise ConfigError(f"--set: expected data to be a section, got {overrides['data']!r}")
        overrides["data"]["dataset"] = dataset
    converted = {}
    for name, path, kind in (("cdm", cdm, "unet"), ("classifier", classifier, "classifier")):
        if path is None:
            continue
        if network.value == name:
            raise ConfigError(f"--{name}: expected with what is trained on it, got it with `train {name}`")
        converted[name] = load(path, kind=cast("Kind", kind))
        overrides.setdefault(name, {})["network"] = network_settings(converted[name].description.architecture)
    source = config or (out / "config.yaml" if (out / "config.yaml").exists() else None)
    resolved = load_config(source, overrides) if source else make_config(overrides, "command line")
    chosen = [name for name in NETWORKS if network in (Networks.all, name) and name not in converted]
    workflow.train(resolved, chosen, data=data, out=out, resume=resume, converted=converted, quiet=quiet)


@app.command()
def segment(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="NIfTI, PNG or TIFF file, folder of slices, or folder of one DICOM series; several files of one grid, "
            "separated by commas, are channels."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the masks.")],
    labels: Annotated[
        str | None, typer.Option(help="Image-level labels, if known: class names separated by commas, all or none.")
    ] = None,
    window: Annotated[
        str | None, typer.Option(help="LOW,HIGH in stored units (CT: Hounsfield); default: as in training.")
    ] = None,
    probability: Annotated[bool, typer.Option(help="Also write class probabilities.")] = False,
    replicate: Annotated[bool, typer.Option(help="Use a single channel for all channels of the network.")] = False,
) -> None:
    """Segment images; masks come in the input's own format and geometry. Exit code 3: some inputs were refused."""
    from cldf_fast.cases import OutputFolder, check_apart
    from cldf_fast.errors import CLDFError, ConfigError
    from cldf_fast.inference import parse_labels, read_case, segment_case
    from cldf_fast.run import Run

    opened = Run(run)
    cldf, record = opened.load(), opened.record()
    if cldf.decoder is None:
        raise ConfigError(f"{run}: has no decoder yet; run `cldf-fast train decoder --out {run}` first")
    given = None if labels is None else parse_labels(labels, record.class_names)
    for text in inputs:
        check_apart(text, out)
    limits = None if window is None else parse_range("--window", window)
    refused, masks = 0, OutputFolder(out)
    for text in inputs:
        try:
            volume = read_case(text, record.num_channels, replicate=replicate)
            case = segment_case(cldf, record, volume, masks, labels=given, window=limits, probability=probability)
        except CLDFError as error:
            refused += 1
            typer.echo(f"refused ({error.code}): {error}", err=True)
            continue
        for warning in case.warnings:
            typer.echo(f"warning ({warning.code}): {warning}", err=True)
        found = int(case.present.any(dim=1).sum())
        typer.echo(
            f"{case.source}: {len(case.present)} slices, {found} labelled, {case.foreground_pixels} foreground pixels "
            f"-> {', '.join(str(file) for file in case.files[:2])}{' ...' if len(case.files) > 2 else ''}"
        )
    if refused:
        raise typer.Exit(3)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    dataset: Annotated[str | None, typer.Option(help="Default: what the run was trained on.")] = None,
    data: DataFolder = None,
    split: Annotated[str, typer.Option(help="train, val, test or all.")] = "test",
    json_file: Annotated[Path | None, typer.Option("--json", help="Default: metrics.json in the run.")] = None,
    report: Annotated[Path | None, typer.Option(help="Default: report.html in the run.")] = None,
    baselines: Annotated[
        bool, typer.Option(help="Also every baseline, and the decoder trained with true masks as upper bound.")
    ] = False,
    decoder_seeds: Annotated[int, typer.Option(min=1, help="Decoders of this many seeds; figures are means.")] = 1,
    quiet: Annotated[bool, typer.Option(help="No progress.")] = False,
) -> None:
    """Score a run against masks: Dice, IoU, HD95, ASSD per slice and per patient, with a report."""
    from rich.console import Console

    from cldf_fast import workflow
    from cldf_fast.comparison import ALL_BASELINES
    from cldf_fast.report import terminal_table
    from cldf_fast.run import Run

    document = workflow.evaluate(
        Run(run),
        data=data,
        dataset=dataset,
        split=split,
        baselines=ALL_BASELINES if baselines else (),
        upper_bound=baselines,
        decoder_seeds=decoder_seeds,
        json_file=json_file or run / "metrics.json",
        report=report or run / "report.html",
        quiet=quiet,
    )
    Console().print(terminal_table(document))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run directory; for triton-server and monai-bundle an engine directory.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    format_: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            help="An engine directory of ONNX files alone, or with engines of TensorRT beside them; or what a server "
            "takes, of an engine directory.",
        ),
    ] = ExportFormat.onnx,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="float32, float16 or bfloat16; several times for several. [float32, float16]"),
    ] = None,
    capability: Annotated[
        list[str] | None,
        typer.Option(help="Compute capability to build for, e.g. 8.6; several times for several (tensorrt-rtx)."),
    ] = None,
    batch: Annotated[
        str, typer.Option(help="Batch sizes of engines, and of ONNX files in a server: smallest, best and largest.")
    ] = "1,8,16",
    timing_cache: Annotated[
        Path | None,
        typer.Option(help="File of kernels' times, read and written: later builds are faster (tensorrt)."),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="What executes the graphs in triton-server: onnx or tensorrt. [onnx]")
    ] = None,
    data: DataFolder = None,
    window: Annotated[
        str | None, typer.Option(help="LOW,HIGH in stored units (CT: Hounsfield); default: as in training.")
    ] = None,
    evidence: Annotated[
        bool, typer.Option("--evidence/--without-evidence", help="Refuse, or leave out, what gradients decide.")
    ] = True,
    sign: Annotated[Path | None, typer.Option(help="Ed25519 private key (PEM) to sign the manifest with.")] = None,
    public_key: Annotated[
        Path | None,
        typer.Option(
            help="Ed25519 public key (PEM) that an engine directory must be signed by (triton-server, monai-bundle)."
        ),
    ] = None,
) -> None:
    """Write a sealed engine directory that `verify` and `predict` take; it passed parity with PyTorch.

    triton-server and monai-bundle write a model repository of Triton Inference Server, and a MONAI bundle, around one.
    """
    from cldf_fast.errors import ConfigError

    if format_ in (ExportFormat.triton_server, ExportFormat.monai_bundle):
        made_before = {
            "--capability": capability,
            "--timing-cache": timing_cache,
            "--data": data,
            "--window": window,
            "--sign": sign,
            "--backend": backend if format_ is ExportFormat.monai_bundle else None,
        }
        _export_for_server(
            run,
            out,
            format_,
            precision,
            backend or "onnx",
            batch,
            public_key,
            [name for name, value in made_before.items() if value],
        )
        return
    if capability and format_ is not ExportFormat.tensorrt_rtx:
        raise ConfigError(
            f"--capability: engines for several GPUs are those of --format tensorrt-rtx, got --format {format_.value}"
        )
    if backend is not None:
        raise ConfigError(f"--backend: of a server's graphs (--format triton-server), got --format {format_.value}")
    if public_key is not None:
        raise ConfigError(
            f"--public-key: not for --format {format_.value}, which writes an engine directory; sign it with --sign"
        )
    from cldf_fast.deploy.export import Target, export
    from cldf_fast.deploy.tensorrt import Batches
    from cldf_fast.run import Run

    flavour = None if format_ is ExportFormat.onnx else format_.value.replace("-", "_")
    measured = export(
        Run(run),
        out,
        precisions=precision or ("float32", "float16"),
        target=Target(flavour, tuple(capability or ()), Batches(*parse_batches(batch)), timing_cache),
        data=data,
        window=None if window is None else parse_range("--window", window),
        evidence=evidence,
        signing_key=sign,
    )
    for each in measured:
        typer.echo(_parity_line(each))
    typer.echo(f"{out}: check it where it is deployed, with `cldf-fast verify {out}`")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Engine directory.")],
    public_key: Annotated[Path | None, typer.Option(help="Ed25519 public key (PEM) that it must be signed by.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="onnx, tensorrt or tensorrt_rtx, which then has to run; may be repeated.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Check an engine directory: every byte, its signature, and that graphs and engines agree with PyTorch.

    Exit code 4: it does not pass.
    """
    import json

    from cldf_fast.deploy.verification import verify

    found = verify(folder, public_key=public_key, backends=tuple(backend or ()))
    if json_output:
        document = {
            "passed": found.passed,
            "signature_checked": found.signed,
            "parity": [each.to_json() for each in found.measured],
            "skipped": found.skipped,
        }
        typer.echo(json.dumps(document, indent=2))
    else:
        for each in found.measured:
            typer.echo(_parity_line(each))
        for name, reason in found.skipped.items():
            typer.echo(f"{name}: did not run ({reason})")
        signature = "signature checked" if found.signed else "no public key given, so that nobody vouches for it"
        typer.echo(f"{folder}: {'passed' if found.passed else 'FAILED'}; all files as sealed, {signature}")
    if not found.passed:
        raise typer.Exit(4)


@app.command()
def predict(
    folder: Annotated[Path, typer.Argument(help="Engine directory.")],
    inputs: Annotated[list[str], typer.Argument(help="As `segment` takes them.")],
    out: Annotated[Path, typer.Option(help="Folder for masks, summary.json and audit.jsonl.")],
    precision: Annotated[str | None, typer.Option(help="Default: the directory's first.")] = None,
    backend: Annotated[str, typer.Option(help="onnx, tensorrt or tensorrt_rtx.")] = "onnx",
    public_key: Annotated[Path | None, typer.Option(help="Ed25519 public key (PEM) that it must be signed by.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="Of ONNX Runtime; 0: all cores.")] = 0,
    labels: Annotated[
        str | None, typer.Option(help="Image-level labels, if known: class names separated by commas, all or none.")
    ] = None,
    window: Annotated[str | None, typer.Option(help="LOW,HIGH in stored units; default: the directory's own.")] = None,
    probability: Annotated[bool, typer.Option(help="Also write class probabilities.")] = False,
    replicate: Annotated[bool, typer.Option(help="Use a single channel for all channels of the network.")] = False,
    num_parts: Annotated[int, typer.Option(min=1, help="Processes that share the inputs.")] = 1,
    part_id: Annotated[int, typer.Option(min=0, help="Which of them this is.")] = 0,
    continue_: Annotated[bool, typer.Option("--continue", help="Leave out what an earlier run has done.")] = False,
    ood: Annotated[
        str,
        typer.Option(help="At most accept, warn of, or refuse inputs that are unlike the images trained on."),
    ] = "warn",
    on_engine_error: Annotated[
        str,
        typer.Option(
            help="Where no engine can be loaded here: fail, rebuild one for this GPU (in memory), or onnx on the CPU."
        ),
    ] = "fail",
) -> None:
    """Segment images with an engine directory, without torch. Exit code 3: some inputs were refused."""
    import warnings

    from cldf_fast.deploy.prediction import Part, predict
    from cldf_fast.deploy.predictor import Predictor

    predictor = Predictor(
        folder,
        precision=precision,
        backend=backend,
        public_key=public_key,
        threads=threads,
        on_engine_error=on_engine_error,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # said in our own words
        fallback = predictor.execution.fallback
    if fallback:
        typer.echo(f"warning: {fallback}", err=True)
    refused = 0
    for outcome in predict(
        predictor,
        inputs,
        out,
        part=Part(part_id, num_parts),
        go_on=continue_,
        labels=labels,
        window=None if window is None else parse_range("--window", window),
        probability=probability,
        replicate=replicate,
        ood=ood,
    ):
        if isinstance(outcome.ood, dict) and outcome.ood["status"] == "warn":
            typer.echo(f"warning: {outcome.source}: is unlike the images trained on, see summary.json", err=True)
        if outcome.status == "refused":
            refused += 1
            typer.echo(f"refused ({outcome.code}): {outcome.reason}", err=True)
        else:
            for warning in outcome.warnings:
                typer.echo(f"warning ({warning['code']}): {warning['reason']}", err=True)
            typer.echo(
                f"{outcome.source}: {'left out, done before: ' if outcome.left_out else ''}{outcome.slices} slices, "
                f"{outcome.slices_labelled} labelled, {outcome.foreground_pixels} foreground pixels -> "
                f"{', '.join(outcome.files[:2])}{' ...' if len(outcome.files) > 2 else ''}"
            )
    if refused:
        raise typer.Exit(3)


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="INPUT", help=".pt, .pth, .bin or .safetensors file, or folder of a diffusers network."),
    ],
    out: Annotated[Path, typer.Option(help="Safetensors file to write.")],
    kind: Annotated[NetworkKind, typer.Option(help="Refuse another network than this.")] = NetworkKind.auto,
    num_heads: Annotated[int | None, typer.Option(min=1, help="Attention heads (UNets).")] = None,
    num_head_channels: Annotated[int | None, typer.Option(min=1, help="Channels of an attention head.")] = None,
    new_attention_order: Annotated[
        bool | None,
        typer.Option("--new-attention-order/--legacy-attention-order", help="Heads are split after or before q, k, v."),
    ] = None,
    timesteps: Annotated[int | None, typer.Option(min=1, help="T of the process trained on.")] = None,
    schedule: Annotated[str | None, typer.Option(help="linear or cosine.")] = None,
    rescale_timesteps: Annotated[
        bool | None,
        typer.Option("--rescale-timesteps/--plain-timesteps", help="The network is told t * 1000 / T, or t."),
    ] = None,
    pixel_range: Annotated[str | None, typer.Option(help="LOW,HIGH of the images trained on.")] = None,
    channel_names: Annotated[str | None, typer.Option(help="Names of the input channels, separated by commas.")] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="Rows of the class table, or logits, that are known: 0=healthy,1=tumour. A run looks for its data's "
            "class names, in a class table also for healthy (or none, normal), and null where there is such a row."
        ),
    ] = None,
    multi_label: Annotated[
        bool | None, typer.Option("--sigmoid/--softmax", help="A classifier's logits are independent, or compete.")
    ] = None,
    num_res_blocks: Annotated[int | None, typer.Option(min=1, help="Where tensors allow several.")] = None,
    weights: Annotated[str | None, typer.Option(help="Which of several networks in a file, e.g. ema.")] = None,
) -> None:
    """Convert a published or foreign UNet or classifier to safetensors that describe themselves.

    What the tensors don't tell must be stated; what is missing is listed.
    """
    from cldf_fast.models.checkpoints import Stated, load, save

    stated: dict[str, Any] = {
        "num_heads": num_heads,
        "num_head_channels": num_head_channels,
        "new_attention_order": new_attention_order,
        "timesteps": timesteps,
        "schedule": schedule,
        "rescale_timesteps": rescale_timesteps,
        "pixel_range": None if pixel_range is None else parse_range("--pixel-range", pixel_range),
        "channel_names": None if channel_names is None else tuple(map(str.strip, channel_names.split(","))),
        "labels": None if labels is None else parse_label_numbers(labels),
        "multi_label": multi_label,
        "num_res_blocks": num_res_blocks,
        "weights": weights,
    }
    given = cast("Stated", {key: value for key, value in stated.items() if value is not None})
    loaded = load(source, kind=kind.value, **given)
    save(out, loaded)
    shape = loaded.description.architecture
    parameters = sum(parameter.numel() for parameter in loaded.network.parameters())
    typer.echo(
        f"{source}: {shape.kind} with {parameters:,} parameters, {shape.in_channels} channels in, widths "
        f"{', '.join(map(str, shape.widths))}, {shape.num_classes or 'no'} classes -> {out}"
    )


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    options_metavar="[ARGUMENTS]",
)
def bench(context: typer.Context) -> None:
    """Measure this machine against rivals, in a checkout of the repository: `cldf-fast bench --help`."""
    import os
    import subprocess

    from cldf_fast.errors import BackendError

    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise BackendError(
            f"bench: expected a checkout of the repository, found an installed package in {root} without benchmarks; "
            "clone the repository and run it there"
        )
    # A process of its own, whose libraries start with the number of threads that benchmarks have.
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "benchmarks", *context.args]
    raise typer.Exit(subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False).returncode)


@app.command()
def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Versions, devices, and which backend serves which operation and why not another."""
    import json

    from cldf_fast.doctor import collect, render

    collected = collect()
    typer.echo(json.dumps(collected, indent=2) if json_output else render(collected))


def _export_for_server(
    engine: Path,
    out: Path,
    format_: ExportFormat,
    precisions: list[str] | None,
    backend: str,
    batch: str,
    public_key: Path | None,
    out_of_place: list[str],
) -> None:
    from cldf_fast.deploy.manifest import MANIFEST
    from cldf_fast.deploy.monai_bundle import write_monai_bundle
    from cldf_fast.deploy.tensorrt import Batches
    from cldf_fast.deploy.triton_server import write_triton_repository
    from cldf_fast.errors import ConfigError

    if out_of_place or len(precisions or []) > 1:
        what = out_of_place[0] if out_of_place else "several --precision"
        raise ConfigError(f"{what}: not for --format {format_.value}, which takes an engine directory as it is")
    if not (engine / MANIFEST).exists():
        raise ConfigError(
            f"{engine}: expected an engine directory for --format {format_.value}, got a folder without {MANIFEST}; "
            f"write one with `cldf-fast export RUN --out ENGINE`"
        )
    precision = precisions[0] if precisions else None
    if format_ is ExportFormat.monai_bundle:
        write_monai_bundle(engine, out, precision=precision, public_key=public_key)
    else:
        batches = Batches(*parse_batches(batch))
        write_triton_repository(
            engine, out, precision=precision, backend=backend, batches=batches, public_key=public_key
        )
    signature = "signature checked" if public_key else "no public key given, so that nobody vouches for it"
    typer.echo(f"{out}: {format_.value} of {engine}; {signature}")


def parse_overrides(texts: list[str]) -> dict[str, Any]:
    """Nested mapping of "a.b=value" texts; values are YAML, so that numbers, lists and true keep their types."""
    import yaml

    from cldf_fast.errors import ConfigError

    nested: dict[str, Any] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set: expected key=value, got {text!r}")
        *parents, last = key.split(".")
        section = nested
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(f"--set: expected {key} or {parent} as a whole, got both")
        try:
            section[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set: expected {key}= and a value in YAML, got {value!r}") from error
    return nested


def parse_range(option: str, text: str) -> tuple[float, float]:
    """(low, high) of an option's "LOW,HIGH"."""
    from cldf_fast.errors import ConfigError

    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option}: expected LOW,HIGH, got {text!r}") from None
    if not -math.inf < low < high < math.inf:
        raise ConfigError(f"{option}: expected finite LOW,HIGH with LOW below HIGH, got {text!r}")
    return low, high


def parse_batches(text: str) -> tuple[int, int, int]:
    """(smallest, best, largest) of "1,8,16"."""
    from cldf_fast.errors import ConfigError

    try:
        smallest, best, largest = (int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--batch: expected SMALLEST,BEST,LARGEST, got {text!r}") from None
    return smallest, best, largest


def parse_label_numbers(text: str) -> dict[int, str]:
    """Meanings by number, of "0=healthy,1=tumour"."""
    from cldf_fast.errors import ConfigError

    pairs = [part.partition("=") for part in text.split(",")]
    if not all(number.strip().isdecimal() and meaning.strip() for number, _, meaning in pairs):
        raise ConfigError(f"--labels: expected NUMBER=MEANING, separated by commas, got {text!r}")
    return {int(number): meaning.strip() for number, _, meaning in pairs}


def _parity_line(parity: Any) -> str:
    found = f"probabilities within {parity.probability_max:.2g}, masks' Dice {parity.dice_mean:.4f}"
    verdict = f"FAILED: {'; '.join(parity.failures)}" if parity.failures else "agrees with PyTorch"
    return f"{parity.backend} {parity.precision}: {found} over {parity.cases} cases; {verdict}"


def main() -> None:
    """Entry point: errors that this package raises on purpose become one sentence; Ctrl-C exits with 130, SIGTERM with
    143, and what is half written is removed.

    Exit codes: 2 for what can't be used, 4 for an engine directory that is not as sealed or does not agree with
    PyTorch.
    """
    from cldf_fast.errors import CLDFError, EngineMismatchError, IntegrityError, ParityError

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except (IntegrityError, EngineMismatchError, ParityError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(4)
    except CLDFError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:  # a folder that can't be made, a full disk, a file that may not be read
        if error.strerror is None:
            raise
        place = "" if error.filename is None else f"{error.filename}: "
        typer.echo(f"error: {place}{error.strerror}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        sys.exit(130)
