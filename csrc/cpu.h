// The fused step on the CPU. Knows raw pointers only; whoever calls owns the memory and has checked it.
#pragma once

#include <cstdint>
#include <vector>

#include "core/tempering.h"
#include "core/thermostat.h"
#include "cpu_tile.h"
#include "plan.h"

namespace ctld {

// Instruction sets compiled in that this processor can run, fastest first.
std::vector<const TileKernels*> supported_kernels();

class CpuPlan {
 public:
  // With `stochastic`, bfloat16 is rounded stochastically. `group_elements`: with thermostats, the elements
  // of each parameter group that one chain has; otherwise empty. `partial`: the sums of energies are those of
  // one rank, so the thermostats are left to the caller, who adds up.
  CpuPlan(std::vector<TensorInfo> tensors, int64_t chains, const TemperingConstants& constants,
          const StatePointers& state, uint64_t seed, bool stochastic, std::vector<double> group_elements,
          bool partial, Recording recording, const TileKernels* kernels);

  // One sampling step; `loss` holds one value per chain, and may be null without tempering. Gradients are
  // multiplied by `unscale`.
  void explore(const std::vector<TensorPointers>& tensors, const std::vector<GroupCoefficients>& groups,
               Integrator integrator, const double* loss, double unscale, int threads);
  // One noise-free step; tensors without a gradient stay as they are.
  void finetune(const std::vector<TensorPointers>& tensors, const std::vector<GroupCoefficients>& groups,
                const double* loss, double unscale, int threads);
  // Prior energy of the parameters as they are.
  void reduce_prior_energy(const std::vector<TensorPointers>& tensors,
                           const std::vector<GroupCoefficients>& groups, int threads);

  std::size_t tensors() const { return tensors_.size(); }

 private:
  int64_t kinetic_sums() const;
  void adapt_frictions(const std::vector<GroupCoefficients>& groups, bool baoab);
  void damp(const std::vector<GroupCoefficients>& groups);
  void temper(const double* loss, int threads);
  double* row() const;
  void record_energies(const double* loss, bool sampling);
  void record_rest(bool sampling);
  template <class Choose>
  void for_tiles(const std::vector<TensorPointers>& tensors, const std::vector<GroupCoefficients>& groups,
                 double unscale, int threads, Choose choose);

  std::vector<TensorInfo> tensors_;
  std::vector<uint32_t> first_chunk_;
  uint32_t chunks_ = 0;
  int64_t elements_ = 0;
  int64_t chains_;
  TemperingConstants constants_;
  StatePointers state_;
  RoundKeys keys_;
  bool stochastic_;
  std::vector<double> group_elements_;
  bool partial_;
  Recording recording_;
  const TileKernels* kernels_;
  std::vector<double> scale_, rescale_;
  std::vector<double> momentum_;  // of all chains of the first group, then the second; empty: the groups' own
  std::vector<int64_t> bin_sums_;
};

}  // namespace ctld
