"""Which backend runs an operation.

Every operation has one torch.library entry, and so one schema, one fake and one autograd formula for all backends.
Its body calls `run`, which picks an implementation from the registry below when the call really executes:
torch.compile, FakeTensor and autograd never see the choice. A backend is added by one `register` call in the
operation's own file. What `register` is given may import its kernels at the first call, and must not before, so that
`import cldf_fast.ops` touches no CUDA, no Triton and no compiled code that a machine lacks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cldf_fast.errors import BackendError
from cldf_fast.ops import _native

BACKENDS = ("cuda", "triton", "cpu", "reference")
"""The backends' names, the fastest first: `auto` takes the first that serves the input."""

ENVIRONMENT = "CLDF_FAST_IMPL"
"""The environment variable that replaces `impl="auto"`; as binding as a backend that is named in the call."""


def _no_objection(*arguments: Any) -> None:
    """The answer of a backend that serves everything."""


@dataclass(frozen=True)
class Implementation:
    """One operation on one backend.

    run: called with the operation's arguments in the order of its schema, `impl` left out.
    serves: called with the same arguments; None, or the reason why this input can't be served. Reads shapes, dtypes,
    devices and options and never values, since those would need a host synchronisation.
    available: None, or the reason why this machine can't run the backend at all.
    """

    run: Callable[..., Any]
    serves: Callable[..., str | None]
    available: Callable[[], str | None]

    def objection(self, *arguments: Any) -> str | None:
        """None, or why this implementation can't run these arguments here."""
        return self.available() or self.serves(*arguments)


_REGISTRY: dict[str, dict[str, Implementation]] = {}


def register(
    op: str,
    backend: str,
    run: Callable[..., Any],
    *,
    serves: Callable[..., str | None] = _no_objection,
    available: Callable[[], str | None] = _no_objection,
) -> None:
    """Add a backend to an operation; see `Implementation` for the three functions."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    _REGISTRY.setdefault(op, {})[backend] = Implementation(run, serves, available)


def select(op: str, impl: str, *arguments: Any) -> Implementation:
    """The implementation that runs `op` on these arguments.

    impl: "auto" for the fastest backend that serves them, or a backend's name. `CLDF_FAST_IMPL` replaces "auto".
    Raises BackendError for an unknown name, and for a named backend that can't serve, with the reason.
    """
    asked_by, name = "impl", impl
    if impl == "auto":
        asked_by, name = ENVIRONMENT, os.environ.get(ENVIRONMENT) or "auto"
    if name != "auto" and name not in BACKENDS:
        raise BackendError(f"{asked_by}: expected auto or one of {', '.join(BACKENDS)}, got {name!r}")
    registered, asked_for = _REGISTRY[op], BACKENDS if name == "auto" else (name,)
    for backend in asked_for:
        if backend in registered and registered[backend].objection(*arguments) is None:
            return registered[backend]
    reasons = (
        (backend, registered[backend].objection(*arguments) if backend in registered else _absence(backend))
        for backend in asked_for
    )
    sentences = ", ".join(f"{backend} can't serve {op} ({reason})" for backend, reason in reasons)
    raise BackendError(f"{asked_by}: {sentences}; ask for auto or another backend")


def run(op: str, impl: str, *arguments: Any) -> Any:
    """Run `op` on the backend that `select` picks."""
    return select(op, impl, *arguments).run(*arguments)


_LIBRARY = torch.library.Library("cldf_fast", "FRAGMENT")


def operator(schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The torch.library entry of an operation whose results are constants of autograd, unless `differentiate` follows.

    `torch.library.custom_op` does the same and more, among it what carries gradients, which takes as long as the work
    on a small image.

    schema: without the namespace; its last argument is `impl`. fake: called with the same arguments.
    """
    op = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(op, lambda *arguments: run(op, arguments[-1], *arguments[:-1]), "CompositeExplicitAutograd")
    torch.library.register_fake(f"cldf_fast::{op}", fake, lib=_LIBRARY)
    entry: Callable[..., Any] = getattr(torch.ops.cldf_fast, op).default
    return entry


def differentiate(op: str, backward: Callable[..., Any], save: Callable[..., None]) -> None:
    """Give an `operator` a gradient; the two functions are those of `torch.library.register_autograd`."""
    torch.library.register_autograd(f"cldf_fast::{op}", backward, setup_context=save, lib=_LIBRARY)


def backend_report() -> dict[str, dict[str, str]]:
    """For every operation and every backend "serving", or the reason why not.

    "serving" speaks of the machine; a backend that serves can still refuse a certain input, for its device or dtype.
    """
    return {
        op: {
            backend: (backends[backend].available() if backend in backends else _absence(backend)) or "serving"
            for backend in BACKENDS
        }
        for op, backends in _REGISTRY.items()
    }


def _absence(backend: str) -> str:
    if backend in ("cpu", "cuda") and _native.reason is not None:
        return _native.reason
    return f"not built: this version has no {backend} kernel for it"
