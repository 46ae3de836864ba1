"""Finish reasons: decide whether a response is complete, so that its end can be learnt."""

from __future__ import annotations

__all__ = ["ended"]

WHOLE = frozenset({
    "stop", "eos", "eos_token", "end_turn", "stop_sequence", "stop_token", "complete", "completed", "finished",
    "tool_calls", "tool_use", "function_call",
})  # fmt: skip


def ended(finish_reason: object) -> bool:
    """Return True if a response with this ``finish_reason`` is complete. None (the row has no reason) counts as complete.

    Every other reason means that the response was cut: ``length``, ``content_filter``, ``abort``, and unknown reasons.
    """
    return finish_reason is None or (isinstance(finish_reason, str) and finish_reason.casefold() in WHOLE)
