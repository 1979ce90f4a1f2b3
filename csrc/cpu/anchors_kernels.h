// What cpu/anchors.cpp has done by cpu/simd/anchors.cpp, which is compiled once for each instruction set.

#pragma once

#include <cstdint>

namespace cldf_fast {

enum class LabelType { int8, uint8, int16, int32, int64 };

// Times are those that cldf_fast/ops/reference.py defines: without weights words, with them bits of float32.
struct AnchorKernels {
  // Class of each pixel, `classes` for those of none or of a weight that isn't above 0. weights may be null. rows: of
  // uint8 or, if wide, of uint32.
  void (*find_classes)(const void* labels, LabelType type, const float* weights, int64_t count, int64_t classes,
                       bool wide, void* rows);
  // Adds the number of pixels of each row to counts[classes + 1]. rows: as find_classes writes them.
  void (*count_classes)(const void* rows, bool wide, int64_t count, int64_t classes, int32_t* counts);
  // Random words of pixels first to first + count - 1. first: a multiple of 4. words: with room for kWordsAtOnce more.
  void (*words)(uint64_t seed, uint64_t image, uint32_t first, int64_t count, uint32_t* words);
  // No later than the times of pixels by their words and weights, and hardly ever much earlier; cheap to compute. Where
  // a weight is not above 0, anything.
  void (*earliest_times)(const uint32_t* words, const float* weights, int64_t count, uint32_t* times);
  // Finds pixels whose time is at most their row's bound, and writes their numbers, in order; returns how many.
  // bounds: [classes + 1], with room for kFewRows. found: with room for `count`.
  int64_t (*find_early)(const uint32_t* times, const void* rows, bool wide, int64_t classes, const uint32_t* bounds,
                        int64_t count, uint32_t* found);
  // The times; in place if `times` is `words`.
  void (*times)(const uint32_t* words, const float* weights, int64_t count, uint32_t* times);
};

constexpr int64_t kWordsAtOnce = 64;
// Rows, one for each class and one for none, that are so few that vectors hold something of each.
constexpr int64_t kFewRows = 8;

namespace baseline {
extern const AnchorKernels anchor_kernels;
}
namespace avx2 {
extern const AnchorKernels anchor_kernels;
}
namespace avx512 {
extern const AnchorKernels anchor_kernels;
}

}  // namespace cldf_fast
