"""Training of a whole run: which networks, on what, in which order."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from cldf_fast.config import Config, OptimisationConfig, flat
from cldf_fast.data.packing import PackedSlices
from cldf_fast.errors import CheckpointError, DataError
from cldf_fast.evidence import pixel_labels
from cldf_fast.models.decoder import PixelDecoder
from cldf_fast.pipeline import CLDF, build_classifier, build_diffusion, build_unet, freeze
from cldf_fast.run import DatasetRecord, Run
from cldf_fast.segmentation import Prototypes, calibrate, fit_prototypes
from cldf_fast.training.augment import Augmenter
from cldf_fast.training.cdm import cdm_loss
from cldf_fast.training.classifier import classifier_loss
from cldf_fast.training.decoder import AnchorBank, decoder_loss, read_anchors
from cldf_fast.training.engine import LossFunction, fit
from cldf_fast.training.progress import Progress

NETWORKS = ("cdm", "classifier", "decoder")
_LEARNT_FROM = {
    "cdm": ("data.", "diffusion.", "cdm."),
    "classifier": ("data.", "diffusion.", "classifier."),
    "decoder": ("data.", "diffusion.", "evidence.", "features.", "decoder."),
}
"""How the keys of the configuration begin that decide what a network learns."""
_EVIDENCE_BATCH = 32
_EMBED_BATCH = 65_536  # anchors


@dataclass(frozen=True)
class Trainer:
    """What every training needs. train, val: the packed slices of these parts of the split."""

    config: Config
    run: Run
    fabric: Fabric
    train: PackedSlices
    val: PackedSlices
    record: DatasetRecord
    resume: bool = False
    quiet: bool = False

    def augmenter(self, optimisation: OptimisationConfig) -> Augmenter | None:
        """What the training images of classifier and decoder go through, or None."""
        return Augmenter(self.config.data.mirror, self.config.data.gamma) if optimisation.augment else None

    def fit(self, networks: Sequence[str]) -> None:
        """Train these networks, in the order of NETWORKS, and write each to the run when it is done."""
        if not self.resume and self.fabric.is_global_zero:
            # Before the first one starts: what a kill leaves of this training must not be taken up at an older one's.
            for name in networks:
                (self.run.path / f"{name}.checkpoint").unlink(missing_ok=True)
        for name in NETWORKS:
            if name in networks:
                getattr(self, f"_fit_{name}")()
                # The next network is trained on what the first process has just written.
                self.fabric.barrier()

    def _fit_cdm(self) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        unet = build_unet(config.cdm.network, self.record.num_channels, self.record.num_classes)
        # The CDM learns what images look like, and no scanner makes what a drawn power does.
        augmenter = Augmenter(config.data.mirror) if config.cdm.optimisation.augment else None
        loss = cdm_loss(self.train, build_diffusion(config), config.cdm, augmenter=augmenter)
        self._fit("cdm", unet, loss, config.cdm.optimisation)

    def _fit_classifier(self) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        classifier = build_classifier(config, self.record.num_channels, self.record.num_classes)
        loss = classifier_loss(
            self.train,
            build_diffusion(config),
            config.classifier,
            augmenter=self.augmenter(config.classifier.optimisation),
        )
        self._fit("classifier", classifier, loss, config.classifier.optimisation)

    def _fit_decoder(self) -> None:
        for name in ("cdm", "classifier"):
            if not self.run.has(name):
                raise CheckpointError(f"{self.run.path}: the decoder needs a trained {name}; run `train {name}` first")
        cldf = self.run.load(decoder=False, store=True).to(self.fabric.device)
        decoder, prototypes, threshold = fit_decoder(cldf, self, self.pixel_labels(cldf, self.train))
        if self.fabric.is_global_zero:
            self.run.drop_further_decoders()
            self.run.save_decoder(decoder, prototypes, threshold)

    def pixel_labels(self, cldf: CLDF, data: PackedSlices) -> Tensor:
        """Pixel labels int8 [N, H, W] of a part, from evidence and its image-level labels; no mask is used."""
        labels, parts = data.require_labels(), []
        with Progress("pixel labels", len(data), quiet=self.quiet or not self.fabric.is_global_zero) as progress:
            for rows in torch.arange(len(data)).split(_EVIDENCE_BATCH):
                # Slices without any class are background throughout: no evidence is needed.
                evidence = cldf.evidence(data.images[rows], labels[rows].any(dim=1))
                parts.append(pixel_labels(evidence, labels[rows], cldf.thresholds()).labels)
                progress.update(int(rows[-1]) + 1)
        return torch.cat(parts)

    def _fit(self, name: str, module: nn.Module, loss: LossFunction, optimisation: OptimisationConfig) -> None:
        trained = fit(
            name,
            module,
            loss,
            optimisation,
            fabric=self.fabric,
            run=self.run.path,
            seed=self.config.seed,
            resume=self.resume,
            settings=self.settings(name),
            quiet=self.quiet,
        )
        if self.fabric.is_global_zero:
            self.run.save_network(name, trained)

    def settings(self, name: str) -> dict[str, Any]:
        """What a resumed training of a network has to have in common with the one that was begun."""
        kept = {
            key: value
            for key, value in flat(self.config).items()
            if key.startswith(_LEARNT_FROM[name]) and ".optimisation." not in key and ".store" not in key
        }
        return kept | {"precision": self.config.precision}


def fit_decoder(cldf: CLDF, trainer: Trainer, labels: Tensor) -> tuple[PixelDecoder, Prototypes, Tensor]:
    """Train a decoder on pixel labels int8 [N, H, W] of the training part; then prototypes and decision thresholds.

    Returns the decoder, its prototypes with calibrated bias, and the image-level thresholds float32 [K].
    """
    config = trainer.config
    bank = read_anchors(
        trainer.train.images,
        labels,
        cldf.conditions(trainer.train.require_labels()),
        cldf.features,
        num_classes=cldf.num_classes + 1,
        per_class=config.decoder.anchors_per_class,
        passes=config.decoder.passes,
        augmenter=trainer.augmenter(config.decoder.optimisation),
        seed=config.seed,
        fabric=trainer.fabric,
        quiet=trainer.quiet,
    )
    check_classes(bank, trainer.record.class_names)
    decoder, prototypes = fit_on_anchors(trainer, cldf.features.channels, bank, decoder_loss(bank, config.decoder))
    return decoder, prototypes, label_thresholds(cldf, trainer.val)


def check_classes(bank: AnchorBank, class_names: Sequence[str]) -> None:
    """Raise DataError without background to learn from, and warn of classes without pixels, which are never found."""
    found = bank.labels.flatten().clamp_min(-1).add(1).bincount(minlength=len(class_names) + 2)[1:].tolist()
    if not found[0]:
        raise DataError(
            "pixel labels: expected some background to learn from, found none in any training image; raise "
            "evidence.background_gradient or evidence.background_cam"
        )
    for name, pixels in zip(class_names, found[1:], strict=True):
        if not pixels:
            warnings.warn(
                f"pixel labels: none of any training image is of {name}, which will be segmented nowhere; lower "
                "evidence.foreground_gradient or evidence.foreground_cam, or train the classifier longer",
                stacklevel=2,
            )


def fit_on_anchors(
    trainer: Trainer, channels: Sequence[int], bank: AnchorBank, loss: LossFunction
) -> tuple[PixelDecoder, Prototypes]:
    """Train a decoder by a loss; then prototypes with calibrated bias.

    channels: of each feature map. bank: anchors that features are standardised by and prototypes found among.
    """
    config, num_classes = trainer.config, trainer.record.num_classes + 1
    torch.manual_seed(config.seed)
    decoder = PixelDecoder(
        channels,
        hidden=config.decoder.hidden,
        embedding=config.decoder.embedding,
        dropout=config.decoder.dropout,
    )
    features, anchor_labels, weight = bank.flat()
    decoder.standardise(features[:: max(1, len(features) // _EMBED_BATCH)].float())
    fit(
        "decoder",
        decoder,
        loss,
        config.decoder.optimisation,
        fabric=trainer.fabric,
        run=trainer.run.path,
        seed=config.seed,
        resume=trainer.resume,
        settings=trainer.settings("decoder"),
        quiet=trainer.quiet,
    )
    decoder = freeze(decoder.cpu())
    embeddings = torch.cat([decoder.points(part.float()) for part in features.split(_EMBED_BATCH)])
    prototypes = fit_prototypes(
        embeddings,
        anchor_labels,
        num_classes=num_classes,
        per_class=config.segmentation.prototypes_per_class,
        temperature=config.segmentation.temperature,
        seed=config.seed,
    )
    return decoder, calibrate(prototypes, embeddings, anchor_labels, weight)


def label_thresholds(cldf: CLDF, data: PackedSlices) -> Tensor:
    """Image-level thresholds float32 [K] that maximise sensitivity + specificity on a part's image-level labels.

    A threshold lies in the middle between two neighbouring probabilities of the part; of several that serve equally
    well, it is the one nearest to 0.5. A class that the part has never or always keeps 0.5.
    """
    probability, labels = cldf.label_probability(data.images), data.require_labels()
    thresholds = torch.full((labels.shape[1],), 0.5)
    for k in range(labels.shape[1]):
        truth, values = labels[:, k], probability[:, k]
        if truth.all() or not truth.any():
            continue
        high, order = values.sort()
        low = torch.cat([torch.zeros(1), high[:-1]])
        # With a threshold just below place i, the i smaller probabilities are called absent. Counted in integers, so
        # that what is equally good is equal.
        absent = F.pad((~truth[order]).cumsum(0)[:-1], (1, 0))
        missed = F.pad(truth[order].cumsum(0)[:-1], (1, 0))
        gain = absent * truth.sum() - missed * (~truth).sum()
        gain[1:][low[1:] == high[1:]] = gain.min() - 1  # no threshold parts equal probabilities
        middle = (low + high) / 2
        middle = torch.where(middle > low, middle, high)  # of neighbours among floating-point numbers
        best = middle[gain == gain.max()]
        thresholds[k] = best[(best - 0.5).abs().argmin()]
    return thresholds
