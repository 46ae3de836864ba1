"""``kdkernels evaluate``, ``kdkernels sample`` and ``kdkernels chat``. Their implementation is imported when they run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..support.terminal import console, failing, shown
from .options import COLUMNS, DIVERGENCE

__all__ = ["chat", "evaluate", "register", "sample"]

EVALUATE_EXAMPLES = """
Examples:

- `kdkernels evaluate --student out --student small --teacher big --data held-out.jsonl` - before and after, in one table

- `kdkernels evaluate --student out --data held-out.jsonl --data other.jsonl --json` - cross-entropy alone, for programs
"""
SAMPLE_EXAMPLES = "Example: `kdkernels sample --student out --student small --teacher big --data held-out.jsonl --max-new-tokens 64`"
CHAT_EXAMPLES = "Example: `kdkernels chat --student out`. `/reset` begins anew, `/exit` or Ctrl-D ends."


class Dtype(str, Enum):
    """Dtype of a model's weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Overlong(str, Enum):
    """Treatment of rows over ``--max-length``."""

    error = "error"
    drop = "drop"
    truncate = "truncate"


AsDevice = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]
Temperature = Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")]
NewTokens = Annotated[int, typer.Option(help="Maximum tokens of an answer.")]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command(epilog=EVALUATE_EXAMPLES)(evaluate)
    app.command(epilog=SAMPLE_EXAMPLES)(sample)
    app.command(epilog=CHAT_EXAMPLES)(chat)


def evaluate(
    student: Annotated[list[str], typer.Option(help="Folder or hub id of a model or adapter. May be repeated: one table of all.")],
    data: Annotated[
        list[str] | None, typer.Option(help="Rows, as for `kdkernels train`. Held in memory. May be repeated: each gets its own metrics.")
    ] = None,
    teacher: Annotated[list[str] | None, typer.Option(help="Model to compare with. May be repeated: an ensemble.")] = None,
    tasks: Annotated[
        str, typer.Option(help="Tasks of lm-eval, such as arc_easy,hellaswag. Needs `pip install 'kdkernels[lm-eval]'`.")
    ] = "",
    tasks_dir: Annotated[Path | None, typer.Option(help="Folder with YAML files of further lm-eval tasks.")] = None,
    limit: Annotated[int | None, typer.Option(help="Maximum number of examples of each task.")] = None,
    divergence: Annotated[str, typer.Option(help=DIVERGENCE)] = "forward_kl",
    temperature: Annotated[float, typer.Option(help="T > 0 of the divergence; it is not multiplied by T^2.")] = 1.0,
    max_length: Annotated[int | None, typer.Option(help="Maximum tokens of an example. Default: the models' limit.")] = None,
    overlong: Annotated[Overlong, typer.Option(help="Longer rows: error, drop or truncate.")] = Overlong.error,
    batch_size: Annotated[int, typer.Option(help="Examples per batch.")] = 8,
    student_dtype: Annotated[Dtype, typer.Option(help="Dtype of the students' weights; auto: as saved.")] = Dtype.float32,
    teacher_dtype: Annotated[Dtype, typer.Option(help="Dtype of the teacher's weights; auto: as saved.")] = Dtype.auto,
    columns: Annotated[str | None, typer.Option(help=COLUMNS)] = None,
    device: AsDevice = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure students on data: divergence from a teacher, cross-entropy, and how often both have the same top token.

    Every metric is a mean over the scored tokens of a data set, like the held-out metrics of `kdkernels train`.
    """
    with failing():
        if not data and not tasks:
            raise ValueError("--data is missing (or --tasks)")
        from .comparison import FIGURES, Evaluation
        from .comparison import evaluate as measure

        arguments = {
            "divergence": divergence, "temperature": temperature, "max_length": max_length, "overlong": overlong.value,
            "per_device_eval_batch_size": batch_size, "columns": columns,
        }  # fmt: skip
        rows = task_rows = None
        if tasks:
            from .tasks import run_tasks

            task_rows = run_tasks(student, tasks.split(","), tasks_dir, limit, batch_size, student_dtype.value, device)
        if data:
            rows = measure(Evaluation(student, teacher or [], data, arguments, student_dtype.value, teacher_dtype.value, device))
        if as_json:
            about = {"teacher": teacher or [], "divergence": divergence, "temperature": temperature}
            typer.echo(json.dumps({**about, "rows": rows or [], "tasks": task_rows or []}, indent=1))
            return
        where = console()
        for table_rows, names in ((rows, FIGURES), (task_rows, {})):
            if table_rows:
                where.print(_table(table_rows, names))


def _table(rows: list[dict[str, Any]], names: Mapping[str, str]) -> Any:
    """Return a table with one line per row and one column per field. ``names`` are column titles for some of the fields."""
    from rich.table import Table

    fields = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*(names.get(name, name) for name in fields), box=None)
    for row in rows:
        table.add_row(*(_cell(row.get(name, "")) for name in fields))
    return table


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else shown(value)


def sample(
    student: Annotated[list[str], typer.Option(help="Folder or hub id of a model or adapter. May be repeated.")],
    data: Annotated[list[str], typer.Option(help="Rows, as for `kdkernels train`; prompts suffice.")],
    teacher: Annotated[list[str] | None, typer.Option(help="Further models, which get the teacher's prompt of a row.")] = None,
    max_new_tokens: NewTokens = 128,
    rows: Annotated[int, typer.Option(help="Number of rows to show, from the start of each --data.")] = 4,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the weights; auto: as saved.")] = Dtype.auto,
    columns: Annotated[str | None, typer.Option(help=COLUMNS)] = None,
    device: AsDevice = "auto",
    as_json: AsJson = False,
) -> None:
    """Show the models' responses to the prompts of data, side by side with the data's responses."""
    with failing():
        from .comparison import Sampling
        from .comparison import sample as draw

        how = Sampling(max_new_tokens, temperature, seed, dtype.value, device)
        roles = [*(("student", path) for path in student), *(("teacher", path) for path in teacher or [])]
        answered = draw(roles, data, rows, how, columns)
        if as_json:
            typer.echo(json.dumps(answered, indent=1))
            return
        from rich.table import Table

        where = console()
        for number, row in enumerate(answered, 1):
            where.print(f"{number}. {row['prompt']}")
            response = [row["response"]] if "response" in row else []
            table = Table(*(["data"] if response else []), *(f"{text['role']} {text['model']}" for text in row["texts"]), expand=True)
            table.add_row(*response, *(text["text"] for text in row["texts"]))
            where.print(table)


def chat(
    student: Annotated[str, typer.Option(help="Folder or hub id of a model or adapter.")],
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the weights; auto: as saved.")] = Dtype.auto,
    device: AsDevice = "auto",
) -> None:
    """Chat with a model on the terminal, with its chat template. Nothing is saved."""
    with failing():
        from .comparison import Sampling
        from .comparison import chat as talk

        how = Sampling(max_new_tokens, temperature, seed, dtype.value, device)
        talk(student, system, how, _turns(), lambda text: typer.echo(text, nl=False))


def _turns() -> Iterator[str]:
    """Yield the user's lines until the input ends."""
    with suppress(EOFError):
        while True:
            yield input("> ")
    typer.echo()
