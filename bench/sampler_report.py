"""The table of the sampler benchmark, from its results."""

from __future__ import annotations

import math
from typing import Any

from report import table
from sampler_methods import CONTROL, OURS

Json = dict[str, Any]

EXPLANATION = """\
*Effective draws* are judged by error: n such that the mean of n independent draws has the mean squared
error that the method's means had, over independent repetitions. A sampler that never finds a mode, or
whose step size biases it, pays for it here. The means are the weights of the modes for mixtures, and
posterior means and variances for regressions. ± is the standard error.

Every repetition starts afresh and samples for {seconds} of processor time, after a burn-in that only the
column *with burn-in* charges; compilation is not counted. SMC has no burn-in: a repetition is one
population, begun from a Gaussian around the mode in which all chains of the others start; its width is
among the settings. *By ArviZ* is what the draws of one run look like to someone who does not know the
answer: modes that no chain has visited are not missed. *Mode-weight error*: total variation distance
between sampled and exact weights, mean over repetitions. *Largest bias*: of any mean over all
repetitions, in standard deviations of its function. SMC's random walk counts densities as gradients.

Each method chose among {trials} settings by effective draws per second. lr is in units of the squared
width of the narrowest direction; the peers' step sizes follow from it."""


def significant(value: float, digits: int = 2) -> str:
    """Rounded to significant digits, without exponents: 12,000; 3.4; under 0.1: as that."""
    if not math.isfinite(value):
        return "–"
    if value < 0.1:
        return "< 0.1"
    places = digits - 1 - math.floor(math.log10(value))
    return f"{round(value, places):,.{max(0, places)}f}"


def share(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def settings_text(settings: Json) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def row(name: str, one: Json) -> list[str]:
    error = one["relative_error"]
    spread = f" ± {100 * error:.0f} %" if math.isfinite(error) else ""
    accuracy = one["mode_weight_error"] if "mode_weight_error" in one else one["largest_bias"]
    return [
        name,
        significant(one["per_second"]) + spread,
        significant(one["per_second_with_burn_in"]),
        significant(one["arviz_per_second"]),
        share(accuracy),
        significant(one["gradients_per_second"] / 1e6),
        significant(one["gradients_per_draw"]),
    ]


def verdict(methods: Json) -> str:
    """Who is ahead of CTLD, who is behind, by which factor, and who within two standard errors."""
    ours = methods[OURS]
    ahead, level, behind = [], [], []
    for name, one in methods.items():
        if name in (OURS, CONTROL):
            continue
        factor = one["per_second"] / ours["per_second"]
        error = math.hypot(one["relative_error"], ours["relative_error"])
        if factor > 0 and abs(math.log(factor)) < 2 * error:
            level.append(f"{name} ({significant(factor)} times as many)")
        elif factor > 1:
            ahead.append(f"{name} ({significant(factor)} times as many)")
        else:
            behind.append(f"{name} (" + (f"1/{significant(1 / factor)}" if factor > 0 else "none") + ")")
    parts = {
        "**Ahead of CTLD**": ahead,
        "**Not distinguishable from CTLD** (two standard errors)": level,
        "Behind CTLD": behind,
    }
    return " ".join(f"{what}: {', '.join(names)}." for what, names in parts.items() if names)


def breakdown(methods: Json) -> str:
    ours = methods[OURS]
    return (
        f"Of CTLD's time {100 * ours['gradient_share']:.0f} % is the gradient, the rest `step()`; "
        f"{100 * ours['window_share']:.0f} % of its states are in the window."
    )


def target_section(kept: Json) -> list[str]:
    methods = kept["methods"]
    modes = any("mode_weight_error" in one for one in methods.values())
    columns = [
        *("method", "effective draws/s", "with burn-in", "by ArviZ"),
        "mode-weight error" if modes else "largest bias",
        *("million gradients/s", "gradients per draw"),
    ]
    order = sorted(methods, key=lambda name: -methods[name]["per_second"])
    lines = ["", f"## {kept['title']}", "", *table(columns, [row(name, methods[name]) for name in order]), ""]
    if OURS in methods:
        lines += [verdict(methods), breakdown(methods), ""]
    lines += [f"- {name}: {settings_text(methods[name]['settings'])}" for name in order]
    lines += [f"- Without {name}: {reason}." for name, reason in kept["skipped"].items()]
    return lines


def markdown(found: Json) -> str:
    about, protocol = found["machine"], found["protocol"]
    versions: dict[str, str] = {}
    for kept in found["targets"].values():
        for one in kept["methods"].values():
            versions |= one["versions"]
    listed = ", ".join(f"{package} {version}" for package, version in sorted(versions.items()))
    lines = [
        "# Effective draws per second",
        "",
        f"{about['processor']}, one thread; Python {about['python']}, {listed}; {about['date']}, "
        f"commit {about['commit']}. Made by `bench/samplers.py`"
        + (" (`--quick`: the numbers mean little)." if protocol["name"] == "quick" else "."),
        "",
        EXPLANATION.format(seconds=f"{protocol['seconds']:g} s", trials=protocol["trials"]),
    ]
    for kept in found["targets"].values():
        if kept["methods"]:
            lines += target_section(kept)
    return "\n".join(lines) + "\n"
