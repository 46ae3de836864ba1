"""Text to token ids: what a tokenizer puts before a text, and text where it stands after another one."""

from __future__ import annotations

import re
from collections.abc import Sequence
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
        apart = [str(token) for token in tokenizer.added_tokens_decoder.values() if not (token.normalized or token.single_word)]
        self._apart = re.compile("|".join(map(re.escape, sorted(filter(None, apart), key=len, reverse=True))) or r"(?!)")

    def __call__(self, text: str, begin: bool) -> list[int]:
        """Ids of ``text``; with ``begin`` those of the tokenizer before it, unless the text begins with them already."""
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids if not begin or ids[: len(self.begin)] == self.begin else [*self.begin, *ids]

    def pieces(self, parts: Sequence[str], begin: bool) -> list[list[int]]:
        """Ids of each part where it stands after those before it.

        SentencePiece begins a text with a space of its own, which later parts must not get. Where a token would span two parts, the later
        one is tokenised apart, so that a response is what follows the ids that the model is asked with.
        """
        first, *others = parts
        ids, context = [self(first, begin)], self._since_added(first)
        for part in others:
            before, whole = self(context, begin=False), self(context + part, begin=False)
            ids.append(whole[len(before) :] if whole[: len(before)] == before else self(part, begin=False))
            context = self._since_added(context + part)
        return ids

    def _since_added(self, text: str) -> str:
        """The end of a text from its last added token on: tokenizers split there first, so what stands before it changes nothing."""
        last = self.last_added(text)
        return text if last is None else text[last.start() :]

    def last_added(self, text: str) -> re.Match[str] | None:
        """The last special or added token in a text."""
        last = None
        for last in self._apart.finditer(text):  # noqa: B007
            pass
        return last

    def without_begin(self, text: str) -> str:
        """``text`` without the begin-of-text token that is written at its start."""
        return text.removeprefix(self.begin_text) if self.begin_text else text


def _begin(tokenizer: Any) -> list[int]:
    plain, special = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    for start in range(len(special) - len(plain) + 1):
        if special[start : start + len(plain)] == plain:
            return special[:start]
    return []
