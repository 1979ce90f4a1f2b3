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
  const uint32_t low = uint32_t(image), high = uint32_t(image >> 32), first_block = first / 4;
  const int64_t blocks = (count + 3) / 4;
  for (int64_t block = 0; block < blocks; ++block) {
    const Words words = philox4x32(seed, first_block + uint32_t(block), low, high, kAnchorStream);
    for (int word = 0; word < 4; ++word) times[4 * block + word] = words.at[word];
  }
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
