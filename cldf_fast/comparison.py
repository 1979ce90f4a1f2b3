"""CLDF beside the baselines and its upper bounds, on one part of a split: metrics.json, report.html."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from cldf_fast.baselines import (
    BASELINES,
    BaselineContext,
    choose_threshold,
    position_label_auc,
    score_maps,
    with_background,
)
from cldf_fast.data.packing import PackedSlices, to_native_size
from cldf_fast.errors import ConfigError
from cldf_fast.evaluation import (
    SegmentationScores,
    image_label_scores,
    metrics_document,
    pixel_label_scores,
)
from cldf_fast.evidence import pixel_labels
from cldf_fast.pipeline import CLDF, Segmentation
from cldf_fast.report import CasePanels
from cldf_fast.segmentation import masks_from_probability

_EXAMPLES = 3  # of each kind in the report


@dataclass(frozen=True)
class Comparison:
    """The document of `evaluation.metrics_document`, and the pictures for the report."""

    document: dict[str, Any]
    cases: list[CasePanels]


def native_masks(probability: Tensor, present: Tensor, data: PackedSlices) -> list[Tensor]:
    """Masks uint8 [H, W] at every slice's own size. probability: [N, K + 1, h, w]; present: bool [N, K]."""
    return [
        masks_from_probability(to_native_size(probability[i : i + 1], size), present[i : i + 1])[0]
        for i, size in enumerate(data.sizes)
    ]


def score(masks: Sequence[Tensor], present: Tensor | None, data: PackedSlices) -> SegmentationScores:
    """Score masks at the slices' own size against the truth. present: the image-level labels that they went by."""
    scores = SegmentationScores(data.class_names)
    for i, (mask, truth) in enumerate(zip(masks, data.require_masks(), strict=True)):
        scores.add(
            subject=data.subjects[i],
            study=data.studies[i],
            index=data.indices[i],
            prediction=mask.numpy(),
            truth=truth.numpy(),
            spacing=data.geometries[i].spacing,
            predicted_label=None if present is None else present[i].numpy(),
        )
    return scores


def compare(
    cldf: CLDF,
    data: PackedSlices,
    *,
    train: PackedSlices | None = None,
    val: PackedSlices | None = None,
    baselines: Sequence[str] = (),
    supervised: CLDF | None = None,
    description: dict[str, Any] | None = None,
) -> Comparison:
    """Evaluate on `data`, which needs masks and image-level labels.

    Methods: "cldf" with image-level labels predicted by the classifier, "cldf_given_labels" with the true ones, and the
    baselines, which go by the same predicted labels. A baseline's threshold is the best on the masks of `val`, which is
    generous: CLDF's own thresholds use no mask. `train` fits what a baseline learns. supervised: the same decoder
    trained with true masks, an upper bound. description: goes into the document's "data".
    """
    labels = data.require_labels()
    # Evidence wherever a method or a picture may ask for it, and once.
    label_probability = cldf.label_probability(data.images)
    present = label_probability >= cldf.label_threshold
    evidence = cldf.evidence(data.images, (labels | present).any(dim=1))
    predicted = cldf.segment(data.images, present, evidence)
    # Without a condition, and without evidence, which images have that show a class, labels only rule classes out.
    alike = cldf.config.features.condition == "null" and not cldf.config.segmentation.evidence_weight
    given = predicted if alike else cldf.segment(data.images, labels, evidence)
    own = score(native_masks(predicted.probability, predicted.present, data), predicted.present, data)
    methods = {
        "cldf": own.summary(),
        "cldf_given_labels": score(native_masks(given.probability, labels, data), labels, data).summary(),
    }
    facts: dict[str, Any] = dict(description or {})
    if baselines:
        if train is None or val is None:
            raise ConfigError("baselines: expected the training and validation parts to fit them on, got none")
        context = BaselineContext.fit(train, val)
        thresholds = {}
        val_labels = val.require_labels()
        val_evidence = cldf.evidence(val.images, val_labels.any(dim=1))
        for name in baselines:
            chosen = choose_threshold(
                score_maps(name, cldf, val.images, val_labels, context, val.studies, val_evidence),
                val.working_masks(),
                val_labels,
            )
            maps = score_maps(name, cldf, data.images, predicted.present, context, data.studies, evidence)
            methods[name] = score(
                native_masks(with_background(maps, chosen), predicted.present, data), predicted.present, data
            ).summary()
            thresholds[name] = [round(float(value), 4) for value in chosen]
        facts["baseline_thresholds"] = thresholds
        facts["position_only_label_auc"] = position_label_auc(train, data)
    upper_bounds: dict[str, Any] = {}
    if supervised is not None:
        bound = supervised.segment(data.images, evidence=evidence)
        upper_bounds["decoder_trained_with_masks"] = score(
            native_masks(bound.probability, bound.present, data), bound.present, data
        ).summary()
    fused = pixel_labels(evidence, labels, cldf.thresholds()).labels
    upper_bounds["pixel_labels"] = pixel_label_scores(fused.numpy(), data.working_masks().numpy(), data.class_names)
    facts["image_labels"] = image_label_scores(
        label_probability.numpy(),
        labels.numpy(),
        threshold=cldf.label_threshold.tolist(),
        class_names=data.class_names,
        studies=data.studies,
        indices=np.asarray(data.indices),
    )
    if not all(geometry.physical for geometry in data.geometries):
        facts["distance_unit"] = "pixels"
    cases = _cases(own, data, predicted, evidence.gradient_map, evidence.cam, fused)
    return Comparison(metrics_document(methods, upper_bounds, facts), cases)


def _cases(
    scores: SegmentationScores,
    data: PackedSlices,
    segmentation: Segmentation,
    gradient_map: Tensor,
    cam: Tensor,
    fused: Tensor,
) -> list[CasePanels]:
    place = {(study, index): i for i, (study, index) in enumerate(zip(data.studies, data.indices, strict=True))}
    truths = data.working_masks()
    cases = []
    for kind, rows in scores.examples(_EXAMPLES).items():
        for row in rows:
            i = place[row.study, row.index]
            k = data.class_names.index(row.class_name)
            cases.append(
                CasePanels(
                    title=f"{kind.capitalize()}: {row.class_name}, {data.studies[i]}, slice {data.names[i]}",
                    dice=row.dice,
                    image=data.images[i, 0].numpy(),
                    gradient_map=gradient_map[i, k].numpy(),
                    cam=cam[i, k].numpy(),
                    pixel_labels=fused[i].numpy(),
                    mask=segmentation.mask[i].numpy(),
                    truth=truths[i].numpy(),
                )
            )
    return cases


ALL_BASELINES = tuple(BASELINES)
