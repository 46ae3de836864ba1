"""Prompt and response tokens of a row: begin and end tokens, tool calls, reasoning, empty turns, and errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from templated import (
    ARGUMENTS_AS_TEXT,
    CHATML,
    ENDS_TWICE,
    GEMMA,
    LLAMA,
    MISTRAL,
    NO_END,
    OPENS_THOUGHTS,
    PARTS_ONLY,
    THINKING,
    tokenizer,
)

pytest.importorskip("transformers")

from kdkernels.data.rows import DataError
from kdkernels.data.tokenization import Tally, load_examples

ASK = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "4"}


def parts(words: Any, row: dict[str, Any], **options: Any) -> tuple[str, str, str]:
    """Return the student's prompt, the response and the teacher's prompt as text."""
    (example,) = load_examples([row], words, **options)
    start, teacher_start = example.student_scored[0] + 1, example.teacher_scored[0] + 1
    ids = list(example.student_ids)
    return words.decode(ids[:start]), words.decode(ids[start:]), words.decode(list(example.teacher_ids)[:teacher_start])


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", **more, "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": arguments}}]}


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("last", ["<|endoftext|>", "<|im_end|>", "<pad>", " ", "x"])
def test_prompt_keeps_every_token(pieces: bool, ends: bool, last: str) -> None:
    words = tokenizer(pieces=pieces, begins=True, ends=ends)
    prompt, response, teacher = parts(words, {"prompt": f"hi{last}", "response": "yes", "teacher_prompt": f"say{last}"})
    assert prompt.replace("> ", ">") == f"<bos>hi{last}"
    assert response == "yes<|endoftext|>"
    assert teacher.replace("> ", ">") == f"<bos>say{last}"


def test_local_prompt_has_no_added_end_token() -> None:
    from kdkernels.teachers.local import prompt_ids

    words = tokenizer(None, begins=True, ends=True)
    assert words.decode(prompt_ids(words, [{"role": "user", "content": "hi<|endoftext|>"}])) == "<bos>hi<|endoftext|>"


@pytest.mark.parametrize("pieces", [False, True])
def test_begin_token_in_the_text_is_not_doubled(pieces: bool) -> None:
    words = tokenizer(pieces=pieces, begins=True)
    rows = [
        {"prompt": "<bos>hi", "response": "yes"},
        {"prompt": "hi", "response": "yes"},
        {"text": "<bos>hi"},
        {"prompt": "hi", "response": "yes", "teacher_prompt": "<bos>hi"},
        {"prompt": "<bos>hi", "response": "yes", "demonstrations": [{"prompt": "<bos>a", "response": "b"}, "<bos>c"]},
    ]
    for example in load_examples(rows, words):
        for ids in (example.student_ids, example.teacher_ids):
            assert list(ids).count(words.bos_token_id) == 1
            assert ids[0] == words.bos_token_id


def test_begin_token_equal_to_the_end_token_is_not_doubled() -> None:
    from tokenizers import processors

    words = tokenizer(None)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=["<|endoftext|>", "$A"], special_tokens=[("<|endoftext|>", words.eos_token_id)]
    )
    assert parts(words, {"prompt": "<|endoftext|>hi", "response": "x"})[:2] == ("<|endoftext|>hi", "x<|endoftext|>")
    assert parts(words, {"prompt": "hi<|endoftext|>", "response": "x"})[:2] == ("<|endoftext|>hi<|endoftext|>", "x<|endoftext|>")


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (LLAMA, "<|eot_id|>"), (GEMMA, "<end_of_turn>"), (MISTRAL, "<|endoftext|>"), (PARTS_ONLY, "<|im_end|>"),
     (ENDS_TWICE, "<|im_end|>"), (NO_END, "\n<|endoftext|>")],
)  # fmt: skip
def test_turn_is_learnt_up_to_the_end_token_of_the_template(template: str, end: str, pieces: bool) -> None:
    from kdkernels.teachers.local import ends

    words = tokenizer(template, pieces=pieces)
    for row in ({"messages": [ASK, FOUR]}, {"messages": [ASK], "response": "4"}, {"prompt": [ASK], "completion": [FOUR]}):
        _, response, teacher = parts(words, row)
        assert response.strip(" ") == f"4{end}"
        assert "2+2?" in teacher
    assert words.convert_tokens_to_ids(end.strip()) in ends(None, words)
    (cut,) = load_examples([{"messages": [ASK], "response": "4", "finish_reason": "length"}], words)
    assert words.decode(list(cut.student_ids)[-1:]) == "4"


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "<|endoftext|>"])
def test_end_token_in_the_response_is_not_doubled(end: str) -> None:
    words = tokenizer()
    for row in ({"messages": [ASK], "response": f"4{end}"}, {"messages": [ASK, {**FOUR, "content": f"4{end}"}]}):
        assert parts(words, row)[1] == "4<|im_end|>"
    with pytest.raises(DataError, match="field 'response': the assistant's turn is empty"):
        load_examples([{"messages": [ASK], "response": end}], words)
    assert parts(words, {"messages": [{**ASK, "content": f"2{end}"}], "response": "4"})[0].startswith(f"<|im_start|>user\n2{end}")


def test_tool_calls_are_learnt_up_to_their_end_token() -> None:
    words = tokenizer(LLAMA)
    assert parts(words, {"messages": [ASK, call({"a": 2})]})[1] == '<|python_tag|>add{"a": 2}<|eom_id|>'
    assert parts(words, {"messages": [ASK, call({"a": 2})], "finish_reason": "length"})[1] == '<|python_tag|>add{"a": 2}'
    assert parts(words, {"messages": [ASK, call({"a": 2}), {"role": "tool", "content": "4"}, FOUR]}, learn="last")[1] == "4<|eot_id|>"


@pytest.mark.parametrize("template", [CHATML, ARGUMENTS_AS_TEXT])
def test_arguments_of_tool_calls_as_objects_and_text_are_equal(template: str) -> None:
    words = tokenizer(template)
    rows = [{"messages": [ASK, call(arguments, **more)]} for arguments, more in (
        ({"a": 2, "b": [1, None], "c": {}}, {}),
        (json.dumps({"a": 2, "b": [1, None], "c": {}}), {}),
        ({"a": 2, "b": [1, None], "c": {}, "d": None}, {"content": None}),
    )]  # fmt: skip
    texts = {parts(words, row)[1] for row in rows}
    assert len(texts) == 1
    assert '{"a": 2, "b": [1, null], "c": {}}' in texts.pop()


def test_empty_lists_of_tools_and_calls_are_ignored() -> None:
    template = "{% if tools is not none %}TOOLS{% endif %}" + CHATML.replace(
        "<|im_start|>{{", "{{ 'CALLS' if m.tool_calls is defined }}<|im_start|>{{", 1
    )
    words = tokenizer(template)
    plain = parts(words, {"messages": [ASK, FOUR]})
    assert parts(words, {"messages": [{**ASK, "tool_calls": []}, {**FOUR, "tool_calls": []}], "tools": []}) == plain
    assert "TOOLS" not in plain[0]
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert parts(words, {"messages": [ASK, FOUR], "tools": json.dumps(tools)}) == parts(words, {"messages": [ASK, FOUR], "tools": tools})


def test_text_parts_of_a_message_are_joined() -> None:
    question = {"role": "user", "content": [{"type": "text", "text": "2+", "image": None}, {"type": "text", "text": "2?"}]}
    for template in (CHATML, PARTS_ONLY):
        assert parts(tokenizer(template), {"messages": [question, FOUR]}) == parts(tokenizer(template), {"messages": [ASK, FOUR]})
    image = {"role": "user", "content": [{"type": "image", "url": "x.png"}, {"type": "text", "text": "what?"}]}
    with pytest.raises(DataError, match=r"row 1, field 'messages': message 0 has a part of type 'image': only parts of text"):
        load_examples([{"messages": [image, FOUR]}], tokenizer())


@pytest.mark.parametrize("empty", ["", " ", "\n\n"])
def test_empty_turn_of_the_assistant_is_refused(empty: str) -> None:
    words, turn = tokenizer(), {"role": "assistant", "content": empty}
    for row in (
        {"messages": [ASK, turn]}, {"messages": [ASK], "response": empty}, {"prompt": "a", "response": empty},
        {"prompt": "a", "completion": empty}, {"prompt": [ASK], "completion": [turn]},
        {"messages": [ASK], "response": empty, "reasoning": "hm"},
        {"messages": [ASK, {**turn, "tool_calls": []}]},
    ):  # fmt: skip
        with pytest.raises(DataError, match=r"row 1, field '(messages|response|completion)'.*(empty|text is needed)"):
            load_examples([row], words)
    assert parts(words, {"messages": [ASK, call({}, content=empty)]})[1].endswith("<tool_call>add {}</tool_call><|im_end|>")


@pytest.mark.parametrize(
    ("row", "field", "second_field"),
    [
        ({"text": "a", "prompt": "b", "response": "c"}, "prompt", "'text'"),
        ({"text": "a", "messages": [ASK, FOUR]}, "messages", "'text'"),
        ({"text": "a", "response": "b"}, "response", "'text'"),
        ({"prompt": "a", "response": "b", "completion": "c"}, "completion", "'response'"),
        ({"messages": [ASK, FOUR], "response": "4"}, "response", "assistant in 'messages'"),
        ({"messages": [ASK, FOUR], "completion": [FOUR]}, "completion", "assistant in 'messages'"),
        ({"prompt": [ASK, FOUR], "response": "4"}, "response", "assistant in 'prompt'"),
        ({"prompt": "2+2?", "messages": [ASK], "response": "4"}, "prompt", "'messages'"),
        ({"prompt": "other", "messages": [ASK, FOUR]}, "prompt", "'messages'"),
        ({"prompt": "a", "response": "b", "teacher_prompt": "c", "teacher_messages": [ASK]}, "teacher_prompt", "'teacher_messages'"),
    ],
)
def test_ambiguous_row_raises(row: dict[str, Any], field: str, second_field: str) -> None:
    with pytest.raises(DataError) as error:
        load_examples([{"prompt": "a", "response": "b"}, row], tokenizer())
    assert f"row 2, field '{field}': the row has" in str(error.value)
    assert second_field in str(error.value)


def test_prompt_equal_to_the_message_is_not_ambiguous() -> None:
    row = {"prompt": "2+2?", "prompt_id": "7", "messages": [ASK, FOUR]}
    assert parts(tokenizer(), row) == parts(tokenizer(), {"messages": [ASK, FOUR]})


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize(
    ("template", "response", "way"),
    [(THINKING, "<think>\nsum\n</think>\n\n4<|im_end|>", "template"), (CHATML, "<think>sum</think>4<|im_end|>", "tags"),
     (OPENS_THOUGHTS, "sum</think>4<|im_end|>", "tags"), (LLAMA, "<think>sum</think>4<|eot_id|>", "tags")],
)  # fmt: skip
def test_reasoning_is_learnt_before_the_response(template: str, response: str, way: str, pieces: bool) -> None:
    words, tally = tokenizer(template, pieces=pieces), Tally()
    rows: list[dict[str, Any]] = [
        {"messages": [ASK], "response": "4", "reasoning": "sum"},
        {"messages": [ASK, {**FOUR, "reasoning_content": "sum"}]},
        {"messages": [ASK, {**FOUR, "reasoning": "sum", "reasoning_content": "sum"}]},
        {"prompt": [ASK], "completion": [FOUR], "reasoning": "sum", "teacher_messages": [{"role": "user", "content": "be brief"}, ASK]},
    ]
    for row in rows:
        assert parts(words, row, tally=tally)[1].replace(" ", "") == response
    assert tally.reasoning == {way: 4}
    alone = parts(words, {"messages": [ASK, FOUR]})
    assert parts(words, {"messages": [ASK], "response": "4", "reasoning": "sum"}, reasoning="drop", tally=tally)[:2] == alone[:2]
    assert parts(words, {"messages": [ASK], "response": "4", "reasoning": " "}) == alone
    assert tally.of_reasoning()[-1] == "reasoning of 1 row: left out (--reasoning drop)"


def test_reasoning_with_a_text_prompt_is_learnt_in_tags() -> None:
    words = tokenizer()
    row = {"prompt": "2+2?", "response": "4", "reasoning": "sum"}
    assert parts(words, row)[1] == "<think>sum</think>4<|endoftext|>"
    assert parts(words, {**row, "prompt": "2+2?<think>"})[:2] == ("2+2?<think>", "sum</think>4<|endoftext|>")
    assert parts(words, row, reasoning="drop")[1] == "4<|endoftext|>"
    assert parts(words, {**row, "reasoning": None})[1] == "4<|endoftext|>"
    with pytest.raises(DataError, match="field 'reasoning': text is needed, and it is true"):
        load_examples([{**row, "reasoning": True}], words)
    with pytest.raises(DataError, match="field 'reasoning': the assistant's turn in 'messages' has other thoughts"):
        load_examples([{"messages": [ASK, {**FOUR, "reasoning_content": "a"}], "reasoning": "b"}], words)


def test_response_without_reasoning_closes_the_prompts_think_tag() -> None:
    prompt, response, _ = parts(tokenizer(OPENS_THOUGHTS), {"messages": [ASK, FOUR]})
    assert prompt.endswith("<think>\n")
    assert response == "</think>4<|im_end|>"


def test_half_of_a_surrogate_pair_raises_with_its_field() -> None:
    words, half = tokenizer(), "cut \ud83d"
    for row, place in (
        ({"prompt": half, "response": "b"}, "prompt"), ({"prompt": "a", "response": half}, "response"), ({"text": half}, "text"),
        ({"messages": [ASK, {"role": "assistant", "content": half}]}, "messages[1].content"),
        ({"messages": [ASK, call({"a": half})]}, "messages[1].tool_calls[0].function.arguments.a"),
        ({"messages": [ASK, FOUR], "tools": [{"name": half}]}, "tools[0].name"),
        ({"prompt": "a", "response": "b", "demonstrations": [half]}, "demonstrations[0]"),
        ({"prompt": "a", "response": "b", "reasoning": half}, "reasoning"),
        ({"prompt": "a", "response": "b", "teacher_prompt": half}, "teacher_prompt"),
    ):  # fmt: skip
        with pytest.raises(DataError) as error:
            load_examples([row], words)
        assert f"row 1, field '{place}': character" in str(error.value)
        assert "half of a surrogate pair ('\\ud83d')" in str(error.value)
    assert parts(words, {"prompt": "a", "response": "\U0001f600", "note": half})[1] == "\U0001f600<|endoftext|>"


def test_rejected_system_turn_is_named() -> None:
    with pytest.raises(DataError, match=r"row 1, field 'messages': the chat template refuses it: System role not supported"):
        load_examples([{"messages": [{"role": "system", "content": "be brief"}, ASK, FOUR]}], tokenizer(GEMMA))
