// Sixteen floats at a time, in GCC's and Clang's vector extension: the compiler lowers each operation to whatever the
// enclosing function's target has (one AVX-512 register, two of AVX2, four of SSE or NEON).
// Everything is inlined into its caller, so that a function with a target attribute gets its instructions here too.

#pragma once

#include <cstdint>
#include <cstring>

namespace cldf_fast {

#define CLDF_INLINE inline __attribute__((always_inline))
// For a lambda, between its parameters and its body: outside of its caller it would get the plain instructions.
#define CLDF_LAMBDA __attribute__((always_inline))

constexpr int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));

CLDF_INLINE Floats broadcast(float value) { return value - Floats{}; }

CLDF_INLINE Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}

CLDF_INLINE void store(float* to, Floats values) { std::memcpy(to, &values, sizeof(values)); }

// The first `count` floats; the other lanes are `rest`.
CLDF_INLINE Floats load_some(const float* from, int64_t count, float rest) {
  Floats values = broadcast(rest);
  std::memcpy(&values, from, count * sizeof(float));
  return values;
}

CLDF_INLINE void store_some(float* to, Floats values, int64_t count) { std::memcpy(to, &values, count * sizeof(float)); }

CLDF_INLINE Floats maximum(Floats a, Floats b) { return a > b ? a : b; }
CLDF_INLINE Floats minimum(Floats a, Floats b) { return a < b ? a : b; }

// Lanes are combined in a fixed order, so that a sum is the same in every run.
CLDF_INLINE float sum(Floats values) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) values[i] += values[i + width];
  return values[0];
}

CLDF_INLINE float maximum(Floats values) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) values[i] = values[i] > values[i + width] ? values[i] : values[i + width];
  return values[0];
}

// exp(x) for x <= 88, within 2 units in the last place; 0 below -87.3 (minus infinity too); NaN stays NaN.
// exp(x) = 2^n exp(r) with r = x - n ln 2, |r| <= ln(2) / 2, by the polynomial of Cephes (S. Moshier).
CLDF_INLINE Floats exponential(Floats x) {
  const Floats clamped = x < -87.3f ? broadcast(-87.3f) : x;
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
  return x < -87.3f ? Floats{} : p * power;
}

// log(1 + x) for x in [0, 1]: 2 artanh(x / (2 + x)), by its series, which has converged at the ninth term.
CLDF_INLINE Floats log_one_plus(Floats x) {
  const Floats r = x / (x + 2.0f), square = r * r;
  Floats p = broadcast(1.0f / 17);
  for (int odd = 15; odd > 0; odd -= 2) p = p * square + 1.0f / odd;
  return 2.0f * r * p;
}

}  // namespace cldf_fast
