"""The extension module, if it is there, and what all of its plans are told."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ..inspection import Found, Usual, UsualOneByOne
from ..layout import Slot
from ..reference import Settings
from ..state import State
from ..tempering import ADAPTIVE, FULL, STANDARDIZED, TemperingConstants

try:
    from .. import _C as _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    WHY_NOT = f"the C++ extension is not installed or does not load ({error}); it is built by 'pip install .'"
else:
    WHY_NOT = ""

# tensors, chains, constants, state, seed, stochastic, group_elements, partial_sums: see _C.pyi
PlanArguments = tuple[
    list[tuple[int, int, bool, int, int, int]],
    int,
    dict[str, float],
    dict[str, int],
    int,
    bool,
    tuple[float, ...],
    bool,
    int,
    float,
]

_FORMATS = {
    (torch.float32, torch.float32): 0,
    (torch.bfloat16, torch.float32): 1,
    (torch.float16, torch.float32): 2,
    (torch.float64, torch.float64): 3,
    (torch.bfloat16, torch.bfloat16): 4,
}
_NUMBERS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_COUPLINGS = {FULL: 0, ADAPTIVE: 1, STANDARDIZED: 2}


def plan_arguments(
    slots: Sequence[Slot], state: State, constants: TemperingConstants, settings: Settings
) -> PlanArguments:
    """What all compiled plans are told first; the state's tensors must outlive the plan."""
    infos = [
        (s.parameter.numel(), s.first, s.counted, s.index, s.group, _FORMATS[s.dtype, s.momentum.dtype])
        for s in slots
    ]
    numbers = dataclasses.asdict(constants) | {"coupling": _COUPLINGS[constants.coupling]}
    chains = state.alpha.numel()
    options = settings.seed, settings.stochastic_rounding, settings.group_elements, settings.partial_sums
    history = state.history.shape[0], settings.kinetic_unit
    return infos, chains, numbers, state.addresses(), *options, *history


def usual_of(parameters: list[torch.Tensor]) -> Usual:
    """The fastest way to look at parameters and their gradients."""
    if _C is None or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return UsualOneByOne(parameters)
    return _C.Usual(parameters, torch.Tensor)


def address_of(number: torch.Tensor | None) -> tuple[int, int]:
    """Where numbers of any floating type are, and of which type; (0, 0) for none."""
    return (0, 0) if number is None else (number.data_ptr(), _NUMBERS[number.dtype])


def with_staged(found: Found, slots: Sequence[Slot], staged: Sequence[int]) -> list[int]:
    """The parameters' addresses, those at the indices ``staged`` being copies."""
    if not staged:
        return found.addresses
    addresses = found.addresses.copy()
    for i in staged:
        if slots[i].active:
            addresses[i] = slots[i].theta().data_ptr()
    return addresses
