"""What a step costs the host: many small tensors, on the CPU, against torch's fused optimizers.

The arithmetic of a few elements per tensor costs next to nothing, so that what is timed is the way to it.
All take turns within one run, ratios are taken round by round, and the clock counts this thread's own time,
not that of other programs. Then the same with the call of the kernel left out, the Python code that a step on
a GPU needs as well: in a process of its own, because a program has one optimizer, and with thousands of
tensors the time is that of the caches.

Run as ``python bench/host.py``; ``--save`` replaces bench/results/host.json and host.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from contestants import LR, MOMENTUM, NUM_DATA, parameter
from timing import Step, interleave, quartiles, ratio, rounds_within

from ctld_cuda import CTLD, Tempering

RESULTS = Path(__file__).parent / "results"
TENSORS = (10, 300, 3000)
SHAPES = ((4,), (2, 3), (5,), (1,))
SGD, ADAMW = "SGD(momentum, fused)", "AdamW(fused)"
TEMPERED, CONSTANT = "CTLD", "CTLD, tempering=None"
DECAYED = "CTLD, weight decay"
RECORDED = "CTLD, weight decay, history, thermostat"
OPTIONS: dict[str, dict[str, Any]] = {
    TEMPERED: {"tempering": Tempering()},
    CONSTANT: {"tempering": None},
    DECAYED: {"tempering": Tempering(), "weight_decay": 1e-4},
    RECORDED: {"tempering": Tempering(), "weight_decay": 1e-4, "history": 100, "thermostat": True},
}
# what a step may cost beyond the kernel
ALLOWED, ALLOWED_PER_TENSOR = 60e-6, 0.6e-6
SECONDS_PER_READING = 20e-3


class NoKernel:
    """Takes the place of a compiled plan, and does nothing."""

    def explore(self, *arguments: object) -> None:
        pass

    finetune = reduce_prior_energy = explore


def parameters(count: int) -> list[torch.nn.Parameter]:
    return [parameter(shape, torch.float32) for shape in itertools.islice(itertools.cycle(SHAPES), count)]


def ours(shared: list[torch.nn.Parameter], kernel: bool, **options: Any) -> Step:
    """Steps of CTLD with the loss as a tensor, or without one where there is no tempering."""
    optimizer = CTLD(shared, LR, MOMENTUM, NUM_DATA, backend="cpu", **options)
    arguments = {"loss": torch.tensor(1.0)} if options["tempering"] else {}
    optimizer.step(**arguments)
    if not kernel:
        optimizer._backend._plan = NoKernel()
    return lambda: optimizer.step(**arguments)


def contestants(count: int) -> dict[str, Step]:
    # the same for all: several sets of parameters would push each other out of the caches
    shared = parameters(count)
    found = {
        SGD: torch.optim.SGD(shared, LR, MOMENTUM, fused=True).step,
        ADAMW: torch.optim.AdamW(shared, LR, fused=True).step,
    }
    return found | {name: ours(shared, True, **options) for name, options in OPTIONS.items()}


def stopwatch(step: Step) -> Callable[[], float]:
    """Seconds per step, of as many as take some hundredths of a second."""
    step()
    start = time.thread_time()
    step()
    repeats = max(1, math.ceil(SECONDS_PER_READING / (time.thread_time() - start)))

    def measure() -> float:
        step()  # the caches held somebody else's data
        start = time.thread_time()
        for _ in range(repeats):
            step()
        return (time.thread_time() - start) / repeats

    return measure


def alone(name: str, count: int, seconds: float) -> tuple[float, float, float]:
    """Quartiles of the seconds per step without the kernel, in this process."""
    readings = interleave(
        {name: stopwatch(ours(parameters(count), False, **OPTIONS[name]))},
        rounds_within(seconds, least=9, most=199),
    )
    return quartiles(readings[name])


def alone_elsewhere(name: str, count: int, seconds: float) -> tuple[float, float, float]:
    """The same in a new process."""
    command = [sys.executable, __file__, "--alone", name, "--tensors", str(count), "--seconds", str(seconds)]
    return tuple(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def measure(count: int, seconds: float) -> dict[str, Any]:
    """Times in seconds (quartiles), ratios to the faster of torch's, and what the bars allow."""
    steps = contestants(count)
    readings = interleave(
        {name: stopwatch(step) for name, step in steps.items()}, rounds_within(seconds, least=9, most=199)
    )
    faster = min((SGD, ADAMW), key=lambda name: statistics.median(readings[name]))
    return {
        "tensors": count,
        "rounds": len(readings[SGD]),
        "seconds": {name: quartiles(times) for name, times in readings.items()},
        "faster": faster,
        "ratio": {name: ratio(readings[name], readings[faster]) for name in OPTIONS},
        "no kernel": {name: alone_elsewhere(name, count, seconds / len(OPTIONS)) for name in OPTIONS},
        "allowed": ALLOWED + ALLOWED_PER_TENSOR * count,
    }


def table(cases: list[dict[str, Any]]) -> str:
    lines = [
        "| tensors | | median, µs | quartiles | ratio | without the kernel, µs | allowed, µs |",
        "|---:|---|---:|---|---:|---:|---:|",
    ]
    for case in cases:
        for name in (SGD, ADAMW, *OPTIONS):
            low, median, high = (1e6 * t for t in case["seconds"][name])
            cells = [str(case["tensors"]), name, f"{median:.1f}", f"{low:.1f}–{high:.1f}"]
            if name in OPTIONS:
                host = 1e6 * case["no kernel"][name][1]
                cells += [f"{case['ratio'][name][1]:.2f}", f"{host:.1f}", f"{1e6 * case['allowed']:.0f}"]
            else:
                cells += ["", "", ""]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, nargs="+", default=TENSORS)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each number of tensors")
    parser.add_argument("--save", action="store_true", help="replace the results in bench/results")
    parser.add_argument("--alone", choices=OPTIONS, help="print the quartiles without the kernel, as JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.alone:
        print(json.dumps(alone(options.alone, options.tensors[0], options.seconds)))
        return {}
    cases = [measure(count, options.seconds) for count in options.tensors]
    found = {"machine": machine.describe(torch.device("cpu")), "cases": cases}
    print(table(cases))
    if options.save:
        (RESULTS / "host.json").write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / "host.md").write_text(page(found))
    return found


def page(found: dict[str, Any]) -> str:
    m = found["machine"]
    return (
        "# What a step costs the host\n\n"
        f"`python bench/host.py --save` with torch {m['torch']}, Python {m['python']}, one thread of "
        f"{m['system']}, {m['date']}, commit {m['commit']}. Tensors of 1 to 6 float32 elements; medians of "
        f"{', '.join(str(case['rounds']) for case in found['cases'])} interleaved rounds.\n\n"
        "The ratio is that to the faster of SGD and AdamW. Without the kernel: in a process of its own; "
        "allowed there are 60 µs and 0.6 µs per tensor.\n\n" + table(found["cases"]) + "\n"
    )


if __name__ == "__main__":
    main()
