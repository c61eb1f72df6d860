"""Backends: the same step, with the same bits, on different processors."""

from __future__ import annotations

from typing import Any

import torch

from . import cpu, cuda, reference
from .interface import Backend

_BACKENDS: dict[str, type[Backend]] = {
    "cuda": cuda.CudaBackend,
    "cpu": cpu.CpuBackend,
    "reference": reference.ReferenceBackend,
}


def backend_info() -> dict[str, dict[str, object]]:
    """Which backends can be used here, and why the others cannot.

    Returns:
        For each backend name a dict with ``usable`` (bool), ``reason`` (str, why not; "" if usable) and,
        for "cpu", ``instruction_sets`` (those compiled in and supported, fastest first) and ``openmp``
        (bool: whether it uses several threads).
    """
    return {name: backend.info() for name, backend in _BACKENDS.items()}


def choose(name: str | None, device: torch.device) -> str:
    """The backend's name: the one asked for, or the fastest for ``device``.

    Raises:
        ValueError: for an unknown name, or a backend that cannot serve the device.
        RuntimeError: for a backend that is not usable on this machine.
    """
    if name is None:
        fused = device.type if device.type in ("cpu", "cuda") else "reference"
        return fused if _BACKENDS[fused].info()["usable"] else "reference"
    if name not in _BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(sorted(_BACKENDS))}, or None")
    info = _BACKENDS[name].info()
    if not info["usable"]:
        raise RuntimeError(f"backend {name!r} is not usable: {info['reason']}")
    if name != "reference" and device.type != name:
        where = {"cpu": "the CPU", "cuda": "a CUDA device"}[name]
        raise ValueError(f"backend {name!r} needs parameters on {where}, got {device}")
    return name


def on_device(name: str | None) -> bool:
    """Whether the backend reads learning rates and found_inf on the device."""
    return name is not None and _BACKENDS[name].on_device


def create(name: str, *args: Any) -> Backend:
    """A backend object; see :class:`ctld_cuda.backends.reference.ReferenceBackend` for the arguments."""
    return _BACKENDS[name](*args)
