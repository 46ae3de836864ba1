"""``kdkernels recipe scott``."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ...support.terminal import console, progress
from ..options import grouped
from .shared import AnswerKind, Kind, MaxTokens, Rows, Student, finish, folder, lengths, writing

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: `kdkernels recipe scott --data sums.jsonl --out scott --teacher teacher/`")(grouped(scott))


class Against(str, Enum):
    """The perturbed answer of contrastive decoding."""

    none = "none"
    wrong = "wrong"


def scott(
    files: Rows,
    teacher: Annotated[Path, typer.Option(help="Folder of a transformers model with a chat template. A server cannot be used.")],
    strength: Annotated[
        float, typer.Option(help="Weight of the log-probability given the other answer; 0 is plain greedy decoding.")
    ] = 0.5,
    against: Annotated[Against, typer.Option(help="The other answer: none (empty), or a wrong one.")] = Against.none,
    kind: AnswerKind = Kind.number,
    student: Student = None,
    counterfactual_weight: Annotated[float, typer.Option(help="Weight of the counterfactual task; the factual task has 1.")] = 1.0,
    device: Annotated[str, typer.Option(help="Device of the teacher: auto, cpu, cuda or cuda:N.")] = "auto",
    batch: Annotated[int, typer.Option(help="Prompts per batch.")] = 8,
    max_tokens: MaxTokens = 128,
) -> None:
    """SCOTT (Wang et al. 2023): contrastive rationales for right and wrong answers, factual and counterfactual rows."""
    with writing(files.out, "scott", data=files.data) as output:
        from ...recipes import scott as recipe
        from ...recipes.chain_of_thought import balance
        from ...recipes.rows import RecipeError, Tally, cut_short, read_items

        if max_tokens < 1 or batch < 1 or not 0 <= counterfactual_weight < float("inf"):
            raise RecipeError("--max-tokens and --batch must be at least 1, --counterfactual-weight finite and >= 0")
        items = read_items(files.data, files.prompt, files.response)
        wrong = recipe.wrong_answers(items, kind.value, files.seed)
        right = [item.response or "" for item in items]
        from ...teachers.jobs import device_of

        explainer = recipe.Explainer.load(
            folder(teacher, "teacher"), device_of(device), strength=strength, max_tokens=max_tokens, batch=batch
        )

        tally = Tally(len(items), 2 * len(items))

        def explained(answers: Sequence[str], other: Sequence[str], name: str) -> list[str]:
            contrasted = other if against is Against.wrong else [""] * len(items)
            with progress(console(), f"rationales in {name}") as (start, advance, _):
                start(len(items))
                replies = explainer.replies(items, answers, contrasted, files.out / name, report=advance)
            for reply in replies:
                if reason := cut_short(reply) or (None if reply.text else "empty"):
                    tally.drop(reason)
            return [reply.text for reply in replies]

        factual = recipe.factual_rows(items, explained(right, wrong, "factual.jsonl"), chat=not files.plain)
        counterfactual = recipe.counterfactual_rows(items, wrong, explained(wrong, right, "counterfactual.jsonl"), chat=not files.plain)
        rows = factual + counterfactual
        tally.kept = len(rows)
        if factual and counterfactual:
            rows = balance(rows, {"factual": 1.0, "counterfactual": counterfactual_weight}, lengths(rows, student))
        finish(rows, tally, output)
