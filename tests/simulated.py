"""The CUDA backend without a GPU: the kernels' own source, run on the host by the shim in tests/simt."""

import functools
import importlib.util
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import pytest

from ctld_cuda.backends.cuda import CudaBackend

ROOT = Path(__file__).resolve().parents[1]
SIMT = ROOT / "tests" / "simt"
COMPILE = [
    *("g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-pthread"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing", f"-I{SIMT}"),
]


def includes(csrc=ROOT / "csrc"):
    import pybind11

    python = [pybind11.get_include(), sysconfig.get_path("include")]
    return [f"-I{csrc}", *(f"-isystem{path}" for path in python)]


@functools.cache
def build():
    """The module ``simulated``, compiled anew for every session; skips where it cannot be."""
    pytest.importorskip("pybind11")
    if shutil.which("g++") is None:
        pytest.skip("simulated CUDA backend: g++ is not installed")
    directory = Path(tempfile.mkdtemp(prefix="ctld_simulated_"))
    library = directory / "simulated.so"
    csrc = ROOT / "csrc"
    sources = [SIMT / "module.cpp", csrc / "bind_cuda.cpp", csrc / "cuda_plan.cpp"]
    objects = [directory / f"{source.stem}.o" for source in sources]
    # the kernels' optimisation is what takes the time, and they wait for each other most of theirs
    jobs = [
        subprocess.Popen([*COMPILE, "-O1", "-fPIC", *includes(), "-c", source, "-o", target])
        for source, target in zip(sources, objects, strict=True)
    ]
    assert all(job.wait() == 0 for job in jobs)
    subprocess.run([*COMPILE, "-shared", *objects, "-o", library], check=True)
    spec = importlib.util.spec_from_file_location("simulated", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shutil.rmtree(directory)
    return module


def backend(blocks=8, resident_blocks=2):
    """A backend class to put in the place of "cpu": parameters on the CPU, kernels in the shim.

    Args:
        blocks: that share the work.
        resident_blocks: blocks that run at the same time.
    """
    simulated = build()
    simulated.set_resident_blocks(resident_blocks)

    class SimulatedBackend(CudaBackend):
        extension = simulated

        @classmethod
        def info(cls):
            return {"usable": True, "reason": "", "instruction_sets": []}

        def _resident_blocks(self):
            return blocks

        def _queue(self):
            return 0, 0

    return SimulatedBackend


def install(monkeypatch, **options):
    """From here on ``backend="cpu"`` means the simulated GPU, whose device memory is the host's."""
    from ctld_cuda import backends

    monkeypatch.setitem(backends._BACKENDS, "cpu", backend(**options))
