"""The report on a run: known states give known numbers, thresholds hold, and both temperatures are right.

laws.py states the bounds of the statistical tests and their false-positive rate; this file makes about 20
comparisons per run.
"""

import gc
import math
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from common import snapshot
from laws import check

from ctld_cuda import CTLD, AdaptiveForce, Metadynamics, Tempering, diagnostics
from ctld_cuda.diagnostics import GradientWatch, Ratio, report
from ctld_cuda.energy import judge
from ctld_cuda.reference import balanced_kinetic
from ctld_cuda.state import FLAG_MEANINGS

EXACT = Tempering(coupling="exact")
TEMPERINGS = {
    "none": None,
    "exact": EXACT,
    "hills alone": Tempering(coupling="exact", bias=Metadynamics()),
    "no hills": Tempering(coupling="exact", bias=AdaptiveForce(residual=None)),
    "standardized": Tempering(),
}
EXAMPLE = Path(__file__).parents[1] / "examples" / "mixture.py"


def make(chains=None, shape=(3,), tempering=EXACT, **options):
    """An optimizer of one parameter of ones, and that parameter."""
    theta = torch.nn.Parameter(torch.ones(shape if chains is None else (chains, *shape)))
    return CTLD([theta], num_data=10, chains=chains, tempering=tempering, **options), theta


def closure_of(optimizer, theta):
    """The mean loss 1/2 |theta|^2 of each chain."""

    def closure():
        optimizer.zero_grad()
        square = 0.5 * theta.square()
        loss = square.sum() if optimizer.chains is None else square.flatten(1).sum(1)
        loss.sum().backward()
        return loss.detach()

    return closure


def set_kinetic(optimizer, *temperatures):
    """Makes |p|^2/d of the chains what is given, in the sum and in the momenta."""
    exponent = optimizer._constants.kinetic_exponent
    quanta = [round(0.5 * t * optimizer._dimension * 2**exponent) for t in temperatures]
    optimizer._sampler.kinetic.copy_(torch.tensor(quanta).view(-1, 1))
    for group in optimizer.param_groups:
        for p in group["params"]:
            root = torch.tensor(temperatures).sqrt().view(-1, *[1] * (p.dim() - 1))
            optimizer.state[p]["momentum_buffer"] = root.expand_as(p).clone()


def set_visits(optimizer, visits, alpha_kinetic=1.0):
    state = optimizer._sampler
    state.visits.copy_(torch.as_tensor(visits))
    state.samples.copy_(state.visits.sum())
    state.alpha_kinetic.fill_(alpha_kinetic)


# ---------------------------------------------------------------------------------------- never raises


@pytest.mark.parametrize("chains", [None, 3])
@pytest.mark.parametrize("name", TEMPERINGS)
def test_it_reports_at_any_time(name, chains):
    """Before the first step, exploring, fine-tuning, with what is not finite, after loading; never wrong."""
    optimizer, theta = make(chains, tempering=TEMPERINGS[name])
    closure = closure_of(optimizer, theta)
    before = report(optimizer)
    assert math.isnan(before.kinetic.value) and math.isnan(before.implied.value)
    assert not before.warnings and not before.groups and before.samples == 0
    assert "n/a" in str(before) and "warnings: none" in str(before)

    for _ in range(3):
        optimizer.step(closure)
    after = report(optimizer)
    assert after.steps == 3 and after.samples == (3 * (chains or 1) if optimizer.tempering else 0)
    assert after.kinetic.value > 0 and len(after.groups) == 1
    assert "step 3" in str(after) and f"{after.kinetic.value:.3f}" in str(after)
    restored, _ = make(chains, tempering=TEMPERINGS[name])
    restored.load_state_dict(optimizer.state_dict())
    assert report(restored).kinetic == after.kinetic

    loss = torch.full_like(closure(), math.nan)
    theta.grad.view(-1)[0] = math.nan
    optimizer.step(loss=loss)
    broken = report(optimizer)
    assert any("not finite" in w for w in broken.warnings) and math.isnan(broken.kinetic.value)
    assert all(w in str(broken) for w in broken.warnings)

    optimizer.finetune()
    tuning = report(optimizer, closure)
    assert tuning.phase == "finetune" and "noise is off" in tuning.configurational_note
    assert math.isnan(tuning.configurational.value) and not tuning.at_target.any()
    str(tuning)


@pytest.mark.parametrize("trainable", [True, False])
def test_it_reports_where_there_is_nothing_to_sample(trainable):
    optimizer, theta = make(tempering=None, temperature=0)
    assert report(optimizer).phase == "finetune"
    optimizer.step(closure_of(optimizer, theta))
    assert not report(optimizer).warnings and "n/a" in str(report(optimizer))
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    empty = torch.nn.Parameter(torch.ones(0), requires_grad=trainable)
    optimizer = CTLD([{"params": [frozen]}, {"params": [empty]}], num_data=1)
    optimizer.step(loss=torch.tensor(0.0))
    assert not [w for w in report(optimizer).warnings if "the kinetic" in w] and str(report(optimizer))


def test_it_refuses_other_optimizers():
    with pytest.raises(TypeError, match="CTLD"):
        report(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))


def test_it_changes_nothing_and_does_not_change():
    """Not the state of the run, nor later with it; without a closure not even the gradients."""
    optimizer, theta = make(4)
    closure = closure_of(optimizer, theta)
    for _ in range(20):
        optimizer.step(closure)
    before, gradient = snapshot(optimizer), theta.grad.clone()
    first = report(optimizer)
    text, visits = str(first), first.visits.copy()
    assert torch.equal(theta.grad, gradient)
    report(optimizer, closure)
    assert all(torch.equal(before[name], value) for name, value in snapshot(optimizer).items())
    for _ in range(20):
        optimizer.step(closure)
    assert str(first) == text and np.array_equal(first.visits, visits)
    assert str(report(optimizer)) != text


# --------------------------------------------------------------------------------------- known numbers


@pytest.mark.parametrize("integrator", ["baoab", "euler"])
def test_temperatures_of_a_known_state(integrator):
    """alpha at the wall is at 10 T0; the share of baoab is (2 mu/(1 + mu))^2, of euler 1."""
    momentum = 0.5
    optimizer, _ = make(2, (4,), temperature=2.0, momentum=momentum, integrator=integrator)
    optimizer._sampler.alpha.copy_(torch.tensor([0.1, -1.5]))
    set_kinetic(optimizer, 3.0, 20.0)
    r = report(optimizer)
    assert np.allclose(r.temperature, [2.0, 20.0]) and np.allclose(r.kinetic_temperature, [3.0, 20.0])
    error = math.sqrt(2 / 8)
    assert r.kinetic == pytest.approx((1.25, error))
    share = (2 * momentum / (1 + momentum)) ** 2 if integrator == "baoab" else 1.0
    assert r.implied == pytest.approx((1 + 0.25 / share, error / share))
    assert r.groups[0].kinetic == pytest.approx(r.kinetic) and r.groups[0].dimension == 4
    # once the noise is off the temperature of the last sampling step still counts
    optimizer.finetune()
    tuning = report(optimizer)
    assert np.allclose(tuning.temperature, [2.0, 20.0]) and tuning.kinetic == pytest.approx((1.25, error))


def test_temperatures_of_groups():
    """Each by its own momenta; the implied ones are weighted with their parameters, and 0 shows nothing."""
    a, b = (torch.nn.Parameter(torch.ones(n)) for n in (6, 2))
    frozen = torch.nn.Parameter(torch.ones(5), requires_grad=False)
    optimizer = CTLD(
        [{"params": [a], "momentum": 0.5}, {"params": [b, frozen], "momentum": 0.8}],
        num_data=1,
        tempering=None,
    )
    set_kinetic(optimizer, 1.0)
    optimizer.state[a]["momentum_buffer"].fill_(math.sqrt(1.5))
    optimizer.state[b]["momentum_buffer"].fill_(math.sqrt(0.75))
    r = report(optimizer)
    assert [g.dimension for g in r.groups] == [6, 2] and [g.momentum for g in r.groups] == [0.5, 0.8]
    assert r.groups[0].kinetic == pytest.approx((1.5, math.sqrt(2 / 6)))
    assert r.groups[1].kinetic == pytest.approx((0.75, 1.0))
    shares = [(2 * m / (1 + m)) ** 2 for m in (0.5, 0.8)]
    values, errors = (
        (1 + 0.5 / shares[0], 1 - 0.25 / shares[1]),
        (math.sqrt(1 / 3) / shares[0], 1 / shares[1]),
    )
    combined = math.hypot(0.75 * errors[0], 0.25 * errors[1])
    assert r.implied == pytest.approx((0.75 * values[0] + 0.25 * values[1], combined))
    assert "group 0, momentum 0.5" in str(r) and "group 1, momentum 0.8" in str(r)
    optimizer.param_groups[0]["momentum"] = 0.0
    r = report(optimizer)
    assert math.isnan(r.groups[0].implied.value) and math.isnan(r.implied.value)


def test_histogram_of_a_known_state():
    """Bins of 0.25 and a window of 0.4: 1.6 bins."""
    tempering = Tempering(coupling="exact", bins=6, persistence=0.6)
    optimizer, _ = make(2, tempering=tempering)
    set_visits(optimizer, [30, 10, 20, 20, 20, 20], alpha_kinetic=1.05)
    optimizer._sampler.alpha.copy_(torch.tensor([0.3, -0.5]))
    r = report(optimizer)
    assert r.window_fraction == pytest.approx((30 + 6) / 120) and r.window_expected == pytest.approx(
        0.4 / 1.5
    )
    assert r.flatness == pytest.approx((0.5, 1.5, 0.5, 1 / 12, 0))
    assert r.alpha_kinetic == pytest.approx((1.05, math.sqrt(2 * 1.36 / 0.64 / 120)))
    assert r.at_target.tolist() == [True, False] and np.allclose(r.bin_centers, np.arange(6) * 0.25 + 0.125)
    assert r.bin_temperatures[0] == 1.0 and 9 < r.bin_temperatures[-1] < 10
    text = str(r)
    assert "30.0%" in text and "26.7%" in text and "1 of 2 at the target" in text and "8.3%" in text


def test_energies_of_a_known_state():
    """A harmonic table has the free energy (d/2) ln T; a wrong histogram and a wrong hill show up as such."""
    optimizer, _ = make(shape=(6,))
    state = optimizer._sampler
    set_visits(optimizer, [100] * 60)
    relative = torch.from_numpy(report(optimizer).bin_temperatures)
    state.energy_mean.copy_(3.0 * relative)
    state.energy_spread.copy_(math.sqrt(3.0) * relative * math.sqrt(2 / math.pi))
    r = report(optimizer)
    assert np.allclose(r.free_energy, 3.0 * np.log(r.bin_temperatures)) and r.free_energy_difference < 1e-12
    assert r.thermal_spread == pytest.approx(math.sqrt(3.0)) and np.allclose(
        r.energy_spread[0], math.sqrt(3.0)
    )
    assert r.window_energy == pytest.approx(3.0) and r.window_energy_spread == pytest.approx(math.sqrt(3.0))
    assert "no sign of harmful noise" in str(r) and not [w for w in r.warnings if "free" in w]

    state.visits[7] = 100 * 2
    assert report(optimizer).free_energy_difference == pytest.approx(math.log(2.0))
    state.hills[20] += 1.5
    assert report(optimizer).free_energy_difference == pytest.approx(1.5)
    assert any("free energies differ by up to 1.50" in w for w in report(optimizer).warnings)
    state.energy_spread *= 2.0
    r = report(optimizer)
    assert r.energy_noise == pytest.approx(3.0) and "noise of about 3 nats" in str(r)
    assert r.energy_verdict == judge(optimizer, r.energy_noise) and r.energy_verdict.advice in str(r)
    state.energy_spread *= 0.7  # 1.4 times thermal: within what the mixing of bins and tails can do
    assert math.isnan(report(optimizer).energy_noise) and report(optimizer).energy_verdict is None


def test_standardized_has_no_free_energy():
    optimizer, _ = make(tempering=Tempering())
    set_visits(optimizer, [100] * 60)
    r = report(optimizer)
    assert np.isnan(r.free_energy).all() and math.isnan(r.free_energy_difference)
    assert "n/a; the standardized coupling" in str(r)


def test_round_trips():
    """Two visits to the ends are one trip there and back, of each chain for itself."""
    optimizer, _ = make(3)
    state = optimizer._sampler
    set_visits(optimizer, [10] * 60)
    state.turns.copy_(torch.tensor([1, 5, 14]))
    r = report(optimizer)
    assert r.turns.tolist() == [1, 5, 14] and r.round_trips == 9 and "round trips              9;" in str(r)
    assert any("9 round trips" in w for w in r.warnings)
    state.turns[0] = 2
    assert report(optimizer).round_trips == 10 and not report(optimizer).warnings


# ------------------------------------------------------------------------------------------ thresholds


@pytest.mark.parametrize(
    "ratio, chains, warns",
    [
        (1.099, 100_000, False),  # many standard errors but less than 10 %
        (1.101, 100_000, True),
        (0.901, 100_000, False),
        (0.899, 100_000, True),
        (1.39, 200, False),  # 3.9 standard errors
        (1.41, 200, True),
        (0.61, 200, False),
        (0.59, 200, True),
    ],
)
def test_warnings_about_the_kinetic_temperature(ratio, chains, warns):
    """More than 10 % and more than four standard errors, sqrt(2/n) each."""
    optimizer, _ = make(chains, (1,), tempering=None, integrator="euler")
    set_kinetic(optimizer, *[ratio] * chains)
    found = report(optimizer).warnings
    assert bool(found) == warns
    if warns and ratio > 1:
        assert "minibatch noise" in found[0] and "thermostat=True" in found[0]
    if warns and ratio < 1:
        assert "not in equilibrium" in found[0]


def test_what_the_momenta_hide_is_warned_about():
    """At mu = 0.5 baoab shows 4/9 of the excess: 8 % in the momenta are 18 % in the parameters."""
    optimizer, _ = make(shape=(100_000,), tempering=None, momentum=0.5)
    set_kinetic(optimizer, 1.08)
    assert "implies 1.180 +-" in report(optimizer).warnings[0]
    set_kinetic(optimizer, 1.04)
    assert not report(optimizer).warnings


def test_warnings_name_the_hot_group():
    parameters = [torch.nn.Parameter(torch.ones(n)) for n in (1000, 100_000)]
    optimizer = CTLD([{"params": [p]} for p in parameters], num_data=1, tempering=None)
    set_kinetic(optimizer, 1.0)
    assert not report(optimizer).warnings
    optimizer.state[parameters[0]]["momentum_buffer"].fill_(2.0)
    (found,) = report(optimizer).warnings
    assert "heated" in found and "0 (4.000" in found and "1 (" not in found


@pytest.mark.parametrize("integrator", ["baoab", "euler"])
def test_a_thermostat_changes_what_the_momenta_imply(integrator):
    """It damps with mu' = mu/(1 + w T0/T); its balance is the specification's, and means parameters at T."""
    mu, chains = 0.9, 40_000
    optimizer, _ = make(chains, (1,), momentum=mu, integrator=integrator, thermostat=True, temperature=2.0)
    state = optimizer._sampler
    state.friction.fill_(0.3)
    state.alpha.fill_(1.5)
    damped = torch.full((1,), mu / (1 + 0.3 / 10), dtype=torch.float64)
    balance = float(balanced_kinetic(mu, damped, integrator))
    set_kinetic(optimizer, *[20.0 * balance] * chains)
    r = report(optimizer)
    assert r.thermostat and r.balance == pytest.approx(balance)
    # the sum is in quanta, of which one element has some ten thousand
    assert r.kinetic.value == pytest.approx(balance, abs=1e-4)
    assert r.implied.value == pytest.approx(1.0, abs=1e-6) and r.groups[0].implied == r.implied
    assert not r.warnings and f"1 where kinetic is {balance:.3f}" in str(r)
    # as much too hot, and too cold, as is worth a warning
    slope = (1.0 + float(damped)) ** 2 / (4.0 * float(damped) ** 2)
    slope = slope if integrator == "baoab" else (1.0 + float(damped)) / (1.0 + mu)
    for excess, word in ((0.09, None), (0.11, "in spite of"), (-0.09, None), (-0.11, "equilibrium")):
        set_kinetic(optimizer, *[20.0 * (balance + excess / slope)] * chains)
        r = report(optimizer)
        assert r.implied.value == pytest.approx(1.0 + excess)
        assert (word in r.warnings[0]) if word else not r.warnings
    optimizer.finetune()
    assert not report(optimizer).warnings


def healthy(optimizer):
    """A state without anything to warn about."""
    set_visits(optimizer, [100_000] * 60)
    optimizer._sampler.turns.fill_(100)
    assert not report(optimizer).warnings
    return optimizer._sampler


@pytest.mark.parametrize(
    "lowest, highest, warns", [(51_000, 149_000, False), (49_000, 151_000, True), (90_000, 210_000, True)]
)
def test_warnings_about_a_histogram_that_is_not_flat(lowest, highest, warns):
    optimizer, _ = make(tempering=Tempering())
    state = healthy(optimizer)
    state.visits[3], state.visits[4] = lowest, highest
    assert bool(report(optimizer).warnings) == warns


def test_warnings_about_empty_bins_flags_and_a_hot_alpha():
    optimizer, _ = make(tempering=Tempering())
    state = healthy(optimizer)
    state.visits[50:] = 0
    assert "10 of 60 bins" in report(optimizer).warnings[0]
    state = healthy(optimizer)
    for bit, meaning in FLAG_MEANINGS.items():
        state.flags.fill_(bit)
        assert report(optimizer).warnings == [meaning] and report(optimizer).flags == [meaning]
    state.flags.zero_()
    for mean, word in ((1.09, None), (0.91, None), (1.2, "heated"), (0.8, "cold")):
        state.alpha_kinetic.fill_(mean)
        found = report(optimizer).warnings
        assert (word in found[0]) if word else not found


# -------------------------------------------------------------------------- configurational temperature


def test_the_virial_of_known_gradients():
    """N theta . (+-g + lambda theta)/d per chain, with groups, maximize and a parameter without gradient."""
    a, b = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(3, 2, 1))
    optimizer = CTLD(
        [{"params": [a], "weight_decay": 0.5}, {"params": [b], "weight_decay": 0.25}],
        num_data=7,
        chains=3,
        tempering=None,
        maximize=True,
    )
    assert report(optimizer).configurational_note == "there are no gradients"
    a.grad = torch.randn(3, 4)
    r = report(optimizer)
    with torch.no_grad():
        expected = (a * (0.5 * a - a.grad)).sum(1) + 0.25 * b.square().flatten(1).sum(1)
    expected = 7 / 6 * expected.double().numpy()
    assert np.allclose(r.configurational_temperature, expected, rtol=1e-5, atol=1e-6)
    assert r.configurational == pytest.approx((expected.mean(), math.sqrt(2 / 18)), rel=1e-5)
    a.grad[0, 0] = math.inf
    assert "not finite" in report(optimizer).configurational_note


def test_gradients_of_other_parameters_are_not_used():
    """Usable between backward() and step() only, whichever way gradients are cleared."""
    optimizer, theta = make(10, (5,), tempering=None)
    closure = closure_of(optimizer, theta)

    def note():
        return report(optimizer).configurational_note

    closure()
    assert note() == ""  # before the first step
    optimizer.step()
    assert "last step" in note()
    optimizer.zero_grad()
    assert note() == "there are no gradients"
    closure()
    assert note() == "" and np.isfinite(report(optimizer).configurational_temperature).all()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert note() == "all gradients are zero"
    (0.5 * theta.square()).sum().backward()
    assert note() == ""
    with torch.no_grad():
        theta.add_(1.0)
    assert "was changed" in note()
    closure()
    optimizer.step()
    # a new tensor at, perhaps, the same address and with the same id
    theta.grad = None
    gc.collect()
    closure()
    assert note() == ""


def test_the_first_report_of_a_run_says_what_it_cannot_know():
    optimizer, theta = make(tempering=None)
    closure = closure_of(optimizer, theta)
    optimizer.step(closure)
    closure()
    assert "not known" in report(optimizer).configurational_note
    # a closure settles it, at any time
    r = report(optimizer, closure)
    assert r.configurational_note == "" and r.configurational.value > 0
    optimizer.step()
    assert "last step" in report(optimizer).configurational_note

    watched, theta = make(tempering=None)
    GradientWatch.of(watched)
    closure = closure_of(watched, theta)
    watched.step(closure)
    closure()
    assert report(watched).configurational_note == ""


def test_a_watch_does_not_keep_the_optimizer():
    optimizer, theta = make(tempering=None)
    optimizer.step(closure_of(optimizer, theta))
    report(optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


# -------------------------------------------------------------------------------- laws of temperatures

CHAINS, CURVATURE = 40_000, 1.0


def sampled(integrator, momentum, seed, backend, noise=0.0, lr=0.1, steps=250, **options):
    """A harmonic target in equilibrium at T0 = 2, N = 5, one parameter per chain, gradients with noise."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.nn.Parameter(torch.randn(CHAINS, 1, generator=generator) * math.sqrt(2.0 / 5.0))
    optimizer = CTLD(
        [theta],
        lr=lr,
        momentum=momentum,
        num_data=5,
        temperature=2.0,
        integrator=integrator,
        tempering=None,
        chains=CHAINS,
        seed=seed,
        backend=backend,
        **options,
    )

    def closure():
        x = theta.detach()
        theta.grad = CURVATURE * x + noise * torch.randn(x.shape, generator=generator)

    for _ in range(steps):
        optimizer.step(closure)
    return optimizer, theta, closure


def in_errors(measured, expected, relative_error):
    """Deviation in standard errors of what is expected."""
    return (measured / expected - 1.0) / relative_error


@pytest.mark.parametrize("momentum", [0.5, 0.9])
@pytest.mark.parametrize("integrator", ["baoab", "euler"])
def test_equipartition(compiled, integrator, momentum, seed):
    """Kinetic and configurational temperature are those asked for; euler's too large by b/(1 - b)."""
    optimizer, _, closure = sampled(integrator, momentum, seed, compiled)
    r = report(optimizer, closure)
    b = 0.1 * CURVATURE / (2 * (1 + momentum)) if integrator == "euler" else 0.0
    error = math.sqrt(2 / CHAINS)
    assert r.kinetic.error == pytest.approx(error) and r.configurational.error == pytest.approx(
        error, rel=0.1
    )
    deviations = {
        "kinetic": in_errors(r.kinetic.value, 1 / (1 - b), error),
        "configurational": in_errors(r.configurational.value, 1 / (1 - b), error),
    }
    check(deviations, seed)
    assert not r.warnings


@pytest.mark.parametrize("momentum", [0.5, 0.9])
@pytest.mark.parametrize("integrator", ["baoab", "euler"])
def test_implied_temperature_under_gradient_noise(compiled, integrator, momentum, seed):
    """The momenta tell what temperature the parameters have: docs/method.md, section 5."""
    noise, lr = 1.5, 0.1
    optimizer, theta, closure = sampled(integrator, momentum, seed, compiled, noise, lr)
    r = report(optimizer, closure)
    b = lr * CURVATURE / (2 * (1 + momentum))
    excess = 5 * lr * noise**2 / (2 * (1 - momentum)) / 2.0  # over T0 = 2
    expected = 1 + excess / (1 - b) if integrator == "baoab" else (1 + excess) / (1 - b)
    share = (2 * momentum / (1 + momentum)) ** 2 if integrator == "baoab" else 1.0
    kinetic = 1 + share * (expected - 1)
    error = math.sqrt(2 / CHAINS)  # relative, of a Gaussian's variance
    # the noise of the gradient itself adds to the virial's
    square = 5 / 2 * CURVATURE * theta.detach().double().square().mean().item()
    deviations = {
        "kinetic": in_errors(r.kinetic.value, kinetic, error),
        "implied": (r.implied.value - expected) / (error * kinetic / share),
        "theta^2": in_errors(square, expected, error),
        "configurational": (r.configurational.value - expected) / r.configurational.error,
    }
    check(deviations, seed)
    assert any("minibatch noise" in w for w in r.warnings)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
@pytest.mark.parametrize("integrator", ["baoab", "euler"])
def test_a_thermostat_brings_both_temperatures_to_one(compiled, integrator, momentum, seed):
    """One of 4,000 parameters each, because the friction for a single one fluctuates."""
    chains, elements, lr, noise = 10, 4_000, 0.05, 2.0
    generator = torch.Generator().manual_seed(seed)
    theta = torch.nn.Parameter(torch.randn(chains, elements, generator=generator))
    optimizer = CTLD(
        [theta],
        lr=lr,
        momentum=momentum,
        num_data=1,
        integrator=integrator,
        tempering=None,
        chains=chains,
        seed=seed,
        backend=compiled,
        thermostat=True,
    )

    def closure():
        x = theta.detach()
        theta.grad = x + noise * torch.randn(x.shape, generator=generator)

    for _ in range(1_000):
        optimizer.step(closure)
    r = report(optimizer, closure)
    # of theta^2 and of theta times the noise of the last gradient
    error = math.sqrt((2.0 + noise**2) / (chains * elements))
    deviations = {
        "implied": (r.implied.value - 1.0) / r.implied.error,
        "configurational": (r.configurational.value - 1.0) / error,
    }
    check(deviations, seed)
    assert not r.warnings


def test_equipartition_at_all_temperatures(compiled, seed):
    """With tempering each chain is compared with its own temperature; the histogram fills and stays flat."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.nn.Parameter(torch.randn(2_000, 4, generator=generator))
    optimizer = CTLD([theta], lr=0.05, num_data=1, tempering=EXACT, chains=2_000, seed=seed, backend=compiled)

    def closure():
        theta.grad = theta.detach().clone()
        return 0.5 * theta.detach().double().square().sum(1)

    for _ in range(3_000):
        optimizer.step(closure)
    r = report(optimizer, closure)
    assert r.temperature.max() > 9.0 and not r.warnings
    # 1/2 %: the step of alpha, and the bias that was still learned
    for name, ratio in (("kinetic", r.kinetic), ("configurational", r.configurational)):
        check({name: max(abs(ratio.value - 1.0) - 0.005, 0.0) / ratio.error}, seed)


# ---------------------------------------------------------------------------------- figure and example


@pytest.mark.parametrize("name, panels", [("none", 1), ("standardized", 3), ("exact", 4), ("hills alone", 4)])
@pytest.mark.parametrize("steps", [0, 30])
def test_the_figure_is_drawn(name, panels, steps, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    optimizer, theta = make(3, tempering=TEMPERINGS[name])
    closure = closure_of(optimizer, theta)
    for _ in range(steps):
        optimizer.step(closure)
    figure = report(optimizer, closure).figure()
    FigureCanvasAgg(figure).print_png(tmp_path / "report.png")
    assert len(figure.axes) == panels and (tmp_path / "report.png").stat().st_size > 5_000
    assert all(axes.get_title() and axes.get_xlabel() for axes in figure.axes)


def test_the_figure_names_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"ctld_cuda\[examples\]"):
        report(make()[0]).figure()


def test_matplotlib_is_not_imported_with_the_package():
    code = "import sys, ctld_cuda.report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def run_example(*options):
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *options], capture_output=True, text=True, timeout=200, check=False
    )


def test_the_mixture_example(tmp_path):
    pytest.importorskip("matplotlib")
    output = tmp_path / "figure.png"
    done = run_example("--steps", "300", "--chains", "10", "--seed", "3", "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert output.read_bytes().startswith(b"\x89PNG")
    rows = re.findall(r"^\d at .*$", done.stdout, re.MULTILINE)
    assert len(rows) == 3
    for row, exact in zip(rows, (0.15, 0.35, 0.5), strict=True):
        w, tempered, constant = (float(x) for x in re.findall(r"(?<=  )\d\.\d+(?= |$)", row))
        assert w == exact and 0 <= tempered <= 1 and 0 <= constant <= 1
    assert "CTLD: phase explore, step 300, 10 chains of 2 parameters" in done.stdout
    assert "configurational          n/a" not in done.stdout


def test_the_mixture_example_refuses_what_it_cannot_do(tmp_path):
    pytest.importorskip("matplotlib")
    done = run_example("--chains", "1", "--output", str(tmp_path / "none" / "figure.png"))
    assert done.returncode == 2 and "at least 2" in done.stderr


def test_ratio():
    assert str(Ratio(1.0, 0.5)) == "1.000 +- 0.500" and str(diagnostics.UNKNOWN) == "n/a"
    assert not diagnostics.UNKNOWN.off(+1) and not diagnostics.UNKNOWN.off(-1)
    assert Ratio(1.2, 0.04).off(+1) and not Ratio(1.2, 0.04).off(-1) and not Ratio(1.2, 0.06).off(+1)
