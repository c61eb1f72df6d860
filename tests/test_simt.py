"""The CUDA kernels' own source, run on the host, gives the bits of the reference."""

import pytest
import simulated
import torch
from common import differing, make_parameters, run, snapshot, two_groups
from conftest import require

from ctld_cuda import CTLD, AdaptiveForce, Metadynamics, Tempering
from ctld_cuda.layout import Slot

# around noise groups, 16-byte units and chunks (of 512 elements in small models)
SIZES = [(0,), (1,), (3,), (4,), (5,), (7,), (8,), (9,), (511,), (512,), (513,), (1023,), (4099,)]
MOVING = Tempering(step_size=0.1)


def agree(monkeypatch, stepped, oracle="reference", **simulation):
    """Compares ``stepped(backend)``, an optimizer after its steps, on the simulated GPU and the oracle."""
    expected = snapshot(stepped(oracle))
    with monkeypatch.context() as patch:
        simulated.install(patch, **simulation)
        assert differing(expected, snapshot(stepped("cpu"))) == []
    return expected


def compare(monkeypatch, shapes=SIZES, steps=3, blocks=8, resident_blocks=2, make=two_groups, **options):
    def stepped(backend):
        return run(make(shapes, backend=backend, **options), steps)

    return agree(monkeypatch, stepped, blocks=blocks, resident_blocks=resident_blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("integrator", ["baoab", "euler"])
def test_sizes_around_groups_units_and_chunks(monkeypatch, dtype, integrator):
    compare(monkeypatch, dtype=dtype, integrator=integrator, tempering=MOVING)


@pytest.mark.parametrize("stochastic_rounding", [True, False])
@pytest.mark.parametrize("momentum_dtype", [None, torch.bfloat16])
def test_roundings_of_bfloat16(monkeypatch, stochastic_rounding, momentum_dtype):
    options = {"stochastic_rounding": stochastic_rounding, "momentum_dtype": momentum_dtype}
    compare(monkeypatch, dtype=torch.bfloat16, tempering=MOVING, **options)


@pytest.mark.parametrize("bias", [AdaptiveForce(), AdaptiveForce(residual=None), Metadynamics(height=0.05)])
@pytest.mark.parametrize("coupling", ["exact", "standardized"])
def test_couplings_and_biases(monkeypatch, bias, coupling):
    tempering = Tempering(coupling=coupling, bias=bias, step_size=0.1)
    compare(monkeypatch, [(5,), (1023,)], steps=12, tempering=tempering)


def test_without_tempering(monkeypatch):
    compare(monkeypatch, tempering=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_finetuning(monkeypatch, dtype):
    compare(monkeypatch, dtype=dtype, explore_steps=1)


@pytest.mark.parametrize(("blocks", "resident_blocks"), [(1, 1), (8, 1), (8, 8), (16, 3), (24, 5)])
def test_any_launch_shape(monkeypatch, blocks, resident_blocks):
    compare(monkeypatch, [(5000,), (37,), (513,)], 2, blocks, resident_blocks)


def test_the_largest_chunks(monkeypatch):
    compare(monkeypatch, [(8 * 8192 + 5,), (8191,), (8193,)], steps=2)


def misaligned(shapes, **options):
    """Parameters whose memory starts up to 3 elements after a multiple of 16 bytes."""
    parameters = []
    for i, p in enumerate(make_parameters(shapes, dtype=options.pop("dtype", torch.float32))):
        memory = torch.empty(p.numel() + 8, dtype=p.dtype)
        view = memory[i % 4 :][: p.numel()].copy_(p.detach())
        parameters.append(torch.nn.Parameter(view))
    return CTLD(parameters, lr=0.05, weight_decay=0.01, num_data=10, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_misaligned_parameters(monkeypatch, dtype):
    compare(monkeypatch, [(4,), (5,), (513,), (1025,), (40,), (9,)], make=misaligned, dtype=dtype)


def mixed(shapes, momentum_dtype=None, **options):
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    parameters = [p for dtype in dtypes for p in make_parameters(shapes, dtype=dtype)]
    parameters = parameters[::3] + parameters[1::3] + parameters[2::3]
    options |= {"lr": 0.05, "weight_decay": 0.01, "num_data": 10, "momentum_dtype": momentum_dtype}
    return CTLD(parameters, **options)


@pytest.mark.parametrize("momentum_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("explore_steps", [None, 1])
def test_mixed_dtypes(monkeypatch, momentum_dtype, explore_steps):
    shapes = [(0,), (3,), (520,), (9,)]
    compare(monkeypatch, shapes, make=mixed, momentum_dtype=momentum_dtype, explore_steps=explore_steps)


def test_many_tensors(monkeypatch):
    compare(monkeypatch, [(1 + i % 7,) for i in range(950)], steps=2)


def test_more_tensors_than_one_launch_takes(monkeypatch):
    shapes = [(1 + i % 3,) for i in range(4100)]
    # the reference would take minutes
    agree(monkeypatch, lambda backend: run(two_groups(shapes, backend=backend), 2), oracle="cpu")


CHAIN_SHAPES = {chains: [(chains,), (chains, 3), (chains, 5), (chains, 65)] for chains in (3, 7, 37, 300)}


@pytest.mark.parametrize("chains", CHAIN_SHAPES)
@pytest.mark.parametrize("integrator", ["baoab", "euler"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_chains(monkeypatch, chains, integrator, dtype):
    """Few chains are cut into chunks, many are owned by blocks (not in bfloat16)."""
    tempering = Tempering(coupling="exact", step_size=0.1)
    options = {"dtype": dtype, "chains": chains, "integrator": integrator, "tempering": tempering}
    steps = 2 if chains == 300 or dtype == torch.bfloat16 else 4
    compare(monkeypatch, CHAIN_SHAPES[chains][: 2 if chains == 300 else 4], steps, **options)


@pytest.mark.parametrize("chains", [7, 37])
def test_chains_finetuned_and_without_tempering(monkeypatch, chains):
    shapes = CHAIN_SHAPES[chains]
    compare(monkeypatch, shapes, chains=chains, explore_steps=1)
    compare(monkeypatch, shapes, chains=chains, tempering=None)


def test_more_bins_than_a_block_keeps_in_shared_memory(monkeypatch):
    tempering = Tempering(coupling="exact", step_size=0.1, bins=200)
    compare(monkeypatch, [(37, 3)], 4, chains=37, tempering=tempering)


def test_known_energy_noise(monkeypatch):
    tempering = Tempering(coupling="exact", energy_noise=5.0, step_size=0.1)
    compare(monkeypatch, [(20,)], 6, tempering=tempering)


@pytest.mark.parametrize("chains", [None, 12])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 1e4])
def test_nonfinite_values_and_saturation_set_the_same_flags(monkeypatch, value, chains):
    def stepped(backend):
        shapes = [(5,), (700,)] if chains is None else [(chains, 5), (chains, 11)]
        optimizer = two_groups(shapes, backend=backend, tempering=MOVING, chains=chains)
        run(optimizer, 1)
        for p in optimizer.param_groups[1]["params"]:
            p.grad.view(-1)[17] = value
        optimizer.step(loss=torch.ones(chains) if chains else 1.0)
        return optimizer

    assert int(agree(monkeypatch, stepped)["flags"]) != 0


@pytest.mark.parametrize("explore_steps", [None, 0])
def test_every_number(monkeypatch, explore_steps):
    """Every bfloat16 as parameter and gradient; a weight decay, but no energy that could feel it."""

    def stepped(backend):
        every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        p = torch.nn.Parameter(every.clone())
        p.grad = every.flip(0)
        options = {"lr": 0.05, "weight_decay": 0.1, "num_data": 10, "explore_steps": explore_steps}
        optimizer = CTLD([p], tempering=None, backend=backend, **options)
        optimizer.step()
        return optimizer

    agree(monkeypatch, stepped)


def test_unusable_losses_leave_alpha_alone(monkeypatch):
    def stepped(backend):
        optimizer = two_groups([(5,), (70,)], backend=backend, tempering=MOVING)
        run(optimizer, 2)
        optimizer.step(loss=float("nan"))
        optimizer.step(loss=1e300)
        return optimizer

    agree(monkeypatch, stepped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chains", [None, 12])
def test_losses_of_every_type(monkeypatch, dtype, chains):
    def stepped(backend):
        optimizer = two_groups([(chains or 1, 3)], backend=backend, tempering=MOVING, chains=chains)
        for i in range(3):
            run(optimizer, 0)
            loss = torch.linspace(-2.0, 3.3, 12).to(dtype)[: chains or 1] + i
            optimizer.step(loss=loss if chains else loss[0])
        return optimizer

    agree(monkeypatch, stepped)


def test_missing_gradients_frozen_and_foreign_written_parameters(monkeypatch):
    def stepped(backend):
        optimizer = two_groups([(5,), (600,), (7,), (3,)], backend=backend, tempering=MOVING)
        parameters = [p for g in optimizer.param_groups for p in g["params"]]
        run(optimizer, 1)
        parameters[1].grad = None
        optimizer.step(loss=1.0)
        parameters[0].requires_grad_(False)
        optimizer.step(loss=2.0)
        parameters[0].requires_grad_(True)
        with torch.no_grad():
            parameters[2].add_(1.0)
        optimizer.step(loss=1.5)
        optimizer.finetune()
        parameters[3].grad = None
        optimizer.step()
        return optimizer

    agree(monkeypatch, stepped)


def test_unusual_layouts(monkeypatch):
    def make(_shapes, **options):
        a, b, c = make_parameters([(6, 8), (4, 6, 5), (3, 40)])
        parameters = [torch.nn.Parameter(p) for p in (a.detach().t(), b.detach()[:, ::2], c.detach()[:, :7])]
        return CTLD(parameters, lr=0.05, weight_decay=0.01, num_data=10, **options)

    compare(monkeypatch, [], make=make)


def test_resuming_on_the_other_backend(monkeypatch):
    shapes = [(5,), (600,)]
    expected = snapshot(run(two_groups(shapes, backend="reference", tempering=MOVING), 4))
    saved = run(two_groups(shapes, backend="reference", tempering=MOVING), 2)
    simulated.install(monkeypatch)
    resumed = two_groups(shapes, backend="cpu", tempering=MOVING)
    for mine, theirs in zip(resumed.param_groups, saved.param_groups, strict=True):
        for p, q in zip(mine["params"], theirs["params"], strict=True):
            p.detach().copy_(q.detach())
    resumed.load_state_dict(saved.state_dict())
    assert differing(expected, snapshot(run(resumed, 2, first=2))) == []


def test_too_many_groups_are_refused(monkeypatch):
    simulated.install(monkeypatch)
    parameters = make_parameters([(1,)] * 257)
    optimizer = CTLD([{"params": [p]} for p in parameters], num_data=10, backend="cpu")
    before = snapshot_of(parameters)
    with pytest.raises(ValueError, match="256 parameter groups"):
        run(optimizer, 1)
    assert snapshot_of(parameters) == before


def snapshot_of(parameters):
    return [p.tolist() for p in parameters]


@pytest.mark.parametrize("backend", ["cpu", "simulated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"thermostat": True}])
def test_one_rank_s_shards(monkeypatch, backend, dtype, options):
    """Elements that begin anywhere in a noise group, and energies that other ranks count."""
    shapes = [(511,), (1,), (700,), (33, 5), (9,)]
    first = (1027, 6, 3, 2**33 + 5, 8)
    if backend == "simulated":
        simulated.install(monkeypatch)
    else:
        require(backend)

    def final(name):
        optimizer = CTLD(
            make_parameters(shapes, dtype=dtype), weight_decay=0.1, num_data=20, backend=name, **options
        )
        return snapshot(run(optimizer, 4))

    monkeypatch.setattr(Slot, "first", property(lambda slot: first[slot.index]))
    monkeypatch.setattr(Slot, "counted", property(lambda slot: slot.index % 2 == 0))
    shards = final("reference")
    assert differing(shards, final("cpu")) == []
    monkeypatch.setattr(Slot, "counted", True)
    assert "kinetic" in differing(shards, final("cpu"))
    monkeypatch.setattr(Slot, "first", 0)
    assert "parameter 0.0" in differing(shards, final("cpu"))
