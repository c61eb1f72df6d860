"""What an optimizer hands to its backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..layout import Found
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
        found: the parameters and their gradients.
        groups: scalars of each parameter group. Where ``rates`` has a LiveRate, ``gradient`` is only the
            sign (-1 for maximize) and ``drift`` has no meaning: both follow from the learning rate.
        rates: for each group a LiveRate or None; only backends with ``on_device`` get any.
        loss: mean losses of the chains, any floating type, (C,) and contiguous; None where neither alpha nor
            the history needs them.
        grad_scale: the gradients are this many times too large, float32 (); or None.
        found_inf: nothing must change if this is not 0, float32 (); or None. Only for ``on_device``.
    """

    found: Found
    groups: Sequence[Coefficients]
    rates: Sequence[LiveRate | None]
    loss: Tensor | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
