"""The suggested temperature against equipartition, which is exact for a quadratic loss."""

import math

import pytest
import torch

from ctld_cuda import CTLD, suggest_temperature


def test_the_noise_costs_the_share_of_the_loss(backend, seed):
    """A chain in d directions of three curvatures, from its minimum: the mean excess is share * loss."""
    d, num_data, loss, share = 60_000, 500, 3.0, 0.1
    torch.manual_seed(seed)
    x = torch.nn.Parameter(torch.zeros(d))
    curvature = torch.tensor([0.5, 1.0, 2.0]).repeat(d // 3)
    temperature = suggest_temperature([x], num_data, loss, share=share)
    optimizer = CTLD(
        [x],
        lr=0.05,
        momentum=0.9,
        num_data=num_data,
        temperature=temperature,
        tempering=None,
        seed=seed,
        backend=backend,
    )
    for _ in range(300):  # many relaxation times of the momentum, 10 steps, and of x, 4
        x.grad = curvature * x.detach()
        optimizer.step()
    excess = 0.5 * float((curvature.double() * x.detach().double() ** 2).sum())
    # a sum of d squares of normal numbers, 5 standard errors: one run in 2 million fails by chance
    assert excess == pytest.approx(share * loss, rel=5 * math.sqrt(2 / d))


def test_by_hand():
    assert suggest_temperature(1000, 500, 2.0, share=0.1) == pytest.approx(0.2)
    assert suggest_temperature(1000, 500, 2.0) == pytest.approx(0.06)


def test_what_is_trained_counts_once():
    a, b, frozen = torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(8)), torch.zeros(99)
    assert suggest_temperature((p for p in [a, b, a, frozen]), 10, 1.0) == suggest_temperature(20, 10, 1.0)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((0, 10, 1.0), ValueError, "number of parameters"),
        (([], 10, 1.0), ValueError, "no parameter"),
        (([torch.zeros(3)], 10, 1.0), ValueError, "no parameter"),
        ((["weight"], 10, 1.0), TypeError, "weight"),
        ((5, 0, 1.0), ValueError, "num_data"),
        ((5, 10, -1.0), ValueError, "loss"),
        ((5, 10, math.nan), ValueError, "loss"),
        ((5, 10, "1"), TypeError, "loss"),
        ((True, 10, 1.0), TypeError, "number of parameters"),
    ],
)
def test_bad_input(arguments, error, words):
    with pytest.raises(error, match=words):
        suggest_temperature(*arguments)


def test_a_share_must_be_positive():
    with pytest.raises(ValueError, match="share"):
        suggest_temperature(5, 10, 1.0, share=0.0)
