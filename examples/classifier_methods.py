"""The classifier, and the ways to train it or to sample its posterior.

All copies of the network, members of an ensemble or chains of a sampler, are trained at once: every parameter
has a leading dimension for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from autoencoder_data import MiniBatches
from classifier_data import CLASSES, FEATURES, Data
from classifier_metrics import negative_log_likelihood
from torch.nn.functional import cross_entropy

from ctld_cuda import CTLD, Tempering
from ctld_cuda.diagnostics import report
from ctld_cuda.posterior import PosteriorSamples
from ctld_cuda.report import Report

Tensor = torch.Tensor
Parameters = dict[str, Tensor]

HIDDEN = 50
BATCH_SIZE = 100
MOMENTUM = 0.9
BURN_IN = 0.3  # of the steps of a sampler, before the first draw
THIN = 20  # steps between draws: two relaxation times of the momentum
RECORDS = 50  # of the test NLL over a training


@dataclass(frozen=True)
class Settings:
    """What distinguishes one run from another of the same method."""

    lr: float
    weight_decay: float
    temperature: float | None = None  # None: SGD
    max_temperature: float | None = None  # in multiples of temperature; None: constant
    thermostat: bool = False
    copies: int = 1

    def __str__(self) -> str:
        parts = [f"lr {self.lr:g}", f"weight decay {self.weight_decay:g}"]
        if self.temperature is not None:
            parts.append(f"T0 {self.temperature:g}")
        if self.max_temperature is not None:
            parts.append(f"Tmax {self.max_temperature:g} T0")
        return ", ".join(parts + ["thermostat"] * self.thermostat)


class NoDraws(Exception):
    """A sampler was never at its target; the message says for how long."""


@dataclass(frozen=True)
class Outcome:
    """What a run predicts: mean probabilities (n, classes) on both held-out parts.

    ``trace``: steps, and the NLL on clean test labels of what the run would have predicted there. ``draws``:
    how many were averaged. ``report``: the sampler at its end, or None.
    """

    validation: Tensor
    test: Tensor
    trace: list[tuple[int, float]]
    draws: int
    report: Report | None = None


def initial_parameters(copies: int, generator: torch.Generator) -> Parameters:
    """A perceptron with one hidden layer, ``copies`` times, with different initial weights."""

    def weight(inputs: int, outputs: int) -> Tensor:
        values = torch.randn(copies, inputs, outputs, generator=generator) / math.sqrt(inputs)
        return values.requires_grad_()

    def bias(outputs: int) -> Tensor:
        return torch.zeros(copies, 1, outputs, requires_grad=True)

    return {
        "weight1": weight(FEATURES, HIDDEN),
        "bias1": bias(HIDDEN),
        "weight2": weight(HIDDEN, CLASSES),
        "bias2": bias(CLASSES),
    }


def logits(p: Parameters, inputs: Tensor) -> Tensor:
    """Outputs (copies, n, classes) for inputs (n, features) or (copies, n, features).

    Parameters without the leading dimension, those of one draw, give (n, classes).
    """
    hidden = (inputs @ p["weight1"] + p["bias1"]).tanh()
    return hidden @ p["weight2"] + p["bias2"]


def _softmax(outputs: Tensor) -> Tensor:
    return outputs.softmax(-1)


class Objective:
    """The mean loss of every copy over its next minibatch; copies go through the data in different orders."""

    def __init__(self, parameters: Parameters, data: Data, generator: torch.Generator) -> None:
        self.parameters = parameters
        self.data = data
        indices = torch.arange(len(data.train))
        copies = len(parameters["weight1"])
        self.batches = [MiniBatches(indices, BATCH_SIZE, generator) for _ in range(copies)]

    def __call__(self) -> Tensor:
        """Sets the gradients; returns the losses (copies,)."""
        for p in self.parameters.values():
            p.grad = None
        chosen = torch.stack([batches.draw() for batches in self.batches])
        outputs = logits(self.parameters, self.data.train[chosen])
        labels = self.data.train_labels[chosen]
        losses = cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none")
        losses = losses.view_as(labels).mean(1)
        losses.sum().backward()
        return losses.detach()


def run(settings: Settings, data: Data, steps: int, seed: int) -> Outcome:
    """``steps`` gradients per copy of the network, then predictions."""
    generator = torch.Generator().manual_seed(seed)
    parameters = initial_parameters(settings.copies, generator)
    objective = Objective(parameters, data, generator)
    if settings.temperature is None:
        return _descend(settings, objective, steps)
    return _sample(settings, objective, steps, seed)


# ---------------------------------------------------------------------------------- gradient descent


def _descend(settings: Settings, objective: Objective, steps: int) -> Outcome:
    """SGD with momentum, its learning rate falling to 0 along half a cosine; copies are an ensemble."""
    parameters, data = objective.parameters, objective.data
    options = dict(lr=settings.lr, momentum=MOMENTUM, weight_decay=settings.weight_decay)
    optimizer = torch.optim.SGD(parameters.values(), **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    every = max(1, steps // RECORDS)
    trace = []
    for step in range(1, steps + 1):
        objective()
        optimizer.step()
        schedule.step()
        if step % every == 0:
            test = _ensemble(parameters, data.test)
            trace.append((step, negative_log_likelihood(test, data.test_labels)))
    validation, test = (_ensemble(parameters, x) for x in (data.validation, data.test))
    return Outcome(validation, test, trace, settings.copies)


@torch.no_grad()
def _ensemble(parameters: Parameters, inputs: Tensor) -> Tensor:
    """Mean probabilities of all copies, (n, classes)."""
    return _softmax(logits(parameters, inputs)).mean(0)


# ------------------------------------------------------------------------------------------ sampling


def build_sampler(settings: Settings, parameters: Iterable[Tensor], num_data: int, seed: int) -> CTLD:
    """Langevin dynamics at constant temperature (SGHMC), or CTLD if there is a maximal temperature."""
    tempering = None if settings.max_temperature is None else Tempering(settings.max_temperature)
    return CTLD(
        parameters,
        lr=settings.lr,
        momentum=MOMENTUM,
        num_data=num_data,
        temperature=settings.temperature,
        weight_decay=settings.weight_decay,
        tempering=tempering,
        chains=settings.copies,
        thermostat=settings.thermostat,
        seed=seed,
    )


def _sample(settings: Settings, objective: Objective, steps: int, seed: int) -> Outcome:
    """Averages predictions over draws: those of the window, where CTLD has the base temperature."""
    parameters, data = objective.parameters, objective.data
    optimizer = build_sampler(settings, parameters.values(), len(data.train), seed)
    samples = PosteriorSamples(parameters, optimizer, thin=THIN, burn_in=round(BURN_IN * steps))
    for _ in range(steps):
        optimizer.step(loss=objective())
        samples.collect()
    if len(samples) == 0:
        raise NoDraws(f"no draws from the target in {steps} steps ({settings}): the run is too short")
    return _average(samples, data, report(optimizer))


def _average(samples: PosteriorSamples, data: Data, state: Report) -> Outcome:
    """The model averages over all draws, and over the first ones of them."""
    validation = samples.predict(data.validation, model=logits, transform=_softmax)
    test, single = samples.predict(data.test, model=logits, transform=_softmax, return_draws=True)
    running = single.cumsum(0) / torch.arange(1, len(single) + 1)[:, None, None]
    # in the order of time; of the draws of one step the last
    counts = {int(step): count for count, step in enumerate(samples.columns()["step"])}
    kept = list(counts.items())[:: max(1, len(counts) // RECORDS)]
    trace = [(step, negative_log_likelihood(running[i], data.test_labels)) for step, i in kept]
    return Outcome(validation, test, trace, len(samples), state)
