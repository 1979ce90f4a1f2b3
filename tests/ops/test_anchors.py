from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch.library import opcheck

from cldf_fast.errors import BackendError, ConfigError, DataError
from cldf_fast.ops import sample_anchors
from cldf_fast.ops.reference import ANCHOR_STREAM, philox4x32

PUBLISHED_PHILOX = [
    # (key, counter, words): known answers distributed with Random123 by the authors of Philox.
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 2, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def test_philox_gives_the_published_words():
    for key, counter, words in PUBLISHED_PHILOX:
        assert philox4x32(key, counter) == words
    keys, counters, words = (torch.tensor(column).T for column in zip(*PUBLISHED_PHILOX, strict=True))
    assert torch.equal(torch.stack(philox4x32(tuple(keys), tuple(counters))), words)


def numpy_philox(seed: int, counter: tuple[np.ndarray | int, ...]) -> list[np.ndarray]:
    """Philox-4x32-10 on unsigned integers, written apart from the package's."""
    c = [np.asarray(x).astype(np.uint64) for x in np.broadcast_arrays(*counter)]
    k = [seed % 2**32, (seed >> 32) % 2**32]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
        c = [(b >> high) ^ c[1] ^ np.uint64(k[0]), b & low, (a >> high) ^ c[3] ^ np.uint64(k[1]), a & low]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def random_labels(batch: int, height: int, width: int, classes: int = 3) -> torch.Tensor:
    return torch.randint(-1, classes, (batch, height, width))


@pytest.mark.parametrize("seed_value", [0, 1, -1, 2**63 - 1, -(2**63), 123456789012345678])
def test_uniform_anchors_are_the_smallest_words_of_a_class(seed_value):
    labels, image_index = random_labels(2, 15, 17), torch.tensor([3, 2**40 + 5])
    indices, counts = sample_anchors(labels, num_classes=3, per_class=6, seed=seed_value, image_index=image_index)
    for b, k in itertools.product(range(2), range(3)):
        image = int(image_index[b])
        blocks = numpy_philox(seed_value, (np.arange(64), image % 2**32, image >> 32, ANCHOR_STREAM))
        words = np.stack(blocks, axis=1).flatten()
        members = np.flatnonzero(labels[b].flatten().numpy() == k)
        expected = members[np.argsort(words[members], kind="stable")][:6]
        assert indices[b, k].tolist() == expected.tolist()
        assert counts[b, k] == 6


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("height", "width", "classes", "per_class"), [(1, 1, 1, 1), (15, 17, 3, 40), (2, 252, 5, 700)])
def test_drawn_pixels_are_distinct_and_of_their_class(height, width, classes, per_class, weighted, seed):
    labels = random_labels(3, height, width, classes)
    weight = torch.rand(3, height, width).mul(2).sub(0.5).clamp_min(0) if weighted else None
    indices, counts = sample_anchors(labels, weight, num_classes=classes, per_class=per_class, seed=seed)
    assert indices.shape == (3, classes, per_class)
    assert indices.dtype == counts.dtype == torch.int64
    drawable = torch.ones_like(labels, dtype=torch.bool) if weight is None else weight > 0
    for b, k in itertools.product(range(3), range(classes)):
        members = set(torch.nonzero((labels[b] == k).flatten() & drawable[b].flatten()).flatten().tolist())
        count = int(counts[b, k])
        drawn, padding = indices[b, k, :count].tolist(), indices[b, k, count:].tolist()
        assert count == min(per_class, len(members))
        assert len(set(drawn)) == count
        assert set(drawn) <= members
        assert set(padding) <= {-1}


@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 0.5, 4.0, 1e-3)])
def test_inclusion_follows_the_weights(weights, seed):
    images, drawn = 30_000, 2
    weight = None if weights is None else torch.tensor(weights).expand(images, 1, 5)
    labels = torch.zeros(images, 1, 5, dtype=torch.int8)
    indices, _ = sample_anchors(labels, weight, num_classes=1, per_class=drawn, seed=seed)
    share = np.array(weights or (1.0,) * 5)
    share /= share.sum()
    pairs = [(i, j) for i, j in itertools.permutations(range(5), drawn) if share[i] * share[j] > 1e-5]
    expected = np.array([share[i] * share[j] / (1 - share[i]) for i, j in pairs])
    found = np.array([int((indices[:, 0] == torch.tensor(pair)).all(dim=1).sum()) for pair in pairs])
    rest_expected, rest_found = 1 - expected.sum(), images - found.sum()
    if rest_expected > 1e-9:
        expected, found = np.append(expected, rest_expected), np.append(found, rest_found)
    assert chisquare(found, expected * images, sum_check=False).pvalue > 1e-4


def test_two_images_and_two_seeds_draw_differently(seed):
    labels = torch.zeros(2, 16, 16, dtype=torch.int64)
    first, _ = sample_anchors(labels, num_classes=1, per_class=20, seed=seed)
    second, _ = sample_anchors(labels, num_classes=1, per_class=20, seed=seed + 1)
    draws = [set(row.tolist()) for row in torch.cat([first, second]).flatten(1)]
    assert len({frozenset(draw) for draw in draws}) == 4


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8])
def test_nothing_to_draw_gives_padding_only(dtype, weighted):
    ignored = torch.tensor(-1).to(dtype).expand(2, 3, 4)
    weight = torch.rand(2, 3, 4) if weighted else None
    indices, counts = sample_anchors(ignored, weight, num_classes=2, per_class=5, seed=0)
    assert (indices == -1).all()
    assert (counts == 0).all()


def test_weights_that_are_zero_negative_or_nan_are_never_drawn(seed):
    labels = torch.zeros(1, 1, 6, dtype=torch.int8)
    weight = torch.tensor([[[0.0, 1.0, -1.0, torch.nan, 1e-30, torch.inf]]])
    indices, counts = sample_anchors(labels, weight, num_classes=1, per_class=6, seed=seed)
    assert indices[0, 0].tolist() == [5, 1, 4, -1, -1, -1]
    assert counts.item() == 3


def test_no_image_or_no_pixel_gives_the_fixed_shape():
    empty = [torch.zeros(0, 4, 4, dtype=torch.int8), torch.zeros(2, 0, 4, dtype=torch.int8)]
    for labels in empty:
        for weight in (None, torch.zeros(labels.shape)):
            indices, counts = sample_anchors(labels, weight, num_classes=2, per_class=3, seed=0)
            assert indices.shape == (len(labels), 2, 3)
            assert (indices == -1).all()
            assert (counts == 0).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 20), st.booleans())
def test_splitting_the_batch_and_drawing_fewer_change_nothing(seed, batch, per_class, weighted):
    torch.manual_seed(seed)
    labels, image_index = random_labels(batch, 3, 5), torch.randperm(100)[:batch]
    weight = torch.rand(batch, 3, 5) if weighted else None

    def draw(rows, size):
        return sample_anchors(
            labels[rows],
            None if weight is None else weight[rows],
            num_classes=3,
            per_class=size,
            seed=torch.tensor(seed),
            image_index=image_index[rows],
        )

    whole, counts = draw(slice(None), per_class)
    order = torch.randperm(batch)
    for row in order.split(2):
        part, part_counts = draw(row, per_class)
        assert torch.equal(part, whole[row])
        assert torch.equal(part_counts, counts[row])
    fewer, _ = draw(slice(None), 1)
    assert torch.equal(fewer[..., 0], whole[..., 0])


def test_seeds_may_be_integers_or_tensors(seed):
    labels = random_labels(3, 8, 8)
    one, _ = sample_anchors(labels, num_classes=3, per_class=4, seed=seed)
    for value in (torch.tensor(seed), torch.full((3,), seed)):
        assert torch.equal(sample_anchors(labels, num_classes=3, per_class=4, seed=value)[0], one)
    seeds = torch.tensor([seed, seed + 1, seed + 2])
    each, _ = sample_anchors(labels, num_classes=3, per_class=4, seed=seeds, image_index=torch.zeros(3).long())
    for b in range(3):
        alone, _ = sample_anchors(labels[b : b + 1], num_classes=3, per_class=4, seed=seed + b)
        assert torch.equal(each[b], alone[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.zeros(2, 3)}, DataError, r"labels: expected integer \[B, H, W\], got float32 \[2, 3\]"),
        ({"labels": torch.zeros(2, 3, 4)}, DataError, "labels: expected integer"),
        ({"labels": torch.zeros(1, 2**16, 2**15, dtype=torch.int8, device="meta")}, DataError, "fewer than 2"),
        ({"weight": torch.zeros(2, 3, 3)}, DataError, r"weight: expected floating \[2, 3, 4\]"),
        ({"weight": torch.zeros(2, 3, 4, dtype=torch.int64)}, DataError, "weight: expected floating"),
        ({"num_classes": 0}, ConfigError, "num_classes: expected an integer, 1 or more, got 0"),
        ({"per_class": 0}, ConfigError, "per_class: expected an integer, 1 or more, got 0"),
        ({"per_class": 2.0}, ConfigError, "per_class: expected an integer, 1 or more, got 2.0"),
        ({"seed": 2**63}, ConfigError, "seed: expected an integer of 64 bits"),
        ({"seed": "7"}, ConfigError, "seed: expected an integer of 64 bits with sign, or a tensor of them, got '7'"),
        ({"seed": torch.tensor(1.0)}, DataError, "seed: expected int64"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, DataError, r"seed: expected int64 \[2\]"),
        ({"image_index": torch.zeros(3, dtype=torch.int64)}, DataError, r"image_index: expected int64 \[2\]"),
        ({"impl": "gpu"}, BackendError, "impl: expected auto or one of"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    good = {"labels": torch.zeros(2, 3, 4, dtype=torch.int64), "num_classes": 2, "per_class": 3, "seed": 0}
    with pytest.raises(error, match=message):
        sample_anchors(**{**good, **change})


def test_operator_is_registered_rightly_and_compiles():
    labels, weight = random_labels(2, 4, 5).to(torch.int8), torch.rand(2, 4, 5)
    seed, image_index = torch.tensor([1, 2]), torch.tensor([0, 1])
    for weights in (None, weight):
        opcheck(torch.ops.cldf_fast.sample_anchors.default, (labels, weights, seed, image_index, 3, 30, "auto"))

    def draw(labels, weight, seed):
        return sample_anchors(labels, weight, num_classes=3, per_class=4, seed=seed)

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (4, 7):
        labels, weight = random_labels(2, size, 5), torch.rand(2, size, 5)
        for value in (size, torch.tensor(size)):
            for ours, eager in zip(compiled(labels, weight, value), draw(labels, weight, value), strict=True):
                assert torch.equal(ours, eager)
