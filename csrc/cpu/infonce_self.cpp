// Pixel InfoNCE, "supcon", of features against themselves, loss and gradient: every pair of features is computed once
// in each of two passes, which makes four products of half a matrix each, where anchors and candidates apart need three
// of a whole one.
//
// With e_ij = exp(s_ij - limit), which is symmetric, and z_i its sum over j, the loss of row i is
// log(z_i) + limit - mean of its positives' logits, and
//
//   d(sum of g_i loss_i) / ds_ij, both roles of a pair together:  e_ij (g_i / z_i + g_j / z_j) - positives
//
// where the positives' part needs sums over classes only. A first pass sums z, a second one multiplies. A block of rows
// is taken at a time, against itself and all later ones, in tiles that the threads share: the order of sums depends on
// the number of rows alone.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#include "common.h"
#include "infonce_kernels.h"
#include "infonce_positives.h"

namespace {

using namespace cldf_fast;
using torch::stable::Tensor;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kWidth = 2 * kGroup;

const InfonceKernels& kernels() {
  static const InfonceKernels& chosen = CLDF_BEST(infonce_kernels);
  return chosen;
}

// See the schema below.
struct SelfProblem {
  int64_t count, dim, padded;  // n, D, D'
  const float* values;
  const int32_t* row_class;
  const int64_t* num_positives;
  const float* grad;
  float temperature, limit;
  bool without_self;
  double* loss;
  float* gradient;
};

class SelfSweep {
 public:
  explicit SelfSweep(const SelfProblem& problem)
      : p_(problem),
        tile_rows_(kGroup * std::clamp(ceil_div(p_.count, 16 * kGroup), int64_t{2}, int64_t{4})),
        tiles_(1 + ceil_div(p_.count, tile_rows_)),
        transposed_(p_.dim * kWidth),
        shift_(kWidth),
        sums_(tiles_ * kWidth),
        partial_(p_.gradient ? tiles_ * kWidth * p_.padded : 0),
        total_(p_.count, 0.0),
        weight_(p_.count + kWidth, 0.0f) {}

  void run() {
    each_block([&] { sum_block(); });
    std::vector<int64_t> own(p_.count, -1);
    if (p_.without_self) std::iota(own.begin(), own.end(), 0);
    const Features features{p_.count, p_.values, p_.padded, nullptr, p_.row_class};
    const PositivePairs pairs{features, features, p_.dim, own.data(), p_.num_positives, p_.temperature};
    pairs.each_mean([&](int64_t i, double mean) {
      const double loss = std::log(total_[i]) + p_.limit - mean;
      p_.loss[i] = loss < 0.0 ? 0.0 : loss;  // by rounding; NaN stays
    });
    if (!p_.gradient) return;
    for (int64_t i = 0; i < p_.count; ++i)
      weight_[i] = p_.grad[i] ? float(p_.grad[i] / total_[i] / p_.temperature) : 0.0f;
    each_block([&] { differentiate_block(); });
    const auto gradient = [&](int64_t i) { return p_.gradient + i * p_.padded; };
    pairs.pull(p_.grad, gradient, gradient);
  }

 private:
  // A range of rows against the block. The first one is the block itself, where each pair of rows is met twice; in the
  // others, the rows after it, once.
  struct Tile {
    int64_t index, first, rows;
    bool own;
  };

  template <class F>
  void each_block(F f) {
    for (first_ = 0; first_ < p_.count; first_ += kWidth) {
      gather();
      f();
    }
  }

  int64_t valid() const { return std::min(kWidth, p_.count - first_); }
  int64_t later() const { return p_.count - first_ - valid(); }
  int64_t tiles_of_block() const { return 1 + ceil_div(later(), tile_rows_); }

  // The block's rows over the temperature, turned. Lanes beyond the last row have exponentials of zero.
  void gather() {
    const float inverse = 1.0f / p_.temperature;
    torch::stable::parallel_for(0, p_.dim, 8, [&](int64_t begin, int64_t end) {
      for (int64_t d = begin; d < end; ++d)
        for (int64_t i = 0; i < kWidth; ++i)
          transposed_[d * kWidth + i] = i < valid() ? p_.values[(first_ + i) * p_.padded + d] * inverse : 0.0f;
    });
    for (int64_t i = 0; i < kWidth; ++i) shift_[i] = i < valid() ? p_.limit : kInfinity;
  }

  // Calls f(tile, its logits) for all tiles of the block, the threads sharing them.
  template <class F>
  void each_tile(F f) {
    torch::stable::parallel_for(0, tiles_of_block(), 1, [&](int64_t begin, int64_t end) {
      Buffer<float> logits(std::max(tile_rows_, kWidth) * kWidth);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t offset = (t - 1) * tile_rows_;
        const Tile tile = t == 0 ? Tile{t, first_, valid(), true}
                                 : Tile{t, first_ + valid() + offset, std::min(tile_rows_, later() - offset), false};
        kernels().multiply(row(tile.first), p_.padded, transposed_.data(), kWidth, logits.data(), kWidth, tile.rows,
                           p_.dim, kWidth, false);
        if (tile.own && p_.without_self)
          for (int64_t i = 0; i < tile.rows; ++i) logits[i * kWidth + i] = -kInfinity;
        f(tile, logits.data());
      }
    });
  }

  void sum_block() {
    std::fill(sums_.begin(), sums_.end(), 0.0);
    each_tile([&](const Tile& tile, const float* logits) {
      for (int64_t at = 0; at < kWidth; at += kGroup)
        kernels().add_exponentials(logits + at, kWidth, tile.rows, &shift_[at], &sums_[tile.index * kWidth + at],
                                   tile.own ? nullptr : &total_[tile.first]);
    });
    for (int64_t t = 0; t < tiles_of_block(); ++t)
      for (int64_t i = 0; i < valid(); ++i) total_[first_ + i] += sums_[t * kWidth + i];
  }

  void differentiate_block() {
    each_tile([&](const Tile& tile, float* logits) {
      for (int64_t at = 0; at < kWidth; at += kGroup)
        kernels().weigh_exponentials(logits + at, kWidth, tile.rows, &shift_[at], &weight_[first_ + at],
                                     &weight_[tile.first]);
      if (!tile.own)
        kernels().multiply(logits, kWidth, row(first_), p_.padded, p_.gradient + tile.first * p_.padded, p_.padded,
                           tile.rows, valid(), p_.padded, true);
      kernels().multiply_transposed(logits, kWidth, row(tile.first), p_.padded,
                                    &partial_[tile.index * kWidth * p_.padded], p_.padded, valid(), tile.rows,
                                    p_.padded, false);
    });
    const int64_t size = kWidth * p_.padded;
    float* gradient = p_.gradient + first_ * p_.padded;
    torch::stable::parallel_for(0, valid() * p_.padded, 2048, [&](int64_t begin, int64_t end) {
      for (int64_t t = 0; t < tiles_of_block(); ++t)
        for (int64_t at = begin; at < end; ++at) gradient[at] += partial_[t * size + at];
    });
  }

  const float* row(int64_t i) const { return p_.values + i * p_.padded; }

  const SelfProblem p_;
  const int64_t tile_rows_, tiles_;
  int64_t first_ = 0;                 // the block's first row
  Buffer<float> transposed_, shift_;  // [D, kWidth], [kWidth]
  std::vector<double> sums_;          // what tiles add to the block's rows, [tiles, kWidth]
  Buffer<float> partial_;             // [tiles, kWidth, D']
  std::vector<double> total_;         // z, [n]
  Buffer<float> weight_;              // g / z over the temperature, [n] and zeros
};

void infonce_self_sweep(Tensor values, Tensor row_class, Tensor num_positives, Tensor grad, int64_t dim,
                        double temperature, double limit, bool without_self, Tensor loss,
                        std::optional<Tensor> gradient) {
  SelfSweep({
                .count = values.size(0),
                .dim = dim,
                .padded = values.size(1),
                .values = data<float>(values),
                .row_class = data<int32_t>(row_class),
                .num_positives = data<int64_t>(num_positives),
                .grad = data<float>(grad),
                .temperature = float(temperature),
                .limit = float(limit),
                .without_self = without_self,
                .loss = data<double>(loss),
                .gradient = data<float>(gradient),
            })
      .run();
}

}  // namespace

// All tensors contiguous, rows sorted by class:
//   values float32 [n, D'], D' the next multiple of 16 and zeros beyond D = dim; row_class int32 [n]
//   num_positives int64 [n], 0 for rows that do not count; grad float32 [n], the gradient of each loss, 0 for those
//   limit: no logit is larger, and none smaller than -limit; exp(2 limit) grad / temperature has to be a float32
//   loss float64 [n], written where a row counts; gradient float32 [n, D'], zeros, or none: added to
STABLE_TORCH_LIBRARY_FRAGMENT(cldf_fast, m) {
  m.def("infonce_self_sweep(Tensor values, Tensor row_class, Tensor num_positives, Tensor grad, int dim, "
        "float temperature, float limit, bool without_self, Tensor(a!) loss, Tensor(b!)? gradient) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cldf_fast, CPU, m) { m.impl("infonce_self_sweep", TORCH_BOX(&infonce_self_sweep)); }
