"""The history on the device: what it says of every step, in every phase, with the same bits everywhere."""

import copy
import math
import pickle

import pytest
import simulated
import torch
from common import bits, differing, make_parameters, noisy_quadratic, run, snapshot, two_groups

from ctld_cuda import CTLD, AdaptiveForce, Tempering

SHAPES = [(5,), (600,), (1,)]
MOVING = Tempering(step_size=0.1)
CASES = {
    "standardized": {"tempering": MOVING},
    "exact": {"tempering": Tempering(coupling="exact", step_size=0.1), "integrator": "euler"},
    "constant temperature": {"tempering": None},
    "thermostats": {"tempering": MOVING, "thermostat": True},
    "fine-tuning": {"tempering": MOVING, "explore_steps": 3},
    "no noise at all": {"tempering": None, "temperature": 0.0},
    "maximize": {"tempering": MOVING, "maximize": True},
    "bfloat16": {"tempering": MOVING, "dtype": torch.bfloat16, "momentum_dtype": torch.bfloat16},
    "float64": {"tempering": MOVING, "dtype": torch.float64, "explore_steps": 5},
}
COLUMNS = ("alpha", "temperature", "energy", "kinetic_temperature")


def make(backend, chains=None, history=4, shapes=SHAPES, **options):
    shapes = [(chains, *shape) for shape in shapes] if chains else shapes
    return two_groups(shapes, backend=backend, chains=chains, history=history, **options)


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def watched(optimizer, steps):
    """What the history must say of every step, from what can be seen around it; energies by hand."""
    seen = {name: [] for name in COLUMNS}
    c, chains = optimizer._constants, optimizer.chains or 1
    for step in range(steps):
        loss = noisy_quadratic(parameters_of(optimizer), step, optimizer.chains)
        squares = sum(
            group["weight_decay"]
            * sum(p.detach().double().square().view(chains, -1).sum(1) for p in group["params"])
            for group in optimizer.param_groups
        )
        before = {"loss": loss.double().view(-1), "prior": 0.5 * optimizer.num_data * squares}
        optimizer.step(loss=loss)
        sampling, sign = optimizer.phase == "explore", -1 if c.energy_scale < 0 else 1
        energy = sign * optimizer.num_data * before["loss"]
        if sampling and optimizer.tempering is not None:
            energy = energy + before["prior"]
        seen["energy"].append(energy / (optimizer.temperature or 1.0))
        live = optimizer.tempering_state()
        seen["alpha"].append(live["alpha"].clone().view(-1))
        seen["temperature"].append(live["temperature"].clone().view(-1))
        kinetic = live["kinetic_temperature"].clone().view(-1)
        seen["kinetic_temperature"].append(kinetic if sampling else torch.full_like(kinetic, math.nan))
    return {name: torch.stack(values) for name, values in seen.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chains", [None, 3])
def test_it_says_what_happened(backend, case, chains):
    optimizer = make(backend, chains, **CASES[case])
    seen = watched(optimizer, 7)
    history = optimizer.history()
    assert history["step"].tolist() == [3, 4, 5, 6]
    for name in COLUMNS:
        found = history[name]
        assert found.device.type == "cpu" and found.shape == ((4, chains) if chains else (4,))
        expected = seen[name][3:].reshape(found.shape)
        if name == "energy":  # the prior part is summed in quanta
            assert torch.allclose(found, expected, rtol=1e-9, atol=2e-3)
        else:
            assert torch.equal(bits(found), bits(expected)), name
    if CASES[case]["tempering"] is not None and "explore_steps" not in CASES[case]:
        assert len(history["alpha"].unique()) >= 4


# fine-tuning and bfloat16 have no kernel of their own for many chains
MANY = ["standardized", "exact", "constant temperature", "float64"]


@pytest.mark.parametrize(
    ("case", "chains"), [(case, c) for case in CASES for c in (None, 3)] + [(case, 24) for case in MANY]
)
def test_the_same_bits_everywhere(monkeypatch, compiled, case, chains):
    """24 chains are owned by the simulated GPU's blocks, 3 are cut into chunks."""
    shapes = [(5,), (17,)] if chains else SHAPES[:2]

    def stepped(backend):
        return snapshot(run(make(backend, chains, history=2, shapes=shapes, **CASES[case]), 5))

    expected = stepped("reference")
    assert int(expected["recorded"]) == 3 and expected["history"].shape == (2, chains or 1, 4)
    assert differing(expected, stepped(compiled)) == []
    simulated.install(monkeypatch)
    assert differing(expected, stepped("cpu")) == []


def test_it_changes_nothing_else(processor):
    with_history = snapshot(run(make(processor, tempering=MOVING), 6))
    without = snapshot(run(make(processor, history=None, tempering=MOVING), 6))
    assert int(without["recorded"]) == 0
    assert set(differing(with_history, without)) == {"history", "recorded"}


def test_the_prior_energy_is_that_of_the_parameters_before_the_step(processor):
    """Known exactly: parameters at 2, weight decay 0.5, N = 10, no gradient of the loss."""
    p = torch.nn.Parameter(torch.full((16,), 2.0))
    optimizer = CTLD([p], num_data=10, weight_decay=0.5, temperature=2.0, history=3, backend=processor)
    p.grad = torch.zeros_like(p)
    optimizer.step(loss=3.0)
    assert optimizer.history()["energy"].tolist() == [(10 * 3.0 + 0.5 * 10 * 0.5 * 16 * 4.0) / 2.0]


@pytest.mark.parametrize("tempering", [None, MOVING])
def test_steps_without_a_loss_have_no_energy(processor, tempering):
    optimizer = make(processor, tempering=tempering)
    noisy_quadratic(parameters_of(optimizer), 0)
    if tempering is None:
        optimizer.step()
    optimizer.finetune()
    optimizer.step()
    optimizer.step(loss=torch.tensor(2.0, dtype=torch.bfloat16))
    energy = optimizer.history()["energy"]
    assert energy[:-1].isnan().all() and energy[-1] == 20.0


def test_a_loss_that_cannot_be_recorded_is_refused(backend):
    optimizer = make(backend, tempering=None)
    noisy_quadratic(parameters_of(optimizer), 0)
    before = snapshot(optimizer) if optimizer._slots else None
    with pytest.raises(ValueError, match="scalar"):
        optimizer.step(loss=torch.ones(3))
    assert before is None and optimizer.history()["step"].numel() == 0


def test_it_grows_until_it_is_full(processor):
    optimizer = make(processor, history=3, tempering=MOVING)
    alphas = []
    assert {name: tuple(x.shape) for name, x in optimizer.history().items()} == dict.fromkeys(
        ("step", *COLUMNS), (0,)
    )
    for n in range(1, 8):
        run(optimizer, 1, first=n)
        alphas.append(float(optimizer.tempering_state()["alpha"]))
        history = optimizer.history()
        assert history["step"].tolist() == list(range(max(0, n - 3), n))
        assert history["alpha"].tolist() == alphas[-3:]


def test_a_history_of_one_step(processor):
    optimizer = run(make(processor, history=1, tempering=MOVING), 3)
    assert optimizer.history()["step"].tolist() == [2]
    assert optimizer.history()["alpha"].item() == optimizer.tempering_state()["alpha"]


@pytest.mark.parametrize("phase", ["explore", "finetune"])
def test_steps_left_out_are_not_recorded(processor, phase):
    optimizer = run(make(processor, tempering=MOVING), 2)
    if phase == "finetune":
        optimizer.finetune()
        run(optimizer, 1)
    before = optimizer.history()
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(2.0)
    optimizer.step(loss=1.0)
    del optimizer.found_inf, optimizer.grad_scale
    if phase == "explore":
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step(loss=1.0)
    after = optimizer.history()
    assert all(torch.equal(bits(before[name]), bits(after[name])) for name in before)


def test_all_groups_thermostats_are_counted(processor):
    optimizer = run(make(processor, tempering=None, thermostat=True), 2)
    p = torch.cat([optimizer.state[p]["momentum_buffer"].view(-1) for p in parameters_of(optimizer)])
    found = optimizer.history()["kinetic_temperature"][-1]
    assert torch.allclose(found, p.double().square().mean(), rtol=1e-3)


def test_a_group_added_later_counts(processor):
    optimizer = run(make(processor, tempering=None), 1)
    optimizer.add_param_group({"params": make_parameters([(5000,)], seed=1)})
    run(optimizer, 1, first=1)
    history = optimizer.history()
    assert history["step"].tolist() == [0, 1]
    assert history["kinetic_temperature"][1] == optimizer.tempering_state()["kinetic_temperature"]


# -------------------------------------------------------------------------------- saving and copies


def names(state):
    return set(state["param_groups"][0]["sampler"]["tensors"])


def test_it_is_not_saved_and_states_of_other_lengths_load(processor):
    saved = copy.deepcopy(run(make(processor, history=7, tempering=MOVING), 3).state_dict())
    assert not {"history", "recorded"} & names(saved)
    reference = run(make(processor, history=None, tempering=MOVING), 3)
    assert set(saved["param_groups"][0]["sampler"]["tensors"]) == set(
        reference.state_dict()["param_groups"][0]["sampler"]["tensors"]
    )
    other = run(make(processor, history=2, tempering=MOVING), 5)
    address = other._sampler.history.data_ptr()
    other.load_state_dict(saved)
    assert other.history()["step"].numel() == 0
    run(other, 1, first=3)
    assert other.history()["step"].tolist() == [3]
    assert other._sampler.history.data_ptr() == address


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_begin_one_of_their_own(processor, copied):
    original = run(make(processor, tempering=MOVING), 2)
    other = copied(original)
    assert other.history()["step"].numel() == 0
    for optimizer in (original, other):
        run(optimizer, 2, first=2)
    assert other.history()["step"].tolist() == [2, 3]
    assert torch.equal(other.history()["energy"], original.history()["energy"][2:])
    assert torch.equal(other.history()["alpha"], original.history()["alpha"][2:])


def test_what_was_fetched_stays_as_it_is(backend):
    optimizer = run(make(backend, tempering=MOVING), 2)
    history = optimizer.history()
    before = {name: x.clone() for name, x in history.items()}
    run(optimizer, 4)
    assert all(torch.equal(before[name], history[name]) for name in before)


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_lengths_that_are_none(value, error):
    with pytest.raises(error, match="history"):
        CTLD(make_parameters([(3,)]), num_data=10, history=value)


def test_without_one_there_is_nothing_to_fetch():
    with pytest.raises(ValueError, match="history=K"):
        CTLD(make_parameters([(3,)]), num_data=10).history()


def test_unusable_energies_are_recorded_as_they_were(processor):
    tempering = Tempering(coupling="exact", bias=AdaptiveForce())
    optimizer = run(make(processor, tempering=tempering), 1)
    alpha = float(optimizer.tempering_state()["alpha"])
    optimizer.step(loss=math.inf)
    optimizer.step(loss=math.nan)
    history = optimizer.history()
    assert history["energy"][1] == math.inf and history["energy"][2].isnan()
    assert history["alpha"].tolist() == [alpha] * 3
