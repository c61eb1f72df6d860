// Runs the CUDA plan on the host, for the sanitizers: memory of exactly the right size, several launch
// shapes, which must all give the same bits. Exit status: scenarios that differ.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cuda_plan.h"
#include "launch.h"

using namespace ctld;

namespace {

// Bytes at an address that is `offset` elements after a multiple of 16, and not one more.
class Memory {
 public:
  Memory(std::size_t bytes, std::size_t offset) : offset_(offset) {
    if (posix_memalign(&base_, 16, offset + bytes + (offset + bytes == 0))) std::abort();
  }
  ~Memory() { std::free(base_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data() const { return static_cast<char*>(base_) + offset_; }

 private:
  void* base_ = nullptr;
  std::size_t offset_;
};

struct Scenario {
  const char* name;
  std::vector<int64_t> lengths;  // elements per chain
  std::vector<Format> formats;   // taken in turn
  int64_t chains;
  bool sampling;
  bool aligned;
  bool thermostats = false;
  int64_t first = 0;  // index of the first element, as in a shard
};

constexpr int32_t kBins = 12;
constexpr int64_t kGroups = 2;
constexpr int kSteps = 2;
constexpr int64_t kHistoryRows = 2;

template <class T>
T rounded(float x) {
  T to;
  store(to, x);
  return to;
}

template <class T>
void fill(Memory& memory, int64_t n, std::mt19937& random, T (*make)(float)) {
  std::normal_distribution<float> normal(0.0f, 0.1f);
  for (int64_t i = 0; i < n; ++i) static_cast<T*>(memory.data())[i] = make(normal(random));
}

void fill(Memory& memory, int64_t n, std::size_t bytes, bool half, std::mt19937& random) {
  if (bytes == 8) return fill<double>(memory, n, random, [](float x) { return static_cast<double>(x); });
  if (bytes == 4) return fill<float>(memory, n, random, [](float x) { return x; });
  if (half) return fill<Float16>(memory, n, random, [](float x) { return rounded<Float16>(x); });
  fill<BFloat16>(memory, n, random, [](float x) { return rounded<BFloat16>(x); });
}

uint64_t digest(const Memory& memory, std::size_t bytes, uint64_t hash) {
  const auto* at = static_cast<const unsigned char*>(memory.data());
  for (std::size_t i = 0; i < bytes; ++i) hash = (hash ^ at[i]) * 0x100000001B3ull;
  return hash;
}

TemperingConstants constants(int64_t chains) {
  TemperingConstants c = {};
  c.base_temperature = 1.0;
  c.energy_scale = 10.0;
  c.scale_range = 2.0;
  c.flat = 0.4;
  c.limit = 1.5;
  c.inverse_ramp = 1.0 / 1.1;
  c.inverse_bin_width = kBins / 1.5;
  c.step_size = 0.3;
  c.persistence = 0.9;
  c.noise_variance = 0.19;
  c.noise_scale = 0.435;
  c.coupling_strength = 1.0;
  c.hill_height = 0.05;
  c.hill_gain = 2.0;
  c.bins = kBins;
  c.kinetic_exponent = 16;
  c.prior_exponent = 16;
  c.energy_exponent = 20;
  c.coupling = Coupling::kAdaptive;
  derive(c, chains);
  return c;
}

// The state's tensors, each in memory of its own.
struct State {
  State(int64_t chains, bool thermostats) {
    pointers.step = integers(1);
    pointers.samples = integers(1);
    pointers.flags = integers(1);
    pointers.alpha = reals(chains);
    pointers.alpha_momentum = reals(chains);
    pointers.temperature = reals(chains);
    pointers.settled = integers(chains);
    pointers.turns = integers(chains);
    pointers.kinetic = integers(chains * (thermostats ? kGroups : 1));
    pointers.friction = reals(chains * kGroups);
    for (int64_t i = 0; i < chains * kGroups; ++i) pointers.friction[i] = 0.1;
    pointers.prior = integers(chains);
    pointers.visits = integers(kBins);
    pointers.energy_mean = reals(kBins);
    pointers.energy_spread = reals(kBins);
    pointers.hills = reals(kBins);
    pointers.alpha_kinetic = reals(1);
    pointers.history = reals(kHistoryRows * chains * kColumns);
    pointers.recorded = integers(1);
  }
  int64_t* integers(int64_t n) {
    memory.push_back(std::make_unique<Memory>(8 * n, 0));
    std::memset(memory.back()->data(), 0, 8 * n);
    sizes.push_back(8 * n);
    return static_cast<int64_t*>(memory.back()->data());
  }
  double* reals(int64_t n) { return reinterpret_cast<double*>(integers(n)); }
  uint64_t digest(uint64_t hash) const {
    for (std::size_t i = 0; i < memory.size(); ++i) hash = ::digest(*memory[i], sizes[i], hash);
    return hash;
  }

  std::vector<std::unique_ptr<Memory>> memory;
  std::vector<std::size_t> sizes;
  StatePointers pointers;
};

uint64_t run(const Scenario& scenario, uint32_t blocks, unsigned resident) {
  simt::resident_blocks = resident;
  std::mt19937 random(1);
  const int64_t chains = scenario.chains;
  State state(chains, scenario.thermostats);
  std::vector<double> group_elements(scenario.thermostats ? kGroups : 0, 0.0);
  std::vector<TensorInfo> infos;
  std::vector<TensorPointers> pointers;
  std::vector<std::unique_ptr<Memory>> memory;
  std::vector<std::size_t> sizes;
  for (std::size_t i = 0; i < scenario.lengths.size(); ++i) {
    const Format format = scenario.formats[i % scenario.formats.size()];
    const int64_t n = scenario.lengths[i] * chains;
    infos.push_back(
        {n, scenario.first, true, static_cast<uint32_t>(i), static_cast<uint32_t>(i % kGroups), format});
    if (scenario.thermostats) group_elements[i % kGroups] += static_cast<double>(scenario.lengths[i]);
    void* at[3];
    for (int part = 0; part < 3; ++part) {
      const std::size_t bytes = part == 1 ? momentum_bytes(format) : parameter_bytes(format);
      const std::size_t offset = scenario.aligned ? 0 : bytes * ((i + part) % 4);
      memory.push_back(std::make_unique<Memory>(bytes * n, offset));
      fill(*memory.back(), n, bytes, format == Format::kFloat16, random);
      sizes.push_back(bytes * n);
      at[part] = memory.back()->data();
    }
    pointers.push_back({at[0], at[1], at[2]});
  }
  CudaPlan plan(infos, chains, constants(chains), state.pointers, 0x123456789ull, true, group_elements, false,
                {kHistoryRows, 1e-6}, 10.0, blocks);
  Memory scratch(plan.scratch_bytes(), 0);
  std::memset(scratch.data(), 0, plan.scratch_bytes());
  plan.use_scratch(scratch.data());
  const std::vector<unsigned char> image = plan.table_of(pointers);
  Memory table(image.size(), 0);
  std::memcpy(table.data(), image.data(), image.size());
  plan.use_table(table.data());

  Memory loss(8 * chains, 0);
  for (int64_t i = 0; i < chains; ++i) static_cast<double*>(loss.data())[i] = 0.1 * static_cast<double>(i);
  std::vector<const void*> gradients;
  for (const TensorPointers& at : pointers) gradients.push_back(at.gradient);
  CudaStep step = {};
  const GroupCoefficients first = {0.9, 0.3, 0.02, 0.4, 0.01, 65536.0, 3000.0};
  const GroupCoefficients second = {0.8, 0.2, 0.01, 0.5, 0.0, 65536.0, 0.0};
  step.groups = {first, second};
  step.rates.resize(kGroups);
  step.loss = loss.data();
  step.loss_type = Number::kFloat64;
  for (int i = 0; i < kSteps; ++i) {
    if (scenario.sampling) {
      if (i == 0) plan.reduce_prior_energy(step, {0, 0});
      plan.explore(gradients, step, i % 2 ? Integrator::kEuler : Integrator::kBaoab, {0, 0});
    } else {
      plan.finetune(gradients, step, {0, 0});
    }
  }
  uint64_t hash = 0xCBF29CE484222325ull;
  for (std::size_t i = 0; i < memory.size(); ++i) hash = digest(*memory[i], sizes[i], hash);
  return state.digest(hash);
}

int check(const Scenario& scenario) {
  const uint64_t expected = run(scenario, 8, 3);
  int different = run(scenario, 16, 2) != expected;
  different += run(scenario, 3, 1) != expected;
  std::printf("%s: %s\n", scenario.name, different ? "DIFFERENT" : "same bits for all launch shapes");
  return different;
}

}  // namespace

// Without arguments, everything; "races" leaves out what differs in the type of the elements only.
int main(int count, char**) {
  const std::vector<Format> single = {Format::kFloat32};
  int different = check({"float32", {0, 1, 3, 4, 5, 511, 512, 513, 700}, single, 1, true, true});
  different += check({"misaligned float32", {5, 9, 33}, single, 1, true, false});
#ifndef SIMT_ONE_KERNEL
  const std::vector<Format> all = {Format::kFloat32, Format::kBFloat16, Format::kFloat16, Format::kFloat64,
                                   Format::kBFloat16Both};
  different += check({"few chains", {1, 3, 130}, single, 3, true, true});
  different += check({"many chains", {1, 3, 7}, single, 21, true, true});
  different += check({"fine-tuning", {5, 9, 520}, single, 1, false, true});
  different += check({"thermostats", {1, 3, 130}, single, 3, true, true, true});
  different += check({"shards", {1, 3, 5, 511, 513, 700}, single, 1, true, true, false, 1027});
  if (count > 1) return different;
  different += check({"all formats", {5, 9, 3, 6, 7, 520, 515, 516, 517, 519}, all, 1, true, true});
  different += check({"misaligned", {5, 9, 13, 6, 17, 31, 32, 33, 34, 35}, all, 1, true, false});
  different += check({"shards of all formats", {5, 9, 13, 6, 17, 520}, all, 1, true, true, false, 6});
  different += check({"fine-tuning of all formats", {5, 9, 13, 6, 17, 520, 515}, all, 1, false, true});
  different += check({"few chains of all formats", {1, 3, 130, 4, 8}, all, 3, true, true});
  different += check({"many chains, float64", {1, 3, 7}, {Format::kFloat64}, 21, true, true});
#else
  (void)count;
#endif
  return different;
}
