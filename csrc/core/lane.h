// Lanes: the number types that the mathematics in this folder is written for.
//
// A lane type supplies Float, Word (32-bit unsigned), Wide (64-bit unsigned, of which the low 32 bits
// count) and the operations on them that are not operators. ScalarLane holds one value and serves a GPU
// thread or a plain host loop; vector lanes for CPUs are in simd.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define CTLD_HD static __host__ __device__ __forceinline__
#define CTLD_MEMBER static __host__ __device__ __forceinline__
#else
#define CTLD_HD static inline __attribute__((always_inline))
#define CTLD_MEMBER static inline __attribute__((always_inline))
#endif

// Objects for different instruction sets are linked together; each gets its own copy of every inline
// function, so that the linker cannot merge a wide one into a narrow program.
#ifdef CTLD_ISA
#define CTLD_NAMESPACE_BEGIN \
  namespace ctld {           \
  inline namespace CTLD_ISA {
#define CTLD_NAMESPACE_END \
  }                        \
  }
#else
#define CTLD_NAMESPACE_BEGIN namespace ctld {
#define CTLD_NAMESPACE_END }
#endif

CTLD_NAMESPACE_BEGIN

template <class To, class From>
CTLD_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

struct ScalarLane {
  using Float = float;
  using Word = uint32_t;
  using Wide = uint64_t;

  CTLD_MEMBER Float broadcast(float x) { return x; }
  CTLD_MEMBER Wide widen(uint32_t x) { return x; }
  // low 32 bits of a times m, all 64 bits of it
  CTLD_MEMBER Wide multiply(Wide a, uint32_t m) {
#ifdef __CUDA_ARCH__
    // one instruction; the compiler would multiply 64-bit numbers
    uint64_t product;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(static_cast<uint32_t>(a)), "r"(m));
    return product;
#else
    return static_cast<uint64_t>(static_cast<uint32_t>(a)) * m;
#endif
  }
  CTLD_MEMBER Wide high(Wide a) { return a >> 32; }
  CTLD_MEMBER Word bits(Float x) { return bit_cast<uint32_t>(x); }
  CTLD_MEMBER Float from_bits(Word x) { return bit_cast<float>(x); }
  CTLD_MEMBER Float signed_to_float(Word x) { return static_cast<float>(static_cast<int32_t>(x)); }
  // IEEE root of a number far from 0 and infinity
  CTLD_MEMBER Float square_root(Float x) {
#ifdef __CUDA_ARCH__
    // An approximate reciprocal root and one correction in fused multiply-adds (Markstein): what the compiler
    // makes of sqrtf for such numbers, without its branch for the others.
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    const float g = __fmul_rn(x, y);
    return __fmaf_rn(__fmaf_rn(-g, g, x), __fmul_rn(0.5f, y), g);
#else
    return sqrtf(x);
#endif
  }
};

CTLD_NAMESPACE_END
