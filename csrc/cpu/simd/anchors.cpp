// Classes and arrival times of pixels. No branches within loops: most of them the compiler turns into vectors.

#include "../anchors_kernels.h"

#include "philox.h"

namespace cldf_fast::CLDF_ISA {
namespace {

uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Infinity too. By bits: whether the smallest numbers are above zero is a setting of each thread.
bool is_positive(float weight) { return bits_of(weight) - 1 < 0x7F800000u; }

// Label: an unsigned type; labels below 0 are above `most`, the largest of the signed one.
template <class Label, class Row>
void find_classes_of(const Label* labels, Label most, const float* weights, int64_t count, int64_t classes, Row* rows) {
  const Label last = uint64_t(classes - 1) < uint64_t(most) ? Label(classes - 1) : most;
  const Row none = Row(classes);
  if (weights)
    for (int64_t i = 0; i < count; ++i)
      rows[i] = ((labels[i] <= last) & is_positive(weights[i])) ? Row(labels[i]) : none;
  else
    for (int64_t i = 0; i < count; ++i) rows[i] = labels[i] <= last ? Row(labels[i]) : none;
}

template <class Label>
void find_classes_of(const void* labels, Label most, const float* weights, int64_t count, int64_t classes, bool wide,
                     void* rows) {
  const Label* of_type = static_cast<const Label*>(labels);
  if (wide)
    find_classes_of(of_type, most, weights, count, classes, static_cast<uint32_t*>(rows));
  else
    find_classes_of(of_type, most, weights, count, classes, static_cast<uint8_t*>(rows));
}

void find_classes(const void* labels, LabelType type, const float* weights, int64_t count, int64_t classes, bool wide,
                  void* rows) {
  switch (type) {
    case LabelType::int8: return find_classes_of<uint8_t>(labels, INT8_MAX, weights, count, classes, wide, rows);
    case LabelType::uint8: return find_classes_of<uint8_t>(labels, UINT8_MAX, weights, count, classes, wide, rows);
    case LabelType::int16: return find_classes_of<uint16_t>(labels, INT16_MAX, weights, count, classes, wide, rows);
    case LabelType::int32: return find_classes_of<uint32_t>(labels, INT32_MAX, weights, count, classes, wide, rows);
    case LabelType::int64: return find_classes_of<uint64_t>(labels, INT64_MAX, weights, count, classes, wide, rows);
  }
}

template <class Row>
void count_rows(const Row* rows, int64_t count, int64_t classes, int32_t* counts) {
  // Neighbours, often of one class, are counted apart, unless classes are very many: a counter that was just written
  // can't be read at once.
  constexpr int64_t kApart = 4, kMost = 256;
  int32_t apart[kApart][kMost] = {};
  if (classes < kMost)
    for (int64_t i = 0; i < count; ++i) ++apart[i % kApart][rows[i]];
  else
    for (int64_t i = 0; i < count; ++i) ++counts[rows[i]];
  for (int64_t row = 0; row < least(classes + 1, kMost); ++row)
    for (const int32_t* counters : apart) counts[row] += counters[row];
}

// A counter of a byte for every lane and row; returns how many pixels were counted.
int64_t count_few_rows(const uint8_t* rows, int64_t count, int64_t classes, int32_t* counts) {
  constexpr int64_t kBytes = kLanes * int64_t(sizeof(float)), kMost = 255;
  typedef uint8_t Bytes __attribute__((vector_size(kBytes)));
  int64_t i = 0;
  while (i + kBytes <= count) {
    Bytes counters[kFewRows] = {};
    for (int64_t j = 0; j < kMost && i + kBytes <= count; ++j, i += kBytes) {
      Bytes row;
      std::memcpy(&row, rows + i, kBytes);
      for (int64_t k = 0; k < kFewRows; ++k) counters[k] -= Bytes(row == uint8_t(k));
    }
    for (int64_t k = 0; k <= classes; ++k)
      for (int64_t lane = 0; lane < kBytes; ++lane) counts[k] += counters[k][lane];
  }
  return i;
}

void count_classes(const void* rows, bool wide, int64_t count, int64_t classes, int32_t* counts) {
  if (wide) return count_rows(static_cast<const uint32_t*>(rows), count, classes, counts);
  const uint8_t* narrow = static_cast<const uint8_t*>(rows);
  const int64_t counted = classes < kFewRows ? count_few_rows(narrow, count, classes, counts) : 0;
  count_rows(narrow + counted, count - counted, classes, counts);
}

void words(uint64_t seed, uint64_t image, uint32_t first, int64_t count, uint32_t* words) {
  static_assert(4 * kPhiloxBlocks <= kWordsAtOnce);
  philox_blocks(seed, first / 4, uint32_t(image), uint32_t(image >> 32), kAnchorStream, (count + 3) / 4, words);
}

void earliest_times(const uint32_t* words, const float* weights, int64_t count, uint32_t* times) {
  for (int64_t i = 0; i < count; ++i) {
    // -ln(1 - u) is not below u, and rounding keeps that order. Signed numbers are what instruction sets convert: the
    // word's halves.
    const float word = float(int32_t(words[i] >> 16)) * 65536.0f + float(int32_t(words[i] & 0xFFFF));
    times[i] = bits_of(word * 0x1p-32f / weights[i]);
  }
}

#if defined(__AVX2__)
CLDF_INLINE __m256i eight(const uint8_t* rows) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)rows)); }
CLDF_INLINE __m256i eight(const uint32_t* rows) { return _mm256_loadu_si256((const __m256i*)rows); }

// The places of the bits that are set in eight, one after the other.
struct Places {
  uint8_t of[256][8];

  constexpr Places() : of{} {
    for (int bits = 0; bits < 256; ++bits)
      for (int place = 0, number = 0; place < 8; ++place)
        if (bits >> place & 1) of[bits][number++] = uint8_t(place);
  }
};
constexpr Places kPlaces;
#endif

template <bool kFew, class Row>
int64_t find_early_of(const uint32_t* times, const Row* rows, const uint32_t* bounds, int64_t count, uint32_t* found) {
  int64_t number = 0, i = 0;
#if defined(__AVX2__)
  // No branch, since few are early, and which can't be foreseen.
  const __m256i first = _mm256_loadu_si256((const __m256i*)bounds);
  for (; i + 8 <= count; i += 8) {
    const __m256i at = _mm256_loadu_si256((const __m256i*)(times + i)), row = eight(rows + i);
    const __m256i bound = kFew ? _mm256_permutevar8x32_epi32(first, row)
                               : _mm256_i32gather_epi32((const int*)bounds, row, sizeof(uint32_t));
    const __m256i early = _mm256_cmpeq_epi32(_mm256_min_epu32(at, bound), at);
    const uint32_t bits = uint32_t(_mm256_movemask_ps((__m256)early));
    const __m256i pixels = _mm256_add_epi32(eight(kPlaces.of[bits]), _mm256_set1_epi32(int32_t(i)));
    _mm256_storeu_si256((__m256i*)(found + number), pixels);
    number += __builtin_popcount(bits);
  }
#endif
  for (; i < count; ++i)
    if (times[i] <= bounds[rows[i]]) found[number++] = uint32_t(i);
  return number;
}

int64_t find_early(const uint32_t* times, const void* rows, bool wide, int64_t classes, const uint32_t* bounds,
                   int64_t count, uint32_t* found) {
  if (wide) return find_early_of<false>(times, static_cast<const uint32_t*>(rows), bounds, count, found);
  const uint8_t* narrow = static_cast<const uint8_t*>(rows);
  return classes < kFewRows ? find_early_of<true>(times, narrow, bounds, count, found)
                            : find_early_of<false>(times, narrow, bounds, count, found);
}

void times(const uint32_t* words, const float* weights, int64_t count, uint32_t* times) {
  for (int64_t i = 0; i < count; ++i) times[i] = bits_of(exponential_variate(words[i]) / weights[i]);
}

}  // namespace

extern const AnchorKernels anchor_kernels{find_classes, count_classes, words, earliest_times, find_early, times};

}  // namespace cldf_fast::CLDF_ISA
