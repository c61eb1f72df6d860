"""What the processes of tests/ranks.py run. Tensors come back as numpy arrays of their bits."""

from __future__ import annotations

import copy
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import bits, make_parameters, noisy_quadratic
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ctld_cuda import CTLD, RMSPreconditioner

# rows that 2 and 4 do not divide, shards that begin within a noise group, empty shards
SHAPES = [(10, 3), (7,), (1, 5), (65, 37), (6, 2, 2), (3,), (4, 4)]
PLACEMENTS = {
    "shards": (Shard(0),),
    "replicas": (Replicate(),),
    "hybrid": (Replicate(), Shard(0)),
    "shards of shards": (Shard(0), Shard(0)),
}


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def outcome(optimizer):
    """Bits of all parameters, momenta and the sampler, as numpy arrays, by name."""
    found = {}
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            found[f"parameter {g}.{i}"] = whole(p.detach())
            found[f"momentum {g}.{i}"] = whole(optimizer.state[p]["momentum_buffer"])
    found |= {name: x for name, x in optimizer._sampler.all_tensors().items() if name != "prior"}
    return {name: bits(x).numpy() for name, x in found.items()}


def grouped(parameters, options):
    """Two parameter groups with different settings."""
    options = dict(options)
    seed, steps = options.pop("seed", 5), options.pop("steps", None)
    groups = [{"params": parameters[:4]}, {"params": parameters[4:], "lr": 0.02, "weight_decay": 0.1}]
    return CTLD(groups, lr=0.05, num_data=20, seed=seed, explore_steps=steps, **options)


def step(optimizer, parameters, t, place=lambda gradient, p: gradient):
    """One step on a loss and gradients that depend on the values of the whole parameters only."""
    full = [nn.Parameter(whole(p.detach()).clone()) for p in parameters]
    loss = noisy_quadratic(full, t)
    for p, q in zip(parameters, full, strict=True):
        p.grad = place(q.grad, p)
    optimizer.step(loss=loss)


def alone(steps, options, dtype=torch.float32):
    """The trajectory of one process with plain tensors."""
    parameters = make_parameters(SHAPES, dtype=dtype)
    optimizer = grouped(parameters, options)
    for t in range(steps):
        step(optimizer, parameters, t)
    return outcome(optimizer)


def mesh_for(placements):
    size = dist.get_world_size()
    shape = (size,) if len(placements) == 1 else (2, size // 2)
    return init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])


def place(gradient, p):
    if not isinstance(p, DTensor):
        return gradient
    return distribute_tensor(gradient, p.device_mesh, p.placements, src_data_rank=None)


def sharded_parameters(kind, dtype, plain=()):
    """Parameters as DTensors, except those whose position is in ``plain``."""
    placements = PLACEMENTS[kind]
    mesh = mesh_for(placements)
    return [
        p if i in plain else nn.Parameter(distribute_tensor(p.detach(), mesh, placements, src_data_rank=None))
        for i, p in enumerate(make_parameters(SHAPES, dtype=dtype))
    ]


def together(steps, options, kind="shards", dtype=torch.float32, plain=()):
    """The trajectory of all ranks."""
    parameters = sharded_parameters(kind, dtype, plain)
    optimizer = grouped(parameters, options)
    for t in range(steps):
        step(optimizer, parameters, t, place)
    return outcome(optimizer)


def part_of_rows(kind):
    """(first, local elements) that CTLD and torch each find for shards of all shapes."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    from ctld_cuda.distributed import slot_of

    ours, torchs = [], []
    for p in sharded_parameters(kind, torch.float32):
        slot = slot_of(p, None, 0, 0, 1)
        ours.append((slot.first if slot.parameter.numel() else 0, slot.parameter.numel()))
        shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
        numel = torch.Size(shape).numel()
        torchs.append((offset[0] * (p.numel() // p.shape[0]) if numel else 0, numel))
    return ours, torchs


# -------------------------------------------------------------------------------------------- models


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 13), nn.Tanh(), nn.Linear(13, 6), nn.Tanh(), nn.Linear(6, 3))


def batch(t, rank=0):
    generator = torch.Generator().manual_seed(100 * t + rank)
    return torch.randn(16, 5, generator=generator), torch.randint(3, (16,), generator=generator)


def train(model, optimizer, steps, first=0, rank=0):
    for t in range(first, first + steps):
        inputs, labels = batch(t, rank)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step(loss=loss.detach())


def optimizer_of(model, **options):
    return CTLD(model.parameters(), **{"lr": 0.05, "num_data": 100, "weight_decay": 0.01, **options})


def sharded_network():
    model = network()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def fsdp(steps, **options):
    """All ranks train on the same batches, so that the mean gradient is every rank's."""
    model = sharded_network()
    optimizer = optimizer_of(model, **options)
    train(model, optimizer, steps)
    return outcome(optimizer)


def plain_training(steps, **options):
    model = network()
    optimizer = optimizer_of(model, **options)
    train(model, optimizer, steps)
    return outcome(optimizer)


def ddp(steps, options, lr=None):
    """Every rank trains on batches of its own; returns the outcome and the loss of each of its steps."""
    model = DistributedDataParallel(network())
    optimizer = optimizer_of(model, **options)
    if lr is not None:
        for t, value in enumerate(lr):
            optimizer.param_groups[0]["lr"] = value
            train(model, optimizer, 1, t, dist.get_rank())
    else:
        train(model, optimizer, steps, rank=dist.get_rank())
    return outcome(optimizer)


def mean_of_ranks(steps, ranks, options):
    """What ddp does, by one process: the ranks' losses and gradients one after the other."""
    model = network()
    optimizer = optimizer_of(model, **options)
    for t in range(steps):
        gradients, losses = [], []
        for rank in range(ranks):
            inputs, labels = batch(t, rank)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            losses.append(loss.detach().double())
            gradients.append([p.grad.clone() for p in model.parameters()])
        for p, *of_ranks in zip(model.parameters(), *gradients, strict=True):
            p.grad = sum(g / ranks for g in of_ranks)
        optimizer.step(loss=sum(losses) / ranks)
    return outcome(optimizer)


# --------------------------------------------------------------------------------------- checkpoints


def states(model, optimizer, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def save(path, steps, flat, asynchronous, options):
    model = sharded_network()
    optimizer = optimizer_of(model, **options)
    train(model, optimizer, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if asynchronous:
            # in a group of its own: saving and training must not take each other's messages
            own = dist.new_group()
            saving = dcp.async_save(states(model, optimizer, flat), checkpoint_id=path, process_group=own)
            train(model, optimizer, 3, steps)  # must not reach the checkpoint
            saving.result()
        else:
            dcp.save(states(model, optimizer, flat), checkpoint_id=path)
    return True


def resume(path, done, steps, flat, options, shard=True):
    """Continues a saved run in a new optimizer, with the ranks that there are now."""
    model = sharded_network() if shard else network()
    for p in model.parameters():
        p.data.zero_()
    optimizer = optimizer_of(model, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = states(model, optimizer, flat)
        alpha = optimizer.tempering_state()["alpha"]
        assert int(optimizer._sampler.step) == 0 and float(alpha) == 0.0  # initialising it moved nothing
        assert all(float(whole(p.detach()).abs().max()) == 0.0 for p in model.parameters())
        dcp.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"])
    load = StateDictOptions(flatten_optimizer_state_dict=flat)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=load)
    train(model, optimizer, steps, done)
    return outcome(optimizer)


# -------------------------------------------------------------------------------------------- misuse


def error_of(function, *arguments):
    """Type and message of what a function raises; None if nothing."""
    try:
        function(*arguments)
    except BaseException as error:  # as CheckpointException is
        return type(error).__name__, str(error)
    return None


def failing_construction(what):
    """The error of a construction, or first step, that cannot work."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    value = torch.zeros(8, 8)
    if what == "columns":
        return error_of(CTLD, [nn.Parameter(distribute_tensor(value, mesh, [Shard(1)]))], 0.1, 0.9, 10)
    if what == "chains":
        p = nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
        return error_of(lambda: CTLD([p], num_data=10, chains=8))
    if what == "preconditioner":
        p = nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
        p.grad = torch.zeros_like(p)
        optimizer = CTLD([p], num_data=10, tempering=None, preconditioner=RMSPreconditioner())
        return error_of(optimizer.step)
    group = dist.new_group([0])
    if what == "foreign group":
        return error_of(lambda: CTLD([nn.Parameter(value)], num_data=10, process_group=group))
    assert what == "smaller group"
    p = nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
    p.grad = torch.zeros_like(p)
    if dist.get_rank() != 0:
        return None
    return error_of(lambda: CTLD([p], num_data=10, process_group=group).step(loss=torch.zeros(())))


def disagreeing(what, *mine):
    """The error of a step of ranks that do not agree."""
    if what == "lr":
        return error_of(ddp, 3, {}, mine[0])
    if what == "finetune":
        return error_of(finetune_at, mine[0])
    return error_of(ddp, 1, {what: mine[0]})


def finetune_at(t):
    model = DistributedDataParallel(network())
    optimizer = optimizer_of(model)
    for i in range(4):
        if i == t:
            optimizer.finetune()
        train(model, optimizer, 1, i)


def infinite_on_one_rank(steps):
    """A shard whose gradients are infinite makes all ranks leave the step out."""
    parameters = sharded_parameters("shards", torch.float32)
    optimizer = grouped(parameters, {})
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = None
    for t in range(steps):
        if t == 2:
            before = copy.deepcopy(outcome(optimizer))
        full = [nn.Parameter(whole(p.detach()).clone()) for p in parameters]
        loss = noisy_quadratic(full, t)
        for p, q in zip(parameters, full, strict=True):
            p.grad = place(q.grad * scaler.get_scale(), p)
        if t == 2 and dist.get_rank() == 1:
            parameters[0].grad.to_local()[0] = float("inf")
        scaler.scale(loss)
        scaler.step(optimizer, loss=loss)
        if t == 2:
            after = outcome(optimizer)
            assert all((before[name] == after[name]).all() for name in before)
        scaler.update()
    return outcome(optimizer), scaler.get_scale()


def independent(seed):
    """Ranks that sample on their own."""
    parameters = make_parameters(SHAPES)
    optimizer = grouped(parameters, {"seed": seed, "process_group": None})
    for t in range(5):
        step(optimizer, parameters, t)
    return outcome(optimizer)


def with_options(name, steps, options):
    return globals()[name](steps, **options)


def other_network(seed):
    """The error of ranks that begin at different parameters."""
    model = network(seed)
    return error_of(train, model, optimizer_of(model), 1)


def die_while_saving(path, steps, options):
    """Ends the process, as a kill would, when the first file of a checkpoint is about to be written."""
    import os

    from torch.distributed.checkpoint import filesystem

    model = sharded_network()
    optimizer = optimizer_of(model, **options)
    train(model, optimizer, steps)
    filesystem._write_item = lambda *_, **__: os._exit(9)
    dcp.save(states(model, optimizer, False), checkpoint_id=path)


def resume_another_model(path):
    model = fully_shard(nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 6)))
    optimizer = optimizer_of(model)
    return error_of(lambda: dcp.load(states(model, optimizer, False), checkpoint_id=path))


def resume_with_other_settings(path):
    return error_of(resume, path, 0, 1, False, {"temperature": 2.0})
