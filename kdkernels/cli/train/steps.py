"""The steps of a run: steps per epoch, total steps, and the intervals of logs, checkpoints and evaluations."""

from __future__ import annotations

import math
from typing import Any

from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import TrainerState

from ...support.errors import counted
from .settings import TrainError

__all__ = ["items_per_step", "rhythm", "steps_per_epoch", "total_steps"]


def items_per_step(args: Any) -> int:
    """Rows of an optimizer step, in all processes."""
    processes = 1 if args.accelerator_config.split_batches else args.world_size
    return int(args.train_batch_size * args.gradient_accumulation_steps * processes)


def steps_per_epoch(rows: int, args: Any) -> int:
    """Return the optimizer steps over ``rows`` rows, computed with the samplers of the trainer's data loader.

    Raises:
        TrainError: there are fewer rows than a batch, and incomplete batches are dropped.
    """
    batch = args.train_batch_size
    sampler = BatchSampler(SequentialSampler(range(rows)), batch, args.dataloader_drop_last)
    config = args.accelerator_config
    shard = BatchSamplerShard(
        sampler, num_processes=args.world_size, process_index=0, split_batches=config.split_batches, even_batches=config.even_batches
    )
    if len(shard) == 0:
        raise TrainError(
            f"--dataloader-drop-last with {rows:,} rows and batches of {batch * args.world_size:,}: no batch is full. Use smaller batches"
        )
    return -(-len(shard) // int(args.gradient_accumulation_steps))


def total_steps(args: Any, an_epoch: int) -> int:
    """Return the steps of the whole run, from ``max_steps`` or else ``num_train_epochs``."""
    return int(args.max_steps) if args.max_steps > 0 else math.ceil(float(args.num_train_epochs) * an_epoch)


def rhythm(args: Any, steps: int) -> str:
    """Return text that says how often a run of ``steps`` steps logs, saves and evaluates, and how long its warm-up is."""
    state = TrainerState()
    state.compute_steps(args, steps)

    def every(what: str, kind: str) -> str:
        strategy = getattr(args, f"{kind}_strategy").value
        count = getattr(state, f"{kind}_steps")
        return {"no": f"no {what}", "epoch": f"{what} after each epoch", "best": f"{what} of each new best"}.get(
            strategy, f"{what} every {count:,.0f} step{'' if count == 1 else 's'}"
        )

    parts = [every("logs", "logging"), every("checkpoints", "save"), every("evaluations", "eval")]
    warmup = args.get_warmup_steps(steps)
    return ", ".join([*parts, f"a warm-up of {counted(warmup, 'step')}" if warmup else "no warm-up"])
