// The CUDA plan on the host, for Python: the kernels of csrc/cuda_kernels.h, run by the shim.
#include "bindings.h"
#include "launch.h"

PYBIND11_MODULE(simulated, module) {
  ctld::bind_cuda(module);
  module.def("set_resident_blocks", [](unsigned count) { simt::resident_blocks = count; });
}
