"""TRL: ``GKDTrainer``, ``GOLDTrainer`` (equal tokenizers) and ``DistillationTrainer`` with the kdkernels loss.

Losses, masks, temperatures and ``num_items_in_batch`` are the same as in TRL: no T^2, and ``GKDTrainer`` computes its divergence at T = 1
for any sampling temperature.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from .. import LMHead, distillation_loss
from ..divergences import of_beta
from ..sides import Side
from ..tap.head import Tapped
from ..tap.weights import gathered, whole
from .pair import Options, Scored, pair_of, token_loss
from .patches import Framework, Patch, Source, Value, active_patch

__all__ = ["patch"]

FRAMEWORK = Framework("trl", "1.16.0", "1.16.0")


def patch(*, memory_budget: int | None = None, force: bool = False) -> Patch:
    """Make TRL's distillation trainers use the kdkernels loss. Existing trainers use it from their next step on.

    Args:
        memory_budget: bytes for the chunk buffers, as in ``kd.distillation_loss``.
        force: patch untested versions of TRL.

    Raises:
        ModuleNotFoundError: TRL is not installed.
        UnsupportedVersion: this version of TRL was not tested.

    Example::

        from kdkernels.integrations import trl

        print(trl.patch())
        trainer.train()
    """
    FRAMEWORK.check_version(force)
    gkd = importlib.import_module("trl.experimental.gkd.gkd_trainer").GKDTrainer
    gold = importlib.import_module("trl.experimental.gold.gold_trainer").GOLDTrainer
    chunked = importlib.import_module("trl.trainer.distillation_trainer")
    if (patched := active_patch(gkd, "compute_loss", memory_budget)) is not None:
        return patched
    FRAMEWORK.check_sources(
        (
            Source(gkd, "compute_loss", ("6c602000b7955e81",)),
            Source(gkd, "generalized_jsd_loss", ("fa445e28549d31b6",)),
            Source(gold, "compute_loss", ("13740ff7e1f55e2e",)),
            Source(gold, "generalized_jsd_loss", ("9a75626174fcaa92",)),
            Source(chunked, "_chunked_divergence_loss", ("550cb45191ab1654",)),
        ),
        force,
    )
    values = (
        Value(gkd, "compute_loss", _gkd_loss(gkd, memory_budget)),
        Value(gold, "compute_loss", _gold_loss(gold, memory_budget)),
        Value(chunked, "_chunked_divergence_loss", _chunked_loss(memory_budget)),
    )
    description = (
        f"TRL {FRAMEWORK.version}: kdkernels computes the loss of GKDTrainer, GOLDTrainer and DistillationTrainer, without [N, V] logits"
    )
    return Patch(description, values, memory_budget)


def _gkd_loss(gkd: Any, memory_budget: int | None) -> Any:
    original = gkd.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        if self.generalized_jsd_loss is not gkd.generalized_jsd_loss:  # a subclass overrides the loss
            return original(self, model, inputs, return_outputs, num_items_in_batch)
        texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        options = Options(of_beta(self.beta), t_squared=False, memory_budget=memory_budget)
        loss, outputs = _live_loss(self, model, texts, inputs["labels"], options, return_outputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    return compute_loss


def _gold_loss(gold: Any, memory_budget: int | None) -> Any:
    original = gold.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        other_tokenizer = self.use_uld_loss and self.teacher_tokenizer is not None
        if other_tokenizer or self.generalized_jsd_loss is not gold.generalized_jsd_loss:
            return original(self, model, inputs, return_outputs, num_items_in_batch)
        texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        options = Options(of_beta(self.beta), self.temperature, t_squared=False, memory_budget=memory_budget)
        everything = {**texts, **self._get_model_forward_kwargs(inputs)}
        loss, outputs = _live_loss(self, model, everything, inputs["labels"], options, return_outputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    return compute_loss


def _live_loss(
    trainer: Any, model: Any, inputs: dict[str, Any], labels: Tensor, options: Options, with_outputs: bool, num_items: Any
) -> tuple[Tensor, Any]:
    """Compute the loss of a batch for both models."""
    trainer.teacher_model.eval()
    pair, scored = pair_of(trainer, model, trainer.teacher_model), Scored.of(labels)
    teacher = pair.teacher_side(trainer.teacher_model, inputs, scored)

    def compute(student: Side, _: Tapped) -> Tensor:
        return token_loss(student, teacher, options, num_items=num_items)

    return pair.loss(model, inputs, scored, compute, with_outputs)


def _chunked_loss(memory_budget: int | None) -> Any:
    def chunked_divergence_loss(
        student_hidden_states: Tensor,
        teacher_hidden_states: Tensor,
        student_lm_head_weight: Tensor,
        teacher_lm_head_weight: Tensor,
        completion_mask: Tensor,
        beta: float,
        num_items_in_batch: Tensor | int | None = None,
        student_lm_head_bias: Tensor | None = None,
        teacher_lm_head_bias: Tensor | None = None,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_final_logit_softcapping: float | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, the sum of the student's entropies, and the number of tokens."""
        rows = completion_mask.flatten().nonzero().squeeze(1)

        def side(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> LMHead:
            hidden = hidden.flatten(0, -2).index_select(0, rows)
            weight, bias = whole(weight), whole(bias)
            if not torch.is_autocast_enabled(hidden.device.type):
                weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
            return LMHead(hidden, weight, bias, scale, softcap)

        heads = (student_lm_head_weight, student_lm_head_bias, teacher_lm_head_weight, teacher_lm_head_bias)
        with gathered([parameter for parameter in heads if parameter is not None]):
            loss, stats = distillation_loss(
                side(
                    student_hidden_states,
                    student_lm_head_weight,
                    student_lm_head_bias,
                    student_logit_scale,
                    student_final_logit_softcapping,
                ),
                side(
                    teacher_hidden_states,
                    teacher_lm_head_weight,
                    teacher_lm_head_bias,
                    teacher_logit_scale,
                    teacher_final_logit_softcapping,
                ),
                divergence=of_beta(beta),
                temperature=temperature,
                t_squared=False,
                num_items=num_items_in_batch,
                memory_budget=memory_budget,
                return_stats=True,
            )
        return loss, stats.student_entropy.sum(), torch.tensor(rows.numel(), device=rows.device)

    return chunked_divergence_loss
