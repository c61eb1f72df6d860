"""Derived quantities: free energies and the checks that warn about a run."""

from __future__ import annotations

import math

import torch

from .reference import temper_scale
from .state import FLAG_MEANINGS, State
from .tempering import ADAPTIVE, STANDARDIZED, TemperingConstants

Tensor = torch.Tensor


def bin_centers(state: State, c: TemperingConstants) -> Tensor:
    """Centres of the bins of |alpha|, float64 (B,)."""
    return torch.from_numpy(c.bin_centers()).to(state.alpha.device)


def energy_bias(state: State, c: TemperingConstants) -> Tensor:
    """-ln Z(beta)/Z(1) = integral of the mean energy over beta, at the bin centres, float64 (B,).

    Trapezoids in ln beta of beta * mean energy, which is constant for a harmonic target.
    """
    log_beta = -2.0 * temper_scale(bin_centers(state, c), c).log()
    integrand = log_beta.exp() * state.energy_mean
    pieces = 0.5 * (integrand[1:] + integrand[:-1]) * (log_beta[1:] - log_beta[:-1])
    return (integrand * log_beta)[0] + torch.cat((torch.zeros_like(pieces[:1]), pieces.cumsum(0)))


def total_bias(state: State, c: TemperingConstants) -> Tensor:
    """V at the bin centres, up to a constant: minus the free energy already learned, plus the hills.

    AdaptiveForce makes V_energy' = -beta' * mean energy, whose integral is -:func:`energy_bias`.
    """
    if c.coupling == ADAPTIVE:
        return state.hills - energy_bias(state, c)
    return state.hills.clone()


def free_energy(state: State, c: TemperingConstants) -> Tensor:
    """ln Z(beta)/Z(1) per bin by thermodynamic integration of the mean energy; NaN if standardized.

    Z(beta) = integral of exp(-beta U) over the parameters. A d-dimensional Gaussian gives -(d/2) ln beta.
    """
    if c.coupling == STANDARDIZED:
        return torch.full_like(state.energy_mean, math.nan)
    return -energy_bias(state, c)


def free_energy_histogram(state: State, c: TemperingConstants) -> Tensor:
    """The same from the bias and the histogram: V(alpha) - V(0) + ln(n(alpha)/n(0)); NaN if standardized."""
    if c.coupling == STANDARDIZED:
        return torch.full_like(state.energy_mean, math.nan)
    bias = total_bias(state, c)
    log_visits = state.visits.double().log()
    return bias - bias[0] + log_visits - log_visits[0]


def flag_report(flags: int) -> list[str]:
    """What the set bits of ``state.flags`` mean, one sentence each."""
    return [meaning for bit, meaning in FLAG_MEANINGS.items() if flags & bit]


def alpha_kinetic_report(state: State, c: TemperingConstants) -> str | None:
    """A warning if the mean of alpha_momentum**2 is outside 1 +- 0.1 by more than four standard errors.

    Successive values are correlated over (1+p^2)/(1-p^2) steps, p the persistence; the variance of a
    squared standard normal is 2.
    """
    samples = int(state.samples)
    if c.bins == 0 or samples == 0:
        return None
    p2 = c.persistence**2
    error = math.sqrt(2.0 * (1 + p2) / (1 - p2) / samples)
    mean = float(state.alpha_kinetic)
    if error > 0.1 or abs(mean - 1.0) <= 0.1 + 4 * error:
        return None
    return (
        f"the mean of alpha_momentum**2 is {mean:.3f} instead of 1: alpha is "
        f"{'heated, most likely by minibatch noise in the energy' if mean > 1 else 'cold'}; use larger "
        "batches, a smaller step_size, energy_noise, or coupling='standardized'"
    )
