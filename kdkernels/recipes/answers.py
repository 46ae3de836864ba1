"""Find the final answer in a chain of thought, and compare it with the right one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from .numbers import boxed, plain, read_numbers
from .rows import Item, RecipeError

__all__ = ["Kind", "check", "extract", "normalise", "same", "split"]

Kind = Literal["number", "choice", "text"]

_MARKER = re.compile(r"\banswer(?:(?:[ \t]+\w+){0,4}?[ \t]+is\b|[ \t*]*(?=[:=]))[ \t]*[:=]?[ \t]*", re.IGNORECASE)
_CHOICE = re.compile(r"(?<![A-Za-z])\(?([A-Za-z])\)|(?<![A-Za-z'])([A-H])(?![A-Za-z'])")


def split(text: str) -> tuple[str, str]:
    """Return the rationale, and the rest of the line after the last "answer" marker; ``(text, "")`` without a marker."""
    markers = list(_MARKER.finditer(text))
    if not markers:
        return text.strip(), ""
    last = markers[-1]
    # "So the answer is 4": the words before the marker belong to no rationale.
    start = text.rfind("\n", 0, last.start()) + 1
    lead = text[start : last.start()]
    rationale = text[: start if len(lead.split()) <= 3 else last.start()]
    return rationale.strip(), text[last.end() :].split("\n")[0].strip()


def extract(text: str, kind: Kind) -> str | None:
    r"""Return the normalised final answer of a reply; None without one.

    It follows the last marker ("Answer: ...", "the answer is ..."), or is in a later ``\boxed{...}``. Without either, it is the last
    number or choice in the text; free text then has no answer.
    """
    markers = list(_MARKER.finditer(text))
    inside = boxed(text[markers[-1].end() :] if markers else text)
    if inside is not None:
        return normalise(plain(inside) if kind != "number" else inside, kind)
    answer = split(text)[1]
    if kind == "text" and not answer.strip(" *") and markers:  # on the line after "Answer:"
        answer = next((line for line in text[markers[-1].end() :].splitlines() if line.strip(" *")), "")
    return normalise(answer or (text if kind != "text" else ""), kind, first=bool(answer))


def normalise(answer: str, kind: Kind, first: bool = False) -> str | None:
    """One spelling for each answer: ``$1,250.50`` is ``2501/2``, ``(b)`` is ``B``, free text loses case, articles and punctuation at its
    ends.

    Of several numbers or choices the last counts, or the ``first``. None if there is none, or if it is not a number that can be read
    whole: of ``3:30``, ``2x`` or ``10 - 5`` no part is taken.
    """
    if kind == "text":
        words = answer.strip().strip(".!?\"'`*()[]").lower().split()
        return " ".join(w for w in words if w not in ("a", "an", "the")) or None
    if kind == "choice":
        bare = re.fullmatch(r"\W*([A-Za-z])\W*", answer)
        letters = [bare[1]] if bare else [a or b for a, b in _CHOICE.findall(answer)]
        return (letters[0] if first else letters[-1]).upper() if letters else None
    numbers = read_numbers(answer)
    value = numbers[0 if first else -1] if numbers else None
    return None if value is None else str(value)


def same(reply: str, answer: str, kind: Kind) -> bool:
    """Return whether the reply's final answer is ``answer``; False for a reply without one."""
    final = extract(reply, kind)
    return final is not None and final == normalise(answer, kind)


def check(items: Sequence[Item], kind: Kind) -> None:
    """Check before paying for replies: no reply can match an answer that cannot be read.

    Raises:
        RecipeError: a row whose answer is not of this ``kind``.
    """
    for item in items:
        if normalise(item.response or "", kind) is None:
            raise RecipeError(f"{item.where}: the answer {item.response!r} holds no {kind}: choose another answer kind, or mend the row")
