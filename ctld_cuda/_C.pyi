"""The extension module, made from csrc/bind_*.cpp; addresses are integers."""

from collections.abc import Mapping, Sequence

from torch import Tensor

# (numel, first, counted, index, group, format) of a tensor
_Info = tuple[int, int, bool, int, int, int]
# (momentum, gradient, drift, noise, weight_decay, prior) of a group
_Group = tuple[float, float, float, float, float, float]
# (address of lr, its type, of the last positive lr, of the momentum unit); zeros for a rate of the host
_Rate = tuple[int, int, int, int]
# (address of the loss, its type, of grad_scale, of found_inf); 0 for none
_Scalars = tuple[int, int, int, int]
# (address, type) of floating-point numbers; zeros for none
_Number = tuple[int, int]
# (device, stream)
_Queue = tuple[int, int]

class CpuPlan:
    def __init__(
        self,
        tensors: Sequence[_Info],
        chains: int,
        constants: Mapping[str, float],
        state: Mapping[str, int],
        seed: int,
        stochastic: bool,
        group_elements: Sequence[float],
        partial_sums: bool,
        history_rows: int,
        kinetic_unit: float,
        isa: str,
        /,
    ) -> None: ...
    def place(self, parameters: Sequence[int], momenta: Sequence[int], /) -> None: ...
    def explore(
        self,
        gradients: Sequence[int],
        groups: Sequence[_Group],
        baoab: bool,
        loss: _Number,
        unscale: float,
        threads: int,
        /,
    ) -> None: ...
    def finetune(
        self,
        gradients: Sequence[int],
        groups: Sequence[_Group],
        loss: _Number,
        unscale: float,
        threads: int,
        /,
    ) -> None: ...
    def reduce_prior_energy(self, groups: Sequence[_Group], threads: int, /) -> None: ...

class Usual:
    def __init__(self, parameters: list[Tensor], tensor_type: type[Tensor], /) -> None: ...
    def gradients(self) -> tuple[list[Tensor], list[int]] | None: ...

# whether the CPU plans use several threads
openmp: bool

def normal(
    seed: int, step: int, stream: int, index: int, first_group: int, groups: int, to: int, isa: str, /
) -> None: ...
def instruction_sets() -> list[str]: ...

# absent from a build without CUDA
class CudaPlan:
    def __init__(
        self,
        tensors: Sequence[_Info],
        chains: int,
        constants: Mapping[str, float],
        state: Mapping[str, int],
        seed: int,
        stochastic: bool,
        group_elements: Sequence[float],
        partial_sums: bool,
        history_rows: int,
        kinetic_unit: float,
        num_data: float,
        max_blocks: int,
        /,
    ) -> None: ...
    def scratch_bytes(self) -> int: ...
    def use_scratch(self, address: int, /) -> None: ...
    def table_of(self, parameters: Sequence[int], momenta: Sequence[int], /) -> bytes: ...
    def use_table(self, address: int, /) -> None: ...
    def explore(
        self,
        gradients: Sequence[int],
        groups: Sequence[_Group],
        rates: Sequence[_Rate],
        scalars: _Scalars,
        baoab: bool,
        queue: _Queue,
        /,
    ) -> None: ...
    def finetune(
        self,
        gradients: Sequence[int],
        groups: Sequence[_Group],
        rates: Sequence[_Rate],
        scalars: _Scalars,
        queue: _Queue,
        /,
    ) -> None: ...
    def reduce_prior_energy(self, groups: Sequence[_Group], queue: _Queue, /) -> None: ...

def cuda_problem() -> str: ...
def resident_blocks(device: int, /) -> int: ...
