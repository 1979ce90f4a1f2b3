// Arrival times of pixels. Loops over branchless arithmetic, which the compiler turns into vectors.

#include "../anchors_kernels.h"

#include "random.h"

#ifndef CLDF_ISA
#error "CLDF_ISA is not defined: see setup.py"
#endif

namespace cldf_fast::CLDF_ISA {
namespace {

void arrival_times(uint64_t seed, uint64_t image, uint32_t first, int64_t count, const float* weights,
                   uint32_t* times) {
  const uint32_t low = uint32_t(image), high = uint32_t(image >> 32);
  for (int64_t i = 0; i < count; ++i)
    times[i] = philox4x32(seed, first + uint32_t(i), low, high, kAnchorStream).at[0];
  if (!weights) return;
  for (int64_t i = 0; i < count; ++i) {
    const float time = exponential_variate(times[i]) / weights[i];
    uint32_t bits;
    memcpy(&bits, &time, sizeof(bits));
    times[i] = weights[i] > 0.0f ? bits : kNever;
  }
}

}  // namespace

extern const AnchorKernels anchor_kernels{arrival_times};

}  // namespace cldf_fast::CLDF_ISA
