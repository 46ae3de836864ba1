"""Replies of HTTP servers: parsing, retries, errors, secrets, and the files written from them."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from serving import KEY, ScriptedModel, chat_reply, requests, stream

pytest.importorskip("rapidfuzz")  # near-duplicates; part of the extra [train]

from kdkernels.data.ending import ended
from kdkernels.data.tokenization import load_examples
from kdkernels.recipes.rows import Item
from kdkernels.recipes.sequence import sequence_level
from kdkernels.support.errors import listed
from kdkernels.support.files import FileError
from kdkernels.teachers import answers, http
from kdkernels.teachers.generate import requests_of, with_reply
from kdkernels.teachers.http import HTTPModel, HTTPModelError, Refused
from kdkernels.teachers.jobs import generate
from kdkernels.teachers.local import LocalModel
from kdkernels.teachers.reasoning import MARKS, opens_thoughts, read_generated, split_thoughts
from kdkernels.teachers.replies import fingerprint
from kdkernels.teachers.secret import Secret
from kdkernels.teachers.text import Reply, Request


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def ask(body: Any, tmp_path: Path, logprobs: int = 0, **options: Any) -> tuple[Reply, ScriptedModel]:
    model = ScriptedModel(body if callable(body) else lambda request: body, **options)
    (reply,) = model.complete(requests(["q"], logprobs=logprobs), tmp_path / "log")
    return reply, model


# Text and reasoning


@pytest.mark.parametrize(
    ("body", "text", "reasoning"),
    [
        (chat_reply([{"type": "text", "text": "a"}, {"type": "output_text", "text": "b"}]), "ab", ""),
        (chat_reply(["a", {"text": "b"}]), "ab", ""),
        (chat_reply([{"type": "thinking", "thinking": [{"type": "text", "text": "so"}]}, {"type": "text", "text": "4"}]), "4", "so"),
        (
            chat_reply([{"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]}, {"type": "text", "text": "4"}]),
            "4",
            "so",
        ),
        (chat_reply([{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "4"}]), "4", ""),
        (chat_reply("4", message={"reasoning_content": "so"}), "4", "so"),
        (chat_reply("4", message={"reasoning": "so", "reasoning_content": "so"}), "4", "so"),
        (chat_reply("4", message={"thinking": [{"type": "text", "text": "so"}]}), "4", "so"),
        (chat_reply(None, "length", {"reasoning_content": "so"}), "", "so"),
        (chat_reply("<think>\nso\n</think>\n\n4"), "4", "so"),
        (chat_reply("so\n</think>\n\n4"), "4", "so"),
        (chat_reply("[THINK]so[/THINK]4"), "4", "so"),
        (chat_reply("<think></think>\n4"), "4", ""),
        (chat_reply("<think>so", "length"), "", "so"),
        (chat_reply(None, message={"refusal": "I can't."}), "I can't.", ""),
        (chat_reply(None, "content_filter"), "", ""),
        (b"\xef\xbb\xbf" + chat_reply("4"), "4", ""),
        (b" \n\n" + chat_reply("4"), "4", ""),
        (json.dumps({"choices": [{"text": "4", "finish_reason": "stop"}], "usage": [1]}).encode(), "4", ""),
        (chat_reply("a \ud83d\ude00 b"), "a \N{GRINNING FACE} b", ""),
        (chat_reply("a \ud83d b"), "a \ufffd b", ""),
    ],
)
def test_text_and_reasoning_are_read_from_every_form_of_reply(body: bytes, text: str, reasoning: str, tmp_path: Path) -> None:
    reply, model = ask(body, tmp_path)
    assert (reply.text, reply.reasoning, len(model.requests)) == (text, reasoning, 1)
    assert model.usage.reasoning == bool(reasoning)
    again, model = ask(body, tmp_path)
    assert (again, len(model.requests), model.usage.reasoning) == (reply, 0, bool(reasoning)), "the log holds text and reasoning"


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


END = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}


@pytest.mark.parametrize(
    "body",
    [
        stream(delta(role="assistant"), delta(reasoning_content="s"), delta(reasoning_content="o"), delta(content="ye"), delta(content="s"),
               END, USAGE),
        b": a comment\n\n" + stream(delta(reasoning="so"), delta(content="yes"), END, USAGE, end=""),
        stream(delta(reasoning="so"), delta(content="yes"), END, USAGE).replace(b"\n", b"\r\n"),
        stream(delta(content="<think>s"), delta(content="o</think>"), delta(content="yes"), END, USAGE).replace(b"data: ", b"id:\ndata:"),
        stream(delta(content=[{"type": "thinking", "thinking": "so"}]), delta(content=[{"type": "text", "text": "yes"}]), END, USAGE),
        stream(delta(content="y"), {"choices": [{"message": {"content": "yes", "reasoning": "so"}, "finish_reason": "stop"}]}, USAGE),
    ],
)  # fmt: skip
def test_unrequested_stream_is_parsed(body: bytes, tmp_path: Path) -> None:
    reply, model = ask(body, tmp_path)
    assert (reply.text, reply.reasoning, reply.finish_reason, len(model.requests)) == ("yes", "so", "stop", 1)
    assert (reply.prompt_tokens, reply.completion_tokens) == (3, 2)


def test_a_stream_of_completions_keeps_log_probabilities(tmp_path: Path) -> None:
    table = {"tokens": ["y"], "token_logprobs": [-0.5], "top_logprobs": [{"y": -0.5, "n": -1.5}], "text_offset": [0]}
    first, last = {"text": "y", "logprobs": table, "finish_reason": None}, {"text": "", "logprobs": None, "finish_reason": "length"}
    reply, _ = ask(stream({"choices": [first]}, {"choices": [last]}), tmp_path, logprobs=2)
    assert (reply.text, reply.finish_reason) == ("y", "length")
    assert [a["token"] for a in reply.logprobs[0]["top_logprobs"]] == ["y", "n"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"{}", b'{"choices": []}', b'{"choices": null}', b"\xff{}", b"<html>", b'{"choices":' + b"[" * 9000,
        stream(delta(content="ye"), end=""), stream(delta(content="ye"), end="data: {\"cho"), stream(end=""),
        b'{"error": {"message": "try later"}}', b'{"error": {"code": 503, "message": "busy"}}', b'{"error": "overloaded"}',
        chat_reply("ye", "abort"), chat_reply("ye", "error"), chat_reply(None, "insufficient_system_resource"),
    ],
)  # fmt: skip
def test_incomplete_reply_is_requested_again(body: bytes, tmp_path: Path) -> None:
    bodies = [chat_reply(), body, body]
    reply, model = ask(lambda request: bodies.pop(), tmp_path)
    assert (reply.text, reply.finish_reason, len(model.requests), model.usage.retries) == ("yes", "stop", 3, 2)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[1]", "an object is needed, and it is a list"),
        (b"7", "it is a int"),
        (b'{"choices": {"a": 1}}', "choices must be a list of objects"),
        (b'{"choices": [7]}', "choices must be a list of objects"),
        (b'{"choices": [{"message": "yes"}]}', "message must be an object"),
        (b'{"choices": [{"finish_reason": "stop"}]}', "there is no text"),
        (chat_reply(7), "content must be text or a list of parts, and it is a int"),
        (chat_reply([7]), "a part of content must be text or an object"),
        (chat_reply([{"type": "image_url", "image_url": {"url": "x"}}]), "'image_url', which is not text"),
        (chat_reply(None, "tool_calls", {"tool_calls": [{"function": {"name": "f"}}]}), "it calls tools, and only text is kept"),
        (chat_reply("Let me see.", "tool_calls", {"function_call": {"name": "f"}}), "it calls tools, and only text is kept"),
        (chat_reply("4", message={"reasoning": 7}), "reasoning must be text"),
        (stream([7]), "an event of the stream must be an object"),
        (stream({"choices": [{"delta": "yes", "finish_reason": "stop"}]}), "delta of an event must be an object"),
        (chat_reply(json.loads("[" * 400 + "]" * 400)), "a part of content must be text or an object"),
    ],
)
def test_unreadable_reply_is_one_error_after_one_request(body: bytes, message: str, tmp_path: Path) -> None:
    model = ScriptedModel(lambda request: body)
    with pytest.raises(HTTPModelError, match=r"request 'row 0': the reply can't be read: ") as error:
        model.complete(requests(["q"] * 3), tmp_path / "log")
    assert message in str(error.value)
    assert "The server sent: " in str(error.value)
    assert len(model.requests) == 1


def test_unreadable_reply_is_skipped_with_skip_refused(tmp_path: Path) -> None:
    bodies = {"a": chat_reply("yes"), "b": chat_reply(7), "c": chat_reply("no")}
    model = ScriptedModel(lambda request: bodies[request["messages"][0]["content"]], skip_refused=True)
    assert [reply.finish_reason for reply in model.complete(requests("abc"), tmp_path / "log")] == ["stop", "refused", "stop"]
    assert "content must be text" in model.usage.reasons["row 1"]


def test_too_large_reply_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "LARGEST_REPLY", 5000)
    assert ask(chat_reply("x" * 4000), tmp_path)[0].text == "x" * 4000
    model = ScriptedModel(lambda request: chat_reply("x" * 6000))
    with pytest.raises(HTTPModelError, match="larger than 5,000 bytes"):
        model.complete(requests(["q"]), tmp_path / "other")
    assert len(model.requests) == 1
    with pytest.raises(HTTPModelError, match="the server refuses") as error:
        ScriptedModel(lambda request: (400, b"x" * 10**6)).complete(requests(["q"]), tmp_path / "third")
    assert len(str(error.value)) < 1000


# Log-probabilities


def test_both_forms_of_log_probabilities_are_read_from_both_interfaces(tmp_path: Path) -> None:
    chat_logprobs = {
        "content": [{"token": " a", "id": 5, "bytes": [32, 97], "logprob": -0.5, "top_logprobs": [{"token": "b", "logprob": -2}]}]
    }
    completions_logprobs = {"tokens": [" a"], "token_logprobs": [-0.5], "top_logprobs": [{"b": -2}]}
    for number, (logprobs, id_and_bytes) in enumerate(((chat_logprobs, {"id": 5, "bytes": [32, 97]}), (completions_logprobs, {}))):
        expected = [{"token": " a", "logprob": -0.5, **id_and_bytes, "top_logprobs": [{"token": "b", "logprob": -2.0}]}]
        completion = json.dumps({"choices": [{"text": " a", "finish_reason": "stop", "logprobs": logprobs}]}).encode()
        for api, body in (("chat", chat_reply(" a", logprobs=logprobs)), ("completions", completion)):
            reply, _ = ask(body, tmp_path / f"{api}{number}", logprobs=1, api=api)
            assert reply.logprobs == expected


def test_invalid_numbers_drop_only_their_tokens(tmp_path: Path) -> None:
    body = (
        b'{"choices": [{"message": {"content": "ab"}, "finish_reason": "stop", "logprobs": {"content": ['
        b'{"token": "a", "logprob": null, "top_logprobs": [{"token": "a", "logprob": -Infinity}, {"token": "b", "logprob": -1}]},'
        b'{"token": "b", "logprob": NaN, "top_logprobs": null}, {"token": null, "bytes": "x", "logprob": -' + b"9" * 400 + b"}]}}],"
        b'"usage": {"prompt_tokens": 1e999, "completion_tokens": -3}}'
    )
    reply, model = ask(body, tmp_path, logprobs=2)
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens, len(model.requests)) == ("ab", 0, 0, 1)
    assert [token["logprob"] for token in reply.logprobs] == [None] * 3
    assert [token["top_logprobs"] for token in reply.logprobs] == [[{"token": "b", "logprob": -1.0}], [], []]


@pytest.mark.parametrize("logprobs", [None, {}, {"content": None}, {"tokens": []}])
def test_missing_log_probabilities_raise_at_the_first_reply(logprobs: object, tmp_path: Path) -> None:
    model = ScriptedModel(lambda request: chat_reply("yes", logprobs=logprobs), skip_refused=True)
    with pytest.raises(HTTPModelError, match="gives no log-probabilities with its text: ask without --logprobs"):
        model.complete(requests(["q"] * 3, logprobs=2), tmp_path / "log")
    assert len(model.requests) == 1
    assert ask(chat_reply("", logprobs=None), tmp_path / "empty", logprobs=2)[0].logprobs == [], "an empty text has no log-probabilities"


# Random replies

texts = st.text(max_size=12) | st.sampled_from(["<think>", "</think>", "\ud83d", KEY, "stop", "error", "[DONE]"])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | texts,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "thinking", "token", "logprob", "bytes", "id", "content", "top_logprobs"]), inner
        )
    ),
    max_leaves=6,
)


def with_some(**fields: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Generate objects in which each field has a value of its own strategy, or any value, or is missing."""
    return st.fixed_dictionaries({}, optional={name: field | values for name, field in fields.items()})


tokens = st.lists(with_some(token=texts, logprob=st.floats(-5, 0), top_logprobs=st.lists(with_some(token=texts, logprob=st.floats()))))
columns = {
    "tokens": st.lists(texts),
    "token_logprobs": st.lists(st.floats()),
    "top_logprobs": st.lists(st.dictionaries(texts, st.floats())),
}
choices = with_some(
    message=with_some(content=texts, reasoning_content=texts, reasoning=texts, refusal=texts, tool_calls=values),
    text=texts,
    finish_reason=texts,
    logprobs=with_some(content=tokens, **columns),
)
replies = with_some(choices=st.lists(choices, max_size=2), usage=with_some(prompt_tokens=st.integers(), completion_tokens=st.integers()))


@settings(max_examples=60, deadline=None)
@given(answer=replies | values, streamed=st.booleans(), logprobs=st.sampled_from([0, 2]), api=st.sampled_from(["chat", "completions"]))
def test_random_server_output_is_a_reply_or_one_error(
    answer: Any, streamed: bool, logprobs: int, api: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    body = stream(answer) if streamed else json.dumps(answer).encode()
    model = ScriptedModel(lambda request: body, api=api)
    readable = True
    try:
        answers.read_reply(answers.parse(body), logprobs)
    except (answers.Incomplete, answers.ServerError):
        readable = False
    except answers.Unreadable:
        pass
    try:
        (reply,) = model.complete(requests(["q"], logprobs=logprobs), folder / "log")
    except HTTPModelError as error:
        text = str(error)
        assert "row 0" in text or "log-probabilities" in text
        assert KEY not in text
    else:
        rows = [json.loads(line) for line in (folder / "log").read_bytes().splitlines()]
        assert KEY not in json.dumps(rows, ensure_ascii=False) + repr(reply)
        choice = {} if streamed else answer["choices"][0]
        message = choice.get("message") or {}
        text = message.get("content") if "message" in choice and message != {} else choice.get("text")
        if isinstance(text, str) and text and not any(mark in text for pair in MARKS for mark in pair):
            assert reply.text == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace(KEY, "[key]")
    if readable and not model.usage.interrupted:
        assert len(model.requests) == 1, "a reply that parses is paid for once"


# Finish reasons


@pytest.mark.parametrize("reason", ["length", "content_filter", "max_tokens", "SAFETY", "stopped", None, "", 7, "st\ud83dop"])
def test_end_of_a_cut_reply_is_not_learnt(reason: object, tmp_path: Path) -> None:
    reply, model = ask(chat_reply("the quick", reason), tmp_path)
    assert len(model.requests) == 1
    assert not ended(reply.finish_reason)
    tokenizer = tiny.tokenizer()
    (example,) = load_examples([with_reply({"prompt": "a"}, reply)], tokenizer)
    assert example.student_ids[-1] != tokenizer.eos_token_id


@pytest.mark.parametrize("reason", ["stop", "STOP", "eos_token", "end_turn", "stop_sequence"])
def test_end_of_a_complete_reply_is_learnt(reason: str, tmp_path: Path) -> None:
    reply, _ = ask(chat_reply("the quick", reason), tmp_path)
    tokenizer = tiny.tokenizer()
    (example,) = load_examples([with_reply({"prompt": "a"}, reply)], tokenizer)
    assert example.student_ids[-1] == tokenizer.eos_token_id


def test_reply_cut_at_every_attempt_is_kept_and_logged_as_cut(tmp_path: Path) -> None:
    reply, model = ask(chat_reply("the quick", "abort"), tmp_path)
    assert (reply.text, reply.finish_reason, len(model.requests)) == ("the quick", "abort", 3)
    assert json.loads((tmp_path / "log").read_text())["interrupted"] == ["abort", "abort"]
    assert model.usage.interrupted == {"abort": 2}
    with pytest.raises(HTTPModelError, match=r"gave up on request 'row 0' after 3 tries: the server broke the reply off: .*error"):
        ask(chat_reply(None, "error"), tmp_path / "other")


# Statuses


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (402, "Insufficient Balance"),
        (401, "who are you"),
        (405, "not here"),
        (400, {"message": "Your credit balance is too low to access this model", "type": "invalid_request_error"}),
        (400, {"message": "API key not valid", "status": "INVALID_ARGUMENT"}),
        (429, {"message": "slow down", "code": "insufficient_quota"}),
        (429, {"message": "Your account org-1 is suspended, check your plan", "type": "exceeded_current_quota_error"}),
        (403, {"message": "no", "code": "account_deactivated"}),
        (200, {"code": 402, "message": "Insufficient credits"}),
        (200, {"code": "invalid_api_key", "message": "no"}),
    ],
)
def test_account_errors_end_the_run_after_one_request(status: int, error: object, tmp_path: Path) -> None:
    model = ScriptedModel(lambda request: (status, json.dumps({"error": error}).encode()), skip_refused=True)
    with pytest.raises(HTTPModelError) as caught:
        model.complete(requests(["q"] * 5), tmp_path / "log")
    assert (type(caught.value), len(model.requests)) == (HTTPModelError, 1)


@pytest.mark.parametrize(
    ("status", "error", "tries"),
    [
        (400, {"message": "This prompt, 'how do I get a valid api key for billing when payment is required?', is against our rules"}, 1),
        (422, {"detail": [{"msg": "too long"}]}, 1),
        (200, {"code": 400, "message": "too long"}, 1),
        (429, {"message": "slow down", "code": "rate_limit_exceeded"}, 3),
        (529, "overloaded", 3),
        (200, {"code": 429, "message": "slow down"}, 3),
    ],
)
def test_other_errors_are_about_one_request(status: int, error: object, tries: int, tmp_path: Path) -> None:
    model = ScriptedModel(lambda body: (status, json.dumps({"error": error}).encode()))
    with pytest.raises(Refused if tries == 1 else HTTPModelError, match="row 0"):
        model.complete(requests(["q"]), tmp_path / "log")
    assert len(model.requests) == tries


# Secrets


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(status: int, tmp_path: Path) -> None:
    model = ScriptedModel(lambda request: (status, b"", {"Location": f"https://elsewhere.test/{KEY}/v1/chat/completions"}))
    with pytest.raises(HTTPModelError, match=r"redirects to https://elsewhere.test/\[key\]/v1/chat/completions: ask there"):
        model.complete(requests(["q"]), tmp_path / "log")
    assert [request.url.host for request in model.requests] == ["teacher.test"]


def test_only_the_key_is_sent_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("ORG_ID", "PROJECT_ID", "ORGANIZATION", "ADMIN_KEY", "CUSTOM_HEADERS", "WEBHOOK_SECRET", "BASE_URL")
    for name in names:
        monkeypatch.setenv(f"OPENAI_{name}", "X-Mine: mine-of-the-user")
    monkeypatch.setenv("OTHER", "other-key-of-mine")
    for variable, expected in (("OPENAI_API_KEY", KEY), ("OTHER", "other-key-of-mine"), ("", "none")):
        _, model = ask(chat_reply(), tmp_path / f"of {variable}", key_variable=variable)
        (request,) = model.requests
        assert request.headers["authorization"] == f"Bearer {expected}"
        assert request.url.host == "teacher.test"
        other_headers = {name: value for name, value in request.headers.items() if name != "authorization"}
        assert "mine" not in str(other_headers)
        assert KEY not in str(other_headers)
    monkeypatch.setenv("OTHER", f" {KEY}\n")
    assert (
        ask(chat_reply(), tmp_path / "with a line break", key_variable="OTHER")[1].requests[0].headers["authorization"] == f"Bearer {KEY}"
    )
    monkeypatch.setenv("OTHER", "sk-one\nsk-two")
    with pytest.raises(HTTPModelError, match="the key in OTHER holds a character that a header can't") as error:
        ask(chat_reply(), tmp_path / "of two lines", key_variable="OTHER")
    assert "sk-" not in str(error.value)


FORMS: dict[str, Callable[[str], str]] = {
    "plain": lambda key: key,
    "escaped for JSON": lambda key: key.replace("-", "\\u002d"),
    "escaped twice": lambda key: json.dumps(json.dumps(key.replace("-", "\\u002D"))),
    "after backslashes": lambda key: key.replace("-", "\\-"),
    "in a URL": lambda key: quote(key.replace("-", "/"), safe="").replace("%2F", "%2d"),
    "in HTML": lambda key: "".join(f"&#{ord(c)};" for c in key),
    "in hexadecimal HTML": lambda key: html.escape(key).replace("s", "&#x73;"),
    "in base64": lambda key: base64.b64encode(key.encode()).decode(),
    "in base64 of a header": lambda key: base64.b64encode(f"user:{key}".encode()).decode(),
    "in base64 for URLs": lambda key: base64.urlsafe_b64encode(f"x{key}?".encode()).decode(),
    "in hexadecimal digits": lambda key: key.encode().hex().upper(),
    "over two lines": lambda key: key[:9] + "\n  " + key[9:],
    "with characters of no width": lambda key: "\u200b".join(key),
    "in UTF-16": lambda key: key.encode("utf-16-be").decode("latin-1"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["text", "reasoning", "parts", "finish_reason", "stream", "tokens", "error", "unreadable"])
def test_echoed_api_key_is_never_written_or_shown(form: str, place: str, tmp_path: Path) -> None:
    echo = FORMS[form](KEY)
    parts = [{"type": "text", "text": echo[:7]}, {"type": "text", "text": echo[7:]}]
    table = [
        {"token": piece, "logprob": -0.5, "top_logprobs": [{"token": echo, "logprob": -1}]} for piece in (echo[:7], echo[7:12], echo[12:])
    ]
    body: Any = {
        "text": chat_reply(f"You said {echo}."), "reasoning": chat_reply("x", message={"reasoning": f"so {echo}"}),
        "parts": chat_reply(parts), "finish_reason": chat_reply("x", echo),
        "stream": stream(*(delta(content=letter) for letter in echo), END), "tokens": chat_reply("x", logprobs={"content": table}),
        "error": (400, json.dumps({"error": {"message": echo}}).encode()), "unreadable": chat_reply([{"type": echo}]),
    }[place]  # fmt: skip
    shown = ""
    try:
        reply, _ = ask(body, tmp_path, logprobs=2 if place == "tokens" else 0)
        shown = repr(reply) + "".join(str(t["token"]) for t in reply.logprobs)
    except HTTPModelError as error:
        shown = str(error)
    output = shown + (tmp_path / "log").read_text()
    assert echo not in output
    assert json.dumps(echo)[1:-1] not in output
    assert "[key]" in output
    assert KEY[4:] not in output


def test_redaction_leaves_text_without_the_key_unchanged() -> None:
    secret = Secret(KEY)
    for text in ("", KEY[:-1], "sk-very", "a text about keys, sk-other-0123456789", "x" * 10_000):
        assert secret.redact(text) == text
    assert Secret("EMPTY").redact("an EMPTY word") == "an EMPTY word"
    token = {"token": "sk", "logprob": -1.0, "bytes": list(b"sk"), "top_logprobs": [{"token": "a", "logprob": -1.0}]}
    assert secret.redact_entry({"text": "sk", "logprobs": [token]}) == {"text": "sk", "logprobs": [token]}
    spelled = [{"token": "?", "bytes": [byte], "logprob": -1.0, "top_logprobs": []} for byte in KEY.encode()]
    assert {t["token"] for t in secret.redact_entry({"logprobs": spelled})["logprobs"]} == {"[key]"}


# Reasoning of local models


@pytest.mark.parametrize(("opening", "closing"), MARKS)
def test_reasoning_is_split_by_the_marks_of_each_model(opening: str, closing: str) -> None:
    assert split_thoughts(f"{opening}\nso\n{closing}\n\n4") == ("so", "4")
    assert split_thoughts(f"so{closing}4") == ("so", "4")
    assert split_thoughts(f"{opening}so") == ("so", "")
    assert split_thoughts("so", opened=True) == ("so", "")
    assert opens_thoughts(f"<|assistant|>{opening}\n")
    for text in ("4", "", f"A mark is {opening} and {closing}."):
        assert split_thoughts(text) == ("", text)
    assert not opens_thoughts(f"{opening}{closing}\n\n")


def test_reasoning_between_special_tokens_is_kept() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})

    def read(text: str, opened: bool = False) -> tuple[str, str]:
        return read_generated(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], opened)

    assert "think" not in tokenizer.decode(tokenizer("<think>so</think>4")["input_ids"], skip_special_tokens=True), (
        "decoding drops the marks"
    )
    assert read("<think>so <pad></think> 4<pad>") == ("so ", "4")
    assert read("so</think>4") == ("so", "4")
    assert read("the quick", opened=True) == ("the quick", "")
    assert read("the quick<pad>") == ("", "the quick")


def test_reasoning_opened_by_the_template_is_kept(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<s>assistant: ", "<s>assistant: <think>\n")
    model = LocalModel(tiny.model(len(tokenizer)), tokenizer)
    (reply,) = model.complete(requests(["the"], max_tokens=4), tmp_path / "log")
    assert (reply.text, bool(reply.reasoning), model.usage.reasoning) == ("", True, 1)
    assert model.complete(requests(["the"], max_tokens=4), tmp_path / "log") == [reply]


# Rows


def test_a_reply_replaces_every_field_of_the_old_response() -> None:
    row = {"prompt": "q", "id": 3, "completion": "old", "reasoning": "old", "teacher_logprobs": [{}], "finish_reason": "length"}
    assert with_reply(row, Reply("k", "4")) == {"prompt": "q", "id": 3, "response": "4", "finish_reason": "stop"}
    assert with_reply(row, Reply("k", "4", reasoning="so"))["reasoning"] == "so"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "cut \ud83d"}, r"data.jsonl, row 2: field 'prompt': the text holds \\ud83d, half of a surrogate pair"),
        ({"prompt": "a", "teacher_prompt": "\ude00"}, r"row 2: field 'teacher_prompt': .*ude00"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "row 2: field 'messages': .*half"),
        ({"messages": 5}, r"row 2: field 'messages': a list of .*role.* is needed"),
        ({"messages": ["a"]}, r"row 2: field 'messages': a list of .*role.* is needed"),
    ],
)
def test_invalid_prompt_raises_before_any_request(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    data = tiny.write(tmp_path / "data.jsonl", [{"prompt": "good"}, row])
    model = ScriptedModel(lambda request: chat_reply())
    with pytest.raises(ValueError, match=message):
        generate(model, data, tmp_path / "out.jsonl", Console(file=StringIO()), 8, 0.0, (), 0)
    assert not model.requests
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        model.complete([Request("k", [{"role": "user", "content": "x"}], stop=("\ud83d",))], tmp_path / "log")


def test_other_fields_of_a_row_are_written_escaped(tmp_path: Path) -> None:
    fields = {"note": "cut \ud83d", "key": "\ude00", "control": "\x00\x1b[2J\x85\u2028"}
    data = tiny.write(tmp_path / "data.jsonl", [{"prompt": "good", **fields}])
    for _ in range(2):
        model = ScriptedModel(lambda request: chat_reply("yes\u2028\x9b"))
        generate(model, data, tmp_path / "out.jsonl", Console(file=StringIO()), 8, 0.0, (), 0)
    assert not model.requests, "the log finds the reply of a row with this key"
    (line,) = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {"prompt": "good", **fields, "response": "yes\u2028\x9b", "finish_reason": "stop"}


def test_refusal_of_every_row_for_one_reason_suggests_checking_options(tmp_path: Path) -> None:
    def error(rows: list[dict[str, Any]], *answers: bytes) -> str:
        data = tiny.write(tmp_path / "data.jsonl", rows)
        model = ScriptedModel(lambda request: (400, answers[len(model.requests) % len(answers)]))
        with pytest.raises(Refused) as refused:
            generate(model, data, tmp_path / "out.jsonl", Console(file=StringIO()), 8, 0.0, (), 0)
        return str(refused.value)

    rows = [{"prompt": "a"}, {"prompt": "b"}]
    unknown, long = (b'{"error": {"message": "%s"}}' % message for message in (b"no model m here.", b"too long"))
    same_reason = error(rows, unknown)
    assert "no model m here. " in same_reason, "one full stop"
    assert same_reason.endswith("as every row has the same reason, check --model and the other options")
    assert error(rows, unknown, long).endswith("take them out of the data, or give --skip-refused")
    assert error(rows[:1], unknown).endswith("take them out of the data, or give --skip-refused")


def test_skipped_rows_are_listed(tmp_path: Path) -> None:
    rows = [{"prompt": f"{'no' if number % 2 else 'yes'} {number}"} for number in range(1, 61)]
    data, out = tiny.write(tmp_path / "data.jsonl", rows), tmp_path / "out.jsonl"

    def answer(request: dict[str, Any]) -> Any:
        return (400, b'{"error": {"message": "against the rules"}}') if "no" in request["messages"][0]["content"] else chat_reply()

    def run(**options: Any) -> str:
        output = StringIO()
        generate(ScriptedModel(answer, **options), data, out, Console(file=output, width=400), 8, 0.0, (), 0)
        return output.getvalue()

    with pytest.raises(Refused) as error:
        run()
    first = ", ".join(str(number) for number in range(1, 40, 2))
    assert f"refuses 30 of 60 requests; {data}, rows {first}: 400: against the rules; and 10 more. " in str(error.value)
    assert f"{out}.left-out.jsonl lists them: take them out of the data, or give --skip-refused" in str(error.value)
    listing = tmp_path / "out.jsonl.left-out.jsonl"
    listed_rows = [json.loads(line) for line in listing.read_text().splitlines()]
    assert [row["where"] for row in listed_rows] == [f"{data}, row {number}" for number in range(1, 61, 2)]
    assert {row["reason"] for row in listed_rows} == {"400: against the rules"}
    listing.unlink()
    assert f"30 rows, 30 refused and left out: see {listing}" in run(skip_refused=True)
    assert len(listing.read_text().splitlines()) == 30
    tiny.write(data, rows[1::2])
    run()
    assert not listing.exists(), "no row is left out now"
    listing.write_text('{"where": "of the user"}\n')
    with pytest.raises(FileError, match="is not of this command"):
        run()
    assert listing.read_text() == '{"where": "of the user"}\n'


def test_abandoned_request_names_its_row(tmp_path: Path) -> None:
    data = tiny.write(tmp_path / "data.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    model = ScriptedModel(lambda request: (503, b"no") if request["messages"][0]["content"] == "b" else chat_reply())
    with pytest.raises(HTTPModelError, match=r"gave up on .*data\.jsonl, row 2 after 3 tries: 503: no"):
        generate(model, data, tmp_path / "out.jsonl", Console(file=StringIO()), 8, 0.0, (), 0)


def test_summary_counts_cut_reasoning_and_interrupted_replies(tmp_path: Path) -> None:
    bodies = [chat_reply("d"), chat_reply("c", "content_filter"), chat_reply("b", "abort"), chat_reply("a", "length", {"reasoning": "so"})]
    data, output = tiny.write(tmp_path / "data.jsonl", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]), StringIO()
    generate(ScriptedModel(lambda request: bodies.pop()), data, tmp_path / "out.jsonl", Console(file=output, width=400), 8, 0.0, (), 0)
    assert "2 responses did not end by themselves (finish_reason length: 1, content_filter: 1; " in output.getvalue()
    assert "length is --max-tokens 8" in output.getvalue()
    assert "3 replies (0 from the log), 1 retries, 1 with reasoning, " in output.getvalue()
    assert "1 replies were broken off by the server and asked again (abort: 1)" in output.getvalue()


def test_unreachable_server_is_named_with_its_address(tmp_path: Path) -> None:
    data, output = tiny.write(tmp_path / "data.jsonl", [{"prompt": "a"}]), StringIO()
    model = HTTPModel("http://127.0.0.1:9/v1", "m", retries=2, backoff=0.0)
    with pytest.raises(HTTPModelError, match=r"row 1 after 3 tries: no connection, .*http://127\.0\.0\.1:9/v1"):
        generate(model, data, tmp_path / "out.jsonl", Console(file=output, width=400), 8, 0.0, (), 0)
    assert output.getvalue().count("waiting: no connection") == 1
    assert "http://127.0.0.1:9/v1" in output.getvalue()


@pytest.mark.parametrize(
    ("base_url", "message"),
    [("http://localhost:99999/v1", "ort"), ("http://localhost:abc/v1", "ort"), ("http://[::1/v1", "IPv6"), ("ftp://x/v1", "such as")],
)
def test_invalid_address_raises(base_url: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"base_url must be a URL.*{message}"):
        HTTPModel(base_url, "m")


@pytest.mark.parametrize("extra_body", [{"n": 2}, {"best_of": 4}, {"x": float("nan")}, {"x": object()}])
def test_invalid_extra_body_raises(extra_body: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="extra_body"):
        HTTPModel("http://localhost/v1", "m", extra_body=extra_body)


# Proxies, and logs of earlier versions


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTP_PROXY", "gopher://u:hunter2@127.0.0.1:9"), ("ALL_PROXY", "\x1b[2J"), ("SSL_CERT_FILE", "/nonexistent"),
        ("HTTPS_PROXY", "http://u:hunter2@127.0.0.1:99999"), ("ALL_PROXY", "http://127.0.0.1:-1"),
    ],
)  # fmt: skip
def test_a_proxy_that_cannot_be_used_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(HTTPModelError, match="a proxy or certificate of the environment can't be used") as error:
        HTTPModel("http://127.0.0.1:9/v1", "m").complete(requests(["a"]), tmp_path / "log")
    assert "hunter2" not in str(error.value)


def test_log_of_an_earlier_version_matches_its_rows(tmp_path: Path) -> None:
    request = Request("row 0", [{"role": "user", "content": "How far is the moon?"}], 32, 0.5, ("\n",), 2, where="data.jsonl, row 7")
    request_hash = "5e861519aad2551f4a9494fab104ef9ebb4f61822570d5e6c5ccc197ed35a834"
    assert fingerprint(request, model="m", api="chat", seed=None, extra_body={}) == request_hash
    assert fingerprint(request, model="tiny@1", seed=0) == "26f231939d533df45621d5df18db4d17f6a5dabdfb1d1c58257e5e16294b5833"
    entry = {
        "key": "row 0", "request": request_hash, "text": "<think>Far.</think>Very.", "finish_reason": "stop", "prompt_tokens": 5,
        "completion_tokens": 4, "logprobs": [{"token": "V", "logprob": -0.1, "top_logprobs": [{"token": "V", "logprob": -0.1}]}],
    }  # fmt: skip
    (tmp_path / "log").write_text(json.dumps(entry) + "\n")
    model = ScriptedModel(lambda body: chat_reply())
    (reply,) = model.complete([request], tmp_path / "log")
    assert (reply.text, reply.reasoning, model.requests) == ("Very.", "Far.", [])


def test_places_of_rows_are_listed_by_file() -> None:
    assert listed(["a.jsonl, row 3"]) == "a.jsonl, row 3"
    assert listed(["a.jsonl, row 3", "a.jsonl, row 5", "b.jsonl, row 1"]) == "a.jsonl, rows 3, 5; b.jsonl, row 1"
    assert listed([f"row {number}" for number in range(23)], most=2) == "rows 0, 1 and 21 more"
    assert requests_of([{"prompt": "a"}], max_tokens=1, temperature=0, places=["a.jsonl, row 3"])[0].name == "a.jsonl, row 3"


def test_sequence_recipe_stores_reasoning_apart_from_the_response(tmp_path: Path) -> None:
    items = [Item(key, ({"role": "user", "content": key},)) for key in ("a", "b")]
    bodies = {"a": chat_reply("<think>so</think>4"), "b": chat_reply("5")}
    model = ScriptedModel(lambda request: bodies[request["messages"][0]["content"]])
    rows, _ = sequence_level(items, model, tmp_path / "log")
    assert [(row["response"], row.get("reasoning")) for row in rows] == [("4", "so"), ("5", None)]


def test_recipes_drop_cut_replies(tmp_path: Path) -> None:
    reasons = {"a": "length", "b": "content_filter", "c": "stop"}
    items = [Item(key, ({"role": "user", "content": key},)) for key in reasons]
    model = ScriptedModel(lambda request: chat_reply("4", reasons[request["messages"][0]["content"]]))
    rows, tally = sequence_level(items, model, tmp_path / "log")
    assert [row["key"] for row in rows] == ["c"]
    assert tally.dropped == {"cut off at max_tokens": 1, "cut off (finish_reason content_filter)": 1}
