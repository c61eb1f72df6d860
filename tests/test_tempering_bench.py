"""The tempering study measures what it says: its counters and estimators on data whose answers are known.

Bounds are 5 standard errors, as in laws.py; about 60 comparisons per run.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from laws import FIVE_SIGMA, Harmonic, repeat

from ctld_cuda import Tempering, backend_info

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import tempering
import tempering_heat
import tempering_noise
import tempering_sampler as sampler
import tempering_study as study
import tempering_targets as targets
import tempering_theory as theory
import tempering_window

pytestmark = pytest.mark.skipif(not backend_info()["cpu"]["usable"], reason="the C++ extension is not built")


def close(pair, expected, seed, allowance=0.0):
    value, error = pair
    assert error > 0 and abs(value - expected) < FIVE_SIGMA * error + allowance, (
        f"{value} +- {error}, not {expected}; {repeat(seed)}"
    )


# -------------------------------------------------------------------------------------- round trips


def test_round_trips_of_a_known_path():
    alpha = np.zeros(2)
    trips = sampler.RoundTrips(alpha, window=0.4, hot=1.4)
    path = [0.0, 1.0, 1.4, 1.0, 1.5, 0.5, -0.4, 0.3, -1.0, -1.45, -0.5, -1.5, 0.0, 1.45]
    for position in path:
        alpha[:] = position, 0.0
        trips.watch()
    assert trips.trips.tolist() == [2, 0] and trips.was_hot.tolist() == [True, False]
    rate, _ = trips.steps_per_trip(every=3)
    assert rate == 3 * 2 * len(path) / 2
    assert sampler.RoundTrips(alpha * 0, 0.4, 1.4).steps_per_trip()[0] == math.inf


def test_round_trips_of_a_random_walk(seed):
    """Commute times of a walk on a path of m edges are 2 m times the distance: here 2 * 12 * 7 steps."""
    edges, low, high, chains, steps = 12, 3, 10, 300, 4_000
    rng = np.random.default_rng(seed)
    share = np.full(edges + 1, 1.0 / edges)
    share[[0, -1]] *= 0.5
    position = rng.choice(edges + 1, chains, p=share)
    was_hot = rng.random(chains) < (position - low) / (high - low)
    alpha = position.astype(float)
    trips = sampler.RoundTrips(alpha, low, high, was_hot)
    for _ in range(steps):
        move = rng.choice([-1, 1], chains)
        position = np.where(position == 0, 1, np.where(position == edges, edges - 1, position + move))
        alpha[:] = position
        trips.watch()
    close(trips.steps_per_trip(), 2 * edges * (high - low), seed)


def test_trips_of_a_free_alpha_follow_the_prediction(seed):
    """d = 1: nearly free flight, where the thermal flux counts; d = 100 with fast energies: friction."""
    for dimension, lr in ((1, 0.05), (100, 1.0)):
        t = Tempering(coupling="exact")
        target = targets.isotropic(dimension)
        run = sampler.in_equilibrium(target, t, lr=lr, momentum=0.5, chains=100, seed=seed)
        trips = sampler.RoundTrips(run.alpha, t.flat, theory.hottest_edge(t))
        run.steps(300, trips.watch)
        trips.trips[:], trips.observations = 0, 0
        run.steps(1_500, trips.watch)
        predicted = theory.round_trip(t, dimension, theory.energy_time(lr, 0.5, target.curvatures))
        value, _ = trips.steps_per_trip()
        # the theory is one of large friction or none: it is up to a quarter off in between
        assert 0.5 < value / predicted < 1.5, f"{value} {predicted}; {repeat(seed)}"


def test_the_way_back_is_the_share_of_the_resistance():
    t = Tempering(coupling="exact")
    ends = np.array([0.0, t.flat, theory.hottest_edge(t), t.limit])
    assert np.allclose(theory.share_of_way(ends, t, 50, 5.0), [0, 0, 1, 1], atol=1e-3)
    middle = theory.share_of_way(np.array([0.7, -0.7]), t, 10**6, 5.0)
    slope = theory.log_beta_slope(np.linspace(0.4, theory.hottest_edge(t), 100_001), t) ** 2
    inside = np.linspace(0.4, theory.hottest_edge(t), 100_001) < 0.7
    assert np.allclose(middle, slope[inside].sum() / slope.sum(), atol=1e-3)


# ------------------------------------------------------------------------------------------- theory


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_energy_times_and_autocorrelations(momentum):
    """Against the powers of the step map that the tests of the integrator use."""
    lrs = np.array([0.02, 0.3, 1.2])
    times, rho = theory.mode_energy_times(lrs, momentum), theory.energy_autocorrelations(lrs, momentum, 2)
    for i, lr in enumerate(lrs):
        case = Harmonic(lr, momentum)
        m, _ = case.step_map("baoab")
        column = case.stationary("baoab")[:, 0]
        expected = []
        for _ in range(3_000):
            expected.append((column[0]) ** 2)
            column = m @ column
        assert np.allclose(rho[:, i], expected[:3])
        assert math.isclose(times[i], sum(expected) - 0.5, rel_tol=1e-9)
    spectrum = np.array([1.0, 1.0, 15.0])
    mean = theory.mode_energy_times(0.02 * spectrum, momentum).mean()
    assert math.isclose(theory.energy_time(0.02, momentum, spectrum), mean)


def test_the_best_momentum_is_the_best():
    curvatures = np.geomspace(0.01, 1.0, 20)
    best = theory.best_momentum(1.0, curvatures)
    times = {
        mu: theory.energy_time(1.0, mu, curvatures) for mu in (0.0, best - 0.05, best, best + 0.05, 0.99)
    }
    assert min(times, key=times.get) == best


def test_slopes_are_derivatives():
    t = Tempering(max_temperature=30.0)
    alpha, h = np.linspace(0.01, 1.49, 50), 1e-6
    log_beta = [-2.0 * np.log(theory.root_temperature(alpha + s, t)) for s in (-h, h)]
    assert np.allclose(theory.log_beta_slope(alpha, t), (log_beta[0] - log_beta[1]) / (2 * h), atol=1e-5)


# -------------------------------------------------------------------------------- targets and starts


@pytest.mark.parametrize("name", ["isotropic", "anisotropic", "quartic", "mixture"])
def test_targets(name, seed):
    """Gradients are those of the energy; draws have the mean gradient-times-theta of d (the virial)."""
    target = targets.make({"target": name, "dimension": 3, "condition": 10.0})
    generator = torch.Generator().manual_seed(seed)
    theta = target.draw(torch.ones(20_000), generator)
    gradient, h = torch.zeros_like(theta), 1e-2
    energy = target(theta, gradient).numpy()
    gradient = gradient.clone().double()
    shift = torch.zeros(3)
    shift[0] = h
    scratch = torch.zeros_like(theta)
    slope = (target(theta + shift, scratch) - target(theta - shift, scratch)) / (2 * h)
    assert (slope - gradient[:, 0]).abs().median() < 2e-3 and (slope - gradient[:, 0]).abs().max() < 0.1
    virial = (theta.double() * gradient).sum(1).numpy()
    close((virial.mean(), virial.std() / math.sqrt(virial.size)), 3.0, seed)
    if name != "mixture":
        hot = target(target.draw(torch.full((20_000,), 2.0), generator), scratch).numpy()
        for temperature, found in ((1.0, energy), (4.0, hot)):
            expected = target.energy_shape * temperature
            close((found.mean(), found.std() / math.sqrt(found.size)), expected, seed)
    else:
        left = (theta[:, 0] < 0).double().numpy()
        close((left.mean(), left.std() / math.sqrt(left.size)), target.left, seed)


def test_the_free_energy_of_the_mixture(seed):
    """By importance sampling from the target: Z(beta)/Z(1) = mean of exp((1 - beta) U)."""
    target = targets.Mixture(1)
    theta = target.draw(torch.ones(200_000), torch.Generator().manual_seed(seed))
    energy = target(theta, torch.zeros_like(theta)).numpy()
    beta = 0.7
    weight = np.exp((1.0 - beta) * energy)
    expected = math.exp(target.free_energy(np.array([math.log(beta)]))[0])
    close((weight.mean(), weight.std() / math.sqrt(weight.size)), expected, seed)
    assert abs(target.free_energy(np.zeros(1))[0]) < 1e-9


def test_chains_start_in_equilibrium(seed):
    """At fixed alpha the start is stationary: variances of theta and p and their covariance."""
    t = Tempering(coupling="exact")
    case = Harmonic(0.4, 0.8)
    chains = 20_000
    run = sampler.in_equilibrium(
        targets.isotropic(1), t, lr=case.lr, momentum=case.momentum, chains=chains, seed=seed
    )
    q = theory.root_temperature(run.alpha, t)
    x = run.theta[:, 0].numpy() / q
    p = run.optimizer.state[run.parameter]["momentum_buffer"][:, 0].numpy() / q
    law = case.stationary("baoab")
    for product, expected in ((x * x, law[0, 0]), (x * p, law[0, 1]), (p * p, law[1, 1])):
        close((product.mean(), product.std() / math.sqrt(chains)), expected, seed)
    position = np.abs(run.alpha) / t.limit
    close((position.mean(), position.std() / math.sqrt(chains)), 0.5, seed)


# ------------------------------------------------------------------------------------------ averages


def test_errors_from_the_spread_over_chains(seed):
    """Means of autoregressions: deviations over their errors have the variance of Student's t, 29/27."""
    rng = np.random.default_rng(seed)
    chains, repeats, steps = 30, 400, 60
    r = rng.standard_normal((repeats, chains))
    means = [sampler.Means(chains) for _ in range(repeats)]
    for _ in range(steps):
        r = 0.9 * r + math.sqrt(1.0 - 0.81) * rng.standard_normal(r.shape)
        weight = rng.random(chains) < 0.7
        for one, values in zip(means, r, strict=True):
            one.add("r^2", values * values, weight)
    z = np.array([(one["r^2"][0] - 1.0) / one["r^2"][1] for one in means])
    expected = (chains - 1) / (chains - 3)
    # the skew of r^2 makes the tails heavier than Student's
    assert abs((z * z).mean() - expected) < FIVE_SIGMA * 2.5 / math.sqrt(repeats), repeat(seed)


def test_r_square_in_equilibrium(seed):
    """Slow energies, where it is as predicted whatever the order of the kicks; 2 dimensions: nearly 1."""
    row = tempering_heat.measure(
        {"dimension": 2, "momentum": 0.9, "lr_share": 0.001, "chains": 200, "steps": 1_000}, seed
    )
    close(row["r_square"], row["predicted"], seed)
    close(row["window"], 1.0, seed)
    assert 0.99 < row["predicted"] < 1.0 and row["r_square"][1] < 0.05


def test_the_predicted_r_square():
    """At the steepest place the default step has eps^2 K = 1/4 in many dimensions."""
    t = Tempering(coupling="exact")
    assert math.isclose(theory.r_square(t, 10_000, share=0.9999), 1.0 - 1.0 / 16.0, rel_tol=1e-3)
    assert theory.r_square(t, 1) > 0.999


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_the_linear_theory_without_noise(momentum):
    """The extended density is kept by both halves of a step; only the stored r is half a kick late."""
    for lr in (0.003, 0.1, 1.0):
        for stiff in (1e-6, 0.05, 0.25):
            found = theory.linear_r_square(stiff, lr, momentum, 0.98)
            assert math.isclose(found, 1.0 - stiff / 4.0, rel_tol=1e-9)


def test_the_linear_theory_of_a_free_alpha():
    """Without a spring r is an autoregression: each kick arrives in two halves, the friction between them."""
    c, v = 0.9, 0.03
    for known in (0.0, v):
        expected = 1.0 - known / (1.0 - c * c) + v * (0.5 * (1.0 + c)) ** 2 / (1.0 - c * c)
        assert math.isclose(theory.linear_r_square(1e-12, 0.1, 0.5, c, v, known), expected, rel_tol=1e-6)
    t = Tempering(coupling="exact")
    assert theory.noisy_r_square(t, 100, 0.1, 0.9, 1.0, False) > theory.noisy_r_square(
        t, 100, 0.1, 0.9, 1.0, True
    )


def test_what_energy_noise_can_subtract():
    """At the bound the heat of the noise is all of alpha's own at the worst place, and not beyond it."""
    t = Tempering(coupling="exact", step_size=0.02)
    sigma = theory.correctable_noise(t, 50) * 5.0
    slope, h = np.linspace(0.4, 1.5, 10_001), 1e-6
    beta = [theory.root_temperature(slope + s, t) ** -2 for s in (-h, h)]
    kick = 0.02 * np.abs(beta[1] - beta[0]).max() / (2 * h) * sigma
    assert math.isclose(kick, math.sqrt(1.0 - 0.98**2), rel_tol=1e-3)


# --------------------------------------------------------------------------------------------- noise


def test_the_noise_estimator_on_white_noise(seed):
    """White noise on a parabola in time: second differences see a constant, fourth ones nothing of it."""
    rng = np.random.default_rng(seed)
    chains, sigma = 40, 3.0
    second = tempering_noise.NoiseEstimate(chains, tempering_noise.SECOND)
    fourth = tempering_noise.NoiseEstimate(chains, tempering_noise.FOURTH)
    inside = np.arange(chains) < 10
    for t in range(600):
        # louder outside the window
        energy = np.where(inside, sigma, 2.0 * sigma) * rng.standard_normal(chains) + 100.0 + 0.5 * t * t
        for estimate in (second, fourth):
            estimate.add(energy, inside)
    # the parabola's second difference is 1: 1/6 nats^2 on top
    close(second.sigma("window"), math.sqrt(sigma**2 + 1.0 / 6.0), seed)
    close(fourth.sigma("window"), sigma, seed)
    close(fourth.sigma("all"), sigma * math.sqrt((10 + 4 * 30) / 40), seed)


def test_the_floor_of_the_noise_estimator(seed):
    """Noise-free energies of the sampler at constant temperature, against their autocorrelations."""
    target, lr, momentum, chains = targets.anisotropic(20, 10.0), 0.1, 0.9, 300
    generator = torch.Generator().manual_seed(seed)
    theta = target.draw(torch.ones(chains), generator)
    run = sampler.Run(target, theta, None, lr=lr, momentum=momentum, seed=seed)
    run.steps(100)
    estimate = tempering_noise.NoiseEstimate(chains, tempering_noise.SECOND)
    run.steps(400, lambda: estimate.add(run.given, np.ones(chains)))
    value, error = estimate.sigma("all")
    thermal = math.sqrt(10.0)
    expected = theory.second_difference_floor(lr, momentum, target.curvatures)
    close((value / thermal, error / thermal), expected, seed)


# -------------------------------------------------------------------------------------------- window


def test_the_distance_from_the_energy_law(seed):
    rng = np.random.default_rng(seed)
    law, chains = tempering_window.EnergyLaw(10.0, 50), 50
    shifted = tempering_window.EnergyLaw(10.0, chains)
    for _ in range(400):
        draws = rng.standard_gamma(10.0, chains)
        law.add(draws, rng.random(chains) < 0.5)
        shifted.add(draws + 0.5, np.ones(chains, dtype=bool))
    value, error = law.distance()
    # the largest of many correlated deviations, of draws and of the million that define the grid
    assert value < FIVE_SIGMA * error + 0.003, repeat(seed)
    # 0.5 times the largest density of a gamma law of shape 10
    expected = 0.5 * 9.0**9 * math.exp(-9.0) / math.factorial(9)
    close(shifted.distance(), expected, seed, allowance=0.01)


# ------------------------------------------------------------------------------------------- command


def tiny(items):
    """A few items of a study, cut to a fraction of a second."""
    cut = {"steps": 60, "trips": 1, "most_steps": 60, "checkpoints": [20, 60], "chains": 10}
    return [
        item._replace(settings=item.settings | {k: v for k, v in cut.items() if k in item.settings})
        for item in items[:2]
    ]


def test_the_command(monkeypatch, tmp_path, capsys):
    """Every study runs, is stored and has a table; what is stored is not run again."""
    for module in tempering.STUDIES.values():
        items = tiny(module.items(True))
        monkeypatch.setattr(module, "items", lambda quick, items=items: items)
    tempering.main(["--quick", "--out", str(tmp_path)])
    text = (tmp_path / "tempering.md").read_text()
    assert all(title in text for title in tempering.TITLES.values())
    found = json.loads((tmp_path / "tempering.json").read_text())
    assert set(found["rows"]) == set(tempering.STUDIES)
    rows = [row for rows in found["rows"].values() for row in rows]
    assert all(row["seed"] > 0 and row["seconds"] >= 0 for row in rows)
    assert len({row["seed"] for row in rows}) == len(rows)

    capsys.readouterr()
    tempering.main(["--quick", "--only", "heat", "--out", str(tmp_path)])
    assert "heat " not in capsys.readouterr().out
    assert json.loads((tmp_path / "tempering.json").read_text())["rows"] == found["rows"]


def test_numbers_as_text():
    assert (
        study.with_error((1234.5, 67.0)) == "1,234 ± 67" or study.with_error((1234.5, 67.0)) == "1,235 ± 67"
    )
    assert study.with_error((0.12345, 0.0123)) == "0.123 ± 0.012"
    assert study.with_error((-0.5, 0.3), sign=True) == "-0.5 ± 0.3"
    assert study.number(0.00123) == "0.00123" and study.number(math.nan) == "–"
    options = {"tempering": {"height": 0.0, "alone": False}}
    assert study.tempering_of(options, coupling="exact").hills is None
