"""What remains of a comparison: the tables and the figure."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files, needs no display

import matplotlib.pyplot as plt
import numpy as np
from classifier_data import Data
from classifier_methods import Outcome
from classifier_metrics import BINS, Scores, reliability, scores

# of Okabe and Ito, which the colour-blind can tell apart
COLORS = ("#999999", "#E69F00", "#0072B2", "#D55E00", "#009E73")
MARKERS = ("s", "D", "o", "^", "v")
TITLES = {
    "accuracy": "accuracy",
    "nll": "NLL",
    "ece": "ECE",
    "noisy_nll": "NLL, noisy",
    "noisy_ece": "ECE, noisy",
}


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error of the mean; the latter is NaN for a single value."""
    x = np.asarray(values)
    error = x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return float(x.mean()), float(error)


def _text(values: list[float], digits: int) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" if math.isnan(error) else f"{mean:.{digits}f} +- {error:.{digits}f}"


def _aligned(rows: list[list[str]]) -> str:
    """Columns of equal width, the first to the left; the first row is a header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def score_all(results: dict[str, list[Outcome]], data: list[Data]) -> dict[str, list[Scores]]:
    """The scores of every outcome; ``data`` has one entry per repeat."""
    return {
        label: [
            scores(o.test, d.test_labels, d.noisy_test_labels) for o, d in zip(outcomes, data, strict=True)
        ]
        for label, outcomes in results.items()
    }


def score_table(all_scores: dict[str, list[Scores]], gradients: dict[str, int]) -> str:
    """Mean and standard error over the repeats; ``gradients``: their number for each method."""
    rows = [["method", "gradients", *TITLES.values()]]
    for label, found in all_scores.items():
        cells = [_text([getattr(s, name) for s in found], 3) for name in TITLES]
        rows.append([label, f"{gradients[label]:,}", *cells])
    return _aligned(rows)


def difference_table(all_scores: dict[str, list[Scores]], reference: str) -> str:
    """Every method minus ``reference`` in the same repeats, which differ in labels, start and noise."""
    rows = [[f"minus {reference}", *TITLES.values()]]
    for label, found in all_scores.items():
        if label == reference:
            continue
        pairs = list(zip(found, all_scores[reference], strict=True))
        cells = [_text([getattr(a, name) - getattr(b, name) for a, b in pairs], 3) for name in TITLES]
        rows.append([label, *cells])
    return _aligned(rows)


def sampler_table(results: dict[str, list[Outcome]]) -> str:
    """Temperatures at the end of the runs, over those in force, and what the averages rest on."""
    header = ["sampler", "draws", "kinetic T / T", "in balance at", "implied for parameters", "round trips"]
    rows = [header]
    for label, outcomes in results.items():
        reports = [o.report for o in outcomes if o.report]
        if not reports:
            continue
        trips = [r.round_trips for r in reports]
        rows.append(
            [
                label,
                _text([o.draws for o in outcomes], 0),
                _text([r.kinetic.value for r in reports], 3),
                _text([r.balance for r in reports], 3),
                _text([r.implied.value for r in reports], 3),
                "-" if None in trips else _text(trips, 1),
            ]
        )
    return _aligned(rows)


def warnings(results: dict[str, list[Outcome]]) -> list[str]:
    """What the reports of the samplers warn about in the first repeat."""
    first = {label: outcomes[0].report for label, outcomes in results.items()}
    return [f"{label}: {w}" for label, r in first.items() if r for w in r.warnings]


# -------------------------------------------------------------------------------------------- the figure


def draw(
    path: Path, results: dict[str, list[Outcome]], data: list[Data], all_scores: dict[str, list[Scores]]
) -> None:
    """Reliability, scores, and the NLL in the course of the runs; curves are those of the first repeat."""
    figure = plt.figure(figsize=(15, 5.2), layout="constrained")
    first, second, third = figure.subplots(1, 3, width_ratios=(1, 1.15, 1.15))
    _draw_reliability(first, results, data)
    _draw_scores(second, all_scores)
    _draw_traces(third, results)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _styles(results: dict):
    return zip(results.items(), COLORS, MARKERS, strict=False)


def _draw_reliability(axes: plt.Axes, results: dict[str, list[Outcome]], data: list[Data]) -> None:
    d = data[0]
    for (label, outcomes), color, marker in _styles(results):
        for labels, fill, width in ((d.test_labels, color, 1.3), (d.noisy_test_labels, "white", 0.8)):
            r = reliability(outcomes[0].test, labels)
            shown = r.share > 0.005  # 8 of 1,500 test images
            axes.plot(
                r.confidence[shown],
                r.accuracy[shown],
                color=color,
                marker=marker,
                markerfacecolor=fill,
                markersize=5,
                linewidth=width,
                linestyle="-" if fill == color else ":",
                label=label if fill == color else None,
            )
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--")
    axes.plot([], [], color="black", marker="o", label="clean labels")
    axes.plot([], [], color="black", marker="o", markerfacecolor="white", linestyle=":", label="noisy labels")
    axes.set(
        title=f"Reliability, {BINS} bins", xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1)
    )
    axes.legend(loc="upper left", fontsize=8)


def _draw_scores(axes: plt.Axes, all_scores: dict[str, list[Scores]]) -> None:
    shown = [name for name in TITLES if name != "accuracy"]
    width = 0.8 / len(all_scores)
    for i, ((label, found), color) in enumerate(zip(all_scores.items(), COLORS, strict=False)):
        means, errors = zip(*(mean_and_error([getattr(s, n) for s in found]) for n in shown), strict=True)
        accuracy, _ = mean_and_error([s.accuracy for s in found])
        places = np.arange(len(shown)) + (i - 0.5 * (len(all_scores) - 1)) * width
        bars = axes.bar(places, means, width, color=color, label=f"{label}: accuracy {accuracy:.1%}")
        if not np.isnan(errors).any():
            axes.errorbar(places, means, yerr=errors, fmt="none", color="black", capsize=2)
        axes.bar_label(bars, fmt="%.3f", fontsize=7, padding=4, rotation=90)
    axes.set_xticks(range(len(shown)), [TITLES[n] for n in shown])
    axes.set(title="Scores on test images, lower is better", ylabel="nats; calibration error")
    axes.set_ylim(0.0, 1.4 * axes.get_ylim()[1])
    axes.legend(loc="upper left", fontsize=8)


def _draw_traces(axes: plt.Axes, results: dict[str, list[Outcome]]) -> None:
    for (label, outcomes), color, marker in _styles(results):
        steps, values = zip(*outcomes[0].trace, strict=True)
        axes.plot(steps, values, color=color, marker=marker, markersize=3, linewidth=1, label=label)
    axes.set(title="NLL on clean labels during the run", xlabel="step", ylabel="nats", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
