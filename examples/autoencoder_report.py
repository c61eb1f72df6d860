"""What remains of a run: the final table and the figure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files, needs no display

import matplotlib.pyplot as plt
import numpy as np
from autoencoder_data import SIDE
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

COLORS = ("tab:red", "tab:orange", "tab:blue", "tab:green")


@dataclass
class Sampler:
    """The temperature's history: records over the exploration, and the histogram of alpha."""

    epochs: list[float]
    temperature: list[float]
    kinetic: list[float]
    bin_centers: list[float]  # empty at constant temperature
    visits: list[int]
    window: float


@dataclass
class Curves:
    """What the figure shows of one training."""

    label: str
    train: list[float]
    test: list[float]
    explore_epochs: float
    restored: np.ndarray
    sampler: Sampler | None = None


def table(results: list[dict]) -> str:
    """The results as aligned text."""
    columns = {
        "method": ("label", "s"),
        "lr": ("lr", "g"),
        "T0": ("temperature", "g"),
        "train loss": ("train_loss", ".2f"),
        "test cross-entropy": ("test_cross_entropy", ".2f"),
        "kinetic T / T": ("kinetic_over_target", ".2f"),
        "seconds": ("seconds", ".0f"),
    }
    rows = [list(columns)]
    for result in results:
        cells = [(result[key], pattern) for key, pattern in columns.values()]
        rows.append(["-" if value is None else format(value, pattern) for value, pattern in cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "Losses in nats per image."])


def draw(path: Path, trainings: list[Curves], clean: np.ndarray, corrupted: np.ndarray) -> None:
    """The figure: loss curves, temperature, histogram of alpha where there are any, and images."""
    samplers = [c for c in trainings if c.sampler]
    tempered = next((c.sampler for c in samplers if c.sampler.visits), None)
    panels = 1 + bool(samplers) + bool(tempered)
    strips = [("clean", clean), ("corrupted", corrupted)]
    strips += [("restored" if len(trainings) == 1 else c.label, c.restored) for c in trainings]
    width = max(11.0, 5.5 * panels)
    heights = (4.8, 0.4 + len(strips) * (width - 1.5) / len(clean))
    figure = plt.figure(figsize=(width, sum(heights)), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=heights)
    axes = iter(np.atleast_1d(top.subplots(1, panels)))
    _draw_losses(next(axes), trainings)
    if samplers:
        _draw_temperatures(next(axes), samplers)
    if tempered:
        _draw_histogram(next(axes), tempered)
    _draw_images(bottom.subplots(), strips)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_losses(axes: plt.Axes, trainings: list[Curves]) -> None:
    for color, c in zip(COLORS, trainings, strict=False):
        epochs = np.arange(1, len(c.test) + 1)
        axes.plot(epochs, c.test, color=color, label=f"{c.label}: {c.test[-1]:.1f}")
        axes.plot(epochs, c.train, color=color, linestyle=":", linewidth=1)
    axes.plot([], [], color="black", label="test (above: after the last epoch)")
    axes.plot([], [], color="black", linestyle=":", linewidth=1, label="training")
    _mark_switch(axes, trainings[0])
    axes.set(title="Loss", xlabel="epoch", ylabel="cross-entropy / nats per image", yscale="log")
    axes.yaxis.set_major_locator(MaxNLocator(10))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_temperatures(axes: plt.Axes, trainings: list[Curves]) -> None:
    for color, c in zip(COLORS, trainings, strict=False):
        s = c.sampler
        axes.plot(s.epochs, s.kinetic, color=color, alpha=0.35, linewidth=0.8)
        axes.plot(s.epochs, s.temperature, color=color, label=c.label)
    axes.plot([], [], color="black", alpha=0.35, linewidth=0.8, label="measured from the momenta")
    _mark_switch(axes, trainings[0])
    axes.set(title="Temperature", xlabel="epoch", ylabel="temperature (1: the posterior)", yscale="log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_histogram(axes: plt.Axes, s: Sampler) -> None:
    visits = np.array(s.visits)
    width = s.bin_centers[1] - s.bin_centers[0]
    density = visits / visits.sum() / width
    axes.bar(s.bin_centers, density, width=width, color="tab:red", alpha=0.7)
    axes.axhline(1 / (width * len(visits)), color="black", linestyle="--", label="uniform")
    axes.axvspan(0, s.window, color="tab:gray", alpha=0.2, label="window: base temperature")
    axes.set(title="Tempering coordinate", xlabel=r"$|\alpha|$", ylabel="density of steps")
    axes.set(xlim=(0, s.bin_centers[-1] + width / 2), ylim=(0, 1.25 * density.max()))
    axes.legend(loc="upper right", ncols=2)


def _draw_images(axes: plt.Axes, strips: list[tuple[str, np.ndarray]]) -> None:
    rows = [images.reshape(-1, SIDE, SIDE).transpose(1, 0, 2).reshape(SIDE, -1) for _, images in strips]
    axes.imshow(np.concatenate(rows), cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([SIDE * (i + 0.5) for i in range(len(strips))], [label for label, _ in strips])
    axes.tick_params(length=0)
    axes.set_title("Test images")


def _mark_switch(axes: plt.Axes, c: Curves) -> None:
    """A line where the noise goes off, if that is within the run."""
    if 0 < c.explore_epochs < len(c.test):
        axes.axvline(c.explore_epochs, color="black", linewidth=0.8, linestyle="--", label="noise off")
