"""The motion of alpha: free between its walls, and coupled to harmonic targets in equilibrium.

Alpha alone must stay uniform and thermal; with the exact coupling one long step must leave the extended
density, known in closed form, as it is. laws.py states the bounds and their false-positive rate.
"""

import math

import numpy as np
import pytest
import torch
from laws import (
    BINS,
    CENTERS,
    FLAT,
    LIMIT,
    MAX_TEMPERATURE,
    PLAIN,
    WITH_PRIOR,
    check,
    deviations_from,
    device_of,
    repeat,
    root_temperature,
    too_large,
)

from ctld_cuda import CTLD, AdaptiveForce, Metadynamics, Tempering, reference

# --------------------------------------------------------------------------------- alpha left to itself


def free_alpha(chains, steps, seed, backend, step_size=0.2, persistence=0.9):
    """alpha without any force: zero loss, no hills."""
    device = device_of(backend)
    theta = torch.nn.Parameter(torch.zeros(chains, device=device))
    theta.grad = torch.zeros_like(theta)
    tempering = Tempering(
        coupling="exact",
        bias=AdaptiveForce(residual=None),
        step_size=step_size,
        persistence=persistence,
        limit=LIMIT,
        bins=BINS,
    )
    optimizer = CTLD([theta], num_data=1, tempering=tempering, chains=chains, seed=seed, backend=backend)
    loss = torch.zeros(chains, dtype=torch.float64, device=device)
    for _ in range(steps):
        optimizer.step(loss=loss)
    return optimizer


def uniformity_z(position, cells):
    """Chi-square deviation of numbers in [0, 1) from uniformity, in standard errors (Wilson, Hilferty)."""
    counts = torch.bincount((position * cells).long().clamp(0, cells - 1), minlength=cells).double()
    chi_square = (counts * cells / position.numel() - 1.0).square().sum().item() * position.numel() / cells
    spread = 2.0 / (9.0 * (cells - 1))
    return ((chi_square / (cells - 1)) ** (1 / 3) - (1.0 - spread)) / math.sqrt(spread)


def free_alpha_deviations(optimizer, steps, persistence=0.9):
    """alpha is uniform between the walls and r a stationary autoregression of any step size: exact laws.

    Folding at the walls keeps volume, and flipping the sign of r commutes with its noise; r starts at 0,
    so its variance is 1 - persistence^(2 steps).
    """
    state = optimizer.tempering_state()
    alpha, r = state["alpha"], state["alpha_momentum"]
    variance = 1.0 - persistence ** (2 * steps)
    law = np.array([[LIMIT**2 / 3, 0.0], [0.0, variance]])
    found = deviations_from(alpha, r, np.zeros(2), law)
    # a uniform square has variance 4/45 of its range's fourth power, not 2 of its own squared
    found["variance of theta"] *= math.sqrt(2.0 / 0.8)
    found["beyond the walls"] = math.inf if (alpha.abs() > LIMIT).any() else 0.0
    found["uniform"] = uniformity_z((alpha + LIMIT) / (2 * LIMIT), BINS)
    return found


def test_a_free_alpha_is_uniform_and_thermal(compiled, seed):
    optimizer = free_alpha(1 << 16, 150, seed, compiled)
    check(free_alpha_deviations(optimizer, 150), seed)
    state = optimizer.tempering_state()
    # alpha started at 0: over the first steps the bins near 0 saw more, the mean of r^2 less
    visits = state["visits"].double() / state["visits"].double().mean()
    assert visits.min() > 0.9 and visits.max() < 1.4, repeat(seed)
    assert state["visits"].sum() == 150 << 16
    expected = 1.0 - sum(0.81**n for n in range(1, 151)) / 150
    assert abs(state["alpha_kinetic_temperature"] - expected) < 0.01, repeat(seed)
    assert state["flags"] == 0


def no_reflection(alpha, r, c):
    return alpha, r


def walls_that_stop(alpha, r, c):
    return alpha.clamp(-c.limit, c.limit), r


def walls_that_wrap(alpha, r, c):
    return torch.remainder(alpha + c.limit, 2 * c.limit) - c.limit, r


def rebound_only(alpha, r, c):
    """Flips r beyond a wall and leaves alpha there."""
    return alpha, torch.where(alpha.abs() > c.limit, -r, r)


# walls_that_wrap is exact for a free alpha, whose law is periodic: only a force tells it from a reflection
@pytest.mark.parametrize("walls", [no_reflection, walls_that_stop, rebound_only])
def test_broken_walls_are_noticed(monkeypatch, walls, seed):
    monkeypatch.setattr(reference, "reflect", walls)
    optimizer = free_alpha(4096, 60, seed, "reference")
    found = too_large(free_alpha_deviations(optimizer, 60))
    assert "uniform" in found or "beyond the walls" in found, repeat(seed)


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


def test_far_excursions_of_a_run(backend, seed):
    """A step so long that every move crosses the walls many times keeps alpha inside and r thermal."""
    n, steps = 4096, 20
    optimizer = free_alpha(n, steps, seed, backend, step_size=1e4, persistence=0.5)
    check(free_alpha_deviations(optimizer, steps, persistence=0.5), seed)


# ------------------------------------------------------------------ the extended density: one long step


def in_equilibrium(case, chains, dimension, bias, seed, backend, step_size):
    """A sampler in the stationary law of a Gaussian target, its bias exact and no longer learning.

    Then chains are independent, and every step must leave the law as it is, but for the step sizes.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    alpha = (torch.rand(chains, generator=generator, dtype=torch.float64) * 2 - 1) * LIMIT
    q = root_temperature(alpha)[:, None]
    curvature = case.num_data * (case.curvature + case.weight_decay)
    # jointly stationary at fixed temperature: theta and p of baoab are correlated after a step
    root = np.linalg.cholesky(case.stationary("baoab"))
    a, b = randn(chains, dimension), randn(chains, dimension)
    theta = torch.nn.Parameter((q * root[0, 0] * a).float())
    p = (q * (root[1, 0] * a + root[1, 1] * b)).float()
    assert abs(root[0, 0] ** 2 * curvature / case.temperature - 1.0) < 1e-9
    optimizer = CTLD(
        [theta],
        **case.group,
        num_data=case.num_data,
        temperature=case.temperature,
        tempering=Tempering(
            max_temperature=MAX_TEMPERATURE,
            flat=FLAT,
            limit=LIMIT,
            bins=BINS,
            coupling="exact",
            bias=bias,
            step_size=step_size,
        ),
        chains=chains,
        seed=seed,
        backend=backend,
    )
    saved = optimizer.state_dict()
    tensors = saved["sampler"]["tensors"]
    tensors["alpha"].copy_(alpha)
    tensors["alpha_momentum"].copy_(randn(chains))
    tensors["temperature"].copy_(case.temperature * q[:, 0] ** 2)
    # so many visits and steps that what follows does not count
    tensors["visits"].fill_(10**14)
    tensors["samples"].fill_(BINS * 10**14)
    tensors["step"].fill_(10**12)
    tensors["energy_mean"].copy_(0.5 * dimension * root_temperature(CENTERS) ** 2)
    if isinstance(bias, Metadynamics):
        tensors["hills"].copy_(dimension * root_temperature(CENTERS).log())
    saved["state"] = {0: {"momentum_buffer": p}}
    optimizer.load_state_dict(saved)
    return optimizer, theta


def equilibrium_deviations(optimizer, theta, case, steps, allowance):
    """Runs and compares with the stationary law; ``allowance`` is for the step size of alpha.

    A lag of the temperature of theta or p behind alpha shows in their products with the direction in
    which alpha moves.
    """
    chains = theta.shape[0]
    for _ in range(steps):
        theta.grad = theta.detach() * case.curvature
        optimizer.step(loss=0.5 * case.curvature * theta.detach().double().square().sum(1))
    state = optimizer.tempering_state()
    assert state["flags"] == 0
    alpha, r = state["alpha"], state["alpha_momentum"]
    temperature = case.temperature * root_temperature(alpha) ** 2
    assert torch.allclose(state["temperature"], temperature, rtol=1e-12)
    precision = case.num_data * (case.curvature + case.weight_decay)
    theta_excess = theta.detach().double().square().mean(1) * precision / temperature - 1.0
    kinetic_excess = state["kinetic_temperature"] / temperature - 1.0
    outward = r * alpha.sign()
    statistics = {
        "alpha": alpha / LIMIT,
        "alpha^2": 3.0 * alpha.square() / LIMIT**2 - 1.0,
        "r": r,
        "r^2": r.square() - 1.0,
        "alpha r": outward * alpha.abs() / LIMIT,
        "theta^2 lags": theta_excess * outward,
        "p^2 lags": kinetic_excess * outward,
    }
    for name, low, high in (("window", 0.0, 0.4), ("foot", 0.4, 0.7), ("slope", 0.7, 1.1), ("top", 1.1, 1.5)):
        inside = (alpha.abs() >= low) & (alpha.abs() <= high)
        statistics[f"theta^2 in {name}"] = theta_excess[inside]
        statistics[f"p^2 in {name}"] = kinetic_excess[inside]
    found = {}
    for name, x in statistics.items():
        if x.numel() < 2:
            found[name] = math.inf
            continue
        error = float(x.std()) / math.sqrt(x.numel())
        excess = max(abs(float(x.mean())) - (allowance if name in ("r^2", "alpha^2") else allowance / 3), 0.0)
        found[name] = math.copysign(excess / error, float(x.mean()))
    found["beyond the walls"] = math.inf if (alpha.abs() > LIMIT).any() else 0.0
    return found | {"chains": 0.0 if chains == alpha.numel() else math.inf}


def broken_temper(change):
    """The alpha block with its results (scale, rescale) changed."""

    def temper(loss, state, c, seed):
        return change(*ORIGINAL_TEMPER(loss, state, c, seed))

    return temper


def temper_squared(flat, coefficients, scale, *rest):
    return ORIGINAL_EXPLORE_TENSOR(flat, coefficients, scale * scale, *rest)


ORIGINAL_TEMPER, ORIGINAL_EXPLORE_TENSOR = reference.temper, reference.explore_tensor
ORIGINAL_COUPLED_ENERGY, ORIGINAL_ENERGY = reference.coupled_energy, reference.potential_energy
BROKEN_COUPLINGS = {
    "momenta not rescaled": ("temper", broken_temper(lambda q, rescale: (q, torch.ones_like(rescale)))),
    "momenta rescaled the wrong way": ("temper", broken_temper(lambda q, rescale: (q, 1.0 / rescale))),
    "T^2 instead of T": ("explore_tensor", temper_squared),
    "force of the wrong sign": ("coupled_energy", lambda *a: -ORIGINAL_COUPLED_ENERGY(*a)),
    "force twice as large": ("coupled_energy", lambda *a: 2.0 * ORIGINAL_COUPLED_ENERGY(*a)),
    "energy not divided by T0": (
        "potential_energy",
        lambda loss, state, c: c.base_temperature * ORIGINAL_ENERGY(loss, state, c),
    ),
    "prior left out of the energy": ("potential_energy", lambda loss, state, c: c.energy_scale * loss),
    "no reflection": ("reflect", no_reflection),
    "walls that stop": ("reflect", walls_that_stop),
}

BIASES = {"adaptive": AdaptiveForce(), "metadynamics": Metadynamics()}
STEP_SIZE = 0.02
# what the finite step of alpha adds, most of all to r^2: 0.010 and 0.037 on average over 1e6 and 3e5 chains
ALLOWANCE = {2: 0.015, 20: 0.05}


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(("case", "dimension"), [(PLAIN, 2), (WITH_PRIOR, 2), (WITH_PRIOR, 20)])
def test_exact_coupling_keeps_the_extended_density(compiled, case, dimension, bias, seed):
    """Chains started in the stationary law stay in it: alpha, r, and theta and p at every temperature."""
    chains = 1 << (16 if dimension == 2 else 15)
    started = in_equilibrium(case, chains, dimension, BIASES[bias], seed, compiled, STEP_SIZE)
    check(equilibrium_deviations(*started, case, 200, ALLOWANCE[dimension]), seed)


@pytest.mark.parametrize("name", BROKEN_COUPLINGS)
def test_broken_couplings_are_noticed(monkeypatch, name, seed):
    function, broken = BROKEN_COUPLINGS[name]
    started = in_equilibrium(WITH_PRIOR, 1 << 13, 20, AdaptiveForce(), seed, "reference", STEP_SIZE)
    monkeypatch.setattr(reference, function, broken)
    assert too_large(equilibrium_deviations(*started, WITH_PRIOR, 150, ALLOWANCE[20])), repeat(seed)
