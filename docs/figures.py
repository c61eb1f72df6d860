"""Draws the figures of the documentation from runs of the package, into docs/figures.

    python docs/figures.py                     # all of them: some minutes
    python docs/figures.py temperature phases  # only these

Needs the extra "examples". The figures are committed, so that building the site needs no run.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files, needs no display

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import mixture  # noqa: E402  (examples/ is not importable before the line above)

from ctld_cuda import CTLD, Tempering  # noqa: E402

Tensor = torch.Tensor
BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#BBBBBB"
COLORS = 128  # of the palette: keeps files small

# Ten coordinates, each in a double well whose left side is lower by 2 nats, behind a barrier of 7.
DIMENSION, BARRIER, TILT = 10, 8.0, 1.0
CHAINS, STEPS, EXPLORE = 400, 6_000, 4_000


def save(figure: Figure, name: str) -> None:
    """Writes a PNG with a palette."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=90)
    plt.close(figure)
    path = ROOT / "docs" / "figures" / f"{name}.png"
    Image.open(buffer).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"wrote {path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB", flush=True)


def temperature_of(alpha: np.ndarray, tempering: Tempering) -> np.ndarray:
    """T/T0, section 3 of docs/method.md."""
    z = np.clip((np.abs(alpha) - tempering.flat) / (tempering.limit - tempering.flat), 0.0, 1.0)
    return (1.0 + (np.sqrt(tempering.max_temperature) - 1.0) * (3.0 * z**2 - 2.0 * z**3)) ** 2


def draw_temperature() -> None:
    """T and beta over alpha."""
    tempering = Tempering()
    alpha = np.linspace(-tempering.limit, tempering.limit, 601)
    temperature = temperature_of(alpha, tempering)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    curves = ((left, temperature, r"$T(\alpha)/T_0$"), (right, 1.0 / temperature, r"$\beta(\alpha)$"))
    for axes, values, label in curves:
        axes.axvspan(-tempering.flat, tempering.flat, color=GRAY, alpha=0.5, linewidth=0, label="window")
        axes.plot(alpha, values, color=BLUE, linewidth=2)
        for wall in (-tempering.limit, tempering.limit):
            axes.axvline(wall, color="black", linewidth=2.5)
        axes.set(xlabel=r"$\alpha$", ylabel=label, ylim=(0.0, None))
        axes.legend(loc="upper center" if axes is left else "lower center")
    save(figure, "temperature")


def draw_mixture() -> None:
    """The figure of examples/mixture.py."""
    options = (15_000, 100, 0)
    tempered = mixture.sample(Tempering(max_temperature=10.0, coupling="exact"), *options)
    constant = mixture.sample(None, *options)
    print(mixture.table(tempered, constant))
    path = io.BytesIO()
    mixture.draw(tempered, constant, path)
    picture = Image.open(path).convert("RGB")
    picture = picture.resize((picture.width * 5 // 6, picture.height * 5 // 6), Image.Resampling.LANCZOS)
    target = ROOT / "docs" / "figures" / "mixture.png"
    picture.quantize(COLORS, dither=Image.Dither.NONE).save(target, optimize=True)
    print(f"wrote {target.relative_to(ROOT)}: {target.stat().st_size / 1000:.0f} kB", flush=True)


def wells(theta: Tensor) -> Tensor:
    """Energy of each chain, at theta (C, DIMENSION)."""
    return (BARRIER * (theta.square() - 1.0).square() + TILT * theta).sum(1)


def train(temperature: float, tempering: Tempering | None) -> tuple[Tensor, Tensor]:
    """Energies (STEPS, CHAINS), and T of the first chain, (STEPS,); all chains start in the wrong wells."""
    theta = torch.nn.Parameter(torch.ones(CHAINS, DIMENSION))
    optimizer = CTLD(
        [theta],
        lr=0.005,
        num_data=1,
        temperature=temperature,
        tempering=tempering,
        chains=CHAINS,
        explore_steps=EXPLORE,
    )
    energies, temperatures = torch.empty(STEPS, CHAINS), torch.empty(STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        energy = wells(theta)
        energy.sum().backward()
        optimizer.step(loss=energy.detach())
        energies[step] = energy.detach()
        temperatures[step] = optimizer.tempering_state()["temperature"][0]
    return energies, temperatures


def draw_phases() -> None:
    """Explore, then fine-tune: one chain in time, and where all chains end."""
    tempered, temperatures = train(1.0, Tempering(max_temperature=10.0, coupling="exact"))
    constant, _ = train(1.0, None)
    descent, _ = train(0.0, None)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.2), width_ratios=(2, 1), sharey=True, layout="constrained"
    )
    steps = np.arange(0, STEPS, 4)
    left.plot(steps, descent[steps, 0], color=ORANGE, linewidth=1.5, label="SGD with momentum")
    left.plot(steps, tempered[steps, 0], color=GRAY, linewidth=0.5, zorder=1)
    hot = np.clip(temperatures[steps].numpy(), 1.0, 10.0)
    norm = matplotlib.colors.LogNorm(1.0, 10.0)
    points = left.scatter(steps, tempered[steps, 0], c=hot, cmap=mixture.HEAT, norm=norm, s=5, label="CTLD")
    left.axvline(EXPLORE, color="black", linestyle="--", linewidth=1)
    left.text(EXPLORE - 40, 29, "explore", ha="right")
    left.text(EXPLORE + 40, 29, "fine-tune")
    left.set(xlabel="step", ylabel="energy in nats", ylim=(-12.0, 32.0), title="One chain")
    left.legend(loc="center right")
    bar = figure.colorbar(points, ax=left, label="temperature $T/T_0$", ticks=[1, 2, 5, 10])
    bar.ax.set_yticklabels(["1", "2", "5", "10"])
    bar.ax.minorticks_off()
    edges = np.arange(-11.0, 12.0, 1.0)
    results = ((descent, ORANGE, "SGD"), (constant, GREEN, "constant T"), (tempered, BLUE, "CTLD"))
    for energies, color, label in results:
        last = energies[-1].numpy()
        share, _ = np.histogram(last, edges)
        right.stairs(
            share / CHAINS,
            edges,
            orientation="horizontal",
            fill=True,
            alpha=0.6,
            color=color,
            label=f"{label}: {last.mean():.1f}",
        )
        print(f"{label}: {last.mean():.2f} +- {last.std() / CHAINS**0.5:.2f}, best {last.min():.2f}")
    right.set(xlabel="share of the chains", title=f"All {CHAINS} chains, at the end")
    right.legend(title="mean energy")
    save(figure, "phases")


FIGURES: dict[str, Callable[[], None]] = {
    "temperature": draw_temperature,
    "mixture": draw_mixture,
    "phases": draw_phases,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(FIGURES)} (default: all)")
    names = parser.parse_args().names or [*FIGURES]
    if not set(names) <= set(FIGURES):
        parser.error(f"there are only {', '.join(FIGURES)}")
    torch.set_num_threads(1)  # tensors this small gain nothing from more
    for name in names:
        FIGURES[name]()


if __name__ == "__main__":
    main()
