"""The few calls of the CUDA driver that executing an engine needs, by ctypes: no torch, and no CUDA but the driver."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint64, c_void_p

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cldf_fast.errors import BackendError

_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED: other threads go on allocating


class Cuda:
    """One device, its context current in the thread that made this, and a stream.

    Raises BackendError where there is no driver or no such device. capability: e.g. "9.0". name: of the GPU.
    """

    def __init__(self, device: int = 0, *, library: str = "libcuda.so.1") -> None:
        try:
            self._driver = ctypes.CDLL(library)
        except OSError as error:
            raise BackendError(f"CUDA: expected a GPU and its driver, found none ({error})") from error
        self._call("cuInit", 0)
        handle = c_int()
        self._call("cuDeviceGet", byref(handle), device)
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, len(text), handle)
        self.name = text.value.decode("ascii", "replace")
        parts = []
        for attribute in _CAPABILITY:
            value = c_int()
            self._call("cuDeviceGetAttribute", byref(value), attribute, handle)
            parts.append(str(value.value))
        self.capability = ".".join(parts)
        self._context = c_void_p()
        self._call("cuDevicePrimaryCtxRetain", byref(self._context), handle)
        self.use()
        stream = c_void_p()
        self._call("cuStreamCreate", byref(stream), 1)  # not blocked by the default stream
        self.stream = stream.value or 0

    def use(self) -> None:
        """Make the context current in the calling thread."""
        self._call("cuCtxSetCurrent", self._context)

    def synchronise(self) -> None:
        """Wait for the stream."""
        self._call("cuStreamSynchronize", c_void_p(self.stream))

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """Record what `enqueue` puts on the stream, without executing it."""
        stream, graph, executable = c_void_p(self.stream), c_void_p(), c_void_p()
        self._call("cuStreamBeginCapture_v2", stream, _RELAXED)
        try:
            enqueue()
        finally:
            self._call("cuStreamEndCapture", stream, byref(graph))
        self._call("cuGraphInstantiateWithFlags", byref(executable), graph, c_uint64(0))
        self._call("cuGraphDestroy", graph)
        return Graph(self, executable)

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._driver, function)(*arguments)
        if status:
            text = c_char_p()
            with suppress(AttributeError):
                self._driver.cuGetErrorString(status, byref(text))
            raise BackendError(f"CUDA: {function} failed ({(text.value or b'').decode() or status})")


class Graph:
    """Recorded work of a stream."""

    def __init__(self, cuda: Cuda, executable: c_void_p) -> None:
        self._cuda, self._executable = cuda, executable

    def launch(self) -> None:
        """Enqueue the work once more."""
        self._cuda._call("cuGraphLaunch", self._executable, c_void_p(self._cuda.stream))

    def destroy(self) -> None:
        """Give it back; it must not be launched any more."""
        self._cuda._call("cuGraphExecDestroy", self._executable)


class Buffer:
    """Memory of one tensor on the device, and page-locked memory of the host that it is copied from or to.

    host: numpy array of the shape and dtype given. address: on the device.
    """

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self._cuda = cuda
        self._bytes = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        device, host = c_void_p(), c_void_p()
        cuda._call("cuMemAlloc_v2", byref(device), c_size_t(self._bytes))
        cuda._call("cuMemAllocHost_v2", byref(host), c_size_t(self._bytes))
        self.address = device.value or 0
        self._host = host
        raw = (ctypes.c_byte * self._bytes).from_address(host.value or 0)
        self.host: NDArray = np.ndarray(shape, dtype, memoryview(raw))
        self._row = self.host.nbytes // shape[0]

    def upload(self, rows: int) -> None:
        """Enqueue the copy of the first rows to the device."""
        self._cuda._call(
            "cuMemcpyHtoDAsync_v2", c_void_p(self.address), self._host, c_size_t(rows * self._row),
            c_void_p(self._cuda.stream),
        )  # fmt: skip

    def download(self, rows: int) -> None:
        """Enqueue the copy of the first rows to the host."""
        self._cuda._call(
            "cuMemcpyDtoHAsync_v2", self._host, c_void_p(self.address), c_size_t(rows * self._row),
            c_void_p(self._cuda.stream),
        )  # fmt: skip

    def free(self) -> None:
        """Give both back; `host` must not be used any more."""
        self._cuda._call("cuMemFree_v2", c_void_p(self.address))
        self._cuda._call("cuMemFreeHost", self._host)
