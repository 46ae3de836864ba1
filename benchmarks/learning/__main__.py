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

ENVIRONMENT = ("machine", "cpu", "torch", "kdkernels", "commit", "date")
RESULTS = Path(__file__).parents[1] / "results" / "learning"
GUIDE = RESULTS.with_name("guide")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Seeds = Annotated[int, typer.Option(min=2, help="How many, from 0; the spread is over them.")]
Out = Annotated[Path, typer.Option(help="Folder for the results.")]


def _write(name: str, seeds: int, runs: list[dict[str, Any]], settings: dict[str, Any], out: Path) -> None:
    where = environment("cpu")
    record = {"environment": {k: where[k] for k in ENVIRONMENT}, "settings": settings}
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


@app.command("sentences")
def sentences_command(folder: Annotated[Path, typer.Argument(help="Gets train-prompts.jsonl and held-out-prompts.jsonl.")]) -> None:
    """Write the prompts of the guide's task: sentences about orders, each to be answered by its colour and item."""
    from . import sentences

    sentences.write_prompts(folder)


@app.command("student")
def student_command(
    teacher: Annotated[Path, typer.Argument(help="Folder of a Llama model.")],
    student: Annotated[Path, typer.Argument(help="Folder to write.")],
    layers: Annotated[int, typer.Option(help="How many of the teacher's layers, evenly spaced.")] = 6,
) -> None:
    """Make a student of some of a teacher's layers."""
    from . import sentences

    sentences.make_student(teacher, student, layers)


@app.command("exact")
def exact_command(texts: Annotated[Path, typer.Argument(help="Output of kdkernels sample --json.")]) -> None:
    """Print for each model the share of rows that it answers word for word as the data does."""
    from . import guide

    for name, share in guide.exact_match(guide.load(texts)).items():
        Console().print(f"{name}: {share:.1f} % of the answers are the data's", highlight=False)


Folder = Annotated[Path, typer.Argument(help="Working folder; holds the teacher, or gets it.")]


@app.command("guide")
def guide_command(folder: Folder, threads: Annotated[int, typer.Option(help="Threads of each command.")] = 2, out: Out = GUIDE) -> None:
    """Run the commands of docs/guide.md, and record what they print."""
    from . import guide, pair

    where = environment("cpu")
    record: dict[str, Any] = {"environment": {k: where[k] for k in ENVIRONMENT}, "threads": threads, "steps": []}
    for step in guide.run(folder, guide.steps(pair.LAYERS, pair.ROWS, pair.RATE), threads):
        record["steps"].append(step)
        Console().print(f"$ {step['command']}\n{step['printed']}\n[{step['seconds']} s]", markup=False, highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    (out / "steps.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@app.command("pair")
def pair_command(folder: Folder, seeds: Seeds = 3, out: Out = GUIDE) -> None:
    """Train the guide's student with each loss, three quarters of an hour, in a folder that `guide` has filled. It can be resumed."""
    from . import pair

    torch.set_num_threads(1)
    of, runs = pair.Pair(folder), folder / "runs"
    runs.mkdir(exist_ok=True)
    for name, run, seed in pair.planned(seeds):
        file = runs / name
        if not file.exists():
            curve = of.train(run, seed)
            file.write_text(json.dumps(curve) + "\n", encoding="utf-8")
            Console().print(f"{file.stem}: {curve[-1]}", highlight=False)
    where = environment("cpu")
    record = {"environment": {k: where[k] for k in ENVIRONMENT}, "settings": pair.settings(), **pair.collect(runs, seeds)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "pair.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
