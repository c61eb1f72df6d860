"""What an optimizer hands to its backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..reference import Coefficients


class LiveRate(NamedTuple):
    """A learning rate that only the device reads, and what it keeps there; all of one element.

    ``lr``: float32 or float64. ``last``: last positive lr of the sampling phase, or 0, float64.
    ``unit``: momentum unit of the noise-free phase, 0 until its first step, float64.
    """

    lr: Tensor
    last: Tensor
    unit: Tensor


class StepInputs(NamedTuple):
    """The inputs of one step.

    Attributes:
        gradients: of each parameter in the backends' order of elements; None: zero, or not active.
        groups: scalars of each parameter group. Where ``rates`` has a LiveRate, ``gradient`` is only the
            sign (-1 for maximize) and ``drift`` has no meaning: both follow from the learning rate.
        rates: for each group a LiveRate or None; only backends with ``on_device`` get any.
        loss: energies of the chains, any floating type, (C,) and contiguous; None without tempering.
        grad_scale: the gradients are this many times too large, float32 (); or None.
        found_inf: nothing must change if this is not 0, float32 (); or None. Only for ``on_device``.
    """

    gradients: Sequence[Tensor | None]
    groups: Sequence[Coefficients]
    rates: Sequence[LiveRate | None]
    loss: Tensor | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


def without_rate(coefficients: Coefficients, maximize: bool) -> Coefficients:
    """Coefficients of a group whose learning rate the device reads: only the sign of the gradient is left."""
    return coefficients._replace(gradient=-1.0 if maximize else 1.0, drift=0.0)
