"""The commands: what they parse, what they refuse, and one tiny run through all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from cldf_fast import __version__
from cldf_fast.cli import app, parse_label_numbers, parse_overrides, parse_range
from cldf_fast.data.acquisition import Acquisition
from cldf_fast.data.phantom import phantom_split
from cldf_fast.errors import ConfigError, DataError
from cldf_fast.run import Run

runner = CliRunner()

_STEPS = {"steps": 3, "batch_size": 4, "warmup_steps": 1, "save_every": 2, "log_every": 1}
_NETWORK = {"model_channels": 8, "channel_mult": [1, 2], "attention_downsample": [2]}
_TINY = {
    "data": {"size": 32},
    "cdm": {"network": _NETWORK, "optimisation": _STEPS},
    "classifier": {"network": {"model_channels": 32, "channel_mult": [0.5, 1]}, "optimisation": _STEPS},
    "evidence": {"noise_levels": [0.0], "cam_downsample": 2, "foreground_gradient": 0.01, "foreground_cam": 0.0},
    "features": {"noise_levels": [0.05], "downsample": [2]},
    "decoder": {"hidden": 8, "embedding": 4, "anchors_per_class": 4, "passes": 1, "optimisation": _STEPS},
    "segmentation": {"prototypes_per_class": 2},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that `train all` made of the phantom in a few steps."""
    from cldf_fast.data import phantom

    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(_TINY), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom, "PHANTOM_SPLIT", {"train": 6, "val": 3, "test": 3})
        result = runner.invoke(
            app, ["train", "all", "--out", str(folder / "run"), "--config", str(folder / "tiny.yaml"), "--quiet"]
        )
    assert result.exit_code == 0, result.output
    return folder / "run"


def test_a_run_is_complete_in_itself(trained: Path) -> None:
    present = {path.name for path in trained.iterdir()}
    assert {
        "config.yaml",
        "dataset.json",
        "split.csv",
        "cdm.safetensors",
        "classifier.safetensors",
        "decoder.safetensors",
        "prototypes.safetensors",
        "metrics.jsonl",
        "loss_cdm.png",
        "loss_classifier.png",
        "loss_decoder.png",
    } <= present
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] * 3
    phantom = phantom_split(size=32)["train"].refs[0].read()
    assert Run(trained).record().acquisition == Acquisition.of(None, [(phantom.geometry, (32, 32))], 32)


def test_segment_writes_masks_in_the_input_s_geometry_and_refuses_by_exit_code(trained: Path, tmp_path: Path) -> None:
    affine = np.diag([-2.0, 2.0, 4.0, 1.0])
    rng = np.random.default_rng(5)
    for name in ("flair", "t1"):
        nibabel.save(
            nibabel.Nifti1Image(rng.random((20, 24, 3), dtype=np.float32), affine), tmp_path / f"{name}.nii.gz"
        )
    (tmp_path / "broken.nii.gz").write_bytes(b"no image")
    case = f"{tmp_path / 'flair.nii.gz'},{tmp_path / 't1.nii.gz'}"
    out = tmp_path / "masks"
    result = runner.invoke(
        app, ["segment", str(trained), case, str(tmp_path / "broken.nii.gz"), "--out", str(out), "--labels", "all"]
    )
    assert result.exit_code == 3
    assert f"refused (wrong_format): {tmp_path / 'broken.nii.gz'}: " in result.output
    (written,) = out.glob("*_mask.nii.gz")
    mask = nibabel.load(written)
    assert mask.shape == (20, 24, 3)
    np.testing.assert_allclose(mask.affine, affine)
    assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1}


def test_segment_writes_no_mask_over_another_s(trained: Path, tmp_path: Path) -> None:
    cases = []
    for patient in ("a", "b"):
        (tmp_path / patient).mkdir()
        image = nibabel.Nifti1Image(np.random.default_rng().random((20, 24, 2), dtype=np.float32), np.eye(4))
        nibabel.save(image, tmp_path / patient / "flair.nii.gz")
        cases.append(str(tmp_path / patient / "flair.nii.gz"))
    arguments = ["segment", str(trained), *cases, "--replicate", "--labels", "all"]
    result = runner.invoke(app, [*arguments, "--out", str(tmp_path / "masks")])
    assert result.exit_code == 3
    assert f"refused (output_name_taken): out: flair_mask.nii.gz is the name of the mask of {cases[0]} too" in (
        result.output
    )
    alone = runner.invoke(app, [*arguments[:3], *arguments[4:], "--out", str(tmp_path / "alone")])
    assert alone.exit_code == 0
    (written,), (expected,) = (list((tmp_path / folder).iterdir()) for folder in ("masks", "alone"))
    assert written.read_bytes() == expected.read_bytes()


def test_a_run_is_readable_by_whom_its_other_files_are(trained: Path) -> None:
    assert len({path.stat().st_mode for path in trained.iterdir() if path.is_file()}) == 1


def test_images_with_a_table_of_labels_are_enough(tmp_path: Path) -> None:
    """No mask anywhere: trained, and segmented by the run."""
    rng, rows = np.random.default_rng(), ["image,patient,bright"]
    for number in range(12):
        pixels = rng.integers(20, 60, (32, 32), dtype=np.uint8)
        if number % 2:
            pixels[8:20, 10:22] += 150
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{number},{number % 2}")
    (tmp_path / "labels.csv").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(_TINY), encoding="utf-8")
    options = ["--dataset", "labelled", "--data", str(tmp_path), "--config", str(tmp_path / "tiny.yaml"), "--quiet"]
    result = runner.invoke(app, ["train", "all", *options, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert Run(tmp_path / "run").record().class_names == ("bright",)
    arguments = ["segment", str(tmp_path / "run"), str(tmp_path / "1.png"), "--out", str(tmp_path / "masks")]
    assert runner.invoke(app, arguments).exit_code == 0
    assert Image.open(tmp_path / "masks" / "1_mask.png").size == (32, 32)
    with pytest.raises(DataError, match="mask"):
        runner.invoke(app, ["evaluate", str(tmp_path / "run"), "--data", str(tmp_path)], catch_exceptions=False)


def test_what_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(_TINY), encoding="utf-8")
    command = [sys.executable, "-m", "cldf_fast", "train", "cdm", "--config", str(tmp_path / "tiny.yaml"), "--quiet"]
    command += ["--out", str(tmp_path / "file" / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path / 'file' / 'run'}: Not a directory\n")


def test_the_version_is_printed() -> None:
    assert runner.invoke(app, ["--version"]).output.strip() == __version__


def test_segment_names_the_channels_it_misses(trained: Path, tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.random.default_rng(1).random((20, 24, 3), dtype=np.float32), np.eye(4))
    nibabel.save(image, tmp_path / "one.nii.gz")
    arguments = ["segment", str(trained), str(tmp_path / "one.nii.gz"), "--out", str(tmp_path / "masks")]
    refused = runner.invoke(app, arguments)
    assert refused.exit_code == 3
    assert "expected 2 channels, found 1" in refused.output
    assert runner.invoke(app, [*arguments, "--replicate"]).exit_code == 0
    twice = runner.invoke(app, [*arguments[:2], f"{arguments[2]},{arguments[2]}", *arguments[3:]])
    assert twice.exit_code == 0
    assert f"warning (equal_channels): {arguments[2]}: channels 1 and 2 of 2 are equal" in twice.output


def test_absent_labels_leave_an_empty_mask(trained: Path, tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.random.default_rng(2).random((20, 24, 3), dtype=np.float32), np.eye(4))
    nibabel.save(image, tmp_path / "one.nii.gz")
    arguments = ["segment", str(trained), str(tmp_path / "one.nii.gz"), "--out", str(tmp_path / "masks")]
    assert runner.invoke(app, [*arguments, "--replicate", "--labels", "none"]).exit_code == 0
    (written,) = (tmp_path / "masks").glob("*_mask.nii.gz")
    assert not np.asarray(nibabel.load(written).dataobj).any()


def test_evaluate_writes_the_table_and_the_report(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cldf_fast.data import phantom

    monkeypatch.setattr(phantom, "PHANTOM_SPLIT", {"train": 6, "val": 3, "test": 3})
    result = runner.invoke(app, ["evaluate", str(trained), "--quiet", "--baselines", "--decoder-seeds", "2"])
    assert result.exit_code == 0, result.output
    document = json.loads((trained / "metrics.json").read_text(encoding="utf-8"))
    assert {"cldf", "cldf_given_labels", "gradcam", "layercam", "gradient", "cg_diff", "cg_cdm", "intensity"} <= set(
        document["methods"]
    )
    assert {"mean", "std", "ci95"} <= set(document["methods"]["cldf"]["dice_positive"])
    assert {"decoder_trained_with_masks", "pixel_labels"} <= set(document["upper_bounds"])
    assert len(document["methods"]["cldf"]["dice_positive"]["seed_means"]) == 2
    assert "Research use only" in (trained / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "cdm", "--out", "x", "--set", "cdm.optimisation.step=3"], "cdm.optimisation.step"),
        (["train", "cdm", "--out", "x", "--dataset", "lgg"], "dataset lgg: expected the folder"),
        (["segment", "nowhere", "image.png", "--out", "x"], "is no run directory"),
        (["evaluate", "nowhere"], "is no run directory"),
    ],
)
def test_what_can_not_work_is_said_in_one_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "cldf_fast", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


_STATED = [
    *("--num-heads", "2", "--legacy-attention-order", "--timesteps", "4000", "--schedule", "linear"),
    *("--rescale-timesteps", "--pixel-range", "0,1", "--channel-names", "t1,flair", "--labels", "0=none,1=tumour"),
]


def test_convert_writes_a_network_that_describes_itself(tmp_path: Path) -> None:
    import torch

    from cldf_fast.models.checkpoints import load
    from cldf_fast.models.unet import UNet

    unet = UNet(2, 8, channel_mult=(1, 2), attention_downsample=(2,), num_heads=2, num_classes=4)
    source, out = tmp_path / "ema_0.9999.pt", tmp_path / "networks" / "cdm.safetensors"
    torch.save(unet.state_dict(), source)
    result = runner.invoke(app, ["convert", str(source), "--out", str(out), "--kind", "unet", *_STATED])
    assert result.exit_code == 0, result.output
    assert "unet with " in result.output
    assert "2 channels in, widths 8, 16, 4 classes" in result.output
    network, description = load(out)
    assert all(value.equal(unet.state_dict()[name]) for name, value in network.state_dict().items())
    assert description.architecture.num_heads == 2
    assert description.architecture.new_attention_order is False
    assert (description.timesteps, description.schedule, description.rescale_timesteps) == (4000, "linear", True)
    assert (description.pixel_range, description.channel_names) == ((0, 1), ("t1", "flair"))
    assert (description.labels, description.source) == ({0: "none", 1: "tumour"}, "ema_0.9999.pt")


def test_convert_says_what_is_missing_and_writes_nothing(tmp_path: Path) -> None:
    import torch

    from cldf_fast.models.classifier import NoiseAwareClassifier

    torch.save(NoiseAwareClassifier(2, 32, num_classes=2).state_dict(), tmp_path / "model.pt")
    arguments = ["convert", str(tmp_path / "model.pt"), "--out", str(tmp_path / "out.safetensors")]
    for given, sentence in (
        ([], "num_head_channels (any number of heads has these shapes), new_attention_order"),
        (_STATED, "a classifier's heads are stated by num_head_channels"),
        (
            [*_STATED[2:], "--softmax", "--num-head-channels", "32", "--kind", "unet"],
            "expected a unet, found a classifier",
        ),
    ):
        result = subprocess.run(
            [sys.executable, "-m", "cldf_fast", *arguments, *given], capture_output=True, text=True, check=False
        )
        assert result.returncode == 2
        assert sentence in result.stderr
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists()


def test_overrides_keep_their_types() -> None:
    texts = ["data.size=32", "features.downsample=[4, 2]", "features.prediction=false", "data.dataset=lgg"]
    assert parse_overrides(texts) == {
        "data": {"size": 32, "dataset": "lgg"},
        "features": {"downsample": [4, 2], "prediction": False},
    }
    for wrong, message in (
        (["data.size"], "expected key=value"),
        (["data.options.window=[1,2"], r"expected data.options.window= and a value in YAML, got '\[1,2'"),
        (["cdm=3", "cdm.network.model_channels=8"], "expected cdm.network.model_channels or cdm as a whole, got both"),
    ):
        with pytest.raises(ConfigError, match=f"--set: {message}"):
            parse_overrides(wrong)


def test_a_window_is_two_numbers() -> None:
    assert parse_range("--window", "-150,250") == (-150.0, 250.0)
    with pytest.raises(ConfigError, match="--window: expected LOW,HIGH"):
        parse_range("--window", "wide")


def test_labels_are_numbers_with_a_meaning() -> None:
    assert parse_label_numbers("0=healthy, 12=left kidney") == {0: "healthy", 12: "left kidney"}
    for text in ("healthy", "0=", "a=b", "-1=none", "0=a,,1=b"):
        with pytest.raises(ConfigError, match="NUMBER=MEANING"):
            parse_label_numbers(text)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from cldf_fast.cli import app; from typer.testing import CliRunner; "
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0; "
        "print(sorted({'torch', 'numpy', 'lightning_fabric', 'pydantic', 'matplotlib'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


_STOPPED = """
import sys, time
from cldf_fast import cli
from cldf_fast.files import new_folder

def slow():
    with new_folder(sys.argv[1]) as folder:
        print(folder.name, flush=True)
        time.sleep(60)

cli.app = slow
cli.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there terminating a process leaves it no time")
def test_a_command_that_is_terminated_leaves_nothing_half_written(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _STOPPED, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert (tmp_path / process.stdout.readline().strip()).is_dir()
        process.terminate()
        assert process.wait(60) == 143
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["5", "5,1", "1,1", "nan,1", "0,inf"])
def test_a_range_is_checked(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--window: expected .*LOW,HIGH.*, got '{text}'"):
        parse_range("--window", text)
