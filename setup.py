"""Maps kernels/ into the package and compiles cldf_fast._C where that is possible; all else is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

ROOT = Path(__file__).resolve().parent
# Installed in the extension's place when it is left out: one line that says why. cldf_fast.doctor prints it.
LEFT_OUT = "_C.txt"
OPERATORS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.cpp"))
# Compiled once for each instruction set, of which the operators pick one when they run.
VECTORISED = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu/simd").glob("*.cpp"))
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
# One binary for torch 2.10 and every later one: major in the first byte, minor in the second.
TORCH_TARGET_VERSION = "0x020a000000000000"
# Nobody reads errno or traps of arithmetic, and both keep loops from being vectorised. Values stay as they are.
# GCC's note that passing vectors differs between instruction sets concerns calls between binaries.
VECTORISABLE = ["-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
PYTHON_HEADERS = sysconfig.get_path("include")


def package_folder(package: str, file: str) -> Path | None:
    """The folder of an installed package that holds this file; looks it up without importing it."""
    spec = importlib.util.find_spec(package)
    folders = map(Path, (spec.submodule_search_locations or []) if spec else [])
    return next((folder for folder in folders if (folder / file).is_file()), None)


def pybind11_headers() -> Path | None:
    """The include directory of pybind11, or of the copy that torch ships."""
    folders = [package_folder(package, "include/pybind11/pybind11.h") for package in ("pybind11", "torch")]
    return next((folder / "include" for folder in folders if folder), None)


class BuildNative(build_ext):
    """Compiles the extension, or records in one line why it was left out: an install without it works too."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        record = target.with_name(LEFT_OUT)
        record.unlink(missing_ok=True)
        reason = self._obstacle()
        if not reason:
            ext.define_macros.append(("CLDF_FAST_VERSION", f'"{self.distribution.get_version()}"'))
            ext.include_dirs.append(str(pybind11_headers()))
            try:
                self._add_operators(ext)
                super().build_extension(ext)
            except (BaseError, CCompilerError) as error:
                reason = f"compiling it failed: {error}"
        if reason:
            target.unlink(missing_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(reason + "\n", encoding="utf-8")
            self.warn(f"{ext.name} is left out of this build: {reason}")

    def copy_extensions_to_source(self) -> None:
        """For an editable install: the binary or the record of why there is none, and nothing of an earlier build."""
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            source = ROOT / Path(*ext.name.split(".")).parent
            for file in (built, built.with_name(LEFT_OUT)):
                (source / file.name).unlink(missing_ok=True)
                if file.exists():
                    shutil.copy(file, source / file.name)

    def _add_operators(self, ext: Extension) -> None:
        """The C++ operators, on torch's stable ABI; left out where no torch is installed to compile against."""
        torch = package_folder("torch", "include/torch/csrc/stable/library.h")
        if torch is None:
            return
        ext.define_macros += [("CLDF_FAST_OPERATORS", "1"), ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)]
        ext.sources += OPERATORS
        ext.include_dirs += ["csrc/include", str(torch / "include")]
        ext.library_dirs.append(str(torch / "lib"))
        # No run path: torch has loaded its libraries before this one is.
        ext.libraries += ["torch_cpu", "c10"]
        if "avx2" in INSTRUCTION_SETS:
            ext.define_macros.append(("CLDF_X86", "1"))
        for name, flags in INSTRUCTION_SETS.items():
            ext.extra_objects += self.compiler.compile(
                VECTORISED,
                output_dir=str(Path(self.build_temp, name)),
                macros=[("CLDF_ISA", name)],
                include_dirs=["csrc/include"],
                extra_postargs=[*ext.extra_compile_args, *flags],
            )

    def _obstacle(self) -> str:
        """What is plainly missing on this machine, with what to install; empty if the compiler may try."""
        command = getattr(self.compiler, "compiler_so_cxx", None) or getattr(self.compiler, "compiler_so", None)
        if command and shutil.which(command[0]) is None:
            return f"no C++ compiler: {command[0]!r} was not found (Debian, Ubuntu: apt-get install g++)"
        if not Path(PYTHON_HEADERS, "Python.h").is_file():
            return "Python's headers are not installed (Debian, Ubuntu: apt-get install python3-dev)"
        if pybind11_headers() is None:
            return "pybind11 was not installed where the package was built (pip install pybind11)"
        return ""


native = Extension(
    "cldf_fast._C",
    sources=["csrc/bindings.cpp"],
    # No debug information: it would write the builder's paths into the binary.
    extra_compile_args=["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", *VECTORISABLE],
    language="c++",
    # Without this setuptools insists on the file; whether it was made is BuildNative's to say.
    optional=True,
)

setup(
    packages=[*find_packages(include=["cldf_fast", "cldf_fast.*"]), "cldf_fast.kernels"],
    package_dir={"cldf_fast": "cldf_fast", "cldf_fast.kernels": "kernels"},
    ext_modules=[native],
    cmdclass={"build_ext": BuildNative},
)
