"""Running a model at many draws of its parameters, and leaving it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm

Tensor = torch.Tensor
Draw = dict[str, Tensor]

STORED = "stored"
# parameters of the draws that are run together, unless the user says how many
CHUNK_BYTES, CHUNK_DRAWS = 2**26, 64


def draws_at_once(draw_bytes: int) -> int:
    return min(CHUNK_DRAWS, max(1, CHUNK_BYTES // max(draw_bytes, 1)))


def batch_norms(model: Any) -> list[_BatchNorm]:
    """The model's batch norms that have running statistics."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    return [m for m in modules if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextlib.contextmanager
def undisturbed(model: Any, training: bool) -> Iterator[None]:
    """Puts the model in train or eval mode; restores modes, batch-norm momenta and torch's random state."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    modes = [(module, module.training) for module in modules]
    momenta = [(norm, norm.momentum) for norm in batch_norms(model)]
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=gpus), torch.no_grad():
        try:
            if modules:
                model.train(training)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for norm, momentum in momenta:
                norm.momentum = momentum


class OverDraws:
    """Evaluates a function of one draw at stacked draws: by ``torch.vmap``, or else one by one.

    What vmap cannot do (control flow that depends on data, random numbers, writing to buffers) raises in it;
    with ``vectorize=None`` the first error turns it off. An error of the function itself is raised again by
    the loop.
    """

    def __init__(self, function: Callable[[Draw], Tensor], vectorize: bool | None) -> None:
        self.function = function
        self.vectorize = vectorize

    def __call__(self, draws: Draw) -> Tensor:
        """Results stacked along dimension 0."""
        if self.vectorize is not False:
            try:
                return vmap(self.function, randomness="error")(draws)
            except Exception:
                if self.vectorize:
                    raise
                self.vectorize = False
        count = len(next(iter(draws.values())))
        return torch.stack([self.function({k: v[i] for k, v in draws.items()}) for i in range(count)])


def _split(arguments: tuple[Any, ...], size: int | None) -> list[tuple[Any, ...]]:
    """The inputs in batches along dimension 0."""
    if size is None:
        return [arguments]
    if not all(isinstance(a, Tensor) and a.dim() > 0 and len(a) == len(arguments[0]) for a in arguments):
        raise ValueError("batch_size needs inputs that are tensors with the same first dimension")
    return list(zip(*(a.split(size) for a in arguments), strict=True))


def predictor(
    model: torch.nn.Module | Callable[..., Any],
    inputs: Any,
    transform: Callable[[Any], Tensor] | None,
    batch_size: int | None,
    calibration: Iterable[Any] | str | None,
) -> Callable[[Draw], Tensor]:
    """The function draw -> transformed outputs; to be called inside :func:`undisturbed`."""
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    batches = _split(arguments, batch_size)

    def run(draw: Draw, buffers: Draw, arguments: tuple[Any, ...]) -> Any:
        if isinstance(model, torch.nn.Module):
            return functional_call(model, draw | buffers, arguments)
        return model(draw, *arguments)

    def predict(draw: Draw) -> Tensor:
        buffers = {}
        if isinstance(model, torch.nn.Module):
            # fresh copies, because a forward in train mode writes to them
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            if calibration is not None and not isinstance(calibration, str):
                recalibrate(model, draw, buffers, calibration)
        outputs = []
        for batch in batches:
            output = run(draw, buffers, batch)
            output = output if transform is None else transform(output)
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"the model returns {type(output).__name__}: give predict() a transform that makes a "
                    "tensor of it"
                )
            outputs.append(output)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    return predict


def recalibrate(model: torch.nn.Module, draw: Draw, buffers: Draw, data: Iterable[Any]) -> None:
    """Estimates batch-norm statistics for one draw, into ``buffers``: plain means over all batches.

    As ``torch.optim.swa_utils.update_bn``, except that only the batch norms are in train mode: dropout stays
    off, as it is for the predictions.
    """
    norms = batch_norms(model)
    ours = {id(norm) for norm in norms}
    for prefix, module in model.named_modules():
        if id(module) in ours:
            prefix = prefix + "." if prefix else ""
            buffers[prefix + "running_mean"].zero_()
            buffers[prefix + "running_var"].fill_(1.0)
            buffers[prefix + "num_batches_tracked"].zero_()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
        norm.training = True
    device = next(iter(draw.values())).device
    seen = False
    for batch in data:
        batch = batch[0] if isinstance(batch, (list, tuple)) else batch
        functional_call(model, draw | buffers, (batch.to(device),))
        seen = True
    if not seen:
        raise ValueError("calibration has no batches")
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.training = False


def check_calibration(model: Any, calibration: Any, training: bool) -> None:
    """Raises ValueError or TypeError for a calibration that does not go with the model."""
    norms = batch_norms(model)
    if calibration is None:
        if norms and not training:
            raise ValueError(
                "the model has batch norms, whose running statistics belong to no single draw: give "
                "calibration=, batches of training inputs from which they are estimated for every draw; or "
                "calibration='stored' to use the model's own"
            )
    elif training:
        raise ValueError("with training=True batch norms use the statistics of the inputs: no calibration")
    elif isinstance(calibration, str):
        if calibration != STORED:
            raise ValueError(f"calibration must be batches of inputs or 'stored', got {calibration!r}")
    elif not isinstance(calibration, Iterable):
        raise TypeError(f"calibration must be batches of inputs or 'stored', got {type(calibration)}")
    elif iter(calibration) is calibration:
        raise TypeError(
            "calibration is an iterator, which is used up after one draw: give a list or a DataLoader"
        )
    elif not norms:
        raise ValueError("calibration is for models with batch norms that have running statistics")


class WeightedMean:
    """sum of w_i x_i, accumulated in float64."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.dtype = torch.float32

    def add(self, values: Tensor, weights: Tensor) -> None:
        """``values`` (m, ...), ``weights`` (m,)."""
        if values.dtype == torch.float64:
            self.dtype = torch.float64
        weights = weights.to(values.device)
        part = torch.tensordot(weights, values.to(torch.float64), dims=1)
        self.total = part if self.total is None else self.total + part

    def result(self) -> Tensor:
        """float64 for float64 values, float32 for all others."""
        if self.total is None:
            raise RuntimeError("the mean of nothing")
        return self.total.to(self.dtype)
