"""Copy a run to a folder that can be shipped, CDM and classifier in half precision: `bundle_weights.py RUN DEST`.

A decoder, where there is one, goes along as it is, with those of further seeds: train it on networks that are in half
precision already (a folder made by this command, continued by `cldf-fast train decoder`), since it serves no others.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

_DECODER = ("decoder.safetensors", "prototypes.safetensors")


def bundle(run: Path, destination: Path) -> None:
    """Write config.yaml, dataset.json, the two networks' weights as float16 and the decoders to `destination`."""
    destination.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "dataset.json"):
        shutil.copyfile(run / name, destination / name)
    for name in ("cdm.safetensors", "classifier.safetensors"):
        weights = {key: value.to(torch.float16) for key, value in load_file(run / name).items()}
        with safe_open(run / name, "pt") as file:  # the settings that they are bound to
            save_file(weights, destination / name, file.metadata())
    for folder in (run, *sorted(run.glob("decoder-seed-*"))):
        if all((folder / name).exists() for name in _DECODER):
            (destination / folder.relative_to(run)).mkdir(exist_ok=True)
            for name in _DECODER:
                shutil.copyfile(folder / name, destination / folder.relative_to(run) / name)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: bundle_weights.py RUN DEST")
    bundle(Path(sys.argv[1]), Path(sys.argv[2]))
