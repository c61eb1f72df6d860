// The tempering coordinate alpha and its bias, in float64 + - * / only (the one root is of a float32).
// Mirrors ctld_cuda/reference.py function by function.
#pragma once

#include "fixed_point.h"

CTLD_NAMESPACE_BEGIN

enum class Coupling : int32_t { kFull = 0, kAdaptive = 1, kStandardized = 2 };

constexpr int64_t kNonfiniteEnergy = 1;
constexpr int64_t kNonfiniteParameter = 2;
constexpr int64_t kKineticSaturated = 4;
constexpr int64_t kPriorSaturated = 8;
constexpr int64_t kEnergyOutOfRange = 16;
constexpr int64_t kInvalidRate = 32;
constexpr int64_t kFrictionSaturated = 64;

struct TemperingConstants {
  double base_temperature, energy_scale, scale_range, flat, limit, inverse_ramp, inverse_bin_width;
  double step_size, persistence, noise_variance, noise_scale, energy_noise, coupling_strength;
  double hill_height, hill_gain;
  int32_t bins, kinetic_exponent, prior_exponent, energy_exponent;
  Coupling coupling;
  // derived from these by derive()
  double inverse_period;                 // 1 / (2 limit), for the reflections
  double largest_energy;                 // beyond which the sums of all chains might overflow
  double prior_quantum;                  // nats per quantum of prior energy
  double energy_quantum, energy_quanta;  // nats per quantum of the bins' energies, and its inverse
};

// The tables as all chains of a step read them.
struct Bias {
  int64_t samples;
  const int64_t* visits;
  const double* energy_mean;
  const double* energy_spread;
  const double* hills;
};

CTLD_HD double power_of_two(int32_t exponent) {
  return bit_cast<double>(static_cast<uint64_t>(exponent + 1023) << 52);
}

inline void derive(TemperingConstants& c, int64_t chains) {
  c.inverse_period = 0.5 / c.limit;
  c.largest_energy = 0x1p+62 / static_cast<double>(chains) * power_of_two(-c.energy_exponent);
  c.prior_quantum = power_of_two(-c.prior_exponent);
  c.energy_quantum = power_of_two(-c.energy_exponent);
  c.energy_quanta = power_of_two(c.energy_exponent);
}

CTLD_HD double absolute(double x) { return x < 0.0 ? -x : x; }
CTLD_HD double sign_of(double alpha) { return alpha < 0.0 ? -1.0 : 1.0; }
CTLD_HD double unit_clamp(double x) { return x < 0.0 ? 0.0 : (x > 1.0 ? 1.0 : x); }

// ------------------------------------------------------------ temperature as a function of alpha

CTLD_HD double ramp(double alpha, const TemperingConstants& c) {
  return unit_clamp((absolute(alpha) - c.flat) * c.inverse_ramp);
}

CTLD_HD double temper_scale(double alpha, const TemperingConstants& c) {
  const double z = ramp(alpha, c);
  return c.scale_range * (z * z * (3.0 - 2.0 * z)) + 1.0;
}

CTLD_HD double beta_slope(double alpha, const TemperingConstants& c) {
  const double z = ramp(alpha, c);
  const double q = temper_scale(alpha, c);
  const double q_slope = c.scale_range * (6.0 * z * (1.0 - z)) * c.inverse_ramp;
  return sign_of(alpha) * -(2.0 * q_slope / (q * q * q));
}

// ------------------------------------------------------------------------------------- the force

CTLD_HD int32_t bin_of(double alpha, const TemperingConstants& c) {
  const int32_t bin = static_cast<int32_t>(absolute(alpha) * c.inverse_bin_width);
  return bin >= c.bins ? c.bins - 1 : bin;
}

// left node and weight of a piecewise-linear table with `size` entries at 0, 1, 2, ...
struct Segment {
  int32_t left;
  double weight;
};

CTLD_HD Segment segment_of(double position, int32_t size) {
  const double last = static_cast<double>(size - 2);
  double left = floor(position);
  left = left < 0.0 ? 0.0 : (left > last ? last : left);
  return {static_cast<int32_t>(left), unit_clamp(position - left)};
}

CTLD_HD double mean_energy(double alpha, const Bias& bias, const TemperingConstants& c) {
  const Segment s = segment_of(absolute(alpha) * c.inverse_bin_width - 0.5, c.bins);
  const double* mean = bias.energy_mean + s.left;
  return mean[0] + s.weight * (mean[1] - mean[0]);
}

CTLD_HD double hill_slope(double alpha, const Bias& bias, const TemperingConstants& c) {
  const double position = absolute(alpha) * c.inverse_bin_width;
  if (position < 0.5 || position > c.bins - 0.5) return sign_of(alpha) * 0.0;
  const Segment s = segment_of(position - 1.0, c.bins - 1);
  const double* hills = bias.hills + s.left;
  const double left = (hills[1] - hills[0]) * c.inverse_bin_width;
  const double right = (hills[2] - hills[1]) * c.inverse_bin_width;
  return sign_of(alpha) * (left + s.weight * (right - left));
}

CTLD_HD double standardized_deviation(double alpha, double energy, const Bias& bias,
                                      const TemperingConstants& c) {
  const int32_t bin = bin_of(alpha, c);
  const double sigma = bias.energy_spread[bin] * 0x1.40d931ff62705p+0;  // sqrt(pi/2)
  if (!(sigma > 0.0)) return 0.0;
  const double z = (energy - bias.energy_mean[bin]) / sigma;
  return z < -3.0 ? -3.0 : (z > 3.0 ? 3.0 : z);
}

CTLD_HD double coupled_energy(double alpha, double energy, const Bias& bias, const TemperingConstants& c) {
  if (c.coupling == Coupling::kFull) return energy;
  if (bias.samples == 0) return 0.0;
  if (c.coupling == Coupling::kStandardized)
    return c.coupling_strength * standardized_deviation(alpha, energy, bias, c);
  return energy - mean_energy(alpha, bias, c);
}

CTLD_HD double alpha_force(double alpha, double energy, const Bias& bias, const TemperingConstants& c) {
  const double pull = beta_slope(alpha, c) * coupled_energy(alpha, energy, bias, c);
  return -pull - hill_slope(alpha, bias, c);
}

// ---------------------------------------------------------------------------------- motion of alpha

CTLD_HD void reflect(double& alpha, double& r, const TemperingConstants& c) {
  if (absolute(alpha) <= c.limit) return;
  double x = alpha + c.limit;
  const double bounces = floor(x * c.inverse_period);
  x = x - 2.0 * c.limit * bounces;
  const bool odd = bounces - 2.0 * floor(0.5 * bounces) != 0.0;
  const double folded = (odd ? 2.0 * c.limit - x : x) - c.limit;
  alpha = folded > c.limit ? c.limit : (folded < -c.limit ? -c.limit : folded);
  if (odd) r = -r;
}

CTLD_HD double alpha_noise_scale(double alpha, const TemperingConstants& c) {
  if (c.energy_noise == 0.0) return c.noise_scale;
  const double heat = c.step_size * beta_slope(alpha, c) * c.energy_noise;
  const float variance = static_cast<float>(c.noise_variance - heat * heat);
  return static_cast<double>(sqrtf(variance > 0.0f ? variance : 0.0f));
}

CTLD_HD void move_alpha(double& alpha, double& r, double energy, double xi, const Bias& bias,
                        const TemperingConstants& c) {
  const double half = 0.5 * c.step_size;
  r = r + half * alpha_force(alpha, energy, bias, c);
  alpha = alpha + half * r;
  reflect(alpha, r, c);
  r = c.persistence * r + alpha_noise_scale(alpha, c) * xi;
  alpha = alpha + half * r;
  reflect(alpha, r, c);
  r = r + half * alpha_force(alpha, energy, bias, c);
}

// ------------------------------------------------------------------------------- one step of one chain

// What a chain adds to the bias: the bin it is in, and sums for it in quanta.
struct Visit {
  bool usable;
  int32_t bin;
  int64_t energy, deviation, r_square;
};

struct ChainStep {
  double alpha, r;        // after the move
  double scale, rescale;  // q(alpha), and q_new/q_old for the momenta
  int64_t flags;
  Visit visit;
};

CTLD_HD double loss_energy(double loss, const TemperingConstants& c) { return c.energy_scale * loss; }

CTLD_HD double potential_energy(double loss, int64_t prior, const TemperingConstants& c) {
  return loss_energy(loss, c) + static_cast<double>(prior) * c.prior_quantum;
}

CTLD_HD ChainStep temper_chain(double alpha, double r, double loss, int64_t prior, double xi,
                               const Bias& bias, const TemperingConstants& c) {
  const double energy = potential_energy(loss, prior, c);
  const bool finite = is_finite(energy);
  ChainStep step;
  step.alpha = alpha;
  step.r = r;
  bool usable = finite && absolute(energy) < c.largest_energy;
  if (usable) {
    move_alpha(step.alpha, step.r, energy, xi, bias, c);
    usable = is_finite(step.alpha) && is_finite(step.r);
  }
  if (!usable) {
    step.alpha = alpha;
    step.r = r;
  }
  step.scale = temper_scale(step.alpha, c);
  step.rescale = step.scale / temper_scale(alpha, c);
  step.flags = (finite ? 0 : kNonfiniteEnergy) | (finite && !usable ? kEnergyOutOfRange : 0);
  step.visit = {usable, bin_of(step.alpha, c), 0, 0, 0};
  if (usable) {
    const int32_t bin = step.visit.bin;
    double deviation = bias.visits[bin] > 0 ? absolute(energy - bias.energy_mean[bin]) : 0.0;
    deviation = deviation < c.largest_energy ? deviation : c.largest_energy;
    step.visit.energy = static_cast<int64_t>(energy * c.energy_quanta);
    step.visit.deviation = static_cast<int64_t>(deviation * c.energy_quanta);
    step.visit.r_square = quanta(step.r * step.r * 0x1p+20);
  }
  return step;
}

// Even after the window, odd after the hottest bin.
CTLD_HD int64_t turns_after(int64_t turns, double alpha, const TemperingConstants& c) {
  const bool arrived = turns % 2 == 0 ? bin_of(alpha, c) == c.bins - 1 : absolute(alpha) <= c.flat;
  return turns + (arrived ? 1 : 0);
}

// ------------------------------------------------------------------------------------ learning the bias

// Sums over all chains of one step, zero at its start.
struct BinSums {
  int64_t* count;
  int64_t* energy;
  int64_t* deviation;
  int64_t* r_square;  // one number for all bins
  int64_t* samples;   // likewise
};

// `sums` points to bin_sums_length(bins) numbers.
CTLD_HD int32_t bin_sums_length(int32_t bins) { return 3 * bins + 2; }
CTLD_HD BinSums bin_sums(int64_t* sums, int32_t bins) {
  return {sums, sums + bins, sums + 2 * bins, sums + 3 * bins, sums + 3 * bins + 1};
}

struct Tables {
  int64_t* samples;
  int64_t* visits;
  double* energy_mean;
  double* energy_spread;
  double* hills;
  double* alpha_kinetic;
};

CTLD_HD void learn_mean(int32_t bin, const BinSums& sums, const Tables& t, const TemperingConstants& c) {
  const int64_t count = sums.count[bin];
  if (count == 0) return;
  const bool seen_before = t.visits[bin] > 0;
  const double n = static_cast<double>(count);
  t.visits[bin] += count;
  double weight = n / static_cast<double>(t.visits[bin]);
  if (c.coupling == Coupling::kStandardized) {
    double forget = 0.02 * n;
    forget = forget < 1.0 ? forget : 1.0;
    weight = weight > forget ? weight : forget;
  }
  const double mean = static_cast<double>(sums.energy[bin]) * c.energy_quantum / n;
  const double spread = static_cast<double>(sums.deviation[bin]) * c.energy_quantum / n;
  const double old_mean = t.energy_mean[bin], old_spread = t.energy_spread[bin];
  t.energy_mean[bin] = seen_before ? old_mean + weight * (mean - old_mean) : mean;
  t.energy_spread[bin] = seen_before ? old_spread + weight * (spread - old_spread) : 0.0;
}

// Hills of shape (1/2, 1, 1/2), mirrored at 0 and limit; `t` counts steps from 1.
CTLD_HD void deposit_hill(int32_t bin, const int64_t* count, double t, int64_t chains, double* hills,
                          const TemperingConstants& c) {
  double weight = c.hill_gain * static_cast<double>(c.bins) / t;
  weight = weight < c.hill_height ? weight : c.hill_height;
  const double per_chain = static_cast<double>(chains);
  const int32_t left = bin > 0 ? bin - 1 : bin, right = bin + 1 < c.bins ? bin + 1 : bin;
  const double below = weight * static_cast<double>(count[left]) / per_chain;
  const double here = weight * static_cast<double>(count[bin]) / per_chain;
  const double above = weight * static_cast<double>(count[right]) / per_chain;
  hills[bin] = hills[bin] + (here + (0.5 * below + 0.5 * above));
}

// Learning has three parts: learn_bin for every bin; after all of those fill_bin for every bin;
// learn_alpha_kinetic once, at any time. Within a part the bins are independent.
CTLD_HD void learn_bin(int32_t bin, const BinSums& sums, double t, int64_t chains, const Tables& tables,
                       const TemperingConstants& c) {
  learn_mean(bin, sums, tables, c);
  if (c.hill_height > 0.0) deposit_hill(bin, sums.count, t, chains, tables.hills, c);
}

// An unvisited bin copies the nearest visited one, the lower on ties.
CTLD_HD void fill_bin(int32_t bin, const Tables& t, int32_t bins) {
  if (t.visits[bin] > 0) return;
  for (int32_t distance = 1; distance < bins; ++distance) {
    const int32_t below = bin - distance, above = bin + distance;
    const bool found_below = below >= 0 && t.visits[below] > 0;
    if (!found_below && !(above < bins && t.visits[above] > 0)) continue;
    const int32_t source = found_below ? below : above;
    t.energy_mean[bin] = t.energy_mean[source];
    t.energy_spread[bin] = t.energy_spread[source];
    return;
  }
}

CTLD_HD void learn_alpha_kinetic(const BinSums& sums, const Tables& tables) {
  const int64_t fresh = *sums.samples;
  *tables.samples += fresh;
  const double surplus =
      static_cast<double>(*sums.r_square) * 0x1p-20 - static_cast<double>(fresh) * *tables.alpha_kinetic;
  const int64_t samples = *tables.samples;
  *tables.alpha_kinetic = *tables.alpha_kinetic + surplus / static_cast<double>(samples > 0 ? samples : 1);
}

// ------------------------------------------------------------------------------------------ history

// The columns of a chain's entry in a row.
constexpr int32_t kAlphaColumn = 0, kTemperatureColumn = 1, kEnergyColumn = 2, kKineticColumn = 3;
constexpr int32_t kColumns = 4;

CTLD_HD double unknown() { return bit_cast<double>(static_cast<uint64_t>(0x7FF8000000000000)); }

// The row that is written next; `recorded` as in ctld_cuda/state.py.
CTLD_HD int64_t next_row(int64_t recorded, int64_t rows) {
  return recorded < rows ? recorded : recorded - rows;
}

CTLD_HD int64_t recorded_after(int64_t recorded, int64_t rows) {
  return recorded + 1 < 2 * rows ? recorded + 1 : rows;
}

CTLD_NAMESPACE_END
