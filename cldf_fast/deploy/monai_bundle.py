"""A MONAI bundle, written from an engine directory: its metadata and configuration, and the directory as it was sealed.

    python -m monai.bundle run --config_file configs/inference.json --bundle_root . --image scan.nii.gz

writes masks as `cldf-fast predict` does; `network_def` is the directory as a torch module. No torch to write one.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

from cldf_fast import __version__
from cldf_fast.deploy.manifest import SealedDirectory, open_sealed
from cldf_fast.deploy.predictor import RESEARCH_USE, Settings
from cldf_fast.errors import ConfigError
from cldf_fast.files import atomic_write_text, new_folder

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
"""What MONAI's own bundles name."""

_ENGINE = "models/engine"
_LICENSE = """The code that this bundle runs, cldf_fast, is under the Apache License, Version 2.0:
https://www.apache.org/licenses/LICENSE-2.0

Use of the weights is bound by the licence and terms of the data that they were trained on, which docs/README.md names.
"""
_USE = f"""
## Use

    python -m monai.bundle run --config_file configs/inference.json --bundle_root . --image scan.nii.gz

with `cldf_fast` installed; also a folder of one DICOM series, PNG or TIFF. `cldf-fast verify {_ENGINE}` checks every
file and measures the agreement with PyTorch.
"""


def write_monai_bundle(
    engine: Path, out: Path, *, precision: str | None = None, public_key: Path | None = None
) -> None:
    """Write a bundle to the folder `out`, which must not exist, from a sealed engine directory.

    precision: of the graphs that it runs, by default the directory's first. public_key: of whom the directory has to be
    signed by. Raises IntegrityError where a byte is not as it was sealed, ConfigError for a precision that the
    directory lacks. Nothing is left at `out` then.
    """
    sealed = open_sealed(engine, public_key=public_key)
    sealed.check_outside(out)
    settings = Settings.of(sealed)
    if precision is not None and precision not in settings.precisions:
        raise ConfigError(
            f"precision: expected one of {', '.join(settings.precisions)}, which {engine} holds, got {precision!r}"
        )
    configs = {"metadata": _metadata(sealed, settings), "inference": _inference(precision or settings.precisions[0])}
    with new_folder(out) as folder:
        sealed.copy_to(folder / _ENGINE)
        for name, content in configs.items():
            atomic_write_text(folder / f"configs/{name}.json", json.dumps(content, indent=4) + "\n")
        card = sealed.read("MODEL_CARD.md").decode()
        atomic_write_text(folder / "docs/README.md", card + _USE)
        atomic_write_text(folder / "LICENSE", _LICENSE)


def _inference(precision: str) -> dict[str, Any]:
    return {
        "bundle_root": ".",
        "image": "",
        "output_dir": "$@bundle_root + '/eval'",
        "predictor": {
            "_target_": "cldf_fast.deploy.predictor.Predictor",
            "folder": f"$@bundle_root + '/{_ENGINE}'",
            "precision": precision,
        },
        "network_def": {"_target_": "cldf_fast.deploy.network.EngineNetwork", "predictor": "@predictor"},
        "run": ["$@predictor.predict(@image, @output_dir)"],
    }


def _metadata(sealed: SealedDirectory, settings: Settings) -> dict[str, Any]:
    classes = {str(i): name for i, name in enumerate(("background", *settings.class_names))}
    names = ", ".join(settings.class_names)
    tensor = {"spatial_shape": [settings.size, settings.size], "dtype": "float32", "is_patch_data": False}
    return {
        "schema": SCHEMA,
        "version": sealed.manifest.package_version,
        "changelog": {sealed.manifest.package_version: "exported"},
        "monai_version": _installed("monai"),
        "pytorch_version": _installed("torch"),
        "numpy_version": _installed("numpy"),
        "required_packages_version": {"cldf_fast": __version__, "onnxruntime": _installed("onnxruntime")},
        "name": f"CLDF segmentation of {names}",
        "task": f"Segmentation of {names} in slices, learnt from image-level labels",
        "description": f"Truncated diffusion network, pixel decoder and prototypes (CLDF) as ONNX, sealed: manifest "
        f"{sealed.manifest.sha256}.",
        "authors": "The cldf_fast contributors",
        "copyright": "Code: Apache-2.0; the weights: see LICENSE",
        "data_type": "dicom, nifti, png, tiff",
        "image_classes": f"{', '.join(settings.channel_names)}, as channels in this order",
        "pred_classes": ", ".join(f"{number}: {name}" for number, name in classes.items()),
        "intended_use": RESEARCH_USE,
        "references": ["https://arxiv.org/abs/2506.23460"],
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "modality": settings.acquisition.modality or "n/a",
                    "num_channels": len(settings.channel_names),
                    "value_range": [-1, 1],
                    "channel_def": {str(i): name for i, name in enumerate(settings.channel_names)},
                    **tensor,
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "segmentation",
                    "num_channels": len(classes),
                    "value_range": [0, 1],
                    "channel_def": classes,
                    **tensor,
                }
            },
        },
    }


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
