"""What a comparison scores: the masks that a user gets, and image-level labels by study."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cldf_fast.comparison import compare, native_masks, score
from cldf_fast.config import make_config
from cldf_fast.evaluation import image_label_scores
from cldf_fast.pipeline import CLDF
from tests.baselines.test_baselines import packed


@pytest.mark.parametrize("weight", [0.0, 0.7])
@pytest.mark.parametrize("condition", ["null", "label"])
def test_given_labels_are_scored_as_they_segment(tiny_cldf: CLDF, condition: str, weight: float) -> None:
    values = tiny_cldf.config.model_dump()
    values["segmentation"]["evidence_weight"] = weight
    values["features"]["condition"] = condition
    # Half of what is there is not predicted: given labels have to reach those images too.
    threshold = torch.full((3,), 0.5)
    networks = (tiny_cldf.unet, tiny_cldf.classifier, tiny_cldf.decoder, tiny_cldf.prototypes)
    cldf = CLDF(make_config(values), *networks, threshold)
    images = torch.rand(10, 2, 16, 16) * 2 - 1
    cldf.label_threshold = cldf.label_probability(images).median(dim=0).values
    data = packed(images, torch.randint(0, 4, (10, 16, 16), dtype=torch.uint8), ["a"] * 4 + ["b"] * 6)
    labels = data.require_labels()
    assert not (cldf.label_probability(images) >= cldf.label_threshold)[labels].all()
    document = compare(cldf, data).document
    given = cldf.segment(images, labels)
    expected = score(native_masks(given.probability, labels, data), labels, data).summary()
    assert document["methods"]["cldf_given_labels"] == expected


def test_position_is_controlled_for_by_study(tiny_cldf: CLDF) -> None:
    """A patient of two studies: their stacks begin at 0 each."""
    images = torch.rand(8, 2, 16, 16) * 2 - 1
    masks = torch.zeros(8, 16, 16, dtype=torch.uint8)
    masks[[1, 2, 5]] = 1
    data = replace(packed(images, masks, ["first"] * 4 + ["second"] * 4), subjects=["anna"] * 8)
    found = compare(tiny_cldf, data).document["data"]["image_labels"]
    labels, probability = data.require_labels().numpy(), tiny_cldf.label_probability(images).numpy()
    options = {"threshold": tiny_cldf.label_threshold.tolist(), "class_names": data.class_names}
    assert found == image_label_scores(probability, labels, studies=data.studies, indices=data.indices, **options)
