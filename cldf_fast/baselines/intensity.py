"""What brightness alone finds: the z-score of one channel inside the head or body."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from cldf_fast.baselines.threshold import best_threshold
from cldf_fast.data.packing import PackedSlices
from cldf_fast.errors import DataError

# Half of the way from air (-1) to the tissue's median (-0.2): see `data.intensity`.
_AIR_BELOW = -0.6
# Depth of the rim that is left out, as a share of the image's width: scalp and skull.
_RIM = 0.06
# z-scores are cut here; pixels outside the head get the lowest score there is.
_MAX_Z = 10.0
# In-plane neighbours: every slice of a stack is treated by itself.
_IN_PLANE = np.zeros((3, 3, 3), bool)
_IN_PLANE[1] = ndimage.generate_binary_structure(2, 1)


@dataclass(frozen=True)
class IntensityRule:
    """For every class the channel that is read, int64 [K], and whether it is bright (+1) or dark (-1), float32 [K]."""

    channel: Tensor
    sign: Tensor

    @classmethod
    def fit(cls, data: PackedSlices) -> IntensityRule:
        """The channel and sign with the best mean Dice over the slices that show a class, each at its best threshold.

        Uses the masks of `data`. A class that no slice shows reads the first channel, bright.
        """
        masks, signs = data.working_masks(), (1.0, -1.0)
        scores = intensity_scores(data.images, data.studies)
        chosen = []
        for k in range(len(data.class_names)):
            truth = masks == k + 1
            shown = truth.flatten(1).any(dim=1)
            options = [(c, sign) for c in range(scores.shape[1]) for sign in signs]
            if shown.any():
                dice = [best_threshold(_signed(scores[shown, c], sign), truth[shown])[1] for c, sign in options]
                options = [options[int(torch.stack(dice).argmax())]]
            chosen.append(options[0])
        channel, sign = zip(*chosen, strict=True)
        return cls(torch.tensor(channel), torch.tensor(sign))

    def __call__(self, images: Tensor, studies: Sequence[str]) -> Tensor:
        """Score maps float32 [N, K, h, w] in [-10, 10]; arguments as in `intensity_scores`."""
        scores = intensity_scores(images, studies)[:, self.channel.to(images.device)]
        return _signed(scores, self.sign.to(images.device).view(1, -1, 1, 1))


def _signed(scores: Tensor, sign: Tensor | float) -> Tensor:
    return (sign * scores).nan_to_num(nan=-_MAX_Z)


def intensity_scores(images: Tensor, studies: Sequence[str]) -> Tensor:
    """z-scores float32 [N, C, h, w] in [-10, 10] of images float32 [N, C, h, w] in [-1, 1].

    studies: the study of each image. Mean and deviation of a channel are those of the head (or body) in all the given
    slices of the study. NaN outside the head and in its rim.
    """
    if len(studies) != len(images):
        raise DataError(f"studies: expected one for each of the {len(images)} images, got {len(studies)}")
    head, core = head_masks(images)
    _, inverse = np.unique(np.asarray(studies), return_inverse=True)
    study = torch.from_numpy(inverse).to(images.device)
    count = _sum_of_study(head.unsqueeze(1).double(), study).clamp_min(1)
    inside = torch.where(head.unsqueeze(1), images.double(), 0.0)
    mean = _sum_of_study(inside, study) / count
    centred = images.double() - mean[study][:, :, None, None]
    square = torch.where(head.unsqueeze(1), centred.square(), 0.0)
    deviation = (_sum_of_study(square, study) / count).sqrt().clamp_min(1e-6)
    z = (centred / deviation[study][:, :, None, None]).clamp(-_MAX_Z, _MAX_Z)
    return torch.where(core.unsqueeze(1), z, torch.nan).float()


def _sum_of_study(values: Tensor, study: Tensor) -> Tensor:
    """Sums [S, C] over the pixels of each study's slices; values: [N, C, h, w], study: int64 [N]."""
    per_slice = values.sum(dim=(2, 3))
    return per_slice.new_zeros(int(study.max()) + 1, per_slice.shape[1]).index_add_(0, study, per_slice)


def head_masks(images: Tensor) -> tuple[Tensor, Tensor]:
    """The head (or body) and its inner part, both bool [N, h, w], of images float32 [N, C, h, w] in [-1, 1].

    Head: the largest connected component brighter than air, holes filled. Inner part: the rim of scalp and skull taken
    away. Every slice by itself; a slice of air has neither.
    """
    bright = (images.mean(dim=1) > _AIR_BELOW).cpu().numpy()
    component, _ = ndimage.label(bright, _IN_PLANE)
    pixels = np.bincount(component.ravel())
    pixels[0] = 0
    size = pixels[component]
    largest = (size == size.max(axis=(1, 2), keepdims=True)) & bright
    head = ndimage.binary_fill_holes(largest, _IN_PLANE)
    # Slices lie far apart, so that distances are taken within them; an empty one more serves slices without air.
    far = (4 * max(head.shape[1:]), 1, 1)
    depth = ndimage.distance_transform_edt(np.pad(head, ((1, 0), (0, 0), (0, 0))), sampling=far)[1:]
    core = depth > _RIM * images.shape[-1]
    return torch.from_numpy(head).to(images.device), torch.from_numpy(core).to(images.device)
