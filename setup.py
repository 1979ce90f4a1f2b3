"""Maps kernels/ into the package and compiles cldf_fast._C where that is possible; all else is in pyproject.toml.

Ninja runs the compilers: on all cores, and only on what has changed since the last build. CUDA code is compiled
wherever nvcc is found, whatever torch and GPU are there, and left out where nvcc fails. CLDF_FAST_CUDA=0 leaves it out,
CLDF_FAST_CUDA_ARCHITECTURES=90 compiles for one architecture. The build record says what is in and why not the rest.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
# Kept between builds, unlike the folder that setuptools has for it; one for each interpreter.
OBJECTS = Path("build", f"native-{sysconfig.get_config_var('SOABI')}")
# Installed in the extension's place when it is left out: one line that says why. cldf_fast.doctor prints it.
LEFT_OUT = "_C.txt"

# No debug information: it would write the builder's paths into the binary. Nobody reads errno or traps of arithmetic,
# and both keep loops from being vectorised; values stay as they are. GCC's note that passing vectors differs between
# instruction sets concerns calls between binaries.
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
# What is in csrc/cpu/simd is compiled for each, and the operators pick one when they run.
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
# Turing to Blackwell, as far as nvcc knows them. A GPU between two runs the code of the lower one.
CUDA_ARCHITECTURES = {75, 80, 86, 89, 90, 100, 120}
# One binary for torch 2.10 and every later one: major in the first byte, minor in the second.
TORCH_TARGET_VERSION = "0x020a000000000000"


def package_folder(package: str, file: str) -> Path | None:
    """The folder of an installed package that holds this file; looks it up without importing it."""
    spec = importlib.util.find_spec(package)
    folders = map(Path, (spec.submodule_search_locations or []) if spec else [])
    return next((folder for folder in folders if any(folder.glob(file))), None)


def pybind11_headers() -> Path | None:
    """The include directory of pybind11, or of the copy that torch ships."""
    folders = [package_folder(package, "include/pybind11/pybind11.h") for package in ("pybind11", "torch")]
    return next((folder / "include" for folder in folders if folder), None)


def ninja() -> list[str]:
    """The command that runs ninja, empty without one; a package's programs need not be on the search path."""
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    return ["ninja"] if shutil.which("ninja") else []


def output(*command: str) -> str:
    """What a command prints, whether it succeeds or not."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout


class CudaLeftOutError(Exception):
    """CUDA code is left out; the message says why."""


class Cuda:
    """nvcc: how to call it, how to link what it compiles, and its line in the build record. Raises CudaLeftOutError."""

    def __init__(self, host_compiler: str) -> None:
        if os.environ.get("CLDF_FAST_CUDA") == "0":
            raise CudaLeftOutError("CLDF_FAST_CUDA=0 was set where the package was built")
        nvcc = self._find()
        version = re.search(r"release (\d+\.\d+)", output(nvcc, "--version"))
        known = {int(name) for name in re.findall(r"compute_(\d+)", output(nvcc, "--list-gpu-arch"))}
        # The program that was found can be a script that calls another.
        toolkit = re.search(r"^#\$ TOP=(.+)$", output(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull), re.MULTILINE)
        if not (version and known and toolkit):
            raise CudaLeftOutError(f"{nvcc} does not answer as nvcc of CUDA 12 or later does")
        asked = {int(name) for name in re.findall(r"\d+", os.environ.get("CLDF_FAST_CUDA_ARCHITECTURES", ""))}
        if not asked <= known:
            raise CudaLeftOutError(
                f"CLDF_FAST_CUDA_ARCHITECTURES: nvcc {version[1]} does not know {sorted(asked - known)}"
            )
        chosen = sorted(asked or known & CUDA_ARCHITECTURES)
        targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in chosen]
        targets.append(f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}")
        self.command = [nvcc, "-ccbin", host_compiler, "-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        self.command += ["--threads=0", *targets]
        # A copy of the runtime library, hidden: torch has its own, of another version perhaps, or none.
        self.libraries = [
            f"-L{toolkit[1]}/lib64",
            f"-L{toolkit[1]}/lib",
            "-lcudart_static",
            "-lpthread",
            "-ldl",
            "-lrt",
        ]
        self.libraries.append("-Wl,--exclude-libs,ALL")
        self.record = f"nvcc {version[1]} for {', '.join(f'sm_{name}' for name in chosen)} and PTX of the last"

    @staticmethod
    def _find() -> str:
        """CUDA_HOME, CUDA_PATH, the search path, the usual place, NVIDIA's packages for Python."""
        homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
        found = [*(home / "bin/nvcc" for home in homes), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
        packages = package_folder("nvidia", "*/bin/nvcc")
        found += sorted(packages.glob("*/bin/nvcc")) if packages else []
        for path in found:
            if path and Path(path).is_file():
                return str(path)
        raise CudaLeftOutError("nvcc was not found where the package was built; the CUDA toolkit has it")


class BuildNative(build_ext):
    """Compiles the extension, or records in one line why it was left out: an install without it works too."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        record = target.with_name(LEFT_OUT)
        target.parent.mkdir(parents=True, exist_ok=True)
        for file in (target, record):
            file.unlink(missing_ok=True)
        reason = self._obstacle()
        if not reason:
            try:
                shutil.copy(self._compile(), target)
            except CompileError as error:
                reason = f"compiling it failed: {error}"
        if reason:
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

    def _tool(self, name: str) -> list[str]:
        """setuptools' command for C++, "compiler_so" or "linker_so", which heeds CXX, CXXFLAGS and the like."""
        return getattr(self.compiler, f"{name}_cxx", None) or getattr(self.compiler, name, None) or ["c++"]

    def _obstacle(self) -> str:
        """What is plainly missing on this machine, with what to install; empty if the compiler may try."""
        compiler = self._tool("compiler_so")[0]
        if shutil.which(compiler) is None:
            return f"no C++ compiler: {compiler!r} was not found (Debian, Ubuntu: apt-get install g++)"
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            return "Python's headers are not installed (Debian, Ubuntu: apt-get install python3-dev)"
        for name, present in (("pybind11", pybind11_headers()), ("ninja", ninja())):
            if not present:
                return f"{name} was not installed where the package was built (pip install {name})"
        return ""

    def _compile(self) -> Path:
        """The extension; without CUDA code where that is impossible, without operators where torch is not installed."""
        torch = package_folder("torch", "include/torch/csrc/stable/library.h")
        try:
            if torch is None:
                raise CudaLeftOutError("torch was not installed where the package was built")
            cuda = Cuda(self._tool("compiler_so")[0])
            try:
                return self._run_ninja(torch, cuda, cuda.record)
            except CompileError as error:
                # Where it was not nvcc that failed, the next attempt fails too.
                raise CudaLeftOutError(f"compiling it failed: {error}") from error
        except CudaLeftOutError as reason:
            return self._run_ninja(torch, None, f"left out: {reason}")

    def _run_ninja(self, torch: Path | None, cuda: Cuda | None, record: str) -> Path:
        (ROOT / OBJECTS).mkdir(parents=True, exist_ok=True)
        script, extension = OBJECTS / "build.ninja", OBJECTS / "_C.so"
        (ROOT / script).write_text("\n".join(self._script(extension, torch, cuda, record)), encoding="utf-8")
        done = subprocess.run(
            [*ninja(), "-f", str(script)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        print(done.stdout)
        if done.returncode:
            lines = [line for line in done.stdout.splitlines() if re.search(r"\berror\b", line, re.IGNORECASE)]
            raise CompileError(lines[0] if lines else "see the build's output (pip install --verbose)")
        return ROOT / extension

    def _script(self, extension: Path, torch: Path | None, cuda: Cuda | None, record: str) -> list[str]:
        """The lines of ninja's script."""
        cxx, libraries = [*self._tool("compiler_so"), *CXX_FLAGS], []
        shared = ["-Icsrc/include"]
        macros = [f"-DCLDF_FAST_VERSION={json.dumps(self.distribution.get_version())}"]
        macros.append(f"-DCLDF_FAST_CUDA_RECORD={json.dumps(record)}")
        headers = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11_headers()}"]
        compiled = []
        if torch:
            shared += ["-DCLDF_FAST_OPERATORS", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
            shared += ["-DCLDF_X86"] * ("avx2" in INSTRUCTION_SETS)
            # No run path: torch has loaded its libraries before this one is. Nothing here refers to libtorch itself,
            # but through it the loader finds the CUDA half of torch, where there is one.
            libraries += [f"-L{torch}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
            with_torch = [*shared, "-isystem", f"{torch}/include"]
            compiled += [("cpu/*.cpp", "", [*cxx, *with_torch])]
            compiled += [
                ("cpu/simd/*.cpp", name, [*cxx, *flags, f"-DCLDF_ISA={name}", *shared])
                for name, flags in INSTRUCTION_SETS.items()
            ]
        if cuda:
            compiled.append(("cuda/*.cu", "", [*cuda.command, *with_torch]))
            macros.append("-DCLDF_FAST_CUDA")
            libraries += cuda.libraries
        compiled.append(("bindings.cpp", "", [*cxx, *shared, *macros, *headers]))

        lines = [f"builddir = {OBJECTS}"]
        lines += [
            "rule compile",
            "  command = $tool -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        lines += ["rule link", "  command = $tool -o $out $in $libraries"]
        objects = []
        for pattern, name, command in compiled:
            for source in sorted((ROOT / "csrc").glob(pattern)):
                relative = source.relative_to(ROOT)
                objects.append(str(OBJECTS / name / relative.with_suffix(f"{source.suffix}.o")))
                lines += [f"build {objects[-1]}: compile {relative}", f"  tool = {escaped(command)}"]
        lines += [f"build {extension}: link {' '.join(objects)}", f"  tool = {escaped(self._tool('linker_so'))}"]
        return [*lines, f"  libraries = {escaped(libraries)}", ""]


def escaped(command: list[str]) -> str:
    """A command for the shell, in ninja's own notation."""
    return shlex.join(command).replace("$", "$$")


native = Extension(
    "cldf_fast._C",
    sources=["csrc/bindings.cpp"],
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
