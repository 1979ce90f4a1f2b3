"""From score maps to masks: one threshold a class, and how it is chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from cldf_fast.errors import DataError
from cldf_fast.segmentation import masks_from_probability

_CANDIDATES = 128
# Candidates mark from this share of the pixels to all of them, in equal ratios: structures of every size are served.
_SMALLEST_SHARE = 1e-4


def with_background(maps: Tensor, threshold: Tensor) -> Tensor:
    """Score maps float32 [N, K, h, w] beside their thresholds [K] as the background's score: [N, K + 1, h, w].

    Each class is counted from its own threshold, so that the largest score wins, and background where none exceeds 0.
    """
    margins = maps - threshold.to(maps).view(1, -1, 1, 1)
    return torch.cat([torch.zeros_like(margins[:, :1]), margins], dim=1)


def masks_from_maps(maps: Tensor, threshold: Tensor, present: Tensor) -> Tensor:
    """Masks uint8 [N, h, w] of score maps [N, K, h, w], thresholds [K] and image-level labels bool [N, K].

    A pixel belongs to the present class whose score exceeds its threshold by most, and to the background if none does.
    """
    return masks_from_probability(with_background(maps, threshold), present)


def choose_threshold(maps: Tensor, masks: Tensor, present: Tensor) -> Tensor:
    """The threshold of every class that maximises the mean Dice over the slices that show it.

    This uses the masks of the part that it is given (the validation part, never the test part). It is generous to the
    baselines: CLDF's own thresholds are chosen without any mask. Classes are treated apart from each other.

    maps: [N, K, h, w], finite. masks: uint8 [N, h, w], 0 background, 1..K, at the maps' size. present: bool [N, K], the
    image-level labels; slices where a class is ruled out do not count for it.
    Returns float32 [K]. Raises DataError if shapes do not fit or a class is shown by no slice.
    """
    if maps.ndim != 4 or masks.shape != (maps.shape[0], *maps.shape[2:]) or present.shape != maps.shape[:2]:
        raise DataError(
            "maps, masks, present: expected [N, K, h, w], [N, h, w] and [N, K], "
            f"got {list(maps.shape)}, {list(masks.shape)} and {list(present.shape)}"
        )
    chosen = []
    for k in range(maps.shape[1]):
        truth = masks == k + 1
        shown = present[:, k] & truth.flatten(1).any(dim=1)
        if not shown.any():
            raise DataError(
                f"masks: expected at least one slice that shows class {k + 1}, found none among {len(masks)}; "
                "choose thresholds on a part that holds every class"
            )
        chosen.append(best_threshold(maps[shown, k], truth[shown])[0])
    return torch.stack(chosen)


def best_threshold(maps: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """(threshold, mean Dice over the slices), two scalars; of equal thresholds the lowest.

    maps: [P, h, w], finite. truth: bool [P, h, w], some pixels in every slice. A pixel is marked where its score
    exceeds the threshold. Candidates lie halfway between quantiles of all pixels' scores.
    """
    scores, inside = maps.float().flatten(1), truth.flatten(1)
    candidates = _candidates(scores)
    bins = len(candidates) + 1
    slices = torch.arange(len(scores), device=scores.device).unsqueeze(1)
    # A score in bin i exceeds the first i candidates.
    bin_of = slices * bins + torch.bucketize(scores, candidates)
    marked, hit = _at_least(bin_of, len(scores), bins), _at_least(bin_of[inside], len(scores), bins)
    dice = (2 * hit / (marked + inside.sum(dim=1, keepdim=True))).mean(dim=0)
    best = dice.argmax()
    return candidates[best], dice[best]


def _candidates(scores: Tensor) -> Tensor:
    """Thresholds in ascending order; below the lowest there is no score."""
    ordered = scores.flatten().sort(descending=True).values
    share = torch.logspace(torch.tensor(_SMALLEST_SHARE).log10().item(), 0, _CANDIDATES, device=scores.device)
    rank = (share * len(ordered)).ceil().long().clamp(1, len(ordered)) - 1
    levels = ordered[rank].unique()
    return torch.cat([levels[:1], (levels[1:] + levels[:-1]) / 2])


def _at_least(bin_of: Tensor, slices: int, bins: int) -> Tensor:
    """Pixels of each slice in bin 1 or above, in bin 2 or above, ...: int64 [slices, bins - 1]."""
    histogram = torch.bincount(bin_of.flatten(), minlength=slices * bins).view(slices, bins)
    return histogram.flip(1).cumsum(dim=1).flip(1)[:, 1:]
