"""Steps inside torch.compile: one graph, the bits of eager steps, and no new graph from step to step."""

import copy
import gc
import weakref

import pytest
import torch
from common import differing, make_parameters, noisy_quadratic, run, snapshot, two_groups
from conftest import require
from torch._dynamo.testing import CompileCounterWithBackend

from ctld_cuda import CTLD, Metadynamics, Tempering
from ctld_cuda.operators import Cache, Plan, _caches

SHAPES = [(4, 3), (37,), (5,)]
MOVING = Tempering(step_size=0.1)
EXACT = Tempering(coupling="exact", step_size=0.1)


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(optimizer, loss):
    optimizer.step(loss=loss)


class Compiled:
    """A compiled step in one graph, and the number of graphs that were made for it."""

    def __init__(self, backend="aot_eager", function=step, fullgraph=True, **options):
        self.counter = CompileCounterWithBackend(backend)
        self.function = torch.compile(function, backend=self.counter, fullgraph=fullgraph, **options)
        self.graphs = []

    def __call__(self, optimizer, steps, first=0):
        for number in range(first, first + steps):
            self.function(optimizer, noisy_quadratic(parameters_of(optimizer), number, optimizer.chains))
            self.graphs.append(self.counter.frame_count)
        return optimizer

    def last_change(self):
        """The last step that needed another graph."""
        return max(i for i, n in enumerate(self.graphs) if i == 0 or n != self.graphs[i - 1])


def host_side(optimizer):
    """What is saved besides tensors, with the numbers that may be in tensors as floats."""
    saved = optimizer.state_dict()
    groups = [
        {k: float(v or 0.0) if k in ("lr", "last_lr", "momentum_unit") else v for k, v in group.items()}
        for group in saved["param_groups"]
    ]
    sampler = groups[0].pop("sampler")
    return groups, {k: v for k, v in sampler.items() if k != "tensors"}


def assert_alike(expected, actual):
    assert differing(snapshot(expected), snapshot(actual)) == []
    assert host_side(expected) == host_side(actual)


# ------------------------------------------------------------------------------ the bits of eager steps

CASES = [
    {"tempering": MOVING},
    {"tempering": EXACT, "chains": 4, "shapes": [(4, 3), (4,), (4, 2, 2)]},
    {"tempering": None, "dtype": torch.bfloat16, "momentum_dtype": torch.bfloat16},
    {"tempering": MOVING, "dtype": torch.bfloat16, "integrator": "euler", "thermostat": True},
    {"tempering": Tempering(coupling="exact", bias=Metadynamics()), "dtype": torch.float64, "maximize": True},
    {"tempering": None, "temperature": 0.0, "dtype": torch.float16},
]


@pytest.mark.parametrize("options", CASES, ids=", ".join)
def test_through_both_phases(options, seed):
    require("cpu")
    options = {"shapes": SHAPES, "backend": "cpu", "explore_steps": 6, "seed": seed} | options
    compiled = Compiled()
    actual = compiled(two_groups(**options), 14)
    assert_alike(run(two_groups(**options), 14), actual)
    assert actual.phase == "finetune"
    assert compiled.last_change() <= 7  # the switch, and the step after it


REFERENCE_CASES = [
    {"tempering": MOVING, "shapes": [(7,)]},
    pytest.param({"tempering": None, "dtype": torch.bfloat16, "integrator": "euler"}, marks=pytest.mark.long),
    pytest.param(
        {"tempering": EXACT, "thermostat": True, "chains": 4, "shapes": [(4, 3)]}, marks=pytest.mark.long
    ),
]


@pytest.mark.parametrize("options", REFERENCE_CASES, ids=", ".join)
def test_the_reference_is_one_graph_of_torch_operations(options, seed):
    options = {"shapes": SHAPES[:2], "backend": "reference", "seed": seed} | options
    compiled = Compiled()
    actual = compiled(two_groups(**options), 6)
    assert compiled.last_change() == 0
    assert_alike(run(two_groups(**options), 6), actual)
    targets = {str(node.target) for graph in compiled.counter.graphs for node in graph.graph.nodes}
    assert not any("ctld_cuda" in target for target in targets) and len(targets) > 20


def test_the_reference_switches_to_finetuning():
    options = {"shapes": SHAPES[:1], "backend": "reference", "explore_steps": 3, "tempering": None}
    compiled = Compiled("eager")
    actual = compiled(two_groups(**options), 8)
    assert_alike(run(two_groups(**options), 8), actual)
    assert actual.phase == "finetune" and compiled.last_change() == 4


def test_inductor(seed):
    require("cpu")
    options = {"shapes": SHAPES, "backend": "cpu", "tempering": MOVING, "seed": seed}
    compiled = Compiled("inductor")
    actual = compiled(two_groups(**options), 5)
    assert_alike(run(two_groups(**options), 5), actual)
    assert compiled.last_change() == 0


@pytest.mark.long
@pytest.mark.parametrize("options", REFERENCE_CASES, ids=", ".join)
def test_inductor_with_the_reference(options, seed):
    """Inductor writes its own C++ for all operations of the step: without fused operations, the same bits."""
    options = {"shapes": [(401,), (4, 3)], "backend": "reference", "seed": seed} | options
    actual = Compiled("inductor")(two_groups(**options), 5)
    assert_alike(run(two_groups(**options), 5), actual)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_eager_and_compiled_steps_alternate(name):
    require(name)
    options = {"shapes": SHAPES[:2], "backend": name, "tempering": EXACT if name == "cpu" else None}
    expected, actual = two_groups(**options), two_groups(**options)
    compiled = Compiled("aot_eager" if name == "cpu" else "eager")
    first = 0
    for steps in (2, 3, 1, 2):
        run(expected, 2 * steps, first)
        run(actual, steps, first)
        compiled(actual, steps, first + steps)
        assert_alike(expected, actual)
        first += 2 * steps
    assert compiled.last_change() == 0
    # and into the phase without noise, whose unit is the last learning rate of an eager step
    for lr in (0.08, 0.03):
        for optimizer in (expected, actual):
            optimizer.param_groups[0]["lr"] = lr
            if lr == 0.08:
                run(optimizer, 1, first)
            else:
                optimizer.finetune()
    assert_alike(run(expected, 3, first + 1), compiled(actual, 3, first + 1))


@pytest.mark.filterwarnings("ignore:CTLD")
def test_states_go_from_compiled_to_eager_and_back():
    require("cpu")
    options = {"shapes": SHAPES, "backend": "cpu", "tempering": MOVING, "explore_steps": 7}
    expected = two_groups(**options)
    compiled = Compiled()
    original = compiled(two_groups(**options), 4)
    other = two_groups(**options | {"explore_steps": 9, "seed": 5})
    compiled(other, 1)  # used before
    with torch.no_grad():
        for p, q in zip(parameters_of(other), parameters_of(original), strict=True):
            p.copy_(q)
    other.load_state_dict(copy.deepcopy(original.state_dict()))
    other.explore_steps = 7
    compiled(other, 6, first=4)
    assert_alike(run(expected, 10), other)
    assert_alike(run(copy.deepcopy(original), 6, first=4), other)


def test_two_steps_in_one_graph_with_the_switch_between_them():
    require("cpu")

    def both(optimizer, loss):
        optimizer.step(loss=loss)
        optimizer.step(loss=loss)

    options = {"shapes": SHAPES, "backend": "cpu", "explore_steps": 3, "tempering": MOVING}
    actual = Compiled(function=both)(two_groups(**options), 3)
    expected = two_groups(**options)
    for number in range(3):
        both(expected, noisy_quadratic(parameters_of(expected), number))
    assert_alike(expected, actual)


# ------------------------------------------------------------------------------ memory and gradients


def unusual(backend, seed):
    """Parameters in the orders of memory that a step has to respect, and two of which one can be frozen."""
    torch.manual_seed(seed % 2**32)
    values = [
        torch.randn(4, 6).t(),
        torch.randn(8, 6).t()[:, ::2],
        torch.randn(7),
        torch.randn(9),
    ]
    if backend == "cpu":
        more = torch.randn(2, 3, 4, 2).to(memory_format=torch.channels_last), torch.randn(6, 8)[:, ::2]
        values += [*more, torch.randn(()), torch.randn(0, 3)]
    parameters = [torch.nn.Parameter(value) for value in values]
    parameters[2].requires_grad_(False)
    tempering = MOVING if backend == "cpu" else None
    return CTLD(parameters, backend=backend, num_data=10, tempering=tempering, weight_decay=0.1)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_layouts_frozen_and_idle_parameters(name, seed):
    require(name)
    expected, actual = unusual(name, seed), unusual(name, seed)
    before = parameters_of(actual)[2].detach().clone()
    compiled = Compiled("aot_eager" if name == "cpu" else "eager")

    def gradients(optimizer, number):
        noisy_quadratic(parameters_of(optimizer), number)
        parameters = parameters_of(optimizer)
        parameters[3].grad = None
        if number > 0 or name == "reference":  # another layout than the parameter's
            for p in parameters[:2]:
                p.grad = p.grad.contiguous()
        parameters[2].requires_grad_(number == 2)
        return torch.tensor(0.1 * number)

    # a graph of the reference takes seconds
    for number in range(3 if name == "cpu" else 1):
        expected.step(loss=gradients(expected, number))
        compiled.function(actual, gradients(actual, number))
        assert differing(snapshot(expected), snapshot(actual)) == [], number
    # trained as soon as it is not frozen any more
    assert torch.equal(parameters_of(actual)[2], before) == (name == "reference")


def test_gradients_come_and_go():
    require("cpu")
    expected, actual = (two_groups(SHAPES, backend="cpu", tempering=None) for _ in range(2))
    compiled = Compiled()
    for number in range(4):
        run(expected, 1, number)
        compiled(actual, 1, number)
        for optimizer in (expected, actual):
            optimizer.zero_grad(set_to_none=number % 2 == 0)
    expected.step()
    compiled.function(actual, None)
    assert_alike(expected, actual)


def test_new_constants_reach_the_graph():
    require("cpu")
    expected, actual = (two_groups(SHAPES, backend="cpu", tempering=EXACT) for _ in range(2))
    compiled = Compiled()
    run(expected, 2)
    compiled(actual, 2)
    for optimizer in (expected, actual):
        optimizer.set_energy_noise(3.0)
    run(expected, 2, 2)
    compiled(actual, 2, 2)
    for optimizer in (expected, actual):
        optimizer.add_param_group({"params": make_parameters([(3,)], seed=9), "lr": 0.01})
    run(expected, 2, 4)
    assert_alike(expected, compiled(actual, 2, 4))


@pytest.mark.parametrize("dynamic", [False, True])
def test_settings_of_torch_compile_make_no_more_graphs(dynamic):
    require("cpu")
    compiled = Compiled(dynamic=dynamic)
    expected, actual = (two_groups(SHAPES, backend="cpu", tempering=MOVING) for _ in range(2))
    assert_alike(run(expected, 20), compiled(actual, 20))
    assert compiled.last_change() == 0


def test_hooks_run():
    require("cpu")
    called = []
    optimizer = two_groups(SHAPES, backend="cpu")
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    Compiled()(optimizer, 2)
    assert called == ["before", "after"] * 2


def test_a_loss_that_belongs_to_a_graph_of_autograd():
    require("cpu")

    def undetached(optimizer, _):
        loss = sum((p * p).sum() for p in parameters_of(optimizer))
        optimizer.step(loss=loss)

    expected, actual = (two_groups([(3,), (2,)], backend="cpu", tempering=MOVING) for _ in range(2))
    Compiled(function=undetached)(actual, 2)
    for number in range(2):
        noisy_quadratic(parameters_of(expected), number)
        undetached(expected, None)
    assert_alike(expected, actual)


def test_two_optimizers_alike():
    require("cpu")
    compiled = Compiled()
    made = [two_groups(SHAPES, backend="cpu", seed=s, tempering=MOVING) for s in (1, 2)]
    for number in range(4):
        for optimizer in made:
            compiled(optimizer, 1, number)
    for optimizer, s in zip(made, (1, 2), strict=True):
        assert_alike(run(two_groups(SHAPES, backend="cpu", seed=s, tempering=MOVING), 4), optimizer)
    assert compiled.last_change() == 1  # one graph for each of them


def test_graphs_do_not_keep_an_optimizer_alive():
    require("cpu")
    optimizer = two_groups(SHAPES, backend="cpu")
    compiled = Compiled("inductor")
    compiled(optimizer, 2)
    name, parameter = optimizer._graph.cache_name, weakref.ref(parameters_of(optimizer)[0])
    assert name in _caches
    del optimizer
    torch._dynamo.reset()
    del compiled
    gc.collect()
    assert name not in _caches and parameter() is None


# ------------------------------------------------------------------------------ whole training steps


def training(compile_with=None, closure=False, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    optimizer = CTLD(model.parameters(), num_data=50, backend="cpu", explore_steps=4, **options)
    inputs, targets = torch.randn(20, 6), torch.randn(20, 2)

    def plain():
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step(loss=loss.detach())
        return loss.detach()

    def with_closure():
        def evaluate():
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            return loss

        return optimizer.step(evaluate).detach()

    train = with_closure if closure else plain
    if compile_with:
        train = torch.compile(train, backend=compile_with)
    return optimizer, [train().item() for _ in range(8)]


@pytest.mark.parametrize("closure", [False, True])
def test_a_training_step(closure):
    require("cpu")
    expected, losses = training(closure=closure)
    actual, compiled_losses = training("aot_eager", closure)
    assert losses == compiled_losses and losses[-1] < losses[0]
    assert_alike(expected, actual)


def test_gradients_made_in_the_same_graph():
    """Forward, torch.func gradients and step without a break."""
    require("cpu")

    def train(optimizer, targets):
        parameters = parameters_of(optimizer)

        def objective(values):
            return sum(((value - targets) ** 2).sum() for value in values)

        gradients, loss = torch.func.grad_and_value(objective)([p.detach() for p in parameters])
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        optimizer.step(loss=loss)

    compiled = Compiled(function=train)
    expected, actual = (two_groups([(6,), (6,)], backend="cpu", tempering=MOVING) for _ in range(2))
    targets = torch.arange(6.0)
    for _ in range(3):
        train(expected, targets)
        compiled.function(actual, targets)
    assert_alike(expected, actual)


# ------------------------------------------------------------------------------ learning rates


def test_a_float_set_in_the_graph():
    require("cpu")

    def at(optimizer, loss):
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0.5
        optimizer.step(loss=loss)

    expected, actual = (two_groups(SHAPES, backend="cpu", tempering=MOVING) for _ in range(2))
    compiled = Compiled(function=at)
    for number in range(3):
        at(expected, noisy_quadratic(parameters_of(expected), number))
        compiled(actual, 1, number)
    for group in actual.param_groups:
        group.pop("capturable", None)  # which torch puts into groups that a graph writes to
    assert_alike(expected, actual)


def test_a_float_costs_a_graph_when_it_changes():
    require("cpu")
    expected, actual = (two_groups(SHAPES, backend="cpu", tempering=MOVING) for _ in range(2))
    compiled = Compiled()
    for number, factor in enumerate((1.0, 1.0, 0.5, 0.5)):
        for optimizer in (expected, actual):
            for group, lr in zip(optimizer.param_groups, (0.05, 0.02), strict=True):
                group["lr"] = lr * factor
        run(expected, 1, number)
        compiled(actual, 1, number)
    assert_alike(expected, actual)
    assert compiled.last_change() == 2


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
def test_a_tensor_follows_a_schedule_without_new_graphs():
    require("cpu")

    def scheduled(go, as_tensor):
        optimizer = two_groups(SHAPES, backend="cpu", tempering=MOVING)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64) if as_tensor else group["lr"]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.8**n if n != 5 else 0.0)
        for number in range(12):
            if number == 7:
                optimizer.finetune()
            go(optimizer, 1, number)
            scheduler.step()
        return optimizer

    # torch's schedulers wrap step() in something that is never traced: no fullgraph
    compiled = Compiled(fullgraph=False)
    assert_alike(scheduled(run, False), scheduled(compiled, True))
    assert compiled.last_change() == 7  # the other phase


# ------------------------------------------------------------------------------ mixed precision


def test_a_gradient_scaler():
    require("cpu")

    def scaled(compile_it):
        optimizer = two_groups(SHAPES, backend="cpu", tempering=MOVING, explore_steps=4)
        if compile_it:
            optimizer.step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        parameters = parameters_of(optimizer)
        for number in range(8):
            loss = noisy_quadratic(parameters, number)
            for p in parameters:
                p.grad *= scaler.get_scale()
            if number in (1, 5):
                parameters[0].grad[0] = torch.inf
            scaler.scale(torch.zeros(()))
            scaler.step(optimizer, loss=loss)
            scaler.update()
        return optimizer

    expected, actual = scaled(False), scaled(True)
    assert int(expected._sampler.step) == 6
    assert_alike(expected, actual)


# ------------------------------------------------------------------------------ bad input

WRONG = {
    "no loss": (ValueError, "needs the mean minibatch loss", lambda o: o.step()),
    "shape": (ValueError, "the loss must be a scalar", lambda o: o.step(loss=torch.ones(3))),
    "lr": (ValueError, "lr must not be negative", lambda o: set_option(o, "lr", -1.0)),
    "momentum": (ValueError, "momentum must be below 1", lambda o: set_option(o, "momentum", 1.5)),
}


def set_option(optimizer, name, value):
    optimizer.param_groups[0][name] = value
    optimizer.step(loss=torch.ones(()))


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_refused_as_in_eager_steps(wrong):
    require("cpu")
    optimizer = run(two_groups(SHAPES, backend="cpu"), 1)
    before = snapshot(optimizer)
    error, sentence, attempt = WRONG[wrong]
    with pytest.raises(error, match=sentence):
        torch.compile(attempt, backend="aot_eager", fullgraph=True)(optimizer)
    assert differing(before, snapshot(optimizer)) == [] and optimizer._progress.total == 1


def test_several_ranks_are_refused(monkeypatch):
    require("cpu")
    optimizer = run(two_groups(SHAPES, backend="cpu"), 1)
    before = snapshot(optimizer)
    monkeypatch.setattr(optimizer, "_ranks", object())
    with pytest.raises(RuntimeError, match=r"leave it out of torch\.compile"):
        torch.compile(step, backend="eager")(optimizer, torch.ones(()))
    assert differing(before, snapshot(optimizer)) == []


def test_what_the_reference_cannot_do_in_a_graph():
    expected, actual = (run(two_groups(SHAPES, backend="reference"), 1) for _ in range(2))
    before = snapshot(actual)
    for optimizer in (expected, actual):
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="learning rates that are floats"):
        torch.compile(step, backend="eager", fullgraph=True)(actual, torch.ones(()))
    assert differing(before, snapshot(actual)) == []
    step(expected, torch.ones(()))
    torch.compile(step, backend="eager")(actual, torch.ones(()))  # not in a graph, then
    assert_alike(expected, actual)


# ------------------------------------------------------------------------------ the operators themselves


def arguments(dtype=torch.float32, live=False, **options):
    """Of the operators, for one step of an optimizer."""
    optimizer = run(two_groups(SHAPES[:2], dtype=dtype, **options), 3)
    loss = noisy_quadratic(parameters_of(optimizer), 3, optimizer.chains)
    optimizer._prepare_graph()
    graph = optimizer._graph
    rates, numbers, memory = [], [], []
    for group in optimizer.param_groups:
        rates.append(torch.tensor(group["lr"], dtype=torch.float64) if live else None)
        numbers += [group["lr"], group["momentum"], group["weight_decay"], 0.0]
        memory += [torch.tensor(group["lr"], dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    return (
        [p.detach() for p in graph.parameters],
        graph.momenta,
        [p.grad for p in graph.parameters[:-1]] + [None],
        graph.state,
        memory,
        torch.zeros((), dtype=torch.int64) if live else None,
        rates,
        numbers,
        loss if optimizer.tempering else None,
        torch.tensor(1.0) if live else None,
        torch.tensor(0.0) if live else None,
        graph.plan,
        "",
    )


SAMPLES = [
    {"backend": "cpu", "tempering": MOVING},
    {"backend": "cpu", "tempering": None, "dtype": torch.bfloat16, "live": True},
    {"backend": "cpu", "tempering": EXACT, "thermostat": True, "integrator": "euler", "live": True},
    {"backend": "reference", "tempering": MOVING, "dtype": torch.float64},
]


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
@pytest.mark.parametrize("name", ["explore", "finetune"])
def test_opcheck(name, sample):
    require(sample["backend"])
    torch.library.opcheck(getattr(torch.ops.ctld_cuda, name).default, arguments(**sample))


def test_the_schema_says_what_is_written():
    for operator in (torch.ops.ctld_cuda.explore.default, torch.ops.ctld_cuda.finetune.default):
        written = {a.name for a in operator._schema.arguments if a.alias_info and a.alias_info.is_write}
        assert written == {"parameters", "momenta", "state", "memory", "explored"}
        assert operator._schema.returns == []


def test_a_plan_survives_as_text():
    optimizer = two_groups(SHAPES, backend="reference", seed=2**64 - 1, thermostat=True, tempering=EXACT)
    optimizer._prepare_graph()
    plan = Plan.parse(optimizer._graph.plan)
    assert plan.settings == optimizer._settings and plan.constants == optimizer._constants
    assert Plan.parse(plan.text()) == plan


def test_a_cache_is_for_its_own_tensors_only():
    own, copies = [torch.zeros(3)], [torch.zeros(3)]
    cache = Cache()
    cache.of(own)
    kept = Cache.find(cache.name, own, "plan", object)
    assert Cache.find(cache.name, copies, "plan", object) is not kept
    assert Cache.find(cache.name, own, "plan", object) is kept
    assert Cache.find(cache.name, own, "another plan", object) is not kept
    assert Cache.find("", own, "plan", object) is not Cache.find("", own, "plan", object)


def test_an_operator_refuses_another_layout():
    require("cpu")
    sample = list(arguments(backend="cpu", tempering=None))
    sample[0][0] = sample[0][0].t().contiguous().t()
    with pytest.raises(RuntimeError, match="its elements count in the order of"):
        torch.ops.ctld_cuda.explore(*sample)
