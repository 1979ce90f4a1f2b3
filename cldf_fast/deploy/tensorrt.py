"""Engines of TensorRT 10 and 11 and of TensorRT for RTX, from ONNX that carries its own precision.

All three are driven alike: networks are strongly typed, so that precision is what the types in the ONNX say. TensorRT
for RTX also builds on a machine without a GPU, for several compute capabilities in one engine.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from cldf_fast.deploy.cuda import Buffer, Cuda, Graph
from cldf_fast.deploy.manifest import Runtime, SealedDirectory, operating_system
from cldf_fast.deploy.runtime import Array
from cldf_fast.errors import BackendError, ConfigError
from cldf_fast.files import atomic_write_bytes

FLAVOURS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
"""Modules, and the distributions that hold them."""


@dataclass(frozen=True)
class Batches:
    """The batch sizes that an engine takes, smallest to largest, and the one that it is tuned for."""

    smallest: int = 1
    best: int = 8
    largest: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.smallest <= self.best <= self.largest:
            raise ConfigError(
                f"batches: expected 1 <= smallest <= best <= largest, got {self.smallest}, {self.best}, {self.largest}"
            )


@dataclass(frozen=True)
class Engine:
    """plan: the serialised engine. shapes: of every input, smallest, best and largest. flags: of its builder."""

    plan: bytes
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    flags: tuple[str, ...]


class TimingCache:
    """Times that TensorRT measured of kernels while it built engines, which builds with the same cache do not measure
    again: the graphs of one export share most of their layers.

    path: of a file to start from, where it exists, and to write after every engine; None: memory alone. What is in it
    holds for one version of TensorRT on one kind of GPU, and others refuse it. TensorRT for RTX measures nothing when
    it builds.
    Raises ConfigError where `path` is neither a file nor a place for one.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._times = b""
        if path is None:
            return
        if path.exists() and not path.is_file():
            raise ConfigError(f"timing_cache: expected a file, or a path to write one at, got {path}, which is neither")
        self._times = path.read_bytes() if path.exists() else b""

    def attach(self, trt: Any, config: Any) -> None:
        """Have a build that is configured by `config` use and fill the cache; raises BackendError for another's."""
        cache = config.create_timing_cache(self._times)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            raise BackendError(
                f"timing_cache: expected what {trt.__name__} {trt.__version__} wrote on a GPU of this kind, got "
                f"{self.path}, which it refuses; name another file to write a new one"
            )

    def keep(self, config: Any) -> None:
        """Take what a build has added."""
        self._times = bytes(config.get_timing_cache().serialize())
        if self.path is not None:
            atomic_write_bytes(self.path, self._times)


def library(flavour: str) -> ModuleType:
    """The module of a flavour. Raises BackendError, saying what to install, where it is absent or too old."""
    if flavour not in FLAVOURS:
        raise ConfigError(f"flavour: expected one of {', '.join(FLAVOURS)}, got {flavour!r}")
    try:
        module = importlib.import_module(flavour)
    except ImportError as error:
        where = "from its vendor's index" if flavour == "tensorrt" else f"with pip install {FLAVOURS[flavour]}"
        raise BackendError(f"{flavour}: is not installed ({error}); install it {where}") from error
    if flavour == "tensorrt" and int(module.__version__.split(".")[0]) < 10:
        raise BackendError(f"tensorrt: expected version 10 or later, got {module.__version__}")
    return module


def capabilities(flavour: str) -> list[str]:
    """Compute capabilities that engines can be built for without such a GPU, e.g. "8.6"; [] where none can."""
    names = getattr(library(flavour), "ComputeCapability", None)
    numbers = [name[2:] for name in getattr(names, "__members__", {}) if name.startswith("SM")]
    return [f"{number[:-1]}.{number[-1]}" for number in sorted(numbers, key=int)]


def check_capabilities(flavour: str, wanted: Sequence[str]) -> list[str]:
    """As `capabilities`. Raises BackendError for one that is wanted and not served."""
    served = capabilities(flavour)
    for number in wanted:
        if number not in served:
            raise BackendError(
                f"compute_capabilities: expected what {flavour} {library(flavour).__version__} serves "
                f"({', '.join(served) or 'only the GPU of the machine that builds'}), got {number}"
            )
    return served


def build(
    onnx: bytes,
    *,
    flavour: str,
    batches: Batches | None = None,
    compute_capabilities: Sequence[str] = (),
    timing_cache: TimingCache | None = None,
) -> Engine:
    """Build an engine.

    onnx: a model whose first axis is the batch, in its own precision. compute_capabilities: that the engine shall run
    on, e.g. ["8.6", "12.0"]; none: the GPU of this machine. timing_cache: of TensorRT, not of TensorRT for RTX.
    Raises BackendError for a library that is absent, a capability that it does not serve, a timing cache of another
    GPU or version, and a model that it can't build.
    """
    batches = batches or Batches()
    trt = library(flavour)
    check_capabilities(flavour, compute_capabilities)
    logger = _Log.of(trt)
    builder = trt.Builder(logger)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # the only kind from version 11 on
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx):
        raise BackendError(f"{flavour} {trt.__version__}: can't read the ONNX model ({parser.get_error(0)})")
    config = builder.create_builder_config()
    # TF32 would round the inputs of products to 10 bits in an engine that is called float32.
    config.clear_flag(trt.BuilderFlag.TF32)
    flags = ["TF32 off"]
    if timing_cache is not None:
        timing_cache.attach(trt, config)
        flags.append("timing cache")
    profile = builder.create_optimization_profile()
    shapes = {}
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        rest = tuple(tensor.shape)[1:]
        smallest, best, largest = ((rows, *rest) for rows in (batches.smallest, batches.best, batches.largest))
        shapes[tensor.name] = (smallest, best, largest)
        profile.set_shape(tensor.name, smallest, best, largest)
    config.add_optimization_profile(profile)
    if compute_capabilities:
        config.num_compute_capabilities = len(compute_capabilities)
        for i, number in enumerate(compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{number.replace('.', '')}"), i)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BackendError(
            f"{flavour} {trt.__version__}: can't build the engine ({logger.last or 'it does not say why'})"
        )
    if timing_cache is not None:
        timing_cache.keep(config)
    return Engine(bytes(plan), shapes, tuple(flags))


class TensorRTSession:
    """An engine on a GPU: a `deploy.runtime.Session` with one execution context, for one call at a time.

    plan: an engine whose bytes have been checked. shapes: as in `Engine`. cuda_graph: capture the work of a batch
    size when it comes twice in a row, and replay it until another comes.

    TensorRT for RTX compiles kernels for a batch size at its first call, which takes seconds. Sizes are rounded up to
    powers of two there, so that they are few.
    """

    def __init__(
        self,
        plan: bytes,
        shapes: Mapping[str, Sequence[tuple[int, ...]]],
        cuda: Cuda,
        trt: Any,
        *,
        cuda_graph: bool = True,
    ) -> None:
        self.backend = trt.__name__
        self.smallest, self.max_batch = (next(iter(shapes.values()))[i][0] for i in (0, 2))
        self._cuda, self._cuda_graph, self._lock = cuda, cuda_graph, threading.Lock()
        logger = _Log.of(trt)
        self._runtime = trt.Runtime(logger)
        self._runtime.engine_host_code_allowed = False
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BackendError(f"{self.backend} {trt.__version__}: can't load the engine ({logger.last})")
        self._compiles_by_size = hasattr(trt, "DynamicShapesKernelSpecializationStrategy")
        self._context = self._create_context(trt)
        self._inputs: dict[str, Buffer] = {}
        self._outputs: dict[str, Buffer] = {}
        for i in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(i)
            shape = (self.max_batch, *tuple(self._engine.get_tensor_shape(name))[1:])
            buffer = Buffer(cuda, shape, trt.nptype(self._engine.get_tensor_dtype(name)))
            is_input = self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (self._inputs if is_input else self._outputs)[name] = buffer
            self._context.set_tensor_address(name, buffer.address)
        self._rows = 0  # what the context is set to
        self._graph: Graph | None = None  # of so many rows

    @classmethod
    def of(cls, sealed: SealedDirectory, onnx: str, *, flavour: str) -> TensorRTSession:
        """The engine of a directory that was built from an ONNX file for this machine.

        Raises EngineMismatchError where there is none, naming what differs.
        """
        trt, cuda = library(flavour), Cuda()
        runtime = Runtime(flavour, trt.__version__, cuda.capability, operating_system(), cuda.name)
        name = sealed.engine(runtime, onnx=onnx)
        return cls(sealed.read(name), sealed.manifest.engines[name].shapes, cuda, trt)

    @classmethod
    def rebuilt(cls, sealed: SealedDirectory, onnx: str, *, flavour: str) -> TensorRTSession:
        """An engine that is built now from an ONNX file of a directory, for the GPU of this machine; nothing is kept.

        Its batch sizes are those of the directory's engines of that file, where it holds one. Raises BackendError
        where it can't be built or loaded.
        """
        trt, cuda = library(flavour), Cuda()
        source = sealed.manifest.files[onnx].sha256
        profiles = [key.shapes for key in sealed.manifest.engines.values() if key.onnx_sha256 == source]
        batches = Batches(*(shape[0] for shape in next(iter(profiles[0].values())))) if profiles else Batches()
        here = [cuda.capability] if capabilities(flavour) else []
        engine = build(sealed.read(onnx), flavour=flavour, batches=batches, compute_capabilities=here)
        return cls(engine.plan, engine.shapes, cuda, trt)

    def _create_context(self, trt: Any) -> Any:
        if not self._compiles_by_size:
            return self._engine.create_execution_context()
        # By default kernels for any size serve until those for the size at hand are compiled, beside later calls: the
        # same image would get other bits on the way, and a graph keep the kernels of the call that it recorded.
        config = self._engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        return self._engine.create_execution_context(config)

    def _batch_size(self, given: int) -> int:
        rows = max(given, self.smallest)
        return min(1 << (rows - 1).bit_length(), self.max_batch) if self._compiles_by_size else rows

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `deploy.runtime.Session`. What is missing to a batch size of the engine's is filled up."""
        given = len(next(iter(inputs.values())))
        rows = self._batch_size(given)
        with self._lock:
            self._cuda.use()
            for name, buffer in self._inputs.items():
                buffer.host[:given] = inputs[name]
                buffer.host[given:rows] = inputs[name][-1]
            self._execute(rows)
            self._cuda.synchronise()
            return {name: buffer.host[:given].copy() for name, buffer in self._outputs.items()}

    def _execute(self, rows: int) -> None:
        if rows != self._rows:
            # The first work after a change of shapes may compile or allocate, which can't be recorded, and what was
            # recorded before it holds for those shapes alone.
            self._drop_graph()
            self._set_rows(rows)
            self._enqueue(rows)
        elif self._cuda_graph:
            self._graph = self._graph or self._cuda.capture(lambda: self._enqueue(rows))
            self._graph.launch()
        else:
            self._enqueue(rows)

    def _set_rows(self, rows: int) -> None:
        self._rows = 0
        for name, buffer in self._inputs.items():
            if not self._context.set_input_shape(name, (rows, *buffer.host.shape[1:])):
                raise BackendError(f"{self.backend}: the engine refuses {rows} rows of {name}")
        self._rows = rows

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._graph.destroy()
            self._graph = None

    def _enqueue(self, rows: int) -> None:
        for buffer in self._inputs.values():
            buffer.upload(rows)
        if not self._context.execute_async_v3(self._cuda.stream):
            raise BackendError(f"{self.backend}: the engine can't be executed")
        for buffer in self._outputs.values():
            buffer.download(rows)

    def close(self) -> None:
        """See `Session`."""
        with self._lock:
            self._cuda.use()
            self._drop_graph()
            for buffer in (*self._inputs.values(), *self._outputs.values()):
                buffer.free()


class _Log:
    """Keeps the library's last error, which `build` reports; its warnings are of no use to a user of an export."""

    @staticmethod
    def of(trt: ModuleType) -> Any:
        """A logger, whose base class is the library's own."""

        class Logger(trt.ILogger):  # type: ignore[name-defined]
            last = ""

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                    self.last = message

        return Logger()
