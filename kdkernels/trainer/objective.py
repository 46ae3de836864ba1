"""The loss of one batch: both models run on their views, and the loss is computed inside the student's forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses, primitives
from ..data.collator import IGNORED, view_of
from ..divergences import Divergence
from ..sides import Side
from ..tap.head import HeadTap, Tapped
from ..teachers.live import LiveTeacher
from ..teachers.source import TeacherSource
from .features import FeatureTap

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

    def without_teacher(self) -> Objective:
        """The cross-entropy alone."""
        return dataclasses.replace(self, teacher=None, features=None, feature_weight=0.0, kd_weight=0.0, ce_weight=1.0)

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Any], each: bool = False, num_items: Tensor | int = 1, ranks: int = 1
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            model: the student, or the wrapper that has to see its forward pass.
            batch: of a :class:`~kdkernels.data.collator.Collator`, on the student's device.
            each: keep the items of the batch apart.
            num_items: what the loss is divided by, 0-dim, of all ``ranks``, over which a wrapper will average its gradient. Done
                here, since FSDP's mixed precision rounds what comes out of a forward pass, and the gradient that goes in.

        Returns:
            The loss, 0-dim, and ``TERMS`` as float64, detached: their sums ``[len(TERMS)]``, or ``[items, len(TERMS)]`` with ``each``.
        """
        view = view_of(batch)
        given = {"input_ids": view.input_ids, "attention_mask": view.attention_mask, "position_ids": view.position_ids}
        if self.tap.columns is None:  # before features are recorded
            self.tap.prepare(model, view.input_ids)
            if isinstance(self.teacher, LiveTeacher):
                self.teacher.prepare(batch["teacher_input_ids"])
        theirs = targets = None
        if self.teacher is not None and (self.kd_weight > 0 or self.features is not None):
            with (
                torch.no_grad(),
                nullcontext() if self.features is None else self.features.teacher.recording(batch["teacher_input_ids"]) as theirs,
            ):
                targets = self.teacher.targets(view_of(batch, "teacher_"))
        with nullcontext() if self.features is None else self.features.student.recording(view.input_ids) as ours:
            kept: list[tuple[Tensor, Tensor]] = []

            def finish(tapped: Tapped) -> Tensor:
                loss, sums = self._terms(tapped, targets, batch, ours, theirs, each)
                loss = loss / num_items * ranks
                kept.append((loss.detach(), sums))
                return loss

            loss = self.tap(model, finish, **{name: t for name, t in given.items() if t is not None})
        exact, sums = kept[-1]
        if loss.dtype != exact.dtype:
            loss = loss + (exact - loss).detach()
        return loss, sums

    def _terms(self, tapped: Tapped, targets: Any, batch: Mapping[str, Any], ours: Any, theirs: Any, each: bool) -> tuple[Tensor, Tensor]:
        scored, weights = batch["scored"], batch["token_weights"]
        groups, count = (_items(batch), len(batch["sizes"])) if each else (torch.zeros_like(scored), 1)
        sums = torch.zeros(count, len(TERMS), dtype=torch.float64, device=scored.device)

        def add(name: str, values: Tensor) -> None:
            """``[n]``, or a sum over all."""
            values = values.detach().double().reshape(-1)
            sums[:, TERMS.index(name)].index_add_(0, groups[: len(values)], values)

        loss, terms = self._token_loss(tapped.side(scored), targets, batch, "none" if each else "sum")
        for name, values in {**terms, "objective": loss, "tokens": torch.ones_like(scored)}.items():
            add(name, values)
        loss = loss.sum()
        if self.features is not None:
            for group in range(count):
                own = (groups == group).nonzero().squeeze(1)
                rows = scored[own], batch["teacher_scored"][own]
                part = self.features.loss(ours, theirs, *rows, num_items=1, token_weights=weights[own])
                loss = loss + self.feature_weight * part
                sums[group, TERMS.index("feature_loss")] = part.detach()
                sums[group, TERMS.index("objective")] += self.feature_weight * part.detach()
        if tapped.aux_loss is not None and not each:
            # A mean over this pass: weighted by its tokens, so that it does not grow with the number of passes.
            auxiliary = tapped.aux_loss * scored.numel()
            loss = loss + auxiliary
            add("aux_loss", auxiliary)
            add("objective", auxiliary)
        return loss, sums if each else sums[0]

    def _token_loss(self, student: Side, targets: Any, batch: Mapping[str, Any], reduction: str) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the tokens, and of each token what ``STATS`` names."""
        labels = batch["labels"].flatten()[batch["scored"] + 1]
        common: dict[str, Any] = {
            "token_weights": batch["token_weights"],
            "reduction": reduction,
            "memory_budget": self.memory_budget,
        }
        # Neither prompts nor the student's own words are labels.
        hard = labels.masked_fill(~batch["response"], IGNORED) if "response" in batch else labels
        ce_weight = 0.0 if batch.get("on_policy") else self.ce_weight
        if self.kd_weight == 0:
            weights = common.pop("token_weights") if reduction == "none" else 1  # the metrics of an evaluation have none
            found = primitives.cross_entropy(student, hard, **common)
            return found * weights * ce_weight, {"cross_entropy": found}
        together = hard is labels
        loss, stats = losses.distillation_loss(
            student, targets, divergence=self.divergence, temperature=self.temperature, t_squared=self.t_squared, labels=labels,
            kd_weight=self.kd_weight, ce_weight=ce_weight if together else 0.0, return_stats=True, **common,
        )  # fmt: skip
        if ce_weight and not together:
            loss = loss + ce_weight * primitives.cross_entropy(student, hard, **common)
        return loss, {name: getattr(stats, name) for name in STATS}


def _items(batch: Mapping[str, Any]) -> Tensor:
    """``[n]``: the item that each scored token is of."""
    of_example = torch.repeat_interleave(torch.arange(len(batch["sizes"])), torch.tensor(batch["sizes"]))
    return torch.repeat_interleave(of_example, torch.tensor(batch["counts"])).to(batch["scored"].device)
