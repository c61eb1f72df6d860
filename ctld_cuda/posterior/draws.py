"""What can be done with posterior draws: read them, predict with them, weigh them, look at them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import validation
from . import arviz_export
from .files import DrawFiles, read_index, specs_of
from .predictive import (
    OverDraws,
    WeightedMean,
    check_calibration,
    draws_at_once,
    predictor,
    undisturbed,
)
from .store import Columns, DrawStore, chunks
from .weights import Weights, mixture_weights

Tensor = torch.Tensor
Draw = dict[str, Tensor]


class Draws:
    """Draws in a store; :meth:`open` reads those in a folder.

    ``len()`` counts them, ``draws[i]`` is one, iteration goes through all of them in the order of time.
    """

    _store: DrawStore
    # how they were collected: see :class:`~ctld_cuda.posterior.PosteriorSamples`
    _configuration: dict[str, Any]
    _model: Any

    @staticmethod
    def open(
        path: str | Path, model: torch.nn.Module | None = None, device: torch.device | str = "cpu"
    ) -> Draws:
        """The draws in a folder, to be read only; the process that collects them may still be running.

        Args:
            path: the folder.
            model: for :meth:`predict`.
            device: of what is read.

        Raises:
            ValueError: if the folder holds no draws.
            ImportError: if safetensors is not installed.
        """
        folder = Path(path)
        index = read_index(folder)
        c = index["configuration"]
        draws = Draws()
        draws._configuration, draws._model = c, model
        draws._store = DrawFiles(
            specs_of(index),
            c["keep"],
            c["seed"],
            torch.device(device),
            path=folder,
            configuration=c,
            writable=False,
        )
        return draws

    def __len__(self) -> int:
        """Draws kept."""
        return len(self._store)

    def columns(self) -> Columns:
        """What is known about the draws, in the order of time: arrays (n,) ``step``, ``chain``, ``alpha``,
        ``temperature``, ``energy`` (nats; NaN where no loss was given) and ``at_target``."""
        return self._store.columns()

    def __getitem__(self, index: int) -> Draw:
        """Parameters of one draw by name; ``model.load_state_dict(samples[i], strict=False)`` loads it."""
        index = range(len(self))[index]
        return {name: value[0] for name, value in self._store.gather(np.array([index])).items()}

    def __iter__(self) -> Iterator[Draw]:
        for draws in self.batches():
            for i in range(len(next(iter(draws.values())))):
                yield {name: value[i] for name, value in draws.items()}

    def batches(self, size: int | None = None, names: Sequence[str] | None = None) -> Iterator[Draw]:
        """Parameters of successive draws, stacked, (at most ``size``, ...); one batch is in memory at a time.

        Args:
            size: None: what makes 64 MiB, at most 64.
            names: of the parameters wanted; None: all.
        """
        if size is not None:
            validation.integer("size", size, 1)
        unknown = set(names or ()) - set(self._store.specs)
        if unknown:
            raise ValueError(f"no parameters {sorted(unknown)}; there are {list(self._store.specs)}")
        for indices in chunks(np.arange(len(self)), size or draws_at_once(self._store.draw_bytes)):
            yield self._store.gather(indices, names)

    # ------------------------------------------------------------------------------------------ use

    def predict(
        self,
        inputs: Any,
        *,
        transform: Callable[[Any], Tensor] | None = None,
        model: torch.nn.Module | Callable[..., Any] | None = None,
        weights: Tensor | None = None,
        return_draws: bool = False,
        batch_size: int | None = None,
        draws_per_chunk: int | None = None,
        calibration: Iterable[Any] | str | None = None,
        training: bool = False,
        vectorize: bool | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Bayesian model average: the mean over the draws of a function of the model's outputs.

        The model is left as it was (parameters, buffers, modes, torch's random state), also after an error.

        Args:
            inputs: argument of the model, or a tuple of arguments, on the device of ``model``.
            transform: of the outputs at one draw, before averaging; a softmax for probabilities. None: the
                outputs themselves.
            model: a Module for the parameters of one draw, or a function ``(parameters, *inputs)`` of a dict
                of them. None: the model given at construction. It is needed with ``chains``, and where
                that was a mapping.
            weights: non-negative, (n,) for all draws, such as ``log_weights().log_weights.exp()``; None:
                equal weights for the draws from the target, 0 for others.
            return_draws: also return the results at the single draws.
            batch_size: inputs are run in batches of this size along dimension 0, to bound memory.
            draws_per_chunk: draws that are run together; None: what makes 64 MiB of parameters, at most 64.
            calibration: for models with batch norms, whose running statistics belong to no single draw:
                batches of training inputs (a list or DataLoader; of tuples the first item counts), from
                which the statistics are estimated for each draw, as by
                ``torch.optim.swa_utils.update_bn``. "stored": use the model's statistics for all draws.
            training: run the model in train mode (batch norms with the statistics of ``inputs``, dropout
                on) instead of eval mode.
            vectorize: True: all draws of a chunk at once, by ``torch.vmap``; False: one by one; None: at
                once if the model allows.

        Returns:
            The mean, float32, or float64 if the outputs are; with ``return_draws`` also the results,
            (number of draws with positive weight, ...), in the order of time.

        Raises:
            ValueError, TypeError: for unsuitable arguments; no draws; batch norms without ``calibration``.
        """
        model = self._template(model)
        check_calibration(model, calibration, training)
        for name, value in (("batch_size", batch_size), ("draws_per_chunk", draws_per_chunk)):
            if value is not None:
                validation.integer(name, value, 1)
        shares = self._checked_weights(weights)
        indices = np.flatnonzero(shares)
        if calibration is not None and not isinstance(calibration, str):
            vectorize = False
        size = draws_per_chunk or draws_at_once(self._store.draw_bytes)
        device = self._device_of(model, inputs)
        mean, single = WeightedMean(), []
        with undisturbed(model, training):
            run = OverDraws(predictor(model, inputs, transform, batch_size, calibration), vectorize)
            for chunk in chunks(indices, size):
                draws = {name: value.to(device) for name, value in self._store.gather(chunk).items()}
                results = run(draws)
                mean.add(results, torch.from_numpy(shares[chunk]))
                if return_draws:
                    single.append(results)
        return (mean.result(), torch.cat(single)) if return_draws else mean.result()

    def _template(self, model: Any) -> torch.nn.Module | Callable[..., Any]:
        own = self._model if self._configuration["chains"] is None else None
        model = model if model is not None else own
        if not callable(model):
            raise ValueError(
                "a draw is the parameters of one chain: give predict(model=...) a Module that has them, or a "
                "function (parameters, *inputs)"
            )
        if isinstance(model, torch.nn.Module):
            theirs = {name: tuple(p.shape) for name, p in model.named_parameters()}
            wrong = [n for n, spec in self._store.specs.items() if theirs.get(n) != spec.shape]
            if wrong:
                raise ValueError(f"the model has no parameters of the names and shapes of {wrong}")
        return model

    def _device_of(self, model: Any, inputs: Any) -> torch.device:
        sources: list[Tensor] = list(model.parameters()) if isinstance(model, torch.nn.Module) else []
        sources += [x for x in (inputs if isinstance(inputs, tuple) else (inputs,)) if isinstance(x, Tensor)]
        return sources[0].device if sources else self._store.device

    def _checked_weights(self, weights: Any) -> np.ndarray:
        """Normalised weights of all draws, float64 (n,)."""
        if weights is None:
            w = self.columns()["at_target"].astype(np.float64)
            if w.sum() == 0:
                raise ValueError("there are no draws from the target")
        else:
            w = torch.as_tensor(weights, dtype=torch.float64).cpu().numpy()
            if w.shape != (len(self),) or not np.isfinite(w).all() or (w < 0).any() or w.sum() == 0:
                raise ValueError(f"weights must be {len(self)} non-negative numbers, not all 0")
        return w / w.sum()

    def log_weights(self) -> Weights:
        """Weights with which all draws, hot ones included, represent the target.

        Draws from the target alone have equal weights. With ``at_target_only=False`` and energies,
        hot draws count as far as they overlap with the target: see
        :mod:`ctld_cuda.posterior.weights` for the formula and its sources. The energies must be those of the
        draws (see :meth:`collect`) and free of minibatch noise. Use
        ``predict(weights=samples.log_weights().log_weights.exp())``.

        Raises:
            ValueError: without draws or energies, and for hot draws of ``coupling="standardized"``, which
                have no known density.
            RuntimeError: if the temperatures overlap too little to tell.
        """
        columns = self.columns()
        if len(self) == 0:
            raise ValueError("there are no draws")
        # the ratio is exactly 1 in the window, where T is set to T0
        beta = self._configuration["temperature"] / columns["temperature"]
        hot = beta != 1.0
        if self._configuration["coupling"] == "standardized" and not columns["at_target"].all():
            raise ValueError(
                "with coupling='standardized' the density of hot draws is not known, nor are their weights: "
                "use the draws with at_target, or coupling='exact'"
            )
        unknown = int((~np.isfinite(columns["energy"])).sum())
        if hot.any() and unknown:
            raise ValueError(
                f"{unknown} of {len(self)} draws have no finite energy: give collect() the loss at the "
                "current parameters"
            )
        return mixture_weights(columns["energy"], beta)

    def to_arviz(
        self,
        select: str | Sequence[str] | None = None,
        functions: Mapping[str, Callable[[Draw], Any]] | None = None,
        *,
        min_draws: int | None = None,
    ) -> Any:
        """The draws from the target as an ArviZ InferenceData (a DataTree from ArviZ 1.0 on).

        With tempering, chains have been at the target for different lengths of time. Chains with fewer
        than ``min_draws`` draws are left out, with a warning; of the others the latest n are taken, n being
        the number of the shortest. Draws stay in the order of time, so R-hat, which compares chains and their
        halves, means what it always does. So does the effective sample size, except that neighbours may
        be visits to the window apart, and so less correlated than the draws within a visit.

        Args:
            select: names of parameters, or patterns such as "layers.0.*". None: all, unless there are
                ``functions``; at most 10,000 scalars per draw.
            functions: name -> function of the parameters of one draw (a dict) that returns a tensor or a
                number; the prediction for a test point, say.
            min_draws: None: half the median over chains, and at least 4.

        Returns:
            Groups ``posterior``, variables (chain, draw, ...), and ``sample_stats`` with ``step``, ``alpha``,
            ``temperature`` and ``energy`` (the potential U in nats). Coordinate ``chain``: the sampler's
            chain numbers.

        Raises:
            ValueError: if nothing matches, too much does, or no chain has enough draws.
            ImportError: if ArviZ is not installed.
        """
        if min_draws is not None:
            validation.integer("min_draws", min_draws, 1)
        return arviz_export.inference_data(self._store, select, functions, min_draws)
