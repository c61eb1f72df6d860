"""Broken samplers, and which check notices which: ``python tests/statistics/mutants.py`` prints the table.

A mutant is a patch of the functions of ctld_cuda.reference (or of the coefficients that the optimizer takes
from there). The checks are those that the tests make of the healthy sampler, on backend "reference" and at a
size at which all of them together take seconds.
"""

import argparse
import contextlib
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for laws.py, where pytest did not

import checks
from laws import BOUND, PLAIN, WITH_PRIOR, Harmonic, worst

import ctld_cuda.coefficients
from ctld_cuda import reference

BACKEND = "reference"

# --------------------------------------------------------------------------------------------- the checks


def constant(integrator):
    """Constant temperature on a harmonic target."""
    case = Harmonic(0.2, 0.6, num_data=50.0, temperature=2.5)
    return lambda seed: checks.harmonic([case], integrator, seed, 1 << 14, BACKEND)


CHECKS: dict[str, Callable[[int], dict]] = {
    "harmonic, baoab": constant("baoab"),
    "harmonic, euler": constant("euler"),
    "anisotropic": lambda seed: checks.anisotropic("baoab", 0.3, seed, 1 << 12, BACKEND, steps=80),
    "anharmonic": lambda seed: checks.rippled("euler", seed, 1 << 14, BACKEND),
    "free alpha": lambda seed: checks.free_alpha_deviations(checks.free_alpha(4096, 80, seed, BACKEND), 80),
    "extended density": lambda seed: checks.extended(
        WITH_PRIOR, 20, checks.ADAPTIVE, seed, 1 << 13, BACKEND, 150, 0.02
    ),
    "extended density, hills": lambda seed: checks.extended(
        WITH_PRIOR, 2, checks.METADYNAMICS, seed, 1 << 12, BACKEND, 150, 0.02
    ),
    "quick parameters": lambda seed: checks.quick(seed, 1 << 15, BACKEND),
    "free energies": lambda seed: checks.learning(PLAIN, 20, checks.ENERGY_ONLY, seed, 1 << 9, BACKEND, 100),
    "learning hills": lambda seed: checks.learning(PLAIN, 2, checks.METADYNAMICS, seed, 256, BACKEND, 30),
}

# -------------------------------------------------------------------------------------------- the mutants


class Mutant(NamedTuple):
    """A function of ``module`` replaced by ``make(original)``, and a check that must notice."""

    function: str
    make: Callable[[Callable], Callable]
    noticed_by: str
    module: object = reference

    @contextlib.contextmanager
    def applied(self):
        original = getattr(self.module, self.function)
        with mock.patch.object(self.module, self.function, self.make(original)):
            yield


def coefficients(change, noticed_by):
    """A mutant of the coefficients of a sampling step; ``change(right, lr, momentum, num_data, T0)``."""

    def make(original):
        def changed(integrator, *, lr, momentum, num_data, c, **rest):
            right = original(integrator, lr=lr, momentum=momentum, num_data=num_data, c=c, **rest)
            return change(right, integrator, lr, momentum, num_data, c.base_temperature)

        return changed

    return Mutant("explore_coefficients", make, noticed_by, ctld_cuda.coefficients)


def noise(scale, noticed_by):
    """A mutant whose noise is ``scale(mu, T)``."""
    return coefficients(lambda right, _i, _h, mu, _n, t: right._replace(noise=scale(mu, t)), noticed_by)


def without_c(right, integrator, lr, momentum, num_data, temperature):
    """What is usually written: kick sqrt(N h), drift sqrt(h/N)."""
    drift = (lr / num_data) ** 0.5 * (0.5 if integrator == "baoab" else 1.0)
    return right._replace(gradient=(num_data * lr) ** 0.5, drift=drift)


def of_temper(change):
    """The alpha block with its results (q, q_new/q_old) changed by ``change(q, rescale, state, c)``."""

    def make(original):
        def temper(loss, state, c, seed):
            scale, rescale = original(loss, state, c, seed)
            return change(scale, rescale, state, c)

        return temper

    return make


def one_alpha_for_all(scale, rescale, state, c):
    for tensor in (state.alpha, state.alpha_momentum, state.temperature):
        tensor.copy_(tensor[:1].expand_as(tensor))
    return scale[:1].expand_as(scale).clone(), rescale[:1].expand_as(rescale).clone()


def squared_scale(original):
    return lambda flat, coefficients, scale, *rest: original(flat, coefficients, scale * scale, *rest)


def no_slope(original):
    return lambda alpha, c: -torch.where(alpha < 0.0, -1.0, 1.0).double()


def times(factor):
    return lambda original: lambda *arguments: factor * original(*arguments)


def stale(original):
    """The energy of the parameters one step ago."""
    kept = []

    def energy(loss, state, c):
        kept.append(original(loss, state, c))
        return kept.pop(0) if len(kept) > 1 else kept[0]

    return energy


def no_reflection(original):
    return lambda alpha, r, c: (alpha, r)


def walls_that_stop(original):
    return lambda alpha, r, c: (alpha.clamp(-c.limit, c.limit), r)


def rebound_only(original):
    """Flips r beyond a wall and leaves alpha there."""
    return lambda alpha, r, c: (alpha, torch.where(alpha.abs() > c.limit, -r, r))


def one_bin_up(original):
    return lambda alpha, c: (original(alpha, c) + 1).clamp(max=c.bins - 1)


def shared_parameter_noise(original):
    """All chains get the noise of the first."""

    def explore_tensor(flat, coefficients, scale, *rest):
        chains, normal = scale.numel(), reference.normal

        def first_chain(seed, step, stream, index, numel, device=None, first=0):
            return normal(seed, step, stream, index, numel // chains, device).repeat(chains)

        with mock.patch.object(reference, "normal", first_chain):
            original(flat, coefficients, scale, *rest)

    return explore_tensor


def shared_alpha_noise(original):
    def normal(seed, step, stream, index, numel, device=None, first=0):
        if stream == reference.STREAM_ALPHA:
            return original(seed, step, stream, index, 1, device).repeat(numel)
        return original(seed, step, stream, index, numel, device, first)

    return normal


def root(x):
    return x**0.5


MUTANTS = {
    "noise power mu instead of 1 - mu^2": noise(lambda mu, t: root(mu * t), "anisotropic"),
    "noise (1 - mu^2) T: square root missing": noise(lambda mu, t: (1 - mu * mu) * t, "harmonic, baoab"),
    "noise power 1 - mu instead of 1 - mu^2": noise(lambda mu, t: root((1 - mu) * t), "harmonic, baoab"),
    "noise power 2(1 - mu) instead of 1 - mu^2": noise(
        lambda mu, t: root(2 * (1 - mu) * t), "harmonic, euler"
    ),
    "T instead of sqrt(T) in the noise": noise(lambda mu, t: root(1 - mu * mu) * t, "anisotropic"),
    "noise without temperature": noise(lambda mu, t: root(1 - mu * mu), "anisotropic"),
    "c = 1 in euler": coefficients(without_c, "harmonic, euler"),
    "c = 1 in euler, anharmonic": coefficients(without_c, "anharmonic"),
    "T(alpha) instead of sqrt(T(alpha)) in the noise": Mutant(
        "explore_tensor", squared_scale, "extended density"
    ),
    "beta' missing in the force": Mutant("beta_slope", no_slope, "extended density"),
    "force twice as large": Mutant("coupled_energy", times(2.0), "extended density"),
    "energy with the wrong sign": Mutant("coupled_energy", times(-1.0), "extended density"),
    "energy one step late": Mutant("potential_energy", stale, "quick parameters"),
    "energy not divided by T0": Mutant(
        "potential_energy",
        lambda original: lambda loss, state, c: c.base_temperature * original(loss, state, c),
        "extended density",
    ),
    "prior left out of the energy": Mutant(
        "potential_energy", lambda _: lambda loss, state, c: c.energy_scale * loss, "extended density"
    ),
    "momenta not rescaled with T": Mutant(
        "temper", of_temper(lambda q, rescale, *_: (q, torch.ones_like(rescale))), "extended density"
    ),
    "momenta rescaled the wrong way": Mutant(
        "temper", of_temper(lambda q, rescale, *_: (q, 1.0 / rescale)), "extended density"
    ),
    "momenta rescaled half a kick early": Mutant(
        "whole_kick",
        lambda _: lambda momentum, rescale, integrator: torch.ones_like(rescale),
        "quick parameters",
    ),
    "no reflection": Mutant("reflect", no_reflection, "free alpha"),
    "walls that stop alpha": Mutant("reflect", walls_that_stop, "free alpha"),
    "r flipped, alpha left beyond the wall": Mutant("reflect", rebound_only, "free alpha"),
    "one alpha and r for all chains": Mutant("temper", of_temper(one_alpha_for_all), "free alpha"),
    "noise of the parameters shared by the chains": Mutant(
        "explore_tensor", shared_parameter_noise, "anisotropic"
    ),
    "noise of alpha shared by the chains": Mutant("normal", shared_alpha_noise, "free alpha"),
    "hills push towards where alpha was": Mutant("hill_slope", times(-1.0), "extended density, hills"),
    "hills deposited upside down": Mutant(
        "deposit_hills",
        lambda original: lambda count, *rest: original(-count, *rest),
        "learning hills",
    ),
    "histogram off by one bin": Mutant("bin_of", one_bin_up, "free energies"),
}


def deviation(check, seed, mutant=None):
    """The largest deviation of a check and its name, with a mutant or without."""
    with MUTANTS[mutant].applied() if mutant else contextlib.nullcontext():
        found = CHECKS[check](seed)
    name = max(found, key=lambda key: worst(found[key]))
    return worst(found[name]), name


def table(seed: int, names: list[str]) -> str:
    """Markdown: largest deviation in standard errors of every check (columns) for every mutant (rows)."""
    head = ["sampler", *CHECKS]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in [None, *names]:
        cells = [name or "*healthy*"]
        for check in CHECKS:
            size, _ = deviation(check, seed, name)
            text = "∞" if size > 1e6 else f"{size:.1f}" if size < 100 else f"{size:.0f}"
            cells.append(f"**{text}**" if size > BOUND else text)
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=None, help="of the noise; another one at every run")
    parser.add_argument("mutants", nargs="*", default=list(MUTANTS), help="names of mutants; all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    from_environment = os.environ.get("CTLD_TEST_SEED")
    seed = arguments.seed if arguments.seed is not None else int(from_environment or secrets.randbits(62))
    print(table(seed, arguments.mutants))
    print(f"\nLargest deviation in standard errors; bold: beyond {BOUND}, noticed. Seed {seed}.")


if __name__ == "__main__":
    main()
