// Vector lanes for CPUs: GCC vector types, with intrinsics where an operator has no vector form.
// The width follows the instruction set that the including file is compiled for.
#pragma once

#include "core/lane.h"

#if defined(__x86_64__)
// GCC's own "undefined" start values look uninitialised to it
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
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
  CTLD_MEMBER Float signed_to_float(Word x) { return __builtin_convertvector(reinterpret_cast<Int>(x), Float); }
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

  // 0, 1, 2, ... in the 64-bit lanes, even numbers in `even`, odd ones in `odd`
  CTLD_MEMBER void count(uint32_t from, Wide& even, Wide& odd) {
    Wide lane;
    for (int i = 0; i < kLanes / 2; ++i) lane[i] = static_cast<uint64_t>(2 * i);
    even = lane + from;
    odd = even + 1;
  }

#if defined(__AVX512F__)
  CTLD_MEMBER Wide multiply(Wide a, uint32_t m) {
    return reinterpret_cast<Wide>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi32(static_cast<int>(m))));
  }
  CTLD_MEMBER Float square_root(Float x) { return reinterpret_cast<Float>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x))); }
  // x < limit ? x : limit, so NaN gives limit
  CTLD_MEMBER Float at_most(Float x, Float limit) {
    return reinterpret_cast<Float>(_mm512_min_ps(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(limit)));
  }
  // low words of even and odd numbered lanes, interleaved
  CTLD_MEMBER Word merge(Wide even, Wide odd) {
    __mmask16 odd_words = 0xAAAA;
    return reinterpret_cast<Word>(_mm512_mask_shuffle_epi32(reinterpret_cast<__m512i>(even), odd_words,
                                                            reinterpret_cast<__m512i>(odd), _MM_PERM_CCAA));
  }
  // column i of in[0..3] becomes four neighbours: out[0..3] hold in[0][0] in[1][0] in[2][0] in[3][0] in[0][1] ...
  CTLD_MEMBER void transpose(const Float in[4], Float out[4]) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
    const auto zip = [](Float a, __m512i order, Float b) {
      return reinterpret_cast<Float>(_mm512_permutex2var_ps(reinterpret_cast<__m512>(a), order, reinterpret_cast<__m512>(b)));
    };
    const Float even_low = zip(in[0], low, in[2]), even_high = zip(in[0], high, in[2]);
    const Float odd_low = zip(in[1], low, in[3]), odd_high = zip(in[1], high, in[3]);
    out[0] = zip(even_low, low, odd_low);
    out[1] = zip(even_low, high, odd_low);
    out[2] = zip(even_high, low, odd_high);
    out[3] = zip(even_high, high, odd_high);
  }
#elif defined(__AVX2__)
  CTLD_MEMBER Wide multiply(Wide a, uint32_t m) {
    return reinterpret_cast<Wide>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi32(static_cast<int>(m))));
  }
  CTLD_MEMBER Float square_root(Float x) { return reinterpret_cast<Float>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x))); }
  CTLD_MEMBER Float at_most(Float x, Float limit) {
    return reinterpret_cast<Float>(_mm256_min_ps(reinterpret_cast<__m256>(x), reinterpret_cast<__m256>(limit)));
  }
  CTLD_MEMBER Word merge(Wide even, Wide odd) {
    const __m256i shifted = _mm256_shuffle_epi32(reinterpret_cast<__m256i>(odd), 0xA0);
    return reinterpret_cast<Word>(_mm256_blend_epi32(reinterpret_cast<__m256i>(even), shifted, 0xAA));
  }
  CTLD_MEMBER void transpose(const Float in[4], Float out[4]) {
    const auto v = [](Float x) { return reinterpret_cast<__m256>(x); };
    const __m256 a = _mm256_unpacklo_ps(v(in[0]), v(in[2])), b = _mm256_unpackhi_ps(v(in[0]), v(in[2]));
    const __m256 c = _mm256_unpacklo_ps(v(in[1]), v(in[3])), d = _mm256_unpackhi_ps(v(in[1]), v(in[3]));
    const __m256 p = _mm256_unpacklo_ps(a, c), q = _mm256_unpackhi_ps(a, c);
    const __m256 r = _mm256_unpacklo_ps(b, d), s = _mm256_unpackhi_ps(b, d);
    out[0] = reinterpret_cast<Float>(_mm256_permute2f128_ps(p, q, 0x20));
    out[1] = reinterpret_cast<Float>(_mm256_permute2f128_ps(r, s, 0x20));
    out[2] = reinterpret_cast<Float>(_mm256_permute2f128_ps(p, q, 0x31));
    out[3] = reinterpret_cast<Float>(_mm256_permute2f128_ps(r, s, 0x31));
  }
#else
  CTLD_MEMBER Word merge(Wide even, Wide odd) {
    return reinterpret_cast<Word>((even & 0xFFFFFFFFull) | (odd << 32));
  }
  CTLD_MEMBER void transpose(const Float in[4], Float out[4]) {
    for (int i = 0; i < 4; ++i) out[i] = Float{in[0][i], in[1][i], in[2][i], in[3][i]};
  }
  CTLD_MEMBER Float at_most(Float x, Float limit) { return x < limit ? x : limit; }
#if defined(__x86_64__)
  CTLD_MEMBER Wide multiply(Wide a, uint32_t m) {
    return reinterpret_cast<Wide>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi32(static_cast<int>(m))));
  }
  CTLD_MEMBER Float square_root(Float x) { return reinterpret_cast<Float>(_mm_sqrt_ps(reinterpret_cast<__m128>(x))); }
#elif defined(__aarch64__)
  CTLD_MEMBER Wide multiply(Wide a, uint32_t m) {
    return reinterpret_cast<Wide>(vmull_n_u32(vmovn_u64(reinterpret_cast<uint64x2_t>(a)), m));
  }
  CTLD_MEMBER Float square_root(Float x) { return reinterpret_cast<Float>(vsqrtq_f32(reinterpret_cast<float32x4_t>(x))); }
#else
  CTLD_MEMBER Wide multiply(Wide a, uint32_t m) { return (a & 0xFFFFFFFFull) * m; }
  CTLD_MEMBER Float square_root(Float x) {
    for (int i = 0; i < kLanes; ++i) x[i] = sqrtf(x[i]);
    return x;
  }
#endif
#endif
};

CTLD_NAMESPACE_END
