"""``kdkernels cache info``, ``verify`` and ``extend``. An interrupted extension leaves a valid cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from caches import bytes_of, view
from runs import killed_at, make_home, run_in, weights
from training import make_model
from typer.testing import CliRunner

from kdkernels import cli
from kdkernels.data.tokenization import load_examples
from kdkernels.teachers.cache import open_cache, writer
from kdkernels.teachers.cache.manifest import Manifest

ROWS = tiny.rows(12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("teacher") / "tiny-teacher")


@pytest.fixture(scope="module")
def cache_of_8(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``topk`` cache of the first 8 rows."""
    home = tmp_path_factory.mktemp("made")
    data = tiny.write(home / "data.jsonl", ROWS[:8])
    run("cache", "--teacher", folder, "--data", data, "-k", 5, "--out", home / "cache", "--batch-size", 2)
    return home / "cache"


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == status, result.output
    return result.output


def extend(cache: Path, teacher: Path, data: Path, *more: object, status: int = 0) -> str:
    return run("cache", "extend", cache, "--teacher", teacher, "--data", data, "--batch-size", 2, *more, status=status)


def test_info_describes_a_cache(cache_of_8: Path) -> None:
    about = json.loads(run("cache", "info", cache_of_8, "--json"))
    manifest = Manifest.read(cache_of_8)
    assert (about["kind"], about["k"], about["teacher"], about["examples"]) == ("topk", 5, "tiny-teacher", 8)
    assert about["revision"] == manifest.identity.revision
    assert about["bytes"] == sum((cache_of_8 / shard.file).stat().st_size for shard in manifest.shards)
    assert "complete" in run("cache", "info", cache_of_8)
    assert "holds no manifest.json" in run("cache", "info", cache_of_8.parent, status=2)


def test_verify_names_each_damaged_file(cache_of_8: Path, tmp_path: Path) -> None:
    assert run("cache", "verify", cache_of_8) == f"{cache_of_8}: whole\n"
    copy = shutil.copytree(cache_of_8, tmp_path / "cache")
    shard = copy / Manifest.read(copy).shards[0].file
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert f"{shard.name} is damaged" in run("cache", "verify", copy, status=1)
    shard.unlink()
    assert f"{shard.name} is missing" in run("cache", "verify", copy, status=1)
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"rows": 8', '"rows": 9', 1))
    assert "does not match its own checksum" in run("cache", "verify", copy, status=1)
    assert "it is not a cache" in run("cache", "verify", tmp_path, status=2)


@pytest.mark.parametrize("kind", ["topk", "sampled", "hidden"])
def test_extended_cache_equals_a_cache_written_at_once(folder: Path, tmp_path: Path, kind: str) -> None:
    first, every = tiny.write(tmp_path / "first.jsonl", ROWS[:8]), tiny.write(tmp_path / "every.jsonl", ROWS)
    common = ("--teacher", folder, "--kind", kind, "-k", 5, "--batch-size", 2)
    run("cache", *common, "--data", first, "--out", tmp_path / "cache")
    run("cache", *common, "--data", every, "--out", tmp_path / "whole")
    before = bytes_of(tmp_path / "cache")
    assert "4 examples" in extend(tmp_path / "cache", folder, every)  # the four new rows
    after = bytes_of(tmp_path / "cache")
    assert all(after[name] == before[name] for name in before if name not in ("manifest.json", ".kdkernels"))
    text = tiny.tokenizer()
    examples = load_examples(every, text)
    caches = [open_cache(tmp_path / name, text) for name in ("cache", "whole")]
    extended, expected = (cache.targets(view(examples, cache.salt)) for cache in caches)
    for name in ("ids", "logprobs", "counts", "hidden", "weight"):
        if hasattr(expected, name):
            assert getattr(extended, name).equal(getattr(expected, name)), name
    assert (len(caches[0]), caches[0].manifest.tokens) == (12, caches[1].manifest.tokens)
    extend(tmp_path / "cache", folder, every)  # no new rows
    assert bytes_of(tmp_path / "cache") == after


def test_interrupted_extension_leaves_a_valid_cache(
    cache_of_8: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = shutil.copytree(cache_of_8, tmp_path / "cache")
    data = tiny.write(tmp_path / "data.jsonl", ROWS)
    manifest = Manifest.read(cache)
    small = Manifest(**{**vars(manifest), "shard_bytes": 1})  # each batch is a shard
    small.write(cache)
    produce, calls = writer.Producer.__call__, []

    def cut(self: Any, path: Path, start: int, stop: int) -> None:
        if calls:
            path.write_bytes(b"half a shard")
            raise KeyboardInterrupt
        calls.append(start)
        produce(self, path, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(writer.Producer, "__call__", cut)
        extend(cache, folder, data, status=130)
    assert len(open_cache(cache, tiny.tokenizer())) == 10
    assert "whole" in run("cache", "verify", cache)
    extend(cache, folder, data)
    assert len(open_cache(cache, tiny.tokenizer())) == 12


@pytest.mark.parametrize("difference", ["weights", "tokenizer"])
def test_extension_by_another_teacher_is_refused(cache_of_8: Path, folder: Path, tmp_path: Path, difference: str) -> None:
    teacher = (
        tiny.save(tmp_path / "tiny-teacher", seed=4) if difference == "weights" else shutil.copytree(folder, tmp_path / "tiny-teacher")
    )
    if difference == "tokenizer":
        text = tiny.tokenizer()
        text.chat_template = text.chat_template.replace(": ", "> ")
        text.save_pretrained(teacher)
    before = bytes_of(cache_of_8)
    message = extend(cache_of_8, teacher, tiny.write(tmp_path / "data.jsonl", ROWS), status=2)
    assert ("the teacher's revision" if difference == "weights" else "the chat template") in message
    assert bytes_of(cache_of_8) == before


def test_extension_by_a_renamed_copy_of_the_teacher_works(cache_of_8: Path, folder: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(cache_of_8, tmp_path / "cache")
    extend(cache, shutil.copytree(folder, tmp_path / "renamed"), tiny.write(tmp_path / "data.jsonl", ROWS))
    assert len(open_cache(cache)) == 12


def test_invalid_extensions_raise(cache_of_8: Path, folder: Path, tmp_path: Path) -> None:
    data = tiny.write(tmp_path / "data.jsonl", ROWS[:2])
    run("cache", "--teacher", folder, "--data", data, "--kind", "text", "--max-new-tokens", 2, "--out", tmp_path / "text")
    assert "holds text: make another cache" in extend(tmp_path / "text", folder, data, status=2)
    unfinished = shutil.copytree(cache_of_8, tmp_path / "unfinished")
    manifest = Manifest.read(unfinished)
    Manifest(**{**vars(manifest), "complete": False}).write(unfinished)
    assert "is unfinished" in extend(unfinished, folder, data, status=2)
    assert "holds no manifest.json" in extend(tmp_path / "nothing", folder, data, status=2)
    assert not (tmp_path / "nothing").exists()


def test_cache_command_without_a_subcommand_shows_its_own_help() -> None:
    assert "--kind" in run("cache", "--help")
    assert "extend" in run("cache", "--help")
    assert run("cache", "--nothing", status=2).endswith("See `kdkernels cache --help`\n")
    assert "--teacher" in run("cache", "extend", "--help")


def test_training_continues_from_an_extended_cache(tmp_path: Path) -> None:
    """A resumed run compares the cache's identity and its own rows. Additional rows are allowed; changed shards are another cache."""
    home = make_home(tmp_path / "home")
    cache, out = tmp_path / "cache", tmp_path / "out"
    run("cache", "--teacher", home / "teacher", "--data", home / "train.jsonl", "--kind", "hidden", "--out", cache)
    options = {"teacher": [], "cache": str(cache), "max_steps": 3}
    run_in(home, out, **options)
    resumed = killed_at(2, out, tmp_path / "resumed")
    extend(cache, home / "teacher", home / "held-out.jsonl")
    assert "Resuming at checkpoint-2" in run_in(home, resumed, **options)
    assert weights(resumed) == weights(out)
    make_model(12, 1, seed=9).save_pretrained(home / "teacher")
    shutil.rmtree(cache)
    run("cache", "--teacher", home / "teacher", "--data", home / "train.jsonl", "--kind", "hidden", "--out", cache)
    with pytest.raises(ValueError, match="another the --cache"):
        run_in(home, resumed, **{**options, "max_steps": 4})
