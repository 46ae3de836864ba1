"""A transformers model in this process as a text teacher. Text and draws do not depend on the batch."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file, save_file
from serving import requests

from kdkernels.teachers.jobs import device_of
from kdkernels.teachers.local import LocalModel
from kdkernels.teachers.replies import OtherRequest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def local(folder: Path) -> LocalModel:
    return LocalModel(folder)


def test_greedy_text_does_not_depend_on_the_batch(local: LocalModel, tmp_path: Path) -> None:
    batch = requests([f"{word} fox" for word in tiny.WORDS], max_tokens=8)
    replies = local.complete(batch, tmp_path / "a")
    for request, reply in zip(batch[:4], replies, strict=False):
        ids = local.tokenizer.apply_chat_template(list(request.messages), add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = local.model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert reply.text == local.tokenizer.decode(output, skip_special_tokens=True)
        assert reply.prompt_tokens == ids["input_ids"].shape[1]
    one_by_one = LocalModel(local.model, local.tokenizer, batch_size=1)
    assert [r.text for r in one_by_one.complete(batch, tmp_path / "b")] == [r.text for r in replies]
    assert all(r.finish_reason == "length" and r.completion_tokens == 8 for r in replies if r.completion_tokens == 8)


def test_draws_follow_the_model_and_repeat_with_the_seed(local: LocalModel, tmp_path: Path) -> None:
    batch = requests(["the"] * 3000, max_tokens=1, temperature=1.3)
    model = LocalModel(local.model, local.tokenizer, batch_size=500)
    texts = Counter(reply.text for reply in model.complete(batch, tmp_path / "a"))
    prompt = local.tokenizer.apply_chat_template(list(batch[0].messages), add_generation_prompt=True, return_tensors="pt", return_dict=True)
    p = (local.model(**prompt).logits[0, -1].double() / 1.3).softmax(-1)
    likeliest = p.topk(10)
    for id, share in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True):
        text = local.tokenizer.decode([id], skip_special_tokens=True)
        if sum(local.tokenizer.decode([i], skip_special_tokens=True) == text for i in range(len(p))) == 1:
            assert abs(texts[text] / 3000 - share) <= 6 * (share * (1 - share) / 3000) ** 0.5
    again = LocalModel(local.model, local.tokenizer, batch_size=7).complete(batch[:20], tmp_path / "b")
    assert [r.text for r in again] == [r.text for r in model.complete(batch[:20], tmp_path / "a")]
    reseeded = LocalModel(local.model, local.tokenizer, seed=1).complete(batch[:20], tmp_path / "c")
    assert [r.text for r in again] != [r.text for r in reseeded]


@pytest.mark.parametrize("part", ["template", "tokens", "end"])
def test_log_continues_only_with_the_same_tokenizer_and_template(local: LocalModel, tmp_path: Path, part: str) -> None:
    batch = requests(["a fox", "a dog"], max_tokens=2)
    LocalModel(local.model, local.tokenizer, name="m").complete(batch[:1], tmp_path / "log")
    tokenizer = copy.deepcopy(local.tokenizer)
    if part == "template":
        tokenizer.chat_template = tokenizer.chat_template.replace(": ", "> ")
    elif part == "tokens":
        tokenizer.add_tokens(["fox"])
    else:
        tokenizer.eos_token = "<pad>"
    before = (tmp_path / "log").read_bytes()
    with pytest.raises(OtherRequest, match="another tokenizer, chat template or end token"):
        LocalModel(local.model, tokenizer, name="m").complete(batch, tmp_path / "log")
    assert (tmp_path / "log").read_bytes() == before
    assert len(LocalModel(local.model, local.tokenizer, name="m").complete(batch, tmp_path / "log")) == 2


def test_log_without_recorded_tokens_continues(local: LocalModel, tmp_path: Path) -> None:
    batch = requests(["a fox", "a dog"], max_tokens=2)
    model = LocalModel(local.model, local.tokenizer, name="m")
    (reply,) = model.complete(batch[:1], tmp_path / "log")
    entry = json.loads((tmp_path / "log").read_text())
    del entry["tokens"]
    (tmp_path / "log").write_text(json.dumps(entry) + "\n")
    assert model.complete(batch, tmp_path / "log")[0] == reply


@pytest.mark.parametrize("change", ["head", "layer", "names", "shape"])
def test_incomplete_weights_raise(folder: Path, tmp_path: Path, change: str) -> None:
    broken = shutil.copytree(folder, tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    name = "lm_head.weight" if change == "head" else "model.layers.0.mlp.up_proj.weight"
    if change == "names":
        weights = {f"module.{name}": tensor for name, tensor in weights.items()}
    elif change == "shape":
        weights[name] = weights[name][:-1].contiguous()
    else:
        del weights[name]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"--model .*: the weights .*weight.* are missing or not of the shape.* would be drawn at random"):
        LocalModel(broken)


@pytest.mark.parametrize("tied", [True, False])
def test_complete_model_is_loaded_with_tied_or_untied_head(folder: Path, tmp_path: Path, tied: bool) -> None:
    whole = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    if tied:
        weights = load_file(whole / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, whole / "model.safetensors", metadata={"format": "pt"})
    model = LocalModel(whole).model
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(("file", "text"), [("config.json", "[]"), ("config.json", '{"model_type": "llama", "dtype": "float7"}')])
def test_broken_model_file_is_one_error(folder: Path, tmp_path: Path, file: str, text: str) -> None:
    broken = shutil.copytree(folder, tmp_path / "model")
    (broken / file).write_text(text)
    with pytest.raises(ValueError, match=r"--model .*: can't be loaded"):
        LocalModel(broken)


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cuda:99"])
def test_unknown_device_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"--device {name}: torch can't use it here"):
        device_of(name)


def test_generation_ends_at_a_stop_text(local: LocalModel, tmp_path: Path) -> None:
    free = local.complete(requests(["a dog"], max_tokens=12), tmp_path / "a")[0].text
    stop = free[len(free) // 2 :][:2]
    cut = local.complete(requests(["a dog"], max_tokens=12, stop=(stop,)), tmp_path / "b")[0]
    assert cut.text == free[: free.find(stop)]
    assert cut.finish_reason == "stop"


def test_generation_ignores_saved_settings(folder: Path, local: LocalModel, tmp_path: Path) -> None:
    batch = requests(["a dog", "the fox"], max_tokens=12, logprobs=2)
    batch.append(dataclasses.replace(batch[0], key="drawn", temperature=1.0))
    plain = local.complete(batch, tmp_path / "plain")
    model = LocalModel(folder)
    saved = model.model.generation_config
    saved.update(repetition_penalty=3.0, no_repeat_ngram_size=1, min_p=0.5, min_new_tokens=12)
    replies = model.complete(batch, tmp_path / "again")
    assert [(r.text, r.logprobs) for r in replies] == [(r.text, r.logprobs) for r in plain]
    assert model.model.generation_config is saved


def test_generation_ends_at_end_tokens_of_the_model_and_the_tokenizer(folder: Path, local: LocalModel, tmp_path: Path) -> None:
    batch = requests(["a dog"], max_tokens=12)
    free = local.complete(requests(["a dog"], max_tokens=12, logprobs=1), tmp_path / "free")[0]
    for source in ("generation_config", "tokenizer"):
        model = LocalModel(folder)
        id = int(free.logprobs[3]["id"])
        if source == "tokenizer":
            model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(id)
        else:
            model.model.generation_config.eos_token_id = [id]
        reply = model.complete(batch, tmp_path / source)[0]
        assert (reply.finish_reason, reply.completion_tokens) == ("stop", [t["id"] for t in free.logprobs].index(id))
