"""Rows of every form from files of every format, from ``datasets`` and from the hub; renamed columns; errors."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import hub
import pytest
from templated import tokenizer

pytest.importorskip("transformers")
pytest.importorskip("datasets")
import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdkernels.cli.train.record import data_content
from kdkernels.data.layouts import Columns
from kdkernels.data.rows import DataError
from kdkernels.data.tokenization import load_examples
from kdkernels.teachers.generate import asked_of

WORDS = tokenizer()
ASK, FOUR = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
CHAT = [ASK, FOUR]


def keys(source: Any, **options: Any) -> list[str]:
    return [example.key() for example in load_examples(source, WORDS, **options)]


def write(folder: Path, rows: list[dict[str, Any]]) -> list[Path]:
    """Write the rows to a file of each format that can hold them."""
    files = [folder / f"rows.{suffix}" for suffix in ("jsonl", "json", "parquet")]
    files[0].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files[1].write_text(json.dumps(rows, indent=1), encoding="utf-8")
    table = pa.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, files[2])
    if all(isinstance(value, str) for row in rows for value in row.values()):
        files.append(folder / "rows.csv")
        pyarrow.csv.write_csv(table, files[-1])
    if rows[0].keys() == {"text"}:
        files.append(folder / "rows.txt")
        files[-1].write_text("\n\n".join(row["text"] for row in rows) + "\n", encoding="utf-8")
    return files


text = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), max_size=5).map(lambda letters: f'a "b",{letters} c')
turn = st.tuples(text, text).map(lambda texts: [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}])
exchange = st.tuples(text, text).map(lambda texts: [{"from": "human", "value": texts[0]}, {"from": "gpt", "value": texts[1]}])
several = {"min_size": 1, "max_size": 2}
FORMS = {
    "prompt and response": st.fixed_dictionaries({"prompt": text, "response": text}),
    "TRL's prompt and completion": st.fixed_dictionaries({"prompt": text, "completion": text}),
    "TRL's conversations": turn.map(lambda messages: {"prompt": messages[:1], "completion": messages[1:]}),
    "messages": st.lists(turn, **several).map(lambda turns: {"messages": [*chain(*turns)]}),
    "text": st.fixed_dictionaries({"text": text}),
    "Alpaca": st.fixed_dictionaries({"instruction": text, "input": st.sampled_from(["", "x y"]), "output": text}),
    "ShareGPT": st.lists(exchange, **several).map(lambda turns: {"conversations": [*chain(*turns)]}),
    "other columns": st.fixed_dictionaries({"question": text, "answer": text, "text": text}),
}


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
def test_each_form_gives_the_same_tokens_from_every_file_format(tmp_path: Path, form: str, data: st.DataObject) -> None:
    rows = data.draw(st.lists(FORMS[form], min_size=1, max_size=3))
    options = {"columns": "prompt=question,response=answer"} if form == "other columns" else {}
    expected = keys(rows, **options)
    assert keys(datasets.Dataset.from_list(rows), **options) == expected
    for file in write(tmp_path, rows):
        assert keys(file, **options) == expected, file.suffix


def test_saved_datasets_folder_is_readable(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b"}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "several")
    assert keys(tmp_path / "one") == keys(tmp_path / "several" / "train") == keys(rows)
    with pytest.raises(DataError, match=r"the folder has several splits: choose one of .*several/train$"):
        keys(tmp_path / "several")


def test_data_sets_of_the_hub_are_read_by_split_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, others = [{"prompt": "a", "response": str(i)} for i in range(3)], [{"prompt": "b", "response": "c"}]
    first, second = ("".join(json.dumps(row) + "\n" for row in part).encode() for part in (rows, others))
    card = b"---\nconfigs:\n" + b"".join(
        b"- config_name: %s\n  data_files:\n  - split: train\n    path: %s.jsonl\n  - split: test\n    path: two.jsonl\n" % pair
        for pair in ((b"default", b"one"), (b"other", b"two"))
    )
    sets = {"lab/sums": {"README.md": card + b"---\n", "one.jsonl": first, "two.jsonl": second}}
    monkeypatch.chdir(tmp_path)
    with hub.serving(tmp_path / "caches", sets):
        assert keys("lab/sums") == keys("lab/sums:train") == keys(rows)
        assert keys("lab/sums:test") == keys("lab/sums:train:other") == keys(others)
        assert keys(["lab/sums", "lab/sums:test"]) == keys([*rows, *others])
        assert data_content(["lab/sums", "lab/sums:test"]) == [f"train:@{hub.COMMIT}", f"test:@{hub.COMMIT}"]
        for name, message in (
            ("lab/sums:held", r"lab/sums:held: .*Unknown split.*'train', 'test'.*give NAME:SPLIT:CONFIG"),
            ("lab/sums:train:none", r"lab/sums:train:none: the data set can't be loaded \(.*none"),
            ("lab/none", "lab/none: no such file or folder, and no such data set on the hub"),
        ):
            with pytest.raises(DataError, match=message):
                keys(name)
        Path("lab/sums").mkdir(parents=True)
        write(Path("lab/sums"), others)[0].rename("lab/sums/kept.jsonl")
        for file in Path("lab/sums").glob("rows.*"):
            file.unlink()
        assert keys("lab/sums") == keys(others), "an existing path has priority over the hub"
    with pytest.raises(DataError, match=r"data/rows.jsonl: no such file"):
        keys("data/rows.jsonl")


def test_alpaca_rows_are_conversations() -> None:
    row = {"instruction": "Add.", "input": "2+2", "output": "4"}
    assert keys([row]) == keys([{"messages": [{"role": "user", "content": "Add.\n2+2"}, FOUR]}])
    with_history = {**row, "input": "", "system": "be brief", "history": [["1+1?", "2"]]}
    before = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    assert keys([with_history]) == keys([{"messages": [*before, {"role": "user", "content": "Add."}, FOUR]}])


def test_sharegpt_rows_are_conversations() -> None:
    function_call = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'}
    sharegpt = [{"from": "human", "value": "2+2?"}, function_call, {"from": "observation", "value": "4"}, {"from": "gpt", "value": "4"}]
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]}
    turns = [ASK, call, {"role": "tool", "content": "4"}, FOUR]
    assert keys([{"conversations": sharegpt}]) == keys([{"messages": turns}])
    assert keys([{"conversations": turns, "system": "s"}]) == keys([{"messages": [{"role": "system", "content": "s"}, *turns]}])


def test_columns_choose_among_the_forms_of_a_row() -> None:
    row = {"instruction": "Add.", "input": "", "output": "4", "text": "Add. 4", "weight": 0.5}
    with pytest.raises(DataError, match=r"row 1, field 'output': the row has 'text' too.*choose one with --columns.*has: instruction, inp"):
        keys([row])
    assert keys([row], columns="text=text") == keys([{"text": "Add. 4"}])
    assert keys([row], columns={"instruction": "instruction", "output": "output"}) == keys(
        [{"messages": [{**ASK, "content": "Add."}, FOUR]}]
    )
    (example,) = load_examples([{**row, "note": 2.0}], WORDS, columns="prompt=instruction,response=output,weight=note")
    assert example.weight == 2.0


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("prompt", "expected pairs of field=column"),
        ("", "expected pairs of field=column"),
        ("promt=question", r"'promt' is not a field of a row; nearest: prompt\. Write field=column"),
        ("prompt=a,prompt=b", "'prompt' is given twice"),
    ],
)
def test_unknown_columns_raise(columns: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Columns(columns)


def test_missing_column_is_named() -> None:
    row = {"question": "a", "answer": "b"}
    with pytest.raises(DataError, match=r"row 1, field 'query': --columns prompt=query .* The row has: question, answer"):
        keys([row], columns="prompt=query,response=answer")
    with pytest.raises(DataError, match=r"row 1, field 'reply': text is needed, and there is none"):
        keys([row], columns="prompt=question,response=reply")
    with pytest.raises(DataError, match=r"--columns weight=share: no row has such a column"):
        keys([row], columns="prompt=question,response=answer,weight=share")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"conversations": [{"from": "parrot", "value": "a"}]},
            r"field 'conversations\[0\].from': 'parrot' is not one of human, user, gpt",
        ),
        ({"conversations": "a"}, "field 'conversations': a list of"),
        (
            {"conversations": [{"from": "human"}, {"from": "gpt", "value": "b"}]},
            "field 'conversations': message 0 needs a role and a content",
        ),
        ({"conversations": [{"from": "function_call", "value": "add"}]}, r"field 'conversations\[0\].value': a function_call needs JSON"),
        ({"conversations": CHAT, "messages": CHAT}, "field 'conversations': the row has 'messages' too, and can be read in two ways"),
        ({"conversations": CHAT, "instruction": "a", "output": "b"}, "field 'output': the row has 'conversations' too"),
        ({"conversations": CHAT, "response": "5"}, "field 'response': the row has a last turn of the assistant in 'conversations' too"),
        ({"instruction": 3, "output": "b"}, "field 'instruction': text is needed, and it is 3"),
        ({"instruction": "a", "output": " "}, "field 'output': the assistant's turn is empty"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "field 'history': a list of pairs"),
        ({"instruction": "a", "output": "b", "prompt": "c", "response": "d"}, "two ways"),
    ],
)
def test_invalid_rows_of_other_tools_raise_with_their_field(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"row 2, {message}" if message.startswith("field") else message):
        keys([{"prompt": "a", "response": "b"}, row])


def test_csv_cells_are_text_numbers_or_lists(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(
        '\ufeffprompt,response,weight,messages\n"a\n""b""",7,0.5,\n,,,"[{""role"": ""user"", ""content"": ""2+2?""}, '
        '{""role"": ""assistant"", ""content"": ""4""}]"\n',
        encoding="utf-8",
    )
    (tmp_path / "rows.tsv").write_text("prompt\tresponse\nx, y\tz\n")
    examples = load_examples(tmp_path / "rows.csv", WORDS)
    assert [example.key() for example in examples] == keys([{"prompt": 'a\n"b"', "response": "7"}, {"messages": CHAT}])
    assert [example.weight for example in examples] == [0.5, 1.0]
    assert keys(tmp_path / "rows.tsv") == keys([{"prompt": "x, y", "response": "z"}])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"prompt,response\na,b,c\n", "a.csv: not CSV in UTF-8 with a header .*Expected 2 columns, got 3"),
        ("a.csv", b"prompt,prompt\na,b\n", "a.csv: two columns have the name 'prompt'"),
        ("a.csv", b"prompt,response\na,\xff\n", "a.csv: not CSV in UTF-8"),
        ("a.csv", b"prompt,response,weight\na,b,much\n", "a.csv, row 1, field 'weight': a number >= 0"),
        ("a.csv", b"", "a.csv: not CSV"),
        ("a.json", b'[{"prompt": "a", "response": "b"}, {"prompt": "a", "prompt": "b"}]', "a.json, row 2: not JSON .*'prompt' twice"),
        ("a.json", b'[{"prompt": "a", "response": "b"}', "a.json, row 1: not JSON .*the end of the list is missing"),
        ("a.json", b'[{"prompt": "a", "response": "b"}] x', "a.json: text follows the list"),
        ("a.json", b'{\n "prompt": "a"\n}', "a.json, row 1: not JSON"),
        ("a.json", b"[]", "a.json holds no rows"),
        ("a.txt", b"a\n\xff\n", "a.txt, row 2: not text in UTF-8"),
    ],
)
def test_invalid_files_raise_with_name_and_row(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        keys(tmp_path / name)


def test_folder_gives_the_rows_of_its_files(tmp_path: Path) -> None:
    files = write(tmp_path, [{"prompt": "a", "response": "b"}])
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "notes.md").write_text("notes")
    assert len(keys(tmp_path)) == len(files) == 4
    (tmp_path / "LICENSE.txt").write_text("all rights\n")
    with pytest.raises(DataError, match=r"the folder holds LICENSE.txt, whose lines would be rows of text, beside rows.csv"):
        keys(tmp_path)


def test_mapping_of_splits_is_refused() -> None:
    with pytest.raises(DataError, match="data is a mapping of train: give one of its parts"):
        keys(datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "a b"}])}))


def test_prompts_for_servers_are_read_from_rows_of_other_tools() -> None:
    from kdkernels.data.layouts import training_rows

    (row,) = training_rows([{"instruction": "Add.", "input": "2+2"}])
    assert asked_of(row.fields) == [{"role": "user", "content": "Add.\n2+2"}]
