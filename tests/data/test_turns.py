"""Learnt turns of a conversation: all or only the last, located by the template's marks or by prefixes; weights of turns."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from templated import (
    CHATML,
    ENDS_TWICE,
    GEMMA,
    LLAMA,
    MARKED,
    MARKED_BEYOND_END,
    MARKED_WITHOUT_END,
    MISTRAL,
    NO_END,
    OPENS_THOUGHTS,
    QWEN,
    QWEN3,
    SMOLLM,
    THINKING,
    tokenizer,
)
from training import make_model, make_tokenizer, trainers

pytest.importorskip("transformers")

from kdkernels.cli.train.record import Record
from kdkernels.cli.train.resume import choose_learn
from kdkernels.data.collator import Collator, with_prompt
from kdkernels.data.example import Example
from kdkernels.data.rows import DataError
from kdkernels.data.tokenization import Tally, load_examples
from kdkernels.teachers.generate import asked_of
from kdkernels.trainer.rollouts import rollouts


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


TALK = [user("2+2?"), assistant("4"), user("3+3?"), assistant("6"), user("4+4?"), assistant("8")]


def marked_text(words: Any, example: Example) -> str:
    """Return the student's tokens as text, with each learnt run in angle quotes."""
    scored = {position + 1 for position in example.student_scored}
    text = ""
    for place, token in enumerate(example.student_ids):
        text += ("«" if place in scored and place - 1 not in scored else "") + words.decode([token])
        text += "»" if place in scored and place + 1 not in scored else ""
    assert (list(example.student_ids), list(example.student_scored)) == (list(example.teacher_ids), list(example.teacher_scored))
    return text


def learnt(words: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    (example,) = load_examples([{"messages": messages}], words, **options)
    return marked_text(words, example)


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (QWEN, "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n«4<|im_end|>»\n"
               "<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n«6<|im_end|>»\n"
               "<|im_start|>user\n4+4?<|im_end|>\n<|im_start|>assistant\n«8<|im_end|>»"),
        (SMOLLM, "<|im_start|>system\nYou are SmolLM.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n«4<|im_end|>»\n"
                 "<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n«6<|im_end|>»\n"
                 "<|im_start|>user\n4+4?<|im_end|>\n<|im_start|>assistant\n«8<|im_end|>»"),
        (LLAMA, "<bos><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n«4<|eot_id|>»<|start_header_id|>user<|end_header_id|>\n\n3+3?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n«6<|eot_id|>»<|start_header_id|>user<|end_header_id|>\n\n4+4?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n«8<|eot_id|>»"),
        (GEMMA, "<bos><start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n«4<end_of_turn>»\n"
                "<start_of_turn>user\n3+3?<end_of_turn>\n<start_of_turn>model\n«6<end_of_turn>»\n"
                "<start_of_turn>user\n4+4?<end_of_turn>\n<start_of_turn>model\n«8<end_of_turn>»"),
        (MISTRAL, "<bos>[INST] 2+2? [/INST]« 4<|endoftext|>»[INST] 3+3? [/INST]« 6<|endoftext|>»[INST] 4+4? [/INST]« 8<|endoftext|>»"),
        (ENDS_TWICE, "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n«4<|im_end|>»\n"
                     "<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n«6<|im_end|>»\n"
                     "<|im_start|>user\n4+4?<|im_end|>\n<|im_start|>assistant\n«8<|im_end|>»"),
        (NO_END, "user: 2+2?\nassistant: «4\n»user: 3+3?\nassistant: «6\n»user: 4+4?\nassistant: «8\n<|endoftext|>»"),
    ],
)  # fmt: skip
def test_every_turn_is_learnt_from_the_generation_prompt_to_its_end_token(template: str, expected: str, pieces: bool) -> None:
    words = tokenizer(template, pieces=pieces)
    (example,) = load_examples([{"messages": TALK}], words)
    assert marked_text(words, example).replace(" ", "") == expected.replace(" ", "")
    if not pieces:  # one token for each letter and each special token
        parts = enumerate(re.split("[«»]", expected))  # odd parts are learnt
        tokens = [(token, bool(number % 2)) for number, part in parts for token in words.tokenize(part)]
        scored = {position + 1 for position in example.student_scored}
        ids = enumerate(words.convert_ids_to_tokens(list(example.student_ids)))
        assert [(token, place in scored) for place, token in ids] == tokens
    (last,) = load_examples([{"messages": TALK}], words, learn="last")
    assert list(example.student_ids) == list(last.student_ids)
    assert list(example.student_scored)[-len(last.student_scored) :] == list(last.student_scored)


@pytest.mark.parametrize("template", [CHATML, QWEN, LLAMA, GEMMA, MISTRAL, THINKING, OPENS_THOUGHTS, NO_END])
def test_single_turn_is_the_same_with_all_and_last(template: str) -> None:
    words = tokenizer(template)
    rows = [
        {"messages": TALK[:2]},
        {"messages": [user("2+2?"), assistant("4", reasoning_content="sum")]},
        {"messages": TALK[:2], "weight": 2},
    ]
    every, last, default = (load_examples(rows, words, learn=learn) for learn in ("all", "last", None))
    assert every == last == default
    assert [example.key() for example in every] == [example.key() for example in last]


@pytest.mark.parametrize("template", [MARKED, MARKED_WITHOUT_END, MARKED_BEYOND_END])
def test_marks_of_the_template_select_the_tokens_of_assistant_only_loss(template: str) -> None:
    """TRL's ``assistant_only_loss`` learns the tokens of ``assistant_masks``. Here, tokens after an end token are not learnt."""
    words = tokenizer(template)
    trl = words.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    (example,) = load_examples([{"messages": TALK}], words)
    ids = trl["input_ids"][: len(example.student_ids)]
    assert list(example.student_ids) == ids
    end, newline = words.convert_tokens_to_ids("<|im_end|>"), words("\n")["input_ids"][0]
    mask = trl["assistant_masks"]
    expected = [
        place for place, token in enumerate(ids)
        if (mask[place] and not (token == newline and ids[place - 1] == end)) or (token == end and mask[place - 1])
    ]  # fmt: skip
    assert [position + 1 for position in example.student_scored] == expected
    assert marked_text(words, example) == learnt(tokenizer(CHATML), TALK)
    if template == MARKED:  # both learn exactly the same tokens
        assert expected == [place for place, marked in enumerate(mask) if marked]


def test_marks_work_without_prefixes_and_for_a_first_turn_of_the_assistant() -> None:
    block = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>"
    words = tokenizer(QWEN3.replace("{{ m.content }}<|im_end|>\n", block + "{% endif %}{{ '\n' }}"))
    assert learnt(words, TALK[:4], learn="all").count("«") == 2
    assert learnt(tokenizer(MARKED), [assistant("hi"), *TALK[:2]]).count("«") == 2
    assert learnt(tokenizer(CHATML), [assistant("hi"), *TALK[:4]]).count("«") == 2, "a first turn without a question is not learnt"


@pytest.mark.parametrize("template", [QWEN3, OPENS_THOUGHTS, THINKING])
def test_template_with_a_different_last_turn_learns_only_it(template: str) -> None:
    words = tokenizer(template)
    rows = [{"messages": TALK}, {"messages": TALK[:4]}, {"messages": TALK[:2]}]
    with pytest.warns(UserWarning, match="of 2 conversations only the last turn of the assistant is learnt") as caught:
        examples = load_examples(rows, words)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_examples(rows, words, learn="last") == examples
    words.name_or_path = "lab/model"
    with pytest.raises(DataError, match=r"row 1, field 'messages': the chat template of lab/model writes an earlier turn .* token \d+ is"):
        load_examples(rows, words, learn="all")


def test_reasoning_dropped_by_the_template_limits_learning_to_the_last_turn() -> None:
    talk = [user("2+2?"), assistant("4", reasoning_content="sum"), user("3+3?"), assistant("6", reasoning_content="more")]
    words, tally = tokenizer(CHATML), Tally()
    with pytest.warns(UserWarning, match="of 1 conversations only the last"):
        assert learnt(words, talk, tally=tally).endswith("«<think>more</think>6<|im_end|>»")
    assert learnt(words, talk, reasoning="drop", learn="all", tally=tally).count("«") == 2
    assert tally.reasoning == {"tags": 1, "dropped": 1}


def test_rows_with_a_response_or_teacher_fields_learn_only_the_response() -> None:
    words, history = tokenizer(), TALK[:3]
    for row in (
        {"messages": history, "response": "6"}, {"messages": history, "completion": [assistant("6")]},
        {"prompt": history, "completion": [assistant("6")]},
        {"messages": TALK[:4], "teacher_prompt": "x"}, {"messages": TALK[:4], "teacher_messages": history},
        {"messages": TALK[:4], "demonstrations": [{"prompt": "a", "response": "b"}]}, {"messages": TALK[:4], "teacher_note": "x"},
    ):  # fmt: skip
        (example,) = load_examples([row], words, learn="all")
        assert words.decode(list(example.student_ids)[example.student_scored[0] + 1 :]) == "6<|im_end|>"
    assert learnt(words, TALK[:4]).count("«") == 2


def test_cut_off_last_turn_is_learnt_without_an_end() -> None:
    for template in (CHATML, MARKED, MARKED_WITHOUT_END):
        words = tokenizer(template)
        (example,) = load_examples([{"messages": TALK[:4], "finish_reason": "length"}], words)
        assert marked_text(words, example).endswith("«6»")
        assert "«4<|im_end|>»" in marked_text(words, example)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_weight_multiplies_the_loss_of_its_turn(template: str) -> None:
    words = tokenizer(template)

    def weighted(*weights: Any) -> Example:
        talk = [dict(turn) for turn in TALK]
        for turn, weight in zip(talk[1::2], weights, strict=True):
            turn["weight"] = weight
        (example,) = load_examples([{"messages": talk, "weight": 2}], words)
        return example

    plain, half, none, only = weighted(1, 1, 1), weighted(0.5, None, 3), weighted(0, 1, 1), weighted(0, 1, 0)
    assert plain.key() == half.key() == load_examples([{"messages": TALK}], words)[0].key()
    assert half.turns == ((2, 0.5), (2, 1.0), (2, 3.0))
    batch = Collator()([(half,), (plain,)])
    assert batch["token_weights"].tolist() == [1.0, 1.0, 2.0, 2.0, 6.0, 6.0, *[2.0] * 6]
    assert marked_text(words, none).count("«") == 2
    assert none.key() != plain.key()
    assert marked_text(words, only).endswith("«6<|im_end|>»"), "tokens after the last learnt turn are left out"
    (shorter,) = load_examples([{"messages": [TALK[0], assistant("4", weight=0), *TALK[2:4]]}], words)
    assert shorter.key() == only.key()


def test_invalid_weights_of_turns_raise() -> None:
    words = tokenizer()
    for talk, message in (
        ([user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=0)], "field 'messages': every turn .* has weight 0"),
        ([user("a"), assistant("b", weight=0)], "field 'messages': the only turn to learn has weight 0"),
        ([user("a"), assistant("b", weight=-1)], r"field 'messages\[1\].weight': a number >= 0 is needed, and it is -1"),
        ([user("a"), assistant("b", weight="1")], r"field 'messages\[1\].weight': a number >= 0"),
        (
            [user("a"), assistant(" "), user("c"), assistant("d")],
            r"field 'messages\[1\]': the assistant's turn is empty.*or give the message weight 0",
        ),
    ):
        with pytest.raises(DataError, match=f"row 1, {message}"):
            load_examples([{"messages": talk}], words)
    assert learnt(words, [user("a"), assistant("", weight=0), user("c"), assistant("d")]).count("«") == 1


def test_weights_are_not_passed_to_templates_or_servers() -> None:
    template = CHATML.replace("<|im_start|>{{", "{{ 'W' if m.weight is defined }}<|im_start|>{{", 1)
    talk = [user("a"), assistant("b", weight=0.5), {**user("c"), "weight": 1}, assistant("d", weight=2)]
    assert "W" not in learnt(tokenizer(template), talk)
    assert asked_of({"messages": talk}) == [user("a"), assistant("b"), user("c")]


def test_truncation_drops_tokens_from_the_end_in_any_turn() -> None:
    words = tokenizer()
    (example,) = load_examples([{"messages": TALK}], words)
    for length in range(example.student_scored[0] + 2, len(example)):
        with pytest.warns(UserWarning, match=rf"cut 1, by {len(example) - length} tokens"):
            (cut,) = load_examples([{"messages": TALK}], words, max_length=length, overlong="truncate")
        assert list(cut.student_ids) == list(example.student_ids)[:length]
        assert list(cut.student_scored) == [position for position in example.student_scored if position < length - 1]
        assert sum(count for count, _ in cut.parts) == len(cut.student_scored)
    with pytest.raises(DataError, match="no row is left"):
        load_examples([{"messages": TALK}], words, max_length=example.student_scored[0] + 1, overlong="truncate")


def test_rollout_replaces_the_last_learnt_turn_and_scores_only_it() -> None:
    words = make_tokenizer()
    talk = [user("one plus one"), assistant("two"), user("red"), assistant("blue", weight=0.5), user("cat"), assistant("dog", weight=0)]
    (example,) = load_examples([{"messages": talk}], words)
    model = make_model(16, vocab_size=len(words)).eval()
    ((rollout,),) = rollouts(
        model, [(example,)], words, temperature=1.0, max_new_tokens=5, max_length=None, vocab_size=None, place=(0, 0, 0, 0)
    )
    prompt = words.apply_chat_template(talk[:3], tokenize=False, add_generation_prompt=True)
    start = rollout.student_scored[0] + 1
    assert words.decode(list(rollout.student_ids)[:start]) == prompt
    assert list(rollout.student_scored) == list(range(start - 1, len(rollout.student_ids) - 1)) == list(rollout.teacher_scored)
    assert rollout.turns == ((len(rollout.student_scored), 0.5),)


def test_scored_prompts_leave_out_turns_of_weight_0() -> None:
    words = tokenizer()
    talk = [user("a"), assistant("b", weight=0.5), user("c"), assistant("d", weight=0), user("e"), assistant("f")]
    (example,) = load_examples([{"messages": talk}], words)
    every = with_prompt(example)
    left_out = set(range(len(example.student_ids) - 1)) - set(every.student_scored)
    assert words.decode([example.student_ids[position + 1] for position in sorted(left_out)]) == "d<|im_end|>"
    batch = Collator(kd_on_prompt=True)([(example,)])
    assert batch["response"].tolist() == [position in set(example.student_scored) for position in every.student_scored]
    assert batch["token_weights"][batch["response"]].tolist() == [0.5, 0.5, 1.0, 1.0]
    assert batch["token_weights"].sum() == len(every.student_scored) - 1


def test_training_multiplies_the_loss_by_weights_of_turns(tmp_path: Path) -> None:
    words = make_tokenizer()
    talk = [user("one"), assistant("two", weight=0.5), user("red"), assistant("blue")]
    build = trainers(tmp_path, words)
    student, teacher = (make_model(16, vocab_size=len(words), seed=seed, dtype=torch.float64) for seed in (1, 2))
    trainer = build(student, teacher, [{"messages": talk}])
    (item,) = trainer.train_dataset
    (first, second) = (
        dataclasses.replace(item[0], student_scored=scored, teacher_scored=scored, turns=())
        for scored in (list(item[0].student_scored)[:2], list(item[0].student_scored)[2:])
    )
    parts = [trainer.objective(student, Collator()([(part,)]), torch.tensor(1), 1)[0].item() for part in (first, second)]
    weighted_loss = trainer.objective(student, Collator()([item]), torch.tensor(1), 1)[0].item()
    assert weighted_loss == pytest.approx(0.5 * parts[0] + parts[1])


def test_cache_decides_which_turns_are_learnt(tmp_path: Path) -> None:
    from kdkernels.support.files import digest
    from kdkernels.teachers.cache import open_cache
    from kdkernels.teachers.cache.manifest import Identity, identity_of_tokenizer
    from kdkernels.teachers.cache.writer import write_cache
    from kdkernels.teachers.live import LiveTeacher

    words = make_tokenizer()
    talk = [{"messages": [user("one"), assistant("two"), user("red"), assistant("blue")]}]
    size = len(words)
    student, teacher = (make_model(16, vocab_size=size, seed=seed, dtype=torch.float64) for seed in (1, 2))
    build = trainers(tmp_path, words)
    for learn, count in (("all", 2), ("last", 1), (None, 2)):
        folder = tmp_path / f"cache-{learn}"
        identity = Identity("t", "r", "float64", vocab_size=size, padded_vocab_size=size, kind="topk", k=4, temperature=1.0,
                            dtype="float32", **identity_of_tokenizer(words))  # fmt: skip
        write_cache(LiveTeacher(teacher), load_examples(talk, words, learn=learn), folder, identity, options={"learn": learn})  # type: ignore[arg-type]
        cache = open_cache(folder, words)
        trainer = build(student, cache, talk)
        assert (cache.learn, trainer.args.learn, len(trainer.train_dataset[0][0].parts)) == (learn, learn, count)
    with pytest.raises(ValueError, match="The cache was made with --learn last, this training has all, and it decides the tokens of a row"):
        build(student, open_cache(tmp_path / "cache-last", words), talk, learn="all")
    manifest = json.loads((tmp_path / "cache-last" / "manifest.json").read_text())
    del manifest["options"]["learn"], manifest["checksum"]
    manifest["checksum"] = digest(manifest)
    (tmp_path / "cache-last" / "manifest.json").write_text(json.dumps(manifest))
    cache = open_cache(tmp_path / "cache-last", words)
    assert (cache.learn, build(student, cache, talk).args.learn) == ("last", "last")


def test_run_older_than_the_learn_option_continues_with_the_last_turn(tmp_path: Path) -> None:
    def chosen(learn: str | None, cache: Any = None) -> str | None:
        args = SimpleNamespace(learn=learn, output_dir=str(tmp_path), resume_from_checkpoint=None)
        choose_learn(args, cache)
        return args.learn

    assert chosen(None) is None
    assert chosen(None, SimpleNamespace(learn="last")) == "last"
    assert chosen("all", SimpleNamespace(learn="last")) == "all"
    before, now = (Record({"seed": 1, **more}, {}, {}, {}) for more in ({}, {"learn": "last"}))
    (tmp_path / "run.json").write_text(json.dumps(before.to_json()))
    assert chosen(None) == "last"
    assert before.unlike(now) == []
    assert before.unlike(Record({"seed": 1, "learn": "all"}, {}, {}, {})) == ["--learn ('last' then, 'all' now)"]
    (tmp_path / "run.json").write_text(json.dumps(Record({"seed": 1, "learn": None}, {}, {}, {}).to_json()))
    assert chosen(None) is None
