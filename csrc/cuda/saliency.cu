// Around the classifier's forward and backward on CUDA: seeds, noised copies, gradient maps, pixel labels.
//
// Results depend neither on the number of blocks nor on their order: how an image is cut is a matter of its size alone,
// what blocks add up is added in a fixed order, and atomics are on integers. Nothing is read back to the host.
//
// The arithmetic of an element is in csrc/include/saliency.h; what is to come out, in cldf_fast/ops/reference.py; the
// operators' schemas, in csrc/cpu/saliency.cpp.

#include <cooperative_groups.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>
#include <vector>

#include "common.cuh"
#include "saliency.h"

namespace {

using namespace cldf_fast;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
// What a block handles at a time, four elements a thread.
constexpr int64_t kBlock = 4 * kThreads;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many blocks share the sum over an image of so many elements.
unsigned parts_of(int64_t elements) {
  return unsigned(std::clamp(ceil_div(elements, 2 * kBlock), int64_t{1}, int64_t{64}));
}

// Numbers of blocks have 32 bits, in which division is cheap.
struct Share {
  int64_t row;    // an image, or an image at a level
  unsigned part;  // this block's part of it
};
__device__ __forceinline__ Share share_of_block(unsigned parts) { return {blockIdx.x / parts, blockIdx.x % parts}; }

// --- Seeds -----------------------------------------------------------------------------------------------------------

// partial [B, parts]: of each image the sums of the hashes of its elements.
template <class T>
__global__ void __launch_bounds__(kThreads)
    hash_elements(const T* x, int64_t elements, unsigned parts, bool aligned, uint64_t* partial) {
  const auto [image, part] = share_of_block(parts);
  const T* const values = x + image * elements;
  uint64_t sum = 0;
  for (int64_t first = part * kBlock + threadIdx.x * 4; first < elements; first += parts * kBlock) {
    const int64_t count = elements - first;
    const Four<float> four = load_four(values + first, 1, count, aligned);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) sum += element_hash(uint64_t(first + i), four.at[i]);
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One warp an image.
__global__ void __launch_bounds__(kThreads)
    finish_seeds(const uint64_t* partial, int64_t batch, unsigned parts, int64_t* seeds) {
  const int64_t image = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (image >= batch) return;
  uint64_t sum = 0;
  for (unsigned part = threadIdx.x % kWarp; part < parts; part += kWarp) sum += partial[image * parts + part];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) seeds[image] = int64_t(mix64(sum));
}

// Two kernels: the second begins when all blocks of the first are through.
void pixel_seed(Tensor x, Tensor seeds) {
  const int64_t batch = x.size(0), elements = batch ? x.numel() / batch : 0;
  const unsigned parts = parts_of(elements);
  const Tensor partial = torch::stable::new_empty(x, {batch, parts}, ScalarType::Long);
  uint64_t* const sums = static_cast<uint64_t*>(partial.mutable_data_ptr());
  const Launcher launch(x);
  with_values(x, [&]<class T>(const T* values) {
    const bool aligned = elements % 4 == 0 && aligned_for_four(values);
    launch(hash_elements<T>, batch * parts, kThreads, 1, values, elements, parts, aligned, sums);
  });
  int64_t* const out = static_cast<int64_t*>(seeds.mutable_data_ptr());
  launch(finish_seeds, ceil_div(batch * kWarp, kThreads), kThreads, 1, sums, batch, parts, out);
}

// --- Noise -----------------------------------------------------------------------------------------------------------

// Four elements of one image at one level a thread: what one block of random words gives.
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_noise(const T* x, const double* alpha_bar, const int64_t* seeds, unsigned batch, int64_t elements,
              unsigned parts, bool aligned, T* noised_rows) {
  const auto [row, part] = share_of_block(parts);
  const unsigned level = unsigned(row) / batch, image = unsigned(row) % batch;
  const int64_t block = int64_t(part) * kThreads + threadIdx.x, first = 4 * block, count = elements - first;
  __shared__ NoiseScales scales;
  if (threadIdx.x == 0) scales = noise_scales(alpha_bar[level]);
  __syncthreads();
  if (count <= 0) return;
  const Normals noise = noise_block(uint64_t(seeds[image]), level, uint32_t(block));
  Four<float> four = load_four(x + image * elements + first, 1, count, aligned);
#pragma unroll
  for (int i = 0; i < 4; ++i) four.at[i] = noised(four.at[i], noise.at[i], scales);
  store_four(noised_rows + row * elements + first, four, count, aligned);
}

void noised_batch(Tensor x, Tensor alpha_bar, Tensor seeds, Tensor noised) {
  const int64_t batch = x.size(0), elements = batch ? x.numel() / batch : 0, parts = ceil_div(elements, kBlock);
  const double* const levels = static_cast<const double*>(alpha_bar.const_data_ptr());
  const int64_t* const seed = static_cast<const int64_t*>(seeds.const_data_ptr());
  const Launcher launch(x);
  with_values(x, [&]<class T>(const T* values) {
    T* const out = static_cast<T*>(noised.mutable_data_ptr());
    const bool aligned = elements % 4 == 0 && aligned_for_four(values) && aligned_for_four(out);
    launch(add_noise<T>, alpha_bar.size(0) * batch * parts, kThreads, 1, values, levels, seed, batch, elements, parts,
           aligned, out);
  });
}

// --- Gradient maps ---------------------------------------------------------------------------------------------------
//
// Four kernels, since every pixel waits three times for all others: for the mean of its level, for its neighbours to be
// averaged, and for the percentile. The gradient is read by the first two; keeping the magnitudes between them would
// save a read of a few channels and cost a write and a read in float64. Maps are in float64, as in the reference: a
// gradient's scale and range are unknown.

// A tensor [T, B, C, H, W], whose pixels are equally far from each other in memory.
template <class T>
struct Gradient {
  const T* values;
  unsigned levels, batch;
  int64_t channels, pixels;
  int64_t level_stride, image_stride, channel_stride, pixel_stride;
  bool four_pixels, four_channels;  // which four values may be taken at once

  // The magnitudes of four pixels from `pixel` on, of which `count` are there.
  template <Reduce kReduce>
  __device__ __forceinline__ void magnitudes(int64_t level, int64_t image, int64_t pixel, int64_t count,
                                             double (&out)[4]) const {
    const T* const from = values + level * level_stride + image * image_stride + pixel * pixel_stride;
    Magnitude<kReduce> magnitude[4];
    if (four_channels) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < count)
#pragma unroll 1
          for (int64_t c = 0; c < channels; c += 4) {
            const Four<float> four = load_four(from + i * pixel_stride + c, 1, 4, true);
#pragma unroll
            for (int k = 0; k < 4; ++k) magnitude[i].add(four.at[k]);
          }
    } else {
      // Two at a time are enough in flight, and more would not fit into the registers.
#pragma unroll 2
      for (int64_t c = 0; c < channels; ++c) {
        const Four<float> four = load_four(from + c * channel_stride, pixel_stride, count, four_pixels);
#pragma unroll
        for (int i = 0; i < 4; ++i) magnitude[i].add(four.at[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = magnitude[i].value();
  }
};

// partial [T, B, parts]: of each level of each image the sums of its magnitudes.
template <Reduce kReduce, class T>
__global__ void __launch_bounds__(kThreads, 4)
    sum_levels(const __grid_constant__ Gradient<T> gradient, unsigned parts, double* partial) {
  const auto [row, part] = share_of_block(parts);
  const unsigned level = unsigned(row) / gradient.batch, image = unsigned(row) % gradient.batch;
  double sum = 0.0;
  for (int64_t pixel = part * kBlock + threadIdx.x * 4; pixel < gradient.pixels; pixel += parts * kBlock) {
    double magnitude[4];
    gradient.template magnitudes<kReduce>(level, image, pixel, gradient.pixels - pixel, magnitude);
    // A pixel that is not there has magnitude zero.
    sum += (magnitude[0] + magnitude[1]) + (magnitude[2] + magnitude[3]);
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// The sum of a level's magnitudes over an image, the same in every lane of every warp.
__device__ __forceinline__ double level_sum(const double* partial, unsigned parts) {
  double sum = 0.0;
  for (unsigned part = threadIdx.x % kWarp; part < parts; part += kWarp) sum += partial[part];
  return warp_sum(sum);
}

// maps [B, H, W]: the levels' average, with partial each over its mean; not finite somewhere if the gradient is not.
template <Reduce kReduce, class T>
__global__ void __launch_bounds__(kThreads, 4)
    average_levels(const __grid_constant__ Gradient<T> gradient, const double* partial, unsigned parts,
                   unsigned blocks_per_image, bool aligned, double* maps) {
  const auto [image, block] = share_of_block(blocks_per_image);
  const int64_t pixel = block * kBlock + threadIdx.x * 4, count = gradient.pixels - pixel;
  Four<double> average{};
  for (unsigned level = 0; level < gradient.levels; ++level) {
    double weight = 1.0;
    if (partial) {
      const double sum = level_sum(partial + (int64_t(level) * gradient.batch + image) * parts, parts);
      // What is not finite stays so, also where the magnitude is zero.
      weight = is_finite(sum) ? divide_or_zero(double(gradient.pixels), sum) : sum - sum;
    }
    if (count <= 0) continue;  // not return: all lanes take part in the sums
    double magnitude[4];
    gradient.template magnitudes<kReduce>(level, image, pixel, count, magnitude);
#pragma unroll
    for (int i = 0; i < 4; ++i) average.at[i] += weight * magnitude[i];
  }
  if (count <= 0) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) average.at[i] /= double(gradient.levels);
  store_four(maps + image * gradient.pixels + pixel, average, count, aligned);
}

// Half of a Gaussian, from its middle on, its whole sum 1.
constexpr int kMostTaps = 64;
struct Gaussian {
  int radius;
  double taps[kMostTaps + 1];
};

constexpr int kTileRows = 8, kTileColumns = 64;

// As mirrored(), without its division where there is nothing to mirror.
__device__ __forceinline__ int64_t within(int64_t position, int64_t size) {
  return position >= 0 && position < size ? position : mirrored(position, size);
}

// One tile of an image: along the columns into shared memory, with what the rows need on either side, then along these.
__global__ void __launch_bounds__(kThreads)
    blur(const double* maps, int64_t height, int64_t width, const __grid_constant__ Gaussian gaussian, double* out) {
  __shared__ double rows[kTileRows][kTileColumns + 2 * kMostTaps];
  const unsigned across = unsigned(ceil_div(width, kTileColumns)), down = unsigned(ceil_div(height, kTileRows));
  const auto [image, tile] = share_of_block(across * down);
  const int64_t offset = image * height * width;
  const int64_t top = int64_t(tile / across) * kTileRows, left = int64_t(tile % across) * kTileColumns;
  const int radius = gaussian.radius, padded = kTileColumns + 2 * radius;
  for (int at = threadIdx.x; at < kTileRows * padded; at += kThreads) {
    const int row = at / padded, column = at % padded;
    if (top + row >= height) continue;
    const double* const from = maps + offset + within(left + column - radius, width);
    double sum = 0.0;
    for (int shift = -radius; shift <= radius; ++shift)
      sum += gaussian.taps[abs(shift)] * from[within(top + row + shift, height) * width];
    rows[row][column] = sum;
  }
  __syncthreads();
  for (int at = threadIdx.x; at < kTileRows * kTileColumns; at += kThreads) {
    const int row = at / kTileColumns, column = at % kTileColumns;
    if (top + row >= height || left + column >= width) continue;
    double sum = 0.0;
    for (int shift = -radius; shift <= radius; ++shift)
      sum += gaussian.taps[abs(shift)] * rows[row][column + radius + shift];
    out[offset + (top + row) * width + left + column] = sum;
  }
}

// The same along one axis, for a Gaussian too wide for a tile. size, stride: of the axis; scale: of the taps.
__global__ void __launch_bounds__(kThreads)
    blur_axis(const double* maps, int64_t elements, int64_t size, int64_t stride, double sigma, double scale,
              double* out) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x, radius = gaussian_radius(sigma);
  if (at >= elements) return;
  const int64_t position = at / stride % size;
  double sum = 0.0;
  for (int64_t shift = -radius; shift <= radius; ++shift)
    sum += gaussian_tap(shift, sigma) * maps[at + (mirrored(position + shift, size) - position) * stride];
  out[at] = sum * scale;
}

// --- Percentile ---
//
// Exact, by radix: the bits of numbers that are not negative sort as they do. The pixels are counted by the first digit
// of their bits, then those that have the percentile's by the second, and so on, until one is left or no digit.

constexpr int kSelectThreads = 512;
constexpr int kDigits = 6, kBins = 2048;
// The sign is always zero, the first digit is the exponent.
__device__ __forceinline__ int digit_shift(int digit) { return digit < 3 ? 52 - 11 * digit : 50 - 10 * digit; }
__device__ __forceinline__ uint64_t digit_bins(int digit) { return digit < 3 ? kBins : 1024; }

// Adds one to each lane's bin; none if it is negative. Neighbouring pixels are alike, and often zero, so that lanes in
// a row have the same bin: the first of them adds for all.
__device__ __forceinline__ void count_lanes(uint32_t* histogram, int bin) {
  const int lane = threadIdx.x % kWarp, before = __shfl_up_sync(kAllLanes, bin, 1);
  const unsigned first = __ballot_sync(kAllLanes, lane == 0 || bin != before), later = first >> lane >> 1;
  if ((first >> lane & 1) && bin >= 0) atomicAdd(&histogram[bin], uint32_t(later ? __ffs(int(later)) : kWarp - lane));
}

struct Selection {
  uint32_t histogram[2][kBins];  // of even and of odd digits
  uint32_t warps[kSelectThreads / kWarp];
  uint32_t digit, below, count;                // the percentile's digit, how many have a lower one, how many this one
  uint64_t most[kSelectThreads / kWarp];       // the largest bits that each warp has seen
  uint64_t last;                               // the bits of the one that is left, in the block that has it
};

// The blocks of one image: a cluster, where the GPU has them.
struct Team {
#if __CUDA_ARCH__ >= 900
  __device__ __forceinline__ int size() const { return int(cooperative_groups::this_cluster().num_blocks()); }
  __device__ __forceinline__ int rank() const { return int(cooperative_groups::this_cluster().block_rank()); }
  __device__ __forceinline__ void sync() const { cooperative_groups::this_cluster().sync(); }
  __device__ __forceinline__ const Selection& of(Selection& own, int block) const {
    return *cooperative_groups::this_cluster().map_shared_rank(&own, unsigned(block));
  }
#else
  __device__ __forceinline__ int size() const { return 1; }
  __device__ __forceinline__ int rank() const { return 0; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ const Selection& of(Selection& own, int) const { return own; }
#endif
};

// Finds the bin in which the rank-th pixel is, counted from 1, of what the team has counted.
__device__ __forceinline__ void find_digit(const Team& team, Selection& own, int parity, uint32_t rank) {
  constexpr int kEach = kBins / kSelectThreads;
  uint32_t counts[kEach] = {}, sum = 0;
  for (int block = 0; block < team.size(); ++block) {
    const uint32_t* const bins = team.of(own, block).histogram[parity] + threadIdx.x * kEach;
#pragma unroll
    for (int i = 0; i < kEach; ++i) counts[i] += bins[i];
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) sum += counts[i];
  // How many are in the bins of this thread and of those before it.
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint32_t below = sum;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const uint32_t before = __shfl_up_sync(kAllLanes, below, distance);
    if (lane >= distance) below += before;
  }
  if (lane == kWarp - 1) own.warps[warp] = below;
  __syncthreads();
  below -= sum;
  for (int w = 0; w < warp; ++w) below += own.warps[w];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (below < rank && rank <= below + counts[i]) {
      own.digit = threadIdx.x * kEach + i;
      own.below = below;
      own.count = counts[i];
    }
    below += counts[i];
  }
}

// Divides each image by its percentile, or by its largest value where that is 0, and cuts at 1.
__global__ void __launch_bounds__(kSelectThreads)
    scale_by_percentile(const double* maps, int64_t pixels, uint32_t rank, float* out) {
  __shared__ Selection own;
  const Team team;
  const int64_t offset = share_of_block(unsigned(team.size())).row * pixels;
  const double* const values = maps + offset;
  // Pixel by pixel, so that lanes are neighbours; whole warps, since they count together.
  const int64_t begin = int64_t(team.rank()) * kSelectThreads + threadIdx.x;
  const int64_t stride = int64_t(team.size()) * kSelectThreads;
  const int64_t end = ceil_div(pixels, kWarp) * kWarp;
  const auto bits_of = [&](int64_t pixel) { return order_bits(values[pixel]); };
  const auto clear = [&](int parity) {
    for (int at = threadIdx.x; at < kBins; at += kSelectThreads) own.histogram[parity][at] = 0;
  };

  clear(0);
  if (threadIdx.x == 0) own.last = 0;
  __syncthreads();
  uint64_t prefix = 0, most = 0;
  for (int digit = 0; digit < kDigits; ++digit) {
    const int shift = digit_shift(digit), parity = digit % 2;
    const uint64_t bins = digit_bins(digit);
    for (int64_t pixel = begin; pixel < end; pixel += stride) {
      const uint64_t bits = pixel < pixels ? bits_of(pixel) : 0;
      const bool counts = pixel < pixels && (digit == 0 || (bits >> shift) / bins == prefix);
      if (__any_sync(kAllLanes, counts))
        count_lanes(own.histogram[parity], counts ? int(bits >> shift & (bins - 1)) : -1);
      most = bits > most ? bits : most;
    }
    team.sync();
    // Nobody reads what was counted by the digit before any more.
    clear(1 - parity);
    find_digit(team, own, parity, rank);
    __syncthreads();
    prefix = prefix * bins + own.digit;
    rank -= own.below;
    if (own.count == 1) {
      for (int64_t pixel = begin; pixel < pixels; pixel += stride)
        if (bits_of(pixel) >> shift == prefix) own.last = bits_of(pixel);
      team.sync();
      prefix = 0;
      for (int block = 0; block < team.size(); ++block) prefix = max(prefix, team.of(own, block).last);
      break;
    }
  }

#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const uint64_t other = __shfl_xor_sync(kAllLanes, most, distance);
    most = other > most ? other : most;
  }
  if (threadIdx.x % kWarp == 0) own.most[threadIdx.x / kWarp] = most;
  team.sync();
  for (int block = 0; block < team.size(); ++block)
    for (const uint64_t other : team.of(own, block).most) most = other > most ? other : most;
  const double largest = from_order_bits(most), scale = saliency_scale(from_order_bits(prefix), largest);
  for (int64_t pixel = begin; pixel < pixels; pixel += stride)
    out[offset + pixel] = is_finite(largest) ? scaled_saliency(values[pixel], scale) : float(largest - largest);
  team.sync();  // shared memory goes with its block, and others of the team may still read it
}

// The pixels of a tensor [..., H, W] as one axis, where they are equally far from each other in memory.
bool one_axis_of_pixels(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1, width = tensor.size(last);
  return width == 1 || tensor.size(last - 1) == 1 || tensor.stride(last - 1) == width * tensor.stride(last);
}

int64_t pixel_stride(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) == 1 ? tensor.stride(last - 1) : tensor.stride(last);
}

Tensor with_one_axis_of_pixels(const Tensor& tensor) {
  return one_axis_of_pixels(tensor) ? tensor : torch::stable::contiguous(tensor);
}

template <class T>
Gradient<T> gradient_of(const Tensor& grad, const T* values) {
  Gradient<T> g{values, unsigned(grad.size(0)), unsigned(grad.size(1)), grad.size(2), grad.size(3) * grad.size(4),
                grad.stride(0), grad.stride(1), grad.stride(2), pixel_stride(grad), false, false};
  const bool aligned = aligned_for_four(values) && g.level_stride % 4 == 0 && g.image_stride % 4 == 0;
  g.four_pixels = aligned && g.pixel_stride == 1 && g.channel_stride % 4 == 0 && g.pixels % 4 == 0;
  g.four_channels = aligned && g.channel_stride == 1 && g.pixel_stride % 4 == 0 && g.channels % 4 == 0;
  return g;
}

// Calls f with the way to reduce as a constant.
template <class F>
void with_reduce(const std::string& name, F f) {
  if (name == "max_abs") return f(std::integral_constant<Reduce, Reduce::max_abs>());
  if (name == "sum_abs") return f(std::integral_constant<Reduce, Reduce::sum_abs>());
  f(std::integral_constant<Reduce, Reduce::l2>());
}

// Smooths `maps`, with `scratch` as large as they are; returns in which of the two the result is.
double* smooth(const Launcher& launch, double sigma, int64_t batch, int64_t height, int64_t width, double* maps,
               double* scratch) {
  const int64_t radius = gaussian_radius(sigma), elements = batch * height * width;
  if (sigma == 0.0) return maps;
  double total = 0.0;
  for (int64_t shift = -radius; shift <= radius; ++shift) total += gaussian_tap(shift, sigma);
  if (radius > kMostTaps) {
    const int64_t blocks = ceil_div(elements, kThreads);
    launch(blur_axis, blocks, kThreads, 1, maps, elements, height, width, sigma, 1.0 / total, scratch);
    launch(blur_axis, blocks, kThreads, 1, scratch, elements, width, int64_t{1}, sigma, 1.0 / total, maps);
    return maps;
  }
  Gaussian gaussian{int(radius), {}};
  for (int64_t shift = 0; shift <= radius; ++shift) gaussian.taps[shift] = gaussian_tap(shift, sigma) / total;
  const int64_t tiles = ceil_div(height, kTileRows) * ceil_div(width, kTileColumns);
  launch(blur, batch * tiles, kThreads, 1, maps, height, width, gaussian, scratch);
  return scratch;
}

void gradient_saliency(Tensor grad, std::string reduce, double percentile, double sigma, bool level_norm, Tensor maps) {
  grad = with_one_axis_of_pixels(grad);
  const int64_t levels = grad.size(0), batch = grad.size(1), height = grad.size(3), width = grad.size(4);
  const int64_t pixels = height * width;
  STD_TORCH_CHECK(pixels <= std::numeric_limits<uint32_t>::max(), "CUDA: too many pixels in an image: ", pixels);
  const unsigned parts = parts_of(pixels), blocks_per_image = unsigned(ceil_div(pixels, kBlock));
  const Tensor sums = torch::stable::new_empty(grad, {levels, batch, parts}, ScalarType::Double);
  const Tensor averages = torch::stable::new_empty(grad, {batch, height, width}, ScalarType::Double);
  const Tensor scratch = torch::stable::new_empty(grad, {batch, height, width}, ScalarType::Double);
  // The mean of the only level is lost in the percentile.
  double* const partial = level_norm && levels > 1 ? static_cast<double*>(sums.mutable_data_ptr()) : nullptr;
  double* const average = static_cast<double*>(averages.mutable_data_ptr());
  const Launcher launch(grad);
  with_values(grad, [&]<class T>(const T* values) {
    const Gradient<T> gradient = gradient_of(grad, values);
    with_reduce(reduce, [&]<class Constant>(Constant) {
      constexpr Reduce kReduce = Constant::value;
      if (partial) launch(sum_levels<kReduce, T>, levels * batch * parts, kThreads, 1, gradient, parts, partial);
      launch(average_levels<kReduce, T>, batch * blocks_per_image, kThreads, 1, gradient, partial, parts,
             blocks_per_image, pixels % 4 == 0, average);
    });
  });
  const double* const smoothed =
      smooth(launch, sigma, batch, height, width, average, static_cast<double*>(scratch.mutable_data_ptr()));
  // Some eight pixels a thread.
  const int64_t most = launch.largest_cluster(scale_by_percentile);
  const int64_t team = std::clamp(pixels / (8 * kSelectThreads), int64_t{1}, most);
  launch(scale_by_percentile, batch * team, kSelectThreads, int(team), smoothed, pixels,
         uint32_t(percentile_rank(percentile, pixels)), static_cast<float*>(maps.mutable_data_ptr()));
}

// --- Fusion ----------------------------------------------------------------------------------------------------------

// A tensor [B, K, H, W], whose pixels are equally far from each other in memory.
template <class T>
struct Maps {
  const T* values;
  int64_t image_stride, class_stride, pixel_stride;
  bool four_pixels;

  __device__ __forceinline__ Four<float> load(int64_t image, int64_t k, int64_t pixel, int64_t count) const {
    const T* const from = values + image * image_stride + k * class_stride + pixel * pixel_stride;
    return load_four(from, pixel_stride, count, four_pixels);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    fuse_maps(const __grid_constant__ Maps<T> gradient_maps, const __grid_constant__ Maps<T> cams, const bool* present,
              const __grid_constant__ Thresholds thresholds, int classes, int64_t pixels, unsigned parts, bool aligned,
              int8_t* labels) {
  const auto [image, part] = share_of_block(parts);
  const int64_t pixel = part * kBlock + threadIdx.x * 4, count = pixels - pixel;
  if (count <= 0) return;
  Fusion fusion[4];
  for (int k = 0; k < classes; ++k) {
    if (!present[image * classes + k]) continue;
    const Four<float> gradient = gradient_maps.load(image, k, pixel, count), cam = cams.load(image, k, pixel, count);
#pragma unroll
    for (int i = 0; i < 4; ++i) fusion[i].add(gradient.at[i], cam.at[i], thresholds, k + 1);
  }
  Four<int8_t> four;
#pragma unroll
  for (int i = 0; i < 4; ++i) four.at[i] = fusion[i].label();
  store_four(labels + image * pixels + pixel, four, count, aligned);
}

template <class T>
Maps<T> maps_of(const Tensor& tensor, const T* values) {
  Maps<T> maps{values, tensor.stride(0), tensor.stride(1), pixel_stride(tensor), false};
  maps.four_pixels = maps.pixel_stride == 1 && aligned_for_four(values) && maps.image_stride % 4 == 0 &&
                     maps.class_stride % 4 == 0 && tensor.size(2) * tensor.size(3) % 4 == 0;
  return maps;
}

// A kernel of its own: it needs the maps of all classes, and the activation maps, which come from elsewhere.
void fuse_evidence(Tensor gradient_map, Tensor cam, Tensor image_label, std::vector<double> thresholds, Tensor labels) {
  gradient_map = with_one_axis_of_pixels(gradient_map);
  cam = with_one_axis_of_pixels(cam);
  const int64_t batch = gradient_map.size(0), pixels = gradient_map.size(2) * gradient_map.size(3);
  const unsigned parts = unsigned(ceil_div(pixels, kBlock));
  const Thresholds at{float(thresholds[0]), float(thresholds[1]), float(thresholds[2]), float(thresholds[3])};
  const bool* const present = static_cast<const bool*>(image_label.const_data_ptr());
  int8_t* const out = static_cast<int8_t*>(labels.mutable_data_ptr());
  const Launcher launch(gradient_map);
  with_values(gradient_map, [&]<class T>(const T* values) {
    launch(fuse_maps<T>, batch * parts, kThreads, 1, maps_of(gradient_map, values),
           maps_of(cam, static_cast<const T*>(cam.const_data_ptr())), present, at, int(gradient_map.size(1)), pixels,
           parts, pixels % 4 == 0, out);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cldf_fast, CUDA, m) {
  m.impl("pixel_seed_out", TORCH_BOX(&pixel_seed));
  m.impl("noised_batch_out", TORCH_BOX(&noised_batch));
  m.impl("gradient_saliency_out", TORCH_BOX(&gradient_saliency));
  m.impl("fuse_evidence_out", TORCH_BOX(&fuse_evidence));
}
