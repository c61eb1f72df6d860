"""How good predicted probabilities are: accuracy, negative log-likelihood, calibration."""

from __future__ import annotations

from typing import NamedTuple

import torch

Tensor = torch.Tensor

BINS = 15


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """The share of examples whose most probable class, of (n, classes), is their label, (n,)."""
    return float((probabilities.argmax(-1) == labels).double().mean())


def negative_log_likelihood(probabilities: Tensor, labels: Tensor) -> float:
    """Mean of -ln p(label), in nats per example; infinite if a label was given probability 0."""
    return float(-probabilities.gather(-1, labels[:, None]).double().log().mean())


class Reliability(NamedTuple):
    """Examples sorted by confidence, the probability of the predicted class, into bins; each float64 (bins,).

    ``share``: of the examples in the bin. ``confidence``, ``accuracy``: their means, NaN in empty bins.
    """

    share: Tensor
    confidence: Tensor
    accuracy: Tensor


def reliability(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> Reliability:
    """Equal bins (k/bins, (k+1)/bins] of the confidence (Guo et al. 2017)."""
    confidence, predicted = probabilities.double().max(-1)
    index = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)

    def sums(values: Tensor) -> Tensor:
        return torch.zeros(bins, dtype=torch.float64).index_add_(0, index, values)

    count = sums(torch.ones_like(confidence))
    return Reliability(
        count / len(labels), sums(confidence) / count, sums((predicted == labels).double()) / count
    )


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """The mean over examples of |accuracy - confidence| of their bin (Naeini et al. 2015)."""
    r = reliability(probabilities, labels, bins)
    return float((r.share * (r.accuracy - r.confidence).abs()).nansum())


class Scores(NamedTuple):
    """All of these on clean labels, and NLL and ECE on labels permuted like those of training."""

    accuracy: float
    nll: float
    ece: float
    noisy_nll: float
    noisy_ece: float


def scores(probabilities: Tensor, labels: Tensor, noisy_labels: Tensor) -> Scores:
    """Scores of probabilities (n, classes)."""
    return Scores(
        accuracy(probabilities, labels),
        negative_log_likelihood(probabilities, labels),
        expected_calibration_error(probabilities, labels),
        negative_log_likelihood(probabilities, noisy_labels),
        expected_calibration_error(probabilities, noisy_labels),
    )
