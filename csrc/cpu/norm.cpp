// Group norm, an affine map of each channel of each image, and SiLU: what stands between a diffusion model's
// convolutions.
//
// Tensors are walked in slabs that stay in the fastest cache, as they lie: channels side by side, or a plane for each.
// Results do not depend on the number of threads: the cut into slabs is a matter of the shape alone, and what slabs add
// up is added in their order, in double precision.
//
// What is to come out is in cldf_fast/ops/reference.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "common.h"
#include "norm_kernels.h"

namespace {

using namespace cldf_fast;
using torch::stable::Tensor;

const NormKernels& kernels() {
  static const NormKernels& chosen = CLDF_BEST(norm_kernels);
  return chosen;
}

constexpr int64_t kSlabElements = 4096;
// Elements that are worth a thread of their own.
constexpr int64_t kWorthAThread = 16384;
// As many images are shared out whole: each may then stay in one core's cache from its first slab to its last.
constexpr int64_t kManyImages = 8;

// --- Walking over slabs ----------------------------------------------------------------------------------------------

// A slab of image n, where it begins in the tensor, its first channel, and its number among the slabs of that channel.
struct Place {
  Slab slab;
  int64_t n, first, channel, piece;
};

struct Walk {
  Walk(const Tensor& x, int64_t groups)
      : batch(x.size(0)),
        channels(x.size(1)),
        pixels(x.numel() ? x.numel() / (batch * channels) : 0),
        groups(groups),
        together(x.stride(1) == 1 ? channels : 1),
        per_piece(std::max(int64_t{1}, kSlabElements / together)),
        pieces(ceil_div(pixels, per_piece)) {}

  // Calls first(place) for all slabs of an image, then between(n), then second(place) for all of them.
  template <class First, class Between, class Second>
  void run(First first, Between between, Second second) const {
    const int64_t slabs = channels / together * pieces, image = std::max(int64_t{1}, channels * pixels);
    if (batch >= kManyImages) {
      share(batch, image, [&](int64_t n) {
        for (int64_t i = 0; i < slabs; ++i) first(place(n, i));
        between(n);
        for (int64_t i = 0; i < slabs; ++i) second(place(n, i));
      });
    } else {
      share(batch * slabs, kSlabElements, [&](int64_t i) { first(place(i / slabs, i % slabs)); });
      for (int64_t n = 0; n < batch; ++n) between(n);
      share(batch * slabs, kSlabElements, [&](int64_t i) { second(place(i / slabs, i % slabs)); });
    }
  }

  template <class F>
  static void share(int64_t count, int64_t elements_each, F f) {
    cldf_fast::share(count, ceil_div(kWorthAThread, elements_each), f);
  }

  Place place(int64_t n, int64_t i) const {
    const int64_t channel = i / pieces, piece = i % pieces, begin = piece * per_piece;
    const int64_t first = (n * channels + channel) * pixels + begin * together;
    return {{std::min(per_piece, pixels - begin), together}, n, first, channel, piece};
  }

  // together: channels that lie side by side. per_piece: pixels of a slab. pieces: slabs of a channel.
  int64_t batch, channels, pixels, groups, together, per_piece, pieces;
};

// Two sums for every channel of every slab.
class Sums {
 public:
  explicit Sums(const Walk& walk)
      : pieces_(walk.pieces), channels_(walk.channels), count_(walk.batch * pieces_ * channels_), values_(2 * count_) {}

  float* first(const Place& place) { return &values_[at(place.n, place.piece, place.channel)]; }
  float* second(const Place& place) { return first(place) + count_; }

  std::pair<double, double> of(int64_t n, int64_t channel) const {
    double first = 0.0, second = 0.0;
    for (int64_t piece = 0; piece < pieces_; ++piece) {
      first += values_[at(n, piece, channel)];
      second += values_[count_ + at(n, piece, channel)];
    }
    return {first, second};
  }

 private:
  int64_t at(int64_t n, int64_t piece, int64_t channel) const { return (n * pieces_ + piece) * channels_ + channel; }

  int64_t pieces_, channels_, count_;
  std::vector<float> values_;
};

// A number for every channel of every image.
class PerChannel {
 public:
  explicit PerChannel(const Walk& walk) : channels_(walk.channels), values_(walk.batch * channels_) {}

  float& at(int64_t n, int64_t channel) { return values_[n * channels_ + channel]; }
  float* of(const Place& place) { return &at(place.n, place.channel); }

 private:
  int64_t channels_;
  std::vector<float> values_;
};

// The map after the norm: of the weights [C] and, where there are some, of an image's own scale and shift [B, C].
struct Affine {
  const float *weight, *bias, *scale, *shift;
  int64_t channels;

  float slope(int64_t n, int64_t channel) const {
    return weight[channel] * (scale ? 1.0f + scale[n * channels + channel] : 1.0f);
  }
  float offset(int64_t n, int64_t channel) const {
    return bias[channel] * (scale ? 1.0f + scale[n * channels + channel] : 1.0f) +
           (shift ? shift[n * channels + channel] : 0.0f);
  }
};

// What is known of every channel once its group's statistics are.
class Channels {
 public:
  Channels(const Walk& walk, const Affine& affine)
      : per_group_(walk.channels / walk.groups),
        affine_(affine),
        mean_(walk),
        rstd_(walk),
        slope_(walk),
        offset_(walk) {}

  void set_group(int64_t n, int64_t group, float mean, float rstd) {
    for (int64_t c = group * per_group_; c < (group + 1) * per_group_; ++c) {
      mean_.at(n, c) = mean;
      rstd_.at(n, c) = rstd;
      slope_.at(n, c) = rstd * affine_.slope(n, c);
      offset_.at(n, c) = affine_.offset(n, c);
    }
  }

  NormChannels of(const Place& place) {
    return {mean_.of(place), rstd_.of(place), slope_.of(place), offset_.of(place)};
  }

 private:
  int64_t per_group_;
  const Affine& affine_;
  PerChannel mean_, rstd_, slope_, offset_;
};

// --- Forward ---------------------------------------------------------------------------------------------------------

void group_norm(Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> scale, std::optional<Tensor> shift,
                int64_t groups, double eps, bool silu, Tensor out, Tensor mean, Tensor rstd) {
  const Walk walk(x, groups);
  const Affine affine{data<float>(weight), data<float>(bias), data<float>(scale), data<float>(shift), walk.channels};
  const float* values = data<float>(x);
  float *results = data<float>(out), *means = data<float>(mean), *rstds = data<float>(rstd);
  const int64_t size = walk.channels / groups, channel_stride = x.stride(1), image_stride = walk.channels * walk.pixels;
  Sums sums(walk);
  PerChannel pivots(walk);
  Channels channels(walk, affine);
  for (int64_t n = 0; n < walk.batch; ++n)
    for (int64_t c = 0; c < walk.channels; ++c) pivots.at(n, c) = values[n * image_stride + c * channel_stride];
  walk.run(
      [&](const Place& place) {
        kernels().moments(values + place.first, place.slab, pivots.of(place), sums.first(place), sums.second(place));
      },
      [&](int64_t n) {
        const double pixels = double(walk.pixels);
        for (int64_t group = 0; group < groups; ++group) {
          // Channels' means and squared deviations, joined as by Chan, Golub and LeVeque.
          double group_mean = 0.0, deviations = 0.0;
          for (int64_t i = 0; i < size; ++i) {
            const int64_t c = group * size + i;
            const auto [sum, squares] = sums.of(n, c);
            const double channel_mean = pivots.at(n, c) + sum / pixels, away = channel_mean - group_mean;
            group_mean += away / double(i + 1);
            deviations += squares - sum * sum / pixels + away * away * pixels * double(i) / double(i + 1);
          }
          const double variance = std::max(0.0, deviations / (pixels * double(size)));
          const int64_t at = n * groups + group;
          means[at] = float(group_mean);
          rstds[at] = float(1.0 / std::sqrt((std::isnan(deviations) ? deviations : variance) + eps));
          channels.set_group(n, group, means[at], rstds[at]);
        }
      },
      [&](const Place& place) {
        kernels().apply(values + place.first, place.slab, channels.of(place), silu, results + place.first);
      });
}

// --- Backward --------------------------------------------------------------------------------------------------------

void group_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> scale,
                         std::optional<Tensor> shift, Tensor mean, Tensor rstd, bool silu, Tensor grad_x,
                         Tensor grad_slope, Tensor grad_offset) {
  const int64_t groups = mean.size(1);
  const Walk walk(x, groups);
  const Affine affine{data<float>(weight), data<float>(bias), data<float>(scale), data<float>(shift), walk.channels};
  const float *values = data<float>(x), *grads = data<float>(grad), *means = data<float>(mean),
              *rstds = data<float>(rstd);
  float *results = data<float>(grad_x), *slopes = data<float>(grad_slope), *offsets = data<float>(grad_offset);
  const int64_t size = walk.channels / groups;
  Sums sums(walk);
  PerChannel constant(walk), linear(walk);
  Channels channels(walk, affine);
  for (int64_t n = 0; n < walk.batch; ++n)
    for (int64_t group = 0; group < groups; ++group)
      channels.set_group(n, group, means[n * groups + group], rstds[n * groups + group]);
  walk.run(
      [&](const Place& place) {
        kernels().differentiate(values + place.first, grads + place.first, place.slab, channels.of(place), silu,
                                results + place.first, sums.first(place), sums.second(place));
      },
      [&](int64_t n) {
        const double elements = double(walk.pixels * size);
        for (int64_t group = 0; group < groups; ++group) {
          // What the group's mean and deviation contribute: means of grad_z * slope, alone and times the normalised x.
          double alone = 0.0, times_x = 0.0;
          for (int64_t c = group * size; c < (group + 1) * size; ++c) {
            const auto [sum, product] = sums.of(n, c);
            offsets[n * walk.channels + c] = float(sum);
            slopes[n * walk.channels + c] = float(product);
            alone += sum * affine.slope(n, c) / elements;
            times_x += product * affine.slope(n, c) / elements;
          }
          const double spread = rstds[n * groups + group];
          for (int64_t c = group * size; c < (group + 1) * size; ++c) {
            constant.at(n, c) = float(alone * spread);
            linear.at(n, c) = float(times_x * spread * spread);
          }
        }
      },
      [&](const Place& place) {
        kernels().combine(values + place.first, place.slab, channels.of(place), constant.of(place), linear.of(place),
                          results + place.first);
      });
}

}  // namespace

// All float32. x, grad, out and grad_x [B, C, H, W] have one layout, contiguous or channels-last; the rest is
// contiguous: weight and bias [C]; scale, shift, and the gradients of every image's own slope and offset [B, C]; mean
// and rstd [B, groups]. groups divides C. The last three tensors are written.
STABLE_TORCH_LIBRARY_FRAGMENT(cldf_fast, m) {
  m.def("group_norm_out(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, int groups, float eps, "
        "bool silu, Tensor(a!) out, Tensor(b!) mean, Tensor(c!) rstd) -> ()");
  m.def("group_norm_backward_out(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, "
        "Tensor mean, Tensor rstd, bool silu, Tensor(a!) grad_x, Tensor(b!) grad_slope, Tensor(c!) grad_offset) "
        "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cldf_fast, CPU, m) {
  m.impl("group_norm_out", TORCH_BOX(&group_norm));
  m.impl("group_norm_backward_out", TORCH_BOX(&group_norm_backward));
}
