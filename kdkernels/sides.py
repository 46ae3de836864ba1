"""What a student or a teacher is: hidden states with an LM head, or logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

__all__ = ["LMHead", "Side"]


@dataclass(frozen=True, eq=False)
class LMHead:
    """Hidden states and the head that would turn them into logits.

    ``z = hidden @ weight[:vocab_size].T + bias[:vocab_size]``, then ``z * scale``, then ``softcap * tanh(z / softcap)``.

    Args:
        hidden: ``[..., D]``, the last hidden states (after the final norm).
        weight: ``[V, D]``, the LM head, same dtype as ``hidden`` (under autocast any).
        bias: ``[V]`` or None.
        scale: multiplies the logits (Cohere's ``logit_scale``; Granite's ``1 / logits_scaling``).
        softcap: soft cap of the logits (Gemma 2's ``final_logit_softcapping``), or None.
        vocab_size: the real vocabulary where the head is padded (Qwen: 151936 / 152064): rows beyond it are cut off.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None


Side: TypeAlias = LMHead | Tensor
"""A student or teacher: an :class:`LMHead`, or a logits tensor ``[..., V]``."""
