"""Builds the extension module `ctld_cuda._C` with ninja; everything declarative is in pyproject.toml.

It does not import torch: the extension neither includes nor links it, so one build serves every torch
version and the isolated build environment stays small.

CTLD_CUDA=0 leaves the CUDA part out, CTLD_CUDA=require fails where it cannot be built; by default it is
built where nvcc works.
"""

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

# tools/ is not importable before the line above
import cuda_toolkit  # noqa: E402
from check_tools import build_problems, compiler, openmp_problem  # noqa: E402

# Every backend must produce the same bits: no fused multiply-add, nothing that reorders arithmetic, and
# nothing that depends on the machine that compiles.
HOST_FLAGS = [
    *("-fPIC", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra"),
]
FLAGS = ["-O3", "-std=c++17", *HOST_FLAGS]

# cpu_tile.cpp is compiled once per instruction set; which one runs is decided at run time.
INSTRUCTION_SETS = {
    "x86_64": {
        "v1": ["-march=x86-64"],
        "v3": ["-march=x86-64-v3"],
        "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    },
    "aarch64": {"neon": []},
}
OTHER_NAMES = {"arm64": "aarch64", "amd64": "x86_64"}

# without OpenMP the pragmas mean nothing, and what only they mention seems unused
WITHOUT_OPENMP = ["-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-unused-function"]

# Python's own symbols are found when the module is loaded, which only macOS' linker wants to be told.
LINK_FLAGS = {"linux": ["-shared", "-s"], "darwin": ["-bundle", "-undefined", "dynamic_lookup"]}

RULES = """\
rule compile
  command = $cxx $flags $extra_flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out
rule link
  command = $cxx $in $link_flags -o $out
  description = link $out
"""

CUDA_RULE = """\
rule compile_cuda
  command = $nvcc $cuda_flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out
"""


def ninja_path(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_flags(flags):
    return shlex.join(flags).replace("$", "$$")


def compile_step(obj, source, extra_flags=()):
    return f"build {obj}: compile {ninja_path(source)}\n  extra_flags = {ninja_flags(extra_flags)}\n"


def cuda_step(obj, source, *, cuda, cxx, werror):
    """Compiles one source with nvcc, for all architectures of the toolkit `cuda`."""
    flags = [
        *cuda_toolkit.DEVICE_FLAGS,
        *cuda.code_flags,
        *("--threads", "4", "-Xfatbin=-compress-all", f"-I{source.parent}"),
        *cuda_toolkit.host_compiler_flags(cxx),
        *(f"-Xcompiler={flag}" for flag in [*HOST_FLAGS, "-Wno-unknown-pragmas"]),
        *(["-Werror", "all-warnings"] if werror else []),
    ]
    variables = f"nvcc = {ninja_flags([cuda.nvcc])}\ncuda_flags = {ninja_flags(flags)}\n"
    return f"{variables}{CUDA_RULE}build {obj}: compile_cuda {ninja_path(source)}\n"


def ninja_text(*, csrc, cxx, machine, python_includes, output, werror, cuda, openmp=True, system="linux"):
    """The build.ninja that compiles the sources in `csrc` and links them into `output`.

    `cuda` is the toolkit for the CUDA part, or None to leave that out. Without `openmp` the CPU part uses one
    thread.
    """
    parallel = ["-fopenmp"] if openmp else []
    flags = [*FLAGS, *(parallel or WITHOUT_OPENMP), f"-I{csrc}", *(["-Werror"] if werror else [])]
    link_flags = [*LINK_FLAGS.get(system, LINK_FLAGS["linux"]), *parallel, *(cuda.link_flags if cuda else [])]
    # Only the bindings see Python: the other objects survive a change of the (temporary) build environment.
    # As system headers, because their warnings are not ours to fix.
    bindings_flags = [f"-isystem{path}" for path in python_includes]
    module_flags = [*bindings_flags, *(["-DCTLD_WITH_CUDA"] if cuda else [])]
    steps = {
        "module.o": compile_step("module.o", csrc / "module.cpp", module_flags),
        "bind_cpu.o": compile_step("bind_cpu.o", csrc / "bind_cpu.cpp", bindings_flags),
        "bind_look.o": compile_step("bind_look.o", csrc / "bind_look.cpp", bindings_flags),
        "cpu.o": compile_step("cpu.o", csrc / "cpu.cpp"),
    }
    for isa, isa_flags in INSTRUCTION_SETS.get(OTHER_NAMES.get(machine, machine), {"generic": []}).items():
        obj = f"cpu_tile.{isa}.o"
        steps[obj] = compile_step(obj, csrc / "cpu_tile.cpp", [*isa_flags, f"-DCTLD_ISA={isa}"])
    if cuda:
        steps["bind_cuda.o"] = compile_step("bind_cuda.o", csrc / "bind_cuda.cpp", bindings_flags)
        steps["cuda_plan.o"] = compile_step("cuda_plan.o", csrc / "cuda_plan.cpp")
        steps["cuda.o"] = cuda_step("cuda.o", csrc / "cuda.cu", cuda=cuda, cxx=cxx, werror=werror)
    return "".join(
        [
            f"cxx = {ninja_flags(cxx)}\n",
            f"flags = {ninja_flags(flags)}\n",
            f"link_flags = {ninja_flags(link_flags)}\n",
            RULES,
            *steps.values(),
            f"build {output}: link {' '.join(steps)}\n",
        ]
    )


def notice(left_out, problems):
    frame = "=" * 100
    reasons = "\n".join(f"  - {problem}" for problem in problems)
    return (
        f"\n{frame}\n"
        f"WARNING: installing ctld_cuda WITHOUT {left_out}, because:\n"
        f"{reasons}\n"
        "Install what is missing, then install ctld_cuda again.\n"
        f"{frame}\n"
    )


def say(text):
    print(text, file=sys.stderr, flush=True)


def usable_cuda(mode):
    """The CUDA toolkit to build with, or None; raises if CTLD_CUDA is "require" and there is none."""
    if mode == "0":
        return None
    try:
        return cuda_toolkit.working_toolkit(compiler())
    except cuda_toolkit.ToolkitError as error:
        if mode == "require":
            raise PlatformError(f"CTLD_CUDA=require, but {error}") from error
        if cuda_toolkit.find_nvcc():
            say(notice("its CUDA backend", [error]))
        else:
            say(f"The CUDA backend is left out: {error}")
        return None


def usable_openmp():
    problem = openmp_problem()
    if problem:
        say(notice("several threads on the CPU (the C++ step will use one)", [problem]))
    return not problem


def machine_of(plat_name):
    """The processor to compile for; where Python itself serves several, the one this runs on."""
    machine = plat_name.rpartition("-")[2]
    return platform.machine() if machine.startswith("universal") else machine


class NinjaBuild(build_ext):
    def run(self):
        mode = cuda_toolkit.cuda_mode()
        problems = build_problems()
        if problems and mode == "require":
            raise PlatformError(f"CTLD_CUDA=require, but {problems[0]}")
        if problems:
            say(notice("its C++ extension (it will work, but slowly)", problems))
            self.discard_extensions()
        else:
            self.cuda = usable_cuda(mode)
            self.openmp = usable_openmp()
        super().run()

    def discard_extensions(self):
        """Nothing to build, and nothing left over from an earlier build with other sources."""
        for extension in self.extensions:
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        self.extensions = []

    def build_extension(self, extension):
        import ninja
        import pybind11

        # Not self.build_temp: an editable install makes that a fresh temporary directory each time, and
        # every build would start from nothing.
        build_dir = ROOT / "build" / sysconfig.get_config_var("SOABI")
        build_dir.mkdir(parents=True, exist_ok=True)
        library = build_dir / "_C.so"
        text = ninja_text(
            csrc=ROOT / "csrc",
            cxx=compiler(),
            machine=machine_of(self.plat_name),
            python_includes=[pybind11.get_include(), sysconfig.get_path("include")],
            output=library.name,
            werror=os.environ.get("CTLD_WERROR") == "1",
            cuda=self.cuda,
            openmp=self.openmp,
            system=sys.platform,
        )
        (build_dir / "build.ninja").write_text(text)
        if subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", build_dir]).returncode != 0:
            raise CompileError("the extension of ctld_cuda does not compile (see ninja's output above)")

        destination = Path(self.get_ext_fullpath(extension.name))
        destination.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(library), str(destination))


setup(
    ext_modules=[Extension("ctld_cuda._C", sources=[])],  # the sources are named in ninja_text
    cmdclass={"build_ext": NinjaBuild},
)
