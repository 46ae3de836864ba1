"""Text of data, servers and paths is escaped on the terminal. Errors are one line. A model's code never runs."""

from __future__ import annotations

import ast
import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import kdkernels
from kdkernels import cli
from kdkernels.bench import page
from kdkernels.support import terminal
from kdkernels.support.errors import UserError
from kdkernels.support.files import line_of
from kdkernels.teachers.loading import load

ESCAPE = "\x1b]0;title\x07\x1b[2J\x9b1m\u202e"
runner = CliRunner()


def test_markup_emoji_and_control_sequences_in_text_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    table = Table("[b]name")
    table.add_row(f"out[/x] {ESCAPE}")
    terminal.console(soft_wrap=True).print(f"out[bf16]/[/x] :smile: {ESCAPE}\nnext")
    terminal.console().print(table)
    terminal.say(f"[bold]{ESCAPE}")
    output = capsys.readouterr().out
    assert "out[bf16]/[/x] :smile: \\x1b]0;title\\x07\\x1b[2J\\x9b1m\\u202e\nnext" in output
    assert not set(output) & set("\x1b\x07\x9b\u202e")
    assert "[b]name" in output
    assert "[bold]" in output


def test_progress_bar_escapes_its_unit() -> None:
    from rich.console import Console

    output = io.StringIO()
    with terminal.progress(Console(file=output, width=200), f"replies in [/x]{ESCAPE}") as bar:
        bar.start(1)
        bar.advance(1)
    assert "replies in [/x]\\x1b]0;" in output.getvalue()
    assert ESCAPE not in output.getvalue()


class Template(Exception):
    __module__ = "jinja2.exceptions"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("two\nlines"), "two lines"),
        (UserError(f"a row {ESCAPE}"), "a row \\x1b]0;"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: the disk is full"),
        (OSError(errno.EFBIG, "File too large", "rows.jsonl"), "rows.jsonl: File too large: the disk is full, or a limit is reached"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "out: Permission denied. Change the permissions"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "broken pipe"),
        (OverflowError("int too large to convert to float"), "int too large"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed writing file data/0"), None),
        (Template("roles must alternate"), "roles must alternate"),
    ],
)
def test_errors_of_users_are_one_line(capsys: pytest.CaptureFixture[str], error: Exception, message: str | None) -> None:
    with pytest.raises(typer.Exit) as exit_, terminal.failing():
        raise error
    assert exit_.value.exit_code == 2
    line = capsys.readouterr().err
    assert line.startswith("Error: ")
    assert line.count("\n") == 1
    assert (message or "the disk is full") in line


def test_bug_of_the_package_keeps_its_traceback() -> None:
    with pytest.raises(KeyError), terminal.failing():
        raise KeyError("a bug")


@pytest.mark.parametrize(
    "words",
    [
        ["nothing"], ["--nothing"], ["env", "stray"], ["train", "--config", "/dev/null"], ["cache"], ["cache", "--kind", "all"],
        ["generate", "--model"], ["recipe", "nothing"], ["recipe", "lion", "--count", "x"], ["bench", "--dtype", "int8"],
        ["bench", "--shape", "1,x"], ["demo", "--temperature", "nan", "--quick"], ["bench", "--resume", "--out", "/dev/null/out"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_invalid_options_are_one_line(words: list[str]) -> None:
    result = runner.invoke(cli.app, words, catch_exceptions=False)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: "), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_output_to_a_full_disk_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr("sys.stdout", full)
        with pytest.raises(typer.Exit), terminal.failing():
            terminal.console().print("text")
        full.write("more")
        full.flush()  # stdout now discards writes, so that Python's flush at exit does not fail
    assert "No space left on device" in capsys.readouterr().err


def test_closed_pipe_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        with pytest.raises(typer.Exit), terminal.failing():
            terminal.console().print("text")
    assert "broken pipe" in capsys.readouterr().err


def test_logs_and_reports_hold_no_control_characters() -> None:
    line = line_of({"key": ESCAPE, "text": "half \ud800 é"})
    assert line.isascii() is False
    assert not set(line) & set("\x1b\x07\x9b\u202e\ud800")
    assert json.loads(line) == {"key": ESCAPE, "text": "half \ud800 é"}
    assert page._text(f"<b>{ESCAPE}") == "&lt;b&gt;\\x1b]0;title\\x07\\x1b[2J\\x9b1m\\u202e"


def test_code_in_a_model_folder_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    names = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": names}))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for cls in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=r"--teacher .* can't be loaded"):
            load(cls, "teacher", str(tmp_path))
    assert not (tmp_path / "ran").exists()


def calls_of(tree: ast.AST, names: tuple[str, ...]) -> list[ast.Call]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in names]


def test_every_model_is_loaded_without_its_code() -> None:
    arguments: list[Any] = []
    for path in Path(kdkernels.__file__).parent.rglob("*.py"):
        for call in calls_of(ast.parse(path.read_text(encoding="utf-8")), ("from_pretrained", "from_config")):
            values = {word.arg: word.value for word in call.keywords}
            arguments.append(values.get("trust_remote_code"))
            assert isinstance(arguments[-1], ast.Constant), f"{path}, line {call.lineno}"
            assert arguments[-1].value is False, f"{path}, line {call.lineno}"
    assert arguments
