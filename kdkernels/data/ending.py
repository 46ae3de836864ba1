"""Finish reasons: whether a response ended by itself, so that its end can be learnt."""

from __future__ import annotations

__all__ = ["ended"]

WHOLE = frozenset({
    "stop", "eos", "eos_token", "end_turn", "stop_sequence", "stop_token", "complete", "completed", "finished",
    "tool_calls", "tool_use", "function_call",
})  # fmt: skip


def ended(finish_reason: object) -> bool:
    """True if a response with this ``finish_reason`` ended by itself; None, of a row that does not say, counts as ended.

    Every other reason is a cut: ``length``, ``content_filter``, ``abort``, and reasons that nobody has heard of.
    """
    return finish_reason is None or (isinstance(finish_reason, str) and finish_reason.casefold() in WHOLE)
