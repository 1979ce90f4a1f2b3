"""Segmentation from an engine directory: what `cldf-fast predict` does, in process. No torch.

    with Predictor("engine") as predictor:
        result = predictor.segment(images)          # arrays at the working size
        case = predictor.predict("scan.nii.gz", "masks")

A predictor can be pickled before it is loaded, so that Ray, Dask or a pool of processes can send it to workers.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cldf_fast import cases
from cldf_fast.data.acquisition import Acquisition
from cldf_fast.data.grid import Floats, Mask
from cldf_fast.data.intensity import check_pixels, checked_window
from cldf_fast.data.stacks import Stack
from cldf_fast.deploy import ood as unlike
from cldf_fast.deploy.manifest import SealedDirectory, open_sealed
from cldf_fast.deploy.noise import pixel_seed, standard_normal
from cldf_fast.deploy.runtime import Array, OnnxSession, Session
from cldf_fast.errors import (
    BackendError,
    ConfigError,
    DataError,
    EngineMismatchError,
    InputWarning,
    IntegrityError,
    ParityError,
    UnlikeTrainingError,
)

GRAPHS = ("segmentation", "labels")
BOTTLENECK = "bottleneck"
"""A third graph, of directories that have a score of how unlike the training images a study is."""
ON_ENGINE_ERROR = ("fail", "rebuild", "onnx")
# More only wait for each other: with hundreds ONNX Runtime comes to a standstill.
_THREADS_PER_CORE = 4
RESEARCH_USE = "Research use only; not to be used for diagnostic purposes."


@dataclass(frozen=True)
class Settings:
    """What an engine directory's JSON files say.

    size: working size S. views, levels: of the noise that each graph wants, by name. mirror: whether the second view is
    mirrored. window: of the intensities that it was trained on, or none. precisions: of the graphs that are there.
    detector: of studies unlike the training images; None where the export had none at hand. acquisition: of the
    training images, as far as it is known.
    """

    size: int
    class_names: tuple[str, ...]
    channel_names: tuple[str, ...]
    label_threshold: tuple[float, ...]
    window: tuple[float, float] | None
    mirror: bool
    views: dict[str, int]
    levels: dict[str, int]
    precisions: tuple[str, ...]
    detector: unlike.Detector | None = None
    acquisition: Acquisition = field(default_factory=Acquisition)

    @property
    def graphs(self) -> tuple[str, ...]:
        """Names of the graphs."""
        return tuple(self.views)

    @classmethod
    def of(cls, sealed: SealedDirectory) -> Settings:
        """Raises IntegrityError where a file lacks what `deploy.export` writes."""
        config, preprocessing, labels = (
            sealed.read_json(f"{name}.json") for name in ("config", "preprocessing", "labels")
        )
        try:
            window = preprocessing["window"]
            graphs = GRAPHS if config["ood"] is None else (*GRAPHS, BOTTLENECK)
            return cls(
                size=int(preprocessing["size"]),
                class_names=tuple(labels["class_names"]),
                channel_names=tuple(preprocessing["channel_names"]),
                label_threshold=tuple(map(float, labels["label_threshold"])),
                window=None if window is None else (float(window[0]), float(window[1])),
                mirror=bool(config["mirror"]),
                views={name: int(config["graphs"][name]["views"]) for name in graphs},
                levels={name: int(config["graphs"][name]["levels"]) for name in graphs},
                precisions=tuple(config["precisions"]),
                detector=None if config["ood"] is None else unlike.Detector.of(sealed),
                acquisition=Acquisition.from_json(preprocessing.get("acquisition")),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise IntegrityError(
                f"{sealed.folder}: config.json, preprocessing.json and labels.json are not what `cldf-fast export` "
                f"writes ({type(error).__name__}: {error}); export again"
            ) from error


@dataclass(frozen=True)
class Result:
    """Of N images at the working size. probability: float32 [N, K + 1, S, S], background first, summing to 1, before
    absent classes are ruled out. mask: uint8 [N, S, S]. present: bool [N, K]. label_probability: float32 [N, K], the
    exported classifier's; None where labels were given, since it wasn't run then."""

    probability: Floats
    mask: Mask
    present: cases.Labels
    label_probability: Floats | None


@dataclass(frozen=True)
class SegmentedStudy:
    """One study before it is written. doubts, ood: as `warnings` and `ood` of `PredictedCase`."""

    stack: Stack
    result: Result
    doubts: tuple[InputWarning, ...]
    ood: unlike.Judgement | None

    @property
    def unlike_training(self) -> bool:
        """Whether it is warned of, by its score or by its modality."""
        warned = self.ood is not None and self.ood.status == "warn"
        return warned or any(doubt.code == "other_modality" for doubt in self.doubts)


@dataclass(frozen=True)
class PredictedCase:
    """What was written for one input. present, label_probability: as in `Result`, for its slices. warnings: what is
    doubtful about the input. ood: how unlike the training images it is, under the policy; None where the directory has
    no such score.
    """

    source: Path
    files: list[Path]
    present: cases.Labels
    label_probability: Floats | None
    foreground_pixels: int
    warnings: tuple[InputWarning, ...]
    ood: unlike.Judgement | None


@dataclass(frozen=True)
class Execution:
    """What runs the graphs. backend: its name; fallback: in a sentence, why not as asked; empty where it is."""

    backend: str
    fallback: str = ""


class Predictor:
    """An engine directory, loaded at first use.

    folder: an engine directory. precision: of the graphs, by default the directory's first. backend: "onnx" (ONNX
    Runtime on the CPU), "tensorrt" or "tensorrt_rtx". public_key: of whom it has to be signed by. threads: of ONNX
    Runtime, 0 for as many as there are cores. max_batch: images in one call of it, which bounds memory; on two cores
    one image at a time is as fast as many. on_engine_error: where no engine of the directory can be loaded here,
    "fail", "rebuild" one for this GPU from the ONNX files, in memory alone and used if it passes parity, or take
    "onnx"; with either a warning is issued, and `execution` says what runs and why. A file that is not as sealed always
    fails.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        precision: str | None = None,
        backend: str = "onnx",
        public_key: Path | None = None,
        threads: int = 0,
        max_batch: int = 4,
        on_engine_error: str = "fail",
    ) -> None:
        if on_engine_error not in ON_ENGINE_ERROR:
            raise ConfigError(f"on_engine_error: expected one of {', '.join(ON_ENGINE_ERROR)}, got {on_engine_error!r}")
        if backend not in ("onnx", "tensorrt", "tensorrt_rtx"):
            raise ConfigError(f"backend: expected onnx, tensorrt or tensorrt_rtx, got {backend!r}")
        most = _THREADS_PER_CORE * (os.cpu_count() or 1)
        if not isinstance(threads, int) or not 0 <= threads <= most:
            raise ConfigError(f"threads: expected an integer from 0 (all cores) to {most}, got {threads!r}")
        if not isinstance(max_batch, int) or max_batch < 1:
            raise ConfigError(f"max_batch: expected an integer, 1 or more, got {max_batch!r}")
        self.folder = Path(folder)
        self.precision = precision
        self.backend = backend
        self.public_key = public_key
        self.threads = threads
        self.max_batch = max_batch
        self.on_engine_error = on_engine_error
        self._loaded: tuple[SealedDirectory, Settings, dict[str, Session]] | None = None
        self._execution = Execution(backend)

    def __enter__(self) -> Predictor:
        self.load()
        return self

    def __exit__(self, *_: object) -> None:
        if self._loaded is not None:
            _close(self._loaded[2])
        self._loaded = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaded": None, "_execution": Execution(self.backend)}

    def load(self) -> Settings:
        """Check the directory and load its graphs; does nothing the second time.

        Raises IntegrityError for a directory that is not as its manifest says, EngineMismatchError for an engine of
        another GPU, system or TensorRT, BackendError where the runtime is absent, ParityError for an engine that was
        built again and does not agree with PyTorch.
        """
        return self._load()[1]

    @property
    def sealed(self) -> SealedDirectory:
        """The directory, checked."""
        return self._load()[0]

    @property
    def execution(self) -> Execution:
        """What runs the graphs, which are loaded."""
        self._load()
        return self._execution

    def _load(self) -> tuple[SealedDirectory, Settings, dict[str, Session]]:
        if self._loaded is None:
            sealed = open_sealed(self.folder, public_key=self.public_key)
            settings = Settings.of(sealed)
            precision = self.precision or settings.precisions[0]
            if precision not in settings.precisions:
                raise ConfigError(
                    f"precision: expected one of {', '.join(settings.precisions)}, which {self.folder} holds, "
                    f"got {precision!r}"
                )
            files = {name: f"{name}.{precision}.onnx" for name in settings.graphs}
            try:
                self._loaded = sealed, settings, self._sessions(sealed, files, self.backend)
                self._execution = Execution(self.backend)
            except (BackendError, EngineMismatchError) as error:
                if self.backend == "onnx" or self.on_engine_error == "fail":
                    raise
                self._fall_back(sealed, settings, files, str(error))
        assert self._loaded is not None
        return self._loaded

    def _fall_back(self, sealed: SealedDirectory, settings: Settings, files: dict[str, str], reason: str) -> None:
        if self.on_engine_error == "onnx":
            why = f"ONNX Runtime on the CPU in place of {self.backend}, because: {reason}"
            self._execution = Execution("onnx", why)
            self._loaded = sealed, settings, self._sessions(sealed, files, "onnx")
        else:
            self._execution = Execution(self.backend, f"engines were built again for this GPU, because: {reason}")
            self._loaded = sealed, settings, self._sessions(sealed, files, self.backend, rebuild=True)
            self._check_parity(sealed)
        warnings.warn(self._execution.fallback, RuntimeWarning, stacklevel=2)

    def _check_parity(self, sealed: SealedDirectory) -> None:
        from cldf_fast.deploy import parity

        try:
            failures = parity.measure(self, parity.golden_cases(sealed)).failures
            if failures:
                raise ParityError(
                    f"{self.backend}: the engine built for this GPU differs from PyTorch ({'; '.join(failures)}); use "
                    f"--backend onnx"
                )
        except BaseException:
            self.__exit__()
            raise

    def _sessions(
        self, sealed: SealedDirectory, files: Mapping[str, str], backend: str, *, rebuild: bool = False
    ) -> dict[str, Session]:
        """A session of each ONNX file, or none at all."""
        if backend == "onnx":
            # All of them are checked before one reaches the runtime.
            models = {name: sealed.read(file) for name, file in files.items()}
            return {
                name: OnnxSession(model, threads=self.threads, max_batch=self.max_batch)
                for name, model in models.items()
            }
        from cldf_fast.deploy.tensorrt import TensorRTSession

        load = TensorRTSession.rebuilt if rebuild else TensorRTSession.of
        sessions: dict[str, Session] = {}
        try:
            for name, file in files.items():
                sessions[name] = load(sealed, file, flavour=backend)
        except BaseException:
            _close(sessions)
            raise
        return sessions

    def segment(self, images: Floats, labels: cases.Labels | None = None, *, everywhere: bool = True) -> Result:
        """Segment images float32 [N, C, S, S] in [-1, 1] at the working size.

        labels: bool [N, K], given image-level labels; None: the exported classifier's. everywhere: False leaves images
        that show no class to be all background, which their masks are anyway. An image's result depends neither on the
        batch nor on the order.
        Raises DataError for another shape or dtype, and, naming the first image, where pixels are not in [-1, 1] or a
        result is not finite.
        """
        settings = self.load()
        shape = self._check_images(images)
        classes = len(settings.class_names)
        if labels is not None and (
            not isinstance(labels, np.ndarray) or labels.dtype != np.bool_ or labels.shape != (len(images), classes)
        ):
            raise DataError(f"labels: expected bool {[len(images), classes]}, got {_described(labels)}")
        label_probability = None
        if labels is None:
            label_probability = self.label_probability(images)
            labels = label_probability >= np.array(settings.label_threshold, np.float32)
        present = labels
        rows = np.flatnonzero(present.any(axis=1) | everywhere)
        probability = np.zeros((len(images), classes + 1, *shape[1:]), dtype=np.float32)
        probability[:, 0] = 1
        mask = np.zeros((len(images), *shape[1:]), dtype=np.uint8)
        if len(rows):
            found = self._run("segmentation", images[rows], present=present[rows].astype(np.float32))
            probability[rows] = self._output(found, "probability", np.float32, probability.shape[1:])
            mask[rows] = self._output(found, "mask", np.integer, mask.shape[1:])
        _check_finite("probabilities", probability)
        return Result(probability, mask, present, label_probability)

    def label_probability(self, images: Floats) -> Floats:
        """The exported classifier's probabilities float32 [N, K] of images as `segment` takes them.

        Raises DataError as `segment` does.
        """
        self._check_images(images)
        shape = (len(self.load().class_names),)
        probability: Floats = self._output(self._run("labels", images), "label_probability", np.float32, shape)
        _check_finite("label probabilities", probability)
        return probability

    def _output(self, found: dict[str, Any], name: str, dtype: type, shape: tuple[int, ...]) -> Any:
        """An output [N, *shape] of a graph; IntegrityError where it is not what the directory's settings call for."""
        values = found.get(name)
        if values is None or not np.issubdtype(values.dtype, dtype) or values.shape[1:] != shape:
            raise IntegrityError(
                f"{self.folder}: expected {name} as {dtype.__name__} {['N', *shape]} from a graph, got "
                f"{'none' if values is None else _described(values)}; export again"
            )
        return values

    def bottleneck(self, images: Floats) -> Floats:
        """The CDM's deepest feature float32 [N, F], averaged over pixels, of images as `segment` takes them.

        Raises DataError as `segment` does, ConfigError where the directory has no such graph.
        """
        if BOTTLENECK not in self._load()[2]:
            raise ConfigError(f"{self.folder}: has no graph {BOTTLENECK}; export with the data set at hand (--data)")
        self._check_images(images)
        found = self._run(BOTTLENECK, images)[BOTTLENECK]
        _check_finite("bottleneck features", found)
        return found

    def judge(self, images: Floats) -> unlike.Judgement | None:
        """How unlike the training images one study is, whose slices are images as `segment` takes them.

        None where the directory has no such score.
        """
        detector = self.load().detector
        if detector is None:
            return None
        self._check_images(images)
        chosen = images[unlike.spread(len(images))]
        return detector.judge({"intensity": unlike.intensity_features(chosen), BOTTLENECK: self.bottleneck(chosen)})

    def _check_images(self, images: Floats) -> tuple[int, int, int]:
        settings = self.load()
        shape = (len(settings.channel_names), settings.size, settings.size)
        if (
            not isinstance(images, np.ndarray)
            or images.dtype != np.float32
            or images.ndim != 4
            or images.shape[1:] != shape
            or not len(images)
        ):
            raise DataError(f"images: expected float32 [N, {', '.join(map(str, shape))}], got {_described(images)}")
        # NaN reaches no threshold: the mask would be empty, as if the image had been found healthy.
        pixels = images.reshape(len(images), -1)
        check_pixels(pixels.min(axis=1), pixels.max(axis=1))
        return shape

    def _run(self, graph: str, images: Floats, **inputs: Array) -> dict[str, Array]:
        """A graph's outputs by name for N images and what else it takes of each of them, in calls of at most its
        session's max_batch; noise, which is many times as large as the images, is drawn for one call at a time."""
        session = self._load()[2][graph]
        parts = []
        for first in range(0, len(images), session.max_batch):
            rows = slice(first, first + session.max_batch)
            more = {name: values[rows] for name, values in inputs.items()}
            parts.append(session({"image": images[rows], "noise": self._noise(graph, images[rows]), **more}))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _noise(self, graph: str, images: Floats) -> Floats:
        """Noise [N, V, T, C, S, S] of a graph, seeded by the pixels of each view."""
        settings = self.load()
        views = [images, second_view(images, mirror=settings.mirror)][: settings.views[graph]]
        levels = settings.levels[graph]
        return np.stack([standard_normal(pixel_seed(view), levels, view.shape[1:]) for view in views], axis=1)

    def read(self, source: cases.Source, *, replicate: bool = False) -> Stack:
        """One input, as `cases.read_case` reads it, with the channels that the networks want."""
        return cases.read_case(source, len(self.load().channel_names), replicate=replicate)

    def predict(
        self,
        source: cases.Source | Stack,
        out: str | Path,
        *,
        labels: Sequence[str] | str | None = None,
        window: tuple[float, float] | None = None,
        probability: bool = False,
        ood: str = "warn",
    ) -> PredictedCase:
        """Segment one study and write its mask to the folder `out`, in the study's own format and geometry.

        A file of the same name gives way; `deploy.prediction.predict` writes no mask over another study's.
        source: a path, one for each channel (see `cases.read_case`), or what `read` returned. labels: names of the
        classes that are present in every slice, "all" or "none"; None: predicted slice by slice. window: (low, high) in
        stored units, in place of the directory's own. probability: also write the class probabilities. ood: "accept",
        "warn" or "refuse", the most that happens to a study that is unlike the training images by its score; a study of
        another modality is refused with "refuse", and warned of without.
        Raises DataError for an input that can't be used, UnlikeTrainingError for one that is refused; nothing is
        written then.
        """
        self.sealed.check_outside(Path(out))
        study = self.segment_study(source, labels=labels, window=window, probability=probability, ood=ood)
        return self.write(study, out, probability=probability)

    def segment_study(
        self,
        source: cases.Source | Stack,
        *,
        labels: Sequence[str] | str | None = None,
        window: tuple[float, float] | None = None,
        probability: bool = False,
        ood: str = "warn",
    ) -> SegmentedStudy:
        """The part of `predict` that runs the graphs; arguments and errors as there."""
        settings = self.load()
        given = None if labels is None else cases.parse_labels(labels, settings.class_names)
        window = settings.window if window is None else checked_window(window)
        stack = source if isinstance(source, Stack) else self.read(source)
        unlike_acquired = tuple(settings.acquisition.doubts(stack, settings.size))
        for doubt in unlike_acquired:
            if doubt.code == "other_modality" and ood == "refuse":
                raise DataError(f"{doubt}, or use --ood warn", code="wrong_modality")
        images = cases.working_images(stack, settings.size, window=window)
        judgement = self.judge(images)
        if judgement is not None:
            judgement = judgement.capped(ood)
            if judgement.status == "refuse":
                raise UnlikeTrainingError(
                    f"{stack.source}: is unlike the images that the networks were trained on ({judgement.sentence()}); "
                    f"check channels, orientation and modality, or use --ood warn",
                    judgement.to_json(),
                )
        present = None if given is None else np.repeat(given[None], len(images), axis=0)
        result = self.segment(images, present, everywhere=probability)
        doubts = (*stack.warnings, *unlike_acquired, *cases.window_doubts(stack, window))
        return SegmentedStudy(stack, result, doubts, judgement)

    def write(self, study: SegmentedStudy, out: str | Path, *, probability: bool = False) -> PredictedCase:
        """The part of `predict` that writes the files; other threads may use the predictor meanwhile."""
        files, foreground = cases.write_case(
            study.stack,
            study.result.probability,
            study.result.present,
            Path(out),
            class_names=self.load().class_names,
            keep_probability=probability,
            unlike_training=study.unlike_training,
        )
        present, label_probability = study.result.present, study.result.label_probability
        return PredictedCase(study.stack.source, files, present, label_probability, foreground, study.doubts, study.ood)


def second_view(images: Floats, *, mirror: bool) -> Floats:
    """`segmentation.second_view` of arrays [..., H, W]."""
    return np.roll(images[..., ::-1] if mirror else images, (1, 1), axis=(-2, -1))


def _close(sessions: dict[str, Session]) -> None:
    for session in sessions.values():
        session.close()


def _check_finite(what: str, values: Floats) -> None:
    finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if not finite.all():
        raise DataError(
            f"images: expected finite {what}, got NaN or infinity for image {int(finite.argmin())}; half precision "
            f"overflows",
            code="non_finite_result",
        )


def _described(values: Any) -> str:
    return f"{values.dtype} {list(values.shape)}" if isinstance(values, np.ndarray) else type(values).__name__
