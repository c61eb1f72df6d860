"""Bad input is a clear error before anything is changed; non-finite values are flagged, not absorbed."""

import math
import warnings

import pytest
import torch
from common import differing, make_parameters, run, snapshot, two_groups

from ctld_cuda import CTLD, AdaptiveForce, Metadynamics, Tempering

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -0.1}, ValueError, "lr"),
        ({"lr": NAN}, ValueError, "lr"),
        ({"lr": "fast"}, TypeError, "lr"),
        ({"lr": torch.tensor([0.1, 0.2])}, ValueError, "lr"),
        ({"momentum": 1.0}, ValueError, "momentum"),
        ({"momentum": -0.1}, ValueError, "momentum"),
        ({"momentum": INF}, ValueError, "momentum"),
        ({"weight_decay": -1e-4}, ValueError, "weight_decay"),
        ({"weight_decay": NAN}, ValueError, "weight_decay"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"temperature": INF}, ValueError, "temperature"),
        ({"temperature": 0.0}, ValueError, "tempering=None"),
        ({"num_data": None}, ValueError, "num_data is required"),
        ({"num_data": 0}, ValueError, "num_data"),
        ({"num_data": 0.5}, ValueError, "num_data"),
        ({"num_data": NAN}, ValueError, "num_data"),
        ({"integrator": "leapfrog"}, ValueError, "integrator"),
        ({"tempering": "exact"}, TypeError, "tempering"),
        ({"explore_steps": -1}, ValueError, "explore_steps"),
        ({"explore_steps": 1.5}, TypeError, "explore_steps"),
        ({"chains": 0}, ValueError, "chains"),
        ({"chains": 5}, ValueError, "chains"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"backend": "tpu"}, ValueError, "unknown backend"),
    ],
)
def test_constructor(options, error, message):
    with pytest.raises(error, match=message):
        CTLD(make_parameters([(4, 2)]), **({"num_data": 10} | options))


@pytest.mark.parametrize(
    "options",
    [
        {"max_temperature": 1.0},
        {"max_temperature": NAN},
        {"flat": 0.0},
        {"flat": 2.0},
        {"limit": INF},
        {"bins": 3},
        {"bins": 10.0},
        {"step_size": 0.0},
        {"persistence": 1.0},
        {"persistence": -0.1},
        {"coupling": "loose"},
        {"bias": None},
        {"settle": -1},
        {"coupling_strength": 0.0},
        {"energy_noise": -1.0, "coupling": "exact"},
        {"energy_noise": 1.0, "coupling": "standardized"},
    ],
)
def test_tempering(options):
    with pytest.raises(ValueError):
        Tempering(**options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Metadynamics(height=0.0),
        lambda: Metadynamics(gain=0.5),
        lambda: Metadynamics(height=NAN),
        lambda: AdaptiveForce(residual=0.02),
    ],
)
def test_biases(make):
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        ([torch.zeros(3, dtype=torch.complex64)], TypeError),
        ([torch.zeros(3, dtype=torch.int64)], TypeError),
        ([torch.zeros(3).to_sparse()], TypeError),
        ([torch.zeros(1).expand(3)], ValueError),
        ([torch.zeros(3), torch.zeros(3, device="meta")], ValueError),
        ([], ValueError),
        (["weight"], TypeError),
        ([torch.zeros(2, requires_grad=True) * 2], ValueError),
    ],
)
def test_parameters(parameters, error):
    with pytest.raises(error):
        CTLD(parameters, num_data=10)


def test_one_parameter_twice():
    (p,) = make_parameters([(3,)])
    with pytest.raises(ValueError, match="twice"):
        CTLD([p, p], num_data=10)


def test_too_many_elements_for_the_noise():
    with pytest.raises(ValueError, match=r"2\*\*34"):
        CTLD([torch.empty(2**34 + 1, device="meta")], num_data=10)


def test_a_bad_group_is_not_added(backend):
    optimizer = run(two_groups([(5,), (6,)], backend=backend), 3)
    before = snapshot(optimizer)
    (q,) = make_parameters([(4,)])
    for group in ({"lr": -1.0}, {"maximize": True}, {"momentum": 2.0}):
        with pytest.raises(ValueError):
            optimizer.add_param_group({"params": [q], **group})
    with pytest.raises(TypeError):
        optimizer.add_param_group({"params": [q.long()]})
    assert len(optimizer.param_groups) == 2
    assert differing(before, snapshot(optimizer)) == []


# ------------------------------------------------------------------------------------- in step()


def prepared(backend, **options):
    return run(two_groups([(4, 2), (4, 3)], backend=backend, **options), 3)


def replace_gradient(make_gradient):
    def spoil(optimizer):
        p = optimizer.param_groups[1]["params"][0]
        p.grad = None
        if hasattr(torch.Tensor, "grad_dtype"):
            p.grad_dtype = None
        p.grad = make_gradient(p)
        return 1.0

    return spoil


def set_option(name, value):
    def spoil(optimizer):
        optimizer.param_groups[1][name] = value
        return 1.0

    return spoil


def convert(optimizer):
    p = optimizer.param_groups[1]["params"][0]
    p.grad = None
    p.data = p.data.double()
    return 1.0


def shrink(optimizer):
    p = optimizer.param_groups[1]["params"][0]
    p.grad = None
    p.data = p.data[:2]
    return 1.0


SPOILED = {
    "no loss": (lambda optimizer: None, ValueError, "needs the mean minibatch loss"),
    "loss of three elements": (lambda optimizer: torch.ones(3), ValueError, "scalar"),
    "complex loss": (lambda optimizer: torch.tensor(1j), TypeError, "real"),
    "text as loss": (lambda optimizer: "low", TypeError, "number"),
    "sparse gradient": (replace_gradient(lambda p: p.detach().to_sparse()), RuntimeError, "sparse"),
    "gradient of another dtype": (replace_gradient(lambda p: p.detach().double()), TypeError, "gradient"),
    "negative lr": (set_option("lr", -0.1), ValueError, "lr"),
    "lr not finite": (set_option("lr", torch.tensor(NAN)), ValueError, "lr"),
    "momentum of one": (set_option("momentum", 1.0), ValueError, "momentum"),
    "shrunk parameter": (shrink, RuntimeError, "after the optimizer was made"),
    "converted parameter": (convert, RuntimeError, "after the optimizer was made"),
}


@pytest.mark.parametrize("trouble", SPOILED)
def test_step_refuses_before_anything_changes(backend, trouble):
    spoil, error, message = SPOILED[trouble]
    optimizer = prepared(backend)
    loss = spoil(optimizer)
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step(loss=loss)
    assert differing(before, snapshot(optimizer)) == []


@pytest.mark.parametrize("loss", [1.0, torch.ones(3), torch.ones(4, 1)])
def test_chains_want_one_loss_each(backend, loss):
    optimizer = prepared(backend, chains=4)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="shape"):
        optimizer.step(loss=loss)
    assert differing(before, snapshot(optimizer)) == []


def test_closure_and_loss_together(backend):
    with pytest.raises(ValueError, match="not both"):
        prepared(backend).step(lambda: 1.0, loss=1.0)


# ------------------------------------------------------------------------------ non-finite values


def quiet_state_dict(optimizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return optimizer.state_dict()


@pytest.mark.parametrize("loss", [NAN, INF, -INF, torch.tensor(NAN)])
@pytest.mark.parametrize("coupling", ["exact", "standardized"])
def test_a_nonfinite_loss_leaves_alpha_and_bias_alone(backend, loss, coupling):
    optimizer = prepared(backend, tempering=Tempering(coupling=coupling, step_size=0.1))
    quiet_state_dict(optimizer)
    spared = ("alpha", "alpha_momentum", "visits", "energy_mean", "energy_spread", "hills", "alpha_kinetic")
    before = snapshot(optimizer)
    optimizer.step(loss=loss)
    after = snapshot(optimizer)
    assert not set(spared) & set(differing(before, after))
    assert "step" in differing(before, after)
    assert int(optimizer.tempering_state()["flags"]) == 1
    with pytest.warns(RuntimeWarning, match="loss was not finite"):
        optimizer.state_dict()
    quiet_state_dict(optimizer)  # said once
    run(optimizer, 5)
    assert all(torch.isfinite(t).all() for t in optimizer._sampler.tensors().values())


def test_only_the_chain_concerned_is_left_out(backend):
    optimizer = prepared(backend, chains=4, tempering=Tempering(step_size=0.1))
    before = optimizer.tempering_state()["alpha"].clone()
    visits = int(optimizer.tempering_state()["visits"].sum())
    optimizer.step(loss=torch.tensor([1.0, NAN, 1.0, 1.0]))
    moved = optimizer.tempering_state()["alpha"] != before
    assert moved.tolist() == [True, False, True, True]
    assert int(optimizer.tempering_state()["visits"].sum()) == visits + 3


@pytest.mark.parametrize("loss", [1e30, -1e30])
def test_an_energy_too_large_to_sum_is_left_out(backend, loss):
    optimizer = prepared(backend, tempering=Tempering(coupling="exact"))
    before = snapshot(optimizer)
    optimizer.step(loss=loss)
    assert not {"alpha", "energy_mean", "hills"} & set(differing(before, snapshot(optimizer)))
    with pytest.warns(RuntimeWarning, match="too large to steer"):
        optimizer.state_dict()


@pytest.mark.parametrize("phase", ["explore", "finetune"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_nonfinite_gradient_is_flagged(backend, value, phase):
    optimizer = prepared(backend)
    if phase == "finetune":
        optimizer.finetune()
    for group in optimizer.param_groups:
        group["params"][0].grad.zero_()
    optimizer.param_groups[0]["params"][0].grad.view(-1)[3] = value
    optimizer.step(loss=1.0)
    assert int(optimizer.tempering_state()["flags"]) == 2
    with pytest.warns(RuntimeWarning, match="gradient, momentum or parameter was not finite"):
        optimizer.state_dict()
    # the poisoned parameters make the next losses NaN, and alpha stays out of it
    optimizer.step(loss=NAN)
    assert torch.isfinite(optimizer.tempering_state()["alpha"]).all()
    assert torch.isfinite(optimizer._sampler.energy_mean).all()


def test_large_but_finite_momenta_are_told_from_nonfinite_ones(backend):
    optimizer = prepared(backend)
    optimizer.param_groups[1]["params"][0].grad.fill_(1e12)
    optimizer.step(loss=1.0)
    with pytest.warns(RuntimeWarning, match="too large for the kinetic-energy sum"):
        optimizer.state_dict()
