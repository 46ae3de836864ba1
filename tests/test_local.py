"""A transformers model in this process as a teacher: its own text, its own draws, whatever the batch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import tiny
from serving import requests

from kdkernels.teachers.local import LocalModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def local(folder: Path) -> LocalModel:
    return LocalModel(folder)


def test_local_greedy_text_is_the_models_own_in_any_batch(local: LocalModel, tmp_path: Path) -> None:
    asked = requests([f"{word} fox" for word in tiny.WORDS], max_tokens=8)
    replies = local.complete(asked, tmp_path / "a")
    for request, reply in zip(asked[:4], replies, strict=False):
        ids = local.tokenizer.apply_chat_template(list(request.messages), add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = local.model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert reply.text == local.tokenizer.decode(output, skip_special_tokens=True)
        assert reply.prompt_tokens == ids["input_ids"].shape[1]
    one = LocalModel(local.model, local.tokenizer, batch_size=1)
    assert [r.text for r in one.complete(asked, tmp_path / "b")] == [r.text for r in replies]
    assert all(r.finish_reason == "length" and r.completion_tokens == 8 for r in replies if r.completion_tokens == 8)


def test_local_draws_are_of_the_model_and_repeat_with_the_seed(local: LocalModel, tmp_path: Path) -> None:
    asked = requests(["the"] * 3000, max_tokens=1, temperature=1.3)
    model = LocalModel(local.model, local.tokenizer, batch_size=500)
    texts = Counter(reply.text for reply in model.complete(asked, tmp_path / "a"))
    prompt = local.tokenizer.apply_chat_template(list(asked[0].messages), add_generation_prompt=True, return_tensors="pt", return_dict=True)
    p = (local.model(**prompt).logits[0, -1].double() / 1.3).softmax(-1)
    likeliest = p.topk(10)
    for id, share in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True):
        text = local.tokenizer.decode([id], skip_special_tokens=True)
        if sum(local.tokenizer.decode([i], skip_special_tokens=True) == text for i in range(len(p))) == 1:
            assert abs(texts[text] / 3000 - share) <= 6 * (share * (1 - share) / 3000) ** 0.5
    again = LocalModel(local.model, local.tokenizer, batch_size=7).complete(asked[:20], tmp_path / "b")
    assert [r.text for r in again] == [r.text for r in model.complete(asked[:20], tmp_path / "a")]
    other = LocalModel(local.model, local.tokenizer, seed=1).complete(asked[:20], tmp_path / "c")
    assert [r.text for r in again] != [r.text for r in other]


def test_local_stops_at_a_text(local: LocalModel, tmp_path: Path) -> None:
    free = local.complete(requests(["a dog"], max_tokens=12), tmp_path / "a")[0].text
    stop = free[len(free) // 2 :][:2]
    cut = local.complete(requests(["a dog"], max_tokens=12, stop=(stop,)), tmp_path / "b")[0]
    assert cut.text == free[: free.find(stop)]
    assert cut.finish_reason == "stop"


def test_local_is_plain_whatever_the_model_was_saved_with(folder: Path, local: LocalModel, tmp_path: Path) -> None:
    asked = requests(["a dog", "the fox"], max_tokens=12, logprobs=2)
    asked.append(dataclasses.replace(asked[0], key="drawn", temperature=1.0))
    plain = local.complete(asked, tmp_path / "plain")
    preferring = LocalModel(folder)
    own = preferring.model.generation_config
    own.update(repetition_penalty=3.0, no_repeat_ngram_size=1, min_p=0.5, min_new_tokens=12)
    again = preferring.complete(asked, tmp_path / "again")
    assert [(r.text, r.logprobs) for r in again] == [(r.text, r.logprobs) for r in plain]
    assert preferring.model.generation_config is own


def test_local_ends_at_the_end_of_the_model_and_of_the_tokenizer(folder: Path, local: LocalModel, tmp_path: Path) -> None:
    asked = requests(["a dog"], max_tokens=12)
    free = local.complete(requests(["a dog"], max_tokens=12, logprobs=1), tmp_path / "free")[0]
    for of in ("generation_config", "tokenizer"):
        ending = LocalModel(folder)
        id = int(free.logprobs[3]["id"])
        if of == "tokenizer":
            ending.tokenizer.eos_token = ending.tokenizer.convert_ids_to_tokens(id)
        else:
            ending.model.generation_config.eos_token_id = [id]
        reply = ending.complete(asked, tmp_path / of)[0]
        assert (reply.finish_reason, reply.completion_tokens) == ("stop", [t["id"] for t in free.logprobs].index(id))
