"""Installs torch into the running interpreter's environment, unless it is there and recent enough.

On Linux the default build of torch brings several GB of CUDA libraries. A machine without an NVIDIA GPU gets
a CPU-only build instead: from the package sources that pip is configured with, else from PyTorch's own index.
CPU-only builds carry the version label "+cpu", so listing versions finds them without a download.
"""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

MINIMUM = (2, 11)
REQUIREMENT = f"torch>={MINIMUM[0]}.{MINIMUM[1]}"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class Choice(NamedTuple):
    reason: str
    pip_arguments: list[str]  # empty: nothing to install


def is_recent(version):
    release = re.match(r"(\d+)\.(\d+)", version)
    return release is not None and tuple(map(int, release.groups())) >= MINIMUM


def newest_cpu_build(listing):
    """The first recent "+cpu" version that `pip index versions` lists (newest first), or None."""
    versions = re.search(r"Available versions:(.*)", listing)
    candidates = versions.group(1).replace(",", " ").split() if versions else []
    return next((v for v in candidates if v.endswith("+cpu") and is_recent(v)), None)


def choose(installed, has_gpu, platform, list_versions):
    """What to install and why; `list_versions(pip_arguments)` returns the output of `pip index versions`."""
    if installed and is_recent(installed):
        return Choice(f"torch {installed} is already installed", [])
    if has_gpu:
        return Choice("an NVIDIA GPU is present: torch's default build", [REQUIREMENT])
    if platform != "linux":
        return Choice("torch's default build, CPU-only on this platform", [REQUIREMENT])
    for source, arguments in (
        ("pip's configured sources", []),
        (CPU_INDEX, ["--extra-index-url", CPU_INDEX]),
    ):
        version = newest_cpu_build(list_versions(arguments))
        if version:
            reason = f"no NVIDIA GPU: the CPU-only build {version} from {source}"
            return Choice(reason, [f"torch=={version}", *arguments])
    reason = "no NVIDIA GPU, but no CPU-only build within reach: the default build, SEVERAL GB with its CUDA"
    return Choice(reason, [REQUIREMENT])


def installed_version():
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def has_nvidia_gpu():
    if Path("/proc/driver/nvidia/version").exists():
        return True
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


def list_versions(pip_arguments):
    # One quick attempt: an index that cannot be reached is an answer, not an error.
    command = [sys.executable, "-m", "pip", "index", "versions", "torch", "--retries=0", "--timeout=15"]
    return subprocess.run([*command, *pip_arguments], capture_output=True, text=True).stdout


def main():
    choice = choose(installed_version(), has_nvidia_gpu(), sys.platform, list_versions)
    print(f"torch: {choice.reason}", flush=True)
    if not choice.pip_arguments:
        return 0
    return subprocess.run([sys.executable, "-m", "pip", "install", *choice.pip_arguments]).returncode


if __name__ == "__main__":
    sys.exit(main())
