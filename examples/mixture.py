"""Three modes, and a sampler that starts in the worst one: CTLD in one picture.

    python examples/mixture.py                          # table, report and mixture.png: under a minute
    python examples/mixture.py --seed 1 --chains 400 --output here.png

The target is a mixture of three Gaussians in two dimensions, far enough apart that Langevin dynamics at
constant temperature stays where it starts. All walkers start in the lightest mode. With tempering, the
temperature of each walker is a dynamical variable: hot stretches cross the barriers, and the states in the
window, where the temperature is that of the target, are draws from the target. Everything is known exactly
here: mode weights, marginals, and the free energy (by numerical integration).
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # draws into files, needs no display

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.ticker import NullFormatter

from ctld_cuda import CTLD, Tempering
from ctld_cuda.diagnostics import report

Tensor = torch.Tensor

WEIGHTS = torch.tensor([0.15, 0.35, 0.50])
MEANS = torch.tensor([[-6.0, -1.0], [-0.5, 4.0], [5.5, -2.5]])
SPREADS = torch.tensor([0.7, 1.0, 1.2])
START = 0  # the lightest mode
PRECISIONS = 0.5 / SPREADS.square()
LOG_PEAKS = (WEIGHTS * PRECISIONS / math.pi).log()

MAX_TEMPERATURE = 10.0
RECORD_EVERY = 10  # steps between two records
DISCARD = 0.2  # of the run: the bias is still learning
SHOWN_STEPS = 5_000  # of one walker in the traces
SHOWN_DRAWS = 5_000

# of Okabe and Ito, which the colour-blind can tell apart
BLUE, ORANGE, BLACK, GRAY = "#0072B2", "#D55E00", "black", "#BBBBBB"
# without the light yellow end, which is hard to see on white
HEAT = ListedColormap(plt.get_cmap("plasma")(np.linspace(0.0, 0.85, 256)))


# ------------------------------------------------------------------------------------------- the target


def log_parts(theta: Tensor) -> Tensor:
    """Logarithms of weight times density of each mode at points (..., 2), shape (..., 3)."""
    square = (theta[..., None, :] - MEANS).square().sum(-1)
    return LOG_PEAKS - PRECISIONS * square


def energy(theta: Tensor) -> Tensor:
    """U = -ln density at points (..., 2)."""
    return -log_parts(theta).logsumexp(-1)


def marginal(x: np.ndarray) -> np.ndarray:
    """Density of the first coordinate."""
    mean, spread = MEANS[:, 0].numpy(), SPREADS.numpy()
    parts = np.exp(-0.5 * ((x[:, None] - mean) / spread) ** 2) / (spread * math.sqrt(2 * math.pi))
    return parts @ WEIGHTS.numpy()


def exact_free_energy(beta: np.ndarray) -> np.ndarray:
    """ln Z(beta)/Z(1), Z = integral of exp(-beta U), by summing over a grid finer than every mode."""
    axis = torch.arange(-40.0, 40.0, 0.25, dtype=torch.float64)
    u = energy(torch.cartesian_prod(axis, axis))
    z = [float((-b * u).exp().sum()) * 0.25**2 for b in beta]
    return np.log(z)  # Z(1) = 1


# ---------------------------------------------------------------------------------------------- the runs


class Run(NamedTuple):
    """Records of all walkers, (records, chains, ...), and the optimizer with the closure that drove it."""

    optimizer: CTLD
    closure: object
    theta: Tensor
    alpha: Tensor
    temperature: Tensor
    at_target: Tensor

    def draws(self) -> tuple[Tensor, Tensor]:
        """Records after the initial stretch, and which of them are draws from the target."""
        first = int(DISCARD * len(self.theta))
        return self.theta[first:], self.at_target[first:]

    def mode_weights(self) -> tuple[Tensor, Tensor]:
        """Mean probability of each mode given a draw, and its standard error, from the spread over walkers.

        Walkers share a bias but no noise, so that their averages are nearly independent.
        """
        theta, at_target = self.draws()
        member = log_parts(theta).softmax(-1).double() * at_target[..., None]
        total, count = member.sum(0), at_target.double().sum(0)[:, None]
        value = total.sum(0) / count.sum()
        chains = len(count)
        residual = total - value * count
        error = (residual.square().sum(0) * chains / (chains - 1)).sqrt() / count.sum()
        return value, error


def sample(tempering: Tempering | None, steps: int, chains: int, seed: int) -> Run:
    """Walkers that start in the worst mode."""
    generator = torch.Generator().manual_seed(seed)
    start = MEANS[START] + SPREADS[START] * torch.randn(chains, 2, generator=generator)
    theta = torch.nn.Parameter(start)
    optimizer = CTLD([theta], lr=0.01, num_data=1, tempering=tempering, chains=chains, seed=seed)

    def closure() -> Tensor:
        optimizer.zero_grad()
        u = energy(theta)  # one per walker
        u.sum().backward()
        return u.detach()

    records = []
    for step in range(steps):
        if step % RECORD_EVERY == 0:
            state = optimizer.tempering_state()
            kept = (theta.detach(), state["alpha"], state["temperature"], state["at_target"])
            records.append([x.clone() for x in kept])
        optimizer.step(closure)
    return Run(optimizer, closure, *(torch.stack(x) for x in zip(*records, strict=True)))


def table(tempered: Run, constant: Run) -> str:
    """Mode weights with standard errors, as aligned text."""
    lines = [f"{'mode':<22}{'exact':>8}{'CTLD':>18}{'constant T':>20}"]
    columns = zip(*tempered.mode_weights(), *constant.mode_weights(), strict=True)
    for k, (w, w_error, v, v_error) in enumerate(columns):
        x, y = MEANS[k].tolist()
        name = f"{k + 1} at ({x:g}, {y:g})" + (" (start)" if k == START else "")
        lines.append(f"{name:<22}{WEIGHTS[k]:8.3f}{w:10.3f} +- {w_error:.3f}{v:12.3f} +- {v_error:.3f}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------- the figure


def draw(tempered: Run, constant: Run, path: Path) -> None:
    """Three rows: where the draws are; one walker in time; what alpha did."""
    figure = plt.figure(figsize=(14, 10.5), layout="constrained")
    grid = figure.add_gridspec(3, 3, height_ratios=(1.25, 1, 1))
    _draw_plane(
        figure.add_subplot(grid[0, 0]), constant, "Constant temperature: hardly leaves its mode", ORANGE
    )
    _draw_plane(figure.add_subplot(grid[0, 1]), tempered, "CTLD: draws of the window", BLUE)
    _draw_marginal(figure.add_subplot(grid[0, 2]), tempered, constant)
    upper = figure.add_subplot(grid[1, :2])
    lower = figure.add_subplot(grid[2, :2], sharex=upper)
    _draw_traces(figure, upper, lower, tempered)
    _draw_histogram(figure.add_subplot(grid[1, 2]), tempered)
    _draw_free_energy(figure.add_subplot(grid[2, 2]), tempered)
    figure.suptitle(
        "Continuously tempered Langevin dynamics on three Gaussian modes: "
        f"{tempered.theta.shape[1]} walkers, all started in the lightest mode",
        fontsize=14,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_plane(axes: plt.Axes, run: Run, title: str, color: str) -> None:
    x, y = torch.linspace(-9.5, 10.5, 200), torch.linspace(-8.0, 10.0, 200)
    density = (-energy(torch.cartesian_prod(x, y))).exp().view(200, 200).T
    theta, at_target = run.draws()
    points = theta[at_target]
    points = points[:: max(1, len(points) // SHOWN_DRAWS)]
    axes.scatter(*points.T, s=3, color=color, alpha=0.25, linewidths=0, rasterized=True)
    axes.contour(x, y, density, levels=[0.001, 0.005, 0.015, 0.035], colors=BLACK, linewidths=0.8)
    for k, weight in enumerate(run.mode_weights()[0]):
        label = f"{weight:.1%}\n(exact {WEIGHTS[k]:.0%})"
        above = MEANS[k, 1] + 3.0 * SPREADS[k] + 0.3
        axes.text(MEANS[k, 0], above, label, ha="center", va="bottom", fontsize=10)
    axes.plot(
        *MEANS[START],
        marker="x",
        color=BLACK,
        markersize=9,
        markeredgewidth=2,
        linestyle="none",
        label="start",
    )
    axes.legend(loc="upper left")
    axes.set(title=title, xlabel=r"$\theta_1$", ylabel=r"$\theta_2$", xlim=(-9.5, 10.5), ylim=(-8.0, 10.0))
    axes.set_aspect("equal")


def _draw_marginal(axes: plt.Axes, tempered: Run, constant: Run) -> None:
    edges = np.linspace(-9.5, 10.5, 101)
    for run, color, label in ((constant, ORANGE, "constant temperature"), (tempered, BLUE, "CTLD, window")):
        theta, at_target = run.draws()
        density, _ = np.histogram(theta[at_target][:, 0].numpy(), edges, density=True)
        axes.stairs(density, edges, fill=True, color=color, alpha=0.55, label=label)
    x = np.linspace(-9.5, 10.5, 500)
    axes.plot(x, marginal(x), color=BLACK, linewidth=1.5, label="exact")
    axes.set(
        title=r"Marginal density of $\theta_1$", xlabel=r"$\theta_1$", ylabel="density", xlim=(-9.5, 10.5)
    )
    axes.legend(loc="upper right")


def _draw_traces(figure: plt.Figure, upper: plt.Axes, lower: plt.Axes, run: Run) -> None:
    shown = slice(0, SHOWN_STEPS // RECORD_EVERY)
    x, alpha, temperature = run.theta[shown, 0, 0], run.alpha[shown, 0], run.temperature[shown, 0]
    steps = np.arange(len(x)) * RECORD_EVERY
    for k in range(len(MEANS)):
        upper.axhline(float(MEANS[k, 0]), color=BLACK, linewidth=0.8, linestyle=":")
        upper.text(1.005, MEANS[k, 0], f"mode {k + 1}", transform=upper.get_yaxis_transform(), va="center")
    upper.plot(steps, x, color=GRAY, linewidth=0.5, zorder=1)
    colors = dict(c=temperature, cmap=HEAT, norm=LogNorm(1.0, MAX_TEMPERATURE), s=7, linewidths=0, zorder=2)
    points = upper.scatter(steps, x, **colors)
    upper.set(title="One walker: its first coordinate, coloured by temperature", ylabel=r"$\theta_1$")
    upper.set(xlim=(0, steps[-1] + RECORD_EVERY))
    upper.tick_params(labelbottom=False)

    window, limit = run.optimizer.tempering.flat, run.optimizer.tempering.limit
    lower.axhspan(-window, window, color=GRAY, alpha=0.5, linewidth=0)
    lower.text(1.005, 0.0, "window:\n$T = T_0$", transform=lower.get_yaxis_transform(), va="center")
    lower.plot(steps, alpha, color=GRAY, linewidth=0.5, zorder=1)
    lower.scatter(steps, alpha, **colors)
    lower.set(title=r"Its tempering coordinate $\alpha$, which sets the temperature", xlabel="step")
    lower.set(ylabel=r"$\alpha$", ylim=(-limit, limit))
    bar = figure.colorbar(points, ax=lower, location="bottom", shrink=0.5, aspect=40)
    bar.set_ticks([1, 2, 5, 10], labels=["1", "2", "5", "10"])
    bar.ax.xaxis.set_minor_formatter(NullFormatter())
    bar.set_label("temperature $T/T_0$")


def _draw_histogram(axes: plt.Axes, run: Run) -> None:
    t, state = run.optimizer.tempering, run.optimizer.tempering_state()
    edges = np.linspace(0.0, t.limit, t.bins + 1)
    visits = state["visits"].double()
    axes.axvspan(0.0, t.flat, color=GRAY, alpha=0.5, linewidth=0, label="window")
    axes.stairs(visits / visits.mean(), edges, fill=True, color=BLUE, alpha=0.6, label="visits")
    axes.axhline(1.0, color=BLACK, linestyle="--", linewidth=1, label="uniform")
    axes.set(
        title=r"Histogram of $|\alpha|$, all walkers", xlabel=r"$|\alpha|$", ylabel="visits over their mean"
    )
    axes.set(xlim=(0.0, t.limit), ylim=(0.0, 1.4 * max(1.0, float((visits / visits.mean()).max()))))
    axes.legend(loc="upper right", ncols=3)


def _draw_free_energy(axes: plt.Axes, run: Run) -> None:
    t, state = run.optimizer.tempering, run.optimizer.tempering_state()
    centers = state["bin_centers"].numpy()
    z = np.clip((centers - t.flat) / (t.limit - t.flat), 0.0, 1.0)
    beta = (1.0 + (math.sqrt(t.max_temperature) - 1.0) * z * z * (3.0 - 2.0 * z)) ** -2
    axes.axvspan(0.0, t.flat, color=GRAY, alpha=0.5, linewidth=0, label="window")
    axes.plot(centers, exact_free_energy(beta), color=BLACK, linewidth=1.5, label="exact")
    axes.plot(
        centers[::3], state["free_energy"][::3], "o", color=BLUE, markersize=6, label="from mean energies"
    )
    axes.plot(
        centers[1::3],
        state["free_energy_histogram"][1::3],
        "^",
        color=ORANGE,
        markersize=6,
        label="from histogram",
    )
    axes.set(
        title=r"Free energy $\ln Z(\beta)/Z(1)$", xlabel=r"$|\alpha|$", ylabel="nats", xlim=(0.0, t.limit)
    )
    axes.legend(loc="upper left")


# ------------------------------------------------------------------------------------------ command line


def _at_least(low: int):
    def parse(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}")
        return value

    return parse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seed", type=_at_least(0), default=0, help="of noise and start (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=_at_least(50), default=15_000, help="of each run (default: %(default)s)"
    )
    parser.add_argument("--chains", type=_at_least(2), default=100, help="walkers (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("mixture.png"), help="figure (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if not arguments.output.absolute().parent.is_dir():
        parser.error(f"--output: there is no folder {arguments.output.absolute().parent}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)  # tensors this small gain nothing from more
    started = time.perf_counter()
    options = (arguments.steps, arguments.chains, arguments.seed)
    tempered = sample(Tempering(max_temperature=MAX_TEMPERATURE, coupling="exact"), *options)
    constant = sample(None, *options)
    print(f"{arguments.chains} walkers, {arguments.steps:,} steps, {time.perf_counter() - started:.0f} s\n")
    print(table(tempered, constant), "\n")
    print(report(tempered.optimizer, tempered.closure))
    draw(tempered, constant, arguments.output)
    print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    main()
