"""Parameters as flat arrays: the element order that noise and backends see.

A parameter's elements are counted in memory order if its memory is dense and, with chains, the chains are
its outermost dimension; otherwise in row-major order, through a copy.
"""

from __future__ import annotations

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
