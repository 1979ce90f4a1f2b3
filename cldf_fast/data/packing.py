"""A data set brought to the working size and held in memory: what training and segmentation read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cldf_fast.data import resizing
from cldf_fast.data.base import Slice, SliceDataset
from cldf_fast.data.geometry import Geometry
from cldf_fast.errors import DataError


@dataclass(frozen=True)
class PackedSlices:
    """N slices at one working size.

    images: float32 [N, C, size, size] in [-1, 1]. labels: bool [N, K]; None where the data set has none.
    masks: N masks uint8 [H, W] at the slices' own size, or None; for evaluation only.
    subjects, studies, names, geometries, indices, sizes: one entry a slice (see `Slice`; sizes are (H, W)).
    """

    images: Tensor
    labels: Tensor | None
    masks: list[Tensor] | None
    subjects: list[str]
    studies: list[str]
    names: list[str]
    geometries: list[Geometry]
    indices: list[int]
    sizes: list[tuple[int, int]]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return self.images.shape[0]

    def require_labels(self) -> Tensor:
        """The image-level labels bool [N, K]; raises DataError where there are none."""
        if self.labels is None:
            raise DataError("labels: expected image-level labels for training, but the data set has none")
        return self.labels

    def require_masks(self) -> list[Tensor]:
        """The masks; raises DataError where there are none."""
        if self.masks is None:
            raise DataError("masks: expected masks for evaluation, but the data set has none")
        return self.masks

    def working_masks(self) -> Tensor:
        """The masks uint8 [N, size, size] at the working size (nearest neighbour)."""
        size = self.images.shape[-2:]
        masks = [mask[None, None].float() for mask in self.require_masks()]
        return torch.cat([F.interpolate(mask, size, mode="nearest-exact")[:, 0] for mask in masks]).to(torch.uint8)


def pack(dataset: SliceDataset, size: int) -> PackedSlices:
    """Read every slice of a data set, in order, at size x size pixels."""
    slices: list[Slice] = []
    sizes: list[tuple[int, int]] = []
    for item in dataset:
        sizes.append((item.image.shape[-2], item.image.shape[-1]))
        # Only the working-size copy of an image stays in memory.
        slices.append(replace(item, image=to_working_size(item.image.unsqueeze(0), size)[0]))
    labels = [item.label for item in slices if item.label is not None]
    masks = [item.mask for item in slices if item.mask is not None]
    if len(labels) not in (0, len(slices)) or len(masks) not in (0, len(slices)):
        raise DataError("dataset: some slices have labels or masks and some have none; expected all or none")
    return PackedSlices(
        images=torch.stack([item.image for item in slices]),
        labels=torch.stack(labels) if labels else None,
        masks=masks or None,
        subjects=[item.subject for item in slices],
        studies=[item.study for item in slices],
        names=[item.name for item in slices],
        geometries=[item.geometry for item in slices],
        indices=[item.index for item in slices],
        sizes=sizes,
        class_names=dataset.class_names,
    )


def to_working_size(images: Tensor, size: int) -> Tensor:
    """Resize float32 [B, C, H, W] on the CPU to [B, C, size, size]: see `resizing.to_working_size`."""
    return torch.from_numpy(resizing.to_working_size(images.numpy(), size))


def to_native_size(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize score maps float32 [B, K, h, w] on the CPU to a slice's own size: see `resizing.to_native_size`."""
    return torch.from_numpy(resizing.to_native_size(maps.numpy(), size))
