"""The coefficients of a step for a parameter group, whose learning rate may be live.

A live learning rate is a tensor that only the device reads. The coefficients then hold what does not depend
on it, and the device works out the rest.
"""

from __future__ import annotations

import torch

from .reference import Coefficients, explore_coefficients, finetune_coefficients, momentum_unit
from .tempering import TemperingConstants

Tensor = torch.Tensor


def of_exploring(
    integrator: str,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    maximize: bool,
    *,
    num_data: float,
    constants: TemperingConstants,
) -> Coefficients:
    """Those of a sampling step."""
    live = isinstance(lr, Tensor)
    coefficients = explore_coefficients(
        integrator,
        lr=1.0 if isinstance(lr, Tensor) else lr,
        momentum=momentum,
        weight_decay=weight_decay,
        num_data=num_data,
        c=constants,
        maximize=maximize,
    )
    return _without_rate(coefficients, maximize) if live else coefficients


def of_finetuning(
    lr: float | Tensor, momentum: float, weight_decay: float, maximize: bool, *, unit: float
) -> Coefficients:
    """Those of a noise-free step; ``unit``, of :func:`first_unit`, does not matter to a live rate."""
    live = isinstance(lr, Tensor)
    coefficients = finetune_coefficients(
        lr=0.0 if isinstance(lr, Tensor) else lr,
        momentum=momentum,
        weight_decay=weight_decay,
        unit=1.0 if live else unit,
        maximize=maximize,
    )
    return _without_rate(coefficients, maximize) if live else coefficients


def first_unit(last_lr: float | None, lr: float, momentum: float, num_data: float) -> float:
    """The momentum unit of the noise-free phase, fixed by its first step.

    That of the last positive learning rate of the sampling phase; else of the present one. Without any, every
    unit serves: it cancels in theta.
    """
    return momentum_unit(last_lr or lr or 1.0, momentum, num_data)


def _without_rate(coefficients: Coefficients, maximize: bool) -> Coefficients:
    """Only the sign of the gradient is left of what depends on the learning rate."""
    return coefficients._replace(gradient=-1.0 if maximize else 1.0, drift=0.0)
