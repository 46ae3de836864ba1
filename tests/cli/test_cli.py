"""The ``kdkernels`` command, ``env``, ``demo`` and ``bench``: output and errors."""

from __future__ import annotations

import getpass
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import kdkernels as kd
from kdkernels.backends import _extension, selection
from kdkernels.bench import processes
from kdkernels.bench.environment import cpu_model
from kdkernels.cli import environment, root
from kdkernels.cli.demo import run
from kdkernels.cli.demo.settings import DemoError, Settings

runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})


def test_version_is_printed() -> None:
    result = runner.invoke(root.app, ["--version"])
    assert (result.exit_code, result.output.strip()) == (0, f"kdkernels {kd.__version__}")


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_the_commands(arguments: list[str]) -> None:
    result = runner.invoke(root.app, arguments)
    assert result.exit_code == 0
    assert all(word in result.output for word in ("env", "demo", "bench", "--version", "demo --quick"))


@pytest.mark.parametrize(
    "command", ["env", "train", "cache", "cache info", "cache verify", "cache extend", "merge", "recipe", "recipe sequence"]
)
def test_help_names_the_command_once(command: str) -> None:
    """``cache`` without a subcommand runs a hidden one, which the user does not know."""
    lines = runner.invoke(root.app, [*command.split(), "--help"]).output.splitlines()
    usage = next(line.strip() for line in lines if "Usage:" in line)
    assert re.fullmatch(rf"Usage: kdkernels {command}( \S+)+", usage)
    error = runner.invoke(root.app, [*command.split(), "--no-such-option"]).output
    assert command == "train" or error.endswith(f"See `kdkernels {command} --help`\n")


def test_help_of_demo_shows_options_defaults_and_examples() -> None:
    result = runner.invoke(root.app, ["demo", "--help"])
    assert result.exit_code == 0
    # Every option, the defaults, the choices and examples.
    for word in (
        "--data",
        "--out",
        "--seed",
        "--steps",
        "--vocab-size",
        "--backend",
        "--divergence",
        "--temperature",
        "--device",
        "--quick",
    ):
        assert word in result.output
    assert f"Default: {Settings().steps}, quick {Settings.quick().steps}" in " ".join(result.output.replace("│", " ").split())
    assert all(name in result.output for name in ("native", "jsd", "forward_kl", "kdkernels demo --data"))


def test_env_prints_versions_backends_devices_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDKERNELS_CUDA_ARCHS", "80;90a")
    result = runner.invoke(root.app, ["env"])
    assert result.exit_code == 0
    lines = [line.strip() for line in result.output.splitlines()]
    assert f"kdkernels        {kd.__version__}" in lines
    assert f"torch            {torch.__version__}" in lines
    assert any(line.startswith("KDKERNELS_CUDA_ARCHS") and line.endswith("80;90a") for line in lines)
    assert "backends on cpu" in lines
    assert any(line.startswith("cuda ") and "not available: " in line for line in lines), "an unavailable backend has a reason"
    assert any(line.startswith("torch ") and line.endswith("available") for line in lines)


def test_env_as_json_has_the_same_content() -> None:
    result = runner.invoke(root.app, ["env", "--json"])
    report = json.loads(result.output)
    assert report == json.loads(json.dumps(environment.environment()))
    assert set(report["backends"]["cpu"]) == {"auto", *selection.NAMES}
    assert report["backends"]["cpu"]["auto"] == selection.select("auto", "cpu", (torch.float32, torch.float32))
    assert set(report["environment variables"]) == {"TRITON_INTERPRET", "KDKERNELS_CUDA", "KDKERNELS_CUDA_ARCHS"}


def test_env_shows_no_paths_or_user_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_MISSING", f"cannot load ({Path.home() / 'venv' / '_C.so'}: undefined symbol)")
    report = environment.environment()
    assert report["backends"]["cpu"]["native"] == "not available: cannot load (_C.so: undefined symbol)"
    assert report["compiled extension"] == {"_C": "not there"}
    text = json.dumps({k: v for k, v in report.items() if k != "platform"})
    assert str(Path.home()) not in text
    assert sys.prefix not in text
    assert getpass.getuser() not in text.replace("torch", "").split()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/opt/some/lib.so: bad", "lib.so: bad"),
        ("'/a/b/c.py'", "'c.py'"),
        (r"C:\Users\me\x.dll not found", "x.dll not found"),
        ("CPU and/or GPU, 1 / 2", "CPU and/or GPU, 1 / 2"),
    ],
)
def test_folders_are_cut_from_reasons(text: str, expected: str) -> None:
    assert environment._without_folders(text) == expected


def test_env_shows_the_contents_of_the_extension() -> None:
    if _extension.missing() is not None:
        pytest.skip("not compiled here")
    assert _extension.contents()["cpu instruction sets"][-1] == "baseline"
    assert environment.environment()["compiled extension"]["cpu instruction sets"].endswith("baseline")


def test_env_names_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=141 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    report = environment.environment()
    assert report["devices"]["cuda:0"] == "NVIDIA H200, compute capability 9.0, 141 GiB"
    assert set(report["backends"]) == {"cpu", "cuda"}


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("no-such-package",))
    assert environment.environment()["versions"]["no-such-package"] == "not installed"


def test_processor_without_proc_cpuinfo_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert cpu_model()


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--data", "no/such/folder"], ["--data no/such/folder", "no such file or folder", "leave --data out"]),
        (["--backend", "cudnn"], ["--backend", "'cudnn'", "valid names: auto, cuda, triton"]),
        (["--divergence", "wasserstein"], ["--divergence", "'wasserstein'", "valid names: forward_kl"]),
        (["--temperature", "0"], ["--temperature 0", "> 0", "such as 1"]),
        (["--temperature", "-1"], ["--temperature -1", "> 0"]),
        (["--temperature", "nan"], ["--temperature nan", "finite"]),
        (["--steps", "0"], ["--steps 0: it must be between 1 and 1000000"]),
        (["--vocab-size", "10"], ["--vocab-size 10: it must be between 300 and 65536"]),
        (["--seed", "-1"], ["--seed -1: it must be between 0 and 2147483647"]),
        (["--device", "tpu"], ["--device", "'tpu'", "'cuda'"]),
    ],
)
def test_invalid_options_of_demo_raise(tmp_path: Path, arguments: list[str], messages: list[str]) -> None:
    result = runner.invoke(root.app, ["demo", "--quick", "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2
    assert all(word in result.output for word in messages), result.output
    assert not (tmp_path / "out").exists()


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("short\n")
    result = runner.invoke(root.app, ["demo", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    last = result.output.strip().splitlines()[-1]
    assert last.startswith(f"Error: --data {tmp_path}: found 6 bytes of UTF-8 text in 1 of 1 file")
    assert "at least 100,000 bytes" in last
    assert not (tmp_path / "out").exists()


def test_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        result = runner.invoke(root.app, ["demo", "--out", str(out)])
        assert result.exit_code == 2
        assert result.output.startswith(f"Error: --out {out}: cannot write into {tmp_path / 'file'} (")
        assert result.output.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_backend_that_cannot_run_is_refused_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_MISSING", "no compiler was found")
    selection._select.cache_clear()
    result = runner.invoke(root.app, ["demo", "--device", "cpu", "--backend", "native", "--out", str(tmp_path)])
    selection._select.cache_clear()
    assert result.exit_code == 2
    assert "--backend: backend='native' cannot run here: no compiler was found. Leave --backend out" in result.output
    assert list(tmp_path.iterdir()) == []


def test_missing_extras_are_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: None if name == "tokenizers" else name)
    result = runner.invoke(root.app, ["demo", "--out", str(tmp_path)])
    assert (result.exit_code, result.output) == (2, 'Error: the demo needs tokenizers: pip install "kdkernels[train,bench]"\n')


def test_cuda_without_a_device_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = runner.invoke(root.app, ["demo", "--device", "cuda", "--out", str(tmp_path)])
    assert (result.exit_code, result.output) == (2, "Error: --device cuda: torch sees no CUDA device here. Take --device cpu\n")


@pytest.mark.parametrize(
    ("raised", "code", "message"), [(KeyboardInterrupt(), 130, "Interrupted."), (DemoError("--data x: bad"), 2, "Error: --data x: bad")]
)
def test_exit_codes_of_interrupts_and_errors(monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, message: str) -> None:
    def fail(*args: object) -> None:
        raise raised

    monkeypatch.setattr(run, "run", fail)
    result = runner.invoke(root.app, ["demo"])
    assert (result.exit_code, result.output.strip()) == (code, message)


def test_options_reach_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments_of_run: list[object] = []
    monkeypatch.setattr(run, "run", lambda *arguments: arguments_of_run.extend(arguments))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    arguments = ["demo", "--data", str(tmp_path), "--steps", "200", "--seed", "5", "--divergence", "jsd", "--temperature", "3"]
    assert runner.invoke(root.app, arguments).exit_code == 0
    settings, data, out = arguments_of_run[:3]
    assert settings == Settings().changed(steps=200, seed=5, divergence="jsd", temperature=3.0, device="cuda")
    assert settings.teacher_steps == Settings().teacher_steps * 200 // Settings().steps
    assert (data, out) == (tmp_path, Path("demo-out"))


BENCH = ["bench", "--device", "cpu"]


def test_help_of_bench_shows_options_and_an_example() -> None:
    result = runner.invoke(root.app, ["bench", "--help"])
    assert result.exit_code == 0
    options = ("suite", "shape", "divergence", "dtype", "temperature", "backends", "peers", "device", "out", "budget-minutes", "resume")
    assert all(f"--{option}" in result.output for option in options)
    assert "kdkernels bench --suite smoke" in result.output


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--suite", "tiny"], ["--suite", "'tiny'", "smoke"]),
        (["--shape", "8,100,4"], ["N,V,Ds,Dt", "such as 2048,32000,512,1024", "'8,100,4'"]),
        (["--divergence", "wasserstein"], ["--divergence 'wasserstein'", "valid names: forward_kl"]),
        (["--dtype", "int8"], ["--dtype 'int8'", "float32, bfloat16, float16"]),
        (["--temperature", "0"], ["--temperature 0", "> 0"]),
        (["--backends", "cudnn"], ["--backends cudnn", "valid names: auto, cuda, triton, native, torch"]),
        (["--peers", "trl,other"], ["--peers trl,other: unknown other", "liger_jsd"]),
        (["--budget-minutes", "0"], ["--budget-minutes 0", "> 0"]),
        (["--resume"], ["--resume:", "holds no results.json"]),
    ],
)
def test_invalid_options_of_bench_raise(tmp_path: Path, arguments: list[str], messages: list[str]) -> None:
    result = runner.invoke(root.app, [*BENCH, "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2
    assert all(word in result.output for word in messages), result.output
    assert not (tmp_path / "out").exists()


def test_bench_measures_the_requested_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure in this process, without ``torch.compile``, which would take most of the time."""
    monkeypatch.setattr(processes, "ask", processes.answer)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    arguments = ["--suite", "smoke", "--shape", "32,256", "--divergence", "jsd", "--backends", "torch", "--peers", "none"]
    result = runner.invoke(root.app, [*BENCH, *arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "JSD, float32, N=32 V=256 (logits given), T=2" in result.output
    record = json.loads((tmp_path / "results.json").read_text())
    assert [[r["variant"] for r in m["results"]] for m in record["cases"]] == [["floor", "eager", "compile", "torch"]]
    assert (record["status"], record["settings"]["suite"]) == ("complete", "smoke")
    assert (tmp_path / "report.html").exists()


def test_bench_without_a_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = runner.invoke(root.app, ["bench", "--device", "cuda", "--out", str(tmp_path)])
    assert (result.exit_code, result.output) == (2, "Error: --device cuda: torch sees no CUDA device here. Take --device cpu\n")


def test_command_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "kdkernels.cli", "env", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["versions"]["kdkernels"] == kd.__version__
    assert done.stderr == ""
