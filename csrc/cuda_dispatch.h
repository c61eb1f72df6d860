// From a KernelChoice to the kernel: all instantiations there are.
#pragma once

#include <stdexcept>

#include "cuda_kernels.h"

namespace ctld {

using Kernel = void (*)(const StepArguments);

template <Integrator integrator>
Kernel chunk_kernel(Format format) {
  switch (format) {
    case Format::kFloat32:
      return step_chunks<integrator, Format::kFloat32>;
    case Format::kBFloat16:
      return step_chunks<integrator, Format::kBFloat16>;
    case Format::kFloat16:
      return step_chunks<integrator, Format::kFloat16>;
    case Format::kFloat64:
      return step_chunks<integrator, Format::kFloat64>;
    case Format::kBFloat16Both:
      return step_chunks<integrator, Format::kBFloat16Both>;
  }
  throw std::invalid_argument("unknown format");
}

template <Integrator integrator>
Kernel chain_kernel(Format format) {
  return format == Format::kFloat32 ? step_chains<integrator, Format::kFloat32>
                                    : step_chains<integrator, Format::kFloat64>;
}

inline Kernel kernel_for(const KernelChoice& choice) {
  using Work = KernelChoice::Work;
  const bool baoab = choice.integrator == Integrator::kBaoab;
  switch (choice.work) {
    case Work::kPriorOfChunks:
      return prior_of_chunks;
    case Work::kPriorOfChains:
      return prior_of_chains;
    case Work::kChains:
      return baoab ? chain_kernel<Integrator::kBaoab>(choice.format)
                   : chain_kernel<Integrator::kEuler>(choice.format);
    case Work::kChunks:
      if (choice.integrator == Integrator::kMomentumSgd)
        return chunk_kernel<Integrator::kMomentumSgd>(choice.format);
      return baoab ? chunk_kernel<Integrator::kBaoab>(choice.format)
                   : chunk_kernel<Integrator::kEuler>(choice.format);
  }
  throw std::invalid_argument("unknown work");
}

}  // namespace ctld
