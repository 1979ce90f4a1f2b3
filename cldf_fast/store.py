"""Features of a frozen network kept on disk, for work that reads the same images many times.

FOLDER/<setting>/<image>.safetensors    one file an image: its maps, a scale for each channel, and a checksum

An entry is found by what it depends on, so that nothing ever has to be invalidated. What is read passes its checksum or
is computed again, so that files need not reach the disk in order and none is flushed.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cldf_fast import __version__
from cldf_fast.errors import ConfigError
from cldf_fast.features import DiffusionFeatures
from cldf_fast.files import atomic_write_bytes

_LAYOUT = 1  # of the files: another number leaves older entries unread
_LIMITS = {torch.float16: 1.0, torch.int8: 127.0}  # the largest stored magnitude of every channel
_SMALLEST = 1e-30  # scale of a channel of zeros
_SCANS = 100  # of the folder, by each process, until the store is full
_CHECKSUM = "sha256"
_PARTS = ("values", "scale")

Entry = dict[str, Tensor]
"""Of one image and each block i: values_<i> [C_i, h_i, w_i] in the store's dtype, scale_<i> float32 [C_i]."""


class FeatureStore:
    """`DiffusionFeatures` that computes features of an image once and reads them from a folder ever after.

    It is called as what it wraps, and returns the same maps in float32, rounded: to 11 bits (float16), or to 255 steps
    between a channel's extremes (int8, half of the disk). They are the same bits whether an entry was found or has just
    been computed. A channel that is not finite everywhere is finite nowhere.

    An entry belongs to an image's pixels and condition, the network's weights and structure, the noise levels, blocks
    and precisions, and to this version of the package; not to the device. Several processes may share a folder.
    A damaged entry is computed again, with a warning. It tells as much of a patient as the image: protect it alike.

    features: in front of a network whose weights are not written through `.data`; other changes of them are seen.
    folder: made when the first entry is written. dtype: "float16" or "int8".
    max_bytes: bound on the folder; when it is reached, further images are computed at every call, with one warning.
        Each further process that writes at the same time may exceed it by a hundredth.
    key: whatever else features depend on, such as the version of a `call` of your own.
    channels: as of `features`. found, computed: how many images were read from the folder, and how many were not.
    """

    def __init__(
        self,
        features: DiffusionFeatures,
        folder: str | Path,
        *,
        dtype: Literal["float16", "int8"] = "float16",
        max_bytes: int | None = None,
        key: str = "",
    ) -> None:
        if dtype not in ("float16", "int8"):
            raise ConfigError(f"dtype: expected 'float16' or 'int8', got {dtype!r}")
        if max_bytes is not None and max_bytes < 0:
            raise ConfigError(f"max_bytes: expected at least 0, got {max_bytes}")
        self.features = features
        self.channels = features.channels
        self.folder = Path(folder)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.max_bytes = max_bytes
        self.key = key
        self.found = self.computed = 0
        self._setting, self._stamp = "", object()
        self._writes = True
        self._used: int | None = None  # bytes in the folder: those of the last scan, and those written since
        self._written = 0  # since the last scan

    @torch.no_grad()
    def __call__(self, x: Tensor, condition: Tensor | None) -> list[Tensor]:
        """As `DiffusionFeatures.__call__`: x [B, C, H, W], condition [B, ...] -> one [B, channels[i], h, w] a map."""
        if not len(x):
            return [block.float() for block in self.features(x, condition)]
        setting = self._current_setting()
        names = [f"{setting[:16]}/{image}.safetensors" for image in _image_digests(setting, x, condition)]
        entries = {name: entry for name in set(names) if (entry := self._read(name)) is not None}
        missing = [name for name in dict.fromkeys(names) if name not in entries]
        if missing:
            rows = [names.index(name) for name in missing]
            computed = self.features(x[rows], None if condition is None else condition[rows])
            encoded = [_encoded(block, self.dtype) for block in computed]
            for row, name in enumerate(missing):
                entries[name] = {
                    f"{part}_{i}": rows_of[row]
                    for i, pair in enumerate(encoded)
                    for part, rows_of in zip(_PARTS, pair, strict=True)
                }
                self._write(name, entries[name])
        self.found += len(names) - len(missing)
        self.computed += len(missing)
        maps = []
        for i in range(len(self.channels)):
            values, scale = (torch.stack([entries[name][f"{part}_{i}"] for name in names]) for part in _PARTS)
            maps.append(values.to(x.device).float() * scale.to(x.device)[:, :, None, None])
        return maps

    @torch.no_grad()
    def project(self, x: Tensor, condition: Tensor | None, weights: Sequence[Tensor]) -> list[Tensor]:
        """As `DiffusionFeatures.project`, of what is stored."""
        maps = self(x, condition)
        return [F.conv2d(block, each[:, :, None, None]) for block, each in zip(maps, weights, strict=True)]

    def _current_setting(self) -> str:
        """Digest of all that features depend on but the image. Weights are read again only if they may have changed."""
        tensors = list(_tensors(self.features.network))
        stamp = [(name, value.data_ptr(), 0 if value.is_inference() else value._version) for name, value in tensors]
        if stamp != self._stamp:
            facts = [
                _LAYOUT, __version__, self.key, str(self.dtype), str(self.features.dtype), self.features.reader.names,
                self.features.reader.prediction, self.features.alpha_bar.tolist(), self.features.times.tolist(),
                _structure(self.features.network),
            ]  # fmt: skip
            digest = hashlib.sha256(json.dumps(facts).encode())
            _add(digest, dict(tensors))
            self._setting, self._stamp = digest.hexdigest(), stamp
        return self._setting

    def _read(self, name: str) -> Entry | None:
        """An entry, mapped into memory; None where there is none, or none that passes its checksum."""
        path = self.folder / name
        try:
            with safe_open(path, "pt") as file:
                entry = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                expected = (file.metadata() or {}).get(_CHECKSUM)
            reason = "its checksum is wrong"
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, RuntimeError, SafetensorError) as error:
            entry, expected, reason = {}, None, str(error)
        if expected is not None and _checksum(name, entry) == expected:
            return entry
        warnings.warn(f"{path}: can't be read ({reason}); the features are computed again", stacklevel=3)
        with suppress(OSError):
            path.unlink()
        return None

    def _write(self, name: str, entry: Entry) -> None:
        if not self._writes:
            return
        data = save(entry, {_CHECKSUM: _checksum(name, entry)})
        reason = f"its bound of {self.max_bytes} bytes is reached"
        try:
            if self._has_room(len(data)):
                atomic_write_bytes(self.folder / name, data, durable=False)
                return
        except OSError as error:
            reason = str(error)
        self._writes = False
        warnings.warn(
            f"{self.folder}: no more features are stored ({reason}); those of further images are computed at every "
            f"reading",
            stacklevel=3,
        )

    def _has_room(self, size: int) -> bool:
        """Whether so many bytes more respect the bound; if so, they are counted."""
        if self.max_bytes is None:
            return True
        if self._used is None or self._written > self.max_bytes // _SCANS:
            self._used, self._written = _size_of(self.folder), 0
        if self._used + size > self.max_bytes:
            return False
        self._used += size
        self._written += size
        return True


def _encoded(block: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Maps [B, C, h, w] -> their values in a dtype, and the scale float32 [B, C] to multiply by; on the CPU."""
    block = block.float()
    scale = block.abs().amax(dim=(2, 3)).clamp_min(_SMALLEST) / _LIMITS[dtype]
    scaled = block / scale[:, :, None, None]
    values = (scaled if dtype.is_floating_point else scaled.round()).to(dtype)
    return values.cpu().contiguous(), scale.cpu()


def _image_digests(setting: str, x: Tensor, condition: Tensor | None) -> Iterator[str]:
    """One digest an image, of its pixels and its condition."""
    inputs = [("x", x)] if condition is None else [("x", x), ("condition", condition)]
    on_host = [(name, values.detach().cpu()) for name, values in inputs]
    for row in range(len(x)):
        digest = hashlib.sha256(setting.encode())
        _add(digest, {name: values[row] for name, values in on_host})
        yield digest.hexdigest()


def _checksum(name: str, entry: Entry) -> str:
    """Of an entry and its name, so that a file in another's place is noticed too."""
    digest = hashlib.sha256(name.encode())
    _add(digest, entry)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, tensors: dict[str, Tensor]) -> None:
    """Names, dtypes, shapes and bits of tensors, whatever their order."""
    for name in sorted(tensors):
        values = tensors[name].detach().cpu()
        digest.update(f"{name} {values.dtype} {list(values.shape)};".encode())
        digest.update(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters()
    yield from network.named_buffers()


def _structure(network: nn.Module) -> list[tuple[str, str, dict[str, str]]]:
    """What weights don't tell: (name, class, plain attributes) of every module, such as heads, strides and modes."""
    return [
        (
            name,
            f"{type(module).__module__}.{type(module).__qualname__}",
            {key: text for key, value in sorted(vars(module).items()) if (text := _plain(value)) is not None},
        )
        for name, module in network.named_modules()
    ]


def _plain(value: object) -> str | None:
    """A value that is written alike in every process; None of any other."""
    if isinstance(value, (list, tuple)):
        parts = [_plain(part) for part in value]
        return None if None in parts else str(parts)
    if isinstance(value, (bool, int, float, str, torch.dtype)):
        return repr(value)
    name = getattr(value, "__qualname__", None)
    return name if isinstance(name, str) else None


def _size_of(folder: Path) -> int:
    """Bytes of all files below a folder, those that others are writing or removing among them."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size * path.is_file()
        except FileNotFoundError:
            continue
    return total
