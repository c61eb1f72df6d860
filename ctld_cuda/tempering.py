"""Configuration of the tempering coordinate alpha and of the bias that keeps it moving."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

ADAPTIVE, STANDARDIZED, FULL = "adaptive", "standardized", "full"


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Metadynamics:
    """Metadynamics (Laio and Parrinello 2002): hills deposited where alpha has been push it on.

    Every step adds a hill of shape (1/2, 1, 1/2) over the bins around |alpha|, mirrored at 0 and at
    the limit. Its height is ``min(height, gain * bins / t)`` at step t, for all chains together: a
    stochastic approximation whose bias converges.

    Args:
        height: largest hill, in nats. The default 0.02 disturbs alpha's motion (kT = 1) by little.
        gain: numerator of the decay; at least 1, below which the bias freezes before it is right.
    """

    height: float = 0.02
    gain: float = 2.0

    def __post_init__(self) -> None:
        _check(_finite(self.height) and self.height > 0, f"height must be positive, got {self.height!r}")
        _check(_finite(self.gain) and self.gain >= 1, f"gain must be at least 1, got {self.gain!r}")


@dataclass(frozen=True)
class AdaptiveForce:
    """Subtracts the running mean energy of each bin of |alpha|, so that only fluctuations push alpha.

    Args:
        residual: a :class:`Metadynamics` that removes what the mean force leaves (the error of the
            running means, the discretisation in bins), or None for no hills.
    """

    residual: Metadynamics | None = field(default_factory=Metadynamics)

    def __post_init__(self) -> None:
        ok = self.residual is None or isinstance(self.residual, Metadynamics)
        _check(ok, f"residual must be Metadynamics or None, got {self.residual!r}")


@dataclass(frozen=True)
class Tempering:
    """How the temperature becomes a dynamical variable: T(alpha) = T0 / beta(alpha), |alpha| <= limit.

    sqrt(T/T0) is a smoothstep in |alpha| from 1 on the window |alpha| <= flat to
    sqrt(max_temperature) at the limit.

    Args:
        max_temperature: hottest temperature, in multiples of the optimizer's ``temperature``; > 1.
        flat: half-width of the window in which T = T0; states there are draws from the target.
        limit: reflecting wall for |alpha|.
        bins: bins of the grid over [0, limit] on which the bias is learned; at least 4.
        step_size: time step of alpha. None: ``min(0.02, 0.5 / (max|beta'/beta| * sqrt(d/2)))`` in exact
            mode, which keeps the thermal kick of d parameters below alpha's own scale; 0.005 in
            standardized mode.
        persistence: share of alpha's momentum kept per step, in [0, 1).
        coupling: "standardized" (deep networks: alpha feels ``coupling_strength`` times the energy's
            deviation from its bin's running mean, in units of its spread, clipped at 3) or "exact"
            (alpha feels the energy itself: the extended density is sampled exactly).
        bias: :class:`AdaptiveForce` or :class:`Metadynamics`. With the standardized coupling the mean
            energy is subtracted in any case, so only the hills of the two differ.
        settle: consecutive steps in the window before ``at_target`` holds. None: ``ceil(5/(1-momentum))``
            in standardized mode (five momentum relaxation times), 0 in exact mode.
        coupling_strength: kappa of the standardized coupling, in nats per standard deviation.
        energy_noise: known standard deviation, in nats, of the minibatch noise in the energy (exact mode
            only). Its heat is subtracted from alpha's own noise.

    Raises:
        ValueError: for any value outside the ranges above.
    """

    max_temperature: float = 10.0
    flat: float = 0.4
    limit: float = 1.5
    bins: int = 60
    step_size: float | None = None
    persistence: float = 0.98
    coupling: str = "standardized"
    bias: AdaptiveForce | Metadynamics = field(default_factory=AdaptiveForce)
    settle: int | None = None
    coupling_strength: float = 1.0
    energy_noise: float = 0.0

    def __post_init__(self) -> None:
        _check(
            _finite(self.max_temperature) and self.max_temperature > 1,
            f"max_temperature is a multiple of temperature and must exceed 1, got {self.max_temperature!r}",
        )
        _check(
            _finite(self.flat) and _finite(self.limit) and 0 < self.flat < self.limit,
            f"0 < flat < limit is required, got flat={self.flat!r}, limit={self.limit!r}",
        )
        _check(
            isinstance(self.bins, int) and not isinstance(self.bins, bool) and self.bins >= 4,
            f"bins must be an integer of at least 4, got {self.bins!r}",
        )
        _check(
            self.step_size is None or (_finite(self.step_size) and self.step_size > 0),
            f"step_size must be positive or None, got {self.step_size!r}",
        )
        _check(
            _finite(self.persistence) and 0 <= self.persistence < 1,
            f"persistence must be in [0, 1), got {self.persistence!r}",
        )
        _check(
            self.coupling in ("standardized", "exact"),
            f"coupling must be 'standardized' or 'exact', got {self.coupling!r}",
        )
        _check(
            isinstance(self.bias, (AdaptiveForce, Metadynamics)),
            f"bias must be AdaptiveForce or Metadynamics, got {self.bias!r}",
        )
        _check(
            self.settle is None or (isinstance(self.settle, int) and self.settle >= 0),
            f"settle must be a non-negative integer or None, got {self.settle!r}",
        )
        _check(
            _finite(self.coupling_strength) and self.coupling_strength > 0,
            f"coupling_strength must be positive, got {self.coupling_strength!r}",
        )
        _check(
            _finite(self.energy_noise) and self.energy_noise >= 0,
            f"energy_noise must be non-negative, got {self.energy_noise!r}",
        )
        _check(
            self.energy_noise == 0 or self.coupling == "exact",
            "energy_noise applies to coupling='exact' only",
        )

    @property
    def hills(self) -> Metadynamics | None:
        """The hills in force, or None."""
        return self.bias if isinstance(self.bias, Metadynamics) else self.bias.residual


@dataclass(frozen=True)
class TemperingConstants:
    """A :class:`Tempering` resolved into the numbers that every backend computes with."""

    base_temperature: float
    energy_scale: float
    scale_range: float
    flat: float
    limit: float
    inverse_ramp: float
    bins: int
    inverse_bin_width: float
    step_size: float
    persistence: float
    noise_variance: float
    noise_scale: float
    energy_noise: float
    coupling: str
    coupling_strength: float
    hill_height: float
    hill_gain: float
    settle: int
    kinetic_exponent: int
    prior_exponent: int
    energy_exponent: int

    def bin_centers(self) -> np.ndarray:
        """Centres of the bins of |alpha|, float64 (bins,)."""
        return (np.arange(self.bins) + 0.5) / self.inverse_bin_width


def _relaxation_steps(momentum: float) -> int:
    """Five momentum relaxation times, ceil(5/(1-momentum)); rounded first, so that 0.9 gives 50, not 51."""
    return math.ceil(round(5 / (1 - momentum), 6))


def _coupling(tempering: Tempering) -> str:
    if tempering.coupling == "standardized":
        return STANDARDIZED
    return ADAPTIVE if isinstance(tempering.bias, AdaptiveForce) else FULL


def steepest_slope(tempering: Tempering) -> float:
    """max |beta'/beta| over alpha, = max 2 q'/q with q = sqrt(T/T0)."""
    z = np.linspace(0.0, 1.0, 4001)
    gap = math.sqrt(tempering.max_temperature) - 1.0
    q = 1.0 + gap * z * z * (3.0 - 2.0 * z)
    slope = gap * 6.0 * z * (1.0 - z) / (tempering.limit - tempering.flat)
    return float((2.0 * slope / q).max())


def default_step_size(tempering: Tempering, dimension: float) -> float:
    """Step of alpha for ``dimension`` parameters per chain; see ``step_size`` of :class:`Tempering`."""
    if tempering.coupling == "standardized":
        return 0.005
    thermal_spread = math.sqrt(max(dimension, 1.0) / 2.0)
    return min(0.02, 0.5 / (steepest_slope(tempering) * thermal_spread))


def fixed_point_exponent(largest: float) -> int:
    """s such that an energy of ``largest`` nats is at most 2**29 quanta of 2**-s; 20 for largest = 0."""
    return math.floor(29 - math.log2(largest)) if largest > 0 else 20


def resolve(
    tempering: Tempering | None,
    *,
    temperature: float,
    num_data: float,
    maximize: bool,
    momentum: float,
    weight_decay: float,
    dimension: float,
    preconditioned: bool = False,
) -> TemperingConstants:
    """Numbers for the backends; ``tempering=None`` gives a coordinate that never leaves alpha = 0.

    ``dimension`` counts the parameters of one chain; ``momentum`` and ``weight_decay`` are the largest
    of all groups. Without noise (temperature 0) energies are those at temperature 1. The fixed-point
    exponents leave room for momenta of 128 standard deviations at the highest temperature (the first
    gradients are large) and for parameters of magnitude 64. The magnitude of preconditioned parameters says
    nothing; they have quanta of 2**-8 nats at least, room for two million nats each.
    """
    moving = tempering is not None
    t = Tempering() if tempering is None else tempering
    hottest = temperature * (t.max_temperature if moving else 1.0)
    prior_curvature = num_data * weight_decay / temperature if temperature > 0 else 0.0
    standardized = t.coupling == "standardized"
    settle = t.settle if t.settle is not None else (_relaxation_steps(momentum) if standardized else 0)
    hills = t.hills if moving else None
    noise_variance = 1.0 - t.persistence * t.persistence
    prior_exponent = min(20, fixed_point_exponent(0.5 * 64.0**2 * prior_curvature))
    return TemperingConstants(
        base_temperature=float(temperature),
        energy_scale=(-num_data if maximize else num_data) / (temperature if temperature > 0 else 1.0),
        scale_range=math.sqrt(t.max_temperature) - 1.0 if moving else 0.0,
        flat=float(t.flat),
        limit=float(t.limit),
        inverse_ramp=1.0 / (t.limit - t.flat),
        bins=t.bins if moving else 0,
        inverse_bin_width=t.bins / t.limit,
        step_size=float(t.step_size if t.step_size is not None else default_step_size(t, dimension)),
        persistence=float(t.persistence),
        noise_variance=noise_variance,
        noise_scale=math.sqrt(noise_variance),
        energy_noise=float(t.energy_noise),
        coupling=_coupling(t),
        coupling_strength=float(t.coupling_strength),
        hill_height=hills.height if hills else 0.0,
        hill_gain=hills.gain if hills else 0.0,
        settle=settle if moving else 0,
        kinetic_exponent=fixed_point_exponent(0.5 * 128.0**2 * hottest),
        prior_exponent=max(prior_exponent, 8) if preconditioned else prior_exponent,
        energy_exponent=20,
    )
