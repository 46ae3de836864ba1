"""The commands of docs/methods.md and docs/recipes.md run, and the tests that docs/methods.md names exist."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
import typer
from typer.testing import CliRunner

from kdkernels import cli
from kdkernels.cli.train.settings import read_settings

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").splitlines()
HEADER = ["method", "formula", "needs of the teacher", "command", "test"]
TABLES = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES if line.startswith("|")]
METHODS = [row for row in TABLES if row != HEADER and not set("".join(row)) <= {"-", " "}]
RECIPES = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
EXAMPLES = {
    name: commands
    for name, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", RECIPES, re.MULTILINE | re.DOTALL)
    if (commands := re.findall(r"^kdkernels .*$", text, re.MULTILINE))
}
"""Commands of docs/recipes.md by section. Later commands read the output of earlier ones."""
RUNS = {re.sub(r"\[|\].*", "", row[0]): re.findall(r"`(kdkernels [^`]*)`", row[3]) for row in METHODS}
SECONDS = 180
"""Limit of processor time for the commands of one method."""

EXPECTED = (
    "Hinton", "Ba and Caruana", "features", "MiniLLM", "GKD", "context distillation", "in-context learning distillation", "MT-CoT",
    "Fine-tune-CoT", "DISCO", "SCOTT", "Socratic CoT", "Distilling Step-by-Step", "Lion", "sequence-level", "text of a server", "white-box",
)  # fmt: skip


def test_page_lists_every_method() -> None:
    assert all(len(row) == len(HEADER) and all(row) for row in METHODS)
    assert len(RUNS) == len(METHODS)
    assert all(RUNS.values())
    assert [name for name in EXPECTED if not any(name in row[0] for row in METHODS)] == []


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row[0].split(",")[0].strip("["))
def test_named_test_of_the_method_exists(row: list[str]) -> None:
    file, _, name = row[4].strip("`").partition("::")
    (path,) = (ROOT / "tests").rglob(file)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert name.startswith("test_")


@pytest.mark.parametrize("command", [command for commands in (*RUNS.values(), *EXAMPLES.values()) for command in commands])
def test_documented_command_parses(command: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "kdkernels"
    group: click.Command = typer.main.get_command(cli.app)
    context = group.make_context(program, list(arguments))
    while isinstance(group, click.Group):
        name, subcommand, arguments = group.resolve_command(context, [*context._protected_args, *context.args])
        assert subcommand is not None
        group, context = subcommand, subcommand.make_context(name, list(arguments), parent=context)
    if group.name == "train":  # its other options are fields of DistillationArguments
        options = {name: context.params[name] for name in ("teacher", "student", "data")}
        steps = ["--output-dir", str(context.params["output_dir"]), "--max-steps", str(context.params["max_steps"])]
        read_settings({}, options, [*context.args, *steps])


@pytest.fixture
def tiny_folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Change to a folder with the models and data of docs/examples/make_tiny.py, which one worker makes for all."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "methods"
    try:
        shared.mkdir()
    except FileExistsError:
        end = time.monotonic() + 600
        while not (shared / "done").exists():
            assert time.monotonic() < end
            time.sleep(0.2)
    else:
        script = ROOT / "docs" / "examples" / "make_tiny.py"
        try:
            subprocess.run([sys.executable, str(script), "tiny", "--steps", "380", "--rows", "24"], cwd=shared, check=True)
        finally:  # after a failure too, so that other workers do not wait
            (shared / "done").touch()
    assert (shared / "tiny" / "seeds.jsonl").exists(), "make_tiny.py failed in another worker"
    (tmp_path / "tiny").symlink_to(shared / "tiny")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices gain nothing from a second core
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("commands", [*RUNS.values(), *EXAMPLES.values()], ids=[*RUNS, *(f"recipes.md, {name}" for name in EXAMPLES)])
def test_documented_commands_run(commands: list[str], tiny_folder: Path) -> None:
    started = time.process_time()
    for command in commands:
        result = CliRunner().invoke(cli.app, shlex.split(command)[1:], catch_exceptions=False)
        assert result.exit_code == 0, f"{command}\n{result.output}"
    assert time.process_time() - started < SECONDS
    assert len(list(tiny_folder.iterdir())) > 1, "nothing was written"
