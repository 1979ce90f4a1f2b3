// Class-balanced anchor sampling on the CPU: of every class of every image the pixels that arrive first.
//
// A first pass counts pixels and looks at some weights, which tells by when somewhat more pixels than are wanted should
// have arrived. A second pass collects what arrives by then; only that little is sorted. Where too few have arrived, as
// with weights of very different sizes, time is given in plenty and the pass repeated. Results are exact and depend on
// nothing but the pixels: times are unique once the pixel's index is appended.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
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

// Values are times with pixels behind them, more or less evenly spread: by their leading 16 bits, a digit after the
// other from the lower one on, which leaves few to be compared.
void sort(std::vector<uint64_t>& values) {
  constexpr int kDigit = 8;
  uint64_t least = UINT64_MAX, most = 0;
  for (const uint64_t value : values) {
    least = std::min(least, value);
    most = std::max(most, value);
  }
  int shift = 0;
  while (least < most && (most - least) >> shift >> 2 * kDigit) ++shift;
  const auto key = [=](uint64_t value) { return (value - least) >> shift; };
  std::vector<uint64_t> sorted(values.size());
  for (int digit = 0; digit < 2; ++digit) {
    const auto bucket = [=](uint64_t value) { return key(value) >> digit * kDigit & ((1 << kDigit) - 1); };
    std::array<size_t, (1 << kDigit) + 1> place{};
    for (const uint64_t value : values) ++place[bucket(value) + 1];
    std::partial_sum(place.begin(), place.end(), place.begin());
    for (const uint64_t value : values) sorted[place[bucket(value)]++] = value;
    values.swap(sorted);
  }
  for (auto from = values.begin(); from != values.end();) {
    auto to = from + 1;
    while (to != values.end() && key(*to) == key(*from)) ++to;
    if (to - from > 1) std::sort(from, to);
    from = to;
  }
}

struct Draw {
  int64_t batch, pixels, classes, per_class;
  const char* labels;  // [batch, pixels]
  LabelType label_type;
  int64_t label_size;  // bytes
  const float* weights;  // [batch, pixels] or null
  const int64_t *seeds, *images;
  int64_t *indices, *counts;  // [batch, classes, per_class], [batch, classes]
};

struct Weights {
  double sum, of_squares;

  Weights& operator+=(const Weights& other) {
    sum += other.sum;
    of_squares += other.of_squares;
    return *this;
  }
};

// Row: an unsigned integer that holds the number of classes, which stands for pixels of none.
template <class Row>
class Race {
 public:
  explicit Race(const Draw& draw)
      : d_(draw),
        chunks_(ceil_div(d_.pixels, kChunk)),
        rows_(new Row[size_t(d_.batch * d_.pixels)]),
        counts_(d_.batch * chunks_ * rows()),
        weights_(d_.weights ? counts_.size() : 0),
        limits_(d_.batch * rows(), kNobody),
        collected_(d_.batch * chunks_ * d_.classes) {}

  void run() {
    share(d_.batch * chunks_, 1, [&](int64_t task) { count(task); });
    for (double patience = 1.0; set_limits(patience); patience *= 4.0)
      share(d_.batch * chunks_, 1, [&](int64_t task) { collect(task); });
    share(d_.batch * d_.classes, 1, [&](int64_t row) { order(row); });
  }

 private:
  // Pixels of no class are counted in a row of their own, and so need no branch.
  int64_t rows() const { return d_.classes + 1; }

  // Tasks are the chunks of one image after those of another.
  struct Part {
    int64_t image, begin, end;  // its pixels
  };
  Part part(int64_t task) const {
    const int64_t begin = task % chunks_ * kChunk;
    return {task / chunks_, begin, std::min(begin + kChunk, d_.pixels)};
  }

  void count(int64_t task) {
    const Part p = part(task);
    const int64_t at = p.image * d_.pixels + p.begin, size = p.end - p.begin;
    const float* weights = d_.weights ? d_.weights + at : nullptr;
    Row* row = &rows_[at];
    kernels().find_classes(d_.labels + at * d_.label_size, d_.label_type, weights, size, d_.classes, kWide, row);
    kernels().count_classes(row, kWide, size, d_.classes, &counts_[task * rows()]);
    if (!weights) return;
    Weights* sums = &weights_[task * rows()];
    for (int64_t i = 0; i < size; i += kSampled) sums[row[i]] += Weights{weights[i], double(weights[i]) * weights[i]};
  }

  template <class T>
  T total(const std::vector<T>& of_tasks, int64_t image, int64_t label) const {
    T sum{};
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
        const int64_t population = total(counts_, image, label);
        const int64_t row = image * d_.classes + label;
        d_.counts[row] = std::min(population, d_.per_class);
        const bool lacks = arrived(image, label) < d_.counts[row];
        limits_[image * rows() + label] = !lacks ? kNobody : limit(wanted, population, image, label);
        lacking |= lacks;
      }
    return lacking;
  }

  // The time by which about so many will have arrived. Without weights times are whole numbers below 2^32, with weights
  // float32 bits.
  int64_t limit(double wanted, double population, int64_t image, int64_t label) const {
    if (wanted >= population) return kEverybody;
    if (!d_.weights) return int64_t(wanted / population * 4294967296.0);
    // As if there were sum(w)^2 / sum(w^2) pixels of one weight.
    const Weights sums = total(weights_, image, label);
    const double soon = wanted / (kSampled * sums.sum), share = std::min(soon * sums.of_squares / sums.sum, 0.95);
    const float time = float(soon * -std::log1p(-share) / share);
    if (!(time > 0.0f)) return kEverybody;  // weights are infinite, or none was sampled
    uint32_t bits;
    std::memcpy(&bits, &time, sizeof(bits));
    return bits;
  }

  void collect(int64_t task) {
    const Part p = part(task);
    const int64_t* limits = &limits_[p.image * rows()];
    if (std::all_of(limits, limits + d_.classes, [](int64_t limit) { return limit == kNobody; })) return;
    std::vector<uint64_t>* collected = &collected_[task * d_.classes];
    for (int64_t k = 0; k < d_.classes; ++k)
      if (limits[k] != kNobody) {
        collected[k].clear();
        collected[k].reserve(size_t(std::min(int64_t(counts_[task * rows() + k]), 2 * d_.per_class / chunks_)));
      }
    // Bounds hold nobody off, limits do.
    std::vector<uint32_t> bounds(std::max(rows(), kFewRows));
    for (int64_t k = 0; k < rows(); ++k) bounds[k] = uint32_t(std::max(limits[k], int64_t(0)));
    uint32_t words[kBlock + kWordsAtOnce], earliest[kBlock], found[kBlock];
    for (int64_t first = p.begin; first < p.end; first += kBlock) {
      const int64_t at = p.image * d_.pixels + first, size = std::min(kBlock, p.end - first);
      const float* weights = d_.weights ? d_.weights + at : nullptr;
      const Row* row = &rows_[at];
      kernels().words(uint64_t(d_.seeds[p.image]), uint64_t(d_.images[p.image]), uint32_t(first), size, words);
      if (weights) kernels().earliest_times(words, weights, size, earliest);
      const int64_t count =
          kernels().find_early(weights ? earliest : words, row, kWide, d_.classes, bounds.data(), size, found);
      const uint32_t* times = weights ? times_of(words, weights, found, count, earliest) : words;
      for (int64_t j = 0; j < count; ++j) {
        const int64_t i = found[j], time = times[weights ? j : i];
        if (time <= limits[row[i]]) collected[row[i]].push_back(uint64_t(time) << 31 | uint64_t(first + i));
      }
    }
  }

  // The times of the found pixels, side by side.
  static const uint32_t* times_of(const uint32_t* words, const float* weights, const uint32_t* found, int64_t count,
                                  uint32_t* times) {
    float their_weights[kBlock];
    for (int64_t j = 0; j < count; ++j) {
      times[j] = words[found[j]];
      their_weights[j] = weights[found[j]];
    }
    kernels().times(times, their_weights, count, times);
    return times;
  }

  void order(int64_t row) {
    const int64_t image = row / d_.classes, label = row % d_.classes, count = d_.counts[row];
    std::vector<uint64_t> all;
    all.reserve(arrived(image, label));
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const auto& part = collected_[(image * chunks_ + chunk) * d_.classes + label];
      all.insert(all.end(), part.begin(), part.end());
    }
    sort(all);
    int64_t* indices = d_.indices + row * d_.per_class;
    std::fill_n(indices, d_.per_class, int64_t(-1));
    for (int64_t i = 0; i < count; ++i) indices[i] = int64_t(all[i] & 0x7FFFFFFF);
  }

  static constexpr bool kWide = sizeof(Row) > 1;
  static constexpr int64_t kNobody = -1, kEverybody = UINT32_MAX;
  // One weight in so many tells how large they are. Images are seldom a multiple of it wide, or few columns would tell.
  static constexpr int64_t kSampled = 11;

  const Draw d_;
  const int64_t chunks_;
  const std::unique_ptr<Row[]> rows_;             // [batch, pixels]: the class, or `classes` for none
  std::vector<int32_t> counts_;                   // [batch, chunks, classes + 1]
  std::vector<Weights> weights_;                  // the same, or none; of every kSampled-th pixel
  std::vector<int64_t> limits_;                   // [batch, classes + 1]
  std::vector<std::vector<uint64_t>> collected_;  // [batch, chunks, classes]: time and pixel
};

LabelType label_type(const Tensor& labels) {
  switch (labels.scalar_type()) {
    case ScalarType::Char: return LabelType::int8;
    case ScalarType::Byte: return LabelType::uint8;
    case ScalarType::Short: return LabelType::int16;
    case ScalarType::Int: return LabelType::int32;
    default: return LabelType::int64;
  }
}

void sample_anchors(Tensor labels, std::optional<Tensor> weight, Tensor seed, Tensor image_index, Tensor indices,
                    Tensor counts) {
  const Draw draw{
      .batch = labels.size(0),
      .pixels = labels.size(1),
      .classes = indices.size(1),
      .per_class = indices.size(2),
      .labels = data<const char>(labels),
      .label_type = label_type(labels),
      .label_size = int64_t(labels.element_size()),
      .weights = data<float>(weight),
      .seeds = data<int64_t>(seed),
      .images = data<int64_t>(image_index),
      .indices = data<int64_t>(indices),
      .counts = data<int64_t>(counts),
  };
  if (draw.classes <= 0xFF)
    Race<uint8_t>(draw).run();
  else
    Race<uint32_t>(draw).run();
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
