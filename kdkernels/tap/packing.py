"""Measure that a model keeps the examples of a packed row apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .head import HeadTap, Tapped
from .patching import measuring

__all__ = ["check_packing"]


def check_packing(tap: HeadTap, model: nn.Module, device: torch.device) -> None:
    """Run two examples packed and apart, and compare their hidden states.

    Args:
        model: the model of ``tap``, or the wrapper whose forward pass must run.
        device: the device of its input.

    Raises:
        ValueError: two examples in one row change each other's hidden states.
    """
    problem = "its forward pass takes no position_ids" if not tap.takes("position_ids") else None
    if problem is None:
        ids = torch.arange(1, 9, device=device)[None] % (tap.vocab_size or 9)
        positions = torch.arange(4, device=device).repeat(2)[None]
        with measuring(tap.base):
            alone = _states(tap(model, input_ids=ids[:, 4:], position_ids=positions[:, 4:]))
            packed = _states(tap(model, input_ids=ids, position_ids=positions))[:, 4:]
        error, scale = (packed - alone).abs().max().item(), alone.abs().max().item()
        if not error <= 256 * torch.finfo(alone.dtype).eps * scale:
            problem = f"an example sees the one before it in its row (hidden states differ by {error:.2g} of {scale:.2g})"
    if problem is not None:
        raise ValueError(f"packing=True does not work with {tap.family}: {problem}; set packing=False")


def _states(tapped: Tapped) -> Tensor:
    states: Tensor = tapped.output.logits if tapped.hidden is None else tapped.hidden
    return states.float() if states.dtype != torch.float64 else states
