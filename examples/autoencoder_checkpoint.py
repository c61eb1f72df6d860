"""Stopping and continuing: Ctrl-C, and the checkpoint file."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path
from typing import Protocol

import torch


class CheckpointError(Exception):
    """The checkpoint cannot be used; the message says why."""


class Saveable(Protocol):
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


class Interrupt:
    """Turns the first Ctrl-C into a request to stop after the current step; the next one acts at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interrupt:
        self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _request(self, *_) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._previous)


class Checkpoint:
    """The file that holds all trainings of a run, by name, and the settings they were started with."""

    FORMAT = "denoising autoencoder 1"

    def __init__(self, path: Path, settings: dict, trainings: dict[str, Saveable]) -> None:
        self.path = path
        self.settings = settings
        self.trainings = trainings

    def save(self) -> None:
        content = {
            "format": self.FORMAT,
            "settings": self.settings,
            "trainings": {name: training.state_dict() for name, training in self.trainings.items()},
        }
        # a crash while writing must not cost the previous checkpoint
        unfinished = self.path.with_suffix(".tmp")
        torch.save(content, unfinished)
        os.replace(unfinished, self.path)

    def load(self, path: Path) -> None:
        """Restores all trainings from ``path``.

        Raises:
            CheckpointError: if it is not a checkpoint, or one of a run with other settings.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror}") from None
        except (EOFError, RuntimeError, ValueError, pickle.UnpicklingError):
            raise CheckpointError(f"{path} is not a checkpoint, or is damaged") from None
        if not isinstance(content, dict) or content.get("format") != self.FORMAT:
            raise CheckpointError(f"{path} is not a checkpoint of this program")
        self._check_settings(path, content["settings"])
        try:
            for name, training in self.trainings.items():
                training.load_state_dict(content["trainings"][name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} does not fit this version of the program: {error}") from None

    def _check_settings(self, path: Path, saved: dict) -> None:
        different = [name for name in self.settings if saved.get(name) != self.settings[name]]
        if different:
            raise CheckpointError(
                f"{path} belongs to a run with other settings: "
                + ", ".join(f"{name} was {saved.get(name)}, is {self.settings[name]}" for name in different)
            )
