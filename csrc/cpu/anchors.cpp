// Class-balanced anchor sampling on the CPU: of every class of every image the pixels that arrive first.
//
// A first pass counts pixels and adds up weights, which tells by when somewhat more pixels than are wanted should have
// arrived. A second pass computes times and collects what arrives by then; only that little is sorted. Where too few
// have arrived, as with weights of very different sizes, time is given in plenty and the pass repeated. Results are
// exact and depend on nothing but the pixels: times are unique once the pixel's index is appended.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <vector>

#include "anchors_kernels.h"
#include "common.h"

namespace {

using namespace cldf_fast;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Pixels whose times are computed at once, and those that a task has.
constexpr int64_t kBlock = 1024, kChunk = 16 * kBlock;

const AnchorKernels& kernels() {
  static const AnchorKernels& chosen = CLDF_BEST(anchor_kernels);
  return chosen;
}

// Sorts by time, which begins at bit 31, a digit after the other from the lowest on. Each pass leaves equals in their
// order, so that pixels that come in ascending order break ties.
void sort_by_time(std::vector<uint64_t>& values) {
  constexpr int kDigit = 8;
  std::vector<uint64_t> sorted(values.size());
  for (int shift = 31; shift < 63; shift += kDigit) {
    const auto digit = [&](uint64_t value) { return value >> shift & ((1 << kDigit) - 1); };
    std::array<size_t, (1 << kDigit) + 1> place{};
    for (const uint64_t value : values) ++place[digit(value) + 1];
    std::partial_sum(place.begin(), place.end(), place.begin());
    for (const uint64_t value : values) sorted[place[digit(value)]++] = value;
    values.swap(sorted);
  }
}

struct Draw {
  int64_t batch, pixels, classes, per_class;
  const float* weights;  // [batch, pixels] or null
  const int64_t *seeds, *images;
  int64_t *indices, *counts;  // [batch, classes, per_class], [batch, classes]
};

// Row: an unsigned integer that holds the number of classes, which stands for pixels of none.
template <class Row>
class Race {
 public:
  explicit Race(const Draw& draw)
      : d_(draw),
        chunks_(ceil_div(d_.pixels, kChunk)),
        rows_(d_.batch * d_.pixels),
        counts_(d_.batch * chunks_ * rows()),
        weights_(d_.weights ? counts_.size() : 0),
        limits_(d_.batch * rows(), kNobody),
        collected_(d_.batch * chunks_ * d_.classes) {}

  template <class Label>
  void run(const Label* labels) {
    each(d_.batch * chunks_, [&](int64_t task) { count(labels, task); });
    for (double patience = 1.0; set_limits(patience); patience *= 4.0)
      each(d_.batch * chunks_, [&](int64_t task) { collect(task); });
    each(d_.batch * d_.classes, [&](int64_t row) { order(row); });
  }

 private:
  // Pixels of no class are counted in a row of their own, and so need no branch.
  int64_t rows() const { return d_.classes + 1; }

  template <class F>
  static void each(int64_t tasks, F f) {
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) f(task);
    });
  }

  // Tasks are the chunks of one image after those of another.
  struct Part {
    int64_t image, begin, end;  // its pixels
  };
  Part part(int64_t task) const {
    const int64_t begin = task % chunks_ * kChunk;
    return {task / chunks_, begin, std::min(begin + kChunk, d_.pixels)};
  }

  template <class Label>
  void count(const Label* labels, int64_t task) {
    const Part p = part(task);
    const int64_t first = p.image * d_.pixels, end = first + p.end, classes = d_.classes, stride = rows();
    const float* weights = d_.weights;
    Row* rows_of_pixels = rows_.data();
    double* sums = weights ? &weights_[task * stride] : nullptr;
    // Neighbours, often of one class, are counted apart: a counter that was just written can't be read at once.
    constexpr uint64_t kApart = 4;
    std::vector<int32_t> counts(kApart * uint64_t(stride));
    int32_t* counters[kApart];
    for (uint64_t i = 0; i < kApart; ++i) counters[i] = &counts[i * uint64_t(stride)];
    for (int64_t at = first + p.begin; at < end; ++at) {
      // One comparison sees labels below 0 too.
      int64_t row = int64_t(std::min(uint64_t(int64_t(labels[at])), uint64_t(classes)));
      if (weights) {
        row = weights[at] > 0.0f ? row : classes;
        sums[row] += weights[at];
      }
      rows_of_pixels[at] = Row(row);
      ++counters[uint64_t(at) % kApart][row];
    }
    for (int64_t row = 0; row < stride; ++row)
      for (const int32_t* counter : counters) counts_[task * stride + row] += counter[row];
  }

  template <class T>
  double total(const std::vector<T>& of_tasks, int64_t image, int64_t label) const {
    double sum = 0.0;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) sum += of_tasks[(image * chunks_ + chunk) * rows() + label];
    return sum;
  }

  int64_t arrived(int64_t image, int64_t label) const {
    int64_t sum = 0;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk)
      sum += int64_t(collected_[(image * chunks_ + chunk) * d_.classes + label].size());
    return sum;
  }

  // Up to when classes that lack pixels are collected, and nobody of the others. False if none does.
  bool set_limits(double patience) {
    // Few of a class arrive later than five standard deviations after they are expected.
    const double wanted = patience * (double(d_.per_class) + 5.0 * std::sqrt(double(d_.per_class)) + 10.0);
    bool lacking = false;
    for (int64_t image = 0; image < d_.batch; ++image)
      for (int64_t label = 0; label < d_.classes; ++label) {
        const double population = total(counts_, image, label);
        const int64_t row = image * d_.classes + label;
        d_.counts[row] = std::min(int64_t(population), d_.per_class);
        const bool lacks = arrived(image, label) < d_.counts[row];
        limits_[image * rows() + label] = !lacks ? kNobody : limit(wanted, population, image, label);
        lacking |= lacks;
      }
    return lacking;
  }

  // The time by which so many would arrive on average if all weights were equal; fewer do if they are not. Without
  // weights times are whole numbers below 2^32, with weights float32 bits.
  int64_t limit(double wanted, double population, int64_t image, int64_t label) const {
    constexpr int64_t kEverybody = kNever - 1;
    if (wanted >= population) return d_.weights ? kEverybody : kNever;
    if (!d_.weights) return int64_t(wanted / population * 4294967296.0);
    const double mean_weight = total(weights_, image, label) / population;
    const float time = float(-std::log1p(-wanted / population) / mean_weight);
    if (!(time > 0.0f)) return kEverybody;  // infinite weights
    uint32_t bits;
    std::memcpy(&bits, &time, sizeof(bits));
    return bits;
  }

  void collect(int64_t task) {
    const Part p = part(task);
    const int64_t* limits = &limits_[p.image * rows()];
    std::vector<uint64_t>* collected = &collected_[task * d_.classes];
    for (int64_t k = 0; k < d_.classes; ++k)
      if (limits[k] != kNobody) collected[k].clear();
    uint32_t times[kBlock];
    for (int64_t first = p.begin; first < p.end; first += kBlock) {
      const int64_t at = p.image * d_.pixels + first, count = std::min(kBlock, p.end - first);
      kernels().arrival_times(uint64_t(d_.seeds[p.image]), uint64_t(d_.images[p.image]), uint32_t(first), count,
                              d_.weights ? d_.weights + at : nullptr, times);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = rows_[at + i];
        if (int64_t(times[i]) <= limits[row])
          collected[row].push_back(uint64_t(times[i]) << 31 | uint64_t(first + i));
      }
    }
  }

  void order(int64_t row) {
    const int64_t image = row / d_.classes, label = row % d_.classes, count = d_.counts[row];
    std::vector<uint64_t> all;
    all.reserve(arrived(image, label));
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const auto& part = collected_[(image * chunks_ + chunk) * d_.classes + label];
      all.insert(all.end(), part.begin(), part.end());
    }
    sort_by_time(all);
    int64_t* indices = d_.indices + row * d_.per_class;
    std::fill_n(indices, d_.per_class, int64_t(-1));
    for (int64_t i = 0; i < count; ++i) indices[i] = int64_t(all[i] & 0x7FFFFFFF);
  }

  static constexpr int64_t kNobody = -1;

  const Draw d_;
  const int64_t chunks_;
  std::vector<Row> rows_;                         // [batch, pixels]: the class, or `classes` for none
  std::vector<int32_t> counts_;                   // [batch, chunks, classes + 1]
  std::vector<double> weights_;                   // the same, or none
  std::vector<int64_t> limits_;                   // [batch, classes + 1]
  std::vector<std::vector<uint64_t>> collected_;  // [batch, chunks, classes]: time and pixel
};

template <class Row>
void race(const Draw& draw, const Tensor& labels) {
  Race<Row> race(draw);
  switch (labels.scalar_type()) {
    case ScalarType::Char: return race.run(data<int8_t>(labels));
    case ScalarType::Byte: return race.run(data<uint8_t>(labels));
    case ScalarType::Short: return race.run(data<int16_t>(labels));
    case ScalarType::Int: return race.run(data<int32_t>(labels));
    default: return race.run(data<int64_t>(labels));
  }
}

void sample_anchors(Tensor labels, std::optional<Tensor> weight, Tensor seed, Tensor image_index, Tensor indices,
                    Tensor counts) {
  const Draw draw{
      .batch = labels.size(0),
      .pixels = labels.size(1),
      .classes = indices.size(1),
      .per_class = indices.size(2),
      .weights = data<float>(weight),
      .seeds = data<int64_t>(seed),
      .images = data<int64_t>(image_index),
      .indices = data<int64_t>(indices),
      .counts = data<int64_t>(counts),
  };
  draw.classes <= 0xFF ? race<uint8_t>(draw, labels) : race<uint32_t>(draw, labels);
}

}  // namespace

// All tensors contiguous, P pixels an image:
//   labels int8, uint8, int16, int32 or int64 [B, P]; weight float32 [B, P]; seed, image_index int64 [B]
//   indices int64 [B, K, S] and counts int64 [B, K] are written
STABLE_TORCH_LIBRARY_FRAGMENT(cldf_fast, m) {
  m.def("anchor_race(Tensor labels, Tensor? weight, Tensor seed, Tensor image_index, Tensor(a!) indices, "
        "Tensor(b!) counts) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cldf_fast, CPU, m) { m.impl("anchor_race", TORCH_BOX(&sample_anchors)); }
