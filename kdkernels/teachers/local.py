"""A transformers model in this process as a ``TextModel``, so that recipes run without a server."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.collator import left_padded, pad_id
from ..data.encoding import TextEncoder
from ..data.messages import read_turns
from ..data.templates import chat_text, template_facts
from ..support.files import digest
from ..tap.weights import embedding_rows
from .loading import load
from .reasoning import opens_thoughts, read_generated
from .replies import OtherRequest, ReplyLog, check_requests, fingerprint, reply_of, seed_of
from .text import Reply, Request, Usage

__all__ = ["LocalModel", "ends", "generate", "prompt_ids", "writing"]

MARK_TOKENS = 16
"""Number of tokens at the end of a prompt that are searched for an opening mark of thoughts."""


class LocalModel:
    """Generates text with a model and its tokenizer: greedily at temperature 0, else with seeded draws.

    A draw depends on the seed and the request's key, not on the other rows of the batch. Rounding depends on the batch: if two tokens are
    almost equally likely, an interrupted and resumed run may pick the other one.

    Args:
        model: a causal language model with ``generate``, or its folder or hub id.
        tokenizer: the model's tokenizer. Without a chat template, the contents of the messages are joined by line breaks. Default: the
            tokenizer in the model's folder.
        device: device of the model.
        dtype: dtype of a model that is loaded from a folder or hub id.
        batch_size: requests per batch.
        seed: random seed.
        name: name of the model in the log, which prevents using another model's replies. Default: the folder's name and a hash of its
            weights, or the hub id and its commit.
        report: called after each reply.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        tokenizer: Any = None,
        *,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int = 8,
        seed: int = 0,
        name: str = "",
        report: Callable[[Usage], object] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be >= 1")
        if isinstance(model, (str, Path)):
            from transformers import AutoModelForCausalLM, AutoTokenizer

            from .cache.manifest import identity_of_model

            tokenizer = load(AutoTokenizer, "model", str(model)) if tokenizer is None else tokenizer
            loaded: Any = load(AutoModelForCausalLM, "model", str(model), dtype=dtype).eval()
            name = name or "@".join(identity_of_model(str(model), getattr(loaded.config, "_commit_hash", None)))
        else:
            loaded = model
        if tokenizer is None:
            raise ValueError("tokenizer is missing: pass it if the model is a module")
        self.model = loaded if device is None else loaded.to(device)
        self.tokenizer, self.batch_size, self.seed, self.report = tokenizer, batch_size, seed, report
        self.usage = Usage()
        self.name = name or str(getattr(getattr(loaded, "config", None), "_name_or_path", ""))

    def complete(self, requests: Sequence[Request], log: Path) -> list[Reply]:
        """See ``TextModel``.

        Raises:
            ValueError: two requests have the same key, or a request is invalid.
            FileError: the log is in use or damaged, or has a reply under one of the keys to another request or from another tokenizer, chat
                template or end token.
        """
        check_requests(requests)
        with ReplyLog(log) as replies:
            hashes = {r.key: fingerprint(r, model=self.name, seed=self.seed) for r in requests}
            done = {r.key: entry for r in requests if (entry := replies.find(r.key, hashes[r.key])) is not None}
            todo = [r for r in requests if r.key not in done]
            tokens = self._tokens()
            if any(entry.get("tokens", tokens) != tokens for entry in done.values()):  # logs of earlier versions lack the field
                raise OtherRequest(
                    f"{log.name} holds replies that were written with another tokenizer, chat template or end token. Give another file, or "
                    "the model as it was"
                )
            for entry in done.values():
                self._count(entry, from_log=True)
            for batch in self._batches(todo):
                for request, reply in zip(batch, self._generate(batch), strict=True):
                    value = {
                        "text": reply.text, "finish_reason": reply.finish_reason, "prompt_tokens": reply.prompt_tokens,
                        "completion_tokens": len(reply.ids), "logprobs": reply.logprobs,
                        **({"reasoning": reply.reasoning} if reply.reasoning else {}), "tokens": tokens,
                    }  # fmt: skip
                    replies.append(request.key, hashes[request.key], value)
                    done[request.key] = value
                    self._count(value, from_log=False)
            return [reply_of({**done[r.key], "key": r.key}) for r in requests]

    def _tokens(self) -> str:
        """Return a hash of everything that determines the tokens of a prompt and the end of a response."""
        from .cache.manifest import template_hash, tokenizer_hash

        return digest([tokenizer_hash(self.tokenizer), template_hash(self.tokenizer), ends(self.model, self.tokenizer)])

    def _count(self, entry: Mapping[str, Any], from_log: bool) -> None:
        self.usage.add(entry, from_log)
        if self.report is not None:
            self.report(self.usage)

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Yield batches of consecutive requests with equal settings."""
        for _, group in groupby(requests, key=lambda r: (r.max_tokens, r.temperature, tuple(r.stop), r.logprobs)):
            same = list(group)
            for i in range(0, len(same), self.batch_size):
                yield same[i : i + self.batch_size]

    def _generate(self, batch: Sequence[Request]) -> list[Generated]:
        first = batch[0]
        return generate(
            self.model,
            self.tokenizer,
            [prompt_ids(self.tokenizer, request.messages) for request in batch],
            [seed_of(self.seed, request.key) for request in batch],
            max_tokens=first.max_tokens,
            temperature=first.temperature,
            stop=first.stop,
            logprobs=first.logprobs,
        )


def prompt_ids(tokenizer: Any, messages: Sequence[Any], date: datetime.date | None = None) -> list[int]:
    """Return the token ids of a prompt for the assistant's answer. If the chat template writes the date, it is ``date``, default today."""
    if getattr(tokenizer, "chat_template", None):
        return TextEncoder(tokenizer)(chat_text(tokenizer, read_turns(messages, ValueError), date=date), begin=False)
    return TextEncoder(tokenizer)("\n".join(m["content"] for m in messages), begin=True)


@dataclass
class Generated:
    """A generated text."""

    ids: list[int]
    """Token ids without the end token."""
    text: str
    finish_reason: str
    prompt_tokens: int
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    reasoning: str = ""
    """The thoughts before ``text``."""


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    stop: Sequence[str] = (),
    logprobs: int = 0,
    streamer: Any = None,
) -> list[Generated]:
    """Continue one batch of prompts, padded on the left.

    Args:
        seeds: 64-bit seed of each row.
        streamer: a ``transformers.TextStreamer`` that shows the text of a single prompt while it is generated.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    device = next(model.parameters()).device
    stops = ends(model, tokenizer)
    embeddings = embedding_rows(model)
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} of the batch has no tokens")
        if embeddings is not None and (worst := max(prompt)) >= embeddings:
            token = tokenizer.convert_ids_to_tokens(worst)
            raise ValueError(
                f"prompt {row} of the batch has the token {token!r} (id {worst}), beyond the {embeddings:,} embeddings of the model"
            )
    pad = pad_id(tokenizer, embeddings)
    ids, mask = left_padded(prompts, pad)
    picks = _Picks(seeds, temperature, logprobs)
    config = GenerationConfig(
        max_new_tokens=max_tokens, do_sample=False, num_beams=1, eos_token_id=stops or None, pad_token_id=pad,
        stop_strings=list(stop) or None, use_cache=True,
    )  # fmt: skip
    with writing(model):
        output = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config,
            logits_processor=LogitsProcessorList([picks]), tokenizer=tokenizer if stop else None, streamer=streamer,
        )  # fmt: skip
    return [
        _cut(tokenizer, row, list(new), stops, stop, max_tokens, prompts[row], picks)
        for row, new in enumerate(output[:, ids.shape[1] :].tolist())
    ]


def ends(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end a text: those of the model, of the tokenizer, and of the turns of its chat template."""
    of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    every = *([of_model] if isinstance(of_model, int) else of_model or []), tokenizer.eos_token_id, template_facts(tokenizer).end
    return sorted({end for end in every if end is not None})


@contextmanager
def writing(model: nn.Module) -> Iterator[None]:
    """Generate in eval mode from the plain distributions within the block.

    The model's generation config is removed meanwhile, because transformers merges its penalties and cut-offs into any other config.
    """
    from transformers import GenerationConfig

    holders: list[Any] = [module for module in model.modules() if "generation_config" in module.__dict__]
    configs, training = [holder.generation_config for holder in holders], model.training
    model.eval()
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig()
        yield
    finally:
        model.train(training)
        for holder, config in zip(holders, configs, strict=True):
            holder.generation_config = config


def _cut(
    tokenizer: Any,
    row: int,
    ids: list[int],
    ends: list[int],
    stop: Sequence[str],
    max_tokens: int,
    prompt: Sequence[int],
    picks: _Picks,
) -> Generated:
    """Return one row up to its end: an end token, or a stop text."""
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    reason = "length" if end is None and len(ids) >= max_tokens else "stop"
    ids = ids[:end]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    places = [place for s in stop if (place := text.find(s)) >= 0]
    surplus = 0
    if places:
        reason = "stop"
        while ids and len(tokenizer.decode(ids[:-1], skip_special_tokens=True)) >= min(places):
            ids = ids[:-1]
        surplus = len(tokenizer.decode(ids, skip_special_tokens=True)) - min(places)
    opened = opens_thoughts(tokenizer.decode(prompt[-MARK_TOKENS:], skip_special_tokens=False))
    reasoning, answer = read_generated(tokenizer, ids, opened, surplus)
    # If the row reached an end token, include its log-probability: that of ending there.
    count = len(ids) + (end is not None and not places)
    return Generated(ids, answer, reason, len(prompt), picks.logprobs(tokenizer, row, count), reasoning)


class _Picks:
    """A logits processor for greedy search: adds Gumbel noise, so that the largest logit is an exact draw, and saves log-probabilities.

    Gumbel, E. J. (1954). Each row has its own random generator.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, logprobs: int) -> None:
        self._temperature, self._k = temperature, logprobs
        self._generators = [torch.Generator().manual_seed(seed >> 1) for seed in seeds] if temperature > 0 else []
        self._steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # [B, L], [B, V]
        noisy = scores
        if self._generators:
            noise = torch.stack([torch.rand(scores.shape[-1], generator=g, dtype=torch.float64) for g in self._generators])
            noisy = scores / self._temperature - noise.clamp(min=1e-300).log().neg().log().to(scores)
        if self._k:
            logprobs = scores.float().log_softmax(-1)
            top = logprobs.topk(self._k)
            picked = noisy.argmax(-1)
            logprob = logprobs.gather(1, picked[:, None])[:, 0]
            self._steps.append((picked.cpu(), logprob.cpu(), top.indices.cpu(), top.values.cpu()))
        return noisy

    def logprobs(self, tokenizer: Any, row: int, count: int) -> list[dict[str, Any]]:
        """Return the log-probabilities in the form of a ``Reply``, with token ids, which servers do not send."""

        def token(id: int, logprob: float) -> dict[str, Any]:
            return {"token": tokenizer.decode([id]), "logprob": logprob, "id": id}

        return [
            {
                **token(int(picked[row]), float(logprob[row])),
                "top_logprobs": [token(i, p) for i, p in zip(ids[row].tolist(), values[row].tolist(), strict=True)],
            }
            for picked, logprob, ids, values in self._steps[:count]
        ]
