"""Times one optimizer step against peers in the same process, interleaved, and prints ratios.

Absolute times mean little on a shared machine, so every round times all contestants once, and the tables
show the median over rounds of the ratio to ``torch.optim.SGD(momentum, fused=True)``, which draws no noise.
bench/cpu.py says which rounds count on a CPU, bench/timing.py how a GPU is timed.

    python bench/step.py                      # on a GPU if there is one: all sizes, under 3 minutes
    python bench/step.py --device cpu         # 16M float32 parameters, all cores
    python bench/step.py --device cpu --numel 1000000 --rounds 50
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import cpu
import gpu
import report
import torch

from ctld_cuda import backend_info


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is a GPU")
    on_cpu = parser.add_argument_group("on a CPU")
    on_cpu.add_argument("--numel", type=int, default=1 << 24, help="parameters, in one tensor")
    on_cpu.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float64"], default="float32")
    on_cpu.add_argument("--rounds", type=int, default=31)
    on_cpu.add_argument("--threads", type=int, default=os.cpu_count())
    on_cpu.add_argument("--json", type=Path, help="also write the raw times here")
    on_gpu = parser.add_argument_group("on a GPU")
    on_gpu.add_argument("--seconds", type=float, default=80, help="time for the rounds; set-up comes on top")
    on_gpu.add_argument("--results", type=Path, help="folder for <device>.json and <device>.md")
    on_gpu.add_argument("--check", action="store_true", help="fail if a bound is missed")
    return parser


def run_on_cpu(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    steps = cpu.contestants(args.numel, getattr(torch, args.dtype))
    all_times, shares = cpu.measure(steps, args.rounds, args.threads)
    times, said = cpu.undisturbed(all_times, shares)
    machine = f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}"
    print(f"{args.numel} {args.dtype} parameters, {args.rounds} rounds, {machine}")
    print(said + "\n")
    print(cpu.table(times, args.numel))
    if args.json:
        args.json.write_text(
            json.dumps(
                {"machine": machine, "numel": args.numel, "shares": shares, "seconds": all_times}, indent=1
            )
        )


def run_on_gpu(args: argparse.Namespace) -> None:
    start = time.monotonic()
    for part, found in gpu.run(torch.device("cuda"), args.seconds):
        print(f"{time.monotonic() - start:5.0f} s: {part}", flush=True)
        if args.results:
            report.write(found, args.results)
    print(report.markdown(found))
    if args.check and not all(bound.holds for bound in report.bounds(found)):
        sys.exit("a bound is missed")


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    info = backend_info().get(device, {"usable": False, "reason": "not part of this version"})
    if not info["usable"]:
        parser.error(f"backend {device}: {info['reason']}")
    torch.manual_seed(0)
    (run_on_gpu if device == "cuda" else run_on_cpu)(args)


if __name__ == "__main__":
    main()
