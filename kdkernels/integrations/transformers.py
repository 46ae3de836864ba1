"""transformers ``Trainer`` and its subclasses: distil from a teacher without changing the training script."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..divergences import Divergence
from ..sides import Side
from ..tap.head import Tapped
from .pair import Options, Pair, Scored, pair_of, token_loss
from .patches import Framework, Patch, Value, active_patch

__all__ = ["distill"]

FRAMEWORK = Framework("transformers", "5.6.0", "5.24.0")
NOT_OF_THE_MODEL = ("labels", "shift_labels", "num_items_in_batch")


def distill(
    trainer: Any,
    teacher: nn.Module,
    *,
    divergence: Divergence | str = "forward_kl",
    temperature: float = 1.0,
    t_squared: bool = True,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    vocab_size: int | None = None,
    memory_budget: int | None = None,
    force: bool = False,
) -> Patch:
    """Replace the loss of one trainer by ``kd_weight * T^2 * D(teacher, student) + ce_weight * CE``, averaged over its labels.

    The average is over the labels of all accumulated batches on all ranks, like the trainer's own. The teacher is set to eval mode,
    frozen, and moved to the device by the trainer's accelerator.

    Args:
        trainer: a ``transformers.Trainer`` or an instance of a subclass, whose batches have ``input_ids`` and ``labels``.
        teacher: a causal language model with the same tokenizer.
        divergence, temperature, t_squared, kd_weight, ce_weight, memory_budget: as in ``kd.distillation_loss``.
        vocab_size: the real vocabulary size, if a head is padded.
        force: allow untested versions of transformers.

    Raises:
        UnsupportedVersion: this version of transformers was not tested.
        ValueError: the trainer already distils with other options.

    Example::

        from kdkernels.integrations.transformers import distill

        distill(trainer, teacher, temperature=2.0, ce_weight=0.5)
        trainer.train()
    """
    FRAMEWORK.check_version(force)
    options = Options(divergence, temperature, t_squared, kd_weight, ce_weight, memory_budget)
    signature = (id(teacher), vocab_size, options)
    if (patched := active_patch(trainer, "compute_loss", signature)) is not None:
        return patched
    teacher.requires_grad_(False)
    teacher = trainer.accelerator.prepare_model(teacher, evaluation_mode=True).eval()

    def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        loss, outputs = _loss(trainer, model, teacher, inputs, options, vocab_size, return_outputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    values = [
        Value(trainer, "compute_loss", compute_loss),
        # Makes the trainer count the labels of all accumulated batches and leave the division to the loss.
        Value(trainer, "model_accepts_loss_kwargs", True),
        Value(trainer, "_loss_shifts_labels", True),
    ]
    name = divergence if isinstance(divergence, str) else repr(divergence)
    description = f"transformers {FRAMEWORK.version}: {type(trainer).__name__}.compute_loss distils with {name} at T = {temperature}"
    return Patch(description, values, signature)


def _loss(
    trainer: Any,
    model: Any,
    teacher: nn.Module,
    inputs: Any,
    options: Options,
    vocab_size: int | None,
    with_outputs: bool,
    num_items: Any,
) -> tuple[Tensor, Any]:
    labels, shifted = inputs.get("shift_labels"), True
    if labels is None:
        labels, shifted = inputs.get("labels"), False
    if labels is None:
        raise ValueError(f"the batch holds {', '.join(inputs)}, but no labels: distillation scores the tokens that have one")
    texts = {name: value for name, value in inputs.items() if name not in NOT_OF_THE_MODEL}
    pair, scored = pair_of(trainer, model, teacher, vocab_size), Scored.of(labels, shifted)
    teacher_side = pair.teacher_side(teacher, texts, scored)

    def compute(student: Side, tapped: Tapped) -> Tensor:
        loss = token_loss(student, teacher_side, options, scored.labels, num_items)
        return loss + _auxiliary(pair, tapped, scored, num_items)

    loss, outputs = pair.loss(model, texts, scored, compute, with_outputs)
    if num_items is not None and trainer.args.average_tokens_across_devices:
        loss = loss * trainer.accelerator.num_processes  # the gradient is averaged over the ranks
    return loss, outputs


def _auxiliary(pair: Pair, tapped: Tapped, scored: Scored, num_items: Any) -> Tensor | float:
    """Return the experts' balancing loss. It is a mean over this pass, so it is weighted by the pass's share of the tokens."""
    if tapped.aux_loss is None:
        return 0.0
    return tapped.aux_loss * (1 if num_items is None else scored.rows.numel() / num_items)
