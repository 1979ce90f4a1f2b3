// Class-balanced anchor sampling on the CPU: of every class of every image the pixels that arrive first.
//
// One pass computes all times and how many pixels of each class arrive in which of kBins intervals; the interval in
// which the last one to be drawn arrives bounds what a second pass collects, and only that little is sorted. Results
// are exact and depend on nothing but the pixels: times are unique once the pixel's index is appended.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "anchors_kernels.h"
#include "common.h"

namespace {

using namespace cldf_fast;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBins = 1024;
// Pixels whose times are computed at once, and those that a task has at least.
constexpr int64_t kBlock = 1024, kLeastChunk = 16384;

const AnchorKernels& kernels() {
  static const AnchorKernels& chosen = CLDF_BEST(anchor_kernels);
  return chosen;
}

struct Draw {
  int64_t batch, pixels, classes, per_class;
  const float* weights;  // [batch, pixels] or null
  const int64_t *seeds, *images;
  int64_t *indices, *counts;  // [batch, classes, per_class], [batch, classes]
};

template <class Label>
class Race {
 public:
  Race(const Draw& draw, const Label* labels)
      : d_(draw),
        labels_(labels),
        // A task's counts take no more memory than its times.
        chunk_(std::max(kLeastChunk, rows() * kBins)),
        chunks_(ceil_div(d_.pixels, chunk_)),
        // float32 bits that are not negative have one bit less.
        shift_(d_.weights ? 21 : 22),
        times_(d_.batch * d_.pixels),
        arrivals_(d_.batch * chunks_ * rows() * kBins),
        last_bin_(d_.batch * rows(), -1),
        collected_(d_.batch * chunks_ * d_.classes) {}

  void run() {
    each(d_.batch * chunks_, [&](int64_t task) { time(task); });
    each(d_.batch * d_.classes, [&](int64_t row) { bound(row); });
    each(d_.batch * chunks_, [&](int64_t task) { collect(task); });
    each(d_.batch * d_.classes, [&](int64_t row) { order(row); });
  }

 private:
  template <class F>
  static void each(int64_t tasks, F f) {
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) f(task);
    });
  }

  // Pixels of no class are counted in a row of their own, and so need no branch.
  int64_t rows() const { return d_.classes + 1; }

  // The class of a pixel, or `classes` for none. One comparison sees labels below 0 too.
  int64_t row_of(int64_t pixel) const {
    return int64_t(std::min(uint64_t(int64_t(labels_[pixel])), uint64_t(d_.classes)));
  }

  // Calls f(pixel, pixel of the whole batch) for the pixels of a chunk, `task` counting the chunks of all images.
  template <class F>
  void each_pixel(int64_t task, F f) const {
    const int64_t image = task / chunks_, begin = task % chunks_ * chunk_, end = std::min(begin + chunk_, d_.pixels);
    for (int64_t pixel = begin; pixel < end; ++pixel) f(pixel, image * d_.pixels + pixel);
  }

  void time(int64_t task) {
    const int64_t image = task / chunks_, begin = task % chunks_ * chunk_, end = std::min(begin + chunk_, d_.pixels);
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t at = image * d_.pixels + first;
      kernels().arrival_times(uint64_t(d_.seeds[image]), uint64_t(d_.images[image]), uint32_t(first),
                              std::min(kBlock, end - first), d_.weights ? d_.weights + at : nullptr, &times_[at]);
    }
    int32_t* arrivals = &arrivals_[task * rows() * kBins];
    each_pixel(task, [&](int64_t, int64_t at) {
      if (drawn(at)) ++arrivals[row_of(at) * kBins + (times_[at] >> shift_)];
    });
  }

  bool drawn(int64_t at) const { return !d_.weights || times_[at] != kNever; }

  // How many are drawn, and the interval in which the last of them arrives.
  void bound(int64_t row) {
    const int64_t image = row / d_.classes, label = row % d_.classes;
    int64_t seen = 0, bin = -1;
    while (seen < d_.per_class && ++bin < kBins)
      for (int64_t chunk = 0; chunk < chunks_; ++chunk)
        seen += arrivals_[((image * chunks_ + chunk) * rows() + label) * kBins + bin];
    last_bin_[image * rows() + label] = bin;
    d_.counts[row] = std::min(seen, d_.per_class);
  }

  void collect(int64_t task) {
    const int64_t* last = &last_bin_[task / chunks_ * rows()];
    std::vector<uint64_t>* collected = &collected_[task * d_.classes];
    each_pixel(task, [&](int64_t pixel, int64_t at) {
      if (int64_t(times_[at] >> shift_) <= last[row_of(at)] && drawn(at))
        collected[row_of(at)].push_back(uint64_t(times_[at]) << 31 | uint64_t(pixel));
    });
  }

  void order(int64_t row) {
    const int64_t image = row / d_.classes, label = row % d_.classes, count = d_.counts[row];
    std::vector<uint64_t> all;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const auto& part = collected_[(image * chunks_ + chunk) * d_.classes + label];
      all.insert(all.end(), part.begin(), part.end());
    }
    std::nth_element(all.begin(), all.begin() + count, all.end());
    std::sort(all.begin(), all.begin() + count);
    int64_t* indices = d_.indices + row * d_.per_class;
    std::fill_n(indices, d_.per_class, int64_t(-1));
    for (int64_t i = 0; i < count; ++i) indices[i] = int64_t(all[i] & 0x7FFFFFFF);
  }

  const Draw d_;
  const Label* labels_;  // [batch, pixels]
  const int64_t chunk_, chunks_;
  const int shift_;
  std::vector<uint32_t> times_;                   // [batch, pixels]
  std::vector<int32_t> arrivals_;                 // [batch, chunks, classes + 1, kBins]
  std::vector<int64_t> last_bin_;                 // [batch, classes + 1]
  std::vector<std::vector<uint64_t>> collected_;  // [batch, chunks, classes]: time and pixel
};

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
  switch (labels.scalar_type()) {
    case ScalarType::Char: return Race(draw, data<int8_t>(labels)).run();
    case ScalarType::Byte: return Race(draw, data<uint8_t>(labels)).run();
    case ScalarType::Short: return Race(draw, data<int16_t>(labels)).run();
    case ScalarType::Int: return Race(draw, data<int32_t>(labels)).run();
    default: return Race(draw, data<int64_t>(labels)).run();
  }
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
