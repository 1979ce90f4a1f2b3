// Loops of csrc/cpu/norm.cpp over the values of a slab: a vector of channels at a time, pixel after pixel, so that what
// is known of the channels stays in registers; of a single channel, a vector of pixels at a time.

#include "../norm_kernels.h"

#include "lanes.h"
#include "vector_math.h"

namespace cldf_fast::CLDF_ISA {
namespace {

// Vectors that share their channels: the first one's place in the slab, how many follow and how far apart, and where
// the channels' coefficients are.
template <class Lanes>
struct Column {
  Lanes lanes;
  int64_t first, count, stride, channel;
  bool one_channel;

  CLDF_INLINE Floats coefficients(const float* of_channels) const {
    return one_channel ? broadcast(*of_channels) : lanes.load(of_channels + channel);
  }

  // Adds what the vectors' lanes have summed up to the channels' sums.
  CLDF_INLINE void add_up(Floats values, float* of_channels) const {
    if (one_channel)
      *of_channels += sum_of(values);
    else
      lanes.store(of_channels + channel, lanes.load(of_channels + channel) + values);
  }
};

template <class F>
CLDF_INLINE void each_column(Slab slab, F f) {
  const bool one_channel = slab.channels == 1;
  const int64_t length = one_channel ? slab.pixels : slab.channels, vectors = length / kLanes, rest = length % kLanes;
  if (one_channel) {
    f(Column<All>{{}, 0, vectors, kLanes, 0, true});
    if (rest) f(Column<Some>{{rest}, vectors * kLanes, 1, kLanes, 0, true});
  } else {
    for (int64_t v = 0; v < vectors; ++v)
      f(Column<All>{{}, v * kLanes, slab.pixels, slab.channels, v * kLanes, false});
    if (rest) f(Column<Some>{{rest}, vectors * kLanes, slab.pixels, slab.channels, vectors * kLanes, false});
  }
}

CLDF_INLINE Floats sigmoid(Floats z) {
  // The exponential's range ends at 88, where the quotient is as good as 0.
  const Floats negative = -z;
  return 1.0f / (1.0f + exponential(minimum(broadcast(88.0f), negative)));
}

void moments(const float* x, Slab slab, const float* pivot, float* sums, float* squares) {
  for (int64_t c = 0; c < slab.channels; ++c) sums[c] = squares[c] = 0.0f;
  each_column(slab, [&](auto column) {
    const Floats center = column.coefficients(pivot);
    Floats sum[2] = {}, square[2] = {};
    const auto add = [&](int64_t i, int place) {
      const Floats value = column.lanes.only(column.lanes.load(x + column.first + i * column.stride) - center);
      sum[place] += value;
      square[place] += value * value;
    };
    int64_t i = 0;
    for (; i + 2 <= column.count; i += 2) {
      add(i, 0);
      add(i + 1, 1);
    }
    if (i < column.count) add(i, 0);
    column.add_up(sum[0] + sum[1], sums);
    column.add_up(square[0] + square[1], squares);
  });
}

template <bool kSilu>
void apply_by(const float* x, Slab slab, const NormChannels& channels, float* out) {
  each_column(slab, [&](auto column) {
    const Floats mean = column.coefficients(channels.mean), slope = column.coefficients(channels.slope),
                 shift = column.coefficients(channels.shift);
    for (int64_t i = 0; i < column.count; ++i) {
      const int64_t at = column.first + i * column.stride;
      const Floats z = (column.lanes.load(x + at) - mean) * slope + shift;
      column.lanes.store(out + at, kSilu ? z * sigmoid(z) : z);
    }
  });
}

void apply(const float* x, Slab slab, const NormChannels& channels, bool silu, float* out) {
  (silu ? apply_by<true> : apply_by<false>)(x, slab, channels, out);
}

template <bool kSilu>
void differentiate_by(const float* x, const float* grad, Slab slab, const NormChannels& channels, float* grad_z,
                      float* sums, float* products) {
  for (int64_t c = 0; c < slab.channels; ++c) sums[c] = products[c] = 0.0f;
  each_column(slab, [&](auto column) {
    const Floats mean = column.coefficients(channels.mean), slope = column.coefficients(channels.slope),
                 shift = column.coefficients(channels.shift), rstd = column.coefficients(channels.rstd);
    Floats sum{}, product{};
    for (int64_t i = 0; i < column.count; ++i) {
      const int64_t at = column.first + i * column.stride;
      const Floats centered = column.lanes.load(x + at) - mean;
      Floats by_z = column.lanes.load(grad + at);
      if (kSilu) {
        const Floats z = centered * slope + shift, gate = sigmoid(z);
        by_z *= gate * (1.0f + z * (1.0f - gate));
      }
      column.lanes.store(grad_z + at, by_z);
      sum += by_z;
      product += by_z * centered;
    }
    column.add_up(sum, sums);
    column.add_up(product * rstd, products);
  });
}

void differentiate(const float* x, const float* grad, Slab slab, const NormChannels& channels, bool silu, float* grad_z,
                   float* sums, float* products) {
  (silu ? differentiate_by<true> : differentiate_by<false>)(x, grad, slab, channels, grad_z, sums, products);
}

void combine(const float* x, Slab slab, const NormChannels& channels, const float* constant, const float* linear,
             float* grad) {
  each_column(slab, [&](auto column) {
    const Floats mean = column.coefficients(channels.mean), slope = column.coefficients(channels.slope),
                 offset = column.coefficients(constant), factor = column.coefficients(linear);
    for (int64_t i = 0; i < column.count; ++i) {
      const int64_t at = column.first + i * column.stride;
      const Floats centered = column.lanes.load(x + at) - mean;
      column.lanes.store(grad + at, column.lanes.load(grad + at) * slope - offset - centered * factor);
    }
  });
}

}  // namespace

extern const NormKernels norm_kernels{moments, apply, differentiate, combine};

}  // namespace cldf_fast::CLDF_ISA
