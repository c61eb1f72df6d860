"""Backend "reference": runs the specification itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import reference
from ..layout import Slot
from ..reference import Coefficients
from ..state import State
from ..tempering import TemperingConstants


class ReferenceBackend:
    """Steps all parameters with the functions of :mod:`ctld_cuda.reference`.

    Args:
        slots: the parameters, in the order of their index.
        state: sampler state, written in place.
        constants: the resolved tempering.
        seed: 64-bit seed of the noise.
        integrator: "baoab" or "euler".
    """

    def __init__(
        self, slots: Sequence[Slot], state: State, constants: TemperingConstants, seed: int, integrator: str
    ) -> None:
        self._slots = slots
        self._state = state
        self._constants = constants
        self._seed = seed
        self._integrator = integrator

    @staticmethod
    def info() -> dict[str, object]:
        return {"usable": True, "reason": ""}

    def explore(self, groups: Sequence[Coefficients], loss: torch.Tensor | None) -> None:
        """One sampling step; ``loss`` is float64 (C,) with tempering, else None."""
        flats = self._flats()
        reference.explore(flats, groups, loss, self._state, self._constants, self._seed, self._integrator)
        self._commit()

    def finetune(self, groups: Sequence[Coefficients]) -> None:
        """One noise-free step."""
        reference.finetune(self._flats(), groups, self._state)
        self._commit()

    def reduce_prior_energy(self, groups: Sequence[Coefficients]) -> None:
        """Recomputes the prior energy from the parameters as they are."""
        reference.reduce_prior_energy(self._flats(), groups, self._state)

    def _flats(self):
        return [slot.flat() for slot in self._slots if slot.active]

    def _commit(self) -> None:
        for slot in self._slots:
            if slot.active:
                slot.commit()
