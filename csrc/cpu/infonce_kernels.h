// What cpu/infonce.cpp has done by cpu/simd/infonce.cpp, which is compiled once for each instruction set.

#pragma once

#include <cstdint>

namespace cldf_fast {

// Anchors that are processed together: widths of tiles are multiples of it.
constexpr int64_t kGroup = 64;

// The columns of a tile that belong to one group of anchors: `rows` candidates, `stride` floats from one to the next.
struct Columns {
  float* values;
  int64_t stride, rows;
  const int32_t* row_class;
  const int32_t* lane_class;  // [kGroup]
};

struct InfonceKernels {
  // out[r, l] = sum over k of x[r, k] y[k, l], or with `add` that much more. Rows begin `stride` floats after one
  // another; `lanes` is a multiple of 16. The second takes x as [k, r].
  using Multiply = void(const float* x, int64_t x_stride, const float* y, int64_t y_stride, float* out,
                        int64_t out_stride, int64_t rows, int64_t depth, int64_t lanes, bool add);
  Multiply *multiply, *multiply_transposed;

  // Adds the logits of the positives to positive_sum [kGroup].
  void (*add_positives)(Columns tile, double* positive_sum);

  // Raises top [kGroup] to the largest logits of the denominator. With keep_positives these are no part of it.
  void (*find_top)(Columns tile, bool keep_positives, float* top);

  // Replaces each logit s of the denominator by exp(s - top), or exp(s) where top is minus infinity, and adds these to
  // sum [kGroup]. With keep_positives those of the positives stay as they are.
  void (*exponentiate)(Columns tile, bool keep_positives, const float* top, double* sum);

  // Replaces the logits s of the positives by sigmoid(lse - s), and adds these to sigmoid_sum and softplus(lse - s) to
  // softplus_sum, both [kGroup].
  void (*compare_positives)(Columns tile, const float* lse, double* softplus_sum, double* sigmoid_sum);

  // Replaces what the functions above left by the gradient of the logits: scale [kGroup] times each term of the
  // denominator, minus pull [kGroup] times what stands for a positive.
  void (*weigh)(Columns tile, const float* scale, const float* pull);

  // Adds exp(s - shift) of the logits s to lane_sum [kGroup] and, unless it is null, to row_sum [rows]; shift [kGroup].
  void (*add_exponentials)(const float* values, int64_t stride, int64_t rows, const float* shift, double* lane_sum,
                           double* row_sum);

  // Replaces the logits s by exp(s - shift) (lane + row); shift, lane [kGroup], row [rows].
  void (*weigh_exponentials)(float* values, int64_t stride, int64_t rows, const float* shift, const float* lane,
                             const float* row);
};

namespace baseline {
extern const InfonceKernels infonce_kernels;
}
namespace avx2 {
extern const InfonceKernels infonce_kernels;
}
namespace avx512 {
extern const InfonceKernels infonce_kernels;
}

}  // namespace cldf_fast
