"""The student's own responses: what on-policy distillation trains on (GKD, Agarwal et al. 2024, https://arxiv.org/abs/2306.13649).

With the reverse KL and ``on_policy_fraction=1`` each rollout token carries the exact KL(student || teacher) over the vocabulary, as in
MiniLLM (Gu et al. 2024, https://arxiv.org/abs/2306.08543), but without its policy-gradient term: the samples are constants.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..data.collator import Item, left_padded, pad_id
from ..data.example import Example
from ..tap.patching import is_sharded, text_config

__all__ = ["chosen", "rollouts"]


def chosen(fraction: float, *place: int) -> bool:
    """Whether the student writes the responses of the batch at this place (seed, step, micro-batch): the same on every rank."""
    return random.Random("/".join(map(str, place))).random() < fraction


def rollouts(
    model: nn.Module, items: Sequence[Item], tokenizer: Any, *, temperature: float, max_new_tokens: int, max_length: int | None,
    vocab_size: int | None, place: Sequence[int],
) -> list[Item]:  # fmt: skip
    """The items with responses that ``model`` samples: up to and with the first end-of-text token, in both views.

    Prompts are padded on the left. The draws depend on ``place`` (seed, step, micro-batch, rank) alone; the global random state stays as
    it was. Where the model is in shards, every rank has to call this, whatever its prompts.
    """
    examples = [example for item in items for example in item]
    prompts = [example.student_ids[: example.student_scored[0] + 1] for example in examples]
    room = max_new_tokens
    if max_length is not None:
        room = min(room, max_length - max(max(e.student_scored[0], e.teacher_scored[0]) + 1 for e in examples))
    full = room < 1  # a prompt that fills the row leaves no room for another response than the data's
    if full and not is_sharded(model):
        return list(items)
    if full:  # the other ranks can't do without this one's shards
        prompts, room = [prompt[-1:] for prompt in prompts], 1
    device = next(model.parameters()).device
    ids, mask = left_padded(prompts, pad_id(tokenizer))
    seed = int.from_bytes(hashlib.sha256("/".join(map(str, place)).encode()).digest()[:8], "little") >> 1
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            written = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=_sampling(model, tokenizer, temperature, room, vocab_size),
            )
    finally:
        model.train(training)
    if full:
        return list(items)
    ends = _ends(model, tokenizer)
    fresh = iter([_answered(e, _until(row, ends)) for e, row in zip(examples, written[:, ids.shape[1] :].tolist(), strict=True)])
    return [tuple(next(fresh) for _ in item) for item in items]


def _sampling(model: nn.Module, tokenizer: Any, temperature: float, room: int, vocab_size: int | None) -> Any:
    """Plain sampling from softmax(z / temperature), whatever the model's own generation config prefers."""
    from transformers import GenerationConfig

    columns = int(text_config(model).vocab_size)
    return GenerationConfig(
        max_new_tokens=room, do_sample=temperature > 0, temperature=temperature or 1.0, top_k=0, top_p=1.0,
        num_beams=1, repetition_penalty=1.0,
        pad_token_id=pad_id(tokenizer), eos_token_id=sorted(_ends(model, tokenizer)) or None, use_cache=True,
        suppress_tokens=list(range(vocab_size, columns)) if vocab_size is not None and vocab_size < columns else None,
    )  # fmt: skip


def _ends(model: nn.Module, tokenizer: Any) -> set[int]:
    of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [of_model] if isinstance(of_model, int) else list(of_model or [])
    return {end for end in [*ends, tokenizer.eos_token_id] if end is not None}


def _until(ids: list[int], ends: set[int]) -> list[int]:
    at = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[: at + 1]


def _answered(example: Example, response: list[int]) -> Example:
    def view(ids: Sequence[int], scored: Sequence[int]) -> tuple[Any, Any]:
        prompt = scored[0] + 1
        return array("i", [*ids[:prompt], *response]), range(prompt - 1, prompt - 1 + len(response))

    student, teacher = view(example.student_ids, example.student_scored), view(example.teacher_ids, example.teacher_scored)
    return dataclasses.replace(
        example, student_ids=student[0], student_scored=student[1], teacher_ids=teacher[0], teacher_scored=teacher[1]
    )
