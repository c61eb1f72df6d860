"""Tempering crosses barriers that constant temperature does not, and finds the weights behind them.

All chains start in the worst mode. The same steps at constant temperature must miss the same weights, so
that the targets stay hard. Errors come from the spread over chains, which share a bias but no noise.

laws.py states the bound. The default run makes 23 comparisons, each of one number or of the worst of several,
weighed as one. Weights of modes are averages of several hundred independent visits or more, which leaves them
a little skewed: a healthy sampler fails with a probability of at most 1e-6 each.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import simulated
import torch
from common import differing, snapshot
from laws import BOUND, check, repeat, too_large
from targets import DoubleWell, Funnel, Grid, Mixture, Ring, Target, among, midpoints, ratio

import ctld_cuda.coefficients
from ctld_cuda import CTLD, Tempering, reference
from ctld_cuda.reference import temper_scale
from ctld_cuda.state import KINETIC_SATURATED


class Case(NamedTuple):
    """A target, how to temper it, and what must be known to which error.

    Attributes:
        telltale: the observable that constant temperature must get wrong.
        error: largest allowed standard error of that observable.
        allowance: relative bias of the observables that no barrier hides, from the finite steps of alpha
            and theta.
    """

    target: Callable[[], Target]
    telltale: str
    max_temperature: float
    chains: int
    steps: int
    discard: int
    error: float
    allowance: float = 0.005


CASES = {
    "mixture": Case(lambda: Mixture(2), "left", 10.0, 500, 5_000, 1_500, 0.015),
    "grid": Case(Grid, "lines", 20.0, 500, 8_000, 3_000, 0.02),
    "ring": Case(Ring, "modes", 10.0, 500, 6_000, 1_500, 0.02),
    "double well": Case(DoubleWell, "left", 10.0, 500, 8_000, 3_500, 0.02),
}
LONG = {
    "mixture": CASES["mixture"]._replace(steps=40_000, error=0.004),
    "mixture, 20 dimensions": Case(lambda: Mixture(20), "left", 10.0, 1000, 60_000, 10_000, 0.004),
    "mixture, 100 dimensions": Case(lambda: Mixture(100), "left", 10.0, 500, 120_000, 40_000, 0.02),
    "grid": CASES["grid"]._replace(chains=1000, steps=40_000, error=0.006),
    "ring": CASES["ring"]._replace(chains=1000, steps=40_000, error=0.005),
    "double well": CASES["double well"]._replace(chains=1000, steps=40_000, error=0.005),
}


def sampler(target, tempering, chains, seed, backend):
    """An optimizer on the target's worst start, and the parameter."""
    theta = torch.nn.Parameter(target.start(chains, torch.Generator().manual_seed(seed)))
    optimizer = CTLD(
        [theta], lr=target.lr, num_data=1, tempering=tempering, chains=chains, seed=seed, backend=backend
    )
    return optimizer, theta


class Window:
    """Sums of observables over the states at target, per chain."""

    def __init__(self, optimizer):
        self.optimizer, self.sums, self.count = optimizer, {}, 0.0

    def add(self, observed):
        at_target = self.optimizer.tempering_state()["at_target"].double()[:, None]
        self.count = self.count + at_target
        for name, values in observed.items():
            self.sums[name] = self.sums.get(name, 0.0) + values * at_target

    def means(self, allowed_flags=0):
        """Means with standard errors, by name."""
        assert self.optimizer.tempering_state()["flags"] & ~allowed_flags == 0
        return {name: ratio(total, self.count) for name, total in self.sums.items()}


def averages(target, tempering, *, chains, steps, discard, seed, backend, every=10, allowed_flags=0):
    """Means of the observables over the states at target, with standard errors, by name."""
    optimizer, theta = sampler(target, tempering, chains, seed, backend)
    window = Window(optimizer)
    for step in range(1, steps + 1):
        optimizer.step(loss=target([theta]))
        if step > discard and step % every == 0:
            window.add(target.observe(theta.detach().double()))
    return window.means(allowed_flags)


def deviations(found, exact, telltale, allowance, samples):
    """In standard errors; all but the telltale are allowed a relative bias."""
    result = {}
    for name, (value, error) in found.items():
        off = (value - exact[name]).abs()
        if name != telltale:
            off = (off - allowance * exact[name].abs()).clamp(min=0.0)
        result[name] = among(off / error, samples)
    return result


def describe(found, exact):
    return "\n".join(
        f"  {name}: "
        + ", ".join(
            f"{v:.5g} +- {e:.2g} ({x:.5g})"
            for v, e, x in zip(value.tolist(), error.tolist(), exact[name].reshape(-1).tolist(), strict=True)
        )
        for name, (value, error) in found.items()
    )


def compare(name, case, seed, backend):
    """Asserts that tempering finds the exact values; returns them and what was found."""
    target = case.target()
    exact = target.exact()
    tempering = Tempering(max_temperature=case.max_temperature, coupling="exact")
    options = dict(steps=case.steps, discard=case.discard, seed=seed, backend=backend)
    found = averages(target, tempering, chains=case.chains, **options)
    report = f"{name}: found +- error (exact)\n{describe(found, exact)}\n{repeat(seed)}"
    print(report)
    assert found[case.telltale][1].max() < case.error, report
    check(deviations(found, exact, case.telltale, case.allowance, case.chains), seed)
    return target, exact, found, options


@pytest.mark.parametrize("name", CASES)
def test_barriers_are_crossed(compiled, name, seed):
    """Weights of modes from the worst start; constant temperature misses them in the same number of steps."""
    case = CASES[name]
    target, exact, found, options = compare(name, case, seed, compiled)
    control = averages(target, None, chains=150, every=50, **options)
    report = f"constant temperature\n{describe(control, exact)}\n{repeat(seed)}"
    print(report)
    (value, error), (_, tempered_error) = control[case.telltale], found[case.telltale]
    off = (value - exact[case.telltale]).abs() / torch.hypot(error, tempered_error)
    assert off.max() > BOUND, report


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_barriers_in_long_runs(compiled, name, seed):
    """Smaller errors and higher dimensions; given time, chains cross at constant temperature too."""
    compare(name, LONG[name], seed, compiled)


# ---------------------------------------------------------------------------------------- the targets


@pytest.mark.parametrize("make", [Mixture, Grid, Ring, DoubleWell, Funnel])
def test_gradients_belong_to_energies(make, seed):
    target = make(3) if make is Mixture else make()
    generator = torch.Generator().manual_seed(seed)
    theta = (1.3 * target.start(50, generator)).double().requires_grad_()
    energy, gradient = target.energy(theta)
    (automatic,) = torch.autograd.grad(energy.sum(), theta)
    assert torch.allclose(gradient, automatic, rtol=1e-7, atol=1e-7 * float(automatic.abs().max()))


def assert_close(found, exact, tolerance):
    for name, value in exact.items():
        assert torch.allclose(found[name], value, atol=tolerance), (name, found[name], value)


def test_exact_values():
    """Against closed forms, where they exist, or other coordinates."""
    beyond = 0.5 * math.erfc(4.0 / math.sqrt(2.0))
    assert math.isclose(Mixture(2).exact()["left"], 0.3 + 0.4 * beyond, abs_tol=1e-8)

    grid = Grid()
    lines = grid.exact()["lines"]
    assert torch.allclose(lines, grid.weights @ grid.lines, atol=1e-4)  # a little of each mode is elsewhere
    assert torch.allclose(grid.modes(lines), grid.weights, atol=1e-4)

    ring = Ring()
    axis = torch.linspace(-2.0, 2.0, 801, dtype=torch.float64)
    cartesian = ring.quadrature(torch.cartesian_prod(axis, axis))
    assert_close(cartesian, ring.exact(), 1e-3)

    well = DoubleWell(dimension=2)
    axis = midpoints(-8.0, 8.0, 800)
    assert_close(well.quadrature(torch.cartesian_prod(axis, axis)), well.exact(), 1e-6)

    funnel = Funnel(others=1)  # on x = z exp(v/2), whose scale does not depend on v
    v, z = torch.cartesian_prod(midpoints(-8.0, 8.0, 400), midpoints(-8.0, 8.0, 400)).unbind(1)
    points, volume = torch.stack((v, z * torch.exp(0.5 * v)), 1), torch.exp(0.5 * v)
    assert_close(funnel.quadrature(points, volume), funnel.exact(), 1e-4)
    energy, beta = funnel.energy(points)[0], torch.tensor(0.8, dtype=torch.float64)
    hot, cold = (torch.exp(-b * energy) * volume for b in (beta, 1.0))
    assert math.isclose(torch.log(hot.sum() / cold.sum()), funnel.free_energy(beta), abs_tol=1e-6)
    assert math.isclose(hot @ v / hot.sum(), funnel.mean_v(beta), abs_tol=1e-6)


def test_the_wells_swap():
    """The weights of the double well at the hottest temperature are not those at the target."""
    well = DoubleWell()
    assert well.exact()["left"] < 0.3 and well.at(10.0)["left"] > 0.7


# ------------------------------------------------------------------------------ what must be noticed


class QuarterFelt(DoubleWell):
    """Hands over a quarter of the energy, so that alpha no longer belongs to the same density as theta.

    The hot wells' weights leak into the window: P(left) is 0.56, 15 errors too high.
    """

    def __call__(self, parameters):
        return 0.25 * super().__call__(parameters)


def hotter(integrator, *, momentum, c, **rest):
    """Noise of 3 % too large a standard deviation."""
    right = reference.explore_coefficients(integrator, momentum=momentum, c=c, **rest)
    return right._replace(noise=1.03 * right.noise)


@pytest.mark.parametrize("broken", ["noise", "alpha feels a quarter of the energy"])
def test_broken_samplers_are_noticed(monkeypatch, compiled, broken, seed):
    case, target = CASES["double well"], DoubleWell()
    sign, steps, discard = "left", 6_000, case.discard
    if broken == "noise":
        monkeypatch.setattr(ctld_cuda.coefficients, "explore_coefficients", hotter)
        sign, steps, discard = "y_square", 1_500, 500
    else:
        target = QuarterFelt()
    tempering = Tempering(max_temperature=case.max_temperature, coupling="exact")
    options = dict(chains=case.chains, steps=steps, discard=discard, seed=seed, backend=compiled)
    found, exact = averages(target, tempering, **options), target.exact()
    off = too_large(deviations(found, exact, case.telltale, case.allowance, case.chains))
    assert sign in off, f"{describe(found, exact)}\n{repeat(seed)}"


# ----------------------------------------------------------------------------------------- the funnel


class ByBin:
    """Sums per chain and bin of |alpha|, (chains, bins)."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        centers = optimizer.tempering_state()["bin_centers"]
        self.bins, self.width = centers.numel(), 2.0 * float(centers[0])
        self.beta = temper_scale(centers, optimizer._constants) ** -2
        self.sums = {}

    def add(self, **observed):
        alpha = self.optimizer.tempering_state()["alpha"]
        bins = (alpha.abs() / self.width).long().clamp(max=self.bins - 1)[:, None]
        for name, values in (observed | {"count": torch.ones_like(alpha)}).items():
            table = self.sums.setdefault(name, torch.zeros(alpha.numel(), self.bins, dtype=torch.float64))
            table.scatter_add_(1, bins, values[:, None])

    def mean(self, name):
        return ratio(self.sums[name], self.sums["count"])

    def free_energy_error(self):
        """Standard error per bin of the integral of the mean energy over beta, from the spread of chains."""
        mean, _ = self.mean("energy")
        influence = (self.sums["energy"] - mean * self.sums["count"]) / self.sums["count"].sum(0)
        height = 0.5 * (influence[:, 1:] + influence[:, :-1])
        return (height * self.beta.diff()).cumsum(1).square().sum(0).sqrt()


def run_tempered_funnel(target, *, chains, steps, discard, seed, backend):
    """Averages in the window, and how far the laws at all temperatures are from the known ones."""
    tempering = Tempering(max_temperature=2.0, coupling="exact")
    optimizer, theta = sampler(target, tempering, chains, seed, backend)
    by_bin, window = ByBin(optimizer), Window(optimizer)
    for step in range(1, steps + 1):
        energy = target([theta])
        optimizer.step(loss=energy)
        if step > discard and step % 10 == 0:
            observed = target.observe(theta.detach().double())
            window.add(observed)
            beta = 1.0 / optimizer.tempering_state()["temperature"]
            v = (observed["v"][:, 0] - target.mean_v(beta)) * beta.sqrt() / target.width
            by_bin.add(mean=v, variance=v.square(), energy=energy)
    (mean, mean_error), (variance, variance_error) = by_bin.mean("mean"), by_bin.mean("variance")
    free_energy = optimizer.tempering_state()["free_energy"] - target.free_energy(by_bin.beta)
    return window.means(), {
        "mean of v by bin": among(mean / mean_error, chains),
        "variance of v by bin": among((variance - 1.0) / variance_error, chains),
        # 0.001 nats: the bins inside the window have the free energy 0 without any error
        "free energy": among(free_energy[1:] / by_bin.free_energy_error().clamp(min=0.001), chains),
    }


def test_a_funnel_has_its_known_law_at_every_temperature(compiled, seed):
    """v is Gaussian at every temperature, with a mean that moves by 1.5 standard deviations up to T = 2.

    But heat does not help here: it moves v into the mouth, away from the neck, which is narrow and not behind
    a barrier. So the same steps at constant temperature must be more precise; the errors differ by a factor
    of 1.5, known to 5 %.
    """
    target = Funnel()
    options = dict(chains=400, steps=8_000, discard=2_000, seed=seed, backend=compiled)
    exact, (found, off) = target.exact(), run_tempered_funnel(target, **options)
    report = f"funnel, tempered: found +- error (exact)\n{describe(found, exact)}\n{off}"
    print(report)
    check(deviations(found, exact, "neck", 0.0, options["chains"]) | off, seed)
    control = averages(target, None, **options)
    print(f"constant temperature\n{describe(control, exact)}\n{repeat(seed)}")
    check(deviations(control, exact, "neck", 0.0, options["chains"]), seed)
    assert control["v"][1] < found["v"][1], f"{report}\n{repeat(seed)}"


@pytest.mark.long
def test_neals_funnel_defeats_both(compiled, seed):
    """9 coordinates and v of standard deviation 3: no learning rate fits the neck and the mouth.

    At lr = 0.02 the steps are unstable below v = -5.2 (which may raise a flag) and the neck, v < -3, is half
    empty. Tempering leaves it so: at T = 1.2 the mean of v is 8.1 already, at the default T = 10 it would be
    364. Chains start between neck and mouth.
    """
    target = Funnel(width=3.0, others=9, start=0.0)
    assert abs(target.mean_v(torch.tensor(1 / 1.2)) - 8.1) < 0.01
    assert abs(target.mean_v(torch.tensor(0.1)) - 364.5) < 0.01
    exact = target.exact()
    for tempering in (None, Tempering(max_temperature=1.2, coupling="exact")):
        options = dict(chains=200, steps=20_000, discard=4_000, seed=seed, backend=compiled)
        found = averages(target, tempering, **options, allowed_flags=KINETIC_SATURATED)
        report = f"{tempering}\n{describe(found, exact)}\n{repeat(seed)}"
        print(report)
        value, error = found["neck"]
        assert value + BOUND * error < exact["neck"], report


# --------------------------------------------------------------------------------------- every backend


@pytest.mark.parametrize("make", [Grid, DoubleWell])
def test_every_backend_walks_the_same_paths(monkeypatch, compiled, make, seed):
    """The reference and the simulated GPU give the bits, and so the laws, of the backend tested above."""

    def walk(backend):
        target = make()
        # steps of alpha so long that few lead through all temperatures
        tempering = Tempering(max_temperature=3.0, coupling="exact", step_size=0.1)
        optimizer, theta = sampler(target, tempering, 12, seed, backend)
        for _ in range(40):
            optimizer.step(loss=target([theta]))
        assert optimizer.tempering_state()["visits"].count_nonzero() > 15, repeat(seed)
        return snapshot(optimizer)

    expected = walk(compiled)
    assert differing(expected, walk("reference")) == [], repeat(seed)
    simulated.install(monkeypatch)
    assert differing(expected, walk("cpu")) == [], repeat(seed)
