"""Convert text to token ids: with a begin-of-text token, and text that continues another text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

__all__ = ["TextEncoder", "added_ids"]


def added_ids(tokenizer: Any) -> set[int]:
    """Return the ids of the tokenizer's special and added tokens."""
    return {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}


class TextEncoder:
    """Encode text with one tokenizer, without tokens after the text.

    Some tokenizers append an end-of-text token (or a separator), which must not stand between prompt and response.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.begin = _begin(tokenizer)
        """Ids that the tokenizer adds before a text, such as a begin-of-text token."""
        self.begin_text: str = tokenizer.decode(self.begin) if self.begin else ""
        apart = [str(token) for token in tokenizer.added_tokens_decoder.values() if not (token.normalized or token.single_word)]
        self._apart = re.compile("|".join(map(re.escape, sorted(filter(None, apart), key=len, reverse=True))) or r"(?!)")

    def __call__(self, text: str, begin: bool) -> list[int]:
        """Return the ids of ``text``. With ``begin``, add the tokenizer's leading ids unless the text already starts with them."""
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids if not begin or ids[: len(self.begin)] == self.begin else [*self.begin, *ids]

    def pieces(self, parts: Sequence[str], begin: bool) -> list[list[int]]:
        """Return the ids of each part as a continuation of the earlier parts.

        SentencePiece adds a space at the start of a text, which later parts must not get. If a token would span two parts, the later part
        is tokenised separately, so that a response starts right after the ids of its prompt.
        """
        first, *others = parts
        ids, context = [self(first, begin)], self._since_added(first)
        for part in others:
            before, whole = self(context, begin=False), self(context + part, begin=False)
            ids.append(whole[len(before) :] if whole[: len(before)] == before else self(part, begin=False))
            context = self._since_added(context + part)
        return ids

    def _since_added(self, text: str) -> str:
        """Return the text from its last added token on. Tokenizers split there first, so the text before it does not affect the rest."""
        last = self.last_added(text)
        return text if last is None else text[last.start() :]

    def last_added(self, text: str) -> re.Match[str] | None:
        """Return the last special or added token in a text."""
        last = None
        for last in self._apart.finditer(text):  # noqa: B007
            pass
        return last

    def without_begin(self, text: str) -> str:
        """Return ``text`` without a begin-of-text token at its start."""
        return text.removeprefix(self.begin_text) if self.begin_text else text


def _begin(tokenizer: Any) -> list[int]:
    plain, special = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    for start in range(len(special) - len(plain) + 1):
        if special[start : start + len(plain)] == plain:
            return special[:start]
    return []
