"""Draws from the target as an ArviZ InferenceData."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .predictive import OverDraws, draws_at_once, undisturbed
from .store import Columns, DrawStore, chunks

Draw = dict[str, torch.Tensor]

# a split R-hat needs two draws in each half
FEWEST_DRAWS = 4
MOST_SCALARS = 10_000
# chains with fewer than this share of the median number of window draws would cost the others too many
FEWEST_SHARE = 0.5


def _arviz() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about ArviZ's own future
            import arviz
    except ImportError as error:
        raise ImportError('to_arviz needs ArviZ: pip install "ctld_cuda[posterior]"') from error
    return arviz


def rectangle(columns: Columns, min_draws: int | None) -> tuple[np.ndarray, list[int]]:
    """Draws from the target as indices (chains, draws), in the order of time, and the numbers of the chains.

    With tempering, chains have been in the window for different lengths of time. Those with fewer than
    ``min_draws`` draws are left out, with a warning; of the others the latest n draws are taken, n being the
    number that the shortest has. Padding with NaN would make every diagnostic NaN.

    Raises:
        ValueError: if no chain has enough draws.
    """
    target = np.flatnonzero(columns["at_target"])
    chain = columns["chain"][target]
    chains, counts = np.unique(chain, return_counts=True)
    if min_draws is None:
        min_draws = max(FEWEST_DRAWS, int(np.ceil(FEWEST_SHARE * np.median(counts)))) if len(counts) else 1
    enough = counts >= min_draws
    if not enough.any():
        raise ValueError(
            f"no chain has {min_draws} draws from the target; the largest number is {max(counts, default=0)}"
        )
    n = int(counts[enough].min())
    kept = chains[enough].tolist()
    if not enough.all():
        dropped = dict(zip(chains[~enough].tolist(), counts[~enough].tolist(), strict=True))
        warnings.warn(
            f"left out chains with fewer than {min_draws} draws from the target (chain: draws): {dropped}. "
            "If they stay away from the window for a reason, diagnostics without them are too good",
            RuntimeWarning,
            stacklevel=4,
        )
    return np.stack([target[chain == c][-n:] for c in kept]), kept


def chosen_names(store: DrawStore, select: str | Sequence[str] | None, functions: Any) -> list[str]:
    """Parameters that match ``select``: names or patterns as of a shell; None: all, or none if functions.

    Raises:
        ValueError: if a pattern matches nothing, or what it matches is too much.
    """
    if select is None:
        names = [] if functions else list(store.specs)
    else:
        patterns = [select] if isinstance(select, str) else list(select)
        for pattern in patterns:
            if not fnmatch.filter(store.specs, pattern):
                raise ValueError(f"no parameter matches {pattern!r}; there are {list(store.specs)}")
        names = [n for n in store.specs if any(n == p or fnmatch.fnmatchcase(n, p) for p in patterns)]
    scalars = sum(int(np.prod(store.specs[name].shape)) for name in names)
    if scalars > MOST_SCALARS:
        raise ValueError(
            f"{scalars} scalars per draw are too many to look at: select= parameters, or give functions= of "
            "them, of predictions for example"
        )
    return names


def _numpy(x: torch.Tensor) -> np.ndarray:
    x = x.detach().cpu()
    return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()


def _as_tensor(function: Callable[[Draw], Any]) -> Callable[[Draw], torch.Tensor]:
    return lambda draw: torch.as_tensor(function(draw))


def _values(
    store: DrawStore, indices: np.ndarray, names: list[str], functions: Mapping[str, Callable[[Draw], Any]]
) -> dict[str, np.ndarray]:
    """Parameters and functions of them at the draws, arrays (n, ...)."""
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in [*names, *functions]}
    needed = None if functions else names
    calls = {name: OverDraws(_as_tensor(function), None) for name, function in functions.items()}
    with undisturbed(None, False):
        for chunk in chunks(indices, draws_at_once(store.draw_bytes)):
            draws = store.gather(chunk, needed)
            for name in names:
                pieces[name].append(_numpy(draws[name]))
            for name, call in calls.items():
                pieces[name].append(_numpy(call(draws)))
    return {name: np.concatenate(piece) for name, piece in pieces.items()}


def from_groups(arviz: Any, groups: dict[str, dict[str, np.ndarray]], coords: dict[str, Any]) -> Any:
    """``arviz.from_dict`` of ArviZ 0.x, which takes groups as arguments, or of 1.x, which takes one dict."""
    if int(arviz.__version__.split(".")[0]) >= 1:
        return arviz.from_dict(groups, coords=coords)
    return arviz.from_dict(**groups, coords=coords)


def inference_data(
    store: DrawStore,
    select: str | Sequence[str] | None,
    functions: Mapping[str, Callable[[Draw], Any]] | None,
    min_draws: int | None,
) -> Any:
    """See :meth:`~ctld_cuda.posterior.PosteriorSamples.to_arviz`."""
    arviz = _arviz()
    functions = dict(functions or {})
    names = chosen_names(store, select, functions)
    twice = set(names) & set(functions)
    if twice:
        raise ValueError(f"functions and parameters have the same names: {sorted(twice)}")
    columns = store.columns()
    indices, kept = rectangle(columns, min_draws)
    # read in the order of time, once
    order = np.argsort(indices, axis=None)
    back = np.argsort(order)
    values = _values(store, indices.ravel()[order], names, functions)
    posterior = {name: v[back].reshape(*indices.shape, *v.shape[1:]) for name, v in values.items()}
    stats = {name: columns[name][indices] for name in ("step", "alpha", "temperature", "energy")}
    return from_groups(arviz, {"posterior": posterior, "sample_stats": stats}, {"chain": kept})
