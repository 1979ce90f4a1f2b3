"""Every operation in plain PyTorch: oracle of the tests, baseline of the benchmarks, last fallback.

Written to be read and to be right on any device and any floating dtype. The functions take the arguments of the
registered operations, already checked. They define what a faster backend must return, in three respects beyond values:
the state that `pixel_infonce` saves for its backward pass, the random numbers that a seed stands for, and that an
image's result never depends on the batch it came in. For the last, whatever is summed or drawn through a
transcendental function is computed in float64 and rounded once to float32: orders of summation and library functions
differ between batch sizes and devices, but far below what survives that rounding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# --- Random numbers ---------------------------------------------------------------------------------------------------
#
# Every random number is a word of Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011):
#
#   key      seed bits 0-31, seed bits 32-63
#   counter  anchors: flat pixel // 4, image_index bits 0-31, image_index bits 32-63, ANCHOR_STREAM
#            noise:   flat element of [C, H, W] // 4, noise level, 0, NOISE_STREAM
#
# Words are held as int64: torch has no arithmetic on uint32.

ANCHOR_STREAM = 1
NOISE_STREAM = 2

_WORD = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)

Word = Tensor | int
"""32 bits without sign: int64 tensors with values in [0, 2^32), broadcast against each other, or Python integers."""


def philox4x32(key: tuple[Word, Word], counter: tuple[Word, Word, Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Philox-4x32 with ten rounds: four random words for every key and counter."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # The signed product wraps, but its 64 bits are those of the unsigned one.
        p0, p1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = _high(p1) ^ c1 ^ k0, _low(p1), _high(p0) ^ c3 ^ k1, _low(p0)
        k0, k1 = _low(k0 + _PHILOX_WEYL[0]), _low(k1 + _PHILOX_WEYL[1])
    return c0, c1, c2, c3


def _low(word: Word) -> Word:
    return word & _WORD


def _high(word: Word) -> Word:
    return (word >> 32) & _WORD


def standard_normal(seed: Tensor, levels: int, elements: int) -> Tensor:
    """Standard normal numbers float32 [levels, B, elements] for the seeds int64 [B], by Box-Muller.

    Elements 4j to 4j+3 come from the words r0..r3 of block j: elements 4j and 4j+1 are radius * cos(angle) and
    radius * sin(angle) with radius = sqrt(-2 ln(((r0 >> 8) + 1) / 2^24)) and angle = 2 pi (r1 >> 8) / 2^24; elements
    4j+2 and 4j+3 are the same of r2 and r3. The value is that formula in float64, rounded to float32.
    """
    seed = seed.view(1, -1, 1)
    block = torch.arange(-(-elements // 4), device=seed.device)
    level = torch.arange(levels, device=seed.device).view(-1, 1, 1)
    words = philox4x32((_low(seed), _high(seed)), (block, level, 0, NOISE_STREAM))
    uniform = torch.stack([torch.as_tensor(word) >> 8 for word in words], dim=-1).double()
    radius = (-2 * ((uniform[..., ::2] + 1) * 2.0**-24).log()).sqrt()
    angle = uniform[..., 1::2] * (2 * math.pi * 2.0**-24)
    normal = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return normal.flatten(2)[..., :elements].float()


# --- Pixel InfoNCE ----------------------------------------------------------------------------------------------------
#
# With s_ij = a_i . c_j / temperature, P(i) the positives of anchor i and N(i) its negatives, every backend saves
# three numbers an anchor, and any backend's backward pass can go on from any other's:
#
#               per_positive                                  supcon
#   loss        mean_P softplus(lse - s_ip)                   lse - mean_P s_ip
#   lse         log sum of exp(s) over N                      log sum of exp(s) over P and N
#   weight      mean_P sigmoid(lse - s_ip)                    1
#   dloss/ds    j in N: weight exp(s - lse)                   j in P or N: exp(s - lse)
#               j in P: -sigmoid(lse - s) / |P|               j in P, added: -1 / |P|
#
# num_positives is |P|. An anchor that does not count (label below 0, no positive, no negative) has loss 0, weight 0,
# num_positives 0 and lse +inf, with which exp(s - lse) vanishes by itself.


def pixel_infonce(
    anchors: Tensor,
    candidates: Tensor,
    anchor_labels: Tensor,
    candidate_labels: Tensor,
    self_index: Tensor | None,
    temperature: float,
    variant: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, lse, weight (fp32, or fp64 for fp64 input) and num_positives (int64), each [M]; holds M x N logits."""
    positive, negative = _pairs(anchor_labels, candidate_labels, self_index)
    num_positives = positive.sum(dim=1)
    counts = (num_positives > 0) & negative.any(dim=1)
    anchors, candidates = _counted_rows(anchors, anchor_labels >= 0), _counted_rows(candidates, candidate_labels >= 0)
    logits = _logits(anchors, candidates, temperature)
    denominator = negative if variant == "per_positive" else positive | negative
    lse = logits.masked_fill(~denominator, -math.inf).logsumexp(dim=1)
    if variant == "per_positive":
        margin = logits - lse.unsqueeze(1)
        loss = _mean_over(positive, -F.logsigmoid(margin), num_positives)
        weight = _mean_over(positive, torch.sigmoid(-margin), num_positives)
    else:
        loss = lse - _mean_over(positive, logits, num_positives)
        weight = torch.ones_like(lse)
    return (
        loss.masked_fill(~counts, 0),
        lse.masked_fill(~counts, math.inf),
        weight.masked_fill(~counts, 0),
        num_positives.masked_fill(~counts, 0),
    )


def pixel_infonce_backward(
    grad_loss: Tensor,
    lse: Tensor,
    weight: Tensor,
    num_positives: Tensor,
    anchors: Tensor,
    candidates: Tensor,
    anchor_labels: Tensor,
    candidate_labels: Tensor,
    self_index: Tensor | None,
    temperature: float,
    variant: str,
    need_anchors: bool,
    need_candidates: bool,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the anchors and the candidates, in their dtype or in `dtype`; one not needed is empty, [0]."""
    dtype = dtype or anchors.dtype
    positive, negative = _pairs(anchor_labels, candidate_labels, self_index)
    counts = num_positives > 0
    counted_anchors = _counted_rows(anchors, counts)
    counted_candidates = _counted_rows(candidates, candidate_labels >= 0)
    logits = _logits(counted_anchors, counted_candidates, temperature)
    share = num_positives.clamp_min(1).to(logits.dtype).reciprocal().unsqueeze(1)
    margin = logits - lse.unsqueeze(1)
    if variant == "per_positive":
        pushed, push, pull = negative, weight.unsqueeze(1) * margin.exp(), torch.sigmoid(-margin) * share
    else:
        pushed, push, pull = positive | negative, margin.exp(), share
    # Masks rather than products: an entry that is masked out can be infinite.
    grad_logits = torch.where(pushed, push, 0) - torch.where(positive, pull, 0)
    grad_logits = torch.where(counts.unsqueeze(1), grad_logits * grad_loss.unsqueeze(1) / temperature, 0)
    with _full_precision(anchors):
        return (
            (grad_logits @ counted_candidates).to(dtype) if need_anchors else anchors.new_empty(0, dtype=dtype),
            (grad_logits.T @ counted_anchors).to(dtype) if need_candidates else anchors.new_empty(0, dtype=dtype),
        )


def _pairs(anchor_labels: Tensor, candidate_labels: Tensor, self_index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Masks bool [M, N] of the positives and of the negatives; ignored pixels and the anchor itself are in neither."""
    counted = (anchor_labels >= 0).unsqueeze(1) & (candidate_labels >= 0)
    if self_index is not None:
        counted &= torch.arange(len(candidate_labels), device=self_index.device) != self_index.unsqueeze(1)
    same = anchor_labels.unsqueeze(1) == candidate_labels
    return counted & same, counted & ~same


def _counted_rows(features: Tensor, counted: Tensor) -> Tensor:
    """Rows in fp32 (fp64 for fp64), zero where not counted: an empty slot of a memory bank may hold NaN."""
    return features.to(torch.promote_types(features.dtype, torch.float32)).masked_fill(~counted.unsqueeze(1), 0)


def _logits(anchors: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    with _full_precision(anchors):
        return anchors @ candidates.T / temperature


def _full_precision(tensor: Tensor) -> torch.autocast:
    # Autocast would run the products of an operation that promises fp32 accumulation in half precision.
    return torch.autocast(tensor.device.type, enabled=False)


def _mean_over(mask: Tensor, values: Tensor, count: Tensor) -> Tensor:
    return torch.where(mask, values, 0).sum(dim=1) / count.clamp_min(1)


# --- Anchor sampling --------------------------------------------------------------------------------------------------


def sample_anchors(
    labels: Tensor, weight: Tensor | None, seed: Tensor, image_index: Tensor, num_classes: int, per_class: int
) -> tuple[Tensor, Tensor]:
    """indices int64 [B, K, S] and counts int64 [B, K]: an exponential race, the S smallest arrival times of a class.

    A pixel's random word r is word pixel % 4 of block pixel // 4. Without weights the time is r itself. With weights it
    is float32(E) / float32(weight) where E = -log1p(-(r + 1/2) / 2^32) in float64; the bits of a float32 that is not
    negative sort as it does. In both cases the pixel's index breaks ties: what is ranked is (32 bits of time, 31 bits
    of pixel) in one int64.
    """
    batch, height, width = labels.shape
    pixels = height * width
    pixel = torch.arange(pixels, device=labels.device)
    seed, image_index = seed.unsqueeze(1), image_index.unsqueeze(1)
    counter = (pixel[: -(-pixels // 4)], _low(image_index), _high(image_index), ANCHOR_STREAM)
    words = philox4x32((_low(seed), _high(seed)), counter)
    time = torch.stack([torch.as_tensor(word) for word in words], dim=2).flatten(1)[:, :pixels]
    drawable = torch.ones_like(time, dtype=torch.bool)
    if weight is not None:
        weight = weight.flatten(1).float()
        drawable = weight > 0
        exponential = -torch.log1p((time.double() + 0.5) * -(2.0**-32))
        time = (exponential.float() / weight).view(torch.int32).to(torch.int64)
    never = torch.iinfo(torch.int64).max
    rank = torch.where(drawable, (time << 31) | pixel, never).unsqueeze(1)
    of_class = labels.flatten(1).unsqueeze(1) == torch.arange(num_classes, device=labels.device).unsqueeze(1)
    taken = min(per_class, pixels)
    first = torch.where(of_class, rank, never).topk(taken, dim=2, largest=False, sorted=True).values
    indices = torch.full((batch, num_classes, per_class), -1, dtype=torch.int64, device=labels.device)
    indices[..., :taken] = torch.where(first == never, -1, first & (2**31 - 1))
    return indices, (first != never).sum(dim=2)


# --- Classifier saliency ----------------------------------------------------------------------------------------------


def pixel_seed(x: Tensor) -> Tensor:
    """Seeds int64 [B]: the finaliser of splitmix64 over the wrapping sum of itself over (position << 32 | bits).

    position is the flat element of [C, H, W], bits are those of its float32. A wrapping sum has no order.
    """
    bits = x.float().flatten(1).contiguous().view(torch.int32).to(torch.int64) & _WORD
    position = torch.arange(bits.shape[1], device=x.device)
    return _mix64(_mix64((position << 32) | bits).sum(dim=1))


def _mix64(word: Tensor) -> Tensor:
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        # The multiplier as a signed integer: the wrapped product has the same bits.
        word = (word ^ _shift_right(word, shift)) * (multiplier - 2**64)
    return word ^ _shift_right(word, 31)


def _shift_right(word: Tensor, shift: int) -> Tensor:
    """A logical shift: torch's own brings in copies of the sign."""
    return (word >> shift) & ((1 << (64 - shift)) - 1)


def noised_batch(x: Tensor, alpha_bar: Tensor, seed: Tensor) -> Tensor:
    """[T*B, C, H, W] in the dtype of x, row t*B + b: sqrt(alpha_bar_t) x_b + sqrt(1 - alpha_bar_t) eps(seed_b, t)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    noise = standard_normal(seed, len(alpha_bar), math.prod(x.shape[1:]))
    noise = noise.view(len(alpha_bar), *x.shape).to(dtype)
    signal_scale, noise_scale = (scale.to(dtype).view(-1, 1, 1, 1, 1) for scale in noise_scales(alpha_bar))
    return (signal_scale * x.to(dtype) + noise_scale * noise).flatten(0, 1).to(x.dtype)


def noise_scales(alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar) in float64, each [T]."""
    alpha_bar = alpha_bar.double()
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def gradient_saliency(grad: Tensor, reduce: str, percentile: float, sigma: float, level_norm: bool) -> Tensor:
    """[B, H, W] fp32: channels reduced, levels averaged, smoothed, divided by the percentile, clamped to [0, 1]."""
    if reduce == "max_abs":
        magnitude = grad.abs().amax(dim=2).double()
    elif reduce == "sum_abs":
        magnitude = grad.abs().sum(dim=2, dtype=torch.float64)
    else:
        magnitude = torch.linalg.vector_norm(grad, dim=2, dtype=torch.float64)
    if level_norm:
        magnitude = _divide_or_zero(magnitude, magnitude.mean(dim=(2, 3)))
    saliency = magnitude.mean(dim=0)
    if sigma > 0:
        saliency = _blur(_blur(saliency, sigma, dim=1), sigma, dim=2)
    ordered = saliency.flatten(1).sort(dim=1).values
    pixels = ordered.shape[1]
    # The smallest value that at least this share of the pixels does not exceed; 0.07 * 100 must not count as 8 pixels.
    rank = max(1, math.ceil(percentile * pixels - 1e-9))
    upper = ordered[:, rank - 1]
    # More than this share of the pixels can be exactly zero; then the maximum is the only scale there is.
    scale = torch.where(upper > 0, upper, ordered[:, -1])
    scaled = _divide_or_zero(saliency, scale).clamp(0, 1)
    finite = grad.isfinite().flatten(2).all(dim=2).all(dim=0)
    return scaled.masked_fill(~finite.view(-1, 1, 1), math.nan).float()


def _divide_or_zero(maps: Tensor, scale: Tensor) -> Tensor:
    """maps [..., H, W] / scale [...], and zero where the scale is."""
    scale = scale[..., None, None]
    return torch.where(scale > 0, maps / scale, 0)


def _blur(maps: Tensor, sigma: float, dim: int) -> Tensor:
    """Gaussian along one axis, cut at 4 sigma, the image mirrored at its border without repeating the edge pixel.

    The mirror is applied as often as the kernel reaches past the image, so any size serves, a single pixel too.
    """
    size, radius = maps.shape[dim], int(4 * sigma + 0.5)
    taps = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1)]
    total = sum(taps)
    period = max(2 * size - 2, 1)
    position = torch.arange(-radius, size + radius, device=maps.device) % period
    mirrored = maps.index_select(dim, torch.minimum(position, period - position))
    blurred = torch.zeros_like(maps)
    for start, tap in enumerate(taps):
        blurred = blurred + mirrored.narrow(dim, start, size) * (tap / total)
    return blurred


# --- Fusion -----------------------------------------------------------------------------------------------------------


def fuse_evidence(gradient_map: Tensor, cam: Tensor, image_label: Tensor, thresholds: list[float]) -> Tensor:
    """labels int8 [B, H, W] in {-1, 0, 1..K}; see cldf_fast.ops.fuse_evidence."""
    foreground_gradient, foreground_cam, background_gradient, background_cam = thresholds
    dtype = torch.promote_types(gradient_map.dtype, torch.float32)
    gradient_map, cam = gradient_map.to(dtype), cam.to(dtype)
    present = image_label[:, :, None, None]
    claimed = present & (gradient_map >= foreground_gradient) & (cam >= foreground_cam)
    clear = (gradient_map <= background_gradient) & (cam <= background_cam)
    # argmax returns the first of several maxima, and so the lower class.
    winner = torch.where(claimed, gradient_map * cam, -math.inf).argmax(dim=1) + 1
    labels = torch.where((clear | ~present).all(dim=1), 0, -1)
    return torch.where(claimed.any(dim=1), winner, labels).to(torch.int8)


# --- Convolutions and what is between them ----------------------------------------------------------------------------


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """See `ops.conv3x3`."""
    out = F.conv2d(x, weight, bias, padding=1)
    return (out if residual is None else out + residual).contiguous(memory_format=torch.channels_last)


def conv3x3_backward(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x: the convolution that goes back from the results to the values they were made of."""
    return F.conv_transpose2d(grad, weight, padding=1).contiguous(memory_format=torch.channels_last)


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.group_norm`. Also the groups' means and 1 / deviations, [B, G], for the backward pass."""
    grouped = _grouped(x.double(), groups)
    mean = grouped.mean(dim=2)
    variance = (grouped - mean.unsqueeze(2)).square().mean(dim=2)
    mean, rstd = mean.to(x.dtype), (variance + eps).rsqrt().to(x.dtype)
    slope, offset = _affine(weight, bias, scale, shift)
    z = _normalised(x, mean, rstd) * slope + offset
    return z * _sigmoid(z) if silu else z, mean, rstd


def group_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and, [B, C], of each image's slope and offset in z = normed * slope + offset.

    A group's mean takes from the gradient of normed its mean over the group, its deviation takes normed times the mean
    of its product with normed.
    """
    normed = _normalised(x, mean, rstd)
    slope, offset = _affine(weight, bias, scale, shift)
    if silu:
        z = normed * slope + offset
        gate = _sigmoid(z)
        grad = grad * gate * (1 + z * (1 - gate))
    grad_slope, grad_offset = (each.sum(dim=(2, 3)) for each in (grad * normed, grad))
    grad_normed, normed = (_grouped(each, mean.shape[1]) for each in (grad * slope, normed))
    taken = grad_normed.mean(dim=2, keepdim=True) + normed * (grad_normed * normed).mean(dim=2, keepdim=True)
    grad_x = (grad_normed - taken) * rstd.unsqueeze(2)
    return grad_x.reshape(x.shape), grad_slope, grad_offset


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[B, G, C / G * H * W] of [B, C, H, W]."""
    return x.unflatten(1, (groups, -1)).flatten(2)


def _sigmoid(z: Tensor) -> Tensor:
    return z.double().sigmoid().to(z.dtype)


def _normalised(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    each = x.shape[1] // mean.shape[1]
    mean, rstd = (group.repeat_interleave(each, dim=1)[:, :, None, None] for group in (mean, rstd))
    return (x - mean) * rstd


def _affine(weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Slope and offset of every channel of every image, [1 or B, C, 1, 1]."""
    gain = torch.ones_like(weight) if scale is None else 1 + scale
    offset = bias * gain if shift is None else bias * gain + shift
    rows = (-1, len(weight), 1, 1)
    return (weight * gain).reshape(rows), offset.reshape(rows)
