"""A user's own files on their way to a network and back, without torch: `segment` and exported engines share it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cldf_fast.data.grid import Floats, Mask
from cldf_fast.data.intensity import normalise_study
from cldf_fast.data.resizing import to_native_size, to_working_size
from cldf_fast.data.stacks import Stack, check_output_folder, read_channels, read_stack, write_mask
from cldf_fast.errors import ConfigError, DataError, InputWarning

Labels = npt.NDArray[np.bool_]
Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A file or folder, or a file for each channel: in a list, or in one text, separated by commas."""

# Of a study in the window's unit more than this share of the voxels lies within the window, the middle 98% of them
# spread over more than this share of it, and where the window starts below 0 some are negative. A CHAOS CT has 0.33
# within a liver's window; with its rescale intercept added twice 0.0006, without it none below 0.
_LEAST_WITHIN, _LEAST_SPREAD = 0.01, 0.05
_SLICES_SEEN = 16


def parse_labels(labels: str | Sequence[str], class_names: Sequence[str]) -> Labels:
    """Image-level labels bool [K] from class names, in a list or separated by commas, "all" or "none"."""
    if labels in ("all", "none"):
        return np.full(len(class_names), labels == "all")
    if not isinstance(labels, Sequence):
        raise ConfigError(f"labels: expected 'all', 'none' or names of {', '.join(class_names)}, got {labels!r}")
    names = [name.strip() for name in labels.split(",")] if isinstance(labels, str) else list(labels)
    unknown = [name for name in names if name not in class_names]
    if unknown:
        raise ConfigError(f"labels: expected 'all', 'none' or names of {', '.join(class_names)}, got {unknown[0]!r}")
    return np.array([name in names for name in class_names])


def input_paths(source: Source) -> list[Path]:
    """The file or folder that an input is, or the file of each channel. Raises DataError for what is no path."""
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        # A path may itself hold a comma (the CHAOS files do): the list reading is for what is no path.
        parts = [text] if _is_there(text) else text.split(",")
        parts = [part if _is_there(part) else part.strip() for part in parts]
    elif isinstance(source, Sequence) and all(isinstance(part, str | os.PathLike) for part in source):
        parts = [os.fspath(part) for part in source]
    else:
        raise DataError(f"source: expected a path, or a list of one for each channel, got {type(source).__name__}")
    if not parts or not all(parts):
        raise DataError(f"source: expected a path, or one for each channel, got {source!r}", code="missing_file")
    return [Path(part) for part in parts]


def _is_there(path: str) -> bool:
    try:
        return bool(path) and Path(path).exists()
    except OSError:  # a list of paths can be longer than a path may be
        return False


def check_apart(source: Source, out: Path) -> None:
    """Raise DataError where masks would be written beside a file of this input."""
    for path in input_paths(source):
        check_output_folder(path, out)


def read_case(source: Source, num_channels: int, *, replicate: bool = False) -> Stack:
    """Read one input: a file or folder, or several files of one grid as channels in order.

    replicate: use a single channel for all channels of the network.
    """
    try:
        paths = input_paths(source)
        stack = read_stack(paths[0]) if len(paths) == 1 else read_channels(paths)
    except OSError as error:
        raise DataError(
            f"{error.filename or source}: can't be read ({error.strerror or error})", code="unreadable"
        ) from error
    found = stack.image.shape[1]
    if found == 1 and replicate:
        return replace(stack, image=np.repeat(stack.image, num_channels, axis=1))
    if found != num_channels:
        raise DataError(
            f"{stack.source}: expected {num_channels} channels, found {found}; give one file a channel, separated by "
            "commas, in the run's channel order",
            code="wrong_channels",
        )
    return replace(stack, warnings=(*stack.warnings, *_channel_doubts(stack)))


def working_images(stack: Stack, size: int, *, window: tuple[float, float] | None = None) -> Floats:
    """What networks see of a stack: float32 [S, C, size, size] in [-1, 1].

    window: as in training, for modalities with an absolute unit. Raises DataError where nothing is left to see.
    """
    images = to_working_size(normalise_study(stack.image, window=window, source=stack.source), size)
    if images.min() == images.max():
        within = "" if window is None else f" within the window {window[0]:g} to {window[1]:g}"
        raise DataError(
            f"{stack.source}: the image is constant{within}; check its intensities' unit", code="constant_image"
        )
    return images


def window_doubts(stack: Stack, window: tuple[float, float] | None) -> list[InputWarning]:
    """Whether a study's intensities are in another unit than the window's, as far as they tell.

    window: None, for modalities without an absolute unit, tells nothing.
    """
    if window is None:
        return []
    # A few of the slices, evenly: it is about orders of magnitude.
    few = stack.image[:: max(1, len(stack.image) // _SLICES_SEEN)]
    low, high = np.quantile(few, (0.01, 0.99))
    within = float(np.mean((few > window[0]) & (few < window[1])))
    spread = (high - low) / (window[1] - window[0])
    if within >= _LEAST_WITHIN and spread >= _LEAST_SPREAD and (window[0] >= 0 or few.min() < 0):
        return []
    return [
        InputWarning(
            f"{stack.source}: intensities from {low:.4g} to {high:.4g} (1% and 99% quantile) hardly fit the window "
            f"{window[0]:g} to {window[1]:g}; check their unit",
            code="implausible_intensities",
        )
    ]


def _channel_doubts(stack: Stack) -> Iterator[InputWarning]:
    channels = [stack.image[:, index] for index in range(stack.image.shape[1])]
    constant = [len(channels) > 1 and bool(channel.min() == channel.max()) for channel in channels]
    for index, channel in enumerate(channels):
        if constant[index]:
            yield InputWarning(
                f"{stack.source}: channel {index + 1} of {len(channels)} is constant", code="constant_channel"
            )
            continue
        for other in range(index):
            if not constant[other] and np.array_equal(channels[other], channel):
                yield InputWarning(
                    f"{stack.source}: channels {other + 1} and {index + 1} of {len(channels)} are equal",
                    code="equal_channels",
                )


class OutputFolder:
    """A folder of masks, in which no study's files take the place of another's.

    path: the folder. owners: of the files that are there, by name, the study, as far as it is known; a file of nobody's
    is left alone then. None: nothing is known of them, and what is there gives way, but for files of the same object.
    """

    def __init__(self, path: Path, owners: Mapping[str, str] | None = None) -> None:
        self.path = path
        self._known = owners is not None
        self._owners = dict(owners or {})

    def check(self, study: str, names: Sequence[str]) -> None:
        """Raise DataError where a file of a study has the name of one that is not its own."""
        for name in names:
            owner = self._owners.get(name)
            if owner is None and not (self._known and (self.path / name).exists()):
                continue
            if owner != study:
                whose = f"the name of the mask of {owner} too" if owner else "there already, and not from this study"
                raise DataError(
                    f"out: {name} is {whose}; segment studies whose files have the same names into folders of their "
                    f"own",
                    code="output_name_taken",
                )

    def names_of(self, study: str) -> list[str]:
        """The study's files that are here."""
        return [name for name, owner in self._owners.items() if owner == study and (self.path / name).exists()]

    def take(self, study: str, files: Sequence[Path]) -> list[Path]:
        """Move a study's files here, in place of all that it had; their new paths. Raises as `check` does."""
        self.check(study, [file.name for file in files])
        moved = [self.path / file.name for file in files]
        new = [place.name not in self._owners for place in moved]
        try:
            for index, (file, place) in enumerate(zip(files, moved, strict=True)):
                if new[index] and self._known:
                    _move_to_new(file, place)
                else:
                    os.replace(file, place)
                self._owners[place.name] = study
        except DataError:
            for place, is_new in zip(moved[:index], new, strict=False):
                if is_new:
                    place.unlink()
                    del self._owners[place.name]
            raise
        for name in set(self.names_of(study)) - {place.name for place in moved}:
            (self.path / name).unlink()  # such as probabilities of another run
        return moved


def _move_to_new(file: Path, place: Path) -> None:
    """Move a file where none is, although other processes write to the folder too."""
    try:
        os.link(file, place)
    except FileExistsError:
        raise DataError(
            f"out: {place.name} was written for another study meanwhile; segment studies whose files have the same "
            f"names into folders of their own",
            code="output_name_taken",
        ) from None
    except OSError:  # a file system without links
        os.replace(file, place)
    else:
        file.unlink()


def masks_from_probability(probability: Floats, present: Labels) -> Mask:
    """Masks uint8 [B, H, W], as `segmentation.masks_from_probability` makes them of tensors on any device.

    probability: float32 [B, K + 1, H, W], background first. present: bool [B, K]; classes that are absent by the
    image-level label are never chosen.
    """
    allowed = np.pad(present, ((0, 0), (1, 0)), constant_values=True)[:, :, None, None]
    return np.where(allowed, probability, np.float32(-1)).argmax(axis=1).astype(np.uint8)


def write_case(
    stack: Stack,
    probability: Floats,
    present: Labels,
    out: Path,
    *,
    class_names: Sequence[str],
    keep_probability: bool = False,
    unlike_training: bool = False,
) -> tuple[list[Path], int]:
    """Bring a network's result to the stack's own size and write the mask (see `stacks.write_mask`) to `out`.

    probability: float32 [S, K + 1, h, w] at the working size, background first, summing to 1. present: bool [S, K].
    keep_probability: also write the class probabilities. unlike_training: as `stacks.write_mask` takes it.
    Returns the files written and the number of foreground pixels. Raises DataError for a name that is too long.
    """
    size = stack.image.shape[2], stack.image.shape[3]
    # Slice by slice: class probabilities of a whole stack at its own size can be larger than the stack itself.
    masks, probabilities = [], []
    for i in range(len(stack.image)):
        native = to_native_size(probability[i : i + 1], size)
        masks.append(masks_from_probability(native, present[i : i + 1]))
        if keep_probability:
            probabilities.append(native[:, 1:])
    mask = np.concatenate(masks)
    try:
        files = write_mask(
            mask,
            stack,
            out,
            class_names=class_names,
            probability=np.concatenate(probabilities) if keep_probability else None,
            unlike_training=unlike_training,
        )
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise DataError(
            f"{stack.source}: its mask's name would be too long; give the input a shorter name", code="name_too_long"
        ) from error
    return files, int(np.count_nonzero(mask))
