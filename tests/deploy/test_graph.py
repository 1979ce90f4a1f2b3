"""The exported functions against `CLDF`, in torch and in ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cldf_fast.deploy.graph import LabelGraph, SegmentationGraph
from cldf_fast.deploy.noise import pixel_seed, standard_normal
from cldf_fast.errors import ConfigError
from cldf_fast.ops import pixel_seed as torch_pixel_seed
from cldf_fast.ops import reference
from cldf_fast.pipeline import CLDF
from cldf_fast.segmentation import second_view


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 15, 17), (2, 3, 1, 507)])
def test_numpy_draws_the_noise_of_torch(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    seeds = torch_pixel_seed(x)
    assert (pixel_seed(x.numpy()) == seeds.numpy().view(np.uint64)).all()
    expected = reference.standard_normal(seeds, 3, x[0].numel()).transpose(0, 1)
    found = standard_normal(seeds.numpy().view(np.uint64), 3, shape[1:])
    np.testing.assert_allclose(found, expected.reshape(shape[0], 3, *shape[1:]).numpy(), rtol=0, atol=1e-6)


def noise_of(graph: Any, x: Tensor, *, mirror: bool) -> Tensor:
    views = [x, second_view(x, mirror=mirror)][: graph.num_views]
    drawn = [standard_normal(pixel_seed(view.numpy()), graph.num_levels, tuple(x.shape[1:])) for view in views]
    return torch.from_numpy(np.stack(drawn, axis=1))


CHANGES: list[dict[str, dict[str, Any]]] = [
    {},
    {"features": {"condition": "null"}},
    {"features": {"condition": "null", "noise_levels": (0.1,)}},
    {"features": {"prediction": False, "downsample": (2,)}, "segmentation": {"average_views": False}},
    {"evidence": {"average_views": True, "draws": 2}, "data": {"mirror": False}},
]


@pytest.fixture(params=CHANGES, ids=["tiny", "null", "one level", "one view", "draws"])
def cldf(request: pytest.FixtureRequest, tiny_config: Any, make_tiny_cldf: Any) -> CLDF:
    changed = {
        section: getattr(tiny_config, section).model_copy(update=values) for section, values in request.param.items()
    }
    return make_tiny_cldf(tiny_config.model_copy(update=changed))


def test_graphs_give_what_cldf_gives(cldf: CLDF) -> None:
    x, present = torch.rand(5, 2, 16, 16) * 2 - 1, torch.rand(5, 3) < 0.5
    expected = cldf.segment(x, present)
    segmentation, labels = SegmentationGraph(cldf), LabelGraph(cldf)
    mirror = cldf.config.data.mirror
    with torch.no_grad():
        probability, mask = segmentation(x, noise_of(segmentation, x, mirror=mirror), present.float())
        label_probability = labels(x, noise_of(labels, x, mirror=mirror))
    torch.testing.assert_close(probability, expected.probability, rtol=0, atol=2e-5)
    torch.testing.assert_close(label_probability, expected.label_probability, rtol=0, atol=1e-6)
    assert mask.dtype == torch.int32
    assert (mask == expected.mask).float().mean() > 0.999
    assert len(mask.unique()) > 1


def test_the_networks_of_the_run_are_left_as_they_were(tiny_cldf: CLDF) -> None:
    modules = {name: type(module) for name, module in tiny_cldf.unet.named_modules()}
    SegmentationGraph(tiny_cldf)
    LabelGraph(tiny_cldf)
    assert {name: type(module) for name, module in tiny_cldf.unet.named_modules()} == modules


def test_evidence_in_the_decision_is_refused(tiny_config: Any, make_tiny_cldf: Any) -> None:
    segmentation = tiny_config.segmentation.model_copy(update={"evidence_weight": 0.5})
    cldf = make_tiny_cldf(tiny_config.model_copy(update={"segmentation": segmentation}))
    with pytest.raises(ConfigError, match=r"segmentation.evidence_weight: expected 0, .* got 0.5"):
        SegmentationGraph(cldf)


def test_a_run_without_decoder_is_refused(tiny_cldf: CLDF) -> None:
    with pytest.raises(ConfigError, match="expected a trained decoder"):
        SegmentationGraph(CLDF(tiny_cldf.config, tiny_cldf.unet, tiny_cldf.classifier))


def test_nothing_that_is_constant_is_computed(tiny_config: Any, make_tiny_cldf: Any) -> None:
    features = tiny_config.features.model_copy(update={"condition": "null"})
    graph = SegmentationGraph(make_tiny_cldf(tiny_config.model_copy(update={"features": features})))
    called: list[nn.Module] = []
    for module in graph.unet.time_embed:
        module.register_forward_hook(lambda module, *_: called.append(module))
    x = torch.rand(2, 2, 16, 16)
    with torch.no_grad():
        graph(x, noise_of(graph, x, mirror=True), torch.ones(2, 3))
    assert not called
