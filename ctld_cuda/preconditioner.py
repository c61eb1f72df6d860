"""A diagonal preconditioner: the dynamics in coordinates in which all directions are about equally steep.

With theta = D phi the optimizer steps phi, whose gradient is D g; everything else stays what it is. The
factors D are powers of two, so that going into these coordinates and back changes no bit of a parameter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .backends.interface import StepInputs
from .inspection import spread
from .reference import unscale_factor

Tensor = torch.Tensor

_LARGEST_EXPONENT = 30


@dataclass(frozen=True)
class RMSPreconditioner:
    """A learning rate of its own for each parameter, from the size of its gradients, as in Adam and RMSprop.

    The sampler works on phi = theta / D, where D^2 = 1 / sqrt(v) and v is the running mean of the squared
    gradient (pSGLD; Li, Chen, Carlson and Carin 2016). A parameter's learning rate is then lr / sqrt(v), its
    noise grows alike, and ``weight_decay`` acts on phi, which makes it that of AdamW. D is learned during the
    first ``adapt_steps`` steps and constant from then on, like the mass matrix after the warm-up of a
    Hamiltonian sampler. Then the law that is sampled is known: D does not appear in it without
    ``weight_decay``; with it the prior of theta is N(0, T0 D^2 / (N weight_decay)).

    Settings carry over from Adam(lr=a, betas=(m, ...)) and AdamW: ``momentum=m``, ``lr=(1 - m) * a``, the
    same ``weight_decay`` as AdamW's. docs/choosing.md says when it helps.

    D is rounded to a power of two, so lr / sqrt(v) is met up to a factor of 2, and no bit of a parameter is
    lost on the way into the coordinates and back, but for numbers near the smallest of their type.

    Costs 4 bytes of memory per parameter, as many again during a step, and passes over parameters and
    gradients outside of the fused step, most of them while D is learned.

    Args:
        adapt_steps: steps during which D is learned; those left out by a GradScaler count. Draws count
            (``at_target``) only afterwards. The default is the memory of the mean.
        decay: of the running mean per step, in [0, 1); Adam's beta2.
        floor: v is taken as at least this share of the largest v in the same tensor, in [0, 1]: rarely used
            parameters, such as rows of an embedding, do not get arbitrarily large steps. The default lets
            learning rates within a tensor differ by 1000.

    Raises:
        ValueError: for values outside the ranges above.
    """

    adapt_steps: int = 1000
    decay: float = 0.999
    floor: float = 1e-6

    def __post_init__(self) -> None:
        steps = self.adapt_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"adapt_steps must be a positive integer, got {steps!r}")
        for name, below in (("decay", "< 1"), ("floor", "<= 1")):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value <= 1 or (name == "decay" and value == 1):
                raise ValueError(f"{name} must be at least 0 and {below}, got {value!r}")


def learned_square(
    mean: Tensor, gradient: Tensor, unscale: Tensor | None, kept: Tensor | None, decay: float
) -> Tensor:
    """v <- decay v + (1 - decay) g^2, where that is finite and the step is ``kept``."""
    g = gradient.to(mean.dtype)
    if unscale is not None:
        g = g * unscale.to(mean.dtype)
    square = g * g
    usable = square.isfinite() if kept is None else square.isfinite() & kept
    return torch.where(usable, mean * decay + square * (1.0 - decay), mean)


def scale_of(mean: Tensor, weight: Tensor, floor: float, dtype: torch.dtype) -> Tensor:
    """D = (v / weight)^(-1/4) to the nearest power of two; 1 where no gradient was seen.

    ``weight`` is what the running mean of 1 has become, as in Adam's correction of its bias. The boundaries
    between powers, v = 2^(4k + 2), are powers of two themselves, so only exponents are looked at: every
    device rounds alike.
    """
    v = mean / torch.where(weight > 0, weight, torch.ones_like(weight)).to(mean.dtype)
    v = torch.maximum(v, v.amax() * floor)
    exponent = (floor_log2(v) + 2 >> 2).neg_().clamp_(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    return power_of_two(exponent.mul_(v > 0), dtype)


def floor_log2(x: Tensor) -> Tensor:
    """The exponent of positive numbers, from their bits; of those below the normal range, its lower end."""
    if x.dtype == torch.float64:
        return (x.view(torch.int64) >> 52).sub_(1023)
    return (x.view(torch.int32) >> 23).sub_(127)


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2**exponent, exactly, for exponents from -126 to 127."""
    return (exponent.to(torch.int32) + 127 << 23).view(torch.float32).to(dtype)


def check_preconditioner(value: Any) -> None:
    """
    Raises:
        TypeError: unless it is a preconditioner or None.
    """
    if value is not None and not isinstance(value, RMSPreconditioner):
        raise TypeError(f"preconditioner must be an RMSPreconditioner or None, got {value!r}")


def check_parameters(parameters: Sequence[Tensor]) -> None:
    """
    Raises:
        TypeError: for float16, whose range is too small for other coordinates.
    """
    if any(p.dtype == torch.float16 for p in parameters):
        raise TypeError("the preconditioner needs float32, bfloat16 or float64 parameters, got float16")


class Coordinates:
    """Goes into the coordinates before a step and back afterwards, and learns D.

    Args:
        settings: the user's.
        device: of the parameters.

    Attributes:
        adapted: steps of learning so far.
        weight: what the running mean of 1 has become, float32 ().
    """

    def __init__(self, settings: RMSPreconditioner, device: torch.device) -> None:
        self._settings = settings
        self.adapted = 0
        self.weight = torch.zeros((), device=device)

    @property
    def adapting(self) -> bool:
        return self.adapted < self._settings.adapt_steps

    def saved(self) -> dict[str, Any]:
        return {"adapted": self.adapted, "weight": self.weight}

    def restore(self, saved: dict[str, Any]) -> None:
        self.adapted = saved["adapted"]
        self.weight.copy_(saved["weight"])

    @contextlib.contextmanager
    def entered(self, inputs: StepInputs, tables: Sequence[dict[str, Any]]) -> Iterator[StepInputs]:
        """The inputs in the coordinates, the parameters with them; those are back afterwards.

        ``tables``: of each active parameter the entry of the optimizer's state whose "preconditioner" is v
        while that is learned, and D, in the parameter's type, from then on.
        """
        found = inputs.found
        gradients = [g for g, active in zip(found.gradients, found.active, strict=True) if active]
        scales = self._scales(inputs, gradients, tables)
        scaled = [None if g is None else g * d for g, d in zip(gradients, scales, strict=True)]
        spread_out = spread(scaled, None, found.active)
        addresses = [0 if g is None else g.data_ptr() for g in spread_out]
        if scales:
            torch._foreach_div_(found.parameters, scales)
        try:
            yield inputs._replace(found=found._replace(gradients=spread_out, gradient_addresses=addresses))
        finally:
            if scales:
                torch._foreach_mul_(found.parameters, scales)

    def _scales(
        self, inputs: StepInputs, gradients: Sequence[Tensor | None], tables: Sequence[dict[str, Any]]
    ) -> list[Tensor]:
        if not self.adapting:
            return [table["preconditioner"] for table in tables]
        decay = self._settings.decay
        unscale = None if inputs.grad_scale is None else unscale_factor(inputs.grad_scale)
        kept = None if inputs.found_inf is None else inputs.found_inf == 0
        weight = self.weight * decay + (1.0 - decay)
        self.weight.copy_(weight if kept is None else torch.where(kept, weight, self.weight))
        scales = []
        for p, g, table in zip(inputs.found.parameters, gradients, tables, strict=True):
            if g is not None:
                mean = table["preconditioner"]
                mean.copy_(learned_square(mean, g, unscale, kept, decay))
            scales.append(scale_of(table["preconditioner"], self.weight, self._settings.floor, p.dtype))
        self.adapted += 1
        return scales

    def freeze(self, parameters: Sequence[Tensor], tables: Sequence[dict[str, Any]]) -> None:
        """Replaces v by D: the last step of learning is over."""
        for p, table in zip(parameters, tables, strict=True):
            table["preconditioner"] = scale_of(
                table["preconditioner"], self.weight, self._settings.floor, p.dtype
            )
