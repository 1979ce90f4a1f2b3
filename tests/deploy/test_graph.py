"""The exported functions against `CLDF`, in torch and in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cldf_fast.deploy.graph import LabelGraph, SegmentationGraph
from cldf_fast.deploy.noise import pixel_seed, standard_normal
from cldf_fast.errors import ConfigError
from cldf_fast.models.adopted import AdoptedClassifier, AdoptedUNet
from cldf_fast.models.checkpoints import Loaded, load
from cldf_fast.models.classifier import NoiseAwareClassifier
from cldf_fast.models.decoder import PixelDecoder
from cldf_fast.models.unet import UNet
from cldf_fast.ops import pixel_seed as torch_pixel_seed
from cldf_fast.ops import reference
from cldf_fast.pipeline import CLDF
from cldf_fast.segmentation import Prototypes, second_view


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


def assert_graphs_agree(cldf: CLDF) -> None:
    """The graphs give what the `CLDF` gives for two channels, three classes and 16 pixels."""
    x, present = torch.rand(5, 2, 16, 16) * 2 - 1, torch.rand(5, 3) < 0.5
    expected = cldf.segment(x, present)
    segmentation, labels = SegmentationGraph(cldf), LabelGraph(cldf)
    mirror = cldf.config.data.mirror
    with torch.no_grad():
        probability, mask = segmentation(x, noise_of(segmentation, x, mirror=mirror), present.float())
        label_probability = labels(x, noise_of(labels, x, mirror=mirror))
    torch.testing.assert_close(probability, expected.probability, rtol=0, atol=2e-5)
    torch.testing.assert_close(label_probability, cldf.label_probability(x), rtol=0, atol=1e-6)
    assert mask.dtype == torch.int32
    assert (mask == expected.mask).float().mean() > 0.999
    assert len(mask.unique()) > 1


def test_graphs_give_what_cldf_gives(cldf: CLDF) -> None:
    assert_graphs_agree(cldf)


@pytest.mark.parametrize(
    ("condition", "pixel_range", "table", "multi_label"),
    [("label", (0, 1), 6, False), ("null", (0, 1), 6, True), ("null", (-1, 1), None, False)],
)
def test_graphs_of_converted_networks_give_what_cldf_gives(
    condition: str,
    pixel_range: tuple[float, float],
    table: int | None,
    multi_label: bool,
    tiny_config: Any,
    randomised: Any,
    tmp_path: Path,
) -> None:
    shape: dict[str, Any] = {"channel_mult": (1, 2), "attention_downsample": (2,), "num_head_channels": 8}
    common: dict[str, Any] = {"new_attention_order": False, "num_head_channels": 8, "timesteps": 4000}
    common |= {"schedule": "cosine", "rescale_timesteps": True, "pixel_range": pixel_range, "channel_names": ("a", "b")}
    labels = {0: "none", 5: "liver", 2: "kidneys", 3: "spleen"}

    def converted(network: nn.Module, **stated: Any) -> Loaded:
        torch.save(randomised(network).state_dict(), tmp_path / "model.pt")
        return load(tmp_path / "model.pt", **common, **stated)

    fit: dict[str, Any] = {"class_names": ("liver", "kidneys", "spleen"), "channel_names": ("a", "b"), "size": 16}
    unet = converted(UNet(2, 16, out_channels=4, num_classes=table, **shape), labels=labels if table else {})
    head = converted(NoiseAwareClassifier(2, 16, num_classes=6, **shape), labels=labels, multi_label=multi_label)
    section = tiny_config.features.model_copy(update={"downsample": (2, 1), "condition": condition})
    networks = AdoptedUNet(unet, **fit), AdoptedClassifier(head, **fit)
    bare = CLDF(tiny_config.model_copy(update={"features": section}), *networks)
    decoder = randomised(PixelDecoder(bare.features.channels, hidden=16, embedding=8))
    prototypes = Prototypes(nn.functional.normalize(torch.randn(4, 2, 8), dim=-1), 0.1 * torch.randn(4), 0.1)
    assert_graphs_agree(CLDF(bare.config, *networks, decoder, prototypes, torch.full((3,), 0.5)))


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
