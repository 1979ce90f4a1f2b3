"""What only a CUDA device can show: the same results as on the CPU, with no host synchronisation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cldf_fast.ops import (
    backend_report,
    fuse_evidence,
    gradient_saliency,
    noised_batch,
    pixel_infonce,
    pixel_infonce_with_valid,
    pixel_seed,
    sample_anchors,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def infonce(anchors, candidates, anchor_labels, candidate_labels):
    features = anchors.detach().requires_grad_(), candidates.detach().requires_grad_()
    loss, valid = pixel_infonce_with_valid(*features, anchor_labels, candidate_labels)
    return loss.detach(), valid, *torch.autograd.grad(loss.sum() / valid.sum().clamp_min(1), features)


def anchors(labels, weight):
    uniform = sample_anchors(labels, num_classes=3, per_class=20, seed=7)
    return *uniform, *sample_anchors(labels, weight, num_classes=3, per_class=20, seed=7)


def saliency(x, alpha_bar, present):
    seeds = pixel_seed(x)
    noised = noised_batch(x, alpha_bar, seeds)
    maps = gradient_saliency(noised.unflatten(0, (len(alpha_bar), len(x))))
    both = maps[:, None].expand(-1, present.shape[1], -1, -1)
    return seeds, noised, maps, fuse_evidence(both, both, present, thresholds=(0.5, 0.5, 0.2, 0.2))


CASES = {
    "infonce": (
        infonce,
        lambda: (torch.randn(30, 8), torch.randn(50, 8), torch.randint(-1, 3, (30,)), torch.randint(-1, 3, (50,))),
    ),
    "anchors": (anchors, lambda: (torch.randint(-1, 3, (4, 31, 17)), torch.rand(4, 31, 17))),
    "saliency": (saliency, lambda: (torch.randn(3, 2, 31, 17), torch.tensor([0.9, 0.4]), torch.rand(3, 2) < 0.7)),
}


@pytest.mark.parametrize("name", CASES)
def test_cuda_agrees_with_the_cpu_without_synchronising(name, request):
    function, make = CASES[name]
    inputs = make()
    on_device = [tensor.cuda() for tensor in inputs]
    function(*on_device)  # libraries may synchronise once, when they load
    request.getfixturevalue("no_synchronisation")
    found = function(*on_device)
    torch.cuda.set_sync_debug_mode("default")
    for ours, expected in zip(found, function(*inputs), strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-4, atol=1e-5)


def replayed(step, *inputs):
    """What a captured step gives for other values in its inputs, and what it gives when it is called with them."""
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for values in inputs:
            values.copy_(values.roll(1, dims=0))
    graph.replay()
    expected = step()
    torch.cuda.synchronize()
    return captured, expected


@pytest.mark.parametrize("weighted", [False, True])
def test_a_cuda_graph_replays_anchors_with_another_seed(weighted):
    labels = torch.randint(-1, 3, (4, 60, 50), device="cuda")
    weight = torch.rand(4, 60, 50, device="cuda") if weighted else None
    seed = torch.arange(4, device="cuda")

    def step():
        return sample_anchors(labels, weight, num_classes=3, per_class=70, seed=seed, impl="triton")

    captured, expected = replayed(step, labels, seed)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(captured, expected, strict=True))


def test_large_labels_are_sampled_as_on_the_cpu():
    labels = torch.randint(-1, 3, (1, 4096, 8192), dtype=torch.int8)
    options = {"num_classes": 3, "per_class": 500, "seed": 3}
    on_device = sample_anchors(labels.cuda(), **options, impl="triton")
    assert all(torch.equal(a.cpu(), b) for a, b in zip(on_device, sample_anchors(labels, **options), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", CASES)
def test_tensors_on_another_device_than_the_current(name):
    function, make = CASES[name]
    inputs = make()
    found = function(*(tensor.to("cuda:1") for tensor in inputs))
    for ours, expected in zip(found, function(*inputs), strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["per_positive", "supcon"])
@pytest.mark.parametrize(("size", "dim"), [(300, 40), (2500, 64)])
def test_a_cuda_graph_replays_loss_and_gradients(size, dim, variant):
    """Small problems go to the kernels as they are, large ones are sorted first."""
    features = [torch.randn(size, dim, device="cuda").requires_grad_() for _ in range(2)]
    labels = [torch.randint(-1, 3, (size,), device="cuda") for _ in range(2)]

    def step():
        loss = pixel_infonce(*features, *labels, variant=variant, reduction="mean", impl="triton")
        return loss, *torch.autograd.grad(loss, features)

    captured, expected = replayed(step, *features, *labels)
    for ours, theirs in zip(captured, expected, strict=True):
        assert torch.equal(ours, theirs)


# --- Each saliency operator on its own, by its CUDA kernels


def seeds_of(x):
    return pixel_seed(x, impl="cuda")


def noised(x, alpha_bar, seeds):
    return noised_batch(x, alpha_bar, seeds, impl="cuda")


def maps(grad):
    return torch.stack([gradient_saliency(grad, sigma=sigma, impl="cuda") for sigma in (0.0, 1.5, 20.0)])


def labels(gradient_map, cam, present):
    return fuse_evidence(gradient_map, cam, present, thresholds=(0.5, 0.5, 0.2, 0.2), impl="cuda")


# Of some the last axis is a multiple of four, of some it is not; one image takes a cluster of blocks, and more.
OPERATORS = {
    "pixel_seed": (seeds_of, lambda: (torch.randn(3, 2, 97, 101),)),
    "noised_batch": (
        noised,
        lambda: (torch.randn(3, 2, 96, 100), torch.rand(4).double(), torch.randint(-(2**62), 2**62, (3,))),
    ),
    "gradient_saliency": (maps, lambda: (torch.randn(3, 2, 4, 160, 205),)),
    "gradient_saliency, channels last": (maps, lambda: (torch.randn(3, 2, 160, 208, 4).movedim(-1, 2),)),
    "fuse_evidence": (labels, lambda: (*torch.rand(2, 3, 2, 97, 100), torch.rand(3, 2) < 0.7)),
}

needs_kernels = pytest.mark.skipif(
    backend_report()["pixel_seed"]["cuda"] != "serving", reason=backend_report()["pixel_seed"]["cuda"]
)


@needs_kernels
@pytest.mark.parametrize("name", OPERATORS)
def test_kernels_do_not_synchronise(name, request):
    function, make = OPERATORS[name]
    inputs = [tensor.cuda() for tensor in make()]
    function(*inputs)
    request.getfixturevalue("no_synchronisation")
    function(*inputs)


@needs_kernels
@pytest.mark.parametrize("name", OPERATORS)
def test_a_cuda_graph_replays_each_operator(name):
    function, make = OPERATORS[name]
    inputs = [tensor.cuda() for tensor in make()]
    captured, expected = replayed(lambda: function(*inputs), *inputs)
    assert torch.equal(captured, expected)


@needs_kernels
@pytest.mark.parametrize("name", OPERATORS)
def test_kernels_run_on_the_current_stream(name):
    """On a stream that is kept busy, with inputs that are only there once it is through."""
    function, make = OPERATORS[name]
    inputs = [tensor.cuda() for tensor in make()]
    expected = function(*inputs)
    late = [torch.zeros_like(tensor) for tensor in inputs]
    function(*late)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        for tensor, values in zip(late, inputs, strict=True):
            tensor.copy_(values)
        found = function(*late)
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


@needs_kernels
def test_a_broken_image_does_not_spoil_its_neighbours():
    grad = torch.randn(3, 5, 2, 160, 205, device="cuda")
    clean = maps(grad)
    grad[1, 2, 0, 150, 3], grad[0, 4, 1, 0, 0] = float("nan"), float("inf")
    found = maps(grad)
    assert found[:, [2, 4]].isnan().all()
    assert torch.equal(found[:, [0, 1, 3]], clean[:, [0, 1, 3]])


@needs_kernels
def test_offsets_pass_beyond_32_bits():
    """A view into memory of more than 2^31 elements, at its end."""
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GB of memory on the device")
    image = torch.randn(2, 64, 64, device="cuda").bfloat16()
    apart = torch.empty(2**31 + 2 * 64 * 64, dtype=torch.bfloat16, device="cuda").as_strided(
        (1, 2, 2, 64, 64), (0, 2**31, 64 * 64, 64, 1)
    )
    apart[0, 0], apart[0, 1] = image, image
    assert torch.equal(*gradient_saliency(apart, impl="cuda"))
