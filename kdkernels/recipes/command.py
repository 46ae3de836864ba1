"""``kdkernels recipe``: each recipe as a command. What a recipe needs is imported when it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from ..teachers.text import TextModel
    from .rows import Row, Sampling, Tally

__all__ = ["app"]

app = typer.Typer(
    name="recipe",
    help="Training rows from a teacher's text: in-context learning, chain of thought, instruction following, sequence-level distillation.",
    epilog="Then `kdkernels train --data OUT/rows.jsonl ...`. Papers, formulas and runnable examples: docs/recipes.md and docs/methods.md.",
    rich_markup_mode="markdown",
    no_args_is_help=True,
)


class Kind(str, Enum):
    """Of final answers."""

    number = "number"
    choice = "choice"
    text = "text"


Data = Annotated[Path, typer.Option(help="JSONL: `prompt` (or `messages`) and the field of --response in each row.")]
Out = Annotated[Path, typer.Option(help="Folder: rows.jsonl to train on, and the log of replies that a second run continues from.")]
Teacher = Annotated[str | None, typer.Option(help="Folder of a transformers model to ask in this process.")]
BaseUrl = Annotated[str | None, typer.Option(help="Server to ask instead, such as http://localhost:8000/v1 (OpenAI-compatible).")]
Model = Annotated[str | None, typer.Option(help="The model's name at --base-url.")]
Prompt = Annotated[str, typer.Option(help="Field of the question, in rows without `messages`.")]
Response = Annotated[str, typer.Option(help="Field of the response or final answer.")]
Seed = Annotated[int, typer.Option(help="Of everything drawn at random.")]
Samples = Annotated[int, typer.Option(help="Replies to each prompt; more than 1 needs a temperature.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
MaxTokens = Annotated[int, typer.Option(help="Of a reply; a reply cut off there is dropped.")]
Plain = Annotated[bool, typer.Option("--plain", help="Write `prompt` instead of `messages`, for students without a chat template.")]
Student = Annotated[Path | None, typer.Option(help="Its tokenizer counts the tokens of each task. Without it, bytes stand for tokens.")]
AnswerKind = Annotated[Kind, typer.Option(help="What the final answers are.")]


@app.command(epilog="Example: `kdkernels recipe sequence --data questions.jsonl --out seq --teacher teacher/`")
def sequence(
    data: Data,
    out: Out,
    teacher: Teacher = None,
    base_url: BaseUrl = None,
    model: Model = None,
    prompt: Prompt = "prompt",
    response: Response = "response",
    samples: Samples = 1,
    temperature: Temperature = 0.0,
    max_tokens: MaxTokens = 256,
    closest: Annotated[bool, typer.Option("--closest", help="Keep the sample that is closest to the row's response (by ROUGE-L).")] = False,
    seed: Seed = 0,
    plain: Plain = False,
) -> None:
    """Sequence-level distillation (Kim and Rush 2016): the teacher's text as response."""
    with _errors():
        from .rows import read_items
        from .sequence import sequence_level

        items = read_items(data, prompt, response, needs_response=closest)
        asked = _text_model(teacher, base_url, model, seed)
        rows, tally = sequence_level(
            items, asked, out / "replies.jsonl", _sampling(max_tokens, temperature, samples), closest=closest, chat=not plain
        )
        _finish(rows, tally, out / "rows.jsonl")


class View(str, Enum):
    """Of the student in in-context distillation."""

    without = "without"
    with_ = "with"


@app.command("in-context", epilog="Example: `kdkernels recipe in-context --data rows.jsonl --out icl -k 4`")
def in_context(
    data: Data,
    out: Out,
    k: Annotated[int, typer.Option("-k", "--demonstrations", help="Demonstrations of each row.")] = 4,
    student_view: Annotated[View, typer.Option(help="Does the student see the demonstrations? The teacher always does.")] = View.without,
    pool: Annotated[Path | None, typer.Option(help="JSONL to draw the demonstrations from; default: the other rows.")] = None,
    lm_weight: Annotated[float, typer.Option(help="Adds each row as plain text with this weight (the LM term); 0 for none.")] = 0.0,
    teacher: Teacher = None,
    base_url: BaseUrl = None,
    model: Model = None,
    prompt: Prompt = "prompt",
    response: Response = "response",
    max_tokens: MaxTokens = 256,
    seed: Seed = 0,
    plain: Plain = False,
) -> None:
    """In-context distillation: rows for a teacher that reads demonstrations, and a student that does not, or does too.

    With a teacher (or server) the responses are its own, given the demonstrations; without, the rows'.
    """
    with _errors():
        from . import in_context as recipe
        from .rows import RecipeError, Tally, read_items

        if k < 1:
            raise RecipeError(f"-k {k}: at least one demonstration is needed; without any, take `kdkernels train` on the rows themselves")
        if not 0 <= lm_weight < float("inf"):
            raise RecipeError(f"--lm-weight {lm_weight}: it must be finite and >= 0")
        ask = teacher is not None or base_url is not None
        items = read_items(data, prompt, response, needs_response=not ask or pool is None)
        others = None if pool is None else read_items(pool, prompt, response)
        shown = recipe.demonstrations(items, k, seed, others)
        tally = Tally(len(items), len(items), len(items))
        if ask:
            asked = _text_model(teacher, base_url, model, seed)
            items, shown, tally = recipe.answered(items, shown, asked, out / "replies.jsonl", _sampling(max_tokens))
        make = recipe.context_distillation if student_view is View.without else recipe.in_context_tuning
        rows = make(items, shown, chat=not plain)
        if lm_weight:
            rows += recipe.language_modelling(items, lm_weight)
        _finish(rows, tally, out / "rows.jsonl")


class Style(str, Enum):
    """Of chain-of-thought rows."""

    fine_tune = "fine-tune"
    step_by_step = "step-by-step"
    mt_cot = "mt-cot"


@app.command(
    "chain-of-thought", epilog="Example: `kdkernels recipe chain-of-thought --data sums.jsonl --out cot --teacher teacher/ --samples 4`"
)
def chain_of_thought(
    data: Data,
    out: Out,
    style: Annotated[
        Style, typer.Option(help="fine-tune: rationale and answer. step-by-step, mt-cot: two tasks with prefixes and weights.")
    ] = Style.fine_tune,
    kind: AnswerKind = Kind.number,
    teacher: Teacher = None,
    base_url: BaseUrl = None,
    model: Model = None,
    examples: Annotated[
        Path | None, typer.Option(help="JSONL of worked examples to show, with a field `rationale` each (few-shot).")
    ] = None,
    instruction: Annotated[str | None, typer.Option(help="Words that ask for the rationale, in place of the recipe's.")] = None,
    most: Annotated[int | None, typer.Option(help="Rationales kept for each row, at most.")] = None,
    rationale_weight: Annotated[
        float | None, typer.Option(help="step-by-step: lambda, default 1. mt-cot: w in (0, 1), default 0.5.")
    ] = None,
    student: Student = None,
    prompt: Prompt = "prompt",
    response: Response = "response",
    samples: Samples = 1,
    temperature: Temperature = 0.0,
    max_tokens: MaxTokens = 256,
    seed: Seed = 0,
    plain: Plain = False,
) -> None:
    """Rationales of the teacher, kept if their final answer is the row's: Fine-tune-CoT, Distilling Step-by-Step, MT-CoT."""
    with _errors():
        from . import chain_of_thought as recipe
        from .rows import RecipeError, read_items

        items = read_items(data, prompt, response)
        worked = [] if examples is None else read_items(examples, prompt, response)
        weights = _task_weights(style, rationale_weight)
        asked = _text_model(teacher, base_url, model, seed)
        found, tally = recipe.rationales(
            items, asked, out / "replies.jsonl", _sampling(max_tokens, temperature, samples),
            kind=kind.value, examples=worked, most=most, **({} if instruction is None else {"instruction": instruction}),
        )  # fmt: skip
        if not found:
            raise RecipeError(f"no rationale was kept of {tally.candidates}: {_reasons(tally)}. See {out / 'replies.jsonl'}")
        if style is Style.fine_tune:
            rows = recipe.fine_tune_cot(found, chat=not plain)
        else:
            named = "step-by-step" if style is Style.step_by_step else "mt-cot"
            rows = recipe.multi_task(found, style=named, chat=not plain)  # type: ignore[arg-type]
            rows = recipe.balance(rows, weights, _lengths(rows, student))
        _finish(rows, tally, out / "rows.jsonl")


class Against(str, Enum):
    """The perturbed answer of contrastive decoding."""

    none = "none"
    wrong = "wrong"


@app.command(epilog="Example: `kdkernels recipe scott --data sums.jsonl --out scott --teacher teacher/`")
def scott(
    data: Data,
    out: Out,
    teacher: Annotated[Path, typer.Option(help="Folder of a transformers model with a chat template: its log-probabilities are needed.")],
    strength: Annotated[
        float, typer.Option(help="Weight of the log-probability under the other answer; 0 is plain greedy decoding.")
    ] = 0.5,
    against: Annotated[Against, typer.Option(help="Contrast the gold answer with none at all, or with a wrong one.")] = Against.none,
    kind: AnswerKind = Kind.number,
    student: Student = None,
    counterfactual_weight: Annotated[float, typer.Option(help="Of the counterfactual task; the factual one has 1.")] = 1.0,
    device: Annotated[str, typer.Option(help="Where the teacher runs: auto, cpu, cuda, cuda:1.")] = "auto",
    batch: Annotated[int, typer.Option(help="Prompts decoded at once.")] = 8,
    prompt: Prompt = "prompt",
    response: Response = "response",
    max_tokens: MaxTokens = 128,
    seed: Seed = 0,
    plain: Plain = False,
) -> None:
    """SCOTT (Wang et al. 2023): contrastive rationales for right and wrong answers, factual and counterfactual rows."""
    with _errors():
        from . import scott as recipe
        from .chain_of_thought import balance
        from .rows import Tally, read_items

        items = read_items(data, prompt, response)
        wrong = recipe.wrong_answers(items, kind.value, seed)
        right = [item.response or "" for item in items]
        loaded, tokenizer = _transformers(teacher, device)

        def explained(given: Sequence[str], other: Sequence[str], log: str) -> list[str]:
            against_it = other if against is Against.wrong else [""] * len(items)
            return recipe.contrastive_rationales(
                items, given, against_it, loaded, tokenizer, out / log, strength=strength, max_tokens=max_tokens, batch=batch
            )

        factual = recipe.factual_rows(items, explained(right, wrong, "factual.jsonl"), chat=not plain)
        counterfactual = recipe.counterfactual_rows(items, wrong, explained(wrong, right, "counterfactual.jsonl"), chat=not plain)
        rows = factual + counterfactual
        tally = Tally(len(items), 2 * len(items), len(rows))
        if tally.candidates > tally.kept:
            tally.dropped["empty or cut off at max_tokens"] = tally.candidates - tally.kept
        if factual and counterfactual:
            rows = balance(rows, {"factual": 1.0, "counterfactual": counterfactual_weight}, _lengths(rows, student))
        _finish(rows, tally, out / "rows.jsonl")


@app.command(epilog="Example: `kdkernels recipe socratic --data sums.jsonl --out socratic --teacher teacher/`")
def socratic(
    data: Data,
    out: Out,
    kind: AnswerKind = Kind.number,
    teacher: Teacher = None,
    base_url: BaseUrl = None,
    model: Model = None,
    prompt: Prompt = "prompt",
    response: Response = "response",
    samples: Samples = 1,
    temperature: Temperature = 0.0,
    max_tokens: MaxTokens = 256,
    seed: Seed = 0,
    plain: Plain = False,
) -> None:
    """Socratic chain of thought (Shridhar et al. 2022): rows for a student that asks sub-questions, and for one that answers them.

    Writes questioner.jsonl and solver.jsonl; rows.jsonl holds both, for one student that does both.
    """
    with _errors():
        from . import socratic as recipe
        from .rows import read_items, write_jsonl

        items = read_items(data, prompt, response)
        asked = _text_model(teacher, base_url, model, seed)
        found, tally = recipe.decompose(
            items, asked, out / "replies.jsonl", _sampling(max_tokens, temperature, samples), kind=kind.value
        )  # fmt: skip
        questioner, solver = recipe.questioner_rows(found, chat=not plain), recipe.solver_rows(found, chat=not plain)
        if found:
            write_jsonl(out / "questioner.jsonl", questioner)
            write_jsonl(out / "solver.jsonl", solver)
        both = [{**row, "key": f"{row['key']}/{row['task']}"} for row in questioner + solver]
        _finish(both, tally, out / "rows.jsonl")


@app.command(epilog="Example: `kdkernels recipe disco --data reviews.jsonl --labels good,bad --out disco --teacher teacher/`")
def disco(
    data: Annotated[Path, typer.Option(help="JSONL: `text`, `label` and perhaps `context` in each row.")],
    out: Out,
    labels: Annotated[str, typer.Option(help="All labels, separated by commas.")],
    teacher: Teacher = None,
    base_url: BaseUrl = None,
    model: Model = None,
    judge: Annotated[str | None, typer.Option(help="Folder of another model to judge; default: the teacher judges itself.")] = None,
    judge_url: Annotated[str | None, typer.Option(help="Server of the judge.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="Its name there.")] = None,
    samples: Annotated[int, typer.Option(help="Perturbations asked for, for each row and other label.")] = 4,
    temperature: Temperature = 0.8,
    votes: Annotated[int, typer.Option(help="Of the judge on each text; 1 is one greedy vote.")] = 1,
    threshold: Annotated[float, typer.Option(help="How far the label must move, in shares of votes.")] = 0.5,
    max_tokens: MaxTokens = 64,
    seed: Seed = 0,
    plain: Plain = False,
) -> None:
    """DISCO (Chen et al. 2022): counterfactual rows, generated by filling blanks and filtered by a judge."""
    with _errors():
        from . import disco as recipe
        from .rows import Item, RecipeError, read_jsonl

        names = [name.strip() for name in labels.split(",") if name.strip()]
        if len(set(names)) < 2 or len(set(names)) < len(names):
            raise RecipeError(f"--labels {labels}: two different labels at least are needed, each once")
        items = [
            Item(str(row.get("key", n)), ({"role": "user", "content": ""},), None, row, where)
            for n, (where, row) in enumerate(read_jsonl(data))
        ]
        asked = _text_model(teacher, base_url, model, seed)
        judging = asked if judge is None and judge_url is None else _text_model(judge, judge_url, judge_model, seed, "judge")
        found, tally = recipe.counterfactuals(
            items, names, asked, judging, out, seed=seed, threshold=threshold,
            filling=_sampling(max_tokens, temperature, samples), judging=_sampling(max_tokens, 0.0 if votes == 1 else 1.0, votes),
        )  # fmt: skip
        _finish(recipe.rows(items, found, names, chat=not plain), tally, out / "rows.jsonl")


@app.command(epilog="Example: `kdkernels recipe lion --data seeds.jsonl --out lion --teacher teacher/`")
def lion(
    data: Annotated[Path, typer.Option(help="JSONL of seed instructions: the field of --prompt.")],
    out: Annotated[Path, typer.Option(help="Folder of the whole loop, a folder in it for each round.")],
    teacher: Teacher = None,
    base_url: BaseUrl = None,
    model: Model = None,
    student: Annotated[str | None, typer.Option(help="Folder of the student, trained on the latest imitate.jsonl.")] = None,
    referee: Annotated[str | None, typer.Option(help="Folder of the referee; default: the teacher.")] = None,
    referee_url: Annotated[str | None, typer.Option(help="Server of the referee.")] = None,
    referee_model: Annotated[str | None, typer.Option(help="Its name there.")] = None,
    generator: Annotated[str | None, typer.Option(help="Folder of the generator; default: the teacher.")] = None,
    generator_url: Annotated[str | None, typer.Option(help="Server of the generator.")] = None,
    generator_model: Annotated[str | None, typer.Option(help="Its name there.")] = None,
    count: Annotated[int, typer.Option(help="New instructions of each round, half like hard ones, half like easy ones.")] = 100,
    threshold: Annotated[float, typer.Option(help="Hard is a mean difference of at least this.")] = 1.0,
    rouge: Annotated[float, typer.Option(help="A new instruction above this ROUGE-L to another is dropped.")] = 0.7,
    temperature: Annotated[float, typer.Option(help="Of the generator.")] = 1.0,
    prompt: Prompt = "prompt",
    max_tokens: MaxTokens = 256,
    seed: Seed = 0,
    plain: Plain = False,
) -> None:
    """Lion (Jiang et al. 2023): imitate, discriminate, generate; one JSONL for each stage.

    The first call writes round-0/imitate.jsonl to train on. Each call with the student so trained judges it, makes new instructions, and
    writes the next round's imitate.jsonl. Whatever ends a call, the same call goes on.
    """
    with _errors():
        from . import lion as recipe
        from .rows import read_items

        seeds = [item.prompt for item in read_items(data, prompt, needs_response=False)]
        settings = {"seeds": _hash(seeds), "count": count, "threshold": threshold, "rouge": rouge, "seed": seed, "max_tokens": max_tokens}
        recipe.begin(out, settings)
        number, waits_for = recipe.stage(out)
        asked = _text_model(teacher, base_url, model, seed)
        sampling = _sampling(max_tokens)
        if waits_for == "student" and student is not None:
            weights = recipe.weights_of(student)
            if number and recipe.student_of(out, number - 1) == weights:
                _say(f"Round {number - 1} is done with this student. Train it on {recipe.folder_of(out, number) / 'imitate.jsonl'} first.")
                return
            recipe.begin(recipe.folder_of(out, number), {"student": weights})
            _, pool = recipe.instructions(seeds, out, number)
            own = _text_model(student, None, None, seed, "student")
            judges = asked if referee is None and referee_url is None else _text_model(referee, referee_url, referee_model, seed, "referee")
            makes = (
                asked
                if generator is None and generator_url is None
                else _text_model(generator, generator_url, generator_model, seed, "generator")
            )
            judged, tally = recipe.discriminate(
                pool, asked, own, judges, out, number, answering=sampling, rating=_sampling(32), threshold=threshold
            )  # fmt: skip
            hard = sum(j.difficulty == "hard" for j in judged)
            _report(tally, f"Round {number}: {hard} hard and {len(judged) - hard} easy instructions")
            _, tally = recipe.generate(
                judged, pool, makes, out, number, _sampling(max_tokens, temperature), count=count, seed=seed, threshold=rouge
            )  # fmt: skip
            _report(tally, f"Round {number}: {tally.kept} new instructions")
            number, waits_for = recipe.stage(out)
        path = recipe.folder_of(out, number) / "imitate.jsonl"
        if waits_for == "imitate":
            train, _ = recipe.instructions(seeds, out, number)
            _, tally = recipe.imitate(train, asked, out, number, sampling, chat=not plain)
            _report(tally, f"Round {number}: {path}")
        _say(f"Train the student on {path}, then give it to this command as --student.")


def _task_weights(style: Style, rationale_weight: float | None) -> dict[str, float]:
    from .rows import RecipeError

    if style is Style.fine_tune:
        if rationale_weight is not None:
            raise RecipeError("--rationale-weight is for --style step-by-step or mt-cot: fine-tune has one task")
        return {}
    if style is Style.step_by_step:
        return {"label": 1.0, "rationale": 1.0 if rationale_weight is None else rationale_weight}
    w = 0.5 if rationale_weight is None else rationale_weight
    if not 0 < w < 1:
        raise RecipeError(f"--rationale-weight {w}: in mt-cot it is a share, > 0 and < 1")
    return {"label": 1 - w, "rationale": w}


def _sampling(max_tokens: int, temperature: float = 0.0, samples: int = 1) -> Sampling:
    from .rows import Sampling

    return Sampling(max_tokens, temperature, samples)


def _text_model(path: str | None, base_url: str | None, model: str | None, seed: int, role: str = "teacher") -> TextModel:
    from .rows import RecipeError

    url_option, model_option = ("--base-url", "--model") if role == "teacher" else (f"--{role}-url", f"--{role}-model")
    if (path is None) == (base_url is None):
        raise RecipeError(f"give one of --{role} (a folder) and {url_option} (a server){'' if path is None else ', not both'}")
    if path is not None:
        from ..teachers.jobs import device_of
        from ..teachers.local import LocalModel

        if not (Path(path) / "config.json").is_file():
            raise RecipeError(f"--{role} {path}: no folder of a transformers model (it has no config.json)")
        return LocalModel(path, device=device_of("auto"), seed=seed)
    if model is None:
        raise RecipeError(f"{url_option} {base_url}: {model_option} is missing, the model's name there")
    from ..teachers.http import HTTPModel

    return HTTPModel(str(base_url), model, seed=seed)


def _transformers(path: Path, device: str) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, in inference mode."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .rows import RecipeError

    if not (path / "config.json").is_file():
        raise RecipeError(f"--teacher {path}: no folder of a transformers model (it has no config.json)")
    from ..teachers.jobs import device_of

    tokenizer = AutoTokenizer.from_pretrained(path)
    if not tokenizer.chat_template:
        raise RecipeError(f"--teacher {path}: its tokenizer has no chat template")
    return AutoModelForCausalLM.from_pretrained(path).to(device_of(device)).eval(), tokenizer


def _lengths(rows: Sequence[Row], student: Path | None) -> list[int]:
    """Of each row's response: the tokens that the trainer will score, or bytes in their place."""
    if student is None:
        _say("No --student: the tasks are balanced by bytes instead of its tokens.")
        return [len(row["response"].encode()) + 1 for row in rows]
    from transformers import AutoTokenizer

    from ..trainer import load_examples

    return [len(example.student_scored) for example in load_examples(rows, AutoTokenizer.from_pretrained(student))]


def _finish(rows: Sequence[Row], tally: Tally, path: Path) -> None:
    """Writes the rows and says what became of the data."""
    from .rows import RecipeError, write_jsonl

    if not rows or not tally.kept:
        raise RecipeError(f"nothing was kept of {tally.candidates} candidates ({_reasons(tally)}): {path} is not written")
    write_jsonl(path, rows)
    _report(tally, f"{len(rows)} rows in {path}")


def _reasons(tally: Tally) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in tally.dropped.most_common()) or "none was made"


def _report(tally: Tally, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "number")
    counts: Mapping[str, int] = {"rows read": tally.rows, "candidates": tally.candidates, "kept": tally.kept}
    for what, number in {**counts, **{f"dropped: {reason}": n for reason, n in tally.dropped.most_common()}}.items():
        table.add_row(what, f"{number:,}")
    console = Console(soft_wrap=True, highlight=False)
    console.print(title)
    console.print(table)


def _hash(value: Any) -> str:
    from .rows import fingerprint

    return fingerprint(value)


def _say(text: str) -> None:
    typer.echo(text)


@contextmanager
def _errors() -> Iterator[None]:
    """What the user can mend ends in one line, without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. The same command goes on from here.", err=True)
        raise typer.Exit(130) from None
    except (ValueError, OSError) as error:
        _fail(" ".join(str(error).split()))
    except RuntimeError as error:
        from ..files import FileError
        from ..teachers.http import HTTPModelError

        if not isinstance(error, (FileError, HTTPModelError)):
            raise
        _fail(str(error))
    except ModuleNotFoundError as error:
        _fail(f"this command needs {error.name}: pip install 'kdkernels[train]'")


def _fail(message: str) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(2)
