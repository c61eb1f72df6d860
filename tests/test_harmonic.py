"""Constant temperature on harmonic targets.

A step is a linear map of (theta, p) plus Gaussian noise, so mean and covariance after any number of steps
follow from 2x2 matrices, discretisation included. laws.py states the bounds and their false-positive rate.
"""

import math

import numpy as np
import pytest
import torch
from laws import FIVE_SIGMA, Harmonic, check, deviations_from, device_of, repeat, too_large

import ctld_cuda.optimizer
from ctld_cuda import CTLD, reference

HARMONIC = {
    "SGD's usual options": Harmonic(0.1, 0.9),
    "short step": Harmonic(0.02, 0.9, temperature=2.5),
    "strong friction": Harmonic(0.1, 0.5, temperature=0.3),
    "no momentum": Harmonic(0.5, 0.0, temperature=2.5),
    "near instability": Harmonic(1.0, 0.5, curvature=2.0, temperature=2.5),
    "many examples": Harmonic(0.1, 0.8, curvature=0.7, num_data=5000.0, temperature=0.04),
    "prior only": Harmonic(0.2, 0.9, curvature=0.0, weight_decay=0.5, num_data=50.0),
    "likelihood and prior": Harmonic(
        0.3, 0.7, curvature=0.6, weight_decay=0.4, num_data=50.0, temperature=2.5
    ),
}
INTEGRATORS = ["baoab", "euler"]


@pytest.mark.parametrize("name", HARMONIC)
def test_what_the_exact_laws_say(name):
    """baoab samples theta and p without bias; euler has both too wide by 1/(1 - x), x = h k/(2(1+mu))."""
    h = HARMONIC[name]
    k = h.curvature + h.weight_decay
    target = np.array([h.temperature / (h.num_data * k), h.temperature])
    x = h.lr * k / (2.0 * (1.0 + h.momentum))
    assert np.allclose(np.diag(h.stationary("baoab")), target, rtol=1e-12)
    assert np.allclose(np.diag(h.stationary("euler")), target / (1.0 - x), rtol=1e-12)
    for integrator in INTEGRATORS:
        mean, covariance = h.law_after(2 * h.relaxation(integrator), 1.0, integrator)
        assert np.allclose(covariance, h.stationary(integrator), rtol=1e-6) and abs(mean).max() < 1e-6


def harmonic_deviations(cases, integrator, seed, n, backend, dtype=torch.float32, start=1.0):
    """Runs one parameter per case, all in one optimizer; compares after 3 steps and when stationary.

    The cases share num_data and temperature.
    """
    num_data, temperature = cases[0].num_data, cases[0].temperature
    scale = [math.sqrt(c.stationary("baoab")[0, 0]) for c in cases]
    parameters = [
        torch.nn.Parameter(torch.full((n,), start * s, dtype=dtype, device=device_of(backend))) for s in scale
    ]
    optimizer = CTLD(
        [{"params": [p]} | c.group for p, c in zip(parameters, cases, strict=True)],
        num_data=num_data,
        temperature=temperature,
        tempering=None,
        integrator=integrator,
        seed=seed,
        backend=backend,
    )
    steps = max(c.relaxation(integrator) for c in cases)
    found = {}
    for step in range(1, steps + 1):
        for theta, case in zip(parameters, cases, strict=True):
            if case.curvature:  # a parameter without gradient counts as one with gradient zero
                theta.grad = theta.detach() * case.curvature
        optimizer.step()
        if step in (3, steps):
            for i, (theta, case) in enumerate(zip(parameters, cases, strict=True)):
                mean, covariance = case.law_after(step, start * scale[i], integrator)
                if step == steps:
                    mean, covariance = np.zeros(2), case.stationary(integrator)
                p = optimizer.state[theta]["momentum_buffer"]
                when = "stationary" if step == steps else "early"
                found |= deviations_from(theta.detach(), p, mean, covariance, f"{when}, parameter {i}: ")
    return found


@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize("name", HARMONIC)
def test_harmonic_targets(compiled, name, integrator, seed):
    """Mean and covariance, early and when stationary, of 2^19 independent oscillators."""
    check(harmonic_deviations([HARMONIC[name]], integrator, seed, 1 << 19, compiled), seed)


SHARED = dict(num_data=50.0, temperature=2.5)
GROUPS = [
    Harmonic(0.2, 0.9, **SHARED),
    Harmonic(0.05, 0.5, curvature=2.0, weight_decay=0.3, **SHARED),
    Harmonic(0.4, 0.0, curvature=0.0, weight_decay=0.8, **SHARED),
]


@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_have_their_own_options(compiled, integrator, dtype, seed):
    """Learning rate, momentum and weight decay differ between the groups of one optimizer."""
    check(harmonic_deviations(GROUPS, integrator, seed, 1 << 17, compiled, dtype), seed)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_harmonic_targets_on_every_backend(backend, integrator, seed):
    check(harmonic_deviations(GROUPS[1:2], integrator, seed, 1 << 15, backend), seed)


def without_c(integrator, *, lr, num_data, **rest):
    """What is usually written: kick sqrt(N h), drift sqrt(h/N)."""
    glide = math.sqrt(lr / num_data) * (0.5 if integrator == "baoab" else 1.0)
    right = reference.explore_coefficients(integrator, lr=lr, num_data=num_data, **rest)
    return right._replace(gradient=math.sqrt(num_data * lr), drift=glide)


def with_noise(scale):
    """Coefficients whose noise is ``scale`` of momentum and temperature."""

    def coefficients(integrator, *, momentum, c, **rest):
        right = reference.explore_coefficients(integrator, momentum=momentum, c=c, **rest)
        return right._replace(noise=scale(momentum, c.base_temperature))

    return coefficients


BROKEN_STEPS = {
    "c = 1": without_c,
    "T^2 instead of T": with_noise(lambda mu, t: math.sqrt(1 - mu * mu) * t),
    "square root missing": with_noise(lambda mu, t: (1 - mu * mu) * t),
    "2(1-mu) instead of 1-mu^2": with_noise(lambda mu, t: math.sqrt(2 * (1 - mu) * t)),
    "no temperature": with_noise(lambda mu, t: math.sqrt(1 - mu * mu)),
}


@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize("name", BROKEN_STEPS)
def test_broken_steps_are_noticed(monkeypatch, compiled, name, integrator, seed):
    """The stationary part alone notices each; for c = 1 and baoab it is the covariance that is wrong."""
    monkeypatch.setattr(ctld_cuda.optimizer, "explore_coefficients", BROKEN_STEPS[name])
    case = Harmonic(0.2, 0.5, num_data=50.0, temperature=2.5)
    found = too_large(harmonic_deviations([case], integrator, seed, 1 << 17, compiled))
    assert any(key.startswith("stationary") for key in found), repeat(seed)


def test_euler_without_c_samples_another_temperature(monkeypatch, compiled, seed):
    """theta at half of (1+mu) T, here 0.75, while the kinetic temperature reads 1: why c matters."""
    monkeypatch.setattr(ctld_cuda.optimizer, "explore_coefficients", without_c)
    n, steps = 1 << 18, 1000
    theta = torch.nn.Parameter(torch.zeros(n))
    optimizer = CTLD(
        [theta], lr=0.01, momentum=0.5, num_data=1, tempering=None, integrator="euler", seed=seed
    )
    for _ in range(steps):
        theta.grad = theta.detach()
        optimizer.step()
    error = FIVE_SIGMA * math.sqrt(2.0 / n)
    assert abs(theta.detach().double().square().mean() / 0.7525 - 1.0) < error, repeat(seed)
    assert abs(optimizer.tempering_state()["kinetic_temperature"] / 1.0033 - 1.0) < error, repeat(seed)


# ---------------------------------------------------------------------------------------- equipartition


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_kinetic_temperature(compiled, integrator, seed):
    """Every chain's mean squared momentum follows chi-square over d: within 5 sqrt(2/d) of the exact law."""
    chains, case = 48, Harmonic(0.2, 0.8, num_data=50.0, temperature=2.5)
    parameters = [torch.nn.Parameter(torch.zeros(chains, *shape)) for shape in ((60, 70), (701,), ())]
    optimizer = CTLD(
        parameters,
        **case.group,
        num_data=case.num_data,
        temperature=case.temperature,
        tempering=None,
        integrator=integrator,
        chains=chains,
        seed=seed,
        backend=compiled,
    )
    for _ in range(case.relaxation(integrator)):
        for p in parameters:
            p.grad = p.detach().clone()
        optimizer.step()
    dimension = 60 * 70 + 701 + 1
    kinetic = optimizer.tempering_state()["kinetic_temperature"]
    assert kinetic.shape == (chains,)
    deviation = (kinetic / case.stationary(integrator)[1, 1] - 1.0) / math.sqrt(2.0 / dimension)
    found = {f"chain {i}": z for i, z in enumerate(deviation.tolist())}
    found["mean of the chains"] = deviation.mean() * math.sqrt(chains)
    check(found, seed)
    momenta = [optimizer.state[p]["momentum_buffer"].double().square().view(chains, -1) for p in parameters]
    assert torch.allclose(kinetic, torch.cat(momenta, 1).mean(1), rtol=1e-4)  # in quanta, truncated
