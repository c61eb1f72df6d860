// What the plans of all processors are told about parameters and state.
#pragma once

#include <cstdint>

#include "core/storage.h"

namespace ctld {

// What stays the same from step to step of one parameter.
struct TensorInfo {
  int64_t numel;
  int64_t first;   // its first element's index in the whole parameter, if it is one rank's shard; else 0
  bool counted;    // whether its energies belong into the sums: not those of another rank's replica
  uint32_t index;  // noise index
  uint32_t group;
  Format format;
};

// The type of a floating-point number that is read where it is.
enum class Number : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

CTLD_HD double read_number(const void* from, Number type, int64_t i) {
  switch (type) {
    case Number::kFloat32:
      return static_cast<const float*>(from)[i];
    case Number::kFloat64:
      return static_cast<const double*>(from)[i];
    case Number::kBFloat16:
      return load(static_cast<const BFloat16*>(from)[i]);
    default:
      return load(static_cast<const Float16*>(from)[i]);
  }
}

// Where one parameter is this step; theta == nullptr leaves it out, gradient == nullptr means zero.
struct TensorPointers {
  void* theta;
  void* momentum;
  const void* gradient;
};

// The sampler's state, fields as in ctld_cuda/state.py.
struct StatePointers {
  int64_t *step, *samples, *flags;
  double *alpha, *alpha_momentum, *temperature;
  int64_t *settled, *turns, *kinetic;
  double* friction;
  int64_t *prior, *visits;
  double *energy_mean, *energy_spread, *hills, *alpha_kinetic;
  double* history;
  int64_t* recorded;
};

// How to write the history: `rows` in the ring, 0 for none; kinetic temperature per quantum of kinetic
// energy.
struct Recording {
  int64_t rows;
  double kinetic_unit;
};

}  // namespace ctld
