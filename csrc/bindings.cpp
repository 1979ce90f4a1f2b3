// The Python module cldf_fast._C: what this binary is and how it was made.
// No torch header here: the full ones cost forty times this file's compile time and bind the binary to one torch. The
// operators in cpu/ are on torch's stable ABI and register themselves when this module is loaded.

#include <pybind11/pybind11.h>

#include <string>

#ifdef CLDF_FAST_CUDA
#include "cuda/obstacle.h"
#endif

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "Clang " __clang_version__;
#elif defined(__GNUC__)
  return "GCC " __VERSION__;
#else
  return "unknown";
#endif
}

// Nothing here may depend on when or where the build ran: the same source and compiler give the same record.
py::dict build_record() {
  py::dict record;
  record["package_version"] = CLDF_FAST_VERSION;
  record["compiler"] = compiler();
  record["cxx_standard"] = "C++" + std::to_string(__cplusplus / 100 % 100);
  record["python"] = std::to_string(PY_MAJOR_VERSION) + "." + std::to_string(PY_MINOR_VERSION);
  record["pybind11"] = std::to_string(PYBIND11_VERSION_MAJOR) + "." + std::to_string(PYBIND11_VERSION_MINOR);
#ifdef CLDF_FAST_OPERATORS
  record["torch_stable_abi"] =
      std::to_string(TORCH_TARGET_VERSION >> 56) + "." + std::to_string(TORCH_TARGET_VERSION >> 48 & 0xff) +
      " and later";
#ifdef CLDF_X86
  record["instruction_sets"] = "baseline, avx2, avx512; the best is picked on each machine";
#else
  record["instruction_sets"] = "baseline";
#endif
#else
  record["torch_stable_abi"] = "operators left out: torch was not installed where the package was built";
#endif
  record["cuda"] = CLDF_FAST_CUDA_RECORD;
  return record;
}

std::string cuda_obstacle() {
#ifdef CLDF_FAST_CUDA
  return cldf_fast::cuda_obstacle();
#else
  return CLDF_FAST_CUDA_RECORD;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of cldf_fast.";
  m.def("build_record", &build_record,
        "What this binary was built from and with: dict of str to str, the same for every build of one source with "
        "one compiler.");
  m.def("cuda_obstacle", &cuda_obstacle,
        "Why the CUDA operators can't run on this machine: str, empty if they can. May be the process's first use of "
        "the GPU.");
}
