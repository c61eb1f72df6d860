"""What an optimizer hands to its backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from ..inspection import Found
from ..layout import Slot
from ..reference import Coefficients, Settings
from ..state import State
from ..tempering import TemperingConstants


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
    groups: list[Coefficients]
    rates: Sequence[LiveRate | None]
    loss: Tensor | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class Backend(Protocol):
    """What the optimizer needs from a backend; the arguments are explained at ReferenceBackend."""

    # whether learning rates and found_inf are read on the device, without waiting for it
    on_device: bool

    def __init__(
        self, slots: Sequence[Slot], state: State, constants: TemperingConstants, settings: Settings
    ) -> None: ...

    @staticmethod
    def info() -> dict[str, object]:
        """The backend's entry in :func:`ctld_cuda.backend_info`."""
        ...

    def explore(self, inputs: StepInputs) -> None:
        """One sampling step."""

    def finetune(self, inputs: StepInputs) -> None:
        """One noise-free step."""

    def reduce_prior_energy(self, inputs: StepInputs) -> None:
        """Recomputes the prior energy from the parameters as they are."""
