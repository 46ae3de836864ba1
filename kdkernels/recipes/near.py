"""Find near-duplicates among texts, by ROUGE-L (Lin 2004) of their words."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rapidfuzz.distance import LCSseq

__all__ = ["Pool", "rouge_l"]

_WORD = re.compile(r"\w+")


def words(text: str) -> tuple[str, ...]:
    """Return the lower-case words of a text. A text without words is one word, so that it is only a duplicate of an equal text."""
    return tuple(_WORD.findall(text.lower())) or (text.strip(),)


def rouge_l(a: str, b: str) -> float:
    """Return the F1 of the longest common subsequence of words, in [0, 1]."""
    return _f1(words(a), words(b))


def _f1(a: tuple[str, ...], b: tuple[str, ...]) -> float:
    return 2 * LCSseq.similarity(a, b) / (len(a) + len(b))


class Pool:
    """A set of texts without near-duplicates: the ROUGE-L of any two is at most ``threshold``."""

    def __init__(self, texts: Iterable[str] = (), threshold: float = 0.7) -> None:
        """Add all ``texts``, including duplicates."""
        self.threshold = threshold
        self._words = [words(text) for text in texts]

    def nearest(self, text: str) -> float:
        """Return the highest ROUGE-L with a text of the pool; 0.0 for an empty pool."""
        new = words(text)
        return max((_f1(new, old) for old in self._words), default=0.0)

    def add(self, text: str) -> bool:
        """Add ``text`` unless it is a near-duplicate. Return whether it was added."""
        new = words(text)
        # F1 <= 2 min / (a + b): most of a large pool is ruled out by length alone.
        for old in self._words:
            if 2 * min(len(new), len(old)) / (len(new) + len(old)) > self.threshold and _f1(new, old) > self.threshold:
                return False
        self._words.append(new)
        return True
