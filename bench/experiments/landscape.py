"""The surroundings of what was found: how sharp a minimum is, and what lies between two.

A loss is a function of a model; the Hessian is that with respect to all its parameters together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

Tensor = torch.Tensor
Loss = Callable[[nn.Module], Tensor]


def hessian_product(model: nn.Module, loss: Loss) -> Callable[[Tensor], Tensor]:
    """v -> H v; the gradient is worked out once."""
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(loss(model), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])

    def product(vector: Tensor) -> Tensor:
        found = torch.autograd.grad(flat @ vector.to(flat), parameters, retain_graph=True)
        return torch.cat([f.reshape(-1) for f in found]).detach()

    return product


class Sharpness(NamedTuple):
    """Largest eigenvalue and trace of the Hessian; the trace's standard error."""

    largest: float
    trace: float
    trace_error: float


def sharpness(model: nn.Module, loss: Loss, probes: int, seed: int) -> Sharpness:
    """The eigenvalue by Lanczos' method (scipy's eigsh), the trace by Hutchinson's, with signs as probes."""
    import numpy as np
    from scipy.sparse.linalg import LinearOperator, eigsh

    product = hessian_product(model, loss)
    size = sum(p.numel() for p in model.parameters())

    def multiply(vector: np.ndarray) -> np.ndarray:
        return product(torch.from_numpy(np.ascontiguousarray(vector.reshape(-1)))).double().cpu().numpy()

    start = np.random.default_rng(seed).standard_normal(size)
    operator = LinearOperator((size, size), matvec=multiply, dtype=np.float64)
    (largest,) = eigsh(operator, k=1, which="LA", v0=start, tol=1e-3, return_eigenvectors=False)
    generator = torch.Generator().manual_seed(seed)
    traces = []
    for _ in range(probes):
        signs = torch.randint(2, (size,), generator=generator).double() * 2 - 1
        traces.append(float(product(signs).double().cpu() @ signs))
    samples = torch.tensor(traces, dtype=torch.float64)
    return Sharpness(float(largest), float(samples.mean()), float(samples.std() / probes**0.5))


@torch.no_grad()
def barrier(model: nn.Module, ends: tuple[Tensor, Tensor], loss: Loss, points: int = 21) -> float:
    """How far the loss rises above the straight line between two ends on the straight path between them.

    ``ends`` are parameter vectors; the model's own parameters are put back afterwards (Frankle et al. 2020).
    """
    parameters = list(model.parameters())
    own = parameters_to_vector(parameters)
    first, last = ends
    losses = []
    shares = torch.linspace(0.0, 1.0, points)
    for share in shares.tolist():
        vector_to_parameters(first + share * (last - first), parameters)
        losses.append(float(loss(model)))
    vector_to_parameters(own, parameters)
    found = torch.tensor(losses, dtype=torch.float64)
    line = found[0] + shares * (found[-1] - found[0])
    return float((found - line).max())
