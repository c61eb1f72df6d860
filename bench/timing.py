"""Clocks for steps on a CPU and on a GPU, interleaved rounds, and quartiles of what they gave."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], object]
T = TypeVar("T")


class Sample(NamedTuple):
    """Seconds per step: of the device's work, and of the calls that ask for it."""

    device: float
    host: float


class CpuClock:
    """On a CPU the calls are the work."""

    def stopwatch(self, step: Step) -> Callable[[], Sample]:
        """A function that measures a :class:`Sample` of ``step``."""
        seconds = self.throughput(step)

        def measure() -> Sample:
            elapsed = seconds()
            return Sample(elapsed, elapsed)

        return measure

    def throughput(self, step: Step) -> Callable[[], float]:
        """A function that measures the seconds per step as a caller sees them."""

        def measure() -> float:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start

        return measure

    def synchronize(self) -> None:
        pass


class CudaClock:
    """CUDA events around batches of steps on the current stream.

    A spinning kernel goes first. It keeps the GPU busy until the host has queued the batch, so that the
    events enclose the GPU's own work, back to back. Only where that would take too long, steps are timed as
    the host delivers them.
    """

    BATCH = 2e-3
    LONGEST_HEAD_START = 20e-3
    MARGIN = 1.5
    CYCLES_PER_SECOND = 2e9
    HOST_STEPS = 4
    THROUGHPUT_BATCH = 20e-3

    def stopwatch(self, step: Step) -> Callable[[], Sample]:
        """A function that measures a :class:`Sample` of ``step``."""
        host = self._host_seconds(step, self.HOST_STEPS)
        device = self._device_seconds(step, 1, self._head_start(host))
        longest = math.floor(self.LONGEST_HEAD_START / (self.MARGIN * host))
        repeats = max(1, min(math.ceil(self.BATCH / device), longest))

        def measure() -> Sample:
            step()  # whatever ran before had other data in the caches, and may have written the parameters
            host = self._host_seconds(step, min(repeats, self.HOST_STEPS))
            return Sample(self._device_seconds(step, repeats, self._head_start(repeats * host)), host)

        return measure

    def throughput(self, step: Step) -> Callable[[], float]:
        """A function that measures the seconds per step as a caller sees them: the slower of GPU and host."""
        repeats = max(1, math.ceil(self.THROUGHPUT_BATCH / self._elapsed_seconds(step, 1)))
        return lambda: self._elapsed_seconds(step, repeats)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def _head_start(self, queueing: float) -> float:
        seconds = self.MARGIN * queueing
        return seconds if seconds <= self.LONGEST_HEAD_START else 0.0

    def _host_seconds(self, step: Step, repeats: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - start) / repeats

    def _elapsed_seconds(self, step: Step, repeats: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    def _device_seconds(self, step: Step, repeats: int, head_start: float) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if head_start > 0:
            torch.cuda._sleep(round(head_start * self.CYCLES_PER_SECOND))
        begin.record()
        for _ in range(repeats):
            step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / repeats


def rounds_within(seconds: float, least: int = 5, most: int = 31) -> Iterator[int]:
    """Counts rounds until the time is up."""
    deadline = time.perf_counter() + seconds
    for done in range(most):
        if done >= least and time.perf_counter() > deadline:
            return
        yield done


def interleave(stopwatches: dict[str, Callable[[], T]], rounds: Iterable[Any]) -> dict[str, list[T]]:
    """Reads every stopwatch once per round."""
    readings: dict[str, list[T]] = {name: [] for name in stopwatches}
    for _ in rounds:
        for name, measure in stopwatches.items():
            readings[name].append(measure())
    return readings


def quartiles(values: Iterable[float]) -> list[float]:
    return statistics.quantiles(values, n=4)


def ratio(times: list[float], base: list[float], factor: float = 1.0) -> list[float]:
    """Quartiles of ``factor * times / base``, taken round by round."""
    return quartiles(factor * t / b for t, b in zip(times, base, strict=True))


class Launches(NamedTuple):
    """Per step: kernels, and copies and fills that the driver does."""

    kernels: float
    transfers: float


SEPARATOR = "spin_kernel"
LAUNCHES = {"kernel": Launches(1, 0), "gpu_memcpy": Launches(0, 1), "gpu_memset": Launches(0, 1)}


def count_launches(steps: dict[str, Step], repeats: int = 2) -> dict[str, Launches] | None:
    """What each step launches, seen by the profiler; None if the profiler saw something else."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for step in steps.values():
            # once uncounted: the step before may have been another optimizer's
            for count in (1, repeats):
                torch.cuda._sleep(1)
                for _ in range(count):
                    step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        found = split_launches(json.loads(path.read_text())["traceEvents"])
    if len(found) != 2 * len(steps):
        return None
    counted = zip(steps, found[1::2], strict=True)
    return {name: Launches(*(count / repeats for count in own)) for name, own in counted}


def split_launches(events: list[dict[str, Any]]) -> list[Launches]:
    """Launches in the trace after each separator."""
    found: list[Launches] = []
    on_gpu = [event for event in events if event.get("cat") in LAUNCHES]
    for event in sorted(on_gpu, key=lambda event: event["ts"]):
        if SEPARATOR in event["name"]:
            found.append(Launches(0, 0))
        elif found:
            found[-1] = Launches(*map(sum, zip(found[-1], LAUNCHES[event["cat"]], strict=True)))
    return found
