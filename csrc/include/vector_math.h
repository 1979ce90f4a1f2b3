// Vectors of numbers in GCC's and Clang's vector extension, as wide as a register of the instruction set that this file
// is compiled for. Sources that include it are compiled once for each instruction set and may include nothing that
// emits functions of the standard library: the linker would keep one copy for all machines.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && !defined(__AVX512F__)
#include <immintrin.h>
#endif

// A namespace of its own for every instruction set, given on the command line.
#ifndef CLDF_ISA
#error "CLDF_ISA is not defined: see setup.py"
#endif

namespace cldf_fast::CLDF_ISA {

#define CLDF_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));

constexpr int64_t kDoubles = kLanes / 2;
typedef double Doubles __attribute__((vector_size(kDoubles * sizeof(double))));

CLDF_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

CLDF_INLINE Floats broadcast(float value) { return value - Floats{}; }

CLDF_INLINE Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}

CLDF_INLINE Doubles load(const double* from) {
  Doubles values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}

CLDF_INLINE Ints load(const int32_t* from) {
  Ints values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}

CLDF_INLINE void store(float* to, Floats values) { std::memcpy(to, &values, sizeof(values)); }
CLDF_INLINE void store(double* to, Doubles values) { std::memcpy(to, &values, sizeof(values)); }

// a > b ? a : b and a < b ? a : b, so that where one of both is NaN the result is b. GCC does not see that AVX has an
// instruction for that.
#if defined(__AVX2__) && !defined(__AVX512F__)
CLDF_INLINE Floats maximum(Floats a, Floats b) { return _mm256_max_ps(a, b); }
CLDF_INLINE Floats minimum(Floats a, Floats b) { return _mm256_min_ps(a, b); }
#else
CLDF_INLINE Floats maximum(Floats a, Floats b) { return a > b ? a : b; }
CLDF_INLINE Floats minimum(Floats a, Floats b) { return a < b ? a : b; }
#endif

// The lower (0) or upper (1) half of a vector's lanes.
CLDF_INLINE Doubles half_of(Floats values, int64_t half) {
  typedef float Half __attribute__((vector_size(kDoubles * sizeof(float))));
  Half lanes;
  std::memcpy(&lanes, reinterpret_cast<const char*>(&values) + half * sizeof(lanes), sizeof(lanes));
  return __builtin_convertvector(lanes, Doubles);
}

// The sum of a vector's lanes, halves at a time.
CLDF_INLINE float sum_of(Floats values) {
  float lanes[kLanes];
  store(lanes, values);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// exp(x) for x <= 88, within 2 units in the last place; 0 below -87.7 (minus infinity too); NaN stays NaN.
// exp(x) = 2^n exp(r) with r = x - n ln 2, |r| <= ln(2) / 2, by the polynomial of Cephes (S. Moshier).
CLDF_INLINE Floats exponential(Floats x) {
  // At -88 n is -127, and 2^n then is 0.
  const Floats clamped = maximum(broadcast(-88.0f), x);
  // Adding 1.5 * 2^23 rounds to the nearest whole number, which then stands in the lowest bits.
  const Floats shifted = clamped * 1.44269504088896341f + 12582912.0f;
  const Floats n = shifted - 12582912.0f;
  const Floats r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Ints bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits - 0x4B400000 + 127) << 23;
  Floats power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}

// log(1 + x) for x in [0, 1]: 2 artanh(x / (2 + x)), by its series, which has converged at the ninth term.
CLDF_INLINE Floats log_one_plus(Floats x) {
  const Floats r = x / (x + 2.0f), square = r * r;
  Floats p = broadcast(1.0f / 17);
  for (int odd = 15; odd > 0; odd -= 2) p = p * square + 1.0f / odd;
  return 2.0f * r * p;
}

}  // namespace cldf_fast::CLDF_ISA
