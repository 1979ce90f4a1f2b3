"""A decoder trained by the public procedures that CLDF is made of: what `bench_pipeline` compares the project with.

Written anew from descriptions of the public code. What differs from the project is how the same things are computed:

    evidence    guided-diffusion's gradient and the CAM tools' CAM, each in passes of its own, one noise level and class
                after the other, in numpy and scipy from there on
    features    ddpm-segmentation's: hooks in a pass of the whole UNet for every noise level, all blocks resized to the
                image's size and concatenated
    anchors     ContrastiveSeg's loops over images and classes; a class of too few pixels is dropped. There is no
                segmentation head to be wrong, so all pixels count as easy ones, drawn uniformly
    loss        the matrix of all pairs

What is no procedure of theirs is the project's own code: noise, augmentation, optimiser and schedule, prototypes and
their calibration, image-level thresholds. So are the hyper-parameters. Images go through networks in batches of 16.

Three ways to train:

    per step    as ContrastiveSeg trains: a step reads its images, augmented, and embeds every pixel, since the
                projection head is a convolution and the loss picks its anchors from a map of embeddings
    at anchors  the same, but the decoder sees the anchors' features alone
    held        as ddpm-segmentation trains: full-size features of all images are read once and held in memory, without
                augmentation, and the decoder sees the anchors' features alone
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bench_anchors import contrastive_seg
from benchmarks.bench_features import concatenated, hooked
from benchmarks.bench_infonce import eager
from benchmarks.bench_saliency import (
    autograd_and_hooks,
    fused,
    logit,
    maps_by_level,
    mean_gradient,
    positive_gradient,
    smoothed_and_scaled,
)
from cldf_fast.data.packing import PackedSlices
from cldf_fast.models.classifier import NoiseAwareClassifier
from cldf_fast.models.decoder import PixelDecoder
from cldf_fast.models.unet import UNet
from cldf_fast.ops import noised_batch, pixel_seed
from cldf_fast.pipeline import CLDF
from cldf_fast.segmentation import Prototypes
from cldf_fast.training.decoder import AnchorBank, balanced_rows
from cldf_fast.training.engine import LossFunction, StepDraws
from cldf_fast.training.fit import Trainer, fit_on_anchors, label_thresholds

BATCH = 16  # images in one pass

Features = Callable[[Tensor, Tensor], Tensor]
"""(images [B, C, H, W], conditions [B, K + 2]) -> features of every pixel [B, H * W, C']."""


# --- Evidence ---------------------------------------------------------------------------------------------------------


def evidence_of(cldf: CLDF) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """images [B, C, H, W] -> gradient maps and CAMs [B, K, H, W]."""
    settings = cldf.config.evidence
    steps = cldf.diffusion.steps_of(settings.noise_levels)
    alpha_bar, times = cldf.diffusion.alpha_bar[steps], cldf.diffusion.network_time(steps)
    # The tools leave a network's parameters as they are: with gradients. A copy, since hooks stay in it.
    assert isinstance(cldf.classifier, NoiseAwareClassifier)
    classifier = copy.deepcopy(cldf.classifier).requires_grad_()
    attributes = autograd_and_hooks(
        classifier,
        settings.cam_downsample,
        {"gradcam": mean_gradient, "layercam": positive_gradient}[settings.cam],
        {"logit": logit, "log_probability": F.logsigmoid}[settings.target],
    )
    finish = partial(smoothed_and_scaled, sigma=settings.sigma, percentile=settings.percentile)

    def evidence(x: Tensor) -> tuple[Tensor, Tensor]:
        noised = noised_batch(x, alpha_bar, pixel_seed(x))
        maps = maps_by_level(noised, times, len(x), cldf.num_classes, *attributes, finish)
        return torch.from_numpy(maps[0]), torch.from_numpy(maps[1])

    return evidence


def pixel_labels(cldf: CLDF, data: PackedSlices) -> Tensor:
    """Pixel labels int8 [N, H, W] of a part; slices without any class are background throughout."""
    evidence, image_labels = evidence_of(cldf), data.require_labels()
    labels = torch.zeros(len(data), *data.images.shape[2:], dtype=torch.int8)
    for rows in image_labels.any(dim=1).nonzero().flatten().split(BATCH):
        gradient_map, cam = evidence(data.images[rows])
        present = np.asarray(image_labels[rows])
        labels[rows] = torch.from_numpy(fused(gradient_map.numpy(), cam.numpy(), present, cldf.thresholds()))
    return labels


# --- Features ---------------------------------------------------------------------------------------------------------


def full_size_features(cldf: CLDF) -> Features:
    """What the configuration reads from the CDM, at full size."""
    settings = cldf.config.features
    steps = cldf.diffusion.steps_of(settings.noise_levels)
    alpha_bar, times = cldf.diffusion.alpha_bar[steps], cldf.diffusion.network_time(steps)
    unet = cldf.unet
    assert isinstance(unet, UNet)
    blocks = [i for i, factor in enumerate(unet.output_downsample) if factor in settings.downsample]

    @torch.no_grad()
    def features(x: Tensor, condition: Tensor) -> Tensor:
        by_level = []
        for x_t, step, time in zip(noised_batch(x, alpha_bar, pixel_seed(x)).split(len(x)), steps, times, strict=True):
            maps, noise = hooked(unet, blocks, x_t, time, condition)
            clean = cldf.diffusion.predict_x0(x_t, step.expand(len(x)), noise)
            by_level.append([*maps, clean] if settings.prediction else maps)
        return concatenated(by_level, (x.shape[2], x.shape[3])).flatten(2).transpose(1, 2)

    return features


def hold(features: Features, images: Tensor, conditions: Tensor) -> Tensor:
    """Features float32 [N, H * W, C'] of all images."""
    held = torch.empty(0)
    for first in range(0, len(images), BATCH):
        rows = slice(first, first + BATCH)
        batch = features(images[rows], conditions[rows])
        if first == 0:
            held = torch.empty(len(images), *batch.shape[1:])
        held[rows] = batch
    return held


# --- Anchors and loss -------------------------------------------------------------------------------------------------


def drawn_anchors(labels: Tensor, classes: int, per_class: int) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors of pixel labels int8 [B, H, W]: images, pixels and classes, int64 [A] each."""
    labels = labels.long()
    (drawn,) = contrastive_seg(labels, labels, classes, per_class)
    image, label, place = (drawn >= 0).nonzero(as_tuple=True)
    return image, drawn[image, label, place], label


def contrast(embeddings: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Mean loss of anchors' embeddings [A, D] against themselves."""
    own = torch.arange(len(labels))
    return eager(embeddings, embeddings, labels, labels, own, temperature).mean()


def loss_of_reading(
    cldf: CLDF, trainer: Trainer, pixel_labels: Tensor, features: Features, *, dense: bool
) -> LossFunction:
    """A step that augments and reads its images. dense: embed every pixel and pick the anchors, or the other way."""
    settings, classes = trainer.config.decoder, cldf.num_classes + 1
    images, conditions = trainer.train.images, cldf.conditions(trainer.train.require_labels())
    foreground = (pixel_labels > 0).flatten(1).any(dim=1)
    augmenter = trainer.augmenter(settings.optimisation)

    def loss(decoder: nn.Module, draws: StepDraws) -> Tensor:
        rows = balanced_rows(foreground, draws)
        x, labels = images[rows], pixel_labels[rows]
        if augmenter is not None:
            drawn = augmenter(len(x), x.shape[1], (x.shape[2], x.shape[3]), draws.generator)
            x, labels = drawn.images(x), drawn.labels(labels)
        read = features(x, conditions[rows])
        image, pixel, label = drawn_anchors(labels, classes, settings.anchors_per_class)
        embeddings = decoder(read)[image, pixel] if dense else decoder(read[image, pixel])
        return contrast(embeddings, label, settings.temperature)

    return loss


def loss_of_held(cldf: CLDF, trainer: Trainer, pixel_labels: Tensor, held: Tensor) -> LossFunction:
    """A step whose images were read before."""
    settings, classes = trainer.config.decoder, cldf.num_classes + 1
    foreground = (pixel_labels > 0).flatten(1).any(dim=1)

    def loss(decoder: nn.Module, draws: StepDraws) -> Tensor:
        rows = balanced_rows(foreground, draws)
        image, pixel, label = drawn_anchors(pixel_labels[rows], classes, settings.anchors_per_class)
        return contrast(decoder(held[rows[image], pixel]), label, settings.temperature)

    return loss


# --- Training ---------------------------------------------------------------------------------------------------------


def bank_of(pixel_labels: Tensor, read: Callable[[slice], Tensor], classes: int, per_class: int) -> AnchorBank:
    """Anchors of all images, by which the decoder is standardised and prototypes are found. read: features of rows."""
    parts = []
    for first in range(0, len(pixel_labels), BATCH):
        rows = slice(first, first + BATCH)
        image, pixel, label = drawn_anchors(pixel_labels[rows], classes, per_class)
        counts = (pixel_labels[rows].flatten(1).unsqueeze(1) == torch.arange(classes).unsqueeze(1)).sum(dim=2)
        parts.append((read(rows)[image, pixel], label, counts[image, label] / per_class))
    features, labels, weight = (torch.cat(column).unsqueeze(0) for column in zip(*parts, strict=True))
    return AnchorBank(features, labels, weight, (labels > 0).any(dim=1))


def _read(features: Features, images: Tensor, conditions: Tensor, rows: slice) -> Tensor:
    return features(images[rows], conditions[rows])


def fit_decoder(
    cldf: CLDF, trainer: Trainer, pixel_labels: Tensor, features: Features, way: str
) -> tuple[PixelDecoder, Prototypes, Tensor]:
    """As `training.fit.fit_decoder`. way: "per_step", "at_anchors" or "held"."""
    images, conditions = trainer.train.images, cldf.conditions(trainer.train.require_labels())
    read: Callable[[slice], Tensor]
    if way == "held":
        held = hold(features, images, conditions)
        loss, read = loss_of_held(cldf, trainer, pixel_labels, held), held.__getitem__
    else:
        loss = loss_of_reading(cldf, trainer, pixel_labels, features, dense=way == "per_step")
        read = partial(_read, features, images, conditions)
    torch.manual_seed(trainer.config.seed)  # what ContrastiveSeg's loops draw from
    bank = bank_of(pixel_labels, read, cldf.num_classes + 1, trainer.config.decoder.anchors_per_class)
    decoder, prototypes = fit_on_anchors(trainer, cldf.features.channels, bank, loss)
    return decoder, prototypes, label_thresholds(cldf, trainer.val)
