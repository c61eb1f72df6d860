"""Does the method help in training? One task's whole study: tuning, fresh seeds, ablation, landscape, report.

    python bench/experiment.py autoencoder           # two CPU cores: an hour
    python bench/experiment.py text --full --device cuda --text enwik8
    python bench/experiment.py autoencoder --quick   # whether it works: seconds
    python bench/experiment.py labels                # all of the label tasks, and their averages in one table

Every run is kept in bench/results/experiments as it ends, so the same command goes on after an interruption,
and does nothing but write docs/results again when all is there.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import ablation, recipe, report, study, tasks
from experiments.data import DataError
from experiments.ledger import Ledger
from experiments.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "CTLD, recipe"
FIRST = "CTLD, recipe, first run"
LABELS = "labels"
# of the label tasks, those with all parts: a network without memory and a recurrent one
EXPLAINED = ("labels-cnn-20", "labels-lstm-20")
PARTS = ("seeds", "ablation", "landscape")
# of the metrics in the tables, with their digits; the first is what is compared
METRICS = {
    "autoencoder": {"cross_entropy": 2, "early_cross_entropy": 2, "loss": 2},
    "text": {"bits": 4, "early_bits": 4, "loss": 3},
    "labels": {
        "nll": 4,
        "average_nll": 4,
        "geometric_nll": 4,
        "ece": 4,
        "average_ece": 4,
        "geometric_ece": 4,
        "scaled_ece": 4,
        "average_scaled_ece": 4,
        "accuracy": 4,
        "average_accuracy": 4,
        "clean_nll": 4,
        "average_clean_nll": 4,
    },
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("task", choices=(*tasks.NAMES, LABELS))
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", dest="size", action="store_const", const="quick", default="cpu")
    sizes.add_argument("--full", dest="size", action="store_const", const="full", help="for a GPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="of one task's study; default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; 0: this one alone")
    parser.add_argument("--text", type=Path, help="a file for the text task, instead of the King James Bible")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "experiments")
    parser.add_argument("--pages", type=Path, default=ROOT / "docs" / "results")
    options = parser.parse_args(argv)
    if options.task == LABELS and options.parts:
        parser.error(f"--parts is for one task: {LABELS} knows which its tasks have")
    options.parts = options.parts or PARTS
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    options.pages.mkdir(parents=True, exist_ok=True)
    names = tasks.LABELS if options.task == LABELS else [options.task]
    try:
        pages = {name: Page(name, options) for name in names}
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.task == LABELS:
        write_averages(options, pages)
        return 0
    pages[options.task].do(options.parts)
    return 0


def page_name(task: str, size: str) -> str:
    return task + ("" if size == "cpu" else f"-{size}")


def heading(task: str, size: str, parts: Sequence[str] = PARTS) -> str:
    flag = "" if size == "cpu" else f" --{size}"
    if len(parts) < len(PARTS):
        flag += f" --parts {' '.join(parts)}"
    return f"# {task}: {size}\n\n`python bench/experiment.py {task}{flag}` writes this page.\n"


def write_averages(options: argparse.Namespace, pages: dict[str, Page]) -> None:
    """Writes the pages, and one about the model averages of all of them."""
    rows = []
    for name, page in pages.items():
        chosen = page.do(PARTS if name in EXPLAINED else ("seeds",))
        rows.append(page.averages(chosen))
    text = (
        f"Test data, {study.SEEDS[options.size]} seeds, mean ± standard error; differences are paired, below "
        "0 is better but for the accuracy. The average is that of CTLD's variants (recipe, tuned, "
        "preconditioned) that was best on validation data; geometric: of logarithms of probabilities. The "
        "point estimates, those of optimizers and of samplers that fine-tuned, are the best on the *test* "
        "data, and so is the average that accuracy is compared with.\n"
    )
    found = "\n".join([heading(LABELS, options.size), text, report.averages_table(rows)])
    (options.pages / f"{page_name(LABELS, options.size)}.md").write_text(found)


class Page:
    """The page of a study, and the runs that it needs.

    Args:
        name: of the task.
        options: of the command line.

    Raises:
        DataError: the task's data are missing.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        ledger = Ledger(options.results / f"{name}.{options.size}.jsonl")
        self._work = study.Study(name, options.size, ledger, options.workers, options.text, options.device)
        self._size = options.size
        self._task = self._work.task
        self._metrics = METRICS[name.split("-")[0]]
        self._digits = next(iter(self._metrics.values()))
        self._name = page_name(name, options.size)
        self._pages = options.pages
        self._sections: list[str] = []

    def do(self, parts: Sequence[str]) -> dict[str, study.Chosen]:
        """Tunes every method, does the parts and writes the page; returns what tuning chose."""
        self._sections.append(heading(self._task.name, self._size, parts))
        chosen = self.tuning()
        for part, carry_out in zip(PARTS, (self.seeds, self.ablation, self.landscape), strict=True):
            if part in parts:
                carry_out(chosen)
        self.write()
        return chosen

    def tuning(self) -> dict[str, study.Chosen]:
        chosen = self._work.tune()
        self._trials = report.trials_table(chosen, self._digits)
        return chosen

    def _settings(self, chosen: dict[str, study.Chosen]) -> dict[str, ablation.Run]:
        tuned = {METHODS[name].label: (name, found.setting) for name, found in chosen.items()}
        # the library's settings, and those that it gives once it knows how low a run with them got
        first = recipe.setting(self._task, chosen)
        final = recipe.setting(self._task, chosen, self._work.reached("ctld", first))
        untuned = {RECIPE: ("ctld", final)} | ({FIRST: ("ctld", first)} if first != final else {})
        return untuned | tuned

    def seeds(self, chosen: dict[str, study.Chosen]) -> None:
        settings = self._settings(chosen)
        results = self._work.fresh(settings, study.SEEDS[self._size])
        costs = self._work.costs(settings, METHODS["sgd"].label)
        deployed = self._work.deployed(settings)
        table = report.main_table(settings, results, self._metrics, deployed, RECIPE, costs, self._task.steps)
        self._sections += [
            f"## Tuned with {self._work.trials} trials each, then {study.SEEDS[self._size]} seeds\n",
            f"Test, {self._task.unit} ({self._task.metric.replace('_', ' ')}), mean ± standard error.\n",
            table,
            "### Trials\n",
            self._trials,
        ]

    def averages(self, chosen: dict[str, study.Chosen]) -> str:
        settings = self._settings(chosen)
        results = self._work.fresh(settings, study.SEEDS[self._size])
        link = f"[{self._task.name}]({self._name}.md)"
        return report.averages_row(link, settings, results, self._work.validated(settings), self._task.metric)

    def ablation(self, chosen: dict[str, study.Chosen]) -> None:
        self._sections.append("## What does the work\n")
        _, base = self._settings(chosen)[RECIPE]
        figures = ablation.figures(base)
        for name, figure in figures.items():
            results = self._work.curves(figure, study.ABLATION_SEEDS[self._size])
            path = self._pages / f"{self._name}-{name}.png"
            report.draw(figure, results, self._task, path)
            self._sections += [
                f"### {figure.title}\n",
                f"![{figure.title}]({path.name})\n",
                report.figure_table(figure, results, self._task, self._digits),
            ]

    def landscape(self, chosen: dict[str, study.Chosen]) -> None:
        settings = {
            label: run
            for label, run in self._settings(chosen).items()
            if label == RECIPE or run[0] in study.LANDSCAPE_METHODS
        }
        results = self._work.fresh(settings, study.LANDSCAPE_SEEDS[self._size], "landscape")
        self._sections += ["## Where they end\n", report.landscape_table(results)]

    def write(self) -> None:
        (self._pages / f"{self._name}.md").write_text("\n".join(self._sections))


if __name__ == "__main__":
    sys.exit(main())
