// Runs CUDA kernels on the host, one host thread per CUDA thread, for tests only.
//
// Everything that orders memory accesses on a GPU is made of something that ThreadSanitizer understands, and
// nothing orders more than the GPU does:
// - __syncthreads is a pthread barrier (of std::barrier the sanitizer does not see that one was forgotten).
// - Atomic operations are relaxed. A word touched atomically anywhere must be touched only atomically.
// - __threadfence acquires and releases one global token: after A's fence and an atomic operation that B
// sees,
//   B's fence makes what A wrote before visible.
// Shared memory starts with garbage.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define CTLD_SHARED(type, name) type& name = simt::shared<type>()

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace simt {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

class Barrier {
 public:
  explicit Barrier(unsigned count) { pthread_barrier_init(&barrier_, nullptr, count); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

constexpr unsigned kWarp = 32;

struct Warp {
  Barrier barrier{kWarp};
  uint64_t slots[kWarp] = {};
};

constexpr std::size_t kSharedBytes = 48 * 1024;

struct Block {
  explicit Block(unsigned threads) : barrier(threads), predicates(threads), warps(threads / kWarp) {
    std::memset(memory, 0xA5, sizeof memory);
    for (auto& warp : warps) warp = std::make_unique<Warp>();
  }
  Barrier barrier;
  std::vector<int> predicates;
  std::vector<std::unique_ptr<Warp>> warps;
  alignas(16) unsigned char memory[kSharedBytes];
};

inline thread_local Index thread_index, block_index, block_size;
inline thread_local Block* block = nullptr;

inline unsigned lane() { return thread_index.x % kWarp; }
inline Warp& warp() { return *block->warps[thread_index.x / kWarp]; }

template <class T>
T& shared() {
  static_assert(sizeof(T) <= kSharedBytes, "shared memory");
  return *reinterpret_cast<T*>(block->memory);
}

template <class T>
T exchange(T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a register");
  Warp& w = warp();
  std::memcpy(&w.slots[lane()], &value, sizeof value);
  w.barrier.wait();
  T result;
  std::memcpy(&result, &w.slots[source < kWarp ? source : lane()], sizeof result);
  w.barrier.wait();
  return result;
}

// The order of unrelated fences on one token is more than a GPU promises, but only between fences.
inline int fence_token = 0;

// How many blocks run at a time; all of them are in no order.
inline unsigned resident_blocks = 2;

// Small enough that the C library keeps the stacks of finished threads for the next ones.
struct SmallStacks {
  SmallStacks() {
    pthread_attr_init(&value);
    pthread_attr_setstacksize(&value, 128 * 1024);
  }
  ~SmallStacks() { pthread_attr_destroy(&value); }
  pthread_attr_t value;
};

template <class Function>
struct Start {
  unsigned thread, block_number, threads;
  Block* memory;
  const Function* kernel;

  static void* enter(void* self) {
    const auto& start = *static_cast<const Start*>(self);
    thread_index.x = start.thread;
    block_index.x = start.block_number;
    block_size.x = start.threads;
    block = start.memory;
    (*start.kernel)();
    return nullptr;
  }
};

template <class Function>
void run(unsigned blocks, unsigned threads, const Function& kernel) {
  if (threads % kWarp != 0) throw std::invalid_argument("whole warps only");
  for (unsigned first = 0; first < blocks; first += resident_blocks) {
    const unsigned count = std::min(resident_blocks, blocks - first);
    std::vector<std::unique_ptr<Block>> resident;
    for (unsigned i = 0; i < count; ++i) resident.push_back(std::make_unique<Block>(threads));
    std::vector<Start<Function>> starts;
    for (unsigned i = 0; i < count; ++i) {
      for (unsigned t = 0; t < threads; ++t)
        starts.push_back({t, first + i, threads, resident[i].get(), &kernel});
    }
    std::vector<pthread_t> running(starts.size());
    const SmallStacks attributes;
    for (std::size_t i = 0; i < starts.size(); ++i) {
      if (pthread_create(&running[i], &attributes.value, Start<Function>::enter, &starts[i]))
        throw std::runtime_error("no more threads");
    }
    for (const pthread_t thread : running) pthread_join(thread, nullptr);
  }
}

}  // namespace simt

#define threadIdx simt::thread_index
#define blockIdx simt::block_index
#define blockDim simt::block_size

inline void __syncthreads() { simt::block->barrier.wait(); }

inline int __syncthreads_or(int predicate) {
  simt::Block& b = *simt::block;
  b.predicates[threadIdx.x] = predicate;
  b.barrier.wait();
  const bool any = std::any_of(b.predicates.begin(), b.predicates.end(), [](int p) { return p != 0; });
  b.barrier.wait();
  return any;
}

inline void __threadfence() { __atomic_fetch_add(&simt::fence_token, 1, __ATOMIC_ACQ_REL); }

template <class T>
T __shfl_down_sync(unsigned, T value, unsigned distance) {
  return simt::exchange(value, simt::lane() + distance);
}

template <class T>
T atomicAdd(T* at, T value) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicOr(T* at, T value) {
  return __atomic_fetch_or(at, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicExch(T* at, T value) {
  return __atomic_exchange_n(at, value, __ATOMIC_RELAXED);
}

template <class T>
T __ldcs(const T* at) {
  return *at;
}
