"""Saving an optimizer and loading it again: ``state_dict``, pickling and copying of ``CTLD``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from . import validation
from .state import EXPLORE, FINETUNE, Progress
from .tempering import TemperingConstants
from .trainers import NotedLosses

if TYPE_CHECKING:
    from .optimizer import CTLD

Tensor = torch.Tensor

# of a parameter group; as tensors they are memory that a captured graph reads
_LIVE = ("lr", "last_lr", "momentum_unit")
_GROUP_ENTRIES = {*_LIVE, "momentum", "weight_decay", "maximize"}
# what a pickled or copied optimizer is constructed with; a load_state_dict leaves them alone
_SETTINGS = (
    "num_data",
    "temperature",
    "integrator",
    "tempering",
    "explore_steps",
    "chains",
    "stochastic_rounding",
    "momentum_dtype",
    "thermostat",
    "preconditioner",
    "_history_steps",
)


def configuration(optimizer: CTLD) -> dict[str, Any]:
    """What must agree between the optimizer that saved a state and the one that loads it."""
    tempering = optimizer.tempering and dataclasses.asdict(optimizer.tempering)
    if tempering and optimizer.tempering:
        del tempering["energy_noise"]  # a measured number, saved with the constants
        tempering["bias_type"] = type(optimizer.tempering.bias).__name__
    return {
        "num_data": optimizer.num_data,
        "temperature": optimizer.temperature,
        "integrator": optimizer.integrator,
        "chains": optimizer.chains,
        "tempering": tempering,
        "stochastic_rounding": optimizer.stochastic_rounding,
        "momentum_dtype": optimizer.momentum_dtype,
        "thermostat": optimizer.thermostat,
        "preconditioner": optimizer.preconditioner and dataclasses.asdict(optimizer.preconditioner),
    }


def sampler_dict(optimizer: CTLD) -> dict[str, Any]:
    """The state of the sampler, with what is needed to check whether it fits; its tensors are live."""
    coordinates = optimizer._coordinates
    return ({"coordinates": coordinates.saved()} if coordinates else {}) | {
        "configuration": configuration(optimizer),
        "constants": dataclasses.asdict(optimizer._constants),
        "tensors": optimizer._sampler.tensors(),
        "dimension": optimizer._dimension,
        "phase": optimizer.phase,
        "explored": optimizer._progress.total,
        "seed": optimizer.seed,
    }


def load(optimizer: CTLD, state_dict: dict[str, Any]) -> None:
    """``CTLD.load_state_dict``."""
    with _hooks_run_here(optimizer, state_dict) as state_dict:
        saved_momenta = _check_fits(optimizer, state_dict, "momentum_buffer")
        saved_tables = _check_fits(optimizer, state_dict, "preconditioner")
        sampler = state_dict["param_groups"][0]["sampler"]
        optimizer._drop_graph()
        optimizer._prepare()
        live = [{name: group[name] for name in _LIVE} for group in optimizer.param_groups]
        tables = [optimizer.state[slot.source].get("preconditioner") for slot in optimizer._slots]
        groups = [{**group, "sampler": None} for group in state_dict["param_groups"]]
        Optimizer.load_state_dict(optimizer, {**state_dict, "state": {}, "param_groups": groups})
        for slot, saved in zip(optimizer._slots, saved_momenta, strict=True):
            # in place and here, because the base class casts to the parameter's dtype
            slot.momentum.zero_() if saved is None else slot.load_momentum(saved)
            optimizer.state[slot.source]["momentum_buffer"] = slot.stored_momentum()
        for slot, table, saved in zip(optimizer._slots, tables, saved_tables, strict=True):
            if table is not None:
                optimizer.state[slot.source]["preconditioner"] = _loaded(table, saved)
        for group, own in zip(optimizer.param_groups, live, strict=True):
            for name, tensor in own.items():
                if isinstance(tensor, Tensor):
                    value = torch.as_tensor(group[name] or 0.0, dtype=torch.float64)
                    group[name] = tensor.copy_(value.reshape(tensor.shape))
        _load_sampler(optimizer, sampler)


@contextlib.contextmanager
def _hooks_run_here(optimizer: CTLD, state_dict: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Runs the user's load hooks around the whole of our loading instead of the base class's."""
    before = optimizer._optimizer_load_state_dict_pre_hooks
    after = optimizer._optimizer_load_state_dict_post_hooks
    state_dict = dict(state_dict)
    for hook in before.values():
        state_dict = hook(optimizer, state_dict) or state_dict
    optimizer._optimizer_load_state_dict_pre_hooks = type(before)()
    optimizer._optimizer_load_state_dict_post_hooks = type(after)()
    try:
        yield state_dict
    finally:
        optimizer._optimizer_load_state_dict_pre_hooks = before
        optimizer._optimizer_load_state_dict_post_hooks = after
    for after_hook in after.values():
        after_hook(optimizer)


def _loaded(table: Tensor, saved: Tensor | None) -> Tensor:
    """What the preconditioner knows of a parameter, in the memory it has if that is of the right type."""
    if saved is None:
        return table.zero_()
    return (
        table.copy_(saved)
        if saved.dtype == table.dtype
        else torch.empty_like(table, dtype=saved.dtype).copy_(saved)
    )


def _check_fits(optimizer: CTLD, state_dict: dict[str, Any], entry: str) -> list[Tensor | None]:
    """An entry of the saved state of each parameter, in the optimizer's order, if everything fits."""
    missing = {"state", "param_groups"} - set(state_dict)
    if missing:
        raise ValueError(f"state_dict has no {sorted(missing)}: it is not from CTLD.state_dict()")
    saved_groups = state_dict["param_groups"]
    if not any(group.get("sampler") for group in saved_groups[:1]):
        raise ValueError("state_dict has no sampler: it is not from CTLD.state_dict()")
    sizes = [len(g["params"]) for g in optimizer.param_groups]
    saved_sizes = [len(g["params"]) for g in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(f"state_dict has parameter groups of sizes {saved_sizes}, the optimizer {sizes}")
    for group in saved_groups:
        if absent := _GROUP_ENTRIES - set(group):
            raise ValueError(f"state_dict: a parameter group has no {sorted(absent)}")
        validation.hyper_parameters(group)
    _check_sampler(optimizer, saved_groups[0]["sampler"])
    keys = [key for g in saved_groups for key in g["params"]]
    found = [state_dict["state"].get(key, {}).get(entry) for key in keys]
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    for p, tensor in zip(parameters, found, strict=True):
        if tensor is not None and tensor.shape != p.shape:
            raise ValueError(
                f"state_dict has a {entry} of shape {tuple(tensor.shape)} for a parameter of shape "
                f"{tuple(p.shape)}"
            )
    return found


def _check_sampler(optimizer: CTLD, sampler: Any) -> None:
    expected = sampler_dict(optimizer)
    if not isinstance(sampler, dict) or set(sampler) != set(expected):
        raise ValueError(f"state_dict: 'sampler' must be a dict with the entries {sorted(expected)}")
    mine, theirs = expected["configuration"], sampler["configuration"]
    different = [key for key in mine if mine[key] != theirs.get(key)]
    if different:
        raise ValueError(
            "state_dict was saved with other settings: "
            + "; ".join(f"{key} was {theirs.get(key)!r}, is {mine[key]!r}" for key in different)
        )
    phases = (EXPLORE, FINETUNE)
    if set(sampler["constants"]) != set(expected["constants"]) or sampler["phase"] not in phases:
        raise ValueError("state_dict: 'sampler' is not from this version of CTLD")
    validation.integer("state_dict: seed", sampler["seed"], 0, 2**64)
    optimizer._sampler.check_fits(sampler["tensors"])


def _load_sampler(optimizer: CTLD, sampler: dict[str, Any]) -> None:
    optimizer._noted = NotedLosses()
    optimizer._sampler.restore(sampler["tensors"])
    optimizer._constants = constants = TemperingConstants(**sampler["constants"])
    if optimizer.tempering is not None:
        optimizer.tempering = dataclasses.replace(optimizer.tempering, energy_noise=constants.energy_noise)
    optimizer._dimension = sampler["dimension"]
    optimizer._progress = Progress(sampler["phase"], sampler["explored"])
    optimizer.seed = sampler["seed"]
    if optimizer._coordinates is not None:
        optimizer._coordinates.restore(sampler["coordinates"])
    optimizer._forget_derived()


def pickled(optimizer: CTLD) -> dict[str, Any]:
    """What a pickle or a copy of an optimizer has besides what every torch optimizer has."""
    return {
        "settings": {name: getattr(optimizer, name) for name in _SETTINGS},
        # a process group belongs to its processes
        "process_group": None if optimizer.process_group is None else "auto",
        "backend": optimizer._backend_name,
        "sampler": sampler_dict(optimizer),
    }


def unpickle(optimizer: CTLD, own: dict[str, Any]) -> None:
    """Fills a new optimizer, which has its parameter groups, from :func:`pickled`."""
    optimizer.__dict__.update(own["settings"])
    optimizer._backend_name = own["backend"]
    optimizer.process_group = own["process_group"]
    optimizer._sampler = optimizer._initial_state(own["sampler"]["tensors"]["visits"].numel())
    optimizer._coordinates = optimizer._initial_coordinates()
    _load_sampler(optimizer, own["sampler"])
