// Lanes of a vector that are in use: all of them, or the first few.

#pragma once

#include "vector_math.h"

namespace cldf_fast::CLDF_ISA {
namespace {

// only: 0 in the lanes that are not in use.
struct All {
  CLDF_INLINE Floats load(const float* from) const { return CLDF_ISA::load(from); }
  CLDF_INLINE void store(float* to, Floats values) const { CLDF_ISA::store(to, values); }
  CLDF_INLINE Floats only(Floats values) const { return values; }
};

struct Some {
  int64_t count;

  CLDF_INLINE Floats load(const float* from) const {
    Floats values{};
    std::memcpy(&values, from, count * sizeof(float));
    return values;
  }
  CLDF_INLINE void store(float* to, Floats values) const { std::memcpy(to, &values, count * sizeof(float)); }
  CLDF_INLINE Floats only(Floats values) const {
    float lanes[kLanes];
    CLDF_ISA::store(lanes, values);
    return load(lanes);
  }
};

}  // namespace
}  // namespace cldf_fast::CLDF_ISA
