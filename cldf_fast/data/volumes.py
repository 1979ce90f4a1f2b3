"""The stacks of `cldf_fast.data.stacks` as tensors, for data sets, training and evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from cldf_fast.data import stacks
from cldf_fast.data.geometry import Geometry
from cldf_fast.data.stacks import Origin, Stack
from cldf_fast.data.stacks import count_slices as count_slices
from cldf_fast.errors import InputWarning


@dataclass(frozen=True, eq=False)
class Volume:
    """A `Stack` whose image is a tensor.

    image: float32 [S, C, H, W] on the CPU, stored units after rescale slope and intercept, finite, not constant.
    geometry, slice_names, source, origin, warnings, modalities: as of the stack.
    """

    image: Tensor
    geometry: Geometry
    slice_names: tuple[str, ...]
    source: Path
    origin: Origin = field(repr=False)
    warnings: tuple[InputWarning, ...] = ()
    modalities: tuple[str, ...] = ()

    @classmethod
    def of(cls, stack: Stack) -> Volume:
        """The stack's volume, in the same memory."""
        shared = {each.name: getattr(stack, each.name) for each in fields(stack) if each.name != "image"}
        return cls(image=torch.from_numpy(stack.image), **shared)

    @property
    def stack(self) -> Stack:
        """The volume without torch, in the same memory."""
        shared = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "image"}
        return Stack(image=self.image.numpy(), **shared)


def read_volume(path: str | Path | Sequence[str | Path], *, channels_last: bool = False) -> Volume:
    """Read one volume: see `stacks.read_stack`. Issues its warnings."""
    return _warned(Volume.of(stacks.read_stack(path, channels_last=channels_last)))


def read_channels(paths: Sequence[str | Path]) -> Volume:
    """Read several volumes of one grid as channels, in the order given: see `stacks.read_channels`.

    Issues their warnings.
    """
    return _warned(Volume.of(stacks.read_channels(paths)))


def _warned(volume: Volume) -> Volume:
    for warning in volume.warnings:
        warnings.warn(warning, stacklevel=3)
    return volume


def read_mask(path: str | Path | Sequence[str | Path], like: Volume | None = None) -> Tensor:
    """Read a mask in the orientation of `read_volume`, uint8 [S, H, W]: see `stacks.read_mask`."""
    return torch.from_numpy(stacks.read_mask(path, None if like is None else like.stack))


def write_mask(
    mask: Tensor,
    volume: Volume,
    out: str | Path,
    *,
    class_names: Sequence[str],
    probability: Tensor | None = None,
) -> list[Path]:
    """Write a mask in the format, orientation and geometry of the volume's own files: see `stacks.write_mask`.

    mask: uint8 [S, H, W]. probability: float [S, K, H, W] in [0, 1], optional. On any device.
    """
    if probability is not None and probability.is_floating_point():
        probability = probability.float()  # numpy has no bfloat16
    return stacks.write_mask(
        mask.numpy(force=True),
        volume.stack,
        out,
        class_names=class_names,
        probability=None if probability is None else probability.numpy(force=True),
    )
