"""The backends of the statistical tests, and the number of their comparisons."""

import dataclasses
import importlib.util
from pathlib import Path

import laws
import pytest
import simulated

# pytest calls this file "conftest", as the one above it; whoever imports that gets what is there
_spec = importlib.util.spec_from_file_location("tests_conftest", Path(__file__).parents[1] / "conftest.py")
_above = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_above)
INFO, INSTRUCTION_SETS, require = _above.INFO, _above.INSTRUCTION_SETS, _above.require

COUNTED = [field.name for field in dataclasses.fields(laws.Tally)]


@dataclasses.dataclass(frozen=True)
class Engine:
    """What a test runs on: a backend and the share of its chains that this backend is quick enough for."""

    backend: str
    share: float

    def chains(self, number: int, at_least: int = 64) -> int:
        """``number`` of chains on the compiled backend, fewer on the slow ones."""
        return max(int(number * self.share), at_least)


SHARES = {"cpu": 1.0, "reference": 1 / 8, "simulated CUDA": 1 / 64}


@pytest.fixture(params=["cpu", pytest.param("reference", marks=pytest.mark.long)])
def engine(request):
    """The compiled backend; with --long also the specification."""
    return Engine(require(request.param), SHARES[request.param])


@pytest.fixture(params=list(SHARES))
def any_engine(request, monkeypatch):
    """Every backend, the kernels of the GPU among them, run on the host in the place of "cpu"."""
    if request.param == "simulated CUDA":
        simulated.install(monkeypatch, blocks=1, resident_blocks=1)
        return Engine("cpu", SHARES[request.param])
    return Engine(require(request.param), SHARES[request.param])


@pytest.fixture(autouse=True)
def tally(request):
    """Puts what a test compared into its report, which also comes from other processes."""
    before = dataclasses.replace(laws.TALLY)
    yield
    counted = [(name, getattr(laws.TALLY, name) - getattr(before, name)) for name in COUNTED]
    request.node.user_properties += counted
