"""Class activation maps against their formulas and against Captum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cldf_fast.evidence.cam import average_levels, grad_cam, layer_cam
from cldf_fast.models.classifier import NoiseAwareClassifier

Randomise = Callable[[nn.Module], nn.Module]


def test_maps_follow_their_formulas() -> None:
    activation, gradient = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    for b in range(2):
        for row in range(4):
            for column in range(5):
                by_channel = by_place = 0.0
                for c in range(3):
                    value = float(activation[b, c, row, column])
                    by_channel += float(gradient[b, c].mean()) * value
                    by_place += max(float(gradient[b, c, row, column]), 0.0) * value
                assert float(grad_cam(activation, gradient)[b, row, column]) == pytest.approx(
                    max(by_channel, 0.0), abs=1e-6
                )
                assert float(layer_cam(activation, gradient)[b, row, column]) == pytest.approx(
                    max(by_place, 0.0), abs=1e-6
                )


def test_grad_cam_equals_captum(randomised: Randomise) -> None:
    attribution = pytest.importorskip("captum.attr", reason="captum is an oracle of the benchmarks' extra")
    classifier = randomised(NoiseAwareClassifier(1, 16, num_classes=2, channel_mult=(1, 4), attention_downsample=()))
    layer = classifier.eval().block_at(2)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.0, 50.0, 300.0])
    expected = attribution.LayerGradCam(classifier, layer).attribute(
        x, target=1, additional_forward_args=(t,), relu_attributions=True
    )
    kept = []
    hook = layer.register_forward_hook(lambda _m, _a, out: kept.append(out))
    logits = classifier(x, t)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), kept)
    torch.testing.assert_close(grad_cam(kept[0], gradient), expected[:, 0], rtol=1e-5, atol=1e-6)


def test_levels_count_alike_and_silent_maps_stay_silent() -> None:
    cams = torch.rand(3, 4, 5, 6)
    cams[1] *= 1e4  # a level with large values must not drown the others
    cams[:, 2] = 0
    cams[0, 3] = 0
    got = average_levels(cams, (10, 12))
    assert got.shape == (4, 10, 12)
    assert got[2].eq(0).all()
    for b in (0, 1, 3):
        shares = [cams[t, b] / max(float(cams[t, b].max()), 1e-30) for t in range(3)]
        wide = F.interpolate(torch.stack(shares).mean(dim=0)[None, None], (10, 12), mode="bilinear")[0, 0]
        torch.testing.assert_close(got[b], wide / wide.max())
        assert float(got[b].max()) == 1


def test_half_precision_maps_are_averaged_in_float32() -> None:
    got = average_levels(torch.rand(2, 1, 3, 3).to(torch.bfloat16), (6, 6))
    assert got.dtype == torch.float32
    assert float(got.max()) == 1
