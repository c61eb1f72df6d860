"""The noise: Philox words, their layout, and that what comes out is standard normal and uncorrelated.

Laws tested by counting and averaging use fresh seeds at every run. Each comparison fails by chance with
probability 6e-7 (two-sided, 5 standard errors; counts of rare tails up to 2e-6), and there are about 200
of them, so a healthy generator fails this file once in about 7,000 runs. The environment variable
CTLD_TEST_SEED repeats the run of a failure, whose message names it.
"""

import itertools
import math

import pytest
import torch
from conftest import INFO

from ctld_cuda.reference import box_muller, normal, philox4x32, random_words

FIVE_SIGMA = 5.0
ISA = INFO["cpu"]["instruction_sets"][0] if INFO["cpu"]["usable"] else None
BLOCK = 1 << 17  # draws at a time: what fits into a cache
# the compiled generator makes the bits of the reference (tested elsewhere), a hundred times faster
BLOCKS = 768 if ISA else 8  # 1e8 draws
FEWER_BLOCKS = 96 if ISA else 8  # 1.2e7


def repeat(seed):
    return f"to repeat: CTLD_TEST_SEED={seed}"


def draws(seed, step=0, stream=0, index=0, first=0, numel=BLOCK):
    """Normals ``first`` ... of the noise, float64."""
    if ISA:
        from ctld_cuda.backends import cpu

        return cpu.normal(seed % 2**64, step, stream, index, first, numel, ISA).double()
    return normal(seed % 2**64, step, stream, index, first + numel)[first:].double()


# ---------------------------------------------------------------------------------------------- words

KNOWN_ANSWERS = [  # Random123's kat_vectors for philox4x32-10
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return torch.tensor([int(word, 16) for word in text.split()])


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    actual = philox4x32(words(counter), words(key))
    assert actual.dtype == torch.int64
    assert actual.tolist() == words(expected).tolist()


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 0), (4, 1, 3)])
def test_leading_shapes(shape):
    key = words("a4093822 299f31d0")
    counters = torch.arange(math.prod(shape) * 4).reshape(*shape, 4) * 0x9E3779B1 % 2**32
    actual = philox4x32(counters, key)
    assert actual.shape == counters.shape and actual.dtype == torch.int64
    one_by_one = [philox4x32(c, key) for c in counters.reshape(-1, 4)]
    assert actual.reshape(-1, 4).tolist() == [w.tolist() for w in one_by_one]
    assert ((actual >= 0) & (actual < 2**32)).all()


def test_known_answers_in_a_batch():
    """Counters of one batch do not see each other: every row of a batch under one key."""
    counter, key, expected = KNOWN_ANSWERS[2]
    batch = words(counter).repeat(3, 2, 1)
    batch[1, 0] = 0
    actual = philox4x32(batch, words(key))
    assert actual[2, 1].tolist() == words(expected).tolist()
    assert actual[1, 0].tolist() != words(expected).tolist()


# --------------------------------------------------------------------------------------------- layout


def by_hand(seed, step, stream, index, element):
    """The normal of one element, from the words that the contract gives it."""
    counter = [element >> 2, index, step & 0xFFFFFFFF, (stream << 24) | ((step >> 32) & 0xFFFFFF)]
    w = philox4x32(torch.tensor(counter), torch.tensor([seed & 0xFFFFFFFF, seed >> 32]))
    pair = w[:2] if element % 4 < 2 else w[2:]
    return box_muller(pair[:1], pair[1:])[element % 2]


@pytest.mark.parametrize(
    ("seed_", "step", "stream", "index"),
    [
        (0, 0, 0, 0),
        (0xFEDCBA9876543210, 2**32 + 5, 2, 7),
        (2**64 - 1, 0xABCDEF_01234567, 1, 2**31),
        (2**32, 2**56 - 1, 0, 1),
    ],
)
def test_counter_layout(seed_, step, stream, index):
    actual = normal(seed_, step, stream, index, 1000)
    assert actual.dtype == torch.float32 and actual.shape == (1000,)
    for element in (0, 1, 2, 3, 4, 5, 6, 7, 501, 998, 999):
        assert actual[element] == by_hand(seed_, step, stream, index, element), element
    if ISA:  # elements whose group number fills its word
        first = 2**34 - 8
        last = draws(seed_, step, stream, index, first, 8)
        for k in range(8):
            assert last[k] == by_hand(seed_, step, stream, index, first + k), k


def test_every_coordinate_changes_every_group():
    """Seeds, steps, streams and indices that differ in one bit of either word share no group."""
    base = dict(seed=2**40 + 3, step=2**40 + 3, stream=0, index=3)
    variants = [base] + [
        base | {name: base[name] ^ bit}
        for name, bits in {
            "seed": (1, 2**31, 2**32, 2**63),
            "step": (1, 2**31, 2**32, 2**55),
            "stream": (1, 2),
            "index": (1, 2**31),
        }.items()
        for bit in bits
    ]
    groups = torch.cat([random_words(numel=4000, **v) for v in variants])
    # 128-bit groups: a coincidence has probability 1e-30, so that 64 bits of each are enough to compare
    pairs = groups[:, 0] << 32 | groups[:, 1]
    assert pairs.unique().numel() == len(variants) * 1000


def test_an_element_does_not_depend_on_their_number(seed):
    longest = normal(seed, 9, 0, 2, 1031)
    for numel in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 255, 256, 257, 1030):
        assert torch.equal(normal(seed, 9, 0, 2, numel), longest[:numel]), repeat(seed)


# ------------------------------------------------------------------------------------------- accuracy


def exact_box_muller(radius_word, angle_word):
    """Both normals and the radius in float64 from the words themselves."""
    x, a = (torch.where(w >= 2**31, w - 2**32, w).double() for w in (radius_word, angle_word))
    # u = 1 + 2**-32 at x = -2**31, whose logarithm has no root
    radius = (-2.0 * ((x.abs() + 0.5) * 2.0**-31).clamp(max=1.0).log()).sqrt()
    signed, angle = torch.where(x < 0, -radius, radius), math.pi * 2.0**-32 * a
    return signed * angle.cos(), signed * angle.sin(), radius


def random_word_pairs(kind, n, generator):
    """Word pairs, many of them where something may go wrong: extreme radii, ends of the angle."""
    spread = (2.0 ** (31 * torch.rand(n, generator=generator, dtype=torch.float64))).long()
    sign = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    radius_word, angle_word = (torch.randint(0, 2**32, (n,), generator=generator) for _ in range(2))
    if kind == "largest radii":
        radius_word = sign * (spread - 1) % 2**32
    elif kind == "smallest radii":
        radius_word = sign * (2**31 - spread) % 2**32
    elif kind == "ends of the angle":
        angle_word = (2**31 + sign * spread) % 2**32
    return radius_word, angle_word


@pytest.mark.parametrize("kind", ["all", "largest radii", "smallest radii", "ends of the angle"])
def test_box_muller_is_accurate(seed, kind):
    """Within 8e-6 of the exact transform of the same words, apart from radii below 0.1 (one in 200).

    Over all words, sine and cosine are within 1.12e-6 and the radius r within 6.5e-7 where it exceeds 0.3
    and within 1.6e-7/r where it does not; the bound adds the last rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(4):
        pair = random_word_pairs(kind, 1 << 19, generator)
        actual, (x, y, radius) = box_muller(*pair), exact_box_muller(*pair)
        assert all(a.dtype == torch.float32 for a in actual)
        error = torch.maximum((actual[0].double() - x).abs(), (actual[1].double() - y).abs())
        ratio = error / (1.25e-6 * radius + 6e-7 + 1.6e-7 / radius.clamp(min=1e-12))
        assert ratio.max() < 1.0, f"{ratio.max():.2f} of the bound; {repeat(seed)}"
        assert error[radius > 0.1].max() < 8e-6, repeat(seed)
        assert error.max() < 5e-4, repeat(seed)  # the smallest radius is 2**-11 instead of about 0
        assert (actual[0].double().square() + actual[1].double().square()).min() > 0, repeat(seed)


@pytest.mark.parametrize("angle_word", [0, 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1])
@pytest.mark.parametrize("radius_word", [0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1])
def test_extreme_words(radius_word, angle_word):
    pair = torch.tensor([radius_word]), torch.tensor([angle_word])
    (x,), (y,) = box_muller(*pair)
    exact_x, exact_y, radius = (float(t) for t in exact_box_muller(*pair))
    largest_error = 8e-6 if radius > 1 else 5e-4
    assert abs(float(x) - exact_x) < largest_error
    assert abs(float(y) - exact_y) < largest_error
    assert math.hypot(x, y) > 4e-4  # never zero, so that a root without special cases serves
    negative = radius_word >= 2**31
    assert math.copysign(1.0, x) == (-1.0 if negative else 1.0)


def test_reachable_magnitude():
    """sqrt(-2 ln 2**-32) = 6.6604 at the word 0, along both axes; the next smaller is 6.4934."""
    (x,), _ = box_muller(torch.tensor([0]), torch.tensor([0]))
    _, (y,) = box_muller(torch.tensor([0]), torch.tensor([2**31 - 1]))
    largest = math.sqrt(64 * math.log(2))
    assert abs(float(x) - largest) < 1e-6 and abs(float(y) - largest) < 7e-6
    (x,), _ = box_muller(torch.tensor([2**32 - 1]), torch.tensor([0]))
    assert abs(float(x) + math.sqrt(64 * math.log(2) - 2 * math.log(3))) < 1e-6


# --------------------------------------------------------------------------------- moments and tails

CELLS_PER_UNIT = 64
HALF = 8 * CELLS_PER_UNIT  # cells on either side of 0


def hermite(x):
    """He1 ... He6: uncorrelated under the standard normal, with mean 0 and variance k!."""
    polynomials = [torch.ones_like(x), x]
    for k in range(1, 6):
        polynomials.append(x * polynomials[k] - k * polynomials[k - 1])
    return polynomials[1:]


def upper_tail(x):
    """P(standard normal > x)."""
    return 0.5 * math.erfc(x / math.sqrt(2))


def cell_probabilities(edges):
    """Of the cells between the edges; each from the tail it lies in, so that small ones are exact too."""
    return torch.tensor(
        [
            upper_tail(a) - upper_tail(b) if a >= 0 else upper_tail(-b) - upper_tail(-a)
            for a, b in itertools.pairwise(edges)
        ],
        dtype=torch.float64,
    )


def count_z(count, expected):
    """A Poisson count's deviation in standard errors, by the root that makes its variance 1."""
    return 2.0 * (math.sqrt(count + 0.375) - math.sqrt(expected + 0.375))


def chi_square_z(counts, expected):
    """Deviation of a chi-square sum in standard errors (Wilson and Hilferty's cube root)."""
    degrees = counts.numel() - 1
    chi_square = ((counts - expected).square() / expected).sum().item()
    spread = 2.0 / (9.0 * degrees)
    return ((chi_square / degrees) ** (1 / 3) - (1.0 - spread)) / math.sqrt(spread)


def merge_rare(counts, expected, least=50.0):
    """Pools the cells that are too rare for a chi-square at each end of the line."""
    enough = (expected >= least).nonzero()
    first, last = int(enough[0]), int(enough[-1])

    def pooled(t):
        return torch.cat(
            (t[: first + 1].sum(0, keepdim=True), t[first + 1 : last], t[last:].sum(0, keepdim=True))
        )

    return pooled(counts), pooled(expected)


def marginal_deviations(blocks):
    """Every statistic of single draws, by name, in standard errors.

    Means of Hermite polynomials test mean, variance, skewness, kurtosis and two moments more, exactly
    and independently of each other. The histogram's cells are 1/64 wide, so that scaling by 64 and
    rounding down put every draw into its cell without error.
    """
    n, sums = 0, torch.zeros(6, dtype=torch.float64)
    histogram = torch.zeros(2 * HALF, dtype=torch.int64)
    for x in blocks:
        n += x.numel()
        sums += torch.stack([h.sum() for h in hermite(x)])
        cells = (x * CELLS_PER_UNIT).floor().long().clamp(-HALF, HALF - 1) + HALF
        histogram += torch.bincount(cells, minlength=2 * HALF)
    names = ("mean", "variance", "skewness", "kurtosis", "moment 5", "moment 6")
    found = {
        name: (s / math.sqrt(n * math.factorial(k))).item()
        for k, (name, s) in enumerate(zip(names, sums, strict=True), 1)
    }
    for k in range(1, 7):
        expected = n * upper_tail(k)
        if expected < 20:  # too rare for a count in units of its standard error
            continue
        found[f"draws above {k}"] = count_z(histogram[HALF + k * CELLS_PER_UNIT :].sum().item(), expected)
        found[f"draws below -{k}"] = count_z(histogram[: HALF - k * CELLS_PER_UNIT].sum().item(), expected)
    edges = [(i - HALF) / CELLS_PER_UNIT for i in range(2 * HALF + 1)]
    expected = n * cell_probabilities(edges)
    found["histogram"] = chi_square_z(*merge_rare(histogram.double(), expected))
    return found


def too_large(deviations):
    return {name: round(z, 2) for name, z in deviations.items() if not abs(z) < FIVE_SIGMA}


@pytest.mark.parametrize("times", [1, pytest.param(30, marks=pytest.mark.long)])
def test_moments_and_tails(seed, times):
    """1e8 draws (3e9 with --long, 1e6 without the compiled generator) against the exact normal law."""
    # 128 blocks along the elements of one step, then the next step
    blocks = (draws(seed, step=i // 128, first=i % 128 * BLOCK) for i in range(times * BLOCKS))
    found = marginal_deviations(blocks)
    assert len(found) >= (17 if ISA else 15)
    assert not too_large(found), f"{too_large(found)}; {repeat(seed)}"


@pytest.mark.parametrize("stream", [1, 2])
def test_moments_of_the_other_streams(seed, stream):
    blocks = (draws(seed, step=2**33, stream=stream, index=1, first=i * BLOCK) for i in range(FEWER_BLOCKS))
    found = marginal_deviations(blocks)
    assert not too_large(found), f"{too_large(found)}; {repeat(seed)}"


@pytest.mark.parametrize("stream", [0, 2])
def test_the_first_element_over_many_steps(seed, stream):
    """What one parameter, or one chain's alpha, receives in the course of a run."""
    steps = 20_000 if ISA else 2_000
    x = torch.cat([draws(seed, step=step, stream=stream, numel=4) for step in range(steps)])
    found = marginal_deviations([x])
    assert not too_large(found), f"{too_large(found)}; {repeat(seed)}"


def coarse_uniforms(shape, generator):
    """Normals from Box-Muller on 10-bit uniforms: almost right in the moments, but granular."""
    u, v = ((torch.randint(0, 2**10, shape, generator=generator) + 0.5) * 2.0**-10 for _ in range(2))
    return (-2.0 * u.double().log()).sqrt() * (2 * math.pi * v.double()).cos()


WRONG_LAWS = {
    "1 % too wide": lambda x, g: x * 1.01,
    "off centre": lambda x, g: x + 0.005,
    "no tails beyond 3.9": lambda x, g: x.clamp(-3.9, 3.9),
    "skewed": lambda x, g: x + 0.01 * (x * x - 1.0),
    "10-bit uniforms": lambda x, g: coarse_uniforms(x.shape, g),
    "sum of 12 uniforms": lambda x, g: (
        torch.rand(12, x.numel(), generator=g, dtype=torch.float64).sum(0) - 6.0
    ),
    "one-sided tail": lambda x, g: torch.where(x < -4.0, -x, x),
}


@pytest.mark.parametrize("name", WRONG_LAWS)
def test_wrong_laws_are_noticed(seed, name):
    """The statistics above are sharp: in 4e6 draws they notice every one of these."""
    generator = torch.Generator().manual_seed(seed)
    wrong = (WRONG_LAWS[name](draws(seed, step=i), generator) for i in range(32))
    assert too_large(marginal_deviations(wrong)), repeat(seed)


# ---------------------------------------------------------------------------------------- independence


def pair_deviations(pairs):
    """Correlations of x and y, of their squares, and of each with the other's square, in standard errors.

    Sharing a radius shows in the squares, sharing a sign or a word in the first. The chi-square over a
    grid of half-unit squares within [-3, 3]**2 sees any other dependence.
    """
    n, sums = 0, torch.zeros(4, dtype=torch.float64)
    cells = torch.zeros(14 * 14, dtype=torch.int64)
    for x, y in pairs:
        n += x.numel()
        x2, y2 = x * x - 1.0, y * y - 1.0
        sums += torch.stack([torch.dot(a, b) for a, b in ((x, y), (x2, y2), (x, y2), (x2, y))])
        row, column = (((t * 2.0).floor().clamp(-7, 6) + 7).long() for t in (x, y))
        cells += torch.bincount(row * 14 + column, minlength=14 * 14)
    names = ("x y", "x^2 y^2", "x y^2", "x^2 y")
    found = {
        name: (s / math.sqrt(n * variance)).item()
        for name, s, variance in zip(names, sums, (1, 4, 2, 2), strict=True)
    }
    marginal = cell_probabilities([-math.inf, *(k / 2 for k in range(-6, 7)), math.inf])
    expected = n * (marginal[:, None] * marginal).reshape(-1)
    common = expected > 20
    pooled = [torch.cat((t[common], t[~common].sum(0, keepdim=True))) for t in (cells.double(), expected)]
    found["grid"] = chi_square_z(*(t[pooled[1] > 0] for t in pooled))
    return found


def check_independent(pairs, seed):
    found = pair_deviations(pairs)
    assert not too_large(found), f"{too_large(found)}; {repeat(seed)}"


@pytest.mark.parametrize("lag", range(1, 9))
def test_neighbouring_elements_are_independent(seed, lag):
    blocks = (draws(seed, step=i) for i in range(FEWER_BLOCKS))
    check_independent(((x[:-lag], x[lag:]) for x in blocks), seed)


@pytest.mark.parametrize(("i", "j"), [(0, 1), (2, 3), (0, 2), (0, 3), (1, 2), (1, 3)])
def test_normals_of_one_group_are_independent(seed, i, j):
    """Elements 4k and 4k+1, and 4k+2 and 4k+3, come from one Box-Muller pair each."""
    groups = (draws(seed, step=k).view(-1, 4) for k in range(4 * FEWER_BLOCKS))
    check_independent(((x[:, i].contiguous(), x[:, j].contiguous()) for x in groups), seed)


NEIGHBOURS = {  # what differs between two draws that meet in the sampler
    "next step": dict(step=1),
    "second next step": dict(step=2),
    "step 2^32 later": dict(step=2**32),
    "stream 1": dict(stream=1),
    "stream 2": dict(stream=2),
    "next parameter": dict(index=1),
    "parameter 1024 later": dict(index=1024),
    "next seed": dict(seed=1),
    "seed 2^32 later": dict(seed=2**32),
    "other half of the tensor": dict(first=2**30),
}


@pytest.mark.parametrize(
    "name", NEIGHBOURS if ISA else [n for n in NEIGHBOURS if n != "other half of the tensor"]
)
def test_neighbouring_counters_and_keys_are_independent(seed, name):
    def pair(k):
        base = dict(seed=seed, step=4 * k, stream=0, index=5, first=0)
        other = {key: value + NEIGHBOURS[name].get(key, 0) for key, value in base.items()}
        return draws(**base), draws(**other)

    check_independent((pair(k) for k in range(FEWER_BLOCKS)), seed)


WRONG_PAIRS = {
    "the same": lambda x, y: (x, x),
    "opposite": lambda x, y: (x, -x),
    "shared radius": lambda x, y: (x * (x * x + y * y).sqrt() / 1.6, y * (x * x + y * y).sqrt() / 1.6),
    "shared sign": lambda x, y: (x, y.abs().copysign(x)),
    "shared magnitude": lambda x, y: (x, x.abs().copysign(y)),
    "correlation 0.003": lambda x, y: (x, y + 0.003 * x),
    "one in 200 repeated": lambda x, y: (x, torch.where(torch.arange(x.numel()) % 200 == 0, x, y)),
}


@pytest.mark.parametrize("name", WRONG_PAIRS)
def test_wrong_pairs_are_noticed(seed, name):
    # 1.2e7 draws: a correlation of 0.003 is 10.6 standard errors, missed once in 1e8
    pairs = [WRONG_PAIRS[name](draws(seed, step=k), draws(seed, step=k, index=1)) for k in range(96)]
    assert too_large(pair_deviations(pairs)), repeat(seed)
