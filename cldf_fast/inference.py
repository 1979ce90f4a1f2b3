"""Segmentation of a user's own files: read, normalise, segment, write back in the input's format and geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cldf_fast.data.intensity import normalise_study
from cldf_fast.data.packing import to_native_size, to_working_size
from cldf_fast.data.volumes import Volume, read_channels, read_volume, write_mask
from cldf_fast.errors import ConfigError, DataError
from cldf_fast.pipeline import CLDF
from cldf_fast.run import DatasetRecord
from cldf_fast.segmentation import masks_from_probability


@dataclass(frozen=True)
class SegmentedCase:
    """What was written for one input, and the image-level labels of its slices: bool [S, K], probability [S, K]."""

    source: Path
    files: list[Path]
    present: Tensor
    label_probability: Tensor
    foreground_pixels: int


def parse_labels(text: str, class_names: Sequence[str]) -> Tensor:
    """Image-level labels bool [K] from a comma-separated list of class names, "all" or "none"."""
    if text in ("all", "none"):
        return torch.full((len(class_names),), text == "all")
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in class_names]
    if unknown:
        raise ConfigError(f"labels: expected 'all', 'none' or names of {', '.join(class_names)}, got {unknown[0]!r}")
    return torch.tensor([name in names for name in class_names])


def read_case(text: str, num_channels: int, *, replicate: bool = False) -> Volume:
    """Read one input: a file or folder, or several files of one grid, separated by commas, as channels in order.

    replicate: use a single channel for all channels of the network.
    """
    # A path may itself hold a comma (the CHAOS files do): the list reading is for what is no path.
    paths = [text] if Path(text).exists() else text.split(",")
    volume = read_volume(paths[0]) if len(paths) == 1 else read_channels(paths)
    found = volume.image.shape[1]
    if found == 1 and replicate:
        return Volume(
            volume.image.expand(-1, num_channels, -1, -1),
            volume.geometry,
            volume.slice_names,
            volume.source,
            volume.origin,
        )
    if found != num_channels:
        raise DataError(
            f"{volume.source}: expected {num_channels} channels, found {found}; give one file a channel, separated by "
            "commas, in the run's channel order"
        )
    return volume


def segment_case(
    cldf: CLDF,
    record: DatasetRecord,
    volume: Volume,
    out: Path,
    *,
    labels: Tensor | None = None,
    window: tuple[float, float] | None = None,
    probability: bool = False,
) -> SegmentedCase:
    """Segment one volume and write the mask (see `volumes.write_mask`) to the folder `out`.

    labels: bool [K], given image-level labels for every slice; None: predicted slice by slice. window: as in training,
    for modalities with an absolute unit. probability: also write the class probabilities.
    """
    image = normalise_study(volume.image, window=window, source=volume.source)
    slices, size = image.shape[0], (image.shape[2], image.shape[3])
    given = None if labels is None else labels.expand(slices, -1)
    result = cldf.segment(to_working_size(image, cldf.config.data.size), given)
    # Slice by slice: class probabilities of a whole volume at its own size can be larger than the volume itself.
    masks, probabilities = [], []
    for i in range(slices):
        native = to_native_size(result.probability[i : i + 1], size)
        masks.append(masks_from_probability(native, result.present[i : i + 1]))
        if probability:
            probabilities.append(native[:, 1:])
    mask = torch.cat(masks)
    files = write_mask(
        mask,
        volume,
        out,
        class_names=record.class_names,
        probability=torch.cat(probabilities) if probability else None,
    )
    return SegmentedCase(volume.source, files, result.present, result.label_probability, int((mask > 0).sum()))
