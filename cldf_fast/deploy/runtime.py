"""Sessions: an exported graph on the runtime that executes it, behind one face. Numpy alone; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cldf_fast.errors import BackendError

Array = NDArray[Any]


class Session(Protocol):
    """One graph, loaded. max_batch: the most rows of a call. backend: what executes it, for reports."""

    max_batch: int
    backend: str

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name, numpy arrays of the caller's own, for inputs [B, ...] by name."""
        ...

    def close(self) -> None:
        """Give its memory back; it must not be called any more."""
        ...


class OnnxSession:
    """ONNX Runtime on the CPU.

    model: serialised ONNX. threads: 0 for as many as the machine has cores. Raises BackendError where ONNX Runtime is
    absent or can't execute the model, as with bfloat16 convolutions.
    """

    backend = "onnxruntime"

    def __init__(self, model: bytes, *, threads: int = 0, max_batch: int = 16) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendError(f"onnxruntime: is not installed ({error}); pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            # Its fallback would print to the terminal, and try the same once more.
            self._session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
            self._outputs = [output.name for output in self._session.get_outputs()]
        except Exception as error:  # its own exceptions have no common base
            raise BackendError(
                f"onnxruntime {onnxruntime.__version__}: can't load the model ({_one_line(error)})"
            ) from error
        self.max_batch = max_batch

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `Session`. Raises BackendError where the model can't be executed, or takes or gives something else."""
        try:
            outputs = self._session.run(self._outputs, dict(inputs))
        except Exception as error:  # its own exceptions have no common base
            raise BackendError(f"onnxruntime: can't execute the model ({_one_line(error)})") from error
        rows = len(next(iter(inputs.values())))
        for name, output in zip(self._outputs, outputs, strict=True):
            if not isinstance(output, np.ndarray) or output.shape[:1] != (rows,):
                raise BackendError(f"onnxruntime: expected {rows} rows of {name!r} from the model, got something else")
        return dict(zip(self._outputs, outputs, strict=True))

    def close(self) -> None:
        """See `Session`."""
        del self._session


def _one_line(error: Exception) -> str:
    """What it says, in printable characters: it may quote the model's bytes."""
    return "".join(letter if letter.isprintable() else " " for letter in str(error))
