"""What a measurement was made on and with."""

from __future__ import annotations

import datetime
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
NVIDIA_SMI_FIELDS = [
    *("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm", "clocks.max.memory"),
    *("persistence_mode", "ecc.mode.current"),
]


def output(*command: str) -> str | None:
    """What the command prints, or None if there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> str | None:
    """The commit checked out, with "+" if anything differs from it; None outside a git checkout."""
    head = output("git", "rev-parse", "HEAD")
    return head and head + ("+" if output("git", "status", "--porcelain") else "")


def nvidia_smi() -> list[dict[str, str]] | None:
    """The driver's own account of every GPU."""
    lines = output("nvidia-smi", f"--query-gpu={','.join(NVIDIA_SMI_FIELDS)}", "--format=csv,noheader")
    if lines is None:
        return None
    return [dict(zip(NVIDIA_SMI_FIELDS, line.split(", "), strict=False)) for line in lines.splitlines()]


def describe(device: torch.device) -> dict[str, object]:
    """Everything worth keeping next to a number."""
    found = {
        "device": platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
    }
    return found | (gpu(device) if device.type == "cuda" else {})


def gpu(device: torch.device) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": l2_bytes(device),
        "cuda": torch.version.cuda,
        "nvidia_smi": nvidia_smi(),
    }


def l2_bytes(device: torch.device) -> int:
    """Size of a GPU's second-level cache; 0 where there is none to speak of."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).L2_cache_size
