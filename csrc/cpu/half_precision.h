// Conversions between float and the bits of the two formats of 16 bits, rounding to nearest, ties to even. Without
// branches, so that loops over them are vectorised on machines that have no instructions for these formats.

#pragma once

#include "saliency.h"

namespace cldf_fast {

CLDF_SHARED float from_bfloat16(uint16_t bits) { return float_from_bits(uint32_t(bits) << 16); }

CLDF_SHARED uint16_t to_bfloat16(float value) {
  const uint32_t bits = float_bits(value), rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  return uint16_t(value == value ? rounded : 0x7FC0u);
}

CLDF_SHARED float from_float16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16, magnitude = uint32_t(half & 0x7FFFu) << 13;
  // Moves the exponent from its own bias to that of float, subnormal numbers too.
  const uint32_t moved = float_bits(float_from_bits(magnitude) * 0x1p112f);
  return float_from_bits(sign | (magnitude >= 0x7C00u << 13 ? magnitude | 0x7F800000u : moved));
}

CLDF_SHARED uint16_t to_float16(float value) {
  const uint32_t bits = float_bits(value), magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - (112u << 23) + 0x0FFFu + (magnitude >> 13 & 1u)) >> 13;
  // Of a number from 1/2 on the last bit is worth as much as the smallest subnormal number.
  const uint32_t subnormal = float_bits(float_from_bits(magnitude) + 0.5f) - float_bits(0.5f);
  const uint32_t finite = magnitude < 113u << 23 ? subnormal : normal;
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  return uint16_t(bits >> 16 & 0x8000u) | uint16_t(magnitude >= 0x477FF000u ? special : finite);
}

}  // namespace cldf_fast
