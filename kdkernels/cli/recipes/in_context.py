"""``kdkernels recipe in-context``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..options import grouped
from .shared import MaxTokens, Rows, Teacher, finish, sampling, writing

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.command("in-context", epilog="Example: `kdkernels recipe in-context --data rows.jsonl --out icl -k 4`")(grouped(in_context))


class View(str, Enum):
    """The student's prompt in in-context distillation."""

    without = "without"
    with_ = "with"


def in_context(
    files: Rows,
    teacher: Teacher,
    k: Annotated[int, typer.Option("-k", "--demonstrations", help="Demonstrations per row.")] = 4,
    student_view: Annotated[View, typer.Option(help="The student's prompt: without or with the demonstrations.")] = View.without,
    pool: Annotated[Path | None, typer.Option(help="JSONL to draw the demonstrations from. Default: the other rows of --data.")] = None,
    lm_weight: Annotated[float, typer.Option(help="Weight of the LM term, which adds each row as plain text; 0 for none.")] = 0.0,
    max_tokens: MaxTokens = 256,
) -> None:
    """In-context distillation: the teacher's prompt begins with demonstrations, the student's prompt only with --student-view with.

    A teacher or server writes the responses, given the demonstrations. Without one, the responses of the rows are used.
    """
    with writing(files.out, "in-context", data=files.data, pool=pool) as output:
        from ...recipes import in_context as recipe
        from ...recipes.rows import RecipeError, Tally, read_items

        if k < 1:
            raise RecipeError(f"-k {k}: it must be at least 1; without demonstrations, run `kdkernels train` on the rows themselves")
        if not 0 <= lm_weight < float("inf"):
            raise RecipeError(f"--lm-weight {lm_weight}: it must be finite and >= 0")
        items = read_items(files.data, files.prompt, files.response, needs_response=not teacher.is_named or pool is None)
        others = None if pool is None else read_items(pool, files.prompt, files.response)
        shown = recipe.demonstrations(items, k, files.seed, others)
        tally, models = Tally(len(items), len(items), len(items)), {}
        if teacher.is_named:
            models = {"teacher": teacher.text_model(files.seed)}
            items, shown, tally = recipe.answered(items, shown, models["teacher"], files.log, sampling(max_tokens))
        make = recipe.context_distillation if student_view is View.without else recipe.in_context_tuning
        rows = make(items, shown, chat=not files.plain)
        if lm_weight:
            rows += recipe.language_modelling(items, lm_weight)
        finish(rows, tally, output, **models)
