"""Segmentation of a user's own files: `cldf_fast.cases` with the networks of a run between reading and writing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from cldf_fast import cases
from cldf_fast.data.stacks import check_output_folder
from cldf_fast.data.volumes import Volume
from cldf_fast.errors import InputWarning
from cldf_fast.pipeline import CLDF
from cldf_fast.run import DatasetRecord


@dataclass(frozen=True)
class SegmentedCase:
    """What was written for one input. present, label_probability: as in `pipeline.Segmentation`, for its slices.
    warnings: what is doubtful about the input."""

    source: Path
    files: list[Path]
    present: Tensor
    label_probability: Tensor | None
    foreground_pixels: int
    warnings: tuple[InputWarning, ...]


def parse_labels(text: str, class_names: Sequence[str]) -> Tensor:
    """Image-level labels bool [K]: see `cases.parse_labels`."""
    return torch.from_numpy(cases.parse_labels(text, class_names))


def read_case(source: cases.Source, num_channels: int, *, replicate: bool = False) -> Volume:
    """Read one input: see `cases.read_case`."""
    return Volume.of(cases.read_case(source, num_channels, replicate=replicate))


def segment_case(
    cldf: CLDF,
    record: DatasetRecord,
    volume: Volume,
    out: Path | cases.OutputFolder,
    *,
    labels: Tensor | None = None,
    window: tuple[float, float] | None = None,
    probability: bool = False,
) -> SegmentedCase:
    """Segment one volume and write the mask (see `stacks.write_mask`) to the folder `out`, or into an `OutputFolder`.

    labels: bool [K], given image-level labels for every slice; None: predicted slice by slice. window: for modalities
    with an absolute unit; None: as in training. probability: also write the class probabilities.
    """
    window = window or record.window
    stack, folder = volume.stack, out if isinstance(out, cases.OutputFolder) else cases.OutputFolder(out)
    folder.path.mkdir(parents=True, exist_ok=True)
    check_output_folder(stack.source, folder.path)
    images = torch.from_numpy(cases.working_images(stack, cldf.config.data.size, window=window))
    given = None if labels is None else labels.expand(len(images), -1)
    result = cldf.segment(images, given, everywhere=probability)
    with TemporaryDirectory(prefix=".partial-", dir=folder.path) as beside:
        files, foreground_pixels = cases.write_case(
            stack,
            result.probability.numpy(),
            result.present.numpy(),
            Path(beside),
            class_names=record.class_names,
            keep_probability=probability,
        )
        files = folder.take(str(stack.source), files)
    unlike_acquired = record.acquisition.doubts(stack, cldf.config.data.size)
    doubts = (*stack.warnings, *unlike_acquired, *cases.window_doubts(stack, window))
    return SegmentedCase(stack.source, files, result.present, result.label_probability, foreground_pixels, doubts)
