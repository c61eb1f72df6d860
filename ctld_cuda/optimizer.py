"""The CTLD optimizer: owns tensors and options, leaves the arithmetic to a backend."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from . import backends, diagnostics, distributed, persistence, traced, validation
from .backends import extension
from .backends.interface import LiveRate, StepInputs
from .coefficients import first_unit, of_exploring, of_finetuning
from .inspection import Inspector
from .layout import Slot
from .preconditioner import Coordinates, RMSPreconditioner, check_parameters, check_preconditioner
from .reference import (
    Coefficients,
    Settings,
    adapt_friction,
    compute_dtype,
    kinetic_temperature,
    kinetic_unit,
    record_kinetic,
)
from .state import EXPLORE, FINETUNE, Progress, State
from .tempering import Tempering, TemperingConstants, resolve
from .trainers import NotedLosses, unwrapped

Tensor = torch.Tensor
# learning rate, momentum, weight decay
Hypers = tuple[float | Tensor, float, float]

_version = attrgetter("_version")
_NO_GRADIENTS = (
    "CTLD: no parameter has a gradient, so all of them only feel the noise: call loss.backward() before "
    "step(), and zero_grad() after it"
)


def _capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class CTLD(Optimizer):
    """Continuously tempered Langevin dynamics (Ye, Zhu and Mantiuk, NIPS 2017, arXiv:1703.04379).

    Explores by sampling, with a temperature that is a dynamical variable coupled to the energy, then
    fine-tunes as momentum SGD without noise. ``docs/method.md`` explains the method,
    :mod:`ctld_cuda.reference` defines every operation.

    Args:
        params: parameters or parameter groups; a group may set its own ``lr``, ``momentum``,
            ``weight_decay`` and ``maximize``.
        lr: learning rate h, exactly that of ``torch.optim.SGD(lr, momentum)``; float or 0-dim tensor.
        momentum: momentum coefficient in [0, 1); the friction of the dynamics.
        num_data: number N of training examples. The loss is the mean over a minibatch.
        temperature: base temperature T0. 1 samples the posterior, < 1 a "cold" posterior, 0 switches
            the noise off.
        weight_decay: Gaussian prior: adds weight_decay * theta to the gradient of the mean loss.
        integrator: "baoab" (default: no discretisation bias on harmonic targets) or "euler" (SGHMC's).
        tempering: a :class:`~ctld_cuda.Tempering`, or None for constant temperature.
        explore_steps: fine-tune after this many steps, those skipped by a GradScaler included; None: only
            when :meth:`finetune` is called.
        chains: C independent chains: every parameter has a leading dimension C, the loss has shape (C,).
            Chains have their own alpha and share one bias.
        seed: 64-bit seed of the noise, which is a pure function of seed, step, parameter and element.
        backend: "cuda", "cpu", "reference", or None for the fastest that applies. All give the same bits.
        maximize: maximise the loss (a log likelihood) instead of minimising it.
        stochastic_rounding: round what is stored in bfloat16 up or down at random, with the right mean:
            steps far below bfloat16's resolution still move a parameter, so it needs no float32 copy.
            False: to nearest, where they are lost.
        momentum_dtype: torch.bfloat16 stores the momenta of bfloat16 parameters in bfloat16, 4 bytes of
            memory and traffic less per parameter; None: in float32. float64 parameters have float64
            momenta, all others float32.
        thermostat: absorb the heat of noisy gradients: a Nose-Hoover thermostat for each parameter group
            (SGNHT; Ding et al. 2014) adds friction until the parameters are sampled at the temperature asked
            for. Needs momentum > 0. Off by default, because exact gradients need none.
        process_group: the ranks that step the same parameters together and share one energy, the mean of
            their losses: "auto", the default process group where torch.distributed is initialized, or a
            ProcessGroup. None: this process samples on its own. DTensor parameters (FSDP2) name their ranks
            themselves.
        preconditioner: an :class:`~ctld_cuda.RMSPreconditioner`, which gives each parameter a learning rate
            of its own, as Adam does; ``lr`` then is Adam's times 1 - momentum. None: all have ``lr``.
        history: keep alpha, T, energy and kinetic temperature of the last so many steps on the device, for
            :meth:`history`; None: of none. 32 bytes per step and chain.

    A learning rate that is a tensor on the GPU is read by the GPU, so a captured CUDA graph follows it. With
    ``torch.amp.GradScaler`` call ``scaler.step(optimizer, loss=loss)`` with the unscaled loss: the kernel
    unscales the gradients, and a step with infinite gradients changes nothing.

    Raises:
        ValueError, TypeError: for arguments outside their range, before anything is allocated.
        RuntimeError: if the backend asked for cannot be used here.
    """

    # GradScaler then leaves unscaling and skipping to step()
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.03,
        momentum: float = 0.9,
        num_data: float | None = None,
        temperature: float = 1.0,
        weight_decay: float = 0.0,
        integrator: str = "baoab",
        tempering: Tempering | None = Tempering(),  # noqa: B008 (frozen)
        explore_steps: int | None = None,
        chains: int | None = None,
        seed: int = 0,
        backend: str | None = None,
        *,
        maximize: bool = False,
        stochastic_rounding: bool = True,
        momentum_dtype: torch.dtype | None = None,
        thermostat: bool = False,
        process_group: Any = "auto",
        preconditioner: RMSPreconditioner | None = None,
        history: int | None = None,
    ) -> None:
        distributed.check_group(process_group)
        validation.flag("thermostat", thermostat)
        check_preconditioner(preconditioner)
        if history is not None:
            validation.integer("history", history, 1)
        validation.rounding(stochastic_rounding, momentum_dtype)
        validation.settings(num_data, temperature, integrator, tempering, explore_steps, chains, seed)
        self.num_data = float(num_data)  # type: ignore[arg-type]  # settings() has refused None
        self.temperature = float(temperature)
        self.integrator = integrator
        self.tempering = tempering
        self.explore_steps = explore_steps
        self.chains = chains
        self.seed = seed
        self.stochastic_rounding = stochastic_rounding
        self.momentum_dtype = momentum_dtype
        self.thermostat = thermostat
        self.process_group = process_group
        self.preconditioner = preconditioner
        self._coordinates: Coordinates | None = None
        self._history_steps = history or 0
        self._progress = Progress(EXPLORE if temperature > 0 else FINETUNE)
        self._noted = NotedLosses()
        self._backend_name: str = backend  # type: ignore[assignment]  # chosen below
        self._sampler: State = None  # type: ignore[assignment]  # until there are parameters
        self._forget_derived()
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, maximize=maximize)
        validation.hyper_parameters(defaults)
        # momentum_unit: scale of p in the noise-free phase, fixed on entry; last_lr: last positive lr;
        # tensors where lr is read on the device. sampler: where the state_dict has the sampler's state
        super().__init__(params, defaults | dict(momentum_unit=None, last_lr=None, sampler=None))
        self._backend_name = backends.choose(backend, self._device)
        self._constants = self._resolve()
        self._sampler = self._initial_state(self._constants.bins)
        self._coordinates = self._initial_coordinates()

    # ------------------------------------------------------------------------------- construction

    @unwrapped
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group; its parameters take the next noise indices.

        Raises:
            ValueError, TypeError: for unsuitable parameters or options; nothing is added then.
        """
        if isinstance(param_group, dict) and "params" in param_group:
            params = param_group["params"]
            if not isinstance(params, (Tensor, set)):
                param_group["params"] = params = list(params)
            tensors = [params] if isinstance(params, Tensor) else params
            tensors = [p[1] if isinstance(p, tuple) else p for p in tensors]
            groups = getattr(self, "param_groups", [])
            validation.parameters(list(tensors), self._device if groups else None, self.chains)
            options = {**self.defaults, **param_group}
            validation.hyper_parameters(options)
            validation.thermostat(self.thermostat, options["momentum"])
            if self.preconditioner is not None:
                check_parameters(list(tensors))
                if self._sampler is not None:
                    raise ValueError("with a preconditioner all groups must be there from the start")
            if self.tempering is not None and any(g["maximize"] != options["maximize"] for g in groups):
                raise ValueError("with tempering all groups must agree on maximize: there is one energy")
        self._drop_graph()
        super().add_param_group(param_group)
        self._forget_derived()
        if self._sampler is not None:
            self._constants = self._resolve()
            if self.thermostat:
                self._sampler.add_thermostat()

    def _initial_state(self, bins: int) -> State:
        thermostats = len(self.param_groups) if self.thermostat else 0
        return State.initial(
            self.chains or 1, bins, self.temperature, self._device, thermostats, self._history_steps
        )

    def _initial_coordinates(self) -> Coordinates | None:
        return None if self.preconditioner is None else Coordinates(self.preconditioner, self._device)

    def _trainable(self, groups: Iterable[dict[str, Any]]) -> float:
        """Trainable elements of one chain."""
        return sum(p.numel() for g in groups for p in g["params"] if p.requires_grad) / (self.chains or 1)

    @property
    def phase(self) -> str:
        """ "explore", or "finetune" once the noise is off."""
        return self._progress.phase

    @property
    def _device(self) -> torch.device:
        return self.param_groups[0]["params"][0].device

    def _resolve(self) -> TemperingConstants:
        self._dimension = self._trainable(self.param_groups)
        hypers = [validation.hyper_parameters(g) for g in self.param_groups]
        return resolve(
            self.tempering,
            temperature=self.temperature,
            num_data=self.num_data,
            maximize=self.param_groups[0]["maximize"],
            momentum=max(momentum for _, momentum, _ in hypers),
            weight_decay=max(decay for _, _, decay in hypers),
            dimension=self._dimension,
            preconditioned=self.preconditioner is not None,
        )

    def _forget_derived(self) -> None:
        """Drops what can be rebuilt: slots, backend and the knowledge whose prior energy is stored."""
        self._slots: list[Slot] = []
        self._inspector = Inspector([], validation.gradient, extension.usual_of)
        self._backend: Any = None
        self._ranks: distributed.Ranks | None = None
        # what they were worked out of, and the coefficients of all groups
        self._coefficients_of: tuple[Any, ...] | None = None
        self._coefficients_found: list[Coefficients] = []
        self._prior_of: tuple[Any, ...] | None = None
        self._reported_flags = 0
        self._graph: traced.Graph | None = None

    def _drop_graph(self) -> None:
        """Has the next compiled step traced anew, and keeps what the last one has left."""
        traced.collect(self)
        self._graph = None

    def _prepare(self) -> None:
        if self._backend is not None:
            return
        self._forget_replaced_parameters()
        self._slots = []
        for group_index, group in enumerate(self.param_groups):
            for p in group["params"]:
                slot = distributed.slot_of(
                    p,
                    self.state[p].get("momentum_buffer"),
                    len(self._slots),
                    group_index,
                    self.chains or 1,
                    self.momentum_dtype,
                )
                self.state[p]["momentum_buffer"] = slot.stored_momentum()
                self._slots.append(slot)
        self._ranks = distributed.ranks_of(self._slots, self.process_group)
        if self.preconditioner is not None:
            if self._ranks is not None and self._ranks.sharded:
                raise ValueError("the preconditioner cannot step sharded parameters (DTensor) yet")
            for slot in self._slots:
                if "preconditioner" not in self.state[slot.source]:
                    mean = torch.zeros_like(
                        slot.source, dtype=compute_dtype(slot.source), requires_grad=False
                    )
                    self.state[slot.source]["preconditioner"] = mean
        self._inspector = Inspector(self._slots, validation.gradient, extension.usual_of)
        elements = [max(self._trainable([group]), 1.0) for group in self.param_groups]
        self._settings = Settings(
            self.seed,
            self.integrator,
            self.stochastic_rounding,
            self.num_data,
            tuple(elements) if self.thermostat else (),
            kinetic_unit(self._dimension, self._constants),
            self._ranks is not None and self._ranks.sharded,
        )
        self._backend = backends.create(
            self._backend_name, self._slots, self._sampler, self._constants, self._settings
        )

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _prepare_graph(self) -> None:
        traced.prepare(self)

    def _forget_replaced_parameters(self) -> None:
        """Drops the state of what is in no group any more: Accelerate replaces parameters by their shards."""
        known = {id(p) for group in self.param_groups for p in group["params"]}
        for p in [p for p in self.state if id(p) not in known]:
            del self.state[p]

    @property
    def _live_on(self) -> torch.device | None:
        """The device that reads learning rates itself, if the backend can do that."""
        return self._device if backends.on_device(self._backend_name) else None

    # ----------------------------------------------------------------------------------- stepping

    def note_loss(self, loss: Tensor | float) -> None:
        """Keeps the loss of a micro-batch for the next :meth:`step`, which then needs none.

        For trainers that call ``step`` themselves (``docs/trainers.md``), and for accumulated gradients. The
        next step uses the mean of what was noted since the last one, every micro-batch with the same weight,
        also where it has a closure that returns something else. Does not wait for the device.

        Args:
            loss: mean loss of the micro-batch, not scaled; with chains shape (C,).

        Raises:
            ValueError, TypeError: as :meth:`step` for a loss.
        """
        self._noted.add(validation.loss(loss, self.chains, self._device))

    def step(self, closure: Callable[[], Any] | None = None, *, loss: Any = None) -> Any:
        """One step.

        Args:
            closure: evaluates the model, calls backward and returns the mean minibatch loss; with
                chains the losses of all chains, shape (C,).
            loss: the same loss, if backward was called already. Without it the mean of what
                :meth:`note_loss` was given is used.

        Returns:
            The loss that was used.

        Raises:
            ValueError: tempering without a loss, two of them, one of the wrong shape, bad hyper-parameters.
            TypeError, RuntimeError: unsuitable gradients, or a model converted after construction.
        """
        if self._watched():
            # hooks are shown the arguments as they were given
            arguments = () if closure is None else (closure,)
            return self._watched_step(*arguments, **({} if loss is None else {"loss": loss}))
        return self._step(closure, loss=loss)

    # torch wraps step() to run hooks and to show a range to the profiler: watched_step does both
    step.hooked = True  # type: ignore[attr-defined]

    def _watched(self) -> bool:
        """Whether hooks or a profiler wait for a step: telling the profiler costs more than all the rest."""
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or (not torch.compiler.is_compiling() and torch.autograd._profiler_enabled())  # type: ignore[attr-defined]
        )

    def _step(self, closure: Callable[[], Any] | None = None, *, loss: Any = None) -> Any:
        loss = self._loss_of_step(closure, loss)
        if torch.compiler.is_compiling():
            with torch.no_grad():
                loss = traced.step(self, loss)
            self._noted.clear()
            return loss
        traced.collect(self)
        self._advance(loss)
        traced.hand_over(self)
        return loss

    _watched_step = Optimizer.profile_hook_step(_step)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _advance(self, loss: Any) -> None:
        """A step outside of graphs."""
        hypers = [validation.hyper_parameters(group, self._live_on) for group in self.param_groups]
        if self.thermostat:
            for _, momentum, _ in hypers:
                validation.thermostat(self.thermostat, momentum)
        self._check_capture()
        if self.phase == EXPLORE and self._progress.explored == self.explore_steps:
            self.finetune()
        exploring = self.phase == EXPLORE
        # all learning rates 0 is how checkpointing tools initialise an optimizer: no noise, no advance
        moving = not exploring or any(isinstance(lr, Tensor) or lr > 0 for lr, _, _ in hypers)
        needed = exploring and moving and self.tempering is not None
        wanted = loss is not None and (self._history_steps or (exploring and self.tempering is not None))
        energy = validation.loss(loss, self.chains, self._device) if needed or wanted else None
        self._prepare()
        found = self._inspector.look()
        self._noted.clear()
        if not moving:
            return
        if exploring and found.parameters and not any(found.gradient_addresses):
            warnings.warn(_NO_GRADIENTS, RuntimeWarning, stacklevel=6)
        found_inf, grad_scale = self._scaler_says("found_inf"), self._scaler_says("grad_scale")
        energy, found_inf = self._shared(energy, found_inf, hypers)
        if found_inf is not None and not self._backend.on_device and bool(found_inf != 0):
            self._progress.explored += exploring  # as where only the device knows
            return
        rates = [
            self._live_rate(group, lr) if isinstance(lr, Tensor) else None
            for group, (lr, _, _) in zip(self.param_groups, hypers, strict=True)
        ]
        inputs = StepInputs(
            found, self._coefficients(hypers, exploring), rates, energy, grad_scale, found_inf
        )
        if self._coordinates is None:
            self._move(inputs, exploring, self._prior_is_stale(inputs, exploring))
        else:
            self._move_in_coordinates(self._coordinates, inputs, exploring)
        # tells autograd that the parameters changed in place
        torch.autograd.graph.increment_version(found.parameters)
        if exploring:
            self._progress.explored += 1
            self._prior_of = self._prior_key(inputs)

    def _loss_of_step(self, closure: Callable[[], Any] | None, given: Any) -> Any:
        """The loss given, noted, or returned by the closure, which is called."""
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
            # Lightning adds a closure that returns nothing to a loss
            if given is not None and returned is not None:
                raise ValueError("give step() a closure or a loss, not both")
        noted = self._noted.mean()
        if noted is None:
            return returned if given is None else given
        if given is not None:
            raise ValueError("give step() no loss after note_loss(), or do not note any")
        return noted if self.chains is not None else noted[0]

    def _shared(
        self,
        energy: Tensor | None,
        found_inf: Tensor | None,
        hypers: list[Hypers],
    ) -> tuple[Tensor | None, Tensor | None]:
        """The energy and found_inf of all ranks together; makes sure that they agree."""
        ranks = self._ranks
        if ranks is None or (
            energy is None and ranks.agreed and not (ranks.sharded and found_inf is not None)
        ):
            return energy, found_inf
        rates = [("live" if isinstance(lr, Tensor) else lr, *others) for lr, *others in hypers]
        settings = {"lr, momentum, weight_decay": rates, "phase": self.phase, "steps": self._progress.total}
        if not ranks.agreed:
            settings |= persistence.configuration(self) | {
                "seed": self.seed,
                "history": self._history_steps,
                "parameters": [(tuple(s.source.shape), s.dtype, s.group) for s in self._slots],
                "state": {name: x.tolist() for name, x in self._sampler.tensors().items() if name != "prior"},
                "values of the parameters": distributed.parameters_digest(self._slots),
            }
        return ranks.share(energy, found_inf, settings, self._sampler)

    def _scaler_says(self, name: str) -> Tensor | None:
        """An attribute that GradScaler sets: a tensor, on its own device, or the number 0 of no gradients."""
        value = getattr(self, name, None)
        return None if value is None else torch.as_tensor(value, dtype=torch.float32, device=self._device)

    def _check_capture(self) -> None:
        if not _capturing(self._device):
            return
        if self._backend is None:
            raise RuntimeError(
                "take at least one step before capturing a CUDA graph: the first one allocates the momenta"
            )
        if self._coordinates is not None and self._coordinates.adapting:
            raise RuntimeError("the preconditioner is still being learned: capture after adapt_steps steps")
        if self.phase == EXPLORE and self.explore_steps is not None:
            raise RuntimeError(
                "explore_steps counts calls of step(), and replays of a CUDA graph are none: construct with "
                "explore_steps=None, call finetune() when it is time, and capture again"
            )

    def _move(self, inputs: StepInputs, exploring: bool, prior_is_stale: bool) -> None:
        if not exploring:
            self._backend.finetune(inputs)
            return
        if prior_is_stale:
            self._backend.reduce_prior_energy(inputs)
        sharded = self._ranks if self._ranks is not None and self._ranks.sharded else None
        if sharded and any(group.prior for group in inputs.groups):
            sharded.sum_(self._sampler.prior)
        self._backend.explore(inputs)
        if sharded:
            sharded.add_up(self._sampler)
            if self.thermostat:
                adapt_friction(inputs.groups, self._sampler, self._constants, self._settings)
            if self._history_steps:
                record_kinetic(self._sampler, self._settings)

    def _move_in_coordinates(self, coordinates: Coordinates, inputs: StepInputs, exploring: bool) -> None:
        """A step of phi = theta / D; see :mod:`ctld_cuda.preconditioner`."""
        # the prior energy is that of phi, so it changes with D; going there and back only looks like a write
        stale = coordinates.adapting or self._prior_is_stale(inputs, exploring)
        parameters = inputs.found.parameters
        tables = [self.state[p] for p in parameters]
        adapting = coordinates.adapting
        with coordinates.entered(inputs, tables) as there:
            self._move(there, exploring, stale)
        if adapting and not coordinates.adapting:
            everything = [slot.source for slot in self._slots]
            coordinates.freeze(everything, [self.state[p] for p in everything])

    def _prior_is_stale(self, inputs: StepInputs, exploring: bool) -> bool:
        return exploring and self._prior_of != self._prior_key(inputs)

    def _coefficients(self, hypers: list[Hypers], exploring: bool) -> list[Coefficients]:
        """Those of all groups, worked out anew only if something they depend on has changed."""
        groups = self.param_groups
        for group, (lr, momentum, _) in zip(groups, hypers, strict=True):
            if isinstance(lr, Tensor):
                continue
            if exploring:
                group["last_lr"] = lr if lr > 0 else group["last_lr"]
            elif not group["momentum_unit"]:  # the first step of this phase
                last = float(group["last_lr"] or 0.0)
                group["momentum_unit"] = first_unit(last, lr, momentum, self.num_data)
        # a live rate's value is none of the host's business
        numbers = [(None, *rest) if isinstance(lr, Tensor) else (lr, *rest) for lr, *rest in hypers]
        signs = [group["maximize"] for group in groups]
        units = None
        if not exploring:
            units = [
                None if isinstance(lr, Tensor) else float(group["momentum_unit"])
                for group, (lr, _, _) in zip(groups, hypers, strict=True)
            ]
        key = (exploring, self.integrator, self.num_data, self._constants, numbers, signs, units)
        if key != self._coefficients_of:
            self._coefficients_found = [
                self._coefficients_of_group(group, hyper, exploring)
                for group, hyper in zip(groups, hypers, strict=True)
            ]
            self._coefficients_of = key
        return self._coefficients_found

    def _coefficients_of_group(self, group: dict[str, Any], hyper: Hypers, exploring: bool) -> Coefficients:
        if exploring:
            return of_exploring(
                self.integrator,
                *hyper,
                group["maximize"],
                num_data=self.num_data,
                constants=self._constants,
            )
        # a live rate's unit is none of the host's business
        unit = 0.0 if isinstance(hyper[0], Tensor) else float(group["momentum_unit"])
        return of_finetuning(*hyper, group["maximize"], unit=unit)

    def _live_rate(self, group: dict[str, Any], lr: Tensor) -> LiveRate:
        """Keeps what the device remembers about a learning rate in tensors of the group."""
        for name in ("last_lr", "momentum_unit"):
            own = group[name]
            if not isinstance(own, Tensor) or own.device != self._device:  # a loaded one may be elsewhere
                value = float(own or 0.0)
                group[name] = torch.full((), value, dtype=torch.float64, device=self._device)
        return LiveRate(lr, group["last_lr"], group["momentum_unit"])

    def _prior_key(self, inputs: StepInputs) -> tuple[Any, ...]:
        """Identifies the parameter values and curvatures that a prior energy belongs to."""
        scales = tuple(group.prior for group in inputs.groups)
        if not any(scales):
            return scales
        if self._ranks is not None and self._ranks.sharded:
            return scales, [slot.versions() for slot in self._slots if slot.active], inputs.found.active
        return scales, inputs.found.active, list(map(_version, inputs.found.parameters))

    def finetune(self) -> None:
        """Switches the noise off for good: from the next step on, plain momentum SGD. Keeps momenta."""
        if self.phase == EXPLORE:
            self._progress.phase = FINETUNE
            self._sampler.temperature.zero_()
            if self._ranks is not None:
                self._ranks.agreed = False  # not if only some ranks do this

    @unwrapped
    def set_energy_noise(self, noise: float) -> None:
        """Replaces ``tempering.energy_noise`` from now on; see :class:`ctld_cuda.energy.EnergyGate`.

        A captured CUDA graph keeps the old value: capture again.

        Args:
            noise: standard deviation of the minibatch noise in the energy, in nats; 0: none is known.

        Raises:
            ValueError: without the exact coupling, or if ``noise`` is negative or not finite.
        """
        if self.tempering is None:
            raise ValueError("without tempering there is no alpha for the energy's noise to heat")
        self.tempering = dataclasses.replace(self.tempering, energy_noise=noise)
        self._constants = dataclasses.replace(self._constants, energy_noise=float(noise))
        self._slots, self._backend = [], None
        self._drop_graph()

    # ---------------------------------------------------------------------------------- reporting

    def tempering_state(self) -> dict[str, Tensor]:
        """Live device tensors of the sampler; reading them does not synchronise.

        Returns:
            Per chain, shape (C,) or () without chains: ``alpha``, ``alpha_momentum``, ``temperature``
            (0 once the noise is off), ``at_target`` (bool: the current parameters count as a draw
            from the target), ``kinetic_temperature`` (mean squared momentum of the last sampling step;
            compare with ``temperature``), ``round_trips`` (of alpha, from the window to the hottest bin and
            back). Per chain and parameter group, shape (C, G) or (G,), (C, 0) or (0,) without a thermostat:
            ``friction``, what the thermostats add, in units of a share of the momentum per step at
            T = T0. Per bin of |alpha|, shape (bins,), or (0,) without
            tempering: ``visits``, ``bias`` and ``bin_centers``, and ``free_energy`` and
            ``free_energy_histogram``, two estimates of ln Z(beta)/Z(1) (NaN if standardized). Shape ():
            ``alpha_kinetic_temperature`` (mean of alpha_momentum**2 over the run; 1 if alpha is thermal)
            and ``flags`` (bits of :mod:`ctld_cuda.state`; 0: nothing unusual happened).
        """
        state, c = self._sampler, self._constants

        def per_chain(x: Tensor) -> Tensor:
            return x if self.chains is not None else x[0]

        in_window = state.alpha.abs() <= c.flat
        learned = self._coordinates is None or not self._coordinates.adapting
        sampling = torch.full_like(in_window, self.phase == EXPLORE and learned)
        kinetic = kinetic_temperature(state, kinetic_unit(self._dimension, c))
        result = {
            "alpha": per_chain(state.alpha),
            "alpha_momentum": per_chain(state.alpha_momentum),
            "temperature": per_chain(state.temperature),
            "at_target": per_chain(in_window & (state.settled >= c.settle) & sampling),
            "kinetic_temperature": per_chain(kinetic),
            "round_trips": per_chain(state.turns // 2),
            "friction": per_chain(state.friction),
            "alpha_kinetic_temperature": state.alpha_kinetic,
            "visits": state.visits,
            "flags": state.flags,
        }
        if c.bins == 0:
            nothing = state.hills
            return result | dict.fromkeys(
                ("bias", "bin_centers", "free_energy", "free_energy_histogram"), nothing
            )
        return result | {
            "bias": diagnostics.total_bias(state, c),
            "bin_centers": diagnostics.bin_centers(state, c),
            "free_energy": diagnostics.free_energy(state, c),
            "free_energy_histogram": diagnostics.free_energy_histogram(state, c),
        }

    def history(self) -> dict[str, Tensor]:
        """The last steps, at most as many as the constructor's ``history``, oldest first.

        One copy from the device to the host, which waits for the steps queued there; the steps themselves
        write the history on the device and wait for nothing. A step that is left out (a GradScaler found
        infinite gradients, all learning rates are 0, an invalid rate on the device) is not recorded. Not part
        of :meth:`state_dict`: after loading a state, and in copies of an optimizer, the history is empty.

        Returns:
            Tensors on the CPU. ``step``, int64 (n,): steps done before, the counter of the noise.
            float64 (n, C), or (n,) without chains: ``alpha``; ``temperature`` (0 once the noise is off);
            ``energy``, in nats, of the parameters before the step: N * loss plus prior energy, over the
            temperature, as alpha feels it; negative for ``maximize``, NaN where no loss was given. The prior
            energy is that of ``weight_decay``, counted while exploring with tempering only; without noise
            from the start (temperature=0) the energy is N * loss. ``kinetic_temperature``: mean squared
            momentum after the step, NaN without noise.

        Raises:
            ValueError: if the optimizer was constructed without ``history``.
        """
        if not self._history_steps:
            raise ValueError("there is no history: construct with history=K to keep the last K steps")
        s = self._sampler
        # the counters are exact in float64 up to 2**53
        everything = torch.cat((s.history.view(-1), torch.stack((s.recorded, s.step)).double())).cpu()
        recorded, step = (int(counter) for counter in everything[-2:])
        rows = everything[:-2].view(s.history.shape)
        n = min(recorded, self._history_steps)
        rows = rows[:n].roll(-(recorded % n), 0) if n else rows[:0]
        if self.chains is None:
            rows = rows[:, 0]
        names = ("alpha", "temperature", "energy", "kinetic_temperature")
        columns = dict(zip(names, rows.unbind(-1), strict=True))
        return {"step": torch.arange(step - n, step)} | columns

    def _warn_about_run(self) -> None:
        flags = int(self._sampler.flags)
        for sentence in diagnostics.flag_report(flags & ~self._reported_flags):
            warnings.warn(f"CTLD: {sentence}", RuntimeWarning, stacklevel=3)
        self._reported_flags |= flags
        report = diagnostics.alpha_kinetic_report(self._sampler, self._constants)
        if report:
            warnings.warn(f"CTLD: {report}", RuntimeWarning, stacklevel=3)

    # ----------------------------------------------------------------------------------- persistence

    def state_dict(self) -> dict[str, Any]:
        """torch's optimizer state; ``"sampler"`` of the first group has alpha, bias, counters and settings.

        (There, because ``torch.distributed.checkpoint`` keeps nothing besides groups and parameters.)
        As in every torch optimizer its tensors are the live ones: save it, or deepcopy it, before the next
        step.

        Warns (RuntimeWarning) about what ``flags`` recorded since the last call, and about an alpha
        that is not thermal.
        """
        self._warn_about_run()
        traced.collect(self)
        state_dict = super().state_dict()
        state_dict["param_groups"][0]["sampler"] = persistence.sampler_dict(self)
        return state_dict

    @unwrapped
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state; the steps that follow are bit for bit those of the optimizer that saved it.

        ``explore_steps`` and ``backend`` stay as constructed. Tensors are copied in place.

        Raises:
            ValueError: if the state does not fit this optimizer; nothing is changed then.
        """
        persistence.load(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        traced.collect(self)
        return super().__getstate__() | {"_ctld": persistence.pickled(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = state.get("_ctld")
        super().__setstate__({key: value for key, value in state.items() if key != "_ctld"})
        if own is not None:  # else called by the base class's load_state_dict
            persistence.unpickle(self, own)
