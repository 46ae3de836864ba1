"""The loss of one batch: both models run on their views, and the loss is computed inside the student's forward pass, where a wrapper sees it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses, primitives
from ..divergences import Divergence
from ..sides import Side
from ..teachers.live import LiveTeacher
from ..teachers.source import TeacherSource
from .collator import IGNORED, view_of
from .features import FeatureTap
from .head import HeadTap, Tapped

__all__ = ["TERMS", "Objective"]

STATS = ("divergence", "cross_entropy", "student_entropy", "teacher_entropy", "top1_agreement")
TERMS = (*STATS, "feature_loss", "aux_loss", "objective", "tokens")
"""What is summed over scored tokens for logs and evaluation. ``objective`` is what is minimised, every weight included."""


@dataclass(frozen=True)
class Objective:
    """``kd_weight * T^2 * D + ce_weight * CE + feature_weight * features``, times the token's weight, summed over scored tokens."""

    tap: HeadTap
    teacher: TeacherSource | None
    features: FeatureTap | None = None
    feature_weight: float = 0.0
    divergence: Divergence | str = "forward_kl"
    temperature: float = 1.0
    t_squared: bool = True
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    memory_budget: int | None = None

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], each: bool = False) -> tuple[Tensor, Tensor]:
        """
        Args:
            model: the student, or the wrapper that has to see its forward pass.
            batch: of a :class:`~kdkernels.trainer.collator.Collator`, on the student's device.
            each: keep the items of the batch apart.

        Returns:
            The loss, 0-dim, and ``TERMS`` as float64, detached: their sums ``[len(TERMS)]``, or ``[items, len(TERMS)]`` with ``each``.
        """
        view = view_of(batch)
        given = {"input_ids": view.input_ids, "attention_mask": view.attention_mask, "position_ids": view.position_ids}
        if self.tap.columns is None:
            self.tap.prepare(model, view.input_ids)  # before features are recorded
        theirs = targets = None
        if self.teacher is not None:
            with torch.no_grad(), nullcontext() if self.features is None else self.features.teacher.recording() as theirs:
                targets = self.teacher.targets(view_of(batch, "teacher_"))
        with nullcontext() if self.features is None else self.features.student.recording() as ours:

            def finish(tapped: Tapped) -> dict[str, Tensor]:
                loss, sums = self._terms(tapped, targets, batch, ours, theirs, each)
                return {"loss": loss, "sums": sums}

            out = self.tap(model, finish, **{name: t for name, t in given.items() if t is not None})
        return out["loss"], out["sums"]

    def _terms(
        self, tapped: Tapped, targets: Any, batch: Mapping[str, Any], ours: Any, theirs: Any, each: bool
    ) -> tuple[Tensor, Tensor]:
        scored, weights = batch["scored"], batch["token_weights"]
        loss, stats = self._token_loss(tapped.side(scored), targets, batch, "none" if each else "sum")
        zero = torch.zeros(scored.numel(), device=scored.device)
        columns = {name: zero if stats is None else getattr(stats, name) for name in STATS}
        per_token = torch.stack([columns[name].double() for name in STATS])  # [STATS, n]
        groups = _groups(batch) if each else torch.zeros_like(scored)
        count = len(batch["sizes"]) if each else 1
        sums = torch.zeros(count, len(TERMS), dtype=torch.float64, device=scored.device)
        sums[:, : len(STATS)].index_add_(0, groups, per_token.T)
        sums[:, TERMS.index("tokens")].index_add_(0, groups, torch.ones_like(zero, dtype=torch.float64))
        if each:
            sums[:, TERMS.index("objective")].index_add_(0, groups, loss.detach().double())
            if stats is None:
                sums[:, TERMS.index("cross_entropy")].index_add_(0, groups, loss.detach().double() / (self.ce_weight or 1.0))
            loss = loss.sum()
        elif stats is None:
            sums[:, TERMS.index("cross_entropy")] = loss.detach().double() / (self.ce_weight or 1.0)
        if self.features is not None:
            for group in range(count):
                own = (groups == group).nonzero().squeeze(1)
                part = self.features.loss(ours, theirs, scored[own], batch["teacher_scored"][own], num_items=1, token_weights=weights[own])
                loss = loss + self.feature_weight * part
                sums[group, TERMS.index("feature_loss")] = part.detach()
                if each:
                    sums[group, TERMS.index("objective")] += self.feature_weight * part.detach()
        if tapped.aux_loss is not None and not each:
            # The model's own term is a mean over this pass: weighted by its tokens, so that it does not grow with the number of passes.
            loss = loss + tapped.aux_loss * scored.numel()
            sums[0, TERMS.index("aux_loss")] = tapped.aux_loss.detach() * scored.numel()
        if not each:
            sums[0, TERMS.index("objective")] = loss.detach()
        return loss, sums if each else sums[0]

    def _token_loss(self, student: Side, targets: Any, batch: Mapping[str, Any], reduction: str) -> tuple[Tensor, losses.TokenStats | None]:
        labels = batch["labels"].flatten()[batch["scored"] + 1]
        weights, response = batch["token_weights"], batch.get("response")
        # The student's own words are no labels, and no more are prompts.
        ce_weight = 0.0 if batch.get("on_policy") else self.ce_weight
        if self.kd_weight == 0:
            if ce_weight and response is not None:
                labels = labels.masked_fill(~response, IGNORED)
            loss = primitives.cross_entropy(student, labels, token_weights=weights, reduction=reduction, memory_budget=self.memory_budget)
            return loss * ce_weight, None
        apart = ce_weight > 0 and response is not None
        loss, stats = losses.distillation_loss(
            student, targets, divergence=self.divergence, temperature=self.temperature, t_squared=self.t_squared, labels=labels,
            kd_weight=self.kd_weight, ce_weight=0.0 if apart else ce_weight, token_weights=weights, reduction=reduction,
            memory_budget=self.memory_budget, return_stats=True,
        )  # fmt: skip
        if apart:
            hard = labels.masked_fill(~response, IGNORED)  # type: ignore[operator]
            loss = loss + ce_weight * primitives.cross_entropy(
                student, hard, token_weights=weights, reduction=reduction, memory_budget=self.memory_budget
            )
        return loss, stats


def _groups(batch: Mapping[str, Any]) -> Tensor:
    """``[n]``: the item that each scored token is of."""
    counts, device = torch.tensor(batch["counts"]), batch["scored"].device
    of_example = torch.repeat_interleave(torch.arange(len(batch["sizes"])), torch.tensor(batch["sizes"]))
    return torch.repeat_interleave(of_example, counts).to(device)
