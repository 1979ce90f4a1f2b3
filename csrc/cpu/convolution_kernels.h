// What cpu/convolution.cpp has done by cpu/simd/convolution.cpp, which is compiled once for each instruction set.

#pragma once

#include <cstdint>

namespace cldf_fast {

// A tile: kSide x kSide results, from kReach x kReach values.
constexpr int64_t kTaps = 3, kSide = 4, kReach = kSide + kTaps - 1, kPoints = kReach * kReach;

// Transformed channels are padded to a multiple of it, for all instruction sets.
constexpr int64_t kAlignment = 16;

// Floats from one point to the next: 36 points a power of two apart would meet in few sets of the cache.
constexpr int64_t point_stride(int64_t count, int64_t channels) { return count * channels + kAlignment; }

// 3 x 3 weights for each pair of channels, which lie this far apart. turned: by half a turn each.
struct Weights {
  const float* values;
  int64_t in_channels, out_channels, in_stride, out_stride;
  bool turned;
};

// Images with channels side by side, [B, H, W, C].
struct Images {
  const float* values;
  int64_t height, width, channels;
};

// What is to be written, [B, H, W, C], what is added to every pixel [C], and to every value [B, H, W, C].
struct Results {
  float* values;
  int64_t height, width, channels;
  const float *bias, *residual;
};

// Where a tile's results begin.
struct Tile {
  int64_t image, row, column;
};

struct ConvolutionKernels {
  // Output channels that are computed together.
  int64_t panel;

  // The transformed weights of `lanes` output channels from `first` on: [kPoints, in channels, lanes]; zero where there
  // are no more output channels.
  void (*transform_weights)(const Weights& weights, int64_t first, int64_t lanes, float* out);

  // The transformed values of some tiles, with zeros around the images: [kPoints, count, padded]. padded: channels,
  // rounded up to a multiple of kAlignment.
  void (*transform_tiles)(const Images& images, const Tile* tiles, int64_t count, int64_t padded, float* out);

  // products[p] = tiles[p] weights[p] for all points: [kPoints, count, lanes]. depth: channels.
  void (*multiply)(const float* tiles, int64_t count, int64_t padded, const float* weights, int64_t depth,
                   int64_t lanes, float* products);

  // Transforms the products back, adds bias and residual unless they are null, and writes what lies within the images,
  // in the channels from `first` on.
  void (*transform_back)(const float* products, const Tile* tiles, int64_t count, int64_t lanes, int64_t first,
                         const Results& results);
};

namespace baseline {
extern const ConvolutionKernels convolution_kernels;
}
namespace avx2 {
extern const ConvolutionKernels convolution_kernels;
}
namespace avx512 {
extern const ConvolutionKernels convolution_kernels;
}

}  // namespace cldf_fast
