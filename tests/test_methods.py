"""docs/methods.md is true: each method names a command that parses and a test that exists."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from kdkernels import cli
from kdkernels.train.settings import read_settings

ROOT = Path(__file__).parent.parent
LINES = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").splitlines()
HEADER = ["method", "formula", "needs of the teacher", "command", "test"]
TABLES = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES if line.startswith("|")]
METHODS = [row for row in TABLES if row != HEADER and not set("".join(row)) <= {"-", " "}]
COMMANDS = re.findall(r"^kdkernels .*$", (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), re.MULTILINE)

WANTED = (
    "Hinton", "Ba and Caruana", "features", "MiniLLM", "GKD", "context distillation", "in-context learning distillation", "MT-CoT",
    "Fine-tune-CoT", "DISCO", "SCOTT", "Socratic CoT", "Distilling Step-by-Step", "Lion", "sequence-level", "text of a server", "white-box",
)  # fmt: skip


def test_every_method_is_there() -> None:
    assert all(len(row) == len(HEADER) and all(row) for row in METHODS)
    assert [name for name in WANTED if not any(name in row[0] for row in METHODS)] == []


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row[0].split(",")[0].strip("["))
def test_the_named_test_exists(row: list[str]) -> None:
    file, _, name = row[4].strip("`").partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert name.startswith("test_")


@pytest.mark.parametrize("command", [*(row[3].strip("`") for row in METHODS), *COMMANDS])
def test_the_command_parses(command: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "kdkernels"
    group: click.Command = typer.main.get_command(cli.app)
    context = group.make_context(program, list(arguments))
    while isinstance(group, click.Group):
        name, found, arguments = group.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None
        group, context = found, found.make_context(name, list(arguments), parent=context)
    if group.name == "train":  # whose further options are those of the trainer's arguments
        given = {name: context.params[name] for name in ("teacher", "student", "data")}
        steps = ["--output-dir", str(context.params["output_dir"]), "--max-steps", str(context.params["max_steps"])]
        read_settings({}, given, [*context.args, *steps])
