"""Imports point one way: each room of the package knows those before it, and the loss knows none of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kdkernels"
ROOMS = ("tap", "data", "teachers", "trainer", "recipes", "train")
"""A room may import from those to its left, and from what every room stands on."""
COMMANDS = ("cli.py", "__main__.py")
"""Import everything."""


def imported(file: Path) -> set[str]:
    """The modules of this package that a file imports, as ``tap.head``; inside functions, too."""
    found: set[str] = set()
    here = ("kdkernels", *file.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("kdkernels.") for name in found if name.startswith("kdkernels.")}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_rooms_before_it(room: str) -> None:
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert len(files) > 1
    after = ROOMS[ROOMS.index(room) + 1 :]
    backwards = {f"{file.name}: {name}" for file in files for name in imported(file) if name.partition(".")[0] in after}
    assert not backwards


def test_the_loss_imports_from_no_room() -> None:
    files = [file for file in PACKAGE.glob("*.py") if file.name not in (*COMMANDS, "__init__.py")]
    files += (PACKAGE / "backends").rglob("*.py")
    assert "losses" in {file.stem for file in files}
    assert not {f"{file.name}: {name}" for file in files for name in imported(file) if name.partition(".")[0] in ROOMS}


def test_the_trainer_is_thin() -> None:
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in (PACKAGE / "trainer").glob("*.py"))
    assert lines <= 1050
