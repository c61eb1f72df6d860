"""What the tests of the sampled laws share: bounds in standard errors, and harmonic targets solved exactly.

Seeds are fresh at every run. A comparison fails if it is off by more than 5 standard errors (plus, with
tempering, a stated allowance for the finite step of alpha), which happens by chance with probability 6e-7, or
1e-6 where the error itself is estimated from the spread over some hundred chains. The default run of
test_harmonic.py, test_alpha.py and test_tempering.py makes about 1,400 comparisons, so a healthy sampler
fails it at most once in about 1,000 runs. Bounds without a known error (how flat a histogram is) are at
least 5 times the spread seen in 20 runs away from the mean. The environment variable CTLD_TEST_SEED repeats
the run of a failure, whose message names it. Deliberately broken samplers must fail the same checks.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

FIVE_SIGMA = 5.0


def repeat(seed):
    return f"to repeat: CTLD_TEST_SEED={seed}"


def too_large(deviations):
    """Those beyond 5 standard errors; deviations are in units of it, by name."""
    return {name: round(float(z), 2) for name, z in deviations.items() if not abs(z) < FIVE_SIGMA}


def check(deviations, seed):
    assert not too_large(deviations), f"{too_large(deviations)} standard errors; {repeat(seed)}"


def device_of(backend):
    return "cuda" if backend == "cuda" else "cpu"


class Harmonic(NamedTuple):
    """L(theta) = curvature/2 theta^2 per example, and the options of the sampler."""

    lr: float
    momentum: float
    curvature: float = 1.0
    weight_decay: float = 0.0
    num_data: float = 1.0
    temperature: float = 1.0

    def step_map(self, integrator):
        """One step as (theta, p) <- M (theta, p) + q xi."""
        c = math.sqrt((1.0 + self.momentum) / 2.0)
        kick = math.sqrt(self.num_data * self.lr) * (self.curvature + self.weight_decay)
        glide = math.sqrt(self.lr / self.num_data) / c
        noise = np.array([0.0, math.sqrt((1.0 - self.momentum**2) * self.temperature)])
        if integrator == "euler":
            move = np.array([[1.0, glide], [0.0, 1.0]])
            return move @ np.array([[1.0, 0.0], [-c * kick, self.momentum]]), move @ noise
        half = np.array([[1.0, 0.5 * glide], [0.0, 1.0]])
        push = np.array([[1.0, 0.0], [-kick / c, 1.0]])
        return half @ np.diag([1.0, self.momentum]) @ half @ push, half @ noise

    def law_after(self, steps, start, integrator):
        """Mean and covariance of (theta, p) after ``steps`` from theta = start, p = 0."""
        m, q = self.step_map(integrator)
        mean, covariance = np.array([start, 0.0]), np.zeros((2, 2))
        for _ in range(steps):
            mean, covariance = m @ mean, m @ covariance @ m.T + np.outer(q, q)
        return mean, covariance

    def stationary(self, integrator):
        """The covariance that a step leaves as it is: S = M S M' + q q'."""
        m, q = self.step_map(integrator)
        return np.linalg.solve(np.eye(4) - np.kron(m, m), np.outer(q, q).ravel()).reshape(2, 2)

    def relaxation(self, integrator):
        """Steps after which the law differs from the stationary one by less than 1e-5."""
        m, _ = self.step_map(integrator)
        slowest = max(abs(np.linalg.eigvals(m)))
        return 5 + math.ceil(math.log(1e-5) / math.log(max(slowest, 1e-9)))

    @property
    def group(self):
        return {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}


PLAIN = Harmonic(0.05, 0.9)
WITH_PRIOR = Harmonic(0.1, 0.8, curvature=0.6, weight_decay=0.4, num_data=50.0, temperature=2.5)


def deviations_from(theta, p, mean, covariance, prefix=""):
    """How far independent (theta, p) pairs are from a Gaussian law, in standard errors, by name.

    Products of neighbours test that the pairs are independent.
    """
    n = theta.numel()
    x, y = theta.double().flatten() - mean[0], p.double().flatten() - mean[1]
    xx, xy, yy = covariance[0, 0], covariance[0, 1], covariance[1, 1]
    root = math.sqrt(n)
    found = {
        "mean of theta": x.mean() * root / math.sqrt(xx),
        "mean of p": y.mean() * root / math.sqrt(yy),
        "variance of theta": ((x * x).mean() / xx - 1.0) * root / math.sqrt(2.0),
        "variance of p": ((y * y).mean() / yy - 1.0) * root / math.sqrt(2.0),
        "covariance": ((x * y).mean() - xy) * root / math.sqrt(xx * yy + xy * xy),
        "neighbours' theta": (x[1:] * x[:-1]).mean() * root / xx,
        "neighbours' p": (y[1:] * y[:-1]).mean() * root / yy,
    }
    return {prefix + key: float(z) for key, z in found.items()}


# ------------------------------------------------------ the default shape of the temperature

LIMIT, BINS = 1.5, 60
MAX_TEMPERATURE, FLAT = 10.0, 0.4


def root_temperature(alpha):
    """q = sqrt(T/T0)."""
    z = ((alpha.abs() - FLAT) / (LIMIT - FLAT)).clamp(0.0, 1.0)
    return 1.0 + (math.sqrt(MAX_TEMPERATURE) - 1.0) * z * z * (3.0 - 2.0 * z)


CENTERS = (torch.arange(BINS, dtype=torch.float64) + 0.5) * LIMIT / BINS
