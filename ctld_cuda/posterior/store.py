"""Draws in the order of time, in memory or in files: at most ``keep`` of them, a uniform sample of all.

Which draws are kept is a pure function of (seed, step, chain), as is the noise: every draw has a random
62-bit priority, and the ``keep`` smallest priorities stay. That is a uniform sample without replacement of
all draws so far, at every moment. No random state has to be saved with it, and a run that was interrupted
keeps the draws that it would have kept.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

Tensor = torch.Tensor

# what is known about a draw besides its parameters
COLUMNS = {
    "step": np.int64,
    "chain": np.int64,
    "alpha": np.float64,
    "temperature": np.float64,
    "energy": np.float64,
    "at_target": np.bool_,
}
Columns = dict[str, np.ndarray]

_ALL = 2**62


class Spec(NamedTuple):
    """Shape and dtype of one parameter of one draw."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def priorities(seed: int, step: np.ndarray, chain: np.ndarray) -> np.ndarray:
    """Random 62-bit integers, int64 (n,), a function of the draw: its step and chain, int64 (n,)."""
    # the seed too is mixed before it meets a step: adjacent seeds would share their streams
    word = _mix(np.full(len(step), seed, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    for part in (step, chain):
        word = _mix((word ^ part.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15))
    return (_mix(word) >> np.uint64(2)).astype(np.int64)


@dataclass
class Block:
    """Successive draws: columns, priorities, and their parameters, (n, ...), or the file of them."""

    columns: Columns
    priority: np.ndarray
    tensors: dict[str, Tensor] | None
    file: str | None = None

    @property
    def held(self) -> dict[str, Tensor]:
        """The parameters, which must be in memory."""
        if self.tensors is None:
            raise RuntimeError(f"the parameters of these draws are in {self.file}, not in memory")
        return self.tensors

    def __len__(self) -> int:
        return len(self.priority)

    def rows(self, which: np.ndarray, tensors: dict[str, Tensor]) -> Block:
        """The draws ``which`` in memory, given the parameters of all."""
        index = torch.from_numpy(which)
        return Block(
            {name: column[which] for name, column in self.columns.items()},
            self.priority[which],
            {name: tensor[index.to(tensor.device)] for name, tensor in tensors.items()},
        )


def merge(blocks: Sequence[Block]) -> Block:
    return Block(
        {name: np.concatenate([b.columns[name] for b in blocks]) for name in COLUMNS},
        np.concatenate([b.priority for b in blocks]),
        {name: torch.cat([b.held[name] for b in blocks]) for name in blocks[0].held},
    )


@dataclass
class DrawStore:
    """Draws in memory, on ``device``.

    ``last_step`` is the last step whose draws were offered; all steps up to it are done with.
    """

    specs: dict[str, Spec]
    keep: int | None
    seed: int
    device: torch.device
    last_step: int = -1
    _blocks: list[Block] = field(default_factory=list)
    # minus the priorities of what is kept: the largest priority comes first
    _heap: list[int] = field(default_factory=list)
    _threshold: int = _ALL
    _count: int = 0
    _stored: int = 0  # with those that were dropped and still take room
    _positions: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._count

    @property
    def draw_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    # -------------------------------------------------------------------------------------- writing

    def candidates(self, step: int, chains: np.ndarray) -> np.ndarray:
        """Those of the chains whose draws at this step may be kept."""
        if self.keep is None:
            return chains
        return chains[priorities(self.seed, np.full_like(chains, step), chains) <= self._threshold]

    def append(self, columns: Columns, tensors: dict[str, Tensor]) -> None:
        """Adds draws, given in the order of time, and drops those that ``keep`` does not leave room for."""
        self._admit(Block(columns, self._priorities(columns), tensors))
        self.last_step = int(columns["step"][-1])
        if self.keep is not None and self._stored - self._count > self.keep // 16:
            self._blocks = [kept for block in self._blocks for kept in self._pruned(block)]
            self._stored = self._count

    def _admit(self, block: Block) -> None:
        self._blocks.append(block)
        self._stored += len(block)
        self._positions = None
        if self.keep is None:
            self._count += len(block)
            return
        for priority in block.priority.tolist():
            if len(self._heap) < self.keep:
                heapq.heappush(self._heap, -priority)
            else:
                heapq.heappushpop(self._heap, -priority)
        self._count = len(self._heap)
        if self._count == self.keep:
            self._threshold = min(self._threshold, -self._heap[0])

    def _priorities(self, columns: Columns) -> np.ndarray:
        if self.keep is None:
            return np.zeros(len(columns["step"]), dtype=np.int64)
        return priorities(self.seed, columns["step"], columns["chain"])

    def _live(self, block: Block) -> np.ndarray:
        return np.flatnonzero(block.priority <= self._threshold)

    def _pruned(self, block: Block) -> list[Block]:
        """The block without dropped draws, or nothing; files are left as they are."""
        live = self._live(block)
        if block.file is not None or len(live) == len(block):
            return [block]
        return [block.rows(live, block.held)] if len(live) else []

    # -------------------------------------------------------------------------------------- reading

    def columns(self) -> Columns:
        """What is known about the draws, arrays (n,) in the order of time."""
        live = [(block, self._live(block)) for block in self._blocks]
        return {
            name: np.concatenate([np.empty(0, dtype), *(block.columns[name][rows] for block, rows in live)])
            for name, dtype in COLUMNS.items()
        }

    def gather(self, indices: np.ndarray, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Parameters of the draws ``indices`` (in the order of time: ascending is fastest), (n, ...)."""
        names = list(self.specs) if names is None else names
        block_of, row_of = self._where()
        blocks, rows = block_of[indices], row_of[indices]
        starts = np.flatnonzero(np.diff(blocks, prepend=-1))
        pieces: dict[str, list[Tensor]] = {name: [] for name in names}
        for start, end in zip(starts, [*starts[1:], len(blocks)], strict=True):
            tensors = self._tensors(self._blocks[blocks[start]], names)
            index = torch.from_numpy(rows[start:end])
            for name in names:
                pieces[name].append(tensors[name][index.to(tensors[name].device)].to(self.device))
        return {name: torch.cat(piece) for name, piece in pieces.items()}

    def _where(self) -> tuple[np.ndarray, np.ndarray]:
        """Block and row of every draw."""
        if self._positions is None:
            live = [self._live(block) for block in self._blocks]
            numbers = np.repeat(np.arange(len(live)), [len(rows) for rows in live])
            self._positions = numbers, np.concatenate([np.empty(0, np.int64), *live])
        return self._positions

    def _tensors(self, block: Block, names: Sequence[str]) -> dict[str, Tensor]:
        return block.held

    # ---------------------------------------------------------------------------------- persistence

    def state(self) -> dict[str, Any]:
        """All draws as tensors; a copy."""
        columns = {name: torch.from_numpy(column) for name, column in self.columns().items()}
        parameters = self.gather(np.arange(len(self))) if len(self) else {}
        return {"last_step": self.last_step, "columns": columns, "parameters": parameters}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Replaces all draws by those of :meth:`state`."""
        self._blocks, self._heap, self._threshold, self._positions = [], [], _ALL, None
        self._count = self._stored = 0
        self.last_step = int(state["last_step"])
        columns = {name: column.cpu().numpy().copy() for name, column in state["columns"].items()}
        if len(columns["step"]):
            tensors = {n: t.to(self.device, copy=True) for n, t in state["parameters"].items()}
            self._admit(Block(columns, self._priorities(columns), tensors))


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """One phrase per entry in which two dicts differ."""
    return [
        f"{key} was {theirs.get(key)!r}, is {mine.get(key)!r}"
        for key in [*mine, *(k for k in theirs if k not in mine)]
        if mine.get(key) != theirs.get(key)
    ]


def chunks(indices: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """``indices`` in pieces of at most ``size``."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
