"""The loss of one batch. Both models run on their views; the loss is computed inside the student's forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses, primitives
from ..data.collator import IGNORED
from ..divergences import Divergence
from ..sides import Side
from ..tap.head import HeadTap, Tapped
from ..teachers.live import LiveTeacher
from ..teachers.source import TeacherSource
from .batch import Batch
from .features import FeatureTap

__all__ = ["TERMS", "Objective"]

STATS = ("divergence", "cross_entropy", "student_entropy", "teacher_entropy", "top1_agreement")
TERMS = (*STATS, "feature_loss", "aux_loss", "objective", "tokens")
"""Quantities summed over scored tokens for logs and evaluations. ``objective`` is the minimised loss with all weights."""


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

    def without_teacher(self) -> Objective:
        """Return the objective with the cross-entropy alone."""
        return dataclasses.replace(self, teacher=None, features=None, feature_weight=0.0, kd_weight=0.0, ce_weight=1.0)

    def __call__(
        self, model: nn.Module, inputs: Mapping[str, Any], each: bool = False, num_items: Tensor | int = 1, ranks: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Run both models and compute the loss of a batch.

        Args:
            model: the student, or the wrapper whose forward pass must run.
            inputs: a batch of a :class:`~kdkernels.data.collator.Collator`, on the student's device.
            each: return the terms per item.
            num_items: denominator of the loss, 0-dim, for all ``ranks`` over which a wrapper averages the gradient. The division is
                inside the forward pass because FSDP's mixed precision rounds the output and the incoming gradient.

        Returns:
            The loss, 0-dim, and the detached float64 sums of ``TERMS``: ``[len(TERMS)]``, or ``[items, len(TERMS)]`` with ``each``.
        """
        batch = Batch.of(inputs)
        view = batch.student
        if self.tap.columns is None:  # before feature recording starts
            self.tap.prepare(model, view.input_ids)
            if isinstance(self.teacher, LiveTeacher):
                self.teacher.prepare(batch.teacher.input_ids)
        teacher_features = targets = None
        if self.teacher is not None and (self.kd_weight > 0 or self.features is not None):
            recording = nullcontext() if self.features is None else self.features.teacher.recording(batch.teacher.input_ids)
            with torch.no_grad(), recording as teacher_features:
                targets = self.teacher.targets(batch.teacher)
        with nullcontext() if self.features is None else self.features.student.recording(view.input_ids) as student_features:
            results: list[tuple[Tensor, Tensor]] = []

            def finish(tapped: Tapped) -> Tensor:
                loss, sums = self._terms(tapped, targets, batch, student_features, teacher_features, each)
                loss = loss / num_items * ranks
                results.append((loss.detach(), sums))
                return loss

            arguments = {"input_ids": view.input_ids, "attention_mask": view.attention_mask, "position_ids": view.position_ids}
            loss = self.tap(model, finish, **{name: tensor for name, tensor in arguments.items() if tensor is not None})
        exact, sums = results[-1]
        if loss.dtype != exact.dtype:
            loss = loss + (exact - loss).detach()
        return loss, sums

    def _terms(
        self, tapped: Tapped, targets: Any, batch: Batch, student_features: Any, teacher_features: Any, each: bool
    ) -> tuple[Tensor, Tensor]:
        scored = batch.student.scored
        groups, count = (batch.item_indices(), len(batch.sizes)) if each else (torch.zeros_like(scored), 1)
        sums = torch.zeros(count, len(TERMS), dtype=torch.float64, device=scored.device)

        def add(name: str, values: Tensor) -> None:
            """Add token values ``[n]``, or their sum."""
            values = values.detach().double().reshape(-1)
            sums[:, TERMS.index(name)].index_add_(0, groups[: len(values)], values)

        loss, terms = self._token_loss(tapped.side(scored), targets, batch, "none" if each else "sum")
        for name, values in {**terms, "objective": loss, "tokens": torch.ones_like(scored)}.items():
            add(name, values)
        loss = loss.sum()
        if self.features is not None:
            for group in range(count):
                index = (groups == group).nonzero().squeeze(1)
                part = self.features.loss(
                    student_features, teacher_features, scored[index], batch.teacher.scored[index], num_items=1,
                    token_weights=batch.token_weights[index],
                )  # fmt: skip
                loss = loss + self.feature_weight * part
                sums[group, TERMS.index("feature_loss")] = part.detach()
                sums[group, TERMS.index("objective")] += self.feature_weight * part.detach()
        if tapped.aux_loss is not None and not each:
            # aux_loss is a mean over this pass. Weight it by the number of tokens, so that it does not grow with the number of passes.
            auxiliary = tapped.aux_loss * scored.numel()
            loss = loss + auxiliary
            add("aux_loss", auxiliary)
            add("objective", auxiliary)
        return loss, sums if each else sums[0]

    def _token_loss(self, student: Side, targets: Any, batch: Batch, reduction: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the tokens, and the statistics ``STATS`` of each token."""
        labels = batch.labels
        common: dict[str, Any] = {
            "token_weights": batch.token_weights,
            "reduction": reduction,
            "memory_budget": self.memory_budget,
        }
        # Neither prompts nor the student's own words are labels.
        hard = labels if batch.response is None else labels.masked_fill(~batch.response, IGNORED)
        ce_weight = 0.0 if batch.on_policy else self.ce_weight
        if self.kd_weight == 0:
            weights = common.pop("token_weights") if reduction == "none" else 1  # evaluation metrics are not weighted
            cross_entropy = primitives.cross_entropy(student, hard, **common)
            return cross_entropy * weights * ce_weight, {"cross_entropy": cross_entropy}
        together = hard is labels
        loss, stats = losses.distillation_loss(
            student, targets, divergence=self.divergence, temperature=self.temperature, t_squared=self.t_squared, labels=labels,
            kd_weight=self.kd_weight, ce_weight=ce_weight if together else 0.0, return_stats=True, **common,
        )  # fmt: skip
        if ce_weight and not together:
            loss = loss + ce_weight * primitives.cross_entropy(student, hard, **common)
        return loss, {name: getattr(stats, name) for name in STATS}
