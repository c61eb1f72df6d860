"""Constant temperature on harmonic targets.

A step is a linear map of (theta, p) plus Gaussian noise, so mean and covariance after any number of steps
follow from 2x2 matrices, discretisation included. laws.py states the bounds and their false-positive rate.
"""

import math

import numpy as np
import pytest
import torch
from checks import PRECISION, anisotropic, anisotropic_law, harmonic
from laws import Harmonic, check
from mutants import MUTANTS

from ctld_cuda import CTLD

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


@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize("name", HARMONIC)
def test_harmonic_targets(engine, name, integrator, seed):
    """Mean and covariance, early and when stationary, of 2^18 independent oscillators."""
    check(harmonic([HARMONIC[name]], integrator, seed, engine.chains(1 << 18), engine.backend), seed)


SHARED = dict(num_data=50.0, temperature=2.5)
GROUPS = [
    Harmonic(0.2, 0.9, **SHARED),
    Harmonic(0.05, 0.5, curvature=2.0, weight_decay=0.3, **SHARED),
    Harmonic(0.4, 0.0, curvature=0.0, weight_decay=0.8, **SHARED),
]


@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_have_their_own_options(engine, integrator, dtype, seed):
    """Learning rate, momentum and weight decay differ between the groups of one optimizer."""
    check(harmonic(GROUPS, integrator, seed, engine.chains(1 << 17), engine.backend, dtype), seed)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_harmonic_targets_on_every_backend(any_engine, integrator, seed):
    check(harmonic(GROUPS[1:2], integrator, seed, any_engine.chains(1 << 18), any_engine.backend), seed)


def test_euler_without_c_samples_another_temperature(compiled, seed):
    """theta at half of (1+mu) T, here 0.75, while the kinetic temperature reads 1: why c matters."""
    n, steps = 1 << 18, 600
    theta = torch.nn.Parameter(torch.zeros(n))
    optimizer = CTLD(
        [theta],
        lr=0.01,
        momentum=0.5,
        num_data=1,
        tempering=None,
        integrator="euler",
        seed=seed,
        backend=compiled,
    )
    with MUTANTS["c = 1 in euler"].applied():
        for _ in range(steps):
            theta.grad = theta.detach()
            optimizer.step()
    # P = T/(1 - h/(2(1+mu))) (1 + mu)/2 / c^2 with c = 1, see docs/method.md; p in quanta, truncated
    hidden = 1.0 / (1.0 - 0.01 / 3.0)
    found = {
        "theta": float(theta.detach().double().square().mean()) / (0.75 * hidden) - 1.0,
        "p": float(optimizer.tempering_state()["kinetic_temperature"]) / hidden - 1.0,
    }
    check({name: off * math.sqrt(n / 2.0) for name, off in found.items()}, seed)


# ---------------------------------------------------------------------------------------- equipartition


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_kinetic_temperature(engine, integrator, seed):
    """Every chain's mean squared momentum follows chi-square over d, of standard deviation sqrt(2/d)."""
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
        backend=engine.backend,
    )
    for _ in range(case.relaxation(integrator)):
        for p in parameters:
            p.grad = p.detach().clone()
        optimizer.step()
    dimension = 60 * 70 + 701 + 1
    kinetic = optimizer.tempering_state()["kinetic_temperature"]
    assert kinetic.shape == (chains,)
    deviation = (kinetic / case.stationary(integrator)[1, 1] - 1.0) / math.sqrt(2.0 / dimension)
    check({"chains": deviation, "mean of the chains": deviation.mean() * math.sqrt(chains)}, seed)
    momenta = [optimizer.state[p]["momentum_buffer"].double().square().view(chains, -1) for p in parameters]
    assert torch.allclose(kinetic, torch.cat(momenta, 1).mean(1), rtol=1e-4)  # in quanta, truncated


# ------------------------------------------------------------------------------------- anisotropic targets


def test_what_the_laws_of_the_anisotropic_target_say():
    """baoab samples the covariance T/A exactly, whatever the learning rates of the groups; euler does not."""
    assert np.linalg.cond(PRECISION) > 1e3
    for temperature in (0.3, 1.0, 3.0):
        law = anisotropic_law("baoab", temperature)
        assert np.allclose(law[:4, :4] @ PRECISION, temperature * np.eye(4), atol=1e-9)
        assert np.allclose(law[4:, 4:], temperature * np.eye(4), atol=1e-9)
        virial = np.trace(PRECISION @ anisotropic_law("euler", temperature)[:4, :4]) / 4.0
        assert virial > 1.02 * temperature


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_anisotropic_targets(engine, integrator, temperature, seed):
    """Condition number 10^3, a learning rate per group: covariance and both temperatures."""
    chains = engine.chains(1 << 16)
    check(anisotropic(integrator, temperature, seed, chains, engine.backend), seed)


def test_anisotropic_targets_on_every_backend(any_engine, seed):
    check(anisotropic("baoab", 0.3, seed, any_engine.chains(1 << 15), any_engine.backend, steps=80), seed)
