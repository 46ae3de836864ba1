"""Read answers of OpenAI-compatible servers: from the bytes of a body to the entry of a log of replies.

All known forms are accepted, because servers write the same values in different ways. The error for an answer that cannot be
read determines whether the request is sent, and paid for, again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["Incomplete", "NoLogprobs", "ServerError", "Unreadable", "counts_of", "parse", "read_number", "read_reply"]

UNKNOWN = "unknown"
"""The finish reason of a reply without one."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that contain thoughts."""
OPAQUE = ("redacted_thinking", "reasoning.encrypted", "encrypted_reasoning")
"""Types of message parts that are encrypted by the server."""


class Incomplete(Exception):
    """The answer is incomplete. Sending the request again may help."""


class Unreadable(Exception):
    """The answer is complete but has an unknown form. Sending the request again would cost the same and return the same."""


class NoLogprobs(Unreadable):
    """The answer is complete but lacks the requested log-probabilities. The message says what to do."""


class ServerError(Exception):
    """The body contains an error although the status is a success."""

    def __init__(self, error: object) -> None:
        super().__init__(str(error))
        self.error = error


def parse(body: bytes) -> dict[str, Any]:
    """Return the answer in a body, with at least one choice. The body is JSON, or a stream of events, which some servers always send.

    Raises:
        Incomplete, Unreadable, ServerError: see each.
    """
    try:
        text = body.decode("utf-8-sig")
        streamed = re.match(r"\s*(?:data|event|id|retry)?:", text)
        answer = _merged(_events(text)) if streamed else json.loads(text)
    except UnicodeDecodeError as error:
        raise Incomplete(f"it is not UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise Incomplete(f"it is not complete JSON: {str(error)[:200]}") from None
    if answer is None:
        raise Incomplete("it is null")
    if not isinstance(answer, dict):
        raise Unreadable(f"an object is needed, and it is a {type(answer).__name__}")
    choices = answer.get("choices")
    if not choices:
        if answer.get("error"):
            raise ServerError(answer["error"])
        raise Incomplete("it has no choices")
    if not isinstance(choices, list) or not isinstance(choices[0], dict):
        raise Unreadable("choices must be a list of objects")
    return answer


def read_reply(answer: Mapping[str, Any], logprobs: int) -> dict[str, Any]:
    """Return the log entry for an answer of the chat or completions API.

    Args:
        logprobs: number of requested alternatives per token.

    Raises:
        Unreadable, NoLogprobs: see each.
    """
    choice = answer["choices"][0]
    message = choice.get("message")
    if message is None:
        message = {"content": choice["text"]} if "text" in choice else {}
    if not isinstance(message, dict):
        raise Unreadable(f"message must be an object, and it is a {type(message).__name__}")
    thoughts = [_joined(message.get(name, choice.get(name)), [], name) for name in REASONING]
    text = _joined(message.get("content"), thoughts, "content") or _joined(message.get("refusal"), [], "refusal")
    thoughts = [thought for thought in dict.fromkeys(thoughts) if thought]  # some servers send the same text in two fields
    if message.get("tool_calls") or message.get("function_call"):
        raise Unreadable("it calls tools, and only text is kept")
    if not message.keys() & {"content", "refusal", *REASONING} and not thoughts:
        raise Unreadable("there is no text: choices[0] needs message.content, or text")
    reason = choice.get("finish_reason")
    entry: dict[str, Any] = {"text": text, "finish_reason": UNKNOWN if reason in (None, "") else whole_text(str(reason))}
    if thoughts:
        entry["reasoning"] = "\n\n".join(thoughts)
    tokens = _tokens(choice.get("logprobs")) if logprobs else []
    if logprobs and not tokens and (text or thoughts):
        raise NoLogprobs("the server gives no log-probabilities with its text: ask without --logprobs, or use another server")
    return {**entry, **counts_of(answer), "logprobs": tokens}


def counts_of(answer: Mapping[str, Any]) -> dict[str, int]:
    """Return the numbers of prompt and completion tokens that the server reports; 0 without a valid number."""
    usage = answer.get("usage")
    counts = {}
    for name in ("prompt_tokens", "completion_tokens"):
        number = read_number(usage.get(name)) if isinstance(usage, dict) else None
        counts[name] = int(number) if number is not None and 0 <= number < 2**53 else 0
    return counts


def read_number(value: object) -> float | None:
    """Return a finite number as float; None for any other value: null, text, NaN, infinity, 400 digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def whole_text(text: str) -> str:
    """Return text that UTF-8 can encode: surrogate pairs are joined, and halves without a partner are replaced."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _joined(value: object, thoughts: list[str], name: str) -> str:
    """Return the text of a field: text, or a list of parts. Parts that are thoughts are added to ``thoughts``."""
    if value is None:
        return ""
    if isinstance(value, str):
        return whole_text(value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise Unreadable(f"{name} must be text or a list of parts, and it is a {type(value).__name__}")
    return whole_text("".join(_part(part, thoughts, name) for part in value))


def _part(part: object, thoughts: list[str], name: str) -> str:
    if part is None or isinstance(part, str):
        return part or ""
    if not isinstance(part, dict):
        raise Unreadable(f"a part of {name} must be text or an object, and it is a {type(part).__name__}")
    kind = part.get("type")
    if kind in OPAQUE:
        return ""
    field = next((f for f in ("text", "thinking", "reasoning", "summary", "refusal", "content", "value") if part.get(f) is not None), None)
    if field is None or not isinstance(kind, (str, type(None))):
        raise Unreadable(f"a part of {name} has type {kind!r}, which is not text")
    text = _joined(part[field], thoughts, name)
    if field == "thinking" or any(word in str(kind) for word in ("think", "thought", "reasoning", "summary")):
        thoughts.append(text)
        return "" if name == "content" else text
    return text


def _tokens(logprobs: object) -> list[dict[str, Any]]:
    """Return the log entries of tokens from a reply's ``logprobs``: of the chat API (a list) or the completions API (parallel lists)."""
    if not logprobs:
        return []
    if isinstance(logprobs, dict) and isinstance(logprobs.get("content"), list):
        logprobs = logprobs["content"]
    if isinstance(logprobs, list):
        return [{**_token(token), "top_logprobs": _alternatives(token.get("top_logprobs"))} for token in map(_object, logprobs)]
    if not isinstance(logprobs, dict):
        raise Unreadable(f"logprobs must be an object, and it is a {type(logprobs).__name__}")
    tokens = logprobs.get("tokens")
    if not tokens:
        return []
    values, tops = (logprobs.get(name) or [None] * len(tokens) for name in ("token_logprobs", "top_logprobs"))
    if not all(isinstance(column, list) and len(column) == len(tokens) for column in (tokens, values, tops)):
        raise Unreadable("logprobs: tokens, token_logprobs and top_logprobs must be lists of one length")
    rows = zip(tokens, values, tops, strict=True)
    return [{**_token({"token": token, "logprob": value}), "top_logprobs": _alternatives(top)} for token, value, top in rows]


def _alternatives(top: object) -> list[dict[str, Any]]:
    """Return the alternatives with a number as log-probability. The others belong to the tail."""
    if isinstance(top, dict):
        top = [{"token": token, **(value if isinstance(value, dict) else {"logprob": value})} for token, value in top.items()]
    if not isinstance(top, (list, type(None))):
        raise Unreadable(f"top_logprobs must be a list or an object, and it is a {type(top).__name__}")
    tokens = [_token(_object(token)) for token in top or ()]
    return [token for token in tokens if token["logprob"] is not None]


def _object(token: object) -> dict[str, Any]:
    if not isinstance(token, dict):
        raise Unreadable(f"a token of logprobs must be an object, and it is a {type(token).__name__}")
    return token


def _token(entry: Mapping[str, Any]) -> dict[str, Any]:
    text, raw, id = entry.get("token"), entry.get("bytes"), entry.get("id")
    if not isinstance(text, (str, type(None))):
        raise Unreadable(f"a token of logprobs must be text, and it is a {type(text).__name__}")
    token: dict[str, Any] = {"token": whole_text(text or ""), "logprob": read_number(entry.get("logprob"))}
    if isinstance(raw, list) and all(isinstance(byte, int) and 0 <= byte < 256 for byte in raw):
        token["bytes"] = [int(byte) for byte in raw]
    if isinstance(id, int) and not isinstance(id, bool) and 0 <= id < 2**31:
        token["id"] = id
    return token


def _events(text: str) -> Iterable[dict[str, Any]]:
    """Yield the events of a stream as objects. ``[DONE]`` becomes ``{"done": True}``."""
    data: list[str] = []
    for line in re.split(r"\r\n|\r|\n", text):
        if not line.startswith("data:"):
            if data and not line:
                raise ValueError(f"an event was cut off: {''.join(data)[:80]}")
            continue
        data.append(line[5:].strip())
        if data == ["[DONE]"]:
            yield {"done": True}
            return
        try:
            event = json.loads("\n".join(data))
        except ValueError:
            continue  # an event in several lines
        data = []
        if event is not None and not isinstance(event, dict):
            raise Unreadable(f"an event of the stream must be an object, and it is a {type(event).__name__}")
        yield event or {}
    if data:
        raise ValueError(f"the last event was cut off: {''.join(data)[:80]}")


def _merged(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the events of a stream into one answer.

    Raises:
        Incomplete: the stream ends before the reply does.
    """
    fields: dict[str, list[Any]] = {}
    choice: dict[str, Any] = {}
    answer: dict[str, Any] = {}
    logprobs: dict[str, list[Any]] = {}
    done = False
    for event in events:
        done = done or bool(event.get("done"))
        answer |= {name: event[name] for name in ("usage", "error") if event.get(name)}
        choices = event.get("choices") or []
        if not isinstance(choices, list) or not all(isinstance(part, dict) for part in choices):
            raise Unreadable("choices of an event must be a list of objects")
        for part in choices:
            if part.get("index") not in (None, 0):
                continue
            if part.get("finish_reason") is not None:
                choice["finish_reason"] = part["finish_reason"]
            _extend(logprobs, part.get("logprobs"), "logprobs")
            if part.get("delta") is None and isinstance(part.get("message"), dict):
                fields = {}  # the whole message, not an addition to it
            _extend(fields, part.get("delta") or part.get("message"), "delta")
            if "text" in part:
                _extend(fields, {"content": part["text"]}, "text")
    if answer.get("error") and "finish_reason" not in choice:
        return {"error": answer["error"]}
    if not fields and not choice:
        raise Incomplete("it is a stream without choices")
    if not done and "finish_reason" not in choice:
        raise Incomplete("it is a stream that was cut off")
    choice["message"] = {"content": "", **{name: _join_streamed(parts) for name, parts in fields.items()}}
    choice["logprobs"] = logprobs
    return {**answer, "choices": [choice]}


def _extend(columns: dict[str, list[Any]], part: object, name: str) -> None:
    if not isinstance(part, (dict, type(None))):
        raise Unreadable(f"{name} of an event must be an object, and it is a {type(part).__name__}")
    for field, value in (part or {}).items():
        columns.setdefault(field, []).extend(value if isinstance(value, list) else [] if value is None else [value])


def _join_streamed(parts: Sequence[Any]) -> Any:
    """Join the parts of a streamed value."""
    return "".join(parts) if all(isinstance(part, str) for part in parts) else list(parts)
