"""release/wheels.py and the release workflow: they agree on Python versions, and publish only tested wheels without secrets."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"

pytestmark = pytest.mark.skipif(not WORKFLOW.is_file(), reason="the release files are not installed with the tests")


@pytest.fixture(scope="module")
def wheels() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wheels", ROOT / "release" / "wheels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def jobs() -> dict[str, Any]:
    return yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]


def test_renaming_the_project_changes_one_line(wheels: ModuleType, tmp_path: Path) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
    wheels.rename_project(tmp_path, "kdkernels-cu13")
    renamed = (tmp_path / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    assert [pair for pair in zip(text.splitlines(), renamed, strict=True) if pair[0] != pair[1]] == [
        ('name = "kdkernels"', 'name = "kdkernels-cu13"')
    ]
    with pytest.raises(SystemExit, match='expected one line name = "kdkernels"'):
        wheels.rename_project(tmp_path, "kdkernels-cu13")


def test_objects_are_reused_for_the_next_python(wheels: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "build" / "ninja-linux-x86_64-cpython-310"
    folder.mkdir(parents=True)
    (folder / "product.o").write_text("machine code")
    wheels.reuse_objects(tmp_path, "cpython-313")
    assert [path.relative_to(tmp_path / "build").as_posix() for path in (tmp_path / "build").rglob("*.o")] == [
        "ninja-linux-x86_64-cpython-313/product.o"
    ]


def test_broken_and_missing_pythons_are_not_found(wheels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert wheels.find_python("3.11") is None
    broken = tmp_path / "python3.11"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    assert wheels.find_python("3.11") is None


def test_workflow_builds_and_tests_every_python(wheels: ModuleType, jobs: dict[str, Any]) -> None:
    for job in ("wheels", "try"):
        assert tuple(jobs[job]["strategy"]["matrix"]["python"]) == wheels.PYTHONS
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert oldest is not None
    assert wheels.PYTHONS[0] == oldest[1]


def test_only_tested_wheels_are_published_without_secrets(jobs: dict[str, Any]) -> None:
    assert set(jobs["publish"]["needs"]) == {"sdist", "try"}
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["publish"]["if"] == "startsWith(github.ref, 'refs/tags/')"
    assert "secrets." not in WORKFLOW.read_text(encoding="utf-8")
