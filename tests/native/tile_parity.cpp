// Compares the float32 tile of one instruction set (-DCTLD_ISA=...) with a plain loop over csrc/core, bit for
// bit, at sizes around the vector blocks and with values that are not finite. Exit status: mismatches.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "core/fixed_point.h"
#include "core/tempering.h"
#include "cpu_tile.h"

#define CTLD_CONCATENATE_(a, b) a##b
#define CTLD_CONCATENATE(a, b) CTLD_CONCATENATE_(a, b)

namespace ctld {
const TileKernels* CTLD_CONCATENATE(tile_kernels_, TESTED)();
}

using namespace ctld;

namespace {

struct Arrays {
  std::vector<float> theta, p, gradient;
};

Arrays make(int64_t n, bool trouble) {
  Arrays a{std::vector<float>(n), std::vector<float>(n), std::vector<float>(n)};
  for (int64_t i = 0; i < n; ++i) {
    a.theta[i] = std::sin(0.7f * i);
    a.p[i] = std::cos(1.3f * i);
    a.gradient[i] = std::sin(0.1f * i);
  }
  if (trouble) {
    a.gradient[n / 7] = NAN;
    a.gradient[n / 2] = -INFINITY;
    a.gradient[n - 1] = 1e30f;
  }
  return a;
}

int different(const std::vector<float>& a, const std::vector<float>& b) {
  int count = 0;
  for (std::size_t i = 0; i < a.size(); ++i)
    count += std::memcmp(&a[i], &b[i], sizeof(float)) != 0 && !(std::isnan(a[i]) && std::isnan(b[i]));
  return count;
}

int compare(int64_t n, int64_t first, bool trouble) {
  const RoundKeys keys = round_keys(0x123456789ABCDEFull);
  const double scale = 1.3, rescale = 0.9, momentum = 0.8;  // less than the group's: a thermostat's
  const GroupCoefficients group = {0.9, 0.01, 0.001, 0.43, 0.05, 131072.0, 100.0};
  int64_t kinetic = 0, prior = 0, flags = 0;
  Arrays tiled = make(n, trouble), plain = tiled;

  Tile tile;
  tile.theta = tiled.theta.data();
  tile.p = tiled.p.data();
  tile.gradient = tiled.gradient.data();
  tile.first = first;
  tile.count = n;
  tile.counter = make_counter(5, kParameterNoise, 1);
  tile.rounding = make_counter(5, kRounding, 1);
  tile.stochastic = false;
  tile.unscale = 1.0;
  tile.keys = &keys;
  tile.group = &group;
  tile.chain_length = first + n;
  tile.scale = &scale;
  tile.rescale = &rescale;
  tile.momentum = &momentum;
  tile.kinetic = &kinetic;
  tile.kinetic_stride = 1;
  tile.prior = &prior;
  tile.flags = &flags;
  const auto decay = static_cast<int>(Decay::kGradientAndEnergy);
  CTLD_CONCATENATE(tile_kernels_, TESTED)()->step[0][decay][0](tile);

  const Coefficients<float> c = {static_cast<float>(rescale),
                                 static_cast<float>(group.gradient * (0.5 * (rescale + 1.0))),
                                 static_cast<float>(group.drift),
                                 static_cast<float>(momentum),
                                 static_cast<float>(group.noise * scale),
                                 static_cast<float>(group.weight_decay),
                                 static_cast<float>(group.kinetic),
                                 static_cast<float>(group.prior)};
  int64_t plain_kinetic = 0, plain_prior = 0;
  for (int64_t i = 0; i < n; ++i) {
    float xi[4];
    normal_group(static_cast<uint32_t>((first + i) >> 2), tile.counter, keys, xi);
    const float g = decayed_gradient<float>(plain.gradient[i], plain.theta[i], c);
    move<Integrator::kBaoab, float>(plain.theta[i], plain.p[i], g, xi[(first + i) & 3], c);
    plain_kinetic += quanta(plain.p[i] * plain.p[i] * c.kinetic);
    plain_prior += quanta(plain.theta[i] * plain.theta[i] * c.prior);
  }
  const int64_t expected_flags = trouble ? kNonfiniteParameter | kKineticSaturated | kPriorSaturated : 0;
  const int bad = different(tiled.theta, plain.theta) + different(tiled.p, plain.p) +
                  (kinetic != plain_kinetic) + (prior != plain_prior) + (flags != expected_flags);
  if (bad) std::printf("n %lld first %lld: %d mismatches\n", (long long)n, (long long)first, bad);
  return bad;
}

}  // namespace

int main() {
  int bad = 0;
  for (const int64_t n : {1, 3, 4, 5, 63, 64, 65, 200, 1023, 1024, 1025, 5000, 8192})
    for (const int64_t first : {0, 1, 4, 8191})
      for (const bool trouble : {false, true}) bad += compare(n, first, trouble && n >= 64);
  return bad > 100 ? 100 : bad;
}
