"""``kdkernels recipe chain-of-thought``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..options import grouped
from .shared import AnswerKind, Kind, MaxTokens, Rows, Samples, Student, Teacher, Temperature, finish, lengths, sampling, writing

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.command(
        "chain-of-thought",
        epilog="Example: `kdkernels recipe chain-of-thought --data sums.jsonl --out cot --teacher teacher/ --samples 4 --temperature 0.8`",
    )(grouped(chain_of_thought))


class Style(str, Enum):
    """Form of chain-of-thought rows."""

    fine_tune = "fine-tune"
    step_by_step = "step-by-step"
    mt_cot = "mt-cot"


def chain_of_thought(
    files: Rows,
    teacher: Teacher,
    style: Annotated[
        Style, typer.Option(help="fine-tune: rationale and answer. step-by-step, mt-cot: two tasks with prefixes and weights.")
    ] = Style.fine_tune,
    kind: AnswerKind = Kind.number,
    examples: Annotated[
        Path | None, typer.Option(help="JSONL of worked examples for the teacher's prompt (few-shot), each with a field `rationale`.")
    ] = None,
    instruction: Annotated[str | None, typer.Option(help="Request for a rationale, in place of the recipe's.")] = None,
    most: Annotated[int | None, typer.Option(help="Maximum number of rationales to keep for each row.")] = None,
    rationale_weight: Annotated[
        float | None, typer.Option(help="step-by-step: lambda, default 1. mt-cot: w in (0, 1), default 0.5.")
    ] = None,
    student: Student = None,
    samples: Samples = 1,
    temperature: Temperature = 0.0,
    max_tokens: MaxTokens = 256,
) -> None:
    """Chain of thought: rationales of the teacher with the right final answer (Fine-tune-CoT, Distilling Step-by-Step, MT-CoT)."""
    with writing(files.out, "chain-of-thought", data=files.data, examples=examples) as output:
        from ...recipes import chain_of_thought as recipe
        from ...recipes.rows import read_items

        items = read_items(files.data, files.prompt, files.response)
        worked = [] if examples is None else read_items(examples, files.prompt, files.response)
        weights = task_weights(style, rationale_weight)
        how = sampling(max_tokens, temperature, samples)
        model = teacher.text_model(files.seed)
        rationales, tally = recipe.rationales(
            items, model, files.log, how,
            kind=kind.value, examples=worked, most=most, **({} if instruction is None else {"instruction": instruction}),
        )  # fmt: skip
        if style is Style.fine_tune or not rationales:
            rows = recipe.fine_tune_cot(rationales, chat=not files.plain)
        else:
            named = "step-by-step" if style is Style.step_by_step else "mt-cot"
            rows = recipe.multi_task(items, rationales, style=named, chat=not files.plain)  # type: ignore[arg-type]
            rows = recipe.balance(rows, weights, lengths(rows, student))
        finish(rows, tally, output, teacher=model)


def task_weights(style: Style, rationale_weight: float | None) -> dict[str, float]:
    """Return the weight of each task.

    Raises:
        RecipeError: the weight is out of range, or the style has only one task.
    """
    from ...recipes.rows import RecipeError

    if style is Style.fine_tune:
        if rationale_weight is not None:
            raise RecipeError("--rationale-weight is for --style step-by-step or mt-cot: fine-tune has one task")
        return {}
    if style is Style.step_by_step:
        weight = 1.0 if rationale_weight is None else rationale_weight
        if not 0 <= weight < float("inf"):
            raise RecipeError(f"--rationale-weight {weight}: it must be finite and >= 0")
        return {"label": 1.0, "rationale": weight}
    w = 0.5 if rationale_weight is None else rationale_weight
    if not 0 < w < 1:
        raise RecipeError(f"--rationale-weight {w}: in mt-cot it is a share, > 0 and < 1")
    return {"label": 1 - w, "rationale": w}
