"""SCOTT: rationales that support the answer, and a student whose answer follows from its rationale.

Wang et al. 2023 (https://arxiv.org/abs/2305.01879). The teacher explains the gold answer a* by contrastive decoding against a perturbed
answer a' (none at all, or a wrong one):

    t_i = argmax log p(t | x, a*, t_<i) + G,   G = log p(t | x, a*, t_<i) - log p(t | x, a', t_<i)

which is the argmax of ``log p(. | a*) - s log p(. | a')`` with strength s = 1/2. The student learns two tasks, distinguished by a prefix:

    factual:        L = -log q(r, a* | x)
    counterfactual: L = -log q(a' | x, r'),  r' the teacher's rationale for a wrong answer a'

Left out: nucleus-sampled rationales as a baseline, and the paper's encoder-decoder student:
in a causal model, r' stands before the answer and is not scored.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ..data.templates import chat_text
from ..teachers.cache.manifest import identity_of_model
from ..teachers.loading import load
from ..teachers.local import ends, writing
from ..teachers.text import Reply
from . import answers
from .chain_of_thought import worked
from .rows import Item, RecipeError, Row, cut_short, extended, fingerprint, once_each, student_row

__all__ = ["Contrast", "Explainer", "counterfactual_rows", "explain_prompt", "factual_rows", "wrong_answers"]

PREFIXES = {"factual": "[factual] ", "counterfactual": "[counterfactual] "}


class Contrast(LogitsProcessor):  # type: ignore[misc]
    """Compute ``log p(. | prompt) - strength * log p(. | other prompt)`` after the same generated tokens, for greedy decoding or sampling.

    If the teacher alone would stop, generation stops, because with the contrast it might never do so.
    """

    def __init__(self, model: Any, other_ids: Tensor, other_mask: Tensor, prompt_length: int, strength: float, eos: Sequence[int]) -> None:
        """``other_ids`` and ``other_mask``: ``[B, L']``, padded on the left; ``prompt_length``: length of the prompts of ``generate``."""
        self.model, self.strength = model, strength
        self._ids, self._mask = other_ids, other_mask
        self._prompt_length = prompt_length
        self._eos = torch.tensor(list(eos), device=other_ids.device)
        known = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._cache_name = "cache" if "cache" in known else "past_key_values"  # before transformers 5.24
        self._cache: Any = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``[B, V]`` for ids ``[B, L]`` and logits ``[B, V]``."""
        if len(input_ids) != len(self._ids):
            raise ValueError(f"{len(input_ids)} sequences for {len(self._ids)} other prompts: contrastive decoding has no beams")
        new = self._ids
        if input_ids.shape[1] > self._prompt_length:
            new = input_ids[:, -1:]
            self._mask = torch.cat([self._mask, torch.ones_like(new)], -1)
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        out = self.model(
            input_ids=new, attention_mask=self._mask, position_ids=positions, use_cache=True,
            **self._last_only, **{self._cache_name: self._cache},
        )  # fmt: skip
        self._cache = getattr(out, self._cache_name)
        own = scores.float().log_softmax(-1)
        mixed = own - self.strength * out.logits[:, -1].float().log_softmax(-1)
        # A token with probability 0 under the teacher stays at -inf: -inf minus -inf would be NaN.
        mixed = mixed.masked_fill(own == -torch.inf, -torch.inf)
        stops = torch.isin(own.argmax(-1), self._eos)
        only_eos = torch.full_like(mixed, -torch.inf)
        only_eos[:, self._eos] = own[:, self._eos]
        return torch.where(stops[:, None], only_eos, mixed)


def explain_prompt(prompt: str, answer: str) -> str:
    """Return the prompt that asks the teacher to explain ``answer``; "" perturbs it by leaving the answer out."""
    return f"{prompt}\nThe answer is: {answer}\nExplain it step by step."


def wrong_answers(items: Sequence[Item], kind: answers.Kind, seed: int) -> list[str]:
    """Return a wrong answer for each item: one of its ``choices``, or the answer of another row. It depends only on the seed.

    Raises:
        RecipeError: an item has no wrong answer, its answer is not of this ``kind``, or its ``choices`` are not a list of text.
    """
    answers.check(items, kind)
    everyone = list(dict.fromkeys(i.response or "" for i in items))
    drawn = []
    for item in items:
        choices = item.row.get("choices", everyone)
        if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
            raise RecipeError(f"{item.where}, field 'choices': a list of text is needed")
        right = answers.normalise(item.response or "", kind)
        wrong = [c for c in choices if answers.normalise(c, kind) not in (None, right)]
        if not wrong:
            raise RecipeError(
                f"{item.where}: no wrong answer: neither 'choices' nor another row has one that differs from {item.response!r}"
            )
        drawn.append(random.Random(f"{seed}/{item.key}").choice(wrong))
    return drawn


@dataclass(frozen=True)
class Explainer:
    """A teacher that explains answers by contrastive decoding, greedily.

    Raises:
        RecipeError: ``strength`` is negative, or the tokenizer has no chat template or end-of-text token.
    """

    model: Any
    tokenizer: Any
    strength: float = 0.5
    max_tokens: int = 128
    batch: int = 8
    """Prompts decoded at once."""
    name: str = ""
    """In the log, so that another teacher's rationales are not taken for this one's."""

    def __post_init__(self) -> None:
        if not 0 <= self.strength < float("inf"):
            raise RecipeError(f"strength {self.strength}: it must be finite and >= 0, such as 0.5")
        if self.tokenizer.eos_token_id is None:
            raise RecipeError("the teacher's tokenizer has no end-of-text token: set eos_token in its tokenizer_config.json")
        if not self.tokenizer.chat_template:
            raise RecipeError("the teacher's tokenizer has no chat template")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @classmethod
    def load(cls, folder: Path, device: str, **settings: Any) -> Explainer:
        """Load a folder of a transformers model. The log identifies it by its weights."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = load(AutoModelForCausalLM, "teacher", str(folder), dtype="auto").to(device).eval()
        return cls(model, load(AutoTokenizer, "teacher", str(folder)), name="@".join(identity_of_model(str(folder), None)), **settings)

    def __call__(
        self,
        items: Sequence[Item],
        given: Sequence[str],
        contrasted: Sequence[str],
        log: Path,
        report: Callable[[int], object] = lambda count: None,
    ) -> list[str]:
        """Return a rationale for each item that supports the answer ``given`` rather than the ``contrasted`` one ("" for none); "" if it
        does not end within ``max_tokens``.

        Rationales in ``log`` are read from there. ``report`` is called with the number of new ones.
        """
        return [reply.text if cut_short(reply) is None else "" for reply in self.replies(items, given, contrasted, log, report)]

    def replies(
        self,
        items: Sequence[Item],
        given: Sequence[str],
        contrasted: Sequence[str],
        log: Path,
        report: Callable[[int], object] = lambda count: None,
    ) -> list[Reply]:
        """Return the same as a call, with the finish reason of each rationale. A truncated one has an empty text."""
        settings = [self.strength, self.max_tokens, self.name]
        views = {
            f"{item.key}/{fingerprint([list(map(dict, item.messages)), a, b, *settings])}": (item, a, b)
            for item, a, b in zip(items, given, contrasted, strict=True)
        }
        made = once_each(log, list(views), lambda some: self._explain([views[key] for key in some]), self.batch, report)
        return [Reply(key, str(one["text"]), str(one.get("finish_reason", "stop"))) for key, one in zip(views, made, strict=True)]

    @torch.no_grad()
    def _explain(self, views: Sequence[tuple[Item, str, str]]) -> list[dict[str, Any]]:
        tokenizer = self.tokenizer
        own = self._encoded([(item, a) for item, a, _ in views])
        other = self._encoded([(item, b) for item, _, b in views])
        length = own["input_ids"].shape[1]
        stops = ends(self.model, tokenizer)
        contrast = Contrast(self.model, other["input_ids"], other["attention_mask"], length, self.strength, stops)
        with writing(self.model):
            ids: Tensor = self.model.generate(
                **own, do_sample=False, num_beams=1, max_new_tokens=self.max_tokens, use_cache=True,
                logits_processor=LogitsProcessorList([contrast]), eos_token_id=stops, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        new = ids[:, length:]
        whole = torch.isin(new, torch.tensor(stops, device=new.device)).any(-1).tolist()
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        return [{"text": text.strip()} if w else {"text": "", "finish_reason": "length"} for text, w in zip(texts, whole, strict=True)]

    def _encoded(self, pairs: Sequence[tuple[Item, str]]) -> dict[str, Tensor]:
        texts = []
        for item, answer in pairs:
            messages = list(map(dict, extended(item.messages, explain_prompt(item.prompt, answer))))
            texts.append(chat_text(self.tokenizer, messages))
        encoded = self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        return {name: encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}


def factual_rows(items: Sequence[Item], rationales: Sequence[str], *, chat: bool = True) -> list[Row]:
    """Return rows with rationale and gold answer as one response. Items with an empty rationale are left out."""
    return [
        student_row(
            item, worked(text, item.response or ""), prompt=PREFIXES["factual"] + item.prompt, suffix="/factual", chat=chat, task="factual"
        )
        for item, text in zip(items, rationales, strict=True)
        if text
    ]


def counterfactual_rows(items: Sequence[Item], wrong: Sequence[str], rationales: Sequence[str], *, chat: bool = True) -> list[Row]:
    """Return rows with the rationale for a wrong answer in the prompt and that answer as response. Items without rationale are left out."""
    rows = []
    for item, answer, text in zip(items, wrong, rationales, strict=True):
        if text:
            prompt = f"{PREFIXES['counterfactual']}{item.prompt}\n{worked(text, '').rstrip()}"
            rows.append(student_row(item, answer, prompt=prompt, suffix="/counterfactual", chat=chat, task="counterfactual"))
    return rows
