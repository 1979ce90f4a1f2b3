// A factor of the matrix products in simd/product.h, in any layout.

#pragma once

#include <cstdint>

namespace cldf_fast {

struct Factor {
  const float* values;
  int64_t row_stride, depth_stride;
};

}  // namespace cldf_fast
