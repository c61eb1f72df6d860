"""Weights that turn draws at all temperatures into draws from the target.

The sampler's stationary density is proportional to exp(-beta(alpha) U - V(alpha)), U in nats. Whatever V is,
and while it is still being learned, a draw taken at inverse-temperature factor beta has the conditional
density exp(-beta U)/Z(beta). So n draws, taken at beta_1 ... beta_n, are together a sample of the mixture

    m(theta) = 1/n sum_j exp(-beta_j U(theta)) / Z(beta_j),

and the importance weight of a draw for the target exp(-U)/Z(1) is exp(-U)/m: the "balance heuristic" or
deterministic mixture (Veach and Guibas 1995; Owen and Zhou 2000). It is bounded by n over the number of draws
at beta = 1. The weight exp(-(1-beta) U + V) of a draw by its own alpha estimates the same, with more variance
and no bound.

The Z are those of the multistate Bennett acceptance ratio (Shirts and Chodera 2008): Z(beta) must be what the
weighted draws themselves say it is. With f = -ln Z that is the minimum of the convex function

    sum_i ln sum_k n_k exp(f_k - beta_k U_i) - sum_k n_k f_k,

found by Newton's method. Neither the bias nor its history enters, nor do free energies from minibatches. The
betas of the draws are continuous; each is divided between the two nearest nodes of a grid so fine that
exp(-beta U) is linear between nodes over the spread of U, with one node exactly at beta = 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

NODES = 64, 512
# largest standard deviation of U times distance of nodes; the error is an eighth of its square
RESOLUTION = 0.25
NEWTON_STEPS = 200


class Weights(NamedTuple):
    """What :meth:`~ctld_cuda.posterior.PosteriorSamples.log_weights` returns.

    Attributes:
        log_weights: logarithms of normalised weights, float64 (n,); the weights sum to 1.
        effective_sample_size: Kish's 1/sum(w^2): so many independent draws of equal weight have the same
            variance. It does not know that successive draws are correlated.
        betas: nodes of the grid of inverse-temperature factors, float64 (K,), ascending.
        log_partition: ln Z(beta)/Z(1) at the nodes, float64 (K,); compare with ``free_energy``.
    """

    log_weights: torch.Tensor
    effective_sample_size: float
    betas: torch.Tensor
    log_partition: torch.Tensor


def mixture_weights(energy: np.ndarray, beta: np.ndarray) -> Weights:
    """Weights for the target of draws with energies ``energy`` (nats) taken at ``beta``, both (n,).

    Raises:
        RuntimeError: if the temperatures overlap too little for the draws to tell Z(beta).
    """
    n = len(energy)
    if (beta == 1.0).all():
        one = torch.ones(1, dtype=torch.float64)
        return Weights(torch.full((n,), -math.log(n), dtype=torch.float64), float(n), one, one - 1.0)
    middle = np.median(energy)
    energy = energy - middle
    nodes, counts = _nodes(energy, beta)
    f = _solve(energy, nodes, counts)
    log_mixture = _log_sum(f + np.log(counts) - np.outer(energy, nodes))
    log_weights = -energy - log_mixture
    total = _log_sum(log_weights[None])[0]
    log_weights -= total
    effective = math.exp(-_log_sum(2.0 * log_weights[None])[0])
    # Z(1) is exp(total) in units of the f; U - middle instead of U has multiplied Z(beta) by exp(beta middle)
    log_partition = -f - total + (1.0 - nodes) * middle
    return Weights(
        torch.from_numpy(log_weights), effective, torch.from_numpy(nodes), torch.from_numpy(log_partition)
    )


def _nodes(energy: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A grid of ln beta up to 0, and how many draws each node has; nodes without any are left out."""
    log_beta = np.log(beta)
    low = log_beta.min()
    spread = _spread_of_beta_energy(energy, beta)
    size = int(np.clip(math.ceil(-low * spread / RESOLUTION), *NODES))
    position = (1.0 - log_beta / low) * size
    left = np.clip(np.floor(position).astype(np.int64), 0, size - 1)
    share = position - left
    counts = np.bincount(left, 1.0 - share, size + 1) + np.bincount(left + 1, share, size + 1)
    used = counts > 1e-9 * len(beta)
    return np.exp(low * (1.0 - np.arange(size + 1) / size))[used], counts[used]


def _spread_of_beta_energy(energy: np.ndarray, beta: np.ndarray) -> float:
    """Standard deviation of beta U at like beta, the largest of ten groups; sqrt(d/2) if U is harmonic."""
    groups = np.array_split(np.argsort(beta, kind="stable"), min(10, len(beta)))
    return max(float(np.std(energy[g]) * beta[g].mean()) for g in groups)


def _log_sum(x: np.ndarray) -> np.ndarray:
    """ln sum exp over the last dimension."""
    largest = x.max(-1, keepdims=True)
    return largest[..., 0] + np.log(np.exp(x - largest).sum(-1))


def _solve(energy: np.ndarray, nodes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """f = -ln Z up to a constant, by Newton's method with halving of steps that overshoot."""
    f = _thermodynamic_integration(energy, nodes, counts)
    value, gradient, hessian = _objective(f, energy, nodes, counts)
    for _ in range(NEWTON_STEPS):
        if np.abs(gradient).max() < 1e-9 * len(energy):
            return f - f[-1]
        # singular along constants: f and f + c are the same
        direction = np.linalg.lstsq(hessian, -gradient, rcond=1e-13)[0]
        length = 1.0
        while True:
            trial = f + length * direction
            trial_value, trial_gradient, trial_hessian = _objective(trial, energy, nodes, counts)
            if trial_value <= value + 1e-4 * length * (gradient @ direction) or length < 1e-10:
                break
            length *= 0.5
        if length < 1e-10:
            break
        f, value, gradient, hessian = trial, trial_value, trial_gradient, trial_hessian
    if np.abs(gradient).max() < 1e-6 * len(energy):
        return f - f[-1]
    raise RuntimeError(
        "the draws do not determine the weights: energies at neighbouring temperatures hardly overlap; "
        "take more draws, or only those at the target (at_target)"
    )


def _thermodynamic_integration(energy: np.ndarray, nodes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """A first guess: f' = mean energy, which falls with beta like the sorted energies do."""
    share = (np.cumsum(counts[::-1]) - 0.5 * counts[::-1])[::-1] / counts.sum()
    mean = np.quantile(energy, np.clip(share, 0.0, 1.0))
    pieces = 0.5 * (mean[1:] + mean[:-1]) * np.diff(nodes)
    return np.concatenate(([0.0], np.cumsum(pieces)))


def _objective(
    f: np.ndarray, energy: np.ndarray, nodes: np.ndarray, counts: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """The convex function of the module's docstring, its gradient and Hessian; by blocks of draws."""
    value, shares, products = -float(counts @ f), np.zeros_like(f), np.zeros((len(f), len(f)))
    offset = f + np.log(counts)
    for start in range(0, len(energy), 8192):
        terms = offset - np.outer(energy[start : start + 8192], nodes)
        log_mixture = _log_sum(terms)
        responsibility = np.exp(terms - log_mixture[:, None])
        value += float(log_mixture.sum())
        shares += responsibility.sum(0)
        products += responsibility.T @ responsibility
    return value, shares - counts, np.diag(shares) - products
