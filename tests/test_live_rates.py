"""Learning rates in tensors that only the device reads: the bits of the same numbers given as floats."""

import copy
import io
import math
import pickle
import warnings

import pytest
import simulated
import torch
from common import differing, make_parameters, noisy_quadratic, run, snapshot
from conftest import require
from torch._dynamo.testing import CompileCounterWithBackend

from ctld_cuda import CTLD, Tempering
from ctld_cuda.reference import momentum_unit
from ctld_cuda.state import INVALID_RATE

SIZES = [(37,), (4, 3)]
# one row per step, one column per group
RATES = [(0.05, 0.02), (0.08, 0.0), (0.0, 0.03), (0.031, 0.01), (0.0, 0.02), (0.02, 0.0), (0.01, 0.015)]
SWITCH = 4  # the noise is off from this step on
REMEMBERED = ("lr", "last_lr", "momentum_unit")


@pytest.fixture
def device(monkeypatch):
    """Backend "cpu" is the simulated GPU from here on: tensors of the CPU are on the device."""
    simulated.install(monkeypatch)
    return "cpu"


def live(x, dtype=torch.float64):
    return torch.tensor(x, dtype=dtype)


def make(backend, rates=(0.05, 0.05), shapes=SIZES, dtype=torch.float32, **options):
    """Two groups of one parameter, with a learning rate each."""
    first, second = make_parameters(shapes, dtype=dtype)
    groups = [
        {"params": [first], "lr": rates[0], "weight_decay": 0.01},
        {"params": [second], "lr": rates[1], "momentum": 0.5},
    ]
    options = {"tempering": Tempering(step_size=0.1), "num_data": 10} | options
    return CTLD(groups, backend=backend, **options)


def set_rates(optimizer, rates):
    """In place where they are tensors."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def follow(optimizer, schedule=RATES, first=0):
    for step, rates in enumerate(schedule[first:], first):
        if step == SWITCH:
            optimizer.finetune()
        set_rates(optimizer, rates)
        run(optimizer, 1, first=step)
    return optimizer


def assert_alike(expected, actual):
    assert differing(snapshot(expected), snapshot(actual)) == []


def addresses(optimizer):
    return [group[name].data_ptr() for group in optimizer.param_groups for name in REMEMBERED]


def remembered(optimizer):
    return [float(group[name] or 0.0) for group in optimizer.param_groups for name in REMEMBERED]


# ------------------------------------------------------------------------------ the bits of floats


@pytest.mark.parametrize(
    ("rate_dtype", "options"),
    [
        (torch.float64, {"integrator": "baoab"}),
        (torch.float32, {"integrator": "euler", "maximize": True}),
        (torch.float64, {"integrator": "baoab", "dtype": torch.float64, "maximize": True}),
        (torch.float64, {"integrator": "euler", "dtype": torch.bfloat16, "momentum_dtype": torch.bfloat16}),
        (torch.float64, {"chains": 8, "shapes": [(8, 3), (8,)]}),
    ],
)
def test_a_schedule(device, rate_dtype, options):
    schedule = torch.tensor(RATES, dtype=rate_dtype).tolist()
    expected = follow(make("reference", **options), schedule)
    rates = [live(0.05, rate_dtype) for _ in range(2)]
    actual = follow(make(device, rates, **options), schedule)
    assert_alike(expected, actual)
    assert remembered(expected) == remembered(actual)
    assert [group["lr"] for group in actual.param_groups] == rates


@pytest.mark.parametrize("rates", [(live(0.05), 0.05), (0.05, live(0.05))])
def test_a_live_group_and_one_that_is_not(device, rates):
    expected = follow(make("reference", explore_steps=SWITCH))
    assert_alike(expected, follow(make(device, copy.deepcopy(rates), explore_steps=SWITCH)))


def test_one_tensor_for_all_groups(device):
    rate = live(0.05)
    optimizer = make(device, (rate, rate))
    expected = run(make("reference"), 2)
    assert_alike(expected, run(optimizer, 2))
    rate.fill_(0.01)
    set_rates(expected, (0.01, 0.01))
    assert_alike(run(expected, 1, first=2), run(optimizer, 1, first=2))


def test_a_scheduler_writes_in_place(device):
    def scheduled(backend, rates):
        optimizer = make(backend, rates)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        for step in range(4):
            run(optimizer, 1, first=step)
            scheduler.step()
        return optimizer

    rates = live(0.05), live(0.03)
    actual = scheduled(device, rates)
    assert_alike(scheduled("reference", (0.05, 0.03)), actual)
    assert [group["lr"].data_ptr() for group in actual.param_groups] == [rate.data_ptr() for rate in rates]


@pytest.mark.parametrize("first", [0.0, 0.03])
def test_without_noise_from_the_start(device, first):
    """The momentum unit is that of the first rate, or of 1 if that is 0."""
    schedule = [(first, first), (0.02, 0.05)]
    options = {"temperature": 0, "tempering": None}
    expected = follow(make("reference", **options), schedule)
    actual = follow(make(device, (live(0.1), live(0.1)), **options), schedule)
    assert_alike(expected, actual)
    assert float(actual.param_groups[0]["momentum_unit"]) == momentum_unit(first or 1.0, 0.9, 10)


def test_the_unit_is_that_of_the_last_positive_rate_of_exploring(device):
    schedule = [(0.05, 0.02), (0.04, 0.0), (0.0, 0.01), (0.0, 0.0), (0.0, 0.0), (0.03, 0.02)]
    expected = follow(make("reference"), schedule)
    actual = follow(make(device, (live(0.1), live(0.1))), schedule)
    assert_alike(expected, actual)
    units = [float(group["momentum_unit"]) for group in actual.param_groups]
    assert units == [momentum_unit(0.04, 0.9, 10), momentum_unit(0.01, 0.5, 10)]


# ------------------------------------------------------------------------------ steps left out


@pytest.mark.parametrize("rates", [(live(0.05), live(0.05)), (live(0.05), 0.05)])
def test_all_rates_zero_change_nothing(device, rates):
    expected = run(make("reference"), 2)
    actual = run(make(device, copy.deepcopy(rates)), 2)
    before, notes = snapshot(actual), remembered(actual)[1::3]
    set_rates(actual, (0.0, 0.0))
    run(actual, 2, first=90)
    assert differing(before, snapshot(actual)) == [] and remembered(actual)[1::3] == notes
    set_rates(actual, (0.05, 0.05))
    assert_alike(run(expected, 1, first=2), run(actual, 1, first=2))


def quiet_state_dict(optimizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return optimizer.state_dict()


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize("phase", ["explore", "finetune"])
def test_a_step_with_an_invalid_rate_is_left_out(device, bad, phase):
    explore_steps = None if phase == "explore" else 1
    expected = run(make("reference", explore_steps=explore_steps), 2)
    actual = run(make(device, (live(0.05), live(0.05)), explore_steps=explore_steps), 2)
    quiet_state_dict(actual)
    before, notes = snapshot(actual), remembered(actual)[1:3]
    set_rates(actual, (0.05, bad))
    run(actual, 1, first=90)
    assert differing(before, snapshot(actual)) == ["flags"] and remembered(actual)[1:3] == notes
    assert int(actual.tempering_state()["flags"]) == INVALID_RATE
    with pytest.warns(RuntimeWarning, match="learning rate on the device was negative or not finite"):
        actual.state_dict()
    quiet_state_dict(actual)  # said once
    set_rates(actual, (0.05, 0.05))
    run(expected, 1, first=2)
    run(actual, 1, first=2)
    assert differing(snapshot(expected), snapshot(actual)) == ["flags"]


def test_an_invalid_rate_is_not_looked_at_in_a_step_with_infinite_gradients(device):
    actual = run(make(device, (live(0.05), live(0.05))), 1)
    before = snapshot(actual)
    set_rates(actual, (0.05, math.nan))
    actual.found_inf = torch.tensor(1.0)
    run(actual, 1, first=1)
    assert differing(before, snapshot(actual)) == []


@pytest.mark.parametrize(
    "rate",
    [live(0.05, torch.float16), live(0.05, torch.bfloat16), live(1, torch.int64), torch.full((2,), 0.05)],
)
def test_rates_of_another_type_or_shape_are_refused(device, rate):
    optimizer = run(make(device), 1)
    before = snapshot(optimizer)
    optimizer.param_groups[1]["lr"] = rate
    with pytest.raises(ValueError, match="lr as a tensor on the device must hold one float32 or float64"):
        run(optimizer, 1)
    assert differing(before, snapshot(optimizer)) == []


# ------------------------------------------------------------------------------ saving and copying


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def saved(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def resume(optimizer, state, other):
    """Loads a state and the parameters of the optimizer that it is from."""
    with torch.no_grad():
        for p, q in zip(parameters_of(optimizer), parameters_of(other), strict=True):
            p.copy_(q)
    optimizer.load_state_dict(state)
    return optimizer


@pytest.mark.parametrize(("steps", "used"), [(2, 0), (5, 0), (5, 1), (2, 5)])
def test_loading_keeps_the_tensors_and_resumes(device, steps, used):
    """A state after ``steps`` steps, into an optimizer that has made ``used``."""
    expected = follow(make("reference"))
    original = follow(make(device, (live(0.05), live(0.05))), RATES[:steps])
    other = follow(make(device, (live(0.1), live(0.1))), RATES[:used])
    before = addresses(other) if used else None
    resume(other, saved(original), original)
    assert remembered(other) == remembered(original)
    follow(other, first=steps)
    assert used == 0 or addresses(other) == before
    assert not set(addresses(other)) & set(addresses(original))
    assert_alike(expected, other)


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("rate_dtype", [torch.float64, torch.float32])
def test_a_state_with_floats_goes_on_live(device, steps, rate_dtype):
    schedule = torch.tensor(RATES, dtype=rate_dtype).tolist()
    expected = follow(make("reference"), schedule)
    original = follow(make("reference"), schedule[:steps])
    other = make(device, (live(0.1, rate_dtype), live(0.1, rate_dtype)))
    run(other, 1)
    before = addresses(other)
    resume(other, saved(original), original)
    assert remembered(other) == remembered(original)
    assert addresses(other) == before
    assert_alike(expected, follow(other, schedule, first=steps))


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("name", ["reference", "device"])
def test_a_live_state_goes_on_in_an_optimizer_of_floats(device, steps, name):
    original = follow(make(device, (live(0.05), live(0.05))), RATES[:steps])
    other = resume(make("reference" if name == "reference" else device), saved(original), original)
    assert remembered(other) == remembered(original)
    for group in other.param_groups:
        group["lr"] = float(group["lr"])
    assert_alike(follow(make("reference")), follow(other, first=steps))


@pytest.mark.parametrize("shapes", [((), (1,)), ((1,), ())])
def test_loading_a_rate_of_one_element_in_another_shape(device, shapes):
    original, other = (run(make(device, [torch.full(shape, 0.05)] * 2), 1) for shape in shapes)
    resume(other, saved(original), original)
    assert other.param_groups[0]["lr"].shape == shapes[1]
    assert_alike(run(original, 1, first=1), run(other, 1, first=1))


@pytest.mark.parametrize(
    ("copied", "steps"),
    [(copy.deepcopy, 5), (lambda optimizer: pickle.loads(pickle.dumps(optimizer)), 2)],
)
def test_copies_have_rates_of_their_own(device, copied, steps):
    original = follow(make(device, (live(0.05), live(0.05))), RATES[:steps])
    other = copied(original)
    assert remembered(other) == remembered(original)
    assert not set(addresses(other)) & set(addresses(original))
    assert_alike(follow(make("reference")), follow(other, first=steps))
    assert_alike(follow(make("reference"), RATES[:steps]), original)


# ------------------------------------------------------------------------------ read by the host


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("rate_dtype", [torch.float32, torch.float64, torch.float16])
def test_other_backends_read_tensors_as_numbers(backend, rate_dtype):
    require(backend)
    schedule = torch.tensor(RATES, dtype=rate_dtype).tolist()
    expected = follow(make(backend), schedule)
    actual = follow(make(backend, (live(0.05, rate_dtype), live(0.05, rate_dtype))), schedule)
    assert_alike(expected, actual)
    assert remembered(expected) == remembered(actual)
    before = snapshot(actual)
    for bad in (-0.1, math.nan):
        set_rates(actual, (0.05, bad))
        with pytest.raises(ValueError, match="lr must"):
            run(actual, 1)
    assert differing(before, snapshot(actual)) == []


# ------------------------------------------------------------------------------ compiled steps


@pytest.mark.parametrize("explore_steps", [None, SWITCH])
def test_inside_torch_compile(device, explore_steps):
    """One graph for each phase, whatever the rates; steps that a GradScaler has skipped are left out."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=graphs, fullgraph=True)
    def compiled(optimizer, loss):
        optimizer.step(loss=loss)

    def eager(optimizer, loss):
        optimizer.step(loss=loss)

    def scaled(step, optimizer):
        for number, rates in enumerate(RATES):
            if number == SWITCH and explore_steps is None:
                optimizer.finetune()
            set_rates(optimizer, rates)
            loss = noisy_quadratic(parameters_of(optimizer), number)
            optimizer.grad_scale = torch.tensor(2.0)
            optimizer.found_inf = torch.tensor(float(number in (1, 5)))
            step(optimizer, loss)
            if number == 2:
                seen.append(graphs.frame_count)
        del optimizer.grad_scale, optimizer.found_inf
        return optimizer

    seen = []
    rates = (live(0.05), live(0.05))
    expected = scaled(eager, make(device, copy.deepcopy(rates), explore_steps=explore_steps))
    actual = scaled(compiled, make(device, copy.deepcopy(rates), explore_steps=explore_steps))
    assert_alike(expected, actual)
    # after the phases changed: the graph of the switch itself and the one without it
    assert graphs.frame_count - seen[1] <= 2
    actual.state_dict()
    assert remembered(expected) == remembered(actual)
    for optimizer in (expected, actual):
        run(optimizer, 2, first=8)
    assert_alike(expected, actual)
