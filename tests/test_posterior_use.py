"""What is done with posterior draws: predictions, weights, ArviZ.

Statistical checks are bounded in standard errors, as laws.py says: 12 comparisons with errors from the spread
of at least 200 chains, and 6 with errors from 40 repetitions, for which 5 standard errors are exceeded by
chance with probability 1e-5 (Student's t).
"""

import contextlib
import copy
import math
import types
import warnings

import numpy as np
import pytest
import torch
from laws import check, repeat, root_temperature
from torch.optim.swa_utils import update_bn

from ctld_cuda import CTLD, Tempering
from ctld_cuda.posterior import PosteriorSamples, arviz_export
from ctld_cuda.posterior.weights import mixture_weights

# --------------------------------------------------------------------------------------------- predictions


class Branching(torch.nn.Module):
    """What it does depends on the values of its parameters."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x):
        x = self.layer(x)
        return x if self.layer.bias[0] > 0 else x.tanh()


class Counting(torch.nn.Module):
    """Writes to a buffer, in place and by assignment, at every call."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3))

    def forward(self, x):
        self.calls += 1.0
        x = self.layer(x)
        self.last = x[0].detach()
        return x + self.calls


class TwoInputs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(2, 4), torch.nn.Linear(3, 4)

    def forward(self, x, y):
        return self.first(x) * self.second(y)


def mlp():
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))


def normed():
    layers = [torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU(), torch.nn.Linear(6, 3)]
    return torch.nn.Sequential(*layers)


def dropping():
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Dropout(0.5), torch.nn.Linear(6, 3))


def drawn(model, count=7, **options):
    """A model that a sampler has moved, and its draws."""
    optimizer = CTLD(model.parameters(), num_data=10, lr=0.3, tempering=None)
    samples = PosteriorSamples(model, optimizer, **options)
    for _ in range(count):
        for p in model.parameters():
            p.grad = 0.1 * p.detach()
        optimizer.step()
        samples.collect()
    return samples


def one_by_one(model, samples, x, transform=lambda y: y, prepare=lambda m: m.eval()):
    """The outputs at all draws, each loaded into a copy of the model."""
    outputs = []
    for draw in samples:
        single = copy.deepcopy(model)
        single.load_state_dict(draw, strict=False)
        prepare(single)
        with torch.no_grad():
            outputs.append(transform(single(x)))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("make", "vectorizes", "options"),
    [
        (mlp, True, {}),
        (normed, True, {"calibration": "stored"}),
        (normed, False, {"training": True}),
        (Branching, False, {}),
        (Counting, True, {}),
        (dropping, True, {}),
    ],
)
def test_the_mean_over_draws(make, vectorizes, options):
    """With vmap, without, and left to itself: the mean over copies of the model with each draw loaded."""
    model, x = make(), torch.randn(5, 4)
    samples = drawn(model)
    prepare = (lambda m: m.train()) if options.get("training") else (lambda m: m.eval())
    options["transform"] = transform = lambda y: y.softmax(-1)
    expected = one_by_one(model, samples, x, transform, prepare)
    ways = [None, False, True] if vectorizes else [None, False]
    for vectorize in ways:
        for size in (None, 1, 3):
            mean, single = samples.predict(
                x, vectorize=vectorize, draws_per_chunk=size, return_draws=True, **options
            )
            torch.testing.assert_close(single, expected)
            torch.testing.assert_close(mean, expected.mean(0))
    if not vectorizes:
        with pytest.raises(RuntimeError):
            samples.predict(x, vectorize=True, **options)
    if not options.get("training"):
        torch.testing.assert_close(samples.predict(x, batch_size=2, **options), expected.mean(0))
    weights = torch.rand(7)
    weights[2] = 0.0
    mean, single = samples.predict(x, weights=weights, return_draws=True, **options)
    torch.testing.assert_close(mean, torch.einsum("n,nij->ij", weights / weights.sum(), expected))
    assert len(single) == 6


def test_dropout_while_training(seed):
    """Every draw has its own mask, and the generator is where it was."""
    model, x = dropping(), torch.ones(200, 4)
    samples = drawn(model)
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    _, first = samples.predict(x, training=True, return_draws=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(samples.predict(x, training=True, return_draws=True)[1], first)
    assert (first.std(1) > 0).all()


def test_types_and_arguments():
    """float64 in, float64 out; classes count as numbers; several inputs; outputs that are no tensors."""
    model = TwoInputs().double()
    samples = drawn(model)
    x = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    mean = samples.predict(x)
    assert mean.dtype == torch.float64 and mean.shape == (5, 4)
    torch.testing.assert_close(samples.predict(x, batch_size=2), mean)
    share = samples.predict(x, transform=lambda y: y.argmax(-1) == 0)
    assert share.dtype == torch.float32 and ((share * 7).round() - share * 7).abs().max() < 1e-5
    with pytest.raises(TypeError, match="transform"):
        samples.predict(x, transform=lambda y: (y, y))


def test_batch_norm_is_estimated_for_every_draw():
    """As update_bn on a copy with the draw loaded; the model's own statistics are of other parameters."""
    model, x = normed(), torch.randn(5, 4)
    data = [torch.randn(8, 4) + 1.0 for _ in range(4)]
    model[1].momentum = 0.3
    samples = drawn(model)
    for batches in (data, [(batch, torch.zeros(8)) for batch in data]):
        expected = one_by_one(model, samples, x, prepare=lambda m, b=batches: (update_bn(b, m), m.eval()))
        _, single = samples.predict(x, calibration=batches, return_draws=True)
        torch.testing.assert_close(single, expected)
    _, stored = samples.predict(x, calibration="stored", return_draws=True)
    assert (stored - expected).abs().max() > 0.05
    assert model[1].momentum == 0.3
    model[1].running_mean.fill_(math.nan)  # of no influence on what is estimated
    torch.testing.assert_close(samples.predict(x, calibration=data, return_draws=True)[1], expected)


def everything(model):
    return (
        {n: (id(t), t.clone()) for n, t in [*model.named_parameters(), *model.named_buffers()]},
        [(m.training, getattr(m, "momentum", None)) for m in model.modules()],
        torch.get_rng_state(),
    )


def unchanged(before, model):
    after = everything(model)
    tensors = all(i == after[0][n][0] and torch.equal(t, after[0][n][1]) for n, (i, t) in before[0].items())
    return tensors and before[1] == after[1] and torch.equal(before[2], after[2])


class Broken(Exception):
    pass


def breaks_at(call):
    calls = 0

    def function(y):
        nonlocal calls
        calls += 1
        torch.rand(3)
        if calls == call:
            raise Broken
        return y

    return function


class BreakingBatches:
    def __iter__(self):
        yield torch.randn(8, 4)
        raise Broken


@pytest.mark.parametrize(
    ("make", "options", "error"),
    [
        (normed, lambda: {"training": True}, None),
        (normed, lambda: {"calibration": "stored"}, None),
        (normed, lambda: {"calibration": [torch.randn(8, 4)]}, None),
        (Counting, dict, None),
        (Counting, lambda: {"vectorize": False}, None),
        (normed, dict, ValueError),
        (normed, lambda: {"calibration": []}, ValueError),
        (normed, lambda: {"calibration": BreakingBatches()}, Broken),
        (normed, lambda: {"calibration": [torch.randn(8, 4)], "transform": breaks_at(2)}, Broken),
        (normed, lambda: {"training": True, "transform": breaks_at(3), "vectorize": False}, Broken),
        (normed, lambda: {"training": True, "vectorize": True}, RuntimeError),
        (Counting, lambda: {"transform": breaks_at(3), "vectorize": False}, Broken),
        (mlp, lambda: {"transform": breaks_at(1), "vectorize": True}, RuntimeError),
    ],
)
def test_the_model_is_left_as_it_was(make, options, error):
    """Parameters, buffers, modes of every module, momenta of batch norms, random state; also after errors."""
    model = make()
    samples = drawn(model)
    model.train()
    next(model.children()).eval()
    x, options = torch.randn(5, 4), options()
    before = everything(model)
    with pytest.raises(error) if error else contextlib.nullcontext():
        samples.predict(x, **options)
    assert unchanged(before, model)
    assert torch.is_grad_enabled()


def test_chains_need_a_model_of_one_chain():
    """Chains share nothing but a shape: a Module or a function for the parameters of one of them."""
    template = torch.nn.Linear(4, 3)
    named = {
        "weight": torch.nn.Parameter(torch.randn(2, 3, 4)),
        "bias": torch.nn.Parameter(torch.randn(2, 3)),
    }
    optimizer = CTLD(named.values(), num_data=10, chains=2, tempering=None)
    samples = PosteriorSamples(named, optimizer)
    for _ in range(3):
        optimizer.step()
        samples.collect()
    x = torch.randn(5, 4)
    expected = torch.stack([x @ draw["weight"].T + draw["bias"] for draw in samples])
    assert len(expected) == 6
    torch.testing.assert_close(samples.predict(x, model=template), expected.mean(0))
    function = lambda draw, x: torch.nn.functional.linear(x, draw["weight"], draw["bias"])  # noqa: E731
    torch.testing.assert_close(samples.predict(x, model=function, return_draws=True)[1], expected)
    with pytest.raises(ValueError, match="one chain"):
        samples.predict(x)
    with pytest.raises(ValueError, match="names and shapes"):
        samples.predict(x, model=torch.nn.Linear(3, 4))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "calibration="),
        ({"calibration": "live"}, ValueError, "stored"),
        ({"calibration": iter([torch.ones(8, 4)])}, TypeError, "used up"),
        ({"calibration": 3}, TypeError, "batches"),
        ({"calibration": [torch.ones(8, 4)], "training": True}, ValueError, "no calibration"),
        ({"calibration": "stored", "weights": torch.ones(3)}, ValueError, "weights"),
        ({"calibration": "stored", "weights": -torch.ones(7)}, ValueError, "weights"),
        ({"calibration": "stored", "batch_size": 0}, ValueError, "batch_size"),
        ({"calibration": "stored", "draws_per_chunk": 0}, ValueError, "draws_per_chunk"),
    ],
)
def test_predictions_refused(options, error, message):
    with pytest.raises(error, match=message):
        drawn(normed()).predict(torch.randn(5, 4), **options)


def test_without_draws():
    samples = drawn(mlp(), count=0)
    with pytest.raises(ValueError, match="no draws"):
        samples.predict(torch.randn(5, 4))
    with pytest.raises(ValueError, match="no draws"):
        samples.log_weights()
    with pytest.raises(ValueError, match="calibration is for"):
        drawn(mlp()).predict(torch.randn(5, 4), calibration=[torch.ones(2, 4)])


# ------------------------------------------------------------------------------------------------- weights


def tempered_gaussian(dimension, n, generator):
    """Exact draws from exp(-beta U), U = |x|^2/2, alpha uniform: energies, beta and x_0^2."""
    alpha = torch.from_numpy(generator.uniform(-1.5, 1.5, n))
    beta = root_temperature(alpha).numpy() ** -2
    first = generator.standard_normal(n) ** 2 / beta
    rest = generator.chisquare(dimension - 1, n) / beta if dimension > 1 else 0.0
    return 0.5 * (first + rest), beta, first


@pytest.mark.parametrize(("dimension", "shift"), [(1, 0.0), (20, -300.0)])
def test_weights_recover_the_target(dimension, shift, seed):
    """On exact draws: moments and free energies, with errors from the spread over repetitions."""
    generator = np.random.default_rng(seed)
    found, forgetful, sizes = [], [], []
    for _ in range(40):
        energy, beta, square = tempered_gaussian(dimension, 1000, generator)
        result = mixture_weights(energy + shift, beta)
        w = result.log_weights.exp().numpy()
        assert abs(w.sum() - 1.0) < 1e-10
        # ln Z(beta)/Z(1) of U + shift
        known = -0.5 * dimension * result.betas.log() + (1.0 - result.betas) * shift
        sizes.append(result.effective_sample_size * (w * w).sum())
        found.append([w @ square - 1.0, w @ energy - dimension / 2, float((result.log_partition - known)[0])])
        share = np.exp(np.outer(energy[:400], 1.0 - beta[:400])).sum(1)  # the mixture without the Z
        forgetful.append((square[:400] / share).sum() / (1.0 / share).sum() - 1.0)
        assert result.effective_sample_size > 1.2 * (beta == 1).sum()
    found, forgetful = np.array(found), np.array(forgetful)
    z = found.mean(0) / (found.std(0, ddof=1) / math.sqrt(40))
    check(dict(zip(("x^2", "energy", "ln Z"), z, strict=True)), seed)
    np.testing.assert_allclose(sizes, 1.0, rtol=1e-9)
    # weights that forget the Z are wrong, and this test would see it
    assert abs(forgetful.mean()) > 6.0 * forgetful.std(ddof=1) / math.sqrt(40), repeat(seed)


def test_weights_are_those_of_the_definition(seed):
    """Against the mixture of all n densities with Z solved for each by plain fixed-point iteration."""
    energy, beta, _ = tempered_gaussian(3, 80, np.random.default_rng(seed))
    density, z = np.exp(-np.outer(energy, beta)), beta**-1.5
    for _ in range(20_000):
        mixture = density @ (1.0 / z)
        z = density.T @ (1.0 / mixture)
    expected = -energy - np.log(mixture)
    expected -= np.logaddexp.reduce(expected)
    # A grid of beta instead of the betas themselves: exp(-beta U)/Z(beta) is interpolated linearly in
    # ln beta, at distances h; the rest is the error of Z, about the mean one. The largest share of the bound
    # in 1,500 seeds is 0.48.
    result = mixture_weights(energy, beta)
    h = result.betas.log().diff().min().item()
    x = np.outer(energy, beta)
    second = np.abs((x - 1.5) ** 2 - x)  # derivative of the density over the density, d/2 = 1.5
    error = h * h / 8.0 * (density / z * second).sum(1) / (density / z).sum(1)
    assert (np.abs(result.log_weights.numpy() - expected) < 2.0 * (error + error.mean())).all(), repeat(seed)


def test_energies(seed):
    """U = (N L + 1/2 N lambda |theta|^2)/T0 at the stored parameters, with groups, chains and maximize."""
    for maximize in (False, True):
        a, b = (torch.nn.Parameter(torch.randn(3, n)) for n in (2, 5))
        optimizer = CTLD(
            [{"params": [a], "weight_decay": 0.3}, {"params": [b]}],
            num_data=50,
            temperature=0.7,
            tempering=Tempering(coupling="exact"),
            chains=3,
            seed=seed,
            maximize=maximize,
        )
        sign = -1.0 if maximize else 1.0

        def loss(a=a, b=b, sign=sign):
            return sign * (a.cos().sum(1) + b.square().sum(1))

        default = PosteriorSamples({"a": a, "b": b}, optimizer, at_target_only=False, loss=loss)
        before = PosteriorSamples({"a": a, "b": b}, optimizer, at_target_only=False)
        for _ in range(5):
            value = loss()
            optimizer.zero_grad()
            value.sum().backward()
            before.collect(loss=value)
            optimizer.step(loss=value.detach())
            default.collect()
        for samples in (default, before):
            draws = list(samples)
            assert len(draws) == (15 if samples is default else 12)  # nothing was drawn before the first step
            expected = [
                50 / 0.7 * float(d["a"].cos().sum() + d["b"].square().sum() + 0.15 * d["a"].square().sum())
                for d in draws
            ]
            np.testing.assert_allclose(samples.columns()["energy"], expected, rtol=1e-5)


def run_chains(theta, target, steps, discard, thin, seed, **options):
    """Draws at all temperatures with energies; target(x) gives loss and gradient."""
    tempering = Tempering(coupling="exact")
    options = {
        "lr": 0.05,
        "num_data": 1,
        "chains": len(theta),
        "tempering": tempering,
        "seed": seed,
    } | options
    optimizer = CTLD([theta], **options)
    samples = PosteriorSamples(
        {"theta": theta},
        optimizer,
        thin,
        at_target_only=False,
        burn_in=discard,
        loss=lambda: target(theta.detach())[0],
    )
    for _ in range(steps):
        loss, theta.grad = target(theta.detach())
        optimizer.step(loss=loss)
        samples.collect()
    return samples, optimizer


def weighted(samples, values):
    """Weighted mean and its standard error from the spread over chains, which share only the bias."""
    result = samples.log_weights()
    w, chain = result.log_weights.exp().numpy(), samples.columns()["chain"]
    mean = w @ values
    residual = np.bincount(chain, w * (values - mean))
    n = len(residual)
    return mean, math.sqrt((residual**2).sum() * n / (n - 1)), result


def test_hot_draws_of_a_sampler(seed):
    """A Gaussian, half of its curvature from weight_decay: moments from all draws, and more of them count."""
    torch.manual_seed(seed)
    chains, d = 200, 4
    theta = torch.nn.Parameter(torch.randn(chains, d))
    target = lambda x: (0.25 * x.square().sum(1), 0.5 * x)  # noqa: E731
    samples, optimizer = run_chains(theta, target, 4_000, 1_500, 100, seed, weight_decay=0.5)
    x = torch.cat([b["theta"] for b in samples.batches()]).double().numpy()
    energy = samples.columns()["energy"]
    square, square_error, result = weighted(samples, (x * x).mean(1))
    mean, mean_error, _ = weighted(samples, energy)
    fourth, fourth_error, _ = weighted(samples, (x**4).mean(1))
    check(
        {
            "x": np.divide(*weighted(samples, x.mean(1))[:2]),
            "x^2": (square - 1.0) / (square_error + 0.001),
            "x^4": (fourth - 3.0) / (fourth_error + 0.006),
            "U": (mean - d / 2) / (mean_error + 0.002),
        },
        seed,
    )
    window = samples.columns()["at_target"].sum()
    assert result.effective_sample_size > 1.3 * window, repeat(seed)
    state = optimizer.tempering_state()
    known = -0.5 * d * result.betas.log()
    assert (result.log_partition - known).abs().max() < 0.3 and state["flags"] == 0, repeat(seed)


def two_modes(x):
    """-ln(0.3 N(-3, 1) + 0.7 N(3, 1)) up to a constant, and its gradient."""
    log_ratio = 6.0 * x[:, 0] + math.log(7 / 3)
    energy = 0.5 * x[:, 0].square() + 3.0 * x[:, 0] - torch.nn.functional.softplus(log_ratio)
    return energy, x + 3.0 - 6.0 * torch.sigmoid(log_ratio)[:, None]


def test_hot_draws_between_two_modes(seed):
    """The weight of a mode six standard deviations from where all chains started."""
    theta = torch.nn.Parameter(torch.randn(300, 1, generator=torch.Generator().manual_seed(seed)) + 3.0)
    samples, _ = run_chains(theta, two_modes, 5_000, 2_000, 100, seed)
    x = torch.cat([b["theta"] for b in samples.batches()])[:, 0].double().numpy()
    left = 0.3 + 0.4 * 0.5 * math.erfc(3.0 / math.sqrt(2.0))
    share, error, _ = weighted(samples, (x < 0).astype(float))
    spread, spread_error, _ = weighted(samples, (np.abs(x) - 3.0) ** 2)
    assert error < 0.02, repeat(seed)
    # of |x| - 3 for x from N(3, 1): 1 but for what is folded at 0, -6 E[(x)-] exactly
    folded = 1.0 - 12.0 * (math.exp(-4.5) / math.sqrt(2 * math.pi) - 1.5 * math.erfc(3.0 / math.sqrt(2.0)))
    check({"left": (share - left) / error, "spread": (spread - folded) / (spread_error + 0.003)}, seed)


def test_weights_of_draws_from_the_target_are_equal():
    samples = drawn(mlp())
    result = samples.log_weights()
    assert torch.equal(result.log_weights, torch.full((7,), -math.log(7), dtype=torch.float64))
    assert result.effective_sample_size == 7


@pytest.mark.parametrize(
    ("coupling", "loss", "message"),
    [
        ("standardized", 1.0, "standardized"),
        ("exact", None, "energy"),
        ("exact", math.nan, "energy"),
    ],
)
def test_weights_refused(coupling, loss, message):
    theta = torch.nn.Parameter(torch.zeros(50, 2))
    optimizer = CTLD(
        [theta], num_data=1, chains=50, tempering=Tempering(coupling=coupling, step_size=0.2, settle=3)
    )
    samples = PosteriorSamples({"theta": theta}, optimizer, at_target_only=False)
    for _ in range(30):
        theta.grad = theta.detach().clone()
        optimizer.step(loss=0.5 * theta.detach().square().sum(1))
        samples.collect(loss=None if loss is None else torch.full((50,), loss))
    assert not samples.columns()["at_target"].all()
    with pytest.raises(ValueError, match=message):
        samples.log_weights()
    # draws that are from the target need neither energies nor a joint density
    predicted = samples.predict(torch.ones(()), model=lambda draw, x: draw["theta"] * x)
    window = samples.columns()["at_target"]
    expected = torch.stack([d["theta"] for d, w in zip(samples, window, strict=True) if w]).mean(0)
    torch.testing.assert_close(predicted, expected)


def test_losses_refused():
    theta = torch.nn.Parameter(torch.zeros(5, 2))
    optimizer = CTLD([theta], num_data=1, chains=5, tempering=None)
    samples = PosteriorSamples({"theta": theta}, optimizer)
    optimizer.step()
    for loss, message in ((torch.ones(4), "shape"), (lambda: None, "None"), (torch.ones(()), "shape")):
        with pytest.raises(ValueError, match=message):
            samples.collect(loss=loss)
    assert len(samples) == 0 and samples.collect(loss=torch.ones(5)) == 5


def test_temperatures_without_overlap():
    """Energies a thousand nats apart do not tell the ratio of the Z: refused, or all weight on the cold."""
    energy = np.concatenate((np.random.default_rng(0).normal(100.0, 1.0, 50), np.full(50, 5_000.0)))
    beta = np.repeat([1.0, 0.1], 50)
    try:
        w = mixture_weights(energy, beta).log_weights.exp()
    except RuntimeError as error:
        assert "overlap" in str(error)
    else:
        assert w[:50].sum() > 1 - 1e-9 and w[:50].max() / w[:50].min() < 1.01


# --------------------------------------------------------------------------------------------------- ArviZ


@pytest.fixture
def arviz():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return pytest.importorskip("arviz", reason="exports to ArviZ need it")


def test_to_arviz(arviz, seed):
    """Variables (chain, draw, ...): the latest draws from the target of each chain, in the order of time."""
    theta = {"w": torch.nn.Parameter(torch.zeros(6, 2)), "net.b": torch.nn.Parameter(torch.zeros(6))}
    optimizer = CTLD(theta.values(), num_data=1, chains=6, tempering=Tempering(coupling="exact"), seed=seed)
    samples = PosteriorSamples(theta, optimizer, 5, False, loss=lambda: theta["w"].detach().square().sum(1))
    for _ in range(1_500):
        for p in theta.values():
            p.grad = p.detach().clone()
        optimizer.step(loss=sum(0.5 * p.detach().reshape(6, -1).square().sum(1) for p in theta.values()))
        samples.collect()
    columns = samples.columns()
    functions = {"norm": lambda d: d["w"].norm(), "plain": lambda d: float(d["net.b"])}
    data = samples.to_arviz("*", functions, min_draws=1)
    counts = np.bincount(columns["chain"], columns["at_target"], minlength=6).astype(int)
    posterior, stats = data.posterior, data.sample_stats
    assert dict(posterior.sizes) == {"chain": 6, "draw": counts.min(), "w_dim_0": 2}, repeat(seed)
    assert set(posterior.data_vars) == {"w", "net.b", "norm", "plain"}
    for c in range(6):
        mine = np.flatnonzero(columns["at_target"] & (columns["chain"] == c))[-counts.min() :]
        assert (stats.step.values[c] == columns["step"][mine]).all() and (np.diff(mine) > 0).all()
        for name in ("alpha", "temperature", "energy"):
            assert (stats[name].values[c] == columns[name][mine]).all()
        w = np.stack([samples[int(i)]["w"].numpy() for i in mine])
        assert (posterior["w"].values[c] == w).all()
        np.testing.assert_allclose(posterior["norm"].values[c], np.linalg.norm(w, axis=1), rtol=1e-6)
        assert (posterior["plain"].values[c] == posterior["net.b"].values[c]).all()
    assert set(samples.to_arviz(["net.*"], min_draws=1).posterior.data_vars) == {"net.b"}
    assert set(samples.to_arviz(functions=functions, min_draws=1).posterior.data_vars) == {"norm", "plain"}
    assert np.isfinite(arviz.ess(data)["w"].values).all()
    for options, message in (
        (dict(select="v*"), "matches 'v"),
        (dict(min_draws=10_000), "no chain has 10000"),
        (dict(select="w", functions={"w": lambda d: d["w"]}), "same names"),
        (dict(min_draws=0), "min_draws"),
    ):
        with pytest.raises(ValueError, match=message):
            samples.to_arviz(**options)


def test_a_chain_that_was_hardly_at_the_target():
    """It is left out with a warning that names it; the others lose only their first draws."""
    chain = np.concatenate((np.tile([0, 1, 2], 20), np.full(5, 3), [0]))
    columns = {"chain": chain, "at_target": np.ones(len(chain), dtype=bool)}
    columns["at_target"][[0, 1]] = False
    with pytest.warns(RuntimeWarning, match=r"\{3: 5\}"):
        indices, kept = arviz_export.rectangle(columns, None)
    assert kept == [0, 1, 2] and indices.shape == (3, 19)
    assert indices[0, -1] == 65 and indices[0, 0] == 6 and indices[2, 0] == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert arviz_export.rectangle(columns, 5)[0].shape == (4, 5)


@pytest.mark.parametrize("stuck", [False, True])
def test_r_hat_sees_stuck_chains(arviz, stuck, seed):
    """Two modes ten standard deviations apart at constant temperature, against one mode."""
    start = torch.tensor([-5.0, 5.0, 5.0, -5.0])[:, None] if stuck else torch.randn(4, 1)
    theta = torch.nn.Parameter(start.clone())
    optimizer = CTLD([theta], lr=0.5, num_data=1, chains=4, tempering=None, seed=seed)
    samples = PosteriorSamples({"theta": theta}, optimizer, thin=5, burn_in=100)
    for _ in range(2_600):
        x = theta.detach()
        theta.grad = x - 5.0 * torch.tanh(5.0 * x) if stuck else x.clone()
        optimizer.step()
        samples.collect()
    data = samples.to_arviz()
    r_hat, ess = float(arviz.rhat(data)["theta"].values[0]), float(arviz.ess(data)["theta"].values[0])
    if stuck:
        assert r_hat > 1.5 and ess < 20, f"{r_hat}, {ess}; {repeat(seed)}"
    else:
        assert r_hat < 1.03 and ess > 500, f"{r_hat}, {ess}; {repeat(seed)}"


def test_arviz_of_both_generations():
    """0.x takes groups as arguments, 1.x one dict of groups."""
    groups, coords = {"posterior": {"x": np.zeros((2, 3))}}, {"chain": [0, 4]}
    old = types.SimpleNamespace(__version__="0.23.4", from_dict=lambda **k: k)
    new = types.SimpleNamespace(__version__="1.2.0", from_dict=lambda data, coords: (data, coords))
    assert arviz_export.from_groups(old, groups, coords) == {**groups, "coords": coords}
    assert arviz_export.from_groups(new, groups, coords) == (groups, coords)


def test_what_arviz_is_not_for():
    samples = drawn(torch.nn.Linear(200, 100))
    with pytest.raises(ValueError, match="too many"):
        samples.to_arviz()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "arviz", None)
        with pytest.raises(ImportError, match=r"ctld_cuda\[posterior\]"):
            samples.to_arviz()
