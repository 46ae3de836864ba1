"""ms-swift: ``GKDTrainer`` (``swift rlhf --rlhf_type gkd``) with the kdkernels loss, for a local teacher or a top-k teacher (local or API).

The loss is the same as ms-swift's: no T^2, averaged over the labels of each batch; in the top-k mode both distributions are renormalised
over the teacher's tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import cross_entropy, token_logprobs, topk_logprobs
from ..divergences import of_beta
from ..sides import Side
from ..tap.head import Tapped
from ..tap.weights import logit_columns
from .pair import Options, Pair, Scored, pair_of, token_loss
from .patches import Framework, Patch, Source, Value, active_patch

__all__ = ["patch"]

FRAMEWORK = Framework("ms-swift", "4.6.0", "4.6.0")
NOT_OF_THE_MODEL = ("labels", "logits_to_keep")


def patch(*, memory_budget: int | None = None, force: bool = False) -> Patch:
    """Make ms-swift's ``GKDTrainer`` use the kdkernels loss.

    Args:
        memory_budget: bytes for the chunk buffers, as in ``kd.distillation_loss``.
        force: patch untested versions of ms-swift.

    Raises:
        ModuleNotFoundError: ms-swift is not installed.
        UnsupportedVersion: this version of ms-swift was not tested.

    Example::

        from kdkernels.integrations import ms_swift

        print(ms_swift.patch())
        trainer.train()
    """
    FRAMEWORK.check_version(force)
    module = importlib.import_module("swift.rlhf_trainers.gkd_trainer")
    losses = importlib.import_module("swift.rlhf_trainers.gkd_loss")
    trainer = module.GKDTrainer
    if (patched := active_patch(trainer, "compute_loss", memory_budget)) is not None:
        return patched
    FRAMEWORK.check_sources(
        (
            Source(trainer, "compute_loss", ("f1030b712e3201fd",)),
            Source(trainer, "_compute_jsd_loss", ("a4acc9549dc72783",)),
            Source(losses, "gkd_loss", ("98f9f0e63e2ebb40",)),
            Source(losses, "extract_active", ("fdee3840c9840da8",)),
            Source(losses, "jsd_loss", ("44ce224e6e0c8263",)),
        ),
        force,
    )
    description = f"ms-swift {FRAMEWORK.version}: kdkernels computes the loss of GKDTrainer, without [N, V] logits"
    return Patch(description, [Value(trainer, "compute_loss", _compute_loss(module, losses.jsd_loss, memory_budget))], memory_budget)


def _compute_loss(module: Any, jsd_loss: Callable[..., Tensor], memory_budget: int | None) -> Any:
    original, own_loss = module.GKDTrainer.compute_loss, module.GKDTrainer._compute_jsd_loss

    def compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        if return_outputs or not _is_covered(self, model, own_loss):
            return original(self, model, inputs, return_outputs, num_items_in_batch)
        texts, teacher_texts = inputs["model_inputs"], inputs["teacher_model_inputs"]
        scored, teacher_scored = Scored.of(texts["labels"]), Scored.of(teacher_texts["labels"])
        if scored.rows.numel() != teacher_scored.rows.numel():
            raise ValueError(
                f"the student has {scored.rows.numel()} labels and the teacher {teacher_scored.rows.numel()}: both must score one response"
            )
        ce_weight = self.args.sft_alpha if inputs["gkd_batch"].data_source != module.DataSource.STUDENT else 0.0
        pair = pair_of(self, model, model if self.teacher_model is None else self.teacher_model)
        if self.use_teacher_api or self.gkd_logits_topk is not None:
            ids, logprobs = _topk(module, self, pair, model, inputs, teacher_scored, memory_budget)
            divide = self.temperature

            def distance(student: Side) -> Tensor:
                return _topk_loss(jsd_loss, student, ids, logprobs, self.beta, divide, memory_budget)

        else:
            teacher = _teacher_side(module, self, pair, model, teacher_texts, teacher_scored)
            options = Options(of_beta(self.beta), self.temperature, t_squared=False, memory_budget=memory_budget)

            def distance(student: Side) -> Tensor:
                return token_loss(student, teacher, options)

        def compute(student: Side, tapped: Tapped) -> Tensor:
            loss = distance(student)
            if ce_weight > 0:
                loss = loss + ce_weight * cross_entropy(student, scored.labels, memory_budget=memory_budget)
                loss = loss if tapped.aux_loss is None else loss + ce_weight * tapped.aux_loss
            return loss

        return pair.loss(model, _forward_inputs(texts), scored, compute)[0]

    return compute_loss


def _is_covered(trainer: Any, model: Any, own_loss: Any) -> bool:
    """Return False if ms-swift's own code must run: for its Liger loss, sequence parallelism, other vocabularies, or a subclass's loss."""
    teacher = trainer.teacher_model
    base = trainer.accelerator.unwrap_model(model)
    same = teacher is None or logit_columns(trainer.accelerator.unwrap_model(teacher)) == logit_columns(base)
    plain = not trainer.use_liger_gkd_loss and trainer.template.sequence_parallel_size == 1
    return bool(plain and same and type(trainer)._compute_jsd_loss is own_loss)


def _forward_inputs(inputs: Any) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in NOT_OF_THE_MODEL}


def _teacher_side(module: Any, trainer: Any, pair: Pair, model: Any, inputs: Any, scored: Scored) -> Side:
    """Run the teacher like ms-swift: a separate model, or the student with or without its adapter."""
    checkpointing = trainer.args.gradient_checkpointing_kwargs
    if trainer._is_self_distillation:
        student = trainer.accelerator.unwrap_model(model)
        adapter = student.disable_adapter() if trainer._teacher_use_disable_adapter else nullcontext()
        with adapter, module.disable_gradient_checkpointing(model, checkpointing):
            return pair.teacher_side(model, _forward_inputs(inputs), scored)
    loading = trainer.load_teacher_model_context() if trainer.args.offload_teacher_model else nullcontext()
    with loading, module.disable_gradient_checkpointing(trainer.teacher_model, checkpointing):
        return pair.teacher_side(trainer.teacher_model, _forward_inputs(inputs), scored)


def _topk(
    module: Any, trainer: Any, pair: Pair, model: Any, inputs: Any, scored: Scored, memory_budget: int | None
) -> tuple[Tensor, Tensor]:
    """Return the teacher's tokens and their log-probabilities, ``[n, K]``, from an API or a local teacher."""
    if trainer.use_teacher_api:
        batch = inputs["gkd_batch"]
        ids, logprobs = batch.teacher_topk_indices, batch.teacher_topk_logprobs
        return tuple(tensor.flatten(0, 1).index_select(0, scored.rows) for tensor in (ids, logprobs))
    side = _teacher_side(module, trainer, pair, model, inputs["teacher_model_inputs"], scored)
    top = topk_logprobs(side, trainer.gkd_logits_topk, memory_budget=memory_budget)
    return top.ids, top.logprobs


def _topk_loss(
    jsd_loss: Callable[..., Tensor],
    student: Side,
    ids: Tensor,
    logprobs: Tensor,
    beta: float,
    temperature: float,
    memory_budget: int | None,
) -> Tensor:
    """Return ms-swift's mean over ``[n, K]``. Its softmax over K needs log-probabilities only up to a constant per row, not logits."""
    covered = ~torch.isinf(logprobs).all(dim=-1)
    of_student = token_logprobs(student, ids, memory_budget=memory_budget)
    total = jsd_loss(of_student[covered] / temperature, logprobs[covered] / temperature, beta)
    return total / covered.sum().clamp(min=1)
