"""The report on a run: what the sampler's state says, in numbers, in words and in one figure."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from . import diagnostics
from .diagnostics import UNKNOWN, Flatness, GradientWatch, Ratio
from .energy import Verdict, judge
from .optimizer import CTLD
from .reference import compute_dtype, damped_momentum, temper_scale
from .state import EXPLORE, NONFINITE_PARAMETER, State
from .tempering import TemperingConstants

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Tensor = torch.Tensor
Array = np.ndarray

FEW_ROUND_TRIPS = 10
FAR_FROM_FLAT = 2.0  # a factor, in either direction
DISAGREEMENT = 1.0  # nats between the free energies: a factor e in the density of alpha
CHAINS_FOR_SPREAD = 8  # from here on the spread over chains gives a usable standard error


class ParameterGroup(NamedTuple):
    """A parameter group: position, trainable scalars of one chain, momentum, temperatures over T.

    ``balance`` is the value of ``kinetic`` at which the parameters are at T: 1 without a thermostat.
    """

    index: int  # type: ignore[assignment]  # a tuple's method, not needed here
    dimension: float
    momentum: float
    kinetic: Ratio
    balance: float
    implied: Ratio


@dataclass(frozen=True, eq=False)
class Report:
    """What :func:`ctld_cuda.diagnostics.report` found; C chains (1 without chains), B bins (0 untempered).

    Temperatures are in the units of ``CTLD(temperature=...)``, energies and free energies in nats. A
    :class:`~ctld_cuda.diagnostics.Ratio` should be 1. What is not known is NaN, or None for ``turns``.

    Attributes:
        phase: "explore" or "finetune".
        steps: steps of both phases.
        samples: visits that the histogram counted, of all chains.
        chains, dimension: C, and the trainable scalars of one chain.
        integrator, coupling, thermostat: the options; coupling is None without tempering.
        base_temperature: T0.
        temperature: T(alpha) of the last sampling step, (C,).
        kinetic_temperature: |p|^2/d after that step, (C,).
        kinetic: its ratio to T, mean over chains; the standard error is sqrt(2/(d C)).
        balance: the value of ``kinetic`` at which the parameters are at T: 1, but with a thermostat less
            under ``baoab`` and more under ``euler``.
        implied: the temperature of the parameters over T that ``kinetic`` implies, by
            :func:`~ctld_cuda.diagnostics.momentum_line`. Not known for ``baoab`` with momentum 0 and
            once the noise is off.
        groups: the same per parameter group; empty unless exploring.
        configurational_temperature: theta . grad(N L + prior)/d, (C,); its mean is T(alpha) for any density
            that vanishes at infinity (the virial theorem).
        configurational: its ratio to T, mean over chains. The standard error is the spread over chains; below
            8 chains sqrt(2/(d C)), which holds for a Gaussian around 0 and is too small around other points.
        configurational_note: why these are NaN, or "".
        alpha: (C,).
        at_target: bool, (C,).
        turns: alternating arrivals at the hottest bin and in the window, int64 (C,).
        window: half-width of the window.
        window_fraction, window_expected: share of the visits inside it, and what a flat histogram gives.
        bin_centers, bin_temperatures: |alpha| and T at the centres, (B,).
        visits: histogram of |alpha|, int64 (B,).
        flatness: how far it is from uniform.
        alpha_kinetic: mean of alpha_momentum**2 over the run.
        alpha_kinetic_warning: what is wrong with it, or None.
        free_energy, free_energy_histogram: two estimates of ln Z(beta)/Z(1), (B,).
        free_energy_difference: the largest difference between them where both are finite.
        energy_mean, energy_spread: mean and standard deviation of U, (B,), the latter from the mean absolute
            deviation as for a Gaussian. Bins never visited copy the nearest.
        window_energy, window_energy_spread: their means over the visits of the window.
        energy_noise: what must be added to a harmonic target's spread, sqrt(d/2) nats, to give that of the
            window, in nats, if it is more than sqrt(d/2) itself; NaN if not. Minibatch noise, or a target far
            from harmonic.
        energy_verdict: :func:`ctld_cuda.energy.judge` on that noise, or None (also if standardized).
        flags: what the flags that are set mean.
    """

    phase: str
    steps: int
    samples: int
    chains: int
    dimension: float
    integrator: str
    coupling: str | None
    thermostat: bool
    base_temperature: float
    temperature: Array
    kinetic_temperature: Array
    kinetic: Ratio
    balance: float
    implied: Ratio
    groups: list[ParameterGroup]
    configurational_temperature: Array
    configurational: Ratio
    configurational_note: str
    alpha: Array
    at_target: Array
    turns: Array | None
    window: float
    window_fraction: float
    window_expected: float
    bin_centers: Array
    bin_temperatures: Array
    visits: Array
    flatness: Flatness
    alpha_kinetic: Ratio
    alpha_kinetic_warning: str | None
    free_energy: Array
    free_energy_histogram: Array
    free_energy_difference: float
    energy_mean: Array
    energy_spread: Array
    window_energy: float
    window_energy_spread: float
    energy_noise: float
    energy_verdict: Verdict | None
    flags: list[str]

    @property
    def round_trips(self) -> int | None:
        """Trips of alpha from the window to the hottest bin and back, of all chains."""
        return None if self.turns is None else int((self.turns // 2).sum())

    @property
    def thermal_spread(self) -> float:
        """sqrt(d/2) nats: the standard deviation of U in the window of a harmonic target."""
        return math.sqrt(self.dimension / 2.0)

    @functools.cached_property
    def warnings(self) -> list[str]:
        """What needs attention, one sentence each."""
        return list(_warnings(self))

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def figure(self) -> Figure:
        """A matplotlib figure: temperatures, histogram of alpha, energies, free energies (exact mode).

        Raises:
            ImportError: without matplotlib, which the extra "examples" installs.
        """
        return _figure(self)


# ---------------------------------------------------------------------------------------------- numbers


def build(optimizer: CTLD, closure: Callable[[], Any] | None = None) -> Report:
    """See :func:`ctld_cuda.diagnostics.report`."""
    if not isinstance(optimizer, CTLD):
        raise TypeError(f"report() describes a CTLD optimizer, got {type(optimizer).__name__}")
    state = _on_host(optimizer._sampler)
    c: TemperingConstants = optimizer._constants
    return Report(
        phase=optimizer.phase,
        steps=int(state.step),
        samples=int(state.samples),
        chains=state.alpha.numel(),
        dimension=optimizer._dimension,
        integrator=optimizer.integrator,
        coupling=optimizer.tempering.coupling if optimizer.tempering else None,
        thermostat=optimizer.thermostat,
        base_temperature=c.base_temperature,
        flags=diagnostics.flag_report(int(state.flags)),
        **_temperatures(optimizer, closure, state, c),
        **_alpha(optimizer, state, c),
        **_energies(optimizer, state, c),
    )


def _on_host(state: State) -> State:
    """A copy that later steps do not change."""
    return State(
        **{name: tensor.detach().to("cpu", copy=True) for name, tensor in state.all_tensors().items()}
    )


def _temperatures(
    optimizer: CTLD, closure: Callable[[], Any] | None, state: State, c: TemperingConstants
) -> dict[str, Any]:
    # not state.temperature, which is 0 once the noise is off
    temperature = (c.base_temperature * temper_scale(state.alpha, c).square()).numpy()
    kinetic_temperature = optimizer.tempering_state()["kinetic_temperature"].reshape(-1).cpu().numpy()
    # before the first sampling step; and the sum counts NaN as a large number
    if not state.kinetic.any() or int(state.flags) & NONFINITE_PARAMETER:
        kinetic_temperature = np.full_like(temperature, math.nan)
    dimension = optimizer._dimension
    groups: list[ParameterGroup] = []
    if optimizer.phase == EXPLORE and not np.isnan(kinetic_temperature).any():
        groups = list(_parameter_groups(optimizer, state, temperature))
    configurational_temperature, note = _configurational(optimizer, closure, int(state.step))
    dimension = optimizer._dimension
    return dict(
        temperature=temperature,
        kinetic_temperature=kinetic_temperature,
        kinetic=_over(temperature, kinetic_temperature, dimension),
        groups=groups,
        **_all_groups(groups),
        configurational_temperature=configurational_temperature,
        configurational=_with_spread(temperature, configurational_temperature, dimension),
        configurational_note=note,
    )


def _over(temperature: Array, measured: Array, dimension: float) -> Ratio:
    """Mean over chains of measured/temperature, with the standard error of a mean of dC squared normals."""
    if dimension == 0 or not (temperature > 0).all():
        return UNKNOWN
    value = float((measured / temperature).mean())
    return UNKNOWN if math.isnan(value) else Ratio(value, math.sqrt(2.0 / (dimension * len(temperature))))


def _with_spread(temperature: Array, measured: Array, dimension: float) -> Ratio:
    """The same with the standard error from the spread over chains, if there are enough of them."""
    ratio = _over(temperature, measured, dimension)
    if math.isnan(ratio.value) or len(temperature) < CHAINS_FOR_SPREAD:
        return ratio
    return Ratio(ratio.value, float((measured / temperature).std(ddof=1)) / math.sqrt(len(temperature)))


def _trainable(group: dict[str, Any]) -> list[Tensor]:
    return [p for p in group["params"] if p.requires_grad and p.numel() > 0]


def _parameter_groups(optimizer: CTLD, state: State, temperature: Array) -> Iterator[ParameterGroup]:
    """Temperatures from the momenta themselves, summed on their device."""
    chains = len(temperature)
    for index, group in enumerate(optimizer.param_groups):
        momenta = [optimizer.state[p].get("momentum_buffer") for p in _trainable(group)]
        momenta = [m for m in momenta if m is not None]  # of a group just added
        dimension = sum(m.numel() for m in momenta) / chains
        if dimension == 0:
            continue
        squares = sum(
            torch.linalg.vector_norm(m.reshape(chains, -1), dim=1, dtype=torch.float64).square()
            for m in momenta
        )
        measured = squares.cpu().numpy() / dimension
        momentum = float(group["momentum"])
        damped = torch.full((chains,), momentum, dtype=torch.float64)
        if optimizer.thermostat:
            relative = torch.from_numpy(temperature) / optimizer.temperature
            damped = damped_momentum(momentum, state.friction[:, index], relative)
        a, b = diagnostics.momentum_line(optimizer.integrator, momentum, damped.numpy())
        kinetic = _over(temperature, measured, dimension)
        # if theta is at T, <p^2>/T is (1 - a)/b, and b times its standard error (1 - a) sqrt(2/d)
        implied = Ratio(
            float((a + b * measured / temperature).mean()),
            math.sqrt(float(((1.0 - a) ** 2).mean())) * kinetic.error,
        )
        balance = 1.0 if not optimizer.thermostat else float(((1.0 - a) / b).mean())
        yield ParameterGroup(index, dimension, momentum, kinetic, balance, implied)


def _all_groups(groups: list[ParameterGroup]) -> dict[str, Any]:
    """Means over the groups, weighted with their parameters."""
    total = sum(g.dimension for g in groups)
    if total == 0:
        return dict(balance=math.nan, implied=UNKNOWN)
    weights = [g.dimension / total for g in groups]
    value = sum(w * g.implied.value for w, g in zip(weights, groups, strict=True))
    error = math.hypot(*(w * g.implied.error for w, g in zip(weights, groups, strict=True)))
    balance = sum(w * g.balance for w, g in zip(weights, groups, strict=True))
    return dict(balance=balance, implied=UNKNOWN if math.isnan(value) else Ratio(value, error))


def _configurational(optimizer: CTLD, closure: Callable[[], Any] | None, steps: int) -> tuple[Array, str]:
    """theta . grad(N L + prior)/d per chain, or NaN and the reason."""
    chains = optimizer._sampler.alpha.numel()
    nothing = np.full(chains, math.nan)
    if optimizer.phase != EXPLORE:
        return nothing, "the noise is off"
    watch = GradientWatch.of(optimizer)
    if closure is not None:
        with torch.enable_grad():
            closure()
    parameters = [(group, p) for group in optimizer.param_groups for p in _trainable(group)]
    gradients = [p.grad for _, p in parameters if p.grad is not None]
    if not gradients or any(g.layout != torch.strided for g in gradients):
        return nothing, "there are no gradients" if not gradients else "a gradient is not dense"
    complaint = None if closure is not None else watch.complaint(steps)
    if complaint:
        return nothing, complaint
    if not torch.stack([g.detach().any() for g in gradients]).any():
        return nothing, "all gradients are zero"
    virial = torch.zeros(chains, dtype=torch.float64, device=optimizer._device)
    with torch.no_grad():
        for group, p in parameters:
            virial += _virial(group, p, chains)
    if not torch.isfinite(virial).all():
        return nothing, "a gradient or parameter is not finite"
    return (virial * (optimizer.num_data / optimizer._dimension)).cpu().numpy(), ""


def _virial(group: dict[str, Any], p: Tensor, chains: int) -> Tensor:
    """theta . (grad L + lambda theta) of one parameter, float64 (C,)."""
    theta = p.to(compute_dtype(p)).reshape(chains, -1)
    slope = theta * float(group["weight_decay"])
    if p.grad is not None:
        gradient = p.grad.to(theta.dtype).reshape(chains, -1)
        slope = slope - gradient if group["maximize"] else slope + gradient
    return (theta * slope).sum(1, dtype=torch.float64)


def _alpha(optimizer: CTLD, state: State, c: TemperingConstants) -> dict[str, Any]:
    samples = int(state.samples)
    centers = diagnostics.bin_centers(state, c) if c.bins else state.hills
    mean_square = Ratio(float(state.alpha_kinetic), diagnostics.alpha_kinetic_error(samples, c))
    return dict(
        alpha=state.alpha.numpy(),
        at_target=optimizer.tempering_state()["at_target"].reshape(-1).cpu().numpy(),
        turns=state.turns.numpy() if c.bins else None,
        window=c.flat,
        window_fraction=diagnostics.window_fraction(state.visits, c),
        window_expected=c.flat / c.limit,
        bin_centers=centers.numpy(),
        bin_temperatures=(c.base_temperature * temper_scale(centers, c).square()).numpy(),
        visits=state.visits.numpy(),
        flatness=diagnostics.flatness(state.visits),
        alpha_kinetic=mean_square if samples else UNKNOWN,
        alpha_kinetic_warning=diagnostics.alpha_kinetic_report(state, c),
    )


def _energies(optimizer: CTLD, state: State, c: TemperingConstants) -> dict[str, Any]:
    free_energy = diagnostics.free_energy(state, c) if c.bins else state.hills
    histogram = diagnostics.free_energy_histogram(state, c) if c.bins else state.hills
    difference = (free_energy - histogram).abs()
    difference = difference[difference.isfinite()]
    spread = state.energy_spread * math.sqrt(math.pi / 2)
    in_window = diagnostics.share_in_window(c) * state.visits
    visits = float(in_window.sum())

    def mean(table: Tensor) -> float:
        return float((in_window * table).sum()) / visits if visits else math.nan

    thermal_variance, variance = optimizer._dimension / 2.0, mean(spread) ** 2
    noise = math.sqrt(variance - thermal_variance) if variance > 2.0 * thermal_variance else math.nan
    exact = optimizer.tempering is not None and optimizer.tempering.coupling == "exact"
    judged = exact and not math.isnan(noise)
    return dict(
        energy_noise=noise,
        energy_verdict=judge(optimizer, noise) if judged else None,
        free_energy=free_energy.numpy(),
        free_energy_histogram=histogram.numpy(),
        free_energy_difference=float(difference.max()) if len(difference) else math.nan,
        energy_mean=state.energy_mean.numpy(),
        energy_spread=spread.numpy(),
        window_energy=mean(state.energy_mean),
        window_energy_spread=mean(spread),
    )


# ------------------------------------------------------------------------------------------------ words


def _warnings(r: Report) -> Iterator[str]:
    yield from _temperature_warnings(r)
    yield from r.flags
    if r.alpha_kinetic_warning:
        yield r.alpha_kinetic_warning
    if r.coupling is not None and r.samples:
        yield from _histogram_warnings(r)


def _temperature_warnings(r: Report) -> Iterator[str]:
    if r.thermostat and math.isnan(r.implied.value):
        return
    if _off(r, +1):
        yield _heated(r)
    if _off(r, -1):
        yield (
            f"the kinetic temperature is {r.kinetic} times the temperature{_implies(r)}: the momenta, which "
            f"start at 0, {'or the thermostat ' if r.thermostat else ''}are not in equilibrium"
        )
    for direction, word in ((+1, "heated"), (-1, "too cold")):
        if _off(r, direction) or len(r.groups) < 2:
            continue
        found = [f"{g.index} ({g.kinetic})" for g in r.groups if _off(g, direction)]
        if found:
            yield f"parameter groups are {word}, by their kinetic temperatures: {', '.join(found)}"
    if r.chains >= CHAINS_FOR_SPREAD:
        for direction, word in ((+1, "above"), (-1, "below")):
            if r.configurational.off(direction):
                yield (
                    f"the configurational temperature is {word} the temperature, {r.configurational} times: "
                    "the parameters are not in equilibrium yet, are heated by gradient noise, or have no "
                    "proper stationary law"
                )


def _off(x: Report | ParameterGroup, direction: int) -> bool:
    """By the implied temperature, whose deviation is the larger and as many standard errors, if known."""
    return (x.kinetic if math.isnan(x.implied.value) else x.implied).off(direction)


def _heated(r: Report) -> str:
    if r.thermostat:
        return (
            f"the momenta imply parameters at {r.implied} times the temperature in spite of the thermostat: "
            "it has not settled yet, or cannot absorb the noise of the gradient: larger batches, smaller lr"
        )
    return (
        f"the kinetic temperature is {r.kinetic} times the temperature{_implies(r)}; minibatch noise in the "
        "gradient heats the parameters: larger batches, smaller lr, or thermostat=True"
    )


def _implies(r: Report) -> str:
    return "" if math.isnan(r.implied.value) else f", which implies {r.implied} times for the parameters"


def _histogram_warnings(r: Report) -> Iterator[str]:
    f = r.flatness
    if f.empty:
        yield (
            f"{f.empty} of {len(r.visits)} bins of |alpha| were never visited: the run is too short, or "
            "max_temperature too high"
        )
    elif f.highest > FAR_FROM_FLAT or f.lowest < 1.0 / FAR_FROM_FLAT:
        yield (
            f"the histogram of |alpha| is far from flat, {f.lowest:.2f} to {f.highest:.2f} times its mean: "
            "the bias has not converged"
        )
    if r.round_trips is not None and r.round_trips < FEW_ROUND_TRIPS:
        yield (
            f"alpha made {r.round_trips} round trips between the window and the hottest bin, all chains "
            "together: what the window shows rests on few independent visits"
        )
    if r.free_energy_difference > DISAGREEMENT:
        yield (
            f"the two free energies differ by up to {r.free_energy_difference:.2f} nats: not converged yet, "
            "or noise in the energy"
        )


def _lines(r: Report) -> Iterator[str]:
    yield _heading(r)
    yield "temperatures, in multiples of the one in force"
    yield _row("kinetic", f"{r.kinetic}{_range(r)}")
    yield _row("implied for parameters", _implied_text(r))
    yield _row(
        "configurational",
        f"{r.configurational}" + (f"; {r.configurational_note}" * bool(r.configurational_note)),
    )
    if len(r.groups) > 1:
        for g in r.groups:
            what = f"group {g.index}, momentum {g.momentum:g}"
            yield _row(what, f"kinetic {g.kinetic}, implied {g.implied}; {g.dimension:,.0f} parameters")
    if r.coupling is not None:
        yield "tempering"
        yield from _tempering_lines(r)
    for title, sentences in (("flags", r.flags), ("warnings", r.warnings)):
        yield f"{title}: none" if not sentences else title
        yield from (f"  - {sentence}" for sentence in sentences)


def _heading(r: Report) -> str:
    many = f"{r.chains} chains of " if r.chains > 1 else ""
    coupling = "constant temperature" if r.coupling is None else f"{r.coupling} coupling"
    return (
        f"CTLD: phase {r.phase}, step {r.steps:,}, {many}{r.dimension:,.0f} parameters, T0 = "
        f"{r.base_temperature:g}, {coupling}, {r.integrator}"
    )


def _row(name: str, value: str) -> str:
    return f"  {name:<24} {value}"


def _range(r: Report) -> str:
    if r.chains == 1 or math.isnan(r.kinetic.value):
        return ""
    ratios = r.kinetic_temperature / r.temperature
    return f"; chains {ratios.min():.2f} to {ratios.max():.2f}, +- {math.sqrt(2.0 / r.dimension):.2f} each"


def _implied_text(r: Report) -> str:
    if math.isnan(r.implied.value):
        return "n/a"
    if r.thermostat:
        return f"{r.implied}; 1 where kinetic is {r.balance:.3f}, which the thermostat sees to"
    share = "(2 mu/(1 + mu))^2" if r.integrator == "baoab" else "1"
    return f"{r.implied}; 1 + (kinetic - 1)/share, share {share}"


def _tempering_lines(r: Report) -> Iterator[str]:
    hottest = f"{r.bin_temperatures[-1] / r.base_temperature:.3g} T0"
    yield _row("now", f"T {_span(r.temperature)}; {int(r.at_target.sum())} of {r.chains} at the target")
    if not r.samples:
        yield _row("histogram of |alpha|", "empty")
        return
    yield _row(
        "visits in the window", f"{r.window_fraction:.1%}; a flat histogram has {r.window_expected:.1%}"
    )
    if r.round_trips is not None:
        yield _row("round trips", f"{r.round_trips:,}; {r.round_trips / r.chains:.3g} per chain")
    f = r.flatness
    empty = f"; {f.empty} of {len(r.visits)} bins empty" if f.empty else ""
    yield _row(
        "histogram of |alpha|",
        f"{f.lowest:.3f} to {f.highest:.3f} times its mean; {f.total_variation:.1%} of the visits would "
        f"have to be elsewhere{empty}",
    )
    yield _row("mean of r^2", f"{r.alpha_kinetic}; {_alpha_verdict(r)}")
    yield _row("energy in the window", _energy_text(r))
    if r.coupling == "standardized":
        yield _row("free energy", "n/a; the standardized coupling has no stationary law")
        return
    yield _row(
        f"free energy at {hottest}",
        f"{r.free_energy[-1]:.3f} nats from the energies, {r.free_energy_histogram[-1]:.3f} from visits",
    )
    if not math.isnan(r.free_energy_difference):
        yield _row(
            "largest difference",
            f"{r.free_energy_difference:.3f} nats, a factor of {_factor(r.free_energy_difference)} in visits",
        )


def _span(x: Array) -> str:
    return f"{x.min():.3g}" if len(x) == 1 else f"{x.min():.3g} to {x.max():.3g}"


def _factor(nats: float) -> str:
    return f"{math.exp(nats):.3f}" if nats < 10 else f"e^{nats:.0f}"


def _alpha_verdict(r: Report) -> str:
    if r.alpha_kinetic_warning:
        return "see the warnings"
    return "as it should be" if r.alpha_kinetic.error <= 0.1 else "too few samples to tell"


def _energy_text(r: Report) -> str:
    """Mean and spread, and what the spread says about noise if the target is nearly harmonic."""
    if math.isnan(r.window_energy):
        return "n/a"
    text = f"mean {r.window_energy:.4g}, spread {r.window_energy_spread:.3g} nats; "
    text += f"harmonic sqrt(d/2) = {r.thermal_spread:.3g}"
    if math.isnan(r.energy_noise):
        return text + ": no sign of harmful noise"
    text += f": noise of about {r.energy_noise:.3g} nats, or far from harmonic"
    if r.energy_verdict is None:
        return text
    advice = r.energy_verdict.advice
    return f"{text}; as noise {r.energy_verdict.level}{': ' if advice else ''}{advice}"


# ----------------------------------------------------------------------------------------------- figure

# of Okabe and Ito, which the colour-blind can tell apart
BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#999999"


def _figure(r: Report) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the figure needs matplotlib: pip install "ctld_cuda[examples]"') from error
    panels: list[Callable[[Axes, Report], None]] = [_draw_temperatures]
    if r.coupling is not None:
        panels += [_draw_histogram, _draw_energies]
    if r.coupling == "exact":
        panels.append(_draw_free_energies)
    rows, columns = (2, 2) if len(panels) == 4 else (1, len(panels))
    figure = Figure(figsize=(max(6.5, 5.2 * columns), 0.7 + 3.6 * rows), layout="constrained")
    for place, draw in enumerate(panels, 1):
        draw(figure.add_subplot(rows, columns, place), r)
    count = len(r.warnings)
    plural = "" if count == 1 else "s"
    figure.suptitle(f"{_heading(r)}\n{count or 'no'} warning{plural}".replace(", T0", "\nT0", 1), fontsize=10)
    return figure


def _draw_temperatures(axes: Axes, r: Report) -> None:
    rows = [
        ("kinetic", r.kinetic, BLUE),
        ("implied", r.implied, ORANGE),
        ("configurational", r.configurational, GREEN),
    ]
    if len(r.groups) > 1:
        for g in r.groups:
            rows += [
                (f"group {g.index} kinetic", g.kinetic, BLUE),
                (f"group {g.index} implied", g.implied, ORANGE),
            ]
    for place, (_, ratio, color) in enumerate(rows):
        if math.isnan(ratio.value):
            axes.text(1.0, place, "n/a", ha="center", va="center", color="black", backgroundcolor="white")
        else:
            axes.errorbar(ratio.value, place, xerr=ratio.error, fmt="o", color=color, capsize=3)
    if r.thermostat and not math.isnan(r.balance):
        axes.plot(r.balance, 0, marker="|", color="black", markersize=14)
    axes.axvline(1.0, color="black", linewidth=1, zorder=0)
    axes.axvspan(0.9, 1.1, color=GRAY, alpha=0.25, linewidth=0, zorder=0)
    low, high = axes.get_xlim()
    axes.set(xlim=(min(low, 0.8), max(high, 1.2)), ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set(title="Temperatures", xlabel="over the temperature in force, +- 1 standard error")


def _shade_window(axes: Axes, r: Report) -> None:
    axes.axvspan(0.0, r.window, color=GRAY, alpha=0.25, linewidth=0, label="window")


def _draw_histogram(axes: Axes, r: Report) -> None:
    edges = np.linspace(0.0, r.bin_centers[-1] + r.bin_centers[0], len(r.visits) + 1)
    _shade_window(axes, r)
    if r.samples:
        relative = r.visits / r.visits.mean()
        axes.stairs(relative, edges, fill=True, color=BLUE, alpha=0.6)
    axes.axhline(1.0, color="black", linestyle="--", linewidth=1, label="uniform")
    axes.set(title="Visits", xlabel=r"$|\alpha|$", ylabel="visits over their mean", xlim=(0.0, edges[-1]))
    axes.set_ylim(0.0, 1.35 * max(1.0, r.flatness.highest if r.samples else 1.0))
    axes.legend(loc="upper right", ncols=2)


def _draw_energies(axes: Axes, r: Report) -> None:
    seen = r.visits > 0
    x, mean, spread = r.bin_centers[seen], r.energy_mean[seen], r.energy_spread[seen]
    _shade_window(axes, r)
    axes.plot(x, mean, color=BLUE, label="mean")
    axes.fill_between(x, mean - spread, mean + spread, color=BLUE, alpha=0.25, linewidth=0, label="+- spread")
    axes.set(
        title="Energy $U$",
        xlabel=r"$|\alpha|$",
        ylabel="nats",
        xlim=(0.0, r.bin_centers[-1] + r.bin_centers[0]),
    )
    axes.legend(loc="upper left")


def _draw_free_energies(axes: Axes, r: Report) -> None:
    seen = r.visits > 0
    _shade_window(axes, r)
    axes.plot(r.bin_centers[seen], r.free_energy[seen], color=BLUE, label="from mean energies")
    axes.plot(
        r.bin_centers[seen],
        r.free_energy_histogram[seen],
        color=ORANGE,
        linestyle="--",
        label="from histogram",
    )
    axes.set(title=r"Free energy $\ln Z(\beta)/Z(1)$", xlabel=r"$|\alpha|$", ylabel="nats")
    axes.set_xlim(0.0, r.bin_centers[-1] + r.bin_centers[0])
    axes.legend(loc="upper left")
