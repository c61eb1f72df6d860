"""How it is learned: optimizers and samplers, all with the same number of gradient evaluations.

Optimizers, and samplers that end by fine-tuning, share one schedule: the learning rate is constant for the
share ``explore`` of the steps and then falls to 0 along half a cosine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch

from ctld_cuda import CTLD, AdaptiveForce, RMSPreconditioner, Tempering, suggest_tempering
from ctld_cuda.tempering import default_step_size

Tensor = torch.Tensor

MOMENTUM = 0.9
BIASES = {
    "hills": AdaptiveForce(),
    "no hills": AdaptiveForce(residual=None),
}


@dataclass(frozen=True)
class Setting:
    """What may differ between two runs of a method.

    Attributes:
        lr: learning rate.
        temperature: T0; None for optimizers.
        weight_decay: half of it times the squared norm of the parameters is added to the loss; AdamW: its own
            kind.
        explore: share of the steps at constant learning rate; for samplers, with noise.
        tempering: options of :class:`ctld_cuda.Tempering`; None: constant temperature. Its "bias" is one of
            ``BIASES``.
        thermostat: as in CTLD.
        adapt: share of the steps during which a preconditioner is learned; None: there is none.
    """

    lr: float
    temperature: float | None = None
    weight_decay: float = 0.0
    explore: float = 0.6
    tempering: dict[str, Any] | None = None
    thermostat: bool = False
    adapt: float | None = None

    def __str__(self) -> str:
        parts = [f"lr {self.lr:.3g}"]
        if self.temperature is not None:
            parts.append(f"T0 {self.temperature:.3g}")
        if self.weight_decay:
            parts.append(f"weight decay {self.weight_decay:.2g}")
        if self.adapt is not None:
            parts.append("preconditioned")
        if self.thermostat:
            parts.append("thermostat")
        return ", ".join(parts)


Factor = Callable[[float], float]


def annealed(explore: float) -> Factor:
    """Of the learning rate, by the share of the steps done: 1, then half a cosine to 0."""

    def factor(done: float) -> float:
        into = (done - explore) / max(1.0 - explore, 1e-9)
        return 0.5 * (1.0 + math.cos(math.pi * min(max(into, 0.0), 1.0)))

    return factor


CYCLES, NOISE_FREE = 4, 0.8


def cyclical(done: float) -> float:
    """Cycles of half a cosine each (Zhang et al. 2020)."""
    return 0.5 * (1.0 + math.cos(math.pi * (done * CYCLES % 1.0)))


class SGHMC(torch.optim.Optimizer):
    """Stochastic-gradient Hamiltonian Monte Carlo (Chen, Fox and Guestrin 2014), as a peer.

    v <- mu v - h g + noise of variance 2 (1 - mu) h T / N, theta <- theta + v, where g is the gradient of the
    mean loss and the prior's. With mu = 0 it is SGLD (Welling and Teh 2011).
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        momentum: float,
        num_data: int,
        seed: int,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.temperature = 0.0
        self._num_data = num_data
        device = self.param_groups[0]["params"][0].device
        self._generator = torch.Generator(device).manual_seed(seed)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            std = math.sqrt(2.0 * (1.0 - momentum) * lr * self.temperature / self._num_data)
            for p in group["params"]:
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.mul_(momentum).add_(p.grad + decay * p, alpha=-lr)
                if std:
                    noise = torch.randn(p.shape, generator=self._generator, device=p.device, dtype=p.dtype)
                    velocity.add_(noise, alpha=std)
                p.add_(velocity)


class Trainer:
    """One run of a method: knows when its parameters are a draw from its target.

    Args:
        optimizer: of torch or of this library.
        factor: of the learning rate, by the share of the steps done.
        steps: of the run.
    """

    # of the run, between two moments at which it is asked for a draw
    spacing = 0.01

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Factor, steps: int) -> None:
        self.optimizer = optimizer
        self._steps = steps
        self._factor = factor
        self._rates = [group["lr"] for group in optimizer.param_groups]

    def step(self, number: int, loss: Tensor) -> None:
        factor = self._factor(number / self._steps)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self.advance(number / self._steps, loss)

    def advance(self, done: float, loss: Tensor) -> None:
        self.optimizer.step()

    def is_draw(self, done: float) -> bool:
        """Whether the parameters after the share ``done`` of the steps count as a draw."""
        return False

    def remarks(self) -> dict[str, float]:
        """What else is worth keeping of the run."""
        return {}


BURN_IN = 0.5  # of the exploration


class CTLDTrainer(Trainer):
    """Samples, at constant or moving temperature, then fine-tunes.

    A moving temperature is seldom that of the target, so that draws are looked for more often.
    """

    def __init__(self, setting: Setting, *arguments: Any) -> None:
        super().__init__(*arguments)
        if setting.tempering is not None:
            self.spacing = 0.0025
        self._explore = setting.explore
        self._last: dict[str, float] = {}

    def advance(self, done: float, loss: Tensor) -> None:
        self.optimizer.step(loss=loss)

    def is_draw(self, done: float) -> bool:
        if not BURN_IN * self._explore <= done < self._explore:
            return False
        state = self.optimizer.tempering_state()
        self._last = {
            "kinetic_over_temperature": float(state["kinetic_temperature"] / state["temperature"]),
            "round_trips": float(state["round_trips"]),
        }
        return bool(state["at_target"])

    def remarks(self) -> dict[str, float]:
        return self._last


class SGLDTrainer(Trainer):
    """Noise to the end, vanishing with the learning rate."""

    def __init__(self, setting: Setting, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.optimizer.temperature = setting.temperature
        self._explore = setting.explore

    def is_draw(self, done: float) -> bool:
        return BURN_IN * self._explore <= done < self._explore


class CyclicalTrainer(SGLDTrainer):
    """The noise is off for the first part of each cycle, in which the sampler travels."""

    def __init__(self, setting: Setting, *arguments: Any) -> None:
        super().__init__(setting, *arguments)
        self._temperature = setting.temperature

    def advance(self, done: float, loss: Tensor) -> None:
        self.optimizer.temperature = self._temperature if self.is_draw(done) else 0.0
        super().advance(done, loss)

    def is_draw(self, done: float) -> bool:
        return done * CYCLES % 1.0 >= NOISE_FREE


_TEMPERING = Tempering()
DEFAULTS = {f.name: getattr(_TEMPERING, f.name) for f in fields(Tempering)} | {
    "bias": next(iter(BIASES)),
    "step_size": default_step_size(_TEMPERING, 1),
}


def without_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """Of tempering's options those that differ from the defaults: the same run is written the same way."""
    return {name: value for name, value in options.items() if value != DEFAULTS[name]}


def options_of(tempering: Tempering) -> dict[str, Any]:
    """For a setting: what differs from the defaults."""
    found = {f.name: getattr(tempering, f.name) for f in fields(tempering)}
    found["bias"] = next(name for name, bias in BIASES.items() if bias == tempering.bias)
    return without_defaults(found)


Make = Callable[[Setting, list[Tensor], int, int, int], Trainer]


def _plain(kind: type[torch.optim.Optimizer], **options: Any) -> Make:
    def make(setting: Setting, parameters: list[Tensor], num_data: int, steps: int, seed: int) -> Trainer:
        return Trainer(
            kind(parameters, lr=setting.lr, weight_decay=setting.weight_decay, **options),
            annealed(setting.explore),
            steps,
        )

    return make


def _ctld(setting: Setting, parameters: list[Tensor], num_data: int, steps: int, seed: int) -> Trainer:
    tempering = None
    if setting.tempering is not None:
        options = dict(setting.tempering)
        options["bias"] = BIASES[options.get("bias", "hills")]
        tempering = Tempering(**options)
    preconditioner = None
    if setting.adapt is not None:
        preconditioner = RMSPreconditioner(adapt_steps=max(1, round(setting.adapt * steps)))
    optimizer = CTLD(
        parameters,
        lr=setting.lr,
        momentum=MOMENTUM,
        weight_decay=setting.weight_decay,
        num_data=num_data,
        temperature=setting.temperature,
        tempering=tempering,
        explore_steps=round(setting.explore * steps),
        thermostat=setting.thermostat,
        preconditioner=preconditioner,
        seed=seed,
    )
    return CTLDTrainer(setting, optimizer, annealed(setting.explore), steps)


def _sgld(setting: Setting, parameters: list[Tensor], num_data: int, steps: int, seed: int) -> Trainer:
    optimizer = SGHMC(parameters, setting.lr, 0.0, num_data, seed, setting.weight_decay)
    return SGLDTrainer(setting, optimizer, annealed(setting.explore), steps)


def _cyclical(setting: Setting, parameters: list[Tensor], num_data: int, steps: int, seed: int) -> Trainer:
    optimizer = SGHMC(parameters, setting.lr, MOMENTUM, num_data, seed, setting.weight_decay)
    return CyclicalTrainer(setting, optimizer, cyclical, steps)


class Beginning(Protocol):
    """Of a :class:`.tasks.Task`, what says where a search begins."""

    rate: float
    temperature: float
    weight_decay: float | None
    explore: float
    steps: int
    averages: bool


@dataclass(frozen=True)
class Method:
    """
    Attributes:
        label: for tables.
        make: makes a run's trainer.
        start: where the search for good settings begins, with temperatures as multiples of the task's, and
            learning rates where ``relative``. A moving temperature moves as the library suggests for the
            length of the exploration, and has a thermostat where draws are what counts: they are to be draws
            at T0, not at T0 and the minibatches' heat.
        relative: whether learning rates are of SGD's kind, so that the search begins at a multiple of the
            task's.
        decay: weight decay where the search begins, as a multiple of the task's.
    """

    label: str
    make: Make = field(repr=False)
    start: Setting
    relative: bool = True
    decay: float = 1.0

    def begin(self, task: Beginning) -> Setting:
        """Where the search begins."""
        found = replace(self.start, explore=task.explore)
        if found.temperature is not None:
            found = replace(found, temperature=found.temperature * task.temperature)
        if self.relative:
            found = replace(found, lr=found.lr * task.rate)
        if task.weight_decay is not None:
            found = replace(found, weight_decay=self.decay * task.weight_decay)
        if found.tempering is None:
            return found
        moving = suggest_tempering(max(1, round(task.explore * task.steps)))
        return replace(found, tempering=options_of(moving), thermostat=task.averages)

    @property
    def samples(self) -> bool:
        return self.start.temperature is not None


MOVING: dict[str, Any] = {}  # as suggested for the length of the exploration
# of the steps, during which a preconditioner is learned: those before any draw
ADAPT = 0.3


def conditioned(adam: Setting, **changes: Any) -> Setting:
    """The setting of a preconditioned sampler that corresponds to one of AdamW."""
    return replace(adam, lr=(1.0 - MOMENTUM) * adam.lr, adapt=ADAPT, **changes)


ADAM, ADAMW = Setting(0.003), Setting(0.003, weight_decay=0.01)

METHODS = {
    "ctld": Method("CTLD", _ctld, Setting(1.0, 1.0, tempering=MOVING)),
    "sghmc": Method("SGHMC, then fine-tuning", _ctld, Setting(1.0, 1.0)),
    "ctld-rms": Method(
        "CTLD, preconditioned",
        _ctld,
        conditioned(ADAMW, temperature=1.0, tempering=MOVING),
        False,
        100.0,
    ),
    "sghmc-rms": Method(
        "SGHMC, preconditioned",
        _ctld,
        conditioned(ADAMW, temperature=1.0),
        False,
        100.0,
    ),
    "cyclical": Method("cyclical SGHMC", _cyclical, Setting(1.0, 1.0)),
    # without momentum steps are 1/(1 - MOMENTUM) times smaller
    "sgld": Method("SGLD", _sgld, Setting(10.0, 1.0)),
    "sgd": Method("SGD, momentum", _plain(torch.optim.SGD, momentum=MOMENTUM), Setting(1.0)),
    "adam": Method("Adam", _plain(torch.optim.Adam), ADAM, False, 0.1),
    "adamw": Method("AdamW", _plain(torch.optim.AdamW), ADAMW, False, 100.0),
    "rmsprop": Method("RMSprop", _plain(torch.optim.RMSprop), Setting(0.001), False, 0.1),
}
