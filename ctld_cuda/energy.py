"""Energies from minibatches: how noisy they are, whether alpha stands it, and how to make them quieter.

With ``coupling="exact"`` alpha feels U = N L / T0 + prior. A loss from a minibatch adds noise of standard
deviation sigma to it, which kicks alpha_momentum by step_size * beta'(alpha) * sigma per step and so heats
it. The heat of known noise can be taken from alpha's own (``Tempering(energy_noise=...)``), as long as there
is as much of that: (step_size * beta' * sigma)**2 <= 1 - persistence**2.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch

from . import diagnostics
from .optimizer import CTLD
from .reference import beta_slope

Tensor = torch.Tensor

# of alpha's own noise, at which <r^2> rises by as much at most
HARMLESS = 0.1


def energy_noise(losses: Tensor, num_data: float, temperature: float = 1.0) -> Tensor:
    """Standard deviation of a minibatch energy in nats: N s / (T0 sqrt(B)) sqrt(1 - B/N).

    Args:
        losses: losses of the B examples of one minibatch, drawn without replacement, shape (..., B) with
            B at least 2; leading dimensions (chains) are kept. Not averaged over the batch.
        num_data: number N of training examples.
        temperature: base temperature T0.

    Returns:
        float64, shape (...). s is the standard deviation of the losses over examples.

    Raises:
        ValueError: if there are fewer than two losses, or more than N.
    """
    if losses.dim() == 0 or losses.shape[-1] < 2:
        raise ValueError(f"at least two losses are needed, one per example, got shape {tuple(losses.shape)}")
    batch = losses.shape[-1]
    if batch > num_data:
        raise ValueError(f"a minibatch of {batch} examples out of num_data={num_data}")
    scale = num_data / temperature * math.sqrt((1.0 - batch / num_data) / batch)
    return losses.detach().double().std(-1) * scale


class ControlVariate:
    """Minibatch losses with less noise: only their difference to known losses is estimated.

    With l_i(theta0) known for all examples at some reference parameters theta0,

        L(theta) ~ mean over the batch of (l_i(theta) - l_i(theta0)) + mean over all of l_i(theta0)

    has the same expectation as the plain mean, and the noise of the differences only, which vanishes as theta
    comes near theta0. The gradient is that of the plain mean: only what is handed to ``step`` changes. Choose
    theta0 near the middle of what is sampled (an optimum), and renew it when the noise grows.

    Args:
        reference_losses: l_i(theta0) of all N examples, in the order of the indices, shape (N,), or (C, N)
            where every chain has a reference of its own.
    """

    def __init__(self, reference_losses: Tensor) -> None:
        if reference_losses.dim() not in (1, 2) or reference_losses.shape[-1] < 2:
            raise ValueError(
                f"reference_losses must have shape (N,) or (C, N), got {tuple(reference_losses.shape)}"
            )
        self.reference_losses = reference_losses.detach().double()
        self._mean = self.reference_losses.mean(-1)

    def differences(self, losses: Tensor, indices: Tensor) -> Tensor:
        """l_i(theta) - l_i(theta0), float64, shaped like ``losses``: (B,) or (C, B).

        Args:
            losses: of the minibatch's examples, not averaged.
            indices: which examples they are, int64, shape (B,) or (C, B).
        """
        if losses.shape[-1] != indices.shape[-1]:
            raise ValueError(f"{losses.shape[-1]} losses but {indices.shape[-1]} indices")
        known = self.reference_losses
        shared = known.dim() == 1
        return losses.detach().double() - (
            known[indices] if shared else known.gather(1, indices.expand(known.shape[0], -1))
        )

    def loss(self, losses: Tensor, indices: Tensor) -> Tensor:
        """The estimate of the mean loss over all examples, for ``step(loss=...)``: float64, () or (C,)."""
        return self.differences(losses, indices).mean(-1) + self._mean

    def noise(self, losses: Tensor, indices: Tensor, temperature: float = 1.0) -> Tensor:
        """Standard deviation in nats that is left, as :func:`energy_noise` of the differences."""
        return energy_noise(self.differences(losses, indices), self.reference_losses.shape[-1], temperature)


class Verdict(NamedTuple):
    """What noise in the energy does to alpha.

    Attributes:
        level: "harmless", "correctable" (with ``energy_noise``) or "too strong".
        noise: its standard deviation in nats.
        heat: what it adds to alpha_momentum**2 per step over what alpha's own noise adds, where beta changes
            most.
        advice: what to do, in one sentence; "" if harmless.
    """

    level: str
    noise: float
    heat: float
    advice: str


def judge(optimizer: CTLD, noise: float) -> Verdict:
    """Whether an exact coupling stands energy noise of ``noise`` nats.

    Without any other friction <r^2> would rise to 1 + heat; the fluctuations of the true energy are a
    friction too, so that this is the worst case. Where the run has shown that alpha stays thermal
    (``alpha_kinetic_temperature`` within 1 +- 0.1), the noise counts as harmless.
    """
    c = optimizer._constants
    if optimizer.tempering is None or optimizer.tempering.coupling != "exact":
        raise ValueError("noise in the energy matters to coupling='exact' only")
    alpha = torch.linspace(c.flat, c.limit, 2001, dtype=torch.float64)
    kick = c.step_size * float(beta_slope(alpha, c).abs().max()) * noise
    heat = kick * kick / c.noise_variance if c.noise_variance > 0.0 else math.inf
    if heat <= HARMLESS or (c.energy_noise == 0.0 and _is_thermal(optimizer)):
        return Verdict("harmless", noise, heat, "")
    if heat <= 1.0:
        return Verdict("correctable", noise, heat, f"construct with Tempering(energy_noise={noise:.3g})")
    # more friction of alpha's own absorbs more
    persistence = f"a persistence of at most {math.sqrt(1.0 - kick * kick):.2f}, " if kick < 0.9 else ""
    advice = (
        f"use batches {heat:.1f} times as large, {persistence}a step_size of at most "
        f"{c.step_size / math.sqrt(heat):.2g}, a ControlVariate, full batches, or coupling='standardized'"
    )
    return Verdict("too strong", noise, heat, advice)


def _is_thermal(optimizer: CTLD) -> bool:
    """Whether the run so far has shown that <r^2> is within 1 +- 0.1."""
    state = optimizer._sampler
    error = diagnostics.alpha_kinetic_error(int(state.samples), optimizer._constants)
    return abs(float(state.alpha_kinetic) - 1.0) + 2.0 * error <= 0.1


class EnergyGate:
    """Watches the noise of minibatch energies, has the optimizer correct for it, and warns where it cannot.

        gate = EnergyGate(optimizer)
        for step, (inputs, targets) in enumerate(loader):
            losses = criterion(model(inputs), targets)  # one per example
            ...
            gate.observe(losses)  # or gate.observe(control.differences(losses, indices))
            optimizer.step(loss=losses.mean().detach())
            if step % 1000 == 999:
                gate.update()

    ``observe`` stays on the device; ``update`` waits for it.

    Args:
        optimizer: with ``tempering.coupling="exact"``.
    """

    def __init__(self, optimizer: CTLD) -> None:
        judge(optimizer, 0.0)  # refuses other couplings
        self.optimizer = optimizer
        self._variance = torch.zeros((), dtype=torch.float64, device=optimizer._device)
        self._observed = 0

    def observe(self, losses: Tensor) -> None:
        """Adds a minibatch: its losses, one per example, shape (B,) or (C, B)."""
        noise = energy_noise(losses, self.optimizer.num_data, self.optimizer.temperature)
        self._variance += noise.square().mean().to(self._variance.device)
        self._observed += 1

    @property
    def noise(self) -> float:
        """Root mean square of what was observed since the last update, in nats; NaN if nothing was."""
        return math.sqrt(float(self._variance) / self._observed) if self._observed else math.nan

    def update(self) -> Verdict:
        """Judges what was observed since the last call, and sets the optimizer's ``energy_noise``.

        Noise that is too strong is corrected as far as possible, with a RuntimeWarning that says what to do.

        Raises:
            RuntimeError: if nothing was observed, or only losses that are not finite.
        """
        noise = self.noise
        if not math.isfinite(noise):
            raise RuntimeError("no finite losses were observed since the last update")
        verdict = judge(self.optimizer, noise)
        self._variance.zero_()
        self._observed = 0
        self.optimizer.set_energy_noise(0.0 if verdict.level == "harmless" else noise)
        if verdict.level == "too strong":
            warnings.warn(
                f"CTLD: minibatch noise of {noise:.3g} nats in the energy heats alpha: {verdict.advice}",
                RuntimeWarning,
                stacklevel=2,
            )
        return verdict
