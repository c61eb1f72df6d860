"""CTLD as a torch optimizer: equivalence with SGD, parameter groups, memory layouts, schedulers, chains."""

import math

import pytest
import torch
from common import differing, make_parameters, noisy_quadratic, run, snapshot, two_groups

from ctld_cuda import CTLD, Tempering, backend_info
from ctld_cuda.reference import STREAM_PARAMETERS, normal


def make(parameters, backend=None, **options):
    return CTLD(parameters, **({"num_data": 10, "lr": 0.05, "backend": backend} | options))


# ---------------------------------------------------------------------------------------- SGD


def paired(dtype=torch.float32):
    """Two equal sets of parameters, in two groups of different options each."""
    ours, theirs = (make_parameters([(17, 3), (40,), (5, 2)], seed=3, dtype=dtype) for _ in range(2))

    def groups(p):
        return [
            {"params": p[:2], "lr": 0.08, "weight_decay": 0.02},
            {"params": p[2:], "lr": 0.03, "momentum": 0.7},
        ]

    return ours, theirs, groups


def largest_difference(ours, theirs):
    pairs = zip(ours, theirs, strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item() for a, b in pairs)


@pytest.mark.parametrize("integrator", ["baoab", "euler"])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("entry", ["temperature 0", "fine-tuning from the start"])
def test_without_noise_it_is_sgd_under_any_schedule(backend, integrator, maximize, entry):
    ours, theirs, groups = paired(torch.float64)
    without_noise = (
        {"temperature": 0.0, "tempering": None} if entry == "temperature 0" else {"explore_steps": 0}
    )
    a = make(groups(ours), backend, integrator=integrator, maximize=maximize, **without_noise)
    b = torch.optim.SGD(groups(theirs), lr=0.05, momentum=0.9, maximize=maximize)
    for optimizer in (a, b):
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 200) for o in (a, b)]
    for step in range(200):
        for optimizer, parameters in ((a, ours), (b, theirs)):
            noisy_quadratic(parameters, step)
            if maximize:
                for p in parameters:
                    p.grad.neg_()
            for group in optimizer.param_groups:
                group["momentum"] = 0.5 + 0.4 * math.sin(step / 30)
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert largest_difference(ours, theirs) < 1e-12
    assert a.phase == "finetune"


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_finetuning_after_exploring_is_sgd_from_the_same_velocity(backend, dtype, bound):
    ours, theirs, groups = paired(dtype)
    a = make(groups(ours), backend, seed=5)
    run(a, 30)
    a.finetune()
    b = torch.optim.SGD(groups(theirs), lr=0.05, momentum=0.9)
    for group, mine in zip(b.param_groups, a.param_groups, strict=True):
        unit = math.sqrt((1 + mine["momentum"]) / 2) * math.sqrt(10 * mine["lr"])
        for p, q in zip(group["params"], mine["params"], strict=True):
            p.data.copy_(q)
            b.state[p]["momentum_buffer"] = -a.state[q]["momentum_buffer"].to(p.dtype) / unit
    for step in range(200):
        for optimizer, parameters in ((a, ours), (b, theirs)):
            noisy_quadratic(parameters, step)
            for group in optimizer.param_groups:
                group["lr"] *= 0.99
            optimizer.step()
    assert largest_difference(ours, theirs) < bound


def test_sgd_skips_parameters_without_gradient_and_so_do_we(backend):
    p, q = make_parameters([(5,), (5,)])
    optimizer = make([p, q], backend, temperature=0.0, tempering=None, weight_decay=0.1)
    p.grad, q.grad = torch.ones(5), torch.ones(5)
    optimizer.step()
    p.grad = None
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before)


# -------------------------------------------------------------------------------- what gets noise


def test_the_first_step_by_hand(backend):
    """baoab from rest: p = s xi - mu k g, theta moves by b (-k g) and b p."""
    (p,) = make_parameters([(7,)])
    start, g = p.detach().double().clone(), torch.linspace(-1, 1, 7)
    p.grad = g.clone()
    optimizer = make([p], backend, tempering=None, temperature=2.0, seed=11, lr=0.05, momentum=0.9)
    optimizer.step()
    c = math.sqrt(0.95)
    k, b, s = math.sqrt(0.5) / c, 0.5 * math.sqrt(0.005) / c, math.sqrt(0.19 * 2.0)
    xi = normal(11, 0, STREAM_PARAMETERS, 0, 7).double()
    momentum = -k * g.double()
    theta = start + b * momentum
    momentum = 0.9 * momentum + s * xi
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"].double(), momentum, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(p.detach().double(), theta + b * momentum, rtol=1e-5, atol=1e-6)


def test_no_gradient_means_zero_gradient_while_exploring(backend):
    def stepped(gradient):
        (p,) = make_parameters([(9,)])
        p.grad = gradient
        optimizer = make([p], backend, weight_decay=0.1, tempering=None)
        optimizer.step()
        return snapshot(optimizer)

    assert differing(stepped(None), stepped(torch.zeros(9))) == []


def test_frozen_and_empty_parameters_stay_out(backend):
    frozen, empty, free = make_parameters([(6,), (0, 3), (6,)])
    frozen.requires_grad_(False)
    before = frozen.clone()
    optimizer = make([frozen, empty, free], backend)
    free.grad = torch.ones(6)
    optimizer.step(loss=1.0)
    assert torch.equal(frozen, before)
    assert optimizer.state[frozen]["momentum_buffer"].count_nonzero() == 0
    assert optimizer.state[free]["momentum_buffer"].count_nonzero() == 6
    # the noise of a parameter is that of its position, whatever the others do
    noise = normal(0, 0, STREAM_PARAMETERS, 2, 6)
    kicked = optimizer.state[free]["momentum_buffer"] - math.sqrt(0.19) * noise
    assert torch.allclose(kicked, kicked[0].expand(6), atol=1e-5)


def test_all_learning_rates_zero_changes_nothing(backend):
    optimizer = two_groups([(5,), (6,)], backend=backend)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    run_before = snapshot_after_preparation(optimizer)
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.zeros_like(p)
    optimizer.step(loss=1.0)
    assert differing(run_before, snapshot(optimizer)) == []


def snapshot_after_preparation(optimizer):
    optimizer._prepare()
    return snapshot(optimizer)


# ------------------------------------------------------------------------------- memory layouts


def logical(optimizer, parameter):
    return parameter.detach().clone(), optimizer.state[parameter]["momentum_buffer"].clone()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "0-dim"])
def test_elements_are_counted_in_memory_order(backend, layout):
    if layout == "0-dim":
        p = torch.nn.Parameter(torch.tensor(0.3))
    else:
        x = torch.linspace(-1, 1, 2 * 3 * 4 * 5).view(2, 3, 4, 5)
        if layout == "channels_last":
            x = x.to(memory_format=torch.channels_last)
        if layout == "transposed":
            x = x.permute(3, 1, 0, 2)
        p = torch.nn.Parameter(x)
        assert p.is_contiguous() == (layout == "contiguous")
    p.grad = torch.zeros(p.shape)  # contiguous whatever p is: the strides differ
    optimizer = make([p], backend, tempering=None)
    optimizer.step()
    momentum = optimizer.state[p]["momentum_buffer"]
    assert momentum.stride() == p.stride()
    in_memory = momentum.as_strided((p.numel(),), (1,))
    expected = math.sqrt(0.19) * normal(0, 0, STREAM_PARAMETERS, 0, p.numel())
    assert torch.allclose(in_memory, expected, atol=1e-6)


def test_a_gradient_of_other_strides_reaches_the_right_elements(backend):
    x = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    results = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        p = torch.nn.Parameter(x.clone(memory_format=torch.preserve_format))
        p.grad = torch.linspace(0, 1, 48).view(4, 3, 2, 2).contiguous(memory_format=memory_format)
        optimizer = make([p], backend)
        optimizer.step(loss=1.0)
        results.append(logical(optimizer, p))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_parameter_with_gaps_is_counted_in_row_major_order(backend):
    base = torch.arange(24.0).view(4, 6)
    results = []
    for p in (torch.nn.Parameter(base[:, ::2]), torch.nn.Parameter(base[:, ::2].contiguous())):
        p.grad = torch.ones(4, 3)
        optimizer = make([p], backend)
        for _ in range(3):
            optimizer.step(loss=1.0)
        results.append(logical(optimizer, p))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(base[:, 1::2], torch.arange(24.0).view(4, 6)[:, 1::2])  # the gaps are not ours


def test_chains_inside_another_dimension_are_counted_outermost(backend):
    results = []
    for contiguous in (True, False):
        x = torch.linspace(-1, 1, 15).view(3, 5)
        p = torch.nn.Parameter(x.clone() if contiguous else x.t().contiguous().t())
        p.grad = torch.ones(3, 5)
        optimizer = make([p], backend, chains=3, tempering=Tempering(step_size=0.1))
        for _ in range(20):
            optimizer.step(loss=torch.arange(3.0))
        results.append(logical(optimizer, p))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---------------------------------------------------------------------------- torch's conventions


def test_closure_and_loss_are_the_same_step(backend):
    outcomes = []
    for closure in (True, False):
        (p,) = make_parameters([(20,)])
        optimizer = make([p], backend, tempering=Tempering(step_size=0.1))

        def evaluate(p=p, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (p * p).sum()
            loss.backward()
            return loss

        for _ in range(20):
            if closure:
                returned = optimizer.step(evaluate)
                assert returned.requires_grad
            else:
                loss = evaluate()
                assert optimizer.step(loss=loss.detach()) is not None
        outcomes.append(snapshot(optimizer))
    assert differing(*outcomes) == []


def test_hooks_run_and_zero_grad_clears(backend):
    (p,) = make_parameters([(4,)])
    optimizer = make([p], backend, tempering=None)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    p.grad = torch.ones(4)
    optimizer.step()
    optimizer.zero_grad()
    assert calls == ["before", "after"] and p.grad is None


def test_autograd_sees_the_change(backend):
    (p,) = make_parameters([(4,)])
    optimizer = make([p], backend, tempering=None)
    product = (p * p).sum()
    p.grad = torch.ones(4)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


SCHEDULERS = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
    "MultiplicativeLR": lambda o: torch.optim.lr_scheduler.MultiplicativeLR(o, lambda k: 0.9),
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: torch.optim.lr_scheduler.ConstantLR(o),
    "LinearLR": lambda o: torch.optim.lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: torch.optim.lr_scheduler.PolynomialLR(o),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=4),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[4],
    ),
    "ChainedScheduler": lambda o: torch.optim.lr_scheduler.ChainedScheduler(
        [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.01),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers_drive_it_as_they_drive_sgd(name, tensor_lr):
    lr = torch.tensor(0.05) if tensor_lr else 0.05
    rates = []
    for make_optimizer in (
        lambda p: torch.optim.SGD(p, lr=lr.clone() if tensor_lr else lr, momentum=0.9),
        lambda p: make(p, lr=lr.clone() if tensor_lr else lr, tempering=None),
    ):
        optimizer = make_optimizer(make_parameters([(5,)]))
        scheduler = SCHEDULERS[name](optimizer)
        seen = []
        for step in range(12):
            noisy_quadratic(optimizer.param_groups[0]["params"], step)
            optimizer.step()
            scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
            seen.append((float(optimizer.param_groups[0]["lr"]), optimizer.param_groups[0]["momentum"]))
        rates.append(seen)
    assert rates[0] == rates[1]
    assert len({rate for rate, _ in rates[1]}) > 1


def test_a_tensor_learning_rate_is_that_number(backend):
    results = []
    for lr in (0.03125, torch.tensor(0.03125)):
        results.append(snapshot(run(make(make_parameters([(9,)]), backend, lr=lr), 5)))
    assert differing(*results) == []


def test_changing_the_learning_rate_while_exploring_keeps_p(backend):
    (p,) = make_parameters([(50,)])
    optimizer = run(make([p], backend, tempering=None), 10)
    before = optimizer.state[p]["momentum_buffer"].clone()
    optimizer.param_groups[0]["lr"] = 1e-12
    p.grad = None
    optimizer.step()
    xi = normal(0, 10, STREAM_PARAMETERS, 0, 50)
    after = optimizer.state[p]["momentum_buffer"]
    assert torch.allclose(after, 0.9 * before + math.sqrt(0.19) * xi, atol=1e-6)


def test_a_group_added_later_takes_part(backend):
    p, q = make_parameters([(8,), (9,)])
    optimizer = run(make([p], backend), 5)
    optimizer.add_param_group({"params": [q], "lr": 0.01, "weight_decay": 0.3})
    run(optimizer, 5)
    assert optimizer.state[q]["momentum_buffer"].count_nonzero() == 9
    assert int(optimizer._sampler.step) == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_momentum_dtype(backend, dtype):
    (p,) = make_parameters([(8,)], dtype=dtype)
    optimizer = run(make([p], backend), 3)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert optimizer.state[p]["momentum_buffer"].dtype == expected and p.dtype == dtype


# ------------------------------------------------------------------------------------- the phases


def test_explore_steps_switches_the_noise_off(backend):
    (p,) = make_parameters([(100,)])
    optimizer = make([p], backend, explore_steps=4)
    run(optimizer, 4)
    assert optimizer.phase == "explore" and float(optimizer.tempering_state()["temperature"]) >= 1.0
    state = {name: t.clone() for name, t in optimizer.tempering_state().items()}
    run(optimizer, 1)
    after = optimizer.tempering_state()
    assert optimizer.phase == "finetune" and float(after["temperature"]) == 0.0
    assert not bool(after["at_target"])
    assert torch.equal(after["alpha"], state["alpha"]) and torch.equal(after["visits"], state["visits"])
    p.grad = torch.zeros(100)
    momentum = optimizer.state[p]["momentum_buffer"].clone()
    optimizer.step()  # no loss needed any more
    assert torch.equal(optimizer.state[p]["momentum_buffer"], momentum * 0.9)


def test_prior_energy_is_felt_and_follows_foreign_writes(backend):
    (p,) = make_parameters([(1000,)])
    optimizer = make([p], backend, weight_decay=0.5, tempering=Tempering(coupling="exact"))

    quantum = 2.0**-optimizer._constants.prior_exponent

    def shortfall():
        """Exact minus stored prior energy, in quanta: truncation takes at most one per element."""
        exact = 0.5 * 10 * 0.5 * float((p.detach().double() ** 2).sum())
        return (exact - float(optimizer._sampler.prior) * quantum) / quantum

    run(optimizer, 3)
    assert 0 < shortfall() < 1000
    with torch.no_grad():
        p.mul_(3.0)
    seen = []
    original = type(optimizer._backend).explore

    class Spy(type(optimizer._backend)):
        def explore(self, inputs):
            seen.append(shortfall())
            return original(self, inputs)

    optimizer._backend.__class__ = Spy
    optimizer.step(loss=0.0)
    assert 0 < seen[0] < 1000


# -------------------------------------------------------------------------------------- reporting


@pytest.mark.parametrize("chains", [None, 3])
@pytest.mark.parametrize("tempering", [None, Tempering(bins=20), Tempering(bins=20, coupling="exact")])
def test_shapes_of_tempering_state(backend, chains, tempering):
    optimizer = make(make_parameters([(3, 4)]), backend, chains=chains, tempering=tempering)
    run(optimizer, 2)
    state = optimizer.tempering_state()
    for name in ("alpha", "alpha_momentum", "temperature", "at_target", "kinetic_temperature"):
        assert state[name].shape == (() if chains is None else (chains,)), name
    for name in ("visits", "bias", "bin_centers", "free_energy", "free_energy_histogram"):
        assert state[name].shape == (20 if tempering else 0,), name
    assert state["flags"].shape == () and state["at_target"].dtype == torch.bool
    if tempering and tempering.coupling == "standardized":
        assert state["free_energy"].isnan().all() and state["free_energy_histogram"].isnan().all()


def test_the_live_tensors_are_the_state_itself(backend):
    optimizer = make(make_parameters([(30,)]), backend, tempering=Tempering(step_size=0.1))
    alpha = optimizer.tempering_state()["alpha"]
    run(optimizer, 50)
    assert float(alpha) == float(optimizer.tempering_state()["alpha"]) != 0.0


def test_backend_info_gives_reasons():
    for info in backend_info().values():
        assert info["usable"] or info["reason"]


# ------------------------------------------------------------------------------------ allocations


def large_allocations(function, threshold):
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    return [
        event.name
        for event in profile.events()
        if event.cpu_memory_usage >= threshold or event.name == "missed"
    ]


@pytest.mark.parametrize("layout", ["contiguous", "gradient of other strides", "gaps"])
def test_a_step_allocates_nothing_of_parameter_size(compiled, layout):
    n = 1 << 16
    x = torch.randn(4, n // 4)
    if layout == "gaps":
        x = torch.randn(4, n // 2)[:, ::2]
    p = torch.nn.Parameter(x)
    gradient = torch.randn(n // 4, 4).t() if layout == "gradient of other strides" else torch.randn(4, n // 4)
    p.grad = gradient
    optimizer = make([p], compiled, weight_decay=0.1)
    optimizer.step(loss=1.0)
    optimizer.step(loss=1.0)
    assert large_allocations(lambda: torch.empty(n), n)  # the probe sees what it looks for
    assert large_allocations(lambda: optimizer.step(loss=1.0), n) == []
