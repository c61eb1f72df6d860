"""What only a GPU can show; tests/test_parity.py compares bits, tests/test_simt.py those of the source."""

import copy

import pytest
import torch
from common import bits, differing, everything, make_parameters, noisy_quadratic, run, snapshot, two_groups
from conftest import require

from ctld_cuda import CTLD, Tempering

MOVING = Tempering(step_size=0.1)


@pytest.fixture(autouse=True)
def cuda():
    return require("cuda")


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def live_groups(shapes, **options):
    """Two groups whose learning rates are tensors on the GPU."""
    optimizer = two_groups(shapes, backend="cuda", **options)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64, device="cuda")
    return optimizer


def test_sizes_of_real_models_agree_with_the_reference_on_the_gpu():
    """Both on the GPU: the reference's operations are exact there too."""
    shapes = [(64, 3, 7, 7), (64,), (512, 512, 3, 3), (1000, 2048), (1000,), (8193,), (3, 5, 7)]

    def stepped(backend):
        parameters = make_parameters(shapes, device="cuda")
        optimizer = CTLD(
            parameters, lr=0.05, weight_decay=0.01, num_data=10, backend=backend, tempering=MOVING
        )
        return snapshot(run(optimizer, 3))

    assert differing(stepped("reference"), stepped("cuda")) == []


@pytest.mark.parametrize("chains", [3, 1000, 20_000])
def test_any_number_of_chains(chains):
    shapes = [(chains, 10), (chains,), (chains, 3)]
    options = {"chains": chains, "tempering": Tempering(coupling="exact", step_size=0.1)}
    expected = snapshot(run(two_groups(shapes, backend="cpu", **options), 5))
    assert differing(expected, snapshot(run(two_groups(shapes, backend="cuda", **options), 5))) == []


def test_mixed_dtypes_and_roundings():
    def stepped(backend):
        dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
        device = "cuda" if backend == "cuda" else "cpu"
        parameters = [p for d in dtypes for p in make_parameters([(5,), (5000,)], dtype=d, device=device)]
        optimizer = CTLD(
            parameters,
            lr=0.05,
            num_data=10,
            backend=backend,
            momentum_dtype=torch.bfloat16,
            weight_decay=0.01,
        )
        return snapshot(run(optimizer, 5))

    assert differing(stepped("cpu"), stepped("cuda")) == []


@pytest.mark.parametrize("phase", ["explore", "finetune"])
def test_replaying_a_graph_is_stepping(phase):
    shapes = [(5,), (5000,), (70_000,)]

    def prepared():
        optimizer = live_groups(shapes, tempering=MOVING, history=64)
        for p in parameters_of(optimizer):
            p.grad = torch.full_like(p, 0.01)
        loss = torch.full((), 1.0, device="cuda")
        for _ in range(3):
            optimizer.step(loss=loss)
        if phase == "finetune":
            optimizer.finetune()
            optimizer.step()
        return optimizer, loss

    def change(optimizer, loss, i):
        """What differs from step to step, in place."""
        loss.fill_(1.0 + 0.1 * i)
        for p in parameters_of(optimizer):
            p.grad.mul_(-0.9)
        optimizer.param_groups[0]["lr"].fill_(0.05 / (1 + i))

    eager, loss = prepared()
    for i in range(100):
        change(eager, loss, i)
        eager.step(loss=loss)
    expected = snapshot(eager)

    replayed, loss = prepared()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        replayed.step(loss=loss)
    for i in range(100):
        change(replayed, loss, i)
        graph.replay()
    torch.cuda.synchronize()
    assert differing(expected, snapshot(replayed)) == []


def test_capturing_too_early_is_refused():
    optimizer = two_groups([(5,)], backend="cuda", tempering=None)
    noisy_quadratic(parameters_of(optimizer), 0)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="one step before"), torch.cuda.graph(graph):
        optimizer.step()


def test_counting_steps_in_a_graph_is_refused():
    optimizer = run(two_groups([(5,)], backend="cuda", tempering=None, explore_steps=10), 1)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="explore_steps"), torch.cuda.graph(graph):
        optimizer.step()


@pytest.mark.parametrize("tempering", [None, MOVING])
def test_a_step_never_waits_for_the_host(tempering):
    optimizer = live_groups([(5,), (5000,)], tempering=tempering, weight_decay=0.1, history=4)
    run(optimizer, 2)
    loss = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step(loss=loss)
        optimizer.found_inf, optimizer.grad_scale = (
            torch.zeros((), device="cuda"),
            torch.ones((), device="cuda"),
        )
        optimizer.step(loss=loss)
        optimizer.tempering_state()
        optimizer.finetune()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_one_launch_per_step():
    optimizer = two_groups([(64,)] * 1000, backend="cuda", tempering=MOVING, history=4)
    run(optimizer, 2)
    loss = torch.ones((), device="cuda")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            optimizer.step(loss=loss)
        torch.cuda.synchronize()
    launches = [event for event in profile.events() if event.device_type == torch.profiler.DeviceType.CUDA]
    assert len(launches) == 3, [event.name for event in launches]


def test_another_stream():
    expected = snapshot(run(two_groups([(5000,)], backend="cuda", tempering=MOVING), 5))
    optimizer = two_groups([(5000,)], backend="cuda", tempering=MOVING)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(optimizer, 5)
    torch.cuda.current_stream().wait_stream(stream)
    assert differing(expected, snapshot(optimizer)) == []


def test_a_gpu_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("only one GPU")
    expected = snapshot(run(two_groups([(5000,)], backend="cuda"), 3))
    parameters = make_parameters([(5000,)], device="cuda:1")
    optimizer = CTLD([{"params": parameters, "lr": 0.05, "weight_decay": 0.01}], num_data=10, backend="cuda")
    assert differing(expected, snapshot(run(optimizer, 3))) == []
    assert torch.cuda.current_device() == 0


def test_grad_scaler_skips_on_the_device():
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=1000)
    optimizer = two_groups([(500,)], backend="cuda", tempering=MOVING)
    plain = two_groups([(500,)], backend="cuda", tempering=MOVING)
    for step in range(4):
        for o, scale in ((optimizer, scaler.get_scale()), (plain, 1.0)):
            loss = noisy_quadratic(parameters_of(o), step)
            for p in parameters_of(o):
                p.grad.mul_(scale)
            if o is plain:
                if step != 2:
                    o.step(loss=loss)
                continue
            if step == 2:
                parameters_of(o)[0].grad[7] = float("inf")
            scaler.scale(loss)  # makes the scaler's tensors
            scaler.step(o, loss=loss)
            scaler.update()
    assert scaler.get_scale() == 512.0
    assert differing(snapshot(plain), snapshot(optimizer)) == []


def test_the_root_is_exact_for_every_radius():
    """Normals are compared with the CPU's over many draws: all mantissas of the logarithm occur."""
    from ctld_cuda.reference import normal

    numel = 1 << 22
    on_gpu = torch.zeros(numel, device="cuda")
    p = torch.nn.Parameter(on_gpu)
    p.grad = torch.zeros_like(p)
    optimizer = CTLD(
        [p], lr=1.0, momentum=0.0, num_data=1, tempering=None, integrator="euler", backend="cuda"
    )
    for step in range(4):
        optimizer.step()
        momentum = optimizer.state[p]["momentum_buffer"]
        assert torch.equal(bits(momentum), bits(normal(0, step, 0, 0, numel)))


def test_copies_continue_alike():
    optimizer = run(two_groups([(5,), (5000,)], backend="cuda", tempering=MOVING), 3)
    other = copy.deepcopy(optimizer)
    assert differing(snapshot(run(optimizer, 3, first=3)), snapshot(run(other, 3, first=3))) == []


def test_a_state_moves_between_processors():
    expected = snapshot(run(two_groups([(5,), (5000,)], backend="cuda", tempering=MOVING), 6))
    saved = run(two_groups([(5,), (5000,)], backend="cuda", tempering=MOVING), 3)
    resumed = two_groups([(5,), (5000,)], backend="cpu", tempering=MOVING)
    for p, q in zip(parameters_of(resumed), parameters_of(saved), strict=True):
        p.detach().copy_(q.detach())
    resumed.load_state_dict(saved.state_dict())
    assert differing(expected, snapshot(run(resumed, 3, first=3))) == []
    assert everything(resumed)["alpha"].device.type == "cpu"
