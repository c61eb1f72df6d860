"""The CUDA kernels on the host under the sanitizers, which must find faults that are planted in them.

Continuous integration runs these with --long.
"""

import os
import shutil
import subprocess

import pytest
from simulated import COMPILE, ROOT, SIMT

ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREAD = ["-fsanitize=thread"]

# (what to break, file, what is there, what to put there instead, sanitizer, what it must say)
FAULTS = {
    "missing barrier": (
        "cuda_kernels.h",
        "    __syncthreads();\n    if (!block.more) break;",
        "    if (!block.more) break;",
        THREAD,
        "data race",
    ),
    "missing fence": (
        "cuda_alpha.h",
        "    __threadfence();\n    shared = atomicAdd",
        "    shared = atomicAdd",
        THREAD,
        "data race",
    ),
    "write by every block": (
        "cuda_kernels.h",
        "  if (!is_last_block(a, block.is_last)) return;\n  const bool knows_all",
        "  if (thread() == 0) a.state.kinetic[0] += 1;\n"
        "  if (!is_last_block(a, block.is_last)) return;\n  const bool knows_all",
        THREAD,
        "data race",
    ),
    "overrun": (
        "cuda_task.h",
        "full_end = task.end / unit * unit;",
        "full_end = (task.end + unit - 1) / unit * unit;",
        ADDRESS,
        "heap-buffer-overflow",
    ),
    "misaligned access": (
        "cuda_task.h",
        "return (reinterpret_cast<uintptr_t>(x) & 15) == 0;",
        "return (reinterpret_cast<uintptr_t>(x) & 3) == 0;",
        ADDRESS,
        "misaligned address",
    ),
}


def build(directory, sanitizer, csrc=ROOT / "csrc", flags=()):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    program = directory / "check"
    sources = [SIMT / "check.cpp", csrc / "cuda_plan.cpp"]
    command = [*COMPILE, "-O1", "-g", *sanitizer, *flags, f"-I{csrc}", *sources, "-o", program]
    subprocess.run(command, check=True)
    return program


def run(program, *arguments):
    # without address randomisation: some kernels place memory where the thread sanitizer does not expect it
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    # a race may end in a deadlock: stop at the first one. Wide margins around memory: an overrun shall not
    # reach a buffer behind it, which may have been freed, and be called a use of that
    options = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "redzone=1024"}
    environment = {**os.environ, **options}
    command = [*fixed, program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.long
def test_addresses_and_undefined_behaviour(tmp_path):
    status, output = run(build(tmp_path, ADDRESS))
    assert status == 0, output


@pytest.mark.long
def test_races(tmp_path):
    status, output = run(build(tmp_path, THREAD), "races")
    assert status == 0, output


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(tmp_path, fault):
    name, there, instead, sanitizer, message = FAULTS[fault]
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    text = (csrc / name).read_text()
    assert text.count(there) == 1
    (csrc / name).write_text(text.replace(there, instead))
    status, output = run(build(tmp_path, sanitizer, csrc, ["-DSIMT_ONE_KERNEL"]))
    assert status != 0
    assert message in output
