"""Every use of private methods and attributes of transformers' trainer and of accelerate.

``DistillationTrainer`` overrides the hooks of ``HookedTrainer``, which have public names. Tested with transformers 5.24 and accelerate
1.15. If another release fails, look here first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.integrations import deepspeed as zero

__all__ = ["FSDP_LOADING", "HookedTrainer", "ignore_when_saving", "loaded_whole", "use_one_gpu", "uses_flash_attention"]

FSDP_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # accelerate sets it, transformers reads it


class HookedTrainer(Trainer):  # type: ignore[misc]
    """A ``transformers.Trainer`` with hooks. The default hooks do nothing."""

    model: Any
    model_wrapped: Any
    optimizer: Any
    deepspeed: Any

    def training_initialised(self, checkpoint: Path | None, max_steps: int) -> None:
        """Called before the first step, after the training state was set up (from ``checkpoint``, if given)."""

    def training_ended(self) -> None:
        """Called after the last step, before the best model is loaded."""

    def outside_steps(self) -> AbstractContextManager[None]:
        """Return the context in which logs, evaluations and checkpoints between two steps run."""
        return nullcontext()

    def best_found(self) -> None:
        """Called after an evaluation that is the best so far."""

    def saving_checkpoint(self, folder: Path) -> AbstractContextManager[None]:
        """Return the context in which a checkpoint is written to ``folder``."""
        return nullcontext()

    def saving_weights(self) -> AbstractContextManager[None]:
        """Return the context in which the model is written to a folder."""
        return nullcontext()

    def saved_weights(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the weights to save, given the weights of the whole model."""
        return state_dict

    def weights_loaded(self, folder: Path) -> None:
        """Called after the weights of a checkpoint were loaded, to resume or as the best model."""

    # Called by transformers

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> Any:
        result = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial)
        self.training_initialised(None if resume_from_checkpoint is None else Path(resume_from_checkpoint), max_steps)
        return result

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both, then set this step's learning rate from the new schedule, which may be longer than the checkpoint's."""
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule = self.lr_scheduler
        if checkpoint is not None and isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            rates = [base * factor(schedule.last_epoch) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
            schedule._last_lr = rates

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self.training_ended()
        return super()._finalize_training(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        with self.outside_steps():
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best = bool(super()._determine_best_metric(metrics, trial))
        if best:
            self.best_found()
        return best

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.saving_checkpoint(Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self.saving_weights():
            super()._save(output_dir, None if state_dict is None else self.saved_weights(state_dict))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.weights_loaded(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.weights_loaded(Path(str(self.state.best_model_checkpoint)))

    def _prepare_input(self, data: Any) -> Any:
        """Move a tensor to this device without casting. Under DeepSpeed, transformers would cast floats, which here are token weights."""
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    # Called by DistillationTrainer

    def on_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return a batch on this device."""
        moved: dict[str, Any] = self._prepare_inputs(inputs)
        return moved

    def count_items(self, batches: Sequence[Any], device: torch.device) -> Any:
        """Return the number of scored tokens in the micro-batches of a step, in transformers' format."""
        return self._get_num_items_in_batch(batches, device)

    def save_gathered(self, output_dir: str | None) -> None:
        """Save a sharded model as a whole model in cases where transformers would save shards."""
        self._save(output_dir, self.accelerator.get_state_dict(self.model))

    def shard_for_evaluation(self) -> None:
        """Shard the model before an evaluation that precedes the training: under FSDP 2, accelerate shards it with its optimizer."""
        if self.accelerator.is_fsdp2 and not self.accelerator._models:
            self.create_optimizer()
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model_wrapped = self.model

    def forget_evaluation(self) -> None:
        """Undo the effects of an evaluation before the training, which would prevent wrapping the model for the training."""
        if self.is_deepspeed_enabled and self.deepspeed is not None and self.optimizer is None:  # an inference engine
            self.deepspeed.destroy()
            self.accelerator._models.remove(self.deepspeed)
            self.accelerator.deepspeed_engine_wrapped = self.deepspeed = None
            self.model_wrapped = self.model
        elif self.model_wrapped is self.model and not self.is_fsdp_enabled:  # marked as prepared, so that DDP would not wrap it
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model.__dict__.pop("_is_accelerate_prepared", None)


def use_one_gpu(args: Any) -> None:
    """Make TrainingArguments use one GPU per process. Use torchrun for several GPUs."""
    args._n_gpu = min(args.n_gpu, 1)


def uses_flash_attention(model: Any) -> bool:
    """Return whether a model's attention supports packed rows without padding."""
    return "flash" in str(getattr(model.config, "_attn_implementation", ""))


def ignore_when_saving(model: Any, names: set[str], ignored: bool) -> None:
    """Make ``save_pretrained`` omit the weights with these names, or include them again."""
    keys = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    model._keys_to_ignore_on_save = keys | names if ignored else keys - names


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Load models with all their weights on every rank.

    Under ZeRO-3 and FSDP, models are loaded in parts or on one rank and completed when they are wrapped, but teachers are never wrapped.
    """
    of_rank_0, partitioned = os.environ.get(FSDP_LOADING), zero._hf_deepspeed_config_weak_ref
    os.environ[FSDP_LOADING] = "false"
    zero.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        zero._hf_deepspeed_config_weak_ref = partitioned
        if of_rank_0 is None:
            del os.environ[FSDP_LOADING]
        else:
            os.environ[FSDP_LOADING] = of_rank_0
