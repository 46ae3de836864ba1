"""``kdkernels recipe socratic``."""

from __future__ import annotations

import typer

from ..options import grouped
from .shared import AnswerKind, Kind, MaxTokens, Rows, Samples, Teacher, Temperature, finish, sampling, writing

__all__ = ["register"]

NAMES = ("rows.jsonl", "questioner.jsonl", "solver.jsonl")


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: `kdkernels recipe socratic --data sums.jsonl --out socratic --teacher teacher/`")(grouped(socratic))


def socratic(
    files: Rows,
    teacher: Teacher,
    kind: AnswerKind = Kind.number,
    samples: Samples = 1,
    temperature: Temperature = 0.0,
    max_tokens: MaxTokens = 256,
) -> None:
    """Socratic chain of thought (Shridhar et al. 2022): rows for a student that asks sub-questions, and for one that answers them.

    Writes questioner.jsonl and solver.jsonl; rows.jsonl holds both, for one student that does both.
    """
    with writing(files.out, "socratic", NAMES, data=files.data) as output:
        from ...recipes import socratic as recipe
        from ...recipes.rows import read_items

        items = read_items(files.data, files.prompt, files.response)
        how = sampling(max_tokens, temperature, samples)
        model = teacher.text_model(files.seed)
        solutions, tally = recipe.decompose(items, model, files.log, how, kind=kind.value)
        chat = not files.plain
        questioner, solver = recipe.questioner_rows(solutions, chat=chat), recipe.solver_rows(solutions, chat=chat)
        if solutions:
            output.write_rows("questioner.jsonl", questioner)
            output.write_rows("solver.jsonl", solver)
        both = [{**row, "key": f"{row['key']}/{row['task']}"} for row in questioner + solver]
        finish(both, tally, output, teacher=model)
