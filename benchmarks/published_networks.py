"""What a decoder on networks of published widths costs: convert, train, segment, with peak memory of each command.

    python -m benchmarks.published_networks "cond_ddpm_wsss CHAOS-128" FOLDER
    python -m benchmarks.published_networks "diffusion-anomaly BraTS-256" FOLDER

Weights are random and images are noise, which cost what real ones do: 16 slices to train on, 4 of them with a lesion, 2
to fit the label threshold, 1 to segment. Slices are read once, without augmented readings, and the decoder takes five
steps, which cost next to nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from torch import nn

from cldf_fast.models.classifier import NoiseAwareClassifier
from cldf_fast.models.unet import UNet
from tests.models.published import CLASSIFIERS, UNETS

SLICES = {"train-a": 8, "train-b": 8, "val": 2, "test": 1}
STATED = [
    *("--legacy-attention-order", "--timesteps", "1000", "--schedule", "linear", "--plain-timesteps"),
    *("--pixel-range", "0,1", "--labels", "0=healthy,1=lesion"),
]


def main() -> None:
    """Print a line a command: seconds, seconds of all processors together, peak memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[name for name in UNETS if name in CLASSIFIERS])
    parser.add_argument("folder", type=Path, help="For weights, data and the run; must not exist.")
    given = parser.parse_args()
    folder: Path = given.folder
    folder.mkdir(parents=True)
    unet, head = UNETS[given.name][0], CLASSIFIERS[given.name][0]
    size, channels = head["image_size"], head["in_channels"]
    torch.manual_seed(0)
    write_weights(UNet(**unet), folder / "unet.pt")
    write_weights(NoiseAwareClassifier(**head), folder / "classifier.pt")
    names = [f"channel {i}" for i in range(channels)]
    image = write_data(folder / "data", size, names)
    stated = [*STATED, "--channel-names", ",".join(names)]
    for network, heads in (
        ("unet", ["--num-heads", str(unet.get("num_heads", 4))]),
        ("classifier", ["--num-head-channels", str(head["num_head_channels"]), "--softmax"]),
    ):
        run("convert", folder / f"{network}.pt", "--out", folder / f"{network}.safetensors", *stated, *heads)
        (folder / f"{network}.pt").unlink()
    # Random networks agree about nothing, and a decoder needs some pixels with a label.
    settings = {
        "data.size": size,
        "evidence.foreground_gradient": 0.1,
        "evidence.foreground_cam": 0.0,
        "decoder.passes": 1,
        "decoder.optimisation.steps": 5,
    }
    run(
        *("train", "decoder", "--out", folder / "run", "--dataset", "nnunet", "--data", folder / "data", "--quiet"),
        *("--cdm", folder / "unet.safetensors", "--classifier", folder / "classifier.safetensors"),
        *(part for key, value in settings.items() for part in ("--set", f"{key}={value}")),
    )
    run("segment", folder / "run", image, "--labels", "all", "--out", folder / "masks")


def run(*arguments: object) -> None:
    """Run a command of `cldf-fast` and print what it took."""
    command = [sys.executable, "-m", "cldf_fast", *map(str, arguments)]
    started = time.perf_counter()
    process = os.posix_spawn(command[0], command, os.environ)
    _, status, usage = os.wait4(process, 0)
    if status:
        sys.exit(f"{' '.join(command)}: failed")
    seconds, processor = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
    print(f"{arguments[0]}: {seconds:.0f} s, {processor:.0f} CPU s, {usage.ru_maxrss / 2**20:.1f} GiB", flush=True)


def write_weights(network: nn.Module, path: Path) -> None:
    """Weights at random, residual branches too: as initialised these are zero, and evidence is flat."""
    state: dict[str, Any] = {}
    for name, value in network.state_dict().items():
        drawn = torch.randn_like(value)
        state[name] = drawn / value[0].numel() ** 0.5 if value.ndim > 1 else value + 0.1 * drawn
    torch.save(state, path)


def write_data(folder: Path, size: int, names: list[str]) -> str:
    """An nnU-Net folder of these channels with one class; returns the test case as `segment` takes it."""
    rng = np.random.default_rng(0)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for case, slices in SLICES.items():
        shape = (size, size, slices)
        for i in range(len(names)):
            write_volume(rng.random(shape, dtype=np.float32), folder / "imagesTr" / f"{case}_{i:04d}.nii.gz")
        mask = np.zeros(shape, dtype=np.uint8)
        mask[size // 4 : size // 2, size // 4 : size // 2, : (slices + 3) // 4] = 1
        write_volume(mask, folder / "labelsTr" / f"{case}.nii.gz")
    description = {
        "channel_names": {str(i): name for i, name in enumerate(names)},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": len(SLICES),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    split = "".join(f"{case},{case.split('-')[0]}\n" for case in SLICES)
    (folder / "split.csv").write_text(f"patient,split\n{split}", encoding="utf-8")
    return ",".join(str(folder / "imagesTr" / f"test_{i:04d}.nii.gz") for i in range(len(names)))


def write_volume(values: np.ndarray[Any, Any], path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)


if __name__ == "__main__":
    main()
