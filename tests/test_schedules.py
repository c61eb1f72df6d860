"""explore_then_finetune: which learning rate every step sees, saving, and numbers that do not fit."""

import copy
import math

import pytest
import torch
from common import differing, make_parameters, noisy_quadratic, run, snapshot, two_groups

from ctld_cuda import CTLD, Tempering, explore_then_finetune


def make(explore_steps=4, **options):
    return two_groups([(5,), (7,)], explore_steps=explore_steps, **options)


def rates(optimizer, scheduler, steps):
    """The learning rates that the steps see, and the phases they are taken in."""
    seen, phases = [], []
    for k in range(steps):
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
        run(optimizer, 1, first=k)
        phases.append(optimizer.phase)
        scheduler.step()
    return seen, phases


@pytest.mark.parametrize("anneal", ["cosine", "linear"])
def test_every_step_by_hand(backend, anneal):
    """Four steps with noise at the full rate, then six of which the first still has it."""
    optimizer = make(backend=backend)
    scheduler = explore_then_finetune(optimizer, 4, 10, anneal=anneal, final_ratio=0.1)
    seen, phases = rates(optimizer, scheduler, 12)
    assert phases == ["explore"] * 4 + ["finetune"] * 8
    left = [1 - k / 6 for k in range(7)]
    if anneal == "cosine":
        left = [0.5 + 0.5 * math.cos(math.pi * k / 6) for k in range(7)]
    factors = [1.0] * 4 + [0.1 + 0.9 * x for x in left] + [0.1]
    assert seen == [pytest.approx([0.05 * f, 0.02 * f]) for f in factors]
    assert all(lr > 0 for lr, _ in seen)


def test_warming_up(backend):
    optimizer = make(backend=backend)
    seen, _ = rates(optimizer, explore_then_finetune(optimizer, 4, 6, warmup_steps=3), 6)
    assert [lr / 0.05 for lr, _ in seen] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.5])


def test_without_exploring():
    optimizer = make(explore_steps=0)
    seen, phases = rates(optimizer, explore_then_finetune(optimizer, 0, 2, anneal="linear"), 3)
    assert [lr for lr, _ in seen] == pytest.approx([0.05, 0.025, 0.0])
    assert set(phases) == {"finetune"}


def test_the_user_may_switch(backend):
    """Without explore_steps in the optimizer; the same steps as with."""
    counted, called = make(backend=backend), make(None, backend=backend)
    for optimizer in (counted, called):
        scheduler = explore_then_finetune(optimizer, 4, 8)
        for k in range(8):
            if optimizer is called and k == 4:
                optimizer.finetune()
            run(optimizer, 1, first=k)
            scheduler.step()
    assert differing(snapshot(counted), snapshot(called)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_is_filled_in_place(backend, dtype):
    lr = torch.tensor(0.05, dtype=dtype)
    parameters = make_parameters([(5,)])
    optimizer = CTLD(parameters, lr=lr, num_data=10, explore_steps=2, backend=backend)
    scheduler = explore_then_finetune(optimizer, 2, 4, anneal="linear", final_ratio=0.2)
    seen = []
    for k in range(4):
        assert optimizer.param_groups[0]["lr"] is lr
        seen.append(float(lr))
        optimizer.step(loss=noisy_quadratic(parameters, k))
        scheduler.step()
    assert seen == pytest.approx([0.05, 0.05, 0.05, 0.03])


@pytest.mark.parametrize("at", [2, 4, 6])
def test_it_resumes(backend, at):
    def fresh():
        optimizer = make(backend=backend, tempering=Tempering(step_size=0.1))
        return optimizer, explore_then_finetune(optimizer, 4, 9, warmup_steps=1)

    straight, scheduler = fresh()
    rates(straight, scheduler, at)
    saved = copy.deepcopy((straight.state_dict(), scheduler.state_dict()))
    values = [p.detach().clone() for group in straight.param_groups for p in group["params"]]
    for k in range(at, 9):
        run(straight, 1, first=k)
        scheduler.step()
    resumed, scheduler = fresh()
    with torch.no_grad():
        for p, value in zip((p for g in resumed.param_groups for p in g["params"]), values, strict=True):
            p.copy_(value)
    resumed.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    for k in range(at, 9):
        run(resumed, 1, first=k)
        scheduler.step()
    assert differing(snapshot(straight), snapshot(resumed)) == []


def test_its_state_can_be_loaded_without_pickled_code(tmp_path):
    scheduler = explore_then_finetune(make(), 4, 9)
    torch.save(scheduler.state_dict(), tmp_path / "scheduler")
    scheduler.load_state_dict(torch.load(tmp_path / "scheduler", weights_only=True))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((5, 10), {}, ValueError, "explores for 4 steps, the schedule for 5"),
        ((4, 4), {}, ValueError, "total_steps"),
        ((-1, 4), {}, ValueError, "explore_steps"),
        ((4.0, 9), {}, TypeError, "explore_steps"),
        ((4, 9), {"final_ratio": 1.5}, ValueError, "final_ratio"),
        ((4, 9), {"final_ratio": math.nan}, ValueError, "final_ratio"),
        ((4, 9), {"anneal": "exponential"}, ValueError, "anneal"),
        ((4, 9), {"warmup_steps": 5}, ValueError, "warmup_steps"),
    ],
)
def test_numbers_that_do_not_fit(arguments, options, error, message):
    optimizer = make()
    with pytest.raises(error, match=message):
        explore_then_finetune(optimizer, *arguments, **options)
    assert "initial_lr" not in optimizer.param_groups[0]


def test_other_optimizers_have_no_phases():
    with pytest.raises(TypeError, match="SGD"):
        explore_then_finetune(torch.optim.SGD(make_parameters([(3,)])), 4, 9)
