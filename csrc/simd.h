// Vector lanes for CPUs: GCC vector types, with intrinsics where an operator has no vector form.
// The width follows the instruction set that the including file is compiled for.
#pragma once

#include "core/lane.h"

#if defined(__x86_64__)
// GCC's own "undefined" start values look uninitialised to it
#pragma GCC diagnostic push
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

CTLD_NAMESPACE_BEGIN

struct VectorLane {
#if defined(__AVX512F__)
  static constexpr int kBytes = 64;
#elif defined(__AVX2__)
  static constexpr int kBytes = 32;
#else
  static constexpr int kBytes = 16;
#endif
  static constexpr int kLanes = kBytes / 4;

  typedef float Float __attribute__((vector_size(kBytes)));
  typedef uint32_t Word __attribute__((vector_size(kBytes)));
  typedef int32_t Int __attribute__((vector_size(kBytes)));
  typedef uint64_t Wide __attribute__((vector_size(kBytes)));

  CTLD_MEMBER Float broadcast(float x) { return Float{} + x; }
  // copies x to both halves of each lane: the high half does not count
  CTLD_MEMBER Wide widen(uint32_t x) { return reinterpret_cast<Wide>(Word{} + x); }
  CTLD_MEMBER Word bits(Float x) { return reinterpret_cast<Word>(x); }
  CTLD_MEMBER Float from_bits(Word x) { return reinterpret_cast<Float>(x); }
  CTLD_MEMBER Float signed_to_float(Word x) {
    return __builtin_convertvector(reinterpret_cast<Int>(x), Float);
  }
  CTLD_MEMBER Word truncate(Float x) { return reinterpret_cast<Word>(__builtin_convertvector(x, Int)); }
  CTLD_MEMBER Wide high(Wide a) { return a >> 32; }

  template <class T>
  CTLD_MEMBER T load(const void* from) {
    T x;
    memcpy(&x, from, sizeof x);
    return x;
  }
  template <class T>
  CTLD_MEMBER void store(void* to, T x) {
    memcpy(to, &x, sizeof x);
  }

  // The noise group, counted from the first of a block, that 32-bit lane `lane` computes. This order makes
  // the transposition after it stay within 128-bit parts, which is cheap.
  CTLD_MEMBER uint64_t group_of_lane(int lane) {
    return static_cast<uint64_t>(lane % 4 * (kLanes / 4) + lane / 4);
  }
  // the groups of the even-numbered lanes, then of the odd-numbered ones
  CTLD_MEMBER void groups(uint32_t first, Wide& even, Wide& odd) {
    Wide e, o;
    for (int i = 0; i < kLanes / 2; ++i) {
      e[i] = group_of_lane(2 * i);
      o[i] = group_of_lane(2 * i + 1);
    }
    even = e + first;
    odd = o + first;
  }

#if defined(__AVX512F__)
  CTLD_MEMBER Wide multiply(Wide a, uint32_t m) {
    return reinterpret_cast<Wide>(
        _mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi32(static_cast<int>(m))));
  }
  CTLD_MEMBER Float square_root(Float x) {
    return reinterpret_cast<Float>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
  }
  // low words of even and odd numbered lanes, interleaved
  CTLD_MEMBER Word merge(Wide even, Wide odd) {
    __mmask16 odd_words = 0xAAAA;
    return reinterpret_cast<Word>(_mm512_mask_shuffle_epi32(reinterpret_cast<__m512i>(even), odd_words,
                                                            reinterpret_cast<__m512i>(odd), _MM_PERM_CCAA));
  }
  CTLD_MEMBER Float zip_low(Float a, Float b) {
    return reinterpret_cast<Float>(
        _mm512_unpacklo_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
  }
  CTLD_MEMBER Float zip_high(Float a, Float b) {
    return reinterpret_cast<Float>(
        _mm512_unpackhi_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
  }
#elif defined(__AVX2__)
  CTLD_MEMBER Wide multiply(Wide a, uint32_t m) {
    return reinterpret_cast<Wide>(
        _mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi32(static_cast<int>(m))));
  }
  CTLD_MEMBER Float square_root(Float x) {
    return reinterpret_cast<Float>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
  }
  CTLD_MEMBER Word merge(Wide even, Wide odd) {
    const __m256i shifted = _mm256_shuffle_epi32(reinterpret_cast<__m256i>(odd), 0xA0);
    return reinterpret_cast<Word>(_mm256_blend_epi32(reinterpret_cast<__m256i>(even), shifted, 0xAA));
  }
  CTLD_MEMBER Float zip_low(Float a, Float b) {
    return reinterpret_cast<Float>(
        _mm256_unpacklo_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
  }
  CTLD_MEMBER Float zip_high(Float a, Float b) {
    return reinterpret_cast<Float>(
        _mm256_unpackhi_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
  }
#else
  CTLD_MEMBER Word merge(Wide even, Wide odd) {
    return reinterpret_cast<Word>((even & 0xFFFFFFFFull) | (odd << 32));
  }
#if defined(__x86_64__)
  CTLD_MEMBER Float zip_low(Float a, Float b) {
    return reinterpret_cast<Float>(_mm_unpacklo_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b)));
  }
  CTLD_MEMBER Float zip_high(Float a, Float b) {
    return reinterpret_cast<Float>(_mm_unpackhi_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b)));
  }
  CTLD_MEMBER Wide multiply(Wide a, uint32_t m) {
    return reinterpret_cast<Wide>(
        _mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi32(static_cast<int>(m))));
  }
  CTLD_MEMBER Float square_root(Float x) {
    return reinterpret_cast<Float>(_mm_sqrt_ps(reinterpret_cast<__m128>(x)));
  }
#else
  CTLD_MEMBER Float zip_low(Float a, Float b) { return Float{a[0], b[0], a[1], b[1]}; }
  CTLD_MEMBER Float zip_high(Float a, Float b) { return Float{a[2], b[2], a[3], b[3]}; }
#if defined(__aarch64__)
  CTLD_MEMBER Wide multiply(Wide a, uint32_t m) {
    return reinterpret_cast<Wide>(vmull_n_u32(vmovn_u64(reinterpret_cast<uint64x2_t>(a)), m));
  }
  CTLD_MEMBER Float square_root(Float x) {
    return reinterpret_cast<Float>(vsqrtq_f32(reinterpret_cast<float32x4_t>(x)));
  }
#else
  CTLD_MEMBER Wide multiply(Wide a, uint32_t m) { return (a & 0xFFFFFFFFull) * m; }
  CTLD_MEMBER Float square_root(Float x) {
    for (int i = 0; i < kLanes; ++i) x[i] = sqrtf(x[i]);
    return x;
  }
#endif
#endif
#endif

  // Lane i of in[0..3] holds the four values of one noise group. On return out[0..3] hold them group by
  // group, in the order that group_of_lane prepared.
  CTLD_MEMBER void transpose(const Float in[4], Float out[4]) {
    const Float even_low = zip_low(in[0], in[2]), even_high = zip_high(in[0], in[2]);
    const Float odd_low = zip_low(in[1], in[3]), odd_high = zip_high(in[1], in[3]);
    out[0] = zip_low(even_low, odd_low);
    out[1] = zip_high(even_low, odd_low);
    out[2] = zip_low(even_high, odd_high);
    out[3] = zip_high(even_high, odd_high);
  }
};

// A lane of `n` vectors that go through the same operations in lockstep, so that their chains of dependent
// operations hide each other's latency.
template <int n>
struct Lockstep {
  template <class Part>
  struct Parts {
    Part part[n];
    template <class Operation>
    __attribute__((always_inline)) static Parts each(Operation operation) {
      Parts result;
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) result.part[i] = operation(i);
      return result;
    }
#define CTLD_OPERATOR(op)                                                                      \
  __attribute__((always_inline)) friend Parts operator op(const Parts& a, const Parts& b) {    \
    return each([&](int i) __attribute__((always_inline)) { return a.part[i] op b.part[i]; }); \
  }                                                                                            \
  template <class Scalar>                                                                      \
  __attribute__((always_inline)) friend Parts operator op(const Parts& a, Scalar b) {          \
    return each([&](int i) __attribute__((always_inline)) { return a.part[i] op b; });         \
  }
    CTLD_OPERATOR(+)
    CTLD_OPERATOR(-)
    CTLD_OPERATOR(*)
    CTLD_OPERATOR(&)
    CTLD_OPERATOR(|)
#undef CTLD_OPERATOR
  };
  using Float = Parts<VectorLane::Float>;
  using Word = Parts<VectorLane::Word>;

  CTLD_MEMBER Float broadcast(float x) {
    return Float::each([&](int) __attribute__((always_inline)) { return VectorLane::broadcast(x); });
  }
  CTLD_MEMBER Word bits(const Float& x) {
    return Word::each([&](int i) __attribute__((always_inline)) { return VectorLane::bits(x.part[i]); });
  }
  CTLD_MEMBER Float from_bits(const Word& x) {
    return Float::each([&](int i)
                           __attribute__((always_inline)) { return VectorLane::from_bits(x.part[i]); });
  }
  CTLD_MEMBER Float signed_to_float(const Word& x) {
    return Float::each([&](int i)
                           __attribute__((always_inline)) { return VectorLane::signed_to_float(x.part[i]); });
  }
  CTLD_MEMBER Float square_root(const Float& x) {
    return Float::each([&](int i)
                           __attribute__((always_inline)) { return VectorLane::square_root(x.part[i]); });
  }
};

CTLD_NAMESPACE_END
