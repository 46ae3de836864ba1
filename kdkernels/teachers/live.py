"""One or more teachers that run in this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data.collator import View
from ..sides import Ensemble, LMHead, Side
from ..tap.head import HeadTap, Tapped
from ..tap.weights import logit_columns

__all__ = ["LiveTeacher"]


class LiveTeacher:
    """A ``TeacherSource`` that runs causal language models without their heads, and passes hidden states and head to the loss.

    The models run in eval mode without gradients, and keep their dtype and device. Targets are moved to the view's device.

    Args:
        models: a transformers model, or several, which form a ``kd.Ensemble``.
        mode: for several models: ``"probs"`` averages probabilities, ``"logits"`` averages logits. The two differ, so it has no default.
        weights: for several models; default: equal weights.
        vocab_size: real size of the vocabulary if heads are padded. Default: all columns.

    Raises:
        ValueError: several models without a mode, or with different vocabularies and without ``vocab_size``.
    """

    def __init__(
        self,
        models: nn.Module | Sequence[nn.Module],
        mode: Literal["probs", "logits"] | None = None,
        weights: Sequence[float] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.models = [models] if isinstance(models, nn.Module) else list(models)
        if not self.models:
            raise ValueError("LiveTeacher needs at least one model")
        if len(self.models) > 1 and mode not in ("probs", "logits"):
            raise ValueError(
                f"several teachers need mode='probs' (average of probabilities) or mode='logits' (average of logits), got {mode!r}"
            )
        self.mode, self.weights = mode if len(self.models) > 1 else None, weights
        for model in self.models:
            model.eval().requires_grad_(False)
        columns = [logit_columns(model) for model in self.models]
        if vocab_size is None and len(set(columns)) > 1:
            raise ValueError(f"the teachers have {', '.join(map(str, columns))} columns of logits: give the real vocab_size")
        self.vocab_size: int = vocab_size or columns[0]
        self.taps = [HeadTap(model, self.vocab_size) for model in self.models]
        self._heads: dict[tuple[int, torch.device], tuple[Tensor, Tensor | None]] = {}

    @torch.no_grad()
    def targets(self, view: View) -> Side | Ensemble:
        """Return an ``LMHead`` (logits if the head is not a plain linear layer), or a ``kd.Ensemble`` of them, with ``[n]`` rows."""
        sides = [self._side(number, self._forward(number, view), view.scored) for number in range(len(self.models))]
        return sides[0] if self.mode is None else Ensemble(sides, self.weights, mode=self.mode)

    def prepare(self, input_ids: Tensor) -> None:
        """Find each model's logit transform with a few tokens of ``input_ids`` ``[B, L]``. Otherwise the first ``targets`` does so."""
        for tap, model in zip(self.taps, self.models, strict=True):
            if tap.columns is None:
                tap.prepare(model, input_ids.to(next(model.parameters()).device))

    def place(self, device: torch.device) -> None:
        """Move models that are on the CPU to ``device``. Models on another device, or placed by a device map, are not moved."""
        for model in self.models:
            if device.type != "cpu" and not hasattr(model, "hf_device_map") and {p.device.type for p in model.parameters()} == {"cpu"}:
                model.to(device)

    def _forward(self, number: int, view: View) -> Tapped:
        model = self.models[number]
        device = next(model.parameters()).device
        named = {"input_ids": view.input_ids, "attention_mask": view.attention_mask, "position_ids": view.position_ids}
        inputs: dict[str, Any] = {name: t.to(device) for name, t in named.items() if t is not None}
        tapped: Tapped = self.taps[number](model, **inputs)
        return tapped

    def _side(self, number: int, tapped: Tapped, scored: Tensor) -> Side:
        if tapped.hidden is None:
            return tapped.side(scored.to(tapped.output.logits.device)).to(scored.device)  # type: ignore[union-attr]
        with tapped.computing():
            side = tapped.side(scored.to(tapped.hidden.device))
        if not isinstance(side, LMHead) or side.hidden.device == scored.device:
            return side
        key = number, scored.device
        if key not in self._heads:  # the teacher does not change, so its head is moved once
            self._heads[key] = side.weight.to(scored.device), None if side.bias is None else side.bias.to(scored.device)
        weight, bias = self._heads[key]
        return dataclasses.replace(side, hidden=side.hidden.to(scored.device), weight=weight, bias=bias)
