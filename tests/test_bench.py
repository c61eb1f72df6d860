"""The benchmark measures what it says: shapes, the vmapped sampler, bookkeeping; no times are judged here."""

import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import require

from ctld_cuda import CTLD, backend_info, reference

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import chains  # noqa: E402
import contestants  # noqa: E402
import cpu  # noqa: E402
import gpu  # noqa: E402
import host  # noqa: E402
import machine  # noqa: E402
import report  # noqa: E402
import shapes  # noqa: E402
import timing  # noqa: E402

CPU = torch.device("cpu")

needs_compiled_cpu = pytest.mark.skipif(
    not backend_info()["cpu"]["usable"], reason="the C++ extension is not built"
)


def few_rounds():
    return timing.rounds_within(0.0, least=2)


# ----------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("generate", "tensors", "numel"),
    [
        (shapes.resnet50, 161, 25_557_032),
        (shapes.vit_b16, 152, 86_567_656),
        (shapes.gpt2_small, 148, 124_439_808),
        (shapes.many_small, 1000, 64_000),
    ],
)
def test_models_have_their_published_number_of_parameters(generate, tensors, numel):
    found = generate()
    assert len(found) == tensors
    assert shapes.numel(found) == numel


def test_the_lstm_has_the_shapes_of_torchs():
    with torch.device("meta"):
        model = torch.nn.LSTM(256, 1024, num_layers=4)
    assert shapes.lstm() == [tuple(p.shape) for p in model.parameters()]


# ----------------------------------------------------------------------------------------------- chains


def test_the_vmapped_sampler_does_what_the_specification_does():
    count, dimension, seed = 40, 3, 5
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    gradient = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    # energies far enough apart to spread alpha over many bins within the test
    losses = 30 * torch.rand(count, generator=generator, dtype=torch.float64)

    parameter = torch.nn.Parameter(theta.clone())
    parameter.grad = gradient
    ours = CTLD(
        [parameter],
        lr=chains.LR,
        momentum=chains.MOMENTUM,
        num_data=1,
        chains=count,
        tempering=chains.TEMPERING,
        seed=seed,
        backend="reference",
    )
    vmapped = chains.VmappedChains(theta, gradient, losses)
    for step in range(300):
        noise = partial(reference.normal, seed, step)
        xi = noise(reference.STREAM_PARAMETERS, 0, theta.numel()).double().view_as(theta)
        vmapped.advance(xi, noise(reference.STREAM_ALPHA, 0, count).double())
        ours.step(loss=losses)

    state = ours._sampler
    visited = vmapped.visits > 0
    assert visited.sum() > 10
    assert torch.equal(vmapped.visits.long(), state.visits)
    for mine, specified in [
        (vmapped.theta, parameter.detach()),
        (vmapped.p, ours.state[parameter]["momentum_buffer"]),
        (vmapped.alpha, state.alpha),
        (vmapped.r, state.alpha_momentum),
        (vmapped.energy_mean, state.energy_mean),
        (vmapped.hills, state.hills),
    ]:
        torch.testing.assert_close(mine, specified, rtol=1e-4, atol=1e-4)


@needs_compiled_cpu
def test_chains_are_compared():
    result = chains.run(8, 3, CPU, timing.CpuClock(), few_rounds)
    assert set(result["samplers"]) == {chains.OURS, chains.VMAPPED}
    assert chains.GRAPH in result["skipped"]
    assert result["samplers"][chains.VMAPPED]["speedup"] == [1.0, 1.0, 1.0]


# ------------------------------------------------------------------------------------------- contestants


def test_the_eager_updates_agree_with_each_other_and_with_ctld(monkeypatch):
    def no_noise(like):
        return torch.zeros_like(like)

    monkeypatch.setattr(torch, "randn_like", no_noise)
    torch.manual_seed(0)
    start = contestants.parameter((7, 3), torch.float64)

    def after(update, steps=5):
        theta, p = start.detach().clone(), torch.zeros_like(start)
        for _ in range(steps):
            update([theta], [p], [start.grad])
        return theta

    def specified(thetas, momenta, gradients):
        k = reference.explore_coefficients(
            "baoab",
            lr=contestants.LR,
            momentum=contestants.MOMENTUM,
            weight_decay=0.0,
            num_data=contestants.NUM_DATA,
            c=chains.constants(1),
        )
        assert k.noise == pytest.approx(contestants.NOISE)
        theta, p = reference.baoab(
            thetas[0],
            momenta[0],
            gradients[0],
            0.0,
            retain=1.0,
            k=k.gradient,
            mu=k.momentum,
            s=k.noise,
            drift=k.drift,
        )
        thetas[0].copy_(theta)
        momenta[0].copy_(p)

    torch.testing.assert_close(after(contestants.langevin_update), after(specified))


def test_the_foreach_update_has_its_own_noise_but_the_same_motion(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    monkeypatch.setattr(torch.Tensor, "normal_", lambda tensor: tensor.zero_())
    torch.manual_seed(0)
    ours, theirs = ([contestants.parameter(n, torch.float32) for n in (5, 3)] for _ in range(2))
    for a, b in zip(ours, theirs, strict=True):
        b.data.copy_(a.data)
        b.grad = a.grad
    for build, parameters in [(contestants.eager, ours), (contestants.eager_foreach, theirs)]:
        step = build(parameters).step
        for _ in range(3):
            step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_failing_peer_is_left_out_with_the_reason():
    @contestants.optional
    def broken(parameters):
        raise ImportError("no such package\nand more")

    with pytest.raises(contestants.Unavailable, match=r"^ImportError: no such package$"):
        broken([])


# ------------------------------------------------------------------------------------------------ clocks


class FakeGpu:
    """Stands in for torch.cuda: a GPU that is done as soon as it is asked."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = time.perf_counter()

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    def __init__(self, monkeypatch):
        self.slept = []
        monkeypatch.setattr(torch.cuda, "Event", self.Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "_sleep", self.slept.append)


def test_short_steps_are_repeated_behind_a_head_start(monkeypatch):
    gpu_stand_in, calls = FakeGpu(monkeypatch), []
    measure = timing.CudaClock().stopwatch(lambda: calls.append(time.sleep(1e-4)))
    calibration = len(calls)
    sample = measure()
    assert len(calls) - calibration > 2 * timing.CudaClock.HOST_STEPS
    assert sample.host >= 1e-4 and sample.device >= 1e-4
    assert len(gpu_stand_in.slept) == 2
    cycles = timing.CudaClock.CYCLES_PER_SECOND
    assert 0 < gpu_stand_in.slept[-1] <= timing.CudaClock.LONGEST_HEAD_START * cycles


def test_steps_that_take_the_host_long_are_done_once_without_a_head_start(monkeypatch):
    gpu_stand_in, calls = FakeGpu(monkeypatch), []
    measure = timing.CudaClock().stopwatch(lambda: calls.append(time.sleep(0.02)))
    before = len(calls)
    measure()
    assert len(calls) - before == 3  # to settle, for the host, for the device
    assert gpu_stand_in.slept == []


def test_throughput_takes_many_short_steps(monkeypatch):
    FakeGpu(monkeypatch)
    ends = [0.0]  # of the steps so far, in seconds of a clock that only they move
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: ends[-1]))
    measure = timing.CudaClock().throughput(lambda: ends.append(ends[-1] + 1e-3))
    before = len(ends)
    assert abs(measure() - 1e-3) < 1e-9
    assert len(ends) - before >= 5


def test_rounds_end_in_time_but_not_too_early():
    assert len(list(timing.rounds_within(0.0, least=3, most=10))) == 3
    assert len(list(timing.rounds_within(60.0, least=3, most=10))) == 10


def test_launches_are_told_apart_by_separators(monkeypatch):
    def event(name, ts, cat="kernel"):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts}

    events = [
        event("before", 0),
        event("at::cuda::spin_kernel(long)", 1),
        event("Memset", 3, "gpu_memset"),
        event("b", 5),
        event("a", 2),
        event("Optimizer.step", 2, "gpu_user_annotation"),
        event("cudaLaunchKernel", 2, "cuda_runtime"),
        event("at::cuda::spin_kernel(long)", 6),
        event("Memcpy", 7, "gpu_memcpy"),
    ]
    assert timing.split_launches(events) == [(2, 1), (0, 1)]

    class Profile:
        def __init__(self, activities):
            assert activities == [timing.ProfilerActivity.CUDA]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def export_chrome_trace(self, path):
            Path(path).write_text(json.dumps({"traceEvents": events}))

    FakeGpu(monkeypatch)
    monkeypatch.setattr(timing, "profile", Profile)
    assert timing.count_launches({"step": int}, repeats=2) == {"step": (0, 0.5)}
    assert timing.count_launches({"step": int, "another": int}) is None


# ---------------------------------------------------------------------------------------- the GPU's harness


def measured(shape_list, dtype=torch.float32, name="tiny"):
    builders = {
        name: build
        for name, build in contestants.on_gpu(dtype).items()
        if name != contestants.COMPILED  # takes a compiler and many seconds
    }
    case = gpu.Case(name, shape_list, dtype)
    return case, builders, gpu.run_case(case, CPU, timing.CpuClock(), builders, few_rounds())


@needs_compiled_cpu
@pytest.mark.parametrize(("dtype", "traffic"), [(torch.float32, 20), (torch.bfloat16, 14)])
def test_a_case_is_measured_on_the_cpu_too(dtype, traffic):
    _, builders, result = measured([(5, 3), (7,)], dtype)
    assert result["numel"] == 22 and result["tensors"] == 2 and result["rounds"] == 2
    assert set(builders) == set(result["contestants"]) | set(result["skipped"])
    ours = result["contestants"][contestants.TEMPERED]
    assert ours["bytes_per_parameter"] == traffic
    assert ours["over_ctld"] == [1.0, 1.0, 1.0]
    copy = result["contestants"][contestants.COPY]
    assert copy["of_copy"] == [1.0, 1.0, 1.0]
    sgd = result["contestants"][contestants.SGD]
    assert sgd["over_sgd"] == [1.0, 1.0, 1.0]


def test_shares_of_the_copy_bandwidth_follow_from_the_times():
    built = {
        name: contestants.Contestant(lambda: None, traffic)
        for name, traffic in [(contestants.COPY, 8), (contestants.SGD, 20), (contestants.TEMPERED, 20)]
    }
    samples = {
        contestants.COPY: [timing.Sample(1.0, 0.1)] * 2,
        contestants.SGD: [timing.Sample(2.5, 0.1)] * 2,
        contestants.TEMPERED: [timing.Sample(5.0, 0.1)] * 2,
    }
    found = gpu.summary(10, built, samples)
    assert found[contestants.SGD]["of_copy"][1] == pytest.approx(1.0)
    assert found[contestants.TEMPERED]["of_copy"][1] == pytest.approx(0.5)
    assert found[contestants.TEMPERED]["over_sgd"][1] == pytest.approx(2.0)
    assert found[contestants.SGD]["over_ctld"][1] == pytest.approx(0.5)
    assert found[contestants.SGD]["bytes_per_second"] == pytest.approx(80.0)


@needs_compiled_cpu
def test_launches_join_the_result(monkeypatch):
    case, builders, result = measured([(4,)])
    monkeypatch.setattr(gpu, "count_launches", lambda steps: {name: timing.Launches(3, 1) for name in steps})
    gpu.add_launches(result, case, CPU, builders, timing.CpuClock())
    assert report.launches(result["contestants"][contestants.SGD]) == "3 + 1"


def out_of_memory(*_):
    raise torch.OutOfMemoryError


def later_out_of_memory(_):
    steps = iter([lambda: None, out_of_memory])
    return contestants.Contestant(lambda: next(steps)(), 1)


@needs_compiled_cpu
@pytest.mark.parametrize("full", [out_of_memory, later_out_of_memory])
def test_what_does_not_fit_is_left_out(full):
    case, builders, _ = measured([(4,)])
    clock = timing.CpuClock()
    result = gpu.run_case(case, CPU, clock, builders | {contestants.ADAM: full}, few_rounds())
    assert result["skipped"][contestants.ADAM] == gpu.NO_ROOM
    assert contestants.ADAM not in result["contestants"]
    result = gpu.run_case(case, CPU, clock, builders | {contestants.SGD: full}, few_rounds())
    gpu.add_launches(result, case, CPU, builders, clock)
    assert "Not measured" in report.case_table(result)


@needs_compiled_cpu
def test_the_whole_run_becomes_a_report(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "CudaClock", timing.CpuClock)
    monkeypatch.setattr(gpu, "SIZES", {"12": 12})
    monkeypatch.setattr(gpu, "MODELS", {"1,000 × 64": partial(shapes.many_small, 10, 4)})
    monkeypatch.setattr(gpu, "count_launches", lambda steps: None)
    monkeypatch.setattr(contestants, "MOST_COMPILED_TENSORS", 0)
    monkeypatch.setattr(chains, "CHAINS", 6)
    for _, found in gpu.run(CPU, 0.0):
        report.write(found, tmp_path)
    stem = tmp_path / report.file_name(found["machine"]["device"])
    written = json.loads(stem.with_suffix(".json").read_text())
    assert [case["case"] for case in written["cases"]] == ["12", "1,000 × 64"] * 2
    assert {bound["where"].partition(" float32")[0] for bound in written["bounds"]} == {
        "1,000 × 64",
        "chains",
    }
    assert "| CTLD |" in stem.with_suffix(".md").read_text(encoding="utf-8")


def one(seconds, host=1.0, of_copy=0.95):
    return {
        "over_sgd": [seconds] * 3,
        "over_ctld": [seconds] * 3,
        "of_copy": [of_copy] * 3,
        "host_seconds": [host] * 3,
    }


def test_bounds_hold_or_do_not():
    large = {
        "case": "100M",
        "dtype": "float32",
        "numel": 10**8,
        "tensors": 1,
        "contestants": {
            contestants.TEMPERED: one(1.0),
            contestants.SGD: one(1.0),
            contestants.ADAM: one(1.4),
            contestants.EAGER: one(4.9),
        },
    }
    small = large | {
        "case": "1,000 × 64",
        "numel": 64_000,
        "contestants": {contestants.TEMPERED: one(0.4, host=2.0), contestants.SGD: one(1.0, host=2.0)},
    }
    sampler = {"samplers": {chains.OURS: {"speedup": [49.0] * 3}}}
    found = report.bounds({"cases": [large, small, large | {"dtype": "bfloat16"}], "chains": sampler})
    assert [bound.holds for bound in found] == [True, True, True, False, False, True, True, False]
    assert found[2].value == pytest.approx(1 / 1.4)
    assert found[4].value is None and "not measured" in str(found[4])
    assert str(found[0]).startswith("pass") and str(found[3]).startswith("MISS")


def test_the_machine_is_described():
    found = machine.describe(CPU)
    assert found["torch"] == torch.__version__
    assert machine.output("no-such-command") is None
    assert report.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_every_gpu_is_listed(monkeypatch):
    values = [f"value {i}" for i in range(len(machine.NVIDIA_SMI_FIELDS))]
    monkeypatch.setattr(machine, "output", lambda *_: "\n".join([", ".join(values)] * 2))
    assert [gpu["driver_version"] for gpu in machine.nvidia_smi()] == ["value 1"] * 2


# ---------------------------------------------------------------------------------------- the CPU benchmark


@needs_compiled_cpu
def test_the_cpu_table_has_every_contestant(monkeypatch):
    monkeypatch.setattr(cpu.Cores, "share", lambda _: 1.0)
    monkeypatch.setenv("CTLD_INSTRUCTION_SET", "")  # restored afterwards; the benchmark sets it
    steps = cpu.contestants(64, torch.float32)
    times, shares = cpu.measure(steps, rounds=2, threads=1)
    kept, said = cpu.undisturbed(times, shares)
    assert shares == [1.0, 1.0] and kept == times and "all rounds" in said
    lines = cpu.table(kept, 64).splitlines()
    assert len(lines) == 2 + len(steps)
    assert all(math.isfinite(t) for own in times.values() for t in own)


def test_only_undisturbed_rounds_are_kept_if_there_are_enough():
    shares = [1.0] * cpu.ENOUGH_ROUNDS + [0.1]
    times = {"step": [float(i) for i in range(len(shares))]}
    kept, said = cpu.undisturbed(times, shares)
    assert kept["step"] == times["step"][:-1]
    assert said.startswith("7 of 8 rounds")


def test_the_host_s_time_is_measured_for_every_case(monkeypatch, capsys):
    require("cpu")
    monkeypatch.setattr(host, "alone_elsewhere", host.alone)
    (case,) = host.main(["--tensors", "3", "--seconds", "0.01"])["cases"]
    assert case["faster"] in (host.SGD, host.ADAMW) and case["allowed"] == 60e-6 + 3 * 0.6e-6
    assert case["ratio"].keys() == case["no kernel"].keys() == host.OPTIONS.keys()
    assert capsys.readouterr().out.count("| 3 |") == 2 + len(host.OPTIONS)
    host.main(["--alone", host.CONSTANT, "--tensors", "3", "--seconds", "0.01"])
    assert len(json.loads(capsys.readouterr().out)) == 3
