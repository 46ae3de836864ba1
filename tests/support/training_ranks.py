"""Run one process of test_trainer_distributed.py: ``torchrun training_ranks.py FOLDER``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from ranks import leave
from training import make_model, make_rows, make_tokenizer


def make_trainer(folder: Path, tied: bool, **options: Any) -> Any:
    from kdkernels.trainer import DistillationArguments, DistillationTrainer

    defaults = {
        "output_dir": str(folder / "out"), "max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1.0, "optim": "sgd",
        "use_cpu": True, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "disable_tqdm": True, "save_strategy": "no",
        "logging_steps": 1, "ce_weight": 0.5, "temperature": 2.0, "per_device_eval_batch_size": 4, "dataloader_pin_memory": False,
        "ddp_backend": "gloo" if "RANK" in os.environ else None,
    }  # fmt: skip
    args = DistillationArguments(**{**defaults, **options})
    student = make_model(16, seed=1, dtype=torch.float64, tie_word_embeddings=tied)
    teacher = make_model(24, seed=2, dtype=torch.float64, initializer_range=0.3)
    rows = {"train_dataset": make_rows(16), "eval_dataset": make_rows(11, seed=5)}
    return DistillationTrainer(model=student, teacher=teacher, args=args, processing_class=make_tokenizer(), **rows)


def step(trainer: Any) -> dict[str, torch.Tensor]:
    """Train one step and return its gradients."""
    from transformers import TrainerCallback

    gradients: dict[str, torch.Tensor] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            gradients.update({name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()})

    trainer.add_callback(Look())
    trainer.train()
    return gradients


def sharded(tied: bool, reshard: bool, rank: int) -> dict[str, torch.Tensor]:
    """Return the gradients of the same step under FSDP2, with the trainer's loss."""
    from torch.distributed.fsdp import fully_shard

    from kdkernels.data.collator import Collator
    from kdkernels.data.tokenization import load_examples
    from kdkernels.tap.head import HeadTap
    from kdkernels.teachers.live import LiveTeacher
    from kdkernels.trainer.objective import Objective

    model = make_model(16, seed=1, dtype=torch.float64, tie_word_embeddings=tied)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model, reshard_after_forward=reshard)
    teacher = LiveTeacher(make_model(24, seed=2, dtype=torch.float64, initializer_range=0.3))
    items = [(e,) for e in load_examples(make_rows(8), make_tokenizer())]
    batches = [Collator(pad_id=1)(items[:4]), Collator(pad_id=1)(items[4:])]
    count = sum(batch["scored"].numel() for batch in batches)
    loss, _ = Objective(HeadTap(model), teacher, ce_weight=0.5, temperature=2.0)(model, batches[rank])
    (loss / count * 2).backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def main(folder: Path) -> None:
    from safetensors.torch import save_file

    gradients: dict[str, torch.Tensor] = {}
    metrics: dict[str, Any] = {}
    for tied in (False, True):
        trainer = make_trainer(folder, tied)
        rank = trainer.args.process_index
        assert trainer.args.world_size == 2
        if not tied:
            metrics["eval"] = trainer.evaluate()
        gradients |= {f"ddp.{tied}.{name}": g for name, g in step(trainer).items()}
        (metrics[f"log.{tied}"],) = [entry for entry in trainer.state.log_history if "loss" in entry]
        for reshard in (False, True):
            gradients |= {f"fsdp.{tied}.{reshard}.{name}": g for name, g in sharded(tied, reshard, rank).items()}
    trainer = make_trainer(folder, False, on_policy_fraction=1.0, max_new_tokens=4, max_steps=2)
    trainer.train()
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in gradients.items()}, folder / "gradients.safetensors")
        (folder / "metrics.json").write_text(json.dumps(metrics))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
