// The motion of the parameters: one function per integrator, for any number type with + - *.
// Every operation rounds once, in the order written; nothing may be contracted to fused multiply-adds.
#pragma once

#include "lane.h"

CTLD_NAMESPACE_BEGIN

enum class Integrator { kBaoab = 0, kEuler = 1, kMomentumSgd = 2 };

// What the weight decay of a group asks for: nothing, a term in the gradient, or also its energy.
enum class Decay { kNone = 0, kGradient = 1, kGradientAndEnergy = 2 };

// Scalars of one parameter group for one step, and of one chain where temperature enters.
template <class Real>
struct Coefficients {
  Real retain;        // share of p kept before the kick: temperature rescaling, times mu if not baoab
  Real gradient;      // k
  Real drift;         // b
  Real momentum;      // mu, baoab only
  Real noise;         // s = sqrt((1 - mu^2) T)
  Real weight_decay;  // lambda
  Real kinetic;       // quanta per p^2
  Real prior;         // quanta per theta^2
};

template <Integrator integrator, Decay decay, class Real>
CTLD_HD void move(Real& theta, Real& p, Real gradient, Real xi, const Coefficients<Real>& c) {
  if (decay != Decay::kNone) gradient = gradient + c.weight_decay * theta;
  p = c.retain * p - c.gradient * gradient;
  if (integrator == Integrator::kBaoab) {
    theta = theta + c.drift * p;
    p = c.momentum * p + c.noise * xi;
  }
  if (integrator == Integrator::kEuler) p = p + c.noise * xi;
  theta = theta + c.drift * p;
}

CTLD_NAMESPACE_END
