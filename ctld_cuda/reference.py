"""Continuously tempered Langevin dynamics in plain torch: the specification.

One short function per equation, on any device. Every compiled backend must reproduce the bits of this
file, so the order of the operations below is part of the method's definition: each line is one rounding
per operation, nothing is fused, and operations whose rounding differs between devices (tensor square
roots in float32, division by a scalar, ``alpha=``, floating-point sums) are avoided.

Symbols: theta parameters, p momenta, g the gradient of the mean minibatch loss, N the number of
training examples, h the learning rate, mu the momentum coefficient, lambda the weight decay, T0 the base
temperature, alpha and r the tempering coordinate and its momentum, q(alpha) = sqrt(T/T0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .layout import FlatTensor
from .state import (
    ENERGY_OUT_OF_RANGE,
    FRICTION_SATURATED,
    KINETIC_SATURATED,
    NONFINITE_ENERGY,
    NONFINITE_PARAMETER,
    PRIOR_SATURATED,
    State,
)
from .tempering import FULL, STANDARDIZED, TemperingConstants

Tensor = torch.Tensor
Device = torch.device | str | None

STREAM_PARAMETERS, STREAM_ROUNDING, STREAM_ALPHA = 0, 1, 2

_WORD = 0xFFFFFFFF
_SIGN = -(2**31)

# ---------------------------------------------------------------------------------------------- noise


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011), the counter-based generator behind all noise.

    Args:
        counter: int64 tensor of 32-bit words, shape (..., 4).
        key: int64 tensor of 32-bit words, shape (2,).

    Returns:
        int64 tensor of 32-bit words, shape (..., 4).
    """
    c0, c1, c2, c3 = (word.contiguous() for word in counter.unbind(-1))
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & _WORD) ^ c1 ^ k0, b & _WORD, ((a >> 32) & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return torch.stack((c0, c1, c2, c3), -1)


def random_words(
    seed: int, step: int | Tensor, stream: int, index: int, numel: int, device: Device = None, first: int = 0
) -> Tensor:
    """The four random words of each noise group that has some of the elements, int64 (groups, 4).

    Element e belongs to group e // 4; the elements are ``first`` ... first + numel - 1. Key: low and high
    word of the 64-bit seed. Counter: (group, parameter index, low word of the step, stream << 24 | bits
    32..55 of the step).
    """
    group = torch.arange(first // 4, (first + numel + 3) // 4, dtype=torch.int64, device=device)
    fixed = (index, step & _WORD, stream << 24 | (step >> 32 & 0xFFFFFF))
    words = (torch.as_tensor(word, dtype=torch.int64, device=device).expand_as(group) for word in fixed)
    counter = torch.stack([group, *words], -1)
    key = torch.tensor([seed & _WORD, seed >> 32 & _WORD], dtype=torch.int64, device=device)
    return philox4x32(counter, key)


def _signed(word: Tensor) -> Tensor:
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def _horner(x: Tensor, coefficients: Sequence[str]) -> Tensor:
    total = torch.full_like(x, float.fromhex(coefficients[0]))
    for c in coefficients[1:]:
        total = total * x + float.fromhex(c)
    return total


def square_root(x: Tensor) -> Tensor:
    """IEEE square root of a float32 tensor; float32 ``torch.sqrt`` is an ulp off at times."""
    return x.double().sqrt().float()


# minimax fits in float32: -2 ln(1+f)/f on [sqrt(1/2)-1, sqrt(2)-1], sin(pi h)/h and cos(pi h) in z = h^2
_LOG = (
    "-0x1.e743acp-3",
    "0x1.7e5150p-2",
    "-0x1.a3c3ccp-2",
    "0x1.fe26ccp-2",
    "-0x1.5523fcp-1",
    "0x1.000176p+0",
    "-0x1.000010p+1",
)
_SIN = ("-0x1.1de616p-1", "0x1.4594d8p+1", "-0x1.4ab628p+2", "0x1.921f9cp+1")
_COS = ("0x1.c1f066p-3", "-0x1.54f61ap+0", "0x1.03bd06p+2", "-0x1.3bd3a6p+2", "0x1.fffffep-1")
_MINUS_2_LN2_PER_EXPONENT_BIT = float.fromhex("-0x1.62e430p-23")
_JUST_ABOVE_ONE = 1.0 + 2.0**-23
_SQRT_HALF_OF_2_31 = 0x3F3504F3 + (31 << 23)


def minus_two_log(magnitude: Tensor) -> Tensor:
    """-2 ln u for u = magnitude * 2**-31 * (1 - 2**-23), magnitude float32 in (0, 2**31].

    ``magnitude`` = 2**(31+e) * m with m in [sqrt(1/2), sqrt(2)). The last factor of u, too small to
    matter, keeps u below 1, so the radius is never 0 and a root without special cases is exact.
    """
    bits = _bits(magnitude)
    exponent = (bits - _SQRT_HALF_OF_2_31) & -(2**23)
    mantissa = (bits - exponent - (31 << 23)).view(torch.float32)
    f = mantissa - _JUST_ABOVE_ONE
    return _horner(f, _LOG) * f + exponent.to(torch.float32) * _MINUS_2_LN2_PER_EXPONENT_BIT


def box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals from two 32-bit words, float32.

    The first word, as a signed integer x, gives the radius sqrt(-2 ln((|x| + 1/2) 2**-31)) and the sign;
    the second, as a signed fraction h of a half turn, the angle pi h in [-pi/2, pi/2]. With the sign the
    angle covers the whole circle. Magnitudes reach 6.66.
    """
    x = _signed(radius_word).to(torch.float32)
    radius = square_root(minus_two_log(x.abs() + 0.5))
    radius = (_bits(radius) | (_bits(x) & _SIGN)).view(torch.float32)
    h = _signed(angle_word).to(torch.float32) * 2.0**-32
    z = h * h
    return radius * _horner(z, _COS), radius * h * _horner(z, _SIN)


def normal(
    seed: int, step: int | Tensor, stream: int, index: int, numel: int, device: Device = None, first: int = 0
) -> Tensor:
    """The noise of parameter ``index`` at ``step``: standard normals, float32 (numel,).

    Args:
        seed: 64-bit seed.
        step: number of steps done before this one; a tensor is not read by the host.
        stream: 0 parameter noise, 1 stochastic rounding, 2 alpha noise (index 0, element = chain).
        index: position of the parameter over all groups at construction.
        numel: number of elements; element e is the (e mod 4)th normal of noise group e // 4.
        device: where to make them; None: the default device.
        first: index of the first element, which is not 0 for a rank's shard.
    """
    words = random_words(seed, step, stream, index, numel, device, first)
    pair = box_muller(words[:, 0], words[:, 1])
    next_pair = box_muller(words[:, 2], words[:, 3])
    return _of_elements(torch.stack((*pair, *next_pair), -1), first, numel)


def _of_elements(groups: Tensor, first: int, numel: int) -> Tensor:
    """Elements ``first`` ... first + numel - 1, given whole noise groups, (groups, 4)."""
    return groups.reshape(-1)[first % 4 : first % 4 + numel]


# ------------------------------------------------------------------------------------- fixed-point sums


def quanta(energy: Tensor) -> Tensor:
    """Energies already scaled by 2**s as integers: truncated, at most 2**29 (also for NaN), int64."""
    return torch.where(energy < 2.0**29, energy, 2.0**29).to(torch.int64)


def half_square_quanta(x: Tensor, scale: Tensor, chains: int) -> tuple[Tensor, Tensor]:
    """Per-chain sums of quanta(x*x*scale), int64 (chains,), and whether any finite x saturated."""
    each = quanta(x * x * scale)
    saturated = ((each == 2**29) & torch.isfinite(x)).any()
    return each.view(chains, -1).sum(1), saturated


# --------------------------------------------------------------------- temperature as function of alpha


def temper_scale(alpha: Tensor, c: TemperingConstants) -> Tensor:
    """q(alpha) = sqrt(T/T0) = 1 + (sqrt(Tmax/T0) - 1) (3z^2 - 2z^3)."""
    z = _ramp(alpha, c)
    return c.scale_range * (z * z * (3.0 - 2.0 * z)) + 1.0


def beta_slope(alpha: Tensor, c: TemperingConstants) -> Tensor:
    """beta'(alpha) of beta = q**-2: -2 q'/q**3."""
    z = _ramp(alpha, c)
    q = temper_scale(alpha, c)
    q_slope = c.scale_range * (6.0 * z * (1.0 - z)) * c.inverse_ramp
    return _sign(alpha) * -(2.0 * q_slope / (q * q * q))


def _ramp(alpha: Tensor, c: TemperingConstants) -> Tensor:
    z = (alpha.abs() - c.flat) * c.inverse_ramp
    return torch.where(z < 0.0, 0.0, torch.where(z > 1.0, 1.0, z))


def _sign(alpha: Tensor) -> Tensor:
    return torch.where(alpha < 0.0, -1.0, 1.0).to(torch.float64)


# --------------------------------------------------------------------------------------- the bias on alpha


def bin_of(alpha: Tensor, c: TemperingConstants) -> Tensor:
    """Bin of |alpha|, int64."""
    index = (alpha.abs() * c.inverse_bin_width).to(torch.int64)
    return torch.where(index >= c.bins, c.bins - 1, index)


def _interpolate(table: Tensor, position: Tensor) -> Tensor:
    """Linear between the integers, constant beyond both ends."""
    last = table.numel() - 2
    left = position.floor()
    left = torch.where(left < 0.0, 0.0, torch.where(left > last, float(last), left))
    weight = position - left
    weight = torch.where(weight < 0.0, 0.0, torch.where(weight > 1.0, 1.0, weight))
    left = left.to(torch.int64)
    return table[left] + weight * (table[left + 1] - table[left])


def mean_energy(alpha: Tensor, state: State, c: TemperingConstants) -> Tensor:
    """Mean energy at |alpha|: linear between bin centres, constant beyond the end centres."""
    return _interpolate(state.energy_mean, alpha.abs() * c.inverse_bin_width - 0.5)


def hill_slope(alpha: Tensor, state: State, c: TemperingConstants) -> Tensor:
    """V_hills'(alpha): linear between the midpoints of centres, 0 outside the end centres."""
    position = alpha.abs() * c.inverse_bin_width
    slopes = (state.hills[1:] - state.hills[:-1]) * c.inverse_bin_width
    outside = (position < 0.5) | (position > c.bins - 0.5)
    return _sign(alpha) * torch.where(outside, 0.0, _interpolate(slopes, position - 1.0))


def standardized_deviation(alpha: Tensor, energy: Tensor, state: State, c: TemperingConstants) -> Tensor:
    """clip((U - mean)/sigma, +-3) in the bin of |alpha|; 0 where the spread is not known yet.

    sigma is the mean absolute deviation times sqrt(pi/2), the standard deviation of a Gaussian: unlike
    a variance it can be summed in fixed point over any range of energies.
    """
    b = bin_of(alpha, c)
    sigma = state.energy_spread[b] * math.sqrt(math.pi / 2)
    known = sigma > 0.0
    z = (energy - state.energy_mean[b]) / torch.where(known, sigma, 1.0)
    z = torch.where(z < -3.0, -3.0, torch.where(z > 3.0, 3.0, z))
    return torch.where(known, z, 0.0)


def coupled_energy(alpha: Tensor, energy: Tensor, state: State, c: TemperingConstants) -> Tensor:
    """What multiplies -beta' in the force: U, U - mean, or kappa times the standardized deviation."""
    if c.coupling == FULL:
        return energy
    if c.coupling == STANDARDIZED:
        deviation = c.coupling_strength * standardized_deviation(alpha, energy, state, c)
    else:
        deviation = energy - mean_energy(alpha, state, c)
    return torch.where(state.samples > 0, deviation, 0.0)


def alpha_force(alpha: Tensor, energy: Tensor, state: State, c: TemperingConstants) -> Tensor:
    """f = -beta'(alpha) (coupled energy) - V_hills'(alpha)."""
    pull = beta_slope(alpha, c) * coupled_energy(alpha, energy, state, c)
    return -pull - hill_slope(alpha, state, c)


# ------------------------------------------------------------------------------------- motion of alpha


def reflect(alpha: Tensor, r: Tensor, c: TemperingConstants) -> tuple[Tensor, Tensor]:
    """Reflecting walls at +-limit: fold alpha into [-limit, limit], flipping r at every bounce.

    In closed form (alpha + limit has period 4 limit), so that it ends for any distance.
    """
    x = alpha + c.limit
    bounces = (x * (0.5 / c.limit)).floor()
    x = x - 2.0 * c.limit * bounces
    odd = bounces - 2.0 * (0.5 * bounces).floor() != 0.0
    folded = torch.where(odd, 2.0 * c.limit - x, x) - c.limit
    folded = torch.where(folded > c.limit, c.limit, torch.where(folded < -c.limit, -c.limit, folded))
    inside = alpha.abs() <= c.limit
    return torch.where(inside, alpha, folded), torch.where(inside | ~odd, r, -r)


def alpha_noise_scale(alpha: Tensor, c: TemperingConstants) -> Tensor | float:
    """sqrt(1 - persistence^2), less the heat of known minibatch noise in the energy."""
    if c.energy_noise == 0.0:
        return c.noise_scale
    heat = c.step_size * beta_slope(alpha, c) * c.energy_noise
    variance = (c.noise_variance - heat * heat).to(torch.float32)
    return square_root(torch.where(variance > 0.0, variance, 0.0)).double()


def move_alpha(
    alpha: Tensor, r: Tensor, energy: Tensor, xi: Tensor, state: State, c: TemperingConstants
) -> tuple[Tensor, Tensor]:
    """One BAOAB step of (alpha, r) at fixed energy."""
    half = 0.5 * c.step_size
    r = r + half * alpha_force(alpha, energy, state, c)
    alpha, r = reflect(alpha + half * r, r, c)
    r = c.persistence * r + alpha_noise_scale(alpha, c) * xi
    alpha, r = reflect(alpha + half * r, r, c)
    r = r + half * alpha_force(alpha, energy, state, c)
    return alpha, r


def loss_energy(loss: Tensor, c: TemperingConstants) -> Tensor:
    """N L/T0 in nats, float64 (C,)."""
    return c.energy_scale * loss


def potential_energy(loss: Tensor, state: State, c: TemperingConstants) -> Tensor:
    """U = (N L + prior)/T0 in nats, float64 (C,)."""
    return loss_energy(loss, c) + state.prior.double() * 2.0**-c.prior_exponent


# ------------------------------------------------------------------------------------ learning the bias

# energies beyond 2**62 quanta for all chains together would overflow the sums
ENERGY_SUM_LIMIT = 2.0**62
FORGETTING = 0.02


def _signed_quanta(energy: Tensor, c: TemperingConstants) -> Tensor:
    return (energy * 2.0**c.energy_exponent).to(torch.int64)


def _sum_by_bin(values: Tensor, bins: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64, device=values.device).index_add_(0, bins, values)


def nearest_visited(visits: Tensor) -> Tensor:
    """For each bin the nearest visited one, the lower on ties; itself where visited or none is."""
    i = torch.arange(visits.numel(), device=visits.device)
    # distance in halves, so that the bin above loses a tie
    distance = (i[None] - i[:, None]).abs() * 2 + (i[None] > i[:, None])
    distance = torch.where(visits[None] > 0, distance, 4 * visits.numel() + (distance != 0))
    return distance.argmin(1)


def learn_bias(usable: Tensor, energy: Tensor, state: State, c: TemperingConstants) -> None:
    """Adds one step of all chains to histogram, mean energies and hills.

    Mean energies: plain means, or in standardized mode running means that forget (weight at least 0.02
    per visit), because a network in training never stops drifting.
    """
    chains = energy.numel()
    b = bin_of(state.alpha, c)
    one = usable.to(torch.int64)
    energy = torch.where(usable, energy, 0.0)
    seen_before = state.visits > 0
    deviation = torch.where(usable & seen_before[b], (energy - state.energy_mean[b]).abs(), 0.0)
    largest = torch.full_like(deviation, ENERGY_SUM_LIMIT / chains * 2.0**-c.energy_exponent)
    deviation = torch.where(deviation < largest, deviation, largest)

    count = _sum_by_bin(one, b, c.bins)
    quantum = 2.0**-c.energy_exponent
    energy_sum = _sum_by_bin(_signed_quanta(energy, c), b, c.bins).double() * quantum
    deviation_sum = _sum_by_bin(_signed_quanta(deviation, c), b, c.bins).double() * quantum
    r_square_sum = _sum_by_bin(
        torch.where(usable, quanta(state.alpha_momentum * state.alpha_momentum * 2.0**20), 0), b, c.bins
    )

    state.visits += count
    hit = count > 0
    n = torch.where(hit, count, 1).double()
    weight = n / torch.where(hit, state.visits, 1).double()
    if c.coupling == STANDARDIZED:
        forget = FORGETTING * n
        forget = torch.where(forget < 1.0, forget, 1.0)
        weight = torch.where(weight > forget, weight, forget)
    mean = energy_sum / n
    moved = state.energy_mean + weight * (mean - state.energy_mean)
    state.energy_mean.copy_(torch.where(hit, torch.where(seen_before, moved, mean), state.energy_mean))
    spread = state.energy_spread + weight * (deviation_sum / n - state.energy_spread)
    first_spread = torch.where(seen_before, spread, 0.0)
    state.energy_spread.copy_(torch.where(hit, first_spread, state.energy_spread))
    source = nearest_visited(state.visits)
    state.energy_mean.copy_(state.energy_mean[source])
    state.energy_spread.copy_(state.energy_spread[source])

    if c.hill_height > 0.0:
        deposit_hills(count.double(), chains, state, c)

    fresh = count.sum()
    state.samples += fresh
    contribution = r_square_sum.sum().double() * 2.0**-20 - fresh.double() * state.alpha_kinetic
    state.alpha_kinetic += contribution / torch.where(state.samples > 0, state.samples, 1).double()


def deposit_hills(count: Tensor, chains: int, state: State, c: TemperingConstants) -> None:
    """Hills of shape (1/2, 1, 1/2), mirrored at 0 and limit, of total weight min(height, gain bins/t)."""
    t = (state.step + 1).double()
    weight = torch.full_like(t, c.hill_gain * c.bins) / t
    weight = torch.where(weight < c.hill_height, weight, c.hill_height)
    hill = weight * count / torch.full_like(t, float(chains))
    below = torch.cat((hill[:1], hill[:-1]))
    above = torch.cat((hill[1:], hill[-1:]))
    state.hills += hill + (0.5 * below + 0.5 * above)


def temper(loss: Tensor, state: State, c: TemperingConstants, seed: int) -> tuple[Tensor, Tensor]:
    """The alpha block: moves alpha with the energy of the current parameters, then learns the bias.

    A chain whose energy is not finite, or too large to be summed, keeps its alpha and leaves no trace in
    the bias; a flag says so.

    Returns:
        q(alpha) after the move and the factor q_new/q_old for the momenta, float64 (C,).
    """
    chains = loss.numel()
    energy = potential_energy(loss, state, c)
    finite = torch.isfinite(energy)
    usable = finite & (energy.abs() < ENERGY_SUM_LIMIT / chains * 2.0**-c.energy_exponent)
    xi = normal(seed, state.step, STREAM_ALPHA, 0, chains, loss.device).double()
    alpha, r = move_alpha(state.alpha, state.alpha_momentum, torch.where(usable, energy, 0.0), xi, state, c)
    usable = usable & torch.isfinite(alpha) & torch.isfinite(r)
    alpha = torch.where(usable, alpha, state.alpha)
    scale = temper_scale(alpha, c)
    rescale = scale / temper_scale(state.alpha, c)
    state.alpha.copy_(alpha)
    state.alpha_momentum.copy_(torch.where(usable, r, state.alpha_momentum))
    state.temperature.copy_(c.base_temperature * (scale * scale))
    in_window = alpha.abs() <= c.flat
    state.settled.copy_(torch.where(in_window, state.settled + 1, 0))
    # turns is even after the window, odd after the hottest bin
    state.turns += torch.where(state.turns & 1 == 0, bin_of(alpha, c) == c.bins - 1, in_window)
    _raise_flag(state, NONFINITE_ENERGY, (~finite).any())
    _raise_flag(state, ENERGY_OUT_OF_RANGE, (finite & ~usable).any())
    learn_bias(usable, energy, state, c)
    return scale, rescale


# ---------------------------------------------------------------------------------------- thermostat

# squared frequency of the friction's motion, in units of (1-mu)^2: just overdamped by the momenta. Less in
# groups of few elements, whose kinetic energies fluctuate: the friction stays within (1-mu)/8 of its mean
THERMOSTAT_RATE, THERMOSTAT_ELEMENTS = 0.5, 32.0
# the noise of an estimate that is still believed, in standard deviations
THERMOSTAT_TRUST = 20.0
# the factor on p must stay below 1, and the momenta must still tell how much noise there is
LOWEST_FRICTION, HIGHEST_FRICTION = -0.5, 4.0


def damped_momentum(momentum: float, friction: Tensor, relative_temperature: Tensor) -> Tensor:
    """mu' = mu / (1 + w T0/T): the share of p kept per step, with the thermostat's friction w."""
    return torch.full_like(friction, momentum) / (friction / relative_temperature + 1.0)


def balanced_kinetic(momentum: float, damped: Tensor, integrator: str) -> Tensor:
    """The mean of p^2/T at which theta is sampled at T, whatever part of it comes from noisy gradients.

    baoab: p keeps mu'^2 of what a kick adds, theta feels (1+mu')^2/4 of it, both on top of
    (1-mu^2)/(1-mu'^2) from the noise that is injected. euler: theta is at (1+mu')/(2c^2) of the
    temperature of p.
    """
    if integrator == "euler":
        return torch.full_like(damped, 1.0 + momentum) / (damped + 1.0)
    injected = torch.full_like(damped, 1.0 - momentum * momentum) / (1.0 - damped * damped)
    share = 2.0 * damped / (damped + 1.0)
    return injected + (1.0 - injected) * (share * share)


def adapt_friction(
    groups: Sequence[Coefficients], state: State, c: TemperingConstants, settings: Settings
) -> None:
    """Nose-Hoover thermostats (SGNHT; Ding et al. 2014), one per parameter group and chain.

    w <- w + omega^2 (T0/T) (mean of p^2/T - :func:`balanced_kinetic`), with the momenta of this step and
    their T, and omega^2 = (1-mu)^2/2 min(1, n/32), n the elements of the group. Taking w T0/T for the
    friction, and this T0/T, makes the stationary law of w independent of alpha: the extended density is
    multiplied by exp(-n (w - w_0)^2 / (2 omega^2)), with w_0 the friction that the gradients' noise needs.
    """
    temperature = state.temperature
    relative = temperature / torch.full_like(temperature, c.base_temperature)
    for g, (group, elements) in enumerate(zip(groups, settings.group_elements, strict=True)):
        mu, w = group.momentum, state.friction[:, g]
        mean_square = state.kinetic[:, g].double() * (2.0 * 2.0**-c.kinetic_exponent / elements)
        damped = damped_momentum(mu, w, relative)
        heat = mean_square / temperature - balanced_kinetic(mu, damped, settings.integrator)
        # the first gradients of a run can be thousands of times hotter: do not overshoot
        bound = 1.0 + THERMOSTAT_TRUST * math.sqrt(2.0 / elements)
        heat = torch.where(heat > bound, bound, torch.where(heat < -bound, -bound, heat))
        rate = THERMOSTAT_RATE * min(1.0, elements / THERMOSTAT_ELEMENTS) * (1.0 - mu) * (1.0 - mu)
        w = w + rate * heat / relative
        lowest = LOWEST_FRICTION * (1.0 - mu)
        _raise_flag(state, FRICTION_SATURATED, (w > HIGHEST_FRICTION).any())
        w = torch.where(w > HIGHEST_FRICTION, HIGHEST_FRICTION, torch.where(w < lowest, lowest, w))
        state.friction[:, g] = w


# ---------------------------------------------------------------------------- motion of the parameters


class Settings(NamedTuple):
    """What stays the same for all steps of one optimizer.

    ``seed``: 64-bit seed of the noise. ``integrator``: "baoab" or "euler". ``stochastic_rounding``: of what
    is stored in bfloat16; otherwise to nearest. ``num_data``: N. ``group_elements``: with thermostats, the
    elements of each parameter group that one chain has; otherwise empty. ``kinetic_unit``: kinetic
    temperature per quantum of a chain's kinetic energy, see :func:`kinetic_unit`. ``partial_sums``: the
    energies summed are those of one rank; who adds them up then calls :func:`adapt_friction`.
    """

    seed: int
    integrator: str
    stochastic_rounding: bool
    num_data: float
    group_elements: tuple[float, ...] = ()
    kinetic_unit: float = 1.0
    partial_sums: bool = False


class Coefficients(NamedTuple):
    """Scalars of one parameter group for one step, float64; see the functions that make them."""

    momentum: float
    gradient: float
    drift: float
    noise: float
    weight_decay: float
    prior: float


def explore_coefficients(
    integrator: str,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    num_data: float,
    c: TemperingConstants,
    maximize: bool = False,
) -> Coefficients:
    """Coefficients of the Langevin step with time step sqrt(h/N) and c = sqrt((1+mu)/2).

    baoab: gradient sqrt(N h)/c, drift sqrt(h/N)/(2c) twice; euler: gradient c sqrt(N h), drift
    sqrt(h/N)/c once; noise sqrt((1-mu^2) T0) at q = 1. With ``maximize`` gradient and weight decay
    change sign, which negates exactly the gradient of the loss. ``prior`` turns theta^2 into quanta of
    1/2 N lambda theta^2 / T0.
    """
    root_c = math.sqrt((1.0 + momentum) / 2.0)
    kick, glide = math.sqrt(num_data * lr), math.sqrt(lr / num_data)
    if integrator == "baoab":
        gradient, drift = kick / root_c, 0.5 * (glide / root_c)
    else:
        gradient, drift = root_c * kick, glide / root_c
    sign = -1.0 if maximize else 1.0
    return Coefficients(
        momentum=momentum,
        gradient=sign * gradient,
        drift=drift,
        noise=math.sqrt((1.0 - momentum * momentum) * c.base_temperature),
        weight_decay=sign * weight_decay,
        prior=prior_scale(weight_decay, num_data, c),
    )


def prior_scale(weight_decay: float, num_data: float, c: TemperingConstants) -> float:
    """Quanta of prior energy per theta^2; 0 where there is no tempering to feel it."""
    if c.bins == 0 or weight_decay == 0.0:
        return 0.0
    return 0.5 * num_data * weight_decay / c.base_temperature * 2.0**c.prior_exponent


def momentum_unit(lr: float, momentum: float, num_data: float) -> float:
    """c sqrt(N h): SGD's velocity is -p divided by this."""
    return math.sqrt((1.0 + momentum) / 2.0) * math.sqrt(num_data * lr)


def finetune_coefficients(
    *, lr: float, momentum: float, weight_decay: float, unit: float, maximize: bool = False
) -> Coefficients:
    """SGD with momentum in the units of p: gradient ``unit``, drift h/unit, no noise."""
    sign = -1.0 if maximize else 1.0
    return Coefficients(momentum, sign * unit, lr / unit, 0.0, sign * weight_decay, 0.0)


def decayed_gradient(theta: Tensor, gradient: Tensor, weight_decay: Tensor) -> Tensor:
    """g + lambda theta."""
    return gradient + weight_decay * theta


def whole_kick(momentum: Tensor, rescale: Tensor, integrator: str) -> Tensor:
    """The kick of a step in units of k, after the temperature has changed by rescale^2.

    What is independent of theta, and so must follow the temperature, is not p: that is a part of a kick
    early. baoab: p - k/2 g; multiplied by s = rescale, and with the other half of the kick, it becomes
    s p - (1+s)/2 k g. euler: p - k/(1+mu) g; after friction and kick mu s p - (1 + mu (s-1)/(1+mu)) k g.
    """
    if integrator == "euler":
        return momentum * (rescale - 1.0) / (momentum + 1.0) + 1.0
    return 0.5 * (rescale + 1.0)


def baoab(
    theta: Tensor,
    p: Tensor,
    gradient: Tensor,
    xi: Tensor,
    *,
    retain: Tensor,
    k: Tensor,
    mu: Tensor,
    s: Tensor,
    drift: Tensor,
) -> tuple[Tensor, Tensor]:
    """p <- a p - k g;  theta <- theta + b p;  p <- mu p + s xi;  theta <- theta + b p."""
    p = retain * p - k * gradient
    theta = theta + drift * p
    p = mu * p + s * xi
    return theta + drift * p, p


def euler(
    theta: Tensor,
    p: Tensor,
    gradient: Tensor,
    xi: Tensor,
    *,
    retain: Tensor,
    k: Tensor,
    s: Tensor,
    drift: Tensor,
) -> tuple[Tensor, Tensor]:
    """p <- a p - k g + s xi;  theta <- theta + b p."""
    p = (retain * p - k * gradient) + s * xi
    return theta + drift * p, p


def momentum_sgd(
    theta: Tensor, p: Tensor, gradient: Tensor, *, mu: Tensor, k: Tensor, drift: Tensor
) -> tuple[Tensor, Tensor]:
    """p <- mu p - k g;  theta <- theta + b p."""
    p = mu * p - k * gradient
    return theta + drift * p, p


def compute_dtype(theta: Tensor) -> torch.dtype:
    """float64 parameters are updated in float64, all others in float32 and rounded once at the end."""
    return torch.float64 if theta.dtype == torch.float64 else torch.float32


def _scalar(value: float, like: Tensor) -> Tensor:
    return torch.full((1, 1), value, dtype=torch.float64, device=like.device).to(like.dtype)


def _gradient(flat: FlatTensor, theta: Tensor, unscale: Tensor | None) -> Tensor:
    """The gradient in the precision of the update, zero where there is none, times ``unscale``."""
    if flat.gradient is None:
        return torch.zeros_like(theta)
    gradient = flat.gradient.to(theta.dtype).view_as(theta)
    return gradient if unscale is None else gradient * unscale.to(theta.dtype)


def unscale_factor(grad_scale: Tensor) -> Tensor:
    """1/grad_scale, float64 (): undoes the loss scaling of mixed-precision training."""
    return torch.ones((), dtype=torch.float64, device=grad_scale.device) / grad_scale.double()


def round_stochastically(x: Tensor, random: Tensor) -> Tensor:
    """float32 to bfloat16, up in magnitude with the probability of the fraction cut off.

    Adds ``random``, uniform 16-bit integers, to the bits and cuts off the lower 16: the mean over ``random``
    is x exactly, so that steps far below the resolution of bfloat16 still move it in the mean.
    """
    rounded = ((_bits(x) + random.to(torch.int32)) & -65536).view(torch.float32)
    return torch.where(x.isnan(), x, rounded).to(torch.bfloat16)


def store(flat: FlatTensor, theta: Tensor, p: Tensor, state: State, settings: Settings) -> None:
    """Writes the results, rounded once to the types they are stored in.

    Stochastic rounding uses one word of stream 1 per element: its low half for theta, its high half for p.
    """
    theta, p = theta.reshape(-1), p.reshape(-1)
    if settings.stochastic_rounding and flat.theta.dtype == torch.bfloat16:
        elements = flat.index, theta.numel(), theta.device, flat.first
        words = random_words(settings.seed, state.step, STREAM_ROUNDING, *elements)
        words = _of_elements(words, flat.first, theta.numel())
        theta = round_stochastically(theta, words & 0xFFFF)
        if flat.momentum.dtype == torch.bfloat16:
            p = round_stochastically(p, words >> 16)
    flat.theta.copy_(theta)
    flat.momentum.copy_(p)


def explore_tensor(
    flat: FlatTensor,
    coefficients: Coefficients,
    scale: Tensor,
    rescale: Tensor,
    state: State,
    c: TemperingConstants,
    settings: Settings,
    unscale: Tensor | None,
) -> None:
    """One Langevin step of one tensor at temperatures T0 scale^2, and its energies."""
    chains = scale.numel()
    theta = flat.theta.to(compute_dtype(flat.theta)).view(chains, -1)
    p = flat.momentum.to(theta.dtype).view(chains, -1)
    drift = _scalar(coefficients.drift, theta)
    momentum = torch.full_like(scale, coefficients.momentum)
    if settings.group_elements:
        momentum = damped_momentum(coefficients.momentum, state.friction[:, flat.group], scale * scale)
    k = coefficients.gradient * whole_kick(momentum, rescale, settings.integrator)
    k = k.to(theta.dtype).view(-1, 1)
    s = (coefficients.noise * scale).to(theta.dtype).view(-1, 1)
    elements = flat.index, theta.numel(), theta.device, flat.first
    xi = normal(settings.seed, state.step, STREAM_PARAMETERS, *elements)
    xi = xi.to(theta.dtype).view_as(theta)
    g = _gradient(flat, theta, unscale)
    if coefficients.weight_decay != 0.0:
        g = decayed_gradient(theta, g, _scalar(coefficients.weight_decay, theta))
    if settings.integrator == "baoab":
        retain = rescale.to(theta.dtype).view(-1, 1)
        mu = momentum.to(theta.dtype).view(-1, 1)
        theta, p = baoab(theta, p, g, xi, retain=retain, k=k, mu=mu, s=s, drift=drift)
    else:
        retain = (momentum * rescale).to(theta.dtype).view(-1, 1)
        theta, p = euler(theta, p, g, xi, retain=retain, k=k, s=s, drift=drift)
    store(flat, theta, p, state, settings)
    add_kinetic_energy(flat, state, c)
    add_prior_energy(flat, coefficients.prior, state)


def add_kinetic_energy(flat: FlatTensor, state: State, c: TemperingConstants) -> None:
    """1/2 p^2 per element of the stored (rounded) momenta, in quanta of 2**-s nats."""
    chains, sums = state.kinetic.shape
    p = flat.momentum.to(compute_dtype(flat.momentum))
    energy, saturated = half_square_quanta(p, _scalar(2.0 ** (c.kinetic_exponent - 1), p).view(()), chains)
    if flat.counted:
        state.kinetic[:, flat.group if sums > 1 else 0] += energy
    _raise_flag(state, KINETIC_SATURATED, saturated)
    _raise_flag(state, NONFINITE_PARAMETER, ~torch.isfinite(p).all())


def add_prior_energy(flat: FlatTensor, prior: float, state: State) -> None:
    """1/2 N lambda theta^2 / T0 per element of the stored (rounded) parameters, in quanta."""
    if prior == 0.0:
        return
    theta = flat.theta.to(compute_dtype(flat.theta))
    energy, saturated = half_square_quanta(theta, _scalar(prior, theta).view(()), state.prior.numel())
    if flat.counted:
        state.prior += energy
    _raise_flag(state, PRIOR_SATURATED, saturated)


def _raise_flag(state: State, flag: int, raised: Tensor) -> None:
    state.flags |= torch.where(raised, flag, 0)


# -------------------------------------------------------------------------------------------- history


def kinetic_unit(dimension: float, c: TemperingConstants) -> float:
    """The mean of p^2 over the ``dimension`` elements of a chain, per quantum of their kinetic energy."""
    return 2.0 * 2.0**-c.kinetic_exponent / max(dimension, 1.0)


def kinetic_temperature(state: State, unit: float) -> Tensor:
    """The mean of p^2, float64 (C,)."""
    return state.kinetic.sum(1).double() * unit


def record(energy: Tensor | None, kinetic: Tensor | None, state: State) -> None:
    """Writes alpha, T, the energy before and the kinetic temperature after a step into the oldest row.

    Both float64 (C,), or None where they are not known: NaN.
    """
    rows = state.history.shape[0]
    if rows == 0:
        return
    unknown = torch.full_like(state.alpha, math.nan)
    columns = (state.alpha, state.temperature, energy, kinetic)
    entry = torch.stack([unknown if column is None else column for column in columns], -1)
    wrapped = state.recorded >= rows
    row = torch.where(wrapped, state.recorded - rows, state.recorded)
    state.history.index_copy_(0, row.view(1), entry.unsqueeze(0))
    following = state.recorded + 1
    state.recorded.copy_(torch.where(following < 2 * rows, following, rows))


def record_kinetic(state: State, settings: Settings) -> None:
    """Writes the kinetic temperature into the newest row again, when the sums of all ranks are known."""
    row = (state.recorded - 1) % state.history.shape[0]
    kinetic = kinetic_temperature(state, settings.kinetic_unit)
    state.history[:, :, 3].index_copy_(0, row.view(1), kinetic.unsqueeze(0))


# ------------------------------------------------------------------------------------------- one step


def explore(
    flats: Sequence[FlatTensor],
    groups: Sequence[Coefficients],
    loss: Tensor | None,
    state: State,
    c: TemperingConstants,
    settings: Settings,
    unscale: Tensor | None = None,
) -> None:
    """One sampling step: alpha (with tempering), every parameter at the new temperature, the thermostats.

    ``loss`` is float64 (C,), or without tempering None; ``state.prior`` holds the prior energy of the current
    parameters; gradients are multiplied by ``unscale``, float64 (), if given.
    """
    recorded = potential_energy(loss, state, c) if loss is not None and len(state.history) else None
    if c.bins:
        scale, rescale = temper(loss, state, c, settings.seed)  # type: ignore[arg-type]  # bins: a loss
    else:
        scale = rescale = torch.ones_like(state.alpha)
    state.kinetic.zero_()
    state.prior.zero_()
    for flat in flats:
        explore_tensor(flat, groups[flat.group], scale, rescale, state, c, settings, unscale)
    if settings.group_elements and not settings.partial_sums:
        adapt_friction(groups, state, c, settings)
    record(recorded, kinetic_temperature(state, settings.kinetic_unit), state)
    state.step += 1


def finetune(
    flats: Sequence[FlatTensor],
    groups: Sequence[Coefficients],
    state: State,
    settings: Settings,
    unscale: Tensor | None = None,
    energy: Tensor | None = None,
) -> None:
    """One noise-free step; parameters without a gradient stay as they are, as in SGD.

    ``energy`` is for the history, float64 (C,).
    """
    for flat in flats:
        if flat.gradient is None:
            continue
        coefficients = groups[flat.group]
        theta = flat.theta.to(compute_dtype(flat.theta))
        k, mu, drift, decay = (
            _scalar(v, theta).view(())
            for v in (
                coefficients.gradient,
                coefficients.momentum,
                coefficients.drift,
                coefficients.weight_decay,
            )
        )
        g = _gradient(flat, theta, unscale)
        if coefficients.weight_decay != 0.0:
            g = decayed_gradient(theta, g, decay)
        theta, p = momentum_sgd(theta, flat.momentum.to(theta.dtype), g, mu=mu, k=k, drift=drift)
        store(flat, theta, p, state, settings)
        _raise_flag(state, NONFINITE_PARAMETER, ~torch.isfinite(flat.momentum).all())
    record(energy, None, state)
    state.step += 1


def reduce_prior_energy(flats: Sequence[FlatTensor], groups: Sequence[Coefficients], state: State) -> None:
    """Prior energy of the parameters as they are, for a step that did not follow one of ours."""
    state.prior.zero_()
    for flat in flats:
        add_prior_energy(flat, groups[flat.group].prior, state)
