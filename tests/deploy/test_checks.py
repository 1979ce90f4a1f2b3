"""Each check of an input has a code, which `predict` writes down: every refusal and every warning, by a real file."""

from __future__ import annotations

import ast
import gzip
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from typer.testing import CliRunner

from cldf_fast import cases
from cldf_fast.cli import app
from cldf_fast.data.nifti import NiftiFile
from cldf_fast.data.stacks import read_mask, read_stack
from cldf_fast.deploy.audit import verify_audit
from cldf_fast.deploy.prediction import Outcome, predict
from cldf_fast.deploy.predictor import Predictor
from cldf_fast.errors import REFUSALS, WARNINGS, CLDFError, DataError, InputWarning
from tests.data.test_volumes import (
    SAGITTAL,
    at,
    exif_rotated,
    height,
    patch_header,
    save_image,
    save_nifti,
    save_series,
    sheared,
    singular,
    sixteen_bit_colour,
)
from tests.deploy.bright import write_bright_engine

SOURCES = Path(cases.__file__).parent


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor(write_bright_engine(tmp_path_factory.mktemp("checks") / "engine"), threads=1)


def run(predictor: Predictor, source: Path, out: Path) -> Outcome:
    """The outcome of one study; summary.json and audit.jsonl say the same, and the log has no word more."""
    (outcome,) = predict(predictor, [str(source)], out)
    (case,) = json.loads((out / "summary.json").read_text(encoding="utf-8"))["cases"]
    assert Outcome(**case) == outcome
    assert verify_audit(out / "audit.jsonl").entries == 1
    event = json.loads((out / "audit.jsonl").read_text(encoding="utf-8"))["event"]
    assert event.get("code", "") == outcome.code
    assert event["warnings"] == [warning["code"] for warning in outcome.warnings]
    assert "SECRET" not in json.dumps(event)
    return outcome


def test_codes_and_table_are_the_same() -> None:
    used: dict[str, set[str]] = {"DataError": set(), "InputWarning": set()}
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in used:
                texts = [part for word in node.keywords if word.arg == "code" for part in ast.walk(word.value)]
                used[node.func.id] |= {part.value for part in texts if isinstance(part, ast.Constant)}
    # Those that series have by what they share come from a table, and one is an error of its own.
    others = {"mixed_series", "mixed_frames_of_reference", "mixed_grids", "unlike_training"}
    assert used["DataError"] | others == set(REFUSALS)
    assert used["InputWarning"] == set(WARNINGS)
    assert not set(REFUSALS) & set(WARNINGS)


def test_errors_keep_their_code_between_processes() -> None:
    for error in (DataError("text", code="no_image"), InputWarning("text", code="single_slice"), DataError("text")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.code) == (type(error), "text", error.code)
    codes = [each.code for each in (CLDFError, *CLDFError.__subclasses__()) if each is not DataError]
    assert len(set(codes)) == len(codes)
    assert not set(codes) & {*REFUSALS, *WARNINGS, "data"}


# Refusals: what makes an input of a case's folder, and its path


def nifti(folder: Path, rng: np.random.Generator) -> Path:
    return save_nifti(folder / "a.nii", rng.normal(size=(5, 6, 4)).astype(np.float32), np.diag([-1.0, -1, 1, 1]))


def of_nifti(damage: Callable[[Path], Any]) -> Callable[[Path, np.random.Generator], Path]:
    def make(folder: Path, rng: np.random.Generator) -> Path:
        path = nifti(folder, rng)
        damage(path)
        return path

    return make


def of_series(edit: Callable[[int, Any], None]) -> Callable[[Path, np.random.Generator], Path]:
    def make(folder: Path, rng: np.random.Generator) -> Path:
        return save_series(folder / "s", rng.integers(0, 4000, (5, 6, 7), dtype=np.uint16), edit=edit)

    return make


def of_image(damage: Callable[[Path], Any]) -> Callable[[Path, np.random.Generator], Path]:
    def make(folder: Path, _: np.random.Generator) -> Path:
        damage(folder / "a.png")
        return folder / "a.png"

    return make


def with_value(value: float) -> Callable[[Path], Any]:
    return lambda path: save_nifti(path, np.where(np.arange(60.0).reshape(3, 4, 5) == 7, value, 1.0))


def photograph(folder: Path, _: np.random.Generator) -> Path:
    save_image(folder / "a.jpg", "L")
    return folder / "a.jpg"


def two_formats(folder: Path, _: np.random.Generator) -> Path:
    save_image(folder / "a.png", "L")
    save_image(folder / "b.tif", "L")
    return folder


def white_is_zero(folder: Path, _: np.random.Generator) -> Path:
    """A 16-bit TIFF whose PhotometricInterpretation, a short in little-endian, is changed from 1 to 0."""
    path = folder / "a.tif"
    Image.fromarray(np.arange(30, dtype=np.uint16).reshape(5, 6)).save(path)
    content = path.read_bytes()
    entry = struct.pack("<HHIH", 262, 3, 1, 1)
    assert content.count(entry) == 1
    path.write_bytes(content.replace(entry, struct.pack("<HHIH", 262, 3, 1, 0)))
    return path


def one_name(folder: Path, rng: np.random.Generator) -> Path:
    series = of_series(at(-1))(folder, rng)
    shutil.copy(series / "im_0.dcm", series / "im_0.ima")
    return series


REFUSED: list[tuple[str, Callable[[Path, np.random.Generator], Path]]] = [
    ("missing_file", lambda folder, _: folder / "none.nii.gz"),
    ("missing_file", lambda folder, _: folder),
    ("unknown_format", photograph),
    ("wrong_format", of_nifti(lambda p: p.write_bytes(gzip.compress(p.read_bytes() * 9)))),
    ("wrong_format", of_image(lambda p: save_image(p, "L", format="JPEG"))),
    ("mixed_formats", two_formats),
    ("corrupt_file", of_nifti(lambda p: p.write_bytes(p.read_bytes()[:-40]))),
    ("corrupt_file", of_nifti(lambda p: p.write_bytes(p.read_bytes()[:40]))),
    ("broken_header", of_nifti(lambda p: patch_header(p, datatype=1234))),
    ("undecodable_pixels", of_series(at(2, PixelData=bytes(40)))),
    ("undecodable_pixels", lambda *_: Path(str(get_testdata_file("MR_truncated.dcm", download=False)))),
    ("no_image", of_series(at(0, Rows=None))),
    ("localiser", of_series(at(4, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))),
    ("colour", of_image(lambda p: save_image(p, "P"))),
    ("colour", of_image(lambda p: save_image(p, "RGBA"))),
    ("colour", of_nifti(lambda p: save_nifti(p, np.ones((3, 4, 5), dtype=np.complex64)))),
    ("colour", of_series(at(0, PhotometricInterpretation="RGB"))),
    ("bit_depth", of_image(sixteen_bit_colour)),
    ("white_is_zero", white_is_zero),
    ("exif_rotation", of_image(exif_rotated)),
    ("several_volumes", of_nifti(lambda p: save_nifti(p, np.arange(120.0).reshape(3, 4, 5, 2)))),
    ("several_volumes", of_series(at(1, NumberOfFrames=2))),
    ("too_large", of_nifti(lambda p: patch_header(p, dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]))),
    ("missing_uid", of_series(at(-1, SeriesInstanceUID=None))),
    ("missing_geometry", of_series(at(1, PixelSpacing=None))),
    ("broken_orientation", of_series(at(-1, ImageOrientationPatient=[1, 0, 0, 0.5, 1, 0]))),
    ("broken_orientation", of_nifti(lambda p: patch_header(p, sform_code=0, quatern_b=0.9, quatern_c=0.9))),
    ("mixed_series", of_series(at(3, SeriesInstanceUID="1.9"))),
    ("mixed_series", of_series(at(3, StudyInstanceUID="1.9"))),
    ("mixed_series", of_series(at(3, Modality="MR"))),
    ("mixed_frames_of_reference", of_series(at(3, FrameOfReferenceUID="1.9"))),
    ("mixed_grids", of_series(at(2, ImageOrientationPatient=list(SAGITTAL)))),
    ("mixed_grids", of_series(at(2, PixelSpacing=[0.9, 0.7]))),
    ("duplicate_slice", of_series(height(3, 104.0))),
    ("missing_slice", of_series(height(4, 110.0))),
    ("misplaced_slice", of_series(at(2, ImagePositionPatient=[-30.0, -20.25, 104.0]))),
    ("duplicate_name", one_name),
    ("broken_affine", of_nifti(lambda p: patch_header(p, srow_x=[np.nan, 0, 0, 0]))),
    ("zero_spacing", of_nifti(lambda p: patch_header(p, pixdim=[1, 1, 0, 1, 1, 1, 1, 1]))),
    ("singular_affine", of_nifti(singular)),
    ("sheared_affine", of_nifti(sheared)),
    ("non_finite", of_nifti(with_value(np.inf))),
    ("non_finite", of_nifti(with_value(np.nan))),
    ("constant_image", of_nifti(with_value(1.0))),
    ("constant_image", of_nifti(with_value(2.0))),  # one voxel, which no grey value of tissue can be told from
    ("wrong_channels", of_image(lambda p: save_image(p, "RGB"))),
]
ELSEWHERE = {
    "lossy_mask", "input_folder", "output_name_taken", "non_finite_result", "unlike_training", "wrong_modality",
    "unreadable", "name_too_long",
}  # fmt: skip


def test_every_refusal_is_shown() -> None:
    assert {code for code, _ in REFUSED} == set(REFUSALS) - ELSEWHERE


@pytest.mark.parametrize(("code", "make"), REFUSED, ids=[f"{i}-{code}" for i, (code, _) in enumerate(REFUSED)])
def test_a_refused_input_has_its_code(
    predictor: Predictor,
    tmp_path: Path,
    rng: np.random.Generator,
    code: str,
    make: Callable[[Path, np.random.Generator], Path],
) -> None:
    (tmp_path / "SECRET").mkdir()
    source = make(tmp_path / "SECRET", rng)
    outcome = run(predictor, source, tmp_path / "out")
    assert (outcome.status, outcome.code) == ("refused", code), outcome.reason
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"summary.json", "audit.jsonl", "audit.key"}
    # What `segment` prints comes from the same functions.
    with pytest.raises(DataError) as error:
        cases.working_images(cases.read_case(str(source), 1), 16)
    assert (str(error.value), error.value.code) == (outcome.reason, code)


def test_refusals_for_where_masks_go(predictor: Predictor, tmp_path: Path, rng: np.random.Generator) -> None:
    for name in "xy":
        (tmp_path / name).mkdir()
    sources = [str(nifti(tmp_path / name, rng)) for name in "xy"]
    outcomes = list(predict(predictor, sources, tmp_path / "out"))
    assert [outcome.code for outcome in outcomes] == ["", "output_name_taken"]
    with pytest.raises(DataError) as error:
        run(predictor, Path(sources[0]), tmp_path / "x")
    assert error.value.code == "input_folder"
    save_image(tmp_path / "m.jpg", "L")
    with pytest.raises(DataError) as error:
        read_mask(tmp_path / "m.jpg")
    assert error.value.code == "lossy_mask"


def test_what_a_network_makes_of_an_image_is_checked(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.zeros((2, 1, 16, 16), dtype=np.float32)
    execute = Predictor._run

    def overflow(self: Predictor, *arguments: Any, **inputs: Any) -> Any:
        outputs = execute(self, *arguments, **inputs)
        for values in outputs.values():
            if values.dtype == np.float32:
                values[1] = np.inf
        return outputs

    monkeypatch.setattr(Predictor, "_run", overflow)
    for method in (predictor.segment, predictor.label_probability):
        with pytest.raises(DataError, match="for image 1; half precision overflows") as error:
            method(images)
        assert error.value.code == "non_finite_result"


def test_an_input_that_memory_does_not_hold_is_refused(
    predictor: Predictor, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: NiftiFile) -> None:
        raise MemoryError

    monkeypatch.setattr(NiftiFile, "load", load)
    assert run(predictor, nifti(tmp_path, rng), tmp_path / "out").code == "too_large"


# Warnings


WARNED: list[tuple[str, Callable[[Path, np.random.Generator], Path]]] = [
    ("qform_sform_disagree", of_nifti(lambda p: patch_header(p, qoffset_x=50))),
    ("no_orientation", of_nifti(lambda p: patch_header(p, qform_code=0, sform_code=0))),
    ("single_slice", lambda folder, rng: of_series(at(-1))(folder, rng) / "im_2.dcm"),
    ("lossy_compression", of_series(at(3, LossyImageCompression="01"))),
    ("derived_image", of_series(at(-1, ImageType=["DERIVED", "SECONDARY", "MPR"]))),
    ("turned_images", of_series(at(-1, ImageOrientationPatient=[-1, 0, 0, 0, -1, 0]))),
]


@pytest.mark.parametrize(("code", "make"), WARNED, ids=[code for code, _ in WARNED])
def test_a_doubtful_input_is_used_with_a_warning(
    predictor: Predictor,
    tmp_path: Path,
    rng: np.random.Generator,
    code: str,
    make: Callable[[Path, np.random.Generator], Path],
) -> None:
    if code in ("single_slice", "lossy_compression", "derived_image", "turned_images"):
        pytest.importorskip("highdicom")
    (tmp_path / "SECRET").mkdir()
    source = make(tmp_path / "SECRET", rng)
    outcome = run(predictor, source, tmp_path / "out")
    assert (outcome.status, outcome.reason, outcome.code) == ("done", "", "")
    (warning,) = outcome.warnings
    assert warning["code"] == code
    assert warning["reason"].startswith(str(source))
    assert [str(each) for each in cases.read_case(str(source), 1).warnings] == [warning["reason"]]


@pytest.mark.filterwarnings("error")
def test_a_sound_input_has_none(predictor: Predictor, tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "SECRET").mkdir()
    outcome = run(predictor, nifti(tmp_path / "SECRET", rng), tmp_path / "out")
    assert (outcome.status, outcome.warnings) == ("done", [])


def test_channels_that_show_nothing_new_are_warned_of(tmp_path: Path, rng: np.random.Generator) -> None:
    values = rng.normal(size=(3, 5, 6, 4)).astype(np.float32)
    values[2] = values[0]
    paths = [save_nifti(tmp_path / f"{i}.nii", channel) for i, channel in enumerate(values)]
    stack = cases.read_case(",".join(map(str, paths)), 3)
    assert [(w.code, str(w)) for w in stack.warnings] == [
        ("equal_channels", f"{paths[0]}: channels 1 and 3 of 3 are equal")
    ]
    red = np.zeros((5, 6, 3), dtype=np.uint8)
    red[..., 0] = rng.permutation(30).reshape(5, 6)
    Image.fromarray(red).save(tmp_path / "red.png")
    codes = [warning.code for warning in cases.read_case(str(tmp_path / "red.png"), 3).warnings]
    assert codes == ["constant_channel"] * 2
    # One file for all channels is meant so.
    assert cases.read_case(str(paths[0]), 3, replicate=True).warnings == ()


@pytest.mark.parametrize(
    ("slope", "intercept", "fits"),
    [(1, 0, True), (1.2, -50, True), (1, 1024, False), (1, -3000, False), (0.001, 0, False), (100, 0, False)],
)
def test_intensities_in_another_unit_than_the_window_are_warned_of(
    tmp_path: Path, rng: np.random.Generator, slope: float, intercept: float, fits: bool
) -> None:
    # Air, fat and soft tissue in Hounsfield units, below which scanners cut off.
    tissue = rng.choice([-1000.0, -100.0, 50.0], (16, 16, 20), p=[0.5, 0.1, 0.4]) + rng.normal(0, 15, (16, 16, 20))
    tissue = np.maximum(tissue, -1000)
    stack = read_stack(save_nifti(tmp_path / "a.nii", tissue * slope + intercept))
    codes = [warning.code for warning in cases.window_doubts(stack, (-160.0, 240.0))]
    assert codes == ([] if fits else ["implausible_intensities"])
    assert cases.window_doubts(stack, None) == []


def test_a_window_with_nothing_in_it_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    stack = read_stack(save_nifti(tmp_path / "a.nii", rng.random((5, 6, 4))))
    with pytest.raises(DataError, match=r"the image is constant within the window 100 to 200; check") as error:
        cases.working_images(stack, 16, window=(100.0, 200.0))
    assert error.value.code == "constant_image"


def test_predict_prints_codes(predictor: Predictor, tmp_path: Path, rng: np.random.Generator) -> None:
    doubtful = patch_header(nifti(tmp_path, rng), qform_code=0, sform_code=0)
    arguments = [
        "predict",
        str(predictor.folder),
        str(doubtful),
        str(tmp_path / "none.nii"),
        "--out",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 3
    assert f"warning (no_orientation): {doubtful}: the header gives no orientation" in result.output
    assert f"refused (missing_file): {tmp_path / 'none.nii'}: no such file or folder" in result.output


# Encodings


@pytest.mark.parametrize(
    "variant", ["RLE", "bigendian", "implicit", "expb", "padded", "jpeg_ls_lossless", "jp2klossless"]
)
def test_transfer_syntaxes_give_the_same_pixels(variant: str) -> None:
    straight, other = (
        Path(str(get_testdata_file(f"MR_small{suffix}.dcm", download=False))) for suffix in ("", f"_{variant}")
    )
    try:
        found = read_stack(other).image
    except DataError as error:
        # Decoders of JPEG are extras.
        assert (error.code, "jp" in variant) == ("undecodable_pixels", True)
        pytest.skip("no decoder is installed")
    np.testing.assert_array_equal(found, read_stack(straight).image)
