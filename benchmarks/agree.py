"""Compare two runs by their spreads: ``python -m benchmarks.agree A/results.json B/results.json``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdkernels.bench import run, table
from kdkernels.bench.figures import number
from kdkernels.bench.measure import Spread
from kdkernels.bench.plots import machine_line


@dataclass(frozen=True)
class Pair:
    """The times of one variant of one case in two runs."""

    case: str
    variant: str
    first: Spread
    second: Spread

    @property
    def overlaps(self) -> bool:
        return self.first.overlaps(self.second)


def spreads(record: run.Record) -> Iterator[tuple[tuple[str, str], Spread]]:
    """Yield ``(title of the case, variant)`` and the spread of the times."""
    for measured in record["cases"]:
        title = table.title(measured) + (f" ({measured['curve']})" if measured["curve"] else "")
        for row in measured["results"]:
            if "samples_ms" in row:
                yield (title, row["variant"]), Spread.of(row["samples_ms"])


def compare(first: run.Record, second: run.Record) -> tuple[list[Pair], int]:
    """Return the rows that both runs timed, in the order of the first, and the number of rows in one run only."""
    a, b = dict(spreads(first)), dict(spreads(second))
    return [Pair(*key, a[key], b[key]) for key in a if key in b], len(a.keys() ^ b.keys())


def _cell(spread: Spread) -> str:
    return f"{number(spread.mid)} [{number(spread.low)}, {number(spread.high)}]"


def main(
    first: Annotated[Path, typer.Argument(help="results.json of a run, or its folder.")],
    second: Annotated[Path, typer.Argument(help="results.json of the other run, or its folder.")],
) -> None:
    """Compare the times of two runs row by row. Exit with 1 if some spreads do not overlap or no row is in both."""
    try:
        records: list[dict[str, Any]] = [run.load(path) for path in (first, second)]
    except run.BenchError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    pairs, alone = compare(*records)
    console = Console(width=None if Console().is_terminal else 160)
    for path, record in zip((first, second), records, strict=True):
        console.print(f"{path}: {machine_line(record)}, commit {record['environment']['commit']}", highlight=False, soft_wrap=True)
    comparison = Table("case", "variant")
    for column in ("first: ms p50 [p20, p80]", "second", "second / first", "overlap"):
        comparison.add_column(Text(column), justify="right", no_wrap=True)
    case = ""
    for pair in pairs:
        ratio = pair.second.mid / pair.first.mid
        cells = (_cell(pair.first), _cell(pair.second), f"{ratio:.2f}", "yes" if pair.overlaps else "NO")
        comparison.add_row(*map(Text, ("" if pair.case == case else pair.case, pair.variant, *cells)))
        case = pair.case
    console.print(comparison)
    agreeing = sum(pair.overlaps for pair in pairs)
    tail = f"; {alone} are in one run only" if alone else ""
    console.print(f"{agreeing} of {len(pairs)} rows overlap{tail}.", highlight=False)
    if not pairs or agreeing < len(pairs):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
