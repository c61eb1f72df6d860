"""The GPU benchmark: sizes and models in two dtypes, and many chains."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import chains
import contestants
import shapes
import torch
from contestants import COPY, SGD, TEMPERED, Builder, Contestant, Parameters, Unavailable
from machine import describe, l2_bytes
from timing import CpuClock, CudaClock, Sample, count_launches, interleave, quartiles, ratio, rounds_within

Clock = CpuClock | CudaClock

NEEDED = (COPY, SGD, TEMPERED)
NO_ROOM = "does not fit in memory besides the others"


class Case(NamedTuple):
    name: str
    shapes: list[shapes.Shape]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return shapes.numel(self.shapes)

    @property
    def title(self) -> str:
        return f"{self.name}, {str(self.dtype).removeprefix('torch.')}"


SIZES = {"1M": 10**6, "25M": 25 * 10**6, "100M": 10**8, "1G": 10**9}
MODELS = {
    "ResNet-50": shapes.resnet50,
    "ViT-B/16": shapes.vit_b16,
    "GPT-2 small": shapes.gpt2_small,
    "LSTM 256, 4 × 1024": shapes.lstm,
    "1,000 × 64": shapes.many_small,
}
DTYPES = (torch.float32, torch.bfloat16)


def cases() -> list[Case]:
    lists = {name: [(numel,)] for name, numel in SIZES.items()}
    lists |= {name: generate() for name, generate in MODELS.items()}
    return [Case(name, own, dtype) for dtype in DTYPES for name, own in lists.items()]


class TooLarge(Exception):
    """The case does not fit in memory."""


def build(
    case: Case, device: torch.device, builders: dict[str, Builder], clock: Clock
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Contestants that have done two steps, and the reasons why the others have not.

    Raises:
        TooLarge: if memory does not suffice for the parameters or for what the others are compared with.
    """
    built: dict[str, Contestant] = {}
    skipped: dict[str, str] = {}
    try:
        parameters: Parameters = [contestants.parameter(shape, case.dtype, device) for shape in case.shapes]
    except torch.OutOfMemoryError:
        raise TooLarge from None
    for name, builder in builders.items():
        try:
            built[name] = builder(parameters)
            built[name].step()
        except Unavailable as reason:
            skipped[name] = str(reason)
        except torch.OutOfMemoryError:
            built.pop(name, None)
            skipped[name] = NO_ROOM
    # again, now that all have their state; the least important first, which may make room for the others
    for name in reversed(list(built)):
        try:
            built[name].step()
            clock.synchronize()
        except torch.OutOfMemoryError:
            del built[name]
            skipped[name] = NO_ROOM
    if any(name in skipped for name in NEEDED):
        raise TooLarge
    return built, skipped


def release() -> None:
    """Returns the memory of the last case, cycles included, to the device."""
    gc.collect()
    torch.cuda.empty_cache()


def run_case(
    case: Case, device: torch.device, clock: Clock, builders: dict[str, Builder], rounds: Iterable[Any]
) -> dict[str, Any]:
    """Measures one case; see :func:`summary` for the result."""
    result = {
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "numel": case.numel,
        "tensors": len(case.shapes),
    }
    try:
        built, skipped = build(case, device, builders, clock)
    except TooLarge:
        return result | {"not_measured": "does not fit in memory"}
    stopwatches = {name: clock.stopwatch(contestant.step) for name, contestant in built.items()}
    samples = interleave(stopwatches, rounds)
    return result | {
        "in_l2": case.numel * built[TEMPERED].traffic <= l2_bytes(device),
        "rounds": len(samples[TEMPERED]),
        "skipped": skipped,
        "contestants": summary(case.numel, built, samples),
    }


def summary(
    numel: int, built: dict[str, Contestant], samples: dict[str, list[Sample]]
) -> dict[str, dict[str, Any]]:
    """Per contestant quartiles of the time, of its ratios (taken round by round) and of the bandwidth."""
    device = {name: [s.device for s in own] for name, own in samples.items()}
    found = {}
    for name, (_, traffic) in built.items():
        moved, copied = traffic * numel, built[COPY].traffic * numel
        # bandwidth / copy bandwidth = (moved / t) / (copied / t_copy)
        of_copy = ratio(device[COPY], device[name], moved / copied)
        found[name] = {
            "seconds": quartiles(device[name]),
            "host_seconds": quartiles(s.host for s in samples[name]),
            "over_sgd": ratio(device[name], device[SGD]),
            "over_ctld": ratio(device[name], device[TEMPERED]),
            "bytes_per_parameter": traffic,
            "bytes_per_second": moved / statistics.median(device[name]),
            "of_copy": of_copy,
        }
    return found


def add_launches(
    result: dict[str, Any], case: Case, device: torch.device, builders: dict[str, Builder], clock: Clock
) -> None:
    """Counts launches, apart from the timing, because a profiler may leave the calls slower."""
    wanted = {name: builders[name] for name in result.get("contestants", ())}
    if not wanted:
        return
    try:
        built, _ = build(case, device, wanted, clock)
    except TooLarge:
        return
    launches = count_launches({name: contestant.step for name, contestant in built.items()})
    for name, count in (launches or {}).items():
        result["contestants"][name] |= count._asdict()


def run(device: torch.device, seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Everything, measured for about ``seconds``; yields after each part its name and all that is known."""
    clock, all_cases = CudaClock(), cases()
    slice_of_time = seconds / (len(all_cases) + 2)  # chains take two
    found: dict[str, Any] = {"machine": describe(device), "cases": []}
    for case in all_cases:
        builders = contestants.on_gpu(case.dtype)
        found["cases"].append(run_case(case, device, clock, builders, rounds_within(slice_of_time)))
        release()
        yield case.title, found
    rounds = partial(rounds_within, slice_of_time)
    found["chains"] = chains.run(chains.CHAINS, chains.DIMENSION, device, clock, rounds)
    release()
    yield "chains", found
    for case, result in zip(all_cases, found["cases"], strict=True):
        add_launches(result, case, device, contestants.on_gpu(case.dtype), clock)
        release()
    yield "launches", found
