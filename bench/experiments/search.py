"""Tuning: a compass search over the logarithms of a method's settings, with a budget of trials."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

Point = tuple[float, ...]

_FINEST = 1.001


def compass(
    start: Point, factors: Sequence[float], budget: int
) -> Generator[list[Point], list[float], tuple[Point, list[tuple[Point, float]]]]:
    """Minimises a function of positive numbers; yields points to try, is sent their values.

    From ``start`` it goes along one axis after the other, by the factor given for it, towards the better of
    the two neighbours and on as long as that is better; when no step is, the factors become their square
    roots. The best point and all trials are returned after ``budget`` of them, or when the factors are next
    to 1. Axes are tried in the order of the point's numbers: the most important first.
    """
    factors = list(factors)
    trials: list[tuple[Point, float]] = []
    seen: dict[tuple[float, ...], float] = {}

    def value_at(point: Point) -> Generator[list[Point], list[float], float]:
        key = tuple(round(math.log(x), 6) for x in point)
        if key not in seen:
            if len(trials) == budget:
                raise _Spent
            (seen[key],) = yield [point]
            trials.append((point, seen[key]))
        return seen[key]

    best = start
    try:
        lowest = yield from value_at(start)
        while max(factors) > _FINEST:
            improved = False
            for axis, factor in enumerate(factors):
                found = {}
                for direction in (factor, 1.0 / factor):
                    found[direction] = yield from value_at(_moved(best, axis, direction))
                direction = min(found, key=lambda d: found[d])
                value = found[direction]
                while value < lowest:
                    best, lowest, improved = _moved(best, axis, direction), value, True
                    value = yield from value_at(_moved(best, axis, direction))
            if not improved:
                factors = [math.sqrt(f) for f in factors]
    except _Spent:
        pass
    # the budget may have ended between two neighbours
    return min(trials, key=lambda trial: trial[1])[0], trials


class _Spent(Exception):
    """The budget is."""


def _moved(point: Point, axis: int, factor: float) -> Point:
    return tuple(x * factor if i == axis else x for i, x in enumerate(point))


def asking(search: Generator, request_of: Callable[[Point], dict], value_of: Callable[[dict], float]) -> Any:
    """A search over points as one that asks for runs; see :mod:`.ledger`."""
    try:
        points = next(search)
        while True:
            results = yield [request_of(point) for point in points]
            points = search.send([value_of(result) for result in results])
    except StopIteration as stop:
        return stop.value
