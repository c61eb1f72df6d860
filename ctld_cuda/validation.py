"""Checks of everything a user hands to the optimizer, before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .distributed import check_parameter
from .layout import overlaps
from .tempering import Tempering

Tensor = torch.Tensor

PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def real(name: str, value: Any) -> float:
    """A finite real number as float; ``value`` may be a 0-dim tensor."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise ValueError(f"{name} as a tensor must hold one real number, got shape {tuple(value.shape)}")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return float(value)


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value >= high):
        raise ValueError(
            f"{name} must be at least {low}" + (f" and below {high}" if high else "") + f", got {value}"
        )
    return value


def non_negative(name: str, value: Any) -> float:
    number = real(name, value)
    if number < 0:
        raise ValueError(f"{name} must not be negative, got {number}")
    return number


def hyper_parameters(
    group: dict[str, Any], live_on: torch.device | None = None
) -> tuple[float | Tensor, float, float]:
    """lr, momentum and weight_decay of a parameter group as floats.

    A learning rate that is a tensor on the device ``live_on`` stays a tensor: its value is not looked at.

    Raises:
        ValueError, TypeError: if one is negative, not finite, or momentum is not below 1.
    """
    lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
    if (
        type(lr) is type(momentum) is float
        and type(decay) in (float, int)
        and 0.0 <= lr < math.inf
        and 0.0 <= momentum < 1.0
        and 0.0 <= decay < math.inf
    ):
        return lr, momentum, float(decay)
    if isinstance(lr, Tensor) and live_on is not None and lr.device == live_on:
        if lr.numel() != 1 or lr.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                "lr as a tensor on the device must hold one float32 or float64 number, got "
                f"{lr.dtype} of shape {tuple(lr.shape)}"
            )
    else:
        lr = non_negative("lr", lr)
    momentum = non_negative("momentum", momentum)
    if momentum >= 1:
        raise ValueError(f"momentum must be below 1, got {momentum}")
    return lr, momentum, non_negative("weight_decay", decay)


def settings(
    num_data: Any,
    temperature: Any,
    integrator: Any,
    tempering: Any,
    explore_steps: Any,
    chains: Any,
    seed: Any,
) -> None:
    """The constructor's arguments that are not parameter-group options."""
    if num_data is None:
        raise ValueError(
            "num_data is required: the number of training examples, which turns the mean loss into the "
            "log posterior, e.g. num_data=len(train_set)"
        )
    if real("num_data", num_data) < 1:
        raise ValueError(f"num_data must be at least 1, got {num_data}")
    if integrator not in ("baoab", "euler"):
        raise ValueError(f"integrator must be 'baoab' or 'euler', got {integrator!r}")
    if tempering is not None and not isinstance(tempering, Tempering):
        raise TypeError(f"tempering must be a Tempering or None, got {tempering!r}")
    if non_negative("temperature", temperature) == 0 and tempering is not None:
        raise ValueError(
            "temperature=0 switches the noise off, so there is nothing to temper: pass tempering=None for "
            "momentum SGD, or a positive temperature"
        )
    if explore_steps is not None:
        integer("explore_steps", explore_steps, 0)
    if chains is not None:
        integer("chains", chains, 1)
    integer("seed", seed, 0, 2**64)


def parameters(new: Sequence[Any], device: torch.device | None, chains: int | None) -> None:
    """Tensors about to be optimized together, on ``device`` if it is known."""
    if len({id(p) for p in new}) != len(new):
        raise ValueError("a parameter appears twice in one parameter group")
    for p in new:
        if not isinstance(p, Tensor):
            raise TypeError(f"can only optimize tensors, got {torch.typename(p)}")
        if p.dtype not in PARAMETER_DTYPES:
            raise TypeError(f"parameters must be float32, bfloat16, float16 or float64, got {p.dtype}")
        if p.layout != torch.strided:
            raise TypeError(f"parameters must be dense, got {p.layout}")
        if p.device != (device or new[0].device):
            raise ValueError(
                f"all parameters must be on one device, got {device or new[0].device} and {p.device}"
            )
        if p.numel() > 2**34:
            raise ValueError(f"a parameter has {p.numel()} elements; the noise is defined for at most 2**34")
        check_parameter(p, chains)
        if overlaps(p):
            raise ValueError("a parameter's elements share memory (expand): make it contiguous first")
        if chains is not None and (p.dim() == 0 or p.shape[0] != chains):
            raise ValueError(
                f"with chains={chains} every parameter needs shape ({chains}, ...), got {tuple(p.shape)}"
            )


def gradient(parameter: Tensor, index: int) -> None:
    if parameter.grad is not None:
        usable_gradient(parameter.grad, parameter.dtype, index)


def usable_gradient(g: Tensor, dtype: torch.dtype, index: int) -> None:
    """Of parameter ``index``, which is of type ``dtype``."""
    if g.layout != torch.strided:
        raise RuntimeError(f"CTLD does not support sparse gradients (parameter {index})")
    if g.dtype != dtype:
        raise TypeError(f"the gradient of parameter {index} is {g.dtype}, the parameter {dtype}")


LOSS_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def loss(value: Any, chains: int | None, device: torch.device) -> Tensor:
    """The loss on ``device``, contiguous, shape (C,), any floating type; of a number, float64.

    Raises:
        ValueError: if it is missing or has the wrong shape.
        TypeError: if it is not real.
    """
    if value is None:
        raise ValueError(
            "tempering couples the temperature to the energy, so step() needs the mean minibatch loss: call "
            "step(closure), or step(loss=loss.detach()), or note_loss(loss) if a trainer calls step(); or "
            "construct with tempering=None"
        )
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"the loss must be a tensor or a number, got {value!r}")
        value = torch.full((), float(value), dtype=torch.float64, device=device)
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"the loss must be real, got {value.dtype}")
    if chains is None and value.numel() != 1:
        raise ValueError(
            f"the loss must be a scalar, the mean over the minibatch, got shape {tuple(value.shape)}"
        )
    if chains is not None and value.shape != (chains,):
        raise ValueError(
            f"with chains={chains} the loss must have shape ({chains},), got {tuple(value.shape)}"
        )
    if value.is_meta:
        raise ValueError("the loss is on the device 'meta', which holds no values")
    if value.dtype not in LOSS_DTYPES or value.device != device:
        value = value.to(device=device, dtype=value.dtype if value.dtype in LOSS_DTYPES else torch.float64)
    if value.requires_grad:
        value = value.detach()
    return value.reshape(-1).contiguous()


def thermostat(wanted: bool, momentum: float) -> None:
    if wanted and momentum == 0:
        raise ValueError(
            "thermostat=True needs momentum > 0: what the momenta keep of the gradients' noise shows how "
            "strong it is"
        )


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def rounding(stochastic_rounding: Any, momentum_dtype: Any) -> None:
    flag("stochastic_rounding", stochastic_rounding)
    if momentum_dtype not in (None, torch.bfloat16):
        raise ValueError(f"momentum_dtype must be None or torch.bfloat16, got {momentum_dtype!r}")
