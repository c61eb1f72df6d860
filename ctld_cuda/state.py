"""The sampler's state: everything that a step reads and writes besides parameters and momenta."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch

NONFINITE_ENERGY = 1
NONFINITE_PARAMETER = 2
KINETIC_SATURATED = 4
PRIOR_SATURATED = 8
ENERGY_OUT_OF_RANGE = 16
INVALID_RATE = 32
FRICTION_SATURATED = 64
RANKS_DISAGREE = 128

FLAG_MEANINGS = {
    NONFINITE_ENERGY: "a loss was not finite: alpha and the bias ignored that step of that chain",
    NONFINITE_PARAMETER: "a gradient, momentum or parameter was not finite",
    KINETIC_SATURATED: "a momentum was too large for the kinetic-energy sum: kinetic_temperature is too low",
    PRIOR_SATURATED: "a parameter was too large for the prior-energy sum: the energy is too low",
    ENERGY_OUT_OF_RANGE: "an energy was too large to steer alpha: alpha and the bias ignored that step",
    INVALID_RATE: "a learning rate on the device was negative or not finite: that step was left out",
    FRICTION_SATURATED: "the noise of the gradients is more than the thermostat's friction can absorb: "
    "use larger batches or a smaller lr",
    RANKS_DISAGREE: "learning rates, or other settings, were not the same on all ranks: they have drifted "
    "apart",
}

EXPLORE, FINETUNE = "explore", "finetune"

_NOT_SAVED = ("history", "recorded")


@dataclass
class State:
    """Device tensors, written in place by every step; C chains (1 without chains), B bins, G thermostats.

    With thermostat=True there is one thermostat for each parameter group, otherwise none.

    Attributes:
        step: steps done, int64 (); the noise counter.
        samples: visits of all chains to all bins, int64 ().
        flags: bits named in this module, int64 (); sticky.
        alpha, alpha_momentum: the tempering coordinate and its momentum, float64 (C,).
        temperature: T(alpha), float64 (C,); 0 once the noise is off.
        settled: consecutive steps in the window |alpha| <= flat, int64 (C,).
        turns: alternating arrivals at the hottest bin and in the window, int64 (C,); a round trip is two.
        kinetic: kinetic energy in quanta, int64 (C, G), without thermostats (C, 1): of all groups together.
        friction: of the thermostats, float64 (C, G).
        prior: prior energy of the current parameters in quanta, int64 (C,); of shards, between steps, this
            rank's part.
        visits: alpha-histogram, int64 (B,).
        energy_mean: mean energy per bin in nats, float64 (B,); unvisited bins copy the nearest.
        energy_spread: mean absolute deviation from it, float64 (B,); likewise.
        hills: bias deposited by metadynamics in nats, float64 (B,).
        alpha_kinetic: running mean of alpha_momentum**2, float64 (); 1 if alpha is thermal.
        history: alpha, T, energy in nats and kinetic temperature of the last K steps, float64 (K, C, 4), a
            ring; not saved.
        recorded: steps written to it, int64 (), while it fills up; then K plus the row that is next, the
            oldest. The row written last is (recorded - 1) mod K. Stays 0 without history (K = 0); not saved.
    """

    step: torch.Tensor
    samples: torch.Tensor
    flags: torch.Tensor
    alpha: torch.Tensor
    alpha_momentum: torch.Tensor
    temperature: torch.Tensor
    settled: torch.Tensor
    turns: torch.Tensor
    kinetic: torch.Tensor
    friction: torch.Tensor
    prior: torch.Tensor
    visits: torch.Tensor
    energy_mean: torch.Tensor
    energy_spread: torch.Tensor
    hills: torch.Tensor
    alpha_kinetic: torch.Tensor
    history: torch.Tensor
    recorded: torch.Tensor

    @classmethod
    def initial(
        cls,
        chains: int,
        bins: int,
        temperature: float,
        device: torch.device,
        thermostats: int = 0,
        history: int = 0,
    ) -> State:
        """alpha = 0 and at rest, T = T0, nothing learned."""

        def integers(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        def reals(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            step=integers(),
            samples=integers(),
            flags=integers(),
            alpha=reals(chains),
            alpha_momentum=reals(chains),
            temperature=reals(chains).fill_(temperature),
            settled=integers(chains),
            turns=integers(chains),
            kinetic=integers(chains, thermostats or 1),
            friction=reals(chains, thermostats),
            prior=integers(chains),
            visits=integers(bins),
            energy_mean=reals(bins),
            energy_spread=reals(bins),
            hills=reals(bins),
            alpha_kinetic=reals(),
            history=reals(history, chains, 4),
            recorded=integers(),
        )

    def add_thermostat(self) -> None:
        """Makes room for another parameter group's thermostat, at rest."""
        self.kinetic = torch.nn.functional.pad(self.kinetic, (0, 1))
        self.friction = torch.nn.functional.pad(self.friction, (0, 1))

    def all_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors themselves, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that are saved: all that the next step depends on."""
        return {name: tensor for name, tensor in self.all_tensors().items() if name not in _NOT_SAVED}

    def addresses(self) -> dict[str, int]:
        """Where all tensors are in memory, by name; 0 for empty ones."""
        return {name: tensor.data_ptr() for name, tensor in self.all_tensors().items()}

    def check_fits(self, saved: dict[str, torch.Tensor]) -> None:
        """Raises ValueError where ``saved`` could not be restored into this state."""
        mine = self.tensors()
        if set(saved) != set(mine):
            raise ValueError(
                f"state_dict: sampler state has entries {sorted(saved)}, expected {sorted(mine)}"
            )
        for name, tensor in mine.items():
            other = saved[name]
            if (
                not isinstance(other, torch.Tensor)
                or other.shape != tensor.shape
                or other.dtype != tensor.dtype
            ):
                raise ValueError(
                    f"state_dict: {name} must be {tensor.dtype} of shape {tuple(tensor.shape)}, got "
                    f"{getattr(other, 'dtype', type(other))} of shape {tuple(getattr(other, 'shape', ()))}"
                )

    def restore(self, saved: dict[str, torch.Tensor]) -> None:
        """Copies ``saved`` into these tensors in place, so that pointers to them stay valid.

        The history is that of other steps: it starts anew.
        """
        for name, tensor in self.tensors().items():
            tensor.copy_(saved[name])
        self.recorded.zero_()


@dataclass
class Progress:
    """What the host knows of a run; an object of its own, because torch.compile loses attributes that a graph
    sets on an optimizer.

    Attributes:
        phase: "explore" or "finetune".
        explored: steps of exploring, those skipped by a GradScaler included, less ``in_graphs``.
        in_graphs: of those the ones that a compiled graph counted, int64 (), on the CPU.
    """

    phase: str
    explored: int = 0
    in_graphs: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))

    @property
    def total(self) -> int:
        """All steps of exploring."""
        return self.explored + int(self.in_graphs)
