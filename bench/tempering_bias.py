"""How fast the bias converges from a cold start: free energies, bias and flatness against time."""

from __future__ import annotations

import numpy as np
import tempering_targets as targets
import torch
from tempering_sampler import Run, spread_of
from tempering_study import Item, Row, options_text, table, tempering_of, with_error
from tempering_theory import bin_centers, root_temperature

LR, MOMENTUM = 0.1, 0.9
REPEATS = 3
DEFAULT, ALONE = {}, {"alone": True}
TALL = {"alone": True, "height": 0.2, "gain": 20.0}
VARIANTS = [
    DEFAULT,
    {"height": 0.0},
    *({"height": x} for x in (0.002, 0.2)),
    *({"gain": x} for x in (1.0, 10.0)),
    {"bins": 120},
    {"persistence": 0.9},
    ALONE,
    TALL,
]


def one_run(settings: Row, seed: int) -> list[dict[str, float]]:
    """Errors at the checkpoints; visits are those since the checkpoint before."""
    target = targets.make(settings)
    tempering = tempering_of(settings, coupling="exact")
    generator = torch.Generator().manual_seed(seed ^ 1)
    theta = target.draw(torch.ones(settings["chains"]), generator)
    run = Run(target, theta, tempering, lr=LR, momentum=MOMENTUM, seed=seed)
    exact = target.free_energy(-2.0 * np.log(root_temperature(bin_centers(tempering), tempering)))
    found, done, visits = [], 0, np.zeros(tempering.bins)
    for checkpoint in settings["checkpoints"]:
        run.steps(checkpoint - done)
        state = run.state()
        fresh = run.visits - visits
        done, visits = checkpoint, run.visits.copy()
        bias = state["bias"].numpy() - exact
        counted = state["free_energy_histogram"].numpy() - exact
        found.append(
            {
                "free_energy": float(np.abs(state["free_energy"].numpy() - exact).max()),
                "histogram": float(np.abs(counted).max()),
                "bias": float(np.sqrt(((bias - bias.mean()) ** 2).mean())),
                "uneven": float((fresh / fresh.mean()).std()),
                "r_square": float(state["alpha_kinetic_temperature"]),
            }
        )
    return found


def measure(settings: Row, seed: int) -> Row:
    seeds = np.random.SeedSequence(seed).generate_state(settings["repeats"], np.uint64) >> 1
    runs = [one_run(settings, int(s)) for s in seeds]
    names = runs[0][0].keys()
    at = range(len(settings["checkpoints"]))
    return {name: [spread_of([run[i][name] for run in runs]) for i in at] for name in names}


def items(quick: bool) -> list[Item]:
    short = [300, 1_000] if quick else [2_000, 10_000]
    long = short if quick else [100, 1_000, 10_000, 40_000]
    settings: list[Row] = []

    def add(part: str, target: str, dimension: int, tempering: Row, checkpoints: list[int]) -> None:
        settings.append(
            {"part": part, "target": target, "dimension": dimension, "tempering": tempering}
            | {"checkpoints": checkpoints, "chains": 50, "repeats": 2 if quick else REPEATS}
        )

    for tempering in (DEFAULT, ALONE) if quick else (DEFAULT, {"height": 0.0}, ALONE, TALL):
        add("decades", "isotropic", 20, tempering, long)
    for tempering in (DEFAULT, {"height": 0.0}) if quick else VARIANTS:
        for target, dimension in (("isotropic", 20),) if quick else (("isotropic", 20), ("isotropic", 100)):
            add("variants", target, dimension, tempering, short)
    for tempering in (
        () if quick else (DEFAULT, {"height": 0.0}, {"height": 0.002}, {"height": 0.2}, ALONE, TALL)
    ):
        for target, dimension in (("isotropic", 2), ("mixture", 20)):
            add("variants", target, dimension, tempering, short)
    return [Item(s, measure) for s in settings]


COLUMNS = {
    "free_energy": "free_energy, largest error (nats)",
    "histogram": "free_energy_histogram, largest error",
    "bias": "bias V, rms error",
    "uneven": "visits since the row before, rms/mean − 1",
    "r_square": "⟨r²⟩ so far",
}


def name_of(tempering: Row) -> str:
    kind = "hills alone" if tempering.get("alone") else "adaptive force"
    rest = {k: v for k, v in tempering.items() if k != "alone"}
    if rest.get("height") == 0.0:
        return f"{kind}, no hills"
    return kind if not rest else f"{kind}, {options_text(rest)}"


def tables(rows: list[Row]) -> list[str]:
    found = [
        f"lr {LR}, momentum {MOMENTUM}, 50 chains from a cold start (α = 0, θ from the target), means over",
        f"{REPEATS} runs. Isotropic Gaussian, d = 20:",
        "",
    ]
    part = [r for r in rows if r["part"] == "decades"]
    found += table(
        ["bias", "steps", *COLUMNS.values()],
        [
            [name_of(r["tempering"]), f"{t:,}", *(with_error(r[key][i]) for key in COLUMNS)]
            for r in part
            for i, t in enumerate(r["checkpoints"])
        ],
    )
    part = [r for r in rows if r["part"] == "variants"]
    for target, dimension in dict.fromkeys((r["target"], r["dimension"]) for r in part):
        mine = [r for r in part if (r["target"], r["dimension"]) == (target, dimension)]
        early, last = 0, -1
        found += [
            f"{target}, d = {dimension}: after {mine[0]['checkpoints'][early]:,} and "
            f"{mine[0]['checkpoints'][last]:,} steps",
            "",
        ]
        found += table(
            [
                "bias",
                *(
                    f"{COLUMNS[key]}, {when}"
                    for key in ("free_energy", "bias", "uneven")
                    for when in ("early", "late")
                ),
            ],
            [
                [name_of(r["tempering"])]
                + [with_error(r[key][i]) for key in ("free_energy", "bias", "uneven") for i in (early, last)]
                for r in mine
            ],
        )
    return found
