"""Run one process of test_trainer_sharded.py: ``torchrun sharded_ranks.py (fsdp|zero3) FOLDER``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from ranks import leave
from training import make_model, make_rows, make_tokenizer

# Cases by the kind of sharding. Each is compared with one process that has twice the rows in a batch.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "fsdp": {
        "untied": {"args": {"gradient_accumulation_steps": 2}},
        "tied": {"args": {"max_grad_norm": 0.1}, "tied": True},
        "untied, layers kept": {"sharding": {"reshard_after_forward": False}},
        "tied, layers kept": {"sharding": {"reshard_after_forward": False}, "tied": True},
    },
    "zero3": {
        "untied": {"args": {"gradient_accumulation_steps": 2}},
        "tied": {"args": {"max_grad_norm": 0.1}, "tied": True},
        "tied, prefetched": {"sharding": {"stage3_prefetch_bucket_size": 10**8}, "tied": True},
    },
}
ZERO3 = {
    # Shard small parameters too.
    "zero_optimization": {
        "stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True, "reduce_bucket_size": 10**5,
    },
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"),
}  # fmt: skip


def dtype_of(kind: str) -> torch.dtype:
    """Return the dtype to train in. DeepSpeed's master weights are float32."""
    return torch.float64 if kind == "fsdp" else torch.float32


def make(kind: str, folder: Path, sharding: dict[str, Any] | None = None, tied: bool = False, args: dict[str, Any] | None = None) -> Any:
    """Make a trainer. Without ``torchrun`` it takes the same steps in one process."""
    from kdkernels.trainer import DistillationArguments, DistillationTrainer

    alone = "RANK" not in os.environ
    options = {
        "output_dir": str(folder / "out"), "max_steps": 2, "learning_rate": 1.0, "optim": "sgd", "use_cpu": True, "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "ce_weight": 0.5,
        "temperature": 2.0, "per_device_eval_batch_size": 4, "dataloader_pin_memory": False, **(args or {}),
    }  # fmt: skip
    options["per_device_train_batch_size"] = (2 if alone else 1) * 4 // options.get("gradient_accumulation_steps", 1)
    if not alone:
        options["ddp_backend"] = "gloo"
        if kind == "fsdp":
            options |= {"fsdp": True, "fsdp_config": {"version": 2, **(sharding or {})}}
        else:
            options["deepspeed"] = {**ZERO3, "zero_optimization": {**ZERO3["zero_optimization"], **(sharding or {})}}  # type: ignore[dict-item]
    arguments = DistillationArguments(**options)
    if not alone:
        disguise()
    dtype = dtype_of(kind)
    student = make_model(16, seed=1, dtype=dtype, tie_word_embeddings=tied)
    teacher = make_model(24, seed=2, dtype=dtype, initializer_range=0.3)
    rows = {"train_dataset": make_rows(32), "eval_dataset": make_rows(11, seed=5)}
    return DistillationTrainer(model=student, teacher=teacher, args=arguments, processing_class=make_tokenizer(), **rows)


def disguise() -> None:
    """Present gloo processes as GPUs. accelerate allows FSDP and DeepSpeed only on GPUs."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    """Return the unsharded weights, on every rank."""
    if trainer.is_deepspeed_enabled:
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).clone() for name, p in trainer.model.named_parameters()}
    return {name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for name, p in trainer.model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def resumed(kind: str, folder: Path, sharding: dict[str, Any]) -> dict[str, Any]:
    """Resume a run with features at step 2 of 4. Return whether its weights, and the saved ones, equal the uninterrupted run's."""
    from safetensors.torch import load_file

    args = {
        "max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2,
        "output_dir": str(folder), "feature_weight": 0.1, "feature_layers": "0:0",
    }  # fmt: skip
    trainer = make(kind, folder, sharding, args=args)
    trainer.train()
    trainer.evaluate()
    trainer.save_model(str(folder / "final"))
    torch.distributed.barrier()
    whole = weights(trainer)
    saved = {**load_file(folder / "final" / "model.safetensors"), **projectors(load_file(folder / "final" / "projector.safetensors"))}
    resumed_trainer = make(kind, folder, sharding, args=args)
    resumed_trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return {"resumed": same(whole, weights(resumed_trainer)), "saved": same(whole, saved)}


def projectors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"kd_projectors.{name}": tensor for name, tensor in state.items()}


def rounded(folder: Path) -> float:
    """Return the held-out loss under bfloat16, where FSDP casts the model's outputs."""
    return float(make("fsdp", folder, args={"bf16": True}).evaluate()["eval_loss"])


def rollouts(kind: str, folder: Path) -> int:
    """Train with rollouts of different lengths on each rank, which must not deadlock. Return the number of steps."""
    from kdkernels.trainer.rollouts import rollouts as write

    trainer = make(kind, folder, args={"on_policy_fraction": 1.0, "max_new_tokens": 2 + 5 * int(os.environ["RANK"])})
    trainer.train()
    items, rank = trainer.train_dataset[:2], int(os.environ["RANK"])
    longest = max(example.student_scored[0] + 1 for item in items for example in item)
    common = {"temperature": 1.0, "max_new_tokens": 3, "vocab_size": None, "place": (0,)}
    responses = write(trainer.model, items, trainer.tokenizer, max_length=longest + 3 * rank, **common)
    assert (responses == items) is (rank == 0)  # rank 0 has no room for a token
    return int(trainer.state.global_step)


def main(kind: str, folder: Path) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    results: dict[str, Any] = {}
    for name, case in CASES[kind].items():
        trainer = make(kind, folder, **case)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.objective.tap.fallback_reason is None
        assert trainer.args.world_size == 2
        assert trainer.is_fsdp_enabled if kind == "fsdp" else trainer.is_deepspeed_enabled
        tensors |= {f"{name}.{parameter}": tensor for parameter, tensor in weights(trainer).items()}
        results[name] = [before, trainer.evaluate()["eval_loss"]]
    states = ("FULL_STATE_DICT", "SHARDED_STATE_DICT") if kind == "fsdp" else ("",)
    for state in states:
        results[f"resume {state}"] = resumed(kind, folder / f"resume{state}", {"state_dict_type": state} if state else {})
    results["rollouts"] = rollouts(kind, folder)
    if kind == "fsdp":
        results["bf16"] = rounded(folder)
    if trainer.args.process_index == 0:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "weights.safetensors")
        (folder / "results.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
