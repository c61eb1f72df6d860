"""The path of ``CTLD.step`` under torch.compile: nothing but what can become a graph.

With the compiled backends a step is one operator of :mod:`ctld_cuda.operators`, which looks at numbers and
addresses when the graph runs. With the reference all its torch operations are in the graph, and the numbers
are constants of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import operators, reference, validation
from .coefficients import first_unit, of_exploring, of_finetuning
from .layout import FlatTensor, in_memory_order
from .state import EXPLORE

if TYPE_CHECKING:
    from .optimizer import CTLD

Tensor = torch.Tensor

REMEMBERED = ("last_lr", "momentum_unit")


class Graph:
    """What the trace of a step reads; made while it is traced, outside of the graph.

    Attributes:
        parameters, momenta: of the parameters that are trained.
        idle: the other parameters, frozen or empty.
        members: of each of them its noise index, its group, and its dimensions in the order of its elements.
        state: the sampler's tensors.
        groups: the parameter groups themselves.
        memory: ``last_lr`` and ``momentum_unit`` of each group as tensors that an operator can write; the
            groups follow when somebody reads them (:func:`collect`). Empty with the reference.
        plan, cache: as for the operators.
        seed, numbers: the seed, and of each group the floats in it by name, as text: what torch.compile has
            seen change becomes a variable of the graph, text never does.
    """

    def __init__(self, optimizer: CTLD, cache: operators.Cache) -> None:
        chains = optimizer.chains or 1
        active = [s for s in optimizer._slots if s.parameter.requires_grad and s.parameter.numel() > 0]
        self.parameters = [s.parameter for s in active]
        self.idle = [s.parameter for s in optimizer._slots if s not in active]
        self.momenta = [s.momentum for s in active]
        self.state = list(optimizer._sampler.all_tensors().values())
        self.groups = list(optimizer.param_groups)
        fused = optimizer._backend_name != "reference"
        self.memory = [_memory(g, name) for g in self.groups for name in REMEMBERED] if fused else []
        self.members = tuple((s.index, s.group, _order(s.parameter, chains)) for s in active)
        self.settings = optimizer._settings
        self.seed = str(optimizer.seed)
        self.numbers = [{k: repr(v) for k, v in g.items() if isinstance(v, float)} for g in self.groups]
        self.cache = cache
        self.cache_name = cache.name
        cache.of((*self.parameters, *self.momenta, *self.state))
        self.plan = operators.Plan(
            backend=optimizer._backend_name,
            chains=optimizer.chains,
            tempered=optimizer.tempering is not None,
            thermostat=optimizer.thermostat,
            slots=tuple((s.index, s.group, s.strides if s.direct else ()) for s in active),
            constants=optimizer._constants,
            settings=self.settings,
        ).text()


def _order(parameter: Tensor, chains: int) -> tuple[int, ...]:
    """Dimensions from the outermost to the innermost in the order of the elements."""
    dims = range(parameter.dim())
    if not in_memory_order(parameter, chains):
        return tuple(dims)
    strides = parameter.stride()
    return tuple(sorted(dims, key=lambda d: (-strides[d], parameter.shape[d])))


def prepare(optimizer: CTLD) -> None:
    """Brings the optimizer into the form that the trace reads. Runs when a step is traced, not later.

    Raises:
        RuntimeError: for what cannot be traced.
    """
    optimizer._prepare()
    if optimizer._ranks is not None:
        raise RuntimeError(
            "CTLD.step() over several ranks cannot be compiled yet: leave it out of torch.compile"
        )
    if optimizer.preconditioner is not None:
        raise RuntimeError(
            "CTLD.step() with a preconditioner cannot be compiled yet: leave it out of torch.compile"
        )
    for slot in optimizer._slots:
        slot.inspect()
        if is_traceable_wrapper_subclass(slot.source):
            raise RuntimeError(
                f"parameter {slot.index} is a {type(slot.source).__name__}: leave CTLD.step() out of "
                "torch.compile, which cannot trace it with such parameters yet"
            )
    collect(optimizer)
    cache = operators.Cache() if optimizer._graph is None else optimizer._graph.cache
    optimizer._graph = Graph(optimizer, cache)


def _memory(group: dict[str, Any], name: str) -> Tensor:
    lr, own = group["lr"], group[name]
    where = lr.device if isinstance(lr, Tensor) else torch.device("cpu")
    if isinstance(own, Tensor) and own.device == where:
        return own
    return torch.full((), float(own or 0.0), dtype=torch.float64, device=where)


def _remembered(optimizer: CTLD) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Groups, names and tensors of what is not in the groups themselves."""
    graph = optimizer._graph
    if graph is None or not graph.memory:
        return
    names = [(group, name) for group in graph.groups for name in REMEMBERED]
    for (group, name), tensor in zip(names, graph.memory, strict=True):
        if group[name] is not tensor:
            yield group, name, tensor


def collect(optimizer: CTLD) -> None:
    """Brings what compiled steps remember into the parameter groups, for everybody else to read."""
    for group, name, tensor in _remembered(optimizer):
        # nobody waits for a device
        group[name] = tensor if tensor.is_cuda else float(tensor) or None


def hand_over(optimizer: CTLD) -> None:
    """Tells compiled steps what an eager step has left in the parameter groups."""
    for group, name, tensor in _remembered(optimizer):
        tensor.fill_(0.0 if group[name] is None else group[name])


def step(optimizer: CTLD, loss: Any) -> Any:
    """One step with the gradients in ``.grad``; returns the loss. See ``CTLD.step``."""
    optimizer._prepare_graph()
    graph: Graph = optimizer._graph  # type: ignore[assignment]  # made just now
    for p in graph.idle:
        p.requires_grad  # noqa: B018 (looked at, so that unfreezing asks for another graph)
    progress = optimizer._progress
    counting = optimizer.explore_steps is not None
    if counting and progress.phase == EXPLORE and progress.explored == optimizer.explore_steps:
        optimizer.finetune()
    exploring = progress.phase == EXPLORE
    gradients = [p.grad for p in graph.parameters]
    if optimizer._backend_name == "reference":
        _reference(optimizer, graph, gradients, loss, exploring)
    else:
        _operator(optimizer, graph, gradients, loss, exploring)
    if exploring and counting and any(_is_positive(group["lr"]) for group in graph.groups):
        progress.explored += 1
    return loss


def _is_positive(lr: float | Tensor) -> bool:
    """Or might be: nobody waits for a tensor."""
    return isinstance(lr, Tensor) or lr > 0


def _operator(
    optimizer: CTLD, graph: Graph, gradients: list[Tensor | None], loss: Any, exploring: bool
) -> None:
    rates, numbers = [], []
    for group in graph.groups:
        lr = group["lr"]
        live = isinstance(lr, Tensor)
        rates.append(lr if live else None)
        numbers += [
            0.0 if live else float(lr),
            float(group["momentum"]),
            float(group["weight_decay"]),
            1.0 if group["maximize"] else 0.0,
        ]
    device = graph.state[0].device
    operator = torch.ops.ctld_cuda.explore if exploring else torch.ops.ctld_cuda.finetune
    operator(
        graph.parameters,
        graph.momenta,
        gradients,
        graph.state,
        graph.memory,
        # what only the graph counts makes no new graphs
        optimizer._progress.in_graphs if exploring and optimizer.explore_steps is None else None,
        rates,
        numbers,
        _as_tensor(loss, device) if exploring or optimizer._history_steps else None,
        _as_tensor(getattr(optimizer, "grad_scale", None), device),
        _as_tensor(getattr(optimizer, "found_inf", None), device),
        graph.plan,
        graph.cache_name,
    )


def _as_tensor(value: Any, device: torch.device) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    return torch.full((), float(value), dtype=torch.float64, device=device)


def _reference(
    optimizer: CTLD, graph: Graph, gradients: list[Tensor | None], loss: Any, exploring: bool
) -> None:
    if getattr(optimizer, "found_inf", None) is not None:
        raise RuntimeError("backend 'reference' cannot skip steps for a GradScaler inside torch.compile")
    constants = [_constants_of(*pair) for pair in zip(graph.groups, graph.numbers, strict=True)]
    # floats: no device reads them here
    hypers: list[tuple[float, float, float]] = [
        validation.hyper_parameters(group)  # type: ignore[misc]
        for group in constants
    ]
    for _, momentum, _ in hypers:
        validation.thermostat(optimizer.thermostat, momentum)
    settings = graph.settings._replace(seed=int(graph.seed))
    state, c = optimizer._sampler, optimizer._constants
    moving = not exploring or any(lr > 0 for lr, _, _ in hypers)
    energy = None
    tempered = exploring and optimizer.tempering is not None
    if (tempered and moving) or (loss is not None and (tempered or optimizer._history_steps)):
        energy = validation.loss(loss, optimizer.chains, state.step.device).double()
    flats = [
        _flat(p, m, g, member)
        for p, m, g, member in zip(graph.parameters, graph.momenta, gradients, graph.members, strict=True)
    ]
    if not exploring:
        coefficients = []
        for group, known, hyper in zip(graph.groups, constants, hypers, strict=True):
            unit = known["momentum_unit"]
            if not unit:  # the first step of this phase
                unit = first_unit(known["last_lr"], hyper[0], hyper[1], settings.num_data)
                group["momentum_unit"] = unit
            coefficients.append(of_finetuning(*hyper, group["maximize"], unit=unit))
        kept = None if energy is None else reference.loss_energy(energy, c)
        reference.finetune(flats, coefficients, state, settings, energy=kept)
    elif moving:
        coefficients = []
        for group, hyper in zip(graph.groups, hypers, strict=True):
            if hyper[0] > 0:
                group["last_lr"] = hyper[0]
            coefficients.append(
                of_exploring(
                    settings.integrator,
                    *hyper,
                    group["maximize"],
                    num_data=settings.num_data,
                    constants=c,
                )
            )
        if c.bins:
            reference.reduce_prior_energy(flats, coefficients, state)
        reference.explore(flats, coefficients, energy, state, c, settings)
        if optimizer.explore_steps is None:
            optimizer._progress.in_graphs.add_(1)
    else:
        return
    for p, flat, (_, _, order) in zip(graph.parameters, flats, graph.members, strict=True):
        _write_back(p, flat.theta, order)


def _constants_of(group: dict[str, Any], texts: dict[str, str]) -> dict[str, Any]:
    """The numbers of a group as constants of the graph, which is made anew where one changes."""
    if isinstance(group["lr"], Tensor):
        raise RuntimeError(
            "backend 'reference' needs learning rates that are floats inside torch.compile: it would have to "
            "wait for a tensor"
        )
    constants = {}
    for name in ("lr", "momentum", "weight_decay", *REMEMBERED):
        value = group[name]
        if name in texts:
            constant = float(texts[name])
            value = constant if value == constant else value
        constants[name] = value
    return constants


def _flat(
    p: Tensor, momentum: Tensor, gradient: Tensor | None, member: tuple[int, int, tuple[int, ...]]
) -> FlatTensor:
    index, group, order = member
    if gradient is not None:
        validation.usable_gradient(gradient, p.dtype, index)
        gradient = gradient.detach().permute(order).reshape(-1)
    theta = p.detach().permute(order).reshape(-1)
    return FlatTensor(theta, momentum.permute(order).view(-1), gradient, index, group)


def _write_back(p: Tensor, theta: Tensor, order: tuple[int, ...]) -> None:
    """Where the flat parameter had to be a copy."""
    if not p.permute(order).is_contiguous():
        p.detach().permute(order).copy_(theta.view([p.shape[d] for d in order]))
