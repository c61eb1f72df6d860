// Number formats in memory. Those of 16 bits are widened exactly and rounded once, to nearest even or, for
// bfloat16, stochastically.
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
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7FFFu;
  // infinities and NaNs keep the largest exponent; all others, denormals included, are scaled exactly
  const uint32_t special = magnitude >= 0x7C00u ? 0x70000000u : 0u;
  const float scaled = bit_cast<float>(magnitude << 13) * 0x1p+112f;
  return bit_cast<float>(sign | (special ? (magnitude << 13) + special : bit_cast<uint32_t>(scaled)));
#endif
}

CTLD_HD void store(float& to, float x) { to = x; }
CTLD_HD void store(double& to, double x) { to = x; }

// bfloat16 is the upper half of float32: rounding adds a number of 16 bits and cuts off the lower half.
CTLD_HD BFloat16 rounded_by(float x, uint32_t addend) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return {static_cast<uint16_t>(nan ? 0x7FC0u : (bits + addend) >> 16)};
}

// The addend that rounds to nearest even. A random one rounds up with the probability of the fraction cut
// off, so that the mean is exact.
CTLD_HD uint32_t nearest_even(float x) { return 0x7FFFu + (bit_cast<uint32_t>(x) >> 16 & 1u); }

CTLD_HD void store(BFloat16& to, float x) { to = rounded_by(x, nearest_even(x)); }

CTLD_HD void store(Float16& to, float x) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
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
#endif
}

// One word of the rounding stream per element: its low half rounds the parameter, its high half the momentum.
CTLD_HD uint32_t parameter_rounding(uint32_t word) { return word & 0xFFFFu; }
CTLD_HD uint32_t momentum_rounding(uint32_t word) { return word >> 16; }

// How a parameter and its momentum are stored, and in what they are computed.
enum class Format : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3, kBFloat16Both = 4 };

constexpr int kFormats = 5;

CTLD_HD uint32_t parameter_bytes(Format format) {
  if (format == Format::kFloat64) return 8;
  return format == Format::kFloat32 ? 4 : 2;
}

CTLD_HD uint32_t momentum_bytes(Format format) {
  if (format == Format::kFloat64) return 8;
  return format == Format::kBFloat16Both ? 2 : 4;
}

template <class Parameter_, class Momentum_, class Real_>
struct Stored {
  using Parameter = Parameter_;
  using Momentum = Momentum_;
  using Real = Real_;
};

template <Format format>
struct StorageOf;
template <>
struct StorageOf<Format::kFloat32> : Stored<float, float, float> {};
template <>
struct StorageOf<Format::kBFloat16> : Stored<BFloat16, float, float> {};
template <>
struct StorageOf<Format::kFloat16> : Stored<Float16, float, float> {};
template <>
struct StorageOf<Format::kFloat64> : Stored<double, double, double> {};
template <>
struct StorageOf<Format::kBFloat16Both> : Stored<BFloat16, BFloat16, float> {};

CTLD_NAMESPACE_END
