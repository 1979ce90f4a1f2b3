"""The session of an engine, on a driver and a TensorRT that are none: order of calls, memory, graphs. No GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cldf_fast.deploy.cuda import Cuda
from cldf_fast.deploy.tensorrt import TensorRTSession
from cldf_fast.errors import BackendError

SHAPES = {"x": ((2, 3), (4, 3), (6, 3)), "scale": ((2, 1), (4, 1), (6, 1))}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("driver") / "libfake.so"
    source = Path(__file__).with_name("fake_driver.c")
    subprocess.run([compiler, "-Wall", "-Werror", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return str(library)


class Mode(Enum):
    INPUT = 1
    OUTPUT = 2


class Context:
    """Computes y = x * scale + 1 at the addresses it was given, when it is enqueued outside of a capture."""

    def __init__(self, refuses: int) -> None:
        self.addresses: dict[str, int] = {}
        self.rows = 0
        self.refuses = refuses
        self.enqueued = 0
        self.sizes: list[int] = []
        self.config: Any = None

    def configured(self, config: Any) -> Context:
        self.config = config
        return self

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert shape[1:] == SHAPES[name][0][1:]
        self.rows = shape[0]
        if name == "x":
            self.sizes.append(self.rows)
        return shape[0] != self.refuses

    def view(self, name: str, columns: int) -> np.ndarray:
        raw = (ctypes.c_float * (self.rows * columns)).from_address(self.addresses[name])
        return np.ndarray((self.rows, columns), np.float32, raw)

    def compute(self) -> None:
        self.view("y", 3)[:] = self.view("x", 3) * self.view("scale", 1) + 1

    def execute_async_v3(self, stream: int) -> bool:
        assert stream
        self.enqueued += 1
        self.compute()
        return True


@pytest.fixture
def trt() -> Any:
    context = Context(refuses=5)
    shapes = {"x": (-1, 3), "scale": (-1, 1), "y": (-1, 3)}
    engine = SimpleNamespace(
        num_io_tensors=3,
        get_tensor_name=lambda i: list(shapes)[i],
        get_tensor_shape=shapes.get,
        get_tensor_dtype=lambda name: "float",
        get_tensor_mode=lambda name: Mode.OUTPUT if name == "y" else Mode.INPUT,
        create_execution_context=lambda config=None: context.configured(config),
        create_runtime_config=SimpleNamespace,
    )

    class Runtime:
        engine_host_code_allowed = True

        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            assert not self.engine_host_code_allowed
            if plan == b"plan":
                return engine
            self.logger.log("ERROR", "magic number does not match")
            return None

    class ILogger:
        Severity = SimpleNamespace(ERROR="ERROR", INTERNAL_ERROR="INTERNAL")

    return SimpleNamespace(
        __name__="tensorrt",
        __version__="11.4",
        Runtime=Runtime,
        ILogger=ILogger,
        TensorIOMode=Mode,
        nptype=lambda dtype: np.float32,
        context=context,
    )


def inputs(rows: int) -> dict[str, np.ndarray]:
    return {name: np.random.rand(rows, shape[0][1]).astype(np.float32) for name, shape in SHAPES.items()}


def expected(given: dict[str, np.ndarray]) -> np.ndarray:
    return given["x"] * given["scale"] + 1


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_results_are_those_of_the_engine(driver: str, trt: Any, cuda_graph: bool) -> None:
    cuda = Cuda(library=driver)
    fake = ctypes.CDLL(driver)
    session = TensorRTSession(b"plan", SHAPES, cuda, trt, cuda_graph=cuda_graph)
    # What a replayed graph does on a GPU: the copies and the engine once more, at the same addresses.
    buffers = (session._inputs, session._outputs)

    def again() -> None:
        for buffer in buffers[0].values():
            ctypes.memmove(buffer.address, buffer.host.ctypes.data, buffer.host.nbytes)
        trt.context.compute()
        for buffer in buffers[1].values():
            ctypes.memmove(buffer.host.ctypes.data, buffer.address, buffer.host.nbytes)

    replay = ctypes.CFUNCTYPE(None)(again)
    fake.fake_set_replay(replay)
    before, kept = fake.fake_launches(), []
    for rows in (3, 3, 3, 1, 1, 6, 3, 3):
        given = inputs(rows)
        found = session(given)
        assert set(found) == {"y"}
        np.testing.assert_allclose(found["y"], expected(given), rtol=1e-6)
        kept.append((found["y"], found["y"].copy()))
    for first, then in kept:
        assert (first == then).all()  # a later call does not write into an earlier result
    # A size is run when it is new, captured and launched when it comes again, then launched: 1 is filled up to 2.
    assert fake.fake_launches() - before == (4 if cuda_graph else 0)
    assert trt.context.enqueued == (7 if cuda_graph else 8)
    assert fake.fake_graphs() == (1 if cuda_graph else 0)
    session.close()
    assert fake.fake_graphs() == 0
    assert fake.fake_live() == 0


def test_only_the_rows_of_a_call_are_copied(driver: str, trt: Any) -> None:
    fake = ctypes.CDLL(driver)
    session = TensorRTSession(b"plan", SHAPES, Cuda(library=driver), trt)
    before = fake.fake_uploaded()
    session(inputs(4))
    assert fake.fake_uploaded() - before == 4 * 4 * 4
    session.close()


def test_only_tensorrt_for_rtx_has_few_sizes_and_compiles_them_at_once(driver: str, trt: Any) -> None:
    sizes = {}
    for flavour in ("tensorrt", "tensorrt_rtx"):
        if flavour == "tensorrt_rtx":
            trt.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
        session = TensorRTSession(b"plan", SHAPES, Cuda(library=driver), trt, cuda_graph=False)
        trt.context.sizes.clear()
        for rows in (1, 3, 4, 6, 2):
            given = inputs(rows)
            np.testing.assert_allclose(session(given)["y"], expected(given), rtol=1e-6)
        session.close()
        sizes[flavour] = trt.context.sizes.copy()
        strategy = getattr(trt.context.config, "dynamic_shapes_kernel_specialization_strategy", None)
        assert strategy == ("eager" if flavour == "tensorrt_rtx" else None)
    assert sizes == {"tensorrt": [2, 3, 4, 6, 2], "tensorrt_rtx": [2, 4, 6, 2]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda driver, trt: Cuda(library="libabsent.so.1"), "CUDA: expected a GPU and its driver, found none"),
        (lambda driver, trt: Cuda(1, library=driver), r"CUDA: cuDeviceGet failed \(invalid device\)"),
        (
            lambda driver, trt: TensorRTSession(b"other", SHAPES, Cuda(library=driver), trt),
            r"tensorrt 11\.4: can't load the engine \(magic number does not match\)",
        ),
        (
            lambda driver, trt: TensorRTSession(
                b"plan", {"x": ((1, 3), (1, 3), (2**28, 3))}, Cuda(library=driver), trt
            ),
            r"CUDA: cuMemAlloc_v2 failed \(out of memory\)",
        ),
        (
            lambda driver, trt: TensorRTSession(b"plan", SHAPES, Cuda(library=driver), trt)(inputs(5)),
            "tensorrt: the engine refuses 5 rows of x",
        ),
    ],
)
def test_what_fails_is_said(driver: str, trt: Any, make: Callable[[str, Any], Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        make(driver, trt)


def test_a_device_is_described(driver: str) -> None:
    cuda = Cuda(library=driver)
    assert (cuda.name, cuda.capability) == ("Fake GPU", "8.6")
