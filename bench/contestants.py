"""Optimizer steps to time against each other, all on the same parameters with the same gradients."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timing import Step

from ctld_cuda import CTLD

Tensor = torch.Tensor
Parameters = list[torch.nn.Parameter]

LR, MOMENTUM, NUM_DATA = 1e-4, 0.9, 1000

ROOT_C = ((1 + MOMENTUM) / 2) ** 0.5
KICK, DRIFT = (NUM_DATA * LR) ** 0.5 / ROOT_C, 0.5 * (LR / NUM_DATA) ** 0.5 / ROOT_C
NOISE = (1 - MOMENTUM**2) ** 0.5

COPY, SGD, ADAM = "copy", "SGD(momentum, fused)", "Adam(fused)"
TEMPERED, EAGER, COMPILED = "CTLD", "eager torch, randn_like", "compiled torch, randn_like"

MOST_COMPILED_TENSORS = 8


class Unavailable(Exception):
    """The contestant cannot take part; the message says why."""


class Contestant(NamedTuple):
    """``traffic``: bytes per parameter that the step has to read and write, if it does so once."""

    step: Step
    traffic: int


Builder = Callable[[Parameters], Contestant]


def parameter(shape: int | tuple[int, ...], dtype: torch.dtype, device: Any = "cpu") -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.randn(shape, device=device).mul_(0.05).to(dtype))
    p.grad = torch.randn(shape, device=device).mul_(0.01).to(dtype)
    return p


def copy(parameters: Parameters) -> Contestant:
    like = parameters[0].detach()
    numel = sum(p.numel() for p in parameters)
    source, target = like.new_empty(numel).normal_(), like.new_empty(numel)
    return Contestant(lambda: target.copy_(source), 2 * like.itemsize)


def peer(kind: type[torch.optim.Optimizer], parameters: Parameters, **options: Any) -> Contestant:
    """One of torch's fused optimizers; its state has the parameters' dtype."""
    optimizer = kind(parameters, lr=LR, fused=True, **options)
    states = 1 if kind is torch.optim.SGD else 2
    return Contestant(optimizer.step, (3 + 2 * states) * parameters[0].itemsize)


def ctld(parameters: Parameters, **options: Any) -> Contestant:
    device = parameters[0].device
    optimizer = CTLD(parameters, lr=LR, momentum=MOMENTUM, num_data=NUM_DATA, backend=device.type, **options)
    loss = torch.tensor(1.0, device=device)
    optimizer.step(loss=loss)
    momentum = optimizer.state[parameters[0]]["momentum_buffer"]
    traffic = 3 * parameters[0].itemsize + 2 * momentum.itemsize
    return Contestant(lambda: optimizer.step(loss=loss), traffic)


def ctld_with_bfloat16_momentum(parameters: Parameters) -> Contestant:
    if "momentum_dtype" not in inspect.signature(CTLD).parameters:
        raise Unavailable("this version of CTLD has no momentum_dtype")
    return ctld(parameters, momentum_dtype=torch.bfloat16)


def langevin_update(thetas: list[Tensor], momenta: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """The baoab update of CTLD with torch's own noise; returns twice the kinetic energies."""
    energies = []
    for theta, p, gradient in zip(thetas, momenta, gradients, strict=True):
        p.add_(gradient, alpha=-KICK)
        theta.add_(p, alpha=DRIFT)
        p.mul_(MOMENTUM).add_(torch.randn_like(p), alpha=NOISE)
        theta.add_(p, alpha=DRIFT)
        energies.append((p * p).sum())
    return energies


@functools.cache
def compiled_langevin_update() -> Callable[..., list[Tensor]]:
    """One function for all shapes: whatever was compiled once stays compiled."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(langevin_update, dynamic=False, fullgraph=True)


def langevin(update: Callable[..., object], parameters: Parameters, dtype: torch.dtype) -> Contestant:
    """``update`` with momenta of ``dtype``."""
    thetas, gradients = [p.detach() for p in parameters], [p.grad for p in parameters]
    momenta = [torch.zeros_like(theta, dtype=dtype) for theta in thetas]
    traffic = 3 * thetas[0].itemsize + 2 * dtype.itemsize
    return Contestant(lambda: update(thetas, momenta, gradients), traffic)


def eager(parameters: Parameters, dtype: torch.dtype = torch.float32) -> Contestant:
    return langevin(langevin_update, parameters, dtype)


def eager_foreach(parameters: Parameters) -> Contestant:
    """The same in torch's operations on lists of tensors, with one call for all noise."""
    like = parameters[0].detach()
    sizes = [p.numel() for p in parameters]
    noise = torch.empty(sum(sizes), device=like.device)
    xi = [piece.view_as(p) for piece, p in zip(noise.split(sizes), parameters, strict=True)]

    def update(thetas: list[Tensor], momenta: list[Tensor], gradients: list[Tensor]) -> None:
        noise.normal_()
        torch._foreach_add_(momenta, gradients, alpha=-KICK)
        torch._foreach_add_(thetas, momenta, alpha=DRIFT)
        torch._foreach_mul_(momenta, MOMENTUM)
        torch._foreach_add_(momenta, xi, alpha=NOISE)
        torch._foreach_add_(thetas, momenta, alpha=DRIFT)
        torch._foreach_norm(momenta)

    return langevin(update, parameters, torch.float32)


def optional(build: Builder) -> Builder:
    """Other people's code may be missing or fail; that must not end the measurement."""

    @functools.wraps(build)
    def attempt(parameters: Parameters) -> Contestant:
        try:
            contestant = build(parameters)
            contestant.step()
        except (Unavailable, torch.OutOfMemoryError):
            raise
        except Exception as error:
            message = str(error).strip().splitlines()[:1]
            raise Unavailable(": ".join([type(error).__name__, *message])) from None
        return contestant

    return attempt


@optional
def compiled(parameters: Parameters) -> Contestant:
    if len(parameters) > MOST_COMPILED_TENSORS:
        raise Unavailable(f"compiling the update of {len(parameters)} tensors would take minutes")
    return langevin(compiled_langevin_update(), parameters, torch.float32)


def posteriors(method: str, parameters: Parameters) -> Contestant:
    """The update of the package ``posteriors``, in place, with the gradient given."""
    module = importlib.import_module(f"posteriors.sgmcmc.{method}")
    thetas = {str(i): p.detach() for i, p in enumerate(parameters)}
    gradients = {str(i): p.grad for i, p in enumerate(parameters)}
    state = module.init(thetas, 0.0)
    differentiate = module.grad_and_value
    log_posterior = torch.zeros(())

    def given_gradient(*_: Any, **__: Any) -> Callable[..., Any]:
        return lambda *_: (gradients, (log_posterior, None))

    def step() -> None:
        module.grad_and_value = given_gradient
        try:
            module.update(state, None, log_posterior, 1e-6, inplace=True)
        finally:
            module.grad_and_value = differentiate

    return Contestant(step, 5 * parameters[0].itemsize)


@optional
def posteriors_sghmc(parameters: Parameters) -> Contestant:
    return posteriors("sghmc", parameters)


@optional
def posteriors_baoa(parameters: Parameters) -> Contestant:
    return posteriors("baoa", parameters)


@optional
def torch_uncertainty_sghmc(parameters: Parameters) -> Contestant:
    """After its burn-in, which would cost more. It reads an estimate of the gradients' variance besides."""
    kind = importlib.import_module("torch_uncertainty.optim").SGHMC
    optimizer = kind(parameters, lr=1e-6, burn_in_steps=0)
    return Contestant(optimizer.step, 6 * parameters[0].itemsize)


def on_gpu(dtype: torch.dtype) -> dict[str, Builder]:
    """Builders by name, those that the others are compared with first."""
    sgd, adam = torch.optim.SGD, torch.optim.Adam
    found = {
        COPY: copy,
        SGD: functools.partial(peer, sgd, momentum=MOMENTUM),
        TEMPERED: ctld,
        ADAM: functools.partial(peer, adam),
        EAGER: eager,
        COMPILED: compiled,
        "CTLD, weight decay": functools.partial(ctld, weight_decay=1e-4),
        "CTLD, euler, no tempering": functools.partial(ctld, integrator="euler", tempering=None),
        "CTLD, fine-tuning": functools.partial(ctld, explore_steps=0),
    }
    if dtype == torch.bfloat16:
        found["CTLD, bfloat16 momentum"] = ctld_with_bfloat16_momentum
    return found | {
        "eager torch, _foreach": eager_foreach,
        "posteriors SGHMC": posteriors_sghmc,
        "posteriors BAOA": posteriors_baoa,
        "torch-uncertainty SGHMC": torch_uncertainty_sghmc,
    }
