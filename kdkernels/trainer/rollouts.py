"""Responses sampled from the student, for on-policy distillation (GKD, Agarwal et al. 2024, https://arxiv.org/abs/2306.13649).

With the reverse KL and ``on_policy_fraction=1`` each rollout token carries the exact KL(student || teacher) over the vocabulary, as in
MiniLLM (Gu et al. 2024, https://arxiv.org/abs/2306.08543), but without its policy-gradient term: the samples are constants.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import sys
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..data.collator import Item, left_padded, pad_id
from ..data.example import Example
from ..tap.patching import is_sharded
from ..tap.weights import embedding_rows, logit_columns
from ..teachers.local import ends, writing

__all__ = ["chosen", "rollouts"]


def chosen(fraction: float, *place: int) -> bool:
    """Return whether the student writes the responses of the batch at ``place`` (seed, step, micro-batch). Equal on all ranks."""
    return random.Random("/".join(map(str, place))).random() < fraction


def rollouts(
    model: nn.Module, items: Sequence[Item], tokenizer: Any, *, temperature: float, max_new_tokens: int, max_length: int | None,
    vocab_size: int | None, place: Sequence[int],
) -> list[Item]:  # fmt: skip
    """Return the items with responses sampled from ``model``, up to and including the first end-of-text token, in both views.

    In a conversation with several learnt turns, only the last is sampled and scored. Prompts are padded on the left. The draws depend
    only on ``place`` (seed, step, micro-batch, rank), and the global random state is restored. If the model is sharded, every rank must
    call this, even without prompts.
    """
    examples = [example for item in items for example in item]
    prompts = [example.student_ids[: example.prompts()[0]] for example in examples]
    room = max_new_tokens
    if max_length is not None:
        room = min(room, max_length - max(max(e.prompts()) for e in examples))
    full = room < 1  # no room after the prompt: keep the data's response
    if full and not is_sharded(model):
        return list(items)
    if full:  # run the model anyway: the other ranks need this rank's shards
        prompts, room = [prompt[-1:] for prompt in prompts], 1
    device = next(model.parameters()).device
    pad = pad_id(tokenizer, embedding_rows(model))
    ids, mask = left_padded(prompts, pad)
    seed = int.from_bytes(hashlib.sha256("/".join(map(str, place)).encode()).digest()[:8], "little") >> 1
    stops = ends(model, tokenizer)
    config = _sampling(stops, pad, temperature, room, range(vocab_size or sys.maxsize, logit_columns(model)))
    with torch.no_grad(), writing(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        written = model.generate(  # type: ignore[operator]
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
        )
    if full:
        return list(items)
    fresh = iter([_answered(e, _until(row, stops)) for e, row in zip(examples, written[:, ids.shape[1] :].tolist(), strict=True)])
    return [tuple(next(fresh) for _ in item) for item in items]


def _sampling(stops: list[int], pad: int, temperature: float, room: int, never: range) -> Any:
    """Configure plain sampling from softmax(z / temperature) over all columns except padding."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=room, do_sample=temperature > 0, temperature=temperature or 1.0, top_k=0, top_p=1.0, num_beams=1,
        pad_token_id=pad, eos_token_id=stops or None, use_cache=True, suppress_tokens=list(never) or None,
    )  # fmt: skip


def _until(ids: list[int], stops: list[int]) -> list[int]:
    at = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[: at + 1]


def _answered(example: Example, response: list[int]) -> Example:
    def view(ids: Sequence[int], prompt: int) -> tuple[Any, Any]:
        return array("i", [*ids[:prompt], *response]), range(prompt - 1, prompt - 1 + len(response))

    of_student, of_teacher = example.prompts()
    weight = example.parts[-1][1]
    student, teacher = view(example.student_ids, of_student), view(example.teacher_ids, of_teacher)
    return dataclasses.replace(
        example, student_ids=student[0], student_scored=student[1], teacher_ids=teacher[0], teacher_scored=teacher[1],
        turns=() if weight == 1 else ((len(response), weight),),
    )  # fmt: skip
