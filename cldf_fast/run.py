"""The RUN directory: everything that a trained CLDF consists of, complete in itself.

config.yaml          the resolved configuration, the seed in it
dataset.json         class and channel names, the window of intensities, how the training images were acquired
split.csv            patients of train, val and test: binding for every later command on the same patients
cdm.safetensors  classifier.safetensors  decoder.safetensors      the first two may be converted networks; those that
                     were trained here name the settings that they are bound to
prototypes.safetensors   vectors, bias, label_threshold
metrics.jsonl  loss_<network>.png
features/            with features.store: what the frozen CDM says of the images that were read (see store.FeatureStore)
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from cldf_fast.config import Config, flat, load_config, save_config
from cldf_fast.data.acquisition import Acquisition
from cldf_fast.data.intensity import checked_window
from cldf_fast.errors import CheckpointError, DataError
from cldf_fast.files import atomic_write_text
from cldf_fast.models.adopted import AdoptedClassifier, AdoptedUNet
from cldf_fast.models.checkpoints import Loaded, describes_itself, load, save, write_tensors
from cldf_fast.models.classifier import NoiseAwareClassifier
from cldf_fast.models.decoder import PixelDecoder
from cldf_fast.models.unet import UNet
from cldf_fast.pipeline import CLDF, adopt_classifier, adopt_unet, build_classifier, build_features, build_unet
from cldf_fast.segmentation import Prototypes

_DECISION = "prototypes.safetensors"

_SETTINGS = "settings"
_BINDING = {
    "cdm": ("data.size", "diffusion.", "cdm.network."),
    "classifier": ("data.size", "diffusion.", "classifier.network."),
    "decoder": ("diffusion.level_unit", "features."),
}
"""How the keys of the configuration begin with whose values a network means something."""
_FREE = {
    "cdm": {"dropout", "level_unit"},
    "classifier": {"dropout", "level_unit"},
    "decoder": {"dtype", "store", "store_gib"},
}
"""How those end that may have another value: it serves training alone, or changes results by rounding."""


@dataclass(frozen=True)
class DatasetRecord:
    """What the networks' inputs and outputs mean.

    acquisition: of the training images, as far as it is known. window: that their intensities were cut to, in stored
    units; None: robust scaling of each study, or a run of before this was recorded. Records that differ in these two
    alone are equal.
    """

    class_names: tuple[str, ...]
    channel_names: tuple[str, ...]
    acquisition: Acquisition = field(default_factory=Acquisition, compare=False)
    window: tuple[float, float] | None = field(default=None, compare=False)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def num_channels(self) -> int:
        return len(self.channel_names)


class Run:
    """Reads and writes one RUN directory. Writing is atomic, file by file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def split_file(self) -> Path:
        return self.path / "split.csv"

    @property
    def feature_folder(self) -> Path:
        return self.path / "features"

    def create(self, config: Config, record: DatasetRecord) -> None:
        """Make the directory and write the configuration and the data set's record."""
        self.path.mkdir(parents=True, exist_ok=True)
        save_config(config, self.path / "config.yaml")
        atomic_write_text(self.path / "dataset.json", json.dumps(asdict(record), indent=2) + "\n")

    def config(self) -> Config:
        """The resolved configuration."""
        if not (self.path / "config.yaml").exists():
            raise CheckpointError(f"{self.path}: is no run directory (config.yaml is missing); train one first")
        return load_config(self.path / "config.yaml")

    def record(self) -> DatasetRecord:
        """What the run was trained on."""
        try:
            content = json.loads((self.path / "dataset.json").read_text(encoding="utf-8"))
            names = tuple(content["class_names"]), tuple(content["channel_names"])
            # Runs of before this was recorded have what was asked for.
            window = content.get("window") if "window" in content else _asked_window(self.config())
            acquisition = Acquisition.from_json(content.get("acquisition"))
            return DatasetRecord(*names, acquisition, None if window is None else checked_window(window))
        except (OSError, ValueError, KeyError, TypeError, DataError) as error:
            raise CheckpointError(f"{self.path / 'dataset.json'}: can't be read ({error})") from error

    def has(self, network: str) -> bool:
        """Whether a network ("cdm", "classifier", "decoder") is trained."""
        return (self.path / f"{network}.safetensors").exists()

    def has_begun(self, network: str) -> bool:
        """Whether there is a checkpoint of its training."""
        return (self.path / f"{network}.checkpoint").exists()

    def save_network(self, name: str, module: nn.Module) -> None:
        """Write the weights of a "cdm" or "classifier", with the settings of config.yaml that they are bound to.

        A file that holds these weights stays as it is: others know it by its bytes.
        """
        if self._holds(name, module):
            return
        with self._replacing(name):
            self._write(f"{name}.safetensors", module.state_dict(), _bound(self.config(), name))

    def check_settings(self, name: str, config: Config) -> None:
        """Raise CheckpointError where a network was trained with other settings than a configuration's."""
        path = self.path / f"{name}.safetensors"
        if (other := _other_setting(path, config, name)) is not None:
            raise CheckpointError(f"{path}: does not fit config.yaml: {other}; set it back, or train the {name} again")

    def _holds(self, name: str, module: nn.Module) -> bool:
        try:
            here = load_file(self.path / f"{name}.safetensors")
        except (OSError, SafetensorError):
            return False
        there = module.state_dict()
        return here.keys() == there.keys() and all(here[key].equal(there[key].cpu()) for key in here)

    def adopt(self, name: str, loaded: Loaded) -> None:
        """Put a converted network in the place of a trained "cdm" or "classifier"."""
        with self._replacing(name):
            save(self.path / f"{name}.safetensors", loaded)
        (self.path / f"{name}.checkpoint").unlink(missing_ok=True)

    @contextmanager
    def _replacing(self, name: str) -> Iterator[None]:
        """Remove what was made with the network that was here before, if another one is here after."""
        before = self.network_digests()
        yield
        if self.network_digests() != before:
            # A decoder that was begun learns from other features now: resuming it would pass it off as theirs.
            (self.path / "decoder.checkpoint").unlink(missing_ok=True)
            if name == "cdm":
                self.drop_features()

    def save_decoder(
        self, decoder: PixelDecoder, prototypes: Prototypes, label_threshold: Tensor, seed: int = 0
    ) -> None:
        """Write a decoder with its prototypes, their bias and temperature, and the image-level thresholds.

        seed: 0 for the run's own; n for the n-th further one, which repeats the run's figures with another seed.
        The digests of the networks they were made with go along: with others, decoder and prototypes mean nothing.
        """
        folder = self._seeded(seed)
        folder.path.mkdir(exist_ok=True)
        folder._write("decoder.safetensors", decoder.state_dict(), _bound(self.config(), "decoder"))
        tensors = {
            "vectors": prototypes.vectors,
            "bias": prototypes.bias,
            "temperature": torch.tensor(prototypes.temperature),
            "label_threshold": label_threshold,
        }
        folder._write(_DECISION, tensors, self.network_digests() | {"decoder": folder._digest("decoder")})

    def has_decoder(self, seed: int) -> bool:
        """Whether the run's own decoder (0) or a further one is trained, with the networks and the settings that are
        here now."""
        folder = self._seeded(seed)
        return (
            folder.has("decoder")
            and (folder.path / _DECISION).exists()
            and not self._other_networks(folder)
            and _other_setting(folder.path / "decoder.safetensors", self.config(), "decoder") is None
        )

    def drop_further_decoders(self) -> None:
        """Remove the decoders of further seeds: they belong to a decoder, and a configuration, that are replaced."""
        for folder in self.path.glob("decoder-seed-*"):
            shutil.rmtree(folder)

    def drop_features(self) -> None:
        """Remove the stored features: they are another network's, or will not be read again."""
        shutil.rmtree(self.feature_folder, ignore_errors=True)

    def _seeded(self, seed: int) -> Run:
        return self if seed == 0 else Run(self.path / f"decoder-seed-{seed}")

    def _other_networks(self, folder: Run) -> list[str]:
        """The networks that prototypes were not made with, as far as their file says."""
        recorded = _metadata(folder.path / _DECISION)
        here = self.network_digests() | {"decoder": folder._digest("decoder")}
        return [name for name, digest in here.items() if recorded.get(name, digest) != digest]

    def load(self, *, decoder: bool = True, seed: int = 0, store: bool = False) -> CLDF:
        """The CDM and classifier, and the decoder with its prototypes where they are trained and wanted.

        seed: which decoder, see `save_decoder`. store: keep features in the run, if its configuration has a store; for
        images that are read again.
        Raises CheckpointError where a file is missing, damaged or does not fit, also if the CDM or the classifier was
        trained again after the decoder, or config.yaml holds another setting than a network was trained with.
        """
        config, record = self.config(), self.record()
        unet, classifier = self._cdm(config, record), self._classifier(config, record)
        folder = self._seeded(seed)
        kept = self.feature_folder if store else None
        if not (decoder and folder.has("decoder")):
            return CLDF(config, unet, classifier, store=kept)
        trained = self._decoder(folder, config, unet)
        return CLDF(config, unet, classifier, trained, *self._decision(folder, config, record), store=kept)

    def _cdm(self, config: Config, record: DatasetRecord) -> UNet | AdoptedUNet:
        if self._is_converted("cdm"):
            loaded = load(self.path / "cdm.safetensors", kind="unet")
            return adopt_unet(config, loaded, record.class_names, record.channel_names)
        unet = build_unet(config.cdm.network, record.num_channels, record.num_classes)
        self._load_into("cdm", unet, config)
        return unet

    def _classifier(self, config: Config, record: DatasetRecord) -> NoiseAwareClassifier | AdoptedClassifier:
        if self._is_converted("classifier"):
            loaded = load(self.path / "classifier.safetensors", kind="classifier")
            return adopt_classifier(config, loaded, record.class_names, record.channel_names)
        classifier = build_classifier(config, record.num_channels, record.num_classes)
        self._load_into("classifier", classifier, config)
        return classifier

    def _is_converted(self, name: str) -> bool:
        path = self.path / f"{name}.safetensors"
        try:
            return path.exists() and describes_itself(path)
        except (OSError, SafetensorError):
            return False  # which reading the tensors explains

    def _decoder(self, folder: Run, config: Config, unet: UNet | AdoptedUNet) -> PixelDecoder:
        channels = build_features(config, unet).channels
        decoder = PixelDecoder(channels, hidden=config.decoder.hidden, embedding=config.decoder.embedding)
        folder._load_into("decoder", decoder, config)
        return decoder

    def _decision(self, folder: Run, config: Config, record: DatasetRecord) -> tuple[Prototypes, Tensor]:
        classes, embedding = record.num_classes, config.decoder.embedding
        tensors = folder._read(_DECISION)
        shapes = {key: list(value.shape) for key, value in tensors.items()}
        per_class = shapes.get("vectors", [0, 0])[1:2]
        expected = {
            "bias": [classes + 1],
            "label_threshold": [classes],
            "temperature": [],
            "vectors": [classes + 1, *per_class, embedding],
        }
        if shapes != expected:
            raise CheckpointError(
                f"{folder.path / _DECISION}: does not fit the run, expected shapes {expected}, got {shapes}; "
                "train the decoder again"
            )
        for network in self._other_networks(folder):
            made = "prototypes were made" if network == "decoder" else "decoder was trained"
            raise CheckpointError(
                f"{self.path}: {network}.safetensors is not the one that the {made} with; train the decoder again"
            )
        prototypes = Prototypes(tensors["vectors"], tensors["bias"], float(tensors["temperature"]))
        return prototypes, tensors["label_threshold"]

    def network_digests(self) -> dict[str, str]:
        """SHA-256 of the files of the networks that a decoder depends on, as far as they are there."""
        return {name: self._digest(name) for name in ("cdm", "classifier") if self.has(name)}

    def _digest(self, name: str) -> str:
        return hashlib.sha256((self.path / f"{name}.safetensors").read_bytes()).hexdigest()

    def _write(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        write_tensors(self.path / name, tensors, metadata)

    def _read(self, name: str) -> dict[str, Tensor]:
        path = self.path / name
        if not path.exists():
            raise CheckpointError(f"{path}: is missing; train that network first")
        try:
            # Weights may be stored in half precision to save space; arithmetic is in float32.
            return {key: value.float() for key, value in load_file(path).items()}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: can't be read ({error}); it is truncated or not a safetensors file"
            ) from error

    def _load_into(self, name: str, module: nn.Module, config: Config) -> None:
        weights = self._read(f"{name}.safetensors")
        self.check_settings(name, config)
        try:
            module.load_state_dict(weights)
        except RuntimeError as error:
            first = str(error).splitlines()[1 if "\n" in str(error) else 0].strip()
            raise CheckpointError(
                f"{self.path / name}.safetensors: does not fit the network of config.yaml ({first})"
            ) from error


def _bound(config: Config, name: str) -> dict[str, str]:
    """Metadata for a network's file: the settings that it is bound to."""
    return {_SETTINGS: json.dumps(_settings(config, name))}


def _settings(config: Config, name: str) -> dict[str, Any]:
    return {
        key: value
        for key, value in flat(config).items()
        if key.startswith(_BINDING[name]) and key.rpartition(".")[2] not in _FREE[name]
    }


def _other_setting(path: Path, config: Config, name: str) -> str | None:
    """What a network's file says that it was trained with and the configuration holds another value of; None: nothing.

    Files of before this was recorded, and networks that were converted, say nothing.
    """
    here = _settings(config, name)
    for key, value in json.loads(_metadata(path).get(_SETTINGS, "{}")).items():
        if here.get(key, value) != value:
            return f"trained with {key} {value}, which is {here[key]} now"
    return None


def _asked_window(config: Config) -> Any:
    """The window that a data set was opened with, as far as a configuration tells."""
    if config.data.dataset == "chaos" and config.data.options.get("modality") == "ct":
        from cldf_fast.data.chaos import CT_WINDOW

        return config.data.options.get("window") or CT_WINDOW
    return config.data.options.get("window")


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}
