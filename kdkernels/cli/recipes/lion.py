"""``kdkernels recipe lion``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...support.terminal import say
from ..options import grouped
from .shared import KeyVariable, MaxTokens, Plain, Prompt, Seed, Teacher, report, report_usage, sampling, writing

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: `kdkernels recipe lion --data seeds.jsonl --out lion --teacher teacher/`")(grouped(lion))


def lion(
    data: Annotated[Path, typer.Option(help="JSONL of seed instructions, in the field --prompt.")],
    out: Annotated[Path, typer.Option(help="Output folder, with a folder for each round.")],
    teacher: Teacher,
    student: Annotated[str | None, typer.Option(help="Folder of the student, trained on the latest imitate.jsonl.")] = None,
    referee: Annotated[str | None, typer.Option(help="Folder of the referee. Default: the teacher.")] = None,
    referee_url: Annotated[str | None, typer.Option(help="Server of the referee.")] = None,
    referee_model: Annotated[str | None, typer.Option(help="Model name on that server.")] = None,
    referee_key_variable: KeyVariable = None,
    generator: Annotated[str | None, typer.Option(help="Folder of the generator. Default: the teacher.")] = None,
    generator_url: Annotated[str | None, typer.Option(help="Server of the generator.")] = None,
    generator_model: Annotated[str | None, typer.Option(help="Model name on that server.")] = None,
    generator_key_variable: KeyVariable = None,
    count: Annotated[int, typer.Option(help="New instructions per round: half like hard ones, half like easy ones.")] = 100,
    threshold: Annotated[
        float, typer.Option(help="An instruction is hard if the teacher's mean rating exceeds the student's by at least this.")
    ] = 1.0,
    rouge: Annotated[float, typer.Option(help="Drop new instructions whose ROUGE-L with another instruction is above this.")] = 0.7,
    temperature: Annotated[float, typer.Option(help="Temperature of the generator.")] = 1.0,
    prompt: Prompt = "prompt",
    max_tokens: MaxTokens = 256,
    seed: Seed = 0,
    plain: Plain = False,
) -> None:
    """Lion (Jiang et al. 2023): imitate, discriminate, generate; one JSONL for each stage.

    The first call writes round-0/imitate.jsonl, on which you train the student. Each later call rates the trained student, generates new
    instructions, and writes the next round's imitate.jsonl. Run an interrupted call again to continue it.
    """
    with writing(out, "lion", (), data=data) as output:
        from ...recipes import lion as recipe
        from ...recipes.rows import RecipeError, fingerprint, read_items

        if count < 1 or not 0 < rouge < 1:
            raise RecipeError(f"--count {count} must be at least 1, --rouge {rouge} between 0 and 1")
        answering, making = sampling(max_tokens), sampling(max_tokens, temperature)
        seeds = [item.prompt for item in read_items(data, prompt, needs_response=False)]
        settings = {
            "seeds": fingerprint(seeds), "count": count, "threshold": threshold, "rouge": rouge, "seed": seed, "max_tokens": max_tokens
        }  # fmt: skip
        output.check(recipe.files_of(out), {"--data": data})
        output.claim("settings.json")
        recipe.begin(out, settings)
        number, waits_for = recipe.stage(out)
        judging = waits_for == "student" and student is not None
        if judging and number and recipe.student_of(out, number - 1) == recipe.weights_of(str(student)):
            path = recipe.folder_of(out, number) / "imitate.jsonl"
            say(f"Round {number - 1} is done with this student. Train it on {path} first.")
            return
        models = {}
        if judging:
            models["teacher"] = model = teacher.text_model(seed)
            models["referee"] = teacher.other("referee", referee, referee_url, referee_model, seed, model, referee_key_variable)
            models["generator"] = teacher.other("generator", generator, generator_url, generator_model, seed, model, generator_key_variable)
            models["student"] = teacher.other("student", student, None, None, seed, model)
            # After loading all models: a wrong path must not be recorded as the round's student.
            for name in ("settings.json", "judged.jsonl", "generated.jsonl"):
                output.claim(f"round-{number}/{name}")
            recipe.begin(recipe.folder_of(out, number), {"student": recipe.weights_of(str(student))})
            _, pool = recipe.instructions(seeds, out, number)
            judged, tally = recipe.discriminate(
                pool, models["teacher"], models["student"], models["referee"], out, number,
                answering=answering, rating=sampling(32), threshold=threshold,
            )  # fmt: skip
            hard = sum(j.difficulty == "hard" for j in judged)
            report(tally, f"Round {number}: {hard} hard and {len(judged) - hard} easy instructions")
            _, tally = recipe.generate(judged, pool, models["generator"], out, number, making, count=count, seed=seed, threshold=rouge)
            report(tally, f"Round {number}: {tally.kept} new instructions")
            number, waits_for = recipe.stage(out)
        path = recipe.folder_of(out, number) / "imitate.jsonl"
        if waits_for == "imitate":
            model = models["teacher"] if models else teacher.text_model(seed)
            models["teacher"] = model
            train, _ = recipe.instructions(seeds, out, number)
            output.claim(f"round-{number}/imitate.jsonl")
            _, tally = recipe.imitate(train, model, out, number, answering, chat=not plain)
            report(tally, f"Round {number}: {path}")
        report_usage(**models)
        say(f"Train the student on {path}, then run this command with it as --student.")
