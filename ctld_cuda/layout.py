"""Parameters as flat arrays: the element order that noise and backends see.

A parameter's elements are counted in memory order if its memory is dense and, with chains, the chains are
its outermost dimension; otherwise in row-major order, through a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch

Tensor = torch.Tensor


class FlatTensor(NamedTuple):
    """One parameter as a backend sees it: 1-d, contiguous, all of the same order of elements.

    ``index`` is the parameter's position over all groups (the noise index), ``group`` its group.
    ``gradient`` is None where the parameter has none this step. ``first`` is the first element's index in
    the whole parameter, of which this may be one rank's shard; ``counted`` whether its energies belong into
    the sums, as those of one replica do.
    """

    theta: Tensor
    momentum: Tensor
    gradient: Tensor | None
    index: int  # type: ignore[assignment]  # a tuple's method, not needed here
    group: int
    first: int = 0
    counted: bool = True


def overlaps(tensor: Tensor) -> bool:
    """Whether two elements may share memory (an expanded tensor)."""
    dims = sorted((d for d in range(tensor.dim()) if tensor.shape[d] != 1), key=lambda d: tensor.stride(d))
    reach = 0
    for d in dims:
        if tensor.stride(d) <= reach:
            return True
        reach += tensor.stride(d) * (tensor.shape[d] - 1)
    return False


def in_memory_order(tensor: Tensor, chains: int) -> bool:
    """Whether the tensor can be viewed flat without a copy (with several chains: chains outermost)."""
    if tensor.numel() == 0:
        return True
    dims = [d for d in range(tensor.dim()) if tensor.shape[d] != 1]
    dims.sort(key=lambda d: -tensor.stride(d))  # type: ignore[operator]
    expected = 1
    for d in reversed(dims):
        if tensor.stride(d) != expected:
            return False
        expected *= tensor.shape[d]
    return chains == 1 or dims[0] == 0


def flat_view(tensor: Tensor) -> Tensor:
    """A dense tensor in memory order, sharing its memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def momentum_dtype_of(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """float64 for float64 parameters, ``wanted`` for those of that type, float32 for all others."""
    if dtype == torch.float64 or dtype == wanted:
        return dtype
    return torch.float32


class Slot:
    """One parameter with its momentum; keeps the copies that unusual memory layouts need.

    ``source`` is what the user gave, ``parameter`` the part of it that this process steps: the same, except
    for :class:`ctld_cuda.distributed.ShardedSlot`.
    """

    # as in FlatTensor
    first = 0
    counted = True

    def __init__(
        self,
        parameter: Tensor,
        momentum: Tensor | None,
        index: int,
        group: int,
        chains: int,
        momentum_dtype: torch.dtype | None = None,
    ) -> None:
        self.source = parameter
        self.parameter = parameter = self.local(parameter)
        self.index = index
        self.group = group
        self.dtype = parameter.dtype
        self.shape = parameter.shape
        self.strides = parameter.stride()
        self.direct = self.in_order(chains)
        self.empty = parameter.numel() == 0
        self.active = False
        # of the parameter's memory, as of the last inspect(); None if it has none
        self.address: int | None = None
        if momentum is None:
            momentum = self._strided(momentum_dtype_of(self.dtype, momentum_dtype)).zero_()
        self.momentum = momentum
        self.momentum_address = self.momentum.data_ptr()
        self._staged_parameter: Tensor | None = None
        self._staged_gradient: Tensor | None = None

    def local(self, x: Tensor) -> Tensor:
        """The part of ``source`` that this process steps."""
        return x

    def local_gradient(self) -> Tensor | None:
        """Its gradient."""
        return self.source.grad

    def in_order(self, chains: int) -> bool:
        """Whether the elements are in the order of the backends in memory."""
        return in_memory_order(self.parameter, chains)

    def versions(self) -> Any:
        """Changes with every write to the parameter that autograd hears of."""
        return self.source._version

    def load_momentum(self, saved: Tensor) -> None:
        """Copies a momentum of the parameter's shape into this one's memory."""
        self.momentum.copy_(saved)

    def stored_momentum(self) -> Tensor:
        """The momentum as the optimizer's state shows it."""
        return self.momentum

    def _strided(self, dtype: torch.dtype) -> Tensor:
        """An empty tensor of the parameter's shape in the element order of the backends."""
        p = self.parameter
        if self.direct:
            return torch.empty_strided(p.shape, self.strides, dtype=dtype, device=p.device)
        return torch.empty(p.shape, dtype=dtype, device=p.device)

    def inspect(self) -> None:
        """Looks at the parameter before a step: decides ``active``; frozen and empty ones are not.

        Raises:
            RuntimeError: if it was moved or converted since the optimizer took it.
        """
        self.parameter = p = self.local(self.source)
        self.active = self.source.requires_grad and not self.empty
        address = None if self.empty else p.data_ptr()
        layout_kept = p.stride() == self.strides and p.shape == self.shape
        if address == self.address and layout_kept:
            return
        if not layout_kept or p.dtype != self.dtype or p.device != self.momentum.device:
            raise RuntimeError(
                f"parameter {self.index} changed its shape, dtype, device or memory layout after the "
                "optimizer was made (model.to(...), .half(), ...): convert the model first"
            )
        self.address = address

    def theta(self) -> Tensor:
        """The parameter flat: a view, or a copy to be written back by :meth:`commit`."""
        p = self.parameter.detach()
        if self.direct:
            return flat_view(p)
        if self._staged_parameter is None:
            self._staged_parameter = self._strided(p.dtype)
        return self._staged_parameter.copy_(p).view(-1)

    def commit(self) -> None:
        """Writes a staged parameter back; nothing to do for a view."""
        if self._staged_parameter is not None:
            self.parameter.detach().copy_(self._staged_parameter)

    def gradient(self) -> Tensor | None:
        """The gradient in the order of :meth:`theta`: the tensor itself, or a copy if its strides differ."""
        g = self.local_gradient()
        return None if g is None else self.arranged(g)

    def arranged(self, g: Tensor) -> Tensor:
        """A gradient in the order of :meth:`theta`; see :meth:`gradient`."""
        if (g.stride() == self.strides) if self.direct else g.is_contiguous():
            return g
        if self._staged_gradient is None:
            self._staged_gradient = self._strided(g.dtype)
        return self._staged_gradient.copy_(g)

    def flat(self, gradient: Tensor | None) -> FlatTensor:
        """``gradient`` as from :meth:`gradient`."""
        return FlatTensor(
            theta=self.theta(),
            momentum=flat_view(self.momentum),
            gradient=None if gradient is None else flat_view(gradient.detach()),
            index=self.index,
            group=self.group,
            first=self.first,
            counted=self.counted,
        )


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


class _Usual:
    """What is expected of some active parameters in the next step, if it is like the last."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.parameters = [slot.parameter for slot in slots]
        self.addresses = [slot.address for slot in slots]
        self.dtypes = [slot.dtype for slot in slots]
        self.numels = [slot.parameter.numel() for slot in slots]
        contiguous = all(slot.parameter.is_contiguous() for slot in slots)
        # asking whether a tensor is contiguous costs half of asking for its strides
        self.layout = _is_contiguous if contiguous else _stride
        self.layouts = [self.layout(slot.parameter) for slot in slots]

    def gradients(self) -> tuple[list[Tensor], list[int]] | None:
        """The gradients and their addresses, if everything is as expected."""
        gradients = list(map(_grad, self.parameters))
        try:
            as_usual = (
                list(map(_data_ptr, self.parameters)) == self.addresses
                and list(map(_dtype, gradients)) == self.dtypes
                and list(map(self.layout, gradients)) == self.layouts
                and list(map(_numel, gradients)) == self.numels
                and all(map(_requires_grad, self.parameters))
            )
            return (gradients, list(map(_data_ptr, gradients))) if as_usual else None
        except (AttributeError, RuntimeError, TypeError):  # no gradient, or a sparse one
            return None


_grad, _dtype, _requires_grad = (attrgetter(name) for name in ("grad", "dtype", "requires_grad"))
_data_ptr, _numel = Tensor.data_ptr, Tensor.numel
_stride, _is_contiguous = Tensor.stride, Tensor.is_contiguous
# so many tensors stay in a processor's own cache from one loop to the next
_AT_ONCE = 128


def _spread(values: list[Any], absent: Any, among: Sequence[bool]) -> list[Any]:
    """Values of the active parameters among all of them."""
    each = iter(values)
    return [next(each) if active else absent for active in among]


class Inspector:
    """Looks at all parameters before a step.

    With a thousand small tensors this is what a step costs the host. So it first decides that all is as in
    the step before, by loops that are written in C over one property of some parameters at a time; only if
    something differs, it goes through the slots. (torch lays out gradients like their parameters, so usual
    strides, size and address also mean that the parameter's own layout is unchanged.)

    Args:
        slots: the parameters.
        check: ``check(parameter, index)`` raises for a gradient that cannot be used.
    """

    def __init__(self, slots: Sequence[Slot], check: Callable[[Tensor, int], None]) -> None:
        self._slots = slots
        self._check = check
        self._usual: list[_Usual] = []  # empty: look closely
        self._frozen: list[Tensor] = []
        self._last: Found | None = None

    def look(self) -> Found:
        """
        Raises:
            RuntimeError, TypeError: for unsuitable gradients, or a parameter moved or converted.
        """
        found = self._look_quickly(self._last) if self._last and self._usual else None
        if found is None:
            found = self._look_closely()
        # without the gradients: zero_grad() shall free their memory
        self._last = found._replace(gradients=[], gradient_addresses=[])
        return found

    def _look_quickly(self, last: Found) -> Found | None:
        if any(map(_requires_grad, self._frozen)):
            return None
        gradients: list[Tensor | None] = []
        addresses: list[int] = []
        for usual in self._usual:
            some = usual.gradients()
            if some is None:
                return None
            gradients += some[0]
            addresses += some[1]
        if len(gradients) < len(self._slots):
            gradients = _spread(gradients, None, last.active)
            addresses = _spread(addresses, 0, last.active)
        return last._replace(gradients=gradients, gradient_addresses=addresses)

    def _look_closely(self) -> Found:
        self._usual = []
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
            self._usual = [_Usual(moving[i : i + _AT_ONCE]) for i in range(0, len(moving), _AT_ONCE)]
        self._frozen = [s.source for s in self._slots if not s.active and not s.empty]
        return found
