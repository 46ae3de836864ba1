"""The results of an experiment as a table: mean and standard deviation over seeds."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any


def table(record: dict[str, Any]) -> str:
    """Markdown: a row per network, a column per quantity."""
    runs: list[dict[str, dict[str, float]]] = record["runs"]
    columns = list(dict.fromkeys(column for row in runs[0].values() for column in row))
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for name in runs[0]:
        cells = []
        for column in columns:
            values = [run[name][column] for run in runs if column in run[name]]
            cells.append(f"{mean(values):.2f} ± {stdev(values):.2f}" if values else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    e = record["environment"]
    source = f"Mean ± standard deviation over {len(runs)} seeds; {e['cpu']}, torch {e['torch']}, {e['date']}."
    return "\n".join([*lines, "", source])
