"""``kdkernels train --plan``: describe a run without loading weights or writing files."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from ... import losses
from ...data.collator import pack, with_prompt
from ...data.example import Example
from ...data.streaming import ExampleStream
from ...data.tokenization import Tally, length_limit
from ...divergences import parse
from ...sides import Ensemble, LMHead, Sampled, Teacher, TopK
from ...support.errors import counted
from ...tap.patching import text_config
from ...tap.weights import embedding_rows, head_width, logit_columns
from ...teachers.loading import skeleton_of
from ...trainer.checkpoints import step_of
from ...trainer.hooks import use_one_gpu
from .data import RunData, read_data
from .loading import cache_of, check_data, student_skeleton, tokenizer_of
from .output import RECORD
from .record import check_expected
from .resume import choose_learn, known_record, requested, starting_point
from .settings import Settings
from .steps import items_per_step, rhythm, steps_per_epoch, total_steps

__all__ = ["plan"]

FIRST = 100
"""Items of streamed data that a plan counts."""


def plan(settings: Settings, console: Console) -> None:
    """Print models, tokens, steps and memory of a run, without loading weights or writing files."""
    args = settings.args
    transformers.logging.set_verbosity_error()
    use_one_gpu(args)
    check_data(settings)
    tokenizer = tokenizer_of(settings)
    skeletons = [student_skeleton(settings), *(skeleton_of("teacher", path) for path in settings.teacher)]
    cache = cache_of(settings, tokenizer) if settings.cache else None
    choose_learn(args, cache)
    limit = length_limit(args.max_length, map(text_config, skeletons), args.packing)
    tally = Tally()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        data = read_data(settings, tokenizer, cache, limit, embedding_rows(*skeletons), tally)
    examples = list(chain.from_iterable(islice(data.train, FIRST))) if isinstance(data.train, ExampleStream) else data.train
    if args.kd_on_prompt:
        examples = list(map(with_prompt, examples))
    for (role, path, dtype), model in zip(settings.models, skeletons, strict=True):
        count = sum(p.numel() for p in model.parameters())
        dtype_name = str(model.config.dtype or torch.float32).removeprefix("torch.") if dtype == "auto" else dtype
        size = count * getattr(torch, dtype_name).itemsize / 2**30
        console.print(
            f"{role}: {path}, {count / 1e6:,.1f} M parameters, {size:,.2f} GiB in {dtype_name}, {logit_columns(model):,} columns of logits"
        )
    if cache is not None:
        console.print(f"teacher: cache {settings.cache} ({cache.kind}), {cache.vocab_size:,} tokens in the vocabulary")
    for sentence in [*(str(warning.message) for warning in said), *tally.of_reasoning()]:
        console.print(sentence)
    rows = pack(examples, limit) if args.packing and limit else [(e,) for e in examples]
    steps = _plan_steps(args, data, rows, console)
    console.print(f"run: {_state(settings, tokenizer, steps, console)}", markup=False)
    _plan_memory(args, skeletons, cache, rows, console)


def _plan_steps(args: Any, data: RunData, rows: Sequence[tuple[Example, ...]], console: Console) -> int:
    """Show the data and the steps of a run; return the number of steps.

    Args:
        rows: of the whole data, or the first of a stream.
    """
    streamed, examples = isinstance(data.train, ExampleStream), list(chain.from_iterable(rows))
    scored, tokens = sum(len(e.student_scored) for e in examples), sum(len(e.student_ids) for e in examples)
    an_epoch = steps_per_epoch(len(data.train if streamed else rows), args)
    steps = total_steps(args, an_epoch)
    console.print(
        f"data: {'streamed; the first ' if streamed else ''}{counted(len(examples), 'example')} in {counted(len(rows), 'row')}; "
        f"{counted(tokens, 'token')}, {scored:,} of them scored; the longest example has {max(map(len, examples)):,}"
    )
    if data.held_out is not None:
        console.print(f"held out: {counted(len(data.held_out), 'example')}")
    epochs = "" if streamed else f", {steps / an_epoch:.2f} epochs"
    console.print(f"steps: {steps:,} of {counted(items_per_step(args), 'row')} each{epochs}; {rhythm(args, steps)}")
    return steps


def _state(settings: Settings, tokenizer: Any, steps: int, console: Console) -> str:
    """Return text that says whether the run begins, continues or is finished."""
    checkpoint = None
    if (
        settings.expected is not None or (Path(settings.args.output_dir) / RECORD).is_file() or requested(settings.args) is not None
    ):  # else no weights are read
        now, old = known_record(settings, tokenizer)
        check_expected(settings, now, console)
        checkpoint = None if old is None else starting_point(settings.args, steps)
    if checkpoint is None:
        return f"begins in {settings.args.output_dir}"
    remaining = steps - step_of(checkpoint)
    return f"goes on from {checkpoint}, {counted(remaining, 'step')} to go" if remaining else f"is finished: {checkpoint} is its last step"


def _plan_memory(args: Any, skeletons: Sequence[Any], cache: Any, rows: Sequence[tuple[Example, ...]], console: Console) -> None:
    student, *teachers = skeletons
    largest = sorted((sum(len(e.student_scored) for e in row) for row in rows), reverse=True)[: args.per_device_train_batch_size]
    vocab = min([logit_columns(model) for model in skeletons] + ([] if cache is None else [cache.vocab_size]))

    def side(model: Any, trained: bool) -> LMHead:
        weight = torch.empty(logit_columns(model), head_width(model), device="meta", requires_grad=trained)
        hidden = torch.empty(sum(largest), head_width(model), device="meta", requires_grad=model is student)
        return LMHead(hidden, weight, vocab_size=vocab)

    student_side = side(student, student.get_output_embeddings().weight.requires_grad)
    teacher_side: Teacher = side(teachers[0] if teachers else student, False)
    if len(teachers) > 1:
        teacher_side = Ensemble([side(teacher, False) for teacher in teachers], mode=args.ensemble_mode)
    if cache is not None and cache.kind != "hidden":
        ids = torch.empty(sum(largest), cache.manifest.identity.k, dtype=torch.int64, device="meta")
        teacher_side = TopK(ids, ids.float(), temperature=cache.temperature or 1.0) if cache.kind == "topk" else Sampled(ids, ids)
    cost = losses.plan(
        student_side,
        teacher_side,
        divergence=parse(args.divergence),
        temperature=args.temperature,
        memory_budget=args.memory_budget,
        return_stats=True,
    )
    trainable = sum(p.numel() for p in student.parameters() if p.requires_grad)
    console.print(
        f"loss: at most {sum(largest):,} scored tokens in a batch, in {cost.num_chunks} chunk{'s' if cost.num_chunks != 1 else ''}: "
        f"{cost.buffer_bytes / 2**20:,.0f} MiB of buffers, where dense logits take {cost.dense_bytes / 2**20:,.0f} MiB"
    )
    frozen = sum(p.numel() for p in student.parameters()) - trainable
    console.print(
        f"student: {trainable / 1e6:,.3f} M parameters are trained{f', {frozen / 1e6:,.1f} M are frozen' if frozen else ''}: "
        f"{trainable * 16 / 2**30:,.2f} GiB of float32 weights, gradients and Adam states; activations come on top"
    )
