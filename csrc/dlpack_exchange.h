// The part of DLPack's C exchange interface that is needed to look at a Python tensor: version 1, whose
// binary layout is fixed (https://dmlc.github.io/dlpack/latest/c_api.html). Nobody's headers are needed for
// it.
#pragma once

#include <cstdint>

namespace ctld {

struct DLTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t dtype_code;
  uint8_t dtype_bits;
  uint16_t dtype_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major;
  uint32_t minor;
  DLPackExchangeAPI* previous;
  void (*unused[3])();
  // Borrows what the tensor has; 0, or -1 with a Python exception. Absent from some producers.
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
  void (*also_unused)();
};

constexpr uint32_t kDLPackMajor = 1;
// the name of the capsule
constexpr char kExchangeName[] = "dlpack_exchange_api";

}  // namespace ctld
