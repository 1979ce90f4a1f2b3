// Pixel InfoNCE on the CPU: forward, backward, or both in one sweep that computes the logits once.
//
// A block of anchors is taken at a time, against all candidates. The block's logits are cut into tiles of candidates,
// which the threads share. Results do not depend on how many threads there are: the cut into tiles is a matter of the
// number of candidates alone, and what tiles contribute to an anchor is added in their order.
//
// The products are ours, not BLAS: the factors need no packing here, since a block's anchors stay in the fastest cache,
// and without it these thin products run at the processor's peak, where torch's reach two thirds of it.
//
// The formulas, and the state (loss, lse, weight) that is kept between forward and backward, stand in
// cldf_fast/ops/reference.py; the caller, cldf_fast/ops/_infonce_cpu.py, sorts.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "common.h"
#include "infonce_kernels.h"

namespace {

using namespace cldf_fast;
using torch::stable::Tensor;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Candidates whose logits against one block are held at once. With more of them every tile is computed twice.
constexpr int64_t kHeld = 65536;

const InfonceKernels& kernels() {
  static const InfonceKernels& chosen = CLDF_BEST(infonce_kernels);
  return chosen;
}

// Everything that a sweep reads and writes; see the schema below.
struct Problem {
  int64_t count, candidates, dim, padded;  // m, n, D, D'
  const float* anchor_values;
  const int64_t* rows;
  const int32_t* row_class;
  const int64_t* own;
  const int64_t* num_positives;
  const float* candidate_values;
  const int32_t* column_class;
  const bool* differentiable;
  float temperature;
  bool supcon, forward;
  double *loss, *lse, *weight;
  const float* grad;
  float *grad_anchors, *grad_candidates;
};

class Sweep {
 public:
  explicit Sweep(const Problem& problem)
      : p_(problem),
        // Some sixteen tiles, none so small that its overhead shows. Larger blocks of anchors where candidates are few,
        // and where their gradient, which every block goes over, is long.
        tile_rows_(kGroup * std::clamp(ceil_div(p_.candidates, 16 * kGroup), int64_t{2}, int64_t{8})),
        width_(kGroup * std::clamp(std::max(2048 / std::max(p_.candidates, int64_t{1}), p_.dim / 128), int64_t{1},
                                   int64_t{4})),
        held_(std::min(p_.candidates, kHeld)),
        tiles_(ceil_div(held_, tile_rows_)),
        logits_(new float[held_ * width_]),
        anchors_(width_ * p_.padded),
        transposed_(p_.dim * width_),
        classes_(width_),
        own_(width_),
        level_(width_),
        top_(tiles_ * width_),
        sums_(tiles_ * width_),
        more_sums_(tiles_ * width_),
        partial_(p_.grad_anchors ? tiles_ * width_ * p_.padded : 0),
        gradient_(p_.grad_anchors ? width_ * p_.padded : 0) {}

  void run() {
    for (first_ = 0; first_ < p_.count; first_ += width_) {
      gather();
      if (p_.forward) forward();
      if (p_.grad) backward();
    }
  }

 private:
  int64_t valid() const { return std::min(width_, p_.count - first_); }

  // The block's anchors, over the temperature. Lanes beyond the last one are zero and of no class.
  void gather() {
    const float inverse = 1.0f / p_.temperature;
    torch::stable::parallel_for(0, width_, kGroup, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const bool inside = i < valid();
        classes_[i] = inside ? p_.row_class[first_ + i] : -1;
        own_[i] = inside ? p_.own[first_ + i] : -1;
        const float* from = inside ? p_.anchor_values + p_.rows[first_ + i] * p_.dim : nullptr;
        for (int64_t d = 0; d < p_.dim; ++d) anchors_[i * p_.padded + d] = inside ? from[d] * inverse : 0.0f;
      }
      for (int64_t d = 0; d < p_.dim; ++d)
        for (int64_t i = begin; i < end; ++i) transposed_[d * width_ + i] = anchors_[i * p_.padded + d];
    });
  }

  struct Tile {
    int64_t index, first, rows;  // first: its first candidate
    float* values;
  };

  int64_t tiles_of(int64_t chunk) const { return ceil_div(std::min(held_, p_.candidates - chunk), tile_rows_); }

  // Calls f(tile) for all tiles of the candidates from `chunk` on that are held together, the threads sharing them.
  template <class F>
  void each_tile(int64_t chunk, F f) {
    const int64_t held = std::min(held_, p_.candidates - chunk);
    torch::stable::parallel_for(0, tiles_of(chunk), 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t offset = t * tile_rows_;
        f(Tile{t, chunk + offset, std::min(tile_rows_, held - offset), logits_.get() + offset * width_});
      }
    });
  }

  // How many of the block's lanes have to be computed.
  int64_t lanes() const { return ceil_div(valid(), kGroup) * kGroup; }

  // Calls f(columns, offset) for the groups of a tile; offset: of the group's first anchor in the block.
  template <class F>
  void each_group(const Tile& tile, F f) {
    for (int64_t at = 0; at < lanes(); at += kGroup)
      f(Columns{tile.values + at, width_, tile.rows, p_.column_class + tile.first, classes_.data() + at}, at);
  }

  // Puts a value where a candidate of the tile is the anchor itself, for those that are among their own positives, or
  // not among them.
  void set_own(const Tile& tile, float among_positives, float among_negatives) {
    for (int64_t i = 0; i < valid(); ++i) {
      const int64_t row = own_[i] - tile.first;
      if (own_[i] < 0 || row < 0 || row >= tile.rows) continue;
      tile.values[row * width_ + i] = p_.column_class[own_[i]] == classes_[i] ? among_positives : among_negatives;
    }
  }

  // The tile's logits, then the terms of its denominator in their place; positive_sums [tiles, width] or null.
  void compute(const Tile& tile, double* positive_sums) {
    kernels().multiply({candidates(tile), p_.padded, 1}, transposed_.data(), width_, tile.values, width_, tile.rows,
                       p_.dim, lanes(), false);
    const int64_t at = tile.index * width_;
    if (positive_sums) {
      set_own(tile, 0.0f, 0.0f);
      std::fill_n(positive_sums + at, width_, 0.0);
      each_group(tile, [&](const Columns& columns, int64_t i) {
        kernels().add_positives(columns, positive_sums + at + i);
      });
    }
    // The anchor itself is in no sum: at minus infinity the exponential vanishes, at plus infinity softplus and sigmoid
    // do.
    set_own(tile, p_.supcon ? -kInfinity : kInfinity, -kInfinity);
    std::fill_n(sums_.data() + at, width_, 0.0);
    each_group(tile, [&](const Columns& columns, int64_t i) {
      kernels().exponentiate(columns, !p_.supcon, top_.data() + at + i, sums_.data() + at + i);
    });
  }

  void compare(const Tile& tile) {
    const int64_t at = tile.index * width_;
    std::fill_n(sums_.data() + at, width_, 0.0);
    std::fill_n(more_sums_.data() + at, width_, 0.0);
    each_group(tile, [&](const Columns& columns, int64_t i) {
      kernels().compare_positives(columns, level_.data() + i, sums_.data() + at + i, more_sums_.data() + at + i);
    });
  }

  bool all_held() const { return p_.candidates <= held_; }

  void forward() {
    std::vector<float> top(width_, -kInfinity);
    std::vector<double> sum(width_, 0.0), positive_sum(width_, 0.0);
    for (int64_t chunk = 0; chunk < p_.candidates; chunk += held_) {
      each_tile(chunk, [&](const Tile& tile) { compute(tile, p_.supcon ? more_sums_.data() : nullptr); });
      each_part(chunk, [&](int64_t part, int64_t i) {
        const float before = top[i], now = top_[part];
        if (now > before) {
          top[i] = now;
          sum[i] *= std::exp(before - now);
        }
        // A tile without any term of the denominator has added nothing, unless it is NaN.
        sum[i] += now == -kInfinity ? sums_[part] : sums_[part] * std::exp(now - top[i]);
        positive_sum[i] += p_.supcon ? more_sums_[part] : 0.0;
      });
    }
    std::vector<double> softplus(width_, 0.0), sigmoid(width_, 0.0);
    for (int64_t i = 0; i < valid(); ++i) p_.lse[first_ + i] = std::log(sum[i]) + top[i];
    if (!p_.supcon) {
      read_level();
      for (int64_t chunk = 0; chunk < p_.candidates; chunk += held_) {
        each_tile(chunk, [&](const Tile& tile) {
          if (!all_held()) compute(tile, nullptr);
          compare(tile);
        });
        each_part(chunk, [&](int64_t part, int64_t i) {
          softplus[i] += sums_[part];
          sigmoid[i] += more_sums_[part];
        });
      }
    }
    for (int64_t i = 0; i < valid(); ++i) {
      const int64_t row = first_ + i;
      const double positives = double(p_.num_positives[row]);
      p_.loss[row] = p_.supcon ? p_.lse[row] - positive_sum[i] / positives : softplus[i] / positives;
      p_.weight[row] = p_.supcon ? 1.0 : sigmoid[i] / positives;
    }
  }

  // Calls f(part, anchor) for what every tile has found out about every anchor, tile by tile.
  template <class F>
  void each_part(int64_t chunk, F f) {
    for (int64_t t = 0; t < tiles_of(chunk); ++t)
      for (int64_t i = 0; i < valid(); ++i) f(t * width_ + i, i);
  }

  void read_level() {
    for (int64_t i = 0; i < width_; ++i) level_[i] = i < valid() ? float(p_.lse[first_ + i]) : 0.0f;
  }

  // After a forward pass that held all logits what it left is still there.
  void backward() {
    read_level();
    const bool left = p_.forward && all_held();
    std::fill(gradient_.begin(), gradient_.end(), 0.0f);
    for (int64_t chunk = 0; chunk < p_.candidates; chunk += held_) {
      each_tile(chunk, [&](const Tile& tile) {
        if (!left) {
          compute(tile, nullptr);
          if (!p_.supcon) compare(tile);
        }
        differentiate(tile);
      });
      if (p_.grad_anchors) collect(chunk);
    }
    if (!p_.grad_anchors) return;
    for (int64_t i = 0; i < valid(); ++i)
      for (int64_t d = 0; d < p_.dim; ++d)
        p_.grad_anchors[p_.rows[first_ + i] * p_.dim + d] = gradient_[i * p_.padded + d] / p_.temperature;
  }

  // Adds what the tiles have contributed to the gradient of the anchors, in the tiles' order.
  void collect(int64_t chunk) {
    const int64_t size = width_ * p_.padded;
    torch::stable::parallel_for(0, valid() * p_.padded, 2048, [&](int64_t begin, int64_t end) {
      for (int64_t t = 0; t < tiles_of(chunk); ++t)
        for (int64_t at = begin; at < end; ++at) gradient_[at] += partial_[t * size + at];
    });
  }

  void differentiate(const Tile& tile) {
    std::vector<float> push(width_, 0.0f), gap(width_, 0.0f), pull(width_, 0.0f);
    for (int64_t i = 0; i < valid(); ++i) {
      const int64_t row = first_ + i;
      push[i] = p_.grad[row] * float(p_.weight[row]);
      gap[i] = float(top_[tile.index * width_ + i] - p_.lse[row]);
      pull[i] = p_.grad[row] / float(p_.num_positives[row]);
    }
    each_group(tile, [&](const Columns& columns, int64_t i) {
      kernels().weigh(columns, !p_.supcon, &push[i], &gap[i], &pull[i]);
    });
    if (p_.supcon) set_own(tile, 0.0f, 0.0f);
    if (p_.grad_candidates)
      each_differentiable(tile, [&](int64_t begin, int64_t end) {
        kernels().multiply({tile.values + begin * width_, width_, 1}, anchors_.data(), p_.padded,
                           p_.grad_candidates + (tile.first + begin) * p_.padded, p_.padded, end - begin, valid(),
                           p_.padded, true);
      });
    if (p_.grad_anchors)
      kernels().multiply({tile.values, 1, width_}, candidates(tile), p_.padded,
                         partial_.data() + tile.index * width_ * p_.padded, p_.padded, valid(), tile.rows, p_.padded,
                         false);
  }

  // Calls f(begin, end) for the rows of a tile, one after the other, whose gradient is wanted.
  template <class F>
  void each_differentiable(const Tile& tile, F f) {
    const bool *from = p_.differentiable + tile.first, *last = from + tile.rows, *at = from;
    while ((at = std::find(at, last, true)) != last) {
      const bool* end = std::find(at, last, false);
      f(at - from, end - from);
      at = end;
    }
  }

  const float* candidates(const Tile& tile) const { return p_.candidate_values + tile.first * p_.padded; }

  const Problem p_;
  const int64_t tile_rows_, width_, held_, tiles_;
  int64_t first_ = 0;  // the block's first anchor
  // [held, width], and what tiles find out about anchors, [tiles, width].
  std::unique_ptr<float[]> logits_;
  std::vector<float> anchors_, transposed_;  // [width, D'], [D, width]
  std::vector<int32_t> classes_;
  std::vector<int64_t> own_;
  std::vector<float> level_, top_;
  std::vector<double> sums_, more_sums_;
  std::vector<float> partial_, gradient_;  // [tiles, width, D'], [width, D']
};

void infonce_sweep(Tensor anchors, Tensor rows, Tensor row_class, Tensor own, Tensor num_positives, Tensor candidates,
                   Tensor column_class, Tensor differentiable, double temperature, bool supcon, bool forward,
                   Tensor loss, Tensor lse, Tensor weight, std::optional<Tensor> grad,
                   std::optional<Tensor> grad_anchors, std::optional<Tensor> grad_candidates) {
  const Problem problem{
      .count = rows.size(0),
      .candidates = candidates.size(0),
      .dim = anchors.size(1),
      .padded = candidates.size(1),
      .anchor_values = data<float>(anchors),
      .rows = data<int64_t>(rows),
      .row_class = data<int32_t>(row_class),
      .own = data<int64_t>(own),
      .num_positives = data<int64_t>(num_positives),
      .candidate_values = data<float>(candidates),
      .column_class = data<int32_t>(column_class),
      .differentiable = data<bool>(differentiable),
      .temperature = float(temperature),
      .supcon = supcon,
      .forward = forward,
      .loss = data<double>(loss),
      .lse = data<double>(lse),
      .weight = data<double>(weight),
      .grad = data<float>(grad),
      .grad_anchors = data<float>(grad_anchors),
      .grad_candidates = data<float>(grad_candidates),
  };
  Sweep(problem).run();
}

}  // namespace

// All tensors contiguous. m anchors count; they are sorted by class, as are the n candidates.
//   anchors float32 [M, D]; rows int64 [m], those that count; row_class int32 [m]
//   own int64 [m], the candidate that is the anchor itself or -1; num_positives int64 [m]
//   candidates float32 [n, D'], D' the next multiple of 16 and zeros beyond D; column_class int32 [n]
//   differentiable bool [n], of which candidates the gradient is wanted
//   loss, lse, weight float64 [m]: written with `forward`, otherwise lse and weight are read
//   grad float32 [m], the gradient of each loss; without it no gradient is computed
//   grad_anchors float32 [M, D], of which the rows that count are written; grad_candidates float32 [n, D'], added to
STABLE_TORCH_LIBRARY_FRAGMENT(cldf_fast, m) {
  m.def("infonce_sweep(Tensor anchors, Tensor rows, Tensor row_class, Tensor own, Tensor num_positives, "
        "Tensor candidates, Tensor column_class, Tensor differentiable, float temperature, bool supcon, bool forward, "
        "Tensor(a!) loss, Tensor(b!) lse, Tensor(c!) weight, Tensor? grad, Tensor(d!)? grad_anchors, "
        "Tensor(e!)? grad_candidates) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cldf_fast, CPU, m) { m.impl("infonce_sweep", TORCH_BOX(&infonce_sweep)); }
