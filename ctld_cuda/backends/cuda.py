"""Backend "cuda": the fused step on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..layout import Slot
from ..reference import Settings
from ..state import State
from ..tempering import TemperingConstants
from .extension import _C, WHY_NOT, address_of, plan_arguments, with_staged
from .interface import StepInputs

_Rate = tuple[int, int, int, int]
_HOST_RATE: _Rate = (0, 0, 0, 0)
_OLDEST_ARCHITECTURE = (7, 5)


class CudaBackend:
    """Arguments as for :class:`ctld_cuda.backends.reference.ReferenceBackend`.

    A step launches one kernel for each storage format among the parameters on the current stream, and never
    waits for the device.

    Raises:
        ValueError: for more than 256 parameter groups.
        RuntimeError: if a GPU is too old.
    """

    on_device = True
    # tests replace it by one that runs the same kernels on the host
    extension = _C

    def __init__(
        self, slots: Sequence[Slot], state: State, constants: TemperingConstants, settings: Settings
    ) -> None:
        self._slots = slots
        self._staged = [i for i, slot in enumerate(slots) if not slot.direct]
        self._state = state  # keeps the tensors behind the addresses alive
        self._device = state.step.device
        self._baoab = settings.integrator == "baoab"
        self._plan = self.extension.CudaPlan(
            *plan_arguments(slots, state, constants, settings),
            settings.num_data,
            self._resident_blocks(),
        )
        self._scratch = torch.zeros(self._plan.scratch_bytes(), dtype=torch.uint8, device=self._device)
        self._plan.use_scratch(self._scratch.data_ptr())
        self._momenta = [slot.momentum_address for slot in slots]
        self._placed: list[int] | None = None  # the parameters' addresses in the table
        self._table: torch.Tensor | None = None

    @classmethod
    def info(cls) -> dict[str, object]:
        reason = _problem()
        return {"usable": not reason, "reason": reason}

    def explore(self, inputs: StepInputs) -> None:
        """One sampling step."""
        gradients = self._gradients(inputs)
        rates, scalars = _addresses_of(inputs)
        self._plan.explore(gradients, inputs.groups, rates, scalars, self._baoab, self._queue())
        self._commit()

    def finetune(self, inputs: StepInputs) -> None:
        """One noise-free step."""
        gradients = self._gradients(inputs)
        rates, scalars = _addresses_of(inputs)
        self._plan.finetune(gradients, inputs.groups, rates, scalars, self._queue())
        self._commit()

    def reduce_prior_energy(self, inputs: StepInputs) -> None:
        """Recomputes the prior energy from the parameters as they are."""
        self._gradients(inputs)
        self._plan.reduce_prior_energy(inputs.groups, self._queue())

    def _resident_blocks(self) -> int:
        properties = torch.cuda.get_device_properties(self._device)
        if (properties.major, properties.minor) < _OLDEST_ARCHITECTURE:
            raise RuntimeError(
                f"{properties.name} has compute capability {properties.major}.{properties.minor}; backend "
                "'cuda' needs 7.5 or newer"
            )
        return self.extension.resident_blocks(self._device.index)

    def _queue(self) -> tuple[int, int]:
        """Device index and current stream."""
        return self._device.index, torch.cuda.current_stream(self._device).cuda_stream

    def _gradients(self, inputs: StepInputs) -> list[int]:
        """Address of each gradient, 0 for none; also brings the table up to date."""
        addresses = with_staged(inputs.found, self._slots, self._staged)
        if addresses is not self._placed and addresses != self._placed:
            self._place(addresses)
        return inputs.found.gradient_addresses

    def _place(self, parameters: list[int]) -> None:
        """Puts addresses into the table on the device."""
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "parameters moved, or were frozen or unfrozen, since the last step: take one step before "
                "capturing a CUDA graph"
            )
        image = bytearray(self._plan.table_of(parameters, self._momenta))
        self._table = torch.frombuffer(image, dtype=torch.uint8).to(self._device, copy=True)
        self._plan.use_table(self._table.data_ptr())
        self._placed = parameters

    def _commit(self) -> None:
        for i in self._staged:
            if self._slots[i].active:
                self._slots[i].commit()


def _addresses_of(inputs: StepInputs) -> tuple[list[_Rate], tuple[int, int, int, int]]:
    """Rates and scalars as the plan takes them."""
    rates = [
        _HOST_RATE if rate is None else (*address_of(rate.lr), rate.last.data_ptr(), rate.unit.data_ptr())
        for rate in inputs.rates
    ]
    grad_scale, found_inf = inputs.grad_scale, inputs.found_inf
    scalars = (
        *address_of(inputs.loss),
        0 if grad_scale is None else grad_scale.data_ptr(),
        0 if found_inf is None else found_inf.data_ptr(),
    )
    return rates, scalars


def _problem() -> str:
    """Why the backend cannot be used; "" if it can."""
    if _C is None:
        return WHY_NOT
    if not hasattr(_C, "CudaPlan"):
        return "the extension was built without CUDA: install the CUDA toolkit (nvcc), then install again"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return _C.cuda_problem() or "torch sees no usable NVIDIA GPU"
    return ""
