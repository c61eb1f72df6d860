"""What was run: a file of JSON lines per task, so that an interrupted study goes on where it was."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

Request = dict[str, Any]
Result = dict[str, float]
# asks for runs, is sent their results, ends with an answer
Asking = Generator[list[Request], list[Result], Any]


def column(results: Iterable[Result], metric: str, fall_back: bool = False) -> list[float]:
    """One metric of several runs; inf where a run has none.

    ``fall_back``: where a run has no average, because there was no draw, it is that of its trained model.
    """

    def value(result: Result) -> float:
        other = result.get(metric.removeprefix("average_"), math.inf) if fall_back else math.inf
        return result.get(metric, other)

    return [value(result) for result in results]


class Ledger:
    """Results by what was asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._results: dict[str, Result] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                self._results[_key(entry["request"])] = entry["result"]

    def get(self, request: Request) -> Result | None:
        return self._results.get(_key(request))

    def add(self, request: Request, result: Result) -> None:
        self._results[_key(request)] = result
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps({"request": request, "result": result}) + "\n")


def _key(request: Request) -> str:
    return json.dumps(request, sort_keys=True)


def carry_out(
    askings: Iterable[Asking], ledger: Ledger, execute: Any, workers: int, initialize: Any = None
) -> list[Any]:
    """Lets all of them ask, side by side, and returns their answers.

    ``execute(request)`` gives the result in one of ``workers`` processes; none, in this process, if 0.
    """
    pool = ProcessPoolExecutor(workers, initializer=initialize) if workers else None
    askings = list(askings)
    answers: list[Any] = [None] * len(askings)
    waiting: dict[int, list[Request]] = {}
    running: dict[str, Future] = {}
    known: dict[Future, Request] = {}

    def proceed(i: int, results: list[Result] | None) -> None:
        try:
            waiting[i] = askings[i].send(results)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration as stop:
            waiting.pop(i, None)
            answers[i] = stop.value

    try:
        for i in range(len(askings)):
            proceed(i, None)
        while waiting:
            for i, requests in list(waiting.items()):
                results = [ledger.get(request) for request in requests]
                if all(result is not None for result in results):
                    proceed(i, results)
                    continue
                for request, result in zip(requests, results, strict=True):
                    if result is not None or _key(request) in running:
                        continue
                    if pool is None:
                        ledger.add(request, execute(request))
                    else:
                        running[_key(request)] = future = pool.submit(execute, request)
                        known[future] = request
            if running:
                for future in wait(running.values(), return_when=FIRST_COMPLETED).done:
                    request = known.pop(future)
                    ledger.add(request, future.result())
                    del running[_key(request)]
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return answers
