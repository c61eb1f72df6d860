"""White noise in the energies that alpha feels (minibatches), exact coupling: harm, and can it be measured?

Chains start in equilibrium; the bias learns from nothing. Errors are from the spread over repetitions for the
free energy, over chains for everything else.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import tempering_targets as targets
from tempering_sampler import Means, Run, in_equilibrium, spread_of
from tempering_study import Item, Row, number, table, tempering_of, with_error
from tempering_theory import (
    bin_centers,
    correctable_noise,
    energy_time,
    noisy_r_square,
    root_temperature,
    round_trip,
    second_difference_floor,
    stability_limit,
)

SECOND, FOURTH = (1.0, -2.0, 1.0), (1.0, -4.0, 6.0, -4.0, 1.0)


class NoiseEstimate:
    """sigma^2 of white noise from differences of successive energies of a chain.

    Differences of order n of white noise have variance (2n choose n) sigma^2 (6 and 70 for n = 2 and 4),
    while those of a smooth energy are small.
    """

    def __init__(self, chains: int, weights: tuple[float, ...]) -> None:
        self.weights = np.array(weights)
        self.norm = float((self.weights**2).sum())
        self.recent: deque[np.ndarray] = deque(maxlen=len(weights))
        self.means = Means(chains)

    def add(self, energy: np.ndarray, inside: np.ndarray) -> None:
        """Energies (C,) of one step and who was in the window; successive calls, successive steps."""
        self.recent.append(energy)
        if len(self.recent) == self.weights.size:
            square = np.tensordot(self.weights, np.stack(self.recent), 1) ** 2 / self.norm
            self.means.add("all", square)
            self.means.add("window", square, inside)

    def sigma(self, where: str) -> tuple[float, float]:
        """Estimate and standard error."""
        square, error = self.means[where]
        root = math.sqrt(square) if square > 0 else math.nan
        return root, error / (2.0 * root) if root else math.nan


def one_run(settings: Row, seed: int) -> tuple[Run, Means, dict[str, NoiseEstimate]]:
    target = targets.make(settings)
    thermal = math.sqrt(0.5 * target.dimension)
    sigma = settings["ratio"] * thermal
    known = {"energy_noise": sigma} if settings["known"] else {}
    tempering = tempering_of(settings, coupling="exact", **known)
    run = in_equilibrium(
        target,
        tempering,
        lr=settings["lr_share"] * stability_limit(settings["momentum"]),
        momentum=settings["momentum"],
        chains=settings["chains"],
        seed=seed,
        noise=sigma,
        learning=True,
    )
    means = Means(run.chains)
    estimates = {"second": NoiseEstimate(run.chains, SECOND), "fourth": NoiseEstimate(run.chains, FOURTH)}

    def watch() -> None:
        means.add("r^2", run.r * run.r)
        inside = np.abs(run.alpha) <= tempering.flat
        relative = run.energy / (0.5 * target.dimension)
        means.add("window", relative, inside)
        means.add("share", inside.astype(float))
        for estimate in estimates.values():
            estimate.add(run.given, inside)

    run.steps(settings["steps"] // 5)
    run.steps(settings["steps"], watch)
    return run, means, estimates


def measure(settings: Row, seed: int) -> Row:
    target = targets.make(settings)
    thermal = math.sqrt(0.5 * target.dimension)
    runs = [one_run(settings, int(s)) for s in np.random.SeedSequence(seed).generate_state(3, np.uint64) >> 1]
    tempering = runs[0][0].tempering
    exact = target.free_energy(-2.0 * np.log(root_temperature(bin_centers(tempering), tempering)))
    largest = [float(np.abs(run.state()["free_energy"].numpy() - exact).max()) for run, _, _ in runs]
    tau = energy_time(
        settings["lr_share"] * stability_limit(settings["momentum"]), settings["momentum"], target.curvatures
    )
    row = {
        "thermal": thermal,
        "tau": tau,
        "free_energy_error": spread_of(largest),
        "free_energy": float(exact.max()),
        "floor": second_difference_floor(
            settings["lr_share"] * stability_limit(settings["momentum"]),
            settings["momentum"],
            target.curvatures,
        ),
    }
    for name in ("r^2", "window", "share"):
        row[name] = pooled([means[name] for _, means, _ in runs])
    for order in ("second", "fourth"):
        for where in ("all", "window"):
            row[f"{order} {where}"] = [
                x / thermal for x in pooled([found[order].sigma(where) for _, _, found in runs])
            ]
    return row


def predicted(row: Row) -> str:
    """<r^2> of the linear theory, where it holds."""
    if row["ratio"] > 1.0 or row["dimension"] < 100:
        return "–"
    lr = row["lr_share"] * stability_limit(row["momentum"])
    t = tempering_of(row, coupling="exact")
    return f"{noisy_r_square(t, row['dimension'], lr, row['momentum'], row['ratio'], row['known']):.3f}"


def thresholds() -> list[str]:
    """How much noise raises <r^2> by 0.1, by the linear theory, and how much energy_noise can undo."""
    found = []
    for persistence in (0.98, 0.9, 0.5):
        t = tempering_of({"tempering": {"persistence": persistence}}, coupling="exact")
        for lr, momentum in ((0.003, 0.9), (0.01, 0.9), (0.1, 0.9), (0.3, 0.5), (1.5, 0.5)):
            tau = energy_time(lr, momentum, np.ones(1))
            heat = noisy_r_square(t, 1000, lr, momentum, 1.0, False) - noisy_r_square(
                t, 1000, lr, momentum, 0.0, False
            )
            found.append(
                [
                    f"{persistence:g}",
                    f"{lr:g}",
                    f"{momentum:g}",
                    number(tau),
                    number(math.sqrt(0.1 / heat), 2),
                    number(correctable_noise(t, 1000), 2),
                    number(round_trip(t, 1000, tau)),
                ]
            )
    lines = [
        "The σ_b (over the thermal spread) that raises ⟨r²⟩ by 0.1, and the largest that `energy_noise` can",
        "subtract, at the automatic step size and d = 1,000 (linear theory, curvature 1):",
        "",
    ]
    return lines + table(
        [
            "persistence",
            "lr",
            "momentum",
            "τ",
            "raises ⟨r²⟩ by 0.1",
            "can be subtracted",
            "steps per round trip",
        ],
        found,
    )


def pooled(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Mean of independent estimates of equal weight."""
    values, errors = np.array(pairs).T
    return float(values.mean()), float(np.sqrt((errors**2).sum()) / len(pairs))


def items(quick: bool) -> list[Item]:
    settings: list[Row] = []
    for d in (100,) if quick else (100, 1000):
        base = {
            "dimension": d,
            "momentum": 0.5,
            "lr_share": 0.1,
            "chains": 60,
            "steps": 800 if quick else 5_000,
        }
        # the momentum of 0.9 at a small lr has slow energies, 0.5 at a larger one fast ones
        for dynamics in ({}, {"momentum": 0.9, "lr_share": 0.0026}) if d == 100 else ({},):
            for ratio in (0.0, 3.0) if quick else (0.0, 0.3, 1.0, 3.0, 10.0):
                for known in (False, True) if ratio else (False,):
                    settings.append({"part": "harm", **base, **dynamics, "ratio": ratio, "known": known})
    for persistence in () if quick else (0.9, 0.5):
        base = {"dimension": 100, "chains": 60, "steps": 5_000, "tempering": {"persistence": persistence}}
        for momentum, share in ((0.5, 0.1), (0.9, 0.0026)):
            for ratio in (1.0, 3.0):
                settings.append(
                    {"part": "harm", **base, "momentum": momentum, "lr_share": share}
                    | {"ratio": ratio, "known": True}
                )
    floors = [(100, 0.9, share) for share in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)]
    floors += [(d, 0.9, 0.01) for d in (2, 10, 1000)] + [(100, mu, 0.01) for mu in (0.0, 0.5, 0.99)]
    for d, momentum, share in floors[:1] if quick else floors:
        settings.append(
            {
                "part": "floor",
                "dimension": d,
                "momentum": momentum,
                "lr_share": share,
                "ratio": 0.0,
                "known": False,
            }
            | {"chains": 50, "steps": 500 if quick else 2_000}
        )
    for condition in () if quick else (100.0, 1000.0):
        for share in (0.01, 0.1):
            settings.append(
                {"part": "floor", "target": "anisotropic", "condition": condition, "dimension": 100}
                | {"momentum": 0.9, "lr_share": share, "ratio": 0.0, "known": False}
                | {"chains": 50, "steps": 2_000}
            )
    return [Item(s, measure) for s in settings]


def tables(rows: list[Row]) -> list[str]:
    found = [
        "σ_b: standard deviation of white noise in the energy, in units of the thermal spread √(d/2) nats of",
        "U in the window. Estimates of σ_b by second differences, (U_t − 2U_(t+1) + U_(t+2))²/6, in the same",
        "units.",
        "",
    ]
    part = [r for r in rows if r["part"] == "harm"]
    found += table(
        [
            "d",
            "persistence",
            "τ",
            "σ_b",
            "energy_noise",
            "⟨r²⟩",
            "predicted",
            "window energy",
            "largest error of free_energy (nats)",
            "time in the window",
            "estimate, all",
            "estimate, window",
        ],
        [
            [
                f"{r['dimension']:,}",
                f"{tempering_of(r).persistence:g}",
                number(r["tau"]),
                f"{r['ratio']:g}",
                "known" if r["known"] else "0",
                with_error(r["r^2"]),
                predicted(r),
                with_error((r["window"][0] - 1.0, r["window"][1]), 100.0, sign=True) + " %",
                f"{with_error(r['free_energy_error'])} of {r['free_energy']:.0f}",
                with_error(r["share"], 100.0) + " %",
                with_error(r["second all"]),
                with_error(r["second window"]),
            ]
            for r in part
        ],
    )
    found += thresholds()
    part = [r for r in rows if r["part"] == "floor"]
    found += ["What the estimate reads without any noise:", ""]
    found += table(
        [
            "target",
            "d",
            "momentum",
            "lr / limit",
            "τ",
            "2nd differences, all",
            "window",
            "predicted, window",
            "4th differences, all",
            "window",
        ],
        [
            [
                "isotropic" if "condition" not in r else f"condition {r['condition']:g}",
                f"{r['dimension']:,}",
                f"{r['momentum']:g}",
                f"{r['lr_share']:g}",
                number(r["tau"]),
                with_error(r["second all"]),
                with_error(r["second window"]),
                number(r["floor"]),
                with_error(r["fourth all"]),
                with_error(r["fourth window"]),
            ]
            for r in part
        ],
    )
    return found
