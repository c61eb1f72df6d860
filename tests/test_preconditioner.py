"""The preconditioner against laws and recursions known exactly, and the same bits everywhere."""

import math

import pytest
import torch
from common import differing, make_parameters, noisy_quadratic, run, snapshot, two_groups

from ctld_cuda import CTLD, RMSPreconditioner, Tempering, preconditioner

SHAPES = [(4, 3), (4, 17), (40, 10), (1,)]
MOMENTUM = 0.9


def conditioned(shapes=SHAPES, adapt_steps=5, dtype=torch.float32, **options):
    options = {"lr": 0.01, "weight_decay": 0.01, "num_data": 10, "tempering": None} | options
    parameters = make_parameters(shapes, dtype=dtype)
    return CTLD(parameters, preconditioner=RMSPreconditioner(adapt_steps=adapt_steps), **options)


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def scales_of(optimizer):
    return [optimizer.state[p]["preconditioner"] for p in parameters_of(optimizer)]


# ------------------------------------------------------------------------------------------ the factors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_are_the_nearest_powers_of_two(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    v = torch.exp2(torch.rand(5000, generator=generator, dtype=torch.float64) * 60 - 30).to(dtype)
    v = torch.cat([v, torch.exp2(torch.arange(-40.0, 40.0)).to(dtype)])
    found = preconditioner.scale_of(v, torch.tensor(1.0), 0.0, dtype)
    for value, scale in zip(v.tolist(), found.tolist(), strict=True):
        assert math.frexp(scale)[0] == 0.5
        assert 2**-0.5 <= scale * value**0.25 <= 2**0.5


def test_factors_correct_the_mean_and_keep_its_floor():
    v = torch.tensor([0.0, 1e-9, 2.0**-10, 0.25])
    weight = torch.tensor(0.25)
    assert preconditioner.scale_of(v, weight, 0.0, v.dtype).tolist() == [1.0, 128.0, 4.0, 1.0]
    # at least 2^-8 of the largest, which is 1
    assert preconditioner.scale_of(v, weight, 2.0**-8, v.dtype).tolist() == [4.0, 4.0, 4.0, 1.0]
    nothing_seen = preconditioner.scale_of(torch.zeros(3), torch.tensor(0.0), 1e-6, v.dtype)
    assert nothing_seen.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("exponent", [-30, -1, 0, 1, 30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_powers_of_two_are_exact(exponent, dtype):
    found = preconditioner.power_of_two(torch.tensor([exponent], dtype=torch.int32), dtype)
    assert found.dtype == dtype and float(found) == 2.0**exponent


# ----------------------------------------------------------------------------- without noise: a recursion


@pytest.mark.parametrize("integrator", ["baoab", "euler"])
def test_without_noise_it_is_momentum_sgd_in_the_coordinates(backend, integrator):
    """In float64 against the recursion written down anew; D follows Adam's formula, rounded."""
    lr, decay, adapt = 0.01, 0.02, 7
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(30, 50, generator=generator, dtype=torch.float64)
    gradients *= torch.exp2(torch.linspace(-12, 6, 50, dtype=torch.float64))
    theta = torch.nn.Parameter(torch.randn(50, generator=generator, dtype=torch.float64))
    optimizer = CTLD(
        [theta],
        lr=lr,
        momentum=MOMENTUM,
        weight_decay=decay,
        num_data=10,
        temperature=0.0,
        tempering=None,
        integrator=integrator,
        backend=backend,
        preconditioner=RMSPreconditioner(adapt_steps=adapt, decay=0.9, floor=0.0),
    )
    x, v, mean = theta.detach().clone(), torch.zeros(50), torch.zeros(50)
    for step, g in enumerate(gradients):
        theta.grad = g.clone()
        optimizer.step()
        if step < adapt:
            mean = 0.9 * mean + 0.1 * g * g
            log2 = (mean / (1 - 0.9 ** (step + 1))).log2()
            d = torch.exp2(-(log2 / 4).round())
        v = MOMENTUM * v + d * g + decay * (x / d)
        x = x - lr * d * v
        assert torch.allclose(theta.detach(), x, rtol=1e-12, atol=0)
        assert torch.equal(theta.grad, g)


def test_the_first_step_is_adams_up_to_rounding(seed):
    """lr = (1 - momentum) * Adam's, as said in the docstring: after many equal gradients the same speed."""
    rate, g = 0.01, torch.exp2(torch.linspace(-9, 5, 40))
    p, q = (torch.nn.Parameter(torch.zeros(40)) for _ in range(2))
    ours = CTLD(
        [p],
        lr=(1 - MOMENTUM) * rate,
        momentum=MOMENTUM,
        num_data=1,
        temperature=0.0,
        tempering=None,
        preconditioner=RMSPreconditioner(floor=0.0),
    )
    adam = torch.optim.Adam([q], lr=rate, betas=(MOMENTUM, 0.999))
    for _ in range(200):
        p.grad, q.grad = g.clone(), g.clone()
        ours.step()
        adam.step()
    ratio = (p / q).detach()
    assert float(ratio.min()) > 0.45 and float(ratio.max()) < 2.05
    # over a whole factor of 16 the rounding goes both ways: an octave of learning rates on average
    assert float(ratio.log2().mean()) == pytest.approx(0.0, abs=0.25)


def test_weight_decay_shrinks_all_parameters_alike(backend):
    optimizer = conditioned(adapt_steps=3, temperature=0.0, backend=backend, weight_decay=0.5)
    parameters = parameters_of(optimizer)
    for step in range(3):
        for i, p in enumerate(parameters):
            p.grad = torch.full_like(p, 10.0 ** (2 * i - 3) * (step + 1))
        optimizer.step()
    assert len({float(s.max()) for s in scales_of(optimizer)}) > 2
    for p in parameters:
        optimizer.state[p]["momentum_buffer"].zero_()
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    for p, b in zip(parameters, before, strict=True):
        assert torch.allclose(p.detach(), b * (1 - 0.01 * 0.5), rtol=1e-6)


# --------------------------------------------------------------------------------------- the law sampled


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("integrator", ["baoab", "euler"])
def test_curvatures_over_eight_decades_with_one_learning_rate(compiled, seed, weight_decay, integrator):
    """Variances of a harmonic target after the warm-up, T/(N (k + decay/D^2)), and of phi's momentum, T."""
    copies, temperature, num_data, lr = 40_000, 0.5, 20, 0.02
    curvature = torch.logspace(-4, 4, 5)
    torch.manual_seed(seed % 2**63)
    start = torch.randn(copies, 5) * torch.sqrt(temperature / num_data / curvature)
    theta = torch.nn.Parameter(start)
    optimizer = CTLD(
        [theta],
        lr=lr,
        momentum=MOMENTUM,
        weight_decay=weight_decay,
        num_data=num_data,
        temperature=temperature,
        tempering=None,
        integrator=integrator,
        seed=seed,
        backend=compiled,
        preconditioner=RMSPreconditioner(adapt_steps=20),
    )
    for step in range(600):
        theta.grad = curvature * theta.detach()
        optimizer.step()
        if step == 20:  # the same factor for all copies, so that their law is the same
            table = optimizer.state[theta]["preconditioner"]
            table.copy_(table.median(0).values.expand_as(table))
    scale = optimizer.state[theta]["preconditioner"][0].double()
    assert float(scale.max() / scale.min()) >= 16.0
    # phi's curvature: between a tenth and ten for all of them, so that one rate serves
    k = (curvature * scale**2 + weight_decay).double()
    expected = temperature * scale**2 / (num_data * k)
    if integrator == "euler":  # its known bias, method.md section 2
        b = lr * k / (2 * (1 + MOMENTUM))
        expected = expected / (1 - b)
    found = theta.detach().double().square().mean(0)
    # 5.5 standard errors: ten variances in four tests, less than one failure in 10^6 runs by chance
    deviation = (found / expected - 1) / math.sqrt(2 / copies)
    assert float(deviation.abs().max()) < 5.5, deviation


@pytest.mark.parametrize(("temperature", "weight_decay", "exponent"), [(0.1, 0.3, -13), (1e-3, 30.0, -8)])
def test_the_energy_is_that_of_the_coordinates(backend, temperature, weight_decay, exponent):
    optimizer = conditioned(
        adapt_steps=4,
        backend=backend,
        tempering=Tempering(),
        history=20,
        temperature=temperature,
        weight_decay=weight_decay,
    )
    parameters, expected = parameters_of(optimizer), []
    for step in range(12):
        loss = noisy_quadratic(parameters, step)
        before = [p.detach().double() for p in parameters]
        optimizer.step(loss=loss)
        if step < 4:
            continue
        prior = sum(
            0.5 * 10 * weight_decay * float((p / s.double()).square().sum())
            for p, s in zip(before, scales_of(optimizer), strict=True)
        )
        expected.append((10 * float(loss) + prior) / temperature)
    # each of the 500 or so parameters' prior energies is cut to a multiple of a quantum
    found = optimizer.history()["energy"][4:].tolist()
    assert found == pytest.approx(expected, rel=1e-5, abs=500 * 2**exponent)


def test_the_energy_notices_foreign_writes_in_the_coordinates(backend):
    def energies(write):
        optimizer = conditioned(
            adapt_steps=2, backend=backend, tempering=Tempering(), history=9, weight_decay=0.3
        )
        run(optimizer, 5)
        with torch.no_grad():
            for p in parameters_of(optimizer):
                p.mul_(write)
        run(optimizer, 1, first=5)
        return optimizer.history()["energy"][-1]

    assert energies(1.0) != energies(3.0)


# ----------------------------------------------------------------------------------------- the same bits

CASES = {
    "learning": {"adapt_steps": 100},
    "frozen": {"adapt_steps": 10},
    "tempered": {"adapt_steps": 10, "tempering": Tempering(step_size=0.1), "temperature": 0.1},
    "exact": {"adapt_steps": 10, "tempering": Tempering(coupling="exact", step_size=0.1)},
    "finetuning": {"adapt_steps": 10, "explore_steps": 15},
    "euler": {"adapt_steps": 10, "integrator": "euler"},
    "float64": {"adapt_steps": 10, "dtype": torch.float64},
    "bfloat16": {"adapt_steps": 10, "dtype": torch.bfloat16},
    "thermostat": {"adapt_steps": 10, "thermostat": True},
    "chains": {"adapt_steps": 10, "chains": 4, "shapes": [(4, 3), (4, 17)], "tempering": Tempering()},
}


@pytest.mark.parametrize("case", CASES)
def test_the_bits_of_the_reference(processor, case):
    options = CASES[case]
    expected = run(conditioned(**options, backend="reference"), 25)
    actual = run(conditioned(**options, backend=processor), 25)
    assert differing(snapshot(expected), snapshot(actual)) == []
    for a, b in zip(scales_of(expected), scales_of(actual), strict=True):
        assert torch.equal(a, b)


def test_noise_moves_parameters_in_proportion_to_their_factors(backend):
    optimizer = conditioned(
        [(1000,), (1000,)], adapt_steps=1, backend=backend, weight_decay=0.0, lr=1e-4, temperature=1e-6
    )
    a, b = parameters_of(optimizer)
    a.grad, b.grad = torch.full_like(a, 2.0**-12), torch.full_like(b, 1.0)
    optimizer.step()
    assert [float(s.max()) for s in scales_of(optimizer)] == [64.0, 1.0]
    before = [p.detach().clone() for p in (a, b)]
    for _ in range(20):
        a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
        optimizer.step()
    moved = [float((p.detach() - q).std()) for p, q in zip((a, b), before, strict=True)]
    # both of 1000 samples: 5 standard errors
    assert moved[0] / moved[1] == pytest.approx(64.0, rel=5 / math.sqrt(1000))


def test_going_there_and_back_changes_no_bit(backend, seed):
    """Steps below the resolution of all but the smallest parameters, while D moves and when it does not."""
    optimizer = conditioned([(2000,)], adapt_steps=6, temperature=0.0, weight_decay=0.0, backend=backend)
    (p,) = parameters_of(optimizer)
    generator = torch.Generator().manual_seed(seed % 2**63)
    with torch.no_grad():
        # never 0, as randn is once in some 10^7: that would move
        digits = 1.0 + torch.rand(2000, generator=generator)
        digits[::2] *= -1.0
        p.copy_(digits * torch.exp2(torch.linspace(-60, 60, 2000)))
    before = p.detach().clone()
    optimizer.param_groups[0]["lr"] = 1e-30
    for _ in range(12):
        p.grad = torch.randn(2000, generator=generator) * torch.exp2(torch.linspace(-25, 25, 2000))
        optimizer.step()
    assert float(scales_of(optimizer)[0].max() / scales_of(optimizer)[0].min()) >= 16
    moved = (p.detach() - before).abs() / before.abs()
    assert int((moved > 0).sum()) < 40 and float(moved.max()) < 1e-6


def test_other_strides_frozen_and_missing_gradients(processor):
    def made(backend):
        parameters = make_parameters([(6, 4), (5, 3), (7,), (8,)])
        parameters[0] = torch.nn.Parameter(parameters[0].detach().t())
        parameters[2].requires_grad_(False)
        optimizer = CTLD(
            parameters,
            num_data=10,
            tempering=None,
            backend=backend,
            preconditioner=RMSPreconditioner(adapt_steps=3),
        )
        for step in range(8):
            noisy_quadratic(parameters[:3], step)
            parameters[1].grad = parameters[1].grad.t().contiguous().t()
            optimizer.step()
        return optimizer

    expected, actual = made("reference"), made(processor)
    assert differing(snapshot(expected), snapshot(actual)) == []


# ------------------------------------------------------------------------------------- mixed precision


def test_scaled_gradients_teach_the_same(processor):
    plain, scaled = (conditioned(adapt_steps=10, backend=processor) for _ in range(2))
    for step in range(15):
        noisy_quadratic(parameters_of(plain), step)
        plain.step()
        noisy_quadratic(parameters_of(scaled), step)
        for p in parameters_of(scaled):
            p.grad *= 1024.0
        scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
        scaled.step()
        del scaled.grad_scale, scaled.found_inf
    assert differing(snapshot(plain), snapshot(scaled)) == []


def test_a_skipped_step_teaches_nothing(processor):
    optimizer = conditioned(adapt_steps=10, backend=processor)
    run(optimizer, 4)
    before = snapshot(optimizer), [s.clone() for s in scales_of(optimizer)]
    weight = optimizer._coordinates.weight.clone()
    noisy_quadratic(parameters_of(optimizer), 9)
    parameters_of(optimizer)[0].grad[0] = math.inf
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    assert differing(before[0], snapshot(optimizer)) == []
    assert all(map(torch.equal, before[1], scales_of(optimizer)))
    assert torch.equal(weight, optimizer._coordinates.weight)


def test_an_infinite_gradient_teaches_nothing():
    optimizer = conditioned(adapt_steps=10, backend="reference", temperature=0.0)
    run(optimizer, 4)
    noisy_quadratic(parameters_of(optimizer), 9)
    parameters_of(optimizer)[1].grad[0, 0] = math.nan
    optimizer.step()
    assert all(s.isfinite().all() for s in scales_of(optimizer))


# --------------------------------------------------------------------------------------- life of a run


def test_draws_count_after_the_warm_up(backend):
    optimizer = conditioned(adapt_steps=6, backend=backend, tempering=Tempering(settle=0, step_size=1e-6))
    counted = []
    for step in range(9):
        run(optimizer, 1, first=step)
        counted.append(bool(optimizer.tempering_state()["at_target"]))
    assert counted == [False] * 5 + [True] * 4


def test_a_failing_step_leaves_the_parameters(backend, monkeypatch):
    optimizer = conditioned(adapt_steps=2, backend=backend)
    run(optimizer, 5)
    before = snapshot(optimizer)

    def fail(inputs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(optimizer._backend, "explore", fail)
    noisy_quadratic(parameters_of(optimizer), 5)
    with pytest.raises(RuntimeError, match="out of luck"):
        optimizer.step()
    assert differing(before, snapshot(optimizer)) == []


@pytest.mark.parametrize("step", [3, 12])
def test_a_bad_loss_leaves_everything(step):
    optimizer = run(conditioned(adapt_steps=10, tempering=Tempering()), step)
    before = snapshot(optimizer), [s.clone() for s in scales_of(optimizer)], optimizer._coordinates.adapted
    noisy_quadratic(parameters_of(optimizer), 50)
    with pytest.raises(ValueError, match="loss"):
        optimizer.step(loss=torch.zeros(3))
    assert differing(before[0], snapshot(optimizer)) == []
    assert all(map(torch.equal, before[1], scales_of(optimizer)))
    assert optimizer._coordinates.adapted == before[2]


def test_learning_rates_of_zero_teach_nothing():
    optimizer = conditioned(adapt_steps=3, lr=0.0)
    run(optimizer, 5)
    assert optimizer._coordinates.adapting


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"adapt_steps": 0}, "adapt_steps"),
        ({"adapt_steps": 1.5}, "adapt_steps"),
        ({"adapt_steps": True}, "adapt_steps"),
        ({"decay": 1.0}, "decay"),
        ({"decay": -0.1}, "decay"),
        ({"floor": 1.5}, "floor"),
        ({"floor": math.nan}, "floor"),
        ({"floor": "0"}, "floor"),
    ],
)
def test_bad_settings(arguments, words):
    with pytest.raises(ValueError, match=words):
        RMSPreconditioner(**arguments)


def test_bad_use():
    with pytest.raises(TypeError, match="RMSPreconditioner"):
        CTLD(make_parameters([(3,)]), num_data=1, preconditioner=1000)
    with pytest.raises(TypeError, match="float16"):
        conditioned(dtype=torch.float16)
    optimizer = conditioned()
    with pytest.raises(ValueError, match="from the start"):
        optimizer.add_param_group({"params": make_parameters([(3,)])})
    assert len(optimizer.param_groups) == 1
    noisy_quadratic(parameters_of(optimizer), 0)
    with pytest.raises(Exception, match="preconditioner cannot be compiled"):
        torch.compile(lambda: optimizer.step(), backend="eager")()


def test_a_state_without_it_does_not_fit():
    plain = run(two_groups([(4, 3)], tempering=None), 3)
    other = CTLD(
        plain.param_groups[0]["params"], num_data=10, tempering=None, preconditioner=RMSPreconditioner()
    )
    with pytest.raises(ValueError, match="sampler"):
        other.load_state_dict(plain.state_dict())
