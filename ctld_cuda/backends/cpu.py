"""Backend "cpu": the fused C++ step."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from ..layout import Slot
from ..reference import Settings, unscale_factor
from ..state import State
from ..tempering import TemperingConstants
from .extension import _C, WHY_NOT, address_of, plan_arguments, with_staged
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
        self._staged = [i for i, slot in enumerate(slots) if not slot.direct]
        self._momenta = [slot.momentum_address for slot in slots]
        self._placed: list[int] | None = None  # the parameters' addresses in the plan
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
        gradients, loss, threads = self._gradients(inputs), address_of(inputs.loss), torch.get_num_threads()
        self._plan.explore(gradients, inputs.groups, self._baoab, loss, _unscale(inputs), threads)
        self._commit()

    def finetune(self, inputs: StepInputs) -> None:
        """One noise-free step."""
        gradients, loss, threads = self._gradients(inputs), address_of(inputs.loss), torch.get_num_threads()
        self._plan.finetune(gradients, inputs.groups, loss, _unscale(inputs), threads)
        self._commit()

    def reduce_prior_energy(self, inputs: StepInputs) -> None:
        """Recomputes the prior energy from the parameters as they are."""
        self._gradients(inputs)
        self._plan.reduce_prior_energy(inputs.groups, torch.get_num_threads())

    def _gradients(self, inputs: StepInputs) -> list[int]:
        """Address of each gradient, 0 for none; also tells the plan where the parameters are."""
        addresses = with_staged(inputs.found, self._slots, self._staged)
        if addresses is not self._placed:
            self._plan.place(addresses, self._momenta)
            self._placed = addresses
        return inputs.found.gradient_addresses

    def _commit(self) -> None:
        for i in self._staged:
            if self._slots[i].active:
                self._slots[i].commit()


def _unscale(inputs: StepInputs) -> float:
    return 1.0 if inputs.grad_scale is None else float(unscale_factor(inputs.grad_scale))


def normal(seed: int, step: int, stream: int, index: int, first: int, numel: int, isa: str) -> torch.Tensor:
    """Elements ``first`` ... of the noise, made by the fused kernel's generator; both multiples of 4."""
    xi = torch.empty(numel, dtype=torch.float32)
    _C.normal(seed, step, stream, index, first // 4, numel // 4, xi.data_ptr(), isa)
    return xi
