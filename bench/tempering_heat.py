"""<r^2> at the automatic step size, exact coupling, in equilibrium: over d, lr, momentum and T_max."""

from __future__ import annotations

import tempering_targets as targets
from tempering_sampler import Means, in_equilibrium
from tempering_study import Item, Row, number, table, tempering_of, with_error
from tempering_theory import (
    energy_time,
    log_beta_slope,
    r_square,
    root_temperature,
    stability_limit,
)

from ctld_cuda.tempering import default_step_size, steepest_slope

STEEP = 0.8
"""The steep part is where |d ln beta/d alpha| is at least this share of its maximum."""

EVERY = 4


def measure(settings: Row, seed: int) -> Row:
    target = targets.make(settings)
    tempering = tempering_of(settings, coupling="exact")
    momentum, chains = settings["momentum"], settings["chains"]
    lr = settings["lr_share"] * stability_limit(momentum)
    run = in_equilibrium(target, tempering, lr=lr, momentum=momentum, chains=chains, seed=seed)
    means = Means(chains)
    steepest = STEEP * steepest_slope(tempering)

    def watch() -> None:
        square = run.r * run.r
        means.add("r^2", square)
        means.add("steep", square, log_beta_slope(run.alpha, tempering) >= steepest)
        relative = run.energy / (0.5 * target.dimension * root_temperature(run.alpha, tempering) ** 2)
        means.add("window", relative, abs(run.alpha) <= tempering.flat)

    run.steps(settings["steps"] // 4)
    run.steps(settings["steps"], watch, EVERY)
    return {
        "step_size": default_step_size(tempering, target.dimension),
        "tau": energy_time(lr, momentum, target.curvatures),
        "r_square": means["r^2"],
        "steep": means["steep"],
        "window": means["window"],
        "predicted": r_square(tempering, target.dimension),
        "predicted_steep": r_square(tempering, target.dimension, STEEP),
    }


def items(quick: bool) -> list[Item]:
    dimensions = (2, 100) if quick else (1, 2, 10, 100, 1000, 5000)
    shares = (0.1,) if quick else (0.001, 0.01, 0.1, 0.5)
    momenta = (0.5, 0.99) if quick else (0.5, 0.9, 0.99)
    settings = [
        {
            "dimension": d,
            "tempering": {"max_temperature": hottest},
            "momentum": momentum,
            "lr_share": share,
            "chains": 200 if d <= 100 else 100 if d <= 1000 else 50,
            "steps": 600 if quick else 3_000,
        }
        for d in dimensions
        for hottest in ((10.0,) if quick or d > 1000 else (2.0, 10.0, 100.0))
        for momentum in momenta
        for share in shares
    ]
    return [Item(s, measure) for s in settings]


def tables(rows: list[Row]) -> list[str]:
    found = [
        "⟨r²⟩ where the slope of ln β is at least 0.8 of its maximum. Predicted: 1 − ε²K/4, K = λ′²d/2: at",
        "the end of a BAOAB step r is half a kick late, whatever lr and momentum are. lr in shares of the",
        "stability limit.",
        "",
    ]
    shares = sorted({r["lr_share"] for r in rows})
    heads = ["d", "T_max", "ε", "momentum", *(f"lr {s:g}" for s in shares), "predicted"]
    lines: dict[tuple, dict] = {}
    for r in rows:
        key = (r["dimension"], r["tempering"]["max_temperature"], r["momentum"])
        lines.setdefault(key, {"row": r})[r["lr_share"]] = with_error(r["steep"])
    found += table(
        heads,
        [
            [f"{d:,}", f"{hottest:g}", number(line["row"]["step_size"]), f"{momentum:g}"]
            + [line.get(s, "–") for s in shares]
            + [f"{line['row']['predicted_steep']:.3f}"]
            for (d, hottest, momentum), line in lines.items()
        ],
    )
    outside = [r for r in rows if abs(r["r_square"][0] - 1.0) > 0.1 + 3.0 * r["r_square"][1]]
    z = [(r["r_square"][0] - r["predicted"]) / r["r_square"][1] for r in rows]
    rms = (sum(x * x for x in z) / len(z)) ** 0.5
    worst = max(rows, key=lambda r: abs(r["window"][0] - 1.0) / r["window"][1])
    found += [
        f"{len(rows)} cells. ⟨r²⟩ over all of α is outside 1 ± 0.1 by more than 3 standard errors in "
        f"{len(outside)} of them, and off its prediction by {rms:.2f} standard errors in the root mean "
        f"square (largest {max(map(abs, z)):.1f}). Mean energy in the window, the worst of all: "
        f"{with_error(worst['window'])} of the exact one.",
        "",
    ]
    return found
