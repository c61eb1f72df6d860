"""One run: a method on a task, with some settings and a seed."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from . import landscape
from .methods import METHODS, Setting, Trainer
from .tasks import Part, Task, logarithms

CHECKS = 20  # of the validation data during a run, for stopping early
_END = 0.05  # of the run, over which the training loss is averaged
DIVERGED = 20.0  # times the initial loss
_LANDSCAPE_SEED = 2017  # of the minibatches whose mean loss is the landscape, the same for all
_TURN = 5  # steps
PARTNER = 1000  # added to a seed for the other end of a barrier


Tensor = torch.Tensor


class EarlyStopping:
    """The metrics of that of ``CHECKS`` moments of the run at which the validation data liked it best."""

    def __init__(self, task: Task, part: Part) -> None:
        self._task, self._part = task, part
        self._validation = math.inf
        self._scores: dict[str, float] = {}

    def look(self, model: nn.Module) -> None:
        validation = self._task.evaluate(model, "validation")[self._task.metric]
        if validation < self._validation:
            self._validation = validation
            self._scores = self._task.evaluate(model, self._part)

    def scores(self) -> dict[str, float]:
        return {f"early_{name}": value for name, value in self._scores.items()}


class Outcome(NamedTuple):
    """The trained model and its metrics by name; those of model averages start with ``average_`` (arithmetic)
    and ``geometric_``, those where early stopping would have ended the run with ``early_``."""

    model: nn.Module
    metrics: dict[str, float]


class Average:
    """Mean predicted probabilities over draws, arithmetic, and where averages count geometric as well: the
    classes' mean logarithms, normalised (the logarithmic opinion pool of Genest and Zidek 1986)."""

    def __init__(self, task: Task, part: Part) -> None:
        self._task, self._part = task, part
        self._sum, self._logarithms = torch.zeros(()), torch.zeros(())
        self._count = 0

    def add(self, model: nn.Module) -> None:
        probabilities = self._task.predict(model, self._part)
        self._sum = self._sum + probabilities
        if self._task.averages:
            self._logarithms = self._logarithms + logarithms(probabilities)
        self._count += 1

    def scores(self) -> dict[str, float]:
        if not self._count:
            return {}
        means = {"average": self._sum / self._count}
        if self._task.averages:
            means["geometric"] = (self._logarithms / self._count).softmax(-1)
        return {
            f"{kind}_{name}": value
            for kind, mean in means.items()
            for name, value in self._task.scores(mean, self._part).items()
        } | {"draws": self._count}


def run(task: Task, method: str, setting: Setting, seed: int, part: Part, device: str = "cpu") -> Outcome:
    """Trains from the seed's initial weights and evaluates on ``part``.

    A run that diverges has the metric inf. On the test data, early stopping is measured beside; the run
    itself goes on to its end.
    """
    model = task.model(seed).to(device)
    parameters = list(model.parameters())
    trainer = METHODS[method].make(setting, parameters, task.num_data, task.steps, seed)
    average = Average(task, part) if METHODS[method].samples else None
    batches = task.batches(seed)
    stopping = EarlyStopping(task, part) if part == "test" else None
    every, rarely = max(1, task.steps // 100), max(1, task.steps // CHECKS)
    draws_every = max(1, round(task.steps * trainer.spacing))
    recent: list[Tensor] = []
    limit = math.inf
    start = time.perf_counter()
    for number in range(task.steps):
        loss = _step(task, model, parameters, trainer, number, next(batches))
        if number % every == 0:
            value = float(loss)
            if number == 0:
                limit = DIVERGED * value
            if not value < limit:
                return Outcome(model, {task.metric: math.inf})
        if average and number % draws_every == 0 and trainer.is_draw((number + 1) / task.steps):
            average.add(model)
        if number >= (1.0 - _END) * task.steps:
            recent.append(loss)
        if stopping and (number + 1) % rarely == 0:
            stopping.look(model)
    metrics = task.evaluate(model, part)
    if not math.isfinite(metrics[task.metric]):
        return Outcome(model, {task.metric: math.inf})
    metrics["loss"] = float(torch.stack(recent).mean())
    if stopping:
        metrics |= stopping.scores()
    if average:
        metrics |= average.scores()
    metrics |= trainer.remarks()
    metrics["seconds"] = round(time.perf_counter() - start, 2)
    return Outcome(model, metrics)


def _step(
    task: Task, model: nn.Module, parameters: list[nn.Parameter], trainer: Trainer, number: int, batch: Any
) -> Tensor:
    """One training step; returns the minibatch's loss."""
    loss = task.loss(model, batch)
    model.zero_grad(set_to_none=True)
    loss.backward()
    if task.clip is not None:
        nn.utils.clip_grad_norm_(parameters, task.clip)
    trainer.step(number, loss.detach())
    return loss.detach()


def surroundings(
    task: Task,
    method: str,
    setting: Setting,
    seed: int,
    batches: int,
    probes: int,
    device: str = "cpu",
) -> dict[str, float]:
    """Sharpness of the minimum found from ``seed``, and the barrier to that found from the seed's partner.

    The loss is the mean over ``batches`` minibatches; the trace is estimated from ``probes`` products.
    """
    models = [run(task, method, setting, s, "test", device) for s in (seed, seed + PARTNER)]
    seen = list(itertools.islice(task.batches(_LANDSCAPE_SEED), batches))

    def loss(model: nn.Module) -> Tensor:
        return torch.stack([task.loss(model, batch) for batch in seen]).mean()

    found = landscape.sharpness(models[0].model, loss, probes, seed)
    ends = tuple(parameters_to_vector(o.model.parameters()).detach() for o in models)
    return models[0].metrics | {
        "largest_eigenvalue": found.largest,
        "trace": found.trace,
        "trace_error": found.trace_error,
        "barrier": landscape.barrier(models[0].model, ends, loss),
        "distance": float((ends[1] - ends[0]).norm()),
        "norm": float(ends[0].norm()),
    }


def costs(
    task: Task, runs: dict[str, tuple[str, Setting]], reference: str, rounds: int, device: str = "cpu"
) -> dict[str, float]:
    """Time of a training step of each of ``runs``, as a multiple of that of ``reference``.

    The runs take turns of ``_TURN`` steps, gradients included, so that a busy machine slows all of them
    alike; the mean over the rounds of the ratio within a round is returned. They are short runs as a whole,
    so that phases have the weight that they have in a run.
    """
    steps = _TURN * (rounds + 1)
    steppers = {label: _stepper(task, *run, steps, device) for label, run in runs.items()}
    taken: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(rounds + 1):
        for label, advance in steppers.items():
            start = time.perf_counter()
            for _ in range(_TURN):
                advance()
            if device != "cpu":
                torch.cuda.synchronize()
            taken[label].append(time.perf_counter() - start)
    # the first round allocates
    ratios = {
        label: [t / r for t, r in zip(times[1:], taken[reference][1:], strict=True)]
        for label, times in taken.items()
    }
    return {label: statistics.fmean(found) for label, found in ratios.items()}


def _stepper(task: Task, method: str, setting: Setting, steps: int, device: str) -> Callable[[], Tensor]:
    """Does one step of a run of so many; evaluations left out."""
    model = task.model(0).to(device)
    parameters = list(model.parameters())
    trainer = METHODS[method].make(setting, parameters, task.num_data, steps, 0)
    batches, numbers = task.batches(0), itertools.count()

    return lambda: _step(task, model, parameters, trainer, next(numbers), next(batches))


def _said(setting: Setting) -> dict[str, Any]:
    """What differs from the defaults, so that a new property leaves old runs what they were."""
    return {
        field.name: value
        for field in dataclasses.fields(setting)
        if (value := getattr(setting, field.name)) != field.default
    }


def request(task: str, size: str, method: str, setting: Setting, seed: int, part: Part) -> dict[str, Any]:
    """Everything that a run depends on, as JSON would have it."""
    return {
        "task": task,
        "size": size,
        "method": method,
        "setting": _said(setting),
        "seed": seed,
        "part": part,
    }


def cost_request(task: str, size: str, runs: dict[str, tuple[str, Setting]]) -> dict[str, Any]:
    """For :func:`costs`."""
    said = {label: [method, _said(setting)] for label, (method, setting) in runs.items()}
    return {"task": task, "size": size, "part": "cost", "runs": said}
