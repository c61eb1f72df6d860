"""Backend "reference": runs the specification itself."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import reference
from ..layout import FlatTensor, Slot
from ..reference import Settings
from ..state import State
from ..tempering import TemperingConstants
from .interface import StepInputs


class ReferenceBackend:
    """Steps all parameters with the functions of :mod:`ctld_cuda.reference`.

    Args:
        slots: the parameters, in the order of their index.
        state: sampler state, written in place.
        constants: the resolved tempering.
        settings: seed, integrator and rounding.
    """

    on_device = False

    def __init__(
        self, slots: Sequence[Slot], state: State, constants: TemperingConstants, settings: Settings
    ) -> None:
        self._slots = slots
        self._state = state
        self._constants = constants
        self._settings = settings

    @staticmethod
    def info() -> dict[str, object]:
        return {"usable": True, "reason": ""}

    def explore(self, inputs: StepInputs) -> None:
        """One sampling step."""
        loss = None if inputs.loss is None else inputs.loss.double()
        unscale = _unscale(inputs)
        reference.explore(
            self._flats(inputs), inputs.groups, loss, self._state, self._constants, self._settings, unscale
        )
        self._commit()

    def finetune(self, inputs: StepInputs) -> None:
        """One noise-free step."""
        loss = inputs.loss
        energy = None if loss is None else reference.loss_energy(loss.double(), self._constants)
        flats = self._flats(inputs)
        reference.finetune(flats, inputs.groups, self._state, self._settings, _unscale(inputs), energy)
        self._commit()

    def reduce_prior_energy(self, inputs: StepInputs) -> None:
        """Recomputes the prior energy from the parameters as they are."""
        reference.reduce_prior_energy(self._flats(inputs), inputs.groups, self._state)

    def _flats(self, inputs: StepInputs) -> list[FlatTensor]:
        pairs = zip(self._slots, inputs.found.gradients, strict=True)
        return [slot.flat(gradient) for slot, gradient in pairs if slot.active]

    def _commit(self) -> None:
        for slot in self._slots:
            if slot.active:
                slot.commit()


def _unscale(inputs: StepInputs) -> Tensor | None:
    return None if inputs.grad_scale is None else reference.unscale_factor(inputs.grad_scale)
