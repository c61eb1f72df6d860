"""Names what this machine lacks to build ctld_cuda, and the Debian package that supplies it.

Runs under the system's interpreter, before anything is installed: standard library only.
"""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from cuda_toolkit import ToolkitError, cuda_mode, working_toolkit

PROGRAM = "#include <cstdio>\nint main() { return 0; }\n"
OPENMP_PROGRAM = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"


def compiler():
    """The C++ compiler's command line, as a list."""
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def python_problem():
    if sys.version_info < (3, 10):  # noqa: UP036  (too old a Python is what this looks for)
        return f"Python {sys.version.split()[0]} is too old, 3.10 is needed: apt-get install python3"
    return None


def venv_problem():
    # Debian ships the module venv without the ensurepip that it needs.
    try:
        importlib.import_module("venv")
        importlib.import_module("ensurepip")
    except ImportError as error:
        return f"Python's {error.name} is missing: apt-get install python3-venv"
    return None


def headers_problem():
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "the Python headers are missing: apt-get install python3-dev"
    return None


def compiler_problem():
    command = compiler()
    if shutil.which(command[0]) is None:
        return f"the C++ compiler {command[0]} is missing: apt-get install g++"
    if not compiles(PROGRAM):
        return f"{shlex.join(command)} does not compile C++17: apt-get install g++"
    return None


def openmp_problem():
    """What keeps the CPU backend from using several threads."""
    if compiles(OPENMP_PROGRAM, "-fopenmp"):
        return None
    advice = "CXX=g++-14 of Homebrew's gcc has it" if sys.platform == "darwin" else "apt-get install g++"
    return f"{shlex.join(compiler())} does not compile C++17 with OpenMP: {advice}"


def compiles(program, *flags):
    """Whether the C++ compiler makes an executable of a program."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "program.cpp")
        source.write_text(program)
        attempt = subprocess.run(
            [*compiler(), "-std=c++17", *flags, str(source), "-o", str(source.with_suffix(""))],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    return attempt.returncode == 0


def found(*problems):
    return [problem for problem in problems if problem]


def build_problems():
    """What keeps the C++ extension from being built."""
    return found(compiler_problem(), headers_problem())


def cuda_problem():
    """What keeps the CUDA part of the extension from being built."""
    try:
        working_toolkit(compiler())
    except ToolkitError as error:
        return str(error)
    return None


def main():
    mode = cuda_mode()
    problems = found(python_problem(), venv_problem(), *build_problems())
    notes = [] if problems else [f"the CPU backend will use one thread: {p}" for p in found(openmp_problem())]
    if not problems and mode != "0":
        missing = found(cuda_problem())
        if mode == "require":
            problems += missing
        else:
            notes += [f"the CUDA backend will be left out: {problem}" for problem in missing]
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
