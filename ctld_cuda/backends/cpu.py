"""Backend "cpu": the fused C++ step."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from ..layout import Slot
from ..reference import Settings, unscale_factor
from ..state import State
from ..tempering import TemperingConstants
from .extension import _C, WHY_NOT, plan_arguments
from .interface import StepInputs


class CpuBackend:
    """Arguments as for :class:`ctld_cuda.backends.reference.ReferenceBackend`.

    The environment variable CTLD_INSTRUCTION_SET may name one of ``info()["instruction_sets"]``; without it
    the fastest is used.
    """

    on_device = False

    def __init__(
        self, slots: Sequence[Slot], state: State, constants: TemperingConstants, settings: Settings
    ) -> None:
        self._slots = slots
        self._staged = [slot for slot in slots if not slot.direct]
        self._state = state  # keeps the tensors behind the addresses alive
        self._baoab = settings.integrator == "baoab"
        isa = os.environ.get("CTLD_INSTRUCTION_SET") or _C.instruction_sets()[0]
        self._plan = _C.CpuPlan(*plan_arguments(slots, state, constants, settings), isa)

    @staticmethod
    def info() -> dict[str, object]:
        if _C is None:
            return {"usable": False, "reason": WHY_NOT, "instruction_sets": [], "openmp": False}
        return {
            "usable": True,
            "reason": "",
            "instruction_sets": _C.instruction_sets(),
            "openmp": _C.openmp,
        }

    def explore(self, inputs: StepInputs) -> None:
        """One sampling step."""
        loss = None if inputs.loss is None else inputs.loss.double()
        address = 0 if loss is None else loss.data_ptr()
        addresses = self._addresses(inputs)
        threads = torch.get_num_threads()
        self._plan.explore(addresses, inputs.groups, self._baoab, address, _unscale(inputs), threads)
        self._commit()

    def finetune(self, inputs: StepInputs) -> None:
        """One noise-free step."""
        addresses = self._addresses(inputs)
        self._plan.finetune(addresses, inputs.groups, _unscale(inputs), torch.get_num_threads())
        self._commit()

    def reduce_prior_energy(self, inputs: StepInputs) -> None:
        """Recomputes the prior energy from the parameters as they are."""
        addresses = self._addresses(inputs)
        self._plan.reduce_prior_energy(addresses, inputs.groups, torch.get_num_threads())

    def _addresses(self, inputs: StepInputs) -> list[int]:
        """Parameter, momentum and gradient of each slot, 0 for none."""
        addresses: list[int] = []
        for slot, gradient in zip(self._slots, inputs.gradients, strict=True):
            if not slot.active:
                addresses += (0, 0, 0)
                continue
            # active slots have an address
            theta: int = slot.address if slot.direct else slot.theta().data_ptr()  # type: ignore[assignment]
            addresses += (theta, slot.momentum_address, 0 if gradient is None else gradient.data_ptr())
        return addresses

    def _commit(self) -> None:
        for slot in self._staged:
            if slot.active:
                slot.commit()


def _unscale(inputs: StepInputs) -> float:
    return 1.0 if inputs.grad_scale is None else float(unscale_factor(inputs.grad_scale))


def normal(seed: int, step: int, stream: int, index: int, first: int, numel: int, isa: str) -> torch.Tensor:
    """Elements ``first`` ... of the noise, made by the fused kernel's generator; both multiples of 4."""
    xi = torch.empty(numel, dtype=torch.float32)
    _C.normal(seed, step, stream, index, first // 4, numel // 4, xi.data_ptr(), isa)
    return xi
