"""Getting the loss to ``step`` where somebody else calls it: Lightning, Hugging Face, Accelerate.

Trainers call ``optimizer.step()`` without a loss, or with a share of it only. Losses that were noted before
are used then, so all a training loop needs is one call per micro-batch; ``docs/trainers.md`` shows them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from .optimizer import CTLD

Tensor = torch.Tensor
Method = TypeVar("Method", bound=Callable[..., Any])


class NotedLosses:
    """Losses since the last step: their sum, float64, stays on the device."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets all."""
        self._count = 0
        self._sum: Tensor | None = None

    def add(self, loss: Tensor) -> None:
        """Another one, shape (C,)."""
        # a copy, because a trainer may change its loss in place
        loss = loss.to(torch.float64, copy=True)
        self._sum = loss if self._sum is None else self._sum + loss
        self._count += 1

    def mean(self) -> Tensor | None:
        """Float64, shape (C,); None if there are none."""
        return None if self._sum is None else self._sum / self._count


def _innermost(optimizer: Any) -> Any:
    """What Lightning and Fabric (``_optimizer``) or Accelerate (``optimizer``) have wrapped, if anything."""
    while True:
        own = getattr(optimizer, "__dict__", {})
        inner = own.get("_optimizer", own.get("optimizer"))
        if inner is None:
            return optimizer
        optimizer = inner


def unwrapped(method: Method) -> Method:
    """Makes a method of CTLD that sets attributes act on the optimizer itself.

    Lightning's wrapper derives from the class of what it wraps: called through it, a method would set
    attributes of the wrapper, and the optimizer that steps would never see them.
    """

    @functools.wraps(method)
    def on_the_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(_innermost(self), *args, **kwargs)

    return on_the_optimizer  # type: ignore[return-value]


def unwrap(optimizer: Any) -> CTLD:
    """The CTLD that Lightning, Fabric or Accelerate have wrapped; a CTLD as it is.

    Raises:
        TypeError: if there is none inside.
    """
    from .optimizer import CTLD

    inner = _innermost(optimizer)
    if not isinstance(inner, CTLD):
        raise TypeError(f"expected a CTLD, or one wrapped by a trainer, got {torch.typename(optimizer)}")
    return inner


def note_loss(optimizer: Any, loss: Tensor | float) -> None:
    """:meth:`ctld_cuda.CTLD.note_loss` of an optimizer that may be wrapped, as by ``accelerator.prepare``.

    Raises:
        ValueError, TypeError: as :func:`unwrap` and that method.
    """
    unwrap(optimizer).note_loss(loss)


class NotesLoss:
    """Lets a Hugging Face ``Trainer`` note its losses; put it before ``Trainer`` among the base classes.

        class SamplingTrainer(NotesLoss, Trainer):
            pass

    ``Trainer.training_step`` returns a micro-batch's share of the loss: divided by the number of
    micro-batches, or summed over its tokens and divided by the tokens of all micro-batches
    (``num_items_in_batch``). Either way the shares since the last step add up to the mean loss whose gradient
    was accumulated, also with a ``compute_loss_func`` or a ``compute_loss`` of yours.
    """

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's, whose loss it notes."""
        share = super().training_step(*args, **kwargs)  # type: ignore[misc]
        # as many shares are noted before the step, and their mean is used
        micro_batches = self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        note_loss(self.optimizer, share.double() * micro_batches)  # type: ignore[attr-defined]
        return share
