// Around the classifier's forward and backward on the CPU: seeds, noised copies, gradient maps, pixel labels.
//
// Tensors are walked in chunks of pixels, whose state stays in the fastest cache, and the gradient is read as it
// lies. Results do not depend on the number of threads: the cut into chunks is a matter of the shape alone, and what
// chunks add up is added in their order.
//
// The arithmetic of an element is in csrc/include/saliency.h; what is to come out, in cldf_fast/ops/reference.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "common.h"
#include "saliency_kernels.h"

namespace {

using namespace cldf_fast;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const SaliencyKernels& kernels() {
  static const SaliencyKernels& chosen = CLDF_BEST(saliency_kernels);
  return chosen;
}

Dtype dtype_of(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Float ? Dtype::float32 : type == ScalarType::Half ? Dtype::float16 : Dtype::bfloat16;
}

// Nanoseconds of work that are worth a thread of their own, and what the work of elements takes on one, about.
constexpr double kWorthAThread = 8000;
constexpr double kHashTime = 0.5, kNoiseTime = 2.5, kReduceTime = 0.15, kCombineTime = 0.1, kFuseTime = 0.4;

int64_t worth_a_thread(double nanoseconds_each) { return int64_t(std::ceil(kWorthAThread / nanoseconds_each)); }

// --- Walking over pixels ---------------------------------------------------------------------------------------------

// The pixels of a map as runs with the same distance from each pixel to the next: all of them, or a run for each row.
struct Walk {
  int64_t runs, length;

  int64_t per_run() const { return ceil_div(length, kChunk); }
  int64_t chunks() const { return runs * per_run(); }
};

// index: among the map's chunks; pixel: its first one's place in the map, and x in its run.
struct Chunk {
  int64_t index, run, x, count, pixel;
};

// Calls f(map, chunk) for all chunks of some maps, the threads sharing them. time: nanoseconds that a pixel takes.
template <class F>
void each_chunk(int64_t maps, const Walk& walk, double time, F f) {
  const int64_t grain = worth_a_thread(time * double(std::clamp(walk.length, int64_t{1}, kChunk)));
  torch::stable::parallel_for(0, maps * walk.chunks(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t index = at % walk.chunks(), run = index / walk.per_run(), x = index % walk.per_run() * kChunk;
      f(at / walk.chunks(), Chunk{index, run, x, std::min(kChunk, walk.length - x), run * walk.length + x});
    }
  });
}

// A tensor that ends in [H, W], in any layout.
class Maps {
 public:
  explicit Maps(const Tensor& tensor)
      : data_(data<char>(tensor)), dtype_(dtype_of(tensor)), element_size_(dtype_ == Dtype::float32 ? 4 : 2) {
    for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
      sizes_.push_back(tensor.size(axis));
      strides_.push_back(tensor.stride(axis));
    }
  }

  int64_t size(int64_t axis) const { return sizes_[axis]; }
  int64_t stride(int64_t axis) const { return strides_[axis]; }
  int64_t height() const { return sizes_[sizes_.size() - 2]; }
  int64_t width() const { return sizes_.back(); }

  bool rows_follow_each_other() const {
    return height() == 1 || width() == 1 || strides_[strides_.size() - 2] == width() * strides_.back();
  }

  // The pixels from a chunk's first on, `offset` elements beyond the tensor's first.
  Values at(int64_t offset, const Chunk& chunk) const {
    const int64_t row_stride = strides_[strides_.size() - 2], stride = width() == 1 ? row_stride : strides_.back();
    return {data_ + (offset + chunk.run * row_stride + chunk.x * stride) * element_size_, dtype_, stride};
  }

 private:
  const char* data_;
  Dtype dtype_;
  int64_t element_size_;
  std::vector<int64_t> sizes_, strides_;
};

Walk walk_over(const Maps& maps, bool in_one_run) {
  return in_one_run ? Walk{1, maps.height() * maps.width()} : Walk{maps.height(), maps.width()};
}

// --- Seeds and noise -------------------------------------------------------------------------------------------------

void pixel_seed(Tensor x, Tensor seeds) {
  const int64_t batch = x.size(0), elements = batch ? x.numel() / batch : 0, element_size = x.element_size();
  const Walk walk{1, elements};
  const Dtype dtype = dtype_of(x);
  const char* values = data<char>(x);
  int64_t* seed = data<int64_t>(seeds);
  std::vector<uint64_t> sums(batch * walk.chunks());
  each_chunk(batch, walk, kHashTime, [&](int64_t b, const Chunk& chunk) {
    const char* first = values + (b * elements + chunk.pixel) * element_size;
    sums[b * walk.chunks() + chunk.index] = kernels().hash(first, dtype, chunk.count, chunk.pixel);
  });
  for (int64_t b = 0; b < batch; ++b) {
    const auto first = sums.begin() + b * walk.chunks();
    seed[b] = int64_t(mix64(std::accumulate(first, first + walk.chunks(), uint64_t{0})));
  }
}

void noised_batch(Tensor x, Tensor alpha_bar, Tensor seeds, Tensor noised) {
  const int64_t batch = x.size(0), elements = batch ? x.numel() / batch : 0, element_size = x.element_size();
  const Dtype dtype = dtype_of(x);
  const char* values = data<char>(x);
  char* out = data<char>(noised);
  const int64_t* seed = data<int64_t>(seeds);
  const double* signal_share = data<double>(alpha_bar);
  each_chunk(alpha_bar.size(0) * batch, {1, elements}, kNoiseTime, [&](int64_t row, const Chunk& chunk) {
    const int64_t level = row / batch, b = row % batch;
    kernels().add_noise(values + (b * elements + chunk.pixel) * element_size, dtype, chunk.count, uint64_t(seed[b]),
                        level, chunk.pixel / 4, noise_scales(signal_share[level]),
                        out + (row * elements + chunk.pixel) * element_size);
  });
}

// --- Saliency --------------------------------------------------------------------------------------------------------

// The blur along an axis: out[i] = sum over t of taps[t] * in[sources[i + t]].
struct Gaussian {
  Gaussian(double sigma, int64_t size) {
    const int64_t radius = gaussian_radius(sigma), period = mirror_period(size);
    // Beyond a period of the mirrored axis the taps meet the same pixels again.
    const bool folded = 2 * radius + 1 > period;
    before = folded ? 0 : radius;
    taps.resize(folded ? period : 2 * radius + 1);
    double total = 0.0;
    for (int64_t offset = -radius; offset <= radius; ++offset) total += gaussian_tap(offset, sigma);
    for (int64_t offset = -radius; offset <= radius; ++offset) {
      const int64_t place = folded ? (offset % period + period) % period : offset + radius;
      taps[place] += gaussian_tap(offset, sigma) / total;
    }
    for (int64_t i = -before; i < int64_t(taps.size()) - 1 - before + size; ++i) sources.push_back(mirrored(i, size));
  }

  int64_t before;  // sources that come before the axis
  std::vector<double> taps;
  std::vector<int64_t> sources;
};

// Two values between which the one at `rank` lies most likely, from a sample. scratch: kSample values.
constexpr int64_t kSample = 256;
std::array<double, 2> likely_bounds(const double* values, int64_t count, int64_t rank, double* scratch) {
  const int64_t step = (count / kSample - 1) | 1;  // odd, so that the sample is not of a few columns
  for (int64_t i = 0; i < kSample; ++i) scratch[i] = values[i * step];
  const double share = double(rank) / double(count), expected = share * kSample;
  const double margin = 3.0 * std::sqrt(expected * (1.0 - share)) + 1.0;
  const auto quantile = [&](double place) {
    double* const at = scratch + int64_t(std::clamp(place, 0.0, double(kSample - 1)));
    std::nth_element(scratch, at, scratch + kSample);
    return *at;
  };
  const double low = quantile(expected - margin);
  return {low, quantile(expected + margin)};
}

// The value at `rank`, counted from 1, of finite values >= 0 in ascending order: by bisection over their bits, on ever
// fewer of them, from the bounds that a sample suggests. scratch: as long as values.
double order_statistic(const double* values, int64_t count, int64_t rank, double least, double most, double* scratch) {
  // A pass that counts costs a tenth of one that copies, unless what it copies is rare.
  constexpr int64_t kFew = 64;
  // The value is above the lower bound and up to the upper one; `before` values are up to the former.
  uint64_t low = order_bits(least), high = order_bits(most);
  int64_t before = 0, up_to = count;
  const auto narrow = [&](uint64_t middle) {
    const int64_t found = kernels().count_up_to(values, count, from_order_bits(middle));
    (found < rank ? low : high) = middle;
    (found < rank ? before : up_to) = found;
  };
  if (count >= 32 * kSample)
    for (const double bound : likely_bounds(values, count, rank, scratch))
      if (order_bits(bound) > low && order_bits(bound) < high) narrow(order_bits(bound));
  if (low == order_bits(least)) {
    before = kernels().count_up_to(values, count, least);
    if (rank <= before) return least;
  }
  while (high - low > 1) {
    narrow(low + (high - low) / 2);
    if (up_to - before > std::max(count / 64, kFew)) continue;
    count = up_to = kernels().collect(values, count, from_order_bits(low), from_order_bits(high), scratch);
    values = scratch;
    rank -= before;
    before = 0;
    if (count > kFew) continue;
    std::nth_element(scratch, scratch + rank - 1, scratch + count);
    return scratch[rank - 1];
  }
  return from_order_bits(high);
}

class SaliencyMaps {
 public:
  SaliencyMaps(const Tensor& grad, Reduce reduce, double percentile, double sigma, bool level_norm, float* out)
      : grad_(grad),
        reduce_(reduce),
        level_norm_(level_norm),
        blurs_(sigma > 0.0),
        vertical_(sigma, grad_.height()),
        horizontal_(sigma, grad_.width()),
        walk_(walk_over(grad_, grad_.rows_follow_each_other())),
        pixels_(grad_.height() * grad_.width()),
        rank_(percentile_rank(percentile, pixels_)),
        out_(out) {
    const double threads = torch::stable::get_num_threads();
    shared_ = double(grad_.size(1)) * (time() / threads + kSharingTime) < time();
  }

  void run() const {
    const auto images = [&](int64_t begin, int64_t end) {
      const std::unique_ptr<double[]> saliency(new double[pixels_]), scratch(new double[pixels_]);
      for (int64_t b = begin; b < end; ++b) image(b, saliency.get(), scratch.get());
    };
    // Threads take images, or share each one where there are few.
    if (shared_)
      images(0, grad_.size(1));
    else
      torch::stable::parallel_for(0, grad_.size(1), worth_a_thread(time()), images);
  }

 private:
  int64_t levels() const { return grad_.size(0); }
  int64_t channels() const { return grad_.size(2); }

  // Nanoseconds that an image takes.
  double time() const {
    const int64_t taps = vertical_.taps.size() + horizontal_.taps.size();
    return double(pixels_) * (kReduceTime * double(2 * levels() * channels()) + kCombineTime * double(taps));
  }

  template <class F>
  void each(int64_t maps, const Walk& walk, double time, F f) const {
    // A grain beyond all chunks keeps them on the thread that has the image.
    each_chunk(maps, walk, shared_ ? time : 1e-9, f);
  }

  // saliency, scratch: [H, W]. Both are overwritten.
  void image(int64_t b, double* saliency, double* scratch) const {
    float* out = out_ + b * pixels_;
    if (!average_levels(b, saliency)) {
      std::fill_n(out, pixels_, std::numeric_limits<float>::quiet_NaN());
      return;
    }
    if (blurs_) {
      blur(saliency, scratch);
      std::swap(saliency, scratch);
    }
    double least, most;
    kernels().extremes(saliency, pixels_, &least, &most);
    const double upper = order_statistic(saliency, pixels_, rank_, least, most, scratch);
    kernels().scale(saliency, saliency_scale(upper, most), pixels_, out);
  }

  // The mean over levels, each with its weight. False where the gradient is not finite.
  //
  // Magnitudes are computed twice, for their sums and for the mean: to hold them, twice as wide as a gradient is,
  // takes longer.
  bool average_levels(int64_t b, double* saliency) const {
    const int64_t chunks = walk_.chunks(), channel_stride = grad_.stride(2);
    const double time = kReduceTime * double(channels());
    const auto values = [&](int64_t level, const Chunk& chunk) {
      return grad_.at(level * grad_.stride(0) + b * grad_.stride(1), chunk);
    };
    std::vector<double> sums(levels() * chunks), weights;
    each(levels(), walk_, time, [&](int64_t level, const Chunk& chunk) {
      sums[level * chunks + chunk.index] =
          kernels().sum_magnitudes(reduce_, values(level, chunk), channels(), channel_stride, chunk.count);
    });
    for (auto part = sums.begin(); part != sums.end(); part += chunks) {
      const double total = std::accumulate(part, part + chunks, 0.0);
      if (!is_finite(total)) return false;
      weights.push_back((level_norm_ ? divide_or_zero(double(pixels_), total) : 1.0) / double(levels()));
    }
    each(1, walk_, time * double(levels()), [&](int64_t, const Chunk& chunk) {
      for (int64_t level = 0; level < levels(); ++level)
        kernels().add_magnitudes(reduce_, values(level, chunk), channels(), channel_stride, chunk.count,
                                 weights[level], level == 0, saliency + chunk.pixel);
    });
    return true;
  }

  // kBlurRows rows at a time: along the columns, into rows that are continued beyond their ends, then along those.
  void blur(const double* in, double* out) const {
    const int64_t height = grad_.height(), width = grad_.width(), before = horizontal_.before;
    const int64_t above = vertical_.taps.size(), across = horizontal_.taps.size(), length = horizontal_.sources.size();
    const int64_t blocks = ceil_div(height, kBlurRows), last = vertical_.sources.size() - 1;
    const double block_time = kCombineTime * double((above + across) * width * kBlurRows);
    const int64_t grain = shared_ ? worth_a_thread(block_time) : blocks;
    torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
      std::vector<const double*> rows(std::max(above + kBlurRows - 1, across));
      std::vector<double> continued(kBlurRows * length);
      std::array<double*, kBlurRows> inner;
      for (int64_t r = 0; r < kBlurRows; ++r) inner[r] = continued.data() + r * length + before;
      for (int64_t top = begin * kBlurRows; top < end * kBlurRows; top += kBlurRows) {
        // The last block's rows beyond the map are computed from its last ones, and left.
        for (int64_t i = 0; i < above + kBlurRows - 1; ++i)
          rows[i] = in + vertical_.sources[std::min(top + i, last)] * width;
        kernels().combine_down(rows.data(), vertical_.taps.data(), above, width, inner.data());
        for (int64_t r = 0; r < std::min(kBlurRows, height - top); ++r) {
          double* row = inner[r];
          for (int64_t x = -before; x < 0; ++x) row[x] = row[horizontal_.sources[before + x]];
          for (int64_t x = width; x < length - before; ++x) row[x] = row[horizontal_.sources[before + x]];
          for (int64_t t = 0; t < across; ++t) rows[t] = row - before + t;
          kernels().combine(rows.data(), horizontal_.taps.data(), across, width, out + (top + r) * width);
        }
      }
    });
  }

  // What it costs to bring threads together for an image, in nanoseconds.
  static constexpr double kSharingTime = 20000;

  const Maps grad_;  // [T, B, C, H, W]
  const Reduce reduce_;
  const bool level_norm_, blurs_;
  const Gaussian vertical_, horizontal_;
  const Walk walk_;
  const int64_t pixels_, rank_;
  float* const out_;
  bool shared_;
};

void gradient_saliency(Tensor grad, std::string reduce, double percentile, double sigma, bool level_norm, Tensor maps) {
  const Reduce by = reduce == "max_abs" ? Reduce::max_abs : reduce == "sum_abs" ? Reduce::sum_abs : Reduce::l2;
  SaliencyMaps(grad, by, percentile, sigma, level_norm, data<float>(maps)).run();
}

// --- Fusion ----------------------------------------------------------------------------------------------------------

void fuse_evidence(Tensor gradient_map, Tensor cam, Tensor image_label, std::vector<double> thresholds, Tensor labels) {
  const Maps gradients(gradient_map), cams(cam);
  const int64_t batch = gradients.size(0), classes = gradients.size(1), pixels = gradients.height() * gradients.width();
  const Thresholds at{float(thresholds[0]), float(thresholds[1]), float(thresholds[2]), float(thresholds[3])};
  const bool* present = data<bool>(image_label);
  int8_t* out = data<int8_t>(labels);
  const Walk walk = walk_over(gradients, gradients.rows_follow_each_other() && cams.rows_follow_each_other());
  each_chunk(batch, walk, kFuseTime * double(classes), [&](int64_t b, const Chunk& chunk) {
    kernels().fuse(gradients.at(b * gradients.stride(0), chunk), gradients.stride(1),
                   cams.at(b * cams.stride(0), chunk), cams.stride(1), present + b * classes, classes, at, chunk.count,
                   out + b * pixels + chunk.pixel);
  });
}

}  // namespace

// float32, float16 or bfloat16, and contiguous unless stated otherwise. The last tensor is written.
//   pixel_seed:        x [B, C, H, W]; seeds int64 [B]
//   noised_batch:      x [B, C, H, W]; alpha_bar float64 [T]; seeds int64 [B]; noised [T, B, C, H, W] or so, dtype of x
//   gradient_saliency: grad [T, B, C, H, W] in any layout; maps float32 [B, H, W]
//   fuse_evidence:     gradient_map, cam [B, K, H, W] in any layout; image_label bool [B, K]; labels int8 [B, H, W]
STABLE_TORCH_LIBRARY_FRAGMENT(cldf_fast, m) {
  m.def("pixel_seed_out(Tensor x, Tensor(a!) seeds) -> ()");
  m.def("noised_batch_out(Tensor x, Tensor alpha_bar, Tensor seeds, Tensor(a!) noised) -> ()");
  m.def("gradient_saliency_out(Tensor grad, str reduce, float percentile, float sigma, bool level_norm, "
        "Tensor(a!) maps) -> ()");
  m.def("fuse_evidence_out(Tensor gradient_map, Tensor cam, Tensor image_label, float[] thresholds, "
        "Tensor(a!) labels) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cldf_fast, CPU, m) {
  m.impl("pixel_seed_out", TORCH_BOX(&pixel_seed));
  m.impl("noised_batch_out", TORCH_BOX(&noised_batch));
  m.impl("gradient_saliency_out", TORCH_BOX(&gradient_saliency));
  m.impl("fuse_evidence_out", TORCH_BOX(&fuse_evidence));
}
