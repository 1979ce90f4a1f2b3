"""Networks that a user holds, through the commands: converted, a decoder trained on them, images segmented."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

from cldf_fast.cli import app
from cldf_fast.errors import CLDFError, ConfigError
from cldf_fast.models.adopted import AdoptedClassifier, AdoptedUNet
from cldf_fast.models.classifier import NoiseAwareClassifier
from cldf_fast.models.unet import UNet
from cldf_fast.ops import noised_batch, pixel_seed
from cldf_fast.run import Run
from cldf_fast.workflow import evaluate

Randomise = Callable[[nn.Module], nn.Module]

runner = CliRunner()

_STEPS = {"steps": 2, "batch_size": 4, "warmup_steps": 1, "save_every": 2, "log_every": 1}
_TINY = {
    "data": {"size": 32},
    "cdm": {"optimisation": _STEPS},
    "classifier": {"optimisation": _STEPS},
    "evidence": {"noise_levels": [0.0, 0.1], "cam_downsample": 2, "foreground_gradient": 0.01, "foreground_cam": 0.0},
    "features": {"noise_levels": [0.05], "downsample": [2, 1]},
    "decoder": {"hidden": 8, "embedding": 4, "anchors_per_class": 4, "passes": 1, "optimisation": _STEPS},
    "segmentation": {"prototypes_per_class": 2},
}
_LEVELS: dict[str, Any] = {"channel_mult": (1, 2), "attention_downsample": (2,)}
_HEAD: dict[str, Any] = {**_LEVELS, "num_head_channels": 16, "resblock_updown": True}
_CHANNELS = ["--channel-names", "flair,t1", "--legacy-attention-order"]
_PLAIN = [*_CHANNELS, "--timesteps", "1000", "--schedule", "linear", "--plain-timesteps", "--pixel-range", "0,1"]
_RESCALED = [*_CHANNELS, "--timesteps", "4000", "--schedule", "linear", "--rescale-timesteps", "--pixel-range", "-1,1"]
_COSINE = [*_CHANNELS, "--timesteps", "500", "--schedule", "cosine", "--plain-timesteps", "--pixel-range", "-1,1"]
_BINARY = ["--labels", "0=healthy,1=lesion"]

# Of each lineage, arguments of its UNet and its classifier, and what is stated of them when they are converted.
LINEAGES: dict[str, tuple[dict[str, Any], list[str], dict[str, Any], list[str]]] = {
    "guided-diffusion": (
        {**_LEVELS, "num_head_channels": 8, "resblock_updown": True},
        [*_COSINE, "--num-head-channels", "8"],
        {**_HEAD, "num_classes": 2, "pool": "attention", "image_size": 32},
        [*_COSINE, *_BINARY, "--num-head-channels", "16", "--softmax"],
    ),
    "cond_ddpm_wsss": (
        {**_LEVELS, "num_res_blocks": 3, "num_classes": 1000},
        [*_RESCALED, "--num-heads", "4", "--labels", "0=none,2=lesion"],
        {**_HEAD, "num_classes": 5, "pool": "attention", "image_size": 32},
        [*_RESCALED, "--labels", "0=none,1=lesion", "--num-head-channels", "16", "--softmax"],
    ),
    "diffusion-anomaly": (
        {**_LEVELS, "num_classes": 2, "num_heads": 1, "scale_shift": False},
        [*_PLAIN, *_BINARY, "--num-heads", "1"],
        {**_HEAD, "num_classes": 2, "pool": "spatial"},
        [*_PLAIN, *_BINARY, "--num-head-channels", "16", "--softmax"],
    ),
}


@pytest.fixture(autouse=True)
def few_patients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from cldf_fast.data import phantom

    monkeypatch.setattr(phantom, "PHANTOM_SPLIT", {"train": 2, "val": 1, "test": 1})
    yield


def converted(source: Path, network: nn.Module, stated: list[str]) -> Path:
    """The file that `convert` makes of a network's weights."""
    torch.save(network.state_dict(), source)
    out = source.with_suffix(".safetensors")
    result = runner.invoke(app, ["convert", str(source), "--out", str(out), *stated])
    assert result.exit_code == 0, result.output
    return out


def train(folder: Path, *arguments: str, network: str = "decoder") -> Any:
    (folder / "tiny.yaml").write_text(yaml.safe_dump(_TINY), encoding="utf-8")
    out, config = str(folder / "run"), str(folder / "tiny.yaml")
    return runner.invoke(app, ["train", network, "--out", out, "--config", config, *arguments])


def lineage(name: str, folder: Path, randomised: Randomise) -> list[str]:
    """Options of `train` that take both networks of a lineage."""
    unet, unet_stated, classifier, classifier_stated = LINEAGES[name]
    cdm = converted(folder / "ema_0.9999.pt", randomised(UNet(2, 16, out_channels=4, **unet)), unet_stated)
    head = randomised(NoiseAwareClassifier(2, 16, **classifier))
    return ["--cdm", str(cdm), "--classifier", str(converted(folder / "classifier.pt", head, classifier_stated))]


@pytest.mark.parametrize("name", LINEAGES)
def test_a_lineage_s_networks_train_a_decoder_and_segment(name: str, randomised: Randomise, tmp_path: Path) -> None:
    result = train(tmp_path, *lineage(name, tmp_path, randomised))
    assert result.exit_code == 0, result.output
    assert "cdm: ema_0.9999.pt, " in result.output
    run = Run(tmp_path / "run")
    cldf = run.load()
    assert isinstance(cldf.unet, AdoptedUNet)
    assert isinstance(cldf.classifier, AdoptedClassifier)
    assert not (run.path / "cdm.checkpoint").exists()

    x = torch.rand(3, 2, 32, 32) * 2 - 1
    first, again = cldf.segment(x), run.load().segment(x)
    assert first.probability.equal(again.probability)
    assert first.mask.equal(again.mask)

    image = nibabel.Nifti1Image(np.random.default_rng(2).random((20, 24, 2), dtype=np.float32), np.eye(4))
    nibabel.save(image, tmp_path / "one.nii.gz")
    arguments = [
        "segment",
        str(run.path),
        str(tmp_path / "one.nii.gz"),
        "--replicate",
        "--out",
        str(tmp_path / "masks"),
    ]
    assert runner.invoke(app, arguments).exit_code == 0
    assert len(list((tmp_path / "masks").glob("*_mask.nii.gz"))) == 1


def test_a_run_on_converted_networks_is_evaluated(randomised: Randomise, tmp_path: Path) -> None:
    assert train(tmp_path, *lineage("guided-diffusion", tmp_path, randomised)).exit_code == 0
    document = evaluate(
        Run(tmp_path / "run"), data=None, split="test", baselines=("gradcam", "gradient", "cg_diff", "cg_cdm")
    )
    assert {"cldf", "gradcam", "gradient", "cg_diff"} <= set(document["methods"])
    # Without a class table there is nothing that the reconstruction could be conditioned on.
    assert "cg_cdm" not in document["methods"]


def test_label_probabilities_are_the_softmax_over_the_noise_levels(randomised: Randomise, tmp_path: Path) -> None:
    assert train(tmp_path, *lineage("cond_ddpm_wsss", tmp_path, randomised)).exit_code == 0
    cldf = Run(tmp_path / "run").load(decoder=False)
    assert isinstance(cldf.classifier, AdoptedClassifier)
    x = torch.rand(2, 2, 32, 32) * 2 - 1
    # Pixels in [-1, 1], T = 4000: level 0.1 is step 400, which the network is told as 100.
    own = torch.cumprod(1 - torch.linspace(0.25e-4, 0.5e-2, 4000, dtype=torch.float64), 0)[[0, 400]].float()
    rows = noised_batch(x, own, pixel_seed(x))
    logits = cldf.classifier.network(rows, torch.tensor([0.0, 0, 100, 100]))
    expected = logits.softmax(dim=1)[:, 1].unflatten(0, (2, 2)).mean(dim=0)
    torch.testing.assert_close(cldf.label_probability(x)[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_a_diffusers_unet_serves_with_a_classifier_trained_here(randomised: Randomise, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DModel(
        sample_size=32,
        in_channels=2,
        out_channels=2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
    )
    randomised(model).save_pretrained(tmp_path / "diffusers")
    stated = ["--channel-names", "flair,t1", "--timesteps", "1000", "--schedule", "linear", "--plain-timesteps"]
    cdm = tmp_path / "cdm.safetensors"
    arguments = ["convert", str(tmp_path / "diffusers"), "--out", str(cdm), "--pixel-range", "0,1", *stated]
    assert runner.invoke(app, arguments).exit_code == 0
    small = ["--set", "classifier.network.model_channels=32", "--set", "classifier.network.channel_mult=[0.5, 1]"]
    result = train(tmp_path, "--cdm", str(cdm), *small, network="all")
    assert result.exit_code == 0, result.output
    cldf = Run(tmp_path / "run").load()
    assert isinstance(cldf.unet, AdoptedUNet)
    assert isinstance(cldf.classifier, NoiseAwareClassifier)
    x = torch.rand(2, 2, 32, 32) * 2 - 1
    noise = noised_batch(torch.zeros_like(x), torch.tensor([0.5]), pixel_seed(x)) / 0.5**0.5
    own = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[50].float()
    x_t = own.sqrt() * (x + 1) / 2 + (1 - own).sqrt() * noise
    with torch.no_grad():
        predicted = model.eval()(x_t, 50).sample
    # The classifier is told of the step of its own process that is as noisy, with pixels twice as far apart.
    shares = cldf.diffusion.alpha_bar[50], torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    told = int(cldf.classifier_time(50))
    assert told > 50
    assert (shares[1][told] - shares[0]).abs() <= (shares[1] - shares[0]).abs().min() + 1e-6
    clean = 2 * (x_t - (1 - own).sqrt() * predicted) / own.sqrt() - 1
    maps = cldf.features(x, cldf.conditions(torch.zeros(2, 1, dtype=torch.bool)))
    torch.testing.assert_close(maps[-1], clean, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused_before_anything_is_written(randomised: Randomise, tmp_path: Path) -> None:
    options = lineage("guided-diffusion", tmp_path, randomised)
    for arguments, sentence in (
        ([*options, "--set", "data.size=64"], "data.size: expected 32, which classifier.pt was trained at, got 64"),
        (
            [*options, "--set", "features.condition=label"],
            "features.condition: expected null, because ema_0.9999.pt has",
        ),
        (
            [*options, "--set", "data.options.kind=organs", "--set", "data.mirror=false"],
            "expected the data's channels in order, in phase, out of phase",
        ),
        (["--cdm", options[3]], "expected a unet, found a classifier"),
        (["--cdm", str(tmp_path / "ema_0.9999.pt")], "state num_heads or num_head_channels"),
    ):
        result = train(tmp_path, *arguments)
        assert isinstance(result.exception, CLDFError), result.output
        assert sentence in str(result.exception)
        assert not (tmp_path / "run").exists()
    refused = train(tmp_path, *options, network="cdm")
    assert isinstance(refused.exception, ConfigError)
    assert "--cdm: expected with what is trained on it" in str(refused.exception)


def test_another_network_ends_what_was_made_with_the_first(randomised: Randomise, tmp_path: Path) -> None:
    options = lineage("diffusion-anomaly", tmp_path, randomised)
    assert train(tmp_path, *options, "--set", "features.store=float16").exit_code == 0
    run = Run(tmp_path / "run")
    assert run.feature_folder.exists()
    assert train(tmp_path, *options, "--set", "features.store=float16", "--resume").exit_code == 0
    assert run.feature_folder.exists()
    from cldf_fast.models.checkpoints import load

    other = lineage("cond_ddpm_wsss", tmp_path, randomised)
    run.adopt("cdm", load(other[1]))
    assert not run.feature_folder.exists()
    assert not (run.path / "decoder.checkpoint").exists()
    assert not run.has_decoder(0)
