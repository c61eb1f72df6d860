"""The Bayesian classifier of examples/: scores worked out by hand, permuted labels, a tiny run."""

import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import classifier_data  # noqa: E402
import classifier_methods  # noqa: E402
import classifier_metrics as metrics  # noqa: E402

# two classes: confidences 0.9, 0.8, 0.6, 0.7; predicted 0, 0, 1, 1; the second and the last are wrong
PROBABILITIES = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])
LABELS = torch.tensor([0, 1, 1, 0])


# ------------------------------------------------------------------------------------------- metrics


def test_accuracy_counts_the_most_probable_classes():
    assert metrics.accuracy(PROBABILITIES, LABELS) == 0.5


def test_nll_is_the_mean_of_minus_ln_p():
    expected = -(math.log(0.9) + math.log(0.2) + math.log(0.6) + math.log(0.3)) / 4
    assert metrics.negative_log_likelihood(PROBABILITIES, LABELS) == pytest.approx(expected, rel=1e-6)


def test_nll_of_an_impossible_label_is_infinite():
    assert metrics.negative_log_likelihood(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == math.inf


@pytest.mark.parametrize(
    ("bins", "expected"),
    [
        # one bin: accuracy 0.5, mean confidence 0.75
        (1, 0.25),
        # (0.5, 0.75]: confidences 0.6 right, 0.7 wrong; (0.75, 1]: 0.9 right, 0.8 wrong
        (4, 0.5 * abs(0.5 - 0.65) + 0.5 * abs(0.5 - 0.85)),
        # every example alone: 0.1, 0.8, 0.4, 0.7
        (15, (0.1 + 0.8 + 0.4 + 0.7) / 4),
    ],
)
def test_ece_is_the_mean_gap_of_the_bins(bins, expected):
    found = metrics.expected_calibration_error(PROBABILITIES, LABELS, bins)
    assert found == pytest.approx(expected, rel=1e-6)


def test_bins_include_their_upper_end():
    probabilities = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]])
    r = metrics.reliability(probabilities, torch.zeros(3, dtype=torch.int64), bins=4)
    assert r.share.tolist() == pytest.approx([0.0, 1 / 3, 1 / 3, 1 / 3])
    assert r.confidence[1:].tolist() == [0.5, 0.75, 1.0]
    assert r.confidence[0].isnan() and r.accuracy[0].isnan()


def test_ece_of_labels_drawn_from_the_probabilities_vanishes(seed):
    """Then the gaps of the bins are noise: 5 standard errors each; 15 bins, false positives below 1e-5."""
    generator = torch.Generator().manual_seed(seed)
    n = 100_000
    probabilities = torch.randn(n, 10, generator=generator).mul(2).softmax(-1)
    labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    r = metrics.reliability(probabilities, labels)
    filled = r.share > 0
    error = (r.confidence * (1 - r.confidence) / (r.share * n)).sqrt()[filled]
    bound = 5 * float((r.share[filled] * error).sum())
    assert metrics.expected_calibration_error(probabilities, labels) < bound
    # the same predictions, but sure of themselves, are that much worse
    sharp = torch.nn.functional.one_hot(probabilities.argmax(-1), 10).float()
    wrong = 1 - metrics.accuracy(probabilities, labels)
    assert metrics.expected_calibration_error(sharp, labels) == pytest.approx(wrong)


def test_scores_say_which_labels_they_are_of():
    s = metrics.scores(PROBABILITIES, LABELS, 1 - LABELS)
    assert s.nll == metrics.negative_log_likelihood(PROBABILITIES, LABELS)
    assert s.noisy_nll == metrics.negative_log_likelihood(PROBABILITIES, 1 - LABELS)
    assert (s.accuracy, s.ece) == (0.5, metrics.expected_calibration_error(PROBABILITIES, LABELS))
    assert s.noisy_ece == metrics.expected_calibration_error(PROBABILITIES, 1 - LABELS)


# ---------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("n", [10, 1001])
def test_exactly_the_asked_share_is_permuted(n, share, seed):
    labels = torch.arange(n)  # all different: whatever gets another's label shows
    permuted = classifier_data.permute_labels(labels, share, torch.Generator().manual_seed(seed))
    assert int((permuted != labels).sum()) == round(share * n)
    assert sorted(permuted.tolist()) == labels.tolist()
    assert torch.equal(labels, torch.arange(n))


def test_permuting_keeps_the_number_of_each_class(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (500,), generator=generator)
    permuted = classifier_data.permute_labels(labels, 0.2, generator)
    assert Counter(permuted.tolist()) == Counter(labels.tolist())
    assert 0 < int((permuted != labels).sum()) <= 100


def test_the_test_labels_stay_clean_and_splits_do_not_depend_on_the_seed(seed):
    n = sum(classifier_data.SPLIT)
    digits = classifier_data.Digits(torch.arange(n)[:, None], torch.arange(n))
    data = classifier_data.prepare(digits, 0.2, seed)
    for inputs, noisy, size in zip(
        (data.train, data.validation, data.test),
        (data.train_labels, data.validation_labels, data.noisy_test_labels),
        classifier_data.SPLIT,
        strict=True,
    ):
        assert inputs.shape == (size, 1)
        assert int((noisy != inputs[:, 0]).sum()) == round(0.2 * size)
    assert torch.equal(data.test_labels, data.test[:, 0])


# ----------------------------------------------------------------------------------------- the methods


def test_copies_compute_what_single_networks_compute(seed):
    """The leading dimension of the parameters changes nothing: against torch's own layers, one by one."""
    generator = torch.Generator().manual_seed(seed)
    parameters = classifier_methods.initial_parameters(3, generator)
    inputs = torch.randn(3, 7, classifier_data.FEATURES, generator=generator)
    found = classifier_methods.logits(parameters, inputs)
    assert found.shape == (3, 7, classifier_data.CLASSES)
    for i in range(3):
        p = {name: value[i] for name, value in parameters.items()}
        hidden = torch.nn.functional.linear(inputs[i], p["weight1"].T, p["bias1"][0]).tanh()
        expected = torch.nn.functional.linear(hidden, p["weight2"].T, p["bias2"][0])
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(classifier_methods.logits(p, inputs[i]), expected, rtol=1e-4, atol=1e-5)


def test_copies_have_their_own_start_minibatches_and_mean_loss(seed):
    generator = torch.Generator().manual_seed(seed)
    n = classifier_methods.BATCH_SIZE * 2
    inputs = torch.randn(n, classifier_data.FEATURES, generator=generator)
    labels = torch.randint(10, (n,), generator=generator)
    data = classifier_data.Data(inputs, labels, *[None] * 5)
    parameters = classifier_methods.initial_parameters(2, generator)
    first = parameters["weight1"].detach()
    assert not torch.equal(first[0], first[1])
    for p in parameters.values():  # from here on only their minibatches can make a difference
        p.detach()[1] = p.detach()[0]
    objective = classifier_methods.Objective(parameters, data, generator)
    # the two batches of an epoch make the whole data, for each copy
    losses = torch.stack([objective(), objective()])
    assert losses.shape == (2, 2)
    outputs = classifier_methods.logits(parameters, inputs)
    for i in range(2):
        whole = torch.nn.functional.cross_entropy(outputs[i], labels)
        torch.testing.assert_close(losses[:, i].mean(), whole.detach(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(losses[:, 0], losses[:, 1])


# ------------------------------------------------------------------------------------------ the script


def test_a_tiny_run_of_the_script(tmp_path):
    figure = tmp_path / "figure.png"
    command = [sys.executable, str(EXAMPLES / "bayesian_classifier.py"), "--repeats", "1", "--steps", "200"]
    done = subprocess.run(
        [*command, "--output", str(figure)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert figure.stat().st_size > 10_000
    lines = done.stdout.splitlines()
    expected = {
        "SGD + momentum": 200,
        "ensemble of 5": 1000,
        "SGHMC": 200,
        "CTLD": 200,
        "CTLD, constant T": 200,
    }
    for label, gradients in expected.items():
        row = next(line for line in lines if re.match(re.escape(label) + r"  +[\d,]+  +0\.", line))
        cells = re.split(r"  +", row)
        assert cells[1] == f"{gradients:,}"
        accuracy, *others = map(float, cells[2:])
        assert 0.2 < accuracy <= 1.0  # of ten classes, so something was learned
        assert len(others) == 4 and all(0.0 < x < 3.0 for x in others)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "--repeats: must be at least 1"),
        (["--noise", "1.5"], "--noise: must be between 0 and 1"),
        (["--output", "/nonexistent/figure.png"], "--output: there is no folder /nonexistent"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(arguments, message, monkeypatch, capsys):
    import bayesian_classifier

    monkeypatch.setattr(sys, "argv", ["bayesian_classifier.py", *arguments])
    with pytest.raises(SystemExit):
        bayesian_classifier.parse_arguments()
    assert message in capsys.readouterr().err
