"""A few steps of everything the CUDA kernels do, for compute-sanitizer; compares the bits with the CPU's.

Small, because a sanitizer makes kernels slow. Run it with PYTORCH_NO_CUDA_MEMORY_CACHING=1: then every tensor
is an allocation of its own, and an access next to it an error.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python bench/sanitizer_run.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from ctld_cuda import CTLD, Tempering

Tensor = torch.Tensor

STEPS = 3
SHAPES = [(1,), (3,), (5, 1), (127,), (1023,), (33, 31), (4097,), (70_001,)]


def plain(values: Tensor, device: str) -> Tensor:
    return values.to(device)


def misaligned(values: Tensor, device: str) -> Tensor:
    """The same values, one element off the start of the allocation."""
    room = torch.cat((values.new_zeros(1), values.reshape(-1))).to(device)
    return room[1:].view(values.shape)


def transposed(values: Tensor, device: str) -> Tensor:
    return values.to(device).movedim(0, -1).contiguous().movedim(-1, 0)


def run(
    device: str,
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    place: Callable[[Tensor, str], Tensor] = plain,
    **options: Any,
) -> list[Tensor]:
    """Parameters, momenta and temperatures after a few steps, on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...]) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.1).to(dtype)

    parameters = [torch.nn.Parameter(place(random(shape), device)) for shape in shapes]
    without_gradient = torch.nn.Parameter(random(shapes[0]).to(device))
    options = {"num_data": 50, "weight_decay": 1e-3, "backend": device} | options
    if "lr" in options:
        options["lr"] = options["lr"].to(device)
    optimizer = CTLD([*parameters, without_gradient], **options)
    losses = (options["chains"],) if "chains" in options else ()
    for _ in range(STEPS):
        for p in parameters:
            p.grad = place(random(p.shape), device)
        optimizer.step(loss=torch.rand(losses, generator=generator).to(device))
    momenta = [optimizer.state[p]["momentum_buffer"] for p in parameters]
    left = [*parameters, *momenta, optimizer.tempering_state()["temperature"]]
    return [tensor.detach().cpu() for tensor in left]


FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
# a window and steps of alpha that let the temperature move at once
LIVELY = Tempering(coupling="exact", flat=1e-3, step_size=0.5)
CASES: dict[str, dict[str, Any]] = {
    **{str(dtype): {"dtype": dtype} for dtype in (FLOAT32, BFLOAT16, torch.float16, torch.float64)},
    "rounded to nearest": {"dtype": BFLOAT16, "stochastic_rounding": False},
    "bfloat16 momenta": {"dtype": BFLOAT16, "momentum_dtype": BFLOAT16},
    "misaligned": {"place": misaligned},
    "misaligned bfloat16": {"place": misaligned, "dtype": BFLOAT16},
    "transposed": {"place": transposed},
    "euler": {"integrator": "euler", "tempering": LIVELY},
    "constant temperature": {"tempering": None, "weight_decay": 0.0},
    "exact": {"tempering": LIVELY},
    "learning rate on the device": {"lr": torch.tensor(0.03, dtype=torch.float64)},
    "into fine-tuning": {"explore_steps": 1},
    "short chains": {"shapes": [(7,), (7, 3), (7, 2, 5)], "chains": 7, "tempering": LIVELY},
    "long chains": {"shapes": [(2, 5000), (2, 3)], "chains": 2, "dtype": BFLOAT16},
    "many chains": {"shapes": [(300, 10)], "chains": 300, "tempering": LIVELY},
    "many tensors": {"shapes": [(64,)] * 150},
}


def main(device: str) -> int:
    """The number of cases that differ from the CPU's."""
    differing = 0
    for name, options in CASES.items():
        options = {"shapes": SHAPES, "dtype": FLOAT32} | options
        pairs = zip(run(device, **options), run("cpu", **options), strict=True)
        same = all(torch.equal(found, expected) for found, expected in pairs)
        print(f"{name}: {'same bits' if same else 'DIFFERENT from the CPU'}", flush=True)
        differing += not same
    return differing


if __name__ == "__main__":
    sys.exit(main("cuda") > 0)
