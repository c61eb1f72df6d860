"""Broken samplers must fail the checks that the healthy one passes; mutants.py prints all pairs."""

import pytest
from laws import BOUND, check, repeat
from mutants import CHECKS, MUTANTS, deviation


@pytest.mark.parametrize("name", CHECKS)
def test_the_healthy_sampler_passes(name, seed):
    """At the size at which the broken ones are caught."""
    check(CHECKS[name](seed), seed, 100)


@pytest.mark.parametrize("name", MUTANTS)
def test_broken_samplers_are_noticed(name, seed):
    check_name = MUTANTS[name].noticed_by
    size, where = deviation(check_name, seed, name)
    assert size > BOUND, f"{check_name}: {size:.2f} standard errors at most ({where}); {repeat(seed)}"
