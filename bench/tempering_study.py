"""What the parts of the tempering study share: items, tables, numbers with errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ctld_cuda import AdaptiveForce, Metadynamics, Tempering

Row = dict[str, Any]


class Item(NamedTuple):
    """One run: ``measure(settings, seed)`` returns a row of numbers; settings are plain JSON."""

    settings: Row
    measure: Callable[[Row, int], Row]


def tempering_of(settings: Row, **defaults: Any) -> Tempering:
    """A Tempering from plain JSON; "height", "gain" and "alone" describe the hills, height 0: none."""
    options = defaults | settings.get("tempering", {})
    height, gain, alone = options.pop("height", 0.02), options.pop("gain", 2.0), options.pop("alone", False)
    hills = Metadynamics(height=height, gain=gain) if height else None
    return Tempering(bias=hills if alone else AdaptiveForce(residual=hills), **options)


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits, with thousands separated; "-" for what is not known."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def with_error(pair: Sequence[float], scale: float = 1.0, sign: bool = False) -> str:
    """value ± error, to the first digit of the error (two if that is 1)."""
    value, error = (scale * x for x in pair)
    if not math.isfinite(value) or not math.isfinite(error):
        return number(value)
    decimals = 3
    if error > 0:
        decimals = max(
            0, (1 if error / 10 ** math.floor(math.log10(error)) < 2 else 0) - math.floor(math.log10(error))
        )
    return f"{value:{'+' if sign else ''},.{decimals}f} ± {error:,.{decimals}f}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown; the first column to the left, numbers to the right; followed by an empty line."""
    ruler = ["---"] + ["---:"] * (len(columns) - 1)
    return [*(f"| {' | '.join(cells)} |" for cells in (columns, ruler, *rows)), ""]


def options_text(options: Row) -> str:
    """Options that differ from the defaults, in words."""
    return (
        ", ".join(
            f"{name} {value:g}" if not isinstance(value, (bool, str)) else f"{name}={value}"
            for name, value in options.items()
        )
        or "defaults"
    )
