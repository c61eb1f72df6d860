"""Derived quantities: free energies, temperatures, and the checks that warn about a run."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch

from .reference import temper_scale
from .state import FLAG_MEANINGS, State
from .tempering import ADAPTIVE, STANDARDIZED, TemperingConstants

if TYPE_CHECKING:
    from .optimizer import CTLD
    from .report import Report

Tensor = torch.Tensor
Array = np.ndarray


def report(optimizer: CTLD, closure: Callable[[], Any] | None = None) -> Report:
    """What a run looks like now: numbers, ``str(report)``, ``report.figure()`` and ``report.warnings``.

    Copies the sampler's state to the host once, which waits for the device: call it every thousand steps or
    at the end, not in every step. It changes neither parameters nor sampler.

    Args:
        optimizer: in any phase, with or without tempering and chains, also before its first step.
        closure: as for ``optimizer.step``: evaluates the model, calls backward, returns the loss. With it the
            report includes the configurational temperature, for which the gradients in ``p.grad`` must belong
            to the current parameters. Without it they are used if :class:`GradientWatch` knows that they do.

    Raises:
        TypeError: if ``optimizer`` is not a CTLD.
    """
    from .report import build  # it needs the optimizer, which needs this module

    return build(optimizer, closure)


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


def alpha_kinetic_error(samples: int, c: TemperingConstants) -> float:
    """Standard error of the mean of alpha_momentum**2 over ``samples`` visits; infinite for none.

    Successive values are correlated over (1+p^2)/(1-p^2) steps, p the persistence; the variance of a
    squared standard normal is 2.
    """
    p2 = c.persistence**2
    return math.sqrt(2.0 * (1 + p2) / (1 - p2) / samples) if samples else math.inf


def alpha_kinetic_report(state: State, c: TemperingConstants) -> str | None:
    """A warning if the mean of alpha_momentum**2 is outside 1 +- 0.1 by more than four standard errors."""
    samples = int(state.samples)
    if c.bins == 0 or samples == 0:
        return None
    error = alpha_kinetic_error(samples, c)
    mean = float(state.alpha_kinetic)
    if error > 0.1 or abs(mean - 1.0) <= 0.1 + 4 * error:
        return None
    return (
        f"the mean of alpha_momentum**2 is {mean:.3f} instead of 1: alpha is "
        f"{'heated, most likely by minibatch noise in the energy' if mean > 1 else 'cold'}; use larger "
        "batches, a smaller step_size, energy_noise, or coupling='standardized'"
    )


# ------------------------------------------------------------------------------------- temperatures


class Ratio(NamedTuple):
    """An estimate that should be 1, with its standard error; NaN where it is not known."""

    value: float
    error: float

    def __str__(self) -> str:
        return "n/a" if math.isnan(self.value) else f"{self.value:.3f} +- {self.error:.3f}"

    def off(self, direction: int) -> bool:
        """Whether it is above (+1) or below (-1) 1 by more than 10 % and more than four standard errors."""
        excess = direction * (self.value - 1.0)
        return excess > 0.1 and excess > 4.0 * self.error


UNKNOWN = Ratio(math.nan, math.nan)


def momentum_line(integrator: str, momentum: float, damped: Array) -> tuple[Array, Array]:
    """a and b of T_theta/T = a + b <p^2>/T: what temperature of the parameters the stored momenta imply.

    ``damped`` is the share mu' of p kept per step: ``momentum`` (mu) itself, or less with a thermostat,
    (C,). Exact on quadratics for gradient noise of any strength, whatever curvature and learning rate are.

    ``baoab``: the injected noise alone brings p and theta to the same temperature, J = (1-mu^2)/(1-mu'^2)
    times T. Without noise the step conserves E = <x^2> + (1 - B) <p^2> (docs/method.md, section 2, with B
    for its b). Gradient noise that gives each kick a variance G adds G to E; keeping mu' of the kicked
    momentum takes (1 - B) (1/mu'^2 - 1) P, with P the excess of the stored <p^2>. So
    P = mu'^2/(1-mu'^2) G/(1-B), and the Lyapunov equation gives the excess of theta,
    (1+mu')/(4 (1-mu')) G/(1-B). P is the share S = (2 mu'/(1+mu'))^2 of it: b = 1/S, a = J (1 - 1/S).
    Unknown (NaN) for mu' = 0, where p is redrawn in every step.

    ``euler``: <x^2> = (1+mu')/(1+mu) <p^2> by the first two equations of that section, which the noise of
    the gradient does not enter.
    """
    if integrator == "euler":
        return np.zeros_like(damped), (1.0 + damped) / (1.0 + momentum)
    share = np.where(damped > 0, (2.0 * damped / (1.0 + damped)) ** 2, math.nan)
    injected = (1.0 - momentum**2) / (1.0 - damped**2)
    return injected * (1.0 - 1.0 / share), 1.0 / share


class GradientWatch:
    """Knows whether the gradients in ``p.grad`` belong to the current parameters.

    They do between backward() and step(); nothing in them says so. Therefore a hook remembers after every
    step which gradient it used, by a weak reference and the version counter, and the version of the
    parameter: for one parameter only, so that it costs microseconds however many there are. A report starts
    the watch of its optimizer. To have the configurational temperature in the first report already, call
    ``GradientWatch.of(optimizer)`` before the first step.
    """

    _all: ClassVar[weakref.WeakKeyDictionary[Any, GradientWatch]] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self._stepped = False
        self._seen: tuple[Tensor, int, weakref.ref[Tensor], int] | None = None

    @classmethod
    def of(cls, optimizer: CTLD) -> GradientWatch:
        """The watch of an optimizer, which begins now if there was none."""
        if optimizer not in cls._all:
            cls._all[optimizer] = watch = cls()
            optimizer.register_step_post_hook(watch._after_step)
        return cls._all[optimizer]

    def _after_step(self, optimizer: CTLD, args: Any, kwargs: Any) -> None:
        self._stepped, self._seen = True, None
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.requires_grad:
                    self._seen = (p, p._version, weakref.ref(p.grad), p.grad._version)
                    return

    def complaint(self, steps: int) -> str | None:
        """Why gradients that exist may not be used after ``steps`` steps, or None."""
        if steps == 0:
            return None
        if not self._stepped:
            return "not known to which parameters the gradients belong: pass a closure, or see GradientWatch"
        if self._seen is None:  # the last step had no gradients, so these are new
            return None
        p, version, gradient, gradient_version = self._seen
        if p._version != version:
            return "a parameter was changed since the last step"
        if p.grad is None or (p.grad is gradient() and p.grad._version == gradient_version):
            return "the gradients are those of the last step: pass a closure, or call it after backward()"
        return None


# --------------------------------------------------------------------------------------- the histogram


class Flatness(NamedTuple):
    """How far the histogram of |alpha| is from uniform; NaN without visits.

    ``lowest``, ``highest``: visits of a bin over the mean. ``largest_deviation``: the larger of highest - 1
    and 1 - lowest. ``total_variation``: the share of the visits that would have to be elsewhere.
    ``empty``: bins never visited.
    """

    lowest: float
    highest: float
    largest_deviation: float
    total_variation: float
    empty: int


def flatness(visits: Tensor) -> Flatness:
    """Describes a histogram, int64 (B,)."""
    if int(visits.sum()) == 0:
        return Flatness(math.nan, math.nan, math.nan, math.nan, visits.numel())
    relative = visits.double() / visits.double().mean()
    lowest, highest = float(relative.min()), float(relative.max())
    return Flatness(
        lowest,
        highest,
        max(highest - 1.0, 1.0 - lowest),
        0.5 * float((relative - 1.0).abs().mean()),
        int((visits == 0).sum()),
    )


def share_in_window(c: TemperingConstants) -> Tensor:
    """The share of each bin that lies in the window |alpha| <= flat, float64 (B,)."""
    edge = torch.full((c.bins,), c.flat * c.inverse_bin_width, dtype=torch.float64)
    return (edge - torch.arange(c.bins)).clamp(0.0, 1.0)


def window_fraction(visits: Tensor, c: TemperingConstants) -> float:
    """Share of the visits inside the window, as if uniform in a bin that its edge divides; NaN for none."""
    total = int(visits.sum())
    return float((visits * share_in_window(c)).sum()) / total if total else math.nan
