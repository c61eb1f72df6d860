// What happens to a step as a whole: its inputs, alpha, and the commit by the last block.
#pragma once

#include "core/langevin.h"
#include "core/normal.h"
#include "core/storage.h"
#include "core/tempering.h"
#include "core/thermostat.h"
#include "cuda_arguments.h"
#include "cuda_macros.h"

namespace ctld {

// -------------------------------------------------------------------------------- integer sums

CTLD_DEVICE void add(int64_t* to, int64_t x) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(x));
}

CTLD_DEVICE int64_t take(int64_t* from) {
  return static_cast<int64_t>(atomicExch(reinterpret_cast<unsigned long long*>(from), 0ull));
}

CTLD_DEVICE void raise_flags(const StepArguments& a, int64_t flags) {
  atomicOr(reinterpret_cast<unsigned long long*>(a.state.flags), static_cast<unsigned long long>(flags));
}

CTLD_DEVICE int64_t warp_sum(int64_t x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x += static_cast<int64_t>(
        __shfl_down_sync(0xFFFFFFFFu, static_cast<unsigned long long>(x), static_cast<unsigned>(distance)));
  }
  return x;
}

// --------------------------------------------------------------------------------------- inputs

CTLD_DEVICE const GroupArguments& group_of(const StepArguments& a, uint32_t group) {
  return reinterpret_cast<const GroupArguments*>(a.arena)[group];
}

CTLD_DEVICE const void* gradient_of(const StepArguments& a, uint32_t entry) {
  const unsigned char* gradients = a.arena + a.groups * sizeof(GroupArguments);
  return reinterpret_cast<const void* const*>(gradients)[entry - a.first_entry];
}

// The unit that a live rate has kept, or begins with.
CTLD_DEVICE double unit_of(const GroupArguments& g, double lr, double num_data) {
  const double kept = *g.rate.unit;
  return kept > 0.0 ? kept : momentum_unit(*g.rate.last, lr, g.coefficients.momentum, num_data);
}

// A live rate's gradient and drift coefficients; the host has put the sign where the gradient's belongs.
template <Integrator integrator>
CTLD_DEVICE Rates live_rates(const GroupArguments& g, double lr, double num_data) {
  const double sign = g.coefficients.gradient;
  if (integrator == Integrator::kMomentumSgd) {
    const double unit = unit_of(g, lr, num_data);
    return {sign * unit, lr / unit};
  }
  const Rates rates = explore_rates(integrator, lr, g.coefficients.momentum, num_data);
  return {sign * rates.gradient, rates.drift};
}

// Fills in the rates of all groups, shared by the block. False if the step is to be left out; all blocks
// agree on that.
template <Integrator integrator>
CTLD_DEVICE bool prepare(const StepArguments& a, Rates* rates) {
  bool invalid = false, positive = !a.live_rates || integrator == Integrator::kMomentumSgd;
  for (uint32_t i = thread(); i < a.groups; i += kThreads) {
    const GroupArguments& g = group_of(a, i);
    if (g.rate.lr == nullptr) {
      rates[i] = {g.coefficients.gradient, g.coefficients.drift};
      positive |= g.coefficients.drift > 0.0;
      continue;
    }
    const double lr = read_number(g.rate.lr, g.rate.type, 0);
    rates[i] = live_rates<integrator>(g, lr, a.num_data);
    invalid |= !(is_finite(lr) && lr >= 0.0);
    positive |= lr > 0.0;
  }
  bool proceed = a.found_inf == nullptr || *a.found_inf == 0.0f;
  if (a.live_rates) {
    const bool any_invalid = __syncthreads_or(invalid), any_positive = __syncthreads_or(positive);
    if (proceed && any_invalid && blockIdx.x == 0 && thread() == 0) raise_flags(a, kInvalidRate);
    proceed = proceed && !any_invalid && any_positive;
  }
  return proceed;
}

CTLD_DEVICE double unscale_factor(const StepArguments& a) {
  return a.grad_scale == nullptr ? 1.0 : 1.0 / static_cast<double>(*a.grad_scale);
}

// ----------------------------------------------------------------------------------------- alpha

CTLD_DEVICE Bias old_bias(const StatePointers& s) {
  return {*s.samples, s.visits, s.energy_mean, s.energy_spread, s.hills};
}

CTLD_DEVICE ChainStep step_of_chain(const StepArguments& a, uint32_t chain) {
  const StatePointers& s = a.state;
  float xi[4];
  const Counter counter = make_counter(static_cast<uint64_t>(*s.step), kAlphaNoise, 0);
  normal_group(chain >> 2, counter, a.keys, xi);
  const float odd = chain & 2 ? xi[3] : xi[1], even = chain & 2 ? xi[2] : xi[0];
  return temper_chain(s.alpha[chain], s.alpha_momentum[chain], read_number(a.loss, a.loss_type, chain),
                      s.prior[chain], chain & 1 ? odd : even, old_bias(s), a.constants);
}

// ------------------------------------------------------------------------------------- thermostats

// The share of p that a chain at temperature T0 scale^2 keeps.
template <Integrator integrator>
CTLD_DEVICE double momentum_of(const StepArguments& a, uint32_t chain, uint32_t group, double scale) {
  const double momentum = group_of(a, group).coefficients.momentum;
  if (integrator == Integrator::kMomentumSgd || !a.thermostats) return momentum;
  return damped_momentum(momentum, a.state.friction[chain * a.kinetic_sums + group], scale * scale);
}

// By the last block, after it has committed temperatures and kinetic energies.
template <Integrator integrator>
CTLD_DEVICE void commit_frictions(const StepArguments& a) {
  const StatePointers& s = a.state;
  const uint32_t count = static_cast<uint32_t>(a.chains) * a.kinetic_sums;
  __syncthreads();
  for (uint32_t i = thread(); i < count; i += kThreads) {
    const uint32_t chain = i / a.kinetic_sums, group = i - chain * a.kinetic_sums;
    const Friction friction = adapt_friction(
        s.friction[i], s.kinetic[i], s.temperature[chain], a.group_elements[group],
        group_of(a, group).coefficients.momentum, integrator == Integrator::kBaoab, a.constants);
    s.friction[i] = friction.value;
    if (friction.flags) raise_flags(a, friction.flags);
  }
}

// ------------------------------------------------------------------------------------- committing

CTLD_DEVICE void commit_chain(const StepArguments& a, uint32_t chain, const ChainStep& step) {
  const StatePointers& s = a.state;
  const TemperingConstants& c = a.constants;
  s.alpha[chain] = step.alpha;
  s.alpha_momentum[chain] = step.r;
  s.temperature[chain] = c.base_temperature * (step.scale * step.scale);
  s.settled[chain] = absolute(step.alpha) <= c.flat ? s.settled[chain] + 1 : 0;
  s.turns[chain] = turns_after(s.turns[chain], step.alpha, c);
  if (step.flags) raise_flags(a, step.flags);
}

CTLD_DEVICE void add_visit(const BinSums& sums, const Visit& visit) {
  add(sums.count + visit.bin, 1);
  add(sums.energy + visit.bin, visit.energy);
  if (visit.deviation) add(sums.deviation + visit.bin, visit.deviation);
}

// By the last block, all threads together, after every chain has added its visit.
CTLD_DEVICE void learn(const StepArguments& a) {
  const StatePointers& s = a.state;
  const TemperingConstants& c = a.constants;
  for (int32_t i = thread(); i < bin_sums_length(c.bins); i += kThreads) {
    a.learned[i] = take(a.scratch.bin_sums + i);
  }
  __syncthreads();
  const BinSums sums = bin_sums(a.learned, c.bins);
  const Tables tables = {s.samples, s.visits, s.energy_mean, s.energy_spread, s.hills, s.alpha_kinetic};
  const double t = static_cast<double>(*s.step + 1);
  for (int32_t bin = thread(); bin < c.bins; bin += kThreads) {
    learn_bin(bin, sums, t, a.chains, tables, c);
  }
  __syncthreads();
  for (int32_t bin = thread(); bin < c.bins; bin += kThreads) fill_bin(bin, tables, c.bins);
  if (thread() == 0) learn_alpha_kinetic(sums, tables);
}

// Every thread must have passed a barrier since it last read state that the last block will write.
CTLD_DEVICE bool is_last_block(const StepArguments& a, uint32_t& shared) {
  if (thread() == 0) {
    __threadfence();
    shared = atomicAdd(a.scratch.done, 1u) == a.blocks - 1;
    if (shared) __threadfence();
  }
  __syncthreads();
  return shared;
}

// By the last block, when nothing else is left to do.
template <Integrator integrator>
CTLD_DEVICE void commit_step(const StepArguments& a) {
  for (uint32_t i = thread(); a.live_rates && i < a.groups; i += kThreads) {
    const GroupArguments& g = group_of(a, i);
    if (g.rate.lr == nullptr) continue;
    const double lr = read_number(g.rate.lr, g.rate.type, 0);
    if (integrator != Integrator::kMomentumSgd) {
      if (lr > 0.0) *g.rate.last = lr;
    } else {
      *g.rate.unit = unit_of(g, lr, a.num_data);
    }
  }
  __syncthreads();
  if (thread() == 0) {
    *a.state.step += 1;
    if (a.recording.rows) *a.state.recorded = recorded_after(*a.state.recorded, a.recording.rows);
    atomicExch(a.scratch.done, 0u);
  }
}

CTLD_DEVICE void commit_step_of_chain(const StepArguments& a, uint32_t chain, const ChainStep& step) {
  commit_chain(a, chain, step);
  if (!step.visit.usable) return;
  const BinSums sums = bin_sums(a.scratch.bin_sums, a.constants.bins);
  add_visit(sums, step.visit);
  add(sums.r_square, step.visit.r_square);
  add(sums.samples, 1);
}

// ---------------------------------------------------------------------------------------- history

// A chain's entry in the row of this step.
CTLD_DEVICE double* entry_of(const StepArguments& a, uint32_t chain) {
  const int64_t row = next_row(*a.state.recorded, a.recording.rows);
  return a.state.history + (row * a.chains + chain) * kColumns;
}

// Before the prior energy is replaced by that of the parameters written.
CTLD_DEVICE void record_energy(const StepArguments& a, uint32_t chain) {
  if (a.recording.rows == 0) return;
  double energy = unknown();
  if (a.loss != nullptr)
    energy = potential_energy(read_number(a.loss, a.loss_type, chain), a.state.prior[chain], a.constants);
  entry_of(a, chain)[kEnergyColumn] = energy;
}

CTLD_DEVICE void record_rest(const StepArguments& a, uint32_t chain, double kinetic_temperature) {
  double* const entry = entry_of(a, chain);
  entry[kAlphaColumn] = a.state.alpha[chain];
  entry[kTemperatureColumn] = a.state.temperature[chain];
  entry[kKineticColumn] = kinetic_temperature;
}

// After the chain has been committed, and a barrier.
CTLD_DEVICE void record_chain(const StepArguments& a, uint32_t chain) {
  if (a.recording.rows == 0) return;
  int64_t quanta = 0;
  for (uint32_t i = 0; i < a.kinetic_sums; ++i) quanta += a.state.kinetic[chain * a.kinetic_sums + i];
  record_rest(a, chain, static_cast<double>(quanta) * a.recording.kinetic_unit);
}

// By the last block, before and after it has committed the chains.
CTLD_DEVICE void record_energies(const StepArguments& a) {
  for (uint32_t chain = thread(); chain < static_cast<uint32_t>(a.chains); chain += kThreads) {
    record_energy(a, chain);
  }
  CTLD_FORGET_MEMORY();
}

CTLD_DEVICE void record_chains(const StepArguments& a) {
  CTLD_FORGET_MEMORY();
  for (uint32_t chain = thread(); chain < static_cast<uint32_t>(a.chains); chain += kThreads) {
    record_chain(a, chain);
  }
}

// By the last block of a step without noise, which keeps up neither kinetic nor prior energies.
CTLD_DEVICE void record_still_chains(const StepArguments& a) {
  if (a.recording.rows == 0) return;
  for (uint32_t chain = thread(); chain < static_cast<uint32_t>(a.chains); chain += kThreads) {
    const bool known = a.loss != nullptr;
    entry_of(a, chain)[kEnergyColumn] =
        known ? loss_energy(read_number(a.loss, a.loss_type, chain), a.constants) : unknown();
    record_rest(a, chain, unknown());
  }
}

// By the last block, where chunks were shared out. `known`: the step of the only chain, if the block has it.
CTLD_DEVICE void commit_chains(const StepArguments& a, const ChainStep* known) {
  record_energies(a);
  const auto chains = static_cast<uint32_t>(a.chains);
  if (a.constants.bins && known) {
    if (thread() == 0) commit_step_of_chain(a, 0, *known);
  } else if (a.constants.bins) {
    for (uint32_t chain = thread(); chain < chains; chain += kThreads) {
      commit_step_of_chain(a, chain, step_of_chain(a, chain));
    }
  }
  for (uint32_t i = thread(); i < chains * a.kinetic_sums; i += kThreads) {
    a.state.kinetic[i] = take(a.scratch.kinetic + i);
  }
  for (uint32_t chain = thread(); chain < chains; chain += kThreads) {
    a.state.prior[chain] = take(a.scratch.prior + chain);
  }
  // before learning changes the tables that other threads still read
  __syncthreads();
  if (a.constants.bins) learn(a);
}

}  // namespace ctld
