"""NVIDIA ModelOpt: ``KDTrainer`` with the kdkernels loss.

The loss is the same as ModelOpt's: forward KL times T^2, averaged over the labels of each batch. Evaluation runs ModelOpt's own code,
which also reports the cross-entropy.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from ..sides import Side
from ..tap.head import Tapped
from .pair import Options, Scored, pair_of, token_loss
from .patches import Framework, Patch, Source, Value, active_patch

__all__ = ["patch"]

FRAMEWORK = Framework("nvidia-modelopt", "0.47.0", "0.47.0")


def patch(*, memory_budget: int | None = None, force: bool = False) -> Patch:
    """Make ModelOpt's ``KDTrainer`` use the kdkernels loss in training steps.

    Args:
        memory_budget: bytes for the chunk buffers, as in ``kd.distillation_loss``.
        force: patch untested versions of ModelOpt.

    Raises:
        ModuleNotFoundError: ModelOpt is not installed.
        UnsupportedVersion: this version of ModelOpt was not tested.

    Example::

        from kdkernels.integrations import modelopt

        print(modelopt.patch())
        trainer.train()
    """
    FRAMEWORK.check_version(force)
    trainer = importlib.import_module("modelopt.torch.distill.plugins.huggingface").KDTrainer
    criterion = importlib.import_module("modelopt.torch.distill.losses").LogitsDistillationLoss
    if (patched := active_patch(trainer, "compute_loss", memory_budget)) is not None:
        return patched
    FRAMEWORK.check_sources(
        (
            Source(trainer, "compute_loss", ("36cdbb86c802b11f",)),
            Source(trainer, "_standard_kd_loss", ("0c604a48a6d523fe",)),
            Source(trainer, "_compute_teacher_outputs", ("fcab03bd47e95cdf",)),
            Source(criterion, "forward", ("f741ccf4ade98c67",)),
        ),
        force,
    )
    description = f"ModelOpt {FRAMEWORK.version}: kdkernels computes the training loss of KDTrainer, without [N, V] logits"
    return Patch(description, [Value(trainer, "compute_loss", _compute_loss(trainer, criterion, memory_budget))], memory_budget)


def _compute_loss(trainer: Any, criterion: Any, memory_budget: int | None) -> Any:
    original, standard = trainer.compute_loss, trainer._standard_kd_loss

    def compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        overridden = type(self._kd_criterion) is not criterion or type(self)._standard_kd_loss is not standard
        if return_outputs or not model.training or self.use_liger_kernel or overridden:
            return original(self, model, inputs, return_outputs, **kwargs)
        self._ensure_teacher_prepared()
        self._teacher_model.eval()
        texts = {name: value for name, value in inputs.items() if name != "labels"}
        labels = inputs.get("labels")
        scored = Scored.of(texts["input_ids"] if labels is None else labels)
        pair = pair_of(self, model, self._teacher_model)
        options = Options(temperature=self._kd_criterion._temperature, memory_budget=memory_budget)
        with self._ds_gather(self._teacher_model.parameters()):
            teacher = pair.teacher_side(self._teacher_model, texts, scored)

            def compute(student: Side, _: Tapped) -> Tensor:
                return token_loss(student, teacher, options)

            return pair.loss(model, texts, scored, compute)[0]

    return compute_loss
