"""What is learned: a model, its data in three parts, and what counts.

A task of some size is made by :func:`make`. All methods see the same initial weights and minibatches for the
same seed. ``validation`` is for choosing settings, ``test`` for the tables.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits, cross_entropy

from . import data

Tensor = torch.Tensor
Size = Literal["quick", "cpu", "full"]
Part = Literal["validation", "test", "landscape"]

_CORRUPTION_SEED = 20170315  # of what is held out: the same for all runs


class Task(ABC):
    """
    Attributes:
        name: of the task and its variant.
        num_data: N, the number of data whose mean loss ``loss`` estimates.
        steps: gradient evaluations of a run.
        clip: the gradient's norm is clipped to this; None: never.
        rate: about the learning rate that SGD with momentum wants; searches begin there.
        temperature: about that which samplers want; their searches begin there.
        weight_decay: where searches for it begin; None: there is none, the task is far from overfitting.
        explore: share of the steps at constant learning rate.
        trials: of each method, in the search for its setting.
        finalists: those of them that are run again on more seeds before one is chosen; none where
            runs take long.
        averages: whether samplers are judged by the average over their draws, or by where they end.
        metric, unit: what is compared, lower is better.
    """

    name: str
    num_data: int
    steps: int
    clip: float | None = None
    rate: float
    temperature: float = 0.03
    weight_decay: float | None = None
    explore: float = 0.6
    trials: int = 12
    finalists: int = 0
    averages: bool = False
    metric: str
    unit: str

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """With its initial weights."""

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Any]:
        """Endless minibatches."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a minibatch, nats per datum."""

    @abstractmethod
    def predict(self, model: nn.Module, part: Part) -> Tensor:
        """Probabilities on what was held out, such that those of several models can be averaged."""

    @abstractmethod
    def scores(self, probabilities: Tensor, part: Part) -> dict[str, float]:
        """Metrics of such probabilities, ``metric`` among them."""

    def evaluate(self, model: nn.Module, part: Part) -> dict[str, float]:
        """Metrics on what was held out."""
        return self.scores(self.predict(model, part), part)


def _shuffled(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of minibatches; what is left over at the end of a round waits for another shuffle."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count // size * size].view(-1, size)


# -------------------------------------------------------------------------------------- autoencoder


class Autoencoder(Task):
    """A deep sigmoid autoencoder restores images of which a quarter of the pixels were zeroed."""

    metric, unit = "cross_entropy", "nats per image"
    rate = 0.03
    SIZES: ClassVar[dict[Size, tuple[tuple[int, ...], int]]] = {
        "quick": ((784, 32, 8), 20),
        "cpu": ((784, 256, 128, 32), 4000),
        "full": ((784, 1000, 500, 250, 30), 60_000),
    }
    # training, validation, test
    SPLITS: ClassVar = {"mnist": (3500, 500, 1000), "fashion-mnist": (55_000, 5_000, 10_000)}

    def __init__(self, size: Size, images: str, batch: int = 100, corruption: float = 0.25) -> None:
        self.name = "autoencoder" if images == "mnist" else "autoencoder-fashion"
        encoder, self.steps = self.SIZES[size]
        self._layers = (*encoder, *encoder[-2::-1])
        self._batch, self._corruption = batch, corruption
        pixels = (
            data.mnist().pixels if images == "mnist" else torch.cat([i.pixels for i in data.fashion_mnist()])
        )
        train, validation, test = pixels.split(self.SPLITS[images])
        if size == "quick":
            train, validation, test = train[:500], validation[:100], test[:100]
        self._train = train
        self.num_data = len(self._train)
        generator = torch.Generator().manual_seed(_CORRUPTION_SEED)
        self._held_out = {
            part: (self._corrupt(clean, generator), clean)
            for part, clean in (("validation", validation), ("test", test))
        }

    def _corrupt(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        return clean * (torch.rand(clean.shape, generator=generator) >= self._corruption)

    def model(self, seed: int) -> nn.Module:
        """Glorot's normal weights and no biases, as usual; the output is a logit per pixel."""
        generator = torch.Generator().manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(self._layers):
            linear = nn.Linear(inputs, outputs)
            nn.init.xavier_normal_(linear.weight, generator=generator)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.Sigmoid()]
        return nn.Sequential(*layers[:-1])

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for chosen in _shuffled(self.num_data, self._batch, generator):
            clean = self._train[chosen]
            yield self._corrupt(clean, generator), clean

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        corrupted, clean = batch
        device = next(model.parameters()).device
        logits = model(corrupted.to(device))
        return binary_cross_entropy_with_logits(logits, clean.to(device), reduction="sum") / len(clean)

    @torch.no_grad()
    def predict(self, model: nn.Module, part: Part) -> Tensor:
        """Of each pixel, that it is white: float64 (n, 784)."""
        corrupted, _ = self._held_out[part]
        return model(corrupted.to(next(model.parameters()).device)).double().sigmoid().cpu()

    def scores(self, probabilities: Tensor, part: Part) -> dict[str, float]:
        _, clean = self._held_out[part]
        total = binary_cross_entropy(probabilities, clean.double(), reduction="sum")
        return {self.metric: float(total) / len(clean)}


# --------------------------------------------------------------------------------------------- text


class CharacterModel(nn.Module):
    """An LSTM that predicts the next character; returns logits and its state."""

    def __init__(self, symbols: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, hidden)
        self.lstm = nn.LSTM(hidden, hidden, layers, batch_first=True)
        self.output = nn.Linear(hidden, symbols)

    def forward(self, characters: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        hidden, state = self.lstm(self.embedding(characters), state)
        return self.output(hidden), state


class Characters(Task):
    """A character-level LSTM on windows of a text; the end of the text is held out."""

    metric, unit = "bits", "bits per character"
    name = "text"
    clip = 1.0
    rate = 3.0
    weight_decay = 3e-4
    # hidden units, layers, characters of the text, steps
    SIZES: ClassVar[dict[Size, tuple[int, int, int | None, int]]] = {
        "quick": (16, 1, 20_000, 20),
        "cpu": (128, 1, 100_000, 1500),
        "full": (512, 2, None, 40_000),
    }

    def __init__(self, size: Size, text: Path | None, batch: int = 32, window: int = 50) -> None:
        self._hidden, self._depth, length, self.steps = self.SIZES[size]
        characters, self._symbols = data.text(text, length)
        tenth = len(characters) // 10
        self._train, validation, test = characters.split([len(characters) - 2 * tenth, tenth, tenth])
        self._held_out = {"validation": validation, "test": test}
        self._batch, self._window = batch, window
        self.num_data = len(self._train)

    def model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return CharacterModel(self._symbols, self._hidden, self._depth)

    def batches(self, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        offsets = torch.arange(self._window + 1)
        while True:
            starts = torch.randint(len(self._train) - self._window, (self._batch, 1), generator=generator)
            yield self._train[starts + offsets]

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        batch = batch.to(next(model.parameters()).device)
        logits, _ = model(batch[:, :-1])
        return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    @torch.no_grad()
    def predict(self, model: nn.Module, part: Part, rows: int = 50) -> Tensor:
        """Of the characters that came, float64 (n,). The text is read in ``rows`` pieces."""
        held_out = self._held_out[part].to(next(model.parameters()).device)
        length = (len(held_out) - 1) // rows
        inputs = held_out[: rows * length].view(rows, length)
        targets = held_out[1 : rows * length + 1].view(rows, length, 1)
        state, found = None, []
        for start in range(0, length, 200):
            logits, state = model(inputs[:, start : start + 200], state)
            logarithms = logits.double().log_softmax(-1)
            found.append(logarithms.gather(-1, targets[:, start : start + 200]).exp())
        return torch.cat(found, 1).flatten().cpu()

    def scores(self, probabilities: Tensor, part: Part) -> dict[str, float]:
        return {self.metric: float(-probabilities.log2().mean())}


# -------------------------------------------------------------------------------------------- labels


class RowReader(nn.Module):
    """An LSTM that reads an image row by row."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(28, hidden, batch_first=True)
        self.output = nn.Linear(hidden, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden, _ = self.lstm(pixels.view(-1, 28, 28))
        return self.output(hidden[:, -1])


def _network(kind: str, width: int) -> nn.Module:
    if kind == "mlp":
        return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))
    if kind == "cnn":
        channels = width // 4
        return nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, channels, 5, padding=2, stride=2),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 5, padding=2, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * channels * 49, 10),
        )
    return RowReader(width)


class Labels(Task):
    """Fashion-MNIST, a share of whose labels was permuted, those of the held-out images too.

    Likelihood and calibration are about such labels: a model that learned how often a label is wrong is right
    to say so. The accuracy, and what begins with ``clean_``, is about the true ones.
    """

    metric, unit = "nll", "nats per image"
    rate = 0.03
    weight_decay = 1e-2
    explore = 0.9  # draws take time
    trials, finalists = 16, 3
    averages = True
    # training images, width, steps
    SIZES: ClassVar[dict[Size, dict[str, tuple[int, int, int]]]] = {
        "quick": dict.fromkeys(("mlp", "cnn", "lstm"), (500, 16, 100)),
        "cpu": {"mlp": (4000, 64, 4000), "cnn": (1000, 32, 2000), "lstm": (1000, 32, 2000)},
        "full": dict.fromkeys(("mlp", "cnn", "lstm"), (55_000, 200, 40_000)),
    }

    def __init__(self, size: Size, network: str, permuted: float, batch: int = 100) -> None:
        self.name = f"labels-{network}-{round(100 * permuted)}"
        count, self._width, self.steps = self.SIZES[size][network]
        self._network, self._batch = network, batch
        if network == "cnn":  # overfits more than the others, and less where it is hot
            self.weight_decay = 3 * self.weight_decay
            self.temperature = 10 * self.temperature
        if network == "lstm":  # saturates
            self.rate = 10 * self.rate
        train, test = data.fashion_mnist()
        generator = torch.Generator().manual_seed(_CORRUPTION_SEED)
        order = torch.randperm(len(train.labels), generator=generator)
        pixels = (train.pixels[order] - train.pixels.mean()) / train.pixels.std()
        labels = _permuted(train.labels[order], permuted, generator)
        self._train = pixels[:count], labels[:count]
        self.num_data = count
        normalized = (test.pixels - train.pixels.mean()) / train.pixels.std()
        held_out = 500 if size == "quick" else 5000
        wrong = _permuted(test.labels, permuted, generator)
        # pixels, labels, true labels
        self._held_out = {
            "validation": (pixels[-held_out:], labels[-held_out:], train.labels[order][-held_out:]),
            "test": tuple(part[: 2 * held_out] for part in (normalized, wrong, test.labels)),
        }

    def model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _network(self._network, self._width)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        pixels, labels = self._train
        for chosen in _shuffled(self.num_data, self._batch, torch.Generator().manual_seed(seed)):
            yield pixels[chosen], labels[chosen]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        device = next(model.parameters()).device
        pixels, labels = batch
        return cross_entropy(model(pixels.to(device)), labels.to(device))

    @torch.no_grad()
    def predict(self, model: nn.Module, part: Part) -> Tensor:
        """Probabilities (n, 10) on what was held out."""
        device = next(model.parameters()).device
        pixels = self._held_out[part][0]
        return torch.cat([model(some.to(device)).softmax(-1).cpu() for some in pixels.split(1000)])

    def scores(self, probabilities: Tensor, part: Part) -> dict[str, float]:
        """Negative log-likelihood, expected calibration error, accuracy.

        "scaled_ece" is the least calibration error that temperature scaling (Guo et al. 2017) could give, its
        temperature chosen with hindsight.
        """
        _, labels, truth = self._held_out[part]
        return {
            "nll": negative_log_likelihood(probabilities, labels),
            "ece": calibration_error(probabilities, labels),
            "scaled_ece": min(calibration_error(scaled(probabilities, b), labels) for b in _EXPONENTS),
            "accuracy": float((probabilities.argmax(1) == truth).double().mean()),
            "clean_nll": negative_log_likelihood(probabilities, truth),
            "clean_ece": calibration_error(probabilities, truth),
        }


def logarithms(probabilities: Tensor) -> Tensor:
    """In float64, finite for those that are 0 in float32, too."""
    return probabilities.double().clamp(min=1e-30).log()


def negative_log_likelihood(probabilities: Tensor, labels: Tensor) -> float:
    """Mean over the data, in nats."""
    chosen = probabilities.double().gather(1, labels[:, None])[:, 0]
    return float(-logarithms(chosen).mean())


_EXPONENTS = tuple(2.0 ** (k / 8.0) for k in range(-8, 9))


def scaled(probabilities: Tensor, exponent: float) -> Tensor:
    """Probabilities (n, k) with all logits multiplied by the exponent."""
    return (exponent * logarithms(probabilities)).softmax(-1)


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error (Naeini et al. 2015): equal bins of the confidence, weighted by size."""
    confidence, predicted = probabilities.double().max(1)
    bin_of = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    excess = (predicted == labels).double() - confidence
    sums = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, excess)
    return float(sums.abs().sum() / len(labels))


def _permuted(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Labels of which a random share was exchanged among each other."""
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    labels = labels.clone()
    labels[chosen] = labels[chosen[torch.randperm(len(chosen), generator=generator)]]
    return labels


# ------------------------------------------------------------------------------------------- by name

LABELS = tuple(f"labels-{network}-{share}" for network in ("mlp", "cnn", "lstm") for share in (0, 20, 30))
NAMES = ("autoencoder", "autoencoder-fashion", "text", *LABELS)


def make(name: str, size: Size, text: Path | None = None) -> Task:
    """A task by its name; ``text`` replaces the Bible."""
    if name == "autoencoder":
        return Autoencoder(size, "mnist")
    if name == "autoencoder-fashion":
        return Autoencoder(size, "fashion-mnist")
    if name == "text":
        return Characters(size, text)
    _, network, share = name.split("-")
    return Labels(size, network, int(share) / 100)
