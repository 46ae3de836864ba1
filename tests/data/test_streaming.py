"""Streamed data: rows, shuffling by the seed, resuming, shares, the hub, and refused data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import hub
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from templated import tokenizer

pytest.importorskip("transformers")
pytest.importorskip("datasets")
import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from kdkernels.data import rows as reading
from kdkernels.data.example import Example
from kdkernels.data.files import rows_of
from kdkernels.data.layouts import give_form
from kdkernels.data.rows import DataError, Row
from kdkernels.data.streaming import ExampleStream, Source
from kdkernels.data.tokenization import RowTokenizer, load_examples
from kdkernels.support import memory

WORDS = tokenizer()
TEXTS = [{"prompt": f"question {i}", "response": chr(97 + i % 26) * (1 + i % 3)} for i in range(23)]
TOKENIZE = RowTokenizer(WORDS)
SETTINGS = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(folder: Path, name: str, rows: Sequence[dict[str, str]], row_group_size: int = 5) -> Path:
    """Write rows in the format of the name's extension, or with ``save_to_disk`` if there is none."""
    path = folder / name
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=row_group_size)
    elif path.suffix in (".csv", ".tsv"):
        separator = "," if path.suffix == ".csv" else "\t"
        path.write_text("\n".join(separator.join(row) for row in ([*rows[0]], *(list(row.values()) for row in rows))) + "\n")
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(row["prompt"] for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows)))
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(map(json.dumps, rows)))
    else:
        datasets.Dataset.from_list(list(rows)).save_to_disk(path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {name: write(folder, name, TEXTS) for name in ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.txt", "saved")}


def encode(row: Row) -> list[Example]:
    give_form(row, None)
    return TOKENIZE(row)


def source(names: Sequence[Path], buffer: int = 1, seed: str = "0") -> Source:
    return Source([str(name) for name in names], encode, seed, buffer)


def stream(sources: Sequence[Source], shares: Sequence[float] | None = None, packed_to: int | None = None) -> ExampleStream:
    return ExampleStream(sources, shares, 30, 4, packed_to, "content")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.txt", "saved"])
def test_reader_continues_after_any_row(files: dict[str, Path], name: str) -> None:
    rows = list(rows_of(files[name]))
    assert len(rows) == len(TEXTS)
    for start in (0, *range(len(rows))):
        after = rows[start - 1][0] if start else 0
        assert list(rows_of(files[name], after)) == rows[start:]
    assert not list(rows_of(files[name], rows[-1][0]))


@SETTINGS
@given(st.lists(st.sampled_from(["a.jsonl", "a.csv", "a.parquet", "a.txt", "saved"]), min_size=1, max_size=3))
def test_stream_with_a_buffer_of_one_repeats_the_rows_in_order(files: dict[str, Path], names: list[str]) -> None:
    paths = [files[name] for name in names]
    plain = load_examples([str(path) for path in paths], WORDS)
    assert list(islice(iter(source(paths).__next__, None), 2 * len(plain) + 3)) == [*plain, *plain, *plain[:3]]


@SETTINGS
@given(st.integers(1, 40), st.integers(0, 9))
def test_each_pass_reads_every_row_once_in_an_order_from_the_seed(files: dict[str, Path], buffer: int, seed: int) -> None:
    plain = load_examples(files["a.jsonl"], WORDS)
    from_jsonl, from_parquet = (source([files[name]], buffer, str(seed)) for name in ("a.jsonl", "a.parquet"))
    passes = [[next(from_jsonl) for _ in plain] for _ in range(2)]
    assert [[next(from_parquet) for _ in plain] for _ in range(2)] == passes
    for drawn in passes:
        assert sorted(example.key() for example in drawn) == sorted(example.key() for example in plain)
    if buffer > 4:
        assert plain != passes[0] != passes[1]
        assert [next(source([files["a.jsonl"]], buffer, "another")) for _ in plain] != passes[0]


@SETTINGS
@given(st.sampled_from([(None, None), ([3.0, 1.0], None), ([0.5, 0.5], 24)]), st.integers(1, 12), st.integers(0, 30), st.integers(0, 9))
def test_stream_resumes_from_the_state_of_any_step(
    files: dict[str, Path], mixing: tuple[list[float] | None, int | None], buffer: int, step: int, ahead: int
) -> None:
    shares, packed_to = mixing
    names = [files["a.jsonl"], files["a.parquet"]]

    def fresh() -> ExampleStream:
        groups = [names] if shares is None else [[name] for name in names]
        return stream([source(group, buffer) for group in groups], shares, packed_to)

    every = list(fresh())
    running = fresh()
    for index in range(min(4 * step + ahead, len(running))):  # a data loader reads ahead of the training step
        assert running[index] == every[index]
    state = json.loads(json.dumps(running.state(step)))
    resumed = fresh()
    resumed.restore(state)
    assert [resumed[index] for index in range(4 * step, len(resumed))] == every[4 * step :]
    assert [running[index] for index in range(4 * step, len(running))] == every[4 * step :]
    with pytest.raises(IndexError, match=f"item {len(every)} of a stream"):
        resumed[len(every)]
    resumed.begin()
    assert resumed[0] == every[0]


def test_process_reads_only_its_own_items_of_the_stream(files: dict[str, Path]) -> None:
    every = list(stream([source([files["a.jsonl"]], 5)]))
    second = stream([source([files["a.jsonl"]], 5)])
    for step in range(10):
        second.forget(step)
        assert [second[index] for index in (4 * step + 2, 4 * step + 3)] == every[4 * step + 2 : 4 * step + 4]


@SETTINGS
@given(st.lists(st.integers(0, 5), min_size=2, max_size=2).filter(any), st.integers(1, 9))
def test_shares_are_exact_at_every_step(files: dict[str, Path], shares: list[int], buffer: int) -> None:
    drawn = Counter[str]()
    mixed = stream([source([files[name]], buffer) for name in ("a.jsonl", "a.parquet")], [float(share) for share in shares])
    for count, (example,) in enumerate(mixed, 1):
        drawn[example.where.rpartition(".")[2][:5]] += 1
        assert abs(drawn["jsonl"] - count * shares[0] / sum(shares)) <= 1


def test_examples_of_every_kind_survive_a_checkpoint(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "response": "a", "weight": 0.1, "task": "t", "teacher_prompt": "another q"}, {"text": "some words"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5},
                      {"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0},
                      {"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]},
    ]  # fmt: skip
    path = tiny.write(tmp_path / "rows.jsonl", rows)
    first = source([path], buffer=3)
    first._fill()
    restored = source([path], buffer=3)
    restored.restore(json.loads(json.dumps(first.state())))
    assert restored._waiting == first._waiting == load_examples(path, WORDS)
    assert [example.where for example in restored._waiting] == [example.where for example in first._waiting]


def test_data_of_the_hub_is_streamed_by_commit(tmp_path: Path) -> None:
    for name, part in (("one", TEXTS[:15]), ("two", TEXTS[15:])):
        write(tmp_path, f"{name}.parquet", part)
    sets = {
        "lab/lines": {"train.jsonl": "".join(json.dumps(row) + "\n" for row in TEXTS).encode()},
        "lab/tables": {f"data/train-0000{n}-of-00002.parquet": (tmp_path / f"{name}.parquet").read_bytes()
                       for n, name in enumerate(("one", "two"))},
    }  # fmt: skip
    plain = load_examples(TEXTS, WORDS)
    reading.hub.commit_of.cache_clear()
    with hub.serving(tmp_path / "caches", sets):
        for name in sets:
            assert reading.hub.identity_of(name, streamed=True) == f"train:@{hub.COMMIT}"
            running = source([name], buffer=4)
            expected = [next(running) for _ in range(60)]
            assert {example.key() for example in expected[:23]} == {example.key() for example in plain}
            for position in (12, 40):
                first, resumed = source([name], buffer=4), source([name], buffer=4)
                for _ in range(position):
                    next(first)
                resumed.restore(json.loads(json.dumps(first.state())))
                assert [next(resumed) for _ in range(60 - position)] == expected[position:]
        for name, message in (("lab/none", "the hub does not name its commit"), ("lab/lines:test", "the data set can't be loaded")):
            with pytest.raises(DataError, match=f"{name}: .*{message}"):
                next(source([name]))


def test_file_changed_while_streaming_raises(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "rows.jsonl", TEXTS)
    running = source([path])
    for _ in TEXTS:
        next(running)
    path.write_text(path.read_text() + json.dumps(TEXTS[0]) + "\n")
    with pytest.raises(DataError, match=r"rows.jsonl has changed since the run was started: put the old file back"):
        [next(running) for _ in range(3)]
    running = source([path])
    path.unlink()
    with pytest.raises(DataError, match="has changed"):
        next(running)


def test_json_list_and_data_without_examples_raise(files: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"a.json: --streaming needs an object on each line, and this is one list: write it as JSONL"):
        source([files["a.json"]])
    with pytest.raises(DataError, match=r"a.jsonl: no row is left to train on"):
        next(Source([str(files["a.jsonl"])], lambda row: [], "0", 3))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "saved"])
def test_data_larger_than_memory_raises(files: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "available_bytes", lambda: 500)
    for data in (files[name], [str(files[name]), str(files["a.txt"])]):
        with pytest.raises(DataError, match=rf"{name}: the examples .* GiB are free. Use `kdkernels train --streaming --max-steps N`"):
            load_examples(data, WORDS)
    assert load_examples(TEXTS, WORDS), "rows that are already in memory"
    monkeypatch.setattr(reading, "available_bytes", lambda: None)
    assert load_examples(files[name], WORDS)


def test_memory_limit_of_a_container_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    free = memory.available_bytes()
    assert free is not None
    (tmp_path / "memory.stat").write_text("file 100\nanon 40\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes() > 1000
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory.available_bytes() == 960
