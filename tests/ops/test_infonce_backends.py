"""Every backend of pixel_infonce against the reference in float64: values, saved state and both gradients."""

from __future__ import annotations

import math
import os
import resource

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cldf_fast.errors import BackendError
from cldf_fast.ops import _dispatch, pixel_infonce, pixel_infonce_sum, pixel_infonce_with_valid
from tests.ops.again import run_again
from tests.ops.backends import check_threads_change_no_bit, needs

VARIANTS = ("per_positive", "supcon")
HALF = (torch.bfloat16, torch.float16)


def tolerance_of(impl: str, dtype: torch.dtype) -> float:
    """Relative error that is accepted at a temperature of 0.1; tf32 keeps 11 bits of each factor."""
    if dtype in HALF:
        return 1e-2
    return 1e-3 if impl == "triton" else 1e-5


@pytest.fixture(params=["cpu", "triton", "triton, sorted"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend that this machine has."""
    backend, *sort = str(request.param).split(", ")
    needs(backend, "pixel_infonce", "pixel_infonce_backward")
    if sort:
        from cldf_fast.kernels import infonce

        # As large problems are; what is empty has no largest row.
        monkeypatch.setattr(infonce, "SORT_FROM", 1)
    return backend


def sized(impl: str, *sizes: int) -> tuple[int, ...]:
    """Numbers of rows for a backend: an interpreter takes milliseconds a tile, and a few tiles show what many do."""
    return tuple(min(size, 70) for size in sizes) if impl == "triton" else sizes


def relative(found: Tensor, exact: Tensor) -> float:
    """Error of a tensor as a whole, relative to its norm."""
    if not exact.numel():
        return 0.0
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def compare(
    impl: str,
    anchors: Tensor,
    candidates: Tensor,
    anchor_labels: Tensor,
    candidate_labels: Tensor,
    *,
    tolerance: float,
    **options: object,
) -> None:
    """Loss, valid and gradients under a random weight per anchor, in two passes and in the one of a weighted sum."""
    weight = torch.randn(len(anchors), dtype=torch.float64)
    labels = (anchor_labels, candidate_labels)
    results = []
    for dtype, backend in ((torch.float64, "reference"), (anchors.dtype, impl)):
        features = [x.detach().to(dtype).requires_grad_() for x in (anchors, candidates)]
        loss, valid = pixel_infonce_with_valid(*features, *labels, impl=backend, **options)
        gradients = torch.autograd.grad((loss * weight.to(loss.dtype)).sum(), features)
        results.append((loss.detach(), valid, *gradients))
    exact, found = results
    assert torch.equal(found[1], exact[1])
    assert found[0].dtype == torch.float32
    total, count = pixel_infonce_sum(*features, *labels, anchor_weight=weight.float(), impl=impl, **options)
    assert total.dtype == torch.float32
    found = (*found, total.detach(), count, *torch.autograd.grad(-3 * total, features))
    counted = weight * exact[1]
    # What cancels in a sum leaves its rounding behind.
    margin = tolerance * float((exact[0] * counted).abs().sum())
    assert float(found[4]) == pytest.approx(float((exact[0] * counted).sum()), abs=margin)
    assert float(found[5]) == pytest.approx(float(counted.sum()), abs=1e-6 * float(counted.abs().sum()))
    exact = (*exact, None, None, -3 * exact[2], -3 * exact[3])
    for at, name in ((0, "loss"), (2, "anchors"), (3, "candidates"), (6, "anchors, sum"), (7, "candidates, sum")):
        ours, theirs = found[at], exact[at]
        assert ours.isfinite().all(), name
        assert relative(ours, theirs) < tolerance, f"{name}: {relative(ours, theirs):.1e}"
        # What takes no part is exactly zero.
        assert not ours[theirs == 0].any(), name


def drawn(m: int, n: int, d: int, classes: int, dtype: torch.dtype = torch.float32, unit: bool = True) -> list[Tensor]:
    features = [torch.randn(rows, d) for rows in (m, n)]
    if unit:
        features = [normalize(x, dim=1) for x in features]
    return [*(x.to(dtype) for x in features), torch.randint(-1, classes, (m,)), torch.randint(-1, classes, (n,))]


@pytest.mark.parametrize("factor", [0.0, 1e-30, 3e-8, 1e20])
def test_kernels_give_gradients_of_float16_for_factors_that_it_has_no_room_for(factor: float) -> None:
    """A caller's mean over 8192 anchors, or the scale of a loss: slopes are rounded to float16 on the way."""
    needs("triton", "pixel_infonce_backward")
    from cldf_fast.kernels import infonce

    inputs = (*drawn(17, 40, 8, 2, torch.float16), None, 0.1, "per_positive")
    loss, *state = infonce.pixel_infonce(*inputs)
    for scaled, one in zip(
        *(
            infonce.pixel_infonce_backward(
                torch.full_like(loss, grad), *state, *inputs, True, True, dtype=torch.float32
            )
            for grad in (factor, 1.0)
        ),
        strict=True,
    ):
        assert one.norm() > 0.1
        torch.testing.assert_close(scaled, one * factor, rtol=1e-4, atol=1e-6 * factor)


def test_strided_labels_and_places_are_read_rightly(impl: str) -> None:
    anchors, candidates, anchor_labels, candidate_labels = drawn(9, 20, 6, 2)
    places = torch.randperm(20)[:9]
    expected = pixel_infonce(
        anchors, candidates, anchor_labels, candidate_labels, self_index=places, reduction="none", impl="reference"
    )
    strided = [torch.stack([values, values.flip(0) - 5], dim=1)[:, 0] for values in (anchor_labels, candidate_labels)]
    apart = torch.stack([places, places.flip(0)], dim=1)[:, 0]
    assert not any(values.is_contiguous() for values in (*strided, apart))
    found = pixel_infonce(anchors, candidates, *strided, self_index=apart, reduction="none", impl=impl)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    ("m", "n", "d", "classes"),
    [
        (1, 15, 7, 2), (15, 1, 64, 2), (15, 17, 1, 2), (17, 252, 33, 5), (252, 17, 64, 1), (507, 507, 252, 3),
        (600, 1100, 96, 4), (1030, 515, 16, 300),
    ],
)  # fmt: skip
def test_awkward_shapes(impl: str, m: int, n: int, d: int, classes: int, dtype: torch.dtype, variant: str) -> None:
    m, n = sized(impl, m, n)
    compare(
        impl,
        *drawn(m, n, d, classes, dtype),
        self_index=torch.randint(-1, n, (m,)),
        variant=variant,
        tolerance=tolerance_of(impl, dtype),
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0, 10.0])
def test_temperatures(impl: str, temperature: float, variant: str) -> None:
    # Rounding of the products grows with 1 / temperature before the exponential sees it.
    tolerance = tolerance_of(impl, torch.float32) * (1 if temperature > 0.05 else 5)
    compare(impl, *drawn(*sized(impl, 252, 507), 64, 4), temperature=temperature, variant=variant, tolerance=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [1e-3, 10.0])
def test_features_of_any_length(impl: str, scale: float, variant: str) -> None:
    anchors, candidates, *labels = drawn(*sized(impl, 60, 507), 17, 4, unit=False)
    compare(
        impl,
        scale * anchors,
        scale * candidates,
        *labels,
        variant=variant,
        tolerance=5 * tolerance_of(impl, torch.float32),
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_of_different_lengths(impl: str, variant: str) -> None:
    # Anchors are taken by class: of some blocks the lengths bound the logits, of others the largest logit is sought.
    anchors, candidates, *labels = drawn(*sized(impl, 1100, 507), 17, 4)
    anchors[labels[0] == 1] *= 20
    compare(impl, anchors, candidates, *labels, variant=variant, tolerance=5 * tolerance_of(impl, torch.float32))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_far_below_what_lengths_allow(impl: str, variant: str) -> None:
    # All are near -28, and gradients small differences: rounding shows more than elsewhere.
    anchors, candidates, *labels = drawn(*sized(impl, 252, 507), 64, 3)
    direction = normalize(torch.randn(64), dim=0)
    anchors, candidates = (
        2.8 * normalize(0.1 * anchors - direction, dim=1),
        normalize(0.1 * candidates + direction, dim=1),
    )
    compare(impl, anchors, candidates, *labels, variant=variant, tolerance=10 * tolerance_of(impl, torch.float32))


@pytest.mark.parametrize("temperature", [0.01, 0.03, 0.07])
def test_no_loss_is_negative(impl: str, temperature: float) -> None:
    # One positive each, nearly the anchor itself: the loss is a small difference of large logits.
    anchors = normalize(torch.randn(40, 64), dim=1)
    candidates = normalize(anchors + 0.01 * torch.randn(40, 64), dim=1)
    labels = torch.arange(40)
    options = {"temperature": temperature, "variant": "supcon", "impl": impl}
    assert (pixel_infonce(anchors, candidates, labels, labels, **options) >= 0).all()
    both, labels = torch.cat([anchors, candidates]), labels.repeat(2)
    assert pixel_infonce(both, both, labels, labels, self_index=torch.arange(80), reduction="mean", **options) >= 0


@pytest.mark.parametrize("bound", [29.0, 39.0])
def test_weights_do_not_overflow_where_all_others_are_opposite(impl: str, bound: float) -> None:
    # The first one's denominator is as small as lengths allow, and what the gradient divides by it as large.
    temperature, weight = 1e-3, 300.0
    direction = normalize(torch.randn(1, 16), dim=1)
    features = math.sqrt(bound * temperature) * torch.cat([direction, -direction, -direction])
    labels, own = torch.tensor([0, 0, 1]), torch.arange(3)
    gradients = []
    for backend, dtype in (("reference", torch.float64), (impl, torch.float32)):
        x = features.to(dtype).requires_grad_()
        options = {"self_index": own, "temperature": temperature, "variant": "supcon", "reduction": "sum"}
        weights = torch.full((3,), weight, dtype=dtype)
        loss = pixel_infonce(x, x, labels, labels, anchor_weight=weights, impl=backend, **options)
        gradients.append(torch.autograd.grad(loss, x)[0])
    assert relative(gradients[1], gradients[0]) < 10 * tolerance_of(impl, torch.float32)


@pytest.mark.parametrize("together", [False, True])
def test_an_anchor_that_outweighs_all_others_does_not_pull_itself(impl: str, together: bool) -> None:
    features = [x.requires_grad_() for x in drawn(40, 40, 16, 2)[:2]]
    labels, weight = torch.randint(2, (40,)), torch.ones(40)
    weight[3] = 1e6
    gradients = []
    for backend, dtype in (("reference", torch.float64), (impl, torch.float32)):
        x, y = (x.to(dtype) for x in (features[:1] * 2 if together else features))
        own = torch.arange(40)
        loss = pixel_infonce(
            x,
            y,
            labels,
            labels,
            self_index=own,
            variant="supcon",
            anchor_weight=weight.to(dtype),
            reduction="sum",
            impl=backend,
        )
        wanted = features[:1] if together else features
        gradients.append(torch.autograd.grad(loss, wanted))
    for exact, found in zip(*gradients, strict=True):
        error = (found.double() - exact).norm(dim=1) / exact.double().norm(dim=1)
        assert error.max() < 5 * tolerance_of(impl, torch.float32)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize(
    ("count", "dim", "classes", "temperature", "scale"),
    [(1, 7, 1, 0.1, 1), (15, 17, 3, 0.1, 1), (507, 64, 2, 0.07, 1), (515, 40, 3, 0.1, 1), (129, 252, 60, 10.0, 1),
     (60, 16, 3, 0.01, 1), (60, 16, 3, 0.1, 4)],
)  # fmt: skip
def test_features_against_themselves(
    impl: str, count: int, dim: int, classes: int, temperature: float, scale: float, reduction: str, variant: str
) -> None:
    (count,) = sized(impl, count)
    features, _, labels, _ = drawn(count, 1, dim, classes)
    weight = torch.rand(count, dtype=torch.float64)
    owns = (torch.arange(count), None, torch.randint(-1, count, (count,)))
    # An interpreter takes its time, and has no kernel of its own for this.
    for own in owns[:1] if impl == "triton" else owns:
        results = []
        for dtype, backend in ((torch.float64, "reference"), (torch.float32, impl)):
            x = (scale * features).to(dtype).requires_grad_()
            loss = pixel_infonce(
                x,
                x,
                labels,
                labels,
                self_index=own,
                temperature=temperature,
                variant=variant,
                anchor_weight=weight.to(dtype),
                reduction=reduction,
                impl=backend,
            )
            results.append((loss.detach(), torch.autograd.grad(-2 * loss.sum(), x)[0]))
        tolerance = tolerance_of(impl, torch.float32) * (1 if temperature > 0.05 and scale == 1 else 5)
        for exact, found in zip(*results, strict=True):
            assert relative(found, exact) < tolerance
            assert not found[exact == 0].any()


def test_features_against_themselves_leave_other_roles_alone(impl: str) -> None:
    """The same values under two names are two tensors with a gradient each; labels may differ between the roles."""
    features, _, labels, _ = drawn(40, 1, 8, 3)
    other = labels.roll(1)
    one, two = (features.clone().requires_grad_() for _ in range(2))
    options = {"variant": "supcon", "reduction": "mean", "impl": impl}
    apart = torch.autograd.grad(pixel_infonce(one, two, labels, other, **options), (one, two))
    (both,) = torch.autograd.grad(pixel_infonce(one, one, labels, other, **options), one)
    torch.testing.assert_close(both, apart[0] + apart[1])
    with torch.no_grad():
        without = pixel_infonce(one, one, labels, labels, **options)
    torch.testing.assert_close(without, pixel_infonce(one, one, labels, labels, **options).detach())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("anchor_labels", "candidate_labels"),
    [([-1, -1], [0, 1, -1]), ([0, 1], [-1, -1]), ([0, 0], [0, 0]), ([0], [1, 2]), ([], [0, 1]), ([0, 1], []), ([], [])],
)
def test_nothing_to_contrast_is_a_connected_zero(
    impl: str, anchor_labels: list[int], candidate_labels: list[int], variant: str
) -> None:
    labels = [torch.tensor(values, dtype=torch.int64) for values in (anchor_labels, candidate_labels)]
    features = [torch.randn(len(values), 5, requires_grad=True) for values in labels]
    loss, valid = pixel_infonce_with_valid(*features, *labels, variant=variant, impl=impl)
    gradients = torch.autograd.grad(loss.sum(), features)
    assert not valid.any()
    assert not any(value.any() for value in (loss, *gradients))


@pytest.mark.parametrize("variant", VARIANTS)
def test_ignored_rows_are_never_read(impl: str, variant: str) -> None:
    anchors, candidates, *labels = drawn(60, 90, 12, 3)
    results = []
    for filler in (0.0, math.nan, math.inf):
        features = [
            x.masked_fill((label < 0).unsqueeze(1), filler).requires_grad_()
            for x, label in zip((anchors, candidates), labels, strict=True)
        ]
        loss = pixel_infonce(*features, *labels, variant=variant, impl=impl)
        results.append((loss, *torch.autograd.grad(loss.sum(), features)))
    for clean, *others in zip(*results, strict=True):
        assert all(torch.equal(clean, other) for other in others)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_in_a_row_that_counts_is_not_hidden(impl: str, variant: str) -> None:
    anchors, candidates, *labels = drawn(40, 60, 12, 3)
    labels[0][5] = labels[1][0] = 0
    labels[1][1:] = labels[1][1:].clamp_min(1)
    labels[1][1] = 0
    anchors[5, 3] = math.nan
    assert pixel_infonce(anchors, candidates, *labels, variant=variant, impl=impl)[5].isnan()


@pytest.mark.parametrize("variant", VARIANTS)
def test_order_and_partition_of_the_candidates_do_not_matter(impl: str, variant: str) -> None:
    m, n = sized(impl, 100, 1500)
    anchors, candidates, *labels = drawn(m, n, 24, 4)
    order = torch.randperm(n)
    loss = pixel_infonce(anchors, candidates, *labels, variant=variant, impl=impl)
    shuffled = pixel_infonce(anchors, candidates[order], labels[0], labels[1][order], variant=variant, impl=impl)
    torch.testing.assert_close(shuffled, loss, rtol=1e-5, atol=1e-6)
    # Scaling features and temperature together changes nothing.
    scaled = pixel_infonce(2 * anchors, 2 * candidates, *labels, temperature=0.4, variant=variant, impl=impl)
    torch.testing.assert_close(scaled, loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_call_gives_the_same_bits(impl: str, variant: str) -> None:
    inputs = drawn(*sized(impl, 600, 1100), 32, 3)
    features = [x.requires_grad_() for x in inputs[:2]]
    runs = []
    for _ in range(2):
        loss = pixel_infonce(*features, *inputs[2:], variant=variant, impl=impl)
        runs.append((loss, *torch.autograd.grad(loss.sum(), features)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_backward_pass_goes_on_from_another_backend_s_state(impl: str, variant: str) -> None:
    inputs = (*drawn(60, 200, 24, 3), None, 0.1, variant)
    grad = torch.randn(60)
    gradients = []
    for forward, backward in ((impl, "reference"), ("reference", impl)):
        _, *state = torch.ops.cldf_fast.pixel_infonce(*inputs, forward)
        gradients.append(torch.ops.cldf_fast.pixel_infonce_backward(grad, *state, *inputs, True, True, backward))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_gradient_alone_is_the_same(impl: str, variant: str) -> None:
    inputs = drawn(*sized(impl, 60, 507), 24, 3)
    both = [x.requires_grad_() for x in inputs[:2]]
    expected = torch.autograd.grad(pixel_infonce(*inputs, variant=variant, reduction="mean", impl=impl), both)
    for at in (0, 1):
        features = [x.detach() for x in both]
        features[at].requires_grad_()
        loss = pixel_infonce(*features, *inputs[2:], variant=variant, reduction="mean", impl=impl)
        assert torch.equal(torch.autograd.grad(loss, features[at])[0], expected[at])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_bank_is_more_candidates_without_gradient(impl: str, reduction: str, variant: str) -> None:
    m, n = sized(impl, 60, 1500)
    inputs = drawn(m, n, 24, 3)
    features, labels = [x.requires_grad_() for x in inputs[:2]], inputs[2:]
    own, options = n // 3, {"variant": variant, "reduction": reduction, "impl": impl}
    whole = pixel_infonce(*features, *labels, **options)
    parts = (features[0], features[1][:own], labels[0], labels[1][:own])
    split = pixel_infonce(*parts, bank=features[1][own:], bank_labels=labels[1][own:], **options)
    torch.testing.assert_close(split, whole, rtol=1e-6, atol=0)
    (anchors, candidates), (found_anchors, found) = (
        torch.autograd.grad(loss.sum(), features) for loss in (whole, split)
    )
    torch.testing.assert_close(found_anchors, anchors)
    torch.testing.assert_close(found[:own], candidates[:own])
    assert not found[own:].any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_more_candidates_than_are_held_at_once(variant: str) -> None:
    needs("cpu", "pixel_infonce")
    inputs = drawn(70, 70_001, 3, 3)
    compare("cpu", *inputs, self_index=torch.randint(-1, 70_001, (70,)), variant=variant, tolerance=1e-5)


def test_the_number_of_threads_does_not_matter() -> None:
    needs("cpu", "pixel_infonce")
    inputs = drawn(200, 3000, 20, 3)
    features = [x.requires_grad_() for x in inputs[:2]]

    def run() -> tuple[Tensor, ...]:
        loss = pixel_infonce(*inputs, reduction="sum", impl="cpu")
        return (loss, *torch.autograd.grad(loss, features))

    check_threads_change_no_bit(run)


@pytest.mark.slow
@pytest.mark.skipif("CLDF_FAST_CPU_CAPABILITY" in os.environ, reason="this is one of the lesser instruction sets")
@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_lesser_instruction_sets(capability: str) -> None:
    """The tests of `cpu` once more, as on a machine that has no more than these instructions."""
    run_again(__file__, {"CLDF_FAST_CPU_CAPABILITY": capability}, "cpu and not lesser")


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter")
def test_triton_under_its_interpreter() -> None:
    """The tests above once more, in a process whose kernels are interpreted from the start."""
    pytest.importorskip("triton")
    run_again(__file__, {"TRITON_INTERPRET": "1"}, "triton")


def test_a_million_candidates_need_no_matrix() -> None:
    needs("cpu", "pixel_infonce")
    anchors, candidates, *labels = drawn(2000, 1_000_000, 4, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss = pixel_infonce(anchors.requires_grad_(), candidates, *labels, variant="supcon", impl="cpu")
    loss.sum().backward()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    # The matrix would take 8 GB; sorted copies of the candidates and their labels take some 100 MB.
    assert grown < 0.05 * 4 * 2000 * 1_000_000
    assert loss.isfinite().all()
    assert anchors.grad is not None
    assert anchors.grad.any()


def test_cpu_says_what_it_can_not_serve() -> None:
    needs("cpu", "pixel_infonce")
    inputs = drawn(3, 4, 2, 2, torch.float64)
    with pytest.raises(BackendError, match="needs float32, float16 or bfloat16, got float64"):
        pixel_infonce(*inputs, impl="cpu")
    elsewhere = [x.to("meta") for x in drawn(3, 4, 2, 2)]
    with pytest.raises(BackendError, match="needs tensors on cpu, got them on meta"):
        _dispatch.select("pixel_infonce", "cpu", *elsewhere, None, 0.1, "supcon")
