// The CPU's step functions, compiled once per instruction set.
//
// float32 tensors run in vector blocks that keep noise and update in registers. Everything else (other
// dtypes, ends of tensors that are not whole blocks, short chains) goes in pieces through a small buffer of
// noise. Both give the same bits.
#include "cpu_tile.h"

#include "core/fixed_point.h"
#include "core/storage.h"
#include "core/tempering.h"
#include "simd.h"

CTLD_NAMESPACE_BEGIN

namespace {

using Float = VectorLane::Float;
using Word = VectorLane::Word;
using Wide = VectorLane::Wide;

constexpr int kLanes = VectorLane::kLanes;
constexpr int kBlock = 4 * kLanes;  // elements whose noise one set of vectors makes
constexpr int kInterleaved = 2;     // blocks computed together, to hide latency
constexpr int kPiece = 512;         // elements that pass through the noise buffer at a time
constexpr int kLongChain = 1024;    // from here on a chain is worth vector blocks of its own

static_assert(kTileElements % (kInterleaved * kBlock) == 0 && kPiece % kBlock == 0, "whole blocks");

// -------------------------------------------------------------------------------------- noise

// Noise of kBlock elements from `group` on, in element order; `count` blocks interleaved.
template <int count>
CTLD_HD void noise_blocks(uint32_t group, Counter counter, const RoundKeys& keys, Float xi[count][4]) {
  Wide q[2 * count][4];
#pragma GCC unroll 4
  for (int b = 0; b < count; ++b) {
    Wide even, odd;
    VectorLane::groups(group + static_cast<uint32_t>(b * kLanes), even, odd);
    q[2 * b][0] = even;
    q[2 * b + 1][0] = odd;
  }
#pragma GCC unroll 4
  for (int b = 0; b < 2 * count; ++b) {
    q[b][1] = VectorLane::widen(counter.index);
    q[b][2] = VectorLane::widen(counter.step_low);
    q[b][3] = VectorLane::widen(counter.step_high_and_stream);
  }
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 8
    for (int b = 0; b < 2 * count; ++b) philox_round<VectorLane>(q[b], keys, round);
  }
  // all radii and angles of the blocks in lockstep: their long chains of dependent operations hide each other
  using Pairs = Lockstep<2 * count>;
  typename Pairs::Word radius, angle;
#pragma GCC unroll 4
  for (int b = 0; b < count; ++b) {
    const Wide *even = q[2 * b], *odd = q[2 * b + 1];
    radius.part[2 * b] = VectorLane::merge(even[0], odd[0]);
    angle.part[2 * b] = VectorLane::merge(even[1], odd[1]);
    radius.part[2 * b + 1] = VectorLane::merge(even[2], odd[2]);
    angle.part[2 * b + 1] = VectorLane::merge(even[3], odd[3]);
  }
  typename Pairs::Float first, second;
  box_muller<Pairs>(radius, angle, first, second);
#pragma GCC unroll 4
  for (int b = 0; b < count; ++b) {
    const Float pairs[4] = {first.part[2 * b], second.part[2 * b], first.part[2 * b + 1],
                            second.part[2 * b + 1]};
    VectorLane::transpose(pairs, xi[b]);
  }
}

void normals(uint32_t first_group, int64_t groups, Counter counter, const RoundKeys& keys, float* xi) {
  for (int64_t done = 0; done < groups; done += kLanes) {
    Float block[1][4];
    noise_blocks<1>(first_group + static_cast<uint32_t>(done), counter, keys, block);
    for (int k = 0; k < 4; ++k) VectorLane::store(xi + 4 * done + k * kLanes, block[0][k]);
  }
}

// ------------------------------------------------------------------------------------- energies

// Sums of one range of one chain. `seen` collects the quanta's bits: bit 29 means one saturated.
struct Sums {
  int64_t kinetic = 0, prior = 0;
  uint32_t kinetic_seen = 0, prior_seen = 0;
};

constexpr uint32_t kSaturatedBits = static_cast<uint32_t>(kSaturated);

template <class Real>
CTLD_HD void add_quanta(Real e, int64_t& sum, uint32_t& seen) {
  const int32_t q = quanta(e);
  sum += q;
  seen |= static_cast<uint32_t>(q);
}

// Only after a saturation: was it a large finite value, or one that is not finite?
template <class Stored>
int64_t flags_of(const Stored* x, int64_t n, int64_t saturated, double scale) {
  int64_t flags = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto value = load(x[i]);
    using Real = decltype(load(x[i]));
    if (!is_finite(value)) {
      flags |= kNonfiniteParameter;
    } else if (scale != 0.0 && quanta(value * value * static_cast<Real>(scale)) == kSaturated) {
      flags |= saturated;
    }
  }
  return flags;
}

template <class Real, class Stored>
void add_sums(const Tile& tile, int64_t chain, const Sums& sums, const Stored* theta, const Real* p,
              int64_t n) {
  __atomic_fetch_add(tile.kinetic + chain, sums.kinetic, __ATOMIC_RELAXED);
  if (sums.prior) __atomic_fetch_add(tile.prior + chain, sums.prior, __ATOMIC_RELAXED);
  int64_t flags = 0;
  if (sums.kinetic_seen & kSaturatedBits) flags |= flags_of(p, n, kKineticSaturated, tile.group->kinetic);
  if (sums.prior_seen & kSaturatedBits) {
    flags |= flags_of(theta, n, kPriorSaturated, tile.group->prior) & kPriorSaturated;
  }
  if (flags) __atomic_fetch_or(tile.flags, flags, __ATOMIC_RELAXED);
}

// -------------------------------------------------------------------------------- coefficients

template <Integrator integrator, class Real>
Coefficients<Real> coefficients_of(const Tile& tile, int64_t chain) {
  const GroupCoefficients& g = *tile.group;
  const double momentum = integrator == Integrator::kBaoab ? 1.0 : g.momentum;
  Coefficients<Real> c;
  c.retain = static_cast<Real>(momentum * tile.rescale[chain]);
  c.gradient = static_cast<Real>(g.gradient);
  c.drift = static_cast<Real>(g.drift);
  c.momentum = static_cast<Real>(g.momentum);
  c.noise = static_cast<Real>(g.noise * tile.scale[chain]);
  c.weight_decay = static_cast<Real>(g.weight_decay);
  c.kinetic = static_cast<Real>(g.kinetic);
  c.prior = static_cast<Real>(g.prior);
  return c;
}

// Without noise the kinetic coefficient is 0: the product then only tells finite from not.
template <Integrator integrator, class Real>
CTLD_HD Real kinetic_argument(Real p, const Coefficients<Real>& c) {
  return integrator == Integrator::kMomentumSgd ? p * c.kinetic : p * p * c.kinetic;
}

// ------------------------------------------------------------------------ pieces of any type

template <Integrator integrator, Decay decay, class Real, class Stored>
Sums move_range(Stored* __restrict__ theta, Real* __restrict__ p, const Stored* __restrict__ gradient,
                const float* __restrict__ xi, int64_t n, const Coefficients<Real> c) {
  Sums sums;
  for (int64_t i = 0; i < n; ++i) {
    Real position = load(theta[i]), momentum = p[i];
    move<integrator, decay, Real>(position, momentum, load(gradient[i]), static_cast<Real>(xi[i]), c);
    p[i] = momentum;
    store(theta[i], position);
    add_quanta(kinetic_argument<integrator>(momentum, c), sums.kinetic, sums.kinetic_seen);
    if (decay == Decay::kGradientAndEnergy) {
      const Real stored = load(theta[i]);
      add_quanta(stored * stored * c.prior, sums.prior, sums.prior_seen);
    }
  }
  return sums;
}

template <Integrator integrator, Decay decay, class Real, class Stored>
void step_pieces(const Tile& tile, int64_t begin, int64_t end) {
  alignas(64) float buffer[kPiece + kBlock] = {};
  auto* theta = static_cast<Stored*>(tile.theta);
  auto* p = static_cast<Real*>(tile.p);
  auto* gradient = static_cast<const Stored*>(tile.gradient);
  for (int64_t at = begin; at < end;) {
    const int64_t element = tile.first + at;
    const int64_t piece_end = at + kPiece < end ? at + kPiece : end;
    const float* xi = buffer + (element & 3);
    if (integrator != Integrator::kMomentumSgd) {
      const int64_t groups = ((element & 3) + piece_end - at + 3) / 4;
      normals(static_cast<uint32_t>(element >> 2), groups, tile.counter, *tile.keys, buffer);
    }
    for (const int64_t piece = at; at < piece_end;) {
      const int64_t chain = (tile.first + at) / tile.chain_length;
      const int64_t chain_end = (chain + 1) * tile.chain_length - tile.first;
      const int64_t n = (chain_end < piece_end ? chain_end : piece_end) - at;
      const auto c = coefficients_of<integrator, Real>(tile, chain);
      const Sums sums =
          move_range<integrator, decay>(theta + at, p + at, gradient + at, xi + (at - piece), n, c);
      add_sums(tile, chain, sums, theta + at, p + at, n);
      at += n;
    }
  }
}

// ------------------------------------------------------------------------- blocks of float32

// Sums of four vectors of quanta at a time: as 64-bit numbers, and of their high halves alone.
struct VectorSum {
  Wide whole{}, high{};
  Word seen{};

  __attribute__((always_inline)) void add(const Word q[4]) {
    seen |= q[0] | q[1] | q[2] | q[3];
    const Wide sum = reinterpret_cast<Wide>(q[0] + q[1] + q[2] + q[3]);
    whole += sum;
    high += sum >> 32;
  }
  // modulo 2^64, in which the sums of low and high halves are exact
  __attribute__((always_inline)) int64_t total() const {
    uint64_t all = 0, upper = 0;
    for (int i = 0; i < kLanes / 2; ++i) {
      all += whole[i];
      upper += high[i];
    }
    return static_cast<int64_t>(all - (upper << 32) + upper);
  }
  __attribute__((always_inline)) uint32_t bits_seen() const {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= seen[i];
    return bits;
  }
};

struct VectorSums {
  VectorSum kinetic, prior;
};

template <Integrator integrator, Decay decay>
CTLD_HD void move_block(float* theta, float* p, const float* gradient, const Float xi[4],
                        const Coefficients<Float>& c, VectorSums& sums) {
  Word kinetic[4], prior[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    Float position = VectorLane::load<Float>(theta + k * kLanes);
    Float momentum = VectorLane::load<Float>(p + k * kLanes);
    const Float g = VectorLane::load<Float>(gradient + k * kLanes);
    move<integrator, decay, Float>(position, momentum, g, xi[k], c);
    VectorLane::store(p + k * kLanes, momentum);
    VectorLane::store(theta + k * kLanes, position);
    kinetic[k] = VectorLane::truncate(kinetic_argument<integrator>(momentum, c));
    if (decay == Decay::kGradientAndEnergy) prior[k] = VectorLane::truncate(position * position * c.prior);
  }
  sums.kinetic.add(kinetic);
  if (decay == Decay::kGradientAndEnergy) sums.prior.add(prior);
}

CTLD_HD Coefficients<Float> broadcast(const Coefficients<float>& c) {
  return {VectorLane::broadcast(c.retain),  VectorLane::broadcast(c.gradient),
          VectorLane::broadcast(c.drift),   VectorLane::broadcast(c.momentum),
          VectorLane::broadcast(c.noise),   VectorLane::broadcast(c.weight_decay),
          VectorLane::broadcast(c.kinetic), VectorLane::broadcast(c.prior)};
}

// Vector quanta need not be clamped: where they should have been, one of the highest three bits is set,
// and the sum is done again by the definition.
template <Integrator integrator>
Sums exact_sums(const VectorSums& v, const float* theta, const float* p, int64_t n,
                const Coefficients<float>& c) {
  constexpr uint32_t kSuspicious = ~(kSaturatedBits - 1);
  Sums sums;
  sums.kinetic = v.kinetic.total();
  sums.prior = v.prior.total();
  if (v.kinetic.bits_seen() & kSuspicious) {
    sums.kinetic = 0;
    for (int64_t i = 0; i < n; ++i)
      add_quanta(kinetic_argument<integrator>(p[i], c), sums.kinetic, sums.kinetic_seen);
  }
  if (v.prior.bits_seen() & kSuspicious) {
    sums.prior = 0;
    for (int64_t i = 0; i < n; ++i) add_quanta(theta[i] * theta[i] * c.prior, sums.prior, sums.prior_seen);
  }
  return sums;
}

// `n` is a multiple of kInterleaved * kBlock, the first element of a noise group
template <Integrator integrator, Decay decay>
void step_blocks(const Tile& tile, int64_t begin, int64_t n, int64_t chain) {
  float* __restrict__ theta = static_cast<float*>(tile.theta) + begin;
  float* __restrict__ p = static_cast<float*>(tile.p) + begin;
  const float* __restrict__ gradient = static_cast<const float*>(tile.gradient) + begin;
  const Coefficients<float> scalars = coefficients_of<integrator, float>(tile, chain);
  const Coefficients<Float> c = broadcast(scalars);
  const uint32_t first_group = static_cast<uint32_t>((tile.first + begin) >> 2);
  const RoundKeys keys = *tile.keys;
  VectorSums sums;
  for (int64_t at = 0; at < n; at += kInterleaved * kBlock) {
    Float xi[kInterleaved][4] = {};
    if (integrator != Integrator::kMomentumSgd)
      noise_blocks<kInterleaved>(first_group + static_cast<uint32_t>(at >> 2), tile.counter, keys, xi);
#pragma GCC unroll 4
    for (int b = 0; b < kInterleaved; ++b) {
      const int64_t i = at + b * kBlock;
      move_block<integrator, decay>(theta + i, p + i, gradient + i, xi[b], c, sums);
    }
  }
  add_sums(tile, chain, exact_sums<integrator>(sums, theta, p, n, scalars), theta, p, n);
}

template <Integrator integrator, Decay decay>
void step_float32(const Tile& tile) {
  if (tile.chain_length < kLongChain)
    return step_pieces<integrator, decay, float, float>(tile, 0, tile.count);
  for (int64_t at = 0; at < tile.count;) {
    const int64_t chain = (tile.first + at) / tile.chain_length;
    const int64_t chain_end = (chain + 1) * tile.chain_length - tile.first;
    const int64_t end = chain_end < tile.count ? chain_end : tile.count;
    int64_t aligned = at + (-(tile.first + at) & 3);
    aligned = aligned < end ? aligned : end;
    const int64_t blocks = (end - aligned) / (kInterleaved * kBlock) * (kInterleaved * kBlock);
    step_pieces<integrator, decay, float, float>(tile, at, aligned);
    if (blocks) step_blocks<integrator, decay>(tile, aligned, blocks, chain);
    step_pieces<integrator, decay, float, float>(tile, aligned + blocks, end);
    at = end;
  }
}

template <Integrator integrator, Decay decay, class Real, class Stored>
void step_other(const Tile& tile) {
  step_pieces<integrator, decay, Real, Stored>(tile, 0, tile.count);
}

// -------------------------------------------------------------------------------- prior energy

template <class Stored>
void prior_energy(const Tile& tile) {
  auto* theta = static_cast<const Stored*>(tile.theta);
  using Real = decltype(load(*theta));
  const Real scale = static_cast<Real>(tile.group->prior);
  for (int64_t at = 0; at < tile.count;) {
    const int64_t chain = (tile.first + at) / tile.chain_length;
    const int64_t chain_end = (chain + 1) * tile.chain_length - tile.first;
    const int64_t end = chain_end < tile.count ? chain_end : tile.count;
    const int64_t n = end - at;
    Sums sums;
    for (int64_t i = at; i < end; ++i) {
      const Real value = load(theta[i]);
      add_quanta(value * value * scale, sums.prior, sums.prior_seen);
    }
    add_sums<Real>(tile, chain, sums, theta + at, static_cast<const Real*>(nullptr), n);
    at = end;
  }
}

// -------------------------------------------------------------------------------------- table

#define CTLD_STEPS(integrator, decay)                                               \
  {step_float32<integrator, decay>, step_other<integrator, decay, float, BFloat16>, \
   step_other<integrator, decay, float, Float16>, step_other<integrator, decay, double, double>}
#define CTLD_DECAYS(integrator)                                                    \
  {CTLD_STEPS(integrator, Decay::kNone), CTLD_STEPS(integrator, Decay::kGradient), \
   CTLD_STEPS(integrator, Decay::kGradientAndEnergy)}

#define CTLD_STRINGIFY_(x) #x
#define CTLD_STRINGIFY(x) CTLD_STRINGIFY_(x)

const TileKernels kKernels = {
    CTLD_STRINGIFY(CTLD_ISA),
    {CTLD_DECAYS(Integrator::kBaoab), CTLD_DECAYS(Integrator::kEuler), CTLD_DECAYS(Integrator::kMomentumSgd)},
    {prior_energy<float>, prior_energy<BFloat16>, prior_energy<Float16>, prior_energy<double>},
    normals,
};

}  // namespace

CTLD_NAMESPACE_END

#define CTLD_CONCATENATE_(a, b) a##b
#define CTLD_CONCATENATE(a, b) CTLD_CONCATENATE_(a, b)

namespace ctld {
const TileKernels* CTLD_CONCATENATE(tile_kernels_, CTLD_ISA)() { return &kKernels; }
}  // namespace ctld
