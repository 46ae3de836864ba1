"""Training with pad tokens that the models lack, tokens beyond the embeddings, and reasoning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training import make_model, make_tokenizer, trainers

pytest.importorskip("transformers")

from kdkernels.data.rows import DataError
from kdkernels.teachers.local import generate

ROWS = [{"prompt": "a", "response": "b"}, {"prompt": "one two", "response": " three four five"}]


def models(size: int) -> list[Any]:
    return [make_model(16, vocab_size=size, seed=seed) for seed in (1, 2)]


@pytest.mark.parametrize("on_policy_fraction", [0.0, 1.0])
def test_pad_token_beyond_the_embeddings_does_not_change_the_loss(tmp_path: Path, on_policy_fraction: float) -> None:
    losses = []
    for added in (False, True):
        words = make_tokenizer()
        student, teacher = models(len(words))
        if added:
            words.add_special_tokens({"pad_token": "[PAD]"})
        trainer = trainers(tmp_path / str(added), words)(student, teacher, ROWS, on_policy_fraction=on_policy_fraction, max_new_tokens=4)
        losses.append(trainer.train().training_loss)
    assert losses[0] == losses[1]


def test_token_beyond_the_embeddings_is_refused_before_training(tmp_path: Path) -> None:
    words = make_tokenizer()
    student, teacher = models(len(words))
    words.add_tokens(["<new>"])
    build = trainers(tmp_path, words)
    with pytest.raises(DataError, match=r"row 2: token '<new>' \(id \d+\) is beyond the \d+ embeddings of a model"):
        build(student, teacher, [ROWS[0], {"prompt": "<new>", "response": "b"}])
    with pytest.raises(ValueError, match=r"prompt 0 of the batch has the token '<new>'"):
        generate(student, words, [words("<new>")["input_ids"]], [0], max_tokens=1)


def test_reasoning_is_learnt_unless_it_is_dropped(tmp_path: Path) -> None:
    words = make_tokenizer()
    words.add_tokens(["<think>", "</think>"])
    student, teacher = models(len(words))
    build, row = trainers(tmp_path, words), {"prompt": "one plus one", "response": " two", "reasoning": "red"}

    def response(**options: Any) -> str:
        (example,) = build(student, teacher, [row], **options).train_dataset[0]
        return str(words.decode(list(example.student_ids)[example.student_scored[0] + 1 :]))

    assert response() == "<think>red</think> two<|end|>"
    assert response(reasoning="drop") == " two<|end|>"
    with pytest.raises(ValueError, match="reasoning must be one of learn, drop, got 'keep'"):
        build(student, teacher, [row], reasoning="keep")
