"""Draws in files: safetensors shards in a folder, with a JSON index."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .store import COLUMNS, Block, Columns, DrawStore, Spec, differences, merge

Tensor = torch.Tensor

INDEX = "index.json"
FORMAT = 1
_PARAMETER, _COLUMN = "parameter/", "draw/"


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            'draws in files need safetensors: pip install "ctld_cuda[posterior]"; or leave path=None to keep '
            "them in memory"
        ) from error
    return safetensors


def _write_durably(path: Path, write: Callable[[Path], object]) -> None:
    """All or nothing, and on the disk when it returns: temporary file, fsync, rename, fsync of the folder."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_index(path: Path) -> dict[str, Any]:
    """The index of a folder of draws.

    Raises:
        ValueError: if it is not one that this version wrote.
    """
    try:
        index = json.loads((path / INDEX).read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} holds no draws: there is no {INDEX}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path / INDEX} is not an index of draws: {error}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{path / INDEX} is not an index of draws of format {FORMAT}")
    return index


def specs_of(index: dict[str, Any]) -> dict[str, Spec]:
    return {
        name: Spec(tuple(entry["shape"]), getattr(torch, entry["dtype"]))
        for name, entry in index["parameters"].items()
    }


@dataclass
class DrawFiles(DrawStore):
    """Draws in safetensors shards in a folder, with a JSON index; the newest ones in memory, up to a shard.

    A shard is complete and on the disk before the index names it, and the index is replaced in one piece, so
    a process killed at any moment loses the unfinished shard and nothing else. What the index does not name
    is removed when the folder is opened for writing. One process may write, any number may read.
    """

    path: Path = Path()
    configuration: dict[str, Any] = field(default_factory=dict)
    shard_draws: int = 1000
    shard_bytes: int = 2**26
    writable: bool = True
    _next: int = 0
    _written_step: int = -1
    _pending: int = 0
    _loaded: tuple[str, dict[str, Tensor]] | None = None

    def __post_init__(self) -> None:
        _safetensors()
        if (self.path / INDEX).exists():
            self._open()
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            if next(self.path.glob("draws-[0-9]*.safetensors"), None) is not None:
                raise ValueError(f"{self.path} holds shards of draws but no {INDEX}: choose another folder")
            self._write_index(self._blocks)

    def _open(self) -> None:
        index = read_index(self.path)
        different = differences(self.configuration, index["configuration"])
        different += differences(self.specs, specs_of(index))
        if different:
            raise ValueError(f"{self.path} holds draws of something else: {'; '.join(different)}")
        for name in index["shards"]:
            columns = self._read(name, _COLUMN, list(COLUMNS))
            block: Columns = {key: column.numpy().astype(COLUMNS[key]) for key, column in columns.items()}
            self._admit(Block(block, self._priorities(block), None, name))
        self.last_step = self._written_step = index["last_step"]
        self._next = index["next_shard"]
        if self.writable:
            known = {INDEX, *index["shards"]}
            for leftover in [*self.path.glob("draws-[0-9]*.safetensors*"), *self.path.glob(INDEX + ".tmp")]:
                if leftover.name not in known:
                    leftover.unlink()

    def _read(self, file: str, prefix: str, names: Sequence[str]) -> dict[str, Tensor]:
        safetensors = _safetensors()
        try:
            with safetensors.safe_open(self.path / file, framework="pt") as shard:
                return {name: shard.get_tensor(prefix + name) for name in names}
        except FileNotFoundError as error:
            raise RuntimeError(
                f"{self.path / file} is gone: another process rewrote the folder; open it again"
            ) from error
        except safetensors.SafetensorError as error:
            raise ValueError(f"{self.path / file} is damaged: {error}") from error

    def _tensors(self, block: Block, names: Sequence[str]) -> dict[str, Tensor]:
        if block.file is None:
            return block.held
        if self._loaded is None or self._loaded[0] != block.file or not set(names) <= set(self._loaded[1]):
            self._loaded = block.file, self._read(block.file, _PARAMETER, names)
        return self._loaded[1]

    def append(self, columns: Columns, tensors: dict[str, Tensor]) -> None:
        """Adds draws, and writes a shard if there are enough."""
        self._admit(Block(columns, self._priorities(columns), tensors))
        self.last_step = int(columns["step"][-1])
        self._pending += len(columns["step"])
        if self._pending >= self.shard_draws or self._pending * self.draw_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes what is in memory as a shard, and rewrites shards of which half or more was dropped."""
        if not self.writable:
            return
        kept = [block for old in self._blocks for block in self._pruned(old)]
        pending = [block for block in kept if block.file is None]
        if not pending and self.last_step == self._written_step:
            return
        blocks: list[Block] = []
        for block in kept:
            if block.file is None:
                continue
            live = self._live(block)
            if 2 * len(live) > len(block):
                blocks.append(block)
            elif len(live):
                blocks.append(self._write(block.rows(live, self._tensors(block, list(self.specs)))))
        if pending:
            blocks.append(self._write(merge(pending)))
        self._write_index(blocks)
        obsolete = {b.file for b in self._blocks if b.file} - {b.file for b in blocks}
        self._blocks, self._positions, self._loaded, self._pending = blocks, None, None, 0
        for file in obsolete:
            (self.path / file).unlink(missing_ok=True)

    def _write(self, block: Block) -> Block:
        file = f"draws-{self._next:06d}.safetensors"
        content = {_PARAMETER + name: tensor.cpu().contiguous() for name, tensor in block.held.items()}
        content |= {_COLUMN + name: torch.from_numpy(column) for name, column in block.columns.items()}
        _write_durably(self.path / file, lambda path: _safetensors().torch.save_file(content, path))
        self._next += 1
        return Block(block.columns, block.priority, None, file)

    def _write_index(self, blocks: Sequence[Block]) -> None:
        index = {
            "format": FORMAT,
            "configuration": self.configuration,
            "parameters": {
                name: {"shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}
                for name, spec in self.specs.items()
            },
            "last_step": self.last_step,
            "next_shard": self._next,
            "shards": [block.file for block in blocks],
        }
        text = json.dumps(index, indent=1) + "\n"
        _write_durably(self.path / INDEX, lambda path: path.write_text(text))
        self._written_step = self.last_step
