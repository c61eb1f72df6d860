"""What setup.py and the scripts in tools/ decide, without a compiler or a network."""

import ast
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shlex
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


@pytest.fixture(autouse=True)
def tools_are_importable(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")


@pytest.fixture
def setup_py(monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return load(ROOT / "setup.py")


@pytest.fixture
def install_torch():
    return load(ROOT / "tools" / "install_torch.py")


@pytest.fixture
def check_tools():
    return load(ROOT / "tools" / "check_tools.py")


@pytest.fixture
def check_package():
    return load(ROOT / "tools" / "check_package.py")


@pytest.fixture
def cuda_toolkit():
    return importlib.import_module("cuda_toolkit")


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
        command,
        cwd=directory,
        env={**os.environ, "CTLD_CUDA": "1", **environment},
        capture_output=True,
        text=True,
    )


def ninja_text(setup_py, machine="x86_64", werror=False, cuda=None, cxx=("g++",), **options):
    return setup_py.ninja_text(
        csrc=Path("/with space/csrc"),
        cxx=list(cxx),
        machine=machine,
        python_includes=["/include/pybind11"],
        output="_C.so",
        werror=werror,
        cuda=cuda,
        **options,
    )


@pytest.mark.parametrize(
    ("machine", "instruction_sets"),
    [
        ("x86_64", ["v1", "v3", "v4"]),
        ("aarch64", ["neon"]),
        ("arm64", ["neon"]),
        ("riscv64", ["generic"]),
    ],
)
def test_one_tile_object_per_instruction_set(setup_py, machine, instruction_sets):
    text = ninja_text(setup_py, machine)
    tiles = [line.split(":")[0] for line in text.splitlines() if line.startswith("build cpu_tile")]
    assert tiles == [f"build cpu_tile.{name}.o" for name in instruction_sets]
    for name in instruction_sets:
        assert f"-DCTLD_ISA={name}\n" in text
    link = next(line for line in text.splitlines() if line.startswith("build _C.so"))
    tile_objects = [f"cpu_tile.{name}.o" for name in instruction_sets]
    assert link.split()[3:] == ["module.o", "bind_cpu.o", "bind_look.o", "cpu.o", *tile_objects]


def test_flags_keep_the_arithmetic_exact_and_the_binary_portable(setup_py):
    text = ninja_text(setup_py)
    assert {"-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"} <= set(text.split())
    for forbidden in ("-ffast-math", "-Ofast", "-march=native", "-mtune=native", "-funsafe-math"):
        assert forbidden not in text


def test_without_openmp_one_thread_and_no_warnings(setup_py):
    assert "-fopenmp" in ninja_text(setup_py)
    text = ninja_text(setup_py, openmp=False)
    assert "-fopenmp" not in text
    assert "-Wno-unknown-pragmas" in text


def test_macos_looks_symbols_up_when_loading(setup_py):
    assert "link_flags = -bundle -undefined dynamic_lookup\n" in ninja_text(
        setup_py, "arm64", openmp=False, system="darwin"
    )


@pytest.mark.parametrize(
    ("plat_name", "expected"),
    [("linux-x86_64", "x86_64"), ("macosx-11.0-arm64", "arm64"), ("macosx-10.13-universal2", "native")],
)
def test_the_processor_to_compile_for(setup_py, monkeypatch, plat_name, expected):
    monkeypatch.setattr(setup_py.platform, "machine", lambda: "native")
    assert setup_py.machine_of(plat_name) == expected


def test_a_compiler_without_openmp_is_used_loudly(setup_py, monkeypatch, capsys):
    monkeypatch.setattr(setup_py, "openmp_problem", lambda: "clang++ has no OpenMP")
    assert not setup_py.usable_openmp()
    message = capsys.readouterr().err
    assert "WITHOUT several threads on the CPU" in message
    assert "clang++ has no OpenMP" in message


def test_warnings_are_errors_only_on_request(setup_py):
    assert "-Werror" not in ninja_text(setup_py)
    assert "-Werror" in ninja_text(setup_py, werror=True)


def test_paths_with_spaces_are_escaped(setup_py):
    text = ninja_text(setup_py)
    assert "compile /with$ space/csrc/module.cpp" in text
    assert "'-I/with space/csrc'" in text


def toolkit(cuda_toolkit):
    return cuda_toolkit.Toolkit(
        nvcc="/with space/nvcc",
        code_flags=["-gencode", "arch=compute_90,code=[sm_90,compute_90]"],
        link_flags=["-L/with space/lib", "-lcudart_static"],
    )


def test_without_a_toolkit_nothing_is_of_cuda(setup_py):
    text = ninja_text(setup_py)
    assert not re.search("nvcc|cuda", text, re.IGNORECASE)


def test_with_a_toolkit_the_cuda_part_is_compiled_and_linked(setup_py, cuda_toolkit):
    lines = ninja_text(setup_py, cuda=toolkit(cuda_toolkit)).splitlines()
    assert "nvcc = '/with space/nvcc'" in lines
    assert "link_flags = -shared -s -fopenmp '-L/with space/lib' -lcudart_static" in lines
    assert "build cuda.o: compile_cuda /with$ space/csrc/cuda.cu" in lines
    assert {"bind_cuda.o", "cuda_plan.o", "cuda.o"} <= set(lines[-1].split())
    bindings_flags = lines[lines.index("build module.o: compile /with$ space/csrc/module.cpp") + 1]
    assert "-DCTLD_WITH_CUDA" in bindings_flags


def cuda_flags(setup_py, cuda_toolkit, **options):
    text = ninja_text(setup_py, cuda=toolkit(cuda_toolkit), **options)
    return shlex.split(next(line for line in text.splitlines() if line.startswith("cuda_flags = ")))[2:]


def test_cuda_flags_keep_the_arithmetic_exact(setup_py, cuda_toolkit):
    flags = cuda_flags(setup_py, cuda_toolkit)
    assert {"-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true"} <= set(flags)
    for host_flag in ("-ffp-contract=off", "-fPIC", "-fvisibility=hidden"):
        assert f"-Xcompiler={host_flag}" in flags
    assert not [flag for flag in flags if "fast" in flag or "native" in flag]


def test_cuda_warnings_are_errors_only_on_request(setup_py, cuda_toolkit):
    assert "-Werror" not in cuda_flags(setup_py, cuda_toolkit)
    assert "-Werror all-warnings" in " ".join(cuda_flags(setup_py, cuda_toolkit, werror=True))


@pytest.mark.parametrize(
    ("cxx", "expected"),
    [
        (["g++"], ["-ccbin", "g++"]),
        (["ccache", "g++-13", "-m64"], ["-ccbin", "g++-13", "-Xcompiler=-m64"]),
        (["/usr/bin/clang++"], ["-ccbin", "/usr/bin/clang++"]),
    ],
)
def test_nvcc_uses_the_same_host_compiler(cuda_toolkit, cxx, expected):
    assert cuda_toolkit.host_compiler_flags(cxx) == expected


def listing(prefix, *names):
    return "".join(f"{prefix}_{name}\n" for name in names)


def generated(flags):
    """{"sm_90", "compute_90", …} from -gencode flags."""
    assert set(flags[::2]) == {"-gencode"}
    return {kind for flag in flags[1::2] for kind in re.search(r"code=\[(.+)\]", flag)[1].split(",")}


CUDA_12_4 = (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90, "90a")
CUDA_13_0 = (75, 80, 86, 87, 88, 89, 90, 100, 110, 103, 120, 121)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (CUDA_12_4, {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "compute_90"}),
        (
            CUDA_13_0,
            {
                *("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"),
                *("compute_90", "compute_120"),
            },
        ),
        ((90, 100, 103), {"sm_90", "sm_100", "compute_90", "compute_100"}),
        ((100, 120), {"sm_100", "sm_120", "compute_120"}),
    ],
)
def test_architectures_are_those_that_the_toolkit_lists(cuda_toolkit, names, expected):
    flags = cuda_toolkit.code_flags(listing("sm", *names), listing("compute", *names))
    assert generated(flags) == expected


def test_the_runtime_is_linked_statically_from_where_nvcc_finds_it(cuda_toolkit):
    dry_run = '#$ TOP=/cuda/bin/..\n#$ LIBRARIES=  "-L/cu da/lib/stubs" "-L/cu da/lib"\n#$ gcc -c x.c\n'
    flags = cuda_toolkit.link_flags(dry_run)
    assert flags[:3] == ["-L/cu da/lib/stubs", "-L/cu da/lib", "-lcudart_static"]
    assert "-lcuda" not in flags


def fake_nvcc(directory, script="exit 1"):
    path = directory / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_nvcc_is_looked_for_in_order(cuda_toolkit, monkeypatch, tmp_path):
    places = {name: fake_nvcc(tmp_path / name) for name in ("NVCC", "CUDA_HOME", "CUDA_PATH", "PATH")}
    monkeypatch.setenv("NVCC", str(places["NVCC"]))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "CUDA_HOME"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "CUDA_PATH"))
    monkeypatch.setenv("PATH", str(places["PATH"].parent))
    for name, path in places.items():
        assert cuda_toolkit.find_nvcc() == str(path)
        monkeypatch.delenv(name)
    assert cuda_toolkit.nvcc_candidates() == ["nvcc", "/usr/local/cuda/bin/nvcc"]


def test_an_nvcc_that_was_named_is_not_replaced_by_another(cuda_toolkit, monkeypatch):
    monkeypatch.setenv("NVCC", "no-such-nvcc")
    message = r"no-such-nvcc is missing: install .* 12\.4 or newer"
    with pytest.raises(cuda_toolkit.ToolkitError, match=message):
        cuda_toolkit.working_toolkit(["g++"])


@pytest.mark.parametrize("text", ["Cuda compilation tools, release 11.8, V11.8.89", "release 12.3", ""])
def test_old_toolkits_are_refused(cuda_toolkit, text):
    with pytest.raises(cuda_toolkit.ToolkitError, match="too old"):
        cuda_toolkit.check_release(text)


@pytest.mark.parametrize("text", ["release 12.4, V12.4.131", "release 12.10", "release 13.0, V13.0.88"])
def test_recent_toolkits_are_accepted(cuda_toolkit, text):
    cuda_toolkit.check_release(text)


def test_a_toolkit_that_cannot_compile_says_why(cuda_toolkit, monkeypatch, tmp_path):
    script = 'case "$*" in\n--version) echo release 13.0;; --list-gpu-*) echo sm_90;; *-c\\ *probe.cu*)'
    script += ' echo warning: x; echo "#error unsupported GNU version!"; exit 1;; esac'
    monkeypatch.setenv("NVCC", str(fake_nvcc(tmp_path, script)))
    with pytest.raises(cuda_toolkit.ToolkitError, match="#error unsupported GNU version!"):
        cuda_toolkit.working_toolkit(["g++"])


@pytest.fixture
def broken_toolkit(setup_py, cuda_toolkit, monkeypatch):
    def fail(cxx):
        raise cuda_toolkit.ToolkitError("nvcc is broken")

    monkeypatch.setattr(cuda_toolkit, "working_toolkit", fail)
    monkeypatch.setattr(cuda_toolkit, "find_nvcc", lambda: "/nvcc")


def test_cuda_can_be_left_out(setup_py, broken_toolkit, capsys):
    assert setup_py.usable_cuda("0") is None
    assert capsys.readouterr().err == ""


def test_a_broken_toolkit_is_left_out_loudly(setup_py, broken_toolkit, capsys):
    assert setup_py.usable_cuda("1") is None
    message = capsys.readouterr().err
    assert "WITHOUT its CUDA backend" in message
    assert "nvcc is broken" in message


def test_a_required_toolkit_must_work(setup_py, broken_toolkit):
    with pytest.raises(setuptools.errors.PlatformError, match="CTLD_CUDA=require, but nvcc is broken"):
        setup_py.usable_cuda("require")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CTLD_CUDA": "require", "NVCC": "no-such-nvcc"}, "CTLD_CUDA=require, but no-such-nvcc is missing"),
        ({"CTLD_CUDA": "require", "CXX": "no-such-compiler"}, "CTLD_CUDA=require, but the C++ compiler"),
        ({"CTLD_CUDA": "yes"}, "CTLD_CUDA is 'yes', but can only be 0, 1 or require"),
    ],
)
def test_the_install_fails_without_the_cuda_that_was_asked_for(source_copy, environment, message):
    build = run_setup(source_copy, "build_ext", "--inplace", **environment)
    assert build.returncode == 1
    assert f"error: {message}" in build.stderr
    assert "Traceback" not in build.stderr


def test_the_extension_loads_without_a_driver():
    """It must not name the driver, nor a CUDA runtime of its own choice of version."""
    library = ROOT / "ctld_cuda" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists() or shutil.which("readelf") is None:
        pytest.skip("no C++ extension, or no readelf to read it")
    listing = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", listing)
    assert needed
    assert not [name for name in needed if "cuda" in name]


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


@pytest.mark.parametrize("script", ["setup.py", "tools/check_tools.py", "tools/cuda_toolkit.py"])
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
    needed = ["setup.py", "pyproject.toml", "tools/check_tools.py", "tools/cuda_toolkit.py"]
    for folder in ("csrc", "ctld_cuda"):
        paths = (source_copy / folder).rglob("*.*")
        needed += [path.relative_to(source_copy).as_posix() for path in paths]
    assert sorted(set(needed) - packed) == []


def test_the_check_of_the_package_finds_faults(check_package):
    needs, forbids = [r"a\.py", r"_C\.[^/]*\.so"], [r".*\.o", r"tests/.*"]
    assert check_package.complaints(["a.py", "_C.x.so"], needs, forbids) == []
    assert check_package.complaints(["a.pyc", "b/c.o", "tests/a.py"], needs, forbids) == [
        *(r"a\.py is missing", r"_C\.[^/]*\.so is missing"),
        *("b/c.o does not belong there", "tests/a.py does not belong there"),
    ]


@pytest.mark.parametrize(
    ("machine", "instruction_sets", "right"),
    [
        ("x86_64", ["v4", "v3", "v1"], True),
        ("x86_64", ["v4"], False),
        ("arm64", ["neon"], True),
        ("riscv64", ["generic"], True),
        ("x86_64", [], False),
    ],
)
def test_an_extension_must_serve_every_processor(check_package, machine, instruction_sets, right):
    found = check_package.check_extension({"instruction_sets": instruction_sets}, machine)
    assert (found == []) == right


def test_version_is_the_same_everywhere():
    assert ctld_cuda.__version__ == importlib.metadata.version("ctld_cuda")


def test_missing_tools_are_named(check_tools, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(check_tools.sysconfig, "get_path", lambda _: "/nowhere")
    assert check_tools.build_problems() == [
        "the C++ compiler no-such-compiler is missing: apt-get install g++",
        "the Python headers are missing: apt-get install python3-dev",
    ]


@pytest.mark.parametrize(("mode", "code", "word"), [("0", 0, ""), ("1", 0, "note"), ("require", 1, "error")])
def test_only_who_requires_cuda_is_stopped(check_tools, monkeypatch, capsys, mode, code, word):
    for problem in (
        "python_problem",
        "venv_problem",
        "compiler_problem",
        "headers_problem",
        "openmp_problem",
    ):
        monkeypatch.setattr(check_tools, problem, lambda: None)
    monkeypatch.setenv("CTLD_CUDA", mode)
    monkeypatch.setenv("NVCC", "no-such-nvcc")
    assert check_tools.main() == code
    output = capsys.readouterr().err
    assert output.partition(":")[0] == word
    assert ("no-such-nvcc is missing" in output) == (mode != "0")


def test_a_compiler_that_cannot_compile_is_reported(check_tools, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    assert check_tools.compiler_problem() == "false does not compile C++17: apt-get install g++"
    assert check_tools.openmp_problem() == "false does not compile C++17 with OpenMP: apt-get install g++"


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
