"""Print the peak memory in MiB of one training step, without models and data: ``training_memory.py ROWS LENGTH VOCABULARY``."""

from __future__ import annotations

import resource
import sys
import tempfile

import torch
from training import make_model, make_tokenizer


def main(rows: int, length: int, vocabulary: int) -> None:
    from kdkernels.data.example import Example
    from kdkernels.trainer import DistillationArguments, DistillationTrainer

    models = [make_model(16, layers=1, vocab_size=vocabulary, max_position_embeddings=length + 1, seed=seed) for seed in (0, 1)]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, vocabulary, (rows, length + 1), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as folder:
        args = DistillationArguments(
            output_dir=folder, use_cpu=True, memory_budget=64 << 20, per_device_train_batch_size=rows, max_steps=1, save_strategy="no",
            optim="sgd", disable_tqdm=True, max_grad_norm=0.0,
        )  # fmt: skip
        examples = [Example(row, range(length), row, range(length)) for row in ids]
        trainer = DistillationTrainer(*models, args, train_dataset=examples, processing_class=make_tokenizer())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        trainer.train()
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
