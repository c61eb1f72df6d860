// Starts the kernels. The only file that calls the CUDA runtime.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda_dispatch.h"

namespace ctld {

namespace {

void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error of ours must not surface in somebody else's call
  throw std::runtime_error(std::string("CUDA error while ") + doing + ": " + cudaGetErrorString(error));
}

// Makes a device current, and the one before current again.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check(cudaGetDevice(&before_), "asking for the current device");
    if (device != before_) check(cudaSetDevice(device), "choosing a device");
    changed_ = device != before_;
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace

void launch(const KernelChoice& choice, uint32_t blocks, int device, uintptr_t stream,
            const StepArguments& arguments) {
  const CurrentDevice current(device);
  const Kernel kernel = kernel_for(choice);
  void* parameters[] = {const_cast<StepArguments*>(&arguments)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(kThreads), parameters, 0,
                         reinterpret_cast<cudaStream_t>(stream)),
        "starting a step");
}

uint32_t resident_blocks(int device) {
  const CurrentDevice current(device);
  int per_processor = 0, processors = 0;
  const Kernel kernel = step_chunks<Integrator::kBaoab, Format::kFloat32>;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, kThreads, 0),
        "asking for the occupancy");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        "asking for the multiprocessors");
  return static_cast<uint32_t>(per_processor * processors);
}

const char* device_problem() {
  int count = 0;
  switch (cudaGetDeviceCount(&count)) {
    case cudaSuccess:
      return count > 0 ? "" : "no NVIDIA GPU is visible";
    case cudaErrorNoDevice:
      return "no NVIDIA GPU is visible";
    case cudaErrorInsufficientDriver:
      return "no NVIDIA driver is installed, or one too old for the CUDA toolkit that built the extension";
    default:
      return "the NVIDIA driver does not start";
  }
}

}  // namespace ctld
