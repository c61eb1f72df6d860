"""Thermostats: the same bits from every backend, what the options mean, and saving."""

import copy
import pickle

import pytest
import simulated
import torch
from common import differing, make_parameters, noisy_quadratic, run, snapshot, two_groups

from ctld_cuda import CTLD, Tempering
from ctld_cuda.state import FRICTION_SATURATED

SHAPES = [(5,), (1023,), (1,), (700,)]
MOVING = {
    "constant": None,
    "exact": Tempering(coupling="exact", step_size=0.1),
    "standardized": Tempering(step_size=0.1),
}


def stepped(backend, steps=20, chains=None, shapes=SHAPES, **options):
    shapes = [(chains, *shape) for shape in shapes] if chains else shapes
    return run(two_groups(shapes, backend=backend, chains=chains, thermostat=True, **options), steps)


@pytest.mark.parametrize("tempering", MOVING)
@pytest.mark.parametrize("integrator", ["baoab", "euler"])
@pytest.mark.parametrize("chains", [None, 5])
def test_compiled_backends_give_the_bits_of_the_reference(compiled_backend, chains, integrator, tempering):
    options = {"chains": chains, "integrator": integrator, "tempering": MOVING[tempering]}
    expected = stepped("reference", **options)
    assert differing(snapshot(expected), snapshot(stepped(compiled_backend, **options))) == []
    assert expected._sampler.friction.count_nonzero() == 2 * (chains or 1)


@pytest.mark.parametrize("tempering", MOVING)
@pytest.mark.parametrize(
    ("integrator", "chains"), [("baoab", None), ("euler", None), ("baoab", 3), ("baoab", 40)]
)
def test_simulated_gpu_gives_the_bits_of_the_reference(monkeypatch, chains, integrator, tempering):
    options = {"chains": chains, "integrator": integrator, "tempering": MOVING[tempering], "steps": 4}
    expected = snapshot(stepped("reference", **options))
    simulated.install(monkeypatch)
    assert differing(expected, snapshot(stepped("cpu", **options))) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_formats(monkeypatch, compiled, dtype):
    expected = snapshot(stepped("reference", dtype=dtype, steps=6))
    assert differing(expected, snapshot(stepped(compiled, dtype=dtype, steps=6))) == []
    simulated.install(monkeypatch)
    assert differing(expected, snapshot(stepped("cpu", dtype=dtype, steps=6))) == []


def test_without_noise_in_the_gradient_nothing_but_the_friction_changes_the_first_step(backend):
    """The friction starts at 0, so that the first step is that of plain Langevin dynamics."""
    plain = snapshot(run(two_groups(SHAPES, backend=backend), 1))
    with_thermostat = snapshot(stepped(backend, steps=1))
    changed = differing(plain, with_thermostat | {"friction": plain["friction"], "kinetic": plain["kinetic"]})
    assert changed == []
    assert with_thermostat["kinetic"].shape == (1, 2) and with_thermostat["kinetic"].sum() == plain["kinetic"]


def test_state_is_reported(backend):
    for chains, shape in ((None, (2,)), (5, (5, 2))):
        state = stepped(backend, chains=chains).tempering_state()
        assert state["friction"].shape == shape
        assert state["kinetic_temperature"].shape == shape[:-1]
    assert run(two_groups(SHAPES, backend=backend), 1).tempering_state()["friction"].shape == (0,)


def test_a_group_added_later_gets_a_thermostat(backend):
    optimizer = stepped(backend, steps=3)
    before = optimizer.tempering_state()["friction"].clone()
    (p,) = make_parameters([(6,)], seed=5)
    optimizer.add_param_group({"params": [p], "lr": 0.01})
    assert torch.equal(optimizer.tempering_state()["friction"][:2], before)
    run(optimizer, 3, first=3)
    friction = optimizer.tempering_state()["friction"]
    assert friction.shape == (3,) and friction[2] != 0


def resumed(optimizer):
    fresh = two_groups(SHAPES, backend=optimizer._backend_name, thermostat=True)
    for new, old in zip(fresh.param_groups, optimizer.param_groups, strict=True):
        for p, q in zip(new["params"], old["params"], strict=True):
            p.data.copy_(q.data)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return fresh


@pytest.mark.parametrize("way", [resumed, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_friction_survives_saving(backend, way):
    optimizer = stepped(backend, steps=5)
    restored = way(optimizer)
    run(restored, 5, first=5)
    run(optimizer, 5, first=5)
    assert differing(snapshot(optimizer), snapshot(restored)) == []


def test_a_state_without_thermostats_does_not_fit(backend):
    saved = run(two_groups(SHAPES, backend=backend), 1).state_dict()
    with pytest.raises(ValueError, match="thermostat was False, is True"):
        two_groups(SHAPES, backend=backend, thermostat=True).load_state_dict(saved)


def test_finetuning_leaves_the_friction_alone(backend):
    optimizer = stepped(backend, steps=3)
    twin = run(two_groups(SHAPES, backend=backend), 0)
    optimizer.finetune()
    before = optimizer.tempering_state()["friction"].clone()
    run(optimizer, 2, first=3)
    assert torch.equal(optimizer.tempering_state()["friction"], before)
    assert twin.phase != optimizer.phase


def test_bad_input(backend):
    parameters = make_parameters([(3,)])
    with pytest.raises(TypeError, match="thermostat must be True or False"):
        CTLD(parameters, num_data=10, backend=backend, thermostat=1)
    with pytest.raises(ValueError, match="thermostat=True needs momentum > 0"):
        CTLD(parameters, num_data=10, backend=backend, thermostat=True, momentum=0.0)
    optimizer = CTLD(parameters, num_data=10, backend=backend, thermostat=True, tempering=None)
    parameters[0].grad = torch.ones(3)
    optimizer.param_groups[0]["momentum"] = 0.0
    before = parameters[0].detach().clone()
    with pytest.raises(ValueError, match="thermostat=True needs momentum > 0"):
        optimizer.step()
    assert torch.equal(parameters[0], before)


def test_more_noise_than_friction_can_absorb_is_reported(backend):
    (p,) = make_parameters([(200,)])
    optimizer = CTLD([p], lr=0.1, num_data=10, tempering=None, thermostat=True, backend=backend)
    for step in range(330):
        noisy_quadratic([p], step)
        p.grad += 30.0 * torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    state = optimizer.tempering_state()
    assert state["friction"] == 4.0 and state["flags"] & FRICTION_SATURATED
    with pytest.warns(RuntimeWarning, match="more than the thermostat's friction can absorb"):
        optimizer.state_dict()
