"""Damaged inputs and graphs: named errors or results, never another exception, a crash or half an output.

CLDF_FAST_FUZZ=10000 for so many mutations in all, CLDF_FAST_FUZZ_SEED=7 for others than those without: they differ with
both numbers, and repeat.
"""

from __future__ import annotations

import gzip
import json
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import onnxruntime
import pytest
from PIL import Image

from cldf_fast.deploy.manifest import open_sealed, seal
from cldf_fast.deploy.prediction import predict
from cldf_fast.deploy.predictor import Predictor
from cldf_fast.deploy.runtime import OnnxSession
from cldf_fast.errors import REFUSALS, BackendError, DataError, IntegrityError
from tests.data.test_volumes import save_series
from tests.deploy.bright import bright_models, write_bright_engine

TOTAL = int(os.environ.get("CLDF_FAST_FUZZ") or 240)
SEED = os.environ.get("CLDF_FAST_FUZZ_SEED") or None
# Kinds of files below, and two of graphs.
EACH = TOTAL // 8
SIZE = 16


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    # pytest shows it with a failure only.
    print(f"CLDF_FAST_FUZZ={TOTAL} CLDF_FAST_FUZZ_SEED={SEED or ''}")
    return generator(seed, TOTAL, SEED)


def generator(test: int, total: int, chosen: str | None) -> np.random.Generator:
    """Of one test's mutations. chosen: CLDF_FAST_FUZZ_SEED."""
    # A trailing 0 would be as good as none.
    return np.random.default_rng([test, total] if chosen is None else [test, total, int(chosen) + 1])


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return write_bright_engine(tmp_path / "engine", size=SIZE)


def mutated(data: bytes, rng: np.random.Generator, head: int | None = None) -> bytes:
    """The bytes with some of the first `head` set, changed by one bit, repeated, removed or inserted, or cut off."""
    changed = bytearray(data)
    head = min(head or len(data), len(data))
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        start = int(rng.integers(head))
        stop = start + int(rng.choice([1, 1, 2, 4, 8, 40]))
        kind = rng.integers(10)
        if kind < 3:
            changed[start:stop] = rng.bytes(stop - start)
        elif kind < 6:
            extreme = [b"\x00", b"\xff", b"\x7f", b"\x80", b"\x01"]
            changed[start:stop] = extreme[rng.integers(len(extreme))] * (stop - start)
        elif kind < 8 and start < len(changed):
            changed[start] ^= 1 << int(rng.integers(8))
        elif kind == 8:
            changed[start:stop] = [b"", changed[start:stop] * 2, rng.bytes(3)][rng.integers(3)]
        elif rng.random() < 0.2:
            del changed[int(rng.integers(len(changed) + 1)) :]
    return bytes(changed)


def test_a_chosen_seed_gives_other_mutations_that_repeat(seed: int) -> None:
    def mutations(total: int, chosen: str | None) -> tuple[bytes, ...]:
        rng = generator(seed, total, chosen)
        return tuple(mutated(bytes(100), rng) for _ in range(9))

    keys = [(240, None), (240, "0"), (240, "1"), (241, "1"), (241, None)]
    assert len({mutations(*key) for key in keys}) == len(keys)
    for key in keys:
        assert mutations(*key) == mutations(*key)


# Inputs: each writes one into a new folder, from fresh pixels, and named as the folder is


def nifti(folder: Path, rng: np.random.Generator) -> Path:
    path = folder / f"{folder.name}.nii"
    save_nifti(path, rng)
    damage(path, rng, head=360)
    return path


def packed_nifti(folder: Path, rng: np.random.Generator) -> Path:
    """Mutated within, or the compressed bytes themselves."""
    path = folder / f"{folder.name}.nii.gz"
    save_nifti(path, rng)
    if rng.random() < 0.5:
        path.write_bytes(gzip.compress(mutated(gzip.decompress(path.read_bytes()), rng, head=540), compresslevel=1))
    else:
        damage(path, rng)
    return path


def save_nifti(path: Path, rng: np.random.Generator) -> None:
    kind = nibabel.Nifti1Image if rng.random() < 0.7 else nibabel.Nifti2Image
    dtype = rng.choice(["<i2", ">i2", "<f4", "<f8", "<u1"])
    image = kind(rng.integers(0, 100, (5, 4, 2)).astype(dtype), np.diag([-1.0, -1, 2, 1]))
    image.set_qform(np.diag([-1.0, -1, 2, 1]), int(rng.integers(3)))
    nibabel.save(image, path)


def dicom(folder: Path, rng: np.random.Generator) -> Path:
    """One file of a series, sometimes its only one."""
    pixels = rng.integers(0, 4000, (int(rng.integers(1, 4)), 5, 4), dtype=np.uint16)
    save_series(folder, pixels)
    path = folder / f"im_{rng.integers(len(pixels))}.dcm"
    # Not only in the first part: the offsets and sizes of the pixels come last.
    damage(path, rng, head=path.stat().st_size - 30)
    return folder


def png(folder: Path, rng: np.random.Generator) -> Path:
    """With the header's checksum put right again, without which nothing behind it is met."""
    path = folder / f"{folder.name}.png"
    grey = rng.integers(0, 60000, (5, 4)).astype(np.uint16 if rng.random() < 0.5 else np.uint8)
    Image.fromarray(grey).save(path)
    data = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        for place in rng.integers(16, 29, int(rng.integers(1, 4))):
            data[place] = rng.choice([0, 1, 2, 3, 4, 6, 8, 16, 255])
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
        path.write_bytes(bytes(data))
    else:
        damage(path, rng)
    return path


def tiff(folder: Path, rng: np.random.Generator) -> Path:
    path = folder / f"{folder.name}.tif"
    kind = rng.integers(4)
    pixels = rng.integers(0, 250, (5, 4)).astype(np.float32 if kind == 0 else np.uint16 if kind == 1 else np.uint8)
    Image.fromarray(pixels).save(path, compression="tiff_lzw" if kind == 2 else None)
    damage(path, rng)
    return path


def several(folder: Path, rng: np.random.Generator) -> Path:
    """Slices of which one is damaged."""
    for number in range(3):
        Image.fromarray(rng.integers(0, 250, (5, 4), dtype=np.uint8)).save(folder / f"{folder.name}_{number}.png")
    damage(folder / f"{folder.name}_1.png", rng, head=40)
    return folder


def damage(path: Path, rng: np.random.Generator, head: int | None = None) -> None:
    path.write_bytes(mutated(path.read_bytes(), rng, head))


@pytest.mark.parametrize("write", [nifti, packed_nifti, dicom, png, tiff, several])
def test_damaged_inputs_are_refused_by_code_or_segmented(
    engine: Path, tmp_path: Path, rng: np.random.Generator, write: Callable[[Path, np.random.Generator], Path]
) -> None:
    if write is dicom:
        pytest.importorskip("highdicom")
    codes: Counter[str] = Counter()
    predictor = Predictor(engine, threads=1)
    for batch in batches(EACH):
        sources = []
        for number in batch:
            folder = tmp_path / f"case_{number}"
            folder.mkdir()
            sources.append(str(write(folder, rng)))
        out = tmp_path / f"out_{batch[0]}"
        with warnings.catch_warnings():
            # Of decoders; what we are in doubt of is in the summary.
            warnings.simplefilter("ignore")
            outcomes = list(predict(predictor, sources, out, labels="all"))
        for source, outcome in zip(sources, outcomes, strict=True):
            assert outcome.source == source
            if outcome.status == "refused":
                assert outcome.code in REFUSALS, outcome.reason
                assert outcome.reason.isprintable()
                assert not outcome.files
            codes[outcome.code] += 1
        files = [file for outcome in outcomes for file in outcome.files]
        assert {file.name for file in out.iterdir()} == {*files, "summary.json", "audit.jsonl", "audit.key"}
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        assert [case["code"] for case in summary["cases"]] == [outcome.code for outcome in outcomes]
    print(dict(codes))
    assert len(codes) > 1


def batches(count: int) -> Iterator[range]:
    """Of 50: the summary is written anew for every study."""
    for first in range(0, count, 50):
        yield range(first, min(count, first + 50))


# Graphs


def test_changed_graphs_are_stopped_before_the_runtime(
    engine: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("the runtime was reached"))
    for _ in range(EACH):
        path = engine / f"{rng.choice(['segmentation', 'labels'])}.float32.onnx"
        original = path.read_bytes()
        damage(path, rng)
        if path.read_bytes() == original:
            continue
        with pytest.raises(IntegrityError, match=path.name):
            open_sealed(engine).read(path.name)
        with pytest.raises(IntegrityError, match=path.name):
            Predictor(engine).load()
        path.write_bytes(original)


def test_changed_graphs_that_are_sealed_anew_give_results_or_our_errors(engine: Path, rng: np.random.Generator) -> None:
    images = rng.random((2, 1, SIZE, SIZE), dtype=np.float32)
    expected = Predictor(engine, threads=1).segment(images)
    outcomes: Counter[str] = Counter()
    models = bright_models(SIZE)
    for _ in range(EACH):
        name = str(rng.choice(list(models)))
        data = mutated(models[name], rng)
        path = engine / f"{name}.float32.onnx"
        path.write_bytes(data)
        (engine / "MANIFEST.json").unlink()
        seal(engine, engines={})
        try:
            found = Predictor(engine, threads=1).segment(images)
        except (BackendError, DataError, IntegrityError) as error:
            outcomes[error.code] += 1
        else:
            outcomes["result"] += 1
            assert found.probability.shape == expected.probability.shape
            assert found.mask.dtype == np.uint8
        path.write_bytes(models[name])
    print(dict(outcomes))
    assert outcomes["backend"] > EACH // 4


def test_bytes_that_are_no_graph_give_our_error(rng: np.random.Generator) -> None:
    for data in (b"", rng.bytes(200), gzip.compress(bright_models(SIZE)["labels"])):
        with pytest.raises(BackendError, match="can't load the model"):
            OnnxSession(data)
