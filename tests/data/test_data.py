"""Rows of every form and source become examples: student's and teacher's tokens, packing, and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import templated
import torch
from training import TEMPLATE, WORDS, make_rows, make_tokenizer

pytest.importorskip("transformers")
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdkernels.data.agreement import check_ids, check_templates, check_tokenizers
from kdkernels.data.collator import Collator, pack, pad_id
from kdkernels.data.example import Example
from kdkernels.data.rows import DataError
from kdkernels.data.tokenization import load_examples


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def texts(tokenizer: Any, example: Example) -> tuple[str, str, str]:
    """Return the student's prompt, the teacher's prompt and the response as text."""
    student_prompt, teacher_prompt = example.student_scored[0] + 1, example.teacher_scored[0] + 1
    assert list(example.student_scored) == list(range(student_prompt - 1, len(example.student_ids) - 1))
    assert list(example.student_ids[student_prompt:]) == list(example.teacher_ids[teacher_prompt:])
    parts = example.student_ids[:student_prompt], example.teacher_ids[:teacher_prompt], example.student_ids[student_prompt:]
    return tuple(tokenizer.decode(list(part)) for part in parts)  # type: ignore[return-value]


CHAT = [{"role": "system", "content": "red"}, {"role": "user", "content": "one plus one"}]
ANSWER = {"role": "assistant", "content": "two"}
PROMPT = "<|system|>red<|end|><|user|>one plus one<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "one plus", "response": " two"}, ("one plus", "one plus", " two<|end|>")),
        ({"prompt": "one plus", "completion": " two"}, ("one plus", "one plus", " two<|end|>")),
        ({"prompt": "a", "response": " b", "teacher_prompt": "the cat"}, ("a", "the cat", " b<|end|>")),
        (
            {"prompt": "a", "response": " b", "demonstrations": [{"prompt": "c", "response": " d"}, "e f"]},
            ("a", "c d\n\ne f\n\na", " b<|end|>"),
        ),
        ({"prompt": "a", "response": " b", "demonstrations": {"prompt": "c", "response": " d"}}, ("a", "c d\n\na", " b<|end|>")),
        ({"prompt": "a", "response": "b", "teacher_messages": CHAT}, ("a", PROMPT, "b<|end|>")),
        (
            {"prompt": "a", "response": "b", "teacher_messages": [CHAT[1], ANSWER], "demonstrations": [{"prompt": "c", "response": "d"}]},
            ("a", "<|user|>c<|end|><|assistant|>d<|end|>" + PROMPT[20:], "b<|end|>"),
        ),
        ({"messages": CHAT, "response": "two"}, (PROMPT, PROMPT, "two<|end|>")),
        ({"messages": [*CHAT, {"role": "assistant", "content": "two"}]}, (PROMPT, PROMPT, "two<|end|>")),
        ({"prompt": CHAT, "completion": [{"role": "assistant", "content": "two"}]}, (PROMPT, PROMPT, "two<|end|>")),
        ({"messages": CHAT[1:], "response": "two", "teacher_messages": CHAT}, (PROMPT[20:], PROMPT, "two<|end|>")),
        (
            {"messages": CHAT[1:], "response": "two", "teacher_prompt": "six"},
            (PROMPT[20:], "<|user|>six<|end|><|assistant|>", "two<|end|>"),
        ),
        (
            {"messages": CHAT[1:], "response": "two", "demonstrations": [{"prompt": "c", "response": "d"}]},
            (PROMPT[20:], "<|user|>c<|end|><|assistant|>d<|end|>" + PROMPT[20:], "two<|end|>"),
        ),
        ({"text": "one plus two"}, ("one", "one", " plus two<|end|>")),
        ({"text": "one<|end|>"}, ("one", "one", "<|end|>")),
    ],
)  # fmt: skip
def test_rows_of_every_form_are_tokenised(tokenizer: Any, row: dict[str, Any], expected: tuple[str, str, str]) -> None:
    (example,) = load_examples([{**row, "weight": 2, "task": "t", "key": "k", "rationale": "r"}], tokenizer)
    assert texts(tokenizer, example) == expected
    assert (example.weight, example.task) == (2.0, "t")


def test_sources_give_the_same_examples(tokenizer: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = make_rows(5)
    rows[0]["weight"] = 0.5  # a column that other rows lack
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows[:2]))
    (tmp_path / "a" / "2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[2:]))
    dataset = datasets.Dataset.from_list([{"weight": None, **row} for row in rows])
    dataset.to_parquet(tmp_path / "rows.parquet")
    expected = load_examples(rows, tokenizer)
    for source in (tmp_path / "a", str(tmp_path / "rows.parquet"), dataset, [tmp_path / "a" / "1.jsonl", str(tmp_path / "a" / "2.jsonl")]):
        assert load_examples(source, tokenizer) == expected


def test_text_demonstrations_beside_messages_raise(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="row 1, field 'demonstrations': beside chat messages"):
        load_examples([{"messages": CHAT, "response": "a", "demonstrations": ["b"]}], tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "row 2, field 'response': text is needed, and there is none. The row has: prompt"),
        ({"prompt": "a", "response": ""}, "row 2, field 'response': text is needed, and it is \"\""),
        ({"prompt": "a", "response": 3}, "row 2, field 'response': text is needed, and it is 3"),
        ({"prompt": "", "response": "b"}, "row 2, field 'prompt'"),
        ({"response": "b"}, "row 2, field 'prompt': a row needs"),
        ({"messages": CHAT}, "row 2, field 'response': there is none, and 'messages' ends with the turn of the user"),
        ({"messages": []}, "row 2, field 'messages': a list of"),
        ({"messages": [{"role": "user"}], "response": "b"}, "row 2, field 'messages': message 0 needs a role and a content"),
        ({"messages": [{"role": "assistant", "content": "b"}]}, "row 2, field 'messages': there is no turn before the response"),
        ({"prompt": "a", "response": "b", "weight": -1}, "row 2, field 'weight': a number >= 0 is needed, and it is -1"),
        ({"prompt": "a", "response": "b", "task": 3}, "row 2, field 'task'"),
        ({"prompt": "a", "response": "b", "demonstrations": 3}, "row 2, field 'demonstrations': text, or objects"),
        (
            {"prompt": CHAT, "completion": [ANSWER, ANSWER]},
            "row 2, field 'completion': one turn is needed",
        ),
        (
            {"messages": CHAT, "response": "b", "teacher_messages": [ANSWER], "demonstrations": []},
            "row 2, field 'teacher_messages': there is no turn before the response",
        ),
        ({"text": "a b", "teacher_prompt": "c"}, "row 2, field 'teacher_prompt': a row of 'text' is one text for both models"),
        (["a"], "row 2: an object is needed"),
    ],
)
def test_invalid_row_raises_with_its_number_and_field(tokenizer: Any, row: Any, message: str) -> None:
    rows = [{"prompt": "a", "response": "b"}, row]
    with pytest.raises(DataError) as error:
        load_examples(rows, tokenizer)
    assert message in str(error.value)


def test_unreadable_files_raise_with_their_name(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt"\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.parquet").write_text("no parquet")
    (tmp_path / "rows.xml").write_text("a,b")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("bad.jsonl", r"bad.jsonl, row 2: not JSON"), ("empty.jsonl", "holds no rows"), ("bad.parquet", "not Parquet"),
        ("rows.xml", "unknown file extension; expected one of .jsonl"), ("none.jsonl", "no such file"), ("folder", "the folder has no"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            load_examples(tmp_path / name, tokenizer)
    with pytest.raises(DataError, match=r"has no length: .*kdkernels train --streaming"):
        load_examples(iter([{}]), tokenizer)


def test_overlong_rows_raise_or_are_dropped_or_cut(tokenizer: Any) -> None:
    rows = [{"prompt": "one two", "response": " three four five"}, {"prompt": "one", "response": " two"}]
    with pytest.raises(DataError, match=r"row 1: 6 tokens, more than max_length=5.*overlong='drop'"):
        load_examples(rows, tokenizer, max_length=5)
    with pytest.warns(UserWarning, match=r"1 of 2 rows are over max_length=5 and left out; the longest has 6"):
        short_examples = load_examples(rows, tokenizer, max_length=5, overlong="drop")
    assert [texts(tokenizer, e)[0] for e in short_examples] == ["one"]
    with pytest.warns(UserWarning, match=r"1 of 2 rows are over max_length=4: cut 1, by 2 tokens of their responses$"):
        cut = load_examples(rows, tokenizer, max_length=4, overlong="truncate")
    assert texts(tokenizer, cut[0]) == ("one two", "one two", " three four")
    with pytest.warns(UserWarning, match=r"2 of 2 .*: cut 1, by 1 tokens of their responses, and left out 1 whose prompt alone fills it"):
        (remaining,) = load_examples(rows, tokenizer, max_length=2, overlong="truncate")
    assert texts(tokenizer, remaining) == ("one", "one", " two")
    with pytest.raises(DataError, match="no row is left: all 1 are over max_length=2"):
        load_examples(rows[:1], tokenizer, max_length=2, overlong="truncate")
    # The teacher's tokens count too.
    longer = [{**rows[1], "teacher_prompt": "one two three four"}]
    with pytest.raises(DataError, match="row 1: 6 tokens"):
        load_examples(longer, tokenizer, max_length=5)
    with pytest.warns(UserWarning, match="cut 1, by 1 tokens"):
        (shortened,) = load_examples(longer, tokenizer, max_length=5, overlong="truncate")
    assert texts(tokenizer, shortened) == ("one", "one two three four", " two")


def test_template_that_rewrites_the_response_is_refused() -> None:
    adds = TEMPLATE.replace("<|assistant|>{%", "<|assistant|>red {%")
    with pytest.raises(
        DataError,
        match=r"row 1, field 'messages': .*response after.*token \d+ is '.*red' \(id \d+\) in one and 'two'",
    ):
        load_examples([{"messages": CHAT, "response": "two"}], make_tokenizer(template=adds))
    # This template ends a response differently after a system turn, so the student's and the teacher's responses differ.
    varies = TEMPLATE.replace(
        "<|end|>{% endfor %}", "{{ ' one' if messages[0]['role'] == 'system' and m['role'] == 'assistant' else '' }}<|end|>{% endfor %}"
    )
    with pytest.raises(
        DataError, match=r"field 'teacher_messages': the chat template writes the response differently.*token 1 is '<\|end\|>'.*' one'"
    ):
        load_examples([{"messages": CHAT[1:], "response": "two", "teacher_messages": CHAT}], make_tokenizer(template=varies))
    with pytest.raises(DataError, match="no chat template"):
        load_examples([{"messages": CHAT, "response": "two"}], make_tokenizer(template=None))
    with pytest.raises(DataError, match=r"the chat template refuses it: .*odd"):
        load_examples([{"messages": CHAT, "response": "two"}], make_tokenizer(template="{{ raise_exception('odd') }}"))


def test_response_is_tokenised_after_its_prompt() -> None:
    """SentencePiece adds a space before a text. It must come before the prompt and not again before the response."""
    words = ["<|end|>", "<|unk|>", "▁", "\n", "<|user|>", "<|assistant|>", "▁one", "one", "▁two", "two", "▁is", "is"]
    for scheme in ("first", "always"):
        backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(words)}, unk_token="<|unk|>"))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True), pre_tokenizers.Split("\n", "isolated")]
        )
        backend.add_special_tokens(["<|end|>"])
        backend.add_tokens(["<|user|>", "<|assistant|>"])
        pieces = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", unk_token="<|unk|>")
        pieces.chat_template = TEMPLATE.replace("|>{{ m['content']", "|>\n{{ m['content']").replace("<|assistant|>{%", "<|assistant|>\n{%")
        row = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}
        chat, plain = load_examples([row, {"prompt": "one is", "response": " two"}], pieces)
        text = pieces.apply_chat_template(row["messages"], tokenize=False)
        assert list(chat.student_ids) == pieces(text, add_special_tokens=False)["input_ids"]
        assert pieces.convert_ids_to_tokens(list(chat.student_ids[-2:])) == ["two", "<|end|>"]
        assert len(chat.student_scored) == 2
        assert pieces.convert_ids_to_tokens(list(plain.student_ids)) == ["▁one", "▁is", "▁two", "<|end|>"]
        assert list(plain.student_scored) == [1, 2]


def test_cut_off_response_is_learnt_without_an_end(tokenizer: Any) -> None:
    rows = [{"prompt": "a", "response": " b"}, {"messages": CHAT, "response": "two"}, {"messages": [*CHAT, ANSWER]}]
    complete_examples = load_examples([{**row, "finish_reason": "stop"} for row in rows], tokenizer)
    cut = load_examples([{**row, "finish_reason": "length"} for row in rows], tokenizer)
    for complete, truncated in zip(complete_examples, cut, strict=True):
        assert texts(tokenizer, complete)[2] == texts(tokenizer, truncated)[2] + "<|end|>"
    # The same with a template that ends a turn with another token.
    turns = make_tokenizer(template=TEMPLATE.replace("<|end|>{% endfor", " <|bos|>{% endfor"))
    assert texts(turns, load_examples([{**rows[1], "finish_reason": "length"}], turns)[0])[2] == "two"


def test_tools_are_passed_to_the_template() -> None:
    template = "{% for t in tools or [] %}<|system|>{{ t['name'] }}<|end|>{% endfor %}" + TEMPLATE.replace(
        "{{ m['content'] }}", "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}{{ c['name'] }}{% endfor %}"
    )
    tools, tokenizer = [{"name": "red"}], make_tokenizer(template=template)
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "red"}]}
    example = load_examples([{"messages": [CHAT[1], called], "tools": tools, "teacher_messages": CHAT}], tokenizer)[0]
    chat_text = "<|user|>one plus one<|end|><|assistant|>"
    assert texts(tokenizer, example) == (
        "<|system|>red<|end|>" + chat_text,
        "<|system|>red<|end|><|system|>red<|end|>" + chat_text,
        "red<|end|>",
    )
    with pytest.raises(DataError, match="field 'tools': a list of tools"):
        load_examples([{"messages": CHAT, "response": "two", "tools": "red"}], tokenizer)


def test_tokenizers_must_agree(tokenizer: Any) -> None:
    check_tokenizers(tokenizer, make_tokenizer())
    with pytest.raises(DataError, match=r"differ: 4 of \d+ ids stand for different tokens.*across tokenizers is not supported"):
        check_tokenizers(tokenizer, make_tokenizer(words=["green", "red", *WORDS[2:]]))  # two words, each with and without a space
    other_splits = make_tokenizer()
    other_splits.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(DataError, match="the ids are the same, but texts are split differently"):
        check_tokenizers(tokenizer, other_splits)
    extended = make_tokenizer()
    extended.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    check_tokenizers(tokenizer, extended)


def test_templates_must_agree(tokenizer: Any) -> None:
    rows = [{"prompt": "a", "response": "b"}, {"messages": CHAT, "response": "two"}]
    check_templates(tokenizer, make_tokenizer(), rows)
    teacher_tokenizer = make_tokenizer(template="{{ 'one ' }}" + TEMPLATE)
    with pytest.raises(
        DataError,
        match=r"row 2, field 'messages': .*templates of student and teacher differ: token 0 is '<\|system\|>' \(id 5\) in one and 'one'",
    ):
        check_templates(tokenizer, teacher_tokenizer, rows)
    check_templates(tokenizer, teacher_tokenizer, rows[:1])  # without a conversation no template is used
    check_templates(tokenizer, make_tokenizer(template=None), rows)


def test_packing_keeps_each_example_once_within_the_length(tokenizer: Any) -> None:
    examples = load_examples(make_rows(50), tokenizer)
    rows = pack(examples, 40)
    assert sorted(id(e) for row in rows for e in row) == sorted(map(id, examples))
    sizes = [sum(len(e.student_ids) for e in row) for row in rows]
    assert max(sizes) <= 40
    assert sum(sizes) / len(sizes) > 32


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_collated_batches_score_the_same_tokens_for_student_and_teacher(tokenizer: Any, packed: bool, flat: bool) -> None:
    rows = make_rows(7)
    rows[2]["teacher_prompt"] = "the cat sees"
    examples = load_examples(rows, tokenizer)
    items = pack(examples, 30) if packed else [(e,) for e in examples]
    batch = Collator(pad_id=1, packed=packed, flat=packed and flat, salt="s", keep=True)(items)
    ids, teacher_ids = batch["input_ids"].flatten(), batch["teacher_input_ids"].flatten()
    targets = ids[batch["scored"] + 1]
    assert torch.equal(targets, teacher_ids[batch["teacher_scored"] + 1])
    assert torch.equal(targets, torch.tensor([t for item in items for e in item for t in e.student_ids[e.student_scored[0] + 1 :]]))
    labels = batch["labels"].flatten()
    assert torch.equal(labels.ne(-100).nonzero().squeeze(1), batch["scored"] + 1)
    assert torch.equal(labels[labels.ne(-100)], targets)
    assert batch["labels"][:, 0].eq(-100).all()  # so that shifting the labels loses none
    assert batch["keys"] == tuple(e.key("s") for item in items for e in item)
    assert sum(batch["counts"]) == len(targets)
    assert batch["sizes"] == tuple(map(len, items))
    if not packed:
        assert torch.equal(batch["attention_mask"].sum(1), torch.tensor([len(e.student_ids) for e in examples]))
    else:
        starts = batch["position_ids"].flatten().eq(0).sum()
        padded = 0 if flat else sum(sum(len(e.student_ids) for e in item) < batch["input_ids"].shape[1] for item in items)
        assert starts == len(examples) + padded
        assert batch["input_ids"].shape[0] == (1 if flat else len(items))


def test_prompts_are_scored_on_request(tokenizer: Any) -> None:
    (example,) = load_examples([{"prompt": "one two", "response": " three"}], tokenizer)
    batch = Collator(kd_on_prompt=True)([(example,)])
    assert batch["scored"].tolist() == [0, 1, 2]
    assert batch["response"].tolist() == [False, True, True]
    (other_prompt,) = load_examples([{"prompt": "one two", "response": " three", "teacher_prompt": "one"}], tokenizer)
    with pytest.raises(ValueError, match="kd_on_prompt=True scores prompts, but a row gives the teacher another prompt"):
        Collator(kd_on_prompt=True)([(other_prompt,)])


def special_tokens(*tokens: str) -> Any:
    return templated.tokenizer(tokens=["<|endoftext|>", "<pad>", "<bos>", *tokens])


def test_special_and_added_tokens_must_agree() -> None:
    with pytest.raises(
        DataError, match=r"differ: 2 of \d+ ids stand for different tokens, the first of them 3 \('<\|human\|>' and '<\|user"
    ):
        check_tokenizers(special_tokens("<|user|>", "<|bot|>"), special_tokens("<|human|>", "<|ai|>"))
    with pytest.raises(DataError, match="2 of"):
        check_tokenizers(special_tokens("<|user|>", "<|bot|>"), special_tokens("<|bot|>", "<|user|>"))
    student, teacher = special_tokens(), special_tokens()
    student.add_tokens(["<tool>", "<call>"])
    teacher.add_tokens(["<tool>", "<answer>", "<more>"])
    with pytest.raises(DataError, match="1 of"):
        check_tokenizers(student, teacher)
    check_tokenizers(special_tokens(), teacher)  # ids that only one of them has are allowed
    moved = special_tokens()
    moved.add_tokens(["<more>", "<tool>"])
    with pytest.raises(DataError, match="ids stand for different tokens"):
        check_tokenizers(student, moved)


def test_added_tokens_with_other_stripping_are_refused() -> None:
    student, teacher = special_tokens(), special_tokens()
    student.add_tokens([AddedToken("<tool>", lstrip=False, normalized=False)])
    teacher.add_tokens([AddedToken("<tool>", lstrip=True, normalized=False)])
    with pytest.raises(DataError, match="the ids are the same, but texts are split differently"):
        check_tokenizers(student, teacher)


def test_pad_token_beyond_the_embeddings_is_replaced() -> None:
    words = special_tokens()
    size = len(words)
    assert pad_id(words, size) == 1
    words.add_special_tokens({"pad_token": "[PAD]"})
    assert (pad_id(words, size), pad_id(words, size + 1), pad_id(words)) == (0, size, size)
    words.pad_token = words.eos_token
    assert pad_id(words, size) == words.eos_token_id


def test_token_beyond_the_embeddings_raises_with_its_row() -> None:
    words = special_tokens()
    size = len(words)
    words.add_tokens(["<new>"])
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": "b", "teacher_prompt": "<new>"}]
    examples = load_examples(rows, words)
    check_ids(examples, words, size + 1)
    check_ids(examples, words, None)
    with pytest.raises(DataError, match=rf"row 2: token '<new>' \(id {size}\) is beyond the {size} embeddings of a model"):
        check_ids(examples, words, size)
