"""Whether the tokenizers of teacher and student are one: the ids, the way texts are split, the chat template."""

from __future__ import annotations

from typing import Any

from .rows import DataError, RowSource, read_rows
from .tokenization import first_difference, render

__all__ = ["check_templates", "check_tokenizers"]

PROBE = 'The quick brown fox: 3.14 ± "déjà vu"\n\tdef f(x): return x ** 2  # 東京 🙂'


def check_tokenizers(student: Any, teacher: Any) -> None:
    """
    Raises:
        DataError: the two give different ids, with how many of them differ.
    """
    if student is teacher:
        return
    added = set(student.get_added_vocab()) ^ set(teacher.get_added_vocab())  # one more special token does no harm
    one, other = ({t: i for t, i in tokenizer.get_vocab().items() if t not in added} for tokenizer in (student, teacher))
    differing = {i for t, i in one.items() if other.get(t) != i} | {i for t, i in other.items() if one.get(t) != i}
    probe = student.decode(range(0, len(student), max(1, len(student) // 256)), skip_special_tokens=True) + PROBE
    if differing or student(probe)["input_ids"] != teacher(probe)["input_ids"]:
        what = (
            f"{len(differing):,} of {max(len(student), len(teacher)):,} ids stand for different tokens"
            if differing
            else "the ids are the same, but texts are split differently"
        )
        raise DataError(
            f"the tokenizers of teacher and student differ: {what}. Distributions over different vocabularies can't be compared column by "
            "column; distillation across tokenizers is not supported: take a teacher and a student of one family, or train on the "
            "teacher's text"
        )


def check_templates(student: Any, teacher: Any, source: RowSource) -> None:
    """
    Raises:
        DataError: the chat templates of the two write the first conversation of the data differently, with the first token that differs.
    """
    if student is teacher or student.chat_template == teacher.chat_template or None in (student.chat_template, teacher.chat_template):
        return
    row = next((row for row in read_rows(source) if "messages" in row), None)
    if row is None:
        return
    messages = row.messages("messages")
    one, other = (render(t, messages, row, "messages", messages[-1]["role"] != "assistant") for t in (student, teacher))
    if one != other:
        raise row.error(
            "messages",
            f"the chat templates of student and teacher differ: {first_difference(student, one, other, teacher)}. "
            "Both views are written with the student's: give both tokenizers one template",
        )
