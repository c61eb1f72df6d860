// What happens to the elements: one task is a range of one tensor that a block steps.
#pragma once

#include <type_traits>

#include "cuda_alpha.h"

namespace ctld {

// In shared memory, written by one thread: what would be the same in all threads' registers.
//
// The units of a tensor start at its first element, of a rank's shard at the first noise group that it has a
// part of; pointers and elements of a task count from its first unit.
struct Task {
  void* theta;
  void* momentum;
  const void* gradient;  // null: zero
  uint32_t begin, end;
  uint32_t first_group;  // noise group of element 0
  uint32_t group;
  Counter noise, rounding;
  Format format;
  Decay decay;
  // in both precisions
  Coefficients<float> single;
  Coefficients<double> twice;
  float unscale_single;
  double unscale_twice;
};

template <class Parameter>
constexpr uint32_t kUnit = sizeof(Parameter) == 2 ? 8 : 4;

constexpr int32_t kAnyFormat = -1;

// The task for elements [begin, end) of a tensor whose chain is at temperature T0 scale^2 and keeps
// `momentum` of p.
template <Integrator integrator, int32_t known_format>
CTLD_DEVICE void make_task(Task& task, const StepArguments& a, double momentum, Rates rates,
                           const TableEntry& entry, const void* gradient, uint64_t begin, uint64_t end,
                           double scale, double rescale) {
  const auto format = static_cast<Format>(known_format == kAnyFormat ? entry.format : known_format);
  const uint32_t bytes = parameter_bytes(format), unit = unit_of(format);
  const uint64_t origin = begin - begin % unit;
  const GroupCoefficients& g = group_of(a, entry.group).coefficients;
  const uint64_t step = static_cast<uint64_t>(*a.state.step);
  task.theta = static_cast<char*>(entry.theta) + origin * bytes;
  task.momentum = static_cast<char*>(entry.momentum) + origin * momentum_bytes(format);
  task.gradient = gradient == nullptr ? nullptr : static_cast<const char*>(gradient) + origin * bytes;
  task.begin = begin == 0 ? entry.skipped : static_cast<uint32_t>(begin - origin);
  task.end = static_cast<uint32_t>(end - origin);
  task.first_group = entry.first_group + static_cast<uint32_t>(origin >> 2);
  task.group = entry.group;
  task.noise = make_counter(step, kParameterNoise, entry.index);
  task.rounding = make_counter(step, kRounding, entry.index);
  task.format = format;
  task.decay = decay_of(g);
  task.unscale_twice = unscale_factor(a);
  task.unscale_single = static_cast<float>(task.unscale_twice);
  task.single = coefficients_at<integrator, float>(g, momentum, rates, scale, rescale);
  task.twice = coefficients_at<integrator, double>(g, momentum, rates, scale, rescale);
}

CTLD_DEVICE const Coefficients<float>& coefficients_of(const Task& task, float) { return task.single; }
CTLD_DEVICE const Coefficients<double>& coefficients_of(const Task& task, double) { return task.twice; }

CTLD_DEVICE float unscale_of(const Task& task, float) { return task.unscale_single; }
CTLD_DEVICE double unscale_of(const Task& task, double) { return task.unscale_twice; }

// --------------------------------------------------------------------------------------- energies

constexpr uint32_t kSaturatedBit = static_cast<uint32_t>(kSaturated);

// Quanta of one energy, of the current noise group `pending`, before that `total`.
struct Sum {
  int64_t total = 0;
  uint32_t pending = 0;

  // `seen` collects all bits; bit 29 means that one was saturated
  template <class Real>
  __device__ __forceinline__ void add(Real energy, uint32_t& seen) {
    const uint32_t q = static_cast<uint32_t>(quanta(energy));
    pending += q;
    seen |= q;
  }
  __device__ __forceinline__ void end_group() {
    total += pending;
    pending = 0;
  }
};

struct Sums {
  Sum kinetic, prior;
  uint32_t seen = 0;
  __device__ __forceinline__ void end_group() {
    kinetic.end_group();
    prior.end_group();
  }
};

// ------------------------------------------------------------------------------- memory access

template <class T>
CTLD_DEVICE bool aligned(const T* x) {
  return (reinterpret_cast<uintptr_t>(x) & 15) == 0;
}

// Elements between registers and memory in pieces of 16 bytes.
template <uint32_t count, class T>
struct Pack {
  static constexpr uint32_t kWords = (count * sizeof(T) + 15) / 16;
  union {
    uint4 words[kWords];
    T elements[count];
  };
  __device__ __forceinline__ Pack() {}
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (uint32_t i = 0; i < count; ++i) elements[i] = T{};
  }
};

// All elements, 16 bytes at a time; the pointers must be aligned. `base` is where the pack's elements start.
struct VectorAccess {
  template <uint32_t count, class T>
  __device__ __forceinline__ void read(Pack<count, T>& to, const T* from, uint32_t base) const {
#pragma unroll
    for (uint32_t i = 0; i < to.kWords; ++i) to.words[i] = reinterpret_cast<const uint4*>(from + base)[i];
  }
  // what nobody will read again soon
  template <uint32_t count, class T>
  __device__ __forceinline__ void read_once(Pack<count, T>& to, const T* from, uint32_t base) const {
#pragma unroll
    for (uint32_t i = 0; i < to.kWords; ++i) {
      to.words[i] = __ldcs(reinterpret_cast<const uint4*>(from + base) + i);
    }
  }
  template <uint32_t count, class T>
  __device__ __forceinline__ void write(const Pack<count, T>& from, T* to, uint32_t base) const {
#pragma unroll
    for (uint32_t i = 0; i < from.kWords; ++i) reinterpret_cast<uint4*>(to + base)[i] = from.words[i];
  }
  __device__ __forceinline__ bool holds(uint32_t) const { return true; }
};

// One by one, those elements only whose number is in [low, high).
struct MaskedAccess {
  uint32_t low, high;

  template <uint32_t count, class T>
  __device__ __forceinline__ void read(Pack<count, T>& to, const T* from, uint32_t base) const {
#pragma unroll
    for (uint32_t i = 0; i < count; ++i) to.elements[i] = holds(base + i) ? from[base + i] : T{};
  }
  template <uint32_t count, class T>
  __device__ __forceinline__ void read_once(Pack<count, T>& to, const T* from, uint32_t base) const {
    read(to, from, base);
  }
  template <uint32_t count, class T>
  __device__ __forceinline__ void write(const Pack<count, T>& from, T* to, uint32_t base) const {
#pragma unroll
    for (uint32_t i = 0; i < count; ++i) {
      if (holds(base + i)) to[base + i] = from.elements[i];
    }
  }
  __device__ __forceinline__ bool holds(uint32_t i) const { return i >= low && i < high; }
};

// --------------------------------------------------------------------------------------- one unit

template <class T, class Real>
CTLD_DEVICE void round_to(T& to, Real x, bool, uint32_t) {
  store(to, x);
}
CTLD_DEVICE void round_to(BFloat16& to, float x, bool stochastic, uint32_t random) {
  to = rounded_by(x, stochastic ? random : nearest_even(x));
}

template <class Storage>
constexpr bool kRoundsStochastically = std::is_same<typename Storage::Parameter, BFloat16>::value;

// The random bits of a noise group's roundings.
template <class Momentum>
struct RandomBits {  // of parameters only, in as few registers as possible
  uint32_t pairs[2] = {};

  __device__ __forceinline__ void draw(uint32_t group, Counter counter, const RoundKeys& keys) {
    uint32_t words[4];
    random_words(group, counter, keys, words);
    pairs[0] = parameter_rounding(words[0]) | words[1] << 16;
    pairs[1] = parameter_rounding(words[2]) | words[3] << 16;
  }
  __device__ __forceinline__ uint32_t of_parameter(uint32_t i) const {
    return i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xFFFFu;
  }
  __device__ __forceinline__ uint32_t of_momentum(uint32_t) const { return 0; }
};

template <>
struct RandomBits<BFloat16> {
  uint32_t words[4] = {};

  __device__ __forceinline__ void draw(uint32_t group, Counter counter, const RoundKeys& keys) {
    random_words(group, counter, keys, words);
  }
  __device__ __forceinline__ uint32_t of_parameter(uint32_t i) const { return parameter_rounding(words[i]); }
  __device__ __forceinline__ uint32_t of_momentum(uint32_t i) const { return momentum_rounding(words[i]); }
};

// One step of the elements first ... first + count - 1. `chains` knows the coefficients and sums of every
// element's chain.
template <Integrator integrator, class Storage, uint32_t count, class Access, class Chains>
CTLD_DEVICE void step_elements(const StepArguments& a, const Task& task, uint32_t first, const Access& access,
                               Chains& chains) {
  using Parameter = typename Storage::Parameter;
  using Momentum = typename Storage::Momentum;
  using Real = typename Storage::Real;
  constexpr bool kWide = sizeof(Real) == 8;  // then registers are scarce
  auto* const theta_at = static_cast<Parameter*>(kWide ? reread(task.theta) : task.theta) + first;
  auto* const p_at = static_cast<Momentum*>(kWide ? reread(task.momentum) : task.momentum) + first;
  CTLD_ASSUME_GLOBAL(theta_at);
  CTLD_ASSUME_GLOBAL(p_at);
  constexpr uint32_t kPiece = kWide ? 2 : count;
  float xi[4] = {};
  RandomBits<Momentum> bits;
#pragma unroll
  for (uint32_t base = 0; base < count; base += kPiece) {
    Pack<kPiece, Parameter> theta, gradient;
    Pack<kPiece, Momentum> p;
    access.read(theta, theta_at, base);
    access.read(p, p_at, base);
    if (task.gradient != nullptr) {
      const auto* const gradient_at = static_cast<const Parameter*>(task.gradient) + first;
      CTLD_ASSUME_GLOBAL(gradient_at);
      access.read_once(gradient, gradient_at, base);
    } else {
      gradient.clear();
    }
#pragma unroll
    for (uint32_t j = 0; j < kPiece; ++j) {
      const uint32_t i = base + j;
      if (i % 4 == 0) {
        const uint32_t group = task.first_group + (first + i) / 4;
        if (integrator != Integrator::kMomentumSgd) normal_group(group, task.noise, a.keys, xi);
        if (kRoundsStochastically<Storage> && a.stochastic) bits.draw(group, task.rounding, a.keys);
        CTLD_FORGET_MEMORY();  // so that what comes from shared memory occupies registers only from here
      }
      if (!access.holds(i)) continue;
      const Coefficients<Real> c = chains.enter(first + i);
      Real position = load(theta.elements[j]), momentum = load(p.elements[j]);
      Real g = static_cast<Real>(load(gradient.elements[j])) * unscale_of(task, Real{});
      if (task.decay != Decay::kNone) g = decayed_gradient<Real>(g, position, c);
      move<integrator, Real>(position, momentum, g, static_cast<Real>(xi[i % 4]), c);
      round_to(p.elements[j], momentum, a.stochastic, bits.of_momentum(i % 4));
      round_to(theta.elements[j], position, a.stochastic, bits.of_parameter(i % 4));
      const Real stored_momentum = load(p.elements[j]);
      chains.sums.kinetic.add(kinetic_argument<integrator>(stored_momentum, c.kinetic), chains.sums.seen);
      if (task.decay == Decay::kGradientAndEnergy) {
        const Real stored = load(theta.elements[j]);
        chains.sums.prior.add(stored * stored * c.prior, chains.sums.seen);
      }
      if (i % 4 == 3) chains.sums.end_group();
    }
    access.write(p, p_at, base);
    access.write(theta, theta_at, base);
  }
  chains.sums.end_group();
}

// Calls visit(first element, how many, access) for this thread's share of the task: in whole units where
// `vectors`, and the rest in noise groups.
template <uint32_t unit, class Visit>
CTLD_DEVICE void for_elements(const Task& task, bool vectors, const Visit& visit) {
  // the first unit is incomplete if the task begins within it, the last if it ends within it
  uint32_t full_begin = task.begin ? unit : 0, full_end = task.end / unit * unit;
  if (!vectors || full_begin > full_end) full_begin = full_end = 0;
  // one register for both: `first` is a multiple of the unit, so one less changes nothing
  const uint32_t bounds = full_end - (full_begin ? 1 : 0);
#pragma unroll 1
  for (uint32_t first = full_begin + unit * thread(); first < bounds; first += unit * kThreads) {
    visit(first, std::integral_constant<uint32_t, unit>{}, VectorAccess{});
  }
  full_begin = bounds % unit ? unit : 0;
  const uint32_t full = bounds / unit * unit;  // without the first unit
#pragma unroll 1
  for (uint32_t i = 4 * thread(); i < task.end - full; i += 4 * kThreads) {
    const uint32_t first = i < full_begin ? i : i + full;
    const uint32_t low = task.begin > first ? task.begin - first : 0;
    visit(first, std::integral_constant<uint32_t, 4>{}, MaskedAccess{low, task.end - first});
  }
}

// After a saturation: was it a large finite value, or one that is not finite?
template <class T, class Real>
CTLD_DEVICE int64_t trouble_with(T stored, int64_t saturated, Real scale) {
  const Real x = load(stored);
  if (!is_finite(x)) return kNonfiniteParameter;
  return scale != 0 && quanta(x * x * scale) == kSaturated ? saturated : 0;
}

template <class Storage>
CTLD_DEVICE void report_trouble(const StepArguments& a, const Task& task) {
  using Real = typename Storage::Real;
  const auto* theta = static_cast<const typename Storage::Parameter*>(task.theta);
  const auto* p = static_cast<const typename Storage::Momentum*>(task.momentum);
  const Coefficients<Real>& c = coefficients_of(task, Real{});
  int64_t flags = 0;
  for_elements<4>(task, false, [&](uint32_t first, auto, const auto& access) {
#pragma unroll 1
    for (uint32_t i = 0; i < 4; ++i) {
      if (!access.holds(i)) continue;
      if (p != nullptr) flags |= trouble_with(p[first + i], kKineticSaturated, c.kinetic);
      flags |= trouble_with(theta[first + i], kPriorSaturated, c.prior) & kPriorSaturated;
    }
  });
  if (flags) raise_flags(a, flags);
}

template <Integrator integrator, class Storage, class Chains>
CTLD_DEVICE void step_task(const StepArguments& a, const Task& task, Chains& chains) {
  chains.sums.seen = 0;
  const bool vectors = aligned(task.theta) && aligned(task.momentum) && aligned(task.gradient);
  for_elements<kUnit<typename Storage::Parameter>>(
      task, vectors, [&](uint32_t first, auto count, const auto& access) {
        step_elements<integrator, Storage, decltype(count)::value>(a, task, first, access, chains);
      });
  if (chains.sums.seen & kSaturatedBit) report_trouble<Storage>(a, task);
}

// Only the prior energy of the task's elements.
template <class Storage, class Chains>
CTLD_DEVICE void sum_prior(const StepArguments& a, const Task& task, Chains& chains) {
  using Parameter = typename Storage::Parameter;
  using Real = typename Storage::Real;
  chains.sums.seen = 0;
  for_elements<kUnit<Parameter>>(task, aligned(task.theta),
                                 [&](uint32_t first, auto count, const auto& access) {
                                   const auto* const at = static_cast<const Parameter*>(task.theta) + first;
                                   CTLD_ASSUME_GLOBAL(at);
                                   constexpr uint32_t kCount = decltype(count)::value;
                                   Pack<kCount, Parameter> theta;
                                   access.read(theta, at, 0);
#pragma unroll
                                   for (uint32_t i = 0; i < kCount; ++i) {
                                     if (access.holds(i)) {
                                       const Coefficients<Real> c = chains.enter(first + i);
                                       const Real x = load(theta.elements[i]);
                                       chains.sums.prior.add(x * x * c.prior, chains.sums.seen);
                                     }
                                     if (i % 4 == 3) chains.sums.end_group();
                                   }
                                 });
  if (chains.sums.seen & kSaturatedBit) report_trouble<Storage>(a, task);
}

// Calls visit(Storage) for a format that is known at run time only.
template <class Visit>
CTLD_DEVICE void with_storage(Format format, const Visit& visit) {
  switch (format) {
    case Format::kFloat32:
      return visit(StorageOf<Format::kFloat32>{});
    case Format::kBFloat16:
      return visit(StorageOf<Format::kBFloat16>{});
    case Format::kFloat16:
      return visit(StorageOf<Format::kFloat16>{});
    case Format::kFloat64:
      return visit(StorageOf<Format::kFloat64>{});
    case Format::kBFloat16Both:
      return visit(StorageOf<Format::kBFloat16Both>{});
  }
}

}  // namespace ctld
