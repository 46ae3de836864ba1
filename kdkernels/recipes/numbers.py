"""Read numbers in answers, as models write them. A number that cannot be read completely is not read at all."""

from __future__ import annotations

import re
from fractions import Fraction

__all__ = ["boxed", "plain", "read_numbers"]

_OTHER = "\x01"
"""Stands for what is not a number but belongs to one, such as a root or pi."""
_GROUPS = r"[1-9]\d{0,2}(?: \d{3}(?!\d))+(?:[.,]\d+)?"
_CHUNK = rf"(?:{_GROUPS}|\d+(?:[.,'_]\d+)*|\.\d+)"
"""Digits with whatever separates them."""
_SHAPES = (
    (re.compile(r"[1-9]\d{0,2}([ ,'_])\d{3}(?:\1\d{3})*(?:\.\d+)?"), " ,'_", "."),  # 1,250.5  1 250.5  1'250.5
    (re.compile(r"[1-9]\d{0,2}([ '.])\d{3}(?:\1\d{3})*,\d+"), " '.", ","),  # 1.250,5  1 250,5
    (re.compile(r"[1-9]\d{0,2}(?:\.\d{3}){2,}"), ".", ","),  # 1.250.000
    (re.compile(r"[1-9]\d?(?:,\d{2})+,\d{3}(?:\.\d+)?"), ",", "."),  # 12,50,000
    (re.compile(r"\d*\.?\d+"), "", "."),
    (re.compile(r"\d+,\d+"), "", ","),  # 2,5
)
"""Forms of one number, each with what groups its thousands and what begins its decimals."""
_MIXED = re.compile(r"(\d+) (\d+)/(\d+)(?![\d/.,])")
_NUMBER = re.compile(_CHUNK)
_EXPONENT = re.compile(r"[eE]([-+]?\d+)| ?[x*] ?10 ?\^ ?([-+]?\d+)|\^([-+]?\d+)")
_OVER = re.compile(rf" ?/ ?({_CHUNK})")
_SCALE = re.compile(r" ?((?i:hundred|thousand|million|billion|trillion|lakh|crore))s?\b|(k)(?!\w)")
_SCALES = {"k": 3, "hundred": 2, "thousand": 3, "lakh": 5, "million": 6, "crore": 7, "billion": 9, "trillion": 12}
_GLUED = re.compile(rf"(?:[^\W\d_]| ?{_OTHER})+")
_FOLLOWING = re.compile(r" ?[\w.]*")
_NOT_UNITS = {"x", "y", "z", "n", "i", "K", "M", "B", "b", "bn", "mn"}
"""Variables, and letters that could be a power of ten."""
_REST = re.compile(rf"(?:[:/]|{_OTHER})\d+(?:[:/.]\d+)*")
_BEGIN = rf"(?:[-+] ?)?(?:\.?\d|{_OTHER})"
_UNIT = r"(?:(?: ?[^\W\d_]+(?:/[^\W\d_]+)?(?:\^-?\d)?)| ?[%°€£¥])?"
_EQUALS = re.compile(rf"{_UNIT}\s*=\s*(?={_BEGIN})")
_JOINED = re.compile(rf"{_UNIT}(?:\s*[-+*÷^]\s*|\s+(?:x|plus|minus|times|divided by|and|or|to)\s+|\s*[,;&]\s+)(?={_BEGIN})", re.IGNORECASE)
"""Characters that make one expression, list or range of two numbers."""
_START = re.compile(rf"(?<![\w.^])(?:(?P<sign>(?<![\w)])[-+]|\b(?:minus|negative) ) ?)?(?=\.?\d|{_OTHER})", re.IGNORECASE)
_LARGEST_EXPONENT = 300

_LETTERS = str.maketrans({
    "\u2212": "-", "\u2013": "-", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2019": "'", "\u00d7": "*", "\u00b7": "*", "\u22c5": "*",
    "\u2044": "/", "\u2215": "/", "\u221a": _OTHER, "\u03c0": _OTHER, "\u221e": _OTHER, "\u00b1": _OTHER,
})  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5", "⅙": "1/6",
           "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8"}  # fmt: skip
_BRACED = r"\{([^{}]*)\}"
_FRACTION = re.compile(rf"\\[dtc]?frac *(?:{_BRACED}|(\d)) *(?:{_BRACED}|(\d))")
_FUNCTIONS = re.compile(
    r"\\(?:sqrt|pi|log|ln|lg|exp|sin|cos|tan|cot|infty|binom|pm|mp|sum|prod|int|lim|alpha|beta|gamma|theta|lambda|sigma|phi)(?![a-zA-Z])"
    rf" *(?:\[[^\]]*\])?(?:{_BRACED})?\d*"
)


def read_numbers(text: str) -> list[Fraction | None]:
    """Return the numbers of a text in order; None for each that cannot be read: an expression, a list, a time, a multiple of x."""
    text = _prepared(text)
    values: list[Fraction | None] = []
    at = 0
    while start := _START.search(text, at):
        value, at = _term(text, start)
        while True:
            if equals := _EQUALS.match(text, at):  # 3 + 4 = 7
                value, at = _term(text, _START.match(text, equals.end()) or equals)
            elif joined := _JOINED.match(text, at):
                value, at = None, _term(text, _START.match(text, joined.end()) or joined)[1]
            else:
                break
        values.append(value)
    return values


def boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}``, which may contain braces; None without one."""
    at = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if at < 0:
        return None
    start = text.index("{", at) + 1
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None


def plain(text: str) -> str:
    """Return the text without LaTeX commands and braces, dollar signs, and marks of emphasis."""
    text = re.sub(r"\\[,!;: ]|~|(?<=[A-Za-z])\$", " ", text.replace("\\%", "%").replace("\\$", "$"))
    text = re.sub(r"\\(?:times|cdot)(?![a-zA-Z])", "*", text)
    text = re.sub(r"\^ *\{? *\\circ *\}?", "°", text)
    text = re.sub(r"\\[a-zA-Z]+ ?|[{}$]", "", text)
    return re.sub(r"\*\*|(?<!\d)(?<!\d )\*|\*(?! ?[\d.])|(?<!\w)_(?=\S)|(?<=\S)_(?!\w)", "", text)


def _prepared(text: str) -> str:
    text = re.sub(r"(?<=\d)(?:\{,\}|,\\!)(?=\d)", ",", text.translate(_LETTERS))
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda found: "^" + found[0].translate(_SUPERSCRIPTS), text)
    text = re.sub(rf"(\d?)([{''.join(_VULGAR)}])", lambda found: f"{found[1]} {_VULGAR[found[2]]}".strip(), text)
    text = _FUNCTIONS.sub(_OTHER, text)
    while text != (text := _FRACTION.sub(_fraction, text)):
        pass
    text = re.sub(r"\\[dtc]?frac", _OTHER, text)
    text = re.sub(r"(?<=\d)\*\*(?=\d)", "^", re.sub(r"\^ ?\{ ?([-+]?\d+) ?\}", r"^\1", text))
    text = plain(text)
    text = re.sub(r"[€£¥](?= ?\d)", "", text)
    text = re.sub(r"(?<=[^\W\d_])\^[-+]?\d+", "", text)  # of a unit or a variable
    text = re.sub(r"(?<=[^\W\d_])(?<!\d[eE])-(?=\d)", "_", text)  # COVID-19 holds no number
    return re.sub(r"\n[ \t]*[-+*•] (?=\d)", "\n", text)  # bullets of a list


def _fraction(found: re.Match[str]) -> str:
    top, bottom = (found[1] or found[2] or "").strip(), (found[3] or found[4] or "").strip()
    negative = top.startswith("-")
    top = top.removeprefix("-").strip()
    if not _NUMBER.fullmatch(top) or not _NUMBER.fullmatch(bottom):
        return _OTHER
    before = found.string[: found.start()].rstrip()
    return f"{' ' if before[-1:].isdigit() else ''}{'-' if negative else ''}{top}/{bottom}"


def _term(text: str, start: re.Match[str]) -> tuple[Fraction | None, int]:
    """Return the signed number at ``start``, and its end."""
    value, at = _quantity(text, start.end())
    sign = start.groupdict().get("sign") or ""
    return (-value if value is not None and sign.strip().lower() in ("-", "minus", "negative") else value), at


def _quantity(text: str, at: int) -> tuple[Fraction | None, int]:
    if mixed := _MIXED.match(text, at):
        whole, top, bottom = map(int, mixed.groups())
        if top < bottom:
            return _with_rest(text, mixed.end(), Fraction(whole) + Fraction(top, bottom))
    found = _NUMBER.match(text, at)
    if found is None:
        return None, _after(text, at + 1)  # a root, or the like
    value, at = _value(found[0]), found.end()
    if exponent := _EXPONENT.match(text, at):
        scientific, ten, power = exponent.groups()
        value, at = _raised(value, scientific or ten, power), exponent.end()
    if over := _OVER.match(text, at):
        below = _value(over[1])
        value, at = (value / below if value is not None and below else None), over.end()
    while scale := _SCALE.match(text, at):
        value, at = _raised(value, str(_SCALES[(scale[1] or scale[2]).lower()]), None), scale.end()
    return _with_rest(text, at, value)


def _value(chunk: str) -> Fraction | None:
    for form, grouping, point in _SHAPES:
        if form.fullmatch(chunk):
            kept = "".join(c for c in chunk if c not in grouping)
            return Fraction(kept.replace(point, "."))
    return None


def _raised(value: Fraction | None, ten: str | None, power: str | None) -> Fraction | None:
    """Return ``value * 10**ten``, or ``value**power``."""
    exponent = int(ten or power or 0)
    if value is None or abs(exponent) > _LARGEST_EXPONENT or (power and value == 0):
        return None
    return value * Fraction(10) ** exponent if ten else Fraction(value**exponent)


def _with_rest(text: str, at: int, value: Fraction | None) -> tuple[Fraction | None, int]:
    """Return the value if the characters directly after it, such as a unit, leave it a number."""
    if glued := _GLUED.match(text, at):
        at = glued.end()
        if _OTHER in glued[0] or glued[0] in _NOT_UNITS or text[at : at + 1].isdigit():
            value, at = None, _after(text, at)
    if rest := _REST.match(text, at):  # 3:30, 1/2/2024
        value, at = None, rest.end()
    return value, at


def _after(text: str, at: int) -> int:
    """Return the end of the word or number at ``at``, which belongs to the preceding text."""
    following = _FOLLOWING.match(text, at)
    return following.end() if following else at
