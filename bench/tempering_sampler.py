"""Runs of CTLD on targets with closed-form gradients, and sums over what they do.

Every number comes with an error from the spread over chains, which share a bias but no noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tempering_targets import Gaussian
from tempering_theory import bin_centers, half_kick, hottest_edge, root_temperature, share_of_way

from ctld_cuda import CTLD, Tempering

Tensor = torch.Tensor
Target = Callable[[Tensor, Tensor], Tensor]
"""(theta (C, d), gradient (C, d), written) -> energies (C,), float64; see tempering_targets."""


class Run:
    """One sampler of ``chains`` chains on a target, at T0 = 1 and N = 1.

    Args:
        target: energies and gradients.
        theta: start, (C, d).
        tempering, lr, momentum, seed: of the sampler.
        noise: standard deviation in nats of white noise added to the energies given to the sampler.
    """

    def __init__(
        self,
        target: Target,
        theta: Tensor,
        tempering: Tempering | None,
        *,
        lr: float,
        momentum: float,
        seed: int,
        noise: float = 0.0,
    ) -> None:
        self.target, self.tempering, self.noise = target, tempering, noise
        self.chains, self.dimension = theta.shape
        self.parameter = torch.nn.Parameter(theta.clone())
        self.parameter.grad = torch.zeros_like(theta)
        self.theta = self.parameter.detach()
        self.scratch = torch.zeros_like(theta)  # for gradients that the sampler is not given
        self.optimizer = CTLD(
            [self.parameter],
            lr=lr,
            momentum=momentum,
            num_data=1,
            tempering=tempering,
            chains=self.chains,
            seed=seed,
        )
        self.generator = torch.Generator().manual_seed(seed)
        live = self.optimizer.tempering_state()
        # per-chain entries are live: these arrays follow the run
        self.alpha, self.r = live["alpha"].numpy(), live["alpha_momentum"].numpy()
        self.visits = live["visits"].numpy()
        self.energy = np.zeros(self.chains)  # without noise, before the last step
        self.given = self.energy

    def steps(self, count: int, watch: Callable[[], None] | None = None, every: int = 1) -> None:
        """``watch()`` is called after every ``every``-th step."""
        for step in range(1, count + 1):
            energy = self.target(self.theta, self.parameter.grad)
            self.energy = energy.numpy()
            if self.noise:
                energy = energy + self.noise * torch.randn(
                    self.chains, generator=self.generator, dtype=torch.float64
                )
            self.given = energy.numpy()
            self.optimizer.step(loss=energy)
            if watch and step % every == 0:
                watch()

    def state(self) -> dict[str, Tensor]:
        return self.optimizer.tempering_state()


def in_equilibrium(
    target: Gaussian,
    tempering: Tempering,
    *,
    lr: float,
    momentum: float,
    chains: int,
    seed: int,
    noise: float = 0.0,
    learning: bool = False,
) -> Run:
    """A run whose chains start in the stationary law.

    Its bias is exact and no longer learns, or with ``learning`` starts from nothing.
    """
    generator = torch.Generator().manual_seed(seed ^ 1)
    alpha = (torch.rand(chains, generator=generator, dtype=torch.float64) * 2 - 1) * tempering.limit
    q = torch.from_numpy(root_temperature(alpha.numpy(), tempering))
    theta = target.draw(q, generator)
    root_k = torch.from_numpy(target.curvatures**0.5).float()
    lag = torch.from_numpy(half_kick(lr * target.curvatures, momentum)).float()
    fresh = torch.randn(theta.shape, generator=generator) * q[:, None].float()
    momenta = lag * root_k * theta + (1.0 - lag * lag).sqrt() * fresh
    run = Run(target, theta, tempering, lr=lr, momentum=momentum, seed=seed, noise=noise)
    saved = run.optimizer.state_dict()
    tensors = saved["param_groups"][0]["sampler"]["tensors"]
    tensors["alpha"].copy_(alpha)
    tensors["alpha_momentum"].copy_(torch.randn(chains, generator=generator, dtype=torch.float64))
    tensors["temperature"].copy_(q * q)
    if not learning:
        # so many visits and steps that what follows does not count
        tensors["visits"].fill_(10**14)
        tensors["samples"].fill_(tempering.bins * 10**14)
        tensors["step"].fill_(10**12)
        scale = torch.from_numpy(root_temperature(bin_centers(tempering), tempering))
        tensors["energy_mean"].copy_(0.5 * target.dimension * scale * scale)
    saved["state"] = {0: {"momentum_buffer": momenta}}
    run.optimizer.load_state_dict(saved)
    return run


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> tuple[Any, Any]:
    """Ratio of sums over chains (axis 0) and its standard error from the spread over chains."""
    numerator, denominator = np.asarray(numerator, float), np.asarray(denominator, float)
    chains, below = numerator.shape[0], denominator.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = numerator.sum(0) / below
        spread = np.sqrt(((numerator - value * denominator) ** 2).sum(0) * chains / (chains - 1))
        return value, spread / below


def spread_of(values: list[float]) -> tuple[float, float]:
    """Mean of independent repetitions and its standard error."""
    x = np.asarray(values, dtype=float)
    with np.errstate(invalid="ignore"):  # infinite where a bin was never visited
        error = x.std(ddof=1) / math.sqrt(x.size) if x.size > 1 else math.nan
    return float(x.mean()), float(error)


class Means:
    """Sums per chain of weighted observations, by name."""

    def __init__(self, chains: int) -> None:
        self.chains = chains
        self._sums: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, name: str, value: np.ndarray, weight: np.ndarray | float = 1.0) -> None:
        above, below = self._sums.setdefault(name, (np.zeros(self.chains), np.zeros(self.chains)))
        above += value * weight
        below += weight

    def __getitem__(self, name: str) -> tuple[float, float]:
        """Mean and standard error; NaN if the weights were all 0."""
        value, error = ratio(*self._sums[name])
        return float(value), float(error)

    def counted(self, name: str) -> np.ndarray:
        return self._sums[name][1]


class RoundTrips:
    """Counts window -> hottest bin -> window for every chain.

    Args:
        alpha: live positions, (C,).
        window, hot: the trip ends at |alpha| <= window and turns at |alpha| >= hot.
        was_hot: which end each chain visited last; those in neither are otherwise taken as cold.
    """

    def __init__(
        self, alpha: np.ndarray, window: float, hot: float, was_hot: np.ndarray | None = None
    ) -> None:
        self.alpha, self.window, self.hot = alpha, window, hot
        self.was_hot = np.abs(alpha) >= hot if was_hot is None else was_hot.copy()
        self.trips = np.zeros(alpha.size, dtype=np.int64)
        self.observations = 0

    def watch(self) -> None:
        distance = np.abs(self.alpha)
        cold = distance <= self.window
        self.trips += cold & self.was_hot
        self.was_hot = (self.was_hot | (distance >= self.hot)) & ~cold
        self.observations += 1

    def steps_per_trip(self, every: int = 1) -> tuple[float, float]:
        """Mean number of steps of a trip and its standard error; infinite if there was none."""
        rate, error = ratio(self.trips, np.full(self.trips.size, self.observations * every))
        return (1.0 / rate, error / rate**2) if rate > 0 else (math.inf, math.inf)


def count_round_trips(run: Run, tau: float, seed: int) -> RoundTrips:
    """A counter for a stationary run; the ends visited last are drawn from their predicted law."""
    t = run.tempering
    chance = share_of_way(run.alpha, t, run.dimension, tau)
    was_hot = np.random.default_rng(seed).random(run.chains) < chance
    return RoundTrips(run.alpha, t.flat, hottest_edge(t), was_hot)
