"""The headline of a run: one case in a sentence, after warnings about unreliable times.

The report, the terminal and the README print the same text. It leaves out unreliable times: all times of a run on a busy machine, times of
a case with a time below its floor, and the factor between two variants whose spreads overlap.
"""

from __future__ import annotations

from typing import Any

from . import table
from .cases import Case
from .figures import number
from .measure import Spread
from .variants import Variant
from .visits import Measured

SHOWN = 3
"""Maximum number of times below their floor that the headline names."""


def busy(record: dict[str, Any]) -> str:
    """Return the load before the run if it was above the number of cores, such as ``load 8.0 on 2 cores``; else ""."""
    loads, cores = record["environment"].get("load_average"), record["environment"].get("cores")
    if not loads or cores is None or loads[0] <= cores:
        return ""
    return f"load {loads[0]:.1f} on {cores} core{'s' * (cores != 1)}"


def warnings(record: dict[str, Any]) -> list[str]:
    """Return a sentence for each reason not to rely on the times of a run."""
    sentences = []
    if load := busy(record):
        sentences.append(f"The machine was busy ({load}): these times are not to be relied on. Measure again on an idle machine.")
    below = [(measured, variant) for measured in record["cases"] for variant in table.below_floor(measured)]
    if below:
        named = "; ".join(_below(measured, variant) for measured, variant in below[:SHOWN])
        more = f"; and {len(below) - SHOWN} more" if len(below) > SHOWN else ""
        sentences.append(f"Below the floor, which is impossible: {named}{more}. The measurement is unsound.")
    return sentences


def _below(measured: Measured, variant: str) -> str:
    ms, floor = table.median(measured, variant), table.median(measured, Variant.parse(variant).floor)
    return f"{table.name_of(variant)} takes {number(ms or 0)} ms, its floor {number(floor or 0)} ms ({table.title(measured)})"


def sentence(record: dict[str, Any]) -> str:
    """Return the time and memory of our first backend in the first case of its own, with heads if there is one; "" if there is none."""
    cases = [measured for measured in record["cases"] if not measured["curve"] and _ours(measured) is not None]
    measured = next((m for m in cases if m["flop"]), cases[0] if cases else None)
    row = _ours(measured) if measured is not None else None
    if measured is None or row is None:
        return ""
    case, times = Case(**measured["case"]), Spread.of(row["samples_ms"])
    parts = [] if busy(record) or table.below_floor(measured) else [_times(measured, times)]
    parts += _memory(measured, row)
    if not parts:
        return ""
    what = f"{table.loss_of(case)} of {case.n:,} tokens over a vocabulary of {case.v:,}, {case.dtype}, forward and backward"
    return f"{what[0].upper()}{what[1:]}: {table.name_of(row['variant'])} takes {'; '.join(parts)}."


def headline(record: dict[str, Any]) -> str:
    """Return the warnings and the sentence as one text."""
    return " ".join([*warnings(record), *filter(None, [sentence(record)])])


def _ours(measured: Measured) -> dict[str, Any] | None:
    """Return the row of our first backend that ran. Backends are measured in the order of ``backend="auto"``."""
    return next((row for row in measured["results"] if table.is_ours(row["variant"]) and row.get("samples_ms")), None)


def _times(measured: Measured, times: Spread) -> str:
    parts = [f"{number(times.mid)} ms"]
    if (floor := table.spread(measured, "floor")) is not None:
        bound = f"{'the matrix products' if measured['flop'] else 'one pass over memory'} alone ({number(floor.mid)} ms)"
        differs = table.times_as_fast(times, floor) is not None
        parts.append(f"{times.mid / floor.mid:.2f} x {bound}" if differs else f"no difference from {bound} beyond the spread")
    peer = table.best_peer(measured)
    for variant in ["eager", *([peer[0]] if peer is not None else [])]:
        if (other := table.spread(measured, variant)) is not None:
            name, factor = f"{table.name_of(variant)} ({number(other.mid)} ms)", table.times_as_fast(times, other)
            parts.append(f"no difference from {name} beyond the spread" if factor is None else f"{factor} times as fast as {name}")
    return ", ".join(parts)


def _memory(measured: Measured, row: dict[str, Any]) -> list[str]:
    eager = next((r.get("peak_extra_bytes") for r in measured["results"] if r["variant"] == "eager"), None)
    if (peak := row.get("peak_extra_bytes")) is None:
        return []
    beside = "" if eager is None else f", where PyTorch eager takes {eager / 2**20:,.0f} MiB"
    return [f"{peak / 2**20:,.0f} MiB beyond the inputs{beside}"]
