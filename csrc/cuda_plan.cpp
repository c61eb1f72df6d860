#include "cuda_plan.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace ctld {

namespace {

template <class T>
T divide_up(T a, T b) {
  return (a + b - 1) / b;
}

template <class T>
T round_up(T a, T multiple) {
  return divide_up(a, multiple) * multiple;
}

// Small enough that all blocks have something to do, large enough that looking up a chunk costs nothing.
uint32_t chunk_size_for(uint64_t elements, uint32_t blocks) {
  const uint64_t fair = round_up<uint64_t>(divide_up<uint64_t>(elements, blocks), kSmallestChunk);
  return static_cast<uint32_t>(std::clamp<uint64_t>(fair, kSmallestChunk, kLargestChunk));
}

// Elements of a shard's first unit that belong to the rank before.
int64_t skipped(const TensorInfo& tensor) { return tensor.first % unit_of(tensor.format); }

// The address of the first unit, of which the rank before may have a part: nobody reads or writes that.
template <class T>
T* whole_units(T* shard, const TensorInfo& tensor, int64_t bytes) {
  if (shard == nullptr) return nullptr;
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(shard) -
                              static_cast<uintptr_t>(skipped(tensor) * bytes));
}

// Elements of one chain; of a shard, from its first unit on.
uint64_t chain_length(const TensorInfo& tensor, int64_t chains) {
  return tensor.numel == 0 ? 0 : static_cast<uint64_t>((tensor.numel + skipped(tensor)) / chains);
}

}  // namespace

CudaPlan::CudaPlan(std::vector<TensorInfo> tensors, int64_t chains, const TemperingConstants& constants,
                   const StatePointers& state, uint64_t seed, bool stochastic,
                   std::vector<double> group_elements, bool partial, Recording recording, double num_data,
                   uint32_t max_blocks)
    : group_elements_(std::move(group_elements)), max_blocks_(max_blocks), arguments_() {
  order_.resize(tensors.size());
  std::iota(order_.begin(), order_.end(), 0u);
  std::stable_sort(order_.begin(), order_.end(),
                   [&](uint32_t i, uint32_t j) { return tensors[i].format < tensors[j].format; });
  uint64_t elements = 0;
  for (const uint32_t i : order_) {
    const TensorInfo& tensor = tensors[i];
    if (tensor.group >= kMaxGroups)
      throw std::invalid_argument("backend 'cuda' handles at most 256 parameter groups: merge some");
    tensors_.push_back(tensor);
    elements += static_cast<uint64_t>(tensor.numel);
    longest_chain_ = std::max(longest_chain_, static_cast<uint64_t>(tensor.numel / chains));
  }
  StepArguments& a = arguments_;
  a.state = state;
  a.constants = constants;
  a.keys = round_keys(seed);
  a.recording = recording;
  a.num_data = num_data;
  a.chains = chains;
  a.stochastic = stochastic;
  a.thermostats = !group_elements_.empty();
  a.partial = partial;
  a.kinetic_sums = a.thermostats ? static_cast<uint32_t>(group_elements_.size()) : 1;
  a.chunk_size = chunk_size_for(elements, max_blocks_);
  const auto fair_chains = divide_up<int64_t>(chains, max_blocks_);
  // a multiple of the noise group, so that blocks share no group
  a.chains_per_block = static_cast<uint32_t>(
      std::min<int64_t>(round_up<int64_t>(fair_chains, 4), static_cast<int64_t>(kChainsPerBlock)));
  first_chunk_.push_back(0);
  for (const TensorInfo& tensor : tensors_) {
    const uint64_t length = chain_length(tensor, chains);
    const uint64_t chunks = divide_up<uint64_t>(length, a.chunk_size) * static_cast<uint64_t>(chains);
    first_chunk_.push_back(first_chunk_.back() + static_cast<uint32_t>(chunks));
  }
}

// Which of the first chain's sums a tensor's kinetic energies belong to.
uint32_t CudaPlan::sum_of(const TensorInfo& tensor) const {
  if (!tensor.counted) return static_cast<uint32_t>(arguments_.chains) * arguments_.kinetic_sums;
  return arguments_.thermostats ? tensor.group : 0;
}

std::size_t CudaPlan::scratch_bytes() const {
  const auto sums = static_cast<std::size_t>(bin_sums_length(arguments_.constants.bins));
  const auto per_chain = static_cast<std::size_t>(arguments_.kinetic_sums + 1);
  return (per_chain * static_cast<std::size_t>(arguments_.chains) + 2 + 2 * sums + 1) * sizeof(int64_t);
}

void CudaPlan::use_scratch(void* memory) {
  auto* at = static_cast<int64_t*>(memory);
  const int64_t sums = bin_sums_length(arguments_.constants.bins);
  arguments_.scratch.kinetic = at;
  arguments_.scratch.prior = at += arguments_.chains * arguments_.kinetic_sums + 1;
  arguments_.scratch.bin_sums = at += arguments_.chains + 1;
  arguments_.learned = at += sums;
  arguments_.scratch.done = reinterpret_cast<uint32_t*>(at + sums);
}

std::vector<unsigned char> CudaPlan::table_of(const std::vector<TensorPointers>& pointers) {
  std::vector<TableEntry> entries;
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    const TensorInfo& tensor = tensors_[i];
    TableEntry entry = {};
    entry.theta = whole_units(pointers[order_[i]].theta, tensor, parameter_bytes(tensor.format));
    entry.momentum = whole_units(pointers[order_[i]].momentum, tensor, momentum_bytes(tensor.format));
    entry.chain_length = chain_length(tensor, arguments_.chains);
    entry.chunks_per_chain =
        static_cast<uint32_t>(divide_up<uint64_t>(entry.chain_length, arguments_.chunk_size));
    entry.first_chunk = first_chunk_[i];
    entry.index = tensor.index;
    entry.group = static_cast<uint16_t>(tensor.group);
    entry.format = static_cast<uint8_t>(tensor.format);
    entry.sum = sum_of(tensor);
    entry.first_group = static_cast<uint32_t>((tensor.first - skipped(tensor)) / 4);
    entry.skipped = static_cast<uint8_t>(skipped(tensor));
    entries.push_back(entry);
  }
  const std::size_t entry_bytes = entries.size() * sizeof(TableEntry);
  const std::size_t group_bytes = group_elements_.size() * sizeof(double);
  const std::size_t chunk_bytes = first_chunk_.size() * sizeof(uint32_t);
  std::vector<unsigned char> image(entry_bytes + group_bytes + chunk_bytes);
  unsigned char* to = image.data();
  if (entry_bytes) std::memcpy(to, entries.data(), entry_bytes);
  if (group_bytes) std::memcpy(to + entry_bytes, group_elements_.data(), group_bytes);
  std::memcpy(to + entry_bytes + group_bytes, first_chunk_.data(), chunk_bytes);
  return image;
}

void CudaPlan::use_table(const void* memory) {
  arguments_.table = static_cast<const TableEntry*>(memory);
  arguments_.group_elements = reinterpret_cast<const double*>(arguments_.table + tensors_.size());
  arguments_.first_chunk =
      reinterpret_cast<const uint32_t*>(arguments_.group_elements + group_elements_.size());
}

void CudaPlan::prepare(const CudaStep& step) {
  StepArguments& a = arguments_;
  a.loss = step.loss;
  a.loss_type = step.loss_type;
  a.grad_scale = step.grad_scale;
  a.found_inf = step.found_inf;
  a.groups = static_cast<uint32_t>(step.groups.size());
  if (a.groups > kMaxGroups) throw std::invalid_argument("too many parameter groups");
  a.live_rates = false;
  auto* groups = reinterpret_cast<GroupArguments*>(a.arena);
  for (std::size_t i = 0; i < step.groups.size(); ++i) {
    groups[i] = {step.groups[i], step.rates[i]};
    a.live_rates |= step.rates[i].lr != nullptr;
  }
}

// gradient addresses that fit into the arguments of a launch
uint32_t CudaPlan::capacity() const {
  return static_cast<uint32_t>((kArenaBytes - arguments_.groups * sizeof(GroupArguments)) / sizeof(void*));
}

void CudaPlan::put_gradients(const std::vector<const void*>& gradients, uint32_t first, uint32_t count) {
  unsigned char* const bytes = arguments_.arena + arguments_.groups * sizeof(GroupArguments);
  auto** const to = reinterpret_cast<const void**>(bytes);
  for (uint32_t i = 0; i < count; ++i) {
    const TensorInfo& tensor = tensors_[first + i];
    to[i] = whole_units(gradients[order_[first + i]], tensor, parameter_bytes(tensor.format));
  }
}

// Whole chains if that occupies all blocks; it needs all tensors in one launch, which must be of one format,
// and chains whose groups all keep the same share of their momenta from step to step.
bool CudaPlan::owns_chains() const {
  const StepArguments& a = arguments_;
  if (a.thermostats || a.chains == 1 || a.chains < static_cast<int64_t>(max_blocks_) || tensors_.empty())
    return false;
  const Format format = tensors_.front().format;
  const bool alike = format == tensors_.back().format;
  const bool supported = format == Format::kFloat32 || format == Format::kFloat64;
  const bool countable = longest_chain_ * a.chains_per_block < (1ull << 32);
  return alike && supported && countable && tensors_.size() <= capacity();
}

uint32_t CudaPlan::slice_at(uint32_t first) const {
  const auto end = std::min<std::size_t>(tensors_.size(), first + capacity());
  uint32_t i = first;
  while (i < end && tensors_[i].format == tensors_[first].format) ++i;
  return i - first;
}

void CudaPlan::launch_chunks(KernelChoice::Work work, Integrator integrator,
                             const std::vector<const void*>& gradients, CudaQueue queue) {
  StepArguments& a = arguments_;
  const auto entries = static_cast<uint32_t>(tensors_.size());
  struct Slice {
    uint32_t first, count, chunks_per_block, blocks;
  };
  std::vector<Slice> slices;
  a.blocks = 0;
  for (uint32_t first = 0, count; first < entries; first += count) {
    count = gradients.empty() ? entries : slice_at(first);
    const uint32_t chunks = first_chunk_[first + count] - first_chunk_[first];
    if (chunks == 0) continue;
    // as many chunks for every block as for every other, even if fewer blocks run
    const uint32_t per_block = divide_up(chunks, max_blocks_);
    slices.push_back({first, count, per_block, divide_up(chunks, per_block)});
    a.blocks += slices.back().blocks;
  }
  if (slices.empty()) {  // no elements, but alpha and the step counter move on
    slices.push_back({0, 0, 1, 1});
    a.blocks = 1;
  }
  for (const Slice& slice : slices) {
    a.first_entry = slice.first;
    a.entries = slice.count;
    a.chunk_begin = first_chunk_[slice.first];
    a.chunk_end = first_chunk_[slice.first + slice.count];
    a.chunks_per_block = slice.chunks_per_block;
    if (!gradients.empty()) put_gradients(gradients, slice.first, slice.count);
    const Format format = slice.count ? tensors_[slice.first].format : Format::kFloat32;
    launch({work, integrator, format}, slice.blocks, queue.device, queue.stream, a);
  }
}

void CudaPlan::launch_chains(KernelChoice::Work work, Integrator integrator,
                             const std::vector<const void*>& gradients, CudaQueue queue) {
  StepArguments& a = arguments_;
  a.first_entry = 0;
  a.entries = static_cast<uint32_t>(tensors_.size());
  a.blocks = static_cast<uint32_t>(divide_up<int64_t>(a.chains, a.chains_per_block));
  if (!gradients.empty()) put_gradients(gradients, 0, a.entries);
  launch({work, integrator, tensors_.front().format}, a.blocks, queue.device, queue.stream, a);
}

void CudaPlan::explore(const std::vector<const void*>& gradients, const CudaStep& step, Integrator integrator,
                       CudaQueue queue) {
  prepare(step);
  if (owns_chains()) {
    launch_chains(KernelChoice::Work::kChains, integrator, gradients, queue);
  } else {
    launch_chunks(KernelChoice::Work::kChunks, integrator, gradients, queue);
  }
}

void CudaPlan::finetune(const std::vector<const void*>& gradients, const CudaStep& step, CudaQueue queue) {
  prepare(step);
  launch_chunks(KernelChoice::Work::kChunks, Integrator::kMomentumSgd, gradients, queue);
}

void CudaPlan::reduce_prior_energy(const CudaStep& step, CudaQueue queue) {
  prepare(step);
  if (owns_chains()) {
    launch_chains(KernelChoice::Work::kPriorOfChains, Integrator::kEuler, {}, queue);
  } else {
    launch_chunks(KernelChoice::Work::kPriorOfChunks, Integrator::kEuler, {}, queue);
  }
}

}  // namespace ctld
