// What the CUDA kernels take: plain structs that the host fills in (cuda_plan.cpp).
#pragma once

#include <cstdint>

#include "core/langevin.h"
#include "core/philox.h"
#include "core/tempering.h"
#include "plan.h"

namespace ctld {

constexpr uint32_t kThreads = 128;         // per block
constexpr uint32_t kLargestChunk = 8192;   // elements; more would leave the last blocks too unequal
constexpr uint32_t kSmallestChunk = 512;   // one noise group per thread
constexpr uint32_t kChainsPerBlock = 128;  // at most, where a block owns whole chains
constexpr uint32_t kMaxGroups = 256;       // parameter groups
constexpr uint32_t kMaxArgumentBytes = 32764;

// One parameter, in the persistent table on the device.
struct TableEntry {
  void* theta;  // null: left out
  void* momentum;
  uint64_t chain_length;      // elements of one chain
  uint32_t chunks_per_chain;  // chunks never straddle chains
  uint32_t first_chunk;
  uint32_t index;        // noise index
  uint32_t first_group;  // noise group of the first unit
  uint32_t sum;          // of kinetic energies: the first chain's
  uint16_t group;
  uint8_t format;
  uint8_t skipped;  // elements of the first unit that belong to another rank; 0 with several chains
};

// Elements come in units: as many as make 16 bytes of a parameter, but at least a noise group.
CTLD_HD uint32_t unit_of(Format format) { return parameter_bytes(format) == 2 ? 8 : 4; }

// A group's learning rate in device memory; lr is null where the host has computed the rates.
struct LiveRate {
  const void* lr;
  double* last;  // last positive lr of the sampling phase
  double* unit;  // momentum unit of the noise-free phase, 0 before its first step
  Number type;
};

struct GroupArguments {
  GroupCoefficients coefficients;
  LiveRate rate;
};

// Zero between steps, and touched by atomic operations only.
struct Scratch {
  int64_t* kinetic;   // per chain and thermostat, and one that nobody reads
  int64_t* prior;     // per chain, and one that nobody reads
  int64_t* bin_sums;  // bin_sums_length(bins)
  uint32_t* done;     // blocks that have finished
};

constexpr uint32_t kArenaBytes = 32000;

struct StepArguments {
  StatePointers state;
  Scratch scratch;
  int64_t* learned;  // bin_sums_length(bins) numbers: a step's sums where they need no atomic operations
  TemperingConstants constants;
  RoundKeys keys;
  Recording recording;
  double num_data;
  int64_t chains;
  const TableEntry* table;
  const uint32_t* first_chunk;  // of every table entry, and of one past the last
  // with thermostats: elements of each group that one chain has
  const double* group_elements;
  const void* loss;         // null: none; only without tempering
  const float* grad_scale;  // null: 1
  const float* found_inf;   // null: 0
  Number loss_type;
  // this launch: entries [first_entry, first_entry + entries) and their chunks
  uint32_t first_entry, entries, chunk_begin, chunk_end;
  uint32_t chunk_size, chunks_per_block;
  uint32_t chains_per_block;  // where blocks own whole chains
  uint32_t blocks;            // of all launches of this step together
  uint32_t groups;
  uint32_t kinetic_sums;  // of each chain: one for each thermostat, or one
  bool thermostats;
  bool partial;  // the sums are one rank's: the thermostats wait for the others'
  bool live_rates;
  bool stochastic;
  // GroupArguments of all groups, then the addresses of the entries' gradients
  alignas(8) unsigned char arena[kArenaBytes];
};

static_assert(sizeof(StepArguments) <= kMaxArgumentBytes, "kernel parameters");
static_assert(kMaxGroups * sizeof(GroupArguments) + 1000 * sizeof(void*) < kArenaBytes, "room for gradients");

// All tensors of a launch have one format, except where only the prior energy is summed. Chains are owned in
// float32 and float64 only.
struct KernelChoice {
  enum class Work { kChunks, kChains, kPriorOfChunks, kPriorOfChains } work;
  Integrator integrator;
  Format format;
};

// Starts one kernel on a stream of a device; in cuda.cu. Throws std::runtime_error.
void launch(const KernelChoice& choice, uint32_t blocks, int device, uintptr_t stream,
            const StepArguments& arguments);

// Blocks of a step's kernel that are resident on a device at once. Throws std::runtime_error.
uint32_t resident_blocks(int device);

// Why no kernel can run on this machine; "" if one can.
const char* device_problem();

}  // namespace ctld
