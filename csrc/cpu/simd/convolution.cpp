// Winograd's transforms: a vector of channels at a time.
//
// F(4 x 4, 3 x 3) of Lavin and Gray (arXiv 1509.09308) by Toom and Cook's construction at the points 0, a, -a, b, -b
// and infinity, where a = sqrt(1/2) and b = sqrt(2). Values that are each other's inverses keep the matrices' entries
// near one: in float32 the result is off by 1.7 times what a plain sum of products is off by; the usual points 0, 1, -1,
// 2, -2 make it 4.3 times.

#include "../convolution_kernels.h"

#include <type_traits>

#include "lanes.h"
#include "product.h"
#include "vector_math.h"

namespace cldf_fast::CLDF_ISA {
namespace {

constexpr float kA = 0.70710678118654752f, kB = 1.41421356237309505f;

// Along one axis. What a point and its negative have in common is computed once: an even and an odd part.

CLDF_INLINE void transform_values(const Floats (&d)[kReach], Floats (&out)[kReach]) {
  const Floats even_a = d[4] - 2.0f * d[2], odd_a = d[3] - 2.0f * d[1];
  const Floats even_b = d[4] - 0.5f * d[2], odd_b = d[3] - 0.5f * d[1];
  out[0] = d[0] + d[4] - 2.5f * d[2];
  out[1] = even_a + kA * odd_a;
  out[2] = even_a - kA * odd_a;
  out[3] = even_b + kB * odd_b;
  out[4] = even_b - kB * odd_b;
  out[5] = d[1] + d[5] - 2.5f * d[3];
}

CLDF_INLINE void transform_weight(const Floats (&g)[3], Floats (&out)[kReach]) {
  const Floats even_a = (g[0] + 0.5f * g[2]) * (-1.0f / 1.5f), odd_a = g[1] * (-kA / 1.5f);
  const Floats even_b = (g[0] + 2.0f * g[2]) * (1.0f / 6.0f), odd_b = g[1] * (kB / 6.0f);
  out[0] = g[0];
  out[1] = even_a + odd_a;
  out[2] = even_a - odd_a;
  out[3] = even_b + odd_b;
  out[4] = even_b - odd_b;
  out[5] = g[2];
}

CLDF_INLINE void transform_products(const Floats (&m)[kReach], Floats (&out)[kSide]) {
  const Floats even_a = m[1] + m[2], odd_a = kA * (m[1] - m[2]);
  const Floats even_b = m[3] + m[4], odd_b = kB * (m[3] - m[4]);
  out[0] = m[0] + even_a + even_b;
  out[1] = odd_a + odd_b;
  out[2] = 0.5f * even_a + 2.0f * even_b;
  out[3] = 0.5f * odd_a + 2.0f * odd_b + m[5];
}

// The weights of one input channel and one vector of output channels: by places of the kernel, turned or not.
constexpr int64_t kPlaces = kTaps * kTaps;
typedef float Taps[kPlaces][kLanes];

CLDF_INLINE void transform_taps(const Taps& taps, int64_t point, float* out) {
  Floats columns[kTaps][kReach];
  for (int column = 0; column < kTaps; ++column) {
    const Floats g[kTaps] = {load(taps[column]), load(taps[kTaps + column]), load(taps[2 * kTaps + column])};
    transform_weight(g, columns[column]);
  }
  for (int row = 0; row < kReach; ++row) {
    const Floats g[kTaps] = {columns[0][row], columns[1][row], columns[2][row]};
    Floats points[kReach];
    transform_weight(g, points);
    for (int column = 0; column < kReach; ++column) store(out + (row * kReach + column) * point, points[column]);
  }
}

void transform_weights(const Weights& weights, int64_t first, int64_t lanes, float* out) {
  // Taps of several channels are gathered before the first are loaded: a vector can't be read from what was just
  // written in pieces.
  constexpr int64_t kGathered = 8;
  const int64_t point = point_stride(weights.in_channels, lanes);
  Taps gathered[kGathered] = {};
  for (int64_t c = 0; c < weights.in_channels; c += kGathered) {
    const int64_t channels = least(weights.in_channels - c, kGathered);
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        const bool present = first + lane + i < weights.out_channels;  // all others are padding
        const int64_t at = present ? (first + lane + i) * weights.out_stride + c * weights.in_stride : 0;
        const float* from = weights.values + at;
        for (int64_t j = 0; j < channels; ++j)
          for (int k = 0; k < kPlaces; ++k)
            gathered[j][weights.turned ? kPlaces - 1 - k : k][i] = present ? from[j * weights.in_stride + k] : 0.0f;
      }
      for (int64_t j = 0; j < channels; ++j) transform_taps(gathered[j], point, out + (c + j) * lanes + lane);
    }
  }
}

// Of one tile and one vector of channels; at(i, j): the tile's values.
template <class At>
CLDF_INLINE void transform_tile(At at, int64_t point, float* out) {
  Floats columns[kReach][kReach];
  for (int j = 0; j < kReach; ++j) {
    const Floats d[kReach] = {at(0, j), at(1, j), at(2, j), at(3, j), at(4, j), at(5, j)};
    transform_values(d, columns[j]);
  }
  for (int i = 0; i < kReach; ++i) {
    const Floats d[kReach] = {columns[0][i], columns[1][i], columns[2][i],
                              columns[3][i], columns[4][i], columns[5][i]};
    Floats points[kReach];
    transform_values(d, points);
    for (int j = 0; j < kReach; ++j) store(out + (i * kReach + j) * point, points[j]);
  }
}

void transform_tiles(const Images& images, const Tile* tiles, int64_t count, int64_t padded, float* out) {
  const int64_t column = images.channels, row = images.width * column, vectors = images.channels / kLanes * kLanes;
  const int64_t point = point_stride(count, padded);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t top = tiles[t].row - 1, left = tiles[t].column - 1;
    const int64_t corner = (tiles[t].image * images.height + top) * row + left * column;
    const bool whole = top >= 0 && top + kReach <= images.height && left >= 0 && left + kReach <= images.width;
    const auto inside = [&](int i, int j) {
      return top + i >= 0 && top + i < images.height && left + j >= 0 && left + j < images.width;
    };
    float* to = out + t * padded;
    for (int64_t c = 0; c < vectors; c += kLanes) {
      const auto at = [&](int i, int j) { return load(images.values + (corner + i * row + j * column + c)); };
      if (whole)
        transform_tile(at, point, to + c);
      else
        transform_tile([&](int i, int j) { return inside(i, j) ? at(i, j) : Floats{}; }, point, to + c);
    }
    const Some rest{images.channels - vectors};
    const auto at = [&](int i, int j) {
      return inside(i, j) ? rest.load(images.values + (corner + i * row + j * column + vectors)) : Floats{};
    };
    if (rest.count) transform_tile(at, point, to + vectors);
  }
}

void multiply_points(const float* tiles, int64_t count, int64_t padded, const float* weights, int64_t depth,
                     int64_t lanes, float* products) {
  for (int64_t p = 0; p < kPoints; ++p) {
    multiply<Layout::rows>(tiles + p * point_stride(count, padded), padded, weights + p * point_stride(depth, lanes),
                           lanes, products + p * point_stride(count, lanes), lanes, count, depth, lanes, false);
  }
}

// Of one tile and one vector of channels, which begin at `corner` in the results. Rows, Columns: int64_t, or a constant.
template <class Lanes, class Rows, class Columns>
CLDF_INLINE void transform_tile_back(Lanes lanes, const float* products, int64_t point, const Results& results,
                                     int64_t corner, int64_t channel, Rows rows, Columns columns) {
  const Floats bias = results.bias ? lanes.load(results.bias + channel) : Floats{};
  Floats by_column[kReach][kSide];
  for (int j = 0; j < kReach; ++j) {
    Floats m[kReach];
    for (int i = 0; i < kReach; ++i) m[i] = load(products + (i * kReach + j) * point);
    transform_products(m, by_column[j]);
  }
  for (int i = 0; i < rows; ++i) {
    const Floats m[kReach] = {by_column[0][i], by_column[1][i], by_column[2][i],
                              by_column[3][i], by_column[4][i], by_column[5][i]};
    Floats row[kSide];
    transform_products(m, row);
    for (int j = 0; j < columns; ++j) {
      const int64_t at = corner + (i * results.width + j) * results.channels;
      const Floats value = row[j] + bias;
      lanes.store(results.values + at, results.residual ? value + lanes.load(results.residual + at) : value);
    }
  }
}

constexpr std::integral_constant<int64_t, kSide> kWhole;

void transform_back(const float* products, const Tile* tiles, int64_t count, int64_t lanes, int64_t first,
                    const Results& results) {
  const int64_t point = point_stride(count, lanes);
  for (int64_t t = 0; t < count; ++t) {
    const Tile& tile = tiles[t];
    const int64_t rows = least(kSide, results.height - tile.row), columns = least(kSide, results.width - tile.column);
    const int64_t pixel = (tile.image * results.height + tile.row) * results.width + tile.column;
    for (int64_t lane = 0; lane < lanes && first + lane < results.channels; lane += kLanes) {
      const int64_t channel = first + lane, present = results.channels - channel;
      const auto back = [&](auto used, auto used_rows, auto used_columns) {
        transform_tile_back(used, products + t * lanes + lane, point, results, pixel * results.channels + channel,
                            channel, used_rows, used_columns);
      };
      if (present < kLanes)
        back(Some{present}, rows, columns);
      else if (rows == kSide && columns == kSide)
        back(All{}, kWhole, kWhole);
      else
        back(All{}, rows, columns);
    }
  }
}

}  // namespace

extern const ConvolutionKernels convolution_kernels{kBlockVectors* kLanes, transform_weights, transform_tiles,
                                                    multiply_points, transform_back};

}  // namespace cldf_fast::CLDF_ISA
