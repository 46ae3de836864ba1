"""What a student or a teacher is: hidden states with an LM head, or logits; or what has been kept of a teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

__all__ = ["Ensemble", "LMHead", "Sampled", "Side", "Tail", "Teacher", "TopK", "check_number"]

Tail = Literal["bucket", "renorm", "zero"]
"""What a loss takes the probability outside a ``TopK`` for: one more outcome, nothing (the rest renormalised), or left out."""

EnsembleMode = Literal["probs", "logits"]


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


@dataclass(frozen=True, eq=False)
class TopK:
    """The most likely tokens of each position with their log-probabilities, as ``topk_logprobs`` gives and caches keep them.

    Args:
        ids: ``[..., K]`` integers; -1 is padding, whatever its log-probability holds.
        logprobs: ``[..., K]`` floats: log softmax(z / temperature) at ids.
        tail: what a loss makes of the probability outside.
        temperature: that the log-probabilities were taken at.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit together.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tail = "bucket"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_ids("TopK", self.ids)
        _check_beside("TopK.logprobs", self.logprobs, self.ids)
        if not self.logprobs.is_floating_point():
            raise TypeError(f"TopK.logprobs must be floating point, got {self.logprobs.dtype}")
        if self.tail not in get_args(Tail):
            raise ValueError(f"TopK.tail must be one of {', '.join(map(repr, get_args(Tail)))}, got {self.tail!r}")
        check_number("TopK.temperature", self.temperature)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"TopK.temperature must be finite and > 0, got {self.temperature}")


@dataclass(frozen=True, eq=False)
class Sampled:
    """Tokens drawn at each position, as ``sample`` gives them; an id may occur more than once.

    Args:
        ids: ``[..., S]`` integers; -1 is padding.
        counts: ``[..., S]``: how often each was drawn (or its weight), >= 0.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit together.
    """

    ids: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        _check_ids("Sampled", self.ids)
        _check_beside("Sampled.counts", self.counts, self.ids)
        if self.counts.dtype == torch.bool or self.counts.is_complex():
            raise TypeError(f"Sampled.counts must be numbers, got {self.counts.dtype}")


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Several teachers as one: the weighted average of their probabilities, or of their logits. The two differ, so the mode has no default.

    Args:
        teachers: heads or logits, of one vocabulary and one leading shape; hidden sizes and dtypes may differ.
        weights: one each, > 0, normalised to a sum of 1; None for equal ones.
        mode: ``"probs"`` averages softmax(z / T) at the loss's temperature, ``"logits"`` averages z.

    Raises:
        TypeError, ValueError: no teachers, or weights or a mode that make no sense.
    """

    teachers: Sequence[Side]
    weights: Sequence[float] | None = None
    mode: EnsembleMode = field(kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.teachers, (Tensor, LMHead)) or not isinstance(self.teachers, Sequence):
            raise TypeError(f"Ensemble.teachers must be a list of LMHeads or logits, got {type(self.teachers).__name__}")
        if not self.teachers:
            raise ValueError("Ensemble.teachers is empty: give one or more")
        if self.mode not in get_args(EnsembleMode):
            raise ValueError(f"Ensemble.mode must be one of {', '.join(map(repr, get_args(EnsembleMode)))}, got {self.mode!r}")
        if self.weights is None:
            return
        if not isinstance(self.weights, Sequence):
            raise TypeError(f"Ensemble.weights must be a list of numbers, got {type(self.weights).__name__}")
        if len(self.weights) != len(self.teachers):
            raise ValueError(f"Ensemble.weights must be one per teacher, {len(self.teachers)}, got {len(self.weights)}")
        for weight in self.weights:
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise TypeError(f"Ensemble.weights must be Python numbers, got {type(weight).__name__}")
            if not 0 < weight < math.inf:
                raise ValueError(f"Ensemble.weights must be finite and > 0, got {weight}: leave that teacher out instead")

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights, with a sum of 1."""
        weights = self.weights or [1.0] * len(self.teachers)
        return tuple(float(w) / math.fsum(weights) for w in weights)


Teacher: TypeAlias = Side | TopK | Sampled | Ensemble
"""What a loss takes for a teacher."""


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__} (of a tensor take .item())")


def _check_ids(name: str, ids: Tensor) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}.ids must be a tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int16, torch.int32, torch.int64):
        raise TypeError(f"{name}.ids must be integers, got {ids.dtype}")
    if ids.dim() < 1 or ids.shape[-1] < 1:
        raise ValueError(f"{name}.ids must be [..., K] with K >= 1, got shape {list(ids.shape)}")


def _check_beside(name: str, tensor: Tensor, ids: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != ids.shape:
        raise ValueError(f"{name} must have the ids' shape {list(ids.shape)}, got {list(tensor.shape)}")
    if tensor.device != ids.device:
        raise ValueError(f"{name} is on {tensor.device}, the ids on {ids.device}: move one with .to(device)")
