"""Near-duplicates among texts: ROUGE-L (Lin 2004) between their words."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rapidfuzz.distance import LCSseq

__all__ = ["Pool", "rouge_l"]

_WORD = re.compile(r"\w+")


def words(text: str) -> tuple[str, ...]:
    """Lower-case words; what holds no word stands for itself, so that only equal texts of that kind are duplicates."""
    return tuple(_WORD.findall(text.lower())) or (text.strip(),)


def rouge_l(a: str, b: str) -> float:
    """F1 of the longest common subsequence of words, in [0, 1]."""
    return _f1(words(a), words(b))


def _f1(a: tuple[str, ...], b: tuple[str, ...]) -> float:
    return 2 * LCSseq.similarity(a, b) / (len(a) + len(b))


class Pool:
    """Texts of which no two are near-duplicates: their ROUGE-L is at most ``threshold``."""

    def __init__(self, texts: Iterable[str] = (), threshold: float = 0.7) -> None:
        """``texts`` are taken as they are, duplicates included."""
        self.threshold = threshold
        self._words = [words(text) for text in texts]

    def nearest(self, text: str) -> float:
        """The highest ROUGE-L to any text of the pool; 0.0 for an empty pool."""
        new = words(text)
        return max((_f1(new, old) for old in self._words), default=0.0)

    def add(self, text: str) -> bool:
        """Takes ``text`` in unless it is a near-duplicate; says whether it did."""
        new = words(text)
        # F1 <= 2 min / (a + b): most of a large pool is ruled out by length alone.
        for old in self._words:
            if 2 * min(len(new), len(old)) / (len(new) + len(old)) > self.threshold and _f1(new, old) > self.threshold:
                return False
        self._words.append(new)
        return True
