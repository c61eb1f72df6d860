"""bfloat16: stochastic rounding has the right mean and its own noise, and momenta may be stored in it too.

Laws are tested with fresh seeds at every run. Each comparison fails by chance with probability 6e-7
(two-sided, 5 standard errors), and there are about 160 of them, so that a healthy rounding fails this file
once in about 10,000 runs. The environment variable CTLD_TEST_SEED repeats the run of a failure, whose message
names it.
"""

import copy
import io
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from common import bits, device_of, differing, make_parameters, run, snapshot, two_groups
from laws import PLAIN, check, deviations_from, repeat
from test_parity import CHAIN_SHAPES, CHAINS, SMALL, compare

from ctld_cuda import CTLD, Tempering
from ctld_cuda.layout import FlatTensor
from ctld_cuda.reference import STREAM_PARAMETERS, Settings, normal, round_stochastically, store
from ctld_cuda.state import State

BF16 = torch.bfloat16
LARGEST = torch.finfo(BF16).max

# ----------------------------------------------------------------------------------- the rounding

ALL_RANDOM = torch.arange(65536)


def floats(*words):
    """float32 numbers from their bits."""
    return torch.tensor(words, dtype=torch.int64).to(torch.int32).view(torch.float32)


def every_bfloat16():
    return torch.arange(65536).to(torch.int16).view(BF16)


def finite_floats(seed):
    """Of all magnitudes, denormals and the ends of binades among them, none so large that it may overflow."""
    words = torch.randint(0x7F7F0000, (100,), generator=torch.Generator().manual_seed(seed)).tolist()
    ends = [0, 1, 0xFFFF, 0x10000, 0x007FFFFF, 0x00800000, 0x3F7FFFFF, 0x3F800001, 0x3F808000, 0x7F7EFFFF]
    return floats(*words, *ends)


def test_the_mean_over_all_random_numbers_is_exact(seed):
    for x in torch.cat([finite_floats(seed), -finite_floats(seed)]):
        rounded = round_stochastically(x.expand(65536), ALL_RANDOM)
        assert rounded.dtype == BF16
        assert rounded.double().mean() == x.double(), repeat(seed)
        away = (bits(rounded) - (bits(x) >> 16)) & 0xFFFF
        assert set(away.tolist()) <= {0, 1}, repeat(seed)  # the neighbours of x in magnitude


def test_both_signs_are_rounded_alike(seed):
    x = finite_floats(seed)[:, None].expand(-1, 65536).reshape(-1)
    random = ALL_RANDOM.repeat(x.numel() // 65536)
    assert torch.equal(bits(round_stochastically(-x, random)), bits(-round_stochastically(x, random)))


@pytest.mark.parametrize("random", [0, 1, 0x8000, 0xFFFF])
def test_what_bfloat16_can_represent_stays(random):
    """Infinities and zeros of both signs among them; NaN stays NaN."""
    x = every_bfloat16()
    rounded = round_stochastically(x.float(), torch.full((65536,), random))
    assert torch.equal(bits(rounded), bits(x))


@pytest.mark.parametrize("random", [0, 1, 0x8000, 0xFFFF])
def test_nan_stays_nan_whatever_its_payload(random):
    x = floats(0x7F800001, 0x7F80FFFF, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFF810000, 0xFFFFFFFF)
    assert round_stochastically(x, torch.full((7,), random)).isnan().all()


BEYOND_THE_LARGEST = {0x7F7F0000: 0.0, 0x7F7F4000: 0.25, 0x7F7F8000: 0.5, 0x7F7FFFFF: 1 - 2**-16}


@pytest.mark.parametrize("sign", [1, -1])
def test_overflow_is_as_likely_as_the_fraction_beyond_the_largest(sign):
    for word, probability in BEYOND_THE_LARGEST.items():
        rounded = sign * round_stochastically(sign * floats(word).expand(65536), ALL_RANDOM).double()
        assert rounded.isinf().double().mean() == probability
        assert set(rounded.unique().tolist()) <= {LARGEST, math.inf}


# ------------------------------------------------------------------------------ steps that are too small

ULP = 2.0**-7  # of bfloat16 between 1 and 2


def noise_free(p, backend, **options):
    return CTLD([p], num_data=1000, temperature=0, tempering=None, backend=backend, **options)


def pushed(backend, steps, shift, elements=1 << 14, momentum=0.0, **options):
    """How far +-1.5 come under gradients +-1, all four signs in turn, (elements/4, 4); each in the long run
    ``shift`` a step."""
    start = torch.tensor([1.5, 1.5, -1.5, -1.5]).repeat(elements // 4)
    p = torch.nn.Parameter(start.to(BF16))
    p.grad = torch.tensor([1.0, -1.0]).repeat(elements // 2).to(BF16)
    optimizer = noise_free(p, backend, lr=shift * (1 - momentum), momentum=momentum, **options)
    for _ in range(steps):
        optimizer.step()
    moved = -(p.detach().double() - start) * p.grad
    return moved.view(-1, 4)


# the specification needs a millisecond per step
TINY_STEPS = {"reference": (500, ULP / 2**6), "cpu": (10_000, ULP / 2**8), "cuda": (10_000, ULP / 2**8)}


@pytest.mark.parametrize(("momentum", "momentum_dtype"), [(0.0, None), (0.9, None), (0.9, BF16)])
def test_tiny_steps_drift_right_in_the_mean(backend, momentum, momentum_dtype, seed):
    """A step of d moves by one ulp with probability f = d/ulp: the variance of a step is ulp^2 f (1 - f).

    Rounded momenta are off by at most 2**-8 of themselves, which adds less than 1e-3 of that. The float32 sum
    before the rounding is off by at most 2**-24 per step.
    """
    steps, shift = TINY_STEPS[backend]
    options = {"momentum": momentum, "momentum_dtype": momentum_dtype, "seed": seed}
    moved = pushed(backend, steps, shift, stochastic_rounding=True, **options)
    velocities = shift * (1.0 - momentum ** np.arange(1, steps + 1))
    fractions = velocities / ULP
    expected, variance = velocities.sum(), ULP**2 * (fractions * (1.0 - fractions)).sum()
    off = (moved.mean(0) - expected).abs() - steps * 2.0**-24
    deviations = dict(enumerate(off * math.sqrt(moved.shape[0] / variance)))
    # the fourth cumulant of rare events is that of a Poisson law
    spread = math.sqrt((2.0 + 1.0 / fractions.sum()) / moved.numel())
    deviations["variance"] = (moved.var() / variance - 1.0) / spread
    check(deviations, seed)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rounding_to_nearest_loses_tiny_steps(backend, momentum):
    options = {"momentum": momentum, "stochastic_rounding": False}
    assert not pushed(backend, 300, ULP / 2**8, **options).any()
    assert pushed(backend, 20, ULP, elements=4, **options).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("maximize", [False, True])
def test_weight_decay_alone_shrinks_right_in_the_mean(backend, sign, maximize, seed):
    """theta <- (1 - d) theta in the mean; the variance of a step is less than ulp times its length d theta.

    Later steps only shrink that: all together have less than ulp times the way. The float32 sum as above.
    """
    steps, d = (300, 1e-3) if backend == "reference" else (10_000, 2e-5)
    generator = torch.Generator().manual_seed(seed)
    start = (torch.rand(8192, generator=generator) * 0.7 + 1.2).to(BF16)
    p = torch.nn.Parameter(sign * start)
    p.grad = torch.zeros_like(start)
    options = {"lr": 0.01, "weight_decay": d / 0.01, "momentum": 0.0, "maximize": maximize, "seed": seed}
    optimizer = noise_free(p, backend, **options)
    for _ in range(steps):
        optimizer.step()
    way = start.double() * (1.0 - (1.0 - d) ** steps)
    moved = start.double() - sign * p.detach().double()
    off = (moved - way).sum().abs() - start.numel() * steps * 2.0**-24
    check({"way": off / math.sqrt(ULP * way.sum())}, seed)


def test_rounding_to_nearest_loses_a_tiny_weight_decay(backend):
    p = torch.nn.Parameter(torch.linspace(-2.0, 2.0, 100).to(BF16))
    p.grad = torch.zeros_like(p)
    before = p.detach().clone()
    options = {"lr": 0.01, "weight_decay": 2e-3, "momentum": 0.0}
    optimizer = noise_free(p, backend, stochastic_rounding=False, **options)
    for _ in range(50):
        optimizer.step()
    assert torch.equal(p, before)


# ------------------------------------------------------------------------- equal bits in all backends

ROUNDINGS = [
    {"stochastic_rounding": stochastic, "momentum_dtype": dtype}
    for stochastic in (True, False)
    for dtype in (None, BF16)
]
DYNAMICS = {
    "baoab": {"integrator": "baoab"},
    "euler": {"integrator": "euler"},
    "finetuning": {"explore_steps": 3},
}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("chains", [None, CHAINS])
def test_parity(compiled_backend, rounding, dynamics, chains):
    compare(
        compiled_backend,
        thread_counts=(1, 3),
        steps=8,
        shapes=CHAIN_SHAPES if chains else SMALL,
        dtype=BF16,
        chains=chains,
        tempering=Tempering(step_size=0.1),
        **DYNAMICS[dynamics],
        **rounding,
    )


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_parity_of_every_instruction_set(instruction_set, rounding):
    compare("cpu", (2,), 3, [(1,), (7,), (8193,)], dtype=BF16, **rounding)
    compare("cpu", (2,), 3, [(1,), (7,), (8193,)], dtype=BF16, explore_steps=0, **rounding)


def mixed(backend, chains=None, **options):
    """Parameters of all types in two groups."""
    sizes = [(chains or 1, n) for n in (1, 3, 5, 130, 1025)]
    dtypes = (BF16, torch.float32, torch.float64, torch.float16)
    device = device_of(backend)
    parameters = [p for dtype in dtypes for p in make_parameters(sizes, dtype=dtype, device=device)]
    groups = [
        {"params": parameters[::3] + parameters[1::3], "weight_decay": 0.01},
        {"params": parameters[2::3], "lr": 0.02, "momentum": 0.5},
    ]
    return CTLD(groups, lr=0.05, num_data=10, chains=chains, backend=backend, **options)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("chains", [None, 3])
def test_parity_of_mixed_models(compiled_backend, rounding, chains):
    options = {"chains": chains, "explore_steps": 5, **rounding}
    expected = snapshot(run(mixed("reference", **options), 8))
    assert differing(expected, snapshot(run(mixed(compiled_backend, **options), 8))) == []


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("phase", ["explore", "finetune"])
def test_parity_at_every_number(compiled_backend, rounding, phase, seed):
    """Parameters, momenta and gradients of every bfloat16: denormals, infinities, NaN and what overflows."""
    generator = torch.Generator().manual_seed(seed)

    def shuffled():
        return every_bfloat16()[torch.randperm(65536, generator=generator)]

    theta, momentum, gradients = shuffled(), shuffled().float(), [shuffled(), shuffled()]
    momentum[:64] = floats(0x7FFFFFFF)  # NaN that would wrap to 0 if it were rounded

    def stepped(backend):
        p = torch.nn.Parameter(theta.to(device_of(backend), copy=True))
        explore_steps = None if phase == "explore" else 0
        options = {"lr": 0.5, "num_data": 10, "weight_decay": 0.1, "seed": seed, "tempering": None}
        optimizer = CTLD([p], backend=backend, explore_steps=explore_steps, **options, **rounding)
        optimizer._prepare()
        optimizer.state[p]["momentum_buffer"].copy_(momentum)
        for g in gradients:
            p.grad = g.to(p.device, copy=True)
            optimizer.step()
        return snapshot(optimizer)

    assert differing(stepped("reference"), stepped(compiled_backend)) == [], repeat(seed)


# ----------------------------------------------------------------------------------- stored momenta


@pytest.mark.parametrize("momentum_dtype", [None, BF16])
def test_only_momenta_of_bfloat16_parameters_are_bfloat16(backend, momentum_dtype):
    optimizer = run(mixed(backend, momentum_dtype=momentum_dtype), 2)
    expected = {
        torch.float32: torch.float32,
        torch.float16: torch.float32,
        torch.float64: torch.float64,
        BF16: momentum_dtype or torch.float32,
    }
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert optimizer.state[p]["momentum_buffer"].dtype == expected[p.dtype]


def through_state_dict(original, backend):
    buffer = io.BytesIO()
    torch.save(original.state_dict(), buffer)
    buffer.seek(0)
    other = mixed(backend, momentum_dtype=BF16, seed=1)
    with torch.no_grad():
        for mine, theirs in zip(other.param_groups, original.param_groups, strict=True):
            for p, q in zip(mine["params"], theirs["params"], strict=True):
                p.copy_(q)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


COPIES = {
    "state_dict": through_state_dict,
    "deepcopy": lambda original, backend: copy.deepcopy(original),
    "pickle": lambda original, backend: pickle.loads(pickle.dumps(original)),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_keep_every_bit_and_continue_alike(backend, how):
    original = run(mixed(backend, momentum_dtype=BF16), 4)
    other = COPIES[how](original, backend)
    momenta = [m for m in snapshot(other) if m.startswith("momentum")]
    assert sum(snapshot(other)[m].dtype == torch.int16 for m in momenta) == len(momenta) // 4
    assert (other.stochastic_rounding, other.momentum_dtype) == (True, BF16)
    assert differing(snapshot(original), snapshot(other)) == []
    run(original, 3, first=4)
    assert differing(snapshot(original), snapshot(run(other, 3, first=4))) == []


@pytest.mark.parametrize(
    ("setting", "saved", "own"),
    [
        ("stochastic_rounding", True, False),
        ("stochastic_rounding", False, True),
        ("momentum_dtype", None, BF16),
        ("momentum_dtype", BF16, None),
    ],
)
def test_a_state_with_another_rounding_is_refused_by_name(backend, setting, saved, own):
    state = run(two_groups([(5,), (6,)], BF16, backend=backend, **{setting: saved}), 2).state_dict()
    optimizer = run(two_groups([(5,), (6,)], BF16, backend=backend, **{setting: own}), 3)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"{setting} was {saved}, is {own}"):
        optimizer.load_state_dict(state)
    assert differing(before, snapshot(optimizer)) == []


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"stochastic_rounding": 1}, TypeError),
        ({"stochastic_rounding": None}, TypeError),
        ({"stochastic_rounding": "nearest"}, TypeError),
        ({"momentum_dtype": torch.float32}, ValueError),
        ({"momentum_dtype": torch.float16}, ValueError),
        ({"momentum_dtype": torch.float64}, ValueError),
        ({"momentum_dtype": "bfloat16"}, ValueError),
    ],
)
def test_bad_options(options, error):
    with pytest.raises(error, match=next(iter(options))):
        CTLD(make_parameters([(3,)]), num_data=10, **options)


# ------------------------------------------------------------------------------------- sampled laws


def rounding_variance(variance, share):
    """Mean of ulp^2 times ``share`` over a Gaussian: 1/6 stochastic, 1/12 to nearest."""
    sigma = math.sqrt(variance)

    def below(x):
        return math.erf(x / sigma / math.sqrt(2.0))

    binades = range(-30, 6)
    return share * sum(4.0 ** (e - 7) * (below(2.0 ** (e + 1)) - below(2.0**e)) for e in binades)


@pytest.mark.parametrize("stochastic_rounding", [True, False])
def test_temperature_in_bfloat16(compiled, stochastic_rounding, seed):
    """At the usual step size roundings heat by 1e-4 of the temperature, far below the standard error."""
    p = torch.nn.Parameter(torch.zeros(1 << 18, dtype=BF16))
    optimizer = CTLD(
        [p],
        **PLAIN.group,
        num_data=PLAIN.num_data,
        tempering=None,
        momentum_dtype=BF16,
        stochastic_rounding=stochastic_rounding,
        seed=seed,
        backend=compiled,
    )
    p.grad = torch.empty_like(p)
    for _ in range(PLAIN.relaxation("baoab")):
        p.grad.copy_(p.detach())  # curvature 1: exact
        optimizer.step()
    momentum = optimizer.state[p]["momentum_buffer"]
    law = PLAIN.stationary("baoab")
    share = 1 / 6 if stochastic_rounding else 1 / 12
    heat = np.diag([rounding_variance(law[i, i], share) for i in (0, 1)])
    m, _ = PLAIN.step_map("baoab")
    heated = law + np.linalg.solve(np.eye(4) - np.kron(m, m), heat.ravel()).reshape(2, 2)
    assert abs(heated / law - 1.0)[(0, 1), (0, 1)].max() < 3e-4
    check(deviations_from(p.detach(), momentum, np.zeros(2), heated), seed)
    kinetic = float(optimizer.tempering_state()["kinetic_temperature"])
    assert abs(kinetic - float(momentum.double().square().mean())) < 2.0**-15  # summed in quanta of 2**-16


def test_the_noise_of_rounding_is_independent_of_everything_else(seed):
    """Errors of parameters and momenta at two seeds, steps and indices, their neighbours', and thermal noise.

    An error is 1 - f with probability f, else -f: a product of two has variance f (1 - f) f' (1 - f').
    """
    n = 1 << 16
    generator = torch.Generator().manual_seed(seed)
    fractions = [torch.randint(65536, (n,), generator=generator) for _ in range(2)]
    theta, p = ((0x3F800000 + f).to(torch.int32).view(torch.float32) for f in fractions)
    variances = [f / 65536.0 * (1.0 - f / 65536.0) for f in fractions]
    found = {}
    for seed_, step, index in ((seed, 7, 0), (seed + 1, 7, 0), (seed, 8, 0), (seed, 7, 1)):
        state = State.initial(1, 0, 1.0, torch.device("cpu"))
        state.step.fill_(step)
        flat = FlatTensor(torch.empty(n, dtype=BF16), torch.empty(n, dtype=BF16), None, index, 0)
        store(flat, theta, p, state, Settings(seed_, "baoab", True, 1.0))
        name = f"seed + {seed_ - seed}, step {step}, index {index}"
        for exact, rounded, variance in ((theta, flat.theta, variances[0]), (p, flat.momentum, variances[1])):
            error = (rounded.double() - exact.double()) / ULP
            found[f"{'theta' if rounded is flat.theta else 'p'} of {name}"] = error, variance
        noise = normal(seed_, step, STREAM_PARAMETERS, index, n).double()
        found[f"noise of {name}"] = noise, torch.ones(n)
    deviations = {
        f"{a} and {b}": (x * y).sum() / (v * w).sum().sqrt()
        for (a, (x, v)), (b, (y, w)) in itertools.combinations(found.items(), 2)
    }
    for name, (x, v) in found.items():
        for distance in (1, 2, 4):
            products = (x[distance:] * x[:-distance]).sum()
            deviations[f"{name}, {distance} apart"] = products / (v[distance:] * v[:-distance]).sum().sqrt()
        deviations[name] = x.sum() / v.sum().sqrt()
    check(deviations, seed)
