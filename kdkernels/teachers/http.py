"""Teachers behind an OpenAI-compatible HTTP API: vLLM, SGLang, llama.cpp, ``transformers serve``, or a vendor's.

Each reply is written to the log before it is counted. Requests that fail temporarily (a busy server, a lost connection, an incomplete
answer) are sent again after a pause. The API key comes from the environment, is sent in one header to one server, and is removed from
everything that the server returns.
"""

from __future__ import annotations

import asyncio
import contextlib
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
from urllib.request import getproxies

from ..support.errors import UserError, listed
from ..support.terminal import shown
from . import answers
from .replies import ReplyLog, check_requests, fingerprint, reply_of, seed_of
from .secret import Secret
from .statuses import concerns_all, error_in, may_pass, message_of, retry_after, status_of
from .text import REFUSED, Reply, Request, Usage

if TYPE_CHECKING:
    from httpx2 import AsyncBaseTransport, AsyncClient

__all__ = ["HTTPModel", "HTTPModelError", "Refused"]

T = TypeVar("T")
API = Literal["chat", "completions"]
LONGEST_WAIT = 600.0
"""Maximum wait in seconds that a server may ask for. A longer one ends the run with an error."""
LONGEST_BACKOFF = 30.0
LARGEST_REPLY = 256 << 20
"""Maximum bytes of a reply, after decompression."""
LARGEST_ERROR = 1 << 16
QUOTED = 300
"""Number of characters of a reply that an error quotes."""
NAMED = 20
"""Maximum number of refused requests that an error names."""
INTERRUPTED = (
    "abort", "aborted", "canceled", "cancelled", "error", "insufficient_system_resource", "internal_error", "network_error", "overloaded",
    "server_error", "timeout",
)  # fmt: skip
"""Finish reasons of replies that the server interrupted. A retry may return a complete one."""


class HTTPModelError(UserError):
    """The server cannot be used, or all retries failed. Replies so far are in the log, and the same call continues from there."""


class Refused(HTTPModelError):
    """The server permanently refuses some requests, for example because they are too long. All others are answered and in the log."""

    def __init__(self, message: str, reasons: Mapping[str, str]) -> None:
        super().__init__(message)
        self.reasons = dict(reasons)
        """The reason for each key that failed."""


class _Again(Exception):
    """Retry after at least ``wait`` seconds. ``entry``: an interrupted reply."""

    def __init__(self, reason: str, wait: float = 0.0, entry: dict[str, Any] | None = None) -> None:
        super().__init__(reason)
        self.wait, self.entry = wait, entry


class _No(Exception):
    """The server refuses this request, but may accept others."""


@dataclass(frozen=True)
class Job:
    """One request to the server, and the function that reads its answer."""

    key: str
    request: str
    """Hash of everything that determines the answer."""
    body: Mapping[str, Any]
    read: Callable[[dict[str, Any]], dict[str, Any]]
    """Converts the server's JSON to the entry of the log.

    Raises:
        answers.Unreadable, or any error of Python about a value: the answer has another form.
    """
    name: str = ""
    """The request in errors."""


class HTTPModel:
    """A ``TextModel`` over the OpenAI-compatible API.

    Args:
        base_url: such as ``http://localhost:8000/v1``.
        model: the model's name on the server.
        api: ``"chat"``, or ``"completions"``, whose prompt is the content of a request's only message.
        key_variable: environment variable with the API key; "" or an unset variable for a server without keys.
        concurrency: maximum number of parallel requests.
        timeout: time limit of a request in seconds, from the first byte to the last.
        retries: number of retries after 408, 409, 425, 429, 5xx, a time-out, a lost connection, an incomplete answer, or a reply that the
            server interrupted. Each pause is twice as long as the last, shortened at random by up to a half, but not shorter than the
            server asks for.
        backoff: seconds of the first pause.
        seed: random seed, for servers that accept one. Each request sends its own seed, derived from this one and its key: with equal
            seeds, several samples of a prompt would be the same text.
        extra_body: further fields of each request, such as ``{"return_tokens_as_token_ids": True}`` for vLLM.
        prices: cost of a million prompt tokens and of a million completion tokens.
        skip_refused: a request that the server refuses gets an empty reply with the ``finish_reason`` ``REFUSED``, which is not logged.
        report: called after each reply, and before each retry.

    Raises:
        ValueError: an argument is invalid, or the URL contains a key.
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
        _check_url(base_url, key_variable)
        if concurrency < 1 or retries < 0 or not timeout > 0 or not backoff >= 0:
            raise ValueError(f"concurrency={concurrency} must be >= 1, retries={retries} and backoff={backoff} >= 0, timeout={timeout} > 0")
        if api not in ("chat", "completions"):
            raise ValueError(f"api must be 'chat' or 'completions', got {api!r}")
        if not model:
            raise ValueError("model is missing: give the model's name on the server")
        _check_extra_body(extra_body or {})
        self.base_url, self.model, self.api = base_url, model, api
        self.key_variable, self.concurrency, self.timeout, self.retries, self.backoff = key_variable, concurrency, timeout, retries, backoff
        self.settings: dict[str, Any] = {"model": model, "api": api, "seed": seed, "extra_body": dict(extra_body or {})}
        self.prices, self.skip_refused, self.report = prices, skip_refused, report
        self.usage = Usage()
        self._secret = Secret("")
        self._not_before = 0.0  # monotonic time before which no request is sent, because the server is busy

    def complete(self, requests: Sequence[Request], log: Path) -> list[Reply]:
        """Return the replies in the order of the requests; see ``TextModel``.

        Raises:
            ValueError: two requests have the same key, or a request is invalid.
            Refused: the server refuses requests, and ``skip_refused`` is False. The others are answered.
            HTTPModelError: the server cannot be reached, rejects the key, or does not return requested log-probabilities.
            FileError: the log is in use or damaged, or has another request's reply under one of the keys.
        """
        check_requests(requests)
        return [reply_of(entry) for entry in self.run([self._job(request) for request in requests], log)]

    def run(self, jobs: Sequence[Job], log: Path) -> list[dict[str, Any]]:
        """Run ``jobs``, and return their log entries in order. Raises the same errors as ``complete``."""
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
                    self.usage.reasons |= error.reasons
            return [{"key": job.key, **done[job.key]} for job in jobs]

    def _count(self, entry: Mapping[str, Any], from_log: bool) -> None:
        self.usage.add(entry, from_log, self.prices)
        self._report_usage()

    def _report_usage(self) -> None:
        if self.report is not None:
            self.report(self.usage)

    def _job(self, request: Request) -> Job:
        body: dict[str, Any] = {"max_tokens": request.max_tokens, "temperature": request.temperature}
        if self.settings["seed"] is not None:
            body["seed"] = seed_of(self.settings["seed"], request.key) >> 33  # 31 bits: some servers accept no more
        if request.stop:
            body["stop"] = list(request.stop)
        if self.api == "chat":
            body["messages"] = [dict(message) for message in request.messages]
            if request.logprobs:
                body |= {"logprobs": True, "top_logprobs": request.logprobs}
        else:
            if len(request.messages) != 1:
                raise ValueError(f"{request.name} has {len(request.messages)} messages, the completions API takes one prompt")
            body["prompt"] = request.messages[0]["content"]
            if request.logprobs:
                body["logprobs"] = request.logprobs
        return Job(
            request.key, fingerprint(request, **self.settings), body, lambda answer: answers.read_reply(answer, request.logprobs),
            request.name,
        )  # fmt: skip

    async def _ask_all(self, jobs: Sequence[Job], keep: Callable[[Job, dict[str, Any]], None]) -> None:
        queue: Iterator[Job] = iter(jobs)
        stop = asyncio.Event()
        refused: dict[str, str] = {}
        self._not_before = 0.0
        async with self._client() as client:

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
                # Interrupted: wait for requests that are under way, because they have been paid for.
                stop.set()
                await asyncio.wait(workers, timeout=self.timeout)
                raise
            finally:
                for task in workers:
                    task.cancel()
            for error in [task.exception() for task in workers]:  # of all tasks: asyncio warns about exceptions that are not retrieved
                if error is not None:
                    raise error
        if refused:
            raise Refused(_refusal([job for job in jobs if job.key in refused], refused, len(jobs)), refused)

    def _client(self, transport: AsyncBaseTransport | None = None) -> AsyncClient:
        """Return a client that sends the key. It does not follow redirects, so that the key reaches no other server.

        Raises:
            HTTPModelError: the key cannot be sent, or a proxy or certificate of the environment cannot be used.
        """
        from httpx2 import AsyncClient, InvalidURL, Limits

        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise HTTPModelError(
                f"the key in {self.key_variable} holds a character that a header can't hold: set the variable to the key alone"
            )
        self._secret = Secret(key)
        try:
            for name in ("http", "https", "all"):
                urlsplit(getproxies().get(name, "")).port  # noqa: B018  (raises if invalid; the client would only raise when it connects)
            return AsyncClient(
                # Some servers require a key even if they do not check it.
                headers={"Authorization": f"Bearer {key or 'none'}", "User-Agent": "kdkernels", "Content-Type": "application/json"},
                limits=Limits(max_connections=None, max_keepalive_connections=self.concurrency),
                timeout=self.timeout,
                follow_redirects=False,
                transport=transport,
            )
        except (InvalidURL, ValueError, ImportError, OSError) as error:
            raise HTTPModelError(
                f"a proxy or certificate of the environment can't be used ({error}): check HTTP_PROXY, HTTPS_PROXY, ALL_PROXY "
                "and SSL_CERT_FILE"
            ) from None

    async def _ask(self, client: AsyncClient, job: Job, stop: asyncio.Event) -> dict[str, Any] | None:
        """Return the entry for ``job``; None if stopped while waiting."""
        broken: list[str] = []  # finish reasons of interrupted replies
        for attempt in range(self.retries + 1):
            if not await self._wait(self._not_before - time.monotonic(), stop):
                return None
            try:
                entry = await self._try(client, job)
                return {**entry, "interrupted": broken} if broken else entry
            except _Again as error:
                if attempt == self.retries:
                    if error.entry is not None and error.entry["text"]:
                        return {**error.entry, "interrupted": broken}  # its finish reason shows that it is incomplete
                    raise HTTPModelError(
                        f"gave up on {job.name} after {attempt + 1} tries: {error}. Replies so far are in the log: run the same again"
                    ) from None
                if error.wait > LONGEST_WAIT:
                    raise HTTPModelError(f"the server asks to wait {error.wait:.0f} s: run the same again after that") from None
                if error.entry is not None:
                    broken.append(error.entry["finish_reason"])
                    self.usage.interrupted[error.entry["finish_reason"]] += 1
                self.usage.retries += 1
                self.usage.waiting = str(error)
                self._report_usage()
                self._not_before = max(self._not_before, time.monotonic() + error.wait) if error.wait else self._not_before
                pause = min(self.backoff * 2**attempt, LONGEST_BACKOFF) * random.uniform(0.5, 1)
                if not await self._wait(max(pause, error.wait), stop):
                    return None
        raise AssertionError

    @staticmethod
    async def _wait(seconds: float, stop: asyncio.Event) -> bool:
        """Wait, and return whether to continue: False if stopped meanwhile."""
        if seconds > 0:
            with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
                await asyncio.wait_for(stop.wait(), seconds)
        return not stop.is_set()

    async def _try(self, client: AsyncClient, job: Job) -> dict[str, Any]:
        import httpx2

        try:
            status, headers, body = await asyncio.wait_for(self._post(client, job.body), self.timeout)
        except (asyncio.TimeoutError, TimeoutError, httpx2.TimeoutException):
            raise _Again(f"no whole answer within {self.timeout:g} s from {self.base_url}") from None
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpx2.LocalProtocolError) as error:
            raise HTTPModelError(f"{self.base_url} can't be used: {self._shown(str(error))}") from None
        except httpx2.RequestError as error:
            raise _Again(f"no connection, or one that was cut ({type(error).__name__}), to {self.base_url}") from None
        except answers.Unreadable as error:
            raise self._unreadable(job, error, b"") from None
        if not 200 <= status < 300:
            raise self._failure(status, error_in(body), headers)
        try:
            entry = self._secret.redact_entry(job.read(answers.parse(body)))
        except answers.Incomplete as error:
            raise _Again(f"an answer that is not whole: {self._shown(str(error))}") from None
        except answers.ServerError as error:
            raise self._failure(status_of(error.error), error.error, headers) from None
        except answers.NoLogprobs as error:
            raise HTTPModelError(self._shown(str(error))) from None
        except (answers.Unreadable, KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError) as error:
            raise self._unreadable(job, error, body) from None
        reason = str(entry.get("finish_reason"))
        if reason.casefold() in INTERRUPTED:
            raise _Again(f"the server broke the reply off: its finish_reason is {self._shown(reason)[:60]}", entry=entry)
        return entry

    async def _post(self, client: AsyncClient, fields: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        """Return status, headers and body of the answer; for an error status only the beginning of the body.

        Raises:
            Unreadable: the reply is larger than ``LARGEST_REPLY``.
        """
        request = {"model": self.model, **fields, **self.settings["extra_body"]}
        path = "chat/completions" if "messages" in fields else "completions"
        body = bytearray()
        async with client.stream("POST", f"{self.base_url.rstrip('/')}/{path}", content=json.dumps(request, default=str)) as response:
            async for piece in response.aiter_bytes():
                body += piece
                if not response.is_success and len(body) > LARGEST_ERROR:
                    break
                if len(body) > LARGEST_REPLY:
                    raise answers.Unreadable(f"it is larger than {LARGEST_REPLY:,} bytes")
        return response.status_code, response.headers, bytes(body)

    def _failure(self, status: int, error: object, headers: Mapping[str, str]) -> Exception:
        """Return the exception for a status other than success: for this request, or for all."""
        reason = self._shown(f"{status}: {message_of(error)}")[:500]
        if 300 <= status < 400:
            target = self._shown(headers.get("location", "another address"))
            return HTTPModelError(f"{reason} {self.base_url} redirects to {target}: ask there, if that is the server you mean")
        if concerns_all(status, error):
            hint = f" (the key is read from {self.key_variable}, which is {'' if os.environ.get(self.key_variable) else 'not '}set)"
            hint = hint if self.key_variable else f" ({self.base_url} gets no key: name the variable of its key)"
            return HTTPModelError(reason + (hint if status in (401, 403) else ""))
        return _Again(reason, retry_after(headers)) if may_pass(status) else _No(reason)

    def _unreadable(self, job: Job, error: Exception, body: bytes) -> Exception:
        """Return the exception for a reply that cannot be read.

        It ends the run, because other replies would have the same form and cost the same. If others could be read and rows may be skipped,
        only this row is skipped.
        """
        why = str(error) if isinstance(error, answers.Unreadable) else f"{type(error).__name__}: {error}"
        quoted = self._shown(body[: 16 * QUOTED].decode(errors="replace"))[:QUOTED]
        reason = f"the reply can't be read: {self._shown(why)[:QUOTED]}" + (f". The server sent: {quoted}" if quoted else "")
        if self.skip_refused and self.usage.replies > self.usage.from_log:
            return _No(reason)
        return HTTPModelError(f"{job.name}: {reason}")

    def _shown(self, text: str) -> str:
        """Return a server's text without the key and with control characters escaped."""
        return shown(self._secret.redact(text))


def _refusal(jobs: Sequence[Job], reasons: Mapping[str, str], total: int) -> str:
    """Describe which requests the server refuses, grouped by reason."""
    of_reason: dict[str, list[str]] = {}
    for job in jobs[:NAMED]:
        of_reason.setdefault(reasons[job.key], []).append(job.name.removeprefix("request "))
    more = f"; and {len(jobs) - NAMED:,} more" if len(jobs) > NAMED else ""
    each = "; ".join(f"{listed(names)}: {reason}" for reason, names in of_reason.items())
    return f"the server refuses {len(jobs):,} of {total:,} requests; {each}{more}"


def _check_url(base_url: str, key_variable: str) -> None:
    """Check ``base_url``.

    Raises:
        ValueError: it is not an HTTP address, or contains a secret.
    """
    try:
        url = urlsplit(base_url)
        port = url.port
    except ValueError as error:
        raise ValueError(f"base_url must be a URL such as http://localhost:8000/v1: {error}") from None
    if url.scheme not in ("http", "https") or not url.hostname or port == 0:
        raise ValueError("base_url must be a URL such as http://localhost:8000/v1")
    if url.username or url.password or url.query:
        raise ValueError(f"base_url holds a user name, password or query: give the key in the environment variable {key_variable} instead")


def _check_extra_body(extra_body: Mapping[str, Any]) -> None:
    """Check ``extra_body``.

    Raises:
        ValueError: it cannot be written as JSON, or requests several replies.
    """
    try:
        json.dumps(extra_body, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"extra_body can't be written as JSON: {error}") from None
    for name in ("n", "best_of"):
        if extra_body.get(name) not in (None, 1):
            raise ValueError(f"extra_body has {name}={extra_body[name]!r}: only one reply is read for each request, so leave it out")


def _run_async(start: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine to its end from synchronous code, even if this thread already runs an event loop (as in a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(start())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(start())).result()
