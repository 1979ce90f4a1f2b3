"""Engine directories, with random contents and exported, and keys to sign them with."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cldf_fast.data.base import SliceDataset, Study, StudyRef
from cldf_fast.data.geometry import Geometry
from cldf_fast.deploy import export as exporting
from cldf_fast.deploy.manifest import EngineKey, operating_system, seal
from cldf_fast.pipeline import CLDF
from cldf_fast.run import Run
from tests.test_run import RECORD, saved

FP16, FP32 = "engines/0a1b2c3d_fp16_sm86.plan", "engines/0a1b2c3d_fp32_sm86.engine"


class EngineDirectory:
    """`path`: an engine directory that isn't sealed yet; `engines`: the keys of its engines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for folder in ("engines", "golden"):
            (path / folder).mkdir(parents=True)
        golden = io.BytesIO()
        np.savez(golden, images=np.random.rand(2, 1, 4, 4))
        self.contents = {
            "MODEL_CARD.md": b"# For research only\n",
            "config.json": json.dumps({"size": 64, "noise_levels": [0.02, 0.1]}).encode(),
            "preprocessing.json": b'{"mean": 0.5}',
            "labels.json": b'{"0": "background", "1": "tumour"}',
            "model.onnx": random.randbytes(random.randint(1, 9000)),
            "half.onnx": random.randbytes(300),
            FP16: random.randbytes(random.randint(1, 9000)),
            FP32: random.randbytes(400),
            "engines/parity.json": b"{}",
            "golden/inputs.npz": golden.getvalue(),
        }
        for name, data in self.contents.items():
            (path / name).write_bytes(data)
        self.engines = {FP16: self.key("half.onnx", "fp16"), FP32: self.key("model.onnx", "fp32")}

    def key(self, onnx: str, precision: str) -> EngineKey:
        """Of an engine that is built here from an ONNX file in the directory."""
        return EngineKey(
            weights_sha256=hashlib.sha256(b"weights").hexdigest(),
            onnx_sha256=hashlib.sha256(self.contents[onnx]).hexdigest(),
            precision=precision,
            opset=18,
            shapes={"image": ((1, 3, 64, 64), (4, 3, 64, 64), (8, 3, 64, 64)), "label": ((1,), (4,), (8,))},
            flavour="tensorrt",
            version="11.4.0.1",
            cuda="13.0",
            compute_capability="8.6",
            gpu_name="NVIDIA RTX A6000",
            os=operating_system(),
            builder_flags=("timing_cache", "level=3"),
        )

    def seal(self, signing_key: Path | None = None) -> None:
        seal(self.path, engines=self.engines, signing_key=signing_key)


@pytest.fixture
def directory(tmp_path: Path) -> EngineDirectory:
    return EngineDirectory(tmp_path / "exported")


def _write_pair(stem: Path) -> tuple[Path, Path]:
    private = Ed25519PrivateKey.generate()
    pem = serialization.Encoding.PEM
    hidden = private.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    shown = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    for suffix, data in ((".pem", hidden), (".pub", shown)):
        stem.with_suffix(suffix).write_bytes(data)
    return stem.with_suffix(".pem"), stem.with_suffix(".pub")


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Private and public key, as files."""
    return _write_pair(tmp_path_factory.mktemp("keys") / "owner")


@pytest.fixture(scope="session")
def other_keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Those of somebody else."""
    return _write_pair(tmp_path_factory.mktemp("keys") / "other")


def a_study(name: str) -> Study:
    """Noise about a bright disc, of six slices."""
    rng = np.random.default_rng()
    radius = np.hypot(*np.meshgrid(np.linspace(-1, 1, 16), np.linspace(-1, 1, 16)))
    image = 100.0 * (radius < 0.8) + rng.gamma(4, 5, (6, 2, 16, 16))
    image[:, 1] *= 3.0 - 2 * radius
    return Study(
        name,
        name,
        torch.from_numpy(image.astype(np.float32)),
        Geometry(np.eye(4), physical=True),
        tuple(f"{name}-{i}" for i in range(6)),
        Path(name),
        labels=torch.from_numpy(rng.random((6, 3)) < 0.5),
    )


def write_study(image: np.ndarray, folder: Path, name: str) -> str:
    """Channels float [S, 2, H, W] as two NIfTI files; returns what `predict` takes."""
    paths = []
    for channel in range(2):
        paths.append(str(folder / f"{name}-{channel}.nii.gz"))
        nibabel.save(nibabel.Nifti1Image(image[:, channel].transpose(2, 1, 0), np.diag([2, 2, 5, 1.0])), paths[-1])
    return ",".join(paths)


def a_part(start: int, count: int) -> SliceDataset:
    names = [f"study-{number}" for number in range(start, start + count)]
    refs = [StudyRef(name, name, 6, partial(a_study, name)) for name in names]
    return SliceDataset(refs, RECORD.class_names, RECORD.channel_names)


@pytest.fixture(scope="session")
def module_cldf(tiny_config: Any, make_tiny_cldf: Any) -> CLDF:
    # The same weights whichever test asks first.
    torch.manual_seed(0)
    # Of a data set that is not at hand, so that golden images are synthetic.
    data = tiny_config.data.model_copy(update={"dataset": "lgg"})
    return make_tiny_cldf(tiny_config.model_copy(update={"data": data}))


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, module_cldf: CLDF) -> Run:
    return saved(module_cldf, tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(scope="session")
def engine(run: Run) -> Path:
    """An engine directory of the run, exported with a data set at hand. Not to be changed."""
    parts = {"train": a_part(0, 30), "val": a_part(30, 12)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "open_parts", lambda config, data, run: parts)
        exporting.export(run, run.path.parent / "engine", precisions=("float32", "float16"), data=run.path)
    return run.path.parent / "engine"


@pytest.fixture
def copied(engine: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(engine, tmp_path / "engine"))


def images(count: int) -> np.ndarray:
    return (torch.rand(count, 2, 16, 16) * 2 - 1).numpy()


@pytest.fixture
def study(tmp_path: Path) -> str:
    """Two NIfTI files of seven slices, as channels."""
    paths = []
    for name in ("t1", "t2"):
        values = np.random.default_rng().gamma(2.0, 100.0, (21, 19, 7)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(values, np.diag([2.0, 2.0, 5.0, 1.0])), tmp_path / f"{name}.nii.gz")
        paths.append(str(tmp_path / f"{name}.nii.gz"))
    return ",".join(paths)
