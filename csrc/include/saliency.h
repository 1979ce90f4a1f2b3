// Around the classifier's forward and backward: the arithmetic of pixel_seed, noised_batch, gradient_saliency and
// fuse_evidence for one element, shared by host and device. What each must return is fixed in
// cldf_fast/ops/reference.py, which works in float64 where sums are long or functions transcendental and rounds once.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "random.h"

namespace cldf_fast {

CLDF_SHARED uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

CLDF_SHARED float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// a * b as IEEE 754 rounds it, whatever a compiler would fuse it with: a product to which zero was added is the same
// with and without a fused multiply-add, and takes no part in another. A product of -0 becomes 0.
CLDF_SHARED float rounded_product(float a, float b) { return a * b + 0.0f; }
CLDF_SHARED double rounded_product(double a, double b) { return a * b + 0.0; }

// --- pixel_seed ------------------------------------------------------------------------------------------------------
//
// seed = mix64(sum over the elements of element_hash), modulo 2^64: the sum may be taken in any order.

// The finaliser of splitmix64.
CLDF_SHARED uint64_t mix64(uint64_t word) {
  word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
  word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
  return word ^ (word >> 31);
}

// position: of the element in [C, H, W].
CLDF_SHARED uint64_t element_hash(uint64_t position, float value) { return mix64(position << 32 | float_bits(value)); }

// --- noised_batch ----------------------------------------------------------------------------------------------------

struct NoiseScales {
  float signal, noise;
};

CLDF_SHARED NoiseScales noise_scales(double alpha_bar) {
  return {float(sqrt(alpha_bar)), float(sqrt(1.0 - alpha_bar))};
}

struct Normals {
  float at[4];
};

// The noise of elements 4 block to 4 block + 3 of [C, H, W].
CLDF_SHARED Normals noise_block(uint64_t seed, uint32_t level, uint32_t block) {
  const Words words = philox4x32(seed, block, level, 0, kNoiseStream);
  const NormalPair first = normal_pair(words.at[0], words.at[1]), second = normal_pair(words.at[2], words.at[3]);
  return {{first.first, first.second, second.first, second.second}};
}

CLDF_SHARED float noised(float x, float noise, NoiseScales scales) {
  return rounded_product(scales.signal, x) + rounded_product(scales.noise, noise);
}

// --- gradient_saliency -----------------------------------------------------------------------------------------------

enum class Reduce { max_abs, sum_abs, l2 };

// The magnitude of a pixel over its channels: add() for each of them, then value(). Is finite only if all of them are,
// and so are sums of it: float64 has room for as many squares of float32 as memory holds.
template <Reduce kReduce>
struct Magnitude {
  double total = -0.0;  // to which anything is added as it is
  CLDF_SHARED void add(float gradient) {
    const double wide = fabsf(gradient);
    total += kReduce == Reduce::l2 ? wide * wide : wide;
  }
  CLDF_SHARED double value() const { return kReduce == Reduce::l2 ? sqrt(total) : total; }
};

// Compares bits, which sort as magnitudes do and put infinity and NaN above all finite ones.
template <>
struct Magnitude<Reduce::max_abs> {
  int32_t bits = 0;
  CLDF_SHARED void add(float gradient) {
    const int32_t magnitude = int32_t(float_bits(gradient) & 0x7FFFFFFFu);
    bits = magnitude > bits ? magnitude : bits;
  }
  CLDF_SHARED double value() const { return float_from_bits(uint32_t(bits)); }
};

CLDF_SHARED bool is_finite(double value) { return fabs(value) <= 0x1.fffffffffffffp+1023; }

// value / scale, and zero where the scale is.
CLDF_SHARED double divide_or_zero(double value, double scale) { return scale > 0.0 ? value / scale : 0.0; }

// The Gaussian is cut at this many pixels on either side.
CLDF_SHARED int64_t gaussian_radius(double sigma) { return int64_t(4.0 * sigma + 0.5); }

// Before division by the sum of all taps from -radius to radius.
CLDF_SHARED double gaussian_tap(int64_t offset, double sigma) {
  const double distance = double(offset) / sigma;
  return std::exp(-0.5 * (distance * distance));
}

// The index in [0, size) of any position on an axis that is mirrored at its borders, as often as need be, without
// repeating the pixels there. The mirrored axis has this period.
CLDF_SHARED int64_t mirror_period(int64_t size) { return size > 1 ? 2 * size - 2 : 1; }
CLDF_SHARED int64_t mirrored(int64_t position, int64_t size) {
  const int64_t period = mirror_period(size), rest = position % period, inside = rest < 0 ? rest + period : rest;
  return inside < period - inside ? inside : period - inside;
}

// Which of the pixels in ascending order, counted from 1, the percentile is.
CLDF_SHARED int64_t percentile_rank(double percentile, int64_t pixels) {
  const double exact = rounded_product(percentile, double(pixels)) - 1e-9;
  const int64_t below = int64_t(exact), rank = below + (double(below) < exact);
  return rank < 1 ? 1 : rank;
}

// Bits that sort as the values do, of a value that is zero or more.
CLDF_SHARED uint64_t order_bits(double value) { return to_bits(value); }
CLDF_SHARED double from_order_bits(uint64_t bits) { return from_bits(bits); }

// What the pixels are multiplied by. upper: the percentile; most: the largest pixel, which serves where that is 0.
CLDF_SHARED double saliency_scale(double upper, double most) {
  const double unit = upper > 0.0 ? upper : most;
  return divide_or_zero(1.0, unit);
}

// A pixel of the result: exactly 1 at the percentile too, as its quotient rounds to that in float.
CLDF_SHARED float scaled_saliency(double saliency, double scale) {
  const double scaled = saliency * scale;
  return float(scaled < 1.0 ? scaled : 1.0);
}

// --- fuse_evidence ---------------------------------------------------------------------------------------------------

struct Thresholds {
  float foreground_gradient, foreground_cam, background_gradient, background_cam;
};

// A pixel over the classes: add() for each label that is present, in ascending order, then label(). NaN is on neither
// side of a threshold; a product that is NaN (infinity times zero) wins, as the first maximum does.
struct Fusion {
  float best = 0.0f;
  int32_t winner = 0, unclear = 0;
  CLDF_SHARED void add(float gradient, float cam, const Thresholds& at, int32_t label) {
    const float product = gradient * cam;
    const bool claimed = (gradient >= at.foreground_gradient) & (cam >= at.foreground_cam);
    const bool clear = (gradient <= at.background_gradient) & (cam <= at.background_cam);
    const bool better = claimed & ((winner == 0) | ((best == best) & !(product <= best)));
    best = better ? product : best;
    winner = better ? label : winner;
    unclear = clear ? unclear : 1;
  }
  CLDF_SHARED int8_t label() const { return int8_t(winner > 0 ? winner : -unclear); }
};

}  // namespace cldf_fast
