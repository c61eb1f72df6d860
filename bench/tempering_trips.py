"""Round trips of alpha against dimension, spectrum, learning rate and shape; exact coupling, equilibrium."""

from __future__ import annotations

import math

import numpy as np
import tempering_targets as targets
from tempering_sampler import Means, RoundTrips, in_equilibrium
from tempering_study import Item, Row, number, options_text, table, tempering_of, with_error
from tempering_theory import (
    best_momentum,
    energy_time,
    hottest_edge,
    round_trip,
    shape_factor,
    share_of_way,
    stability_limit,
)

SLOW = {"lr": 0.01, "momentum": 0.9}
FAST = {"lr": 0.5 * stability_limit(0.5), "momentum": 0.5}
LEVERS = [
    {},
    *({"step_size": x} for x in (0.002, 0.005, 0.01, 0.03)),
    *({"persistence": x} for x in (0.0, 0.9, 0.995)),
    *({"max_temperature": x} for x in (2.0, 4.0, 100.0)),
    *({"flat": x} for x in (0.1, 0.8)),
    {"limit": 3.0},
    {"flat": 0.1, "limit": 3.0},
]


def measure(settings: Row, seed: int) -> Row:
    target = targets.make(settings)
    tempering = tempering_of(settings, coupling="exact")
    lr, momentum, chains = settings["lr"], settings["momentum"], settings["chains"]
    tau = energy_time(lr, momentum, target.curvatures)
    predicted = round_trip(tempering, target.dimension, tau)
    steps = round(min(max(settings["trips"] * predicted / chains, 2_000), settings["most_steps"]))
    run = in_equilibrium(target, tempering, lr=lr, momentum=momentum, chains=chains, seed=seed)
    run.steps(steps // 10 + 200)
    chance = share_of_way(run.alpha, tempering, target.dimension, tau)
    was_hot = np.random.default_rng(seed).random(chains) < chance
    trips = RoundTrips(run.alpha, tempering.flat, hottest_edge(tempering), was_hot)
    means = Means(chains)

    def watch() -> None:
        trips.watch()
        means.add("r^2", run.r * run.r)

    run.steps(steps, watch)
    return {
        "tau": tau,
        "predicted": predicted,
        "steps_per_trip": trips.steps_per_trip(),
        "trips": int(trips.trips.sum()),
        "r_square": means["r^2"],
        "steps": steps,
    }


def items(quick: bool) -> list[Item]:
    settings: list[Row] = []

    def add(
        part: str, dimension: int, dynamics: Row, trips: int = 400, most_steps: int = 120_000, **more: object
    ) -> None:
        chains = 200 if dimension <= 100 else 100 if dimension <= 1000 else 50
        settings.append(
            {"part": part, "dimension": dimension, **dynamics, "chains": chains, **more}
            | {"trips": 40 if quick else trips, "most_steps": 2_000 if quick else most_steps}
        )

    for dimension in (1, 100) if quick else (1, 10, 100):
        add("dimension", dimension, SLOW)
    for dimension in (100,) if quick else (1, 10, 100):
        add("dimension", dimension, FAST)
    # the error of V by the grid grows as d/bins^2: 60 bins make half a nat at d = 1000
    for dimension, bins, dynamics in (
        () if quick else ((1000, 60, FAST), (1000, 240, FAST), (10_000, 480, FAST))
    ):
        add("dimension", dimension, dynamics, 400 if dimension == 1000 else 60, tempering={"bins": bins})
    for dimension in () if quick else (1000, 3000):
        add("dimension", dimension, SLOW, 80 if dimension == 1000 else 30, tempering={"bins": 240})
    for condition, dimension in ((100.0, 100),) if quick else ((100.0, 100), (1000.0, 100), (100.0, 1000)):
        spectrum = {"target": "anisotropic", "condition": condition}
        curvatures = targets.anisotropic(dimension, condition).curvatures
        for share in (0.05, 0.5):
            lr = share * stability_limit(0.9)
            quickest = best_momentum(lr, curvatures)
            for momentum in dict.fromkeys((0.5, 0.9, quickest)):
                if lr < stability_limit(momentum):
                    dynamics = {"lr": lr, "momentum": momentum}
                    add("spectrum", dimension, dynamics, 100, 30_000, **spectrum, tempering={"bins": 240})
    for lever in LEVERS[:2] if quick else LEVERS:
        add("levers", 100, SLOW, tempering=lever)
    for dynamics in (
        () if quick else ((0.01, 0.5), (0.01, 0.99), (0.1, 0.9), (1.0, 0.9), (1.0, 0.5), (1.0, 0.0))
    ):
        add("levers", 100, dict(zip(("lr", "momentum"), dynamics, strict=True)))
    return [Item(s, measure) for s in settings]


def tables(rows: list[Row]) -> list[str]:
    def cells(row: Row) -> list[str]:
        measured, error = row["steps_per_trip"]
        quotient = (measured / row["predicted"], error / row["predicted"])
        return [
            number(row["tau"]),
            number(row["predicted"]),
            with_error((measured, error)),
            with_error(quotient),
        ]

    heads = ["τ (steps)", "predicted", "measured", "measured / predicted"]
    found = [
        "Steps per round trip, window to hottest bin and back. Predicted: limit · (√(2π)/ε + ∫ R dα over the",
        "ramp), R = 2(1−c)/((1+c)ε²) + λ′²(d/2)τ, with c = persistence, λ = ln β, and τ the correlation time",
        "of the energy, ½ + the sum of its autocorrelations.",
        "",
    ]
    part = [r for r in rows if r["part"] == "dimension"]
    found += table(
        ["d", "bins", "lr", "momentum", *heads],
        [
            [
                f"{r['dimension']:,}",
                str(tempering_of(r).bins),
                number(r["lr"]),
                f"{r['momentum']:g}",
                *cells(r),
            ]
            for r in part
        ],
    )
    part = [r for r in rows if r["part"] == "spectrum"]
    found += ["Curvatures from 1/condition to 1, evenly spaced in the logarithm:", ""]
    found += table(
        ["condition", "d", "lr", "momentum", *heads],
        [
            [f"{r['condition']:g}", f"{r['dimension']:,}", number(r["lr"]), f"{r['momentum']:g}", *cells(r)]
            for r in part
        ],
    )
    part = [r for r in rows if r["part"] == "levers"]
    found += [
        "What changes it, d = 100 (defaults: lr 0.01, momentum 0.9, T_max 10, flat 0.4, limit 1.5):",
        "",
    ]
    found += table(
        ["changed", "shape factor", *heads],
        [
            [
                ", ".join(
                    [
                        *([options_text(r["tempering"])] if r.get("tempering") else []),
                        *([f"lr {r['lr']:g}, momentum {r['momentum']:g}"] if "tempering" not in r else []),
                    ]
                )
                or "nothing",
                number(shape_factor(tempering_of(r))),
                *cells(r),
            ]
            for r in part
        ],
    )
    return found + shapes()


def shapes() -> list[str]:
    """How far the smoothstep is from the best shape, ln beta linear in alpha on the ramp."""
    found = []
    for hottest in (2.0, 10.0, 100.0):
        t = tempering_of({"tempering": {"max_temperature": hottest}})
        best = t.limit * math.log(hottest) ** 2 / (t.limit - t.flat)
        found.append([f"{hottest:g}", number(shape_factor(t)), number(best), number(shape_factor(t) / best)])
    lines = ["The shape factor limit · ∫λ′² dα, and its least value, (ln T_max)² limit/(limit − flat):", ""]
    return lines + table(["T_max", "smoothstep of √T", "ln T linear in α", "ratio"], found)
