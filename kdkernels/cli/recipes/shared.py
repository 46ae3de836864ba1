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
Seed = Annotated[int, typer.Option(help="Random seed.")]
Plain = Annotated[bool, typer.Option("--plain", help="Write `prompt` instead of `messages`, for students without a chat template.")]
Out = Annotated[Path, typer.Option(help="Output folder: rows.jsonl to train on, and a log of replies, from which a second run continues.")]
Samples = Annotated[int, typer.Option(help="Replies to each prompt; more than 1 needs a temperature > 0.")]
Temperature = Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")]
MaxTokens = Annotated[int, typer.Option(help="Maximum tokens of a reply. Longer replies are cut off there, and dropped.")]
Student = Annotated[
    Path | None, typer.Option(help="Folder of the student, whose tokenizer measures the tasks' lengths. Without it, bytes are counted.")
]
KeyVariable = Annotated[
    str | None,
    typer.Option(help="Environment variable with the API key of that server. Default: --key-variable if it is the server of --base-url."),
]
AnswerKind = Annotated[Kind, typer.Option(help="Kind of the final answers.")]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Options for the input data and the output rows."""

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
    """Options for the model that writes a recipe's text."""

    teacher: Annotated[str | None, typer.Option(help="Folder of a transformers model to run in this process.")] = None
    base_url: Annotated[str | None, typer.Option(help="OpenAI-compatible server to use instead, such as http://localhost:8000/v1.")] = None
    model: Annotated[str | None, typer.Option(help="Model name on the server of --base-url.")] = None

    @property
    def is_named(self) -> bool:
        """Return whether a folder or a server is named."""
        return self.teacher is not None or self.base_url is not None

    def text_model(self, seed: int) -> Watched:
        """Return the teacher. It shows a progress bar for its requests.

        Raises:
            RecipeError: neither a folder nor a server was named, or both.
        """
        return self._watched(self.teacher, self.base_url, self.model, seed, "teacher")

    def other(
        self, role: str, path: str | None, url: str | None, model: str | None, seed: int, default: Watched, key_variable: str | None = None
    ) -> Watched:
        """Return the model of another role, with the teacher's request options; ``default`` if no folder or server is named.

        A key is only sent to the server that it was named for. Without a ``key_variable``, the teacher's key is sent if the server is the
        teacher's.
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
            raise RecipeError(f"{url_option} {url}: {model_option} is missing; give the model's name on this server")
        return Watched(self._load(path, url, model, seed, role), console())

    def _load(self, path: str | None, url: str | None, model: str | None, seed: int, role: str) -> Counted:
        if path is not None:
            return self.local(str(folder(path, role)), seed)
        return self.http(str(url), str(model), seed=seed)


def folder(path: str | Path, role: str) -> Path:
    """Return ``path`` after checking that it contains a model.

    Raises:
        RecipeError: it does not contain one.
    """
    from ...recipes.rows import RecipeError

    if not (Path(path) / "config.json").is_file():
        raise RecipeError(f"--{role} {path}: not a folder of a transformers model: it has no config.json")
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
    """Lock the output folder of a recipe, and check that it may write files of these names there.

    Args:
        inputs: the option names and paths of the files that the recipe reads.

    Raises:
        FileError: the folder is in use or contains another command's output, or another program's file has one of these names.
    """
    with Output(out, f"recipe {recipe}") as output:
        output.check(names, {f"--{option}": path for option, path in inputs.items()})
        yield output


def finish(rows: Sequence[Row], tally: Tally, output: Output, **models: Watched) -> None:
    """Write the rows to ``rows.jsonl``, and print how many were kept and dropped, and the usage of each model.

    Raises:
        RecipeError: no rows.
    """
    from ...recipes.rows import RecipeError

    path = output.folder / ROWS
    if not rows or not tally.kept:
        report_usage(**models)
        options = ", ".join(dict.fromkeys(option for reason in tally.dropped if (option := option_of(reason))))
        raise RecipeError(
            f"nothing was kept of {tally.candidates} candidates ({reasons(tally)}), so {path} is not written"
            + (f". Options that change this: {options}" if options else "")
        )
    output.write_rows(ROWS, rows)
    report(tally, f"{counted(len(rows), 'row')} in {path}")
    report_usage(**models)


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
"""Options that change how many candidates are dropped, by a part of the reason."""


def option_of(reason: str) -> str:
    """Return the option that changes how many candidates are dropped for this reason; "" if there is none."""
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
    """Print how often the judge agrees with the labels of the data, and a warning if guesses would agree as often."""
    if not tally.judged:
        return
    where = console()
    where.print(f"The judge agrees with {tally.agreed:,} of {tally.judged:,} labels of the data ({tally.agreed / tally.judged:.0%}).")
    if at_chance:
        where.print("Warning: guesses would agree as often. Use another --judge, or check the labels of the data.", style="bold")


def report_usage(**models: Watched) -> None:
    """Print the usage of each model, under its first role."""
    from ...teachers.progress import print_usage

    printed: list[Watched] = []
    for role, model in models.items():
        if not any(model is other for other in printed):
            printed.append(model)
            print_usage(console(), model.usage, role)
