"""Times one optimizer step against peers in the same process, interleaved, and prints ratios.

Absolute times mean little on a shared machine, so every round times all contestants once, and the table
shows the median over rounds of the ratio to ``torch.optim.SGD(momentum, fused=True)``, which draws no noise.

Virtual processors may share a physical core with each other or with someone else. That halves the speed of
arithmetic but not of memory, and so changes the ratios. Before and after every round a small step, all of it
in cache, is timed on one and on all threads; a round counts as undisturbed if all threads together were at
least 0.75 times as fast as that many cores (0.85 is what Python leaves of 1). The table uses those rounds, if
there are enough.

    python bench/step.py                      # 16M float32 parameters, all cores
    python bench/step.py --numel 1000000 --rounds 50
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ctld_cuda import CTLD, Tempering, backend_info

LR, MOMENTUM, NUM_DATA = 1e-4, 0.9, 1000
UNDISTURBED = 0.75
ENOUGH_ROUNDS = 7


def parameter(numel: int, dtype: torch.dtype) -> torch.nn.Parameter:
    p = torch.nn.Parameter((torch.randn(numel) * 0.05).to(dtype))
    p.grad = (torch.randn(numel) * 0.01).to(dtype)
    return p


def ctld(numel: int, dtype: torch.dtype, isa: str, **options) -> Callable[[], None]:
    os.environ["CTLD_INSTRUCTION_SET"] = isa
    optimizer = CTLD(
        [parameter(numel, dtype)], lr=LR, momentum=MOMENTUM, num_data=NUM_DATA, backend="cpu", **options
    )
    loss = torch.tensor(1.0)
    optimizer.step(loss=loss)  # binds the instruction set
    return lambda: optimizer.step(loss=loss)


def peer(kind: type[torch.optim.Optimizer], numel: int, dtype: torch.dtype, **options) -> Callable[[], None]:
    optimizer = kind([parameter(numel, dtype)], lr=LR, fused=True, **options)
    return optimizer.step


def eager(numel: int, dtype: torch.dtype) -> Callable[[], None]:
    """The baoab update of CTLD in eager torch operations, with torch's own noise and energy."""
    theta = parameter(numel, dtype).detach()
    gradient = torch.randn_like(theta) * 0.01
    p = torch.zeros_like(theta)
    c = ((1 + MOMENTUM) / 2) ** 0.5
    kick, drift = (NUM_DATA * LR) ** 0.5 / c, 0.5 * (LR / NUM_DATA) ** 0.5 / c
    noise = (1 - MOMENTUM**2) ** 0.5

    def step() -> None:
        p.add_(gradient, alpha=-kick)
        theta.add_(p, alpha=drift)
        p.mul_(MOMENTUM).add_(torch.randn_like(p), alpha=noise)
        theta.add_(p, alpha=drift)
        (p * p).sum()

    return step


def copy(numel: int, dtype: torch.dtype) -> Callable[[], None]:
    source, target = torch.randn(numel).to(dtype), torch.empty(numel, dtype=dtype)
    return lambda: target.copy_(source)


def contestants(numel: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    sgd, adam = torch.optim.SGD, torch.optim.Adam
    found = {
        "SGD(momentum, fused)": peer(sgd, numel, dtype, momentum=MOMENTUM),
        "SGD(momentum, weight decay, fused)": peer(sgd, numel, dtype, momentum=MOMENTUM, weight_decay=1e-4),
        "Adam(fused)": peer(adam, numel, dtype),
        "eager torch, randn_like": eager(numel, dtype),
        "copy": copy(numel, dtype),
    }
    sets = backend_info()["cpu"]["instruction_sets"]
    for isa in sets:
        found[f"CTLD {isa}"] = ctld(numel, dtype, isa)
        found[f"CTLD {isa}, weight decay"] = ctld(numel, dtype, isa, weight_decay=1e-4)
        found[f"CTLD {isa}, euler, no tempering"] = ctld(
            numel, dtype, isa, integrator="euler", tempering=None
        )
    found[f"CTLD {sets[0]}, fine-tuning"] = ctld(numel, dtype, sets[0], explore_steps=0)
    found[f"CTLD {sets[0]}, exact"] = ctld(numel, dtype, sets[0], tempering=Tempering(coupling="exact"))
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


def measure(
    steps: dict[str, Callable[[], None]], rounds: int, threads: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds per step, one list per contestant, and the share of whole cores, one entry per round."""
    for step in steps.values():
        step()
        step()
    cores = Cores(threads)
    times: dict[str, list[float]] = {name: [] for name in steps}
    shares = []
    for _ in range(rounds):
        before = cores.share()
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
        shares.append(min(before, cores.share()))
    return times, shares


def undisturbed(times: dict[str, list[float]], shares: list[float]) -> tuple[dict[str, list[float]], str]:
    """The rounds with whole cores, if there are enough, and a sentence about them."""
    whole = [share >= UNDISTURBED for share in shares]
    said = f"{sum(whole)} of {len(shares)} rounds were undisturbed; median share of the cores {{:.2f}}"
    said = said.format(statistics.median(shares))
    if sum(whole) < ENOUGH_ROUNDS:
        return times, said + "; the table has all rounds"
    kept = {name: [t for t, keep in zip(own, whole, strict=True) if keep] for name, own in times.items()}
    return kept, said + "; the table has those"


def ratios(times: dict[str, list[float]], to: str) -> dict[str, list[float]]:
    """Quartiles of the ratio to the contestant ``to``, round by round."""
    base = times[to]
    return {
        name: statistics.quantiles([t / b for t, b in zip(own, base, strict=True)], n=4)
        for name, own in times.items()
    }


def table(times: dict[str, list[float]], numel: int) -> str:
    to_sgd = ratios(times, "SGD(momentum, fused)")
    to_eager = ratios(times, "eager torch, randn_like")
    lines = [
        "| step | ns/element | / fused SGD (quartiles) | eager / this |",
        "|---|---:|---:|---:|",
    ]
    for name, own in times.items():
        low, middle, high = to_sgd[name]
        nanoseconds = statistics.median(own) / numel * 1e9
        speedup = 1 / to_eager[name][1]
        lines.append(f"| {name} | {nanoseconds:.2f} | {middle:.2f} ({low:.2f}-{high:.2f}) | {speedup:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--numel", type=int, default=1 << 24, help="parameters, in one tensor")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float64"], default="float32")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="also write the raw times here")
    args = parser.parse_args()
    if not backend_info()["cpu"]["usable"]:
        parser.error(f"backend cpu: {backend_info()['cpu']['reason']}")

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    steps = contestants(args.numel, getattr(torch, args.dtype))
    all_times, shares = measure(steps, args.rounds, args.threads)
    times, said = undisturbed(all_times, shares)
    machine = f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}"
    print(f"{args.numel} {args.dtype} parameters, {args.rounds} rounds, {machine}")
    print(said + "\n")
    print(table(times, args.numel))
    if args.json:
        args.json.write_text(
            json.dumps(
                {"machine": machine, "numel": args.numel, "shares": shares, "seconds": all_times}, indent=1
            )
        )


if __name__ == "__main__":
    main()
