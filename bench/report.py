"""Tables of the GPU benchmark, and the bounds that the project holds itself to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import chains
from contestants import ADAM, COMPILED, EAGER, SGD, TEMPERED

LARGE = 10**8


class Bound(NamedTuple):
    """``value`` is None where it could not be measured; then the bound counts as missed."""

    where: str
    what: str
    value: float | None
    limit: float
    at_most: bool

    @property
    def holds(self) -> bool:
        if self.value is None:
            return False
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def __str__(self) -> str:
        verdict = "pass" if self.holds else "MISS"
        sign = "≤" if self.at_most else "≥"
        value = "not measured" if self.value is None else f"{self.value:.2f}"
        return f"{verdict}  {self.where}: {self.what} {value} (bound: {sign} {self.limit:g})"


def bounds(found: dict[str, Any]) -> list[Bound]:
    """Every bound that applies to what was measured so far."""
    return [*case_bounds(found["cases"]), *chain_bounds(found.get("chains"))]


def case_bounds(cases: list[dict[str, Any]]) -> Iterator[Bound]:
    for case in cases:
        if case["dtype"] != "float32" or "contestants" not in case:
            continue
        if case["numel"] >= LARGE:
            yield from large_bounds(case)
        elif case["case"] == "1,000 × 64":
            yield from small_bounds(case)


def large_bounds(case: dict[str, Any]) -> Iterator[Bound]:
    where, ours = title(case), case["contestants"][TEMPERED]
    yield Bound(where, "share of the copy bandwidth", ours["of_copy"][1], 0.92, at_most=False)
    yield Bound(where, "time over fused SGD's", ours["over_sgd"][1], 1.0, at_most=True)
    yield Bound(where, "time over fused Adam's", over(case, ADAM), 0.75, at_most=True)
    yield Bound(where, "speed over eager torch's", speedup(case, EAGER), 5.0, at_most=False)
    if case["tensors"] == 1:
        yield Bound(where, "speed over compiled torch's", speedup(case, COMPILED), 1.5, at_most=False)


def small_bounds(case: dict[str, Any]) -> Iterator[Bound]:
    where, ours, sgd = title(case), case["contestants"][TEMPERED], case["contestants"][SGD]
    yield Bound(where, "GPU time over fused SGD's", ours["over_sgd"][1], 0.5, at_most=True)
    host = ours["host_seconds"][1] / sgd["host_seconds"][1]
    yield Bound(where, "host time over fused SGD's", host, 1.0, at_most=True)


def chain_bounds(result: dict[str, Any] | None) -> Iterator[Bound]:
    if result is not None:
        value = result["samplers"][chains.OURS]["speedup"][1]
        yield Bound("chains", "chain-steps per second over vmapped torch's", value, 50.0, at_most=False)


def speedup(case: dict[str, Any], other: str) -> float | None:
    """How many times as fast CTLD is as ``other``."""
    return case["contestants"][other]["over_ctld"][1] if other in case["contestants"] else None


def over(case: dict[str, Any], other: str) -> float | None:
    factor = speedup(case, other)
    return factor and 1 / factor


def title(case: dict[str, Any]) -> str:
    tensors = "1 tensor" if case["tensors"] == 1 else f"{case['tensors']:,} tensors"
    return f"{case['case']} {case['dtype']} ({case['numel']:,} parameters in {tensors})"


def spread(three: list[float]) -> str:
    low, middle, high = three
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def launches(one: dict[str, Any]) -> str:
    """Kernels per step, plus copies and fills where there are any."""
    if "kernels" not in one:
        return "?"
    return f"{one['kernels']:g}" + (f" + {one['transfers']:g}" if one["transfers"] else "")


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown; the first column to the left, numbers to the right."""
    ruler = ["---"] + ["---:"] * (len(columns) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (columns, ruler, *rows)]


def case_table(case: dict[str, Any]) -> str:
    heading = [f"### {title(case)}", ""]
    if "not_measured" in case:
        return "\n".join([*heading, f"Not measured: {case['not_measured']}.", ""])
    columns = ["step", "µs", "/ fused SGD (quartiles)", "bytes/parameter", "GB/s", "of copy bandwidth"]
    rows = [
        [
            name,
            f"{one['seconds'][1] * 1e6:.1f}",
            spread(one["over_sgd"]),
            f"{one['bytes_per_parameter']}",
            f"{one['bytes_per_second'] / 1e9:.0f}",
            spread(one["of_copy"]),
            launches(one),
            f"{one['host_seconds'][1] * 1e6:.0f}",
        ]
        for name, one in case["contestants"].items()
    ]
    notes = [f"{case['rounds']} rounds."]
    if case["in_l2"]:
        notes.append("Everything stays in the L2 cache: no measure of memory bandwidth.")
    notes += [f"Without {name}: {reason}." for name, reason in case["skipped"].items()]
    lines = table([*columns, "launches", "host µs"], rows)
    return "\n".join([*heading, *lines, "", " ".join(notes), ""])


def chain_table(result: dict[str, Any]) -> str:
    columns = ["sampler", "chain-steps/s", "µs", "GPU µs", "host µs"]
    columns += ["speed over vmapped (quartiles)", "on the GPU alone"]
    rows = [
        [
            name,
            f"{one['chain_steps_per_second']:.3g}",
            *(f"{one[key][1] * 1e6:.0f}" for key in ("seconds", "device_seconds", "host_seconds")),
            spread(one["speedup"]),
            f"{one['device_speedup'][1]:.1f}",
        ]
        for name, one in result["samplers"].items()
    ]
    heading = f"### {result['chains']:,} chains of {result['dimension']} parameters"
    notes = [f"{result['rounds']} rounds; optimizer steps only, gradients given."]
    notes += [f"Without {name}: {reason}." for name, reason in result["skipped"].items()]
    return "\n".join([heading, "", *table(columns, rows), "", " ".join(notes), ""])


def markdown(found: dict[str, Any]) -> str:
    machine = found["machine"]
    about = [machine["device"], f"torch {machine['torch']}", machine["date"], f"commit {machine['commit']}"]
    if machine.get("nvidia_smi"):
        about.insert(1, f"driver {machine['nvidia_smi'][0]['driver_version']}, CUDA {machine['cuda']}")
    parts = [
        "# One optimizer step on a GPU",
        "",
        ", ".join(about) + ".",
        "",
        "Times are those of the GPU's own work: medians over interleaved rounds; ratios are taken round",
        "by round. Bytes per parameter are what the step must read and write. The bandwidth follows from",
        "them, and is compared with that of a copy of as many elements in the same round. Launches are",
        "kernels per step, plus copies and fills. Host time is that of the calls, without waiting.",
        "",
        "```",
        *map(str, bounds(found)),
        "```",
        "",
        *map(case_table, found["cases"]),
    ]
    if "chains" in found:
        parts.append(chain_table(found["chains"]))
    return "\n".join(parts)


def file_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write(found: dict[str, Any], folder: Path) -> None:
    """``folder``/<device>.json and .md."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(found["machine"]["device"])
    verdicts = [bound._asdict() | {"holds": bound.holds} for bound in bounds(found)]
    path.with_suffix(".json").write_text(json.dumps(found | {"bounds": verdicts}, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(found), encoding="utf-8")
