"""Data sets by name, all behind the contract of `cldf_fast.data.base`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cldf_fast.errors import ConfigError, SplitError

if TYPE_CHECKING:
    from cldf_fast.data.base import SliceDataset

DATASETS = ("phantom", "labelled", "lgg", "brats", "chaos", "nnunet")
"""Names that `open_dataset` takes; each is a module here with a function of the same name."""


def open_dataset(name: str, root: str | Path | None = None, **options: Any) -> SliceDataset:
    """Open a data set by its name.

    name: one of `DATASETS`. root: its folder; the phantom is generated and has none.
    options: keyword arguments of the function of the same name, e.g. `modalities=("flair",)` for "brats".
    Raises ConfigError for an unknown name or option, DataError for a folder that does not hold the data set.
    """
    if name not in DATASETS:
        raise ConfigError(f"dataset: expected one of {', '.join(DATASETS)}, got {name!r}")
    opener: Callable[..., SliceDataset] = getattr(import_module(f"{__name__}.{name}"), name)
    return _call(opener, name, root, options)


def open_split(name: str, root: str | Path | None = None, *, seed: int = 0, **options: Any) -> dict[str, SliceDataset]:
    """Open a data set divided by patient into "train", "val" and "test".

    The folder's own `split.csv` is binding where there is one; without it patients are divided by `make_split` with
    `seed`. The phantom has a split of its own, in which `seed` also makes the patients.
    name, root, options and errors: as for `open_dataset`; SplitError for a `split.csv` that does not fit the data.
    """
    if name == "phantom":
        from cldf_fast.data.phantom import phantom_split

        return _call(phantom_split, name, root, {"seed": seed, **options})
    from cldf_fast.data.splits import find_split, make_split, read_split, split_dataset

    dataset = open_dataset(name, root, **options)
    path = find_split(root) if root is not None else None
    if path is None:
        return split_dataset(dataset, make_split(dataset.subjects, seed=seed))
    parts = split_dataset(dataset, read_split(path), source=path)
    if absent := [part for part in ("train", "val") if part not in parts]:
        raise SplitError(
            f"{path}: expected the parts train, val and usually test, found {', '.join(parts)}; {absent[0]} is missing"
        )
    return parts


def _call(function: Callable[..., Any], name: str, root: str | Path | None, options: dict[str, Any]) -> Any:
    """Call with the root where the function takes one; what it does not take, or misses, is refused in words."""
    parameters = dict(signature(function).parameters)
    takes_root = parameters.pop("root", None) is not None
    unknown = next((option for option in options if option not in parameters), None)
    if unknown is not None:
        raise ConfigError(
            f"dataset {name}: unknown option {unknown!r}, expected one of {', '.join(parameters) or '(none)'}"
        )
    required = {option for option, parameter in parameters.items() if parameter.default is Parameter.empty}
    missing = sorted(required - set(options))
    if missing:
        raise ConfigError(f"dataset {name}: option {missing[0]!r} is needed, got none")
    if takes_root and root is None:
        raise ConfigError(f"dataset {name}: expected the folder that holds the data, got none")
    if not takes_root and root is not None:
        raise ConfigError(f"dataset {name}: it is generated and takes no folder, got {root}")
    return function(root, **options) if takes_root else function(**options)
