"""Finds the CUDA toolkit, says what is wrong with it, and knows the flags that csrc/cuda.cu is compiled with.

Runs before anything is installed: standard library only.
"""

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

OLDEST_RELEASE = (12, 4)
ADVICE = "install the CUDA toolkit, {}.{} or newer".format(*OLDEST_RELEASE)

GPU_ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
PORTABLE_PTX = 90  # for what has no code of its own, besides the PTX of the newest architecture

# The device's part of what FLAGS in setup.py is for.
DEVICE_FLAGS = [
    *("-O3", "-std=c++17"),
    *("-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true"),
]

PROBE = """\
#include <cuda_runtime.h>
__global__ void probe() {}
int main() { probe<<<1, 1>>>(); return cudaGetLastError() != cudaSuccess; }
"""


class ToolkitError(Exception):
    """What keeps CUDA code from being built."""


class Toolkit(NamedTuple):
    nvcc: str
    code_flags: list  # the architectures
    link_flags: list  # the static CUDA runtime


def cuda_mode():
    """What CTLD_CUDA asks for: no CUDA (0), CUDA where it can be built (1), CUDA or nothing (require)."""
    mode = os.environ.get("CTLD_CUDA") or "1"
    if mode not in ("0", "1", "require"):
        raise SystemExit(f"error: CTLD_CUDA is {mode!r}, but can only be 0, 1 or require")
    return mode


def nvcc_candidates():
    named = os.environ.get("NVCC")
    if named:
        return [named]
    homes = filter(None, map(os.environ.get, ("CUDA_HOME", "CUDA_PATH")))
    return [*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]


def find_nvcc():
    return next(filter(None, map(shutil.which, nvcc_candidates())), None)


def listed(prefix, listing):
    return {int(number) for number in re.findall(rf"^{prefix}_(\d+)$", listing, re.MULTILINE)}


def architectures(code_listing):
    """Those of ours that `nvcc --list-gpu-code` lists."""
    available = listed("sm", code_listing)
    return [number for number in GPU_ARCHITECTURES if number in available]


def code_flags(code_listing, ptx_listing):
    """What to generate, given what `nvcc --list-gpu-code` and `nvcc --list-gpu-arch` print."""
    numbers = architectures(code_listing)
    with_ptx = listed("compute", ptx_listing) & {PORTABLE_PTX, max(numbers)}
    flags = []
    for number in numbers:
        code = f"sm_{number},compute_{number}" if number in with_ptx else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code=[{code}]"]
    return flags


def link_flags(dry_run):
    """The static CUDA runtime, from where `nvcc --dryrun` says its libraries are.

    It looks for the driver only when it is called: what is linked to it can be loaded without one.
    """
    lines = re.findall(r"^#\$ LIBRARIES=(.*)$", dry_run, re.MULTILINE)
    return [*shlex.split(" ".join(lines)), "-lcudart_static", "-lpthread", "-ldl", "-lrt"]


def host_compiler_flags(cxx):
    """Makes nvcc use the C++ compiler with the command line `cxx`."""
    launched = Path(cxx[0]).name in ("ccache", "sccache", "distcc")
    path, *flags = cxx[1:] if launched else cxx
    return ["-ccbin", path, *(f"-Xcompiler={flag}" for flag in flags)]


def complaint(output):
    """The line of a compiler's output that says most."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"error|fatal|cannot|not found", line, re.IGNORECASE)]
    return next(iter(errors or lines), "it does not say why")


def output_of(*command):
    """What the command prints, on either stream."""
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode != 0:
        raise ToolkitError(f"{shlex.join(command)} fails: {complaint(run.stdout)}")
    return run.stdout


def check_release(version_text):
    """Raises unless `nvcc --version` printed a release that is recent enough."""
    match = re.search(r"release (\d+)\.(\d+)", version_text)
    if match is None or tuple(map(int, match.groups())) < OLDEST_RELEASE:
        found = match[0] if match else "unknown release"
        raise ToolkitError(f"nvcc is too old ({found}): {ADVICE}")


def check_compiles(toolkit, cxx):
    """Raises unless a kernel compiles and links."""
    with tempfile.TemporaryDirectory() as directory:
        source, obj, program = (str(Path(directory, name)) for name in ("probe.cu", "probe.o", "probe"))
        Path(source).write_text(PROBE)
        output_of(toolkit.nvcc, "-std=c++17", *host_compiler_flags(cxx), "-c", source, "-o", obj)
        output_of(*cxx, obj, *toolkit.link_flags, "-o", program)


def working_toolkit(cxx):
    """The CUDA toolkit to build with; raises ToolkitError if there is none that works with `cxx`."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise ToolkitError(f"{os.environ.get('NVCC') or 'nvcc'} is missing: {ADVICE}")
    check_release(output_of(nvcc, "--version"))
    toolkit = Toolkit(
        nvcc=nvcc,
        code_flags=code_flags(output_of(nvcc, "--list-gpu-code"), output_of(nvcc, "--list-gpu-arch")),
        link_flags=link_flags(output_of(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull)),
    )
    check_compiles(toolkit, cxx)
    return toolkit
