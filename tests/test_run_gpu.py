"""The script that runs everything that needs a GPU, where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import leave_lost_gpu

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "run_gpu.sh"


def run_gpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_the_gpu_script_says_what_it_would_run(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "trl-1.0-py3-none-any.whl").touch()
    done = run_gpu("--dry-run", "--wheels", str(tmp_path / "wheels"), "--out", str(tmp_path / "out"), "--minutes", "20")
    assert (done.returncode, done.stderr) == (0, "")
    steps = [line.partition(" (")[0] for line in done.stdout.splitlines()]
    assert steps == ["install-trl", "build", "environment", "tests", "bench"]
    assert "--suite standard --device cuda" in done.stdout
    assert done.stdout.rstrip().endswith("--budget-minutes 19")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--speed"], "unknown option --speed"),
        (["--out"], "--out needs a value"),
        (["--wheels", "no/such"], "no such folder"),
        (["--minutes", "x"], "whole"),
    ],
)
def test_the_gpu_script_refuses_what_it_does_not_know(arguments: list[str], word: str) -> None:
    done = run_gpu("--dry-run", *arguments)
    assert done.returncode == 2
    assert word in done.stderr


@pytest.mark.slow
def test_gpu_tests_are_found_where_some_extras_are_missing() -> None:
    """A file that cannot be imported keeps all others from running. A machine with torch has transformers, but hardly these."""
    extras = ["datasets", "fastapi", "openai", "peft", "rapidfuzz", "sklearn", "uvicorn"]
    missing = "import sys, pytest; sys.modules.update(dict.fromkeys(sys.argv[1:])); raise SystemExit(pytest.main("
    arguments = ["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(
        [sys.executable, "-c", f"{missing}{arguments}))", *extras], capture_output=True, text=True, check=False, cwd=SCRIPT.parent.parent
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_nothing_is_tested_on_a_gpu_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else thousands of tests would fail for the one that made an illegal access."""

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    with pytest.raises(pytest.exit.Exception, match="illegal memory access"):
        leave_lost_gpu()


def test_the_gpu_script_needs_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 0\n")  # a Python that has everything
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(SCRIPT), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.defpath, "PYTHON": str(python)},
    )
    assert done.returncode == 1
    assert "--cpu tries the same steps without one" in done.stdout
    assert "no GPU" in (tmp_path / "out" / "summary.txt").read_text()
