// The CPU's step functions, compiled once per instruction set.
//
// float32 tensors run in vector blocks that keep noise and update in registers. Everything else (other
// dtypes, ends of tensors that are not whole blocks, short chains) goes in pieces through a small buffer of
// noise. Both give the same bits.
#include "cpu_tile.h"

#include <type_traits>

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

// The random words of kBlock elements from `group` on, `count` blocks interleaved: for each block first and
// second, third and fourth word of its groups.
template <int count>
CTLD_HD void random_blocks(uint32_t group, Counter counter, const RoundKeys& keys, Word words[count][4]) {
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
#pragma GCC unroll 4
  for (int b = 0; b < count; ++b) {
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) words[b][w] = VectorLane::merge(q[2 * b][w], q[2 * b + 1][w]);
  }
}

// Noise of kBlock elements from `group` on, in element order; `count` blocks interleaved.
template <int count>
CTLD_HD void noise_blocks(uint32_t group, Counter counter, const RoundKeys& keys, Float xi[count][4]) {
  Word words[count][4];
  random_blocks<count>(group, counter, keys, words);
  // all radii and angles of the blocks in lockstep: their long chains of dependent operations hide each other
  using Pairs = Lockstep<2 * count>;
  typename Pairs::Word radius, angle;
#pragma GCC unroll 4
  for (int b = 0; b < count; ++b) {
    radius.part[2 * b] = words[b][0];
    angle.part[2 * b] = words[b][1];
    radius.part[2 * b + 1] = words[b][2];
    angle.part[2 * b + 1] = words[b][3];
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

// random words in element order
void rounding_words(uint32_t first_group, int64_t groups, Counter counter, const RoundKeys& keys,
                    uint32_t* to) {
  for (int64_t done = 0; done < groups; done += kLanes) {
    Word words[1][4];
    random_blocks<1>(first_group + static_cast<uint32_t>(done), counter, keys, words);
    Float of_words[4], ordered[4];
    for (int w = 0; w < 4; ++w) of_words[w] = VectorLane::from_bits(words[0][w]);
    VectorLane::transpose(of_words, ordered);
    for (int k = 0; k < 4; ++k) VectorLane::store(to + 4 * done + k * kLanes, VectorLane::bits(ordered[k]));
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

template <class Real, class Parameter, class Momentum>
void add_sums(const Tile& tile, int64_t chain, const Sums& sums, const Parameter* theta, const Momentum* p,
              int64_t n) {
  if (tile.group->kinetic != 0.0)
    __atomic_fetch_add(tile.kinetic + chain * tile.kinetic_stride, sums.kinetic, __ATOMIC_RELAXED);
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
  const Rates rates = {tile.group->gradient, tile.group->drift};
  const double momentum = tile.momentum ? tile.momentum[chain] : tile.group->momentum;
  return coefficients_at<integrator, Real>(*tile.group, momentum, rates, tile.scale[chain],
                                           tile.rescale[chain]);
}

// ------------------------------------------------------------------------ pieces of any type

CTLD_HD void round_to(float& to, float x, const uint32_t*, uint32_t) { store(to, x); }
CTLD_HD void round_to(double& to, double x, const uint32_t*, uint32_t) { store(to, x); }
CTLD_HD void round_to(Float16& to, float x, const uint32_t*, uint32_t) { store(to, x); }
CTLD_HD void round_to(BFloat16& to, float x, const uint32_t* words, uint32_t random) {
  to = rounded_by(x, words ? random : nearest_even(x));
}

// `words` is null where bfloat16 is rounded to nearest
template <Integrator integrator, Decay decay, class Storage>
Sums move_range(typename Storage::Parameter* __restrict__ theta, typename Storage::Momentum* __restrict__ p,
                const typename Storage::Parameter* __restrict__ gradient, const float* __restrict__ xi,
                const uint32_t* __restrict__ words, typename Storage::Real unscale, int64_t n,
                const Coefficients<typename Storage::Real> c) {
  using Real = typename Storage::Real;
  Sums sums;
  for (int64_t i = 0; i < n; ++i) {
    Real position = load(theta[i]), momentum = load(p[i]);
    Real g = static_cast<Real>(load(gradient[i])) * unscale;
    if (decay != Decay::kNone) g = decayed_gradient<Real>(g, position, c);
    move<integrator, Real>(position, momentum, g, static_cast<Real>(xi[i]), c);
    const uint32_t word = words ? words[i] : 0;
    round_to(p[i], momentum, words, momentum_rounding(word));
    round_to(theta[i], position, words, parameter_rounding(word));
    const Real stored_momentum = load(p[i]);
    add_quanta(kinetic_argument<integrator>(stored_momentum, c.kinetic), sums.kinetic, sums.kinetic_seen);
    if (decay == Decay::kGradientAndEnergy) {
      const Real stored = load(theta[i]);
      add_quanta(stored * stored * c.prior, sums.prior, sums.prior_seen);
    }
  }
  return sums;
}

template <class Parameter>
constexpr bool kRoundsStochastically = std::is_same<Parameter, BFloat16>::value;

template <Integrator integrator, Decay decay, class Storage>
void step_pieces(const Tile& tile, int64_t begin, int64_t end) {
  using Parameter = typename Storage::Parameter;
  using Real = typename Storage::Real;
  const bool stochastic = kRoundsStochastically<Parameter> && tile.stochastic;
  alignas(64) float buffer[kPiece + kBlock] = {};
  alignas(64) uint32_t word_buffer[kRoundsStochastically<Parameter> ? kPiece + kBlock : 1];
  auto* theta = static_cast<Parameter*>(tile.theta);
  auto* p = static_cast<typename Storage::Momentum*>(tile.p);
  auto* gradient = static_cast<const Parameter*>(tile.gradient);
  for (int64_t at = begin; at < end;) {
    const int64_t element = tile.first + at;
    const int64_t piece_end = at + kPiece < end ? at + kPiece : end;
    const float* xi = buffer + (element & 3);
    const uint32_t* words = stochastic ? word_buffer + (element & 3) : nullptr;
    const int64_t groups = ((element & 3) + piece_end - at + 3) / 4;
    const auto first_group = static_cast<uint32_t>(element >> 2);
    if (integrator != Integrator::kMomentumSgd)
      normals(first_group, groups, tile.counter, *tile.keys, buffer);
    if (stochastic) rounding_words(first_group, groups, tile.rounding, *tile.keys, word_buffer);
    for (const int64_t piece = at; at < piece_end;) {
      const int64_t chain = (tile.first + at) / tile.chain_length;
      const int64_t chain_end = (chain + 1) * tile.chain_length - tile.first;
      const int64_t n = (chain_end < piece_end ? chain_end : piece_end) - at;
      const auto c = coefficients_of<integrator, Real>(tile, chain);
      const Sums sums = move_range<integrator, decay, Storage>(
          theta + at, p + at, gradient + at, xi + (at - piece), words ? words + (at - piece) : nullptr,
          static_cast<Real>(tile.unscale), n, c);
      add_sums<Real>(tile, chain, sums, theta + at, p + at, n);
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
    Float g = VectorLane::load<Float>(gradient + k * kLanes);
    if (decay != Decay::kNone) g = decayed_gradient<Float>(g, position, c);
    move<integrator, Float>(position, momentum, g, xi[k], c);
    VectorLane::store(p + k * kLanes, momentum);
    VectorLane::store(theta + k * kLanes, position);
    kinetic[k] = VectorLane::truncate(kinetic_argument<integrator>(momentum, c.kinetic));
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
      add_quanta(kinetic_argument<integrator>(p[i], c.kinetic), sums.kinetic, sums.kinetic_seen);
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
  add_sums<float>(tile, chain, exact_sums<integrator>(sums, theta, p, n, scalars), theta, p, n);
}

template <Integrator integrator, Decay decay>
void step_float32(const Tile& tile) {
  using Storage = StorageOf<Format::kFloat32>;
  if (tile.chain_length < kLongChain || tile.unscale != 1.0)
    return step_pieces<integrator, decay, Storage>(tile, 0, tile.count);
  for (int64_t at = 0; at < tile.count;) {
    const int64_t chain = (tile.first + at) / tile.chain_length;
    const int64_t chain_end = (chain + 1) * tile.chain_length - tile.first;
    const int64_t end = chain_end < tile.count ? chain_end : tile.count;
    int64_t aligned = at + (-(tile.first + at) & 3);
    aligned = aligned < end ? aligned : end;
    const int64_t blocks = (end - aligned) / (kInterleaved * kBlock) * (kInterleaved * kBlock);
    step_pieces<integrator, decay, Storage>(tile, at, aligned);
    if (blocks) step_blocks<integrator, decay>(tile, aligned, blocks, chain);
    step_pieces<integrator, decay, Storage>(tile, aligned + blocks, end);
    at = end;
  }
}

template <Integrator integrator, Decay decay, Format format>
void step_other(const Tile& tile) {
  step_pieces<integrator, decay, StorageOf<format>>(tile, 0, tile.count);
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

#define CTLD_STEPS(integrator, decay)                                                                \
  {step_float32<integrator, decay>, step_other<integrator, decay, Format::kBFloat16>,                \
   step_other<integrator, decay, Format::kFloat16>, step_other<integrator, decay, Format::kFloat64>, \
   step_other<integrator, decay, Format::kBFloat16Both>}
#define CTLD_DECAYS(integrator)                                                    \
  {CTLD_STEPS(integrator, Decay::kNone), CTLD_STEPS(integrator, Decay::kGradient), \
   CTLD_STEPS(integrator, Decay::kGradientAndEnergy)}

#define CTLD_STRINGIFY_(x) #x
#define CTLD_STRINGIFY(x) CTLD_STRINGIFY_(x)

const TileKernels kKernels = {
    CTLD_STRINGIFY(CTLD_ISA),
    {CTLD_DECAYS(Integrator::kBaoab), CTLD_DECAYS(Integrator::kEuler), CTLD_DECAYS(Integrator::kMomentumSgd)},
    {prior_energy<float>, prior_energy<BFloat16>, prior_energy<Float16>, prior_energy<double>,
     prior_energy<BFloat16>},
    normals,
};

}  // namespace

CTLD_NAMESPACE_END

#define CTLD_CONCATENATE_(a, b) a##b
#define CTLD_CONCATENATE(a, b) CTLD_CONCATENATE_(a, b)

namespace ctld {
const TileKernels* CTLD_CONCATENATE(tile_kernels_, CTLD_ISA)() { return &kKernels; }
}  // namespace ctld
