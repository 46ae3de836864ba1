"""Remove the API key from everything that a server returns."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

__all__ = ["Secret"]

SHORTEST = 8
"""Shorter keys (EMPTY, none, x) are placeholders that occur in ordinary text. They are not redacted."""
CUT = "[key]"
GAP = (
    r"(?:[\s\x00\u00ad\u200b-\u200d\u2060\ufeff]|\\+[nrt]|\\+(?:u00|x)00|\\+u(?:00[aA][dD]|200[b-dB-D]|2060|[fF]{2}[eE][fF])"
    r"|%0[0aAdD9]|%20)*"
)
"""Separators of two characters of a key that leave it readable: line breaks, spaces, characters of no width, the zero bytes of
UTF-16, or the escapes of these."""
_BASE64 = {"+": r"(?:[-+]|%2[Bb])", "-": r"(?:[-+]|%2[Bb])", "/": r"(?:[/_]|%2[Ff])", "_": r"(?:[/_]|%2[Ff])"}


class Secret:
    """A key, and a pattern for every form in which a server may repeat it.

    The forms: unchanged, escaped for JSON, URLs or HTML (any of its characters, once or several times), with spaces or line breaks inside,
    in hexadecimal digits, and in base64, also when the key is part of a longer encoded text.
    """

    def __init__(self, value: str) -> None:
        secret = len(value) >= SHORTEST
        self._pattern = re.compile("|".join((_escaped(value), _hexadecimal(value), *_base64(value)))) if secret else None

    def redact(self, text: str) -> str:
        """Replace the secret in ``text`` by ``[key]``."""
        return text if self._pattern is None or len(text) < SHORTEST else self._pattern.sub(CUT, text)

    def redact_entry(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Redact the texts and tokens of a log entry. The secret may be spread over several tokens."""
        if self._pattern is None:
            return dict(entry)
        clean: dict[str, Any] = {name: self.redact(value) if isinstance(value, str) else value for name, value in entry.items()}
        if clean.get("logprobs"):
            clean["logprobs"] = self._tokens(clean["logprobs"])
        return clean

    def _tokens(self, tokens: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        spelled = (str(token["token"]) for token in tokens), (_bytes_of(token) for token in tokens)
        hidden = {index for texts in spelled for index in self._inside(texts)}
        return [
            {"token": CUT, "logprob": token["logprob"], "top_logprobs": []}
            if index in hidden
            else {**token, "top_logprobs": [a for a in token["top_logprobs"] if not self._holds(a)]}
            for index, token in enumerate(tokens)
        ]

    def _inside(self, texts: Iterable[str]) -> Iterable[int]:
        """Yield the indices of the texts that contain a part of the secret, which may span several texts."""
        parts = list(texts)
        assert self._pattern is not None
        spans = [match.span() for match in self._pattern.finditer("".join(parts))]
        start = 0
        for index, part in enumerate(parts):
            if any(first < start + len(part) and start < last for first, last in spans):
                yield index
            start += len(part)

    def _holds(self, token: Mapping[str, Any]) -> bool:
        return any(self.redact(text) != text for text in (str(token["token"]), _bytes_of(token)))


def _bytes_of(token: Mapping[str, Any]) -> str:
    return bytes(token.get("bytes") or ()).decode("latin-1")


def _escaped(value: str) -> str:
    return GAP.join(_character(character) for character in value)


def _character(character: str) -> str:
    """Return a pattern for all spellings of a character: plain, after backslashes, or escaped for JSON, URLs (also twice) or HTML."""
    code = ord(character)
    digits = "".join(f"[{digit.lower()}{digit.upper()}]" if digit.isalpha() else digit for digit in f"{code:02x}")
    ways = {
        re.escape(character), rf"\\+{re.escape(character)}", rf"\\+(?:u00|x){digits}", f"%(?:25)*{digits}", f"&#[xX]0*{digits};",
        f"&#0*{code};", re.escape(html.escape(character)), re.escape(quote(character, safe="")),
    }  # fmt: skip
    return f"(?:{'|'.join(sorted(ways))})"


def _hexadecimal(value: str) -> str:
    return "(?i:" + value.encode().hex() + ")"


def _base64(value: str) -> Iterable[str]:
    """Yield patterns for the base64 of a text that contains ``value``, one for each offset within a group of three bytes."""
    data = value.encode()
    for offset in range(3):
        letters = base64.b64encode(bytes(offset) + data).decode().rstrip("=")
        core = letters[(offset * 8 + 5) // 6 : (offset + len(data)) * 8 // 6]  # the letters that depend on the value alone
        edge = "[A-Za-z0-9+/_-]?"
        yield (edge if offset else "") + "".join(_BASE64.get(letter, letter) for letter in core) + edge + "=*"
