"""A task's study: every method tuned with the same number of trials, then fresh seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from . import tasks, training
from .ablation import Figure, Run
from .ledger import Asking, Ledger, Request, Result, carry_out, column
from .methods import METHODS, Setting
from .search import asking, compass

# trials of each method at the quick size; otherwise the task's
QUICK_TRIALS = 2
# seeds at the chosen setting, seeds of each ablation
SEEDS = {"quick": 2, "cpu": 5, "full": 5}
ABLATION_SEEDS = {"quick": 1, "cpu": 2, "full": 3}
LANDSCAPE_SEEDS = {"quick": 1, "cpu": 3, "full": 3}
# of those that fine-tune, beside the recipe
LANDSCAPE_METHODS = ("sghmc", "sgd", "adam")
# minibatches that make the landscape, products for the trace of its Hessian
LANDSCAPE_EFFORT = {"quick": (2, 4), "cpu": (10, 30), "full": (20, 100)}
TUNING_SEED = 0
# on which the best trials are run again, where a task has finalists
MORE_TUNING_SEEDS = (101, 102)
# on which is decided what is taken home, the trained model or the average over draws
CHOICE_SEEDS = (201, 202, 203)
COST_ROUNDS = 15
_FACTOR = 10.0**0.5


@dataclass(frozen=True)
class Chosen:
    """The setting that tuning chose.

    Attributes:
        value: what judged it: the mean over the seeds that it was tried on.
        loss: its training loss.
        trials: of the search: settings, what judged them.
        finalists: those of the trials that were run again: settings, means over all seeds.
    """

    setting: Setting
    value: float
    loss: float
    trials: list[tuple[Setting, float]]
    finalists: list[tuple[Setting, float]]


class Study:
    """
    Args:
        task: its name.
        size: quick, cpu or full.
        ledger: where results are kept.
        workers: processes, each with one thread; 0: none but this.
        text: a file for the text task instead of the Bible.
        device: where to train.
    """

    def __init__(
        self,
        task: str,
        size: tasks.Size,
        ledger: Ledger,
        workers: int,
        text: Path | None = None,
        device: str = "cpu",
    ) -> None:
        self.task, self.size = _made(task, size, text), size
        self._ledger, self._workers = ledger, workers
        self._execute = Execute(task, size, text, device)
        self.trials = QUICK_TRIALS if size == "quick" else self.task.trials

    def tune(self) -> dict[str, Chosen]:
        """Of each method the best setting on validation data."""
        found = self._carry_out([self._tuning(name) for name in METHODS])
        return dict(zip(METHODS, found, strict=True))

    def reached(self, method: str, setting: Setting) -> float:
        """The training loss of a run on the seed of the tuning; infinite if it diverged."""
        asking = _ask_at_once([self._request(method, setting, TUNING_SEED, "validation")])
        ((result,),) = self._carry_out([asking])
        return result.get("loss", math.inf)

    def fresh(
        self, settings: dict[str, Run], seeds: int, part: tasks.Part = "test"
    ) -> dict[str, list[Result]]:
        """Results on seeds that no tuning has seen, by the label of (method, setting).

        ``part`` "landscape": what :func:`.training.surroundings` finds.
        """
        return self._on_seeds(settings, [TUNING_SEED + 1 + k for k in range(seeds)], part)

    def _on_seeds(
        self, settings: dict[str, Run], seeds: list[int], part: tasks.Part
    ) -> dict[str, list[Result]]:
        askings = [
            _ask_at_once([self._request(name, setting, seed, part) for seed in seeds])
            for name, setting in settings.values()
        ]
        return dict(zip(settings, self._carry_out(askings), strict=True))

    def costs(self, settings: dict[str, Run], reference: str) -> Result:
        """Time per step by label, as a multiple of the reference's."""
        request = training.cost_request(self.task.name, self.size, settings) | {"reference": reference}
        ((result,),) = self._carry_out([_ask_at_once([request])])
        return result

    def curves(self, figure: Figure, seeds: int) -> dict[str, list[list[Result]]]:
        """Of each series the results at each of its points."""
        runs = {
            f"{label} {place}": run
            for label, points in figure.series.items()
            for place, run in points.items()
        }
        results = self.fresh(runs, seeds)
        return {
            label: [results[f"{label} {place}"] for place in points]
            for label, points in figure.series.items()
        }

    def validated(self, settings: dict[str, Run]) -> dict[str, Result]:
        """Of the samplers, by label: means over seeds that no tuning has seen, on validation data, of what
        judges the trained model and the average over draws.

        Infinite where a run diverged; one that gave no draw has its trained model for an average.
        """
        names = (self.task.metric, f"average_{self.task.metric}")
        samplers = {label: run for label, run in settings.items() if METHODS[run[0]].samples}
        found = self._on_seeds(samplers, list(CHOICE_SEEDS), "validation")
        return {
            label: {name: fmean(column(results, name, fall_back=True)) for name in names}
            for label, results in found.items()
        }

    def deployed(self, settings: dict[str, Run]) -> dict[str, str]:
        """The metric of what a user would take home, by label.

        Where a run gives a trained model and an average over draws, that is the better of the two on
        validation data.
        """
        found = dict.fromkeys(settings, self.task.metric)
        if self.task.averages:
            found |= {label: min(m, key=m.__getitem__) for label, m in self.validated(settings).items()}
        return found

    def judged_by(self, method: str) -> str:
        """The metric that settings are chosen by: that of the model average where there is one."""
        averages = self.task.averages and METHODS[method].samples
        return f"average_{self.task.metric}" if averages else self.task.metric

    def _tuning(self, name: str) -> Asking:
        start = METHODS[name].begin(self.task)
        metric = self.judged_by(name)
        axes = ["lr"]
        if start.temperature is not None:
            axes.append("temperature")
        if self.task.weight_decay is not None:
            axes.append("weight_decay")

        def setting_at(point: tuple[float, ...]) -> Setting:
            return replace(start, **dict(zip(axes, point, strict=True)))

        origin = tuple(getattr(start, axis) for axis in axes)
        search = compass(origin, [_FACTOR] * len(axes), self.trials)
        _, points = yield from asking(
            search,
            lambda point: self._request(name, setting_at(point), TUNING_SEED, "validation"),
            lambda result: result.get(metric, math.inf),
        )
        trials = [(setting_at(point), value) for point, value in points]
        best_first = sorted(trials, key=lambda trial: trial[1])
        finalists = yield from self._final(name, metric, best_first)
        best, value = min(finalists or trials, key=lambda trial: trial[1])
        (result,) = yield [self._request(name, best, TUNING_SEED, "validation")]
        return Chosen(best, value, result.get("loss", math.inf), trials, finalists)

    def _final(self, name: str, metric: str, best_first: list[tuple[Setting, float]]) -> Asking:
        """Means over all tuning seeds, infinite if a run diverged: best on one seed may be the edge of
        stability. As long as all that were run again are beyond it, the next one is run again, too.
        """
        found: list[tuple[Setting, float]] = []
        if not self.task.finalists:
            return found
        for setting, value in best_first:
            survived = any(math.isfinite(mean) for _, mean in found)
            if math.isinf(value) or (len(found) >= self.task.finalists and survived):
                break
            results = yield [self._request(name, setting, s, "validation") for s in MORE_TUNING_SEEDS]
            found.append((setting, fmean([value, *column(results, metric)])))
        return found

    def _request(self, method: str, setting: Setting, seed: int, part: tasks.Part) -> Request:
        return training.request(self.task.name, self.size, method, setting, seed, part)

    def _carry_out(self, askings: list[Asking]) -> list[Any]:
        return carry_out(askings, self._ledger, self._execute, self._workers, _one_thread)


class Execute:
    """Does a run that is asked for, in whatever process."""

    def __init__(self, task: str, size: tasks.Size, text: Path | None, device: str) -> None:
        self._arguments = (task, size, text)
        self._device = device
        self._effort = LANDSCAPE_EFFORT[size]

    def __call__(self, request: Request) -> Result:
        task = _made(*self._arguments)
        if request["part"] == "cost":
            runs = {label: (method, Setting(**said)) for label, (method, said) in request["runs"].items()}
            return training.costs(task, runs, request["reference"], COST_ROUNDS, self._device)
        setting = Setting(**request["setting"])
        method, seed, part = request["method"], request["seed"], request["part"]
        if part == "landscape":
            return training.surroundings(task, method, setting, seed, *self._effort, self._device)
        return training.run(task, method, setting, seed, part, self._device).metrics


_tasks: dict[Any, tasks.Task] = {}


def _made(*arguments: Any) -> tasks.Task:
    """The task, made once per process."""
    if arguments not in _tasks:
        _tasks[arguments] = tasks.make(*arguments)
    return _tasks[arguments]


def _one_thread() -> None:
    torch.set_num_threads(1)


def _ask_at_once(requests: list[Request]) -> Iterator[Any]:
    return (yield requests)
