"""Every default in one place, typed and validated, read from YAML.

The paper's own hyper-parameters are not available: every value here is this project's choice, made by measurement on
the phantom and on LGG, and may be changed in a run's configuration. Unknown keys are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cldf_fast.errors import ConfigError
from cldf_fast.files import atomic_write_text

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Factor = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    """A part of the configuration: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class NetworkConfig(Section):
    """Width and depth of a UNet or of a classifier (see `models.unet.UNet`)."""

    model_channels: Positive = 32
    channel_mult: tuple[Factor, ...] = Field(default=(1, 2, 3, 4), min_length=1)
    num_res_blocks: Positive = 1
    attention_downsample: tuple[int, ...] = (8,)
    dropout: Fraction = 0.0


class ClassifierNetworkConfig(NetworkConfig):
    """The classifier's network, as guided-diffusion's: attention pooling learns small structures much faster than an
    average over the image, and average pooling between the levels keeps gradient maps free of the checkerboards of
    strided convolutions."""

    channel_mult: tuple[Factor, ...] = Field(default=(0.5, 1, 2, 4), min_length=1)
    resblock_updown: bool = True
    pool: Literal["attention", "adaptive", "spatial", "spatial_v2", "mean"] = "attention"


class UNetConfig(NetworkConfig):
    """The CDM's network. patch_size 2 costs a quarter of the arithmetic of 1, which is what a CPU can train."""

    patch_size: Positive = 2


class DiffusionConfig(Section):
    """The forward process of networks that are trained here; converted ones have their own.

    rescale_timesteps: the network reads t * 1000 / T (improved-diffusion's default).
    """

    timesteps: Positive = 1000
    schedule: Literal["linear", "cosine"] = "linear"
    rescale_timesteps: bool = False
    level_unit: Literal["fraction", "alpha_bar"] = Field(
        default="fraction", description="what evidence.noise_levels and features.noise_levels are counted in"
    )


class OptimisationConfig(Section):
    """How a network is trained. A step sees batch_size images over all processes together."""

    steps: Positive = 2000
    batch_size: Positive = 16
    learning_rate: float = Field(default=5e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=100, ge=0)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0)
    augment: bool = True
    save_every: Positive = 250
    log_every: Positive = 10


class CDMConfig(Section):
    """The conditional diffusion model."""

    network: UNetConfig = UNetConfig()
    optimisation: OptimisationConfig = OptimisationConfig(steps=4000)
    null_probability: Fraction = Field(default=0.1, description="share of images trained with the null condition")
    low_noise_share: Fraction = Field(
        default=0.5,
        description="share of images whose noise level is drawn from the lowest 30% of the levels, where "
        "features are read; the rest is drawn from all levels",
    )


class ClassifierConfig(Section):
    """The noise-aware multi-label classifier."""

    network: ClassifierNetworkConfig = ClassifierNetworkConfig()
    optimisation: OptimisationConfig = OptimisationConfig(steps=1200, learning_rate=7e-4, weight_decay=0.05)
    max_noise: Fraction = Field(default=0.25, description="highest noise level trained on, as a fraction of T")
    clean_share: Fraction = Field(default=0.3, description="share of images trained without noise")


class EvidenceConfig(Section):
    """From the classifier to pixel labels."""

    noise_levels: tuple[Fraction, ...] = Field(default=(0.0, 0.05, 0.1, 0.2), min_length=1)
    draws: Positive = Field(default=1, description="noise draws for each level")
    average_views: bool = Field(
        default=False,
        description="average the maps of the image and of a second view, moved by a pixel and (with data.mirror) "
        "mirrored; twice the work",
    )
    target: Literal["log_probability", "logit"] = "log_probability"
    reduce: Literal["max_abs", "sum_abs", "l2"] = "sum_abs"
    sigma: float = Field(default=1.5, ge=0, description="Gaussian smoothing of the gradient map, working pixels")
    percentile: float = Field(default=0.99, gt=0.0, le=1.0)
    cam: Literal["layercam", "gradcam"] = "layercam"
    cam_downsample: Positive = Field(default=4, description="downsampling factor of the activations that the CAM reads")
    foreground_gradient: Fraction = 0.35
    foreground_cam: Fraction = 0.03
    background_gradient: Fraction = 0.1
    background_cam: Fraction = 0.3


class FeatureConfig(Section):
    """What is read from the frozen CDM.

    One low noise level and the finest blocks: more levels and coarser blocks fitted the training patients better and
    others worse, on the phantom and on LGG.
    """

    noise_levels: tuple[Fraction, ...] = Field(default=(0.01,), min_length=1)
    downsample: tuple[int, ...] = Field(
        default=(4, 2), min_length=1, description="downsampling factors of the UNet blocks that are read"
    )
    prediction: bool = Field(default=True, description="also read the clean image that the CDM predicts")
    condition: Literal["label", "null"] = "null"
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="precision of the CDM's convolutions and products"
    )
    store: Literal["off", "float16", "int8"] = Field(
        default="off",
        description="keep features in the run, rounded so, for training further decoders and evaluating again",
    )
    store_gib: float = Field(default=10.0, gt=0, description="bound on the store, GiB")

    @field_validator("condition", mode="before")
    @classmethod
    def _null_is_a_word(cls, value: object) -> object:
        # To YAML it is the absence of a value.
        return "null" if value is None else value


class DecoderConfig(Section):
    """The pixel decoder and its contrastive training."""

    hidden: Positive = 128
    embedding: Positive = 64
    dropout: Fraction = 0.1
    anchors_per_class: Positive = Field(default=32, description="anchor pixels an image and class")
    passes: Positive = Field(default=2, description="augmented readings of every training image's features")
    temperature: float = Field(default=0.1, gt=0)
    variant: Literal["per_positive", "supcon"] = "supcon"
    optimisation: OptimisationConfig = OptimisationConfig(
        steps=1500, batch_size=16, learning_rate=1e-3, weight_decay=1e-2, warmup_steps=50, save_every=500
    )


class SegmentationConfig(Section):
    """From embeddings to masks."""

    prototypes_per_class: Positive = 8
    temperature: float = Field(default=0.1, gt=0)
    average_views: bool = Field(
        default=True,
        description="average the image and a second view of it, moved by a pixel and (with data.mirror) mirrored; "
        "twice the work",
    )
    evidence_weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of the image's own gradient map in the decision: so much of its log-odds, counted from "
        "evidence.foreground_gradient, is added to the decoder's",
    )


class DataConfig(Section):
    """What the run is trained on. size: working size in pixels, square; networks see every slice at this size."""

    dataset: Literal["phantom", "labelled", "lgg", "brats", "chaos", "nnunet"] = "phantom"
    size: Positive = 64
    options: dict[str, Any] = Field(default_factory=dict, description="arguments of the data set's reader")
    mirror: bool = Field(
        default=True,
        description="augment by mirroring left and right; switch off where they differ, as in an abdomen",
    )
    gamma: float = Field(
        default=0.0,
        ge=0,
        description="augment classifier and decoder by raising each channel to a power between exp(-gamma) and "
        "exp(gamma): for studies of many scanners",
    )


class Config(Section):
    """A whole run."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    cdm: CDMConfig = CDMConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    evidence: EvidenceConfig = EvidenceConfig()
    features: FeatureConfig = FeatureConfig()
    decoder: DecoderConfig = DecoderConfig()
    segmentation: SegmentationConfig = SegmentationConfig()

    @model_validator(mode="after")
    def _size_fits_the_networks(self) -> Config:
        for name, network in (("cdm", self.cdm.network), ("classifier", self.classifier.network)):
            factor = getattr(network, "patch_size", 1) * 2 ** (len(network.channel_mult) - 1)
            if self.data.size % factor:
                raise ValueError(f"data.size: expected a multiple of {factor} ({name}'s depth), got {self.data.size}")
        return self

    @model_validator(mode="after")
    def _blocks_that_are_read_exist(self) -> Config:
        cdm, classifier = self.cdm.network, self.classifier.network
        for key, asked, levels, patch_size in (
            ("features.downsample", self.features.downsample, len(cdm.channel_mult), cdm.patch_size),
            ("evidence.cam_downsample", (self.evidence.cam_downsample,), len(classifier.channel_mult), 1),
        ):
            there = [patch_size * 2**level for level in range(levels)]
            missing = [factor for factor in asked if factor not in there]
            if missing:
                raise ValueError(f"{key}: expected factors among {there}, which the network has, got {missing[0]}")
        return self

    @model_validator(mode="after")
    def _levels_are_in_their_unit(self) -> Config:
        if self.diffusion.level_unit == "alpha_bar":
            for key, section in (("evidence", self.evidence), ("features", self.features)):
                if "noise_levels" not in section.model_fields_set or min(section.noise_levels) <= 0:
                    raise ValueError(
                        f"{key}.noise_levels: expected alpha-bars above 0 with diffusion.level_unit alpha_bar (the "
                        f"defaults are fractions), got {section.noise_levels}"
                    )
        return self


def load_config(path: Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read a YAML configuration; values of `overrides` (a nested mapping) win. Raises ConfigError, naming the key."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {type(content).__name__}")
    return make_config(_merged(content, overrides or {}), source=str(path))


def make_config(values: dict[str, Any], source: str = "configuration") -> Config:
    """Validate a nested mapping. Raises ConfigError with one sentence that names the first wrong key."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{source}: {key}: there is no such key; {_meant(first['loc'])}") from error
        # A rule between sections names its key itself, and its input would be the whole configuration.
        message = (
            f"{key}: {first['msg']}, got {first['input']!r}" if key else first["msg"].removeprefix("Value error, ")
        )
        raise ConfigError(f"{source}: {message}") from error


def _meant(place: Sequence[int | str]) -> str:
    """Which key may have been meant by an unknown one at this place."""
    section: Any = Config
    for part in place[:-1]:
        section = section.model_fields[part].annotation
    known = list(section.model_fields)
    close = get_close_matches(str(place[-1]), known, n=1)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"


def flat(section: Section) -> dict[str, Any]:
    """Every value by its dotted key, such as "cdm.network.model_channels", as YAML would hold it."""
    found: dict[str, Any] = {}

    def collect(values: dict[str, Any], above: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                collect(value, f"{above}{key}.")
            else:
                found[above + key] = value

    collect(section.model_dump(mode="json"), "")
    return found


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML, atomically."""
    atomic_write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _merged(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overrides.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if nested else value
    return merged
