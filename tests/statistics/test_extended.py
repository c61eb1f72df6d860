"""The extended density on harmonic targets: what the exact coupling samples at every alpha.

Chains are started in it, so that they are independent draws, and must stay in it. Cold starts: see
test_tempering.py. laws.py states the bounds and their false-positive rate.
"""

import pytest
from checks import (
    ADAPTIVE,
    ENERGY_ONLY,
    METADYNAMICS,
    extended,
    gentle_step,
    kick_share,
    learning,
    quick,
)
from laws import PLAIN, WITH_PRIOR, check

from ctld_cuda import Tempering
from ctld_cuda.tempering import default_step_size

BIASES = {"adaptive": ADAPTIVE, "metadynamics": METADYNAMICS}
CHAINS = {1: 1 << 15, 10: 1 << 14, 100: 1 << 13, 1000: 1 << 11}


def test_the_default_step_of_alpha_keeps_kicks_small():
    exact = Tempering(coupling="exact")
    for dimension in CHAINS:
        assert kick_share(dimension, default_step_size(exact, dimension)) <= 0.25 + 1e-9
        assert kick_share(dimension, gentle_step(dimension)) <= 0.01 + 1e-9


@pytest.mark.parametrize("dimension", CHAINS)
def test_extended_density(engine, dimension, seed):
    """Flat alpha, thermal r; at every alpha the law of the energy and the kinetic temperature; the window."""
    chains = engine.chains(CHAINS[dimension], 1024)
    check(extended(PLAIN, dimension, ADAPTIVE, seed, chains, engine.backend, 150), seed, 100)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(("case", "dimension"), [(PLAIN, 2), (WITH_PRIOR, 2), (WITH_PRIOR, 20)])
def test_extended_density_at_a_long_step(engine, case, dimension, bias, seed):
    """Both kinds of bias, with a prior and without, at the longest step of alpha that is a default."""
    chains = engine.chains(1 << (15 if dimension == 2 else 14))
    found = extended(case, dimension, BIASES[bias], seed, chains, engine.backend, 150, 0.02)
    check(found, seed, 100)


def test_extended_density_of_quick_parameters(engine, seed):
    check(quick(seed, engine.chains(1 << 14), engine.backend), seed, 100)


@pytest.mark.parametrize("dimension", [2, 20])
def test_extended_density_on_every_backend(any_engine, dimension, seed):
    """Where a region would hold a dozen chains only what all of them say is compared."""
    chains = any_engine.chains(1 << 14, 256)
    found = extended(WITH_PRIOR, dimension, ADAPTIVE, seed, chains, any_engine.backend, 60, 0.02)
    check({name: z for name, z in found.items() if " in " not in name or chains > 1000}, seed, 100)


@pytest.mark.parametrize("dimension", CHAINS)
def test_free_energies_are_learned(engine, dimension, seed):
    """Both estimates are -(d/2) ln beta, from nothing known at the start."""
    chains = engine.chains(max(CHAINS[dimension] // 4, 2048), 256)
    check(learning(PLAIN, dimension, ENERGY_ONLY, seed, chains, engine.backend), seed, chains)


def test_free_energies_are_learned_on_every_backend(any_engine, seed):
    chains = any_engine.chains(1 << 12, 256)
    check(learning(WITH_PRIOR, 20, ENERGY_ONLY, seed, chains, any_engine.backend, 60), seed, chains)


def test_hills_have_their_height(engine, seed):
    """The sum of all hills after every step is known."""
    check(learning(PLAIN, 2, METADYNAMICS, seed, engine.chains(1 << 12), engine.backend), seed)
