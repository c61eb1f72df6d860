// What the CPU's step functions take: one tile, a range of elements of one tensor. One table of functions
// per instruction set.
#pragma once

#include "core/langevin.h"
#include "core/normal.h"
#include "core/storage.h"

namespace ctld {

constexpr int kIntegrators = 3, kDecays = 3;
// largest tile; a multiple of the noise group and of every vector block
constexpr int64_t kTileElements = 8192;

struct Tile {
  // pointers to the tile's first element
  void* theta;
  void* p;
  const void* gradient;
  int64_t first;  // its index in the tensor
  int64_t count;
  Counter counter;   // of the noise
  Counter rounding;  // of the stochastic rounding
  bool stochastic;
  double unscale;  // factor for the gradient
  const RoundKeys* keys;
  const GroupCoefficients* group;
  // chain of element e is e / chain_length; arrays are per chain
  int64_t chain_length;
  const double* scale;
  const double* rescale;
  const double* momentum;  // null without thermostats: the group's own
  // sums, added to atomically
  int64_t* kinetic;
  int64_t kinetic_stride;  // from one chain's to the next one's
  int64_t* prior;
  int64_t* flags;
};

using TileFunction = void (*)(const Tile&);

struct TileKernels {
  const char* name;
  TileFunction step[kIntegrators][kDecays][kFormats];
  TileFunction prior_energy[kFormats];
  // normals of noise groups first_group ...; `xi` has room for a multiple of 64 elements
  void (*normals)(uint32_t first_group, int64_t groups, Counter counter, const RoundKeys& keys, float* xi);
};

}  // namespace ctld
