"""The suggested temperature against equipartition, which is exact for a quadratic loss."""

import math

import pytest
import torch

from ctld_cuda import (
    CTLD,
    RMSPreconditioner,
    Tempering,
    settings_from,
    suggest_temperature,
    suggest_tempering,
)


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


# -------------------------------------------------------------------------------------- speed of alpha


def without_draw(tempering, steps, backend, seed, chains=2000):
    """Share of the explorations in whose second half no step counts as a draw."""
    p = torch.nn.Parameter(torch.zeros(chains, 1))
    optimizer = CTLD([p], num_data=10, tempering=tempering, chains=chains, backend=backend, seed=seed)
    found = torch.zeros(chains, dtype=torch.bool)
    losses = torch.zeros(chains)
    for step in range(steps):
        p.grad = torch.zeros_like(p)
        optimizer.step(loss=losses)
        if step >= steps // 2:
            found |= optimizer.tempering_state()["at_target"]
    return 1.0 - float(found.double().mean())


@pytest.mark.parametrize("steps", [900, 1500])
def test_most_explorations_end_with_draws(compiled, seed, steps):
    """3 % have none. 2,000 chains: the standard error is 0.4 %, 5 of them at each bound: 1e-5."""
    assert 0.01 < without_draw(suggest_tempering(steps), steps, compiled, seed) < 0.06
    slow = suggest_tempering(100 * steps)
    assert without_draw(slow, steps, compiled, seed) > 0.07


def test_speed_of_the_temperature():
    for steps, size in ((10, 0.02), (600, 0.02), (1200, 0.01), (2400, 0.005), (10**6, 0.005)):
        assert suggest_tempering(steps).step_size == pytest.approx(size, rel=1e-15)
    assert suggest_tempering(900) == Tempering(flat=0.8, step_size=12 / 900)
    for steps, error in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="explore_steps"):
            suggest_tempering(steps)


# ------------------------------------------------------------------------------- settings from an optimizer


def parameters():
    return [torch.nn.Parameter(torch.randn(20, 3)), torch.nn.Parameter(torch.randn(3))]


def test_settings_from_sgd_make_a_ctld_that_descends_like_it():
    """At half the learning rate: without noise, the same path, because half a rate is all that differs."""
    ours, theirs = parameters(), parameters()
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            b.copy_(a)
    tuned = torch.optim.SGD(ours, lr=0.04, momentum=0.8, weight_decay=0.03)
    settings = settings_from(tuned, num_data=500, loss=2.0, steps=100)
    assert settings["temperature"] == suggest_temperature(63, 500, 2.0)
    assert settings["explore_steps"] == 60 and settings["preconditioner"] is None
    optimizer = CTLD(ours, **settings)
    assert optimizer.tempering == suggest_tempering(60)
    optimizer.finetune()
    half = torch.optim.SGD(theirs, lr=0.02, momentum=0.8, weight_decay=0.03)
    for _ in range(10):
        for a, b in zip(ours, theirs, strict=True):
            a.grad, b.grad = a.detach() * 2.0, b.detach() * 2.0
        optimizer.step()
        half.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_settings_from_adam_decay_and_move_like_it(kind):
    decay = 0.3 if kind is torch.optim.AdamW else 0.0
    tuned = kind(parameters(), lr=0.01, betas=(0.95, 0.99), weight_decay=decay)
    settings = settings_from(tuned, num_data=500, loss=2.0, steps=100)
    assert settings["momentum"] == 0.95 and settings["weight_decay"] == decay
    assert settings["lr"] == pytest.approx(0.5 * 0.05 * 0.01)
    assert settings["preconditioner"] == RMSPreconditioner(adapt_steps=30)
    longer = settings_from(tuned, num_data=500, loss=2.0, steps=100, explore=0.9)
    assert longer["explore_steps"] == 90 and longer["preconditioner"].adapt_steps == 45
    assert {k: v for k, v in longer.items() if v != settings[k]}.keys() == {"explore_steps", "preconditioner"}
    # without gradients both shrink parameters by the same share of a step, but for half the rate
    p = torch.nn.Parameter(torch.ones(5))
    optimizer = CTLD([p], **settings)
    optimizer.finetune()
    for _ in range(200):
        p.grad = torch.zeros(5)
        optimizer.step()
    assert float(p.detach().log().mean()) == pytest.approx(200 * math.log(1 - 0.5 * 0.01 * decay), rel=0.12)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_run_that_did_not_reach_the_optimizer_is_repeated_nearer_to_it(kind):
    tuned = kind(parameters(), lr=0.01, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    first = settings_from(tuned, num_data=500, loss=2.0, steps=100)
    for reached in (0.1, 2.0):
        assert settings_from(tuned, num_data=500, loss=2.0, steps=100, reached=reached) == first
    for reached in (2.001, math.inf):
        again = settings_from(tuned, num_data=500, loss=2.0, steps=100, reached=reached)
        assert again["lr"] == pytest.approx(2 * first["lr"])
        assert again["temperature"] == pytest.approx(first["temperature"] / 10)
        assert {k: v for k, v in again.items() if v != first[k]}.keys() == {"lr", "temperature"}


@pytest.mark.parametrize(
    ("optimizer", "options", "error", "words"),
    [
        (torch.optim.RMSprop, {}, TypeError, "RMSprop"),
        (torch.optim.SGD, {}, ValueError, "momentum"),
        (torch.optim.Adam, {"weight_decay": 0.1}, ValueError, "AdamW"),
    ],
)
def test_optimizers_without_a_counterpart(optimizer, options, error, words):
    with pytest.raises(error, match=words):
        settings_from(optimizer(parameters(), lr=0.1, **options), num_data=10, loss=1.0, steps=100)


def test_bad_settings():
    a, b = parameters()
    sgd = torch.optim.SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.2}], lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="groups"):
        settings_from(sgd, num_data=10, loss=1.0, steps=100)
    sgd = torch.optim.SGD(parameters(), lr=0.1, momentum=0.9)
    for name, value, error in (
        ("steps", 1, ValueError),
        ("steps", 2.5, TypeError),
        ("loss", -1.0, ValueError),
        ("explore", 0.0, ValueError),
        ("explore", 1.1, ValueError),
        ("explore", "long", TypeError),
        ("reached", math.nan, ValueError),
        ("reached", "1", TypeError),
    ):
        with pytest.raises(error, match=name):
            settings_from(sgd, **{"num_data": 10, "loss": 1.0, "steps": 100, name: value})
    with pytest.raises(TypeError, match="loss must be"):
        settings_from(sgd, num_data=10, loss="1", steps=100, reached=1.0)
