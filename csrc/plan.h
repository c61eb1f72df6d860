// What the plans of all processors are told about parameters and state.
#pragma once

#include <cstdint>

#include "core/storage.h"

namespace ctld {

// What stays the same from step to step of one parameter.
struct TensorInfo {
  int64_t numel;
  uint32_t index;  // noise index
  uint32_t group;
  Format format;
};

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
