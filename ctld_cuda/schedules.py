"""A learning-rate schedule for the two phases: constant while exploring, annealed while fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim.lr_scheduler import LambdaLR

from . import validation
from .optimizer import CTLD

# what is left of the learning rate when this share of the annealing is done
_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "linear": lambda done: 1.0 - done,
}


class ExploreThenFinetune:
    """The factor of every learning rate in :func:`explore_then_finetune`, as a function of the steps done."""

    def __init__(
        self, explore_steps: int, total_steps: int, warmup_steps: int, final_ratio: float, shape: str
    ) -> None:
        self.explore_steps = explore_steps
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.final_ratio = final_ratio
        self.shape = shape

    def __call__(self, done: int) -> float:
        if done < self.warmup_steps:
            return (done + 1) / (self.warmup_steps + 1)
        if done < self.explore_steps:
            return 1.0
        share = min(1.0, (done - self.explore_steps) / (self.total_steps - self.explore_steps))
        return self.final_ratio + (1.0 - self.final_ratio) * _SHAPES[self.shape](share)


def explore_then_finetune(
    optimizer: CTLD,
    explore_steps: int,
    total_steps: int,
    *,
    final_ratio: float = 0.0,
    anneal: str = "cosine",
    warmup_steps: int = 0,
    last_epoch: int = -1,
) -> LambdaLR:
    """A schedule for :class:`~ctld_cuda.CTLD`: constant while exploring, then annealed.

    Call its ``step()`` after every ``optimizer.step()``. Counting steps from 0, step k uses the group's
    learning rate times a factor that is

    - (k+1)/(warmup_steps+1) for k < warmup_steps: a large step from a bad start can leave any basin;
    - 1 up to k = explore_steps - 1, the last step with noise. A sampler's learning rate stays, because it is
      its step size: changes leave the law it samples as it is, but change how fast it moves;
    - 1 still at k = explore_steps, the first step without noise, and from there on along half a cosine
      (Loshchilov and Hutter 2017) or a straight line to ``final_ratio``, which k = total_steps would use. So
      none of the ``total_steps`` steps has a learning rate of 0, and steps beyond keep ``final_ratio``.

    An ordinary ``LRScheduler`` with ``state_dict`` and ``load_state_dict``; what is saved are the numbers
    above as well. A learning rate that is a tensor is filled in place, as a CUDA graph needs it.

    Args:
        optimizer: whose groups' learning rates, as they are now, are the largest ones.
        explore_steps: steps with noise, at least 0; must be the optimizer's own ``explore_steps``, if that is
            set. If it is None, call ``optimizer.finetune()`` before step number ``explore_steps``.
        total_steps: steps of both phases, more than ``explore_steps``.
        final_ratio: of the last learning rate to the largest, in [0, 1].
        anneal: "cosine" or "linear".
        warmup_steps: steps with smaller learning rates at the start, at most ``explore_steps``.
        last_epoch: steps done so far, less one, as in every ``LRScheduler``; -1 for a new run.

    Raises:
        ValueError, TypeError: for numbers outside their range, or if the optimizer explores for another
            number of steps.
    """
    if not isinstance(optimizer, CTLD):
        raise TypeError(f"explore_then_finetune is for CTLD, got {type(optimizer).__name__}")
    validation.integer("explore_steps", explore_steps, 0)
    validation.integer("total_steps", total_steps, 1)
    if total_steps <= explore_steps:
        raise ValueError(
            f"total_steps counts both phases and must be more than explore_steps, got {total_steps} and "
            f"{explore_steps}"
        )
    if optimizer.explore_steps not in (None, explore_steps):
        raise ValueError(
            f"the optimizer explores for {optimizer.explore_steps} steps, the schedule for {explore_steps}: "
            "give both the same explore_steps"
        )
    validation.integer("warmup_steps", warmup_steps, 0, explore_steps + 1)
    if not 0.0 <= validation.real("final_ratio", final_ratio) <= 1.0:
        raise ValueError(f"final_ratio must be between 0 and 1, got {final_ratio}")
    if anneal not in _SHAPES:
        raise ValueError(f"anneal must be 'cosine' or 'linear', got {anneal!r}")
    factor = ExploreThenFinetune(explore_steps, total_steps, warmup_steps, float(final_ratio), anneal)
    return LambdaLR(optimizer, factor, last_epoch)
