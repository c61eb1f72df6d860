"""How many independent draws a run was worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Sums(NamedTuple):
    """Weighted sums over the draws of every chain: of the functions, (C, F), and of the weights, (C,)."""

    functions: Array
    weights: Array

    @property
    def mean(self) -> Array:
        """Estimate of the functions' means, (F,); NaN without a single draw."""
        total = self.weights.sum()
        return self.functions.sum(0) / total if total > 0 else np.full(self.functions.shape[1], np.nan)


def sums(draws: Iterable[tuple[Array, Array | None]], functions: Callable[[Array], Array]) -> Sums:
    """Adds up ``functions`` over draws (values (C, d), weights (C,) or None for 1 each)."""
    of_functions = of_weights = None
    for values, weights in draws:
        f = functions(values)
        w = np.ones(len(values)) if weights is None else weights.astype(np.float64)
        # where the weight is 0 the value may be anything
        f = np.where(w[:, None] > 0, f * w[:, None], 0.0)
        of_functions = f if of_functions is None else of_functions + f
        of_weights = w if of_weights is None else of_weights + w
    if of_functions is None:
        raise ValueError("no draws to add up")
    return Sums(of_functions, of_weights)


def effective_draws(errors: Array, variance: Array) -> float:
    """Number of independent draws whose means would have errors as large: 1 / mean(error^2 / variance).

    The mean of n independent draws of f has the mean squared error Var(f)/n, so the average of error^2/Var
    over repetitions and functions estimates 1/n. Every error counts: that of few draws, of correlated draws,
    of modes that were never found, and the bias of a step size.

    Args:
        errors: estimated minus exact means, one row per independent repetition, (R, F).
        variance: exact variances of the functions, (F,).

    Raises:
        ValueError: for shapes that do not fit, or a variance that is not positive.
    """
    errors, variance = np.asarray(errors), np.asarray(variance)
    if errors.ndim != 2 or variance.shape != errors.shape[1:]:
        raise ValueError(
            f"errors (R, F) and variance (F,) are needed, got {errors.shape} and {variance.shape}"
        )
    if not np.all(variance > 0):
        raise ValueError("all variances must be positive")
    relative = np.mean(errors**2 / variance)
    return float(1.0 / relative) if np.isfinite(relative) else 0.0


def effective_draws_error(errors: Array, variance: Array) -> float:
    """Relative standard error of :func:`effective_draws`, from the scatter between repetitions."""
    per_repetition = np.mean(np.asarray(errors) ** 2 / variance, axis=1)
    if len(per_repetition) < 2 or not np.all(np.isfinite(per_repetition)):
        return float("nan")
    spread = per_repetition.std(ddof=1) / np.sqrt(len(per_repetition))
    return float(spread / per_repetition.mean())


def effective_draws_of_one_run(found: Sums, exact: Array, variance: Array) -> float:
    """The same from a single run, with its chains as the repetitions; for tuning only.

    The chains' own errors, weighted by their draws, give the variance of the run's mean. What its squared
    error has beyond that, and beyond two standard errors of a mean of F squares, counts on top: it is bias,
    which the chains share.
    """
    total = found.weights.sum()
    if not total > 0:
        return 0.0
    deviations = found.functions - found.weights[:, None] * exact
    scatter = np.mean((deviations**2).sum(0) / total**2 / variance)
    squared = np.mean((found.mean - exact) ** 2 / variance)
    by_chance = 1.0 + 2.0 * math.sqrt(2.0 / len(exact))
    relative = scatter + max(0.0, squared - by_chance * scatter)
    return float(1.0 / relative) if np.isfinite(relative) else 0.0


def total_variation(shares: Array, exact: Array) -> float:
    """Total variation distance between two sets of mode weights; 1 if the run has no draws."""
    distance = 0.5 * np.abs(np.asarray(shares) - exact).sum()
    return float(distance) if np.isfinite(distance) else 1.0


MOST_CHAINS = 256


def arviz_draws(
    draws: list[tuple[Array, Array | None]], functions: Callable[[Array], Array], exact: Array
) -> float:
    """Effective number of draws as ArviZ sees it from the run alone, harmonic mean over the functions.

    Where draws have weights 0 or 1 (the window), the mean is a ratio: its error is that of the mean of
    w (f - E f), divided by the mean of w. So the effective number is Var(f) mean(w)^2 / (Var(g)/ESS(g)) with
    g = w (f - E f). ArviZ's ``method="mean"`` throughout: there is no such rule for rank-normalised draws.
    At most 256 chains are looked at and the result is scaled up.

    Like every estimate that sees only the run, it knows nothing of modes that no chain has visited: functions
    that are constant over the run are left out. NaN if all are, or with fewer than 4 draws per chain.
    """
    import arviz

    chains = len(draws[0][0])
    looked_at = min(chains, MOST_CHAINS)
    if len(draws) < 4:
        return float("nan")
    f = np.stack([functions(values[:looked_at]) for values, _ in draws])  # (n, C, F)
    ones = np.ones(looked_at)
    w = np.stack([ones if weights is None else weights[:looked_at] for _, weights in draws])[:, :, None]
    share = w.mean()
    if not share > 0:
        return float("nan")
    f = np.where(w > 0, f, 0.0)
    center = (w * f).sum((0, 1)) / w.sum()
    variance = (w * (f - center) ** 2).sum((0, 1)) / w.sum()
    g = w * (f - center)
    inverse = []
    for i in range(len(exact)):
        if variance[i] > 0:
            series = g[:, :, i].T
            size = float(arviz.ess(series, method="mean"))
            inverse.append(series.var() / size / (variance[i] * share**2))
    if not inverse or not np.all(np.isfinite(inverse)):
        return float("nan")
    return float(chains / looked_at / np.mean(inverse))
