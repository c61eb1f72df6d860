"""What the tests of the sampled laws share: bounds in standard errors, and harmonic targets solved exactly.

Seeds are fresh at every run. A comparison fails if it is off by more than BOUND = 5.5 standard errors (plus,
with tempering, a stated allowance for the finite step of alpha). By chance that happens with probability
3.8e-8 where the error is known and the number compared is Gaussian. Where the error is estimated from the
spread over n chains, the number follows Student's t with n - 1 degrees of freedom: 8e-8 for n = 300, 3e-7 for
n = 100. :func:`check` counts the comparisons and adds up these probabilities, and the summary of a run prints
both: the sum bounds the probability that a healthy sampler fails the run (Boole), and is at most 1e-3.

Bounds without a known error (how flat a histogram is) go through :func:`bounded`; they are at least 5 times
the spread seen in 20 runs away from the mean and are counted apart. The environment variable CTLD_TEST_SEED
repeats the run of a failure, whose message names it. Deliberately broken samplers must fail the same checks:
see tests/statistics/mutants.py.
"""

import dataclasses
import math
import statistics
from typing import NamedTuple

import numpy as np
import torch

BOUND = 5.5
FIVE_SIGMA = 5.0  # controls that must go wrong are off by at least this


def repeat(seed):
    return f"to repeat: CTLD_TEST_SEED={seed}"


# ---------------------------------------------------------------------------- comparisons and their number


@dataclasses.dataclass
class Tally:
    """What was compared so far: how often, how likely a failure by chance is, and bounds without error."""

    comparisons: int = 0
    chance: float = 0.0
    bounds: int = 0


TALLY = Tally()


def tail(z):
    """P(|Z| > z) of a standard normal Z."""
    return math.erfc(z / math.sqrt(2.0))


def chance(samples=None, bound=BOUND):
    """P(|x| > bound) for a standard normal, or for Student's t from the spread of ``samples`` numbers.

    Student's t by the normal approximation of Wallace (1959), within 10 % here.
    """
    if samples is None:
        return tail(bound)
    freedom = samples - 1
    z = math.sqrt(freedom * math.log1p(bound * bound / freedom)) * (8 * freedom + 1) / (8 * freedom + 3)
    return tail(z)


def score(p):
    """The standard normal score whose two-sided tail is ``p``: puts a p-value in standard errors."""
    return -statistics.NormalDist().inv_cdf(max(0.5 * p, 1e-300)) if p < 1.0 else 0.0


def worst(deviation):
    """Largest magnitude of a number or tensor of deviations; infinite where it is not a number."""
    values = torch.as_tensor(deviation, dtype=torch.float64).abs()
    return float(values.nan_to_num(math.inf, math.inf).max()) if values.numel() else math.inf


def too_large(deviations):
    """Those beyond BOUND standard errors; deviations (numbers or tensors) are in units of it, by name."""
    return {name: round(worst(z), 2) for name, z in deviations.items() if not worst(z) < BOUND}


def check(deviations, seed, samples=None):
    """Asserts that all deviations are within BOUND, and counts every number in them.

    ``samples``: the errors were estimated from so many independent numbers; None: they are known.
    """
    count = sum(torch.as_tensor(z).numel() for z in deviations.values())
    TALLY.comparisons += count
    TALLY.chance += count * chance(samples)
    assert not too_large(deviations), f"{too_large(deviations)} standard errors; {repeat(seed)}"


def bounded(values, seed, report=""):
    """Asserts low < value < high for bounds that come from experience: {name: (value, low, high)}."""
    TALLY.bounds += len(values)
    outside = {name: v for name, v in values.items() if not v[1] < v[0] < v[2]}
    assert not outside, f"{outside} {report}; {repeat(seed)}"


def kolmogorov(uniform, allowance=0.0):
    """Deviation of independent numbers in [0, 1] from uniformity, in standard errors (Kolmogorov, Smirnov).

    ``allowance`` is subtracted from the largest distance of the distribution functions. Tail by Stephens
    (1970), good from some ten numbers on.
    """
    n = uniform.numel()
    if n < 10 or not torch.isfinite(uniform).all():
        return math.inf
    x = uniform.double().flatten().sort().values
    i = torch.arange(n, dtype=torch.float64, device=x.device)
    distance = max(float(((i + 1) / n - x).max()), float((x - i / n).max())) - allowance
    if distance <= 0.0:
        return 0.0
    t = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance
    return score(min(1.0, 2.0 * sum((-1) ** (k - 1) * math.exp(-2.0 * (k * t) ** 2) for k in range(1, 20))))


def normal_share(x):
    """Standard normal distribution function."""
    return torch.special.ndtr(x.double())


def energy_share(energy, dimension):
    """Distribution function of Gamma(d/2): the law of beta U on a d-dimensional Gaussian."""
    half = torch.full_like(energy.double(), 0.5 * dimension)
    return torch.special.gammainc(half, energy.double())


def energy_distance(x, y):
    """Energy distance of two samples (n, d) of independent draws, in standard errors (Szekely, Rizzo).

    Summed over disjoint pairs of both, |x - y'| + |x' - y| - |x - x'| - |y - y'|: independent terms, and if x
    and y have the same law each is as likely as its negative, so that the mean over its error is normal.
    """
    n = min(x.shape[0], y.shape[0]) // 2
    if n < 16:
        return math.inf
    a, b, c, d = x[:n].double(), x[n : 2 * n].double(), y[:n].double(), y[n : 2 * n].double()
    terms = (a - d).norm(dim=1) + (b - c).norm(dim=1) - (a - b).norm(dim=1) - (c - d).norm(dim=1)
    return float(terms.mean() / terms.std()) * math.sqrt(n)


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
