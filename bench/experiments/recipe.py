"""The settings that a newcomer starts with: taken over from SGD with momentum, nothing of CTLD is tuned."""

from __future__ import annotations

from dataclasses import replace

from ctld_cuda import suggest_temperature

from .methods import Setting
from .tasks import Task

# of SGD's best learning rate: the noise explores regions that are more curved than those that SGD sees
RATE = 0.5


def setting(task: Task, sgd: Setting, loss: float) -> Setting:
    """CTLD's, from the best setting of SGD with momentum and the training loss at which it ended."""
    temperature = suggest_temperature(task.model(0).parameters(), task.num_data, loss)
    return replace(sgd, lr=RATE * sgd.lr, temperature=temperature, tempering={})
