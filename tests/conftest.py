"""Shared by all tests: the --long option and the backends to run on."""

import os
import secrets

import pytest
import simulated
import torch

from ctld_cuda import backend_info

INFO = backend_info()
INSTRUCTION_SETS = INFO["cpu"]["instruction_sets"] or [None]


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also run the checks that take many minutes")


def pytest_configure(config):
    # the tests' own tensors are small, and torch's threads wait for each other on a busy machine
    torch.set_num_threads(1)
    config.addinivalue_line("markers", "long: takes many minutes; runs with --long only")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes many minutes: pass --long"))


def require(backend):
    """Skips with the reason if the backend cannot be used here."""
    if not INFO[backend]["usable"]:
        pytest.skip(f"backend {backend}: {INFO[backend]['reason']}")
    return backend


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    """Every backend for parameters on the CPU."""
    return require(request.param)


@pytest.fixture(params=[name for name in INFO if name != "reference"])
def compiled_backend(request):
    """Every backend that is not the specification itself; common.device_of says where its parameters are."""
    return require(request.param)


@pytest.fixture(params=["reference", "cpu", "simulated CUDA"])
def processor(request, monkeypatch):
    """The name of a backend for parameters on the CPU, one of which runs the CUDA kernels' source."""
    if request.param == "simulated CUDA":
        simulated.install(monkeypatch)
        return "cpu"
    return require(request.param)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request, monkeypatch):
    """Every instruction set of the CPU backend that runs here."""
    require("cpu")
    monkeypatch.setenv("CTLD_INSTRUCTION_SET", request.param)
    return request.param


@pytest.fixture
def compiled():
    """The compiled backend for tests that would take hours with the specification itself."""
    return require("cpu")


@pytest.fixture
def seed():
    """Another one at every run, unless CTLD_TEST_SEED says which."""
    return int(os.environ.get("CTLD_TEST_SEED") or secrets.randbits(62))


def pytest_terminal_summary(terminalreporter):
    """What the tests of statistics/ compared, added up over all processes (see laws.Tally)."""
    reports = [r for found in terminalreporter.stats.values() for r in found if hasattr(r, "user_properties")]
    total = {"comparisons": 0, "chance": 0.0, "bounds": 0}
    for report in reports:
        for name, value in report.user_properties:
            if report.when == "teardown" and name in total:
                total[name] += value
    if total["comparisons"]:
        terminalreporter.write_line(
            f"sampled laws: {total['comparisons']} comparisons with a healthy sampler, of which one fails by "
            f"chance with probability at most {total['chance']:.1e}; {total['bounds']} bounds from experience"
        )
