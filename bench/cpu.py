"""The CPU benchmark: every instruction set, on one tensor.

Virtual processors may share a physical core with each other or with someone else. That halves the speed of
arithmetic but not of memory, and so changes the ratios. Before and after every round a small step, all of it
in cache, is timed on one and on all threads; a round counts as undisturbed if all threads together were at
least 0.75 times as fast as that many cores (0.85 is what Python leaves of 1). The table uses those rounds, if
there are enough.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator

import torch
from contestants import ADAM, COPY, EAGER, LR, MOMENTUM, NUM_DATA, SGD, copy, ctld, eager, parameter, peer
from timing import CpuClock, Step, interleave, ratio

from ctld_cuda import CTLD, Tempering, backend_info

UNDISTURBED = 0.75
ENOUGH_ROUNDS = 7


def contestants(numel: int, dtype: torch.dtype) -> dict[str, Step]:
    sgd, adam = torch.optim.SGD, torch.optim.Adam

    def own() -> list[torch.nn.Parameter]:
        return [parameter(numel, dtype)]

    def ours(isa: str, **options) -> Step:
        os.environ["CTLD_INSTRUCTION_SET"] = isa  # bound at the first step
        return ctld(own(), **options).step

    found = {
        SGD: peer(sgd, own(), momentum=MOMENTUM).step,
        "SGD(momentum, weight decay, fused)": peer(sgd, own(), momentum=MOMENTUM, weight_decay=1e-4).step,
        ADAM: peer(adam, own()).step,
        EAGER: eager(own(), dtype).step,
        COPY: copy(own()).step,
    }
    sets = backend_info()["cpu"]["instruction_sets"]
    for isa in sets:
        found[f"CTLD {isa}"] = ours(isa)
        found[f"CTLD {isa}, weight decay"] = ours(isa, weight_decay=1e-4)
        found[f"CTLD {isa}, euler, no tempering"] = ours(isa, integrator="euler", tempering=None)
    found[f"CTLD {sets[0]}, fine-tuning"] = ours(sets[0], explore_steps=0)
    found[f"CTLD {sets[0]}, exact"] = ours(sets[0], tempering=Tempering(coupling="exact"))
    return found


class Cores:
    """Tells how many whole cores the threads have, by steps that stay in cache."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        p = parameter(1 << 17, torch.float32)
        self.optimizer = CTLD([p], lr=LR, num_data=NUM_DATA, tempering=None, backend="cpu")
        self.optimizer.step()

    def seconds(self, threads: int, repeats: int = 20) -> float:
        torch.set_num_threads(threads)
        self.optimizer.step()
        start = time.perf_counter()
        for _ in range(repeats):
            self.optimizer.step()
        return time.perf_counter() - start

    def share(self) -> float:
        """Speed of all threads together over that of as many times one thread; 1 for whole cores."""
        alone = self.seconds(1)
        return alone / (self.threads * self.seconds(self.threads))

    def watch(self, rounds: int, shares: list[float]) -> Iterator[int]:
        """Counts rounds, and appends to ``shares`` the smaller share before and after each."""
        for done in range(rounds):
            before = self.share()
            yield done
            shares.append(min(before, self.share()))


def measure(steps: dict[str, Step], rounds: int, threads: int) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds per step, one list per contestant, and the share of whole cores, one entry per round."""
    for step in steps.values():
        step()
        step()
    shares: list[float] = []
    clock = CpuClock()
    stopwatches = {name: clock.throughput(step) for name, step in steps.items()}
    return interleave(stopwatches, Cores(threads).watch(rounds, shares)), shares


def undisturbed(times: dict[str, list[float]], shares: list[float]) -> tuple[dict[str, list[float]], str]:
    """The rounds with whole cores, if there are enough, and a sentence about them."""
    whole = [share >= UNDISTURBED for share in shares]
    said = f"{sum(whole)} of {len(shares)} rounds were undisturbed; median share of the cores {{:.2f}}"
    said = said.format(statistics.median(shares))
    if sum(whole) < ENOUGH_ROUNDS:
        return times, said + "; the table has all rounds"
    kept = {name: [t for t, keep in zip(own, whole, strict=True) if keep] for name, own in times.items()}
    return kept, said + "; the table has those"


def table(times: dict[str, list[float]], numel: int) -> str:
    lines = [
        "| step | ns/element | / fused SGD (quartiles) | eager / this |",
        "|---|---:|---:|---:|",
    ]
    for name, own in times.items():
        low, middle, high = ratio(own, times[SGD])
        nanoseconds = statistics.median(own) / numel * 1e9
        speedup = 1 / ratio(own, times[EAGER])[1]
        lines.append(f"| {name} | {nanoseconds:.2f} | {middle:.2f} ({low:.2f}-{high:.2f}) | {speedup:.1f} |")
    return "\n".join(lines)
