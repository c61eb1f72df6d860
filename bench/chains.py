"""Many small chains: CTLD(chains=C) against the same sampler written per chain and vmapped.

Target: a Gaussian in d dimensions per chain. Only optimizer steps are timed: gradient and energies are those
of one fixed state.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from timing import CpuClock, CudaClock, Step, interleave, quartiles, ratio

from ctld_cuda import CTLD, Tempering
from ctld_cuda.reference import explore_coefficients, nearest_visited
from ctld_cuda.tempering import TemperingConstants, resolve

Tensor = torch.Tensor

CHAINS, DIMENSION = 100_000, 10
LR, MOMENTUM = 0.01, 0.9
TEMPERING = Tempering(coupling="exact")

OURS, GRAPH, VMAPPED = "CTLD(chains)", "CTLD(chains), CUDA graph", "eager torch, vmapped"


def interpolate(table: Tensor, position: Tensor) -> Tensor:
    left = position.floor().clamp(0, table.numel() - 2)
    weight = (position - left).clamp(0, 1)
    left = left.long()
    return table[left] + weight * (table[left + 1] - table[left])


def force(
    alpha: Tensor, energy: Tensor, energy_mean: Tensor, hills: Tensor, started: bool, c: TemperingConstants
) -> Tensor:
    """-beta'(alpha) (U - mean U) - V_hills'(alpha)."""
    z = ((alpha.abs() - c.flat) * c.inverse_ramp).clamp(0, 1)
    q = 1 + c.scale_range * z * z * (3 - 2 * z)
    beta_slope = -12 * c.scale_range * c.inverse_ramp * z * (1 - z) / q**3
    position = alpha.abs() * c.inverse_bin_width
    deviation = energy - interpolate(energy_mean, position - 0.5) if started else 0.0
    hill_slope = interpolate(hills.diff() * c.inverse_bin_width, position - 1)
    inside = (position >= 0.5) & (position <= c.bins - 0.5)
    inwards = beta_slope * deviation + hill_slope * inside
    return torch.where(alpha < 0, inwards, -inwards)


def reflect(alpha: Tensor, r: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    unfolded = torch.remainder(alpha + limit, 4 * limit)
    beyond = unfolded > 2 * limit
    return torch.where(beyond, 4 * limit - unfolded, unfolded) - limit, torch.where(beyond, -r, r)


def chain_step(
    theta: Tensor,
    p: Tensor,
    alpha: Tensor,
    r: Tensor,
    gradient: Tensor,
    loss: Tensor,
    xi: Tensor,
    xi_alpha: Tensor,
    energy_mean: Tensor,
    hills: Tensor,
    *,
    started: bool,
    c: TemperingConstants,
) -> tuple[Tensor, ...]:
    """One step of one chain: alpha, then the parameters at the new temperature."""
    energy = c.energy_scale * loss
    half = 0.5 * c.step_size

    def scale(alpha: Tensor) -> Tensor:
        z = ((alpha.abs() - c.flat) * c.inverse_ramp).clamp(0, 1)
        return 1 + c.scale_range * z * z * (3 - 2 * z)

    before = scale(alpha)
    r = r + half * force(alpha, energy, energy_mean, hills, started, c)
    alpha, r = reflect(alpha + half * r, r, c.limit)
    r = c.persistence * r + c.noise_scale * xi_alpha
    alpha, r = reflect(alpha + half * r, r, c.limit)
    r = r + half * force(alpha, energy, energy_mean, hills, started, c)

    k = explore_coefficients("baoab", lr=LR, momentum=MOMENTUM, weight_decay=0.0, num_data=1.0, c=c)
    after = scale(alpha)
    rescale = after / before
    p = rescale.to(p.dtype) * p - (k.gradient * (0.5 * (rescale + 1))).to(p.dtype) * gradient
    theta = theta + k.drift * p
    p = k.momentum * p + (k.noise * after).to(p.dtype) * xi
    theta = theta + k.drift * p
    bin_index = (alpha.abs() * c.inverse_bin_width).long().clamp(max=c.bins - 1)
    return theta, p, alpha, r, energy, bin_index, (p * p).sum()


class VmappedChains:
    """The sampler of CTLD(chains=C, tempering=Tempering(coupling="exact")) in plain torch.

    It leaves out what only reports: flags, saturation, alpha's kinetic temperature.
    """

    def __init__(self, theta: Tensor, gradient: Tensor, losses: Tensor) -> None:
        self.chains = theta.shape[0]
        self.constants = constants(theta.shape[1])
        tables = partial(torch.zeros, self.constants.bins, dtype=torch.float64, device=theta.device)
        self.theta, self.p = theta.clone(), torch.zeros_like(theta)
        self.alpha, self.r = (
            torch.zeros(self.chains, dtype=torch.float64, device=theta.device) for _ in range(2)
        )
        self.gradient, self.losses = gradient, losses.double()
        self.visits, self.energy_mean, self.hills = tables(), tables(), tables()
        self.steps = 0

    def step(self) -> None:
        self.advance(torch.randn_like(self.theta), torch.randn_like(self.alpha))

    def advance(self, xi: Tensor, xi_alpha: Tensor) -> None:
        """One step with this noise."""
        per_chain = torch.func.vmap(
            partial(chain_step, started=self.steps > 0, c=self.constants), in_dims=(0,) * 8 + (None,) * 2
        )
        self.theta, self.p, self.alpha, self.r, energy, bins, self.kinetic = per_chain(
            *(self.theta, self.p, self.alpha, self.r, self.gradient, self.losses, xi, xi_alpha),
            *(self.energy_mean, self.hills),
        )
        self.learn(energy, bins)
        self.steps += 1

    def learn(self, energy: Tensor, bins: Tensor) -> None:
        """Adds the step of all chains to the shared bias."""
        c = self.constants
        count = torch.zeros_like(self.visits).index_add_(0, bins, torch.ones_like(energy))
        energy_sum = torch.zeros_like(self.energy_mean).index_add_(0, bins, energy)
        self.visits += count
        moved = self.energy_mean + (energy_sum - count * self.energy_mean) / self.visits
        self.energy_mean = torch.where(count > 0, moved, self.energy_mean)[nearest_visited(self.visits)]
        hill = min(c.hill_height, c.hill_gain * c.bins / (self.steps + 1)) / self.chains * count
        below, above = torch.cat((hill[:1], hill[:-1])), torch.cat((hill[1:], hill[-1:]))
        self.hills += hill + 0.5 * below + 0.5 * above


def constants(dimension: int) -> TemperingConstants:
    return resolve(
        TEMPERING,
        temperature=1.0,
        num_data=1.0,
        maximize=False,
        momentum=MOMENTUM,
        weight_decay=0.0,
        dimension=dimension,
    )


def ctld(theta: Tensor, gradient: Tensor, losses: Tensor) -> Step:
    parameter = torch.nn.Parameter(theta.clone())
    parameter.grad = gradient
    optimizer = CTLD(
        [parameter],
        lr=LR,
        momentum=MOMENTUM,
        num_data=1,
        chains=theta.shape[0],
        tempering=TEMPERING,
        backend=theta.device.type,
    )
    return lambda: optimizer.step(loss=losses)


def captured(step: Step, device: torch.device) -> Step:
    """The step as a CUDA graph."""
    if device.type != "cuda":
        raise RuntimeError("there is no GPU")
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay() -> None:
        graph.replay()

    replay.step = step  # keeps alive what the graph knows by address only
    return replay


def samplers(chains: int, dimension: int, device: torch.device) -> tuple[dict[str, Step], dict[str, str]]:
    """Steps that have been warmed up, and the reasons for what is missing."""
    theta = torch.randn(chains, dimension, device=device)
    gradient, losses = theta.clone(), 0.5 * (theta * theta).sum(1)
    steps = {
        OURS: ctld(theta, gradient, losses),
        VMAPPED: VmappedChains(theta, gradient, losses).step,
    }
    skipped = {}
    try:
        steps[GRAPH] = captured(ctld(theta, gradient, losses), device)
    except RuntimeError as error:
        skipped[GRAPH] = str(error).splitlines()[0]
    for step in steps.values():
        step()
        step()
    return steps, skipped


def run(
    chains: int,
    dimension: int,
    device: torch.device,
    clock: CpuClock | CudaClock,
    rounds: Callable[[], Iterable[Any]],
) -> dict[str, Any]:
    """Chain-steps per second as a caller sees them, and the time that the device takes for a step."""
    steps, skipped = samplers(chains, dimension, device)
    seconds = interleave({name: clock.throughput(step) for name, step in steps.items()}, rounds())
    samples = interleave({name: clock.stopwatch(step) for name, step in steps.items()}, rounds())
    device_seconds = {name: [s.device for s in own] for name, own in samples.items()}
    return {
        "chains": chains,
        "dimension": dimension,
        "rounds": len(seconds[OURS]),
        "skipped": skipped,
        "samplers": {
            name: {
                "seconds": quartiles(seconds[name]),
                "device_seconds": quartiles(device_seconds[name]),
                "host_seconds": quartiles(s.host for s in samples[name]),
                "chain_steps_per_second": chains / statistics.median(seconds[name]),
                "speedup": ratio(seconds[VMAPPED], seconds[name]),
                "device_speedup": ratio(device_seconds[VMAPPED], device_seconds[name]),
            }
            for name in steps
        },
    }
