"""Posterior draws: what is collected, kept and stored, across interruptions; refusals.

What is done with draws is in test_posterior_use.py. Statistical checks are bounded in standard errors,
as laws.py says; this file makes 15 comparisons.
"""

import io
import json
import math
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from common import make_parameters
from laws import check, repeat

from ctld_cuda import CTLD, Tempering
from ctld_cuda.posterior import PosteriorSamples
from ctld_cuda.posterior import files as draw_files
from ctld_cuda.posterior.draws import Draws
from ctld_cuda.posterior.store import priorities

FAST = Tempering(coupling="exact", step_size=0.2)  # alpha comes and goes within some steps


def chained(chains=4, seed=0, **options):
    """Named parameters of some chains and their optimizer."""
    parameters = make_parameters([(chains, 3), (chains, 2, 2)])
    options = {"tempering": FAST, "num_data": 10, "chains": chains, "seed": seed} | options
    return dict(zip("ab", parameters, strict=True)), CTLD(parameters, **options)


def quadratic(named):
    """Sets the gradients; the loss of each chain."""
    loss = 0.0
    for p in named.values():
        p.grad = p.detach() * 0.5
        loss = loss + 0.25 * p.detach().square().flatten(1).sum(1)
    return loss


def advance(named, optimizer, samples, steps, watch=None, first=0):
    for step in range(first, first + steps):
        optimizer.step(loss=quadratic(named))
        if watch:
            watch(step + 1)
        if samples is not None:
            samples.collect()


def contents(draws):
    """All draws as comparable values: columns and parameters."""
    parameters = [draws[i] for i in range(len(draws))]
    return {n: c.tolist() for n, c in draws.columns().items() if n != "energy"}, [
        {n: p.tolist() for n, p in d.items()} for d in parameters
    ]


def same(a, b):
    return contents(a) == contents(b)


# ------------------------------------------------------------------------------------------ what is taken


@pytest.mark.parametrize(
    ("options", "thin", "burn_in"),
    [
        ({}, 1, 0),
        ({"at_target_only": False}, 3, 0),
        ({}, 7, 40),
        ({"tempering": Tempering(step_size=0.2, settle=3)}, 2, 11),
        ({"tempering": None}, 5, 0),
        ({"explore_steps": 60, "at_target_only": False}, 1, 0),
    ],
)
def test_what_is_collected(options, thin, burn_in, seed):
    """Chains at the target, at steps that are multiples of thin, while exploring: against a plain record."""
    only = options.pop("at_target_only", True)
    named, optimizer = chained(seed=seed, **options)
    samples = PosteriorSamples(named, optimizer, thin, only, burn_in=burn_in)
    expected = []

    def watch(step):
        state = optimizer.tempering_state()
        if step % thin or step <= burn_in or optimizer.phase != "explore":
            return
        for c in range(4):
            if state["at_target"][c] or not only:
                row = (step, c, *(float(state[n][c]) for n in ("alpha", "temperature", "at_target")))
                expected.append((row, {n: p.detach()[c].clone() for n, p in named.items()}))

    advance(named, optimizer, samples, 400, watch)
    found = samples.columns()
    rows = list(
        zip(*(found[n].tolist() for n in ("step", "chain", "alpha", "temperature", "at_target")), strict=True)
    )
    assert rows == [row for row, _ in expected] and len(rows) > 0, repeat(seed)
    assert np.isnan(found["energy"]).all()
    for mine, (_, theirs) in zip(samples, expected, strict=True):
        assert all(torch.equal(mine[n], theirs[n]) for n in named)
    stacked = [b["a"] for b in samples.batches(size=7, names=["a"])]
    assert torch.equal(torch.cat(stacked), torch.stack([theirs["a"] for _, theirs in expected]))
    assert torch.equal(samples[-1]["b"], expected[-1][1]["b"])


def test_the_device_is_looked_at_every_thin_steps(monkeypatch):
    named, optimizer = chained()
    samples = PosteriorSamples(named, optimizer, thin=10, burn_in=50)
    looks = []
    original = optimizer.tempering_state
    monkeypatch.setattr(optimizer, "tempering_state", lambda: looks.append(1) or original())
    advance(named, optimizer, samples, 200)
    assert len(looks) == 1 + 15  # the first call finds out which step it is


def test_skipped_steps_do_not_count():
    """Steps that a GradScaler skips are no steps, so the draws are those of a run without them."""
    runs = []
    for skip in (set(), {3, 10, 11, 12, 25}):
        named, optimizer = chained(tempering=None)
        samples = PosteriorSamples(named, optimizer, thin=4)
        for call in range(60 + len(skip)):
            optimizer.found_inf = torch.tensor(float(call in skip))
            optimizer.step(loss=quadratic(named))
            samples.collect()
        runs.append(samples)
    assert same(*runs) and set(runs[0].columns()["step"]) == set(range(4, 61, 4))


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
        self.second = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
        self.second.weight = self.first.weight
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        self.conv = torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.second(self.first(x)).float() * self.frozen.sum()


def test_a_module_with_tied_frozen_and_bfloat16_parameters():
    """Collected by a hook; tied weights are stored once, frozen ones not at all, all in their own types."""
    model = Tied()
    optimizer = CTLD([p for p in model.parameters() if p.requires_grad], num_data=5, tempering=None)
    samples = PosteriorSamples(model, optimizer)
    optimizer.register_step_post_hook(samples)
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    outputs = []
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        outputs.append(model(x).detach())
    assert set(samples[0]) == {"first.weight", "first.bias", "second.bias", "conv.weight", "conv.bias"}
    assert samples[2]["first.weight"].dtype == torch.bfloat16
    assert all(torch.equal(p, samples[2][n]) for n, p in model.named_parameters() if p.requires_grad)
    assert torch.equal(samples.predict(x, return_draws=True, vectorize=False)[1], torch.stack(outputs))


# --------------------------------------------------------------------------------------------- at most keep


def test_keep_is_a_uniform_sample(seed):
    """The draws with the smallest priorities of all that were taken: equal chances, also for early ones."""
    named, optimizer = chained(tempering=None, seed=seed)
    everything = PosteriorSamples(named, optimizer)
    several = [PosteriorSamples(named, optimizer, keep=20, seed=seed + i) for i in range(40)]

    def collect(step):
        for samples in several:
            samples.collect()
            assert len(samples) == min(20, 4 * step)

    advance(named, optimizer, everything, 100, collect)
    all_columns = everything.columns()
    counts = np.zeros(10)
    for i, samples in enumerate(several):
        rank = priorities(seed + i, all_columns["step"], all_columns["chain"])
        chosen = np.sort(np.argsort(rank)[:20])
        found = samples.columns()
        for name in ("step", "chain"):
            assert found[name].tolist() == all_columns[name][chosen].tolist()
        assert torch.equal(samples[7]["a"], everything[int(chosen[7])]["a"])
        assert samples._store._stored <= 20 + 20 // 16
        counts += np.bincount((found["step"] - 1) // 10, minlength=10)
    # 800 draws in 10 bins; without replacement the variance is smaller, by 0.95
    z = (counts - 80.0) / math.sqrt(800 * 0.1 * 0.9 * 0.95)
    check({f"bin {i}": value for i, value in enumerate(z)}, seed)


def test_priorities_are_uniform_and_depend_on_everything(seed):
    step, chain = np.repeat(np.arange(300), 100), np.tile(np.arange(100), 300)
    p = priorities(seed, step, chain)
    assert len(set(p.tolist())) == len(p) and p.min() >= 0 and p.max() < 2**62
    u = p / 2**62
    n = len(u)
    other = priorities(seed ^ 2**40, step, chain) / 2**62
    deviations = {
        "mean": (u.mean() - 0.5) * math.sqrt(12 * n),
        "variance": (u.var() * 12 - 1) * math.sqrt(n / 0.8),
        "next chain": ((u[1:] - 0.5) * (u[:-1] - 0.5)).mean() * 12 * math.sqrt(n),
        "next step": ((u[100:] - 0.5) * (u[:-100] - 0.5)).mean() * 12 * math.sqrt(n),
        "other seed": ((u - 0.5) * (other - 0.5)).mean() * 12 * math.sqrt(n),
    }
    check(deviations, seed)


# --------------------------------------------------------------------------------------------- interruption


def saved(named, optimizer, samples=None):
    """A checkpoint as a file's content."""
    content = {"parameters": {n: p.detach() for n, p in named.items()}, "optimizer": optimizer.state_dict()}
    if samples is not None:
        content["samples"] = samples.state_dict()
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def loaded(checkpoint, **options):
    content = torch.load(io.BytesIO(checkpoint), weights_only=True)
    named, optimizer = chained(**options)
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(content["parameters"][name])
    optimizer.load_state_dict(content["optimizer"])
    return named, optimizer, content.get("samples")


@pytest.mark.parametrize("keep", [None, 25])
@pytest.mark.parametrize("where", [0, 61, 62, 100])
def test_resuming_in_memory(keep, where, seed):
    """state_dict through a file, at multiples of thin or not: the same draws as without interruption."""
    options = dict(thin=2, keep=keep)
    named, optimizer = chained(seed=seed)
    whole = PosteriorSamples(named, optimizer, **options)
    advance(named, optimizer, whole, 150)

    named, optimizer = chained(seed=seed)
    first = PosteriorSamples(named, optimizer, **options)
    advance(named, optimizer, first, where)
    checkpoint = saved(named, optimizer, first)
    named, optimizer, state = loaded(checkpoint)
    second = PosteriorSamples(named, optimizer, **options)
    second.load_state_dict(state)
    assert same(first, second)
    advance(named, optimizer, second, 150 - where, first=where)
    assert same(second, whole), repeat(seed)


class Killed(BaseException):
    pass


def run_with_kills(folder, kill_at, keep, monkeypatch):
    """A run of 40 steps with a checkpoint at step 15, that dies at the kill_at-th system call and resumes.

    Returns whether it died at all, and the draws.
    """
    calls = 0

    def dying(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                raise Killed
            return function(*args, **kwargs)

        return call

    options = dict(thin=1, keep=keep, path=folder, shard_draws=12)
    named, optimizer = chained()
    checkpoint, died = saved(named, optimizer), 0
    with monkeypatch.context() as patch:
        patch.setattr(draw_files.os, "fsync", dying(lambda file: None))  # takes long and changes nothing here
        patch.setattr(draw_files.os, "replace", dying(os.replace))
        patch.setattr(draw_files.Path, "unlink", dying(Path.unlink))
        try:
            samples = PosteriorSamples(named, optimizer, **options)
            advance(named, optimizer, samples, 15)
            samples.flush()
            checkpoint, died = saved(named, optimizer), 15
            advance(named, optimizer, samples, 25, first=15)
            samples.flush()
            return False, samples
        except Killed:
            pass
    named, optimizer, _ = loaded(checkpoint)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "there are draws up to step")
        samples = PosteriorSamples(named, optimizer, **options)
        advance(named, optimizer, samples, 40 - died, first=died)
    samples.flush()
    return True, samples


@pytest.mark.parametrize("keep", [None, 20])
def test_killed_at_any_call(keep, tmp_path, monkeypatch):
    """Whichever system call is the last, the folder opens again and ends with the draws of a whole run."""
    pytest.importorskip("safetensors", reason="draws in files need safetensors")
    named, optimizer = chained()
    whole = PosteriorSamples(named, optimizer, keep=keep)
    advance(named, optimizer, whole, 40)
    kill_at, killed = 0, True
    while killed:
        kill_at += 1
        folder = tmp_path / str(kill_at)
        killed, samples = run_with_kills(folder, kill_at, keep, monkeypatch)
        assert same(samples, whole), kill_at
        assert same(Draws.open(folder), whole), kill_at
        names = {f.name for f in folder.iterdir()}
        assert names == {"index.json", *json.loads((folder / "index.json").read_text())["shards"]}, kill_at
    assert kill_at > 20


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
from test_posterior import advance, chained
from ctld_cuda.posterior import files as draw_files
from ctld_cuda.posterior import PosteriorSamples
torch.set_num_threads(1)
named, optimizer = chained()
samples = PosteriorSamples(named, optimizer, path={path!r}, shard_draws=10)
shards = 0
write = draw_files._safetensors().torch.save_file
def half_then_die(content, path):
    global shards
    shards += 1
    write(content, path)
    if shards == 4:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
draw_files._safetensors().torch.save_file = half_then_die
advance(named, optimizer, samples, 200)
"""


def test_a_process_killed_while_writing(tmp_path):
    """SIGKILL with half a shard in the temporary file: the three shards before it are there."""
    pytest.importorskip("safetensors", reason="draws in files need safetensors")
    folder = tmp_path / "draws"
    script = KILLED.format(tests=str(Path(__file__).parent), path=str(folder))
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert len(list(folder.glob("*.tmp"))) == 1
    named, optimizer = chained()
    whole = PosteriorSamples(named, optimizer)
    advance(named, optimizer, whole, 60)
    before = Draws.open(folder)
    assert len(before) >= 30
    named, optimizer = chained()
    samples = PosteriorSamples(named, optimizer, path=folder, shard_draws=10)
    assert not list(folder.glob("*.tmp")) and len(samples) == len(before)
    with pytest.warns(RuntimeWarning, match="there are draws up to step"):
        advance(named, optimizer, samples, 60)
    assert same(samples, whole)


def test_files_hold_what_memory_holds(tmp_path):
    """The same draws on both ways, while shards are written and dropped ones removed; room is bounded."""
    pytest.importorskip("safetensors", reason="draws in files need safetensors")
    named, optimizer = chained(tempering=None)
    memory = PosteriorSamples(named, optimizer, keep=50)
    with PosteriorSamples(named, optimizer, keep=50, path=tmp_path / "draws", shard_draws=16) as files:
        for _ in range(6):
            first = int(optimizer._sampler.step)
            advance(named, optimizer, memory, 50, lambda step: files.collect(), first)
            # what is in files is read although the newest draws are not in one yet
            assert same(memory, files)
            stored = sum(len(block) for block in files._store._blocks)
            assert stored <= 2 * 50 + 16
    reader = Draws.open(tmp_path / "draws")
    assert same(reader, memory) and len(list((tmp_path / "draws").iterdir())) < 20
    assert not hasattr(reader, "collect")


def test_one_shard_is_read_at_a_time(tmp_path, monkeypatch):
    pytest.importorskip("safetensors", reason="draws in files need safetensors")
    named, optimizer = chained(tempering=None)
    with PosteriorSamples(named, optimizer, path=tmp_path, shard_draws=40) as samples:
        advance(named, optimizer, samples, 50)
    reads = []
    original = draw_files.DrawFiles._read
    monkeypatch.setattr(draw_files.DrawFiles, "_read", lambda *a: reads.append(a[1]) or original(*a))
    assert len(list(samples.batches(size=7))) == 29
    assert len(reads) == len(set(reads)) == 5


# ---------------------------------------------------------------------------------------------- refusals

REFUSED = {
    "thin 0": (dict(thin=0), ValueError, "thin"),
    "thin 1.5": (dict(thin=1.5), TypeError, "thin"),
    "keep 0": (dict(keep=0), ValueError, "keep"),
    "keep": (dict(keep="all"), TypeError, "keep"),
    "burn_in": (dict(burn_in=-1), ValueError, "burn_in"),
    "seed": (dict(seed=-1), ValueError, "seed"),
    "shard_draws": (dict(shard_draws=0), ValueError, "shard_draws"),
    "at_target_only": (dict(at_target_only=1), TypeError, "at_target_only"),
    "loss": (dict(loss=torch.tensor(1.0)), TypeError, "callable"),
    "optimizer": (dict(optimizer=torch.optim.SGD([torch.zeros(1)], 0.1)), TypeError, "CTLD"),
    "model": (dict(model=[torch.zeros(1)]), TypeError, "Module or a mapping"),
    "a stranger": (dict(model=torch.nn.Linear(2, 2)), ValueError, "does not have the model's"),
    "a nameless one": (dict(model={}), ValueError, "not the model's"),
    "no tensor": (dict(model={"a": 1.0}), TypeError, "names to tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    options, error, message = REFUSED[case]
    named, optimizer = chained()
    with pytest.raises(error, match=message):
        PosteriorSamples(**({"model": named, "optimizer": optimizer, "path": tmp_path / "draws"} | options))
    assert not (tmp_path / "draws").exists()


def test_two_names_for_one_tensor():
    named, optimizer = chained()
    with pytest.raises(ValueError, match="two names"):
        PosteriorSamples(named | {"c": named["a"]}, optimizer)


def other_shape():
    p = make_parameters([(4, 3), (4, 2)])
    return dict(zip("ab", p, strict=True)), CTLD(p, num_data=10, chains=4, tempering=FAST)


def other_dtype():
    p = make_parameters([(4, 3), (4, 2, 2)], dtype=torch.float64)
    return dict(zip("ab", p, strict=True)), CTLD(p, num_data=10, chains=4, tempering=FAST)


def other_name():
    named, optimizer = chained()
    return {"a": named["a"], "c": named["b"]}, optimizer


ANOTHER = {
    "chains": (lambda: chained(5), {}, "chains was 4, is 5"),
    "coupling": (lambda: chained(tempering=Tempering()), {}, "coupling"),
    "temperature": (lambda: chained(temperature=0.5), {}, "temperature"),
    "shape": (other_shape, {}, r"b was .*\(2, 2\)"),
    "dtype": (other_dtype, {}, "float32.*float64"),
    "names": (other_name, {}, "c was None"),
    "keep": (chained, dict(keep=3), "keep was 100, is 3"),
    "thin": (chained, dict(thin=2), "thin"),
}


@pytest.mark.parametrize("case", ANOTHER)
def test_draws_of_something_else(case, tmp_path):
    make, options, message = ANOTHER[case]
    named, optimizer = chained()
    samples = PosteriorSamples(named, optimizer, keep=100)
    advance(named, optimizer, samples, 30)
    state = samples.state_dict()
    others = PosteriorSamples(*make(), **({"keep": 100} | options))
    with pytest.raises(ValueError, match=message):
        others.load_state_dict(state)
    assert len(others) == 0
    pytest.importorskip("safetensors", reason="draws in files need safetensors")
    PosteriorSamples(*chained(), keep=100, path=tmp_path)
    before = (tmp_path / "index.json").read_text()
    with pytest.raises(ValueError, match=message):
        PosteriorSamples(*make(), **({"keep": 100, "path": tmp_path} | options))
    assert (tmp_path / "index.json").read_text() == before


def test_damaged_folders(tmp_path):
    pytest.importorskip("safetensors", reason="draws in files need safetensors")
    named, optimizer = chained(tempering=None)
    with PosteriorSamples(named, optimizer, path=tmp_path, shard_draws=10) as samples:
        advance(named, optimizer, samples, 10)
    with pytest.raises(RuntimeError, match="flush"):
        samples.state_dict()
    with pytest.raises(RuntimeError, match="same path"):
        samples.load_state_dict({})
    with pytest.raises(ValueError, match="holds no draws"):
        Draws.open(tmp_path / "nothing")
    shard = sorted(tmp_path.glob("draws-*"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        Draws.open(tmp_path)
    shard.unlink()
    with pytest.raises(RuntimeError, match="is gone"):
        Draws.open(tmp_path)
    (tmp_path / "index.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="not an index of draws of format"):
        Draws.open(tmp_path)
    (tmp_path / "index.json").unlink()
    with pytest.raises(ValueError, match="choose another folder"):
        PosteriorSamples(named, optimizer, path=tmp_path)


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"ctld_cuda\[posterior\]"):
        PosteriorSamples(*chained(), path=tmp_path / "draws")
