"""Features of a frozen UNet and the decoder on them, against the public procedure of ddpm-segmentation and its ports.

    python -m benchmarks features
    python -m benchmarks gpu features    # on a CUDA device

The public procedure runs the whole UNet for every noise level, resizes the blocks that hooks have kept to the image's
size, concatenates them and applies the multilayer perceptron to pixels. "inference" goes from an image to an embedding
of every pixel; "training" is a step: from four images and 1024 anchors to the loss and the decoder's gradients. All
rivals share weights, noise and decoder; but for ours and bfloat16 they run the UNet as it is published
(`public_layers`). What lies between the public procedure and ours, one trick after the other:

    public      as above
    truncated   the UNet stops after the last block that is read
    stacked     and all noise levels are one batch
    reading     and blocks stay at native size: the decoder's first layer comes before resizing, as soon as a block is
                there, so that none is held (inference), or single pixels are read (training)
    ours        inference: and 3 x 3 convolutions are ours, with a quarter of the products, as are norm, scale, shift
                and SiLU, one operation on channels side by side. training: once for all steps: the network is frozen,
                so what anchors read is held, in half precision, and a step has no UNet
    bfloat16    inference: ours with convolutions and products in bfloat16
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import Gpu
from benchmarks.public_layers import as_published
from benchmarks.suite import SEED, Benchmark, Problem, Work, counted_operations, result_of
from cldf_fast import DiffusionFeatures, PixelDecoder, PixelInfoNCE
from cldf_fast.diffusion import Diffusion
from cldf_fast.models.decoder import read_at
from cldf_fast.models.unet import UNet
from cldf_fast.ops import noised_batch, pixel_seed

PROBLEMS: tuple[Problem, ...] = tuple(
    {"part": part, "batch": batch, "size": 128, "width": width}
    for part, batch in (("inference", 1), ("training", 4))
    for width in (64, 128)
)
RIVALS = {
    "inference": ("ours", "public", "truncated", "stacked", "reading", "bfloat16"),
    "training": ("ours", "public", "reading", "held"),
}
# How far from the float32 result a rival may be, relative to its norm: rounding alone, or that of what it stores.
TOLERANCE = {("training", "ours"): 2e-3, ("inference", "bfloat16"): 5e-2}
EXACT = 1e-5

NOISE_LEVELS = (0.05, 0.15, 0.25)
DOWNSAMPLE = (8, 4, 2)
ANCHORS, CLASSES, TEMPERATURE = 1024, 2, 0.1


class Setting:
    """What all rivals share: images, their noise, the frozen UNet, the decoder, and anchors of a training step."""

    def __init__(self, batch: int, size: int, width: int, *, published: bool = False, device: str = "cpu") -> None:
        torch.manual_seed(SEED)
        unet = UNet(1, width, channel_mult=(1, 2, 3, 4), num_res_blocks=2, num_classes=3)
        # As initialised, every residual branch is zero.
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.normal_(0, 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
        unet.eval().requires_grad_(False)
        self.unet = (as_published(unet) if published else unet).to(device)
        self.features = self.reader()
        self.decoder = PixelDecoder(self.features.channels).eval().to(device)
        self.x = (torch.rand(batch, 1, size, size) * 2 - 1).to(device)
        self.labels = torch.arange(batch, device=device) % 3
        self.size = (size, size)
        self.times = self.features.times.to(device)
        self.noised = noised_batch(self.x, self.features.alpha_bar.to(device), pixel_seed(self.x)).unflatten(
            0, (len(NOISE_LEVELS), batch)
        )
        self.blocks = [i for i, factor in enumerate(self.unet.output_downsample) if factor in DOWNSAMPLE]
        self.anchors = torch.randint(size * size, (batch, ANCHORS // batch)).to(device)
        self.anchor_labels = torch.randint(CLASSES, (ANCHORS,)).to(device)

    def reader(self, dtype: torch.dtype = torch.float32) -> DiffusionFeatures:
        return DiffusionFeatures(
            self.unet,
            Diffusion(),
            noise_levels=NOISE_LEVELS,
            downsample=DOWNSAMPLE,
            prediction=False,
            dtype=dtype,
        )

    def step(self, embeddings: Tensor) -> tuple[Tensor, ...]:
        """Loss and the decoder's gradients from embeddings [A, D] of the anchors."""
        loss = PixelInfoNCE(TEMPERATURE)(embeddings, self.anchor_labels)
        gradients = torch.autograd.grad(loss, list(self.decoder.parameters()))
        return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])


# --- The public way, and the steps from it to ours --------------------------------------------------------------------


@torch.no_grad()
def hooked(
    unet: UNet, blocks: Sequence[int], x_t: Tensor, time: Tensor, condition: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Output blocks kept by hooks in a pass through the whole network, and what it predicts."""
    kept: list[Tensor] = []
    hooks = [
        unet.output_blocks[block].register_forward_hook(lambda _module, _arguments, out: kept.append(out))
        for block in blocks
    ]
    prediction = unet(x_t, time.expand(len(x_t)), condition)
    for hook in hooks:
        hook.remove()
    return kept, prediction


def whole_unet(setting: Setting, x_t: Tensor, time: Tensor) -> list[Tensor]:
    """Blocks from a pass through the whole network."""
    return hooked(setting.unet, setting.blocks, x_t, time, setting.labels)[0]


@torch.no_grad()
def truncated_unet(setting: Setting, x_t: Tensor, time: Tensor) -> list[Tensor]:
    """The same blocks, and nothing after them."""
    read = setting.unet.decoder_features(x_t, time.expand(len(x_t)), setting.labels, setting.blocks)
    return [read[block] for block in setting.blocks]


def full_size(maps: list[Tensor], size: tuple[int, int]) -> Tensor:
    """All maps [B, C_i, h_i, w_i] resized and concatenated: [B, C, H, W]."""
    return torch.cat([F.interpolate(each, size, mode="bilinear", align_corners=False) for each in maps], dim=1)


def concatenated(by_level: list[list[Tensor]], size: tuple[int, int]) -> Tensor:
    """Every level's maps at full size: [B, C, H, W], in the order of channels that `DiffusionFeatures` has."""
    return full_size([one for of_all_levels in zip(*by_level, strict=True) for one in of_all_levels], size)


def level_after_level(setting: Setting, blocks_of: Callable[[Setting, Tensor, Tensor], list[Tensor]]) -> Tensor:
    """Full-size features [B, C, H, W] of all noise levels."""
    by_level = [blocks_of(setting, x_t, time) for x_t, time in zip(setting.noised, setting.times, strict=True)]
    return concatenated(by_level, setting.size)


def mlp(decoder: PixelDecoder, features: Tensor) -> Tensor:
    """Embeddings [..., D] of features [..., C]; standardising, which the public decoders lack, costs nothing here."""
    weight = decoder.first.weight / decoder.deviation
    hidden = F.linear(features, weight, decoder.first.bias - weight @ decoder.mean)
    return F.normalize(decoder.rest(hidden), dim=-1)


@torch.no_grad()
def every_pixel(setting: Setting, features: Tensor) -> tuple[Tensor]:
    """Embeddings [B, D, H, W] from full-size features."""
    return (mlp(setting.decoder, features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),)


def infer_level_after_level(
    setting: Setting, blocks_of: Callable[[Setting, Tensor, Tensor], list[Tensor]]
) -> tuple[Tensor, ...]:
    return every_pixel(setting, level_after_level(setting, blocks_of))


def infer_stacked(setting: Setting) -> tuple[Tensor, ...]:
    return every_pixel(setting, full_size(setting.features(setting.x, setting.labels), setting.size))


@torch.no_grad()
def infer(setting: Setting, features: DiffusionFeatures) -> tuple[Tensor, ...]:
    return (setting.decoder.embed(features, setting.x, setting.labels),)


def train_public(setting: Setting) -> tuple[Tensor, ...]:
    return train_on_full_size(setting, level_after_level(setting, whole_unet))


def train_on_full_size(setting: Setting, features: Tensor) -> tuple[Tensor, ...]:
    features = features.flatten(2)
    rows = features.gather(2, setting.anchors.unsqueeze(1).expand(-1, features.shape[1], -1)).transpose(1, 2)
    embeddings = mlp(setting.decoder, rows.flatten(0, 1))
    # The matrix of all pairs, as in the public losses; PixelInfoNCE's own value is compared with it.
    logits = embeddings @ embeddings.T / TEMPERATURE
    others = ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    positives = (setting.anchor_labels == setting.anchor_labels.unsqueeze(1)) & others
    log_probability = logits - logits.masked_fill(~others, -torch.inf).logsumexp(dim=1, keepdim=True)
    loss = -((log_probability * positives).sum(dim=1) / positives.sum(dim=1)).mean()
    gradients = torch.autograd.grad(loss, list(setting.decoder.parameters()))
    return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def train_reading(setting: Setting) -> tuple[Tensor, ...]:
    maps = setting.features(setting.x, setting.labels)
    return setting.step(setting.decoder.at(maps, setting.anchors, setting.size).flatten(0, 1))


def train_on_held(setting: Setting, held: Tensor) -> tuple[Tensor, ...]:
    return setting.step(setting.decoder(held.float()).flatten(0, 1))


def case(
    rival: str, part: str, batch: int, size: int, width: int, device: str = "cpu"
) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed: a call that gives embeddings [B, D, H, W], or the loss and gradients of a step."""
    setting = Setting(batch, size, width, published=rival not in ("ours", "bfloat16"), device=device)
    match part, rival:
        case "inference", "public":
            return partial(infer_level_after_level, setting, whole_unet)
        case "inference", "truncated":
            return partial(infer_level_after_level, setting, truncated_unet)
        case "inference", "stacked":
            return partial(infer_stacked, setting)
        case "inference", "bfloat16":
            return partial(infer, setting, setting.reader(torch.bfloat16))
        case "inference", "reading" | "ours":
            return partial(infer, setting, setting.features)
        case "training", "public":
            return partial(train_public, setting)
        case "training", "held":
            return partial(train_on_full_size, setting, level_after_level(setting, whole_unet))
        case "training", "reading":
            return partial(train_reading, setting)
        case "training", "ours":
            maps = setting.features(setting.x, setting.labels)
            return partial(train_on_held, setting, read_at(maps, setting.anchors, setting.size).half())
    raise ValueError(f"rival: expected one of {RIVALS[part]}, got {rival!r}")


def check(rival: str, problem: Problem, result: tuple[Tensor, ...]) -> None:
    """What the public procedure gives, or, of that itself, what the rival gives that is most like it."""
    part, other = problem["part"], {"inference": "stacked", "training": "reading"}[problem["part"]]
    expected = result_of("features", other if rival == "public" else "public", problem)
    agree(result, expected, TOLERANCE.get((part, rival), EXACT))


def agree(result: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    """Within a tolerance, relative to the norm."""
    for found, theirs in zip(result, expected, strict=True):
        assert theirs.std(correction=0) > 0 or theirs.ndim == 0
        assert (found - theirs).norm() / theirs.norm() < tolerance


def work(problem: Problem) -> Work | None:
    """Inference: our own operations; weights and image are read, and embeddings written."""
    if problem["part"] != "inference":
        return None
    setting = Setting(problem["batch"], problem["size"], problem["width"])
    weights = sum(each.nbytes for each in setting.unet.parameters())
    written: list[Tensor] = []
    operations = counted_operations(lambda: written.extend(infer(setting, setting.features)))
    return Work(operations, weights + written[0].nbytes)


BENCHMARK = Benchmark(
    ours="ours",
    rivals=lambda problem: RIVALS[problem["part"]],
    case=case,
    check=check,
    problems=PROBLEMS,
    quick=tuple(problem | {"size": 32, "width": 32} for problem in PROBLEMS[::2]),
    small=lambda problem: {"part": problem["part"], "batch": 1, "size": 16, "width": 32},
    headlines=PROBLEMS,
    variants=("bfloat16",),
    work=work,
)


def test_features(timed: Callable[[int], Any], memory: Callable[[], None], rival: str, problem: Problem) -> None:
    check(rival, problem, timed(5))
    if rival in ("ours", "public", "reading"):
        memory()


def on_gpu(gpu: Gpu) -> str:
    """Inference and training on a device, each compared with the public procedure there, and a volume; returns ours."""
    for problem in BENCHMARK.quick if gpu.rehearse else PROBLEMS:
        part = problem["part"]
        expected = case("public", **problem, device=gpu.device)()
        calls = {"ours": "ours", "public": "public"} | ({"ours_bfloat16": "bfloat16"} if part == "inference" else {})
        for rival, name in calls.items():
            compare = partial(agree, expected=expected, tolerance=TOLERANCE.get((part, name), EXACT))
            gpu.row(rival, problem, partial(case, name, **problem, device=gpu.device), check=compare)
    problem = {"part": "volume", "slices": 155, "size": 256, "width": 128}
    if gpu.rehearse:
        problem |= {"slices": 3, "size": 32, "width": 32}
    run, work = volume(**problem, device=gpu.device)

    def repeats(result: Tensor) -> None:
        torch.testing.assert_close(result, run())

    gpu.row("ours", problem, lambda: run, check=repeats, work=work)
    return "ours"


def volume(part: str, slices: int, size: int, width: int, device: str) -> tuple[Callable[[], Tensor], Work]:
    """Embeddings of all pixels of a volume of four channels, in bfloat16, by a UNet of diffusion-anomaly's shape.

    Returns the call, which gives the embeddings' sums, and its work, in which weights are read once a batch.
    """
    unet = UNet(4, width, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2, attention_downsample=(16,), num_classes=2)
    unet.eval().requires_grad_(False).to(device)
    features = DiffusionFeatures(
        unet, Diffusion(), noise_levels=NOISE_LEVELS, downsample=DOWNSAMPLE, prediction=False, dtype=torch.bfloat16
    )
    decoder = PixelDecoder(features.channels).eval().to(device)
    images = (torch.rand(slices, 4, size, size) * 2 - 1).to(device)
    labels = torch.zeros(slices, dtype=torch.long, device=device)

    @torch.no_grad()
    def embedded(rows: slice) -> Tensor:
        return decoder.embed(features, images[rows], labels[rows])

    def run() -> Tensor:
        return torch.stack([embedded(slice(i, i + 8)).sum() for i in range(0, slices, 8)])

    operations = counted_operations(lambda: embedded(slice(0, 1))) * slices
    weights = sum(each.nbytes for each in unet.parameters()) * -(-slices // 8)
    return run, Work(operations, weights + images.nbytes)
