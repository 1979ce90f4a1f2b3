// What the operators on the CPU share: the machine's instruction set, and access to tensors.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string>

namespace cldf_fast {

enum class InstructionSet { baseline, avx2, avx512 };

// The best that this machine has, or the one that CLDF_FAST_CPU_CAPABILITY names if it is as good.
inline InstructionSet instruction_set() {
#ifdef CLDF_X86
  const char* variable = std::getenv("CLDF_FAST_CPU_CAPABILITY");
  const std::string most = variable ? variable : "avx512";
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512 && most == "avx512") return InstructionSet::avx512;
  if (avx2 && most != "baseline") return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

// Of what simd/ has compiled for every instruction set, under one name in a namespace each, this machine's.
#ifdef CLDF_X86
#define CLDF_BEST(name)                                                       \
  (instruction_set() == InstructionSet::avx512 ? avx512::name                 \
   : instruction_set() == InstructionSet::avx2 ? avx2::name : baseline::name)
#else
#define CLDF_BEST(name) (baseline::name)
#endif

template <class T>
T* data(const torch::stable::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
T* data(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace cldf_fast
