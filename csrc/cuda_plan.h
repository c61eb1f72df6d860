// The fused step on a CUDA device: how the work is shared out, and the arguments of the launches. Knows raw
// pointers only; whoever calls owns the memory, on the device, and has checked it.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda_arguments.h"

namespace ctld {

// What changes from step to step, besides the gradients.
struct CudaStep {
  std::vector<GroupCoefficients> groups;
  std::vector<LiveRate> rates;  // one per group
  const void* loss;
  Number loss_type;
  const float* grad_scale;
  const float* found_inf;
};

// Where to run.
struct CudaQueue {
  int device;
  uintptr_t stream;
};

class CudaPlan {
 public:
  // The work is shared by at most `max_blocks` blocks. `group_elements`: with thermostats, the elements of
  // each parameter group that one chain has; otherwise empty. `partial`: the sums of energies are those of
  // one rank, so the thermostats are left to the caller, who adds up. Throws std::invalid_argument if there
  // are more than kMaxGroups groups.
  CudaPlan(std::vector<TensorInfo> tensors, int64_t chains, const TemperingConstants& constants,
           const StatePointers& state, uint64_t seed, bool stochastic, std::vector<double> group_elements,
           bool partial, Recording recording, double num_data, uint32_t max_blocks);

  // Device memory for use_scratch(): this many bytes, zero at first, and left alone afterwards.
  std::size_t scratch_bytes() const;
  void use_scratch(void* memory);
  // The contents of the table that use_table() expects on the device. Parameters that are left out have null
  // pointers.
  std::vector<unsigned char> table_of(const std::vector<TensorPointers>& tensors);
  void use_table(const void* memory);

  // One sampling step. Gradients may be null, which means zero.
  void explore(const std::vector<const void*>& gradients, const CudaStep& step, Integrator integrator,
               CudaQueue queue);
  // One noise-free step; tensors without a gradient stay as they are.
  void finetune(const std::vector<const void*>& gradients, const CudaStep& step, CudaQueue queue);
  // Prior energy of the parameters as they are.
  void reduce_prior_energy(const CudaStep& step, CudaQueue queue);

 private:
  void prepare(const CudaStep& step);
  uint32_t sum_of(const TensorInfo& tensor) const;
  // `gradients` empty: they are not needed, and all formats go into one launch
  void launch_chunks(KernelChoice::Work work, Integrator integrator,
                     const std::vector<const void*>& gradients, CudaQueue queue);
  void launch_chains(KernelChoice::Work work, Integrator integrator,
                     const std::vector<const void*>& gradients, CudaQueue queue);
  void put_gradients(const std::vector<const void*>& gradients, uint32_t first, uint32_t count);
  // entries from `first` on that can go into one launch
  uint32_t slice_at(uint32_t first) const;
  bool owns_chains() const;
  uint32_t capacity() const;

  std::vector<TensorInfo> tensors_;  // in the order of the table: by format
  std::vector<uint32_t> order_;      // where they came from
  std::vector<uint32_t> first_chunk_;
  std::vector<double> group_elements_;
  uint32_t max_blocks_;
  uint64_t longest_chain_ = 0;
  StepArguments arguments_;
};

}  // namespace ctld
