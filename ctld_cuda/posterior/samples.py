"""Posterior draws: collected while exploring, then used for predictions, weights and diagnostics."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import validation
from ..optimizer import CTLD
from ..state import EXPLORE
from .draws import Draw, Draws
from .files import DrawFiles
from .store import COLUMNS, Columns, DrawStore, Spec, differences

Tensor = torch.Tensor
Model = torch.nn.Module | Mapping[str, Tensor]
Loss = Tensor | float | Callable[[], Tensor] | None


def trainable(model: Model, optimizer: CTLD) -> dict[str, Tensor]:
    """The parameters to be stored, by name: those of the model that the optimizer moves; tied ones once.

    Raises:
        TypeError, ValueError: if model and optimizer do not have the same trainable parameters.
    """
    if isinstance(model, torch.nn.Module):
        named: dict[str, Tensor] = dict(model.named_parameters())
    elif isinstance(model, Mapping):
        named = dict(model)
        for name, value in named.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise TypeError(f"a mapping must be from names to tensors, got {name!r}: {type(value)}")
        if len({id(p) for p in named.values()}) < len(named):
            raise ValueError("the mapping has two names for one tensor")
    else:
        raise TypeError(f"model must be a Module or a mapping from names to tensors, got {type(model)}")
    named = {name: p for name, p in named.items() if p.requires_grad}
    owned = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    theirs, ours = {id(q) for q in owned}, {id(p) for p in named.values()}
    strangers = [name for name, p in named.items() if id(p) not in theirs]
    if strangers:
        raise ValueError(
            f"the optimizer does not have the model's {strangers}: give it all trainable parameters, or "
            "freeze the others by requires_grad_(False)"
        )
    nameless = [tuple(q.shape) for q in owned if id(q) not in ours]
    if nameless:
        raise ValueError(
            f"the optimizer has parameters of shapes {nameless} that are not the model's: pass a mapping "
            "from names to all of them"
        )
    return named


class PosteriorSamples(Draws):
    """Draws from the posterior, taken from a :class:`~ctld_cuda.CTLD` optimizer while it explores.

    ::

        samples = PosteriorSamples(model, optimizer, thin=50, burn_in=5_000, keep=500)
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = criterion(model(inputs), targets)
            loss.backward()
            optimizer.step(loss=loss.detach())
            samples.collect()
        probabilities = samples.predict(test_inputs, transform=lambda x: x.softmax(-1))

    A draw is the parameters of one chain after one step. With tempering, ``at_target`` says which are draws
    from the target; without, all are. Steps are numbered as the noise is: steps that a GradScaler skipped
    do not count. Nothing is taken once the optimizer fine-tunes.

    Args:
        model: a Module whose trainable parameters are those of the optimizer, or a mapping from names to
            them. Frozen parameters and buffers are not stored.
        optimizer: the sampler. With ``chains=C`` a draw is one chain, without the leading dimension.
        thin: steps whose number is a multiple of it are considered. Successive draws are correlated; a
            draw per few momentum relaxation times, 1/(1-momentum) steps, loses little.
        at_target_only: False also takes the hot draws, for :meth:`log_weights`.
        keep: at most so many draws: a uniform random sample of all that were taken, at any moment, so that
            they stay spread over the whole run. Which ones is a pure function of ``seed``, step and chain;
            an interrupted run ends with the same ones. A folder takes up to twice the room, because a shard
            is rewritten once half of it was dropped. None: all.
        device: of the draws in memory, and of what is read from files.
        path: a folder for the draws, in shards of safetensors; None: memory. A folder that holds draws of
            the same model and options is continued.
        burn_in: steps up to this one are not considered: the initial transient.
        seed: of the choice that ``keep`` makes.
        loss: default for :meth:`collect`.
        shard_draws: draws per shard; a shard ends earlier at 64 MiB. A process that is killed loses the
            unfinished shard. :meth:`flush` ends it: call it with every checkpoint of the optimizer, and a
            resumed run has all draws of an uninterrupted one.

    Raises:
        TypeError, ValueError: for arguments outside their range, a model and an optimizer that do not match,
            and a folder that holds the draws of something else. Nothing is written then.
        ImportError: if ``path`` is given and safetensors is not installed.
    """

    def __init__(
        self,
        model: Model,
        optimizer: CTLD,
        thin: int = 1,
        at_target_only: bool = True,
        keep: int | None = None,
        device: torch.device | str = "cpu",
        path: str | Path | None = None,
        *,
        burn_in: int = 0,
        seed: int = 0,
        loss: Callable[[], Tensor] | None = None,
        shard_draws: int = 1000,
    ) -> None:
        if not isinstance(optimizer, CTLD):
            raise TypeError(f"optimizer must be a CTLD, got {type(optimizer)}")
        validation.integer("thin", thin, 1)
        validation.integer("burn_in", burn_in, 0)
        validation.integer("seed", seed, 0, 2**64)
        validation.integer("shard_draws", shard_draws, 1)
        if keep is not None:
            validation.integer("keep", keep, 1)
        if not isinstance(at_target_only, bool):
            raise TypeError(f"at_target_only must be True or False, got {at_target_only!r}")
        if loss is not None and not callable(loss):
            raise TypeError("the default loss must be callable; a value belongs to one call of collect()")
        self._live = trainable(model, optimizer)
        self._model = model
        self._optimizer = optimizer
        self._loss = loss
        self._expected_step: int | None = None
        self._warned = False
        tempering = optimizer.tempering
        self._configuration = {
            "chains": optimizer.chains,
            "coupling": tempering.coupling if tempering else None,
            "temperature": optimizer.temperature,
            "num_data": optimizer.num_data,
            "thin": thin,
            "burn_in": burn_in,
            "at_target_only": at_target_only,
            "keep": keep,
            "seed": seed,
        }
        drop = 0 if optimizer.chains is None else 1
        specs = {name: Spec(tuple(p.shape[drop:]), p.dtype) for name, p in self._live.items()}
        common = (specs, keep, seed, torch.device(device))
        if path is None:
            self._store = DrawStore(*common)
        else:
            self._store = DrawFiles(
                *common, path=Path(path), configuration=self._configuration, shard_draws=shard_draws
            )

    # ----------------------------------------------------------------------------------- collecting

    @torch.no_grad()
    def collect(self, loss: Loss = None) -> int:
        """Takes the draws of the current step, if it is one to take draws at; call it after every step.

        Steps between those that count cost nothing: no synchronisation with the GPU. A step that does,
        transfers a few numbers per chain, and the parameters that are stored.

        Args:
            loss: mean loss at the parameters *as they are now*, shape () or (C,), for the energies that
                :meth:`log_weights` needs: U = (N L + 1/2 N weight_decay |theta|^2)/T0, with -L under
                ``maximize``. The loss that ``optimizer.step(loss=...)`` receives belongs to the parameters
                before that step: with it, call ``collect(loss=loss)`` just before the step. Or give a
                function without arguments, which is called only if there are draws to store; use the
                full training set in it.

        Returns:
            How many draws were stored.

        Raises:
            ValueError, TypeError: for an unsuitable loss.
        """
        optimizer = self._optimizer
        if optimizer.phase != EXPLORE or not self._may_be_due():
            return 0
        state = optimizer.tempering_state()
        step, at_target, alpha, temperature = self._read(state)
        self._expected_step = step
        if not self._due(step):
            return 0
        wanted = at_target if self._configuration["at_target_only"] else np.ones_like(at_target)
        chains = self._store.candidates(step, np.flatnonzero(wanted))
        if len(chains) == 0:
            self._store.last_step = step
            return 0
        energy = self._energy(self._loss if loss is None else loss)
        values = {
            "step": np.full_like(chains, step),
            "chain": chains,
            "alpha": alpha[chains],
            "temperature": temperature[chains],
            "energy": energy[chains],
            "at_target": at_target[chains],
        }
        columns: Columns = {name: np.asarray(values[name], dtype) for name, dtype in COLUMNS.items()}
        self._store.append(columns, self._copies(chains))
        return len(chains)

    def __call__(self, optimizer: CTLD, args: Any = (), kwargs: Any = None) -> None:
        """For ``optimizer.register_step_post_hook(samples)``: collects after every step."""
        self.collect()

    def _may_be_due(self) -> bool:
        """Whether to look at the device; knows the step from counting the calls since the last look."""
        if self._expected_step is None:
            return True
        self._expected_step += 1
        step, c = self._expected_step, self._configuration
        return step > c["burn_in"] and step % c["thin"] == 0

    def _due(self, step: int) -> bool:
        c, last = self._configuration, self._store.last_step
        if step < last and not self._warned:
            self._warned = True
            warnings.warn(
                f"there are draws up to step {last} already, and the optimizer is at step {step}: those of "
                "the steps in between are not taken again",
                RuntimeWarning,
                stacklevel=4,
            )
        return step > max(last, c["burn_in"]) and step % c["thin"] == 0

    def _read(self, state: dict[str, Tensor]) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """Step, at_target, alpha and temperature, in one transfer; per chain (C,)."""
        rows = [state[name].double().reshape(-1) for name in ("at_target", "alpha", "temperature")]
        step = self._optimizer._sampler.step.double().reshape(1)
        values = torch.cat([step, *rows]).cpu().numpy()
        at_target, alpha, temperature = values[1:].reshape(3, -1)
        return int(values[0]), at_target > 0, alpha, temperature

    def _copies(self, chains: np.ndarray) -> Draw:
        """The parameters of some chains, (n, ...), on the device of the draws."""
        rows = torch.from_numpy(chains).to(self._optimizer._device)
        copies = {}
        for name, p in self._live.items():
            p = p.detach()
            if self._configuration["chains"] is None:
                part = p.clone(memory_format=torch.contiguous_format)[None]
            else:
                part = p[rows].contiguous()
            copies[name] = part.to(self._store.device)
        return copies

    def _energy(self, loss: Loss) -> np.ndarray:
        """U in nats, (C,); NaN without a loss."""
        optimizer = self._optimizer
        chains = optimizer.chains or 1
        if loss is None:
            return np.full(chains, np.nan)
        value = loss() if callable(loss) else loss
        if value is None:
            raise ValueError("the loss function returned None")
        likelihood = validation.loss(value, optimizer.chains, optimizer._device).double()
        if optimizer.param_groups[0]["maximize"]:
            likelihood = -likelihood
        prior = torch.zeros_like(likelihood)
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad and group["weight_decay"]:
                    rows = p.detach().reshape(chains, -1)
                    norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
                    prior += 0.5 * float(group["weight_decay"]) * norm * norm
        return ((likelihood + prior) * (optimizer.num_data / optimizer.temperature)).cpu().numpy()

    def flush(self) -> None:
        """Writes the unfinished shard, so that a killed process loses nothing before; in memory: nothing."""
        if isinstance(self._store, DrawFiles):
            self._store.flush()

    def __enter__(self) -> PosteriorSamples:
        return self

    def __exit__(self, *_: Any) -> None:
        self.flush()

    # ---------------------------------------------------------------------------------- persistence

    def state_dict(self) -> dict[str, Any]:
        """All draws in memory, as a copy that ``torch.load(..., weights_only=True)`` reads back.

        Raises:
            RuntimeError: if the draws are in files; those need :meth:`flush` only.
        """
        if isinstance(self._store, DrawFiles):
            raise RuntimeError(
                "draws in files are their own checkpoint: call flush() instead of state_dict()"
            )
        return {"configuration": dict(self._configuration), **self._store.state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replaces the draws by those of :meth:`state_dict`.

        Raises:
            ValueError: if they are of another model, or were collected with other options; nothing changes.
            RuntimeError: if the draws are in files.
        """
        if isinstance(self._store, DrawFiles):
            raise RuntimeError("draws in files are continued by constructing with the same path")
        missing = {"configuration", "last_step", "columns", "parameters"} - set(state_dict)
        if missing or set(state_dict["columns"]) != set(COLUMNS):
            raise ValueError(f"state_dict is not from PosteriorSamples.state_dict(): no {sorted(missing)}")
        parameters = state_dict["parameters"]
        count = len(state_dict["columns"]["step"])
        theirs = {name: Spec(tuple(p.shape[1:]), p.dtype) for name, p in parameters.items()}
        different = differences(self._configuration, state_dict["configuration"])
        if count:
            different += differences(self._store.specs, theirs)
        if different:
            raise ValueError(f"state_dict has draws of something else: {'; '.join(different)}")
        if any(len(column) != count for column in [*state_dict["columns"].values(), *parameters.values()]):
            raise ValueError("state_dict: columns and parameters have different lengths")
        self._store.restore(state_dict)
        self._expected_step = None
