"""The sampler benchmark's targets, estimators and bookkeeping; no times are judged here.

Bounds in standard errors fail by chance with probability 6e-7 each (5 standard errors); there are about 20.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from laws import FIVE_SIGMA, repeat

from ctld_cuda import backend_info

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import sampler_measure as measure  # noqa: E402
import sampler_methods as methods  # noqa: E402
import sampler_report as report  # noqa: E402
import sampler_targets as targets  # noqa: E402
import samplers  # noqa: E402

needs_compiled_cpu = pytest.mark.skipif(
    not backend_info()["cpu"]["usable"], reason="the C++ extension is not built"
)


def logistic(reference=None):
    """A small logistic regression that needs no data set."""
    generator = np.random.default_rng(0)
    design = targets.standardized(generator.standard_normal((60, 2)))
    response = (generator.random(60) < targets.sigmoid(design @ np.array([0.3, 1.0, -0.7]))).astype(float)
    return targets.LogisticRegression("small", "small", design, response, reference)


def linear():
    generator = np.random.default_rng(0)
    design = targets.standardized(generator.standard_normal((40, 1)))
    return targets.LinearRegression(
        "small", "small", design, design @ np.array([0.5, -1.0]) + 0.5 * generator.standard_normal(40), 0.5
    )


# -------------------------------------------------------------------------------------------- targets


def energy_float64(target, theta):
    """The energies by definition, in float64, for autograd."""
    if isinstance(target, targets.Mixture):
        means, weights = torch.from_numpy(target.means), torch.from_numpy(target.weights)
        squares = (theta[:, None, :] - means).square().sum(2)
        return -(weights.log() - 0.5 * squares / target.variance).logsumexp(1)
    design, response = torch.from_numpy(target.design), torch.from_numpy(target.response)
    prior = 0.5 * theta.square().sum(1)
    if isinstance(target, targets.LinearRegression):
        return prior + 0.5 * (theta @ design.T - response).square().sum(1) / target.noise**2
    losses = torch.nn.functional.binary_cross_entropy_with_logits
    logits = theta @ design.T
    return prior + losses(logits, response.expand_as(logits), reduction="none").sum(1)


@pytest.mark.parametrize("build", [targets.grid, targets.two_modes, linear, logistic])
def test_gradients_and_energies_are_those_of_the_density(build, seed):
    target = build()
    generator = torch.Generator().manual_seed(seed)
    theta = 3 * torch.randn(200, target.dimension, generator=generator, dtype=torch.float64)
    exact = theta.clone().requires_grad_()
    energy = energy_float64(target, exact)
    (gradient,) = torch.autograd.grad(energy.sum(), exact)
    got_gradient, got_energy = target.gradient_and_energy()(theta.float())
    # energies are known up to one constant
    shifts = got_energy.double() - energy.detach()
    scale = energy.detach().abs().max()
    assert (shifts - shifts[0]).abs().max() < 1e-5 * scale, repeat(seed)
    # between modes float32 cannot say exactly how the components share
    assert (got_gradient - gradient).abs().max() < 1e-4 * gradient.abs().max(), repeat(seed)


def test_far_outside_the_gradient_is_that_of_the_nearest_component():
    target = targets.grid()
    theta = torch.tensor([[30.0, -40.0]])
    gradient, energy = target.gradient_and_energy()(theta)
    nearest = torch.tensor([[4.0, -4.0]])
    assert torch.allclose(gradient, (theta - nearest) / target.variance)
    assert energy.isfinite().all()


def test_the_grids_mode_weights_agree_with_numerical_integration():
    target = targets.grid()
    cells = 3 * 40  # midpoints of 3 boxes of 2 x 2 around each of 9 means: the corner and its neighbours
    axis = -5.0 + (np.arange(cells) + 0.5) * 6.0 / cells
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    density = np.exp(-energy_float64(target, torch.from_numpy(points)).numpy())
    mode = target.mode_of(points.astype(np.float32))
    shares = np.bincount(mode, density, minlength=25)
    looked_at = [0, 1, 2, 5, 6, 7, 10, 11, 12]
    exact = target.moments.mean[looked_at] / target.moments.mean[looked_at].sum()
    assert np.allclose(shares[looked_at] / shares.sum(), exact, rtol=1e-6)


def test_modes_are_assigned_to_the_nearest_mean(seed):
    generator = np.random.default_rng(seed)
    for target in (targets.grid(), targets.two_modes()):
        mode = generator.integers(target.modes, size=500)
        offset = generator.standard_normal((500, target.dimension))
        # closer than half the smallest distance between means
        offset *= 0.9 * (1.0 if target.modes == 25 else 4.0) / np.linalg.norm(offset, axis=1, keepdims=True)
        values = (target.means[mode] + offset).astype(np.float32)
        assert np.array_equal(target.mode_of(values), mode), repeat(seed)
        assert np.array_equal(target.functions(values).argmax(1), mode)


def test_every_chain_starts_in_the_first_mode(seed):
    target = targets.grid()
    start = target.start(1000, np.random.default_rng(seed))
    assert start.shape == (1000, 2) and start.dtype == np.float32
    assert set(target.mode_of(start)) == {0}
    assert np.allclose(target.means[0], [-4, -4])


def numerical_moments(target, width=8.0, points=161):
    """Mean, variance and variance of the square by a product rule in Laplace-whitened coordinates."""
    if isinstance(target, targets.LinearRegression):
        hessian = target.precision
        mode = np.linalg.solve(hessian, target.design.T @ target.response / target.noise**2)
    else:
        mode, hessian = target.laplace
    spread = np.linalg.inv(np.linalg.cholesky(hessian)).T
    axis = np.linspace(-width, width, points)
    z = np.stack(np.meshgrid(*[axis] * target.dimension, indexing="ij"), -1).reshape(-1, target.dimension)
    theta = mode + z @ spread.T
    energy = np.concatenate(
        [energy_float64(target, torch.from_numpy(part)).numpy() for part in np.array_split(theta, 50)]
    )
    weight = np.exp(energy.min() - energy)
    weight /= weight.sum()
    mean = weight @ theta
    squares = (theta - mean) ** 2
    variance = weight @ squares
    return mean, variance, weight @ squares**2 - variance**2


def test_the_linear_regressions_moments_agree_with_numerical_integration():
    target = linear()
    mean, variance, of_square = numerical_moments(target)
    assert np.allclose(target.moments.mean, np.concatenate([mean, variance]), rtol=1e-6)
    assert np.allclose(target.moments.variance, np.concatenate([variance, of_square]), rtol=1e-6)


def test_the_reference_sampler_agrees_with_numerical_integration(seed):
    target = logistic()
    exact = numerical_moments(target, points=61)
    # whitened quarter periods: successive draws are nearly independent; 3 allows for what is left
    draws = 60_000
    got = targets.hmc_moments(target, draws, seed)
    errors = {
        "mean": (got[0] - exact[0]) / np.sqrt(3 * exact[1] / draws),
        "variance": (got[1] - exact[1]) / np.sqrt(3 * exact[2] / draws),
    }
    for name, z in errors.items():
        assert np.abs(z).max() < FIVE_SIGMA, (name, z, repeat(seed))


def test_the_real_data_sets_have_the_shapes_promised():
    pytest.importorskip("sklearn")
    assert targets.diabetes().dimension == 11
    cancer = targets.breast_cancer()
    assert cancer.dimension == 31 and set(cancer.response) == {0.0, 1.0}
    with pytest.raises(RuntimeError, match="reference moments"):
        _ = cancer.moments


# ----------------------------------------------------------------------------------------- estimators


def autoregressive(generator, repetitions, length, phi):
    """Stationary AR(1) with variance 1, one row per repetition."""
    x = np.empty((repetitions, length))
    x[:, 0] = generator.standard_normal(repetitions)
    noise = math.sqrt(1 - phi * phi) * generator.standard_normal((repetitions, length))
    for t in range(1, length):
        x[:, t] = phi * x[:, t - 1] + noise[:, t]
    return x


def exact_effective(length, phi):
    """Var(x)/Var(mean) of ``length`` successive values."""
    lags = np.arange(1, length)
    return length / (1 + 2 * np.sum((1 - lags / length) * phi**lags))


@pytest.mark.parametrize("phi", [0.0, 0.9])
def test_effective_draws_of_an_autoregression_are_the_known_ones(phi, seed):
    repetitions, functions, length = 100, 20, 400
    x = autoregressive(np.random.default_rng(seed), repetitions * functions, length, phi)
    errors = x.mean(1).reshape(repetitions, functions)
    got = measure.effective_draws(errors, np.ones(functions))
    # 1/got is a mean of squares of normals
    z = (exact_effective(length, phi) / got - 1) / math.sqrt(2 / errors.size)
    assert abs(z) < FIVE_SIGMA, (z, repeat(seed))
    claimed = measure.effective_draws_error(errors, np.ones(functions))
    assert claimed == pytest.approx(math.sqrt(2 / errors.size), rel=0.5)


def test_a_bias_counts_as_few_draws():
    errors = np.full((8, 3), 0.1)
    assert measure.effective_draws(errors, np.array([1.0, 1.0, 1.0])) == pytest.approx(100)
    assert measure.effective_draws(errors, np.array([1.0, 2.0, 4.0])) == pytest.approx(300 / 1.75)
    assert measure.effective_draws(np.full((2, 1), np.nan), np.ones(1)) == 0.0


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="errors"):
        measure.effective_draws(np.zeros(3), np.ones(3))
    with pytest.raises(ValueError, match="positive"):
        measure.effective_draws(np.ones((2, 3)), np.array([1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match="no draws"):
        measure.sums([], lambda x: x)


def run_of(x, mask=None):
    """Draws of one function from an array (chains, length)."""
    weights = [None] * x.shape[1] if mask is None else list(mask.T)
    return [(x[:, t : t + 1], weights[t]) for t in range(x.shape[1])]


def test_one_run_is_judged_by_its_chains(seed):
    chains, length, phi = 2000, 100, 0.8
    x = autoregressive(np.random.default_rng(seed), chains, length, phi)
    found = measure.sums(run_of(x), lambda values: values)
    got = measure.effective_draws_of_one_run(found, np.zeros(1), np.ones(1))
    exact = chains * exact_effective(length, phi)
    # beyond 2 standard errors the run's own mean counts as bias; the allowance covers up to 5
    assert exact / (1 + 21 + 5 * math.sqrt(2 / chains)) < got < exact * (1 + 5 * math.sqrt(2 / chains) * 1.2)
    biased = measure.effective_draws_of_one_run(found, np.array([0.5]), np.ones(1))
    assert biased < 1 / (0.4**2)


def test_draws_outside_the_window_do_not_count():
    x = np.array([[1.0, np.nan], [3.0, 5.0]])
    mask = np.array([[True, False], [True, True]])
    found = measure.sums(run_of(x, mask), lambda values: values)
    assert found.mean == pytest.approx(3.0)
    assert found.weights.tolist() == [1, 2]
    nothing = measure.sums(run_of(x, np.zeros_like(mask)), lambda values: values)
    assert np.isnan(nothing.mean).all()
    assert measure.effective_draws_of_one_run(nothing, np.zeros(1), np.ones(1)) == 0.0
    assert measure.total_variation(nothing.mean, np.ones(1)) == 1.0


def test_arviz_sees_the_correlation_and_the_window(seed):
    pytest.importorskip("arviz")
    generator = np.random.default_rng(seed)
    chains, length, phi = 100, 1000, 0.8
    x = autoregressive(generator, chains, length, phi)
    mask = generator.random(x.shape) < 0.3
    for draws, exact in (
        (run_of(x), chains * exact_effective(length, phi)),
        # g = w x has autocovariances 0.3 at lag 0 and 0.09 phi^k at lag k
        (run_of(x, mask), chains * length * 0.3 / (1 + 2 * 0.3 * phi / (1 - phi))),
    ):
        got = measure.arviz_draws(draws, lambda values: values, np.zeros(1))
        assert got == pytest.approx(exact, rel=0.25), repeat(seed)


def test_total_variation():
    assert measure.total_variation(np.array([1.0, 0.0]), np.array([0.3, 0.7])) == pytest.approx(0.7)
    assert measure.total_variation(np.array([0.3, 0.7]), np.array([0.3, 0.7])) == 0.0


# ------------------------------------------------------------------------------------------------ runs

TINY = samplers.Protocol("tiny", 0.02, 2, 2, 1, 1 / 3, 1000)


@needs_compiled_cpu
def test_a_tiny_run_needs_no_peers(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "MANY", 100)
    ours = [methods.OURS, methods.CONTROL]
    found = samplers.run(tmp_path, TINY, ["grid", "two modes"], ours)
    for name in ("grid", "two modes"):
        kept = found["targets"][name]["methods"]
        assert list(kept) == ours
        assert all(one["per_second"] > 0 and one["repetitions"] == 2 for one in kept.values())
        assert kept[methods.CONTROL]["window_share"] == 1.0
        assert 0 < kept[methods.OURS]["window_share"] <= 1
        assert 0 < kept[methods.OURS]["mode_weight_error"] < 1
    text = (tmp_path / "samplers.md").read_text(encoding="utf-8")
    assert "| CTLD |" in text and targets.grid().title in text
    # a second call finds everything there
    monkeypatch.setattr(samplers, "measure_method", None)
    again = samplers.run(tmp_path, TINY, ["grid", "two modes"], ours)
    assert again["targets"] == json.loads(json.dumps(found["targets"]))


def test_a_missing_peer_is_left_out_with_the_reason(tmp_path, monkeypatch, capsys):
    absent = methods.Method("absent", ("no-such-distribution",), lambda target: [], None)
    monkeypatch.setattr(samplers, "METHODS", [absent])
    found = samplers.run(tmp_path, TINY, ["grid"])
    assert "no-such-distribution is not installed" in found["targets"]["grid"]["skipped"]["absent"]
    assert "skipped" in capsys.readouterr().out


def test_results_of_another_protocol_are_not_continued(tmp_path):
    found = samplers.run(tmp_path, TINY, [])
    found["targets"]["grid"] = {"title": "", "methods": {}, "skipped": {}}
    samplers.save(found, tmp_path)
    assert samplers.load(tmp_path, TINY, fresh=False)["targets"] == found["targets"]
    assert samplers.load(tmp_path, TINY, fresh=True)["targets"] == {}
    assert samplers.load(tmp_path, samplers.QUICK, fresh=False)["targets"] == {}


def test_trials_are_as_many_for_every_method():
    for build in (targets.grid, targets.two_modes, linear):
        target = build()
        counts = {len(m.trials(target)) for m in methods.METHODS if methods.applies(m, target)}
        assert counts == {samplers.FULL.trials}


@needs_compiled_cpu
def test_draws_count_in_the_window_only_and_the_temperature_is_the_targets(seed):
    """In the window the mode that every chain starts in is sampled with its own width."""
    target = targets.two_modes(2)
    settings = methods.tempered_trials(target)[0] | {"chains": 500}
    chains = methods.CtldChains(target, settings, seed)
    chains.advance(60)
    draws = chains.advance(60)
    window = np.stack([weights for _, weights in draws])
    assert 0 < window.mean() < 0.9
    assert chains.gradients() == 120 * settings["thin"] * 500
    # the second coordinate is N(0, 1) in either mode; per chain, because its draws are correlated
    found = measure.sums(draws, lambda values: values[:, 1:].astype(np.float64) ** 2)
    deviations = found.functions[:, 0] - found.weights
    z = deviations.sum() / np.sqrt((deviations**2).sum())
    assert abs(z) < FIVE_SIGMA, (z, repeat(seed))


def test_verdict_names_who_is_ahead():
    values = [(methods.OURS, 10.0), ("a", 25.0), ("b", 2.0), ("c", 11.0)]
    kept = {name: {"per_second": value, "relative_error": 0.1} for name, value in values}
    text = report.verdict(kept)
    assert "**Ahead of CTLD**: a (2.5 times as many)" in text and "Behind CTLD: b (1/5.0)" in text
    assert "**Not distinguishable from CTLD** (two standard errors): c (1.1 times as many)" in text
    assert report.significant(12345.0) == "12,000" and report.significant(3.44) == "3.4"
    assert report.significant(0.01) == "< 0.1" and report.significant(float("nan")) == "–"
