"""PTX text as a list of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

BITS = {"pred": 1} | {f"{kind}{bits}": bits for kind in "busf" for bits in (8, 16, 32, 64)} | {"bf16": 16}

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)(?:\s+\.ptr[^,\n]*?)?\s+([\w$]+)\s*(?:,|$)", re.MULTILINE)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+([%\w$]+)")
_PREFIX = re.compile(r"\s*(?:([$\w]+):|([{}]))")
_STATEMENT = re.compile(r"(?:@(!?)(%[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Instruction:
    """``@predicate opcode operands``; operands are as written."""

    opcode: str
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool


@dataclass(frozen=True, eq=False)
class Program:
    """One kernel. ``labels`` are positions in ``code``; ``registers`` maps a name, or a prefix such as ``%rd``, to a type."""

    name: str
    parameters: tuple[tuple[str, str], ...]  # (type, name)
    threads: int
    registers: dict[str, str]
    code: tuple[Instruction, ...]
    labels: dict[str, int]

    def bits(self, register: str) -> int:
        """The width of a register."""
        kind = self.registers.get(register) or self.registers[register.rstrip("0123456789")]
        return BITS[kind]


def split_operands(text: str) -> tuple[str, ...]:
    """Split at commas that are not inside brackets or braces."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]])+", text)
    return tuple(part.strip() for part in parts if part.strip())


@lru_cache(maxsize=64)
def parse(text: str) -> Program:
    """The kernel of a PTX module with one entry."""
    text = re.sub(r"//[^\n]*", "", text)
    entry = _ENTRY.search(text)
    threads = re.search(r"\.reqntid\s+(\d+)", text)
    if entry is None or threads is None:
        raise ValueError("expected PTX with an .entry and its .reqntid")
    body = text[text.index("{", threads.end()) + 1 :]
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    depth = 1
    for statement in re.sub(r"^\s*\.(?:loc|file|pragma)[^\n]*", "", body, flags=re.MULTILINE).split(";"):
        # Labels and the braces of scopes stand where a statement begins.
        while prefix := _PREFIX.match(statement):
            if label := prefix.group(1):
                labels[label] = len(code)
            else:
                depth += 1 if prefix.group(2) == "{" else -1
            statement = statement[prefix.end() :]
            if depth == 0:
                break
        if depth == 0:
            break
        statement = statement.strip()
        if not statement or statement.startswith("."):
            continue
        match = _STATEMENT.fullmatch(statement)
        if match is None:
            raise ValueError(f"expected an instruction, not {statement!r}")
        negated, predicate, opcode, operands = match.groups()
        code.append(Instruction(opcode, split_operands(operands), predicate, bool(negated)))
    registers = {name: kind for kind, name in _REGISTERS.findall(body)}
    parameters = tuple(_PARAMETER.findall(entry.group(2)))
    return Program(entry.group(1), parameters, int(threads.group(1)), registers, tuple(code), labels)
