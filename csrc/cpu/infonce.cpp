// Pixel InfoNCE on the CPU: forward, backward, or both in one sweep that computes the logits once.
//
// A block of anchors is taken at a time, against all candidates. These are cut into tiles, which the threads share, and
// tiles into pieces that stay in the fastest caches. On its way over the candidates a block's forward pass completes
// the gradients of the block before: what both read is there then, and threads wait for one another less often.
// Results do not depend on how many threads there are: the cut into tiles is a matter of the number of candidates only,
// and what tiles contribute to an anchor is added in their order.
//
// Features of ordinary length bound their logits, so that exponentials can be taken before the largest logit is known.
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
#include <optional>
#include <vector>

#include "common.h"
#include "infonce_kernels.h"
#include "infonce_positives.h"

namespace {

using namespace cldf_fast;
using torch::stable::Tensor;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Candidates whose logits against one block are held at once. With more of them every tile is computed twice.
constexpr int64_t kHeld = 65536;
// Candidates whose terms against one block, and whose features, are in the fastest caches together.
constexpr int64_t kPiece = 64;
// Logits of at most this size, positive or negative, have exponentials side by side in float32, and quotients of these
// have room there for factors of up to 1e12: temperature, lengths, and what the losses are weighted by.
constexpr float kBounded = 30.0f;

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
  float longest, temperature;  // longest: the largest length of a candidate
  bool supcon, forward;
  double *loss, *lse, *weight;
  const float* grad;
  float *grad_anchors, *grad_candidates;
};

class Sweep {
 public:
  explicit Sweep(const Problem& problem)
      : p_(problem),
        // Some sixteen tiles, but none so small that its overhead shows or too large for the caches. Larger blocks of
        // anchors where candidates are few, and where their gradient, which every block goes over, is long.
        tile_rows_(kGroup * std::clamp(ceil_div(p_.candidates, 16 * kGroup), int64_t{2}, int64_t{8})),
        width_(kGroup * std::clamp(std::max(2048 / std::max(p_.candidates, int64_t{1}), p_.dim / 128), int64_t{1},
                                   int64_t{4})),
        held_(std::min(p_.candidates, kHeld)),
        tiles_(ceil_div(held_, tile_rows_)),
        terms_(held_ * width_),
        partial_(p_.grad_anchors ? tiles_ * width_ * p_.padded : 0),
        blocks_{Block(*this), Block(*this)} {}

  void run() {
    for (int64_t first = 0; first < p_.count; first += width_) {
      Block& block = blocks_[first / width_ % 2];
      gather(block, first);
      if (p_.forward) forward(block);
      if (!p_.grad) continue;
      prepare(block);
      if (p_.forward && all_held()) {
        if (p_.supcon) collect(block, 0);
        unfinished_ = &block;
      } else {
        backward(block);
      }
    }
    if (unfinished_) finish();
    if (p_.supcon && p_.grad) pull_positives();
  }

 private:
  // A block of anchors, and what is known about them.
  struct Block {
    explicit Block(const Sweep& sweep)
        : anchors(sweep.width_ * sweep.p_.padded),
          transposed(sweep.p_.dim * sweep.width_),
          classes(sweep.width_),
          own(sweep.width_),
          bound(sweep.width_),
          level(sweep.width_),
          push(sweep.width_),
          pull(sweep.width_),
          top(sweep.tiles_ * sweep.width_),
          scale(sweep.tiles_ * sweep.width_),
          sums(sweep.tiles_ * sweep.width_),
          more_sums(sweep.tiles_ * sweep.width_) {}

    int64_t first = 0, valid = 0;           // its first anchor, and how many there are
    Buffer<float> anchors, transposed;      // over the temperature, [width, D'] and [D, width]
    std::vector<int32_t> classes;           // [width]
    std::vector<int64_t> own;               // [width]
    int64_t own_begin = 0, own_end = 0;     // where those that are candidates lie among them
    bool bounded = false;                   // whether exp(s - bound) keeps its precision for all logits s
    Buffer<float> bound;                    // that no logit exceeds, [width]
    Buffer<float> level, push, pull;        // log of the denominator; weights of negatives and of positives; [width]
    Buffer<float> top, scale;               // [tiles, width]: of terms exp(s - top), and what makes them gradients
    std::vector<double> sums, more_sums;    // what tiles find out about anchors, [tiles, width]
  };

  // Candidates that a thread goes over, and their terms: logits, and what takes their place.
  struct Tile {
    int64_t index, first, rows;  // first: its first candidate
    float* terms;
  };

  bool all_held() const { return p_.candidates <= held_; }

  // Lanes beyond the last anchor are zero and of no class.
  void gather(Block& block, int64_t first) const {
    block.first = first;
    block.valid = std::min(width_, p_.count - first);
    block.own_begin = p_.candidates, block.own_end = 0;
    const float inverse = 1.0f / p_.temperature;
    for (int64_t i = 0; i < width_; ++i) {
      const bool inside = i < block.valid;
      block.classes[i] = inside ? p_.row_class[first + i] : -1;
      block.own[i] = inside ? p_.own[first + i] : -1;
      if (block.own[i] >= 0) {
        block.own_begin = std::min(block.own_begin, block.own[i]);
        block.own_end = std::max(block.own_end, block.own[i] + 1);
      }
      const float* from = inside ? p_.anchor_values + p_.rows[first + i] * p_.dim : nullptr;
      for (int64_t d = 0; d < p_.padded; ++d)
        block.anchors[i * p_.padded + d] = inside && d < p_.dim ? from[d] * inverse : 0.0f;
    }
    std::fill(block.bound.begin(), block.bound.end(), 0.0f);
    for (int64_t d = 0; d < p_.dim; ++d) {
      float* values = &block.transposed[d * width_];
      for (int64_t i = 0; i < width_; ++i) {
        values[i] = block.anchors[i * p_.padded + d];
        block.bound[i] += values[i] * values[i];
      }
    }
    block.bounded = true;
    for (float& bound : block.bound) {
      bound = std::sqrt(bound) * p_.longest;
      block.bounded &= bound <= kBounded;  // not so for NaN
    }
  }

  int64_t tiles_of(int64_t chunk) const { return ceil_div(std::min(held_, p_.candidates - chunk), tile_rows_); }

  // Calls f(tile) for all tiles of the candidates from `chunk` on that are held together, the threads sharing them.
  template <class F>
  void each_tile(int64_t chunk, F f) {
    const int64_t held = std::min(held_, p_.candidates - chunk);
    torch::stable::parallel_for(0, tiles_of(chunk), 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t offset = t * tile_rows_;
        f(Tile{t, chunk + offset, std::min(tile_rows_, held - offset), terms_.data() + offset * width_});
      }
    });
  }

  // Calls f(piece) for the pieces of a tile, in their order: what is done with one finds it in the fastest caches.
  template <class F>
  void each_piece(const Tile& tile, F f) const {
    for (int64_t row = 0; row < tile.rows; row += kPiece)
      f(Tile{tile.index, tile.first + row, std::min(kPiece, tile.rows - row), tile.terms + row * width_});
  }

  // How many of the block's lanes have to be computed.
  static int64_t lanes(const Block& block) { return ceil_div(block.valid, kGroup) * kGroup; }

  // Calls f(columns, offset) for the groups of a tile; offset: of the group's first anchor in the block.
  template <class F>
  void each_group(const Block& block, const Tile& tile, F f) const {
    for (int64_t at = 0; at < lanes(block); at += kGroup)
      f(Columns{tile.terms + at, width_, tile.rows, p_.column_class + tile.first, block.classes.data() + at}, at);
  }

  // Puts a value where a candidate of the tile is the anchor itself, for those that are among their own positives, or
  // not among them.
  void set_own(const Block& block, const Tile& tile, float among_positives, float among_negatives) const {
    if (block.own_end <= tile.first || block.own_begin >= tile.first + tile.rows) return;
    for (int64_t i = 0; i < block.valid; ++i) {
      const int64_t row = block.own[i] - tile.first;
      if (block.own[i] < 0 || row < 0 || row >= tile.rows) continue;
      tile.terms[row * width_ + i] =
          p_.column_class[block.own[i]] == block.classes[i] ? among_positives : among_negatives;
    }
  }

  const float* candidates(const Tile& tile) const { return p_.candidate_values + tile.first * p_.padded; }

  // The tile's logits, then the terms of its denominator in their place, and their sums; for "supcon" also those of the
  // positives' logits. Calls before(piece) when a piece's turn comes, and after(piece) when its terms are there.
  template <class Before, class After>
  void compute(Block& block, const Tile& tile, Before before, After after) const {
    float* top = &block.top[tile.index * width_];
    double *sums = &block.sums[tile.index * width_], *positive_sums = &block.more_sums[tile.index * width_];
    for (int64_t i = 0; i < width_; ++i) top[i] = block.bounded ? block.bound[i] : -kInfinity;
    std::fill_n(sums, width_, 0.0);
    std::fill_n(positive_sums, width_, 0.0);
    const auto exponentiate = [&](const Tile& piece) {
      each_group(block, piece, [&](const Columns& columns, int64_t i) {
        kernels().exponentiate(columns, !p_.supcon, top + i, sums + i);
      });
      after(piece);
    };
    each_piece(tile, [&](const Tile& piece) {
      before(piece);
      kernels().multiply(candidates(piece), p_.padded, block.transposed.data(), width_, piece.terms, width_, piece.rows,
                         p_.dim, lanes(block), false);
      if (p_.supcon && p_.forward) {
        set_own(block, piece, 0.0f, 0.0f);
        each_group(block, piece, [&](const Columns& columns, int64_t i) {
          kernels().add_positives(columns, positive_sums + i);
        });
      }
      // The anchor itself is in no sum: at minus infinity the exponential vanishes, at plus infinity softplus and
      // sigmoid do.
      set_own(block, piece, p_.supcon ? -kInfinity : kInfinity, -kInfinity);
      if (block.bounded)
        exponentiate(piece);
      else
        each_group(block, piece, [&](const Columns& columns, int64_t i) {
          kernels().find_top(columns, !p_.supcon, top + i);
        });
    });
    if (!block.bounded) each_piece(tile, exponentiate);
  }

  void compare(Block& block, const Tile& tile) const {
    const int64_t at = tile.index * width_;
    std::fill_n(&block.sums[at], width_, 0.0);
    std::fill_n(&block.more_sums[at], width_, 0.0);
    each_group(block, tile, [&](const Columns& columns, int64_t i) {
      kernels().compare_positives(columns, &block.level[i], &block.sums[at + i], &block.more_sums[at + i]);
    });
  }

  // The losses of a block, while the gradients of the one before are completed. For "supcon" those of the block's own
  // anchors begin here: its terms are what they are made of, but for a factor that can follow.
  void forward(Block& block) {
    std::vector<float> top(width_, -kInfinity);
    std::vector<double> sum(width_, 0.0), positive_sum(width_, 0.0);
    for (int64_t chunk = 0; chunk < p_.candidates; chunk += held_) {
      each_tile(chunk, [&](const Tile& tile) {
        Buffer<float> memory;
        const float* anchors = unfinished_ ? weighted_anchors(*unfinished_, tile, memory) : nullptr;
        compute(
            block, tile,
            [&](const Tile& piece) {
              if (unfinished_) differentiate(*unfinished_, tile, piece, anchors);
            },
            [&](const Tile& piece) {
              if (p_.supcon && p_.grad && all_held()) add_to_anchors(block, tile, piece);
            });
      });
      each_part(block, chunk, [&](int64_t part, int64_t i) {
        const float before = top[i], now = block.top[part];
        if (now > before) {
          top[i] = now;
          sum[i] *= std::exp(before - now);
        }
        // A tile without any term of the denominator has added nothing, unless it is NaN.
        const bool scaled = now != top[i] && now != -kInfinity;
        sum[i] += scaled ? block.sums[part] * std::exp(now - top[i]) : block.sums[part];
        positive_sum[i] += block.more_sums[part];
      });
    }
    if (unfinished_ && !p_.supcon) collect(*unfinished_, 0);
    for (int64_t i = 0; i < block.valid; ++i) p_.lse[block.first + i] = std::log(sum[i]) + top[i];
    if (!p_.supcon) return compare_all(block);
    for (int64_t i = 0; i < block.valid; ++i) {
      const int64_t row = block.first + i;
      p_.loss[row] = p_.lse[row] - positive_sum[i] / double(p_.num_positives[row]);
      p_.weight[row] = 1.0;
    }
  }

  // Loss and weight of "per_positive".
  void compare_all(Block& block) {
    read_level(block);
    std::vector<double> softplus(width_, 0.0), sigmoid(width_, 0.0);
    for (int64_t chunk = 0; chunk < p_.candidates; chunk += held_) {
      each_tile(chunk, [&](const Tile& tile) {
        if (!all_held()) compute(block, tile, nothing, nothing);
        compare(block, tile);
      });
      each_part(block, chunk, [&](int64_t part, int64_t i) {
        softplus[i] += block.sums[part];
        sigmoid[i] += block.more_sums[part];
      });
    }
    for (int64_t i = 0; i < block.valid; ++i) {
      const double positives = double(p_.num_positives[block.first + i]);
      p_.loss[block.first + i] = softplus[i] / positives;
      p_.weight[block.first + i] = sigmoid[i] / positives;
    }
  }

  static void nothing(const Tile&) {}

  // Calls f(part, anchor) for what every tile has found out about every anchor, tile by tile.
  template <class F>
  void each_part(const Block& block, int64_t chunk, F f) const {
    for (int64_t t = 0; t < tiles_of(chunk); ++t)
      for (int64_t i = 0; i < block.valid; ++i) f(t * width_ + i, i);
  }

  void read_level(Block& block) const {
    for (int64_t i = 0; i < width_; ++i) block.level[i] = i < block.valid ? float(p_.lse[block.first + i]) : 0.0f;
  }

  // What the gradients of a block need of its losses.
  void prepare(Block& block) const {
    read_level(block);
    for (int64_t i = 0; i < width_; ++i) {
      const int64_t row = block.first + i;
      const bool inside = i < block.valid;
      block.push[i] = inside ? p_.grad[row] * float(p_.weight[row]) : 0.0f;
      block.pull[i] = inside ? p_.grad[row] / float(p_.num_positives[row]) : 0.0f;
    }
    if (!p_.forward || !all_held()) return;
    set_scale(block, 0);
    for (int64_t t = 1; t < tiles_; ++t)
      if (block.bounded)
        std::copy_n(block.scale.begin(), width_, block.scale.begin() + t * width_);
      else
        set_scale(block, t);
  }

  void set_scale(Block& block, int64_t tile) const {
    for (int64_t i = 0; i < width_; ++i) {
      const int64_t at = tile * width_ + i;
      const bool inside = i < block.valid;
      block.scale[at] = inside ? block.push[i] * float(std::exp(block.top[at] - p_.lse[block.first + i])) : 0.0f;
    }
  }

  // The gradients of a block, its terms computed again.
  void backward(Block& block) {
    for (int64_t chunk = 0; chunk < p_.candidates; chunk += held_) {
      each_tile(chunk, [&](const Tile& tile) {
        compute(block, tile, nothing, [&](const Tile& piece) {
          if (p_.supcon) add_to_anchors(block, tile, piece);
        });
        if (!p_.supcon) compare(block, tile);
        set_scale(block, tile.index);
        differentiate(block, tile);
      });
      collect(block, chunk);
    }
  }

  // The gradients of the last block, whose terms its forward pass has left.
  void finish() {
    each_tile(0, [&](const Tile& tile) { differentiate(*unfinished_, tile); });
    if (!p_.supcon) collect(*unfinished_, 0);
  }

  void differentiate(const Block& block, const Tile& tile) {
    Buffer<float> memory;
    const float* anchors = weighted_anchors(block, tile, memory);
    each_piece(tile, [&](const Tile& piece) { differentiate(block, tile, piece, anchors); });
  }

  // What a tile's terms are multiplied by for the gradient of the candidates, [width, D']. For "supcon" that is cheaper
  // than to weigh the terms.
  const float* weighted_anchors(const Block& block, const Tile& tile, Buffer<float>& memory) const {
    if (!p_.supcon || !p_.grad_candidates) return block.anchors.data();
    memory.resize(width_ * p_.padded);
    for (int64_t i = 0; i < width_; ++i)
      for (int64_t d = 0; d < p_.padded; ++d)
        memory[i * p_.padded + d] = block.anchors[i * p_.padded + d] * block.scale[tile.index * width_ + i];
    return memory.data();
  }

  // What a piece of a tile adds to the gradients: for "supcon" only to that of the candidates.
  void differentiate(const Block& block, const Tile& tile, const Tile& piece, const float* anchors) {
    if (!p_.supcon) {
      each_group(block, piece, [&](const Columns& columns, int64_t i) {
        kernels().weigh(columns, &block.scale[tile.index * width_ + i], &block.pull[i]);
      });
      add_to_anchors(block, tile, piece);
    }
    if (!p_.grad_candidates) return;
    each_differentiable(piece, [&](int64_t begin, int64_t end) {
      kernels().multiply(piece.terms + begin * width_, width_, anchors, p_.padded,
                         p_.grad_candidates + (piece.first + begin) * p_.padded, p_.padded, end - begin, block.valid,
                         p_.padded, true);
    });
  }

  void add_to_anchors(const Block& block, const Tile& tile, const Tile& piece) {
    if (!p_.grad_anchors) return;
    kernels().multiply_transposed(piece.terms, width_, candidates(piece), p_.padded,
                                  &partial_[tile.index * width_ * p_.padded], p_.padded, block.valid, piece.rows,
                                  p_.padded, piece.first > tile.first);
  }

  // Calls f(begin, end) for the rows of a tile, one after the other, whose gradient is wanted.
  template <class F>
  void each_differentiable(const Tile& tile, F f) const {
    const bool *from = p_.differentiable + tile.first, *last = from + tile.rows, *at = from;
    while ((at = std::find(at, last, true)) != last) {
      const bool* end = std::find(at, last, false);
      f(at - from, end - from);
      at = end;
    }
  }

  // Adds what the tiles have contributed to the gradient of the anchors, in the tiles' order.
  void collect(const Block& block, int64_t chunk) {
    if (!p_.grad_anchors) return;
    torch::stable::parallel_for(0, block.valid, ceil_div(2048, p_.padded), [&](int64_t begin, int64_t end) {
      Buffer<float> sum(p_.dim);
      for (int64_t i = begin; i < end; ++i) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int64_t t = 0; t < tiles_of(chunk); ++t) {
          const float scale = p_.supcon ? block.scale[t * width_ + i] : 1.0f;
          const float* part = &partial_[(t * width_ + i) * p_.padded];
          for (int64_t d = 0; d < p_.dim; ++d) sum[d] += scale * part[d];
        }
        float* gradient = p_.grad_anchors + p_.rows[block.first + i] * p_.dim;
        for (int64_t d = 0; d < p_.dim; ++d) gradient[d] += sum[d] / p_.temperature;
      }
    });
  }

  // Takes the positives' part of "supcon" from the gradients.
  void pull_positives() {
    const PositivePairs pairs{
        .anchors = {p_.count, p_.anchor_values, p_.dim, p_.rows, p_.row_class},
        .candidates = {p_.candidates, p_.candidate_values, p_.padded, nullptr, p_.column_class},
        .dim = p_.dim,
        .own = p_.own,
        .num_positives = p_.num_positives,
        .temperature = p_.temperature,
    };
    pairs.pull(
        p_.grad,
        [&](int64_t i) -> float* { return p_.grad_anchors ? p_.grad_anchors + p_.rows[i] * p_.dim : nullptr; },
        [&](int64_t j) -> float* {
          return p_.grad_candidates && p_.differentiable[j] ? p_.grad_candidates + j * p_.padded : nullptr;
        });
  }

  const Problem p_;
  const int64_t tile_rows_, width_, held_, tiles_;
  Buffer<float> terms_;    // [held, width]
  Buffer<float> partial_;  // what tiles add to the gradient of the block's anchors, [tiles, width, D']
  Block blocks_[2];
  Block* unfinished_ = nullptr;  // whose terms are held, and whose gradients are not yet complete
};

void infonce_sweep(Tensor anchors, Tensor rows, Tensor row_class, Tensor own, Tensor num_positives, Tensor candidates,
                   Tensor column_class, Tensor differentiable, double longest, double temperature, bool supcon,
                   bool forward, Tensor loss, Tensor lse, Tensor weight, std::optional<Tensor> grad,
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
      .longest = float(longest),
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
//   longest: the largest length of a candidate
//   loss, lse, weight float64 [m]: written with `forward`, otherwise lse and weight are read
//   grad float32 [m], the gradient of each loss; without it no gradient is computed
//   grad_anchors float32 [M, D] and grad_candidates float32 [n, D'] are added to
STABLE_TORCH_LIBRARY_FRAGMENT(cldf_fast, m) {
  m.def("infonce_sweep(Tensor anchors, Tensor rows, Tensor row_class, Tensor own, Tensor num_positives, "
        "Tensor candidates, Tensor column_class, Tensor differentiable, float longest, float temperature, bool supcon, "
        "bool forward, Tensor(a!) loss, Tensor(b!) lse, Tensor(c!) weight, Tensor? grad, Tensor(d!)? grad_anchors, "
        "Tensor(e!)? grad_candidates) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cldf_fast, CPU, m) { m.impl("infonce_sweep", TORCH_BOX(&infonce_sweep)); }
