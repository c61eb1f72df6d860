// ctld::launch on the host, through the shim, instead of the one in csrc/cuda.cu.
#pragma once

#include "simt.h"
// after the shim
#include "cuda_dispatch.h"

namespace ctld {

#ifdef SIMT_ONE_KERNEL  // for what is compiled many times
inline Kernel kernel_to_run(const KernelChoice& choice) {
  return choice.work == KernelChoice::Work::kChunks ? step_chunks<Integrator::kBaoab, Format::kFloat32>
                                                    : prior_of_chunks;
}
#else
inline Kernel kernel_to_run(const KernelChoice& choice) { return kernel_for(choice); }
#endif

void launch(const KernelChoice& choice, uint32_t blocks, int, uintptr_t, const StepArguments& arguments) {
  const Kernel kernel = kernel_to_run(choice);
  simt::run(blocks, kThreads, [&] { kernel(arguments); });
}

uint32_t resident_blocks(int) { return simt::resident_blocks; }

const char* device_problem() { return ""; }

}  // namespace ctld
