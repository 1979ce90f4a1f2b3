"""What `cldf-fast verify` does: integrity, signature, and parity of every graph that this machine can run. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cldf_fast.deploy.manifest import open_sealed
from cldf_fast.deploy.parity import Parity, golden_cases, measure
from cldf_fast.deploy.predictor import Predictor, Settings
from cldf_fast.errors import BackendError, EngineMismatchError


@dataclass(frozen=True)
class Verification:
    """measured: parity of what ran. skipped: backend and precision, and why it did not run. signed: whether the
    signature was checked. passed: whether something ran and nothing failed."""

    measured: list[Parity]
    skipped: dict[str, str]
    signed: bool

    @property
    def passed(self) -> bool:
        """At least one backend ran, and each that ran agrees with PyTorch."""
        return bool(self.measured) and not any(each.failures for each in self.measured)


def verify(folder: Path, *, public_key: Path | None = None, backends: tuple[str, ...] = ()) -> Verification:
    """Verify an engine directory.

    backends: that have to run, of "onnx", "tensorrt" and "tensorrt_rtx"; none: each that the directory holds, as far as
    this machine can run it.
    Raises IntegrityError where a byte is not as the manifest says; EngineMismatchError or BackendError where a backend
    that has to run can't.
    """
    sealed = open_sealed(folder, public_key=public_key)
    sealed.verify_all()
    golden = golden_cases(sealed)
    there = dict.fromkeys(["onnx", *(key.flavour for key in sealed.manifest.engines.values())])
    measured, skipped = [], {}
    for backend in backends or there:
        for precision in Settings.of(sealed).precisions:
            predictor = Predictor(folder, precision=precision, backend=backend, public_key=public_key)
            try:
                predictor.load()
            except (BackendError, EngineMismatchError) as error:
                # ONNX Runtime has no bfloat16 on a CPU, which is no fault of the directory.
                if backend in backends and not (backend == "onnx" and precision == "bfloat16"):
                    raise
                skipped[f"{backend} {precision}"] = str(error)
                continue
            measured.append(measure(predictor, golden))
    return Verification(measured, skipped, sealed.verified)
