// Loops over the arithmetic of csrc/include/saliency.h, a chunk of elements at a time. Most are written so that the
// compiler vectorises them; sums, whose order it may not change, are in vectors by hand.

#include "../saliency_kernels.h"

#include "../half_precision.h"
#include "philox.h"
#include "vector_math.h"

namespace cldf_fast::CLDF_ISA {
namespace {

// --- Any dtype in and out --------------------------------------------------------------------------------------------

template <class T, class F>
CLDF_INLINE void gather(const void* from, int64_t stride, int64_t count, float* to, F widen) {
  const T* values = static_cast<const T*>(from);
  if (stride == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = widen(values[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = widen(values[i * stride]);
}

// The values as contiguous floats: where they are, or in `buffer`.
const float* read(const Values& values, int64_t count, float* buffer) {
  if (values.dtype == Dtype::float32 && values.stride == 1) return static_cast<const float*>(values.first);
  if (values.dtype == Dtype::float32)
    gather<float>(values.first, values.stride, count, buffer, [](float value) { return value; });
  else if (values.dtype == Dtype::bfloat16)
    gather<uint16_t>(values.first, values.stride, count, buffer, [](uint16_t bits) { return from_bfloat16(bits); });
  else
    gather<uint16_t>(values.first, values.stride, count, buffer, [](uint16_t bits) { return from_float16(bits); });
  return buffer;
}

// The values from an element on, counted from the first one.
Values shifted(const Values& values, int64_t elements) {
  const int64_t size = values.dtype == Dtype::float32 ? 4 : 2;
  return {static_cast<const char*>(values.first) + elements * size, values.dtype, values.stride};
}

void write(const float* values, Dtype dtype, int64_t count, void* out) {
  uint16_t* halves = static_cast<uint16_t*>(out);
  if (dtype == Dtype::bfloat16)
    for (int64_t i = 0; i < count; ++i) halves[i] = to_bfloat16(values[i]);
  else
    for (int64_t i = 0; i < count; ++i) halves[i] = to_float16(values[i]);
}

// --- Seeds and noise -------------------------------------------------------------------------------------------------

uint64_t hash(const void* x, Dtype dtype, int64_t count, int64_t position) {
  float buffer[kChunk];
  const float* values = read({x, dtype, 1}, count, buffer);
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += element_hash(uint64_t(position + i), values[i]);
  return sum;
}

void add_noise(const void* x, Dtype dtype, int64_t count, uint64_t seed, int64_t level, int64_t block,
               NoiseScales scales, void* out) {
  constexpr int64_t kPairs = kChunk / 2;
  uint32_t words[kChunk + 4 * kPhiloxBlocks];
  float firsts[kPairs], seconds[kPairs], noise[kChunk], buffer[kChunk];
  const int64_t blocks = (count + 3) / 4;
  philox_blocks(seed, uint32_t(block), uint32_t(level), 0, kNoiseStream, blocks, words);
  for (int64_t j = 0; j < 2 * blocks; ++j) {
    const NormalPair pair = normal_pair(words[2 * j], words[2 * j + 1]);
    firsts[j] = pair.first;
    seconds[j] = pair.second;
  }
  for (int64_t j = 0; j < 2 * blocks; ++j) {
    noise[2 * j] = firsts[j];
    noise[2 * j + 1] = seconds[j];
  }
  const float* values = read({x, dtype, 1}, count, buffer);
  float* result = dtype == Dtype::float32 ? static_cast<float*>(out) : noise;
  for (int64_t i = 0; i < count; ++i) result[i] = noised(values[i], noise[i], scales);
  if (dtype != Dtype::float32) write(result, dtype, count, out);
}

// --- Saliency --------------------------------------------------------------------------------------------------------

// Calls use(magnitude), where magnitude(i) is that of pixel i. value(c, i): channel c of it.
template <Reduce kReduce, int kChannels, class Value, class Use>
CLDF_INLINE void with_magnitude(Value value, Use use) {
  use([&](int64_t i) {
    Magnitude<kReduce> pixel;
    for (int c = 0; c < kChannels; ++c) pixel.add(value(c, i));
    return pixel.value();
  });
}

// A channel after the other, or each pixel's channels side by side.
template <Reduce kReduce, int kChannels, class Use>
CLDF_INLINE void with_few(const Values& values, int64_t channel_stride, int64_t count, Use use) {
  float buffer[kChannels * kChunk];
  if (kChannels > 1 && channel_stride == 1 && values.stride == kChannels) {
    const float* all = read({values.first, values.dtype, 1}, kChannels * count, buffer);
    with_magnitude<kReduce, kChannels>([=](int c, int64_t i) { return all[kChannels * i + c]; }, use);
  } else {
    const float* channels[kChannels];
    for (int c = 0; c < kChannels; ++c)
      channels[c] = read(shifted(values, c * channel_stride), count, buffer + c * kChunk);
    with_magnitude<kReduce, kChannels>([&](int c, int64_t i) { return channels[c][i]; }, use);
  }
}

template <Reduce kReduce, class Use>
CLDF_INLINE void with_many(const Values& values, int64_t channels, int64_t channel_stride, int64_t count, Use use) {
  Magnitude<kReduce> pixels[kChunk];
  float buffer[kChunk];
  for (int64_t c = 0; c < channels; ++c) {
    const float* channel = read(shifted(values, c * channel_stride), count, buffer);
    for (int64_t i = 0; i < count; ++i) pixels[i].add(channel[i]);
  }
  use([&](int64_t i) { return pixels[i].value(); });
}

template <Reduce kReduce, class Use>
CLDF_INLINE void with_any(const Values& values, int64_t channels, int64_t channel_stride, int64_t count, Use use) {
  if (channels == 1)
    with_few<kReduce, 1>(values, channel_stride, count, use);
  else if (channels == 2)
    with_few<kReduce, 2>(values, channel_stride, count, use);
  else if (channels == 3)
    with_few<kReduce, 3>(values, channel_stride, count, use);
  else if (channels == 4)
    with_few<kReduce, 4>(values, channel_stride, count, use);
  else
    with_many<kReduce>(values, channels, channel_stride, count, use);
}

// See `with_magnitude`.
template <class Use>
CLDF_INLINE void with_magnitudes(Reduce reduce, const Values& values, int64_t channels, int64_t channel_stride,
                                 int64_t count, Use use) {
  if (reduce == Reduce::max_abs)
    with_any<Reduce::max_abs>(values, channels, channel_stride, count, use);
  else if (reduce == Reduce::sum_abs)
    with_any<Reduce::sum_abs>(values, channels, channel_stride, count, use);
  else
    with_any<Reduce::l2>(values, channels, channel_stride, count, use);
}

double sum_magnitudes(Reduce reduce, const Values& values, int64_t channels, int64_t channel_stride, int64_t count) {
  double sum = 0.0;
  with_magnitudes(reduce, values, channels, channel_stride, count, [&](auto magnitude) {
    constexpr int64_t kLanes = 16;
    double lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += magnitude(i + lane);
    for (; i < count; ++i) sum += magnitude(i);
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  });
  return sum;
}

void add_magnitudes(Reduce reduce, const Values& values, int64_t channels, int64_t channel_stride, int64_t count,
                    double weight, bool first, double* out) {
  with_magnitudes(reduce, values, channels, channel_stride, count, [=](auto magnitude) {
    if (first)
      for (int64_t i = 0; i < count; ++i) out[i] = weight * magnitude(i);
    else
      for (int64_t i = 0; i < count; ++i) out[i] += weight * magnitude(i);
  });
}

// kVectors vectors of out, in registers while the taps go by.
template <int kVectors>
CLDF_INLINE void combine_block(const double* const* rows, const double* weights, int64_t num_rows, int64_t x,
                               double* out) {
  Doubles sums[kVectors] = {};
  for (int64_t i = 0; i < num_rows; ++i)
    for (int v = 0; v < kVectors; ++v) sums[v] += weights[i] * load(rows[i] + x + v * kDoubles);
  for (int v = 0; v < kVectors; ++v) store(out + x + v * kDoubles, sums[v]);
}

// `combine` from x on.
void combine_from(int64_t x, const double* const* rows, const double* weights, int64_t num_rows, int64_t count,
                  double* out) {
  for (; x + 8 * kDoubles <= count; x += 8 * kDoubles) combine_block<8>(rows, weights, num_rows, x, out);
  for (; x + kDoubles <= count; x += kDoubles) combine_block<1>(rows, weights, num_rows, x, out);
  for (; x < count; ++x) {
    double sum = 0.0;
    for (int64_t i = 0; i < num_rows; ++i) sum += weights[i] * rows[i][x];
    out[x] = sum;
  }
}

void combine(const double* const* rows, const double* weights, int64_t num_rows, int64_t count, double* out) {
  combine_from(0, rows, weights, num_rows, count, out);
}

// kVectors vectors of all rows of out. A row of input is read once: the taps that it meets differ from row to row.
template <int kVectors>
CLDF_INLINE void combine_down_block(const double* const* rows, const double* weights, int64_t num_rows, int64_t x,
                                    double* const* out) {
  Doubles sums[kBlurRows][kVectors] = {};
  const auto add = [&](int64_t i, int first, int last) {
    Doubles row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = load(rows[i] + x + v * kDoubles);
    for (int r = first; r <= last; ++r)
      for (int v = 0; v < kVectors; ++v) sums[r][v] += weights[i - r] * row[v];
  };
  constexpr int kLast = kBlurRows - 1;
  for (int i = 0; i < kLast; ++i) add(i, 0, i);
  for (int64_t i = kLast; i < num_rows; ++i) add(i, 0, kLast);
  for (int i = 0; i < kLast; ++i) add(num_rows + i, i + 1, kLast);
  for (int r = 0; r < kBlurRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(out[r] + x + v * kDoubles, sums[r][v]);
}

void combine_down(const double* const* rows, const double* weights, int64_t num_rows, int64_t count,
                  double* const* out) {
  int64_t x = 0;
  if (num_rows >= kBlurRows)
    for (; x + 2 * kDoubles <= count; x += 2 * kDoubles) combine_down_block<2>(rows, weights, num_rows, x, out);
  for (int64_t r = 0; r < kBlurRows; ++r) combine_from(x, rows + r, weights, num_rows, count, out[r]);
}

void extremes(const double* values, int64_t count, double* least, double* most) {
  Doubles low = values[0] - Doubles{}, high = low;
  int64_t i = 0;
  for (; i + kDoubles <= count; i += kDoubles) {
    const Doubles some = load(values + i);
    low = some < low ? some : low;
    high = some > high ? some : high;
  }
  for (int64_t lane = 0; lane < kDoubles && i < count; ++lane, ++i) {
    low[lane] = values[i] < low[lane] ? values[i] : low[lane];
    high[lane] = values[i] > high[lane] ? values[i] : high[lane];
  }
  *least = low[0];
  *most = high[0];
  for (int64_t lane = 1; lane < kDoubles; ++lane) {
    *least = low[lane] < *least ? low[lane] : *least;
    *most = high[lane] > *most ? high[lane] : *most;
  }
}

int64_t count_up_to(const double* values, int64_t count, double bound) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) found += values[i] <= bound;
  return found;
}

int64_t collect(const double* values, int64_t count, double low, double high, double* out) {
  constexpr int64_t kBlock = 32;
  const auto is_wanted = [&](double value) { return (value > low) & (value <= high); };
  int64_t found = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = begin + kBlock < count ? begin + kBlock : count;
    int64_t wanted = 0;
    for (int64_t i = begin; i < end; ++i) wanted += is_wanted(values[i]);
    if (!wanted) continue;
    for (int64_t i = begin; i < end; ++i) {
      const double value = values[i];
      out[found] = value;
      found += is_wanted(value);
    }
  }
  return found;
}

void scale(const double* saliency, double scale, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = scaled_saliency(saliency[i], scale);
}

// --- Fusion ----------------------------------------------------------------------------------------------------------

// What is known of a chunk's pixels after some of the classes.
struct Fusions {
  float best[kChunk];
  int32_t winner[kChunk], unclear[kChunk];
};

// A class more. kFirst: nothing is known yet. kLast: what comes out is the label.
template <bool kFirst, bool kLast>
void add_class(const float* gradients, const float* cams, const Thresholds& thresholds, int32_t label,
                           int64_t count, Fusions& known, int8_t* labels) {
  const Thresholds at = thresholds;
  for (int64_t i = 0; i < count; ++i) {
    Fusion pixel;
    if (!kFirst) pixel = {known.best[i], known.winner[i], known.unclear[i]};
    pixel.add(gradients[i], cams[i], at, label);
    if (kLast) {
      labels[i] = pixel.label();
    } else {
      known.best[i] = pixel.best;
      known.winner[i] = pixel.winner;
      known.unclear[i] = pixel.unclear;
    }
  }
}

void fuse(const Values& gradient_map, int64_t gradient_stride, const Values& cam, int64_t cam_stride,
          const bool* present, int64_t classes, const Thresholds& thresholds, int64_t count, int8_t* labels) {
  float gradient_buffer[kChunk], cam_buffer[kChunk];
  Fusions known;
  int64_t first = 0, last = classes - 1;
  while (first < classes && !present[first]) ++first;
  while (last > first && !present[last]) --last;
  if (first == classes)
    for (int64_t i = 0; i < count; ++i) labels[i] = Fusion{}.label();
  for (int64_t k = first; k <= last; ++k) {
    if (!present[k]) continue;
    const float* gradients = read(shifted(gradient_map, k * gradient_stride), count, gradient_buffer);
    const float* cams = read(shifted(cam, k * cam_stride), count, cam_buffer);
    const auto add = k == first ? (k == last ? add_class<true, true> : add_class<true, false>)
                                : (k == last ? add_class<false, true> : add_class<false, false>);
    add(gradients, cams, thresholds, int32_t(k + 1), count, known, labels);
  }
}

}  // namespace

extern const SaliencyKernels saliency_kernels{hash,         add_noise, sum_magnitudes, add_magnitudes, combine,
                                              combine_down, extremes,  count_up_to,    collect,        scale,
                                              fuse};

}  // namespace cldf_fast::CLDF_ISA
