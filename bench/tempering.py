"""The tempering coordinate measured on targets with known laws: `python bench/tempering.py [--quick]`.

trips: round trips of alpha against dimension. heat: <r^2> at the automatic step size. bias: convergence of
the bias and of the free energies. noise: minibatch noise in the energy. window: the standardized coupling.

Every run is stored as soon as it is done, in <out>/tempering.json, and the tables in tempering.md; a run that
is there already, with the same settings, is not repeated. Seeds are fresh and stored with the results.
"""

from __future__ import annotations

import argparse
import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import tempering_bias
import tempering_heat
import tempering_noise
import tempering_trips
import tempering_window
import torch
from tempering_study import Item, Row

RESULTS = Path(__file__).resolve().parent / "results"
STUDIES = {
    "trips": tempering_trips,
    "heat": tempering_heat,
    "bias": tempering_bias,
    "noise": tempering_noise,
    "window": tempering_window,
}
TITLES = {
    "trips": "Round trips (exact coupling)",
    "heat": "⟨r²⟩ at the automatic step size (exact coupling)",
    "bias": "Convergence of the bias (exact coupling)",
    "noise": "Noise in the energy (exact coupling)",
    "window": "The window under the standardized coupling",
}


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"rows": {}}


def key_of(settings: Row) -> str:
    return json.dumps(settings, sort_keys=True)


def missing(name: str, items: list[Item], found: dict[str, Any]) -> Iterator[Item]:
    """Items without a stored row of the same settings."""
    stored = {key_of(row["settings"]) for row in found["rows"].get(name, [])}
    return (item for item in items if key_of(item.settings) not in stored)


def measured(item: Item) -> Row:
    """The stored form of one run."""
    seed = secrets.randbits(62)
    start = time.perf_counter()
    result = item.measure(item.settings, seed)
    return {
        "settings": item.settings,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 2),
        "commit": machine.commit(),
        "result": result,
    }


def flattened(name: str, items: list[Item], found: dict[str, Any]) -> list[Row]:
    """Rows of these items, in their order, settings and results side by side."""
    stored = {key_of(row["settings"]): row for row in found["rows"].get(name, [])}
    rows = [stored[key] for key in (key_of(item.settings) for item in items) if key in stored]
    return [row["settings"] | row["result"] for row in rows]


def markdown(found: dict[str, Any], studies: dict[str, list[Item]]) -> str:
    about = found["machine"]
    seconds = sum(row["seconds"] for rows in found["rows"].values() for row in rows)
    parts = [
        "# Tempering on targets with known laws",
        "",
        f"{about['device']}, torch {about['torch']}, {about['date']}, commit {about['commit']}; "
        f"{seconds / 60:.0f} minutes in all. Values ± standard errors, from the spread over chains (or "
        "over repeated runs where a table says so). T0 = 1, baoab; defaults where nothing else is said.",
        "",
    ]
    for name, items in studies.items():
        rows = flattened(name, items, found)
        if rows:
            parts += [f"## {TITLES[name]}", "", *STUDIES[name].tables(rows)]
    return "\n".join(parts).rstrip() + "\n"


def write(path: Path, found: dict[str, Any], studies: dict[str, list[Item]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(path)
    path.with_suffix(".md").write_text(markdown(found, studies), encoding="utf-8")


def run(names: list[str], quick: bool, folder: Path) -> None:
    path = folder / "tempering.json"
    found = load(path)
    found["machine"] = machine.describe(torch.device("cpu"))
    studies = {name: study.items(quick) for name, study in STUDIES.items()}
    for name in names:
        for item in missing(name, studies[name], found):
            row = measured(item)
            found["rows"].setdefault(name, []).append(row)
            print(f"{name} {row['seconds']:7.1f} s  {key_of(item.settings)}", flush=True)
            write(path, found, studies)
    write(path, found, studies)
    print(path.with_suffix(".md"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a minute, with large errors; stored elsewhere")
    parser.add_argument("--only", choices=STUDIES, action="append", help="this part only; may be repeated")
    parser.add_argument(
        "--out", type=Path, help="folder of the results (bench/results, or its subfolder quick)"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = options.out or (RESULTS / "quick" if options.quick else RESULTS)
    run(options.only or list(STUDIES), options.quick, folder)


if __name__ == "__main__":
    main()
