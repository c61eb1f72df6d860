"""Scaled gradients, as of torch.amp.GradScaler: unscaled in the step; and a step in vain changes nothing."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from common import bits, differing, make_parameters, noisy_quadratic, run, snapshot

from ctld_cuda import CTLD, Tempering
from ctld_cuda.reference import momentum_unit

SIZES = [(4, 3), (37,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make(backend, dtype=torch.float32, phase="explore", **options):
    parameters = make_parameters(SIZES, dtype=dtype)
    groups = [
        {"params": parameters[:1], "weight_decay": 0.01},
        {"params": parameters[1:], "lr": 0.02, "momentum": 0.5},
    ]
    options = {"tempering": Tempering(step_size=0.1), "num_data": 10, "lr": 0.05} | options
    if phase == "finetune":
        options["explore_steps"] = 1
    return CTLD(groups, backend=backend, **options)


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def step_scaled(optimizer, step, scale, found_inf=None, spoil=None):
    """One step on the noisy quadratic, handed over as GradScaler does."""
    loss = noisy_quadratic(parameters_of(optimizer), step)
    for p in parameters_of(optimizer):
        p.grad *= scale
    if spoil is not None:
        spoil(optimizer)
    optimizer.grad_scale = torch.tensor(scale)
    optimizer.found_inf = None if found_inf is None else torch.tensor(found_inf)
    returned = optimizer.step(loss=loss)
    del optimizer.grad_scale, optimizer.found_inf
    assert returned is loss


# ---------------------------------------------------------------------------------------- unscaling


@pytest.mark.parametrize(
    ("dtype", "scale"), list(zip(DTYPES, [2.0**16, 2.0**-3, 2.0**8, 2.0**16], strict=True))
)
@pytest.mark.parametrize("phase", ["explore", "finetune"])
def test_a_power_of_two_leaves_no_trace(processor, dtype, scale, phase):
    expected = snapshot(run(make("reference", dtype, phase), 2))
    scaled = make(processor, dtype, phase)
    for step in range(2):
        step_scaled(scaled, step, scale, found_inf=0.0)
    assert differing(expected, snapshot(scaled)) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("phase", ["explore", "finetune"])
def test_any_other_scale_is_that_of_the_specification(processor, dtype, phase):
    expected, actual = make("reference", dtype, phase), make(processor, dtype, phase)
    for optimizer, step in itertools.product((expected, actual), range(2)):
        step_scaled(optimizer, step, 1000.0)
    assert differing(snapshot(expected), snapshot(actual)) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_inverse_is_rounded_once_and_multiplies_in_the_precision_of_the_update(processor, dtype):
    """The first momenta without noise and friction are -unit times the unscaled gradients."""
    (p,) = make_parameters([(500,)], dtype=dtype)
    p.grad = make_parameters([(500,)], seed=1, dtype=dtype)[0].detach()
    lr, num_data, scale = 0.05, 10, 1000.0
    optimizer = CTLD([p], lr, 0.0, num_data, temperature=0, tempering=None, backend=processor)
    optimizer.grad_scale = torch.tensor(scale)
    optimizer.step()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inverse, unit = (torch.tensor(x, dtype=wide) for x in (1.0 / scale, momentum_unit(lr, 0.0, num_data)))
    momentum = optimizer.state[p]["momentum_buffer"]
    assert momentum.dtype == wide
    assert torch.equal(bits(momentum), bits(-(unit * (p.grad.to(wide) * inverse))))


# ----------------------------------------------------------------------------------- steps in vain


def spoil_gradients(optimizer):
    parameters_of(optimizer)[0].grad.fill_(math.inf)
    parameters_of(optimizer)[1].grad[5] = math.nan


@pytest.mark.parametrize(
    ("found_inf", "dtype", "momentum_dtype"),
    [(1.0, torch.float32, None), (2.0, torch.bfloat16, torch.bfloat16)],
)
@pytest.mark.parametrize("phase", ["explore", "finetune"])
def test_found_inf_changes_nothing(processor, found_inf, dtype, momentum_dtype, phase):
    """2 is a sum over two devices."""
    options = {"dtype": dtype, "phase": phase, "momentum_dtype": momentum_dtype}
    expected, actual = (run(make(backend, **options), 2) for backend in ("reference", processor))
    before = snapshot(actual)
    step_scaled(actual, 99, 256.0, found_inf, spoil_gradients)
    assert differing(before, snapshot(actual)) == []
    assert actual.phase == phase
    run(expected, 1, first=2)
    run(actual, 1, first=2)
    assert differing(snapshot(expected), snapshot(actual)) == []
    assert int(actual.tempering_state()["flags"]) == 0


@pytest.mark.parametrize("explore_steps", [None, 0])
def test_the_very_first_step_may_be_in_vain(processor, explore_steps):
    def fresh(backend):
        options = {"tempering": Tempering(step_size=0.1), "num_data": 10, "weight_decay": 0.01}
        return CTLD(make_parameters(SIZES), explore_steps=explore_steps, backend=backend, **options)

    expected, actual = fresh("reference"), fresh(processor)
    step_scaled(actual, 99, 256.0, 1.0, spoil_gradients)
    for p, q in zip(parameters_of(actual), make_parameters(SIZES), strict=True):
        assert torch.equal(p, q)
    assert differing(snapshot(run(expected, 2)), snapshot(run(actual, 2))) == []


def test_exploring_ends_at_the_same_call_in_all_backends(processor):
    expected, actual = (make(backend, explore_steps=2) for backend in ("reference", processor))
    for optimizer in (expected, actual):
        for step in range(3):
            step_scaled(optimizer, step, 256.0, found_inf=float(step == 1))
        assert optimizer.phase == "finetune"
    assert differing(snapshot(expected), snapshot(actual)) == []


def test_chains_in_vain(processor):
    def chains(backend):
        parameters = make_parameters([(8, 3)])
        return CTLD(parameters, chains=8, num_data=10, tempering=Tempering(step_size=0.1), backend=backend)

    expected, actual = run(chains("reference"), 2), run(chains(processor), 2)
    before = snapshot(actual)
    actual.found_inf = torch.tensor(1.0)
    actual.step(loss=torch.full((8,), math.nan))
    del actual.found_inf
    assert differing(before, snapshot(actual)) == []
    assert differing(snapshot(run(expected, 2, first=2)), snapshot(run(actual, 2, first=2))) == []


# -------------------------------------------------------------------------------- with GradScaler


def small_model(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    layers = torch.nn.Linear(5, 7, bias=False), torch.nn.Tanh(), torch.nn.Linear(7, 1, bias=False)
    model = torch.nn.Sequential(*layers)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model.to(dtype)


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 5, generator=generator).to(dtype), torch.randn(8, 1, generator=generator)


def mean_square(model, step):
    x, y = batch(step, next(model.parameters()).dtype)
    return (model(x).float() - y).square().mean()


CLIPPED = 0.2  # below the norm of most gradients here


def train(backend, steps, scaler=None, clip=False, bad_step=None, dtype=torch.float32, finetune_at=4):
    """Trains with or without a scaler, and returns the optimizer and the scales that were used."""
    model = small_model(dtype)
    optimizer = CTLD(
        model.parameters(), 0.05, num_data=8, tempering=Tempering(step_size=0.1), backend=backend
    )
    scales = []
    for step in range(steps):
        if step == finetune_at:
            optimizer.finetune()
        optimizer.zero_grad()
        loss = mean_square(model, step)
        if scaler is None:
            if step == bad_step:
                continue
            loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPED)
            optimizer.step(loss=loss.detach())
            continue
        scaler.scale(loss).backward()
        if step == bad_step:
            model[0].weight.grad[3, 2] = math.inf
        if clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPED)
        scales.append(scaler.get_scale())
        scaler.step(optimizer, loss=loss.detach())
        scaler.update()
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
    return optimizer, scales


@pytest.mark.parametrize(("clip", "bad_step"), [(False, None), (False, 2), (True, 0), (True, 5)])
def test_training_with_a_scaler_is_training_without(processor, clip, bad_step):
    """Its scales are powers of two."""
    expected, _ = train("reference", 7, None, clip, bad_step)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    actual, scales = train(processor, 7, scaler, clip, bad_step)
    assert differing(snapshot(expected), snapshot(actual)) == []
    assert max(scales) > 2.0**10
    for step, (scale, following) in enumerate(itertools.pairwise(scales)):
        assert (following < scale) == (step == bad_step)


def test_a_scaler_that_is_switched_off(processor):
    expected, _ = train("reference", 2)
    actual, _ = train(processor, 2, torch.amp.GradScaler("cpu", enabled=False))
    assert differing(snapshot(expected), snapshot(actual)) == []


def test_float16_parameters(processor):
    """The first scales are too large for the gradients; later ones are not powers of two."""

    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=1e6, backoff_factor=0.3, growth_interval=100)

    expected, scales = train("reference", 12, scaler(), dtype=torch.float16, finetune_at=9)
    actual, same_scales = train(processor, 12, scaler(), dtype=torch.float16, finetune_at=9)
    assert differing(snapshot(expected), snapshot(actual)) == []
    assert scales == same_scales
    steps_done = int(actual._sampler.step)
    assert 3 <= steps_done < 12 and scales[-1] == scales[-3] < scales[0]
    assert len(set(scales)) == 12 - steps_done + 1
    assert int(actual.tempering_state()["flags"]) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_still_unscale(processor, copied):
    original = run(make(processor), 1)
    other = copied(original)
    assert other._step_supports_amp_scaling
    for optimizer in (original, other):
        step_scaled(optimizer, 1, 1000.0, found_inf=0.0)
        step_scaled(optimizer, 2, 1000.0, found_inf=1.0)
    assert differing(snapshot(original), snapshot(other)) == []
    assert int(other._sampler.step) == 2


def test_without_gradients_the_scaler_says_the_number_zero(processor):
    """It sums found_inf over devices that have gradients: over none, the sum is an int."""
    expected, actual = run(make("reference"), 1), run(make(processor), 1)
    actual.found_inf, actual.grad_scale = 0, torch.tensor(1.0)
    for optimizer in (expected, actual):
        for p in parameters_of(optimizer):
            p.grad = None
        optimizer.step(loss=1.0)
    assert differing(snapshot(expected), snapshot(actual)) == []
