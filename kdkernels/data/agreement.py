"""Checks that teacher and student agree: same tokens, same splitting of text, same chat template, ids with embeddings in both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .example import Example
from .forms import conversation_field
from .layouts import training_rows
from .rows import DataError, RowSource
from .turns import first_difference, render

__all__ = ["check_ids", "check_templates", "check_tokenizers"]

PROBE = 'The quick brown fox: 3.14 ± "déjà vu"\n\tdef f(x): return x ** 2  # 東京 🙂'


def check_tokenizers(student: Any, teacher: Any) -> None:
    """Check that two tokenizers agree, including special and added tokens. Ids that only one of them has are ignored.

    Raises:
        DataError: an id stands for different tokens (with the number of such ids), or texts are split differently.
    """
    if student is teacher:
        return
    one, other = student.get_vocab(), teacher.get_vocab()
    differing = _differing(one, other) | _differing(other, one)
    added = "".join(f" {token} a" for token in student.get_added_vocab() if token in other)
    probe = student.decode(range(0, len(student), max(1, len(student) // 256)), skip_special_tokens=True) + PROBE + added
    if differing or student(probe)["input_ids"] != teacher(probe)["input_ids"]:
        raise DataError(
            f"the tokenizers of teacher and student differ: {_difference(student, teacher, sorted(differing))}. Distributions over "
            "different vocabularies can't be compared column by column; distillation across tokenizers is not supported: take a teacher "
            "and a student of one family, or train on the teacher's text"
        )


def _differing(one: Mapping[str, int], other: Mapping[str, int]) -> set[int]:
    """Return the ids of ``one`` that stand for another token in ``other``, or whose token has another id there."""
    tokens = {id: token for token, id in other.items()}
    return {id for token, id in one.items() if other.get(token, id) != id or tokens.get(id, token) != token}


def _difference(student: Any, teacher: Any, differing: list[int]) -> str:
    if not differing:
        return "the ids are the same, but texts are split differently"
    first = differing[0]
    names = [repr(t.convert_ids_to_tokens(first)) if first < len(t) else "not there" for t in (teacher, student)]
    return (
        f"{len(differing):,} of {max(len(student), len(teacher)):,} ids stand for different tokens, the first of them "
        f"{first} ({names[0]} and {names[1]})"
    )


def check_ids(examples: Iterable[Example], tokenizer: Any, embeddings: int | None) -> None:
    """Check that every token id of the examples has an embedding in both models.

    Args:
        embeddings: rows of the models' smallest embedding; None if unknown.

    Raises:
        DataError: a token of an example has no embedding in a model; the message names the row.
    """
    if embeddings is None:
        return
    for number, example in enumerate(examples, 1):
        worst = max(max(example.student_ids, default=0), max(example.teacher_ids, default=0))
        if worst >= embeddings:
            raise DataError(
                f"{example.where or f'example {number}'}: token {tokenizer.convert_ids_to_tokens(worst)!r} (id {worst}) is beyond the "
                f"{embeddings:,} embeddings of a model. It was added to the tokenizer alone: enlarge the model "
                "(model.resize_token_embeddings(len(tokenizer))) and save both, or take the token out of the data"
            )


def check_templates(student: Any, teacher: Any, source: RowSource, columns: str | None = None) -> None:
    """Check that both chat templates agree on the first conversation of the data.

    Raises:
        DataError: the templates format it differently; the message gives the first token that differs.
    """
    if student is teacher or student.chat_template == teacher.chat_template or None in (student.chat_template, teacher.chat_template):
        return
    row = next((row for row in training_rows(source, columns) if conversation_field(row) is not None), None)
    if row is None:
        return
    name = str(conversation_field(row))
    messages = row.messages(name)
    one, other = (render(t, messages, row, name, messages[-1]["role"] != "assistant") for t in (student, teacher))
    if one != other:
        raise row.error(
            name,
            f"the chat templates of student and teacher differ: {first_difference(student, one, other, teacher)}. "
            "Both views are written with the student's: give both tokenizers one template",
        )
