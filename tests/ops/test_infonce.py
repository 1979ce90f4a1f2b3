from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from cldf_fast.errors import BackendError, ConfigError, DataError
from cldf_fast.ops import pixel_infonce, pixel_infonce_with_valid

VARIANTS = ("per_positive", "supcon")


def naive(anchors, candidates, anchor_labels, candidate_labels, temperature, variant, self_index=None):
    """The definition, one pair at a time, in float64: loss and which anchors count."""
    losses, valid = [], []
    for i, anchor in enumerate(anchors.double()):
        positive, negative = [], []
        for j, candidate in enumerate(candidates.double()):
            if anchor_labels[i] < 0 or candidate_labels[j] < 0 or (self_index is not None and self_index[i] == j):
                continue
            logit = float(anchor @ candidate) / temperature
            (positive if anchor_labels[i] == candidate_labels[j] else negative).append(logit)
        valid.append(bool(positive and negative))
        if not valid[-1]:
            losses.append(0.0)
        elif variant == "per_positive":
            gaps = [log_sum_exp(negative) - logit for logit in positive]
            losses.append(sum(log_sum_exp([0.0, gap]) for gap in gaps) / len(gaps))
        else:
            losses.append(log_sum_exp(positive + negative) - sum(positive) / len(positive))
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(valid, dtype=torch.bool)


def log_sum_exp(values: list[float]) -> float:
    largest = max(values)
    return largest + math.log(sum(math.exp(value - largest) for value in values))


def unit(rows: int, features: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, features, dtype=torch.float64), dim=1).to(dtype)


def case(m: int, n: int, d: int, dtype: torch.dtype = torch.float64, classes: int = 4):
    """Random unit features, and labels of which about one in five is ignored."""
    return (
        unit(m, d, dtype),
        unit(n, d, dtype),
        torch.randint(-1, classes, (m,)),
        torch.randint(-1, classes, (n,)),
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("m", "n", "d", "temperature"),
    [(1, 15, 7, 0.1), (15, 1, 64, 1.0), (15, 17, 1, 0.01), (17, 15, 64, 10.0), (17, 252, 7, 0.07), (252, 64, 64, 0.01)],
)
def test_matches_the_definition(m, n, d, temperature, variant):
    inputs = case(m, n, d)
    self_index = torch.randint(-1, n, (m,))
    loss, valid = pixel_infonce_with_valid(*inputs, temperature=temperature, variant=variant, self_index=self_index)
    expected, expected_valid = naive(*inputs, temperature, variant, self_index)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(valid, expected_valid)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_input_gives_float32_accuracy(dtype, variant):
    inputs = case(17, 60, 64, dtype)
    loss = pixel_infonce(*inputs, temperature=0.1, variant=variant)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), naive(*inputs, 0.1, variant)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("temperature", [1e-4, 1e-2, 1e4])
def test_extreme_temperatures_stay_finite_and_right(temperature, variant):
    anchors, candidates, *labels = case(15, 40, 8, torch.float32)
    anchors.requires_grad_()
    loss = pixel_infonce(anchors, candidates, *labels, temperature=temperature, variant=variant)
    loss.sum().backward()
    expected, _ = naive(anchors.detach(), candidates, *labels, temperature, variant)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-4, atol=1e-4)
    assert anchors.grad.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_large_unnormalised_features_do_not_overflow(variant):
    anchors, candidates, *labels = case(6, 9, 5, torch.float32)
    anchors, candidates = (1e3 * anchors).requires_grad_(), (1e3 * candidates).requires_grad_()
    loss = pixel_infonce(anchors, candidates, *labels, temperature=0.01, variant=variant)
    loss.sum().backward()
    assert all(value.isfinite().all() for value in (loss, anchors.grad, candidates.grad))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("m", "n", "d"), [(1, 5, 3), (7, 15, 1), (15, 17, 4)])
def test_gradients_are_those_of_the_loss(m, n, d, variant):
    anchors, candidates, *labels = case(m, n, d, classes=2)
    labels[0][0], labels[1][:2] = 0, torch.tensor([0, 1])
    self_index = torch.randint(-1, n, (m,))
    self_index[0] = -1

    def loss(anchors, candidates):
        return pixel_infonce(anchors, candidates, *labels, temperature=0.3, variant=variant, self_index=self_index)

    def mean(anchors, candidates):
        return pixel_infonce(
            anchors,
            candidates,
            *labels,
            temperature=0.3,
            variant=variant,
            self_index=self_index,
            anchor_weight=weight,
            reduction="mean",
        )

    weight = torch.rand(m, dtype=torch.float64)
    for function in (loss, mean):
        assert torch.autograd.gradcheck(function, (anchors.requires_grad_(), candidates.requires_grad_()))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_reductions_are_those_of_the_single_losses(impl, variant):
    anchors, candidates, *labels = case(20, 30, 6, torch.float32)
    features = [anchors.requires_grad_(), candidates.requires_grad_()]
    weight = torch.rand(20)

    def reduced(reduction, weight):
        options = {"anchor_weight": weight, "reduction": reduction, "variant": variant, "impl": impl}
        return pixel_infonce(*features, *labels, **options)

    losses, valid = pixel_infonce_with_valid(*features, *labels, variant=variant, impl=impl)
    for w, factor in ((None, torch.ones(20)), (weight, weight)):
        expected = {"none": losses * factor, "sum": (losses * factor).sum()}
        expected["mean"] = expected["sum"] / (factor * valid).sum()
        for reduction, wanted in expected.items():
            found = reduced(reduction, w)
            torch.testing.assert_close(found, wanted)
            gradients = (torch.autograd.grad(x.sum(), features, retain_graph=True) for x in (found, wanted))
            for ours, theirs in zip(*gradients, strict=True):
                torch.testing.assert_close(ours, theirs)


def test_a_mean_over_nothing_is_a_connected_zero():
    anchors, candidates, *labels = case(5, 9, 4)
    anchors.requires_grad_()
    for weight, anchor_labels in ((torch.zeros(5), labels[0].clamp_min(0)), (None, torch.full((5,), -1))):
        options = {"anchor_weight": weight, "reduction": "mean"}
        loss = pixel_infonce(anchors, candidates, anchor_labels, labels[1].clamp_min(0), **options)
        assert float(loss.detach()) == 0
        assert not torch.autograd.grad(loss, anchors)[0].any()


def test_large_half_precision_gradients_of_a_sum_do_not_overflow():
    """The gradient of the sum is beyond float16, that of the mean is not."""
    anchors = torch.ones(3000, 1, dtype=torch.float16)
    candidates = torch.tensor([[0.0], [1.0]], dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(3000, dtype=torch.int64)
    for impl in ("auto", "reference"):
        options = {"temperature": 0.02, "reduction": "mean", "impl": impl}
        loss = pixel_infonce(anchors, candidates, labels, torch.tensor([0, 1]), **options)
        (gradient,) = torch.autograd.grad(loss, candidates)
        torch.testing.assert_close(gradient, torch.tensor([[-50.0], [50.0]], dtype=torch.float16))


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_gradients_agree_with_float64(variant):
    inputs = case(252, 252, 64)
    gradients = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        features = [x.bfloat16().to(dtype).requires_grad_() for x in inputs[:2]]
        loss = pixel_infonce(*features, *inputs[2:], temperature=0.07, variant=variant)
        gradients.append(torch.autograd.grad(loss.mean(), features))
        assert all(gradient.dtype == dtype for gradient in gradients[-1])
    for exact, single, half in zip(*gradients, strict=True):
        torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(half.double(), exact, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("anchor_labels", "candidate_labels"),
    [
        ([-1, -1], [0, 1, -1]),
        ([0, 1], [-1, -1, -1]),
        ([0, 0], [0, 0, 0]),
        ([0, 0], [1, 1, 2]),
        ([3], [3]),
        ([3], [2]),
        ([], [0, 1]),
        ([0, 1], []),
        ([], []),
    ],
)
def test_anchors_without_both_kinds_give_a_connected_zero(anchor_labels, candidate_labels, variant):
    labels = [torch.tensor(values, dtype=torch.int64) for values in (anchor_labels, candidate_labels)]
    anchors, candidates = (torch.randn(len(values), 4, requires_grad=True) for values in labels)
    loss, valid = pixel_infonce_with_valid(anchors, candidates, *labels, variant=variant)
    loss.sum().backward()
    assert loss.shape == valid.shape == (len(labels[0]),)
    assert not valid.any()
    assert all(torch.equal(value, torch.zeros_like(value)) for value in (loss, anchors.grad, candidates.grad))


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_anchor_that_does_not_count_leaves_the_others_alone(variant):
    candidates, candidate_labels = unit(9, 5), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, -1])
    anchors, labels = unit(4, 5), torch.tensor([0, 7, -1, 2])
    loss, valid = pixel_infonce_with_valid(anchors, candidates, labels, candidate_labels, variant=variant)
    alone = pixel_infonce(anchors[[0, 3]], candidates, labels[[0, 3]], candidate_labels, variant=variant)
    assert valid.tolist() == [True, False, False, True]
    torch.testing.assert_close(loss[[0, 3]], alone)
    assert loss[1] == loss[2] == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_ignored_rows_are_never_read(variant):
    anchors, candidates, *labels = case(20, 30, 6, torch.float32)
    labels[0][3] = labels[1][5] = -1
    results = []
    for filler in (0.0, math.nan, math.inf):
        features = [
            x.masked_fill((label < 0).unsqueeze(1), filler).requires_grad_()
            for x, label in zip((anchors, candidates), labels, strict=True)
        ]
        loss = pixel_infonce(*features, *labels, variant=variant)
        results.append((loss, *torch.autograd.grad(loss.sum(), features)))
    for clean, with_nan, with_infinity in zip(*results, strict=True):
        assert torch.equal(clean, with_nan)
        assert torch.equal(clean, with_infinity)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bank_without_gradient_costs_none(variant):
    anchors, bank, *labels = case(17, 40, 8)
    anchors.requires_grad_()
    with_bank = torch.autograd.grad(pixel_infonce(anchors, bank, *labels, variant=variant).sum(), anchors)[0]
    bank.requires_grad_()
    both = torch.autograd.grad(pixel_infonce(anchors, bank, *labels, variant=variant).sum(), (anchors, bank))
    assert torch.equal(with_bank, both[0])

    state = torch.ops.cldf_fast.pixel_infonce(anchors, bank, *labels, None, 0.1, variant, "auto")
    inputs = [x.detach() for x in (torch.ones_like(state[0]), *state[1:], anchors, bank, *labels)]
    for need in [(True, False), (False, True)]:
        found = torch.ops.cldf_fast.pixel_infonce_backward(*inputs, None, 0.1, variant, *need, "auto")
        for needed, gradient, whole in zip(need, found, both, strict=True):
            assert torch.equal(gradient, whole) if needed else gradient.numel() == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_state_for_the_backward_pass_is_what_backends_agreed_on(variant):
    anchors, candidates, anchor_labels, candidate_labels = case(15, 30, 5)
    anchor_labels[:3] = torch.tensor([0, -1, 9])
    inputs = (anchors.clone().requires_grad_(), candidates, anchor_labels, candidate_labels, None, 0.5, variant)
    loss, *state = torch.ops.cldf_fast.pixel_infonce(*inputs, "auto")
    assert loss.requires_grad
    assert not any(x.requires_grad for x in state)
    loss, (lse, weight, num_positives) = loss.detach(), state
    _, valid = naive(anchors, candidates, anchor_labels, candidate_labels, 0.5, variant)
    for i, label in enumerate(anchor_labels.tolist()):
        logits = candidates @ anchors[i] / 0.5
        positive = logits[candidate_labels == label]
        negative = logits[(candidate_labels >= 0) & (candidate_labels != label)]
        if not valid[i]:
            expected = (0.0, math.inf, 0.0, 0)
        elif variant == "per_positive":
            of_negatives = log_sum_exp(negative.tolist())
            pull = 1 / (1 + torch.exp(positive - of_negatives))
            expected = (float(loss[i]), of_negatives, float(pull.mean()), len(positive))
        else:
            expected = (float(loss[i]), log_sum_exp(torch.cat([positive, negative]).tolist()), 1.0, len(positive))
        found = (float(loss[i]), float(lse[i]), float(weight[i]), int(num_positives[i]))
        assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_does_not_lower_the_precision(variant):
    inputs = case(17, 40, 32, torch.float32)
    plain = pixel_infonce(*inputs, variant=variant)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pixel_infonce(*inputs, variant=variant), plain)


def test_strided_features_and_narrow_labels_are_read_rightly():
    anchors, candidates, *labels = case(9, 20, 6)
    expected = pixel_infonce(anchors, candidates, *labels)
    strided = anchors.T.contiguous().T, candidates.repeat_interleave(2, dim=1)[:, ::2]
    assert not any(x.is_contiguous() for x in strided)
    torch.testing.assert_close(pixel_infonce(*strided, *(label.to(torch.int8) for label in labels)), expected)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(2, 20), st.sampled_from(VARIANTS))
def test_order_of_candidates_names_of_classes_and_common_scale_do_not_matter(seed, m, n, variant):
    torch.manual_seed(seed)
    anchors, candidates, anchor_labels, candidate_labels = case(m, n, 5, classes=3)
    loss = pixel_infonce(anchors, candidates, anchor_labels, candidate_labels, temperature=0.2, variant=variant)
    order, names, scale = torch.randperm(n), torch.cat([torch.randperm(50)[:3], torch.tensor([-1])]), 1 + 3 * m
    changed = pixel_infonce(
        anchors * scale,
        candidates[order],
        names[anchor_labels],
        names[candidate_labels[order]],
        temperature=0.2 * scale,
        variant=variant,
    )
    torch.testing.assert_close(changed, loss)
    assert (loss >= 0).all()


@given(st.integers(0, 2**32 - 1), st.integers(2, 20))
def test_both_variants_agree_where_an_anchor_has_one_positive(seed, n):
    torch.manual_seed(seed)
    anchors, candidates = unit(n, 5), unit(n, 5)
    labels = torch.arange(n)
    per_positive, supcon = (pixel_infonce(anchors, candidates, labels, labels, variant=v) for v in VARIANTS)
    torch.testing.assert_close(per_positive, supcon)
    cross_entropy = torch.nn.functional.cross_entropy(anchors @ candidates.T / 0.1, labels, reduction="none")
    torch.testing.assert_close(supcon, cross_entropy)


@pytest.mark.parametrize("variant", VARIANTS)
def test_leaving_the_anchor_out_is_ignoring_that_candidate(variant):
    features, labels = unit(12, 5), torch.randint(0, 3, (12,))
    loss = pixel_infonce(features, features, labels, labels, variant=variant, self_index=torch.arange(12))
    for i in range(12):
        others = labels.index_fill(0, torch.tensor([i]), -1)
        alone = pixel_infonce(features[i : i + 1], features, labels[i : i + 1], others, variant=variant)
        torch.testing.assert_close(loss[i : i + 1], alone)


GOOD = {
    "anchors": torch.zeros(2, 3),
    "candidates": torch.zeros(4, 3),
    "anchor_labels": torch.zeros(2, dtype=torch.int64),
    "candidate_labels": torch.zeros(4, dtype=torch.int64),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"anchors": torch.zeros(2, 3, 1)}, DataError, r"anchors: expected floating \[M, D\], got float32 \[2, 3, 1\]"),
        ({"anchors": torch.zeros(2, 3, dtype=torch.int64)}, DataError, "anchors: expected floating"),
        ({"candidates": torch.zeros(4, 2)}, DataError, r"candidates: expected float32 \[N, 3\] on cpu, got .*\[4, 2\]"),
        ({"candidates": torch.zeros(4, 3).double()}, DataError, "candidates: expected float32 .* got float64"),
        ({"candidates": torch.zeros(4, 3, device="meta")}, DataError, "candidates: expected .* on cpu, got .* on meta"),
        ({"anchor_labels": torch.zeros(3, dtype=torch.int64)}, DataError, r"anchor_labels: expected integer \[2\]"),
        ({"candidate_labels": torch.zeros(4)}, DataError, "candidate_labels: expected integer .* got float32"),
        ({"self_index": torch.zeros(4, dtype=torch.int64)}, DataError, r"self_index: expected integer \[2\]"),
        ({"temperature": 0.0}, ConfigError, "temperature: expected a finite number above 0, got 0.0"),
        ({"temperature": math.nan}, ConfigError, "temperature"),
        ({"temperature": math.inf}, ConfigError, "temperature"),
        ({"temperature": "0.1"}, ConfigError, "temperature: expected a finite number above 0, got '0.1'"),
        ({"anchor_labels": [0, 1]}, DataError, r"anchor_labels: expected a tensor, integer \[2\], got list"),
        (
            {"anchor_weight": torch.zeros(3)},
            DataError,
            r"anchor_weight: expected floating \[2\] on cpu, got float32 \[3\]",
        ),
        ({"anchor_weight": torch.zeros(2).long(), "reduction": "sum"}, DataError, "anchor_weight: expected floating"),
        ({"bank": torch.zeros(4, 3)}, DataError, "bank, bank_labels: expected both or neither, got one of them"),
        ({"bank": torch.zeros(4, 2), "bank_labels": torch.zeros(4)}, DataError, r"bank: expected float32 \[B, 3\]"),
        ({"bank": torch.zeros(4, 3), "bank_labels": torch.zeros(4)}, DataError, "bank_labels: expected integer"),
        ({"reduction": "average"}, ConfigError, "reduction: expected one of none, mean, sum, got 'average'"),
        ({"variant": "clip"}, ConfigError, "variant: expected one of per_positive, supcon, got 'clip'"),
        ({"impl": "fastest"}, BackendError, "impl: expected auto or one of .*, got 'fastest'"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        pixel_infonce(**{**GOOD, **change})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_operators_are_registered_rightly(variant, dtype):
    anchors, candidates, *labels = case(5, 9, 4, dtype)
    for self_index in (None, torch.tensor([0, -1, 2, 3, 8])):
        for grad in (True, False):
            features = anchors.clone().requires_grad_(grad), candidates.clone().requires_grad_(grad)
            opcheck(
                torch.ops.cldf_fast.pixel_infonce.default, (*features, *labels, self_index, 0.1, variant, "reference")
            )
    loss, *state = torch.ops.cldf_fast.pixel_infonce(anchors, candidates, *labels, None, 0.1, variant, "auto")
    arguments = (torch.ones_like(loss), *state, anchors, candidates, *labels, None, 0.1, variant, True, False, "auto")
    opcheck(torch.ops.cldf_fast.pixel_infonce_backward.default, arguments)
    for impl in ("auto", "reference"):
        for need in ((True, True), (False, True), (False, False)):
            features = [
                x.detach().requires_grad_(needed) for x, needed in zip((anchors, candidates), need, strict=True)
            ]
            arguments = (*features, *labels, None, torch.rand(5), 7, 0.1, variant, *need, False, impl)
            opcheck(torch.ops.cldf_fast.pixel_infonce_sum.default, arguments)
        features = candidates.detach().requires_grad_(), candidates.detach()
        arguments = (*features, labels[1], labels[1], None, torch.rand(9), 9, 0.1, variant, True, False, True, impl)
        opcheck(torch.ops.cldf_fast.pixel_infonce_sum.default, arguments)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiles_into_one_graph_with_its_gradient(reduction, variant):
    def mean(anchors, candidates, anchor_labels, candidate_labels):
        inputs = (anchors, candidates, anchor_labels, candidate_labels)
        if reduction == "mean":
            return pixel_infonce(*inputs, variant=variant, reduction=reduction)
        loss, valid = pixel_infonce_with_valid(*inputs, variant=variant, self_index=None)
        return loss.sum() / valid.sum().clamp_min(1)

    compiled = torch.compile(mean, fullgraph=True, backend="aot_eager", dynamic=True)
    for m, n in ((7, 12), (9, 15), (9, 9)):
        anchors, candidates, *labels = case(m, n, 4)
        if m == n:  # features against themselves
            candidates = anchors
        features = anchors.requires_grad_(), candidates.requires_grad_()
        for ours, eager in zip(
            torch.autograd.grad(compiled(*features, *labels), features),
            torch.autograd.grad(mean(*features, *labels), features),
            strict=True,
        ):
            torch.testing.assert_close(ours, eager)
