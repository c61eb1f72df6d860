"""C++ checks outside the installed extension: other processors, and the rules csrc/core lives by."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
NATIVE = ROOT / "tests" / "native"
FLAGS = ["-O2", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", f"-I{CSRC}"]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]


def program(name):
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def tile_parity(compiler, isa, directory, flags=(), link_flags=()):
    """Builds tests/native/tile_parity.cpp for one instruction set."""
    tile, main, binary = directory / "tile.o", directory / "main.o", directory / "parity"
    compile_ = [compiler, *FLAGS, *flags, "-c"]
    subprocess.run([*compile_, f"-DCTLD_ISA={isa}", CSRC / "cpu_tile.cpp", "-o", tile], check=True)
    subprocess.run([*compile_, f"-DTESTED={isa}", NATIVE / "tile_parity.cpp", "-o", main], check=True)
    subprocess.run([compiler, *link_flags, tile, main, "-o", binary], check=True)
    return binary


def check(command):
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_tiles_of_aarch64_under_emulation(tmp_path):
    compiler, emulator = program("aarch64-linux-gnu-g++"), program("qemu-aarch64-static")
    check([emulator, tile_parity(compiler, "neon", tmp_path, WARNINGS, ["-static"])])


@pytest.mark.long
def test_tiles_under_the_address_and_undefined_behaviour_sanitizers(tmp_path):
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
    check([tile_parity(program("g++"), "plain", tmp_path, sanitize, sanitize)])


def test_core_knows_nothing_of_torch_or_python():
    bindings = (
        "module.cpp",
        "bindings.h",
        "bind_cpu.cpp",
        "bind_cuda.cpp",
        "bind_look.cpp",
        "dlpack_exchange.h",
    )
    for header in [path for path in CSRC.rglob("*.*") if path.name not in bindings]:
        includes = re.findall(r'#include [<"]([^>"]+)[>"]', header.read_text())
        assert not [name for name in includes if re.search("torch|aten|c10|pybind|python", name, re.I)], (
            header
        )


def test_core_includes_only_itself_and_the_standard_library():
    for header in CSRC.glob("core/*.h"):
        for name in re.findall(r'#include "([^"]+)"', header.read_text()):
            assert (CSRC / "core" / name).exists(), f"{header.name} includes {name}"
