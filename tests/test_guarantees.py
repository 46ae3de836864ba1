"""Every guarantee in docs/guarantees.md names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "guarantees.md"
SECTIONS = ("Files", "Resumed runs", "Caches", "Data", "Secrets and security", "Numbers")
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the documentation is not installed with the tests")


def promises() -> list[tuple[str, str]]:
    """Return each promise of the page's tables and the cell with its tests."""
    rows = [line.strip("|").rsplit(" | ", 1) for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [(row[0].strip(), row[1]) for row in rows if len(row) == 2 and row[0].strip() != "promise"]


def names_in(file: Path) -> set[str]:
    return {node.name for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def test_guarantees_page_has_its_sections() -> None:
    assert set(SECTIONS) <= set(re.findall(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))


def test_every_promise_names_tests_that_exist() -> None:
    assert promises()
    for promise, cell in promises():
        tests = NAMED.findall(cell)
        assert tests, f"no test is named for: {promise}"
        for file, test in tests:
            assert test in names_in(ROOT / file), f"{file}::{test} does not exist; it is named for: {promise}"
