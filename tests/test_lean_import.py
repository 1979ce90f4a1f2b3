"""Import stays light, the operations need torch and numpy alone, and imports point one way."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

import cldf_fast

ROOT = Path(__file__).resolve().parents[1]

HEAVY = {
    "PIL",
    "captum",
    "cryptography",
    "highdicom",
    "lightning_fabric",
    "lightning_utilities",
    "matplotlib",
    "monai",
    "nibabel",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pandas",
    "pydantic",
    "pydicom",
    "rich",
    "safetensors",
    "scipy",
    "tensorrt",
    "tensorrt_rtx",
    "torchvision",
    "triton",
    "typer",
    "yaml",
}

# Makes every module whose first name is in argv[1] absent, for imports and for those who only look whether it is there.
_WITHOUT = """
import json, sys

class Finder:
    absent = set(json.loads(sys.argv[1]))

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in self.absent else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Finder, sys.meta_path)
"""


def _python(code: str, *arguments: str) -> str:
    """What the code prints in a fresh interpreter that sees the package as this one does."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _modules_after(statement: str) -> set[str]:
    """First names of all modules that are loaded once the statement has run."""
    return {name.partition(".")[0] for name in _python(f"import sys; {statement}; print(*sys.modules)").split()}


def _closure(*distributions: str) -> set[str]:
    """These distributions and all that they require on this machine, extras left out; normalised names."""
    found: set[str] = set()
    queue = list(distributions)
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in found:
            continue
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        queue += [re.match(r"[\w.-]+", line).group() for line in requirements if "extra ==" not in line]
    return found


def _all_but(*distributions: str) -> list[str]:
    """First names of the modules that are installed here and are neither of these distributions nor required by them.

    triton, which torch requires where it is built for CUDA, counts as absent.
    """
    core = _closure(*distributions) - {"triton"}
    owners = metadata.packages_distributions()
    normalised = {name: {re.sub(r"[-_.]+", "-", owner).lower() for owner in homes} for name, homes in owners.items()}
    kept = {name for name, homes in normalised.items() if homes & core} | {"cldf_fast"} | set(sys.stdlib_module_names)
    return sorted(({*normalised, "torch"} | HEAVY) - kept)


def test_importing_the_package_imports_nothing() -> None:
    assert not _modules_after("import cldf_fast") & (HEAVY | {"torch", "numpy"})


@pytest.mark.parametrize("module", ["cldf_fast.ops", "cldf_fast.losses", "cldf_fast.errors"])
def test_importing_operations_imports_nothing_heavy(module: str) -> None:
    assert not (_modules_after(f"import {module}") - _modules_after("import torch, numpy")) & HEAVY


def test_importing_operations_touches_no_device() -> None:
    assert _python("import torch, cldf_fast.ops; print(torch.cuda.is_initialized())").strip() == "False"


def test_operations_work_with_torch_and_numpy_alone() -> None:
    work = """
import torch
import cldf_fast

anchors = torch.nn.functional.normalize(torch.randn(5, 3), dim=1).requires_grad_()
labels = torch.tensor([0, 0, 1, 1, -1])
loss = cldf_fast.pixel_infonce(anchors, anchors.detach(), labels, labels, self_index=torch.arange(5))
loss.sum().backward()
assert loss.shape == (5,) and torch.isfinite(anchors.grad).all() and anchors.grad.abs().sum() > 0

indices, counts = cldf_fast.sample_anchors(torch.randint(-1, 2, (2, 7, 5)), num_classes=2, per_class=3, seed=0)
assert indices.shape == (2, 2, 3) and counts.shape == (2, 2)

noised = cldf_fast.noised_batch(torch.zeros(2, 1, 7, 5), torch.tensor([0.9, 0.5, 0.1]), 0)
assert noised.shape == (6, 1, 7, 5) and noised.std() > 0
print("worked")
"""
    assert _python(_WITHOUT + work, json.dumps(_all_but("torch", "numpy"))).strip() == "worked"


def test_doctor_works_with_torch_and_numpy_alone() -> None:
    work = "from cldf_fast import doctor; print(doctor.render(doctor.collect()))"
    assert "pixel_infonce" in _python(_WITHOUT + work, json.dumps(_all_but("torch", "numpy")))


@pytest.mark.parametrize("module", ["cases", "data.resizing", "data.intensity", "data.stacks"])
def test_reading_users_files_needs_no_torch_to_import(module: str) -> None:
    assert not _modules_after(f"import cldf_fast.{module}") & (HEAVY | {"torch"})


def test_users_files_are_read_and_masks_written_without_torch(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (9, 8, 3), dtype=np.uint8)
    nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), tmp_path / "case.nii.gz")
    Image.fromarray(image[..., 0]).save(tmp_path / "slice.png")
    (tmp_path / "series").mkdir()
    for index in range(3):
        dataset = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm"))
        dataset.ImagePositionPatient[2] += 5 * index
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{index}"
        dataset.save_as(tmp_path / "series" / f"{index}.dcm")
    work = """
from importlib.util import find_spec
from pathlib import Path
import numpy as np
from cldf_fast.cases import parse_labels, read_case, working_images, write_case

assert find_spec("torch") is None
names, folder = ("liver", "spleen"), Path(sys.argv[2])
for case in ("case.nii.gz", "slice.png", "series"):
    stack = read_case(str(folder / case), 2, replicate=True)
    images = working_images(stack, 16)
    assert images.shape == (len(stack.image), 2, 16, 16) and -1 <= images.min() < images.max() <= 1
    if case == "series" and find_spec("highdicom") is None:
        continue
    probability = np.empty((len(images), 3, 16, 16), dtype=np.float32)
    probability[:] = np.float32([0.2, 0.5, 0.3])[:, None, None]
    present = np.tile(parse_labels("spleen", names), (len(images), 1))
    files, foreground = write_case(
        stack, probability, present, folder / "out", class_names=names, keep_probability=True
    )
    assert len(files) >= 2 and foreground == stack.image[:, 0].size
print("worked")
"""
    absent = json.dumps(_all_but("numpy", "nibabel", "pydicom", "pillow", "highdicom"))
    assert _python(_WITHOUT + work, absent, str(tmp_path)).strip() == "worked"


@pytest.mark.parametrize("name", cldf_fast.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(cldf_fast, name) is not None
    assert name in dir(cldf_fast)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'PixelInfoNSE'"):
        cldf_fast.PixelInfoNSE  # noqa: B018


def test_type_checkers_see_the_names_that_are_resolved() -> None:
    tree = ast.parse((ROOT / "cldf_fast" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    declared = {alias.asname: line.module for line in block.body for alias in line.names}  # type: ignore[attr-defined]
    assert declared == cldf_fast._HOMES


def _imports(path: Path) -> Iterator[str]:
    """Every absolute module name that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _importers(rooms: list[str], pattern: str) -> list[str]:
    """ "file: module" for each import in these rooms that matches the pattern from its start."""
    files = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    return [
        f"{path.relative_to(ROOT)}: {module}"
        for path in files
        for module in _imports(path)
        if re.match(pattern, module)
    ]


def test_kernels_are_never_imported_as_a_top_level_package() -> None:
    # From the repository's root `import kernels` works, and makes second module objects with second registrations.
    assert _importers(["cldf_fast", "kernels", "tests", "benchmarks"], r"kernels(\.|$)") == []


def test_kernels_know_nothing_of_the_package() -> None:
    assert _importers(["kernels"], r"cldf_fast(\.|$)") == []


@pytest.mark.parametrize(
    ("room", "above"),
    [
        ("ops", "models|diffusion|features|evidence|losses|segmentation|training|baselines|deploy|data|config|cli"),
        ("models", "features|evidence|losses|segmentation|training|baselines|deploy|data|cli|pipeline"),
        ("evidence", "training|baselines|deploy|cli|pipeline"),
        ("data", "models|features|evidence|losses|segmentation|training|baselines|deploy|cli|pipeline"),
    ],
)
def test_imports_point_one_way(room: str, above: str) -> None:
    assert _importers([f"cldf_fast/{room}"], rf"cldf_fast\.({above})(\.|$)") == []


def test_pattern_of_importers_finds_an_import(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text("def f():\n    from kernels import infonce\n    import kernels.anchors as a\n", encoding="utf-8")
    found: list[Any] = [module for module in _imports(source) if re.match(r"kernels(\.|$)", module)]
    assert found == ["kernels", "kernels.infonce", "kernels.anchors"]
