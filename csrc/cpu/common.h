// What the operators on the CPU share: the machine's instruction set, and access to tensors.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <optional>
#include <string>
#include <vector>

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

// Memory that begins with a cache line and is not initialised.
template <class T>
struct CacheLineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  CacheLineAllocator() = default;
  template <class U>
  CacheLineAllocator(const CacheLineAllocator<U>&) {}

  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
  void deallocate(T* memory, size_t) { ::operator delete(memory, kLine); }
  template <class U>
  void construct(U* element) {
    ::new (element) U;
  }
  bool operator==(const CacheLineAllocator&) const = default;
};

// What vectors are read from and written to: one that lies across two cache lines takes twice as long.
template <class T>
using Buffer = std::vector<T, CacheLineAllocator<T>>;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(i) for every i below count, where every thread has its own f = make(), and threads have about `grain` each
// at least.
// Who is done takes the next few, since cores are not equally fast: results may not depend on which thread does what.
template <class Make>
void share_with(int64_t count, int64_t grain, Make make) {
  if (count <= 0) return;
  constexpr int64_t kTurns = 8;
  const int64_t threads = std::min(int64_t(torch::stable::get_num_threads()), ceil_div(count, grain));
  const int64_t few = std::max(int64_t(1), count / (kTurns * threads));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto f = make();
    for (int64_t first = next.fetch_add(few); first < count; first = next.fetch_add(few))
      for (int64_t i = first; i < std::min(first + few, count); ++i) f(i);
  });
}

template <class F>
void share(int64_t count, int64_t grain, F f) {
  share_with(count, grain, [&] { return [&](int64_t i) { f(i); }; });
}

}  // namespace cldf_fast
