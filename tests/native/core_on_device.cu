// Compiled only: every function of csrc/core is callable from a CUDA kernel.
#include "core/chunks.h"
#include "core/fixed_point.h"
#include "core/langevin.h"
#include "core/normal.h"
#include "core/storage.h"
#include "core/tempering.h"

using namespace ctld;

__global__ void step(float* theta, float* p, const float* gradient, Float16* half, BFloat16* brain,
                     const Coefficients<float> c, const RoundKeys keys, const Counter counter,
                     int64_t* sums) {
  const uint32_t i = threadIdx.x;
  float xi[4];
  normal_group(i, counter, keys, xi);
  move<Integrator::kBaoab, Decay::kGradientAndEnergy, float>(theta[i], p[i], gradient[i], xi[0], c);
  move<Integrator::kEuler, Decay::kNone, float>(theta[i], p[i], gradient[i], xi[1], c);
  store(half[i], load(half[i]) + load(brain[i]));
  store(brain[i], theta[i]);
  sums[i] = quanta(p[i] * p[i] * c.kinetic) + is_finite(theta[i]);
}

__global__ void temper(double* alpha, double* r, const double* loss, const int64_t* prior, const Bias bias,
                       const TemperingConstants c, const BinSums sums, const Tables tables,
                       const uint32_t* first_chunk) {
  const ChainStep step = temper_chain(*alpha, *r, *loss, *prior, 0.5, bias, c, 1);
  *alpha = step.alpha;
  *r = step.r;
  sums.count[find_tensor(first_chunk, 3, threadIdx.x)] = step.flags;
  learn_bias(sums, 1.0, 1, tables, c);
}
