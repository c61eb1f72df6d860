"""Shapes of the parameters of real models, in the order in which the models list them (or transposed)."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

Shape = tuple[int, ...]


def numel(shapes: list[Shape]) -> int:
    return sum(map(prod, shapes))


def _affine(outputs: int, inputs: int) -> list[Shape]:
    return [(outputs, inputs), (outputs,)]


def _norm(width: int) -> list[Shape]:
    return [(width,), (width,)]


def _convolution_and_norm(outputs: int, inputs: int, size: int) -> list[Shape]:
    return [(outputs, inputs, size, size), *_norm(outputs)]


def resnet50() -> list[Shape]:
    """torchvision's ResNet-50."""
    return list(_resnet50())


def _resnet50() -> Iterator[Shape]:
    yield from _convolution_and_norm(64, 3, 7)
    inputs = 64
    for width, blocks in [(64, 3), (128, 4), (256, 6), (512, 3)]:
        for block in range(blocks):
            yield from _convolution_and_norm(width, inputs, 1)
            yield from _convolution_and_norm(width, width, 3)
            yield from _convolution_and_norm(4 * width, width, 1)
            if block == 0:
                yield from _convolution_and_norm(4 * width, inputs, 1)
            inputs = 4 * width
    yield from _affine(1000, inputs)


def _transformer_block(width: int) -> list[Shape]:
    """Attention with one matrix for queries, keys and values, and an MLP four times as wide."""
    attention = _affine(3 * width, width) + _affine(width, width)
    mlp = _affine(4 * width, width) + _affine(width, 4 * width)
    return _norm(width) + attention + _norm(width) + mlp


def vit_b16() -> list[Shape]:
    """torchvision's ViT-B/16 for images of 224 × 224 pixels."""
    width, patch = 768, 16
    tokens = (224 // patch) ** 2 + 1
    embedding = [(1, 1, width), (width, 3, patch, patch), (width,), (1, tokens, width)]
    return embedding + 12 * _transformer_block(width) + _norm(width) + _affine(1000, width)


def gpt2_small() -> list[Shape]:
    """GPT-2 small; the head shares the token embedding's parameters."""
    width, vocabulary, context = 768, 50257, 1024
    return [(vocabulary, width), (context, width), *12 * _transformer_block(width), *_norm(width)]


def lstm(inputs: int = 256, hidden: int = 1024, layers: int = 4) -> list[Shape]:
    """torch.nn.LSTM."""
    found: list[Shape] = []
    for _ in range(layers):
        found += [(4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)]
        inputs = hidden
    return found


def many_small(count: int = 1000, size: int = 64) -> list[Shape]:
    return [(size,)] * count
