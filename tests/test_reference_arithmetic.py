"""The reference uses only operations that round the same everywhere.

Every operation it dispatches is recorded and held against a list. What is not on the list either differs
between devices (float32 square roots, fused and scaled additions, sums of floats, reciprocals) or hides NaN
(clamp, minimum).
"""

import pytest
import torch
from common import noisy_quadratic, run, two_groups
from torch.utils._python_dispatch import TorchDispatchMode

from ctld_cuda import AdaptiveForce, Metadynamics, Tempering

EXACT = {
    # moving and making
    *(
        "_to_copy",
        "_unsafe_view",
        "alias",
        "arange",
        "as_strided",
        "cat",
        "clone",
        "copy_",
        "detach",
        "empty",
    ),
    *(
        "expand",
        "fill_",
        "full",
        "full_like",
        "index",
        "lift_fresh",
        "lift_fresh_copy",
        "ones_like",
        "scalar_tensor",
    ),
    *("select", "slice", "stack", "unbind", "unsqueeze", "view", "where", "zero_", "zeros", "zeros_like"),
    *("_record_function_enter_new", "_record_function_exit"),
    *("_local_scalar_dense", "empty_like", "new_zeros", "_reshape_alias", "reshape", "split", "squeeze"),
    # comparing
    *("all", "any", "eq", "ge", "gt", "le", "lt", "ne", "isfinite", "isnan", "argmin"),
    # integers
    *("__rshift__", "__ior__", "bitwise_and", "bitwise_or", "bitwise_or_", "bitwise_xor", "bitwise_not"),
    *("index_add_",),
    # one IEEE rounding, or none
    *("abs", "floor", "mul", "neg", "rsub"),
}
CONDITIONAL = {"add", "add_", "sub", "div", "sqrt", "sum"}


def complaint(name, args, kwargs):
    """Why an operation must not be used, or None."""
    if name in ("add", "add_", "sub", "rsub") and kwargs.get("alpha", 1) not in (1, -1):
        return "scaled addition may be fused"
    if name == "div" and not all(isinstance(a, torch.Tensor) for a in args[:2]):
        return "division by or of a number may become a product with its reciprocal"
    if name == "sqrt" and args[0].dtype != torch.float64:
        return "square roots in float32 are not IEEE on every CPU"
    if name == "sum" and args[0].is_floating_point():
        return "sums of floats depend on their order"
    return None if name in EXACT | CONDITIONAL else "not on the list of exact operations"


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.complaints = set()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.seen.add(name)
        why = complaint(name, args, kwargs or {})
        if why:
            self.complaints.add(f"{name}: {why}")
        return func(*args, **(kwargs or {}))


CASES = [
    {"tempering": Tempering(), "weight_decay": 0.1},
    {"tempering": Tempering(bias=Metadynamics()), "dtype": torch.float64, "integrator": "euler"},
    {"tempering": Tempering(coupling="exact", energy_noise=1.0), "dtype": torch.bfloat16},
    {"tempering": Tempering(coupling="exact", bias=AdaptiveForce(residual=None)), "chains": 4},
    {"tempering": Tempering(coupling="exact", bias=Metadynamics()), "dtype": torch.float16},
    {"tempering": None, "temperature": 0.0},
    {"explore_steps": 1},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_a_step_uses_exact_operations_only(options):
    optimizer = run(two_groups([(4, 3), (4, 5)], backend="reference", **options), 1)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in (1, 2):
        loss = noisy_quadratic(parameters, step, optimizer.chains)
        with Recorder() as recorder:
            optimizer.step(loss=loss)
        assert recorder.complaints == set()
    assert "mul" in recorder.seen


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x / 3.0,
        lambda x: 3.0 / x,
        lambda x: x.sqrt(),
        lambda x: x**0.5,
        lambda x: x.sum(),
        lambda x: x.mean(),
        lambda x: x.clamp(0, 1),
        lambda x: torch.add(x, x, alpha=2.0),
        lambda x: torch.addcmul(x, x, x),
        lambda x: x.lerp(x, 0.5),
        lambda x: torch.minimum(x, x),
        lambda x: x.exp(),
    ],
)
def test_the_check_notices(operation):
    with Recorder() as recorder:
        operation(torch.rand(5))
    assert recorder.complaints
