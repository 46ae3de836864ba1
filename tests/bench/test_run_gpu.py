"""The script that runs all GPU checks, its kit and the smoke checks, tested without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import leave_lost_gpu

from benchmarks import gpu_kit, gpu_smoke

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "run_gpu.sh"


def run_gpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def plan(*arguments: str) -> dict[str, int]:
    """Return the steps of a dry run with their time limits in seconds."""
    done = run_gpu("--dry-run", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    steps = dict(re.findall(r"^(\S+) +(\d+) s  ", done.stdout, re.MULTILINE))
    total = int(re.findall(r"in all (\d+) s", done.stdout)[0])
    assert total == sum(int(seconds) for name, seconds in steps.items() if name != "build")
    return {name: int(seconds) for name, seconds in steps.items()}


def test_time_limits_of_both_parts_fit_their_calls(tmp_path: Path) -> None:
    (tmp_path / "kit").mkdir()
    kit = ("--kit", str(tmp_path / "kit"), "--out", str(tmp_path / "out"))
    first, rest, all_steps = (plan(*kit, "--part", part) for part in ("first", "rest", "all"))
    assert list(first) == ["unpack", "environment", "smoke-triton", "smoke-cuda", "rows", "headline"]
    assert list(rest) == ["unpack", "tests-triton", "tests-cuda", "peers", "ncu-triton", "ncu-cuda", "racecheck"]
    assert sum(first.values()) <= 200
    assert sum(rest.values()) <= 380
    assert first["smoke-triton"] + first["smoke-cuda"] <= 45
    assert all_steps == {**first, **rest}
    assert sum(all_steps.values()) <= 600
    assert not (tmp_path / "out").exists()


def test_extension_is_built_without_a_kit() -> None:
    assert next(iter(plan())) == "build"
    assert "build" not in plan("--no-build")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--speed"], "unknown option --speed"),
        (["--out"], "--out needs a value"),
        (["--kit", "no/such"], "make gpu-kit"),
        (["--part", "last"], "first, rest or all"),
    ],
)
def test_gpu_script_rejects_unknown_arguments(arguments: list[str], word: str) -> None:
    done = run_gpu("--dry-run", *arguments)
    assert done.returncode == 2
    assert word in done.stderr


@pytest.fixture
def triton_key(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replace Triton's cache module with a stub that has another build key."""
    module = SimpleNamespace(triton_key=lambda: "3.6.0-one-build")
    monkeypatch.setattr(gpu_kit, "cache_module", lambda: module)
    return module


def test_kernels_of_a_kit_work_with_another_build_of_triton(tmp_path: Path, triton_key: SimpleNamespace) -> None:
    """Folder names in Triton's cache contain Triton's build key, and group files contain absolute paths."""
    keys = ["source-a-options", "source-b-options"]
    for key in keys:
        folder = tmp_path / "cache" / gpu_kit.folder_name(key)
        folder.mkdir(parents=True)
        (folder / "rows.cubin").write_bytes(key.encode())
        (folder / "rows.json").write_text("{}")
        (folder / "rows.ttir").write_text("large and unused")
        (folder / "__grp__rows.json").write_text('{"child_paths": {"rows.cubin": "/elsewhere/rows.cubin"}}')
    kit = tmp_path / "kit"
    kit.mkdir()
    assert gpu_kit.pack(kit, tmp_path / "cache", {gpu_kit.folder_name(key): key for key in keys}) == 2
    with tarfile.open(kit / gpu_kit.KERNELS) as archive:
        assert not [name for name in archive.getnames() if name.endswith(".ttir")]

    before = {gpu_kit.folder_name(key) for key in keys}
    triton_key.triton_key = lambda: "3.6.0-another-build"
    assert gpu_kit.unpack(kit, tmp_path / "there") == 2
    folders = sorted((tmp_path / "there").iterdir())
    assert not before & {folder.name for folder in folders}
    for key in keys:
        folder = tmp_path / "there" / gpu_kit.folder_name(key)
        children = json.loads((folder / "__grp__rows.json").read_text())["child_paths"]
        assert Path(children["rows.cubin"]).read_bytes() == key.encode()
        assert sorted(children) == ["rows.cubin", "rows.json"]


def test_kit_does_not_replace_an_existing_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(SystemExit, match="remove it, or name another folder"):
        gpu_kit.build(tmp_path)
    assert (tmp_path / "mine").read_text() == "x"


def test_smoke_checks_pass_for_correct_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_smoke, "DIVERGENCES", ("jsd",))
    for name, run in gpu_smoke.checks("native", "cpu", (77,)):
        passed, message = run()
        assert passed, f"{name}: {message}"


def test_smoke_check_fails_for_a_wrong_result() -> None:
    def check(backend: str, double: bool) -> dict[str, torch.Tensor]:
        return {"loss": torch.tensor(1.0 + 1e-3 * (backend == "cuda"), dtype=torch.float64 if double else torch.float32)}

    assert gpu_smoke.verdict(check, "torch")[0]
    assert not gpu_smoke.verdict(check, "cuda")[0]


@pytest.mark.slow
def test_gpu_tests_are_collected_without_some_extras() -> None:
    """A file that cannot be imported stops the whole run, and a GPU machine may lack these packages."""
    extras = ["datasets", "fastapi", "peft", "rapidfuzz", "sklearn", "uvicorn"]
    missing = "import sys, pytest; sys.modules.update(dict.fromkeys(sys.argv[1:])); raise SystemExit(pytest.main("
    arguments = ["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(
        [sys.executable, "-c", f"{missing}{arguments}))", *extras], capture_output=True, text=True, check=False, cwd=SCRIPT.parent.parent
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_tests_stop_after_a_lost_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access in one test, all later tests would fail too."""

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    with pytest.raises(pytest.exit.Exception, match="illegal memory access"):
        leave_lost_gpu()


def test_gpu_script_without_a_gpu_fails(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 0\n")  # stands for a Python with every package
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
