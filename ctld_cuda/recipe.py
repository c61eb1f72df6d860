"""Settings to begin with, from what a run of SGD with momentum already told."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from . import validation
from .preconditioner import RMSPreconditioner
from .tempering import Tempering, default_step_size

Tensor = torch.Tensor

# of the optimizer's learning rate: the noise explores regions that are more curved than those it sees
_RATE = 0.5
# of the loss, what the noise may cost
_SHARE = 0.03
# both, where a run with these ended above the optimizer's training loss: nearer to the optimizer
_NEAR_RATE, _NEAR_SHARE = 1.0, 0.003
# half-width of the window at T0, twice Tempering's default: half of the time is spent there
_FLAT = 0.8
# steps of alpha, and what they are times the steps of the exploration where that lies between
_SLOWEST, _FASTEST = default_step_size(Tempering(), 1), 0.02
_TRAVEL = 12.0


def settings_from(
    optimizer: torch.optim.Optimizer,
    *,
    num_data: int,
    loss: float,
    steps: int,
    explore: float = 0.6,
    reached: float | None = None,
) -> dict[str, Any]:
    """Arguments for :class:`~ctld_cuda.CTLD` from a tuned optimizer: nothing else is left to tune.

    From SGD it takes over momentum and weight decay. From AdamW, or Adam without weight decay, it takes
    ``beta1`` as momentum, the weight decay, and a preconditioner that gives each parameter a learning rate
    of its own. The learning rate is half the optimizer's (times 1 - beta1 for Adam's), ``temperature`` that
    of :func:`suggest_temperature`, it moves as :func:`suggest_tempering` says, and a preconditioner learns
    for the first half of the exploration. Anneal the learning rate to 0 after that, for example with
    :func:`~ctld_cuda.explore_then_finetune`. docs/choosing.md has the measurements behind it::

        CTLD(model.parameters(), **settings_from(adamw, num_data=len(train_set), loss=0.31, steps=10_000))

    Half a learning rate and noise are worth it if fine-tuning then gets at least as low as the optimizer did.
    Where the run ends at a larger training loss, progress is what the task wanted: give that loss as
    ``reached`` and run again. The learning rate is then all of the optimizer's, and the temperature a tenth,
    if what it reached is above ``loss``; otherwise the settings are the same.

    Args:
        optimizer: ``torch.optim.SGD`` with momentum, ``Adam`` or ``AdamW``, with the settings that you found
            to be best and the parameters that are to be trained. ``lr`` is what it began with, not what a
            schedule has left.
        num_data: N, as for :class:`~ctld_cuda.CTLD`.
        loss: mean training loss, in nats per datum, at which the run with this optimizer ended.
        steps: of the whole run to come.
        explore: share of them that explore, in (0, 1]. The default suits training; 0.9 if the average over
            the draws is what you want, which needs time to be good.
        reached: mean training loss at the end of a run with these settings, infinite if it diverged; None
            for the first run.

    Raises:
        TypeError: for another optimizer, or an argument of the wrong kind.
        ValueError: for options that have no counterpart, groups that differ, or a number that is not
            positive, or a share that is not one.
    """
    steps = validation.integer("steps", steps, 2)
    explore = validation.real("explore", explore)
    if not 0.0 < explore <= 1.0:
        raise ValueError(f"explore must be in (0, 1], got {explore!r}")
    loss = validation.real("loss", loss)
    near = reached is not None and (reached == math.inf or validation.real("reached", reached) > loss)
    factor, share = (_NEAR_RATE, _NEAR_SHARE) if near else (_RATE, _SHARE)
    options, adam = _options_of(optimizer)
    momentum = options["betas"][0] if adam else options["momentum"]
    rate = (1.0 - momentum) * options["lr"] if adam else options["lr"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    explored = max(1, round(explore * steps))
    return {
        "lr": factor * rate,
        "momentum": momentum,
        "weight_decay": options["weight_decay"],
        "num_data": num_data,
        "temperature": suggest_temperature(parameters, num_data, loss, share=share),
        "tempering": suggest_tempering(explored),
        "explore_steps": explored,
        "preconditioner": RMSPreconditioner(adapt_steps=max(1, explored // 2)) if adam else None,
    }


def _options_of(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], bool]:
    """Those of its groups, and whether it is of Adam's kind."""
    adam = isinstance(optimizer, torch.optim.Adam)  # AdamW is one
    if not adam and not isinstance(optimizer, torch.optim.SGD):
        raise TypeError(f"the optimizer must be SGD, Adam or AdamW, got {type(optimizer).__name__}")
    names = (
        ("lr", "weight_decay", "betas", "amsgrad") if adam else ("lr", "weight_decay", "momentum", "nesterov")
    )
    first = {name: optimizer.param_groups[0][name] for name in names}
    if any({name: group[name] for name in names} != first for group in optimizer.param_groups):
        raise ValueError("the groups of the optimizer differ: give CTLD groups of your own")
    if adam and first["weight_decay"] and not optimizer.param_groups[0]["decoupled_weight_decay"]:
        raise ValueError("Adam's weight decay has no counterpart: tune AdamW's")
    if not adam and not first["momentum"]:
        raise ValueError(
            "SGD without momentum says little about a learning rate with it: tune it with momentum"
        )
    return {**first, "lr": validation.real("lr", first["lr"])}, adam


def suggest_temperature(
    parameters: Iterable[Tensor] | int, num_data: int, loss: float, *, share: float = _SHARE
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


def suggest_tempering(explore_steps: int) -> Tempering:
    """A motion of the temperature, coupled as by default, fast enough for an exploration of that length.

    The window at T0 is twice as wide as by default, so that half of the time is spent there. The step of
    alpha is 12 / explore_steps, but at least 0.005, the default, and at most 0.02. That is about the
    smallest at which an alpha that moves freely has, in the second half of 97 of 100 explorations, a moment
    that counts as a draw (``at_target``, with momentum 0.9): a slow one spends short explorations in one
    place. Above 0.02 visits to the window become too short to settle in, so explorations of less than 800
    steps have more without a draw: 7 of 100 at 600 steps, 13 at 450.

    Args:
        explore_steps: as for :class:`~ctld_cuda.CTLD`.

    Returns:
        ``CTLD(tempering=...)``.

    Raises:
        TypeError: not an integer.
        ValueError: not positive.
    """
    explore_steps = validation.integer("explore_steps", explore_steps, 1)
    return Tempering(flat=_FLAT, step_size=min(max(_TRAVEL / explore_steps, _SLOWEST), _FASTEST))


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
