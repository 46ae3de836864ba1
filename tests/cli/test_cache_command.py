"""``kdkernels cache``: a trainer reads its output, and errors are one line."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from caches import bytes_of, view
from typer.testing import CliRunner

from kdkernels import cli
from kdkernels.bench.cache import measure
from kdkernels.data.tokenization import load_examples
from kdkernels.sides import LMHead
from kdkernels.teachers.cache import CacheError, open_cache, read_text
from kdkernels.teachers.live import LiveTeacher

runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})


@pytest.fixture(scope="module")
def text() -> Any:
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("teacher") / "tiny-teacher")


def run(*arguments: object) -> str:
    result = runner.invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("kind", ["topk", "sampled", "hidden"])
def test_cache_command_writes_what_a_trainer_reads(tmp_path: Path, folder: Path, text: Any, kind: str) -> None:
    data, out = tiny.write(tmp_path / "data.jsonl", tiny.rows(9)), tmp_path / "out"
    command = ["cache", "--teacher", folder, "--data", data, "--kind", kind, "-k", 5, "--out", out, "--batch-size", 3]
    output = run(*command)
    tokens = sum(len(e.teacher_scored) for e in load_examples(data, text))
    token_bytes = {"topk": 5 * 6 + 4, "sampled": 5 * 6, "hidden": 32 * 4}[kind]
    assert f"{kind}: 9 examples, {tokens} tokens of {token_bytes} bytes" in output
    before = bytes_of(out)
    run(*command)
    assert bytes_of(out) == before
    assert str(tmp_path) not in (out / "manifest.json").read_text(), "a cache names no path of this machine"
    cache = open_cache(out, text, teacher="tiny-teacher")
    targets = cache.targets(view(load_examples(data, text), cache.salt))
    if isinstance(targets, LMHead):
        truth = LiveTeacher(tiny.model(len(text))).targets(view(load_examples(data, text)[:3]))
        assert torch.equal(targets.hidden[: len(truth.hidden)], truth.hidden)
        assert torch.equal(targets.weight, truth.weight)
    else:
        assert targets.ids.shape == (tokens, 5)


def test_text_cache_holds_the_teachers_text_and_can_be_trained_on(tmp_path: Path, folder: Path, text: Any) -> None:
    from kdkernels.teachers.local import LocalModel
    from kdkernels.teachers.text import Request

    rows = tiny.rows(5)
    data, out = tiny.write(tmp_path / "data.jsonl", rows), tmp_path / "out"
    output = run("cache", "--teacher", folder, "--data", data, "--kind", "text", "--max-new-tokens", 6, "--batch-size", 2, "--out", out)
    assert "text: 5 rows" in output
    text_rows = read_text(out, text)
    requests = [Request(str(i), row.get("messages") or [{"role": "user", "content": row["prompt"]}], 6) for i, row in enumerate(rows)]
    replies = LocalModel(folder, batch_size=2).complete(requests, tmp_path / "log")
    assert [row["response"] for row in text_rows] == [reply.text for reply in replies]
    assert [row.get("prompt") for row in text_rows] == [row.get("prompt") for row in rows]
    assert len(load_examples(out, text)) == 5, "the folder can be given to --data"
    with pytest.raises(CacheError, match="holds text"):
        open_cache(out)


def test_columns_without_json_types_become_text(tmp_path: Path, folder: Path) -> None:
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    data, when = tmp_path / "data.parquet", datetime.datetime(2020, 1, 2)
    parquet.write_table(pyarrow.table({"prompt": ["the", "a"], "response": ["fox", "dog"], "when": [when] * 2, "raw": [b"x"] * 2}), data)
    run("generate", "--model", folder, "--data", data, "--out", tmp_path / "a.jsonl", "--max-tokens", 4)
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])["when"] == str(when)
    run("cache", "--teacher", folder, "--data", data, "--kind", "text", "--max-new-tokens", 4, "--out", tmp_path / "text")
    run("recipe", "in-context", "--data", data, "--out", tmp_path / "shown", "-k", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-k", 0], "-k"),
        (["-k", 100000], "the vocabulary has"),
        (["--temperature", 0], "--temperature 0"),
        (["--kind", "hidden", "--temperature", 2], "means nothing for kind=hidden"),
        (["--dtype", "int8"], "--dtype int8"),
        (["--precision", "bfloat16"], "--precision bfloat16"),
        (["--max-length", 3], "max_length=3"),
        (["--max-length", 5000], "a model takes 256 tokens"),
        (["--vocab-size", 5000], "--vocab-size 5000"),
    ],
)
def test_invalid_cache_options_are_one_line(tmp_path: Path, folder: Path, arguments: list[object], message: str) -> None:
    data = tiny.write(tmp_path / "data.jsonl", tiny.rows(3))
    command = ["cache", "--teacher", folder, "--data", data, "--out", tmp_path / "out", *arguments]
    result = runner.invoke(cli.app, [str(a) for a in command])
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cache", "--teacher", "./nowhere"], "--teacher ./nowhere: no such folder"),
        (["cache", "--teacher", "FOLDER", "--tokenizer", "./nowhere"], "--tokenizer ./nowhere: no such folder"),
        (["cache", "--from-replies", "--tokenizer", "./nowhere"], "--tokenizer ./nowhere: no such folder"),
        (["cache", "--teacher", "EMPTY"], "can't be loaded by AutoTokenizer"),
        (["generate", "--model", "./nowhere"], "--model ./nowhere: no such folder"),
        (
            ["generate", "--model", "m", "--base-url", "http://localhost:1/v1", "--extra-body", "{"],
            "--extra-body {: a JSON object is needed",
        ),
    ],
)
def test_missing_paths_are_named_with_their_option(tmp_path: Path, folder: Path, arguments: list[str], message: str) -> None:
    data, empty = tiny.write(tmp_path / "data.jsonl", tiny.rows(3)), tmp_path / "empty"
    empty.mkdir()
    words = [{"FOLDER": str(folder), "EMPTY": str(empty)}.get(a, a) for a in arguments]
    result = runner.invoke(cli.app, [*words, "--data", str(data), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize("kind", ["topk", "hidden"])
def test_measurement_of_a_cache_runs(tmp_path: Path, kind: Any) -> None:
    figures = measure(tmp_path, tokens=1000, kind=kind, k=4, length=50)
    assert figures["raw bytes"] == 1000 * (28 if kind == "topk" else 128)
    assert not list(tmp_path.iterdir())
