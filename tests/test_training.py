"""In other people's training loops: what stands around an optimizer keeps working, on one device."""

import copy
import gc
import math
import weakref

import pytest
import torch
from common import bits, differing, make_parameters, noisy_quadratic, run, snapshot, two_groups
from torch.optim import lr_scheduler, swa_utils

from ctld_cuda import CTLD, Tempering, explore_then_finetune

MOVING = Tempering(step_size=0.1)


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def network(seed=0, width=7):
    generator = torch.Generator().manual_seed(seed)
    layers = torch.nn.Linear(5, width), torch.nn.Tanh(), torch.nn.Linear(width, 1)
    model = torch.nn.Sequential(*layers)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def data(step, rows=8):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 5, generator=generator), torch.randn(rows, 1, generator=generator)


def mean_square(model, step, rows=slice(None)):
    x, y = data(step)
    return (model(x[rows]) - y[rows]).square().mean()


def ctld(model, backend=None, **options):
    options = {"lr": 0.05, "num_data": 8, "tempering": MOVING} | options
    return CTLD(model.parameters(), backend=backend, **options)


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = mean_square(model, step)
        loss.backward()
        optimizer.step(loss=loss.detach())
    return optimizer


# ------------------------------------------------------------------- what a step remembers of the last


def forget(optimizer):
    """Drops everything a step keeps for the next one only to save time."""
    optimizer._coefficients_of = None
    if optimizer._inspector is not None:
        optimizer._inspector._usual = []


def swap_data(optimizer):
    p = parameters_of(optimizer)[1]
    p.data = p.data.clone() + 0.25


def toggle(optimizer):
    p = parameters_of(optimizer)[0]
    p.requires_grad_(not p.requires_grad)


def new_gradients(optimizer):
    for p in parameters_of(optimizer):
        p.grad = p.grad.clone()


def transposed_gradient(optimizer):
    p = parameters_of(optimizer)[2]
    p.grad = p.grad.t().contiguous().t()


def group_option(name, value):
    def change(optimizer):
        optimizer.param_groups[1][name] = value

    return change


CHANGES = {
    "lr": group_option("lr", 0.3),
    "lr as a tensor": group_option("lr", torch.tensor(0.3)),
    "momentum": group_option("momentum", 0.25),
    "no momentum, an integer": group_option("momentum", 0),
    "weight decay": group_option("weight_decay", 0.5),
    "data swapped": swap_data,
    "frozen, later thawed": toggle,
    "gradients replaced": new_gradients,
    "gradient in another layout": transposed_gradient,
    "one gradient missing": lambda optimizer: setattr(parameters_of(optimizer)[1], "grad", None),
    "number of data": lambda optimizer: setattr(optimizer, "num_data", 20.0),
    "fine-tuning": CTLD.finetune,
    "group added": lambda optimizer: optimizer.add_param_group({"params": make_parameters([(3,)], seed=5)}),
    "written to": lambda optimizer: parameters_of(optimizer)[0].data.add_(1.0),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("phase", ["explore", "finetune"])
def test_nothing_is_remembered_that_has_changed(compiled, change, phase):
    """Against an optimizer that looks at everything anew in every step; many tensors, to be seen in parts."""
    shapes = [(5,), (3,), (4, 6), (2,)] + [(1,)] * 300

    def stepped(forgetful):
        optimizer = two_groups(shapes, backend=compiled, tempering=MOVING, weight_decay=0.02)
        if phase == "finetune":
            optimizer.finetune()
        for step in range(6):
            loss = noisy_quadratic(parameters_of(optimizer), step)
            if step in (2, 4):
                CHANGES[change](optimizer)
            if forgetful:
                forget(optimizer)
            optimizer.step(loss=loss)
        return snapshot(optimizer)

    assert differing(stepped(True), stepped(False)) == []


def test_maximize_switched_between_steps(backend):
    def stepped(forgetful):
        optimizer = two_groups([(5,), (3,)], backend=backend, tempering=None)
        for step in range(4):
            noisy_quadratic(parameters_of(optimizer), step)
            optimizer.param_groups[0]["maximize"] = step % 2 == 1
            if forgetful:
                forget(optimizer)
            optimizer.step()
        return snapshot(optimizer)

    assert differing(stepped(True), stepped(False)) == []


def shorter(optimizer):
    """The same address and strides, but fewer elements; its gradient too."""
    p = parameters_of(optimizer)[0]
    p.data = p.data[:2]
    p.grad = torch.ones(2)


def sparse(optimizer):
    p = parameters_of(optimizer)[2]
    p.grad = torch.ones_like(p).to_sparse()


def double_gradient(optimizer):
    p = parameters_of(optimizer)[0]
    p.grad.data = p.grad.data.double()


def transposed(optimizer):
    p = parameters_of(optimizer)[2]
    p.data = p.data.t()
    p.grad = None
    p.grad = torch.ones_like(p)


def doubled(optimizer):
    for p in parameters_of(optimizer):
        p.data = p.data.double()
        p.grad = None


BAD = {
    "shorter": (shorter, RuntimeError, "parameter 0 changed its shape"),
    "transposed": (transposed, RuntimeError, "parameter 2 changed its shape"),
    "other dtype": (doubled, RuntimeError, "convert the model first"),
    "sparse gradient": (sparse, RuntimeError, "sparse"),
    "gradient of another dtype": (double_gradient, TypeError, "float64"),
    "negative lr": (group_option("lr", -0.1), ValueError, "lr"),
    "NaN lr": (group_option("lr", math.nan), ValueError, "lr"),
    "infinite lr": (group_option("lr", math.inf), ValueError, "lr"),
    "lr is True": (group_option("lr", True), TypeError, "lr"),
    "momentum 1": (group_option("momentum", 1.0), ValueError, "momentum"),
    "negative weight decay": (group_option("weight_decay", -1), ValueError, "weight_decay"),
    "weight decay in words": (group_option("weight_decay", "none"), TypeError, "weight_decay"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("phase", ["explore", "finetune"])
def test_what_has_become_unsuitable_between_steps_is_refused(backend, name, phase):
    change, error, message = BAD[name]
    optimizer = run(two_groups([(5,), (3,), (4, 6), (2,)], backend=backend, tempering=MOVING), 3)
    if phase == "finetune":
        optimizer.finetune()
        run(optimizer, 2, first=3)
    noisy_quadratic(parameters_of(optimizer), 9)
    change(optimizer)
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step(loss=1.0)
    assert differing(before, snapshot(optimizer)) == []


# ---------------------------------------------------------------------------------------------- misuse


def test_a_step_before_backward_warns(backend):
    """It is a step with zero gradients: the parameters only feel the noise."""
    optimizer = two_groups([(5,), (3,)], backend=backend, tempering=None)
    with pytest.warns(RuntimeWarning, match="backward"):
        optimizer.step()
    zero = two_groups([(5,), (3,)], backend=backend, tempering=None)
    for p in parameters_of(zero):
        p.grad = torch.zeros_like(p)
    zero.step()
    assert differing(snapshot(optimizer), snapshot(zero)) == []


def test_without_noise_a_step_before_backward_is_sgds(backend, recwarn):
    optimizer = two_groups([(5,), (3,)], backend=backend, tempering=None, temperature=0.0)
    before = [p.detach().clone() for p in parameters_of(optimizer)]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters_of(optimizer), before, strict=True))
    assert not recwarn.list


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (torch.ones((), device="meta"), ValueError, "meta"),
        (torch.ones(3), ValueError, "scalar"),
        (torch.ones((), dtype=torch.complex64), TypeError, "real"),
        ("low", TypeError, "loss"),
        (None, ValueError, "step\\(closure\\)"),
    ],
)
def test_losses_that_are_none(backend, loss, error, message):
    optimizer = run(two_groups([(5,), (3,)], backend=backend, tempering=MOVING), 2)
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step(loss=loss)
    assert differing(before, snapshot(optimizer)) == []


def test_a_loss_with_its_graph_is_as_good_as_one_without(backend):
    def stepped(detach):
        model = network()
        optimizer = ctld(model, backend)
        for step in range(3):
            optimizer.zero_grad()
            loss = mean_square(model, step)
            loss.backward()
            optimizer.step(loss=loss.detach() if detach else loss)
        return snapshot(optimizer)

    assert differing(stepped(True), stepped(False)) == []


def test_a_checkpoint_of_another_model(backend):
    other = network(width=9)
    saved = copy.deepcopy(train(other, ctld(other, backend), 2).state_dict())
    model = network(width=7)
    optimizer = train(model, ctld(model, backend), 2)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"shape \(9, 5\)"):
        optimizer.load_state_dict(saved)
    assert differing(before, snapshot(optimizer)) == []


def test_unscaling_twice_is_refused_and_a_second_step_too():
    model = network()
    optimizer = ctld(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    loss = mean_square(model, 0)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="unscale_"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer, loss=loss.detach())
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="step\\(\\) has already been called"):
        scaler.step(optimizer, loss=loss.detach())
    assert differing(before, snapshot(optimizer)) == []


# ------------------------------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("scaled", [False, True])
def test_autocast_in_bfloat16(backend, scaled):
    """Autocast changes the gradients, not the step: given them, it is the step without autocast."""
    model, plain = network(), network()
    optimizer, other = ctld(model, backend), ctld(plain, backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=scaled)
    for step in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = mean_square(model, step)
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert p.grad.dtype == torch.float32
            q.grad = p.grad / scale
        scaler.step(optimizer, loss=loss.detach())
        scaler.update()
        other.step(loss=loss.detach())
    assert differing(snapshot(optimizer), snapshot(other)) == []


def test_accumulated_gradients_are_one_large_batch(backend):
    """The samples' gradients are small integers, whose sums are exact in any order."""
    p, q = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    samples = torch.randint(-8, 8, (8, 3), generator=torch.Generator().manual_seed(0)).float()
    accumulated, whole = (CTLD([x], num_data=8, tempering=MOVING, backend=backend) for x in (p, q))
    for _ in range(5):
        total = 0.0
        for part in samples.split(2):
            loss = (part @ p).mean() / 4
            loss.backward()
            total = total + loss.detach()
        (samples @ q).mean().backward()
        assert torch.equal(p.grad, q.grad)
        accumulated.step(loss=total)
        whole.step(loss=total)
        accumulated.zero_grad()
        whole.zero_grad()
    assert differing(snapshot(accumulated), snapshot(whole)) == []


# --------------------------------------------------------------------------- averages and schedulers


@pytest.mark.parametrize("decay", [None, 0.9])
def test_averages_of_the_parameters(backend, decay):
    model = network()
    optimizer = ctld(model, backend)
    rule = {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(decay)} if decay else {}
    averaged = swa_utils.AveragedModel(model, **rule)
    visited = []
    for step in range(6):
        train(model, optimizer, 1, first=step)
        averaged.update_parameters(model)
        visited.append(torch.cat([p.detach().view(-1) for p in model.parameters()]))
    expected = torch.stack(visited).mean(0)
    if decay:
        expected = visited[0]
        for value in visited[1:]:
            expected = decay * expected + (1 - decay) * value
    found = torch.cat([p.detach().view(-1) for p in averaged.module.parameters()])
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert len({float(v[0]) for v in visited}) == 6


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6),
    "CyclicLR, with momentum": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3),
    "OneCycleLR, with momentum": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.01, 4),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_give_the_rates_that_they_give_sgd(backend, name):
    """And the step uses them: it is the step of an optimizer that is told them one by one."""
    model, twin = network(), network()
    optimizer, told = ctld(model, backend), ctld(twin, backend)
    sgd = torch.optim.SGD(network().parameters(), 0.05, 0.9)
    scheduler, other = SCHEDULERS[name](optimizer), SCHEDULERS[name](sgd)
    seen = set()
    for step in range(8):
        group = sgd.param_groups[0]
        told.param_groups[0].update(lr=float(group["lr"]), momentum=float(group["momentum"]))
        seen.add((float(group["lr"]), float(group["momentum"])))
        train(twin, told, 1, first=step)
        train(model, optimizer, 1, first=step)
        sgd.step()
        loss = [1.0] if "Plateau" in name else []
        scheduler.step(*loss)
        other.step(*loss)
    assert len(seen) > 1 and (len({m for _, m in seen}) > 1) == ("momentum" in name)
    assert differing(snapshot(told), snapshot(optimizer)) == []


# ------------------------------------------------------------------------------------- models and hooks


def test_training_a_functional_call(backend):
    model = network()
    expected = train(model, ctld(model, backend), 4)
    template, values = network(1), {name: p for name, p in network().named_parameters()}
    optimizer = CTLD(values.values(), 0.05, num_data=8, tempering=MOVING, backend=backend)
    for step in range(4):
        optimizer.zero_grad()
        x, y = data(step)
        loss = (torch.func.functional_call(template, values, (x,)) - y).square().mean()
        loss.backward()
        optimizer.step(loss=loss.detach())
    assert differing(snapshot(expected), snapshot(optimizer)) == []


def test_gradients_of_torch_func(backend):
    """torch.func.grad returns gradients that have no graph; they are handed over by hand."""
    model = network()
    expected = train(model, ctld(model, backend), 3)
    template = network(1)
    values = dict(network().named_parameters())
    optimizer = CTLD(values.values(), 0.05, num_data=8, tempering=MOVING, backend=backend)
    for step in range(3):
        x, y = data(step)

        def objective(values, x=x, y=y):
            return (torch.func.functional_call(template, values, (x,)) - y).square().mean()

        detached = {name: p.detach() for name, p in values.items()}
        gradients, loss = torch.func.grad_and_value(objective)(detached)
        for name, p in values.items():
            p.grad = gradients[name]
        optimizer.step(loss=loss)
    a, b = snapshot(expected), snapshot(optimizer)
    assert differing(a, b) == []


def test_tied_weights_are_one_parameter(backend):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
            self.decoder.weight = self.encoder.weight

    model = Tied()
    optimizer = CTLD(model.parameters(), num_data=8, tempering=MOVING, backend=backend)
    assert len(parameters_of(optimizer)) == 1
    x = torch.eye(4)
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model.decoder(model.encoder(x)) - x).square().mean()
        loss.backward()
        optimizer.step(loss=loss.detach())
    assert model.decoder.weight is model.encoder.weight
    assert int(optimizer._sampler.step) == 3


def test_hooks_around_steps(backend):
    model = network()
    optimizer = ctld(model, backend)
    seen = []
    train(model, optimizer, 1)
    handles = [
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", args[1:], set(kwargs)))),
        optimizer.register_step_post_hook(
            lambda o, args, kwargs: seen.append(("post", int(o._sampler.step)))
        ),
    ]
    train(model, optimizer, 1, first=1)
    assert seen == [("pre", (), {"loss"}), ("post", 2)]
    for handle in handles:
        handle.remove()
    train(model, optimizer, 1, first=2)
    assert len(seen) == 2
    other = network()
    assert differing(snapshot(train(other, ctld(other, backend), 3)), snapshot(optimizer)) == []


def test_a_hook_may_change_the_arguments(backend):
    optimizer = two_groups([(3,)], backend=backend, tempering=None, history=2)
    noisy_quadratic(parameters_of(optimizer), 0)
    handle = optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, {"loss": 7.0}))
    optimizer.step(loss=1.0)
    handle.remove()
    assert optimizer.history()["energy"].tolist() == [70.0]


def test_hooks_of_all_optimizers(backend):
    from torch.optim import optimizer as module

    seen = []
    handle = module.register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append(type(o)))
    try:
        run(two_groups([(3,)], backend=backend), 1)
    finally:
        handle.remove()
    run(two_groups([(3,)], backend=backend), 1)
    assert seen == [CTLD]


def test_the_profiler_shows_steps(backend):
    optimizer = run(two_groups([(3,)], backend=backend), 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(optimizer, 2)
    steps = [event for event in profile.key_averages() if event.key == "Optimizer.step#CTLD.step"]
    assert [event.count for event in steps] == [2]


def test_a_closure_runs_with_gradients_and_the_mode_is_put_back(backend):
    model = network()
    optimizer = ctld(model, backend)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = mean_square(model, 0)
        loss.backward()
        return loss

    with torch.no_grad():
        optimizer.step(closure)
        assert not torch.is_grad_enabled()
    optimizer.step(closure)
    assert torch.is_grad_enabled()
    with pytest.raises(ValueError):
        optimizer.step(loss=None)
    assert torch.is_grad_enabled()


# ------------------------------------------------------------------------------------------ moved models


def test_a_model_whose_memory_moves_in_place(backend):
    """As model.to() between devices, when both have the same type: parameters stay, their data is new."""
    model = network()
    expected = train(model, ctld(model, backend), 4)
    moved = network()
    optimizer = train(moved, ctld(moved, backend), 2)
    old = [p.data for p in moved.parameters()]
    for p in moved.parameters():
        p.data = p.data.clone()
    before = [x.clone() for x in old]
    train(moved, optimizer, 2, first=2)
    assert all(torch.equal(x, y) for x, y in zip(old, before, strict=True))  # not written to any more
    assert differing(snapshot(expected), snapshot(optimizer)) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_converted_between_steps_is_refused(backend, dtype):
    model = network()
    optimizer = train(model, ctld(model, backend), 2)
    momenta = [bits(optimizer.state[p]["momentum_buffer"]) for p in model.parameters()]
    model.to(dtype)
    x, y = data(3)
    model(x.to(dtype)).float().sub(y).square().mean().backward()
    with pytest.raises(RuntimeError, match="convert the model first"):
        optimizer.step(loss=1.0)
    after = [bits(optimizer.state[p]["momentum_buffer"]) for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(momenta, after, strict=True))


def test_a_model_with_new_parameters_leaves_the_old_ones_to_the_optimizer(backend):
    """It steps what it was given, and says so if that has no gradients any more."""
    model = network()
    optimizer = train(model, ctld(model, backend), 2)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in parameters_of(optimizer)}
    optimizer.zero_grad()
    values = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(RuntimeWarning, match="no parameter has a gradient"):
        optimizer.step(loss=1.0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), values, strict=True))


def test_many_optimizers_in_turn_are_each_alone(backend):
    makers = [
        lambda i=i: two_groups(
            [(5 + i,), (3, 2)],
            backend=backend,
            seed=i % 3,
            tempering=None if i % 2 else MOVING,
            history=i or None,
        )
        for i in range(6)
    ]
    alone = [snapshot(run(make(), 5)) for make in makers]
    together = [make() for make in makers]
    for step in range(5):
        for optimizer in together:
            run(optimizer, 1, first=step)
    assert all(differing(a, snapshot(b)) == [] for a, b in zip(alone, together, strict=True))


# -------------------------------------------------------------------------------------------- memory


def resident_bytes():
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        pytest.skip("no /proc: resident memory is not known")


def train_with_everything(backend, steps):
    """Every option that keeps something from step to step, and what is usual around a step."""
    parameters = make_parameters([(40,), (7, 3), (1,)])
    explore_steps = steps * 4 // 5
    optimizer = CTLD(
        parameters,
        0.01,
        num_data=10,
        weight_decay=0.01,
        tempering=MOVING,
        thermostat=True,
        history=64,
        explore_steps=explore_steps,
        backend=backend,
    )
    scheduler = explore_then_finetune(optimizer, explore_steps, steps, warmup_steps=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=500)
    gradients = [torch.full_like(p, 0.1) for p in parameters]
    for step in range(steps):
        optimizer.zero_grad()
        loss = sum((p * g).sum() for p, g in zip(parameters, gradients, strict=True))
        scaler.scale(loss).backward()
        if step % 1000 == 500:
            parameters[0].grad[0] = math.inf
        scaler.step(optimizer, loss=loss.detach())
        scaler.update()
        scheduler.step()
        if step % 100 == 0:
            optimizer.history()
            optimizer.tempering_state()
    assert optimizer.phase == "finetune"
    assert int(optimizer._sampler.step) == steps - (steps + 499) // 1000
    return optimizer


def test_resident_memory_is_flat_over_ten_thousand_steps(compiled):
    """After a first run has loaded all code. Python asks for memory by the megabyte; a tensor kept from every
    step would be six."""
    train_with_everything(compiled, 2_000)
    gc.collect()
    start, objects = resident_bytes(), len(gc.get_objects())
    train_with_everything(compiled, 10_000)
    gc.collect()
    assert resident_bytes() - start < 3_000_000
    assert len(gc.get_objects()) - objects < 200


def test_gradients_are_not_kept(backend):
    """zero_grad() frees their memory, which the next backward needs."""
    (p,) = make_parameters([(100,)])
    optimizer = CTLD([p], num_data=10, backend=backend)
    for _ in range(3):
        p.grad = torch.ones(100)
        kept = weakref.ref(p.grad)
        optimizer.step(loss=1.0)
        optimizer.zero_grad()
        gc.collect()
        assert kept() is None
