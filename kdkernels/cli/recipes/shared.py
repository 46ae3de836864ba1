"""Shared by the recipe commands: options, models, and the final report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from ...support.errors import counted
from ...support.files import Output
from ...support.terminal import console, say
from ..asking import Asking

if TYPE_CHECKING:
    from ...recipes.rows import Row, Sampling, Tally
    from ...teachers.progress import Watched
    from ...teachers.text import Counted

__all__ = [
    "AnswerKind", "KeyVariable", "Kind", "MaxTokens", "Plain", "Prompt", "Rows", "Samples", "Seed", "Student", "Teacher", "Temperature",
    "finish", "folder", "lengths", "reasons", "report", "report_judge", "report_usage", "sampling", "writing",
]  # fmt: skip

ROWS = "rows.jsonl"


class Kind(str, Enum):
    """Kind of final answers."""

    number = "number"
    choice = "choice"
    text = "text"


Prompt = Annotated[str, typer.Option(help="Field of the question, in rows without `messages`.")]
Seed = Annotated[int, typer.Option(help="Seed of everything drawn at random.")]
Plain = Annotated[bool, typer.Option("--plain", help="Write `prompt` instead of `messages`, for students without a chat template.")]
Out = Annotated[Path, typer.Option(help="Folder: rows.jsonl to train on, and the log of replies that a second run continues from.")]
Samples = Annotated[int, typer.Option(help="Replies to each prompt; more than 1 needs a temperature.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
MaxTokens = Annotated[int, typer.Option(help="Largest number of tokens of a reply; a reply cut off there is dropped.")]
Student = Annotated[Path | None, typer.Option(help="Its tokenizer counts the tokens of each task. Without it, bytes stand for tokens.")]
KeyVariable = Annotated[str | None, typer.Option(help="Variable of its key. Without it, only the server of --base-url gets one.")]
AnswerKind = Annotated[Kind, typer.Option(help="Kind of the final answers.")]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Data in, rows out."""

    data: Annotated[Path, typer.Option(help="JSONL: `prompt` (or `messages`) and the field of --response in each row.")]
    out: Out
    prompt: Prompt = "prompt"
    response: Annotated[str, typer.Option(help="Field of the response or final answer.")] = "response"
    seed: Seed = 0
    plain: Plain = False

    @property
    def log(self) -> Path:
        return self.out / "replies.jsonl"


@dataclass(frozen=True, kw_only=True)
class Teacher(Asking):
    """The model that a recipe asks."""

    teacher: Annotated[str | None, typer.Option(help="Folder of a transformers model to ask in this process.")] = None
    base_url: Annotated[str | None, typer.Option(help="Server to ask instead, such as http://localhost:8000/v1 (OpenAI-compatible).")] = (
        None
    )
    model: Annotated[str | None, typer.Option(help="The model's name at --base-url.")] = None

    @property
    def given(self) -> bool:
        return self.teacher is not None or self.base_url is not None

    def text_model(self, seed: int) -> Watched:
        """The teacher, with a bar while it is asked.

        Raises:
            RecipeError: neither a folder nor a server, or both.
        """
        return self._watched(self.teacher, self.base_url, self.model, seed, "teacher")

    def other(
        self, role: str, path: str | None, url: str | None, model: str | None, seed: int, default: Watched, key_variable: str | None = None
    ) -> Watched:
        """The model of another role, asked as the teacher is; ``default`` where none is named.

        A key goes to the server that it was named for: without a ``key_variable`` of its own, only the teacher's server gets the teacher's.
        """
        if path is None and url is None:
            return default
        known = url is not None and self.base_url is not None and urlsplit(url)[:2] == urlsplit(self.base_url)[:2]
        key = key_variable or (self.key_variable if known else "")
        return dataclasses.replace(self, key_variable=key)._watched(path, url, model, seed, role)

    def _watched(self, path: str | None, url: str | None, model: str | None, seed: int, role: str) -> Watched:
        from ...recipes.rows import RecipeError
        from ...teachers.progress import Watched

        url_option, model_option = ("--base-url", "--model") if role == "teacher" else (f"--{role}-url", f"--{role}-model")
        if (path is None) == (url is None):
            raise RecipeError(f"give one of --{role} (a folder) and {url_option} (a server){'' if path is None else ', not both'}")
        if path is None and model is None:
            raise RecipeError(f"{url_option} {url}: {model_option} is missing, the model's name there")
        return Watched(self._load(path, url, model, seed, role), console())

    def _load(self, path: str | None, url: str | None, model: str | None, seed: int, role: str) -> Counted:
        if path is not None:
            return self.local(str(folder(path, role)), seed)
        return self.http(str(url), str(model), seed=seed)


def folder(path: str | Path, role: str) -> Path:
    """``path``, once it is known to hold a model.

    Raises:
        RecipeError: it does not.
    """
    from ...recipes.rows import RecipeError

    if not (Path(path) / "config.json").is_file():
        raise RecipeError(f"--{role} {path}: no folder of a transformers model (it has no config.json)")
    return Path(path)


def sampling(max_tokens: int, temperature: float = 0.0, samples: int = 1) -> Sampling:
    from ...recipes.rows import Sampling

    return Sampling(max_tokens, temperature, samples)


def lengths(rows: Sequence[Row], student: Path | None) -> list[int]:
    """Return the length of each row's response in scored tokens, or in bytes without a tokenizer."""
    if student is None:
        say("No --student: the tasks are balanced by bytes instead of its tokens.")
        return [len(row["response"].encode()) + 1 for row in rows]
    from transformers import AutoTokenizer

    from ...data.tokenization import load_examples
    from ...teachers.loading import load

    return [len(example.student_scored) for example in load_examples(rows, load(AutoTokenizer, "student", str(student)))]


@contextmanager
def writing(out: Path, recipe: str, names: Sequence[str] = (ROWS,), **inputs: Path | None) -> Iterator[Output]:
    """Hold the folder ``out`` of a recipe, in which it may write files of these names; ``inputs`` are the options that it reads.

    Raises:
        FileError: the folder is in use or holds the output of another command; a name is taken by a file that this recipe did not make.
    """
    with Output(out, f"recipe {recipe}") as output:
        output.check(names, {f"--{option}": path for option, path in inputs.items()})
        yield output


def finish(rows: Sequence[Row], tally: Tally, output: Output, **asked: Watched) -> None:
    """Write the rows to ``rows.jsonl``, and report what became of the data and what each model was asked for.

    Raises:
        RecipeError: no rows.
    """
    from ...recipes.rows import RecipeError

    path = output.folder / ROWS
    if not rows or not tally.kept:
        report_usage(**asked)
        options = ", ".join(dict.fromkeys(option for reason in tally.dropped if (option := option_of(reason))))
        raise RecipeError(
            f"nothing was kept of {tally.candidates} candidates ({reasons(tally)}): {path} is not written"
            + (f". Options that change it: {options}" if options else "")
        )
    output.write_rows(ROWS, rows)
    report(tally, f"{counted(len(rows), 'row')} in {path}")
    report_usage(**asked)


OPTIONS = {
    "cut off at max_tokens": "--max-tokens",
    "refused by the server": "--skip-refused",
    "no final answer": "--instruction, --kind",
    "wrong final answer": "--samples, --kind",
    "no rationale before": "--instruction, --samples",
    "no alternating questions": "--samples, --teacher",
    "blank left empty": "--samples, --teacher",
    "nothing changed": "--samples, --teacher",
    "more than": "--most",
    "the same": "--temperature",
    "not the closest": "--closest",
    "label moved by": "--threshold",
    "the judge names no label": "--judge",
    "no two ratings": "--referee",
    "ROUGE-L above": "--rouge",
    "more than were wanted": "--count",
}
"""The options that change how many candidates are dropped, by a part of the reason."""


def option_of(reason: str) -> str:
    """The option that changes how many are dropped for this reason; "" where there is none."""
    known = [part for part in OPTIONS if part in reason]
    return OPTIONS[max(known, key=len)] if known else ""


def reasons(tally: Tally) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in tally.dropped.most_common()) or "none was made"


def report(tally: Tally, title: str) -> None:
    from rich.table import Table

    table = Table("what", "number", "changed by")
    for what, number in (("rows read", tally.rows), ("candidates", tally.candidates), ("kept", tally.kept)):
        table.add_row(what, f"{number:,}", "")
    for reason, number in tally.dropped.most_common():
        table.add_row(f"dropped: {reason}", f"{number:,}", option_of(reason))
    where = console()
    where.print(title, soft_wrap=True)
    where.print(table)


def report_judge(tally: Tally, at_chance: bool) -> None:
    """Print how often the judge agrees with the given labels, and a warning where guesses would."""
    if not tally.judged:
        return
    where = console()
    where.print(f"The judge names {tally.agreed:,} of {tally.judged:,} given labels ({tally.agreed / tally.judged:.0%}).")
    if at_chance:
        where.print("Warning: guesses would agree as often. Take another --judge, or look at the labels of the data.", style="bold")


def report_usage(**asked: Watched) -> None:
    """Print the usage of each model; one with two roles is named once."""
    from ...teachers.progress import print_usage

    said: list[Watched] = []
    for role, model in asked.items():
        if not any(model is other for other in said):
            said.append(model)
            print_usage(console(), model.usage, role)
