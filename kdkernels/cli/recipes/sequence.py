"""``kdkernels recipe sequence``."""

from __future__ import annotations

from typing import Annotated

import typer

from ..options import grouped
from .shared import MaxTokens, Rows, Samples, Teacher, Temperature, finish, sampling, writing

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: `kdkernels recipe sequence --data questions.jsonl --out seq --teacher teacher/`")(grouped(sequence))


def sequence(
    files: Rows,
    teacher: Teacher,
    samples: Samples = 1,
    temperature: Temperature = 0.0,
    max_tokens: MaxTokens = 256,
    closest: Annotated[bool, typer.Option("--closest", help="Keep the sample that is closest to the row's response (by ROUGE-L).")] = False,
) -> None:
    """Sequence-level distillation (Kim and Rush 2016): the teacher's text becomes the response."""
    with writing(files.out, "sequence", data=files.data) as output:
        from ...recipes.rows import read_items
        from ...recipes.sequence import sequence_level

        items = read_items(files.data, files.prompt, files.response, needs_response=closest)
        how = sampling(max_tokens, temperature, samples)
        model = teacher.text_model(files.seed)
        rows, tally = sequence_level(items, model, files.log, how, closest=closest, chat=not files.plain)
        finish(rows, tally, output, teacher=model)
