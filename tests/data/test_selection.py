"""Held-out rows, draws from several sources by their shares, and long texts split into blocks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from templated import tokenizer
from training import make_model
from typer.testing import CliRunner

pytest.importorskip("transformers")

from kdkernels.cli.root import app
from kdkernels.cli.train.data import read_data
from kdkernels.cli.train.settings import TrainError, read_settings
from kdkernels.data.layouts import training_rows
from kdkernels.data.rows import DataError
from kdkernels.data.selection import draw, hold_out, read_shares
from kdkernels.data.tokenization import load_examples
from kdkernels.trainer import DistillationArguments, DistillationTrainer


def held_out_flags(rows: list[dict[str, Any]], fraction: float = 0.5) -> list[bool]:
    """Return for each row whether it is held out."""
    read = list(training_rows(rows))
    _, held_out = hold_out(read, fraction)
    return [any(row is held_out_row for held_out_row in held_out) for row in read]


ROWS = [{"prompt": f"question {i}", "response": str(i)} for i in range(40)]
EDGES = [{"prompt": "x", "response": "a", "key": 0}, {"prompt": "y", "response": "b", "key": 1}]
"""Two rows whose keys put one on each side."""


def test_row_stays_on_its_side_when_rows_are_added_or_reordered() -> None:
    sides = held_out_flags(ROWS)
    assert 10 < sum(sides) < 30
    added = [{"prompt": f"other {i}", "response": "a"} for i in range(7)]
    assert held_out_flags([*ROWS, *added])[:40] == sides
    assert held_out_flags([*added, *ROWS])[7:] == sides
    assert held_out_flags(ROWS[::-1])[::-1] == sides
    larger = held_out_flags(ROWS, 0.75)
    assert all(after for before, after in zip(sides, larger, strict=True) if before), "a larger fraction holds out the same rows and more"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.none() | st.integers(0, 3)), max_size=12))
def test_equal_prompts_are_on_one_side(drawn: list[tuple[int, int, int | None]]) -> None:
    rows = [{"prompt": f"q{prompt}", "response": str(answer), **({} if key is None else {"key": key})} for prompt, answer, key in drawn]
    every = [*ROWS, *rows]
    sides: dict[str, set[bool]] = {}
    for row, side in zip(every, held_out_flags(every), strict=True):
        sides.setdefault(row["prompt"], set()).add(side)
    assert all(len(side) == 1 for side in sides.values())


def test_side_depends_on_the_key_or_else_on_the_prompt_in_any_form() -> None:
    forms = [
        {"prompt": "q", "response": "a"}, {"prompt": "q", "completion": "b"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "c", "weight": 2}]},
        {"messages": [{"role": "user", "content": "q"}], "response": "d"}, {"instruction": "q", "input": "", "output": "e"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "f"}]},
    ]  # fmt: skip
    assert len(set(held_out_flags([*ROWS, *forms])[40:])) == 1
    keyed = [{"prompt": f"question {i}", "response": str(i), "key": i} for i in range(40)]
    renamed = [{**row, "prompt": f"another {row['prompt']}"} for row in keyed]
    assert held_out_flags(keyed) == held_out_flags(renamed) != held_out_flags(ROWS)
    assert held_out_flags([{"text": f"text {i}"} for i in range(40)]).count(True) not in (0, 40)


def test_side_without_rows_is_an_error() -> None:
    same = [{"prompt": "q", "response": str(i)} for i in range(5)]
    messages = []
    for fraction in (0.001, 0.999):
        with pytest.raises(DataError, match=r"eval_fraction=0.\d+ of 5 rows: .*--eval-data") as error:
            held_out_flags(same, fraction)
        messages.append(str(error.value))
    assert "nothing is held out" in messages[0]
    assert "nothing is left to train on" in messages[1]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 3)), min_size=1, max_size=4), st.integers(0, 9))
def test_number_of_draws_follows_the_shares(sources: list[tuple[int, float]], seed: int) -> None:
    counts, shares = [count for count, _ in sources], [share for _, share in sources]
    if not sum(shares):
        shares[0] = 1.0
    draws = draw(counts, shares, seed)
    assert draws == draw(counts, shares, seed)
    assert len(draws) == sum(counts)
    draws_of = Counter(source for source, _ in draws)
    for source, (count, share) in enumerate(zip(counts, shares, strict=True)):
        assert abs(draws_of[source] - len(draws) * share / sum(shares)) < 1
        rows = [row for drawn, row in draws if drawn == source]
        for start in range(0, len(rows), count):
            assert len(set(rows[start : start + count])) == len(rows[start : start + count]), "a row is drawn again only after all others"


def test_order_of_draws_depends_on_the_seed() -> None:
    assert draw([20, 20], [1, 3], 0) != draw([20, 20], [1, 3], 1)
    assert draw([20, 20], [1, 3], 0) == draw([20, 20], [0.25, 0.75], 0)
    assert sum(source for source, _ in draw([20, 20], [1, 3], 0)) == 30


def test_shares_are_parsed_from_data_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_shares(["a.jsonl=0.7", "org/name:train=2"]) == (["a.jsonl", "org/name:train"], [0.7, 2.0])
    assert read_shares(["a.jsonl", "b"]) == (["a.jsonl", "b"], None)
    monkeypatch.chdir(tmp_path)
    Path("a=0.7").touch()
    assert read_shares(["a=0.7"]) == (["a=0.7"], None), "an existing path has priority"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["a.jsonl=-1", "b.jsonl=1"], "--data a.jsonl=-1: the share must be a number >= 0, such as a.jsonl=0.7"),
        (["a.jsonl=much"], "--data a.jsonl=much: the share must be a number >= 0"),
        (["a.jsonl=inf"], "--data a.jsonl=inf: the share must be"),
        (["a.jsonl=1", "b.jsonl"], "--data b.jsonl has no share, and others have"),
        (["a.jsonl=0", "b.jsonl=0"], "the shares are all 0"),
    ],
)
def test_invalid_shares_raise(data: list[str], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        read_settings({}, {"student": "s", "teacher": ["t"], "data": data, "output_dir": "out"}, [])


@pytest.mark.parametrize("fraction", ["0", "1", "-0.1", "nan"])
def test_invalid_eval_fractions_raise(fraction: str) -> None:
    with pytest.raises(TrainError, match=r"--eval-fraction .*: it must be above 0 and below 1"):
        read_settings({}, {"student": "s", "teacher": ["t"], "data": ["d"], "output_dir": "out"}, ["--eval-fraction", fraction])


def test_held_out_rows_are_never_drawn_for_training(tmp_path: Path) -> None:
    files = [tiny.write(tmp_path / f"{name}.jsonl", [{**row, "response": name} for row in ROWS[start : start + 20]])
             for name, start in (("a", 0), ("b", 20))]  # fmt: skip
    words = tokenizer()

    def read(*more: str) -> Any:
        options = {"student": "s", "teacher": ["t"], "data": [f"{files[0]}=1", f"{files[1]}=3"], "output_dir": str(tmp_path / "out")}
        return read_data(read_settings({}, options, ["--use-cpu", "true", *more]), words, None, None, None)

    data, repeated, reseeded = read("--eval-fraction", "0.3"), read("--eval-fraction", "0.3"), read("--eval-fraction", "0.3", "--seed", "1")
    assert data == repeated
    assert data.held_out == reseeded.held_out
    assert data.train != reseeded.train
    assert data.held_out is not None
    assert len(data.train) + len(data.held_out) == 40
    prompts = [{tuple(e.student_ids[: e.student_scored[0] + 1]) for e in side} for side in (data.train, data.held_out)]
    assert not prompts[0] & prompts[1]
    assert sum(words.decode(list(e.student_ids)).endswith("b<|endoftext|>") for e in data.train) == pytest.approx(
        len(data.train) * 0.75, abs=1
    )
    assert read().held_out is None


def test_resume_refuses_another_eval_fraction_or_shares(tmp_path: Path) -> None:
    for name, hidden in (("student", 8), ("teacher", 8)):
        text = tiny.tokenizer()
        make_model(hidden, 1, len(text)).save_pretrained(tmp_path / name)
        text.save_pretrained(tmp_path / name)
    data, out = tiny.write(tmp_path / "rows.jsonl", tiny.rows(12)), tmp_path / "out"

    def train(*options: str) -> Any:
        arguments = ["train", "--teacher", str(tmp_path / "teacher"), "--student", str(tmp_path / "student"), "--output-dir", str(out)]
        return CliRunner().invoke(app, [*arguments, "--max-steps", "1", "--use-cpu", "true", *options], catch_exceptions=False)

    first = train("--data", f"{data}=1", "--eval-fraction", "0.4")
    assert first.exit_code == 0, first.output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["after"]["eval_tokens"] > 0
    for options, message in ((["--data", f"{data}=1", "--eval-fraction", "0.5"], "--eval-fraction (0.4 then, 0.5 now)"),
                        (["--data", str(data), "--eval-fraction", "0.4"], "--data-shares ([1.0] then, None now)")):  # fmt: skip
        assert message in " ".join(train(*options).output.split())
    refused = train("--data", str(data), "--eval-fraction", "0.4", "--eval-data", str(data))
    assert refused.exit_code == 2
    assert "--eval-fraction and --eval-data: held-out rows are those of one of them" in " ".join(refused.output.split())
    (tmp_path / "teacher" / "model.safetensors").unlink()  # data is checked before weights are loaded
    bad = tiny.write(tmp_path / "bad.jsonl", [{"prompt": "a"}])
    broken = CliRunner().invoke(app, ["train", "--teacher", str(tmp_path / "teacher"), "--student", str(tmp_path / "student"),
                                      "--data", str(bad), "--output-dir", str(tmp_path / "none")])  # fmt: skip
    assert broken.exit_code == 2
    assert "bad.jsonl, row 1, field 'response'" in " ".join(broken.output.split())


@pytest.mark.parametrize("length", [2, 3, 7, 100])
def test_blocks_of_a_long_text_score_each_token_once(length: int) -> None:
    words, row = tokenizer(), {"text": "abcdefghijklm", "weight": 2, "task": "t"}
    (example,) = load_examples([row], words)
    if length < len(example):
        with pytest.warns(UserWarning, match=rf"1 of 2 rows are over max_length={length}: split into \d+ blocks"):
            *blocks, short = load_examples([row, {"text": "a"}], words, max_length=length, overlong="split")
    else:
        *blocks, short = load_examples([row, {"text": "a"}], words, max_length=length, overlong="split")
    assert len(short) == 2
    assert all(len(block) <= length and (block.weight, block.task) == (2.0, "t") for block in blocks)
    scored = [block.student_ids[position + 1] for block in blocks for position in block.student_scored]
    assert scored == list(example.student_ids)[1:]


def test_only_rows_of_text_are_split() -> None:
    words = tokenizer()
    with pytest.raises(DataError, match=r"row 1: 7 tokens, more than max_length=4, and only rows of 'text' are split: raise it"):
        load_examples([{"prompt": "abc", "response": "def"}], words, max_length=4, overlong="split")
    with pytest.raises(DataError, match="a block needs 2 tokens"):
        load_examples([{"text": "abc"}], words, max_length=1, overlong="split")


def test_blocks_are_packed_like_rows(tmp_path: Path) -> None:
    words = tokenizer(tokens=("<|endoftext|>", "<pad>"))
    model = make_model(8, 1, len(words))
    args = DistillationArguments(
        output_dir=str(tmp_path), kd_weight=0, ce_weight=1, packing=True, max_length=8, overlong="split", use_cpu=True, report_to=[]
    )
    with pytest.warns(UserWarning, match="split into 3 blocks"):
        trainer = DistillationTrainer(model, None, args, train_dataset=[{"text": "a" * 18}, {"text": "b"}], processing_class=words)
    assert [[len(example) for example in item] for item in trainer.train_dataset] == [[8], [8], [5, 2]]
