"""What in the method does the work: one property at a time, all else as in a base setting."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .methods import BIASES, DEFAULTS, Setting, without_defaults

# of a run: method and setting
Run = tuple[str, Setting]


@dataclass(frozen=True)
class Figure:
    """
    Attributes:
        title: what is varied.
        axis: what the numbers mean; empty where the points are named.
        logarithmic: whether the axis is.
        series: of each curve, runs by their place on the axis.
    """

    title: str
    axis: str
    logarithmic: bool
    series: dict[str, dict[float | str, Run]]


TEMPERATURES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
RANGES = (2.0, 3.0, 10.0, 30.0, 100.0)
SPEEDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
EXPLORED = (0.0, 0.1, 0.3, 0.6, 0.9)
UNCOUPLED = 1e-9  # nats per standard deviation of the energy


def figures(base: Setting) -> dict[str, Figure]:
    """All figures around CTLD's setting ``base``."""
    constant = replace(base, tempering=None)

    def moving(temperature: float, hottest: float) -> Run:
        return "ctld", replace(_with(base, max_temperature=hottest), temperature=temperature)

    temperature = base.temperature or 0.0
    found = {
        "temperature": Figure(
            "Base temperature, and whether it moves",
            "temperature T0",
            True,
            {
                "constant": {t: ("sghmc", replace(constant, temperature=t)) for t in TEMPERATURES},
                **{f"up to {hot:g} T0": {t: moving(t, hot) for t in TEMPERATURES} for hot in (10.0, 100.0)},
            },
        ),
        "range": Figure(
            "Hottest temperature; 1 is constant",
            "max_temperature, in T0",
            True,
            {"CTLD": {1.0: ("sghmc", constant)} | {hot: moving(temperature, hot) for hot in RANGES}},
        ),
        "speed": Figure(
            "How fast the temperature moves",
            "time step of alpha",
            True,
            {"CTLD": {x: ("ctld", _with(base, step_size=x)) for x in SPEEDS}},
        ),
        "explore": Figure(
            "Share of the steps with noise and constant learning rate",
            "explored",
            False,
            {
                "CTLD": {x: ("ctld", replace(base, explore=x)) for x in EXPLORED},
                "constant temperature": {x: ("sghmc", replace(constant, explore=x)) for x in EXPLORED},
            },
        ),
        "coupling": Figure(
            "Coupling of the temperature to the energy",
            "",
            False,
            {
                "CTLD": {
                    "constant temperature": ("sghmc", constant),
                    "moving freely": ("ctld", _with(base, coupling_strength=UNCOUPLED)),
                }
                | {
                    "standardized": ("ctld", base),
                    # its step follows from the dimension
                    "exact": ("ctld", _with(base, coupling="exact", step_size=DEFAULTS["step_size"])),
                }
            },
        ),
        "bias": Figure(
            "Bias on alpha; the mean energy is subtracted in any case",
            "",
            False,
            {"CTLD": {name: ("ctld", _with(base, bias=name)) for name in BIASES}},
        ),
        "thermostat": Figure(
            "Thermostat that absorbs the minibatches' heat",
            "",
            False,
            {
                label: {
                    name: (method, replace(setting, thermostat=on))
                    for name, on in (("off", False), ("on", True))
                }
                for label, method, setting in (
                    ("CTLD", "ctld", base),
                    ("constant temperature", "sghmc", constant),
                )
            },
        ),
    }
    return found


def _with(setting: Setting, **changes: object) -> Setting:
    """A default is left out, so that the run is the same as the base's."""
    return replace(setting, tempering=without_defaults({**(setting.tempering or {}), **changes}))
