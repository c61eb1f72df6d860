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

// Scalars of one group for one step, those that depend on temperature at q(alpha) = 1.
struct GroupCoefficients {
  double momentum, gradient, drift, noise, weight_decay, kinetic, prior;
};

// What a learning rate decides: k and b of the equations in ctld_cuda/reference.py.
struct Rates {
  double gradient, drift;
};

// Mirrors explore_coefficients and finetune_coefficients there, for learning rates that only the device
// knows.
CTLD_HD Rates explore_rates(Integrator integrator, double lr, double momentum, double num_data) {
  const double root_c = sqrt((1.0 + momentum) / 2.0);
  const double kick = sqrt(num_data * lr), glide = sqrt(lr / num_data);
  if (integrator == Integrator::kBaoab) return {kick / root_c, 0.5 * (glide / root_c)};
  return {root_c * kick, glide / root_c};
}

// c sqrt(N h) at the last positive learning rate `last` of the sampling phase; any other serves where there
// was none.
CTLD_HD double momentum_unit(double last, double lr, double momentum, double num_data) {
  const double reference = last > 0.0 ? last : (lr > 0.0 ? lr : 1.0);
  return sqrt((1.0 + momentum) / 2.0) * sqrt(num_data * reference);
}

CTLD_HD Decay decay_of(const GroupCoefficients& g) {
  if (g.prior != 0.0) return Decay::kGradientAndEnergy;
  return g.weight_decay != 0.0 ? Decay::kGradient : Decay::kNone;
}

// The kick of a step, in units of a whole one, after the temperature has changed by rescale^2: part of it
// belongs before the change. Mirrors whole_kick in ctld_cuda/reference.py.
template <Integrator integrator>
CTLD_HD double whole_kick(double momentum, double rescale) {
  if (integrator == Integrator::kBaoab) return 0.5 * (rescale + 1.0);
  if (integrator == Integrator::kEuler) return momentum * (rescale - 1.0) / (momentum + 1.0) + 1.0;
  return 1.0;
}

// At temperature T0 scale^2, with momenta to be multiplied by `rescale` and the friction of `momentum`, which
// is the group's own without a thermostat; each number rounded once.
template <Integrator integrator, class Real>
CTLD_HD Coefficients<Real> coefficients_at(const GroupCoefficients& g, double momentum, Rates rates,
                                           double scale, double rescale) {
  const double retain = integrator == Integrator::kBaoab ? rescale : momentum * rescale;
  const double gradient = rates.gradient * whole_kick<integrator>(momentum, rescale);
  return {static_cast<Real>(retain),    static_cast<Real>(gradient),        static_cast<Real>(rates.drift),
          static_cast<Real>(momentum),  static_cast<Real>(g.noise * scale), static_cast<Real>(g.weight_decay),
          static_cast<Real>(g.kinetic), static_cast<Real>(g.prior)};
}

// Quanta of p^2/2 before truncation. Without noise the kinetic coefficient is 0: the product then only tells
// finite from not.
template <Integrator integrator, class Real>
CTLD_HD Real kinetic_argument(Real p, Real kinetic) {
  return integrator == Integrator::kMomentumSgd ? p * kinetic : p * p * kinetic;
}

template <class Real>
CTLD_HD Real decayed_gradient(Real gradient, Real theta, const Coefficients<Real>& c) {
  return gradient + c.weight_decay * theta;
}

template <Integrator integrator, class Real>
CTLD_HD void move(Real& theta, Real& p, Real gradient, Real xi, const Coefficients<Real>& c) {
  p = c.retain * p - c.gradient * gradient;
  if (integrator == Integrator::kBaoab) {
    theta = theta + c.drift * p;
    p = c.momentum * p + c.noise * xi;
  }
  if (integrator == Integrator::kEuler) p = p + c.noise * xi;
  theta = theta + c.drift * p;
}

CTLD_NAMESPACE_END
