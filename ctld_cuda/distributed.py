"""Processes that step the same parameters together: their shards, their energies, and that they agree.

Replicas (DistributedDataParallel) draw the same noise, because it depends on nothing but seed, step,
parameter and element; what they must share is the energy. Shards (FSDP2, DTensors sharded on dimension 0)
draw the noise of their elements of the whole parameter, and add up the integer sums of all ranks. Integers do
not care about the order, so a trajectory is bit for bit the same for any number of ranks, given the same
gradients.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from .layout import Slot
from .state import RANKS_DISAGREE, State

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Tensor = torch.Tensor


def is_dtensor(x: Any) -> TypeGuard[DTensor]:
    """Whether x is a DTensor; without importing what makes them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


# ---------------------------------------------------------------------------------------------- shards


def check_parameter(p: Tensor, chains: int | None) -> None:
    """Raises ValueError for a DTensor that CTLD cannot step."""
    if not is_dtensor(p):
        return
    if chains is not None:
        raise ValueError("chains cannot be combined with DTensor parameters: run whole chains on every rank")
    # exact types: the elements of a _StridedShard, a subclass in some releases, are not contiguous rows
    if any(type(placement).__name__ not in ("Shard", "Replicate") for placement in p.placements) or any(
        placement.is_shard() and not placement.is_shard(0) for placement in p.placements
    ):
        raise ValueError(
            f"CTLD steps DTensors that are replicated or sharded on dimension 0, got placements "
            f"{tuple(p.placements)} for a parameter of shape {tuple(p.shape)}"
        )
    if any(placement.is_shard() for placement in p.placements) and p.dim() == 0:
        raise ValueError("a parameter without dimensions cannot be sharded")


def rows_of(p: DTensor) -> tuple[int, int]:
    """The rows [begin, end) of DTensor ``p``, along dimension 0, that this rank has.

    Every mesh dimension that shards cuts what the ones before have left into pieces of equal size, rounded
    up; the last pieces may be short or empty.
    """
    begin, end = 0, p.shape[0] if p.dim() else 1
    for dim, placement in enumerate(p.placements):
        if placement.is_shard():
            piece = -((begin - end) // p.device_mesh.size(dim))
            begin = min(begin + piece * p.device_mesh.get_local_rank(dim), end)
            end = min(begin + piece, end)
    return begin, end


def local_of(x: Tensor) -> Tensor:
    """The part of ``x`` that is on this rank, sharing its memory; all of a plain tensor."""
    if not is_dtensor(x):
        return x
    with torch.no_grad():
        return x.to_local().detach()


class ShardedSlot(Slot):
    """A DTensor parameter: this rank's rows of it, and whether its energies are counted here."""

    def __init__(self, parameter: DTensor, momentum: Tensor | None, *args: Any) -> None:
        self.mesh, self.placements = parameter.device_mesh, tuple(parameter.placements)
        self._rows = rows_of(parameter)
        begin, end = self._rows
        self.first = begin * (parameter.numel() // max(parameter.shape[0], 1) if parameter.dim() else 1)
        # of replicas the first counts
        self.counted = all(
            placement.is_shard() or self.mesh.get_local_rank(dim) == 0
            for dim, placement in enumerate(self.placements)
        )
        super().__init__(parameter, None if momentum is None else self._part(momentum), *args)
        if parameter.dim() and self.shape[0] != end - begin:
            raise ValueError(
                f"a shard of a parameter of shape {tuple(parameter.shape)} has {self.shape[0]} rows, "
                f"expected rows {begin} to {end}"
            )

    def local(self, x: Tensor) -> Tensor:
        return local_of(x)

    def local_gradient(self) -> Tensor | None:
        gradient = self.source.grad
        if gradient is None or not is_dtensor(gradient):
            return gradient
        if tuple(gradient.placements) != self.placements:
            gradient = gradient.redistribute(self.mesh, self.placements)
        return local_of(gradient)

    def in_order(self, chains: int) -> bool:
        """The elements of a whole parameter are counted in row-major order."""
        return self.parameter.is_contiguous()

    def versions(self) -> tuple[int, int]:
        return self.source._version, self.parameter._version

    def _part(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor of the whole parameter's shape."""
        if not is_dtensor(whole):
            begin, end = self._rows
            return whole[begin:end] if whole.dim() else whole
        if tuple(whole.placements) != self.placements or whole.device_mesh != self.mesh:
            whole = whole.redistribute(self.mesh, self.placements)
        return local_of(whole)

    def load_momentum(self, saved: Tensor) -> None:
        self.momentum.copy_(self._part(saved))

    def stored_momentum(self) -> Tensor:
        """The momentum as a DTensor that is sharded like the parameter, as checkpoints need it."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            self.momentum,
            self.mesh,
            self.placements,
            run_check=False,
            shape=self.source.shape,
            stride=self.source.stride(),
        )


def slot_of(parameter: Tensor, *args: Any) -> Slot:
    """The slot of a parameter; arguments as of :class:`ctld_cuda.layout.Slot`."""
    return ShardedSlot(parameter, *args) if is_dtensor(parameter) else Slot(parameter, *args)


# ----------------------------------------------------------------------------------------------- ranks


def check_group(group: Any) -> None:
    """Raises for something that is neither "auto", None nor a process group that this process belongs to."""
    if group is None or (isinstance(group, str) and group == "auto"):
        return
    distributed = torch.distributed
    if distributed.is_available() and group == distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not a member of process_group")
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        raise TypeError(f'process_group must be "auto", None or a ProcessGroup, got {group!r}')
    if distributed.get_rank(group) < 0:
        raise ValueError("this process is not a member of process_group")


def _active() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def ranks_of(slots: Sequence[Slot], group: Any) -> Ranks | None:
    """The ranks that step the parameters together; None for a process on its own.

    DTensors name their ranks themselves. Otherwise ``group``; "auto" is the default process group, if there
    is one.

    Raises:
        ValueError: if the parameters are on several meshes, or ``group`` is another than their mesh.
    """
    meshes = [slot.mesh for slot in slots if isinstance(slot, ShardedSlot)]
    if meshes:
        mesh = meshes[0]
        if any(other != mesh for other in meshes):
            raise ValueError("all DTensor parameters must be on the same device mesh")
        auto = isinstance(group, str)
        if group is None or not (auto or torch.distributed.get_world_size(group) == mesh.size()):
            raise ValueError(
                f"the parameters are DTensors on a mesh of {mesh.size()} ranks, and step together: leave "
                'process_group at "auto"'
            )
        for slot in slots:  # plain tensors beside DTensors are replicas
            if not isinstance(slot, ShardedSlot):
                slot.counted = all(mesh.get_local_rank(dim) == 0 for dim in range(mesh.ndim))
        return Ranks([mesh.get_group(dim) for dim in range(mesh.ndim)], sharded=mesh.size() > 1)
    if group is None or (isinstance(group, str) and not _active()):
        return None
    ranks = Ranks([torch.distributed.group.WORLD if isinstance(group, str) else group], sharded=False)
    return ranks if ranks.size > 1 else None


class Ranks:
    """Collective operations of the ranks of one or, for a mesh, several nested process groups.

    None of them makes the host wait for the device. Every rank must call them in the same order.

    Args:
        groups: process groups; the ranks are all combinations of their members.
        sharded: whether the ranks have different elements of the parameters.
    """

    def __init__(self, groups: Sequence[Any], sharded: bool) -> None:
        self._groups = [g for g in groups if torch.distributed.get_world_size(g) > 1]
        self.size = 1
        for group in self._groups:
            self.size *= torch.distributed.get_world_size(group)
        self.sharded = sharded
        # whether the settings of all ranks were compared
        self.agreed = False

    def gather(self, row: Tensor) -> Tensor:
        """The rows of all ranks, (ranks, n), from each one's (n,)."""
        rows = row[None]
        for group in self._groups:
            size = torch.distributed.get_world_size(group)
            gathered = [torch.empty_like(rows) for _ in range(size)]
            torch.distributed.all_gather(gathered, rows.contiguous(), group=group)
            rows = torch.cat(gathered)
        return rows

    def sum_(self, x: Tensor) -> Tensor:
        """Adds up integers over all ranks, in place."""
        for group in self._groups:
            torch.distributed.all_reduce(x, group=group)
        return x

    def gather_objects(self, x: Any) -> list[Any]:
        """The objects of all ranks; waits for them."""
        objects = [x]
        for group in self._groups:
            gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(gathered, objects, group=group)
            objects = [each for of_rank in gathered for each in of_rank]
        return objects

    def share(
        self, loss: Tensor | None, found_inf: Tensor | None, settings: object, state: State
    ) -> tuple[Tensor | None, Tensor | None]:
        """The mean loss over all ranks, and whether any has found an infinity; compares ``settings``.

        On the CPU, and before the first step anywhere, ranks whose settings differ raise; later a GPU only
        sets a flag, because the host does not wait for it.

        Args:
            loss: (C,), any floating type, or None.
            found_inf: float32 () or None.
            settings: anything whose repr() must be the same on all ranks.

        Returns:
            The loss as float64 (C,), the same bits on all ranks, and found_inf.

        Raises:
            RuntimeError: if the ranks disagree.
        """
        device = state.flags.device
        # as long for ranks that do not agree whether there is a loss
        energy = torch.zeros_like(state.alpha) if loss is None else loss.to(torch.float64)
        infinite = state.flags.new_zeros(()) if found_inf is None else (found_inf != 0).to(torch.int64)
        digest = torch.tensor([_digest(settings)], dtype=torch.int64).to(device, non_blocking=True)
        rows = self.gather(torch.cat([digest, infinite.view(1), energy.view(torch.int64)]))
        differ = (rows[:, 0] != rows[0, 0]).any()
        if (device.type == "cpu" or not self.agreed) and bool(differ):
            raise RuntimeError(disagreement(self.gather_objects(settings)))
        self.agreed = True
        state.flags |= torch.where(differ, RANKS_DISAGREE, 0)
        if loss is not None:
            loss = mean_of_rows(rows[:, 2:].contiguous().view(torch.float64))
        if found_inf is not None:
            found_inf = rows[:, 1].sum().to(torch.float32)
        return loss, found_inf

    def add_up(self, state: State) -> None:
        """Makes the kinetic energies and flags of this rank's shards those of all ranks."""
        bits = torch.arange(FLAG_BITS, device=state.flags.device)
        everything = self.sum_(torch.cat([state.kinetic.view(-1), state.flags >> bits & 1]))
        state.kinetic.copy_(everything[:-FLAG_BITS].view_as(state.kinetic))
        state.flags.copy_(((everything[-FLAG_BITS:] > 0).to(torch.int64) << bits).sum())


FLAG_BITS = 16


def mean_of_rows(x: Tensor) -> Tensor:
    """Mean over dimension 0, in a fixed order: halves are added, so that 2^n equal rows give that row."""
    rows = x.shape[0]
    while x.shape[0] > 1:
        half = x.shape[0] // 2
        x = torch.cat([x[:half] + x[half : 2 * half], x[2 * half :]])
    return x[0] / rows


def _digest(settings: object) -> int:
    """56 bits that differ where repr(settings) does, in every process alike."""
    return int.from_bytes(hashlib.blake2b(repr(settings).encode(), digest_size=7).digest(), "big")


# bytes that are widened to 64 bits at a time: all at once would be many times the model
DIGEST_BLOCK = 1 << 20


def parameters_digest(slots: Sequence[Slot]) -> int:
    """Of the values of parameters that are replicated, which must be the same on all ranks."""
    total = 0
    for slot in slots:
        if isinstance(slot, ShardedSlot) or slot.empty:
            continue
        words = slot.parameter.detach().reshape(-1).view(torch.uint8)
        weights = torch.arange(min(words.numel(), DIGEST_BLOCK), device=words.device) * 2 + 1
        found = torch.zeros((), dtype=torch.int64, device=words.device)
        for start in range(0, words.numel(), DIGEST_BLOCK):
            block = words[start : start + DIGEST_BLOCK]
            found += (block * (weights[: block.numel()] + 2 * start)).sum()
        total = (total * 31 + int(found)) % 2**56
    return total


def disagreement(settings: Sequence[Any]) -> str:
    """Says what differs between the settings of the ranks, given as dicts."""
    names = [name for name in settings[0] if all(name in s for s in settings)]
    names = [name for name in names if any(s[name] != settings[0][name] for s in settings)]
    lines = []
    for name in names:
        mine = settings[0][name]
        rank, theirs = next((i, s[name]) for i, s in enumerate(settings) if s[name] != mine)
        lines.append(f"{name} is {mine!r} on rank 0, {theirs!r} on rank {rank}")
    return (
        "the ranks that step the same parameters disagree, so they would drift apart: "
        + ("; ".join(lines) or "they are at different steps")
        + ". (Independent samplers, one per rank: pass process_group=None.)"
    )
