"""Constant temperature on an anharmonic target: the error of a finite step, against theory.

one_dimension.py derives it to leading order in the learning rate, and computes it to any order.
"""

import math

import numpy as np
import pytest
from checks import OBSERVABLES, RIPPLED, rippled_errors
from laws import check, repeat
from one_dimension import Grid, Rippled, boltzmann, leading_error, stationary

INTEGRATORS = ["baoab", "euler"]
ORDER = {"baoab": 2, "euler": 1}


def exact_error(integrator, lr, momentum, observable, potential=RIPPLED, temperature=1.0, grid=None):
    grid = grid or Grid.default()
    law = stationary(potential, integrator, lr, momentum, temperature, grid)
    return float((law - boltzmann(potential, temperature, grid)) @ observable(grid.x))


# ------------------------------------------------------------------------------ theory, no random numbers


@pytest.mark.parametrize("momentum", [0.2, 0.7])
def test_the_quadrature_on_a_quadratic(momentum):
    """The variances of the harmonic laws: 1 and 1/(1 - h/(2(1+mu)))."""
    harmonic = Rippled(height=0.0)
    for temperature in (0.3, 1.0):
        for integrator, ratio in (("baoab", 1.0), ("euler", 1.0 / (1.0 - 0.4 / (2.0 * (1.0 + momentum))))):
            law = stationary(harmonic, integrator, 0.4, momentum, temperature)
            assert law @ Grid.default().x ** 2 == pytest.approx(ratio * temperature, rel=1e-8)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_the_quadrature_does_not_depend_on_its_grid(integrator):
    finer = Grid.default(160, 96, 7.5, 8.5)
    for observable in OBSERVABLES.values():
        coarse = exact_error(integrator, 0.3, 0.5, observable)
        assert exact_error(integrator, 0.3, 0.5, observable, grid=finer) == pytest.approx(coarse, abs=1e-8)


@pytest.mark.parametrize(("momentum", "temperature"), [(0.0, 1.0), (0.5, 0.7)])
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_leading_order(integrator, momentum, temperature):
    """Errors over the predicted ones go to 1 as h goes to 0: Richardson's extrapolation from three h."""
    rates = np.array([0.01, 0.02, 0.04]) * (1.0 - momentum) / temperature
    for name in ("theta^2", "cos 2 theta"):
        observable = OBSERVABLES[name]
        ratios = [
            exact_error(integrator, lr, momentum, observable, temperature=temperature)
            / leading_error(RIPPLED, integrator, lr, momentum, observable, temperature)
            for lr in rates
        ]
        limit = (8.0 * ratios[0] - 6.0 * ratios[1] + ratios[2]) / 3.0
        assert limit == pytest.approx(1.0, abs=0.01), (name, ratios)


def test_the_configurational_temperature_hides_the_error_of_baoab():
    """<theta U'> is right to order h^2: its error goes as h^3, while that of others goes as h^2."""
    virial, ripple = OBSERVABLES["virial"], OBSERVABLES["cos 2 theta"]
    small, large = (exact_error("baoab", lr, 0.0, virial) for lr in (0.05, 0.1))
    assert 2.7 < math.log2(large / small) < 3.5
    assert large < 0.2 * exact_error("baoab", 0.1, 0.0, ripple)


# --------------------------------------------------------------------------------------------- sampled

RATES = {"baoab": (0.1, 0.2, 0.4), "euler": (0.05, 0.1, 0.2)}


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_configurational_error(engine, integrator, seed):
    """Sampled errors are the exact ones at every h, and grow with h as they do."""
    chains = engine.chains(1 << 17)
    found, sampled, exact = {}, [], []
    for i, lr in enumerate(RATES[integrator]):
        errors = rippled_errors(integrator, lr, 0.5, seed + i, chains, engine.backend)
        found |= {f"{name}, h = {lr}": (off - law) / error for name, (off, error, law) in errors.items()}
        sampled.append(errors["cos 2 theta"][:2])
        exact.append(errors["cos 2 theta"][2])
    # slope of ln(error) in ln(h), by least squares; its error to first order
    x = np.log(RATES[integrator])
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    values, errors = np.array(sampled).T
    assert (values > 0.0).all(), f"{values} +- {errors}; {repeat(seed)}"
    slope, expected = weights @ np.log(values), weights @ np.log(exact)
    found["order"] = (slope - expected) / math.sqrt(((weights * errors / exact) ** 2).sum())
    print(f"{integrator}: order {slope:.3f}, exact {expected:.3f}, as h goes to 0 {ORDER[integrator]}")
    check(found, seed, chains)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_configurational_error_on_every_backend(any_engine, integrator, seed):
    """One h, large enough for few chains to tell it from no error."""
    chains = any_engine.chains(1 << 15)
    lr = 0.5 if integrator == "baoab" else 0.3
    errors = rippled_errors(integrator, lr, 0.5, seed, chains, any_engine.backend, steps=100, discard=20)
    check({name: (off - law) / error for name, (off, error, law) in errors.items()}, seed, chains)
