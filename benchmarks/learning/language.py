"""Language models: students of one size and one budget of steps, taught by one teacher on one corpus, each by another loss.

The corpus is the Python standard library, the teacher a four-layer Llama, the student a two-layer one, as in ``kdkernels demo``; here
every student goes through ``DistillationTrainer``. All see the same rows in the same order: 32 tokens of prompt, of which nothing is
learned, and what follows in the file. The on-policy ones learn half of their batches from rollouts of their own instead.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, logging

import kdkernels as kd
from kdkernels.cli.demo import corpus
from kdkernels.cli.demo.settings import Settings
from kdkernels.cli.demo.train import Batches, build, ce_loss, head, train
from kdkernels.trainer import DistillationArguments, DistillationTrainer

SETTINGS = Settings(max_bytes=4_000_000, window=160)
STEPS, ROWS = 120, 8
PROMPT, LENGTH = 32, 128  # tokens

STUDENTS: dict[str, dict[str, Any]] = {
    "labels alone": {"kd_weight": 0.0, "ce_weight": 1.0},
    "forward KL": {"divergence": "forward_kl"},
    "reverse KL": {"divergence": "reverse_kl"},
    "JSD": {"divergence": "jsd"},
    "skew KL": {"divergence": "skew_kl"},
    "forward KL and features": {"divergence": "forward_kl", "feature_weight": 1.0, "feature_layers": "1:3"},
    "JSD, half on-policy": {"divergence": "jsd", "on_policy_fraction": 0.5, "max_new_tokens": LENGTH - PROMPT},
    "reverse KL, half on-policy": {"divergence": "reverse_kl", "on_policy_fraction": 0.5, "max_new_tokens": LENGTH - PROMPT},
}
"""The ``DistillationArguments`` of each student beside the common ones."""


@dataclass(frozen=True)
class World:
    """Data, teacher and settings that all students share."""

    tokenizer: PreTrainedTokenizerFast
    documents: list[list[int]]
    teacher: LlamaForCausalLM
    held_out: Tensor  # [windows, LENGTH + 1]


def world(on_step: Callable[[float], None] = lambda _: None) -> World:
    """Corpus, tokenizer and a trained teacher: the same every time."""
    text = corpus.collect(None, SETTINGS.max_bytes, SETTINGS.seed)
    tokenizer: Tokenizer = corpus.train_tokenizer(text, SETTINGS.vocab_size)
    tokens = corpus.tokenize(text, tokenizer)
    batches = Batches(tokens.train, tokens.held_out, SETTINGS)
    teacher = build(SETTINGS.teacher, tokens.vocab, SETTINGS)
    train(teacher, ce_loss, batches.training(SETTINGS.teacher_steps, 0), batches.held_out, SETTINGS.teacher_lr, 1, on_step)
    teacher.requires_grad_(False).eval()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=corpus.END_OF_TEXT, pad_token=corpus.END_OF_TEXT)
    encoded = tokenizer.encode_batch_fast([d.text for d in text.train])
    return World(fast, [e.ids for e in encoded if len(e.ids) > LENGTH], teacher, batches.held_out)


def rows(of: World, seed: int) -> list[dict[str, str]]:
    """Prompt and completion of every training row, in order."""
    rng = random.Random(seed)
    found = []
    for _ in range(STEPS * ROWS):
        ids = rng.choices(of.documents, weights=[len(d) - LENGTH for d in of.documents])[0]
        start = rng.randrange(len(ids) - LENGTH)
        prompt, completion = ids[start : start + PROMPT], ids[start + PROMPT : start + LENGTH]
        found.append({"prompt": of.tokenizer.decode(prompt), "completion": of.tokenizer.decode(completion)})
    return found


def one_seed(of: World, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Each student and its held-out figures, as it is done; the teacher first."""
    yield "teacher", held_out(of.teacher, of)
    data = rows(of, seed)
    logging.set_verbosity_error()  # that the models take over the tokenizer's end of text
    for name, options in STUDENTS.items():
        student = build(SETTINGS.student, of.teacher.config.vocab_size, replace(SETTINGS, seed=seed))
        with tempfile.TemporaryDirectory() as folder:
            arguments = DistillationArguments(
                output_dir=folder, max_steps=STEPS, per_device_train_batch_size=ROWS, learning_rate=SETTINGS.student_lr, warmup_steps=12,
                lr_scheduler_type="cosine", weight_decay=0.1, adam_beta2=0.95, seed=seed, temperature=1.0, max_length=SETTINGS.window,
                overlong="truncate", save_strategy="no", report_to=[], logging_strategy="no", use_cpu=True, disable_tqdm=True, **options,
            )  # fmt: skip
            trainer = DistillationTrainer(
                model=student, teacher=of.teacher, args=arguments, train_dataset=data, processing_class=of.tokenizer
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        yield name, held_out(student, of)


@torch.no_grad()
def held_out(model: LlamaForCausalLM, of: World) -> dict[str, float]:
    """Means over held-out tokens, nats: cross-entropy, distances from the teacher in both directions, share of equal first choices."""
    model.eval()
    sums: dict[str, float] = {}
    for windows in of.held_out.split(16):
        ids, labels = windows[:, :-1], windows[:, 1:]
        sides = head(model, ids), head(of.teacher, ids)
        _, forward = kd.distillation_loss(*sides, labels=labels, return_stats=True)
        _, reverse = kd.distillation_loss(*sides, divergence="reverse_kl", return_stats=True)
        for name, values in (
            ("cross-entropy", forward.cross_entropy),
            ("KL(teacher, student)", forward.divergence),
            ("KL(student, teacher)", reverse.divergence),
            ("same first choice, %", 100 * forward.top1_agreement),
        ):
            sums[name] = sums.get(name, 0.0) + float(values.double().sum()) / of.held_out[:, 1:].numel()
    return {name: round(value, 4) for name, value in sums.items()}
