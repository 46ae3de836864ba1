"""Caches used on another day, by another version, or with another batch size or folder name. Errors name rows and causes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from caches import bytes_of, view
from training import make_model, make_rows, make_tokenizer, trainers
from typer.testing import CliRunner

import kdkernels as kd
from kdkernels import cli
from kdkernels.data import templates
from kdkernels.data.example import Example
from kdkernels.data.rows import places
from kdkernels.data.tokenization import load_examples
from kdkernels.sides import LMHead, Sampled, TopK
from kdkernels.teachers.cache import CacheError, Identity, Manifest, open_cache, read_text, write_cache
from kdkernels.teachers.cache.manifest import identity_of_tokenizer
from kdkernels.teachers.cache.text import write_text_cache
from kdkernels.teachers.live import LiveTeacher

runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
OLD = Path(__file__).with_name("cache-of-version-1")
"""Caches of each kind in format version 1, and their rows. The teacher was ``make_model(8, 1, ..., 0, initializer_range=0.3)``."""
DATED = "{{ 'Today ' + strftime_now('%Y-%m-%d') + '. ' }}" + tiny.TEMPLATE


@pytest.fixture(scope="module")
def text() -> Any:
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def live(text: Any) -> LiveTeacher:
    return LiveTeacher(tiny.model(len(text)))


@pytest.fixture(scope="module")
def examples(text: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    return load_examples(tiny.write(tmp_path_factory.mktemp("data") / "train.jsonl", tiny.rows(24)), text)


def identity_of(text: Any, kind: Any = "sampled", **changed: Any) -> Identity:
    by_kind: dict[str, dict[str, Any]] = {"sampled": {"k": 4, "temperature": 1.0, "seed": 0}, "hidden": {"dtype": "float32"}}
    common = {"teacher": "big", "revision": "5" * 64, "teacher_dtype": "float32", "vocab_size": len(text), "padded_vocab_size": len(text)}
    return Identity(kind=kind, **{**common, **identity_of_tokenizer(text), **by_kind[kind], **changed})


# Format version 1


@pytest.mark.parametrize("kind", ["topk", "sampled", "hidden"])
def test_a_cache_of_version_1_opens_and_holds_its_rows(kind: str) -> None:
    words = make_tokenizer()
    cache, examples = open_cache(OLD / kind, words), load_examples(OLD / "rows.jsonl", words)
    assert all(example.key(cache.salt) in cache for example in examples)
    cache.require(examples)
    batch = view(examples, cache.salt)
    targets, truth = cache.targets(batch), LiveTeacher(make_model(8, 1, len(words), 0, initializer_range=0.3)).targets(batch)
    assert isinstance(truth, LMHead)
    if isinstance(targets, LMHead):
        torch.testing.assert_close(targets.hidden, truth.hidden)
    elif isinstance(targets, TopK):
        torch.testing.assert_close(targets.logprobs, kd.topk_logprobs(truth, 4, 2.0).logprobs, atol=0.01, rtol=0)
    else:
        assert isinstance(targets, Sampled)
        assert (targets.counts.sum(-1) == 4).all()


def test_a_text_cache_of_version_1_opens() -> None:
    rows = read_text(OLD / "text", make_tokenizer())
    assert [row.get("prompt") for row in rows] == [json.loads(line).get("prompt") for line in (OLD / "rows.jsonl").open()]


@pytest.mark.parametrize("kind", ["hidden", "sampled"])
def test_interrupted_cache_of_version_1_is_finished_in_version_1(tmp_path: Path, kind: str) -> None:
    words, out = make_tokenizer(), tmp_path / "c"
    shutil.copytree(OLD / kind, out)
    whole = bytes_of(out)
    dataclasses.replace(Manifest.read(out), shards=(), head=None, complete=False).write(out)
    for name in whole.keys() - {"manifest.json"}:
        (out / name).unlink()
    old = Manifest.read(out).identity
    identity = dataclasses.replace(old, **identity_of_tokenizer(words))
    teacher = LiveTeacher(make_model(8, 1, len(words), 0, initializer_range=0.3))
    write_cache(teacher, load_examples(OLD / "rows.jsonl", words), out, identity, hidden_size=8)
    assert whole.keys() <= bytes_of(out).keys()
    assert json.loads(bytes_of(out)["manifest.json"])["version"] == 1
    assert Manifest.read(out).examples == json.loads(whole["manifest.json"])["examples"], "the keys keep their salt"


def test_error_for_missing_rows_of_a_version_1_cache_names_the_version() -> None:
    words = make_tokenizer()
    with pytest.raises(ValueError, match=r"row 1.*of an earlier version"):
        open_cache(OLD / "hidden", words).require(load_examples([{"prompt": "red ", "response": "two two"}], words))


# Tokenisation


def test_another_end_token_or_other_tokenisation_rules_raise(tmp_path: Path, text: Any, live: LiveTeacher, examples: list[Example]) -> None:
    write_cache(live, examples[:2], tmp_path / "c", identity_of(text))
    open_cache(tmp_path / "c", text)
    changed = tiny.tokenizer()
    changed.pad_token = changed.eos_token  # the pad token is not learnt
    open_cache(tmp_path / "c", changed)
    changed.eos_token = "<pad>"
    with pytest.raises(CacheError, match="different is the tokens that begin and end a text") as error:
        open_cache(tmp_path / "c", changed)
    assert "the tokenizer" not in str(error.value)
    write_cache(live, examples[:2], tmp_path / "d", identity_of(text, rules=1))
    with pytest.raises(CacheError, match=r"the rules of tokenisation \(rules: 1 in the cache, \d+ now\)"):
        open_cache(tmp_path / "d", text)


# Another day


def test_training_on_another_day_uses_the_date_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = make_tokenizer(template="{{ strftime_now('%-d') }}" + make_tokenizer().chat_template)
    rows = [{"messages": [{"role": "user", "content": "one"}], "response": response} for response in ("two", "three")]
    teacher = LiveTeacher(make_model(8, 1, 192))
    identity = dataclasses.replace(identity_of(words), vocab_size=192, padded_vocab_size=192)
    write_cache(teacher, load_examples(rows, words, date="2026-03-01"), tmp_path / "c", identity)
    cache = open_cache(tmp_path / "c", words)
    assert cache.date == "2026-03-01"
    trainer = trainers(tmp_path / "runs", words)(teacher=cache, rows=rows)
    assert trainer.args.template_date == "2026-03-01"
    trainer.train()
    with pytest.raises(ValueError, match=r"rows 1, 2\. The chat template writes the date: it is 2026-03-02 now, and 2026-03-01 in the"):
        trainers(tmp_path / "runs", words)(teacher=cache, rows=rows, template_date="2026-03-02")
    with pytest.raises(CacheError, match=r"was begun for 2026-03-01, these examples are for 2026-03-02.*date='2026-03-01'"):
        write_cache(teacher, load_examples(rows, words, date="2026-03-02"), tmp_path / "c", identity)
    mixed = [*load_examples(rows, words, date="2026-03-01"), *load_examples(rows, words, date="2026-03-02")]
    with pytest.raises(CacheError, match="the examples are for 2026-03-01, 2026-03-02"):
        write_cache(teacher, mixed, tmp_path / "d", identity)


class Tomorrow(templates.datetime.date):  # type: ignore[name-defined,misc]
    @classmethod
    def today(cls) -> Any:
        return cls(2030, 1, 2)


@pytest.mark.parametrize("kind", ["hidden", "text"])
def test_resumed_command_keeps_its_start_date(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.save(tmp_path / "teacher")
    dated = tiny.tokenizer()
    dated.chat_template = DATED
    dated.save_pretrained(folder)
    data, out = tiny.write(tmp_path / "data.jsonl", tiny.rows(4)), tmp_path / "c"
    command = ["cache", "--teacher", str(folder), "--data", str(data), "--kind", kind, "--out", str(out), "--max-new-tokens", "3"]
    assert runner.invoke(cli.app, command).exit_code == 0
    whole = bytes_of(out)
    dataclasses.replace(Manifest.read(out), shards=(), head=None, complete=False).write(out)
    monkeypatch.setattr(templates.datetime, "date", Tomorrow)
    result = runner.invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    assert bytes_of(out) == whole


def test_continued_text_cache_keeps_its_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dates: list[str] = []

    def ids(tokenizer: Any, messages: Any, date: Any) -> list[int]:
        dates.append(str(date))
        return [3, 4]

    monkeypatch.setattr("kdkernels.teachers.cache.text.prompt_ids", ids)
    dated = tiny.tokenizer()
    dated.chat_template = DATED
    identity = dataclasses.replace(identity_of(dated), kind="text", k=None, temperature=0.0, max_new_tokens=2)
    model, rows = tiny.model(len(dated)), [{"prompt": "the"}]
    manifest = write_text_cache(model, dated, rows, tmp_path / "c", identity)
    monkeypatch.setattr(templates.datetime, "date", Tomorrow)
    write_text_cache(model, dated, rows, tmp_path / "c", identity)
    assert dates == [manifest.date] * 2


# Use


@pytest.mark.parametrize(("kind", "warns"), [("hidden", False), ("sampled", True)])
def test_cache_continues_with_another_batch_size(
    tmp_path: Path, text: Any, live: LiveTeacher, examples: list[Example], kind: str, warns: bool
) -> None:
    """Hidden states on a CPU do not depend on the batch size. For the other kinds a warning says that bits may differ."""
    out, identity = tmp_path / "c", identity_of(text, kind)
    options: dict[str, Any] = {"hidden_size": 32, "shard_bytes": 1024}
    write_cache(live, examples, out, identity, batch_size=4, **options)
    whole = bytes_of(out)
    assert len(Manifest.read(out).shards) > 2
    dataclasses.replace(Manifest.read(out), shards=Manifest.read(out).shards[:1], complete=False).write(out)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write_cache(live, examples, out, identity, batch_size=3, **{**options, "shard_bytes": 1 << 20})
    assert any("begun with --batch-size 4" in str(warning.message) for warning in caught) == warns
    assert bytes_of(out).keys() == whole.keys(), "the size of the shards stays as at the start"
    if kind == "hidden":
        assert bytes_of(out) == whole


def test_renamed_folder_with_the_same_weights_is_the_same_teacher(tmp_path: Path) -> None:
    first = tiny.save(tmp_path / "first")
    data, out = tiny.write(tmp_path / "data.jsonl", tiny.rows(4)), tmp_path / "c"
    command = ["cache", "--data", str(data), "--kind", "hidden", "--out", str(out), "--teacher"]
    assert runner.invoke(cli.app, [*command, str(first)]).exit_code == 0
    whole = bytes_of(out)
    moved = shutil.copytree(first, tmp_path / "moved")
    result = runner.invoke(cli.app, [*command, str(moved)])
    assert result.exit_code == 0, result.output
    assert bytes_of(out) == whole
    open_cache(out, teacher="moved", revision=Manifest.read(out).identity.revision)
    with pytest.raises(CacheError, match="teacher: first in the cache, moved now"):
        open_cache(out, teacher="moved")
    result = runner.invoke(cli.app, [*command, str(tiny.save(tmp_path / "first-again", seed=1))])
    assert result.exit_code == 2
    assert "the teacher's revision" in result.output


def test_errors_name_only_the_differences(tmp_path: Path, text: Any, live: LiveTeacher, examples: list[Example]) -> None:
    out = tmp_path / "c"
    write_cache(live, examples, out, identity_of(text))
    with pytest.raises(CacheError) as error:
        write_cache(live, examples, out, identity_of(text, seed=1))
    assert "different is seed (seed: 0 in the cache, 1 now). " in str(error.value)
    with pytest.raises(CacheError, match=r"of other data: 24 examples with \d+ tokens, and this data has 23 with") as error:
        write_cache(live, examples[1:], out, identity_of(text))
    assert "different" not in str(error.value)


def test_missing_rows_are_named(tmp_path: Path, text: Any, live: LiveTeacher, examples: list[Example]) -> None:
    write_cache(live, examples[:20], tmp_path / "c", identity_of(text), options={"max_length": 64, "reasoning": "learn"})
    cache = open_cache(tmp_path / "c", text)
    cache.require(examples[:20])
    with pytest.raises(ValueError, match=r"4 of 24 rows .*train\.jsonl, rows 21, 22, 23, 24\. It was made from other rows"):
        cache.require(examples)
    with pytest.raises(ValueError, match=r"--max-length 64, this training has 4, and some of these rows are that long"):
        cache.require(examples, max_length=4)
    with pytest.raises(ValueError, match=r"made with --reasoning learn, this training has drop"):
        cache.require(examples, max_length=4000, reasoning="drop")
    held_out = load_examples([{"prompt": "the ", "response": "a"}], text)
    with pytest.raises(ValueError, match=r"train\.jsonl, row 22; row 1\. "):
        cache.require([examples[21], *held_out])


def test_errors_name_the_first_20_rows() -> None:
    assert places([f"a.jsonl, row {n}" for n in range(1, 31)]).endswith("rows " + ", ".join(map(str, range(1, 21))) + "; and 10 more")
    assert places(["b.parquet, row 7", "row 2"]) == "b.parquet, row 7; row 2"


@pytest.mark.parametrize(
    ("kind", "option", "message"),
    [
        ("sampled", ["--temperature", "2"], "train with --temperature 1, or make a cache with `kdkernels cache --temperature 2`"),
        ("topk", ["--temperature", "2"], "train with --temperature 1, or make a cache with `kdkernels cache --temperature 2`"),
        ("topk", ["--divergence", "total_variation"], "train with --divergence forward_kl, jsd, reverse_kl, or make a cache with"),
        ("sampled", ["--divergence", "jsd"], "train with --divergence forward_kl, or make a cache with `kdkernels cache --kind hidden`"),
    ],
)
def test_unsupported_use_of_a_cache_names_the_options(tmp_path: Path, kind: str, option: list[str], message: str) -> None:
    folder, data = tiny.save(tmp_path / "model"), tiny.write(tmp_path / "data.jsonl", tiny.rows(3))
    result_of_cache = runner.invoke(
        cli.app, ["cache", "--teacher", str(folder), "--data", str(data), "--kind", kind, "-k", "3", "--out", str(tmp_path / "c")]
    )
    assert result_of_cache.exit_code == 0, result_of_cache.output
    command = [
        "train",
        "--student",
        str(folder),
        "--cache",
        str(tmp_path / "c"),
        "--data",
        str(data),
        "--output-dir",
        str(tmp_path / "out"),
    ]
    result = runner.invoke(cli.app, [*command, "--max-steps", "1", "--use-cpu", *option])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "tail" not in result.output


def test_several_data_files_become_one_cache(tmp_path: Path) -> None:
    folder, rows = tiny.save(tmp_path / "model"), make_rows(6)
    files = [tiny.write(tmp_path / name, part) for name, part in (("train.jsonl", rows[:4]), ("held.jsonl", rows[4:]))]
    command = ["cache", "--teacher", str(folder), "--kind", "hidden", "--out", str(tmp_path / "c")]
    result = runner.invoke(cli.app, [*command, *(word for file in files for word in ("--data", str(file)))])
    assert result.exit_code == 0, result.output
    cache = open_cache(tmp_path / "c")
    assert len(cache) == 6
    for file in files:
        cache.require(load_examples(file, tiny.tokenizer()))
