"""Rows from JSONL, Parquet and ``datasets`` give the same tokens and keys. Nulls that columns add are ignored."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from templated import tokenizer

pytest.importorskip("transformers")
pytest.importorskip("datasets")
import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdkernels.data.rows import DataError, read_rows
from kdkernels.data.tokenization import load_examples
from kdkernels.data.values import as_json

NAMED = (
    "{% for t in tools or [] %}{{ t | tojson(sort_keys=true) }}\n{% endfor %}{% for m in messages %}<|im_start|>"
    "{{ m.role }} {{ m.name is defined }}\n"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c | tojson(sort_keys=true) }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant False\n{% endif %}"
)
WORDS = tokenizer(NAMED)


def keys(source: Any) -> list[str]:
    return [example.key() for example in load_examples(source, WORDS)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=4)
name = st.sampled_from("abc")
# A field has the same type in all rows, since it becomes a column. Columns add nulls for missing fields.
arguments = st.fixed_dictionaries({}, optional={
    "city": text, "count": st.integers(-9, 9), "list": st.lists(st.one_of(st.none(), st.integers(0, 9)), max_size=2),
    "deep": st.one_of(st.none(), st.fixed_dictionaries({}, optional={"x": st.one_of(st.none(), text), "y": st.lists(
        st.fixed_dictionaries({"z": st.integers(0, 3)}, optional={"w": st.one_of(st.none(), st.booleans())}), max_size=2)})),
})  # fmt: skip
calls = st.lists(st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": name, "arguments": arguments})}), max_size=2)
question = st.fixed_dictionaries(
    {"role": st.just("user"), "content": text}, optional={"name": st.one_of(st.none(), name), "tool_calls": st.just([])}
)
answer = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": text.map(lambda words: f"a{words}")},
    optional={"tool_calls": st.one_of(st.none(), calls), "reasoning_content": st.one_of(st.none(), text)},
)
tools = st.lists(st.fixed_dictionaries({"name": name}, optional={"properties": arguments}), max_size=2)
conversations = st.fixed_dictionaries(
    {"messages": st.tuples(question, answer).map(list)},
    optional={"tools": st.one_of(st.none(), tools), "weight": st.one_of(st.none(), st.floats(0, 2)), "note": arguments},
)
SETTINGS = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def filled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows as a column stores them: objects at the same place have the union of their fields, null where missing."""

    def merged(values: list[Any]) -> list[Any]:
        objects = [value for value in values if isinstance(value, dict)]
        names = sorted({key for value in objects for key in value})
        if objects:
            columns = {key: merged([value.get(key) for value in objects]) for key in names}
            complete = iter([dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)] if names else objects)
            return [next(complete) if isinstance(value, dict) else value for value in values]
        if any(isinstance(value, list) for value in values):
            parts = iter(merged([part for value in values if isinstance(value, list) for part in value]))
            return [[next(parts) for _ in value] if isinstance(value, list) else value for value in values]
        return values

    return merged(rows)


@SETTINGS
@given(st.lists(conversations, min_size=2, max_size=4))
def test_nulls_added_by_columns_are_removed_from_objects_only(rows: list[dict[str, Any]]) -> None:
    ordered = json.loads(json.dumps(rows, sort_keys=True))
    assert keys(filled(ordered)) == keys(ordered)
    assert [row.fields for row in read_rows(filled(ordered))] == as_json(ordered)


@SETTINGS
@given(rows=st.lists(conversations, min_size=2, max_size=4))
def test_jsonl_datasets_and_parquet_give_the_same_rows(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    expected = keys(rows)
    assert keys(write_jsonl(tmp_path / "rows.jsonl", rows)) == expected
    dataset = datasets.Dataset.from_list([{**dict.fromkeys(("messages", "note", "tools", "weight")), **row} for row in rows])
    assert keys(dataset) == expected
    try:
        dataset.to_parquet(tmp_path / "rows.parquet")
    except pa.ArrowNotImplementedError:  # Parquet can't store objects without fields
        return
    assert keys(tmp_path / "rows.parquet") == expected


def test_columns_of_json_are_decoded(tmp_path: Path) -> None:
    def row(arguments: Any, **more: Any) -> dict[str, Any]:
        call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
        return {"messages": [{"role": "user", "content": "q"}, call], **more}

    rows = [row({"a": 1, "b": [None, {}]}), row({"c": {"d": "x"}}, tools=[{"name": "f", "parameters": {}}]), row({})]
    lines = write_jsonl(tmp_path / "rows.jsonl", rows)
    dataset = datasets.Dataset.from_json(str(lines), cache_dir=str(tmp_path / "cache"))
    assert "Json" in str(dataset.features)
    dataset.to_parquet(tmp_path / "rows.parquet")
    assert keys(tmp_path / "rows.parquet") == keys(dataset) == keys(lines) == keys(rows)


def test_json_and_maps_of_other_writers_are_decoded(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": None}]
    json_column = pa.ExtensionArray.from_storage(pa.json_(), pa.array([json.dumps(turn) for turn in turns]))
    columns = {
        "messages": pa.ListArray.from_arrays(pa.array([0, 2]), json_column),
        "meta": pa.array([[("a", {"b": 1, "c": None})]], pa.map_(pa.string(), pa.struct([("b", pa.int64()), ("c", pa.int64())]))),
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    (row,) = read_rows(tmp_path / "rows.parquet")
    assert row.fields == {"messages": [turns[0], {"role": "assistant", "content": "a"}], "meta": {"a": {"b": 1}}}
    spoilt = pa.table({"messages": pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{"]))})
    pq.write_table(spoilt, tmp_path / "spoilt.parquet")
    with pytest.raises(DataError, match=r"spoilt.parquet, row 1: a column of JSON or maps \(messages\) can't be read"):
        list(read_rows(tmp_path / "spoilt.parquet"))


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ('{"prompt": "a", "response": "b", "response": "c"}', "response"),
        ('{"messages": [{"role": "user", "role": "system", "content": "a"}], "response": "b"}', "role"),
        ('{"prompt": "a", "response": "b", "weight": 0, "weight": 0}', "weight"),
    ],
)
def test_repeated_name_in_an_object_raises_with_the_row(tmp_path: Path, line: str, name: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"rows.jsonl, row 2: .*an object has '{name}' twice"):
        list(read_rows(tmp_path / "rows.jsonl"))


def test_repeated_name_in_parquet_raises(tmp_path: Path) -> None:
    tables = {
        "columns": (pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["prompt", "response", "response"]), "'response'"),
        "json": (pa.table({"meta": pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1, "a": 2}']))}), "row 1: .*'a' twice"),
        "map": (pa.table({"meta": pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64()))}), "row 1: .*'a' twice"),
    }
    for name, (table, message) in tables.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
        with pytest.raises(DataError, match=rf"{name}.parquet.*{message}"):
            list(read_rows(tmp_path / f"{name}.parquet"))


def test_deeply_nested_row_raises_with_its_number(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(DataError, match=r"row 1: .*nested too deeply"):
        list(read_rows(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("day", [datetime.date(2026, 3, 1), datetime.datetime(2026, 3, 1, 12), datetime.timedelta(1)])
def test_column_of_dates_raises_with_its_name(tmp_path: Path, day: Any) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"day": day}}}]}
    rows = [{"messages": [{"role": "user", "content": "q", "tool_calls": None}, call]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    place = r"messages\[1\].tool_calls\[0\].function.arguments.day"
    for source in (rows, tmp_path / "rows.parquet", datasets.Dataset.from_list(rows)):
        with pytest.raises(DataError, match=rf"row 1, field '{place}': it holds a (date|datetime|timedelta) .*write the column as text"):
            load_examples(source, WORDS)
    with pytest.raises(DataError, match=r"field 'tools\[0\].since'"):
        load_examples([{"messages": [{"role": "user", "content": "q"}], "response": "a", "tools": [{"since": day}]}], WORDS)


def test_unused_date_column_is_ignored(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b", "created": datetime.datetime(2026, 3, 1)}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert keys(tmp_path / "rows.parquet") == keys([{"prompt": "a", "response": "b"}])
