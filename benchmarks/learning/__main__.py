"""The command line of the experiments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track

from kdkernels.bench.environment import environment

from . import digits
from .table import table

RESULTS = Path(__file__).parents[1] / "results" / "learning"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Seeds = Annotated[int, typer.Option(min=2, help="How many, from 0; the spread is over them.")]
Out = Annotated[Path, typer.Option(help="Folder for the results.")]


def _write(name: str, seeds: int, runs: list[dict[str, Any]], settings: dict[str, Any], out: Path) -> None:
    where = environment("cpu")
    record = {"environment": {k: where[k] for k in ("machine", "cpu", "torch", "kdkernels", "commit", "date")}, "settings": settings}
    record["runs"] = runs
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console = Console()
    console.print(table(record), markup=False)
    console.print(f"written: {out / name}.json, of {seeds} seeds", highlight=False)


@app.callback()
def _root() -> None: ...


@app.command("digits")
def digits_command(seeds: Seeds = 5, out: Out = RESULTS) -> None:
    """Soft targets on scikit-learn's digits (Hinton et al. 2015): a minute and a half."""
    torch.set_num_threads(1)  # tiny products, and the same sums on every machine
    runs = [digits.one_seed(seed) for seed in track(range(seeds), "seeds", transient=True)]
    settings = {"steps": digits.STEPS, "batch": digits.BATCH, "hidden": digits.HIDDEN, "hard_weight": digits.HARD_WEIGHT}
    _write("digits", seeds, runs, settings, out)


@app.command("language")
def language_command(seeds: Seeds = 3, out: Out = RESULTS) -> None:
    """Language-model students of one teacher, each with another loss, through the trainer: half an hour."""
    from . import language  # transformers takes a while

    torch.set_num_threads(1)
    console = Console()
    of = language.world()
    runs: list[dict[str, Any]] = []
    for seed in range(seeds):
        runs.append({})
        for name, figures in language.one_seed(of, seed):
            runs[-1][name] = figures
            console.print(f"seed {seed}, {name}: {figures}", highlight=False)
    s = language.SETTINGS
    settings = {"steps": language.STEPS, "rows": language.ROWS, "prompt": language.PROMPT, "length": language.LENGTH,
                "teacher_steps": s.teacher_steps, "students": language.STUDENTS}  # fmt: skip
    _write("language", seeds, runs, settings, out)


if __name__ == "__main__":
    app()
