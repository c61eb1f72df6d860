// The CUDA kernels over csrc/core. Without the launch syntax, so that they also compile for the host, where
// tests run them under sanitizers (tests/simt).
//
// A step is one launch. Every block works out the new alpha of its chain from the old state, which nobody
// writes before all blocks have finished; moves its elements; adds up energies as integers; and counts itself
// as done. The last block commits alpha, bias, energies and the step counter.
//
// There are two ways to share the work. step_chunks: blocks take chunks of tensors, each of one chain.
// step_chains, for many short chains: blocks own whole chains, over all tensors, and commit them themselves.
#pragma once

#include "core/chunks.h"
#include "cuda_task.h"

namespace ctld {

// ----------------------------------------------------------------------------- chunks of tensors

// What the threads of a block share.
struct ChunkBlock {
  Rates rates[kMaxGroups];
  Task task;
  uint32_t entry, chunk, end;                  // where next_task goes on
  uint32_t chain;                              // of the task
  uint32_t sum, last_sum;                      // its kinetic energy's, and that of the task before
  double scale, rescale;                       // of that chain
  ChainStep step;                              // likewise, with tempering
  int64_t kinetic[kThreads], prior[kThreads];  // of the threads; not in their registers between tasks
  int64_t warp_sums[2][kThreads / 32];
  uint32_t more, is_last;
};

constexpr uint32_t kNone = ~0u;  // no chain or sum

// Chunks of a block are consecutive, so that it rarely changes its chain.
CTLD_DEVICE void start_share(const StepArguments& a, ChunkBlock& block) {
  const uint32_t begin = a.chunk_begin + blockIdx.x * a.chunks_per_block;
  const uint32_t end = begin + a.chunks_per_block;
  block.chunk = begin;
  block.end = end < a.chunk_end ? end : a.chunk_end;
  block.entry = begin < block.end ? find_tensor(a.first_chunk + a.first_entry, a.entries, begin) : 0;
  block.chain = block.sum = kNone;
}

template <Integrator integrator>
CTLD_DEVICE void enter_chain(const StepArguments& a, ChunkBlock& block, uint32_t chain) {
  block.chain = chain;
  block.scale = block.rescale = 1.0;
  if (integrator == Integrator::kMomentumSgd || a.constants.bins == 0) return;
  block.step = step_of_chain(a, chain);
  block.scale = block.step.scale;
  block.rescale = block.step.rescale;
}

// What a kernel does with chunks.
enum class Purpose { kStep, kPriorEnergy };

template <Purpose purpose, Integrator integrator>
CTLD_DEVICE bool has_work(const StepArguments& a, const TableEntry& entry, const void* gradient) {
  if (entry.theta == nullptr) return false;
  if (purpose == Purpose::kPriorEnergy) return group_of(a, entry.group).coefficients.prior != 0.0;
  return integrator != Integrator::kMomentumSgd || gradient != nullptr;
}

// By one thread: finds the block's next chunk with something to do. False if there is none.
template <Purpose purpose, Integrator integrator, int32_t known_format>
CTLD_DEVICE bool next_task(const StepArguments& a, ChunkBlock& block) {
  const uint32_t* first_chunk = a.first_chunk + a.first_entry;
  block.last_sum = block.sum;
  while (block.chunk < block.end) {
    const uint32_t chunk = block.chunk++;
    while (block.entry + 1 < a.entries && first_chunk[block.entry + 1] <= chunk) ++block.entry;
    const uint32_t number = a.first_entry + block.entry;
    const TableEntry entry = a.table[number];
    const void* gradient = purpose == Purpose::kStep ? gradient_of(a, number) : nullptr;
    if (!has_work<purpose, integrator>(a, entry, gradient)) continue;
    const uint32_t k = chunk - entry.first_chunk;
    const uint32_t chain = k / entry.chunks_per_chain, piece = k - chain * entry.chunks_per_chain;
    if (purpose == Purpose::kPriorEnergy) {
      block.chain = chain;
      block.scale = block.rescale = 1.0;
    } else if (chain != block.chain) {
      enter_chain<integrator>(a, block, chain);
    }
    block.sum = chain * a.kinetic_sums + entry.sum;
    const uint64_t start = static_cast<uint64_t>(piece) * a.chunk_size;
    const uint64_t left = entry.chain_length - start;
    const uint64_t begin = chain * entry.chain_length + start;
    const uint64_t end = begin + (left < a.chunk_size ? left : a.chunk_size);
    const Rates rates = purpose == Purpose::kStep ? block.rates[entry.group] : Rates{0.0, 0.0};
    const double momentum =
        purpose == Purpose::kStep ? momentum_of<integrator>(a, chain, entry.group, block.scale) : 0.0;
    make_task<integrator, known_format>(block.task, a, momentum, rates, entry, gradient, begin, end,
                                        block.scale, block.rescale);
    return true;
  }
  return false;
}

// Adds the sums of all threads to sum `sum` of kinetic energies and its chain's prior energy, and starts them
// anew.
CTLD_DEVICE void flush(const StepArguments& a, ChunkBlock& block, uint32_t sum) {
  const int64_t kinetic = warp_sum(block.kinetic[thread()]), prior = warp_sum(block.prior[thread()]);
  block.kinetic[thread()] = block.prior[thread()] = 0;
  if (thread() % 32 == 0) {
    block.warp_sums[0][thread() / 32] = kinetic;
    block.warp_sums[1][thread() / 32] = prior;
  }
  __syncthreads();
  if (thread() == 0) {
    int64_t all[2] = {0, 0};
    for (uint32_t w = 0; w < kThreads / 32; ++w) {
      all[0] += block.warp_sums[0][w];
      all[1] += block.warp_sums[1][w];
    }
    // before the first chain there is nothing to add
    if (all[0]) add(a.scratch.kinetic + sum, all[0]);
    if (all[1]) add(a.scratch.prior + sum / a.kinetic_sums, all[1]);
  }
  __syncthreads();
}

// All elements belong to the chain of the task.
template <class Real>
struct OneChain {
  const Task& task;
  Sums sums{};
  __device__ __forceinline__ Coefficients<Real> enter(uint32_t) const {
    return coefficients_of(task, Real{});
  }
};

// Calls visit() for every task of the block, by all threads; visit returns the thread's sums.
template <Purpose purpose, Integrator integrator, int32_t known_format, class Visit>
CTLD_DEVICE void for_tasks(const StepArguments& a, ChunkBlock& block, const Visit& visit) {
  if (thread() == 0) start_share(a, block);
  block.kinetic[thread()] = block.prior[thread()] = 0;
  while (true) {
    __syncthreads();  // the last task is not needed any more
    if (thread() == 0) block.more = next_task<purpose, integrator, known_format>(a, block);
    __syncthreads();
    if (!block.more) break;
    if (block.sum != block.last_sum) flush(a, block, block.last_sum);
    const Sums sums = visit();
    if (integrator == Integrator::kMomentumSgd) continue;  // only told finite from not
    block.kinetic[thread()] += sums.kinetic.total;
    block.prior[thread()] += sums.prior.total;
  }
  flush(a, block, block.sum);
}

template <Integrator integrator, Format format>
CTLD_KERNEL step_chunks(const __grid_constant__ StepArguments a) {
  using Storage = StorageOf<format>;
  CTLD_SHARED(ChunkBlock, block);
  if (!prepare<integrator>(a, block.rates)) return;
  for_tasks<Purpose::kStep, integrator, static_cast<int32_t>(format)>(a, block, [&] {
    OneChain<typename Storage::Real> chains = {block.task};
    step_task<integrator, Storage>(a, block.task, chains);
    return chains.sums;
  });
  if (!is_last_block(a, block.is_last)) return;
  const bool knows_all = a.chains == 1 && block.chain == 0;
  if (integrator != Integrator::kMomentumSgd) {
    commit_chains(a, knows_all ? &block.step : nullptr);
    if (a.thermostats && !a.partial) commit_frictions<integrator>(a);
    record_chains(a);
  } else {
    record_still_chains(a);
  }
  commit_step<integrator>(a);
}

CTLD_KERNEL prior_of_chunks(const __grid_constant__ StepArguments a) {
  CTLD_SHARED(ChunkBlock, block);
  for_tasks<Purpose::kPriorEnergy, Integrator::kEuler, kAnyFormat>(a, block, [&] {
    Sums sums;
    with_storage(block.task.format, [&](auto storage) {
      using Storage = decltype(storage);
      OneChain<typename Storage::Real> chains = {block.task};
      sum_prior<Storage>(a, block.task, chains);
      sums = chains.sums;
    });
    return sums;
  });
  if (!is_last_block(a, block.is_last)) return;
  for (uint32_t chain = thread(); chain < static_cast<uint32_t>(a.chains); chain += kThreads) {
    a.state.prior[chain] = take(a.scratch.prior + chain);
  }
  if (thread() == 0) atomicExch(a.scratch.done, 0u);
}

// -------------------------------------------------------------------------------- whole chains

constexpr int32_t kSharedBins = 128;

// What the threads of a block share.
struct ChainBlock {
  Rates rates[kMaxGroups];
  Task task;
  double scale[kChainsPerBlock], rescale[kChainsPerBlock];
  // of the current tensor, in its precision
  alignas(8) unsigned char retain[kChainsPerBlock * 8], noise[kChainsPerBlock * 8];
  alignas(8) unsigned char gradient[kChainsPerBlock * 8];
  int64_t kinetic[kChainsPerBlock], prior[kChainsPerBlock];
  int64_t bin_sums[3 * kSharedBins];
  uint32_t is_last;
};

// The chains of one block.
struct OwnChains {
  uint32_t begin, count;
};

CTLD_DEVICE OwnChains own_chains(const StepArguments& a) {
  const uint32_t begin = blockIdx.x * a.chains_per_block;
  const uint32_t left = static_cast<uint32_t>(a.chains) - begin;
  return {begin, left < a.chains_per_block ? left : a.chains_per_block};
}

// Each thread sums its elements of one chain before it adds them. The host sees to it that the elements of a
// block can be counted in 32 bits.
template <class Real>
struct ManyChains {
  ChainBlock& block;
  uint32_t length;     // elements of a chain
  uint32_t chain = 0;  // the current one, within the block
  uint32_t chain_begin = 0;
  uint32_t chain_end = 0;  // no chain entered yet
  Sums sums{};

  __device__ __forceinline__ Coefficients<Real> enter(uint32_t element) {
    if (element < chain_begin || element >= chain_end) {
      leave();
      chain = (element - block.task.begin) / length;
      chain_begin = block.task.begin + chain * length;
      chain_end = chain_begin + length;
    }
    Coefficients<Real> c = coefficients_of(block.task, Real{});
    c.retain = reinterpret_cast<const Real*>(block.retain)[chain];
    c.gradient = reinterpret_cast<const Real*>(block.gradient)[chain];
    c.noise = reinterpret_cast<const Real*>(block.noise)[chain];
    return c;
  }
  __device__ __forceinline__ void leave() {
    sums.end_group();
    if (sums.kinetic.total) add(block.kinetic + chain, sums.kinetic.total);
    if (sums.prior.total) add(block.prior + chain, sums.prior.total);
    sums.kinetic.total = sums.prior.total = 0;
  }
};

// Moves alpha of the block's chains, commits it, and adds their visits to the sums of all blocks.
CTLD_DEVICE void temper_own_chains(const StepArguments& a, ChainBlock& block, const OwnChains& own) {
  const int32_t bins = a.constants.bins;
  const bool in_shared = bins <= kSharedBins;
  const BinSums all = bin_sums(a.scratch.bin_sums, bins);
  const BinSums own_sums = {block.bin_sums, block.bin_sums + kSharedBins, block.bin_sums + 2 * kSharedBins,
                            nullptr, nullptr};
  int64_t r_square = 0, samples = 0;
  for (uint32_t i = thread(); i < own.count; i += kThreads) {
    const uint32_t chain = own.begin + i;
    const ChainStep step = step_of_chain(a, chain);
    block.scale[i] = step.scale;
    block.rescale[i] = step.rescale;
    commit_chain(a, chain, step);
    if (step.visit.usable) {
      if (in_shared) {
        add_visit(own_sums, step.visit);
      } else {
        add_visit(all, step.visit);
      }
      r_square += step.visit.r_square;
      samples += 1;
    }
  }
  r_square = warp_sum(r_square);
  samples = warp_sum(samples);
  if (thread() % 32 == 0 && samples) {
    add(all.r_square, r_square);
    add(all.samples, samples);
  }
  __syncthreads();
  for (int32_t i = thread(); in_shared && i < 3 * bins; i += kThreads) {
    const int32_t table = i / bins, bin = i - table * bins;
    const int64_t sum = take(block.bin_sums + table * kSharedBins + bin);
    if (sum) add(a.scratch.bin_sums + i, sum);
  }
}

CTLD_DEVICE void start_chains(ChainBlock& block) {
  for (uint32_t i = thread(); i < kChainsPerBlock; i += kThreads) {
    block.scale[i] = block.rescale[i] = 1.0;
    take(block.kinetic + i);
    take(block.prior + i);
  }
  for (uint32_t i = thread(); i < 3 * kSharedBins; i += kThreads) take(block.bin_sums + i);
  __syncthreads();
}

// Calls visit(elements of a chain) for every tensor, by all threads, when its task is made.
template <Purpose purpose, Integrator integrator, class Visit>
CTLD_DEVICE void for_tensors(const StepArguments& a, ChainBlock& block, const OwnChains& own,
                             const Visit& visit) {
  for (uint32_t number = 0; number < a.entries; ++number) {
    const uint64_t length = a.table[number].chain_length;
    if (length == 0 || !has_work<purpose, integrator>(a, a.table[number], nullptr)) continue;
    __syncthreads();  // the last task is not needed any more
    if (thread() == 0) {
      const uint64_t begin = static_cast<uint64_t>(own.begin) * length;
      const TableEntry entry = a.table[number];
      const Rates rates = purpose == Purpose::kStep ? block.rates[entry.group] : Rates{0.0, 0.0};
      const void* gradient = purpose == Purpose::kStep ? gradient_of(a, number) : nullptr;
      const double momentum = group_of(a, entry.group).coefficients.momentum;
      make_task<integrator, kAnyFormat>(block.task, a, momentum, rates, entry, gradient, begin,
                                        begin + own.count * length, 1.0, 1.0);
    }
    __syncthreads();
    visit(static_cast<uint32_t>(length));
  }
  __syncthreads();
}

template <Integrator integrator, class Real>
CTLD_DEVICE void fill_in_temperatures(const StepArguments& a, ChainBlock& block, const OwnChains& own,
                                      Rates rates) {
  const GroupCoefficients& g = group_of(a, block.task.group).coefficients;
  for (uint32_t i = thread(); i < own.count; i += kThreads) {
    const auto c = coefficients_at<integrator, Real>(g, g.momentum, rates, block.scale[i], block.rescale[i]);
    reinterpret_cast<Real*>(block.retain)[i] = c.retain;
    reinterpret_cast<Real*>(block.gradient)[i] = c.gradient;
    reinterpret_cast<Real*>(block.noise)[i] = c.noise;
  }
  __syncthreads();
}

template <Integrator integrator, Format format>
CTLD_KERNEL step_chains(const __grid_constant__ StepArguments a) {
  using Storage = StorageOf<format>;
  using Real = typename Storage::Real;
  CTLD_SHARED(ChainBlock, block);
  if (!prepare<integrator>(a, block.rates)) return;
  const OwnChains own = own_chains(a);
  start_chains(block);
  if (a.constants.bins) temper_own_chains(a, block, own);
  for_tensors<Purpose::kStep, integrator>(a, block, own, [&](uint32_t length) {
    fill_in_temperatures<integrator, Real>(a, block, own, block.rates[block.task.group]);
    ManyChains<Real> chains = {block, length};
    step_task<integrator, Storage>(a, block.task, chains);
    chains.leave();
  });
  for (uint32_t i = thread(); i < own.count; i += kThreads) {
    record_energy(a, own.begin + i);
    a.state.kinetic[own.begin + i] = take(block.kinetic + i);
    a.state.prior[own.begin + i] = take(block.prior + i);
    record_chain(a, own.begin + i);
  }
  __syncthreads();
  if (!is_last_block(a, block.is_last)) return;
  if (a.constants.bins) learn(a);
  commit_step<integrator>(a);
}

CTLD_KERNEL prior_of_chains(const __grid_constant__ StepArguments a) {
  CTLD_SHARED(ChainBlock, block);
  const OwnChains own = own_chains(a);
  start_chains(block);
  for_tensors<Purpose::kPriorEnergy, Integrator::kEuler>(a, block, own, [&](uint32_t length) {
    with_storage(block.task.format, [&](auto storage) {
      using Storage = decltype(storage);
      using Real = typename Storage::Real;
      fill_in_temperatures<Integrator::kEuler, Real>(a, block, own, {0.0, 0.0});
      ManyChains<Real> chains = {block, length};
      sum_prior<Storage>(a, block.task, chains);
      chains.leave();
    });
  });
  for (uint32_t i = thread(); i < own.count; i += kThreads) {
    a.state.prior[own.begin + i] = take(block.prior + i);
  }
}

}  // namespace ctld
