"""The settings that a newcomer starts with: the library's, from the better of two tuned optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ctld_cuda import settings_from

from .methods import MOMENTUM, Setting, options_of
from .study import Chosen
from .tasks import Task


def setting(task: Task, tuned: Mapping[str, Chosen], reached: float | None = None) -> Setting:
    """CTLD's, from the better of SGD with momentum and AdamW on validation data; nothing of CTLD is tuned.

    ``reached`` is the training loss of a run with what this gives without it.
    """
    sgd, adamw = tuned["sgd"], tuned["adamw"]
    preconditioned = adamw.value < sgd.value
    found = adamw if preconditioned else sgd
    parameters = task.model(0).parameters()
    options = {"lr": found.setting.lr, "weight_decay": found.setting.weight_decay}
    optimizer = (
        torch.optim.AdamW(parameters, betas=(MOMENTUM, 0.999), **options)
        if preconditioned
        else torch.optim.SGD(parameters, momentum=MOMENTUM, **options)
    )
    settings = settings_from(
        optimizer,
        num_data=task.num_data,
        loss=found.loss,
        steps=task.steps,
        explore=task.explore,
        reached=reached,
    )
    preconditioner = settings["preconditioner"]
    return replace(
        found.setting,
        lr=settings["lr"],
        temperature=settings["temperature"],
        explore=settings["explore_steps"] / task.steps,
        tempering=options_of(settings["tempering"]),
        adapt=preconditioner and preconditioner.adapt_steps / task.steps,
    )
