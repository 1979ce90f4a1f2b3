"""Copy a run's CDM and classifier, in half precision, to a folder that can be shipped: `bundle_weights.py RUN DEST`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def bundle(run: Path, destination: Path) -> None:
    """Write config.yaml, dataset.json and the two networks' weights as float16 to `destination`."""
    destination.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "dataset.json"):
        shutil.copyfile(run / name, destination / name)
    for name in ("cdm.safetensors", "classifier.safetensors"):
        weights = {key: value.to(torch.float16) for key, value in load_file(run / name).items()}
        save_file(weights, destination / name)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: bundle_weights.py RUN DEST")
    bundle(Path(sys.argv[1]), Path(sys.argv[2]))
