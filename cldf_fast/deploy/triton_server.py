"""A model repository of Triton Inference Server, written from an engine directory, and its model that clients call.

REPOSITORY/cldf/                  images in, masks out: `FrontModel` in the server's Python backend
REPOSITORY/cldf/1/engine/         the engine directory as it was sealed; `cldf-fast verify` takes it
REPOSITORY/cldf_labels/           the graphs, each executed and batched by the server's own backend
REPOSITORY/cldf_segmentation/

A client sends `image` float32 [B, C, S, S] in [-1, 1] (as `cases.working_images` makes it) to the model `cldf`, and
`labels` bool [B, K] if image-level labels are known; it gets what `Predictor.segment` gives. The server's Python needs
numpy and this package without what it requires (`pip install --no-deps`); a server that is older than numpy 2 sees no
data in its arrays, and needs numpy 1.26.

Before it serves, the model compares every file of the graphs with the sealed directory, and checks its signature where
the `public_key` among the parameters of its config.pbtxt names a file. The server loads the graphs by itself, though,
and whoever can write to a repository can run code in the server: mount it read-only. No torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cldf_fast import __version__
from cldf_fast.deploy.manifest import SealedDirectory, open_sealed
from cldf_fast.deploy.predictor import GRAPHS, RESEARCH_USE, Predictor, Settings
from cldf_fast.deploy.runtime import Array, Session
from cldf_fast.deploy.tensorrt import Batches
from cldf_fast.errors import BackendError, CLDFError, ConfigError, DataError, EngineMismatchError, IntegrityError
from cldf_fast.files import atomic_write_bytes, atomic_write_text, new_folder

FRONT = "cldf"
_OUTPUTS = {"segmentation": ("probability", "mask"), "labels": ("label_probability",)}
_FRONT_INSTANCES = 2  # so that the noise of one request is drawn while another's graph runs
_QUEUE_DELAY = 100  # microseconds that a request may wait for others to share a batch
# Types of ONNX tensors (by number) that the graphs have, as the server calls them, and their bytes.
_TYPES = {1: ("TYPE_FP32", 4), 6: ("TYPE_INT32", 4)}

_MODEL = f'''"""Written by cldf_fast {__version__}. {RESEARCH_USE}"""

from pathlib import Path

from cldf_fast.deploy.triton_server import FrontModel


class TritonPythonModel(FrontModel):
    folder = Path(__file__).parent
'''


def write_triton_repository(
    engine: Path,
    out: Path,
    *,
    precision: str | None = None,
    backend: str = "onnx",
    batches: Batches | None = None,
    public_key: Path | None = None,
) -> None:
    """Write a model repository to the folder `out`, which must not exist, from a sealed engine directory.

    precision: of the graphs, by default the directory's first. backend: "onnx" (ONNX Runtime on the CPU, as
    `cldf-fast verify` measured it) or "tensorrt" (the directory's engines, each for the GPUs that it was built for; the
    server's TensorRT has to be the one that built them). batches: that ONNX files are served in; engines bring their
    own. public_key: of whom the directory has to be signed by.
    Raises IntegrityError where a byte is not as it was sealed, ConfigError for an argument that can't be used,
    EngineMismatchError where there is no engine. Nothing is left at `out` then.
    """
    sealed = open_sealed(engine, public_key=public_key)
    sealed.check_outside(out)
    settings = Settings.of(sealed)
    precision = precision or settings.precisions[0]
    if precision not in settings.precisions:
        raise ConfigError(
            f"precision: expected one of {', '.join(settings.precisions)}, which {engine} holds, got {precision!r}"
        )
    graphs = [_graph(sealed, name, precision, backend, batches or Batches()) for name in GRAPHS]
    largest = min(graph.batches.largest for graph in graphs)
    with new_folder(out) as folder:
        for graph in graphs:
            atomic_write_text(folder / graph.model / "config.pbtxt", graph.config())
            for file in graph.files:
                atomic_write_bytes(folder / graph.model / "1" / Path(file).name, sealed.read(file))
        sealed.copy_to(folder / FRONT / "1/engine")
        atomic_write_text(folder / FRONT / "1/model.py", _MODEL)
        atomic_write_text(folder / FRONT / "labels.txt", "".join(f"{name}\n" for name in settings.class_names))
        shared = _FRONT_INSTANCES * largest * sum(graph.bytes_per_row for graph in graphs)
        atomic_write_text(folder / FRONT / "config.pbtxt", _front_config(sealed, settings, precision, largest, shared))


@dataclass(frozen=True)
class _Tensor:
    """An input or output without its first axis. data_type: as the server calls it."""

    name: str
    data_type: str
    dims: tuple[int, ...]
    more: str = ""

    def __str__(self) -> str:
        more = f"  {self.more}\n" if self.more else ""
        return f"{{\n  name: {_text(self.name)}\n  data_type: {self.data_type}\n  dims: {list(self.dims)}\n{more}}}"


@dataclass(frozen=True)
class _Graph:
    """One graph as a model of the server. files: sealed names, with the compute capabilities that each is for."""

    model: str
    backend: str
    files: Mapping[str, Sequence[str]]
    inputs: Sequence[_Tensor]
    outputs: Sequence[_Tensor]
    bytes_per_row: int
    batches: Batches

    def config(self) -> str:
        """config.pbtxt."""
        (first, capabilities), *_ = self.files.items()
        if capabilities:
            kind, chosen = (
                "KIND_GPU",
                [
                    f"cc_model_filenames {{ key: {_text(capability)} value: {_text(Path(file).name)} }}"
                    for file, each in self.files.items()
                    for capability in each
                ],
            )
        else:
            kind, chosen = "KIND_CPU", [f"default_model_filename: {_text(Path(first).name)}"]
        return _config(
            self.model,
            self.backend,
            self.batches.largest,
            self.inputs,
            self.outputs,
            [
                *chosen,
                f"dynamic_batching {{ preferred_batch_size: [{self.batches.best}] "
                f"max_queue_delay_microseconds: {_QUEUE_DELAY} }}",
                f"instance_group {{ count: 1 kind: {kind} }}",
            ],
        )


def _graph(sealed: SealedDirectory, name: str, precision: str, backend: str, batches: Batches) -> _Graph:
    import onnx

    file = f"{name}.{precision}.onnx"
    graph = onnx.load_model_from_string(sealed.read(file)).graph
    files: dict[str, Sequence[str]] = {file: ()}
    if backend == "tensorrt":
        digest = sealed.manifest.files[file].sha256
        keys = {
            path: key
            for path, key in sealed.manifest.engines.items()
            if key.onnx_sha256 == digest and key.flavour == "tensorrt"
        }
        if not keys:
            raise EngineMismatchError(
                f"{sealed.folder}: holds no engine of {file} for TensorRT, which is what the server runs; build "
                f"one with `cldf-fast export RUN --format tensorrt --out ENGINE`"
            )
        files = {path: key.compute_capability.split(",") for path, key in keys.items()}
        profiles = [shapes for key in keys.values() for shapes in key.shapes.values()]
        batches = Batches(
            max(smallest[0] for smallest, _, _ in profiles),
            min(best[0] for _, best, _ in profiles),
            min(largest[0] for _, _, largest in profiles),
        )
    elif backend != "onnx":
        raise ConfigError(f"backend: expected onnx or tensorrt, got {backend!r}")
    elif precision == "bfloat16":
        raise ConfigError("precision: expected float32 or float16 for ONNX Runtime on a CPU, got 'bfloat16'")
    if batches.smallest != 1:
        raise ConfigError(
            f"batches: expected 1 as the smallest, because the server may send a single image, got {batches.smallest}"
        )
    inputs, outputs = _tensors(graph.input), _tensors(graph.output)
    sizes = dict(_TYPES.values())
    row = sum(sizes[tensor.data_type] * int(np.prod(tensor.dims)) for tensor in (*inputs, *outputs))
    platform = {"onnx": "onnxruntime", "tensorrt": "tensorrt"}[backend]
    return _Graph(f"{FRONT}_{name}", platform, files, inputs, outputs, row, batches)


def _tensors(values: Any) -> list[_Tensor]:
    return [
        _Tensor(
            value.name,
            _TYPES[value.type.tensor_type.elem_type][0],
            tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]),
        )
        for value in values
    ]


def _front_config(sealed: SealedDirectory, settings: Settings, precision: str, largest: int, shared: int) -> str:
    size, classes = (settings.size, settings.size), len(settings.class_names)
    parameters = {
        "intended_use": RESEARCH_USE,
        "manifest_sha256": sealed.manifest.sha256,
        "precision": precision,
    }
    config = _config(
        FRONT,
        "python",
        largest,
        [
            _Tensor("image", "TYPE_FP32", (len(settings.channel_names), *size)),
            _Tensor("labels", "TYPE_BOOL", (classes,), "optional: true"),
        ],
        [
            _Tensor("probability", "TYPE_FP32", (classes + 1, *size)),
            _Tensor("mask", "TYPE_UINT8", size),
            _Tensor("present", "TYPE_BOOL", (classes,)),
            _Tensor("label_probability", "TYPE_FP32", (classes,), 'label_filename: "labels.txt"'),
        ],
        [
            f"instance_group {{ count: {_FRONT_INSTANCES} kind: KIND_CPU }}",
            *(
                f"parameters {{ key: {_text(key)} value: {{ string_value: {_text(value)} }} }}"
                for key, value in parameters.items()
            ),
        ],
    )
    return (
        f"# {RESEARCH_USE}\n"
        f"# Requests and results go through shared memory: batches of {largest} want --shm-size={-(-shared >> 20)}m or "
        f"more.\n{config}"
    )


def _config(
    name: str, backend: str, largest: int, inputs: Sequence[_Tensor], outputs: Sequence[_Tensor], more: Sequence[str]
) -> str:
    lines = [
        f"name: {_text(name)}",
        f"backend: {_text(backend)}",
        f"max_batch_size: {largest}",
        *(f"input {tensor}" for tensor in inputs),
        *(f"output {tensor}" for tensor in outputs),
        *more,
    ]
    return "\n".join(lines) + "\n"


def _text(value: str) -> str:
    """A string of protobuf's text format, which JSON's are, of ASCII."""
    return json.dumps(value)


class FrontModel:
    """What the server's Python backend calls; `folder`: its version folder in the repository."""

    folder: Path

    def initialize(self, args: Mapping[str, str]) -> None:
        """Check the repository. Raises IntegrityError, and so isn't served, where a file is not as it was sealed."""
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        self._predictor = _ServedPredictor(
            self.folder / "engine",
            precision=parameters["precision"],
            public_key=Path(parameters["public_key"]) if "public_key" in parameters else None,
            max_batch=int(config["max_batch_size"]),
        )
        self._predictor.sealed.verify_all()
        if self._predictor.sealed.manifest.sha256 != parameters["manifest_sha256"]:
            raise IntegrityError(
                f"{self.folder / 'engine'}: is another engine directory than config.pbtxt was written for; export again"
            )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response a request: the outputs that it asks for, or an error of one sentence."""
        import triton_python_backend_utils as server

        responses = []
        for request in requests:
            try:
                wanted = request.requested_output_names()
                image, labels = (server.get_input_tensor_by_name(request, name) for name in ("image", "labels"))
                found = self._outputs(wanted, image.as_numpy(), None if labels is None else labels.as_numpy())
                outputs = [server.Tensor(name, np.ascontiguousarray(found[name])) for name in wanted]
                responses.append(server.InferenceResponse(output_tensors=outputs))
            except CLDFError as error:
                code = server.TritonError.INVALID_ARG if isinstance(error, DataError) else server.TritonError.INTERNAL
                responses.append(server.InferenceResponse(error=server.TritonError(str(error), code)))
        return responses

    def _outputs(self, wanted: Collection[str], images: Array, labels: Array | None) -> dict[str, Array]:
        found = self._predictor.segment(images, labels, everywhere="probability" in wanted)
        outputs: dict[str, Array] = dict(vars(found))
        if found.label_probability is None and "label_probability" in wanted:
            outputs["label_probability"] = self._predictor.label_probability(images)
        return outputs

    def finalize(self) -> None:
        """Nothing is held that the server does not free."""


class _ServedPredictor(Predictor):
    """A predictor whose graphs are models of the server beside it."""

    def _sessions(
        self, sealed: SealedDirectory, files: Mapping[str, str], backend: str, *, rebuild: bool = False
    ) -> dict[str, Session]:
        """Of the graphs that `segment` calls."""
        return {name: self._served(sealed, name, files[name]) for name in GRAPHS}

    def _served(self, sealed: SealedDirectory, graph: str, onnx: str) -> Session:
        folder = self.folder.parents[2] / f"{FRONT}_{graph}" / "1"
        listed = {Path(name).name: entry for name, entry in sealed.manifest.files.items()}
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        if not files:
            raise IntegrityError(f"{folder}: expected the files of a graph, got none; export again")
        for file in files:
            entry = listed.get(file.name) if file.name.startswith(onnx.removesuffix("onnx")) else None
            if entry is None or hashlib.sha256(file.read_bytes()).hexdigest() != entry.sha256:
                raise IntegrityError(f"{file}: is not the file of that name that was sealed; export again")
        return _ServedGraph(graph, self.max_batch)


class _ServedGraph:
    """A graph as a `deploy.runtime.Session`, executed by the server in the midst of a request."""

    backend = "triton-server"

    def __init__(self, graph: str, max_batch: int) -> None:
        self.max_batch = max_batch
        self._model, self._outputs = f"{FRONT}_{graph}", _OUTPUTS[graph]

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `deploy.runtime.Session`."""
        import triton_python_backend_utils as server

        response = server.InferenceRequest(
            model_name=self._model,
            requested_output_names=list(self._outputs),
            inputs=[server.Tensor(name, np.ascontiguousarray(values)) for name, values in inputs.items()],
            preferred_memory=server.PreferredMemory(server.TRITONSERVER_MEMORY_CPU, 0),
        ).exec()
        if response.has_error():
            raise BackendError(f"{self._model}: {response.error().message()}")
        return {name: server.get_output_tensor_by_name(response, name).as_numpy() for name in self._outputs}

    def close(self) -> None:
        """The server unloads it."""
