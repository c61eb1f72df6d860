// Parameters stored in 16 bits: widened exactly, rounded to nearest even once.
#pragma once

#include "lane.h"

CTLD_NAMESPACE_BEGIN

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

CTLD_HD float load(float x) { return x; }
CTLD_HD double load(double x) { return x; }
CTLD_HD float load(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

CTLD_HD float load(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7FFFu;
  // infinities and NaNs keep the largest exponent; all others, denormals included, are scaled exactly
  const uint32_t special = magnitude >= 0x7C00u ? 0x70000000u : 0u;
  const float scaled = bit_cast<float>(magnitude << 13) * 0x1p+112f;
  return bit_cast<float>(sign | (special ? (magnitude << 13) + special : bit_cast<uint32_t>(scaled)));
}

CTLD_HD void store(float& to, float x) { to = x; }
CTLD_HD void store(double& to, double x) { to = x; }

CTLD_HD void store(BFloat16& to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  const uint32_t rounded = bits + 0x7FFFu + (bits >> 16 & 1u);
  to.bits = nan ? 0x7FC0u : static_cast<uint16_t>(rounded >> 16);
}

CTLD_HD void store(Float16& to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u;
  } else if (magnitude >= 0x477FF000u) {  // 65520 and above round to infinity
    half = 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // below the smallest normal: the adder rounds at 2^-24
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  }
  to.bits = static_cast<uint16_t>(sign | half);
}

CTLD_NAMESPACE_END
