"""Thermostats: the parameters' law under noisy gradients, where plain Langevin dynamics is too hot.

The gradients of harmonic targets get Gaussian noise that alone would heat the parameters by ``heat`` times
the temperature (docs/method.md). The friction at which a thermostat undoes that is known.
"""

import math

import pytest
import torch
from laws import FIVE_SIGMA, LIMIT, check, device_of, repeat, root_temperature

from ctld_cuda import CTLD, Tempering, reference

INTEGRATORS = ["baoab", "euler"]
MOMENTUM = 0.9


class Noisy:
    """Parameters of unit curvature, two groups of different lr and noise, and averages per chain."""

    SIZES, RATES, HEATS = (40, 100), (0.05, 0.02), (1.0, 0.3)

    def __init__(self, integrator, seed, chains, backend, thermostat=True, tempering=None, heats=HEATS):
        self.chains, self.heats = chains, heats
        device = device_of(backend)
        self.generator = torch.Generator().manual_seed(seed)
        starts = [torch.randn(chains, n, generator=self.generator) for n in self.SIZES]
        self.parameters = [torch.nn.Parameter(x.to(device)) for x in starts]
        groups = [{"params": [p], "lr": lr} for p, lr in zip(self.parameters, self.RATES, strict=True)]
        self.optimizer = CTLD(
            groups,
            momentum=MOMENTUM,
            num_data=1,
            tempering=tempering,
            chains=chains,
            integrator=integrator,
            seed=seed,
            backend=backend,
            thermostat=thermostat,
        )

    def step(self):
        energy = 0.0
        for p, lr, heat in zip(self.parameters, self.RATES, self.heats, strict=True):
            x = p.detach()
            noise = torch.randn(x.shape, generator=self.generator).to(x.device)
            p.grad = x + math.sqrt(heat * 2.0 * (1.0 - MOMENTUM) / lr) * noise
            energy = energy + 0.5 * x.double().square().sum(1)
        self.optimizer.step(loss=energy)

    def relative_temperatures(self):
        """Of theta by group and chain: the mean of theta^2 over T/T0, exactly 1 in the mean."""
        scale = root_temperature(self.optimizer.tempering_state()["alpha"]) ** 2
        return torch.stack([p.detach().double().square().mean(1) / scale for p in self.parameters])

    def average(self, steps, discard, every=10):
        """Over time, (groups, chains), and of the frictions."""
        total, friction, count = 0.0, 0.0, 0
        for i in range(steps):
            self.step()
            if i >= discard and i % every == 0:
                total, count = total + self.relative_temperatures(), count + 1
                friction = friction + self.optimizer.tempering_state()["friction"].T
        return total / count, friction / count


def friction_for(heat, lr, integrator):
    """The friction at which noise of this heat leaves the parameters at T, to first order in lr.

    With e the variance of a noisy kick over T: baoab (1-mu^2) + e (1+mu')^2/4 = 1 - mu'^2; euler, whose
    kick is c sqrt(N h) times the gradient, (1-mu^2) + e = (1 - mu'^2) (1+mu)/(1+mu'). Then w = mu/mu' - 1.
    """
    mu = MOMENTUM
    kick = 2.0 * (1.0 - mu) * heat
    if integrator == "euler":
        e = kick * (1.0 + mu) / 2.0
        damped = 1.0 - (1.0 - mu * mu + e) / (1.0 + mu)
    else:
        e = kick * 2.0 / (1.0 + mu)
        a, b, c = 1.0 + e / 4.0, e / 2.0, e / 4.0 - mu * mu
        damped = (-b + math.sqrt(b * b - 4.0 * a * c)) / (2.0 * a)
    return mu / damped - 1.0


def deviations(integrator, seed, chains, backend, steps=900, discard=300):
    """theta's temperature in both groups; 0.002 allows for the finite step of the friction."""
    run = Noisy(integrator, seed, chains, backend)
    theta, friction = run.average(steps, discard)
    error = theta.std(1) / math.sqrt(chains)
    found = {}
    for g, (lr, heat) in enumerate(zip(run.RATES, run.heats, strict=True)):
        off = float(theta[g].mean()) - 1.0
        found[f"theta^2 of group {g}"] = math.copysign(max(abs(off) - 0.002, 0.0), off) / float(error[g])
        w = friction_for(heat, lr, integrator)
        assert abs(float(friction[g].mean()) / w - 1.0) < 0.1, f"friction of group {g}; {repeat(seed)}"
    return found


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_noisy_gradients(engine, integrator, seed):
    """Twice and 1.3 times too hot without thermostats, right with them, at the frictions that are needed."""
    chains = engine.chains(400)
    check(deviations(integrator, seed, chains, engine.backend), seed, chains)
    plain, _ = Noisy(integrator, seed, chains, engine.backend, thermostat=False).average(300, 200)
    for g, heat in enumerate(Noisy.HEATS):
        error = float(plain[g].std()) / math.sqrt(chains)
        assert abs(float(plain[g].mean()) - 1.0 - heat) < FIVE_SIGMA * error + 0.05 * heat, repeat(seed)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_noisy_gradients_on_every_backend(backend, integrator, seed):
    """The kernels of the GPU, too slow here, have the same bits: tests/test_thermostat.py."""
    chains = 100
    run = Noisy(integrator, seed, chains, backend)
    theta, _ = run.average(500, 250)
    error = theta.std(1) / math.sqrt(chains)
    check({f"group {g}": float((theta[g].mean() - 1.0) / error[g]) for g in range(2)}, seed, chains)


@pytest.mark.parametrize("size", [1, 10])
def test_exact_gradients_need_no_thermostat(engine, size, seed):
    """A thermostat then changes nothing: theta stays Gaussian, even where one element moves the friction."""
    chains = engine.chains(16384 // size)
    theta = torch.nn.Parameter(torch.randn(chains, size, device=device_of(engine.backend)))
    optimizer = CTLD(
        [theta],
        lr=0.02,
        num_data=1,
        tempering=None,
        chains=chains,
        seed=seed,
        thermostat=True,
        backend=engine.backend,
    )
    for _ in range(400):
        theta.grad = theta.detach().clone()
        optimizer.step()
    x, n = theta.detach().double(), theta.numel()
    found = {
        "theta^2": (float(x.square().mean()) - 1.0) * math.sqrt(n / 2.0),
        "theta^4": (float(x.pow(4).mean()) - 3.0) * math.sqrt(n / 96.0),
    }
    # for the finite step of the friction, largest for one element: 0.003 measured
    allowance = {"theta^2": 0.01 * math.sqrt(n / 2.0), "theta^4": 0.06 * math.sqrt(n / 96.0)}
    check({k: math.copysign(max(abs(z) - allowance[k], 0.0), z) for k, z in found.items()}, seed)
    friction = optimizer.tempering_state()["friction"]
    predicted = math.sqrt(reference.THERMOSTAT_RATE / reference.THERMOSTAT_ELEMENTS) * (1.0 - MOMENTUM)
    assert abs(float(friction.std()) / predicted - 1.0) < 0.25, repeat(seed)
    assert abs(float(friction.mean())) < 0.1 * predicted, repeat(seed)


def tempered_deviations(seed, chains, backend, thermostat=True, steps=2500, discard=1000):
    """theta's temperature over T(alpha) in four regions of |alpha|, by group."""
    run = Noisy(
        "baoab", seed, chains, backend, thermostat, Tempering(coupling="standardized", step_size=0.02)
    )
    edges = torch.linspace(0.0, LIMIT, 5, dtype=torch.float64)
    sums, counts = (
        torch.zeros(4, 2, chains, dtype=torch.float64),
        torch.zeros(4, 1, chains, dtype=torch.float64),
    )
    for i in range(steps):
        run.step()
        if i >= discard and i % 5 == 0:
            alpha = run.optimizer.tempering_state()["alpha"].abs()
            theta = run.relative_temperatures()
            for k in range(4):
                inside = ((alpha >= edges[k]) & (alpha <= edges[k + 1])).double()
                sums[k] += theta * inside
                counts[k] += inside
    mean = sums.sum(2) / counts.sum(2)
    error = (sums - mean[..., None] * counts).square().sum(2).sqrt() / counts.sum(2)
    return mean, error


def test_noisy_gradients_while_the_temperature_moves(compiled, seed):
    """The same noise is nothing where it is hot and doubles the temperature where it is cold.

    With the friction w T0/T a thermostat that has learned w is right at every temperature: theta within
    5 %, where it is up to 100 % too hot without.
    """
    mean, error = tempered_deviations(seed, 200, compiled)
    report = f"{mean.tolist()} +- {error.max():.4f}; {repeat(seed)}"
    assert ((mean - 1.0).abs() < 0.05 + FIVE_SIGMA * error).all(), report
    plain, _ = tempered_deviations(seed, 200, compiled, thermostat=False, steps=1500, discard=500)
    assert plain[0, 0] > 1.6 and plain[0, 1] > 1.15, f"{plain.tolist()}; {repeat(seed)}"


def kinetic_temperature_alone(momentum, damped, integrator):
    """SGNHT as published: steers the momenta to T, and leaves the parameters too hot."""
    return torch.ones_like(damped)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_steering_by_the_momenta_alone_is_noticed(monkeypatch, integrator, seed):
    monkeypatch.setattr(reference, "balanced_kinetic", kinetic_temperature_alone)
    run = Noisy(integrator, seed, 100, "reference")
    theta, _ = run.average(500, 250)
    error = theta.std(1) / math.sqrt(100)
    assert float(((theta.mean(1) - 1.0) / error).abs().max()) > FIVE_SIGMA, repeat(seed)
