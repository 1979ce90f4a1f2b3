// Philox-4x32-10 in vectors: the words of csrc/include/random.h's, several blocks at once.
//
// A lane of 64 bits holds one word of a block in its lower half. Products of lower halves are what instruction sets
// have, and what they leave in the upper half is the word's other half, so that words never need to be moved about.

#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "random.h"
#include "vector_math.h"

namespace cldf_fast::CLDF_ISA {
namespace {

constexpr int64_t kLongs = kLanes / 2;
typedef uint64_t Longs __attribute__((vector_size(kLongs * sizeof(uint64_t))));

// 64 bits of lower half times number; upper halves are not read.
CLDF_INLINE Longs product_of_lower(Longs halves, uint32_t number) {
#if defined(__AVX512F__)
  // With a mask of all lanes: GCC 12 warns of the header of the one without.
  return (Longs)_mm512_maskz_mul_epu32(0xFF, (__m512i)halves, _mm512_set1_epi64(number));
#elif defined(__AVX2__)
  return (Longs)_mm256_mul_epu32((__m256i)halves, _mm256_set1_epi64x(number));
#elif defined(__SSE2__)
  return (Longs)_mm_mul_epu32((__m128i)halves, _mm_set1_epi64x(number));
#else
  return (halves & 0xFFFFFFFF) * number;
#endif
}

// Blocks that are worked on side by side: one would leave the multipliers waiting for its last round.
constexpr int64_t kPhiloxSide = 2, kPhiloxBlocks = kPhiloxSide * kLongs;

// The words of `blocks` consecutive blocks, whose counters differ in c0 alone, in order. to: with room for the next
// multiple of kPhiloxBlocks.
CLDF_INLINE void philox_blocks(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, int64_t blocks,
                               uint32_t* to) {
  Longs lane{};
  for (int64_t i = 0; i < kLongs; ++i) lane[i] = uint64_t(i);
  for (int64_t block = 0; block < blocks; block += kPhiloxBlocks) {
    Longs at[4][kPhiloxSide];
    for (int64_t side = 0; side < kPhiloxSide; ++side) {
      at[0][side] = lane + uint64_t(c0 + block + side * kLongs);
      at[1][side] = Longs{} + uint64_t(c1);
      at[2][side] = Longs{} + uint64_t(c2);
      at[3][side] = Longs{} + uint64_t(c3);
    }
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int64_t side = 0; side < kPhiloxSide; ++side) {
        const Longs product0 = product_of_lower(at[0][side], kPhiloxFactor0);
        const Longs product1 = product_of_lower(at[2][side], kPhiloxFactor1);
        at[0][side] = (product1 >> 32) ^ at[1][side] ^ uint64_t(k0);
        at[2][side] = (product0 >> 32) ^ at[3][side] ^ uint64_t(k1);
        at[1][side] = product1;
        at[3][side] = product0;
      }
      k0 += kPhiloxStep0;
      k1 += kPhiloxStep1;
    }
    // Two words to a lane, in the order in which they lie in memory; the lanes of both halves of a block alternate.
    uint64_t halves[2][kPhiloxBlocks];
    for (int half = 0; half < 2; ++half)
      for (int64_t side = 0; side < kPhiloxSide; ++side) {
        const Longs words = (at[2 * half][side] & 0xFFFFFFFF) | at[2 * half + 1][side] << 32;
        std::memcpy(&halves[half][side * kLongs], &words, sizeof(words));
      }
    for (int64_t i = 0; i < kPhiloxBlocks; ++i)
      for (int half = 0; half < 2; ++half)
        std::memcpy(to + 4 * (block + i) + 2 * half, &halves[half][i], sizeof(uint64_t));
  }
}

}  // namespace
}  // namespace cldf_fast::CLDF_ISA
