"""The one data contract: studies are read whole, slices are what networks see.

A *study* is one acquisition of one patient: a stack of slices with one geometry. Intensities are normalised per study,
because MR has no absolute unit and scanners differ; a slice alone can't tell a dark scan from a dark slice.
A *slice* is what every dataset hands out: image, image-level label, geometry, subject, and for evaluation only a mask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cldf_fast.data import intensity
from cldf_fast.data.geometry import Geometry
from cldf_fast.errors import DataError

# How many decoded studies stay in memory while slices are drawn in order; a study is some tens of MB.
_STUDIES_IN_MEMORY = 2


@dataclass(frozen=True, eq=False)
class Study:
    """One acquisition, raw.

    image: float32 [S, C, H, W], intensities as stored, after rescale slope and intercept, finite.
    geometry: of the stack. subject: patient id, the unit of splits. name: unique in the dataset.
    slice_names: S names, unique within the study, used for output files and reports.
    mask: uint8 [S, H, W], 0 background and 1..K classes, for evaluation (and image-level labels) only; None if unknown.
    labels: bool [S, K], image-level labels where the dataset has them of its own; None: derived from the mask.
    source: the file or folder to name in errors.
    """

    name: str
    subject: str
    image: Tensor
    geometry: Geometry
    slice_names: tuple[str, ...]
    source: Path
    mask: Tensor | None = None
    labels: Tensor | None = None


@dataclass(frozen=True)
class StudyRef:
    """A study that can be read: cheap to list, expensive to open. read() returns the Study, or raises DataError."""

    name: str
    subject: str
    num_slices: int
    read: Callable[[], Study]


@dataclass(frozen=True, eq=False)
class Slice:
    """What networks and evaluation see.

    image: float32 [C, H, W] in `intensity_range`. label: bool [K], None if unknown. mask: uint8 [H, W] or None.
    geometry: of the study's stack; `index` is this slice's place in it.
    """

    image: Tensor
    label: Tensor | None
    mask: Tensor | None
    geometry: Geometry
    subject: str
    study: str
    name: str
    index: int


class SliceDataset(Dataset[Slice]):
    """Slices of a list of studies, in study order, then from the first slice to the last.

    class_names: names of the K foreground classes (mask value k is class_names[k - 1]).
    channel_names: declared order of the C channels.
    window: (low, high) in stored units for modalities with an absolute unit (CT: Hounsfield); None: robust per study.
    min_area: a slice is labelled with a class where more than this fraction of its pixels are of it (0: any pixel).
    modality: DICOM's code of what all studies are, e.g. "MR"; None where the data set does not tell.
    """

    intensity_range = intensity.INTENSITY_RANGE

    def __init__(
        self,
        refs: Sequence[StudyRef],
        class_names: Sequence[str],
        channel_names: Sequence[str],
        *,
        window: tuple[float, float] | None = None,
        min_area: float = 0.0,
        modality: str | None = None,
    ) -> None:
        if not refs:
            raise DataError("dataset: expected at least one study, found none")
        if not 0.0 <= min_area < 1.0:
            raise DataError(f"min_area: expected a fraction in [0, 1), got {min_area}")
        self.refs = tuple(refs)
        twice = next((name for name, count in Counter(ref.name for ref in self.refs).items() if count > 1), None)
        if twice is not None:
            raise DataError(f"dataset: expected each study once, found two named {twice!r}; rename or remove one")
        self.class_names = tuple(class_names)
        self.channel_names = tuple(channel_names)
        self.window = None if window is None else intensity.checked_window(window)
        self.min_area = min_area
        self.modality = modality
        self._starts = np.cumsum([0] + [ref.num_slices for ref in self.refs])
        self._study = self._study_cache()

    def __getstate__(self) -> dict[str, Any]:
        # A cache can't be pickled, and a data loader's worker process fills its own.
        return {name: value for name, value in self.__dict__.items() if name != "_study"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._study = self._study_cache()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Slice:
        if not 0 <= index < len(self):
            raise IndexError(f"slice {index} of {len(self)}")
        position = int(np.searchsorted(self._starts, index, side="right")) - 1
        study, image, labels = self._study(position)
        i = index - int(self._starts[position])
        return Slice(
            image=image[i],
            label=None if labels is None else labels[i],
            mask=None if study.mask is None else study.mask[i],
            geometry=study.geometry,
            subject=study.subject,
            study=study.name,
            name=study.slice_names[i],
            index=i,
        )

    def __iter__(self) -> Iterator[Slice]:
        return (self[i] for i in range(len(self)))

    @property
    def subjects(self) -> tuple[str, ...]:
        """Patients in the dataset, sorted, each once."""
        return tuple(sorted({ref.subject for ref in self.refs}))

    def select(self, subjects: Sequence[str]) -> SliceDataset:
        """The same dataset with the studies of these patients only; an unknown patient is a DataError."""
        unknown = sorted(set(subjects) - set(self.subjects))
        if unknown:
            raise DataError(f"subjects: {unknown[0]!r} is not in the dataset ({len(unknown)} unknown in all)")
        wanted = set(subjects)
        return self.subset([ref for ref in self.refs if ref.subject in wanted])

    def subset(self, refs: Sequence[StudyRef]) -> SliceDataset:
        """The same dataset with these of its studies only."""
        return SliceDataset(
            refs,
            self.class_names,
            self.channel_names,
            window=self.window,
            min_area=self.min_area,
            modality=self.modality,
        )

    def _study_cache(self) -> Callable[[int], tuple[Study, Tensor, Tensor | None]]:
        return lru_cache(maxsize=_STUDIES_IN_MEMORY)(self._read)

    def _read(self, position: int) -> tuple[Study, Tensor, Tensor | None]:
        ref = self.refs[position]
        study = ref.read()
        check_study(study, num_channels=len(self.channel_names), num_classes=len(self.class_names))
        if len(study.slice_names) != ref.num_slices:
            raise DataError(f"{study.source}: expected {ref.num_slices} slices, found {len(study.slice_names)}")
        labels = study.labels
        if labels is None and study.mask is not None:
            labels = labels_from_mask(study.mask, len(self.class_names), self.min_area)
        return study, normalise_study(study.image, window=self.window, source=study.source), labels


def normalise_study(
    image: Tensor, *, window: tuple[float, float] | None = None, source: Path | str = "image"
) -> Tensor:
    """Bring a study float32 [S, C, H, W] on the CPU to INTENSITY_RANGE: see `intensity.normalise_study`."""
    return torch.from_numpy(intensity.normalise_study(image.numpy(), window=window, source=source))


def labels_from_mask(mask: Tensor, num_classes: int, min_area: float = 0.0) -> Tensor:
    """Image-level labels bool [S, K] of a mask uint8 [S, H, W]: class k on more than min_area of a slice."""
    classes = torch.arange(1, num_classes + 1, dtype=mask.dtype).view(1, -1, 1, 1)
    pixels = (mask.unsqueeze(1) == classes).sum(dim=(2, 3))
    return pixels.double() / mask[0].numel() > min_area


def check_study(study: Study, *, num_channels: int, num_classes: int) -> None:
    """Raise DataError, naming the study's source, unless shapes, types and values keep the contract of `Study`."""
    image, mask = study.image, study.mask
    if image.ndim != 4 or image.dtype != torch.float32:
        raise DataError(
            f"{study.source}: expected float32 image [slices, channels, rows, columns], "
            f"got {str(image.dtype).removeprefix('torch.')} {list(image.shape)}"
        )
    slices, channels, rows, columns = image.shape
    if channels != num_channels:
        raise DataError(f"{study.source}: expected {num_channels} channels, found {channels}")
    if slices != len(study.slice_names):
        raise DataError(f"{study.source}: {len(study.slice_names)} slice names for {slices} slices")
    if len(set(study.slice_names)) != slices:
        raise DataError(f"{study.source}: slice names must differ from each other, got {study.slice_names}")
    if not torch.isfinite(image).all():
        raise DataError(f"{study.source}: the image holds NaN or infinite values; repair or remove this study")
    if image.numel() == 0 or bool(image.amin() == image.amax()):
        raise DataError(f"{study.source}: the image is constant; repair or remove this study")
    if mask is not None:
        if mask.dtype != torch.uint8 or mask.shape != (slices, rows, columns):
            raise DataError(
                f"{study.source}: expected a uint8 mask {[slices, rows, columns]}, "
                f"got {str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
            )
        if int(mask.max()) > num_classes:
            raise DataError(f"{study.source}: mask value {int(mask.max())}, but the dataset has {num_classes} classes")
    labels = study.labels
    if labels is not None and (labels.dtype != torch.bool or labels.shape != (slices, num_classes)):
        raise DataError(
            f"{study.source}: expected bool labels {[slices, num_classes]}, "
            f"got {str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
        )
