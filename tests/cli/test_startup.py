"""Imports at start-up: ``--help``, errors and completion import no torch, and a loss imports little besides torch."""

from __future__ import annotations

import ast
import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kdkernels as kd

SCRIPT = Path(__file__).parents[1] / "support" / "imported.py"
COMPLETED = "kdkernels recipe soc"


@pytest.fixture(scope="module")
def start() -> dict[str, Any]:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_version_errors_and_completion_import_no_large_package(start: dict[str, Any]) -> None:
    assert not {words: modules for words, modules in start["imported"].items() if modules}


def test_every_command_has_help_and_an_exit_status(start: dict[str, Any]) -> None:
    statuses = start["statuses"]
    assert {"demo --help", "train --help", "recipe lion --help", "env --nothing"} <= statuses.keys()
    for words, (status, output) in statuses.items():
        succeeds = words in ("--version", COMPLETED) or words.endswith("--help")
        assert status == (0 if succeeds else 2), f"{words}: {output}"
        assert succeeds or output.startswith("Error: "), f"{words}: {output}"
    assert statuses[COMPLETED][1].strip() == "socratic"
    assert statuses["train"][1].startswith("Error: --student is missing")


def test_a_loss_imports_nothing_large_besides_torch(start: dict[str, Any]) -> None:
    assert "torch._dynamo" not in start["beside_torch"]
    assert len(start["beside_torch"]) < 20


def test_public_names_are_the_same_for_type_checkers() -> None:
    tree = ast.parse(Path(kd.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    names: dict[str, Any] = {"__version__": kd.__version__}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        module = importlib.import_module(f"kdkernels.{node.module}") if node.module else kd
        names.update({alias.name: getattr(module, alias.name) for alias in node.names})
    assert sorted(names) == sorted(kd.__all__)
    assert all(getattr(kd, name) is value for name, value in names.items())


def test_lazy_names_behave_like_ordinary_ones() -> None:
    scope: dict[str, Any] = {}
    exec("from kdkernels import *", scope)
    assert scope.keys() - {"__builtins__"} == set(kd.__all__)
    assert set(kd.__all__) <= set(dir(kd))
    assert pickle.loads(pickle.dumps(kd.JSD(beta=0.3))) == kd.JSD(beta=0.3)
    assert kd.trainer is importlib.import_module("kdkernels.trainer")
    assert kd.divergences is importlib.import_module("kdkernels.divergences")
    assert not hasattr(kd, "no_such_name")
    with pytest.raises(AttributeError, match="module 'kdkernels' has no attribute 'no_such_name'"):
        kd.no_such_name  # noqa: B018
