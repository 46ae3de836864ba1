"""Held-out curves of several runs: figures at equal steps and equal time, gains over a baseline, and the tables of docs/guide.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import copysign, inf
from statistics import mean, variance
from typing import Any

from .table import table

EXACT, CE, KL, CPU = "exact match, %", "cross-entropy", "KL(teacher, student)", "CPU seconds"
HELD_OUT = (EXACT, CE, KL)
BASELINE = "cross-entropy"
DECIMALS = {EXACT: 1, CE: 3, KL: 3, CPU: 0}
BAR = 2.0
"""Standard deviations from which on a gain counts."""


def at_time(curve: Sequence[Mapping[str, float]], seconds: float) -> dict[str, float]:
    """Return the held-out figures after ``seconds`` of CPU time, on straight lines between the measured points."""
    if seconds >= curve[-1][CPU]:
        return {name: curve[-1][name] for name in HELD_OUT}
    after = next(index for index, point in enumerate(curve) if point[CPU] > seconds)
    left, right = curve[after - 1], curve[after]
    share = (seconds - left[CPU]) / (right[CPU] - left[CPU])
    return {name: left[name] + share * (right[name] - left[name]) for name in HELD_OUT}


def equal_steps(record: Mapping[str, Any]) -> list[dict[str, dict[str, float]]]:
    """Return for each seed the last point of each method's curve."""
    return [{name: _end(curve) for name, curve in run.items()} for run in record["curves"]]


def _end(curve: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {column: curve[-1][column] for column in (*HELD_OUT, CPU)}


def equal_time(record: Mapping[str, Any]) -> list[dict[str, dict[str, float]]]:
    """Return for each seed each method's figures at the time at which the fastest method ended."""
    found = []
    for run in record["curves"]:
        seconds = min(curve[-1][CPU] for curve in run.values())
        found.append({name: at_time(curve, seconds) for name, curve in run.items()})
    return found


def gains(runs: Sequence[Mapping[str, Mapping[str, float]]], column: str, baseline: str = BASELINE) -> dict[str, float]:
    """Return for each method its mean gain over the baseline in standard deviations of the difference: positive is better.

    Only seeds that have both runs count. A method with fewer than two is left out.
    """
    sign = 1.0 if column == EXACT else -1.0
    found = {}
    for name in dict.fromkeys(name for run in runs for name in run if name != baseline):
        both = [run for run in runs if name in run and baseline in run]
        if len(both) > 1:
            ours, theirs = ([run[which][column] for run in both] for which in (name, baseline))
            deviation = (variance(ours) + variance(theirs)) ** 0.5
            gain = sign * (mean(ours) - mean(theirs))
            found[name] = gain / deviation if deviation else copysign(inf, gain) if gain else 0.0
    return found


def blocks(record: Mapping[str, Any]) -> dict[str, Callable[[], str]]:
    """Return the tables of docs/guide.md by name."""
    found: dict[str, Callable[[], str]] = {
        "guide equal steps": partial(_table, record, equal_steps(record)),
        "guide equal time": partial(_table, record, equal_time(record)),
        "guide gains": partial(gains_table, record),
    }
    for sweep, curves in record["sweeps"].items():
        found[f"guide {sweep}"] = partial(_table, record, [{value: _end(curve) for value, curve in curves.items()}])
    return found


def _table(record: Mapping[str, Any], runs: Sequence[Mapping[str, Mapping[str, float]]]) -> str:
    return table({"environment": record["environment"], "runs": runs, "decimals": DECIMALS})


def gains_table(record: Mapping[str, Any]) -> str:
    """Return each method's gain over cross-entropy, in deviations of the difference, and which gains pass the bar."""
    pairs = [(runs(record), column) for runs in (equal_steps, equal_time) for column in HELD_OUT]
    columns = [f"{column.removesuffix(', %')}, equal {axis}" for axis in ("steps", "time") for column in HELD_OUT]
    cells = [gains(runs, column) for runs, column in pairs]
    names = list(dict.fromkeys(name for column in cells for name in column))
    if not names:
        return "Not known yet: a deviation needs two seeds."
    rows = [f"| {name} | " + " | ".join(_gain(column[name]) for column in cells) + " |" for name in names]
    return "\n".join(["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns), *rows])


def _gain(deviations: float) -> str:
    text = f"{deviations:+.1f}"
    return f"**{text}**" if abs(deviations) >= BAR else text
