"""Helpers for comparing optimizers bit for bit."""

import contextlib

import torch

from ctld_cuda import CTLD

INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    """The tensor's bits as integers, NaN payloads erased (they are outside the contract)."""
    tensor = tensor.detach().cpu().contiguous().clone()
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)
    return tensor.view(INTEGER_OF_SIZE[tensor.element_size()])


def everything(optimizer):
    """All that a step may change, by name."""
    found = {}
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            found[f"parameter {g}.{i}"] = p
            found[f"momentum {g}.{i}"] = optimizer.state[p]["momentum_buffer"]
    return found | optimizer._sampler.all_tensors()


def differing(a, b):
    """Names of the entries that differ in any bit; ``a`` and ``b`` as from :func:`snapshot`."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def snapshot(optimizer):
    return {name: bits(tensor) for name, tensor in everything(optimizer).items()}


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_of(backend):
    """The device whose parameters a backend steps in the tests."""
    return "cuda" if backend == "cuda" else "cpu"


def make_parameters(shapes, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    values = [(torch.randn(shape, generator=generator) * 0.1).to(dtype) for shape in shapes]
    return [torch.nn.Parameter(value.to(device)) for value in values]


def noisy_quadratic(parameters, step, chains=None):
    """Sets gradients of a quadratic with noise that depends on ``step`` only; returns the loss(es).

    The loss is summed in integers, because torch's own sums depend on the number of threads.
    """
    generator = torch.Generator().manual_seed(step)
    total = 0.0
    for p in parameters:
        noise = torch.randn(p.shape, generator=generator).to(p.dtype).to(p.device)
        with torch.no_grad():
            p.grad = p * 0.5 + noise * 0.05
            squares = (p.double() * p.double() * 2**30).long().reshape(chains or 1, -1).sum(
                1
            ).double() * 2**-32
        total = total + squares
    return total if chains else total[0]


def run(optimizer, steps, first=0):
    """Steps on the noisy quadratic, feeding losses; returns the optimizer."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, first + steps):
        loss = noisy_quadratic(parameters, step, optimizer.chains)
        optimizer.step(loss=loss)
    return optimizer


def two_groups(shapes, dtype=torch.float32, **options):
    """A CTLD with the parameters split over two groups of different options."""
    parameters = make_parameters(shapes, dtype=dtype, device=device_of(options.get("backend")))
    half = (len(parameters) + 1) // 2
    groups = [
        {"params": parameters[:half], "lr": 0.05, "weight_decay": 0.01},
        {"params": parameters[half:], "lr": 0.02, "momentum": 0.8},
    ]
    return CTLD([g for g in groups if g["params"]], **({"num_data": 10} | options))
