"""CLDF as a whole: the frozen networks, the decoder and its prototypes, from images to masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cldf_fast.config import Config, UNetConfig
from cldf_fast.data.intensity import check_pixels
from cldf_fast.diffusion import Diffusion
from cldf_fast.errors import CheckpointError, ConfigError, DataError
from cldf_fast.evidence import ClassifierSaliency, Evidence
from cldf_fast.features import DiffusionFeatures, FeatureReader
from cldf_fast.models.adopted import AdoptedClassifier, AdoptedUNet
from cldf_fast.models.checkpoints import Loaded
from cldf_fast.models.classifier import NoiseAwareClassifier
from cldf_fast.models.conditions import label_condition, null_condition, num_conditions
from cldf_fast.models.decoder import PixelDecoder
from cldf_fast.models.unet import UNet
from cldf_fast.ops._arguments import check_tensor
from cldf_fast.segmentation import Prototypes, masks_from_probability, second_view
from cldf_fast.store import FeatureStore

Module = TypeVar("Module", bound=nn.Module)

_FARTHEST = 0.01  # from 0 and 1, where a gradient map's log-odds are cut
_BATCH = 16  # images in one pass; results do not depend on it


@dataclass(frozen=True)
class Segmentation:
    """Result for a batch at the working size.

    mask: uint8 [B, H, W], 0 background, 1..K. probability: float32 [B, K + 1, H, W], background first, sums to 1,
    before absent classes are ruled out. label_probability: float32 [B, K], the classifier's; None where labels were
    given, since it wasn't run then. present: bool [B, K], the image-level labels that were used.
    """

    mask: Tensor
    probability: Tensor
    label_probability: Tensor | None
    present: Tensor


def build_unet(config: UNetConfig, in_channels: int, num_classes: int) -> UNet:
    """The CDM for K foreground classes."""
    return UNet(in_channels, num_classes=num_conditions(num_classes), **config.model_dump())


def build_classifier(config: Config, in_channels: int, num_classes: int) -> NoiseAwareClassifier:
    """The classifier for K foreground classes, at the configuration's working size."""
    network = config.classifier.network.model_dump()
    return NoiseAwareClassifier(in_channels, num_classes=num_classes, image_size=config.data.size, **network)


def adopt_unet(config: Config, loaded: Loaded, class_names: Sequence[str], channel_names: Sequence[str]) -> AdoptedUNet:
    """A converted UNet as the CDM of a configuration. Raises ConfigError where it does not fit."""
    unet = AdoptedUNet(
        loaded,
        class_names=class_names,
        channel_names=channel_names,
        size=config.data.size,
        level_unit=config.diffusion.level_unit,
    )
    if config.features.condition == "label" and not unet.conditional:
        raise ConfigError(
            f"features.condition: expected null, because {loaded.description.source} has no class table, got label"
        )
    return unet


def adopt_classifier(
    config: Config, loaded: Loaded, class_names: Sequence[str], channel_names: Sequence[str]
) -> AdoptedClassifier:
    """A converted classifier as that of a configuration. Raises ConfigError where it does not fit."""
    return AdoptedClassifier(
        loaded,
        class_names=class_names,
        channel_names=channel_names,
        size=config.data.size,
        level_unit=config.diffusion.level_unit,
    )


def build_diffusion(config: Config) -> Diffusion:
    """The forward process of a configuration."""
    return Diffusion(**config.diffusion.model_dump())


def process_of(config: Config, network: UNet | AdoptedUNet | NoiseAwareClassifier | AdoptedClassifier) -> Diffusion:
    """The forward process that a network of a run was trained on: the configuration's, or a converted one's own."""
    return network.diffusion if isinstance(network, AdoptedUNet | AdoptedClassifier) else build_diffusion(config)


def build_saliency(config: Config, classifier: NoiseAwareClassifier | AdoptedClassifier) -> ClassifierSaliency:
    """The saliency of a configuration's evidence section."""
    evidence, diffusion = config.evidence, process_of(config, classifier)
    steps = diffusion.steps_of(evidence.noise_levels)
    return ClassifierSaliency(
        classifier,
        alpha_bar=diffusion.alpha_bar[steps],
        timesteps=diffusion.network_time(steps),
        cam_layer=classifier.block_at(evidence.cam_downsample),
        cam=evidence.cam,
        target=evidence.target,
        reduce=evidence.reduce,
        percentile=evidence.percentile,
        sigma=evidence.sigma,
        draws=evidence.draws,
    )


def build_features(config: Config, unet: UNet | AdoptedUNet, folder: Path | None = None) -> FeatureReader:
    """The feature reader of a configuration's features section; with its store, if it has one and a folder is given."""
    features = DiffusionFeatures(
        unet,
        process_of(config, unet),
        noise_levels=config.features.noise_levels,
        downsample=config.features.downsample,
        prediction=config.features.prediction,
        dtype=getattr(torch, config.features.dtype),
    )
    if folder is None or config.features.store == "off":
        return features
    return FeatureStore(features, folder, dtype=config.features.store, max_bytes=int(config.features.store_gib * 2**30))


class CLDF:
    """Frozen CDM and classifier, and where it was trained, the pixel decoder with its prototypes.

    diffusion: the CDM's process; a converted classifier may have been trained on another.
    label_threshold: float32 [K], the classifier's probability from which a class counts as present.
    store: folder that features are kept in, where the configuration says so; None: they are not.
    """

    def __init__(
        self,
        config: Config,
        unet: UNet | AdoptedUNet,
        classifier: NoiseAwareClassifier | AdoptedClassifier,
        decoder: PixelDecoder | None = None,
        prototypes: Prototypes | None = None,
        label_threshold: Tensor | None = None,
        store: Path | None = None,
    ) -> None:
        self.config = config
        self.diffusion = process_of(config, unet)
        self.unet = freeze(unet)
        self.classifier = freeze(classifier)
        self.num_classes = classifier.num_classes
        self.saliency = build_saliency(config, classifier)
        self.features = build_features(config, unet, store)
        self.decoder = decoder if decoder is None else freeze(decoder)
        self.prototypes = prototypes
        self.label_threshold = torch.full((self.num_classes,), 0.5) if label_threshold is None else label_threshold

    @property
    def device(self) -> torch.device:
        """Where the networks are; images may be anywhere, results come back to the CPU."""
        return next(self.unet.parameters()).device

    def to(self, device: torch.device) -> CLDF:
        """Move the networks and the prototypes; returns itself."""
        self.unet.to(device)
        self.classifier.to(device)
        if self.decoder is not None:
            self.decoder.to(device)
        if self.prototypes is not None:
            self.prototypes = replace(
                self.prototypes, vectors=self.prototypes.vectors.to(device), bias=self.prototypes.bias.to(device)
            )
        return self

    def thresholds(self) -> tuple[float, float, float, float]:
        """The four thresholds of the fusion, in the order of `ops.fuse_evidence`."""
        evidence = self.config.evidence
        return (
            evidence.foreground_gradient,
            evidence.foreground_cam,
            evidence.background_gradient,
            evidence.background_cam,
        )

    def classifier_time(self, step: int) -> Tensor:
        """What the classifier is told [1] of x_t at a step of `diffusion`: of its own process, the nearest in noise."""
        own = process_of(self.config, self.classifier)
        if not own.alpha_bar.equal(self.diffusion.alpha_bar):
            step = own.step_of_alpha_bar(float(self.diffusion.alpha_bar[step]))
        return own.network_time(torch.tensor([step]))

    def conditions(self, present: Tensor) -> Tensor:
        """What the CDM is conditioned on for image-level labels bool [B, K]: [B, K + 2]."""
        if self.config.features.condition == "null":
            return null_condition(len(present), self.num_classes, present.device)
        return label_condition(present)

    def evidence(self, images: Tensor, chosen: Tensor | None = None) -> Evidence:
        """Gradient maps, CAMs and label probabilities of images [N, C, H, W], in batches.

        chosen: bool [N], the images that evidence is asked for, by default all; the others' is zero.
        Raises DataError, naming the first image, where pixels are not in [-1, 1] or evidence is not finite.
        """
        self._check_images(images)
        rows = torch.arange(len(images)) if chosen is None else chosen.nonzero().flatten()
        shape = (len(images), self.num_classes)
        evidence = Evidence(
            torch.zeros(*shape, *images.shape[2:]), torch.zeros(*shape, *images.shape[2:]), torch.zeros(shape)
        )
        for batch in rows.split(_BATCH) if len(rows) else ():
            part = self.averaged(self.saliency, images[batch].to(self.device))
            evidence.gradient_map[batch] = part.gradient_map.cpu()
            evidence.cam[batch] = part.cam.cpu()
            evidence.probability[batch] = part.probability.cpu()
        _check_finite("evidence", *vars(evidence).values())
        return evidence

    def averaged(self, saliency: ClassifierSaliency, x: Tensor) -> Evidence:
        """Evidence for images [B, C, H, W] on the device, with evidence.average_views that of both views."""
        seen = saliency(x)
        if not self.config.evidence.average_views:
            return seen
        second = saliency(self._second_view(x))
        return Evidence(
            (seen.gradient_map + self._second_view(second.gradient_map, back=True)) / 2,
            (seen.cam + self._second_view(second.cam, back=True)) / 2,
            (seen.probability + second.probability) / 2,
        )

    def _label_probability(self, x: Tensor) -> Tensor:
        seen = self.saliency.probability(x)
        return (
            (seen + self.saliency.probability(self._second_view(x))) / 2 if self.config.evidence.average_views else seen
        )

    @torch.no_grad()
    def label_probability(self, images: Tensor) -> Tensor:
        """Image-level probabilities float32 [N, K]: `Evidence.probability`, without any gradient.

        Raises DataError, naming the first image, where pixels are not in [-1, 1] or probabilities not finite.
        """
        self._check_images(images)
        parts = torch.cat([self._label_probability(batch.to(self.device)).cpu() for batch in images.split(_BATCH)])
        _check_finite("probabilities", parts)
        return parts

    @torch.no_grad()
    def segment(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        evidence: Evidence | None = None,
        *,
        everywhere: bool = True,
    ) -> Segmentation:
        """Masks of images float32 [N, C, size, size] in [-1, 1].

        labels: bool [N, K], given image-level labels; None: the classifier's prediction is used. evidence: what
        `evidence` gave for these images, so that it isn't computed again; read only with an evidence_weight, and for
        images that show a class: the others' probabilities are the decoder's alone.
        everywhere: False leaves images that show no class to be all background, which their masks are anyway.
        An image's mask depends neither on the batch nor on the order.
        Raises DataError, naming the first image, where pixels are not in [-1, 1] or results not finite.
        """
        if self.decoder is None or self.prototypes is None:
            raise CheckpointError(
                "segment: expected a trained decoder and prototypes, got none; train the decoder first"
            )
        self._check_images(images)
        if labels is not None:
            check_tensor("labels", labels, torch.bool, (len(images), self.num_classes))
        predicted = None
        if labels is None:
            predicted = self.label_probability(images)
            labels = predicted >= self.label_threshold
        present = labels.cpu()
        weighs_evidence = bool(self.config.segmentation.evidence_weight)
        if weighs_evidence and evidence is None:
            evidence = self.evidence(images, present.any(dim=1))
        probability = torch.zeros(len(images), self.num_classes + 1, *images.shape[2:])
        probability[:, 0] = 1
        mask = torch.zeros(len(images), *images.shape[2:], dtype=torch.uint8)
        rows = (present.any(dim=1) | everywhere).nonzero().flatten()
        for batch in rows.split(_BATCH) if len(rows) else ():
            found = self._averaged_probability(images[batch].to(self.device), present[batch].to(self.device))
            if weighs_evidence:
                assert evidence is not None
                weighed = self._with_evidence(found, evidence.gradient_map[batch].to(self.device))
                shows = present[batch].any(dim=1).to(self.device)
                found = torch.where(shows[:, None, None, None], weighed, found)
            probability[batch] = found.cpu()
            mask[batch] = masks_from_probability(probability[batch], present[batch])
        _check_finite("probabilities", probability)
        return Segmentation(mask, probability, predicted, present)

    def _check_images(self, images: Tensor) -> None:
        size = self.config.data.size
        check_tensor("images", images, torch.float32, ("N", self.unet.in_channels, size, size))
        # NaN reaches no threshold: the mask would be empty, as if the image had been found healthy.
        lowest, highest = images.flatten(1).aminmax(dim=1)
        check_pixels(lowest.float().cpu().numpy(), highest.float().cpu().numpy())

    def _averaged_probability(self, x: Tensor, present: Tensor) -> Tensor:
        """Class probabilities [B, K + 1, H, W] by the decoder, of both views where they are averaged."""
        condition = self.conditions(present)
        probability = self._probability(x, condition)
        if not self.config.segmentation.average_views:
            return probability
        second = self._probability(self._second_view(x), condition)
        return (probability + self._second_view(second, back=True)) / 2

    def _probability(self, x: Tensor, condition: Tensor) -> Tensor:
        """Class probabilities [B, K + 1, H, W] of one view."""
        assert self.decoder is not None
        assert self.prototypes is not None
        embeddings = self.decoder.embed(self.features, x, condition)
        return self.prototypes.probability(embeddings.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _with_evidence(self, probability: Tensor, gradient_map: Tensor) -> Tensor:
        """Log-odds of the gradient maps [B, K, H, W], weighted, added to the decoder's."""
        neutral = torch.tensor(self.config.evidence.foreground_gradient).logit(_FARTHEST)
        shift = self.config.segmentation.evidence_weight * (gradient_map.logit(_FARTHEST) - neutral)
        return (probability.log() + F.pad(shift, (0, 0, 0, 0, 1, 0))).softmax(dim=1)

    def _second_view(self, maps: Tensor, *, back: bool = False) -> Tensor:
        return second_view(maps, mirror=self.config.data.mirror, back=back)


def _check_finite(what: str, *values: Tensor) -> None:
    """Raise DataError unless all that there is of N images, [N, ...] each, is finite."""
    finite = torch.stack([each.isfinite().flatten(1).all(dim=1) for each in values]).all(dim=0)
    if not finite.all():
        raise DataError(
            f"images: expected finite {what}, got NaN or infinity for image {int(finite.int().argmin())}; the "
            f"networks' weights are not finite, or its gradient overflows"
        )


def freeze(module: Module) -> Module:
    """Evaluation mode, parameters without gradient."""
    return module.eval().requires_grad_(False)
