// Products of thin matrices, blocks of which stay in registers. For factors that lie in the fastest caches as they are:
// nothing is packed.

#pragma once

#include "../factor.h"

#include "vector_math.h"

namespace cldf_fast::CLDF_ISA {
namespace {

// A product's block in registers: as many accumulators as leave room for a row of y and a value of x.
#if defined(__AVX512F__)
constexpr int kBlockRows = 6, kBlockVectors = 4;
#elif defined(__AVX2__)
constexpr int kBlockRows = 6, kBlockVectors = 2;
#else
constexpr int kBlockRows = 4, kBlockVectors = 2;
#endif

template <int kRows, int kVectors>
CLDF_INLINE void multiply_block(const Factor& x, const float* y, int64_t y_stride, float* out, int64_t out_stride,
                                int64_t depth, bool add) {
  Floats sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = add ? load(out + r * out_stride + v * kLanes) : Floats{};
  for (int64_t k = 0; k < depth; ++k) {
    Floats right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(y + k * y_stride + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Floats left = broadcast(x.values[r * x.row_stride + k * x.depth_stride]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(out + r * out_stride + v * kLanes, sum[r][v]);
}

// The last rows, fewer than a block has.
template <int kRows, int kVectors>
CLDF_INLINE void multiply_rest(const Factor& x, const float* y, int64_t y_stride, float* out, int64_t out_stride,
                               int64_t rows, int64_t depth, bool add) {
  if constexpr (kRows > 0) {
    if (rows == kRows)
      multiply_block<kRows, kVectors>(x, y, y_stride, out, out_stride, depth, add);
    else
      multiply_rest<kRows - 1, kVectors>(x, y, y_stride, out, out_stride, rows, depth, add);
  }
}

// As many lanes as kVectors vectors have.
template <int kVectors>
void multiply_lanes(const Factor& x, const float* y, int64_t y_stride, float* out, int64_t out_stride, int64_t rows,
                    int64_t depth, bool add) {
  int64_t row = 0;
  const auto at = [&](int64_t r) { return Factor{x.values + r * x.row_stride, x.row_stride, x.depth_stride}; };
  for (; row + kBlockRows <= rows; row += kBlockRows)
    multiply_block<kBlockRows, kVectors>(at(row), y, y_stride, out + row * out_stride, out_stride, depth, add);
  multiply_rest<kBlockRows - 1, kVectors>(at(row), y, y_stride, out + row * out_stride, out_stride, rows - row, depth,
                                          add);
}

// out[r, l] = sum over k of x[r, k] y[k, l], or with `add` that much more, for all lanes, a multiple of kLanes.
template <int kVectors = kBlockVectors>
void multiply(const Factor& x, const float* y, int64_t y_stride, float* out, int64_t out_stride, int64_t rows,
              int64_t depth, int64_t lanes, bool add) {
  constexpr int64_t kWidth = kVectors * kLanes;
  int64_t lane = 0;
  for (; lane + kWidth <= lanes; lane += kWidth)
    multiply_lanes<kVectors>(x, y + lane, y_stride, out + lane, out_stride, rows, depth, add);
  if constexpr (kVectors > 1)
    if (lane < lanes)
      multiply<kVectors - 1>(x, y + lane, y_stride, out + lane, out_stride, rows, depth, lanes - lane, add);
}

}  // namespace
}  // namespace cldf_fast::CLDF_ISA
