"""The samplers compared, each in the idiom of its own library, behind one small interface.

Every method runs many chains at once. A *keep* is a number of steps of all chains after which their states
are kept; the random numbers, the gradients and the bookkeeping up to there are what is timed.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from sampler_targets import Target

from ctld_cuda import CTLD, Tempering

Tensor = torch.Tensor
Array = np.ndarray
Settings = dict[str, Any]
Draws = list[tuple[Array, Array | None]]


class Missing(RuntimeError):
    """A library that is not installed."""


class Chains(Protocol):
    """A sampler that has been started."""

    def advance(self, keeps: int) -> Draws:
        """The next ``keeps`` states of all chains, (C, d), with their weights, (C,) or None for 1."""

    def gradients(self) -> int:
        """Evaluations of the gradient (of the density, where there is none) so far, all chains together."""


class Prepared(NamedTuple):
    """A method bound to a target and settings.

    Attributes:
        start: starts afresh from a seed; what it compiles is compiled once.
        block: ``advance`` takes multiples of this.
        burn_in: keeps to drop, or None: a share of the run chosen by the caller.
    """

    start: Callable[[int], Chains]
    block: int = 1
    burn_in: int | None = None


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Args:
        name: in the table and the results.
        packages: distributions that must be installed; their versions are recorded.
        trials: settings to choose from, for a target.
        prepare: binds target and settings. For a population method (``population=True``) the settings
            contain "particles", which the caller sets to fill the time, and one keep is the whole run.
    """

    name: str
    packages: tuple[str, ...]
    trials: Callable[[Target], list[Settings]]
    prepare: Callable[[Target, Settings], Prepared]
    population: bool = False

    def versions(self) -> dict[str, str]:
        """Versions of the packages.

        Raises:
            Missing: if one is not installed.
        """
        try:
            return {package: importlib.metadata.version(package) for package in self.packages}
        except importlib.metadata.PackageNotFoundError as error:
            raise Missing(f'{error.name} is not installed: pip install "ctld_cuda[peers]"') from None


# ---------------------------------------------------------------------------------------------- CTLD


class CtldChains:
    """``chains=C`` copies of the target in one CTLD; tempered, draws count while alpha is in the window."""

    def __init__(self, target: Target, settings: Settings, seed: int) -> None:
        self.evaluate = target.gradient_and_energy()
        chains = settings["chains"]
        start = target.start(chains, np.random.default_rng(seed))
        self.theta = torch.nn.Parameter(torch.from_numpy(start))
        self.thin = settings["thin"]
        self.steps = 0
        tempering = None
        if "max_temperature" in settings:
            tempering = Tempering(
                coupling="exact",
                max_temperature=settings["max_temperature"],
                flat=settings.get("flat", 0.4),
                step_size=settings["step_size"],
                persistence=settings["persistence"],
            )
        self.flat = tempering.flat if tempering else None
        self.optimizer = CTLD(
            [self.theta],
            lr=settings["lr"] * target.scale**2,
            momentum=settings["momentum"],
            num_data=1,
            tempering=tempering,
            chains=chains,
            seed=seed,
            backend="cpu",
        )
        self.alpha = self.optimizer.tempering_state()["alpha"]  # live

    def step(self) -> None:
        self.theta.grad, energy = self.evaluate(self.theta.data)
        self.optimizer.step(loss=energy)
        self.steps += 1

    def advance(self, keeps: int) -> Draws:
        kept: Draws = []
        for _ in range(keeps):
            for _ in range(self.thin):
                self.step()
            window = None if self.flat is None else (self.alpha.abs() <= self.flat).numpy()
            kept.append((self.theta.detach().clone().numpy(), window))
        return kept

    def gradients(self) -> int:
        return self.steps * len(self.theta)


def gradient_share(target: Target, settings: Settings, steps: int = 200) -> float:
    """Share of a CTLD step's time that goes into the gradient and the energy."""
    chains = CtldChains(target, settings, seed=0)
    chains.advance(1)
    begin = time.process_time()
    for _ in range(steps):
        chains.step()
    whole = time.process_time() - begin
    theta = chains.theta.data
    begin = time.process_time()
    for _ in range(steps):
        chains.evaluate(theta)
    return (time.process_time() - begin) / whole


def prepare_ctld(target: Target, settings: Settings) -> Prepared:
    return Prepared(lambda seed: CtldChains(target, settings, seed))


# lr and step_size in units of the narrowest width of the target: (lr, momentum, T_max, step_size of alpha)
TEMPERED = {
    "grid": [(0.15, 0.7, 40.0, 0.12), (0.3, 0.5, 60.0, 0.1), (0.3, 0.7, 40.0, 0.15), (0.2, 0.5, 60.0, 0.12)],
    "two modes": [(0.3, 0.7, 5.0, 0.1), (0.2, 0.7, 5.0, 0.1), (0.3, 0.5, 5.0, 0.1), (0.3, 0.8, 4.0, 0.1)],
}
TEMPERED_REGRESSION = [
    (0.3, 0.9, 1.5, 0.1),
    (1.0, 0.9, 1.5, 0.1),
    (1.0, 0.95, 1.5, 0.1),
    (0.5, 0.95, 2.0, 0.1),
]
MANY, SOME = 2000, 200


def chains_for(target: Target) -> int:
    """Enough to make the cost of a call from Python small; a regression costs more per chain."""
    return MANY if target.modes > 1 else SOME


def tempered_trials(target: Target) -> list[Settings]:
    return [
        {
            "lr": lr,
            "momentum": momentum,
            "max_temperature": hottest,
            "step_size": step_size,
            "persistence": 0.95,
            "flat": 0.4 if target.modes > 1 else 0.9,
            "chains": chains_for(target),
            "thin": 8,
        }
        for lr, momentum, hottest, step_size in TEMPERED.get(target.name, TEMPERED_REGRESSION)
    ]


def langevin_trials(target: Target) -> list[Settings]:
    """For BAOAB and BAOA at constant temperature."""
    return with_chains(target, [(0.1, 0.9), (0.3, 0.9), (1.0, 0.9), (1.0, 0.97)])


def euler_trials(target: Target) -> list[Settings]:
    """SGHMC evaluates the gradient before the parameters move and moves them by the old momenta.

    This explicit Euler step is stable for lr below about 1 - momentum only, and heats by their ratio.
    """
    return with_chains(target, [(0.1, 0.5), (0.03, 0.5), (0.01, 0.5), (0.01, 0.9)])


def with_chains(target: Target, rates: list[tuple[float, float]]) -> list[Settings]:
    chains = chains_for(target)
    return [{"lr": lr, "momentum": momentum, "chains": chains, "thin": 8} for lr, momentum in rates]


# ---------------------------------------------------------------------------------------- posteriors


class EnergyWithGradient(torch.autograd.Function):
    """Gives torch.func the closed-form gradient that CTLD gets: (theta, evaluate) to energies (C,)."""

    @staticmethod
    def forward(theta: Tensor, evaluate: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        gradient, energy = evaluate(theta)
        return energy, gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, of_energy: Tensor, _: Tensor) -> tuple[Tensor, None]:
        return of_energy[:, None] * ctx.saved_tensors[0], None


class PosteriorsChains:
    """All chains are one parameter of shape (C, d), and the log posterior is their sum."""

    def __init__(self, target: Target, settings: Settings, seed: int, module: Any, friction: float) -> None:
        evaluate = target.gradient_and_energy()

        def log_posterior(theta: Tensor, batch: None) -> tuple[Tensor, Tensor]:
            energy, _ = EnergyWithGradient.apply(theta, evaluate)
            return -energy.sum(), torch.empty(0)

        torch.manual_seed(seed)
        theta = torch.from_numpy(target.start(settings["chains"], np.random.default_rng(seed)))
        lr = posteriors_step(target, settings)
        self.transform = module.build(log_posterior, lr=lr, alpha=friction)
        self.state = self.transform.init(theta)
        self.update = self.transform.update
        self.thin = settings["thin"]
        self.steps = 0

    def advance(self, keeps: int) -> Draws:
        kept: Draws = []
        for _ in range(keeps):
            for _ in range(self.thin):
                self.state, _ = self.update(self.state, None, inplace=True)
            self.steps += self.thin
            kept.append((self.state.params.clone().numpy(), None))
        return kept

    def gradients(self) -> int:
        return self.steps * len(self.state.params)


def posteriors_step(target: Target, settings: Settings) -> float:
    """The step in units of time that moves the parameters as SGD does with the learning rate."""
    return math.sqrt(settings["lr"] * 2.0 / (1.0 + settings["momentum"])) * target.scale


def prepare_baoa(target: Target, settings: Settings) -> Prepared:
    from posteriors.sgmcmc import baoa

    friction = -math.log(settings["momentum"]) / posteriors_step(target, settings)
    return Prepared(lambda seed: PosteriorsChains(target, settings, seed, baoa, friction))


def prepare_posteriors_sghmc(target: Target, settings: Settings) -> Prepared:
    from posteriors.sgmcmc import sghmc

    friction = (1.0 - settings["momentum"]) / posteriors_step(target, settings)
    return Prepared(lambda seed: PosteriorsChains(target, settings, seed, sghmc, friction))


# --------------------------------------------------------------------------------------------- JAX


def jax_on_one_thread() -> Any:
    """Imports JAX; XLA reads its flags once, when it starts."""
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    return jax


class JaxChains:
    """Calls a compiled function that moves all chains by one block of keeps."""

    def __init__(self, state: Any, many: Callable[[Any], tuple[Any, Any, Any]], block: int) -> None:
        self.state, self.many, self.block = state, many, block
        self.counts: list[Any] = []

    def advance(self, keeps: int) -> Draws:
        kept: Draws = []
        for _ in range(keeps // self.block):
            self.state, values, count = self.many(self.state)
            self.counts.append(count)
            kept += [(theta, None) for theta in np.asarray(values)]
        return kept

    def gradients(self) -> int:
        return int(sum(np.asarray(count, dtype=np.float64).sum() for count in self.counts))


def prepare_blackjax_sghmc(target: Target, settings: Settings) -> Prepared:
    """BlackJAX draws the momenta afresh every ``leaps`` steps; one keep is such a round."""
    jax = jax_on_one_thread()
    step_size = math.sqrt(settings["lr"]) * target.scale
    chains, block = settings["chains"], 16
    compiled = blackjax_sghmc_block(target, chains, settings["leaps"], block)

    def many(state: Any) -> tuple[Any, Any, Any]:
        return compiled(state, step_size, settings["friction"] / step_size)

    def start(seed: int) -> Chains:
        theta = jax.numpy.asarray(target.start(chains, np.random.default_rng(seed)))
        return JaxChains((jax.random.key(seed), theta), many, block)

    return Prepared(start, block)


@functools.lru_cache(maxsize=8)
def blackjax_sghmc_block(target: Target, chains: int, leaps: int, block: int) -> Callable:
    """(state, step size, friction) to the state after ``block`` rounds, the draws, the gradients taken."""
    jax = jax_on_one_thread()
    import blackjax

    gradient = jax.grad(target.jax_log_density())

    @jax.jit
    def many(state: Any, step_size: Any, friction: Any) -> tuple[Any, Any, Any]:
        kernel = blackjax.sgmcmc.sghmc.build_kernel(alpha=friction)

        def one(key: Any, theta: Any) -> Any:
            return kernel(key, theta, lambda x, _: gradient(x), None, step_size, leaps)

        def keep(state: Any, _: None) -> tuple[Any, Any]:
            key, theta = state
            key, own = jax.random.split(key)
            theta = jax.vmap(one)(jax.random.split(own, chains), theta)
            return (key, theta), theta

        state, values = jax.lax.scan(keep, state, None, length=block)
        return state, values, float(block * chains * leaps)

    return many


def blackjax_sghmc_trials(target: Target) -> list[Settings]:
    chains = chains_for(target)
    tried = [(0.1, 0.5, 20), (0.03, 0.5, 20), (0.01, 0.5, 40), (0.01, 0.1, 40)]  # see euler_trials
    return [{"lr": lr, "friction": f, "leaps": leaps, "chains": chains} for lr, f, leaps in tried]


def prepare_nuts(target: Target, settings: Settings) -> Prepared:
    """NumPyro's kernel with its own adaptation of step size and mass; vectorised chains, draws by scan."""
    jax = jax_on_one_thread()
    from numpyro.infer import NUTS

    log_density = target.jax_log_density()
    chains, block = settings["chains"], 10

    def potential(theta: Any) -> Any:
        return -log_density(theta)

    kernel = NUTS(
        potential_fn=potential,
        dense_mass=settings["dense_mass"],
        target_accept_prob=settings["target_accept"],
    )
    compiled: list[Callable] = []

    def start(seed: int) -> Chains:
        theta = jax.numpy.asarray(target.start(chains, np.random.default_rng(seed)))
        keys = jax.random.split(jax.random.key(seed), chains)
        state = kernel.init(keys, settings["warmup"], theta, (), {})
        if not compiled:  # the kernel exists from its first initialisation on

            def draw(state: Any, _: None) -> tuple[Any, Any]:
                state = kernel.sample(state, (), {})
                return state, (state.z, state.num_steps.sum())

            @jax.jit
            def many(state: Any) -> tuple[Any, Any, Any]:
                state, (values, counts) = jax.lax.scan(draw, state, None, length=block)
                return state, values, counts.sum()

            compiled.append(many)
        return JaxChains(state, compiled[0], block)

    return Prepared(start, block, burn_in=settings["warmup"])


def nuts_trials(target: Target) -> list[Settings]:
    """The step size adapts itself; what is left to choose is how many chains share a call, and the mass."""
    few, many = (16, 512) if target.modes > 1 else (4, 64)
    tried = [(few, False), (few, True), (many, False), (many, True)]
    return [
        {"chains": chains, "dense_mass": dense, "target_accept": 0.8, "warmup": 200}
        for chains, dense in tried
    ]


# -------------------------------------------------------------------------------------- tempered SMC


class SmcRun:
    """One keep: a population carried from the prior to the target, with its final weights."""

    def __init__(self, carry: Callable[[Any], tuple[Any, Any, Any]], keys: Any, per_stage: int) -> None:
        self.carry, self.keys, self.per_stage = carry, keys, per_stage
        self.stages = 0
        self.particles = 0

    def advance(self, keeps: int) -> Draws:
        kept: Draws = []
        for i in range(keeps):
            stages, particles, weights = self.carry(self.keys[i])
            kept.append((np.asarray(particles), np.asarray(weights)))
            self.stages += int(stages)
            self.particles = len(kept[-1][0])
        return kept

    def gradients(self) -> int:
        return self.stages * self.particles * self.per_stage


MOST_KEEPS = 8


def prepare_smc(target: Target, settings: Settings) -> Prepared:
    """Adaptive tempered SMC from N(centre of the first mode, spread^2 I).

    The mutation's step follows the width of the tempered target, (lambda/scale^2 + 1/spread^2)^(-1/2),
    through BlackJAX's inner kernel tuning.
    """
    jax = jax_on_one_thread()
    import blackjax
    from blackjax.smc import inner_kernel_tuning, resampling

    jnp = jax.numpy
    d, count, spread = target.dimension, settings["particles"], settings["spread"]
    center = jnp.asarray(target.means[target.first], jnp.float32)
    log_density = target.jax_log_density()

    def log_prior(theta: Any) -> Any:
        return -0.5 * jnp.sum((theta - center) ** 2) / spread**2

    def width(tempering: Any) -> Any:
        return settings["step"] / jnp.sqrt(tempering / target.scale**2 + 1.0 / spread**2)

    if settings["mutation"] == "hmc":
        mutate, init = blackjax.hmc.build_kernel(), blackjax.hmc.init
        leaps = settings["leaps"]

        def parameters(tempering: Any) -> dict[str, Any]:
            return {
                "step_size": width(tempering)[None],
                "inverse_mass_matrix": jnp.ones((1, d)),
                "num_integration_steps": jnp.array([leaps]),
            }
    else:
        walk, init = (
            blackjax.additive_step_random_walk.build_kernel(),
            blackjax.additive_step_random_walk.init,
        )
        leaps = 1

        def mutate(key: Any, state: Any, density: Callable, scale: Any) -> Any:
            return walk(key, state, density, lambda k, x: scale * jax.random.normal(k, x.shape))

        def parameters(tempering: Any) -> dict[str, Any]:
            return {"scale": width(tempering)[None]}

    algorithm = inner_kernel_tuning.as_top_level_api(
        blackjax.adaptive_tempered_smc,
        log_prior,
        lambda theta: log_density(theta) - log_prior(theta),
        mutate,
        init,
        resampling.systematic,
        lambda key, state, info: parameters(state.tempering_param),
        parameters(jnp.float32(0.0)),
        num_mcmc_steps=settings["moves"],
        target_ess=settings["target_ess"],
    )

    @jax.jit
    def carry(key: Any) -> tuple[Any, Any, Any]:
        def unfinished(loop: Any) -> Any:
            return loop[1].sampler_state.tempering_param < 1.0 - 1e-6

        def stage(loop: Any) -> Any:
            number, state, key = loop
            key, own = jax.random.split(key)
            return number + 1, algorithm.step(own, state)[0], key

        first, rest = jax.random.split(key)
        population = center + spread * jax.random.normal(first, (count, d))
        number, state, _ = jax.lax.while_loop(unfinished, stage, (0, algorithm.init(population), rest))
        return number, state.sampler_state.particles, state.sampler_state.weights

    def start(seed: int) -> Chains:
        keys = jax.random.split(jax.random.key(seed), MOST_KEEPS)
        return SmcRun(carry, keys, settings["moves"] * leaps)

    return Prepared(start)


def smc_trials(target: Target) -> list[Settings]:
    if target.dimension <= 2:
        tried = [
            ("random walk", 1, 2, 1.5, 6.0, 0.5),
            ("random walk", 1, 2, 1.5, 8.0, 0.5),
            ("random walk", 1, 4, 1.5, 8.0, 0.5),
            ("hmc", 3, 2, 0.8, 8.0, 0.5),
        ]
    else:
        tried = [
            ("hmc", 5, 2, 0.5, 4.0, 0.5),
            ("hmc", 5, 5, 0.5, 4.0, 0.5),
            ("hmc", 3, 3, 0.7, 4.0, 0.5),
            ("hmc", 5, 3, 0.5, 4.0, 0.3),
        ]
    return [
        {
            "mutation": mutation,
            "leaps": leaps,
            "moves": moves,
            "step": step,
            "spread": spread,
            "target_ess": target_ess,
        }
        for mutation, leaps, moves, step, spread, target_ess in tried
    ]


# --------------------------------------------------------------------------------------------- all

OURS, CONTROL = "CTLD", "CTLD, constant temperature"
SMC = "BlackJAX tempered SMC"

METHODS = [
    Method(OURS, ("torch",), tempered_trials, prepare_ctld),
    Method(CONTROL, ("torch",), langevin_trials, prepare_ctld),
    Method("posteriors BAOA", ("posteriors", "torch"), langevin_trials, prepare_baoa),
    Method("posteriors SGHMC", ("posteriors", "torch"), euler_trials, prepare_posteriors_sghmc),
    Method("BlackJAX SGHMC", ("blackjax", "jax"), blackjax_sghmc_trials, prepare_blackjax_sghmc),
    Method(SMC, ("blackjax", "jax"), smc_trials, prepare_smc, population=True),
    Method("NumPyro NUTS", ("numpyro", "jax"), nuts_trials, prepare_nuts),
]


def applies(method: Method, target: Target) -> bool:
    """SMC is compared where there are modes to find."""
    return not method.population or target.modes > 1
