"""Contrastive training of the pixel decoder on features that are read once.

The CDM is frozen, so the features of an anchor pixel never change: they are read in one or more augmented passes over
the training images, at the anchors only, and held in memory (half precision). The steps then cost next to nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as distributed
from lightning_fabric import Fabric
from torch import Tensor, nn

from cldf_fast.config import DecoderConfig
from cldf_fast.errors import DataError
from cldf_fast.features import FeatureReader
from cldf_fast.losses import PixelInfoNCE
from cldf_fast.models.decoder import read_at
from cldf_fast.ops import sample_anchors
from cldf_fast.store import FeatureStore
from cldf_fast.training.augment import Augmenter
from cldf_fast.training.engine import LossFunction, StepDraws, derived_seed
from cldf_fast.training.progress import Progress

_READ_BATCH = 16  # images in one pass of the CDM
_STORE_RATE = 3e8  # bytes a second that a process reads from a feature store, on two cores
_WORTH_SAYING = 5.0  # seconds that a store would save


@dataclass(frozen=True)
class AnchorBank:
    """Anchors of N readings (images times passes) and what the CDM says about them.

    features: float16 [N, A, C]. labels: int64 [N, A], -1 where padding. weight: float32 [N, A], pixels of its image
    that an anchor stands for. foreground: bool [N], whether any foreground class is among the anchors.
    """

    features: Tensor
    labels: Tensor
    weight: Tensor
    foreground: Tensor

    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """(features [M, C], labels [M], weight [M]) of all anchors that are no padding."""
        kept = self.labels >= 0
        return self.features[kept], self.labels[kept], self.weight[kept]


def read_anchors(
    images: Tensor,
    pixel_labels: Tensor,
    conditions: Tensor,
    features: FeatureReader,
    *,
    num_classes: int,
    per_class: int,
    passes: int,
    augmenter: Augmenter | None,
    seed: int,
    fabric: Fabric,
    quiet: bool = False,
) -> AnchorBank:
    """Sample anchors in every image and read their features.

    images: float32 [N, C, H, W]. pixel_labels: int8 [N, H, W]. conditions: [N, ...], for the CDM. num_classes counts
    background. The first pass sees the images as they are, further ones are augmented. Processes share the work, and
    each returns the whole bank.
    """
    total, size = images.shape[0], (images.shape[2], images.shape[3])
    batches = [(number, rows) for number in range(passes) for rows in torch.arange(total).split(_READ_BATCH)]
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    seconds, values, found = 0.0, 0, features.found if isinstance(features, FeatureStore) else 0
    mine = batches[fabric.global_rank :: fabric.world_size]
    with Progress("features at anchors", len(mine), quiet=quiet or not fabric.is_global_zero) as progress:
        for done, (number, rows) in enumerate(mine):
            x, labels = images[rows].to(fabric.device), pixel_labels[rows].to(fabric.device)
            if augmenter is not None and number > 0:
                generator = torch.Generator(device=fabric.device)
                generator.manual_seed(derived_seed(seed, number, int(rows[0])))
                drawn = augmenter(len(rows), x.shape[1], size, generator)
                x, labels = drawn.images(x), drawn.labels(labels)
            key = (number * total + rows).to(fabric.device)
            pixels, counts = sample_anchors(
                labels, num_classes=num_classes, per_class=per_class, seed=seed, image_index=key
            )
            classes = torch.arange(num_classes, device=labels.device)
            available = (labels.flatten(1).unsqueeze(1) == classes.view(1, -1, 1)).sum(dim=2)
            weight = (available / counts.clamp_min(1)).unsqueeze(2).expand_as(pixels)
            anchor_labels = torch.where(pixels >= 0, classes.view(1, -1, 1), -1)
            started = time.perf_counter()
            maps = features(x, conditions[rows].to(fabric.device))
            read = read_at(maps, pixels.flatten(1), size).half().cpu()
            seconds += time.perf_counter() - started
            values += sum(block.numel() for block in maps)
            parts.append((read, anchor_labels.flatten(1).cpu(), weight.flatten(1).float().cpu()))
            progress.update(done + 1)
        if isinstance(features, FeatureStore):
            progress.note(f"features: {features.found - found} of {sum(len(rows) for _, rows in mine)} were stored")
        elif (saved := seconds - 2 * values / _STORE_RATE) > _WORTH_SAYING:
            gigabytes = 2 * values * fabric.world_size / 1e9
            other = "as much" if augmenter is None or passes == 1 else f"1/{passes} of it"
            progress.note(
                f"features: {seconds:.0f} s; features.store=float16 would take {gigabytes:.1f} GB and save {saved:.0f} "
                f"s when a decoder is trained again with this seed, {other} with another seed"
            )
    if fabric.world_size > 1:
        shared: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(fabric.world_size)]
        distributed.all_gather_object(shared, parts)
        # Back into the order of one process: rank r had batches r, r + world, ...
        parts = [shared[i % fabric.world_size][i // fabric.world_size] for i in range(len(batches))]
    read, labels, weight = (torch.cat([part[i] for part in parts]) for i in range(3))
    bank = AnchorBank(read, labels, weight, (labels > 0).any(dim=1))
    if not bank.foreground.any():
        raise DataError(
            "pixel labels: expected some foreground to learn from, found none in any training image; lower "
            "evidence.foreground_gradient or evidence.foreground_cam, or train the classifier longer"
        )
    return bank


def balanced_rows(foreground: Tensor, draws: StepDraws) -> Tensor:
    """This process's rows int64 [B], on the CPU, of a batch half of which hold foreground (with replacement).

    foreground: bool [N], which rows do, at least one.
    """
    device = draws.generator.device
    with_foreground, without = foreground.nonzero().flatten(), (~foreground).nonzero().flatten()
    if not len(without):
        without = with_foreground
    uniform = torch.rand(draws.batch_size, generator=draws.generator, device=device)
    half = torch.arange(draws.batch_size, device=device) < draws.batch_size / 2
    rows = torch.where(
        half,
        with_foreground.to(device)[(uniform * len(with_foreground)).long()],
        without.to(device)[(uniform * len(without)).long()],
    )
    return draws.mine(rows).cpu()


def decoder_loss(bank: AnchorBank, config: DecoderConfig) -> LossFunction:
    """InfoNCE over the anchors of a batch of readings, half of which hold foreground."""
    criterion = PixelInfoNCE(config.temperature, config.variant)

    def loss(decoder: nn.Module, draws: StepDraws) -> Tensor:
        device = draws.generator.device
        rows = balanced_rows(bank.foreground, draws)
        embeddings = decoder(bank.features[rows].to(device).float())
        return criterion(embeddings.flatten(0, 1), bank.labels[rows].to(device).flatten())

    return loss
