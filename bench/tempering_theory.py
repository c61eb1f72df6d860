"""What is known in closed form about tempering a harmonic target, to compare measurements with.

Per mode of curvature k the sampler is a linear map with Gaussian noise, so its stationary law and the
autocorrelation of its energy are exact. The motion of alpha is then predicted as overdamped: with
lambda = ln beta, the force on alpha has variance lambda'^2 d/2 and the correlation time tau of the energy
(in steps), which is a friction of eps^2 lambda'^2 (d/2) tau per step on top of alpha's own 2(1-c)/(1+c).
Friction over eps^2 is the resistance R = 1/D of a diffusion, and the mean time from the window to the hottest
bin and back follows from the commute time of a diffusion of uniform density; see :func:`round_trip`.
"""

from __future__ import annotations

import math

import numpy as np

from ctld_cuda import Tempering
from ctld_cuda.tempering import default_step_size

GRID = 4000


def stability_limit(momentum: float) -> float:
    """Largest lr times curvature, 2 (1 + momentum), for which the sampler (and SGD) is stable."""
    return 2.0 * (1.0 + momentum)


def half_kick(lr_curvature: np.ndarray | float, momentum: float) -> np.ndarray:
    """<x p> / T of a stationary baoab, in units where <x^2> = <p^2> = T: half of sqrt(h k)/c."""
    return 0.5 * np.sqrt(np.asarray(lr_curvature) * 2.0 / (1.0 + momentum))


def _step_maps(lr_curvature: np.ndarray, momentum: float) -> tuple[np.ndarray, np.ndarray]:
    """Per mode the map M of a baoab step of (x, p), and the covariance s of (x, p) with x over that of x."""
    delta = 2.0 * half_kick(np.atleast_1d(lr_curvature), momentum)
    zero, one = np.zeros_like(delta), np.ones_like(delta)

    def matrices(*entries: np.ndarray) -> np.ndarray:
        return np.stack(entries, -1).reshape(-1, 2, 2)

    half, kick = matrices(one, 0.5 * delta, zero, one), matrices(one, zero, -delta, one)
    return half @ np.diag([1.0, momentum]) @ half @ kick, np.stack((one, 0.5 * delta), -1)


def energy_autocorrelations(lr_curvature: np.ndarray, momentum: float, lags: int) -> np.ndarray:
    """Autocorrelation of the energy x^2/2 of each mode at lags 0 ... ``lags``, (lags + 1, modes).

    It is the square of the autocorrelation e' M^j s of x.
    """
    step, s = _step_maps(lr_curvature, momentum)
    found = []
    for _ in range(lags + 1):
        found.append(s[:, 0] ** 2)
        s = (step @ s[..., None])[..., 0]
    return np.stack(found)


def mode_energy_times(lr_curvature: np.ndarray, momentum: float) -> np.ndarray:
    """Correlation time, in steps, of the energy of each mode under baoab: 1/2 + sum over lags >= 1.

    The sum over lags >= 0 of (e' M^j s)^2 is e' G e with G = M G M' + s s'.
    """
    step, s = _step_maps(lr_curvature, momentum)
    modes = s.shape[0]
    lifted = np.einsum("nij,nkl->nikjl", step, step).reshape(modes, 4, 4)
    right = (s[:, :, None] * s[:, None, :]).reshape(modes, 4, 1)
    return np.linalg.solve(np.eye(4) - lifted, right)[:, 0, 0] - 0.5


def energy_time(lr: float, momentum: float, curvatures: np.ndarray) -> float:
    """The same for the whole energy: every mode contributes the same variance, so the mean over modes."""
    values, counts = np.unique(np.asarray(curvatures, dtype=float), return_counts=True)
    return float((mode_energy_times(lr * values, momentum) * counts).sum() / counts.sum())


def best_momentum(lr: float, curvatures: np.ndarray) -> float:
    """The momentum with the shortest :func:`energy_time` at this lr, to 0.005."""
    tried = np.arange(0.0, 0.9951, 0.005)
    stable = [mu for mu in tried if lr * np.max(curvatures) < 0.999 * stability_limit(mu)]
    return float(min(stable, key=lambda mu: energy_time(lr, mu, curvatures)))


def root_temperature(alpha: np.ndarray, tempering: Tempering) -> np.ndarray:
    """q = sqrt(T/T0)."""
    z = np.clip((np.abs(alpha) - tempering.flat) / (tempering.limit - tempering.flat), 0.0, 1.0)
    return 1.0 + (math.sqrt(tempering.max_temperature) - 1.0) * z * z * (3.0 - 2.0 * z)


def log_beta_slope(alpha: np.ndarray, tempering: Tempering) -> np.ndarray:
    """|d ln beta / d alpha|, for alpha >= 0."""
    ramp = tempering.limit - tempering.flat
    z = np.clip((np.abs(alpha) - tempering.flat) / ramp, 0.0, 1.0)
    q_slope = (math.sqrt(tempering.max_temperature) - 1.0) * 6.0 * z * (1.0 - z) / ramp
    return 2.0 * q_slope / root_temperature(alpha, tempering)


def bin_centers(tempering: Tempering) -> np.ndarray:
    return (np.arange(tempering.bins) + 0.5) * tempering.limit / tempering.bins


def _middles(low: float, high: float) -> np.ndarray:
    return low + (np.arange(GRID) + 0.5) * (high - low) / GRID


def own_friction(persistence: float) -> float:
    """Friction per step that gives the diffusion (1+c)/(1-c)/2 eps^2 per step of a free alpha."""
    return 2.0 * (1.0 - persistence) / (1.0 + persistence)


def hottest_edge(tempering: Tempering) -> float:
    """Where the hottest bin begins."""
    return tempering.limit * (1.0 - 1.0 / tempering.bins)


def resistance(alpha: np.ndarray, tempering: Tempering, dimension: int, tau: float) -> np.ndarray:
    """1/D per step at alpha."""
    eps = tempering.step_size or default_step_size(tempering, dimension)
    coupled = log_beta_slope(alpha, tempering) ** 2 * 0.5 * dimension * tau
    return own_friction(tempering.persistence) / eps**2 + coupled


def round_trip(tempering: Tempering, dimension: int, tau: float) -> float:
    """Predicted mean number of steps from the window to the hottest bin and back.

    The commute time of the diffusion, limit * integral of the resistance over the ramp, plus the time that
    the thermal flux takes, limit * sqrt(2 pi)/eps: a thermal alpha crosses any point outwards once in so
    many steps, which is all there is where alpha flies freely (the two resistances in series).
    """
    low, high = tempering.flat, hottest_edge(tempering)
    eps = tempering.step_size or default_step_size(tempering, dimension)
    diffusion = (high - low) * float(resistance(_middles(low, high), tempering, dimension, tau).mean())
    return tempering.limit * (diffusion + math.sqrt(2.0 * math.pi) / eps)


def share_of_way(alpha: np.ndarray, tempering: Tempering, dimension: int, tau: float) -> np.ndarray:
    """Probability that a stationary alpha was last in the hottest bin, not in the window."""
    grid = _middles(tempering.flat, hottest_edge(tempering))
    passed = resistance(grid, tempering, dimension, tau).cumsum()
    return np.interp(np.abs(alpha), grid, passed / passed[-1], left=0.0, right=1.0)


def shape_factor(tempering: Tempering) -> float:
    """limit * integral of lambda'^2: round trips of a stiff coupling cost half of it times d tau."""
    grid = _middles(tempering.flat, tempering.limit)
    width = tempering.limit - tempering.flat
    return tempering.limit * width * float((log_beta_slope(grid, tempering) ** 2).mean())


def spring(alpha: np.ndarray, tempering: Tempering, dimension: int) -> np.ndarray:
    """eps^2 K with K = lambda'^2 d/2, the curvature that alpha feels at fixed energy, per squared step."""
    eps = tempering.step_size or default_step_size(tempering, dimension)
    return eps**2 * log_beta_slope(alpha, tempering) ** 2 * 0.5 * dimension


def r_square(tempering: Tempering, dimension: int, share: float = 0.0) -> float:
    """Predicted <r^2> as stored, at the end of a BAOAB step: 1 - eps^2 K/4, for any lr and momentum.

    The mean over the part of [0, limit] where |lambda'| exceeds ``share`` of its maximum.
    """
    alpha = _middles(0.0, tempering.limit)
    slope = log_beta_slope(alpha, tempering)
    return 1.0 - 0.25 * float(spring(alpha, tempering, dimension)[slope >= share * slope.max()].mean())


def linear_r_square(
    stiff: float,
    lr_curvature: float,
    momentum: float,
    persistence: float,
    kicks: float = 0.0,
    known: float = 0.0,
) -> float:
    """<r^2> as stored at one slope of ln beta, on a harmonic target with one curvature and many modes.

    There r, alpha and the sums over modes of x^2, x p and p^2, less their means, follow a linear map with
    Gaussian noise, whose covariance solves a Lyapunov equation; alpha enters through x/q and p/q only.

    Args:
        stiff: eps^2 K, see :func:`spring`.
        lr_curvature, momentum, persistence: of the sampler.
        kicks: variance (eps beta' sigma)^2 of what white noise in the energy does to r in a step.
        known: the part of it that ``energy_noise`` subtracts, as far as alpha's own noise allows.
    """
    lag = float(half_kick(lr_curvature, momentum))
    root = math.sqrt(stiff)
    # two modes stand for all: K = lambda'^2. State: r, sums of x^2, xp, p^2. A half drift r/2 of alpha
    # changes x and the stored p by -lambda' r/4 of themselves against q, and half a kick goes with it
    kick, drift = np.eye(4), np.eye(4)
    kick[0, 1] = -0.25 * root
    drift[1:, 0] = root, root * lag, root * lag * lag
    friction = np.diag([persistence, 1.0, 1.0, 1.0])
    step = _step_maps(np.array([lr_curvature]), momentum)[0][0]
    (a, b), (c, d) = step
    theta = np.eye(4)
    theta[1:, 1:] = [a * a, 2 * a * b, b * b], [a * c, a * d + b * c, b * d], [c * c, 2 * c * d, d * d]
    law = np.array([[1.0, lag], [lag, 1.0]])
    pairs = ((0, 0), (0, 1), (1, 1))
    spread = np.array(
        [[2.0 * (law[i, k] * law[j, m] + law[i, m] * law[j, k]) for k, m in pairs] for i, j in pairs]
    )
    noise = np.zeros((4, 4))
    noise[1:, 1:] = spread - theta[1:, 1:] @ spread @ theta[1:, 1:].T
    unit = np.array([1.0, 0.0, 0.0, 0.0])
    second = theta @ kick @ drift
    own, white = second @ unit, 0.5 * (second @ friction @ drift @ unit + theta @ unit)
    noise += max(1.0 - persistence**2 - known, 0.0) * np.outer(own, own) + kicks * np.outer(white, white)
    whole = second @ friction @ drift @ kick
    return float(np.linalg.solve(np.eye(16) - np.kron(whole, whole), noise.ravel())[0])


def noisy_r_square(
    tempering: Tempering, dimension: int, lr: float, momentum: float, ratio: float, known: bool
) -> float:
    """<r^2> over all alpha with white noise of ``ratio`` sqrt(d/2) nats in the energy, curvature 1.

    Local in alpha, so for noise that does not carry r far in its relaxation time: ratios up to about 1.
    """
    alpha = np.linspace(0.0, tempering.limit, 101)
    stiff = spring(alpha, tempering, dimension)
    kicks = stiff * (ratio * root_temperature(alpha, tempering) ** -2) ** 2
    return float(
        np.mean(
            [
                linear_r_square(max(k, 1e-12), lr, momentum, tempering.persistence, v, v if known else 0.0)
                for k, v in zip(stiff, kicks, strict=True)
            ]
        )
    )


def correctable_noise(tempering: Tempering, dimension: int) -> float:
    """Largest noise, over sqrt(d/2), whose heat alpha's own noise can make room for at every alpha."""
    alpha = np.linspace(0.0, tempering.limit, 2001)
    kicks = spring(alpha, tempering, dimension) * root_temperature(alpha, tempering) ** -4
    return math.sqrt((1.0 - tempering.persistence**2) / kicks.max())


def second_difference_floor(lr: float, momentum: float, curvatures: np.ndarray) -> float:
    """What sqrt(mean (U_t - 2 U_(t+1) + U_(t+2))^2 / 6) gives without noise, over the spread of U.

    6 - 8 rho_1 + 2 rho_2 times the variance, with the autocorrelations rho of the energy.
    """
    values, counts = np.unique(np.asarray(curvatures, dtype=float), return_counts=True)
    rho = energy_autocorrelations(lr * values, momentum, 2) @ counts / counts.sum()
    return math.sqrt(max(6.0 - 8.0 * rho[1] + 2.0 * rho[2], 0.0) / 6.0)
