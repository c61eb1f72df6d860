"""Backend "cpu": the fused C++ step."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import torch

from ..layout import Slot
from ..reference import Coefficients
from ..state import State
from ..tempering import ADAPTIVE, FULL, STANDARDIZED, TemperingConstants

try:
    from .. import _C
except ImportError as error:
    _C = None
    _WHY_NOT = (
        f"the C++ extension is not installed or does not load ({error}); it is built by 'pip install .'"
    )
else:
    _WHY_NOT = ""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_COUPLINGS = {FULL: 0, ADAPTIVE: 1, STANDARDIZED: 2}


class CpuBackend:
    """Arguments as for :class:`ctld_cuda.backends.reference.ReferenceBackend`.

    The environment variable CTLD_INSTRUCTION_SET may name one of ``info()["instruction_sets"]``; without it
    the fastest is used.
    """

    def __init__(
        self, slots: Sequence[Slot], state: State, constants: TemperingConstants, seed: int, integrator: str
    ) -> None:
        self._slots = slots
        self._staged = [slot for slot in slots if not slot.direct]
        self._state = state  # keeps the tensors behind the addresses alive
        self._baoab = integrator == "baoab"
        infos = [(s.parameter.numel(), s.index, s.group, _DTYPES[s.dtype]) for s in slots]
        numbers = dataclasses.asdict(constants) | {"coupling": _COUPLINGS[constants.coupling]}
        addresses = {name: tensor.data_ptr() for name, tensor in state.tensors().items()}
        isa = os.environ.get("CTLD_INSTRUCTION_SET") or _C.instruction_sets()[0]
        self._plan = _C.Plan(infos, state.alpha.numel(), numbers, addresses, seed, isa)

    @staticmethod
    def info() -> dict[str, object]:
        if _C is None:
            return {"usable": False, "reason": _WHY_NOT, "instruction_sets": []}
        return {"usable": True, "reason": "", "instruction_sets": _C.instruction_sets()}

    def explore(self, groups: Sequence[Coefficients], loss: torch.Tensor | None) -> None:
        """One sampling step; ``loss`` is float64 (C,) with tempering, else None."""
        address = 0 if loss is None else loss.data_ptr()
        addresses, _keep_alive = self._addresses()
        self._plan.explore(addresses, groups, self._baoab, address, torch.get_num_threads())
        self._commit()

    def finetune(self, groups: Sequence[Coefficients]) -> None:
        """One noise-free step."""
        addresses, _keep_alive = self._addresses()
        self._plan.finetune(addresses, groups, torch.get_num_threads())
        self._commit()

    def reduce_prior_energy(self, groups: Sequence[Coefficients]) -> None:
        """Recomputes the prior energy from the parameters as they are."""
        addresses, _keep_alive = self._addresses()
        self._plan.reduce_prior_energy(addresses, groups, torch.get_num_threads())

    def _addresses(self) -> tuple[list[int], list[torch.Tensor]]:
        """Parameter, momentum and gradient of each slot, 0 for none, and the tensors behind them."""
        addresses: list[int] = []
        tensors: list[torch.Tensor] = []
        for slot in self._slots:
            if not slot.active:
                addresses += (0, 0, 0)
                continue
            theta = slot.parameter if slot.direct else slot.theta()
            gradient = slot.gradient()
            if gradient is None:
                addresses += (theta.data_ptr(), slot.momentum_address, 0)
            else:
                tensors.append(gradient)
                addresses += (theta.data_ptr(), slot.momentum_address, gradient.data_ptr())
        return addresses, tensors

    def _commit(self) -> None:
        for slot in self._staged:
            if slot.active:
                slot.commit()


def normal(seed: int, step: int, stream: int, index: int, first: int, numel: int, isa: str) -> torch.Tensor:
    """Elements ``first`` ... of the noise, made by the fused kernel's generator; both multiples of 4."""
    xi = torch.empty(numel, dtype=torch.float32)
    _C.normal(seed, step, stream, index, first // 4, numel // 4, xi.data_ptr(), isa)
    return xi
