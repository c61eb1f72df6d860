"""Effective draws per second: CTLD side by side with posteriors, BlackJAX and NumPyro, on one thread.

    python bench/samplers.py            # everything, about 12 minutes
    python bench/samplers.py --quick    # about a minute, to see that it works

Writes results/samplers.json after every (target, method) and goes on there when started again (--fresh starts
anew); results/samplers.md is made from it. Peers that are not installed are left out:
pip install "ctld_cuda[peers]" gets them.

*Protocol.* Every method gets the same number of trials of its settings, each half as long as a repetition.
The settings with the most effective draws per second are run again, several times with fresh seeds, for the
table. A repetition starts afresh, drops a burn-in, and samples for the same time whatever the method.
Compilation and warm-up are not counted. Time is the processor time of the whole process, all threads
together: on one otherwise idle processor the same as elapsed time, and nearly independent of other load.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import machine
import numpy as np
import sampler_measure as measure
import torch
from sampler_methods import (
    CONTROL,
    METHODS,
    OURS,
    Chains,
    Draws,
    Method,
    Missing,
    Prepared,
    applies,
    gradient_share,
)
from sampler_report import markdown
from sampler_targets import Target, breast_cancer, diabetes, grid, hmc_moments, two_modes

RESULTS = Path(__file__).resolve().parent / "results"
REFERENCE = "breast cancer, exact moments"
Json = dict[str, Any]


class Protocol(NamedTuple):
    """How much is measured.

    Attributes:
        seconds: processor time of a repetition's sampling; a trial takes half of it.
        repetitions, most_repetitions: bounds on the number of independent repetitions; as many are made as it
            takes for a relative standard error of ``ENOUGH``.
        trials: settings tried per method, at most.
        burn_in: of a repetition, in multiples of its sampling.
        reference_draws: draws behind the exact moments of the logistic regression.
    """

    name: str
    seconds: float
    repetitions: int
    most_repetitions: int
    trials: int
    burn_in: float
    reference_draws: int


FULL = Protocol("full", 1.0, 6, 48, 4, 1 / 3, 300_000)
QUICK = Protocol("quick", 0.1, 3, 6, 1, 1 / 3, 20_000)
ENOUGH = 0.15


class Repetition(NamedTuple):
    found: measure.Sums
    burn_in: float
    sampling: float
    wall: float
    gradients: int
    draws: Draws


def clocked(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, processor seconds of the whole process, elapsed seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return result, time.process_time() - processor, time.perf_counter() - wall


def in_blocks(keeps: float, block: int) -> int:
    return max(1, round(keeps / block)) * block


def seconds_per_block(chains: Chains, block: int, enough: float) -> float:
    """Processor time per block, from runs that double until they take ``enough``; the first call compiles."""
    chains.advance(block)
    blocks = 1
    while True:
        _, seconds, _ = clocked(lambda: chains.advance(blocks * block))  # noqa: B023 (called at once)
        if seconds >= enough:
            return seconds / blocks
        blocks *= 2


class Plan(NamedTuple):
    """A method bound to settings, with the keeps that fill the time."""

    target: Target
    prepared: Prepared
    burn_in: int
    keeps: int

    def halved(self) -> Plan:
        """The same with half the draws, after the same burn-in."""
        return self._replace(keeps=in_blocks(self.keeps / 2, self.prepared.block))

    def repeat(self, seed: int) -> Repetition:
        chains = self.prepared.start(seed)
        before = 0.0
        if self.burn_in:
            _, before, _ = clocked(lambda: chains.advance(self.burn_in))
        already = chains.gradients()
        draws, seconds, wall = clocked(lambda: chains.advance(self.keeps))
        found = measure.sums(draws, self.target.functions)
        return Repetition(found, before, seconds, wall, chains.gradients() - already, draws)


def plan(method: Method, target: Target, settings: Json, seconds: float, burn_in: float) -> Plan:
    """Finds out how fast the method is, and how many keeps fill ``seconds``."""
    prepared = method.prepare(target, settings)
    block = prepared.block
    chains = prepared.start(0)
    if prepared.burn_in:
        chains.advance(in_blocks(prepared.burn_in, block))
    per_block = seconds_per_block(chains, block, 0.1 * seconds)
    keeps = in_blocks(seconds / per_block * block, block)
    dropped = in_blocks(prepared.burn_in or burn_in * keeps, block)
    return Plan(target, prepared, dropped, keeps)


SMALL_POPULATION = 2000


def plan_population(method: Method, target: Target, settings: Json, seconds: float) -> Plan:
    """Sets settings["particles"] so that a population takes ``seconds``, unless it is set already."""
    sized = dict(settings, particles=SMALL_POPULATION)
    chains = method.prepare(target, sized).start(0)
    chains.advance(1)  # compiles
    taken = min(clocked(lambda: chains.advance(1))[1] for _ in range(3))
    settings["particles"] = max(100, int(SMALL_POPULATION * seconds / taken / 100) * 100)
    prepared = method.prepare(target, settings)
    prepared.start(0).advance(1)
    return Plan(target, prepared, burn_in=0, keeps=1)


SMC_TRIAL_RUNS = 64


def score_of_population(method: Method, target: Target, settings: Json, seed: int) -> float:
    """Effective draws per second of a trial, from several small populations."""
    exact, variance = target.moments
    prepared = method.prepare(target, dict(settings, particles=SMALL_POPULATION))
    planned = Plan(target, prepared, burn_in=0, keeps=1)
    planned.repeat(seed)  # compiles
    runs = [planned.repeat(seed + i) for i in range(1, SMC_TRIAL_RUNS + 1)]
    errors = np.stack([run.found.mean - exact for run in runs])
    return measure.effective_draws(errors, variance) / float(np.mean([run.sampling for run in runs]))


class Tuned(NamedTuple):
    """The best of the trials, and what each of them gave."""

    settings: Json
    planned: Plan
    trials: list[Json]


def tune(method: Method, target: Target, protocol: Protocol, seed: int) -> Tuned:
    """Tries the settings of a method, each in half a repetition, and keeps the best."""
    exact, variance = target.moments
    best, plans, tried = 0, [], []
    candidates = method.trials(target)[: protocol.trials]
    for settings in candidates:
        if method.population and len(candidates) == 1:
            score = math.nan  # nothing to choose from
        elif method.population:
            score = score_of_population(method, target, settings, seed)
        else:
            plans.append(plan(method, target, settings, protocol.seconds, protocol.burn_in))
            one = plans[-1].halved().repeat(seed)
            score = measure.effective_draws_of_one_run(one.found, exact, variance) / one.sampling
        tried.append({"settings": settings, "per_second": score})
        if score > tried[best]["per_second"]:
            best = len(tried) - 1
    settings = dict(tried[best]["settings"])
    planned = (
        plan_population(method, target, settings, protocol.seconds) if method.population else plans[best]
    )
    return Tuned(settings, planned, tried)


def precise(errors: list[np.ndarray], variance: np.ndarray, protocol: Protocol) -> bool:
    """Whether the repetitions so far are enough."""
    if len(errors) < protocol.repetitions:
        return False
    scatter = measure.effective_draws_error(np.stack(errors), variance)
    return len(errors) >= protocol.most_repetitions or not scatter > ENOUGH


def measure_method(method: Method, target: Target, protocol: Protocol, seed: int) -> Json:
    """One line of the table."""
    settings, planned, tried = tune(method, target, protocol, seed)
    exact, variance = target.moments
    runs: list[Repetition] = []
    arviz = math.nan
    while not precise([run.found.mean - exact for run in runs], variance, protocol):
        one = planned.repeat(seed + 1000 * (len(runs) + 1))
        if not runs and not method.population:
            arviz = measure.arviz_draws(one.draws, target.functions, exact) / one.sampling
        runs.append(one._replace(draws=[]))
    errors = np.stack([run.found.mean - exact for run in runs])
    sampling, burn_in = (
        float(np.mean([getattr(run, key) for run in runs])) for key in ("sampling", "burn_in")
    )
    effective = measure.effective_draws(errors, variance)
    gradients = float(np.mean([run.gradients for run in runs]))
    result = {
        "settings": settings,
        "trials": tried,
        "repetitions": len(runs),
        "effective_draws": effective,
        "relative_error": measure.effective_draws_error(errors, variance),
        "seconds": sampling,
        "burn_in_seconds": burn_in,
        "wall_seconds": float(np.mean([run.wall for run in runs])),
        "per_second": effective / sampling,
        "per_second_with_burn_in": effective / (sampling + burn_in),
        "arviz_per_second": arviz,
        "gradients_per_second": gradients / sampling,
        "gradients_per_draw": gradients / effective if effective > 0 else float("inf"),
        "versions": method.versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if target.modes > 1:
        distances = [measure.total_variation(run.found.mean, exact) for run in runs]
        result["mode_weight_error"] = float(np.mean(distances))
    else:
        result["largest_bias"] = float(np.abs(errors.mean(0) / np.sqrt(variance)).max())
    if method.name in (OURS, CONTROL):
        result["gradient_share"] = gradient_share(target, settings)
        result["window_share"] = float(np.mean([run.found.weights.mean() for run in runs]) / planned.keeps)
    return result


# ------------------------------------------------------------------------------------------ the run


def reference(found: Json, protocol: Protocol) -> tuple:
    """Moments of the logistic regression, computed once and kept with the results."""
    kept = found["references"].get(REFERENCE)
    if kept is None or kept["draws"] < protocol.reference_draws:
        moments = hmc_moments(breast_cancer(), protocol.reference_draws, seed=20240501)
        kept = {"draws": protocol.reference_draws, "moments": [m.tolist() for m in moments]}
        found["references"][REFERENCE] = kept
    return tuple(np.array(m) for m in kept["moments"])


def targets(found: Json, protocol: Protocol) -> dict[str, Callable[[], Target]]:
    return {
        "grid": grid,
        "two modes": two_modes,
        "diabetes": diabetes,
        "breast cancer": lambda: breast_cancer(reference(found, protocol)),
    }


def about() -> Json:
    names = [line.split(":")[1].strip() for line in cpuinfo() if line.startswith("model name")]
    described = machine.describe(torch.device("cpu"))
    return described | {"processor": names[0] if names else platform.processor(), "threads": 1}


def cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def save(found: Json, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samplers.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "samplers.md").write_text(markdown(found), encoding="utf-8")


def load(folder: Path, protocol: Protocol, fresh: bool) -> Json:
    """What an earlier run with the same protocol left, or the frame of a new one."""
    empty = {"machine": about(), "protocol": protocol._asdict(), "references": {}, "targets": {}}
    path = folder / "samplers.json"
    if fresh or not path.exists():
        return empty
    found = json.loads(path.read_text())
    return found if found["protocol"] == protocol._asdict() else empty


def on_one_thread() -> None:
    """One processor for the whole process; must come before JAX starts its threads."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def run(
    folder: Path,
    protocol: Protocol,
    only_targets: list[str] | None = None,
    only_methods: list[str] | None = None,
    fresh: bool = False,
) -> Json:
    """Measures what is missing, saves after every method, and returns everything."""
    found = load(folder, protocol, fresh)
    for name, build in targets(found, protocol).items():
        if only_targets is not None and name not in only_targets:
            continue
        target = build()
        kept = found["targets"].setdefault(name, {"title": target.title, "methods": {}, "skipped": {}})
        for method in METHODS:
            chosen = only_methods is None or method.name in only_methods
            if not chosen or method.name in kept["methods"] or not applies(method, target):
                continue
            kept["skipped"].pop(method.name, None)
            try:
                method.versions()
                begin = time.perf_counter()
                one = measure_method(method, target, protocol, seed=int(time.time()) % 10**8)
            except Missing as error:
                kept["skipped"][method.name] = str(error)
                print(f"{name}: {method.name}: skipped: {error}", flush=True)
                continue
            kept["methods"][method.name] = one
            print(
                f"{name}: {method.name}: {one['per_second']:.3g} effective draws/s "
                f"(±{100 * one['relative_error']:.0f} %; {time.perf_counter() - begin:.0f} s)",
                flush=True,
            )
            save(found, folder)
    save(found, folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="about a minute; the numbers mean little")
    parser.add_argument("--fresh", action="store_true", help="ignore earlier results")
    parser.add_argument("--target", action="append", help="only this one (repeatable)")
    parser.add_argument("--method", action="append", help="only this one (repeatable)")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    arguments = parser.parse_args()
    on_one_thread()
    warnings.filterwarnings("ignore", category=FutureWarning, module="posteriors|tensordict")
    protocol = QUICK if arguments.quick else FULL
    folder = arguments.out or (RESULTS / "quick" if arguments.quick else RESULTS)
    run(folder, protocol, arguments.target, arguments.method, arguments.fresh)
    print((folder / "samplers.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
