// What cpu/saliency.cpp has done by cpu/simd/saliency.cpp, which is compiled once for each instruction set.

#pragma once

#include <cstdint>

#include "saliency.h"

namespace cldf_fast {

// Elements that are processed together, at most: what is known of them stays in the fastest cache.
constexpr int64_t kChunk = 1024;

// Neighbouring rows that a blur along the columns computes together, because they read nearly the same rows.
constexpr int64_t kBlurRows = 4;

enum class Dtype { float32, bfloat16, float16 };

// Values in a tensor, `stride` elements from one to the next.
struct Values {
  const void* first;
  Dtype dtype;
  int64_t stride;
};

struct SaliencyKernels {
  // The sum of the hashes of `count` <= kChunk contiguous elements, of which the first stands at `position`.
  uint64_t (*hash)(const void* x, Dtype dtype, int64_t count, int64_t position);

  // out = x and noise of one level, `count` <= kChunk contiguous elements from the given block of noise on.
  void (*add_noise)(const void* x, Dtype dtype, int64_t count, uint64_t seed, int64_t level, int64_t block,
                    NoiseScales scales, void* out);

  // The sum of the magnitudes of `count` <= kChunk pixels over the channels. values: of the first channel.
  double (*sum_magnitudes)(Reduce reduce, const Values& values, int64_t channels, int64_t channel_stride,
                           int64_t count);

  // Adds them to out, times a weight; writes them there where they are the first.
  void (*add_magnitudes)(Reduce reduce, const Values& values, int64_t channels, int64_t channel_stride, int64_t count,
                         double weight, bool first, double* out);

  // out[x] = sum over i of weights[i] * rows[i][x]. A blur along a row is that, of the row's shifts.
  void (*combine)(const double* const* rows, const double* weights, int64_t num_rows, int64_t count, double* out);

  // The same for kBlurRows rows: out[r][x] = sum over i of weights[i] * rows[r + i][x].
  void (*combine_down)(const double* const* rows, const double* weights, int64_t num_rows, int64_t count,
                       double* const* out);

  void (*extremes)(const double* values, int64_t count, double* least, double* most);

  int64_t (*count_up_to)(const double* values, int64_t count, double bound);

  // Copies the values above `low` and up to `high`; returns their number. out may be `values`.
  int64_t (*collect)(const double* values, int64_t count, double low, double high, double* out);

  void (*scale)(const double* saliency, double scale, int64_t count, float* out);

  // The labels of `count` <= kChunk pixels from maps of `classes` classes; values: those of the first class.
  void (*fuse)(const Values& gradient_map, int64_t gradient_stride, const Values& cam, int64_t cam_stride,
               const bool* present, int64_t classes, const Thresholds& thresholds, int64_t count, int8_t* labels);
};

namespace baseline {
extern const SaliencyKernels saliency_kernels;
}
namespace avx2 {
extern const SaliencyKernels saliency_kernels;
}
namespace avx512 {
extern const SaliencyKernels saliency_kernels;
}

}  // namespace cldf_fast
