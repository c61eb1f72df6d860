"""Processes that talk to each other: start them once, run many functions on all of them."""

from __future__ import annotations

import datetime
import importlib
import multiprocessing
import os
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(seconds=60)

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(),
    reason="torch.distributed: gloo is not available",
)


def different(expected, outcomes):
    """(rank, name) of everything that is not bit for bit as expected."""
    return [
        (rank, name)
        for rank, found in enumerate(outcomes)
        for name in expected
        if not np.array_equal(expected[name], found[name])
    ]


def _serve(rank: int, size: int, store: str, pipe) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=TIMEOUT
    )
    while (task := pipe.recv()) is not None:
        module, function, arguments = task
        try:
            result = getattr(importlib.import_module(module), function)(*arguments)
            pipe.send(("done", result))
        except Exception:
            pipe.send(("failed", traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """``size`` processes in one default process group (gloo)."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size = size
        context = multiprocessing.get_context("spawn")
        store = str(folder / f"store-{size}")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._pipes, self._processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, store, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function, *arguments, each=None):
        """Results of function(*arguments, *each[rank]) on all ranks; the function lives in a module."""
        for rank, pipe in enumerate(self._pipes):
            extra = () if each is None else each[rank]
            pipe.send((function.__module__, function.__name__, (*arguments, *extra)))
        answers = [
            pipe.recv() if pipe.poll(3 * TIMEOUT.seconds) else ("failed", "no answer") for pipe in self._pipes
        ]
        failures = [f"rank {rank}:\n{text}" for rank, (kind, text) in enumerate(answers) if kind == "failed"]
        assert not failures, "\n".join(failures)
        return [result for _, result in answers]

    def leave(self, function, *arguments) -> None:
        """Runs a function that ends the processes."""
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__name__, arguments))
        for process in self._processes:
            process.join(TIMEOUT.seconds)
            assert process.exitcode not in (None, 0)

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()
