// What the kernels need from the compiler, so that tests can replace it (tests/simt).
#pragma once

#include <cstdint>

#ifndef CTLD_SHARED
#define CTLD_SHARED(type, name) __shared__ type name
#endif

// Pointers that come out of memory: says that they do not point to shared or local memory.
#ifdef __CUDA_ARCH__
#define CTLD_ASSUME_GLOBAL(x) __builtin_assume(__isGlobal(x))
#else
#define CTLD_ASSUME_GLOBAL(x) (void)(x)
#endif

// Keeps the compiler from holding in registers what it can read again.
#ifdef __CUDA_ARCH__
#define CTLD_FORGET_MEMORY() asm volatile("" ::: "memory")
#else
#define CTLD_FORGET_MEMORY() (void)0
#endif

#define CTLD_DEVICE static __device__ __forceinline__
// At least so many blocks of a kernel are resident on a multiprocessor: half of its threads or more. With
// eight blocks on sm_120, which has room for 12, one kernel would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 1200
#define CTLD_RESIDENT_BLOCKS 7
#else
#define CTLD_RESIDENT_BLOCKS 8
#endif
#define CTLD_KERNEL __global__ void __launch_bounds__(kThreads, CTLD_RESIDENT_BLOCKS)

// threadIdx.x, read anew wherever it is asked for.
CTLD_DEVICE uint32_t thread() {
#ifdef __CUDA_ARCH__
  uint32_t x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
#else
  return threadIdx.x;
#endif
}

// A pointer in shared memory, read anew wherever it is asked for: otherwise it is kept in registers for the
// whole of a loop, and spilled.
template <class T>
CTLD_DEVICE T* reread(T* const& x) {
#ifdef __CUDA_ARCH__
  T* value;
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(&x));
  asm volatile("ld.volatile.shared.b64 %0, [%1];" : "=l"(value) : "r"(address));
  return value;
#else
  return x;
#endif
}
