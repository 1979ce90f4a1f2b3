// The arithmetic of pixel InfoNCE on tiles of logits, [candidates, anchors]: the lanes of a vector are anchors, so that
// sums over candidates need no shuffles, and candidates are sorted by class, so that one comparison of lanes serves all
// candidates of a class.

#include "../infonce_kernels.h"

#include "product.h"
#include "vector_math.h"

namespace cldf_fast::CLDF_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

// Rows whose terms are added in float32 before the sum goes on in float64.
constexpr int64_t kFloatRows = 128;
// Vectors that a pass over a tile takes along: with their sums and whatever an exponential needs they fill the
// registers.
#if defined(__AVX512F__)
constexpr int64_t kWide = 4;
#else
constexpr int64_t kWide = 2;
#endif

// --- Passes ---------------------------------------------------------------------------------------------------------

// Passes take what describes a tile by value: a copy that no store can change stays in registers.

struct Vectors {
  Floats lanes[kWide];
};

CLDF_INLINE Vectors filled(float value) {
  Vectors vectors;
  for (auto& lanes : vectors.lanes) lanes = broadcast(value);
  return vectors;
}

CLDF_INLINE Vectors load_all(const float* from) {
  Vectors vectors;
  for (int64_t v = 0; v < kWide; ++v) vectors.lanes[v] = load(from + v * kLanes);
  return vectors;
}

CLDF_INLINE void add_all(double* to, const Vectors& vectors) {
  for (const Floats& lanes : vectors.lanes)
    for (int64_t half = 0; half < 2; ++half, to += kDoubles) store(to, load(to) + half_of(lanes, half));
}

// Candidates of one class, one after the other, and which of some anchors have them as positives.
struct Run {
  int64_t begin, end;
  Ints positive[kWide];
  bool any, all;
};

// Calls f(run) for a tile's candidates and the anchors of kWide vectors.
template <class F>
CLDF_INLINE void each_run(const Columns tile, const int32_t* lane_class, F f) {
  Run run{};
  for (run.begin = 0; run.begin < tile.rows; run.begin = run.end) {
    const int32_t label = tile.row_class[run.begin];
    run.end = run.begin + 1;
    while (run.end < tile.rows && tile.row_class[run.end] == label) ++run.end;
    Ints counts{};
    for (int64_t v = 0; v < kWide; ++v) {
      run.positive[v] = load(lane_class + v * kLanes) == label;
      counts -= run.positive[v];
    }
    int64_t count = 0;
    for (int64_t i = 0; i < kLanes; ++i) count += counts[i];
    run.any = count > 0;
    run.all = count == kWide * kLanes;
    f(run);
  }
}

// Calls f(first lane) for every kWide vectors of a group.
template <class F>
CLDF_INLINE void each_part(F f) {
  for (int64_t lane = 0; lane < kGroup; lane += kWide * kLanes) f(lane);
}

void add_positives(const Columns tile, double* positive_sum) {
  each_part([&](int64_t lane) {
    each_run(tile, tile.lane_class + lane, [&](const Run& run) {
      if (!run.any) return;
      for (int64_t begin = run.begin; begin < run.end; begin += kFloatRows) {
        Vectors total = filled(0.0f);
        for (int64_t row = begin; row < least(begin + kFloatRows, run.end); ++row)
          for (int64_t v = 0; v < kWide; ++v) {
            const Floats s = load(tile.values + row * tile.stride + lane + v * kLanes);
            total.lanes[v] += run.positive[v] ? s : Floats{};
          }
        add_all(positive_sum + lane, total);
      }
    });
  });
}

void find_top(const Columns tile, bool keep_positives, float* top) {
  each_part([&](int64_t lane) {
    Vectors most = load_all(top + lane);
    each_run(tile, tile.lane_class + lane, [&](const Run& run) {
      if (keep_positives && run.all) return;
      const bool mixed = keep_positives && run.any;
      for (int64_t row = run.begin; row < run.end; ++row)
        for (int64_t v = 0; v < kWide; ++v) {
          const Floats s = load(tile.values + row * tile.stride + lane + v * kLanes);
          most.lanes[v] = maximum(mixed ? (run.positive[v] ? broadcast(-kInfinity) : s) : s, most.lanes[v]);
        }
    });
    for (int64_t v = 0; v < kWide; ++v) store(top + lane + v * kLanes, most.lanes[v]);
  });
}

// Of one class, or of any where there are no positives to keep.
template <bool kMixed>
CLDF_INLINE void exponentiate_run(const Columns tile, int64_t lane, const Run run, const Vectors top, double* sum) {
  for (int64_t begin = run.begin; begin < run.end; begin += kFloatRows) {
    Vectors total = filled(0.0f);
    for (int64_t row = begin; row < least(begin + kFloatRows, run.end); ++row)
      for (int64_t v = 0; v < kWide; ++v) {
        float* at = tile.values + row * tile.stride + lane + v * kLanes;
        const Floats s = load(at), e = exponential(s - top.lanes[v]);
        store(at, kMixed ? (run.positive[v] ? s : e) : e);
        total.lanes[v] += kMixed ? (run.positive[v] ? Floats{} : e) : e;
      }
    add_all(sum + lane, total);
  }
}

void exponentiate(const Columns tile, bool keep_positives, const float* top, double* sum) {
  each_part([&](int64_t lane) {
    Vectors most = load_all(top + lane);
    // With nothing to subtract from, differences with minus infinity would be NaN.
    for (auto& lanes : most.lanes) lanes = lanes == -kInfinity ? Floats{} : lanes;
    if (!keep_positives) return exponentiate_run<false>(tile, lane, {.begin = 0, .end = tile.rows}, most, sum);
    each_run(tile, tile.lane_class + lane, [&](const Run& run) {
      if (run.all) return;
      if (run.any)
        exponentiate_run<true>(tile, lane, run, most, sum);
      else
        exponentiate_run<false>(tile, lane, run, most, sum);
    });
  });
}

void compare_positives(const Columns tile, const float* lse, double* softplus_sum, double* sigmoid_sum) {
  each_part([&](int64_t lane) {
    const Vectors level = load_all(lse + lane);
    each_run(tile, tile.lane_class + lane, [&](const Run& run) {
      if (!run.any) return;
      for (int64_t begin = run.begin; begin < run.end; begin += kFloatRows) {
        Vectors softplus_total = filled(0.0f), sigmoid_total = filled(0.0f);
        for (int64_t row = begin; row < least(begin + kFloatRows, run.end); ++row)
          for (int64_t v = 0; v < kWide; ++v) {
            float* at = tile.values + row * tile.stride + lane + v * kLanes;
            const Floats s = load(at), z = level.lanes[v] - s, e = exponential(z < 0.0f ? z : -z);
            const Floats softplus = maximum(z, Floats{}) + log_one_plus(e);
            const Floats sigmoid = (z < 0.0f ? e : broadcast(1.0f)) / (1.0f + e);
            softplus_total.lanes[v] += run.positive[v] ? softplus : Floats{};
            sigmoid_total.lanes[v] += run.positive[v] ? sigmoid : Floats{};
            store(at, run.positive[v] ? sigmoid : s);
          }
        add_all(softplus_sum + lane, softplus_total);
        add_all(sigmoid_sum + lane, sigmoid_total);
      }
    });
  });
}

void weigh(const Columns tile, const float* scale, const float* pull) {
  each_part([&](int64_t lane) {
    const Vectors scales = load_all(scale + lane), pulls = load_all(pull + lane);
    each_run(tile, tile.lane_class + lane, [&](const Run& run) {
      for (int64_t row = run.begin; row < run.end; ++row)
        for (int64_t v = 0; v < kWide; ++v) {
          float* at = tile.values + row * tile.stride + lane + v * kLanes;
          const Floats value = load(at), slope = scales.lanes[v] * value;
          store(at, run.any ? (run.positive[v] ? -pulls.lanes[v] * value : slope) : slope);
        }
    });
  });
}

void add_exponentials(const float* values, int64_t stride, int64_t rows, const float* shift, double* lane_sum,
                      double* row_sum) {
  each_part([&](int64_t lane) {
    const Vectors shifts = load_all(shift + lane);
    for (int64_t begin = 0; begin < rows; begin += kFloatRows) {
      Vectors total = filled(0.0f);
      for (int64_t row = begin; row < least(begin + kFloatRows, rows); ++row) {
        Floats of_row{};
        for (int64_t v = 0; v < kWide; ++v) {
          const Floats e = exponential(load(values + row * stride + lane + v * kLanes) - shifts.lanes[v]);
          total.lanes[v] += e;
          of_row += e;
        }
        if (row_sum) row_sum[row] += double(sum_of(of_row));
      }
      add_all(lane_sum + lane, total);
    }
  });
}

void weigh_exponentials(float* values, int64_t stride, int64_t rows, const float* shift, const float* lane_weight,
                        const float* row_weight) {
  each_part([&](int64_t lane) {
    const Vectors shifts = load_all(shift + lane), weights = load_all(lane_weight + lane);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t v = 0; v < kWide; ++v) {
        float* at = values + row * stride + lane + v * kLanes;
        store(at, exponential(load(at) - shifts.lanes[v]) * (weights.lanes[v] + row_weight[row]));
      }
  });
}

}  // namespace

extern const InfonceKernels infonce_kernels{
    multiply<Layout::rows>, multiply<Layout::columns>, add_positives,    find_top,           exponentiate,
    compare_positives,      weigh,                     add_exponentials, weigh_exponentials,
};

}  // namespace cldf_fast::CLDF_ISA
