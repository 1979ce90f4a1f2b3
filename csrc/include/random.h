// Random numbers that are the same on every backend: words of Philox-4x32-10, and what is drawn from them. Shared by
// host and device. Which key and counter stand for what, and the formulas, are fixed in cldf_fast/ops/reference.py.
//
// No branches, so that compilers vectorise loops over these functions; no call into a mathematical library, whose
// results differ between machines.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define CLDF_SHARED __host__ __device__ __forceinline__
#else
#define CLDF_SHARED inline __attribute__((always_inline))
#endif

namespace cldf_fast {

constexpr uint32_t kAnchorStream = 1, kNoiseStream = 2;

struct Words {
  uint32_t at[4];
};

// Philox-4x32 with ten rounds (Salmon et al. 2011); cpu/simd/philox.h computes several blocks at once.
constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxFactor0 = 0xD2511F53, kPhiloxFactor1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxStep0 = 0x9E3779B9, kPhiloxStep1 = 0xBB67AE85;

CLDF_SHARED Words philox4x32(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    // Halves as products of their own: compilers make one instruction of each.
    const uint32_t high0 = uint32_t(uint64_t(c0) * kPhiloxFactor0 >> 32), low0 = c0 * kPhiloxFactor0;
    const uint32_t high1 = uint32_t(uint64_t(c2) * kPhiloxFactor1 >> 32), low1 = c2 * kPhiloxFactor1;
    c0 = high1 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = low1;
    c3 = low0;
    k0 += kPhiloxStep0;
    k1 += kPhiloxStep1;
  }
  return {{c0, c1, c2, c3}};
}

CLDF_SHARED double from_bits(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

CLDF_SHARED uint64_t to_bits(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// ln(x) of a normal x > 0, within one unit in the last place, by fdlibm's method: x = 2^k m with m in
// [sqrt(1/2), sqrt(2)), s = (m - 1) / (m + 1), ln(m) = 2 artanh(s).
CLDF_SHARED double natural_log(double x) {
  // The exponent of x over sqrt(1/2), as an integer in the lowest bits of a double near 2^52.
  const uint64_t bits = to_bits(x) + (0x3FF0000000000000u - 0x3FE6A09E00000000u);
  const double k = from_bits(0x4330000000000000u | (bits >> 52)) - (0x1p52 + 1023);
  const double m = from_bits((bits & 0x000FFFFFFFFFFFFFu) + 0x3FE6A09E00000000u);
  const double f = m - 1.0, s = f / (2.0 + f), z = s * s;
  double p = 1.479819860511658591e-01;
  p = p * z + 1.531383769920937332e-01;
  p = p * z + 1.818357216161805012e-01;
  p = p * z + 2.222219843214978396e-01;
  p = p * z + 2.857142874366239149e-01;
  p = p * z + 3.999999999940941908e-01;
  p = p * z + 6.666666666666735130e-01;
  p *= z;
  const double half = 0.5 * f * f;
  return k * 6.93147180369123816490e-01 - ((half - (s * (half + p) + k * 1.90821492927058770002e-10)) - f);
}

// A variate of the unit exponential distribution from a word.
CLDF_SHARED float exponential_variate(uint32_t word) { return float(-natural_log((4294967295.5 - word) * 0x1p-32)); }

struct NormalPair {
  float first, second;
};

// Two independent standard normal numbers from two words, by Box and Muller.
CLDF_SHARED NormalPair normal_pair(uint32_t radius_word, uint32_t angle_word) {
  const double radius = sqrt(-2.0 * natural_log(((radius_word >> 8) + 1) * 0x1p-24));
  // The angle in quarters of a turn: the nearest whole one, and what is left of it, at most half a quarter.
  const uint32_t turn = angle_word >> 8, quarter = (turn + (1u << 21)) >> 22;
  const double x = double(int32_t(turn) - int32_t(quarter << 22)) * (6.28318530717958647693 * 0x1p-24), z = x * x;
  double s = 1.58969099521155010221e-10;
  s = s * z - 2.50507602534068634195e-08;
  s = s * z + 2.75573137070700676789e-06;
  s = s * z - 1.98412698298579493134e-04;
  s = s * z + 8.33333333332248946124e-03;
  s = s * z - 1.66666666666666324348e-01;
  s = x + x * z * s;
  double c = -1.13596475577881948265e-11;
  c = c * z + 2.08757232129817482790e-09;
  c = c * z - 2.75573143513906633035e-07;
  c = c * z + 2.48015872894767294178e-05;
  c = c * z - 1.38888888888741095749e-03;
  c = c * z + 4.16666666666666019037e-02;
  c = 1.0 - 0.5 * z + z * z * c;
  const double cosine = quarter & 1 ? s : c, sine = quarter & 1 ? c : s;
  // The signs of sine and cosine in the four quarters.
  return {float((quarter + 1) & 2 ? -(radius * cosine) : radius * cosine),
          float(quarter & 2 ? -(radius * sine) : radius * sine)};
}

}  // namespace cldf_fast
