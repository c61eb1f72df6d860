"""coupling="standardized": how far the window is from the target, against alpha's speed and ``settle``."""

from __future__ import annotations

import math

import numpy as np
import tempering_targets as targets
import torch
from tempering_sampler import Means, Run, ratio
from tempering_study import Item, Row, table, tempering_of, with_error
from tempering_targets import Gaussian, Mixture, Quartic

SETTLES = (0, 50, 200, 800)
CELLS = 200
EVERY = 4

# the slowest mode relaxes in about (1 - momentum)/(lr k) steps: 26 and 260 for conditions 100 and 1000
CASES: list[Row] = [
    {"target": "isotropic", "dimension": 100, "lr": 0.1},
    {"target": "anisotropic", "condition": 100.0, "dimension": 20, "lr": 0.38},
    {"target": "anisotropic", "condition": 100.0, "dimension": 1000, "lr": 0.38},
    {"target": "anisotropic", "condition": 1000.0, "dimension": 20, "lr": 0.38},
    {"target": "quartic", "dimension": 20, "lr": 0.01},
    {"target": "mixture", "dimension": 20, "lr": 0.1},
]


class EnergyLaw:
    """Kolmogorov-Smirnov distance of energies from a gamma law, with the error where it is largest."""

    def __init__(self, shape: float, chains: int) -> None:
        grid = (np.arange(CELLS) + 0.5) / CELLS
        draws = np.sort(np.random.default_rng(0).standard_gamma(shape, 1_000_000))
        self.edges, self.expected = draws[(grid * draws.size).astype(int)], grid
        self.below = np.zeros((chains, CELLS))
        self.count = np.zeros((chains, 1))

    def add(self, energy: np.ndarray, inside: np.ndarray) -> None:
        self.below += (energy[:, None] <= self.edges) & inside[:, None]
        self.count += inside[:, None]

    def distance(self) -> tuple[float, float]:
        if not self.count.sum():
            return math.nan, math.nan
        found, error = ratio(self.below, np.broadcast_to(self.count, self.below.shape))
        worst = np.abs(found - self.expected).argmax()
        return float(abs(found[worst] - self.expected[worst])), float(error[worst])


def special(target: Gaussian | Quartic | Mixture, theta: np.ndarray) -> np.ndarray:
    """What is slowest, 1 in the mean: variance of the slowest fifth of the modes, or P(left) over its own."""
    if isinstance(target, Mixture):
        return (theta[:, 0] < 0) / target.left
    if isinstance(target, Quartic):
        return (theta**4).mean(1)
    slow = target.curvatures.argsort(kind="stable")[: max(1, target.dimension // 5)]
    return (theta[:, slow] ** 2 * target.curvatures[slow]).mean(1)


def measure(settings: Row, seed: int) -> Row:
    target = targets.make(settings)
    options = settings["tempering"]
    tempering = None if options is None else tempering_of(settings, coupling="standardized")
    generator = torch.Generator().manual_seed(seed ^ 1)
    theta = target.draw(torch.ones(settings["chains"]), generator)
    run = Run(target, theta, tempering, lr=settings["lr"], momentum=0.9, seed=seed)
    settles = SETTLES if tempering else (0,)
    means = {settle: Means(run.chains) for settle in settles}
    shape = getattr(target, "energy_shape", None)
    laws = {settle: EnergyLaw(shape, run.chains) for settle in settles if shape}
    streak = np.zeros(run.chains)
    flat = tempering.flat if tempering else 1.0

    def watch() -> None:
        np.add(streak, EVERY, out=streak)
        streak[np.abs(run.alpha) > flat] = 0
        # the parameters now, whose energy the next step will be given
        energy = run.target(run.theta, run.scratch).numpy()
        slow = special(target, run.theta.numpy())
        for settle in settles:
            inside = streak > settle if tempering else np.ones(run.chains, dtype=bool)
            means[settle].add("share", inside.astype(float))
            means[settle].add("energy", energy, inside)
            means[settle].add("square", energy * energy, inside)
            means[settle].add("slow", slow, inside)
            if settle in laws:
                laws[settle].add(energy, inside)

    run.steps(settings["steps"] // 4)
    before = run.visits.copy()
    run.steps(settings["steps"], watch, EVERY)
    row: Row = {"settle": list(settles)}
    for name in ("energy", "square", "slow", "share"):
        row[name] = [means[settle][name] for settle in settles]
    row["distance"] = [laws[settle].distance() if settle in laws else (math.nan, 0.0) for settle in settles]
    if tempering:
        fresh = (run.visits - before).astype(float)
        row["uneven"] = float((fresh / fresh.mean()).std())
        row["r_square"] = float(run.state()["alpha_kinetic_temperature"])
    return row


def items(quick: bool) -> list[Item]:
    settings: list[Row] = []
    for case in CASES[1:2] if quick else CASES:
        options: list[Row | None] = [None, {}]
        if not quick:
            options += [{"step_size": x} for x in (0.001, 0.002, 0.01, 0.02)]
            options += [{"coupling_strength": x} for x in (0.3, 3.0, 10.0)]
        for tempering in options:
            slow = tempering and tempering.get("step_size", 1.0) < 0.004
            steps = 1_500 if quick else 20_000 if slow else 10_000
            settings.append({**case, "tempering": tempering, "chains": 100, "steps": steps})
    return [Item(s, measure) for s in settings]


def title(row: Row) -> str:
    condition = f", condition {row['condition']:g}" if "condition" in row else ""
    return f"{row['target']}{condition}, d = {row['dimension']:,}, lr {row['lr']:g}"


def exact_energy(row: Row) -> tuple[float, float] | None:
    """Mean and variance of U in the target."""
    target = targets.make(row)
    shape = getattr(target, "energy_shape", None)
    return (shape, shape) if shape else None


def tables(rows: list[Row]) -> list[str]:
    found = [
        "Draws counted after `settle` consecutive steps in the window, against the target. Energy: excess of",
        "the mean over the target's, in units of its thermal spread; KS: largest distance of the law of U",
        "from the exact one; slow: variance of the slowest fifth of the modes (Gaussians), fourth moment",
        "(quartic), weight of the small mode (mixture), as excess over the exact value. Defaults: step_size",
        "0.005, coupling_strength 1. The constant temperature shows the errors of the integrator alone.",
        "",
    ]
    for name in dict.fromkeys(map(title, rows)):
        mine = [r for r in rows if title(r) == name]
        exact = exact_energy(mine[0])
        lines = []
        for r in mine:
            label = (
                "constant temperature"
                if r["tempering"] is None
                else (", ".join(f"{k} {v:g}" for k, v in r["tempering"].items()) or "defaults")
            )
            for i, settle in enumerate(r["settle"]):
                value, error = r["energy"][i]
                energy = (
                    with_error(
                        ((value - exact[0]) / math.sqrt(exact[1]), error / math.sqrt(exact[1])), sign=True
                    )
                    if exact
                    else "–"
                )
                slow = (r["slow"][i][0] - 1.0, r["slow"][i][1])
                lines.append(
                    [
                        label,
                        str(settle) if r["tempering"] is not None else "–",
                        with_error(r["share"][i], 100.0) + " %",
                        energy,
                        with_error(slow, 100.0, sign=True) + " %",
                        with_error(r["distance"][i]) if exact else "–",
                    ]
                )
        found += [name, ""]
        found += table(["sampler", "settle", "counted", "energy (spreads)", "slow", "KS"], lines)
    return found
