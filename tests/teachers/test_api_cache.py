"""Caches made from an API's log-probabilities equal the live teacher's cache, whether tokens come as text or as ids in text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from serving import KEY, ScriptedModel, Server
from typer.testing import CliRunner

import kdkernels as kd
from kdkernels import cli
from kdkernels.data.collator import Collator, view_of
from kdkernels.data.tokenization import load_examples
from kdkernels.teachers.cache import CacheError, open_cache
from kdkernels.teachers.cache.api import TokenIds, from_replies, score, silent_positions
from kdkernels.teachers.generate import requests_of, with_reply
from kdkernels.teachers.http import HTTPModelError
from kdkernels.teachers.live import LiveTeacher
from kdkernels.teachers.local import LocalModel

runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server.started(tmp_path) as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def local(folder: Path) -> LocalModel:
    return LocalModel(folder)


def without_ids(tokens: Sequence[Any], named: bool) -> list[dict[str, Any]]:
    """Return log-probabilities as a server sends them: tokens as text, or as ``token_id:7`` with ``named``; no ids."""

    def token(t: Any) -> dict[str, Any]:
        return {"token": f"token_id:{t['id']}" if named else t["token"], "logprob": t["logprob"]}

    return [{**token(t), "top_logprobs": [token(a) for a in t["top_logprobs"]]} for t in tokens]


@pytest.fixture(scope="module")
def speaker() -> LocalModel:
    """A model that almost only writes a space and a word, so that tokenising its text gives its own tokens again."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None  # a completions server takes the prompt as it is
    model = tiny.model(len(tokenizer))
    word_ids = tokenizer([f" {word}" for word in tiny.WORDS], add_special_tokens=False)["input_ids"]
    assert all(len(ids) == 1 for ids in word_ids)
    with torch.no_grad():
        head_rows = model.lm_head.weight[[ids[0] for ids in word_ids]] * 3
        model.lm_head.weight.mul_(0.1)
        model.lm_head.weight[[ids[0] for ids in word_ids]] = head_rows
    return LocalModel(model, tokenizer)


def answered(speaker: LocalModel, log: Path, named: bool = False) -> list[dict[str, Any]]:
    rows = [{"prompt": f"{word} "} for word in tiny.WORDS]
    replies = speaker.complete(requests_of(rows, max_tokens=8, temperature=0.0, logprobs=8), log)
    return [
        {**with_reply(row, reply), "teacher_logprobs": without_ids(reply.logprobs, named)} for row, reply in zip(rows, replies, strict=True)
    ]


@pytest.mark.parametrize("named", [False, True])
def test_api_logprobs_become_the_cache_of_the_live_teacher(speaker: LocalModel, folder: Path, tmp_path: Path, named: bool) -> None:
    rows = answered(speaker, tmp_path / "log", named)  # every response is cut off
    for row in rows[::2]:
        row["finish_reason"] = "stop"
    data, out = tiny.write(tmp_path / "answers.jsonl", rows), tmp_path / "cache"
    command = ["cache", "--from-replies", "--tokenizer", folder, "--data", data, "--out", out, "--precision", "float32"]
    result = runner.invoke(cli.app, [str(a) for a in command])
    assert result.exit_code == 0, result.output
    cache, examples = open_cache(out, tiny.tokenizer()), load_examples(data, speaker.tokenizer)
    live = LiveTeacher(speaker.model)
    for row, example in zip(rows, examples, strict=True):
        view = view_of(Collator(salt=cache.salt)([(example,)]), "teacher_")
        targets, truth = cache.targets(view), kd.topk_logprobs(live.targets(view), 8)
        assert targets.tail == "bucket"
        count = len(row["teacher_logprobs"])
        assert len(example.teacher_scored) == count + (row["finish_reason"] == "stop"), "the server reports nothing for the end token"
        assert (targets.ids[count:] == -1).all()
        # Half a character has no text, so such an entry counts as tail.
        texts = [[t["token"] for t in token["top_logprobs"]] for token in row["teacher_logprobs"]]
        unknown = torch.tensor([[text == "\ufffd" for text in some] for some in texts]) & (not named)
        for t in range(count):
            ids = truth.ids[t][~unknown[t]]
            assert targets.ids[t][targets.ids[t] >= 0].tolist() == ids.tolist()
            torch.testing.assert_close(targets.logprobs[t, : len(ids)], truth.logprobs[t][~unknown[t]], atol=1e-5, rtol=1e-5)


def test_tokens_are_found_by_text_bytes_and_name(local: LocalModel) -> None:
    tokenizer = local.tokenizer
    ids_of = TokenIds(tokenizer)
    word = tokenizer(" quick", add_special_tokens=False)["input_ids"]
    assert len(word) == 1, "each word is one token"
    assert ids_of({"token": " quick"}) == word[0]
    assert ids_of({"token": "Ġquick"}) == word[0]
    assert ids_of({"token": f"token_id:{word[0]}"}) == word[0]
    assert ids_of({"token": "?", "bytes": list(b" quick")}) == word[0]
    part = "é".encode()[:1]  # half a character has no text
    assert tokenizer.convert_ids_to_tokens(ids_of({"token": "\ufffd", "bytes": list(part)})) == "Ã"
    assert ids_of({"token": "\ufffd"}) is None
    assert ids_of({"token": "not one token"}) is None
    assert ids_of({"token": "</s>"}) == tokenizer.eos_token_id


def test_another_tokenizer_than_the_teachers_is_refused(speaker: LocalModel, tmp_path: Path) -> None:
    rows = answered(speaker, tmp_path / "log")
    tokenizer = tiny.tokenizer()
    foreign = [{**row, "teacher_logprobs": [{**t, "token": t["token"] + "~"} for t in row["teacher_logprobs"]]} for row in rows]
    with pytest.raises(CacheError, match="can't be mapped to ids"):
        from_replies(foreign, load_examples(rows, tokenizer), tokenizer)
    with pytest.raises(CacheError, match="row 1 has no teacher_logprobs"):
        from_replies([{"prompt": "a", "response": "b"}], load_examples([{"prompt": "a", "response": "b"}], tokenizer), tokenizer)


@pytest.mark.parametrize("form", ["id", "token_id"])
def test_response_in_unusual_tokens_drops_only_that_row(form: str) -> None:
    """Real models sometimes write "C" and "at" for "Cat". If the ids decode to the response, they are the teacher's tokens."""
    tokenizer = tiny.tokenizer()
    rows = [{"prompt": prompt, "response": " quick", "finish_reason": "length"} for prompt in ("a", "b")]
    examples = load_examples(rows, tokenizer)

    def logprobs_of(*texts: str, step: int = 0) -> list[dict[str, Any]]:
        ids = [TokenIds(tokenizer).candidates({"token": text})[0] + step for text in texts]
        tokens = [token_entry(text) | {"id": id} for text, id in zip(texts, ids, strict=True)]
        return tokens if form == "id" else [token_entry(f"token_id:{id}") for id in ids]

    first = rows[0] | {"teacher_logprobs": logprobs_of(" quick")}
    tops, lost = from_replies([first, rows[1] | {"teacher_logprobs": logprobs_of(*" quick")}], examples, tokenizer)
    assert lost == 1
    assert (tops[0][0][0] >= 0).any()
    assert (tops[1][0] == -1).all()
    with pytest.raises(CacheError, match="1 of 2 responses are cut into other tokens by the tokenizer"):
        from_replies([first, rows[1] | {"teacher_logprobs": logprobs_of(*" quick", step=1)}], examples, tokenizer)
    with pytest.raises(CacheError, match="2 of 2 responses"):
        from_replies([row | {"teacher_logprobs": logprobs_of(*" quick")} for row in rows], examples, tokenizer)


def test_prompt_logprobs_are_stored_one_position_earlier(server: Server, tmp_path: Path, local: LocalModel, folder: Path) -> None:
    rows = tiny.rows(8)
    examples = load_examples(rows, local.tokenizer)
    tops = score(server.model(api="completions"), examples, 4, tmp_path / "log")
    for example, (ids, logprobs) in zip(examples, tops, strict=True):
        assert ids.shape == logprobs.shape == (len(example.teacher_scored), 5)
        # The server lists the token itself first, then 0, 1, 2, 3.
        scored = np.array([example.teacher_ids[u + 1] for u in example.teacher_scored])
        assert (ids[:, 0] == scored).all()
        assert np.allclose(logprobs[:, 0], -1.0)
        assert [id for id in ids[0, 1:].tolist() if id >= 0] == [j for j in range(4) if j != scored[0]]
        assert [p for id, p in zip(ids[0], logprobs[0], strict=True) if id >= 0][1:] == [-2.0 - j for j in range(4) if j != scored[0]]
    data, out = tiny.write(tmp_path / "data.jsonl", rows), tmp_path / "cache"
    command = ["cache", "--teacher", "m", "--base-url", server.url, "--tokenizer", folder, "--data", data, "-k", 4, "--out", out]
    result = runner.invoke(cli.app, [str(a) for a in command])
    assert result.exit_code == 0, result.output
    cache = open_cache(out, local.tokenizer, teacher="m")
    targets = cache.targets(view_of(Collator(salt=cache.salt)([(e,) for e in examples]), "teacher_"))
    assert (targets.ids.numpy() == np.concatenate([ids for ids, _ in tops])).all()
    assert KEY not in (tmp_path / "cache.log").read_text() + result.output
    result = runner.invoke(cli.app, [str(a) for a in [*command[:-1], tmp_path / "small", "--vocab-size", 3]])
    assert (result.exit_code, "is not one of 3 tokens" in result.output) == (2, True)


def token_entry(text: str, *others: str, logprob: float | None = -0.1) -> dict[str, Any]:
    """Return a token's entry in a server's list, with ``others`` as less likely alternatives."""
    tokens = [{"token": t, "logprob": -0.1 - 3 * i, "bytes": list(t.encode())} for i, t in enumerate((text, *others))]
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": tokens}


WORD = [token_entry(" quick", " fox", " dog")]


@pytest.mark.parametrize(
    ("end", "probabilities"),
    [
        ([], None),  # no entry for the end
        ([token_entry("", " fox")], None),  # an empty text
        ([{**token_entry("", " fox"), "bytes": None}], None),
        ([token_entry("<|endoftext|>", " fox")], None),  # another token's text
        ([token_entry("</s>", " fox")], [-0.1, -3.1]),
        (
            [{"id": 1, "token": "", "bytes": [], "logprob": -0.2, "top_logprobs": [{"id": 1, "token": "", "bytes": [], "logprob": -0.2}]}],
            [-0.2],
        ),
        ([token_entry("</s>", logprob=None)], [-0.1]),  # its number is only among the alternatives
        ([{**token_entry("</s>"), "logprob": None, "top_logprobs": []}], None),
    ],
)
def test_misreported_end_token_drops_only_that_token(
    end: list[dict[str, Any]], probabilities: list[float] | None, tmp_path: Path, folder: Path
) -> None:
    tokenizer = tiny.tokenizer()
    rows = [{"prompt": "a", "response": " quick", "finish_reason": "stop", "teacher_logprobs": [*WORD, *end]}]
    examples = load_examples(rows, tokenizer)
    tops, lost = from_replies(rows, examples, tokenizer)
    ((ids, logprobs),) = tops
    assert (lost, tokenizer.convert_ids_to_tokens(ids[0, :3].tolist())) == (0, ["Ġquick", "Ġfox", "Ġdog"])
    if probabilities is not None:
        assert ids[1, 0] == tokenizer.eos_token_id
        assert logprobs[1, : len(probabilities)].tolist() == pytest.approx(probabilities)
    assert silent_positions(examples, tops, tokenizer) == ((1, 1) if probabilities is None else (0, 0))
    data = tiny.write(tmp_path / "data.jsonl", rows)
    command = ["cache", "--from-replies", "--tokenizer", folder, "--data", data, "--out", tmp_path / "cache"]
    result = runner.invoke(cli.app, [str(a) for a in command])
    assert result.exit_code == 0, result.output
    warning = "1 of 2 positions have no probabilities, 1 of them ends of responses: distillation teaches nothing there"
    assert (warning in " ".join(result.output.split())) == (probabilities is None)


def test_alternative_with_bytes_of_no_token_stays_in_the_tail() -> None:
    tokenizer = tiny.tokenizer()
    ids_of = TokenIds(tokenizer)
    quick = tokenizer.convert_tokens_to_ids("Ġquick")
    assert ids_of({"token": " quick", "bytes": list(b" quick")}) == quick
    for alternative in (
        {"token": " quick", "bytes": list(b" slow")},
        {"token": "Ġquick", "bytes": list("Ġquick".encode())},  # the token's spelling in the vocabulary, not its bytes
        {"token": "Ã", "bytes": list("Ã".encode())},  # a whole character; in the vocabulary this spelling means half of one
        {"token": "�", "bytes": list("�".encode())},
    ):
        assert ids_of(alternative) is None
    rows = [{"prompt": "a", "response": " quick", "teacher_logprobs": [token_entry(" quick", " fox"), token_entry("</s>")]}] * 20
    rows[0]["teacher_logprobs"][0]["top_logprobs"][1]["bytes"] = list(b" slow")
    with pytest.raises(CacheError, match="alternatives have no token of their own"):
        from_replies(rows[:1], load_examples(rows[:1], tokenizer), tokenizer)


def test_sentencepiece_tokens_are_found_by_their_bytes() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", "▁the", "the", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    ids_of = TokenIds(tokenizer)
    assert ids_of({"token": " the", "bytes": list(b" the")}) == ids_of({"token": " the"}) == pieces.index("▁the")
    assert ids_of({"token": "the", "bytes": list(b"the")}) == pieces.index("the")
    assert ids_of({"token": "�", "bytes": [0xC3]}) == pieces.index("<0xC3>")
    assert ids_of({"token": "</s>", "bytes": list(b"</s>")}) == 1
    assert ids_of({"token": "a", "bytes": [97]}) is None, "two tokens have this byte"
    assert set(ids_of.candidates({"token": "a", "bytes": [97]})) == {pieces.index("a"), pieces.index("<0x61>")}


@pytest.mark.parametrize("wrong", [5, ["a"], [{"token": "a"}], [{"token": " quick", "logprob": -0.1, "top_logprobs": [{"token": 3}]}]])
def test_log_probabilities_of_another_form_raise_with_the_row(wrong: object, tmp_path: Path) -> None:
    data = tiny.write(tmp_path / "data.jsonl", [{"prompt": "a", "response": " quick", "teacher_logprobs": wrong}])
    with pytest.raises(CacheError, match=r"data\.jsonl, row 1, teacher_logprobs: a list is needed of objects with token"):
        from_replies([{"teacher_logprobs": wrong}], load_examples(data, tiny.tokenizer()), tiny.tokenizer())


@pytest.mark.parametrize(
    ("prompt_logprobs", "message"),
    [
        (None, "the server gives no prompt_logprobs"),
        ([None], "it has 1 prompt_logprobs for"),
        ("x", "it has 1 prompt_logprobs"),
        (5, "can't be read"),
    ],
)
def test_unreadable_prompt_logprobs_are_one_error(prompt_logprobs: object, message: str, tmp_path: Path) -> None:
    body = json.dumps({"choices": [{"text": "", "prompt_logprobs": prompt_logprobs}]}).encode()
    model = ScriptedModel(lambda request: body, api="completions")
    with pytest.raises(HTTPModelError, match=message):
        score(model, load_examples(tiny.rows(3), tiny.tokenizer()), 4, tmp_path / "log")
    assert len(model.requests) == 1


def test_non_numeric_prompt_logprobs_go_to_the_tail(tmp_path: Path) -> None:
    example = load_examples([{"prompt": "a", "response": " quick"}], tiny.tokenizer())[0]
    table = [None, *({"5": {"logprob": None}, "6": {"logprob": -1.0}, str(2**40): {"logprob": -2.0}} for _ in example.teacher_ids[1:])]
    table[-1] = None
    body = json.dumps({"choices": [{"text": "", "prompt_logprobs": table}]}).encode()
    ((ids, _),) = score(ScriptedModel(lambda request: body, api="completions"), [example], 4, tmp_path / "log")
    assert ids[:, 0].tolist() == [6] * (len(ids) - 1) + [-1]
    assert (ids[:, 1:] == -1).all()


def test_entry_of_several_tokens_has_the_probabilities_of_the_last() -> None:
    """llama.cpp sends a character once it is whole: its text with the id and the alternatives of its last token."""
    tokenizer = tiny.tokenizer()
    rows = [{"prompt": "a", "response": " quick\N{GLOWING STAR} fox", "finish_reason": "length"}]
    examples = load_examples(rows, tokenizer)
    quick, *star, fox = (examples[0].teacher_ids[u + 1] for u in examples[0].teacher_scored)
    assert len(star) == 4
    whole = token_entry("\N{GLOWING STAR}", "x")
    for entry, missing in ((whole | {"id": star[-1]}, 3), (whole, 4), (whole | {"id": fox}, 4)):
        logprobs = [token_entry(" quick"), entry | {"top_logprobs": [{"token": "x", "logprob": -3.0}]}, token_entry(" fox")]
        tops, lost = from_replies([rows[0] | {"teacher_logprobs": logprobs}], examples, tokenizer)
        assert (lost, silent_positions(examples, tops, tokenizer)) == (0, (missing, 0))
        ids = tops[0][0]
        assert (ids[0, 0], ids[-1, 0]) == (quick, fox)
        if missing == 3:
            assert ids[4, 0] == star[-1]
    with pytest.raises(CacheError, match="1 of 1 responses are cut into other tokens"):
        from_replies(
            [rows[0] | {"teacher_logprobs": [token_entry(" quick"), token_entry("\N{WHITE MEDIUM STAR}"), token_entry(" fox")]}],
            examples,
            tokenizer,
        )


def test_byte_level_tokenizer_without_some_bytes_finds_tokens() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["</s>", "a", "\u0120a", "\u00c3", "\u00a9"]
    backend = Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, []))
    backend.decoder = decoders.ByteLevel()
    ids_of = TokenIds(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    assert ids_of({"token": " a"}) == 2
    assert ids_of({"token": "\ufffd", "bytes": [0xC3]}) == 3
    assert ids_of.spelling({"token": "\u00e9", "bytes": list("\u00e9".encode())}, [3, 4]) == 2
