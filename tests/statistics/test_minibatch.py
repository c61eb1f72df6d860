"""Bayesian regressions on real data: full batches sample the posterior, minibatches a wider law, predicted.

A step is a linear map of (theta, p) where the likelihood is Gaussian, so its noise, that of the minibatches
included, gives the covariance of (theta, p) exactly: by iterating the discrete Lyapunov equation. For
logistic regression the posterior is known by quadrature, and the law under minibatches to about a percent.

Chains start at the posterior mean and draw their own batches. Errors come from the spread over chains;
laws.py states the bound. Everything known about one batch size, 65 means and covariances in ten dimensions,
is weighed as one comparison. The default run makes 75 of them, which a healthy sampler fails with a
probability of at most 3e-7 each: the averages of single chains are not quite Gaussian.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import simulated
import torch
from laws import BOUND, check, repeat
from targets import among

import ctld_cuda.coefficients
from ctld_cuda import CTLD, reference

datasets = pytest.importorskip("sklearn.datasets")

Tensor = torch.Tensor
INTEGRATORS = ["baoab", "euler"]


# ------------------------------------------------------------------------------------------- the models


def standardized(x):
    x = torch.as_tensor(np.asarray(x), dtype=torch.float64)
    return (x - x.mean(0)) / x.std(0, correction=0)


class Model:
    """A regression with examples x (N, d), y (N,) and a Gaussian prior of precision N ``weight_decay``.

    The loss of an example is a function of x theta and y; N is prime, see :class:`Batches`.

    Attributes:
        mean, covariance: of the posterior.
    """

    mean: Tensor
    covariance: Tensor

    def __init__(self, x: Tensor, y: Tensor, weight_decay: float) -> None:
        self.x, self.y, self.weight_decay = x, y, weight_decay
        self.num_data, self.dimension = x.shape
        self.prior = weight_decay * torch.eye(self.dimension, dtype=x.dtype)

    def slope(self, prediction: Tensor, y: Tensor) -> Tensor:
        """Derivative of an example's loss by x theta."""
        raise NotImplementedError

    def linearized(self, lr: float, momentum: float, integrator: str, batch: int) -> tuple[Tensor, Tensor]:
        """Mean of theta and covariance of (theta, p) when stationary."""
        raise NotImplementedError

    def scatter(self, weights: Tensor) -> Tensor:
        """Mean over the examples of weights * x x'."""
        return self.x.T @ (self.x * weights[:, None]) / self.num_data


class Linear(Model):
    """Diabetes, the first 439 patients, 10 correlated features, noise of known variance: all Gaussian."""

    variance = 0.5

    def __init__(self, num_data: int = 439) -> None:
        x, y = datasets.load_diabetes(return_X_y=True, scaled=False)
        super().__init__(standardized(x[:num_data]), standardized(y[:num_data]), weight_decay=0.1)
        self.likelihood = self.scatter(torch.full_like(self.y, 1.0 / self.variance))
        self.curvature = self.likelihood + self.prior
        pull = self.x.T @ self.y / (self.num_data * self.variance)
        self.mean = torch.linalg.solve(self.curvature, pull)
        self.covariance = torch.linalg.inv(self.curvature) / self.num_data

    def slope(self, prediction, y):
        return (prediction - y) * (1.0 / self.variance)

    def gradient_covariance(self, covariance: Tensor) -> Tensor:
        """Covariance over the examples of their gradients, averaged over theta of that covariance.

        With residuals r at the posterior mean, an example's gradient is x (x'delta - r)/variance; its second
        moment over examples and delta is x x' (r^2 + x'S x)/variance^2, from which that of the mean over the
        examples is subtracted. S is the covariance of delta, whose mean is 0.
        """
        r = self.y - self.x @ self.mean
        square = r.square() + ((self.x @ covariance) * self.x).sum(1)
        mean = self.x.T @ r / (self.num_data * self.variance)
        second = self.scatter(square / self.variance**2)
        return second - self.likelihood @ covariance @ self.likelihood - torch.outer(mean, mean)

    def law(self, lr, momentum, integrator, batch, steps=None):
        """Covariance of (theta, p) after ``steps`` from the posterior mean with p = 0; None: stationary."""
        step = StepMap.of(self.curvature, self.num_data, lr, momentum, integrator)
        return step.iterate(self.gradient_covariance, sampling_factor(self.num_data, batch), steps)

    def linearized(self, lr, momentum, integrator, batch):
        return self.mean, self.law(lr, momentum, integrator, batch)


class Logistic(Model):
    """Breast cancer, 569 tumours, three features and a constant: a posterior that is not quite Gaussian."""

    def __init__(self) -> None:
        data = datasets.load_breast_cancer()
        features = standardized(data.data[:, [0, 1, 4]])  # mean radius, texture, smoothness
        x = torch.cat((torch.ones_like(features[:, :1]), features), 1)
        super().__init__(x, torch.as_tensor(data.target, dtype=torch.float64), weight_decay=0.01)
        self.mode = torch.zeros(self.dimension, dtype=torch.float64)
        for _ in range(30):  # Newton
            gradient = self.x.T @ self.slope(self.x @ self.mode, self.y) / self.num_data
            gradient += self.weight_decay * self.mode
            self.mode = self.mode - torch.linalg.solve(self.curvature(self.mode[None]), gradient)
        self.mean, self.covariance = self.posterior(12)

    def slope(self, prediction, y):
        return torch.sigmoid(prediction) - y

    def energy(self, theta: Tensor) -> Tensor:
        """Negative log posterior, up to a constant: (n, d) gives (n,)."""
        f = theta @ self.x.T
        loss = (torch.nn.functional.softplus(f) - f * self.y).sum(1)
        return loss + 0.5 * self.num_data * self.weight_decay * theta.square().sum(1)

    def curvature(self, theta: Tensor, weight: Tensor | None = None) -> Tensor:
        """Hessian of the mean loss and the prior, averaged over theta (n, d) with the given weights."""
        p = torch.sigmoid(theta @ self.x.T)
        weight = torch.full_like(theta[:, 0], 1.0 / len(theta)) if weight is None else weight
        return self.scatter(weight @ (p * (1.0 - p))) + self.prior

    def rule(self, mean: Tensor, covariance: Tensor, order: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gauss-Hermite points (n, d) for a Gaussian, their weights and standard coordinates."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(order)
        nodes, weights = torch.as_tensor(nodes), torch.as_tensor(weights / weights.sum())
        z = torch.cartesian_prod(*[nodes] * self.dimension)
        weight = torch.cartesian_prod(*[weights] * self.dimension).prod(1)
        kept = weight > 1e-14
        return mean + z[kept] @ torch.linalg.cholesky(covariance).T, weight[kept], z[kept]

    def posterior(self, order: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance by Gauss-Hermite quadrature around Laplace's approximation, a little wider."""
        wide = 1.15**2 * torch.linalg.inv(self.curvature(self.mode[None])) / self.num_data
        points, weight, z = self.rule(self.mode, wide, order)
        weight = torch.softmax(weight.log() - self.energy(points) + 0.5 * z.square().sum(1), 0)
        mean = weight @ points
        return mean, (points - mean).T @ ((points - mean) * weight[:, None])

    def linearized(self, lr, momentum, integrator, batch):
        """The Gaussian that a step keeps, with curvature and noise averaged over that Gaussian itself."""
        mean, covariance = self.mean, self.covariance
        factor = sampling_factor(self.num_data, batch)
        for _ in range(8):
            points, weight, _ = self.rule(mean, covariance, 6)
            slope = self.slope(points @ self.x.T, self.y)
            gradients = slope @ self.x / self.num_data
            noise = self.scatter(weight @ slope.square()) - gradients.T @ (gradients * weight[:, None])
            curvature = self.curvature(points, weight)
            mean = mean - torch.linalg.solve(curvature, weight @ gradients + self.weight_decay * mean)
            step = StepMap.of(curvature, self.num_data, lr, momentum, integrator)
            law = step.iterate(lambda _, noise=noise: noise, factor)
            covariance = law[: self.dimension, : self.dimension]
        return mean, law


# ----------------------------------------------------------------------------------- what is predicted


def sampling_factor(num_data, batch):
    """Variance of the mean of a batch without replacement, over that of one example."""
    return (num_data - batch) / (batch * (num_data - 1.0))


def blocks(a, b, c, d):
    return torch.cat((torch.cat((a, b), 1), torch.cat((c, d), 1)))


class StepMap(NamedTuple):
    """A step at T = 1 as (theta, p) <- M (theta, p) + K (gradient noise) + Q xi."""

    move: Tensor
    push: Tensor
    noise: Tensor

    @classmethod
    def of(cls, curvature, num_data, lr, momentum, integrator):
        """For gradient = curvature theta; the docs' section 2, with matrices for numbers."""
        one = torch.eye(len(curvature), dtype=curvature.dtype)
        zero = torch.zeros_like(one)
        c = math.sqrt((1.0 + momentum) / 2.0)
        kick, drift = math.sqrt(num_data * lr), math.sqrt(lr / num_data) / c
        xi = torch.cat((zero, math.sqrt(1.0 - momentum**2) * one))
        if integrator == "euler":
            glide = blocks(one, drift * one, zero, one)
            kicked = blocks(one, zero, -c * kick * curvature, momentum * one)
            return cls(glide @ kicked, glide @ torch.cat((zero, -c * kick * one)), glide @ xi)
        half = blocks(one, 0.5 * drift * one, zero, one)
        after = half @ blocks(one, zero, zero, momentum * one) @ half
        kicked = blocks(one, zero, -kick / c * curvature, one)
        return cls(after @ kicked, after @ torch.cat((zero, -kick / c * one)), half @ xi)

    def iterate(self, gradient_covariance, factor, steps=None):
        """S <- M S M' + factor K C(S) K' + Q Q' from S = 0, ``steps`` times or until it stays."""
        d = self.push.shape[1]
        law, thermal = torch.zeros_like(self.move), self.noise @ self.noise.T
        for _ in range(steps or 100_000):
            before = law
            batch = self.push @ gradient_covariance(law[:d, :d]) @ self.push.T
            law = self.move @ law @ self.move.T + factor * batch + thermal
            if steps is None and (law - before).abs().max() < 1e-11 * law.abs().max():
                break
        return law


# ----------------------------------------------------------------------------------------- the sampler


class Batches:
    """Every chain's own batch, anew at every step: batch b of chain c holds the examples i for which
    (k i - a) mod N < B, with uniform a in [0, N) and k in [1, N).

    As N is prime, two examples are together in a batch with the probability of a simple random sample without
    replacement, B (B - 1)/(N (N - 1)). So the gradient has exactly the mean and covariance of such samples,
    at a small part of their cost.
    """

    def __init__(self, num_data: int, sizes: Tensor, generator: torch.Generator) -> None:
        i = torch.arange(num_data)
        self.multiples = (i[:, None] * i % num_data).to(torch.int16)
        self.num_data, self.sizes, self.generator = num_data, sizes.to(torch.int16)[:, None], generator

    def select(self, k: Tensor, a: Tensor) -> Tensor:
        """Membership (C, N) for multipliers (C,) and offsets (C,)."""
        place = self.multiples[k] - a.to(torch.int16)[:, None]
        return ((place >= 0) & (place < self.sizes)) | (place < self.sizes - self.num_data)

    def draw(self) -> Tensor:
        chains = len(self.sizes)
        k = torch.randint(1, self.num_data, (chains,), generator=self.generator)
        return self.select(k, torch.randint(self.num_data, (chains,), generator=self.generator))


class Moments(NamedTuple):
    """Averages over time per chain: of theta - mean (C, d), its products (C, d, d) and p^2 (C,)."""

    first: Tensor
    second: Tensor
    kinetic: Tensor

    def split(self, parts):
        """Those of each batch size."""
        return [Moments(*x) for x in zip(*(x.chunk(parts) for x in self), strict=True)]


class Chains:
    """Chains of several batch sizes in one optimizer, from the posterior mean."""

    def __init__(self, model, sizes, per_size, *, lr, momentum, integrator, seed, backend):
        self.model = model
        batch = torch.tensor(sizes).repeat_interleave(per_size)
        self.batches = Batches(model.num_data, batch, torch.Generator().manual_seed(seed))
        self.x, self.y, self.share = model.x.float(), model.y.float(), 1.0 / batch.float()[:, None]
        self.theta = torch.nn.Parameter(model.mean.float().repeat(len(batch), 1))
        self.optimizer = CTLD(
            [self.theta],
            lr=lr,
            momentum=momentum,
            num_data=model.num_data,
            weight_decay=model.weight_decay,
            integrator=integrator,
            tempering=None,
            chains=len(batch),
            seed=seed,
            backend=backend,
        )

    def step(self):
        slope = self.model.slope(self.theta.detach() @ self.x.T, self.y)
        slope.masked_fill_(~self.batches.draw(), 0.0)
        self.theta.grad = (slope @ self.x) * self.share
        self.optimizer.step()

    def observe(self):
        deviation = self.theta.detach().double() - self.model.mean
        kinetic = self.optimizer.tempering_state()["kinetic_temperature"].clone()
        return Moments(deviation, deviation[:, :, None] * deviation[:, None, :], kinetic)

    def run(self, steps, discard, every=5):
        """Averages over every fifth step after the discarded ones."""
        total, count = None, 0
        for step in range(1, steps + 1):
            self.step()
            if step > discard and step % every == 0:
                now, count = self.observe(), count + 1
                total = now if total is None else Moments(*(a + b for a, b in zip(total, now, strict=True)))
        assert self.optimizer.tempering_state()["flags"] == 0
        return Moments(*(x / count for x in total))


class Comparison(NamedTuple):
    """Measured and predicted, in coordinates in which the posterior is standard normal.

    Attributes:
        inflation, kinetic: measured mean variance of theta and mean p^2, both 1 for the posterior.
        inflation_error, kinetic_error: their standard errors.
        predicted, predicted_kinetic: what they should be.
        widest: predicted largest variance of any direction.
        deviations: from the prediction in standard errors, by name: of all means and covariances of theta, as
            one number, of the mean variance, and of p^2.
    """

    inflation: float
    kinetic: float
    inflation_error: float
    kinetic_error: float
    predicted: float
    predicted_kinetic: float
    widest: float
    deviations: dict


def excess(off, allowance):
    """What is left of a deviation beyond an allowance."""
    return (off.abs() - allowance).clamp(min=0.0)


def compare(model, moments, mean, law, allowance=0.0):
    """Averages of chains against the mean of theta and the covariance of (theta, p).

    ``allowance``: in units of the predicted standard deviation and variance.
    """
    chains, d = moments.first.shape
    shift, covariance = mean - model.mean, law[:d, :d]
    # where the prediction is standard normal
    white = torch.linalg.inv(torch.linalg.cholesky(covariance))
    first = (moments.first - shift) @ white.T
    centered = moments.second - moments.first[:, :, None] * shift - shift[:, None] * moments.first[:, None, :]
    second = white @ (centered + torch.outer(shift, shift)) @ white.T
    root = math.sqrt(chains)
    i, j = torch.triu_indices(d, d, 1)
    pairs, variances = second[:, i, j], second.diagonal(dim1=1, dim2=2)
    # cube roots of variances are nearly Gaussian (Wilson and Hilferty); their errors are relative ones
    variance = variances.mean(0)
    relative = variances.std(0) / (variance * root)
    cubic = 3.0 * excess(variance ** (1.0 / 3.0) - 1.0, allowance / 3.0)
    deviations = torch.cat(
        (
            excess(first.mean(0), allowance) * root / first.std(0),
            excess(pairs.mean(0), allowance) * root / pairs.std(0),
            cubic / relative,
        )
    )
    to_posterior = torch.linalg.inv(torch.linalg.cholesky(model.covariance))
    inflation = (to_posterior @ moments.second @ to_posterior.T).diagonal(dim1=1, dim2=2).mean(1)
    predicted = to_posterior @ (covariance + torch.outer(shift, shift)) @ to_posterior.T
    averages = torch.stack((inflation, moments.kinetic), 1)
    expected = torch.stack((predicted.diagonal().mean(), law[d:, d:].diagonal().mean()))
    error = averages.std(0) / root
    off = excess(averages.mean(0) - expected, allowance * expected) / error
    return Comparison(
        *averages.mean(0).tolist(),
        *error.tolist(),
        *expected.tolist(),
        float(torch.linalg.eigvalsh(predicted)[-1]),
        {
            "moments": among(deviations, chains),
            "mean variance": among(off[:1], chains),
            "kinetic temperature": among(off[1:], chains),
        },
    )


def table(name, sizes, comparisons):
    """Bias against batch size, in Markdown."""
    rows = [
        f"| {size} | {c.inflation:.3f} ± {c.inflation_error:.3f} | {c.predicted:.3f} | {c.widest:.2f} | "
        f"{c.kinetic:.3f} ± {c.kinetic_error:.3f} | {c.predicted_kinetic:.3f} |"
        for size, c in zip(sizes, comparisons, strict=True)
    ]
    head = "| batch | variance of θ / posterior | predicted | widest direction | p² | predicted |"
    return "\n".join([name, head, "|---" * 6 + "|", *rows])


# ------------------------------------------------------------------------------------------ the ground


def test_the_batches_are_samples_without_replacement():
    """All N (N - 1) batches of a small data set: pairs, and the covariance of their gradients, are exact."""
    model, size = Linear(num_data=23), 5
    n, d = model.x.shape
    k, a = torch.cartesian_prod(torch.arange(1, n), torch.arange(n)).unbind(1)
    chosen = Batches(n, torch.full((len(k),), size), torch.Generator()).select(k, a).double()
    assert (chosen.sum(1) == size).all()
    together = chosen.T @ chosen / len(k)
    expected = torch.full((n, n), size * (size - 1) / (n * (n - 1.0)), dtype=torch.float64)
    assert torch.allclose(together, expected.fill_diagonal_(size / n))

    deviation = 3.0 * torch.linalg.cholesky(model.covariance)
    average = 0.0
    for delta in torch.cat((deviation.T, -deviation.T)) * math.sqrt(d):  # second moments as of a Gaussian
        examples = model.x * model.slope(model.x @ (model.mean + delta), model.y)[:, None]
        average = average + torch.cov((chosen @ examples / size).T, correction=0) / (2 * d)
    predicted = sampling_factor(n, size) * model.gradient_covariance(9.0 * model.covariance)
    assert torch.allclose(average, predicted, rtol=1e-9, atol=1e-12)


def test_full_batches_are_full():
    model = Linear(num_data=23)
    batches = Batches(23, torch.full((50,), 23), torch.Generator().manual_seed(0))
    assert batches.draw().all() and sampling_factor(model.num_data, 23) == 0.0


@pytest.mark.parametrize("batch", [16, 64, 439])
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_the_formula_of_the_method_page(integrator, batch):
    """Along the eigenvectors of the curvature the law is that of numbers: T_theta and kinetic temperature.

    sigma_g^2 is then the variance of the gradient's component, at the law that the batches themselves make.
    """
    model, lr, momentum = Linear(), 0.01, 0.9
    n, d = model.num_data, model.dimension
    law = model.law(lr, momentum, integrator, batch)
    curvature, directions = torch.linalg.eigh(model.curvature)
    theta, p = ((directions.T @ part @ directions).diagonal() for part in (law[:d, :d], law[d:, d:]))
    noise = sampling_factor(n, batch) * model.gradient_covariance(law[:d, :d])
    sigma_square = (directions.T @ noise @ directions).diagonal()
    added = n * lr * sigma_square / (2.0 * (1.0 - momentum))
    b = lr * curvature / (2.0 * (1.0 + momentum))
    if integrator == "euler":
        expected = (1.0 + added) / (1.0 - b)
        expected_p = expected
    else:
        expected = 1.0 + added / (1.0 - b)
        expected_p = 1.0 + (2.0 * momentum / (1.0 + momentum)) ** 2 * (expected - 1.0)
    assert torch.allclose(n * curvature * theta, expected, rtol=1e-7)
    assert torch.allclose(p, expected_p, rtol=1e-7)


def test_the_logistic_posterior():
    """Two more points per dimension change nothing; Laplace's approximation is off by far more."""
    model = Logistic()
    mean, covariance = model.posterior(14)
    scale = covariance.diagonal().sqrt()
    assert ((mean - model.mean) / scale).abs().max() < 1e-6
    assert (covariance - model.covariance).abs().max() < 1e-5 * covariance.max()
    assert ((model.mode - mean) / scale).abs().max() > 0.1


# ------------------------------------------------------------------------------- bias and batch size

SIZES = [8, 16, 32, 64, 128, 439]
LINEAR = dict(lr=0.01, momentum=0.9)
LOGISTIC_SIZES = [16, 64, 256, 569]
LOGISTIC = dict(lr=0.1, momentum=0.9)


def confront(name, model, predictions, measured):
    """Prints the table of bias against batch size; returns all deviations. Values: (mean, law, allowance)."""
    found = [compare(model, m, *predictions[size]) for size, m in zip(predictions, measured, strict=True)]
    print(f"\n{table(name, predictions, found)}")
    return {
        f"batch {size}: {key}": z
        for size, c in zip(predictions, found, strict=True)
        for key, z in c.deviations.items()
    }


@pytest.mark.parametrize(
    ("per_size", "steps"), [(100, 1_300), pytest.param(400, 10_000, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_linear_regression(compiled, integrator, per_size, steps, seed):
    """Full batches give the posterior (euler: as wide as its step makes it), minibatches what is predicted.

    The prediction must need what it is made of: the share of the data in a batch, and the noise that grows
    with the distance from the mean.
    """
    model = Linear()
    chains = Chains(model, SIZES, per_size, **LINEAR, integrator=integrator, seed=seed, backend=compiled)
    measured = chains.run(steps, discard=300).split(len(SIZES))
    predictions = {size: model.linearized(**LINEAR, integrator=integrator, batch=size) for size in SIZES}
    check(confront(f"linear regression, {integrator}", model, predictions, measured), seed)

    step = StepMap.of(model.curvature, model.num_data, **LINEAR, integrator=integrator)
    still = model.gradient_covariance(torch.zeros_like(model.covariance))
    wrong = {
        128: step.iterate(model.gradient_covariance, 1.0 / 128),
        8: step.iterate(lambda _: still, sampling_factor(model.num_data, 8)),
    }
    for size, law in wrong.items():
        found = compare(model, measured[SIZES.index(size)], model.mean, law)
        assert found.deviations["kinetic temperature"] > BOUND, f"{size}: {found.deviations}; {repeat(seed)}"


def test_the_bias_falls_with_the_batch():
    """As the variance of a mean without replacement, (N - B)/(B (N - 1)), up to noise from the wider law."""
    model = Linear()

    def bias(size):
        law = model.law(**LINEAR, integrator="baoab", batch=size)[: model.dimension, : model.dimension]
        inflation = torch.linalg.solve(model.covariance, law).diagonal().mean()
        return float(inflation - 1.0) / sampling_factor(model.num_data, size)

    relative = [bias(size) / bias(438) for size in SIZES[:-1]]
    assert all(a > b for a, b in itertools.pairwise(relative))
    assert relative[-1] > 1.0 and relative[0] < 1.2


@pytest.mark.parametrize(
    ("per_size", "steps"), [(100, 1_300), pytest.param(400, 10_000, marks=pytest.mark.long)]
)
def test_logistic_regression(compiled, per_size, steps, seed):
    """Full batches give the posterior found by quadrature; minibatches what a Gaussian predicts, within 2 %.

    Full batches are allowed 0.2 % for the step, whose lr times curvature is 0.013.
    """
    model = Logistic()
    chains = Chains(
        model, LOGISTIC_SIZES, per_size, **LOGISTIC, integrator="baoab", seed=seed, backend=compiled
    )
    measured = chains.run(steps, discard=300).split(len(LOGISTIC_SIZES))
    predictions = {
        size: (*model.linearized(**LOGISTIC, integrator="baoab", batch=size), 0.02)
        for size in LOGISTIC_SIZES[:-1]
    }
    exact = torch.block_diag(model.covariance, torch.eye(model.dimension, dtype=torch.float64))
    predictions[model.num_data] = (model.mean, exact, 0.002)
    check(confront("logistic regression", model, predictions, measured), seed)


# ------------------------------------------------------------------------- what must be noticed, and where


def hotter(integrator, **rest):
    """Noise of 5 % too large a standard deviation."""
    right = reference.explore_coefficients(integrator, **rest)
    return right._replace(noise=1.05 * right.noise)


def test_hotter_noise_is_noticed(monkeypatch, compiled, seed):
    monkeypatch.setattr(ctld_cuda.coefficients, "explore_coefficients", hotter)
    model = Linear()
    size = model.num_data
    chains = Chains(model, [size], 200, **LINEAR, integrator="baoab", seed=seed, backend=compiled)
    found = compare(model, chains.run(600, 200), *model.linearized(**LINEAR, integrator="baoab", batch=size))
    assert found.deviations["mean variance"] > BOUND, repeat(seed)
    assert found.deviations["kinetic temperature"] > BOUND, repeat(seed)


def early_deviations(sizes, integrator, chains, steps, seed, backend):
    """Against the exact covariance after few steps from the posterior mean."""
    model = Linear()
    run = Chains(
        model, sizes, chains, lr=0.05, momentum=0.8, integrator=integrator, seed=seed, backend=backend
    )
    measured = run.run(steps, steps - 1, every=1).split(len(sizes))
    found = {}
    for size, moments in zip(sizes, measured, strict=True):
        law = model.law(0.05, 0.8, integrator, size, steps)
        compared = compare(model, moments, model.mean, law).deviations
        found |= {f"batch {size}: {name}": z for name, z in compared.items()}
    return found


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_the_first_steps_on_every_backend(backend, integrator, seed):
    check(early_deviations([16, 439], integrator, 1_000, 60, seed, backend), seed)


def test_the_first_steps_on_the_simulated_gpu(monkeypatch, seed):
    simulated.install(monkeypatch, blocks=1, resident_blocks=1)
    check(early_deviations([16], "baoab", 500, 30, seed, "cpu"), seed)
