"""Targets with closed-form gradients and known laws, at T0 = 1 and N = 1."""

from __future__ import annotations

import math

import numpy as np
import torch

Tensor = torch.Tensor


class Gaussian:
    """U = sum of curvature/2 theta^2. A target is called as (theta (C, d), gradient (C, d), written)."""

    def __init__(self, curvatures: np.ndarray) -> None:
        self.curvatures = np.asarray(curvatures, dtype=float)
        flat = np.all(self.curvatures == self.curvatures[0])
        self._k = float(self.curvatures[0]) if flat else torch.from_numpy(self.curvatures).float()

    @property
    def dimension(self) -> int:
        return self.curvatures.size

    @property
    def energy_shape(self) -> float:
        """beta U has a gamma law of this shape at every temperature."""
        return 0.5 * self.dimension

    def __call__(self, theta: Tensor, gradient: Tensor) -> Tensor:
        """Energies, float64 (C,)."""
        torch.mul(theta, self._k, out=gradient)
        return 0.5 * torch.linalg.vecdot(theta, gradient).double()

    def draw(self, scale: Tensor, generator: torch.Generator) -> Tensor:
        """One draw per chain at temperature ``scale``^2, (C, d)."""
        normal = torch.randn(scale.numel(), self.dimension, generator=generator)
        return normal * scale[:, None].float() * torch.from_numpy(self.curvatures**-0.5).float()

    def free_energy(self, log_beta: np.ndarray) -> np.ndarray:
        """ln Z(beta)/Z(1)."""
        return -0.5 * self.dimension * log_beta


def isotropic(dimension: int) -> Gaussian:
    return Gaussian(np.ones(dimension))


def anisotropic(dimension: int, condition: float) -> Gaussian:
    """Curvatures from 1/condition to 1, evenly spaced in the logarithm."""
    return Gaussian(np.geomspace(1.0 / condition, 1.0, dimension))


class Quartic:
    """U = sum of theta^4/4."""

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension

    @property
    def energy_shape(self) -> float:
        return 0.25 * self.dimension

    def __call__(self, theta: Tensor, gradient: Tensor) -> Tensor:
        torch.pow(theta, 3, out=gradient)
        return 0.25 * torch.linalg.vecdot(theta, gradient).double()

    def draw(self, scale: Tensor, generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(1 << 62, (), generator=generator))
        rng = np.random.default_rng(seed)
        shape = (scale.numel(), self.dimension)
        size = (4.0 * rng.standard_gamma(0.25, shape)) ** 0.25 * rng.choice([-1.0, 1.0], shape)
        return torch.from_numpy(size).float() * scale[:, None].sqrt().float()


class Mixture:
    """``weight`` N(-separation/2 e_0, 1) + (1 - weight) N(separation/2 e_0, 1)."""

    def __init__(self, dimension: int, separation: float = 8.0, weight: float = 0.3) -> None:
        self.dimension, self.separation, self.weight = dimension, separation, weight
        self._log_odds = math.log(1.0 / weight - 1.0)

    def __call__(self, theta: Tensor, gradient: Tensor) -> Tensor:
        x, half = theta[:, 0], 0.5 * self.separation
        log_ratio = self.separation * x + self._log_odds  # of right to left
        gradient.copy_(theta)
        gradient[:, 0] += half - self.separation * torch.sigmoid(log_ratio)
        energy = 0.5 * torch.linalg.vecdot(theta, theta) + half * x
        return (energy - torch.nn.functional.softplus(log_ratio)).double()

    def draw(self, scale: Tensor, generator: torch.Generator) -> Tensor:
        """One draw per chain at temperature 1: ``scale`` only says how many."""
        theta = torch.randn(scale.numel(), self.dimension, generator=generator)
        left = torch.rand(scale.numel(), generator=generator) < self.weight
        theta[:, 0] += torch.where(left, -0.5, 0.5) * self.separation
        return theta

    @property
    def left(self) -> float:
        """P(theta_0 < 0)."""
        tail = 0.5 * math.erfc(0.5 * self.separation / math.sqrt(2.0))
        return self.weight * (1.0 - tail) + (1.0 - self.weight) * tail

    def free_energy(self, log_beta: np.ndarray) -> np.ndarray:
        """ln Z(beta)/Z(1): Gaussian in all directions but the first, which is integrated on a grid."""
        x = np.linspace(-60.0, 60.0, 40_001)
        along = 0.5 * x * x + 0.5 * self.separation * x
        along = along - np.logaddexp(0.0, self.separation * x + self._log_odds)

        def log_integral(beta: float) -> float:
            return float(np.logaddexp.reduce(-beta * along))

        first = np.array([log_integral(math.exp(b)) for b in np.atleast_1d(log_beta)])
        return first - log_integral(1.0) - 0.5 * (self.dimension - 1) * np.atleast_1d(log_beta)


def make(settings: dict) -> Gaussian | Quartic | Mixture:
    """The target named in ``settings``: "target", "dimension" and, for some, "condition"."""
    name, dimension = settings.get("target", "isotropic"), settings["dimension"]
    if name == "anisotropic":
        return anisotropic(dimension, settings["condition"])
    return {"isotropic": isotropic, "quartic": Quartic, "mixture": Mixture}[name](dimension)
