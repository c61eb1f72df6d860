"""Settings to begin with, from what a run of SGD with momentum already told."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from . import validation

Tensor = torch.Tensor


def suggest_temperature(
    parameters: Iterable[Tensor] | int, num_data: int, loss: float, *, share: float = 0.03
) -> float:
    """Base temperature T0 at which the sampler's noise costs about a given share of the loss.

    A loss that is quadratic around its minimum, in d directions and whatever their curvatures, exceeds the
    minimum by ``d T0 / (2 N)`` on average when the parameters have the law exp(-N L / T0): each direction
    holds T0/2 (equipartition). So

        T0 = 2 share N loss / d.

    Directions without curvature hold nothing: the real cost is smaller, the more so the more parameters do
    not matter. The noise of minibatches comes on top.

    Args:
        parameters: of the model, or how many numbers they are. Those without ``requires_grad`` do not count,
            a tensor that is in it twice counts once.
        num_data: N, as for :class:`~ctld_cuda.CTLD`.
        loss: mean training loss, in nats per datum, at which a run of SGD with momentum ended.
        share: of the loss that may be lost while exploring; fine-tuning gives it back. Why the default:
            docs/choosing.md.

    Returns:
        T0, for ``CTLD(temperature=...)``.

    Raises:
        TypeError: an argument is not of the kind above.
        ValueError: no parameter, or a number that is not positive.
    """
    count = _count(parameters)
    values = {"num_data": validation.real("num_data", num_data), "loss": validation.real("loss", loss)}
    values["share"] = validation.real("share", share)
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value!r}")
    return 2.0 * values["share"] * values["num_data"] * values["loss"] / count


def _count(parameters: Iterable[Tensor] | int) -> int:
    if isinstance(parameters, int):
        return validation.integer("the number of parameters", parameters, 1)
    unique: dict[int, Tensor] = {}
    for p in parameters:
        if not isinstance(p, Tensor):
            raise TypeError(f"parameters must be tensors, or their number; one is {p!r}")
        if p.requires_grad:
            unique[id(p)] = p
    if not sum(p.numel() for p in unique.values()):
        raise ValueError("there is no parameter that requires a gradient")
    return sum(p.numel() for p in unique.values())
