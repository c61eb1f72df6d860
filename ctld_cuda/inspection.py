"""A look at all parameters and gradients before a step: are they where they were, can they be used?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import torch

from .layout import Slot

Tensor = torch.Tensor


class Found(NamedTuple):
    """What a step needs to know of all parameters, in the order of the slots.

    Attributes:
        gradients: in the order of :meth:`Slot.theta`; None for no gradient, and where one is not active.
        gradient_addresses: of their memory, 0 for None.
        addresses: of the parameters' memory, 0 where not active; the same list until one of them changes.
        active: which are; the same tuple until one of them changes.
        parameters: those that are active.
    """

    gradients: list[Tensor | None]
    gradient_addresses: list[int]
    addresses: list[int]
    active: tuple[bool, ...]
    parameters: list[Tensor]


class Usual(Protocol):
    """What is expected of parameters and of their gradients if the next step is like the last."""

    def gradients(self) -> tuple[list[Tensor], list[int]] | None:
        """The gradients and their addresses; None unless everything is as expected."""


class UsualOneByOne:
    """:class:`Usual` in Python: loops that are written in C over one property of some tensors at a time.

    (torch lays out gradients like their parameters, so their usual strides also mean that the parameter's own
    are unchanged.)
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._some = [_Some(parameters[i : i + _AT_ONCE]) for i in range(0, len(parameters), _AT_ONCE)]

    def gradients(self) -> tuple[list[Tensor], list[int]] | None:
        gradients: list[Tensor] = []
        addresses: list[int] = []
        for some in self._some:
            found = some.gradients()
            if found is None:
                return None
            gradients += found[0]
            addresses += found[1]
        return gradients, addresses


# so many tensors stay in a processor's own cache from one loop to the next
_AT_ONCE = 128


class _Some:
    """Some of the tensors."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._addresses = list(map(_data_ptr, parameters))
        self._dtypes = list(map(_dtype, parameters))
        self._numels = list(map(_numel, parameters))
        # asking whether a tensor is contiguous costs half of asking for its strides
        self._layout = _is_contiguous if all(map(_is_contiguous, parameters)) else _stride
        self._layouts = list(map(self._layout, parameters))

    def gradients(self) -> tuple[list[Tensor], list[int]] | None:
        gradients = list(map(_grad, self._parameters))
        try:
            as_usual = (
                list(map(_data_ptr, self._parameters)) == self._addresses
                and list(map(_numel, self._parameters)) == self._numels
                and list(map(_dtype, gradients)) == self._dtypes
                and list(map(self._layout, gradients)) == self._layouts
                and list(map(_numel, gradients)) == self._numels
                and all(map(_requires_grad, self._parameters))
            )
            return (gradients, list(map(_data_ptr, gradients))) if as_usual else None
        except (AttributeError, RuntimeError, TypeError):  # no gradient, or a sparse one
            return None


_grad, _dtype, _requires_grad = (attrgetter(name) for name in ("grad", "dtype", "requires_grad"))
_data_ptr, _numel = Tensor.data_ptr, Tensor.numel
_stride, _is_contiguous = Tensor.stride, Tensor.is_contiguous


def spread(values: list[Any], absent: Any, among: Sequence[bool]) -> list[Any]:
    """Values of the active parameters among all of them."""
    each = iter(values)
    return [next(each) if active else absent for active in among]


class Inspector:
    """Looks at all parameters before a step.

    With a thousand small tensors this is what a step costs the host. So it first asks a :class:`Usual`
    whether all is as in the step before, and only if something differs, it goes through the slots.

    Args:
        slots: the parameters.
        check: ``check(parameter, index)`` raises for a gradient that cannot be used.
        usual_of: makes a Usual for parameters.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        check: Callable[[Tensor, int], None],
        usual_of: Callable[[list[Tensor]], Usual],
    ) -> None:
        self._slots = slots
        self._check = check
        self._usual_of = usual_of
        self._usual: Usual | None = None  # None: look closely
        self._frozen: list[Tensor] = []
        self._last: Found | None = None

    def look(self) -> Found:
        """
        Raises:
            RuntimeError, TypeError: for unsuitable gradients, or a parameter moved or converted.
        """
        found = self._look_quickly(self._last, self._usual) if self._last and self._usual else None
        if found is None:
            found = self._look_closely()
        # without the gradients: zero_grad() shall free their memory
        self._last = found._replace(gradients=[], gradient_addresses=[])
        return found

    def _look_quickly(self, last: Found, usual: Usual) -> Found | None:
        if any(map(_requires_grad, self._frozen)):
            return None
        some = usual.gradients()
        if some is None:
            return None
        gradients: list[Any] = some[0]
        addresses = some[1]
        if len(gradients) < len(self._slots):
            gradients = spread(gradients, None, last.active)
            addresses = spread(addresses, 0, last.active)
        return last._replace(gradients=gradients, gradient_addresses=addresses)

    def _look_closely(self) -> Found:
        self._usual = None
        gradients: list[Tensor | None] = []
        for slot in self._slots:
            self._check(slot.source, slot.index)
            slot.inspect()
            gradients.append(slot.gradient() if slot.active else None)
        addresses = [slot.address or 0 if slot.active else 0 for slot in self._slots]
        active = tuple(slot.active for slot in self._slots)
        last = self._last
        moving = [slot for slot in self._slots if slot.active]
        found = Found(
            gradients,
            [0 if gradient is None else gradient.data_ptr() for gradient in gradients],
            last.addresses if last and last.addresses == addresses else addresses,
            last.active if last and last.active == active else active,
            [slot.source for slot in moving],
        )
        if all(slot.direct and slot.parameter is slot.source for slot in moving):
            self._usual = self._usual_of([slot.parameter for slot in moving])
        self._frozen = [s.source for s in self._slots if not s.active and not s.empty]
        return found
