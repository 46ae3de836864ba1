"""HTTP statuses and errors of servers: whether they affect one request or all, and whether they are temporary."""

from __future__ import annotations

import email.utils
import json
import re
import time
from collections.abc import Mapping

__all__ = ["concerns_all", "error_in", "may_pass", "message_of", "retry_after", "status_of"]

AGAIN = (408, 409, 425, 429)
"""Statuses below 500 after which the same request may succeed."""
HOPELESS = (401, 402, 403, 404, 405, 407, 410)
"""Statuses that all other requests would get too."""
_ACCOUNT_CODE = re.compile(
    r"insufficient.(quota|balance|credit|fund)|exceeded.current.quota|billing|payment|arrear|api.?key|authentication|unauthorized"
    r"|(account|organization|user|subscription|service).*(deactivated|suspended|disabled|inactive|expired)",
    re.IGNORECASE,
)
"""Codes and types of errors that affect the whole account. Servers return them with statuses such as 400, 403 and 429."""
_ACCOUNT_MESSAGE = re.compile(
    r"insufficient (account )?(quota|balance|credit|fund)|credit balance is too low|billing hard limit|payment required"
    r"|(invalid|incorrect|expired|missing) api key|api key (is )?(not valid|invalid|expired|missing)"
    r"|account .{0,20}(deactivated|suspended|disabled|overdue)",
    re.IGNORECASE,
)
_BEGINNING = 80
"""Number of characters of a message to search. Later parts may quote the prompt."""


def error_in(body: bytes) -> object:
    """Return the error in a body: the field ``error`` of an object, another JSON value, or plain text."""
    text = body.decode("utf-8", "replace")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value["error"] if isinstance(value, dict) and value.get("error") else value


def message_of(error: object) -> str:
    """Return the message of an error in one line."""
    text = next((error[name] for name in ("message", "detail", "msg") if error.get(name)), error) if isinstance(error, dict) else error
    return " ".join((text if isinstance(text, str) else json.dumps(text, default=str)).split())


def status_of(error: object) -> int:
    """Return the status in an error whose HTTP status is a success. Without one it is 500, because the next answer may be complete."""
    for name in ("status", "status_code", "code"):
        value = error.get(name) if isinstance(error, dict) else None
        if isinstance(value, (int, str)) and re.fullmatch(r"[345]\d\d", str(value)):
            return int(value)
    return 500


def concerns_all(status: int, error: object) -> bool:
    """Return whether all other requests would get this error: the key, account, address or model is refused."""
    if status in HOPELESS:
        return True
    named = " ".join(str(error[name]) for name in ("code", "type", "status") if error.get(name)) if isinstance(error, dict) else ""
    return _ACCOUNT_CODE.search(named) is not None or (status < 500 and _ACCOUNT_MESSAGE.search(message_of(error)[:_BEGINNING]) is not None)


def may_pass(status: int) -> bool:
    """Return whether the same request may succeed later."""
    return status in AGAIN or status >= 500


def retry_after(headers: Mapping[str, str]) -> float:
    """Return the number of seconds that a server asks to wait, in any of three header forms; 0 without a valid one."""
    try:
        if milliseconds := headers.get("retry-after-ms"):
            return max(0.0, float(milliseconds) / 1000)
        value = headers.get("retry-after", "")
        if value.replace(".", "", 1).isdigit():
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time()) if value else 0.0
    except (ValueError, TypeError, OverflowError):
        return 0.0
