#include "cpu.h"

#include <algorithm>
#include <cfenv>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "core/chunks.h"

namespace ctld {

#if defined(__x86_64__)
const TileKernels* tile_kernels_v1();
const TileKernels* tile_kernels_v3();
const TileKernels* tile_kernels_v4();
#elif defined(__aarch64__)
const TileKernels* tile_kernels_neon();
#else
const TileKernels* tile_kernels_generic();
#endif

std::vector<const TileKernels*> supported_kernels() {
#if defined(__x86_64__)
  std::vector<const TileKernels*> found;
  const auto has_v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma");
  const auto has_v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (has_v3 && has_v4) found.push_back(tile_kernels_v4());
  if (has_v3) found.push_back(tile_kernels_v3());
  found.push_back(tile_kernels_v1());
  return found;
#elif defined(__aarch64__)
  return {tile_kernels_neon()};
#else
  return {tile_kernels_generic()};
#endif
}

namespace {

// Round to nearest and keep denormals, whatever the calling thread has set; put its settings back after.
class FloatEnvironment {
 public:
#if defined(__x86_64__)
  FloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~FloatEnvironment() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FloatEnvironment() {
    fegetenv(&saved_);
    fesetenv(FE_DFL_ENV);
  }
  ~FloatEnvironment() { fesetenv(&saved_); }

 private:
  fenv_t saved_;
#endif
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;
};

// the gradient of a tensor that has none; zero in every dtype
alignas(64) const unsigned char kZeros[kTileElements * 8] = {};

// below this many elements per thread, starting another thread costs more than it saves
constexpr int64_t kElementsPerThread = 16384;

int useful_threads(int64_t work, int threads) {
  return static_cast<int>(std::clamp<int64_t>(work / kElementsPerThread, 1, std::max(threads, 1)));
}

}  // namespace

CpuPlan::CpuPlan(std::vector<TensorInfo> tensors, int64_t chains, const TemperingConstants& constants,
                 const StatePointers& state, uint64_t seed, bool stochastic,
                 std::vector<double> group_elements, bool partial, Recording recording,
                 const TileKernels* kernels)
    : tensors_(std::move(tensors)),
      chains_(chains),
      constants_(constants),
      state_(state),
      keys_(round_keys(seed)),
      stochastic_(stochastic),
      group_elements_(std::move(group_elements)),
      partial_(partial),
      recording_(recording),
      kernels_(kernels),
      scale_(chains, 1.0),
      rescale_(chains, 1.0),
      bin_sums_(bin_sums_length(constants.bins)) {
  for (const TensorInfo& tensor : tensors_) {
    first_chunk_.push_back(chunks_);
    chunks_ += static_cast<uint32_t>((tensor.numel + kTileElements - 1) / kTileElements);
    elements_ += tensor.numel;
  }
}

// of each chain
int64_t CpuPlan::kinetic_sums() const {
  return group_elements_.empty() ? 1 : static_cast<int64_t>(group_elements_.size());
}

void CpuPlan::adapt_frictions(const std::vector<GroupCoefficients>& groups, bool baoab) {
  const FloatEnvironment environment;
  const int64_t thermostats = static_cast<int64_t>(group_elements_.size());
  for (int64_t i = 0; i < chains_ * thermostats; ++i) {
    const int64_t chain = i / thermostats, group = i % thermostats;
    const Friction friction =
        adapt_friction(state_.friction[i], state_.kinetic[i], state_.temperature[chain],
                       group_elements_[group], groups[group].momentum, baoab, constants_);
    state_.friction[i] = friction.value;
    *state_.flags |= friction.flags;
  }
}

// The momenta's friction at the new temperatures.
void CpuPlan::damp(const std::vector<GroupCoefficients>& groups) {
  const FloatEnvironment environment;
  const int64_t thermostats = static_cast<int64_t>(group_elements_.size());
  momentum_.resize(chains_ * thermostats);
  for (int64_t group = 0; group < thermostats; ++group) {
    for (int64_t chain = 0; chain < chains_; ++chain) {
      const double friction = state_.friction[chain * thermostats + group];
      momentum_[group * chains_ + chain] =
          damped_momentum(groups[group].momentum, friction, scale_[chain] * scale_[chain]);
    }
  }
}

// Moves alpha of every chain with the energy of the current parameters, then learns the bias.
void CpuPlan::temper(const double* loss, int threads) {
  const TemperingConstants& c = constants_;
  std::fill(bin_sums_.begin(), bin_sums_.end(), 0);
  const BinSums by_bin = bin_sums(bin_sums_.data(), c.bins);
  const Bias bias = {*state_.samples, state_.visits, state_.energy_mean, state_.energy_spread, state_.hills};
  const Counter counter = make_counter(static_cast<uint64_t>(*state_.step), kAlphaNoise, 0);
  const int64_t groups = (chains_ + 3) / 4;
#pragma omp parallel for schedule(static) num_threads(useful_threads(64 * chains_, threads))
  for (int64_t group = 0; group < groups; ++group) {
    FloatEnvironment environment;
    float xi[4];
    normal_group(static_cast<uint32_t>(group), counter, keys_, xi);
    for (int64_t chain = 4 * group; chain < std::min(4 * group + 4, chains_); ++chain) {
      const ChainStep step = temper_chain(state_.alpha[chain], state_.alpha_momentum[chain], loss[chain],
                                          state_.prior[chain], xi[chain & 3], bias, c);
      state_.alpha[chain] = step.alpha;
      state_.alpha_momentum[chain] = step.r;
      state_.temperature[chain] = c.base_temperature * (step.scale * step.scale);
      state_.settled[chain] = absolute(step.alpha) <= c.flat ? state_.settled[chain] + 1 : 0;
      state_.turns[chain] = turns_after(state_.turns[chain], step.alpha, c);
      scale_[chain] = step.scale;
      rescale_[chain] = step.rescale;
      if (step.flags) __atomic_fetch_or(state_.flags, step.flags, __ATOMIC_RELAXED);
      if (step.visit.usable) {
        const int32_t bin = step.visit.bin;
        __atomic_fetch_add(by_bin.count + bin, 1, __ATOMIC_RELAXED);
        __atomic_fetch_add(by_bin.energy + bin, step.visit.energy, __ATOMIC_RELAXED);
        __atomic_fetch_add(by_bin.deviation + bin, step.visit.deviation, __ATOMIC_RELAXED);
        __atomic_fetch_add(by_bin.r_square, step.visit.r_square, __ATOMIC_RELAXED);
        __atomic_fetch_add(by_bin.samples, 1, __ATOMIC_RELAXED);
      }
    }
  }
  FloatEnvironment environment;
  const Tables tables = {state_.samples,       state_.visits, state_.energy_mean,
                         state_.energy_spread, state_.hills,  state_.alpha_kinetic};
  const double t = static_cast<double>(*state_.step + 1);
  for (int32_t bin = 0; bin < c.bins; ++bin) learn_bin(bin, by_bin, t, chains_, tables, c);
  for (int32_t bin = 0; bin < c.bins; ++bin) fill_bin(bin, tables, c.bins);
  learn_alpha_kinetic(by_bin, tables);
}

double* CpuPlan::row() const {
  return state_.history + next_row(*state_.recorded, recording_.rows) * chains_ * kColumns;
}

// Before the step, which replaces the prior energy by that of the parameters it writes. Without noise that is
// not kept up.
void CpuPlan::record_energies(const double* loss, bool sampling) {
  if (recording_.rows == 0) return;
  const FloatEnvironment environment;
  for (int64_t chain = 0; chain < chains_; ++chain) {
    double energy = unknown();
    if (loss != nullptr) {
      energy = sampling ? potential_energy(loss[chain], state_.prior[chain], constants_)
                        : loss_energy(loss[chain], constants_);
    }
    row()[kColumns * chain + kEnergyColumn] = energy;
  }
}

// After the step.
void CpuPlan::record_rest(bool sampling) {
  if (recording_.rows == 0) return;
  const FloatEnvironment environment;
  for (int64_t chain = 0; chain < chains_; ++chain) {
    int64_t quanta = 0;
    for (int64_t i = 0; i < kinetic_sums(); ++i) quanta += state_.kinetic[chain * kinetic_sums() + i];
    double* const entry = row() + kColumns * chain;
    entry[kAlphaColumn] = state_.alpha[chain];
    entry[kTemperatureColumn] = state_.temperature[chain];
    entry[kKineticColumn] = sampling ? static_cast<double>(quanta) * recording_.kinetic_unit : unknown();
  }
  *state_.recorded = recorded_after(*state_.recorded, recording_.rows);
}

// Calls choose(tensor, pointers), which returns the function for a tensor's tiles or nullptr to skip it.
template <class Choose>
void CpuPlan::for_tiles(const std::vector<TensorPointers>& pointers,
                        const std::vector<GroupCoefficients>& groups, double unscale, int threads,
                        Choose choose) {
  const uint64_t step = static_cast<uint64_t>(*state_.step);
  int64_t uncounted = 0;
  // dynamic: a core that somebody else slows down does not hold up the others
#pragma omp parallel for schedule(dynamic, 8) num_threads(useful_threads(elements_, threads))
  for (uint32_t chunk = 0; chunk < chunks_; ++chunk) {
    const uint32_t i = find_tensor(first_chunk_.data(), static_cast<uint32_t>(tensors_.size()), chunk);
    const TensorInfo& tensor = tensors_[i];
    const TensorPointers& at = pointers[i];
    const TileFunction function = at.theta ? choose(tensor, at) : nullptr;
    if (!function) continue;
    FloatEnvironment environment;
    const std::size_t bytes = parameter_bytes(tensor.format);
    Tile tile;
    const int64_t offset = static_cast<int64_t>(chunk - first_chunk_[i]) * kTileElements;
    tile.first = tensor.first + offset;
    tile.count = std::min(kTileElements, tensor.numel - offset);
    tile.theta = static_cast<char*>(at.theta) + offset * bytes;
    tile.p = static_cast<char*>(at.momentum) + offset * momentum_bytes(tensor.format);
    tile.gradient = at.gradient ? static_cast<const char*>(at.gradient) + offset * bytes
                                : static_cast<const void*>(kZeros);
    tile.counter = make_counter(step, kParameterNoise, tensor.index);
    tile.rounding = make_counter(step, kRounding, tensor.index);
    tile.stochastic = stochastic_;
    tile.unscale = unscale;
    tile.keys = &keys_;
    tile.group = &groups[tensor.group];
    tile.chain_length = (tensor.first + tensor.numel) / chains_;
    tile.scale = scale_.data();
    tile.rescale = rescale_.data();
    tile.momentum = momentum_.empty() ? nullptr : momentum_.data() + tensor.group * chains_;
    tile.kinetic =
        tensor.counted ? state_.kinetic + (group_elements_.empty() ? 0 : tensor.group) : &uncounted;
    tile.kinetic_stride = kinetic_sums();
    tile.prior = tensor.counted ? state_.prior : &uncounted;
    tile.flags = state_.flags;
    function(tile);
  }
}

void CpuPlan::explore(const std::vector<TensorPointers>& tensors,
                      const std::vector<GroupCoefficients>& groups, Integrator integrator, const double* loss,
                      double unscale, int threads) {
  record_energies(loss, true);
  if (constants_.bins) temper(loss, threads);
  if (!group_elements_.empty()) damp(groups);
  std::fill_n(state_.kinetic, chains_ * kinetic_sums(), 0);
  std::fill_n(state_.prior, chains_, 0);
  const auto& steps = kernels_->step[static_cast<int>(integrator)];
  for_tiles(tensors, groups, unscale, threads, [&](const TensorInfo& tensor, const TensorPointers&) {
    return steps[static_cast<int>(decay_of(groups[tensor.group]))][static_cast<int>(tensor.format)];
  });
  if (!group_elements_.empty() && !partial_) adapt_frictions(groups, integrator == Integrator::kBaoab);
  record_rest(true);
  *state_.step += 1;
}

void CpuPlan::finetune(const std::vector<TensorPointers>& tensors,
                       const std::vector<GroupCoefficients>& groups, const double* loss, double unscale,
                       int threads) {
  record_energies(loss, false);
  std::fill(scale_.begin(), scale_.end(), 1.0);
  std::fill(rescale_.begin(), rescale_.end(), 1.0);
  momentum_.clear();
  const auto& steps = kernels_->step[static_cast<int>(Integrator::kMomentumSgd)];
  for_tiles(tensors, groups, unscale, threads,
            [&](const TensorInfo& tensor, const TensorPointers& at) -> TileFunction {
              if (!at.gradient) return nullptr;
              return steps[static_cast<int>(decay_of(groups[tensor.group]))][static_cast<int>(tensor.format)];
            });
  record_rest(false);
  *state_.step += 1;
}

void CpuPlan::reduce_prior_energy(const std::vector<TensorPointers>& tensors,
                                  const std::vector<GroupCoefficients>& groups, int threads) {
  std::fill_n(state_.prior, chains_, 0);
  for_tiles(tensors, groups, 1.0, threads,
            [&](const TensorInfo& tensor, const TensorPointers&) -> TileFunction {
              if (groups[tensor.group].prior == 0.0) return nullptr;
              return kernels_->prior_energy[static_cast<int>(tensor.format)];
            });
}

}  // namespace ctld
