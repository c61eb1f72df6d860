"""The motion of alpha, free between its walls: it must stay uniform and thermal.

laws.py states the bounds and their false-positive rate.
"""

import math

import torch
from checks import free_alpha, free_alpha_deviations
from laws import LIMIT, bounded, check, repeat

from ctld_cuda import CTLD, Tempering, reference


def test_a_free_alpha_is_uniform_and_thermal(engine, seed):
    chains = engine.chains(1 << 16)
    optimizer = free_alpha(chains, 150, seed, engine.backend)
    check(free_alpha_deviations(optimizer, 150), seed)
    state = optimizer.tempering_state()
    # alpha started at 0: over the first steps the bins near 0 saw more, the mean of r^2 less
    visits = state["visits"].double() / state["visits"].double().mean()
    bounded({"least visited": (visits.min(), 0.9, 1.0), "most": (visits.max(), 1.0, 1.4)}, seed)
    assert state["visits"].sum() == 150 * chains
    expected = 1.0 - sum(0.81**n for n in range(1, 151)) / 150
    # r^2 is correlated over (1 + p^2)/(1 - p^2) = 9.5 steps
    error = math.sqrt(2.0 * 9.5 / (150 * chains))
    check({"r^2 of the run": (float(state["alpha_kinetic_temperature"]) - expected) / error}, seed)
    assert state["flags"] == 0


# alpha wrapped around at the walls is exact where it is free, its law periodic: only a force tells


def test_reflection_of_far_excursions(seed):
    """In closed form equal to folding at one wall after the other; |r| is kept."""
    c = CTLD([torch.nn.Parameter(torch.zeros(1))], num_data=1, tempering=Tempering(limit=LIMIT))._constants
    generator = torch.Generator().manual_seed(seed)
    start = (torch.rand(2000, generator=generator, dtype=torch.float64) - 0.5) * 40 * LIMIT
    start[:6] = torch.tensor([LIMIT, -LIMIT, 0.0, 3 * LIMIT + 0.1, -5 * LIMIT - 0.1, 0.5])
    momentum = torch.randn(2000, generator=generator, dtype=torch.float64)
    alpha, r = reference.reflect(start, momentum, c)
    for i, (a, v) in enumerate(zip(start.tolist(), momentum.tolist(), strict=True)):
        while abs(a) > LIMIT:
            a, v = math.copysign(2 * LIMIT, a) - a, -v
        assert abs(alpha[i] - a) < 1e-12 and r[i] == v, repeat(seed)
    far = torch.tensor([1e6, -1e6, 1e15, -1e15, 1e300], dtype=torch.float64)
    alpha, r = reference.reflect(far, torch.ones(5, dtype=torch.float64), c)
    assert (alpha.abs() <= LIMIT).all() and (r.abs() == 1).all()


def test_far_excursions_of_a_run(any_engine, seed):
    """A step so long that every move crosses the walls many times keeps alpha inside and r thermal."""
    n, steps = any_engine.chains(1 << 15), 20
    optimizer = free_alpha(n, steps, seed, any_engine.backend, step_size=1e4, persistence=0.5)
    check(free_alpha_deviations(optimizer, steps, persistence=0.5), seed)
