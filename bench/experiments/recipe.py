"""The settings that a newcomer starts with: taken over from an optimizer, nothing of CTLD is tuned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ctld_cuda import suggest_temperature

from .methods import TEMPERING, Setting, conditioned
from .study import Chosen
from .tasks import Task

# of the optimizer's best learning rate: the noise explores regions that are more curved than those it sees
RATE = 0.5


def setting(task: Task, tuned: Mapping[str, Chosen]) -> Setting:
    """CTLD's, from the best setting of the better of SGD with momentum and AdamW, on validation data.

    Preconditioned if that is AdamW; the training loss at which it ended gives the temperature.
    """
    sgd, adamw = tuned["sgd"], tuned["adamw"]
    better = adamw if adamw.value < sgd.value else sgd
    start = conditioned(adamw.setting) if better is adamw else sgd.setting
    temperature = suggest_temperature(task.model(0).parameters(), task.num_data, better.loss)
    return replace(start, lr=RATE * start.lr, temperature=temperature, tempering=TEMPERING)
