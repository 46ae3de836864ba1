"""Recipes: rows, resuming, sequence-level distillation, in-context learning, near-duplicates, and the commands."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from scripted import Killed, Scripted, last
from typer.testing import CliRunner

from kdkernels import cli
from kdkernels.data.rows import DataError
from kdkernels.support.files import write_jsonl

pytest.importorskip("rapidfuzz")  # near-duplicates; part of the extra [train]

from kdkernels.cli.recipes.shared import Teacher
from kdkernels.recipes import in_context, near
from kdkernels.recipes.rows import Item, RecipeError, Sampling, ask, once, read_items, read_jsonl, student_row
from kdkernels.recipes.sequence import sequence_level
from kdkernels.teachers.text import Reply, Request

runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def items_of(count: int, **fields: Any) -> list[Item]:
    return [Item(f"k{n}", ({"role": "user", "content": f"question {n}"},), f"answer {n}", {**fields}, f"line {n}") for n in range(count)]


# Rows


def test_rows_are_read_as_prompts_or_messages(tmp_path: Path) -> None:
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}
    path = jsonl(
        tmp_path / "d.jsonl",
        {"prompt": "1 + 1?", "response": 2},
        "",
        {"messages": [system, user, {"role": "assistant", "content": "4"}], "key": "mine"},
        {"messages": [user], "response": "four"},
    )
    first, second, third = read_items(path)
    assert (first.prompt, first.response, first.where) == ("1 + 1?", "2", f"{path}, row 1")
    assert (second.messages, second.response, second.key) == ((system, user), "4", "mine")
    assert third.response == "four"
    # Keys depend on the row and not on its position, so a moved row keeps its replies and draws.
    jsonl(path, {"prompt": "new", "response": "row"}, *([{"prompt": "1 + 1?", "response": 2}] * 2))
    assert [i.key for i in read_items(path)][1:] == [first.key, f"{first.key}#2"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no rows"),
        (["{"], "d.jsonl, row 1: not JSON"),
        (["[1]"], "d.jsonl, row 1: an object is needed"),
        (
            [{"question": "x", "response": "y"}],
            "d.jsonl, row 1, field 'prompt': text is needed, and there is none. The row has: question, response",
        ),
        ([{"prompt": "x"}], "d.jsonl, row 1, field 'response': text is needed"),
        ([{"prompt": "x", "response": True}], "field 'response': text is needed, and it is true"),
        ([{"prompt": " ", "response": "y"}], "field 'prompt': text is needed"),
        (
            [{"prompt": "x", "response": "y", "key": 1}, {"prompt": "z", "response": "y", "key": "1"}],
            "row 2: key '1' is that of ",
        ),
        ([{"messages": "hello"}], "field 'messages': a list of {\"role\""),
        (
            [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}], "response": "y"}],
            "row 1, field 'response': messages end with the assistant's turn too: leave one of the two answers out",
        ),
        ([{"messages": [{"role": "assistant", "content": "x"}]}], "the last turn, but for the assistant's, must be the user's"),
    ],
)
def test_invalid_rows_raise_with_their_place(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises((RecipeError, DataError)) as error:
        read_items(jsonl(tmp_path / "d.jsonl", *rows))
    assert message in str(error.value)


def test_invalid_utf8_and_missing_files_raise(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match="row 1: not JSON in UTF-8"):
        read_jsonl(tmp_path / "d.jsonl")
    with pytest.raises(DataError, match="no such file"):
        read_jsonl(tmp_path / "none.jsonl")


def test_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    def rows() -> Any:
        yield {"a": 1}
        raise Killed

    write_jsonl(tmp_path / "out.jsonl", [{"old": "\u2028é"}])
    with pytest.raises(Killed):
        write_jsonl(tmp_path / "out.jsonl", rows())
    assert read_jsonl(tmp_path / "out.jsonl") == [(f"{tmp_path / 'out.jsonl'}, row 1", {"old": "\u2028é"})]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"], "no temporary file remains"


def test_plain_rows_need_one_turn() -> None:
    item = items_of(1)[0]
    assert student_row(item, "r", chat=False) == {"key": "k0", "prompt": "question 0", "response": "r"}
    assert student_row(item, "r", prompt="other")["messages"] == [{"role": "user", "content": "other"}]
    conversation = Item("k", ({"role": "system", "content": "s"}, *item.messages), "r", {}, "d.jsonl, line 7")
    with pytest.raises(RecipeError, match="line 7: a conversation of 2 turns is not a plain prompt"):
        student_row(conversation, "r", chat=False)


# Requests and logs


def test_killed_run_continues(tmp_path: Path) -> None:
    def answer(request: Request) -> str:
        return f"{last(request)} is {request.key.split('/')[1]}"

    items, sampling = items_of(5), Sampling(temperature=0.5, samples=3)
    uninterrupted = Scripted(answer)
    expected, _ = sequence_level(items, uninterrupted, tmp_path / "whole.jsonl", sampling)
    dying = Scripted(answer, die_after=7)
    with pytest.raises(Killed):
        sequence_level(items, dying, tmp_path / "log.jsonl", sampling)
    resumed = Scripted(answer)
    rows, tally = sequence_level(items, resumed, tmp_path / "log.jsonl", sampling)
    assert rows == expected
    assert (len(dying.requests), len(resumed.requests), tally.candidates) == (7, 8, 15)
    assert sorted(r.key for r in dying.requests + resumed.requests) == sorted(r.key for r in uninterrupted.requests)
    assert (tmp_path / "log.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_log_is_used_only_for_equal_requests(tmp_path: Path) -> None:
    prompts = [("k", [{"role": "user", "content": "x"}])]
    model = Scripted(lambda request: str(request.temperature))
    for temperature in (0.0, 0.5, 0.0):
        assert ask(model, tmp_path / "log.jsonl", prompts, Sampling(temperature=temperature))[0][0].text == str(temperature)
    assert ask(model, tmp_path / "log.jsonl", [("k", [{"role": "user", "content": "y"}])], Sampling())[0][0].text == "0.0"
    assert len(model.requests) == 3


def test_invalid_sampling_options_raise() -> None:
    with pytest.raises(RecipeError, match="samples 2 at temperature 0"):
        Sampling(samples=2)
    with pytest.raises(RecipeError, match="at least 1"):
        Sampling(max_tokens=0)
    with pytest.raises(RecipeError, match="temperature nan"):
        Sampling(temperature=float("nan"))


def test_truncated_line_of_a_log_is_repeated(tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def make(keys: list[str]) -> list[str]:
        calls.append(keys)
        return [f"text of {key}" for key in keys]

    log, keys = tmp_path / "log.jsonl", ["a", "b", "c"]
    assert once(log, keys, make, batch=2) == ["text of a", "text of b", "text of c"]
    assert calls == [["a", "b"], ["c"]]
    whole = log.read_bytes()
    log.write_bytes(whole[:-5])
    assert once(log, keys, make, batch=2) == ["text of a", "text of b", "text of c"]
    assert calls[2:] == [["c"]]
    assert log.read_bytes() == whole


# Sequence level


def test_sequence_level_drops_empty_cut_and_repeated_texts(tmp_path: Path) -> None:
    texts = {"0": ["good", " good ", "other"], "1": ["", "  ", "\n"], "2": ["cut", "cut", "cut"]}

    def answer(request: Request) -> Reply:
        row = last(request).split()[1]
        return Reply(request.key, texts[row][int(request.key.split("/")[1])], "length" if row == "2" else "stop")

    rows, tally = sequence_level(items_of(3), Scripted(answer), tmp_path / "log", Sampling(temperature=1.0, samples=3))
    assert [(r["key"], r["response"]) for r in rows] == [("k0", "good"), ("k0/1", "other")]
    assert tally.dropped == Counter({"empty": 3, "cut off at max_tokens": 3, "the same text again": 1})
    assert (tally.rows, tally.candidates, tally.kept) == (3, 9, 2)


def test_sequence_interpolation_takes_the_closest(tmp_path: Path) -> None:
    item = Item("k", ({"role": "user", "content": "x"},), "the cat sat on the mat")
    texts = ["a dog ran", "the cat sat on a mat", "the cat sat"]
    model = Scripted(lambda request: texts[int(request.key.split("/")[1])])
    rows, tally = sequence_level([item], model, tmp_path / "log", Sampling(temperature=1.0, samples=3), closest=True)
    assert [r["response"] for r in rows] == [texts[1]]
    assert tally.dropped == {"not the closest to the reference": 2}
    with pytest.raises(RecipeError, match="closest"):
        sequence_level([Item("k", item.messages)], model, tmp_path / "log", closest=True)


# In-context learning


def test_demonstrations_follow_the_seed_and_exclude_the_row_itself() -> None:
    items = items_of(12)
    drawn = in_context.demonstrations(items, 4, seed=3)
    assert drawn == in_context.demonstrations(items, 4, seed=3)
    assert drawn != in_context.demonstrations(items, 4, seed=4)
    for item, demos in zip(items, drawn, strict=True):
        assert len({d.key for d in demos}) == 4
        assert item not in demos
    # A demonstration with the same question would reveal the answer.
    twin = Item("twin", items[0].messages, "answer 0")
    for seed in range(20):
        for item, demos in zip([*items[:3], twin], in_context.demonstrations([*items[:3], twin], 2, seed), strict=True):
            assert item.prompt not in [d.prompt for d in demos]


def test_demonstrations_are_drawn_uniformly() -> None:
    items = items_of(5)
    counts = Counter(d.key for seed in range(400) for d in in_context.demonstrations(items, 2, seed)[0])
    # 400 draws of 2 out of 4: each is drawn 200 times, standard deviation 10.
    assert set(counts) == {"k1", "k2", "k3", "k4"}
    assert all(abs(count - 200) < 50 for count in counts.values())


def test_demonstrations_stay_within_the_task_and_come_from_the_pool() -> None:
    a, b = items_of(3, task="a"), [Item(f"b{n}", ({"role": "user", "content": f"b {n}"},), "r", {"task": "b"}) for n in range(3)]
    for item, demos in zip(a + b, in_context.demonstrations(a + b, 2, seed=0), strict=True):
        assert {d.task for d in demos} == {item.task}
    pool = [Item(f"p{n}", ({"role": "user", "content": f"p {n}"},), "r") for n in range(2)]
    assert {d.key for demos in in_context.demonstrations(items_of(3), 2, 0, pool) for d in demos} == {"p0", "p1"}
    with pytest.raises(RecipeError, match=r"line 0: task 'a' has 2 rows with another question, and 3 demonstrations"):
        in_context.demonstrations(a + b, 3, seed=0)
    with pytest.raises(RecipeError, match="line 0: there are 2 rows with another question"):
        in_context.demonstrations(items_of(3), 3, seed=0)
    with pytest.raises(RecipeError, match="a demonstration needs a response"):
        in_context.demonstrations(items_of(1), 1, 0, [Item("p", ({"role": "user", "content": "p"},))])


def test_context_distillation_gives_demonstrations_only_to_the_teacher() -> None:
    items = items_of(4)
    demonstrations = in_context.demonstrations(items, 2, seed=0)
    for item, demos, row in zip(items, demonstrations, in_context.context_distillation(items, demonstrations), strict=True):
        question = {"role": "user", "content": item.prompt}
        assert row["messages"] == [question]
        assert row["response"] == item.response
        turns = [turn for d in demos for turn in ({"role": "user", "content": d.prompt}, {"role": "assistant", "content": d.response})]
        assert row["teacher_messages"] == [*turns, question]


def test_in_context_tuning_gives_demonstrations_to_both() -> None:
    items = items_of(4)
    demonstrations = in_context.demonstrations(items, 2, seed=0)
    tuned = in_context.in_context_tuning(items, demonstrations)
    distilled = in_context.context_distillation(items, demonstrations)
    assert [row["messages"] for row in tuned] == [row["teacher_messages"] for row in distilled]
    assert all("teacher_messages" not in row for row in tuned)
    lm = in_context.language_modelling(items, 0.25)
    assert lm[1] == {"key": "k1/lm", "text": "question 1\nanswer 1", "weight": 0.25}


def test_in_context_rows_can_use_the_teachers_answers(tmp_path: Path) -> None:
    items = [Item(i.key, i.messages, None, i.row, i.where) for i in items_of(3)]
    pool = items_of(3)
    demonstrations = in_context.demonstrations(items, 2, 0, pool)
    model = Scripted(lambda request: "" if last(request) == "question 1" else f"{len(request.messages)} turns")
    answered, answered_demonstrations, tally = in_context.answered(items, demonstrations, model, tmp_path / "log", Sampling())
    assert [(i.key, i.response) for i in answered] == [("k0", "5 turns"), ("k2", "5 turns")]
    assert answered_demonstrations == [demonstrations[0], demonstrations[2]]
    assert (tally.kept, tally.dropped) == (2, {"empty": 1})


# Near-duplicates

WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=12)


def lcs(a: list[str], b: list[str]) -> int:
    """Return the length of the longest common subsequence, from a table over all prefixes."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(WORDS, WORDS)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(a: list[str], b: list[str]) -> None:
    n = lcs(a, b)
    precision, recall = n / len(a), n / len(b)
    f1 = 2 * precision * recall / (precision + recall) if n else 0.0
    score = near.rouge_l(" ".join(a), ", ".join(b).upper())
    assert score == pytest.approx(f1, abs=1e-12)
    assert near.rouge_l(" ".join(b), " ".join(a)) == score


@given(st.lists(WORDS, max_size=12))
def test_pool_holds_no_near_duplicates(texts: list[list[str]]) -> None:
    pool, texts_of_pool = near.Pool(), []
    for text in map(" ".join, texts):
        nearest = pool.nearest(text)
        added = pool.add(text)
        assert added == (nearest <= 0.7)
        texts_of_pool += [text] * added
    assert all(near.rouge_l(a, b) <= 0.7 for n, a in enumerate(texts_of_pool) for b in texts_of_pool[:n])
    assert not any(pool.add(text) for text in texts_of_pool)


def test_text_at_the_threshold_is_not_a_duplicate() -> None:
    seven_of_ten = "a b c d e f g x y z"
    pool = near.Pool(["a b c d e f g h i j"])
    assert near.rouge_l(seven_of_ten, "a b c d e f g h i j") == 0.7
    assert pool.add(seven_of_ten)
    assert not pool.add("a b c d e f g h y z")
    # A text without words is a duplicate only of itself.
    assert pool.add("!!!")
    assert pool.add("???")
    assert not pool.add("!!!")


# Commands


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "q.jsonl", *({"prompt": f"question {n}", "response": f"answer {n}"} for n in range(6)))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    model = Scripted(lambda request: f"reply to {last(request)}")
    monkeypatch.setattr(Teacher, "_load", lambda *_: model)
    return model


def test_sequence_command_writes_rows(questions: Path, tmp_path: Path, scripted: Scripted) -> None:
    result = runner.invoke(cli.app, ["recipe", "sequence", "--data", str(questions), "--out", str(tmp_path / "out"), "--teacher", "t"])
    assert result.exit_code == 0, result.output
    rows = [row for _, row in read_jsonl(tmp_path / "out" / "rows.jsonl")]
    assert [row["response"] for row in rows] == [f"reply to question {n}" for n in range(6)]
    assert "rows read" in result.output
    assert "6 rows in" in result.output


def test_in_context_command_writes_rows(questions: Path, tmp_path: Path, scripted: Scripted) -> None:
    arguments = ["recipe", "in-context", "--data", str(questions), "-k", "2"]
    result = runner.invoke(cli.app, [*arguments, "--out", str(tmp_path / "gold"), "--lm-weight", "0.5"])
    assert result.exit_code == 0, result.output
    rows = [row for _, row in read_jsonl(tmp_path / "gold" / "rows.jsonl")]
    assert [len(row.get("teacher_messages", ())) for row in rows] == [5] * 6 + [0] * 6
    assert not scripted.requests
    result = runner.invoke(cli.app, [*arguments, "--out", str(tmp_path / "own"), "--teacher", "t", "--student-view", "with"])
    assert result.exit_code == 0, result.output
    rows = [row for _, row in read_jsonl(tmp_path / "own" / "rows.jsonl")]
    assert {len(row["messages"]) for row in rows} == {5}
    assert rows[0]["response"] == "reply to question 0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sequence"], "give one of --teacher (a folder) and --base-url (a server)"),
        (["sequence", "--teacher", "t", "--base-url", "u"], "not both"),
        (["sequence", "--base-url", "http://localhost:1/v1"], "--model is missing"),
        (["sequence", "--teacher", "t", "--samples", "3"], "samples 3 at temperature 0"),
        (["in-context", "-k", "9"], "there are 5 rows with another question, and 9 demonstrations were asked for"),
        (["in-context", "-k", "0"], "-k 0"),
        (["in-context", "--lm-weight", "-1"], "--lm-weight -1.0"),
        (["chain-of-thought", "--teacher", "t"], "row 1: the answer 'answer 0' holds no choice"),
        (["scott", "--teacher", "none"], "row 1: the answer 'answer 0' holds no choice"),
        (["disco", "--labels", "good", "--teacher", "t"], "two different labels"),
        (["disco", "--labels", "good,bad", "--teacher", "t"], "field 'label': text is needed"),
        (["chain-of-thought", "--style", "mt-cot", "--rationale-weight", "1", "--teacher", "t"], "it is a share"),
        (["chain-of-thought", "--rationale-weight", "1", "--teacher", "t"], "fine-tune has one task"),
    ],
)
def test_invalid_options_of_recipes_are_one_line(
    questions: Path, tmp_path: Path, arguments: list[str], message: str, request: pytest.FixtureRequest
) -> None:
    if "--teacher" in arguments and "--base-url" not in arguments:
        request.getfixturevalue("scripted")
    if arguments[0] in ("chain-of-thought", "scott"):
        arguments = [*arguments, "--kind", "choice"]
    result = runner.invoke(cli.app, ["recipe", *arguments, "--data", str(questions), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert result.output.startswith("Error: ")
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_teacher_in_a_folder_generates_each_reply_once(questions: Path, tmp_path: Path) -> None:
    """A random model does not stop within two tokens, so every reply is cut off. Each is generated once."""
    folder = tiny.save(tmp_path / "teacher")
    arguments = ["recipe", "sequence", "--data", str(questions), "--out", str(tmp_path / "out"), "--max-tokens", "2"]
    result = runner.invoke(cli.app, [*arguments, "--teacher", str(folder)])
    assert result.exit_code == 2
    assert "nothing was kept of 6 candidates (cut off at max_tokens: 6)" in result.output
    log = (tmp_path / "out" / "replies.jsonl").read_bytes()
    assert log.count(b"\n") == 6
    assert runner.invoke(cli.app, [*arguments, "--teacher", str(folder)]).exit_code == 2
    assert (tmp_path / "out" / "replies.jsonl").read_bytes() == log
    result = runner.invoke(cli.app, [*arguments, "--teacher", str(folder), "--seed", "1"])
    assert "to another request" in result.output  # replies with other settings are not used
    result = runner.invoke(cli.app, [*arguments, "--teacher", str(tmp_path)])
    assert "not a folder of a transformers model" in result.output


def test_nothing_kept_is_an_error(questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Teacher, "_load", lambda *_: Scripted(lambda _: ""))
    result = runner.invoke(cli.app, ["recipe", "sequence", "--data", str(questions), "--out", str(tmp_path / "out"), "--teacher", "t"])
    assert result.exit_code == 2
    assert "nothing was kept of 6 candidates (empty: 6)" in result.output
