"""Builds what is published and checks it: the source distribution, and the wheel that pip makes of it.

    python tools/check_package.py
    python tools/check_package.py --output DIR  # keeps the two files

The wheel is built as a user's pip does it: under build isolation, from the source distribution, by an
interpreter that has neither torch nor anything else. Its extension module is then imported there. Needs the
package "build" and the package index. Without CTLD_CUDA in the environment the CUDA part is left out.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# patterns of which every one must match a file, and of which none may
SDIST_NEEDS = [
    *(r"LICENSE", r"README\.md", r"PKG-INFO", r"pyproject\.toml", r"setup\.py", r"Makefile", r"mkdocs\.yml"),
    *(r"csrc/core/philox\.h", r"csrc/cpu_tile\.cpp", r"csrc/cuda\.cu", r"csrc/simd\.h"),
    *(r"ctld_cuda/py\.typed", r"ctld_cuda/_C\.pyi", r"ctld_cuda/backends/cpu\.py"),
    *(r"tests/conftest\.py", r"tests/native/tile_parity\.cpp", r"tests/simt/simt\.h", r"docs/method\.md"),
    *(r"tools/check_tools\.py", r"tools/cuda_toolkit\.py", r"examples/mixture\.py", r"bench/step\.py"),
]
SDIST_FORBIDS = [r".*\.(so|o|pyc|pyd|npz|safetensors)", r"(build|dist|runs|\.venv|\.git)/.*"]
WHEEL_NEEDS = [
    *(
        r"ctld_cuda/__init__\.py",
        r"ctld_cuda/py\.typed",
        r"ctld_cuda/_C\.pyi",
        r"ctld_cuda/posterior/draws\.py",
    ),
    *(r"ctld_cuda/_C\.[^/]*\.so", r"ctld_cuda-[^/]*\.dist-info/licenses/LICENSE"),
]
WHEEL_FORBIDS = [r"(csrc|tests|tools|docs|examples|bench)/.*", r".*\.(cpp|cu|h|o|pyc)"]
LARGEST_SDIST, LARGEST_WHEEL = 2e6, 2e6  # bytes; the wheel without CUDA

# the extension by itself, because the package imports torch
PROBE = """
import importlib.util, json, sys
assert importlib.util.find_spec("torch") is None, "torch is installed here"
package = importlib.util.find_spec("ctld_cuda").submodule_search_locations[0]
path = next(p for p in __import__("pathlib").Path(package).glob("_C.*") if p.suffix != ".pyi")
spec = importlib.util.spec_from_file_location("_C", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(json.dumps({"instruction_sets": module.instruction_sets(), "openmp": module.openmp}))
"""

# the last runs on every processor of the kind
EVERY_PROCESSOR = {"x86_64": "v1", "AMD64": "v1", "aarch64": "neon", "arm64": "neon"}


def complaints(names, needs, forbids):
    """What is wrong with a list of files."""
    missing = [f"{need} is missing" for need in needs if not any(re.fullmatch(need, n) for n in names)]
    extra = [f"{n} does not belong there" for n in names if any(re.fullmatch(f, n) for f in forbids)]
    return missing + extra


def check_sdist(path):
    with tarfile.open(path) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
        setup = archive.extractfile(
            next(m for m in archive.getmembers() if m.name.endswith("/setup.py"))
        ).read()
    found = complaints(names, SDIST_NEEDS, SDIST_FORBIDS)
    if b"-march=native" in setup or b"-mtune=native" in setup:
        found.append("setup.py compiles for the machine that builds")
    if path.stat().st_size > LARGEST_SDIST:
        found.append(f"{path.stat().st_size} bytes are too many")
    return found


def check_wheel(path, with_cuda):
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        tags = archive.read(next(n for n in names if n.endswith(".dist-info/WHEEL"))).decode()
    found = complaints(names, WHEEL_NEEDS, WHEEL_FORBIDS)
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    where = re.sub(r"[-.]", "_", sysconfig.get_platform())
    if f"Tag: {python}-{python}-{where}" not in tags.splitlines() or "Root-Is-Purelib: false" not in tags:
        found.append(f"its tags are not those of {python} on {where}: {tags}")
    if not with_cuda and path.stat().st_size > LARGEST_WHEEL:
        found.append(f"{path.stat().st_size} bytes are too many")
    return found


def check_extension(info, machine):
    """What is wrong with what the installed extension says of itself."""
    everywhere = EVERY_PROCESSOR.get(machine, "generic")
    if not info["instruction_sets"] or info["instruction_sets"][-1] != everywhere:
        return [f"the code for every processor, {everywhere}, is not in {info['instruction_sets']}"]
    return []


def run(*command, **environment):
    subprocess.run(command, check=True, cwd=tempfile.gettempdir(), env={**os.environ, **environment})


def bare_environment(directory):
    """The interpreter of a new environment that sees no installed package."""
    venv.create(directory, with_pip=True)
    return directory / "bin" / "python"


def build(output):
    """Source distribution and wheel, in the folder `output`, and what the installed extension says."""
    environment = {"CTLD_CUDA": os.environ.get("CTLD_CUDA", "0"), "PYTHONPATH": ""}
    run(sys.executable, "-m", "build", "--sdist", "--outdir", str(output), str(ROOT))
    (sdist,) = output.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as directory:
        python = bare_environment(Path(directory, "venv"))
        pip = (str(python), "-m", "pip", "--disable-pip-version-check")
        run(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(output), str(sdist), **environment)
        (wheel,) = output.glob("*.whl")
        run(*pip, "install", "--quiet", "--no-deps", str(wheel), **environment)
        probe = subprocess.run(
            [python, "-c", PROBE],
            cwd=directory,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            check=True,
        )
    return sdist, wheel, json.loads(probe.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="a folder for the two files (default: none is kept)")
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as directory:
        target = output.absolute() if output else Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        if any(target.glob("*.whl")) or any(target.glob("*.tar.gz")):
            parser.error(f"{target} has distributions already")
        sdist, wheel, info = build(target)
        with_cuda = os.environ.get("CTLD_CUDA", "0") != "0"
        problems = {
            sdist.name: check_sdist(sdist),
            wheel.name: check_wheel(wheel, with_cuda),
            "the installed extension": check_extension(info, platform.machine()),
        }
        for path in (sdist, wheel):
            print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")
    print(f"without torch, the extension loads: {info}")
    for where, found in problems.items():
        for problem in found:
            print(f"error: {where}: {problem}", file=sys.stderr)
    return 1 if any(problems.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
