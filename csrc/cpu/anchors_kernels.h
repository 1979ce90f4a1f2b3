// What cpu/anchors.cpp has done by cpu/simd/anchors.cpp, which is compiled once for each instruction set.

#pragma once

#include <cstdint>

namespace cldf_fast {

// The time of a pixel that is never drawn, for its weight. Without weights it is a time like any other.
constexpr uint32_t kNever = 0xFFFFFFFF;

struct AnchorKernels {
  // times[i]: when pixel first + i arrives in the race, as cldf_fast/ops/reference.py defines it; float32 bits with
  // weights. Without weights, null. first: a multiple of 4. times: with room for the next multiple of 4 after count.
  void (*arrival_times)(uint64_t seed, uint64_t image, uint32_t first, int64_t count, const float* weights,
                        uint32_t* times);
};

namespace baseline {
extern const AnchorKernels anchor_kernels;
}
namespace avx2 {
extern const AnchorKernels anchor_kernels;
}
namespace avx512 {
extern const AnchorKernels anchor_kernels;
}

}  // namespace cldf_fast
