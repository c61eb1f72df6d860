"""The checks of the sampler: each runs it and returns deviations from a known law, by name.

The tests ask for all of them to be small; mutants.py asks which of them notices a broken sampler. Deviations
are in standard errors, less a stated allowance for the finite step of alpha.
"""

import math

import numpy as np
import torch
from laws import (
    BINS,
    CENTERS,
    FLAT,
    LIMIT,
    MAX_TEMPERATURE,
    Harmonic,
    deviations_from,
    device_of,
    energy_distance,
    energy_share,
    kolmogorov,
    normal_share,
    root_temperature,
)
from one_dimension import Grid, Rippled, boltzmann, stationary

from ctld_cuda import CTLD, AdaptiveForce, Metadynamics, Tempering
from ctld_cuda.tempering import steepest_slope

# -------------------------------------------------------------------------------- constant temperature


def harmonic(cases, integrator, seed, n, backend, dtype=torch.float32, start=1.0):
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


# four coordinates whose precision has eigenvalues from 1 to 1000, two stiff and two soft, all correlated
STIFFNESS = np.array([30.0, 20.0, 1.3, 1.0])
CORRELATION = 0.75 * np.eye(4) + 0.25 * np.array([1.0, -1.0, 1.0, 1.0])[:, None] * [1.0, -1.0, 1.0, 1.0]
PRECISION = STIFFNESS[:, None] * CORRELATION * STIFFNESS
ANISOTROPIC_GROUPS = (  # (coordinates, options)
    (slice(0, 2), {"lr": 4e-4, "momentum": 0.8}),
    (slice(2, 4), {"lr": 0.3, "momentum": 0.7}),
)


def anisotropic_law(integrator, temperature):
    """Stationary covariance of (theta, p), (8, 8), of a step on the correlated target: S = M S M' + Q."""
    lr, mu = np.empty(4), np.empty(4)
    for where, options in ANISOTROPIC_GROUPS:
        lr[where], mu[where] = options["lr"], options["momentum"]
    c, identity, nothing = np.sqrt((1.0 + mu) / 2.0), np.eye(4), np.zeros((4, 4))
    kick = np.sqrt(lr)[:, None] * PRECISION
    noise = np.block([[nothing, nothing], [nothing, np.diag((1.0 - mu**2) * temperature)]])
    if integrator == "euler":
        push = np.block([[identity, nothing], [-c[:, None] * kick, np.diag(mu)]])
        move = np.block([[identity, np.diag(np.sqrt(lr) / c)], [nothing, identity]])
        m = move @ push
    else:
        push = np.block([[identity, nothing], [-kick / c[:, None], identity]])
        move = np.block([[identity, np.diag(0.5 * np.sqrt(lr) / c)], [nothing, identity]])
        keep = np.block([[identity, nothing], [nothing, np.diag(mu)]])
        m = move @ keep @ move @ push
    q = move @ noise @ move.T
    return np.linalg.solve(np.eye(64) - np.kron(m, m), q.ravel()).reshape(8, 8)


def anisotropic(integrator, temperature, seed, chains, backend, steps=150):
    """Covariance, kinetic and configurational temperature on the correlated target, in every entry."""
    law = anisotropic_law(integrator, temperature)
    root = torch.from_numpy(np.linalg.cholesky(np.linalg.inv(PRECISION) * temperature))
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn((chains, 4), generator=generator, dtype=torch.float64) @ root.T
    parameters = [
        torch.nn.Parameter(start[:, where].float().to(device_of(backend))) for where, _ in ANISOTROPIC_GROUPS
    ]
    optimizer = CTLD(
        [{"params": [p]} | options for p, (_, options) in zip(parameters, ANISOTROPIC_GROUPS, strict=True)],
        num_data=1,
        temperature=temperature,
        tempering=None,
        integrator=integrator,
        chains=chains,
        seed=seed,
        backend=backend,
    )
    precision = torch.from_numpy(PRECISION).float().to(parameters[0].device)
    for _ in range(steps):
        gradient = torch.cat([p.detach() for p in parameters], 1) @ precision
        for p, (where, _) in zip(parameters, ANISOTROPIC_GROUPS, strict=True):
            p.grad = gradient[:, where].contiguous()
        optimizer.step()
    theta = torch.cat([p.detach() for p in parameters], 1).double().cpu()
    p = torch.cat([optimizer.state[p]["momentum_buffer"] for p in parameters], 1).double().cpu()
    z = torch.cat((theta, p), 1)
    root_n = math.sqrt(chains)
    diagonal = torch.from_numpy(np.diag(law).copy())
    error = (torch.from_numpy(law**2) + diagonal[:, None] * diagonal).sqrt() / root_n
    upper = torch.triu_indices(8, 8)
    covariance = ((z.T @ z / chains - torch.from_numpy(law)) / error)[upper[0], upper[1]]
    virial = (theta @ torch.from_numpy(PRECISION) * theta).mean(1)  # <theta . grad U>/d
    mean_virial = float(np.trace(PRECISION @ law[:4, :4])) / 4.0
    spread = PRECISION @ law[:4, :4]
    virial_error = math.sqrt(2.0 * np.trace(spread @ spread)) / 4.0 / root_n
    kinetic = optimizer.tempering_state()["kinetic_temperature"].cpu()
    kinetic_error = math.sqrt(2.0 * (law[4:, 4:] ** 2).sum()) / 4.0 / root_n
    return {
        "mean": z.mean(0) * root_n / diagonal.sqrt(),
        "covariance": covariance,
        "configurational temperature": (float(virial.mean()) - mean_virial) / virial_error,
        # summed in quanta, each truncated: low by half a quantum of 2^-16 or so
        "kinetic temperature": (float(kinetic.mean()) - np.trace(law[4:, 4:]) / 4.0) / kinetic_error,
        "neighbouring chains": (z[1:] * z[:-1]).mean(0) * root_n / diagonal,
    }


RIPPLED = Rippled()
OBSERVABLES = {
    "theta^2": lambda x: x * x,
    "cos 2 theta": lambda x: np.cos(2.0 * x),
    "energy": RIPPLED.energy,
    "virial": lambda x: x * RIPPLED.slope(x),
}


def rippled_errors(integrator, lr, momentum, seed, chains, backend, steps=140, discard=40, every=4):
    """Configurational errors on the rippled potential: sampled, their standard errors, and exact.

    Means over draws of every fourth step, errors from the spread over chains; {observable: (3 numbers)}.
    """
    generator = torch.Generator().manual_seed(seed)
    fine = np.linspace(-7.0, 7.0, 20_001)
    weights = np.exp(-RIPPLED.energy(fine))
    share = torch.rand(chains, generator=generator, dtype=torch.float64).numpy()
    start = np.interp(share, np.cumsum(weights) / weights.sum(), fine)
    theta = torch.nn.Parameter(torch.from_numpy(start).float().to(device_of(backend)))
    optimizer = CTLD(
        [theta],
        lr=lr,
        momentum=momentum,
        num_data=1,
        tempering=None,
        integrator=integrator,
        seed=seed,
        backend=backend,
    )
    sums = {name: torch.zeros(chains, dtype=torch.float64) for name in OBSERVABLES}
    height, frequency = RIPPLED
    for step in range(1, steps + 1):
        x = theta.detach()
        theta.grad = x - height * frequency * torch.sin(frequency * x)
        optimizer.step()
        if step > discard and step % every == 0:
            x = theta.detach().double().cpu()
            square, ripple = x * x, torch.cos(frequency * x)
            sums["theta^2"] += square
            sums["cos 2 theta"] += ripple
            sums["energy"] += 0.5 * square + height * ripple
            sums["virial"] += square - height * frequency * x * torch.sin(frequency * x)
    x, target = Grid.default().x, boltzmann(RIPPLED)
    law = stationary(RIPPLED, integrator, lr, momentum)
    found = {}
    for name, observable in OBSERVABLES.items():
        means = sums[name] / ((steps - discard) // every)
        exact = float(target @ observable(x))
        found[name] = (
            float(means.mean()) - exact,
            float(means.std()) / math.sqrt(chains),
            float(law @ observable(x)) - exact,
        )
    return found


def rippled(integrator, seed, chains, backend, lr=0.2, momentum=0.5):
    """The same as deviations of the sampled errors from the exact ones."""
    found = rippled_errors(integrator, lr, momentum, seed, chains, backend)
    return {name: (sampled - exact) / error for name, (sampled, error, exact) in found.items()}


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


def free_alpha_deviations(optimizer, steps, persistence=0.9):
    """alpha is uniform between the walls and r a stationary autoregression of any step size: exact laws.

    Folding at the walls keeps volume, and flipping the sign of r commutes with its noise; r starts at 0,
    so its variance is 1 - persistence^(2 steps).
    """
    state = optimizer.tempering_state()
    alpha, r = state["alpha"].cpu(), state["alpha_momentum"].cpu()
    variance = 1.0 - persistence ** (2 * steps)
    law = np.array([[LIMIT**2 / 3, 0.0], [0.0, variance]])
    found = deviations_from(alpha, r, np.zeros(2), law, "alpha and r: ")
    # a uniform square has variance 4/45 of its range's fourth power, not 2 of its own squared
    found["alpha and r: variance of theta"] *= math.sqrt(2.0 / 0.8)
    inside = (alpha.abs() <= LIMIT).all()
    return found | {
        "beyond the walls": 0.0 if inside else math.inf,
        "alpha uniform": kolmogorov((alpha + LIMIT) / (2.0 * LIMIT)) if inside else math.inf,
        "r normal": kolmogorov(normal_share(r / math.sqrt(variance))),
    }


# ------------------------------------------------------------------------------- the extended density

# parts of [0, limit] in which laws at the temperature of alpha are compared
REGIONS = {
    "window": (0.0, FLAT),
    "foot": (FLAT, 0.6),
    "rise": (0.6, 0.8),
    "middle": (0.8, 1.05),
    "shoulder": (1.05, 1.3),
    "top": (1.3, LIMIT),
}
DEFAULT_SHAPE = Tempering(max_temperature=MAX_TEMPERATURE, flat=FLAT, limit=LIMIT)


def kick_share(dimension, step_size):
    """(e w)^2 at its largest: variance of a kick e f of alpha, w^2 = (beta'/beta)^2 d/2, against its kT = 1.

    The errors of alpha's finite step are of this order.
    """
    return (step_size * steepest_slope(DEFAULT_SHAPE)) ** 2 * 0.5 * dimension


def gentle_step(dimension, share=0.01):
    """The step of alpha at which :func:`kick_share` is ``share``, at most 0.02."""
    return min(0.02, math.sqrt(share / kick_share(dimension, 1.0)))


def in_equilibrium(case, chains, dimension, bias, seed, backend, step_size, learned=True, persistence=0.98):
    """A sampler in the stationary law of a Gaussian target, its bias exact and no longer learning.

    Then chains are independent, and every step must leave the law as it is, but for the step sizes.
    ``learned=False``: nothing is known about the energy yet, and all is learned from here.
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
    device = device_of(backend)
    theta = torch.nn.Parameter((q * root[0, 0] * a).float().to(device))
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
            persistence=persistence,
        ),
        chains=chains,
        seed=seed,
        backend=backend,
    )
    saved = optimizer.state_dict()
    tensors = saved["param_groups"][0]["sampler"]["tensors"]
    tensors["alpha"].copy_(alpha)
    tensors["alpha_momentum"].copy_(randn(chains))
    tensors["temperature"].copy_(case.temperature * q[:, 0] ** 2)
    if isinstance(bias, Metadynamics):
        tensors["hills"].copy_(dimension * root_temperature(CENTERS).log())
    if learned:
        # so many visits and steps that what follows does not count
        tensors["visits"].fill_(10**14)
        tensors["samples"].fill_(BINS * 10**14)
        tensors["step"].fill_(10**12)
        tensors["energy_mean"].copy_(0.5 * dimension * root_temperature(CENTERS) ** 2)
    saved["state"] = {0: {"momentum_buffer": p}}
    optimizer.load_state_dict(saved)
    return optimizer, theta


def take_step(optimizer, theta, case):
    """One step on the Gaussian target; returns the loss."""
    theta.grad = theta.detach() * case.curvature
    loss = 0.5 * case.curvature * theta.detach().double().square().sum(1)
    optimizer.step(loss=loss)
    return loss


def mean_deviation(x, up, down=None):
    """Mean of independent numbers, in standard errors above ``up`` or below -``down`` (the same if None)."""
    if x.numel() < 2 or not torch.isfinite(x).all():
        return math.inf
    mean, down = float(x.mean()), up if down is None else down
    excess = max(mean - up, 0.0) + min(mean + down, 0.0)
    return excess * math.sqrt(x.numel()) / max(float(x.std()), 1e-300)


def extended_deviations(optimizer, theta, case, allowance):
    """How far the chains are from the extended density: alpha, r, and theta and p at every temperature.

    A lag of the temperature of theta or p behind alpha shows in their products with the direction in
    which alpha moves. ``allowance`` is that of the means of r^2 and alpha^2; the other means have a third of
    it, and distribution functions as much as such changes of the variance of r, of the density of alpha and
    of the mean energy move them.
    """
    state = optimizer.tempering_state()
    dimension = theta.shape[1]
    alpha, r = state["alpha"].cpu(), state["alpha_momentum"].cpu()
    temperature = case.temperature * root_temperature(alpha) ** 2
    precision = case.num_data * (case.curvature + case.weight_decay)
    energy = 0.5 * precision * theta.detach().double().cpu().square().sum(1) / temperature
    kinetic_energy = 0.5 * dimension * state["kinetic_temperature"].cpu() / temperature
    theta_excess, kinetic_excess = (2.0 / dimension * e - 1.0 for e in (energy, kinetic_energy))
    share, outward = energy_share(energy, dimension), r * alpha.sign()
    small = allowance / 3.0
    # a relative change of the energy moves its distribution function by x density(x), here at the mode
    k = 0.5 * dimension
    peak = max(k - 1.0, 0.5)
    movable = small * k * math.exp((k - 1.0) * math.log(peak) - peak - math.lgamma(k))
    found = {
        "alpha": mean_deviation(alpha / LIMIT, small),
        "alpha^2": mean_deviation(3.0 * alpha.square() / LIMIT**2 - 1.0, allowance),
        "alpha uniform": kolmogorov((alpha + LIMIT) / (2.0 * LIMIT), small),
        "r": mean_deviation(r, small),
        "r^2": mean_deviation(r.square() - 1.0, allowance),
        "r normal": kolmogorov(normal_share(r), 0.125 * allowance),
        "alpha r": mean_deviation(outward * alpha.abs() / LIMIT, small),
        "theta^2 lags": mean_deviation(theta_excess * outward, small),
        "p^2 lags": mean_deviation(kinetic_excess * outward, small),
        "beyond the walls": 0.0 if (alpha.abs() <= LIMIT).all() else math.inf,
        "temperature": 0.0 if torch.allclose(state["temperature"].cpu(), temperature) else math.inf,
    }
    for name, (low, high) in REGIONS.items():
        inside = (alpha.abs() >= low) & (alpha.abs() <= high)
        found[f"theta^2 in {name}"] = mean_deviation(theta_excess[inside], small)
        found[f"p^2 in {name}"] = mean_deviation(kinetic_excess[inside], small)
        found[f"energy in {name}"] = kolmogorov(share[inside], movable)
    # draws from the target
    window = alpha.abs() <= FLAT
    unit = theta.detach().double().cpu()[window] * math.sqrt(precision / case.temperature)
    generator = torch.Generator().manual_seed(1 + int(state["visits"].sum()))
    found["coordinates in window"] = kolmogorov(normal_share(unit[:, 0]), small)
    found["energy distance in window"] = energy_distance(
        unit, torch.randn(unit.shape, generator=generator, dtype=torch.float64)
    )
    found["neighbouring chains"] = mean_deviation(r[1:] * r[:-1], 0.0)
    return found


ADAPTIVE, METADYNAMICS, ENERGY_ONLY = AdaptiveForce(), Metadynamics(), AdaptiveForce(residual=None)
# What finite steps may change the mean of r^2 by, relatively. It falls by a quarter of kick_share at most:
# 0.0025 at gentle steps, 0.011 for 20 parameters at step 0.02. Measured over 10^5 to 10^6 chains, with errors
# of 0.003 to 0.009: 0.002 (d = 1), -0.007 (2), -0.003 (10), -0.002 (20), -0.008 (100), -0.006 (quick); of
# alpha^2 0 to -0.009.
ALLOWANCE = 0.02
# parameters that forget within two steps (h k = 1 without momentum): a late energy then belongs to others
QUICK = Harmonic(1.0, 0.0)


def extended(case, dimension, bias, seed, chains, backend, steps=200, step_size=None):
    """Chains started in the extended density must stay in it."""
    step_size = gentle_step(dimension) if step_size is None else step_size
    optimizer, theta = in_equilibrium(case, chains, dimension, bias, seed, backend, step_size)
    for _ in range(steps):
        take_step(optimizer, theta, case)
    found = extended_deviations(optimizer, theta, case, ALLOWANCE)
    return found | {"flags": 0.0 if optimizer.tempering_state()["flags"] == 0 else math.inf}


def quick(seed, chains, backend):
    """The same with parameters that move so fast that an energy of one step ago is that of others."""
    return extended(QUICK, 20, ADAPTIVE, seed, chains, backend, 150, 0.02)


# ----------------------------------------------------------------------------------- learning the bias


def integral_over_log_beta(per_bin):
    """-int per_bin dln(beta) from the first centre, by trapezoids along the last dimension."""
    log_beta = -2.0 * root_temperature(CENTERS).log()
    pieces = 0.5 * (per_bin[..., 1:] + per_bin[..., :-1]) * (log_beta[:-1] - log_beta[1:])
    return torch.cat((torch.zeros_like(per_bin[..., :1]), pieces.cumsum(-1)), -1)


def learning(case, dimension, bias, seed, chains, backend, steps=200):
    """Free energies, histogram and hills, learned from nothing by chains in equilibrium.

    Errors come from the spread over chains, which share no noise.
    """
    optimizer, theta = in_equilibrium(
        case, chains, dimension, bias, seed, backend, gentle_step(dimension), learned=False
    )
    prior = 0.5 * case.num_data * case.weight_decay / case.temperature
    count, energies = torch.zeros(2, chains, BINS, dtype=torch.float64)
    before = optimizer.tempering_state()["bias"].clone() if isinstance(bias, Metadynamics) else None
    for _ in range(steps):
        prior_energy = prior * theta.detach().double().square().sum(1)
        energy = (case.num_data / case.temperature * take_step(optimizer, theta, case) + prior_energy).cpu()
        alpha = optimizer.tempering_state()["alpha"].cpu()
        b = (alpha.abs() * (BINS / LIMIT)).long().clamp(0, BINS - 1)[:, None]
        count.scatter_add_(1, b, torch.ones_like(energy)[:, None])
        energies.scatter_add_(1, b, energy[:, None])
    state = optimizer.tempering_state()
    total = count.sum(0)
    found = {"histogram": 0.0 if torch.equal(state["visits"].cpu().double(), total) else math.inf}
    hills = bias if isinstance(bias, Metadynamics) else bias.residual
    if before is not None:
        deposited = sum(min(hills.height, hills.gain * BINS / t) for t in range(1, steps + 1)) * 2.0
        off = float((state["bias"] - before).sum()) / deposited - 1.0
        return found | {"hills": 0.0 if abs(off) < 1e-9 else math.inf}
    exact = dimension * root_temperature(CENTERS).log()
    beta = root_temperature(CENTERS) ** -2
    mean = energies.sum(0) / total
    influence = integral_over_log_beta((energies - mean * count) / total * beta)

    def deviations(off, per_chain):
        error = (per_chain - per_chain.mean(0)).square().sum(0).sqrt()[1:]
        # the energy at the centre of a bin for the mean over it, in parts of the whole
        allowance = 0.002 * exact.max() + 1e-3
        return (off[1:].abs() - allowance).clamp(min=0.0) / error.clamp(min=1e-6)

    found["free energy"] = deviations(state["free_energy"].cpu() - exact, influence)
    if chains >= 2000:  # else a bin may be empty, and its logarithm is far from Gaussian anyway

        def tenths(per_bin):
            """Means over tenths of the bins, above the first."""
            means = per_bin.unflatten(-1, (10, BINS // 10)).mean(-1)
            return means - means[..., :1]

        off = tenths(state["free_energy_histogram"].cpu() - exact)
        found["free energy of the histogram"] = deviations(off, tenths(influence + count / total))
    return found
