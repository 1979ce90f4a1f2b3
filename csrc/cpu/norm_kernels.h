// What cpu/norm.cpp has done by cpu/simd/norm.cpp, which is compiled once for each instruction set.

#pragma once

#include <cstdint>

namespace cldf_fast {

// Some pixels of all channels, which lie side by side, or some pixels of one channel.
struct Slab {
  int64_t pixels, channels;
};

// Of every channel of a slab: z = (x - mean) * slope + shift, where slope = rstd * scale.
struct NormChannels {
  const float *mean, *rstd, *slope, *shift;
};

struct NormKernels {
  // Sums of x - pivot and of its square, for every channel. pivot: a value near the mean, for the sake of precision.
  void (*moments)(const float* x, Slab slab, const float* pivot, float* sums, float* squares);

  // out = z, or z * sigmoid(z).
  void (*apply)(const float* x, Slab slab, const NormChannels& channels, bool silu, float* out);

  // grad_z = d/dz of what `apply` returns, times grad; and for every channel the sums of grad_z and of grad_z times
  // the normalised x.
  void (*differentiate)(const float* x, const float* grad, Slab slab, const NormChannels& channels, bool silu,
                        float* grad_z, float* sums, float* products);

  // grad_x = grad_z * slope - constant - (x - mean) * linear, for every channel. In place.
  void (*combine)(const float* x, Slab slab, const NormChannels& channels, const float* constant, const float* linear,
                  float* grad);
};

namespace baseline {
extern const NormKernels norm_kernels;
}
namespace avx2 {
extern const NormKernels norm_kernels;
}
namespace avx512 {
extern const NormKernels norm_kernels;
}

}  // namespace cldf_fast
