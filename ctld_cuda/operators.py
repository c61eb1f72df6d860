"""The fused steps as operators ``torch.ops.ctld_cuda.explore`` and ``finetune``, for graphs of torch.compile.

Both take everything that a step depends on as arguments, and write only what their schema says; what they
are told last, the name of a cache, saves time and decides nothing. Eager steps do not come here: they call
their backend directly.

Arguments, for K parameters in G groups:
    parameters, momenta: written. Frozen and empty parameters are left out.
    gradients: of each parameter; None: zero.
    state: the tensors of a :class:`~ctld_cuda.state.State` in the order of its fields; written.
    memory: of each group what a learning rate leaves behind for the noise-free phase, both float64 (): the
        last positive one, and the momentum unit; 0 for none. Written.
    rates: of each group the learning rate as a tensor of one element; None where it is in ``numbers``.
    numbers: of each group learning rate, momentum, weight decay, and 1 to maximise, else 0.
    loss: as for ``CTLD.step``; None where neither alpha nor the history needs it.
    explored: counts this step if it is one of exploring, int64 (), on the CPU; None: counted elsewhere.
    grad_scale, found_inf: as torch.amp.GradScaler sets them; None without.
    plan: a :class:`Plan` as text.
    cache: name of a :class:`Cache`, or "".
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import backends, validation
from .backends.interface import Backend, LiveRate, StepInputs
from .coefficients import first_unit, of_exploring, of_finetuning
from .inspection import Found
from .layout import Slot
from .reference import Settings
from .state import State
from .tempering import TemperingConstants

Tensor = torch.Tensor

NUMBERS_PER_GROUP = 4

_SCHEMA = (
    "(Tensor(a!)[] parameters, Tensor(b!)[] momenta, Tensor?[] gradients, Tensor(c!)[] state, "
    "Tensor(d!)[] memory, Tensor(e!)? explored, Tensor?[] rates, float[] numbers, Tensor? loss, "
    "Tensor? grad_scale, Tensor? found_inf, str plan, str cache) -> ()"
)
_WRITTEN = ("parameters", "momenta", "state", "memory", "explored")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What stays the same from step to step.

    Attributes:
        backend: its name.
        chains: C, or None without chains.
        tempered: whether a step needs a loss.
        thermostat: whether the groups have thermostats.
        slots: of each parameter its noise index, its group, and the strides in whose order its elements
            count; () for row-major order whatever the strides.
        constants, settings: as for a backend.
    """

    backend: str
    chains: int | None
    tempered: bool
    thermostat: bool
    slots: tuple[tuple[int, int, tuple[int, ...]], ...]
    constants: TemperingConstants
    settings: Settings

    def text(self) -> str:
        """As JSON, which keeps every bit of a float."""
        return json.dumps(dataclasses.asdict(self) | {"settings": self.settings._asdict()})

    @staticmethod
    @functools.lru_cache(maxsize=32)
    def parse(text: str) -> Plan:
        fields = json.loads(text)
        fields["slots"] = tuple((index, group, tuple(strides)) for index, group, strides in fields["slots"])
        fields["constants"] = TemperingConstants(**fields["constants"])
        settings = fields["settings"]
        fields["settings"] = Settings(**settings | {"group_elements": tuple(settings["group_elements"])})
        return Plan(**fields)


# slots and their backend
_Kept = tuple[list[Slot], Backend]
_cache_numbers = itertools.count()
_caches: weakref.WeakValueDictionary[str, Cache] = weakref.WeakValueDictionary()


class Cache:
    """Keeps the backend of one optimizer from step to step, as long as the optimizer keeps the cache.

    Only for the optimizer's own tensors: the graph may hand over copies, which are different every time.
    """

    def __init__(self) -> None:
        self.name = f"ctld-{next(_cache_numbers)}"
        _caches[self.name] = self
        self._own: tuple[int, ...] = ()
        self._plan = ""
        self._kept: _Kept | None = None

    def of(self, tensors: Sequence[Tensor]) -> None:
        """From now on for these tensors."""
        self._own, self._kept = _addresses(tensors), None

    @staticmethod
    def find(name: str, tensors: Sequence[Tensor], plan: str, make: Callable[[], _Kept]) -> _Kept:
        """``make()``, or what it returned the last time for the same tensors and plan."""
        cache = _caches.get(name)
        if cache is None:
            return make()
        if _addresses(tensors) != cache._own:
            return make()
        if cache._kept is None or cache._plan != plan:
            cache._kept, cache._plan = make(), plan
        return cache._kept


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)


def _slot(
    parameter: Tensor, momentum: Tensor, index: int, group: int, strides: Sequence[int], chains: int
) -> Slot:
    slot = Slot(parameter.detach(), momentum, index, group, chains)
    if not strides:
        slot.direct = False
    elif not _same_layout(parameter, strides):
        raise RuntimeError(
            f"parameter {index} came with strides {parameter.stride()}, its elements count in the order of "
            f"{tuple(strides)}"
        )
    slot.address = parameter.data_ptr()
    slot.active = True
    return slot


def _same_layout(tensor: Tensor, strides: Sequence[int]) -> bool:
    """Whether every element is where ``strides`` say; those of dimensions of size 1 do not matter."""
    return all(a == b or n == 1 for a, b, n in zip(tensor.stride(), strides, tensor.shape, strict=True))


def _gradient(slot: Slot, gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    validation.usable_gradient(gradient, slot.dtype, slot.index)
    return slot.arranged(gradient)


def _found(slots: Sequence[Slot], gradients: Sequence[Tensor | None]) -> Found:
    arranged = [_gradient(slot, gradient) for slot, gradient in zip(slots, gradients, strict=True)]
    return Found(
        arranged,
        [0 if gradient is None else gradient.data_ptr() for gradient in arranged],
        [slot.address or 0 for slot in slots],
        (True,) * len(slots),
        [slot.parameter for slot in slots],
    )


class _Call:
    """The arguments of one call, checked and turned into what a backend takes."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        momenta: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        state: Sequence[Tensor],
        memory: Sequence[Tensor],
        explored: Tensor | None,
        rates: Sequence[Tensor | None],
        numbers: Sequence[float],
        loss: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        plan: str,
        cache: str,
    ) -> None:
        self.plan = Plan.parse(plan)
        self.device = state[0].device
        self.memory = list(zip(memory[::2], memory[1::2], strict=True))
        live_on = self.device if backends.on_device(self.plan.backend) else None
        self.hypers = []
        for g, rate in enumerate(rates):
            lr, momentum, weight_decay, maximize = numbers[
                NUMBERS_PER_GROUP * g : NUMBERS_PER_GROUP * (g + 1)
            ]
            options = {"lr": lr if rate is None else rate, "momentum": momentum, "weight_decay": weight_decay}
            self.hypers.append((*validation.hyper_parameters(options, live_on), maximize != 0.0))
            validation.thermostat(self.plan.thermostat, momentum)

        def make() -> _Kept:
            chains = self.plan.chains or 1
            slots = [
                _slot(parameter, momentum, *where, chains)
                for parameter, momentum, where in zip(parameters, momenta, self.plan.slots, strict=True)
            ]
            backend = backends.create(
                self.plan.backend, slots, State(*state), self.plan.constants, self.plan.settings
            )
            return slots, backend

        slots, self.backend = Cache.find(cache, (*parameters, *momenta, *state), plan, make)
        self.loss, self.explored = loss, explored
        self.records = State(*state).history.shape[0] > 0
        self.skipped = found_inf is not None and not self.backend.on_device and bool(found_inf != 0)
        self.inputs = StepInputs(
            _found(slots, gradients),
            [],
            [
                LiveRate(lr, *kept) if isinstance(lr, Tensor) else None
                for (lr, *_), kept in zip(self.hypers, self.memory, strict=True)
            ],
            None,
            self._here(grad_scale),
            self._here(found_inf),
        )

    def _here(self, scalar: Tensor | None) -> Tensor | None:
        return None if scalar is None else scalar.to(device=self.device, dtype=torch.float32)

    def explore(self) -> None:
        plan = self.plan
        # all learning rates 0 is how checkpointing tools initialise an optimizer: no step at all
        moving = any(isinstance(lr, Tensor) or lr > 0 for lr, *_ in self.hypers)
        loss = None
        if (plan.tempered and moving) or (self.loss is not None and (plan.tempered or self.records)):
            loss = validation.loss(self.loss, plan.chains, self.device)
        if not moving:
            return
        if self.explored is not None:
            self.explored.add_(1)
        if self.skipped:
            return
        self.inputs.groups.extend(
            of_exploring(
                plan.settings.integrator,
                *hyper,
                num_data=plan.settings.num_data,
                constants=plan.constants,
            )
            for hyper in self.hypers
        )
        inputs = self.inputs._replace(loss=loss)
        if plan.tempered:
            # nothing in a graph tells whether the stored one is that of these parameters
            self.backend.reduce_prior_energy(inputs)
        self.backend.explore(inputs)
        for (lr, *_), (last, _) in zip(self.hypers, self.memory, strict=True):
            if not isinstance(lr, Tensor) and lr > 0:
                last.fill_(lr)

    def finetune(self) -> None:
        if self.skipped:
            return
        for hyper, (last, unit) in zip(self.hypers, self.memory, strict=True):
            lr, momentum, *_ = hyper
            if not isinstance(lr, Tensor) and not unit:  # the first step of this phase
                unit.fill_(first_unit(float(last), lr, momentum, self.plan.settings.num_data))
            # a live rate's unit is none of the host's business
            known = 0.0 if isinstance(lr, Tensor) else float(unit)
            self.inputs.groups.append(of_finetuning(*hyper, unit=known))
        loss = None
        if self.records and self.loss is not None:
            loss = validation.loss(self.loss, self.plan.chains, self.device)
        self.backend.finetune(self.inputs._replace(loss=loss))


# a step reads numbers on the host and may move its table of addresses: not to be captured unseen
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("ctld_cuda::explore", mutates_args=_WRITTEN, schema=_SCHEMA, tags=_TAGS)
def explore(*arguments: Any) -> None:
    """One sampling step."""
    _Call(*arguments).explore()


@torch.library.custom_op("ctld_cuda::finetune", mutates_args=_WRITTEN, schema=_SCHEMA, tags=_TAGS)
def finetune(*arguments: Any) -> None:
    """One noise-free step."""
    _Call(*arguments).finetune()


@explore.register_fake
@finetune.register_fake
def _returns_nothing(*arguments: Any) -> None:
    return None
