// Pixel InfoNCE on a tile of logits: what lies between the matrix products, which torch does.
//
// A tile holds the logits s of some anchors (rows) against some candidates (columns). Candidates are sorted by label,
// so that an anchor's positives are one range of columns and everything else in its row is a negative. The formulas
// and the state that is kept between the passes stand in cldf_fast/ops/reference.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <limits>

#include "vector_math.h"

// One clone of a function for each instruction set; the machine's best is picked when the library is loaded.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__)
#define CLDF_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLDF_CLONES
#endif

namespace {

using namespace cldf_fast;
using torch::stable::Tensor;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One anchor's row: `columns` logits; positives are [positive_begin, positive_end); `self` is the column of the anchor
// itself or -1. All are relative to the tile, and may lie outside of it.
struct Row {
  float* logits;
  int64_t columns, positive_begin, positive_end, self;

  bool has_self() const { return self >= 0 && self < columns; }
};

int64_t clamp(int64_t value, int64_t low, int64_t high) { return value < low ? low : value > high ? high : value; }

// Calls f(values, offset, count) for the vectors of columns [begin, end); lanes beyond `count` hold `rest`.
template <class F>
CLDF_INLINE void each_vector(const Row& row, int64_t begin, int64_t end, float rest, F f) {
  int64_t at = begin;
  for (; at + kLanes <= end; at += kLanes) f(load(row.logits + at), at, kLanes);
  if (at < end) f(load_some(row.logits + at, end - at, rest), at, end - at);
}

// Extends a running log-sum-exp, held as (maximum, sum of exp(s - maximum)), by columns [begin, end).
CLDF_INLINE void extend(const Row& row, int64_t begin, int64_t end, float& maximum_, double& sum_) {
  if (begin >= end) return;
  Floats most = broadcast(-kInfinity);
  each_vector(row, begin, end, -kInfinity, [&](Floats s, int64_t, int64_t) CLDF_LAMBDA { most = maximum(s, most); });
  const float before = maximum_;
  const float top = maximum(most);
  if (top > before) {
    sum_ *= std::exp(double(before) - double(top));
    maximum_ = top;
  }
  if (maximum_ == -kInfinity) return;
  const Floats shift = broadcast(maximum_);
  Floats total{};
  each_vector(row, begin, end, -kInfinity, [&](Floats s, int64_t, int64_t) CLDF_LAMBDA { total += exponential(s - shift); });
  sum_ += sum(total);
}

CLDF_CLONES void denominator_row(const Row& row, bool with_positives, float& maximum_, double& sum_) {
  // The anchor itself is in no sum: exp of minus infinity is 0.
  if (row.has_self()) row.logits[row.self] = -kInfinity;
  if (with_positives) {
    extend(row, 0, row.columns, maximum_, sum_);
    return;
  }
  extend(row, 0, clamp(row.positive_begin, 0, row.columns), maximum_, sum_);
  extend(row, clamp(row.positive_end, 0, row.columns), row.columns, maximum_, sum_);
}

// Sums over the positives of softplus(lse - s) and sigmoid(lse - s). The tile has these columns only.
CLDF_CLONES void positives_row(const Row& row, float lse, double& softplus_sum, double& sigmoid_sum) {
  const Floats level = broadcast(lse);
  Floats softplus{}, sigmoid{};
  // At +infinity both functions vanish, so that the anchor itself and the lanes beyond the end count nothing.
  if (row.has_self()) row.logits[row.self] = kInfinity;
  const int64_t begin = clamp(row.positive_begin, 0, row.columns), end = clamp(row.positive_end, 0, row.columns);
  each_vector(row, begin, end, kInfinity, [&](Floats s, int64_t, int64_t) CLDF_LAMBDA {
    const Floats z = level - s, distance = z < 0.0f ? z : -z;
    const Floats e = exponential(distance);
    softplus += maximum(z, Floats{}) + log_one_plus(e);
    sigmoid += (z < 0.0f ? e : broadcast(1.0f)) / (1.0f + e);
  });
  softplus_sum += sum(softplus);
  sigmoid_sum += sum(sigmoid);
}

// Replaces the logits by d(grad . loss) / ds, without the part of "supcon" that is linear in s.
CLDF_CLONES void gradient_row(const Row& row, bool supcon, float lse, float negative_factor, float positive_factor) {
  if (row.has_self()) row.logits[row.self] = -kInfinity;
  const Floats level = broadcast(lse);
  const auto exponentials = [&](int64_t begin, int64_t end) CLDF_LAMBDA {
    each_vector(row, begin, end, -kInfinity, [&](Floats s, int64_t at, int64_t count) CLDF_LAMBDA {
      store_some(row.logits + at, negative_factor * exponential(s - level), count);
    });
  };
  if (supcon) {
    exponentials(0, row.columns);
    return;
  }
  const int64_t begin = clamp(row.positive_begin, 0, row.columns), end = clamp(row.positive_end, 0, row.columns);
  exponentials(0, begin);
  each_vector(row, begin, end, kInfinity, [&](Floats s, int64_t at, int64_t count) CLDF_LAMBDA {
    const Floats z = level - s, distance = z < 0.0f ? z : -z;
    const Floats e = exponential(distance);
    store_some(row.logits + at, positive_factor * (z < 0.0f ? e : broadcast(1.0f)) / (1.0f + e), count);
  });
  exponentials(end, row.columns);
  if (row.has_self()) row.logits[row.self] = 0.0f;
}

// A tile [R, C] of contiguous rows and where each row's positives and the anchor itself are; `first` is the candidate
// of column 0, which the int64 [R] bounds are counted from.
struct Tile {
  float* logits;
  int64_t rows, columns, first;
  const int64_t *positive_begin, *positive_end, *self;

  Tile(const Tensor& tile, int64_t first_, const Tensor& begin, const Tensor& end, const Tensor& self_)
      : logits(static_cast<float*>(tile.mutable_data_ptr())),
        rows(tile.size(0)),
        columns(tile.size(1)),
        first(first_),
        positive_begin(static_cast<const int64_t*>(begin.const_data_ptr())),
        positive_end(static_cast<const int64_t*>(end.const_data_ptr())),
        self(static_cast<const int64_t*>(self_.const_data_ptr())) {}

  template <class F>
  void each_row(F f) const {
    // Some ten thousand logits a thread, so that waking it is worth its while.
    const int64_t grain = columns > 0 ? 1 + 32768 / columns : rows;
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        f(Row{logits + i * columns, columns, positive_begin[i] - first, positive_end[i] - first, self[i] - first}, i);
    });
  }
};

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

void infonce_denominator(Tensor tile, int64_t first, Tensor begin, Tensor end, Tensor self, bool with_positives,
                         Tensor maximum_, Tensor sum_) {
  float* maxima = data<float>(maximum_);
  double* sums = data<double>(sum_);
  Tile(tile, first, begin, end, self).each_row([&](const Row& row, int64_t i) {
    denominator_row(row, with_positives, maxima[i], sums[i]);
  });
}

void infonce_positives(Tensor tile, int64_t first, Tensor begin, Tensor end, Tensor self, Tensor lse,
                       Tensor softplus_sum, Tensor sigmoid_sum) {
  const float* levels = data<float>(lse);
  double *softplus = data<double>(softplus_sum), *sigmoid = data<double>(sigmoid_sum);
  Tile(tile, first, begin, end, self).each_row([&](const Row& row, int64_t i) {
    positives_row(row, levels[i], softplus[i], sigmoid[i]);
  });
}

void infonce_gradient(Tensor tile, int64_t first, Tensor begin, Tensor end, Tensor self, bool supcon, Tensor lse,
                      Tensor negative_factor, Tensor positive_factor) {
  const float *levels = data<float>(lse), *negative = data<float>(negative_factor),
              *positive = data<float>(positive_factor);
  Tile(tile, first, begin, end, self).each_row([&](const Row& row, int64_t i) {
    gradient_row(row, supcon, levels[i], negative[i], positive[i]);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cldf_fast, m) {
  m.def("infonce_denominator(Tensor(a!) tile, int first, Tensor begin, Tensor end, Tensor self, bool with_positives, "
        "Tensor(b!) maximum, Tensor(c!) sum) -> ()");
  m.def("infonce_positives(Tensor(a!) tile, int first, Tensor begin, Tensor end, Tensor self, Tensor lse, "
        "Tensor(b!) softplus_sum, Tensor(c!) sigmoid_sum) -> ()");
  m.def("infonce_gradient(Tensor(a!) tile, int first, Tensor begin, Tensor end, Tensor self, bool supcon, Tensor lse, "
        "Tensor negative_factor, Tensor positive_factor) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cldf_fast, CPU, m) {
  m.impl("infonce_denominator", TORCH_BOX(&infonce_denominator));
  m.impl("infonce_positives", TORCH_BOX(&infonce_positives));
  m.impl("infonce_gradient", TORCH_BOX(&infonce_gradient));
}
