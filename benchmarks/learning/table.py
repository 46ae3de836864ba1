"""The results of an experiment as a table: mean and standard deviation over seeds."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any


def _cell(values: list[float], decimals: int, seeds: int) -> str:
    """Return mean and spread, and the number of seeds where it is not that of the table."""
    if not values:
        return ""
    spread = f" ± {stdev(values):.{decimals}f}" if len(values) > 1 else ""
    few = f" ({len(values)} of {seeds} seeds)" if len(values) < seeds else ""
    return f"{mean(values):.{decimals}f}{spread}{few}"


def table(record: dict[str, Any]) -> str:
    """Markdown: a row per network, a column per quantity."""
    runs: list[dict[str, dict[str, float]]] = record["runs"]
    columns = list(dict.fromkeys(column for row in runs[0].values() for column in row))
    decimals: dict[str, int] = record.get("decimals", {})
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for name in runs[0]:
        cells = []
        for column in columns:
            values = [run[name][column] for run in runs if column in run.get(name, {})]
            cells.append(_cell(values, decimals.get(column, 2), len(runs)))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    e = record["environment"]
    seeds = f"Mean ± standard deviation over {len(runs)} seeds" if len(runs) > 1 else "One seed"
    source = f"{seeds}; {e['cpu']}, torch {e['torch']}, {e['date']}."
    return "\n".join([*lines, "", source])
