"""Teachers behind the OpenAI-compatible HTTP API: vLLM, SGLang, ``transformers serve``, or a vendor's.

Every reply is in the log when it is counted; what fails on the way (a full server, a cut connection, half an answer) is asked again
after a while. The key comes from the environment, goes into one header, and is cut out of everything that is written or raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import os
import random
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

from ..errors import UserError
from .replies import ReplyLog, check_requests, fingerprint, reply_of, seed_of
from .text import REFUSED, Reply, Request, Usage

if TYPE_CHECKING:
    from openai import AsyncOpenAI

__all__ = ["HTTPModel", "HTTPModelError", "Refused"]

T = TypeVar("T")
API = Literal["chat", "completions"]
LONGEST_WAIT = 600.0
"""Seconds that a server may ask to wait; beyond, the run ends and says so."""
LONGEST_BACKOFF = 30.0
SHORTEST_KEY = 8
"""Shorter ones (EMPTY, none, x) are no secrets, and are words that a text may hold."""
AGAIN = (408, 409, 425, 429)
"""Statuses below 500 after which the same request may succeed."""
HOPELESS = (401, 403, 404)
"""Statuses that every other request would get too."""


class HTTPModelError(UserError):
    """The server can't be used, or does not get better. What it has answered is in the log: the same call goes on from there."""


class Refused(HTTPModelError):
    """The server refuses some requests whatever happens (too long, say). All others are answered and in the log."""

    def __init__(self, message: str, reasons: Mapping[str, str]) -> None:
        super().__init__(message)
        self.reasons = dict(reasons)
        """Of each key."""


class _Again(Exception):
    """Worth another try, after at least ``wait`` seconds."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _No(Exception):
    """The server refuses this request; it may take others."""


@dataclass(frozen=True)
class Job:
    """One request to the server and what becomes of its answer."""

    key: str
    request: str
    """Hash of all that decides the answer."""
    body: Mapping[str, Any]
    read: Callable[[dict[str, Any]], dict[str, Any]]
    """From the server's JSON to the entry of the log.

    Raises:
        KeyError, TypeError, ValueError, IndexError, AttributeError: the answer is not whole.
    """


class HTTPModel:
    """A ``TextModel`` over the OpenAI-compatible API.

    Args:
        base_url: as ``http://localhost:8000/v1``.
        model: the server's name of it.
        api: ``"chat"``, or ``"completions"``, whose prompt is the content of the one message of a request.
        key_variable: environment variable that holds the API key. "", or one that is not set: a server that asks for none.
        concurrency: requests in flight, at most.
        timeout: seconds for one whole answer, first byte to last.
        retries: how often a request is tried again after 408, 409, 425, 429, 5xx, a time-out, a cut connection or an answer that is not
            whole. Each wait is twice as long as the last and then cut at random by up to a half; never shorter than the server asks for.
        backoff: seconds of the first wait.
        seed: of draws. Each request sends a seed of its own, made of this one and its key: with one and the same, several samples of a
            prompt would be one text. For servers that take a seed.
        extra_body: further fields of every request, such as ``{"return_tokens_as_token_ids": True}`` for vLLM.
        prices: cost of a million prompt tokens and of a million completion tokens.
        skip_refused: requests that the server refuses get an empty reply whose ``finish_reason`` is ``REFUSED``, and are in no log.
        report: called after each reply.

    Raises:
        ValueError: an argument that makes no sense; a URL with a key in it.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api: API = "chat",
        key_variable: str = "OPENAI_API_KEY",
        concurrency: int = 64,
        timeout: float = 60.0,
        retries: int = 8,
        backoff: float = 0.5,
        seed: int | None = None,
        extra_body: Mapping[str, Any] | None = None,
        prices: tuple[float, float] = (0.0, 0.0),
        skip_refused: bool = False,
        report: Callable[[Usage], object] | None = None,
    ) -> None:
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("base_url must be a URL such as http://localhost:8000/v1")
        if url.username or url.password or url.query:
            raise ValueError(
                f"base_url holds a user name, password or query: give the key in the environment variable {key_variable} instead"
            )
        if concurrency < 1 or retries < 0 or not timeout > 0 or not backoff >= 0:
            raise ValueError(f"concurrency={concurrency} must be >= 1, retries={retries} and backoff={backoff} >= 0, timeout={timeout} > 0")
        if api not in ("chat", "completions"):
            raise ValueError(f"api must be 'chat' or 'completions', got {api!r}")
        if not model:
            raise ValueError("give the server's name of the model")
        self.base_url, self.model, self.api = base_url, model, api
        self.key_variable, self.concurrency, self.timeout, self.retries, self.backoff = key_variable, concurrency, timeout, retries, backoff
        self.settings: dict[str, Any] = {"model": model, "api": api, "seed": seed, "extra_body": dict(extra_body or {})}
        self.prices, self.skip_refused, self.report = prices, skip_refused, report
        self.usage = Usage()
        self._not_before = 0.0  # on the clock of the loop: a server that is full is left alone by all

    def complete(self, requests: Sequence[Request], log: Path) -> list[Reply]:
        """Replies in the order of the requests; see ``TextModel``.

        Raises:
            ValueError: two requests with one key, or one that makes no sense.
            Refused: requests that the server refuses, without ``skip_refused``; the others are answered.
            HTTPModelError: a server that can't be reached, or rejects the key; that gives no log-probabilities where they are asked for.
            FileError: the log is in use, damaged, or holds another request's reply under one of the keys.
        """
        check_requests(requests)
        return [reply_of(entry) for entry in self.run([self._job(request) for request in requests], log)]

    def run(self, jobs: Sequence[Job], log: Path) -> list[dict[str, Any]]:
        """The entries of the log for ``jobs``, in their order, once all are there. Errors as of ``complete``."""
        with ReplyLog(log) as replies:
            done = {job.key: entry for job in jobs if (entry := replies.find(job.key, job.request)) is not None}
            for entry in done.values():
                self._count(entry, from_log=True)
            todo = [job for job in jobs if job.key not in done]

            def keep(job: Job, value: dict[str, Any]) -> None:
                replies.append(job.key, job.request, value)
                done[job.key] = value
                self._count(value, from_log=False)

            if todo:
                try:
                    _run_async(lambda: self._ask_all(todo, keep))
                except Refused as error:
                    if not self.skip_refused:
                        raise
                    done |= {key: {"text": "", "finish_reason": REFUSED} for key in error.reasons}
                    self.usage.refused += len(error.reasons)
            return [{"key": job.key, **done[job.key]} for job in jobs]

    def _count(self, entry: Mapping[str, Any], from_log: bool) -> None:
        self.usage.add(entry, from_log, self.prices)
        if self.report is not None:
            self.report(self.usage)

    def _job(self, request: Request) -> Job:
        body: dict[str, Any] = {"max_tokens": request.max_tokens, "temperature": request.temperature}
        if self.settings["seed"] is not None:
            body["seed"] = seed_of(self.settings["seed"], request.key) >> 33  # 31 bits: more than some servers take
        if request.stop:
            body["stop"] = list(request.stop)
        if self.api == "chat":
            body["messages"] = [dict(message) for message in request.messages]
            if request.logprobs:
                body |= {"logprobs": True, "top_logprobs": request.logprobs}
        else:
            if len(request.messages) != 1:
                raise ValueError(f"request {request.key!r} has {len(request.messages)} messages, the completions API takes one prompt")
            body["prompt"] = request.messages[0]["content"]
            if request.logprobs:
                body["logprobs"] = request.logprobs
        read = read_chat if self.api == "chat" else read_completion
        return Job(request.key, fingerprint(request, **self.settings), body, lambda answer: read(answer, request.logprobs))

    async def _ask_all(self, jobs: Sequence[Job], keep: Callable[[Job, dict[str, Any]], None]) -> None:
        from openai import AsyncOpenAI

        queue: Iterator[Job] = iter(jobs)
        stop = asyncio.Event()
        refused: dict[str, str] = {}
        self._not_before = 0.0
        # The package wants a key even where the server does not. Its own retries would be on top of ours.
        key = os.environ.get(self.key_variable) or "none"
        async with AsyncOpenAI(base_url=self.base_url, api_key=key, max_retries=0, timeout=self.timeout) as client:

            async def worker() -> None:
                for job in queue:
                    if stop.is_set():
                        return
                    try:
                        value = await self._ask(client, job, stop)
                    except _No as reason:
                        refused[job.key] = str(reason)
                    except BaseException:
                        stop.set()
                        raise
                    else:
                        if value is not None:
                            keep(job, value)

            workers = [asyncio.create_task(worker()) for _ in range(min(self.concurrency, len(jobs)))]
            try:
                await asyncio.wait(workers)
            except asyncio.CancelledError:
                # Interrupted: what is in flight has been paid for, so it may still arrive.
                stop.set()
                await asyncio.wait(workers, timeout=self.timeout)
                raise
            finally:
                for task in workers:
                    task.cancel()
            for error in [task.exception() for task in workers]:  # of all, so that none is reported as never looked at
                if error is not None:
                    raise error
        if refused:
            first, reason = next(iter(refused.items()))
            raise Refused(f"the server refuses {len(refused)} of {len(jobs)} requests; {first!r}: {reason}", refused)

    async def _ask(self, client: AsyncOpenAI, job: Job, stop: asyncio.Event) -> dict[str, Any] | None:
        """The entry for ``job``; None if stopped while waiting to try again."""
        for attempt in range(self.retries + 1):
            if not await self._wait(self._not_before - time.monotonic(), stop):
                return None
            try:
                return await self._try(client, job)
            except _Again as error:
                if attempt == self.retries:
                    raise HTTPModelError(
                        f"gave up on request {job.key!r} after {attempt + 1} tries: {error}. What was answered is in the log: run the "
                        "same again"
                    ) from None
                if error.wait > LONGEST_WAIT:
                    raise HTTPModelError(f"the server asks to wait {error.wait:.0f} s: run the same again after that") from None
                self.usage.retries += 1
                self._not_before = max(self._not_before, time.monotonic() + error.wait) if error.wait else self._not_before
                pause = min(self.backoff * 2**attempt, LONGEST_BACKOFF) * random.uniform(0.5, 1)
                if not await self._wait(max(pause, error.wait), stop):
                    return None
        raise AssertionError

    @staticmethod
    async def _wait(seconds: float, stop: asyncio.Event) -> bool:
        """False if stopped meanwhile."""
        if seconds > 0:
            with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
                await asyncio.wait_for(stop.wait(), seconds)
        return not stop.is_set()

    async def _try(self, client: AsyncOpenAI, job: Job) -> dict[str, Any]:
        import openai

        try:
            raw = await asyncio.wait_for(self._post(client, job.body), self.timeout)
        except (asyncio.TimeoutError, TimeoutError, openai.APITimeoutError):
            raise _Again(f"no whole answer within {self.timeout:g} s") from None
        except openai.APIStatusError as error:
            raise self._status(error) from None
        except openai.APIConnectionError as error:
            raise _Again(self._without_key(f"no connection, or one that was cut ({type(error.__cause__).__name__})")) from None
        except openai.OpenAIError as error:
            raise HTTPModelError(self._without_key(str(error))) from None
        try:
            return job.read(json.loads(self._without_key(raw.decode())))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise _Again(f"an answer that is not whole ({type(error).__name__}: {self._without_key(str(error))[:200]})") from None

    async def _post(self, client: AsyncOpenAI, body: Mapping[str, Any]) -> bytes:
        fields: dict[str, Any] = {**body, "model": self.model}
        extra = {**self.settings["extra_body"], **fields.pop("extra_body", {})}
        endpoint: Any = client.chat.completions if "messages" in fields else client.completions
        raw = await endpoint.with_raw_response.create(**fields, extra_body=extra or None)
        content: bytes = raw.http_response.content
        return content

    def _status(self, error: Any) -> Exception:
        """What a status other than success means for the request, or for all of them."""
        status = int(error.status_code)
        reason = self._without_key(f"{status}: {error.message}")[:500]
        if status in HOPELESS or getattr(error, "code", None) == "insufficient_quota":
            hint = f" (the key is read from {self.key_variable}, which is {'' if os.environ.get(self.key_variable) else 'not '}set)"
            hint = hint if self.key_variable else f" ({self.base_url} gets no key: name the variable of its own)"
            return HTTPModelError(reason + (hint if status in (401, 403) else ""))
        if status in AGAIN or status >= 500:
            return _Again(reason, retry_after(error.response.headers))
        return _No(reason)

    def _without_key(self, text: str) -> str:
        key = os.environ.get(self.key_variable, "")
        return text.replace(key, "[key]") if len(key) >= SHORTEST_KEY else text


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait, in any of the three ways of saying it; 0 if it does not, or not so that it can be read."""
    try:
        if milliseconds := headers.get("retry-after-ms"):
            return max(0.0, float(milliseconds) / 1000)
        value = headers.get("retry-after", "")
        if value.replace(".", "", 1).isdigit():
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time()) if value else 0.0
    except ValueError:
        return 0.0


def _text(value: object) -> str:
    """As UTF-8 can hold it: half of a surrogate pair becomes a question mark."""
    if not isinstance(value, str):
        raise TypeError(f"the text is {type(value).__name__}")
    return value.encode("utf-8", "replace").decode()


def _entry(answer: dict[str, Any], text: object, reason: object, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    usage = answer.get("usage") or {}
    counts = {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
    return {"text": _text(text), "finish_reason": str(reason or "stop"), **counts, "logprobs": logprobs}


def read_chat(answer: dict[str, Any], logprobs: int) -> dict[str, Any]:
    """The entry of the log for an answer of the chat API."""
    choice = answer["choices"][0]
    found: list[dict[str, Any]] = []
    if logprobs:
        _need_logprobs(choice)
        found = [{**_token(t), "top_logprobs": [_token(a) for a in t["top_logprobs"]]} for t in choice["logprobs"]["content"]]
    content = choice["message"].get("content")
    return _entry(answer, "" if content is None else content, choice.get("finish_reason"), found)


def read_completion(answer: dict[str, Any], logprobs: int) -> dict[str, Any]:
    """The entry of the log for an answer of the completions API."""
    choice = answer["choices"][0]
    found: list[dict[str, Any]] = []
    if logprobs:
        _need_logprobs(choice)
        names = ("tokens", "token_logprobs", "top_logprobs")
        for token, value, top in zip(*(choice["logprobs"][name] for name in names), strict=True):
            alternatives = [_token({"token": a, "logprob": p}) for a, p in top.items()]
            found.append({**_token({"token": token, "logprob": value}), "top_logprobs": alternatives})
    return _entry(answer, choice["text"], choice.get("finish_reason"), found)


def _token(found: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {"token": _text(found["token"]), "logprob": float(found["logprob"])}
    return kept if found.get("bytes") is None else {**kept, "bytes": found["bytes"]}


def _need_logprobs(choice: Mapping[str, Any]) -> None:
    if not choice.get("logprobs"):
        raise HTTPModelError("the server gives no log-probabilities with its text: ask without --logprobs, or take another server")


def _run_async(start: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs a coroutine to its end, from code that is not asynchronous, whether or not a loop runs in this thread (as in a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(start())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(start())).result()
