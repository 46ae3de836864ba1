"""Text to token ids: what a tokenizer puts before a text, and text where it stands after another one."""

from __future__ import annotations

from typing import Any

__all__ = ["TextEncoder", "added_ids"]


def added_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokenizer's special and added tokens."""
    return {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}


class TextEncoder:
    """Encodes text with one tokenizer: all of it, and nothing after it.

    Some tokenizers put an end-of-text token (or a separator) after every text, which does not belong between prompt and response.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.begin = _begin(tokenizer)
        """Ids that the tokenizer puts before every text, such as a begin-of-text token."""
        self.begin_text: str = tokenizer.decode(self.begin) if self.begin else ""

    def __call__(self, text: str, begin: bool) -> list[int]:
        """Ids of ``text``; with ``begin`` those of the tokenizer before it, unless the text begins with them already."""
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids if not begin or ids[: len(self.begin)] == self.begin else [*self.begin, *ids]

    def continued(self, given: str, text: str, begin: bool) -> tuple[list[int], list[int]]:
        """Ids of ``given``, and of ``text`` where it stands after it.

        SentencePiece begins a text with a space of its own, which ``text`` must not get. Where a token would span both, each is tokenised
        apart, so that the response is what follows the ids that the model is asked with.
        """
        before, whole = self(given, begin), self(given + text, begin)
        return before, whole[len(before) :] if whole[: len(before)] == before else self(text, begin=False)

    def without_begin(self, text: str) -> str:
        """``text`` without the begin-of-text token that is written at its start."""
        return text.removeprefix(self.begin_text) if self.begin_text else text


def _begin(tokenizer: Any) -> list[int]:
    plain, special = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    for start in range(len(special) - len(plain) + 1):
        if special[start : start + len(plain)] == plain:
            return special[:start]
    return []
