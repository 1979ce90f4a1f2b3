"""What `cldf-fast predict` does: many studies through a predictor, read, segmented and written side by side. No torch.

OUT/<masks>            in each study's own format and geometry
OUT/summary.json       a record a study, earlier calls' included; of several parts, summary-<part>.json each
OUT/audit.jsonl        one entry a study: see `deploy.audit`
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cldf_fast import __version__
from cldf_fast.cases import OutputFolder, check_apart, input_paths, parse_labels
from cldf_fast.data.intensity import checked_window
from cldf_fast.data.stacks import Stack
from cldf_fast.deploy.audit import AuditLog, pseudonym, pseudonym_key
from cldf_fast.deploy.ood import LEVELS
from cldf_fast.deploy.predictor import PredictedCase, Predictor, SegmentedStudy
from cldf_fast.errors import CLDFError, ConfigError, IntegrityError, UnlikeTrainingError
from cldf_fast.files import atomic_write_text

AUDIT_FIELDS = (
    "source", "pixels_sha256", "status", "reason", "code", "warnings", "manifest_sha256", "signed", "backend",
    "precision", "version", "seconds", "outputs_sha256", "foreground_pixels", "ood", "ood_scores", "fallback",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """The part `number` (from 0) of `total`, by which several processes share a list of studies."""

    number: int = 0
    total: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.total:
            raise ConfigError(f"part: expected a number from 0 to {self.total - 1}, got {self.number}")


@dataclass
class Outcome:
    """What became of one study, by this run or an earlier one.

    status: "done" or "refused", and "writing" where a process was stopped while its files were moved. reason: why
    refused, and code: of that (see `errors.REFUSALS`). warnings: "code" (see `errors.WARNINGS`) and "reason" of what is
    doubtful about a study that is done. files: of the study in the folder; where it is refused, an earlier run's. ood:
    how unlike the training images it is, as `deploy.ood.Judgement.to_json` gives it, or "not available" where the
    directory has no such score; None where the study was refused before that. request: what was asked for: absolute
    paths, the engine directory, its precision and all options. left_out: an earlier run had done it; not in the
    summary.
    """

    source: str
    status: str
    reason: str = ""
    code: str = ""
    warnings: list[dict[str, str]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    slices: int = 0
    slices_labelled: int = 0
    foreground_pixels: int = 0
    seconds: float = 0.0
    ood: dict[str, Any] | str | None = None
    request: dict[str, Any] = field(default_factory=dict)
    left_out: bool = False

    def to_json(self) -> dict[str, Any]:
        """As the summary holds it."""
        content = asdict(self)
        del content["left_out"]
        return content


def predict(
    predictor: Predictor,
    sources: Sequence[str],
    out: Path,
    *,
    part: Part | None = None,
    go_on: bool = False,
    labels: str | None = None,
    window: tuple[float, float] | None = None,
    probability: bool = False,
    replicate: bool = False,
    ood: str = "warn",
) -> Iterator[Outcome]:
    """Segment studies and write their masks to the folder `out`; yields what became of each, in order.

    While one study is segmented the next is read and the one before is written: three are in memory, never more. A
    study that can't be used is refused, and nothing of it is written; so is one whose mask would take the place of
    another's, whichever run or part wrote that. go_on: leave out what a summary in `out` lists as done with the same
    engine directory and options, and whose files are there. Other arguments as in `Predictor.predict`.
    Raises IntegrityError, BackendError, EngineMismatchError, DataError or ConfigError, before any study, where the
    predictor or an argument can't be used; IntegrityError also where a graph does not give what the directory says.
    """
    if ood not in LEVELS:
        raise ConfigError(f"ood: expected one of {', '.join(LEVELS)}, got {ood!r}")
    part = part or Part()
    settings = predictor.load()
    if labels is not None:
        parse_labels(labels, settings.class_names)
    if window is not None:
        checked_window(window)
    predictor.sealed.check_outside(out)
    mine = list(sources)[part.number :: part.total]
    for source in mine:
        check_apart(source, out)
    request = {
        "manifest_sha256": predictor.sealed.manifest.sha256,
        "precision": predictor.precision or settings.precisions[0],
        "labels": labels,
        "window": None if window is None else list(window),
        "probability": probability,
        "replicate": replicate,
        "ood": ood,
    }
    out.mkdir(parents=True, exist_ok=True)
    ledger = _Ledger(predictor, out, part, request, go_on=go_on)

    def read(source: str) -> _Found:
        try:
            if done := ledger.done(source):
                return done
            return predictor.read(source, replicate=replicate)
        except CLDFError as error:
            return error

    def segmented(found: _Found) -> _Found:
        if not isinstance(found, Stack):
            return found
        try:
            return predictor.segment_study(found, labels=labels, window=window, probability=probability, ood=ood)
        except IntegrityError:
            raise  # The directory is to blame, not the study.
        except CLDFError as error:
            return _Refused(found, error)

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        following = reader.submit(read, mine[0]) if mine else None
        before: Future[Outcome] | None = None
        for number, source in enumerate(mine):
            assert following is not None
            started = time.perf_counter()
            found = following.result()
            following = reader.submit(read, mine[number + 1]) if number + 1 < len(mine) else None
            found = segmented(found)
            if before is not None:
                yield before.result()
            before = writer.submit(ledger.enter, source, found, started)
        if before is not None:
            yield before.result()


@dataclass(frozen=True)
class _Refused:
    """A study that was read, and why it goes no further."""

    stack: Stack
    error: CLDFError


_Found = Outcome | Stack | SegmentedStudy | _Refused | CLDFError
"""How far a study has come: done by an earlier run, read, segmented, or refused, after or before it was read."""


class _Ledger:
    """What becomes of each study, entered in order: files, audit.jsonl, summary.json."""

    def __init__(self, predictor: Predictor, out: Path, part: Part, request: dict[str, Any], *, go_on: bool) -> None:
        self.predictor, self.out, self.request = predictor, out, request
        self.summary = out / ("summary.json" if part.total == 1 else f"summary-{part.number}.json")
        self.audit = AuditLog(out / "audit.jsonl", fields=AUDIT_FIELDS)
        self.key = pseudonym_key(out / "audit.jsonl")
        # In the folder's other summaries too: of other parts, and of runs that were shared otherwise.
        recorded = {path: _recorded(path, out) for path in sorted({*out.glob("summary*.json"), self.summary})}
        everything = [each for records in recorded.values() for each in records]
        self.earlier = {_key(each.request): each for each in everything if each.status == "done"} if go_on else {}
        everything.sort(key=lambda each: each.status == "done")  # whose files are surely its own
        self.masks = OutputFolder(out, {name: _study(each.request) for each in everything for name in each.files})
        self.records = {_study(each.request): each for each in recorded[self.summary]}
        self._write_summary()

    def requested(self, source: str) -> dict[str, Any]:
        """What is asked for: this study, in this way."""
        return {"paths": [os.path.abspath(path) for path in input_paths(source)], **self.request}

    def done(self, source: str) -> Outcome | None:
        """What an earlier run made of the study, if it was to be the same."""
        found = self.earlier.get(_key(self.requested(source)))
        return None if found is None else replace(found, source=source, left_out=True)

    def enter(self, source: str, found: _Found, started: float) -> Outcome:
        """Write a study's files, or why there are none; only then does the summary list it as done."""
        outcome = found if isinstance(found, Outcome) else self._new(source, found, started)
        self._record(outcome)
        return outcome

    def _record(self, outcome: Outcome) -> None:
        self.records[_study(outcome.request)] = outcome
        self._write_summary()

    def _write_summary(self) -> None:
        content = {
            "version": __version__,
            **asdict(self.predictor.execution),
            "cases": [each.to_json() for each in self.records.values()],
        }
        atomic_write_text(self.summary, json.dumps(content, indent=2) + "\n")

    def _new(self, source: str, found: _Found, started: float) -> Outcome:
        request = self.requested(source)
        study, outcome = _study(request), Outcome(source, "refused", request=request)
        entry: dict[str, Any] = {"source": pseudonym(source, self.key)}
        if isinstance(found, SegmentedStudy | _Refused):
            entry["pixels_sha256"] = hashlib.sha256(found.stack.image.tobytes()).hexdigest()
        try:
            if isinstance(found, _Refused):
                raise found.error
            if isinstance(found, CLDFError):
                raise found
            assert isinstance(found, SegmentedStudy)
            with TemporaryDirectory(prefix=".partial-", dir=self.out) as beside:
                case = self.predictor.write(found, beside, probability=self.request["probability"])
                hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in case.files]
                names = [file.name for file in case.files]
                self.masks.check(study, names)
                # A process that is stopped between here and the end leaves word of whose the files are.
                self._record(Outcome(source, "writing", files=names, request=request))
                self.masks.take(study, case.files)
                outcome, entry["outputs_sha256"] = _outcome(source, case, names, request), hashes
        except CLDFError as error:
            # The sentence names files, and so perhaps the patient: it stays out of the log.
            outcome.reason, entry["reason"] = str(error), type(error).__name__
            outcome.code = entry["code"] = error.code
            outcome.ood = error.scores if isinstance(error, UnlikeTrainingError) else None
            outcome.files = self.masks.names_of(study)
        outcome.seconds = round(time.perf_counter() - started, 3)
        self.audit.append(**entry, **_provenance(self.predictor, outcome))
        return outcome


def _outcome(source: str, case: PredictedCase, files: list[str], request: dict[str, Any]) -> Outcome:
    return Outcome(
        source,
        "done",
        files=files,
        warnings=[{"code": warning.code, "reason": str(warning)} for warning in case.warnings],
        slices=len(case.present),
        slices_labelled=int(case.present.any(axis=1).sum()),
        foreground_pixels=case.foreground_pixels,
        ood="not available" if case.ood is None else case.ood.to_json(),
        request=request,
    )


def _provenance(predictor: Predictor, outcome: Outcome) -> dict[str, Any]:
    settings = predictor.load()
    return {
        "status": outcome.status,
        "warnings": [warning["code"] for warning in outcome.warnings],
        "manifest_sha256": predictor.sealed.manifest.sha256,
        "signed": predictor.sealed.verified,
        "backend": predictor.execution.backend,
        "fallback": predictor.execution.fallback,
        "precision": predictor.precision or settings.precisions[0],
        "version": __version__,
        "seconds": outcome.seconds,
        "foreground_pixels": outcome.foreground_pixels,
        "ood": outcome.ood["status"] if isinstance(outcome.ood, dict) else outcome.ood,
        "ood_scores": [*outcome.ood["scores"].values()] if isinstance(outcome.ood, dict) else None,
    }


def _study(request: dict[str, Any]) -> str:
    """Which study a request is of."""
    return ",".join(request["paths"])


def _key(request: dict[str, Any]) -> str:
    return json.dumps(request, sort_keys=True)


def _recorded(summary: Path, out: Path) -> list[Outcome]:
    """What a summary lists and, where it lists files, is still there. One that can't be read lists nothing."""
    known = {each.name for each in fields(Outcome)}
    try:
        cases = json.loads(summary.read_text(encoding="utf-8"))["cases"]
        recorded = [Outcome(**{name: value for name, value in case.items() if name in known}) for case in cases]
        return [each for each in recorded if _study(each.request) and (each.status != "done" or _has_all(each, out))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _has_all(outcome: Outcome, out: Path) -> bool:
    return all((out / file).is_file() for file in outcome.files)
