"""Tables and figures of a study, in docs/results; what is written depends on the ledger alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from .ablation import Figure, Run
from .ledger import Result, column
from .methods import METHODS, Setting
from .study import Chosen
from .tasks import Task

# where all runs diverged, or gave no draw to average
_NONE = "none"


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error; NaN for one value."""
    if not all(map(math.isfinite, values)):
        return math.inf, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def _cell(values: Sequence[float], digits: int) -> str:
    """Mean and standard error of the runs that have the metric, and how many these are unless all."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return _NONE
    mean, error = mean_and_error(finite)
    some = "" if len(finite) == len(values) else f" ({len(finite)} of {len(values)})"
    return f"{mean:.{digits}f} ± {error:.{digits}f}{some}"


def paired(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Differences, seed by seed: the same seed means the same initial weights and minibatches."""
    return [a - b for a, b in zip(values, reference, strict=True)]


def main_table(
    settings: dict[str, Run],
    results: dict[str, list[Result]],
    metrics: dict[str, int],
    deployed: dict[str, str],
    reference: str,
    costs: Result,
    steps: int,
) -> str:
    """A row per label: setting, each metric, the paired difference to ``reference``, time.

    ``metrics``: names and digits; where a method has no such metric, the cell is empty. ``deployed``: which
    of them is compared, by label. ``costs``: time per step, as a multiple of SGD's.
    """
    digits = next(iter(metrics.values()))
    names = [name.replace("_", " ") for name in metrics]
    head = ["", "setting", *names, f"minus {reference}", "time"]
    lines = [_row(head), _row(["---", "---", *["---:"] * (len(names) + 2)])]
    own = column(results[reference], deployed[reference], fall_back=True)
    for label, (_, setting) in settings.items():
        rows = results[label]
        cells = [label, str(setting)]
        cells += [
            _cell(column(rows, name), d) if any(name in r for r in rows) else ""
            for name, d in metrics.items()
        ]
        values = column(rows, deployed[label], fall_back=True)
        cells.append("" if label == reference else _cell(paired(values, own), digits))
        cells.append(f"{costs[label]:.2f}")
        lines.append(_row(cells))
    remark = (
        f"Every run has {steps:,} gradient evaluations. Time: of a training step, forward and backward pass "
        "included, as a multiple of that with SGD, one thread, measured side by side."
    )
    averaged = [label for label, metric in deployed.items() if metric.startswith("average_")]
    if averaged:
        remark += (
            " The difference is that of the trained models, or of the average over draws where it was better "
            f"on validation data ({', '.join(averaged)}) and there was a draw. Geometric: the average of the "
            "logarithms of probabilities."
        )
    if any(mark in line for line in lines[2:] for mark in (_NONE, " of ")):
        remark += f' "{_NONE}" and "k of n": runs diverged, or gave no draw to average.'
    return "\n".join([*lines, "", remark, ""])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def averages_row(
    name: str,
    settings: dict[str, Run],
    results: dict[str, list[Result]],
    validated: dict[str, Result],
    metric: str,
) -> str:
    """Of :func:`averages_table`: one task."""
    average = f"average_{metric}"
    ours = min(
        (label for label, (method, _) in settings.items() if method in ("ctld", "ctld-rms")),
        key=lambda label: validated[label][average],
    )

    def points(name: str) -> dict[str, list[float]]:
        return {label: column(rows, name) for label, rows in results.items()}

    cells = [name, ours]
    for other in (metric, "ece", "scaled_ece"):
        own = column(results[ours], f"average_{other}")
        cells += [_cell(own, 4), *_against(own, points(other), min)]
    own = column(results[ours], "geometric_ece")
    _, difference = _against(own, points("ece"), min)
    cells += [_cell(own, 4), difference]
    own = column(results[ours], "average_accuracy")
    cells.append(_cell(own, 4))
    for peers in (("sghmc", "cyclical"), ("sghmc-rms",)):
        rivals = {
            label: [result.get("average_accuracy", -math.inf) for result in results[label]]
            for label, (method, _) in settings.items()
            if method in peers
        }
        cells += _against(own, rivals, max)
    return _row(cells)


def _against(own: list[float], rivals: dict[str, list[float]], best_of: Callable[..., str]) -> list[str]:
    """The best of the rivals in the mean, ``best_of`` being min or max, and the paired difference to it."""
    best = best_of(rivals, key=lambda label: statistics.fmean(rivals[label]))
    return [f"{_cell(rivals[best], 4)} ({best})", _cell(paired(own, rivals[best]), 4)]


def averages_table(rows: Sequence[str]) -> str:
    """CTLD's model average against the best point estimate of any method on the test data, and in accuracy
    against the better average of SGHMC and cyclical SGHMC, and against SGHMC's with this library's
    preconditioner; of CTLD's variants, the one that was best on validation data.
    """
    head = ["", "average of"]
    for name in ("NLL", "calibration error", "the same, after the best scaling"):
        head += [name, "best point estimate", "difference"]
    head += ["calibration error of the geometric average", "difference to the best point estimate"]
    head += ["accuracy", "better average of SGHMC and cyclical SGHMC", "difference"]
    head += ["average of SGHMC with CTLD's preconditioner", "difference"]
    return "\n".join([_row(head), _row(["---"] * 2 + ["---:"] * (len(head) - 2)), *rows]) + "\n"


def trials_table(chosen: dict[str, Chosen], digits: int) -> str:
    """The trials of each method; and where the best were run again, their means over all tuning seeds."""

    def told(trials: list[tuple[Setting, float]]) -> str:
        return "; ".join(f"{setting}: {value:.{digits}f}" for setting, value in trials)

    again = any(found.finalists for found in chosen.values())
    head = ["method", "trials: setting, validation", *["the best on three seeds"] * again]
    lines = [_row(head), _row(["---"] * len(head))]
    for name, found in chosen.items():
        cells = [METHODS[name].label, told(found.trials), *[told(found.finalists)] * again]
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def landscape_table(results: dict[str, list[Result]]) -> str:
    names = {"largest_eigenvalue": 1, "trace": 0, "barrier": 2, "norm": 1, "distance": 1, "loss": 2}
    lines = [_row(["", *(name.replace("_", " ") for name in names)]), _row(["---", *["---:"] * len(names)])]
    for label, rows in results.items():
        lines.append(_row([label, *(_cell(column(rows, name), digits) for name, digits in names.items())]))
    return "\n".join(lines) + "\n"


def _shown(task: Task) -> list[str]:
    """What figures show: the metric of the trained model, and of the average where that is what counts."""
    return [task.metric, f"average_{task.metric}"] if task.averages else [task.metric]


def draw(figure: Figure, results: dict[str, list[list[Result]]], task: Task, path: Path) -> None:
    """A curve per series: means and standard errors of the task's metric; of averages, dashed."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(5.5, 3.5), layout="constrained")
    axes = canvas.subplots()
    for number, (label, points) in enumerate(figure.series.items()):
        places = list(points)
        for name in _shown(task):
            average = name != task.metric
            found = [mean_and_error(column(rows, name)) for rows in results[label]]
            means = [m if math.isfinite(m) else math.nan for m, _ in found]
            errors = [e if math.isfinite(e) else 0.0 for _, e in found]
            axes.errorbar(
                places if figure.axis else [str(place) for place in places],
                means,
                errors,
                color=f"C{number}",
                marker="s" if average else "o",
                fillstyle="none" if average else "full",
                linestyle=("--" if average else "-") if figure.axis else "none",
                label=f"{label}, average" if average else label,
            )
    if figure.logarithmic:
        axes.set_xscale("log")
    axes.set(title=figure.title, xlabel=figure.axis, ylabel=f"test, {task.unit}")
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend()
    canvas.savefig(path, dpi=110, metadata={"Software": None})


def figure_table(figure: Figure, results: dict[str, list[list[Result]]], task: Task, digits: int) -> str:
    names = _shown(task)
    head = ["", figure.axis or "variant", *(name.replace("_", " ") for name in names)]
    lines = [_row(head), _row(["---", *["---:"] * (len(head) - 1)])]
    for label, points in figure.series.items():
        for place, rows in zip(points, results[label], strict=True):
            place_name = f"{place:g}" if isinstance(place, float) else place
            lines.append(_row([label, place_name, *(_cell(column(rows, name), digits) for name in names)]))
    return "\n".join(lines) + "\n"
