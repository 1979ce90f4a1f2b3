// Products of thin matrices, blocks of which stay in registers. For factors that lie in the fastest caches as they are:
// nothing is packed.

#pragma once

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

// How a factor lies in memory: the values of a row side by side, or those of a column.
enum class Layout { rows, columns };

// Two steps at a time: where a core's other thread is busy too, instructions are what is scarce, and those that only
// count and jump show.
template <Layout kLayout, int kRows, int kVectors>
CLDF_INLINE void multiply_block(const float* x, int64_t x_stride, const float* y, int64_t y_stride, float* out,
                                int64_t out_stride, int64_t depth, bool add) {
  constexpr bool kOfRows = kLayout == Layout::rows;
  const int64_t x_step = kOfRows ? 1 : x_stride;
  Floats sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = add ? load(out + r * out_stride + v * kLanes) : Floats{};
  const auto step = [&](const float* column, const float* row) __attribute__((always_inline)) {
    Floats right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(row + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Floats left = broadcast(column[kOfRows ? r * x_stride : r]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
    }
  };
  for (; depth >= 2; depth -= 2) {
    step(x, y);
    step(x + x_step, y + y_stride);
    x += 2 * x_step;
    y += 2 * y_stride;
  }
  if (depth) step(x, y);
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(out + r * out_stride + v * kLanes, sum[r][v]);
}

// The last rows, fewer than a block has.
template <Layout kLayout, int kRows, int kVectors>
CLDF_INLINE void multiply_rest(const float* x, int64_t x_stride, const float* y, int64_t y_stride, float* out,
                               int64_t out_stride, int64_t rows, int64_t depth, bool add) {
  if constexpr (kRows > 0) {
    if (rows == kRows)
      multiply_block<kLayout, kRows, kVectors>(x, x_stride, y, y_stride, out, out_stride, depth, add);
    else
      multiply_rest<kLayout, kRows - 1, kVectors>(x, x_stride, y, y_stride, out, out_stride, rows, depth, add);
  }
}

// As many lanes as kVectors vectors have.
template <Layout kLayout, int kVectors>
void multiply_lanes(const float* x, int64_t x_stride, const float* y, int64_t y_stride, float* out, int64_t out_stride,
                    int64_t rows, int64_t depth, bool add) {
  const int64_t next = kLayout == Layout::rows ? x_stride : 1;
  for (; rows >= kBlockRows; rows -= kBlockRows, x += kBlockRows * next, out += kBlockRows * out_stride)
    multiply_block<kLayout, kBlockRows, kVectors>(x, x_stride, y, y_stride, out, out_stride, depth, add);
  multiply_rest<kLayout, kBlockRows - 1, kVectors>(x, x_stride, y, y_stride, out, out_stride, rows, depth, add);
}

// out[r, l] = sum over k of x[r, k] y[k, l], or with `add` that much more, for all lanes, a multiple of kLanes.
// x_stride: from a row of x to the next, or from a column.
template <Layout kLayout, int kVectors = kBlockVectors>
void multiply(const float* x, int64_t x_stride, const float* y, int64_t y_stride, float* out, int64_t out_stride,
              int64_t rows, int64_t depth, int64_t lanes, bool add) {
  constexpr int64_t kWidth = kVectors * kLanes;
  int64_t lane = 0;
  for (; lane + kWidth <= lanes; lane += kWidth)
    multiply_lanes<kLayout, kVectors>(x, x_stride, y + lane, y_stride, out + lane, out_stride, rows, depth, add);
  if constexpr (kVectors > 1)
    if (lane < lanes)
      multiply<kLayout, kVectors - 1>(x, x_stride, y + lane, y_stride, out + lane, out_stride, rows, depth,
                                      lanes - lane, add);
}

}  // namespace
}  // namespace cldf_fast::CLDF_ISA
