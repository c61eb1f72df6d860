"""What setup.py and the scripts in tools/ decide, without a compiler or a network."""

import ast
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import ctld_cuda

setuptools = pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).resolve().parents[1]
GPU_LISTING = "torch (2.15.0)\nAvailable versions: 2.15.0, 2.14.1, 2.11.0\n"
CPU_LISTING = "torch (2.15.0)\nAvailable versions: 2.15.0, 2.13.0+cpu, 2.13.0, 2.12.0+cpu\n"


def load(path):
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup_py(monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    return load(ROOT / "setup.py")


@pytest.fixture
def install_torch():
    return load(ROOT / "tools" / "install_torch.py")


@pytest.fixture
def check_tools():
    return load(ROOT / "tools" / "check_tools.py")


@pytest.fixture
def source_copy(tmp_path):
    """The sources as a fresh clone has them."""
    copy = tmp_path / "source"
    skip = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=skip)
    return copy


def run_setup(directory, *arguments, **environment):
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(
        command, cwd=directory, env={**os.environ, **environment}, capture_output=True, text=True
    )


def ninja_text(setup_py, machine, werror=False):
    return setup_py.ninja_text(
        csrc=Path("/with space/csrc"),
        cxx=["g++"],
        machine=machine,
        python_includes=["/include/pybind11"],
        output="_C.so",
        werror=werror,
    )


@pytest.mark.parametrize(
    ("machine", "instruction_sets"),
    [("x86_64", ["v1", "v3", "v4"]), ("aarch64", ["neon"]), ("riscv64", ["generic"])],
)
def test_one_tile_object_per_instruction_set(setup_py, machine, instruction_sets):
    text = ninja_text(setup_py, machine)
    tiles = [line.split(":")[0] for line in text.splitlines() if line.startswith("build cpu_tile")]
    assert tiles == [f"build cpu_tile.{name}.o" for name in instruction_sets]
    for name in instruction_sets:
        assert f"-DCTLD_ISA={name}\n" in text
    link = next(line for line in text.splitlines() if line.startswith("build _C.so"))
    assert link.split()[3:] == ["module.o", "cpu.o", *(f"cpu_tile.{name}.o" for name in instruction_sets)]


def test_flags_keep_the_arithmetic_exact_and_the_binary_portable(setup_py):
    text = ninja_text(setup_py, "x86_64")
    assert {"-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"} <= set(text.split())
    for forbidden in ("-ffast-math", "-Ofast", "-march=native", "-mtune=native", "-funsafe-math"):
        assert forbidden not in text


def test_warnings_are_errors_only_on_request(setup_py):
    assert "-Werror" not in ninja_text(setup_py, "x86_64")
    assert "-Werror" in ninja_text(setup_py, "x86_64", werror=True)


def test_paths_with_spaces_are_escaped(setup_py):
    text = ninja_text(setup_py, "x86_64")
    assert "compile /with$ space/csrc/module.cpp" in text
    assert "'-I/with space/csrc'" in text


def test_tile_objects_share_no_functions():
    """The linker keeps one copy of a function that several objects define, whatever its instruction set.

    An inline function compiled for a newer processor would then run on every processor, and crash there.
    """
    objects = sorted((ROOT / "build" / sysconfig.get_config_var("SOABI")).glob("cpu_tile.*.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("no object files of the C++ extension, or no nm to read them")
    for path in objects:
        listing = subprocess.run(
            ["nm", "--demangle", "--defined-only", path], capture_output=True, text=True, check=True
        )
        symbols = [line.split(maxsplit=2)[1:] for line in listing.stdout.splitlines()]
        assert [name for kind, name in symbols if kind in "WVu"] == [], path.name


@pytest.mark.parametrize("script", ["setup.py", "tools/check_tools.py"])
def test_the_build_does_not_import_torch(script):
    nodes = ast.walk(ast.parse((ROOT / script).read_text()))
    imports = [ast.unparse(node) for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert imports
    assert not [line for line in imports if "torch" in line]


def test_without_a_compiler_the_wheel_is_pure_python_and_says_so(source_copy):
    build = run_setup(source_copy, "bdist_wheel", CXX="no-such-compiler")
    assert build.returncode == 0, build.stderr
    assert "WITHOUT its C++ extension" in build.stderr
    assert "the C++ compiler no-such-compiler is missing: apt-get install g++" in build.stderr
    (wheel,) = (source_copy / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "ctld_cuda/__init__.py" in names
    assert not [name for name in names if name.endswith(".so")]


def test_without_a_compiler_no_stale_extension_is_left(source_copy):
    stale = source_copy / "ctld_cuda" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.touch()
    build = run_setup(source_copy, "build_ext", "--inplace", CXX="no-such-compiler")
    assert build.returncode == 0, build.stderr
    assert not stale.exists()


def test_source_distribution_is_complete(source_copy):
    build = run_setup(source_copy, "sdist")
    assert build.returncode == 0, build.stderr
    (archive,) = (source_copy / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    needed = ["setup.py", "pyproject.toml", "tools/check_tools.py"]
    for folder in ("csrc", "ctld_cuda"):
        paths = (source_copy / folder).rglob("*.*")
        needed += [path.relative_to(source_copy).as_posix() for path in paths]
    assert sorted(set(needed) - packed) == []


def test_version_is_the_same_everywhere():
    assert ctld_cuda.__version__ == importlib.metadata.version("ctld_cuda")


def test_missing_tools_are_named(check_tools, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(check_tools.sysconfig, "get_path", lambda _: "/nowhere")
    assert check_tools.build_problems() == [
        "the C++ compiler no-such-compiler is missing: apt-get install g++",
        "the Python headers are missing: apt-get install python3-dev",
    ]


def test_a_compiler_that_cannot_compile_is_reported(check_tools, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    assert check_tools.compiler_problem() == "false does not compile C++17 with OpenMP: apt-get install g++"


def choose(install_torch, installed=None, has_gpu=False, platform="linux", listings=("", "")):
    """`listings`: what pip lists from the configured sources, and with PyTorch's index added."""
    return install_torch.choose(installed, has_gpu, platform, lambda arguments: listings[bool(arguments)])


def test_torch_requirement_is_the_one_of_the_package(install_torch):
    assert f'"{install_torch.REQUIREMENT}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("installed", ["2.11.0", "2.13.0+cpu", "2.15.1+cu130", "3.0.0a0"])
def test_a_recent_torch_is_kept(install_torch, installed):
    assert choose(install_torch, installed=installed).pip_arguments == []


@pytest.mark.parametrize("installed", [None, "2.9.1", "1.13.0+cu117"])
def test_a_gpu_gets_the_default_build(install_torch, installed):
    choice = choose(install_torch, installed, has_gpu=True, listings=(CPU_LISTING, CPU_LISTING))
    assert choice.pip_arguments == ["torch>=2.11"]


def test_without_a_gpu_the_newest_cpu_build_is_taken(install_torch):
    choice = choose(install_torch, listings=(CPU_LISTING, CPU_LISTING))
    assert choice.pip_arguments == ["torch==2.13.0+cpu"]


def test_pytorchs_index_is_the_second_choice(install_torch):
    choice = choose(install_torch, listings=(GPU_LISTING, CPU_LISTING))
    assert choice.pip_arguments == ["torch==2.13.0+cpu", "--extra-index-url", install_torch.CPU_INDEX]


@pytest.mark.parametrize("listing", ["", GPU_LISTING, "Available versions: 2.10.0+cpu, 2.9.0+cpu"])
def test_the_large_default_build_is_the_last_resort(install_torch, listing):
    choice = choose(install_torch, listings=(listing, listing))
    assert choice.pip_arguments == ["torch>=2.11"]
    assert "SEVERAL GB" in choice.reason


def test_other_platforms_have_small_default_builds(install_torch):
    assert choose(install_torch, platform="darwin").pip_arguments == ["torch>=2.11"]
