"""The extension module, if it is there, and what all of its plans are told."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ..layout import Slot
from ..tempering import ADAPTIVE, FULL, STANDARDIZED, TemperingConstants

try:
    from .. import _C
except ImportError as error:
    _C = None
    WHY_NOT = f"the C++ extension is not installed or does not load ({error}); it is built by 'pip install .'"
else:
    WHY_NOT = ""

FORMATS = {
    (torch.float32, torch.float32): 0,
    (torch.bfloat16, torch.float32): 1,
    (torch.float16, torch.float32): 2,
    (torch.float64, torch.float64): 3,
    (torch.bfloat16, torch.bfloat16): 4,
}
COUPLINGS = {FULL: 0, ADAPTIVE: 1, STANDARDIZED: 2}


def infos(slots: Sequence[Slot]) -> list[tuple[int, int, int, int]]:
    """What a compiled plan is told about each parameter: size, noise index, group, format."""
    return [(s.parameter.numel(), s.index, s.group, FORMATS[s.dtype, s.momentum.dtype]) for s in slots]


def numbers(constants: TemperingConstants) -> dict[str, float]:
    return dataclasses.asdict(constants) | {"coupling": COUPLINGS[constants.coupling]}
