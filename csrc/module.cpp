// The extension module ctld_cuda._C.
#include "bindings.h"

PYBIND11_MODULE(_C, module) {
  ctld::bind_cpu(module);
  ctld::bind_look(module);
#ifdef CTLD_WITH_CUDA
  ctld::bind_cuda(module);
#endif
}
