"""Compiled backends give the bits of the reference: parameters, momenta, alpha, tables and flags."""

import pytest
import torch
from common import bits, differing, run, snapshot, threads, two_groups

from ctld_cuda import AdaptiveForce, Metadynamics, Tempering
from ctld_cuda.reference import normal

LARGE = [(1,), (3,), (4,), (5,), (1023,), (1 << 20,)]
SMALL = [(1,), (3,), (4,), (5,), (1023,), (8191,), (8193,), (20001,)]
CHAINS = 7
CHAIN_SHAPES = [(CHAINS,), (CHAINS, 3), (CHAINS, 5), (CHAINS, 1025), (CHAINS, 2048), (CHAINS, 3001)]
STEPS = 200

BIASES = {
    "adaptive": AdaptiveForce(),
    "adaptive without hills": AdaptiveForce(residual=None),
    "metadynamics": Metadynamics(height=0.05),
}


def compare(compiled_backend, thread_counts=(1, 2, 5), steps=STEPS, shapes=SMALL, **options):
    expected = snapshot(run(two_groups(shapes, backend="reference", **options), steps))
    for n in thread_counts:
        with threads(n):
            actual = snapshot(run(two_groups(shapes, backend=compiled_backend, **options), steps))
        assert differing(expected, actual) == [], f"{n} threads"
    return expected


COMBINATIONS = [
    (integrator, coupling, bias)
    for integrator in ("baoab", "euler")
    for coupling in ("exact", "standardized")
    for bias in BIASES
]


@pytest.mark.parametrize(("integrator", "coupling", "bias"), COMBINATIONS)
def test_all_combinations(compiled_backend, integrator, coupling, bias):
    tempering = Tempering(coupling=coupling, bias=BIASES[bias], step_size=0.1)
    state = compare(compiled_backend, shapes=SMALL, integrator=integrator, tempering=tempering)
    assert state["visits"].count_nonzero() > 5  # alpha has left its first bins: its motion is compared too


# the size of a tensor and the bias do not meet in the code: all combinations of them only with --long
LARGE_COMBINATIONS = [
    c if c == ("baoab", "standardized", "adaptive") else pytest.param(*c, marks=pytest.mark.long)
    for c in COMBINATIONS
]


@pytest.mark.parametrize(("integrator", "coupling", "bias"), LARGE_COMBINATIONS)
def test_a_large_tensor(compiled_backend, integrator, coupling, bias):
    tempering = Tempering(coupling=coupling, bias=BIASES[bias], step_size=0.02)
    compare(compiled_backend, shapes=LARGE, integrator=integrator, tempering=tempering)


# nor do the integrator and the bias
CHAIN_COMBINATIONS = [
    c if (c[0] == "baoab") == (c[1] == "exact") else pytest.param(*c, marks=pytest.mark.long)
    for c in COMBINATIONS
]


@pytest.mark.parametrize(("integrator", "coupling", "bias"), CHAIN_COMBINATIONS)
def test_chains(compiled_backend, integrator, coupling, bias):
    tempering = Tempering(coupling=coupling, bias=BIASES[bias], step_size=0.1)
    state = compare(
        compiled_backend, shapes=CHAIN_SHAPES, chains=CHAINS, integrator=integrator, tempering=tempering
    )
    assert state["visits"].count_nonzero() > 20


def test_known_energy_noise(compiled_backend):
    tempering = Tempering(coupling="exact", energy_noise=5.0, step_size=0.1)
    compare(compiled_backend, thread_counts=(2,), shapes=CHAIN_SHAPES, chains=CHAINS, tempering=tempering)


def test_many_short_chains(compiled_backend):
    shapes = [(5000, 10), (5000,), (5000, 3)]
    compare(compiled_backend, steps=20, shapes=shapes, chains=5000, tempering=Tempering(coupling="exact"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("integrator", ["baoab", "euler"])
@pytest.mark.parametrize("tempering", [None, Tempering(step_size=0.1)])
def test_dtypes(compiled_backend, dtype, integrator, tempering):
    compare(compiled_backend, steps=50, shapes=SMALL, dtype=dtype, integrator=integrator, tempering=tempering)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("explore_steps", [0, 10])
def test_finetuning(compiled_backend, dtype, explore_steps):
    compare(
        compiled_backend, thread_counts=(2,), steps=30, shapes=SMALL, dtype=dtype, explore_steps=explore_steps
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("chains", [None, CHAINS])
def test_every_instruction_set(instruction_set, dtype, chains):
    shapes = CHAIN_SHAPES if chains else SMALL
    tempering = Tempering(step_size=0.1)
    for integrator in ("baoab", "euler"):
        compare(
            "cpu", (2,), 20, shapes, dtype=dtype, chains=chains, integrator=integrator, tempering=tempering
        )


@pytest.mark.parametrize("first", [0, 4, 252, 2**32 - 64])
def test_noise_of_every_instruction_set(instruction_set, first):
    from ctld_cuda.backends import cpu

    numel = 1028
    expected = normal(2**64 - 3, 2**40 + 5, 1, 12, first + numel)[first:] if first < 1000 else None
    actual = cpu.normal(2**64 - 3, 2**40 + 5, 1, 12, first, numel, instruction_set)
    if expected is None:  # too many to make: compare with the group's own words
        expected = torch.cat([_normals_of_group(first // 4 + k) for k in range(numel // 4)])
    assert torch.equal(bits(expected), bits(actual))


def _normals_of_group(group):
    from ctld_cuda.reference import box_muller, philox4x32

    seed, step = 2**64 - 3, 2**40 + 5
    counter = torch.tensor([[group, 12, step & 0xFFFFFFFF, 1 << 24 | step >> 32]])
    words = philox4x32(counter, torch.tensor([seed & 0xFFFFFFFF, seed >> 32]))
    return torch.cat((*box_muller(words[:, 0], words[:, 1]), *box_muller(words[:, 2], words[:, 3])))


def test_denormals_survive_a_caller_that_flushes_them(compiled_backend):
    def tiny(backend):
        optimizer = two_groups([(40,), (40,)], backend=backend, temperature=0, tempering=None, momentum=0.5)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.data.fill_(1e-41)
                p.grad = torch.full_like(p, 1e-40)
        torch.set_flush_denormal(backend != "reference")
        try:
            optimizer.step()
        finally:
            torch.set_flush_denormal(False)
        return snapshot(optimizer)

    expected = tiny("reference")
    assert expected["parameter 0.0"].count_nonzero() == 40
    assert differing(expected, tiny(compiled_backend)) == []


def test_nonfinite_values_and_saturation_set_the_same_flags(compiled_backend):
    def troubled(backend, value):
        optimizer = two_groups([(5,), (5000,)], backend=backend, tempering=Tempering(step_size=0.1))
        run(optimizer, 3)
        for p in optimizer.param_groups[1]["params"]:
            p.grad[17] = value
        optimizer.step(loss=1.0)
        return snapshot(optimizer)

    for value in (float("nan"), float("inf"), 1e30, 1e4):
        expected = troubled("reference", value)
        assert int(expected["flags"]) != 0, value
        assert differing(expected, troubled(compiled_backend, value)) == [], value
