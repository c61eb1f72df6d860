"""Targets of the sampler benchmark: densities whose moments are known without the samplers compared.

A target hands its energy U (minus the log density, up to a constant) to torch with a closed-form gradient and
to JAX as a log density, and names the functions whose means are to be estimated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

Tensor = torch.Tensor
Array = np.ndarray
GradientAndEnergy = Callable[[Tensor], tuple[Tensor, Tensor]]


class Moments(NamedTuple):
    """Exact mean and variance under the target of the functions to be estimated, float64 (F,)."""

    mean: Array
    variance: Array


class Target(Protocol):
    """What the benchmark needs to know about a density over R^d.

    ``scale`` is the standard deviation in the narrowest direction, the unit of step sizes; ``modes`` their
    number, 1 for the regressions.
    """

    name: str
    title: str
    dimension: int
    scale: float
    modes: int

    def gradient_and_energy(self) -> GradientAndEnergy:
        """theta (C, d) to gradient (C, d) and energy (C,), float32."""

    def jax_log_density(self) -> Callable[[Any], Any]:
        """The same for one theta (d,), in JAX."""

    def start(self, chains: int, generator: np.random.Generator) -> Array:
        """Where the chains begin, float32 (C, d)."""

    def functions(self, values: Array) -> Array:
        """Functions whose means are estimated, at ``values`` (C, d): float64 (C, F)."""

    @property
    def moments(self) -> Moments: ...


# ------------------------------------------------------------------------------------------ mixtures

LN2 = math.log(2.0)
LOWEST_LOG2 = -60.0  # relative to the largest component; below, exp2 would return denormals, slowly


class Mixture:
    """sum_k weights[k] N(means[k], variance I), every chain started in one mode.

    The functions are the indicators of the modes: theta belongs to the nearest mean. The means must be so far
    apart that the components do not overlap by more than can be measured.

    Args:
        means: (K, d).
        weights: (K,), any positive numbers.
        variance: of every component in every direction.
        first: index of the mode in which every chain starts.
    """

    def __init__(
        self, name: str, title: str, means: Array, weights: Array, variance: float, first: int
    ) -> None:
        self.name, self.title = name, title
        self.means = np.asarray(means, dtype=np.float64)
        self.weights = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        self.variance = float(variance)
        self.first = first
        self.modes, self.dimension = self.means.shape
        self.scale = math.sqrt(variance)

    @cached_property
    def _linear(self) -> tuple[Array, Array]:
        """log w_k N(theta | k) = slope_k . theta + offset_k + what all components share."""
        slope = self.means / self.variance
        return slope, np.log(self.weights) - 0.5 * (slope * self.means).sum(1)

    def gradient_and_energy(self) -> GradientAndEnergy:
        slope, offset = (torch.tensor(x / LN2, dtype=torch.float32) for x in self._linear)
        offset = offset[:, None]
        rows = np.concatenate([self.means, np.ones((self.modes, 1))], axis=1).T
        means_and_one = torch.tensor(rows, dtype=torch.float32).contiguous()
        half_precision = torch.full((self.dimension,), 0.5 / self.variance)

        def evaluate(theta: Tensor) -> tuple[Tensor, Tensor]:
            log2_shares = torch.addmm(offset, slope, theta.t())  # (K, C): reductions run along memory
            largest = log2_shares.amax(0)
            shares = log2_shares.sub_(largest).clamp_(min=LOWEST_LOG2).exp2_()
            sums = means_and_one @ shares
            total = sums[-1]
            mean = sums[:-1].div_(total)
            energy = torch.mv(theta * theta, half_precision)
            energy.sub_(largest.add_(total.log2_()), alpha=LN2)
            return (theta - mean.t()).div_(self.variance), energy

        return evaluate

    def jax_log_density(self) -> Callable[[Any], Any]:
        import jax
        import jax.numpy as jnp

        slope, offset = (jnp.asarray(x, jnp.float32) for x in self._linear)
        half_precision = 0.5 / self.variance
        return lambda theta: jax.nn.logsumexp(offset + slope @ theta) - half_precision * (theta @ theta)

    def start(self, chains: int, generator: np.random.Generator) -> Array:
        noise = generator.standard_normal((chains, self.dimension))
        return (self.means[self.first] + self.scale * noise).astype(np.float32)

    def mode_of(self, values: Array) -> Array:
        """Index of the nearest mean, for ``values`` (C, d): int64 (C,)."""
        means = self.means.astype(np.float32)
        return (values @ means.T - 0.5 * (means * means).sum(1)).argmax(1)

    def functions(self, values: Array) -> Array:
        indicators = np.zeros((len(values), self.modes))
        indicators[np.arange(len(values)), self.mode_of(values)] = 1.0
        return indicators

    @property
    def moments(self) -> Moments:
        return Moments(self.weights, self.weights * (1 - self.weights))


def grid() -> Mixture:
    """25 Gaussians, 11.5 standard deviations apart, weights 1 to 25 in scrambled order; start: a corner."""
    axis = np.array([-4.0, -2.0, 0.0, 2.0, 4.0])
    means = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    weights = 1.0 + (7.0 * np.arange(25)) % 25
    return Mixture("grid", "5 × 5 Gaussians in 2 dimensions", means, weights, 0.03, first=0)


def two_modes(dimension: int = 20) -> Mixture:
    """0.3 N(-4 e_1, I) + 0.7 N(4 e_1, I), started in the smaller one."""
    means = np.zeros((2, dimension))
    means[:, 0] = -4.0, 4.0
    return Mixture(
        "two modes", f"Two Gaussians in {dimension} dimensions", means, np.array([0.3, 0.7]), 1.0, first=0
    )


# --------------------------------------------------------------------------------------- regressions


def standardized(features: Array) -> Array:
    """Columns of mean 0 and variance 1, and a column of ones in front."""
    columns = (features - features.mean(0)) / features.std(0)
    return np.concatenate([np.ones((len(columns), 1)), columns], axis=1)


class Regression:
    """Posterior over coefficients with the prior N(0, I). The functions are theta and (theta - mean)^2."""

    modes = 1

    def __init__(self, name: str, title: str, design: Array, response: Array) -> None:
        self.name, self.title = name, title
        self.design, self.response = design, response
        self.dimension = design.shape[1]

    @property
    def moments(self) -> Moments:
        mean, variance, variance_of_square = self._posterior
        return Moments(
            np.concatenate([mean, variance]),
            np.concatenate([variance, variance_of_square]),
        )

    def functions(self, values: Array) -> Array:
        values = values.astype(np.float64)
        return np.concatenate([values, np.square(values - self._posterior[0])], axis=1)

    def start(self, chains: int, generator: np.random.Generator) -> Array:
        return generator.standard_normal((chains, self.dimension)).astype(np.float32)

    def _tensors(self) -> tuple[Tensor, Tensor]:
        return (torch.tensor(x, dtype=torch.float32) for x in (self.design, self.response))


class LinearRegression(Regression):
    """y ~ N(X theta, noise^2) with known noise: the posterior is a Gaussian in closed form."""

    def __init__(self, name: str, title: str, design: Array, response: Array, noise: float) -> None:
        super().__init__(name, title, design, response)
        self.noise = noise
        self.precision = design.T @ design / noise**2 + np.eye(self.dimension)
        self.scale = 1.0 / math.sqrt(np.linalg.eigvalsh(self.precision)[-1])

    @cached_property
    def _posterior(self) -> tuple[Array, Array, Array]:
        covariance = np.linalg.inv(self.precision)
        variance = np.diag(covariance)
        mean = covariance @ self.design.T @ self.response / self.noise**2
        return mean, variance, 2 * variance**2

    def gradient_and_energy(self) -> GradientAndEnergy:
        design, response = self._tensors()
        transposed, weight = design.t().contiguous(), 1.0 / self.noise**2
        ones = torch.full((len(design),), 0.5 * weight)
        halves = torch.full((self.dimension,), 0.5)

        def evaluate(theta: Tensor) -> tuple[Tensor, Tensor]:
            residual = torch.addmm(response, theta, transposed, beta=-1.0)
            gradient = torch.addmm(theta, residual, design, alpha=weight)
            energy = torch.mv(residual.square_(), ones).add_(torch.mv(theta * theta, halves))
            return gradient, energy

        return evaluate

    def jax_log_density(self) -> Callable[[Any], Any]:
        import jax.numpy as jnp

        design, response = (jnp.asarray(x, jnp.float32) for x in (self.design, self.response))
        weight = 1.0 / self.noise**2

        def log_density(theta: Any) -> Any:
            residual = design @ theta - response
            return -0.5 * weight * (residual @ residual) - 0.5 * (theta @ theta)

        return log_density


class LogisticRegression(Regression):
    """P(y = 1) = sigmoid(X theta), y in {0, 1}. The moments come from a long run of an exact sampler.

    Args:
        reference: mean, variance, and variance of (theta - mean)^2, each (d,), from :func:`hmc_moments`.
    """

    def __init__(
        self, name: str, title: str, design: Array, response: Array, reference: tuple | None = None
    ) -> None:
        super().__init__(name, title, design, response)
        self.reference = reference

    @property
    def _posterior(self) -> tuple[Array, Array, Array]:
        if self.reference is None:
            raise RuntimeError(f"{self.name}: compute the reference moments first (hmc_moments)")
        return self.reference

    @cached_property
    def laplace(self) -> tuple[Array, Array]:
        """Mode and Hessian of the energy there, by Newton's method."""
        theta = np.zeros(self.dimension)
        for _ in range(100):
            p = sigmoid(self.design @ theta)
            gradient = self.design.T @ (p - self.response) + theta
            hessian = (self.design.T * (p * (1 - p))) @ self.design + np.eye(self.dimension)
            theta = theta - np.linalg.solve(hessian, gradient)
        return theta, hessian

    @cached_property
    def scale(self) -> float:
        return 1.0 / math.sqrt(np.linalg.eigvalsh(self.laplace[1])[-1])

    def gradient_and_energy(self) -> GradientAndEnergy:
        design, response = self._tensors()
        transposed = design.t().contiguous()
        linear = design.t() @ response
        ones, halves = torch.ones(len(design)), torch.full((self.dimension,), 0.5)

        def evaluate(theta: Tensor) -> tuple[Tensor, Tensor]:
            logits = theta @ transposed
            energy = torch.mv(torch.nn.functional.softplus(logits), ones)
            energy.sub_(torch.mv(theta, linear)).add_(torch.mv(theta * theta, halves))
            return torch.addmm(theta - linear, logits.sigmoid_(), design), energy

        return evaluate

    def jax_log_density(self) -> Callable[[Any], Any]:
        import jax
        import jax.numpy as jnp

        design = jnp.asarray(self.design, jnp.float32)
        linear = jnp.asarray(self.design.T @ self.response, jnp.float32)

        def log_density(theta: Any) -> Any:
            return theta @ linear - jax.nn.softplus(design @ theta).sum() - 0.5 * (theta @ theta)

        return log_density

    def energy_and_gradient_float64(self, theta: Array) -> tuple[Array, Array]:
        """For :func:`hmc_moments`: theta (C, d) to (C,) and (C, d)."""
        logits = theta @ self.design.T
        energy = np.logaddexp(0.0, logits).sum(1) - logits @ self.response + 0.5 * (theta**2).sum(1)
        return energy, (sigmoid(logits) - self.response) @ self.design + theta


def sigmoid(x: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def hmc_moments(
    target: LogisticRegression, draws: int, seed: int, chains: int = 200
) -> tuple[Array, Array, Array]:
    """Moments by Hamiltonian Monte Carlo with Metropolis tests, float64, in Laplace-whitened coordinates.

    Whitened, the posterior is close to N(0, I), so trajectories of about a quarter period (with jitter)
    decorrelate at once and nearly all are accepted. This is code of its own: none of the samplers compared.

    Returns:
        Mean, variance, and variance of (theta - mean)^2, each (d,).
    """
    generator = np.random.default_rng(seed)
    mode, hessian = target.laplace
    spread = np.linalg.inv(np.linalg.cholesky(hessian)).T  # theta = mode + spread z
    z = generator.standard_normal((chains, target.dimension))

    def evaluate(z: Array) -> tuple[Array, Array]:
        energy, gradient = target.energy_and_gradient_float64(mode + z @ spread.T)
        return energy, gradient @ spread

    energy, gradient = evaluate(z)
    kept = []
    burn_in = 50
    for i in range(burn_in + math.ceil(draws / chains)):
        step = generator.uniform(0.35, 0.65)
        p = generator.standard_normal(z.shape)
        new_z, new_energy, new_gradient = z, energy, gradient
        start = energy + 0.5 * (p * p).sum(1)
        for _ in range(3):
            p = p - 0.5 * step * new_gradient
            new_z = new_z + step * p
            new_energy, new_gradient = evaluate(new_z)
            p = p - 0.5 * step * new_gradient
        accept = -generator.standard_exponential(chains) < start - new_energy - 0.5 * (p * p).sum(1)
        z = np.where(accept[:, None], new_z, z)
        energy = np.where(accept, new_energy, energy)
        gradient = np.where(accept[:, None], new_gradient, gradient)
        if i >= burn_in:
            kept.append(mode + z @ spread.T)
    theta = np.concatenate(kept)
    mean = theta.mean(0)
    squares = (theta - mean) ** 2
    return mean, squares.mean(0), squares.var(0)


def diabetes() -> LinearRegression:
    """scikit-learn's diabetes data, response standardised, noise that of the least-squares fit."""
    from sklearn.datasets import load_diabetes

    features, response = load_diabetes(return_X_y=True)
    design = standardized(features)
    response = (response - response.mean()) / response.std()
    residual = response - design @ np.linalg.lstsq(design, response, rcond=None)[0]
    return LinearRegression(
        "diabetes",
        "Linear regression, diabetes data, 11 coefficients",
        design,
        response,
        float(residual.std()),
    )


def breast_cancer(reference: tuple | None = None) -> LogisticRegression:
    """scikit-learn's breast cancer data."""
    from sklearn.datasets import load_breast_cancer

    features, response = load_breast_cancer(return_X_y=True)
    return LogisticRegression(
        "breast cancer",
        "Logistic regression, breast cancer data, 31 coefficients",
        standardized(features),
        response.astype(np.float64),
        reference,
    )
