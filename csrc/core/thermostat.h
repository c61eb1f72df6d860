// Nose-Hoover thermostats that absorb the noise of gradients, in float64 + - * / and one square root.
// Mirrors ctld_cuda/reference.py function by function.
#pragma once

#include "fixed_point.h"
#include "langevin.h"
#include "tempering.h"

CTLD_NAMESPACE_BEGIN

constexpr double kThermostatRate = 0.5, kThermostatElements = 32.0, kThermostatTrust = 20.0;
constexpr double kLowestFriction = -0.5, kHighestFriction = 4.0;

// `relative_temperature`: T/T0
CTLD_HD double damped_momentum(double momentum, double friction, double relative_temperature) {
  return momentum / (friction / relative_temperature + 1.0);
}

CTLD_HD double balanced_kinetic(double momentum, double damped, bool baoab) {
  if (!baoab) return (1.0 + momentum) / (damped + 1.0);
  const double injected = (1.0 - momentum * momentum) / (1.0 - damped * damped);
  const double share = 2.0 * damped / (damped + 1.0);
  return injected + (1.0 - injected) * (share * share);
}

struct Friction {
  double value;
  int64_t flags;
};

// The friction of one chain and group, after a step at `temperature` that left `kinetic` quanta in `elements`
// elements.
CTLD_HD Friction adapt_friction(double friction, int64_t kinetic, double temperature, double elements,
                                double momentum, bool baoab, const TemperingConstants& c) {
  const double relative = temperature / c.base_temperature;
  const double mean_square =
      static_cast<double>(kinetic) * (2.0 * power_of_two(-c.kinetic_exponent) / elements);
  const double damped = damped_momentum(momentum, friction, relative);
  double heat = mean_square / temperature - balanced_kinetic(momentum, damped, baoab);
  const double bound = 1.0 + kThermostatTrust * sqrt(2.0 / elements);
  heat = heat > bound ? bound : (heat < -bound ? -bound : heat);
  const double believed = elements < kThermostatElements ? elements / kThermostatElements : 1.0;
  const double rate = kThermostatRate * believed * (1.0 - momentum) * (1.0 - momentum);
  const double moved = friction + rate * heat / relative;
  const double lowest = kLowestFriction * (1.0 - momentum);
  const bool saturated = moved > kHighestFriction;
  return {saturated ? kHighestFriction : (moved < lowest ? lowest : moved),
          saturated ? kFrictionSaturated : 0};
}

CTLD_NAMESPACE_END
