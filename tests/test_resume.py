"""Saving and resuming is bitwise: through files and new processes, pickle, deepcopy, and across backends."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import differing, make_parameters, run, snapshot, two_groups
from conftest import INFO, require

from ctld_cuda import CTLD, AdaptiveForce, Metadynamics, RMSPreconditioner, Tempering

CASES = {
    "standardized": {},
    "exact": {
        "tempering": Tempering(coupling="exact", bias=Metadynamics(), step_size=0.1),
        "integrator": "euler",
    },
    "chains": {"chains": 4, "tempering": Tempering(step_size=0.2), "seed": 2**63 + 1},
    "no tempering": {"tempering": None},
    "finetuning": {"explore_steps": 20},
    "switching": {"explore_steps": 30},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16 momenta": {"dtype": torch.bfloat16, "momentum_dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "learning to precondition": {"preconditioner": RMSPreconditioner(adapt_steps=40)},
    "preconditioned": {"preconditioner": RMSPreconditioner(adapt_steps=20)},
    "preconditioned bfloat16": {"dtype": torch.bfloat16, "preconditioner": RMSPreconditioner(adapt_steps=20)},
}
SHAPES = [(4, 3), (4, 17), (4, 40, 10), (4,)]

SECOND_HALF = """
import sys
sys.path.insert(0, {tests!r})
import torch
from common import run, snapshot, two_groups
from test_resume import CASES, SHAPES, parameters_of
for case, options in CASES.items():
    saved = torch.load(case, weights_only=True)
    optimizer = two_groups(SHAPES, backend={backend!r}, **options)
    with torch.no_grad():
        for p, value in zip(parameters_of(optimizer), saved["parameters"], strict=True):
            p.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    torch.save(snapshot(run(optimizer, 25, first=25)), case)
"""


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize(("first", "second"), [(a, b) for a in INFO for b in INFO])
def test_in_a_new_process(first, second, tmp_path):
    require(first)
    require(second)
    expected = {}
    for case, options in CASES.items():
        expected[case] = snapshot(run(two_groups(SHAPES, backend=first, **options), 50))
        optimizer = run(two_groups(SHAPES, backend=first, **options), 25)
        checkpoint = {"optimizer": optimizer.state_dict(), "parameters": parameters_of(optimizer)}
        torch.save(checkpoint, tmp_path / case)
    script = SECOND_HALF.format(tests=str(Path(__file__).parent), backend=second)
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, cwd=tmp_path)
    for case in CASES:
        assert differing(expected[case], torch.load(tmp_path / case, weights_only=True)) == [], case


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
@pytest.mark.parametrize("case", CASES)
def test_copies_continue_as_the_original(backend, how, case):
    original = run(two_groups(SHAPES, backend=backend, **CASES[case]), 25)
    if how == "pickle":
        other = pickle.loads(pickle.dumps(original))
    elif how == "deepcopy":
        other = copy.deepcopy(original)
    else:
        buffer = io.BytesIO()
        torch.save(original, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert other.phase == original.phase and other.seed == original.seed
    before = snapshot(original)
    run(other, 25, first=25)
    assert differing(before, snapshot(original)) == []  # nothing is shared
    run(original, 25, first=25)
    assert differing(snapshot(original), snapshot(other)) == []


def test_a_state_of_the_future_can_be_loaded_over_a_later_one(backend):
    optimizer = run(two_groups(SHAPES, backend=backend), 10)
    saved = copy.deepcopy(optimizer.state_dict())
    values = [p.detach().clone() for p in parameters_of(optimizer)]
    expected = snapshot(run(optimizer, 10, first=10))
    optimizer.finetune()
    run(optimizer, 3)
    with torch.no_grad():
        for p, value in zip(parameters_of(optimizer), values, strict=True):
            p.copy_(value)
    optimizer.load_state_dict(saved)
    assert optimizer.phase == "explore"
    assert differing(expected, snapshot(run(optimizer, 10, first=10))) == []


def test_loading_writes_in_place(backend):
    optimizer = run(two_groups(SHAPES, backend=backend, lr=torch.tensor(0.1)), 3)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.05)
    tensors = {
        name: tensor.data_ptr()
        for name, tensor in {
            **optimizer._sampler.tensors(),
            "momentum": optimizer.state[parameters_of(optimizer)[0]]["momentum_buffer"],
            "lr": optimizer.param_groups[0]["lr"],
        }.items()
    }
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    after = {
        **optimizer._sampler.tensors(),
        "momentum": optimizer.state[parameters_of(optimizer)[0]]["momentum_buffer"],
        "lr": optimizer.param_groups[0]["lr"],
    }
    assert tensors == {name: tensor.data_ptr() for name, tensor in after.items()}


def test_the_scheduler_goes_on_where_it_was(backend):
    def fresh():
        optimizer = two_groups(SHAPES, backend=backend)
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=60)

    def advance(optimizer, scheduler, steps, first):
        for k in range(first, first + steps):
            run(optimizer, 1, first=k)
            scheduler.step()

    optimizer, scheduler = fresh()
    advance(optimizer, scheduler, 50, 0)
    expected = snapshot(optimizer)
    optimizer, scheduler = fresh()
    advance(optimizer, scheduler, 25, 0)
    saved, saved_scheduler = copy.deepcopy(optimizer.state_dict()), scheduler.state_dict()
    values = parameters_of(optimizer)
    optimizer, scheduler = fresh()
    with torch.no_grad():
        for p, value in zip(parameters_of(optimizer), values, strict=True):
            p.copy_(value)
    optimizer.load_state_dict(saved)
    scheduler.load_state_dict(saved_scheduler)
    advance(optimizer, scheduler, 25, 25)
    assert differing(expected, snapshot(optimizer)) == []


def test_hooks_around_loading_see_the_whole_state():
    optimizer = run(two_groups(SHAPES), 3)
    seen = []

    def before(optimizer, state_dict):
        seen.append("before")

    def after(optimizer):
        seen.append(optimizer.state[parameters_of(optimizer)[0]]["momentum_buffer"].clone())

    saved = copy.deepcopy(optimizer.state_dict())
    expected = saved["state"][0]["momentum_buffer"].clone()
    run(optimizer, 3)
    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)
    optimizer.load_state_dict(saved)
    assert seen[0] == "before" and torch.equal(seen[1], expected)


# ------------------------------------------------------------------------ states that do not fit


def without(key):
    def change(state):
        del state[key]

    return change


def sampler(**changes):
    def change(state):
        state["param_groups"][0]["sampler"].update(changes)

    return change


def without_sampler(state):
    del state["param_groups"][0]["sampler"]


def tables(state):
    return state["param_groups"][0]["sampler"]["tensors"]


def momentum_of_wrong_shape(state):
    state["state"][0]["momentum_buffer"] = torch.zeros(2)


def table_of_wrong_size(state):
    tables(state)["visits"] = torch.zeros(3, dtype=torch.int64)


def table_of_wrong_dtype(state):
    tables(state)["visits"] = tables(state)["visits"].float()


def negative_lr(state):
    state["param_groups"][0]["lr"] = -1.0


def group_without_momentum(state):
    del state["param_groups"][1]["momentum"]


def one_parameter_less(state):
    state["param_groups"][1]["params"].pop()


def one_group_less(state):
    state["param_groups"].pop()


@pytest.mark.parametrize(
    "change",
    [
        without_sampler,
        without("state"),
        sampler(phase="dreaming"),
        sampler(seed=-1),
        sampler(constants={}),
        sampler(extra=1),
        momentum_of_wrong_shape,
        table_of_wrong_size,
        table_of_wrong_dtype,
        negative_lr,
        group_without_momentum,
        one_parameter_less,
        one_group_less,
    ],
)
def test_a_damaged_state_is_refused_and_nothing_changes(backend, change):
    saved = copy.deepcopy(run(two_groups(SHAPES, backend=backend), 5).state_dict())
    change(saved)
    optimizer = run(two_groups(SHAPES, backend=backend), 3)
    before, groups = snapshot(optimizer), copy.deepcopy([g["lr"] for g in optimizer.param_groups])
    with pytest.raises(ValueError, match=r"state_dict|lr must not be negative"):
        optimizer.load_state_dict(saved)
    assert differing(before, snapshot(optimizer)) == []
    assert [g["lr"] for g in optimizer.param_groups] == groups and optimizer.phase == "explore"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_data", 11),
        ("temperature", 2.0),
        ("integrator", "euler"),
        ("chains", 4),
        ("tempering", None),
        ("tempering", Tempering(bins=30)),
        ("tempering", Tempering(coupling="exact")),
        ("tempering", Tempering(bias=Metadynamics())),
        ("tempering", Tempering(bias=AdaptiveForce(residual=None))),
    ],
)
def test_other_settings_are_refused_by_name(setting, value):
    saved = run(two_groups(SHAPES), 5).state_dict()
    optimizer = two_groups(SHAPES, **{setting: value})
    with pytest.raises(ValueError, match=setting):
        optimizer.load_state_dict(saved)


def test_a_state_of_sgd_is_refused():
    sgd = torch.optim.SGD(make_parameters(SHAPES), lr=0.1)
    optimizer = CTLD(make_parameters(SHAPES), num_data=10)
    with pytest.raises(ValueError, match=r"CTLD\.state_dict"):
        optimizer.load_state_dict(sgd.state_dict())
